//! Moving work that runs: for a machine's own people, for a deadline, for a much better price.
//!
//! Moving costs work, so it needs a reason that outlasts a moment: a gain well over what is lost, some time at one
//! place, few moves of one part, and a bound for each institution and hour, whatever the reasons.
use super::{Effect, deadline, job::JobState, mind::Controller};
use crate::{
    id::{Institution, JobId, LeaseKey, PartIndex},
    key::NodeId,
    placement::{
        self, Matcher,
        deadline::{Advice, On, Race, advise},
    },
    prelude::*,
    unit::{Credits, Millis, MonoMillis, Now, Portion, UtcMillis},
};
use alloc::collections::VecDeque;

/// Parts of one institution that are moved within an hour at most.
pub const MOVES_MAX: usize = 12;
const HOUR: u64 = 3_600_000;
/// One part is moved so often at most.
const MOVES_OF_PART: u32 = 3;
/// And not before it has been where it is for so long.
const STAY_MIN: Millis = Millis(10_000);
/// Work that ends within so long stays, whatever it costs.
const REST_MIN: Millis = Millis(600_000);
/// Elsewhere must be cheaper by so much, all that is lost counted.
const GAIN_PERCENT: u64 = 30;
/// Between two searches for better places, and how many parts one of them looks at.
const LOOK_GAP: Millis = Millis(30_000);
const LOOKED_AT: usize = 64;
/// How long a device that guests were sent from waits for whom it was emptied.
const ROOM: Millis = Millis(60_000);
/// Parts of one institution for which guests are sent away in one look.
const ROOMS_MAX: usize = 8;

/// How often work of each institution was moved lately.
#[derive(Debug, Default)]
pub(super) struct Moves(BTreeMap<Institution, VecDeque<UtcMillis>>);

impl Moves {
    /// Whether another part of that institution may be moved now.
    pub(super) fn allows(&self, now: UtcMillis, whose: &Institution) -> bool {
        self.allows_more(now, whose, 0)
    }

    /// The same, when so many others are to be moved with it.
    fn allows_more(&self, now: UtcMillis, whose: &Institution, planned: usize) -> bool {
        let times = self.0.get(whose).into_iter().flatten();
        let lately = times.filter(|at| at.0.saturating_add(HOUR) > now.0).count();
        lately + planned < MOVES_MAX
    }

    /// One was.
    pub(super) fn note(&mut self, now: UtcMillis, whose: &Institution) {
        self.0.retain(|_, times| {
            times.retain(|at| at.0.saturating_add(HOUR) > now.0);
            !times.is_empty()
        });
        self.0.entry(whose.clone()).or_default().push_back(now);
    }
}

/// A device that guests leave for its institution's own people.
#[derive(Debug)]
pub(super) struct Room {
    node: NodeId,
    class: String,
    devices: Portion,
    whose: Institution,
    job: JobId,
    part: PartIndex,
    until: MonoMillis,
    /// The guests that leave; the room is held once they are gone.
    leaving: BTreeSet<LeaseKey>,
}

impl Room {
    /// It was made for that institution, and its guests are gone.
    pub(super) fn is_for(&self, whose: &Institution) -> bool {
        self.whose == *whose && self.leaving.is_empty()
    }
}

/// Whether moving pays: the rest elsewhere, with all that is lost, against the rest here.
pub(super) fn pays(here: Credits, elsewhere: Credits) -> bool {
    let bound = u128::from(here.0) * u128::from(100 - GAIN_PERCENT);
    u128::from(elsewhere.0) * 100 < bound
}

/// How long a part still takes where it is: by its progress where it shows any, else by what was expected.
fn rest_here(expected: Millis, elapsed: Millis, items: u64, done: u64) -> Millis {
    if done == 0 {
        return Millis(expected.0.saturating_sub(elapsed.0));
    }
    let left = u128::from(elapsed.0) * u128::from(items.saturating_sub(done)) / u128::from(done);
    Millis(u64::try_from(left).unwrap_or(u64::MAX))
}

