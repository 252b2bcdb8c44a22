//! Runs leases: input lines in, result lines out.
//!
//! No-ops run here, in the daemon itself: no artifact, no process. Everything else runs in a worker process that leases on
//! the same model share and that is kept warm between them. A worker that crashes is replaced, and what it was doing is done
//! again; only a lease whose worker crashes again and again without getting on fails.
//!
//! Each line of a result is a JSON object with the `index` of its item in the input, counted from 0, and its `id` if
//! the item had one. Not here: deciding what to run (the agent), and getting the artifacts here first.
mod input;
mod output;
mod pieces;
mod served;
mod train;
mod warm;
mod wishes;

use crate::{
    artifacts::Artifacts,
    energy::{self, Span},
    server::Server,
    stop::Stopped,
};
use input::{Asked, Item, Lines};
use karez_core::{
    agent::{Exit, WorkerMeters},
    artifact::ArtifactRef,
    id::LeaseKey,
    records::{Generate, Order, Verified, Work},
    routing::{Prefix, TOOLS, text_of},
    translate::Piece,
    unit::{Bytes, Millis},
};
use karez_engine::{
    EngineError, Event, FailureKind, Run,
    json::Json,
    protocol::{self, Finish, Load, LoadKind, Output, Prompt, TokenLogprob},
};
use karez_net::store::Pin;
use output::Results;
use pieces::Telling;
use serde::Serialize;
use std::{
    collections::VecDeque,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};
use warm::{Folder, Footprint, Lent, ModelKey, Start};
pub(crate) use warm::{Warm, WarmPolicy};

/// Progress is told at most this often.
pub const PROGRESS_EVERY: Duration = Duration::from_millis(200);
/// How often it is said that work goes on, where somebody waits for it.
pub(crate) const ALIVE_EVERY: Duration = Duration::from_secs(1);
/// A model must be loaded within this.
const LOAD_MAX: Duration = Duration::from_secs(600);
/// A worker that is silent during one step for longer than this is killed.
pub(crate) const SILENCE_MAX: Duration = Duration::from_secs(300);
/// Texts of one batch, and their bytes together.
const BATCH_TEXTS: usize = 32;
const BATCH_BYTES: usize = 256 << 10;
/// Batches or prompts handed to the worker beyond those it computes at a time, so that it never waits for the next one.
const AHEAD: usize = 2;
/// Memory that one worker sets aside for adapters.
const ADAPTERS_MIN: u64 = 32 << 20;
const ADAPTERS_MAX: u64 = 512 << 20;
/// Workers that may die under a lease without an item done in between.
const FALLS_MAX: u32 = 2;

/// One lease to run.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    pub(crate) key: LeaseKey,
    pub(crate) order: Verified<Order>,
    pub(crate) first_item: u64,
    pub(crate) items: u64,
    /// Threads the worker computes with.
    pub(crate) threads: u16,
    /// Memory the model may use.
    pub(crate) memory: Bytes,
    /// The state to go on from.
    pub(crate) from: Option<ArtifactRef>,
    /// The GPUs it has to itself, or the one it shares; none on a CPU.
    pub(crate) gpus: Vec<String>,
    /// Its share of a device, in thousandths; 0 where it has whole ones.
    pub(crate) share_milli: u32,
    /// Tokens of context the owner allows.
    pub(crate) context_tokens: Option<u32>,
}

/// What it came to.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) exit: Exit,
    pub(crate) meters: WorkerMeters,
    /// Keeps the result until the lease is forgotten.
    pub(crate) pin: Option<Pin>,
}

/// What every lease needs of the node.
pub(crate) struct Tools {
    pub(crate) artifacts: Artifacts,
    pub(crate) scratch: PathBuf,
    pub(crate) warm: Arc<Warm>,
    /// Threads that all workers together may compute with.
    pub(crate) threads: u16,
    /// Generations that one worker computes at a time.
    pub(crate) sequences: u16,
    /// The owner's own trainer.
    pub(crate) trainer: Option<crate::trainer::Trainer>,
    /// What can tell the energy of a lease.
    pub(crate) energy: Arc<energy::Meters>,
    /// What the owner runs already, where the node fronts that.
    pub(crate) server: Option<Arc<Server>>,
}

