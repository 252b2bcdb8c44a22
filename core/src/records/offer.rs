//! An offer: what a node can do now, at what price, until when.
use super::{
    envelope::{Record, RecordError},
    wire::{Fields, UTC_MAX},
};
use crate::{
    id::{Country, Digest, Institution},
    key::{NodeId, PublicKey},
    prelude::*,
    unit::{Bytes, Portion, Rate, Speed, UtcMillis, WHOLE},
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
    /// The smallest share of one device that is lent, in thousandths; 0: whole devices only.
    #[serde(default)]
    pub share_min: u32,
    /// What is free of each device that guests share now, in thousandths; at most [`SHARED_MAX`] of them.
    #[serde(default)]
    pub shared: Vec<u32>,
}

/// Devices of one class that guests may share at a time; the others are lent whole.
pub const SHARED_MAX: usize = 64;

impl Device {
    /// Whether the owner lends so much of it at a time.
    pub fn lends(&self, portion: Portion) -> bool {
        !portion.is_share() || (self.share_min > 0 && portion.milli() >= self.share_min)
    }
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

/// How far a worker is cut off from its machine, and its machine from it. Higher tiers hold all that lower ones do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tier {
    /// An ordinary process.
    #[default]
    None,
    /// No sockets, no new programs.
    Seccomp,
    /// And of the file system only what it needs.
    #[serde(rename = "landlock+seccomp")]
    LandlockSeccomp,
    /// Its own container.
    Container,
    /// Its own virtual machine.
    Machine,
}

impl Tier {
    /// Every tier, lowest first.
    pub const ALL: [Self; 5] = [
        Self::None,
        Self::Seccomp,
        Self::LandlockSeccomp,
        Self::Container,
        Self::Machine,
    ];

    /// The wire name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Seccomp => "seccomp",
            Self::LandlockSeccomp => "landlock+seccomp",
            Self::Container => "container",
            Self::Machine => "machine",
        }
    }

    /// What an offer's own word for its isolation is worth: a word nobody knows promises nothing.
    pub fn of_offer(text: &str) -> Self {
        text.parse().unwrap_or_default()
    }
}

impl core::str::FromStr for Tier {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|tier| tier.as_str() == text);
        found.ok_or_else(|| {
            format!("{text:?} is no isolation tier: expected none, seccomp, landlock+seccomp, container or machine")
        })
    }
}

impl core::fmt::Display for Tier {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How carefully data must be handled. An owner says up to which class the machine may be given any.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DataClass {
    /// Anybody may read it.
    #[default]
    Public,
    /// Not secret, but not for everybody.
    Internal,
    /// About people.
    Personal,
    /// About people's health, beliefs, safety; or a secret.
    Sensitive,
}

impl DataClass {
    /// Every class, lowest first.
    pub const ALL: [Self; 4] = [Self::Public, Self::Internal, Self::Personal, Self::Sensitive];

    /// The wire name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Public => "public",
            Self::Internal => "internal",
            Self::Personal => "personal",
            Self::Sensitive => "sensitive",
        }
    }
}

impl core::str::FromStr for DataClass {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|class| class.as_str() == text);
        found.ok_or_else(|| {
            format!("{text:?} is no data class: expected public, internal, personal or sensitive")
        })
    }
}

impl core::fmt::Display for DataClass {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The most entries of each list of an owner's terms.
pub const TERMS_MAX: usize = 64;
/// Bytes of a licence's name at most.
pub const LICENCE_BYTES_MAX: usize = 64;

/// Whom and what an owner serves. The node's own word decides; told in its offer so that nobody asks in vain.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct OwnerPolicy {
    /// Users of these institutions only; empty for all.
    pub institutions: Vec<Institution>,
    /// Never users of these institutions.
    pub institutions_excluded: Vec<Institution>,
    /// These kinds of work only; empty for all.
    pub work: Vec<WorkKind>,
    /// Models under these licences only, by their SPDX names; empty for all.
    pub licences: Vec<String>,
    /// No data that must be handled with more care than this.
    pub data: DataClass,
    /// Guests leave, with a checkpoint, when users of the owner's institution wait for the machine.
    pub local_first: bool,
}

impl Default for OwnerPolicy {
    /// Everybody, everything that is not about people.
    fn default() -> Self {
        Self {
            institutions: Vec::new(),
            institutions_excluded: Vec::new(),
            work: Vec::new(),
            licences: Vec::new(),
            data: DataClass::Internal,
            local_first: false,
        }
    }
}

impl OwnerPolicy {
    /// Whether users of that institution are served.
    pub fn serves(&self, user: &Institution) -> bool {
        (self.institutions.is_empty() || self.institutions.contains(user))
            && !self.institutions_excluded.contains(user)
    }

    /// Whether that kind of work is done.
    pub fn does(&self, kind: WorkKind) -> bool {
        self.work.is_empty() || self.work.contains(&kind)
    }

    /// Whether models under that licence are run; work without a model needs none.
    pub fn licensed(&self, licence: &str, has_model: bool) -> bool {
        let listed = |known: &String| known.eq_ignore_ascii_case(licence);
        !has_model || self.licences.is_empty() || self.licences.iter().any(listed)
    }

