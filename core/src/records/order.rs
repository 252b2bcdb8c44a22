//! An order: what a researcher wants done, on what, within which limits.
use super::{
    envelope::{Record, RecordError},
    offer::WorkKind,
    wire::{Fields, UTC_MAX},
};
use crate::{
    artifact::ArtifactRef,
    id::{Country, Institution},
    key::{PublicKey, SchedulerId, UserId},
    prelude::*,
    unit::{Bytes, Credits, Rate, UtcMillis},
};
use karez_proto::records as wire;
use serde::{Deserialize, Serialize};

/// The most items one job may have.
pub const ITEMS_MAX: u64 = 10_000_000;
/// The most parts one job may be cut into.
pub const PARTS_MAX: u64 = 10_000;

/// How to continue prompts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Generate {
    /// A GGUF file.
    pub model: ArtifactRef,
    /// What the user called it.
    pub model_name: String,
    /// Tokens to write per prompt at most.
    pub max_tokens: u32,
    /// Thousandths; 0 is greedy.
    pub temperature_milli: u32,
    /// 0: no limit.
    pub top_k: u32,
    /// Thousandths; 1000: no limit.
    pub top_p_milli: u32,
    /// Draws are the same for the same seed on the same class of machine.
    pub seed: u64,
    /// The prompt as it stands, without the model's chat template.
    pub raw: bool,
    /// System prompt of the chat template; empty for none.
    pub system: String,
}

/// What to do with each item of the input.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Work {
    /// Nothing, for a while.
    Noop {
        /// How long per item.
        millis_per_item: u32,
    },
    /// Embed `text` of each line.
    Embed {
        /// A directory with config.json, tokenizer.json and model.safetensors.
        model: ArtifactRef,
        /// What the user called it.
        model_name: String,
    },
    /// Continue `prompt` of each line.
    Generate(Generate),
}

impl Work {
    /// Which kind of engine it needs.
    pub fn kind(&self) -> WorkKind {
        match self {
            Self::Noop { .. } => WorkKind::Noop,
            Self::Embed { .. } => WorkKind::Embed,
            Self::Generate(_) => WorkKind::Generate,
        }
    }
    /// The model it needs.
    pub fn model(&self) -> Option<&ArtifactRef> {
        match self {
            Self::Noop { .. } => None,
            Self::Embed { model, .. } => Some(model),
            Self::Generate(g) => Some(&g.model),
        }
    }
    /// What the user called the model; empty without one.
    pub fn model_name(&self) -> &str {
        match self {
            Self::Noop { .. } => "",
            Self::Embed { model_name, .. } => model_name,
            Self::Generate(g) => &g.model_name,
        }
    }
}

/// Masks: a node passes all of them or is excluded. Empty lists exclude nobody.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Constraints {
    /// Only these countries.
    pub countries: Vec<Country>,
    /// None of these countries.
    pub countries_excluded: Vec<Country>,
    /// Only machines of these institutions.
    pub institutions: Vec<Institution>,
    /// No machine of these institutions.
    pub institutions_excluded: Vec<Institution>,
    /// Start of the device class: `cuda`, `cpu/x86-64-v3`. Empty for any.
    pub device: String,
    /// Memory one device must have.
    pub memory: Bytes,
    /// Only capacity at price zero.
    pub donated_only: bool,
    /// No device dearer than this.
    pub rate_max: Option<Rate>,
}

/// A researcher's signed wish. Its record id is the job's id, so the same order is the same job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// Who signs and pays.
    pub user: UserId,
    /// The user's institution.
    pub institution: Institution,
    /// The one scheduler that may act on it: an order shown to two schedulers runs and bills once.
    pub scheduler: SchedulerId,
    /// What to do.
    pub work: Work,
    /// JSON lines, one item each.
    pub input: ArtifactRef,
    /// Lines in it; 1 to [`ITEMS_MAX`].
    pub items: u64,
    /// How to cut it; 0 leaves it to the scheduler.
    pub items_per_part: u32,
    /// Where it may run.
    pub constraints: Constraints,
    /// Reserved at submit; never exceeded.
    pub credits_max: Credits,
    /// Attempts at each part before the job fails; 1 to 100.
    pub attempts_max: u32,
    /// Makes two otherwise equal orders two jobs.
    pub nonce: u64,
    /// When it was signed.
    pub issued_at: UtcMillis,
    /// When it may no longer be accepted.
    pub expires_at: UtcMillis,
}

impl Record for Order {
    const TYPE: &'static str = "karez.order.v1";
    const BYTES_MAX: usize = 64 * 1024;
    type Wire = wire::Order;

    fn signer(&self) -> PublicKey {
        self.user.0
    }

