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
