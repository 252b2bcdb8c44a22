//! Checks an export from the file and public keys alone.
use crate::evidence::EvidenceError;
use karez_core::{
    id::{Digest, Institution},
    key::SchedulerId,
    unit::{Credits, DeviceMillis, UtcMillis},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    io::BufRead,
};

/// What the verifier takes as given.
#[derive(Debug, Clone, Default)]
pub struct VerifyOptions {
    /// Schedulers whose ledgers are accepted; `None` accepts any and leaves the judgement to the reader of the summary.
    pub keys: Option<BTreeSet<SchedulerId>>,
}

/// What one institution earned.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Earned {
    /// Receipts settled.
    pub receipts: u64,
    /// Device time billed.
    pub billed: DeviceMillis,
    /// Credits received.
    pub credits: Credits,
}

/// A ledger that passed every check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// Whose ledger.
    pub scheduler: SchedulerId,
    /// When it was exported.
    pub created: UtcMillis,
    /// Entries.
    pub entries: u64,
    /// Hash of the last one.
    pub head: Digest,
    /// Digest of all balances.
    pub balances: Digest,
    /// Signed records checked.
    pub records: u64,
    /// Credits granted by the federation.
    pub granted: Credits,
    /// Credits set aside for jobs.
    pub reserved: Credits,
    /// Credits paid to institutions.
    pub settled: Credits,
    /// Credits returned to users.
    pub released: Credits,
    /// Who earned what.
    pub institutions: BTreeMap<Institution, Earned>,
}

/// The first thing wrong with an export, and where.
#[derive(Debug, thiserror::Error)]
#[error("line {line}{}: {kind}", entry.map(|e| format!(" (entry {e})")).unwrap_or_default())]
pub struct Fault {
    /// From 1.
    pub line: u64,
    /// The entry that should stand there, from 0; `None` for header and trailer.
    pub entry: Option<u64>,
    /// What is wrong.
    pub kind: FaultKind,
}

/// What can be wrong with an export.
#[derive(Debug, thiserror::Error)]
pub enum FaultKind {
    /// A record does not prove what the entry claims.
    #[error(transparent)]
    Evidence(#[from] EvidenceError),
}

/// Reads and checks a whole export with bounded memory. The first fault ends it.
pub fn verify(reader: &mut dyn BufRead, options: &VerifyOptions) -> Result<Summary, Fault> {
    let _ = (reader, options);
    todo!()
}
