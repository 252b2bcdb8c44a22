//! Errors of the durable store, and the index beside the journal.
use crate::book::BookError;
use std::{collections::BTreeMap, path::PathBuf};

/// All tables: name → key → value.
pub type Table = BTreeMap<Vec<u8>, Vec<u8>>;

/// Named tables of keys and values, in memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tables(pub(crate) BTreeMap<String, Table>);

impl Tables {
    /// Every row of `table`, by key. Empty for a table that has none.
    pub fn rows(&self, table: &str) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.0
            .get(table)
            .into_iter()
            .flatten()
            .map(|(key, value)| (key.as_slice(), value.as_slice()))
    }

    /// One value.
    pub fn get(&self, table: &str, key: &[u8]) -> Option<&[u8]> {
        self.0.get(table)?.get(key).map(Vec::as_slice)
    }
}

/// Why something is not on disk, or could not be read from it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// The posting breaks a rule; nothing of its transaction happened.
    #[error("refused: {0}")]
    Refused(#[from] BookError),
    /// A table name, key or value is too long.
    #[error("table {table:?}: {what} is {bytes} bytes, the limit is {max}")]
    TooLarge {
        /// Which table.
        table: String,
        /// Name, key, value or transaction.
        what: &'static str,
        /// Its size.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// No room; nothing of the transaction happened.
    #[error("no room on the disk of {}: free at least {needed} bytes there; later commits will then work", path.display())]
    DiskFull {
        /// Where.
        path: PathBuf,
        /// How much is wanted.
        needed: u64,
    },
    /// Another process has the directory.
    #[error("{} is in use by another process: stop it, or choose another directory", path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// The operating system refused something.
    #[error("{}: cannot {doing}: {why}", path.display())]
    Io {
        /// On what.
        path: PathBuf,
        /// While doing what.
        doing: &'static str,
        /// What it said.
        why: String,
    },
    /// Both the journal and the index are damaged.
    #[error("{} is damaged at byte {offset} and the index cannot replace it ({why}): restore the directory from a backup", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// Where in it.
        offset: u64,
        /// Why not.
        why: String,
    },
    /// The index failed; commits go on, reading entries works again after it is rebuilt.
    #[error("the index in {} failed: {why}; it is rebuilt at the next commit", path.display())]
    Index {
        /// Where.
        path: PathBuf,
        /// What it said.
        why: String,
    },
    /// The writer has stopped.
    #[error("the writer has stopped; restart the daemon")]
    Stopped,
}