/// Why a lease came to nothing.
enum Failure {
    /// It would fail the same way everywhere.
    Job(String),
    /// Elsewhere it may work.
    Node(String),
    /// The worker died; another one may do it.
    Fell(String),
    /// It was told to stop.
    Stopped,
    /// The same, and this is what it left for the next attempt.
    Left(Pin),
}

impl From<EngineError> for Failure {
    fn from(error: EngineError) -> Self {
        if error.kind().retryable() {
            Self::Node(error.to_string())
        } else {
            Self::Job(error.to_string())
        }
    }
}

/// What a lease tells on its way.
#[derive(Debug)]
pub(crate) enum Told {
    /// Totals, at most every [`PROGRESS_EVERY`].
    Meters(WorkerMeters),
    /// A piece of an answer, where the order asked for it.
    Piece(Piece),
    /// There may be nothing to show yet, but it is being worked on. Said every second where somebody waits.
    Alive,
}

/// Must not block.
pub(crate) type Tell = Arc<dyn Fn(Told) + Send + Sync>;

/// For ever where there is no time.
async fn until(at: Option<tokio::time::Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Waits for something that goes on for a while, and says every second that it does.
async fn alive<T>(tell: Option<Tell>, work: impl Future<Output = T>) -> T {
    let Some(tell) = tell else { return work.await };
    tokio::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return done,
            () = tokio::time::sleep(ALIVE_EVERY) => tell(Told::Alive),
        }
    }
}

/// Runs one lease to its end. Gone within the grace once told to stop, whatever the worker does.
pub(crate) async fn run(job: Job, tools: &Tools, stopped: Stopped, tell: Tell) -> Ended {
    let mut lease = Running {
        results: Results::new(tools.scratch.join(format!("result-{}", file_name(&job.key)))),
        meters: WorkerMeters::default(),
        told: Instant::now(),
        live_tokens: 0,
        telling: Telling::new(tell.clone()),
        energy: tools.energy.clone(),
        span: tools.energy.begin(&job.gpus),
        memory: Resident::default(),
        alive_at: tokio::time::Instant::now(),
        busy_ms: None,
        tell,
        stopped,
        job,
    };
    let done = match lease.job.order.work.clone() {
        Work::Noop { millis_per_item } => lease.noop(millis_per_item).await.map(|()| None),
        work if work.is_served() => lease.served(tools).await.map(|()| None),
        Work::Train(train) => lease.train(&train, tools).await.map(Some),
        _ => lease.with_worker(tools).await.map(|()| None),
    };
    let done = match done {
        Ok(Some(pin)) => Ok(pin),
        Ok(None) => lease.finish(tools).await,
        Err(failure) => Err(failure),
    };
    let meters = lease.metered();
    let (exit, pin) = match done {
        Ok(pin) => (Exit::Done(pin.artifact()), Some(pin)),
        Err(Failure::Job(why)) => (
            Exit::Failed {
                why,
                retryable: false,
            },
            None,
        ),
        Err(Failure::Node(why) | Failure::Fell(why)) => (Exit::Failed { why, retryable: true }, None),
        Err(Failure::Stopped) => (Exit::Stopped, None),
        Err(Failure::Left(pin)) => (Exit::Left(pin.artifact()), Some(pin)),
    };
    Ended { exit, meters, pin }
}

fn file_name(key: &LeaseKey) -> String {
    format!("{}-{}-{}", key.job.short(), key.part, key.fence)
}

struct Running {
    job: Job,
    results: Results,
    meters: WorkerMeters,
    told: Instant,
    /// Tokens seen of runs that are not done yet.
    live_tokens: u64,
    telling: Telling,
    energy: Arc<energy::Meters>,
    span: Span,
    memory: Resident,
    /// When it is next said that work goes on.
    alive_at: tokio::time::Instant,
    /// Processor time of the worker at the last look.
    busy_ms: Option<u64>,
    tell: Tell,
    stopped: Stopped,
}

