//! The node's workers: each holds one model, serves several leases at a time, and stays for the next ones.
//!
//! Leases on the same model share its worker. Memory is planned before a model is loaded: workers without a lease leave to
//! make room, the longest unused first and pinned ones never; a model that still does not fit is refused with the figures.
//! A worker without a lease leaves by itself after a while, and at once when the owner reclaims.
use crate::{artifacts::Model, daemon::WorkerProgram};
use karez_core::{
    artifact::ArtifactRef,
    routing::{MODELS_MAX, PREFIXES_MAX, Prefix, Warmth},
    unit::Bytes,
};
use karez_engine::{
    EngineError, SpawnOptions, Worker,
    protocol::{Load, LoadKind},
};
use std::{
    collections::VecDeque,
    ffi::OsString,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

/// Workers without a lease at most, whatever the memory.
const IDLE_MAX: usize = 8;
/// Leases that share one worker at most.
const SHARED_MAX: usize = 32;

/// Workers with equal keys are interchangeable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ModelKey {
    pub(super) kind: LoadKind,
    pub(super) model: ArtifactRef,
    /// The GPUs it sees.
    pub(super) gpus: Vec<String>,
    /// What it may use of one, in thousandths; 0 for all of it.
    pub(super) share_milli: u32,
}

impl ModelKey {
    /// Leases that may share such a worker: a run of training has it to itself.
    fn shared_max(&self) -> usize {
        match self.kind {
            LoadKind::Train => 1,
            _ => SHARED_MAX,
        }
    }
}

/// How the owner wants models kept.
#[derive(Debug, Clone)]
pub(crate) struct WarmPolicy {
    /// How long a worker stays without a lease.
    pub(crate) stay: Duration,
    /// Memory of all workers together.
    pub(crate) memory: Bytes,
    /// Beginnings of the digests of models that stay once they are loaded.
    pub(crate) pinned: Vec<String>,
}

/// All workers of the node.
#[derive(Debug)]
pub(crate) struct Warm {
    program: Option<WorkerProgram>,
    policy: WarmPolicy,
    /// Memory of every worker that lives, idle or at work.
    used: Arc<AtomicU64>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    workers: Vec<Entry>,
    /// Held by whoever loads a model, so that two leases do not load it twice.
    loading: Vec<(ModelKey, Weak<tokio::sync::Mutex<()>>)>,
    /// Rises with every use.
    clock: u64,
    /// The owner wants the machine: nobody stays.
    closed: bool,
}

#[derive(Debug)]
struct Entry {
    held: Arc<Held>,
    leases: usize,
    /// When a lease last came or went.
    used: u64,
    pinned: bool,
}

/// A worker with its model. Its process ends when the last one who holds it lets go.
#[derive(Debug)]
struct Held {
    key: ModelKey,
    worker: Worker,
    /// The model must stay in the store while the worker maps it.
    _model: Model,
    adapters: Folder,
    sequences: u16,
    memory: Reserved,
    /// How the prompts begin that its cache still holds, youngest last: as many as it has sequences.
    prompts: Mutex<VecDeque<Prefix>>,
}

