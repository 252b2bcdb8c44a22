//! Workers that stay for the next lease, with their model loaded.
//!
//! Bounded by the memory the owner lends: a new worker makes the idle ones leave, the longest unused first. An idle
//! worker leaves by itself after a while, and at once when the owner reclaims.
use crate::{artifacts::Model, daemon::WorkerProgram};
use karez_core::{artifact::ArtifactRef, unit::Bytes};
use karez_engine::{
    EngineError, SpawnOptions, Worker,
    protocol::{Load, LoadKind},
};
use std::{
    ffi::OsString,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

/// Idle workers at most, whatever the memory.
const IDLE_MAX: usize = 8;

/// Workers with equal keys are interchangeable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ModelKey {
    pub(super) kind: LoadKind,
    pub(super) model: ArtifactRef,
    pub(super) threads: u16,
    /// The GPUs it sees.
    pub(super) gpus: Vec<String>,
}

/// All workers of the node.
#[derive(Debug)]
pub(crate) struct Warm {
    program: Option<WorkerProgram>,
    stay: Duration,
    memory: Bytes,
    /// Memory of every worker that lives, idle or at work.
    used: Arc<AtomicU64>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Longest unused first. Dropping one ends its process.
    idle: Vec<Idle>,
    next: u64,
    /// The owner wants the machine: nobody stays.
    closed: bool,
}

#[derive(Debug)]
struct Idle {
    number: u64,
    lent: Lent,
}

/// A worker with its model. Killed when dropped; [`Warm::give_back`] keeps it for the next lease.
#[derive(Debug)]
pub(super) struct Lent {
    key: ModelKey,
    worker: Worker,
    /// The model must stay in the store while the worker maps it.
    _model: Model,
    _memory: Reserved,
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
    /// The worker.
    pub(super) fn worker(&self) -> &Worker {
        &self.worker
    }
}

impl Warm {
    pub(crate) fn new(program: Option<WorkerProgram>, stay: Duration, memory: Bytes) -> Arc<Self> {
        let (used, state) = (Arc::default(), Mutex::default());
        Arc::new(Self {
            program,
            stay,
            memory,
            used,
            state,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many wait for work.
    pub(crate) fn idle(&self) -> usize {
        self.state().idle.len()
    }

    /// Every idle worker leaves now; until opened again, none stays after its work.
    pub(crate) fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        state.idle.clear();
    }

    /// Workers may stay again.
    pub(crate) fn open(&self) {
        self.state().closed = false;
    }

    /// An idle worker with this model.
    pub(super) fn take(&self, key: &ModelKey) -> Option<Lent> {
        let mut state = self.state();
        // The dead among the idle are of no use to anyone.
        state.idle.retain(|idle| idle.lent.worker.ended().is_none());
        let found = state.idle.iter().rposition(|idle| idle.lent.key == *key)?;
        Some(state.idle.remove(found).lent)
    }

    /// Starts a worker and loads the model; idle ones leave to make room for its `memory`.
    pub(super) async fn start(
        &self,
        key: ModelKey,
        load: Load,
        memory: Bytes,
        model: Model,
        load_max: Duration,
    ) -> Result<Lent, EngineError> {
        let none = || EngineError::Unsupported {
            reason: "this node has no worker program".into(),
        };
        let program = self.program.as_ref().ok_or_else(none)?;
        let reserved = self.reserve(memory, &key.gpus)?;
        // It sees the GPUs of its lease and no others; on a CPU, none.
        let visible = OsString::from(key.gpus.join(","));
        let env = vec![("CUDA_VISIBLE_DEVICES".into(), visible)];
        let options = SpawnOptions {
            env,
            silence_max: Some(super::SILENCE_MAX),
        };
        let worker = Worker::spawn(&program.path, &program.args, options).await?;
        worker.load(load, Some(load_max)).await?;
        Ok(Lent {
            key,
            worker,
            _model: model,
            _memory: reserved,
        })
    }

    fn reserve(&self, memory: Bytes, gpus: &[String]) -> Result<Reserved, EngineError> {
        // What a GPU holds is not memory of the machine; idle workers leave it all the same.
        let bytes = if gpus.is_empty() { memory.0 } else { 0 };
        let mut state = self.state();
        state
            .idle
            .retain(|idle| !idle.lent.key.gpus.iter().any(|gpu| gpus.contains(gpu)));
        loop {
            let used = self.used.load(Ordering::Relaxed);
            if used.saturating_add(bytes) <= self.memory.0 {
                // Only grows under the lock, so what was free a line ago still is.
                self.used.fetch_add(bytes, Ordering::Relaxed);
                return Ok(Reserved {
                    used: self.used.clone(),
                    bytes,
                });
            }
            if state.idle.is_empty() {
                return Err(EngineError::TooLarge {
                    needs: karez_engine::unit::Bytes(bytes),
                    has: karez_engine::unit::Bytes(self.memory.0.saturating_sub(used)),
                });
            }
            state.idle.remove(0);
        }
    }

    /// The lease is over: the worker may serve the next one, unless it is not fit to or the owner wants it gone.
    pub(super) fn give_back(self: &Arc<Self>, lent: Lent) {
        if lent.worker.runs() > 0 || lent.worker.ended().is_some() || self.stay.is_zero() {
            return;
        }
        let mut state = self.state();
        if state.closed {
            return;
        }
        if state.idle.len() >= IDLE_MAX {
            state.idle.remove(0);
        }
        let number = state.next;
        state.next += 1;
        state.idle.push(Idle { number, lent });
        drop(state);
        tokio::spawn(self.clone().expire(number));
    }

    async fn expire(self: Arc<Self>, number: u64) {
        tokio::time::sleep(self.stay).await;
        self.state().idle.retain(|idle| idle.number != number);
    }
}
