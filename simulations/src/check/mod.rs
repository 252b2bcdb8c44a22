//! The judge: rules of its own, applied to what crossed the wires, reached the disks or really ran.
//!
//! Nothing here calls the code under test to decide: leases are read from the nodes' disks, money from the
//! postings, and whether a node may run a job is worked out anew from the user's order and the true machine.
//! The first broken rule is kept; the world stops there. How often each rule was judged is counted, so that a
//! report can tell a rule that held from one that was never tried.
mod gangs;
mod held;
mod leases;
mod money;
mod truth;

pub use truth::{TrueDevice, TrueNode};

use crate::disk::Disk;
use held::Held;
use karez_core::{
    exchange::{ToNode, ToScheduler},
    id::{Digest, Fence, Institution, JobId, LeaseKey, PartIndex},
    key::{NodeId, SchedulerId},
    money::Accounts,
    records::{Order, Verified},
    store::Change,
    unit::{DeviceMillis, Portion, Rate},
};
use karez_ledger::Book;
use money::Side;
use serde::Deserialize;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// What is judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rule {
    /// No lease is granted twice, no device promised twice.
    LeasedOnce,
    /// No acknowledged job is lost.
    JobKept,
    /// No part is billed twice, none that did not run, none for more than it ran.
    BilledOnce,
    /// Money is neither made nor lost, and no account is overdrawn.
    Conserved,
    /// Guests are gone when the owner's grace is over, and none starts while the owner works.
    OwnerFirst,
    /// Nothing runs where its researcher or the machine's owner forbids it.
    Residency,
    /// After the storm every job comes to an end.
    Liveness,
    /// Parts that must run together are asked for together, at one site.
    Together,
    /// Work is moved no more often than its institution's bound.
    Moved,
}

impl Rule {
    /// As a sentence for people.
    pub fn sentence(self) -> &'static str {
        match self {
            Self::LeasedOnce => "no lease granted twice, no device promised twice",
            Self::JobKept => "no acknowledged job lost",
            Self::BilledOnce => "no part billed twice, or without having run",
            Self::Conserved => "money conserved, no account overdrawn",
            Self::OwnerFirst => "guests gone when the owner's grace is over",
            Self::Residency => "nothing ran where it may not",
            Self::Liveness => "every job came to an end",
            Self::Together => "what runs together started together, at one site",
            Self::Moved => "work moved no more often than the bound",
        }
    }
}

/// A lease as its node's disk tells it.
struct Seen {
    node: usize,
    class: String,
    devices: Portion,
    /// Of a share: which of the devices that are shared.
    slot: u32,
    live: bool,
}

/// A worker that really ran.
struct Execution {
    began: u64,
    ended: Option<(u64, bool)>,
}

#[derive(Default)]
struct Settlement {
    last: Fence,
    done: Option<Fence>,
}

/// The row of a part, as far as the judge reads it.
#[derive(Deserialize)]
struct PartRow {
    state: String,
}

/// The judge.
pub struct Checker {
    nodes: Vec<TrueNode>,
    by_id: HashMap<NodeId, usize>,
    sides: Vec<Side>,
    keep_books: bool,
    orders: BTreeMap<JobId, Verified<Order>>,
    /// Jobs the scheduler acknowledged.
    accepted: BTreeSet<JobId>,
    ended: BTreeMap<JobId, String>,
    /// Ended jobs that made room for others.
    dropped: BTreeSet<JobId>,
    asked: BTreeMap<LeaseKey, (NodeId, Rate)>,
    fence_asked: BTreeMap<(JobId, PartIndex), Fence>,
    leases: BTreeMap<LeaseKey, Seen>,
    fences_granted: BTreeMap<(usize, JobId, PartIndex), Fence>,
    executions: BTreeMap<(usize, LeaseKey), Execution>,
    settled: BTreeMap<(JobId, PartIndex), Settlement>,
    reserved: BTreeMap<JobId, u64>,
    billed: BTreeMap<JobId, u64>,
    receipts: BTreeSet<Digest>,
    results: BTreeSet<Digest>,
    /// Devices promised now, of each machine by class.
    held: Vec<Held>,
    /// Devices on which workers run now, of each machine by class.
    running: Vec<Held>,
    /// Since when the owner wants the machine.
    wanted: Vec<Option<u64>>,
    /// The longest a guest stayed after its owner's word, in milliseconds.
    pub(crate) leaving_ms_max: u64,
    /// Jobs that were done since somebody took them from here.
    pub(crate) newly_done: Vec<JobId>,
    /// Parts that wait in a queue now.
    queued: BTreeSet<(JobId, PartIndex)>,
    open: BTreeSet<JobId>,
    earned: BTreeMap<Institution, u64>,
    device_ms_billed: u64,
    counts: BTreeMap<Rule, u64>,
    broken: Option<String>,
    settlements: u64,
    /// The world's clock.
    now: u64,
    /// Rows of each job's parts.
    parts: BTreeMap<JobId, u32>,
    gangs: gangs::Gangs,
}

