//! From the queue to the nodes: what can be placed is asked for, what cannot says why; and what is held for it.
use super::mind::{BACKOFF, Claim, Controller};
use super::{
    Effect,
    deadline::{self, Takes, Urgency},
    guide::shape_of,
    job::{Job, JobState, Part},
};
use crate::{
    exchange::{Holder, LeaseAsk, ToNode},
    fair::Turn,
    id::{Digest, Institution, JobId, LeaseKey, PartIndex},
    key::NodeId,
    placement::{self, Matcher, Plan, Request},
    prelude::*,
    records::Order,
    unit::{Bytes, Credits, DeviceMillis, Millis, MonoMillis, Now, Portion, Rate, UtcMillis},
};
use alloc::{
    boxed::Box,
    collections::{BinaryHeap, VecDeque},
};
use core::cmp::Reverse;

/// A part that found no other node for so long tries those again that failed at it.
const FORGIVE_AFTER: Millis = Millis(60_000);

/// What there is for a part whose job may have a deadline.
pub(super) enum InTime<T> {
    /// This.
    Found(T),
    /// Nothing now, but these would end it in time were they free; and why they and the others do not do.
    Soon(Vec<placement::Candidate>, placement::Refusal),
    /// Nothing now.
    Nowhere,
}

/// Judgements of one look after which it explains no more refusals: a look at every node of a large market for each of
/// many jobs would take seconds. The next look goes on.
const EXPLAINED_MAX: u64 = 400_000;

/// Jobs whose time is found out in one look at most.
const LEARNT_MAX: usize = 16;

/// One job on its way through a look: what is still to be tried, and what was found out on the way.
struct Trial {
    id: JobId,
    waiting: VecDeque<PartIndex>,
    /// Parts that differ in nothing that matters are refused alike: one refusal speaks for the rest.
    refused: Option<(u64, Vec<NodeId>, placement::Refusal)>,
    /// Parts of the same size cost the same on every class.
    matcher: Option<(u64, Matcher)>,
    /// Where advice narrows the choice: what there would be without it, for as many items.
    freely: Option<(u64, Matcher)>,
}

impl Controller {
    /// Places what can be placed. Institutions take turns part by part, the one furthest under its share first; of
    /// its jobs the oldest comes first. A part that fits nowhere never holds up the ones behind it.
    pub(super) fn place_all(&mut self, now: Now, out: &mut Vec<Effect>) {
        self.consult(now);
        if self.guide.is_some() {
            // First as the slow path advises. What that leaves free is anybody's, at its shadow price.
            self.look(now, true, out);
        }
        self.look(now, false, out);
    }

    fn look(&mut self, now: Now, guided: bool, out: &mut Vec<Effect>) {
        let mut queues: BTreeMap<Institution, VecDeque<JobId>> = BTreeMap::new();
        self.learn_times();
        let mut urgent: Vec<(UtcMillis, JobId)> = Vec::new();
        for (_, id) in &self.queue {
            if let Some(job) = self.jobs.get(id) {
                let queue = queues.entry(job.order.institution.clone()).or_default();
                match job.order.constraints.deadline {
                    Some(deadline) if self.is_urgent(now, job) => urgent.push((deadline, *id)),
                    _ => queue.push_back(*id),
                }
            }
        }
        // Within an institution those come first that would be late otherwise, the earliest deadline before all.
        urgent.sort_unstable();
        for (_, id) in urgent.into_iter().rev() {
            if let Some(queue) = self
                .jobs
                .get(&id)
                .and_then(|job| queues.get_mut(&job.order.institution))
            {
                queue.push_front(id);
            }
        }
        let targets = self.fair.targets(now.utc, queues.keys());
        let mut turns: BinaryHeap<Reverse<(Turn, Institution)>> = targets
            .iter()
            .map(|(name, target)| Reverse((self.fair.turn(now.utc, name, *target), (*name).clone())))
            .collect();
        let targets: BTreeMap<Institution, u64> =
            targets.into_iter().map(|(name, t)| (name.clone(), t)).collect();
        let mut trials: BTreeMap<Institution, Trial> = BTreeMap::new();
        let mut free = self.market.any_free();
        while let Some(Reverse((_, name))) = turns.pop() {
            let Some(queue) = queues.get_mut(&name) else {
                continue;
            };
            let Some(id) = queue.front().copied() else {
                continue;
            };
            let mut trial = match trials.remove(&name) {
                Some(trial) if trial.id == id => trial,
                _ => match self.trial(id, free) {
                    Some(trial) => trial,
                    None => {
                        queue.pop_front();
                        let target = targets.get(&name).copied().unwrap_or(1);
                        turns.push(Reverse((self.fair.turn(now.utc, &name, target), name)));
                        continue;
                    }
                },
            };
            self.open_rooms(&name);
            let asked = self.place_next(now, &mut trial, guided, out);
            self.close_rooms(&name);
            if asked {
                free = self.market.any_free();
                trials.insert(name.clone(), trial);
            } else {
                queue.pop_front();
            }
            let target = targets.get(&name).copied().unwrap_or(1);
            turns.push(Reverse((self.fair.turn(now.utc, &name, target), name)));
        }
    }

