//! The writer's thread: groups, the journal, the answers; and what need not be done before answering.
use super::{
    Committed, EntryRef, GROUP_MAX, Options, Prepared, Request, Shared, index::Indexer, wait, write,
};
use crate::{
    book::{Book, Undo},
    change::{self, Change, Step},
    derived::{self, Added},
    journal::{FRAME_BYTES_MAX, encode_frame},
    recovery::{self, Truth},
    snapshot,
    store::{OpenStore, StoreError},
    tree::Frontier,
};
use std::{
    fs::File,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};
use tokio::sync::{mpsc, oneshot};

/// Bytes of one group, so that a group is one bounded write.
const GROUP_BYTES_MAX: usize = 8 << 20;
/// A snapshot of the book is written after this many entries, at the least.
const SNAPSHOT_MIN: u64 = 10_000;
/// While a group waits for those of the last one, it looks for them this often.
const NAP: Duration = Duration::from_micros(50);
/// And waits at most as long as the last sync took, and never longer than this.
const PATIENCE_MAX: Duration = Duration::from_millis(2);
/// A failed index is not reopened more often than this.
const INDEX_RETRY: Duration = Duration::from_secs(1);

/// The writer's thread.
pub(super) struct Scribe {
    dir: PathBuf,
    options: Options,
    open_store: OpenStore,
    number: u64,
    truth: Truth,
    book: Book,
    shared: Arc<Shared>,
    indexer: Indexer,
    retry_at: Instant,
    /// Entries in the last snapshot of the book.
    snapshot_at: u64,
    /// How many are expected in the next group, and how long it may wait for them.
    company: usize,
    patience: Duration,
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
    /// By which record each entry is found.
    records: Vec<[u8; derived::ID]>,
    undo: Vec<Undo>,
}

/// Transactions that will share one append and one sync.
#[derive(Default)]
struct Group {
    /// With those that were refused.
    taken: usize,
    bytes: usize,
    /// Bytes that the disk had left before it; nothing where it does not tell.
    free: Option<u64>,
    frames: Vec<u8>,
    changes: Vec<Change>,
    accepted: Vec<Accepted>,
}

impl Scribe {
    #[allow(clippy::too_many_arguments)]
    pub(super) fn new(
        dir: &Path,
        options: Options,
        open_store: OpenStore,
        truth: Truth,
        book: Book,
        shared: Arc<Shared>,
        indexer: Indexer,
        lock: File,
    ) -> Self {
        Self {
            dir: dir.to_owned(),
            options,
            open_store,
            number: truth.number,
            truth: truth.without_content(),
            book,
            shared,
            indexer,
            retry_at: Instant::now(),
            snapshot_at: 0,
            company: 0,
            patience: Duration::ZERO,
            compact_above: 0,
            stuck: None,
            _lock: lock,
        }
    }

    pub(super) fn run(mut self, mut requests: mpsc::Receiver<Request>) {
        loop {
            // A lost index is rebuilt while nothing else happens, too: readers must not wait for the next writer.
            let idle = self.shared.index.is_lost().then_some(INDEX_RETRY);
            let first = match wait(requests.recv(), idle) {
                Some(Some(request)) => request,
                Some(None) => break,
                None => {
                    self.maintain();
                    continue;
                }
            };
            self.commit(first, &mut requests);
            self.maintain();
        }
        self.indexer.finish();
        if self.book.entries() > self.snapshot_at {
            self.write_snapshot();
        }
    }

    /// What fails here costs the next start some time, and nothing else.
    fn write_snapshot(&mut self) {
        match snapshot::write(&self.dir, &self.book) {
            Ok(()) => self.snapshot_at = self.book.entries(),
            Err(why) => tracing::warn!("the next start will take longer: {why}"),
        }
    }

    /// Commits `first` and whoever else is there, or about to be.
    fn commit(&mut self, first: Request, requests: &mut mpsc::Receiver<Request>) {
        if let Err(why) = self.unstick() {
            let _ = first.reply.send(Err(why));
            return;
        }
        let tree_before = self.book.tree().clone();
        let mut group = Group {
            free: self.free(),
            ..Group::default()
        };
        let begun = Instant::now();
        let mut next = Some(first);
        loop {
            // Each is worked in as it comes, so that nothing is left to do once the last one is there.
            while let Some(request) = next.take() {
                self.join(request, &mut group);
                if group.taken >= GROUP_MAX || group.bytes >= GROUP_BYTES_MAX {
                    break;
                }
                next = requests.try_recv().ok();
            }
            // Whoever was just answered is about to come back: one sync for all, not one for each half of them. A lone
            // writer never waits, and nobody waits for longer than a sync takes.
            let whole = group.taken >= self.company.min(GROUP_MAX) || group.bytes >= GROUP_BYTES_MAX;
            if whole || begun.elapsed() >= self.patience {
                break;
            }
            thread::sleep(NAP);
            next = requests.try_recv().ok();
            if next.is_none() && begun.elapsed() >= self.patience / 2 {
                break;
            }
        }
        let Group {
            frames,
            changes,
            accepted,
            ..
        } = group;
        if accepted.is_empty() {
            return;
        }
        let begun = Instant::now();
        if let Err(why) = self.truth.journal.append(&frames) {
            for Accepted { reply, undo, .. } in accepted.into_iter().rev() {
                self.take_back(undo);
                self.number -= 1;
                let _ = reply.send(Err(why.clone()));
            }
            return;
        }
        // From here on it has happened, whatever becomes of the index.
        self.patience = begun.elapsed().min(PATIENCE_MAX);
        self.derive(tree_before, &accepted);
        self.indexer.apply(changes, frames.len(), self.book.entries());
        {
            let mut view = write(&self.shared.view);
            for undo in accepted.iter().flat_map(|a| &a.undo) {
                undo.repeat(&mut view.accounts);
            }
            view.entries = self.book.entries();
            view.head = self.book.head();
            view.root = self.book.tree().root();
        }
        // All that will be there soon: those who wait already, and those who have their answer now.
        self.company = requests.len() + accepted.len();
        for Accepted { reply, committed, .. } in accepted {
            let _ = reply.send(Ok(committed));
        }
    }

