//! An offer: what a node can do now, at what price, until when.
use super::{
    envelope::{Record, RecordError},
    wire::{Fields, UTC_MAX},
};
use crate::{
    id::{Country, Digest, Institution},
    key::{NodeId, PublicKey},
    prelude::*,
    unit::{Bytes, Rate, Speed, UtcMillis},
};
use karez_proto::records as wire;
use serde::{Deserialize, Serialize};

/// The most cached artifacts an offer names; the node picks the most recently used.
pub const OFFER_CACHED_MAX: usize = 256;

/// The kinds of work an engine can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WorkKind {
    /// Wait a given time per item: measures the network itself.
    Noop,
    /// Turn texts into vectors.
    Embed,
    /// Continue prompts.
    Generate,
    /// Train an adapter.
    Train,
}

impl WorkKind {
    /// The wire name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Noop => "noop",
            Self::Embed => "embed",
            Self::Generate => "generate",
            Self::Train => "train",
        }
    }
}

impl core::str::FromStr for WorkKind {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "noop" => Ok(Self::Noop),
            "embed" => Ok(Self::Embed),
            "generate" => Ok(Self::Generate),
            "train" => Ok(Self::Train),
            _ => Err(format!(
                "{text:?} is no kind of work: expected noop, embed, generate or train"
            )),
        }
    }
}

/// Whether a node takes new leases.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeState {
    /// It does.
    Open,
    /// Not for now; what runs goes on.
    Paused,
    /// Not any more; what runs goes on, then the node leaves.
    Draining,
    /// The owner took it back: what ran was asked to leave.
    Reclaimed,
}

impl NodeState {
    /// The wire name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Paused => "paused",
            Self::Draining => "draining",
            Self::Reclaimed => "reclaimed",
        }
    }
}

impl core::str::FromStr for NodeState {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "open" => Ok(Self::Open),
            "paused" => Ok(Self::Paused),
            "draining" => Ok(Self::Draining),
            "reclaimed" => Ok(Self::Reclaimed),
            _ => Err(format!("{text:?} is no node state")),
        }
    }
}

/// One class of device on a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// `cpu/x86-64-v3`, `cuda/NVIDIA H200`.
    pub class: String,
    /// How many there are; at most 1024.
    pub count: u32,
    /// How many are free now.
    pub free: u32,
    /// Memory of one device.
    pub memory: Bytes,
    /// Price of one device.
    pub rate: Rate,
}

/// What an engine of the node can run and how fast it was measured to be, on one device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Engine {
    /// `llama.cpp`, `candle`, `noop`.
    pub name: String,
    /// Its version.
    pub version: String,
    /// The kind of work it does.
    pub work: WorkKind,
    /// Work units per second.
    pub speed: Speed,
    /// How that was measured.
    pub method: String,
}

/// A node's signed description of itself, believed until it expires or a later sequence arrives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// The node that signs.
    pub node: NodeId,
    /// A name for people.
    pub name: String,
    /// Whose machine it is.
    pub institution: Institution,
    /// Where it stands.
    pub country: Country,
    /// Classes of devices; at most 16.
    pub devices: Vec<Device>,
    /// Engines; at most 16.
    pub engines: Vec<Engine>,
    /// CPU cores of the machine.
    pub cores: u32,
    /// Memory of the machine.
    pub memory: Bytes,
    /// Instruction set level: `x86-64-v3`.
    pub isa: String,
    /// What its sandbox really enforces.
    pub isolation: String,
    /// Artifacts it holds and serves; at most [`OFFER_CACHED_MAX`].
    pub cached: Vec<Digest>,
    /// Where it serves artifacts, `ip:port`; at most 8.
    pub artifact_addrs: Vec<String>,
    /// Rises with every offer of this node.
    pub sequence: u64,
    /// When it was made.
    pub issued_at: UtcMillis,
    /// When to forget it.
    pub expires_at: UtcMillis,
    /// Whether new leases are taken.
    pub state: NodeState,
}

impl Record for Offer {
    const TYPE: &'static str = "karez.offer.v1";
    const BYTES_MAX: usize = 32 * 1024;
    type Wire = wire::Offer;

