//! The two ends of a session: what nodes and schedulers say to each other.
use super::{
    ADDRS_MAX, HOLDERS_MAX, NAME_MAX, TEXT_MAX, TranslateError, addrs, bounded, clean, digest, field, job_id,
    key, missing, public_key, some,
};
use crate::{
    exchange::{
        FinishedLease, HELD_MAX, Held, Holder, INPUT_MAX, LeaseAsk, READINGS_MAX, Refusal, Report, ToNode,
        ToScheduler,
    },
    id::LeaseKey,
    prelude::*,
    records::{Signed, Verified},
    routing,
    unit::{DeviceMillis, Millis, Portion, Rate, UtcMillis},
};
use alloc::boxed::Box;
use karez_proto::control as wire;

/// What a node says in its session.
// Moved once, from the wire to the mind: a box would only cost its readers.
#[allow(clippy::large_enum_variant)]
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FromNode {
    /// First word of a session.
    Hello {
        /// The node's version of Karez.
        version: String,
        /// Its name for people.
        name: String,
        /// What it holds.
        report: Report,
    },
    /// For the scheduler's mind.
    Heard(ToScheduler),
    /// A line for the job's log.
    Log {
        /// Of which lease.
        key: LeaseKey,
        /// The line.
        text: String,
    },
    /// A piece of an answer that is being written.
    Piece {
        /// Of which lease.
        key: LeaseKey,
        /// The piece.
        piece: Piece,
    },
    /// The node ends the session on purpose.
    Goodbye {
        /// Why.
        reason: String,
    },
}

/// Some tokens of an answer. Text is kept as it is, control characters included: it is the answer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Piece {
    /// Which item of the input.
    pub item: u64,
    /// Tokens of this answer before the piece.
    pub first_token: u64,
    /// Whole code points; at most [`PIECE_BYTES_MAX`].
    pub text: String,
    /// The tokens it came from; at most [`PIECE_TOKENS_MAX`]. A piece of a provider's own server counts as one
    /// [`UNNAMED_TOKEN`].
    pub tokens: Vec<u32>,
    /// JSON, one entry for each token; empty when not asked for. At most [`PIECE_BYTES_MAX`].
    pub logprobs: String,
}

/// A token that cannot be handed to another node: an answer that holds one cannot go on elsewhere.
pub const UNNAMED_TOKEN: u32 = u32::MAX;
/// Bytes of a piece's text, and of its log-probabilities, at most.
pub const PIECE_BYTES_MAX: usize = 256 << 10;
/// Tokens of one piece at most.
pub const PIECE_TOKENS_MAX: usize = 4096;

/// What a scheduler says in a node's session.
// Moved once, from the wire to the mind: a box would only cost its readers.
#[allow(clippy::large_enum_variant)]
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FromScheduler {
    /// First word of a session.
    Welcome {
        /// The scheduler's name for people.
        scheduler_name: String,
        /// How often to report.
        heartbeat: Millis,
        /// Where its artifact store is served: `host:port`.
        artifact_addrs: Vec<String>,
    },
    /// For the node's mind.
    Said(ToNode),
    /// The scheduler ends the session on purpose: come back later.
    Goodbye {
        /// Why.
        reason: String,
    },
}

impl From<FromNode> for wire::NodeMessage {
    fn from(from: FromNode) -> Self {
        use wire::node_message::Message;
        let message = match from {
            FromNode::Hello {
                version,
                name,
                report,
            } => Message::Hello(wire::Hello {
                version: clean(&version, NAME_MAX),
                name: clean(&name, NAME_MAX),
                report: Some(report.into()),
            }),
            FromNode::Heard(said) => return said.into(),
            FromNode::Log { key, text } => Message::Log(wire::LogLine {
                key: Some(key.into()),
                text: clean(&text, TEXT_MAX),
            }),
            FromNode::Piece { key, piece } => Message::Piece(wire::Piece {
                key: Some(key.into()),
                item: piece.item,
                first_token: piece.first_token,
                text: piece.text,
                tokens: piece.tokens,
                logprobs: piece.logprobs,
            }),
            FromNode::Goodbye { reason } => Message::Goodbye(wire::Goodbye {
                reason: clean(&reason, TEXT_MAX),
            }),
        };
        Self {
            message: Some(message),
        }
    }
}

