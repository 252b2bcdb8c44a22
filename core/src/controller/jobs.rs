//! Jobs from their order to their end: admitted, cut into parts, kept in the queue, closed.
use super::mind::{CLOCK_SKEW_MAX, Controller, SPENT};
use super::placing::request;
use super::{
    Denial, Effect, deadline,
    job::{JOBS, Job, JobState, PARTS, part_row},
    user,
};
use crate::{
    exchange::ToNode,
    id::{JobId, LeaseKey, PartIndex},
    key::PublicKey,
    money::{Account, Posting, PostingKind},
    placement::{self},
    prelude::*,
    records::{Order, Role, Verified, Work},
    store::{Change, put},
    unit::{Credits, Millis, Now, Rate, UtcMillis},
};

/// How long an order may be acceptable: its job, once dropped from the list, is remembered that long.
pub const ORDER_LIFE_MAX: Millis = Millis(24 * 3_600_000);
/// Up to so many nodes are looked at one by one to cut a job; of more, their classes say enough.
const LOOKED_AT_MAX: usize = 2_000;
/// The most dropped jobs whose orders have not expired; at the bound new orders wait until some have.
pub const SPENT_MAX: usize = 1_000_000;

impl Controller {
    pub(super) fn submit(
        &mut self,
        now: Now,
        caller: PublicKey,
        order: Verified<Order>,
        label: String,
        wait: bool,
        out: &mut Vec<Effect>,
    ) -> Result<JobId, Denial> {
        let member = self.need(caller, Role::User)?;
        self.still_delegated(now, caller)?;
        let id = JobId(order.id());
        let no = |why: &str| Err(Denial::Order(why.into()));
        if order.user.0 != caller {
            return no("is signed by another key than the caller's");
        }
        if self.jobs.contains_key(&id) {
            return Ok(id);
        }
        if order.scheduler != self.id {
            return no("is for another scheduler: run `karez join` with an invitation of the one you mean");
        }
        if order.institution != member.institution {
            return no(&format!(
                "names {}, but its user belongs to {}",
                order.institution, member.institution
            ));
        }
        if order.expires_at <= now.utc || order.issued_at > now.utc.after(CLOCK_SKEW_MAX) {
            return no("is dated wrongly or has expired: check this machine's clock and submit again");
        }
        if order.expires_at > now.utc.after(ORDER_LIFE_MAX).after(CLOCK_SKEW_MAX) {
            return no("may be accepted for too long: sign one that expires within a day");
        }
        if self.spent.contains(&id) {
            return no("was carried out before and is no longer listed: submit a new one");
        }
        contradictions(now.utc, &order)?;
        self.forget_spent(now, out);
        if self.spent.len() >= SPENT_MAX {
            return Err(Denial::Queue {
                open: self.spent.len(),
                max: SPENT_MAX,
            });
        }
        let open = self.jobs.len() - self.ended.len();
        if open >= self.config.jobs_open_max {
            return Err(Denial::Queue {
                open,
                max: self.config.jobs_open_max,
            });
        }
        let mine = self.open_of.get(&order.user).map_or(0, BTreeSet::len);
        if mine >= self.config.jobs_open_user_max {
            return Err(Denial::Queue {
                open: mine,
                max: self.config.jobs_open_user_max,
            });
        }
        // A delegated key has its own budget and nothing else: no grant of its institution's.
        let own_only = self.delegation(&caller).is_some();
        let grant = if own_only {
            None
        } else {
            self.grant_for(now, &order)
        };
        let granted = grant.map_or(Credits::ZERO, |(_, left)| left);
        let has = self.budget(user(caller)).saturating_add(granted);
        if order.credits_max > has {
            return Err(Denial::Budget {
                has,
                wants: order.credits_max,
            });
        }
        let (slots, takes) = self.slots(&order);
        let order_max = order.credits_max;
        let mut job = Job::new(
            order,
            label.chars().filter(|c| !c.is_control()).take(120).collect(),
            now.utc,
            slots,
            takes,
        );
        let shunned = self.shunned(now, &job.order);
        if let Some(part) = job.parts.first_mut() {
            part.avoid = shunned;
        }
        if !wait && let Some(first) = job.parts.first() {
            let request = request(&job.order, first.items, first.ceiling, &[]);
            let request = placement::Request {
                within: deadline::left(&job, now.utc),
                ..request
            };
            if let Err(refusal) = placement::place(&self.market, &request, &self.policy)
                && !refusal.passes_with_time()
            {
                return Err(Denial::Unplaceable(refusal));
            }
        }
        let mut changes = Vec::new();
        if job.reserved > Credits::ZERO {
            // Grants first: they expire.
            let from_grant = job.reserved.min(granted);
            let own = job.reserved.saturating_sub(from_grant);
            let mut legs = Vec::with_capacity(3);
            let leg = |credits: Credits| {
                credits.leg().ok_or(Denial::Budget {
                    has,
                    wants: order_max,
                })
            };
            if let Some((id, _)) = grant {
                legs.push((Account::Grant(id), -leg(from_grant)?));
                job.grant = Some((id, from_grant));
            }
            if own > Credits::ZERO {
                legs.push((Account::User(job.order.user), -leg(own)?));
            }
            legs.push((Account::Escrow(id), leg(job.reserved)?));
            let posting = Posting {
                kind: PostingKind::Reserve,
                legs,
                evidence: vec![job.order.encode()],
            };
            self.accounts.apply(&posting).map_err(Denial::Ledger)?;
            changes.push(Change::Post { posting, at: now.utc });
        }
        if let Some(first) = job.parts.first() {
            let parts = job.parts.len() as u64;
            let (items, ceiling) = (first.items, first.ceiling);
            self.forecast.note(now.mono, &job.order, parts, items, ceiling);
        }
        job.note(
            now.utc,
            None,
            format!("accepted: {} items in {} parts", job.order.items, job.parts.len()),
        );
        changes.push(put(JOBS, &id.0.0, &job));
        for (i, part) in (0u32..).zip(&job.parts) {
            changes.push(put(PARTS, &part_row(id, i), part));
        }
        self.jobs.insert(id, job);
        self.index(id);
        self.look_again = true;
        out.push(Effect::Persist(changes));
        out.push(Effect::Changed(id));
        Ok(id)
    }

