//! Leases: asked for, judged by the owner's policy, started, ended, delivered, forgotten.
use super::mind::{
    Agent, FENCES, Holding, LEASES, Live, READINGS, RETRY, STOP_GRACE, Seen, Stage, TTL_MAX, fence_row,
    needs, reading_row, row,
};
use super::upkeep::{last_meters, one_line, sign_reading};
use super::{Effect, Exit, WorkerMeters};
use crate::{
    artifact::ArtifactRef,
    exchange::{Fetch, FinishedLease, HELD_MAX, LeaseAsk, Refusal, ToScheduler},
    id::LeaseKey,
    key::SchedulerId,
    prelude::*,
    records::{Lease, NodeState, Outcome, SHARED_MAX, Signed, Tier, Usage},
    store::{Change, put},
    unit::{Bytes, Millis, Now, Portion, WHOLE},
};
use alloc::boxed::Box;

impl Agent {
    pub(super) fn on_ask(&mut self, now: Now, from: SchedulerId, ask: LeaseAsk, out: &mut Vec<Effect>) {
        let key = ask.key;
        // The same ask again, after a lost answer: the same answer.
        if let Some(holding) = self.mine(&key, from) {
            let lease = holding.lease.clone();
            out.push(Effect::Send(from, ToScheduler::Granted(lease)));
            return;
        }
        if let Err(why) = self.judge(from, &ask) {
            out.push(Effect::Send(from, ToScheduler::Refused { key, why }));
            return;
        }
        // An older attempt at the same part is void from here on.
        let older: Vec<LeaseKey> = self
            .holdings
            .keys()
            .filter(|k| k.job == key.job && k.part == key.part)
            .copied()
            .collect();
        for old in older {
            self.stop(
                now,
                old,
                Outcome::Cancelled,
                "a later attempt was placed here".into(),
                false,
                STOP_GRACE,
                out,
            );
        }
        // Judged before: there is room.
        let slot = self.slot_for(&ask.device_class, ask.devices).unwrap_or(0);
        let ttl = ask.ttl.min(TTL_MAX);
        let here = ask.here;
        let rate = self.device(&ask.device_class).map_or(ask.rate, |d| d.rate);
        let lease = Lease {
            job: key.job,
            part: key.part,
            fence: key.fence,
            node: self.id,
            scheduler: from,
            institution: self.config.institution.clone(),
            device_class: ask.device_class,
            devices: ask.devices,
            rate,
            device_ms_max: ask.device_ms_max,
            first_item: ask.first_item,
            items: ask.items,
            granted_at: now.utc,
            expires_at: now.utc.after(ttl),
        };
        let lease = Signed::sign(lease, &self.config.secret);
        let holding = Holding {
            lease: lease.clone(),
            slot,
            order: ask.order,
            holders: ask.holders,
            from: ask.from,
            ttl,
            stage: Stage::Granted,
            readings: Vec::new(),
            live: Live {
                expires: now.mono.after(ttl),
                bytes_in: Bytes(ask.input.len() as u64),
                ..Live::default()
            },
        };
        let seen = Seen {
            fence: key.fence,
            at: now.utc,
        };
        self.fences.insert((key.job, key.part), seen);
        self.offer_changed = true;
        let fence = put(FENCES, &fence_row(key.job, key.part), &seen);
        if here || needs(&holding.order, holding.from).is_empty() {
            // Nothing to fetch: the promise and the intent to start go to disk together.
            self.holdings.insert(key, holding);
            out.push(Effect::Persist(vec![fence]));
            out.push(Effect::Send(from, ToScheduler::Granted(lease)));
            self.start(now, key, out);
        } else {
            out.push(Effect::Persist(vec![put(LEASES, &row(&key), &holding), fence]));
            out.push(Effect::Send(from, ToScheduler::Granted(lease)));
            self.holdings.insert(key, holding);
            self.begin(now, key, out);
        }
    }

    fn device(&self, class: &str) -> Option<&crate::records::Device> {
        self.config.devices.iter().find(|d| d.class == class)
    }

