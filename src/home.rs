//! The user's home: key, client configuration, local artifact store.
//!
//! ```text
//! ~/.karez/user.pem      the user's key, readable by its owner only
//! ~/.karez/client.toml   which scheduler to talk to
//! ~/.karez/artifacts/    uploads and downloads, by digest; artifacts-2 and so on for commands at the same time
//! ```
use crate::fault::{Kind, fault};
use anyhow::{Context, Result};
use karez_core::{
    id::Institution,
    key::{SchedulerId, SecretKey},
    unit::Bytes,
};
use karez_net::{identity, store::ArtifactStore};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fs::{self, File, TryLockError},
    io,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

/// What the local store may take of the disk; the least recently used goes first.
const STORE_LIMIT: Bytes = Bytes(64 << 30);
/// Stores of a home, for commands that run at the same time.
const STORES_MAX: usize = 64;

/// The folder everything of one user lives in.
#[derive(Debug, Clone)]
pub(crate) struct Home {
    dir: PathBuf,
}

/// `client.toml`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ClientConfig {
    /// The key the scheduler must show.
    pub(crate) scheduler: SchedulerId,
    /// `host:port` of its control API.
    pub(crate) control_addr: String,
    /// The user's institution there.
    pub(crate) institution: Institution,
}

impl Home {
    /// `--home`, else `KAREZ_HOME`, else `~/.karez`.
    pub(crate) fn new(given: Option<PathBuf>) -> Result<Self> {
        let set = || std::env::var_os("KAREZ_HOME").filter(|dir| !dir.is_empty());
        let dir = match given.or_else(|| set().map(PathBuf::from)) {
            Some(dir) => dir,
            None => std::env::home_dir()
                .filter(|home| home.is_absolute())
                .map(|home| home.join(".karez"))
                .ok_or_else(|| {
                    fault(
                        Kind::Usage,
                        "there is no home directory: give --home DIR or set KAREZ_HOME",
                    )
                })?,
        };
        Ok(Self {
            dir: std::path::absolute(&dir).with_context(|| dir.display().to_string())?,
        })
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn key_path(&self) -> PathBuf {
        self.dir.join("user.pem")
    }

    /// The user's key.
    pub(crate) fn key(&self) -> Result<SecretKey> {
        identity::load(&self.key_path(), "").map_err(|error| match error {
            identity::IdentityError::Missing { path, .. } => fault(
                Kind::NotAdmitted,
                format!(
                    "no key at {}: run `karez up` for a network of your own, or `karez join INVITATION`",
                    path.display()
                ),
            ),
            other => other.into(),
        })
    }

    /// The user's key, if there is one: what needs no name works without.
    pub(crate) fn key_if_any(&self) -> Result<Option<SecretKey>> {
        self.key_path().exists().then(|| self.key()).transpose()
    }

    /// The user's key, drawn now if there is none; true when it is new.
    pub(crate) fn key_or_new(&self) -> Result<(SecretKey, bool)> {
        if self.key_path().exists() {
            return Ok((self.key()?, false));
        }
        Ok((identity::create(&self.key_path())?, true))
    }

    fn config_path(&self) -> PathBuf {
        self.dir.join("client.toml")
    }

    /// Which scheduler to talk to.
    pub(crate) fn config(&self) -> Result<ClientConfig> {
        self.config_if_any()?.ok_or_else(|| {
            fault(
                Kind::NotAdmitted,
                format!(
                    "{} belongs to no network yet: run `karez up` for one of your own, or `karez join INVITATION`",
                    self.dir.display()
                ),
            )
        })
    }

    pub(crate) fn config_if_any(&self) -> Result<Option<ClientConfig>> {
        let path = self.config_path();
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| path.display().to_string()),
        };
        let config = toml::from_str(&text).map_err(|error: toml::de::Error| {
            fault(Kind::Refused, format!("{}: {}", path.display(), error.message()))
        })?;
        Ok(Some(config))
    }

    pub(crate) fn set_config(&self, config: &ClientConfig) -> Result<()> {
        write_atomic(&self.config_path(), toml::to_string(config)?.as_bytes())
    }

    /// Leaves the network; the key stays.
    pub(crate) fn forget_config(&self) -> Result<()> {
        match fs::remove_file(self.config_path()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).context("client.toml"),
            _ => Ok(()),
        }
    }

    /// Uploads and downloads, by digest. Commands that run at the same time have a store each: a store sweeps at its start
    /// what it takes for the remains of a crash.
    pub(crate) fn store(&self) -> Result<ArtifactStore> {
        let dir = self.own_store()?;
        ArtifactStore::open(&dir, STORE_LIMIT)
            .with_context(|| format!("the artifact store {}", dir.display()))
    }
}

impl Home {
    /// The first store's folder that no other process has; this one keeps it until it ends.
    fn own_store(&self) -> Result<PathBuf> {
        static OWN: Mutex<BTreeMap<PathBuf, (PathBuf, File)>> = Mutex::new(BTreeMap::new());
        let mut own = OWN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((dir, _)) = own.get(&self.dir) {
            return Ok(dir.clone());
        }
        for n in 1..=STORES_MAX {
            let name = match n {
                1 => "artifacts".to_owned(),
                n => format!("artifacts-{n}"),
            };
            let dir = self.dir.join(name);
            let at = || dir.display().to_string();
            fs::create_dir_all(&dir).with_context(at)?;
            let lock = File::create(dir.join("lock")).with_context(at)?;
            // Whoever comes when all are taken waits for the last one.
            let taken = match lock.try_lock() {
                Err(TryLockError::WouldBlock) if n < STORES_MAX => continue,
                Err(TryLockError::WouldBlock) => lock.lock(),
                Err(TryLockError::Error(error)) => Err(error),
                Ok(()) => Ok(()),
            };
            taken.with_context(at)?;
            own.insert(self.dir.clone(), (dir.clone(), lock));
            return Ok(dir);
        }
        let why = format!("{}: all of its stores are taken", self.dir.display());
        Err(fault(Kind::Other, why))
    }
}

/// All of `bytes` at `path`, or what was there before; makes missing directories.
pub(crate) fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let subject = || path.display().to_string();
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).with_context(subject)?;
    }
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.part", std::process::id()));
    let part = path.with_file_name(name);
    fs::write(&part, bytes)
        .and_then(|()| fs::rename(&part, path))
        .with_context(subject)
}
