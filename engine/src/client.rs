//! The node's end of a worker: starts the process, speaks the protocol, and notices when it dies.
//!
//! Start at [`Worker::spawn`], then [`Worker::load`], then [`Worker::run`] as often as needed. Dropping a [`Worker`]
//! kills its process; dropping a [`Run`] cancels it.
use std::collections::{HashMap, VecDeque};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::error::EngineError;
use crate::protocol::{
    self, Load, LoadKind, Meters, ModelFacts, Output, Piece, RUNS_MAX, Reply, Request, RunId, Work,
};
use crate::unit::Millis;

/// How a worker process is started.
#[derive(Debug, Clone, Default)]
pub struct SpawnOptions {
    /// Variables for the worker besides the few it inherits (library path and GPU selection). It gets no others.
    pub env: Vec<(OsString, OsString)>,
    /// Kill a worker that has work and says nothing for this long. It says something for every token, every 256
    /// tokens of a prompt and every batch of texts, so this bounds one step, not one run.
    pub silence_max: Option<Duration>,
}

/// Variables a worker inherits: where libraries are, and which devices it may see.
const INHERITED: [&str; 6] = [
    "LD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "GGML_VK_VISIBLE_DEVICES",
    "ZES_ENABLE_SYSMAN",
];
/// Rounds that a computing thread waits awake for the others before it sleeps, until the worker has seen how busy the
/// machine is: about a microsecond.
const SPIN_ROUNDS: &str = "100";
/// Lines of a worker's log kept for its obituary.
const LAST_WORDS: usize = 6;
/// Bytes of one log line at most; the rest is dropped.
const LINE_MAX: usize = 2048;

/// A worker process. Killed when dropped.
#[derive(Debug)]
pub struct Worker {
    shared: Arc<Shared>,
    pid: u32,
    next_run: AtomicU64,
    /// Dropped with the worker: that tells the task that owns the process to kill it.
    _alive: oneshot::Sender<()>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Bounded by what it carries: one load, at most [`RUNS_MAX`] runs and as many cancels.
    requests: mpsc::UnboundedSender<Request>,
    kill: tokio::sync::Notify,
}

#[derive(Debug, Default)]
struct State {
    /// Who waits for the model.
    loading: Option<oneshot::Sender<Result<ModelFacts, EngineError>>>,
    /// What was asked to be loaded.
    model: Option<PathBuf>,
    runs: HashMap<RunId, Arc<Mailbox>>,
    /// Why nothing more can be asked of it.
    ended: Option<EngineError>,
    words: VecDeque<String>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cancel(&self, id: RunId) {
        // A worker that is gone has no runs left to cancel.
        let _ = self.requests.send(Request::Cancel { id });
    }
}

/// What happens to a run, in order; [`Event::Done`] or [`Event::Failed`] is the last.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A piece of the answer.
    Token(Piece),
    /// It is finished.
    Done {
        /// Its result.
        output: Output,
        /// What it took.
        meters: Meters,
    },
    /// It came to nothing.
    Failed {
        /// Why.
        error: EngineError,
        /// What it took all the same. Zero when the worker itself is gone.
        meters: Meters,
    },
}

/// What has happened to a run and was not read yet. Pieces that nobody reads grow together, so a slow reader costs the
/// length of its answer and keeps nobody else waiting.
#[derive(Debug, Default)]
struct Mailbox {
    unread: Mutex<(Option<Piece>, Option<Event>)>,
    arrived: tokio::sync::Notify,
}

impl Mailbox {
    fn put(&self, event: Event) {
        {
            let mut unread = self.unread.lock().unwrap_or_else(PoisonError::into_inner);
            match (event, &mut unread.0) {
                (Event::Token(piece), Some(before)) => {
                    before.text.push_str(&piece.text);
                    before.tokens.extend(piece.tokens);
                    before.logprobs.extend(piece.logprobs);
                }
                (Event::Token(piece), none) => *none = Some(piece),
                (end, _) => unread.1 = Some(end),
            }
        }
        self.arrived.notify_one();
    }

