//! Signed records: what parties promise and report to each other.
//!
//! [`Signed`] holds the exact bytes that were signed; only [`Signed::verify`] turns it into [`Verified`], and
//! functions that act take `Verified`. Each record names its predecessor by digest:
//! [`Order`] → [`Lease`] → [`MeterReading`] … → [`Usage`] → [`Receipt`] → [`Acceptance`], or [`Dispute`] → [`Ruling`].
//! Beside it stand the records of who pays: [`Grant`], [`RateCard`], [`Floors`], [`CreditLimit`], [`Payment`].
mod delegation;
mod envelope;
mod funding;
mod lease;
mod meter;
mod offer;
mod order;
mod receipt;
mod social;
mod trail;
mod verdict;
mod wire;

pub use delegation::Delegation;
pub use envelope::{
    Record, RecordError, SignatureCheck, Signed, Strict, ToCheck, Verified, describe, is_canonical, to_check,
};
pub use funding::{Beneficiary, CreditLimit, Floors, Grant, Payment, RateCard};
pub use lease::Lease;
pub use meter::{BENCHMARK_BYTES_MAX, Benchmark, MeterReading, Meters, Outcome, Usage};
pub use offer::{
    DataClass, Device, Engine, LICENCE_BYTES_MAX, NodeState, OFFER_CACHED_MAX, Offer, OwnerPolicy,
    SHARED_MAX, TERMS_MAX, Tier, WorkKind,
};
pub use order::{
    Constraints, DEVICES_MAX, FORMAT_BYTES_MAX, Generate, ITEMS_MAX, Order, PARTS_MAX, SETTINGS_BYTES_MAX,
    STOP_BYTES_MAX, STOPS_MAX, Train, Work,
};
pub use receipt::{Flag, Receipt, TOLERANCE, TOLERANCE_PERCENT};
pub use social::{ClassSummary, Invitation, Role, Summary};
pub use trail::{TrailError, check_trail};
pub use verdict::{Acceptance, DISPUTE_WINDOW, Dispute, REASON_BYTES_MAX, Ruling};
