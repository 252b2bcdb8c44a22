//! A node's process around the real agent: its clock, disk, workers, fetches and deliveries.
use crate::{
    disk::Disk,
    liar::Lie,
    people::{Owner, draw_price},
    setup::Sabotage,
    world::{Crash, Due, World},
};
use karez_core::{
    agent::{Agent, AgentConfig, Counted, Effect, Event, Exit, OwnerCommand, WorkerMeters},
    artifact::{ArtifactKind, ArtifactRef},
    controller::work_units,
    exchange::{FinishedLease, ToNode, ToScheduler},
    id::{Digest, LeaseKey},
    records::{NodeState, Order, Verified, Work},
    store::Change,
    unit::{Bytes, Millis, MonoMillis, Now, Portion, Rate, UtcMillis},
};
use std::collections::BTreeMap;

/// When the world begins, on the UTC clock: a Monday at midnight.
pub(crate) const EPOCH: u64 = 1_800_230_400_000;

/// A worker that runs now.
#[derive(Debug, Clone)]
pub(crate) struct Worker {
    began: u64,
    ends: u64,
    exit: Exit,
    totals: WorkerMeters,
    devices: Portion,
}

/// A node's process and its machine.
pub(crate) struct NodeProcess {
    /// What the owner set; the agent holds it while it lives.
    config: Option<Box<AgentConfig>>,
    pub(crate) owner: Owner,
    /// When the owner's next word is due.
    pub(crate) owner_due: u64,
    /// What its first device cost at first.
    pub(crate) first_rate: Rate,
    pub(crate) agent: Option<Box<Agent>>,
    pub(crate) disk: Disk,
    /// Counts the starts of the process; what was begun under another does not reach this one.
    pub(crate) epoch: u32,
    /// The monotonic clock at the start of the process, and when that was.
    mono_base: u64,
    booted_at: u64,
    pub(crate) skew_ms: i64,
    pub(crate) last_mile: u64,
    pub(crate) slow: u64,
    pub(crate) cut_until: u64,
    /// Of each scheduler it dials: the session, and attempts missed.
    links: Vec<(u16, Option<u32>, u8)>,
    pub(crate) ticket: u32,
    /// `u64::MAX`: no tick is planned.
    pub(crate) tick_at: u64,
    pub(crate) workers: BTreeMap<LeaseKey, Worker>,
    pub(crate) crash: Option<Crash>,
    pub(crate) lie: Option<Lie>,
    pub(crate) told: Vec<FinishedLease>,
    /// Handled at this very moment: a mind that asks to be woken again and again does not rest.
    spins: (u64, u32),
}

impl NodeProcess {
    pub(crate) fn new(config: AgentConfig, owner: Owner, lie: Option<Lie>) -> Self {
        Self {
            links: owner.schedulers.iter().map(|s| (*s as u16, None, 0)).collect(),
            owner,
            owner_due: 0,
            first_rate: config.devices[0].rate,
            config: Some(Box::new(config)),
            agent: None,
            disk: Disk::default(),
            epoch: 0,
            mono_base: 0,
            booted_at: 0,
            skew_ms: 0,
            last_mile: 0,
            slow: 1,
            cut_until: 0,
            ticket: 0,
            tick_at: u64::MAX,
            workers: BTreeMap::new(),
            crash: None,
            lie,
            told: Vec::new(),
            spins: (0, 0),
        }
    }

    /// What the owner set.
    pub(crate) fn config(&self) -> &AgentConfig {
        match (&self.agent, &self.config) {
            (Some(agent), _) => agent.config(),
            (None, Some(config)) => config,
            (None, None) => unreachable!("the settings are either the agent's or kept for the next one"),
        }
    }

    /// Its session with that scheduler.
    pub(crate) fn session(&self, s: usize) -> Option<u32> {
        self.links.iter().find(|(to, ..)| usize::from(*to) == s)?.1
    }

