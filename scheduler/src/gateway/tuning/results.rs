//! What comes of a run: its course as it goes, and models of its checkpoints.
use super::{
    ApiError, Ask, Caller, Fault, JobState, Over, Progress, Shared, Stored, Told, Trail, Tuning, files, lock,
    memory, now, shown, unanswered, unread,
};
use crate::{
    gateway::work,
    tuner::{ADAPTER_FILE, BASE_FILE},
};
use karez_core::{artifact::ArtifactRef, controller::JobView};
use std::{fmt::Write as _, path::PathBuf, sync::Arc};
use tempfile::TempDir;

/// Losses that are kept of one run at most; of longer ones, evenly many.
const LOSSES_MAX: usize = 1_000;
/// Adapters of checkpoints that are kept ready.
const MADE_MAX: usize = 32;
/// How often making the result is tried.
const TRIES_MAX: u32 = 5;

/// How the run has gone so far.
pub(super) async fn trail(shared: &Shared, row: &Tuning) -> Result<Trail, ApiError> {
    if let Some(over) = &row.over {
        return Ok(over.trail.clone());
    }
    let Some(view) = shared.look(|c| c.job(&row.job)).await else {
        return Ok(Trail::default());
    };
    let log = shared.look(|c| c.logs(&row.job)).await;
    let checkpoints = stored(&view);
    let read = match checkpoints.last() {
        Some(last) => progress(shared, row, last.artifact).await?,
        None => Arc::default(),
    };
    let mut trail = told(&read, checkpoints);
    trail.log = log;
    // The step under way has no checkpoint yet: its loss is the node's word.
    let running = view.parts.iter().find(|part| part.state == JobState::Running);
    if let Some(part) = running.filter(|part| part.items_done > 0 && part.loss_micro > 0) {
        let step = part.first_item + part.items_done;
        if trail.losses.last().is_none_or(|(last, _)| *last < step) {
            trail.losses.push((step, part.loss_micro as f64 / 1e6));
        }
    }
    Ok(trail)
}

fn told(read: &Progress, checkpoints: Vec<Stored>) -> Trail {
    let all = read.losses.iter().zip(1u64..);
    let every = read.losses.len().div_ceil(LOSSES_MAX).max(1) as u64;
    let last = read.losses.len() as u64;
    let kept = all.filter(|(_, step)| *step == 1 || step % every == 0 || *step == last);
    Trail {
        losses: kept.map(|(loss, step)| (step, f64::from(*loss))).collect(),
        held_out: read.held_out.clone(),
        checkpoints,
        log: Vec::new(),
    }
}

fn stored(view: &JobView) -> Vec<Stored> {
    let done = view.parts.iter().filter_map(|part| {
        Some(Stored {
            step: part.first_item + part.items,
            at: part.changed_at.0 / 1000,
            artifact: part.result?,
        })
    });
    done.collect()
}

/// What a checkpoint says. Read once, as long as the job is under way.
async fn progress(shared: &Shared, row: &Tuning, checkpoint: ArtifactRef) -> Result<Arc<Progress>, ApiError> {
    let known = lock(&shared.tunings.read).get(&row.id).cloned();
    if let Some((_, progress)) = known.filter(|(digest, _)| *digest == checkpoint.digest) {
        return Ok(progress);
    }
    let _pin = shared.store.pin(&checkpoint).map_err(unread)?;
    let question = Ask::Read {
        checkpoint: shared.store.path(&checkpoint).map_err(unread)?,
    };
    let told = shared.tuner.ask(question, memory(checkpoint.bytes.0, 4)).await;
    match told.map_err(unanswered)? {
        Told::Read(progress) => {
            let progress = Arc::new(progress);
            lock(&shared.tunings.read).insert(row.id.clone(), (checkpoint.digest, progress.clone()));
            Ok(progress)
        }
        other => Err(refused(other)),
    }
}

/// Neither the request's fault nor one that trying again would mend.
fn refused(told: Told) -> ApiError {
    match told {
        Told::Refused { what, why } => {
            let of = match what {
                Fault::Base => "the base model: ",
                _ => "",
            };
            ApiError::param("model", format!("cannot be served: {of}{why}"))
        }
        _ => ApiError::server("the trainer's process answered another question"),
    }
}

/// Where a question about a base model is worked on: its folder, linked out of the store, and room beside it. Gone with the
/// value.
pub(super) struct Desk(TempDir);

impl Desk {
    pub(super) fn base(&self) -> PathBuf {
        self.0.path().join("base")
    }

    /// What is written lies apart: the files of the base are the store's own.
    fn room(&self) -> PathBuf {
        self.0.path().join("room")
    }
}

