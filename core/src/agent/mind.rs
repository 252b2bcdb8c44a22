//! The agent itself: leases, readings, heartbeats, offers, and the owner's word.
use super::{AgentConfig, Effect, Event, Exit, OwnerCommand, WorkerMeters};
use crate::{
    artifact::ArtifactRef,
    exchange::{
        Fetch, FinishedLease, HELD_MAX, Held, Holder, LeaseAsk, Phase, READINGS_MAX, Refusal, Report, ToNode,
        ToScheduler,
    },
    id::{Digest, Fence, JobId, LeaseKey, PartIndex},
    key::{NodeId, PublicKey, SchedulerId},
    prelude::*,
    records::{
        Lease, MeterReading, Meters, NodeState, OFFER_CACHED_MAX, Offer, Order, Outcome, Signed, Usage,
        Verified, Work,
    },
    store::{Change, Stored, StoredError, put, read},
    unit::{Bytes, DeviceMillis, Millis, MonoMillis, Now, UtcMillis},
};
use alloc::boxed::Box;
use serde::{Deserialize, Serialize};

const LEASES: &str = "leases";
const READINGS: &str = "readings";
const FENCES: &str = "fences";
const OWNER: &str = "owner";

/// How fences are kept after their lease is over: longer than any message can linger.
const FENCE_KEPT: Millis = Millis(24 * 3_600_000);
/// The longest lease a scheduler may ask for at once.
const TTL_MAX: Millis = Millis(3_600_000);
/// Between two attempts to deliver a result or a usage.
const RETRY: Millis = Millis(5_000);
/// Between two offers, so that a burst of leases does not become a burst of offers.
const ADVERTISE_GAP: Millis = Millis(100);
/// How a guest that was called off is given time to leave.
const STOP_GRACE: Millis = Millis(2_000);
/// How the meters were taken: device time by wall clock, the rest by the kernel's account of the worker.
const METHOD: &str = "wall+rusage/1";

/// What the owner sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentStatus {
    /// Whether new leases are taken.
    pub state: NodeState,
    /// Leases held, with where they stand.
    pub held: Vec<(SchedulerId, Held)>,
    /// Schedulers with a session.
    pub connected: Vec<SchedulerId>,
    /// Sequence of the latest offer.
    pub offer_sequence: u64,
}

/// A node's mind.
pub struct Agent {
    config: AgentConfig,
    id: NodeId,
    state: NodeState,
    holdings: BTreeMap<LeaseKey, Holding>,
    fences: BTreeMap<(JobId, PartIndex), Seen>,
    sessions: BTreeMap<SchedulerId, Session>,
    cached: Vec<Digest>,
    addrs: Vec<String>,
    sequence: u64,
    advertised_at: Option<MonoMillis>,
    offer_changed: bool,
}

struct Session {
    reports: u64,
    next_report: MonoMillis,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
struct Seen {
    fence: Fence,
    at: UtcMillis,
}

/// How far a lease got, as stored. `Running` is stored before the worker starts: found after a restart it means
/// "uncertain", while `Granted` means "certainly not started".
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Stage {
    Granted,
    Running,
    Ended(Verified<Usage>),
}

#[derive(Clone, Serialize, Deserialize)]
struct Holding {
    lease: Verified<Lease>,
    order: Verified<Order>,
    holders: Vec<Holder>,
    ttl: Millis,
    stage: Stage,
    #[serde(skip)]
    readings: Vec<Verified<MeterReading>>,
    #[serde(skip)]
    live: Live,
}

/// What is known only while the process lives.
#[derive(Clone, Default)]
struct Live {
    expires: MonoMillis,
    started: MonoMillis,
    next_reading: MonoMillis,
    bytes_in: Bytes,
    worker: WorkerMeters,
    stopping: Option<(Outcome, String, bool)>,
    pushed: bool,
    pushing: bool,
    next_delivery: MonoMillis,
}

impl Holding {
    fn phase(&self) -> Phase {
        match self.stage {
            Stage::Granted if needs(&self.order).is_empty() => Phase::Granted,
            Stage::Granted => Phase::Fetching,
            Stage::Running => Phase::Running,
            Stage::Ended(_) => Phase::Finished,
        }
    }

    /// Devices held now: a lease that ended holds none.
    fn devices(&self) -> u32 {
        if matches!(self.stage, Stage::Ended(_)) {
            0
        } else {
            self.lease.devices
        }
    }

