//! The one loop that owns the controller: events in, changes committed, effects out.
//!
//! The promise: what a batch changes is on disk before anything it causes leaves the process, and no question is
//! answered from a state that a crash could still undo (questions wait for the commit under way). Events that queue
//! up while one commit is written are committed together; a lone event never waits for company.
use crate::{
    catalogue::{Catalogue, Named, SERVED},
    gateway::{batches::Batches, files::Files, tuning::Tunings},
    limits,
    pins::Pins,
    setup::utc_now,
    streams::Streams,
    tuner::Tuner,
};
use karez_core::{
    artifact::{ArtifactKind, ArtifactRef},
    controller::{Controller, Effect, Event, Reply, RequestId},
    exchange::{INPUT_MAX, ToNode, ToScheduler},
    id::JobId,
    key::{NodeId, PublicKey, SecretKey},
    records::Role,
    routing::Prefix,
    store::Change,
    translate::FromScheduler,
    unit::{Bytes, MonoMillis, Now},
};
use karez_ledger::{Op, StoreError, Transaction, Writer};
use karez_net::store::ArtifactStore;
use karez_proto::control as wire;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::sync::{RwLock, mpsc, oneshot, watch};
use tonic::Status;

/// Events that may wait; those who bring more wait for a place.
const INPUTS_MAX: usize = 4096;
/// Events handled under one commit.
const BATCH_MAX: usize = 256;
/// Changes of one batch are written in transactions of about this many bytes, each change set whole.
const TRANSACTION_BYTES: usize = 4 << 20;
/// The controller hears of the time at least this often.
const TICK: Duration = Duration::from_secs(1);
/// Messages that may wait for one node's connection; a node that reads slower than that is dropped.
pub(crate) const OUTBOX_MAX: usize = 1024;

/// Tells two sessions of one node apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SessionId(u64);

/// The loop's end of a node's session. Dropping it ends the session.
pub(crate) struct Line {
    pub(crate) outbox: mpsc::Sender<Result<wire::SchedulerMessage, Status>>,
    /// The reading task ends when this is dropped.
    pub(crate) _alive: oneshot::Sender<()>,
}

/// What reaches the loop.
pub(crate) enum Input {
    /// A question whose answer is a [`Reply`].
    Ask(Box<dyn FnOnce(RequestId) -> Event + Send>, oneshot::Sender<Reply>),
    /// How the prompt of a question begins, whose order comes next.
    Prompt(JobId, Prefix),
    /// A node's session stands. An older one of the same node ends.
    Up(NodeId, SessionId, Line),
    /// It ended.
    Down(NodeId, SessionId),
    /// The node said something. What comes from a replaced session is dropped.
    Heard(NodeId, SessionId, Box<ToScheduler>),
}

/// Everything the handlers share.
pub(crate) struct Shared {
    pub(crate) secret: SecretKey,
    pub(crate) id: PublicKey,
    pub(crate) config: crate::config::Config,
    pub(crate) dir: PathBuf,
    pub(crate) clock: Clock,
    controller: RwLock<Controller>,
    pub(crate) inputs: mpsc::Sender<Input>,
    pub(crate) writer: Writer,
    pub(crate) store: ArtifactStore,
    pub(crate) pins: Pins,
    pub(crate) catalogue: Catalogue,
    pub(crate) members: Members,
    pub(crate) limits: limits::Limits,
    pub(crate) peers: crate::peers::Book,
    pub(crate) heads: crate::witness::Heads,
    pub(crate) watchers: Watchers,
    pub(crate) streams: Streams,
    pub(crate) files: Files,
    pub(crate) batches: Batches,
    pub(crate) tunings: Tunings,
    pub(crate) tuner: Tuner,
    /// Turns true when the daemon stops.
    pub(crate) stopping: watch::Receiver<bool>,
    next_session: AtomicU64,
}

