//! Spot availability (`skypilot-org/spot-traces`): whether an instance could be had, at equal steps.
use super::table::{TraceError, text};
use serde_json::Value;
use std::path::Path;

/// When capacity was there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Availability {
    /// Seconds between two looks; 1 to 86,400.
    pub gap_s: u64,
    /// There, or not, from the first look on.
    pub up: Vec<bool>,
}

impl Availability {
    /// Whether it is there that many seconds into the trace; the trace repeats.
    pub fn at(&self, second: u64) -> bool {
        let step = (second / self.gap_s.max(1)) as usize;
        self.up.get(step % self.up.len().max(1)).copied().unwrap_or(false)
    }

    /// The share of looks that found it, in thousandths.
    pub fn per_mille(&self) -> u64 {
        let there = self.up.iter().filter(|up| **up).count();
        (there * 1_000 / self.up.len().max(1)) as u64
    }
}

/// Reads `{"metadata": {"gap_seconds": N}, "data": [1, 0, …]}`.
pub fn spot(file: &Path) -> Result<Availability, TraceError> {
    let document: Value = super::energy::document(&text(file)?, file)?;
    let bad = |column: String, why: String| TraceError::Value {
        file: file.to_owned(),
        line: 1,
        column,
        why,
    };
    let gap = &document["metadata"]["gap_seconds"];
    let gap_s = gap
        .as_u64()
        .filter(|gap| (1..=86_400).contains(gap))
        .ok_or_else(|| {
            let why = format!("{gap} is not a number of seconds from 1 to 86400: is it in another unit?");
            bad("metadata.gap_seconds".into(), why)
        })?;
    let data = document["data"]
        .as_array()
        .filter(|data| !data.is_empty())
        .ok_or_else(|| bad("data".into(), "is missing, or no list with a value in it".into()))?;
    let up = data
        .iter()
        .enumerate()
        .map(|(i, value)| match value.as_u64() {
            Some(0) => Ok(false),
            Some(1) => Ok(true),
            _ => Err(bad(format!("data[{i}]"), format!("{value} is neither 0 nor 1"))),
        })
        .collect::<Result<_, _>>()?;
    Ok(Availability { gap_s, up })
}