    fn device_ms(&self, now: MonoMillis) -> DeviceMillis {
        match self.stage {
            Stage::Granted => DeviceMillis::ZERO,
            _ => DeviceMillis(
                now.since(self.live.started)
                    .0
                    .saturating_mul(self.lease.devices.into()),
            ),
        }
    }

    fn meters(&self, now: MonoMillis) -> Meters {
        let w = &self.live.worker;
        let device_ms = self.device_ms(now);
        Meters {
            device_ms,
            cpu: w.cpu,
            memory_peak: w.memory_peak,
            memory_byte_seconds: w
                .memory_peak
                .0
                .saturating_mul(device_ms.0 / u64::from(self.lease.devices.max(1)))
                / 1_000,
            tokens_in: w.tokens_in,
            tokens_out: w.tokens_out,
            tokens_cached: w.tokens_cached,
            items: w.items,
            bytes_in: self.live.bytes_in,
            bytes_out: w.bytes_out,
            millijoules: None,
        }
    }
}

/// The artifacts a part needs on the node before it can start.
fn needs(order: &Order) -> Vec<ArtifactRef> {
    match &order.work {
        Work::Noop { .. } => Vec::new(),
        work => work.model().copied().into_iter().chain([order.input]).collect(),
    }
}

fn row(key: &LeaseKey) -> Vec<u8> {
    let mut out = key.job.0.0.to_vec();
    out.extend_from_slice(&key.part.to_be_bytes());
    out.extend_from_slice(&key.fence.to_be_bytes());
    out
}

fn reading_row(key: &LeaseKey, sequence: u32) -> Vec<u8> {
    let mut out = row(key);
    out.extend_from_slice(&sequence.to_be_bytes());
    out
}

fn fence_row(job: JobId, part: PartIndex) -> Vec<u8> {
    let mut out = job.0.0.to_vec();
    out.extend_from_slice(&part.to_be_bytes());
    out
}

impl Agent {
    /// The tables it keeps.
    pub const TABLES: &[&str] = &[LEASES, READINGS, FENCES, OWNER];

    /// The mind as it was when the process last lived. Follow with [`Event::Started`].
    pub fn restore(config: AgentConfig, now: Now, stored: &[Stored]) -> Result<Self, StoredError> {
        let id = NodeId(PublicKey::of(&config.secret));
        let mut agent = Self {
            config,
            id,
            state: NodeState::Open,
            holdings: BTreeMap::new(),
            fences: BTreeMap::new(),
            sessions: BTreeMap::new(),
            cached: Vec::new(),
            addrs: Vec::new(),
            sequence: 0,
            advertised_at: None,
            offer_changed: true,
        };
        let mut readings: BTreeMap<Vec<u8>, Verified<MeterReading>> = BTreeMap::new();
        for pair in stored {
            match pair.table.as_str() {
                LEASES => {
                    let mut holding: Holding = read(pair)?;
                    holding.live.expires = now.mono.after(holding.ttl);
                    // What ran before the restart cannot be measured any more, and the old clock means nothing here.
                    holding.live.started = now.mono;
                    agent.holdings.insert(holding.lease.key(), holding);
                }
                READINGS => {
                    readings.insert(pair.key.clone(), read(pair)?);
                }
                FENCES => {
                    let bad = || StoredError {
                        table: FENCES.into(),
                        key: hex::encode(&pair.key),
                        why: "bad key".into(),
                    };
                    let (job, part) = pair.key.split_at_checked(32).ok_or_else(bad)?;
                    let job = JobId(Digest::try_from(job).map_err(|_| bad())?);
                    let part = PartIndex::from_be_bytes(part.try_into().map_err(|_| bad())?);
                    agent.fences.insert((job, part), read(pair)?);
                }
                OWNER => agent.state = read(pair)?,
                _ => {}
            }
        }
        let rows: BTreeMap<Vec<u8>, LeaseKey> = agent.holdings.keys().map(|key| (row(key), *key)).collect();
        // Keys sort by lease, then by sequence, so each lease's readings arrive in order.
        for (key, reading) in readings {
            let lease = key.len().checked_sub(4).and_then(|end| rows.get(&key[..end]));
            if let Some(holding) = lease.and_then(|lease| agent.holdings.get_mut(lease)) {
                holding.readings.push(reading);
            }
        }
        Ok(agent)
    }

