//! A node's process around the real agent: its clock, disk, workers, fetches and deliveries.
use crate::{
    check::{TrueDevice, TrueNode},
    disk::Disk,
    liar::Lie,
    rng::Rng,
    setup::{Sabotage, Setup},
    world::{Crash, Due, World},
};
use karez_core::{
    agent::{Agent, AgentConfig, Effect, Event, Exit, OwnerPolicy, WorkerMeters},
    artifact::{ArtifactKind, ArtifactRef},
    exchange::{FinishedLease, ToNode, ToScheduler},
    id::{Country, Digest, Institution, LeaseKey},
    key::{NodeId, PublicKey, SecretKey},
    records::{Device, Engine, Order, Verified, Work, WorkKind},
    store::Change,
    unit::{Bytes, Millis, MonoMillis, Now, Rate, Speed, UtcMillis},
};
use std::collections::BTreeMap;

/// When the world begins, on the UTC clock.
pub(crate) const EPOCH: u64 = 1_800_000_000_000;
pub(crate) const HEARTBEAT: Millis = Millis(2_000);
const OFFER_TTL: Millis = Millis(30_000);

pub(crate) const COUNTRIES: [&str; 6] = ["KE", "BR", "VN", "NP", "GH", "FR"];
pub(crate) const INSTITUTIONS: [&str; 6] = [
    "uni-nairobi",
    "usp-brazil",
    "hanoi-tech",
    "tu-kathmandu",
    "knust-ghana",
    "lyon-dc",
];
const CLASSES: [(&str, u64); 4] = [
    ("cpu/x86-64-v3", 16 << 30),
    ("cpu/aarch64", 8 << 30),
    ("cuda/NVIDIA T4", 16 << 30),
    ("cuda/NVIDIA H200", 141 << 30),
];

/// A worker that runs now.
#[derive(Debug, Clone)]
pub(crate) struct Worker {
    began: u64,
    ends: u64,
    exit: Exit,
    totals: WorkerMeters,
}

/// A node's process and its machine.
pub(crate) struct NodeProcess {
    pub(crate) config: AgentConfig,
    pub(crate) agent: Option<Agent>,
    pub(crate) disk: Disk,
    /// Counts the starts of the process; what was begun under another does not reach this one.
    pub(crate) epoch: u64,
    /// The monotonic clock at the start of the process, and when that was.
    mono_base: u64,
    booted_at: u64,
    pub(crate) skew_ms: i64,
    pub(crate) latency: u64,
    pub(crate) slow: u64,
    pub(crate) cut_until: u64,
    pub(crate) session: Option<usize>,
    pub(crate) ticket: u64,
    pub(crate) tick_at: Option<u64>,
    pub(crate) workers: BTreeMap<LeaseKey, Worker>,
    pub(crate) crash: Option<Crash>,
    pub(crate) lie: Option<Lie>,
    pub(crate) told: Vec<FinishedLease>,
    /// Handled at this very moment: a mind that asks to be woken again and again does not rest.
    spins: (u64, u32),
}

/// Machines of several countries, owners and prices, and what is true of them.
pub(crate) fn build_nodes(rng: &mut Rng, setup: &Setup) -> (Vec<NodeProcess>, Vec<TrueNode>) {
    (0..setup.nodes).map(|n| build_node(rng, setup, n)).unzip()
}