impl Controller {
    /// Sends guests away where an owner's own people wait and the owner wants it so.
    pub(super) fn make_room(&mut self, now: Now, out: &mut Vec<Effect>) {
        let over: Vec<usize> = (0..self.rooms.len())
            .rev()
            .filter(|i| self.rooms[*i].until <= now.mono)
            .collect();
        for i in over {
            let room = self.rooms.remove(i);
            if room.leaving.is_empty() {
                self.market.give_back(&room.node, &room.class, room.devices);
                self.look_again = true;
            }
        }
        if self.locals.is_empty() {
            return;
        }
        let mut waiting: BTreeMap<Institution, Vec<(JobId, PartIndex)>> = BTreeMap::new();
        for (_, id) in &self.queue {
            let Some(job) = self.jobs.get(id) else { continue };
            let whose = &job.order.institution;
            if !self.locals.contains_key(whose) || job.order.constraints.together {
                continue;
            }
            let list = waiting.entry(whose.clone()).or_default();
            let parts = (0u32..).zip(&job.parts).filter(|(i, part)| {
                part.state == JobState::Queued && job.is_next(*i) && part.not_before <= now.mono
            });
            let free = ROOMS_MAX.saturating_sub(list.len());
            list.extend(parts.map(|(i, _)| (*id, i)).take(free));
        }
        if waiting.values().any(|parts| !parts.is_empty()) {
            // Those who only just came may be sent away a little later.
            self.hold_back(now.mono.after(STAY_MIN));
        }
        for (whose, parts) in waiting {
            for (id, part) in parts {
                if !self.rooms.iter().any(|room| (room.job, room.part) == (id, part)) {
                    self.make_room_for(now, &whose, id, part, out);
                }
            }
        }
    }

    fn make_room_for(
        &mut self,
        now: Now,
        whose: &Institution,
        id: JobId,
        part: PartIndex,
        out: &mut Vec<Effect>,
    ) {
        let Some(job) = self.jobs.get(&id) else { return };
        let wanted = &job.parts[part as usize];
        let request = super::placing::request(&job.order, wanted.items, wanted.ceiling, &wanted.avoid);
        let mut best: Option<(MonoMillis, UtcMillis, NodeId, String, Vec<LeaseKey>)> = None;
        for node in self.locals.get(whose).into_iter().flatten() {
            let Some(candidate) = placement::candidate_at(&self.market, node, &request, &self.policy) else {
                continue;
            };
            if !candidate.busy {
                // Its turn comes.
                return;
            }
            if let Some((asked, guests)) =
                self.guests(now, node, &candidate.device_class, request.devices, whose)
            {
                // Who came last loses least.
                let found = (now.mono, asked, *node, candidate.device_class, guests);
                if best.as_ref().is_none_or(|known| known.1 < asked) {
                    best = Some(found);
                }
            }
        }
        let Some((_, _, node, class, guests)) = best else {
            return;
        };
        let devices = request.devices;
        let mut leaving = BTreeSet::new();
        for key in guests {
            if self.move_away(now, key, "the machine's own people wait for it", out) {
                leaving.insert(key);
            }
        }
        let until = now.mono.after(ROOM);
        self.hold_back(until);
        self.rooms.push(Room {
            node,
            class,
            devices,
            whose: whose.clone(),
            job: id,
            part,
            until,
            leaving,
        });
    }

    /// Guests of that class of devices that would make room for so many, latest first, and when the earliest of
    /// them was asked; nothing when they may not all be moved.
    fn guests(
        &self,
        now: Now,
        node: &NodeId,
        class: &str,
        devices: Portion,
        whose: &Institution,
    ) -> Option<(UtcMillis, Vec<LeaseKey>)> {
        let listing = self.market.get(node)?;
        let at = listing.offer.devices.iter().position(|d| d.class == class)?;
        let mut free = listing.room(at);
        let keys: Vec<LeaseKey> = self.claims_of.get(node)?.iter().copied().collect();
        let mut guests: Vec<(UtcMillis, Portion, LeaseKey)> = keys
            .into_iter()
            .filter(|key| !self.moving.contains(key))
            .filter_map(|key| {
                let (claim, part, job) = (self.claims.get(&key)?, self.part(&key)?, self.jobs.get(&key.job)?);
                let may = claim.granted
                    && claim.class == class
                    && job.order.institution != *whose
                    && !job.order.constraints.together
                    && part.moves < MOVES_OF_PART
                    && part.asked_at.after(STAY_MIN) <= now.utc;
                // Who shares a device leaves none whole: only a share is made free by them.
                let serves = may && (devices.is_share() || !claim.devices.is_share());
                serves.then_some((part.asked_at, claim.devices, key))
            })
            .collect();
        guests.sort_unstable();
        let mut leaving = Vec::new();
        let mut counted: BTreeMap<Institution, usize> = BTreeMap::new();
        while free < devices.milli() {
            let (_, held, key) = guests.pop()?;
            let theirs = self.jobs.get(&key.job)?.order.institution.clone();
            let before = counted.entry(theirs.clone()).or_default();
            if !self.moves.allows_more(now.utc, &theirs, *before) {
                continue;
            }
            *before += 1;
            free = if devices.is_share() {
                free.max(held.milli())
            } else {
                free.saturating_add(held.milli())
            };
            leaving.push(key);
        }
        let asked = leaving.last().and_then(|key| Some(self.part(key)?.asked_at))?;
        Some((asked, leaving))
    }