    /// The settings it lives by.
    pub fn config(&self) -> &AgentConfig {
        &self.config
    }

    /// What the owner sees.
    pub fn status(&self) -> AgentStatus {
        AgentStatus {
            state: self.state,
            held: self
                .holdings
                .iter()
                .map(|(key, h)| (h.lease.scheduler, held(*key, h)))
                .collect(),
            connected: self.sessions.keys().copied().collect(),
            offer_sequence: self.sequence,
        }
    }

    /// When the next [`Event::Tick`] is due at the latest.
    pub fn wake_at(&self) -> MonoMillis {
        let mut next = self.advertised_at.map_or(MonoMillis::ZERO, |at| {
            at.after(if self.offer_changed {
                ADVERTISE_GAP
            } else {
                Millis(self.config.offer_ttl.0 / 3)
            })
        });
        for session in self.sessions.values() {
            next = next.min(session.next_report);
        }
        for holding in self.holdings.values() {
            let reachable = self.sessions.contains_key(&holding.lease.scheduler);
            next = next.min(match &holding.stage {
                Stage::Granted => holding.live.expires,
                // Called off already: only its exit matters now.
                Stage::Running if holding.live.stopping.is_some() => continue,
                Stage::Running => holding
                    .live
                    .expires
                    .min(holding.live.next_reading)
                    .min(self.limit_at(holding)),
                Stage::Ended(_) if !reachable || holding.live.pushing => continue,
                Stage::Ended(_) => holding.live.next_delivery,
            });
        }
        next
    }

    fn limit_at(&self, holding: &Holding) -> MonoMillis {
        holding.live.started.after(Millis(
            holding.lease.device_ms_max.0 / u64::from(holding.lease.devices.max(1)),
        ))
    }

    /// The one entrance. Never waits; pushes what the shell must do, in order.
    pub fn handle(&mut self, now: Now, event: Event, out: &mut Vec<Effect>) {
        match event {
            Event::Started => self.on_started(now, out),
            Event::Connected(scheduler) => self.on_connected(now, scheduler, out),
            Event::Disconnected(scheduler) => {
                self.sessions.remove(&scheduler);
            }
            Event::Heard(from, message) => self.on_heard(now, from, message, out),
            Event::Fetched { key, bytes_in } => {
                if let Some(holding) = self.holdings.get_mut(&key)
                    && holding.stage == Stage::Granted
                {
                    holding.live.bytes_in = bytes_in;
                    self.start(now, key, out);
                }
            }
            Event::FetchFailed { key, why, retryable } => {
                if self.holdings.get(&key).is_some_and(|h| h.stage == Stage::Granted) {
                    self.end(now, key, Outcome::Failed, why, retryable, None, out);
                }
            }
            Event::Progress { key, meters } => {
                if let Some(holding) = self.holdings.get_mut(&key)
                    && holding.stage == Stage::Running
                {
                    holding.live.worker = meters;
                }
            }
            Event::Exited { key, exit, meters } => self.on_exited(now, key, exit, meters, out),
            Event::Pushed { key } => {
                if let Some(holding) = self.holdings.get_mut(&key) {
                    holding.live.pushing = false;
                    holding.live.pushed = true;
                    self.deliver(now, key, out);
                }
            }
            Event::PushFailed { key, why } => {
                if let Some(holding) = self.holdings.get_mut(&key) {
                    holding.live.pushing = false;
                    holding.live.next_delivery = now.mono.after(RETRY);
                    out.push(Effect::Log(format!(
                        "result of {key} could not be delivered yet: {why}"
                    )));
                }
            }
            Event::Serving { cached, addrs } => {
                self.offer_changed |= cached != self.cached || addrs != self.addrs;
                self.cached = cached;
                self.addrs = addrs;
            }
            Event::Owner(command) => self.on_owner(now, command, out),
            Event::Tick => {}
        }
        self.on_time(now, out);
    }

    fn on_started(&mut self, now: Now, out: &mut Vec<Effect>) {
        let keys: Vec<LeaseKey> = self.holdings.keys().copied().collect();
        for key in keys {
            match self.holdings[&key].stage {
                Stage::Granted => self.begin(now, key, out),
                // The worker died with the old process, perhaps before it did anything, perhaps after it did all.
                Stage::Running => {
                    let why = "the node restarted while the work ran".to_string();
                    self.end(now, key, Outcome::Failed, why, true, None, out);
                }
                Stage::Ended(_) => {}
            }
        }
    }

