//! How fast low-rank adapters are trained, and in how much memory: our trainer beside PyTorch, transformers and peft.
//!
//! `train_bench OUT.json [PYTHON]` trains on two models, the shipped one and a Llama shape of 110 million parameters
//! made on the spot, in f32 with rank 8 on every matrix, batches of 2 × 256 tokens, the same tokens, threads and steps
//! for both. Each side is a process of its own, in turns; medians of the steps after the first two. Without a PYTHON
//! that can import torch and peft, ours stands alone and says so. Then the cost of a checkpoint.

use std::error::Error;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use candle_core::{DType, Device};
use karez_engine::train::adapter::Adapter;
use karez_engine::train::base::{BaseModel, Hold};
use karez_engine::train::data::Packed;
use karez_engine::train::fused::Fused;
use karez_engine::train::trainer::{Spec, Trainer};
use karez_engine::train::{AdamWSettings, Config, Moments, Rng, Settings, TrainError, initial, save};
use serde_json::{Value, json};

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

const RANK: usize = 8;
const ROWS: usize = 2;
const LENGTH: usize = 256;
const BATCHES: usize = 4;
const WARM_UP: usize = 2;

fn main() -> Outcome<()> {
    let args: Vec<String> = std::env::args().collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[1..] {
        ["ours", folder, ids, threads, steps] => {
            ours(Path::new(folder), ids, threads.parse()?, steps.parse()?)
        }
        [out, ref python @ ..] => compare(out, python.first().copied()),
        [] => Err("usage: train_bench OUT.json [PYTHON]".into()),
    }
}

/// One process of ours: the steps, timed.
fn ours(folder: &Path, ids: &str, threads: usize, steps: usize) -> Outcome<()> {
    let batches: Vec<Vec<Vec<u32>>> = serde_json::from_slice(&fs::read(ids)?)?;
    let base = BaseModel::read(folder, Hold::F32)?;
    let modules = Settings::default().modules();
    let mut adapter = Adapter::new(&base.config, &modules, RANK, 2.0 * RANK as f64, 1)?;
    let mut model = Fused::new(base, &adapter, threads, false)?;
    let settings = AdamWSettings {
        beta2: 0.999,
        weight_decay: 0.0,
        ..AdamWSettings::default()
    };
    let mut moments = Moments::new(adapter.values.len(), settings);
    let mut grads = vec![0.0; adapter.values.len()];
    let (mut times, mut losses) = (Vec::new(), Vec::new());
    for step in 0..steps {
        let began = Instant::now();
        let batch = packed(&batches[step % batches.len()]);
        grads.fill(0.0);
        let count = batch.targets.len() as f64;
        let loss = model.gradients(&adapter, &batch, 1.0 / count as f32, &mut grads)?;
        moments.step(&mut adapter.values, &grads, 2e-4);
        losses.push(loss / count);
        times.push(began.elapsed().as_secs_f64());
    }
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let peak: u64 = peak
        .and_then(|text| text.split_whitespace().next()?.parse().ok())
        .unwrap_or(0);
    println!(
        "{}",
        json!({"seconds": times, "losses": losses, "peak_bytes": peak * 1024})
    );
    Ok(())
}

/// What `labels=input_ids` means elsewhere: every token but the first is a target.
fn packed(rows: &[Vec<u32>]) -> Packed {
    let mut packed = Packed::default();
    for row in rows {
        let start = packed.ids.len();
        packed.ids.extend_from_slice(row);
        packed.lengths.push(row.len());
        packed
            .targets
            .extend((1..row.len()).map(|at| ((start + at - 1) as u32, row[at])));
    }
    packed
}

fn compare(out: &str, python: Option<&str>) -> Outcome<()> {
    let dir = std::env::temp_dir().join(format!("karez-train-bench-{}", std::process::id()));
    fs::create_dir_all(&dir)?;
    let measured = measure(&dir, python);
    fs::remove_dir_all(&dir)?;
    let text = serde_json::to_string_pretty(&measured?)?;
    fs::write(out, &text)?;
    println!("{text}");
    Ok(())
}

