//! Reading an export line by line, with a bound on each.
use super::fault::FaultKind;
use crate::export::{LINE_BYTES_MAX, Line, to_line};
use serde::{Deserialize, Serialize};
use std::io::{BufRead, Read};

/// Lines checked together, and bytes of them.
const BATCH_LINES: usize = 1536;
const BATCH_BYTES: usize = 8 << 20;

/// Reads the content of a header or trailer and makes sure that it is written the one right way.
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

/// The same for an entry. Its records are nearly all of it: they are compared where they stand, not written again.
pub(super) fn parse_entry(bytes: &[u8]) -> Result<Line<'_>, FaultKind> {
    let unreadable = |e: serde_json::Error| FaultKind::Unreadable {
        expected: "an entry",
        why: e.to_string(),
    };
    let mut line: Line<'_> = serde_json::from_slice(bytes).map_err(unreadable)?;
    let records = line.evidence.take();
    let mut start = serde_json::to_vec(&line).map_err(unreadable)?;
    line.evidence = records;
    let same = match &line.evidence {
        None => bytes.strip_prefix(&*start) == Some(b"\n"),
        // An entry has records or their digest; who has both is refused for that.
        Some(_) if line.dropped.is_some() => true,
        Some(records) => {
            start.pop();
            bytes
                .strip_prefix(&*start)
                .and_then(|rest| rest.strip_prefix(b",\"evidence\":["))
                .is_some_and(|rest| is_list(rest, records))
        }
    };
    if same {
        Ok(line)
    } else {
        Err(FaultKind::NotCanonical)
    }
}

/// Is `rest` these texts and the end of a line? They were read without escapes, so each is written as it is.
fn is_list(mut rest: &[u8], texts: &[&str]) -> bool {
    for (i, text) in texts.iter().enumerate() {
        let open: &[u8] = if i == 0 { b"\"" } else { b",\"" };
        let after = rest
            .strip_prefix(open)
            .and_then(|rest| rest.strip_prefix(text.as_bytes()))
            .and_then(|rest| rest.strip_prefix(b"\""));
        let Some(after) = after else { return false };
        rest = after;
    }
    rest == b"]}\n"
}

pub(super) struct Lines<'a> {
    pub(super) reader: &'a mut dyn BufRead,
    /// The line read last, from 1.
    pub(super) number: u64,
}

/// Lines as they stand in the file, one after the other.
#[derive(Default)]
pub(super) struct Text {
    pub(super) bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl Text {
    /// Each with its newline.
    pub(super) fn lines(&self) -> impl Iterator<Item = &[u8]> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(from, to)| &self.bytes[from..*to])
    }
}

pub(super) struct Batch {
    pub(super) entries: Text,
    pub(super) end: End,
}

pub(super) enum End {
    More,
    Cut,
    Trailer(Vec<u8>),
    /// The line after these cannot be read.
    Bad(FaultKind),
}

impl Lines<'_> {
    /// The next line with its newline; `None` when the file ends, or ends within a line.
    pub(super) fn next(&mut self) -> Result<Option<Vec<u8>>, FaultKind> {
        let mut line = Vec::new();
        Ok(self.append(&mut line)?.then_some(line))
    }

    /// The same to the end of `out`; whether there was one.
    fn append(&mut self, out: &mut Vec<u8>) -> Result<bool, FaultKind> {
        let start = out.len();
        self.number += 1;
        let mut limited = (&mut *self.reader).take(LINE_BYTES_MAX as u64 + 1);
        limited.read_until(b'\n', out)?;
        let line = &out[start..];
        if line.last() == Some(&b'\n') {
            return Ok(true);
        }
        if line.len() > LINE_BYTES_MAX {
            return Err(FaultKind::TooLong { max: LINE_BYTES_MAX });
        }
        if line.is_empty() {
            Ok(false)
        } else {
            Err(FaultKind::Truncated)
        }
    }

    /// Entries before the end, or before a bad line, are looked at first: the first fault counts.
    pub(super) fn batch(&mut self) -> Batch {
        let mut text = Text::default();
        let end = loop {
            if text.ends.len() == BATCH_LINES || text.bytes.len() >= BATCH_BYTES {
                break End::More;
            }
            let start = text.bytes.len();
            let end = match self.append(&mut text.bytes) {
                Ok(true) if text.bytes[start..].starts_with(b"{\"entries\":") => {
                    End::Trailer(text.bytes[start..].to_vec())
                }
                Ok(true) => {
                    text.ends.push(text.bytes.len());
                    continue;
                }
                Ok(false) | Err(FaultKind::Truncated) => End::Cut,
                Err(kind) => End::Bad(kind),
            };
            text.bytes.truncate(start);
            break end;
        };
        Batch { entries: text, end }
    }
}
