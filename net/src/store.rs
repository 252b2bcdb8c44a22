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
use crate::{
    manifest::{self, MANIFEST_BYTES_MAX, Manifest, ManifestEntry, ManifestError},
    verified::{self, BLOCK_BYTES, Batch, blocks_of, make_outboard, outboard_bytes},
};
use karez_core::{
    artifact::{ArtifactKind, ArtifactRef},
    id::Digest,
    unit::{Bytes, UtcMillis},
};
use std::{
    collections::{HashMap, HashSet},
    fs::{self, File, OpenOptions},
    io::{self, IoSlice, Read, Write},
    ops::Range,
    os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// Why the store could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The byte limit is met and nothing more may be evicted.
    #[error(
        "the artifact store is full: {} needed, the limit is {} and {} are held by jobs and transfers: raise the limit, or wait until jobs end",
        human(.needs), human(.limit), human(.pinned)
    )]
    Full {
        /// What did not fit.
        needs: Bytes,
        /// The store's limit.
        limit: Bytes,
        /// What cannot be evicted now.
        pinned: Bytes,
    },
    /// The disk itself is full, whatever the store's own limit says.
    #[error(
        "the disk that holds {path} is full: free space on it, or lower the store's limit below what the disk has"
    )]
    DiskFull {
        /// What was being written.
        path: PathBuf,
    },
    /// Not, or not completely, in this store.
    #[error("{artifact} is not in this store: fetch it first")]
    Missing {
        /// What was asked for.
        artifact: ArtifactRef,
    },
    /// The bytes on disk no longer match the name. They were removed.
    #[error("{digest} was damaged on disk and has been removed: fetch it again, and check the disk")]
    Corrupt {
        /// The damaged file.
        digest: Digest,
    },
    /// The artifact is in use.
    #[error("{artifact} is in use: wait until the job or transfer that holds it ends")]
    InUse {
        /// Which.
        artifact: ArtifactRef,
    },
    /// A directory that cannot be an artifact, or a manifest that is not one.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// Something that is neither file nor directory, or a name that is not UTF-8.
    #[error("{path} cannot be stored: {why}")]
    Unsupported {
        /// Which.
        path: PathBuf,
        /// Why.
        why: &'static str,
    },
    /// The reference contradicts the content.
    #[error("{artifact} contradicts its content: {why}")]
    Contradiction {
        /// Which.
        artifact: ArtifactRef,
        /// How.
        why: String,
    },
    /// Larger than the caller allows.
    #[error("{artifact} is larger than {}", human(.max))]
    TooLarge {
        /// Which.
        artifact: ArtifactRef,
        /// The caller's cap.
        max: Bytes,
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

/// A size for people: exact below 10 KiB, then with one decimal.
pub(crate) fn human(bytes: &Bytes) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut tenths = bytes.0;
    if tenths < 10 * 1024 {
        return format!("{tenths} bytes");
    }
    let mut unit = 0;
    tenths = u64::try_from(u128::from(tenths) * 10 / 1024).unwrap_or(u64::MAX);
    while tenths >= 10_240 && unit + 1 < units.len() {
        tenths /= 1024;
        unit += 1;
    }
    format!("{}.{} {}", tenths / 10, tenths % 10, units[unit])
}

