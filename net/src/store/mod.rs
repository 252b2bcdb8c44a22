//! The artifact store: files and directories on disk, named by BLAKE3, kept under a byte limit.
//!
//! | folder | holds |
//! |---|---|
//! | `blobs/` | complete files by digest, read-only, each with its outboard (`.tree`) when over 16 KiB |
//! | `roots/` | one empty file for each artifact: its name says which, its time when it was last used |
//! | `partial/` | transfers under way: data, outboard and a map of the blocks that are there |
//! | `temp/` | files being written; swept at start |
//!
//! Blobs shared by several artifacts are kept once and go with the last of them. When room is needed, the artifacts
//! unused for longest go first; one that is pinned never goes. Files appear by rename only, after their bytes are
//! on disk, so a crash or a full disk leaves no half file.
//!
//! Every call blocks on the disk: from async code use `spawn_blocking`. One process opens a store at a time.
mod error;
mod files;
mod incoming;
mod load;
mod partial;

use crate::{
    manifest::{MANIFEST_BYTES_MAX, Manifest, ManifestEntry},
    verified::{self, make_outboard, outboard_bytes},
};
pub use error::StoreError;
use error::io_error;
use files::{Lasting, list_files, members_of};
pub(crate) use incoming::Served;
use karez_core::{
    artifact::{ArtifactKind, ArtifactRef},
    id::Digest,
    unit::{Bytes, UtcMillis},
};
pub(crate) use partial::Partial;
use partial::SharedMap;
use std::{
    collections::{HashMap, HashSet},
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, Weak, atomic::AtomicU64},
    time::{SystemTime, UNIX_EPOCH},
};

/// One artifact of the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoredArtifact {
    /// Which.
    pub artifact: ArtifactRef,
    /// When it was last used.
    pub used_at: UtcMillis,
    /// Whether somebody holds it now.
    pub pinned: bool,
    /// Whether all of it is here; if not, a transfer was begun.
    pub complete: bool,
}

/// Keeps an artifact from eviction until dropped.
#[derive(Debug)]
pub struct Pin {
    store: ArtifactStore,
    artifact: ArtifactRef,
}

impl Pin {
    /// What is kept.
    pub fn artifact(&self) -> ArtifactRef {
        self.artifact
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut state = self.store.state();
        if let Some(root) = state.roots.get_mut(&self.artifact) {
            root.pins = root.pins.saturating_sub(1);
        }
    }
}

/// The store. Clones share it.
#[derive(Debug, Clone)]
pub struct ArtifactStore {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    limit: u64,
    temp_number: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Complete files and their sizes.
    blobs: HashMap<Digest, u64>,
    /// Unfinished files: by size too, for a stranger may name a wrong one.
    partials: HashMap<(Digest, u64), Slot>,
    /// How many artifacts (and additions under way) want each file.
    refs: HashMap<Digest, u32>,
    roots: HashMap<ArtifactRef, Root>,
    /// Complete ones that are not yet on disk for good.
    unsynced: HashSet<ArtifactRef>,
    /// Bytes of blobs and partials with their outboards.
    used: u64,
    /// Bytes promised to additions under way.
    reserved: u64,
}

/// An unfinished file. What of it is here is known by this table alone: a map read again from disk, while a
/// transfer that has just ended is still saving it, would forget blocks.
#[derive(Debug, Default)]
struct Slot {
    open: Weak<Partial>,
    map: Option<Arc<SharedMap>>,
}

#[derive(Debug)]
struct Root {
    complete: bool,
    used_at: u64,
    pins: u32,
    /// Its files, the manifest of a tree included.
    members: HashSet<Digest>,
}

/// What a file of this size takes, outboard included.
fn cost(bytes: u64) -> u64 {
    bytes.saturating_add(outboard_bytes(bytes))
}

fn millis_now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

impl ArtifactStore {
    /// Opens or makes the store in `dir`. Sweeps what a crash left behind; transfers that were cut can go on.
    pub fn open(dir: &Path, limit: Bytes) -> Result<Self, StoreError> {
        for folder in ["blobs", "roots", "partial", "temp"] {
            let path = dir.join(folder);
            fs::create_dir_all(&path).map_err(io_error(&path))?;
        }
        let store = Self {
            inner: Arc::new(Inner {
                dir: dir.to_owned(),
                limit: limit.0,
                temp_number: AtomicU64::new(0),
                state: Mutex::default(),
            }),
        };
        store.load()?;
        Ok(store)
    }

