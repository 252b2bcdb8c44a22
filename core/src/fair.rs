//! Fair share: whose turn it is, by what each institution used and gave, both fading with time.
//!
//! Decides order, never where work goes. Every number follows from receipts alone: whoever has the ledger can
//! recompute it, whatever order the receipts arrive in ([`FairShare::note`] is a sum of integers).
//!
//! An institution's target is its part of what there is: half of it is the same for all that want anything (the
//! floor: also for those that never gave), the other half by what each gave lately; grants add to it. Who is
//! furthest under its target comes first, counting what runs for it now.
//!
//! Start at [`FairShare::turn`].
use crate::{
    id::Institution,
    prelude::*,
    records::Receipt,
    unit::{Credits, DeviceMillis, Millis, Rate, UtcMillis},
};
use serde::{Deserialize, Serialize};

/// The operator's constants.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shares {
    /// After so long, use and contribution count half.
    pub half_life: Millis,
    /// What an hour of a donated device counts as, so that what is free is shared fairly too.
    pub donated: Rate,
    /// The part of everything that is the same for all, in percent; the rest goes by contribution.
    pub floor_percent: u32,
    /// Extra weight, in percent of an equal share.
    pub grants_percent: BTreeMap<Institution, u32>,
}

impl Default for Shares {
    fn default() -> Self {
        Self {
            half_life: Millis(7 * 24 * 3_600_000),
            donated: Rate(100_000),
            floor_percent: 50,
            grants_percent: BTreeMap::new(),
        }
    }
}

/// Half-lives that are remembered: older amounts weigh less than a billionth.
const KEPT: u64 = 32;
/// The most institutions; further ones have no history of their own and share one.
pub const INSTITUTIONS_MAX: usize = 100_000;

/// An amount that halves with every half-life. A sum of integers per half-life, so the order of arrival cannot matter.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fading(BTreeMap<u64, u128>);

impl Fading {
    fn add(&mut self, at: UtcMillis, amount: u64, half_life: Millis) {
        let (period, weight) = weight(at, half_life);
        let last = self
            .0
            .last_key_value()
            .map_or(period, |(last, _)| period.max(*last));
        if period + KEPT >= last {
            let sum = self.0.entry(period).or_insert(0);
            // 96 bits at most for each, and no more than 2³¹ of them in any ledger.
            *sum = sum.saturating_add(u128::from(amount) * u128::from(weight));
        }
        self.0.retain(|old, _| old + KEPT >= last);
    }

    /// What is left of it, weighed like an amount of today times 2³² times what today's own weight is: good for
    /// comparing amounts at the same time.
    fn weighed(&self, now: UtcMillis, half_life: Millis) -> u128 {
        let (period, _) = weight(now, half_life);
        let faded = |(then, sum): (&u64, &u128)| sum >> period.saturating_sub(*then).min(127);
        self.0.iter().map(faded).fold(0, u128::saturating_add)
    }

    /// What is left of it.
    pub fn left(&self, now: UtcMillis, half_life: Millis) -> u64 {
        let (_, weight) = weight(now, half_life);
        u64::try_from(self.weighed(now, half_life) / u128::from(weight)).unwrap_or(u64::MAX)
    }
}

/// Powers of two whose exponents are 1/2, 1/4 … 1/65536, times 2³².
const ROOTS: [u64; 16] = [
    6_074_001_000,
    5_107_605_667,
    4_683_695_048,
    4_485_121_744,
    4_389_014_833,
    4_341_736_423,
    4_318_288_544,
    4_306_612_134,
    4_300_785_774,
    4_297_875_550,
    4_296_421_177,
    4_295_694_175,
    4_295_330_720,
    4_295_149_004,
    4_295_058_149,
    4_295_012_722,
];

/// The half-life in which a moment lies, and its weight there: from 2³² at the start to twice that at the end.
fn weight(at: UtcMillis, half_life: Millis) -> (u64, u64) {
    let length = half_life.0.max(1);
    let within = u128::from(at.0 % length) * 65_536 / u128::from(length);
    let mut weight = 1u128 << 32;
    for (i, root) in ROOTS.iter().enumerate() {
        if within >> (15 - i) & 1 == 1 {
            weight = (weight * u128::from(*root)) >> 32;
        }
    }
    // Under 2³³ by construction.
    (at.0 / length, weight as u64)
}

