//! What nodes say: offers, reports, grants, refusals; and attempts that came to nothing.
use super::mind::{BACKOFF, Controller};
use super::questions::QUIET_MAX;
use super::{
    Denial, Effect, JoinBy, Reply, RequestId,
    job::{JobState, Part},
};
use crate::{
    exchange::{Held, Phase, Refusal, Report, ToNode, ToScheduler},
    id::{Institution, LeaseKey},
    key::{NodeId, PublicKey},
    market::OfferError,
    prelude::*,
    records::{Lease, Offer, Role, Verified},
    unit::{Millis, Now},
};

/// The longest a node may take to fetch what a part needs, or to call it running without using device time.
const FETCH_MAX: Millis = Millis(24 * 3_600_000);
/// The most nodes a part avoids; the oldest gets another chance.
const AVOID_MAX: usize = 64;

impl Controller {
    pub(super) fn on_offer(
        &mut self,
        now: Now,
        request: RequestId,
        from: PublicKey,
        offer: Verified<Offer>,
        out: &mut Vec<Effect>,
    ) {
        if !self.members.contains_key(&from) {
            // A node that found this scheduler by itself: where admission is open, its offer is its application.
            let wanted = JoinBy::Open {
                role: Role::Node,
                institution: offer.institution.clone(),
            };
            if let Err(denial) = self.join(now, from, offer.name.clone(), wanted, out) {
                self.offers_refused += 1;
                out.push(Effect::Reply(request, Reply::Refused(denial)));
                return;
            }
        }
        let denial = match self.members.get(&from) {
            None => Some(Denial::NotAdmitted(from)),
            Some(m) if m.role != Role::Node => Some(Denial::WrongRole {
                key: from,
                is: m.role,
                needs: Role::Node,
            }),
            Some(m) if m.institution != offer.institution => Some(Denial::Offer(format!(
                "speaks for {}, but the node was admitted to {}",
                offer.institution, m.institution
            ))),
            Some(_) => {
                let (node, whose, local) = (offer.node, offer.institution.clone(), offer.terms.local_first);
                let heard = self.market.hear(now, from, offer);
                if heard.is_ok() {
                    self.note_local(node, whose, local);
                }
                heard.err().map(|e: OfferError| Denial::Offer(e.to_string()))
            }
        };
        let reply = match denial {
            Some(denial) => {
                self.offers_refused += 1;
                Reply::Refused(denial)
            }
            None => {
                self.look_again = true;
                Reply::OfferTaken
            }
        };
        out.push(Effect::Reply(request, reply));
    }

    /// Whether that machine's owner wants guests to leave for the institution's own people.
    fn note_local(&mut self, node: NodeId, whose: Institution, local: bool) {
        if local {
            self.locals.entry(whose).or_default().insert(node);
        } else if let Some(nodes) = self.locals.get_mut(&whose) {
            nodes.remove(&node);
            if nodes.is_empty() {
                self.locals.remove(&whose);
            }
        }
    }

    /// Counts an offer that the shell refused before it could become an event: bad signature, over a cap.
    pub fn count_refused_offer(&mut self) {
        self.offers_refused += 1;
    }

    /// Offers refused since the process started.
    pub fn offers_refused(&self) -> u64 {
        self.offers_refused
    }

    pub(super) fn on_connected(&mut self, node: NodeId) {
        self.market.set_connected(node, true);
        self.look_again = true;
        // What was asked over the old session may never have arrived: the first report of this one decides.
        for key in self.claims_of.get(&node).into_iter().flatten() {
            if let Some(claim) = self.claims.get_mut(key) {
                claim.granted = true;
            }
        }
    }

    pub(super) fn on_gone(&mut self, now: Now, node: NodeId) {
        self.market.set_connected(node, false);
        let grace = now.mono.after(self.config.reconnect_grace);
        let keys: Vec<LeaseKey> = self.claims_of.get(&node).into_iter().flatten().copied().collect();
        for key in keys {
            let deadline = self.claims.get(&key).map_or(grace, |claim| claim.deadline);
            self.due(&key, deadline.min(grace));
        }
    }