    pub(crate) fn set_session(&mut self, s: usize, session: Option<u32>) {
        if let Some(link) = self.links.iter_mut().find(|(to, ..)| usize::from(*to) == s) {
            link.1 = session;
            link.2 = 0;
        }
    }

    /// Counts an attempt that found nobody.
    pub(crate) fn missed_dial(&mut self, s: usize) -> u32 {
        let link = self.links.iter_mut().find(|(to, ..)| usize::from(*to) == s);
        link.map_or(0, |link| {
            link.2 = link.2.saturating_add(1);
            u32::from(link.2)
        })
    }

    pub(crate) fn sessions_now(&self) -> Vec<u32> {
        self.links.iter().filter_map(|link| link.1).collect()
    }

    /// Some lease is on its disk.
    pub(crate) fn holds_anything(&self) -> bool {
        self.disk.rows("leases").next().is_some()
    }

    pub(crate) fn clock(&self, now: u64) -> Now {
        Now {
            utc: UtcMillis((EPOCH + now).saturating_add_signed(self.skew_ms)),
            mono: MonoMillis(self.mono_base + (now - self.booted_at)),
        }
    }

    fn world_time(&self, mono: MonoMillis) -> u64 {
        self.booted_at
            .saturating_add(mono.0.saturating_sub(self.mono_base))
    }
}

impl World {
    /// The process starts: the agent is rebuilt from its disk.
    pub(crate) fn node_boot(&mut self, n: usize) {
        if self.nodes[n].agent.is_some() {
            return;
        }
        self.set_price(n);
        let mono_base = self.rng.below(1_000_000_000);
        let node = &mut self.nodes[n];
        node.epoch += 1;
        node.mono_base = mono_base;
        node.booted_at = self.now;
        node.tick_at = u64::MAX;
        for link in &mut node.links {
            (link.1, link.2) = (None, 0);
        }
        let now = node.clock(self.now);
        if self.setup.sabotage == Some(Sabotage::ForgetFences) {
            node.disk.wipe("fences");
        }
        let stored = node.disk.read();
        let Some(config) = node.config.take() else {
            return;
        };
        match Agent::restore(*config, now, &stored) {
            Ok(agent) => node.agent = Some(Box::new(agent)),
            Err(error) => {
                return self
                    .checker
                    .fail(format!("node {n} cannot read its disk: {error}"));
            }
        }
        let epoch = node.epoch;
        self.note(|| format!("node {n}: starts"));
        let state = self.nodes[n].agent.as_ref().map(|a| a.status().state);
        let lent = state == Some(NodeState::Open);
        self.recorder.lends(n, lent, self.checker.node(n));
        let wanted = state == Some(NodeState::Reclaimed);
        self.checker.owner_wants(n, wanted.then_some(self.now));
        for s in self.nodes[n].owner.schedulers.clone() {
            let pause = self.rng.between(20, 1_500);
            let (n, s) = (n as u32, s as u32);
            self.after(pause, Due::Dial { n, epoch, s });
        }
        self.node_event(n, Event::Started);
        let alive = |world: &Self| world.nodes[n].epoch == epoch && world.nodes[n].agent.is_some();
        if alive(self) {
            self.owner_at_boot(n);
        }
        if self.calm && alive(self) && self.nodes[n].owner.habit.is_none() {
            self.owner_says(n, OwnerCommand::Open);
        }
    }

    /// What the owner asks from this start on.
    fn set_price(&mut self, n: usize) {
        let rate = if self.nodes[n].owner.member.is_some() {
            self.price_wanted(n)
        } else if self.nodes[n].epoch > 0 && !self.calm && self.rng.chance(250) {
            draw_price(&mut self.rng)
        } else {
            return;
        };
        let Some(config) = &mut self.nodes[n].config else {
            return;
        };
        let dearer = u64::from(self.setup.sabotage == Some(Sabotage::Dearer));
        if config.devices[0].rate.0 != rate.0 + dearer {
            config.devices[0].rate = Rate(rate.0 + dearer);
            let class = config.devices[0].class.clone();
            self.checker.reprice(n, &class, rate);
        }
    }