#[derive(Serialize)]
struct Line<'a, T> {
    index: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a Json>,
    #[serde(flatten)]
    what: T,
}

/// Resident memory of a lease's workers over time: each look stands for the time since the one before.
#[derive(Default)]
struct Resident {
    of: Option<(Footprint, Instant)>,
    byte_ms: u128,
    seen: bool,
}

impl Resident {
    /// From now on it is this one's.
    fn follow(&mut self, footprint: Footprint) {
        self.look();
        self.of = Some((footprint, Instant::now()));
    }

    fn look(&mut self) {
        if let Some((footprint, since)) = &mut self.of
            && let Some(bytes) = footprint.bytes()
        {
            self.byte_ms += u128::from(bytes) * since.elapsed().as_millis();
            *since = Instant::now();
            self.seen = true;
        }
    }

    /// Byte-seconds so far; nothing where it could never be looked at.
    fn read(&mut self) -> Option<u64> {
        self.look();
        let seconds = u64::try_from(self.byte_ms / 1_000).unwrap_or(u64::MAX);
        self.seen.then_some(seconds)
    }
}

/// Where items come from.
struct Feed {
    lines: Lines,
    /// Read, but too long for the batch before it.
    held: Option<Item>,
    /// What a worker that died had not done, to be done before anything else.
    again: VecDeque<Vec<Item>>,
    /// Lines are left.
    more: bool,
}

/// A batch and its run, or why there is none.
type Flying = (Vec<Item>, Result<Run, EngineError>);

#[derive(Serialize)]
struct ErrorLine {
    error: Refused,
}

#[derive(Serialize)]
struct Refused {
    kind: FailureKind,
    message: String,
}

#[derive(Serialize)]
struct Nothing {}

#[derive(Serialize)]
struct Vector<'a> {
    embedding: &'a [f32],
}

#[derive(Serialize)]
struct Answer<'a> {
    text: &'a str,
    tokens_in: u64,
    tokens_out: u64,
    #[serde(skip_serializing_if = "is_zero")]
    tokens_cached: u64,
    finish: Finish,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    logprobs: &'a [TokenLogprob],
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for a reference")]
fn is_zero(n: &u64) -> bool {
    *n == 0
}

impl Running {
    /// A worker is ready, which was asked for at `began`.
    fn loaded(&mut self, began: Instant) {
        let took = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.meters.loading = self.meters.loading.saturating_add(Millis(took));
    }

    fn progress(&mut self) {
        if self.told.elapsed() >= PROGRESS_EVERY {
            self.told = Instant::now();
            let mut meters = self.metered();
            meters.tokens_out += self.live_tokens;
            (self.tell)(Told::Meters(meters));
        }
    }

    /// Whom to tell that work goes on: somebody waits for the one answer.
    fn waited_for(&self) -> Option<Tell> {
        let waits = matches!(self.job.order.work, Work::Generate(_)) && self.job.order.items == 1;
        waits.then(|| self.tell.clone())
    }

    /// Says that work goes on, if the worker's processor time has grown: one that hangs must not pass for one that works.
    fn say_alive(&mut self, pid: u32) {
        self.alive_at = tokio::time::Instant::now() + ALIVE_EVERY;
        let Some(tell) = self.waited_for() else { return };
        let busy = processor_ms(pid);
        let grew = busy.is_none() || busy > self.busy_ms;
        self.busy_ms = busy;
        if grew {
            tell(Told::Alive);
        }
    }

    /// Tells an answer as it is written, where the order asks for that.
    fn stream(&mut self, item: u64, piece: protocol::Piece) {
        if matches!(&self.job.order.work, Work::Generate(g) if g.stream) {
            self.telling.add(item, self.live_tokens, piece);
        }
    }

