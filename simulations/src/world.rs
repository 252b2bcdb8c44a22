//! The world: virtual time, sessions that break, offers that stray, and the storm.
use crate::{
    Failure, Summary,
    check::Checker,
    node::{NodeProcess, build_nodes},
    rng::Rng,
    scheduler::SchedulerProcess,
    setup::{Sabotage, Setup},
    workload::{User, build_users},
};
use karez_core::{
    agent,
    exchange::{ToNode, ToScheduler},
    id::{JobId, LeaseKey},
    key::{PublicKey, SchedulerId, SecretKey},
    records::{Offer, Order, Verified},
};
use std::collections::BTreeMap;

/// The most lines a trace keeps.
const TRACE_MAX: usize = 20_000;

/// A connection between a node and the scheduler, as both ends see it.
#[derive(Debug, Clone)]
pub(crate) struct Session {
    pub(crate) node: usize,
    /// Messages still arrive.
    pub(crate) up: bool,
    pub(crate) node_epoch: u64,
    pub(crate) scheduler_epoch: u64,
    /// Latest arrival planned in each direction: messages never overtake each other.
    pub(crate) to_node: u64,
    pub(crate) to_scheduler: u64,
}

/// What is due at a moment.
#[derive(Debug, Clone)]
pub(crate) enum Due {
    NodeTick {
        n: usize,
        ticket: u64,
    },
    SchedulerTick {
        ticket: u64,
    },
    ToNode {
        session: usize,
        message: Box<ToNode>,
    },
    ToScheduler {
        session: usize,
        message: Box<ToScheduler>,
    },
    /// Something that a node's own shell reports.
    Local {
        n: usize,
        epoch: u64,
        event: Box<agent::Event>,
    },
    /// A worker ends by itself, unless it was told to stop before.
    WorkerEnds {
        n: usize,
        epoch: u64,
        key: LeaseKey,
        stopped: bool,
    },
    Dial {
        n: usize,
        epoch: u64,
    },
    SessionUp {
        session: usize,
    },
    NodeLearnsBreak {
        session: usize,
    },
    SchedulerLearnsBreak {
        session: usize,
    },
    Offer {
        from: PublicKey,
        offer: Box<Verified<Offer>>,
    },
    Submit {
        user: usize,
        order: Box<Verified<Order>>,
        caller: PublicKey,
        wait: bool,
        again: bool,
    },
    Cancel {
        user: usize,
        job: JobId,
    },
    NodeBoot {
        n: usize,
    },
    SchedulerBoot,
    Heal {
        n: usize,
    },
    Fault,
    /// Time to see whether something got lost.
    Inspect,
    /// An old message comes again.
    Replay {
        n: usize,
        message: Box<ToNode>,
    },
    Calm,
    OwnerOpens {
        n: usize,
        epoch: u64,
    },
}

/// How a process dies at its next batch of effects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Crash {
    /// Before anything is stored.
    BeforeStore,
    /// With everything stored and nothing said.
    AfterStore,
    /// With everything stored and half of it said.
    Halfway,
}

/// One scheduler, its nodes, its users, and everything between them.
pub struct World {
    pub(crate) seed: u64,
    pub(crate) setup: Setup,
    pub(crate) rng: Rng,
    pub(crate) now: u64,
    serial: u64,
    queue: BTreeMap<(u64, u64), Due>,
    pub(crate) nodes: Vec<NodeProcess>,
    pub(crate) scheduler: SchedulerProcess,
    pub(crate) users: Vec<User>,
    pub(crate) sessions: Vec<Session>,
    pub(crate) checker: Checker,
    pub(crate) summary: Summary,
    pub(crate) calm: bool,
    trace: Vec<String>,
}

impl World {
    /// The world of `seed`.
    pub fn new(seed: u64, setup: Setup) -> Self {
        let mut rng = Rng::new(seed);
        let secret = SecretKey::from_bytes(&rng.bytes());
        let id = SchedulerId(PublicKey::of(&secret));
        let (nodes, truths) = build_nodes(&mut rng.fork(), &setup);
        let users = build_users(&mut rng.fork(), &setup);
        let mut world = Self {
            seed,
            checker: Checker::new(id, truths),
            scheduler: SchedulerProcess::new(secret, setup.jobs_kept),
            nodes,
            users,
            sessions: Vec::new(),
            rng,
            now: 0,
            serial: 0,
            queue: BTreeMap::new(),
            summary: Summary::default(),
            calm: false,
            trace: Vec::new(),
            setup,
        };
        world.prepare();
        world
    }

