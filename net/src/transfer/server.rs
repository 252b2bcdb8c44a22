//! The serving side: one task for each connection, one for each request.
use super::{
    INCOMING_MAX, LossyPaths, Op, TransferPolicy,
    flow::{self, Expected, ReceiveError},
    wire::{self, RUNS_MAX, Request, Status, StreamError},
};
use crate::{
    store::{ArtifactStore, MANIFEST_MAX, Pin, SMALL_BYTES, StoreError},
    tls,
    verified::blocks_of,
};
use karez_core::{
    artifact::{ArtifactKind, ArtifactRef},
    id::Digest,
    key::PublicKey,
};
use quinn::{Connection, Endpoint, Incoming, RecvStream, SendStream};
use rustls::pki_types::CertificateDer;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{sync::Semaphore, task::spawn_blocking, time::timeout};

/// Artifacts that one connection may be leaving here at one time.
const PUTS_MAX: usize = 16;
/// How long a connection may do nothing where many are open.
const CROWDED_IDLE: Duration = Duration::from_secs(1);
/// Blocks in one run of a put's missing list: 16 MiB.
const PUT_RUN_BLOCKS: u64 = 64;

pub(super) struct Server {
    pub(super) store: ArtifactStore,
    pub(super) policy: TransferPolicy,
    pub(super) lossy: Arc<LossyPaths>,
    /// For paths known to lose packets.
    pub(super) careful: Arc<quinn::ServerConfig>,
}

impl Server {
    pub(super) async fn run(self, endpoint: Endpoint) {
        let server = Arc::new(self);
        let open = Arc::new(Semaphore::new(INCOMING_MAX));
        while let Some(incoming) = endpoint.accept().await {
            let Ok(permit) = open.clone().try_acquire_owned() else {
                incoming.refuse();
                continue;
            };
            // Under pressure, callers first prove that they are where they say.
            if open.available_permits() < INCOMING_MAX / 2
                && !incoming.remote_address_validated()
                && incoming.may_retry()
            {
                drop(incoming.retry());
                continue;
            }
            let (server, pressed) = (server.clone(), open.clone());
            tokio::spawn(async move {
                let from = incoming.remote_address();
                let crowded = || pressed.available_permits() < INCOMING_MAX / 2;
                if let Err(why) = server.connection(incoming, crowded).await {
                    tracing::debug!(%from, why, "transfer connection ended");
                }
                drop(permit);
            });
        }
    }

    async fn connection(
        self: Arc<Self>,
        incoming: Incoming,
        crowded: impl Fn() -> bool,
    ) -> Result<(), String> {
        let text = |e: &dyn std::fmt::Display| e.to_string();
        let connecting = if self.lossy.contains(incoming.remote_address().ip()) {
            incoming.accept_with(self.careful.clone())
        } else {
            incoming.accept()
        }
        .map_err(|e| text(&e))?;
        let connection = timeout(super::CONNECT_MAX, connecting)
            .await
            .map_err(|e| text(&e))?
            .map_err(|e| text(&e))?;
        let key = connection
            .peer_identity()
            .and_then(|id| id.downcast::<Vec<CertificateDer<'static>>>().ok())
            .ok_or("no key")?;
        let session = Arc::new(Session {
            peer: tls::peer_key(&key).map_err(|e| text(&e))?,
            connection: connection.clone(),
            puts: Mutex::default(),
            server: self,
        });
        loop {
            let (send, recv) = match timeout(CROWDED_IDLE, connection.accept_bi()).await {
                Ok(stream) => stream.map_err(|e| text(&e))?,
                // Callers keep connections for their next transfer, while there are enough.
                Err(_) if Arc::strong_count(&session) == 1 && crowded() => {
                    connection.close(0u32.into(), b"idle");
                    return Ok(());
                }
                Err(_) => continue,
            };
            let session = session.clone();
            // QUIC bounds the streams of a connection, so it bounds these tasks.
            tokio::spawn(async move {
                let (mut send, mut recv) = (send, recv);
                if let Err(error) = session.stream(&mut send, &mut recv).await {
                    tracing::debug!(peer = %session.peer.short(), ?error, "transfer stream ended");
                    drop(send.reset(1u32.into()));
                    drop(recv.stop(1u32.into()));
                } else {
                    drop(send.finish());
                }
            });
        }
    }
}

/// One peer's connection.
struct Session {
    peer: PublicKey,
    connection: Connection,
    puts: Mutex<HashMap<ArtifactRef, Put>>,
    server: Arc<Server>,
}

/// An artifact on its way in. Held while the connection lasts; what arrived stays as long as there is room.
#[derive(Clone)]
struct Put {
    pin: Arc<Pin>,
    /// The files of the artifact; of a tree only once its manifest is here.
    files: Option<Arc<HashMap<Digest, u64>>>,
}

/// Why a request is refused: the status and the reason that travels.
struct Refusal(Status, String);

fn refuse<T>(status: Status, reason: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal(status, reason.into()))
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        let status = match &error {
            StoreError::Full { .. } | StoreError::DiskFull { .. } => Status::Full,
            StoreError::Missing { .. } => Status::Missing,
            StoreError::Manifest(_) | StoreError::Contradiction { .. } => Status::Malformed,
            _ => {
                // Paths and disk errors are for our own log.
                tracing::error!(%error, "transfer");
                return Self(Status::Failed, "its disk failed".into());
            }
        };
        Self(status, error.to_string())
    }
}