    /// The answer under way has ended.
    fn answered(&mut self) {
        self.telling.end();
        self.live_tokens = 0;
    }

    /// The meters so far, with the energy.
    fn metered(&mut self) -> WorkerMeters {
        WorkerMeters {
            memory_byte_seconds: self.memory.read(),
            energy: self.span.read(&self.energy, self.meters.cpu),
            ..self.meters
        }
    }

    fn write<T: Serialize>(&mut self, index: u64, id: Option<&Json>, what: T) -> Result<(), Failure> {
        self.results
            .line(&Line { index, id, what })
            .map_err(|e| Failure::Node(format!("the node's disk: {e}")))?;
        self.meters.items += 1;
        self.meters.bytes_out = Bytes(self.results.bytes());
        Ok(())
    }

    async fn finish(&mut self, tools: &Tools) -> Result<Pin, Failure> {
        let results = self.results.take();
        let store = tools.artifacts.store().clone();
        tokio::task::spawn_blocking(move || results.keep(&store))
            .await
            .map_err(|_| Failure::Node("the node could not store the result".into()))?
            .map_err(|error| Failure::Node(format!("the node could not store the result: {error}")))
    }

    async fn noop(&mut self, millis_per_item: u32) -> Result<(), Failure> {
        /// Between two looks at whether to stop, when there is nothing to wait for.
        const BURST: u64 = 4096;
        let began = tokio::time::Instant::now();
        for done in 0..self.job.items {
            if millis_per_item > 0 {
                let due = began + Duration::from_millis(u64::from(millis_per_item).saturating_mul(done + 1));
                self.nap_until(due).await?;
            } else if done % BURST == BURST - 1 {
                tokio::task::yield_now().await;
                if self.stopped.is_said() {
                    return Err(Failure::Stopped);
                }
            }
            self.write(self.job.first_item + done, None, Nothing {})?;
            self.progress();
        }
        Ok(())
    }

    /// Sleeps, but tells its progress on the way and wakes when told to stop.
    async fn nap_until(&mut self, due: tokio::time::Instant) -> Result<(), Failure> {
        loop {
            self.progress();
            let until = due.min(tokio::time::Instant::now() + PROGRESS_EVERY);
            tokio::select! {
                () = tokio::time::sleep_until(until) => if until >= due { return Ok(()) },
                () = self.stopped.said() => return Err(Failure::Stopped),
            }
        }
    }

    /// The items of the part.
    async fn lines(&self, tools: &Tools) -> Result<Lines, Failure> {
        let job = &self.job;
        let input = tools.artifacts.path(&job.order.input).await;
        Ok(Lines::open(
            input.map_err(Failure::Node)?,
            job.order.work.clone(),
            job.first_item,
            job.items,
        ))
    }

    async fn with_worker(&mut self, tools: &Tools) -> Result<(), Failure> {
        let mut feed = Feed {
            lines: self.lines(tools).await?,
            held: None,
            again: VecDeque::new(),
            more: true,
        };
        let mut falls = 0;
        loop {
            let mut stopped = self.stopped.clone();
            // Dropping what is not ready yet kills the half-started worker.
            let began = Instant::now();
            let lent = tokio::select! {
                lent = alive(self.waited_for(), self.worker(tools)) => lent?,
                () = stopped.said() => return Err(Failure::Stopped),
            };
            self.loaded(began);
            self.memory.follow(lent.footprint());
            let before = self.meters.items;
            let mut flight = VecDeque::new();
            let done = self.items(&lent, &mut feed, &mut flight).await;
            self.memory.look();
            match done {
                Ok(()) => return Ok(()),
                Err(Failure::Fell(why)) => {
                    falls = if self.meters.items > before { 1 } else { falls + 1 };
                    if falls > FALLS_MAX {
                        return Err(Failure::Node(why));
                    }
                    tracing::warn!(lease = %self.job.key, %why, "the worker died: another one takes over");
                    self.live_tokens = 0;
                    self.telling.begin_again();
                    flight
                        .into_iter()
                        .rev()
                        .for_each(|(batch, _)| feed.again.push_front(batch));
                }
                Err(failure) => {
                    self.call_back(&lent, flight).await;
                    return Err(failure);
                }
            }
        }
    }

