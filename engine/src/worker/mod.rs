//! The worker's end: one process, one model, one run at a time.
//!
//! [`main`] takes the first request from standard input, checks the model's headers, closes the sandbox around
//! itself and only then lets an engine open the file. A second thread then listens for cancels while the first
//! computes; the process ends when its input closes, whatever it is doing.
mod bert;
mod chat;
mod check;
mod encoder;
mod llama;
mod meter;
mod noop;
mod sandbox;

use std::collections::VecDeque;
use std::fs::File;
use std::io::BufReader;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::error::EngineError;
use crate::inspect::{Format, ModelFile, inspect};
use crate::probe;
use crate::protocol::{
    self, Isolation, Load, LoadKind, Meters, ModelFacts, Output, Piece, RUNS_MAX, Reply, Request, RunId, Work,
};
pub use check::{IsolationCheck, check_isolation};
use meter::Meter;

/// Does one kind of work with one loaded model.
trait Engine {
    /// What is known of the model. The isolation in it is filled in later.
    fn facts(&self) -> ModelFacts;
    /// Does one item of work. Looks at [`Desk::check`] as often as it can.
    fn run(&mut self, work: Work, desk: &mut Desk<'_>) -> Result<Output, EngineError>;
}

/// What an engine sees of the world during a run.
struct Desk<'a> {
    id: RunId,
    cancelled: &'a AtomicBool,
    outlet: &'a Outlet,
    tokens_in: u64,
    tokens_out: u64,
    tokens_cached: u64,
}

impl Desk<'_> {
    /// An error once the run is cancelled.
    fn check(&self) -> Result<(), EngineError> {
        if self.cancelled.load(Ordering::Relaxed) {
            Err(EngineError::Cancelled)
        } else {
            Ok(())
        }
    }

    /// Shows a piece of the answer.
    fn token(&self, text: &str) {
        if !text.is_empty() {
            self.outlet.say(&Reply::Token {
                id: self.id,
                piece: Piece {
                    text: text.to_owned(),
                    ..Piece::default()
                },
            });
        }
    }

    /// Tells the node that work goes on.
    fn alive(&self) {
        self.outlet.say(&Reply::Alive);
    }
}

/// The way to the node. Two threads share it.
struct Outlet(Mutex<File>);

impl Outlet {
    fn say(&self, reply: &Reply) {
        let mut file = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if protocol::write(&mut *file, reply).is_err() {
            // Nobody listens any more.
            end(0);
        }
    }
}

/// Runs that wait, and the one in progress.
#[derive(Default)]
struct Tray {
    waiting: VecDeque<(RunId, Work, Arc<AtomicBool>)>,
    current: Option<(RunId, Arc<AtomicBool>)>,
}

#[derive(Default)]
struct Inbox {
    tray: Mutex<Tray>,
    filled: Condvar,
}

impl Inbox {
    fn tray(&self) -> MutexGuard<'_, Tray> {
        self.tray.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs a worker on this process's standard input and output until its input closes. To be called before any other
/// thread exists: the sandbox holds for this thread and those it starts.
pub fn main() -> ExitCode {
    let outlet = match private_output() {
        Ok(file) => Arc::new(Outlet(Mutex::new(file))),
        Err(error) => {
            eprintln!("the worker's output: {error}");
            return ExitCode::FAILURE;
        }
    };
    let mut input = BufReader::new(std::io::stdin());
    let load = match protocol::read::<Request>(&mut input) {
        Ok(Some(Request::Load(load))) => load,
        Ok(None | Some(Request::Shutdown)) => return ExitCode::SUCCESS,
        Ok(Some(_)) => {
            return refuse(
                &outlet,
                EngineError::protocol("the first request to a worker must be to load a model"),
            );
        }
        Err(error) => return refuse(&outlet, error),
    };
    let mut engine = match open(&load) {
        Ok((engine, isolation)) => {
            outlet.say(&Reply::Ready(ModelFacts {
                isolation,
                ..engine.facts()
            }));
            engine
        }
        Err(error) => return refuse(&outlet, error),
    };
    let inbox = Arc::new(Inbox::default());
    {
        let (inbox, outlet) = (Arc::clone(&inbox), Arc::clone(&outlet));
        std::thread::spawn(move || listen(input, &inbox, &outlet));
    }
    loop {
        let (id, work, cancelled) = {
            let mut tray = inbox.tray();
            tray.current = None;
            loop {
                if let Some((id, work, cancelled)) = tray.waiting.pop_front() {
                    tray.current = Some((id, Arc::clone(&cancelled)));
                    break (id, work, cancelled);
                }
                tray = inbox.filled.wait(tray).unwrap_or_else(PoisonError::into_inner);
            }
        };
        perform(engine.as_mut(), id, work, &cancelled, &outlet);
    }
}

fn refuse(outlet: &Outlet, error: EngineError) -> ExitCode {
    outlet.say(&Reply::Failed {
        id: None,
        error,
        meters: Meters::default(),
    });
    ExitCode::FAILURE
}

/// Moves standard output to a descriptor of its own and sends whatever a library prints to standard error, where it
/// cannot break a frame.
fn private_output() -> std::io::Result<File> {
    let private = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdout(), 3)?;
    rustix::stdio::dup2_stdout(rustix::stdio::stderr())?;
    Ok(File::from(private))
}