    fn prepare(&mut self) {
        self.at(0, Due::SchedulerBoot);
        for n in 0..self.nodes.len() {
            let boot = self.rng.between(10, 5_000);
            self.at(boot, Due::NodeBoot { n });
        }
        self.plan_orders();
        if self.setup.faults_per_minute > 0 {
            self.at(5_000, Due::Fault);
        }
        self.at(self.setup.storm_ms, Due::Calm);
    }

    /// Lets the storm and the calm pass.
    pub fn run(mut self) -> Result<Summary, Failure> {
        let deadline = self.setup.storm_ms + self.setup.calm_ms_max;
        let mut told_at: Option<u64> = None;
        while let Some(((at, _), due)) = self.queue.pop_first() {
            self.now = at;
            self.happen(due);
            if self.checker.broken().is_some() {
                break;
            }
            if self.calm && told_at.is_none() && self.now > self.setup.storm_ms && self.all_told() {
                self.summary.calm_ms = self.now - self.setup.storm_ms;
                told_at = Some(self.now);
            }
            // What is still under way after the last job ended: usages to settle, offers to renew.
            if told_at.is_some_and(|told| self.now > told + 120_000) || self.now > deadline {
                break;
            }
        }
        if self.checker.broken().is_none() {
            self.finish();
        }
        match self.checker.broken() {
            None => Ok(self.summarise()),
            Some(rule) => Err(Failure {
                seed: self.seed,
                rule: format!("at {} ms: {rule}", self.now),
                trace: self.trace,
            }),
        }
    }

    fn summarise(mut self) -> Summary {
        self.summary.done = self.checker.ended("done");
        self.summary.failed = self.checker.ended("failed");
        self.summary.cancelled = self.checker.ended("cancelled");
        self.summary.leases = self.checker.leases();
        self.summary.settled = self.checker.settlements();
        self.summary
    }

    fn all_told(&self) -> bool {
        self.users.iter().all(|user| user.waiting.is_empty()) && self.checker.open().is_empty()
    }

    /// Everything must be at rest now.
    fn finish(&mut self) {
        for n in 0..self.nodes.len() {
            let Some(agent) = &self.nodes[n].agent else {
                self.checker.fail(format!("node {n} is still down"));
                continue;
            };
            let held = agent.status().held;
            if let Some((_, held)) = held.first() {
                let rule = format!(
                    "after the calm node {n} still holds {} ({:?})",
                    held.key, held.phase
                );
                self.checker.fail(rule);
            }
            for table in ["leases", "readings"] {
                if self.nodes[n].disk.rows(table).next().is_some() {
                    self.checker
                        .fail(format!("after the calm the disk of node {n} still has {table}"));
                }
            }
            if !self.nodes[n].workers.is_empty() {
                self.checker
                    .fail(format!("after the calm node {n} still runs a worker"));
            }
        }
        let Some(controller) = &self.scheduler.controller else {
            return self.checker.fail("the scheduler is still down".into());
        };
        for status in controller.offers() {
            let name = &status.offer.name;
            if status.leases > 0 {
                self.checker.fail(format!(
                    "after the calm the scheduler still claims devices of {name}"
                ));
            }
            if status.offer.devices.iter().any(|d| d.free != d.count) {
                self.checker
                    .fail(format!("after the calm {name} does not offer all its devices"));
            }
        }
        if let Some(job) = controller.jobs(None, false, 1).first() {
            let parts: Vec<_> = job
                .parts
                .iter()
                .filter(|part| !part.state.ended())
                .map(|part| (part.part, part.fence, part.state, part.cause.clone()))
                .collect();
            self.checker
                .fail(format!("after the calm {:?} is still open: {parts:?}", job.id));
        }
        let accounts = controller.accounts().clone();
        self.checker.finish(&self.scheduler.disk, &accounts);
        self.checker.audit(self.seed.is_multiple_of(25));
    }