    pub(super) fn on_heard(&mut self, now: Now, node: NodeId, message: ToScheduler, out: &mut Vec<Effect>) {
        match message {
            ToScheduler::Report(report) => self.on_report(now, node, &report, out),
            ToScheduler::Granted(lease) => self.on_granted(now, node, &lease, out),
            ToScheduler::Refused { key, why } => self.on_refused(now, node, key, &why, out),
            // Readings come again with the usage; on the way they only show that the node is alive.
            ToScheduler::Reading { key, .. } => {
                if self.claims.get(&key).is_some_and(|c| c.node == node) && !self.must_speak(&key) {
                    self.due(&key, now.mono.after(self.config.lease_ttl));
                }
            }
            ToScheduler::Finished(finished) => self.on_finished(now, node, *finished, out),
            ToScheduler::Alive { key } => {
                if self.claims.get(&key).is_some_and(|c| c.node == node && c.granted) && self.must_speak(&key)
                {
                    self.due(&key, now.mono.after(QUIET_MAX));
                }
            }
            ToScheduler::Warm(warmth) => {
                // Only of nodes that are listed, so that there are never more than those.
                if self.market.get(&node).is_some() {
                    self.hearth.tell(node, now.mono, &warmth);
                }
            }
        }
    }

    /// Compares what the node holds with what we believe, and mends both ways.
    fn on_report(&mut self, now: Now, node: NodeId, report: &Report, out: &mut Vec<Effect>) {
        let until = self.config.lease_ttl;
        let mut renewals = Vec::new();
        let mut stops = Vec::new();
        let mut named = BTreeSet::new();
        for held in &report.held {
            let key = held.key;
            named.insert(key);
            if held.phase != Phase::Finished {
                self.take_back(now, key, node, out);
            }
            let Some(claim) = self.claims.get_mut(&key).filter(|c| c.node == node) else {
                if held.phase != Phase::Finished {
                    stops.push((key, "another attempt counts, or the job is over".to_string()));
                }
                continue;
            };
            claim.granted = true;
            if held.phase == Phase::Finished || !self.must_speak(&key) {
                self.due(&key, now.mono.after(until));
            }
            if !self.is_wanted(&key) {
                if held.phase != Phase::Finished {
                    stops.push((key, "the job is over".to_string()));
                }
                continue;
            }
            if self.overdue(now, &key) {
                self.unclaim(&key);
                stops.push((key, "it took longer than any lease may".to_string()));
                let why = format!("{} never came to an end with it", self.name(&node));
                self.market.note_failure(&node);
                self.lost(now, key, &node, why, out);
                continue;
            }
            if self.moving.contains(&key) && held.phase != Phase::Finished {
                // The word may have been lost with the last session.
                let cause = "it goes on elsewhere".into();
                out.push(Effect::Send(node, ToNode::Move { key, cause }));
            }
            renewals.push((key, now.utc.after(until), until));
            self.progress(now, held, out);
        }
        let missing: Vec<LeaseKey> = self
            .claims_of
            .get(&node)
            .into_iter()
            .flatten()
            .filter(|key| !named.contains(key) && self.claims.get(key).is_some_and(|c| c.granted))
            .copied()
            .collect();
        for key in missing {
            self.unclaim(&key);
            let why = format!("{} no longer holds it", self.name(&node));
            self.lost(now, key, &node, why, out);
        }
        if !renewals.is_empty() || !stops.is_empty() {
            out.push(Effect::Send(
                node,
                ToNode::Renewed {
                    sequence: report.sequence,
                    renewals,
                    stops,
                },
            ));
        }
    }

    /// An honest node ends every lease by itself, at the latest when its device time is used up. One that only
    /// says so, report after report, must not keep a part for ever.
    fn overdue(&self, now: Now, key: &LeaseKey) -> bool {
        let longest = self.config.device_time_max.saturating_add(FETCH_MAX);
        self.part(key)
            .is_some_and(|part| part.asked_at.after(longest) <= now.utc)
    }

    /// A lease we gave up but did not replace: its part waits in the queue under the same fence.
    fn wants_back(&self, now: Now, key: &LeaseKey, node: NodeId) -> bool {
        self.placed_on(key, node)
            && !self.overdue(now, key)
            && self
                .part(key)
                .is_some_and(|part| part.state == JobState::Queued && part.settled < key.fence)
    }

    /// Takes back a lease that was given up too early, if nothing has replaced it.
    fn take_back(&mut self, now: Now, key: LeaseKey, node: NodeId, out: &mut Vec<Effect>) {
        if self.claims.contains_key(&key) || !self.wants_back(now, &key, node) {
            return;
        }
        let Some(plan) = self.part(&key).and_then(|part| part.plan.clone()) else {
            return;
        };
        self.claim(key, &plan, now.mono.after(self.config.lease_ttl), true);
        let cause = format!("{} has it after all", self.name(&node));
        self.set_part(now, &key, JobState::Placed, cause, out);
    }

