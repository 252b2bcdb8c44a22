//! An order: what a researcher wants done, on what, within which limits.
use super::{
    envelope::{Record, RecordError},
    offer::{DataClass, LICENCE_BYTES_MAX, Tier, WorkKind},
    wire::{Fields, UTC_MAX},
};
use crate::{
    artifact::ArtifactRef,
    id::{Country, Institution},
    key::{PublicKey, SchedulerId, UserId},
    prelude::*,
    unit::{Bytes, Credits, Portion, Rate, UtcMillis, WHOLE},
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
    /// Thousandths of the likeliest token's probability that a candidate must have; 0: no limit.
    pub min_p_milli: u32,
    /// Thousandths; 0 or 1000: none. Up to 10,000.
    pub repetition_penalty_milli: u32,
    /// Thousandths, -2000 to 2000.
    pub presence_penalty_milli: i32,
    /// Thousandths, -2000 to 2000.
    pub frequency_penalty_milli: i32,
    /// Texts that end an answer; at most [`STOPS_MAX`] of [`STOP_BYTES_MAX`] bytes.
    pub stop: Vec<String>,
    /// Tell each token's log-probability, and those of so many likeliest tokens.
    pub top_logprobs: Option<u32>,
    /// OpenAI's `response_format` as JSON; empty for any text. At most [`FORMAT_BYTES_MAX`].
    pub response_format: String,
    /// A LoRA adapter (GGUF) over the model.
    pub adapter: Option<ArtifactRef>,
    /// Pieces of answers are told as they are written.
    pub stream: bool,
    /// A line at fault is answered with its error, and the others go on; otherwise it fails the job.
    pub keep_going: bool,
}

/// Stop strings at most.
pub const STOPS_MAX: usize = 16;
/// Bytes of one stop string at most.
pub const STOP_BYTES_MAX: usize = 1024;
/// Bytes of a response format at most.
pub const FORMAT_BYTES_MAX: usize = 32_768;

impl Generate {
    /// The likeliest continuation of each prompt, put through the model's chat template.
    pub fn greedy(model: ArtifactRef, model_name: impl Into<String>, max_tokens: u32) -> Self {
        Self {
            model,
            model_name: model_name.into(),
            max_tokens,
            temperature_milli: 0,
            top_k: 0,
            top_p_milli: 1000,
            seed: 0,
            raw: false,
            system: String::new(),
            min_p_milli: 0,
            repetition_penalty_milli: 1000,
            presence_penalty_milli: 0,
            frequency_penalty_milli: 0,
            stop: Vec::new(),
            top_logprobs: None,
            response_format: String::new(),
            adapter: None,
            stream: false,
            keep_going: false,
        }
    }

    fn from_wire(f: Fields, g: wire::Generate) -> Result<Self, RecordError> {
        // Texts that may hold line breaks: only their length is limited.
        let long = |field, text: String, max: usize| {
            if text.len() <= max {
                Ok(text)
            } else {
                Err(f.bad(field, format!("is {} bytes, the limit is {max}", text.len())))
            }
        };
        let up_to = |field, value: u32, max: u32| f.within(field, value.into(), max.into()).map(|_| value);
        let around_zero =
            |field, value: i32| f.within(field, value.unsigned_abs().into(), 2_000).map(|_| value);
        Ok(Self {
            model: f.model("generate.model", f.some("generate.model", g.model)?)?,
            model_name: f.text("generate.model_name", g.model_name, 128)?,
            max_tokens: up_to("generate.max_tokens", g.max_tokens, 131_072)?,
            temperature_milli: up_to("generate.temperature_milli", g.temperature_milli, 5_000)?,
            top_k: g.top_k,
            top_p_milli: up_to("generate.top_p_milli", g.top_p_milli, 1_000)?,
            seed: g.seed,
            raw: g.raw,
            system: long("generate.system", g.system, 32_768)?,
            min_p_milli: up_to("generate.min_p_milli", g.min_p_milli, 1_000)?,
            repetition_penalty_milli: up_to(
                "generate.repetition_penalty_milli",
                g.repetition_penalty_milli,
                10_000,
            )?,
            presence_penalty_milli: around_zero("generate.presence_penalty_milli", g.presence_penalty_milli)?,
            frequency_penalty_milli: around_zero(
                "generate.frequency_penalty_milli",
                g.frequency_penalty_milli,
            )?,
            stop: f.list("generate.stop", g.stop, STOPS_MAX, |text| {
                long("generate.stop", text, STOP_BYTES_MAX)
            })?,
            top_logprobs: g
                .top_logprobs
                .map(|n| up_to("generate.top_logprobs", n, 20))
                .transpose()?,
            response_format: long("generate.response_format", g.response_format, FORMAT_BYTES_MAX)?,
            adapter: g.adapter.map(|a| f.artifact("generate.adapter", a)).transpose()?,
            stream: g.stream,
            keep_going: g.keep_going,
        })
    }