    /// Plans something.
    pub(crate) fn at(&mut self, at: u64, due: Due) {
        self.serial += 1;
        self.queue.insert((at.max(self.now), self.serial), due);
    }

    /// Plans something a while from now.
    pub(crate) fn after(&mut self, span: u64, due: Due) {
        self.at(self.now + span, due);
    }

    /// Notes a line when a trace is wanted.
    pub(crate) fn note(&mut self, line: impl FnOnce() -> String) {
        if self.setup.trace && self.trace.len() < TRACE_MAX {
            let line = format!("{:>9} {}", self.now, line());
            self.trace.push(line);
        }
    }

    pub(crate) fn sabotaged(&self, sabotage: Sabotage) -> bool {
        self.setup.sabotage == Some(sabotage)
    }

    fn happen(&mut self, due: Due) {
        match due {
            Due::NodeTick { n, ticket } => {
                if self.nodes[n].ticket == ticket && self.nodes[n].agent.is_some() {
                    self.nodes[n].tick_at = None;
                    self.node_event(n, agent::Event::Tick);
                }
            }
            Due::SchedulerTick { ticket } => {
                if self.scheduler.ticket == ticket && self.scheduler.controller.is_some() {
                    self.scheduler.tick_at = None;
                    self.scheduler_event(karez_core::controller::Event::Tick);
                }
            }
            Due::ToNode { session, message } => self.deliver_to_node(session, *message),
            Due::ToScheduler { session, message } => self.deliver_to_scheduler(session, *message),
            Due::Local { n, epoch, event } => {
                if self.nodes[n].epoch == epoch && self.nodes[n].agent.is_some() {
                    self.local_event(n, *event);
                }
            }
            Due::WorkerEnds {
                n,
                epoch,
                key,
                stopped,
            } => {
                if self.nodes[n].epoch == epoch {
                    self.worker_ends(n, key, stopped);
                }
            }
            Due::Dial { n, epoch } => self.dial(n, epoch),
            Due::SessionUp { session } => self.session_up(session),
            Due::NodeLearnsBreak { session } => self.node_learns_break(session),
            Due::SchedulerLearnsBreak { session } => self.scheduler_learns_break(session),
            Due::Offer { from, offer } => self.offer_arrives(from, *offer),
            Due::Submit {
                user,
                order,
                caller,
                wait,
                again,
            } => self.submit(user, *order, caller, wait, again),
            Due::Cancel { user, job } => self.cancel(user, job),
            Due::NodeBoot { n } => self.node_boot(n),
            Due::SchedulerBoot => self.scheduler_boot(),
            Due::Heal { n } => {
                self.note(|| format!("node {n}: the partition heals"));
                self.nodes[n].cut_until = 0;
            }
            Due::Fault => self.fault(),
            Due::Inspect => self.look_for_lost(),
            Due::Replay { n, message } => self.send_to_node(n, *message),
            Due::Calm => self.calm_down(),
            Due::OwnerOpens { n, epoch } => {
                if self.nodes[n].epoch == epoch && self.nodes[n].agent.is_some() {
                    self.node_event(n, agent::Event::Owner(agent::OwnerCommand::Open));
                }
            }
        }
    }

    // Sessions.

    fn dial(&mut self, n: usize, epoch: u64) {
        let node = &self.nodes[n];
        if node.epoch != epoch || node.agent.is_none() || node.session.is_some() {
            return;
        }
        if node.cut_until > self.now || self.scheduler.controller.is_none() {
            let pause = self.rng.between(500, 3_000);
            return self.after(pause, Due::Dial { n, epoch });
        }
        let latency = self.latency(n);
        let session = self.sessions.len();
        self.sessions.push(Session {
            node: n,
            up: true,
            node_epoch: epoch,
            scheduler_epoch: self.scheduler.epoch,
            to_node: self.now,
            to_scheduler: self.now + latency,
        });
        self.nodes[n].session = Some(session);
        self.note(|| format!("node {n}: session {session} stands"));
        self.after(latency, Due::SessionUp { session });
        let id = self.scheduler.id;
        self.node_event(n, agent::Event::Connected(id));
    }