/// One institution's history.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Account {
    /// The half-life it was counted with.
    #[serde(default = "week")]
    pub half_life: Millis,
    /// What its users had others do.
    pub used: Fading,
    /// What its nodes did for others.
    pub given: Fading,
}

fn week() -> Millis {
    Shares::default().half_life
}

/// Who used and gave what, and what runs for whom.
#[derive(Debug, Clone, Default)]
pub struct FairShare {
    shares: Shares,
    accounts: BTreeMap<Institution, Account>,
    running: BTreeMap<Institution, u64>,
}

/// Settled work, as far as sharing is concerned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Work {
    /// Whose users asked.
    pub user: Institution,
    /// Whose machine did it.
    pub provider: Institution,
    /// What it was paid.
    pub credits: Credits,
    /// For how long.
    pub billed: DeviceMillis,
    /// When.
    pub at: UtcMillis,
}

/// An institution's place in the order. Smaller comes first.
pub type Turn = u128;

/// Where an institution stands, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    /// Which.
    pub institution: Institution,
    /// What is left of its use, in credits' worth.
    pub used: Credits,
    /// What is left of its contribution, in credits' worth.
    pub given: Credits,
    /// Worth of what runs for it now.
    pub running: Credits,
    /// Its target, in millionths of everything.
    pub target_ppm: u64,
}

impl FairShare {
    /// With those constants and nothing in it.
    pub fn new(shares: Shares) -> Self {
        Self {
            shares,
            ..Self::default()
        }
    }

    /// Goes on with other constants. Histories that were counted with another half-life stay as they are.
    pub(crate) fn set_shares(&mut self, shares: Shares) {
        self.shares = Shares {
            half_life: self.shares.half_life,
            ..shares
        };
    }

    /// The constants.
    pub fn shares(&self) -> &Shares {
        &self.shares
    }

    /// Puts a stored history back, unless it was counted with another half-life.
    pub fn restore(&mut self, institution: Institution, account: Account) -> bool {
        let same = account.half_life == self.shares.half_life;
        if same {
            self.accounts.insert(institution, account);
        }
        same
    }

    /// Every institution's history.
    pub fn accounts(&self) -> impl Iterator<Item = (&Institution, &Account)> {
        self.accounts.iter()
    }

    /// Goes on with what runs now according to another.
    pub(crate) fn take_running(&mut self, other: &mut Self) {
        self.running = core::mem::take(&mut other.running);
    }

    /// What work is worth: its credits, or for donated time what such time counts as.
    fn worth(&self, credits: Credits, billed: DeviceMillis) -> Credits {
        let time = self.shares.donated.bill(billed).unwrap_or(Credits(u64::MAX));
        credits.max(time)
    }

    /// Counts a receipt. Says whose histories changed.
    pub fn note(&mut self, receipt: &Receipt) -> Vec<(Institution, Account)> {
        self.note_work(&Work {
            user: receipt.user_institution.clone(),
            provider: receipt.node_institution.clone(),
            credits: receipt.credits,
            billed: receipt.billed,
            at: receipt.issued_at,
        })
    }

    /// The same of what is known without the receipt.
    pub fn note_work(&mut self, work: &Work) -> Vec<(Institution, Account)> {
        let worth = self.worth(work.credits, work.billed).0;
        // Work for oneself neither uses nor gives.
        if worth == 0 || work.user == work.provider {
            return Vec::new();
        }
        let (at, half_life) = (work.at, self.shares.half_life);
        let mut changed = Vec::new();
        for (institution, gives) in [(&work.user, false), (&work.provider, true)] {
            if !self.accounts.contains_key(institution) && self.accounts.len() >= INSTITUTIONS_MAX {
                continue;
            }
            let account = self
                .accounts
                .entry(institution.clone())
                .or_insert_with(|| Account {
                    half_life,
                    ..Account::default()
                });
            let fading = if gives {
                &mut account.given
            } else {
                &mut account.used
            };
            fading.add(at, worth, half_life);
            changed.push((institution.clone(), account.clone()));
        }
        changed
    }

    /// Counts what was started for an institution until [`Self::stop`].
    pub fn start(&mut self, institution: &Institution, worth: Credits) {
        let running = self.running.entry(institution.clone()).or_insert(0);
        *running = running.saturating_add(worth.0);
    }

