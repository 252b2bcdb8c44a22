//! The index: bringing it up to the journal, and making it anew from there.
use super::{
    Damaged, Index, PAGE_ENTRIES, PIECE_BYTES, Read, Truth, archive_path, empty_book, generation_path,
    index_path, read::read_journal, replace::replace_journal,
};
use crate::{
    book::{Book, Entry, genesis, hash_of},
    change::{Change, Step},
    journal::Journal,
    snapshot,
    store::{OpenStore, Store, StoreError},
};
use karez_core::{id::Digest, key::SchedulerId};
use std::{fs, path::Path};

/// Opens the index and brings it up to the journal; rebuilds it when that cannot be done.
pub(super) fn open_index(
    dir: &Path,
    scheduler: Option<SchedulerId>,
    open_store: OpenStore,
    truth: Truth,
    report: &mut Vec<String>,
) -> Result<(Truth, Index), StoreError> {
    let path = index_path(dir);
    let fresh = !path.exists() && truth.number == 0;
    let loaded = in_thread(&path, || {
        let store = open_store(&path)?;
        let applied = store.applied()?;
        if applied > truth.number {
            return Ok(Err((applied, store)));
        }
        if applied < truth.base.number {
            return Err(StoreError::Index {
                path: path.clone(),
                why: format!(
                    "it ends at transaction {applied}, the journal begins at {}",
                    truth.base.number
                ),
            });
        }
        let missing: Vec<Change> = truth
            .changes
            .iter()
            .filter(|c| c.number > applied)
            .cloned()
            .collect();
        apply_in_pieces(store.as_ref(), &missing)?;
        let index = load(dir, store, scheduler)?;
        check_index(&path, &truth, &index)?;
        Ok(Ok(index))
    });
    let why = match loaded {
        Ok(Ok(index)) => return Ok((truth, index)),
        Ok(Err((applied, store))) => {
            // The journal lost its end, the index did not: acknowledged transactions are there and nowhere else.
            drop(store);
            let damaged = Damaged {
                path: generation_path(dir, truth.generation),
                offset: truth.journal.bytes(),
                last: applied,
            };
            drop(truth);
            replace_journal(dir, scheduler, open_store, &damaged, report)?;
            let Read::Good(truth) = read_journal(dir, scheduler, None, report)? else {
                return Err(damaged.error("it went bad again while it was replaced"));
            };
            let index = in_thread(&path, || load(dir, open_store(&path)?, scheduler))?;
            check_index(&path, &truth, &index)?;
            return Ok((*truth, index));
        }
        Err(why) => why,
    };
    if !fresh {
        report.push(format!("{why}: rebuilt it from the journal"));
    }
    rebuild_index(dir, &path, open_store, &truth)?;
    let index = in_thread(&path, || load(dir, open_store(&path)?, scheduler))?;
    check_index(&path, &truth, &index)?;
    Ok((truth, index))
}

fn check_index(path: &Path, truth: &Truth, index: &Index) -> Result<(), StoreError> {
    let differs = if index.tables != truth.tables {
        "rows"
    } else if index.book.entries() != truth.entries || (truth.entries > 0 && index.book.head() != truth.head)
    {
        "entries"
    } else {
        return Ok(());
    };
    Err(StoreError::Index {
        path: path.to_owned(),
        why: format!("its {differs} differ from the journal's"),
    })
}

/// Runs `work` in a thread of its own, so that a panic in the index's code is an error like others.
pub(super) fn in_thread<T: Send>(
    path: &Path,
    work: impl FnOnce() -> Result<T, StoreError> + Send,
) -> Result<T, StoreError> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("index-open".into())
            .spawn_scoped(scope, work)
            .map_err(|e| StoreError::io(path, "start a thread for it", &e))?;
        thread.join().unwrap_or_else(|panic| {
            let why = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| panic.downcast_ref::<&str>().copied())
                .unwrap_or("it panicked");
            Err(StoreError::Index {
                path: path.to_owned(),
                why: why.chars().take(300).collect(),
            })
        })
    })
}

