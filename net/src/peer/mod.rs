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
mod find;
mod offer;
mod rates;
mod swarm;
mod task;

use karez_core::key::{PublicKey, SecretKey};
pub use libp2p::Multiaddr;
use libp2p::{PeerId, StreamProtocol};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use task::Task;
use tokio::sync::{mpsc, oneshot};

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

/// Offers and verdicts that wait for the application at one time; beyond it peers hear "busy".
const WAITING_MAX: usize = 1024;
const EVENTS_MAX: usize = 1024;
const COMMANDS_MAX: usize = 64;
/// How long the application may think about an offer or a summary.
const APPLICATION_WAIT: Duration = Duration::from_secs(10);
const OFFER_TIMEOUT: Duration = Duration::from_secs(15);
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
        let mut swarm = swarm::build(secret, &config).map_err(fail)?;
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
        let task = Task::new(swarm, config.role, config.bootstrap, events, counters.clone());
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
