//! The agent itself: leases, readings, heartbeats, offers, and the owner's word.
use super::earned::judge;
use super::upkeep::held;
use super::{AgentConfig, Effect, EnergyMeter, Event, WorkerMeters};
use crate::{
    artifact::ArtifactRef,
    exchange::{Held, Holder, Phase, ToNode},
    id::{Digest, Fence, JobId, LeaseKey, PartIndex},
    key::{NodeId, PublicKey, SchedulerId},
    prelude::*,
    records::{Lease, MeterReading, Meters, NodeState, Order, Outcome, Usage, Verified, Work},
    store::{Stored, StoredError, read},
    unit::{Bytes, DeviceMillis, Millis, MonoMillis, Now, Portion, UtcMillis},
};
use serde::{Deserialize, Serialize};

pub(super) const LEASES: &str = "leases";
pub(super) const READINGS: &str = "readings";
pub(super) const FENCES: &str = "fences";
pub(super) const OWNER: &str = "owner";

/// How fences are kept after their lease is over: longer than any message can linger.
pub(super) const FENCE_KEPT: Millis = Millis(24 * 3_600_000);
/// The longest lease a scheduler may ask for at once.
pub(super) const TTL_MAX: Millis = Millis(3_600_000);
/// Between two attempts to deliver a result or a usage.
pub(super) const RETRY: Millis = Millis(5_000);
/// Between two offers, so that a burst of leases does not become a burst of offers.
pub(super) const ADVERTISE_GAP: Millis = Millis(100);
/// How a guest that was called off is given time to leave.
pub(super) const STOP_GRACE: Millis = Millis(2_000);

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
    pub(super) config: AgentConfig,
    pub(super) id: NodeId,
    pub(super) state: NodeState,
    pub(super) holdings: BTreeMap<LeaseKey, Holding>,
    pub(super) fences: BTreeMap<(JobId, PartIndex), Seen>,
    pub(super) sessions: BTreeMap<SchedulerId, Session>,
    pub(super) cached: Vec<Digest>,
    pub(super) addrs: Vec<String>,
    pub(super) sequence: u64,
    pub(super) advertised_at: Option<MonoMillis>,
    pub(super) offer_changed: bool,
}

pub(super) struct Session {
    pub(super) reports: u64,
    pub(super) next_report: MonoMillis,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
pub(super) struct Seen {
    pub(super) fence: Fence,
    pub(super) at: UtcMillis,
}

/// How far a lease got, as stored. `Running` is stored before the worker starts: found after a restart it means
/// "uncertain", while `Granted` means "certainly not started".
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Stage {
    Granted,
    Running,
    Ended(Verified<Usage>),
}

#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Holding {
    pub(super) lease: Verified<Lease>,
    pub(super) order: Verified<Order>,
    pub(super) holders: Vec<Holder>,
    #[serde(default)]
    pub(super) from: Option<ArtifactRef>,
    /// Of a lease over a share: which of the devices that are shared.
    #[serde(default)]
    pub(super) slot: u32,
    pub(super) ttl: Millis,
    pub(super) stage: Stage,
    #[serde(skip)]
    pub(super) readings: Vec<Verified<MeterReading>>,
    #[serde(skip)]
    pub(super) live: Live,
}

/// What is known only while the process lives.
#[derive(Clone, Default)]
pub(super) struct Live {
    pub(super) expires: MonoMillis,
    pub(super) started: MonoMillis,
    pub(super) next_reading: MonoMillis,
    pub(super) bytes_in: Bytes,
    pub(super) worker: WorkerMeters,
    pub(super) stopping: Option<(Outcome, String, bool)>,
    pub(super) pushed: bool,
    pub(super) pushing: bool,
    pub(super) next_delivery: MonoMillis,
}

impl Holding {
    pub(super) fn phase(&self) -> Phase {
        match self.stage {
            Stage::Granted if needs(&self.order, self.from).is_empty() => Phase::Granted,
            Stage::Granted => Phase::Fetching,
            Stage::Running => Phase::Running,
            Stage::Ended(_) => Phase::Finished,
        }
    }

    /// What is held now: a lease that ended holds nothing.
    pub(super) fn held(&self) -> Option<Portion> {
        (!matches!(self.stage, Stage::Ended(_))).then_some(self.lease.devices)
    }

    fn device_ms(&self, now: MonoMillis) -> DeviceMillis {
        match self.stage {
            Stage::Granted => DeviceMillis::ZERO,
            _ => self.lease.devices.time(now.since(self.live.started)),
        }
    }

