//! The judge: rules of its own, applied to what crossed the wires, reached the disks or really ran.
//!
//! Nothing here calls the code under test to decide: leases are read from the nodes' disks, money from the
//! postings, and whether a node may run a job is worked out anew from the user's order and the true machine.
//! The first broken rule is kept; the world stops there.
use crate::disk::Disk;
use karez_core::{
    exchange::{ToNode, ToScheduler},
    id::{Country, Digest, Fence, Institution, JobId, LeaseKey, PartIndex},
    key::{NodeId, SchedulerId},
    money::{Account, Accounts, Posting, PostingKind},
    records::{Flag, Lease, Order, Outcome, Receipt, Signed, Usage, Verified, WorkKind},
    store::Change,
    unit::{Bytes, Credits, DeviceMillis, Rate, UtcMillis},
};
use karez_ledger::{Book, Entry};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// One class of devices of a machine, as it truly is.
#[derive(Debug, Clone)]
pub struct TrueDevice {
    /// Its class.
    pub class: String,
    /// How many there are.
    pub count: u32,
    /// Memory of one.
    pub memory: Bytes,
    /// What the owner asks now.
    pub rate: Rate,
}

/// A machine as it truly is.
#[derive(Debug, Clone)]
pub struct TrueNode {
    /// Its key.
    pub id: NodeId,
    /// Whose it is.
    pub institution: Institution,
    /// Where it stands.
    pub country: Country,
    /// What it has.
    pub devices: Vec<TrueDevice>,
    /// What it can do, with units per second in thousandths.
    pub speeds: BTreeMap<WorkKind, u64>,
    /// Whose users its owner refuses.
    pub refuses: Vec<Institution>,
    /// Its messages are its agent's own.
    pub honest: bool,
}

impl TrueNode {
    fn device(&self, class: &str) -> Option<&TrueDevice> {
        self.devices.iter().find(|d| d.class == class)
    }

    /// May `order` run on `device` of this machine, by the user's own words?
    fn allowed(&self, order: &Order, device: &TrueDevice) -> Result<(), String> {
        let c = &order.constraints;
        if !c.countries.is_empty() && !c.countries.contains(&self.country) {
            return Err(format!("{} is none of its countries", self.country));
        }
        if c.countries_excluded.contains(&self.country) {
            return Err(format!("{} is excluded", self.country));
        }
        if !c.institutions.is_empty() && !c.institutions.contains(&self.institution) {
            return Err(format!("{} is none of its institutions", self.institution));
        }
        if c.institutions_excluded.contains(&self.institution) {
            return Err(format!("{} is excluded", self.institution));
        }
        if self.refuses.contains(&order.institution) {
            return Err(format!("the owner refuses users of {}", order.institution));
        }
        if !self.speeds.contains_key(&order.work.kind()) {
            return Err("it has no such engine".into());
        }
        if !device.class.starts_with(&c.device) {
            return Err(format!("{} is not {}", device.class, c.device));
        }
        if device.memory < c.memory {
            return Err("it has too little memory".into());
        }
        if c.donated_only && device.rate > Rate::FREE {
            return Err("it is not donated".into());
        }
        if c.rate_max.is_some_and(|max| device.rate > max) {
            return Err("it is dearer than the order allows".into());
        }
        Ok(())
    }

    /// Could some device of this machine ever run `order`, money aside?
    pub fn could_run(&self, order: &Order) -> bool {
        self.devices.iter().any(|d| self.allowed(order, d).is_ok())
    }
}

/// A lease as its node's disk tells it.
struct Seen {
    node: usize,
    class: String,
    devices: u32,
    live: bool,
}

/// A worker that really ran.
struct Execution {
    node: usize,
    began: u64,
    ended: Option<(u64, bool)>,
}

#[derive(Default)]
struct Settlement {
    last: Fence,
    done: Option<Fence>,
}

/// The judge.
pub struct Checker {
    scheduler: SchedulerId,
    nodes: Vec<TrueNode>,
    book: Book,
    entries: Vec<Entry>,
    /// Kept beside the book, by the plain sum of the legs.
    accounts: Accounts,
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
    broken: Option<String>,
    settlements: u64,
}

