//! Deadlines: until when a job may run where its machine can be taken back, or wait for such a machine, and from when
//! it has to be on a reliable one.
//!
//! All time that nobody wants elsewhere is worth using, so a job waits as long as it can afford to and returns from a
//! reliable machine as soon as that pays. What it can afford is its slack: the time to the deadline, less the work that
//! is left. Waiting uses slack up second by second; every change of machines uses up what stopping and starting take.
//! Two rules follow:
//!
//! - **Safety.** Whatever happens until the rule is asked again, the job can still start on a reliable machine and end
//!   in time. No deadline is missed that could have been met when the job came.
//! - **Reserve.** Slack for the changes that are still to be expected is not waited away. Else the first shortage would
//!   leave a job on dear machines for good, with cheap ones free beside it.
//!
//! Pure arithmetic: the caller knows the clock, what is free, and what it costs. The trade between waiting and paying
//! was studied by Wu et al., Can't Be Late: Optimizing Spot Instance Savings under Deadlines (NSDI 2024), whose safety
//! net this is too; they spend the slack evenly, here it is kept for the changes that past reclaims let expect.
use crate::unit::Millis;

/// Where a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum On {
    /// Nowhere.
    Nothing,
    /// On a machine that may be taken back.
    Fickle,
    /// On one that will not.
    Reliable,
}

/// A job with a deadline, as it stands now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Race {
    /// To the deadline.
    pub until: Millis,
    /// Work that is left, counted from what is safe (the last checkpoint), as time on a reliable machine.
    pub left: Millis,
    /// What one start costs before work goes on: fetching, loading.
    pub start: Millis,
    /// The longest until this is asked again.
    pub step: Millis,
    /// Where it is.
    pub on: On,
    /// Whether a machine that may be taken back is free (or is the one it is on), and worth a change.
    pub fickle: bool,
    /// Mean time from one return of such machines to the next, as it was seen; zero when nothing is known.
    pub between: Millis,
}

/// Where it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Advice {
    /// Wherever finished work is cheapest.
    Any,
    /// On a reliable machine, and it stays there.
    Reliable,
    /// Nowhere: what is free now is dearer than waiting.
    Wait,
}

/// See the module's note.
pub fn advise(race: &Race) -> Advice {
    let slack = race.until.0.saturating_sub(race.left.0);
    // Enough to be nowhere until the next question, and to start on a reliable machine then.
    let safe = race.start.0.saturating_add(race.step.0);
    // Enough to start somewhere, to lose it at once, and to be safe still.
    let worthwhile = safe.saturating_add(race.start.0);
    let changes = race.until.0.checked_div(race.between.0).unwrap_or(0);
    // There and back again, each time.
    let reserve = worthwhile.saturating_add(changes.saturating_mul(race.start.0.saturating_mul(2)));
    match (race.on, race.fickle) {
        (On::Fickle, true) if slack >= safe => Advice::Any,
        (On::Nothing | On::Reliable, true) if slack >= worthwhile => Advice::Any,
        (On::Nothing | On::Fickle, false) if slack >= reserve => Advice::Wait,
        _ => Advice::Reliable,
    }
}

/// Whether the deadline can be met at all: from nothing, on a reliable machine.
pub fn possible(until: Millis, left: Millis, start: Millis) -> bool {
    until.0 >= left.0.saturating_add(start.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MINUTE: u64 = 60_000;

    fn race(on: On, fickle: bool, until: u64, left: u64) -> Race {
        Race {
            until: Millis(until * MINUTE),
            left: Millis(left * MINUTE),
            start: Millis(5 * MINUTE),
            step: Millis(MINUTE),
            on,
            fickle,
            between: Millis(0),
        }
    }

    #[test]
    fn slack_is_spent_on_waiting_then_on_changes_then_not_at_all() {
        for (name, race, expected) in [
            (
                "much time, something cheap",
                race(On::Nothing, true, 200, 100),
                Advice::Any,
            ),
            (
                "much time, nothing cheap",
                race(On::Nothing, false, 200, 100),
                Advice::Wait,
            ),
            (
                "little time, nothing cheap",
                race(On::Nothing, false, 110, 100),
                Advice::Reliable,
            ),
            (
                "too little to try",
                race(On::Nothing, true, 110, 100),
                Advice::Reliable,
            ),
            ("enough to stay", race(On::Fickle, true, 106, 100), Advice::Any),
            (
                "too little to stay",
                race(On::Fickle, true, 105, 100),
                Advice::Reliable,
            ),
            (
                "enough to return",
                race(On::Reliable, true, 111, 100),
                Advice::Any,
            ),
            (
                "too little to return",
                race(On::Reliable, true, 110, 100),
                Advice::Reliable,
            ),
            (
                "nothing to return to",
                race(On::Reliable, false, 900, 100),
                Advice::Reliable,
            ),
            (
                "too late already",
                race(On::Nothing, true, 10, 100),
                Advice::Reliable,
            ),
        ] {
            assert_eq!(advise(&race), expected, "{name}");
        }
        let often = Race {
            between: Millis(20 * MINUTE),
            ..race(On::Nothing, false, 200, 100)
        };
        assert_eq!(
            advise(&often),
            Advice::Reliable,
            "ten returns are worth a hundred minutes of changes"
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if std::env::var_os("KAREZ_LONG").is_some() { 50_000 } else { 500 }))]

        /// Whoever takes machines back, and whenever: what could be met when the job came is met.
        #[test]
        fn no_deadline_is_missed_that_could_be_met(
            up in proptest::collection::vec(any::<bool>(), 400),
            work in 1..200u64,
            room in 0..150u64,
            start in 0..12u64,
            step in 1..6u64,
            between in 0..80u64,
        ) {
            let until = work + start + room;
            prop_assert!(possible(Millis(until), Millis(work), Millis(start)));
            let (mut on, mut left, mut starting) = (On::Nothing, work, 0);
            for now in 0..until {
                let there = up[now as usize];
                if on == On::Fickle && !there {
                    on = On::Nothing;
                }
                // Asked in steps, not when something happens.
                if now % step == 0 {
                    let race = Race {
                        until: Millis(until - now),
                        left: Millis(left),
                        start: Millis(start),
                        step: Millis(step),
                        on,
                        fickle: there,
                        between: Millis(between),
                    };
                    let next = match advise(&race) {
                        Advice::Any => On::Fickle,
                        Advice::Reliable => On::Reliable,
                        Advice::Wait => On::Nothing,
                    };
                    if next != on {
                        (on, starting) = (next, start);
                    }
                }
                if on != On::Nothing {
                    if starting > 0 {
                        starting -= 1;
                    } else {
                        left = left.saturating_sub(1);
                    }
                }
            }
            prop_assert_eq!(left, 0);
        }
    }
}