    /// Calls a part back that others, or its own user, are better off without where it is. Says whether it was.
    fn move_away(&mut self, now: Now, key: LeaseKey, cause: &str, out: &mut Vec<Effect>) -> bool {
        let Some(whose) = self.jobs.get(&key.job).map(|job| job.order.institution.clone()) else {
            return false;
        };
        if !self.moves.allows(now.utc, &whose) || !self.call_back(key, cause, out) {
            return false;
        }
        self.moves.note(now.utc, &whose);
        if let Some(job) = self.jobs.get_mut(&key.job) {
            job.parts[key.part as usize].moves += 1;
            job.note(now.utc, Some(key.part), format!("is moved: {cause}"));
        }
        out.push(Effect::Changed(key.job));
        true
    }

    /// A guest is gone: once all of a room's are, it is held for whom it was made.
    pub(super) fn guest_left(&mut self, key: &LeaseKey) {
        for room in &mut self.rooms {
            if room.leaving.remove(key) && room.leaving.is_empty() {
                self.market.take(&room.node, &room.class, room.devices);
            }
        }
    }

    /// While an institution's own work is placed, the rooms made for it are free.
    pub(super) fn open_rooms(&mut self, whose: &Institution) {
        for room in self
            .rooms
            .iter()
            .filter(|r| r.whose == *whose && r.leaving.is_empty())
        {
            self.market.give_back(&room.node, &room.class, room.devices);
        }
    }

    /// Afterwards they are held again, but for those that were taken.
    pub(super) fn close_rooms(&mut self, whose: &Institution) {
        let market = &mut self.market;
        self.rooms.retain(|room| {
            if room.whose != *whose || !room.leaving.is_empty() {
                return true;
            }
            let free = market.get(&room.node).is_some_and(|listing| {
                let at = listing.offer.devices.iter().position(|d| d.class == room.class);
                at.is_some_and(|at| listing.has(at, room.devices))
            });
            if free {
                market.take(&room.node, &room.class, room.devices);
            }
            free
        });
    }

    /// Looks for running work that would be late where it is, or much cheaper elsewhere.
    pub(super) fn improve(&mut self, now: Now, out: &mut Vec<Effect>) {
        if now.mono < self.improve_at || self.claims.is_empty() {
            return;
        }
        self.improve_at = now.mono.after(LOOK_GAP);
        let after = self.improved;
        let keys: Vec<LeaseKey> = self
            .claims
            .range((core::ops::Bound::Excluded(after), core::ops::Bound::Unbounded))
            .map(|(key, _)| *key)
            .take(LOOKED_AT)
            .collect();
        self.improved = match keys.last() {
            Some(last) if keys.len() == LOOKED_AT => *last,
            _ => LeaseKey {
                job: JobId(crate::id::Digest([0; 32])),
                part: 0,
                fence: 0,
            },
        };
        for key in keys {
            if let Some(cause) = self.better_elsewhere(now, &key) {
                self.move_away(now, key, cause, out);
            }
        }
    }

    /// Whether work that needs so long on a reliable machine must be on one from now on. Who is on one already goes to
    /// another kind only if `at_stake`, what can be lost there, could be done again.
    fn slack_is_spent(&self, left: Millis, rest: Millis, reliable: bool, at_stake: Millis) -> bool {
        let rounds = self.claims.len().div_ceil(LOOKED_AT) as u64;
        let look = Millis(LOOK_GAP.0.saturating_mul(rounds.max(1)));
        let (on, step) = match reliable {
            true => (On::Reliable, look.saturating_add(at_stake)),
            false => (On::Fickle, look),
        };
        let race = Race {
            until: left,
            left: rest,
            start: self.policy.restart,
            step,
            on,
            fickle: true,
            between: Millis::ZERO,
        };
        advise(&race) != Advice::Any
    }