    /// Cancels what the worker still has, and kills the worker when it does not let go in time.
    async fn call_back(&mut self, lent: &Lent, flight: VecDeque<Flying>) {
        let mut runs: Vec<Run> = flight.into_iter().filter_map(|(_, run)| run.ok()).collect();
        runs.iter().for_each(Run::cancel);
        let mut stopped = self.stopped.clone();
        let patience = async {
            if stopped.is_said() {
                stopped.overdue().await
            } else {
                tokio::time::sleep(Duration::from_secs(2)).await
            }
        };
        let meters = &mut self.meters;
        let leaving = async {
            for run in &mut runs {
                while let Some(event) = run.next().await {
                    match event {
                        Event::Failed { meters: used, .. } | Event::Done { meters: used, .. } => {
                            add(meters, &used)
                        }
                        Event::Token(_) => {}
                    }
                }
            }
        };
        tokio::select! {
            () = leaving => {}
            () = patience => lent.worker().kill(),
        }
    }

    /// A worker with the model loaded: a warm one, or a new one.
    async fn worker(&self, tools: &Tools) -> Result<Lent, Failure> {
        let job = &self.job;
        let Some(model) = job.order.work.model().copied() else {
            return Err(Failure::Job("this work names no model".into()));
        };
        let kind = match job.order.work {
            Work::Embed { .. } => LoadKind::Embed,
            Work::Train(_) => LoadKind::Train,
            _ => LoadKind::Generate,
        };
        let key = ModelKey {
            kind,
            model,
            gpus: job.gpus.clone(),
            share_milli: if job.gpus.is_empty() { 0 } else { job.share_milli },
        };
        let lent = match tools.warm.lend(&key) {
            Some(lent) => lent,
            None => {
                // Another lease may be loading the same model just now.
                let _turn = tools.warm.turn(&key).await;
                match tools.warm.lend(&key) {
                    Some(lent) => lent,
                    None => self.start(key, tools).await?,
                }
            }
        };
        if let Work::Generate(Generate {
            adapter: Some(adapter),
            ..
        }) = &job.order.work
        {
            let path = tools.artifacts.path(adapter).await.map_err(Failure::Node)?;
            let place = lent.adapters().join(adapter_name(adapter));
            tokio::task::spawn_blocking(move || match std::fs::hard_link(&path, &place) {
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
                // The store may lie on another disk.
                Err(_) => std::fs::copy(&path, &place).map(|_| ()),
                Ok(()) => Ok(()),
            })
            .await
            .map_err(|_| Failure::Node("the adapter could not be put in place".into()))?
            .map_err(|error| Failure::Node(format!("the adapter could not be put in place: {error}")))?;
        }
        Ok(lent)
    }

