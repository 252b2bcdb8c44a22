//! Fetching: one artifact after another, each from all holders at once.
use super::{Failure, UNIT_BLOCKS, Watch, ask, blocking, pool::Pool};
use crate::{
    manifest::Manifest,
    store::{ArtifactStore, MANIFEST_MAX, Partial, Pin, SMALL_BYTES, StoreError},
    transfer::{
        Holder, Inner, OnProgress, STREAMS, TransferError,
        flow::{self, Expected},
        wire::{self, Request, Status},
    },
    verified::blocks_of,
};
use karez_core::{
    artifact::{ArtifactKind, ArtifactRef},
    id::Digest,
    unit::Bytes,
};
use quinn::{Connection, RecvStream};
use std::{
    collections::{HashMap, VecDeque},
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};
use tokio::task::JoinSet;

pub(in crate::transfer) async fn fetch(
    inner: &Arc<Inner>,
    artifacts: &[ArtifactRef],
    holders: &[Holder],
    progress: OnProgress,
) -> Result<Vec<Pin>, TransferError> {
    let watch = Arc::new(Watch::new(progress));
    let total = artifacts.iter().map(|a| a.bytes.0).fold(0, u64::saturating_add);
    watch.total.store(total, Ordering::Relaxed);
    let mut pins = Vec::with_capacity(artifacts.len());
    for artifact in artifacts {
        // A holder may lack one artifact and have the next.
        let pool = Arc::new(Pool::new(inner.clone(), holders));
        pins.push(fetch_one(inner, *artifact, &pool, &watch).await?);
    }
    Ok(pins)
}

async fn fetch_one(
    inner: &Arc<Inner>,
    artifact: ArtifactRef,
    pool: &Arc<Pool>,
    watch: &Arc<Watch>,
) -> Result<Pin, TransferError> {
    let store = inner.store.clone();
    if let Ok(pin) = store.pin(&artifact) {
        watch.add(artifact.bytes.0, 0);
        return Ok(pin);
    }
    if artifact.bytes > store.limit() {
        return Err(StoreError::Full {
            needs: artifact.bytes,
            limit: store.limit(),
            pinned: Bytes::ZERO,
        }
        .into());
    }
    let beginning = store.clone();
    let pin = blocking(move || beginning.begin(&artifact)).await?;
    let pin = Arc::new(pin);
    let files: VecDeque<(Digest, u64)> = match artifact.kind {
        ArtifactKind::Blob | ArtifactKind::Served => VecDeque::from([(artifact.digest, artifact.bytes.0)]),
        ArtifactKind::Tree => {
            let manifest = fetch_manifest(&store, pool, &pin).await?;
            // Equal files are moved once.
            let unique: HashMap<_, _> = manifest
                .entries()
                .iter()
                .map(|entry| (entry.digest, entry.bytes.0))
                .collect();
            let moved_once: u64 = unique.values().sum();
            let twice = artifact.bytes.0.saturating_sub(moved_once);
            watch.add(twice, 0);
            unique.into_iter().collect()
        }
    };
    let work = Arc::new(Work {
        artifact,
        store: store.clone(),
        pool: pool.clone(),
        watch: watch.clone(),
        queue: tokio::sync::Mutex::new(Queue {
            files,
            units: VecDeque::new(),
        }),
    });
    let mut workers = JoinSet::new();
    for _ in 0..STREAMS {
        let work = work.clone();
        workers.spawn(async move { work.run().await });
    }
    let mut result = Ok(());
    while let Some(worker) = workers.join_next().await {
        let ended = worker.unwrap_or_else(|error| {
            Err(StoreError::Io {
                path: "transfer".into(),
                error: std::io::Error::other(error),
            }
            .into())
        });
        if ended.is_err() && result.is_ok() {
            result = ended;
            // The others would only meet the same; what they have is kept.
            workers.abort_all();
        }
    }
    // Partials that are dropped here save what arrived.
    drop(work);
    result?;
    blocking(move || {
        store.complete(&pin)?;
        store.pin(&artifact)
    })
    .await
    .map_err(TransferError::from)
}

async fn fetch_manifest(
    store: &ArtifactStore,
    pool: &Arc<Pool>,
    pin: &Arc<Pin>,
) -> Result<Manifest, TransferError> {
    let artifact = pin.artifact();
    let digest = artifact.digest;
    if store.blob_bytes(&digest).is_none() {
        let content = loop {
            let turn = pool.turn(artifact).await?;
            let got = async {
                let (mut recv, bytes) = get(&turn.connection, artifact, digest, None, 0..u64::MAX).await?;
                if bytes > MANIFEST_MAX {
                    return Err(Failure::Useless("sent too large a manifest".into()));
                }
                Ok(flow::receive_whole(&mut recv, digest, bytes).await?)
            };
            let got = got.await;
            if let Some(content) = turn.settle(got)? {
                break content;
            }
        };
        let keeping = store.clone();
        blocking(move || keeping.keep_verified(&digest, &content)).await?;
    }
    let (store, pin) = (store.clone(), pin.clone());
    Ok(blocking(move || store.adopt_manifest(&pin)).await?)
}