    /// Finds out how long jobs with a deadline take, once something is known that could run them.
    fn learn_times(&mut self) {
        let unknown: Vec<JobId> = self
            .queue
            .iter()
            .filter_map(|(_, id)| self.jobs.get(id))
            .filter(|job| job.takes.is_none() && job.order.constraints.deadline.is_some())
            .map(|job| job.id)
            .take(LEARNT_MAX)
            .collect();
        for id in unknown {
            let takes = self.jobs.get(&id).and_then(|job| self.takes(job));
            self.judged += self.market.len() as u64;
            if let Some(job) = self.jobs.get_mut(&id) {
                job.takes = takes;
            }
        }
    }

    /// What is to be tried of a job; nothing when nothing is free anywhere and all its parts have a reason.
    fn trial(&mut self, id: JobId, free: bool) -> Option<Trial> {
        let job = self.jobs.get(&id)?;
        let told = |job: &Job| {
            job.parts
                .iter()
                .all(|p| p.state != JobState::Queued || !p.cause.is_empty())
        };
        // What is kept for it is free for it alone.
        let own =
            self.kept.contains_key(&id) || self.rooms.iter().any(|room| room.is_for(&job.order.institution));
        if !free && !own && told(job) {
            return None;
        }
        let waiting: VecDeque<PartIndex> = (0u32..)
            .zip(&job.parts)
            .filter(|(i, p)| p.state == JobState::Queued && job.is_next(*i))
            .map(|(i, _)| i)
            .collect();
        if job.order.work.in_sequence() {
            self.give_what_is_left(id, &waiting);
        }
        Some(Trial {
            id,
            waiting,
            refused: None,
            matcher: None,
            freely: None,
        })
    }

