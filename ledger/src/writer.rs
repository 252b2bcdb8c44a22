//! The one durable writer of a daemon: its state and its ledger in the same transactions.
//!
//! One thread takes transactions from a bounded queue. What has queued up while the disk was busy becomes the next
//! group (at most [`GROUP_MAX`]); a lone transaction is written at once and never waits for company. A group is one
//! append to the journal and one sync, then one atomic step in the index, then the answers. A transaction that breaks
//! a rule is refused alone; the others of its group do not notice.
//!
//! Signatures are checked by the caller's side of [`Writer::commit`], not by the writer's thread.
//!
//! Not here: what is on disk and how it is repaired (`recovery`), and the rules of postings ([`crate::book`]).
use crate::{
    book::{Book, Entry, Undo},
    change::{self, Change, Step},
    derived::{Added, Derived},
    evidence::{Examined, examine},
    head::{Head, Proof},
    journal::{FRAME_BYTES_MAX, encode_frame},
    recovery::{self, PAGE_ENTRIES, Truth},
    store::{OpenStore, SledStore, Store, StoreError, Tables},
    tree::{self, Frontier, TreeHash},
};
use karez_core::{
    id::{Digest, RecordId},
    key::SchedulerId,
    money::{Account, Accounts, Posting},
    unit::UtcMillis,
};
use std::{
    collections::VecDeque,
    fs::{self, File, TryLockError},
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    pin::pin,
    sync::{Arc, PoisonError, RwLock},
    task::{Context, Poll, Wake, Waker},
    thread::{self, JoinHandle, Thread},
    time::{Duration, Instant},
};
use tokio::sync::{Semaphore, mpsc, oneshot};

/// The most transactions that share one sync.
pub const GROUP_MAX: usize = 256;
/// The longest name of a table, in bytes.
pub const TABLE_BYTES_MAX: usize = 64;
/// The longest key, in bytes.
pub const KEY_BYTES_MAX: usize = 4 << 10;
/// The longest value, in bytes.
pub const VALUE_BYTES_MAX: usize = 2 << 20;
/// The largest transaction, in bytes of its journal frame.
pub const TRANSACTION_BYTES_MAX: usize = 8 << 20;

/// Bytes of one group, so that a group is one bounded write.
const GROUP_BYTES_MAX: usize = 8 << 20;
/// Bytes that may wait in the queue, in KiB.
const QUEUE_KIB_MAX: u32 = 64 << 10;
/// The index is synced when this much was applied since, or when nothing happens for a moment.
const INDEX_UNSYNCED_MAX: usize = 8 << 20;
const INDEX_IDLE: Duration = Duration::from_millis(300);
/// A failed index is not reopened more often than this.
const INDEX_RETRY: Duration = Duration::from_secs(1);

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
pub struct Writer {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    scheduler: Option<SchedulerId>,
    /// `None` only while the last handle is being dropped.
    queue: Option<mpsc::Sender<Request>>,
    room: Arc<Semaphore>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What readers see: only what is on disk.
struct Shared {
    view: RwLock<View>,
    /// `None` while the index has failed and is not rebuilt yet.
    index: RwLock<Option<Arc<dyn Store>>>,
    index_path: PathBuf,
    derived: Derived,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Shared({})", self.index_path.display())
    }
}

struct View {
    accounts: Accounts,
    entries: u64,
    head: Digest,
    root: TreeHash,
}

struct Request {
    ops: Vec<Prepared>,
    bytes: usize,
    reply: oneshot::Sender<Result<Committed, StoreError>>,
    _room: tokio::sync::OwnedSemaphorePermit,
}

enum Prepared {
    Step(Step),
    Post(Box<Examined>, UtcMillis),
}

impl Prepared {
    /// Of a posting: its last record, if it has any.
    fn last_record(&self) -> Option<Option<Vec<u8>>> {
        match self {
            Self::Step(_) => None,
            Self::Post(examined, _) => Some(examined.posting().evidence.last().cloned()),
        }
    }
}

impl Writer {
    /// Opens or creates `dir`, repairs what a crash or a bad disk left, and starts the writer.
    pub fn open(dir: &Path, options: Options) -> Result<(Self, Recovered), StoreError> {
        Self::open_with(dir, options, SledStore::open)
    }

