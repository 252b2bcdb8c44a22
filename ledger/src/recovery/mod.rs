//! Opening a directory: read the journal, bring the index up to it, and repair whichever of the two is broken.
//!
//! ```text
//! dir/lock               held while a process has the directory open
//! dir/journal-N          generation N: a snapshot of the tables, then every transaction since
//! dir/entries            entries of generations before N: they stay for ever, but for records that were dropped
//! dir/index/             the index
//! dir/book               the book after some entry; derived
//! dir/tree, dir/records  what proofs need; derived
//! dir/*.damaged          a journal that went bad and was replaced from the index; kept for whoever wants to look
//! ```
//!
//! A generation that has grown is compacted: its entries move to `entries`, its tables become the snapshot of the
//! next generation, which appears by rename once it is whole.
mod index;
mod read;
mod replace;
mod write;

pub(crate) use read::reread;
pub(crate) use write::{checkpoint, compact, superseded, sync_dir, write_by_rename};

use crate::{
    book::Book,
    change::{Base, Change},
    journal::Journal,
    store::{OpenStore, Store, StoreError, Tables},
};
use index::open_index;
use karez_core::{id::Digest, key::SchedulerId};
use read::read_journal;
use replace::replace_journal;
use std::path::{Path, PathBuf};

/// Rows and entries are handed over in pieces of about this many bytes.
const PIECE_BYTES: usize = 1 << 20;
/// Entries read from the index at a time.
pub(crate) const PAGE_ENTRIES: usize = 64;

/// The journal's files as they were read.
pub(crate) struct Truth {
    pub(crate) generation: u64,
    pub(crate) journal: Journal,
    pub(crate) archive: Journal,
    /// Entries in the archive.
    pub(crate) archived: u64,
    pub(crate) base: Base,
    /// Length of the generation's snapshot.
    pub(crate) base_bytes: u64,
    pub(crate) tables: Tables,
    /// Transactions since the snapshot.
    pub(crate) changes: Vec<Change>,
    pub(crate) number: u64,
    pub(crate) entries: u64,
    pub(crate) head: Digest,
}

impl Truth {
    /// Length and entries of the archive, as far as it was read or written.
    pub(crate) fn known_archive(&self) -> (u64, u64) {
        (self.archive.bytes(), self.archived)
    }

    /// Without rows and transactions: what the writer keeps.
    pub(crate) fn without_content(mut self) -> Self {
        self.tables = Tables::default();
        self.changes = Vec::new();
        self
    }
}

/// A journal that cannot be trusted.
struct Damaged {
    path: PathBuf,
    offset: u64,
    /// The highest transaction known to have been committed.
    last: u64,
}

enum Read {
    Good(Box<Truth>),
    Damaged(Damaged),
}

/// The index, open and complete.
pub(crate) struct Index {
    pub(crate) store: Box<dyn Store>,
    pub(crate) tables: Tables,
    pub(crate) book: Book,
}

/// A directory ready for use.
pub(crate) struct Opened {
    pub(crate) truth: Truth,
    pub(crate) index: Index,
    pub(crate) report: Vec<String>,
}

fn generation_path(dir: &Path, generation: u64) -> PathBuf {
    dir.join(format!("journal-{generation:06}"))
}

pub(crate) fn archive_path(dir: &Path) -> PathBuf {
    dir.join("entries")
}

pub(crate) fn index_path(dir: &Path) -> PathBuf {
    dir.join("index")
}

fn empty_book(scheduler: Option<SchedulerId>) -> Book {
    scheduler.map_or_else(Book::none, Book::new)
}

/// Opens everything in `dir`, creating what is missing. The caller holds the lock.
pub(crate) fn open(
    dir: &Path,
    scheduler: Option<SchedulerId>,
    open_store: OpenStore,
) -> Result<Opened, StoreError> {
    let mut report = Vec::new();
    let read = read_journal(dir, scheduler, None, &mut report)?;
    let truth = match read {
        Read::Good(truth) => *truth,
        Read::Damaged(damaged) => {
            replace_journal(dir, scheduler, open_store, &damaged, &mut report)?;
            match read_journal(dir, scheduler, None, &mut report)? {
                Read::Good(truth) => *truth,
                Read::Damaged(again) => return Err(again.error("it went bad again while it was replaced")),
            }
        }
    };
    check_owner(dir, scheduler, truth.base.scheduler)?;
    let (truth, index) = open_index(dir, scheduler, open_store, truth, &mut report)?;
    let mut opened = Opened { truth, index, report };
    if opened.truth.base.scheduler != scheduler {
        // A directory that kept state only now keeps a ledger too: the snapshot names its owner from here on.
        checkpoint(dir, scheduler, &mut opened.truth)?;
    }
    Ok(opened)
}

/// Reads the journal again and brings a fresh or stale index up to it.
pub(crate) fn reopen_index(
    dir: &Path,
    scheduler: Option<SchedulerId>,
    open_store: OpenStore,
) -> Result<Box<dyn Store>, StoreError> {
    let truth = reread(dir, scheduler, None)?;
    open_index(dir, scheduler, open_store, truth, &mut Vec::new()).map(|(_, index)| index.store)
}

fn check_owner(dir: &Path, given: Option<SchedulerId>, found: Option<SchedulerId>) -> Result<(), StoreError> {
    match found {
        Some(found) if given != Some(found) => Err(StoreError::OtherLedger {
            path: dir.to_owned(),
            found,
        }),
        _ => Ok(()),
    }
}

impl Damaged {
    fn error(self, why: &str) -> StoreError {
        StoreError::Damaged {
            path: self.path,
            offset: self.offset,
            why: why.to_owned(),
        }
    }
}