    /// Parts that follow each other are never in flight together: each may cost what those before it left.
    fn give_what_is_left(&mut self, id: JobId, parts: &VecDeque<PartIndex>) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let left = job.reserved.saturating_sub(job.spent);
        for part in parts {
            if let Some(part) = job.parts.get_mut(*part as usize) {
                part.ceiling = left;
            }
        }
    }

    /// Asks for the next part of a job that fits somewhere. Says whether there was one.
    fn place_next(&mut self, now: Now, trial: &mut Trial, guided: bool, out: &mut Vec<Effect>) -> bool {
        let mut changed = false;
        let mut asked = false;
        if self
            .jobs
            .get(&trial.id)
            .is_some_and(|job| job.order.constraints.together)
        {
            let waiting = core::mem::take(&mut trial.waiting);
            // Its parts are tried once in a look, all of them; advice is for parts one by one.
            return !guided && self.place_together(now, trial.id, &waiting, out);
        }
        while let Some(index) = trial.waiting.pop_front() {
            let Some(job) = self.jobs.get(&trial.id) else {
                break;
            };
            let part = &job.parts[index as usize];
            if part.not_before > now.mono {
                let at = part.not_before;
                self.hold_back(at);
                continue;
            }
            let shape = if guided {
                shape_of(&job.order, self.guide.as_ref().is_some_and(|guide| guide.by_user))
            } else {
                Digest([0; 32])
            };
            let quota = self.guide.as_ref().and_then(|guide| guide.quotas.get(&shape));
            if guided && quota.is_none() {
                break;
            }
            let alike = trial
                .refused
                .as_ref()
                .is_some_and(|(items, avoid, _)| part.items >= *items && part.avoid == *avoid);
            if !alike {
                let mut request = request(&job.order, part.items, part.ceiling, &part.avoid);
                request.turn = turn_of(&job.key(index));
                let known = trial.matcher.take().filter(|(items, _)| *items == part.items);
                let make = || {
                    let allowed = |group| quota.is_none_or(|quota| quota.contains_key(&group));
                    (part.items, Matcher::within(&self.market, &request, allowed))
                };
                let (_, ready) = trial.matcher.insert(known.unwrap_or_else(make));
                self.judged += 1;
                let find = |wish: &Request<'_>| ready.place(&self.market, wish);
                match self.in_time(now, job, &request, find) {
                    InTime::Found(plan) => {
                        let advised = guided && {
                            let known = trial.freely.take().filter(|(items, _)| *items == part.items);
                            let make = || (part.items, Matcher::new(&self.market, &request));
                            let (_, all) = trial.freely.insert(known.unwrap_or_else(make));
                            all.place(&self.market, &request).is_some_and(|free| {
                                let mut others = free.alternatives.iter().chain([&free.chosen]);
                                others.any(|other| other.cost < plan.chosen.cost)
                            })
                        };
                        if guided && self.spend_quota(&shape, &plan) {
                            trial.matcher = None;
                        }
                        let plan = Plan { advised, ..plan };
                        let plan = self.stay(trial.id, index, plan);
                        let Some(plan) = self.route(now, trial.id, index, plan) else {
                            continue;
                        };
                        self.ask(now, trial.id, index, plan, out);
                        asked = true;
                        break;
                    }
                    // Where the advice does not reach, the second look does.
                    InTime::Soon(..) | InTime::Nowhere if guided => break,
                    InTime::Soon(_, why) => {
                        self.judged += self.market.len() as u64;
                        trial.refused = Some((part.items, part.avoid.clone(), why));
                        self.hold_back(now.mono.after(BACKOFF));
                    }
                    // Why can wait for the next look, the sooner where something was said before.
                    InTime::Nowhere if self.explains_no_more(part) => {
                        self.hold_back(now.mono.after(BACKOFF));
                        break;
                    }
                    InTime::Nowhere => {
                        self.judged += self.market.len() as u64;
                        let why = placement::refuse(&self.market, &request, &self.policy);
                        trial.refused = Some((part.items, part.avoid.clone(), why));
                    }
                }
            }
            if let Some((_, _, refusal)) = &trial.refused {
                changed |= self.wait(now, trial.id, index, refusal);
            }
        }
        if changed {
            out.push(Effect::Changed(trial.id));
        }
        asked
    }

    /// The first of a job's wishes that something meets: an end in time, where there is time to lose hardly any.
    ///
    /// While something that is only busy could still end it in time, it waits for that. What can no longer end in
    /// time goes wherever it can.
    pub(super) fn in_time<T>(
        &self,
        now: Now,
        job: &Job,
        request: &Request<'_>,
        mut find: impl FnMut(&Request<'_>) -> Option<T>,
    ) -> InTime<T> {
        let of = |found| match found {
            Some(found) => InTime::Found(found),
            None => InTime::Nowhere,
        };
        let left = deadline::left(job, now.utc);
        if left.is_none() {
            return of(find(request));
        }
        let needs = deadline::needs(job, job.takes.unwrap_or_default());
        let urgency = deadline::urgency(left, needs, self.policy.restart);
        let open = match job.order.work.in_sequence() {
            true => job.parts.iter().filter(|part| !part.state.ended()).count(),
            false => 1,
        };
        let wishes = deadline::wishes(request, left, urgency, open);
        if let Some(found) = wishes.iter().find_map(&mut find) {
            return InTime::Found(found);
        }
        if let Some(wish) = wishes.last() {
            let (able, why) = placement::survey(&self.market, wish, &self.policy);
            if !able.is_empty() {
                return InTime::Soon(able, why);
            }
        }
        of(find(request))
    }

    /// A quarter of what a look may spend on explaining is for those that were told something already.
    fn explains_no_more(&self, part: &Part) -> bool {
        let most = match part.cause.is_empty() {
            true => EXPLAINED_MAX,
            false => EXPLAINED_MAX / 4,
        };
        // Who avoids nodes may be forgiven them, which is found out on the way.
        self.judged > most && part.avoid.is_empty()
    }

    /// How urgent a job is, for its place among those of its institution.
    fn is_urgent(&self, now: Now, job: &Job) -> bool {
        let Some(takes) = job.takes else { return false };
        let left = deadline::left(job, now.utc);
        deadline::urgency(left, deadline::needs(job, takes), self.policy.restart) == Urgency::Tight
    }

    /// How long the largest part of a job would take at its quickest, whether that is free or not.
    pub(super) fn takes(&self, job: &Job) -> Option<Takes> {
        let part = job.parts.iter().max_by_key(|part| part.items)?;
        let request = request(&job.order, part.items, Credits(u64::MAX), &[]);
        let (able, _) = placement::survey(&self.market, &request, &self.policy);
        let takes = |c: &placement::Candidate| c.duration.saturating_add(c.transfer);
        let quickest = able.iter().map(takes).min()?;
        let reliable = able.iter().filter(|c| {
            let listing = self.market.get(&c.node);
            listing.is_some_and(|listing| placement::is_reliable(listing, c.duration))
        });
        let surely = reliable.map(takes).min().unwrap_or(quickest);
        Some(Takes { quickest, surely })
    }

    /// Takes one from what the advice allows that shape there. Says whether that was the last.
    fn spend_quota(&mut self, shape: &Digest, plan: &Plan) -> bool {
        let group = self.market.get(&plan.chosen.node).and_then(|listing| {
            let i = listing
                .offer
                .devices
                .iter()
                .position(|d| d.class == plan.chosen.device_class)?;
            listing.groups.get(i).copied()
        });
        let quota = self.guide.as_mut().and_then(|guide| guide.quotas.get_mut(shape));
        let (Some(group), Some(quota)) = (group, quota) else {
            return false;
        };
        match quota.get_mut(&group) {
            Some(left) if *left > 1 => {
                *left -= 1;
                false
            }
            _ => {
                quota.remove(&group);
                true
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
    pub(super) fn ask(&mut self, now: Now, id: JobId, index: PartIndex, plan: Plan, out: &mut Vec<Effect>) {
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
            devices: job.order.constraints.devices(),
            rate: chosen.rate,
            device_ms_max: self.limit_of(chosen.rate, part, job.order.constraints.devices()),
            ttl: self.config.lease_ttl,
            holders: self.holders(&job.order),
            from: job.state_for(index),
            input: Vec::new(),
            here: false,
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
        for handle in self.market.holders(&model.digest) {
            if out.len() > 4 {
                break;
            }
            let Some((node, listing)) = self.market.at(handle) else {
                continue;
            };
            if listing.connected && !listing.offer.artifact_addrs.is_empty() {
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
        let devices = self
            .jobs
            .get(&key.job)
            .map_or(Portion::ONE, |job| job.order.constraints.devices());
        self.market.take(&node, &class, devices);
        let counted = self.jobs.get(&key.job).map(|job| {
            let time = devices.time(plan.chosen.duration);
            let donated = self.fair.shares().donated.bill(time).unwrap_or_default();
            (job.order.institution.clone(), plan.chosen.cost.max(donated))
        });
        if let Some((institution, worth)) = &counted {
            self.fair.start(institution, *worth);
        }
        self.claims_of.entry(node).or_default().insert(key);
        self.deadlines.insert((deadline, key));
        self.claims.insert(
            key,
            Claim {
                node,
                class,
                devices,
                granted,
                deadline,
                counted,
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
        self.guest_left(key);
        if let Some((institution, worth)) = &claim.counted {
            self.fair.stop(institution, *worth);
        }
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
        if model.is_content() {
            artifacts.push((model.digest, model.bytes));
        }
        artifacts.push((order.input.digest, order.input.bytes));
    }
    Request {
        kind: order.work.kind(),
        units,
        fixed,
        model: order.work.model().copied(),
        artifacts,
        constraints: &order.constraints,
        memory,
        ceiling,
        avoid,
        devices: order.constraints.devices(),
        user: Some(&order.institution),
        waited_for: super::questions::is_question(order),
        ..Request::default()
    }
}

/// The most device time whose bill stays within `ceiling`.
pub(super) fn device_limit(rate: Rate, ceiling: Credits, longest: DeviceMillis) -> DeviceMillis {
    let affordable = (u128::from(ceiling.0) * 3_600_000).checked_div(u128::from(rate.0));
    let affordable = affordable.map_or(u64::MAX, |ms| u64::try_from(ms).unwrap_or(u64::MAX));
    DeviceMillis(affordable.min(longest.0))
}

/// Spreads equals: of two parts, or two schedulers, hardly any take the same turn.
fn turn_of(key: &LeaseKey) -> u32 {
    let start = key
        .job
        .0
        .0
        .first_chunk()
        .map_or(0, |bytes| u32::from_le_bytes(*bytes));
    let step = key.part.wrapping_add(key.fence as u32).wrapping_add(1);
    // The golden ratio's share of 2³²: consecutive steps land far apart.
    start.wrapping_add(step.wrapping_mul(0x9e37_79b9))
}
