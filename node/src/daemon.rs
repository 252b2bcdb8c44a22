//! The one loop that owns the agent: an event goes in, its effects are carried out, in order.
//!
//! The promise to the agent: every change of a batch is on disk before any other effect of that batch leaves the
//! process. Events that arrived together share one commit. While the disk is full nothing is promised: the batch
//! waits, new leases are refused, and the owner is still obeyed.
//!
//! Start at [`run`]. Not here: what to do (`karez_core::agent`), how to run a lease ([`crate::runner`]).
mod carry;
mod start;
mod status;

use crate::{
    config::{ConfigError, NodeConfig, SchedulerEntry},
    control::{self, ControlError, Request},
    probe::Found,
    receipts::Receipts,
    runner::{Ended, Tools},
    server::{Seen, Served},
    session::{ArtifactAddrs, Link},
    stop::Stopper,
};
use karez_core::{
    agent::{Agent, Effect, Event, Exit, OwnerCommand},
    exchange::{Phase, Refusal, ToNode, ToScheduler},
    id::LeaseKey,
    key::{NodeId, SchedulerId, SecretKey},
    records::Device,
    routing::Warmth,
    store::StoredError,
    unit::{Bytes, MonoMillis, Now, UtcMillis},
};
use karez_ledger::{Op, StoreError, Writer};
use karez_net::{
    identity::IdentityError,
    peer::{Peer, PeerError},
    store::Pin,
    transfer::TransferError,
};
use std::{
    collections::{BTreeMap, VecDeque},
    ffi::OsString,
    future::Future,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};
use tokio::{
    sync::{mpsc, watch},
    task::{AbortHandle, JoinSet},
};

/// Inputs that wait for the loop; whoever has more waits.
const INPUTS_MAX: usize = 1024;
/// Inputs that share one commit.
const BATCH_MAX: usize = 64;
/// Time between two looks at the agent when nothing else happens, at the least.
const TICK_MIN: Duration = Duration::from_millis(5);
/// How long a drained node still answers its owner.
const DRAINED: Duration = Duration::from_secs(1);
/// What is warm is said again after this, though it has not changed: schedulers believe it for thirty seconds.
const WARM_EVERY: Duration = Duration::from_secs(10);
/// When the daemon stops, its guests get this long.
const LEAVE_GRACE: Duration = Duration::from_millis(800);
/// And after that everything else.
const LEAVE_MAX: Duration = Duration::from_millis(1_400);
/// The models that anybody may read here.
const MODELS: &str = "node-models";

/// The program that becomes a worker process: `karez worker`, or `karez-worker`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerProgram {
    /// The executable.
    pub path: PathBuf,
    /// What to start it with.
    pub args: Vec<OsString>,
}

impl WorkerProgram {
    /// `path worker`: the `karez` binary itself.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            args: vec!["worker".into()],
        }
    }
}

/// What the binary adds to the owner's settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunOptions {
    /// Runs the models; without, only no-ops are offered.
    pub worker: Option<WorkerProgram>,
    /// Whether that program was built to compute on GPUs.
    pub gpu: bool,
}