    fn to_wire(&self) -> wire::Generate {
        wire::Generate {
            model: Some(self.model.into()),
            model_name: self.model_name.clone(),
            max_tokens: self.max_tokens,
            temperature_milli: self.temperature_milli,
            top_k: self.top_k,
            top_p_milli: self.top_p_milli,
            seed: self.seed,
            raw: self.raw,
            system: self.system.clone(),
            min_p_milli: self.min_p_milli,
            repetition_penalty_milli: self.repetition_penalty_milli,
            presence_penalty_milli: self.presence_penalty_milli,
            frequency_penalty_milli: self.frequency_penalty_milli,
            stop: self.stop.clone(),
            top_logprobs: self.top_logprobs,
            response_format: self.response_format.clone(),
            adapter: self.adapter.map(Into::into),
            stream: self.stream,
            keep_going: self.keep_going,
        }
    }
}

/// How to fine-tune. Items are steps; parts are done one after the other, and each result is the checkpoint that the
/// next part begins with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Train {
    /// A Hugging Face directory.
    pub model: ArtifactRef,
    /// What the user called it.
    pub model_name: String,
    /// The trainer's settings as canonical JSON; at most [`SETTINGS_BYTES_MAX`].
    pub settings: String,
    /// The language of lines that name none; empty when unknown.
    pub language: String,
    /// Tokens of one step, about: for estimates.
    pub tokens_per_step: u32,
}

/// Bytes of a trainer's settings at most.
pub const SETTINGS_BYTES_MAX: usize = 16 * 1024;

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
    /// Train an adapter on the input.
    Train(Train),
}

impl Work {
    /// Whether each part begins with what the one before it left.
    pub fn in_sequence(&self) -> bool {
        matches!(self, Self::Train(_))
    }

    /// Which kind of engine it needs.
    pub fn kind(&self) -> WorkKind {
        match self {
            Self::Noop { .. } => WorkKind::Noop,
            Self::Embed { .. } => WorkKind::Embed,
            Self::Generate(_) => WorkKind::Generate,
            Self::Train(_) => WorkKind::Train,
        }
    }
    /// The model it needs.
    pub fn model(&self) -> Option<&ArtifactRef> {
        match self {
            Self::Noop { .. } => None,
            Self::Embed { model, .. } => Some(model),
            Self::Generate(g) => Some(&g.model),
            Self::Train(t) => Some(&t.model),
        }
    }
    /// Every artifact to be fetched for it besides its input: the model, unless a provider's server has it, and what
    /// goes over it.
    pub fn artifacts(&self) -> impl Iterator<Item = ArtifactRef> + '_ {
        let adapter = match self {
            Self::Generate(g) => g.adapter,
            _ => None,
        };
        let all = self.model().copied().into_iter().chain(adapter);
        all.filter(ArtifactRef::is_content)
    }
    /// Whether a provider's own server is to do it.
    pub fn is_served(&self) -> bool {
        self.model().is_some_and(|model| !model.is_content())
    }
    /// What the user called the model; empty without one.
    pub fn model_name(&self) -> &str {
        match self {
            Self::Noop { .. } => "",
            Self::Embed { model_name, .. } => model_name,
            Self::Generate(g) => &g.model_name,
            Self::Train(t) => &t.model_name,
        }
    }
}

/// The most devices of one node that a part may take.
pub const DEVICES_MAX: u32 = 64;