    /// As [`Writer::open`], with another index than sled.
    pub fn open_with(
        dir: &Path,
        options: Options,
        open_store: OpenStore,
    ) -> Result<(Self, Recovered), StoreError> {
        fs::create_dir_all(dir).map_err(|e| StoreError::io(dir, "create it", &e))?;
        let lock = lock(dir)?;
        let opened = recovery::open(dir, options.scheduler, open_store)?;
        let book = opened.index.book;
        let (derived, rebuilt) = Derived::open(dir, book.tree(), &*opened.index.store)?;
        let mut report = opened.report;
        if rebuilt {
            report.push("the tree's files did not fit the entries: made them anew".into());
        }
        let shared = Arc::new(Shared {
            view: RwLock::new(View {
                accounts: book.accounts().clone(),
                entries: book.entries(),
                head: book.head(),
                root: book.tree().root(),
            }),
            derived,
            index: RwLock::new(Some(Arc::from(opened.index.store))),
            index_path: recovery::index_path(dir),
        });
        let scribe = Scribe {
            dir: dir.to_owned(),
            options: options.clone(),
            open_store,
            number: opened.truth.number,
            truth: opened.truth.without_content(),
            book: book.clone(),
            shared: shared.clone(),
            unsynced: 0,
            retry_at: Instant::now(),
            compact_above: 0,
            stuck: None,
            _lock: lock,
        };
        for line in &report {
            tracing::warn!(dir = %dir.display(), "repaired: {line}");
        }
        let (queue, requests) = mpsc::channel(options.queue_max.max(1));
        let thread = thread::Builder::new()
            .name("ledger-writer".into())
            .spawn(move || scribe.run(requests))
            .map_err(|e| StoreError::io(dir, "start the writer's thread", &e))?;
        let writer = Self {
            inner: Arc::new(Inner {
                scheduler: options.scheduler,
                queue: Some(queue),
                room: Arc::new(Semaphore::new(QUEUE_KIB_MAX as usize)),
                shared,
                thread: Some(thread),
            }),
        };
        let recovered = Recovered {
            tables: opened.index.tables,
            book,
            report,
        };
        Ok((writer, recovered))
    }

    /// Commits `transaction`: when this returns `Ok`, it is on disk. Needs a tokio runtime.
    ///
    /// When the future is dropped midway the transaction may still be committed, wholly or not at all.
    pub async fn commit(&self, transaction: Transaction) -> Result<Committed, StoreError> {
        let scheduler = self.inner.scheduler;
        let records: usize = transaction.ops.iter().map(Op::records).sum();
        let prepared = if records == 0 {
            prepare(transaction, scheduler)?
        } else {
            // Signatures cost tens of microseconds each: not on a thread that serves sockets.
            tokio::task::spawn_blocking(move || prepare(transaction, scheduler))
                .await
                .map_err(|_| StoreError::Stopped)??
        };
        self.submit(prepared).await
    }

    /// As [`Writer::commit`], for threads without an async runtime. Do not call it from async code.
    pub fn commit_blocking(&self, transaction: Transaction) -> Result<Committed, StoreError> {
        let prepared = prepare(transaction, self.inner.scheduler)?;
        wait(self.submit(prepared), None).unwrap_or(Err(StoreError::Stopped))
    }

    async fn submit(&self, (ops, bytes): (Vec<Prepared>, usize)) -> Result<Committed, StoreError> {
        let queue = self.inner.queue.as_ref().ok_or(StoreError::Stopped)?;
        // A transaction is at most 8 MiB, so it always fits the room for all.
        let kib = u32::try_from(bytes.div_ceil(1024))
            .unwrap_or(QUEUE_KIB_MAX)
            .min(QUEUE_KIB_MAX);
        let room = self
            .inner
            .room
            .clone()
            .acquire_many_owned(kib)
            .await
            .map_err(|_| StoreError::Stopped)?;
        let (reply, answer) = oneshot::channel();
        let request = Request {
            ops,
            bytes,
            reply,
            _room: room,
        };
        queue.send(request).await.map_err(|_| StoreError::Stopped)?;
        answer.await.map_err(|_| StoreError::Stopped)?
    }

