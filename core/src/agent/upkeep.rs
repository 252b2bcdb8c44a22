//! What the owner says and what time brings: limits, readings, reports, offers.
use super::mind::{
    ADVERTISE_GAP, Agent, FENCE_KEPT, FENCES, Holding, OWNER, READINGS, STOP_GRACE, Stage, fence_row,
    reading_row,
};
use super::{AgentConfig, Effect, OwnerCommand};
use crate::{
    exchange::{HELD_MAX, Held, READINGS_MAX, Report, ToScheduler},
    id::{JobId, LeaseKey, PartIndex},
    key::SchedulerId,
    prelude::*,
    records::{
        BENCHMARK_BYTES_MAX, Benchmark, Engine, MeterReading, Meters, NodeState, OFFER_CACHED_MAX, Offer,
        Outcome, Signed, Verified, WorkKind,
    },
    store::{Change, put},
    unit::{Millis, Now},
};

impl Agent {
    pub(super) fn on_owner(&mut self, now: Now, command: OwnerCommand, out: &mut Vec<Effect>) {
        let state = match command {
            OwnerCommand::Open => NodeState::Open,
            OwnerCommand::Pause => NodeState::Paused,
            OwnerCommand::Drain => NodeState::Draining,
            OwnerCommand::Reclaim => NodeState::Reclaimed,
        };
        if state != self.state {
            self.state = state;
            self.offer_changed = true;
            out.push(Effect::Persist(vec![put(OWNER, b"state", &state)]));
        }
        if command == OwnerCommand::Reclaim {
            let grace = self.config.reclaim_grace;
            let keys: Vec<LeaseKey> = self.holdings.keys().copied().collect();
            for key in keys {
                self.stop(
                    now,
                    key,
                    Outcome::Reclaimed,
                    "the owner took the machine back".into(),
                    true,
                    grace,
                    out,
                );
            }
        }
    }

    pub(super) fn on_time(&mut self, now: Now, out: &mut Vec<Effect>) {
        let keys: Vec<LeaseKey> = self.holdings.keys().copied().collect();
        for key in keys {
            self.on_time_of(now, key, out);
        }
        let due: Vec<SchedulerId> = self
            .sessions
            .iter()
            .filter(|(_, s)| s.next_report <= now.mono)
            .map(|(id, _)| *id)
            .collect();
        for scheduler in due {
            self.report(now, scheduler, out);
        }
        let refresh = if self.offer_changed {
            ADVERTISE_GAP
        } else {
            Millis(self.config.offer_ttl.0 / 3)
        };
        if self.advertised_at.is_none_or(|at| now.mono >= at.after(refresh)) {
            self.advertise(now, out);
            self.prune_fences(now, out);
        }
    }

    fn on_time_of(&mut self, now: Now, key: LeaseKey, out: &mut Vec<Effect>) {
        let Some(holding) = self.holdings.get(&key) else {
            return;
        };
        match holding.stage {
            Stage::Ended(_) if holding.live.next_delivery <= now.mono => self.deliver(now, key, out),
            Stage::Ended(_) => {}
            _ if holding.live.stopping.is_some() => {}
            _ if holding.live.expires <= now.mono => {
                let why = "the lease ran out: its scheduler did not renew it".to_string();
                self.stop(now, key, Outcome::Failed, why, true, STOP_GRACE, out);
            }
            Stage::Running if self.limit_at(holding) <= now.mono => {
                let why = format!(
                    "the part's limit of {} ms of device time is used up: raise --max-cost or cut smaller parts",
                    holding.lease.device_ms_max.0
                );
                self.stop(now, key, Outcome::Failed, why, false, STOP_GRACE, out);
            }
            Stage::Running if holding.live.next_reading <= now.mono => self.take_reading(now, key, out),
            _ => {}
        }
    }

    fn take_reading(&mut self, now: Now, key: LeaseKey, out: &mut Vec<Effect>) {
        let Some(holding) = self.holdings.get_mut(&key) else {
            return;
        };
        let taken = holding.readings.len();
        // The interval doubles every 32 readings, so that a lease of any length keeps a bounded trail.
        let interval = self.config.reading_interval.0.max(1) << (taken / 32).min(20);
        holding.live.next_reading = now.mono.after(Millis(interval));
        if taken + 1 >= READINGS_MAX {
            return;
        }
        let meters = last_meters(holding, now);
        let reading = sign_reading(&self.config, holding, now, meters);
        holding.readings.push(reading.clone());
        let scheduler = holding.lease.scheduler;
        out.push(Effect::Persist(vec![put(
            READINGS,
            &reading_row(&key, reading.sequence),
            &reading,
        )]));
        out.push(Effect::Send(scheduler, ToScheduler::Reading { key, reading }));
    }

