//! Artifact transfer over QUIC (`karez/artifact/1`): verified as it streams, resumable, from several holders.
//!
//! [`Transfers`] is the one endpoint of a process: it serves the local [`ArtifactStore`] to whom the policy allows,
//! and fetches from and pushes to others. Nothing is kept before its hash was checked; what was checked stays, so a
//! transfer that was cut goes on where it was. A stream may be as slow as it likes; only one on which nothing at all
//! moves for [`IDLE_MAX`] is given up.
//!
//! Not here: who holds what, and who may have it.
mod client;
mod flow;
mod server;
mod wire;

use crate::{
    store::{ArtifactStore, Pin, StoreError},
    tls,
};
use karez_core::{
    artifact::ArtifactRef,
    key::{PublicKey, SecretKey},
    unit::Bytes,
};
use std::{
    collections::HashMap,
    fmt, io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// A stream on which nothing moves for this long is given up; slowness alone is no fault.
pub const IDLE_MAX: Duration = Duration::from_secs(30);
/// Streams of one transfer at a time, over all holders.
const STREAMS: usize = 8;
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 32 << 20;
const SOCKET_BUFFER: usize = 8 << 20;
/// Connections that others opened, at one time; further ones are refused.
const INCOMING_MAX: usize = 512;
const ADDRS_MAX: usize = 8;
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// A path is lossy when more than one packet in this many was lost, over at least [`JUDGED_PACKETS`].
const LOSSY_ONE_IN: u64 = 200;
const JUDGED_PACKETS: u64 = 2000;
const LOSSY_REMEMBERED: Duration = Duration::from_secs(3600);
const LOSSY_PATHS_MAX: usize = 4096;

/// What a peer asks of this party.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// To read this artifact.
    Get(ArtifactRef),
    /// To leave this artifact here.
    Put(ArtifactRef),
    /// To know whether this artifact is here.
    Has(ArtifactRef),
}

/// Who may do what. Asked at every request; must not block.
pub type TransferPolicy = Arc<dyn Fn(&PublicKey, Op) -> bool + Send + Sync>;

/// A party that may hold an artifact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Its key.
    pub key: PublicKey,
    /// Where it may be reached over UDP, best first; at most eight are tried.
    pub addrs: Vec<SocketAddr>,
}

/// How far a transfer has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Content that is where it should be, including what was there before.
    pub done: Bytes,
    /// All content.
    pub total: Bytes,
    /// Content that crossed the network in this call.
    pub moved: Bytes,
}

/// Called after each verified block of 256 KiB or file; must not block.
pub type OnProgress = Arc<dyn Fn(Progress) + Send + Sync>;

/// For callers who do not watch.
pub fn unwatched() -> OnProgress {
    Arc::new(|_| {})
}

/// Why a transfer failed.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// The UDP socket could not be opened.
    #[error("cannot listen for transfers on {addr}: {error}")]
    Bind {
        /// Where.
        addr: SocketAddr,
        /// What happened.
        error: io::Error,
    },
    /// The local store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// No holder could give it. What arrived is kept for the next attempt.
    #[error(
        "{artifact} could not be fetched: {tried}; what arrived is kept, try again or name another holder"
    )]
    NoHolder {
        /// What.
        artifact: ArtifactRef,
        /// Each holder and why it failed.
        tried: String,
    },
    /// The receiver does not want it or has no room.
    #[error("{holder} declined {artifact}: {why}")]
    Declined {
        /// Who, shortened.
        holder: String,
        /// What.
        artifact: ArtifactRef,
        /// Its words.
        why: String,
    },
    /// The other end cannot be reached or was lost. What arrived is kept for the next attempt.
    #[error("lost {holder} while moving {artifact} ({why}): what arrived is kept, try again")]
    Lost {
        /// Who, shortened.
        holder: String,
        /// What.
        artifact: ArtifactRef,
        /// What happened.
        why: String,
    },
}

/// The one endpoint of a process: serves its store, fetches and pushes. Clones share it.
#[derive(Clone)]
pub struct Transfers {
    inner: Arc<Inner>,
}