    /// Number of entries and hash of the last one, as of the last commit.
    pub fn head(&self) -> (u64, Digest) {
        let view = read(&self.inner.shared.view);
        (view.entries, view.head)
    }

    /// The Merkle tree as of the last commit: entries and root.
    pub fn tree(&self) -> (u64, TreeHash) {
        let view = read(&self.inner.shared.view);
        (view.entries, view.root)
    }

    /// The root over the first `size` entries; `None` when there are not as many. Blocks on the disk.
    pub fn root_at(&self, size: u64) -> Result<Option<TreeHash>, StoreError> {
        if size > self.tree().0 {
            return Ok(None);
        }
        tree::root(&self.inner.shared.derived, size).map(Some)
    }

    /// Shows that the tree of `old` entries is the beginning of the one of `new`; `None` when the numbers do not fit.
    /// Blocks on the disk.
    pub fn prove_consistency(&self, old: u64, new: u64) -> Result<Option<Vec<TreeHash>>, StoreError> {
        if old > new || new > self.tree().0 {
            return Ok(None);
        }
        tree::prove_consistency(&self.inner.shared.derived, old, new).map(Some)
    }

    /// The number of the entry whose last record has this id: a receipt's settlement, an order's reservation. Blocks
    /// on the disk.
    pub fn find(&self, record: &RecordId) -> Result<Option<u64>, StoreError> {
        self.inner.shared.derived.find(record, self.tree().0)
    }

    /// The proof of entry `index` under `head`, which must be one of this ledger and not larger than it. `None` when
    /// there is no such entry. Blocks on the disk.
    pub fn prove(&self, index: u64, head: Head) -> Result<Option<Proof>, StoreError> {
        let size = head.size;
        if index >= size || size > self.tree().0 {
            return Ok(None);
        }
        let Some(entry) = self.entries(index).next() else {
            return Ok(None);
        };
        Ok(Some(Proof {
            entry: entry?.encode(),
            index,
            path: tree::prove_inclusion(&self.inner.shared.derived, index, size)?,
            head,
        }))
    }

    /// A copy of all balances, as of the last commit.
    pub fn accounts(&self) -> Accounts {
        read(&self.inner.shared.view).accounts.clone()
    }

    /// One balance in micro-credits, as of the last commit.
    pub fn balance(&self, account: &Account) -> i64 {
        read(&self.inner.shared.view).accounts.balance(account)
    }

    /// The entries from `from_seq` to the present head, read in pages. Blocks on the disk: use a blocking thread.
    pub fn entries(&self, from_seq: u64) -> Entries {
        let (end, _) = self.head();
        Entries {
            shared: self.inner.shared.clone(),
            next: from_seq,
            end,
            previous: None,
            page: VecDeque::new(),
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.queue = None;
        if let Some(thread) = self.thread.take() {
            // A panic there was reported by its own thread.
            let _ = thread.join();
        }
    }
}

impl Op {
    fn records(&self) -> usize {
        match self {
            Self::Post(posting, _) => posting.evidence.len(),
            _ => 0,
        }
    }
}

fn lock(dir: &Path) -> Result<File, StoreError> {
    let path = dir.join("lock");
    let file = File::create(&path).map_err(|e| StoreError::io(&path, "create it", &e))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StoreError::InUse { path: dir.to_owned() }),
        Err(TryLockError::Error(e)) => Err(StoreError::io(&path, "lock it", &e)),
    }
}

