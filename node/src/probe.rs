//! What the machine can do: cores, memory, instruction set, devices, the sandbox, and a brief measurement of speed.
//!
//! The measurement takes about 0.2 s, at the first start on a machine and after each update; later starts read it
//! from the node's directory. It is an estimate to begin with (`probe/1`): schedulers soon know from finished work.
use crate::{
    bench::{self, ClassSpeed},
    config::Limits,
    daemon::WorkerProgram,
};
use karez_core::{
    records::{Engine, WorkKind},
    unit::{Bytes, Speed},
};
use karez_engine::{
    protocol::{Isolation, Load, LoadKind},
    {SpawnOptions, Worker},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    hint::black_box,
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant, UNIX_EPOCH},
};

/// How speeds are measured here.
pub const METHOD: &str = "probe/1";
/// Each of the two measurements takes this long.
const MEASURE: Duration = Duration::from_millis(80);
/// A worker that has not started by then does not count.
const WORKER_MAX: Duration = Duration::from_secs(3);
/// Read by every token of the reference generation: the weights of a model of 1.1 billion numbers in Q4_0.
const GENERATE_BYTES: f64 = 620e6;
/// Done for every token of the reference embedding, all-MiniLM-L6-v2.
const EMBED_FLOPS: f64 = 22e6;
/// Arithmetic of one token when a low-rank adapter is trained on a model of a hundred million parameters: twice
/// through its matrices, two operations each.
const TRAIN_FLOPS: f64 = 4.4e8;
/// What matrix kernels with 256-bit vectors reach beyond the plain loop measured here, losses counted.
const KERNEL_GAIN: f64 = 2.0;

/// What was found.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// The processor, as it calls itself.
    pub cpu: String,
    /// Threads that workers may compute with.
    pub threads: u16,
    /// Cores of the machine.
    pub cores: u32,
    /// Memory of the machine.
    pub memory: Bytes,
    /// Memory all workers together may use.
    pub memory_lent: Bytes,
    /// Instruction set level.
    pub isa: String,
    /// What the sandbox enforces: measured by starting a worker.
    pub isolation: String,
    /// Devices to lend.
    pub devices: Vec<FoundDevice>,
    /// Engines, with their speed on one CPU slot.
    pub engines: Vec<Engine>,
    /// What is not lent, and why; in sentences.
    pub notes: Vec<String>,
}

/// One class of device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundDevice {
    /// `cpu/x86-64-v3`, `cuda/NVIDIA H200`.
    pub class: String,
    /// How many.
    pub count: u32,
    /// Memory of one.
    pub memory: Bytes,
    /// Which ones, by the driver's names; empty for CPUs.
    pub gpus: Vec<String>,
}

/// What is kept between starts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Measured {
    /// Measured again when any of this differs.
    of: Identity,
    /// Tokens per second, in thousandths.
    generate_milli: u64,
    embed_milli: u64,
    /// What a worker said of its sandbox; none when no worker started.
    isolation: Option<Isolation>,
    /// Why not.
    worker_error: String,
    /// What `karez node bench` measured with the reference class.
    #[serde(default)]
    bench: Option<ClassSpeed>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Identity {
    cpu: String,
    isa: String,
    threads: u16,
    version: String,
    /// Path, size and time of change of the worker program.
    worker: String,
}

/// Looks at the machine. `cache` is read and, after a new measurement, written; failing to is no error.
///
/// `gpu` says whether the worker was built to compute on GPUs: without, none are found.
pub async fn probe(cache: &Path, limits: &Limits, worker: Option<&WorkerProgram>, gpu: bool) -> Found {
    let machine = tokio::task::spawn_blocking(karez_engine::probe::probe).await;
    // The probe cannot panic on any file it reads; if it did, the plainest machine is offered.
    let machine = machine.unwrap_or_else(|_| karez_engine::probe::Probe {
        isa: karez_engine::probe::Isa::Other,
        cpu: std::env::consts::ARCH.into(),
        cores: 1,
        memory: Bytes::ZERO,
        memory_free: Bytes::ZERO,
        gpus: Vec::new(),
    });
    let threads = threads_lent(limits, machine.cores);
    let slot_threads = usize::from(per_slot(limits, threads));
    let identity = identify(&machine, limits, worker);
    let measured = match recall(cache, &identity) {
        Some(measured) => measured,
        None => {
            let measured = measure(identity, slot_threads, worker).await;
            // A worker that failed may do well next time: only what worked is kept.
            if measured.isolation.is_some() || worker.is_none() {
                remember(cache, &measured);
            }
            measured
        }
    };
    describe(machine, threads, limits, worker, gpu, &measured)
}

