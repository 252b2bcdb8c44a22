//! Where things lie in a node's directory.
use std::path::{Path, PathBuf};

/// The layout of one node's directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeFiles {
    dir: PathBuf,
}

impl NodeFiles {
    /// The layout under `dir`.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }
    /// The directory itself.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
    /// What the owner set.
    pub fn config(&self) -> PathBuf {
        self.dir.join("node.toml")
    }
    /// The node's secret key, readable by its owner only.
    pub fn key(&self) -> PathBuf {
        self.dir.join("key.pem")
    }
    /// Leases and everything else that must survive a crash.
    pub fn state(&self) -> PathBuf {
        self.dir.join("state")
    }
    /// The artifact store.
    pub fn artifacts(&self) -> PathBuf {
        self.dir.join("artifacts")
    }
    /// Files of running leases; emptied at each start.
    pub fn scratch(&self) -> PathBuf {
        self.dir.join("scratch")
    }
    /// Where the owner's commands are heard.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("control.sock")
    }
    /// What schedulers signed for the work done here.
    pub fn receipts(&self) -> PathBuf {
        self.dir.join("receipts")
    }
    /// The receipts of before, once there were many.
    pub fn receipts_older(&self) -> PathBuf {
        crate::receipts::older(&self.receipts())
    }
    /// The last probe, so that the next start need not measure again.
    pub fn probe(&self) -> PathBuf {
        self.dir.join("probe.json")
    }
}
