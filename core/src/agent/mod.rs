//! A node's mind: grants leases by its owner's policy, runs them, meters them, and gives them back.
//!
//! [`Agent::handle`] is the one entrance. It never waits; it pushes what the shell must do, in order.
//! The shell's promise: every [`Effect::Persist`] of a batch is on disk before any other effect of that batch
//! leaves the process. So a lease is stored before it is granted, and the intent to start a worker before it starts.
//!
//! Not here: how to fetch, run or sign in (`karez-node`); what the scheduler decides ([`crate::controller`]).
mod earned;
mod leases;
mod mind;
#[cfg(test)]
mod tests;
mod upkeep;

pub use crate::records::OwnerPolicy;
pub use mind::{Agent, AgentStatus, needs};

use crate::{
    artifact::ArtifactRef,
    exchange::{Fetch, ToNode, ToScheduler},
    id::{Country, Digest, Institution, LeaseKey},
    key::{SchedulerId, SecretKey},
    prelude::*,
    records::{Device, Engine, Offer, Order, Receipt, Verified},
    store::Change,
    unit::{Bytes, Millis, Portion},
};

/// What the owner set and the probe measured. Fixed while the agent lives, but for [`Event::Capacity`].
#[derive(Debug, Clone)]
pub struct AgentConfig {
    /// The node's key.
    pub secret: SecretKey,
    /// A name for people.
    pub name: String,
    /// Whose machine.
    pub institution: Institution,
    /// Where it stands.
    pub country: Country,
    /// Devices with their prices; `free` is ignored, the agent counts.
    pub devices: Vec<Device>,
    /// Engines with their probed speeds.
    pub engines: Vec<Engine>,
    /// Cores of the machine.
    pub cores: u32,
    /// Memory of the machine.
    pub memory: Bytes,
    /// Instruction set level.
    pub isa: String,
    /// What the sandbox enforces.
    pub isolation: String,
    /// What the owner allows.
    pub policy: OwnerPolicy,
    /// How long an offer is believed.
    pub offer_ttl: Millis,
    /// Time between two heartbeats to a scheduler.
    pub heartbeat: Millis,
    /// Time between the first meter readings of a lease.
    pub reading_interval: Millis,
    /// How long a guest has to leave when the owner wants the machine back.
    pub reclaim_grace: Millis,
}

/// What the worker has used so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WorkerMeters {
    /// Time until its model was ready.
    pub loading: Millis,
    /// CPU time.
    pub cpu: Millis,
    /// Largest resident memory.
    pub memory_peak: Bytes,
    /// Resident memory summed up over time, in byte-seconds; none where nobody looked at it on the way.
    pub memory_byte_seconds: Option<u64>,
    /// Tokens read.
    pub tokens_in: u64,
    /// Tokens written.
    pub tokens_out: u64,
    /// Tokens read from a cache.
    pub tokens_cached: u64,
    /// Items finished.
    pub items: u64,
    /// Bytes of results.
    pub bytes_out: Bytes,
    /// Loss of the latest step in millionths of a nat; 0 when nothing is trained.
    pub loss_micro: u64,
    /// Energy, where the machine can tell.
    pub energy: Option<Energy>,
    /// Who counted the tokens.
    pub counted: Counted,
}

/// Who counted the tokens of a lease. The weakest count among its items is what its records name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Counted {
    /// The engine that computed them.
    #[default]
    Engine,
    /// The provider's own server said so, and a tokenizer of the node's agrees within its tolerance.
    ServerChecked,
    /// The provider's own server said so, within what so many bytes of text can be.
    Server,
    /// A tokenizer of the node's, where the server said nothing.
    Tokenizer,
    /// A token for every four bytes of text, where the server said nothing and the node has no tokenizer.
    Bytes,
}

impl Counted {
    /// How meters were taken: device time by wall clock, processor and memory by the kernel's account of the worker,
    /// tokens as said here.
    pub fn method(self) -> &'static str {
        match self {
            Self::Engine => "wall+rusage/1",
            Self::ServerChecked => "wall+server-usage+tokenizer/1",
            Self::Server => "wall+server-usage/1",
            Self::Tokenizer => "wall+tokenizer/1",
            Self::Bytes => "wall+bytes-by-four/1",
        }
    }
}

/// Energy a lease has used, and who says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Energy {
    /// Since the worker began.
    pub millijoules: u64,
    /// The meter.
    pub by: EnergyMeter,
}

/// What measures energy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EnergyMeter {
    /// The lease's share of what all processors of the machine used, by its share of their time.
    Rapl,
    /// All that its GPUs used.
    Nvml,
}

