//! The worker process: inference and embedding in a sandbox, and the protocol to talk to it.
//!
//! Engines are other people's (llama.cpp for GGUF, candle for safetensors encoders) and run in a process of their
//! own: a crash, a leak or a hostile model file hurts one worker and no daemon.
//!
//! - [`protocol`]: what a node and a worker say to each other; [`error`]: what can go wrong.
//! - [`client`]: the node's end. Start at [`client::Worker`].
//! - [`inspect`]: reading model headers without trusting them; [`json`]: JSON that keeps its order.
//! - [`probe`]: what this machine has to offer; [`provided`]: a provider's own trainer.
//! - [`shipped`]: the small model that comes with Karez; [`reference`](mod@reference): random ones to measure with.
//! - `worker` (with the feature of that name): the other end, the engines and the sandbox.
//! - `level` (with the same feature): the instruction set that llama.cpp computes with.
//! - `train` (with the same feature): a small Llama that learns, and its files.
//!
//! Not here: which model to run where (the scheduler), and fetching it (the artifact store).

pub mod client;
pub mod error;
pub mod inspect;
pub mod json;
pub mod probe;
pub mod protocol;
pub mod provided;
pub mod reference;
pub mod shipped;
pub mod text;
pub mod unit;

#[cfg(feature = "worker")]
pub mod level;
#[cfg(feature = "worker")]
pub mod train;
#[cfg(feature = "worker")]
pub mod worker;

pub use client::{Event, Run, SpawnOptions, Worker};
pub use error::{Blame, EngineError, FailureKind};