    fn progress(&mut self, now: Now, held: &Held, out: &mut Vec<Effect>) {
        let key = &held.key;
        let state = match held.phase {
            Phase::Granted => JobState::Placed,
            Phase::Fetching => JobState::Fetching,
            Phase::Running | Phase::Finished => JobState::Running,
        };
        let Some(part) = self.part_mut(key) else { return };
        let changed = part.items_done != held.items_done;
        part.items_done = held.items_done.min(part.items);
        (part.tokens, part.loss_micro) = (held.tokens, held.loss_micro);
        if part.state != state {
            let cause = part.cause.clone();
            self.set_part(now, key, state, cause, out);
        } else if changed {
            out.push(Effect::Changed(key.job));
        }
    }

    fn on_granted(&mut self, now: Now, node: NodeId, lease: &Verified<Lease>, out: &mut Vec<Effect>) {
        let key = lease.key();
        let until = match self.must_speak(&key) {
            true => now.mono.after(QUIET_MAX),
            false => now.mono.after(self.config.lease_ttl),
        };
        if lease.node == node {
            self.take_back(now, key, node, out);
        }
        let known = self
            .claims
            .get_mut(&key)
            .filter(|c| c.node == node && lease.node == node);
        match known {
            Some(claim) => {
                claim.granted = true;
                self.due(&key, until);
            }
            None => {
                let cause = "the ask was given up before the answer came".to_string();
                out.push(Effect::Send(node, ToNode::Stop { key, cause }));
                return;
            }
        }
        if !self.is_wanted(&key) {
            out.push(Effect::Send(
                node,
                ToNode::Stop {
                    key,
                    cause: "the job is over".into(),
                },
            ));
            return;
        }
        let phase = match self
            .jobs
            .get(&key.job)
            .map(|job| job.order.work.model().is_some())
        {
            Some(true) => Phase::Fetching,
            _ => Phase::Running,
        };
        let held = Held {
            key,
            phase,
            items_done: 0,
            tokens: 0,
            loss_micro: 0,
        };
        self.progress(now, &held, out);
    }

    fn on_refused(&mut self, now: Now, node: NodeId, key: LeaseKey, why: &Refusal, out: &mut Vec<Effect>) {
        if self.claims.get(&key).is_none_or(|c| c.node != node) {
            return;
        }
        let Some(claim) = self.unclaim(&key) else { return };
        // A refusal is an owner's right, not a failure: it costs a moment, never reputation.
        self.market.mark_full(&node, &claim.class, claim.devices);
        if !self.is_wanted(&key) {
            return;
        }
        let name = self.name(&node);
        let lasting = !matches!(
            why,
            Refusal::Busy { .. } | Refusal::Price { .. } | Refusal::Fenced { .. }
        );
        if let Some(part) = self.part_mut(&key) {
            part.not_before = now.mono.after(Millis(BACKOFF.0 / 10));
            if lasting {
                avoid(part, node);
            }
        }
        self.hold_back(now.mono.after(Millis(BACKOFF.0 / 10)));
        self.moving.remove(&key);
        self.set_part(now, &key, JobState::Queued, format!("{name} refused: {why}"), out);
        self.regroup(key.job, out);
    }

    /// An attempt came to nothing without the node's word. The part goes back to the queue, or the job fails.
    pub(super) fn lost(
        &mut self,
        now: Now,
        key: LeaseKey,
        node: &NodeId,
        why: String,
        out: &mut Vec<Effect>,
    ) {
        self.look_again = true;
        // Called back and then lost from sight: that is no failure of the work.
        if self.is_wanted(&key) {
            self.retry(now, key, node, why, true, out);
        }
    }

    /// Puts a part back into the queue after an attempt, or fails the job when there were too many.
    pub(super) fn retry(
        &mut self,
        now: Now,
        key: LeaseKey,
        node: &NodeId,
        why: String,
        counts: bool,
        out: &mut Vec<Effect>,
    ) {
        self.moving.remove(&key);
        let Some(job) = self.jobs.get_mut(&key.job) else {
            return;
        };
        let attempts_max = job.order.attempts_max;
        let Some(part) = job.parts.get_mut(key.part as usize) else {
            return;
        };
        part.items_done = 0;
        if counts {
            part.failures += 1;
            avoid(part, *node);
        }
        if part.failures >= attempts_max {
            let cause = format!(
                "part {} failed {} times, the limit; last: {why}",
                key.part, part.failures
            );
            self.fail_job(now, key, cause, out);
            return;
        }
        self.set_part(now, &key, JobState::Queued, why, out);
        self.regroup(key.job, out);
    }
}

/// The part is not placed there again soon.
pub(super) fn avoid(part: &mut Part, node: NodeId) {
    if part.avoid.contains(&node) {
        return;
    }
    if part.avoid.len() >= AVOID_MAX {
        part.avoid.remove(0);
    }
    part.avoid.push(node);
}