impl From<ToScheduler> for wire::NodeMessage {
    fn from(said: ToScheduler) -> Self {
        use wire::node_message::Message;
        let message = match said {
            ToScheduler::Report(report) => Message::Report(report.into()),
            ToScheduler::Granted(lease) => Message::LeaseReply(wire::LeaseReply {
                key: Some(lease.key().into()),
                lease: lease.encode(),
                refusal: None,
            }),
            ToScheduler::Refused { key, why } => Message::LeaseReply(wire::LeaseReply {
                key: Some(key.into()),
                lease: Vec::new(),
                refusal: Some(why.into()),
            }),
            ToScheduler::Reading { key, reading } => Message::Reading(wire::Reading {
                key: Some(key.into()),
                envelope: reading.encode(),
            }),
            ToScheduler::Finished(finished) => Message::Usage(wire::UsageReport {
                key: Some(finished.lease.key().into()),
                envelope: finished.usage.encode(),
                lease: finished.lease.encode(),
                readings: finished.readings.iter().map(Verified::encode).collect(),
            }),
            ToScheduler::Alive { key } => Message::Alive(wire::Alive {
                key: Some(key.into()),
            }),
            ToScheduler::Warm(warmth) => Message::Warm(wire::Warm {
                models: warmth.models.iter().map(|m| m.0.to_vec()).collect(),
                prefixes: warmth.prefixes,
            }),
        };
        Self {
            message: Some(message),
        }
    }
}

impl TryFrom<wire::NodeMessage> for FromNode {
    type Error = TranslateError;
    fn try_from(w: wire::NodeMessage) -> Result<Self, TranslateError> {
        use wire::node_message::Message;
        let heard = match some("node message", "message", w.message)? {
            Message::Hello(w) => {
                return Ok(Self::Hello {
                    version: clean(&w.version, NAME_MAX),
                    name: clean(&w.name, NAME_MAX),
                    report: some("hello", "report", w.report)?.try_into()?,
                });
            }
            Message::Log(w) => {
                return Ok(Self::Log {
                    key: key("log", w.key)?,
                    text: clean(&w.text, TEXT_MAX),
                });
            }
            Message::Piece(w) => {
                bounded("piece", "text", w.text.len(), PIECE_BYTES_MAX)?;
                bounded("piece", "tokens", w.tokens.len(), PIECE_TOKENS_MAX)?;
                bounded("piece", "logprobs", w.logprobs.len(), PIECE_BYTES_MAX)?;
                return Ok(Self::Piece {
                    key: key("piece", w.key)?,
                    piece: Piece {
                        item: w.item,
                        first_token: w.first_token,
                        text: w.text,
                        tokens: w.tokens,
                        logprobs: w.logprobs,
                    },
                });
            }
            Message::Goodbye(w) => {
                return Ok(Self::Goodbye {
                    reason: clean(&w.reason, TEXT_MAX),
                });
            }
            Message::Report(w) => ToScheduler::Report(w.try_into()?),
            Message::LeaseReply(w) => lease_reply(w)?,
            Message::Reading(w) => ToScheduler::Reading {
                key: key("reading", w.key)?,
                reading: Signed::open(&w.envelope)?,
            },
            Message::Usage(w) => ToScheduler::Finished(Box::new(finished(w)?)),
            Message::Alive(w) => ToScheduler::Alive {
                key: key("alive", w.key)?,
            },
            Message::Warm(w) => {
                bounded("warm", "models", w.models.len(), routing::MODELS_MAX)?;
                bounded("warm", "prefixes", w.prefixes.len(), routing::PREFIXES_MAX)?;
                let models = w.models.iter().map(|m| digest("warm", "models", m));
                ToScheduler::Warm(routing::Warmth {
                    models: models.collect::<Result<_, _>>()?,
                    prefixes: w.prefixes,
                })
            }
        };
        Ok(Self::Heard(heard))
    }
}