    /// What is held of a class: whole devices, and thousandths of each device that is shared, by its slot.
    fn held_of(&self, class: &str) -> (u32, BTreeMap<u32, u32>) {
        let (mut whole, mut shared) = (0u32, BTreeMap::new());
        for holding in self.holdings.values().filter(|h| h.lease.device_class == class) {
            match holding.held() {
                Some(share) if share.is_share() => {
                    let of_slot = shared.entry(holding.slot).or_insert(0u32);
                    *of_slot = of_slot.saturating_add(share.milli());
                }
                Some(portion) => whole = whole.saturating_add(portion.count()),
                None => {}
            }
        }
        (whole, shared)
    }

    /// Whole devices of a class that are free, and what is free of those that are shared.
    pub(super) fn free(&self, class: &str) -> (u32, Vec<u32>) {
        let (whole, shared) = self.held_of(class);
        let held = whole.saturating_add(shared.len() as u32);
        let free = self.device(class).map_or(0, |d| d.count.saturating_sub(held));
        (
            free,
            shared.values().map(|held| WHOLE.saturating_sub(*held)).collect(),
        )
    }

    /// Whether there is room for so much of a class, and on which of the shared devices a share goes: the fullest that
    /// still has it, so that others stay whole.
    fn slot_for(&self, class: &str, portion: Portion) -> Option<u32> {
        let (free, _) = self.free(class);
        if !portion.is_share() {
            return (free >= portion.count()).then_some(0);
        }
        let (_, shared) = self.held_of(class);
        let fits = shared.iter().filter(|(_, held)| *held + portion.milli() <= WHOLE);
        if let Some((slot, _)) = fits.max_by_key(|(_, held)| **held) {
            return Some(*slot);
        }
        let fresh = (0u32..).find(|slot| !shared.contains_key(slot));
        fresh.filter(|_| free > 0 && shared.len() < SHARED_MAX)
    }

    /// The owner's policy, and what the ask must agree with. The order is the researcher's own word; the
    /// scheduler may place it, not change it.
    fn judge(&self, from: SchedulerId, ask: &LeaseAsk) -> Result<(), Refusal> {
        let order = &ask.order;
        let mismatch = |why: &str| Err(Refusal::Mismatch { why: why.into() });
        let policy = |why: String| Err(Refusal::Policy { why });
        if order.scheduler != from {
            return mismatch("the order was given to another scheduler");
        }
        if ask.key.job.0 != order.id() {
            return mismatch("the job is not this order's");
        }
        if ask.items == 0
            || ask
                .first_item
                .checked_add(ask.items)
                .is_none_or(|end| end > order.items)
        {
            return mismatch("the part lies outside the order's items");
        }
        if ask.devices != order.constraints.devices() {
            return mismatch("other devices are asked for than the order wants");
        }
        if let Some(seen) = self.fences.get(&(ask.key.job, ask.key.part))
            && seen.fence >= ask.key.fence
        {
            return Err(Refusal::Fenced { seen: seen.fence });
        }
        match self.state {
            NodeState::Open => {}
            state => return policy(format!("the node is {}", state.as_str())),
        }
        let rules = &self.config.policy;
        if !rules.serves(&order.institution) {
            return policy(format!("users of {} are not served here", order.institution));
        }
        let kind = order.work.kind();
        if !rules.does(kind) {
            return policy(format!("{} is not served here", kind.as_str()));
        }
        let c = &order.constraints;
        if !rules.licensed(&c.licence, order.work.model().is_some()) {
            return policy(match c.licence.as_str() {
                "" => "models of unknown licence are not run here".into(),
                name => format!("models under {name} are not run here"),
            });
        }
        if c.data > rules.data {
            return policy(format!("{} data is not taken here", c.data));
        }
        if Tier::of_offer(&self.config.isolation) < c.isolation {
            return mismatch("the order wants stronger isolation than this machine has");
        }
        if !self.config.engines.iter().any(|e| e.work == kind) {
            return Err(Refusal::Unable {
                why: format!("no engine for {}", kind.as_str()),
            });
        }
        if (!c.countries.is_empty() && !c.countries.contains(&self.config.country))
            || c.countries_excluded.contains(&self.config.country)
        {
            return mismatch("the order excludes this country");
        }
        if (!c.institutions.is_empty() && !c.institutions.contains(&self.config.institution))
            || c.institutions_excluded.contains(&self.config.institution)
        {
            return mismatch("the order excludes this institution");
        }
        let Some(device) = self.device(&ask.device_class) else {
            return Err(Refusal::Unable {
                why: format!("there is no device of class {}", ask.device_class),
            });
        };
        if !device.lends(ask.devices) {
            return policy(match device.share_min {
                0 => "devices are lent whole".into(),
                least => format!(
                    "no share under {} of a device is lent",
                    Portion::of(0, least).unwrap_or(Portion::ONE)
                ),
            });
        }
        if !device.class.starts_with(c.device.as_str()) || ask.devices.memory_of_one(device.memory) < c.memory
        {
            return mismatch("the order excludes this device");
        }
        let fits = |model: &ArtifactRef| model.runs_on(&ask.device_class);
        if !order.work.model().is_none_or(fits) {
            return Err(Refusal::Unable {
                why: format!("{} does not run on {}", order.work.model_name(), ask.device_class),
            });
        }
        if ask.rate < device.rate {
            return Err(Refusal::Price { now: device.rate });
        }
        if (c.donated_only && device.rate.0 > 0) || c.rate_max.is_some_and(|max| device.rate > max) {
            return mismatch("the order's price limit excludes this device");
        }
        if self.slot_for(&ask.device_class, ask.devices).is_none() || self.holdings.len() >= HELD_MAX {
            return Err(Refusal::Busy {
                class: ask.device_class.clone(),
            });
        }
        Ok(())
    }