    /// Power fails, for so long.
    pub(crate) fn node_dies(&mut self, n: usize, away: u64) {
        self.note(|| format!("node {n}: dies"));
        self.summary.crashes += 1;
        self.node_stops(n);
        // Away for longer than the storm means: until it is over.
        let back = (self.now + away).min(self.now.max(self.setup.storm_ms) + 5_000);
        self.at(back, Due::NodeBoot { n: n as u32 });
    }

    fn node_crashes(&mut self, n: usize) {
        let away = if self.calm || self.rng.chance(800) {
            self.rng.between(200, 15_000)
        } else {
            self.rng.between(20_000, 90_000)
        };
        self.node_dies(n, away);
    }

    /// The operator starts the process anew; nothing may run on it.
    pub(crate) fn node_restarts(&mut self, n: usize) {
        self.note(|| format!("node {n}: is started anew"));
        self.summary.restarts += 1;
        self.node_stops(n);
        let back = self.rng.between(300, 2_000);
        self.after(back, Due::NodeBoot { n: n as u32 });
    }

    fn node_stops(&mut self, n: usize) {
        let node = &mut self.nodes[n];
        if let Some(agent) = node.agent.take() {
            node.config = Some(Box::new(agent.config().clone()));
        }
        node.epoch += 1;
        let workers = std::mem::take(&mut node.workers);
        let sessions = node.sessions_now();
        let busy: u32 = workers.values().map(|w| w.devices.touched()).sum();
        self.recorder.stops(n, busy, self.checker.node(n));
        self.checker.died(n, self.now, workers.keys());
        // A word that was not stored is forgotten; the next start tells.
        self.checker.owner_wants(n, None);
        for link in &mut self.nodes[n].links {
            link.1 = None;
        }
        for session in sessions {
            self.sessions[session as usize].up = false;
            let learns = self.rng.below(8_000);
            self.after(learns, Due::SchedulerLearnsBreak { session });
        }
    }

    /// One event through the agent, its changes to disk, its effects into the world.
    pub(crate) fn node_event(&mut self, n: usize, event: Event) {
        let node = &mut self.nodes[n];
        let now = node.clock(self.now);
        let Some(agent) = &mut node.agent else { return };
        let mut out = Vec::new();
        agent.handle(now, event, &mut out);
        self.summary.events += 1;
        let wake = agent.wake_at();
        if wake <= now.mono {
            let rule = format!(
                "node {n} asks to be woken at {} when it is {}",
                wake.0, now.mono.0
            );
            return self.checker.fail(rule);
        }
        self.node_rests(n, wake);
        let crash = self.nodes[n].crash.take_if(|_| !out.is_empty());
        if crash == Some(Crash::BeforeStore) {
            return self.node_crashes(n);
        }
        let mut rest = Vec::new();
        for effect in out {
            match effect {
                Effect::Persist(changes) => self.node_stores(n, changes),
                other => rest.push(other),
            }
        }
        if crash == Some(Crash::AfterStore) {
            return self.node_crashes(n);
        }
        let said = if crash == Some(Crash::Halfway) {
            rest.len() / 2
        } else {
            rest.len()
        };
        for effect in rest.drain(..said) {
            self.node_effect(n, effect);
        }
        if crash.is_some() {
            self.node_crashes(n);
        }
    }

    fn node_stores(&mut self, n: usize, mut changes: Vec<Change>) {
        if self.sabotaged(Sabotage::GrantUnstored) {
            changes.retain(|c| !matches!(c, Change::Put { table: "leases", value, .. } if value.ends_with(b"\"Granted\"}")));
        }
        if self.sabotaged(Sabotage::Crowd) {
            changes.iter_mut().for_each(crowd);
        }
        self.checker.node_disk(n, &changes);
        for change in changes {
            self.nodes[n].disk.apply(change);
        }
    }