fn lease_reply(w: wire::LeaseReply) -> Result<ToScheduler, TranslateError> {
    let key = key("lease reply", w.key)?;
    match w.refusal {
        Some(why) => Ok(ToScheduler::Refused {
            key,
            why: why.try_into()?,
        }),
        None if w.lease.is_empty() => Err(missing("lease reply", "lease")),
        None => {
            let lease = Signed::open(&w.lease)?;
            same_key("lease reply", key, &lease)?;
            Ok(ToScheduler::Granted(lease))
        }
    }
}

fn finished(w: wire::UsageReport) -> Result<FinishedLease, TranslateError> {
    let key = key("usage", w.key)?;
    bounded("usage", "readings", w.readings.len(), READINGS_MAX)?;
    if w.readings.is_empty() {
        return Err(missing("usage", "readings"));
    }
    let lease = Signed::open(&w.lease)?;
    same_key("usage", key, &lease)?;
    let usage = Signed::open(&w.envelope)?;
    let readings = w
        .readings
        .iter()
        .map(|r| Signed::open(r))
        .collect::<Result<_, _>>()?;
    Ok(FinishedLease {
        lease,
        readings,
        usage,
    })
}

fn same_key(
    message: &'static str,
    key: LeaseKey,
    lease: &crate::records::Lease,
) -> Result<(), TranslateError> {
    if lease.key() == key {
        Ok(())
    } else {
        Err(field(
            message,
            "lease",
            format!("is for {}, the message is about {key}", lease.key()),
        ))
    }
}

impl From<FromScheduler> for wire::SchedulerMessage {
    fn from(from: FromScheduler) -> Self {
        use wire::scheduler_message::Message;
        let message = match from {
            FromScheduler::Welcome {
                scheduler_name,
                heartbeat,
                artifact_addrs,
            } => Message::Welcome(wire::Welcome {
                scheduler_name: clean(&scheduler_name, NAME_MAX),
                heartbeat_ms: heartbeat.0,
                artifact_addrs,
            }),
            FromScheduler::Said(said) => return said.into(),
            FromScheduler::Goodbye { reason } => Message::Goodbye(wire::Goodbye {
                reason: clean(&reason, TEXT_MAX),
            }),
        };
        Self {
            message: Some(message),
        }
    }
}

impl From<ToNode> for wire::SchedulerMessage {
    fn from(said: ToNode) -> Self {
        use wire::scheduler_message::Message;
        let stop = |key: LeaseKey, cause: &str| wire::Stop {
            key: Some(key.into()),
            cause: clean(cause, TEXT_MAX),
            leave: false,
        };
        let message = match said {
            ToNode::Ask(ask) => Message::Ask((*ask).into()),
            ToNode::Renewed {
                sequence,
                renewals,
                stops,
            } => Message::ReportReply(wire::ReportReply {
                sequence,
                renewals: renewals
                    .into_iter()
                    .map(|(key, until, left)| wire::Renewal {
                        key: Some(key.into()),
                        until: until.0,
                        left_ms: left.0,
                    })
                    .collect(),
                stops: stops.iter().map(|(key, cause)| stop(*key, cause)).collect(),
            }),
            ToNode::Stop { key, cause } => Message::Stop(stop(key, &cause)),
            ToNode::Move { key, cause } => Message::Stop(wire::Stop {
                leave: true,
                ..stop(key, &cause)
            }),
            ToNode::Settled { key, receipt, why } => Message::UsageReply(wire::UsageReply {
                key: Some(key.into()),
                receipt: receipt.map(|r| r.encode()).unwrap_or_default(),
                refusal: clean(&why, TEXT_MAX),
            }),
        };
        Self {
            message: Some(message),
        }
    }
}