/// Reads the rows and the entries, which also proves that they can be read and that the chain holds. The book is made
/// from its snapshot and the entries since, where there is one.
pub(super) fn load(
    dir: &Path,
    store: Box<dyn Store>,
    scheduler: Option<SchedulerId>,
) -> Result<Index, StoreError> {
    let path = index_path(dir);
    let tables = store.tables()?;
    let snapshot = scheduler.and_then(|scheduler| snapshot::read(dir, scheduler));
    let snapshot = match snapshot {
        Some(book) if holds(&*store, &book)? => Some(book),
        _ => None,
    };
    let mut book = snapshot.unwrap_or_else(|| empty_book(scheduler));
    loop {
        let page = store.entries(book.entries(), PAGE_ENTRIES)?;
        let last = page.len() < PAGE_ENTRIES;
        for bytes in &page {
            let seq = book.entries();
            let bad = |why: String| StoreError::Index {
                path: path.clone(),
                why: format!("entry {seq}: {why}"),
            };
            let entry = Entry::decode(bytes).map_err(|e| bad(e.to_string()))?;
            book.recall(&entry).map_err(|e| bad(e.to_string()))?;
        }
        if last {
            return Ok(Index { store, tables, book });
        }
    }
}

/// Are the entries up to a snapshot whole, and just the ones it was made from? Only their chain is looked at: what
/// they say was checked before the snapshot was written, and takes ten times as long.
fn holds(store: &dyn Store, book: &Book) -> Result<bool, StoreError> {
    let mut head = book.scheduler().map_or(Digest([0; 32]), genesis);
    let mut seq = 0;
    while seq < book.entries() {
        let page = store.entries(seq, PAGE_ENTRIES)?;
        if page.is_empty() {
            return Ok(false);
        }
        for bytes in page.iter().take((book.entries() - seq) as usize) {
            if !bytes.starts_with(&head.0) {
                return Ok(false);
            }
            let Some(next) = hash_of(bytes) else {
                return Ok(false);
            };
            head = next;
            seq += 1;
        }
    }
    Ok(head == book.head())
}

fn apply_in_pieces(store: &dyn Store, changes: &[Change]) -> Result<(), StoreError> {
    for piece in changes.chunks(256) {
        store.apply(piece)?;
    }
    if changes.is_empty() { Ok(()) } else { store.sync() }
}

fn rebuild_index(dir: &Path, path: &Path, open_store: OpenStore, truth: &Truth) -> Result<(), StoreError> {
    if path.exists() {
        fs::remove_dir_all(path).map_err(|e| StoreError::io(path, "remove it", &e))?;
    }
    in_thread(path, || {
        let store = open_store(path)?;
        // Numbered 0 until the last piece: a crash half way leaves an index that is rebuilt again.
        let mut change = Change {
            number: 0,
            steps: Vec::new(),
        };
        let mut bytes = 0;
        let mut push = |step: Step, len: usize| {
            change.steps.push(step);
            bytes += len;
            if bytes < PIECE_BYTES {
                return Ok(());
            }
            bytes = 0;
            let piece = std::mem::take(&mut change.steps);
            store.apply(&[Change {
                number: 0,
                steps: piece,
            }])
        };
        Journal::open(&archive_path(dir), &mut |frame| {
            let len = frame.payload.len();
            push(
                Step::Entry {
                    seq: frame.number,
                    bytes: frame.payload,
                },
                len,
            )
        })?;
        for step in truth.changes.iter().flat_map(|c| &c.steps) {
            if let Step::Entry { bytes, .. } = step {
                push(step.clone(), bytes.len())?;
            }
        }
        for step in truth.tables.steps() {
            push(step, 256)?;
        }
        change.number = truth.number;
        store.apply(std::slice::from_ref(&change))?;
        store.sync()
    })
}