/// What [`Shared`] is made of, besides what it makes itself.
pub(crate) struct Parts {
    pub(crate) secret: SecretKey,
    pub(crate) config: crate::config::Config,
    pub(crate) dir: PathBuf,
    pub(crate) clock: Clock,
    pub(crate) controller: Controller,
    pub(crate) writer: Writer,
    pub(crate) store: ArtifactStore,
    pub(crate) catalogue: Catalogue,
    pub(crate) members: Members,
    pub(crate) heads: crate::witness::Heads,
    pub(crate) stopping: watch::Receiver<bool>,
    pub(crate) files: Files,
    pub(crate) batches: Batches,
    pub(crate) tunings: Tunings,
    pub(crate) tuner: Tuner,
}

impl Shared {
    pub(crate) fn new(parts: Parts) -> (Arc<Self>, mpsc::Receiver<Input>) {
        let (inputs, queue) = mpsc::channel(INPUTS_MAX);
        let shared = Self {
            id: PublicKey::of(&parts.secret),
            limits: limits::Limits::new(&parts.config.limits),
            secret: parts.secret,
            config: parts.config,
            dir: parts.dir,
            clock: parts.clock,
            controller: RwLock::new(parts.controller),
            inputs,
            writer: parts.writer,
            pins: Pins::new(parts.store.clone()),
            store: parts.store,
            catalogue: parts.catalogue,
            members: parts.members,
            peers: crate::peers::Book::default(),
            heads: parts.heads,
            watchers: Watchers::default(),
            streams: Streams::default(),
            files: parts.files,
            batches: parts.batches,
            tunings: parts.tunings,
            tuner: parts.tuner,
            stopping: parts.stopping,
            next_session: AtomicU64::new(1),
        };
        (Arc::new(shared), queue)
    }

    /// Answers a question from what is on disk. `question` must be brief: it holds up the loop.
    pub(crate) async fn look<T>(&self, question: impl FnOnce(&Controller) -> T) -> T {
        question(&*self.controller.read().await)
    }

    /// What a model's name stands for: in the catalogue, else among the models of providers' own servers.
    pub(crate) async fn model(&self, name: &str) -> Option<Named> {
        match self.catalogue.get(name) {
            None => {
                let served = self.look(|c| c.served().contains(name)).await;
                served.then(|| self.served(name))
            }
            named => named,
        }
    }

    /// Every model that can be asked for by name.
    pub(crate) async fn models(&self) -> Vec<(String, Named)> {
        let mut models = self.catalogue.list();
        let served = self.look(|c| c.served()).await;
        let unnamed = served
            .into_iter()
            .filter(|name| self.catalogue.get(name).is_none());
        models.extend(unnamed.map(|name| (name.clone(), self.served(&name))));
        models
    }

    fn served(&self, name: &str) -> Named {
        Named {
            artifact: ArtifactRef::served(name),
            format: SERVED.into(),
            licence: String::new(),
            by: self.id,
        }
    }

    /// Puts an event to the controller and waits until what it caused is on disk. `None` when the daemon stops.
    pub(crate) async fn ask(&self, event: impl FnOnce(RequestId) -> Event + Send + 'static) -> Option<Reply> {
        let (answer, answered) = oneshot::channel();
        self.inputs.send(Input::Ask(Box::new(event), answer)).await.ok()?;
        answered.await.ok()
    }

    /// Counts an offer that never became an event.
    pub(crate) async fn count_refused_offer(&self) {
        self.controller.write().await.count_refused_offer();
    }

    pub(crate) fn session_id(&self) -> SessionId {
        SessionId(self.next_session.fetch_add(1, Ordering::Relaxed))
    }

    /// Resolves when the daemon stops.
    pub(crate) async fn stopped(&self) {
        let mut stopping = self.stopping.clone();
        // An error means that the daemon is gone: stopped as well.
        let _ = stopping.wait_for(|stop| *stop).await;
    }
}

