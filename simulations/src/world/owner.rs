//! Owners: they come and go by their own clock, take their machines back, and change their prices.
use super::{Due, World};
use crate::{
    people::Owner,
    setup::{DAY, MINUTE, Sabotage},
};
use karez_core::{
    agent::{Event, OwnerCommand},
    unit::Rate,
};

/// A guest may still be seen so long after the grace, in milliseconds: processes do not vanish in no time.
const SLACK_MS: u64 = 500;
/// More than this share of its devices lent: an owner who competes asks more; under half of them: less.
const CROWDED_PERCENT: u64 = 85;
const IDLE_PERCENT: u64 = 50;

/// What an owner says by habit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Word {
    /// I shall be back soon: no new guests.
    Soon,
    /// I am back.
    Back,
    /// I am gone: lend.
    Gone,
}

impl Owner {
    /// What this owner wants of the machine at that moment, and when that changes.
    pub(super) fn mood(&self, now: u64) -> Option<(Word, u64)> {
        let habit = self.habit?;
        // Local time since a Monday at midnight, kept positive by a week.
        let local = (now + 7 * DAY)
            .saturating_add_signed(i64::from(self.utc_minutes) * MINUTE as i64)
            .saturating_sub(self.late_ms);
        let length = match habit.to.checked_sub(habit.from) {
            Some(length) => length,
            None => 24 * 60 - habit.from + habit.to,
        };
        let notice = habit.notice_minutes.min(habit.from.min(24 * 60 - length)) * MINUTE;
        // Look at yesterday's, today's and the next days' presence, in order.
        let today = local / DAY;
        for day in today - 1..=today + 8 {
            if habit.weekdays_only && day % 7 >= 5 {
                continue;
            }
            let back = day * DAY + habit.from * MINUTE;
            let gone = back + length * MINUTE;
            let soon = back - notice;
            let in_world = |local_at: u64| now + (local_at - local);
            if local < soon {
                return Some((Word::Gone, in_world(soon)));
            }
            if local < back {
                return Some((Word::Soon, in_world(back)));
            }
            if local < gone {
                return Some((Word::Back, in_world(gone)));
            }
        }
        None
    }
}

impl World {
    /// The process starts: it finds the owner as the clock says, whatever was said while it was away.
    pub(crate) fn owner_at_boot(&mut self, n: usize) {
        if let Some((word, _)) = self.nodes[n].owner.mood(self.now) {
            self.say(n, word);
        }
        self.plan_owner(n);
    }

    /// Plans the next word of an owner with habits; each process plans its own.
    fn plan_owner(&mut self, n: usize) {
        if let Some((_, at)) = self.nodes[n].owner.mood(self.now) {
            self.nodes[n].owner_due = at;
            self.at(at, Due::Owner { n: n as u32 });
        }
    }

    pub(super) fn owner_by_habit(&mut self, n: usize) {
        // A word planned by a process that is gone.
        if self.nodes[n].owner_due != self.now || self.nodes[n].agent.is_none() {
            return;
        }
        // As the clock says now: without notice, soon and back are the same moment.
        if let Some((word, _)) = self.nodes[n].owner.mood(self.now) {
            self.say(n, word);
        }
        if self.nodes[n].agent.is_some() {
            self.plan_owner(n);
        }
    }

    fn say(&mut self, n: usize, word: Word) {
        match word {
            Word::Soon => self.owner_says(n, OwnerCommand::Drain),
            Word::Back => self.owner_says(n, OwnerCommand::Reclaim),
            Word::Gone => self.owner_says(n, OwnerCommand::Open),
        }
    }

    /// The owner says something to the node's process, which must be alive.
    pub(crate) fn owner_says(&mut self, n: usize, command: OwnerCommand) {
        self.note(|| format!("node {n}: its owner says {command:?}"));
        let wanted = command == OwnerCommand::Reclaim;
        self.checker.owner_wants(n, wanted.then_some(self.now));
        self.recorder
            .lends(n, command == OwnerCommand::Open, self.checker.node(n));
        if wanted {
            self.summary.reclaims += 1;
            let since = self.now;
            let grace = self.setup.timing.reclaim_grace.0 + SLACK_MS;
            self.after(grace, Due::OwnerSitsDown { n: n as u32, since });
            if self.sabotaged(Sabotage::DeafToOwner) {
                return;
            }
        }
        self.node_event(n, Event::Owner(command));
    }

    // Prices.

