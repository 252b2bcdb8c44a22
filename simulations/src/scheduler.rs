//! The scheduler's process around the real controller: its clock, its disk, its book, its answers.
use crate::{
    disk::Disk,
    node::EPOCH,
    setup::{Sabotage, Seat, Setup},
    workload::Handed,
    world::{Crash, Due, World},
};
use karez_core::{
    controller::{
        Admission, Controller, ControllerConfig, Denial, Effect, Event, JobState, Member, Reply, RequestId,
    },
    exchange::ToNode,
    id::{Country, JobId},
    key::{PublicKey, SchedulerId, SecretKey},
    money::PostingKind,
    records::{Offer, Role, Verified},
    store::Change,
    unit::{Credits, Millis, MonoMillis, Now, UtcMillis},
};
use std::collections::{BTreeMap, HashMap};

/// Who waits for which answer.
#[derive(Debug, Clone)]
pub(crate) enum Asked {
    Nobody,
    Submit { user: usize, job: JobId },
    Cancel { user: usize, job: JobId },
}

/// The scheduler's process.
pub(crate) struct SchedulerProcess {
    pub(crate) id: SchedulerId,
    pub(crate) country: Country,
    config: ControllerConfig,
    pub(crate) controller: Option<Controller>,
    pub(crate) disk: Disk,
    pub(crate) epoch: u32,
    mono_base: u64,
    booted_at: u64,
    pub(crate) ticket: u32,
    pub(crate) tick_at: Option<u64>,
    pub(crate) sessions: HashMap<u32, u32>,
    pub(crate) crash: Option<Crash>,
    asked: BTreeMap<RequestId, Asked>,
    requests: u64,
    spins: (u64, u32),
}

impl SchedulerProcess {
    pub(crate) fn new(secret: SecretKey, seat: &Seat, setup: &Setup) -> Self {
        let timing = setup.timing;
        // A listed world asks more of a scheduler than a handful of people in a storm.
        let (open, open_user) = if setup.members.is_empty() {
            (1_000, 100)
        } else {
            (1_000_000, 1_000_000)
        };
        let config = ControllerConfig {
            secret,
            name: seat.name.clone(),
            artifact_addrs: vec!["192.0.2.1:4433".into()],
            admission: Admission::Invited,
            heartbeat: timing.heartbeat,
            lease_ttl: timing.lease_ttl,
            reconnect_grace: timing.reconnect_grace,
            ask_timeout: timing.ask_timeout,
            jobs_open_max: open,
            jobs_open_user_max: open_user,
            jobs_kept: setup.jobs_kept,
            device_time_max: Millis(24 * 3_600_000),
            dispute_window: karez_core::records::DISPUTE_WINDOW,
            policy: setup.policy.clone(),
            shares: setup.shares.clone(),
        };
        Self {
            id: config.id(),
            country: seat.country,
            config,
            controller: None,
            disk: Disk::default(),
            epoch: 0,
            mono_base: 0,
            booted_at: 0,
            ticket: 0,
            tick_at: None,
            sessions: HashMap::new(),
            crash: None,
            asked: BTreeMap::new(),
            requests: 0,
            spins: (0, 0),
        }
    }

    pub(crate) fn clock(&self, now: u64) -> Now {
        Now {
            utc: UtcMillis(EPOCH + now),
            mono: MonoMillis(self.mono_base + (now - self.booted_at)),
        }
    }
}

impl World {
    pub(crate) fn scheduler_boot(&mut self, s: usize) {
        if self.schedulers[s].controller.is_some() {
            return;
        }
        let mono_base = self.rng.below(1_000_000_000);
        let accounts = self.checker.book(s).accounts().clone();
        let at = &mut self.schedulers[s];
        let first = at.epoch == 0;
        at.epoch += 1;
        at.mono_base = mono_base;
        at.booted_at = self.now;
        at.tick_at = None;
        at.sessions.clear();
        at.asked.clear();
        let now = at.clock(self.now);
        match Controller::restore(at.config.clone(), now, &at.disk.read(), accounts) {
            Ok(controller) => at.controller = Some(controller),
            Err(error) => {
                return self
                    .checker
                    .fail(format!("scheduler {s} cannot read its disk: {error}"));
            }
        }
        self.note(|| format!("scheduler {s}: starts"));
        self.scheduler_event(s, Event::Started);
        if first {
            self.admit_all(s);
        }
    }

