//! What minds keep: named tables of bytes, and postings. Carried out by the durable writer, in one transaction per batch.
use crate::{money::Posting, prelude::*, unit::UtcMillis};

/// One change of durable state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Sets a key of a table.
    Put {
        /// Which table.
        table: &'static str,
        /// Which key; at most 256 bytes.
        key: Vec<u8>,
        /// The value; at most 4 MiB.
        value: Vec<u8>,
    },
    /// Removes a key of a table.
    Delete {
        /// Which table.
        table: &'static str,
        /// Which key.
        key: Vec<u8>,
    },
    /// Appends to the ledger. The mind has checked it against its own balances, which mirror the book's.
    Post {
        /// The movement.
        posting: Posting,
        /// When.
        at: UtcMillis,
    },
}

/// One stored pair, given back at a restart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Which table.
    pub table: String,
    /// Which key.
    pub key: Vec<u8>,
    /// Its value.
    pub value: Vec<u8>,
}

/// A stored pair that this version cannot read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("stored {table} {key}: {why}")]
pub struct StoredError {
    /// Which table.
    pub table: String,
    /// Which key, in hex.
    pub key: String,
    /// What is wrong.
    pub why: String,
}

pub(crate) fn put<T: serde::Serialize>(table: &'static str, key: &[u8], value: &T) -> Change {
    // Only maps with keys that are not text can fail here, and none of our records has one.
    let value = serde_json::to_vec(value).unwrap_or_default();
    Change::Put {
        table,
        key: key.to_vec(),
        value,
    }
}

pub(crate) fn read<T: serde::de::DeserializeOwned>(stored: &Stored) -> Result<T, StoredError> {
    serde_json::from_slice(&stored.value).map_err(|e| StoredError {
        table: stored.table.clone(),
        key: hex::encode(&stored.key),
        why: e.to_string(),
    })
}
