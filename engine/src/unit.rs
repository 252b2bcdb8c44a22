//! The quantities of the worker protocol: the house's own.
pub use karez_core::unit::{Bytes, Millis};