pub(super) async fn desk(shared: &Shared, base: ArtifactRef) -> Result<Desk, ApiError> {
    let desk = Desk(files::scratch_folder(&shared.dir)?);
    let (store, to, room) = (shared.store.clone(), desk.base(), desk.room());
    let made = tokio::task::spawn_blocking(move || {
        std::fs::create_dir(room).map_err(|e| ApiError::unavailable(format!("the scheduler's disk: {e}")))?;
        store.link(&base, &to).map_err(unread)
    });
    match made.await {
        Ok(made) => made.map(|()| desk),
        Err(_) => Err(ApiError::server("reading the base model failed")),
    }
}

/// The base model as one file for llama.cpp: the same bytes for the same folder, so it is made once.
pub(super) async fn base_file(shared: &Arc<Shared>, base: ArtifactRef) -> Result<ArtifactRef, ApiError> {
    let known = {
        let rows = lock(&shared.tunings.rows);
        let mut same = rows.values().filter(|row| row.base == base);
        same.find(|row| shared.store.contains(&row.served))
            .map(|row| row.served)
    };
    if let Some(known) = known {
        return Ok(known);
    }
    let _pin = shared.store.pin(&base).map_err(unread)?;
    let desk = desk(shared, base).await?;
    let question = Ask::Base {
        base: desk.base(),
        folder: desk.room(),
    };
    let told = shared.tuner.ask(question, memory(base.bytes.0, 6)).await;
    match told.map_err(unanswered)? {
        Told::Written => keep(shared, desk.room().join(BASE_FILE)).await,
        other => Err(refused(other)),
    }
}

/// A checkpoint's adapter, over that file.
async fn adapter(
    shared: &Arc<Shared>,
    row: &Tuning,
    checkpoint: ArtifactRef,
    name: &str,
) -> Result<ArtifactRef, ApiError> {
    let _pins = (
        shared.store.pin(&row.base).map_err(unread)?,
        shared.store.pin(&checkpoint).map_err(unread)?,
    );
    let desk = desk(shared, row.base).await?;
    let question = Ask::Adapter {
        base: desk.base(),
        checkpoint: shared.store.path(&checkpoint).map_err(unread)?,
        name: name.to_owned(),
        over: row.served.digest.to_string(),
        folder: desk.room(),
    };
    let told = shared.tuner.ask(question, memory(checkpoint.bytes.0, 8)).await;
    match told.map_err(unanswered)? {
        Told::Written => keep(shared, desk.room().join(ADAPTER_FILE)).await,
        other => Err(refused(other)),
    }
}

async fn keep(shared: &Shared, path: PathBuf) -> Result<ArtifactRef, ApiError> {
    let store = shared.store.clone();
    match tokio::task::spawn_blocking(move || store.add_file(&path)).await {
        Ok(kept) => kept.map_err(unread),
        Err(_) => Err(ApiError::server("storing the result failed")),
    }
}

/// Base and adapter of a model that came of a job of the caller's, or of a checkpoint on the way to one. Nothing when the
/// name is none of these.
pub(in crate::gateway) async fn resolve(
    shared: &Arc<Shared>,
    caller: &Caller,
    name: &str,
) -> Result<Option<(ArtifactRef, ArtifactRef)>, ApiError> {
    let (whole, step) = match name.rsplit_once(":step-") {
        Some((whole, step)) => (whole, step.parse::<u64>().ok()),
        None => (name, None),
    };
    let row = {
        let rows = lock(&shared.tunings.rows);
        let mut mine = rows.values().filter(|row| row.owner == caller.key);
        mine.find(|row| row.name == whole).cloned()
    };
    let Some(row) = row else { return Ok(None) };
    let Some(step) = step else {
        let ready = row.over.as_ref().and_then(|over| over.adapter);
        let why = match &row.over {
            None => "is not ready: its fine-tuning job is under way",
            Some(_) => "does not exist: its fine-tuning job came to nothing, or it was deleted",
        };
        return match ready {
            Some(adapter) => Ok(Some((row.served, adapter))),
            None => Err(ApiError::param("model", why)),
        };
    };
    let trail = trail(shared, &row).await?;
    let gone = || ApiError::param("model", "names a checkpoint that is not, or no longer, there");
    let stored = trail
        .checkpoints
        .iter()
        .find(|stored| stored.step == step)
        .ok_or_else(gone)?;
    let digest = stored.artifact.digest;
    let known = {
        let made = lock(&shared.tunings.made);
        made.iter()
            .find(|(of, ..)| *of == digest)
            .map(|(_, adapter, _)| *adapter)
    };
    if let Some(adapter) = known {
        return Ok(Some((row.served, adapter)));
    }
    if !shared.store.contains(&stored.artifact) || !shared.store.contains(&row.base) {
        return Err(gone());
    }
    let adapter = adapter(shared, &row, stored.artifact, &shown::checkpoint_name(&row, step)).await?;
    let pin = shared.store.pin(&adapter).map_err(unread)?;
    let mut made = lock(&shared.tunings.made);
    if made.len() >= MADE_MAX {
        made.remove(0);
    }
    made.push((digest, adapter, pin));
    Ok(Some((row.served, adapter)))
}

