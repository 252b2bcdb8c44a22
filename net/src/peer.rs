//! The libp2p swarm: how nodes find schedulers, advertise to them, and how schedulers tell each other summaries.
//!
//! One task runs the swarm ([`Peer::start`]); [`Peer`] is the handle that the daemons talk to, and what the network
//! brings arrives on a bounded channel of [`PeerEvent`]s. TCP with noise and yamux only.
//!
//! - **Finding**: a Kademlia address book (`/karez/kad/1`), kept by schedulers, asked by nodes. It holds one thing:
//!   who provides the key "scheduler". Everything else offered to it is dropped.
//! - **Offers** go straight from a node to a scheduler (`/karez/offer/1`), never by gossip.
//! - **Summaries** are gossiped among schedulers (`karez/summary/1`); nodes do not take part.
//!
//! Not here: whether an offer is true or a summary sound. This module proves who sent the bytes, limits their size
//! and rate, and passes them on.
use crate::identity;
use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, StreamExt, stream::FuturesUnordered};
use karez_core::key::{PublicKey, SecretKey};
pub use libp2p::Multiaddr;
use libp2p::{
    PeerId, StreamProtocol, Swarm, SwarmBuilder, connection_limits, gossipsub, identify,
    kad::{self, store::RecordStore},
    multiaddr::Protocol,
    noise, ping, request_response as rr,
    swarm::{
        ConnectionId, DialError, NetworkBehaviour, SwarmEvent, behaviour::toggle::Toggle, dial_opts::DialOpts,
    },
    tcp, yamux,
};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    io, iter,
    num::NonZeroUsize,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, MissedTickBehavior, interval, sleep_until, timeout},
};

/// The largest offer, in bytes of its envelope.
pub const OFFER_BYTES_MAX: usize = 40 * 1024;
/// The largest summary, in bytes.
pub const SUMMARY_BYTES_MAX: usize = 60 * 1024;

const KAD: StreamProtocol = StreamProtocol::new("/karez/kad/1");
const OFFER: StreamProtocol = StreamProtocol::new("/karez/offer/1");
const SUMMARY_TOPIC: &str = "karez/summary/1";
const IDENTIFY: &str = "/karez/1";
/// The one key of the address book: its providers are the schedulers.
const SCHEDULERS_KEY: &[u8] = b"karez/scheduler/1";

const ANSWER_BYTES_MAX: usize = 1024;
const ADDR_BYTES_MAX: usize = 255;
/// Offers and verdicts that wait for the application at one time; beyond it peers hear "busy".
const WAITING_MAX: usize = 1024;
const EVENTS_MAX: usize = 1024;
const COMMANDS_MAX: usize = 64;
/// How long the application may think about an offer or a summary.
const APPLICATION_WAIT: Duration = Duration::from_secs(10);
const OFFER_TIMEOUT: Duration = Duration::from_secs(15);
/// Offers of one peer: so many at once, then so many per second.
const OFFER_RATE: RateRule = RateRule { burst: 20, per_s: 5 };
/// Summaries arriving through one peer.
const SUMMARY_RATE: RateRule = RateRule { burst: 60, per_s: 10 };
const RATED_PEERS_MAX: usize = 65_536;
const ADDRS_PER_PEER_MAX: usize = 8;
const KNOWN_SCHEDULERS_MAX: usize = 1024;
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_LAST: Duration = Duration::from_secs(300);
/// The task looks around this often; all else is driven by events.
const TICK: Duration = Duration::from_secs(5);
/// Schedulers are looked up again, and announce themselves again, this often.
const REFRESH: Duration = Duration::from_secs(600);

/// What this party is in the swarm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Advertises offers; asks the address book.
    Node,
    /// Takes offers, keeps the address book, gossips summaries.
    Scheduler,
}