/// Checks sizes and signatures. Gives the bytes the transaction will take, roughly.
fn prepare(
    transaction: Transaction,
    scheduler: Option<SchedulerId>,
) -> Result<(Vec<Prepared>, usize), StoreError> {
    let within = |table: &str, what, bytes, max| {
        if bytes <= max {
            return Ok(());
        }
        Err(StoreError::TooLarge {
            table: table.chars().take(TABLE_BYTES_MAX).collect(),
            what,
            bytes,
            max,
        })
    };
    let named = |table: &str| {
        within(table, "the name", table.len(), TABLE_BYTES_MAX)?;
        if table.is_empty() || table.contains('\0') {
            return Err(StoreError::TableName {
                table: table.to_owned(),
            });
        }
        Ok(table.to_owned())
    };
    let mut total = 0;
    let mut ops = Vec::with_capacity(transaction.ops.len());
    for op in transaction.ops {
        let prepared = match op {
            Op::Put { table, key, value } => {
                within(table, "the key", key.len(), KEY_BYTES_MAX)?;
                within(table, "the value", value.len(), VALUE_BYTES_MAX)?;
                total += key.len() + value.len() + TABLE_BYTES_MAX;
                let table = named(table)?;
                Prepared::Step(Step::Put { table, key, value })
            }
            Op::Delete { table, key } => {
                within(table, "the key", key.len(), KEY_BYTES_MAX)?;
                total += key.len() + TABLE_BYTES_MAX;
                let table = named(table)?;
                Prepared::Step(Step::Delete { table, key })
            }
            Op::Post(posting, at) => {
                let scheduler = scheduler.ok_or(crate::BookError::NoLedger)?;
                total += posting.evidence.iter().map(|e| e.len() + 4).sum::<usize>() + 1024;
                let examined = examine(posting, scheduler).map_err(crate::BookError::from)?;
                Prepared::Post(Box::new(examined), at)
            }
        };
        ops.push(prepared);
    }
    within("", "the transaction", total, TRANSACTION_BYTES_MAX)?;
    Ok((ops, total))
}

/// The entries of a ledger, in order; see [`Writer::entries`].
#[derive(Debug)]
pub struct Entries {
    shared: Arc<Shared>,
    next: u64,
    end: u64,
    previous: Option<Digest>,
    page: VecDeque<Vec<u8>>,
}

impl Entries {
    fn read(&mut self) -> Result<Entry, StoreError> {
        let path = &self.shared.index_path;
        let bad = |why: String| StoreError::Index {
            path: path.clone(),
            why,
        };
        if self.page.is_empty() {
            let index = read(&self.shared.index).clone();
            let index = index.ok_or_else(|| bad("it is not open".into()))?;
            let left = usize::try_from(self.end - self.next).unwrap_or(PAGE_ENTRIES);
            self.page = guarded(path, || index.entries(self.next, left.min(PAGE_ENTRIES)))?.into();
        }
        let missing = || bad(format!("entry {} is missing", self.next));
        let bytes = self.page.pop_front().ok_or_else(missing)?;
        let entry = Entry::decode(&bytes).map_err(|e| bad(format!("entry {}: {e}", self.next)))?;
        if entry.seq != self.next || self.previous.is_some_and(|hash| hash != entry.previous) {
            return Err(missing());
        }
        self.previous = Some(entry.hash());
        self.next += 1;
        Ok(entry)
    }
}

impl Iterator for Entries {
    type Item = Result<Entry, StoreError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.next >= self.end {
            return None;
        }
        let entry = self.read();
        if entry.is_err() {
            // The writer rebuilds it at the next commit.
            *write(&self.shared.index) = None;
            self.next = self.end;
        }
        Some(entry)
    }
}

fn read<T>(lock: &RwLock<T>) -> std::sync::RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> std::sync::RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

/// The index is foreign code over bytes that may be damaged: its panics are errors.
fn guarded<T>(path: &Path, work: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
        Err(StoreError::Index {
            path: path.to_owned(),
            why: "it panicked".into(),
        })
    })
}

/// The writer's thread.
struct Scribe {
    dir: PathBuf,
    options: Options,
    open_store: OpenStore,
    number: u64,
    truth: Truth,
    book: Book,
    shared: Arc<Shared>,
    /// Bytes in the index that may not be on disk.
    unsynced: usize,
    retry_at: Instant,
    /// After a failed compaction: the length at which it is tried again.
    compact_above: u64,
    /// The journal's next generation is named but could not be read: nothing may be written until it is.
    stuck: Option<StoreError>,
    _lock: File,
}

/// A transaction of the group that was not refused.
struct Accepted {
    reply: oneshot::Sender<Result<Committed, StoreError>>,
    committed: Committed,
    /// The last record of each entry.
    records: Vec<Option<Vec<u8>>>,
    undo: Vec<Undo>,
}