/// How a worker ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// Every item has its result, and the result is in the node's own store.
    Done(ArtifactRef),
    /// It failed.
    Failed {
        /// Why; shown to the user.
        why: String,
        /// The machine's fault: elsewhere it may work.
        retryable: bool,
    },
    /// It stopped because it was told to.
    Stopped,
    /// The same, and this is the state that the work can go on from elsewhere.
    Left(ArtifactRef),
}

/// What the owner can say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OwnerCommand {
    /// Take new leases again.
    Open,
    /// Take no new leases.
    Pause,
    /// Take no new leases, ever.
    Drain,
    /// Everybody out, within the grace.
    Reclaim,
}

/// What happens to a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// First event after [`Agent::restore`].
    Started,
    /// A session with a scheduler stands.
    Connected(SchedulerId),
    /// It broke.
    Disconnected(SchedulerId),
    /// A scheduler said something.
    Heard(SchedulerId, ToNode),
    /// An [`Effect::Fetch`] succeeded; the artifacts are in the store and stay pinned until [`Effect::Forget`].
    Fetched {
        /// For which lease.
        key: LeaseKey,
        /// Bytes that really crossed the network.
        bytes_in: Bytes,
    },
    /// An [`Effect::Fetch`] failed.
    FetchFailed {
        /// For which lease.
        key: LeaseKey,
        /// Why.
        why: String,
        /// Elsewhere it may work.
        retryable: bool,
    },
    /// The worker got further.
    Progress {
        /// Of which lease.
        key: LeaseKey,
        /// Totals so far.
        meters: WorkerMeters,
    },
    /// The worker is gone. Follows every [`Effect::Start`] exactly once, unless the process dies.
    Exited {
        /// Of which lease.
        key: LeaseKey,
        /// How.
        exit: Exit,
        /// Final totals.
        meters: WorkerMeters,
    },
    /// An [`Effect::Push`] succeeded: the scheduler holds the result.
    Pushed {
        /// Of which lease.
        key: LeaseKey,
    },
    /// An [`Effect::Push`] failed; the agent tries again later.
    PushFailed {
        /// Of which lease.
        key: LeaseKey,
        /// Why.
        why: String,
    },
    /// What the artifact store holds, most recently used first, and where it is served.
    Serving {
        /// Digests.
        cached: Vec<Digest>,
        /// `ip:port`.
        addrs: Vec<String>,
    },
    /// What there is to lend has changed: a provider's own server came, went or answers for other models.
    Capacity {
        /// In place of those of before.
        devices: Vec<Device>,
        /// In place of those of before.
        engines: Vec<Engine>,
    },
    /// The owner said something.
    Owner(OwnerCommand),
    /// Time passed. The shell sends one at least every heartbeat, and at [`Agent::wake_at`].
    Tick,
}

/// What the shell must do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Before anything else of this batch.
    Persist(Vec<Change>),
    /// Say this to a scheduler; dropped when no session stands.
    Send(SchedulerId, ToScheduler),
    /// Get these artifacts into the store and pin them.
    Fetch {
        /// For which lease.
        key: LeaseKey,
        /// What and from whom.
        fetch: Fetch,
    },
    /// Run the work.
    Start {
        /// For which lease.
        key: LeaseKey,
        /// What to run.
        order: Verified<Order>,
        /// First item.
        first_item: u64,
        /// Items.
        items: u64,
        /// On which class of device.
        device_class: String,
        /// How many devices, or what share of one.
        devices: Portion,
        /// Of a share: which of the devices that are shared. Shares with the same number are of the same device.
        slot: u32,
        /// The state to go on from.
        from: Option<ArtifactRef>,
    },
    /// Stop the worker; kill it when it has not left within the grace. [`Event::Exited`] follows.
    Stop {
        /// Which lease.
        key: LeaseKey,
        /// How long it may take.
        grace: Millis,
    },
    /// Bring the result to the scheduler's store.
    Push {
        /// Of which lease.
        key: LeaseKey,
        /// Whose scheduler.
        to: SchedulerId,
        /// What.
        artifact: ArtifactRef,
    },
    /// Keep the scheduler's word on what a lease earned, for the owner's own books. Before the batch is stored: with it
    /// the lease is forgotten.
    Keep(Verified<Receipt>),
    /// The lease is over: release pins and scratch files.
    Forget {
        /// Which.
        key: LeaseKey,
    },
    /// Tell every scheduler.
    Advertise(Verified<Offer>),
    /// For the node's own log.
    Log(String),
}
