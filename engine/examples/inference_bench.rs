//! Karez's worker beside llama.cpp itself: the same file, the same threads, taking turns in the same minute.
//!
//! ```sh
//! cargo run --release --example inference_bench -- [result.json]
//! cargo run --release --example inference_bench -- --write model.gguf    # only the large model, for others to measure
//! ```
//!
//! The peer is llama.cpp's own loop through the same bindings in this process, with llama.cpp's defaults (batches of 512 and, for
//! many sequences, a stream of the cache each): the Python package would be compiled from source for as long as this whole
//! program. Wants `karez` or `karez-worker` beside its own folder. Figures are medians of turns taken one after the other.
#![allow(clippy::unwrap_used, reason = "a measurement that fails should stop")]

use std::ffi::OsString;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use karez_engine::protocol::{Generate, Load, LoadKind, Prompt, Work};
use karez_engine::{Event, Run, SpawnOptions, Worker, reference, shipped};
use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::context::params::LlamaContextParams;
use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::model::params::LlamaModelParams;
use llama_cpp_2::sampling::LlamaSampler;
use llama_cpp_2::token::LlamaToken;

/// Generations at once.
const MANY: usize = 16;

/// How much is measured of a model.
struct Plan {
    name: &'static str,
    prompt: usize,
    decode: usize,
    many_prompt: usize,
    many_decode: usize,
    turns: usize,
}

#[derive(Default, Clone, Copy)]
struct Speed {
    /// Tokens per second of a prompt read.
    prompt: f64,
    /// Tokens per second of one answer written.
    decode: f64,
    /// Tokens per second of sixteen answers together, their prompts read in the same time.
    many: f64,
    /// Milliseconds to the first token of a short prompt.
    first_ms: f64,
}

fn main() {
    let mut args = std::env::args_os().skip(1).map(PathBuf::from);
    let out = args.next();
    if out.as_deref() == Some(Path::new("--write")) {
        return reference::write(&args.next().unwrap(), &reference::ONE_BILLION).unwrap();
    }
    // The peer computes with what the worker does.
    let level = karez_engine::level::choose().unwrap();
    let threads = karez_engine::probe::cores();
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!(
        "load: {}, threads: {threads}, {level}, {}",
        load.trim(),
        karez_engine::probe::probe().cpu
    );
    let folder = tempfile::tempdir().unwrap();
    let tiny = folder.path().join("tiny.gguf");
    std::fs::write(&tiny, shipped::MODEL).unwrap();
    let mut backend = LlamaBackend::init().unwrap();
    backend.void_logs();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let mut results = Vec::new();
    let small = Plan {
        name: shipped::NAME,
        prompt: 384,
        decode: 200,
        many_prompt: 32,
        many_decode: 60,
        turns: 9,
    };
    results.push(measure(&backend, &runtime, &tiny, &small, threads));
    if std::env::var_os("KAREZ_BENCH_SMALL").is_none() {
        let large = folder.path().join("reference.gguf");
        reference::write(&large, &reference::ONE_BILLION).unwrap();
        let plan = Plan {
            name: "1.1 billion, Q4_0, random",
            prompt: 128,
            decode: 32,
            many_prompt: 16,
            many_decode: 24,
            turns: 7,
        };
        results.push(measure(&backend, &runtime, &large, &plan, threads));
    }
    let json = serde_json::json!({
        "load": load.trim(),
        "threads": threads,
        "cpu": karez_engine::probe::probe().cpu,
        "level": level,
        "peer": "llama.cpp's own loop, same bindings, in the measuring process",
        "models": results,
    });
    match out {
        Some(path) => std::fs::write(path, serde_json::to_vec_pretty(&json).unwrap()).unwrap(),
        None => println!("{json:#}"),
    }
}

