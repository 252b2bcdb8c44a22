//! The one task that owns the swarm: what it is asked, what it hears, what it answers.
use super::{
    ADDRS_PER_PEER_MAX, APPLICATION_WAIT, Answer, Command, Counters, KAD, OFFER, OFFER_BYTES_MAX, PeerError,
    PeerEvent, REFRESH, RETRY_FIRST, RETRY_LAST, Reply, Role, SCHEDULERS_KEY, SUMMARY_BYTES_MAX,
    SUMMARY_TOPIC, TICK, Verdict, WAITING_MAX, count,
    find::Find,
    offer::{busy, refused},
    rates::{OFFER_RATE, Rates, SUMMARY_RATE},
    swarm::{Behaviour, BehaviourEvent},
};
use crate::identity;
use futures::{StreamExt, stream::FuturesUnordered};
use karez_core::key::PublicKey;
use libp2p::{
    Multiaddr, PeerId, Swarm, gossipsub, identify, kad, ping, request_response as rr,
    swarm::{ConnectionId, DialError, SwarmEvent, dial_opts::DialOpts},
};
use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, MissedTickBehavior, interval, sleep_until, timeout},
};

struct Bootstrap {
    addr: Multiaddr,
    state: BootstrapState,
    pause: Duration,
}

enum BootstrapState {
    Waiting(Instant),
    Dialling(ConnectionId),
    Connected(PeerId),
    /// It is our own address.
    Ourselves,
}

/// A search under way: first who provides the key, then where they are.
/// How the application answered, or did not.
enum Decided {
    Offer(rr::ResponseChannel<Answer>, Option<Answer>),
    Summary(gossipsub::MessageId, PeerId, Option<Verdict>),
}

pub(super) struct Task {
    pub(super) swarm: Swarm<Behaviour>,
    pub(super) role: Role,
    pub(super) events: mpsc::Sender<PeerEvent>,
    counters: Arc<Counters>,
    bootstrap: Vec<Bootstrap>,
    /// Schedulers and their addresses.
    pub(super) known: BTreeMap<PeerId, Vec<Multiaddr>>,
    adverts: HashMap<rr::OutboundRequestId, (PublicKey, Reply<Answer>)>,
    dials: HashMap<ConnectionId, (Multiaddr, Reply<PublicKey>)>,
    pub(super) find: Option<Find>,
    pub(super) refresh_at: Instant,
    provided_at: Option<Instant>,
    offer_rates: Rates,
    summary_rates: Rates,
}

type Deciding = FuturesUnordered<futures::future::BoxFuture<'static, Decided>>;

impl Task {
    pub(super) fn new(
        swarm: Swarm<Behaviour>,
        role: Role,
        bootstrap: Vec<Multiaddr>,
        events: mpsc::Sender<PeerEvent>,
        counters: Arc<Counters>,
    ) -> Self {
        let now = Instant::now();
        let bootstrap = bootstrap.into_iter().map(|addr| Bootstrap {
            addr,
            state: BootstrapState::Waiting(now),
            pause: RETRY_FIRST,
        });
        Self {
            swarm,
            role,
            events,
            counters,
            bootstrap: bootstrap.collect(),
            known: BTreeMap::new(),
            adverts: HashMap::new(),
            dials: HashMap::new(),
            find: None,
            refresh_at: now,
            provided_at: None,
            offer_rates: Rates::new(OFFER_RATE),
            summary_rates: Rates::new(SUMMARY_RATE),
        }
    }

