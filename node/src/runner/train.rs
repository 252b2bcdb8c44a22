//! Training leases: the worker goes from one checkpoint to the next, and the checkpoint is the result.
//!
//! A worker that was told to stop hands over what it has: its lease then ends with the state of its last step.
use super::{
    Failure, LOAD_MAX, Running, Tools, add,
    warm::{Folder, Lent, ModelKey, Start},
};
use crate::artifacts::Model;
use karez_core::{artifact::ArtifactRef, records::Train, unit::Bytes};
use karez_engine::{
    Event,
    protocol::{self, Checkpointed, Load, LoadKind, Output, Progress},
};
use karez_net::store::{ArtifactStore, Pin};
use std::path::{Path, PathBuf};

impl Running {
    /// A new worker for training, with a directory of its own.
    pub(super) async fn trainer(&self, tools: &Tools, key: ModelKey, files: Model) -> Result<Lent, Failure> {
        let name = format!("train-{:016x}", getrandom::u64().unwrap_or_default());
        let scratch = Folder(tools.scratch.join(name));
        std::fs::create_dir(&scratch.0).map_err(|e| Failure::Node(format!("the node's disk: {e}")))?;
        let load = Load {
            threads: Some(self.job.threads),
            memory_limit: Some(self.job.memory),
            scratch: Some(scratch.0.clone()),
            trainer: tools
                .trainer
                .as_ref()
                .and_then(|trainer| trainer.serving(&key.gpus))
                .cloned(),
            ..Load::new(LoadKind::Train, files.path.clone())
        };
        // As the order says, which knows its settings; at least as the scheduler estimates it.
        let memory = key.model.bytes.0.saturating_mul(2).saturating_add(256 << 20);
        let memory = memory.max(self.job.order.constraints.memory.0);
        let start = Start {
            key,
            load,
            memory: Bytes(memory).min(self.job.memory),
            model: files,
            adapters: scratch,
            load_max: LOAD_MAX,
        };
        let lent = tools.warm.start(start).await?;
        tracing::info!(lease = %self.job.key, pid = lent.worker().pid(), "ready to train");
        Ok(lent)
    }

    /// Takes the steps of this lease. The checkpoint after them is in the store, and pinned.
    pub(super) async fn train(&mut self, train: &Train, tools: &Tools) -> Result<Pin, Failure> {
        let mut stopped = self.stopped.clone();
        // Dropping what is not ready yet kills the half-started worker.
        let began = std::time::Instant::now();
        let lent = tokio::select! {
            lent = self.worker(tools) => lent?,
            () = stopped.said() => return Err(Failure::Stopped),
        };
        self.loaded(began);
        self.memory.follow(lent.footprint());
        let done = self.steps(train, tools, &lent).await;
        self.memory.look();
        done
    }

