//! The ledger as a file that anyone can check with [`crate::verify()`], from the file and public keys alone.
//!
//! Lines of JSON, each ended by one newline, each in exactly one way of writing it (no spaces, fields in this order):
//!
//! ```text
//! {"format":"karez-ledger/4","scheduler":KEY,"created":MS,"signature":HEX}
//! {"seq":0,"previous":HASH,"hash":HASH,"at":MS,"kind":"grant","legs":[[ACCOUNT,MICROCREDITS],…],"gist":HEX,"evidence":[BASE64,…]}
//! {"seq":1, … ,"legs":[…],"gist":HEX,"dropped":HASH}
//! …
//! {"entries":N,"head":HASH,"balances":HASH,"checkpoint":NOTE,"lines":HASH,"signature":HEX}
//! ```
//!
//! Hashes, gists and keys are lower-case hex; evidence is standard base64 of record envelopes. An entry whose records were
//! dropped has their digest instead. `lines` is the BLAKE3 of every
//! byte before the trailer; `checkpoint` is the signed tree head ([`crate::head`]). The signatures are the scheduler's (Ed25519), over the texts
//! `KarezLedgerV1 header karez-ledger/4 SCHEDULER CREATED` (without the format in `karez-ledger/3`, which is read too) and
//! `KarezLedgerV1 trailer SCHEDULER CREATED ENTRIES HEAD BALANCES ROOT LINES`, with the tree's root. Hashes of entries and balances are defined in
//! [`crate::book`].
use crate::{
    book::{Book, BookError, ENTRY_BYTES_MAX, Entry, balances_digest, genesis},
    head::Head,
    store::StoreError,
    tree::{Frontier, entry_leaf},
};
use base64::{Engine, prelude::BASE64_STANDARD};
use karez_core::{
    id::Digest,
    key::{PublicKey, SchedulerId, SecretKey, sign},
    money::{Account, Accounts, PostingKind},
    unit::UtcMillis,
};
use serde::{Deserialize, Serialize};
use std::io::Write;

/// The first field of every export.
pub const FORMAT: &str = "karez-ledger/4";
/// That of exports of before, which are read too: no settlement's gist names a benchmark.
pub const FORMAT_BEFORE: &str = "karez-ledger/3";
/// The longest line, in bytes: base64 makes four of three.
pub const LINE_BYTES_MAX: usize = ENTRY_BYTES_MAX / 3 * 4 + 64 * 1024;

/// Why an export failed.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// Reading the ledger failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The ledger's own entries break a rule.
    #[error("entry {seq}: {why}")]
    Entry {
        /// Which entry.
        seq: u64,
        /// Which rule.
        why: BookError,
    },
    /// Writing failed.
    #[error("cannot write the export: {0}")]
    Io(#[from] std::io::Error),
}

/// What an export ends with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exported {
    /// Entries written.
    pub entries: u64,
    /// Hash of the last one.
    pub head: Digest,
    /// Digest of all balances.
    pub balances: Digest,
    /// The signed tree head.
    pub tree_head: Head,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Header {
    pub(crate) format: String,
    pub(crate) scheduler: SchedulerId,
    pub(crate) created: UtcMillis,
    pub(crate) signature: String,
}

