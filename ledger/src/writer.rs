//! The one durable writer of a daemon: its state and its ledger in the same transactions.
use crate::{
    book::{Book, Entry},
    store::{StoreError, Tables},
};
use karez_core::{
    id::Digest,
    key::SchedulerId,
    money::{Account, Accounts, Posting},
    unit::UtcMillis,
};
use std::path::Path;

/// How a directory is opened.
#[derive(Debug, Clone)]
pub struct Options {
    /// Whose ledger is kept. `None` for a node, which keeps state only: postings are then refused.
    pub scheduler: Option<SchedulerId>,
    /// The journal is compacted when it has grown by this many bytes.
    pub journal_bytes_max: u64,
    /// Commits are refused when the disk would be left with less.
    pub free_bytes_min: u64,
    /// Transactions that may wait; further callers wait for a place.
    pub queue_max: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            scheduler: None,
            journal_bytes_max: 64 << 20,
            free_bytes_min: 32 << 20,
            queue_max: 1024,
        }
    }
}

/// One step of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Sets `key` of `table` to `value`.
    Put {
        /// Which table: 1 to 64 bytes.
        table: &'static str,
        /// At most 4 KiB.
        key: Vec<u8>,
        /// At most 2 MiB.
        value: Vec<u8>,
    },
    /// Removes `key` from `table`; nothing happens when it is not there.
    Delete {
        /// Which table.
        table: &'static str,
        /// Which key.
        key: Vec<u8>,
    },
    /// Appends an entry to the ledger.
    Post(Posting, UtcMillis),
}

/// Steps that happen all or not at all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Transaction {
    /// In this order.
    pub ops: Vec<Op>,
}

/// An entry that a transaction made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EntryRef {
    /// Its number.
    pub seq: u64,
    /// Its hash.
    pub hash: Digest,
}

/// A transaction is on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Committed {
    /// Counts the transactions of this directory.
    pub number: u64,
    /// One per [`Op::Post`], in order.
    pub entries: Vec<EntryRef>,
}

/// What was found on disk.
#[derive(Debug)]
pub struct Recovered {
    /// All tables, in memory. Drop it once read.
    pub tables: Tables,
    /// The ledger as it stands.
    pub book: Book,
    /// What had to be repaired, in sentences; empty after a clean stop.
    pub report: Vec<String>,
}

/// A handle to the writer; clones share it. The last one dropped waits until everything is on disk.
#[derive(Debug, Clone)]
pub struct Writer {}

impl Writer {
    /// Opens or creates `dir`, repairs what a crash or a bad disk left, and starts the writer.
    pub fn open(dir: &Path, options: Options) -> Result<(Self, Recovered), StoreError> {
        todo!("{dir:?} {options:?}")
    }

    /// Commits `transaction`: when this returns `Ok`, it is on disk.
    pub async fn commit(&self, transaction: Transaction) -> Result<Committed, StoreError> {
        todo!("{transaction:?}")
    }

    /// As [`Writer::commit`], for threads without an async runtime. Do not call it from async code.
    pub fn commit_blocking(&self, transaction: Transaction) -> Result<Committed, StoreError> {
        todo!("{transaction:?}")
    }

    /// Number of entries and hash of the last one, as of the last commit.
    pub fn head(&self) -> (u64, Digest) {
        todo!()
    }

    /// A copy of all balances, as of the last commit.
    pub fn accounts(&self) -> Accounts {
        todo!()
    }

    /// One balance in micro-credits, as of the last commit.
    pub fn balance(&self, account: &Account) -> i64 {
        todo!("{account}")
    }

    /// The entries from `from_seq` to the present head, read in pages. Blocks on the disk: use a blocking thread.
    pub fn entries(&self, from_seq: u64) -> impl Iterator<Item = Result<Entry, StoreError>> + Send + use<> {
        let _ = from_seq;
        std::iter::empty()
    }
}
