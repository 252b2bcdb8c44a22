//! Training: what a node asks of its worker, and what comes back.
use serde::{Deserialize, Serialize};

use crate::unit::Bytes;

/// Steps of a run, from one checkpoint to the next. Files lie in the directory that [`super::Load::scratch`] names, and
/// go by their plain names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Train {
    /// Digest of the base model, as checkpoints and manifests name it.
    pub base_digest: String,
    /// JSON lines.
    pub data: String,
    /// Their digest.
    pub data_digest: String,
    /// The trainer's settings, as JSON.
    pub settings: String,
    /// The language of lines that name none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub language: Option<String>,
    /// The checkpoint to go on from, and its digest; none for the beginning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<(String, String)>,
    /// Go on until so many steps are taken in all.
    pub until: u64,
    /// Where to write the checkpoint.
    pub out: String,
}

/// What one step did; streamed as the text of a token, a line of JSON each.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Steps taken in all.
    pub step: u64,
    /// Steps that the run has.
    pub total: u64,
    /// Mean cross-entropy of the step, in nats.
    pub loss: f64,
    /// Tokens that went through the model in this run so far.
    pub tokens: u64,
}

/// A checkpoint was written.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Checkpointed {
    /// Its digest.
    pub digest: String,
    /// Its size.
    pub bytes: Bytes,
    /// Steps taken in all.
    pub step: u64,
    /// Nothing is left to do.
    pub finished: bool,
    /// Mean cross-entropy of the last step, in nats; none before the first.
    pub loss: Option<f64>,
    /// How long making and writing it took.
    pub took_ms: u64,
}
