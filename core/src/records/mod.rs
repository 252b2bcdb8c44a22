//! Signed records: what parties promise and report to each other.
//!
//! [`Signed`] holds the exact bytes that were signed; only [`Signed::verify`] turns it into [`Verified`], and
//! functions that act take `Verified`. Each record names its predecessor by digest:
//! [`Order`] → [`Lease`] → [`MeterReading`] … → [`Usage`] → [`Receipt`].
mod envelope;
mod lease;
mod meter;
mod offer;
mod order;
mod receipt;
mod social;
mod trail;
mod wire;

pub use envelope::{Record, RecordError, Signed, Verified, describe};
pub use lease::Lease;
pub use meter::{MeterReading, Meters, Outcome, Usage};
pub use offer::{Device, Engine, NodeState, OFFER_CACHED_MAX, Offer, WorkKind};
pub use order::{
    Constraints, FORMAT_BYTES_MAX, Generate, ITEMS_MAX, Order, PARTS_MAX, STOP_BYTES_MAX, STOPS_MAX, Work,
};
pub use receipt::{Flag, Receipt};
pub use social::{ClassSummary, Invitation, Role, Summary};
pub use trail::{TrailError, check_trail};
