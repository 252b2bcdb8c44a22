//! What a world is made of: who takes part, how rough its storm is, and which promise is broken on purpose.
//!
//! A world has members that are listed (as a scenario does), others drawn at random (as the seeded suites do), or both.
use crate::{geo::Links, traces::azure::Request};
use karez_core::{
    fair::Shares,
    id::{Country, Institution},
    placement::Policy,
    unit::{Bytes, Credits, Millis, Rate},
};
use std::sync::Arc;

/// One minute of virtual time.
pub const MINUTE: u64 = 60_000;
/// One hour.
pub const HOUR: u64 = 60 * MINUTE;
/// One day.
pub const DAY: u64 = 24 * HOUR;

/// The dials of a world. Virtual time begins on a Monday at 00:00 UTC.
#[derive(Debug, Clone)]
pub struct Setup {
    /// For people.
    pub name: String,
    /// What it shows.
    pub about: String,
    /// Nodes drawn at random.
    pub nodes: usize,
    /// Researchers drawn at random.
    pub users: usize,
    /// Orders drawn at random, of all those users together.
    pub orders: usize,
    /// Listed members.
    pub members: Vec<Member>,
    /// The schedulers; at least one.
    pub schedulers: Vec<Seat>,
    /// What listed members' researchers hand in.
    pub workloads: Vec<Workload>,
    /// Latencies between countries.
    pub links: Arc<Links>,
    /// How long orders and faults go on, in virtual milliseconds.
    pub storm_ms: u64,
    /// How long the calm may take until every job has ended.
    pub calm_ms_max: u64,
    /// Random faults per virtual minute.
    pub faults_per_minute: u64,
    /// Faults with a date.
    pub faults: Vec<PlannedFault>,
    /// Nodes that lie, per thousand.
    pub liars_per_mille: u64,
    /// Nodes that work several times slower than their probe says, per thousand. Listed members' only.
    pub slow_per_mille: u64,
    /// How far a node's clock may be wrong.
    pub skew_ms_max: u64,
    /// Nodes start within so long.
    pub boot_ms: u64,
    /// Ended jobs a scheduler keeps.
    pub jobs_kept: usize,
    /// How patient the daemons are.
    pub timing: Timing,
    /// What schedulers count into the cost of finished work.
    pub policy: Policy,
    /// How they share fairly.
    pub shares: Shares,
    /// Between two samples for the report; 0 for none.
    pub sample_ms: u64,
    /// Keep every entry of the books, to read them anew at the end.
    pub keep_books: bool,
    /// Record what happens, readable.
    pub trace: bool,
    /// A promise to break, to see that the checkers notice.
    pub sabotage: Option<Sabotage>,
}

/// A scheduler and where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seat {
    /// Its name.
    pub name: String,
    /// Its country.
    pub country: Country,
}

/// An institution with its machines, its researchers and its owner's habits.
#[derive(Debug, Clone, PartialEq)]
pub struct Member {
    /// Its name.
    pub institution: Institution,
    /// Where its machines and people are.
    pub country: Country,
    /// Its machines, and how many of each.
    pub machines: Vec<(Machine, usize)>,
    /// Its researchers.
    pub users: usize,
    /// What each of them may spend at each scheduler.
    pub budget: Credits,
    /// What a device costs for an hour.
    pub rate: Rate,
    /// Each machine's price differs from it by up to so many percent.
    pub rate_spread_percent: u64,
    /// When its machines are its own; none: they are always lent.
    pub habit: Option<Habit>,
    /// Its machines dial these; its researchers turn to the first that answers. Indices into the schedulers.
    pub schedulers: Vec<usize>,
    /// How it competes; none: its prices stay.
    pub pricing: Option<Pricing>,
}

/// A kind of machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// Class of its devices.
    pub class: String,
    /// How many devices.
    pub devices: u32,
    /// Memory of one.
    pub memory: Bytes,
    /// Tokens generated per second by one device, in thousandths; 0: it cannot generate.
    pub generate_milli: u64,
    /// Tokens embedded per second by one device, in thousandths; 0: it cannot embed.
    pub embed_milli: u64,
}

