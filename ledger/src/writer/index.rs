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
    time::{Duration, Instant},
};

/// It is synced when this much was applied since, or when nothing happens for a moment.
const UNSYNCED_MAX: usize = 8 << 20;
const IDLE: Duration = Duration::from_millis(300);
/// Groups that may be on their way to it; the writer waits when it is so far behind.
const BEHIND_MAX: usize = 16;
/// How long a reader waits for it to catch up.
const WAIT_MAX: Duration = Duration::from_secs(30);

/// The index as readers see it.
pub(super) struct Index {
    path: PathBuf,
    state: Mutex<State>,
    moved: Condvar,
}

struct State {
    /// `None` while it has failed and is not rebuilt yet.
    store: Option<Arc<dyn Store>>,
    /// Entries in it.
    entries: u64,
}

impl Index {
    pub(super) fn new(path: PathBuf, store: Box<dyn Store>, entries: u64) -> Self {
        let store = Some(Arc::from(store));
        Self {
            path,
            state: Mutex::new(State { store, entries }),
            moved: Condvar::new(),
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
        let until = Instant::now() + WAIT_MAX;
        let mut state = self.state();
        while state.store.is_some() && state.entries < entries {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.bad("it is far behind the journal: try again later".into()));
            }
            let waited = self.moved.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
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

    fn reached(&self, entries: u64) {
        self.state().entries = entries;
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
    jobs: Option<mpsc::SyncSender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Indexer {
    pub(super) fn start(shared: Arc<Shared>) -> io::Result<Self> {
        let (jobs, queue) = mpsc::sync_channel(BEHIND_MAX);
        let thread = thread::Builder::new()
            .name("ledger-index".into())
            .spawn(move || run(&shared, &queue))?;
        Ok(Self {
            jobs: Some(jobs),
            thread: Some(thread),
        })
    }

    fn send(&self, job: Job) -> bool {
        self.jobs.as_ref().is_some_and(|jobs| jobs.send(job).is_ok())
    }

    /// Hands over a group that is in the journal.
    pub(super) fn apply(&self, changes: Vec<Change>, bytes: usize, entries: u64) {
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
        match job {
            Job::Apply(changes, bytes, entries) => {
                if index.is_lost() {
                    continue;
                }
                match index.with(|store| store.apply(&changes)) {
                    Ok(()) => {
                        unsynced += bytes;
                        index.reached(entries);
                    }
                    Err(why) => {
                        tracing::error!("{why}");
                        index.lose();
                    }
                }
                if unsynced >= UNSYNCED_MAX {
                    sync(&mut unsynced);
                }
            }
            Job::Sync(done) => {
                sync(&mut unsynced);
                let _ = done.send(());
            }
        }
    }
}
