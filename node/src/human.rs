//! Sizes, spans and prices as people write them in `node.toml`.
use karez_core::unit::{Bytes, Credits, Millis, Rate};
use serde::{Deserialize, Deserializer, de};
use std::fmt;

/// A size: `512 MiB`, `20GiB`, `1.5 TB`, or a number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size(pub Bytes);

/// A span of time: `500 ms`, `5s`, `10 min`, `2 h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span(pub Millis);

/// A price in credits for one device during one hour: `0`, `0.25`, `"1.5"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Price(pub Rate);

/// A share of one device in thousandths, from a thousandth to all of it: `0.25`, `"0.5"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share(pub u32);

/// Text that is no such quantity; says what would be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not {what}: write it like {like}")]
pub struct QuantityError {
    text: String,
    what: &'static str,
    like: &'static str,
}

const SIZES: [(&str, u64); 10] = [
    ("", 1),
    ("b", 1),
    ("kib", 1 << 10),
    ("mib", 1 << 20),
    ("gib", 1 << 30),
    ("tib", 1 << 40),
    ("kb", 1_000),
    ("mb", 1_000_000),
    ("gb", 1_000_000_000),
    ("tb", 1_000_000_000_000),
];

const SPANS: [(&str, u64); 7] = [
    ("ms", 1),
    ("s", 1_000),
    ("sec", 1_000),
    ("m", 60_000),
    ("min", 60_000),
    ("h", 3_600_000),
    ("d", 86_400_000),
];

/// A number with at most three decimals times its unit. Integers throughout: what is written is what is meant.
fn scaled(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let text = text.trim();
    let split = text
        .find(|c: char| !(c.is_ascii_digit() || c == '.' || c == '_'))
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let unit = unit.trim().to_ascii_lowercase();
    let factor = units.iter().find(|(name, _)| *name == unit)?.1;
    let number = number.replace('_', "");
    let (whole, part) = number.split_once('.').unwrap_or((&number, ""));
    if part.len() > 3 || part.contains('.') {
        return None;
    }
    let whole: u64 = whole.parse().ok()?;
    let thousandths: u64 = format!("{part:0<3}").parse().ok()?;
    let amount = (u128::from(whole) * 1000 + u128::from(thousandths)) * u128::from(factor) / 1000;
    u64::try_from(amount).ok()
}

impl std::str::FromStr for Size {
    type Err = QuantityError;
    fn from_str(text: &str) -> Result<Self, QuantityError> {
        scaled(text, &SIZES)
            .map(|n| Self(Bytes(n)))
            .ok_or_else(|| QuantityError {
                text: clip(text),
                what: "a size",
                like: "512 MiB or 20 GiB",
            })
    }
}

impl std::str::FromStr for Span {
    type Err = QuantityError;
    fn from_str(text: &str) -> Result<Self, QuantityError> {
        scaled(text, &SPANS)
            .map(|n| Self(Millis(n)))
            .ok_or_else(|| QuantityError {
                text: clip(text),
                what: "a span of time",
                like: "500 ms, 10 s or 5 min",
            })
    }
}

impl std::str::FromStr for Share {
    type Err = QuantityError;
    fn from_str(text: &str) -> Result<Self, QuantityError> {
        let milli = scaled(text, &[("", 1_000)]).filter(|milli| (1..=1_000).contains(milli));
        // At most a thousand.
        milli
            .map(|milli| Self(milli as u32))
            .ok_or_else(|| QuantityError {
                text: clip(text),
                what: "a share of a device, from 0.001 to 1",
                like: "0.25",
            })
    }
}

fn clip(text: &str) -> String {
    text.chars().take(40).collect()
}

/// `1.5 GiB`: the largest unit that leaves a number of at least one.
pub fn bytes(bytes: Bytes) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes.0 as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 || value.fract() < 0.05 {
        format!("{value:.0} {}", units[unit])
    } else {
        format!("{value:.1} {}", units[unit])
    }
}

struct Written<T>(std::marker::PhantomData<T>);

/// Reads `T` from a TOML string or number.
trait Quantity: Sized {
    const EXPECTED: &'static str;
    fn text(text: &str) -> Result<Self, String>;
}

impl Quantity for Size {
    const EXPECTED: &'static str = "a size like \"20 GiB\"";
    fn text(text: &str) -> Result<Self, String> {
        text.parse().map_err(|e: QuantityError| e.to_string())
    }
}

impl Quantity for Span {
    const EXPECTED: &'static str = "a span of time like \"10 s\"";
    fn text(text: &str) -> Result<Self, String> {
        text.parse().map_err(|e: QuantityError| e.to_string())
    }
}

impl Quantity for Share {
    const EXPECTED: &'static str = "a share of a device like 0.25";
    fn text(text: &str) -> Result<Self, String> {
        text.parse().map_err(|e: QuantityError| e.to_string())
    }
}

impl Quantity for Price {
    const EXPECTED: &'static str = "credits per device-hour like 0.25";
    fn text(text: &str) -> Result<Self, String> {
        text.trim()
            .parse()
            .map(|c: Credits| Self(Rate(c.0)))
            .map_err(|e| e.to_string())
    }
}

impl<T: Quantity> de::Visitor<'_> for Written<T> {
    type Value = T;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(T::EXPECTED)
    }
    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        T::text(text).map_err(E::custom)
    }
    fn visit_i64<E: de::Error>(self, number: i64) -> Result<T, E> {
        T::text(&number.to_string()).map_err(E::custom)
    }
    fn visit_u64<E: de::Error>(self, number: u64) -> Result<T, E> {
        T::text(&number.to_string()).map_err(E::custom)
    }
    fn visit_f64<E: de::Error>(self, number: f64) -> Result<T, E> {
        // Prints the shortest decimal that means the same number, which is what was written.
        T::text(&number.to_string()).map_err(E::custom)
    }
}

macro_rules! written {
    ($($name:ident),*) => {$(
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                from.deserialize_any(Written(std::marker::PhantomData))
            }
        }
    )*};
}
written!(Size, Span, Price, Share);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_read_as_people_write_them() {
        for (text, expected) in [
            ("512 MiB", Some(512 << 20)),
            ("1.5gib", Some(3 << 29)),
            ("20GB", Some(20_000_000_000)),
            ("1_000", Some(1000)),
            ("1000 b", Some(1000)),
            ("", None),
            ("GiB", None),
            ("-1 GiB", None),
            ("1.2.3 GiB", None),
            ("99999999 TiB", None),
            ("5 parsecs", None),
        ] {
            assert_eq!(text.parse::<Size>().ok().map(|s| s.0.0), expected, "{text}");
        }
        for (text, expected) in [
            ("500 ms", Some(500)),
            ("1.5s", Some(1500)),
            ("5 min", Some(300_000)),
            ("7", None),
        ] {
            assert_eq!(text.parse::<Span>().ok().map(|s| s.0.0), expected, "{text}");
        }
        assert_eq!(bytes(Bytes(3 << 29)), "1.5 GiB");
        assert_eq!(bytes(Bytes(20 << 30)), "20 GiB");
        assert_eq!(bytes(Bytes(17)), "17 B");
    }
}
