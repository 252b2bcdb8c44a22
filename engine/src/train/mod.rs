//! Training: low-rank adapters for models of the Llama, Qwen2 and Qwen3 families, and whole small models.
//!
//! A fine-tuning run is a [`Trainer`]: [`Settings`] and [`Data`] go in, steps are taken, [`Checkpoint`]s come out, and
//! any of them goes on elsewhere as if nothing had happened. It computes with a [`learner::Learner`]: our own, on
//! [`fused::Fused`], whose gradients are worked out by hand over a frozen [`BaseModel`] and an [`Adapter`]; or
//! [`torch`], a provider's PyTorch.
//!
//! Beside it stands the same model on candle ([`Llama`], [`LowRank`], [`AdamW`]), which trains whole models, makes the
//! shipped one, and is what the fused model's gradients are compared with. [`gguf`] writes files for llama.cpp.
//! Not here: jobs, sandboxes, progress reports (the worker's own rooms). Inference belongs to llama.cpp.
//!
//! candle's fused `rms_norm`, `layer_norm`, `softmax_last_dim` and `rope` have no backward pass and say nothing about
//! it. This module uses none of them, and its tests hold every trainable weight to a gradient.

pub mod adapter;
pub mod base;
pub mod candle;
mod chat;
pub mod checkpoint;
mod config;
pub mod data;
pub mod fused;
pub mod gguf;
pub mod learner;
mod lines;
mod llama;
mod memory;
mod optim;
pub mod results;
mod rng;
pub mod schedule;
pub mod settings;
pub mod torch;
pub mod trainer;
mod weights;

#[cfg(test)]
mod data_tests;
#[cfg(test)]
mod files_tests;
#[cfg(test)]
mod learner_tests;
#[cfg(test)]
mod run_tests;
#[cfg(test)]
mod tests;

pub use adapter::Adapter;
pub use base::BaseModel;
pub use chat::{Batch, ChatFormat, Example};
pub use checkpoint::Checkpoint;
pub use data::Data;
pub use llama::{Config, Llama, LowRank, MODULES, POSITIONS_MAX, RopeScaling};
pub use optim::{AdamW, AdamWSettings, Moments, cosine_rate};
pub use rng::Rng;
pub use settings::Settings;
pub use trainer::Trainer;
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
    /// A file of a model or of data is not what it should be.
    #[error("{}: {why}", path.display())]
    File {
        /// Which.
        path: std::path::PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// Lines of the data are at fault.
    #[error("{}: {}", path.display(), faults.join("; "))]
    Data {
        /// Which file.
        path: std::path::PathBuf,
        /// Each begins with its line.
        faults: Vec<String>,
    },
    /// A setting is unknown or makes no sense.
    #[error("{name} {why}")]
    Setting {
        /// Which.
        name: String,
        /// Why not.
        why: String,
    },
    /// The run takes more memory than it may.
    #[error(
        "training needs {} MiB of memory, {} MiB may be used: lower micro_batch_size or sequence_len, or set \
         gradient_checkpointing or bf16",
        needs.div_ceil(1 << 20),
        has >> 20
    )]
    Memory {
        /// Bytes that it takes.
        needs: u64,
        /// Bytes that there are.
        has: u64,
    },
    /// A checkpoint cannot be gone on from.
    #[error("the checkpoint {0}")]
    Checkpoint(String),
    /// Training went wrong: nothing after the last checkpoint is worth keeping.
    #[error("training went wrong at step {step}: {what}; lower learning_rate or look at the data")]
    Diverged {
        /// The step, counted from 1.
        step: usize,
        /// How it showed.
        what: String,
    },
    /// A provider's trainer went wrong; the same run may do well there next time, or elsewhere.
    #[error("the provider's trainer {0}")]
    Trainer(String),
    /// A provider's trainer cannot do this run.
    #[error("the provider's trainer cannot do this: {0}")]
    Incapable(String),
    /// A weight that should train got no gradient: some operation on its way cut it off.
    #[error("trainable weight {0} received no gradient")]
    NoGradient(String),
}
