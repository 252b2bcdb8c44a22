//! From the queue to the nodes: what can be placed is asked for, what cannot says why; and what is held for it.
use super::mind::{BACKOFF, Claim, Controller};
use super::{
    Effect,
    job::{Job, JobState},
};
use crate::{
    exchange::{Holder, LeaseAsk, ToNode},
    id::{Digest, JobId, LeaseKey, PartIndex},
    key::NodeId,
    placement::{self, Plan, Request},
    prelude::*,
    records::Order,
    unit::{Bytes, Credits, DeviceMillis, Millis, MonoMillis, Now, Rate, UtcMillis},
};
use alloc::boxed::Box;

/// A part that found no other node for so long tries those again that failed at it.
const FORGIVE_AFTER: Millis = Millis(60_000);

impl Controller {
    /// Places what can be placed, oldest job first. A part that fits nowhere never holds up the ones behind it.
    pub(super) fn place_all(&mut self, now: Now, out: &mut Vec<Effect>) {
        let order: Vec<JobId> = self.queue.iter().map(|(_, id)| *id).collect();
        let mut free = self.market.any_free();
        for id in order {
            // Nothing is free anywhere: only parts without a reason still need one.
            let told = |job: &Job| {
                job.parts
                    .iter()
                    .all(|p| p.state != JobState::Queued || !p.cause.is_empty())
            };
            if !free && self.jobs.get(&id).is_some_and(told) {
                continue;
            }
            if self.place_job(now, id, out) {
                free = self.market.any_free();
            }
        }
    }

    /// Says whether something was asked for.
    fn place_job(&mut self, now: Now, id: JobId, out: &mut Vec<Effect>) -> bool {
        let Some(job) = self.jobs.get(&id) else {
            return false;
        };
        let waiting: Vec<PartIndex> = (0u32..)
            .zip(&job.parts)
            .filter(|(i, p)| p.state == JobState::Queued && job.is_next(*i))
            .map(|(i, _)| i)
            .collect();
        if job.order.work.in_sequence() {
            self.give_what_is_left(id, &waiting);
        }
        // Parts that differ in nothing that matters are refused alike: one refusal speaks for the rest.
        let mut refused: Option<(u64, Vec<NodeId>, placement::Refusal)> = None;
        let (mut asked, mut changed) = (false, false);
        for index in waiting {
            let Some(job) = self.jobs.get(&id) else { break };
            let part = &job.parts[index as usize];
            if part.not_before > now.mono {
                let at = part.not_before;
                self.hold_back(at);
                continue;
            }
            let alike = refused
                .as_ref()
                .is_some_and(|(items, avoid, _)| part.items >= *items && part.avoid == *avoid);
            if !alike {
                let request = request(&job.order, part.items, part.ceiling, &part.avoid);
                self.judged += self.market.len() as u64;
                match placement::place(&self.market, &request, &self.policy) {
                    Ok(plan) => {
                        let plan = self.stay(id, index, plan);
                        self.ask(now, id, index, plan, out);
                        asked = true;
                        continue;
                    }
                    Err(refusal) => refused = Some((part.items, part.avoid.clone(), refusal)),
                }
            }
            if let Some((_, _, refusal)) = &refused {
                changed |= self.wait(now, id, index, refusal);
            }
        }
        if changed {
            out.push(Effect::Changed(id));
        }
        asked
    }