    /// How the meters are read.
    pub(super) fn method(&self) -> String {
        let counted = self.live.worker.counted.method();
        let counted = match self.live.worker.memory_byte_seconds {
            Some(_) => counted.replacen("rusage", "rusage+rss", 1),
            None => counted.to_owned(),
        };
        match self.live.worker.energy.map(|e| e.by) {
            None => counted,
            Some(EnergyMeter::Rapl) => format!("rapl-share+{counted}"),
            Some(EnergyMeter::Nvml) => format!("nvml+{counted}"),
        }
    }

    pub(super) fn meters(&self, now: MonoMillis) -> Meters {
        let w = &self.live.worker;
        let device_ms = self.device_ms(now);
        Meters {
            device_ms,
            loading: self.lease.devices.time(w.loading).min(device_ms),
            cpu: w.cpu,
            memory_peak: w.memory_peak,
            // Where nobody looked on the way, what it was at most stands for what it was.
            memory_byte_seconds: w.memory_byte_seconds.unwrap_or_else(|| {
                let held = self.lease.devices.lasts(device_ms);
                w.memory_peak.0.saturating_mul(held.0) / 1_000
            }),
            tokens_in: w.tokens_in,
            tokens_out: w.tokens_out,
            tokens_cached: w.tokens_cached,
            items: w.items,
            bytes_in: self.live.bytes_in,
            bytes_out: w.bytes_out,
            millijoules: w.energy.map(|e| e.millijoules),
        }
    }
}

/// The artifacts a part needs on the node before it can start.
pub fn needs(order: &Order, from: Option<ArtifactRef>) -> Vec<ArtifactRef> {
    match &order.work {
        Work::Noop { .. } => Vec::new(),
        work => work.artifacts().chain([order.input]).chain(from).collect(),
    }
}

pub(super) fn row(key: &LeaseKey) -> Vec<u8> {
    let mut out = key.job.0.0.to_vec();
    out.extend_from_slice(&key.part.to_be_bytes());
    out.extend_from_slice(&key.fence.to_be_bytes());
    out
}

pub(super) fn reading_row(key: &LeaseKey, sequence: u32) -> Vec<u8> {
    let mut out = row(key);
    out.extend_from_slice(&sequence.to_be_bytes());
    out
}

pub(super) fn fence_row(job: JobId, part: PartIndex) -> Vec<u8> {
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

    pub(super) fn limit_at(&self, holding: &Holding) -> MonoMillis {
        let most = holding.lease.devices.lasts(holding.lease.device_ms_max);
        holding.live.started.after(most)
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
            Event::Capacity { devices, engines } => {
                self.offer_changed |= devices != self.config.devices || engines != self.config.engines;
                self.config.devices = devices;
                self.config.engines = engines;
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
            ToNode::Move { key, cause } => {
                if self.mine(&key, from).is_some() {
                    let grace = self.config.reclaim_grace;
                    self.stop(now, key, Outcome::Reclaimed, cause, true, grace, out);
                }
            }
            ToNode::Settled { key, receipt, why } => {
                if self
                    .mine(&key, from)
                    .is_none_or(|h| !matches!(h.stage, Stage::Ended(_)))
                {
                    return;
                }
                match receipt {
                    Some(receipt) => {
                        let fits = self.holdings.get(&key).map(|holding| judge(holding, &receipt));
                        out.push(Effect::Log(match fits {
                            Some(Err(why)) => {
                                format!("{key} settled, but its receipt {}: it {why}", receipt.id())
                            }
                            _ => format!("{key} settled: {} credits", receipt.credits),
                        }));
                        out.push(Effect::Keep(receipt));
                    }
                    None => out.push(Effect::Log(format!("{key} settled without a receipt: {why}"))),
                }
                self.forget(key, out);
            }
        }
    }

    pub(super) fn mine(&mut self, key: &LeaseKey, from: SchedulerId) -> Option<&mut Holding> {
        self.holdings.get_mut(key).filter(|h| h.lease.scheduler == from)
    }

    fn stop_for(&mut self, now: Now, from: SchedulerId, key: LeaseKey, cause: String, out: &mut Vec<Effect>) {
        if self.mine(&key, from).is_some() {
            self.stop(now, key, Outcome::Cancelled, cause, false, STOP_GRACE, out);
        }
    }
}
