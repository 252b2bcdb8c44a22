//! Connections between nodes and schedulers: they stand, they break, and messages never overtake each other.
use super::{Due, World};
use karez_core::{
    agent,
    controller::Event,
    exchange::{ToNode, ToScheduler},
};

/// A connection between a node and a scheduler, as both ends see it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Session {
    pub(crate) node: u32,
    pub(crate) scheduler: u16,
    /// Messages still arrive.
    pub(crate) up: bool,
    pub(crate) node_epoch: u32,
    pub(crate) scheduler_epoch: u32,
    /// Latest arrival planned in each direction: messages never overtake each other.
    to_node: u64,
    to_scheduler: u64,
}

impl World {
    /// Whether messages pass between that node and that scheduler now.
    pub(crate) fn path_open(&self, n: usize, s: usize) -> bool {
        self.nodes[n].cut_until <= self.now && self.light_between(self.checker.node(n).country, s)
    }

    /// Whether messages pass between that country and that scheduler now.
    pub(crate) fn light_between(&self, country: karez_core::id::Country, s: usize) -> bool {
        let seat = self.schedulers[s].country;
        country == seat || !(self.dark.contains(&country) || self.dark.contains(&seat))
    }

    pub(super) fn dial(&mut self, n: usize, epoch: u32, s: usize) {
        let node = &self.nodes[n];
        if node.epoch != epoch || node.agent.is_none() || node.session(s).is_some() {
            return;
        }
        if !self.path_open(n, s) || self.schedulers[s].controller.is_none() {
            // Longer and longer between attempts, as the daemons do.
            let tries = self.nodes[n].missed_dial(s);
            let most = (3_000_u64 << tries.min(6)).min(self.setup.timing.heartbeat.0.max(3_000));
            let pause = self.rng.between(500, most);
            let (n, s) = (n as u32, s as u32);
            return self.after(pause, Due::Dial { n, epoch, s });
        }
        let latency = self.latency(n, s);
        let session = self.sessions.len() as u32;
        self.sessions.push(Session {
            node: n as u32,
            scheduler: s as u16,
            up: true,
            node_epoch: epoch,
            scheduler_epoch: self.schedulers[s].epoch,
            to_node: self.now,
            to_scheduler: self.now + latency,
        });
        self.nodes[n].set_session(s, Some(session));
        self.note(|| format!("node {n}: session {session} with scheduler {s} stands"));
        self.after(latency, Due::SessionUp { session });
        let id = self.schedulers[s].id;
        self.node_event(n, agent::Event::Connected(id));
    }

    pub(super) fn session_up(&mut self, session: u32) {
        let at = self.sessions[session as usize];
        let s = usize::from(at.scheduler);
        let scheduler = &mut self.schedulers[s];
        if !at.up || at.scheduler_epoch != scheduler.epoch || scheduler.controller.is_none() {
            return;
        }
        let id = self.checker.node(at.node as usize).id;
        // The old session of this node, if it still seems to stand, is over: its node has dialled anew.
        if scheduler.sessions.insert(at.node, session).is_some() {
            self.scheduler_event(s, Event::NodeGone(id));
        }
        // The event above may have been the scheduler's last.
        if self.schedulers[s].sessions.get(&at.node) == Some(&session) {
            self.scheduler_event(s, Event::NodeConnected(id));
        }
    }

    /// The connection is gone; both ends find out in their own time, and what was under way is lost.
    pub(crate) fn break_session(&mut self, session: u32) {
        let at = &mut self.sessions[session as usize];
        if !at.up {
            return;
        }
        at.up = false;
        let n = at.node;
        self.summary.breaks += 1;
        self.note(|| format!("node {n}: session {session} breaks"));
        let node_learns = self.rng.below(12_000);
        let scheduler_learns = self.rng.below(12_000);
        self.after(node_learns, Due::NodeLearnsBreak { session });
        self.after(scheduler_learns, Due::SchedulerLearnsBreak { session });
    }