impl Checker {
    /// Knows the machines as they truly are.
    pub fn new(schedulers: Vec<SchedulerId>, nodes: Vec<TrueNode>, keep_books: bool) -> Self {
        Self {
            by_id: nodes.iter().enumerate().map(|(n, node)| (node.id, n)).collect(),
            held: vec![Held::default(); nodes.len()],
            running: vec![Held::default(); nodes.len()],
            wanted: vec![None; nodes.len()],
            nodes,
            sides: schedulers.into_iter().map(Side::new).collect(),
            keep_books,
            orders: BTreeMap::new(),
            accepted: BTreeSet::new(),
            ended: BTreeMap::new(),
            dropped: BTreeSet::new(),
            asked: BTreeMap::new(),
            fence_asked: BTreeMap::new(),
            leases: BTreeMap::new(),
            fences_granted: BTreeMap::new(),
            executions: BTreeMap::new(),
            settled: BTreeMap::new(),
            reserved: BTreeMap::new(),
            billed: BTreeMap::new(),
            receipts: BTreeSet::new(),
            results: BTreeSet::new(),
            leaving_ms_max: 0,
            newly_done: Vec::new(),
            queued: BTreeSet::new(),
            open: BTreeSet::new(),
            earned: BTreeMap::new(),
            device_ms_billed: 0,
            counts: BTreeMap::new(),
            broken: None,
            settlements: 0,
            now: 0,
            parts: BTreeMap::new(),
            gangs: gangs::Gangs::default(),
        }
    }

    fn judged(&mut self, rule: Rule) {
        *self.counts.entry(rule).or_default() += 1;
    }

    /// How often each rule was judged.
    pub fn counts(&self) -> &BTreeMap<Rule, u64> {
        &self.counts
    }

    /// Which machine that is.
    pub fn index_of(&self, node: &NodeId) -> Option<usize> {
        self.by_id.get(node).copied()
    }

    /// The first broken rule.
    pub fn broken(&self) -> Option<&str> {
        self.broken.as_deref()
    }

    /// Notes a broken rule, unless one is known already.
    pub fn fail(&mut self, rule: String) {
        self.broken.get_or_insert(rule);
    }

    /// The book of a scheduler as its daemon would keep it.
    pub fn book(&self, s: usize) -> &Book {
        &self.sides[s].book
    }

    /// Which scheduler an order was given to; none when to a stranger.
    pub fn scheduler_of(&self, job: &JobId) -> Option<usize> {
        let order = self.orders.get(job)?;
        self.sides.iter().position(|side| side.id == order.scheduler)
    }

    /// An order as its user signed it.
    pub fn order(&self, job: &JobId) -> Option<&Verified<Order>> {
        self.orders.get(job)
    }

    /// Parts that wait in a queue now.
    pub fn queued(&self) -> usize {
        self.queued.len()
    }

    /// What each institution earned, in micro-credits.
    pub fn earned(&self) -> &BTreeMap<Institution, u64> {
        &self.earned
    }

    /// Device time that was billed.
    pub fn billed_time(&self) -> DeviceMillis {
        DeviceMillis(self.device_ms_billed)
    }

    /// The machines as they truly are.
    pub fn node(&self, n: usize) -> &TrueNode {
        &self.nodes[n]
    }

    /// An owner changed a price.
    pub fn reprice(&mut self, n: usize, class: &str, rate: Rate) {
        for device in self.nodes[n].devices.iter_mut().filter(|d| d.class == class) {
            device.rate = rate;
        }
    }

    /// Leases granted so far.
    pub fn leases(&self) -> u64 {
        self.leases.len() as u64
    }

    /// Settlements posted so far.
    pub fn settlements(&self) -> u64 {
        self.settlements
    }

    /// A user signed an order.
    pub fn signed(&mut self, order: &Verified<Order>) {
        self.orders.insert(JobId(order.id()), order.clone());
    }

    /// The scheduler acknowledged a job: it must be on its disk by now, unless it ended and made room.
    pub fn accepted(&mut self, s: usize, job: JobId, disk: &Disk) {
        self.judged(Rule::JobKept);
        if self.scheduler_of(&job) != Some(s) {
            self.fail(format!("{job:?} was taken by a scheduler it was not given to"));
        }
        if self.accepted.insert(job) && !self.ended.contains_key(&job) {
            self.open.insert(job);
        }
        if disk.get("jobs", &job.0.0).is_none() && !self.ended.contains_key(&job) {
            self.fail(format!("{job:?} was acknowledged but is not on disk"));
        }
    }