    /// Plans the next tick; a mind that never lets time pass is a busy loop.
    fn node_rests(&mut self, n: usize, wake: MonoMillis) {
        let late = self.rng.below(15);
        let node = &mut self.nodes[n];
        node.spins = match node.spins {
            (at, count) if at == self.now => (at, count + 1),
            _ => (self.now, 0),
        };
        if node.spins.1 > 200 {
            return self.checker.fail(format!("node {n} spins"));
        }
        let at = node.world_time(wake).max(self.now + 1) + late;
        if node.tick_at > at || node.tick_at < self.now {
            node.ticket = node.ticket.wrapping_add(1);
            node.tick_at = at;
            let ticket = node.ticket;
            self.at(at, Due::NodeTick { n: n as u32, ticket });
        }
    }

    fn node_effect(&mut self, n: usize, effect: Effect) {
        let epoch = self.nodes[n].epoch;
        let rough = self.setup.faults_per_minute > 0 && !self.calm;
        match effect {
            Effect::Persist(_) | Effect::Keep(_) | Effect::Forget { .. } => {}
            Effect::Log(line) => self.note(|| format!("node {n} logs: {line}")),
            Effect::Send(_, ToScheduler::Finished(_)) if self.sabotaged(Sabotage::DropFinished) => {}
            Effect::Send(to, message) => {
                let Some(s) = self.index_of(&to) else {
                    return self.checker.fail(format!("node {n} speaks to a stranger"));
                };
                self.checker.to_scheduler(n, &message);
                for message in self.as_told(n, message) {
                    self.send_to_scheduler(n, s, message);
                }
            }
            Effect::Fetch { key, fetch } => {
                let bytes: u64 = fetch.artifacts.iter().map(|a| a.bytes.0).sum();
                let span = self.rng.between(20, 400) + bytes / 50_000;
                let event = if rough && self.rng.chance(40) {
                    let retryable = !self.rng.chance(50);
                    Event::FetchFailed {
                        key,
                        why: "no holder answered".into(),
                        retryable,
                    }
                } else {
                    Event::Fetched {
                        key,
                        bytes_in: Bytes(bytes),
                    }
                };
                self.after(
                    span,
                    Due::Local {
                        n: n as u32,
                        epoch,
                        event: Box::new(event),
                    },
                );
            }
            Effect::Start {
                key,
                order,
                items,
                devices,
                ..
            } => self.worker_starts(n, key, &order, items, devices),
            Effect::Stop { .. } if self.sabotaged(Sabotage::IgnoreOwner) => {}
            Effect::Stop { key, grace } => {
                // Most guests leave at once, some only when they are thrown out; a few finish first.
                let span = if self.rng.chance(700) {
                    self.rng.below(300)
                } else {
                    grace.0
                };
                self.after(
                    span,
                    Due::WorkerEnds {
                        n: n as u32,
                        epoch,
                        key: Box::new(key),
                        stopped: true,
                    },
                );
            }
            Effect::Push { key, to, artifact } => {
                let span = self.rng.between(5, 300);
                let session = self.index_of(&to).and_then(|s| self.nodes[n].session(s));
                let connected = session.is_some_and(|session| self.sessions[session as usize].up);
                let event = if !connected || (rough && self.rng.chance(60)) {
                    Event::PushFailed {
                        key,
                        why: "the connection broke".into(),
                    }
                } else {
                    if !self.sabotaged(Sabotage::LoseResults) {
                        self.checker.pushed(artifact.digest);
                    }
                    Event::Pushed { key }
                };
                self.after(
                    span,
                    Due::Local {
                        n: n as u32,
                        epoch,
                        event: Box::new(event),
                    },
                );
            }
            Effect::Advertise(offer) => self.offer_leaves(n, offer),
        }
    }