/// Masks: a node passes all of them or is excluded, empty lists exclude nobody. And when, and how much at once.
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
    /// Memory one device must have; of a share, the share's own.
    pub memory: Bytes,
    /// Only capacity at price zero.
    pub donated_only: bool,
    /// No device dearer than this.
    pub rate_max: Option<Rate>,
    /// Workers are cut off at least so far.
    #[serde(default)]
    pub isolation: Tier,
    /// Licence of the model, by its SPDX name; empty when unknown.
    #[serde(default)]
    pub licence: String,
    /// How carefully the input must be handled.
    #[serde(default)]
    pub data: DataClass,
    /// Devices of one node that each part takes, up to [`DEVICES_MAX`]; 0 for one.
    #[serde(default)]
    pub devices: u32,
    /// Instead of whole devices: so many thousandths of one, of its memory too. Only where its owner lends shares.
    #[serde(default)]
    pub share_milli: u32,
    /// When the job should be done. Missing it fails nothing; placement does what it can.
    #[serde(default)]
    pub deadline: Option<UtcMillis>,
    /// All parts run at the same time, inside one site: one institution's machines in one country.
    #[serde(default)]
    pub together: bool,
}

impl Constraints {
    /// Anywhere, one device, at any time.
    pub const ANY: Self = Self {
        countries: Vec::new(),
        countries_excluded: Vec::new(),
        institutions: Vec::new(),
        institutions_excluded: Vec::new(),
        device: String::new(),
        memory: Bytes::ZERO,
        donated_only: false,
        rate_max: None,
        isolation: Tier::None,
        licence: String::new(),
        data: DataClass::Public,
        devices: 0,
        share_milli: 0,
        deadline: None,
        together: false,
    };

    /// What each part takes of one node's devices.
    pub fn devices(&self) -> Portion {
        Portion::share(self.share_milli).unwrap_or(Portion::devices(self.devices))
    }
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
            Work::Generate(g) => wire::work::Kind::Generate(g.to_wire()),
            Work::Train(t) => wire::work::Kind::Train(wire::Train {
                model: Some(t.model.into()),
                model_name: t.model_name.clone(),
                settings: t.settings.clone(),
                language: t.language.clone(),
                tokens_per_step: t.tokens_per_step,
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
                isolation: match c.isolation {
                    Tier::None => String::new(),
                    tier => tier.as_str().into(),
                },
                licence: c.licence.clone(),
                data_class: match c.data {
                    DataClass::Public => String::new(),
                    class => class.as_str().into(),
                },
                devices: c.devices,
                share_milli: c.share_milli,
                deadline: c.deadline.map(|at| at.0),
                together: c.together,
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
                model: f.model("embed.model", f.some("embed.model", e.model)?)?,
                model_name: f.text("embed.model_name", e.model_name, 128)?,
            },
            wire::work::Kind::Generate(g) => Work::Generate(Generate::from_wire(f, g)?),
            wire::work::Kind::Train(t) => Work::Train(Train {
                model: model("train.model", t.model)?,
                model_name: f.text("train.model_name", t.model_name, 128)?,
                settings: f.text("train.settings", t.settings, SETTINGS_BYTES_MAX)?,
                language: f.text("train.language", t.language, 35)?,
                tokens_per_step: t.tokens_per_step,
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
                isolation: match c.isolation.as_str() {
                    "" => Tier::None,
                    tier => f.parse("constraints.isolation", tier)?,
                },
                licence: f.text("constraints.licence", c.licence, LICENCE_BYTES_MAX)?,
                data: match c.data_class.as_str() {
                    "" => DataClass::Public,
                    class => f.parse("constraints.data_class", class)?,
                },
                devices: f.within("constraints.devices", c.devices.into(), DEVICES_MAX.into())? as u32,
                share_milli: f.within(
                    "constraints.share_milli",
                    c.share_milli.into(),
                    u64::from(WHOLE) - 1,
                )? as u32,
                deadline: c
                    .deadline
                    .map(|at| f.within("constraints.deadline", at, UTC_MAX).map(UtcMillis))
                    .transpose()?,
                together: c.together,
            },
            credits_max: Credits(f.within("credits_max", w.credits_max, i64::MAX as u64)?),
            attempts_max: attempts_max.max(1),
            nonce: w.nonce,
            issued_at: UtcMillis(f.within("issued_at", w.issued_at, UTC_MAX)?),
            expires_at: UtcMillis(f.within("expires_at", w.expires_at, UTC_MAX)?),
        })
    }
}