/// How to join.
#[derive(Debug, Clone)]
pub struct PeerConfig {
    /// As what.
    pub role: Role,
    /// Where to listen, like `/ip4/0.0.0.0/tcp/4710`. A node behind a firewall leaves this empty.
    pub listen: Vec<Multiaddr>,
    /// Any members of the network; kept connected, with growing pauses between attempts.
    pub bootstrap: Vec<Multiaddr>,
    /// Addresses under which others reach this party, where they differ from `listen`.
    pub external: Vec<Multiaddr>,
    /// Established connections that others opened, at one time; further ones are refused.
    pub incoming_max: u32,
}

impl PeerConfig {
    /// A node that only dials out.
    pub fn node(bootstrap: Vec<Multiaddr>) -> Self {
        Self {
            role: Role::Node,
            listen: Vec::new(),
            bootstrap,
            external: Vec::new(),
            incoming_max: 16,
        }
    }

    /// A scheduler listening on `listen`.
    pub fn scheduler(listen: Vec<Multiaddr>, bootstrap: Vec<Multiaddr>) -> Self {
        Self {
            role: Role::Scheduler,
            listen,
            bootstrap,
            external: Vec::new(),
            incoming_max: 8192,
        }
    }
}

/// A scheduler's answer to an offer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Taken into its market.
    Accepted {
        /// `host:port` of the scheduler's control API, for a node that found it; at most 255 bytes, may be empty.
        control_addr: String,
    },
    /// Not taken.
    Refused {
        /// In the scheduler's own words; at most 500 bytes travel.
        reason: String,
    },
}

/// What to do with a gossiped summary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Pass it on.
    Accept,
    /// Drop it and think less of the peer that sent it.
    Reject,
    /// Drop it.
    Ignore,
}

/// A scheduler and where it says it can be reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundScheduler {
    /// Its key.
    pub key: PublicKey,
    /// Its libp2p addresses; may be empty when only its name is known.
    pub addrs: Vec<Multiaddr>,
}

/// What the swarm tells the application.
#[derive(Debug)]
pub enum PeerEvent {
    /// A node's offer: the bytes are a signed envelope that nobody has verified yet. Its signer must equal `from`.
    Offer {
        /// Who sent it, proved by the connection.
        from: PublicKey,
        /// The envelope, at most [`OFFER_BYTES_MAX`].
        bytes: Vec<u8>,
        /// The answer. Dropping it, or taking more than 10 s, answers "busy".
        answer: oneshot::Sender<Answer>,
    },
    /// A summary from another scheduler.
    Summary {
        /// Who wrote it, proved by its signature.
        from: PublicKey,
        /// What it wrote, at most 64 KiB.
        bytes: Vec<u8>,
        /// Whether to pass it on. Dropping it, or taking more than 10 s, means [`Verdict::Ignore`].
        verdict: oneshot::Sender<Verdict>,
    },
    /// A scheduler was found, or has new addresses. Told once per change.
    SchedulerFound(FoundScheduler),
}

/// Why a command of the handle failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// The swarm could not start.
    #[error("the peer network cannot start: {0}")]
    Start(String),
    /// The swarm has ended.
    #[error("the peer network has been shut down")]
    Stopped,
    /// Over the cap; nothing was sent.
    #[error("{bytes} bytes are more than a message may have ({max})")]
    TooLarge {
        /// Its size.
        bytes: usize,
        /// The cap.
        max: usize,
    },
    /// The key is weak, or no scheduler speaks under it.
    #[error("{peer} is not a scheduler of this network")]
    NotScheduler {
        /// Whom it was sent to, shortened.
        peer: String,
    },
    /// No connection came about.
    #[error("{peer} cannot be reached ({why}): check the address and the network")]
    Unreachable {
        /// Who or where.
        peer: String,
        /// What happened.
        why: String,
    },
    /// It did not answer, or broke off.
    #[error("{peer} gave no answer ({why}): try again")]
    NoAnswer {
        /// Who.
        peer: String,
        /// What happened.
        why: String,
    },
    /// No other scheduler is connected that would hear a summary.
    #[error("no other scheduler is connected")]
    Alone,
    /// Too many commands wait.
    #[error("the peer network is busy: try again")]
    Busy,
}

