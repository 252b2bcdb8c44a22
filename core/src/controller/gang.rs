//! Work that runs all at once: every open part of a job on devices of one site, or none of them.
//!
//! A site is one institution's machines in one country. Where not enough is free yet, what is free is kept for the
//! job, for a while only and by one job a site: two of them can neither starve each other nor the site's other guests.
use super::{
    Effect,
    job::{JobState, Part},
    mind::Controller,
};
use crate::{
    exchange::ToNode,
    id::{Country, Institution, JobId, LeaseKey, PartIndex},
    key::NodeId,
    placement::{self, Candidate, Plan},
    prelude::*,
    unit::{Millis, MonoMillis, Now, Portion},
};
use alloc::collections::VecDeque;

/// How long free devices are kept for a job whose site has too few of them free.
const KEEP: Millis = Millis(60_000);
/// How long others may have them afterwards.
const REST: Millis = Millis(30_000);

/// One institution's machines in one country.
pub(super) type Site = (Institution, Country);

/// Devices kept for a job, nobody else's until then.
#[derive(Debug)]
pub(super) struct Kept {
    site: Site,
    /// Node, class, what each part takes of it, and how many parts.
    places: Vec<(NodeId, String, Portion, u32)>,
    until: MonoMillis,
}

/// What one class of a node's devices could take of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Seats {
    site: Site,
    /// Cost of finished work there.
    score: u64,
    /// Parts that could start now.
    free: u32,
    /// Parts that could run there were nothing else held.
    all: u32,
}

/// What a job that runs all at once can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Choice {
    /// Start at this site.
    Start(Site),
    /// Wait until enough is free at this one.
    Wait(Site),
    /// No site has room for all of it; the largest for so many parts.
    Never(u32),
}

/// Where `need` parts go: the site where all of them together cost least now, else the one where most is free.
pub(super) fn choose(seats: &[Seats], need: u32) -> Choice {
    let mut sites: BTreeMap<&Site, Vec<&Seats>> = BTreeMap::new();
    for seat in seats {
        sites.entry(&seat.site).or_default().push(seat);
    }
    let (mut start, mut wait, mut largest) = (None, None, 0);
    for (site, mut seats) in sites {
        seats.sort_by_key(|seat| seat.score);
        let sum = |of: fn(&Seats) -> u32| seats.iter().map(|s| of(s)).fold(0, u32::saturating_add);
        let (free, all) = (sum(|s| s.free), sum(|s| s.all));
        largest = largest.max(all);
        let mut left = need;
        let cost = seats.iter().fold(0u128, |cost, seat| {
            let here = left.min(if free >= need { seat.free } else { seat.all });
            left -= here;
            cost + u128::from(seat.score) * u128::from(here)
        });
        if free >= need {
            start = start.into_iter().chain([(cost, site)]).min();
        } else if all >= need {
            // Most free first, then the cheapest.
            wait = wait.into_iter().chain([(u32::MAX - free, cost, site)]).min();
        }
    }
    match (start, wait) {
        (Some((_, site)), _) => Choice::Start(site.clone()),
        (None, Some((_, _, site))) => Choice::Wait(site.clone()),
        (None, None) => Choice::Never(largest),
    }
}

impl Controller {
    /// Asks for all of a job's open parts at once, or keeps what is free for them. Says whether it asked.
    pub(super) fn place_together(
        &mut self,
        now: Now,
        id: JobId,
        waiting: &VecDeque<PartIndex>,
        out: &mut Vec<Effect>,
    ) -> bool {
        let Some(job) = self.jobs.get(&id) else {
            return false;
        };
        // What is still called back from the last attempt.
        if waiting.is_empty() || job.parts.iter().any(Part::in_flight) {
            return false;
        }
        let held_back = waiting.iter().map(|i| job.parts[*i as usize].not_before).max();
        if let Some(at) = held_back.filter(|at| *at > now.mono) {
            self.hold_back(at);
            return false;
        }
        let before = self.kept.remove(&id);
        if let Some(kept) = &before {
            self.give_back_kept(kept);
        }
        let need = u32::try_from(waiting.len()).unwrap_or(u32::MAX);
        self.judged += self.market.len() as u64;
        let Some((mut able, mut seats, mut refusal)) = self.seats(id, waiting, true) else {
            return false;
        };
        let mut choice = choose(&seats, need);
        // Better those again that failed once than nowhere: a site has only so many.
        if matches!(choice, Choice::Never(_))
            && let Some(all) = self.seats(id, waiting, false)
        {
            (able, seats, refusal) = all;
            choice = choose(&seats, need);
        }
        let cause = match choice {
            Choice::Start(site) => {
                let known = refusal.known;
                let places: Vec<Candidate> = able
                    .into_iter()
                    .zip(&seats)
                    .filter(|(_, seat)| seat.site == site)
                    .flat_map(|(candidate, seat)| core::iter::repeat_n(candidate, seat.free as usize))
                    .collect();
                for (part, chosen) in waiting.iter().zip(places) {
                    let plan = Plan {
                        chosen,
                        alternatives: Vec::new(),
                        feasible: need,
                        known,
                        warm: String::new(),
                        advised: false,
                    };
                    self.ask(now, id, *part, plan, out);
                }
                return true;
            }
            Choice::Wait(site) => self.keep(now, id, need, site, &able, &seats, before),
            Choice::Never(0) => refusal.to_string(),
            Choice::Never(most) => {
                format!(
                    "its {need} parts run together, the largest site that may run them has room for {most}"
                )
            }
        };
        let Some(job) = self.jobs.get_mut(&id) else {
            return false;
        };
        let mut changed = false;
        for part in waiting {
            let part = &mut job.parts[*part as usize];
            changed |= part.cause != cause;
            part.cause.clone_from(&cause);
        }
        if changed {
            out.push(Effect::Changed(id));
        }
        false
    }