    pub(super) fn report(&mut self, now: Now, scheduler: SchedulerId, out: &mut Vec<Effect>) {
        let Some(session) = self.sessions.get_mut(&scheduler) else {
            return;
        };
        session.reports += 1;
        session.next_report = now.mono.after(self.config.heartbeat);
        let held = self
            .holdings
            .iter()
            .filter(|(_, h)| h.lease.scheduler == scheduler)
            .take(HELD_MAX)
            .map(|(key, h)| held(*key, h))
            .collect();
        out.push(Effect::Send(
            scheduler,
            ToScheduler::Report(Report {
                sequence: session.reports,
                held,
            }),
        ));
    }

    fn advertise(&mut self, now: Now, out: &mut Vec<Effect>) {
        // The clock as the base keeps sequences rising over restarts without storing each.
        self.sequence = now.utc.0.max(self.sequence + 1);
        self.advertised_at = Some(now.mono);
        self.offer_changed = false;
        let c = &self.config;
        let devices = c
            .devices
            .iter()
            .map(|d| {
                let (free, shared) = self.free(&d.class);
                crate::records::Device {
                    free,
                    shared,
                    ..d.clone()
                }
            })
            .collect();
        let offer = Offer {
            node: self.id,
            name: c.name.clone(),
            institution: c.institution.clone(),
            country: c.country,
            devices,
            engines: c.engines.clone(),
            cores: c.cores,
            memory: c.memory,
            isa: c.isa.clone(),
            isolation: c.isolation.clone(),
            cached: self.cached.iter().take(OFFER_CACHED_MAX).copied().collect(),
            artifact_addrs: self.addrs.clone(),
            sequence: self.sequence,
            issued_at: now.utc,
            expires_at: now.utc.after(c.offer_ttl),
            state: self.state,
            terms: c.policy.clone(),
        };
        out.push(Effect::Advertise(Signed::sign(offer, &c.secret)));
    }

    fn prune_fences(&mut self, now: Now, out: &mut Vec<Effect>) {
        let old: Vec<(JobId, PartIndex)> = self
            .fences
            .iter()
            .filter(|(_, seen)| seen.at.after(FENCE_KEPT) < now.utc)
            .map(|(k, _)| *k)
            .take(256)
            .collect();
        if old.is_empty() {
            return;
        }
        let mut changes = Vec::new();
        for (job, part) in old {
            self.fences.remove(&(job, part));
            changes.push(Change::Delete {
                table: FENCES,
                key: fence_row(job, part),
            });
        }
        out.push(Effect::Persist(changes));
    }
}

pub(super) fn held(key: LeaseKey, holding: &Holding) -> Held {
    let w = &holding.live.worker;
    Held {
        key,
        phase: holding.phase(),
        items_done: w.items,
        tokens: w.tokens_in.saturating_add(w.tokens_out),
        loss_micro: w.loss_micro,
    }
}

/// The meters now, never under those already signed: after a restart the live ones begin at nothing.
pub(super) fn last_meters(holding: &Holding, now: Now) -> Meters {
    let live = holding.meters(now.mono);
    match holding.readings.last() {
        Some(last) => live.at_least(&last.meters),
        None => live,
    }
}

pub(super) fn sign_reading(
    config: &AgentConfig,
    holding: &Holding,
    now: Now,
    meters: Meters,
) -> Verified<MeterReading> {
    let reading = MeterReading {
        lease: holding.lease.id(),
        node: holding.lease.node,
        sequence: u32::try_from(holding.readings.len()).unwrap_or(u32::MAX),
        previous: holding.readings.last().map(Verified::id),
        meters,
        method: holding.method(),
        taken_at: now.utc,
        mono: now.mono,
        benchmark: benchmark(config, &holding.lease.device_class),
    };
    Signed::sign(reading, &config.secret)
}

/// What one device of a class does with the reference model, as the node's own offers say. That is the speed of a CPU slot:
/// GPUs and provided servers were not measured with it.
pub(super) fn benchmark(config: &AgentConfig, class: &str) -> Option<Benchmark> {
    let slot = |engine: &&Engine| engine.work == WorkKind::Generate && class.starts_with("cpu/");
    let measured = config.engines.iter().find(slot)?;
    (1..=BENCHMARK_BYTES_MAX)
        .contains(&measured.method.len())
        .then(|| Benchmark {
            version: measured.method.clone(),
            speed: measured.speed,
        })
}

/// A cause fit for a record: one line, bounded, no control characters.
pub(super) fn one_line(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        let c = if c.is_control() { ' ' } else { c };
        if out.len() + c.len_utf8() > 900 {
            break;
        }
        out.push(c);
    }
    out
}