    fn on_connected(&mut self, now: Now, scheduler: SchedulerId, out: &mut Vec<Effect>) {
        self.sessions.insert(
            scheduler,
            Session {
                reports: 0,
                next_report: now.mono,
            },
        );
        self.report(now, scheduler, out);
        let keys: Vec<LeaseKey> = self
            .holdings
            .iter()
            .filter(|(_, h)| h.lease.scheduler == scheduler)
            .map(|(key, _)| *key)
            .collect();
        for key in keys {
            self.deliver(now, key, out);
        }
    }

    fn on_heard(&mut self, now: Now, from: SchedulerId, message: ToNode, out: &mut Vec<Effect>) {
        match message {
            ToNode::Ask(ask) => self.on_ask(now, from, *ask, out),
            ToNode::Renewed {
                sequence: _,
                renewals,
                stops,
            } => {
                for (key, _, left) in renewals {
                    if let Some(holding) = self.mine(&key, from) {
                        holding.live.expires = now.mono.after(left.min(TTL_MAX));
                    }
                }
                for (key, cause) in stops {
                    self.stop_for(now, from, key, cause, out);
                }
            }
            ToNode::Stop { key, cause } => self.stop_for(now, from, key, cause, out),
            ToNode::Settled { key, receipt, why } => {
                if self
                    .mine(&key, from)
                    .is_none_or(|h| !matches!(h.stage, Stage::Ended(_)))
                {
                    return;
                }
                match receipt {
                    Some(receipt) => {
                        out.push(Effect::Log(format!("{key} settled: {} credits", receipt.credits)))
                    }
                    None => out.push(Effect::Log(format!("{key} settled without a receipt: {why}"))),
                }
                self.forget(key, out);
            }
        }
    }

    fn mine(&mut self, key: &LeaseKey, from: SchedulerId) -> Option<&mut Holding> {
        self.holdings.get_mut(key).filter(|h| h.lease.scheduler == from)
    }

    fn stop_for(&mut self, now: Now, from: SchedulerId, key: LeaseKey, cause: String, out: &mut Vec<Effect>) {
        if self.mine(&key, from).is_some() {
            self.stop(now, key, Outcome::Cancelled, cause, false, STOP_GRACE, out);
        }
    }

    fn on_ask(&mut self, now: Now, from: SchedulerId, ask: LeaseAsk, out: &mut Vec<Effect>) {
        let key = ask.key;
        // The same ask again, after a lost answer: the same answer.
        if let Some(holding) = self.mine(&key, from) {
            let lease = holding.lease.clone();
            out.push(Effect::Send(from, ToScheduler::Granted(lease)));
            return;
        }
        if let Err(why) = self.judge(from, &ask) {
            out.push(Effect::Send(from, ToScheduler::Refused { key, why }));
            return;
        }
        // An older attempt at the same part is void from here on.
        let older: Vec<LeaseKey> = self
            .holdings
            .keys()
            .filter(|k| k.job == key.job && k.part == key.part)
            .copied()
            .collect();
        for old in older {
            self.stop(
                now,
                old,
                Outcome::Cancelled,
                "a later attempt was placed here".into(),
                false,
                STOP_GRACE,
                out,
            );
        }
        let ttl = ask.ttl.min(TTL_MAX);
        let rate = self.device(&ask.device_class).map_or(ask.rate, |d| d.rate);
        let lease = Lease {
            job: key.job,
            part: key.part,
            fence: key.fence,
            node: self.id,
            scheduler: from,
            institution: self.config.institution.clone(),
            device_class: ask.device_class,
            devices: ask.devices,
            rate,
            device_ms_max: ask.device_ms_max,
            first_item: ask.first_item,
            items: ask.items,
            granted_at: now.utc,
            expires_at: now.utc.after(ttl),
        };
        let lease = Signed::sign(lease, &self.config.secret);
        let holding = Holding {
            lease: lease.clone(),
            order: ask.order,
            holders: ask.holders,
            ttl,
            stage: Stage::Granted,
            readings: Vec::new(),
            live: Live {
                expires: now.mono.after(ttl),
                ..Live::default()
            },
        };
        let seen = Seen {
            fence: key.fence,
            at: now.utc,
        };
        self.fences.insert((key.job, key.part), seen);
        self.offer_changed = true;
        let fence = put(FENCES, &fence_row(key.job, key.part), &seen);
        if needs(&holding.order).is_empty() {
            // Nothing to fetch: the promise and the intent to start go to disk together.
            self.holdings.insert(key, holding);
            out.push(Effect::Persist(vec![fence]));
            out.push(Effect::Send(from, ToScheduler::Granted(lease)));
            self.start(now, key, out);
        } else {
            out.push(Effect::Persist(vec![put(LEASES, &row(&key), &holding), fence]));
            out.push(Effect::Send(from, ToScheduler::Granted(lease)));
            self.holdings.insert(key, holding);
            self.begin(now, key, out);
        }
    }