    async fn next(&self) -> Event {
        loop {
            {
                let mut unread = self.unread.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(piece) = unread.0.take() {
                    return Event::Token(piece);
                }
                if let Some(end) = unread.1.take() {
                    return end;
                }
            }
            self.arrived.notified().await;
        }
    }
}

/// A run in progress. Cancelled when dropped before its end.
#[derive(Debug)]
pub struct Run {
    id: RunId,
    mailbox: Arc<Mailbox>,
    shared: Arc<Shared>,
    over: bool,
}

impl Worker {
    /// Starts `program` with `args`, which must end up in `karez_engine::worker::main` (as `karez worker` does).
    /// Must be called within a tokio runtime.
    pub async fn spawn(
        program: &Path,
        args: &[OsString],
        options: SpawnOptions,
    ) -> Result<Self, EngineError> {
        let mut command = Command::new(program);
        command
            .args(args)
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        for name in INHERITED {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        command.env("GOMP_SPINCOUNT", SPIN_ROUNDS);
        command.envs(options.env.iter().map(|(name, value)| (name, value)));
        die_with_this_process(&mut command);
        let failed = |error: &dyn std::fmt::Display| EngineError::Crashed {
            how: format!("{} did not start: {error}", program.display()),
        };
        let mut child = spawn_on_lasting_thread(command)
            .await
            .map_err(|error| failed(&error))?;
        let pid = child.id().unwrap_or(0);
        let (Some(stdin), Some(stdout), Some(stderr)) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            return Err(failed(&"its pipes are missing"));
        };
        let (requests, to_write) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            requests,
            kill: tokio::sync::Notify::new(),
        });
        let (alive, dropped) = oneshot::channel();
        tokio::spawn(write_requests(stdin, to_write));
        let words = tokio::spawn(read_log(stderr, pid, Arc::clone(&shared)));
        tokio::spawn(supervise(
            child,
            stdout,
            words,
            Arc::clone(&shared),
            options.silence_max,
            dropped,
        ));
        Ok(Self {
            shared,
            pid,
            next_run: AtomicU64::new(1),
            _alive: alive,
        })
    }

    /// Loads a model. To be called once; a worker that failed to load is of no further use.
    /// With a `deadline`, a worker that is not ready by then is killed.
    pub async fn load(&self, load: Load, deadline: Option<Duration>) -> Result<ModelFacts, EngineError> {
        let (tell, told) = oneshot::channel();
        {
            let mut state = self.shared.state();
            if let Some(error) = &state.ended {
                return Err(error.clone());
            }
            if state.loading.replace(tell).is_some() {
                return Err(EngineError::protocol(
                    "a second load while the first is in progress",
                ));
            }
            state.model = (load.kind != LoadKind::Noop).then(|| load.model.clone());
        }
        let _ = self.shared.requests.send(Request::Load(load));
        let answer = async { told.await.unwrap_or_else(|_| Err(self.obituary())) };
        match deadline {
            None => answer.await,
            Some(deadline) => match tokio::time::timeout(deadline, answer).await {
                Ok(answer) => answer,
                Err(_) => {
                    let error = EngineError::Hung {
                        waited: millis(deadline),
                    };
                    self.shared.state().ended = Some(error.clone());
                    self.kill();
                    Err(error)
                }
            },
        }
    }

    /// Hands over one item of work. Generations are done as many at a time as the worker has sequences, other work one after
    /// the other.
    pub fn run(&self, work: Work) -> Result<Run, EngineError> {
        let id = RunId(self.next_run.fetch_add(1, Ordering::Relaxed));
        let request = Request::Run { id, work };
        // Refused here, where only this run is hurt by it: a number that JSON lacks would be unreadable over there.
        if let Request::Run {
            work: Work::Generate(generate),
            ..
        } = &request
        {
            generate.check()?;
        }
        protocol::encode(&request).map_err(EngineError::bad_input)?;
        let mailbox = Arc::new(Mailbox::default());
        {
            let mut state = self.shared.state();
            if let Some(error) = &state.ended {
                return Err(error.clone());
            }
            if state.runs.len() >= RUNS_MAX {
                return Err(EngineError::Busy {
                    limit: RUNS_MAX as u32,
                });
            }
            state.runs.insert(id, Arc::clone(&mailbox));
        }
        let _ = self.shared.requests.send(request);
        Ok(Run {
            id,
            mailbox,
            shared: Arc::clone(&self.shared),
            over: false,
        })
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Why the worker is gone, once it is.
    pub fn ended(&self) -> Option<EngineError> {
        self.shared.state().ended.clone()
    }

    /// Runs handed over and not yet ended.
    pub fn runs(&self) -> usize {
        self.shared.state().runs.len()
    }

    /// Kills the process now; its runs fail.
    pub fn kill(&self) {
        self.shared.kill.notify_one();
    }

    /// Asks the process to end, and gives it a second before it is killed.
    pub async fn shutdown(self) {
        let _ = self.shared.requests.send(Request::Shutdown);
        for _ in 0..100 {
            if self.ended().is_some() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn obituary(&self) -> EngineError {
        self.ended().unwrap_or_else(|| EngineError::Crashed {
            how: "it ended without a word".into(),
        })
    }
}

impl Run {
    /// Its name within the worker.
    pub fn id(&self) -> RunId {
        self.id
    }

    /// What happens next; `None` after the end.
    pub async fn next(&mut self) -> Option<Event> {
        if self.over {
            return None;
        }
        let event = self.mailbox.next().await;
        self.over = !matches!(event, Event::Token(_));
        Some(event)
    }

    /// Asks the worker to stop. The end still comes as an event: [`EngineError::Cancelled`] with what was used, or
    /// the result if it was just ready.
    pub fn cancel(&self) {
        self.shared.cancel(self.id);
    }

    /// Waits for the end, tokens passed over.
    pub async fn finish(mut self) -> Result<(Output, Meters), (EngineError, Meters)> {
        loop {
            match self.next().await {
                Some(Event::Done { output, meters }) => return Ok((output, meters)),
                Some(Event::Failed { error, meters }) => return Err((error, meters)),
                Some(Event::Token(_)) => {}
                None => return Err((EngineError::Cancelled, Meters::default())),
            }
        }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if !self.over {
            self.cancel();
        }
    }
}

/// Ends the child when this process ends, however that comes about. The worker also ends when its input closes.
#[cfg(target_os = "linux")]
fn die_with_this_process(command: &mut Command) {
    let parent = rustix::process::getpid();
    let prepare = move || {
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
        // The parent may have died before the line above.
        match rustix::process::getppid() {
            Some(now) if now == parent => Ok(()),
            _ => Err(std::io::Error::other("its parent is gone")),
        }
    };
    #[expect(
        unsafe_code,
        reason = "the only way to run code in the child before it executes the program"
    )]
    // SAFETY: between fork and exec only system calls are made; nothing is allocated or locked.
    unsafe {
        command.pre_exec(prepare);
    }
}