fn io_error(path: &Path) -> impl Fn(io::Error) -> StoreError {
    |error| match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => StoreError::DiskFull {
            path: path.to_owned(),
        },
        _ => StoreError::Io {
            path: path.to_owned(),
            error,
        },
    }
}

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
    partials: HashMap<(Digest, u64), Weak<Partial>>,
    /// How many artifacts (and additions under way) want each file.
    refs: HashMap<Digest, u32>,
    roots: HashMap<ArtifactRef, Root>,
    /// Bytes of blobs and partials with their outboards.
    used: u64,
    /// Bytes promised to additions under way.
    reserved: u64,
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
        self.commit(artifact, HashSet::from([digest]))?;
        drop(held);
        Ok(artifact)
    }

    /// Stores bytes.
    pub fn add_bytes(&self, bytes: &[u8]) -> Result<ArtifactRef, StoreError> {
        let (digest, held) = self.take_bytes(bytes)?;
        let artifact = ArtifactRef {
            digest,
            bytes: Bytes(bytes.len() as u64),
            kind: ArtifactKind::Blob,
        };
        self.commit(artifact, HashSet::from([digest]))?;
        drop(held);
        Ok(artifact)
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
        let (digest, hold) = self.take_bytes(&manifest.encode())?;
        held.push(hold);
        let artifact = ArtifactRef {
            digest,
            bytes: manifest.total(),
            kind: ArtifactKind::Tree,
        };
        self.commit(artifact, members_of(digest, &manifest))?;
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

// For transfers.
impl ArtifactStore {
    /// Announces that an artifact is on its way and keeps what of it is here. [`ArtifactStore::contains`] becomes
    /// true with [`ArtifactStore::complete`].
    pub(crate) fn begin(&self, artifact: &ArtifactRef) -> Result<Pin, StoreError> {
        let mut state = self.state();
        if !state.roots.contains_key(artifact) {
            self.write_root(artifact, false)?;
            let members = HashSet::from([artifact.digest]);
            self.insert_root(&mut state, *artifact, false, millis_now(), members);
        }
        if let Some(root) = state.roots.get_mut(artifact) {
            root.pins += 1;
            self.stamp(artifact, root);
        }
        drop(state);
        Ok(Pin {
            store: self.clone(),
            artifact: *artifact,
        })
    }

    /// Reads the manifest that has arrived for a tree, checks it against the reference, and claims its files.
    pub(crate) fn adopt_manifest(&self, pin: &Pin) -> Result<Manifest, StoreError> {
        let artifact = pin.artifact;
        let manifest = Manifest::decode(&self.read_blob(&artifact.digest)?)?;
        if manifest.total() != artifact.bytes {
            return Err(StoreError::Contradiction {
                artifact,
                why: format!("its files have {} bytes together", manifest.total().0),
            });
        }
        let mut state = self.state();
        let members = members_of(artifact.digest, &manifest);
        let new: Vec<_> = match state.roots.get_mut(&artifact) {
            Some(root) => {
                let new = members.difference(&root.members).copied().collect();
                root.members = members;
                new
            }
            None => return Err(StoreError::Missing { artifact }),
        };
        for digest in new {
            *state.refs.entry(digest).or_default() += 1;
        }
        Ok(manifest)
    }

    /// Marks an artifact as complete once all its files are here.
    pub(crate) fn complete(&self, pin: &Pin) -> Result<(), StoreError> {
        let artifact = pin.artifact;
        let mut state = self.state();
        let State { roots, blobs, .. } = &mut *state;
        let Some(root) = roots.get_mut(&artifact) else {
            return Err(StoreError::Missing { artifact });
        };
        if root.complete {
            return Ok(());
        }
        if !root.members.iter().all(|digest| blobs.contains_key(digest)) {
            return Err(StoreError::Missing { artifact });
        }
        let (from, to) = (self.root_path(&artifact, false), self.root_path(&artifact, true));
        fs::rename(&from, &to).map_err(io_error(&to))?;
        sync_dir(&self.inner.dir.join("roots"))?;
        root.complete = true;
        Ok(())
    }

    /// The size of a file that is here.
    pub(crate) fn blob_bytes(&self, digest: &Digest) -> Option<u64> {
        self.state().blobs.get(digest).copied()
    }

    /// Opens a file for serving, if it is part of `artifact`.
    pub(crate) fn serve(&self, artifact: &ArtifactRef, digest: &Digest) -> Result<Served, StoreError> {
        let missing = StoreError::Missing { artifact: *artifact };
        let bytes = {
            let mut state = self.state();
            let State { roots, blobs, .. } = &mut *state;
            let Some(root) = roots.get_mut(artifact) else {
                return Err(missing);
            };
            let Some(bytes) = blobs.get(digest).filter(|_| root.members.contains(digest)) else {
                return Err(missing);
            };
            self.stamp(artifact, root);
            *bytes
        };
        let path = self.blob_path(digest);
        let data = File::open(&path).map_err(io_error(&path))?;
        let tree = if outboard_bytes(bytes) > 0 {
            let path = self.tree_path(digest);
            Some(File::open(&path).map_err(io_error(&path))?)
        } else {
            None
        };
        Ok(Served { data, tree, bytes })
    }

    /// Keeps a small file that arrived whole and verified.
    pub(crate) fn keep_verified(&self, digest: &Digest, bytes: &[u8]) -> Result<(), StoreError> {
        let (found, held) = self.take_bytes(bytes)?;
        debug_assert_eq!(found, *digest);
        // The artifact under way holds its own reference.
        drop(held);
        Ok(())
    }

    /// The unfinished file of a digest, begun now or left by an earlier transfer.
    pub(crate) fn partial(&self, digest: &Digest, bytes: u64) -> Result<Arc<Partial>, StoreError> {
        let key = (*digest, bytes);
        let begun = {
            let state = self.state();
            if let Some(partial) = state.partials.get(&key).and_then(Weak::upgrade) {
                return Ok(partial);
            }
            state.partials.contains_key(&key)
        };
        let room = if begun {
            None
        } else {
            Some(self.reserve(cost(bytes))?)
        };
        let partial = Arc::new(Partial::open(&self.partial_dir(digest, bytes), *digest, bytes)?);
        let mut state = self.state();
        if let Some(other) = state.partials.get(&key).and_then(Weak::upgrade) {
            return Ok(other);
        }
        if state.partials.insert(key, Arc::downgrade(&partial)).is_none() {
            state.used += cost(bytes);
        }
        drop(state);
        drop(room);
        Ok(partial)
    }

    /// Turns a partial whose blocks are all here into a file of the store.
    pub(crate) fn finish(&self, partial: &Partial) -> Result<(), StoreError> {
        if self.blob_bytes(&partial.digest) == Some(partial.bytes) {
            return Ok(());
        }
        partial.sync()?;
        let mut state = self.state();
        if state.blobs.contains_key(&partial.digest) {
            return Ok(());
        }
        let dir = self.partial_dir(&partial.digest, partial.bytes);
        let (data, tree) = (self.blob_path(&partial.digest), self.tree_path(&partial.digest));
        make_parent(&data)?;
        if outboard_bytes(partial.bytes) > 0 {
            fs::rename(dir.join("tree"), &tree).map_err(io_error(&tree))?;
        }
        let from = dir.join("data");
        fs::set_permissions(&from, fs::Permissions::from_mode(0o444)).map_err(io_error(&from))?;
        fs::rename(&from, &data).map_err(io_error(&data))?;
        if let Some(parent) = data.parent() {
            sync_dir(parent)?;
        }
        drop(fs::remove_dir_all(&dir));
        partial.map().unsaved = 0;
        state.partials.remove(&(partial.digest, partial.bytes));
        state.blobs.insert(partial.digest, partial.bytes);
        if !state.refs.contains_key(&partial.digest) {
            // The artifact went while its last block arrived.
            self.delete_file(&mut state, &partial.digest);
        }
        Ok(())
    }

    /// Removes a file that turned out not to match its name; artifacts with it are incomplete from now on.
    pub(crate) fn discard_damaged(&self, digest: &Digest) {
        tracing::error!(%digest, "a stored file does not match its name: removed");
        let mut state = self.state();
        let damaged: Vec<_> = state
            .roots
            .iter_mut()
            .filter(|(_, root)| root.complete && root.members.contains(digest))
            .map(|(artifact, root)| {
                root.complete = false;
                *artifact
            })
            .collect();
        for artifact in damaged {
            let (from, to) = (self.root_path(&artifact, true), self.root_path(&artifact, false));
            if let Err(error) = fs::rename(&from, &to) {
                tracing::error!(%artifact, %error, "cannot mark as incomplete");
            }
        }
        self.delete_file(&mut state, digest);
    }
}

/// A file opened for serving.
#[derive(Debug)]
pub(crate) struct Served {
    pub(crate) data: File,
    pub(crate) tree: Option<File>,
    pub(crate) bytes: u64,
}

/// Gives promised room back when dropped.
struct Room<'a> {
    store: &'a ArtifactStore,
    bytes: u64,
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        let mut state = self.store.state();
        state.reserved = state.reserved.saturating_sub(self.bytes);
    }
}