/// What the swarm has counted since it started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PeerCounts {
    /// Offers passed to the application.
    pub offers: u64,
    /// Offers refused because their sender exceeded its rate.
    pub offers_over_rate: u64,
    /// Offers refused because the application was busy.
    pub offers_busy: u64,
    /// Summaries passed to the application.
    pub summaries: u64,
    /// Summaries dropped for rate or because the application was busy.
    pub summaries_dropped: u64,
    /// Incoming connections that failed or were refused.
    pub connections_refused: u64,
}

#[derive(Debug, Default)]
struct Counters {
    offers: AtomicU64,
    offers_over_rate: AtomicU64,
    offers_busy: AtomicU64,
    summaries: AtomicU64,
    summaries_dropped: AtomicU64,
    connections_refused: AtomicU64,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// The handle of a running swarm. The swarm ends when the last handle is dropped.
#[derive(Debug, Clone)]
pub struct Peer {
    commands: mpsc::Sender<Command>,
    counters: Arc<Counters>,
    id: PeerId,
}

type Reply<T> = oneshot::Sender<Result<T, PeerError>>;

enum Command {
    Advertise(PublicKey, Vec<u8>, Reply<Answer>),
    Publish(Vec<u8>, Reply<()>),
    Dial(Multiaddr, Reply<PublicKey>),
    Introduce(PublicKey, Multiaddr),
    Find(Reply<Vec<FoundScheduler>>),
    Listening(Reply<Vec<Multiaddr>>),
    Connected(Reply<Vec<PublicKey>>),
    Stop,
}

impl Peer {
    /// Starts the swarm as one task of the current tokio runtime.
    ///
    /// The receiver must be read: when it is full, offers are answered with "busy" and summaries dropped.
    pub fn start(
        secret: &SecretKey,
        config: PeerConfig,
    ) -> Result<(Self, mpsc::Receiver<PeerEvent>), PeerError> {
        let fail = |e: String| PeerError::Start(e);
        let mut swarm = build(secret, &config).map_err(fail)?;
        for addr in &config.listen {
            swarm
                .listen_on(addr.clone())
                .map_err(|e| fail(format!("listening on {addr}: {e}")))?;
        }
        for addr in &config.external {
            swarm.add_external_address(addr.clone());
        }
        let (commands, orders) = mpsc::channel(COMMANDS_MAX);
        let (events, received) = mpsc::channel(EVENTS_MAX);
        let counters = Arc::new(Counters::default());
        let id = *swarm.local_peer_id();
        let now = Instant::now();
        let task = Task {
            swarm,
            role: config.role,
            events,
            counters: counters.clone(),
            bootstrap: config
                .bootstrap
                .into_iter()
                .map(|addr| Bootstrap {
                    addr,
                    state: BootstrapState::Waiting(now),
                    pause: RETRY_FIRST,
                })
                .collect(),
            known: BTreeMap::new(),
            adverts: HashMap::new(),
            dials: HashMap::new(),
            find: None,
            refresh_at: now,
            provided_at: None,
            offer_rates: Rates::new(OFFER_RATE),
            summary_rates: Rates::new(SUMMARY_RATE),
        };
        tokio::spawn(task.run(orders));
        Ok((
            Self {
                commands,
                counters,
                id,
            },
            received,
        ))
    }

    /// This party's libp2p id.
    pub fn id(&self) -> PeerId {
        self.id
    }

    /// Sends an offer (its signed envelope) to a scheduler and waits for the answer.
    ///
    /// Connects first where needed, to addresses learnt by [`Peer::introduce`] or [`Peer::find_schedulers`].
    pub async fn advertise(&self, scheduler: PublicKey, offer: Vec<u8>) -> Result<Answer, PeerError> {
        self.ask(|reply| Command::Advertise(scheduler, offer, reply))
            .await
    }

    /// Gossips a summary among schedulers. [`PeerError::Alone`] when nobody is there to hear it.
    pub async fn publish_summary(&self, bytes: Vec<u8>) -> Result<(), PeerError> {
        self.ask(|reply| Command::Publish(bytes, reply)).await
    }