    /// Plans the memory and starts a worker with the model.
    async fn start(&self, key: ModelKey, tools: &Tools) -> Result<Lent, Failure> {
        let job = &self.job;
        let (kind, model) = (key.kind, key.model);
        let files = tools
            .artifacts
            .model(&model, &tools.scratch)
            .await
            .map_err(Failure::Node)?;
        if kind == LoadKind::Train {
            return self.trainer(tools, key, files).await;
        }
        let inspected = files.path.clone();
        let file = tokio::task::spawn_blocking(move || karez_engine::inspect::inspect(&inspected))
            .await
            .map_err(|_| Failure::Node("the model could not be inspected".into()))??;
        let memory = job.memory;
        let (context, cache) = match kind {
            LoadKind::Generate => {
                let context = file.context_for(job.context_tokens);
                (
                    Some(context),
                    Some(file.cache_tokens(context, tools.sequences, memory)),
                )
            }
            _ => (None, None),
        };
        let estimate = file.memory_estimate(cache.unwrap_or(512));
        if estimate > memory {
            return Err(EngineError::TooLarge {
                needs: estimate,
                has: memory,
            }
            .into());
        }
        // A quarter of the weights holds some adapters of the usual ranks; where the lease leaves less, they have less.
        let for_adapters = match kind {
            LoadKind::Generate => (file.weights.0 / 4).clamp(ADAPTERS_MIN, ADAPTERS_MAX),
            _ => 0,
        };
        let for_adapters = for_adapters.min(memory.0 - estimate.0);
        let name = format!("adapters-{:016x}", getrandom::u64().unwrap_or_default());
        let adapters = Folder(tools.scratch.join(name));
        std::fs::create_dir(&adapters.0).map_err(|e| Failure::Node(format!("the node's disk: {e}")))?;
        // Leases on this model will share it: alone on the machine, it computes with all that is lent.
        let alone = job.gpus.is_empty() && job.share_milli == 0 && !tools.warm.is_busy();
        let threads = if alone {
            tools.threads.max(job.threads)
        } else {
            job.threads
        };
        let load = Load {
            context_tokens: context,
            cache_tokens: cache,
            sequences: (kind == LoadKind::Generate).then_some(tools.sequences),
            threads: Some(threads),
            memory_limit: Some(memory),
            gpu_layers: job.gpus.is_empty().then_some(0),
            adapters: Some(adapters.0.clone()),
            adapter_memory: Some(Bytes(for_adapters)),
            digest: Some(model.digest.to_string()),
            ..Load::new(kind, files.path.clone())
        };
        let start = Start {
            key,
            load,
            memory: Bytes(estimate.0 + for_adapters),
            model: files,
            adapters,
            load_max: LOAD_MAX,
        };
        let lent = tools.warm.start(start).await?;
        tracing::info!(lease = %job.key, model = %model.digest.short(), pid = lent.worker().pid(), "model loaded");
        Ok(lent)
    }

    /// Keeps the worker fed and writes what comes back, in the order of the items.
    async fn items(
        &mut self,
        lent: &Lent,
        feed: &mut Feed,
        flight: &mut VecDeque<Flying>,
    ) -> Result<(), Failure> {
        // An early one that takes long must not leave the worker's other sequences empty.
        let ahead = match lent.sequences() {
            1 => AHEAD,
            many => many * 2 + AHEAD,
        };
        loop {
            while (feed.more || !feed.again.is_empty()) && flight.len() < ahead {
                let batch = match feed.again.pop_front() {
                    Some(batch) => batch,
                    None => self.next_batch(&mut feed.lines, &mut feed.held).await?,
                };
                if batch.is_empty() {
                    feed.more = false;
                    continue;
                }
                let work = self.work_of(&batch);
                if let Ok(protocol::Work::Generate(request)) = &work {
                    lent.remember(prefix_of(&request.prompt, &self.job.order.work));
                }
                match work.and_then(|work| lent.worker().run(work)) {
                    Err(error @ (EngineError::Crashed { .. } | EngineError::Hung { .. })) => {
                        feed.again.push_front(batch);
                        return Err(Failure::Fell(error.to_string()));
                    }
                    // Other leases keep it busy.
                    Err(EngineError::Busy { .. }) => {
                        feed.again.push_front(batch);
                        break;
                    }
                    run => flight.push_back((batch, run)),
                }
            }
            let event = match flight.front_mut() {
                None if feed.again.is_empty() => return Ok(()),
                None => {
                    self.nap_until(tokio::time::Instant::now() + Duration::from_millis(50))
                        .await?;
                    continue;
                }
                Some((_, Err(error))) => Some(Event::Failed {
                    error: error.clone(),
                    meters: protocol::Meters::default(),
                }),
                Some((_, Ok(run))) => tokio::select! {
                    event = run.next() => event,
                    () = self.stopped.said() => return Err(Failure::Stopped),
                    () = until(self.telling.due()) => {
                        self.telling.flush();
                        continue;
                    }
                    () = tokio::time::sleep_until(self.alive_at) => {
                        self.say_alive(lent.worker().pid());
                        continue;
                    }
                },
            };
            match event {
                Some(Event::Token(piece)) => {
                    let tokens = piece.tokens.len() as u64;
                    if let Some((batch, _)) = flight.front()
                        && let [item] = batch.as_slice()
                    {
                        self.stream(item.index, piece);
                    }
                    self.live_tokens += tokens;
                }
                Some(Event::Done { output, meters }) => {
                    self.answered();
                    add(&mut self.meters, &meters);
                    if let Some((batch, _)) = flight.pop_front() {
                        self.results_of(&batch, output, &meters)?;
                    }
                }
                Some(Event::Failed { error, .. }) if lent.worker().ended().is_some() => {
                    // It stays in front, to be done again.
                    return Err(Failure::Fell(error.to_string()));
                }
                Some(Event::Failed { error, meters }) => {
                    self.answered();
                    add(&mut self.meters, &meters);
                    let batch = flight.pop_front().map(|(batch, _)| batch).unwrap_or_default();
                    self.refused(&batch, error)?;
                }
                None => return Err(Failure::Node("the worker ended a run without a word".into())),
            }
            self.progress();
        }
    }