    fn device(&self, class: &str) -> Option<&crate::records::Device> {
        self.config.devices.iter().find(|d| d.class == class)
    }

    fn free(&self, class: &str) -> u32 {
        let held: u32 = self
            .holdings
            .values()
            .filter(|h| h.lease.device_class == class)
            .map(Holding::devices)
            .sum();
        self.device(class).map_or(0, |d| d.count.saturating_sub(held))
    }

    /// The owner's policy, and what the ask must agree with. The order is the researcher's own word; the
    /// scheduler may place it, not change it.
    fn judge(&self, from: SchedulerId, ask: &LeaseAsk) -> Result<(), Refusal> {
        let order = &ask.order;
        let mismatch = |why: &str| Err(Refusal::Mismatch { why: why.into() });
        let policy = |why: String| Err(Refusal::Policy { why });
        if order.scheduler != from {
            return mismatch("the order was given to another scheduler");
        }
        if ask.key.job.0 != order.id() {
            return mismatch("the job is not this order's");
        }
        if ask.items == 0
            || ask
                .first_item
                .checked_add(ask.items)
                .is_none_or(|end| end > order.items)
        {
            return mismatch("the part lies outside the order's items");
        }
        if ask.devices == 0 {
            return mismatch("no device is asked for");
        }
        if let Some(seen) = self.fences.get(&(ask.key.job, ask.key.part))
            && seen.fence >= ask.key.fence
        {
            return Err(Refusal::Fenced { seen: seen.fence });
        }
        match self.state {
            NodeState::Open => {}
            state => return policy(format!("the node is {}", state.as_str())),
        }
        let rules = &self.config.policy;
        if (!rules.institutions.is_empty() && !rules.institutions.contains(&order.institution))
            || rules.institutions_excluded.contains(&order.institution)
        {
            return policy(format!("users of {} are not served here", order.institution));
        }
        let kind = order.work.kind();
        if !rules.work.is_empty() && !rules.work.contains(&kind) {
            return policy(format!("{} is not served here", kind.as_str()));
        }
        if !self.config.engines.iter().any(|e| e.work == kind) {
            return Err(Refusal::Unable {
                why: format!("no engine for {}", kind.as_str()),
            });
        }
        let c = &order.constraints;
        if (!c.countries.is_empty() && !c.countries.contains(&self.config.country))
            || c.countries_excluded.contains(&self.config.country)
        {
            return mismatch("the order excludes this country");
        }
        if (!c.institutions.is_empty() && !c.institutions.contains(&self.config.institution))
            || c.institutions_excluded.contains(&self.config.institution)
        {
            return mismatch("the order excludes this institution");
        }
        let Some(device) = self.device(&ask.device_class) else {
            return Err(Refusal::Unable {
                why: format!("there is no device of class {}", ask.device_class),
            });
        };
        if ask.rate < device.rate {
            return Err(Refusal::Price { now: device.rate });
        }
        if (c.donated_only && device.rate.0 > 0) || c.rate_max.is_some_and(|max| device.rate > max) {
            return mismatch("the order's price limit excludes this device");
        }
        if self.free(&ask.device_class) < ask.devices || self.holdings.len() >= HELD_MAX {
            return Err(Refusal::Busy {
                class: ask.device_class.clone(),
            });
        }
        Ok(())
    }

    /// Fetches what the part needs, or starts it when it needs nothing.
    fn begin(&mut self, now: Now, key: LeaseKey, out: &mut Vec<Effect>) {
        let Some(holding) = self.holdings.get(&key) else {
            return;
        };
        let artifacts = needs(&holding.order);
        if artifacts.is_empty() {
            self.start(now, key, out);
        } else {
            let fetch = Fetch {
                artifacts,
                holders: holding.holders.clone(),
            };
            out.push(Effect::Fetch { key, fetch });
        }
    }

