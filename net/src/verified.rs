//! Verified streaming.
