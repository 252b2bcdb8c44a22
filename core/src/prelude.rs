//! What `std`'s prelude would have brought: the core is `no_std`.
pub(crate) use alloc::{
    borrow::ToOwned,
    collections::{BTreeMap, BTreeSet},
    format,
    string::{String, ToString},
    vec,
    vec::Vec,
};
