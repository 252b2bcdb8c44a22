//! Pushing to one holder: what it lacks, and nothing twice.
use super::{
    FIRST_RETRY, Failure, LOSSES_MAX, Watch, ask, ask_status, blocking, connect, declined, span_bytes,
};
use crate::{
    transfer::{
        Holder, Inner, OnProgress, STREAMS, TransferError,
        flow::{self},
        wire::{self, RUNS_MAX, Request, Status},
    },
    verified::blocks_of,
};
use karez_core::{
    artifact::{ArtifactKind, ArtifactRef},
    id::Digest,
};
use quinn::Connection;
use std::{
    collections::{HashMap, VecDeque},
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
};
use tokio::{task::JoinSet, time::sleep};

pub(in crate::transfer) async fn push(
    inner: &Arc<Inner>,
    artifact: ArtifactRef,
    to: &Holder,
    progress: OnProgress,
) -> Result<(), TransferError> {
    let pin = inner.store.pin(&artifact)?;
    let files: Vec<(Digest, u64)> = match artifact.kind {
        ArtifactKind::Blob | ArtifactKind::Served => vec![(artifact.digest, artifact.bytes.0)],
        ArtifactKind::Tree => {
            let store = inner.store.clone();
            let manifest = blocking(move || store.manifest(&artifact)).await?;
            let unique: HashMap<_, _> = manifest
                .entries()
                .iter()
                .map(|entry| (entry.digest, entry.bytes.0))
                .collect();
            unique.into_iter().collect()
        }
    };
    let mut losses = 0;
    loop {
        let watch = Arc::new(Watch::new(progress.clone()));
        watch
            .total
            .store(files.iter().map(|(_, b)| b).sum(), Ordering::Relaxed);
        let failure = match connect(inner, to).await {
            Ok(mut lent) => {
                // The receiver holds what was begun as long as the connection lasts.
                lent.clean = false;
                match push_over(inner, &lent.connection, artifact, &files, &watch).await {
                    Ok(()) => {
                        lent.clean = true;
                        break;
                    }
                    Err(failure) => failure,
                }
            }
            Err(failure) => failure,
        };
        if watch.moved.load(Ordering::Relaxed) > 0 {
            losses = 0;
        }
        match failure {
            Failure::Reconnect => {}
            Failure::Local(error) => return Err(error.into()),
            Failure::Useless(why) => return Err(declined(to, artifact, why)),
            Failure::Lost(why) => {
                losses += 1;
                if losses >= LOSSES_MAX {
                    return Err(TransferError::Lost {
                        holder: to.key.short(),
                        artifact,
                        why,
                    });
                }
                sleep(FIRST_RETRY * 2u32.saturating_pow(losses - 1)).await;
            }
        }
    }
    drop(pin);
    Ok(())
}

async fn push_over(
    inner: &Arc<Inner>,
    connection: &Connection,
    artifact: ArtifactRef,
    files: &[(Digest, u64)],
    watch: &Arc<Watch>,
) -> Result<(), Failure> {
    match ask_status(connection, &Request::PutBegin(artifact)).await? {
        (Status::Already, _) => {
            watch.add(files.iter().map(|(_, b)| b).sum(), 0);
            return Ok(());
        }
        (Status::Ok, _) => {}
        (_, why) => return Err(Failure::Useless(why)),
    }
    let job = Arc::new(PushJob {
        inner: inner.clone(),
        connection: connection.clone(),
        artifact,
        watch: watch.clone(),
        queue: Mutex::default(),
    });
    if artifact.kind == ArtifactKind::Tree {
        // Only the manifest says which files may come.
        let manifest = inner.store.blob_bytes(&artifact.digest).unwrap_or(0);
        job.queue().files.push_back((artifact.digest, manifest));
        job.run(false).await?;
    }
    job.queue().files.extend(files);
    let mut workers = JoinSet::new();
    for _ in 0..STREAMS {
        let job = job.clone();
        workers.spawn(async move { job.run(true).await });
    }
    while let Some(worker) = workers.join_next().await {
        worker.map_err(|error| Failure::Lost(error.to_string()))??;
    }
    match ask_status(connection, &Request::PutEnd(artifact)).await? {
        (Status::Ok, _) => Ok(()),
        // The receiver lost track of blocks between two streams: asked again, it names them.
        (Status::Missing, why) => Err(Failure::Lost(why)),
        (_, why) => Err(Failure::Useless(why)),
    }
}