/// Keeps a file while the artifact it belongs to is being made.
struct Held<'a> {
    store: &'a ArtifactStore,
    digest: Digest,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut state = self.store.state();
        self.store.unref(&mut state, &self.digest);
    }
}

/// A file in `temp/`, removed when dropped unless it was renamed away.
struct Temp {
    file: File,
    path: PathBuf,
}

impl Drop for Temp {
    fn drop(&mut self) {
        drop(fs::remove_file(&self.path));
    }
}

impl ArtifactStore {
    fn state(&self) -> MutexGuard<'_, State> {
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn blob_path(&self, digest: &Digest) -> PathBuf {
        let hex = digest.to_string();
        self.inner.dir.join("blobs").join(&hex[..2]).join(hex)
    }

    fn tree_path(&self, digest: &Digest) -> PathBuf {
        self.blob_path(digest).with_extension("tree")
    }

    fn partial_dir(&self, digest: &Digest, bytes: u64) -> PathBuf {
        self.inner.dir.join("partial").join(format!("{digest}-{bytes}"))
    }

    fn root_path(&self, artifact: &ArtifactRef, complete: bool) -> PathBuf {
        let ArtifactRef { digest, bytes, kind } = artifact;
        let end = if complete { "" } else { "-part" };
        let name = format!("{kind}-{digest}-{}{end}", bytes.0);
        self.inner.dir.join("roots").join(name)
    }

    fn temp(&self) -> Result<Temp, StoreError> {
        let number = self.inner.temp_number.fetch_add(1, Ordering::Relaxed);
        let path = self.inner.dir.join("temp").join(number.to_string());
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(io_error(&path))?;
        Ok(Temp { file, path })
    }

