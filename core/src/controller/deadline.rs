//! Deadlines: cheapest while there is time to do the work twice, reliable when there is not.
//!
//! A deadline steers, it never refuses work that was accepted: what nothing can end in time runs where it is cheapest.
//! When there is no time to lose, [`crate::placement::deadline`] says.
use super::job::Job;
use crate::{
    placement::{
        Request,
        deadline::{Advice, On, Race, advise},
    },
    prelude::*,
    unit::{Millis, UtcMillis},
};

/// How much of what is left until its deadline a job needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Urgency {
    /// It has no deadline, or time enough to begin anew.
    Relaxed,
    /// Work that is lost now could not be done again in time.
    Tight,
    /// Even undisturbed it would be late.
    Late,
}

/// How long the largest part of a job takes, fetching included.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Takes {
    /// Where it is quickest.
    pub(super) quickest: Millis,
    /// Where it is quickest of all places that are hardly ever taken back; the same where there is none.
    pub(super) surely: Millis,
}

/// What is still to be done of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Needs {
    /// Undisturbed, where it is quickest.
    pub(super) rest: Millis,
    /// All of it on a reliable machine.
    pub(super) surely: Millis,
    /// What one loss throws away at most.
    pub(super) at_stake: Millis,
}

/// What is still to be done: parts in sequence wait for each other, and only the one that runs can be lost.
pub(super) fn needs(job: &Job, takes: Takes) -> Needs {
    Needs {
        rest: rest(job, takes.quickest),
        surely: rest(job, takes.surely),
        at_stake: takes.quickest,
    }
}

/// How urgent it is to do that within `left`; a new start elsewhere takes `restart`.
pub(super) fn urgency(left: Option<Millis>, needs: Needs, restart: Millis) -> Urgency {
    let Some(left) = left else {
        return Urgency::Relaxed;
    };
    if left < needs.rest {
        return Urgency::Late;
    }
    let race = Race {
        until: left,
        left: needs.surely,
        start: restart,
        // The next question comes when this part is lost, at the worst; and a tenth later: the estimate was not exact.
        step: Millis(needs.at_stake.0.saturating_add(needs.at_stake.0 / 10)),
        on: On::Nothing,
        fickle: true,
        between: Millis::ZERO,
    };
    match advise(&race) {
        Advice::Any => Urgency::Relaxed,
        Advice::Reliable | Advice::Wait => Urgency::Tight,
    }
}

/// How long until the job should be over.
pub(super) fn left(job: &Job, now: UtcMillis) -> Option<Millis> {
    let deadline = job.order.constraints.deadline?;
    Some(Millis(deadline.0.saturating_sub(now.0)))
}

/// What the rest of the job takes from here, if a part takes `takes`: parts in sequence wait for each other.
pub(super) fn rest(job: &Job, takes: Millis) -> Millis {
    if !job.order.work.in_sequence() {
        return takes;
    }
    let open = job.parts.iter().filter(|part| !part.state.ended()).count();
    Millis(takes.0.saturating_mul(open.max(1) as u64))
}

/// The ways to ask for a place that ends it in time, best first; none when nothing does any more.
///
/// Of parts in sequence, each may take its even share of what is left.
pub(super) fn wishes<'a>(
    request: &Request<'a>,
    left: Option<Millis>,
    urgency: Urgency,
    open: usize,
) -> Vec<Request<'a>> {
    let mut wishes = Vec::with_capacity(2);
    if let Some(left) = left
        && urgency < Urgency::Late
    {
        let within = Some(Millis(left.0 / open.max(1) as u64));
        if urgency == Urgency::Tight {
            wishes.push(Request {
                within,
                reliable: true,
                ..request.clone()
            });
        }
        wishes.push(Request {
            within,
            ..request.clone()
        });
    }
    wishes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn needs(rest: u64, surely: u64, at_stake: u64) -> Needs {
        Needs {
            rest: Millis(rest),
            surely: Millis(surely),
            at_stake: Millis(at_stake),
        }
    }

    #[test]
    fn time_to_lose_it_once_is_the_line() {
        for (left, needs, expected) in [
            (None, needs(u64::MAX, u64::MAX, u64::MAX), Urgency::Relaxed),
            (Some(230), needs(100, 100, 100), Urgency::Relaxed),
            (Some(229), needs(100, 100, 100), Urgency::Tight),
            (Some(100), needs(100, 100, 100), Urgency::Tight),
            (Some(99), needs(100, 100, 100), Urgency::Late),
            // Of many parts in sequence one is at stake.
            (Some(1_031), needs(1_000, 1_000, 10), Urgency::Relaxed),
            (Some(1_030), needs(1_000, 1_000, 10), Urgency::Tight),
            // Reliable machines are slower.
            (Some(330), needs(100, 200, 100), Urgency::Relaxed),
            (Some(329), needs(100, 200, 100), Urgency::Tight),
            (Some(0), needs(0, 0, 0), Urgency::Tight),
            (Some(u64::MAX), needs(u64::MAX, u64::MAX, 0), Urgency::Tight),
        ] {
            assert_eq!(
                urgency(left.map(Millis), needs, Millis(10)),
                expected,
                "{left:?} {needs:?}"
            );
        }
    }

    proptest! {
        /// Less time never makes work less urgent, nor does more of it.
        #[test]
        fn urgency_grows_with_work_and_as_time_goes_by(
            left in 0..1u64 << 40, takes in 0..1u64 << 40, restart in 0..1u64 << 20, less in 0..1u64 << 40,
        ) {
            let at = |left, takes| urgency(Some(Millis(left)), needs(takes, takes, takes), Millis(restart));
            prop_assert!(at(left.saturating_sub(less), takes) >= at(left, takes));
            prop_assert!(at(left, takes + less) >= at(left, takes));
            // Whoever still has time to do it twice is not called urgent.
            if at(left, takes) == Urgency::Relaxed {
                prop_assert!(left >= takes.saturating_mul(2));
            }
        }
    }
}
