//! What can go wrong, in words for people.
use crate::manifest::ManifestError;
use karez_core::{artifact::ArtifactRef, id::Digest, unit::Bytes};
use std::{
    io,
    path::{Path, PathBuf},
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
fn human(bytes: &Bytes) -> String {
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

pub(super) fn io_error(path: &Path) -> impl Fn(io::Error) -> StoreError {
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
