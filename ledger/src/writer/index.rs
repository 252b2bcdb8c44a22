//! The index and the thread that brings it up to the journal.
use super::Shared;
use crate::{
    change::Change,
    store::{Store, StoreError},
};
use std::{
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc},
    thread::{self, JoinHandle},
    time::Duration,
};

/// It is synced when this much was applied since, or when nothing happens for a moment. What it lacks after a crash
/// comes from the journal, so this bounds how long the next start takes, and nothing else.
const UNSYNCED_MAX: usize = 64 << 20;
const IDLE: Duration = Duration::from_millis(300);
/// Groups that may be on their way to it, and bytes of them; the writer waits when it is so far behind.
const BEHIND_MAX: usize = 1024;
const BEHIND_BYTES_MAX: usize = 64 << 20;
/// While it is not asked for anything, groups are left to gather for so long: rows that change again and again are
/// then written once, entries many to a value, and a burst of commits has the processor to itself.
const GATHER: Duration = Duration::from_millis(200);
/// No more than this is gathered.
const GATHER_BYTES: usize = 8 << 20;
/// How long a reader waits for it to catch up.
const WAIT_MAX: Duration = Duration::from_secs(30);

/// The index as readers see it.
pub(super) struct Index {
    path: PathBuf,
    state: Mutex<State>,
    moved: Condvar,
    /// Tells the thread behind it not to gather any longer.
    wanted: Condvar,
}

struct State {
    /// `None` while it has failed and is not rebuilt yet.
    store: Option<Arc<dyn Store>>,
    /// Entries in it.
    entries: u64,
    /// Readers that wait for it to go on.
    waiting: u32,
    /// Bytes on their way to it.
    behind: usize,
}

