//! Work that must run together, and work that is moved.
use super::{Checker, Rule};
use crate::setup::HOUR;
use karez_core::id::{Institution, JobId, LeaseKey, PartIndex};
use std::collections::{BTreeMap, BTreeSet};

/// Parts of one institution that one scheduler may move within an hour, as long as it lives.
const MOVES_MAX: usize = 12;

/// Parts asked for at one moment, and how many of their job were open then.
struct Asked {
    at: u64,
    scheduler: usize,
    open: usize,
    parts: BTreeSet<PartIndex>,
}

#[derive(Default)]
pub(super) struct Gangs {
    asked: BTreeMap<JobId, Asked>,
    moved: BTreeMap<(usize, Institution), Vec<(u64, LeaseKey)>>,
    called: BTreeSet<LeaseKey>,
}

impl Checker {
    /// It is that late now.
    pub(crate) fn clock(&mut self, now: u64) {
        self.now = now;
    }

    /// A scheduler died: what it was saying just then may be cut short, and it forgets how often it moved work.
    pub(crate) fn scheduler_died(&mut self, s: usize) {
        self.gangs.asked.retain(|_, asked| asked.scheduler != s);
        self.gangs.moved.retain(|(scheduler, _), _| *scheduler != s);
    }

    fn runs_together(&self, job: &JobId) -> bool {
        self.orders
            .get(job)
            .is_some_and(|order| order.constraints.together)
    }

    pub(super) fn asked_together(&mut self, s: usize, key: &LeaseKey) {
        if !self.runs_together(&key.job) {
            return;
        }
        if self
            .gangs
            .asked
            .get(&key.job)
            .is_none_or(|known| known.at != self.now)
        {
            self.whole(&key.job);
            let done = self
                .settled
                .range((key.job, 0)..=(key.job, PartIndex::MAX))
                .filter(|(_, settled)| settled.done.is_some())
                .count();
            let open = (self.parts.get(&key.job).copied().unwrap_or(0) as usize).saturating_sub(done);
            let asked = Asked {
                at: self.now,
                scheduler: s,
                open,
                parts: BTreeSet::new(),
            };
            self.gangs.asked.insert(key.job, asked);
        }
        if let Some(asked) = self.gangs.asked.get_mut(&key.job) {
            asked.parts.insert(key.part);
        }
    }

    /// What was last asked for was all that was open.
    fn whole(&mut self, job: &JobId) {
        let Some(asked) = self.gangs.asked.remove(job) else {
            return;
        };
        self.judged(Rule::Together);
        if asked.parts.len() != asked.open {
            let (parts, open) = (asked.parts.len(), asked.open);
            self.fail(format!(
                "{job:?} runs together, {parts} of its {open} open parts were asked for"
            ));
        }
    }

    pub(super) fn gangs_at_rest(&mut self) {
        let jobs: Vec<JobId> = self.gangs.asked.keys().copied().collect();
        for job in jobs {
            self.whole(&job);
        }
    }

    /// A lease of work that runs together is at the site of the others that count.
    pub(super) fn together(&mut self, n: usize, key: &LeaseKey) -> Result<(), String> {
        if !self.runs_together(&key.job) {
            return Ok(());
        }
        self.judged(Rule::Together);
        let counts = |key: &LeaseKey| self.fence_asked.get(&(key.job, key.part)) == Some(&key.fence);
        let site = |n: usize| (&self.nodes[n].institution, self.nodes[n].country);
        let first = LeaseKey {
            part: 0,
            fence: 0,
            ..*key
        };
        let last = LeaseKey {
            part: PartIndex::MAX,
            fence: u64::MAX,
            ..*key
        };
        let apart = self
            .leases
            .range(first..=last)
            .find(|(other, seen)| seen.live && counts(other) && counts(key) && site(seen.node) != site(n));
        match apart {
            Some((other, seen)) => Err(format!(
                "{key} runs together with {other}, but on node {n} and on node {} of another site",
                seen.node
            )),
            None => Ok(()),
        }
    }

    /// A node is asked to let work go.
    pub(super) fn moved(&mut self, s: usize, key: &LeaseKey) {
        // Said again after a break, and the parts of what runs together, are no moves of their own.
        if self.runs_together(&key.job) || !self.gangs.called.insert(*key) {
            return;
        }
        let Some(whose) = self.orders.get(&key.job).map(|order| order.institution.clone()) else {
            return self.fail(format!("{key} was moved, and nobody signed its order"));
        };
        self.judged(Rule::Moved);
        let now = self.now;
        let times = self.gangs.moved.entry((s, whose.clone())).or_default();
        times.retain(|(at, _)| at + HOUR > now);
        times.push((now, *key));
        let many = times.len();
        if many > MOVES_MAX {
            self.fail(format!(
                "{many} parts of {whose} were moved within an hour, the bound is {MOVES_MAX}"
            ));
        }
    }
}