    /// How many parts of this order could run at once on the nodes known now, and how long all of it would take on a
    /// middling one of them.
    pub(super) fn slots(&self, order: &Order) -> (u64, Option<Millis>) {
        // So many items that a speed is not lost in rounding, so few that none are too many for a node.
        let items = order.items.clamp(1, 1_000);
        let request = request(order, items, Credits(u64::MAX), &[]);
        // How long it takes, on how many places, and how many parts those could hold.
        let mut able: Vec<(Millis, u32, u64)> = if self.market.len() > LOOKED_AT_MAX {
            self.market.stock().capacity(&request, &self.policy)
        } else {
            let (able, _) = placement::survey(&self.market, &request, &self.policy);
            let seats = |c: &placement::Candidate| {
                let listing = self.market.get(&c.node)?;
                let devices = &listing.offer.devices;
                let at = devices.iter().position(|d| d.class == c.device_class)?;
                Some(u64::from(listing.seats_at_most(at, request.devices)))
            };
            let able = able.iter();
            able.map(|c| (c.duration, 1, seats(c).unwrap_or(0))).collect()
        };
        able.sort_unstable();
        let slots = able
            .iter()
            .fold(0u64, |sum, (_, _, seats)| sum.saturating_add(*seats));
        let mut before = able.iter().map(|(_, places, _)| u64::from(*places)).sum::<u64>() / 2;
        let middling = able.iter().find(|(_, places, _)| {
            let found = before < u64::from(*places);
            before = before.saturating_sub(u64::from(*places));
            found
        });
        // What runs at the same time is cut for the devices there are.
        let known = middling.filter(|_| !order.constraints.together);
        let whole = known.map(|(takes, ..)| {
            let whole = u128::from(takes.0) * u128::from(order.items) / u128::from(items);
            Millis(u64::try_from(whole).unwrap_or(u64::MAX))
        });
        (slots.max(1), whole)
    }