/// Runs until the daemon stops, or until a commit fails: what the controller believes is then ahead of the disk, and
/// only a restart mends that.
pub(crate) async fn run(shared: Arc<Shared>, mut queue: mpsc::Receiver<Input>) -> Result<(), StoreError> {
    let mut state = Loop {
        shared: shared.clone(),
        lines: HashMap::new(),
        asked: HashMap::new(),
        next_request: 1,
    };
    let mut first = Some(Event::Started);
    let mut wake = Instant::now();
    let mut batch = Vec::with_capacity(BATCH_MAX);
    loop {
        if first.is_none() {
            tokio::select! {
                biased;
                () = shared.stopped() => break,
                count = queue.recv_many(&mut batch, BATCH_MAX) => if count == 0 { break },
                () = tokio::time::sleep_until(wake.into()) => {}
            }
        }
        let now = shared.clock.now();
        let mut out = Vec::new();
        let mut controller = shared.controller.write().await;
        if batch.is_empty() {
            controller.handle(now, first.take().unwrap_or(Event::Tick), &mut out);
        }
        for input in batch.drain(..) {
            for event in state.take(input).into_iter().flatten() {
                controller.handle(now, event, &mut out);
            }
        }
        let due = Duration::from_millis(controller.wake_at().since(now.mono).0);
        let effects = commit(&shared.writer, out).await?;
        drop(controller);
        for effect in effects {
            state.carry_out(effect);
        }
        wake = Instant::now() + due.min(TICK);
    }
    let goodbye = FromScheduler::Goodbye {
        reason: "the scheduler stops; it will be back".into(),
    };
    for (_, line) in state.lines.values() {
        let _ = line.outbox.try_send(Ok(goodbye.clone().into()));
    }
    Ok(())
}

/// Writes the changes among `effects` and gives back the rest, in order.
pub(crate) async fn commit(writer: &Writer, effects: Vec<Effect>) -> Result<Vec<Effect>, StoreError> {
    let mut rest = Vec::with_capacity(effects.len());
    let mut ops = Vec::new();
    let mut bytes = 0;
    for effect in effects {
        let Effect::Persist(changes) = effect else {
            rest.push(effect);
            continue;
        };
        let size = changes.iter().map(size_of).sum::<usize>();
        if !ops.is_empty() && bytes + size > TRANSACTION_BYTES {
            writer
                .commit(Transaction {
                    ops: std::mem::take(&mut ops),
                })
                .await?;
            bytes = 0;
        }
        bytes += size;
        ops.extend(changes.into_iter().map(op));
    }
    if !ops.is_empty() {
        writer.commit(Transaction { ops }).await?;
    }
    Ok(rest)
}

fn op(change: Change) -> Op {
    match change {
        Change::Put { table, key, value } => Op::Put { table, key, value },
        Change::Delete { table, key } => Op::Delete { table, key },
        Change::Post { posting, at } => Op::Post(posting, at),
    }
}

fn size_of(change: &Change) -> usize {
    match change {
        Change::Put { key, value, .. } => key.len() + value.len(),
        Change::Delete { key, .. } => key.len(),
        Change::Post { posting, .. } => posting.evidence.iter().map(Vec::len).sum::<usize>() + 256,
    }
}

struct Loop {
    shared: Arc<Shared>,
    lines: HashMap<NodeId, (SessionId, Line)>,
    asked: HashMap<RequestId, oneshot::Sender<Reply>>,
    next_request: u64,
}

impl Loop {
    fn take(&mut self, input: Input) -> [Option<Event>; 2] {
        match input {
            Input::Ask(event, answer) => {
                let request = RequestId(self.next_request);
                self.next_request += 1;
                self.asked.insert(request, answer);
                [Some(event(request)), None]
            }
            Input::Prompt(job, prefix) => [Some(Event::Prompt { job, prefix }), None],
            Input::Up(node, session, line) => {
                let old = self.lines.insert(node, (session, line));
                let gone = old.map(|(_, old)| {
                    let reason = "another session of this node began".into();
                    let _ = old.outbox.try_send(Ok(FromScheduler::Goodbye { reason }.into()));
                    Event::NodeGone(node)
                });
                [gone, Some(Event::NodeConnected(node))]
            }
            Input::Down(node, session) if self.stands(node, session) => {
                self.lines.remove(&node);
                [Some(Event::NodeGone(node)), None]
            }
            Input::Heard(node, session, said) if self.stands(node, session) => {
                [Some(Event::Heard(node, *said)), None]
            }
            Input::Down(..) | Input::Heard(..) => [None, None],
        }
    }

    fn stands(&self, node: NodeId, session: SessionId) -> bool {
        self.lines.get(&node).is_some_and(|(known, _)| *known == session)
    }