    fn admit_all(&mut self, s: usize) {
        for n in 0..self.nodes.len() {
            if !self.nodes[n].owner.schedulers.contains(&s) {
                continue;
            }
            let node = self.checker.node(n);
            let (key, institution) = (node.id.0, node.institution.clone());
            let name = self.nodes[n].config().name.clone();
            self.admit(s, key, Role::Node, institution, name, Credits::ZERO);
        }
        for u in 0..self.users.len() {
            let user = &self.users[u];
            if !user.schedulers.contains(&s) {
                continue;
            }
            let (key, credits) = (PublicKey::of(&user.secret), user.budget);
            let (institution, name) = (user.institution.clone(), format!("user-{u}"));
            self.admit(s, key, Role::User, institution, name, credits);
        }
    }

    fn admit(
        &mut self,
        s: usize,
        key: PublicKey,
        role: Role,
        institution: karez_core::id::Institution,
        name: String,
        credits: Credits,
    ) {
        let request = self.ask(s, Asked::Nobody);
        let member = Member {
            role,
            institution,
            name,
            since: UtcMillis(EPOCH),
        };
        let event = Event::Admit {
            request,
            key,
            member,
            credits,
        };
        self.scheduler_event(s, event);
    }

    fn ask(&mut self, s: usize, asked: Asked) -> RequestId {
        let at = &mut self.schedulers[s];
        at.requests += 1;
        let request = RequestId(at.requests);
        at.asked.insert(request, asked);
        request
    }

    fn scheduler_crashes(&mut self, s: usize) {
        let away = if self.rng.chance(800) {
            self.rng.between(200, 8_000)
        } else {
            self.rng.between(15_000, 40_000)
        };
        self.scheduler_dies(s, away);
    }

    /// The process is gone, for so long.
    pub(crate) fn scheduler_dies(&mut self, s: usize, away: u64) {
        self.note(|| format!("scheduler {s}: dies"));
        self.summary.crashes += 1;
        let at = &mut self.schedulers[s];
        at.controller = None;
        self.checker.scheduler_died(s);
        let at = &mut self.schedulers[s];
        at.epoch += 1;
        at.sessions.clear();
        at.asked.clear();
        let epoch = at.epoch;
        // Those that stand, and those on their way up.
        for session in 0..self.sessions.len() {
            let of = self.sessions[session];
            if usize::from(of.scheduler) != s || of.scheduler_epoch >= epoch {
                continue;
            }
            let known = self.nodes[of.node as usize].session(s) == Some(session as u32);
            self.sessions[session].up = false;
            if known {
                let learns = self.rng.below(6_000);
                let session = session as u32;
                self.after(learns, Due::NodeLearnsBreak { session });
            }
        }
        self.after(away, Due::SchedulerBoot { s: s as u32 });
    }

