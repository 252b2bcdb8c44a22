//! Months and dates in UTC.
use karez_core::unit::UtcMillis;
use std::{fmt, str::FromStr};

const DAY: u64 = 24 * 3_600_000;

/// One month of the Gregorian calendar, in UTC: `2026-11`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Month {
    year: u16,
    month: u8,
}

/// Text that names no month.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a month: expected a year and a month, like 2026-11")]
pub struct MonthError(String);

impl FromStr for Month {
    type Err = MonthError;
    fn from_str(text: &str) -> Result<Self, MonthError> {
        let read = || {
            let (year, month) = text.split_once('-')?;
            if year.len() != 4 || month.len() != 2 || !text.bytes().all(|b| b.is_ascii_digit() || b == b'-') {
                return None;
            }
            let (year, month) = (year.parse().ok()?, month.parse().ok()?);
            ((1970..=9998).contains(&year) && (1..=12).contains(&month)).then_some(Self { year, month })
        };
        read().ok_or_else(|| MonthError(text.chars().take(20).collect()))
    }
}

impl fmt::Display for Month {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04}-{:02}", self.year, self.month)
    }
}

impl Month {
    /// The month of a moment.
    pub fn of(at: UtcMillis) -> Self {
        let (year, month, _) = date(at);
        Self { year, month }
    }

    /// The year.
    pub fn year(self) -> u16 {
        self.year
    }

    /// From 1 to 12.
    pub fn number(self) -> u8 {
        self.month
    }

    /// Its first moment.
    pub fn start(self) -> UtcMillis {
        UtcMillis(days(self.year, self.month) * DAY)
    }

    /// The first moment after it.
    pub fn end(self) -> UtcMillis {
        match self.month {
            12 => UtcMillis(days(self.year + 1, 1) * DAY),
            _ => UtcMillis(days(self.year, self.month + 1) * DAY),
        }
    }

    /// Is that moment in it?
    pub fn contains(self, at: UtcMillis) -> bool {
        (self.start()..self.end()).contains(&at)
    }
}

fn is_leap(year: u16) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

fn month_days(year: u16, month: u8) -> u64 {
    match month {
        2 if is_leap(year) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Days from 1970 to the first of a month.
fn days(year: u16, month: u8) -> u64 {
    let before = u64::from(year - 1);
    let leaps = before / 4 - before / 100 + before / 400;
    // 477 leap days lie before 1970.
    let years = u64::from(year - 1970) * 365 + leaps - 477;
    years + (1..month).map(|m| month_days(year, m)).sum::<u64>()
}

/// Year, month and day of a moment. Records name none after the year 9999.
pub(super) fn date(at: UtcMillis) -> (u16, u8, u8) {
    let mut left = at.0 / DAY;
    let mut year = 1970;
    while year < 9999 {
        let len = if is_leap(year) { 366 } else { 365 };
        if left < len {
            break;
        }
        left -= len;
        year += 1;
    }
    let mut month = 1;
    while month < 12 && left >= month_days(year, month) {
        left -= month_days(year, month);
        month += 1;
    }
    // At most 31 days are left.
    (year, month, (left + 1).min(31) as u8)
}

/// `2026-11-23T18:00:00Z`, cut to the second.
pub(super) fn rfc3339(at: UtcMillis) -> String {
    let (year, month, day) = date(at);
    let s = at.0 / 1000 % 86_400;
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z",
        s / 3600,
        s / 60 % 60,
        s % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn months_begin_and_end_where_the_calendar_says() {
        for (text, start, end) in [
            ("1970-01", 0, 2_678_400_000),
            ("2000-02", 949_363_200_000, 951_868_800_000),
            ("2024-02", 1_706_745_600_000, 1_709_251_200_000),
            ("2026-11", 1_793_491_200_000, 1_796_083_200_000),
            ("2026-12", 1_796_083_200_000, 1_798_761_600_000),
        ] {
            let month: Month = text.parse().unwrap();
            assert_eq!((month.start().0, month.end().0), (start, end), "{text}");
            assert_eq!(month.to_string(), text);
            assert_eq!(Month::of(month.start()), month);
            assert_eq!(Month::of(UtcMillis(end - 1)), month);
            assert!(month.contains(UtcMillis(start)) && !month.contains(UtcMillis(end)));
        }
        for bad in [
            "2026-13", "2026-00", "26-11", "2026-1", "2026/11", "", "+026-11", "1969-12",
        ] {
            assert!(bad.parse::<Month>().is_err(), "{bad}");
        }
        assert_eq!(rfc3339(UtcMillis(1_790_000_000_999)), "2026-09-21T14:13:20Z");
    }
}