    fn signer(&self) -> PublicKey {
        self.node.0
    }

    fn to_wire(&self) -> wire::Offer {
        wire::Offer {
            node: self.node.0.0.to_vec(),
            name: self.name.clone(),
            institution: self.institution.to_string(),
            country: self.country.to_string(),
            devices: self
                .devices
                .iter()
                .map(|d| wire::Device {
                    class: d.class.clone(),
                    count: d.count,
                    free: d.free,
                    memory_bytes: d.memory.0,
                    rate: d.rate.0,
                })
                .collect(),
            engines: self
                .engines
                .iter()
                .map(|e| wire::Engine {
                    name: e.name.clone(),
                    version: e.version.clone(),
                    work: e.work.as_str().into(),
                    speed_milli: e.speed.0,
                    method: e.method.clone(),
                })
                .collect(),
            cores: self.cores,
            memory_bytes: self.memory.0,
            isa: self.isa.clone(),
            isolation: self.isolation.clone(),
            cached: self.cached.iter().map(|d| d.0.to_vec()).collect(),
            artifact_addrs: self.artifact_addrs.clone(),
            sequence: self.sequence,
            issued_at: self.issued_at.0,
            expires_at: self.expires_at.0,
            state: self.state.as_str().into(),
        }
    }

    fn from_wire(w: wire::Offer) -> Result<Self, RecordError> {
        let f = Fields(Self::TYPE);
        let device = |d: wire::Device| {
            let count = f.within("devices.count", d.count.into(), 1024)? as u32;
            Ok(Device {
                class: f.text("devices.class", d.class, 64)?,
                count,
                free: f.within("devices.free", d.free.into(), count.into())? as u32,
                memory: Bytes(f.within("devices.memory_bytes", d.memory_bytes, 1 << 50)?),
                // A million credits an hour: more only serves to overflow sums.
                rate: Rate(f.within("devices.rate", d.rate, 1_000_000_000_000)?),
            })
        };
        let engine = |e: wire::Engine| {
            Ok(Engine {
                name: f.text("engines.name", e.name, 32)?,
                version: f.text("engines.version", e.version, 32)?,
                work: f.parse("engines.work", &e.work)?,
                speed: Speed(f.within("engines.speed_milli", e.speed_milli, 1_000_000_000_000)?),
                method: f.text("engines.method", e.method, 32)?,
            })
        };
        // Leases name a class of device: a second entry of the same could never be counted.
        let mut classes: Vec<&str> = w.devices.iter().map(|d| d.class.as_str()).collect();
        classes.sort_unstable();
        if classes.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(f.bad("devices.class", "names a class twice"));
        }
        let issued_at = UtcMillis(f.within("issued_at", w.issued_at, UTC_MAX)?);
        let expires_at = UtcMillis(f.within("expires_at", w.expires_at, UTC_MAX)?);
        if expires_at <= issued_at {
            return Err(f.bad("expires_at", "does not lie after issued_at"));
        }
        Ok(Self {
            node: NodeId(f.key("node", &w.node)?),
            name: f.text("name", w.name, 64)?,
            institution: f.parse("institution", &w.institution)?,
            country: f.parse("country", &w.country)?,
            devices: f.list("devices", w.devices, 16, device)?,
            engines: f.list("engines", w.engines, 16, engine)?,
            cores: f.within("cores", w.cores.into(), 65_536)? as u32,
            memory: Bytes(f.within("memory_bytes", w.memory_bytes, 1 << 50)?),
            isa: f.text("isa", w.isa, 32)?,
            isolation: f.text("isolation", w.isolation, 32)?,
            cached: f.list("cached", w.cached, OFFER_CACHED_MAX, |d| f.digest("cached", &d))?,
            artifact_addrs: f.list("artifact_addrs", w.artifact_addrs, 8, |a| {
                f.text("artifact_addrs", a, 128)
            })?,
            sequence: w.sequence,
            issued_at,
            expires_at,
            state: f.parse("state", &w.state)?,
        })
    }
}
