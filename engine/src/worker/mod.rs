//! The worker's end: one process, one model, and as many runs at a time as its engine takes.
//!
//! [`main`] takes the first request from standard input, checks the model's headers, closes the sandbox around
//! itself and only then lets an engine open the file. While the first thread computes, a second listens for requests and
//! cancels and a third writes replies; the process ends when its input closes, whatever it is doing.
mod bert;
pub(crate) mod chat;
mod check;
mod count;
mod encoder;
mod llama;
mod meter;
mod noop;
mod post;
mod sandbox;
mod spin;
mod train;

use std::fs::File;
use std::io::BufReader;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::EngineError;
use crate::inspect::{Format, ModelFile, inspect};
use crate::probe;
use crate::protocol::{
    self, Isolation, Load, LoadKind, Meters, ModelFacts, Output, Piece, Reply, Request, RunId, SEQUENCES_MAX,
    Work,
};
use crate::train::learner::Taken;
use crate::train::torch::Process;
use crate::unit::{Bytes, Millis};
pub use check::{IsolationCheck, check_isolation};
use meter::Meter;
use post::{Inbox, Outlet};

/// What a worker works with.
enum Machine {
    /// One run at a time.
    Single(Box<dyn Engine>),
    /// Many generations at a time.
    Batching(Box<llama::Batcher>),
}

/// Does one kind of work with one loaded model, a run at a time.
trait Engine {
    /// What is known of the model. The isolation in it is filled in later.
    fn facts(&self) -> ModelFacts;
    /// Does one item of work. Looks at [`Desk::check`] as often as it can.
    fn run(&mut self, work: Work, desk: &mut Desk<'_>) -> Result<Output, EngineError>;
    /// Whether nothing more can come of it: the process ends then, and a new one may do better.
    fn spent(&self) -> bool {
        false
    }
}

/// What an engine sees of the world during a run.
struct Desk<'a> {
    id: RunId,
    cancelled: &'a AtomicBool,
    outlet: &'a Outlet,
    tokens_in: u64,
    /// What the run took in another process.
    elsewhere: Taken,
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

    /// Says how far the run is.
    fn progress(&self, text: String) {
        let piece = Piece {
            text,
            ..Piece::default()
        };
        self.outlet.say(Reply::Token { id: self.id, piece });
    }

    /// Tells the node that work goes on.
    fn alive(&self) {
        self.outlet.say(Reply::Alive);
    }
}