impl Index {
    pub(super) fn new(path: PathBuf, store: Box<dyn Store>, entries: u64) -> Self {
        let store = Some(Arc::from(store));
        Self {
            path,
            state: Mutex::new(State {
                store,
                entries,
                waiting: 0,
                behind: 0,
            }),
            moved: Condvar::new(),
            wanted: Condvar::new(),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn bad(&self, why: String) -> StoreError {
        StoreError::Index {
            path: self.path.clone(),
            why,
        }
    }

    pub(super) fn is_lost(&self) -> bool {
        self.state().store.is_none()
    }

    /// Asks the store. It is foreign code over bytes that may be damaged: its panics are errors.
    pub(super) fn with<T>(
        &self,
        ask: impl FnOnce(&dyn Store) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let store = self.state().store.clone();
        let store = store.ok_or_else(|| self.bad("it is not open".into()))?;
        catch_unwind(AssertUnwindSafe(|| ask(&*store)))
            .unwrap_or_else(|_| Err(self.bad("it panicked".into())))
    }

    /// Waits until the first `entries` entries are in it.
    pub(super) fn wait_for(&self, entries: u64) -> Result<(), StoreError> {
        let mut state = self.state();
        if state.store.is_none() || state.entries >= entries {
            return Ok(());
        }
        state.waiting += 1;
        self.wanted.notify_all();
        let behind = |state: &mut State| state.store.is_some() && state.entries < entries;
        let waited = self.moved.wait_timeout_while(state, WAIT_MAX, behind);
        let (mut state, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        state.waiting -= 1;
        drop(state);
        if waited.timed_out() {
            return Err(self.bad("it is far behind the journal: try again later".into()));
        }
        Ok(())
    }

    /// Sleeps for [`GATHER`], or until a reader waits.
    fn gather(&self) {
        let idle = |state: &mut State| state.waiting == 0;
        let waited = self.wanted.wait_timeout_while(self.state(), GATHER, idle);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// Gives it up, until the writer has made it anew.
    pub(super) fn lose(&self) {
        let lost = self.state().store.take();
        self.moved.notify_all();
        // Closing it writes once more, and may fail as badly as before.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(lost)));
    }

    pub(super) fn replace(&self, store: Box<dyn Store>, entries: u64) {
        let mut state = self.state();
        state.store = Some(Arc::from(store));
        state.entries = entries;
        drop(state);
        self.moved.notify_all();
    }

    /// Waits until it is not too far behind, and counts what is on its way now.
    fn send_off(&self, bytes: usize) {
        let full = |state: &mut State| state.behind >= BEHIND_BYTES_MAX;
        let waited = self.moved.wait_while(self.state(), full);
        waited.unwrap_or_else(PoisonError::into_inner).behind += bytes;
    }

    /// What was on its way arrived, or was dropped with a lost index; in it are so many entries then.
    fn arrived(&self, bytes: usize, entries: Option<u64>) {
        let mut state = self.state();
        state.behind = state.behind.saturating_sub(bytes);
        state.entries = entries.unwrap_or(state.entries);
        drop(state);
        self.moved.notify_all();
    }
}

enum Job {
    /// One group, its size, and the number of entries with it.
    Apply(Vec<Change>, usize, u64),
    /// Make everything durable, then answer.
    Sync(mpsc::SyncSender<()>),
}

/// The thread behind the writer's.
pub(super) struct Indexer {
    shared: Arc<Shared>,
    jobs: Option<mpsc::SyncSender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Indexer {
    pub(super) fn start(shared: Arc<Shared>) -> io::Result<Self> {
        let (jobs, queue) = mpsc::sync_channel(BEHIND_MAX);
        let theirs = shared.clone();
        let thread = thread::Builder::new()
            .name("ledger-index".into())
            .spawn(move || run(&theirs, &queue))?;
        Ok(Self {
            shared,
            jobs: Some(jobs),
            thread: Some(thread),
        })
    }

    fn send(&self, job: Job) -> bool {
        self.jobs.as_ref().is_some_and(|jobs| jobs.send(job).is_ok())
    }

    /// Hands over a group that is in the journal.
    pub(super) fn apply(&self, changes: Vec<Change>, bytes: usize, entries: u64) {
        self.shared.index.send_off(bytes);
        self.send(Job::Apply(changes, bytes, entries));
    }

    /// Waits until everything handed over is in the index and on disk, or the index is lost.
    pub(super) fn sync(&self) {
        let (done, wait) = mpsc::sync_channel(1);
        if self.send(Job::Sync(done)) {
            let _ = wait.recv();
        }
    }

    /// Syncs and ends.
    pub(super) fn finish(&mut self) {
        self.sync();
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // A panic there was reported by its own thread.
            let _ = thread.join();
        }
    }
}

/// What was taken from the queue and not applied yet.
#[derive(Default)]
struct Gathered {
    changes: Vec<Change>,
    bytes: usize,
    entries: u64,
}

impl Gathered {
    /// Takes jobs until there is nothing more or enough; a wish to sync ends it.
    fn fill(&mut self, queue: &mpsc::Receiver<Job>) -> Option<mpsc::SyncSender<()>> {
        while self.bytes < GATHER_BYTES {
            match queue.try_recv() {
                Ok(Job::Apply(changes, bytes, entries)) => self.add(changes, bytes, entries),
                Ok(Job::Sync(done)) => return Some(done),
                Err(_) => break,
            }
        }
        None
    }

    fn add(&mut self, mut changes: Vec<Change>, bytes: usize, entries: u64) {
        self.changes.append(&mut changes);
        self.bytes += bytes;
        self.entries = entries;
    }
}

fn run(shared: &Shared, queue: &mpsc::Receiver<Job>) {
    let index = &shared.index;
    let mut unsynced = 0;
    let sync = |unsynced: &mut usize| {
        *unsynced = 0;
        if !index.is_lost()
            && let Err(why) = index.with(|store| store.sync())
        {
            tracing::error!("{why}");
            index.lose();
        }
    };
    loop {
        let job = if unsynced > 0 {
            match queue.recv_timeout(IDLE) {
                Ok(job) => job,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    sync(&mut unsynced);
                    continue;
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
            }
        } else {
            let Ok(job) = queue.recv() else { break };
            job
        };
        let mut gathered = Gathered::default();
        let mut done = match job {
            Job::Apply(changes, bytes, entries) => {
                gathered.add(changes, bytes, entries);
                gathered.fill(queue)
            }
            Job::Sync(done) => Some(done),
        };
        if done.is_none() {
            index.gather();
            done = gathered.fill(queue);
        }
        if !gathered.changes.is_empty() && !index.is_lost() {
            match index.with(|store| store.apply(&gathered.changes)) {
                Ok(()) => {
                    unsynced += gathered.bytes;
                    index.arrived(0, Some(gathered.entries));
                }
                Err(why) => {
                    tracing::error!("{why}");
                    index.lose();
                }
            }
        }
        index.arrived(gathered.bytes, None);
        if unsynced >= UNSYNCED_MAX {
            sync(&mut unsynced);
        }
        if let Some(done) = done {
            sync(&mut unsynced);
            let _ = done.send(());
        }
    }
}
