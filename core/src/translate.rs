//! Between the typed exchange and the control API's messages, for nodes, schedulers and the CLI alike.
//!
//! What comes from the wire is checked here, signatures included: a [`ToScheduler`] or [`ToNode`] that this module
//! gives out holds only verified records within their limits. Free text is cut and freed of control characters in
//! both directions, so that no word of a stranger can break a terminal or a limit.
//!
//! Start at [`FromNode`] and [`FromScheduler`]: the two ends of a session.
use crate::{
    controller::{Explanation, JobView, LogLine, NodeStatus, PartView},
    exchange::{
        FinishedLease, HELD_MAX, Held, Holder, LeaseAsk, READINGS_MAX, Refusal, Report, ToNode, ToScheduler,
    },
    id::{Digest, JobId, LeaseKey},
    key::{KeyError, NodeId, PublicKey},
    money::Account,
    placement::{Candidate, Exclusion},
    prelude::*,
    records::{Record, RecordError, Signed, Verified},
    unit::{DeviceMillis, Millis, Rate, UtcMillis},
};
use alloc::boxed::Box;
use karez_proto::{control as wire, records as record_wire};

/// The most holders one ask names.
pub const HOLDERS_MAX: usize = 64;
/// The most addresses of one holder.
pub const ADDRS_MAX: usize = 8;
/// Free text is cut to this many bytes.
pub const TEXT_MAX: usize = 1000;
/// Names are cut to this many bytes.
pub const NAME_MAX: usize = 128;
/// An address is at most this many bytes.
pub const ADDR_MAX: usize = 256;
/// A Karez message never needs more than this, in bytes: the decode cap of both ends.
pub const MESSAGE_BYTES_MAX: usize = 4 << 20;

/// Why a message was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TranslateError {
    /// A field that must be there is not, or the message is of a kind this version does not know.
    #[error("{message}: {field} is missing")]
    Missing {
        /// Which message.
        message: &'static str,
        /// Which field.
        field: &'static str,
    },
    /// A list is longer than allowed.
    #[error("{message}: {field} has {count} entries, the limit is {max}")]
    TooMany {
        /// Which message.
        message: &'static str,
        /// Which field.
        field: &'static str,
        /// How many there are.
        count: usize,
        /// The limit.
        max: usize,
    },
    /// A field breaks its rule.
    #[error("{message}: {field} {why}")]
    Field {
        /// Which message.
        message: &'static str,
        /// Which field.
        field: &'static str,
        /// Which rule.
        why: String,
    },
    /// A signed record inside is not acceptable.
    #[error(transparent)]
    Record(#[from] RecordError),
}

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
    /// The node ends the session on purpose.
    Goodbye {
        /// Why.
        reason: String,
    },
}

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
            devices: ask.devices,
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
        }
    }
}

