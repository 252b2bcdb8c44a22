//! What this machine has to offer: instruction set, cores, memory and GPUs.
//!
//! Reads files under `/proc` and `/sys` and asks `nvidia-smi` where there is one; waits two seconds at most.
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::unit::Bytes;

/// What was found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Probe {
    /// The instruction set, by the usual levels.
    pub isa: Isa,
    /// The processor, as it calls itself.
    pub cpu: String,
    /// Threads this process may run at once, control group and affinity respected.
    pub cores: u16,
    /// Memory this process may use, control group respected.
    pub memory: Bytes,
    /// How much of it is free now.
    pub memory_free: Bytes,
    /// Found GPUs.
    pub gpus: Vec<Gpu>,
}

/// Levels of the instruction set, as offers tell them. What llama.cpp computes with is finer: `level`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Isa {
    /// Anything else, and x86-64 of before 2008.
    #[serde(rename = "other")]
    Other,
    /// x86-64 with SSE 4.2.
    #[serde(rename = "x86-64-v2")]
    X86V2,
    /// x86-64 with AVX2, FMA, BMI2 and F16C.
    #[serde(rename = "x86-64-v3")]
    X86V3,
    /// x86-64 with AVX-512 (F, BW, CD, DQ, VL).
    #[serde(rename = "x86-64-v4")]
    X86V4,
    /// 64-bit ARM.
    #[serde(rename = "aarch64")]
    Aarch64,
}

impl std::fmt::Display for Isa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Other => "other",
            Self::X86V2 => "x86-64-v2",
            Self::X86V3 => "x86-64-v3",
            Self::X86V4 => "x86-64-v4",
            Self::Aarch64 => "aarch64",
        })
    }
}

/// One GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gpu {
    /// Its position in the driver's list.
    pub index: u32,
    /// Its name for life.
    pub uuid: String,
    /// Its model.
    pub name: String,
    /// All its memory.
    pub memory: Bytes,
    /// What is free of it now.
    pub memory_free: Bytes,
    /// The driver's version.
    pub driver: String,
}

/// Looks at everything.
pub fn probe() -> Probe {
    let (memory, memory_free) = memory();
    Probe {
        isa: isa(),
        cpu: cpu(),
        cores: cores(),
        memory,
        memory_free,
        gpus: nvidia_gpus(Duration::from_secs(2)),
    }
}

/// The instruction set of the processor that runs this.
#[cfg(target_arch = "x86_64")]
pub fn isa() -> Isa {
    use std::arch::is_x86_feature_detected as has;
    let v2 = has!("sse3") && has!("ssse3") && has!("sse4.1") && has!("sse4.2") && has!("popcnt");
    let v3 = v2
        && has!("avx")
        && has!("avx2")
        && has!("bmi1")
        && has!("bmi2")
        && has!("f16c")
        && has!("fma")
        && has!("lzcnt")
        && has!("movbe");
    let v4 =
        v3 && has!("avx512f") && has!("avx512bw") && has!("avx512cd") && has!("avx512dq") && has!("avx512vl");
    if v4 {
        Isa::X86V4
    } else if v3 {
        Isa::X86V3
    } else if v2 {
        Isa::X86V2
    } else {
        Isa::Other
    }
}

/// The instruction set of the processor that runs this.
#[cfg(not(target_arch = "x86_64"))]
pub fn isa() -> Isa {
    if cfg!(target_arch = "aarch64") {
        Isa::Aarch64
    } else {
        Isa::Other
    }
}

/// Threads this process may run at once.
pub fn cores() -> u16 {
    std::thread::available_parallelism()
        .ok()
        .and_then(|n| u16::try_from(n.get()).ok())
        .unwrap_or(1)
}

fn cpu() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = info
        .lines()
        .find(|line| line.starts_with("model name"))
        .and_then(|line| line.split_once(':'));
    line.map_or_else(
        || std::env::consts::ARCH.to_owned(),
        |(_, name)| name.trim().to_owned(),
    )
}

fn memory() -> (Bytes, Bytes) {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let field = |name: &str| {
        let kibibytes = info
            .lines()
            .find_map(|line| line.strip_prefix(name)?.split_whitespace().next());
        kibibytes
            .and_then(|n| n.parse::<u64>().ok())
            .unwrap_or(0)
            .saturating_mul(1024)
    };
    let (total, free) = (field("MemTotal:"), field("MemAvailable:"));
    match group_memory() {
        Some((limit, used)) => (
            Bytes(total.min(limit)),
            Bytes(free.min(limit.saturating_sub(used))),
        ),
        None => (Bytes(total), Bytes(free)),
    }
}

/// Limit and use of the narrowest control group (v2) around this process that has a limit.
fn group_memory() -> Option<(u64, u64)> {
    let own = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let own = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let root = Path::new("/sys/fs/cgroup");
    let read = |path: &Path| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    root.join(own)
        .ancestors()
        .take_while(|group| group.starts_with(root))
        .filter_map(|group| {
            Some((
                read(&group.join("memory.max"))?,
                read(&group.join("memory.current"))?,
            ))
        })
        .min_by_key(|(limit, _)| *limit)
}

/// NVIDIA GPUs, by asking `nvidia-smi`; none where it is missing, fails or takes longer than `patience`.
pub fn nvidia_gpus(patience: Duration) -> Vec<Gpu> {
    let started = Command::new("nvidia-smi")
        .args([
            "--query-gpu=index,uuid,name,memory.total,memory.free,driver_version",
            "--format=csv,noheader,nounits",
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let Ok(mut child) = started else { return Vec::new() };
    let until = Instant::now() + patience;
    let success = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status.success(),
            Ok(None) if Instant::now() < until => std::thread::sleep(Duration::from_millis(10)),
            _ => {
                let _ = child.kill();
                let _ = child.wait();
                break false;
            }
        }
    };
    let mut table = String::new();
    if success && let Some(stdout) = child.stdout.take() {
        // It has ended, so all it wrote is in the pipe; the cap is for a pipe that somebody else still holds.
        let _ = stdout.take(1 << 16).read_to_string(&mut table);
    }
    table.lines().filter_map(gpu).collect()
}

fn gpu(line: &str) -> Option<Gpu> {
    let fields: Vec<&str> = line.split(',').map(str::trim).collect();
    let [index, uuid, name, total, free, driver] = fields[..] else {
        return None;
    };
    // A model that shares its memory with the processor reports no number here.
    let mebibytes = |text: &str| Bytes(text.parse::<u64>().unwrap_or(0).saturating_mul(1 << 20));
    Some(Gpu {
        index: index.parse().ok()?,
        uuid: uuid.to_owned(),
        name: name.to_owned(),
        memory: mebibytes(total),
        memory_free: mebibytes(free),
        driver: driver.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_something() {
        let probe = probe();
        assert!(probe.cores >= 1 && !probe.cpu.is_empty());
        assert!(
            probe.memory.0 > 64 << 20 && probe.memory_free <= probe.memory,
            "{probe:?}"
        );
    }

    #[test]
    fn a_line_of_nvidia_smi_is_a_gpu() {
        let line = "0, GPU-5d3c, NVIDIA GeForce RTX 3060, 12288, 11900, 550.54";
        let found = gpu(line).unwrap();
        assert_eq!(
            (found.index, found.memory, found.driver.as_str()),
            (0, Bytes(12288 << 20), "550.54")
        );
        assert_eq!(
            gpu("1, GPU-x, NVIDIA GH200, [N/A], [N/A], 1").unwrap().memory,
            Bytes(0)
        );
        assert_eq!(gpu("No devices were found"), None);
    }
}
