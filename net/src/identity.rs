//! A party's one key: drawn, kept in a file, and turned into the other forms in which the network names it.
//!
//! The file is PKCS#8 PEM, readable by its owner only. Start at [`create`] and [`load`].
use ed25519_dalek::pkcs8::{DecodePrivateKey, EncodePrivateKey, spki::der::pem::LineEnding};
use karez_core::key::{KeyError, PublicKey, SecretKey};
use libp2p::{PeerId, identity};
use std::{
    fs,
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

/// Key files are about 120 bytes; anything far larger is something else.
const FILE_BYTES_MAX: u64 = 4096;

/// Why a key file could not be made or read.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// Nothing there.
    #[error("no key at {path}: create it with `karez {role} init`")]
    Missing {
        /// Where it was looked for.
        path: PathBuf,
        /// Whose key it is: `node`, `scheduler`, `user`.
        role: String,
    },
    /// A key already lies there; it is never overwritten.
    #[error(
        "a key already exists at {path}: it was kept. Remove the file first if you mean to change identity"
    )]
    Exists {
        /// Where it lies.
        path: PathBuf,
    },
    /// Others may read the file.
    #[error("{path} can be read by others (mode {mode:03o}): run `chmod 600 {path}`")]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Not an Ed25519 key in PKCS#8 PEM.
    #[error(
        "{path} is not an Ed25519 key in PKCS#8 PEM: restore it from a backup, or move it away and run `karez {role} init`"
    )]
    Format {
        /// The file.
        path: PathBuf,
        /// Whose key it is.
        role: String,
    },
    /// The disk or the system's randomness failed.
    #[error("{path}: {error}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What happened.
        error: io::Error,
    },
}

/// Draws a new secret key from the system's randomness.
pub fn draw() -> io::Result<SecretKey> {
    let mut seed = [0; 32];
    getrandom::fill(&mut seed).map_err(io::Error::other)?;
    Ok(SecretKey::from_bytes(&seed))
}

/// Draws a key and writes it to `path` with mode 0600, making missing parent directories with mode 0700.
///
/// Never overwrites: [`IdentityError::Exists`] when a file lies there.
pub fn create(path: &Path) -> Result<SecretKey, IdentityError> {
    let io = |error| IdentityError::Io {
        path: path.to_owned(),
        error,
    };
    let secret = draw().map_err(io)?;
    let pem = secret
        .to_pkcs8_pem(LineEnding::LF)
        .map_err(|e| io(io::Error::other(e.to_string())))?;
    if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(parent)
            .map_err(io)?;
    }
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => IdentityError::Exists {
                path: path.to_owned(),
            },
            _ => io(error),
        })?;
    let written = file.write_all(pem.as_bytes()).and_then(|()| file.sync_all());
    if let Err(error) = written {
        // Half a key would block the next attempt.
        let _ = fs::remove_file(path);
        return Err(io(error));
    }
    Ok(secret)
}

/// Reads the key at `path`. `role` (`node`, `scheduler`, `user`) only completes the advice in errors.
pub fn load(path: &Path, role: &str) -> Result<SecretKey, IdentityError> {
    let io = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => IdentityError::Missing {
            path: path.to_owned(),
            role: role.to_owned(),
        },
        _ => IdentityError::Io {
            path: path.to_owned(),
            error,
        },
    };
    let format = || IdentityError::Format {
        path: path.to_owned(),
        role: role.to_owned(),
    };
    let file = fs::File::open(path).map_err(io)?;
    // Asked of the open file, so that nothing can be swapped in between.
    let meta = file.metadata().map_err(io)?;
    let mode = meta.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(IdentityError::Exposed {
            path: path.to_owned(),
            mode,
        });
    }
    if !meta.is_file() || meta.len() > FILE_BYTES_MAX {
        return Err(format());
    }
    let mut pem = String::new();
    file.take(FILE_BYTES_MAX)
        .read_to_string(&mut pem)
        .map_err(|error| match error.kind() {
            io::ErrorKind::InvalidData => format(),
            _ => io(error),
        })?;
    let secret = SecretKey::from_pkcs8_pem(&pem).map_err(|_| format())?;
    PublicKey::of(&secret).check().map_err(|_| format())?;
    Ok(secret)
}

/// Loads the key at `path`, or draws one there when nothing is.
pub fn load_or_create(path: &Path, role: &str) -> Result<SecretKey, IdentityError> {
    match create(path) {
        Err(IdentityError::Exists { .. }) => load(path, role),
        other => other,
    }
}

/// The libp2p id of `key`. Weak keys have none.
pub fn to_peer_id(key: PublicKey) -> Result<PeerId, KeyError> {
    key.check()?;
    let key = identity::ed25519::PublicKey::try_from_bytes(&key.0).map_err(|_| KeyError::Weak)?;
    Ok(PeerId::from_public_key(&key.into()))
}

/// The key inside a libp2p id: an Ed25519 id carries its whole key. `None` for ids of other kinds and weak keys.
pub fn from_peer_id(id: &PeerId) -> Option<PublicKey> {
    let hash = id.as_ref();
    // Code 0 is the identity multihash: the digest is the protobuf-encoded key itself.
    if hash.code() != 0 {
        return None;
    }
    let key = identity::PublicKey::try_decode_protobuf(hash.digest()).ok()?;
    PublicKey::from_bytes(&key.try_into_ed25519().ok()?.to_bytes()).ok()
}

/// The same key for libp2p.
pub fn keypair(secret: &SecretKey) -> Result<identity::Keypair, KeyError> {
    identity::Keypair::ed25519_from_bytes(secret.to_bytes()).map_err(|_| KeyError::Length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_file_is_private_and_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/er/node.key");
        let secret = create(&path).unwrap();
        assert_eq!(load(&path, "node").unwrap().to_bytes(), secret.to_bytes());
        let mode = |p: &Path| fs::metadata(p).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&path), 0o600);
        assert_eq!(mode(path.parent().unwrap()), 0o700);
        assert!(matches!(create(&path), Err(IdentityError::Exists { .. })));
        let again = load_or_create(&path, "node").unwrap();
        assert_eq!(again.to_bytes(), secret.to_bytes());
    }

    #[test]
    fn bad_key_files_are_refused_with_the_next_step() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let missing = load(&path, "scheduler").unwrap_err().to_string();
        assert!(missing.contains("karez scheduler init"), "{missing}");
        create(&path).unwrap();
        for mode in [0o640, 0o604, 0o660] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let exposed = load(&path, "node").unwrap_err().to_string();
            assert!(exposed.contains("chmod 600"), "{exposed}");
        }
        for text in [
            &b"hello"[..],
            b"",
            b"\xff\xfe",
            &[b'a'; 5000],
            b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
        ] {
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
            assert!(matches!(load(&path, "node"), Err(IdentityError::Format { .. })));
        }
    }

    #[test]
    fn peer_ids_carry_the_key() {
        let secret = SecretKey::from_bytes(&[5; 32]);
        let key = PublicKey::of(&secret);
        let id = to_peer_id(key).unwrap();
        assert_eq!(id, keypair(&secret).unwrap().public().to_peer_id());
        assert_eq!(from_peer_id(&id), Some(key));
        let mut neutral = [0; 32];
        neutral[0] = 1;
        assert!(to_peer_id(PublicKey(neutral)).is_err());
    }
}