fn build_node(rng: &mut Rng, setup: &Setup, n: usize) -> (NodeProcess, TrueNode) {
    let secret = SecretKey::from_bytes(&rng.bytes());
    let at = rng.below(COUNTRIES.len() as u64) as usize;
    let country = parse::<Country>(COUNTRIES[at]);
    // Institutions mostly stay at home.
    let home = if rng.chance(200) {
        rng.pick(&INSTITUTIONS)
    } else {
        INSTITUTIONS[at]
    };
    let institution = parse::<Institution>(home);
    let mut devices = Vec::new();
    for (class, memory) in CLASSES {
        if rng.chance(450) || (devices.is_empty() && class == CLASSES[3].0) {
            devices.push(TrueDevice {
                class: class.into(),
                count: rng.between(1, 3) as u32,
                memory: Bytes(memory),
                rate: price(rng),
            });
        }
    }
    let mut speeds = BTreeMap::from([(WorkKind::Noop, 1_000_000)]);
    if rng.chance(700) {
        speeds.insert(WorkKind::Embed, rng.between(1_000_000, 20_000_000));
    }
    if rng.chance(700) {
        speeds.insert(WorkKind::Generate, rng.between(100_000, 3_000_000));
    }
    let refuses: Vec<Institution> = if rng.chance(150) {
        vec![parse(rng.pick(&INSTITUTIONS))]
    } else {
        Vec::new()
    };
    let lie = rng.chance(setup.liars_per_mille).then(|| Lie::draw(rng));
    let truth = TrueNode {
        id: NodeId(PublicKey::of(&secret)),
        institution: institution.clone(),
        country,
        devices: devices.clone(),
        speeds: speeds.clone(),
        refuses: refuses.clone(),
        honest: lie.is_none(),
    };
    let engines = speeds
        .iter()
        .map(|(work, speed)| Engine {
            name: work.as_str().into(),
            version: "1".into(),
            work: *work,
            // The probe is never quite right.
            speed: Speed(speed * rng.between(70, 130) / 100),
            method: "probe/1".into(),
        })
        .collect();
    let claimed = match setup.sabotage {
        Some(Sabotage::FalseCountry) => parse("CH"),
        _ => country,
    };
    let config = AgentConfig {
        secret,
        name: format!("node-{n}"),
        institution,
        country: claimed,
        devices: devices
            .iter()
            .map(|d| Device {
                class: d.class.clone(),
                count: match setup.sabotage {
                    Some(Sabotage::Overbook) => d.count + 2,
                    _ => d.count,
                },
                free: 0,
                memory: d.memory,
                rate: match setup.sabotage {
                    Some(Sabotage::Dearer) => Rate(d.rate.0 + 1),
                    _ => d.rate,
                },
            })
            .collect(),
        engines,
        cores: 16,
        memory: Bytes(64 << 30),
        isa: "x86-64-v3".into(),
        isolation: "landlock+seccomp".into(),
        policy: OwnerPolicy {
            institutions: Vec::new(),
            institutions_excluded: refuses,
            work: Vec::new(),
        },
        offer_ttl: OFFER_TTL,
        heartbeat: HEARTBEAT,
        reading_interval: Millis(3_000),
        reclaim_grace: Millis(4_000),
    };
    let process = NodeProcess {
        config,
        agent: None,
        disk: Disk::default(),
        epoch: 0,
        mono_base: 0,
        booted_at: 0,
        skew_ms: rng.below(20_000) as i64 - 10_000,
        latency: rng.between(1, 150),
        slow: 1,
        cut_until: 0,
        session: None,
        ticket: 0,
        tick_at: None,
        workers: BTreeMap::new(),
        crash: None,
        lie,
        told: Vec::new(),
        spins: (0, 0),
    };
    (process, truth)
}

fn price(rng: &mut Rng) -> Rate {
    if rng.chance(250) {
        Rate::FREE
    } else {
        Rate(rng.between(1, 40) * 100_000)
    }
}

pub(crate) fn parse<T: std::str::FromStr>(text: &str) -> T
where
    T::Err: std::fmt::Debug,
{
    match text.parse() {
        Ok(value) => value,
        Err(error) => panic!("{text:?} is a constant of the simulation: {error:?}"),
    }
}

