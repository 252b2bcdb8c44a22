//! The one durable writer of a daemon: its state and its ledger in the same transactions.
//!
//! One thread takes transactions from a bounded queue. What has queued up while the disk was busy becomes the next
//! group (at most [`GROUP_MAX`]), with those of the last group who come back within a part of what a sync takes; a lone
//! writer's transactions are written at once and never wait for company. A group is one append to the journal and one sync,
//! then the answers; the index follows on a thread of its own, in larger steps, so that the next group is on its way to the
//! disk meanwhile, and readers wait until it has come as far as they look. A transaction that
//! breaks a rule is refused alone; the others of its group do not notice.
//!
//! Signatures are checked by the caller's side of [`Writer::commit`], not by the writer's thread.
//!
//! Not here: what is on disk and how it is repaired (`recovery`), and the rules of postings ([`crate::book`]).
mod index;
mod scribe;

use crate::{
    batch::{Checker, TOGETHER_MIN},
    book::{Book, Entry},
    change::Step,
    derived::Derived,
    evidence::{Examined, examine_by},
    head::{Head, Proof},
    recovery::{self, PAGE_ENTRIES},
    store::{OpenStore, SledStore, StoreError, Tables},
    tree::{self, TreeHash},
};
use index::{Index, Indexer};
use karez_core::{
    id::{Digest, RecordId},
    key::SchedulerId,
    money::{Account, Accounts, Posting},
    records::to_check,
    unit::UtcMillis,
};
use scribe::Scribe;
use std::{
    collections::VecDeque,
    fs::{self, File, TryLockError},
    path::Path,
    pin::pin,
    sync::{Arc, PoisonError, RwLock},
    task::{Context, Poll, Wake, Waker},
    thread::{self, JoinHandle, Thread},
    time::{Duration, Instant},
};
use tokio::sync::{Semaphore, mpsc, oneshot};

/// The most transactions that share one sync.
pub const GROUP_MAX: usize = 1024;
/// The longest name of a table, in bytes.
pub const TABLE_BYTES_MAX: usize = 64;
/// The longest key, in bytes.
pub const KEY_BYTES_MAX: usize = 4 << 10;
/// The longest value, in bytes.
pub const VALUE_BYTES_MAX: usize = 2 << 20;
/// The largest transaction, in bytes of its journal frame.
pub const TRANSACTION_BYTES_MAX: usize = 8 << 20;

/// Bytes that may wait in the queue, in KiB.
const QUEUE_KIB_MAX: u32 = 64 << 10;
/// How long a directory that another process has is asked for, and how often.
const LOCK_PATIENCE: Duration = Duration::from_secs(3);
const LOCK_PAUSE: Duration = Duration::from_millis(20);

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
    index: Index,
    derived: Derived,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Shared({})", self.index.path().display())
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
            index: Index::new(recovery::index_path(dir), opened.index.store, book.entries()),
        });
        let indexer =
            Indexer::start(shared.clone()).map_err(|e| StoreError::io(dir, "start a thread", &e))?;
        let scribe = Scribe::new(
            dir,
            options.clone(),
            open_store,
            opened.truth,
            book.clone(),
            shared.clone(),
            indexer,
            lock,
        );
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

/// Takes a directory for this process. A holder that was just killed keeps its lock until the
/// kernel has taken it apart, so a taken lock is asked for again for [`LOCK_PATIENCE`].
pub(crate) fn lock(dir: &Path) -> Result<File, StoreError> {
    let path = dir.join("lock");
    let file = File::create(&path).map_err(|e| StoreError::io(&path, "create it", &e))?;
    let until = Instant::now() + LOCK_PATIENCE;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if Instant::now() < until => thread::sleep(LOCK_PAUSE),
            Err(TryLockError::WouldBlock) => return Err(StoreError::InUse { path: dir.to_owned() }),
            Err(TryLockError::Error(e)) => return Err(StoreError::io(&path, "lock it", &e)),
        }
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
    let mut checker = Checker::default();
    if transaction.ops.iter().map(Op::records).sum::<usize>() >= TOGETHER_MIN {
        let postings = transaction.ops.iter().filter_map(|op| match op {
            Op::Post(posting, _) => Some(&posting.evidence),
            _ => None,
        });
        checker.take(postings.flatten().filter_map(|bytes| to_check(bytes)));
    }
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
                let examined = examine_by(posting, scheduler, &checker).map_err(crate::BookError::from)?;
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
        let index = &self.shared.index;
        if self.page.is_empty() {
            let left = usize::try_from(self.end - self.next).unwrap_or(PAGE_ENTRIES);
            let (next, count) = (self.next, left.min(PAGE_ENTRIES));
            // The index follows the journal at a short distance.
            index.wait_for(next + count as u64)?;
            self.page = index.with(|store| store.entries(next, count))?.into();
        }
        let missing = || index.bad(format!("entry {} is missing", self.next));
        let bytes = self.page.pop_front().ok_or_else(missing)?;
        let entry = Entry::decode(&bytes).map_err(|e| index.bad(format!("entry {}: {e}", self.next)))?;
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
            // The writer rebuilds it.
            self.shared.index.lose();
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