    /// Promises room, evicting what was not used for longest.
    fn reserve(&self, needs: u64) -> Result<Room<'_>, StoreError> {
        let mut state = self.state();
        while state.used.saturating_add(state.reserved).saturating_add(needs) > self.inner.limit {
            let oldest = state
                .roots
                .iter()
                .filter(|(_, root)| root.pins == 0)
                .min_by_key(|(artifact, root)| (root.used_at, **artifact))
                .map(|(artifact, _)| *artifact);
            // Nothing is thrown out for something that cannot fit at all.
            let (Some(oldest), true) = (oldest, needs <= self.inner.limit) else {
                return Err(StoreError::Full {
                    needs: Bytes(needs),
                    limit: Bytes(self.inner.limit),
                    pinned: Bytes(self.pinned(&state).saturating_add(state.reserved)),
                });
            };
            tracing::info!(artifact = %oldest, "evicted to make room");
            self.forget(&mut state, &oldest);
        }
        state.reserved += needs;
        Ok(Room {
            store: self,
            bytes: needs,
        })
    }

    fn pinned(&self, state: &State) -> u64 {
        let held: HashSet<_> = state
            .roots
            .values()
            .filter(|root| root.pins > 0)
            .flat_map(|root| &root.members)
            .collect();
        let whole: u64 = held
            .iter()
            .filter_map(|d| state.blobs.get(d))
            .map(|b| cost(*b))
            .sum();
        let partial = state.partials.keys().filter(|(d, _)| held.contains(d));
        whole + partial.map(|(_, bytes)| cost(*bytes)).sum::<u64>()
    }

    /// Drops an artifact and every file that nothing else wants.
    fn forget(&self, state: &mut State, artifact: &ArtifactRef) {
        if let Some(root) = state.roots.remove(artifact) {
            // First the name: after a crash in between, the files are orphans and swept at the next start.
            drop(fs::remove_file(self.root_path(artifact, root.complete)));
            for digest in &root.members {
                self.unref(state, digest);
            }
        }
    }

    fn unref(&self, state: &mut State, digest: &Digest) {
        if let Some(count) = state.refs.get_mut(digest) {
            *count -= 1;
            if *count == 0 {
                state.refs.remove(digest);
                self.delete_file(state, digest);
            }
        }
    }

    fn delete_file(&self, state: &mut State, digest: &Digest) {
        if let Some(bytes) = state.blobs.remove(digest) {
            drop(fs::remove_file(self.blob_path(digest)));
            drop(fs::remove_file(self.tree_path(digest)));
            state.used = state.used.saturating_sub(cost(bytes));
        }
        let partials: Vec<_> = state
            .partials
            .keys()
            .filter(|(d, _)| d == digest)
            .copied()
            .collect();
        for key in partials {
            drop(fs::remove_dir_all(self.partial_dir(&key.0, key.1)));
            state.partials.remove(&key);
            state.used = state.used.saturating_sub(cost(key.1));
        }
    }

    /// Notes that an artifact is used now, on disk at most once a minute.
    fn stamp(&self, artifact: &ArtifactRef, root: &mut Root) {
        let now = millis_now();
        let stale = now.saturating_sub(root.used_at) > 60_000;
        // Strictly later than before, so that order survives calls within one millisecond.
        root.used_at = now.max(root.used_at + 1);
        if stale && let Ok(file) = File::open(self.root_path(artifact, root.complete)) {
            drop(file.set_modified(SystemTime::now()));
        }
    }

    fn touch(&self, artifact: &ArtifactRef) -> Result<(), StoreError> {
        match self.state().roots.get_mut(artifact) {
            Some(root) if root.complete => {
                self.stamp(artifact, root);
                Ok(())
            }
            _ => Err(StoreError::Missing { artifact: *artifact }),
        }
    }

    fn write_root(&self, artifact: &ArtifactRef, complete: bool) -> Result<(), StoreError> {
        let path = self.root_path(artifact, complete);
        File::create(&path).map_err(io_error(&path))?;
        sync_dir(&self.inner.dir.join("roots"))
    }

    fn insert_root(
        &self,
        state: &mut State,
        artifact: ArtifactRef,
        complete: bool,
        used_at: u64,
        members: HashSet<Digest>,
    ) {
        for digest in &members {
            *state.refs.entry(*digest).or_default() += 1;
        }
        let root = Root {
            complete,
            used_at,
            pins: 0,
            members,
        };
        state.roots.insert(artifact, root);
    }

    /// Makes an artifact of files that are all here.
    fn commit(&self, artifact: ArtifactRef, members: HashSet<Digest>) -> Result<(), StoreError> {
        let mut state = self.state();
        let latest = state.roots.values().map(|root| root.used_at).max().unwrap_or(0);
        if let Some(root) = state.roots.get(&artifact)
            && root.complete
        {
            if let Some(root) = state.roots.get_mut(&artifact) {
                self.stamp(&artifact, root);
            }
            return Ok(());
        }
        self.write_root(&artifact, true)?;
        let pins = state.roots.get(&artifact).map_or(0, |root| root.pins);
        if let Some(part) = state.roots.remove(&artifact) {
            drop(fs::remove_file(self.root_path(&artifact, false)));
            let used_at = millis_now().max(latest + 1);
            self.insert_root(&mut state, artifact, true, used_at, members);
            for digest in &part.members {
                self.unref(&mut state, digest);
            }
        } else {
            self.insert_root(&mut state, artifact, true, millis_now().max(latest + 1), members);
        }
        if let Some(root) = state.roots.get_mut(&artifact) {
            root.pins = pins;
        }
        Ok(())
    }

    /// Copies a file into `blobs/`, hashing on the way.
    fn take_in(&self, path: &Path) -> Result<(Digest, u64, Held<'_>), StoreError> {
        let source = File::open(path).map_err(io_error(path))?;
        let meta = source.metadata().map_err(io_error(path))?;
        if !meta.is_file() {
            return Err(StoreError::Unsupported {
                path: path.to_owned(),
                why: "it is not a regular file",
            });
        }
        let bytes = meta.len();
        let room = self.reserve(cost(bytes))?;
        let data = self.temp()?;
        let tree = self.temp()?;
        let mut reader = &source;
        let digest = make_outboard(
            bytes,
            &mut |buffer| {
                reader.read_exact(buffer).map_err(|e| match e.kind() {
                    io::ErrorKind::UnexpectedEof => io::Error::other("it became shorter while being read"),
                    _ => e,
                })?;
                (&data.file).write_all(buffer)
            },
            &mut |at, pairs| tree.file.write_all_at(pairs, at),
        )
        .map_err(io_error(path))?;
        let held = self.place(digest, bytes, data, tree, room)?;
        Ok((digest, bytes, held))
    }

    fn take_bytes(&self, bytes: &[u8]) -> Result<(Digest, Held<'_>), StoreError> {
        let size = bytes.len() as u64;
        let room = self.reserve(cost(size))?;
        let data = self.temp()?;
        let tree = self.temp()?;
        let mut rest = bytes;
        (&data.file).write_all(bytes).map_err(io_error(&data.path))?;
        let digest = make_outboard(size, &mut |buffer| rest.read_exact(buffer), &mut |at, pairs| {
            tree.file.write_all_at(pairs, at)
        })
        .map_err(io_error(&tree.path))?;
        let held = self.place(digest, size, data, tree, room)?;
        Ok((digest, held))
    }

    /// Syncs and renames a finished file into place.
    fn place(
        &self,
        digest: Digest,
        bytes: u64,
        data: Temp,
        tree: Temp,
        room: Room<'_>,
    ) -> Result<Held<'_>, StoreError> {
        let known = self.blob_bytes(&digest).is_some();
        if !known {
            data.file
                .set_permissions(fs::Permissions::from_mode(0o444))
                .and_then(|()| data.file.sync_all())
                .and_then(|()| tree.file.sync_all())
                .map_err(io_error(&data.path))?;
        }
        let mut state = self.state();
        let here = state.blobs.contains_key(&digest);
        if !here {
            if known {
                // It went while we hashed; the next attempt will write it.
                return Err(StoreError::Io {
                    path: self.blob_path(&digest),
                    error: io::Error::other("evicted meanwhile: try again"),
                });
            }
            let path = self.blob_path(&digest);
            make_parent(&path)?;
            if outboard_bytes(bytes) > 0 {
                let path = self.tree_path(&digest);
                fs::rename(&tree.path, &path).map_err(io_error(&path))?;
            }
            fs::rename(&data.path, &path).map_err(io_error(&path))?;
            if let Some(parent) = path.parent() {
                sync_dir(parent)?;
            }
            state.blobs.insert(digest, bytes);
            state.used += cost(bytes);
        }
        *state.refs.entry(digest).or_default() += 1;
        drop(state);
        drop(room);
        Ok(Held { store: self, digest })
    }

    fn read_blob(&self, digest: &Digest) -> Result<Vec<u8>, StoreError> {
        let path = self.blob_path(digest);
        fs::read(&path).map_err(io_error(&path))
    }

    fn materialise(&self, artifact: &ArtifactRef, dest: &Path, by_link: bool) -> Result<(), StoreError> {
        let _pin = self.pin(artifact)?;
        if fs::symlink_metadata(dest).is_ok() {
            return Err(StoreError::Unsupported {
                path: dest.to_owned(),
                why: "something exists there already: choose another place",
            });
        }
        let mut name = dest.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}.karez-part", std::process::id()));
        let part = dest.with_file_name(name);
        let result = self
            .materialise_at(artifact, &part, by_link)
            .and_then(|()| fs::rename(&part, dest).map_err(io_error(dest)));
        if result.is_err() {
            drop(fs::remove_file(&part));
            drop(fs::remove_dir_all(&part));
        }
        result
    }

    fn materialise_at(&self, artifact: &ArtifactRef, part: &Path, by_link: bool) -> Result<(), StoreError> {
        if artifact.kind == ArtifactKind::Blob {
            return self.materialise_file(&artifact.digest, part, by_link);
        }
        fs::create_dir(part).map_err(io_error(part))?;
        for entry in Manifest::decode(&self.read_blob(&artifact.digest)?)?.entries() {
            // The manifest has checked every path: relative, no `..`, and the directory is fresh: no links in it.
            let path = part.join(&entry.path);
            make_parent(&path)?;
            self.materialise_file(&entry.digest, &path, by_link)?;
        }
        Ok(())
    }

    fn materialise_file(&self, digest: &Digest, to: &Path, by_link: bool) -> Result<(), StoreError> {
        let from = self.blob_path(digest);
        if by_link && fs::hard_link(&from, to).is_ok() {
            return Ok(());
        }
        fs::copy(&from, to).map_err(io_error(to))?;
        // A copy is its owner's to change.
        fs::set_permissions(to, fs::Permissions::from_mode(0o644)).map_err(io_error(to))?;
        File::open(to).and_then(|f| f.sync_all()).map_err(io_error(to))
    }

    /// Rebuilds the tables from the folders, and sweeps what nothing wants.
    fn load(&self) -> Result<(), StoreError> {
        let temp = self.inner.dir.join("temp");
        for path in list_dir(&temp)? {
            fs::remove_file(&path).map_err(io_error(&path))?;
        }
        let mut state = self.state();
        for folder in list_dir(&self.inner.dir.join("blobs"))? {
            for path in list_dir(&folder)? {
                let name = file_name(&path);
                if let Ok(digest) = name.parse::<Digest>() {
                    let bytes = fs::metadata(&path).map_err(io_error(&path))?.len();
                    let tree = fs::metadata(self.tree_path(&digest)).map_or(0, |m| m.len());
                    if tree == outboard_bytes(bytes) {
                        state.blobs.insert(digest, bytes);
                        state.used += cost(bytes);
                        continue;
                    }
                } else if let Some(digest) = name.strip_suffix(".tree").and_then(|n| n.parse().ok())
                    && self.blob_path(&digest).exists()
                {
                    continue;
                }
                fs::remove_file(&path).map_err(io_error(&path))?;
            }
        }
        for path in list_dir(&self.inner.dir.join("partial"))? {
            match parse_partial(&file_name(&path)) {
                Some((digest, bytes)) => {
                    state.partials.insert((digest, bytes), Weak::new());
                    state.used += cost(bytes);
                }
                None => drop(fs::remove_dir_all(&path)),
            }
        }
        for path in list_dir(&self.inner.dir.join("roots"))? {
            let Some((artifact, said_complete)) = parse_root(&file_name(&path)) else {
                drop(fs::remove_file(&path));
                continue;
            };
            let manifest = self.read_blob(&artifact.digest).ok();
            let members = match artifact.kind {
                ArtifactKind::Blob => HashSet::from([artifact.digest]),
                ArtifactKind::Tree => manifest
                    .and_then(|bytes| Manifest::decode(&bytes).ok())
                    .map_or_else(
                        || HashSet::from([artifact.digest]),
                        |m| members_of(artifact.digest, &m),
                    ),
            };
            let here = members.iter().all(|digest| state.blobs.contains_key(digest));
            let complete = said_complete && here;
            if said_complete && !complete {
                tracing::warn!(%artifact, "files are missing: marked as incomplete");
                fs::rename(&path, self.root_path(&artifact, false)).map_err(io_error(&path))?;
            }
            let used_at = fs::metadata(self.root_path(&artifact, complete))
                .and_then(|m| m.modified())
                .ok()
                .and_then(|at| at.duration_since(UNIX_EPOCH).ok())
                .map_or(0, |at| u64::try_from(at.as_millis()).unwrap_or(u64::MAX));
            self.insert_root(&mut state, artifact, complete, used_at, members);
        }
        let orphans: HashSet<_> = state
            .blobs
            .keys()
            .chain(state.partials.keys().map(|(digest, _)| digest))
            .filter(|digest| !state.refs.contains_key(digest))
            .copied()
            .collect();
        for digest in orphans {
            self.delete_file(&mut state, &digest);
        }
        Ok(())
    }
}

