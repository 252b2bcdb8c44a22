//! Manifests: a directory as a list of files, in one canonical form, so that equal directories have equal digests.
//!
//! The form is text. After the line `karez-manifest 1` comes one line for each file, sorted by path:
//! 64 hex digits of BLAKE3, the size in bytes, the path, one space between. Empty directories, permissions and
//! times are not kept. [`Manifest::decode`] accepts nothing but the canonical form.
use karez_core::{id::Digest, unit::Bytes};
use std::fmt::Write;

/// Files in one directory artifact.
pub const ENTRIES_MAX: usize = 100_000;
/// A manifest's own size.
pub const MANIFEST_BYTES_MAX: usize = 16 * 1024 * 1024;
/// A path, in bytes.
pub const PATH_BYTES_MAX: usize = 1024;
/// One component of a path, in bytes: what common file systems take.
const COMPONENT_BYTES_MAX: usize = 255;
const HEADER: &str = "karez-manifest 1\n";

/// Why a manifest or a path was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// A path that could lead outside its directory, or that not every system can hold.
    #[error("the path {path:?} is refused: {why}")]
    Path {
        /// The path, shortened.
        path: String,
        /// The rule it breaks.
        why: &'static str,
    },
    /// Two entries for one place.
    #[error("the path {path:?} appears twice, or is both a file and a directory")]
    Clash {
        /// The path.
        path: String,
    },
    /// Over a cap.
    #[error("a directory of {what} exceeds the limit of {max}: pack it into fewer, larger files")]
    TooLarge {
        /// What there is too much of.
        what: &'static str,
        /// The cap.
        max: usize,
    },
    /// Not in the canonical form.
    #[error("not a manifest: line {line} {why}")]
    Malformed {
        /// From 1.
        line: usize,
        /// What is wrong.
        why: &'static str,
    },
}

/// One file of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestEntry {
    /// Relative path with `/` between its parts.
    pub path: String,
    /// Size.
    pub bytes: Bytes,
    /// BLAKE3 of the content.
    pub digest: Digest,
}

/// A directory: its files, sorted by path. Every path in it has been checked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Manifest {
    entries: Vec<ManifestEntry>,
}

impl Manifest {
    /// Sorts and checks the files.
    pub fn new(mut entries: Vec<ManifestEntry>) -> Result<Self, ManifestError> {
        if entries.len() > ENTRIES_MAX {
            return Err(too_many());
        }
        entries.sort_by(|a, b| a.path.cmp(&b.path));
        for entry in &entries {
            check_path(&entry.path)?;
        }
        let manifest = Self { entries };
        manifest.check_clashes()?;
        if manifest.encoded_len() > MANIFEST_BYTES_MAX {
            return Err(ManifestError::TooLarge {
                what: "manifest bytes",
                max: MANIFEST_BYTES_MAX,
            });
        }
        Ok(manifest)
    }

    /// The files, sorted by path.
    pub fn entries(&self) -> &[ManifestEntry] {
        &self.entries
    }

    /// The sizes of all files together.
    pub fn total(&self) -> Bytes {
        self.entries
            .iter()
            .fold(Bytes::ZERO, |sum, entry| sum.saturating_add(entry.bytes))
    }

    /// The canonical bytes; their BLAKE3 names the directory.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = String::with_capacity(self.encoded_len());
        out.push_str(HEADER);
        for entry in &self.entries {
            // Writing to a string cannot fail.
            let _ = writeln!(out, "{} {} {}", entry.digest, entry.bytes.0, entry.path);
        }
        out.into_bytes()
    }

    /// Reads the canonical form and nothing else: a manifest that decodes encodes to the same bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, ManifestError> {
        if bytes.len() > MANIFEST_BYTES_MAX {
            return Err(ManifestError::TooLarge {
                what: "manifest bytes",
                max: MANIFEST_BYTES_MAX,
            });
        }
        let malformed = |line, why| ManifestError::Malformed { line, why };
        let text = std::str::from_utf8(bytes).map_err(|_| malformed(1, "is not UTF-8"))?;
        let body = text
            .strip_prefix(HEADER)
            .ok_or(malformed(1, "is not \"karez-manifest 1\""))?;
        let mut entries = Vec::new();
        for (index, line) in body.split_inclusive('\n').enumerate() {
            let number = index + 2;
            if entries.len() >= ENTRIES_MAX {
                return Err(too_many());
            }
            let line = line
                .strip_suffix('\n')
                .ok_or(malformed(number, "has no line end"))?;
            let mut fields = line.splitn(3, ' ');
            let (Some(digest), Some(size), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
                return Err(malformed(number, "is not DIGEST SIZE PATH"));
            };
            let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
            if !digest.bytes().all(hex) {
                return Err(malformed(number, "has a digest that is not lower-case hex"));
            }
            let digest = digest
                .parse()
                .map_err(|_| malformed(number, "has a digest that is not 64 hex digits"))?;
            let canonical =
                size.bytes().all(|b| b.is_ascii_digit()) && (size == "0" || !size.starts_with('0'));
            let bytes = size
                .parse()
                .ok()
                .filter(|_| canonical)
                .map(Bytes)
                .ok_or(malformed(number, "has a size that is not a plain number"))?;
            check_path(path)?;
            entries.push(ManifestEntry {
                path: path.to_owned(),
                bytes,
                digest,
            });
        }
        let manifest = Self { entries };
        if let Some(index) = manifest
            .entries
            .windows(2)
            .position(|pair| pair[0].path > pair[1].path)
        {
            return Err(malformed(index + 3, "is out of order"));
        }
        manifest.check_clashes()?;
        Ok(manifest)
    }

    fn encoded_len(&self) -> usize {
        let lines = self.entries.iter().map(|e| {
            let digits = e.bytes.0.checked_ilog10().unwrap_or(0) as usize + 1;
            64 + 1 + digits + 1 + e.path.len() + 1
        });
        HEADER.len() + lines.sum::<usize>()
    }

    /// No path twice, and none that is another's directory. Entries are sorted, but `a` and `a/b` need not be
    /// neighbours (`a-b` sorts between them), so directories are collected.
    fn check_clashes(&self) -> Result<(), ManifestError> {
        let files: std::collections::HashSet<&str> = self.entries.iter().map(|e| e.path.as_str()).collect();
        let clash = |path: &str| ManifestError::Clash {
            path: path.to_owned(),
        };
        if let Some(pair) = self.entries.windows(2).find(|pair| pair[0].path == pair[1].path) {
            return Err(clash(&pair[0].path));
        }
        for entry in &self.entries {
            for (end, _) in entry.path.match_indices('/') {
                if files.contains(&entry.path[..end]) {
                    return Err(clash(&entry.path[..end]));
                }
            }
        }
        Ok(())
    }
}