    fn session_up(&mut self, session: usize) {
        let s = &self.sessions[session];
        if !s.up || s.scheduler_epoch != self.scheduler.epoch || self.scheduler.controller.is_none() {
            return;
        }
        let n = s.node;
        let id = self.checker.node(n).id;
        // The old session of this node, if it still seems to stand, is over: its node has dialled anew.
        if self.scheduler.sessions.insert(n, session).is_some() {
            self.scheduler_event(karez_core::controller::Event::NodeGone(id));
        }
        // The event above may have been the scheduler's last.
        if self.scheduler.sessions.get(&n) == Some(&session) {
            self.scheduler_event(karez_core::controller::Event::NodeConnected(id));
        }
    }

    /// The connection is gone; both ends find out in their own time, and what was under way is lost.
    pub(crate) fn break_session(&mut self, session: usize) {
        if !self.sessions[session].up {
            return;
        }
        self.sessions[session].up = false;
        self.summary.breaks += 1;
        let n = self.sessions[session].node;
        self.note(|| format!("node {n}: session {session} breaks"));
        let node_learns = self.rng.below(12_000);
        let scheduler_learns = self.rng.below(12_000);
        self.after(node_learns, Due::NodeLearnsBreak { session });
        self.after(scheduler_learns, Due::SchedulerLearnsBreak { session });
    }

    fn node_learns_break(&mut self, session: usize) {
        let s = self.sessions[session].clone();
        let n = s.node;
        if self.nodes[n].session != Some(session) || self.nodes[n].epoch != s.node_epoch {
            return;
        }
        self.nodes[n].session = None;
        let epoch = s.node_epoch;
        let pause = self.rng.between(50, 2_000);
        self.after(pause, Due::Dial { n, epoch });
        let id = self.scheduler.id;
        self.node_event(n, agent::Event::Disconnected(id));
    }

    fn scheduler_learns_break(&mut self, session: usize) {
        let n = self.sessions[session].node;
        if self.scheduler.sessions.get(&n) != Some(&session) {
            return;
        }
        self.scheduler.sessions.remove(&n);
        let id = self.checker.node(n).id;
        self.scheduler_event(karez_core::controller::Event::NodeGone(id));
    }

    fn latency(&mut self, n: usize) -> u64 {
        let base = self.nodes[n].latency;
        base + self.rng.below(base + 1)
    }

    pub(crate) fn send_to_node(&mut self, n: usize, message: ToNode) {
        let Some(session) = self.scheduler.sessions.get(&n).copied() else {
            return;
        };
        let latency = self.latency(n);
        let s = &mut self.sessions[session];
        if s.up {
            s.to_node = (self.now + latency).max(s.to_node + 1);
            let at = s.to_node;
            self.at(
                at,
                Due::ToNode {
                    session,
                    message: Box::new(message),
                },
            );
        }
    }

    pub(crate) fn send_to_scheduler(&mut self, n: usize, message: ToScheduler) {
        let Some(session) = self.nodes[n].session else {
            return;
        };
        let latency = self.latency(n);
        let s = &mut self.sessions[session];
        if s.up {
            s.to_scheduler = (self.now + latency).max(s.to_scheduler + 1);
            let at = s.to_scheduler;
            self.at(
                at,
                Due::ToScheduler {
                    session,
                    message: Box::new(message),
                },
            );
        }
    }

    fn deliver_to_node(&mut self, session: usize, message: ToNode) {
        let s = &self.sessions[session];
        let n = s.node;
        if s.up && s.node_epoch == self.nodes[n].epoch && self.nodes[n].agent.is_some() {
            let id = self.scheduler.id;
            self.note(|| format!("node {n} hears {}", brief_to_node(&message)));
            self.node_event(n, agent::Event::Heard(id, message));
        }
    }

    fn deliver_to_scheduler(&mut self, session: usize, message: ToScheduler) {
        let s = &self.sessions[session];
        let n = s.node;
        if s.up && self.scheduler.sessions.get(&n) == Some(&session) {
            let id = self.checker.node(n).id;
            self.note(|| format!("scheduler hears node {n}: {}", brief_to_scheduler(&message)));
            self.scheduler_event(karez_core::controller::Event::Heard(id, message));
        }
    }

    // The storm.

