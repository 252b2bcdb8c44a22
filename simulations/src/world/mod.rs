//! The world: virtual time, who is in it, and what happens in which order.
//!
//! Here: the queue of what is due, the run through storm and calm, and the verdict at rest. Sessions that break are
//! in `session`, faults in `fault`, owners in `owner`; the processes are in `crate::node` and `crate::scheduler`.
mod fault;
mod owner;
mod queue;
mod session;

pub(crate) use session::Session;

use crate::{
    Failure, Summary,
    check::Checker,
    geo::Delay,
    node::NodeProcess,
    people::{User, build_nodes, build_users, parse},
    record::Recorder,
    rng::Rng,
    scheduler::SchedulerProcess,
    setup::{Sabotage, Setup},
    workload::{Handed, Planned},
};
use karez_core::{
    agent,
    exchange::{ToNode, ToScheduler},
    id::{Country, JobId, LeaseKey},
    key::{PublicKey, SchedulerId, SecretKey},
    records::{Offer, Verified},
};
use queue::Queue;
use std::collections::{BTreeMap, BTreeSet};

/// The most lines a trace keeps.
const TRACE_MAX: usize = 20_000;
/// So long after the storm users give up what no machine could ever run.
const PATIENCE_MS: u64 = 300_000;

/// What is due at a moment. Small: a world of a million nodes holds millions of them.
#[derive(Debug, Clone)]
pub(crate) enum Due {
    NodeTick {
        n: u32,
        ticket: u32,
    },
    SchedulerTick {
        s: u32,
        ticket: u32,
    },
    ToNode {
        session: u32,
        message: Box<ToNode>,
    },
    ToScheduler {
        session: u32,
        message: Box<ToScheduler>,
    },
    /// Something that a node's own shell reports.
    Local {
        n: u32,
        epoch: u32,
        event: Box<agent::Event>,
    },
    /// A worker ends by itself, unless it was told to stop before.
    WorkerEnds {
        n: u32,
        epoch: u32,
        key: Box<LeaseKey>,
        stopped: bool,
    },
    Dial {
        n: u32,
        epoch: u32,
        s: u32,
    },
    SessionUp {
        session: u32,
    },
    NodeLearnsBreak {
        session: u32,
    },
    SchedulerLearnsBreak {
        session: u32,
    },
    Offer {
        s: u32,
        offer: Box<Verified<Offer>>,
    },
    Submit(Box<Handed>),
    Cancel {
        user: u32,
        job: JobId,
    },
    /// The next job of a workload may come.
    Arrive {
        workload: u32,
    },
    NodeBoot {
        n: u32,
    },
    SchedulerBoot {
        s: u32,
    },
    Heal {
        n: u32,
    },
    Fault,
    Planned {
        fault: u32,
        over: bool,
    },
    /// Time to see whether something got lost.
    Inspect,
    /// Users give up what is hopeless.
    GiveUp,
    /// An old message comes again.
    Replay {
        n: u32,
        s: u32,
        message: Box<ToNode>,
    },
    Calm,
    /// An owner with habits comes or goes.
    Owner {
        n: u32,
    },
    OwnerOpens {
        n: u32,
        epoch: u32,
    },
    /// The owner's grace is over.
    OwnerSitsDown {
        n: u32,
        since: u64,
    },
    Pricing {
        member: u32,
    },
    Sample,
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

/// Schedulers, nodes, users, and everything between them.
pub struct World {
    pub(crate) seed: u64,
    pub(crate) setup: Setup,
    pub(crate) rng: Rng,
    pub(crate) now: u64,
    queue: Queue,
    pub(crate) nodes: Vec<NodeProcess>,
    pub(crate) schedulers: Vec<SchedulerProcess>,
    pub(crate) users: Vec<User>,
    pub(crate) sessions: Vec<Session>,
    pub(crate) checker: Checker,
    pub(crate) recorder: Recorder,
    pub(crate) summary: Summary,
    pub(crate) calm: bool,
    pub(crate) planned: Vec<Planned>,
    /// Orders whose answer is missing, of all users.
    pub(crate) unanswered: usize,
    /// Orders signed so far.
    pub(crate) nonce: u64,
    /// Countries that no message enters or leaves.
    pub(crate) dark: BTreeSet<Country>,
    /// One way between each country of the world and each scheduler.
    delays: BTreeMap<Country, Vec<Delay>>,
    /// Prices each member asks now, in percent of its first.
    pub(crate) prices: Vec<u64>,
    trace: Vec<String>,
}

impl World {
    /// The world of `seed`.
    pub fn new(seed: u64, setup: Setup) -> Self {
        let mut rng = Rng::new(seed);
        let schedulers: Vec<SchedulerProcess> = setup
            .schedulers
            .iter()
            .map(|seat| SchedulerProcess::new(SecretKey::from_bytes(&rng.bytes()), seat, &setup))
            .collect();
        let (nodes, truths) = build_nodes(&mut rng.fork(), &setup);
        let users = build_users(&mut rng.fork(), &setup);
        let ids = schedulers.iter().map(|s| s.id).collect();
        let mut delays = BTreeMap::new();
        let countries = truths
            .iter()
            .map(|t| t.country)
            .chain(users.iter().map(|u| u.country));
        for country in countries {
            delays.entry(country).or_insert_with(|| {
                let seats = setup.schedulers.iter();
                seats
                    .map(|seat| setup.links.delay(&country, &seat.country))
                    .collect()
            });
        }
        let mut world = Self {
            seed,
            recorder: Recorder::new(&setup, &truths),
            checker: Checker::new(ids, truths, setup.keep_books),
            schedulers,
            nodes,
            users,
            sessions: Vec::new(),
            rng,
            now: 0,
            queue: Queue::default(),
            summary: Summary::default(),
            calm: false,
            planned: Vec::new(),
            unanswered: 0,
            nonce: 0,
            dark: BTreeSet::new(),
            delays,
            prices: vec![100; setup.members.len()],
            trace: Vec::new(),
            setup,
        };
        world.prepare();
        world
    }