    async fn steps(&mut self, train: &Train, tools: &Tools, lent: &Lent) -> Result<Pin, Failure> {
        let scratch = lent.adapters().to_owned();
        let store = tools.artifacts.store();
        let input = self.job.order.input;
        let data = place(store, &scratch, "data", input).await?;
        let from = match self.job.from {
            Some(from) => Some((place(store, &scratch, "from", from).await?, hex(&from))),
            None => None,
        };
        let first = self.job.first_item;
        let until = first + self.job.items;
        let out = "checkpoint".to_owned();
        let mut run = lent.worker().run(protocol::Work::Train(protocol::Train {
            base_digest: hex(&train.model),
            data,
            data_digest: hex(&input),
            settings: train.settings.clone(),
            language: Some(train.language.clone()).filter(|tag| !tag.is_empty()),
            from: from.clone(),
            until,
            out: out.clone(),
        }))?;
        let mut stopped = self.stopped.clone();
        let mut told = false;
        let made = loop {
            let event = tokio::select! {
                event = run.next() => event,
                () = stopped.said(), if !told => {
                    told = true;
                    run.cancel();
                    continue;
                }
                () = async { self.stopped.clone().overdue().await }, if told => {
                    lent.worker().kill();
                    return Err(Failure::Stopped);
                }
            };
            match event {
                Some(Event::Token(piece)) => {
                    if let Ok(progress) =
                        serde_json::from_str::<Progress>(piece.text.lines().last().unwrap_or_default())
                    {
                        self.meters.items = progress.step.saturating_sub(first);
                        self.live_tokens = 0;
                        self.meters.tokens_in = progress.tokens;
                        self.meters.loss_micro = (progress.loss.max(0.0) * 1e6) as u64;
                    }
                }
                Some(Event::Done {
                    output: Output::Checkpoint(made),
                    meters,
                }) => {
                    self.meters.tokens_in = 0;
                    add(&mut self.meters, &meters);
                    break made;
                }
                Some(Event::Done { .. }) => {
                    return Err(Failure::Node(
                        "the worker answered something else than was asked".into(),
                    ));
                }
                Some(Event::Failed { error, meters }) => {
                    self.meters.tokens_in = 0;
                    add(&mut self.meters, &meters);
                    return Err(match (Failure::from(error), &self.job.from) {
                        (Failure::Job(why), Some(good)) => {
                            Failure::Job(format!("{why}; the last good checkpoint is {good}"))
                        }
                        (failure, _) => failure,
                    });
                }
                None => return Err(Failure::Node("the worker ended a run without a word".into())),
            }
            self.progress();
        };
        let pin = keep(store, scratch.join(&out), &made).await?;
        if let Some((name, _)) = from {
            let _ = std::fs::remove_file(scratch.join(name));
        }
        self.meters.bytes_out = made.bytes;
        self.meters.items = made.step.saturating_sub(first);
        if let Some(loss) = made.loss {
            self.meters.loss_micro = (loss.max(0.0) * 1e6) as u64;
        }
        tracing::info!(
            lease = %self.job.key, step = made.step, bytes = made.bytes.0, took_ms = made.took_ms,
            "checkpoint {}", pin.artifact().digest.short()
        );
        if made.finished || made.step >= until {
            Ok(pin)
        } else if told {
            Err(Failure::Left(pin))
        } else {
            Err(Failure::Node(format!(
                "the worker stopped at step {} of {until}",
                made.step
            )))
        }
    }
}

fn hex(artifact: &ArtifactRef) -> String {
    artifact.digest.to_string()
}

/// Puts an artifact where the worker can read it, and says under which name.
async fn place(
    store: &ArtifactStore,
    scratch: &Path,
    kind: &str,
    artifact: ArtifactRef,
) -> Result<String, Failure> {
    let name = format!("{kind}-{}", artifact.digest.short());
    let (store, to) = (store.clone(), scratch.join(&name));
    let placed = tokio::task::spawn_blocking(move || -> Result<(), String> {
        if to.exists() {
            return Ok(());
        }
        let path = store.path(&artifact).map_err(|error| error.to_string())?;
        // A link costs nothing; the worker may write in its directory, so it gets a copy of what others share.
        std::fs::copy(path, &to).map(drop).map_err(|error| {
            let _ = std::fs::remove_file(&to);
            format!("the node's disk: {error}")
        })
    });
    match placed.await {
        Ok(Ok(())) => Ok(name),
        Ok(Err(why)) => Err(Failure::Node(why)),
        Err(_) => Err(Failure::Node("the node could not lay out the work".into())),
    }
}

/// Brings the checkpoint into the store. What the worker says of it must be true.
async fn keep(store: &ArtifactStore, path: PathBuf, made: &Checkpointed) -> Result<Pin, Failure> {
    let (store, digest) = (store.clone(), made.digest.clone());
    let kept = tokio::task::spawn_blocking(move || {
        let artifact = store.add_file(&path).map_err(|error| error.to_string())?;
        let _ = std::fs::remove_file(&path);
        if artifact.digest.to_string() != digest {
            return Err("the checkpoint changed on its way into the store".to_owned());
        }
        store.pin(&artifact).map_err(|error| error.to_string())
    });
    match kept.await {
        Ok(Ok(pin)) => Ok(pin),
        Ok(Err(why)) => Err(Failure::Node(format!(
            "the node could not store the checkpoint: {why}"
        ))),
        Err(_) => Err(Failure::Node("the node could not store the checkpoint".into())),
    }
}