    /// One event through the controller, its changes to disk and book, its effects into the world.
    pub(crate) fn scheduler_event(&mut self, s: usize, event: Event) {
        let at = &mut self.schedulers[s];
        let now = at.clock(self.now);
        let Some(controller) = &mut at.controller else {
            return;
        };
        let mut out = Vec::new();
        controller.handle(now, event, &mut out);
        self.summary.events += 1;
        let wake = controller.wake_at();
        if wake <= now.mono {
            let rule = format!(
                "scheduler {s} asks to be woken at {} when it is {}",
                wake.0, now.mono.0
            );
            return self.checker.fail(rule);
        }
        self.scheduler_rests(s, wake);
        let crash = self.schedulers[s].crash.take_if(|_| !out.is_empty());
        if crash == Some(Crash::BeforeStore) {
            return self.scheduler_crashes(s);
        }
        let mut rest = Vec::new();
        for effect in out {
            match effect {
                Effect::Persist(changes) => self.scheduler_stores(s, changes),
                other => rest.push(other),
            }
        }
        if crash == Some(Crash::AfterStore) {
            return self.scheduler_crashes(s);
        }
        let said = if crash == Some(Crash::Halfway) {
            rest.len() / 2
        } else {
            rest.len()
        };
        for effect in rest.drain(..said) {
            self.scheduler_effect(s, effect);
        }
        if crash.is_some() {
            self.scheduler_crashes(s);
        }
    }

    fn scheduler_stores(&mut self, s: usize, mut changes: Vec<Change>) {
        if self.sabotaged(Sabotage::AcceptUnstored) {
            changes.retain(|c| !matches!(c, Change::Put { table: "jobs", .. }));
        }
        for change in &mut changes {
            if let Change::Post { posting, .. } = change
                && posting.kind == PostingKind::Settle
            {
                match self.setup.sabotage {
                    Some(Sabotage::Overcharge) => {
                        posting.legs[0].1 -= 1;
                        posting.legs[1].1 += 1;
                    }
                    Some(Sabotage::Mint) => posting.legs[1].1 += 1,
                    _ => {}
                }
            }
        }
        self.checker.scheduler_disk(s, &changes);
        for job in std::mem::take(&mut self.checker.newly_done) {
            self.recorder.done(job, self.now);
        }
        if self.sabotaged(Sabotage::BillTwice) {
            let again: Vec<Change> = changes
                .iter()
                .filter(|c| matches!(c, Change::Post { posting, .. } if posting.kind == PostingKind::Settle))
                .cloned()
                .collect();
            self.checker.scheduler_disk(s, &again);
        }
        for change in changes {
            self.schedulers[s].disk.apply(change);
        }
    }

    fn scheduler_rests(&mut self, s: usize, wake: MonoMillis) {
        let late = self.rng.below(15);
        let at = &mut self.schedulers[s];
        at.spins = match at.spins {
            (then, count) if then == self.now => (then, count + 1),
            _ => (self.now, 0),
        };
        // Admitting everybody and hearing all of a large world's nodes takes no time here.
        if at.spins.1 > 2_000 + 4 * (self.nodes.len() + self.users.len()) as u32 {
            return self.checker.fail(format!("scheduler {s} spins"));
        }
        if wake.0 == u64::MAX {
            return;
        }
        let due = at.booted_at + (wake.0 - at.mono_base).max(1) + late;
        if at
            .tick_at
            .is_none_or(|planned| planned > due || planned < self.now)
        {
            at.ticket = at.ticket.wrapping_add(1);
            at.tick_at = Some(due);
            let ticket = at.ticket;
            self.at(due, Due::SchedulerTick { s: s as u32, ticket });
        }
    }

    fn scheduler_effect(&mut self, s: usize, effect: Effect) {
        match effect {
            Effect::Persist(_) | Effect::Changed(_) => {}
            Effect::Log(line) => self.note(|| format!("scheduler {s} logs: {line}")),
            Effect::Send(node, message) => self.scheduler_says(s, node, message),
            Effect::Reply(request, reply) => self.answered(s, request, reply),
        }
    }