    /// Every place that may run the job's parts, cheapest first, with what it could take of them.
    fn seats(
        &self,
        id: JobId,
        waiting: &VecDeque<PartIndex>,
        avoiding: bool,
    ) -> Option<(Vec<Candidate>, Vec<Seats>, placement::Refusal)> {
        let job = self.jobs.get(&id)?;
        let parts = || waiting.iter().map(|i| &job.parts[*i as usize]);
        let largest = parts().max_by_key(|part| part.items)?;
        let avoid: BTreeSet<NodeId> = parts()
            .filter(|_| avoiding)
            .flat_map(|part| part.avoid.iter().copied())
            .collect();
        let avoid: Vec<NodeId> = avoid.into_iter().collect();
        let request = super::placing::request(&job.order, largest.items, largest.ceiling, &avoid);
        let (able, refusal) = placement::survey_classes(&self.market, &request, &self.policy);
        let seats = able
            .iter()
            .map(|candidate| {
                let listing = self.market.get(&candidate.node);
                let at = listing.and_then(|listing| {
                    let devices = &listing.offer.devices;
                    let at = devices.iter().position(|d| d.class == candidate.device_class)?;
                    let portion = request.devices;
                    Some((listing.seats(at, portion), listing.seats_at_most(at, portion)))
                });
                let (free, all) = at.unwrap_or_default();
                Seats {
                    site: (candidate.institution.clone(), candidate.country),
                    score: candidate.score.0,
                    free,
                    all,
                }
            })
            .collect();
        Some((able, seats, refusal))
    }

    /// Keeps what is free at the site, unless its time is over. Gives the reason to wait.
    #[expect(clippy::too_many_arguments, reason = "what one look found out")]
    fn keep(
        &mut self,
        now: Now,
        id: JobId,
        need: u32,
        site: Site,
        able: &[Candidate],
        seats: &[Seats],
        before: Option<Kept>,
    ) -> String {
        let name = format!("{} in {}", site.0, site.1);
        let until = before.map_or(now.mono.after(KEEP), |kept| kept.until);
        if until <= now.mono {
            let rests = now.mono.after(REST);
            if let Some(job) = self.jobs.get_mut(&id) {
                let open = job.parts.iter_mut().filter(|p| p.state == JobState::Queued);
                open.for_each(|part| part.not_before = rests);
            }
            self.hold_back(rests);
            self.look_again = true;
            return format!(
                "its {need} parts run together: {name} was kept for them in vain, and is given a rest"
            );
        }
        if self.kept.values().any(|kept| kept.site == site) {
            return format!("its {need} parts run together: {name} is kept for another job just now");
        }
        let devices = self
            .jobs
            .get(&id)
            .map_or(Portion::ONE, |job| job.order.constraints.devices());
        let (mut places, mut found) = (Vec::new(), 0);
        for (candidate, seat) in able.iter().zip(seats).filter(|(_, seat)| seat.site == site) {
            let take = seat.free.min(need - found);
            if take > 0 {
                found += take;
                for _ in 0..take {
                    self.market
                        .take(&candidate.node, &candidate.device_class, devices);
                }
                places.push((candidate.node, candidate.device_class.clone(), devices, take));
            }
        }
        self.kept.insert(id, Kept { site, places, until });
        self.hold_back(until);
        format!(
            "its {need} parts run together: {name} has room for {found} of them now, which is kept for them"
        )
    }

    fn give_back_kept(&mut self, kept: &Kept) {
        for (node, class, devices, times) in &kept.places {
            for _ in 0..*times {
                self.market.give_back(node, class, *devices);
            }
        }
    }