    pub(super) fn plan_pricing(&mut self) {
        for member in 0..self.setup.members.len() {
            if let Some(pricing) = self.setup.members[member].pricing {
                let first = pricing.every_ms / 2 + self.rng.below(pricing.every_ms.max(1));
                self.at(
                    first,
                    Due::Pricing {
                        member: member as u32,
                    },
                );
            }
        }
    }

    /// An owner who competes looks at what is lent, and asks more or less from now on. A machine learns its new
    /// price when nothing runs on it: its process starts anew with it.
    pub(super) fn reprice_member(&mut self, m: usize) {
        let member = &self.setup.members[m];
        let (Some(pricing), base) = (member.pricing, member.rate.0) else {
            return;
        };
        if self.calm {
            return;
        }
        self.after(pricing.every_ms, Due::Pricing { member: m as u32 });
        let (busy, lent) = self.recorder.lent_by(m);
        let percent = self.prices[m];
        let moved = match (busy * 100).checked_div(lent) {
            Some(share) if share >= CROWDED_PERCENT => percent * (100 + pricing.step_percent) / 100,
            Some(share) if share < IDLE_PERCENT => percent * (100 - pricing.step_percent.min(99)) / 100,
            _ => percent,
        };
        let bound = |rate: Rate| rate.0 * 100 / base.max(1);
        self.prices[m] = moved.clamp(bound(pricing.floor).max(1), bound(pricing.ceiling).max(1));
        for n in 0..self.nodes.len() {
            if self.nodes[n].owner.member == Some(m) {
                self.tell_price(n);
            }
        }
    }

    /// Starts an idle machine anew if it asks another price than its owner wants.
    fn tell_price(&mut self, n: usize) {
        let wanted = self.price_wanted(n);
        let node = &self.nodes[n];
        let asks = node.agent.as_ref().map(|a| a.config().devices[0].rate);
        if asks.is_some_and(|asks| asks != wanted) && node.workers.is_empty() && !node.holds_anything() {
            self.node_restarts(n);
        }
    }

    /// What the owner of a listed machine asks now.
    pub(crate) fn price_wanted(&self, n: usize) -> Rate {
        let node = &self.nodes[n];
        let percent = node.owner.member.map_or(100, |m| self.prices[m]);
        Rate(node.first_rate.0 * percent / 100)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::setup::{HOUR, Habit};

    fn owner(from: u64, to: u64, weekdays_only: bool, utc_minutes: i32) -> Owner {
        Owner {
            habit: Some(Habit {
                from,
                to,
                weekdays_only,
                jitter_minutes: 0,
                notice_minutes: 30,
            }),
            utc_minutes,
            late_ms: 0,
            member: None,
            schedulers: Vec::new(),
        }
    }

    #[test]
    fn owners_live_by_their_own_clock() {
        let office = owner(9 * 60, 18 * 60, true, 0);
        let kathmandu = owner(9 * 60, 18 * 60, true, 345);
        let night = owner(22 * 60, 6 * 60, false, 0);
        let minute = |h: u64, m: u64| h * HOUR + m * MINUTE;
        for (name, owner, now, expected) in [
            ("Monday early", &office, 0, (Word::Gone, minute(8, 30))),
            ("soon", &office, minute(8, 30), (Word::Soon, minute(9, 0))),
            ("nine", &office, minute(9, 0), (Word::Back, minute(18, 0))),
            (
                "evening",
                &office,
                minute(18, 0),
                (Word::Gone, minute(24 + 8, 30)),
            ),
            (
                "Friday evening",
                &office,
                4 * DAY + minute(18, 0),
                (Word::Gone, 7 * DAY + minute(8, 30)),
            ),
            ("Nepal", &kathmandu, 0, (Word::Gone, minute(2, 45))),
            (
                "Nepal at nine",
                &kathmandu,
                minute(3, 15),
                (Word::Back, minute(12, 15)),
            ),
            ("night, Monday", &night, 0, (Word::Back, minute(6, 0))),
            ("night, noon", &night, minute(12, 0), (Word::Gone, minute(21, 30))),
        ] {
            assert_eq!(owner.mood(now), Some(expected), "{name}");
        }
        let sharp = Owner {
            habit: office.habit.map(|h| Habit {
                notice_minutes: 0,
                ..h
            }),
            ..office.clone()
        };
        assert_eq!(sharp.mood(minute(9, 0)), Some((Word::Back, minute(18, 0))));
        assert_eq!(
            Owner {
                habit: None,
                ..office.clone()
            }
            .mood(0),
            None
        );
    }
}
