//! What a node measured: readings while it works, and a usage when it ends.
use super::{
    envelope::{Record, RecordError},
    wire::{Fields, UTC_MAX},
};
use crate::{
    artifact::ArtifactRef,
    id::RecordId,
    key::{NodeId, PublicKey},
    prelude::*,
    unit::{Bytes, DeviceMillis, Millis, MonoMillis, Speed, UtcMillis},
};
use karez_proto::records as wire;
use serde::{Deserialize, Serialize};

/// Raw meters: totals since the lease was granted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meters {
    /// Devices × time held.
    pub device_ms: DeviceMillis,
    /// Of that, what went by before the worker's model was ready: it says nothing of how fast the work is.
    #[serde(default)]
    pub loading: DeviceMillis,
    /// CPU time of the worker.
    pub cpu: Millis,
    /// Largest resident memory of the worker.
    pub memory_peak: Bytes,
    /// Resident memory × time, in byte-seconds.
    pub memory_byte_seconds: u64,
    /// Tokens read.
    pub tokens_in: u64,
    /// Tokens written.
    pub tokens_out: u64,
    /// Tokens read from a cache.
    pub tokens_cached: u64,
    /// Items finished.
    pub items: u64,
    /// Bytes fetched for the part.
    pub bytes_in: Bytes,
    /// Bytes of results.
    pub bytes_out: Bytes,
    /// Energy, where the machine can tell.
    pub millijoules: Option<u64>,
}

impl Meters {
    fn to_wire(self) -> wire::Meters {
        self.into()
    }

    fn from_wire(w: wire::Meters) -> Self {
        Self {
            device_ms: DeviceMillis(w.device_ms),
            loading: DeviceMillis(w.loading_ms.min(w.device_ms)),
            cpu: Millis(w.cpu_ms),
            memory_peak: Bytes(w.memory_peak_bytes),
            memory_byte_seconds: w.memory_byte_seconds,
            tokens_in: w.tokens_in,
            tokens_out: w.tokens_out,
            tokens_cached: w.tokens_cached,
            items: w.items,
            bytes_in: Bytes(w.bytes_in),
            bytes_out: Bytes(w.bytes_out),
            millijoules: w.millijoules,
        }
    }

    /// Adds the totals of another lease; memory peaks do not add up.
    pub fn add(&mut self, other: &Self) {
        self.device_ms = self.device_ms.saturating_add(other.device_ms);
        self.loading = self.loading.saturating_add(other.loading);
        self.cpu = self.cpu.saturating_add(other.cpu);
        self.memory_peak = self.memory_peak.max(other.memory_peak);
        self.memory_byte_seconds = self.memory_byte_seconds.saturating_add(other.memory_byte_seconds);
        self.tokens_in = self.tokens_in.saturating_add(other.tokens_in);
        self.tokens_out = self.tokens_out.saturating_add(other.tokens_out);
        self.tokens_cached = self.tokens_cached.saturating_add(other.tokens_cached);
        self.items = self.items.saturating_add(other.items);
        self.bytes_in = self.bytes_in.saturating_add(other.bytes_in);
        self.bytes_out = self.bytes_out.saturating_add(other.bytes_out);
        self.millijoules = match (self.millijoules, other.millijoules) {
            (Some(a), Some(b)) => Some(a.saturating_add(b)),
            (known, None) | (None, known) => known,
        };
    }

    /// No meter of `self` lies under the one of `before`: totals never fall, and a meter that spoke does not fall silent.
    pub fn grew_from(&self, before: &Self) -> bool {
        *self == self.at_least(before)
    }

    /// The same with every total raised to what it was `before`: a worker that was replaced begins at nothing.
    #[must_use]
    pub fn at_least(&self, before: &Self) -> Self {
        Self {
            device_ms: self.device_ms.max(before.device_ms),
            loading: self.loading.max(before.loading),
            cpu: self.cpu.max(before.cpu),
            memory_peak: self.memory_peak.max(before.memory_peak),
            memory_byte_seconds: self.memory_byte_seconds.max(before.memory_byte_seconds),
            tokens_in: self.tokens_in.max(before.tokens_in),
            tokens_out: self.tokens_out.max(before.tokens_out),
            tokens_cached: self.tokens_cached.max(before.tokens_cached),
            items: self.items.max(before.items),
            bytes_in: self.bytes_in.max(before.bytes_in),
            bytes_out: self.bytes_out.max(before.bytes_out),
            millijoules: self.millijoules.max(before.millijoules),
        }
    }
}