    fn scheduler_says(&mut self, s: usize, node: karez_core::key::NodeId, message: ToNode) {
        if self.sabotaged(Sabotage::SplitGang)
            && let ToNode::Ask(ask) = &message
            && ask.order.constraints.together
            && ask.key.part % 2 == 1
        {
            return;
        }
        self.checker.clock(self.now);
        self.checker.to_node(s, node, &message);
        if self.sabotaged(Sabotage::MoveAll)
            && let ToNode::Renewed { renewals, .. } = &message
        {
            for (key, ..) in renewals.clone() {
                let cause = "for no reason".into();
                self.scheduler_says(s, node, ToNode::Move { key, cause });
            }
        }
        if !self.to_node_allowed(&message) {
            return;
        }
        let Some(n) = self.checker.index_of(&node) else {
            return self.checker.fail(format!("{node:?} is no node of this world"));
        };
        if let ToNode::Ask(_) = &message {
            match self.setup.sabotage {
                Some(Sabotage::AskTwice) => {
                    let other = (n + 1) % self.nodes.len();
                    self.send_to_node(other, s, message.clone());
                }
                Some(Sabotage::CrossTalk) => {
                    let other = (s + 1) % self.schedulers.len();
                    self.send_to_node(n, other, message.clone());
                }
                Some(Sabotage::ForgetFences | Sabotage::ReplayAsks) => {
                    for later in [15_000, 40_000] {
                        let span = self.rng.between(1_000, later);
                        let message = Box::new(message.clone());
                        let (n, s) = (n as u32, s as u32);
                        self.after(span, Due::Replay { n, s, message });
                    }
                }
                _ => {}
            }
        }
        self.send_to_node(n, s, message);
    }

    fn answered(&mut self, s: usize, request: RequestId, reply: Reply) {
        let Some(asked) = self.schedulers[s].asked.remove(&request) else {
            return self.checker.fail(format!("{request:?} was answered twice"));
        };
        match (asked, reply) {
            (Asked::Nobody, _) => {}
            (Asked::Submit { user, job }, Reply::Submitted(id)) => {
                if id != job {
                    self.checker.fail(format!("{job:?} was acknowledged as {id:?}"));
                }
                self.checker.accepted(s, job, &self.schedulers[s].disk);
                self.is_answered(user, &job);
                self.summary.jobs += 1;
            }
            (Asked::Submit { user, job }, Reply::Refused(denial)) => {
                self.note(|| format!("scheduler {s} refuses {job:?}: {denial}"));
                // Another scheduler, to which it was given, may know it.
                if self.checker.scheduler_of(&job) == Some(s) {
                    self.checker.refused(job, &self.schedulers[s].disk);
                }
                if let Denial::Ledger(error) = denial {
                    self.checker.fail(format!("{job:?}: the ledger refuses: {error}"));
                }
                self.is_answered(user, &job);
                self.summary.refused += 1;
            }
            (Asked::Cancel { user, job }, Reply::Cancelled(_) | Reply::Refused(Denial::NoJob(_))) => {
                self.users[user].cancelling.remove(&job);
            }
            (asked, reply) => self.checker.fail(format!("{asked:?} was answered {reply:?}")),
        }
    }

    fn is_answered(&mut self, user: usize, job: &JobId) {
        if self.users[user].waiting.remove(job) {
            self.unanswered -= 1;
        }
    }

    pub(crate) fn offer_arrives(&mut self, s: usize, offer: Verified<Offer>) {
        if self.schedulers[s].controller.is_some() {
            let request = self.ask(s, Asked::Nobody);
            let from = offer.node.0;
            self.scheduler_event(s, Event::Offer { request, from, offer });
        }
    }

    /// A user hands an order in, and again until there is an answer.
    pub(crate) fn submit(&mut self, mut handed: Handed) {
        let (user, s) = (handed.user, handed.scheduler);
        let job = JobId(handed.order.id());
        if handed.again && !self.users[user].waiting.contains(&job) {
            return;
        }
        if self.users[user].waiting.insert(job) {
            self.unanswered += 1;
        }
        let pause = self.rng.between(2_000, 6_000);
        handed.again = true;
        self.after(pause, Due::Submit(Box::new(handed.clone())));
        if self.schedulers[s].controller.is_none() || !self.light_between(self.users[user].country, s) {
            return;
        }
        self.note(|| {
            format!(
                "user {user} submits {job:?} to scheduler {s}: {:?}, {} items",
                handed.order.work.kind(),
                handed.order.items
            )
        });
        let request = self.ask(s, Asked::Submit { user, job });
        let event = Event::Submit {
            request,
            caller: handed.caller,
            order: handed.order,
            label: "a job".into(),
            wait: handed.wait,
        };
        self.scheduler_event(s, event);
    }