impl Header {
    /// What the scheduler signs. The trailer covers the header too; this names a fault in the header where it stands.
    pub(crate) fn message(&self) -> String {
        let Self {
            format,
            scheduler,
            created,
            ..
        } = self;
        match format.as_str() {
            FORMAT_BEFORE => format!("KarezLedgerV1 header {scheduler} {}", created.0),
            format => format!("KarezLedgerV1 header {format} {scheduler} {}", created.0),
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Line<'a> {
    pub(crate) seq: u64,
    pub(crate) previous: Digest,
    pub(crate) hash: Digest,
    pub(crate) at: UtcMillis,
    pub(crate) kind: PostingKind,
    pub(crate) legs: Vec<(Account, i64)>,
    pub(crate) gist: &'a str,
    /// Base64 and hex need no escapes, so they are read where they stand.
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    pub(crate) evidence: Option<Vec<&'a str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) dropped: Option<Digest>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Trailer {
    pub(crate) entries: u64,
    pub(crate) head: Digest,
    pub(crate) balances: Digest,
    pub(crate) checkpoint: String,
    pub(crate) lines: Digest,
    pub(crate) signature: String,
}

impl Trailer {
    /// What the scheduler signs.
    pub(crate) fn message(&self, scheduler: SchedulerId, created: UtcMillis) -> String {
        let Self {
            entries,
            head,
            balances,
            lines,
            checkpoint,
            ..
        } = self;
        let created = created.0;
        let root = checkpoint.split('\n').nth(2).unwrap_or_default();
        format!("KarezLedgerV1 trailer {scheduler} {created} {entries} {head} {balances} {root} {lines}")
    }
}

/// A line with its newline.
pub(crate) fn to_line<T: Serialize>(value: &T) -> Result<Vec<u8>, serde_json::Error> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    Ok(line)
}

/// Writes the ledger of `secret`'s owner as lines of JSON: a header, every entry from the first, a signed trailer.
///
/// `entries` is read as it is written, so memory stays small; wrap `out` in a `BufWriter`. Signatures of records are
/// not checked again here: that is the verifier's work.
pub fn export(
    out: &mut dyn Write,
    secret: &SecretKey,
    created: UtcMillis,
    entries: impl Iterator<Item = Result<Entry, StoreError>>,
) -> Result<Exported, ExportError> {
    let mut exporter = Exporter::begin(out, secret, created)?;
    let mut book = Book::new(SchedulerId(PublicKey::of(secret)));
    for entry in entries {
        let entry = entry?;
        let seq = entry.seq;
        book.recall(&entry)
            .map_err(|why| ExportError::Entry { seq, why })?;
        exporter.entry(entry)?;
    }
    exporter.finish(book.accounts())
}

/// Writes the lines of an export, one by one. It believes what it is given: [`export`] checks, and so does whoever
/// reads the file.
pub struct Exporter<'a> {
    out: &'a mut dyn Write,
    secret: &'a SecretKey,
    created: UtcMillis,
    lines: blake3::Hasher,
    tree: Frontier,
    head: Digest,
}

impl<'a> Exporter<'a> {
    /// Writes the header.
    pub fn begin(
        out: &'a mut dyn Write,
        secret: &'a SecretKey,
        created: UtcMillis,
    ) -> Result<Self, ExportError> {
        let scheduler = SchedulerId(PublicKey::of(secret));
        let mut header = Header {
            format: FORMAT.to_owned(),
            scheduler,
            created,
            signature: String::new(),
        };
        header.signature = hex::encode(sign(secret, header.message().as_bytes()));
        let mut exporter = Self {
            out,
            secret,
            created,
            lines: blake3::Hasher::new(),
            tree: Frontier::default(),
            head: genesis(scheduler),
        };
        exporter.put(&header)?;
        Ok(exporter)
    }

    fn put<T: Serialize>(&mut self, value: &T) -> Result<(), ExportError> {
        let line = to_line(value).map_err(std::io::Error::from)?;
        self.lines.update(&line);
        Ok(self.out.write_all(&line)?)
    }

    /// Writes an entry.
    pub fn entry(&mut self, entry: Entry) -> Result<(), ExportError> {
        self.head = entry.hash();
        self.tree.push(entry_leaf(&self.head));
        let evidence = &entry.posting.evidence;
        let evidence: Vec<String> = evidence.iter().map(|e| BASE64_STANDARD.encode(e)).collect();
        let gist = hex::encode(&entry.gist);
        let line = Line {
            seq: entry.seq,
            previous: entry.previous,
            hash: self.head,
            at: entry.at,
            kind: entry.posting.kind,
            legs: entry.posting.legs,
            gist: &gist,
            evidence: match entry.dropped {
                None => Some(evidence.iter().map(String::as_str).collect()),
                Some(_) => None,
            },
            dropped: entry.dropped,
        };
        self.put(&line)
    }

    /// Writes the trailer.
    pub fn finish(self, accounts: &Accounts) -> Result<Exported, ExportError> {
        let exported = Exported {
            entries: self.tree.size(),
            head: self.head,
            balances: balances_digest(accounts),
            tree_head: Head::sign(self.secret, self.tree.size(), self.tree.root()),
        };
        let mut trailer = Trailer {
            entries: exported.entries,
            head: exported.head,
            balances: exported.balances,
            checkpoint: exported.tree_head.to_string(),
            lines: Digest(*self.lines.finalize().as_bytes()),
            signature: String::new(),
        };
        let message = trailer.message(exported.tree_head.scheduler, self.created);
        trailer.signature = hex::encode(sign(self.secret, message.as_bytes()));
        self.out
            .write_all(&to_line(&trailer).map_err(std::io::Error::from)?)?;
        self.out.flush()?;
        Ok(exported)
    }
}