fn measure(dir: &Path, python: Option<&str>) -> Outcome<Value> {
    let threads = std::thread::available_parallelism()?.get().min(2);
    let python = python.filter(|python| {
        let found = Command::new(python)
            .args(["-c", "import torch, peft, transformers"])
            .status();
        found.is_ok_and(|status| status.success())
    });
    if python.is_none() {
        println!(
            "no peer: give a Python that can import torch, transformers and peft as the second argument"
        );
    }
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/karez-tiny");
    let mut sizes = Vec::new();
    for (name, folder, steps) in [("shipped", shipped.clone(), 22), ("110m", dir.join("110m"), 7)] {
        if name == "110m" {
            make(&folder)?;
        }
        let config: Config = serde_json::from_slice(&fs::read(folder.join("config.json"))?)?;
        let ids = dir.join("ids.json");
        let mut rng = Rng::new(7);
        let mut row = || {
            (0..LENGTH)
                .map(|_| rng.below(config.vocab_size) as u32)
                .collect::<Vec<_>>()
        };
        let batches: Vec<Vec<Vec<u32>>> = (0..BATCHES).map(|_| (0..ROWS).map(|_| row()).collect()).collect();
        fs::write(&ids, serde_json::to_vec(&batches)?)?;
        let threads_text = threads.to_string();
        let steps = steps.to_string();
        let (mut mine, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..2 {
            let mut us = Command::new(std::env::current_exe()?);
            us.arg("ours")
                .arg(&folder)
                .arg(&ids)
                .args([&threads_text, &steps]);
            mine.push(run(&mut us, threads)?);
            if let Some(python) = python {
                let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/train_peer.py");
                let mut them = Command::new(python);
                them.arg(script)
                    .arg(&folder)
                    .arg(&ids)
                    .args([&threads_text, &RANK.to_string(), &steps]);
                theirs.push(run(&mut them, threads)?);
            }
        }
        let (ours, peer) = (side(&mine), side(&theirs));
        let ratio = |key: &str| Some(ours[key].as_f64()? / peer[key].as_f64()?);
        println!("{name}: ours {ours}, PyTorch {peer}");
        sizes.push(json!({
            "model": name, "ours": ours, "pytorch_peft": peer,
            "speed_ratio": ratio("tokens_per_s"), "memory_ratio": ratio("peak_bytes"),
        }));
    }
    Ok(json!({
        "threads": threads, "rank": RANK, "batch": [ROWS, LENGTH], "load": load(),
        "sizes": sizes, "checkpoint": checkpoint(dir, &shipped, threads)?,
    }))
}

fn load() -> String {
    fs::read_to_string("/proc/loadavg")
        .unwrap_or_default()
        .trim()
        .to_owned()
}

fn run(command: &mut Command, threads: usize) -> Outcome<Value> {
    for name in ["RAYON_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"] {
        command.env(name, threads.to_string());
    }
    let output = command.output()?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned().into());
    }
    let text = String::from_utf8(output.stdout)?;
    Ok(serde_json::from_str(text.lines().last().unwrap_or_default())?)
}

/// Medians over the steps of all runs of one side.
fn side(runs: &[Value]) -> Value {
    let numbers = |run: &Value, key: &str| -> Vec<f64> {
        run[key]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_f64)
            .collect()
    };
    let mut seconds: Vec<f64> = runs
        .iter()
        .flat_map(|run| numbers(run, "seconds").into_iter().skip(WARM_UP))
        .collect();
    seconds.sort_by(f64::total_cmp);
    let Some(median) = seconds.get(seconds.len() / 2) else {
        return Value::Null;
    };
    let peak = runs.iter().filter_map(|run| run["peak_bytes"].as_u64()).max();
    json!({
        "tokens_per_s": ((ROWS * LENGTH) as f64 / median).round(), "peak_bytes": peak,
        "losses": runs.first().map(|run| numbers(run, "losses")), "imports_bytes": runs[0]["imports_bytes"],
        "version": runs[0]["version"], "load": load(),
    })
}

/// A Llama shape of 110 million parameters with random weights, in f32.
fn make(folder: &Path) -> Outcome<()> {
    let config = json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 768, "intermediate_size": 2048,
        "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 12, "vocab_size": 16000,
        "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "tie_word_embeddings": false, "torch_dtype": "float32",
    });
    fs::create_dir_all(folder)?;
    fs::write(folder.join("config.json"), config.to_string())?;
    let config: Config = serde_json::from_value(config)?;
    let weights = initial(&config, &mut Rng::new(3), &Device::Cpu)?;
    save(&weights, &folder.join("model.safetensors"), DType::F32)?;
    Ok(())
}

/// What a checkpoint costs beside the steps between two of them.
fn checkpoint(dir: &Path, base: &Path, threads: usize) -> Outcome<Value> {
    let data: PathBuf = dir.join("data.jsonl");
    let lines: Vec<String> = (0..400)
        .map(|n| {
            json!({"prompt": format!("Item {n}?"), "completion": "maji ni uhai ".repeat(10)}).to_string()
                + "\n"
        })
        .collect();
    fs::write(&data, lines.concat())?;
    let settings = Settings {
        max_steps: 30,
        save_steps: 30,
        ..Settings::default()
    };
    let spec = Spec {
        base,
        base_digest: "b",
        data: &data,
        data_digest: "d",
        settings: &settings,
        language: Some("sw"),
        threads,
        memory: None,
    };
    let mut trainer = Trainer::new(&spec)?;
    let began = Instant::now();
    while !trainer.state().finished {
        trainer.step(|_| Ok::<(), TrainError>(()))?;
    }
    let steps = began.elapsed().as_secs_f64();
    let mut costs = Vec::new();
    let mut size = 0;
    for _ in 0..5 {
        let began = Instant::now();
        let (bytes, _) = trainer.checkpoint()?;
        let mut file = fs::File::create(dir.join("checkpoint"))?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        costs.push(began.elapsed().as_secs_f64());
        size = bytes.len();
    }
    costs.sort_by(f64::total_cmp);
    let cost = costs[costs.len() / 2];
    Ok(json!({
        "bytes": size, "seconds": cost, "steps_between": settings.save_steps,
        "share_of_time": cost / (steps + cost), "written": "synced to disk",
    }))
}
