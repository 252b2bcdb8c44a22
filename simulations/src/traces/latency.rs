//! Round trips between countries (RIPE Atlas, by way of ouroboros-leios): mean and deviation.
use super::table::{Table, TraceError};
use std::path::Path;

/// One pair of countries.
#[derive(Debug, Clone, PartialEq)]
pub struct RoundTrip {
    /// ISO 3166 alpha-2.
    pub from: String,
    /// ISO 3166 alpha-2; may be the same.
    pub to: String,
    /// Milliseconds.
    pub mean_ms: f64,
    /// Milliseconds; none where it was measured once.
    pub deviation_ms: Option<f64>,
}

/// The slowest satellite link stays under it, in milliseconds; a deviation may hold outages of an hour.
const MEAN_MAX: f64 = 5_000.0;
const DEVIATION_MAX: f64 = 3_600_000.0;

/// So it is published where the country of a probe was not known: those rows are left out.
const UNKNOWN: [&str; 2] = ["None", "Unknown"];

/// Reads `country_rtt.csv` or `country_rtt.csv.gz`. Minima and maxima are not read: some are impossible.
pub fn round_trips(file: &Path) -> Result<Vec<RoundTrip>, TraceError> {
    let table = Table::read(file)?;
    let (from, to) = (table.column("cty1")?, table.column("cty2")?);
    let (mean, deviation) = (table.column("rtt_avg")?, table.column("rtt_std")?);
    table
        .rows()
        .filter(|row| !UNKNOWN.contains(&row.text(from)) && !UNKNOWN.contains(&row.text(to)))
        .map(|row| {
            let code = |column| {
                let code = row.name(column)?;
                if code.len() != 2 || !code.bytes().all(|b| b.is_ascii_uppercase()) {
                    let why = format!("{code:?} is not a code of two capital letters");
                    return Err(row.bad(column, why));
                }
                Ok(code)
            };
            let mean_ms = row.number(mean, MEAN_MAX, "milliseconds")?;
            if mean_ms == 0.0 {
                return Err(row.bad(mean, "no message arrives in no time"));
            }
            let deviation_ms = match row.text(deviation) {
                "" => None,
                _ => Some(row.number(deviation, DEVIATION_MAX, "milliseconds")?),
            };
            Ok(RoundTrip {
                from: code(from)?,
                to: code(to)?,
                mean_ms,
                deviation_ms,
            })
        })
        .collect()
}