    /// A request to submit was refused: the job must have left no trace.
    pub fn refused(&mut self, job: JobId, disk: &Disk) {
        if self.accepted.contains(&job) {
            return;
        }
        let parts = disk
            .rows_from("parts", &job.0.0)
            .next()
            .is_some_and(|(key, _)| key.starts_with(&job.0.0));
        if disk.get("jobs", &job.0.0).is_some() || parts || self.reserved.contains_key(&job) {
            self.fail(format!("{job:?} was refused but left a trace"));
        }
    }

    /// Whether this job is known to have been acknowledged.
    pub fn is_accepted(&self, job: &JobId) -> bool {
        self.accepted.contains(job)
    }

    // What leaves the scheduler.

    /// A message leaves the scheduler.
    pub fn to_node(&mut self, s: usize, node: NodeId, message: &ToNode) {
        match message {
            ToNode::Ask(ask) => {
                let key = ask.key;
                self.judged(Rule::LeasedOnce);
                self.asked_together(s, &key);
                if self.orders.contains_key(&key.job) && self.scheduler_of(&key.job) != Some(s) {
                    self.fail(format!(
                        "{key} was asked for by a scheduler its order was not given to"
                    ));
                }
                match self.asked.get(&key) {
                    Some((other, _)) if *other != node => {
                        self.fail(format!("{key} was asked of two nodes"));
                    }
                    Some(_) => {}
                    None => {
                        let last = self.fence_asked.entry((key.job, key.part)).or_default();
                        if key.fence <= *last {
                            let last = *last;
                            self.fail(format!("{key} was asked after fence {last}"));
                        } else {
                            *last = key.fence;
                        }
                        self.asked.insert(key, (node, ask.rate));
                    }
                }
                if !self.orders.contains_key(&key.job) {
                    self.fail(format!("{key} was asked for an order nobody signed"));
                }
            }
            ToNode::Move { key, .. } => self.moved(s, key),
            ToNode::Settled {
                key,
                receipt: Some(receipt),
                ..
            } if !self.receipts.contains(&receipt.id()) => {
                self.fail(format!("the receipt of {key} left before it was posted"));
            }
            _ => {}
        }
    }

    /// A message leaves a node, as its agent said it.
    pub fn to_scheduler(&mut self, n: usize, message: &ToScheduler) {
        match message {
            ToScheduler::Granted(lease)
                if self.leases.get(&lease.key()).is_none_or(|seen| seen.node != n) =>
            {
                self.fail(format!("{} was granted before it was stored", lease.key()));
            }
            ToScheduler::Finished(finished) => {
                let key = finished.lease.key();
                if self.leases.get(&key).is_none_or(|seen| seen.live) {
                    self.fail(format!("the usage of {key} left before it was stored"));
                }
            }
            _ => {}
        }
    }

    // What reaches the disks.

    /// The scheduler's changes are on its disk.
    pub fn scheduler_disk(&mut self, s: usize, changes: &[Change]) {
        for change in changes {
            match change {
                Change::Post { posting, at } => self.posted(s, *at, posting),
                Change::Put {
                    table: "parts",
                    key,
                    value,
                } => self.part_row(key, Some(value)),
                Change::Delete { table: "parts", key } => self.part_row(key, None),
                Change::Put {
                    table: "jobs",
                    key,
                    value,
                } => self.job_row(key, value),
                Change::Delete { table: "jobs", key } => {
                    if let Ok(job) = Digest::try_from(key.as_slice()).map(JobId) {
                        self.dropped.insert(job);
                        if !self.ended.contains_key(&job) {
                            self.fail(format!("{job:?} was dropped before it ended"));
                        }
                    }
                }
                _ => {}
            }
        }
    }

    fn part_row(&mut self, key: &[u8], value: Option<&[u8]>) {
        let named = key.split_at_checked(32).and_then(|(job, part)| {
            let part = PartIndex::from_be_bytes(part.try_into().ok()?);
            Some((JobId(Digest::try_from(job).ok()?), part))
        });
        let Some(named) = named else {
            return self.fail("a part row has a bad key".into());
        };
        let count = self.parts.entry(named.0).or_default();
        *count = (*count).max(named.1 + 1);
        match value.map(serde_json::from_slice::<PartRow>) {
            Some(Ok(row)) if row.state == "queued" => {
                self.queued.insert(named);
            }
            Some(Err(error)) => self.fail(format!("a part row cannot be read: {error}")),
            _ => {
                self.queued.remove(&named);
            }
        }
    }