impl TryFrom<wire::LeaseAsk> for LeaseAsk {
    type Error = TranslateError;
    fn try_from(w: wire::LeaseAsk) -> Result<Self, TranslateError> {
        bounded("ask", "holders", w.holders.len(), HOLDERS_MAX)?;
        if w.device_class.len() > 64 {
            return Err(field("ask", "device_class", "is over 64 bytes".into()));
        }
        let ask = Self {
            key: key("ask", w.key)?,
            order: Signed::open(&w.order)?,
            first_item: w.first_item,
            items: w.items,
            device_class: w.device_class,
            devices: w.devices,
            rate: Rate(w.rate),
            device_ms_max: DeviceMillis(w.device_ms_max),
            ttl: Millis(w.ttl_ms),
            holders: w
                .holders
                .into_iter()
                .map(TryInto::try_into)
                .collect::<Result<_, _>>()?,
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

impl From<JobView> for wire::JobView {
    fn from(view: JobView) -> Self {
        let work = &view.order.work;
        let model = match (work.model_name(), work.model()) {
            ("", Some(model)) => model.digest.short(),
            (name, _) => name.to_owned(),
        };
        Self {
            job: view.id.0.0.to_vec(),
            label: view.label,
            state: view.state.as_str().into(),
            cause: view.cause,
            submitted_at: view.submitted_at.0,
            changed_at: view.changed_at.0,
            items: view.order.items,
            items_done: view.items_done,
            credits_reserved: view.reserved.0,
            credits_spent: view.spent.0,
            user: view.order.user.0.0.to_vec(),
            institution: view.order.institution.to_string(),
            work: work.kind().as_str().into(),
            model,
            meters: Some(view.meters.into()),
            parts: view.parts.into_iter().map(Into::into).collect(),
        }
    }
}

impl From<PartView> for wire::PartView {
    fn from(part: PartView) -> Self {
        Self {
            part: part.part,
            first_item: part.first_item,
            items: part.items,
            state: part.state.as_str().into(),
            cause: part.cause,
            fence: part.fence,
            node: part.node.map(|n| n.0.0.to_vec()).unwrap_or_default(),
            node_name: part.node_name,
            institution: part.institution.map(String::from).unwrap_or_default(),
            country: part.country.map(String::from).unwrap_or_default(),
            device_class: part.device_class,
            rate: part.rate.0,
            items_done: part.items_done,
            credits: part.credits.0,
            meters: Some(part.meters.into()),
            result: part.result.map(Into::into),
            why: part.why,
            alternatives: part.alternatives.into_iter().map(Into::into).collect(),
            changed_at: part.changed_at.0,
            receipt: part.receipt.map(|r| r.0.to_vec()).unwrap_or_default(),
            cost_estimate: part.cost_estimate.0,
        }
    }
}

impl From<Candidate> for wire::Alternative {
    fn from(candidate: Candidate) -> Self {
        let busy = if candidate.busy { ", busy now" } else { "" };
        Self {
            node: candidate.node.0.0.to_vec(),
            node_name: candidate.name,
            institution: candidate.institution.to_string(),
            country: candidate.country.to_string(),
            cost_estimate: candidate.cost.0,
            note: format!("{}, {}{busy}", candidate.device_class, candidate.rate),
        }
    }
}

impl From<Exclusion> for wire::Exclusion {
    fn from(exclusion: Exclusion) -> Self {
        Self {
            requirement: exclusion.requirement.to_string(),
            nodes: exclusion.nodes,
            nearest: exclusion.nearest,
        }
    }
}

impl From<Explanation> for wire::ExplainReply {
    fn from(explanation: Explanation) -> Self {
        let feasible = explanation.candidates.iter().filter(|c| !c.busy).count();
        Self {
            nodes_known: explanation.known,
            nodes_feasible: u32::try_from(feasible).unwrap_or(u32::MAX),
            exclusions: explanation
                .refusal
                .exclusions
                .into_iter()
                .map(Into::into)
                .collect(),
            candidates: explanation.candidates.into_iter().map(Into::into).collect(),
            summary: explanation.summary,
            job: None,
        }
    }
}

impl From<LogLine> for wire::LogEntry {
    fn from(line: LogLine) -> Self {
        Self {
            at: line.at.0,
            part: line.part,
            text: line.text,
        }
    }
}

impl From<NodeStatus> for wire::OfferView {
    fn from(status: NodeStatus) -> Self {
        Self {
            offer: Some(status.offer.to_wire()),
            connected: status.connected,
            heard_at: status.heard_at.0,
            leases: status.leases,
            failures: status.failures,
        }
    }
}

/// One line of a balance.
pub fn account(account: &Account, balance: i64) -> wire::Account {
    wire::Account {
        name: account.to_string(),
        balance,
    }
}

/// The job that 32 bytes of the wire name.
pub fn job_id(message: &'static str, bytes: &[u8]) -> Result<JobId, TranslateError> {
    digest(message, "job", bytes).map(JobId)
}

/// The digest in a field of `message`.
pub fn digest(message: &'static str, name: &'static str, bytes: &[u8]) -> Result<Digest, TranslateError> {
    Digest::try_from(bytes)
        .map_err(|_| field(message, name, format!("is {} bytes, a digest is 32", bytes.len())))
}

/// The strong key in a field of `message`.
pub fn public_key(
    message: &'static str,
    name: &'static str,
    bytes: &[u8],
) -> Result<PublicKey, TranslateError> {
    PublicKey::from_bytes(bytes).map_err(|e: KeyError| field(message, name, format!("is no key: {e}")))
}

/// The node in a field of `message`; `None` for an empty field.
pub fn node_id(message: &'static str, bytes: &[u8]) -> Result<Option<NodeId>, TranslateError> {
    if bytes.is_empty() {
        Ok(None)
    } else {
        public_key(message, "node", bytes).map(|k| Some(NodeId(k)))
    }
}

/// The artifact in a field of `message`.
pub fn artifact(
    message: &'static str,
    w: Option<record_wire::ArtifactRef>,
) -> Result<crate::artifact::ArtifactRef, TranslateError> {
    use crate::artifact::{ArtifactKind, ArtifactRef};
    let w = some(message, "artifact", w)?;
    let kind = match w.kind.as_str() {
        "blob" => ArtifactKind::Blob,
        "tree" => ArtifactKind::Tree,
        _ => return Err(field(message, "artifact", "is neither a blob nor a tree".into())),
    };
    Ok(ArtifactRef {
        digest: digest(message, "artifact", &w.digest)?,
        bytes: crate::unit::Bytes(w.bytes),
        kind,
    })
}

/// `text` in at most `max` bytes, with every control character replaced by a space.
pub fn clean(text: &str, max: usize) -> String {
    let mut out = String::with_capacity(text.len().min(max));
    for c in text.chars().map(|c| if c.is_control() { ' ' } else { c }) {
        if out.len() + c.len_utf8() > max {
            break;
        }
        out.push(c);
    }
    out
}

fn key(message: &'static str, key: Option<wire::LeaseKey>) -> Result<LeaseKey, TranslateError> {
    some(message, "key", key)?.try_into()
}

fn addrs(
    message: &'static str,
    name: &'static str,
    addrs: Vec<String>,
) -> Result<Vec<String>, TranslateError> {
    bounded(message, name, addrs.len(), ADDRS_MAX)?;
    match addrs
        .iter()
        .find(|a| a.len() > ADDR_MAX || a.chars().any(char::is_control))
    {
        Some(bad) => Err(field(
            message,
            name,
            format!("{:?} is no address", clean(bad, NAME_MAX)),
        )),
        None => Ok(addrs),
    }
}

fn bounded(
    message: &'static str,
    field: &'static str,
    count: usize,
    max: usize,
) -> Result<(), TranslateError> {
    if count > max {
        Err(TranslateError::TooMany {
            message,
            field,
            count,
            max,
        })
    } else {
        Ok(())
    }
}

fn some<T>(message: &'static str, field: &'static str, value: Option<T>) -> Result<T, TranslateError> {
    value.ok_or(TranslateError::Missing { message, field })
}

fn missing(message: &'static str, field: &'static str) -> TranslateError {
    TranslateError::Missing { message, field }
}

fn field(message: &'static str, field: &'static str, why: String) -> TranslateError {
    TranslateError::Field { message, field, why }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        artifact::{ArtifactKind, ArtifactRef},
        exchange::Phase,
        key::{SchedulerId, SecretKey, UserId},
        records::{Constraints, Lease, MeterReading, Meters, Order, Outcome, Receipt, Usage, Work},
        unit::{Bytes, Credits, MonoMillis},
    };
    use proptest::prelude::*;
    use prost::Message as _;

    fn secret(n: u8) -> SecretKey {
        SecretKey::from_bytes(&[n; 32])
    }
    fn public(n: u8) -> PublicKey {
        PublicKey::of(&secret(n))
    }
    fn lease_key() -> LeaseKey {
        LeaseKey {
            job: JobId(order().id()),
            part: 3,
            fence: 2,
        }
    }

    fn order() -> Verified<Order> {
        let order = Order {
            user: UserId(public(1)),
            institution: "uni-nairobi".parse().unwrap(),
            scheduler: SchedulerId(public(2)),
            work: Work::Noop { millis_per_item: 5 },
            input: ArtifactRef {
                digest: Digest::of(b"in"),
                bytes: Bytes(2),
                kind: ArtifactKind::Blob,
            },
            items: 100,
            items_per_part: 10,
            constraints: Constraints::default(),
            credits_max: Credits(5),
            attempts_max: 3,
            nonce: 1,
            issued_at: UtcMillis(10),
            expires_at: UtcMillis(20),
        };
        Signed::sign(order, &secret(1))
    }

    fn lease() -> Verified<Lease> {
        let key = lease_key();
        let lease = Lease {
            job: key.job,
            part: key.part,
            fence: key.fence,
            node: NodeId(public(3)),
            scheduler: SchedulerId(public(2)),
            institution: "lab-7".parse().unwrap(),
            device_class: "cpu/x86-64-v3".into(),
            devices: 1,
            rate: Rate(9),
            device_ms_max: DeviceMillis(1_000),
            first_item: 30,
            items: 10,
            granted_at: UtcMillis(11),
            expires_at: UtcMillis(12),
        };
        Signed::sign(lease, &secret(3))
    }

    fn reading(sequence: u32) -> Verified<MeterReading> {
        let reading = MeterReading {
            lease: lease().id(),
            node: NodeId(public(3)),
            sequence,
            previous: None,
            meters: Meters {
                tokens_in: 7,
                millijoules: Some(4),
                ..Meters::default()
            },
            method: "rusage+wall/1".into(),
            taken_at: UtcMillis(13),
            mono: MonoMillis(1),
        };
        Signed::sign(reading, &secret(3))
    }

    fn usage() -> Verified<Usage> {
        let usage = Usage {
            lease: lease().id(),
            node: NodeId(public(3)),
            last_reading: reading(0).id(),
            readings: 1,
            meters: Meters::default(),
            outcome: Outcome::Reclaimed,
            cause: "the owner came back".into(),
            retryable: true,
            result: None,
            started_at: UtcMillis(11),
            ended_at: UtcMillis(14),
        };
        Signed::sign(usage, &secret(3))
    }

    fn receipt() -> Verified<Receipt> {
        let receipt = Receipt {
            usage: usage().id(),
            lease: lease().id(),
            job: lease_key().job,
            scheduler: SchedulerId(public(2)),
            node: NodeId(public(3)),
            node_institution: "lab-7".parse().unwrap(),
            user: UserId(public(1)),
            user_institution: "uni-nairobi".parse().unwrap(),
            observed: DeviceMillis(5),
            billed: DeviceMillis(4),
            credits: Credits(3),
            flags: Vec::new(),
            issued_at: UtcMillis(15),
        };
        Signed::sign(receipt, &secret(2))
    }

    fn refusals() -> Vec<Refusal> {
        vec![
            Refusal::Busy { class: "cpu".into() },
            Refusal::Policy {
                why: "nights only".into(),
            },
            Refusal::Price { now: Rate(8) },
            Refusal::Fenced { seen: 5 },
            Refusal::Mismatch { why: "rate".into() },
            Refusal::Unable {
                why: "no disk".into(),
            },
        ]
    }

    /// Over the wire as bytes, not only as messages.
    fn to_scheduler_and_back(said: FromNode) -> FromNode {
        let bytes = wire::NodeMessage::from(said).encode_to_vec();
        wire::NodeMessage::decode(bytes.as_slice())
            .unwrap()
            .try_into()
            .unwrap()
    }
    fn to_node_and_back(said: FromScheduler) -> FromScheduler {
        let bytes = wire::SchedulerMessage::from(said).encode_to_vec();
        wire::SchedulerMessage::decode(bytes.as_slice())
            .unwrap()
            .try_into()
            .unwrap()
    }

    #[test]
    fn everything_a_node_says_arrives_as_said() {
        let key = lease_key();
        let phases = [Phase::Granted, Phase::Fetching, Phase::Running, Phase::Finished];
        let held = phases
            .map(|phase| Held {
                key,
                phase,
                items_done: 4,
                tokens: 9,
            })
            .to_vec();
        let report = Report { sequence: 8, held };
        let finished = FinishedLease {
            lease: lease(),
            readings: vec![reading(0), reading(1)],
            usage: usage(),
        };
        let mut said = vec![
            FromNode::Hello {
                version: "0.1.0".into(),
                name: "lab-1".into(),
                report: report.clone(),
            },
            FromNode::Heard(ToScheduler::Report(report)),
            FromNode::Heard(ToScheduler::Granted(lease())),
            FromNode::Heard(ToScheduler::Reading {
                key,
                reading: reading(0),
            }),
            FromNode::Heard(ToScheduler::Finished(Box::new(finished))),
            FromNode::Log {
                key,
                text: "fetching the model".into(),
            },
            FromNode::Goodbye {
                reason: "stopping".into(),
            },
        ];
        said.extend(
            refusals()
                .into_iter()
                .map(|why| FromNode::Heard(ToScheduler::Refused { key, why })),
        );
        for said in said {
            assert_eq!(to_scheduler_and_back(said.clone()), said);
        }
    }

    #[test]
    fn everything_a_scheduler_says_arrives_as_said() {
        let key = lease_key();
        let ask = LeaseAsk {
            key,
            order: order(),
            first_item: 30,
            items: 10,
            device_class: "cuda/NVIDIA H200".into(),
            devices: 2,
            rate: Rate(7),
            device_ms_max: DeviceMillis(99),
            ttl: Millis(15_000),
            holders: vec![Holder {
                key: public(2),
                addrs: vec!["127.0.0.1:7402".into()],
            }],
        };
        let renewals = vec![(key, UtcMillis(50), Millis(15_000))];
        for said in [
            FromScheduler::Welcome {
                scheduler_name: "Nairobi".into(),
                heartbeat: Millis(2_000),
                artifact_addrs: vec!["127.0.0.1:7402".into()],
            },
            FromScheduler::Said(ToNode::Ask(Box::new(ask))),
            FromScheduler::Said(ToNode::Renewed {
                sequence: 8,
                renewals,
                stops: vec![(key, "cancelled".into())],
            }),
            FromScheduler::Said(ToNode::Stop {
                key,
                cause: "cancelled".into(),
            }),
            FromScheduler::Said(ToNode::Settled {
                key,
                receipt: Some(receipt()),
                why: String::new(),
            }),
            FromScheduler::Said(ToNode::Settled {
                key,
                receipt: None,
                why: "another attempt counts".into(),
            }),
            FromScheduler::Goodbye {
                reason: "stopping".into(),
            },
        ] {
            assert_eq!(to_node_and_back(said.clone()), said);
        }
    }

    #[test]
    fn what_breaks_a_rule_is_named() {
        use wire::node_message::Message;
        let key = || Some(lease_key().into());
        let read = |message| {
            let error = FromNode::try_from(wire::NodeMessage { message }).expect_err("an error");
            error.to_string()
        };
        let held = wire::Held {
            key: key(),
            phase: "running".into(),
            items_done: 0,
            tokens: 0,
        };
        let other = LeaseKey {
            fence: 9,
            ..lease_key()
        };
        let usage_with = |readings| {
            Some(Message::Usage(wire::UsageReport {
                key: key(),
                envelope: usage().encode(),
                lease: lease().encode(),
                readings,
            }))
        };
        let reply = |key, lease| {
            Some(Message::LeaseReply(wire::LeaseReply {
                key,
                lease,
                refusal: None,
            }))
        };
        for (got, expected) in [
            (read(None), "node message: message is missing"),
            (
                read(Some(Message::Report(wire::Report {
                    sequence: 1,
                    held: vec![held; HELD_MAX + 1],
                }))),
                "report: held has 1025 entries, the limit is 1024",
            ),
            (
                read(usage_with(vec![reading(0).encode(); READINGS_MAX + 1])),
                "usage: readings has 257 entries",
            ),
            (read(usage_with(Vec::new())), "usage: readings is missing"),
            (read(reply(key(), Vec::new())), "lease reply: lease is missing"),
            (read(reply(None, lease().encode())), "lease reply: key is missing"),
            (
                read(reply(Some(other.into()), lease().encode())),
                "lease reply: lease is for",
            ),
            (read(reply(key(), order().encode())), "expected karez.lease.v1"),
            (
                read(Some(Message::Log(wire::LogLine {
                    key: Some(wire::LeaseKey {
                        job: vec![1],
                        part: 0,
                        fence: 0,
                    }),
                    text: String::new(),
                }))),
                "lease key: job is 1 bytes, a digest is 32",
            ),
        ] {
            assert!(got.contains(expected), "{got:?} lacks {expected:?}");
        }
        let mut forged = lease().encode();
        let last = forged.len() - 1;
        forged[last] ^= 1;
        assert!(read(reply(key(), forged)).contains("signature does not match"));
    }

    #[test]
    fn an_ask_is_for_the_job_of_its_order() {
        let mut ask = wire::LeaseAsk {
            key: Some(lease_key().into()),
            order: order().encode(),
            ..Default::default()
        };
        assert!(LeaseAsk::try_from(ask.clone()).is_ok());
        ask.key = Some(
            LeaseKey {
                job: JobId(Digest::of(b"other")),
                ..lease_key()
            }
            .into(),
        );
        assert!(LeaseAsk::try_from(ask.clone()).is_err_and(|e| e.to_string().contains("order is job")));
        ask.holders = vec![wire::Holder::default(); HOLDERS_MAX + 1];
        assert!(LeaseAsk::try_from(ask).is_err_and(|e| e.to_string().contains("holders has 65")));
    }

    proptest! {
        #[test]
        fn cleaned_text_fits_and_cannot_command_a_terminal(text: String, max in 0usize..100) {
            let cleaned = clean(&text, max);
            prop_assert!(cleaned.len() <= max && !cleaned.chars().any(char::is_control));
            prop_assert_eq!(clean(&cleaned, max), cleaned);
        }

        #[test]
        fn no_bytes_panic(bytes: Vec<u8>) {
            if let Ok(w) = wire::NodeMessage::decode(bytes.as_slice()) {
                let _ = FromNode::try_from(w);
            }
            if let Ok(w) = wire::SchedulerMessage::decode(bytes.as_slice()) {
                let _ = FromScheduler::try_from(w);
            }
        }

        #[test]
        fn reports_survive(sequence: u64, held in proptest::collection::vec((any::<u32>(), any::<u64>(), any::<u64>(), any::<u64>()), 0..20)) {
            let held = held
                .into_iter()
                .map(|(part, fence, items_done, tokens)| Held {
                    key: LeaseKey { job: JobId(Digest::of(b"j")), part, fence },
                    phase: Phase::Running,
                    items_done,
                    tokens,
                })
                .collect();
            let report = Report { sequence, held };
            prop_assert_eq!(Report::try_from(wire::Report::from(report.clone())), Ok(report));
        }
    }
}
