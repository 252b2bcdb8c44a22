//! Signed usage accounting: chain, double entry, proofs, exports, and the durable store.
