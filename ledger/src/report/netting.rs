//! Who owes whom: flows between institutions, net positions, the fewest sensible transfers, and how old debts are.
use karez_core::{id::Institution, unit::UtcMillis};
use std::collections::{BTreeMap, VecDeque};

const DAY: u64 = 24 * 3_600_000;

/// Micro-credits by how long they have been owed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Age {
    /// Up to 30 days.
    pub current: u64,
    /// 31 to 60 days.
    pub over_30: u64,
    /// 61 to 90 days.
    pub over_60: u64,
    /// More than 90 days.
    pub over_90: u64,
}

impl Age {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.current + self.over_30 + self.over_60 + self.over_90
    }
}

/// One proposed payment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transfer {
    /// Who pays.
    pub from: Institution,
    /// Who is paid.
    pub to: Institution,
    /// How many micro-credits.
    pub credits: u64,
}

/// What institutions have used of each other, day by day. What an institution's own users do on its own machines
/// counts for nothing here.
#[derive(Debug, Clone, Default)]
pub struct Netting {
    /// Positive: is owed. Negative: owes.
    net: BTreeMap<Institution, i128>,
    /// Debts that later credits have not covered yet, the oldest first: day and micro-credits.
    debts: BTreeMap<Institution, VecDeque<(u64, u64)>>,
    /// Claims that later debts will use up.
    claims: BTreeMap<Institution, u64>,
}

impl Netting {
    /// `user` used `credits` of `provider`'s capacity.
    pub fn used(&mut self, at: UtcMillis, user: &Institution, provider: &Institution, credits: u64) {
        if user == provider || credits == 0 {
            return;
        }
        self.earn(provider, credits);
        self.owe(at, user, credits);
    }

    /// A payment of `from` to `to`, or a refund: the flow the other way.
    pub fn paid(&mut self, at: UtcMillis, from: &Institution, to: &Institution, credits: u64) {
        self.used(at, to, from, credits);
    }

    fn earn(&mut self, who: &Institution, credits: u64) {
        *self.net.entry(who.clone()).or_default() += i128::from(credits);
        let mut left = credits;
        let debts = self.debts.entry(who.clone()).or_default();
        while left > 0
            && let Some((_, owed)) = debts.front_mut()
        {
            let covered = left.min(*owed);
            *owed -= covered;
            left -= covered;
            if *owed == 0 {
                debts.pop_front();
            }
        }
        let claims = self.claims.entry(who.clone()).or_default();
        *claims = claims.saturating_add(left);
    }

    fn owe(&mut self, at: UtcMillis, who: &Institution, credits: u64) {
        *self.net.entry(who.clone()).or_default() -= i128::from(credits);
        let claims = self.claims.entry(who.clone()).or_default();
        let covered = credits.min(*claims);
        *claims -= covered;
        let left = credits - covered;
        if left == 0 {
            return;
        }
        let debts = self.debts.entry(who.clone()).or_default();
        let day = at.0 / DAY;
        match debts.back_mut() {
            Some((last, owed)) if *last == day => *owed = owed.saturating_add(left),
            _ => debts.push_back((day, left)),
        }
    }

    /// Net positions in micro-credits: they sum to zero.
    pub fn positions(&self) -> impl Iterator<Item = (&Institution, i128)> {
        self.net.iter().map(|(name, net)| (name, *net))
    }

    /// One net position.
    pub fn position(&self, who: &Institution) -> i128 {
        self.net.get(who).copied().unwrap_or(0)
    }

    /// How old the debt of `who` is on the day of `at`; the oldest debts are taken to be paid first.
    pub fn age(&self, who: &Institution, at: UtcMillis) -> Age {
        let mut age = Age::default();
        let today = at.0 / DAY;
        for (day, owed) in self.debts.get(who).into_iter().flatten() {
            let days = today.saturating_sub(*day);
            let bucket = match days {
                0..=30 => &mut age.current,
                31..=60 => &mut age.over_30,
                61..=90 => &mut age.over_60,
                _ => &mut age.over_90,
            };
            *bucket = bucket.saturating_add(*owed);
        }
        age
    }

    /// Payments that bring every position to zero: the largest debtor pays the largest creditor, until none is left.
    /// At most one fewer than there are institutions.
    pub fn transfers(&self) -> Vec<Transfer> {
        let mut open: Vec<(i128, Institution)> = self
            .net
            .iter()
            .filter(|(_, net)| **net != 0)
            .map(|(name, net)| (*net, name.clone()))
            .collect();
        let mut out = Vec::new();
        while open.len() > 1 {
            open.sort();
            let last = open.len() - 1;
            let amount = (-open[0].0).min(open[last].0);
            if amount <= 0 {
                break;
            }
            out.push(Transfer {
                from: open[0].1.clone(),
                to: open[last].1.clone(),
                credits: u64::try_from(amount).unwrap_or(u64::MAX),
            });
            open[0].0 += amount;
            open[last].0 -= amount;
            open.retain(|(net, _)| *net != 0);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn name(n: u8) -> Institution {
        format!("uni-{n}").parse().unwrap()
    }

    fn day(n: u64) -> UtcMillis {
        UtcMillis(n * DAY)
    }

    #[test]
    fn the_oldest_debts_are_paid_first() {
        let mut netting = Netting::default();
        netting.used(day(0), &name(1), &name(2), 100);
        netting.used(day(50), &name(1), &name(2), 40);
        netting.used(day(99), &name(1), &name(2), 7);
        netting.used(day(99), &name(1), &name(1), 1_000);
        let age = netting.age(&name(1), day(100));
        assert_eq!(
            (age.current, age.over_30, age.over_60, age.over_90),
            (7, 40, 0, 100)
        );
        netting.paid(day(100), &name(1), &name(2), 110);
        let age = netting.age(&name(1), day(100));
        assert_eq!((age.current, age.over_30, age.over_90), (7, 30, 0));
        assert_eq!(netting.position(&name(2)), 37);
        // What was earned before covers what is used later: no debt arises.
        netting.used(day(101), &name(2), &name(1), 20);
        assert_eq!(netting.age(&name(2), day(101)).total(), 0);
        assert_eq!(netting.age(&name(1), day(101)).total(), 17);
    }

    proptest! {
        #[test]
        fn transfers_settle_everyone_and_are_few(
            flows in prop::collection::vec((0u8..6, 0u8..6, 0u64..1_000, 0u64..200), 0..60)
        ) {
            let mut netting = Netting::default();
            for (user, provider, credits, at) in flows {
                netting.used(day(at), &name(user), &name(provider), credits);
            }
            prop_assert_eq!(netting.positions().map(|(_, net)| net).sum::<i128>(), 0);
            for (who, net) in netting.positions() {
                let owed = i128::from(netting.age(who, day(500)).total());
                prop_assert_eq!(owed, (-net).max(0));
            }
            let transfers = netting.transfers();
            prop_assert!(transfers.len() <= 5);
            for t in &transfers {
                netting.paid(day(500), &t.from, &t.to, t.credits);
            }
            prop_assert!(netting.positions().all(|(_, net)| net == 0));
        }
    }
}
