//! The ledger as a file that anyone can check.
use crate::{book::Entry, store::StoreError};
use karez_core::{id::Digest, key::SecretKey, unit::UtcMillis};
use std::io::Write;

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
        why: crate::BookError,
    },
    /// Writing failed.
    #[error("cannot write the export: {0}")]
    Io(#[from] std::io::Error),
}

/// What an export ends with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exported {
    /// Entries written.
    pub entries: u64,
    /// Hash of the last one.
    pub head: Digest,
}

/// Writes the ledger of `secret`'s owner as lines of JSON: a header, every entry from the first, a signed trailer.
pub fn export(
    out: &mut dyn Write,
    secret: &SecretKey,
    created: UtcMillis,
    entries: impl Iterator<Item = Result<Entry, StoreError>>,
) -> Result<Exported, ExportError> {
    let _ = (out, secret, created, entries.count());
    todo!()
}
