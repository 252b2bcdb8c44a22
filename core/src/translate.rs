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
            FromNode::Hello { version, name, report } => Message::Hello(wire::Hello {
                version: clean(&version, NAME_MAX),
                name: clean(&name, NAME_MAX),
                report: Some(report.into()),
            }),
            FromNode::Heard(said) => return said.into(),
            FromNode::Log { key, text } => {
                Message::Log(wire::LogLine { key: Some(key.into()), text: clean(&text, TEXT_MAX) })
            }
            FromNode::Goodbye { reason } => {
                Message::Goodbye(wire::Goodbye { reason: clean(&reason, TEXT_MAX) })
            }
        };
        Self { message: Some(message) }
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
            ToScheduler::Reading { key, reading } => {
                Message::Reading(wire::Reading { key: Some(key.into()), envelope: reading.encode() })
            }
            ToScheduler::Finished(finished) => Message::Usage(wire::UsageReport {
                key: Some(finished.lease.key().into()),
                envelope: finished.usage.encode(),
                lease: finished.lease.encode(),
                readings: finished.readings.iter().map(Verified::encode).collect(),
            }),
        };
        Self { message: Some(message) }
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
                return Ok(Self::Log { key: key("log", w.key)?, text: clean(&w.text, TEXT_MAX) });
            }
            Message::Goodbye(w) => return Ok(Self::Goodbye { reason: clean(&w.reason, TEXT_MAX) }),
            Message::Report(w) => ToScheduler::Report(w.try_into()?),
            Message::LeaseReply(w) => lease_reply(w)?,
            Message::Reading(w) => {
                ToScheduler::Reading { key: key("reading", w.key)?, reading: Signed::open(&w.envelope)? }
            }
            Message::Usage(w) => ToScheduler::Finished(Box::new(finished(w)?)),
        };
        Ok(Self::Heard(heard))
    }
}