/// An unfinished file: sparse data, its outboard, and which blocks are there. Survives a restart.
#[derive(Debug)]
pub(crate) struct Partial {
    digest: Digest,
    bytes: u64,
    dir: PathBuf,
    data: File,
    tree: File,
    map: Mutex<BlockMap>,
}

#[derive(Debug)]
struct BlockMap {
    bits: Vec<u8>,
    missing: u64,
    unsaved: u64,
    saved_at: Instant,
}

const MAP_HEADER: &[u8; 8] = b"karezmap";
/// What was received is made durable, and the map saved, after so many bytes.
const SAVE_EVERY_BYTES: u64 = 1 << 30;
/// ... or after so long.
const SAVE_EVERY: Duration = Duration::from_secs(5);

impl Partial {
    fn open(dir: &Path, digest: Digest, bytes: u64) -> Result<Self, StoreError> {
        fs::create_dir_all(dir).map_err(io_error(dir))?;
        let open = |name: &str, length: u64| {
            let path = dir.join(name);
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&path)
                .map_err(io_error(&path))?;
            let before = file.metadata().map_err(io_error(&path))?.len();
            file.set_len(length).map_err(io_error(&path))?;
            Ok::<_, StoreError>((file, before == length))
        };
        let (data, data_whole) = open("data", bytes)?;
        let (tree, tree_whole) = open("tree", outboard_bytes(bytes))?;
        let blocks = blocks_of(bytes);
        let bits = fs::read(dir.join("map"))
            .ok()
            .filter(|_| data_whole && tree_whole)
            .and_then(|map| map.strip_prefix(MAP_HEADER).map(<[u8]>::to_vec))
            .filter(|bits| bits.len() as u64 == blocks.div_ceil(8))
            .unwrap_or_else(|| vec![0; blocks.div_ceil(8) as usize]);
        let there = (0..blocks).filter(|b| bit(&bits, *b)).count() as u64;
        Ok(Self {
            digest,
            bytes,
            dir: dir.to_owned(),
            data,
            tree,
            map: Mutex::new(BlockMap {
                bits,
                missing: blocks - there,
                unsaved: 0,
                saved_at: Instant::now(),
            }),
        })
    }

    fn map(&self) -> MutexGuard<'_, BlockMap> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn digest(&self) -> Digest {
        self.digest
    }

    /// Runs of blocks `within` a range that are not here yet, in order, none longer than `blocks_max`.
    pub(crate) fn missing(&self, within: Range<u64>, blocks_max: u64) -> Vec<Range<u64>> {
        let map = self.map();
        let mut runs: Vec<Range<u64>> = Vec::new();
        for block in within.start..within.end.min(blocks_of(self.bytes)) {
            if bit(&map.bits, block) {
                continue;
            }
            match runs.last_mut() {
                Some(run) if run.end == block && run.end - run.start < blocks_max => run.end += 1,
                _ => runs.push(block..block + 1),
            }
        }
        runs
    }

    /// Bytes that are here.
    pub(crate) fn present(&self) -> u64 {
        let map = self.map();
        let blocks = blocks_of(self.bytes);
        let last = self.bytes - (blocks - 1) * BLOCK_BYTES;
        let whole = (blocks - map.missing) * BLOCK_BYTES;
        if bit(&map.bits, blocks - 1) {
            whole - BLOCK_BYTES + last
        } else {
            whole
        }
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.map().missing == 0
    }

    /// Writes a verified batch, which is one block.
    pub(crate) fn write(&self, batch: &Batch, encoded: &[u8]) -> Result<(), StoreError> {
        let data_path = || self.dir.join("data");
        let Some((first, _)) = batch.groups.first() else {
            return Ok(());
        };
        let slices: Vec<_> = batch
            .groups
            .iter()
            .map(|(_, at)| IoSlice::new(&encoded[at.clone()]))
            .collect();
        write_all_vectored_at(&self.data, slices, *first).map_err(|e| io_error(&data_path())(e))?;
        // Pairs follow each other in the outboard except where a subtree was skipped.
        let mut run: (u64, Vec<u8>) = (0, Vec::new());
        for (offset, at) in &batch.pairs {
            if run.0 + run.1.len() as u64 != *offset {
                self.tree
                    .write_all_at(&run.1, run.0)
                    .map_err(|e| io_error(&self.dir)(e))?;
                run = (*offset, Vec::with_capacity(1024));
            }
            run.1.extend_from_slice(&encoded[at.clone()]);
        }
        self.tree
            .write_all_at(&run.1, run.0)
            .map_err(|e| io_error(&self.dir)(e))?;
        let block = first / BLOCK_BYTES;
        let mut map = self.map();
        if !bit(&map.bits, block) {
            map.bits[(block / 8) as usize] |= 1 << (block % 8);
            map.missing -= 1;
            map.unsaved += BLOCK_BYTES;
        }
        Ok(())
    }

    /// Whether enough has arrived, or enough time passed, since the last [`Partial::save`].
    pub(crate) fn wants_save(&self) -> bool {
        let map = self.map();
        map.unsaved >= SAVE_EVERY_BYTES || (map.unsaved > 0 && map.saved_at.elapsed() >= SAVE_EVERY)
    }

    fn sync(&self) -> Result<(), StoreError> {
        self.data
            .sync_data()
            .and_then(|()| self.tree.sync_data())
            .map_err(io_error(&self.dir))
    }

    /// Makes what has arrived durable, then says so in the map: never the other way round.
    pub(crate) fn save(&self) -> Result<(), StoreError> {
        let bits = {
            let mut map = self.map();
            if map.unsaved == 0 {
                return Ok(());
            }
            map.unsaved = 0;
            map.saved_at = Instant::now();
            map.bits.clone()
        };
        if !self.dir.exists() {
            // Evicted, or finished by another transfer.
            return Ok(());
        }
        self.sync()?;
        let (part, path) = (self.dir.join("map.part"), self.dir.join("map"));
        fs::write(&part, [MAP_HEADER.as_slice(), &bits].concat())
            .and_then(|()| File::open(&part)?.sync_all())
            .and_then(|()| fs::rename(&part, &path))
            .map_err(io_error(&path))
    }
}

