//! Dropping the detail of what is long over, while proofs of everything else still hold.
//!
//! An order says what was asked, readings and usage say what it took, machine by machine and second by second. Once a
//! job is over and nothing of it can be disputed any more, its records may go: their digest stays in their place, and with
//! it every hash, proof, balance, sum and rule that looks back ([`crate::book`] says how). What is lost for good is the
//! chance to check the signatures of just those records again; an older whole export beside it (`karez ledger verify
//! --against`) shows that they were the same.
//!
//! Records of grants, invitations, rate cards, limits, payments, disputes and rulings stay: they are decisions about the
//! books, not about somebody's work.
use crate::{
    book::{Book, Entry},
    journal::{Journal, encode_frame},
    recovery::{self, Truth},
    snapshot,
    store::{OpenStore, SledStore, StoreError},
    writer,
};
use karez_core::{
    key::SchedulerId,
    money::{Account, PostingKind},
    records::{Receipt, Signed},
    unit::UtcMillis,
};
use std::{fs, io::Write, path::Path};

/// What was dropped.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Forgotten {
    /// Entries whose records were dropped now.
    pub entries: u64,
    /// Bytes of records that are gone.
    pub bytes: u64,
    /// Entries of the period that keep theirs: their job is still open, or their window is.
    pub kept: u64,
    /// What opening the directory had to repair.
    pub report: Vec<String>,
}

/// Drops the records of entries posted before `before` from the directory of a writer that is not running, as far as
/// their jobs and windows are over at `now`.
///
/// A crash half way leaves the directory as it was, or without its index, which the next opening makes anew.
pub fn forget(
    dir: &Path,
    scheduler: SchedulerId,
    before: UtcMillis,
    now: UtcMillis,
) -> Result<Forgotten, StoreError> {
    forget_with(dir, scheduler, before, now, SledStore::open)
}

fn forget_with(
    dir: &Path,
    scheduler: SchedulerId,
    before: UtcMillis,
    now: UtcMillis,
    open_store: OpenStore,
) -> Result<Forgotten, StoreError> {
    let _lock = writer::lock(dir)?;
    let mut opened = recovery::open(dir, Some(scheduler), open_store)?;
    let mut done = Forgotten {
        report: opened.report,
        ..Forgotten::default()
    };
    let book = opened.index.book;
    // All entries into one file.
    opened.index.store.sync()?;
    drop(opened.index.store);
    recovery::checkpoint(dir, Some(scheduler), &mut opened.truth)?;
    let wanted = Wanted {
        book: &book,
        before,
        now,
    };
    rewrite(dir, &opened.truth, &wanted, &mut done)?;
    drop(opened.truth);
    if done.entries == 0 {
        return Ok(done);
    }
    // Copies of what went bad have the records, too.
    for item in fs::read_dir(dir)
        .map_err(|e| StoreError::io(dir, "list it", &e))?
        .flatten()
    {
        let path = item.path();
        if path.extension().is_some_and(|e| e == "damaged") {
            fs::remove_file(&path).map_err(|e| StoreError::io(&path, "remove it", &e))?;
        }
    }
    let opened = recovery::open(dir, Some(scheduler), open_store)?;
    if opened.index.book.head() != book.head() || opened.index.book.accounts() != book.accounts() {
        return Err(StoreError::Index {
            path: recovery::index_path(dir),
            why: "the ledger is not the same without the records".into(),
        });
    }
    snapshot::write(dir, &opened.index.book)?;
    Ok(done)
}

/// Whose records may go.
struct Wanted<'a> {
    book: &'a Book,
    before: UtcMillis,
    now: UtcMillis,
}

impl Wanted<'_> {
    fn is_over(&self, entry: &Entry) -> bool {
        let evidence = &entry.posting.evidence;
        match (entry.posting.kind, entry.posting.legs.as_slice()) {
            (PostingKind::Reserve, [.., (Account::Escrow(job), _)]) => {
                !self.book.trail().jobs.contains_key(job)
            }
            (PostingKind::Settle, [(Account::Escrow(job), _), ..]) => {
                !self.book.trail().jobs.contains_key(job)
                    && evidence.last().is_some_and(|receipt| self.is_closed(receipt))
            }
            (PostingKind::Accept, _) => evidence.get(1).is_some_and(|receipt| self.is_closed(receipt)),
            _ => false,
        }
    }

    /// Can nobody dispute it any more, and does nobody?
    fn is_closed(&self, receipt: &[u8]) -> bool {
        let Ok(receipt) = Signed::<Receipt>::open(receipt) else {
            return false;
        };
        let id = receipt.id();
        let mut disputes = self.book.trail().disputes.values();
        receipt.disputable_until < self.now && !disputes.any(|frozen| frozen.receipt == id)
    }
}

/// Writes the file of entries anew and puts it in the old one's place, if anything changes.
fn rewrite(dir: &Path, truth: &Truth, wanted: &Wanted<'_>, done: &mut Forgotten) -> Result<(), StoreError> {
    let path = recovery::archive_path(dir);
    let fresh = path.with_extension("fresh");
    let mut entries = 0;
    let written = recovery::write_by_rename(dir, &fresh, |out| {
        let mut frame = Vec::new();
        let mut failed = Ok(());
        let read = Journal::open(&path, &mut |found| {
            frame.clear();
            let kept = Entry::decode(&found.payload).ok().and_then(|entry| {
                let old = entry.at < wanted.before;
                if old && wanted.is_over(&entry) {
                    return entry.without_records();
                }
                done.kept += u64::from(old && entry.can_forget());
                None
            });
            match kept {
                Some(entry) => {
                    let bytes = entry.encode();
                    done.entries += 1;
                    done.bytes += (found.payload.len() - bytes.len()) as u64;
                    encode_frame(&mut frame, found.number, &bytes);
                }
                None => encode_frame(&mut frame, found.number, &found.payload),
            }
            entries += 1;
            if failed.is_ok() {
                failed = out.write_all(&frame);
            }
            Ok(())
        });
        failed?;
        read.map(drop).map_err(std::io::Error::other)
    });
    let keep = match written {
        Ok(()) if entries != truth.entries => Err(StoreError::Index {
            path: path.clone(),
            why: format!("{entries} of {} entries were found in it", truth.entries),
        }),
        Ok(()) => Ok(done.entries > 0),
        Err(why) => Err(why),
    };
    if !matches!(keep, Ok(true)) {
        let _ = fs::remove_file(&fresh);
        return keep.map(drop);
    }
    // The index has the records, too; without it, it is made from the entries.
    let index = recovery::index_path(dir);
    fs::remove_dir_all(&index).map_err(|e| StoreError::io(&index, "remove it", &e))?;
    fs::rename(&fresh, &path).map_err(|e| StoreError::io(&path, "put it in place", &e))?;
    recovery::sync_dir(dir)
}