impl super::Tunings {
    /// Makes models of jobs that have ended. Before their checkpoints may be evicted.
    pub(crate) async fn sweep(&self, shared: &Arc<Shared>) {
        let rows: Vec<Tuning> = lock(&self.rows)
            .values()
            .filter(|row| row.over.is_none() || !shared.members.contains(&row.owner))
            .cloned()
            .collect();
        for row in rows {
            if !shared.members.contains(&row.owner) {
                self.remove(shared, &row.id).await;
                continue;
            }
            let view = shared.look(|c| c.job(&row.job)).await;
            if view.as_ref().is_some_and(|view| !view.state.ended())
                || !lock(&self.closing).insert(row.id.clone())
            {
                continue;
            }
            // Held while it is read: the job's own pins are let go of now.
            let last = view.as_ref().and_then(|view| stored(view).pop());
            let pin = last.and_then(|last| shared.store.pin(&last.artifact).ok());
            let shared = shared.clone();
            // Making a model takes longer than a sweep may.
            tokio::spawn(async move {
                let _pin = pin;
                let id = row.id.clone();
                if let Err(error) = close(&shared, row, view).await {
                    tracing::warn!(tuning = %id, error = %error.json(), "a fine-tuning job cannot be closed yet");
                }
                lock(&shared.tunings.closing).remove(&id);
            });
        }
    }
}

/// Makes the model, and writes the job's end.
async fn close(shared: &Arc<Shared>, mut row: Tuning, view: Option<JobView>) -> Result<(), ApiError> {
    let (state, cause) = work::ended_as(view.as_ref());
    let mut over = Over {
        at: now(),
        state,
        cause,
        results: Vec::new(),
        adapter: None,
        tokens: 0,
        trail: trail(shared, &row).await.unwrap_or_default(),
    };
    let mut kept = Vec::new();
    if state == JobState::Done {
        match results(shared, &row, &over.trail).await {
            Ok(made) => {
                over.adapter = Some(made.adapter);
                over.tokens = made.tokens;
                over.trail = made.trail;
                over.results = made.files.iter().map(|file| file.id.clone()).collect();
                kept = made.files;
            }
            Err(error) => {
                let tries = {
                    let mut failed = lock(&shared.tunings.failed);
                    let tries = failed.entry(row.id.clone()).or_default();
                    *tries += 1;
                    *tries
                };
                if tries < TRIES_MAX {
                    return Err(error);
                }
                let why = error.json()["error"]["message"]
                    .as_str()
                    .unwrap_or_default()
                    .to_owned();
                (over.state, over.cause) = (
                    JobState::Failed,
                    format!("making a model of the last checkpoint: {why}"),
                );
            }
        }
    }
    row.over = Some(over);
    lock(&shared.tunings.failed).remove(&row.id);
    lock(&shared.tunings.read).remove(&row.id);
    shared.tunings.put(shared, row, kept).await
}

/// What a finished run leaves.
struct Made {
    adapter: ArtifactRef,
    tokens: u64,
    trail: Trail,
    files: Vec<files::File>,
}

async fn results(shared: &Arc<Shared>, row: &Tuning, so_far: &Trail) -> Result<Made, ApiError> {
    let last = so_far.checkpoints.last();
    let last = last
        .ok_or_else(|| ApiError::server("the job left no checkpoint"))?
        .artifact;
    let read = progress(shared, row, last).await?;
    let adapter = adapter(shared, row, last, &row.name).await?;
    let mut table = "step,train_loss,full_valid_loss\n".to_owned();
    for (loss, step) in read.losses.iter().zip(1u64..) {
        let held = read.held_out.get(&step).map(f64::to_string).unwrap_or_default();
        let _ = writeln!(table, "{step},{loss},{held}");
    }
    let store = shared.store.clone();
    let metrics = tokio::task::spawn_blocking(move || store.add_bytes(table.as_bytes())).await;
    let metrics = metrics
        .map_err(|_| ApiError::server("storing the result failed"))?
        .map_err(unread)?;
    let file = |artifact, name: String| {
        Ok::<_, ApiError>(files::File {
            id: files::fresh("file")?,
            owner: row.owner,
            artifact,
            name,
            purpose: "fine-tune-results".into(),
            created_at: now(),
        })
    };
    let files = vec![
        file(metrics, "step_metrics.csv".into())?,
        file(adapter, ADAPTER_FILE.into())?,
    ];
    Ok(Made {
        adapter,
        tokens: read.tokens,
        trail: Trail {
            log: so_far.log.clone(),
            ..told(&read, so_far.checkpoints.clone())
        },
        files,
    })
}