    /// Fetches what the part needs, or starts it when it needs nothing.
    pub(super) fn begin(&mut self, now: Now, key: LeaseKey, out: &mut Vec<Effect>) {
        let Some(holding) = self.holdings.get(&key) else {
            return;
        };
        let artifacts = needs(&holding.order, holding.from);
        if artifacts.is_empty() {
            self.start(now, key, out);
        } else {
            let fetch = Fetch {
                artifacts,
                holders: holding.holders.clone(),
            };
            out.push(Effect::Fetch { key, fetch });
        }
    }

    pub(super) fn start(&mut self, now: Now, key: LeaseKey, out: &mut Vec<Effect>) {
        let first_reading = self.config.reading_interval;
        let Some(holding) = self.holdings.get_mut(&key) else {
            return;
        };
        holding.stage = Stage::Running;
        holding.live.started = now.mono;
        holding.live.next_reading = now.mono.after(first_reading);
        out.push(Effect::Persist(vec![put(LEASES, &row(&key), holding)]));
        out.push(Effect::Start {
            key,
            order: holding.order.clone(),
            first_item: holding.lease.first_item,
            items: holding.lease.items,
            device_class: holding.lease.device_class.clone(),
            devices: holding.lease.devices,
            slot: holding.slot,
            from: holding.from,
        });
    }

