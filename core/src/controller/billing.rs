//! From a node's usage to a countersigned receipt and a balanced posting.
use super::{
    Effect,
    job::{JOBS, JobState, Part, work_units},
    mind::{Controller, SHARES},
};
use crate::{
    exchange::{FinishedLease, ToNode},
    id::LeaseKey,
    key::NodeId,
    market::Shown,
    money::{Account, Posting, PostingKind},
    prelude::*,
    records::{Flag, Meters, Outcome, Receipt, Signed, Verified, Work, check_trail},
    store::{Change, put},
    unit::{Credits, DeviceMillis, Millis, Now, Rate},
};

impl Controller {
    pub(super) fn on_finished(
        &mut self,
        now: Now,
        node: NodeId,
        finished: FinishedLease,
        out: &mut Vec<Effect>,
    ) {
        let key = finished.lease.key();
        if finished.lease.node != node {
            out.push(Effect::Log(format!(
                "{} sent a lease of another node",
                node.short()
            )));
            return;
        }
        self.release_claim(&key, node);
        let moved = self.moving.remove(&key);
        // Only an attempt that still stands can come to nothing here: one given up before was counted then.
        let stands = self.is_wanted(&key) && self.placed_on(&key, node);
        let settled = |why: String| {
            Effect::Send(
                node,
                ToNode::Settled {
                    key,
                    receipt: None,
                    why,
                },
            )
        };
        if let Err(why) = self.counts(&key, node, &finished) {
            if stands {
                // The node has spoken its last word on it, and nothing can be billed: without this the part
                // would wait for it for ever.
                self.market.note_failure(&node);
                let why = format!("{} told what cannot be billed: {why}", self.name(&node));
                self.retry(now, key, &node, why, true, out);
            }
            out.push(settled(why));
            return;
        }
        match self.bill(now, &key, &finished, out) {
            Ok(receipt) => {
                let done = finished.usage.outcome == Outcome::Done;
                let credits = receipt.credits;
                out.push(Effect::Send(
                    node,
                    ToNode::Settled {
                        key,
                        receipt: Some(receipt),
                        why: String::new(),
                    },
                ));
                self.follow(
                    now,
                    key,
                    node,
                    &finished,
                    done,
                    credits,
                    Standing { stands, moved },
                    out,
                );
            }
            Err(why) => {
                // The trail holds, but the book refuses: the part must not be lost over it.
                out.push(Effect::Log(format!("{key} could not be settled: {why}")));
                out.push(settled(why.clone()));
                if stands {
                    self.retry(now, key, &node, why, true, out);
                }
            }
        }
    }

    /// Is this the one attempt that counts, as its node tells it?
    fn counts(&self, key: &LeaseKey, node: NodeId, finished: &FinishedLease) -> Result<(), String> {
        let job = self
            .jobs
            .get(&key.job)
            .ok_or("no such job is known here any more")?;
        let part = job
            .parts
            .get(key.part as usize)
            .ok_or("the job has no such part")?;
        if part.fence != key.fence || part.settled >= key.fence {
            return Err("another attempt counts".into());
        }
        let plan = part.plan.as_ref().ok_or("the part was never placed")?;
        if plan.chosen.node != node {
            return Err("the part was placed on another node".into());
        }
        let lease = &finished.lease;
        let same = lease.first_item == part.first_item
            && lease.items == part.items
            && lease.device_class == plan.chosen.device_class
            && lease.devices == job.order.constraints.devices()
            && lease.rate <= plan.chosen.rate
            && lease.device_ms_max <= self.limit_of(plan.chosen.rate, part, lease.devices)
            && self
                .members
                .get(&node.0)
                .is_some_and(|m| m.institution == lease.institution);
        if !same {
            return Err("the lease is not the one that was asked for".into());
        }
        if finished.usage.outcome == Outcome::Done && finished.usage.result.is_none() {
            return Err("it is said to be done, but no result is named".into());
        }
        check_trail(&job.order, lease, &finished.readings, &finished.usage).map_err(|e| e.to_string())
    }