impl Session {
    fn puts(&self) -> MutexGuard<'_, HashMap<ArtifactRef, Put>> {
        self.puts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn stream(&self, send: &mut SendStream, recv: &mut RecvStream) -> Result<(), StreamError> {
        let request = wire::read_request(recv).await?;
        let refused = match request {
            Request::Has(artifact) => self.has(artifact),
            Request::Get {
                artifact,
                digest,
                blocks,
            } => match self.get(artifact, digest).await {
                Ok(served) => {
                    wire::write_status(send, Status::Ok, "").await?;
                    wire::write_slice(send, &served.bytes.to_be_bytes()).await?;
                    return flow::send_blocks(send, served, blocks).await;
                }
                Err(refusal) => Err(refusal),
            },
            Request::PutBegin(artifact) => self.put_begin(artifact).await,
            Request::PutFile {
                artifact,
                digest,
                bytes,
            } => match self.put_file(artifact, digest, bytes).await {
                Ok(runs) => {
                    wire::write_status(send, Status::Ok, "").await?;
                    let mut out = Vec::with_capacity(8 + runs.len() * 16);
                    out.extend_from_slice(&(runs.len() as u64).to_be_bytes());
                    for run in runs {
                        out.extend_from_slice(&run.start.to_be_bytes());
                        out.extend_from_slice(&run.end.to_be_bytes());
                    }
                    return wire::write_full(send, out.into()).await;
                }
                Err(refusal) => Err(refusal),
            },
            Request::PutBlocks {
                artifact,
                digest,
                bytes,
                blocks,
            } => {
                self.put_blocks(
                    recv,
                    artifact,
                    Expected {
                        digest,
                        bytes,
                        blocks,
                    },
                )
                .await?
            }
            Request::PutEnd(artifact) => self.put_end(artifact).await,
        };
        let Refusal(status, reason) = refused.err().unwrap_or(Refusal(Status::Ok, String::new()));
        wire::write_status(send, status, &reason).await
    }

    fn allow(&self, op: Op) -> Result<(), Refusal> {
        if (self.server.policy)(&self.peer, op) {
            Ok(())
        } else {
            refuse(Status::Denied, "its owner does not allow that to this key")
        }
    }

    fn has(&self, artifact: ArtifactRef) -> Result<(), Refusal> {
        self.allow(Op::Has(artifact))?;
        if self.server.store.contains(&artifact) {
            Ok(())
        } else {
            refuse(Status::Missing, "it is not there")
        }
    }

    async fn get(&self, artifact: ArtifactRef, digest: Digest) -> Result<crate::store::Served, Refusal> {
        self.allow(Op::Get(artifact))?;
        if self.server.lossy.judge(&self.connection) {
            return refuse(Status::Reconnect, "the path loses packets");
        }
        let store = self.server.store.clone();
        self.blocking(move || store.serve(&artifact, &digest)).await
    }

    async fn put_begin(&self, artifact: ArtifactRef) -> Result<(), Refusal> {
        self.allow(Op::Put(artifact))?;
        let store = self.server.store.clone();
        if store.contains(&artifact) {
            return refuse(Status::Already, "it is there");
        }
        if artifact.bytes > store.limit() {
            return refuse(Status::Full, "it is larger than the whole store");
        }
        {
            let puts = self.puts();
            if puts.contains_key(&artifact) {
                return Ok(());
            }
            if puts.len() >= PUTS_MAX {
                return refuse(Status::Full, "too many artifacts at once");
            }
        }
        let pin = self.blocking(move || store.begin(&artifact)).await?;
        let files = match artifact.kind {
            ArtifactKind::Blob | ArtifactKind::Served => {
                Some(Arc::new(HashMap::from([(artifact.digest, artifact.bytes.0)])))
            }
            ArtifactKind::Tree => None,
        };
        let pin = Arc::new(pin);
        self.puts().insert(artifact, Put { pin, files });
        Ok(())
    }

    /// The put under way that this file belongs to, if it may come now.
    fn put_of(&self, artifact: &ArtifactRef, digest: &Digest, bytes: u64) -> Result<Put, Refusal> {
        let Some(put) = self.puts().get(artifact).cloned() else {
            return refuse(Status::Malformed, "nothing was begun for that");
        };
        let known = match &put.files {
            Some(files) => files.get(digest) == Some(&bytes),
            None => false,
        };
        let manifest =
            artifact.kind == ArtifactKind::Tree && *digest == artifact.digest && bytes <= MANIFEST_MAX;
        if known || manifest {
            Ok(put)
        } else {
            refuse(Status::Malformed, "that file is not part of the artifact")
        }
    }