impl From<Meters> for wire::Meters {
    fn from(m: Meters) -> Self {
        Self {
            device_ms: m.device_ms.0,
            loading_ms: m.loading.0,
            cpu_ms: m.cpu.0,
            memory_peak_bytes: m.memory_peak.0,
            tokens_in: m.tokens_in,
            tokens_out: m.tokens_out,
            tokens_cached: m.tokens_cached,
            items: m.items,
            bytes_in: m.bytes_in.0,
            bytes_out: m.bytes_out.0,
            millijoules: m.millijoules,
            memory_byte_seconds: m.memory_byte_seconds,
        }
    }
}

impl From<wire::Meters> for Meters {
    fn from(w: wire::Meters) -> Self {
        Self::from_wire(w)
    }
}

/// What a device was measured to do before, by its node: with it, device time of unlike machines can be compared. The raw
/// meters stay what is billed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Benchmark {
    /// Which measurement, at most [`BENCHMARK_BYTES_MAX`] bytes: `bench/1` runs the pinned reference model, `probe/1` estimates.
    pub version: String,
    /// What one device of the lease's class does, in the unit of that measurement: tokens per second of the reference model.
    pub speed: Speed,
}

/// Bytes of a benchmark's version at most.
pub const BENCHMARK_BYTES_MAX: usize = 32;

impl Benchmark {
    fn from_wire(f: Fields, w: wire::Benchmark) -> Result<Self, RecordError> {
        if w.version.is_empty() {
            return Err(f.bad("benchmark.version", "is empty"));
        }
        Ok(Self {
            version: f.text("benchmark.version", w.version, BENCHMARK_BYTES_MAX)?,
            speed: Speed(f.within("benchmark.speed_milli", w.speed_milli, 1_000_000_000_000)?),
        })
    }
}

/// The meters of a lease at one moment; each names the reading before it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MeterReading {
    /// Record id of the lease.
    pub lease: RecordId,
    /// The node of that lease.
    pub node: NodeId,
    /// From 0.
    pub sequence: u32,
    /// Record id of the reading before; none for the first.
    pub previous: Option<RecordId>,
    /// Totals so far.
    pub meters: Meters,
    /// How they were measured: `rusage+wall/1`.
    pub method: String,
    /// When.
    pub taken_at: UtcMillis,
    /// When, on the node's monotonic clock.
    pub mono: MonoMillis,
    /// What a device of the lease's class does; none where it was not measured, and in records of before.
    #[serde(default)]
    pub benchmark: Option<Benchmark>,
}

impl Record for MeterReading {
    const TYPE: &'static str = "karez.reading.v1";
    const BYTES_MAX: usize = 4 * 1024;
    type Wire = wire::MeterReading;

    fn signer(&self) -> PublicKey {
        self.node.0
    }

    fn to_wire(&self) -> wire::MeterReading {
        wire::MeterReading {
            lease: self.lease.0.to_vec(),
            node: self.node.0.0.to_vec(),
            sequence: self.sequence,
            previous: self.previous.map(|d| d.0.to_vec()).unwrap_or_default(),
            meters: Some(self.meters.to_wire()),
            method: self.method.clone(),
            taken_at: self.taken_at.0,
            mono_ms: self.mono.0,
            benchmark: self.benchmark.as_ref().map(|b| wire::Benchmark {
                version: b.version.clone(),
                speed_milli: b.speed.0,
            }),
        }
    }

    fn from_wire(w: wire::MeterReading) -> Result<Self, RecordError> {
        let f = Fields(Self::TYPE);
        Ok(Self {
            lease: f.digest("lease", &w.lease)?,
            node: NodeId(f.key("node", &w.node)?),
            sequence: w.sequence,
            previous: f.optional_digest("previous", &w.previous)?,
            meters: Meters::from_wire(f.some("meters", w.meters)?),
            method: f.text("method", w.method, 64)?,
            taken_at: UtcMillis(f.within("taken_at", w.taken_at, UTC_MAX)?),
            mono: MonoMillis(w.mono_ms),
            benchmark: w.benchmark.map(|b| Benchmark::from_wire(f, b)).transpose()?,
        })
    }
}

