//! Artifact transfer over QUIC.
use crate::store::{ArtifactStore, Pin, StoreError};
use karez_core::{artifact::ArtifactRef, key::{PublicKey, SecretKey}, unit::Bytes};
use std::{net::SocketAddr, sync::Arc};

/// What a peer asks of this party.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// To read this artifact.
    Get(ArtifactRef),
    /// To leave this artifact here.
    Put(ArtifactRef),
    /// To know whether it is here.
    Has(ArtifactRef),
}
/// Who may do what; asked at every request.
pub type TransferPolicy = Arc<dyn Fn(&PublicKey, Op) -> bool + Send + Sync>;
/// A party that may hold an artifact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Its key.
    pub key: PublicKey,
    /// Where it may be reached over UDP.
    pub addrs: Vec<SocketAddr>,
}
/// How far a transfer has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Verified bytes present, including what was already here.
    pub done: Bytes,
    /// All bytes.
    pub total: Bytes,
    /// Bytes of content that crossed the network in this call.
    pub moved: Bytes,
}
/// Called after each verified block; must not block.
pub type OnProgress = Arc<dyn Fn(Progress) + Send + Sync>;
/// Why a transfer failed.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// The local store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// No holder could give it.
    #[error("{artifact}: no holder could give it ({tried}): try again later or name another holder")]
    NoHolder {
        /// What.
        artifact: ArtifactRef,
        /// Each holder and why it failed.
        tried: String,
    },
    /// The receiver declined.
    #[error("{holder} declined {artifact}: {why}")]
    Declined {
        /// Who.
        holder: String,
        /// What.
        artifact: ArtifactRef,
        /// Its words.
        why: String,
    },
}
/// The one endpoint of a process: serves its store and fetches from others. Clones share it.
#[derive(Clone)]
pub struct Transfers(());
impl Transfers {
    /// Binds the UDP socket and starts serving. Must be called inside a tokio runtime.
    pub fn bind(_addr: SocketAddr, _secret: &SecretKey, _store: ArtifactStore, _policy: TransferPolicy) -> Result<Self, TransferError> { unimplemented!() }
    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr { unimplemented!() }
    /// Brings the artifacts here from whoever of `holders` has them; returns them pinned.
    pub async fn fetch(&self, _artifacts: &[ArtifactRef], _holders: &[Holder], _progress: OnProgress) -> Result<Vec<Pin>, TransferError> { unimplemented!() }
    /// Brings an artifact of the own store to `to`.
    pub async fn push(&self, _artifact: ArtifactRef, _to: &Holder, _progress: OnProgress) -> Result<(), TransferError> { unimplemented!() }
    /// Whether `holder` has all of it.
    pub async fn has(&self, _artifact: ArtifactRef, _holder: &Holder) -> Result<bool, TransferError> { unimplemented!() }
    /// Says goodbye to everyone and stops serving.
    pub async fn close(&self) { unimplemented!() }
}