    fn job_row(&mut self, key: &[u8], value: &[u8]) {
        let job = Digest::try_from(key).map(JobId);
        let value = serde_json::from_slice::<Value>(value);
        let (Ok(job), Ok(value)) = (job, value) else {
            return self.fail("a job row cannot be read".into());
        };
        let state = value["state"].as_str().unwrap_or_default().to_owned();
        if self.dropped.contains(&job) {
            return self.fail(format!("{job:?} had ended and was dropped, and is now {state}"));
        }
        if let Some(before) = self.ended.get(&job) {
            if *before != state {
                let before = before.clone();
                self.fail(format!("{job:?} had ended {before} and is now {state}"));
            }
        } else if matches!(state.as_str(), "done" | "failed" | "cancelled") {
            self.open.remove(&job);
            if state == "done" {
                self.newly_done.push(job);
            }
            self.ended.insert(job, state);
        }
    }

    /// A result is in the scheduler's store.
    pub fn pushed(&mut self, result: Digest) {
        self.results.insert(result);
    }

    // The end.

    /// Jobs acknowledged that have not ended, by the schedulers' disks.
    pub fn open(&self) -> &BTreeSet<JobId> {
        &self.open
    }

    /// Whether that job has ended.
    pub fn has_ended(&self, job: &JobId) -> bool {
        self.ended.contains_key(job)
    }

    /// How many jobs ended in that state.
    pub fn ended(&self, state: &str) -> u64 {
        self.ended.values().filter(|s| *s == state).count() as u64
    }

    /// After the calm: every job is told to its end, and the money is where it belongs.
    pub fn finish(&mut self, s: usize, disk: &Disk, believed: &Accounts) {
        for job in self.open.clone() {
            self.fail(format!("{job:?} never ended"));
        }
        self.gangs_at_rest();
        self.money_at_rest(s, believed);
        let jobs: Vec<JobId> = self
            .ended
            .keys()
            .filter(|job| !self.dropped.contains(job) && self.scheduler_of(job) == Some(s))
            .copied()
            .collect();
        for job in jobs {
            self.judged(Rule::Liveness);
            if let Err(rule) = self.job_told(&job, disk) {
                self.fail(format!("{job:?}: {rule}"));
            }
        }
        let live = self
            .leases
            .iter()
            .find(|(_, seen)| seen.live)
            .map(|(key, seen)| format!("node {} still holds {key}", seen.node));
        if let Some(rule) = live {
            self.fail(rule);
        }
    }

    /// All parts of a job that ended.
    fn job_told(&self, job: &JobId, disk: &Disk) -> Result<(), String> {
        let order = self.orders.get(job).ok_or("ended, but nobody signed it")?;
        let row = disk.get("jobs", &job.0.0).ok_or("its row is gone")?;
        let row: Value = serde_json::from_slice(row).map_err(|e| e.to_string())?;
        let billed = self.billed.get(job).copied().unwrap_or(0);
        if row["spent"].as_u64() != Some(billed) {
            return Err(format!("says {} was spent, billed {billed}", row["spent"]));
        }
        let mut next = 0;
        let mut credits = 0;
        for (index, (_, value)) in disk
            .rows_from("parts", &job.0.0)
            .take_while(|(key, _)| key.starts_with(&job.0.0))
            .enumerate()
        {
            let part: Value = serde_json::from_slice(value).map_err(|e| e.to_string())?;
            let state = part["state"].as_str().unwrap_or_default();
            if part["first_item"].as_u64() != Some(next) {
                return Err(format!("part {index} does not begin at item {next}"));
            }
            next += part["items"].as_u64().unwrap_or(0);
            credits += part["credits"].as_u64().unwrap_or(0);
            if !matches!(state, "done" | "failed" | "cancelled") {
                return Err(format!("has ended, but part {index} is {state}"));
            }
            let done = self
                .settled
                .get(&(*job, index as PartIndex))
                .is_some_and(|s| s.done.is_some());
            if (state == "done") != done {
                return Err(format!("part {index} is {state}, settled as done: {done}"));
            }
            if done && (part["result"].is_null() || part["receipt"].is_null()) {
                return Err(format!("part {index} is done without result or receipt"));
            }
            if row["state"] == "done" && state != "done" {
                return Err(format!("is done, but part {index} is {state}"));
            }
        }
        if next != order.items {
            return Err(format!("its parts cover {next} of {} items", order.items));
        }
        if credits != billed {
            return Err(format!("its parts cost {credits}, billed {billed}"));
        }
        Ok(())
    }
}