    fn start(&mut self, now: Now, key: LeaseKey, out: &mut Vec<Effect>) {
        let first_reading = self.config.reading_interval;
        let Some(holding) = self.holdings.get_mut(&key) else {
            return;
        };
        holding.stage = Stage::Running;
        holding.live.started = now.mono;
        holding.live.next_reading = now.mono.after(first_reading);
        out.push(Effect::Persist(vec![put(LEASES, &row(&key), holding)]));
        out.push(Effect::Start {
            key,
            order: holding.order.clone(),
            first_item: holding.lease.first_item,
            items: holding.lease.items,
            device_class: holding.lease.device_class.clone(),
            devices: holding.lease.devices,
        });
    }

    /// Calls a lease off: at once where nothing runs, else through its worker.
    #[allow(clippy::too_many_arguments)]
    fn stop(
        &mut self,
        now: Now,
        key: LeaseKey,
        outcome: Outcome,
        cause: String,
        retryable: bool,
        grace: Millis,
        out: &mut Vec<Effect>,
    ) {
        let Some(holding) = self.holdings.get_mut(&key) else {
            return;
        };
        match holding.stage {
            Stage::Granted => self.end(now, key, outcome, cause, retryable, None, out),
            Stage::Running if holding.live.stopping.is_none() => {
                holding.live.stopping = Some((outcome, cause, retryable));
                out.push(Effect::Stop { key, grace });
            }
            _ => {}
        }
    }

    fn on_exited(
        &mut self,
        now: Now,
        key: LeaseKey,
        exit: Exit,
        meters: WorkerMeters,
        out: &mut Vec<Effect>,
    ) {
        let Some(holding) = self.holdings.get_mut(&key) else {
            return;
        };
        if holding.stage != Stage::Running {
            return;
        }
        holding.live.worker = meters;
        let stopping = holding.live.stopping.take();
        match (exit, stopping) {
            (Exit::Done(result), _) => {
                self.end(now, key, Outcome::Done, String::new(), false, Some(result), out)
            }
            (_, Some((outcome, cause, retryable))) => {
                self.end(now, key, outcome, cause, retryable, None, out)
            }
            (Exit::Failed { why, retryable }, None) => {
                self.end(now, key, Outcome::Failed, why, retryable, None, out)
            }
            (Exit::Stopped, None) => {
                self.end(
                    now,
                    key,
                    Outcome::Failed,
                    "the worker stopped by itself".into(),
                    true,
                    None,
                    out,
                );
            }
        }
    }

    /// Signs the last reading and the usage, stores them, and begins to deliver.
    #[allow(clippy::too_many_arguments)]
    fn end(
        &mut self,
        now: Now,
        key: LeaseKey,
        outcome: Outcome,
        cause: String,
        retryable: bool,
        result: Option<ArtifactRef>,
        out: &mut Vec<Effect>,
    ) {
        let Some(holding) = self.holdings.get_mut(&key) else {
            return;
        };
        let mut changes = Vec::new();
        let meters = last_meters(holding, now);
        let reading = sign_reading(&self.config, holding, now, meters);
        changes.push(put(READINGS, &reading_row(&key, reading.sequence), &reading));
        let usage = Usage {
            lease: holding.lease.id(),
            node: self.id,
            last_reading: reading.id(),
            readings: reading.sequence + 1,
            meters,
            outcome,
            cause: one_line(&cause),
            retryable,
            result,
            started_at: holding.lease.granted_at,
            ended_at: now.utc.max(holding.lease.granted_at),
        };
        holding.readings.push(reading);
        holding.stage = Stage::Ended(Signed::sign(usage, &self.config.secret));
        changes.push(put(LEASES, &row(&key), holding));
        out.push(Effect::Persist(changes));
        self.offer_changed = true;
        self.deliver(now, key, out);
    }

