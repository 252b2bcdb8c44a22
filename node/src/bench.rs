//! Measuring what this machine really does with models, through the very worker that serves guests.
//!
//! The brief probe at the first start estimates from memory bandwidth; this runs models. It takes a minute or two, keeps the result beside
//! the probe's, and offers carry it from the node's next start on. Start at [`bench()`].
use crate::{config::NodeConfig, daemon::WorkerProgram, files::NodeFiles, probe};
use karez_engine::{
    EngineError, Event, SpawnOptions, Worker,
    protocol::{Generate, Load, LoadKind, Prompt, Work},
    reference, shipped,
};
use serde::{Deserialize, Serialize};
use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// How speeds are measured here.
pub const METHOD: &str = "bench/1";
/// The class whose speed offers carry: the weights of a common model of 1.1 billion numbers in Q4_0.
pub const REFERENCE_CLASS: &str = "1b-q4_0";
/// Generations at once.
const MANY: u16 = 16;
/// Turns of each measurement; the median counts.
const TURNS: usize = 3;
const LOAD_MAX: Duration = Duration::from_secs(300);

/// Speeds of one class of model, in thousandths of a token per second, on one CPU slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClassSpeed {
    /// `tiny`, [`REFERENCE_CLASS`], or the name of a file.
    pub class: String,
    /// Reading a prompt of 256 tokens.
    pub prompt_milli: u64,
    /// Writing one answer.
    pub decode_milli: u64,
    /// Sixteen answers at once: tokens written of all together, their prompts read in the same time.
    pub many_milli: u64,
    /// Threads it was measured with.
    pub threads: u16,
}

/// Why there is no measurement.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The disk.
    #[error("{}: {error}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// The worker.
    #[error("{class}: {error}")]
    Engine {
        /// What was measured.
        class: String,
        /// What it said.
        error: EngineError,
    },
    /// The configuration.
    #[error(transparent)]
    Config(#[from] crate::ConfigError),
}

/// Measures the shipped model, the reference class unless `small`, and the GGUF files in `models`. What was measured of the
/// reference class is kept for offers. `told` hears what is being done.
pub async fn bench(
    dir: &Path,
    worker: &WorkerProgram,
    small: bool,
    models: &[PathBuf],
    told: impl Fn(&str),
) -> Result<Vec<ClassSpeed>, BenchError> {
    let files = NodeFiles::new(dir);
    let config = NodeConfig::load(&files.config())?;
    let io = |path: &Path| {
        let path = path.to_owned();
        move |error| BenchError::Io { path, error }
    };
    let scratch = dir.join(format!("bench-{}", std::process::id()));
    std::fs::create_dir(&scratch).map_err(io(&scratch))?;
    let _gone = Gone(scratch.clone());
    let tiny = scratch.join("tiny.gguf");
    std::fs::write(&tiny, shipped::MODEL).map_err(io(&tiny))?;
    let mut classes = vec![("tiny".to_owned(), tiny)];
    if !small {
        told("writing a model of random numbers, 620 MB");
        let path = scratch.join("reference.gguf");
        let to = path.clone();
        let written =
            tokio::task::spawn_blocking(move || reference::write(&to, &reference::ONE_BILLION)).await;
        written
            .unwrap_or_else(|error| Err(std::io::Error::other(error)))
            .map_err(io(&path))?;
        classes.push((REFERENCE_CLASS.to_owned(), path));
    }
    classes.extend(models.iter().map(|path| {
        let name = path.file_stem().unwrap_or(path.as_os_str()).to_string_lossy();
        (name.into_owned(), path.clone())
    }));
    let threads = probe::slot_threads(&config.limits);
    let mut out = Vec::new();
    for (class, path) in classes {
        told(&format!("measuring {class} with {threads} threads"));
        let measured = measure(worker, &class, &path, threads).await;
        out.push(measured.map_err(|error| BenchError::Engine { class, error })?);
    }
    if let Some(reference) = out.iter().find(|speed| speed.class == REFERENCE_CLASS) {
        probe::keep_bench(&files.probe(), &config.limits, Some(worker), reference).await;
    }
    Ok(out)
}

struct Gone(PathBuf);

impl Drop for Gone {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

async fn measure(
    program: &WorkerProgram,
    class: &str,
    path: &Path,
    threads: u16,
) -> Result<ClassSpeed, EngineError> {
    let worker = Worker::spawn(&program.path, &program.args, SpawnOptions::default()).await?;
    let load = Load {
        threads: Some(threads),
        gpu_layers: Some(0),
        context_tokens: Some(512),
        sequences: Some(MANY),
        cache_tokens: Some(u32::from(MANY) * 128),
        ..Load::new(LoadKind::Generate, path)
    };
    worker.load(load, Some(LOAD_MAX)).await?;
    // The first step is slower: it makes the plan.
    one(&worker, 16, 9_999, 4).await?;
    let (mut prompt, mut decode, mut many) = (Vec::new(), Vec::new(), Vec::new());
    for turn in 0..TURNS {
        let read = one(&worker, 256, turn * 100, 1).await?;
        prompt.push(read.tokens_in as f64 / read.whole);
        let written = one(&worker, 8, turn * 100 + 1, 33).await?;
        // A model may end its answer early: what it wrote is what counts.
        decode.push(written.tokens_out.saturating_sub(1) as f64 / (written.whole - written.first).max(1e-6));
        let began = Instant::now();
        let runs = (0..usize::from(MANY)).map(|n| start(&worker, 16, turn * 100 + 2 + n, 24));
        let mut tokens = 0;
        for run in runs.collect::<Result<Vec<_>, _>>()? {
            tokens += finish(run, began).await?.tokens_out;
        }
        many.push(tokens as f64 / began.elapsed().as_secs_f64());
    }
    worker.shutdown().await;
    let median = |mut all: Vec<f64>| {
        all.sort_by(f64::total_cmp);
        (all[all.len() / 2] * 1000.0) as u64
    };
    Ok(ClassSpeed {
        class: class.to_owned(),
        prompt_milli: median(prompt),
        decode_milli: median(decode),
        many_milli: median(many),
        threads,
    })
}

struct Took {
    first: f64,
    whole: f64,
    tokens_in: u64,
    tokens_out: u64,
}

/// A prompt that begins like no other, so that nothing is known of it before.
fn start(
    worker: &Worker,
    length: usize,
    which: usize,
    tokens: u32,
) -> Result<karez_engine::Run, EngineError> {
    let mut text = format!("{which} ");
    let mut state = which as u64 + 1;
    while text.len() < length {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        text.push(char::from(b'a' + (state >> 59) as u8 % 26));
    }
    let generate = Generate::greedy(Prompt::Raw { text }, tokens);
    worker.run(Work::Generate(generate))
}

async fn one(worker: &Worker, length: usize, which: usize, tokens: u32) -> Result<Took, EngineError> {
    let began = Instant::now();
    finish(start(worker, length, which, tokens)?, began).await
}

async fn finish(mut run: karez_engine::Run, began: Instant) -> Result<Took, EngineError> {
    let mut first = None;
    loop {
        match run.next().await {
            Some(Event::Token(_)) => {
                first.get_or_insert_with(|| began.elapsed().as_secs_f64());
            }
            Some(Event::Done { meters, .. }) => {
                let whole = began.elapsed().as_secs_f64();
                return Ok(Took {
                    first: first.unwrap_or(whole),
                    whole,
                    tokens_in: meters.tokens_in,
                    tokens_out: meters.tokens_out,
                });
            }
            Some(Event::Failed { error, .. }) => return Err(error),
            None => return Err(EngineError::Cancelled),
        }
    }
}
