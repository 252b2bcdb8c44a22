//! Electricity prices and carbon intensities by country.
use super::table::{Table, TraceError, text};
use serde_json::Value;
use std::{collections::BTreeMap, path::Path};

/// Nobody pays that much for a kilowatt-hour, in dollars.
const USD_MAX: f64 = 3.0;
/// Brown coal in old plants stays under it, in grams for a kilowatt-hour.
const GRAMS_MAX: f64 = 2_000.0;

/// US dollars for a kilowatt-hour, by ISO 3166 alpha-3 code.
pub fn electricity(file: &Path) -> Result<BTreeMap<String, f64>, TraceError> {
    let table = Table::read(file)?;
    let (iso, usd) = (table.column("iso3")?, table.column("price_usd_kwh")?);
    let mut out = BTreeMap::new();
    for row in table.rows() {
        let code = row.name(iso)?;
        if !is_iso3(&code) {
            return Err(row.bad(iso, format!("{code:?} is not a code of three capital letters")));
        }
        let price = row.number(usd, USD_MAX, "US dollars for a kilowatt-hour")?;
        if out.insert(code.clone(), price).is_some() {
            return Err(row.bad(iso, format!("{code} is there twice")));
        }
    }
    Ok(out)
}

/// Grams of CO2 for a kilowatt-hour, by ISO 3166 alpha-3 code.
pub fn carbon(file: &Path) -> Result<BTreeMap<String, f64>, TraceError> {
    let text = text(file)?;
    let document: Value = document(&text, file)?;
    // Where a key stands, for the message: the document is kept as it was written.
    let line_of = |code: &str| {
        let at = text.find(&format!("\"{code}\"")).unwrap_or(0);
        text[..at].matches('\n').count() as u64 + 1
    };
    let countries = document.as_object().ok_or_else(|| TraceError::Shape {
        file: file.to_owned(),
        line: 1,
        why: "is no object with a country each".into(),
    })?;
    let mut out = BTreeMap::new();
    for (code, country) in countries {
        let bad = |column: &str, why: String| TraceError::Value {
            file: file.to_owned(),
            line: line_of(code),
            column: format!("{code}{column}"),
            why,
        };
        if !is_iso3(code) {
            return Err(bad("", "is not a code of three capital letters".into()));
        }
        let value = &country["carbon_intensity"];
        let grams = value
            .as_f64()
            .ok_or_else(|| bad(".carbon_intensity", format!("{value} is not a number of g/kWh")))?;
        if !(0.0..=GRAMS_MAX).contains(&grams) || (grams > 0.0 && grams < 2.0) {
            let why = format!("{grams} g/kWh is not possible: is it in another unit than grams?");
            return Err(bad(".carbon_intensity", why));
        }
        out.insert(code.clone(), grams);
    }
    if out.is_empty() {
        return Err(TraceError::Shape {
            file: file.to_owned(),
            line: 1,
            why: "there is no country in it".into(),
        });
    }
    Ok(out)
}

fn is_iso3(code: &str) -> bool {
    code.len() == 3 && code.bytes().all(|b| b.is_ascii_uppercase())
}

pub(super) fn document(text: &str, file: &Path) -> Result<Value, TraceError> {
    serde_json::from_str(text).map_err(|e| TraceError::Shape {
        file: file.to_owned(),
        line: e.line().max(1) as u64,
        why: format!("is no JSON: {e}"),
    })
}