    /// Brings the result, then the usage, to the scheduler; again and again until it is settled.
    fn deliver(&mut self, now: Now, key: LeaseKey, out: &mut Vec<Effect>) {
        let Some(holding) = self.holdings.get_mut(&key) else {
            return;
        };
        let Stage::Ended(usage) = &holding.stage else {
            return;
        };
        let scheduler = holding.lease.scheduler;
        if !self.sessions.contains_key(&scheduler) || holding.live.pushing {
            return;
        }
        holding.live.next_delivery = now.mono.after(RETRY);
        match usage.result {
            Some(artifact) if !holding.live.pushed => {
                holding.live.pushing = true;
                out.push(Effect::Push {
                    key,
                    to: scheduler,
                    artifact,
                });
            }
            _ => {
                let finished = FinishedLease {
                    lease: holding.lease.clone(),
                    readings: holding.readings.clone(),
                    usage: usage.clone(),
                };
                out.push(Effect::Send(scheduler, ToScheduler::Finished(Box::new(finished))));
            }
        }
    }

    fn forget(&mut self, key: LeaseKey, out: &mut Vec<Effect>) {
        let Some(holding) = self.holdings.remove(&key) else {
            return;
        };
        let mut changes = vec![Change::Delete {
            table: LEASES,
            key: row(&key),
        }];
        for reading in &holding.readings {
            changes.push(Change::Delete {
                table: READINGS,
                key: reading_row(&key, reading.sequence),
            });
        }
        out.push(Effect::Persist(changes));
        out.push(Effect::Forget { key });
    }

    fn on_owner(&mut self, now: Now, command: OwnerCommand, out: &mut Vec<Effect>) {
        let state = match command {
            OwnerCommand::Open => NodeState::Open,
            OwnerCommand::Pause => NodeState::Paused,
            OwnerCommand::Drain => NodeState::Draining,
            OwnerCommand::Reclaim => NodeState::Reclaimed,
        };
        if state != self.state {
            self.state = state;
            self.offer_changed = true;
            out.push(Effect::Persist(vec![put(OWNER, b"state", &state)]));
        }
        if command == OwnerCommand::Reclaim {
            let grace = self.config.reclaim_grace;
            let keys: Vec<LeaseKey> = self.holdings.keys().copied().collect();
            for key in keys {
                self.stop(
                    now,
                    key,
                    Outcome::Reclaimed,
                    "the owner took the machine back".into(),
                    true,
                    grace,
                    out,
                );
            }
        }
    }

    fn on_time(&mut self, now: Now, out: &mut Vec<Effect>) {
        let keys: Vec<LeaseKey> = self.holdings.keys().copied().collect();
        for key in keys {
            self.on_time_of(now, key, out);
        }
        let due: Vec<SchedulerId> = self
            .sessions
            .iter()
            .filter(|(_, s)| s.next_report <= now.mono)
            .map(|(id, _)| *id)
            .collect();
        for scheduler in due {
            self.report(now, scheduler, out);
        }
        let refresh = if self.offer_changed {
            ADVERTISE_GAP
        } else {
            Millis(self.config.offer_ttl.0 / 3)
        };
        if self.advertised_at.is_none_or(|at| now.mono >= at.after(refresh)) {
            self.advertise(now, out);
            self.prune_fences(now, out);
        }
    }

    fn on_time_of(&mut self, now: Now, key: LeaseKey, out: &mut Vec<Effect>) {
        let Some(holding) = self.holdings.get(&key) else {
            return;
        };
        match holding.stage {
            Stage::Ended(_) if holding.live.next_delivery <= now.mono => self.deliver(now, key, out),
            Stage::Ended(_) => {}
            _ if holding.live.stopping.is_some() => {}
            _ if holding.live.expires <= now.mono => {
                let why = "the lease ran out: its scheduler did not renew it".to_string();
                self.stop(now, key, Outcome::Failed, why, true, STOP_GRACE, out);
            }
            Stage::Running if self.limit_at(holding) <= now.mono => {
                let why = format!(
                    "the part's limit of {} ms of device time is used up: raise --max-cost or cut smaller parts",
                    holding.lease.device_ms_max.0
                );
                self.stop(now, key, Outcome::Failed, why, false, STOP_GRACE, out);
            }
            Stage::Running if holding.live.next_reading <= now.mono => self.take_reading(now, key, out),
            _ => {}
        }
    }