/// Asks for blocks of a file. `bytes` is the size it must have, where that is known.
async fn get(
    connection: &Connection,
    artifact: ArtifactRef,
    digest: Digest,
    bytes: Option<u64>,
    blocks: Range<u64>,
) -> Result<(RecvStream, u64), Failure> {
    let request = Request::Get {
        artifact,
        digest,
        blocks,
    };
    let (mut send, mut recv) = ask(connection, &request).await?;
    drop(send.finish());
    match wire::read_status(&mut recv).await? {
        (Status::Ok, _) => {}
        (Status::Reconnect, _) => return Err(Failure::Reconnect),
        (_, why) => return Err(Failure::Useless(why)),
    }
    let said = wire::read_u64(&mut recv).await?;
    match bytes {
        Some(bytes) if bytes != said => Err(Failure::Useless(format!(
            "has {said} bytes for {}, expected {bytes}",
            digest.short()
        ))),
        _ => Ok((recv, said)),
    }
}

/// What the workers of one fetch share.
struct Work {
    artifact: ArtifactRef,
    store: ArtifactStore,
    pool: Arc<Pool>,
    watch: Arc<Watch>,
    queue: tokio::sync::Mutex<Queue>,
}

struct Queue {
    files: VecDeque<(Digest, u64)>,
    units: VecDeque<Unit>,
}

/// What one stream fetches: a small file whole, or some blocks of a larger one.
enum Unit {
    Small { digest: Digest, bytes: u64 },
    Blocks { file: Arc<OpenFile>, blocks: Range<u64> },
}

/// A larger file under way; finished by whoever fetches its last unit.
struct OpenFile {
    partial: Arc<Partial>,
    units_left: AtomicUsize,
}

impl Work {
    async fn run(&self) -> Result<(), TransferError> {
        while let Some(unit) = self.next_unit().await? {
            match unit {
                Unit::Small { digest, bytes } => self.small(digest, bytes).await?,
                Unit::Blocks { file, blocks } => self.blocks(&file, blocks).await?,
            }
        }
        Ok(())
    }

    async fn next_unit(&self) -> Result<Option<Unit>, TransferError> {
        let mut queue = self.queue.lock().await;
        loop {
            if let Some(unit) = queue.units.pop_front() {
                return Ok(Some(unit));
            }
            let Some((digest, bytes)) = queue.files.pop_front() else {
                return Ok(None);
            };
            if self.store.blob_bytes(&digest) == Some(bytes) {
                self.watch.add(bytes, 0);
                continue;
            }
            if bytes <= SMALL_BYTES {
                return Ok(Some(Unit::Small { digest, bytes }));
            }
            let store = self.store.clone();
            let partial = blocking(move || store.partial(&digest, bytes)).await?;
            self.watch.add(partial.present(), 0);
            // Enough units for every stream, but none so small that asking for it costs more than moving it.
            let each = (blocks_of(bytes) / (4 * STREAMS as u64)).clamp(4, UNIT_BLOCKS);
            let runs = partial.missing(0..u64::MAX, each);
            if runs.is_empty() {
                self.finish(partial).await?;
                continue;
            }
            let file = Arc::new(OpenFile {
                partial,
                units_left: AtomicUsize::new(runs.len()),
            });
            queue.units.extend(runs.into_iter().map(|blocks| Unit::Blocks {
                file: file.clone(),
                blocks,
            }));
        }
    }

    async fn small(&self, digest: Digest, bytes: u64) -> Result<(), TransferError> {
        let content = loop {
            let turn = self.pool.turn(self.artifact).await?;
            let got = async {
                let (mut recv, _) =
                    get(&turn.connection, self.artifact, digest, Some(bytes), 0..u64::MAX).await?;
                Ok(flow::receive_whole(&mut recv, digest, bytes).await?)
            };
            let got = got.await;
            if let Some(content) = turn.settle(got)? {
                break content;
            }
        };
        let store = self.store.clone();
        blocking(move || store.keep_verified(&digest, &content)).await?;
        self.watch.add(bytes, bytes);
        Ok(())
    }

    async fn blocks(&self, file: &OpenFile, blocks: Range<u64>) -> Result<(), TransferError> {
        let partial = &file.partial;
        // What a lost holder has sent of the unit is not asked for again.
        while let Some(run) = partial.missing(blocks.clone(), UNIT_BLOCKS).into_iter().next() {
            let turn = self.pool.turn(self.artifact).await?;
            let expected = Expected {
                digest: partial.digest(),
                bytes: partial.bytes(),
                blocks: run.clone(),
            };
            let got = async {
                let (mut recv, _) = get(
                    &turn.connection,
                    self.artifact,
                    expected.digest,
                    Some(expected.bytes),
                    run,
                )
                .await?;
                let on_block = |bytes| {
                    turn.slot.progressed();
                    self.watch.add(bytes, bytes);
                };
                Ok(flow::receive_blocks(&mut recv, partial, expected, &on_block).await?)
            };
            let got = got.await;
            turn.settle(got)?;
        }
        if file.units_left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.finish(partial.clone()).await?;
        }
        Ok(())
    }

    async fn finish(&self, partial: Arc<Partial>) -> Result<(), TransferError> {
        let store = self.store.clone();
        Ok(blocking(move || store.finish(&partial)).await?)
    }
}
