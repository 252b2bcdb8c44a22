//! How the store's files are laid out, written, counted and evicted.
use super::{
    ArtifactStore, Root, State, cost,
    error::{StoreError, io_error},
    millis_now,
};
use crate::{
    manifest::{self, Manifest, ManifestError},
    verified::{make_outboard, outboard_bytes},
};
use karez_core::{
    artifact::{ArtifactKind, ArtifactRef},
    id::Digest,
    unit::Bytes,
};
use std::{
    collections::HashSet,
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{MutexGuard, PoisonError, atomic::Ordering},
    time::SystemTime,
};

/// Gives promised room back when dropped.
pub(super) struct Room<'a> {
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
pub(super) struct Held<'a> {
    store: &'a ArtifactStore,
    digest: Digest,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut state = self.store.state();
        self.store.unref(&mut state, &self.digest);
    }
}

/// When what is added must outlive a power cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lasting {
    /// Before the call returns.
    Now,
    /// Once [`ArtifactStore::sync`] says so.
    Later,
}

/// A file in `temp/`, removed when dropped unless it was renamed away.
pub(super) struct Temp {
    file: File,
    path: PathBuf,
}

impl Drop for Temp {
    fn drop(&mut self) {
        drop(fs::remove_file(&self.path));
    }
}

fn write_pairs(tree: Option<&Temp>, pairs: &[u8], at: u64) -> io::Result<()> {
    tree.map_or(Ok(()), |tree| tree.file.write_all_at(pairs, at))
}

impl ArtifactStore {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn blob_path(&self, digest: &Digest) -> PathBuf {
        let hex = digest.to_string();
        self.inner.dir.join("blobs").join(&hex[..2]).join(hex)
    }

    pub(super) fn tree_path(&self, digest: &Digest) -> PathBuf {
        self.blob_path(digest).with_extension("tree")
    }

    pub(super) fn partial_dir(&self, digest: &Digest, bytes: u64) -> PathBuf {
        self.inner.dir.join("partial").join(format!("{digest}-{bytes}"))
    }

    pub(super) fn root_path(&self, artifact: &ArtifactRef, complete: bool) -> PathBuf {
        let ArtifactRef { digest, bytes, kind } = artifact;
        let end = if complete { "" } else { "-part" };
        let name = format!("{kind}-{digest}-{}{end}", bytes.0);
        self.inner.dir.join("roots").join(name)
    }