    /// Takes a transaction into the group, or refuses it.
    fn join(&mut self, request: Request, group: &mut Group) {
        group.taken += 1;
        group.bytes += request.bytes;
        if let Err(why) = self.check_room(group) {
            group.bytes -= request.bytes;
            let _ = request.reply.send(Err(why));
            return;
        }
        let mut undo = Vec::new();
        let mut records = Vec::new();
        match self.stage(request.ops, &mut undo, &mut records, &mut group.frames) {
            Ok((change, committed)) => {
                group.changes.push(change);
                group.accepted.push(Accepted {
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

    /// Applies a transaction to the book and writes its frame into `frames`.
    fn stage(
        &mut self,
        ops: Vec<Prepared>,
        undo: &mut Vec<Undo>,
        records: &mut Vec<[u8; derived::ID]>,
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
                    records.push(derived::record_id(&entry));
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
            self.truth = recovery::reread(&self.dir, self.options.scheduler, None)?.without_content();
            self.stuck = None;
        }
        Ok(())
    }

    /// What the disk has left. Without an answer the write itself will tell.
    fn free(&self) -> Option<u64> {
        let stat = rustix::fs::statvfs(&self.dir).ok()?;
        Some(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    /// Refuses early, so that the index never meets a full disk: it would not survive that as well as the journal.
    fn check_room(&self, group: &Group) -> Result<(), StoreError> {
        let wanted = self.options.free_bytes_min.saturating_add(group.bytes as u64);
        match group.free {
            Some(free) if free < wanted => Err(StoreError::DiskFull {
                path: self.dir.clone(),
                needed: wanted - free,
            }),
            _ => Ok(()),
        }
    }

    /// Adds the group's entries to the files of the tree. What fails here is made up for at the next opening.
    fn derive(&mut self, mut tree: Frontier, accepted: &[Accepted]) {
        let from = tree.size();
        let mut added = Added::default();
        for (entry, record) in accepted
            .iter()
            .flat_map(|a| a.committed.entries.iter().zip(&a.records))
        {
            added.push(&mut tree, &entry.hash, *record);
        }
        if tree.size() > from
            && let Err(why) = self.shared.derived.write(from, &added)
        {
            tracing::error!("proofs may fail until the next start: {why}");
        }
    }

    /// What need not be done before answering: reopen a failed index, sync it, compact the journal.
    fn maintain(&mut self) {
        if self.shared.index.is_lost() && Instant::now() >= self.retry_at {
            // What is under way to the lost index finds nothing there.
            self.indexer.sync();
            self.retry_at = Instant::now() + INDEX_RETRY;
            match recovery::reopen_index(&self.dir, self.options.scheduler, self.open_store) {
                Ok(index) => {
                    tracing::info!("the index in {} is back", self.shared.index.path().display());
                    self.shared.index.replace(index, self.book.entries());
                }
                Err(why) => tracing::warn!("the index is still out of use: {why}"),
            }
            if recovery::superseded(&self.dir, self.truth.generation) {
                // The repair went as far as writing the journal anew.
                self.stuck = Some(StoreError::Stopped);
            }
        }
        let bytes = self.truth.journal.bytes();
        let due = self.truth.base_bytes * 2 + self.options.journal_bytes_max;
        if bytes > due && bytes >= self.compact_above {
            self.indexer.sync();
            match recovery::compact(
                &self.dir,
                self.options.scheduler,
                Some(self.truth.known_archive()),
            ) {
                Ok(truth) => {
                    self.truth = truth.without_content();
                    self.compact_above = 0;
                    // Not at every compaction of a large book: the work stays in proportion to what is new.
                    let new = self.book.entries() - self.snapshot_at;
                    if new >= SNAPSHOT_MIN.max(self.book.entries() / 8) {
                        self.write_snapshot();
                    }
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
