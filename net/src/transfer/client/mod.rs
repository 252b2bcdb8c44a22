//! The asking side: fetching from several holders at once, pushing to one.
mod fetch;
mod pool;
mod push;

use super::{
    ADDRS_MAX, CONNECT_MAX, Holder, Inner, OnProgress, Progress, TransferError, client_config,
    flow::ReceiveError,
    wire::{self, Request, Status, StreamError},
};
use crate::{store::StoreError, verified::BLOCK_BYTES};
use karez_core::{artifact::ArtifactRef, key::PublicKey, unit::Bytes};
use quinn::{Connection, RecvStream, SendStream};
use std::{
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::{task::spawn_blocking, time::timeout};

pub(super) use fetch::fetch;
pub(super) use push::push;

/// What one stream fetches at a time: 16 MiB.
const UNIT_BLOCKS: u64 = 64;
/// A holder that is lost so often in a row, without a single block in between, is given up.
const LOSSES_MAX: u32 = 4;
/// The pause before a lost holder is tried again; each is twice the one before.
const FIRST_RETRY: Duration = Duration::from_millis(500);
/// Connections that are kept for the next transfer.
const OPEN_MAX: usize = 32;
/// How long one is kept that nobody uses.
const OPEN_FOR: Duration = Duration::from_secs(20);

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

/// Connections that the next transfer may use, one transfer at a time: a handshake costs more than a small file.
#[derive(Default)]
pub(super) struct OpenConnections(Mutex<Vec<(PublicKey, Instant, Connection)>>);

impl OpenConnections {
    fn list(&self) -> MutexGuard<'_, Vec<(PublicKey, Instant, Connection)>> {
        let mut list = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Dropped with its last handle, a connection says goodbye.
        list.retain(|(_, since, connection)| {
            connection.close_reason().is_none() && since.elapsed() < OPEN_FOR
        });
        list
    }

    /// One to that holder at one of its addresses, if there is one.
    fn take(&self, holder: &Holder) -> Option<Connection> {
        let mut list = self.list();
        let i = list.iter().position(|(key, _, connection)| {
            *key == holder.key && holder.addrs.contains(&connection.remote_address())
        })?;
        Some(list.swap_remove(i).2)
    }

    fn give_back(&self, key: PublicKey, connection: Connection) {
        let mut list = self.list();
        if list.len() >= OPEN_MAX {
            let oldest = (0..list.len()).min_by_key(|i| list[*i].1);
            oldest.map(|i| list.swap_remove(i));
        }
        list.push((key, Instant::now(), connection));
    }
}

/// A connection in use by one transfer, which leaves it to the next. Who finds it useless closes it.
struct Lent {
    inner: Arc<Inner>,
    key: PublicKey,
    connection: Connection,
    /// Nothing was left half done on it.
    clean: bool,
}

impl Drop for Lent {
    fn drop(&mut self) {
        if !self.clean {
            self.connection.close(0u32.into(), b"left");
            return;
        }
        self.inner.open.give_back(self.key, self.connection.clone());
    }
}

/// A connection to the holder: one that stands, or a new one.
async fn connect(inner: &Arc<Inner>, holder: &Holder) -> Result<Lent, Failure> {
    let lent = |connection| Lent {
        inner: inner.clone(),
        key: holder.key,
        connection,
        clean: true,
    };
    if let Some(connection) = inner.open.take(holder) {
        return Ok(lent(connection));
    }
    let mut failure = Failure::Useless("it has no address".into());
    for addr in holder.addrs.iter().take(ADDRS_MAX) {
        let bbr = inner.lossy.contains(addr.ip());
        let config = client_config(&inner.secret, holder.key, bbr);
        let config = config.map_err(|e| Failure::Useless(e.to_string()))?;
        failure = match inner.endpoint.connect_with(config, *addr, "karez") {
            Ok(connecting) => match timeout(CONNECT_MAX, connecting).await {
                Ok(Ok(connection)) => return Ok(lent(connection)),
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
    inner: &Arc<Inner>,
    artifact: ArtifactRef,
    holder: &Holder,
) -> Result<bool, TransferError> {
    let lost = |why| TransferError::Lost {
        holder: holder.key.short(),
        artifact,
        why,
    };
    let lent = match connect(inner, holder).await {
        Ok(lent) => lent,
        Err(Failure::Lost(why) | Failure::Useless(why)) => return Err(lost(why)),
        Err(Failure::Local(error)) => return Err(error.into()),
        Err(Failure::Reconnect) => return Err(lost("it wants a new connection".into())),
    };
    match ask_status(&lent.connection, &Request::Has(artifact)).await {
        Ok((Status::Ok, _)) => Ok(true),
        Ok((Status::Missing, _)) => Ok(false),
        Ok((_, why)) => Err(declined(holder, artifact, why)),
        Err(error) => {
            lent.connection.close(0u32.into(), b"stalled");
            Err(lost(match error {
                StreamError::Lost(why) => why,
                StreamError::Malformed(why) => why.into(),
            }))
        }
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

/// Content bytes of some blocks of a file.
fn span_bytes(bytes: u64, blocks: &Range<u64>) -> u64 {
    let end = blocks.end.saturating_mul(BLOCK_BYTES).min(bytes);
    end.saturating_sub(blocks.start.saturating_mul(BLOCK_BYTES))
}
