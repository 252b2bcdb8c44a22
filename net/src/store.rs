//! The artifact store on disk. All calls block on the disk: from async code use `spawn_blocking`.
use crate::manifest::Manifest;
use karez_core::{
    artifact::ArtifactRef,
    unit::{Bytes, UtcMillis},
};
use std::{io, path::{Path, PathBuf}};

/// Why the store could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The byte limit is met and nothing more can be evicted.
    #[error("the artifact store is full: {needs} bytes needed, limit {limit}, {pinned} pinned by jobs: raise the limit or wait until jobs end")]
    Full {
        /// Bytes that did not fit.
        needs: u64,
        /// The store's limit.
        limit: u64,
        /// Bytes that cannot be evicted now.
        pinned: u64,
    },
    /// Not (completely) in this store.
    #[error("{artifact} is not in this store: fetch it first")]
    Missing {
        /// What was asked for.
        artifact: ArtifactRef,
    },
    /// The disk failed.
    #[error("{path}: {error}")]
    Io {
        /// Where.
        path: PathBuf,
        /// What happened.
        error: io::Error,
    },
}
/// One artifact of the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredArtifact {
    /// Which.
    pub artifact: ArtifactRef,
    /// When it was last used.
    pub used_at: UtcMillis,
    /// Whether somebody holds it now.
    pub pinned: bool,
    /// Whether all of it is here.
    pub complete: bool,
}
/// Keeps an artifact from eviction until dropped.
#[derive(Debug)]
pub struct Pin(());
impl Pin {
    /// What is kept.
    pub fn artifact(&self) -> ArtifactRef {
        unimplemented!()
    }
}
/// The store. Clones share it.
#[derive(Debug, Clone)]
pub struct ArtifactStore(());
impl ArtifactStore {
    /// Opens or makes the store in `dir`, sweeping what a crash left.
    pub fn open(_dir: &Path, _limit: Bytes) -> Result<Self, StoreError> { unimplemented!() }
    /// Copies a file in.
    pub fn add_file(&self, _path: &Path) -> Result<ArtifactRef, StoreError> { unimplemented!() }
    /// Stores bytes.
    pub fn add_bytes(&self, _bytes: &[u8]) -> Result<ArtifactRef, StoreError> { unimplemented!() }
    /// Copies a directory in.
    pub fn add_dir(&self, _dir: &Path) -> Result<ArtifactRef, StoreError> { unimplemented!() }
    /// Whether all of it is here.
    pub fn contains(&self, _artifact: &ArtifactRef) -> bool { unimplemented!() }
    /// The data file of a blob (or the manifest of a tree), read-only. Hold a pin while using it.
    pub fn path(&self, _artifact: &ArtifactRef) -> Result<PathBuf, StoreError> { unimplemented!() }
    /// Reads a small blob whole, refusing more than `max` bytes.
    pub fn read(&self, _artifact: &ArtifactRef, _max: Bytes) -> Result<Vec<u8>, StoreError> { unimplemented!() }
    /// The manifest of a tree.
    pub fn manifest(&self, _artifact: &ArtifactRef) -> Result<Manifest, StoreError> { unimplemented!() }
    /// Copies a blob to the file `dest`, or a tree to the new directory `dest`.
    pub fn export(&self, _artifact: &ArtifactRef, _dest: &Path) -> Result<(), StoreError> { unimplemented!() }
    /// Like export, by hard links where the file system allows: only for read-only views.
    pub fn link(&self, _artifact: &ArtifactRef, _dest: &Path) -> Result<(), StoreError> { unimplemented!() }
    /// Keeps it from eviction.
    pub fn pin(&self, _artifact: &ArtifactRef) -> Result<Pin, StoreError> { unimplemented!() }
    /// Everything, most recently used first.
    pub fn list(&self) -> Vec<StoredArtifact> { unimplemented!() }
    /// Removes one artifact now, unless pinned.
    pub fn remove(&self, _artifact: &ArtifactRef) -> Result<(), StoreError> { unimplemented!() }
    /// Re-reads and re-hashes.
    pub fn verify(&self, _artifact: &ArtifactRef) -> Result<(), StoreError> { unimplemented!() }
    /// Bytes on disk.
    pub fn used(&self) -> Bytes { unimplemented!() }
    /// The byte limit.
    pub fn limit(&self) -> Bytes { unimplemented!() }
}
