//! Reading an export line by line, with a bound on each.
use super::fault::FaultKind;
use crate::export::{LINE_BYTES_MAX, to_line};
use serde::{Deserialize, Serialize};
use std::io::{BufRead, Read};

/// Lines checked together, and bytes of them.
const BATCH_LINES: usize = 768;
const BATCH_BYTES: usize = 8 << 20;

/// Reads one line's content and makes sure that it is written the one right way.
pub(super) fn parse<'a, T: Serialize + Deserialize<'a>>(
    line: &'a [u8],
    expected: &'static str,
) -> Result<T, FaultKind> {
    let unreadable = |e: serde_json::Error| FaultKind::Unreadable {
        expected,
        why: e.to_string(),
    };
    let value: T = serde_json::from_slice(line).map_err(unreadable)?;
    if to_line(&value).map_err(unreadable)? != line {
        return Err(FaultKind::NotCanonical);
    }
    Ok(value)
}

pub(super) struct Lines<'a> {
    pub(super) reader: &'a mut dyn BufRead,
    /// The line read last, from 1.
    pub(super) number: u64,
}

pub(super) struct Batch {
    pub(super) entries: Vec<Vec<u8>>,
    pub(super) end: End,
}

pub(super) enum End {
    More,
    Cut,
    Trailer(Vec<u8>),
}

impl Lines<'_> {
    /// The next line with its newline; `None` when the file ends, or ends within a line.
    pub(super) fn next(&mut self) -> Result<Option<Vec<u8>>, FaultKind> {
        let mut line = Vec::new();
        self.number += 1;
        let mut limited = (&mut *self.reader).take(LINE_BYTES_MAX as u64 + 1);
        limited.read_until(b'\n', &mut line)?;
        if line.last() == Some(&b'\n') {
            return Ok(Some(line));
        }
        if line.len() > LINE_BYTES_MAX {
            return Err(FaultKind::TooLong { max: LINE_BYTES_MAX });
        }
        if line.is_empty() {
            Ok(None)
        } else {
            Err(FaultKind::Truncated)
        }
    }

    pub(super) fn batch(&mut self) -> Result<Batch, FaultKind> {
        let mut entries = Vec::new();
        let mut bytes = 0;
        while entries.len() < BATCH_LINES && bytes < BATCH_BYTES {
            match self.next() {
                Ok(Some(line)) if line.starts_with(b"{\"entries\":") => {
                    let end = End::Trailer(line);
                    return Ok(Batch { entries, end });
                }
                Ok(Some(line)) => {
                    bytes += line.len();
                    entries.push(line);
                }
                // Entries before the end are looked at first: the first fault counts.
                Ok(None) | Err(FaultKind::Truncated) => {
                    return Ok(Batch {
                        entries,
                        end: End::Cut,
                    });
                }
                Err(other) => return Err(other),
            }
        }
        Ok(Batch {
            entries,
            end: End::More,
        })
    }
}
