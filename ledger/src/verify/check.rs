//! The checks that need one line only: form, hash, signatures, evidence. Done on all cores.
use super::{
    VerifyOptions,
    fault::FaultKind,
    lines::{Text, parse_entry},
};
use crate::{
    batch::Checker,
    book::{BookError, ENTRY_BYTES_MAX, Entry},
    evidence::{EvidenceError, Examined, GIST_MAX, examine_digested, examine_dropped},
    export::{FORMAT, FORMAT_BEFORE, Header},
};
use base64::{Engine, prelude::BASE64_STANDARD};
use karez_core::{id::Digest, key::SchedulerId, money::Posting, records::to_check, unit::UtcMillis};

pub(super) fn check_header(header: &Header, options: &VerifyOptions) -> Result<(), FaultKind> {
    if ![FORMAT, FORMAT_BEFORE].contains(&header.format.as_str()) {
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
    /// As the line says.
    pub(super) gist: Vec<u8>,
    pub(super) dropped: bool,
}

struct Read {
    entry: Entry,
    hash: Digest,
    expected: Digest,
    /// Of the records, whether they are there or not.
    digest: Digest,
}

fn read(line: &[u8]) -> Result<Read, FaultKind> {
    let line = parse_entry(line)?;
    let bad = |expected, why| FaultKind::Unreadable { expected, why };
    if line.evidence.is_some() == line.dropped.is_some() {
        let why = "it needs its records or, when they were dropped, their digest".into();
        return Err(bad("an entry", why));
    }
    let texts = line.evidence.unwrap_or_default();
    let mut evidence = Vec::with_capacity(texts.len());
    for (i, text) in texts.iter().enumerate() {
        let decoded = BASE64_STANDARD.decode(text);
        evidence.push(decoded.map_err(|e| bad("base64", format!("evidence {i}: {e}")))?);
    }
    let gist = hex::decode(line.gist).map_err(|e| bad("hex", format!("the gist: {e}")))?;
    // The one spelling of hex is the lower-case one.
    if line.gist.bytes().any(|b| b.is_ascii_uppercase()) {
        return Err(FaultKind::NotCanonical);
    }
    if gist.len() > GIST_MAX {
        return Err(bad(
            "a gist",
            format!("it has {} bytes, the limit is {GIST_MAX}", gist.len()),
        ));
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
        gist,
        dropped: line.dropped,
    };
    let bytes = entry.encoded_len();
    if bytes > ENTRY_BYTES_MAX {
        return Err(BookError::TooLarge { bytes }.into());
    }
    let digest = entry.evidence_digest();
    Ok(Read {
        hash: line.hash,
        expected: entry.hash_by(&digest),
        entry,
        digest,
    })
}

/// Checks lines by themselves, their signatures together.
pub(super) fn check_lines(
    text: &Text,
    scheduler: SchedulerId,
    checker: &mut Checker,
) -> Vec<Result<Checked, FaultKind>> {
    let read: Vec<Result<Read, FaultKind>> = text.lines().map(read).collect();
    let records = read.iter().flatten().flat_map(|r| &r.entry.posting.evidence);
    checker.take(records.filter_map(|bytes| to_check(bytes)));
    let checker = &*checker;
    let examined = |read: Read| {
        let Entry {
            seq,
            previous,
            at,
            posting,
            gist,
            dropped,
        } = read.entry;
        Checked {
            seq,
            previous,
            hash: read.hash,
            expected: read.expected,
            at,
            records: posting.evidence.len() as u64,
            examined: match dropped {
                None => examine_digested(posting, scheduler, checker, read.digest),
                Some(digest) => examine_dropped(posting, scheduler, &gist, digest),
            },
            gist,
            dropped: dropped.is_some(),
        }
    };
    read.into_iter().map(|line| line.map(examined)).collect()
}
