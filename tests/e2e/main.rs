//! End to end: the real binary, real processes, real sockets, real disks; killed, starved and lied to.
//!
//! Each test starts a network of its own with `karez up` in a folder of its own and ends it by id, so that tests
//! can run side by side. Start at [`net::Net`].
#![allow(clippy::unwrap_used, reason = "in a test, the panic is the report")]
mod bad_days;
mod bad_input;
mod books;
mod good_days;
mod net;
mod openai;
mod questions;
mod servers;
mod training;
mod training_faults;
