//! The scheduler's daemon: gRPC, admission, catalogue, persistence.
