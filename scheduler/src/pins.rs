//! Artifacts that unfinished jobs need, kept from eviction: input, model, and results as they come.
use crate::mind::{Shared, lock};
use karez_core::{artifact::ArtifactRef, controller::JobView, id::JobId};
use karez_net::store::{ArtifactStore, Pin};
use std::{
    collections::{BTreeSet, HashMap},
    sync::Mutex,
};

pub(crate) struct Pins {
    store: ArtifactStore,
    held: Mutex<HashMap<JobId, Vec<Pin>>>,
    /// Jobs to look at again. Only such that hold pins, so it is bounded by the unfinished jobs.
    changed: Mutex<BTreeSet<JobId>>,
}

impl Pins {
    pub(crate) fn new(store: ArtifactStore) -> Self {
        Self {
            store,
            held: Mutex::default(),
            changed: Mutex::default(),
        }
    }

    /// Keeps `artifacts` for `job`, those that are here. Pinned before the job is known, so that no gap is left.
    pub(crate) fn keep(&self, job: JobId, artifacts: impl IntoIterator<Item = ArtifactRef>) {
        let mut held = lock(&self.held);
        let pins = held.entry(job).or_default();
        for artifact in artifacts {
            if pins.iter().all(|pin| pin.artifact() != artifact)
                && let Ok(pin) = self.store.pin(&artifact)
            {
                pins.push(pin);
            }
        }
    }

    /// Keeps one more for a job that holds pins already. Others are none of ours: a node may name any job.
    pub(crate) fn keep_more(&self, job: JobId, artifact: ArtifactRef) {
        if let Some(pins) = lock(&self.held).get_mut(&job)
            && pins.iter().all(|pin| pin.artifact() != artifact)
            && let Ok(pin) = self.store.pin(&artifact)
        {
            pins.push(pin);
        }
    }

    /// The job came to nothing, or ended.
    pub(crate) fn release(&self, job: &JobId) {
        let released = lock(&self.held).remove(job);
        drop(released);
    }

    /// Something about `job` changed; looked at by [`Pins::sweep`].
    pub(crate) fn changed(&self, job: JobId) {
        if lock(&self.held).contains_key(&job) {
            lock(&self.changed).insert(job);
        }
    }

    /// Lets go of what jobs that have ended held.
    pub(crate) async fn sweep(&self, shared: &Shared) {
        let changed = std::mem::take(&mut *lock(&self.changed));
        for job in changed {
            match shared.look(|c| c.job(&job)).await {
                Some(view) if !view.state.ended() => self.release_passed(&view),
                _ => self.release(&job),
            }
        }
    }

    /// Lets go of states that work in sequence has gone beyond: a long run must not fill the store with checkpoints.
    fn release_passed(&self, job: &JobView) {
        let passed = passed(job);
        if let Some(pins) = lock(&self.held).get_mut(&job.id) {
            pins.retain(|pin| !passed.contains(&pin.artifact()));
        }
    }

    /// After a restart: what the unfinished jobs need.
    pub(crate) fn restore(&self, jobs: &[JobView]) {
        for job in jobs {
            self.keep(job.id, needs(job));
        }
    }
}

/// Results of work in sequence that a later part's result stands for.
fn passed(job: &JobView) -> Vec<ArtifactRef> {
    if !job.order.work.in_sequence() {
        return Vec::new();
    }
    let mut results: Vec<ArtifactRef> = job.parts.iter().filter_map(|part| part.result).collect();
    let last = results.pop();
    results.retain(|result| Some(*result) != last);
    results
}

fn needs(job: &JobView) -> impl Iterator<Item = ArtifactRef> {
    let passed = passed(job);
    let states = job.parts.iter().flat_map(|part| [part.result, part.left]);
    let results = states.flatten().filter(move |result| !passed.contains(result));
    [job.order.input]
        .into_iter()
        .chain(job.order.work.artifacts())
        .chain(results)
}