impl Scribe {
    fn run(mut self, mut requests: mpsc::Receiver<Request>) {
        loop {
            // A lost index is rebuilt while nothing else happens, too: readers must not wait for the next writer.
            let lost = read(&self.shared.index).is_none();
            let idle = if lost {
                Some(INDEX_RETRY)
            } else {
                (self.unsynced > 0).then_some(INDEX_IDLE)
            };
            let first = match wait(requests.recv(), idle) {
                Some(Some(request)) => request,
                Some(None) => break,
                None if lost => {
                    self.maintain();
                    continue;
                }
                None => {
                    self.sync_index();
                    continue;
                }
            };
            let mut bytes = first.bytes;
            let mut group = vec![first];
            while group.len() < GROUP_MAX && bytes < GROUP_BYTES_MAX {
                let Ok(next) = requests.try_recv() else { break };
                bytes += next.bytes;
                group.push(next);
            }
            self.commit(group);
            self.maintain();
        }
        self.sync_index();
    }

    fn commit(&mut self, group: Vec<Request>) {
        let bytes: usize = group.iter().map(|r| r.bytes).sum();
        if let Err(why) = self.unstick().and_then(|()| self.check_room(bytes as u64)) {
            for request in group {
                let _ = request.reply.send(Err(why.clone()));
            }
            return;
        }
        let mut frames = Vec::new();
        let mut changes = Vec::new();
        let mut accepted = Vec::new();
        let tree_before = self.book.tree().clone();
        for request in group {
            let mut undo = Vec::new();
            let records = request.ops.iter().filter_map(Prepared::last_record).collect();
            match self.stage(request.ops, &mut undo, &mut frames) {
                Ok((change, committed)) => {
                    changes.push(change);
                    accepted.push(Accepted {
                        reply: request.reply,
                        committed,
                        records,
                        undo,
                    });
                }
                Err(why) => {
                    self.take_back(undo);
                    let _ = request.reply.send(Err(why));
                }
            }
        }
        if accepted.is_empty() {
            return;
        }
        if let Err(why) = self.truth.journal.append(&frames) {
            for Accepted { reply, undo, .. } in accepted.into_iter().rev() {
                self.take_back(undo);
                self.number -= 1;
                let _ = reply.send(Err(why.clone()));
            }
            return;
        }
        // From here on it has happened, whatever becomes of the index.
        self.index(&changes, frames.len());
        self.derive(tree_before, &accepted);
        {
            let mut view = write(&self.shared.view);
            for undo in accepted.iter().flat_map(|a| &a.undo) {
                undo.repeat(&mut view.accounts);
            }
            view.entries = self.book.entries();
            view.head = self.book.head();
            view.root = self.book.tree().root();
        }
        for Accepted { reply, committed, .. } in accepted {
            let _ = reply.send(Ok(committed));
        }
    }

    /// Applies a transaction to the book and writes its frame into `frames`.
    fn stage(
        &mut self,
        ops: Vec<Prepared>,
        undo: &mut Vec<Undo>,
        frames: &mut Vec<u8>,
    ) -> Result<(Change, Committed), StoreError> {
        let mut steps = Vec::with_capacity(ops.len());
        let mut entries = Vec::new();
        for op in ops {
            match op {
                Prepared::Step(step) => steps.push(step),
                Prepared::Post(examined, at) => {
                    let (entry, bytes, back) = self.book.append_undoable(at, *examined)?;
                    undo.push(back);
                    let seq = entry.seq;
                    entries.push(EntryRef {
                        seq,
                        hash: self.book.head(),
                    });
                    steps.push(Step::Entry { seq, bytes });
                }
            }
        }
        let payload = change::encode_steps(&steps);
        if payload.len() > FRAME_BYTES_MAX {
            return Err(StoreError::TooLarge {
                table: String::new(),
                what: "the transaction",
                bytes: payload.len(),
                max: FRAME_BYTES_MAX,
            });
        }
        self.number += 1;
        let number = self.number;
        encode_frame(frames, number, &payload);
        Ok((Change { number, steps }, Committed { number, entries }))
    }

    fn take_back(&mut self, undo: Vec<Undo>) {
        for undo in undo.into_iter().rev() {
            self.book.undo(undo);
        }
    }

    /// Goes over to the generation that a compaction left behind half way.
    fn unstick(&mut self) -> Result<(), StoreError> {
        if self.stuck.is_some() {
            self.truth = recovery::reread(&self.dir, self.options.scheduler)?.without_content();
            self.stuck = None;
        }
        Ok(())
    }

