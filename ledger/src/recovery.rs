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
use crate::{
    book::{Book, Entry, genesis, hash_of},
    change::{self, Base, Change, Payload, Step},
    journal::{Journal, encode_frame},
    snapshot,
    store::{OpenStore, Store, StoreError, Tables},
};
use karez_core::{id::Digest, key::SchedulerId};
use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

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

fn generations(dir: &Path) -> Result<Vec<u64>, StoreError> {
    let mut found = Vec::new();
    for item in fs::read_dir(dir).map_err(|e| StoreError::io(dir, "list it", &e))? {
        let item = item.map_err(|e| StoreError::io(dir, "list it", &e))?;
        let name = item.file_name();
        let Some(name) = name.to_str() else { continue };
        if name.ends_with(".tmp") || name.ends_with(".fresh") {
            // The remains of a compaction, or of records being dropped, that a crash interrupted.
            fs::remove_file(item.path()).map_err(|e| StoreError::io(&item.path(), "remove it", &e))?;
        } else if let Some(number) = name.strip_prefix("journal-").and_then(|n| n.parse().ok()) {
            found.push(number);
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// `archive`: its length and number of entries, where this process has read or written all of it before.
fn read_journal(
    dir: &Path,
    scheduler: Option<SchedulerId>,
    archive: Option<(u64, u64)>,
    report: &mut Vec<String>,
) -> Result<Read, StoreError> {
    let mut found = generations(dir)?;
    let Some(generation) = found.pop() else {
        let lost = archive_path(dir).exists() || index_path(dir).exists();
        if lost {
            return Ok(Read::Damaged(Damaged {
                path: generation_path(dir, 1),
                offset: 0,
                last: 0,
            }));
        }
        let base = Base {
            scheduler,
            number: 0,
            entries: 0,
            head: empty_book(scheduler).head(),
            rows: 0,
        };
        write_generation(dir, 1, &base, &Tables::default())?;
        return read_journal(dir, scheduler, None, report);
    };
    let (known, mut archived) = archive.unwrap_or((0, 0));
    let mut archive_gap = None;
    let (archive, scan) = Journal::open_from(&archive_path(dir), known, &mut |frame| {
        if frame.number != archived && archive_gap.is_none() {
            archive_gap = Some(frame.offset);
        }
        archived += 1;
        Ok(())
    })?;
    let archive_bad = scan.damage.map(|d| d.offset).or(archive_gap);
    report_torn(report, &archive, &scan);

    let path = generation_path(dir, generation);
    let mut reader = GenerationReader::default();
    let (journal, scan) = Journal::open(&path, &mut |frame| {
        reader.frame(frame.number, frame.offset, &frame.payload);
        Ok(())
    })?;
    report_torn(report, &journal, &scan);
    let last = reader.number.max(scan.damage.map_or(0, |d| d.last_after));
    let damaged = |path: &Path, offset| {
        Ok(Read::Damaged(Damaged {
            path: path.to_owned(),
            offset,
            last,
        }))
    };
    if let Some(offset) = reader.bad.or(scan.damage.map(|d| d.offset)) {
        return damaged(&path, offset);
    }
    let Some(base) = reader.base else {
        return damaged(&path, 0);
    };
    // Hashing them all would cost more than reading them; that they follow each other is checked with the index.
    let last_entry = reader
        .changes
        .iter()
        .rev()
        .flat_map(|change| change.steps.iter().rev());
    let last_entry = last_entry.into_iter().find_map(|step| match step {
        Step::Entry { bytes, .. } => Some(bytes),
        _ => None,
    });
    let Some(head) = last_entry.map_or(Some(base.head), |bytes| hash_of(bytes)) else {
        return damaged(&path, journal.bytes());
    };
    if reader.rows < base.rows {
        // The snapshot was whole when it was named; what is missing now was lost later.
        return damaged(&path, journal.bytes());
    }
    if let Some(offset) = archive_bad {
        return damaged(&archive_path(dir), offset);
    }
    if archived < base.entries {
        return damaged(&archive_path(dir), archive.bytes());
    }
    for old in found {
        // Its successor was whole before it was named, and has just been read.
        let path = generation_path(dir, old);
        fs::remove_file(&path).map_err(|e| StoreError::io(&path, "remove it", &e))?;
    }
    Ok(Read::Good(Box::new(Truth {
        generation,
        journal,
        archive,
        archived,
        base,
        base_bytes: reader.base_bytes,
        tables: reader.tables,
        number: reader.number,
        entries: reader.entries,
        head,
        changes: reader.changes,
    })))
}

fn report_torn(report: &mut Vec<String>, journal: &Journal, scan: &crate::journal::Scan) {
    if let Some(torn) = scan.torn {
        report.push(format!(
            "{}: cut {} bytes of an unfinished append at byte {}",
            journal.path().display(),
            torn.bytes,
            torn.offset
        ));
    }
}

/// Puts a generation together from its frames.
#[derive(Default)]
struct GenerationReader {
    base: Option<Base>,
    rows: u64,
    base_bytes: u64,
    tables: Tables,
    changes: Vec<Change>,
    number: u64,
    entries: u64,
    /// Where a frame with a good checksum makes no sense.
    bad: Option<u64>,
}

impl GenerationReader {
    fn frame(&mut self, number: u64, offset: u64, payload: &[u8]) {
        if self.bad.is_some() {
            self.number = self.number.max(number);
        } else if self.take(number, payload).is_none() {
            self.bad = Some(offset);
        } else if self.changes.is_empty() {
            // A header of 20 bytes stands before each payload.
            self.base_bytes = offset + 20 + payload.len() as u64;
        }
    }

    fn take(&mut self, number: u64, payload: &[u8]) -> Option<()> {
        match (self.base, change::decode(payload)?) {
            (None, Payload::Base(base)) => {
                self.number = base.number;
                self.entries = base.entries;
                self.base = Some(base);
            }
            (Some(base), Payload::Rows(steps)) if number == base.number && self.changes.is_empty() => {
                self.rows += steps.len() as u64;
                steps.iter().for_each(|step| self.tables.apply(step));
            }
            (Some(base), Payload::Steps(steps)) if number == self.number + 1 && self.rows == base.rows => {
                for step in &steps {
                    self.tables.apply(step);
                    if let Step::Entry { seq, .. } = step {
                        if *seq != self.entries {
                            return None;
                        }
                        self.entries += 1;
                    }
                }
                self.number = number;
                self.changes.push(Change { number, steps });
            }
            _ => return None,
        }
        Some(())
    }
}

/// Writes a generation's snapshot beside the others and names it once it is on disk.
fn write_generation(dir: &Path, generation: u64, base: &Base, tables: &Tables) -> Result<(), StoreError> {
    let path = generation_path(dir, generation);
    let base = Base {
        rows: tables.count(),
        ..*base
    };
    write_by_rename(dir, &path, |out| {
        let mut frame = Vec::new();
        encode_frame(&mut frame, base.number, &change::encode_base(&base));
        let mut piece = Vec::new();
        let mut bytes = 0;
        let mut flush = |piece: &mut Vec<Step>, frame: &mut Vec<u8>| {
            if !piece.is_empty() {
                encode_frame(frame, base.number, &change::encode_rows(piece));
                piece.clear();
            }
            let written = out.write_all(frame);
            frame.clear();
            written
        };
        for step in tables.steps() {
            if let Step::Put { key, value, .. } = &step {
                bytes += key.len() + value.len();
            }
            piece.push(step);
            if bytes >= PIECE_BYTES {
                flush(&mut piece, &mut frame)?;
                bytes = 0;
            }
        }
        flush(&mut piece, &mut frame)
    })
}

pub(crate) fn write_by_rename(
    dir: &Path,
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> std::io::Result<()>,
) -> Result<(), StoreError> {
    let temporary = path.with_extension("tmp");
    let result = File::create(&temporary)
        .and_then(|file| {
            let mut out = BufWriter::with_capacity(PIECE_BYTES, file);
            write(&mut out)?;
            out.into_inner()
                .map_err(std::io::IntoInnerError::into_error)?
                .sync_all()
        })
        .and_then(|()| fs::rename(&temporary, path));
    if let Err(e) = result {
        // On a full disk the room it took is needed; what cannot be removed now goes at the next open.
        let _ = fs::remove_file(&temporary);
        return Err(StoreError::write(path, "write it", &e, PIECE_BYTES as u64));
    }
    sync_dir(dir)
}

pub(crate) fn sync_dir(dir: &Path) -> Result<(), StoreError> {
    File::open(dir)
        .and_then(|d| d.sync_all())
        .map_err(|e| StoreError::io(dir, "sync it", &e))
}

/// Compacts: the generation's entries go to the archive, its tables to the snapshot of the next generation.
///
/// `truth` must be fresh from the disk. The caller has synced the index before, so that the transactions left behind
/// are in it.
pub(crate) fn checkpoint(
    dir: &Path,
    scheduler: Option<SchedulerId>,
    truth: &mut Truth,
) -> Result<(), StoreError> {
    let mut frames = Vec::new();
    for change in &truth.changes {
        for step in &change.steps {
            let Step::Entry { seq, bytes } = step else {
                continue;
            };
            if *seq < truth.archived {
                continue;
            }
            encode_frame(&mut frames, *seq, bytes);
            truth.archived += 1;
            if frames.len() >= PIECE_BYTES {
                truth.archive.append(&frames)?;
                frames.clear();
            }
        }
    }
    if !frames.is_empty() {
        truth.archive.append(&frames)?;
    }
    let base = Base {
        scheduler,
        number: truth.number,
        entries: truth.entries,
        head: if truth.entries == 0 {
            empty_book(scheduler).head()
        } else {
            truth.head
        },
        rows: 0,
    };
    write_generation(dir, truth.generation + 1, &base, &truth.tables)?;
    // Also removes the old file, which its successor has made superfluous.
    *truth = reread(dir, scheduler, Some(truth.known_archive()))?;
    Ok(())
}

/// Reads what is on disk, for a writer that holds the directory.
pub(crate) fn reread(
    dir: &Path,
    scheduler: Option<SchedulerId>,
    archive: Option<(u64, u64)>,
) -> Result<Truth, StoreError> {
    match read_journal(dir, scheduler, archive, &mut Vec::new())? {
        Read::Good(truth) => Ok(*truth),
        Read::Damaged(damaged) => Err(damaged.error("it went bad while it was in use")),
    }
}

/// Has a later generation been named? Then nothing may be appended to `generation` any more.
pub(crate) fn superseded(dir: &Path, generation: u64) -> bool {
    generation_path(dir, generation + 1).exists()
}

/// Reads the truth anew and compacts it. For a writer that holds the directory.
pub(crate) fn compact(
    dir: &Path,
    scheduler: Option<SchedulerId>,
    archive: Option<(u64, u64)>,
) -> Result<Truth, StoreError> {
    let mut truth = reread(dir, scheduler, archive)?;
    checkpoint(dir, scheduler, &mut truth)?;
    Ok(truth)
}

/// Opens the index and brings it up to the journal; rebuilds it when that cannot be done.
fn open_index(
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
fn in_thread<T: Send>(
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
fn load(dir: &Path, store: Box<dyn Store>, scheduler: Option<SchedulerId>) -> Result<Index, StoreError> {
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

/// Writes the journal anew from an index that has everything the journal is known to have held.
fn replace_journal(
    dir: &Path,
    scheduler: Option<SchedulerId>,
    open_store: OpenStore,
    damaged: &Damaged,
    report: &mut Vec<String>,
) -> Result<(), StoreError> {
    let fail = |why: String| StoreError::Damaged {
        path: damaged.path.clone(),
        offset: damaged.offset,
        why,
    };
    let path = index_path(dir);
    if !path.exists() {
        return Err(fail("there is no index".into()));
    }
    let (applied, index) = in_thread(&path, || {
        let store = open_store(&path)?;
        let applied = store.applied()?;
        Ok((applied, load(dir, store, scheduler)?))
    })
    .map_err(|e| fail(e.to_string()))?;
    if applied < damaged.last || applied == 0 {
        return Err(fail(format!(
            "it ends at transaction {applied}, the journal reached {}",
            damaged.last
        )));
    }
    // The archive first: a generation may only be named when its entries are there.
    let archive = archive_path(dir);
    if archive.exists() {
        let aside = archive.with_extension("damaged");
        fs::rename(&archive, &aside).map_err(|e| StoreError::io(&archive, "set it aside", &e))?;
    }
    let mut failed = None;
    write_by_rename(dir, &archive, |out| {
        let mut seq = 0;
        let mut frame = Vec::new();
        while seq < index.book.entries() {
            let page = match index.store.entries(seq, PAGE_ENTRIES) {
                Ok(page) => page,
                Err(e) => {
                    failed = Some(e);
                    return Err(std::io::Error::other("the index cannot be read"));
                }
            };
            for bytes in page {
                frame.clear();
                encode_frame(&mut frame, seq, &bytes);
                out.write_all(&frame)?;
                seq += 1;
            }
        }
        Ok(())
    })
    .map_err(|e| failed.unwrap_or(e))?;
    let found = generations(dir)?;
    let next = found.last().map_or(1, |last| last + 1);
    let base = Base {
        scheduler: index.book.scheduler(),
        number: applied,
        entries: index.book.entries(),
        head: index.book.head(),
        rows: 0,
    };
    if let Some(last) = found.last() {
        let bad = generation_path(dir, *last);
        let aside = bad.with_extension("damaged");
        fs::copy(&bad, &aside).map_err(|e| StoreError::io(&bad, "set a copy of it aside", &e))?;
    }
    write_generation(dir, next, &base, &index.tables)?;
    report.push(format!(
        "{} was damaged at byte {}: replaced the journal from the index; the bad file is kept as *.damaged",
        damaged.path.display(),
        damaged.offset
    ));
    Ok(())
}
