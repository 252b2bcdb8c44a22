//! Azure's hour of language-model requests (`AzureLLMInferenceTrace_conv`): when, and how many tokens.
use super::table::{Table, TraceError};
use std::path::Path;

/// One request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Milliseconds since the first request.
    pub at_ms: u64,
    /// Tokens of the prompt; at least 1.
    pub context_tokens: u32,
    /// Tokens of the answer.
    pub generated_tokens: u32,
}

/// No model of the time took or gave more.
const TOKENS_MAX: u64 = 10_000_000;

/// Reads the trace, in order of arrival.
pub fn requests(file: &Path) -> Result<Vec<Request>, TraceError> {
    let table = Table::read(file)?;
    let time = table.column("TIMESTAMP")?;
    let context = table.column("ContextTokens")?;
    let generated = table.column("GeneratedTokens")?;
    let (mut first, mut last) = (None, 0);
    table
        .rows()
        .map(|row| {
            let text = row.text(time);
            let at = millis(text).ok_or_else(|| {
                row.bad(
                    time,
                    format!("{text:?} is not a time like 2023-11-16 18:15:46.6805900"),
                )
            })?;
            let first = *first.get_or_insert(at);
            let Some(at_ms) = at.checked_sub(first).filter(|at| *at >= last) else {
                return Err(row.bad(time, format!("{text} is earlier than the row before")));
            };
            last = at_ms;
            let context_tokens = row.whole(context, TOKENS_MAX, "tokens")? as u32;
            if context_tokens == 0 {
                return Err(row.bad(context, "a request without a prompt"));
            }
            Ok(Request {
                at_ms,
                context_tokens,
                generated_tokens: row.whole(generated, TOKENS_MAX, "tokens")? as u32,
            })
        })
        .collect()
}

/// Milliseconds of `YYYY-MM-DD hh:mm:ss.fff…` since the year 0 of the proleptic Gregorian calendar.
fn millis(text: &str) -> Option<u64> {
    let (date, clock) = text.split_once(' ')?;
    let mut date = date.splitn(3, '-').map(str::parse::<u64>);
    let (year, month, day) = (date.next()?.ok()?, date.next()?.ok()?, date.next()?.ok()?);
    let mut clock = clock.splitn(3, ':');
    let hour: u64 = clock.next()?.parse().ok()?;
    let minute: u64 = clock.next()?.parse().ok()?;
    let second: f64 = clock.next()?.parse().ok()?;
    let sane = (1..=12).contains(&month)
        && (1..=31).contains(&day)
        && year < 10_000
        && hour < 24
        && minute < 60
        && (0.0..61.0).contains(&second);
    if !sane {
        return None;
    }
    // Months are counted from March, so that the leap day is the last of its year.
    let (y, m) = if month > 2 {
        (year, month - 3)
    } else {
        (year.checked_sub(1)?, month + 9)
    };
    let days = y * 365 + y / 4 - y / 100 + y / 400 + (153 * m + 2) / 5 + day - 1;
    Some(((days * 24 + hour) * 60 + minute) * 60_000 + (second * 1_000.0).round() as u64)
}
