//! Free capacity in steps.
use crate::prelude::*;

/// The most levels above "nothing".
pub(super) const LEVELS: usize = 48;

/// Free capacity, in steps: none, twentieths of one device, whole devices.
///
/// A request's level never exceeds that of a place which can hold it, so that no feasible place is overlooked;
/// what lies between two steps is the caller's exact judgement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Level(pub(super) u8);

/// Thousandths of a device from which each level begins; the first is level 1.
const STEPS: [u32; 30] = [
    1, 50, 100, 150, 200, 250, 300, 350, 400, 450, 500, 550, 600, 650, 700, 750, 800, 850, 900, 950, 1_000,
    2_000, 3_000, 4_000, 5_000, 6_000, 7_000, 8_000, 16_000, 64_000,
];

impl Level {
    /// Nothing is free.
    pub const NONE: Self = Self(0);

    /// The level of `milli` thousandths: of a place, what its largest free share is; of a request, what it needs.
    /// Whole devices count 1000 each; a share of one device counts less than 1000.
    pub fn of_milli(milli: u32) -> Self {
        Self(passed(&STEPS, milli))
    }

    /// The level of so many whole devices.
    pub fn of_devices(devices: u32) -> Self {
        Self::of_milli(devices.saturating_mul(1_000))
    }
}

/// How many steps lie at or under `milli`. All are looked at: that takes fewer cycles than one branch guessed wrongly.
fn passed(steps: &[u32], milli: u32) -> u8 {
    steps.iter().fold(0, |sum, step| sum + u8::from(*step <= milli))
}

/// Levels of one's own, where the sizes that requests ask for are known: between them nothing needs a closer look.
#[derive(Debug, Clone)]
pub struct Steps(Vec<u32>);

impl Steps {
    /// Of those needs, in thousandths of a device. When they are too many, evenly chosen ones; the least always counts.
    pub fn of(needs: impl IntoIterator<Item = u32>) -> Self {
        let all: BTreeSet<u32> = needs.into_iter().map(|need| need.max(1)).collect();
        let skip = all.len().div_ceil(LEVELS).max(1);
        Self(all.into_iter().step_by(skip).collect())
    }

    /// As [`Level::of_milli`], in these steps. All levels of one index must come from the same.
    #[inline]
    pub fn level(&self, milli: u32) -> Level {
        Level(passed(&self.0, milli))
    }
}
