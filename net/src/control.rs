//! What carries the gRPC services: a listener and a connector over TLS with the parties' own keys.
//!
//! A scheduler serves [`serve_incoming`] with [`server_builder`]; nodes and the CLI [`connect`]. Handlers ask
//! [`peer_key_of`] who calls. Not here: the services themselves, and who is admitted to them.
use crate::tls::{self, Policy};
use futures::Stream;
use hyper_util::rt::TokioIo;
use karez_core::key::{PublicKey, SecretKey};
use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc},
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, TlsConnector, rustls::pki_types::ServerName, server::TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Request, Status,
    transport::{Channel, Endpoint, Server, server::Connected},
};

/// A TLS handshake, and on the connecting side also the TCP one, must end within this.
pub const HANDSHAKE_MAX: Duration = Duration::from_secs(5);
/// Idle connections are asked for a sign of life this often.
pub const KEEPALIVE_EVERY: Duration = Duration::from_secs(20);
/// A connection without a sign of life for this long after being asked is closed.
pub const KEEPALIVE_WAIT: Duration = Duration::from_secs(10);
/// Unfinished handshakes at one time; further connections wait in the kernel's backlog.
const HANDSHAKES_MAX: usize = 256;
/// Unfinished handshakes at one time from one IPv4 address or one IPv6 /64; further connections are dropped.
const HANDSHAKES_PER_IP_MAX: usize = 16;

/// Who is on the other end of a connection; in the extensions of every request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerInfo {
    /// The key it proved to hold.
    pub key: PublicKey,
    /// Where it connects from.
    pub addr: SocketAddr,
}

/// The key of the party that sent `request`. `UNAUTHENTICATED` when the connection has none.
// A `Status` is large, but it is what every handler returns.
#[allow(clippy::result_large_err)]
pub fn peer_key_of<T>(request: &Request<T>) -> Result<PublicKey, Status> {
    request
        .extensions()
        .get::<PeerInfo>()
        .map(|peer| peer.key)
        .ok_or_else(|| Status::unauthenticated("this service needs a connection with a Karez key"))
}

/// A finished TLS connection, for tonic.
#[derive(Debug)]
pub struct ControlStream {
    stream: TlsStream<TcpStream>,
    peer: PeerInfo,
}

impl ControlStream {
    /// Who connected.
    pub fn peer(&self) -> PeerInfo {
        self.peer
    }
}

impl Connected for ControlStream {
    type ConnectInfo = PeerInfo;
    fn connect_info(&self) -> PeerInfo {
        self.peer
    }
}

impl AsyncRead for ControlStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for ControlStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// A server with this network's keepalive, ready for `add_service` and `serve_with_incoming`.
pub fn server_builder() -> Server {
    Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE_EVERY))
        .http2_keepalive_timeout(Some(KEEPALIVE_WAIT))
        .max_concurrent_streams(Some(256))
}

/// Accepts connections on `listener`, each handshaken on its own so that a slow or hostile one holds up nobody.
///
/// Bytes that are no TLS, X.509 clients and keys that `policy` refuses are dropped and logged at debug level.
/// The accept loop ends when the stream is dropped. Must be called inside a tokio runtime.
pub fn serve_incoming(
    listener: TcpListener,
    secret: &SecretKey,
    policy: Policy,
) -> Result<impl Stream<Item = io::Result<ControlStream>> + Send + use<>, rustls::Error> {
    let config = tls::server(secret, tls::ALPN_CONTROL, policy)?;
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let (ready, incoming) = mpsc::channel(64);
    tokio::spawn(accept_loop(listener, acceptor, ready));
    Ok(ReceiverStream::new(incoming))
}

