//! The asking side: fetching from several holders at once, pushing to one.
use super::{
    ADDRS_MAX, CONNECT_MAX, Holder, Inner, OnProgress, Progress, STREAMS, TransferError, client_config,
    flow::{self, Expected, ReceiveError},
    wire::{self, RUNS_MAX, Request, Status, StreamError},
};
use crate::{
    manifest::Manifest,
    store::{ArtifactStore, MANIFEST_MAX, Partial, Pin, SMALL_BYTES, StoreError},
    verified::{BLOCK_BYTES, blocks_of},
};
use karez_core::{
    artifact::{ArtifactKind, ArtifactRef},
    id::Digest,
    unit::Bytes,
};
use quinn::{Connection, RecvStream, SendStream};
use std::{
    collections::{HashMap, VecDeque},
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::{
    task::{JoinSet, spawn_blocking},
    time::{Instant, sleep, sleep_until, timeout},
};

/// What one stream fetches at a time: 16 MiB.
const UNIT_BLOCKS: u64 = 64;
/// A holder that is lost so often in a row, without a single block in between, is given up.
const LOSSES_MAX: u32 = 4;
/// The pause before a lost holder is tried again; each is twice the one before.
const FIRST_RETRY: Duration = Duration::from_millis(500);

/// Why one exchange with one holder failed.
#[derive(Debug)]
enum Failure {
    /// Worth another attempt.
    Lost(String),
    /// Worth another attempt at once.
    Reconnect,
    /// This holder cannot or will not help.
    Useless(String),
    /// Nobody can help.
    Local(StoreError),
}

impl From<StreamError> for Failure {
    fn from(error: StreamError) -> Self {
        match error {
            StreamError::Lost(why) => Self::Lost(why),
            StreamError::Malformed(why) => Self::Useless(why.into()),
        }
    }
}

impl From<ReceiveError> for Failure {
    fn from(error: ReceiveError) -> Self {
        match error {
            ReceiveError::Stream(error) => error.into(),
            ReceiveError::Mismatch { at } => {
                Self::Useless(format!("sent bytes that do not match near byte {at}"))
            }
            ReceiveError::Store(error) => Self::Local(error),
        }
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    spawn_blocking(work).await.unwrap_or_else(|error| {
        Err(StoreError::Io {
            path: "store".into(),
            error: std::io::Error::other(error),
        })
    })
}

async fn connect(inner: &Inner, holder: &Holder) -> Result<Connection, Failure> {
    let mut failure = Failure::Useless("it has no address".into());
    for addr in holder.addrs.iter().take(ADDRS_MAX) {
        let bbr = inner.lossy.contains(addr.ip());
        let config = client_config(&inner.secret, holder.key, bbr);
        let config = config.map_err(|e| Failure::Useless(e.to_string()))?;
        failure = match inner.endpoint.connect_with(config, *addr, "karez") {
            Ok(connecting) => match timeout(CONNECT_MAX, connecting).await {
                Ok(Ok(connection)) => return Ok(connection),
                Ok(Err(error)) if is_tls_refusal(&error) => {
                    Failure::Useless(format!("{addr} does not prove that it is this holder ({error})"))
                }
                Ok(Err(error)) => Failure::Lost(format!("{addr}: {error}")),
                Err(_) => Failure::Lost(format!("{addr}: no answer in {} s", CONNECT_MAX.as_secs())),
            },
            Err(error) => Failure::Useless(format!("{addr}: {error}")),
        };
    }
    Err(failure)
}

/// QUIC reports TLS alerts as transport errors from 0x100 to 0x1ff (RFC 9001, section 4.8).
fn is_tls_refusal(error: &quinn::ConnectionError) -> bool {
    let code = match error {
        quinn::ConnectionError::TransportError(error) => u64::from(error.code),
        quinn::ConnectionError::ConnectionClosed(close) => u64::from(close.error_code),
        _ => return false,
    };
    (0x100..0x200).contains(&code)
}

async fn ask(connection: &Connection, request: &Request) -> Result<(SendStream, RecvStream), StreamError> {
    let (mut send, recv) = connection.open_bi().await?;
    wire::write_request(&mut send, request).await?;
    Ok((send, recv))
}

/// Asks and waits for an answer that is only a status.
async fn ask_status(connection: &Connection, request: &Request) -> Result<(Status, String), StreamError> {
    let (mut send, mut recv) = ask(connection, request).await?;
    drop(send.finish());
    wire::read_status(&mut recv).await
}

pub(super) async fn has(
    inner: &Inner,
    artifact: ArtifactRef,
    holder: &Holder,
) -> Result<bool, TransferError> {
    let lost = |why| TransferError::Lost {
        holder: holder.key.short(),
        artifact,
        why,
    };
    let connection = match connect(inner, holder).await {
        Ok(connection) => connection,
        Err(Failure::Lost(why) | Failure::Useless(why)) => return Err(lost(why)),
        Err(Failure::Local(error)) => return Err(error.into()),
        Err(Failure::Reconnect) => return Err(lost("it wants a new connection".into())),
    };
    match ask_status(&connection, &Request::Has(artifact)).await {
        Ok((Status::Ok, _)) => Ok(true),
        Ok((Status::Missing, _)) => Ok(false),
        Ok((_, why)) => Err(declined(holder, artifact, why)),
        Err(StreamError::Lost(why)) => Err(lost(why)),
        Err(StreamError::Malformed(why)) => Err(lost(why.into())),
    }
}

fn declined(holder: &Holder, artifact: ArtifactRef, why: String) -> TransferError {
    TransferError::Declined {
        holder: holder.key.short(),
        artifact,
        why,
    }
}

/// Counts and tells.
struct Watch {
    done: AtomicU64,
    moved: AtomicU64,
    total: AtomicU64,
    tell: OnProgress,
}

impl Watch {
    fn new(tell: OnProgress) -> Self {
        Self {
            done: AtomicU64::new(0),
            moved: AtomicU64::new(0),
            total: AtomicU64::new(0),
            tell,
        }
    }

    fn add(&self, done: u64, moved: u64) {
        let done = self.done.fetch_add(done, Ordering::Relaxed) + done;
        let moved = self.moved.fetch_add(moved, Ordering::Relaxed) + moved;
        (self.tell)(Progress {
            done: Bytes(done),
            total: Bytes(self.total.load(Ordering::Relaxed)),
            moved: Bytes(moved),
        });
    }
}

pub(super) async fn fetch(
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
        ArtifactKind::Blob => VecDeque::from([(artifact.digest, artifact.bytes.0)]),
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

/// The holders of one fetch and how they have done so far.
struct Pool {
    inner: Arc<Inner>,
    slots: Vec<Arc<Slot>>,
}

struct Slot {
    holder: Holder,
    state: Mutex<SlotState>,
    connection: tokio::sync::Mutex<Option<Connection>>,
}

struct SlotState {
    /// Why it is out of the game.
    useless: Option<String>,
    losses: u32,
    retry_at: Instant,
    busy: usize,
    /// The connection whose end was counted last.
    ended: Option<usize>,
}

/// One worker's use of one holder.
struct Turn {
    slot: Arc<Slot>,
    connection: Connection,
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.slot.state().busy -= 1;
    }
}

impl Pool {
    fn new(inner: Arc<Inner>, holders: &[Holder]) -> Self {
        let slot = |holder: &Holder| {
            Arc::new(Slot {
                holder: holder.clone(),
                state: Mutex::new(SlotState {
                    useless: None,
                    losses: 0,
                    retry_at: Instant::now(),
                    busy: 0,
                    ended: None,
                }),
                connection: tokio::sync::Mutex::default(),
            })
        };
        Self {
            inner,
            slots: holders.iter().map(slot).collect(),
        }
    }

    /// The least busy holder that may still help, connected. Waits where all of them were just lost.
    async fn turn(&self, artifact: ArtifactRef) -> Result<Turn, TransferError> {
        loop {
            let now = Instant::now();
            let useful = self.slots.iter().filter(|slot| slot.state().useless.is_none());
            let Some(slot) = useful.min_by_key(|slot| {
                let state = slot.state();
                (state.retry_at.max(now), state.busy)
            }) else {
                return Err(TransferError::NoHolder {
                    artifact,
                    tried: self.tried(),
                });
            };
            let retry_at = slot.state().retry_at;
            if retry_at > now {
                sleep_until(retry_at).await;
                continue;
            }
            let mut current = slot.connection.lock().await;
            if current.as_ref().is_none_or(|c| c.close_reason().is_some()) {
                // Another worker may have failed to connect while this one waited.
                if slot.state().retry_at > Instant::now() || slot.state().useless.is_some() {
                    continue;
                }
                match connect(&self.inner, &slot.holder).await {
                    Ok(connection) => *current = Some(connection),
                    Err(failure) => {
                        *current = None;
                        match failure {
                            Failure::Useless(why) => slot.leave(why),
                            Failure::Lost(why) => slot.lost(why),
                            Failure::Local(error) => return Err(error.into()),
                            Failure::Reconnect => {}
                        }
                        continue;
                    }
                }
            }
            if let Some(connection) = current.clone() {
                slot.state().busy += 1;
                return Ok(Turn {
                    slot: slot.clone(),
                    connection,
                });
            }
        }
    }

    fn tried(&self) -> String {
        if self.slots.is_empty() {
            return "no holder is known".into();
        }
        let each = self.slots.iter().map(|slot| {
            let why = slot.state().useless.clone().unwrap_or_default();
            format!("{}: {why}", slot.holder.key.short())
        });
        each.collect::<Vec<_>>().join("; ")
    }
}

impl Slot {
    fn state(&self) -> MutexGuard<'_, SlotState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn progressed(&self) {
        self.state().losses = 0;
    }

    fn lost(&self, why: String) {
        let mut state = self.state();
        state.losses += 1;
        state.retry_at = Instant::now() + FIRST_RETRY * 2u32.saturating_pow(state.losses - 1);
        if state.losses >= LOSSES_MAX {
            state.useless = Some(why);
        }
    }

    fn leave(&self, why: String) {
        tracing::warn!(holder = %self.holder.key.short(), why, "holder left");
        self.state().useless = Some(why);
    }
}

impl Turn {
    /// Notes how it went. `None` means: take another turn.
    fn settle<T>(self, result: Result<T, Failure>) -> Result<Option<T>, TransferError> {
        match result {
            Ok(value) => {
                self.slot.progressed();
                return Ok(Some(value));
            }
            Err(Failure::Local(error)) => return Err(error.into()),
            Err(Failure::Useless(why)) => self.slot.leave(why),
            Err(Failure::Reconnect) => self.connection.close(0u32.into(), b"reconnect"),
            Err(Failure::Lost(why)) => {
                self.connection.close(0u32.into(), b"stalled");
                // All streams of a connection are lost at once; that counts once.
                let id = Some(self.connection.stable_id());
                let first = std::mem::replace(&mut self.slot.state().ended, id) != id;
                if first {
                    self.slot.lost(why);
                }
            }
        }
        Ok(None)
    }
}

pub(super) async fn push(
    inner: &Arc<Inner>,
    artifact: ArtifactRef,
    to: &Holder,
    progress: OnProgress,
) -> Result<(), TransferError> {
    let pin = inner.store.pin(&artifact)?;
    let files: Vec<(Digest, u64)> = match artifact.kind {
        ArtifactKind::Blob => vec![(artifact.digest, artifact.bytes.0)],
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
            Ok(connection) => match push_over(inner, &connection, artifact, &files, &watch).await {
                Ok(()) => break,
                Err(failure) => failure,
            },
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

/// Content bytes of some blocks of a file.
fn span_bytes(bytes: u64, blocks: &Range<u64>) -> u64 {
    let end = blocks.end.saturating_mul(BLOCK_BYTES).min(bytes);
    end.saturating_sub(blocks.start.saturating_mul(BLOCK_BYTES))
}