/// Checks, closes the sandbox, then loads.
fn open(load: &Load) -> Result<(Box<dyn Engine>, Isolation), EngineError> {
    let threads = load.threads.unwrap_or_else(probe::cores).max(1);
    let checked = match load.kind {
        LoadKind::Noop => None,
        kind => Some(check(load, kind)?),
    };
    prepare_environment(threads);
    let isolation = sandbox::close(checked.as_ref().map(|_| load.model.as_path()), load.memory_limit);
    let engine: Box<dyn Engine> = match (load.kind, checked) {
        (LoadKind::Generate, Some(file)) => Box::new(llama::Llama::load(load, &file, threads)?),
        (LoadKind::Embed, Some(file)) => Box::new(bert::Bert::load(load, &file, threads)?),
        _ => Box::new(noop::Noop),
    };
    Ok((engine, isolation))
}

fn check(load: &Load, kind: LoadKind) -> Result<ModelFile, EngineError> {
    let file = inspect(&load.model)?;
    match (kind, file.format) {
        (LoadKind::Generate, Format::Safetensors) => {
            return Err(EngineError::Unsupported {
                reason: "text is generated from GGUF files; convert this safetensors model first".into(),
            });
        }
        (LoadKind::Embed, Format::Gguf) => {
            return Err(EngineError::Unsupported {
                reason: "texts are embedded by safetensors encoders; this is a GGUF file".into(),
            });
        }
        _ => {}
    }
    let needs = file.memory_estimate(file.context_for(load.context_tokens));
    match load.memory_limit {
        Some(has) if needs > has => Err(EngineError::TooLarge { needs, has }),
        _ => Ok(file),
    }
}

/// candle and the pools under it take their size from the environment, when they are first used. A failing llama.cpp
/// would start a debugger to print a backtrace, which the sandbox forbids.
fn prepare_environment(threads: u16) {
    let threads = threads.to_string();
    let sizes =
        ["CANDLE_NUM_THREADS", "RAYON_NUM_THREADS", "OMP_NUM_THREADS"].map(|name| (name, threads.as_str()));
    for (name, value) in sizes.into_iter().chain([("GGML_NO_BACKTRACE", "1")]) {
        #[expect(
            unsafe_code,
            reason = "the environment is the only way to tell these libraries"
        )]
        // SAFETY: `main` runs this before it starts a thread and before an engine could have started one.
        unsafe {
            std::env::set_var(name, value);
        }
    }
}

/// Takes requests while the engine works.
fn listen(mut input: BufReader<std::io::Stdin>, inbox: &Inbox, outlet: &Outlet) {
    loop {
        match protocol::read::<Request>(&mut input) {
            Ok(Some(Request::Run { id, work })) => {
                let mut tray = inbox.tray();
                if tray.waiting.len() + usize::from(tray.current.is_some()) > RUNS_MAX {
                    drop(tray);
                    let error = EngineError::Busy {
                        limit: RUNS_MAX as u32,
                    };
                    outlet.say(&Reply::Failed {
                        id: Some(id),
                        error,
                        meters: Meters::default(),
                    });
                } else {
                    tray.waiting.push_back((id, work, Arc::default()));
                    inbox.filled.notify_one();
                }
            }
            Ok(Some(Request::Cancel { id })) => {
                let tray = inbox.tray();
                let waiting = tray.waiting.iter().map(|(id, _, cancelled)| (id, cancelled));
                let current = tray.current.iter().map(|(id, cancelled)| (id, cancelled));
                if let Some((_, cancelled)) = waiting.chain(current).find(|(candidate, _)| **candidate == id)
                {
                    cancelled.store(true, Ordering::Relaxed);
                }
            }
            Ok(Some(Request::Load(_))) => {
                eprintln!("a second load was ignored: a worker holds one model, once");
            }
            Ok(None | Some(Request::Shutdown)) => end(0),
            Err(error) => {
                eprintln!("{error}");
                end(1);
            }
        }
    }
}

fn perform(engine: &mut dyn Engine, id: RunId, work: Work, cancelled: &AtomicBool, outlet: &Outlet) {
    let meter = Meter::start();
    let mut desk = Desk {
        id,
        cancelled,
        outlet,
        tokens_in: 0,
        tokens_out: 0,
        tokens_cached: 0,
    };
    let result = desk.check().and_then(|()| engine.run(work, &mut desk));
    let meters = Meters {
        tokens_in: desk.tokens_in,
        tokens_out: desk.tokens_out,
        tokens_cached: desk.tokens_cached,
        ..meter.stop()
    };
    let reply = match result {
        Ok(output) => Reply::Done { id, output, meters },
        Err(error) => Reply::Failed {
            id: Some(id),
            error,
            meters,
        },
    };
    match protocol::encode(&reply) {
        Ok(_) => outlet.say(&reply),
        Err(error) => {
            let error = EngineError::bad_input(format!(
                "the result is too long: {error}; send fewer texts at once"
            ));
            outlet.say(&Reply::Failed {
                id: Some(id),
                error,
                meters,
            });
        }
    }
}

/// Ends the process at once. Other threads may be computing: nothing is torn down under them.
fn end(status: i32) -> ! {
    #[expect(
        unsafe_code,
        reason = "std::process::exit would run C++ destructors under running threads"
    )]
    // SAFETY: _exit has no preconditions; what is unsaved is meant to be lost.
    unsafe {
        libc::_exit(status)
    }
}