impl NodeProcess {
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
        if self.nodes[n].epoch > 0 && !self.calm && self.rng.chance(250) {
            self.reprice(n);
        }
        let mono_base = self.rng.below(1_000_000_000);
        let node = &mut self.nodes[n];
        node.epoch += 1;
        node.mono_base = mono_base;
        node.booted_at = self.now;
        node.session = None;
        node.tick_at = None;
        let now = node.clock(self.now);
        if self.setup.sabotage == Some(Sabotage::ForgetFences) {
            node.disk.wipe("fences");
        }
        let stored = node.disk.read();
        match Agent::restore(node.config.clone(), now, &stored) {
            Ok(agent) => node.agent = Some(agent),
            Err(error) => {
                return self
                    .checker
                    .fail(format!("node {n} cannot read its disk: {error}"));
            }
        }
        let epoch = node.epoch;
        self.note(|| format!("node {n}: starts"));
        let pause = self.rng.between(20, 1_500);
        self.after(pause, Due::Dial { n, epoch });
        self.node_event(n, Event::Started);
        if self.calm && self.nodes[n].epoch == epoch && self.nodes[n].agent.is_some() {
            self.node_event(n, Event::Owner(karez_core::agent::OwnerCommand::Open));
        }
    }

    /// The owner asks another price from the next start on.
    fn reprice(&mut self, n: usize) {
        let rate = price(&mut self.rng);
        let class = self.nodes[n].config.devices[0].class.clone();
        self.nodes[n].config.devices[0].rate = rate;
        self.checker.reprice(n, &class, rate);
    }

    fn node_dies(&mut self, n: usize) {
        self.note(|| format!("node {n}: dies"));
        self.summary.crashes += 1;
        let node = &mut self.nodes[n];
        node.agent = None;
        node.epoch += 1;
        node.workers.clear();
        let session = node.session.take();
        self.checker.died(n, self.now);
        if let Some(session) = session {
            self.sessions[session].up = false;
            let learns = self.rng.below(8_000);
            self.after(learns, Due::SchedulerLearnsBreak { session });
        }
        let away = if self.calm || self.rng.chance(800) {
            self.rng.between(200, 15_000)
        } else {
            self.rng.between(20_000, 90_000)
        };
        // Away for longer than the storm means: until it is over.
        let back = (self.now + away).min(self.now.max(self.setup.storm_ms) + 5_000);
        self.at(back, Due::NodeBoot { n });
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
            return self.node_dies(n);
        }
        let mut rest = Vec::new();
        for effect in out {
            match effect {
                Effect::Persist(changes) => self.node_stores(n, changes),
                other => rest.push(other),
            }
        }
        if crash == Some(Crash::AfterStore) {
            return self.node_dies(n);
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
            self.node_dies(n);
        }
    }

    fn node_stores(&mut self, n: usize, mut changes: Vec<Change>) {
        if self.sabotaged(Sabotage::GrantUnstored) {
            changes.retain(|c| !matches!(c, Change::Put { table: "leases", value, .. } if value.ends_with(b"\"Granted\"}")));
        }
        for change in &changes {
            self.nodes[n].disk.apply(change);
        }
        self.checker.node_disk(n, &changes);
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
        if node
            .tick_at
            .is_none_or(|planned| planned > at || planned < self.now)
        {
            node.ticket += 1;
            node.tick_at = Some(at);
            let ticket = node.ticket;
            self.at(at, Due::NodeTick { n, ticket });
        }
    }

    fn node_effect(&mut self, n: usize, effect: Effect) {
        let epoch = self.nodes[n].epoch;
        match effect {
            Effect::Persist(_) | Effect::Forget { .. } => {}
            Effect::Log(line) => self.note(|| format!("node {n} logs: {line}")),
            Effect::Send(_, ToScheduler::Finished(_)) if self.sabotaged(Sabotage::DropFinished) => {}
            Effect::Send(_, message) => {
                self.checker.to_scheduler(n, &message);
                for message in self.as_told(n, message) {
                    self.send_to_scheduler(n, message);
                }
            }
            Effect::Fetch { key, fetch } => {
                let bytes: u64 = fetch.artifacts.iter().map(|a| a.bytes.0).sum();
                let span = self.rng.between(20, 400) + bytes / 50_000;
                let event = if !self.calm && self.rng.chance(40) {
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
                        n,
                        epoch,
                        event: Box::new(event),
                    },
                );
            }
            Effect::Start {
                key, order, items, ..
            } => self.worker_starts(n, key, &order, items),
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
                        n,
                        epoch,
                        key,
                        stopped: true,
                    },
                );
            }
            Effect::Push { key, artifact, .. } => {
                let span = self.rng.between(5, 300);
                let connected = self.nodes[n].session.is_some_and(|s| self.sessions[s].up);
                let event = if !connected || (!self.calm && self.rng.chance(60)) {
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
                        n,
                        epoch,
                        event: Box::new(event),
                    },
                );
            }
            Effect::Advertise(offer) => self.offer_leaves(n, offer),
        }
    }

    fn offer_leaves(&mut self, n: usize, offer: Verified<karez_core::records::Offer>) {
        let cut = self.nodes[n].cut_until > self.now;
        if !self.calm && (self.rng.chance(50) || (cut && self.rng.chance(700))) {
            return;
        }
        let copies = if !self.calm && self.rng.chance(50) { 2 } else { 1 };
        let from = self.nodes[n]
            .agent
            .as_ref()
            .map(|a| PublicKey::of(&a.config().secret));
        let Some(from) = from else { return };
        for _ in 0..copies {
            let mut span = self.rng.between(2, 400);
            if !self.calm && self.rng.chance(30) {
                span += self.rng.between(1_000, 20_000);
            }
            self.after(
                span,
                Due::Offer {
                    from,
                    offer: Box::new(offer.clone()),
                },
            );
        }
    }

    pub(crate) fn local_event(&mut self, n: usize, event: Event) {
        self.note(|| format!("node {n}: {}", brief(&event)));
        self.node_event(n, event);
    }

    // Workers.

    fn worker_starts(&mut self, n: usize, key: LeaseKey, order: &Order, items: u64) {
        let disk = std::mem::take(&mut self.nodes[n].disk);
        self.checker.started(n, key, self.now, &disk);
        self.nodes[n].disk = disk;
        let (span, tokens) = self.work_takes(n, order, items);
        let span = (span * self.nodes[n].slow + self.rng.between(5, 200)).max(1);
        let exit = match self.rng.below(1_000) {
            0..=29 if !self.calm => Exit::Failed {
                why: "the device fell off the bus".into(),
                retryable: true,
            },
            30..=33 if !self.calm => Exit::Failed {
                why: "line 3 is not JSON".into(),
                retryable: false,
            },
            _ => Exit::Done(result_of(&key)),
        };
        let failed = matches!(exit, Exit::Failed { .. });
        let span = if failed { span / 2 + 1 } else { span };
        let totals = WorkerMeters {
            cpu: Millis(span),
            memory_peak: Bytes(1 << 28),
            tokens_in: tokens / 2,
            tokens_out: tokens - tokens / 2,
            tokens_cached: 0,
            items,
            bytes_out: Bytes(items * 40),
        };
        let epoch = self.nodes[n].epoch;
        let worker = Worker {
            began: self.now,
            ends: self.now + span,
            exit,
            totals,
        };
        for third in 1..3 {
            let event = Event::Progress {
                key,
                meters: share(&totals, third, 3),
            };
            self.after(
                span * third / 3,
                Due::Local {
                    n,
                    epoch,
                    event: Box::new(event),
                },
            );
        }
        self.nodes[n].workers.insert(key, worker);
        self.after(
            span,
            Due::WorkerEnds {
                n,
                epoch,
                key,
                stopped: false,
            },
        );
    }

    /// How long the work truly takes on that machine, and how many tokens it is.
    fn work_takes(&self, n: usize, order: &Order, items: u64) -> (u64, u64) {
        let speed = self
            .checker
            .node(n)
            .speeds
            .get(&order.work.kind())
            .copied()
            .unwrap_or(1)
            .max(1);
        let text = order.input.bytes.0 * items / order.items / 4;
        let (fixed, tokens) = match &order.work {
            Work::Noop { millis_per_item } => return (items * u64::from(*millis_per_item), 0),
            Work::Embed { .. } => (0, text.max(items)),
            Work::Generate(g) => (0, text.max(items) + items * u64::from(g.max_tokens)),
        };
        (fixed + tokens * 1_000_000 / speed, tokens)
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
        let node = &mut self.nodes[n];
        let others: Option<FinishedLease> = None;
        let mut told = std::mem::take(&mut node.told);
        let secret = node.config.secret.clone();
        if let ToScheduler::Finished(finished) = &message
            && told.len() < 16
        {
            told.push((**finished).clone());
        }
        let stolen = if lie == Lie::Foreign {
            let from = self.rng.below(self.nodes.len() as u64) as usize;
            self.nodes[from].told.first().cloned()
        } else {
            others
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
        cpu: Millis(cut(of.cpu.0)),
        memory_peak: of.memory_peak,
        tokens_in: cut(of.tokens_in),
        tokens_out: cut(of.tokens_out),
        tokens_cached: 0,
        items: cut(of.items),
        bytes_out: Bytes(cut(of.bytes_out.0)),
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