    /// What comes of a line that cannot be done: its error, or that of the lease.
    fn refused(&mut self, batch: &[Item], error: EngineError) -> Result<(), Failure> {
        let keep_going = matches!(&self.job.order.work, Work::Generate(g) if g.keep_going);
        let lines_fault = matches!(
            error,
            EngineError::BadInput { .. } | EngineError::ContextOverflow { .. }
        );
        match batch {
            [item] if keep_going && lines_fault => {
                let why = Refused {
                    kind: error.kind(),
                    message: error.to_string(),
                };
                self.write(item.index, item.id.as_ref(), ErrorLine { error: why })
            }
            _ => Err(blame(error, batch)),
        }
    }

    /// The next texts that fit one batch, or the next prompt; empty at the end.
    async fn next_batch(&mut self, lines: &mut Lines, held: &mut Option<Item>) -> Result<Vec<Item>, Failure> {
        let most = match self.job.order.work {
            Work::Embed { .. } => BATCH_TEXTS,
            _ => 1,
        };
        let (mut batch, mut bytes) = (Vec::new(), 0);
        while batch.len() < most {
            let next = match held.take() {
                Some(item) => Some(item),
                None => tokio::select! {
                    item = lines.next() => item.map_err(Failure::Job)?,
                    () = self.stopped.said() => return Err(Failure::Stopped),
                },
            };
            let Some(item) = next else { break };
            if !batch.is_empty() && bytes + item.bytes > BATCH_BYTES {
                *held = Some(item);
                break;
            }
            bytes += item.bytes;
            batch.push(item);
        }
        Ok(batch)
    }

    fn work_of(&self, batch: &[Item]) -> Result<protocol::Work, EngineError> {
        Ok(match (&self.job.order.work, batch) {
            (Work::Generate(g), [item, ..]) => {
                let system = item.system.clone().or_else(|| Some(g.system.clone()));
                let system = system.filter(|s| !s.is_empty());
                let prompt = match &item.asked {
                    Asked::Unreadable(why) => return Err(bad_input(why.clone())),
                    Asked::Text(text) if g.raw => Prompt::Raw { text: text.clone() },
                    Asked::Text(text) => Prompt::Text {
                        text: text.clone(),
                        system,
                    },
                    Asked::Messages(messages) => {
                        let has_system = messages.first().is_some_and(|m| m.role == "system");
                        let system = system.filter(|_| !has_system);
                        let system = system.map(|content| protocol::Message::new("system", content));
                        Prompt::Chat {
                            messages: system.into_iter().chain(messages.iter().cloned()).collect(),
                            tools: Vec::new(),
                        }
                    }
                };
                let mut request = item.wishes.request(g, prompt, item.index).map_err(bad_input)?;
                request.adapter = g.adapter.as_ref().map(|adapter| protocol::Adapter {
                    file: adapter_name(adapter),
                    scale: 1.0,
                });
                protocol::Work::Generate(request)
            }
            _ => protocol::Work::Embed {
                texts: batch
                    .iter()
                    .map(|item| match &item.asked {
                        Asked::Text(text) => text.clone(),
                        Asked::Messages(_) | Asked::Unreadable(_) => String::new(),
                    })
                    .collect(),
            },
        })
    }