fn lease_reply(w: wire::LeaseReply) -> Result<ToScheduler, TranslateError> {
    let key = key("lease reply", w.key)?;
    match w.refusal {
        Some(why) => Ok(ToScheduler::Refused { key, why: why.try_into()? }),
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
    let readings = w.readings.iter().map(|r| Signed::open(r)).collect::<Result<_, _>>()?;
    Ok(FinishedLease { lease, readings, usage })
}

fn same_key(
    message: &'static str,
    key: LeaseKey,
    lease: &crate::records::Lease,
) -> Result<(), TranslateError> {
    if lease.key() == key {
        Ok(())
    } else {
        Err(field(message, "lease", format!("is for {}, the message is about {key}", lease.key())))
    }
}

impl From<FromScheduler> for wire::SchedulerMessage {
    fn from(from: FromScheduler) -> Self {
        use wire::scheduler_message::Message;
        let message = match from {
            FromScheduler::Welcome { scheduler_name, heartbeat, artifact_addrs } => {
                Message::Welcome(wire::Welcome {
                    scheduler_name: clean(&scheduler_name, NAME_MAX),
                    heartbeat_ms: heartbeat.0,
                    artifact_addrs,
                })
            }
            FromScheduler::Said(said) => return said.into(),
            FromScheduler::Goodbye { reason } => {
                Message::Goodbye(wire::Goodbye { reason: clean(&reason, TEXT_MAX) })
            }
        };
        Self { message: Some(message) }
    }
}

impl From<ToNode> for wire::SchedulerMessage {
    fn from(said: ToNode) -> Self {
        use wire::scheduler_message::Message;
        let stop =
            |key: LeaseKey, cause: &str| wire::Stop { key: Some(key.into()), cause: clean(cause, TEXT_MAX) };
        let message = match said {
            ToNode::Ask(ask) => Message::Ask((*ask).into()),
            ToNode::Renewed { sequence, renewals, stops } => Message::ReportReply(wire::ReportReply {
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
        Self { message: Some(message) }
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
            Message::Goodbye(w) => return Ok(Self::Goodbye { reason: clean(&w.reason, TEXT_MAX) }),
            Message::Ask(w) => ToNode::Ask(Box::new(w.try_into()?)),
            Message::ReportReply(w) => {
                bounded("report reply", "renewals", w.renewals.len(), HELD_MAX)?;
                bounded("report reply", "stops", w.stops.len(), HELD_MAX)?;
                let renewal =
                    |r: wire::Renewal| Ok((key("renewal", r.key)?, UtcMillis(r.until), Millis(r.left_ms)));
                let stop = |s: wire::Stop| Ok((key("stop", s.key)?, clean(&s.cause, TEXT_MAX)));
                ToNode::Renewed {
                    sequence: w.sequence,
                    renewals: w.renewals.into_iter().map(renewal).collect::<Result<_, TranslateError>>()?,
                    stops: w.stops.into_iter().map(stop).collect::<Result<_, TranslateError>>()?,
                }
            }
            Message::Stop(w) => ToNode::Stop { key: key("stop", w.key)?, cause: clean(&w.cause, TEXT_MAX) },
            Message::UsageReply(w) => ToNode::Settled {
                key: key("usage reply", w.key)?,
                receipt: if w.receipt.is_empty() { None } else { Some(Signed::open(&w.receipt)?) },
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
            holders: ask.holders.into_iter().take(HOLDERS_MAX).map(Into::into).collect(),
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
            holders: w.holders.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
        };
        if ask.order.id() == ask.key.job.0 {
            Ok(ask)
        } else {
            Err(field("ask", "order", format!("is job {}, the ask is for {}", ask.order.id().short(), ask.key)))
        }
    }
}

impl From<Holder> for wire::Holder {
    fn from(holder: Holder) -> Self {
        Self { node: holder.key.0.to_vec(), addrs: holder.addrs.into_iter().take(ADDRS_MAX).collect() }
    }
}

impl TryFrom<wire::Holder> for Holder {
    type Error = TranslateError;
    fn try_from(w: wire::Holder) -> Result<Self, TranslateError> {
        Ok(Self { key: public_key("holder", "node", &w.node)?, addrs: addrs("holder", "addrs", w.addrs)? })
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
        Self { sequence: report.sequence, held: report.held.into_iter().map(held).collect() }
    }
}

impl TryFrom<wire::Report> for Report {
    type Error = TranslateError;
    fn try_from(w: wire::Report) -> Result<Self, TranslateError> {
        bounded("report", "held", w.held.len(), HELD_MAX)?;
        let held = |h: wire::Held| {
            Ok(Held {
                key: key("report", h.key)?,
                phase: h.phase.parse().map_err(|why: String| field("report", "phase", clean(&why, NAME_MAX)))?,
                items_done: h.items_done,
                tokens: h.tokens,
            })
        };
        Ok(Self {
            sequence: w.sequence,
            held: w.held.into_iter().map(held).collect::<Result<_, TranslateError>>()?,
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
        Self { kind: kind.into(), text: clean(&text, TEXT_MAX), number }
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
                return Err(field("refusal", "kind", format!("{:?} is not known", clean(other, NAME_MAX))));
            }
        })
    }
}

impl From<LeaseKey> for wire::LeaseKey {
    fn from(key: LeaseKey) -> Self {
        Self { job: key.job.0.0.to_vec(), part: key.part, fence: key.fence }
    }
}

impl TryFrom<wire::LeaseKey> for LeaseKey {
    type Error = TranslateError;
    fn try_from(w: wire::LeaseKey) -> Result<Self, TranslateError> {
        Ok(Self { job: job_id("lease key", &w.job)?, part: w.part, fence: w.fence })
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
            exclusions: explanation.refusal.exclusions.into_iter().map(Into::into).collect(),
            candidates: explanation.candidates.into_iter().map(Into::into).collect(),
            summary: explanation.summary,
            job: None,
        }
    }
}

impl From<LogLine> for wire::LogEntry {
    fn from(line: LogLine) -> Self {
        Self { at: line.at.0, part: line.part, text: line.text }
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
    wire::Account { name: account.to_string(), balance }
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
    if bytes.is_empty() { Ok(None) } else { public_key(message, "node", bytes).map(|k| Some(NodeId(k))) }
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
    match addrs.iter().find(|a| a.len() > ADDR_MAX || a.chars().any(char::is_control)) {
        Some(bad) => Err(field(message, name, format!("{:?} is no address", clean(bad, NAME_MAX)))),
        None => Ok(addrs),
    }
}

fn bounded(message: &'static str, field: &'static str, count: usize, max: usize) -> Result<(), TranslateError> {
    if count > max { Err(TranslateError::TooMany { message, field, count, max }) } else { Ok(()) }
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