    /// Connects to an address and says whose key answered.
    pub async fn dial(&self, addr: Multiaddr) -> Result<PublicKey, PeerError> {
        self.ask(|reply| Command::Dial(addr, reply)).await
    }

    /// Tells the swarm where a scheduler can be reached, without connecting yet.
    pub async fn introduce(&self, scheduler: PublicKey, addr: Multiaddr) -> Result<(), PeerError> {
        self.send(Command::Introduce(scheduler, addr)).await
    }

    /// Asks the network for its schedulers. Those already known are in the answer too.
    pub async fn find_schedulers(&self) -> Result<Vec<FoundScheduler>, PeerError> {
        self.ask(Command::Find).await
    }

    /// Where the swarm listens by now.
    pub async fn listen_addrs(&self) -> Result<Vec<Multiaddr>, PeerError> {
        self.ask(Command::Listening).await
    }

    /// Who is connected.
    pub async fn connected(&self) -> Result<Vec<PublicKey>, PeerError> {
        self.ask(Command::Connected).await
    }

    /// Ends the swarm; all handles then answer [`PeerError::Stopped`].
    pub async fn stop(&self) {
        drop(self.send(Command::Stop).await);
    }

    /// What was counted so far.
    pub fn counts(&self) -> PeerCounts {
        let get = |c: &AtomicU64| c.load(Ordering::Relaxed);
        let c = &self.counters;
        PeerCounts {
            offers: get(&c.offers),
            offers_over_rate: get(&c.offers_over_rate),
            offers_busy: get(&c.offers_busy),
            summaries: get(&c.summaries),
            summaries_dropped: get(&c.summaries_dropped),
            connections_refused: get(&c.connections_refused),
        }
    }