    /// Parts that follow each other are never in flight together: each may cost what those before it left.
    fn give_what_is_left(&mut self, id: JobId, parts: &[PartIndex]) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let left = job.reserved.saturating_sub(job.spent);
        for part in parts {
            if let Some(part) = job.parts.get_mut(*part as usize) {
                part.ceiling = left;
            }
        }
    }

    /// Work in sequence stays where its last part ran, when another node would be no cheaper: its state is there.
    fn stay(&self, id: JobId, index: PartIndex, mut plan: Plan) -> Plan {
        let before = self
            .jobs
            .get(&id)
            .filter(|job| job.order.work.in_sequence())
            .and_then(|job| job.parts.get(index.checked_sub(1)? as usize))
            .and_then(|before| before.plan.as_ref());
        let Some(here) = before.map(|before| &before.chosen) else {
            return plan;
        };
        let same = |c: &placement::Candidate| {
            c.node == here.node
                && c.device_class == here.device_class
                && c.rate <= plan.chosen.rate
                && !c.busy
        };
        if let Some(found) = plan.alternatives.iter().position(same)
            && plan.chosen.node != here.node
        {
            core::mem::swap(&mut plan.chosen, &mut plan.alternatives[found]);
        }
        plan
    }

    /// Notes why a part waits. The reason is shown, not stored: it is found again after a restart.
    fn wait(&mut self, now: Now, id: JobId, index: PartIndex, refusal: &placement::Refusal) -> bool {
        use placement::Requirement::{Free, Untried};
        let Some(part) = self
            .jobs
            .get_mut(&id)
            .and_then(|j| j.parts.get_mut(index as usize))
        else {
            return false;
        };
        let why = refusal.to_string();
        let changed = part.cause != why;
        part.cause = why;
        if !part.avoid.is_empty() && refusal.excluded_by(Untried) {
            // When only those are left that failed at it, they may try again after a pause; when others are
            // merely busy, after a longer one: a node that is always busy must not hold the part for ever.
            let forgiven = part.changed_at.after(FORGIVE_AFTER);
            let pause = if !refusal.excluded_by(Free) {
                part.avoid.clear();
                Millis(BACKOFF.0 * u64::from(part.failures.clamp(1, 30)))
            } else if forgiven <= now.utc {
                part.avoid.clear();
                BACKOFF
            } else {
                return self.hold_until(now, forgiven, changed);
            };
            part.not_before = now.mono.after(pause);
            let at = part.not_before;
            self.hold_back(at);
        }
        changed
    }

    fn hold_until(&mut self, now: Now, until: UtcMillis, changed: bool) -> bool {
        self.hold_back(now.mono.after(Millis(until.0.saturating_sub(now.utc.0).max(1))));
        changed
    }

    pub(super) fn hold_back(&mut self, until: MonoMillis) {
        self.retry_at = Some(self.retry_at.map_or(until, |at| at.min(until)));
    }

    /// Asks the chosen node. The new fence is on disk before the ask leaves.
    fn ask(&mut self, now: Now, id: JobId, index: PartIndex, plan: Plan, out: &mut Vec<Effect>) {
        let chosen = plan.chosen.clone();
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let Some(part) = job.parts.get_mut(index as usize) else {
            return;
        };
        part.fence += 1;
        part.asked_at = now.utc;
        part.items_done = 0;
        let why = plan.why();
        part.plan = Some(plan.clone());
        let Some(job) = self.jobs.get(&id) else { return };
        let part = &job.parts[index as usize];
        let ask = LeaseAsk {
            key: job.key(index),
            order: job.order.clone(),
            first_item: part.first_item,
            items: part.items,
            device_class: chosen.device_class.clone(),
            devices: 1,
            rate: chosen.rate,
            device_ms_max: self.limit_of(chosen.rate, part),
            ttl: self.config.lease_ttl,
            holders: self.holders(&job.order),
            from: job.state_for(index),
        };
        let key = ask.key;
        self.claim(key, &plan, now.mono.after(self.config.ask_timeout), false);
        self.set_part(now, &key, JobState::Placed, why, out);
        out.push(Effect::Send(chosen.node, ToNode::Ask(Box::new(ask))));
    }

    /// This scheduler's own store first, then nodes that say they hold the model.
    fn holders(&self, order: &Order) -> Vec<Holder> {
        let mut out = vec![Holder {
            key: self.id.0,
            addrs: self.config.artifact_addrs.clone(),
        }];
        let Some(model) = order.work.model() else {
            return out;
        };
        for (node, listing) in self.market.iter() {
            if out.len() > 4 {
                break;
            }
            if listing.connected
                && listing.offer.cached.contains(&model.digest)
                && !listing.offer.artifact_addrs.is_empty()
            {
                out.push(Holder {
                    key: node.0,
                    addrs: listing.offer.artifact_addrs.clone(),
                });
            }
        }
        out
    }

    // Claims.

    pub(super) fn claim(&mut self, key: LeaseKey, plan: &Plan, deadline: MonoMillis, granted: bool) {
        let node = plan.chosen.node;
        let class = plan.chosen.device_class.clone();
        self.market.take(&node, &class, 1);
        self.claims_of.entry(node).or_default().insert(key);
        self.deadlines.insert((deadline, key));
        self.claims.insert(
            key,
            Claim {
                node,
                class,
                devices: 1,
                granted,
                deadline,
            },
        );
    }

    /// Moves a claim's deadline.
    pub(super) fn due(&mut self, key: &LeaseKey, deadline: MonoMillis) {
        if let Some(claim) = self.claims.get_mut(key) {
            self.deadlines.remove(&(claim.deadline, *key));
            claim.deadline = deadline;
            self.deadlines.insert((deadline, *key));
        }
    }

    pub(super) fn unclaim(&mut self, key: &LeaseKey) -> Option<Claim> {
        let claim = self.claims.remove(key)?;
        self.deadlines.remove(&(claim.deadline, *key));
        if let Some(keys) = self.claims_of.get_mut(&claim.node) {
            keys.remove(key);
            if keys.is_empty() {
                self.claims_of.remove(&claim.node);
            }
        }
        self.market.give_back(&claim.node, &claim.class, claim.devices);
        self.look_again = true;
        Some(claim)
    }

    /// Drops the claim of a node that itself said the lease is over.
    pub(super) fn release_claim(&mut self, key: &LeaseKey, node: NodeId) {
        if self.claims.get(key).is_some_and(|c| c.node == node) {
            self.unclaim(key);
        }
    }
}

/// What one part needs, for placement.
pub(super) fn request<'a>(
    order: &'a Order,
    items: u64,
    ceiling: Credits,
    avoid: &'a [NodeId],
) -> Request<'a> {
    let (units, fixed, memory) = Job::work_of(order, items);
    let mut artifacts: Vec<(Digest, Bytes)> = Vec::new();
    if let Some(model) = order.work.model() {
        artifacts.push((model.digest, model.bytes));
        artifacts.push((order.input.digest, order.input.bytes));
    }
    Request {
        kind: order.work.kind(),
        units,
        fixed,
        artifacts,
        constraints: &order.constraints,
        memory,
        ceiling,
        avoid,
    }
}

/// The most device time whose bill stays within `ceiling`.
pub(super) fn device_limit(rate: Rate, ceiling: Credits, longest: Millis) -> DeviceMillis {
    let affordable = (u128::from(ceiling.0) * 3_600_000).checked_div(u128::from(rate.0));
    let affordable = affordable.map_or(u64::MAX, |ms| u64::try_from(ms).unwrap_or(u64::MAX));
    DeviceMillis(affordable.min(longest.0))
}