impl Checker {
    /// Knows the machines as they truly are.
    pub fn new(scheduler: SchedulerId, nodes: Vec<TrueNode>) -> Self {
        Self {
            scheduler,
            nodes,
            book: Book::new(scheduler),
            entries: Vec::new(),
            accounts: Accounts::default(),
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
            broken: None,
            settlements: 0,
        }
    }

    /// The first broken rule.
    pub fn broken(&self) -> Option<&str> {
        self.broken.as_deref()
    }

    /// Notes a broken rule, unless one is known already.
    pub fn fail(&mut self, rule: String) {
        self.broken.get_or_insert(rule);
    }

    /// The book as a daemon would keep it.
    pub fn book(&self) -> &Book {
        &self.book
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
    pub fn accepted(&mut self, job: JobId, disk: &Disk) {
        self.accepted.insert(job);
        if disk.get("jobs", &job.0.0).is_none() && !self.ended.contains_key(&job) {
            self.fail(format!("{job:?} was acknowledged but is not on disk"));
        }
    }

    /// A request to submit was refused: the job must have left no trace.
    pub fn refused(&mut self, job: JobId, disk: &Disk) {
        if self.accepted.contains(&job) {
            return;
        }
        let parts = disk.rows("parts").any(|(key, _)| key.starts_with(&job.0.0));
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
    pub fn to_node(&mut self, node: NodeId, message: &ToNode) {
        match message {
            ToNode::Ask(ask) => {
                let key = ask.key;
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

    /// A node's changes are on its disk.
    pub fn node_disk(&mut self, n: usize, changes: &[Change]) {
        for change in changes {
            match change {
                Change::Put {
                    table: "leases",
                    key,
                    value,
                } => self.lease_row(n, key, value),
                Change::Delete { table: "leases", key } => {
                    if let Some(key) = lease_key(key)
                        && let Some(seen) = self.leases.get_mut(&key)
                        && seen.node == n
                        && seen.live
                    {
                        self.fail(format!("{key} was forgotten while it lived"));
                    }
                }
                Change::Post { .. } => self.fail("a node posted to a ledger".into()),
                _ => {}
            }
        }
        self.capacity(n);
    }

    fn lease_row(&mut self, n: usize, row: &[u8], value: &[u8]) {
        let Some(key) = lease_key(row) else {
            return self.fail("a lease row has a bad key".into());
        };
        let Ok(value) = serde_json::from_slice::<Value>(value) else {
            return self.fail(format!("the row of {key} cannot be read"));
        };
        let live = match &value["stage"] {
            Value::String(stage) => stage == "Granted" || stage == "Running",
            _ => false,
        };
        match self.leases.get_mut(&key) {
            Some(seen) if seen.node != n => {
                let other = seen.node;
                self.fail(format!("{key} was granted by node {other} and by node {n}"));
            }
            Some(seen) if live && !seen.live => self.fail(format!("{key} lives again after it ended")),
            Some(seen) => seen.live = live,
            None => self.granted(n, key, &value, live),
        }
    }

    fn granted(&mut self, n: usize, key: LeaseKey, value: &Value, live: bool) {
        let lease = value["lease"]
            .as_str()
            .and_then(unhex)
            .and_then(|bytes| Signed::<Lease>::open(&bytes).ok());
        let Some(lease) = lease else {
            return self.fail(format!("the lease of {key} cannot be read"));
        };
        if let Err(rule) = self.lease_allowed(n, &key, &lease) {
            self.fail(format!("{key} on node {n}: {rule}"));
        }
        self.leases.insert(
            key,
            Seen {
                node: n,
                class: lease.device_class.clone(),
                devices: lease.devices,
                live,
            },
        );
        let last = self.fences_granted.entry((n, key.job, key.part)).or_default();
        if key.fence <= *last {
            let last = *last;
            self.fail(format!("node {n} granted {key} after fence {last}"));
        } else {
            *last = key.fence;
        }
    }

    fn lease_allowed(&self, n: usize, key: &LeaseKey, lease: &Lease) -> Result<(), String> {
        let node = &self.nodes[n];
        if lease.key() != *key || lease.node != node.id || lease.scheduler != self.scheduler {
            return Err("the lease names somebody else".into());
        }
        let (asked, rate) = self.asked.get(key).ok_or("nobody asked for it")?;
        if *asked != node.id {
            return Err("another node was asked".into());
        }
        let order = self.orders.get(&key.job).ok_or("nobody signed its order")?;
        let device = node
            .device(&lease.device_class)
            .ok_or("there is no such device")?;
        node.allowed(order, device)?;
        if lease.rate > *rate || lease.rate != device.rate {
            return Err(format!(
                "it costs {}, offered {}, asked {rate}",
                lease.rate, device.rate
            ));
        }
        let end = lease
            .first_item
            .checked_add(lease.items)
            .ok_or("its items overflow")?;
        if lease.items == 0 || end > order.items {
            return Err("it covers items the order does not have".into());
        }
        if lease
            .rate
            .bill(lease.device_ms_max)
            .is_none_or(|bill| bill > order.credits_max)
        {
            return Err("it may bill more than its job may cost".into());
        }
        Ok(())
    }

    /// No device is promised twice.
    fn capacity(&mut self, n: usize) {
        let mut held: BTreeMap<&str, u32> = BTreeMap::new();
        for seen in self.leases.values().filter(|seen| seen.node == n && seen.live) {
            *held.entry(&seen.class).or_default() += seen.devices;
        }
        let over = held.iter().find_map(|(class, held)| {
            let has = self.nodes[n].device(class).map_or(0, |d| d.count);
            (*held > has).then(|| format!("node {n} has {has} {class} and promised {held}"))
        });
        if let Some(rule) = over {
            self.fail(rule);
        }
    }

    /// The scheduler's changes are on its disk.
    pub fn scheduler_disk(&mut self, changes: &[Change]) {
        for change in changes {
            match change {
                Change::Post { posting, at } => self.posted(*at, posting),
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
            self.ended.insert(job, state);
        }
    }

    fn posted(&mut self, at: UtcMillis, posting: &Posting) {
        match self.book.append(at, posting.clone()) {
            Ok(entry) => self.entries.push(entry),
            Err(error) => self.fail(format!("the book refuses a {:?}: {error}", posting.kind)),
        }
        if let Err(error) = self.accounts.apply(posting) {
            self.fail(format!("the accounts refuse a {:?}: {error}", posting.kind));
        }
        let sum: i128 = posting.legs.iter().map(|(_, leg)| i128::from(*leg)).sum();
        if sum != 0 || self.accounts.sum() != 0 {
            self.fail(format!("a {:?} makes or loses money", posting.kind));
        }
        let under = self
            .accounts
            .iter()
            .find(|(account, balance)| *balance < 0 && **account != Account::Federation)
            .map(|(account, balance)| format!("{account} stands at {balance}"));
        if let Some(rule) = under {
            self.fail(rule);
        }
        match posting.kind {
            PostingKind::Grant => {}
            PostingKind::Reserve => {
                for (account, leg) in &posting.legs {
                    if let Account::Escrow(job) = account {
                        let amount = u64::try_from(*leg).unwrap_or(0);
                        if self.reserved.insert(*job, amount).is_some() {
                            self.fail(format!("{job:?} reserved twice"));
                        }
                    }
                }
            }
            PostingKind::Settle => self.settle(posting),
            PostingKind::Release => {
                for (account, _) in &posting.legs {
                    if matches!(account, Account::Escrow(_)) && self.accounts.balance(account) != 0 {
                        self.fail(format!("{account} was released but not emptied"));
                    }
                }
            }
        }
    }

    fn settle(&mut self, posting: &Posting) {
        self.settlements += 1;
        let [_, lease, _, .., usage, receipt] = posting.evidence.as_slice() else {
            return self.fail("a settlement lacks its papers".into());
        };
        let papers = (
            Signed::<Lease>::open(lease),
            Signed::<Usage>::open(usage),
            Signed::<Receipt>::open(receipt),
        );
        let (Ok(lease), Ok(usage), Ok(receipt)) = papers else {
            return self.fail("a settlement's papers cannot be read".into());
        };
        let key = lease.key();
        let done = usage.outcome == Outcome::Done && !receipt.flags.contains(&Flag::NotDone);
        self.receipts.insert(receipt.id());
        let entry = self.settled.entry((key.job, key.part)).or_default();
        if key.fence <= entry.last {
            let last = entry.last;
            self.fail(format!("{key} was settled after fence {last}"));
        } else if let Some(before) = entry.done {
            self.fail(format!("{key} was settled after {before} was done"));
        } else {
            entry.last = key.fence;
            if done {
                entry.done = Some(key.fence);
            }
        }
        let billed = self.billed.entry(key.job).or_default();
        *billed += receipt.credits.0;
        let (billed, reserved) = (*billed, self.reserved.get(&key.job).copied().unwrap_or(0));
        if billed > reserved {
            self.fail(format!(
                "{:?} was billed {billed} of {reserved} reserved",
                key.job
            ));
        }
        if !done && receipt.credits > Credits::ZERO {
            self.fail(format!("{key} was billed though it did not finish"));
        }
        if let Err(rule) = self.settle_true(&key, &lease, &usage, &receipt, done) {
            self.fail(format!("{key}: {rule}"));
        }
        let moved = posting.legs.iter().map(|(_, leg)| leg.unsigned_abs()).max();
        if moved != Some(receipt.credits.0) {
            self.fail(format!("{key}: the posting moves other than the receipt says"));
        }
    }

    /// What was settled is what was asked for and, on an honest machine, what really happened.
    fn settle_true(
        &self,
        key: &LeaseKey,
        lease: &Lease,
        usage: &Usage,
        receipt: &Receipt,
        done: bool,
    ) -> Result<(), String> {
        let (asked, rate) = self.asked.get(key).ok_or("settled, but nobody asked for it")?;
        if *asked != lease.node || lease.rate > *rate {
            return Err("settled for another node or price than was asked".into());
        }
        let n = self
            .nodes
            .iter()
            .position(|node| node.id == lease.node)
            .ok_or("settled for a node nobody knows")?;
        let node = &self.nodes[n];
        if lease.institution != node.institution || receipt.node_institution != node.institution {
            return Err("another institution was paid".into());
        }
        let bill = lease.rate.bill(receipt.billed).unwrap_or(Credits(u64::MAX));
        if receipt.credits > bill || receipt.billed > lease.device_ms_max {
            return Err("the receipt bills more than time and lease allow".into());
        }
        if done && usage.result.is_none() {
            return Err("done without a result".into());
        }
        if !node.honest {
            return Ok(());
        }
        if self.leases.get(key).is_none_or(|seen| seen.node != n) {
            return Err("settled, but its node never granted it".into());
        }
        if done {
            let run = self
                .executions
                .get(&(n, *key))
                .and_then(|e| e.ended.map(|end| (e.began, end)));
            let Some((began, (ended, true))) = run else {
                return Err("settled as done, but no worker finished it".into());
            };
            let ran = (ended - began) * u64::from(lease.devices);
            if receipt.billed > DeviceMillis(ran) {
                return Err(format!("billed {} ms, ran {ran} ms", receipt.billed.0));
            }
            if usage
                .result
                .is_some_and(|result| !self.results.contains(&result.digest))
            {
                return Err("settled as done, but its result never reached the scheduler".into());
            }
        }
        Ok(())
    }

    // What really ran.

    /// A worker starts.
    pub fn started(&mut self, n: usize, key: LeaseKey, now: u64, disk: &Disk) {
        let row: Vec<u8> = lease_row_key(&key);
        if disk.get("leases", &row).is_none() {
            self.fail(format!("a worker of {key} started before the intent was stored"));
        }
        let run = Execution {
            node: n,
            began: now,
            ended: None,
        };
        if self.executions.insert((n, key), run).is_some() {
            self.fail(format!("{key} was started twice on node {n}"));
        }
        let mut running: BTreeMap<&str, u32> = BTreeMap::new();
        for ((_, key), run) in &self.executions {
            if run.node == n
                && run.ended.is_none()
                && let Some(seen) = self.leases.get(key)
            {
                *running.entry(&seen.class).or_default() += seen.devices;
            }
        }
        let over = running.iter().find_map(|(class, count)| {
            let has = self.nodes[n].device(class).map_or(0, |d| d.count);
            (*count > has).then(|| format!("node {n} has {has} {class} and runs {count}"))
        });
        if let Some(rule) = over {
            self.fail(rule);
        }
    }

    /// A worker is gone.
    pub fn exited(&mut self, n: usize, key: LeaseKey, now: u64, done: bool) {
        if let Some(run) = self.executions.get_mut(&(n, key)) {
            run.ended = Some((now, done));
        }
    }

    /// A machine went down, and all its workers with it.
    pub fn died(&mut self, n: usize, now: u64) {
        for run in self.executions.values_mut() {
            if run.node == n && run.ended.is_none() {
                run.ended = Some((now, false));
            }
        }
    }

    /// A result is in the scheduler's store.
    pub fn pushed(&mut self, result: Digest) {
        self.results.insert(result);
    }

    // The end.

    /// Jobs acknowledged that have not ended, by the scheduler's disk.
    pub fn open(&self) -> Vec<JobId> {
        self.accepted
            .iter()
            .filter(|job| !self.ended.contains_key(job))
            .copied()
            .collect()
    }

    /// How many jobs ended in that state.
    pub fn ended(&self, state: &str) -> u64 {
        self.ended.values().filter(|s| *s == state).count() as u64
    }

    /// Reads the whole book anew, from its first entry: with every signature, or trusting those.
    pub fn audit(&mut self, signatures: bool) {
        let mut book = Book::new(self.scheduler);
        for entry in &self.entries {
            let read = match Entry::decode(&entry.encode()) {
                Ok(read) if signatures => book.replay(&read),
                Ok(read) => book.recall(&read),
                Err(error) => {
                    self.broken.get_or_insert(format!("entry {}: {error}", entry.seq));
                    return;
                }
            };
            if let Err(error) = read {
                self.broken.get_or_insert(format!(
                    "the book read anew breaks at entry {}: {error}",
                    entry.seq
                ));
                return;
            }
        }
        if book.head() != self.book.head() || book.accounts() != self.book.accounts() {
            self.fail("the book read anew is another book".into());
        }
    }

    /// After the calm: every job is told to its end, and the money is where it belongs.
    pub fn finish(&mut self, disk: &Disk, believed: &Accounts) {
        for job in self.open() {
            self.fail(format!("{job:?} never ended"));
        }
        if *believed != self.accounts || *self.book.accounts() != self.accounts {
            self.fail("the scheduler's accounts are not those of its postings".into());
        }
        let left = self
            .accounts
            .iter()
            .find(|(account, _)| matches!(account, Account::Escrow(job) if self.ended.contains_key(job)))
            .map(|(account, balance)| format!("{account} still holds {balance} though its job has ended"));
        if let Some(rule) = left {
            self.fail(rule);
        }
        let jobs: Vec<JobId> = self
            .ended
            .keys()
            .filter(|job| !self.dropped.contains(job))
            .copied()
            .collect();
        for job in jobs {
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
            .rows("parts")
            .filter(|(key, _)| key.starts_with(&job.0.0))
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

/// Reads the key of a row in a node's table of leases.
fn lease_key(row: &[u8]) -> Option<LeaseKey> {
    let (job, rest) = row.split_at_checked(32)?;
    let (part, fence) = rest.split_at_checked(4)?;
    Some(LeaseKey {
        job: JobId(Digest::try_from(job).ok()?),
        part: PartIndex::from_be_bytes(part.try_into().ok()?),
        fence: Fence::from_be_bytes(fence.try_into().ok()?),
    })
}

fn lease_row_key(key: &LeaseKey) -> Vec<u8> {
    let mut out = key.job.0.0.to_vec();
    out.extend_from_slice(&key.part.to_be_bytes());
    out.extend_from_slice(&key.fence.to_be_bytes());
    out
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digit = |b: u8| char::from(b).to_digit(16);
    text.as_bytes()
        .chunks(2)
        .map(|pair| match pair {
            [high, low] => Some((digit(*high)? * 16 + digit(*low)?) as u8),
            _ => None,
        })
        .collect()
}