    /// What was started has ended.
    pub fn stop(&mut self, institution: &Institution, worth: Credits) {
        if let Some(running) = self.running.get_mut(institution) {
            *running = running.saturating_sub(worth.0);
            if *running == 0 {
                self.running.remove(institution);
            }
        }
    }

    /// The targets of those that want something now, in millionths of everything.
    pub fn targets<'a>(
        &self,
        now: UtcMillis,
        wanting: impl Iterator<Item = &'a Institution>,
    ) -> BTreeMap<&'a Institution, u64> {
        let half_life = self.shares.half_life;
        let given = |name: &Institution| {
            self.accounts
                .get(name)
                .map_or(0, |a| a.given.weighed(now, half_life))
        };
        let wanting: BTreeSet<&Institution> = wanting.collect();
        let count = wanting.len().max(1) as u64;
        let all: u128 = wanting
            .iter()
            .map(|name| given(name))
            .fold(0, u128::saturating_add);
        let equal = 1_000_000 / count;
        let floor = u64::from(self.shares.floor_percent.min(100));
        let target = |name: &Institution| {
            let by_gift = match all {
                // Nobody gave anything: all are equal.
                0 => equal,
                // Shifted so that the product cannot overflow.
                all => (((given(name) >> 24) * 1_000_000) / (all >> 24).max(1)) as u64,
            };
            let grant = self.shares.grants_percent.get(name).copied().unwrap_or(0);
            (equal * floor + by_gift * (100 - floor)) / 100 + equal * u64::from(grant) / 100
        };
        let raw: BTreeMap<&Institution, u64> = wanting
            .into_iter()
            .map(|name| (name, target(name).max(1)))
            .collect();
        let sum = raw.values().sum::<u64>().max(1);
        raw.into_iter()
            .map(|(name, t)| (name, (t * 1_000_000 / sum).max(1)))
            .collect()
    }

    /// Whose turn it is: what was used and runs, against the target. `target` is that of [`Self::targets`].
    pub fn turn(&self, now: UtcMillis, institution: &Institution, target: u64) -> Turn {
        let half_life = self.shares.half_life;
        let (_, today) = weight(now, half_life);
        let used = self
            .accounts
            .get(institution)
            .map_or(0, |a| a.used.weighed(now, half_life));
        let running = self.running.get(institution).copied().unwrap_or(0);
        let worth = used.saturating_add(u128::from(running) * u128::from(today));
        (worth >> 20).saturating_mul(1_000_000) / u128::from(target.max(1))
    }

    /// Everybody's standing, by name.
    pub fn standings(&self, now: UtcMillis) -> Vec<Standing> {
        let names: BTreeSet<&Institution> = self.accounts.keys().chain(self.running.keys()).collect();
        let targets = self.targets(now, names.iter().copied());
        let half_life = self.shares.half_life;
        names
            .iter()
            .map(|name| {
                let account = self.accounts.get(*name);
                let left = |f: fn(&Account) -> &Fading| account.map_or(0, |a| f(a).left(now, half_life));
                Standing {
                    institution: (*name).clone(),
                    used: Credits(left(|a| &a.used)),
                    given: Credits(left(|a| &a.given)),
                    running: Credits(self.running.get(*name).copied().unwrap_or(0)),
                    target_ppm: targets.get(*name).copied().unwrap_or(0),
                }
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        id::{Digest, JobId},
        key::{NodeId, PublicKey, SchedulerId, UserId},
        market::tests::secret_of,
    };
    use proptest::prelude::*;

    const WEEK: u64 = 7 * 24 * 3_600_000;

    fn receipt(user: &str, node: &str, credits: u64, at: u64) -> Receipt {
        let key = PublicKey::of(&secret_of("any"));
        Receipt {
            usage: Digest([0; 32]),
            lease: Digest([0; 32]),
            job: JobId(Digest([0; 32])),
            scheduler: SchedulerId(key),
            node: NodeId(key),
            node_institution: node.parse().unwrap(),
            user: UserId(key),
            user_institution: user.parse().unwrap(),
            observed: DeviceMillis(0),
            billed: DeviceMillis(0),
            credits: Credits(credits),
            flags: Vec::new(),
            rate_card: 0,
            disputable_until: UtcMillis(0),
            issued_at: UtcMillis(at),
        }
    }

    fn name(text: &str) -> Institution {
        text.parse().unwrap()
    }

    #[test]
    fn what_was_used_halves_with_every_half_life() {
        let mut fair = FairShare::default();
        fair.note(&receipt("uni-a", "uni-b", 1_000_000, 10 * WEEK + 12_345_678));
        for (weeks, expected) in [(0, 1_000_000), (1, 500_000), (2, 250_000), (10, 976)] {
            let now = UtcMillis((10 + weeks) * WEEK + 12_345_678);
            let left = fair.standings(now)[0].used.0;
            assert!(
                left.abs_diff(expected) <= 1 + expected / 10_000,
                "{weeks}: {left}"
            );
        }
        let half_way = fair.standings(UtcMillis(10 * WEEK + 12_345_678 + WEEK / 2))[0]
            .used
            .0;
        assert!(half_way.abs_diff(707_107) < 100, "{half_way}");
    }

    #[test]
    fn who_used_least_for_its_target_comes_first() {
        let mut fair = FairShare::default();
        let now = UtcMillis(100 * WEEK);
        let names = [name("uni-a"), name("uni-b"), name("uni-c")];
        fair.note(&receipt("uni-a", "uni-c", 900, now.0));
        fair.note(&receipt("uni-b", "uni-c", 500, now.0));
        let order = |fair: &FairShare| {
            let targets = fair.targets(now, names.iter());
            let mut order: Vec<&Institution> = names.iter().collect();
            order.sort_by_key(|n| fair.turn(now, n, targets[n]));
            order
                .iter()
                .map(|n| n.as_str().to_owned())
                .collect::<Vec<_>>()
                .join(" ")
        };
        assert_eq!(order(&fair), "uni-c uni-b uni-a");
        // What runs counts at once, and not for ever.
        fair.start(&names[1], Credits(600));
        assert_eq!(order(&fair), "uni-c uni-a uni-b");
        fair.stop(&names[1], Credits(600));
        assert_eq!(order(&fair), "uni-c uni-b uni-a");
    }

    #[test]
    fn giving_raises_the_target_and_nobody_falls_under_the_floor() {
        let mut fair = FairShare::default();
        let now = UtcMillis(100 * WEEK);
        let names = [name("uni-a"), name("uni-b"), name("uni-c"), name("uni-d")];
        fair.note(&receipt("uni-a", "uni-b", 1_000_000, now.0));
        let targets = fair.targets(now, names.iter());
        assert!(targets[&names[1]] > 600_000, "{targets:?}");
        for poor in [0, 2, 3] {
            assert!(targets[&names[poor]] >= 124_000, "{targets:?}");
        }
        let granted = FairShare::new(Shares {
            grants_percent: [(names[3].clone(), 100)].into(),
            ..Shares::default()
        });
        let targets = granted.targets(now, names.iter());
        assert_eq!(targets[&names[3]], 400_000);
    }

    #[test]
    fn donated_time_counts_and_ones_own_does_not() {
        let mut fair = FairShare::default();
        let mut gift = receipt("uni-a", "uni-b", 0, WEEK);
        gift.billed = DeviceMillis(3_600_000);
        assert_eq!(fair.note(&gift).len(), 2);
        assert!(fair.note(&receipt("uni-a", "uni-a", 5, WEEK)).is_empty());
        assert_eq!(fair.standings(UtcMillis(WEEK))[0].used, Credits(100_000));
    }

    proptest! {
        /// Whoever recomputes it from the ledger gets the same, in whatever order the receipts come.
        #[test]
        fn the_order_of_arrival_does_not_matter(
            list in proptest::collection::vec((0..4usize, 0..4usize, 0..1_000_000_000u64, 0..60 * WEEK), 1..60),
            turns in any::<u64>(),
        ) {
            let names = ["uni-a", "uni-b", "uni-c", "uni-d"];
            let receipts: Vec<Receipt> = list
                .iter()
                .map(|(user, node, credits, at)| receipt(names[*user], names[*node], *credits, *at))
                .collect();
            let mut shuffled = receipts.clone();
            let mut state = turns;
            for i in (1..shuffled.len()).rev() {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                shuffled.swap(i, (state >> 33) as usize % (i + 1));
            }
            let of = |receipts: &[Receipt]| {
                let mut fair = FairShare::default();
                for receipt in receipts {
                    fair.note(receipt);
                }
                fair.accounts
            };
            prop_assert_eq!(of(&receipts), of(&shuffled));
        }
    }
}
