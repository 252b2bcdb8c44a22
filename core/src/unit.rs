//! Money, time, sizes and counts as types of their own: no bare `u64` crosses a module's door.
use crate::prelude::*;
use core::fmt;
use serde::{Deserialize, Serialize};

macro_rules! quantity {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// None of it.
            pub const ZERO: Self = Self(0);
            /// The sum, or the largest value there is.
            #[must_use]
            pub fn saturating_add(self, other: Self) -> Self {
                Self(self.0.saturating_add(other.0))
            }
            /// The difference, or zero.
            #[must_use]
            pub fn saturating_sub(self, other: Self) -> Self {
                Self(self.0.saturating_sub(other.0))
            }
        }
    };
}

quantity!(
    /// Micro-credits: the unit of every account.
    Credits
);
quantity!(
    /// Milliseconds of one device being held. Two devices for one second are 2000.
    DeviceMillis
);
quantity!(
    /// Milliseconds since 1970 UTC. For records that others read; never for deciding what is late.
    UtcMillis
);
quantity!(
    /// Milliseconds on a process's own monotonic clock. For deciding what is late; means nothing elsewhere.
    MonoMillis
);
quantity!(
    /// A span of time in milliseconds.
    Millis
);
quantity!(
    /// Bytes of memory, disk or network.
    Bytes
);
quantity!(
    /// Thousandths of a work unit (a token of generation, a token of embedding, an item of a no-op) per second.
    Speed
);

impl Credits {
    /// One whole credit.
    pub const ONE: Self = Self(1_000_000);

    /// The amount as a signed leg of a posting. `None` above 9.2 trillion credits.
    pub fn leg(self) -> Option<i64> {
        i64::try_from(self.0).ok()
    }
}

impl fmt::Display for Credits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:06}", self.0 / 1_000_000, self.0 % 1_000_000)
    }
}

impl core::str::FromStr for Credits {
    type Err = UnitError;

    /// Reads credits with up to six decimals: `2`, `0.25`.
    fn from_str(text: &str) -> Result<Self, UnitError> {
        let bad = || UnitError::Credits {
            text: text.chars().take(40).collect(),
        };
        let (whole, part) = text.split_once('.').unwrap_or((text, ""));
        if part.len() > 6 || whole.is_empty() || !text.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
            return Err(bad());
        }
        let whole: u64 = whole.parse().map_err(|_| bad())?;
        let part: u64 = if part.is_empty() {
            0
        } else {
            format!("{part:0<6}").parse().map_err(|_| bad())?
        };
        whole
            .checked_mul(1_000_000)
            .and_then(|w| w.checked_add(part))
            .map(Credits)
            .ok_or_else(bad)
    }
}

/// Micro-credits for one device during one hour.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Rate(pub u64);

impl Rate {
    /// Donated capacity.
    pub const FREE: Self = Self(0);

    /// What `used` costs, rounded up in the provider's favour. `None` when the amount does not fit: refuse the job.
    pub fn bill(self, used: DeviceMillis) -> Option<Credits> {
        let amount = u128::from(self.0) * u128::from(used.0);
        u64::try_from(amount.div_ceil(3_600_000)).ok().map(Credits)
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == 0 {
            f.write_str("donated")
        } else {
            write!(f, "{}/h", Credits(self.0))
        }
    }
}

impl UtcMillis {
    /// This time `later` on.
    #[must_use]
    pub fn after(self, later: Millis) -> Self {
        Self(self.0.saturating_add(later.0))
    }
}

impl MonoMillis {
    /// This time `later` on.
    #[must_use]
    pub fn after(self, later: Millis) -> Self {
        Self(self.0.saturating_add(later.0))
    }
    /// How long ago `earlier` was; zero when it lies ahead.
    pub fn since(self, earlier: Self) -> Millis {
        Millis(self.0.saturating_sub(earlier.0))
    }
}

/// How much of one node's devices of a class is held: so many whole ones, or a share of one. In thousandths of a device,
/// never none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Portion(u32);

/// Thousandths of a whole device.
pub const WHOLE: u32 = 1_000;

impl Portion {
    /// One whole device.
    pub const ONE: Self = Self(WHOLE);

    /// So many whole devices, at least one.
    pub fn devices(count: u32) -> Self {
        Self(count.clamp(1, u32::MAX / WHOLE) * WHOLE)
    }

    /// So many thousandths of one device: `None` for nothing and for a whole one.
    pub fn share(milli: u32) -> Option<Self> {
        (1..WHOLE).contains(&milli).then_some(Self(milli))
    }

