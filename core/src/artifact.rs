//! References to content-addressed files and directories. Moving and storing them is `net`'s work.
use crate::{id::Digest, prelude::*, unit::Bytes};
use core::fmt;
use serde::{Deserialize, Serialize};

/// A file, or a directory by its manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ArtifactKind {
    /// One file: the digest is the plain BLAKE3 of its bytes.
    Blob,
    /// A directory: the digest is the BLAKE3 of its manifest.
    Tree,
    /// No content: a model that a provider's own server answers for, known by its name alone. See [`ArtifactRef::served`].
    Served,
}

/// How the device class of a provider's own server begins; its model's name follows.
pub const SERVER_CLASS: &str = "server/";

/// What names an artifact, with its size in bytes (of a tree: of all its files).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ArtifactRef {
    /// BLAKE3 of the content.
    pub digest: Digest,
    /// Content size.
    pub bytes: Bytes,
    /// File or directory.
    pub kind: ArtifactKind,
}

impl ArtifactRef {
    /// The model of that name on providers' own servers. The digest is of the name: nobody can say what its weights are.
    pub fn served(name: &str) -> Self {
        Self {
            digest: Digest::of(format!("karez served model\0{name}").as_bytes()),
            bytes: Bytes::ZERO,
            kind: ArtifactKind::Served,
        }
    }

    /// Whether there is content to fetch.
    pub fn is_content(&self) -> bool {
        self.kind != ArtifactKind::Served
    }

    /// Whether a device of that class can run this model: a provider's own server only the one it answers for, all
    /// other devices only models that have content.
    pub fn runs_on(&self, device_class: &str) -> bool {
        match (device_class.strip_prefix(SERVER_CLASS), self.kind) {
            (Some(name), ArtifactKind::Served) => *self == Self::served(name),
            (None, ArtifactKind::Served) | (Some(_), _) => false,
            (None, _) => true,
        }
    }
}

impl fmt::Display for ArtifactKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Blob => "blob",
            Self::Tree => "tree",
            Self::Served => "served",
        })
    }
}

impl fmt::Display for ArtifactRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.kind, self.digest, self.bytes.0)
    }
}

/// Text that is no artifact reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not an artifact reference: expected blob:DIGEST:BYTES or tree:DIGEST:BYTES")]
pub struct ArtifactRefError {
    text: String,
}

impl core::str::FromStr for ArtifactRef {
    type Err = ArtifactRefError;
    fn from_str(text: &str) -> Result<Self, ArtifactRefError> {
        let bad = || ArtifactRefError {
            text: text.chars().take(100).collect(),
        };
        let mut fields = text.split(':');
        let kind = match fields.next() {
            Some("blob") => ArtifactKind::Blob,
            Some("tree") => ArtifactKind::Tree,
            Some("served") => ArtifactKind::Served,
            _ => return Err(bad()),
        };
        let digest = fields.next().and_then(|d| d.parse().ok()).ok_or_else(bad)?;
        let bytes = fields
            .next()
            .and_then(|b| b.parse().ok())
            .map(Bytes)
            .ok_or_else(bad)?;
        if fields.next().is_some() {
            Err(bad())
        } else {
            Ok(Self { digest, bytes, kind })
        }
    }
}
