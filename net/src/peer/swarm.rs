//! How the swarm is put together: its transport, its protocols and their limits.
use super::{
    IDENTIFY, KAD, OFFER, OFFER_TIMEOUT, PeerConfig, REFRESH, Role, SUMMARY_TOPIC, offer::OfferCodec,
};
use crate::identity;
use karez_core::key::SecretKey;
use libp2p::{
    Swarm, SwarmBuilder, connection_limits, gossipsub, identify, kad, noise, ping, request_response as rr,
    swarm::{NetworkBehaviour, behaviour::toggle::Toggle},
    tcp, yamux,
};
use std::{iter, time::Duration};

#[derive(NetworkBehaviour)]
pub(super) struct Behaviour {
    // First: what it refuses, the others never see.
    pub(super) limits: connection_limits::Behaviour,
    pub(super) identify: identify::Behaviour,
    pub(super) ping: ping::Behaviour,
    pub(super) kad: kad::Behaviour<kad::store::MemoryStore>,
    pub(super) offers: rr::Behaviour<OfferCodec>,
    pub(super) gossip: Toggle<gossipsub::Behaviour>,
}

pub(super) fn build(secret: &SecretKey, config: &PeerConfig) -> Result<Swarm<Behaviour>, String> {
    let keypair = identity::keypair(secret).map_err(|e| e.to_string())?;
    let behaviour = behaviour(&keypair, config)?;
    let swarm_config = |c: libp2p::swarm::Config| {
        c.with_idle_connection_timeout(Duration::from_secs(600))
            .with_max_negotiating_inbound_streams(32)
    };
    let tcp = || {
        SwarmBuilder::with_existing_identity(keypair.clone())
            .with_tokio()
            .with_tcp(
                tcp::Config::default().nodelay(true),
                noise::Config::new,
                yamux::Config::default,
            )
            .map_err(|e| e.to_string())
    };
    // A machine without a resolver configuration still reaches plain addresses.
    Ok(match tcp()?.with_dns() {
        Ok(builder) => builder
            .with_behaviour(|_| behaviour)
            .map_err(|e| e.to_string())?
            .with_swarm_config(swarm_config)
            .build(),
        Err(error) => {
            tracing::warn!(%error, "no name resolution: only numeric addresses will work");
            tcp()?
                .with_behaviour(|_| behaviour)
                .map_err(|e| e.to_string())?
                .with_swarm_config(swarm_config)
                .build()
        }
    })
}

fn behaviour(keypair: &libp2p::identity::Keypair, config: &PeerConfig) -> Result<Behaviour, String> {
    let scheduler = config.role == Role::Scheduler;
    let local = keypair.public().to_peer_id();
    let limits = connection_limits::ConnectionLimits::default()
        .with_max_pending_incoming(Some(256))
        .with_max_pending_outgoing(Some(64))
        .with_max_established_incoming(Some(config.incoming_max))
        .with_max_established_per_peer(Some(4));
    let identify = identify::Config::new(IDENTIFY.into(), keypair.public())
        .with_agent_version(concat!("karez/", env!("CARGO_PKG_VERSION")).into())
        .with_interval(Duration::from_secs(600))
        .with_cache_size(0);
    let ping = ping::Config::new()
        .with_interval(Duration::from_secs(60))
        .with_timeout(Duration::from_secs(20));
    let mut kad_config = kad::Config::new(KAD);
    kad_config
        .set_query_timeout(Duration::from_secs(30))
        .set_periodic_bootstrap_interval(Some(REFRESH))
        .set_replication_interval(None)
        .set_publication_interval(None)
        .set_provider_record_ttl(Some(3 * REFRESH))
        .set_provider_publication_interval(Some(REFRESH))
        // Records are shown to us first; we keep only what `on_kad` approves.
        .set_record_filtering(kad::StoreInserts::FilterBoth)
        .set_max_packet_size(16 * 1024);
    let mut kad = kad::Behaviour::with_config(local, kad::store::MemoryStore::new(local), kad_config);
    kad.set_mode(Some(if scheduler {
        kad::Mode::Server
    } else {
        kad::Mode::Client
    }));
    let support = if scheduler {
        rr::ProtocolSupport::Inbound
    } else {
        rr::ProtocolSupport::Outbound
    };
    let offers = rr::Behaviour::with_codec(
        OfferCodec,
        iter::once((OFFER, support)),
        rr::Config::default()
            .with_request_timeout(OFFER_TIMEOUT)
            .with_max_concurrent_streams(16),
    );
    let gossip = if scheduler { Some(gossip(keypair)?) } else { None };
    Ok(Behaviour {
        limits: connection_limits::Behaviour::new(limits),
        identify: identify::Behaviour::new(identify),
        ping: ping::Behaviour::new(ping),
        kad,
        offers,
        gossip: gossip.into(),
    })
}

fn gossip(keypair: &libp2p::identity::Keypair) -> Result<gossipsub::Behaviour, String> {
    let config = gossipsub::ConfigBuilder::default()
        .heartbeat_interval(Duration::from_secs(5))
        .max_transmit_size(64 * 1024)
        .validation_mode(gossipsub::ValidationMode::Strict)
        .validate_messages()
        .build()
        .map_err(|e| e.to_string())?;
    let authenticity = gossipsub::MessageAuthenticity::Signed(keypair.clone());
    let mut gossip = gossipsub::Behaviour::new(authenticity, config)?;
    gossip
        .subscribe(&gossipsub::IdentTopic::new(SUMMARY_TOPIC))
        .map_err(|e| e.to_string())?;
    Ok(gossip)
}
