//! One identity everywhere: TLS with raw public keys, the libp2p swarm, QUIC artifact transfer and the artifact store.
//!
//! | module | what lives there |
//! |---|---|
//! | [`identity`] | a party's key file; the same key as a libp2p id |
//! | [`tls`] | rustls with that key on both ends (RFC 7250) |
//! | [`control`] | the listener and the connector under the gRPC services |
//! | [`peer`] | the libp2p swarm: finding schedulers, offers, summaries among schedulers |
//! | [`store`] | artifacts on disk, named by BLAKE3 |
//! | [`transfer`] | moving artifacts over QUIC, verified as they stream |
//!
//! Not here: what an offer or an order means (the core), who is admitted (the daemons).
//! Every decoder of foreign bytes in this crate has a size limit, every stream a deadline, every queue a bound.

pub mod control;
pub mod identity;
pub mod manifest;
pub mod peer;
pub mod store;
pub mod tls;
pub mod transfer;
mod verified;
