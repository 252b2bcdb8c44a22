//! The wire of Karez: the `.proto` files beside this crate and the code generated from them; nothing else.
//!
//! `records` holds what is signed, `control` the API between nodes, users and schedulers. Typed and checked
//! forms live in `karez-core`; nothing but its record conversions should read these messages' fields.

/// Records that carry signatures, and the envelope around them.
pub mod records {
    #[allow(missing_docs)]
    pub mod v1 {
        include!(concat!(env!("OUT_DIR"), "/karez.records.v1.rs"));
    }
    pub use v1::*;
}

/// The control API, spoken by nodes and users to a scheduler.
pub mod control {
    #[allow(missing_docs)]
    pub mod v1 {
        include!(concat!(env!("OUT_DIR"), "/karez.control.v1.rs"));
    }
    pub use v1::*;
}

/// The encoded `FileDescriptorSet` of everything above, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