fn threads_lent(limits: &Limits, cores: u16) -> u16 {
    limits.threads.unwrap_or(cores).clamp(1, cores.max(1))
}

fn per_slot(limits: &Limits, threads: u16) -> u16 {
    let slots = u16::try_from(limits.cpu_slots.max(1)).unwrap_or(u16::MAX);
    threads.div_ceil(slots).max(1)
}

/// Threads of one CPU slot of this machine.
pub(crate) fn slot_threads(limits: &Limits) -> u16 {
    per_slot(limits, threads_lent(limits, karez_engine::probe::cores()))
}

fn identify(
    machine: &karez_engine::probe::Probe,
    limits: &Limits,
    worker: Option<&WorkerProgram>,
) -> Identity {
    Identity {
        cpu: machine.cpu.clone(),
        isa: machine.isa.to_string(),
        threads: per_slot(limits, threads_lent(limits, machine.cores)),
        version: env!("CARGO_PKG_VERSION").into(),
        worker: worker.map(stamp).unwrap_or_default(),
    }
}

/// Keeps what was measured beside the probe's own measurement, for the offers from the next start on.
pub(crate) async fn keep_bench(
    cache: &Path,
    limits: &Limits,
    worker: Option<&WorkerProgram>,
    speed: &ClassSpeed,
) {
    probe(cache, limits, worker, false).await;
    let Ok(machine) = tokio::task::spawn_blocking(karez_engine::probe::probe).await else {
        return;
    };
    if let Some(mut measured) = recall(cache, &identify(&machine, limits, worker)) {
        measured.bench = Some(speed.clone());
        remember(cache, &measured);
    }
}

fn describe(
    machine: karez_engine::probe::Probe,
    threads: u16,
    limits: &Limits,
    worker: Option<&WorkerProgram>,
    gpu: bool,
    measured: &Measured,
) -> Found {
    let memory = machine.memory;
    let memory_lent = limits.memory.unwrap_or(Bytes(memory.0 / 2)).min(memory);
    let mut notes = Vec::new();
    let mut devices = Vec::new();
    if limits.cpu_slots > 0 {
        devices.push(FoundDevice {
            class: format!("cpu/{}", machine.isa),
            count: limits.cpu_slots,
            memory: Bytes(memory_lent.0 / u64::from(limits.cpu_slots)),
            gpus: Vec::new(),
        });
    }
    let mut gpus: BTreeMap<String, FoundDevice> = BTreeMap::new();
    for found in &machine.gpus {
        let class: String = format!("cuda/{}", found.name)
            .chars()
            .filter(|c| !c.is_control())
            .take(60)
            .collect();
        let device = gpus.entry(class.clone()).or_insert(FoundDevice {
            class,
            count: 0,
            memory: Bytes(u64::MAX),
            gpus: Vec::new(),
        });
        device.count += 1;
        device.gpus.push(found.uuid.clone());
        device.memory = device.memory.min(found.memory);
    }
    if gpus.is_empty() {
    } else if !gpu {
        notes.push(format!(
            "{} GPUs are not lent: this build has no GPU back end",
            machine.gpus.len()
        ));
    } else if !limits.gpus {
        notes.push(format!(
            "{} GPUs are not lent: limits.gpus = false",
            machine.gpus.len()
        ));
    } else {
        devices.extend(gpus.into_values().take(15));
    }
    let version = env!("CARGO_PKG_VERSION").to_owned();
    let engine = |name: &str, work, milli, method: &str| Engine {
        name: name.into(),
        version: version.clone(),
        work,
        speed: Speed(milli),
        method: method.into(),
    };
    // One device does nothing a million times a second: measured once, the same everywhere.
    let mut engines = vec![engine("noop", WorkKind::Noop, 1_000_000_000, METHOD)];
    match (worker, measured.isolation) {
        (Some(_), Some(_)) => {
            engines.push(engine("candle", WorkKind::Embed, measured.embed_milli, METHOD));
            engines.push(engine(
                "karez-train",
                WorkKind::Train,
                (measured.embed_milli as f64 * EMBED_FLOPS / TRAIN_FLOPS) as u64,
                METHOD,
            ));
            // Work is done many at a time: what was measured so comes before what was estimated.
            let (milli, method) = match &measured.bench {
                Some(bench) => (bench.many_milli, bench::METHOD),
                None => (measured.generate_milli, METHOD),
            };
            engines.push(engine("llama.cpp", WorkKind::Generate, milli, method));
        }
        (Some(_), None) => notes.push(format!("no models are run: {}", measured.worker_error)),
        (None, _) => notes.push("no models are run: no worker program is configured".into()),
    }
    Found {
        cpu: machine.cpu,
        threads,
        cores: machine.cores.into(),
        memory,
        memory_lent,
        isa: machine.isa.to_string(),
        isolation: measured.isolation.unwrap_or(Isolation::None).to_string(),
        devices,
        engines,
        notes,
    }
}