struct Inner {
    endpoint: quinn::Endpoint,
    addr: SocketAddr,
    secret: SecretKey,
    store: ArtifactStore,
    lossy: Arc<LossyPaths>,
    open: client::OpenConnections,
}

impl Drop for Inner {
    /// The accept loop holds the endpoint too; without this it would serve on after the last handle is gone.
    fn drop(&mut self) {
        self.endpoint.close(0u32.into(), b"closing");
    }
}

impl fmt::Debug for Transfers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Transfers({})", self.inner.addr)
    }
}

impl Transfers {
    /// Binds the UDP socket and starts to serve. Must be called inside a tokio runtime.
    pub fn bind(
        addr: SocketAddr,
        secret: &SecretKey,
        store: ArtifactStore,
        policy: TransferPolicy,
    ) -> Result<Self, TransferError> {
        let fail = |error| TransferError::Bind { addr, error };
        let socket = socket(addr).map_err(fail)?;
        let endpoint = quinn::Endpoint::new(
            quinn::EndpointConfig::new(Arc::new(ResetKey::of(secret))),
            Some(server_config(secret, false).map_err(fail)?),
            socket,
            Arc::new(quinn::TokioRuntime),
        )
        .map_err(fail)?;
        let careful = server_config(secret, true).map_err(fail)?;
        let lossy = Arc::new(LossyPaths::default());
        let server = server::Server {
            store: store.clone(),
            policy,
            lossy: lossy.clone(),
            careful: Arc::new(careful),
        };
        tokio::spawn(server.run(endpoint.clone()));
        let addr = endpoint.local_addr().map_err(fail)?;
        let inner = Inner {
            endpoint,
            addr,
            secret: secret.clone(),
            store,
            lossy,
            open: client::OpenConnections::default(),
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.inner.addr
    }

    /// The store it serves and fills.
    pub fn store(&self) -> &ArtifactStore {
        &self.inner.store
    }

    /// Brings artifacts here from whoever of `holders` has them, and returns them pinned, in the same order.
    ///
    /// Uses several streams over all holders at once; a holder that fails, lacks a file or sends bytes that do not
    /// match is left and the others go on. May be dropped at any time: what arrived is kept, and the next call
    /// fetches only the rest.
    pub async fn fetch(
        &self,
        artifacts: &[ArtifactRef],
        holders: &[Holder],
        progress: OnProgress,
    ) -> Result<Vec<Pin>, TransferError> {
        client::fetch(&self.inner, artifacts, holders, progress).await
    }

    /// Brings an artifact of the own store to `to`, which must agree. Only what it lacks is sent.
    pub async fn push(
        &self,
        artifact: ArtifactRef,
        to: &Holder,
        progress: OnProgress,
    ) -> Result<(), TransferError> {
        client::push(&self.inner, artifact, to, progress).await
    }

    /// Whether `holder` has all of it.
    pub async fn has(&self, artifact: ArtifactRef, holder: &Holder) -> Result<bool, TransferError> {
        client::has(&self.inner, artifact, holder).await
    }

    /// Says goodbye to everyone and stops serving. Dropping the last handle does the same without waiting.
    pub async fn close(&self) {
        self.inner.endpoint.close(0u32.into(), b"closing");
        // Peers that do not answer hold nobody up.
        drop(tokio::time::timeout(Duration::from_secs(2), self.inner.endpoint.wait_idle()).await);
    }
}

/// The key to the tokens with which a peer disowns connections it no longer knows. It is the same after a restart, so
/// that whoever still uses a connection to the process before learns at once that it is gone.
struct ResetKey([u8; 32]);

impl ResetKey {
    fn of(secret: &SecretKey) -> Self {
        Self(blake3::derive_key(
            "karez transfer stateless reset 1",
            &secret.to_bytes(),
        ))
    }

    fn mac(&self, data: &[u8]) -> blake3::Hash {
        blake3::keyed_hash(&self.0, data)
    }
}

impl quinn::crypto::HmacKey for ResetKey {
    fn sign(&self, data: &[u8], out: &mut [u8]) {
        out.copy_from_slice(self.mac(data).as_bytes());
    }

