//! What can go wrong with a worker, in kinds a node can act on.
use serde::{Deserialize, Serialize};

use crate::unit::{Bytes, Millis};

/// A worker's failure. It travels from the worker as it is, so both ends speak of the same thing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum EngineError {
    /// The file is not a model this engine can read.
    #[error("{file} is not a usable model: {reason}")]
    BadModel {
        /// The file at fault.
        file: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The model does not fit the memory it may use.
    #[error("the model needs about {} MiB of memory and may use {} MiB; give it more, or choose a smaller context or model", mebibytes(.needs), mebibytes(.has))]
    TooLarge {
        /// The estimate for this model and context.
        needs: Bytes,
        /// The limit it met.
        has: Bytes,
    },
    /// The prompt leaves no room for even one new token.
    #[error(
        "the prompt is {prompt} tokens long and the context holds {limit}; shorten it, or ask for a longer context"
    )]
    ContextOverflow {
        /// Tokens of the prompt.
        prompt: u32,
        /// Tokens the context holds.
        limit: u32,
    },
    /// The request itself is wrong.
    #[error("bad input: {reason}")]
    BadInput {
        /// What is wrong and what would be right.
        reason: String,
    },
    /// This build or this machine cannot do what was asked.
    #[error("unsupported: {reason}")]
    Unsupported {
        /// What is missing.
        reason: String,
    },
    /// The worker's queue is full.
    #[error("the worker already holds {limit} runs; send this one again when one is done")]
    Busy {
        /// Runs a worker holds at most.
        limit: u32,
    },
    /// The worker process ended.
    #[error("the worker crashed: {how}")]
    Crashed {
        /// Exit status or signal, and its last words.
        how: String,
    },
    /// The worker process did not answer in time and was killed.
    #[error("the worker gave no answer for {} ms and was stopped", .waited.0)]
    Hung {
        /// How long it was silent.
        waited: Millis,
    },
    /// The run was cancelled, as asked.
    #[error("cancelled")]
    Cancelled,
    /// A server that the provider runs, and that this node only fronts, is not fit to work with.
    #[error("the provider's own server: {reason}")]
    Server {
        /// What it did.
        reason: String,
    },
    /// The two ends do not speak the same protocol.
    #[error("worker protocol: {reason}")]
    Protocol {
        /// The frame or value at fault.
        reason: String,
    },
}

/// The kind of an [`EngineError`], for metrics and decisions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// [`EngineError::BadModel`]
    BadModel,
    /// [`EngineError::TooLarge`]
    TooLarge,
    /// [`EngineError::ContextOverflow`]
    ContextOverflow,
    /// [`EngineError::BadInput`]
    BadInput,
    /// [`EngineError::Unsupported`]
    Unsupported,
    /// [`EngineError::Busy`]
    Busy,
    /// [`EngineError::Crashed`]
    Crashed,
    /// [`EngineError::Hung`]
    Hung,
    /// [`EngineError::Cancelled`]
    Cancelled,
    /// [`EngineError::Server`]
    Server,
    /// [`EngineError::Protocol`]
    Protocol,
}

/// Who must change something before trying again helps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Blame {
    /// The job: it fails the same way on every node.
    Job,
    /// This node: the job may do well on another one.
    Node,
    /// Nobody: the same node may be tried again.
    Chance,
    /// Whoever asked for it to stop.
    Caller,
}

impl EngineError {
    /// Its kind.
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::BadModel { .. } => FailureKind::BadModel,
            Self::TooLarge { .. } => FailureKind::TooLarge,
            Self::ContextOverflow { .. } => FailureKind::ContextOverflow,
            Self::BadInput { .. } => FailureKind::BadInput,
            Self::Unsupported { .. } => FailureKind::Unsupported,
            Self::Busy { .. } => FailureKind::Busy,
            Self::Crashed { .. } => FailureKind::Crashed,
            Self::Hung { .. } => FailureKind::Hung,
            Self::Cancelled => FailureKind::Cancelled,
            Self::Server { .. } => FailureKind::Server,
            Self::Protocol { .. } => FailureKind::Protocol,
        }
    }

    pub(crate) fn bad_model(file: &std::path::Path, reason: impl ToString) -> Self {
        Self::BadModel {
            file: file.display().to_string(),
            reason: reason.to_string(),
        }
    }

    pub(crate) fn bad_input(reason: impl ToString) -> Self {
        Self::BadInput {
            reason: reason.to_string(),
        }
    }

    pub(crate) fn protocol(reason: impl ToString) -> Self {
        Self::Protocol {
            reason: reason.to_string(),
        }
    }
}

impl FailureKind {
    /// Who must change something before trying again helps.
    pub fn blame(self) -> Blame {
        match self {
            Self::BadModel | Self::ContextOverflow | Self::BadInput => Blame::Job,
            Self::TooLarge | Self::Unsupported | Self::Server | Self::Protocol => Blame::Node,
            Self::Busy | Self::Crashed | Self::Hung => Blame::Chance,
            Self::Cancelled => Blame::Caller,
        }
    }

    /// Whether the same request may succeed elsewhere or later.
    pub fn retryable(self) -> bool {
        matches!(self.blame(), Blame::Node | Blame::Chance)
    }
}

fn mebibytes(bytes: &Bytes) -> u64 {
    bytes.0.div_ceil(1 << 20)
}