fn recall(cache: &Path, identity: &Identity) -> Option<Measured> {
    let text = std::fs::read(cache).ok().filter(|bytes| bytes.len() < 64 << 10)?;
    serde_json::from_slice(&text)
        .ok()
        .filter(|measured: &Measured| measured.of == *identity)
}

fn remember(cache: &Path, measured: &Measured) {
    let written = serde_json::to_vec_pretty(measured)
        .map_err(std::io::Error::other)
        .and_then(|bytes| std::fs::write(cache, bytes));
    if let Err(error) = written {
        tracing::warn!(path = %cache.display(), %error, "the probe cannot be kept: the next start measures again");
    }
}

fn stamp(worker: &WorkerProgram) -> String {
    let meta = std::fs::metadata(&worker.path).ok();
    let size = meta.as_ref().map_or(0, std::fs::Metadata::len);
    let changed = meta
        .and_then(|m| m.modified().ok())
        .and_then(|t| t.duration_since(UNIX_EPOCH).ok())
        .map_or(0, |t| t.as_secs());
    format!("{} {size} {changed}", worker.path.display())
}

async fn measure(of: Identity, threads: usize, worker: Option<&WorkerProgram>) -> Measured {
    let speeds =
        tokio::task::spawn_blocking(move || (bytes_per_second(threads), flops_per_second(threads))).await;
    let (bandwidth, flops) = speeds.unwrap_or((0.0, 0.0));
    let (isolation, worker_error) = match worker {
        None => (None, String::new()),
        Some(program) => match try_worker(program).await {
            Ok(isolation) => (Some(isolation), String::new()),
            Err(why) => (None, why),
        },
    };
    Measured {
        of,
        generate_milli: (bandwidth / GENERATE_BYTES * 1000.0) as u64,
        embed_milli: (flops * KERNEL_GAIN / EMBED_FLOPS * 1000.0) as u64,
        isolation,
        worker_error,
        bench: None,
    }
}

/// Starts a worker without a model: it closes its sandbox and says what that holds.
async fn try_worker(program: &WorkerProgram) -> Result<Isolation, String> {
    let started = async {
        let worker = Worker::spawn(&program.path, &program.args, SpawnOptions::default()).await?;
        let facts = worker
            .load(Load::new(LoadKind::Noop, ""), Some(WORKER_MAX))
            .await?;
        worker.shutdown().await;
        Ok::<_, karez_engine::EngineError>(facts.isolation)
    };
    started.await.map_err(|error| error.to_string())
}

