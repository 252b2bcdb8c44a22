//! The storm: faults drawn at random, and faults with a date.
use super::{Crash, Due, World};
use crate::setup::Trouble;
use karez_core::agent::OwnerCommand;

impl World {
    pub(super) fn plan_faults(&mut self) {
        if self.setup.faults_per_minute > 0 {
            self.at(5_000, Due::Fault);
        }
        for fault in 0..self.setup.faults.len() {
            let (at, span) = {
                let f = &self.setup.faults[fault];
                (f.at_ms, f.for_ms)
            };
            let fault = fault as u32;
            self.at(at, Due::Planned { fault, over: false });
            self.at(at + span, Due::Planned { fault, over: true });
        }
    }

    pub(super) fn fault(&mut self) {
        if self.calm {
            return;
        }
        let mean = 60_000 / self.setup.faults_per_minute.max(1);
        let pause = self.rng.between(1, mean * 2);
        self.after(pause, Due::Fault);
        if self.nodes.is_empty() {
            return;
        }
        let n = self.rng.below(self.nodes.len() as u64) as usize;
        let s = self.rng.below(self.schedulers.len() as u64) as usize;
        let mode = self
            .rng
            .pick(&[Crash::BeforeStore, Crash::AfterStore, Crash::Halfway]);
        match self.rng.below(100) {
            0..=21 => self.nodes[n].crash = Some(mode),
            22..=27 => self.schedulers[s].crash = Some(mode),
            28..=45 => {
                if let Some(session) = self.nodes[n].session(s) {
                    self.break_session(session);
                }
            }
            46..=58 => {
                let span = if self.rng.chance(150) {
                    self.rng.between(30_000, 120_000)
                } else {
                    self.rng.between(500, 25_000)
                };
                self.nodes[n].cut_until = self.now + span;
                self.note(|| format!("node {n}: cut off for {span} ms"));
                self.after(span, Due::Heal { n: n as u32 });
                self.break_all_of(n);
            }
            59..=60 => self.go_dark_for_a_while(n),
            61..=80 => self.owner_acts(n),
            81..=88 => {
                let step = self.rng.between(0, 40_000) as i64 - 20_000;
                self.nodes[n].skew_ms += step;
            }
            89..=94 => self.nodes[n].slow = self.rng.between(1, 6),
            _ => {
                // Everybody loses the scheduler at once.
                for n in 0..self.nodes.len() {
                    if let Some(session) = self.nodes[n].session(s) {
                        self.break_session(session);
                    }
                }
            }
        }
    }

    pub(super) fn break_all_of(&mut self, n: usize) {
        for session in self.nodes[n].sessions_now() {
            self.break_session(session);
        }
    }

    /// A whole country loses its links abroad, in a random storm: for less than a minute.
    fn go_dark_for_a_while(&mut self, n: usize) {
        let country = self.checker.node(n).country;
        let fault = self.setup.faults.len() as u32;
        self.setup.faults.push(crate::setup::PlannedFault {
            at_ms: self.now,
            for_ms: self.rng.between(2_000, 50_000),
            what: Trouble::CountryDark(country),
        });
        let span = self.setup.faults[fault as usize].for_ms;
        self.after(span, Due::Planned { fault, over: true });
        self.planned_fault(fault as usize, false);
    }

    fn owner_acts(&mut self, n: usize) {
        use OwnerCommand::{Drain, Pause, Reclaim};
        if self.nodes[n].agent.is_none() || self.nodes[n].owner.habit.is_some() {
            return;
        }
        let command = self.rng.pick(&[Reclaim, Reclaim, Pause, Drain]);
        let epoch = self.nodes[n].epoch;
        let span = self.rng.between(1_000, 40_000);
        self.after(span, Due::OwnerOpens { n: n as u32, epoch });
        self.owner_says(n, command);
    }

    /// A fault with a date begins, or is over.
    pub(super) fn planned_fault(&mut self, fault: usize, over: bool) {
        let planned = self.setup.faults[fault].clone();
        if over {
            self.note(|| format!("over: {:?}", planned.what));
            if let Trouble::CountryDark(country) = planned.what {
                self.dark.remove(&country);
            }
            return;
        }
        self.note(|| format!("begins: {:?}", planned.what));
        let until = self.now + planned.for_ms;
        match planned.what {
            Trouble::CountryDark(country) => {
                self.recorder.mark(self.now, until, format!("{country} cut off"));
                self.dark.insert(country);
                for session in 0..self.sessions.len() as u32 {
                    let at = self.sessions[session as usize];
                    let here = self.checker.node(at.node as usize).country;
                    if at.up && !self.light_between(here, usize::from(at.scheduler)) {
                        self.break_session(session);
                    }
                }
            }
            Trouble::CountryDown(country) => {
                self.recorder
                    .mark(self.now, until, format!("{country} without power"));
                for n in 0..self.nodes.len() {
                    if self.checker.node(n).country == country && self.nodes[n].agent.is_some() {
                        let late = self.rng.below(60_000);
                        self.node_dies(n, planned.for_ms + late);
                    }
                }
            }
            Trouble::SchedulerLost(s) => {
                let name = self.setup.schedulers[s].name.clone();
                self.recorder.mark(self.now, until, format!("{name} lost"));
                if self.schedulers[s].controller.is_some() {
                    self.scheduler_dies(s, planned.for_ms);
                }
            }
            Trouble::OwnersReturn(country) => {
                let place = country.map_or("everywhere".to_owned(), |c| format!("in {c}"));
                self.recorder
                    .mark(self.now, until, format!("owners back {place}"));
                for n in 0..self.nodes.len() {
                    if country.is_none_or(|c| self.checker.node(n).country == c)
                        && self.nodes[n].agent.is_some()
                    {
                        let epoch = self.nodes[n].epoch;
                        self.at(until, Due::OwnerOpens { n: n as u32, epoch });
                        self.owner_says(n, OwnerCommand::Reclaim);
                    }
                }
            }
        }
    }
}