    /// A user calls a job off, and again until there is an answer.
    pub(crate) fn cancel(&mut self, user: usize, job: JobId) {
        let pause = self.rng.between(2_000, 6_000);
        let again = Due::Cancel {
            user: user as u32,
            job,
        };
        if self.users[user].waiting.contains(&job) {
            // The answer to the submit is still missing.
            return self.after(pause, again);
        }
        let Some(s) = self.checker.scheduler_of(&job) else {
            return;
        };
        self.users[user].cancelling.insert(job);
        if self.schedulers[s].controller.is_some() && self.light_between(self.users[user].country, s) {
            self.note(|| format!("user {user} cancels {job:?}"));
            let request = self.ask(s, Asked::Cancel { user, job });
            let caller = PublicKey::of(&self.users[user].secret);
            self.scheduler_event(s, Event::Cancel { request, caller, job });
        }
        if self.users[user].cancelling.contains(&job) {
            self.after(pause, again);
        }
    }

    /// What no machine of this world can ever run waits for ever: its users give it up. Prices and probes change,
    /// so what depends on them is given up as well.
    pub(crate) fn give_up_hopeless(&mut self) {
        let hopeless: Vec<JobId> = self
            .checker
            .open()
            .iter()
            .filter(|job| {
                self.checker.order(job).is_some_and(|order| {
                    let c = &order.constraints;
                    let listed = !self.setup.members.is_empty();
                    let tight = !listed && order.credits_max < Credits(5 * Credits::ONE.0);
                    let priced = c.rate_max.is_some() || (c.donated_only && !listed);
                    tight || priced || !self.has_room(order)
                })
            })
            .copied()
            .collect();
        for job in hopeless {
            let owner = self.checker.order(&job).map(|order| order.user.0);
            let user = self
                .users
                .iter()
                .position(|u| Some(PublicKey::of(&u.secret)) == owner);
            if let Some(user) = user {
                self.cancel(user, job);
            }
        }
    }

    /// Some machine could run it, or for what runs all at once the machines of some site.
    fn has_room(&self, order: &karez_core::records::Order) -> bool {
        let nodes = (0..self.nodes.len()).map(|n| self.checker.node(n));
        if !order.constraints.together {
            return nodes.into_iter().any(|node| node.could_run(order));
        }
        let parts = order.items.div_ceil(u64::from(order.items_per_part.max(1)));
        let mut sites = BTreeMap::new();
        for node in nodes {
            let room = sites
                .entry((node.institution.clone(), node.country))
                .or_insert(0u64);
            *room += u64::from(node.room_for(order));
        }
        sites.values().any(|room| *room >= parts)
    }

    /// In the calm nothing takes minutes: what has been under way for so long is lost.
    pub(crate) fn look_for_lost(&mut self) {
        let mut rules = Vec::new();
        for at in &self.schedulers {
            let Some(controller) = &at.controller else {
                continue;
            };
            let now = at.clock(self.now).utc;
            for job in controller.jobs(None, false, usize::MAX) {
                for part in &job.parts {
                    let queued = part.state == JobState::Queued;
                    if !part.state.ended() && !queued && part.changed_at.after(Millis(240_000)) < now {
                        let state = part.state;
                        rules.push(format!(
                            "{:?}/{} has been {state:?} for minutes",
                            job.id, part.part
                        ));
                    }
                    if queued && part.cause.is_empty() {
                        rules.push(format!("{:?}/{} waits without a reason", job.id, part.part));
                    }
                }
            }
        }
        for rule in rules {
            self.checker.fail(rule);
        }
    }
}