    fn carry_out(&mut self, effect: Effect) {
        match effect {
            // Written before.
            Effect::Persist(_) => {}
            Effect::Send(node, mut said) => {
                let Some((_, line)) = self.lines.get(&node) else {
                    return;
                };
                if let ToNode::Ask(ask) = &mut said {
                    ask.input = self.small_input(ask.order.input);
                }
                if line.outbox.try_send(Ok(said.into())).is_err() {
                    // The session's own task notices that its line was cut, and says so: then the node is gone.
                    tracing::warn!(node = %node.short(), "reads too slowly or is gone: its session is cut");
                    self.cut(node);
                }
            }
            Effect::Reply(request, reply) => {
                // Whoever asked may have hung up.
                if let Some(answer) = self.asked.remove(&request) {
                    let _ = answer.send(reply);
                }
            }
            Effect::Changed(job) => {
                self.shared.pins.changed(job);
                self.shared.watchers.changed(job);
            }
            Effect::Log(text) => tracing::info!("{text}"),
        }
    }

    /// An input that is quicker sent along than fetched; it has just been written, so no disk is waited for.
    fn small_input(&self, input: ArtifactRef) -> Vec<u8> {
        let max = Bytes(INPUT_MAX as u64);
        match input.kind {
            ArtifactKind::Blob if input.bytes <= max => {
                self.shared.store.read(&input, max).unwrap_or_default()
            }
            _ => Vec::new(),
        }
    }

    /// Ends the reading task; the entry stays until that task reports [`Input::Down`].
    fn cut(&mut self, node: NodeId) {
        if let Some((_, line)) = self.lines.get_mut(&node) {
            let (dead, _) = mpsc::channel(1);
            let (alive, _) = oneshot::channel();
            *line = Line {
                outbox: dead,
                _alive: alive,
            };
        }
    }
}

/// The two clocks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock(Instant);

impl Clock {
    pub(crate) fn start() -> Self {
        Self(Instant::now())
    }

    pub(crate) fn now(&self) -> Now {
        let mono = u64::try_from(self.0.elapsed().as_millis()).unwrap_or(u64::MAX);
        Now {
            utc: utc_now(),
            mono: MonoMillis(mono),
        }
    }
}

/// Who watches which job. Jobs that nobody watches have no entry.
#[derive(Default)]
pub(crate) struct Watchers(Mutex<HashMap<JobId, watch::Sender<()>>>);

impl Watchers {
    /// Sees every change from now on; several that come quickly may be seen as one.
    pub(crate) fn subscribe(&self, job: JobId) -> watch::Receiver<()> {
        lock(&self.0)
            .entry(job)
            .or_insert_with(|| watch::channel(()).0)
            .subscribe()
    }

    fn changed(&self, job: JobId) {
        let mut table = lock(&self.0);
        if let Some(sender) = table.get(&job)
            && sender.send(()).is_err()
        {
            table.remove(&job);
        }
    }

    /// Forgets jobs that nobody watches any more.
    pub(crate) fn sweep(&self) {
        lock(&self.0).retain(|_, sender| sender.receiver_count() > 0);
    }
}

/// The admitted keys, for those who must not wait for the controller.
#[derive(Clone, Default)]
pub(crate) struct Members(Arc<Mutex<BTreeMap<PublicKey, Role>>>);

impl Members {
    pub(crate) fn admit(&self, key: PublicKey, role: Role) {
        lock(&self.0).insert(key, role);
    }

    pub(crate) fn remove(&self, key: &PublicKey) {
        lock(&self.0).remove(key);
    }

    pub(crate) fn contains(&self, key: &PublicKey) -> bool {
        lock(&self.0).contains_key(key)
    }
}

/// Every artifact some node's offer names as cached.
pub(crate) fn cached_somewhere(
    controller: &Controller,
    wanted: &BTreeSet<karez_core::id::Digest>,
) -> BTreeSet<karez_core::id::Digest> {
    let mut found = BTreeSet::new();
    for status in controller.offers() {
        found.extend(
            status
                .offer
                .cached
                .iter()
                .filter(|digest| wanted.contains(*digest)),
        );
    }
    found
}

/// A poisoned table is still a table: its holder panicked between two complete steps.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
