//! The checks that need one line only: form, hash, signatures, evidence. Done on all cores.
use super::{VerifyOptions, fault::FaultKind, lines::parse};
use crate::{
    batch::Checker,
    book::{BookError, ENTRY_BYTES_MAX, Entry, hash_of},
    evidence::{EvidenceError, Examined, examine_by},
    export::{FORMAT, Header, Line},
};
use base64::{Engine, prelude::BASE64_STANDARD};
use karez_core::{id::Digest, key::SchedulerId, money::Posting, records::to_check, unit::UtcMillis};

pub(super) fn check_header(header: &Header, options: &VerifyOptions) -> Result<(), FaultKind> {
    if header.format != FORMAT {
        let found = header.format.chars().take(40).collect();
        return Err(FaultKind::Format { found });
    }
    let scheduler = header.scheduler;
    check_signature(scheduler, "header", &header.message(), &header.signature)?;
    match &options.keys {
        Some(keys) if !keys.contains(&scheduler) => Err(FaultKind::Untrusted { scheduler }),
        _ => Ok(()),
    }
}

pub(super) fn check_signature(
    scheduler: SchedulerId,
    what: &'static str,
    message: &str,
    signature: &str,
) -> Result<(), FaultKind> {
    let mut bytes = [0; 64];
    let wrong = FaultKind::Signature { what, scheduler };
    if hex::decode_to_slice(signature, &mut bytes).is_err() {
        return Err(wrong);
    }
    // The one spelling of hex is the lower-case one.
    if hex::encode(bytes) != signature {
        return Err(FaultKind::NotCanonical);
    }
    scheduler.0.verify(message.as_bytes(), &bytes).map_err(|_| wrong)
}

/// What one line holds once its own content was checked.
pub(super) struct Checked {
    pub(super) seq: u64,
    pub(super) previous: Digest,
    /// As the line says.
    pub(super) hash: Digest,
    /// Of its content.
    pub(super) expected: Digest,
    pub(super) at: UtcMillis,
    pub(super) records: u64,
    pub(super) examined: Result<Examined, EvidenceError>,
}

struct Read {
    entry: Entry,
    hash: Digest,
    expected: Digest,
}

fn read(line: &[u8]) -> Result<Read, FaultKind> {
    let line: Line = parse(line, "an entry")?;
    let mut evidence = Vec::with_capacity(line.evidence.len());
    for (i, text) in line.evidence.iter().enumerate() {
        evidence.push(BASE64_STANDARD.decode(text).map_err(|e| FaultKind::Unreadable {
            expected: "base64",
            why: format!("evidence {i}: {e}"),
        })?);
    }
    let entry = Entry {
        seq: line.seq,
        previous: line.previous,
        at: line.at,
        posting: Posting {
            kind: line.kind,
            legs: line.legs,
            evidence,
        },
    };
    let bytes = entry.encode();
    if bytes.len() > ENTRY_BYTES_MAX {
        return Err(BookError::TooLarge { bytes: bytes.len() }.into());
    }
    Ok(Read {
        entry,
        hash: line.hash,
        expected: hash_of(&bytes),
    })
}

/// Checks lines by themselves, their signatures together.
pub(super) fn check_lines(
    lines: &[Vec<u8>],
    scheduler: SchedulerId,
    checker: &mut Checker,
) -> Vec<Result<Checked, FaultKind>> {
    let read: Vec<Result<Read, FaultKind>> = lines.iter().map(|line| read(line)).collect();
    let records = read.iter().flatten().flat_map(|r| &r.entry.posting.evidence);
    checker.take(records.filter_map(|bytes| to_check(bytes)));
    let checker = &*checker;
    let examined = |read: Read| {
        let Entry {
            seq,
            previous,
            at,
            posting,
        } = read.entry;
        Checked {
            seq,
            previous,
            hash: read.hash,
            expected: read.expected,
            at,
            records: posting.evidence.len() as u64,
            examined: examine_by(posting, scheduler, checker),
        }
    };
    read.into_iter().map(|line| line.map(examined)).collect()
}