    /// Calls a lease off: at once where nothing runs, else through its worker.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn stop(
        &mut self,
        now: Now,
        key: LeaseKey,
        outcome: Outcome,
        cause: String,
        retryable: bool,
        grace: Millis,
        out: &mut Vec<Effect>,
    ) {
        let Some(holding) = self.holdings.get_mut(&key) else {
            return;
        };
        match holding.stage {
            Stage::Granted => self.end(now, key, outcome, cause, retryable, None, out),
            Stage::Running if holding.live.stopping.is_none() => {
                holding.live.stopping = Some((outcome, cause, retryable));
                out.push(Effect::Stop { key, grace });
            }
            _ => {}
        }
    }

    pub(super) fn on_exited(
        &mut self,
        now: Now,
        key: LeaseKey,
        exit: Exit,
        meters: WorkerMeters,
        out: &mut Vec<Effect>,
    ) {
        let Some(holding) = self.holdings.get_mut(&key) else {
            return;
        };
        if holding.stage != Stage::Running {
            return;
        }
        holding.live.worker = meters;
        let stopping = holding.live.stopping.take();
        match (exit, stopping) {
            (Exit::Done(result), _) => {
                self.end(now, key, Outcome::Done, String::new(), false, Some(result), out)
            }
            // A reclaim takes the machine, not the work: what the guest left goes along.
            (Exit::Left(state), Some((Outcome::Reclaimed, cause, retryable))) => {
                self.end(now, key, Outcome::Reclaimed, cause, retryable, Some(state), out)
            }
            (_, Some((outcome, cause, retryable))) => {
                self.end(now, key, outcome, cause, retryable, None, out)
            }
            (Exit::Failed { why, retryable }, None) => {
                self.end(now, key, Outcome::Failed, why, retryable, None, out)
            }
            (Exit::Stopped | Exit::Left(_), None) => {
                self.end(
                    now,
                    key,
                    Outcome::Failed,
                    "the worker stopped by itself".into(),
                    true,
                    None,
                    out,
                );
            }
        }
    }

    /// Signs the last reading and the usage, stores them, and begins to deliver.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn end(
        &mut self,
        now: Now,
        key: LeaseKey,
        outcome: Outcome,
        cause: String,
        retryable: bool,
        result: Option<ArtifactRef>,
        out: &mut Vec<Effect>,
    ) {
        let Some(holding) = self.holdings.get_mut(&key) else {
            return;
        };
        let mut changes = Vec::new();
        let meters = last_meters(holding, now);
        let reading = sign_reading(&self.config, holding, now, meters);
        changes.push(put(READINGS, &reading_row(&key, reading.sequence), &reading));
        let usage = Usage {
            lease: holding.lease.id(),
            node: self.id,
            last_reading: reading.id(),
            readings: reading.sequence + 1,
            meters,
            outcome,
            cause: one_line(&cause),
            retryable,
            result,
            started_at: holding.lease.granted_at,
            ended_at: now.utc.max(holding.lease.granted_at),
        };
        holding.readings.push(reading);
        holding.stage = Stage::Ended(Signed::sign(usage, &self.config.secret));
        changes.push(put(LEASES, &row(&key), holding));
        out.push(Effect::Persist(changes));
        self.offer_changed = true;
        self.deliver(now, key, out);
    }

    /// Brings the result, then the usage, to the scheduler; again and again until it is settled.
    pub(super) fn deliver(&mut self, now: Now, key: LeaseKey, out: &mut Vec<Effect>) {
        let Some(holding) = self.holdings.get_mut(&key) else {
            return;
        };
        let Stage::Ended(usage) = &holding.stage else {
            return;
        };
        let scheduler = holding.lease.scheduler;
        if !self.sessions.contains_key(&scheduler) || holding.live.pushing {
            return;
        }
        holding.live.next_delivery = now.mono.after(RETRY);
        match usage.result {
            Some(artifact) if !holding.live.pushed => {
                holding.live.pushing = true;
                out.push(Effect::Push {
                    key,
                    to: scheduler,
                    artifact,
                });
            }
            _ => {
                let finished = FinishedLease {
                    lease: holding.lease.clone(),
                    readings: holding.readings.clone(),
                    usage: usage.clone(),
                };
                out.push(Effect::Send(scheduler, ToScheduler::Finished(Box::new(finished))));
            }
        }
    }

    pub(super) fn forget(&mut self, key: LeaseKey, out: &mut Vec<Effect>) {
        let Some(holding) = self.holdings.remove(&key) else {
            return;
        };
        let mut changes = vec![Change::Delete {
            table: LEASES,
            key: row(&key),
        }];
        for reading in &holding.readings {
            changes.push(Change::Delete {
                table: READINGS,
                key: reading_row(&key, reading.sequence),
            });
        }
        out.push(Effect::Persist(changes));
        out.push(Effect::Forget { key });
    }
}
