//! Between the typed exchange and the control API's messages, for nodes, schedulers and the CLI alike.
//!
//! What comes from the wire is checked here, signatures included: a [`ToScheduler`] or [`ToNode`] that this module
//! gives out holds only verified records within their limits. Free text is cut and freed of control characters in
//! both directions, so that no word of a stranger can break a terminal or a limit.
//!
//! [`ToScheduler`]: crate::exchange::ToScheduler
//! [`ToNode`]: crate::exchange::ToNode
//!
//! Start at [`FromNode`] and [`FromScheduler`]: the two ends of a session.
mod session;
#[cfg(test)]
mod tests;
mod view;

pub use session::{FromNode, FromScheduler, PIECE_BYTES_MAX, PIECE_TOKENS_MAX, Piece, UNNAMED_TOKEN};

use crate::{
    id::{Digest, JobId, LeaseKey},
    key::{KeyError, NodeId, PublicKey},
    money::Account,
    prelude::*,
    records::RecordError,
};
use karez_proto::{control as wire, records as record_wire};

/// The most holders one ask names.
pub const HOLDERS_MAX: usize = 64;
/// The most addresses of one holder.
pub const ADDRS_MAX: usize = 8;
/// Free text is cut to this many bytes.
pub const TEXT_MAX: usize = 1000;
/// Names are cut to this many bytes.
pub const NAME_MAX: usize = 128;
/// An address is at most this many bytes.
pub const ADDR_MAX: usize = 256;
/// A Karez message never needs more than this, in bytes: the decode cap of both ends.
pub const MESSAGE_BYTES_MAX: usize = 4 << 20;

/// Why a message was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TranslateError {
    /// A field that must be there is not, or the message is of a kind this version does not know.
    #[error("{message}: {field} is missing")]
    Missing {
        /// Which message.
        message: &'static str,
        /// Which field.
        field: &'static str,
    },
    /// A list is longer than allowed.
    #[error("{message}: {field} has {count} entries, the limit is {max}")]
    TooMany {
        /// Which message.
        message: &'static str,
        /// Which field.
        field: &'static str,
        /// How many there are.
        count: usize,
        /// The limit.
        max: usize,
    },
    /// A field breaks its rule.
    #[error("{message}: {field} {why}")]
    Field {
        /// Which message.
        message: &'static str,
        /// Which field.
        field: &'static str,
        /// Which rule.
        why: String,
    },
    /// A signed record inside is not acceptable.
    #[error(transparent)]
    Record(#[from] RecordError),
}
/// One line of a balance.
pub fn account(account: &Account, balance: i64) -> wire::Account {
    wire::Account {
        name: account.to_string(),
        balance,
    }
}

/// The job that 32 bytes of the wire name.
pub fn job_id(message: &'static str, bytes: &[u8]) -> Result<JobId, TranslateError> {
    digest(message, "job", bytes).map(JobId)
}

/// The digest in a field of `message`.
pub fn digest(message: &'static str, name: &'static str, bytes: &[u8]) -> Result<Digest, TranslateError> {
    Digest::try_from(bytes)
        .map_err(|_| field(message, name, format!("is {} bytes, a digest is 32", bytes.len())))
}

/// The strong key in a field of `message`.
pub fn public_key(
    message: &'static str,
    name: &'static str,
    bytes: &[u8],
) -> Result<PublicKey, TranslateError> {
    PublicKey::from_bytes(bytes).map_err(|e: KeyError| field(message, name, format!("is no key: {e}")))
}

/// The node in a field of `message`; `None` for an empty field.
pub fn node_id(message: &'static str, bytes: &[u8]) -> Result<Option<NodeId>, TranslateError> {
    if bytes.is_empty() {
        Ok(None)
    } else {
        public_key(message, "node", bytes).map(|k| Some(NodeId(k)))
    }
}

/// The artifact in a field of `message`.
pub fn artifact(
    message: &'static str,
    w: Option<record_wire::ArtifactRef>,
) -> Result<crate::artifact::ArtifactRef, TranslateError> {
    use crate::artifact::{ArtifactKind, ArtifactRef};
    let w = some(message, "artifact", w)?;
    let kind = match w.kind.as_str() {
        "blob" => ArtifactKind::Blob,
        "tree" => ArtifactKind::Tree,
        _ => return Err(field(message, "artifact", "is neither a blob nor a tree".into())),
    };
    Ok(ArtifactRef {
        digest: digest(message, "artifact", &w.digest)?,
        bytes: crate::unit::Bytes(w.bytes),
        kind,
    })
}

/// `text` in at most `max` bytes, with every control character replaced by a space.
pub fn clean(text: &str, max: usize) -> String {
    let mut out = String::with_capacity(text.len().min(max));
    for c in text.chars().map(|c| if c.is_control() { ' ' } else { c }) {
        if out.len() + c.len_utf8() > max {
            break;
        }
        out.push(c);
    }
    out
}

fn key(message: &'static str, key: Option<wire::LeaseKey>) -> Result<LeaseKey, TranslateError> {
    some(message, "key", key)?.try_into()
}

fn addrs(
    message: &'static str,
    name: &'static str,
    addrs: Vec<String>,
) -> Result<Vec<String>, TranslateError> {
    bounded(message, name, addrs.len(), ADDRS_MAX)?;
    match addrs
        .iter()
        .find(|a| a.len() > ADDR_MAX || a.chars().any(char::is_control))
    {
        Some(bad) => Err(field(
            message,
            name,
            format!("{:?} is no address", clean(bad, NAME_MAX)),
        )),
        None => Ok(addrs),
    }
}

fn bounded(
    message: &'static str,
    field: &'static str,
    count: usize,
    max: usize,
) -> Result<(), TranslateError> {
    if count > max {
        Err(TranslateError::TooMany {
            message,
            field,
            count,
            max,
        })
    } else {
        Ok(())
    }
}

fn some<T>(message: &'static str, field: &'static str, value: Option<T>) -> Result<T, TranslateError> {
    value.ok_or(TranslateError::Missing { message, field })
}

fn missing(message: &'static str, field: &'static str) -> TranslateError {
    TranslateError::Missing { message, field }
}

fn field(message: &'static str, field: &'static str, why: String) -> TranslateError {
    TranslateError::Field { message, field, why }
}