    pub(super) fn cancel(
        &mut self,
        now: Now,
        caller: PublicKey,
        id: JobId,
        out: &mut Vec<Effect>,
    ) -> Result<(), Denial> {
        let job = self.jobs.get(&id).filter(|j| j.order.user.0 == caller);
        let job = job.ok_or_else(|| Denial::NoJob(id.short()))?;
        if !job.state.ended() {
            self.end_job(now, id, JobState::Cancelled, "cancelled by its user".into(), out);
        }
        Ok(())
    }

    pub(super) fn fail_job(&mut self, now: Now, key: LeaseKey, cause: String, out: &mut Vec<Effect>) {
        self.set_part(now, &key, JobState::Failed, cause.clone(), out);
        self.end_job(now, key.job, JobState::Failed, cause, out);
    }

    /// Ends a job before its time: stops what runs, and gives back what is left in escrow.
    pub(super) fn end_job(
        &mut self,
        now: Now,
        id: JobId,
        state: JobState,
        cause: String,
        out: &mut Vec<Effect>,
    ) {
        let Some(job) = self.jobs.get(&id) else { return };
        let open: Vec<PartIndex> = (0u32..)
            .zip(&job.parts)
            .filter(|(_, p)| !p.state.ended())
            .map(|(i, _)| i)
            .collect();
        for part in open {
            let key = self.jobs[&id].key(part);
            if let Some(claim) = self.claims.get(&key) {
                out.push(Effect::Send(
                    claim.node,
                    ToNode::Stop {
                        key,
                        cause: cause.clone(),
                    },
                ));
            }
            self.set_part(now, &key, JobState::Cancelled, cause.clone(), out);
        }
        if let Some(job) = self.jobs.get_mut(&id) {
            job.state = state;
            job.cause = cause;
        }
        self.close(now, id, out);
    }

    /// The job has ended: its row says so, escrow is emptied, and the oldest ended jobs make room.
    pub(super) fn close(&mut self, now: Now, id: JobId, out: &mut Vec<Effect>) {
        self.let_go(&id);
        let Some(job) = self.jobs.get_mut(&id) else { return };
        job.changed_at = now.utc;
        let text = if job.cause.is_empty() {
            job.state.as_str().into()
        } else {
            format!("{}: {}", job.state.as_str(), job.cause)
        };
        job.note(now.utc, None, text);
        let mut changes = vec![put(JOBS, &id.0.0, job)];
        let left = self.accounts.balance(&Account::Escrow(id));
        if let Ok(left @ 1..) = u64::try_from(left)
            && let Some(posting) = release(job, id, Credits(left))
            && self.accounts.apply(&posting).is_ok()
        {
            changes.push(Change::Post { posting, at: now.utc });
        }
        self.index(id);
        while self.ended.len() > self.config.jobs_kept {
            let Some((_, oldest)) = self.ended.pop_first() else {
                break;
            };
            if let Some(job) = self.jobs.remove(&oldest) {
                // Its order may come again while it could be accepted, and must not run or reserve twice.
                let until = job.order.expires_at;
                if until > now.utc {
                    self.spent.insert(oldest);
                    self.spent_until.insert((until, oldest));
                    changes.push(put(SPENT, &oldest.0.0, &until));
                }
                changes.push(Change::Delete {
                    table: JOBS,
                    key: oldest.0.0.to_vec(),
                });
                changes.extend((0u32..).zip(&job.parts).map(|(i, _)| Change::Delete {
                    table: PARTS,
                    key: part_row(oldest, i),
                }));
            }
        }
        out.push(Effect::Persist(changes));
        out.push(Effect::Changed(id));
    }

    /// Orders that have expired are refused by their date.
    fn forget_spent(&mut self, now: Now, out: &mut Vec<Effect>) {
        let mut changes = Vec::new();
        while let Some((until, job)) = self.spent_until.first().copied()
            && until <= now.utc
        {
            self.spent_until.remove(&(until, job));
            self.spent.remove(&job);
            changes.push(Change::Delete {
                table: SPENT,
                key: job.0.0.to_vec(),
            });
        }
        if !changes.is_empty() {
            out.push(Effect::Persist(changes));
        }
    }