    /// Refuses early, so that the index never meets a full disk: it would not survive that as well as the journal.
    fn check_room(&self, bytes: u64) -> Result<(), StoreError> {
        let free = match rustix::fs::statvfs(&self.dir) {
            Ok(stat) => stat.f_bavail.saturating_mul(stat.f_frsize),
            // Without an answer the write itself will tell.
            Err(_) => return Ok(()),
        };
        let wanted = self.options.free_bytes_min.saturating_add(bytes);
        if free >= wanted {
            return Ok(());
        }
        Err(StoreError::DiskFull {
            path: self.dir.clone(),
            needed: wanted - free,
        })
    }

    /// Adds the group's entries to the files of the tree. What fails here is made up for at the next opening.
    fn derive(&mut self, mut tree: Frontier, accepted: &[Accepted]) {
        let from = tree.size();
        let mut added = Added::default();
        for (entry, record) in accepted
            .iter()
            .flat_map(|a| a.committed.entries.iter().zip(&a.records))
        {
            added.push(&mut tree, &entry.hash, record.as_deref());
        }
        if tree.size() > from
            && let Err(why) = self.shared.derived.write(from, &added)
        {
            tracing::error!("proofs may fail until the next start: {why}");
        }
    }

    fn index(&mut self, changes: &[Change], bytes: usize) {
        let index = read(&self.shared.index).clone();
        let Some(index) = index else { return };
        match guarded(&self.shared.index_path, || index.apply(changes)) {
            Ok(()) => self.unsynced += bytes,
            Err(why) => self.lose_index(&why),
        }
    }

    fn sync_index(&mut self) {
        self.unsynced = 0;
        let index = read(&self.shared.index).clone();
        let Some(index) = index else { return };
        if let Err(why) = guarded(&self.shared.index_path, || index.sync()) {
            self.lose_index(&why);
        }
    }

    fn lose_index(&mut self, why: &StoreError) {
        tracing::error!("{why}");
        let lost = write(&self.shared.index).take();
        // Closing it writes once more, and may fail as badly as before.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(lost)));
        self.retry_at = Instant::now() + INDEX_RETRY;
    }

    /// What need not be done before answering: reopen a failed index, sync it, compact the journal.
    fn maintain(&mut self) {
        let failed = read(&self.shared.index).is_none();
        if failed && Instant::now() >= self.retry_at {
            self.retry_at = Instant::now() + INDEX_RETRY;
            match recovery::reopen_index(&self.dir, self.options.scheduler, self.open_store) {
                Ok(index) => {
                    tracing::info!("the index in {} is back", self.shared.index_path.display());
                    *write(&self.shared.index) = Some(Arc::from(index));
                }
                Err(why) => tracing::warn!("the index is still out of use: {why}"),
            }
            if recovery::superseded(&self.dir, self.truth.generation) {
                // The repair went as far as writing the journal anew.
                self.stuck = Some(StoreError::Stopped);
            }
        }
        if self.unsynced >= INDEX_UNSYNCED_MAX {
            self.sync_index();
        }
        let bytes = self.truth.journal.bytes();
        let due = self.truth.base_bytes * 2 + self.options.journal_bytes_max;
        if bytes > due && bytes >= self.compact_above {
            self.sync_index();
            match recovery::compact(&self.dir, self.options.scheduler) {
                Ok(truth) => {
                    self.truth = truth.without_content();
                    self.compact_above = 0;
                }
                Err(why) if recovery::superseded(&self.dir, self.truth.generation) => {
                    tracing::error!("{why}");
                    self.stuck = Some(why);
                }
                Err(why) => {
                    self.compact_above = bytes + self.options.journal_bytes_max / 4;
                    tracing::warn!("the journal was not compacted, it goes on growing for now: {why}");
                }
            }
        }
    }
}

/// Runs `future` on this thread; `None` when `limit` passes first.
fn wait<F: Future>(future: F, limit: Option<Duration>) -> Option<F::Output> {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let until = limit.map(|limit| Instant::now() + limit);
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return Some(output);
        }
        match until {
            None => thread::park(),
            Some(until) => {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return None;
                }
                thread::park_timeout(left);
            }
        }
    }
}