    /// Copies a file in. A file that is already here is only marked as used.
    pub fn add_file(&self, path: &Path) -> Result<ArtifactRef, StoreError> {
        let (digest, bytes, held) = self.take_in(path)?;
        let artifact = ArtifactRef {
            digest,
            bytes: Bytes(bytes),
            kind: ArtifactKind::Blob,
        };
        self.commit(artifact, HashSet::from([digest]), Lasting::Now)?;
        drop(held);
        self.sync(&artifact)?;
        Ok(artifact)
    }

    /// Stores bytes.
    pub fn add_bytes(&self, bytes: &[u8]) -> Result<ArtifactRef, StoreError> {
        let artifact = self.add(bytes, Lasting::Now)?;
        self.sync(&artifact)?;
        Ok(artifact)
    }

    /// Stores a few bytes without waiting for the disk: they are here until the process ends or the power fails, and
    /// from [`ArtifactStore::sync`] on for good.
    pub fn add_unsynced(&self, bytes: &[u8]) -> Result<ArtifactRef, StoreError> {
        self.add(bytes, Lasting::Later)
    }

    fn add(&self, bytes: &[u8], lasting: Lasting) -> Result<ArtifactRef, StoreError> {
        let (digest, held) = self.take_bytes(bytes, lasting)?;
        let artifact = ArtifactRef {
            digest,
            bytes: Bytes(bytes.len() as u64),
            kind: ArtifactKind::Blob,
        };
        self.commit(artifact, HashSet::from([digest]), lasting)?;
        drop(held);
        Ok(artifact)
    }

    /// Waits until a blob that was added without waiting is on disk. Nothing to do for every other.
    pub fn sync(&self, artifact: &ArtifactRef) -> Result<(), StoreError> {
        if !self.state().unsynced.contains(artifact) {
            return Ok(());
        }
        self.sync_blob(&artifact.digest, artifact.bytes.0)?;
        let mut state = self.state();
        if state.unsynced.contains(artifact) {
            self.write_root(artifact, true)?;
            state.unsynced.remove(artifact);
        }
        Ok(())
    }

    /// Copies a directory in: all files below it. Symbolic links, sockets and the like are refused, not followed.
    pub fn add_dir(&self, dir: &Path) -> Result<ArtifactRef, StoreError> {
        let mut paths = Vec::new();
        list_files(dir, "", 0, &mut paths)?;
        let mut held = Vec::with_capacity(paths.len() + 1);
        let mut entries = Vec::with_capacity(paths.len());
        for path in paths {
            let (digest, bytes, hold) = self.take_in(&dir.join(&path))?;
            held.push(hold);
            let bytes = Bytes(bytes);
            entries.push(ManifestEntry { path, bytes, digest });
        }
        let manifest = Manifest::new(entries)?;
        let (digest, hold) = self.take_bytes(&manifest.encode(), Lasting::Now)?;
        held.push(hold);
        let artifact = ArtifactRef {
            digest,
            bytes: manifest.total(),
            kind: ArtifactKind::Tree,
        };
        self.commit(artifact, members_of(digest, &manifest), Lasting::Now)?;
        Ok(artifact)
    }

    /// Whether all of it is here.
    pub fn contains(&self, artifact: &ArtifactRef) -> bool {
        self.state().roots.get(artifact).is_some_and(|root| root.complete)
    }

    /// The file of a blob, or the manifest file of a tree. Read-only; hold a [`Pin`] while using it.
    pub fn path(&self, artifact: &ArtifactRef) -> Result<PathBuf, StoreError> {
        self.touch(artifact)?;
        Ok(self.blob_path(&artifact.digest))
    }

    /// Reads a blob whole, refusing more than `max`.
    pub fn read(&self, artifact: &ArtifactRef, max: Bytes) -> Result<Vec<u8>, StoreError> {
        self.touch(artifact)?;
        if artifact.kind == ArtifactKind::Blob && artifact.bytes > max {
            return Err(StoreError::TooLarge {
                artifact: *artifact,
                max,
            });
        }
        self.read_blob(&artifact.digest)
    }