    pub(super) async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        let mut deciding = Deciding::new();
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let retry_at = self.retry_at();
            tokio::select! {
                event = self.swarm.select_next_some() => self.on_swarm(event, &deciding),
                Some(decided) = deciding.next(), if !deciding.is_empty() => self.on_decided(decided),
                command = commands.recv() => match command {
                    None | Some(Command::Stop) => return,
                    Some(command) => self.on_command(command),
                },
                _ = tick.tick() => self.on_tick(),
                () = sleep_until(retry_at.unwrap_or_else(Instant::now)), if retry_at.is_some() => self.retry(),
            }
        }
    }

    fn on_tick(&mut self) {
        let now = Instant::now();
        self.offer_rates.forget_idle(now);
        self.summary_rates.forget_idle(now);
        if now >= self.refresh_at && self.swarm.connected_peers().next().is_some() {
            self.refresh_at = now + REFRESH;
            self.start_find(None);
        }
    }

    fn retry_at(&self) -> Option<Instant> {
        self.bootstrap
            .iter()
            .filter_map(|b| match b.state {
                BootstrapState::Waiting(at) => Some(at),
                _ => None,
            })
            .min()
    }

    fn retry(&mut self) {
        let now = Instant::now();
        for b in &mut self.bootstrap {
            if matches!(b.state, BootstrapState::Waiting(at) if at <= now) {
                let opts = DialOpts::unknown_peer_id().address(b.addr.clone()).build();
                let id = opts.connection_id();
                b.state = match self.swarm.dial(opts) {
                    Ok(()) => BootstrapState::Dialling(id),
                    Err(DialError::LocalPeerId { .. }) => BootstrapState::Ourselves,
                    Err(error) => {
                        tracing::debug!(addr = %b.addr, %error, "cannot dial");
                        BootstrapState::Waiting(now + b.longer_pause())
                    }
                };
            }
        }
    }

    fn on_command(&mut self, command: Command) {
        match command {
            Command::Advertise(scheduler, offer, reply) => self.advertise(scheduler, offer, reply),
            Command::Publish(bytes, reply) => drop(reply.send(self.publish(bytes))),
            Command::Dial(addr, reply) => {
                let opts = DialOpts::unknown_peer_id().address(addr.clone()).build();
                let id = opts.connection_id();
                match self.swarm.dial(opts) {
                    Ok(()) => drop(self.dials.insert(id, (addr, reply))),
                    Err(error) => drop(reply.send(Err(PeerError::Unreachable {
                        peer: addr.to_string(),
                        why: plainly(&error),
                    }))),
                }
            }
            Command::Introduce(scheduler, addr) => {
                if let Ok(id) = identity::to_peer_id(scheduler) {
                    self.learn(id, vec![addr]);
                }
            }
            Command::Find(reply) => self.start_find(Some(reply)),
            Command::Listening(reply) => drop(reply.send(Ok(self.swarm.listeners().cloned().collect()))),
            Command::Connected(reply) => {
                let keys = self.swarm.connected_peers().filter_map(identity::from_peer_id);
                drop(reply.send(Ok(keys.collect())));
            }
            Command::Stop => {}
        }
    }

    fn advertise(&mut self, scheduler: PublicKey, offer: Vec<u8>, reply: Reply<Answer>) {
        let refused = if offer.len() > OFFER_BYTES_MAX {
            PeerError::TooLarge {
                bytes: offer.len(),
                max: OFFER_BYTES_MAX,
            }
        } else if self.adverts.len() >= WAITING_MAX {
            PeerError::Busy
        } else if let Ok(id) = identity::to_peer_id(scheduler) {
            let addrs = self.known.get(&id).cloned().unwrap_or_default();
            let request = self
                .swarm
                .behaviour_mut()
                .offers
                .send_request_with_addresses(&id, offer, addrs);
            self.adverts.insert(request, (scheduler, reply));
            return;
        } else {
            PeerError::NotScheduler {
                peer: scheduler.short(),
            }
        };
        drop(reply.send(Err(refused)));
    }

    fn publish(&mut self, bytes: Vec<u8>) -> Result<(), PeerError> {
        if bytes.len() > SUMMARY_BYTES_MAX {
            return Err(PeerError::TooLarge {
                bytes: bytes.len(),
                max: SUMMARY_BYTES_MAX,
            });
        }
        let Some(gossip) = self.swarm.behaviour_mut().gossip.as_mut() else {
            return Err(PeerError::Alone);
        };
        match gossip.publish(gossipsub::IdentTopic::new(SUMMARY_TOPIC), bytes) {
            Ok(_) | Err(gossipsub::PublishError::Duplicate) => Ok(()),
            Err(gossipsub::PublishError::NoPeersSubscribedToTopic) => Err(PeerError::Alone),
            Err(gossipsub::PublishError::AllQueuesFull(_)) => Err(PeerError::Busy),
            Err(error) => Err(PeerError::NoAnswer {
                peer: "the summary topic".into(),
                why: error.to_string(),
            }),
        }
    }

    fn on_decided(&mut self, decided: Decided) {
        match decided {
            Decided::Offer(channel, answer) => {
                let answer = answer.unwrap_or_else(|| {
                    count(&self.counters.offers_busy);
                    busy()
                });
                // The peer may have left meanwhile.
                drop(self.swarm.behaviour_mut().offers.send_response(channel, answer));
            }
            Decided::Summary(id, through, verdict) => {
                let acceptance = match verdict {
                    Some(Verdict::Accept) => gossipsub::MessageAcceptance::Accept,
                    Some(Verdict::Reject) => gossipsub::MessageAcceptance::Reject,
                    Some(Verdict::Ignore) | None => gossipsub::MessageAcceptance::Ignore,
                };
                if let Some(gossip) = self.swarm.behaviour_mut().gossip.as_mut() {
                    gossip.report_message_validation_result(&id, &through, acceptance);
                }
            }
        }
    }

    fn on_swarm(&mut self, event: SwarmEvent<BehaviourEvent>, deciding: &Deciding) {
        match event {
            SwarmEvent::Behaviour(BehaviourEvent::Identify(identify::Event::Received {
                peer_id,
                info,
                ..
            })) => self.on_identify(peer_id, info),
            SwarmEvent::Behaviour(BehaviourEvent::Ping(ping::Event {
                connection,
                result: Err(ping::Failure::Timeout),
                ..
            })) => {
                // A dead connection would swallow every offer until TCP notices.
                self.swarm.close_connection(connection);
            }
            SwarmEvent::Behaviour(BehaviourEvent::Kad(event)) => self.on_kad(event),
            SwarmEvent::Behaviour(BehaviourEvent::Offers(event)) => self.on_offers(event, deciding),
            SwarmEvent::Behaviour(BehaviourEvent::Gossip(gossipsub::Event::Message {
                propagation_source,
                message_id,
                message,
            })) => self.on_summary(propagation_source, message_id, message, deciding),
            SwarmEvent::ConnectionEstablished {
                peer_id,
                connection_id,
                ..
            } => self.on_connected(peer_id, connection_id),
            SwarmEvent::ConnectionClosed {
                peer_id,
                num_established: 0,
                ..
            } => {
                let again = Instant::now() + RETRY_FIRST;
                for b in &mut self.bootstrap {
                    if matches!(b.state, BootstrapState::Connected(id) if id == peer_id) {
                        b.state = BootstrapState::Waiting(again);
                    }
                }
            }
            SwarmEvent::OutgoingConnectionError {
                connection_id, error, ..
            } => self.on_dial_failed(connection_id, &error),
            SwarmEvent::IncomingConnectionError { error, .. } => {
                count(&self.counters.connections_refused);
                tracing::debug!(%error, "incoming connection refused");
            }
            SwarmEvent::NewListenAddr { address, .. } => tracing::info!(%address, "peer network listens"),
            SwarmEvent::ListenerClosed {
                addresses,
                reason: Err(error),
                ..
            } => tracing::error!(?addresses, %error, "peer network stopped listening"),
            _ => {}
        }
    }

    fn on_connected(&mut self, peer: PeerId, connection: ConnectionId) {
        if let Some((addr, reply)) = self.dials.remove(&connection) {
            drop(
                reply.send(identity::from_peer_id(&peer).ok_or(PeerError::Unreachable {
                    peer: addr.to_string(),
                    why: "its key is of another kind".into(),
                })),
            );
        }
        for b in &mut self.bootstrap {
            if matches!(b.state, BootstrapState::Dialling(id) if id == connection) {
                b.state = BootstrapState::Connected(peer);
                b.pause = RETRY_FIRST;
            }
        }
    }

    fn on_dial_failed(&mut self, connection: ConnectionId, error: &DialError) {
        if let Some((addr, reply)) = self.dials.remove(&connection) {
            drop(reply.send(Err(PeerError::Unreachable {
                peer: addr.to_string(),
                why: plainly(error),
            })));
        }
        for b in &mut self.bootstrap {
            if matches!(b.state, BootstrapState::Dialling(id) if id == connection) {
                b.state = if matches!(error, DialError::LocalPeerId { .. }) {
                    BootstrapState::Ourselves
                } else {
                    let pause = b.longer_pause();
                    tracing::debug!(addr = %b.addr, %error, ?pause, "bootstrap unreachable");
                    BootstrapState::Waiting(Instant::now() + pause)
                };
            }
        }
    }

    fn on_identify(&mut self, peer: PeerId, info: identify::Info) {
        let addrs: Vec<_> = info.listen_addrs.into_iter().take(ADDRS_PER_PEER_MAX).collect();
        if !info.protocols.contains(&KAD) {
            return;
        }
        for addr in &addrs {
            self.swarm.behaviour_mut().kad.add_address(&peer, addr.clone());
        }
        // Only schedulers take offers.
        if info.protocols.contains(&OFFER) {
            self.learn(peer, addrs);
        }
        let now = Instant::now();
        match self.role {
            // Each newcomer may be the one that keeps the record nearest to the key.
            Role::Scheduler if self.provided_at.is_none_or(|at| now >= at + TICK) => {
                let key = kad::RecordKey::new(&SCHEDULERS_KEY);
                match self.swarm.behaviour_mut().kad.start_providing(key) {
                    Ok(_) => self.provided_at = Some(now),
                    Err(error) => tracing::warn!(%error, "cannot announce this scheduler"),
                }
            }
            Role::Node if now >= self.refresh_at => {
                self.refresh_at = now + REFRESH;
                self.start_find(None);
            }
            _ => {}
        }
    }

    fn on_offers(&mut self, event: rr::Event<Vec<u8>, Answer>, deciding: &Deciding) {
        match event {
            rr::Event::Message {
                peer,
                message: rr::Message::Request { request, channel, .. },
                ..
            } => {
                let refused = match identity::from_peer_id(&peer) {
                    None => refused("the connection's key is not Ed25519"),
                    Some(_) if !self.offer_rates.take(peer, Instant::now()) => {
                        count(&self.counters.offers_over_rate);
                        refused("too many offers: slow down")
                    }
                    Some(_) if deciding.len() >= WAITING_MAX => {
                        count(&self.counters.offers_busy);
                        busy()
                    }
                    Some(from) => {
                        let (answer, answered) = oneshot::channel();
                        let event = PeerEvent::Offer {
                            from,
                            bytes: request,
                            answer,
                        };
                        match self.events.try_send(event) {
                            Ok(()) => {
                                count(&self.counters.offers);
                                deciding.push(Box::pin(async move {
                                    let answer = timeout(APPLICATION_WAIT, answered).await;
                                    Decided::Offer(channel, answer.ok().and_then(Result::ok))
                                }));
                                return;
                            }
                            Err(_) => {
                                count(&self.counters.offers_busy);
                                busy()
                            }
                        }
                    }
                };
                drop(self.swarm.behaviour_mut().offers.send_response(channel, refused));
            }
            rr::Event::Message {
                message: rr::Message::Response { request_id, response },
                ..
            } => {
                if let Some((_, reply)) = self.adverts.remove(&request_id) {
                    drop(reply.send(Ok(response)));
                }
            }
            rr::Event::OutboundFailure {
                request_id, error, ..
            } => {
                if let Some((scheduler, reply)) = self.adverts.remove(&request_id) {
                    let (peer, why) = (scheduler.short(), error.to_string());
                    drop(reply.send(Err(match error {
                        rr::OutboundFailure::DialFailure => PeerError::Unreachable { peer, why },
                        rr::OutboundFailure::UnsupportedProtocols => PeerError::NotScheduler { peer },
                        _ => PeerError::NoAnswer { peer, why },
                    })));
                }
            }
            rr::Event::InboundFailure { peer, error, .. } => {
                tracing::debug!(%peer, %error, "offer not taken");
            }
            rr::Event::ResponseSent { .. } => {}
        }
    }

    fn on_summary(
        &mut self,
        through: PeerId,
        id: gossipsub::MessageId,
        message: gossipsub::Message,
        deciding: &Deciding,
    ) {
        let from = message.source.as_ref().and_then(identity::from_peer_id);
        let rate_kept = self.summary_rates.take(through, Instant::now());
        if let Some(from) = from.filter(|_| rate_kept && deciding.len() < WAITING_MAX) {
            let (verdict, decided) = oneshot::channel();
            let event = PeerEvent::Summary {
                from,
                bytes: message.data,
                verdict,
            };
            if self.events.try_send(event).is_ok() {
                count(&self.counters.summaries);
                deciding.push(Box::pin(async move {
                    let verdict = timeout(APPLICATION_WAIT, decided).await;
                    Decided::Summary(id, through, verdict.ok().and_then(Result::ok))
                }));
                return;
            }
        }
        count(&self.counters.summaries_dropped);
        self.on_decided(Decided::Summary(id, through, None));
    }
}

impl Bootstrap {
    /// The pause before the next attempt; each is twice the one before.
    fn longer_pause(&mut self) -> Duration {
        let pause = self.pause;
        self.pause = (pause * 2).min(RETRY_LAST);
        pause
    }
}

/// libp2p's errors list every address on lines of their own; people want one line.
fn plainly(error: &DialError) -> String {
    let text = match error {
        DialError::Transport(errors) => errors
            .iter()
            .map(|(addr, e)| format!("{addr}: {e}"))
            .collect::<Vec<_>>()
            .join("; "),
        other => other.to_string(),
    };
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