/// How a lease ended on its node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// Every item has its result.
    Done,
    /// The work failed; the cause says whose fault it was.
    Failed,
    /// The user or the scheduler called it off.
    Cancelled,
    /// The owner wanted the machine back.
    Reclaimed,
}

impl Outcome {
    /// The wire name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Reclaimed => "reclaimed",
        }
    }
}

impl core::str::FromStr for Outcome {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "done" => Ok(Self::Done),
            "failed" => Ok(Self::Failed),
            "cancelled" => Ok(Self::Cancelled),
            "reclaimed" => Ok(Self::Reclaimed),
            _ => Err(format!("{text:?} is no outcome")),
        }
    }
}

/// The node's last word on a lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Record id of the lease.
    pub lease: RecordId,
    /// The node of that lease.
    pub node: NodeId,
    /// Record id of the last reading.
    pub last_reading: RecordId,
    /// How many readings there are.
    pub readings: u32,
    /// Final totals; equal to the last reading's.
    pub meters: Meters,
    /// How it ended.
    pub outcome: Outcome,
    /// Why, when it did not end well; at most 1000 bytes.
    pub cause: String,
    /// Trying elsewhere may help: the cause lies with the machine, not with the job.
    pub retryable: bool,
    /// JSON lines, one per item.
    pub result: Option<ArtifactRef>,
    /// When the lease was granted.
    pub started_at: UtcMillis,
    /// When it ended.
    pub ended_at: UtcMillis,
}

impl Record for Usage {
    const TYPE: &'static str = "karez.usage.v1";
    const BYTES_MAX: usize = 8 * 1024;
    type Wire = wire::Usage;

    fn signer(&self) -> PublicKey {
        self.node.0
    }

    fn to_wire(&self) -> wire::Usage {
        wire::Usage {
            lease: self.lease.0.to_vec(),
            node: self.node.0.0.to_vec(),
            last_reading: self.last_reading.0.to_vec(),
            readings: self.readings,
            meters: Some(self.meters.to_wire()),
            outcome: self.outcome.as_str().into(),
            cause: self.cause.clone(),
            retryable: self.retryable,
            result: self.result.map(Into::into),
            started_at: self.started_at.0,
            ended_at: self.ended_at.0,
        }
    }

    fn from_wire(w: wire::Usage) -> Result<Self, RecordError> {
        let f = Fields(Self::TYPE);
        Ok(Self {
            lease: f.digest("lease", &w.lease)?,
            node: NodeId(f.key("node", &w.node)?),
            last_reading: f.digest("last_reading", &w.last_reading)?,
            readings: w.readings,
            meters: Meters::from_wire(f.some("meters", w.meters)?),
            outcome: f.parse("outcome", &w.outcome)?,
            cause: f.text("cause", w.cause, 1000)?,
            retryable: w.retryable,
            result: w.result.map(|r| f.artifact("result", r)).transpose()?,
            started_at: UtcMillis(f.within("started_at", w.started_at, UTC_MAX)?),
            ended_at: UtcMillis(f.within("ended_at", w.ended_at, UTC_MAX)?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::Digest;

    fn reading(benchmark: Option<Benchmark>) -> MeterReading {
        MeterReading {
            lease: Digest([1; 32]),
            node: NodeId(PublicKey::of(&crate::key::SecretKey::from_bytes(&[2; 32]))),
            sequence: 0,
            previous: None,
            meters: Meters::default(),
            method: "wall+rusage/1".into(),
            taken_at: UtcMillis(1),
            mono: MonoMillis(2),
            benchmark,
        }
    }

    #[test]
    fn readings_with_and_without_a_benchmark_are_read_as_they_were_written() {
        let measured = Benchmark {
            version: "bench/1".into(),
            speed: Speed(123_456),
        };
        for benchmark in [None, Some(measured)] {
            let reading = reading(benchmark);
            assert_eq!(MeterReading::from_wire(reading.to_wire()), Ok(reading));
        }
        for (version, speed_milli, field) in [
            ("", 1, "benchmark.version"),
            ("a benchmark with a name longer than any", 1, "benchmark.version"),
            ("bench/1", u64::MAX, "benchmark.speed_milli"),
        ] {
            let mut wire = reading(None).to_wire();
            wire.benchmark = Some(wire::Benchmark {
                version: version.into(),
                speed_milli,
            });
            let error = MeterReading::from_wire(wire).unwrap_err().to_string();
            assert!(error.contains(field), "{field}: {error}");
        }
    }
}
