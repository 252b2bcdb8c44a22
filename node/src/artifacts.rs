//! The node's artifacts: what it holds, whom it serves, and bringing more here.
//!
//! The store and the wire are `karez-net`'s; here is the owner's side of it: schedulers may read everything (they
//! placed it), anybody else only models, and nobody may leave anything here.
use karez_core::{
    artifact::{ArtifactKind, ArtifactRef},
    exchange,
    id::Digest,
    key::{PublicKey, SchedulerId, SecretKey},
    records::OFFER_CACHED_MAX,
    unit::Bytes,
};
use karez_net::{
    store::{ArtifactStore, Pin, StoreError},
    transfer::{Holder, Op, TransferError, TransferPolicy, Transfers},
};
use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr, UdpSocket},
    path::{Path, PathBuf},
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
};

/// Models remembered as such; the store rarely has room for more.
const MODELS_MAX: usize = 4096;

/// A model in the form of files; it stays in the store, and the files where they are, while this lives.
#[derive(Debug)]
pub(crate) struct Model {
    pub(crate) path: PathBuf,
    _view: Option<View>,
    _pin: Pin,
}

/// A directory of links, gone when dropped.
#[derive(Debug)]
struct View(PathBuf);

impl Drop for View {
    fn drop(&mut self) {
        // A few links; what remains is swept at the next start.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Store and transfers. Clones share them.
#[derive(Clone)]
pub(crate) struct Artifacts {
    store: ArtifactStore,
    transfers: Transfers,
    models: Arc<RwLock<BTreeSet<Digest>>>,
    /// Who may read everything.
    schedulers: Arc<RwLock<BTreeSet<SchedulerId>>>,
}

impl Artifacts {
    /// Serves `store` at `listen`. `models` are the digests that anybody may read; see also [`Artifacts::trust`].
    pub(crate) fn serve(
        store: ArtifactStore,
        listen: SocketAddr,
        secret: &SecretKey,
        models: BTreeSet<Digest>,
    ) -> Result<Self, TransferError> {
        let models = Arc::new(RwLock::new(models));
        let known = models.clone();
        let schedulers = Arc::new(RwLock::new(BTreeSet::new()));
        let trusted = schedulers.clone();
        let policy: TransferPolicy = Arc::new(move |who, op| match op {
            Op::Put(_) => false,
            Op::Get(artifact) | Op::Has(artifact) => {
                trusted
                    .read()
                    .unwrap_or_else(PoisonError::into_inner)
                    .contains(&SchedulerId(*who))
                    || known
                        .read()
                        .unwrap_or_else(PoisonError::into_inner)
                        .contains(&artifact.digest)
            }
        });
        let transfers = Transfers::bind(listen, secret, store.clone(), policy)?;
        Ok(Self {
            store,
            transfers,
            models,
            schedulers,
        })
    }

    /// This scheduler may read everything from now on.
    pub(crate) fn trust(&self, scheduler: SchedulerId) {
        let mut schedulers = self.schedulers.write().unwrap_or_else(PoisonError::into_inner);
        schedulers.insert(scheduler);
    }

    pub(crate) fn store(&self) -> &ArtifactStore {
        &self.store
    }

    /// Anybody may read this one from now on. False when that was known.
    pub(crate) fn is_model(&self, artifact: &ArtifactRef) -> bool {
        let mut models = self.models.write().unwrap_or_else(PoisonError::into_inner);
        models.len() < MODELS_MAX && models.insert(artifact.digest)
    }

    /// The models here, most recently used first: what an offer names.
    pub(crate) async fn cached(&self) -> Vec<Digest> {
        let this = self.clone();
        let listed = tokio::task::spawn_blocking(move || {
            let models = this.models.read().unwrap_or_else(PoisonError::into_inner);
            let here = this
                .store
                .list()
                .into_iter()
                .filter(|s| s.complete)
                .map(|s| s.artifact.digest);
            here.filter(|digest| models.contains(digest))
                .take(OFFER_CACHED_MAX)
                .collect()
        });
        listed.await.unwrap_or_default()
    }

    /// Where the artifacts are served, as others may reach it: what the owner set, or else the address from which
    /// packets to the schedulers leave.
    pub(crate) async fn addrs(&self, set: &[String], towards: &[String]) -> Vec<String> {
        if !set.is_empty() {
            return set.to_vec();
        }
        let here = self.transfers.local_addr();
        if !here.ip().is_unspecified() {
            return vec![here.to_string()];
        }
        let mut out: Vec<String> = Vec::new();
        for scheduler in towards {
            let Ok(mut found) = tokio::net::lookup_host(scheduler.as_str()).await else {
                continue;
            };
            let from = found
                .find_map(source_towards)
                .map(|ip| SocketAddr::new(ip, here.port()).to_string());
            if let Some(addr) = from.filter(|addr| !out.contains(addr) && out.len() < 8) {
                out.push(addr);
            }
        }
        out
    }

    /// Brings artifacts here and pins them; says how many bytes crossed the network.
    pub(crate) async fn fetch(
        &self,
        artifacts: &[ArtifactRef],
        holders: &[exchange::Holder],
    ) -> Result<(Vec<Pin>, Bytes), TransferError> {
        if artifacts.is_empty() {
            return Ok((Vec::new(), Bytes::ZERO));
        }
        let mut found = Vec::with_capacity(holders.len());
        for holder in holders {
            found.push(Holder {
                key: holder.key,
                addrs: resolve(&holder.addrs).await,
            });
        }
        let moved = Arc::new(AtomicU64::new(0));
        let count = moved.clone();
        let progress = Arc::new(move |p: karez_net::transfer::Progress| {
            count.fetch_max(p.moved.0, Ordering::Relaxed);
        });
        let pins = self.transfers.fetch(artifacts, &found, progress).await?;
        Ok((pins, Bytes(moved.load(Ordering::Relaxed))))
    }

    /// Brings an artifact to `to`.
    pub(crate) async fn push(
        &self,
        artifact: ArtifactRef,
        to: PublicKey,
        addrs: &[String],
    ) -> Result<(), TransferError> {
        let to = Holder {
            key: to,
            addrs: resolve(addrs).await,
        };
        self.transfers.push(artifact, &to, Arc::new(|_| {})).await
    }

    /// Keeps it from eviction.
    pub(crate) async fn pin(&self, artifact: &ArtifactRef) -> Result<Pin, String> {
        let (store, artifact) = (self.store.clone(), *artifact);
        blocking(move || store.pin(&artifact)).await
    }

    /// Its file.
    pub(crate) async fn path(&self, artifact: &ArtifactRef) -> Result<PathBuf, String> {
        let (store, artifact) = (self.store.clone(), *artifact);
        blocking(move || store.path(&artifact)).await
    }

    /// A model as an engine can open it: the file itself, or a directory of its files under `scratch`.
    pub(crate) async fn model(&self, artifact: &ArtifactRef, scratch: &Path) -> Result<Model, String> {
        let (store, artifact) = (self.store.clone(), *artifact);
        let name = format!(
            "model-{}-{:016x}",
            artifact.digest.short(),
            getrandom::u64().unwrap_or_default()
        );
        let view = scratch.join(name);
        blocking(move || {
            let pin = store.pin(&artifact)?;
            let (path, view) = match artifact.kind {
                ArtifactKind::Blob | ArtifactKind::Served => (store.path(&artifact)?, None),
                ArtifactKind::Tree => {
                    // Removed by its guard even when linking stops half-way.
                    let guard = View(view);
                    store.link(&artifact, &guard.0)?;
                    (guard.0.clone(), Some(guard))
                }
            };
            Ok::<_, StoreError>(Model {
                path,
                _view: view,
                _pin: pin,
            })
        })
        .await
    }

    /// Says goodbye to everyone.
    pub(crate) async fn close(&self) {
        self.transfers.close().await;
    }
}

async fn blocking<T: Send + 'static, E: ToString + Send + 'static>(
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, String> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done.map_err(|error| error.to_string()),
        Err(_) => Err("the artifact store failed".into()),
    }
}

/// The socket addresses behind `host:port`s; those that cannot be found are left out.
async fn resolve(addrs: &[String]) -> Vec<SocketAddr> {
    let mut out = Vec::new();
    for addr in addrs {
        if let Ok(addr) = addr.parse() {
            out.push(addr);
        } else if let Ok(found) = tokio::net::lookup_host(addr.as_str()).await {
            out.extend(found.take(4));
        }
    }
    out
}

/// The local address that the system would send from. Nothing is sent.
fn source_towards(to: SocketAddr) -> Option<IpAddr> {
    let any: SocketAddr = if to.is_ipv4() {
        ([0, 0, 0, 0], 0).into()
    } else {
        ([0u16; 8], 0).into()
    };
    let socket = UdpSocket::bind(any).ok()?;
    socket.connect(to).ok()?;
    socket
        .local_addr()
        .ok()
        .map(|addr| addr.ip())
        .filter(|ip| !ip.is_unspecified())
}

/// `addrs` as one may dial them: where a scheduler names no host, the host is the one its control API was dialled at.
pub(crate) fn at_host(addrs: &[String], control_addr: &str) -> Vec<String> {
    let host = control_addr
        .rsplit_once(':')
        .map_or(control_addr, |(host, _)| host);
    let dialled = |addr: &String| match addr.parse::<SocketAddr>() {
        Ok(found) if found.ip().is_unspecified() => format!("{host}:{}", found.port()),
        _ => addr.clone(),
    };
    addrs.iter().map(dialled).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_without_a_host_is_at_the_control_host() {
        let addrs = [
            "0.0.0.0:7402".to_owned(),
            "192.0.2.1:7402".into(),
            "[::]:7402".into(),
            "a.example:1".into(),
        ];
        assert_eq!(
            at_host(&addrs, "karez.example:7400"),
            [
                "karez.example:7402",
                "192.0.2.1:7402",
                "karez.example:7402",
                "a.example:1"
            ]
        );
        assert_eq!(
            source_towards(([127, 0, 0, 1], 9).into()),
            Some(IpAddr::from([127, 0, 0, 1]))
        );
    }
}