/// Runs a worker on this process's standard input and output until its input closes. To be called before any other
/// thread exists: the sandbox holds for this thread and those it starts.
pub fn main() -> ExitCode {
    let outlet = match private_output() {
        Ok(file) => Arc::new(Outlet::new(file)),
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
    let machine = match open(&load, &outlet) {
        Ok((machine, isolation)) => {
            let facts = match &machine {
                Machine::Single(engine) => engine.facts(),
                Machine::Batching(batcher) => batcher.facts(),
            };
            outlet.say(Reply::Ready(ModelFacts { isolation, ..facts }));
            machine
        }
        Err(error) => return refuse(&outlet, error),
    };
    outlet.start();
    let inbox = Arc::new(Inbox::default());
    {
        let (inbox, outlet) = (Arc::clone(&inbox), Arc::clone(&outlet));
        std::thread::spawn(move || listen(input, &inbox, &outlet));
    }
    match machine {
        Machine::Batching(mut batcher) => batcher.serve(&inbox, &outlet),
        Machine::Single(mut engine) => loop {
            if let Some((id, work, cancelled)) = inbox.take(true) {
                perform(engine.as_mut(), id, work, &cancelled, &outlet);
                inbox.over(id);
                if engine.spent() {
                    outlet.flush();
                    end(1);
                }
            }
        },
    }
}

fn refuse(outlet: &Outlet, error: EngineError) -> ExitCode {
    outlet.say(Reply::Failed {
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
fn open(load: &Load, outlet: &Arc<Outlet>) -> Result<(Machine, Isolation), EngineError> {
    let threads = load.threads.unwrap_or_else(probe::cores).max(1);
    let checked = match load.kind {
        LoadKind::Noop => None,
        LoadKind::Train => return open_trainer(load, threads, outlet),
        LoadKind::Count => return open_counter(load, threads),
        kind => Some(check(load, kind)?),
    };
    prepare_environment(threads);
    spin::watch(threads);
    let readable = checked.as_ref().map(|_| load.model.as_path());
    let isolation = sandbox::close(readable, load.adapters.as_deref(), None, load.memory_limit);
    let single = |engine: Box<dyn Engine>| Machine::Single(engine);
    let machine = match (load.kind, checked) {
        (LoadKind::Generate, Some(file)) => Machine::Batching(Box::new(llama::load(load, &file, threads)?)),
        (LoadKind::Embed, Some(file)) if file.format == Format::Gguf => {
            single(Box::new(llama::Embedder::load(load, &file, threads)?))
        }
        (LoadKind::Embed, Some(file)) => single(Box::new(bert::Bert::load(load, &file, threads)?)),
        _ => single(Box::new(noop::Noop)),
    };
    Ok((machine, isolation))
}

/// The same for a trainer, which reads its model anew for every run that needs it.
fn open_trainer(
    load: &Load,
    threads: u16,
    outlet: &Arc<Outlet>,
) -> Result<(Machine, Isolation), EngineError> {
    let Some(scratch) = &load.scratch else {
        return Err(EngineError::protocol(
            "a training worker needs a directory to write to",
        ));
    };
    let mut trainer = train::Training::open(load, scratch, threads)?;
    prepare_environment(threads);
    if let Some(provided) = &load.trainer {
        // On a GPU, memory is mapped that the machine does not have.
        let gpu = std::env::var_os("CUDA_VISIBLE_DEVICES").is_some_and(|gpus| !gpus.is_empty());
        let limit = load.memory_limit.filter(|_| !gpu);
        let isolation = sandbox::close_around(&load.model, &provided.reads, scratch, limit);
        let outlet = Arc::clone(outlet);
        let process =
            Process::start(provided, scratch, threads.into())?.with_pulse(move || outlet.say(Reply::Alive));
        sandbox::narrow();
        trainer.provide(process, provided.to_string());
        return Ok((Machine::Single(Box::new(trainer)), isolation));
    }
    let isolation = sandbox::close(Some(&load.model), None, Some(scratch), load.memory_limit);
    Ok((Machine::Single(Box::new(trainer)), isolation))
}

/// The same for a tokenizer alone.
fn open_counter(load: &Load, threads: u16) -> Result<(Machine, Isolation), EngineError> {
    prepare_environment(threads);
    let isolation = sandbox::close(Some(&load.model), None, None, load.memory_limit);
    Ok((
        Machine::Single(Box::new(count::Counter::load(&load.model)?)),
        isolation,
    ))
}

/// Closes the sandbox around a process that is no worker but reads strangers' files as one does: `readable` and what `also`
/// names can be read, `folder` written, and no more private memory than `memory` be held (and half a GiB for the process).
/// To be called before it starts a thread.
pub fn enclose(
    readable: Option<&std::path::Path>,
    also: Option<&std::path::Path>,
    folder: Option<&std::path::Path>,
    memory: Bytes,
) -> Isolation {
    prepare_environment(probe::cores().max(1));
    sandbox::close(readable, also, folder, Some(memory))
}

fn check(load: &Load, kind: LoadKind) -> Result<ModelFile, EngineError> {
    let file = inspect(&load.model)?;
    if (kind, file.format) == (LoadKind::Generate, Format::Safetensors) {
        return Err(EngineError::Unsupported {
            reason: "text is generated from GGUF files; convert this safetensors model first".into(),
        });
    }
    if load.sequences.is_some_and(|n| n == 0 || n > SEQUENCES_MAX) {
        return Err(EngineError::bad_input(format!(
            "sequences is {}; 1 to {SEQUENCES_MAX} are allowed",
            load.sequences.unwrap_or(0)
        )));
    }
    let needs = file.memory_estimate(load.cache_for(file.context_for(load.context_tokens)));
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
    let failed = |id, error| {
        outlet.say(Reply::Failed {
            id: Some(id),
            error,
            meters: Meters::default(),
        });
    };
    loop {
        match protocol::read::<Request>(&mut input) {
            Ok(Some(Request::Run { id, work })) => {
                if let Err(error) = inbox.add(id, work) {
                    failed(id, error);
                }
            }
            Ok(Some(Request::Cancel { id })) => {
                if inbox.cancel(id) {
                    failed(id, EngineError::Cancelled);
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
        elsewhere: Taken::default(),
    };
    let result = desk.check().and_then(|()| engine.run(work, &mut desk));
    let own = meter.stop();
    let meters = Meters {
        tokens_in: desk.tokens_in,
        cpu_ms: Millis(own.cpu_ms.0 + desk.elsewhere.cpu_us / 1000),
        peak_rss: Bytes(own.peak_rss.0 + desk.elsewhere.peak_rss),
        ..own
    };
    match result {
        Ok(output) => outlet.done(id, output, meters),
        Err(error) => outlet.say(Reply::Failed {
            id: Some(id),
            error,
            meters,
        }),
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
