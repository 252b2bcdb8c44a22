//! Deadlines: cheapest while there is time to do the work twice, reliable when there is not.
//!
//! A deadline steers, it never refuses work that was accepted: what nothing can end in time runs where it is cheapest.
use super::job::Job;
use crate::{
    placement::Request,
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

/// How urgent work is that takes so long and must be over within `left`; a new start elsewhere takes `restart`.
pub(super) fn urgency(left: Option<Millis>, takes: Millis, restart: Millis) -> Urgency {
    match left {
        None => Urgency::Relaxed,
        Some(left) if left < takes => Urgency::Late,
        // Twice over, and a tenth more: the last estimate was not exact either.
        Some(left) if left < twice(takes).saturating_add(restart) => Urgency::Tight,
        Some(_) => Urgency::Relaxed,
    }
}

fn twice(takes: Millis) -> Millis {
    Millis(takes.0.saturating_mul(2).saturating_add(takes.0 / 10))
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

    #[test]
    fn time_to_do_it_twice_is_the_line() {
        let urgency = |left, takes| urgency(left, Millis(takes), Millis(10));
        for (left, takes, expected) in [
            (None, u64::MAX, Urgency::Relaxed),
            (Some(220), 100, Urgency::Relaxed),
            (Some(219), 100, Urgency::Tight),
            (Some(100), 100, Urgency::Tight),
            (Some(99), 100, Urgency::Late),
            (Some(0), 0, Urgency::Tight),
            (Some(u64::MAX), u64::MAX, Urgency::Relaxed),
        ] {
            assert_eq!(urgency(left.map(Millis), takes), expected, "{left:?} {takes}");
        }
    }

    proptest! {
        /// Less time never makes work less urgent, nor does more of it.
        #[test]
        fn urgency_grows_with_work_and_as_time_goes_by(
            left in 0..1u64 << 40, takes in 0..1u64 << 40, restart in 0..1u64 << 20, less in 0..1u64 << 40,
        ) {
            let at = |left, takes| urgency(Some(Millis(left)), Millis(takes), Millis(restart));
            prop_assert!(at(left.saturating_sub(less), takes) >= at(left, takes));
            prop_assert!(at(left, takes + less) >= at(left, takes));
            // Whoever still has time to do it twice is not called urgent.
            if at(left, takes) == Urgency::Relaxed {
                prop_assert!(left >= takes.saturating_mul(2));
            }
        }
    }
}