#[cfg(not(target_os = "linux"))]
fn die_with_this_process(_: &mut Command) {}

type Started = oneshot::Sender<std::io::Result<Child>>;

/// Starts a process from a thread that lives as long as this process: the death signal is tied to the thread that
/// forked, and threads of an async runtime may end at any time.
async fn spawn_on_lasting_thread(command: Command) -> std::io::Result<Child> {
    static SPAWNER: OnceLock<Option<std::sync::mpsc::Sender<(Command, tokio::runtime::Handle, Started)>>> =
        OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (send, jobs) = std::sync::mpsc::channel::<(Command, tokio::runtime::Handle, Started)>();
        let thread = std::thread::Builder::new()
            .name("worker-spawner".into())
            .spawn(move || {
                for (mut command, runtime, started) in jobs {
                    let _inside = runtime.enter();
                    // Whoever asked may have stopped waiting: the child is then killed as it is dropped.
                    let _ = started.send(command.spawn());
                }
            });
        thread.is_ok().then_some(send)
    });
    let gone = || std::io::Error::other("the thread that starts workers is gone");
    let (tell, told) = oneshot::channel();
    let job = (command, tokio::runtime::Handle::current(), tell);
    spawner.as_ref().ok_or_else(gone)?.send(job).map_err(|_| gone())?;
    told.await.map_err(|_| gone())?
}

