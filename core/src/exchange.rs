//! What nodes and schedulers say to each other, typed. The daemons translate to and from the wire.
use crate::{
    artifact::ArtifactRef,
    id::LeaseKey,
    key::NodeId,
    prelude::*,
    records::{Lease, MeterReading, Order, Receipt, Usage, Verified},
    routing::Warmth,
    unit::{DeviceMillis, Millis, Portion, Rate, UtcMillis},
};
use serde::{Deserialize, Serialize};

/// The most leases one report names; a node never holds more.
pub const HELD_MAX: usize = 1024;

/// Bytes of an input that travels within the ask.
pub const INPUT_MAX: usize = 16 << 10;

/// Where on the node a lease stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Promised, nothing begun.
    Granted,
    /// Artifacts are being fetched.
    Fetching,
    /// The worker works.
    Running,
    /// The work has ended; the scheduler has not yet acknowledged the usage.
    Finished,
}

impl Phase {
    /// The wire name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Granted => "granted",
            Self::Fetching => "fetching",
            Self::Running => "running",
            Self::Finished => "finished",
        }
    }
}

impl core::str::FromStr for Phase {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "granted" => Ok(Self::Granted),
            "fetching" => Ok(Self::Fetching),
            "running" => Ok(Self::Running),
            "finished" => Ok(Self::Finished),
            _ => Err(format!("{text:?} is no phase")),
        }
    }
}

/// One lease a node holds, as its report tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// Which lease.
    pub key: LeaseKey,
    /// Where it stands.
    pub phase: Phase,
    /// Items finished.
    pub items_done: u64,
    /// Tokens read and written.
    pub tokens: u64,
    /// Loss of the latest step in millionths of a nat; 0 when nothing is trained.
    pub loss_micro: u64,
}

/// Everything a node holds for one scheduler, at every heartbeat. What it does not name, it does not hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Rises within a session.
    pub sequence: u64,
    /// The leases; at most [`HELD_MAX`].
    pub held: Vec<Held>,
}

/// A node that serves an artifact.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Its key.
    pub key: crate::key::PublicKey,
    /// `ip:port` each; at most 8.
    pub addrs: Vec<String>,
}

/// A scheduler asks a node to take one part of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseAsk {
    /// Which attempt.
    pub key: LeaseKey,
    /// The researcher's own signature: the node checks it, whatever the scheduler says.
    pub order: Verified<Order>,
    /// First item.
    pub first_item: u64,
    /// Items.
    pub items: u64,
    /// On which class of device.
    pub device_class: String,
    /// How many devices, or what share of one.
    pub devices: Portion,
    /// The price the scheduler saw; a node whose price has risen refuses.
    pub rate: Rate,
    /// The most that may be billed.
    pub device_ms_max: DeviceMillis,
    /// How long the lease lasts without renewal.
    pub ttl: Millis,
    /// Where artifacts can be had.
    pub holders: Vec<Holder>,
    /// The state to go on from, of work whose parts follow each other; none for its beginning.
    pub from: Option<ArtifactRef>,
    /// The order's input itself, at most [`INPUT_MAX`] bytes, where the scheduler had it at hand. Its digest is the
    /// order's; whoever uses it checks that.
    pub input: Vec<u8>,
    /// The node's shell found that all artifacts of the part are here, and keeps them. Never said over the wire.
    pub here: bool,
}

/// From node to scheduler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToScheduler {
    /// First word of a session, and the heartbeat ever after.
    Report(Report),
    /// The ask was granted. Stored on the node before it is said.
    Granted(Verified<Lease>),
    /// The ask was refused.
    Refused {
        /// Which ask.
        key: LeaseKey,
        /// Why.
        why: Refusal,
    },
    /// A meter reading while the work goes on.
    Reading {
        /// Of which lease.
        key: LeaseKey,
        /// The reading.
        reading: Verified<MeterReading>,
    },
    /// The work ended. Repeated until acknowledged.
    Finished(Box<FinishedLease>),
    /// An answer that is waited for is still worked on. Said every second.
    Alive {
        /// Of which lease.
        key: LeaseKey,
    },
    /// What the node keeps warm, whenever that has changed.
    Warm(Warmth),
}

/// The whole trail of a lease that ended, so that a scheduler that lost its memory can still bill it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FinishedLease {
    /// The lease.
    pub lease: Verified<Lease>,
    /// All readings in order; at least one, at most [`READINGS_MAX`].
    pub readings: Vec<Verified<MeterReading>>,
    /// The last word.
    pub usage: Verified<Usage>,
}

/// The most readings one lease keeps; the interval between them grows to stay under it.
pub const READINGS_MAX: usize = 256;

use alloc::boxed::Box;

/// Why a node refuses a lease.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// All devices of that class are held.
    #[error("no free {class} device")]
    Busy {
        /// Which class was asked for.
        class: String,
    },
    /// The owner does not lend now.
    #[error("the owner's policy: {why}")]
    Policy {
        /// Which rule.
        why: String,
    },
    /// The price has changed since the offer.
    #[error("the price is now {now:?}")]
    Price {
        /// The price now.
        now: Rate,
    },
    /// A later attempt at the same part was already promised here.
    #[error("fence {seen} was already seen for this part")]
    Fenced {
        /// The later fence.
        seen: u64,
    },
    /// The ask contradicts the order it carries, or the order is not for this scheduler.
    #[error("the ask does not match its order: {why}")]
    Mismatch {
        /// What differs.
        why: String,
    },
    /// The machine cannot do it.
    #[error("not possible here: {why}")]
    Unable {
        /// Why not.
        why: String,
    },
}

/// From scheduler to node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToNode {
    /// Will you take this?
    Ask(Box<LeaseAsk>),
    /// Answer to a report: these leases go on, until then.
    Renewed {
        /// The report answered.
        sequence: u64,
        /// New ends, on the UTC clock, with the time left for the node's own clock.
        renewals: Vec<(LeaseKey, UtcMillis, Millis)>,
        /// Leases the node reports that the scheduler does not want: stop them.
        stops: Vec<(LeaseKey, String)>,
    },
    /// Stop this lease.
    Stop {
        /// Which.
        key: LeaseKey,
        /// Why.
        cause: String,
    },
    /// Stop this lease, which goes on elsewhere: what the guest leaves behind is worth keeping.
    Move {
        /// Which.
        key: LeaseKey,
        /// Why.
        cause: String,
    },
    /// The usage was taken: the node may forget the lease.
    Settled {
        /// Which lease.
        key: LeaseKey,
        /// The countersigned bill; none when the lease does not count (a later fence won, the job is gone).
        receipt: Option<Verified<Receipt>>,
        /// Why there is no receipt.
        why: String,
    },
}

/// What an artifact fetch is for, for the shells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetch {
    /// What to fetch.
    pub artifacts: Vec<ArtifactRef>,
    /// From whom.
    pub holders: Vec<Holder>,
}

/// A node and its current session, for the scheduler's shell to send to.
pub type Destination = NodeId;