    fn results_of(&mut self, batch: &[Item], output: Output, used: &protocol::Meters) -> Result<(), Failure> {
        match output {
            Output::Vectors { vectors, .. } if vectors.len() == batch.len() => {
                for (item, vector) in batch.iter().zip(&vectors) {
                    self.write(item.index, item.id.as_ref(), Vector { embedding: vector })?;
                }
                Ok(())
            }
            Output::Text {
                text,
                finish,
                logprobs,
            } if batch.len() == 1 => {
                let answer = Answer {
                    text: &text,
                    tokens_in: used.tokens_in,
                    tokens_out: used.tokens_out,
                    tokens_cached: used.tokens_cached,
                    finish,
                    logprobs: &logprobs,
                };
                self.write(batch[0].index, batch[0].id.as_ref(), answer)
            }
            _ => Err(Failure::Node(
                "the worker answered something else than was asked".into(),
            )),
        }
    }
}

/// How a prompt begins, as schedulers see it too.
fn prefix_of(prompt: &Prompt, work: &Work) -> Prefix {
    let text = match prompt {
        Prompt::Raw { text } => text_of([("", text.as_str())].into_iter()),
        Prompt::Text { text, system } => {
            let system = system.iter().map(|text| ("system", text.as_str()));
            text_of(system.chain([("user", text.as_str())]))
        }
        Prompt::Chat { messages, tools } => {
            let tools = (!tools.is_empty()).then(|| serde_json::to_string(tools).unwrap_or_default());
            let tools = tools.iter().map(|tools| (TOOLS, tools.as_str()));
            text_of(tools.chain(messages.iter().map(|m| (m.role.as_str(), m.content.as_str()))))
        }
    };
    match work {
        Work::Generate(g) => Prefix::of(
            &g.model.digest,
            g.adapter.as_ref().map(|adapter| &adapter.digest),
            &text,
        ),
        _ => Prefix::default(),
    }
}

/// Processor time of a process so far; nothing where the system does not tell.
fn processor_ms(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name before may hold anything, parentheses included.
    let rest = stat.rsplit_once(')')?.1;
    let mut fields = rest.split_ascii_whitespace().skip(11);
    let (user, system): (u64, u64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    // Linux counts in hundredths of a second wherever programs can see it.
    Some((user + system) * 10)
}

fn bad_input(reason: String) -> EngineError {
    EngineError::BadInput { reason }
}

/// What an adapter is called in its worker's directory.
fn adapter_name(adapter: &ArtifactRef) -> String {
    format!("{}.gguf", adapter.digest)
}

/// Names the lines at fault where it is the input's fault.
fn blame(error: EngineError, batch: &[Item]) -> Failure {
    let retryable = error.kind().retryable();
    match (batch, retryable) {
        (_, true) => Failure::Node(error.to_string()),
        ([], false) => Failure::Job(error.to_string()),
        ([item], false) => Failure::Job(format!("line {} of the input: {error}", item.index + 1)),
        ([first, .., last], false) => Failure::Job(format!(
            "lines {} to {} of the input: {error}",
            first.index + 1,
            last.index + 1
        )),
    }
}

fn add(total: &mut WorkerMeters, used: &protocol::Meters) {
    total.cpu = total.cpu.saturating_add(used.cpu_ms);
    total.memory_peak = total.memory_peak.max(used.peak_rss);
    total.tokens_in += used.tokens_in;
    total.tokens_out += used.tokens_out;
    total.tokens_cached += used.tokens_cached;
}

#[cfg(test)]
mod tests;
