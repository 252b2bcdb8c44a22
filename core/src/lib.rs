//! The rules of Karez, pure: units, ids, signed records, market, placement, job, lease, agent, controller.
//!
//! Everything here decides from its arguments: no clock, socket, disk, thread or randomness can even be named
//! (the crate is `no_std`). The daemons in `node/` and `scheduler/` carry its effects out; `simulations/` runs
//! the same minds on made-up worlds.
//!
//! Start at `agent` (a node's mind) or `controller` (a scheduler's mind); what they
//! exchange is in [`records`].
#![no_std]
extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod artifact;
pub mod id;
pub mod key;
pub mod money;
mod prelude;
pub mod records;
pub mod unit;
