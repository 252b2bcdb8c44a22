//! The one loop that owns the agent: an event goes in, its effects are carried out, in order.
//!
//! The promise to the agent: every change of a batch is on disk before any other effect of that batch leaves the
//! process. Events that arrived together share one commit. While the disk is full nothing is promised: the batch
//! waits, new leases are refused, and the owner is still obeyed.
//!
//! Start at [`run`]. Not here: what to do (`karez_core::agent`), how to run a lease ([`crate::runner`]).
use crate::{
    advertise::advertise,
    artifacts::Artifacts,
    config::{ConfigError, NodeConfig},
    control::{
        self, Command, ControlError, DeviceView, EngineView, LeaseView, NodeStatus, Request, SchedulerView,
    },
    files::NodeFiles,
    probe::{self, Found},
    runner::{self, Ended, Job, Tools, Warm},
    session::{self, ArtifactAddrs, Dial, Link},
    stop::{Stopper, stop},
    wait::Backoff,
};
use karez_core::{
    agent::{Agent, AgentConfig, Effect, Event, Exit, OwnerCommand, OwnerPolicy, WorkerMeters},
    exchange::{Refusal, ToNode, ToScheduler},
    id::{Digest, LeaseKey},
    key::{NodeId, PublicKey, SchedulerId},
    records::{Device, Order, Verified},
    store::{Change, Stored, StoredError},
    unit::{Bytes, MonoMillis, Now, UtcMillis},
};
use karez_ledger::{Op, Options, StoreError, Transaction, Writer};
use karez_net::{
    identity::{self, IdentityError},
    peer::{Peer, PeerConfig, PeerError, PeerEvent},
    store::{ArtifactStore, Pin},
    transfer::TransferError,
};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
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
/// When the daemon stops, its guests get this long.
const LEAVE_GRACE: Duration = Duration::from_millis(800);
/// And after that everything else.
const LEAVE_MAX: Duration = Duration::from_millis(1_400);
/// The scheduler must have said where its artifacts are within this, or a push is tried again later.
const PUSH_ADDR_MAX: Duration = Duration::from_secs(10);
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
    State(#[from] StoreError),
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

/// What comes to the loop.
#[derive(Debug)]
pub(crate) enum Input {
    /// For the agent as it is.
    Event(Event),
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
    /// A lease came to its end.
    Ended { key: LeaseKey, ended: Box<Ended> },
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
    guests: BTreeMap<LeaseKey, Stopper>,
    fetches: BTreeMap<LeaseKey, AbortHandle>,
    pins: BTreeMap<LeaseKey, Vec<Pin>>,
    /// The shell's own changes, stored with the next batch.
    own: Vec<Op>,
    offers: watch::Sender<Option<Arc<Vec<u8>>>>,
    sessions: JoinSet<()>,
    /// Why nothing can be stored now.
    stalled: Option<String>,
    /// The owner said to drain while this process lives.
    draining: bool,
    /// The daemon is on its way out.
    leaving: bool,
    /// Ends with the daemon.
    _background: JoinSet<()>,
    _listener: control::Listener,
}

impl Daemon {
    async fn start(dir: &Path, options: RunOptions) -> Result<Self, DaemonError> {
        let began = Instant::now();
        let files = NodeFiles::new(dir);
        let config = NodeConfig::load(&files.config())?;
        let secret = identity::load(&files.key(), "node")?;
        let id = NodeId(PublicKey::of(&secret));
        let state = files.state();
        let opened = tokio::task::spawn_blocking(move || Writer::open(&state, Options::default())).await;
        let (writer, recovered) = opened.map_err(|_| StoreError::Stopped)??;
        for repaired in &recovered.report {
            tracing::warn!("{repaired}");
        }
        // From here on this is the only process of this node: what a crash left may be swept.
        let scratch = files.scratch();
        sweep(&scratch).map_err(|error| DaemonError::Io {
            path: scratch.clone(),
            error,
        })?;
        let (listener, requests) = control::listen(&files)?;
        let found = probe::probe(
            &files.probe(),
            &config.limits,
            options.worker.as_ref(),
            options.gpu,
        )
        .await;
        for note in &found.notes {
            tracing::warn!("{note}");
        }

        let (artifacts_dir, limit) = (files.artifacts(), config.limits.store);
        let opened = tokio::task::spawn_blocking(move || ArtifactStore::open(&artifacts_dir, limit)).await;
        let store = opened.map_err(|_| StoreError::Stopped)??;
        let here: BTreeSet<Digest> = store.list().into_iter().map(|s| s.artifact.digest).collect();
        let rows = recovered
            .tables
            .rows(MODELS)
            .filter_map(|(key, _)| Digest::try_from(key).ok());
        let (models, gone): (BTreeSet<Digest>, BTreeSet<Digest>) =
            rows.partition(|digest| here.contains(digest));
        let own = gone
            .iter()
            .map(|d| Op::Delete {
                table: MODELS,
                key: d.0.to_vec(),
            })
            .collect();
        let schedulers = config.schedulers.iter().map(|s| s.key).collect();
        let artifacts = Artifacts::serve(store, config.listen.artifacts, &secret, schedulers, models)?;

        let stored: Vec<Stored> = Agent::TABLES
            .iter()
            .flat_map(|table| {
                recovered.tables.rows(table).map(|(key, value)| Stored {
                    table: (*table).to_owned(),
                    key: key.to_vec(),
                    value: value.to_vec(),
                })
            })
            .collect();
        drop(recovered);
        let agent = Agent::restore(
            agent_config(&config, &found, secret.clone()),
            clock(began),
            &stored,
        )?;

        let peer_config = peer_config(&config, &files.config())?;
        let (peer, mut peer_events) = Peer::start(&secret, peer_config)?;
        let mut background = JoinSet::new();
        background.spawn(async move {
            while let Some(event) = peer_events.recv().await {
                if let PeerEvent::SchedulerFound(found) = event {
                    tracing::debug!(scheduler = %found.key.short(), "found on the peer network");
                }
            }
        });

        let (back, inputs) = mpsc::channel(INPUTS_MAX);
        let (offers, newest) = watch::channel(None);
        let mut sessions = JoinSet::new();
        let mut known = BTreeMap::new();
        for scheduler in &config.schedulers {
            let (tell_addrs, artifact_addrs) = watch::channel(Vec::new());
            known.insert(
                scheduler.key,
                Known {
                    name: String::new(),
                    control_addr: scheduler.control_addr.clone(),
                    connected: false,
                    why: "not reached yet".into(),
                    offer: String::new(),
                    artifact_addrs,
                },
            );
            let to = scheduler.key;
            let tell = back.clone();
            background.spawn(advertise(peer.clone(), to, newest.clone(), move |text| {
                // Status for people: the next word replaces it anyway.
                let _ = tell.try_send(Input::OfferHeard { scheduler: to, text });
            }));
            sessions.spawn(session::keep(Dial {
                scheduler: scheduler.clone(),
                secret: secret.clone(),
                name: config.name.clone(),
                inputs: back.clone(),
                artifact_addrs: tell_addrs,
            }));
        }
        if config.schedulers.is_empty() {
            tracing::warn!(
                "no [[scheduler]] in {}: nobody will place anything here",
                files.config().display()
            );
        }
        let warm = Warm::new(
            options.worker,
            Duration::from_millis(config.timing.warm.0),
            found.memory_lent,
        );
        tracing::info!(node = %id, name = %config.name, "the node runs");
        Ok(Self {
            began,
            id,
            found,
            agent,
            writer,
            tools: Arc::new(Tools {
                artifacts,
                scratch,
                warm,
            }),
            inputs,
            back,
            waiting: VecDeque::new(),
            requests,
            links: BTreeMap::new(),
            known,
            guests: BTreeMap::new(),
            fetches: BTreeMap::new(),
            pins: BTreeMap::new(),
            own,
            offers,
            sessions,
            stalled: None,
            draining: false,
            leaving: false,
            _background: background,
            _listener: listener,
            config,
        })
    }

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
        loop {
            if self.draining && self.agent.status().held.is_empty() {
                tracing::info!("drained: the node leaves");
                return Ok(());
            }
            let mut answers = Vec::new();
            if let Some(input) = self.waiting.pop_front() {
                self.take(input, &mut out);
            } else {
                let heartbeat = Duration::from_millis(self.config.timing.heartbeat.0);
                let due = Duration::from_millis(self.agent.wake_at().0.saturating_sub(self.now().mono.0));
                let nap = tokio::time::sleep(due.clamp(TICK_MIN, heartbeat));
                tokio::select! {
                    biased;
                    _ = leave.wait_for(|leave| *leave) => return Ok(()),
                    Some(request) = self.requests.recv() => {
                        self.obey(request.command, &mut out);
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
            Input::Event(event) => event,
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
                return;
            }
            Input::OfferHeard { scheduler, text } => {
                if let Some(known) = self.known.get_mut(&scheduler) {
                    tracing::info!(scheduler = %scheduler.short(), "the offer: {text}");
                    known.offer = text;
                }
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

    fn obey(&mut self, command: Command, out: &mut Vec<Effect>) {
        let Some(owner) = command.owner() else { return };
        tracing::info!(?command, "the owner's word");
        match owner {
            // Idle workers hold memory that the owner wants now.
            OwnerCommand::Reclaim => self.tools.warm.close(),
            OwnerCommand::Open => self.tools.warm.open(),
            _ => {}
        }
        self.draining = owner == OwnerCommand::Drain;
        self.agent.handle(self.now(), Event::Owner(owner), out);
    }

    /// Stores what must be stored, then carries out the rest. False when told to leave before it could be stored.
    async fn settle(
        &mut self,
        out: &mut Vec<Effect>,
        leave: &mut watch::Receiver<bool>,
    ) -> Result<bool, DaemonError> {
        let mut ops = Vec::new();
        let mut rest = Vec::new();
        for effect in out.drain(..) {
            match effect {
                Effect::Persist(changes) => ops.extend(changes.into_iter().map(op)),
                other => rest.push(other),
            }
        }
        if !ops.is_empty() {
            ops.append(&mut self.own);
            if !self.commit(Transaction { ops }, leave).await? {
                return Ok(false);
            }
        }
        for effect in rest {
            self.carry_out(effect);
        }
        Ok(true)
    }

    /// Commits, however long the disk stays full. False when told to leave first: nothing of the batch has then left
    /// the process, so forgetting it harms nobody.
    async fn commit(
        &mut self,
        transaction: Transaction,
        leave: &mut watch::Receiver<bool>,
    ) -> Result<bool, DaemonError> {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(10));
        loop {
            let error = match self.writer.commit(transaction.clone()).await {
                Ok(_) => {
                    if self.stalled.take().is_some() {
                        tracing::info!("the state can be stored again: taking leases");
                    }
                    return Ok(true);
                }
                Err(
                    error @ (StoreError::DiskFull { .. } | StoreError::Io { .. } | StoreError::Index { .. }),
                ) => error,
                Err(error) => return Err(error.into()),
            };
            if self.stalled.is_none() {
                tracing::error!(%error, "the state cannot be stored: no leases are taken until it can");
            }
            self.stalled = Some(error.to_string());
            let again = tokio::time::sleep(backoff.next());
            tokio::pin!(again);
            loop {
                tokio::select! {
                    biased;
                    _ = leave.wait_for(|leave| *leave) => return Ok(false),
                    () = &mut again => break,
                    Some(request) = self.requests.recv() => self.obey_stalled(request),
                    Some(input) = self.inputs.recv(), if self.waiting.len() < INPUTS_MAX => self.put_off(input),
                }
            }
        }
    }

    /// The owner comes first even when nothing can be stored: guests leave now, the books follow.
    fn obey_stalled(&mut self, request: Request) {
        if let Some(owner) = request.command.owner() {
            if owner == OwnerCommand::Reclaim {
                self.tools.warm.close();
                for guest in self.guests.values() {
                    guest.stop(Duration::from_millis(self.config.timing.reclaim_grace.0));
                }
            }
            self.waiting.push_front(Input::Event(Event::Owner(owner)));
        }
        let _ = request.answer.send(self.status());
    }

    /// Keeps an input for later, except for asks: a refusal promises nothing and may leave at once.
    fn put_off(&mut self, input: Input) {
        match input {
            Input::Heard(scheduler, said) if matches!(*said, ToNode::Ask(_)) => {
                if let ToNode::Ask(ask) = *said {
                    let why = Refusal::Unable {
                        why: "the node's disk is full".into(),
                    };
                    self.say(scheduler, ToScheduler::Refused { key: ask.key, why });
                }
            }
            other => self.waiting.push_back(other),
        }
    }

    fn say(&mut self, to: SchedulerId, message: ToScheduler) {
        if let Some(link) = self.links.get_mut(&to)
            && !link.say(message)
        {
            // The session's task notices that its link is gone, and says why.
            self.links.remove(&to);
        }
    }

    fn carry_out(&mut self, effect: Effect) {
        match effect {
            Effect::Persist(_) => {}
            Effect::Send(to, message) => self.say(to, message),
            Effect::Fetch { key, fetch } => self.fetch(key, fetch),
            Effect::Start {
                key,
                order,
                first_item,
                items,
                device_class,
                devices,
            } => {
                self.start_lease(key, order, first_item, items, &device_class, devices);
            }
            Effect::Stop { key, grace } => {
                if let Some(guest) = self.guests.get(&key) {
                    // Killing takes a moment too, and the owner's deadline is the owner's.
                    let margin = (grace.0 / 4).min(250);
                    guest.stop(Duration::from_millis(grace.0 - margin));
                }
            }
            Effect::Push { key, to, artifact } => self.push(key, to, artifact),
            Effect::Forget { key } => {
                self.pins.remove(&key);
                if let Some(fetch) = self.fetches.remove(&key) {
                    fetch.abort();
                }
            }
            Effect::Advertise(offer) => {
                self.offers.send_replace(Some(Arc::new(offer.encode())));
            }
            Effect::Log(text) => tracing::info!("{text}"),
        }
    }

    fn fetch(&mut self, key: LeaseKey, mut fetch: karez_core::exchange::Fetch) {
        // A scheduler among the holders is reached where its welcome said, whatever the ask says.
        for holder in &mut fetch.holders {
            if let Some(known) = self.known.get(&SchedulerId(holder.key)) {
                let addrs = crate::artifacts::at_host(&holder.addrs, &known.control_addr);
                let more = known.artifact_addrs.borrow().clone();
                holder.addrs = addrs.into_iter().chain(more).collect();
                let mut seen = BTreeSet::new();
                holder.addrs.retain(|addr| seen.insert(addr.clone()));
            }
        }
        let (artifacts, back) = (self.tools.artifacts.clone(), self.back.clone());
        let task = tokio::spawn(async move {
            let input = match artifacts.fetch(&fetch.artifacts, &fetch.holders).await {
                Ok((pins, bytes_in)) => Input::Fetched { key, pins, bytes_in },
                // Another node may have room, a better link, or the artifact itself.
                Err(error) => Input::Event(Event::FetchFailed {
                    key,
                    why: error.to_string(),
                    retryable: true,
                }),
            };
            let _ = back.send(input).await;
        });
        if let Some(before) = self.fetches.insert(key, task.abort_handle()) {
            before.abort();
        }
    }

    fn start_lease(
        &mut self,
        key: LeaseKey,
        order: Verified<Order>,
        first_item: u64,
        items: u64,
        device_class: &str,
        devices: u32,
    ) {
        if let Some(model) = order.work.model()
            && self.tools.artifacts.is_model(model)
        {
            self.own.push(Op::Put {
                table: MODELS,
                key: model.digest.0.to_vec(),
                value: Vec::new(),
            });
            self.refresh_serving();
        }
        let device = self.found.devices.iter().find(|d| d.class == device_class);
        let (count, memory) = device.map_or((1, Bytes::ZERO), |d| (d.count.max(1), d.memory));
        let share = (u32::from(self.found.threads) / count)
            .max(1)
            .saturating_mul(devices);
        let job = Job {
            key,
            order,
            first_item,
            items,
            threads: u16::try_from(share).unwrap_or(u16::MAX).min(self.found.threads),
            memory: Bytes(memory.0.saturating_mul(devices.into())),
            gpu: device_class.starts_with("cuda/"),
            context_tokens: self.config.limits.context_tokens,
        };
        let (stopper, stopped) = stop();
        self.guests.insert(key, stopper);
        if let Some(link) = self.links.get(&job.order.scheduler) {
            link.log(
                key,
                format!("started on {} with {} threads", self.config.name, job.threads),
            );
        }
        let (tools, back) = (self.tools.clone(), self.back.clone());
        let progress = back.clone();
        let tell = Box::new(move |meters| {
            // The next one says more.
            let _ = progress.try_send(Input::Event(Event::Progress { key, meters }));
        });
        tokio::spawn(async move {
            let lease = tokio::spawn(async move { runner::run(job, &tools, stopped, tell).await });
            // Even a bug in the runner ends the lease, and only the lease.
            let ended = lease.await.unwrap_or_else(|error| Ended {
                exit: Exit::Failed {
                    why: format!("the node failed: {error}"),
                    retryable: true,
                },
                meters: WorkerMeters::default(),
                pin: None,
            });
            let _ = back
                .send(Input::Ended {
                    key,
                    ended: Box::new(ended),
                })
                .await;
        });
    }

    fn push(&mut self, key: LeaseKey, to: SchedulerId, artifact: karez_core::artifact::ArtifactRef) {
        let Some(known) = self.known.get(&to) else {
            let why = "this scheduler is no longer in node.toml".into();
            let _ = self.back.try_send(Input::Event(Event::PushFailed { key, why }));
            return;
        };
        let mut addrs = known.artifact_addrs.clone();
        let (artifacts, back) = (self.tools.artifacts.clone(), self.back.clone());
        tokio::spawn(async move {
            let pushed = async {
                // After a restart the pin of the result is gone with the old process.
                let _pin = artifacts.pin(&artifact).await?;
                let known = async {
                    addrs
                        .wait_for(|addrs| !addrs.is_empty())
                        .await
                        .ok()
                        .map(|addrs| addrs.clone())
                };
                let Ok(Some(to_addrs)) = tokio::time::timeout(PUSH_ADDR_MAX, known).await else {
                    return Err("the scheduler has not said where it takes results".into());
                };
                artifacts
                    .push(artifact, to.0, &to_addrs)
                    .await
                    .map_err(|error| error.to_string())
            };
            let event = match pushed.await {
                Ok(()) => Event::Pushed { key },
                Err(why) => Event::PushFailed { key, why },
            };
            let _ = back.send(Input::Event(event)).await;
        });
    }

    /// Tells the agent which models are here and where they are served.
    fn refresh_serving(&self) {
        let (artifacts, back) = (self.tools.artifacts.clone(), self.back.clone());
        let set = self.config.listen.artifact_addrs.clone();
        let towards: Vec<String> = self
            .known
            .values()
            .map(|known| known.control_addr.clone())
            .collect();
        tokio::spawn(async move {
            let cached = artifacts.cached().await;
            let addrs = artifacts.addrs(&set, &towards).await;
            let _ = back.send(Input::Event(Event::Serving { cached, addrs })).await;
        });
    }

    fn status(&self) -> NodeStatus {
        let agent = self.agent.status();
        let settings = self.agent.config();
        let mut notes = self.found.notes.clone();
        notes.extend(
            self.stalled
                .as_ref()
                .map(|why| format!("no leases are taken: {why}")),
        );
        NodeStatus {
            node: self.id.to_string(),
            name: self.config.name.clone(),
            institution: self.config.institution.to_string(),
            country: self.config.country.to_string(),
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            uptime_ms: self.now().mono.0,
            state: agent.state.as_str().into(),
            offer_sequence: agent.offer_sequence,
            devices: settings
                .devices
                .iter()
                .map(|d| DeviceView {
                    class: d.class.clone(),
                    count: d.count,
                    memory_bytes: d.memory.0,
                    rate: d.rate.0,
                })
                .collect(),
            engines: settings
                .engines
                .iter()
                .map(|e| EngineView {
                    name: e.name.clone(),
                    work: e.work.as_str().into(),
                    speed_milli: e.speed.0,
                    method: e.method.clone(),
                })
                .collect(),
            isolation: settings.isolation.clone(),
            schedulers: self
                .known
                .iter()
                .map(|(key, known)| SchedulerView {
                    key: key.to_string(),
                    name: known.name.clone(),
                    control_addr: known.control_addr.clone(),
                    connected: known.connected,
                    why: known.why.clone(),
                    offer: known.offer.clone(),
                })
                .collect(),
            leases: agent
                .held
                .iter()
                .map(|(scheduler, held)| LeaseView {
                    job: held.key.job.to_string(),
                    part: held.key.part,
                    fence: held.key.fence,
                    scheduler: scheduler.to_string(),
                    phase: held.phase.as_str().into(),
                    items_done: held.items_done,
                    tokens: held.tokens,
                })
                .collect(),
            guests: self.guests.len(),
            workers_warm: self.tools.warm.idle(),
            store_bytes: self.tools.artifacts.store().used().0,
            store_bytes_max: self.tools.artifacts.store().limit().0,
            notes,
        }
    }

    /// Stops the guests, tells the schedulers what became of them, and says goodbye. Takes under three seconds.
    async fn leave(&mut self) {
        self.leaving = true;
        self.tools.warm.close();
        for guest in self.guests.values() {
            guest.stop(LEAVE_GRACE);
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

fn op(change: Change) -> Op {
    match change {
        Change::Put { table, key, value } => Op::Put { table, key, value },
        Change::Delete { table, key } => Op::Delete { table, key },
        // A node keeps no ledger: its agent never posts, and the writer would refuse.
        Change::Post { posting, at } => Op::Post(posting, at),
    }
}

/// An empty directory, whatever was there.
fn sweep(dir: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    std::fs::create_dir_all(dir)
}

fn agent_config(config: &NodeConfig, found: &Found, secret: karez_core::key::SecretKey) -> AgentConfig {
    AgentConfig {
        secret,
        name: config.name.clone(),
        institution: config.institution.clone(),
        country: config.country,
        devices: found
            .devices
            .iter()
            .map(|device| Device {
                class: device.class.clone(),
                count: device.count,
                free: device.count,
                memory: device.memory,
                rate: config.rate_of(&device.class),
            })
            .collect(),
        engines: found.engines.clone(),
        cores: found.cores,
        memory: found.memory,
        isa: found.isa.clone(),
        isolation: found.isolation.clone(),
        policy: OwnerPolicy {
            institutions: config.policy.institutions.clone(),
            institutions_excluded: config.policy.institutions_excluded.clone(),
            work: config.policy.work.clone(),
        },
        offer_ttl: config.timing.offer_lifetime,
        heartbeat: config.timing.heartbeat,
        reading_interval: config.timing.reading_interval,
        reclaim_grace: config.timing.reclaim_grace,
    }
}

fn peer_config(config: &NodeConfig, path: &Path) -> Result<PeerConfig, DaemonError> {
    let peers = config.schedulers.iter().flat_map(|s| &s.peer_addrs);
    let listen = multiaddrs(config.listen.peer.iter(), path)?;
    Ok(PeerConfig {
        listen,
        ..PeerConfig::node(multiaddrs(peers, path)?)
    })
}

/// Reads multiaddresses; generic only so that this crate need not name libp2p.
fn multiaddrs<'a, T: std::str::FromStr>(
    addrs: impl Iterator<Item = &'a String>,
    path: &Path,
) -> Result<Vec<T>, DaemonError>
where
    T::Err: std::fmt::Display,
{
    let read = |addr: &'a String| {
        addr.parse().map_err(|why: T::Err| DaemonError::PeerAddr {
            path: path.to_owned(),
            addr: addr.clone(),
            why: why.to_string(),
        })
    };
    addrs.map(read).collect()
}

#[cfg(test)]
mod tests;