    fn fault(&mut self) {
        if self.calm {
            return;
        }
        let mean = 60_000 / self.setup.faults_per_minute.max(1);
        let pause = self.rng.between(1, mean * 2);
        self.after(pause, Due::Fault);
        let n = self.rng.below(self.nodes.len() as u64) as usize;
        let mode = self
            .rng
            .pick(&[Crash::BeforeStore, Crash::AfterStore, Crash::Halfway]);
        match self.rng.below(100) {
            0..=21 => self.nodes[n].crash = Some(mode),
            22..=27 => self.scheduler.crash = Some(mode),
            28..=45 => {
                if let Some(session) = self.nodes[n].session {
                    self.break_session(session);
                }
            }
            46..=60 => {
                let span = if self.rng.chance(150) {
                    self.rng.between(30_000, 120_000)
                } else {
                    self.rng.between(500, 25_000)
                };
                self.nodes[n].cut_until = self.now + span;
                self.note(|| format!("node {n}: cut off for {span} ms"));
                self.after(span, Due::Heal { n });
                if let Some(session) = self.nodes[n].session {
                    self.break_session(session);
                }
            }
            61..=80 => self.owner_acts(n),
            81..=88 => {
                let step = self.rng.between(0, 40_000) as i64 - 20_000;
                self.nodes[n].skew_ms += step;
            }
            89..=94 => self.nodes[n].slow = self.rng.between(1, 6),
            _ => {
                // Everybody loses the scheduler at once.
                for n in 0..self.nodes.len() {
                    if let Some(session) = self.nodes[n].session {
                        self.break_session(session);
                    }
                }
            }
        }
    }

    fn owner_acts(&mut self, n: usize) {
        use agent::OwnerCommand::{Drain, Pause, Reclaim};
        if self.nodes[n].agent.is_none() {
            return;
        }
        let command = self.rng.pick(&[Reclaim, Reclaim, Pause, Drain]);
        self.note(|| format!("node {n}: its owner says {command:?}"));
        let epoch = self.nodes[n].epoch;
        let span = self.rng.between(1_000, 40_000);
        self.after(span, Due::OwnerOpens { n, epoch });
        self.node_event(n, agent::Event::Owner(command));
    }

    /// Faults end here: what is cut heals, who is away comes back, and every owner lends.
    fn calm_down(&mut self) {
        self.note(|| "the storm is over".into());
        self.calm = true;
        self.scheduler.crash = None;
        for n in 0..self.nodes.len() {
            let node = &mut self.nodes[n];
            node.crash = None;
            node.cut_until = 0;
            node.slow = 1;
            node.skew_ms = node.skew_ms.clamp(-2_000, 2_000);
            if node.agent.is_some() {
                self.node_event(n, agent::Event::Owner(agent::OwnerCommand::Open));
            }
        }
        self.after(290_000, Due::Inspect);
        self.call_off_hopeless();
    }
}

fn brief_to_node(message: &ToNode) -> String {
    match message {
        ToNode::Ask(ask) => format!("ask {}", ask.key),
        ToNode::Renewed { renewals, stops, .. } => {
            format!(
                "renewed {:?}, stops {:?}",
                renewals.iter().map(|r| r.0).collect::<Vec<_>>(),
                stops
            )
        }
        ToNode::Stop { key, cause } => format!("stop {key}: {cause}"),
        ToNode::Settled { key, receipt, why } => {
            format!(
                "settled {key} for {:?} {why}",
                receipt.as_ref().map(|r| r.credits)
            )
        }
    }
}

fn brief_to_scheduler(message: &ToScheduler) -> String {
    match message {
        ToScheduler::Report(report) => {
            let held: Vec<_> = report.held.iter().map(|h| (h.key, h.phase)).collect();
            format!("report {held:?}")
        }
        ToScheduler::Granted(lease) => format!("granted {}", lease.key()),
        ToScheduler::Refused { key, why } => format!("refused {key}: {why}"),
        ToScheduler::Reading { key, reading } => format!("reading {} of {key}", reading.sequence),
        ToScheduler::Finished(f) => format!(
            "finished {} {:?} after {} ms {}",
            f.lease.key(),
            f.usage.outcome,
            f.usage.meters.device_ms.0,
            f.usage.cause
        ),
    }
}