/// Sums memory that no cache holds, from every thread.
fn bytes_per_second(threads: usize) -> f64 {
    let block = vec![1u64; (64 << 20) / 8 / threads];
    in_threads(threads, || {
        let sum = block.chunks_exact(8).fold([0u64; 8], |mut sums, eight| {
            for (sum, value) in sums.iter_mut().zip(eight) {
                *sum = sum.wrapping_add(*value);
            }
            sums
        });
        black_box(sum);
        (block.len() * 8) as u64
    })
}

/// Multiplies and adds in registers, in every thread.
fn flops_per_second(threads: usize) -> f64 {
    const ROUNDS: u64 = 20_000;
    in_threads(threads, || {
        let mut lanes = [1.0f32; 32];
        let (factor, more) = (black_box(0.999_9f32), black_box(0.000_1f32));
        for _ in 0..ROUNDS {
            for lane in &mut lanes {
                *lane = *lane * factor + more;
            }
        }
        black_box(lanes);
        ROUNDS * lanes.len() as u64 * 2
    })
}

/// Runs `step` in each thread for [`MEASURE`] and adds up what the steps say they did, per second.
fn in_threads(threads: usize, step: impl Fn() -> u64 + Sync) -> f64 {
    let done = AtomicU64::new(0);
    let began = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while began.elapsed() < MEASURE {
                    done.fetch_add(step(), Ordering::Relaxed);
                }
            });
        }
    });
    done.into_inner() as f64 / began.elapsed().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        Limits {
            cpu_slots: 2,
            gpus: true,
            threads: Some(1),
            memory: None,
            store: Bytes(1 << 30),
            context_tokens: None,
        }
    }

    #[tokio::test]
    async fn a_machine_is_measured_once_and_then_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let cache = dir.path().join("probe.json");
        let found = probe(&cache, &limits(), None, false).await;
        assert_eq!((found.devices.len(), found.devices[0].count), (1, 2));
        assert!(found.devices[0].class.starts_with("cpu/"));
        assert_eq!(found.engines.len(), 1, "{:?}", found.engines);
        assert_eq!(found.isolation, "none");
        let kept: Measured = serde_json::from_slice(&std::fs::read(&cache).unwrap()).unwrap();
        assert!(kept.generate_milli > 0 && kept.embed_milli > 0, "{kept:?}");
        let began = Instant::now();
        assert_eq!(probe(&cache, &limits(), None, false).await.devices, found.devices);
        assert!(began.elapsed() < MEASURE + Duration::from_secs(2));
    }

    #[test]
    fn what_was_measured_is_offered_instead_of_the_estimate() {
        let measured = |bench| Measured {
            of: Identity {
                cpu: String::new(),
                isa: String::new(),
                threads: 1,
                version: String::new(),
                worker: String::new(),
            },
            generate_milli: 40_000,
            embed_milli: 1,
            isolation: Some(Isolation::Seccomp),
            worker_error: String::new(),
            bench,
        };
        let bench = ClassSpeed {
            class: bench::REFERENCE_CLASS.into(),
            prompt_milli: 125_000,
            decode_milli: 41_000,
            many_milli: 110_000,
            threads: 1,
        };
        let worker = WorkerProgram::new("/karez");
        for (kept, milli, method) in [(None, 40_000, METHOD), (Some(bench), 110_000, "bench/1")] {
            let machine = karez_engine::probe::probe();
            let found = describe(machine, 1, &limits(), Some(&worker), false, &measured(kept));
            let engine = found
                .engines
                .iter()
                .find(|e| e.work == WorkKind::Generate)
                .unwrap();
            assert_eq!((engine.speed, engine.method.as_str()), (Speed(milli), method));
        }
    }

    #[tokio::test]
    async fn a_worker_that_does_not_start_is_not_offered() {
        let dir = tempfile::tempdir().unwrap();
        let worker = WorkerProgram::new("/nonexistent/karez");
        let found = probe(&dir.path().join("probe.json"), &limits(), Some(&worker), false).await;
        assert_eq!(found.engines.len(), 1);
        assert!(found.notes[0].contains("/nonexistent/karez"), "{:?}", found.notes);
    }
}