    /// Nothing is kept for a job that ended.
    pub(super) fn let_go(&mut self, id: &JobId) {
        if let Some(kept) = self.kept.remove(id) {
            self.give_back_kept(&kept);
            self.look_again = true;
        }
    }

    /// One part of a job that runs all at once came to nothing: the others are called back, to begin again with it.
    pub(super) fn regroup(&mut self, id: JobId, out: &mut Vec<Effect>) {
        let Some(job) = self.jobs.get(&id).filter(|job| job.order.constraints.together) else {
            return;
        };
        let others: Vec<LeaseKey> = (0u32..)
            .zip(&job.parts)
            .filter(|(_, part)| part.in_flight())
            .map(|(i, _)| job.key(i))
            .collect();
        for key in others {
            self.call_back(key, "another part that runs together with it was lost", out);
        }
    }

    /// Asks a node to let a part go, with what it has; it comes back through its usage. Says whether it was asked now.
    pub(super) fn call_back(&mut self, key: LeaseKey, cause: &str, out: &mut Vec<Effect>) -> bool {
        let Some(claim) = self.claims.get(&key) else {
            return false;
        };
        let node = claim.node;
        if !self.moving.insert(key) {
            return false;
        }
        let cause = cause.to_owned();
        out.push(Effect::Send(node, ToNode::Move { key, cause }));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn seats(list: &[(usize, u64, u32, u32)]) -> Vec<Seats> {
        let site = |n: usize| (format!("uni-{n}").parse().unwrap(), "KE".parse().unwrap());
        list.iter()
            .map(|(n, score, free, more)| Seats {
                site: site(*n),
                score: *score,
                free: *free,
                all: free + more,
            })
            .collect()
    }

    fn name(choice: &Choice) -> String {
        match choice {
            Choice::Start((name, _)) => format!("start {name}"),
            Choice::Wait((name, _)) => format!("wait {name}"),
            Choice::Never(most) => format!("never {most}"),
        }
    }

    #[test]
    fn all_of_it_at_one_site_or_none_of_it() {
        for (list, need, expected) in [
            (&[(1, 5, 2, 0), (1, 9, 2, 0), (2, 1, 3, 0)][..], 4, "start uni-1"),
            (&[(1, 5, 4, 0), (2, 4, 2, 0), (2, 9, 2, 0)], 4, "start uni-1"),
            (&[(1, 5, 4, 0), (2, 4, 3, 0), (2, 7, 1, 0)], 4, "start uni-2"),
            (&[(1, 5, 3, 0), (2, 1, 3, 0)], 4, "never 3"),
            (&[(1, 5, 1, 3), (2, 1, 3, 0)], 4, "wait uni-1"),
            (&[(1, 1, 1, 3), (2, 9, 2, 2)], 4, "wait uni-2"),
            (&[], 1, "never 0"),
        ] {
            assert_eq!(name(&choose(&seats(list), need)), expected, "{list:?}");
        }
    }

    proptest! {
        #[test]
        fn a_site_is_only_started_where_all_of_it_fits_and_none_is_cheaper(
            list in proptest::collection::vec((0..4usize, 0..100u64, 0..4u32, 0..4u32), 0..12), need in 1..8u32,
        ) {
            let seats = seats(&list);
            let sum = |site: &Site, of: fn(&Seats) -> u32| -> u32 {
                seats.iter().filter(|s| s.site == *site).map(of).sum()
            };
            // The cost of a site by taking its cheapest seats one by one.
            let cost = |site: &Site| -> u64 {
                let mut scores: Vec<u64> = seats
                    .iter()
                    .filter(|s| s.site == *site)
                    .flat_map(|s| core::iter::repeat_n(s.score, s.free as usize))
                    .collect();
                scores.sort_unstable();
                scores.iter().take(need as usize).sum()
            };
            let fits = |of: fn(&Seats) -> u32| {
                let fits = seats.iter().filter(move |s| sum(&s.site, of) >= need);
                fits.map(|s| &s.site).collect::<Vec<_>>()
            };
            match choose(&seats, need) {
                Choice::Start(site) => {
                    prop_assert!(sum(&site, |s| s.free) >= need);
                    prop_assert!(fits(|s| s.free).into_iter().all(|other| cost(other) >= cost(&site)));
                }
                Choice::Wait(site) => {
                    prop_assert_eq!(fits(|s| s.free).len(), 0);
                    prop_assert!(sum(&site, |s| s.all) >= need);
                }
                Choice::Never(most) => {
                    prop_assert_eq!(fits(|s| s.all).len(), 0);
                    prop_assert!(most < need);
                }
            }
        }
    }
}