    pub(super) fn node_learns_break(&mut self, session: u32) {
        let at = self.sessions[session as usize];
        let (n, s) = (at.node as usize, usize::from(at.scheduler));
        if self.nodes[n].session(s) != Some(session) || self.nodes[n].epoch != at.node_epoch {
            return;
        }
        self.nodes[n].set_session(s, None);
        let pause = self.rng.between(50, 2_000);
        let dial = Due::Dial {
            n: at.node,
            epoch: at.node_epoch,
            s: s as u32,
        };
        self.after(pause, dial);
        let id = self.schedulers[s].id;
        self.node_event(n, agent::Event::Disconnected(id));
    }

    pub(super) fn scheduler_learns_break(&mut self, session: u32) {
        let at = self.sessions[session as usize];
        let s = usize::from(at.scheduler);
        if self.schedulers[s].sessions.get(&at.node) != Some(&session) {
            return;
        }
        self.schedulers[s].sessions.remove(&at.node);
        let id = self.checker.node(at.node as usize).id;
        self.scheduler_event(s, Event::NodeGone(id));
    }

    pub(crate) fn latency(&mut self, n: usize, s: usize) -> u64 {
        let delay = self
            .delays
            .get(&self.checker.node(n).country)
            .and_then(|delays| delays.get(s).copied());
        let (base, spread) = delay.map_or((50, 10), |d| (d.base, d.spread));
        let last_mile = self.nodes[n].last_mile;
        base + self.rng.below(spread + 1) + last_mile / 2 + self.rng.below(last_mile + 1)
    }

    pub(crate) fn send_to_node(&mut self, n: usize, s: usize, message: ToNode) {
        let Some(session) = self.schedulers[s].sessions.get(&(n as u32)).copied() else {
            return;
        };
        let latency = self.latency(n, s);
        let at = &mut self.sessions[session as usize];
        if at.up {
            at.to_node = (self.now + latency).max(at.to_node + 1);
            let arrives = at.to_node;
            let message = Box::new(message);
            self.summary.messages += 1;
            self.at(arrives, Due::ToNode { session, message });
        }
    }

    pub(crate) fn send_to_scheduler(&mut self, n: usize, s: usize, message: ToScheduler) {
        let Some(session) = self.nodes[n].session(s) else {
            return;
        };
        let latency = self.latency(n, s);
        let at = &mut self.sessions[session as usize];
        if at.up {
            at.to_scheduler = (self.now + latency).max(at.to_scheduler + 1);
            let arrives = at.to_scheduler;
            let message = Box::new(message);
            self.summary.messages += 1;
            self.at(arrives, Due::ToScheduler { session, message });
        }
    }

    pub(super) fn deliver_to_node(&mut self, session: u32, message: ToNode) {
        let at = self.sessions[session as usize];
        let n = at.node as usize;
        if at.up && self.alive(at.node, at.node_epoch) {
            let id = self.schedulers[usize::from(at.scheduler)].id;
            self.note(|| format!("node {n} hears {}", brief_to_node(&message)));
            self.node_event(n, agent::Event::Heard(id, message));
        }
    }

    pub(super) fn deliver_to_scheduler(&mut self, session: u32, message: ToScheduler) {
        let at = self.sessions[session as usize];
        let (n, s) = (at.node, usize::from(at.scheduler));
        if at.up && self.schedulers[s].sessions.get(&n) == Some(&session) {
            let id = self.checker.node(n as usize).id;
            self.note(|| format!("scheduler {s} hears node {n}: {}", brief_to_scheduler(&message)));
            self.scheduler_event(s, Event::Heard(id, message));
        }
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
        ToNode::Move { key, cause } => format!("move {key}: {cause}"),
        ToNode::Stop { key, cause } => format!("stop {key}: {cause}"),
        ToNode::Settled { key, receipt, why } => {
            format!(
                "settled {key} for {:?} {why}",
                receipt.as_ref().map(|r| r.credits)
            )
        }
        #[allow(unreachable_patterns)]
        other => format!("{other:?}"),
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
        #[allow(unreachable_patterns)]
        other => format!("{other:?}"),
    }
}