fn measure(
    backend: &LlamaBackend,
    runtime: &tokio::runtime::Runtime,
    path: &Path,
    plan: &Plan,
    threads: u16,
) -> serde_json::Value {
    let model = LlamaModel::load_from_file(backend, path, &LlamaModelParams::default()).unwrap();
    let worker = runtime.block_on(start(path, threads));
    let mut alone = Vec::new();
    let mut ours = Vec::new();
    for turn in 0..=plan.turns {
        let a = peer(backend, &model, plan, threads, turn);
        let b = runtime.block_on(through_worker(&worker, plan, turn));
        // The first turn warms up.
        if turn > 0 {
            alone.push(a);
            ours.push(b);
        }
    }
    runtime.block_on(worker.shutdown());
    let median = |all: &[Speed], of: fn(&Speed) -> f64| {
        let mut values: Vec<f64> = all.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    // Of each pair of neighbouring turns: what slows the machine slows both.
    let ratio = |of: fn(&Speed) -> f64| {
        let mut values: Vec<f64> = ours.iter().zip(&alone).map(|(b, a)| of(b) / of(a)).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    println!("{} ({} turns)", plan.name, plan.turns);
    println!(
        "  {:28} {:>12} {:>12} {:>7} {:>6}",
        "", "llama.cpp", "worker", "ratio", "aim"
    );
    let mut row = serde_json::json!({"model": plan.name});
    for (name, of, aim) in [
        (
            "prompt_tokens_per_second",
            (|s| s.prompt) as fn(&Speed) -> f64,
            0.97,
        ),
        ("decode_tokens_per_second", |s| s.decode, 0.97),
        ("sixteen_tokens_per_second", |s| s.many, 0.95),
    ] {
        let (a, b, r) = (median(&alone, of), median(&ours, of), ratio(of));
        println!("  {name:28} {a:12.1} {b:12.1} {r:7.3} {aim:6.2}");
        row[name] = serde_json::json!({"llama_cpp": a, "worker": b, "ratio": r, "aim": aim});
    }
    let mut added: Vec<f64> = ours
        .iter()
        .zip(&alone)
        .map(|(b, a)| b.first_ms - a.first_ms)
        .collect();
    added.sort_by(f64::total_cmp);
    let added = added[added.len() / 2];
    println!("  {:28} {added:12.2} ms (aim: 5)", "added_to_first_token");
    row["added_to_first_token_ms"] = added.into();
    row
}

/// Bytes that no other prompt of this run begins with.
fn prompt(tokens: usize, turn: usize, which: usize) -> String {
    let mut text = format!("{turn}.{which}.");
    while text.len() < tokens {
        text.push(char::from(b'a' + (text.len() * 7 + turn * 3 + which) as u8 % 26));
    }
    text.truncate(tokens);
    text
}

// ---- llama.cpp alone ----

fn context<'a>(
    backend: &LlamaBackend,
    model: &'a LlamaModel,
    tokens: usize,
    sequences: usize,
    threads: u16,
) -> LlamaContext<'a> {
    let params = LlamaContextParams::default()
        .with_n_ctx(NonZeroU32::new((tokens * sequences) as u32))
        .with_n_batch(512)
        .with_n_ubatch(512)
        .with_n_seq_max(sequences as u32)
        .with_kv_unified(false)
        .with_n_threads(threads.into())
        .with_n_threads_batch(threads.into());
    model.new_context(backend, params).unwrap()
}

fn read(context: &mut LlamaContext<'_>, batch: &mut LlamaBatch<'_>, tokens: &[LlamaToken], sequence: i32) {
    for (chunk_at, chunk) in tokens.chunks(512).enumerate() {
        batch.clear();
        for (at, token) in chunk.iter().enumerate() {
            let position = chunk_at * 512 + at;
            batch
                .add(*token, position as i32, &[sequence], position + 1 == tokens.len())
                .unwrap();
        }
        context.decode(batch).unwrap();
    }
}

fn peer(backend: &LlamaBackend, model: &LlamaModel, plan: &Plan, threads: u16, turn: usize) -> Speed {
    let vocab = model.vocab();
    let tokens_of = |length, which| vocab.tokenize(prompt(length, turn, which).as_bytes(), true, true);
    let mut batch = LlamaBatch::new(512, 1);
    let mut sampler = LlamaSampler::chain_simple([LlamaSampler::greedy()]);
    let mut speed = Speed::default();
    {
        let mut context = context(backend, model, 1024, 1, threads);
        // The first step of a context is slower: it makes the plan.
        read(&mut context, &mut batch, &tokens_of(8, 9), 0);
        context.clear_kv_cache();
        let began = Instant::now();
        read(&mut context, &mut batch, &tokens_of(8, 8), 0);
        let _ = sampler.sample(&context, -1);
        speed.first_ms = began.elapsed().as_secs_f64() * 1e3;
        context.clear_kv_cache();

        // From the text on, as the worker gets it.
        let began = Instant::now();
        let tokens = tokens_of(plan.prompt, 0);
        read(&mut context, &mut batch, &tokens, 0);
        let _ = sampler.sample(&context, -1);
        speed.prompt = tokens.len() as f64 / began.elapsed().as_secs_f64();

        context.clear_kv_cache();
        let tokens = tokens_of(plan.prompt, 7);
        read(&mut context, &mut batch, &tokens, 0);
        let mut token = sampler.sample(&context, -1);
        let mut written = 0;
        let began = Instant::now();
        // A model may end its answer early, here as there.
        while written < plan.decode && !vocab.is_eog(token) {
            batch.clear();
            batch
                .add(token, (tokens.len() + written) as i32, &[0], true)
                .unwrap();
            context.decode(&mut batch).unwrap();
            token = sampler.sample(&context, -1);
            written += 1;
        }
        speed.decode = written as f64 / began.elapsed().as_secs_f64();
    }
    let mut context = context(backend, model, 256, MANY, threads);
    let prompts: Vec<Vec<LlamaToken>> = (0..MANY).map(|n| tokens_of(plan.many_prompt, n + 20)).collect();
    read(&mut context, &mut batch, &prompts[0], 0);
    context.clear_kv_cache();
    let began = Instant::now();
    let mut last = [LlamaToken(0); MANY];
    let mut place = [0i32; MANY];
    // All prompts in as few steps as they fit.
    let fit = 512 / prompts.iter().map(Vec::len).max().unwrap();
    for (group, some) in prompts.chunks(fit).enumerate() {
        batch.clear();
        let mut ends = Vec::new();
        for (n, tokens) in some.iter().enumerate() {
            let sequence = group * fit + n;
            for (at, token) in tokens.iter().enumerate() {
                batch
                    .add(*token, at as i32, &[sequence as i32], at + 1 == tokens.len())
                    .unwrap();
            }
            ends.push((sequence, batch.n_tokens() - 1));
            place[sequence] = tokens.len() as i32;
        }
        context.decode(&mut batch).unwrap();
        for (sequence, end) in ends {
            last[sequence] = sampler.sample(&context, end);
        }
    }
    let mut written = 0;
    for at in 0..plan.many_decode {
        let going: Vec<usize> = (0..MANY).filter(|n| !vocab.is_eog(last[*n])).collect();
        written += going.len();
        if going.is_empty() || at + 1 == plan.many_decode {
            break;
        }
        batch.clear();
        for sequence in &going {
            batch
                .add(last[*sequence], place[*sequence], &[*sequence as i32], true)
                .unwrap();
            place[*sequence] += 1;
        }
        context.decode(&mut batch).unwrap();
        for (at, sequence) in (0..).zip(&going) {
            last[*sequence] = sampler.sample(&context, at);
        }
    }
    speed.many = written as f64 / began.elapsed().as_secs_f64();
    speed
}