    fn from_wire(f: Fields, w: wire::Terms) -> Result<Self, RecordError> {
        Ok(Self {
            institutions: f.list("terms.institutions", w.institutions, TERMS_MAX, |t| {
                f.parse("terms.institutions", &t)
            })?,
            institutions_excluded: f.list(
                "terms.institutions_excluded",
                w.institutions_excluded,
                TERMS_MAX,
                |t| f.parse("terms.institutions_excluded", &t),
            )?,
            work: f.list("terms.work", w.work, 16, |t| f.parse("terms.work", &t))?,
            licences: f.list("terms.licences", w.licences, TERMS_MAX, |t| {
                f.text("terms.licences", t, LICENCE_BYTES_MAX)
            })?,
            data: f.parse("terms.data_class", &w.data_class)?,
            local_first: w.local_first,
        })
    }

    fn to_wire(&self) -> wire::Terms {
        let names = |list: &[Institution]| list.iter().map(ToString::to_string).collect();
        wire::Terms {
            institutions: names(&self.institutions),
            institutions_excluded: names(&self.institutions_excluded),
            work: self.work.iter().map(|kind| kind.as_str().into()).collect(),
            licences: self.licences.clone(),
            data_class: self.data.as_str().into(),
            local_first: self.local_first,
        }
    }
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
    /// Whom and what the owner serves.
    #[serde(default)]
    pub terms: OwnerPolicy,
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
                    share_min_milli: d.share_min,
                    shared_milli: d.shared.clone(),
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
            terms: Some(self.terms.to_wire()),
        }
    }

    fn from_wire(w: wire::Offer) -> Result<Self, RecordError> {
        let f = Fields(Self::TYPE);
        let device = |d: wire::Device| {
            let count = f.within("devices.count", d.count.into(), 1024)? as u32;
            let whole = u64::from(WHOLE);
            let shared = f.list("devices.shared_milli", d.shared_milli, SHARED_MAX, |milli| {
                f.within("devices.shared_milli", milli.into(), whole)
                    .map(|milli| milli as u32)
            })?;
            // What is shared is neither free nor held whole.
            let left = u64::from(count).saturating_sub(shared.len() as u64);
            if shared.len() > count as usize {
                return Err(f.bad("devices.shared_milli", "names more devices than there are"));
            }
            Ok(Device {
                class: f.text("devices.class", d.class, 64)?,
                count,
                free: f.within("devices.free", d.free.into(), left)? as u32,
                share_min: f.within("devices.share_min_milli", d.share_min_milli.into(), whole)? as u32,
                shared,
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
            terms: match w.terms {
                Some(terms) => OwnerPolicy::from_wire(f, terms)?,
                None => OwnerPolicy::default(),
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::market::tests::offer_of;

    /// What no machine is must not reach the market, and the field at fault is named.
    #[test]
    fn absurd_offers_are_refused_by_their_field() {
        type Change = fn(&mut wire::Offer);
        let cases: [(&str, Change); 16] = [
            ("devices.count", |o| o.devices[0].count = 1_000_000_000),
            ("devices.count", |o| o.devices[0].count = u32::MAX),
            ("devices.free", |o| o.devices[0].free = 2),
            ("devices.free", |o| o.devices[0].shared_milli = vec![500]),
            ("devices.shared_milli", |o| {
                o.devices[0].shared_milli = vec![1_001]
            }),
            ("devices.shared_milli", |o| {
                o.devices[0].shared_milli = vec![500; 65]
            }),
            ("devices.share_min_milli", |o| {
                o.devices[0].share_min_milli = u32::MAX
            }),
            // A negative number in somebody's program.
            ("devices.rate", |o| o.devices[0].rate = -1i64 as u64),
            ("devices.memory_bytes", |o| o.devices[0].memory_bytes = u64::MAX),
            ("engines.speed_milli", |o| o.engines[0].speed_milli = u64::MAX),
            ("cores", |o| o.cores = u32::MAX),
            ("memory_bytes", |o| o.memory_bytes = 1 << 60),
            ("devices", |o| o.devices = vec![o.devices[0].clone(); 17]),
            ("expires_at", |o| o.expires_at = o.issued_at),
            ("issued_at", |o| o.issued_at = u64::MAX),
            ("terms.data_class", |o| {
                o.terms = Some(wire::Terms {
                    data_class: "everything".into(),
                    ..wire::Terms::default()
                });
            }),
        ];
        for (field, change) in cases {
            let mut offer = offer_of("a:1gpu@5", 1).to_wire();
            change(&mut offer);
            let error = Offer::from_wire(offer).unwrap_err().to_string();
            assert!(error.contains(field), "{field}: {error}");
        }
    }

    #[test]
    fn an_offer_without_terms_serves_everybody() {
        let mut offer = offer_of("a:1gpu@5,lic=mit,data=sensitive", 1).to_wire();
        offer.terms = None;
        assert_eq!(Offer::from_wire(offer).unwrap().terms, OwnerPolicy::default());
        let offer = offer_of("a:1gpu@5,lic=mit,data=sensitive,local,only=uni-a,does=embed", 1).into_inner();
        assert_eq!(Offer::from_wire(offer.to_wire()).unwrap(), offer);
    }
}