    fn to_wire(&self) -> wire::Order {
        let c = &self.constraints;
        let kind = match &self.work {
            Work::Noop { millis_per_item } => wire::work::Kind::Noop(wire::Noop {
                millis_per_item: *millis_per_item,
            }),
            Work::Embed { model, model_name } => wire::work::Kind::Embed(wire::Embed {
                model: Some((*model).into()),
                model_name: model_name.clone(),
            }),
            Work::Generate(g) => wire::work::Kind::Generate(wire::Generate {
                model: Some(g.model.into()),
                model_name: g.model_name.clone(),
                max_tokens: g.max_tokens,
                temperature_milli: g.temperature_milli,
                top_k: g.top_k,
                top_p_milli: g.top_p_milli,
                seed: g.seed,
                raw: g.raw,
                system: g.system.clone(),
            }),
        };
        let names = |list: &[Institution]| list.iter().map(ToString::to_string).collect();
        let codes = |list: &[Country]| list.iter().map(ToString::to_string).collect();
        wire::Order {
            user: self.user.0.0.to_vec(),
            institution: self.institution.to_string(),
            scheduler: self.scheduler.0.0.to_vec(),
            work: Some(wire::Work { kind: Some(kind) }),
            input: Some(self.input.into()),
            items: self.items,
            items_per_part: self.items_per_part,
            constraints: Some(wire::Constraints {
                countries: codes(&c.countries),
                countries_excluded: codes(&c.countries_excluded),
                institutions: names(&c.institutions),
                institutions_excluded: names(&c.institutions_excluded),
                device: c.device.clone(),
                memory_bytes: c.memory.0,
                donated_only: c.donated_only,
                rate_max: c.rate_max.map(|r| r.0),
            }),
            credits_max: self.credits_max.0,
            attempts_max: self.attempts_max,
            nonce: self.nonce,
            issued_at: self.issued_at.0,
            expires_at: self.expires_at.0,
        }
    }

    fn from_wire(w: wire::Order) -> Result<Self, RecordError> {
        let f = Fields(Self::TYPE);
        let model = |field, m: Option<wire::ArtifactRef>| f.artifact(field, f.some(field, m)?);
        let work = match f.some("work", w.work.and_then(|w| w.kind))? {
            wire::work::Kind::Noop(n) => Work::Noop {
                millis_per_item: f.within("noop.millis_per_item", n.millis_per_item.into(), 3_600_000)?
                    as u32,
            },
            wire::work::Kind::Embed(e) => Work::Embed {
                model: model("embed.model", e.model)?,
                model_name: f.text("embed.model_name", e.model_name, 128)?,
            },
            wire::work::Kind::Generate(g) => Work::Generate(Generate {
                model: model("generate.model", g.model)?,
                model_name: f.text("generate.model_name", g.model_name, 128)?,
                max_tokens: f.within("generate.max_tokens", g.max_tokens.into(), 131_072)? as u32,
                temperature_milli: f.within(
                    "generate.temperature_milli",
                    g.temperature_milli.into(),
                    5_000,
                )? as u32,
                top_k: g.top_k,
                top_p_milli: f.within("generate.top_p_milli", g.top_p_milli.into(), 1_000)? as u32,
                seed: g.seed,
                raw: g.raw,
                // A system prompt may hold line breaks, so only its length is limited.
                system: if g.system.len() <= 32_768 {
                    g.system
                } else {
                    return Err(f.bad("generate.system", "is over 32768 bytes"));
                },
            }),
        };
        let c = w.constraints.unwrap_or_default();
        let codes = |field, list: Vec<String>| f.list(field, list, 256, |t| f.parse(field, &t));
        let names = |field, list: Vec<String>| f.list(field, list, 256, |t| f.parse(field, &t));
        let items = f.within("items", w.items, ITEMS_MAX)?;
        if items == 0 {
            return Err(f.bad("items", "is 0: the input has no lines"));
        }
        if w.items_per_part > 0 && items.div_ceil(w.items_per_part.into()) > PARTS_MAX {
            return Err(f.bad(
                "items_per_part",
                format!("cuts the job into more than {PARTS_MAX} parts"),
            ));
        }
        let attempts_max = f.within("attempts_max", w.attempts_max.into(), 100)? as u32;
        Ok(Self {
            user: UserId(f.key("user", &w.user)?),
            institution: f.parse("institution", &w.institution)?,
            scheduler: SchedulerId(f.key("scheduler", &w.scheduler)?),
            work,
            input: f.artifact("input", f.some("input", w.input)?)?,
            items,
            items_per_part: w.items_per_part,
            constraints: Constraints {
                countries: codes("constraints.countries", c.countries)?,
                countries_excluded: codes("constraints.countries_excluded", c.countries_excluded)?,
                institutions: names("constraints.institutions", c.institutions)?,
                institutions_excluded: names("constraints.institutions_excluded", c.institutions_excluded)?,
                device: f.text("constraints.device", c.device, 64)?,
                memory: Bytes(c.memory_bytes),
                donated_only: c.donated_only,
                rate_max: c.rate_max.map(Rate),
            },
            credits_max: Credits(f.within("credits_max", w.credits_max, i64::MAX as u64)?),
            attempts_max: attempts_max.max(1),
            nonce: w.nonce,
            issued_at: UtcMillis(f.within("issued_at", w.issued_at, UTC_MAX)?),
            expires_at: UtcMillis(f.within("expires_at", w.expires_at, UTC_MAX)?),
        })
    }
}
