//! The rules of Karez, pure: units, ids, signed records, market, placement, job, lease, agent, controller.
#![no_std]
extern crate alloc;
