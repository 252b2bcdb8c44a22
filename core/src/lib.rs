//! The rules of Karez, pure: units, ids, signed records, market, placement, job, lease, agent, controller.
//!
//! Everything here decides from its arguments: no clock, socket, disk, thread or randomness can even be named
//! (the crate is `no_std`). The daemons in `node/` and `scheduler/` carry its effects out; `simulations/` runs
//! the same minds on made-up worlds.
//!
//! Start at [`agent::Agent`] (a node's mind) or [`controller::Controller`] (a scheduler's mind); what they
//! exchange is in [`records`].
#![no_std]
extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod agent;
pub mod apikey;
pub mod artifact;
pub mod controller;
pub mod exchange;
pub mod fair;
pub mod id;
pub mod invite;
pub mod key;
pub mod market;
pub mod money;
pub mod placement;
mod prelude;
pub mod records;
pub mod routing;
pub mod store;
pub mod translate;
pub mod unit;
