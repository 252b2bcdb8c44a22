//! How large a world is, how rough its storm, and which promise is broken on purpose.

/// The dials of a world.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setup {
    /// Nodes.
    pub nodes: usize,
    /// Researchers.
    pub users: usize,
    /// Orders, of all users together.
    pub orders: usize,
    /// How long faults go on, in virtual milliseconds.
    pub storm_ms: u64,
    /// How long the calm may take until every job has ended.
    pub calm_ms_max: u64,
    /// Faults per virtual minute.
    pub faults_per_minute: u64,
    /// Nodes that lie, per thousand.
    pub liars_per_mille: u64,
    /// Ended jobs the scheduler keeps.
    pub jobs_kept: usize,
    /// Record what happens, readable.
    pub trace: bool,
    /// A promise to break, to see that the checkers notice.
    pub sabotage: Option<Sabotage>,
}

impl Default for Setup {
    /// Fifty nodes.
    fn default() -> Self {
        Self {
            nodes: 50,
            users: 8,
            orders: 60,
            storm_ms: 240_000,
            calm_ms_max: 3_600_000,
            faults_per_minute: 40,
            liars_per_mille: 60,
            jobs_kept: 10_000,
            trace: false,
            sabotage: None,
        }
    }
}

impl Setup {
    /// A world small enough to run hundreds of.
    pub fn small() -> Self {
        Self {
            nodes: 10,
            users: 4,
            orders: 14,
            storm_ms: 150_000,
            faults_per_minute: 16,
            ..Self::default()
        }
    }

    /// The setup that belongs to a seed in the suite: most worlds are small, some are rough, some are large.
    pub fn of_seed(seed: u64) -> Self {
        let small = Self {
            nodes: 8 + (seed % 8) as usize,
            jobs_kept: if seed.is_multiple_of(3) { 2 } else { 10_000 },
            ..Self::small()
        };
        match seed % 25 {
            0 => Self::default(),
            1..=4 => Self {
                faults_per_minute: 60,
                ..small
            },
            5 | 6 => Self {
                faults_per_minute: 0,
                liars_per_mille: 0,
                ..small
            },
            7 | 8 => Self {
                liars_per_mille: 400,
                ..small
            },
            9 => Self { nodes: 2, ..small },
            _ => small,
        }
    }
}

/// A broken promise: each must be noticed by a checker, or the checker is worth nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sabotage {
    /// Nodes are asked old things again. The one that must do no harm.
    ReplayAsks,
    /// As that, and nodes forget at a restart which fences they saw.
    ForgetFences,
    /// Nodes count more devices than the machine has.
    Overbook,
    /// An ask reaches two nodes.
    AskTwice,
    /// Grants leave a node before they are on its disk.
    GrantUnstored,
    /// Jobs are acknowledged before they are on the scheduler's disk.
    AcceptUnstored,
    /// Every settlement is posted twice.
    BillTwice,
    /// Postings move more than the receipt says.
    Overcharge,
    /// Nodes say they stand elsewhere.
    FalseCountry,
    /// Nodes ask more than they were offered at.
    Dearer,
    /// Nodes never hear that a usage was taken.
    DropSettled,
    /// Usages never leave a node.
    DropFinished,
    /// Results never reach the scheduler's store, yet are reported as brought there.
    LoseResults,
}
