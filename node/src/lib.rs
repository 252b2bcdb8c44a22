//! The provider's daemon: probe the machine, keep the owner's policy, run leases, give the machine back at once.
//!
//! Decisions are the core's ([`karez_core::agent`]); this crate carries them out.
//!
//! | module | what lives there |
//! |---|---|
//! | [`config`] | `node.toml`, parsed once |
//! | [`mod@init`] | making a node's directory from an invitation |
//! | [`probe`] | what the machine can do, measured briefly |
//! | [`mod@bench`] | what it does with models, measured at length |
//! | [`daemon`] | the one loop that owns the agent; start at [`daemon::run`] |
//! | [`runner`] | one lease: input lines in, result lines out |
//! | `trainer` | the owner's own trainer, where there is one |
//! | `server` | a server of the owner's that runs already, fronted instead of own engines |
//! | `receipts` | the owner's copy of what schedulers signed |
//! | [`control`] | the owner's socket: status, open, pause, drain, reclaim |
//!
//! Not here: the engines and their sandbox (`karez-engine`), moving artifacts (`karez-net`), anything of a scheduler.

mod advertise;
mod artifacts;
pub mod bench;
pub mod config;
pub mod control;
pub mod daemon;
mod energy;
mod files;
pub mod human;
pub mod init;
pub mod probe;
mod receipts;
pub mod runner;
mod server;
mod session;
mod stop;
mod trainer;
mod wait;

pub use config::{ConfigError, NodeConfig};
pub use control::{ControlError, LeaseView, NodeStatus};
pub use daemon::{DaemonError, WorkerProgram, run};
pub use files::NodeFiles;
pub use init::{InitError, InitOptions, Initialised, init};