async fn accept_loop(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    ready: mpsc::Sender<io::Result<ControlStream>>,
) {
    let everyone = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    let per_ip = PerIp::default();
    loop {
        let Ok(permit) = everyone.clone().acquire_owned().await else {
            return;
        };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = ready.closed() => return,
        };
        let (stream, addr) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, or the caller left before we came: neither is a reason to stop.
                tracing::warn!(%error, "accepting a connection failed");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Some(slot) = per_ip.take(addr.ip()) else {
            tracing::debug!(%addr, "too many unfinished handshakes from this address: dropped");
            continue;
        };
        let (acceptor, ready) = (acceptor.clone(), ready.clone());
        tokio::spawn(async move {
            let shaken = timeout(HANDSHAKE_MAX, handshake(stream, addr, &acceptor)).await;
            drop((permit, slot));
            match shaken {
                Ok(Ok(stream)) => drop(ready.send(Ok(stream)).await),
                Ok(Err(error)) => tracing::debug!(%addr, %error, "handshake failed"),
                Err(_) => tracing::debug!(%addr, "handshake took too long"),
            }
        });
    }
}

async fn handshake(stream: TcpStream, addr: SocketAddr, acceptor: &TlsAcceptor) -> io::Result<ControlStream> {
    stream.set_nodelay(true)?;
    let stream = acceptor.accept(stream).await?;
    let certs = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let key = tls::peer_key(certs).map_err(io::Error::other)?;
    let peer = PeerInfo { key, addr };
    Ok(ControlStream { stream, peer })
}

/// Counts unfinished handshakes by address; entries vanish at zero, so the table is bounded by the handshakes.
#[derive(Clone, Default)]
struct PerIp(Arc<Mutex<HashMap<IpAddr, usize>>>);

struct IpSlot {
    table: PerIp,
    ip: IpAddr,
}

impl PerIp {
    fn take(&self, ip: IpAddr) -> Option<IpSlot> {
        // Whoever holds one IPv6 address holds its whole /64.
        let ip = match ip.to_canonical() {
            IpAddr::V6(v6) => {
                let s = v6.segments();
                IpAddr::V6(Ipv6Addr::new(s[0], s[1], s[2], s[3], 0, 0, 0, 0))
            }
            v4 => v4,
        };
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = table.entry(ip).or_default();
        if *count >= HANDSHAKES_PER_IP_MAX {
            return None;
        }
        *count += 1;
        let table = self.clone();
        Some(IpSlot { table, ip })
    }
}

impl Drop for IpSlot {
    fn drop(&mut self) {
        let mut table = self.table.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = table.get_mut(&self.ip) {
            *count -= 1;
            if *count == 0 {
                table.remove(&self.ip);
            }
        }
    }
}

/// Why no connection to a scheduler came about.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// Nobody listens there.
    #[error("{addr} refused the connection: check that the scheduler runs and that the port is right")]
    Refused {
        /// Where.
        addr: String,
    },
    /// No route, no such name, or no answer in time.
    #[error("{addr} cannot be reached ({why}): check the address, the network and the firewall")]
    Unreachable {
        /// Where.
        addr: String,
        /// What the system said.
        why: String,
    },
    /// A Karez party answered, but not the expected one.
    #[error(
        "{addr} answered with the key {got}, expected {expected}: do not trust it before its operator confirms the new key"
    )]
    WrongKey {
        /// Where.
        addr: String,
        /// The key it was known by.
        expected: PublicKey,
        /// The key it showed.
        got: PublicKey,
    },
    /// Something else listens there, or it refuses our key.
    #[error("{addr} does not speak Karez with this key ({why}): check the port")]
    NotKarez {
        /// Where.
        addr: String,
        /// How it failed.
        why: String,
    },
}

/// Connects to the scheduler at `addr` (`host:port`) and insists on its key.
///
/// The first connection is made now, so that errors are known; afterwards the channel reconnects by itself, each
/// time insisting on the same key. Keepalive runs also while idle.
pub async fn connect(addr: &str, secret: &SecretKey, expected: PublicKey) -> Result<Channel, ConnectError> {
    let not_karez = |why: String| ConnectError::NotKarez {
        addr: addr.to_owned(),
        why,
    };
    let connector = Connector {
        addr: Arc::from(addr),
        secret: Arc::new(secret.clone()),
        expected,
    };
    // The channel wraps errors beyond recognition; the reason is left here for the first attempt.
    let reason: Arc<Mutex<Option<ConnectError>>> = Arc::default();
    let left = reason.clone();
    let service = tower::service_fn(move |_| {
        let (connector, left) = (connector.clone(), left.clone());
        async move {
            connector.dial().await.map(TokioIo::new).map_err(|error| {
                *left.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.clone());
                io::Error::other(error)
            })
        }
    });
    let connected = Endpoint::from_static("http://karez")
        .connect_timeout(2 * HANDSHAKE_MAX)
        .http2_keep_alive_interval(KEEPALIVE_EVERY)
        .keep_alive_timeout(KEEPALIVE_WAIT)
        .keep_alive_while_idle(true)
        .connect_with_connector(service)
        .await;
    connected.map_err(|error| {
        let reason = reason.lock().unwrap_or_else(PoisonError::into_inner).take();
        reason.unwrap_or_else(|| not_karez(error.to_string()))
    })
}