    /// Countersigns and posts: the receipt, the balanced entry and the part's new state are one transaction.
    fn bill(
        &mut self,
        now: Now,
        key: &LeaseKey,
        finished: &FinishedLease,
        out: &mut Vec<Effect>,
    ) -> Result<Verified<Receipt>, String> {
        let (lease, usage) = (&finished.lease, &finished.usage);
        let Some(job) = self.jobs.get(&key.job) else {
            return Err("no such job".into());
        };
        let Some(part) = job.parts.get(key.part as usize) else {
            return Err("no such part".into());
        };
        let observed = lease
            .devices
            .time(Millis(now.utc.0.saturating_sub(part.asked_at.0)));
        let done = usage.outcome == Outcome::Done && !part.state.ended();
        let mut receipt = Receipt {
            usage: usage.id(),
            lease: lease.id(),
            job: key.job,
            scheduler: self.id,
            node: lease.node,
            node_institution: lease.institution.clone(),
            user: job.order.user,
            user_institution: job.order.institution.clone(),
            observed,
            billed: DeviceMillis::ZERO,
            credits: Credits::ZERO,
            flags: Vec::new(),
            issued_at: now.utc,
            disputable_until: now.utc.after(self.config.dispute_window),
            rate_card: self.rate_card().map_or(0, |card| card.version),
        };
        let (measured, allowed) = (usage.meters.device_ms, lease.device_ms_max);
        let remarks = receipt.remarks(measured, allowed).into_iter();
        receipt.flags = remarks.filter(|(_, due)| *due).map(|(flag, _)| flag).collect();
        if done {
            receipt.billed = receipt.due(measured, allowed);
            receipt.credits = lease.rate.bill(receipt.billed).unwrap_or(Credits(u64::MAX));
        } else {
            receipt.flags.push(Flag::NotDone);
        }
        if receipt.credits > part.ceiling {
            receipt.flags.push(Flag::CutToCeiling);
            receipt.credits = part.ceiling;
        }
        let credits = receipt.credits;
        let receipt = Signed::sign(receipt, &self.config.secret);
        let mut evidence = vec![job.order.encode(), lease.encode()];
        evidence.extend(finished.readings.iter().map(Verified::encode));
        evidence.push(usage.encode());
        evidence.push(receipt.encode());
        let (from, to) = (
            Account::Escrow(key.job),
            Account::Institution(lease.institution.clone()),
        );
        let posting = Posting::transfer(PostingKind::Settle, from, to, credits, evidence)
            .ok_or("the bill is too large for an account")?;
        self.accounts.apply(&posting).map_err(|e| e.to_string())?;
        let mut changes = vec![Change::Post { posting, at: now.utc }];
        let shares = self.fair.note(&receipt).into_iter();
        changes.extend(shares.map(|(name, account)| put(SHARES, name.as_str().as_bytes(), &account)));
        out.push(Effect::Persist(changes));
        let Some(part) = self.part_mut(key) else {
            return Err("no such part".into());
        };
        part.settled = key.fence;
        part.receipt = Some(receipt.id());
        part.meters = usage.meters;
        part.credits = credits;
        Ok(receipt)
    }

    /// What a settled attempt means for its part and its job.
    #[allow(clippy::too_many_arguments)]
    fn follow(
        &mut self,
        now: Now,
        key: LeaseKey,
        node: NodeId,
        finished: &FinishedLease,
        done: bool,
        credits: Credits,
        standing: Standing,
        out: &mut Vec<Effect>,
    ) {
        let Standing { stands, moved } = standing;
        let usage = &finished.usage;
        let Some(job) = self.jobs.get_mut(&key.job) else {
            return;
        };
        job.spent = job.spent.saturating_add(credits);
        let kind = job.order.work.kind();
        let shown = measured(&job.order.work, &usage.meters);
        let sequence = job.order.work.in_sequence();
        let Some(part) = job.parts.get_mut(key.part as usize) else {
            return;
        };
        if part.state.ended() {
            // Called off meanwhile; only the record was still missing.
            let state = part.state;
            let cause = part.cause.clone();
            self.set_part(now, &key, state, cause, out);
            return;
        }
        let reclaimed = usage.outcome == Outcome::Reclaimed;
        if done || reclaimed {
            // What this scheduler called back says nothing about the owner.
            self.market
                .note_watched(&node, usage.meters.device_ms, reclaimed && !moved);
        }
        if done {
            part.result = usage.result;
            part.left = None;
            part.items_done = part.items;
            self.market.note_success(&node, kind, shown);
            self.set_part(now, &key, JobState::Done, String::new(), out);
            let Some(job) = self.jobs.get_mut(&key.job) else {
                return;
            };
            if job.state_of_parts() == JobState::Done {
                job.state = JobState::Done;
                job.cause.clear();
                self.close(now, key.job, out);
            } else {
                let change = put(JOBS, &key.job.0.0, job);
                out.push(Effect::Persist(vec![change]));
            }
            return;
        }
        let name = self.name(&node);
        match usage.outcome {
            Outcome::Failed if !usage.retryable => self.fail_job(now, key, usage.cause.clone(), out),
            // Given up before its word came, and counted then: now it is only written down.
            _ if !stands => {
                let cause = format!("{name} ended it late: {}", usage.cause);
                self.set_part(now, &key, JobState::Queued, cause, out);
            }
            // Announced reclaim never costs reputation, nor one of the job's attempts.
            Outcome::Reclaimed => {
                if let Some(part) = self.part_mut(&key)
                    && sequence
                {
                    part.left = usage.result.or(part.left);
                }
                let why = if moved {
                    format!("{name} let it go, to go on elsewhere")
                } else {
                    format!("{name} was taken back by its owner")
                };
                self.retry(now, key, &node, why, false, out)
            }
            _ => {
                self.market.note_failure(&node);
                self.retry(now, key, &node, format!("{name}: {}", usage.cause), true, out);
            }
        }
    }

    /// The rate a part would bill at most, for views.
    pub(super) fn rate_of(part: &Part) -> Rate {
        part.plan.as_ref().map_or(Rate::FREE, |plan| plan.chosen.rate)
    }
}

/// How an attempt stood when its node's last word came.
struct Standing {
    /// Nothing had replaced or ended it.
    stands: bool,
    /// It had been called back from here.
    moved: bool,
}

/// What a finished lease showed of its node's speed. Loading its model does not count: the next lease may find it
/// warm, and the longer the work the less it matters.
fn measured(work: &Work, meters: &Meters) -> Option<Shown> {
    let units = match work {
        // A no-op's time is given, not achieved; what a training step costs depends on more than its tokens.
        Work::Noop { .. } | Work::Train(_) => return None,
        Work::Embed { .. } | Work::Generate(_) => {
            let tokens = meters.tokens_in.saturating_add(meters.tokens_out);
            if tokens == 0 {
                return None;
            }
            work_units(work, tokens)
        }
    };
    let time = meters.device_ms.saturating_sub(meters.loading);
    (time.0 > 0).then_some(Shown { units, time })
}