impl Drop for Partial {
    /// A transfer that is dropped in the middle keeps what it has.
    fn drop(&mut self) {
        if let Err(error) = self.save() {
            tracing::warn!(%error, "what arrived last will be fetched again");
        }
    }
}

fn bit(bits: &[u8], at: u64) -> bool {
    bits[(at / 8) as usize] & (1 << (at % 8)) != 0
}

fn write_all_vectored_at(file: &File, mut slices: Vec<IoSlice<'_>>, mut offset: u64) -> io::Result<()> {
    let mut rest = slices.as_mut_slice();
    while !rest.is_empty() {
        let written = rustix::io::pwritev(file, rest, offset)?;
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        offset += written as u64;
        IoSlice::advance_slices(&mut rest, written);
    }
    Ok(())
}

fn members_of(manifest_digest: Digest, manifest: &Manifest) -> HashSet<Digest> {
    let files = manifest.entries().iter().map(|entry| entry.digest);
    files.chain([manifest_digest]).collect()
}

fn parse_partial(name: &str) -> Option<(Digest, u64)> {
    let (digest, bytes) = name.split_once('-')?;
    Some((digest.parse().ok()?, bytes.parse().ok()?))
}

fn parse_root(name: &str) -> Option<(ArtifactRef, bool)> {
    let (name, complete) = match name.strip_suffix("-part") {
        Some(name) => (name, false),
        None => (name, true),
    };
    Some((name.replace('-', ":").parse().ok()?, complete))
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

fn list_dir(path: &Path) -> Result<Vec<PathBuf>, StoreError> {
    fs::read_dir(path)
        .and_then(|entries| entries.map(|e| e.map(|e| e.path())).collect())
        .map_err(io_error(path))
}

fn make_parent(path: &Path) -> Result<(), StoreError> {
    match path.parent() {
        Some(parent) => fs::create_dir_all(parent).map_err(io_error(parent)),
        None => Ok(()),
    }
}

fn sync_dir(path: &Path) -> Result<(), StoreError> {
    File::open(path)
        .and_then(|dir| dir.sync_all())
        .map_err(io_error(path))
}

/// All files below `dir`, as manifest paths. Symbolic links are refused.
fn list_files(dir: &Path, prefix: &str, depth: usize, out: &mut Vec<String>) -> Result<(), StoreError> {
    let unsupported = |path: PathBuf, why| Err(StoreError::Unsupported { path, why });
    if depth > 64 {
        return unsupported(dir.to_owned(), "directories are nested more than 64 deep");
    }
    let mut entries = fs::read_dir(dir)
        .and_then(|entries| entries.collect::<io::Result<Vec<_>>>())
        .map_err(io_error(dir))?;
    entries.sort_by_key(|entry| entry.file_name());
    for entry in entries {
        let path = entry.path();
        let Ok(name) = entry.file_name().into_string() else {
            return unsupported(path, "its name is not UTF-8");
        };
        let name = if prefix.is_empty() {
            name
        } else {
            format!("{prefix}/{name}")
        };
        manifest::check_path(&name)?;
        let kind = entry.file_type().map_err(io_error(&path))?;
        if kind.is_dir() {
            list_files(&path, &name, depth + 1, out)?;
        } else if kind.is_file() {
            if out.len() >= manifest::ENTRIES_MAX {
                return Err(ManifestError::TooLarge {
                    what: "files",
                    max: manifest::ENTRIES_MAX,
                }
                .into());
            }
            out.push(name);
        } else {
            return unsupported(
                path,
                "it is neither a file nor a directory (links are not followed)",
            );
        }
    }
    Ok(())
}

/// The largest manifest, as a blob size.
pub(crate) const MANIFEST_MAX: u64 = MANIFEST_BYTES_MAX as u64;
/// Files up to this size arrive whole.
pub(crate) const SMALL_BYTES: u64 = verified::BLOCK_BYTES;