    fn signature_len(&self) -> usize {
        blake3::OUT_LEN
    }

    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), quinn::crypto::CryptoError> {
        let found = <[u8; blake3::OUT_LEN]>::try_from(signature).map_err(|_| quinn::crypto::CryptoError)?;
        // Equality of `blake3::Hash` takes the same time for all values.
        match self.mac(data) == found {
            true => Ok(()),
            false => Err(quinn::crypto::CryptoError),
        }
    }
}

fn socket(addr: SocketAddr) -> io::Result<std::net::UdpSocket> {
    use socket2::{Domain, Protocol, Socket, Type};
    let socket = Socket::new(Domain::for_address(addr), Type::DGRAM, Some(Protocol::UDP))?;
    if addr.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    // The system may grant less; that costs speed on long paths, nothing else.
    drop(socket.set_recv_buffer_size(SOCKET_BUFFER));
    drop(socket.set_send_buffer_size(SOCKET_BUFFER));
    socket.set_nonblocking(true)?;
    socket.bind(&addr.into())?;
    Ok(socket.into())
}

/// Windows large enough for long paths and small enough that a lossy one does not fill them with gaps.
///
/// BBR keeps going where Cubic takes every lost packet for congestion; elsewhere Cubic is the better neighbour.
fn transport(bbr: bool) -> Arc<quinn::TransportConfig> {
    let mut config = quinn::TransportConfig::default();
    config
        .stream_receive_window(STREAM_WINDOW.into())
        .receive_window(CONNECTION_WINDOW.into())
        .send_window(CONNECTION_WINDOW.into())
        .keep_alive_interval(Some(Duration::from_secs(10)))
        .max_concurrent_bidi_streams(64u32.into())
        .max_concurrent_uni_streams(0u32.into())
        .datagram_receive_buffer_size(None);
    if let Ok(idle) = IDLE_MAX.try_into() {
        config.max_idle_timeout(Some(idle));
    }
    if bbr {
        config.congestion_controller_factory(Arc::new(quinn::congestion::BbrConfig::default()));
    }
    Arc::new(config)
}

fn server_config(secret: &SecretKey, bbr: bool) -> io::Result<quinn::ServerConfig> {
    let tls = tls::server(secret, tls::ALPN_ARTIFACT, tls::anyone()).map_err(io::Error::other)?;
    let crypto = quinn::crypto::rustls::QuicServerConfig::try_from(tls).map_err(io::Error::other)?;
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    config.transport_config(transport(bbr));
    Ok(config)
}

fn client_config(secret: &SecretKey, expected: PublicKey, bbr: bool) -> io::Result<quinn::ClientConfig> {
    let tls = tls::client(secret, tls::ALPN_ARTIFACT, tls::only(expected)).map_err(io::Error::other)?;
    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(tls).map_err(io::Error::other)?;
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    config.transport_config(transport(bbr));
    Ok(config)
}

/// Addresses to which packets are lost for other reasons than congestion, as far as can be told.
#[derive(Default)]
struct LossyPaths(Mutex<HashMap<IpAddr, Instant>>);

impl LossyPaths {
    fn contains(&self, ip: IpAddr) -> bool {
        let table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        table
            .get(&ip.to_canonical())
            .is_some_and(|at| at.elapsed() < LOSSY_REMEMBERED)
    }

    /// Judges what this end has sent on `connection`. True when its path has just been found lossy: the connection
    /// should be made anew, with BBR.
    fn judge(&self, connection: &quinn::Connection) -> bool {
        let ip = connection.remote_address().ip();
        let path = connection.stats().path;
        let lossy = path.sent_packets >= JUDGED_PACKETS
            && path.lost_packets * LOSSY_ONE_IN > path.sent_packets
            // On a short path loss means a full queue, and Cubic recovers at once.
            && path.rtt >= Duration::from_millis(20);
        if !lossy || self.contains(ip) {
            return false;
        }
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if table.len() >= LOSSY_PATHS_MAX {
            table.retain(|_, at| at.elapsed() < LOSSY_REMEMBERED);
        }
        if table.len() >= LOSSY_PATHS_MAX {
            return false;
        }
        tracing::info!(%ip, lost = path.lost_packets, sent = path.sent_packets, "lossy path: switching to BBR");
        table.insert(ip.to_canonical(), Instant::now());
        true
    }
}