impl TryFrom<wire::SchedulerMessage> for FromScheduler {
    type Error = TranslateError;
    fn try_from(w: wire::SchedulerMessage) -> Result<Self, TranslateError> {
        use wire::scheduler_message::Message;
        let said = match some("scheduler message", "message", w.message)? {
            Message::Welcome(w) => {
                return Ok(Self::Welcome {
                    scheduler_name: clean(&w.scheduler_name, NAME_MAX),
                    heartbeat: Millis(w.heartbeat_ms),
                    artifact_addrs: addrs("welcome", "artifact_addrs", w.artifact_addrs)?,
                });
            }
            Message::Goodbye(w) => {
                return Ok(Self::Goodbye {
                    reason: clean(&w.reason, TEXT_MAX),
                });
            }
            Message::Ask(w) => ToNode::Ask(Box::new(w.try_into()?)),
            Message::ReportReply(w) => {
                bounded("report reply", "renewals", w.renewals.len(), HELD_MAX)?;
                bounded("report reply", "stops", w.stops.len(), HELD_MAX)?;
                let renewal =
                    |r: wire::Renewal| Ok((key("renewal", r.key)?, UtcMillis(r.until), Millis(r.left_ms)));
                let stop = |s: wire::Stop| Ok((key("stop", s.key)?, clean(&s.cause, TEXT_MAX)));
                ToNode::Renewed {
                    sequence: w.sequence,
                    renewals: w
                        .renewals
                        .into_iter()
                        .map(renewal)
                        .collect::<Result<_, TranslateError>>()?,
                    stops: w
                        .stops
                        .into_iter()
                        .map(stop)
                        .collect::<Result<_, TranslateError>>()?,
                }
            }
            Message::Stop(w) if w.leave => ToNode::Move {
                key: key("stop", w.key)?,
                cause: clean(&w.cause, TEXT_MAX),
            },
            Message::Stop(w) => ToNode::Stop {
                key: key("stop", w.key)?,
                cause: clean(&w.cause, TEXT_MAX),
            },
            Message::UsageReply(w) => ToNode::Settled {
                key: key("usage reply", w.key)?,
                receipt: if w.receipt.is_empty() {
                    None
                } else {
                    Some(Signed::open(&w.receipt)?)
                },
                why: clean(&w.refusal, TEXT_MAX),
            },
        };
        Ok(Self::Said(said))
    }
}

impl From<LeaseAsk> for wire::LeaseAsk {
    fn from(ask: LeaseAsk) -> Self {
        Self {
            key: Some(ask.key.into()),
            order: ask.order.encode(),
            first_item: ask.first_item,
            items: ask.items,
            device_class: ask.device_class,
            devices: ask.devices.count(),
            share_milli: ask.devices.share_milli(),
            rate: ask.rate.0,
            device_ms_max: ask.device_ms_max.0,
            ttl_ms: ask.ttl.0,
            // The artifact is where it is: fewer holders are slower, never wrong.
            holders: ask
                .holders
                .into_iter()
                .take(HOLDERS_MAX)
                .map(Into::into)
                .collect(),
            from: ask.from.map(Into::into),
            // Left out, it is fetched.
            input: if ask.input.len() <= INPUT_MAX {
                ask.input
            } else {
                Vec::new()
            },
        }
    }
}

impl TryFrom<wire::LeaseAsk> for LeaseAsk {
    type Error = TranslateError;
    fn try_from(w: wire::LeaseAsk) -> Result<Self, TranslateError> {
        bounded("ask", "holders", w.holders.len(), HOLDERS_MAX)?;
        bounded("ask", "input", w.input.len(), INPUT_MAX)?;
        if w.device_class.len() > 64 {
            return Err(field("ask", "device_class", "is over 64 bytes".into()));
        }
        let ask = Self {
            key: key("ask", w.key)?,
            order: Signed::open(&w.order)?,
            first_item: w.first_item,
            items: w.items,
            device_class: w.device_class,
            devices: Portion::of(w.devices.min(1_024), w.share_milli).ok_or_else(|| {
                field(
                    "ask",
                    "devices",
                    "is neither whole devices nor a share of one".into(),
                )
            })?,
            rate: Rate(w.rate),
            device_ms_max: DeviceMillis(w.device_ms_max),
            ttl: Millis(w.ttl_ms),
            holders: w
                .holders
                .into_iter()
                .map(TryInto::try_into)
                .collect::<Result<_, _>>()?,
            from: w
                .from
                .map(|from| super::artifact("ask", Some(from)))
                .transpose()?,
            input: w.input,
            here: false,
        };
        if ask.order.id() == ask.key.job.0 {
            Ok(ask)
        } else {
            Err(field(
                "ask",
                "order",
                format!("is job {}, the ask is for {}", ask.order.id().short(), ask.key),
            ))
        }
    }
}