// ---- Karez's worker ----

async fn start(model: &Path, threads: u16) -> Worker {
    let here = std::env::current_exe().unwrap();
    let folder = here.parent().and_then(Path::parent).unwrap();
    let own = (folder.join("karez-worker"), Vec::new());
    let whole = (folder.join("karez"), vec![OsString::from("worker")]);
    let (program, args) = if own.0.exists() { own } else { whole };
    let worker = Worker::spawn(&program, &args, SpawnOptions::default())
        .await
        .unwrap();
    let load = Load {
        threads: Some(threads),
        context_tokens: Some(1024),
        sequences: Some(MANY as u16),
        cache_tokens: Some(256 * MANY as u32),
        ..Load::new(LoadKind::Generate, model)
    };
    worker.load(load, None).await.unwrap();
    worker
}

fn request(text: String, tokens: usize) -> Work {
    Work::Generate(Generate::greedy(Prompt::Raw { text }, tokens as u32))
}

/// Seconds to the first token, and to the end, with the tokens read and written.
async fn timed(mut run: Run, began: Instant) -> (f64, f64, usize, usize) {
    let mut first = None;
    while let Some(event) = run.next().await {
        match event {
            Event::Token(_) => {
                first.get_or_insert_with(|| began.elapsed().as_secs_f64());
            }
            Event::Done { meters, .. } => {
                let whole = began.elapsed().as_secs_f64();
                let (read, written) = (meters.tokens_in as usize, meters.tokens_out as usize);
                return (first.unwrap_or(whole), whole, read, written);
            }
            Event::Failed { error, .. } => panic!("{error}"),
        }
    }
    panic!("the worker ended")
}

async fn through_worker(worker: &Worker, plan: &Plan, turn: usize) -> Speed {
    let mut speed = Speed::default();
    let one = |length, which, tokens| {
        let work = request(prompt(length, turn, which), tokens);
        let began = Instant::now();
        timed(worker.run(work).unwrap(), began)
    };
    one(8, 9, 1).await;
    speed.first_ms = one(8, 8, 1).await.1 * 1e3;
    // Read to the first token; then the same again further on, of which the beginning is known.
    let (_, whole, read, _) = one(plan.prompt, 0, 1).await;
    speed.prompt = read as f64 / whole;
    let (first, whole, _, written) = one(plan.prompt, 7, plan.decode + 1).await;
    speed.decode = written.saturating_sub(1) as f64 / (whole - first);
    let began = Instant::now();
    let mut runs = Vec::new();
    for which in 0..MANY {
        let work = request(prompt(plan.many_prompt, turn, which + 20), plan.many_decode);
        runs.push(worker.run(work).unwrap());
        // One by one, as they come over a network.
        tokio::time::sleep(Duration::from_micros(200)).await;
    }
    let mut written = 0;
    for run in runs {
        written += timed(run, began).await.3;
    }
    speed.many = written as f64 / began.elapsed().as_secs_f64();
    speed
}