    fn offer_leaves(&mut self, n: usize, offer: Verified<karez_core::records::Offer>) {
        let schedulers = self.nodes[n].links.len();
        for link in 0..schedulers {
            let s = usize::from(self.nodes[n].links[link].0);
            let rough = self.setup.faults_per_minute > 0 && !self.calm;
            if !self.path_open(n, s) || (rough && self.rng.chance(50)) {
                continue;
            }
            let copies = if rough && self.rng.chance(50) { 2 } else { 1 };
            for _ in 0..copies {
                let mut span = self.latency(n, s) + self.rng.below(100);
                if rough && self.rng.chance(30) {
                    span += self.rng.between(1_000, 20_000);
                }
                self.summary.messages += 1;
                let offer = Box::new(offer.clone());
                self.after(span, Due::Offer { s: s as u32, offer });
            }
        }
    }

    pub(crate) fn local_event(&mut self, n: usize, event: Event) {
        self.note(|| format!("node {n}: {}", brief(&event)));
        self.node_event(n, event);
    }

    // Workers.

    fn worker_starts(&mut self, n: usize, key: LeaseKey, order: &Order, items: u64, devices: Portion) {
        self.checker.started(n, key, self.now, &self.nodes[n].disk);
        self.recorder
            .starts(n, key, devices.touched(), self.now, self.checker.node(n));
        let (span, tokens) = self.work_takes(n, order, items);
        let span = (span * self.nodes[n].slow + self.rng.between(5, 200)).max(1);
        let rough = self.setup.faults_per_minute > 0 && !self.calm;
        let exit = match self.rng.below(1_000) {
            0..=29 if rough => Exit::Failed {
                why: "the device fell off the bus".into(),
                retryable: true,
            },
            30..=33 if rough => Exit::Failed {
                why: "line 3 is not JSON".into(),
                retryable: false,
            },
            _ => Exit::Done(result_of(&key)),
        };
        let failed = matches!(exit, Exit::Failed { .. });
        let span = if failed { span / 2 + 1 } else { span };
        let totals = WorkerMeters {
            loss_micro: 0,
            loading: Millis::ZERO,
            counted: Counted::Engine,
            cpu: Millis(span),
            memory_peak: Bytes(1 << 28),
            memory_byte_seconds: None,
            tokens_in: tokens / 2,
            tokens_out: tokens - tokens / 2,
            tokens_cached: 0,
            items,
            bytes_out: Bytes(items * 40),
            energy: None,
        };
        let epoch = self.nodes[n].epoch;
        let worker = Worker {
            began: self.now,
            ends: self.now + span,
            exit,
            totals,
            devices,
        };
        for third in 1..3 {
            let event = Event::Progress {
                key,
                meters: share(&totals, third, 3),
            };
            self.after(
                span * third / 3,
                Due::Local {
                    n: n as u32,
                    epoch,
                    event: Box::new(event),
                },
            );
        }
        self.nodes[n].workers.insert(key, worker);
        self.after(
            span,
            Due::WorkerEnds {
                n: n as u32,
                epoch,
                key: Box::new(key),
                stopped: false,
            },
        );
    }

    /// How long the work truly takes on that machine, and how many tokens it is.
    fn work_takes(&self, n: usize, order: &Order, items: u64) -> (u64, u64) {
        let speed = self.checker.node(n).speed(order.work.kind()).unwrap_or(1).max(1);
        let text = order.input.bytes.0 * items / order.items / 4;
        let (fixed, tokens) = match &order.work {
            Work::Noop { millis_per_item } => return (items * u64::from(*millis_per_item), 0),
            Work::Embed { .. } => (0, text.max(items)),
            Work::Generate(g) => (0, text.max(items) + items * u64::from(g.max_tokens)),
            Work::Train(t) => (0, items * u64::from(t.tokens_per_step)),
        };
        (
            fixed + work_units(&order.work, tokens) * 1_000_000 / speed,
            tokens,
        )
    }

