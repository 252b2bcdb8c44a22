//! One identity everywhere: TLS with raw public keys, the libp2p swarm, QUIC artifact transfer and the artifact store.