/// When an owner wants the machine, by the local clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Habit {
    /// Minutes after local midnight.
    pub from: u64,
    /// Minutes after local midnight; earlier than `from`: the night is the owner's.
    pub to: u64,
    /// Saturdays and Sundays are lent whole.
    pub weekdays_only: bool,
    /// Each machine's owner comes and goes up to so many minutes later.
    pub jitter_minutes: u64,
    /// So many minutes before, no new leases are taken.
    pub notice_minutes: u64,
}

/// How an owner changes prices: down when devices lie idle, up when nearly all are lent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pricing {
    /// Between two looks.
    pub every_ms: u64,
    /// By so much.
    pub step_percent: u64,
    /// Never under it: what the electricity costs.
    pub floor: Rate,
    /// Never over it.
    pub ceiling: Rate,
}

/// What researchers hand in.
#[derive(Debug, Clone)]
pub struct Workload {
    /// For people.
    pub name: String,
    /// Whose researchers; empty for all.
    pub institutions: Vec<Institution>,
    /// When.
    pub arrivals: Arrivals,
    /// What each item is.
    pub item: Item,
    /// Items of a job, at least and at most.
    pub items: (u64, u64),
    /// Items of a part; 0 leaves it to the scheduler.
    pub items_per_part: u32,
    /// Jobs that must stay in their researcher's country, per thousand.
    pub at_home_per_mille: u64,
    /// Jobs that may run in these countries only; empty for all.
    pub countries: Vec<Country>,
    /// Jobs that take donated capacity only, per thousand.
    pub donated_per_mille: u64,
    /// Start of the device class.
    pub device: String,
    /// Jobs called off later, per thousand.
    pub cancelled_per_mille: u64,
    /// What a job may cost.
    pub credits_max: Credits,
    /// Attempts at each part.
    pub attempts_max: u32,
}

/// When jobs come.
#[derive(Debug, Clone)]
pub enum Arrivals {
    /// At a mean rate.
    Steady {
        /// Jobs per hour, in thousandths.
        per_hour_milli: u64,
    },
    /// As people work: much at eleven and at three by their own clock, little at night, less at weekends.
    Diurnal {
        /// Jobs per hour at the busiest hour, in thousandths, if all researchers shared one clock.
        per_hour_milli: u64,
    },
    /// All at once.
    Flash {
        /// When it begins.
        at_ms: u64,
        /// Within so long.
        over_ms: u64,
        /// So many.
        jobs: u64,
    },
    /// Requests of a trace, gathered into a job for each span.
    Requests {
        /// The trace; one request is one item.
        requests: Arc<Vec<Request>>,
        /// When the trace begins.
        at_ms: u64,
        /// Requests of so long make one job.
        gather_ms: u64,
        /// Each request comes so many times.
        times: u64,
    },
}

/// What one item is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Item {
    /// Takes so long on any machine, at least and at most, in milliseconds.
    Fixed(u32, u32),
    /// So many tokens are generated.
    Generate(u32),
    /// So many bytes of text are embedded.
    Embed(u32),
}

/// A fault with a date.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedFault {
    /// When.
    pub at_ms: u64,
    /// For how long.
    pub for_ms: u64,
    /// What.
    pub what: Trouble,
}

/// What can happen on a date.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trouble {
    /// No message passes between a country and the rest of the world.
    CountryDark(Country),
    /// Power fails: every machine of a country stops.
    CountryDown(Country),
    /// A scheduler is gone.
    SchedulerLost(usize),
    /// All owners of a country, or of all, want their machines at once.
    OwnersReturn(Option<Country>),
}