#[derive(Clone)]
struct Connector {
    addr: Arc<str>,
    secret: Arc<SecretKey>,
    expected: PublicKey,
}

/// How often a connection that was dropped before its handshake is tried again, and the first pause.
const DIALS: u32 = 5;
const DIAL_PAUSE: Duration = Duration::from_millis(150);

/// Why a connection came to nothing.
enum Failed {
    /// The other end let go of it: it may have too many of them from this address just now.
    Dropped(ConnectError),
    Because(ConnectError),
}

impl From<ConnectError> for Failed {
    fn from(error: ConnectError) -> Self {
        Self::Because(error)
    }
}

impl Connector {
    async fn dial(&self) -> Result<tokio_rustls::client::TlsStream<TcpStream>, ConnectError> {
        let mut pause = DIAL_PAUSE;
        for _ in 1..DIALS {
            match self.try_once().await {
                Err(Failed::Dropped(_)) => {
                    // Those that were dropped together do not come back together.
                    let odd = getrandom::u32().unwrap_or_default() % 1000;
                    tokio::time::sleep(pause + pause * odd / 1000).await;
                    pause *= 2;
                }
                Err(Failed::Because(error)) => return Err(error),
                Ok(stream) => return Ok(stream),
            }
        }
        self.try_once().await.map_err(|failed| match failed {
            Failed::Dropped(error) | Failed::Because(error) => error,
        })
    }

    async fn try_once(&self) -> Result<tokio_rustls::client::TlsStream<TcpStream>, Failed> {
        let addr = || self.addr.to_string();
        let unreachable = |why: String| ConnectError::Unreachable { addr: addr(), why };
        let not_karez = |why: String| ConnectError::NotKarez { addr: addr(), why };
        let stream = match timeout(HANDSHAKE_MAX, TcpStream::connect(&*self.addr)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
                return Err(ConnectError::Refused { addr: addr() }.into());
            }
            Ok(Err(error)) => return Err(unreachable(error.to_string()).into()),
            Err(_) => {
                let why = format!("no answer in {} s", HANDSHAKE_MAX.as_secs());
                return Err(unreachable(why).into());
            }
        };
        stream.set_nodelay(true).map_err(|e| unreachable(e.to_string()))?;
        let shown: Arc<Mutex<Option<PublicKey>>> = Arc::default();
        let (note, expected) = (shown.clone(), self.expected);
        let policy: Policy = Arc::new(move |key| {
            *note.lock().unwrap_or_else(PoisonError::into_inner) = Some(*key);
            *key == expected
        });
        let config =
            tls::client(&self.secret, tls::ALPN_CONTROL, policy).map_err(|e| not_karez(e.to_string()))?;
        let name = ServerName::try_from("karez").map_err(|e| not_karez(e.to_string()))?;
        let shaken = timeout(
            HANDSHAKE_MAX,
            TlsConnector::from(Arc::new(config)).connect(name, stream),
        );
        match shaken.await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(error)) => {
                let got = shown.lock().unwrap_or_else(PoisonError::into_inner).take();
                Err(match got {
                    Some(got) if got != expected => ConnectError::WrongKey {
                        addr: addr(),
                        expected,
                        got,
                    }
                    .into(),
                    // It said nothing at all and hung up.
                    None if is_dropped(&error) => Failed::Dropped(not_karez(error.to_string())),
                    _ => not_karez(error.to_string()).into(),
                })
            }
            Err(_) => Err(not_karez(format!("no handshake in {} s", HANDSHAKE_MAX.as_secs())).into()),
        }
    }
}

fn is_dropped(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    matches!(
        error.kind(),
        BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof
    )
}