fn too_many() -> ManifestError {
    ManifestError::TooLarge {
        what: "files",
        max: ENTRIES_MAX,
    }
}

/// Accepts relative paths of plain components only.
pub fn check_path(path: &str) -> Result<(), ManifestError> {
    let refuse = |why| {
        Err(ManifestError::Path {
            path: path.chars().take(120).collect(),
            why,
        })
    };
    if path.is_empty() {
        return refuse("it is empty");
    }
    if path.len() > PATH_BYTES_MAX {
        return refuse("it is longer than 1024 bytes");
    }
    if path.starts_with('/') {
        return refuse("it is absolute");
    }
    if path.chars().any(|c| c.is_control() || c == '\\') {
        return refuse("it holds a control character or a backslash");
    }
    for component in path.split('/') {
        match component {
            "" => return refuse("it has an empty part"),
            "." | ".." => return refuse("it has a part \".\" or \"..\""),
            c if c.len() > COMPONENT_BYTES_MAX => return refuse("a part is longer than 255 bytes"),
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry(path: &str, bytes: u64) -> ManifestEntry {
        ManifestEntry {
            path: path.into(),
            bytes: Bytes(bytes),
            digest: Digest::of(path.as_bytes()),
        }
    }

    #[test]
    fn paths_that_lead_elsewhere_are_refused() {
        for bad in [
            "",
            "/etc/passwd",
            "..",
            "a/../b",
            "../x",
            "a//b",
            "a/",
            ".",
            "a/./b",
            "a\nb",
            "a\\b",
            "a\0b",
            "/",
        ] {
            assert!(check_path(bad).is_err(), "{bad:?}");
            let line = format!("{HEADER}{} 1 {bad}\n", Digest::of(b"x"));
            assert!(Manifest::decode(line.as_bytes()).is_err(), "{bad:?}");
        }
        assert!(check_path(&"a/".repeat(600)).is_err());
        assert!(check_path(&"a".repeat(256)).is_err());
        for good in ["a", "a/b.txt", "..a", "a b", "模型/权重.bin", "...", "-rf"] {
            assert_eq!(check_path(good), Ok(()), "{good:?}");
        }
    }

    #[test]
    fn clashes_and_disorder_are_refused() {
        for paths in [&["a", "a"][..], &["a", "a/b"], &["a", "a-b", "a/b"]] {
            let entries = paths.iter().map(|p| entry(p, 1)).collect();
            assert!(
                matches!(Manifest::new(entries), Err(ManifestError::Clash { .. })),
                "{paths:?}"
            );
        }
        let d = Digest::of(b"");
        for bad in [
            format!("{HEADER}{d} 1 b\n{d} 1 a\n"),
            format!("{HEADER}{d} 01 a\n"),
            format!("{HEADER}{d} +1 a\n"),
            format!("{HEADER}{d} 1 a"),
            format!("{HEADER}{d}  a\n"),
            format!("{HEADER}\n"),
            format!("{HEADER}{} 1 a\n", d.to_string().to_uppercase()),
            "karez-manifest 2\n".into(),
            String::new(),
        ] {
            assert!(Manifest::decode(bad.as_bytes()).is_err(), "{bad:?}");
        }
        assert_eq!(Manifest::decode(HEADER.as_bytes()), Ok(Manifest::default()));
    }

    proptest! {
        #[test]
        fn what_is_encoded_decodes_to_itself(files in prop::collection::btree_map("[a-c]{1,3}(/[d-f]{1,3}){0,2}", any::<u64>(), 0..20)) {
            let entries: Vec<_> = files.iter().map(|(path, bytes)| entry(path, *bytes)).collect();
            if let Ok(manifest) = Manifest::new(entries) {
                let bytes = manifest.encode();
                prop_assert_eq!(bytes.len(), manifest.encoded_len());
                prop_assert_eq!(Manifest::decode(&bytes), Ok(manifest));
            }
        }

        #[test]
        fn what_decodes_was_canonical(text in "karez-manifest 1\n([0-9a-f]{64} [0-9]{1,3} [a-c/.]{1,4}\n){0,3}") {
            if let Ok(manifest) = Manifest::decode(text.as_bytes()) {
                prop_assert_eq!(manifest.encode(), text.into_bytes());
            }
        }

        #[test]
        fn noise_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Manifest::decode(&bytes);
        }
    }
}
