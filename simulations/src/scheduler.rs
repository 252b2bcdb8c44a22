//! The scheduler's process around the real controller: its clock, its disk, its book, its answers.
use crate::{
    disk::Disk,
    node::{EPOCH, HEARTBEAT, parse},
    setup::Sabotage,
    world::{Crash, Due, World},
};
use karez_core::{
    controller::{Admission, Controller, ControllerConfig, Denial, Effect, Event, Member, Reply, RequestId},
    exchange::ToNode,
    id::JobId,
    key::{PublicKey, SchedulerId, SecretKey},
    records::{Offer, Order, Role, Verified},
    store::Change,
    unit::{Credits, Millis, MonoMillis, Now, UtcMillis},
};
use std::collections::BTreeMap;

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
    config: ControllerConfig,
    pub(crate) controller: Option<Controller>,
    pub(crate) disk: Disk,
    pub(crate) epoch: u64,
    mono_base: u64,
    booted_at: u64,
    pub(crate) ticket: u64,
    pub(crate) tick_at: Option<u64>,
    pub(crate) sessions: BTreeMap<usize, usize>,
    pub(crate) crash: Option<Crash>,
    asked: BTreeMap<RequestId, Asked>,
    requests: u64,
    spins: (u64, u32),
}

impl SchedulerProcess {
    pub(crate) fn new(secret: SecretKey, jobs_kept: usize) -> Self {
        let config = ControllerConfig {
            secret,
            name: "world".into(),
            artifact_addrs: vec!["192.0.2.1:4433".into()],
            admission: Admission::Invited,
            heartbeat: HEARTBEAT,
            lease_ttl: Millis(15_000),
            reconnect_grace: Millis(8_000),
            ask_timeout: Millis(4_000),
            jobs_open_max: 1_000,
            jobs_open_user_max: 100,
            jobs_kept,
            device_time_max: Millis(24 * 3_600_000),
        };
        Self {
            id: config.id(),
            config,
            controller: None,
            disk: Disk::default(),
            epoch: 0,
            mono_base: 0,
            booted_at: 0,
            ticket: 0,
            tick_at: None,
            sessions: BTreeMap::new(),
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
    pub(crate) fn scheduler_boot(&mut self) {
        if self.scheduler.controller.is_some() {
            return;
        }
        let mono_base = self.rng.below(1_000_000_000);
        let s = &mut self.scheduler;
        let first = s.epoch == 0;
        s.epoch += 1;
        s.mono_base = mono_base;
        s.booted_at = self.now;
        s.tick_at = None;
        s.sessions.clear();
        s.asked.clear();
        let now = s.clock(self.now);
        let accounts = self.checker.book().accounts().clone();
        match Controller::restore(s.config.clone(), now, &s.disk.read(), accounts) {
            Ok(controller) => s.controller = Some(controller),
            Err(error) => {
                return self
                    .checker
                    .fail(format!("the scheduler cannot read its disk: {error}"));
            }
        }
        self.note(|| "scheduler: starts".into());
        self.scheduler_event(Event::Started);
        if first {
            self.admit_all();
        }
    }

    fn admit_all(&mut self) {
        for n in 0..self.nodes.len() {
            let key = self.checker.node(n).id.0;
            let institution = self.nodes[n].config.institution.clone();
            let name = self.nodes[n].config.name.clone();
            self.admit(key, Role::Node, institution, name, Credits::ZERO);
        }
        for u in 0..self.users.len() {
            let user = &self.users[u];
            let (key, credits) = (PublicKey::of(&user.secret), user.budget);
            let (institution, name) = (user.institution.clone(), format!("user-{u}"));
            self.admit(key, Role::User, institution, name, credits);
        }
    }

    fn admit(
        &mut self,
        key: PublicKey,
        role: Role,
        institution: karez_core::id::Institution,
        name: String,
        credits: Credits,
    ) {
        let request = self.ask(Asked::Nobody);
        let member = Member {
            role,
            institution,
            name,
            since: UtcMillis(EPOCH),
        };
        self.scheduler_event(Event::Admit {
            request,
            key,
            member,
            credits,
        });
    }

    fn ask(&mut self, asked: Asked) -> RequestId {
        self.scheduler.requests += 1;
        let request = RequestId(self.scheduler.requests);
        self.scheduler.asked.insert(request, asked);
        request
    }

    fn scheduler_dies(&mut self) {
        self.note(|| "scheduler: dies".into());
        self.summary.crashes += 1;
        let s = &mut self.scheduler;
        s.controller = None;
        s.epoch += 1;
        let sessions: Vec<usize> = std::mem::take(&mut s.sessions).into_values().collect();
        s.asked.clear();
        for session in sessions {
            self.sessions[session].up = false;
        }
        // Those on their way up break too.
        for session in 0..self.sessions.len() {
            if self.sessions[session].scheduler_epoch < self.scheduler.epoch {
                let known = self.nodes[self.sessions[session].node].session == Some(session);
                self.sessions[session].up = false;
                if known {
                    let learns = self.rng.below(6_000);
                    self.after(learns, Due::NodeLearnsBreak { session });
                }
            }
        }
        let away = if self.rng.chance(800) {
            self.rng.between(200, 8_000)
        } else {
            self.rng.between(15_000, 40_000)
        };
        self.after(away, Due::SchedulerBoot);
    }

    /// One event through the controller, its changes to disk and book, its effects into the world.
    pub(crate) fn scheduler_event(&mut self, event: Event) {
        let s = &mut self.scheduler;
        let now = s.clock(self.now);
        let Some(controller) = &mut s.controller else {
            return;
        };
        let mut out = Vec::new();
        controller.handle(now, event, &mut out);
        self.summary.events += 1;
        let wake = controller.wake_at();
        if wake <= now.mono {
            let rule = format!(
                "the scheduler asks to be woken at {} when it is {}",
                wake.0, now.mono.0
            );
            return self.checker.fail(rule);
        }
        self.scheduler_rests(wake);
        let crash = self.scheduler.crash.take_if(|_| !out.is_empty());
        if crash == Some(Crash::BeforeStore) {
            return self.scheduler_dies();
        }
        let mut rest = Vec::new();
        for effect in out {
            match effect {
                Effect::Persist(changes) => self.scheduler_stores(changes),
                other => rest.push(other),
            }
        }
        if crash == Some(Crash::AfterStore) {
            return self.scheduler_dies();
        }
        let said = if crash == Some(Crash::Halfway) {
            rest.len() / 2
        } else {
            rest.len()
        };
        for effect in rest.drain(..said) {
            self.scheduler_effect(effect);
        }
        if crash.is_some() {
            self.scheduler_dies();
        }
    }

    fn scheduler_stores(&mut self, mut changes: Vec<Change>) {
        if self.sabotaged(Sabotage::AcceptUnstored) {
            changes.retain(|c| !matches!(c, Change::Put { table: "jobs", .. }));
        }
        for change in &mut changes {
            if let Change::Post { posting, .. } = change
                && self.setup.sabotage == Some(Sabotage::Overcharge)
                && posting.kind == karez_core::money::PostingKind::Settle
            {
                posting.legs[0].1 -= 1;
                posting.legs[1].1 += 1;
            }
        }
        for change in &changes {
            self.scheduler.disk.apply(change);
        }
        self.checker.scheduler_disk(&changes);
        if self.sabotaged(Sabotage::BillTwice) {
            changes.retain(|c| {
                matches!(c, Change::Post { posting, .. } if posting.kind == karez_core::money::PostingKind::Settle)
            });
            self.checker.scheduler_disk(&changes);
        }
    }

    fn scheduler_rests(&mut self, wake: MonoMillis) {
        let late = self.rng.below(15);
        let s = &mut self.scheduler;
        s.spins = match s.spins {
            (at, count) if at == self.now => (at, count + 1),
            _ => (self.now, 0),
        };
        if s.spins.1 > 2_000 {
            return self.checker.fail("the scheduler spins".into());
        }
        if wake.0 == u64::MAX {
            return;
        }
        let at = s.booted_at + (wake.0 - s.mono_base).max(1) + late;
        if s.tick_at.is_none_or(|planned| planned > at || planned < self.now) {
            s.ticket += 1;
            s.tick_at = Some(at);
            let ticket = s.ticket;
            self.at(at, Due::SchedulerTick { ticket });
        }
    }

    fn scheduler_effect(&mut self, effect: Effect) {
        match effect {
            Effect::Persist(_) | Effect::Changed(_) => {}
            Effect::Log(line) => self.note(|| format!("scheduler logs: {line}")),
            Effect::Send(node, message) => {
                self.checker.to_node(node, &message);
                if !self.to_node_allowed(&message) {
                    return;
                }
                let n = (0..self.nodes.len()).find(|n| self.checker.node(*n).id == node);
                let Some(n) = n else {
                    return self.checker.fail(format!("{node:?} is no node of this world"));
                };
                if self.sabotaged(Sabotage::AskTwice)
                    && let ToNode::Ask(_) = &message
                {
                    let other = (n + 1) % self.nodes.len();
                    self.send_to_node(other, message.clone());
                }
                if (self.sabotaged(Sabotage::ForgetFences) || self.sabotaged(Sabotage::ReplayAsks))
                    && let ToNode::Ask(_) = &message
                {
                    for later in [15_000, 40_000] {
                        let span = self.rng.between(1_000, later);
                        let message = Box::new(message.clone());
                        self.after(span, Due::Replay { n, message });
                    }
                }
                self.send_to_node(n, message);
            }
            Effect::Reply(request, reply) => self.answered(request, reply),
        }
    }

    fn answered(&mut self, request: RequestId, reply: Reply) {
        let Some(asked) = self.scheduler.asked.remove(&request) else {
            return self.checker.fail(format!("{request:?} was answered twice"));
        };
        match (asked, reply) {
            (Asked::Nobody, _) => {}
            (Asked::Submit { user, job }, Reply::Submitted(id)) => {
                if id != job {
                    self.checker.fail(format!("{job:?} was acknowledged as {id:?}"));
                }
                self.checker.accepted(job, &self.scheduler.disk);
                self.users[user].waiting.remove(&job);
                self.summary.jobs += 1;
            }
            (Asked::Submit { user, job }, Reply::Refused(denial)) => {
                self.note(|| format!("scheduler refuses {job:?}: {denial}"));
                self.checker.refused(job, &self.scheduler.disk);
                if let Denial::Ledger(error) = denial {
                    self.checker.fail(format!("{job:?}: the ledger refuses: {error}"));
                }
                self.users[user].waiting.remove(&job);
                self.summary.refused += 1;
            }
            (Asked::Cancel { user, job }, Reply::Cancelled(_) | Reply::Refused(Denial::NoJob(_))) => {
                self.users[user].cancelling.remove(&job);
            }
            (asked, reply) => self.checker.fail(format!("{asked:?} was answered {reply:?}")),
        }
    }

    pub(crate) fn offer_arrives(&mut self, from: PublicKey, offer: Verified<Offer>) {
        if self.scheduler.controller.is_some() {
            let request = self.ask(Asked::Nobody);
            self.scheduler_event(Event::Offer { request, from, offer });
        }
    }

    /// A user hands an order in, and again until there is an answer.
    pub(crate) fn submit(
        &mut self,
        user: usize,
        order: Verified<Order>,
        caller: PublicKey,
        wait: bool,
        again: bool,
    ) {
        let job = JobId(order.id());
        if again && !self.users[user].waiting.contains(&job) {
            return;
        }
        self.users[user].waiting.insert(job);
        let pause = self.rng.between(2_000, 6_000);
        let retry = Due::Submit {
            user,
            order: Box::new(order.clone()),
            caller,
            wait,
            again: true,
        };
        self.after(pause, retry);
        if self.scheduler.controller.is_none() {
            return;
        }
        self.note(|| {
            format!(
                "user {user} submits {job:?}: {:?}, {} items",
                order.work.kind(),
                order.items
            )
        });
        let request = self.ask(Asked::Submit { user, job });
        self.scheduler_event(Event::Submit {
            request,
            caller,
            order,
            label: "a job".into(),
            wait,
        });
    }

    /// A user calls a job off, and again until there is an answer.
    pub(crate) fn cancel(&mut self, user: usize, job: JobId) {
        if self.users[user].waiting.contains(&job) {
            // The answer to the submit is still missing.
            let pause = self.rng.between(1_000, 5_000);
            return self.after(pause, Due::Cancel { user, job });
        }
        self.users[user].cancelling.insert(job);
        if self.scheduler.controller.is_some() {
            self.note(|| format!("user {user} cancels {job:?}"));
            let request = self.ask(Asked::Cancel { user, job });
            let caller = PublicKey::of(&self.users[user].secret);
            self.scheduler_event(Event::Cancel { request, caller, job });
        }
        if self.users[user].cancelling.contains(&job) {
            let pause = self.rng.between(2_000, 6_000);
            self.after(pause, Due::Cancel { user, job });
        }
    }

    /// What no machine of this world can ever run waits for ever: its users give it up.
    pub(crate) fn call_off_hopeless(&mut self) {
        for user in 0..self.users.len() {
            let jobs: Vec<JobId> = self.users[user].hopeless.iter().copied().collect();
            for job in jobs {
                let pause = self.rng.between(300_000, 305_000);
                self.after(pause, Due::Cancel { user, job });
            }
        }
    }

    /// In the calm nothing takes minutes: what has been under way for so long is lost.
    pub(crate) fn look_for_lost(&mut self) {
        let Some(controller) = &self.scheduler.controller else {
            return;
        };
        let now = self.scheduler.clock(self.now).utc;
        for job in controller.jobs(None, false, usize::MAX) {
            for part in &job.parts {
                let queued = part.state == karez_core::controller::JobState::Queued;
                if !part.state.ended() && !queued && part.changed_at.after(Millis(240_000)) < now {
                    let rule = format!("{:?}/{} has been {:?} for minutes", job.id, part.part, part.state);
                    self.checker.fail(rule);
                }
                if queued && part.cause.is_empty() {
                    let rule = format!("{:?}/{} waits without a reason", job.id, part.part);
                    self.checker.fail(rule);
                }
            }
        }
    }
}

/// Another scheduler, for orders that come to the wrong door.
pub(crate) fn other_scheduler() -> SchedulerId {
    let secret = SecretKey::from_bytes(&[77; 32]);
    SchedulerId(PublicKey::of(&secret))
}

/// A country where no machine of any world stands.
pub(crate) fn nowhere() -> karez_core::id::Country {
    parse("AQ")
}