    /// Keeps the queue and the list of ended jobs in step with a job's state.
    pub(super) fn index(&mut self, id: JobId) {
        let Some(job) = self.jobs.get(&id) else { return };
        let place = (job.submitted_at, id);
        if !job.state.ended() && job.parts.iter().any(|p| p.state == JobState::Queued) {
            self.queue.insert(place);
        } else {
            self.queue.remove(&place);
        }
        if job.state.ended() {
            self.ended.insert(place);
            if let Some(open) = self.open_of.get_mut(&job.order.user) {
                open.remove(&id);
                if open.is_empty() {
                    self.open_of.remove(&job.order.user);
                }
            }
        } else {
            self.open_of.entry(job.order.user).or_default().insert(id);
        }
    }

    /// Moves a part, notes it, stores it, and lets the job's state follow.
    pub(super) fn set_part(
        &mut self,
        now: Now,
        key: &LeaseKey,
        state: JobState,
        cause: String,
        out: &mut Vec<Effect>,
    ) {
        let Some(job) = self.jobs.get_mut(&key.job) else {
            return;
        };
        let Some(part) = job.parts.get_mut(key.part as usize) else {
            return;
        };
        part.state = state;
        part.changed_at = now.utc;
        part.cause.clone_from(&cause);
        let mut changes = vec![put(PARTS, &part_row(key.job, key.part), part)];
        let place = match &part.plan {
            Some(plan) if part.in_flight() => format!(" on {}", plan.chosen.name),
            _ => String::new(),
        };
        let text = if cause.is_empty() {
            format!("{}{place}", state.as_str())
        } else {
            format!("{}{place}: {cause}", state.as_str())
        };
        job.note(now.utc, Some(key.part), text);
        let of_parts = job.state_of_parts();
        if !job.state.ended() && !of_parts.ended() && of_parts != job.state {
            job.state = of_parts;
            job.changed_at = now.utc;
            changes.push(put(JOBS, &key.job.0.0, job));
        }
        out.push(Effect::Persist(changes));
        out.push(Effect::Changed(key.job));
        self.index(key.job);
    }
}

/// Wishes that no market could ever meet.
pub(super) fn contradictions(now: UtcMillis, order: &Order) -> Result<(), Denial> {
    let c = &order.constraints;
    let no = |why: String| Err(Denial::Order(why));
    if !c.countries.is_empty() && c.countries.iter().all(|code| c.countries_excluded.contains(code)) {
        return no(format!(
            "contradicts itself: every country it allows is also excluded ({})",
            c.countries[0]
        ));
    }
    if !c.institutions.is_empty()
        && c.institutions
            .iter()
            .all(|name| c.institutions_excluded.contains(name))
    {
        return no(format!(
            "contradicts itself: every institution it allows is also excluded ({})",
            c.institutions[0]
        ));
    }
    if let Some(deadline) = c.deadline
        && deadline <= now
    {
        return no(format!(
            "contradicts itself: its deadline lies {} s in the past",
            (now.0 - deadline.0).div_ceil(1_000)
        ));
    }
    if c.share_milli > 0 && c.devices > 1 {
        return no(format!(
            "contradicts itself: each part should take {} devices, and a share of one",
            c.devices
        ));
    }
    if c.together && order.work.in_sequence() {
        return no("contradicts itself: its parts follow each other, and should run together".into());
    }
    if let Some(rate) = c.rate_max.filter(|rate| c.donated_only && *rate > Rate::FREE) {
        return no(format!(
            "contradicts itself: only donated capacity is wanted, and up to {rate} is offered for it"
        ));
    }
    if let Work::Noop { .. } = order.work
        && !c.licence.is_empty()
    {
        return no(format!(
            "contradicts itself: it runs no model, yet names the licence {} of one",
            c.licence
        ));
    }
    Ok(())
}

/// What is left of a job's escrow goes back to where it came from: the user's own credits were the last to be spent.
fn release(job: &Job, id: JobId, left: Credits) -> Option<Posting> {
    let own = match job.grant {
        Some((_, from_grant)) => left.min(job.reserved.saturating_sub(from_grant)),
        None => left,
    };
    let mut legs = vec![
        (Account::Escrow(id), -left.leg()?),
        (Account::User(job.order.user), own.leg()?),
    ];
    if let Some((grant, _)) = job.grant {
        legs.push((Account::Grant(grant), left.saturating_sub(own).leg()?));
    }
    Some(Posting {
        kind: PostingKind::Release,
        legs,
        evidence: Vec::new(),
    })
}
