//! Training of small and middling Llama models on candle, in forms whose gradients arrive.
//!
//! Here: a differentiable Llama ([`Llama`]), low-rank adapters on it ([`LowRank`]), an optimiser whose state can be
//! checkpointed ([`AdamW`]), a seeded generator ([`Rng`]), chat examples ([`ChatFormat`], [`Batch`]), and reading and
//! writing of weights under their Hugging Face names or as GGUF ([`gguf::export`]).
//! Not here: jobs, sandboxes, progress reports (the worker's own rooms). Inference belongs to llama.cpp.
//!
//! candle's fused `rms_norm`, `layer_norm`, `softmax_last_dim` and `rope` have no backward pass and say nothing about
//! it. This module uses none of them, and its tests hold every trainable weight to a gradient.

mod chat;
pub mod gguf;
mod llama;
mod optim;
mod rng;
mod weights;

#[cfg(test)]
mod tests;

pub use chat::{Batch, ChatFormat, Example};
pub use llama::{Config, Llama, LowRank};
pub use optim::{AdamW, AdamWSettings, cosine_rate};
pub use rng::Rng;
pub use weights::{Weights, initial, load, save, trainable};

/// What can go wrong while training or converting a model.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// candle refused an operation; mostly a shape or a device that is out of memory.
    #[error("tensor operation: {0}")]
    Tensor(#[from] candle_core::Error),
    /// A file could not be read or written.
    #[error("model file: {0}")]
    Io(#[from] std::io::Error),
    /// A JSON file of the model is not what it should be.
    #[error("model JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// The tokenizer failed.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The model asks for something this code does not do.
    #[error("this model is not supported: {0}")]
    Unsupported(String),
    /// The checkpoint lacks a tensor.
    #[error("the checkpoint has no tensor {0}")]
    Missing(String),
    /// A tensor has another shape than the configuration says.
    #[error("tensor {name} has shape {found:?}, the configuration says {expected:?}")]
    Shape {
        /// Its name in the checkpoint.
        name: String,
        /// The shape it has.
        found: Vec<usize>,
        /// The shape it should have.
        expected: Vec<usize>,
    },
    /// A weight that should train got no gradient: some operation on its way cut it off.
    #[error("trainable weight {0} received no gradient")]
    NoGradient(String),
}