/// Why the daemon did not start, or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// `node.toml`.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The key.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The durable state.
    #[error(transparent)]
    State(Box<StoreError>),
    /// The durable state says something this version cannot read.
    #[error("{0}: was it written by a newer Karez?")]
    Stored(#[from] StoredError),
    /// The artifact store.
    #[error("the artifact store: {0}")]
    Artifacts(#[from] karez_net::store::StoreError),
    /// Artifact transfer.
    #[error("artifact transfer cannot start: {0}")]
    Transfer(#[from] TransferError),
    /// The peer network.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// An address of the peer network.
    #[error("{addr} in {} is not a multiaddress: {why}", path.display())]
    PeerAddr {
        /// Which file.
        path: PathBuf,
        /// Which address.
        addr: String,
        /// What is wrong with it.
        why: String,
    },
    /// The owner's socket.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The disk.
    #[error("{}: {error}", path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// What happened.
        error: io::Error,
    },
}

impl From<StoreError> for DaemonError {
    fn from(error: StoreError) -> Self {
        Self::State(Box::new(error))
    }
}

/// What comes to the loop.
#[derive(Debug)]
pub(crate) enum Input {
    /// For the agent as it is.
    Event(Box<Event>),
    /// The owner's word.
    Owner(OwnerCommand),
    /// A connection stands; the agent's report becomes the hello.
    SessionUp { scheduler: SchedulerId, link: Link },
    /// It broke, or never came about.
    SessionDown { scheduler: SchedulerId, why: String },
    /// The scheduler answered the hello.
    Welcome { scheduler: SchedulerId, name: String },
    /// It said something.
    Heard(SchedulerId, Box<ToNode>),
    /// What it says of the latest offer.
    OfferHeard { scheduler: SchedulerId, text: String },
    /// A fetch succeeded.
    Fetched {
        key: LeaseKey,
        pins: Vec<Pin>,
        bytes_in: Bytes,
    },
    /// A scheduler that was found on the peer network takes this node's offers.
    Admitted {
        scheduler: SchedulerId,
        control_addr: String,
    },
    /// What the provider's own server can do now.
    Server(Seen),
    /// A second has passed.
    Pulse,
    /// A lease came to its end.
    Ended { key: LeaseKey, ended: Box<Ended> },
}

impl From<Event> for Input {
    fn from(event: Event) -> Self {
        Self::Event(Box::new(event))
    }
}

/// Runs the node in `dir` until `shutdown`, or until it has drained.
///
/// Guests are then stopped, schedulers told, and everything is over within three seconds. Needs a tokio runtime with
/// time and I/O; one thread is enough.
pub async fn run(
    dir: &Path,
    options: RunOptions,
    shutdown: impl Future<Output = ()>,
) -> Result<(), DaemonError> {
    let (tell, leave) = watch::channel(false);
    let wait = async {
        shutdown.await;
        tell.send_replace(true);
        std::future::pending::<()>().await;
    };
    let live = async {
        let mut daemon = Daemon::start(dir, options).await?;
        let lived = daemon.live(leave).await;
        daemon.leave().await;
        lived
    };
    tokio::select! {
        lived = live => lived,
        () = wait => Ok(()),
    }
}

/// What is known of a scheduler.
struct Known {
    name: String,
    control_addr: String,
    connected: bool,
    why: String,
    offer: String,
    artifact_addrs: ArtifactAddrs,
}

/// A lease that uses the machine now.
struct Guest {
    stopper: Stopper,
    /// The GPUs it has to itself, or the one it shares.
    gpus: Vec<String>,
    /// Of which class, and which of the devices that are shared; none where it has them to itself.
    slot: Option<(String, u32)>,
}

struct Daemon {
    began: Instant,
    config: NodeConfig,
    id: NodeId,
    found: Found,
    agent: Agent,
    writer: Writer,
    tools: Arc<Tools>,
    inputs: mpsc::Receiver<Input>,
    /// For the tasks that this loop starts.
    back: mpsc::Sender<Input>,
    /// Inputs that came while a batch could not be stored.
    waiting: VecDeque<Input>,
    requests: mpsc::Receiver<Request>,
    links: BTreeMap<SchedulerId, Link>,
    known: BTreeMap<SchedulerId, Known>,
    guests: BTreeMap<LeaseKey, Guest>,
    fetches: BTreeMap<LeaseKey, AbortHandle>,
    pins: BTreeMap<LeaseKey, Vec<Pin>>,
    /// The shell's own changes, stored with the next batch.
    own: Vec<Op>,
    /// What schedulers have signed for.
    receipts: Receipts,
    offers: watch::Sender<Option<Arc<Vec<u8>>>>,
    sessions: JoinSet<()>,
    peer: Peer,
    secret: SecretKey,
    /// What each scheduler was last told of what is warm, and when.
    told_warm: BTreeMap<SchedulerId, (Instant, Warmth)>,
    /// Why nothing can be stored now.
    stalled: Option<String>,
    /// The owner said to drain while this process lives.
    draining: bool,
    /// The daemon is on its way out.
    leaving: bool,
    /// Ends with the daemon.
    background: JoinSet<()>,
    _listener: control::Listener,
}

impl Daemon {
    fn now(&self) -> Now {
        clock(self.began)
    }

    async fn live(&mut self, mut leave: watch::Receiver<bool>) -> Result<(), DaemonError> {
        let mut out = Vec::new();
        self.agent.handle(self.now(), Event::Started, &mut out);
        if !self.settle(&mut out, &mut leave).await? {
            return Ok(());
        }
        self.refresh_serving();
        let heartbeat = Duration::from_millis(self.config.timing.heartbeat.0);
        let mut empty_since = None;
        loop {
            if self.draining && self.agent.status().held.is_empty() {
                // Whoever waits for this must be able to ask once more.
                if empty_since.get_or_insert_with(Instant::now).elapsed() >= DRAINED {
                    tracing::info!("drained: the node leaves");
                    return Ok(());
                }
            } else {
                empty_since = None;
            }
            let mut answers = Vec::new();
            if let Some(input) = self.waiting.pop_front() {
                self.take(input, &mut out);
            } else {
                let longest = if empty_since.is_some() { DRAINED } else { heartbeat };
                let due = Duration::from_millis(self.agent.wake_at().0.saturating_sub(self.now().mono.0));
                let nap = tokio::time::sleep(due.clamp(TICK_MIN, longest));
                tokio::select! {
                    biased;
                    _ = leave.wait_for(|leave| *leave) => return Ok(()),
                    Some(request) = self.requests.recv() => {
                        if let Some(word) = request.command.owner() {
                            self.take(Input::Owner(word), &mut out);
                        }
                        answers.push(request.answer);
                    }
                    Some(input) = self.inputs.recv() => self.take(input, &mut out),
                    () = nap => self.agent.handle(self.now(), Event::Tick, &mut out),
                }
            }
            // What arrived together is stored together.
            for _ in 1..BATCH_MAX {
                let Some(input) = self.waiting.pop_front().or_else(|| self.inputs.try_recv().ok()) else {
                    break;
                };
                self.take(input, &mut out);
            }
            if !self.settle(&mut out, &mut leave).await? {
                return Ok(());
            }
            for answer in answers {
                // A client that went away needs no answer.
                let _ = answer.send(self.status());
            }
        }
    }

    /// Brings one input to the agent.
    fn take(&mut self, input: Input, out: &mut Vec<Effect>) {
        let now = self.now();
        let event = match input {
            Input::Event(event) => *event,
            Input::Owner(word) => {
                self.obey(word);
                Event::Owner(word)
            }
            Input::SessionUp { scheduler, link } => {
                self.links.insert(scheduler, link);
                Event::Connected(scheduler)
            }
            Input::SessionDown { scheduler, why } => {
                let was = self.links.remove(&scheduler).is_some();
                let Some(known) = self.known.get_mut(&scheduler) else {
                    return;
                };
                known.connected = false;
                known.why = why;
                if !was && !self.agent.status().connected.contains(&scheduler) {
                    return;
                }
                Event::Disconnected(scheduler)
            }
            Input::Welcome { scheduler, name } => {
                if let Some(known) = self.known.get_mut(&scheduler) {
                    tracing::info!(scheduler = %scheduler.short(), %name, "session with the scheduler");
                    known.name = name;
                    known.connected = true;
                    known.why.clear();
                }
                self.refresh_serving();
                // A scheduler that was restarted has forgotten all offers.
                self.offers.send_modify(|_| {});
                return;
            }
            Input::OfferHeard { scheduler, text } => {
                if let Some(known) = self.known.get_mut(&scheduler) {
                    tracing::info!(scheduler = %scheduler.short(), "the offer: {text}");
                    known.offer = text;
                }
                return;
            }
            Input::Admitted {
                scheduler,
                control_addr,
            } => {
                tracing::info!(scheduler = %scheduler.short(), %control_addr, "a scheduler was found that admits this node");
                self.offer_to(SchedulerEntry {
                    key: scheduler,
                    control_addr,
                    peer_addrs: Vec::new(),
                });
                return;
            }
            Input::Heard(scheduler, said) => match *said {
                ToNode::Ask(ask) if self.leaving => {
                    let why = Refusal::Policy {
                        why: "the node is stopping".into(),
                    };
                    out.push(Effect::Send(
                        scheduler,
                        ToScheduler::Refused { key: ask.key, why },
                    ));
                    return;
                }
                ToNode::Ask(mut ask) => {
                    self.take_along(&mut ask);
                    Event::Heard(scheduler, ToNode::Ask(ask))
                }
                said => Event::Heard(scheduler, said),
            },
            Input::Fetched { key, pins, bytes_in } => {
                if self.fetches.remove(&key).is_none() {
                    // The lease was forgotten meanwhile: so are its artifacts.
                    return;
                }
                self.pins.entry(key).or_default().extend(pins);
                Event::Fetched { key, bytes_in }
            }
            Input::Server(seen) => self.capacity(seen),
            Input::Pulse => {
                self.pulse();
                return;
            }
            Input::Ended { key, ended } => {
                self.guests.remove(&key);
                let Ended {
                    mut exit,
                    meters,
                    pin,
                } = *ended;
                self.pins.entry(key).or_default().extend(pin);
                if self.leaving && exit == Exit::Stopped {
                    exit = Exit::Failed {
                        why: "the node was stopped".into(),
                        retryable: true,
                    };
                }
                if let Exit::Failed { why, .. } = &exit {
                    tracing::warn!(lease = %key, "{why}");
                }
                Event::Exited { key, exit, meters }
            }
        };
        self.agent.handle(now, event, out);
    }

    /// What schedulers want to hear every second: what is warm, where it has changed, and that leases whose work does not
    /// run, or no longer, are being seen to.
    fn pulse(&mut self) {
        let status = self.agent.status();
        for (scheduler, held) in status.held {
            if self.fetches.contains_key(&held.key) || held.phase == Phase::Finished {
                self.say(scheduler, ToScheduler::Alive { key: held.key });
            }
        }
        let warmth = self.tools.warm.warmth();
        for scheduler in status.connected {
            let told = self.told_warm.get(&scheduler);
            let due = told.is_none_or(|(at, told)| *told != warmth || at.elapsed() >= WARM_EVERY);
            if due {
                self.told_warm.insert(scheduler, (Instant::now(), warmth.clone()));
                self.say(scheduler, ToScheduler::Warm(warmth.clone()));
            }
        }
    }

    /// What there is to lend, when that is a server of the owner's.
    fn capacity(&mut self, seen: Seen) -> Event {
        let requests = self.tools.server.as_ref().map_or(0, |server| server.requests());
        for note in seen.notes.iter().filter(|note| !self.found.notes.contains(note)) {
            tracing::warn!("{note}");
        }
        for model in &seen.models {
            tracing::info!(model = %model.name, work = model.work.as_str(), speed_milli = model.speed.0, "the provider's own server has it");
        }
        let device = |model: &Served| Device {
            class: model.class(),
            count: requests,
            free: requests,
            memory: self.found.memory,
            rate: self.config.rate_of(&model.class()),
            share_min: 0,
            shared: Vec::new(),
        };
        let devices = seen.models.iter().map(device).collect();
        let engines = seen.engines();
        self.found.notes = seen.notes;
        Event::Capacity { devices, engines }
    }

    /// What the owner's word means beside the agent.
    fn obey(&mut self, word: OwnerCommand) {
        tracing::info!(?word, "the owner's word");
        match word {
            // Idle workers hold memory that the owner wants now.
            OwnerCommand::Reclaim => self.tools.warm.close(),
            OwnerCommand::Open => self.tools.warm.open(),
            OwnerCommand::Pause | OwnerCommand::Drain => {}
        }
        self.draining = word == OwnerCommand::Drain;
    }

    /// Stops the guests, tells the schedulers what became of them, and says goodbye. Takes under three seconds.
    async fn leave(&mut self) {
        self.leaving = true;
        self.tools.warm.close();
        for guest in self.guests.values() {
            guest.stopper.stop(LEAVE_GRACE);
        }
        let mut out = Vec::new();
        for (key, fetch) in std::mem::take(&mut self.fetches) {
            fetch.abort();
            let event = Event::FetchFailed {
                key,
                why: "the node was stopped".into(),
                retryable: true,
            };
            self.agent.handle(self.now(), event, &mut out);
        }
        // A disk that is still full must not hold up the exit: the state on it is the truth the next start begins with.
        let stalled = self.stalled.is_some();
        let closed = tokio::time::timeout(LEAVE_MAX, async {
            if stalled || self.settle(&mut out, &mut watch::channel(false).1).await.is_err() {
                return;
            }
            while !self.guests.is_empty() {
                let Some(input) = self.inputs.recv().await else {
                    return;
                };
                self.take(input, &mut out);
                if self.settle(&mut out, &mut watch::channel(false).1).await.is_err() {
                    return;
                }
            }
        });
        if closed.await.is_err() || !self.guests.is_empty() {
            tracing::warn!("not every lease could be closed: the next start does it");
        }
        for (_, link) in std::mem::take(&mut self.links) {
            link.part("the node is stopping");
        }
        // Sessions that are not parted yet end when nobody listens any more.
        self.inputs.close();
        let parting = async { while self.sessions.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(Duration::from_secs(1), parting).await;
        self.sessions.abort_all();
        let _ = tokio::time::timeout(Duration::from_millis(300), self.tools.artifacts.close()).await;
        tracing::info!("the node has stopped");
    }
}

fn clock(began: Instant) -> Now {
    let millis = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
    let utc = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Now {
        utc: UtcMillis(millis(utc)),
        mono: MonoMillis(millis(began.elapsed())),
    }
}

#[cfg(test)]
mod tests;