    /// As records tell it: so many devices, or a share of one. `None` where they contradict each other.
    pub fn of(devices: u32, share_milli: u32) -> Option<Self> {
        match (devices, share_milli) {
            (1.., 0) => Some(Self::devices(devices)),
            (0 | 1, milli) => Self::share(milli),
            _ => None,
        }
    }

    /// In thousandths of a device.
    pub fn milli(self) -> u32 {
        self.0
    }

    /// Whether it is less than a device.
    pub fn is_share(self) -> bool {
        self.0 < WHOLE
    }

    /// Whole devices; none for a share.
    pub fn count(self) -> u32 {
        self.0 / WHOLE
    }

    /// The share in thousandths; none for whole devices.
    pub fn share_milli(self) -> u32 {
        self.0 % WHOLE
    }

    /// Devices that have to do with it.
    pub fn touched(self) -> u32 {
        self.0.div_ceil(WHOLE)
    }

    /// What holding it so long counts as, rounded up.
    pub fn time(self, held: Millis) -> DeviceMillis {
        let milli = u128::from(held.0) * u128::from(self.0);
        DeviceMillis(u64::try_from(milli.div_ceil(WHOLE.into())).unwrap_or(u64::MAX))
    }

    /// How long it can be held for so much device time.
    pub fn lasts(self, time: DeviceMillis) -> Millis {
        let milli = u128::from(time.0) * u128::from(WHOLE) / u128::from(self.0.max(1));
        Millis(u64::try_from(milli).unwrap_or(u64::MAX))
    }

    /// What of one device's memory belongs to it: all of it, or its share.
    pub fn memory_of_one(self, device: Bytes) -> Bytes {
        let bytes = u128::from(device.0) * u128::from(self.0.min(WHOLE)) / u128::from(WHOLE);
        Bytes(u64::try_from(bytes).unwrap_or(u64::MAX))
    }
}

impl fmt::Display for Portion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.count(), self.share_milli()) {
            (0, milli) => f.write_str(format!("0.{milli:03}").trim_end_matches('0')),
            (count, _) => write!(f, "{count}"),
        }
    }
}

/// The two clocks, read together by the shell at each event.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Now {
    /// For records.
    pub utc: UtcMillis,
    /// For deadlines.
    pub mono: MonoMillis,
}

/// A quantity in text that could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// Not an amount of credits.
    #[error("{text:?} is not an amount of credits: write a number with at most six decimals, like 2 or 0.25")]
    Credits {
        /// The start of what was given.
        text: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bills_round_up_and_refuse_overflow() {
        for (rate, ms, expected) in [
            (0, 1_000, Some(0)),
            (3_600_000, 1, Some(1)),
            (3_600_001, 1, Some(2)),
            (1, 1, Some(1)),
            (1_000_000, 3_600_000, Some(1_000_000)),
            (u64::MAX, u64::MAX, None),
        ] {
            assert_eq!(
                Rate(rate).bill(DeviceMillis(ms)),
                expected.map(Credits),
                "{rate} for {ms} ms"
            );
        }
    }

    #[test]
    fn a_portion_is_whole_devices_or_a_share_of_one() {
        for (devices, share, expected) in [
            (1, 0, "1"),
            (3, 0, "3"),
            (0, 250, "0.25"),
            (1, 5, "0.005"),
            (0, 0, "none"),
            (0, 1_000, "none"),
            (2, 500, "none"),
        ] {
            let told = Portion::of(devices, share).map_or("none".into(), |portion| portion.to_string());
            assert_eq!(told, expected, "{devices} and {share}");
        }
        let quarter = Portion::share(250).unwrap();
        assert_eq!(
            quarter.time(Millis(1_001)),
            DeviceMillis(251),
            "in the provider's favour"
        );
        assert_eq!(quarter.lasts(DeviceMillis(251)), Millis(1_004));
        assert_eq!(quarter.memory_of_one(Bytes(16)), Bytes(4));
        assert_eq!(Portion::devices(2).memory_of_one(Bytes(16)), Bytes(16));
        assert_eq!(Portion::devices(2).time(Millis(30)), DeviceMillis(60));
        assert_eq!(Portion::devices(0), Portion::ONE);
    }

    #[test]
    fn credits_read_what_they_write() {
        for micro in [0, 1, 999_999, 1_000_000, 12_345_678, u64::MAX] {
            assert_eq!(Credits(micro).to_string().parse(), Ok(Credits(micro)));
        }
        for bad in [
            "",
            ".",
            "1.",
            "-1",
            "1e3",
            "0.1234567",
            "1..2",
            "99999999999999999999",
        ] {
            let read = bad.parse::<Credits>();
            assert!(bad == "1." || read.is_err(), "{bad} gave {read:?}");
        }
    }
}