    async fn send(&self, command: Command) -> Result<(), PeerError> {
        self.commands.send(command).await.map_err(|_| PeerError::Stopped)
    }

    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, PeerError> {
        let (reply, answer) = oneshot::channel();
        self.send(command(reply)).await?;
        answer.await.map_err(|_| PeerError::Stopped)?
    }
}

#[derive(NetworkBehaviour)]
struct Behaviour {
    // First: what it refuses, the others never see.
    limits: connection_limits::Behaviour,
    identify: identify::Behaviour,
    ping: ping::Behaviour,
    kad: kad::Behaviour<kad::store::MemoryStore>,
    offers: rr::Behaviour<OfferCodec>,
    gossip: Toggle<gossipsub::Behaviour>,
}

fn build(secret: &SecretKey, config: &PeerConfig) -> Result<Swarm<Behaviour>, String> {
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
#[derive(Default)]
struct Find {
    waiting: Vec<Reply<Vec<FoundScheduler>>>,
    queries: HashSet<kad::QueryId>,
    found: BTreeSet<PeerId>,
}

/// How the application answered, or did not.
enum Decided {
    Offer(rr::ResponseChannel<Answer>, Option<Answer>),
    Summary(gossipsub::MessageId, PeerId, Option<Verdict>),
}

struct Task {
    swarm: Swarm<Behaviour>,
    role: Role,
    events: mpsc::Sender<PeerEvent>,
    counters: Arc<Counters>,
    bootstrap: Vec<Bootstrap>,
    /// Schedulers and their addresses.
    known: BTreeMap<PeerId, Vec<Multiaddr>>,
    adverts: HashMap<rr::OutboundRequestId, (PublicKey, Reply<Answer>)>,
    dials: HashMap<ConnectionId, (Multiaddr, Reply<PublicKey>)>,
    find: Option<Find>,
    refresh_at: Instant,
    provided_at: Option<Instant>,
    offer_rates: Rates,
    summary_rates: Rates,
}

type Deciding = FuturesUnordered<futures::future::BoxFuture<'static, Decided>>;

impl Task {
    async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
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

    /// Notes a scheduler, and tells the application when this is news.
    fn learn(&mut self, peer: PeerId, addrs: Vec<Multiaddr>) {
        if peer == *self.swarm.local_peer_id()
            || (self.known.len() >= KNOWN_SCHEDULERS_MAX && !self.known.contains_key(&peer))
        {
            return;
        }
        let Some(key) = identity::from_peer_id(&peer) else {
            return;
        };
        let first_time = !self.known.contains_key(&peer);
        let known = self.known.entry(peer).or_default();
        let mut news = first_time;
        for mut addr in addrs {
            if matches!(addr.iter().last(), Some(Protocol::P2p(_))) {
                addr.pop();
            }
            if !known.contains(&addr) {
                if known.len() >= ADDRS_PER_PEER_MAX {
                    known.remove(0);
                }
                known.push(addr.clone());
                news = true;
            }
        }
        if news {
            let addrs = known.clone();
            // When the channel is full the application learns of it by `find_schedulers`.
            let found = PeerEvent::SchedulerFound(FoundScheduler { key, addrs });
            drop(self.events.try_send(found));
        }
    }

    fn start_find(&mut self, reply: Option<Reply<Vec<FoundScheduler>>>) {
        let find = self.find.get_or_insert_default();
        if let Some(reply) = reply {
            if find.waiting.len() >= COMMANDS_MAX {
                drop(reply.send(Err(PeerError::Busy)));
                return;
            }
            find.waiting.push(reply);
        }
        if find.queries.is_empty() {
            let key = kad::RecordKey::new(&SCHEDULERS_KEY);
            find.queries
                .insert(self.swarm.behaviour_mut().kad.get_providers(key));
        }
    }

    fn on_kad(&mut self, event: kad::Event) {
        match event {
            kad::Event::InboundRequest {
                request: kad::InboundRequest::AddProvider { record: Some(record) },
            } if record.key.as_ref() == SCHEDULERS_KEY => {
                // A full store means the table of schedulers is full: drop it.
                drop(self.swarm.behaviour_mut().kad.store_mut().add_provider(record));
            }
            kad::Event::OutboundQueryProgressed { id, result, step, .. } => {
                self.on_query(id, result, step.last);
            }
            _ => {}
        }
    }

    fn on_query(&mut self, id: kad::QueryId, result: kad::QueryResult, last: bool) {
        let ours = self.find.as_ref().is_some_and(|f| f.queries.contains(&id));
        if !ours {
            return;
        }
        match result {
            kad::QueryResult::GetProviders(Ok(kad::GetProvidersOk::FoundProviders { providers, .. })) => {
                for peer in providers.into_iter().take(KNOWN_SCHEDULERS_MAX) {
                    self.on_provider(peer);
                }
            }
            kad::QueryResult::GetClosestPeers(result) => {
                let peers = match result {
                    Ok(ok) => ok.peers,
                    Err(kad::GetClosestPeersError::Timeout { peers, .. }) => peers,
                };
                for info in peers {
                    let found = self
                        .find
                        .as_ref()
                        .is_some_and(|f| f.found.contains(&info.peer_id));
                    if found && !info.addrs.is_empty() {
                        self.learn(info.peer_id, info.addrs);
                    }
                }
            }
            _ => {}
        }
        if last && let Some(find) = self.find.as_mut() {
            find.queries.remove(&id);
            if find.queries.is_empty() {
                self.end_find();
            }
        }
    }

    fn on_provider(&mut self, peer: PeerId) {
        let news = self.find.as_mut().is_some_and(|f| f.found.insert(peer));
        if !news || peer == *self.swarm.local_peer_id() {
            return;
        }
        let kad = &mut self.swarm.behaviour_mut().kad;
        let addrs: Vec<_> = kad
            .kbucket(peer)
            .into_iter()
            .flat_map(|bucket| {
                bucket
                    .iter()
                    .filter(|entry| *entry.node.key.preimage() == peer)
                    .flat_map(|entry| entry.node.value.iter().cloned().collect::<Vec<_>>())
                    .collect::<Vec<_>>()
            })
            .take(ADDRS_PER_PEER_MAX)
            .collect();
        if addrs.is_empty() && self.known.get(&peer).is_none_or(Vec::is_empty) {
            let one = NonZeroUsize::MIN;
            let query = kad.get_n_closest_peers(peer.to_bytes(), one);
            if let Some(find) = self.find.as_mut() {
                find.queries.insert(query);
            }
        } else {
            self.learn(peer, addrs);
        }
    }

    fn end_find(&mut self) {
        let Some(find) = self.find.take() else { return };
        for peer in find.found {
            self.learn(peer, Vec::new());
        }
        if self.role == Role::Node && self.known.is_empty() {
            // Nothing found: look again at the next tick rather than at the next refresh.
            self.refresh_at = Instant::now() + TICK;
        }
        let answer: Vec<_> = self
            .known
            .iter()
            .filter_map(|(id, addrs)| {
                Some(FoundScheduler {
                    key: identity::from_peer_id(id)?,
                    addrs: addrs.clone(),
                })
            })
            .collect();
        for reply in find.waiting {
            drop(reply.send(Ok(answer.clone())));
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

fn busy() -> Answer {
    refused("the scheduler is busy: try again in a minute")
}

fn refused(reason: &str) -> Answer {
    Answer::Refused {
        reason: reason.to_owned(),
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

/// `burst` at once, then `per_s` each second.
#[derive(Debug, Clone, Copy)]
struct RateRule {
    burst: u32,
    per_s: u32,
}

/// One token bucket per peer, in thousandths of a token; full buckets are forgotten.
struct Rates {
    rule: RateRule,
    buckets: HashMap<PeerId, (Instant, u64)>,
}

impl Rates {
    fn new(rule: RateRule) -> Self {
        Self {
            rule,
            buckets: HashMap::new(),
        }
    }

    fn level(&self, now: Instant, (at, level): (Instant, u64)) -> u64 {
        let gained = now.saturating_duration_since(at).as_millis() as u64 * u64::from(self.rule.per_s);
        (level + gained).min(u64::from(self.rule.burst) * 1000)
    }

    /// Whether `peer` may send one more now. When the table is full, newcomers may not.
    fn take(&mut self, peer: PeerId, now: Instant) -> bool {
        let full = (now, u64::from(self.rule.burst) * 1000);
        let bucket = match self.buckets.get(&peer) {
            Some(bucket) => *bucket,
            None if self.buckets.len() >= RATED_PEERS_MAX => return false,
            None => full,
        };
        let level = self.level(now, bucket);
        let left = level.checked_sub(1000);
        self.buckets.insert(peer, (now, left.unwrap_or(level)));
        left.is_some()
    }

    fn forget_idle(&mut self, now: Instant) {
        let full = u64::from(self.rule.burst) * 1000;
        let idle: Vec<_> = self
            .buckets
            .iter()
            .filter(|(_, bucket)| self.level(now, **bucket) >= full)
            .map(|(peer, _)| *peer)
            .collect();
        for peer in idle {
            self.buckets.remove(&peer);
        }
    }
}

/// Four bytes of length, big-endian, then the content. The cap is checked before anything is reserved.
#[derive(Debug, Clone, Copy, Default)]
struct OfferCodec;

async fn read_capped<R: AsyncRead + Unpin + Send>(io: &mut R, max: usize) -> io::Result<Vec<u8>> {
    let mut length = [0; 4];
    io.read_exact(&mut length).await?;
    let length = u32::from_be_bytes(length) as usize;
    if length > max {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a message of {length} bytes, the limit is {max}"),
        ));
    }
    let mut bytes = vec![0; length];
    io.read_exact(&mut bytes).await?;
    Ok(bytes)
}

async fn write_framed<W: AsyncWrite + Unpin + Send>(io: &mut W, bytes: &[u8]) -> io::Result<()> {
    let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
    io.write_all(&length.to_be_bytes()).await?;
    io.write_all(bytes).await?;
    io.flush().await
}

impl Answer {
    fn encode(&self) -> Vec<u8> {
        match self {
            Self::Accepted { control_addr } => {
                let mut out = vec![0];
                // Half an address would lead elsewhere.
                if control_addr.len() <= ADDR_BYTES_MAX {
                    out.extend_from_slice(control_addr.as_bytes());
                }
                out
            }
            Self::Refused { reason } => {
                let end = (0..=reason.len().min(500))
                    .rev()
                    .find(|i| reason.is_char_boundary(*i))
                    .unwrap_or(0);
                let mut out = vec![1];
                out.extend_from_slice(&reason.as_bytes()[..end]);
                out
            }
        }
    }

    fn decode(bytes: &[u8]) -> io::Result<Self> {
        match bytes.split_first() {
            Some((0, addr)) => match std::str::from_utf8(addr) {
                Ok(addr) if addr.len() <= ADDR_BYTES_MAX && !addr.contains(char::is_control) => {
                    Ok(Self::Accepted {
                        control_addr: addr.to_owned(),
                    })
                }
                _ => Err(io::Error::new(io::ErrorKind::InvalidData, "not an address")),
            },
            Some((1, reason)) => Ok(Self::Refused {
                // Shown to people: no control characters from strangers.
                reason: String::from_utf8_lossy(reason)
                    .chars()
                    .map(|c| if c.is_control() { ' ' } else { c })
                    .collect(),
            }),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "not an answer")),
        }
    }
}

impl rr::Codec for OfferCodec {
    type Protocol = StreamProtocol;
    type Request = Vec<u8>;
    type Response = Answer;

    async fn read_request<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<Vec<u8>>
    where
        T: AsyncRead + Unpin + Send,
    {
        read_capped(io, OFFER_BYTES_MAX).await
    }

    async fn read_response<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<Answer>
    where
        T: AsyncRead + Unpin + Send,
    {
        Answer::decode(&read_capped(io, ANSWER_BYTES_MAX).await?)
    }

    async fn write_request<T>(&mut self, _: &StreamProtocol, io: &mut T, offer: Vec<u8>) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        write_framed(io, &offer).await
    }

    async fn write_response<T>(&mut self, _: &StreamProtocol, io: &mut T, answer: Answer) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        write_framed(io, &answer.encode()).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lengths_are_checked_before_memory_is_reserved() {
        let mut liar: &[u8] = &[0xff, 0xff, 0xff, 0xff, 1, 2, 3];
        assert!(read_capped(&mut liar, OFFER_BYTES_MAX).await.is_err());
        let mut short: &[u8] = &[0, 0, 0, 9, 1];
        assert!(read_capped(&mut short, OFFER_BYTES_MAX).await.is_err());
        let mut right: &[u8] = &[0, 0, 0, 2, 7, 8];
        assert_eq!(read_capped(&mut right, 2).await.unwrap(), vec![7, 8]);
    }

    #[test]
    fn answers_read_what_they_write() {
        let accepted = |addr: &str| Answer::Accepted {
            control_addr: addr.into(),
        };
        for answer in [
            accepted(""),
            accepted("karez.example.org:7400"),
            refused("no such institution"),
            refused(""),
        ] {
            assert_eq!(Answer::decode(&answer.encode()).unwrap(), answer);
        }
        let long = refused(&"é".repeat(1000));
        assert!(long.encode().len() <= 501);
        assert!(Answer::decode(&long.encode()).is_ok());
        for bad in [&[][..], &[2], &[0, 1], &[0, 0xff], &[0; 300]] {
            assert!(Answer::decode(bad).is_err());
        }
    }

    #[tokio::test]
    async fn a_peer_has_a_burst_then_a_rate() {
        let mut rates = Rates::new(RateRule { burst: 3, per_s: 1 });
        let (a, b) = (PeerId::random(), PeerId::random());
        let now = Instant::now();
        let at = |ms| now + Duration::from_millis(ms);
        let taken: Vec<_> = [0, 0, 0, 0, 900, 1000, 1000]
            .map(|ms| rates.take(a, at(ms)))
            .into();
        assert_eq!(taken, [true, true, true, false, false, true, false]);
        assert!(rates.take(b, at(1000)));
        rates.forget_idle(at(60_000));
        assert!(rates.buckets.is_empty());
    }
}