    fn prepare(&mut self) {
        for s in 0..self.schedulers.len() {
            self.at(0, Due::SchedulerBoot { s: s as u32 });
        }
        for n in 0..self.nodes.len() {
            let boot = self.rng.between(10, self.setup.boot_ms.max(10));
            self.at(boot, Due::NodeBoot { n: n as u32 });
        }
        self.plan_orders();
        self.plan_workloads();
        self.plan_faults();
        self.plan_pricing();
        if self.setup.sample_ms > 0 {
            self.at(0, Due::Sample);
        }
        self.at(self.setup.storm_ms, Due::Calm);
    }

    /// Lets the storm and the calm pass.
    pub fn run(mut self) -> Result<Summary, Failure> {
        self.pass()?;
        Ok(self.summarise())
    }

    /// As [`World::run`], with everything a report shows.
    pub fn run_recorded(mut self) -> Result<(Summary, Recorder), Failure> {
        self.pass()?;
        let summary = self.summarise();
        self.recorder.close(&self.checker);
        Ok((summary, self.recorder))
    }

    fn pass(&mut self) -> Result<(), Failure> {
        let deadline = self.setup.storm_ms + self.setup.calm_ms_max;
        let after = 4 * self.setup.timing.offer_ttl.0;
        let mut told_at: Option<u64> = None;
        while let Some((at, due)) = self.queue.pop() {
            self.now = at;
            self.happen(due);
            if self.checker.broken().is_some() {
                break;
            }
            // An order that comes once more after all were told may be a new job.
            if self.calm && self.now > self.setup.storm_ms {
                match (self.all_told(), told_at) {
                    (true, None) => {
                        self.summary.calm_ms = self.now - self.setup.storm_ms;
                        told_at = Some(self.now);
                    }
                    (false, Some(_)) => told_at = None,
                    _ => {}
                }
            }
            // What is still under way after the last job ended: usages to settle, offers to renew.
            if told_at.is_some_and(|told| self.now > told + after) || self.now > deadline {
                break;
            }
        }
        if self.checker.broken().is_none() {
            self.finish();
        }
        match self.checker.broken() {
            None => Ok(()),
            Some(rule) => Err(Failure {
                seed: self.seed,
                scenario: self.setup.name.clone(),
                rule: format!("at {} ms: {rule}", self.now),
                trace: std::mem::take(&mut self.trace),
            }),
        }
    }

