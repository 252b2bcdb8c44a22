//! The worker process: inference and embedding in a sandbox, and the protocol to talk to it.