    /// Why a running part should go elsewhere, if it should.
    fn better_elsewhere(&self, now: Now, key: &LeaseKey) -> Option<&'static str> {
        let (job, part, claim) = (self.jobs.get(&key.job)?, self.part(key)?, self.claims.get(key)?);
        let here = &part.plan.as_ref()?.chosen;
        if part.state != JobState::Running
            || !claim.granted
            || self.moving.contains(key)
            || job.order.constraints.together
            || part.moves >= MOVES_OF_PART
            || part.asked_at.after(STAY_MIN) > now.utc
        {
            return None;
        }
        let began = part.asked_at.after(here.transfer);
        let elapsed = Millis(now.utc.0.saturating_sub(began.0));
        let rest = rest_here(here.duration, elapsed, part.items, part.items_done);
        let left = deadline::left(job, now.utc).map(|left| {
            // Those that follow it need their time too.
            let after = deadline::rest(job, rest).0.saturating_sub(rest.0);
            Millis(left.0.saturating_sub(after))
        });
        let late = left.is_some_and(|left| left < rest);
        let listing = self.market.get(&claim.node);
        let reliable = listing.is_some_and(|listing| placement::is_reliable(listing, rest));
        let spent =
            !late && left.is_some_and(|left| self.slack_is_spent(left, rest, reliable, here.duration));
        // What a reclaim would throw away is no better kept by moving: only work that keeps what it did is.
        let risky = spent && !reliable && job.order.work.in_sequence();
        if !late && !risky && rest < REST_MIN {
            return None;
        }
        // What was done is kept only where each part begins with what the last attempt left.
        let kept = if job.order.work.in_sequence() {
            part.items_done.min(part.items)
        } else {
            0
        };
        let mut request = super::placing::request(&job.order, part.items - kept, part.ceiling, &part.avoid);
        if request.units == 0 && request.fixed == Millis::ZERO {
            return None;
        }
        // Whatever it is moved for, it must end in time there, and not be lost where there is no time to lose it.
        request.within = left.map(|left| Millis(left.0.saturating_sub(self.policy.restart.0)));
        request.reliable = spent;
        let plan = Matcher::new(&self.market, &request).place(&self.market, &request)?;
        if plan.chosen.node == claim.node {
            return None;
        }
        if late {
            return Some("it would be late there, and elsewhere in time");
        }
        if risky {
            return Some("its machine may be taken back, and there is no time to lose any more");
        }
        let cost_here = here.rate.bill(claim.devices.time(rest))?;
        let lost = plan.chosen.transfer.saturating_add(self.policy.restart);
        let besides = self.policy.delay_rate.bill(Portion::ONE.time(lost))?;
        // What was done here is paid by nobody once it is called back.
        let unpaid = here.rate.bill(claim.devices.time(elapsed))?;
        let elsewhere = plan.chosen.cost.saturating_add(besides).saturating_add(unpaid);
        pays(cost_here, elsewhere).then_some("the rest of it costs much less elsewhere")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_hour_sees_more_moves_than_the_bound(gaps in proptest::collection::vec(0..900_000u64, 1..200)) {
            let whose: Institution = "uni-a".parse().unwrap();
            let (mut moves, mut now, mut made) = (Moves::default(), UtcMillis(5), Vec::new());
            for gap in gaps {
                now = now.after(Millis(gap));
                if moves.allows(now, &whose) {
                    moves.note(now, &whose);
                    made.push(now.0);
                }
            }
            for at in &made {
                let within = made.iter().filter(|m| **m <= *at && **m + HOUR > *at).count();
                prop_assert!(within <= MOVES_MAX);
            }
            // The bound is not reached by waiting for it.
            prop_assert!(moves.allows(now.after(Millis(HOUR)), &whose));
        }

        /// Whatever moves for its price would not move back for the same prices.
        #[test]
        fn what_moved_does_not_move_back(here in 0..1u64 << 40, there in 0..1u64 << 40) {
            prop_assert!(!(pays(Credits(here), Credits(there)) && pays(Credits(there), Credits(here))));
        }
    }

    #[test]
    fn the_rest_is_told_by_progress() {
        for (expected, elapsed, items, done, rest) in [
            (100, 40, 10, 0, 60),
            (100, 140, 10, 0, 0),
            (100, 40, 10, 5, 40),
            (100, 40, 10, 10, 0),
        ] {
            assert_eq!(
                rest_here(Millis(expected), Millis(elapsed), items, done),
                Millis(rest)
            );
        }
    }
}