async fn write_requests(mut stdin: ChildStdin, mut requests: mpsc::UnboundedReceiver<Request>) {
    while let Some(request) = requests.recv().await {
        // Too long a run was refused before it came here.
        let Ok(frame) = protocol::encode(&request) else {
            continue;
        };
        if stdin.write_all(&frame).await.is_err() || stdin.flush().await.is_err() {
            // The worker is gone; the supervisor says why.
            return;
        }
    }
}

async fn read_log(mut stderr: impl AsyncRead + Unpin, pid: u32, shared: Arc<Shared>) {
    let mut line = Vec::new();
    let mut chunk = [0; 1024];
    loop {
        let got = stderr.read(&mut chunk).await.unwrap_or(0);
        for byte in &chunk[..got] {
            match byte {
                b'\n' => say(&mut line, pid, &shared),
                _ if line.len() < LINE_MAX => line.push(*byte),
                _ => {}
            }
        }
        if got == 0 {
            say(&mut line, pid, &shared);
            return;
        }
    }
}

fn say(line: &mut Vec<u8>, pid: u32, shared: &Shared) {
    let text = String::from_utf8_lossy(line).trim_end().to_owned();
    line.clear();
    if text.is_empty() {
        return;
    }
    tracing::info!(target: "karez_engine::worker", pid, "{text}");
    let mut state = shared.state();
    if state.words.len() == LAST_WORDS {
        state.words.pop_front();
    }
    state.words.push_back(text);
}

/// Owns the process from start to end: hands out its replies, and says to everyone who waits why it ended.
async fn supervise(
    mut child: Child,
    mut stdout: impl AsyncRead + Unpin,
    words: tokio::task::JoinHandle<()>,
    shared: Arc<Shared>,
    silence_max: Option<Duration>,
    mut dropped: oneshot::Receiver<()>,
) {
    let mut heard = Instant::now();
    let mut buffer = FrameBuffer::default();
    // Why it is to be ended, unless it ended by itself.
    let verdict = loop {
        // A worker without work has a right to be silent.
        let idle = {
            let state = shared.state();
            state.loading.is_none() && state.runs.is_empty()
        };
        if idle {
            heard = Instant::now();
        }
        let silence = silence_max.unwrap_or(Duration::from_secs(3600));
        // Looks again now and then, as work may have been handed over in the meantime.
        let look_again =
            tokio::time::sleep((silence / 4).clamp(Duration::from_millis(20), Duration::from_secs(5)));
        tokio::select! {
            _ = &mut dropped => break Some(EngineError::Cancelled),
            () = shared.kill.notified() => break Some(EngineError::Crashed { how: "killed by its node".into() }),
            reply = buffer.next(&mut stdout) => match reply {
                Ok(Some(reply)) => {
                    heard = Instant::now();
                    deliver(reply, &shared);
                }
                Ok(None) => break None,
                Err(error) => break Some(error),
            },
            () = look_again => {
                if let Some(max) = silence_max
                    && heard.elapsed() >= max
                    && !idle
                {
                    break Some(EngineError::Hung { waited: millis(heard.elapsed()) });
                }
            }
        }
    };
    if verdict.is_some() {
        let _ = child.start_kill();
    }
    // Its output is closed or worthless: a process that lingers now is of no use to anyone.
    let status = match tokio::time::timeout(Duration::from_secs(2), child.wait()).await {
        Ok(status) => status,
        Err(_) => {
            let _ = child.start_kill();
            child.wait().await
        }
    };
    // The log's end is often the reason; it is already in the pipe.
    let _ = tokio::time::timeout(Duration::from_millis(200), words).await;
    let mut state = shared.state();
    let error = verdict.unwrap_or_else(|| {
        let how = describe(&status, &state.words);
        match &state.model {
            // The same file would end the next worker in the same way, on every node.
            Some(model) if state.loading.is_some() && gave_up(&status) => {
                EngineError::bad_model(model, format!("the engine broke down while loading it: {how}"))
            }
            _ => EngineError::Crashed { how },
        }
    });
    let error = state.ended.get_or_insert(error).clone();
    if let Some(loading) = state.loading.take() {
        let _ = loading.send(Err(error.clone()));
    }
    for (_, run) in state.runs.drain() {
        run.put(Event::Failed {
            error: error.clone(),
            meters: Meters::default(),
        });
    }
}