    pub(crate) fn worker_ends(&mut self, n: usize, key: LeaseKey, stopped: bool) {
        let Some(worker) = self.nodes[n].workers.get(&key) else {
            return;
        };
        let finished = worker.ends <= self.now;
        if !stopped && !finished {
            return;
        }
        let Some(worker) = self.nodes[n].workers.remove(&key) else {
            return;
        };
        self.recorder
            .ends(n, worker.devices.touched(), self.checker.node(n));
        let used = worker.devices.time(Millis(self.now - worker.began));
        self.recorder.used(used.0);
        let exit = if finished { worker.exit } else { Exit::Stopped };
        let meters = if finished {
            worker.totals
        } else {
            let span = (worker.ends - worker.began).max(1);
            share(&worker.totals, self.now - worker.began, span)
        };
        self.checker
            .exited(n, key, self.now, matches!(exit, Exit::Done(_)));
        self.local_event(n, Event::Exited { key, exit, meters });
    }

    /// What really leaves the machine: honest nodes say what their agent says.
    fn as_told(&mut self, n: usize, message: ToScheduler) -> Vec<ToScheduler> {
        let Some(lie) = self.nodes[n].lie else {
            return vec![message];
        };
        let secret = self.nodes[n].config().secret.clone();
        let mut told = std::mem::take(&mut self.nodes[n].told);
        if let ToScheduler::Finished(finished) = &message
            && told.len() < 16
        {
            told.push((**finished).clone());
        }
        let stolen = if lie == Lie::Foreign {
            let from = self.rng.below(self.nodes.len() as u64) as usize;
            self.nodes[from].told.first().cloned()
        } else {
            None
        };
        let out = lie.tell(&mut self.rng, &secret, message, &told, stolen);
        self.nodes[n].told = told;
        out
    }

    /// Messages to a node pass here, where a broken promise may swallow them.
    pub(crate) fn to_node_allowed(&self, message: &ToNode) -> bool {
        !(self.sabotaged(Sabotage::DropSettled) && matches!(message, ToNode::Settled { .. }))
    }
}

/// A promise of a share becomes one of the first device that is shared.
fn crowd(change: &mut Change) {
    let Change::Put {
        table: "leases",
        value,
        ..
    } = change
    else {
        return;
    };
    if let Ok(mut row) = serde_json::from_slice::<serde_json::Value>(value) {
        row["slot"] = 0.into();
        *value = row.to_string().into_bytes();
    }
}

/// Every attempt has a result of its own: it can be told from which run it is.
fn result_of(key: &LeaseKey) -> ArtifactRef {
    ArtifactRef {
        digest: Digest::of(key.to_string().as_bytes()),
        bytes: Bytes(100),
        kind: ArtifactKind::Blob,
    }
}

fn share(of: &WorkerMeters, part: u64, whole: u64) -> WorkerMeters {
    let cut = |value: u64| value * part / whole;
    WorkerMeters {
        loss_micro: 0,
        loading: Millis(cut(of.loading.0)),
        counted: of.counted,
        cpu: Millis(cut(of.cpu.0)),
        memory_peak: of.memory_peak,
        memory_byte_seconds: None,
        tokens_in: cut(of.tokens_in),
        tokens_out: cut(of.tokens_out),
        tokens_cached: 0,
        items: cut(of.items),
        bytes_out: Bytes(cut(of.bytes_out.0)),
        energy: None,
    }
}

fn brief(event: &Event) -> String {
    match event {
        Event::Exited { key, exit, .. } => format!("worker of {key} exits: {exit:?}"),
        Event::Fetched { key, .. } => format!("fetched for {key}"),
        Event::Progress { key, meters } => format!("progress of {key}: {} items", meters.items),
        other => format!("{other:?}"),
    }
}