    /// The manifest of a tree.
    pub fn manifest(&self, artifact: &ArtifactRef) -> Result<Manifest, StoreError> {
        self.touch(artifact)?;
        Ok(Manifest::decode(&self.read_blob(&artifact.digest)?)?)
    }

    /// Copies a blob to the file `dest`, or a tree to the directory `dest`, neither of which may exist yet.
    pub fn export(&self, artifact: &ArtifactRef, dest: &Path) -> Result<(), StoreError> {
        self.materialise(artifact, dest, false)
    }

    /// Like [`ArtifactStore::export`], by hard links where the file system allows: quick and without room of its
    /// own. Whoever may write to `dest` could damage the store, so give it out read-only.
    pub fn link(&self, artifact: &ArtifactRef, dest: &Path) -> Result<(), StoreError> {
        self.materialise(artifact, dest, true)
    }

    /// Keeps it from eviction until the pin is dropped.
    pub fn pin(&self, artifact: &ArtifactRef) -> Result<Pin, StoreError> {
        let mut state = self.state();
        match state.roots.get_mut(artifact) {
            Some(root) if root.complete => {
                root.pins += 1;
                self.stamp(artifact, root);
                drop(state);
                Ok(Pin {
                    store: self.clone(),
                    artifact: *artifact,
                })
            }
            _ => Err(StoreError::Missing { artifact: *artifact }),
        }
    }

    /// Everything, most recently used first.
    pub fn list(&self) -> Vec<StoredArtifact> {
        let mut list: Vec<_> = self
            .state()
            .roots
            .iter()
            .map(|(artifact, root)| StoredArtifact {
                artifact: *artifact,
                used_at: UtcMillis(root.used_at),
                pinned: root.pins > 0,
                complete: root.complete,
            })
            .collect();
        list.sort_by_key(|stored| (std::cmp::Reverse(stored.used_at), stored.artifact));
        list
    }

    /// Removes an artifact now, unless it is pinned.
    pub fn remove(&self, artifact: &ArtifactRef) -> Result<(), StoreError> {
        let mut state = self.state();
        match state.roots.get(artifact) {
            None => Err(StoreError::Missing { artifact: *artifact }),
            Some(root) if root.pins > 0 => Err(StoreError::InUse { artifact: *artifact }),
            Some(_) => {
                self.forget(&mut state, artifact);
                Ok(())
            }
        }
    }

    /// Reads an artifact again from disk and compares it with its name. Damaged files are removed, so that a fetch
    /// brings them anew.
    pub fn verify(&self, artifact: &ArtifactRef) -> Result<(), StoreError> {
        self.touch(artifact)?;
        let members: Vec<_> = match self.state().roots.get(artifact) {
            Some(root) => root.members.iter().copied().collect(),
            None => return Err(StoreError::Missing { artifact: *artifact }),
        };
        for digest in members {
            let path = self.blob_path(&digest);
            let file = File::open(&path).map_err(io_error(&path))?;
            let bytes = file.metadata().map_err(io_error(&path))?.len();
            let tree_path = self.tree_path(&digest);
            let tree = fs::read(&tree_path).unwrap_or_default();
            let mut tree_matches = tree.len() as u64 == outboard_bytes(bytes);
            let mut reader = &file;
            let found = make_outboard(
                bytes,
                &mut |buffer| reader.read_exact(buffer),
                &mut |at, pairs| {
                    let at = at as usize;
                    tree_matches &= tree.get(at..at + pairs.len()) == Some(pairs);
                    Ok(())
                },
            )
            .map_err(io_error(&path))?;
            if found != digest || !tree_matches {
                self.discard_damaged(&digest);
                return Err(StoreError::Corrupt { digest });
            }
        }
        Ok(())
    }

    /// Bytes in use, outboards and unfinished transfers included.
    pub fn used(&self) -> Bytes {
        Bytes(self.state().used)
    }

    /// The byte limit.
    pub fn limit(&self) -> Bytes {
        Bytes(self.inner.limit)
    }

    /// Where the store lies.
    pub fn dir(&self) -> &Path {
        &self.inner.dir
    }
}

/// The largest manifest, as a blob size.
pub(crate) const MANIFEST_MAX: u64 = MANIFEST_BYTES_MAX as u64;
/// Files up to this size arrive whole.
pub(crate) const SMALL_BYTES: u64 = verified::BLOCK_BYTES;
