//! Manifests of directories.
use karez_core::{id::Digest, unit::Bytes};

/// One file of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestEntry {
    /// Relative path.
    pub path: String,
    /// Size.
    pub bytes: Bytes,
    /// BLAKE3 of the content.
    pub digest: Digest,
}
/// A directory: its files, sorted by path.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Manifest {
    entries: Vec<ManifestEntry>,
}
impl Manifest {
    /// The files, sorted by path.
    pub fn entries(&self) -> &[ManifestEntry] {
        &self.entries
    }
}
