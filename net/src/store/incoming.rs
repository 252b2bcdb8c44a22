//! The store as transfers use it: artifacts announced, files verified as they arrive, files served.
use super::{
    ArtifactStore, Pin, State, cost,
    error::{StoreError, io_error},
    files::{Lasting, make_parent, members_of, sync_dir},
    millis_now,
    partial::Partial,
};
use crate::{manifest::Manifest, verified::outboard_bytes};
use karez_core::{artifact::ArtifactRef, id::Digest};
use std::{
    collections::HashSet,
    fs::{self, File},
    os::unix::fs::PermissionsExt,
    sync::Arc,
};

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
        let (found, held) = self.take_bytes(bytes, Lasting::Now)?;
        debug_assert_eq!(found, *digest);
        // The artifact under way holds its own reference.
        drop(held);
        Ok(())
    }

    /// The unfinished file of a digest, begun now or left by an earlier transfer.
    pub(crate) fn partial(&self, digest: &Digest, bytes: u64) -> Result<Arc<Partial>, StoreError> {
        let key = (*digest, bytes);
        let (begun, map) = match self.state().partials.get(&key) {
            Some(slot) => match slot.open.upgrade() {
                Some(partial) => return Ok(partial),
                None => (true, slot.map.clone()),
            },
            None => (false, None),
        };
        let room = if begun {
            None
        } else {
            Some(self.reserve(cost(bytes))?)
        };
        let mut partial = Partial::open(&self.partial_dir(digest, bytes), *digest, bytes, map)?;
        let mut state = self.state();
        if !state.partials.contains_key(&key) {
            state.used += cost(bytes);
        }
        let slot = state.partials.entry(key).or_default();
        if let Some(other) = slot.open.upgrade() {
            return Ok(other);
        }
        partial.share(slot.map.get_or_insert_with(|| partial.map.clone()).clone());
        let partial = Arc::new(partial);
        slot.open = Arc::downgrade(&partial);
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
        partial.lock().unsaved = 0;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verified::{BLOCK_BYTES, Batch};
    use karez_core::unit::Bytes;

    #[test]
    fn what_an_ending_transfer_brought_is_known_to_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let store = ArtifactStore::open(dir.path(), Bytes(1 << 30)).unwrap();
        let (digest, blocks) = (Digest::of(b"a file on its way"), 64);
        let open = || store.partial(&digest, blocks * BLOCK_BYTES).unwrap();
        for block in 0..blocks {
            let partial = open();
            let batch = Batch {
                pairs: Vec::new(),
                groups: vec![(block * BLOCK_BYTES, 0..16)],
            };
            partial.write(&batch, &[7; 16]).unwrap();
            // It saves what it has while the next one begins.
            let ending = std::thread::spawn(move || drop(partial));
            let missing = open().missing(0..u64::MAX, blocks);
            ending.join().unwrap();
            let rest = Some(block + 1..blocks).filter(|rest| !rest.is_empty());
            assert_eq!(missing, Vec::from_iter(rest), "after block {block}");
        }
    }
}
