//! Opening a store: its tables are rebuilt from the folders, and what a crash left is swept.
use super::{
    ArtifactStore, Slot, cost,
    error::{StoreError, io_error},
    files::members_of,
};
use crate::{manifest::Manifest, verified::outboard_bytes};
use karez_core::{
    artifact::{ArtifactKind, ArtifactRef},
    id::Digest,
};
use std::{
    collections::HashSet,
    fs,
    path::{Path, PathBuf},
    time::UNIX_EPOCH,
};

impl ArtifactStore {
    /// Rebuilds the tables from the folders, and sweeps what nothing wants.
    pub(super) fn load(&self) -> Result<(), StoreError> {
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
                    state.partials.insert((digest, bytes), Slot::default());
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
                ArtifactKind::Blob | ArtifactKind::Served => HashSet::from([artifact.digest]),
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