/// A directory that is gone when dropped.
#[derive(Debug)]
pub(super) struct Folder(pub(super) PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        // A few links; what remains is swept at the next start.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A lease's part in a worker, until dropped.
#[derive(Debug)]
pub(super) struct Lent {
    held: Arc<Held>,
    warm: Arc<Warm>,
}

/// What to start.
pub(super) struct Start {
    pub(super) key: ModelKey,
    pub(super) load: Load,
    /// What it will take.
    pub(super) memory: Bytes,
    pub(super) model: Model,
    /// Where adapters will be put for it.
    pub(super) adapters: Folder,
    pub(super) load_max: Duration,
}

/// Memory set aside for a worker, until dropped.
#[derive(Debug)]
struct Reserved {
    used: Arc<AtomicU64>,
    bytes: u64,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl Lent {
    /// The worker. Others may be using it too.
    pub(super) fn worker(&self) -> &Worker {
        &self.held.worker
    }

    /// What it keeps in memory.
    pub(super) fn footprint(&self) -> Footprint {
        Footprint(Arc::downgrade(&self.held))
    }

    /// Generations it computes at a time.
    pub(super) fn sequences(&self) -> usize {
        self.held.sequences.into()
    }

    /// A prompt is about to be read: its cache will hold it, and let go of an older one.
    pub(super) fn remember(&self, prompt: Prefix) {
        if prompt.is_empty() {
            return;
        }
        let mut prompts = self.held.prompts.lock().unwrap_or_else(PoisonError::into_inner);
        prompts.retain(|known| *known != prompt);
        prompts.push_back(prompt);
        let spare = prompts.len().saturating_sub(self.held.sequences.into());
        prompts.drain(..spare);
    }

    /// The directory of the adapters it may read; a trainer's own, where it may write.
    pub(super) fn adapters(&self) -> &Path {
        &self.held.adapters.0
    }
}

/// What a lease's worker keeps in memory, as far as it is this lease's.
#[derive(Debug)]
pub(super) struct Footprint(Weak<Held>);

impl Footprint {
    /// Resident bytes now, shared among the leases that use the worker; nothing where the system does not tell.
    pub(super) fn bytes(&self) -> Option<u64> {
        let held = self.0.upgrade()?;
        let status = std::fs::read_to_string(format!("/proc/{}/status", held.worker.pid())).ok()?;
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        let kib: u64 = resident.split_ascii_whitespace().next()?.parse().ok()?;
        let bytes = kib.saturating_mul(1024);
        // Each lease holds it once, the list of workers and this look do too.
        let leases = Arc::strong_count(&held).saturating_sub(2).max(1);
        Some(bytes / leases as u64)
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.warm.clone().given_back(&self.held);
    }
}

impl Warm {
    pub(crate) fn new(program: Option<WorkerProgram>, policy: WarmPolicy) -> Arc<Self> {
        Arc::new(Self {
            program,
            policy,
            used: Arc::default(),
            state: Mutex::default(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many wait for work.
    pub(crate) fn idle(&self) -> usize {
        self.state()
            .workers
            .iter()
            .filter(|entry| entry.leases == 0)
            .count()
    }

    /// The models that are loaded and the prompts that their caches hold, youngest first.
    pub(crate) fn warmth(&self) -> Warmth {
        let mut workers: Vec<(u64, Arc<Held>)> = self
            .state()
            .workers
            .iter()
            .filter(|entry| entry.held.key.kind != LoadKind::Train && entry.held.worker.ended().is_none())
            .map(|entry| (entry.used, Arc::clone(&entry.held)))
            .collect();
        workers.sort_by_key(|(used, _)| std::cmp::Reverse(*used));
        let mut warmth = Warmth::default();
        for (_, held) in workers.into_iter().take(MODELS_MAX) {
            warmth.models.push(held.key.model.digest);
            let prompts = held.prompts.lock().unwrap_or_else(PoisonError::into_inner);
            for hash in prompts.iter().rev().flat_map(Prefix::hashes) {
                if warmth.prefixes.len() < PREFIXES_MAX && !warmth.prefixes.contains(hash) {
                    warmth.prefixes.push(*hash);
                }
            }
        }
        warmth
    }

    /// The processes.
    #[cfg(test)]
    pub(super) fn pids(&self) -> Vec<u32> {
        self.state()
            .workers
            .iter()
            .map(|entry| entry.held.worker.pid())
            .collect()
    }

    /// Whether any worker is at work.
    pub(super) fn is_busy(&self) -> bool {
        self.state().workers.iter().any(|entry| entry.leases > 0)
    }

    /// Every idle worker leaves now; until opened again, none stays after its work.
    pub(crate) fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        let leaving = state.take(|entry| entry.leases == 0);
        drop(state);
        drop(leaving);
    }

    /// Workers may stay again.
    pub(crate) fn open(&self) {
        self.state().closed = false;
    }

    /// A part in a worker that has this model.
    pub(super) fn lend(self: &Arc<Self>, key: &ModelKey) -> Option<Lent> {
        let mut state = self.state();
        // The dead are of no use to anyone.
        let dead = state.take(|entry| entry.held.worker.ended().is_some());
        state.clock += 1;
        let now = state.clock;
        let fits = |entry: &&mut Entry| entry.held.key == *key && entry.leases < key.shared_max();
        let found = state.workers.iter_mut().find(fits).map(|entry| {
            entry.leases += 1;
            entry.used = now;
            Arc::clone(&entry.held)
        });
        drop(state);
        drop(dead);
        found.map(|held| Lent {
            held,
            warm: Arc::clone(self),
        })
    }

    /// The right to load this model. Whoever waited for it should look for a worker again first.
    pub(super) async fn turn(&self, key: &ModelKey) -> tokio::sync::OwnedMutexGuard<()> {
        let turn = {
            let mut state = self.state();
            state.loading.retain(|(_, turn)| turn.strong_count() > 0);
            let known = state.loading.iter().find(|(known, _)| known == key);
            known.and_then(|(_, turn)| turn.upgrade()).unwrap_or_else(|| {
                let turn = Arc::default();
                state.loading.push((key.clone(), Arc::downgrade(&turn)));
                turn
            })
        };
        turn.lock_owned().await
    }

    /// Starts a worker and loads the model; idle ones leave to make room for it.
    pub(super) async fn start(self: &Arc<Self>, start: Start) -> Result<Lent, EngineError> {
        let Start {
            key,
            load,
            memory,
            model,
            adapters,
            load_max,
        } = start;
        let none = || EngineError::Unsupported {
            reason: "this node has no worker program".into(),
        };
        let program = self.program.as_ref().ok_or_else(none)?;
        let reserved = self.reserve(memory, &key.gpus)?;
        // It sees the GPUs of its lease and no others; on a CPU, none.
        let visible = OsString::from(key.gpus.join(","));
        let mut env = vec![("CUDA_VISIBLE_DEVICES".into(), visible)];
        if key.share_milli > 0 {
            // CUDA's multi-process service, where it runs, gives it so much of the arithmetic.
            let percent = key.share_milli.div_ceil(10).to_string();
            env.push(("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE".into(), percent.into()));
        }
        let options = SpawnOptions {
            env,
            silence_max: Some(super::SILENCE_MAX),
        };
        let worker = Worker::spawn(&program.path, &program.args, options).await?;
        let sequences = load.sequences.unwrap_or(1);
        worker.load(load, Some(load_max)).await?;
        let digest = key.model.digest.to_string();
        let pinned = self
            .policy
            .pinned
            .iter()
            .any(|pin| digest.starts_with(pin.as_str()));
        let held = Arc::new(Held {
            key,
            worker,
            _model: model,
            adapters,
            sequences,
            memory: reserved,
            prompts: Mutex::default(),
        });
        let mut state = self.state();
        state.clock += 1;
        let used = state.clock;
        state.workers.push(Entry {
            held: Arc::clone(&held),
            leases: 1,
            used,
            pinned,
        });
        drop(state);
        Ok(Lent {
            held,
            warm: Arc::clone(self),
        })
    }

    fn reserve(&self, memory: Bytes, gpus: &[String]) -> Result<Reserved, EngineError> {
        // What a GPU holds is not memory of the machine; idle workers leave it all the same.
        let bytes = if gpus.is_empty() { memory.0 } else { 0 };
        let mut leaving = Vec::new();
        let mut state = self.state();
        leaving.extend(
            state.take(|entry| entry.leases == 0 && entry.held.key.gpus.iter().any(|gpu| gpus.contains(gpu))),
        );
        loop {
            // Those that leave are counted until they have gone, which is before this returns.
            let going: u64 = leaving.iter().map(|held: &Arc<Held>| held.memory.bytes).sum();
            let used = self.used.load(Ordering::Relaxed).saturating_sub(going);
            if used.saturating_add(bytes) <= self.policy.memory.0 {
                // Only grows under the lock, so what was free a line ago still is.
                self.used.fetch_add(bytes, Ordering::Relaxed);
                return Ok(Reserved {
                    used: self.used.clone(),
                    bytes,
                });
            }
            let idle = state
                .workers
                .iter()
                .filter(|entry| entry.leases == 0 && !entry.pinned);
            let Some(oldest) = idle.map(|entry| entry.used).min() else {
                return Err(EngineError::TooLarge {
                    needs: Bytes(bytes),
                    has: self.policy.memory.saturating_sub(Bytes(used)),
                });
            };
            leaving.extend(state.take(|entry| entry.leases == 0 && !entry.pinned && entry.used == oldest));
        }
    }

    /// A lease is over: its worker may serve others, unless it is not fit to or the owner wants it gone.
    fn given_back(self: Arc<Self>, held: &Arc<Held>) {
        let mut state = self.state();
        state.clock += 1;
        let now = state.clock;
        let (closed, at_once) = (state.closed, self.policy.stay.is_zero());
        let Some(entry) = state
            .workers
            .iter_mut()
            .find(|entry| Arc::ptr_eq(&entry.held, held))
        else {
            return;
        };
        entry.leases = entry.leases.saturating_sub(1);
        entry.used = now;
        if entry.leases > 0 {
            return;
        }
        let unfit = held.worker.ended().is_some() || closed || (at_once && !entry.pinned);
        let mut leaving = state.take(|entry| unfit && Arc::ptr_eq(&entry.held, held));
        let idle = |state: &State| {
            state
                .workers
                .iter()
                .filter(|e| e.leases == 0 && !e.pinned)
                .count()
        };
        if idle(&state) > IDLE_MAX {
            let mut ages: Vec<u64> = state
                .workers
                .iter()
                .filter(|e| e.leases == 0 && !e.pinned)
                .map(|e| e.used)
                .collect();
            ages.sort_unstable();
            leaving.extend(
                state.take(|entry| entry.leases == 0 && !entry.pinned && Some(&entry.used) == ages.first()),
            );
        }
        drop(state);
        drop(leaving);
        if !unfit && let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(self.expire(Arc::downgrade(held), now));
        }
    }

    async fn expire(self: Arc<Self>, held: Weak<Held>, since: u64) {
        tokio::time::sleep(self.policy.stay).await;
        let Some(held) = held.upgrade() else { return };
        let mut state = self.state();
        let leaving = state.take(|entry| {
            Arc::ptr_eq(&entry.held, &held) && entry.leases == 0 && entry.used == since && !entry.pinned
        });
        drop(state);
        drop(leaving);
    }
}

impl State {
    /// Takes out those that `leave`. To be dropped without the lock: that ends processes.
    fn take(&mut self, leave: impl Fn(&Entry) -> bool) -> Vec<Arc<Held>> {
        let (leaving, staying) = std::mem::take(&mut self.workers).into_iter().partition(leave);
        self.workers = staying;
        let leaving: Vec<Entry> = leaving;
        leaving.into_iter().map(|entry| entry.held).collect()
    }
}