impl From<Holder> for wire::Holder {
    fn from(holder: Holder) -> Self {
        Self {
            node: holder.key.0.to_vec(),
            addrs: holder.addrs.into_iter().take(ADDRS_MAX).collect(),
        }
    }
}

impl TryFrom<wire::Holder> for Holder {
    type Error = TranslateError;
    fn try_from(w: wire::Holder) -> Result<Self, TranslateError> {
        Ok(Self {
            key: public_key("holder", "node", &w.node)?,
            addrs: addrs("holder", "addrs", w.addrs)?,
        })
    }
}

impl From<Report> for wire::Report {
    fn from(report: Report) -> Self {
        let held = |h: Held| wire::Held {
            key: Some(h.key.into()),
            phase: h.phase.as_str().into(),
            items_done: h.items_done,
            tokens: h.tokens,
            loss_micro: h.loss_micro,
        };
        Self {
            sequence: report.sequence,
            held: report.held.into_iter().map(held).collect(),
        }
    }
}

impl TryFrom<wire::Report> for Report {
    type Error = TranslateError;
    fn try_from(w: wire::Report) -> Result<Self, TranslateError> {
        bounded("report", "held", w.held.len(), HELD_MAX)?;
        let held = |h: wire::Held| {
            Ok(Held {
                key: key("report", h.key)?,
                phase: h
                    .phase
                    .parse()
                    .map_err(|why: String| field("report", "phase", clean(&why, NAME_MAX)))?,
                items_done: h.items_done,
                tokens: h.tokens,
                loss_micro: h.loss_micro,
            })
        };
        Ok(Self {
            sequence: w.sequence,
            held: w
                .held
                .into_iter()
                .map(held)
                .collect::<Result<_, TranslateError>>()?,
        })
    }
}

impl From<Refusal> for wire::Refusal {
    fn from(refusal: Refusal) -> Self {
        let (kind, text, number) = match refusal {
            Refusal::Busy { class } => ("busy", class, 0),
            Refusal::Policy { why } => ("policy", why, 0),
            Refusal::Price { now } => ("price", String::new(), now.0),
            Refusal::Fenced { seen } => ("fenced", String::new(), seen),
            Refusal::Mismatch { why } => ("mismatch", why, 0),
            Refusal::Unable { why } => ("unable", why, 0),
        };
        Self {
            kind: kind.into(),
            text: clean(&text, TEXT_MAX),
            number,
        }
    }
}

impl TryFrom<wire::Refusal> for Refusal {
    type Error = TranslateError;
    fn try_from(w: wire::Refusal) -> Result<Self, TranslateError> {
        let text = clean(&w.text, TEXT_MAX);
        Ok(match w.kind.as_str() {
            "busy" => Self::Busy { class: text },
            "policy" => Self::Policy { why: text },
            "price" => Self::Price { now: Rate(w.number) },
            "fenced" => Self::Fenced { seen: w.number },
            "mismatch" => Self::Mismatch { why: text },
            "unable" => Self::Unable { why: text },
            other => {
                return Err(field(
                    "refusal",
                    "kind",
                    format!("{:?} is not known", clean(other, NAME_MAX)),
                ));
            }
        })
    }
}

impl From<LeaseKey> for wire::LeaseKey {
    fn from(key: LeaseKey) -> Self {
        Self {
            job: key.job.0.0.to_vec(),
            part: key.part,
            fence: key.fence,
        }
    }
}

impl TryFrom<wire::LeaseKey> for LeaseKey {
    type Error = TranslateError;
    fn try_from(w: wire::LeaseKey) -> Result<Self, TranslateError> {
        Ok(Self {
            job: job_id("lease key", &w.job)?,
            part: w.part,
            fence: w.fence,
        })
    }
}