    pub(super) fn temp(&self) -> Result<Temp, StoreError> {
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

    /// A file for the outboard of so many bytes, where there is one: small files have none, and making and removing
    /// an empty file costs a file system more than all the rest.
    fn temp_tree(&self, bytes: u64) -> Result<Option<Temp>, StoreError> {
        match outboard_bytes(bytes) {
            0 => Ok(None),
            _ => self.temp().map(Some),
        }
    }

    /// Promises room, evicting what was not used for longest.
    pub(super) fn reserve(&self, needs: u64) -> Result<Room<'_>, StoreError> {
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

    pub(super) fn pinned(&self, state: &State) -> u64 {
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
    pub(super) fn forget(&self, state: &mut State, artifact: &ArtifactRef) {
        if let Some(root) = state.roots.remove(artifact) {
            state.unsynced.remove(artifact);
            // First the name: after a crash in between, the files are orphans and swept at the next start.
            drop(fs::remove_file(self.root_path(artifact, root.complete)));
            for digest in &root.members {
                self.unref(state, digest);
            }
        }
    }

    pub(super) fn unref(&self, state: &mut State, digest: &Digest) {
        if let Some(count) = state.refs.get_mut(digest) {
            *count -= 1;
            if *count == 0 {
                state.refs.remove(digest);
                self.delete_file(state, digest);
            }
        }
    }

    pub(super) fn delete_file(&self, state: &mut State, digest: &Digest) {
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
    pub(super) fn stamp(&self, artifact: &ArtifactRef, root: &mut Root) {
        let now = millis_now();
        let stale = now.saturating_sub(root.used_at) > 60_000;
        // Strictly later than before, so that order survives calls within one millisecond.
        root.used_at = now.max(root.used_at + 1);
        if stale && let Ok(file) = File::open(self.root_path(artifact, root.complete)) {
            drop(file.set_modified(SystemTime::now()));
        }
    }

    pub(super) fn touch(&self, artifact: &ArtifactRef) -> Result<(), StoreError> {
        match self.state().roots.get_mut(artifact) {
            Some(root) if root.complete => {
                self.stamp(artifact, root);
                Ok(())
            }
            _ => Err(StoreError::Missing { artifact: *artifact }),
        }
    }

    pub(super) fn write_root(&self, artifact: &ArtifactRef, complete: bool) -> Result<(), StoreError> {
        let path = self.root_path(artifact, complete);
        File::create(&path).map_err(io_error(&path))?;
        sync_dir(&self.inner.dir.join("roots"))
    }

    pub(super) fn insert_root(
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
    pub(super) fn commit(
        &self,
        artifact: ArtifactRef,
        members: HashSet<Digest>,
        last: Lasting,
    ) -> Result<(), StoreError> {
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
        match last {
            Lasting::Now => self.write_root(&artifact, true)?,
            // Its files have no name yet: a start finds them without an owner and sweeps them.
            Lasting::Later => drop(state.unsynced.insert(artifact)),
        }
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
    pub(super) fn take_in(&self, path: &Path) -> Result<(Digest, u64, Held<'_>), StoreError> {
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
        let tree = self.temp_tree(bytes)?;
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
            &mut |at, pairs| write_pairs(tree.as_ref(), pairs, at),
        )
        .map_err(io_error(path))?;
        let held = self.place(digest, bytes, data, tree, room, Lasting::Now)?;
        Ok((digest, bytes, held))
    }

    pub(super) fn take_bytes(
        &self,
        bytes: &[u8],
        lasting: Lasting,
    ) -> Result<(Digest, Held<'_>), StoreError> {
        let size = bytes.len() as u64;
        let room = self.reserve(cost(size))?;
        let data = self.temp()?;
        let tree = self.temp_tree(size)?;
        let mut rest = bytes;
        (&data.file).write_all(bytes).map_err(io_error(&data.path))?;
        let digest = make_outboard(size, &mut |buffer| rest.read_exact(buffer), &mut |at, pairs| {
            write_pairs(tree.as_ref(), pairs, at)
        })
        .map_err(io_error(&data.path))?;
        let held = self.place(digest, size, data, tree, room, lasting)?;
        Ok((digest, held))
    }

    /// Renames a finished file into place.
    pub(super) fn place(
        &self,
        digest: Digest,
        bytes: u64,
        data: Temp,
        tree: Option<Temp>,
        room: Room<'_>,
        lasting: Lasting,
    ) -> Result<Held<'_>, StoreError> {
        let known = self.blob_bytes(&digest).is_some();
        if !known {
            let write = || -> io::Result<()> {
                data.file.set_permissions(fs::Permissions::from_mode(0o444))?;
                if lasting == Lasting::Now {
                    data.file.sync_all()?;
                }
                if let (Lasting::Now, Some(tree)) = (lasting, &tree) {
                    tree.file.sync_all()?;
                }
                Ok(())
            };
            write().map_err(io_error(&data.path))?;
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
            if let Some(tree) = &tree {
                let path = self.tree_path(&digest);
                fs::rename(&tree.path, &path).map_err(io_error(&path))?;
            }
            fs::rename(&data.path, &path).map_err(io_error(&path))?;
            if let (Lasting::Now, Some(parent)) = (lasting, path.parent()) {
                sync_dir(parent)?;
            }
            state.blobs.insert(digest, bytes);
            state.used += cost(bytes);
        } else if lasting == Lasting::Now && state.unsynced.iter().any(|a| a.digest == digest) {
            self.sync_blob(&digest, bytes)?;
        }
        *state.refs.entry(digest).or_default() += 1;
        drop(state);
        drop(room);
        Ok(Held { store: self, digest })
    }

    pub(super) fn sync_blob(&self, digest: &Digest, bytes: u64) -> Result<(), StoreError> {
        let sync = |path: &Path| {
            File::open(path)
                .and_then(|file| file.sync_all())
                .map_err(io_error(path))
        };
        let path = self.blob_path(digest);
        sync(&path)?;
        if outboard_bytes(bytes) > 0 {
            sync(&self.tree_path(digest))?;
        }
        path.parent().map_or(Ok(()), sync_dir)
    }

    pub(super) fn read_blob(&self, digest: &Digest) -> Result<Vec<u8>, StoreError> {
        let path = self.blob_path(digest);
        fs::read(&path).map_err(io_error(&path))
    }

    pub(super) fn materialise(
        &self,
        artifact: &ArtifactRef,
        dest: &Path,
        by_link: bool,
    ) -> Result<(), StoreError> {
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

    pub(super) fn materialise_at(
        &self,
        artifact: &ArtifactRef,
        part: &Path,
        by_link: bool,
    ) -> Result<(), StoreError> {
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

    pub(super) fn materialise_file(
        &self,
        digest: &Digest,
        to: &Path,
        by_link: bool,
    ) -> Result<(), StoreError> {
        let from = self.blob_path(digest);
        if by_link && fs::hard_link(&from, to).is_ok() {
            return Ok(());
        }
        fs::copy(&from, to).map_err(io_error(to))?;
        // A copy is its owner's to change.
        fs::set_permissions(to, fs::Permissions::from_mode(0o644)).map_err(io_error(to))?;
        File::open(to).and_then(|f| f.sync_all()).map_err(io_error(to))
    }
}

pub(super) fn members_of(manifest_digest: Digest, manifest: &Manifest) -> HashSet<Digest> {
    let files = manifest.entries().iter().map(|entry| entry.digest);
    files.chain([manifest_digest]).collect()
}

pub(super) fn make_parent(path: &Path) -> Result<(), StoreError> {
    match path.parent() {
        Some(parent) => fs::create_dir_all(parent).map_err(io_error(parent)),
        None => Ok(()),
    }
}

pub(super) fn sync_dir(path: &Path) -> Result<(), StoreError> {
    File::open(path)
        .and_then(|dir| dir.sync_all())
        .map_err(io_error(path))
}

/// All files below `dir`, as manifest paths. Symbolic links are refused.
pub(super) fn list_files(
    dir: &Path,
    prefix: &str,
    depth: usize,
    out: &mut Vec<String>,
) -> Result<(), StoreError> {
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