/// What the workers of one push share.
struct PushJob {
    inner: Arc<Inner>,
    connection: Connection,
    artifact: ArtifactRef,
    watch: Arc<Watch>,
    queue: Mutex<PushQueue>,
}

#[derive(Default)]
struct PushQueue {
    files: VecDeque<(Digest, u64)>,
    runs: VecDeque<(Digest, u64, Range<u64>)>,
}

impl PushJob {
    fn queue(&self) -> MutexGuard<'_, PushQueue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn run(&self, counted: bool) -> Result<(), Failure> {
        let count = |done, moved| {
            if counted {
                self.watch.add(done, moved);
            }
        };
        loop {
            let run = self.queue().runs.pop_front();
            if let Some((digest, bytes, blocks)) = run {
                let length = span_bytes(bytes, &blocks);
                self.put_blocks(digest, bytes, blocks).await?;
                count(length, length);
                continue;
            }
            let file = self.queue().files.pop_front();
            let Some((digest, bytes)) = file else {
                return Ok(());
            };
            let runs = self.missing(digest, bytes).await?;
            let lacking: u64 = runs.iter().map(|run| span_bytes(bytes, run)).sum();
            count(bytes.saturating_sub(lacking), 0);
            let runs = runs.into_iter().map(|run| (digest, bytes, run));
            self.queue().runs.extend(runs);
        }
    }

    async fn missing(&self, digest: Digest, bytes: u64) -> Result<Vec<Range<u64>>, Failure> {
        let request = Request::PutFile {
            artifact: self.artifact,
            digest,
            bytes,
        };
        let (mut send, mut recv) = ask(&self.connection, &request).await?;
        drop(send.finish());
        match wire::read_status(&mut recv).await? {
            (Status::Ok, _) => {}
            (_, why) => return Err(Failure::Useless(why)),
        }
        let count = wire::read_u64(&mut recv).await?;
        if count > u64::from(RUNS_MAX) {
            return Err(Failure::Useless("lists too many missing blocks".into()));
        }
        let mut runs = Vec::new();
        for _ in 0..count {
            let run = wire::read_u64(&mut recv).await?..wire::read_u64(&mut recv).await?;
            if run.start >= run.end || run.end > blocks_of(bytes) {
                return Err(Failure::Useless("lists blocks that do not exist".into()));
            }
            runs.push(run);
        }
        Ok(runs)
    }

    async fn put_blocks(&self, digest: Digest, bytes: u64, blocks: Range<u64>) -> Result<(), Failure> {
        if self.inner.lossy.judge(&self.connection) {
            return Err(Failure::Reconnect);
        }
        let (store, artifact) = (self.inner.store.clone(), self.artifact);
        let served = blocking(move || store.serve(&artifact, &digest))
            .await
            .map_err(Failure::Local)?;
        let request = Request::PutBlocks {
            artifact,
            digest,
            bytes,
            blocks: blocks.clone(),
        };
        let (mut send, mut recv) = ask(&self.connection, &request).await?;
        let sent = flow::send_blocks(&mut send, served, blocks).await;
        drop(send.finish());
        // A receiver that refuses says why before it stops listening.
        match (wire::read_status(&mut recv).await, sent) {
            (Ok((Status::Ok, _)), Ok(())) => Ok(()),
            (Ok((Status::Mismatch, _)), _) => {
                let store = self.inner.store.clone();
                let damaged = move || {
                    store.verify(&artifact)?;
                    Ok(())
                };
                blocking(damaged).await.map_err(Failure::Local)?;
                Err(Failure::Lost("the bytes were damaged on the way".into()))
            }
            (Ok((Status::Ok, _)), Err(error)) | (Err(_), Err(error)) | (Err(error), Ok(())) => {
                Err(error.into())
            }
            (Ok((_, why)), _) => Err(Failure::Useless(why)),
        }
    }
}