/// How patient the daemons are. All in virtual milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// Between two reports of a node.
    pub heartbeat: Millis,
    /// How long an offer is believed.
    pub offer_ttl: Millis,
    /// How long a lease lasts without renewal.
    pub lease_ttl: Millis,
    /// How long a node without a session keeps its leases in a scheduler's belief.
    pub reconnect_grace: Millis,
    /// How long an ask may stay unanswered.
    pub ask_timeout: Millis,
    /// Between the first readings of a lease.
    pub reading_interval: Millis,
    /// How long a guest may stay once the owner wants the machine.
    pub reclaim_grace: Millis,
}

impl Timing {
    /// As hasty as the seeded suites are: minutes hold as much as hours do elsewhere.
    pub const HASTY: Self = Self {
        heartbeat: Millis(2_000),
        offer_ttl: Millis(30_000),
        lease_ttl: Millis(15_000),
        reconnect_grace: Millis(8_000),
        ask_timeout: Millis(4_000),
        reading_interval: Millis(3_000),
        reclaim_grace: Millis(4_000),
    };

    /// For worlds of hours and days.
    pub const DAILY: Self = Self {
        heartbeat: Millis(60_000),
        offer_ttl: Millis(900_000),
        lease_ttl: Millis(300_000),
        reconnect_grace: Millis(120_000),
        ask_timeout: Millis(20_000),
        reading_interval: Millis(300_000),
        reclaim_grace: Millis(30_000),
    };
}

impl Default for Setup {
    /// Fifty nodes drawn at random before one scheduler.
    fn default() -> Self {
        Self {
            name: String::new(),
            about: String::new(),
            nodes: 50,
            users: 8,
            orders: 60,
            members: Vec::new(),
            schedulers: seats(1),
            workloads: Vec::new(),
            links: Arc::default(),
            storm_ms: 240_000,
            calm_ms_max: HOUR,
            faults_per_minute: 40,
            faults: Vec::new(),
            liars_per_mille: 60,
            slow_per_mille: 0,
            skew_ms_max: 10_000,
            boot_ms: 5_000,
            jobs_kept: 10_000,
            timing: Timing::HASTY,
            policy: Policy::default(),
            shares: Shares::default(),
            sample_ms: 0,
            keep_books: true,
            trace: false,
            sabotage: None,
        }
    }
}

/// Schedulers in several countries.
pub(crate) fn seats(count: usize) -> Vec<Seat> {
    ["KE", "BR", "FR", "VN"]
        .iter()
        .take(count.max(1))
        .map(|code| Seat {
            name: format!("scheduler-{code}"),
            country: crate::people::parse(code),
        })
        .collect()
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

    /// The setup that belongs to a seed in the suite: most worlds are small, some are rough, some are large, and
    /// a third has several schedulers.
    pub fn of_seed(seed: u64) -> Self {
        let small = Self {
            nodes: 8 + (seed % 8) as usize,
            jobs_kept: if seed.is_multiple_of(3) { 2 } else { 10_000 },
            schedulers: seats(match seed % 9 {
                1 | 4 => 2,
                7 => 3,
                _ => 1,
            }),
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
    /// Nodes are asked old things again. It must do no harm.
    ReplayAsks,
    /// Asks of one scheduler reach nodes as if they came from another. It must do no harm.
    CrossTalk,
    /// As [`Sabotage::ReplayAsks`], and nodes forget at a restart which fences they saw.
    ForgetFences,
    /// Nodes count more devices than the machine has.
    Overbook,
    /// Nodes put everybody who shares devices on the first of them.
    Crowd,
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
    /// Postings credit more than they debit.
    Mint,
    /// Nodes say they stand elsewhere.
    FalseCountry,
    /// Nodes ask more than they were offered at.
    Dearer,
    /// Guests stay though the owner wants the machine.
    IgnoreOwner,
    /// The node does not hear that the owner is back.
    DeafToOwner,
    /// Nodes never hear that a usage was taken.
    DropSettled,
    /// Usages never leave a node.
    DropFinished,
    /// Half of what should run together is not asked for.
    SplitGang,
    /// Everything is moved all the time.
    MoveAll,
    /// Results never reach the scheduler's store, yet are reported as brought there.
    LoseResults,
}