    /// Lets virtual time pass up to `until`, without a verdict: for measuring.
    pub fn advance(&mut self, until: u64) -> Result<(), Failure> {
        while let Some((at, due)) = self.queue.pop_until(until) {
            self.now = at;
            self.happen(due);
            if let Some(rule) = self.checker.broken() {
                return Err(Failure {
                    seed: self.seed,
                    scenario: self.setup.name.clone(),
                    rule: format!("at {} ms: {rule}", self.now),
                    trace: Vec::new(),
                });
            }
        }
        self.now = until;
        Ok(())
    }

    /// The figures so far.
    pub fn summarise(&mut self) -> Summary {
        self.summary.done = self.checker.ended("done");
        self.summary.failed = self.checker.ended("failed");
        self.summary.cancelled = self.checker.ended("cancelled");
        self.summary.leases = self.checker.leases();
        self.summary.settled = self.checker.settlements();
        self.summary.waiting = self.queue.len() as u64;
        self.summary.clone()
    }

    fn all_told(&self) -> bool {
        self.unanswered == 0 && self.checker.open().is_empty()
    }

    /// Everything must be at rest now.
    fn finish(&mut self) {
        for n in 0..self.nodes.len() {
            let Some(agent) = &self.nodes[n].agent else {
                self.checker.fail(format!("node {n} is still down"));
                continue;
            };
            if let Some((key, phase)) = agent.status().held.first().map(|(_, h)| (h.key, h.phase)) {
                self.checker
                    .fail(format!("after the calm node {n} still holds {key} ({phase:?})"));
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
        for s in 0..self.schedulers.len() {
            self.scheduler_rests_in_peace(s);
        }
        self.checker.audit(self.seed.is_multiple_of(25));
    }

    fn scheduler_rests_in_peace(&mut self, s: usize) {
        let Some(controller) = &self.schedulers[s].controller else {
            return self.checker.fail(format!("scheduler {s} is still down"));
        };
        for status in controller.offers() {
            let name = &status.offer.name;
            if status.leases > 0 {
                self.checker.fail(format!(
                    "after the calm scheduler {s} still claims devices of {name}"
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
        self.checker.finish(s, &self.schedulers[s].disk, &accounts);
    }

    /// Plans something.
    pub(crate) fn at(&mut self, at: u64, due: Due) {
        self.queue.push(at.max(self.now), due);
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

    pub(crate) fn index_of(&self, id: &SchedulerId) -> Option<usize> {
        self.schedulers.iter().position(|s| s.id == *id)
    }

    fn happen(&mut self, due: Due) {
        match due {
            Due::NodeTick { n, ticket } => {
                let node = &mut self.nodes[n as usize];
                if node.ticket == ticket && node.agent.is_some() {
                    node.tick_at = u64::MAX;
                    self.node_event(n as usize, agent::Event::Tick);
                }
            }
            Due::SchedulerTick { s, ticket } => {
                let scheduler = &mut self.schedulers[s as usize];
                if scheduler.ticket == ticket && scheduler.controller.is_some() {
                    scheduler.tick_at = None;
                    self.scheduler_event(s as usize, karez_core::controller::Event::Tick);
                }
            }
            Due::ToNode { session, message } => self.deliver_to_node(session, *message),
            Due::ToScheduler { session, message } => self.deliver_to_scheduler(session, *message),
            Due::Local { n, epoch, event } => {
                if self.alive(n, epoch) {
                    self.local_event(n as usize, *event);
                }
            }
            Due::WorkerEnds {
                n,
                epoch,
                key,
                stopped,
            } => {
                if self.nodes[n as usize].epoch == epoch {
                    self.worker_ends(n as usize, *key, stopped);
                }
            }
            Due::Dial { n, epoch, s } => self.dial(n as usize, epoch, s as usize),
            Due::SessionUp { session } => self.session_up(session),
            Due::NodeLearnsBreak { session } => self.node_learns_break(session),
            Due::SchedulerLearnsBreak { session } => self.scheduler_learns_break(session),
            Due::Offer { s, offer } => self.offer_arrives(s as usize, *offer),
            Due::Submit(handed) => self.submit(*handed),
            Due::Cancel { user, job } => self.cancel(user as usize, job),
            Due::Arrive { workload } => self.arrive(workload as usize),
            Due::NodeBoot { n } => self.node_boot(n as usize),
            Due::SchedulerBoot { s } => self.scheduler_boot(s as usize),
            Due::Heal { n } => {
                self.note(|| format!("node {n}: the partition heals"));
                self.nodes[n as usize].cut_until = 0;
            }
            Due::Fault => self.fault(),
            Due::Planned { fault, over } => self.planned_fault(fault as usize, over),
            Due::Inspect => self.look_for_lost(),
            Due::GiveUp => self.give_up_hopeless(),
            Due::Replay { n, s, message } => self.send_to_node(n as usize, s as usize, *message),
            Due::Calm => self.calm_down(),
            Due::Owner { n } => self.owner_by_habit(n as usize),
            Due::OwnerOpens { n, epoch } => {
                if self.alive(n, epoch) {
                    self.owner_says(n as usize, agent::OwnerCommand::Open);
                }
            }
            Due::OwnerSitsDown { n, since } => self.checker.owner_sits_down(n as usize, since, self.now),
            Due::Pricing { member } => self.reprice_member(member as usize),
            Due::Sample => self.sample(),
        }
    }

    fn alive(&self, n: u32, epoch: u32) -> bool {
        let node = &self.nodes[n as usize];
        node.epoch == epoch && node.agent.is_some()
    }

    /// Faults end here: what is cut heals, who is away comes back, and every owner without habits lends.
    fn calm_down(&mut self) {
        self.note(|| "the storm is over".into());
        self.calm = true;
        self.recorder.storm_over(self.now);
        self.dark.clear();
        for s in &mut self.schedulers {
            s.crash = None;
        }
        for n in 0..self.nodes.len() {
            let node = &mut self.nodes[n];
            node.crash = None;
            node.cut_until = 0;
            node.skew_ms = node.skew_ms.clamp(-2_000, 2_000);
            if node.owner.member.is_none() {
                node.slow = 1;
            }
            if node.agent.is_some() && node.owner.habit.is_none() {
                self.owner_says(n, agent::OwnerCommand::Open);
            }
        }
        if self.setup.members.is_empty() {
            self.after(PATIENCE_MS - 10_000, Due::Inspect);
        }
        self.after(PATIENCE_MS, Due::GiveUp);
    }

    fn sample(&mut self) {
        self.recorder
            .sample(self.now, &self.checker, &self.summary, &self.prices);
        if self.now < self.setup.storm_ms || !self.all_told() {
            self.after(self.setup.sample_ms, Due::Sample);
        }
    }
}

/// Another scheduler, for orders that come to the wrong door.
pub(crate) fn stranger() -> SchedulerId {
    let secret = SecretKey::from_bytes(&[77; 32]);
    SchedulerId(PublicKey::of(&secret))
}

/// A country where no machine of any world stands.
pub(crate) fn nowhere() -> Country {
    parse("AQ")
}