    async fn put_file(
        &self,
        artifact: ArtifactRef,
        digest: Digest,
        bytes: u64,
    ) -> Result<Vec<std::ops::Range<u64>>, Refusal> {
        let put = self.put_of(&artifact, &digest, bytes)?;
        let store = self.server.store.clone();
        if store.blob_bytes(&digest) == Some(bytes) {
            if put.files.is_none() {
                self.adopt(put).await?;
            }
            return Ok(Vec::new());
        }
        if bytes <= SMALL_BYTES {
            return Ok(std::iter::once(0..blocks_of(bytes)).collect());
        }
        let partial = self.blocking(move || store.partial(&digest, bytes)).await?;
        let mut runs = partial.missing(0..u64::MAX, PUT_RUN_BLOCKS);
        runs.truncate(RUNS_MAX as usize);
        Ok(runs)
    }

    async fn put_blocks(
        &self,
        recv: &mut RecvStream,
        artifact: ArtifactRef,
        expected: Expected,
    ) -> Result<Result<(), Refusal>, StreamError> {
        let (digest, bytes) = (expected.digest, expected.bytes);
        let put = match self.put_of(&artifact, &digest, bytes) {
            Ok(put) => put,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let kept = self.keep(recv, &put, expected).await;
        match kept {
            Ok(()) => Ok(Ok(())),
            Err(ReceiveError::Stream(error)) => Err(error),
            Err(ReceiveError::Mismatch { at }) => Ok(refuse(
                Status::Mismatch,
                format!("the bytes near {at} do not match {}", digest.short()),
            )),
            Err(ReceiveError::Store(error)) => Ok(Err(error.into())),
        }
    }

    async fn keep(&self, recv: &mut RecvStream, put: &Put, expected: Expected) -> Result<(), ReceiveError> {
        let (digest, bytes) = (expected.digest, expected.bytes);
        let store = self.server.store.clone();
        if bytes <= SMALL_BYTES {
            let content = flow::receive_whole(recv, digest, bytes).await?;
            store_blocking(move || store.keep_verified(&digest, &content)).await?;
        } else {
            let opening = store.clone();
            let partial = store_blocking(move || opening.partial(&digest, bytes)).await?;
            let received = flow::receive_blocks(recv, &partial, expected, &|_| {}).await;
            store_blocking(move || {
                if partial.is_complete() {
                    store.finish(&partial)
                } else if received.is_err() {
                    partial.save()
                } else {
                    Ok(())
                }
                .map(|()| received)
            })
            .await??;
        }
        if put.files.is_none() && self.server.store.blob_bytes(&digest).is_some() {
            self.adopt_now(put.clone()).await?;
        }
        Ok(())
    }

    async fn adopt(&self, put: Put) -> Result<(), Refusal> {
        self.adopt_now(put).await.map_err(|error| match error {
            ReceiveError::Store(error) => error.into(),
            _ => Refusal(Status::Failed, "its disk failed".into()),
        })
    }

    /// The manifest is here: from now on the tree's files may come.
    async fn adopt_now(&self, put: Put) -> Result<(), ReceiveError> {
        let (store, pin) = (self.server.store.clone(), put.pin.clone());
        let manifest = store_blocking(move || store.adopt_manifest(&pin)).await?;
        let mut files: HashMap<_, _> = manifest
            .entries()
            .iter()
            .map(|entry| (entry.digest, entry.bytes.0))
            .collect();
        let artifact = put.pin.artifact();
        if let Some(bytes) = self.server.store.blob_bytes(&artifact.digest) {
            files.insert(artifact.digest, bytes);
        }
        if let Some(put) = self.puts().get_mut(&artifact) {
            put.files = Some(Arc::new(files));
        }
        Ok(())
    }

    async fn put_end(&self, artifact: ArtifactRef) -> Result<(), Refusal> {
        let Some(put) = self.puts().get(&artifact).cloned() else {
            return refuse(Status::Malformed, "nothing was begun for that");
        };
        let store = self.server.store.clone();
        let pin = put.pin.clone();
        self.blocking(move || store.complete(&pin)).await?;
        self.puts().remove(&artifact);
        Ok(())
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, Refusal> {
        match spawn_blocking(work).await {
            Ok(result) => Ok(result?),
            Err(_) => refuse(Status::Failed, "it is shutting down"),
        }
    }
}

async fn store_blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, ReceiveError> {
    match spawn_blocking(work).await {
        Ok(result) => result.map_err(ReceiveError::Store),
        Err(error) => Err(ReceiveError::Stream(StreamError::Lost(error.to_string()))),
    }
}
