//! The scheduler's daemon: gRPC, admission, catalogue, persistence.
//!
//! A thin shell around [`karez_core::controller::Controller`]: what arrives from sockets becomes an event, the
//! controller decides, and its effects are carried out, durable ones first. Start at [`daemon::run`].
//!
//! | module | what lives there |
//! |---|---|
//! | [`config`] | `scheduler.toml`, typed |
//! | [`setup`] | a scheduler's directory; invitations |
//! | [`daemon`] | starting, wiring and stopping everything |
//! | `mind` | the one loop that owns the controller: event, commit, effects |
//! | `service` | the control API for users and tools |
//! | `session` | the long conversations: nodes' sessions, watches, exports |
//! | `gateway` | HTTP as OpenAI's clients speak it |
//! | `streams` | answers as they are written |
//! | [`tuner`] | what the trainer knows, asked of a process of its own |
//! | `catalogue` | names of models |
//! | `peers` | offers and summaries over the peer network |
//! | `witness` | tree heads shown to other schedulers, cosigned for them, and forks found out |
//! | [`pricing`] | what the operator counts into costs and shares |
//! | `prompts` | how a question begins, for routing |
//! | `pins` | artifacts that unfinished jobs need, kept from eviction |
//! | `limits` | how much one key may ask |
//! | `monitor` | the plain listener for health checks and reflection |
//!
//! Not here: any decision about jobs, nodes or money (`karez-core`); the books (`karez-ledger`); sockets' cryptography
//! and artifact transfer (`karez-net`).
mod catalogue;
pub mod config;
pub mod daemon;
pub(crate) mod gateway;
mod limits;
mod mind;
mod monitor;
mod peers;
mod pins;
pub mod pricing;
mod prompts;
mod service;
mod session;
pub mod setup;
mod streams;
pub mod tuner;
mod witness;

pub use config::{Config, ConfigError};
pub use daemon::{Daemon, RunOptions, run};
pub use gateway::batches::BatchFile;
pub use setup::{InitOptions, InviteOptions, init, invite};
