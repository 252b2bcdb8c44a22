//! Seeded worlds that run the real agent and controller, with faults and checkers.
//!
//! A [`World`] holds schedulers, nodes with their owners, users and everything between them: clocks, disks, sessions,
//! stray offers, workers. The minds are the real ones of `karez-core`; only the shells around them are simulated,
//! and they keep exactly the promises that the daemons keep (what is persisted is on disk before anything else of
//! a batch leaves). The [`check::Checker`] sees what crossed the wires and reached the disks, nothing else, and
//! judges it by rules of its own.
//!
//! Start at [`run`]: equal seeds and setups give equal worlds. A failure names its seed.
pub mod check;
pub mod disk;
pub mod geo;
mod liar;
pub mod record;
pub mod report;
pub mod rng;
pub mod scenario;
pub mod setup;
pub mod traces;
pub mod world;

mod node;
mod people;
mod scheduler;
mod workload;

pub use setup::{Sabotage, Setup};
pub use world::World;

/// What a world that kept every rule went through.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Summary {
    /// Events handled by minds.
    pub events: u64,
    /// Jobs accepted.
    pub jobs: u64,
    /// Those that ended done.
    pub done: u64,
    /// Those that ended failed.
    pub failed: u64,
    /// Those that were called off.
    pub cancelled: u64,
    /// Requests to submit that were refused.
    pub refused: u64,
    /// Leases granted.
    pub leases: u64,
    /// Attempts settled, paid or not.
    pub settled: u64,
    /// Crashes of nodes and of schedulers.
    pub crashes: u64,
    /// Processes started anew by their operators.
    pub restarts: u64,
    /// Times an owner took a machine back.
    pub reclaims: u64,
    /// Messages sent: session messages and offers.
    pub messages: u64,
    /// Events planned when the figures were taken.
    pub waiting: u64,
    /// Sessions that broke.
    pub breaks: u64,
    /// Virtual milliseconds from the end of the storm until the last job ended.
    pub calm_ms: u64,
}

impl Summary {
    /// Counts another world in.
    pub fn add(&mut self, other: &Self) {
        self.events += other.events;
        self.jobs += other.jobs;
        self.done += other.done;
        self.failed += other.failed;
        self.cancelled += other.cancelled;
        self.refused += other.refused;
        self.leases += other.leases;
        self.settled += other.settled;
        self.crashes += other.crashes;
        self.restarts += other.restarts;
        self.reclaims += other.reclaims;
        self.messages += other.messages;
        self.waiting = self.waiting.max(other.waiting);
        self.breaks += other.breaks;
        self.calm_ms = self.calm_ms.max(other.calm_ms);
    }
}

/// A world broke a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The seed that shows it.
    pub seed: u64,
    /// The scenario; empty for the worlds of the suite.
    pub scenario: String,
    /// Which rule, and where.
    pub rule: String,
    /// What happened before, when the setup asked for a trace.
    pub trace: Vec<String>,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "seed {}: {}", self.seed, self.rule)?;
        if self.scenario.is_empty() {
            return write!(
                f,
                "replay: KAREZ_SEED={} cargo test -p karez-simulations one_seed -- --nocapture",
                self.seed
            );
        }
        write!(
            f,
            "replay: the scenario {:?} again with `--seed {} --trace`",
            self.scenario, self.seed
        )
    }
}

impl std::error::Error for Failure {}

/// Runs the world of `seed` through its storm and its calm.
pub fn run(seed: u64, setup: &Setup) -> Result<Summary, Failure> {
    World::new(seed, setup.clone()).run()
}