fn deliver(reply: Reply, shared: &Shared) {
    let mut state = shared.state();
    // Whoever waited may have gone: nothing is then lost.
    match reply {
        Reply::Ready(facts) => {
            if let Some(loading) = state.loading.take() {
                let _ = loading.send(Ok(facts));
            }
        }
        Reply::Alive => {}
        Reply::Token { id, piece } => {
            if let Some(run) = state.runs.get(&id) {
                run.put(Event::Token(piece));
            }
        }
        Reply::Done { id, output, meters } => {
            if let Some(run) = state.runs.remove(&id) {
                run.put(Event::Done { output, meters });
            }
        }
        Reply::Failed {
            id: Some(id),
            error,
            meters,
        } => {
            if let Some(run) = state.runs.remove(&id) {
                run.put(Event::Failed { error, meters });
            }
        }
        Reply::Failed { id: None, error, .. } => {
            if let Some(loading) = state.loading.take() {
                let _ = loading.send(Err(error));
            }
        }
    }
}

/// Bytes on their way to becoming a frame. Survives being interrupted between any two reads.
#[derive(Debug, Default)]
struct FrameBuffer {
    bytes: Vec<u8>,
}

impl FrameBuffer {
    async fn next(&mut self, from: &mut (impl AsyncRead + Unpin)) -> Result<Option<Reply>, EngineError> {
        loop {
            let wanted = match self.bytes.first_chunk() {
                Some(header) => 4 + protocol::frame_length(*header)?,
                None => 4,
            };
            if self.bytes.len() >= wanted && wanted > 4 {
                let reply = protocol::decode(&self.bytes[4..wanted])?;
                self.bytes.drain(..wanted);
                return Ok(Some(reply));
            }
            if self.bytes.len() >= 4 && wanted == 4 {
                return Err(EngineError::protocol("an empty frame"));
            }
            // Grows with what has come, not with what was announced; several small frames come at once.
            let mut chunk = [0; 16 << 10];
            match from.read(&mut chunk).await {
                Ok(0) => return Ok(None),
                Ok(n) => self.bytes.extend_from_slice(&chunk[..n]),
                Err(error) => return Err(EngineError::protocol(error)),
            }
        }
    }
}

/// Whether the program itself came to a bad end, rather than being killed from outside or lacking an instruction.
fn gave_up(status: &std::io::Result<ExitStatus>) -> bool {
    use std::os::unix::process::ExitStatusExt;
    // Abort, division, invalid memory.
    status
        .as_ref()
        .is_ok_and(|status| matches!(status.signal(), Some(6 | 8 | 11)))
}

fn describe(status: &std::io::Result<ExitStatus>, words: &VecDeque<String>) -> String {
    use std::os::unix::process::ExitStatusExt;
    let mut how = match status {
        Err(error) => format!("its status is unknown: {error}"),
        Ok(status) => match (status.code(), status.signal()) {
            (Some(code), _) => format!("exit status {code}"),
            (None, Some(signal)) => format!("killed by {}", signal_name(signal)),
            (None, None) => "no exit status".into(),
        },
    };
    if !words.is_empty() {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        how.push_str(&format!("; its last words: {}", words.join(" | ")));
    }
    how
}

fn signal_name(signal: i32) -> String {
    let name = match signal {
        4 => "SIGILL (an instruction this processor lacks)",
        5 => "SIGTRAP",
        6 => "SIGABRT",
        7 => "SIGBUS (its model file may have shrunk)",
        8 => "SIGFPE",
        9 => "SIGKILL (by a person, or by the kernel for want of memory)",
        11 => "SIGSEGV",
        15 => "SIGTERM",
        24 => "SIGXCPU",
        31 => "SIGSYS",
        other => return format!("signal {other}"),
    };
    name.to_owned()
}

fn millis(duration: Duration) -> Millis {
    Millis(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX))
}
