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
            if shared
                .look(|c| c.job(&job))
                .await
                .is_none_or(|view| view.state.ended())
            {
                self.release(&job);
            }
        }
    }

    /// After a restart: what the unfinished jobs need.
    pub(crate) fn restore(&self, jobs: &[JobView]) {
        for job in jobs {
            self.keep(job.id, needs(job));
        }
    }
}

fn needs(job: &JobView) -> impl Iterator<Item = ArtifactRef> {
    let results = job.parts.iter().filter_map(|part| part.result);
    [job.order.input]
        .into_iter()
        .chain(job.order.work.artifacts())
        .chain(results)
}