    fn take_reading(&mut self, now: Now, key: LeaseKey, out: &mut Vec<Effect>) {
        let Some(holding) = self.holdings.get_mut(&key) else {
            return;
        };
        let taken = holding.readings.len();
        // The interval doubles every 32 readings, so that a lease of any length keeps a bounded trail.
        let interval = self.config.reading_interval.0.max(1) << (taken / 32).min(20);
        holding.live.next_reading = now.mono.after(Millis(interval));
        if taken + 1 >= READINGS_MAX {
            return;
        }
        let meters = last_meters(holding, now);
        let reading = sign_reading(&self.config, holding, now, meters);
        holding.readings.push(reading.clone());
        let scheduler = holding.lease.scheduler;
        out.push(Effect::Persist(vec![put(
            READINGS,
            &reading_row(&key, reading.sequence),
            &reading,
        )]));
        out.push(Effect::Send(scheduler, ToScheduler::Reading { key, reading }));
    }

    fn report(&mut self, now: Now, scheduler: SchedulerId, out: &mut Vec<Effect>) {
        let Some(session) = self.sessions.get_mut(&scheduler) else {
            return;
        };
        session.reports += 1;
        session.next_report = now.mono.after(self.config.heartbeat);
        let held = self
            .holdings
            .iter()
            .filter(|(_, h)| h.lease.scheduler == scheduler)
            .take(HELD_MAX)
            .map(|(key, h)| held(*key, h))
            .collect();
        out.push(Effect::Send(
            scheduler,
            ToScheduler::Report(Report {
                sequence: session.reports,
                held,
            }),
        ));
    }

    fn advertise(&mut self, now: Now, out: &mut Vec<Effect>) {
        // The clock as the base keeps sequences rising over restarts without storing each.
        self.sequence = now.utc.0.max(self.sequence + 1);
        self.advertised_at = Some(now.mono);
        self.offer_changed = false;
        let c = &self.config;
        let devices = c
            .devices
            .iter()
            .map(|d| crate::records::Device {
                free: self.free(&d.class),
                ..d.clone()
            })
            .collect();
        let offer = Offer {
            node: self.id,
            name: c.name.clone(),
            institution: c.institution.clone(),
            country: c.country,
            devices,
            engines: c.engines.clone(),
            cores: c.cores,
            memory: c.memory,
            isa: c.isa.clone(),
            isolation: c.isolation.clone(),
            cached: self.cached.iter().take(OFFER_CACHED_MAX).copied().collect(),
            artifact_addrs: self.addrs.clone(),
            sequence: self.sequence,
            issued_at: now.utc,
            expires_at: now.utc.after(c.offer_ttl),
            state: self.state,
        };
        out.push(Effect::Advertise(Signed::sign(offer, &c.secret)));
    }

    fn prune_fences(&mut self, now: Now, out: &mut Vec<Effect>) {
        let old: Vec<(JobId, PartIndex)> = self
            .fences
            .iter()
            .filter(|(_, seen)| seen.at.after(FENCE_KEPT) < now.utc)
            .map(|(k, _)| *k)
            .take(256)
            .collect();
        if old.is_empty() {
            return;
        }
        let mut changes = Vec::new();
        for (job, part) in old {
            self.fences.remove(&(job, part));
            changes.push(Change::Delete {
                table: FENCES,
                key: fence_row(job, part),
            });
        }
        out.push(Effect::Persist(changes));
    }
}

fn held(key: LeaseKey, holding: &Holding) -> Held {
    let w = &holding.live.worker;
    Held {
        key,
        phase: holding.phase(),
        items_done: w.items,
        tokens: w.tokens_in.saturating_add(w.tokens_out),
    }
}

/// The meters now, never under those already signed: after a restart the live ones begin at nothing.
fn last_meters(holding: &Holding, now: Now) -> Meters {
    let live = holding.meters(now.mono);
    match holding.readings.last() {
        Some(last) if !live.grew_from(&last.meters) => last.meters,
        _ => live,
    }
}

fn sign_reading(config: &AgentConfig, holding: &Holding, now: Now, meters: Meters) -> Verified<MeterReading> {
    let reading = MeterReading {
        lease: holding.lease.id(),
        node: holding.lease.node,
        sequence: u32::try_from(holding.readings.len()).unwrap_or(u32::MAX),
        previous: holding.readings.last().map(Verified::id),
        meters,
        method: METHOD.into(),
        taken_at: now.utc,
        mono: now.mono,
    };
    Signed::sign(reading, &config.secret)
}

/// A cause fit for a record: one line, bounded, no control characters.
fn one_line(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        let c = if c.is_control() { ' ' } else { c };
        if out.len() + c.len_utf8() > 900 {
            break;
        }
        out.push(c);
    }
    out
}
