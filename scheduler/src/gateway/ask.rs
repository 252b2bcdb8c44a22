//! What requests have in common: typed fields with their names in every error, and wishes where to run.
use super::{Caller, error::ApiError, tuning};
use crate::{catalogue::SERVED, mind::Shared};
use karez_core::{
    artifact::ArtifactRef,
    id::Institution,
    records::{Constraints, Generate},
    unit::{Credits, Rate},
};
use serde_json::{Map, Value};
use std::sync::Arc;

/// What is set aside for a request that names no ceiling of its own.
const COST_MAX: Credits = Credits::ONE;
/// Bytes of what one line of a job may hold.
pub(super) const LINE_MAX: usize = 1 << 20;

/// The format of models that write.
const GGUF: &str = "gguf";
/// Letters of a model's name that an order holds. Names in the catalogue, and those made of them, are ASCII.
const MODEL_NAME_MAX: usize = 128;

type Fields = Map<String, Value>;

/// The field, unless it is absent or null.
pub(super) fn some<'a>(body: &'a Fields, name: &str) -> Option<&'a Value> {
    body.get(name).filter(|value| !value.is_null())
}

pub(super) fn text<'a>(body: &'a Fields, name: &str) -> Result<Option<&'a str>, ApiError> {
    match some(body, name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(ApiError::param(name, "must be a string")),
    }
}

pub(super) fn flag(body: &Fields, name: &str) -> Result<bool, ApiError> {
    match some(body, name) {
        None => Ok(false),
        Some(Value::Bool(flag)) => Ok(*flag),
        Some(_) => Err(ApiError::param(name, "must be true or false")),
    }
}

pub(super) fn whole(body: &Fields, name: &str, least: u64, most: u64) -> Result<Option<u64>, ApiError> {
    match some(body, name) {
        None => Ok(None),
        Some(value) => match value.as_u64() {
            Some(n) if (least..=most).contains(&n) => Ok(Some(n)),
            _ => Err(ApiError::param(
                name,
                format!("is {value}: a whole number from {least} to {most} is allowed"),
            )),
        },
    }
}

fn number(body: &Fields, name: &str, least: f64, most: f64) -> Result<(), ApiError> {
    match some(body, name).map(|value| (value, value.as_f64())) {
        None => Ok(()),
        Some((_, Some(n))) if (least..=most).contains(&n) => Ok(()),
        Some((value, _)) => Err(ApiError::param(
            name,
            format!("is {value}: a number from {least} to {most} is allowed"),
        )),
    }
}

/// A model as it can be asked for.
#[derive(Debug, Clone)]
pub(super) struct Model {
    pub(super) name: String,
    artifact: ArtifactRef,
    /// Over it, and only it.
    adapter: Option<ArtifactRef>,
    format: String,
}

/// The model a request names.
pub(super) async fn model(shared: &Arc<Shared>, caller: &Caller, body: &Fields) -> Result<Model, ApiError> {
    let name = text(body, "model")?
        .ok_or_else(|| ApiError::param("model", "is missing: name one of GET /v1/models"))?;
    named(shared, caller, name).await
}

/// The model of that name: one that the scheduler knows, one that came of a fine-tuning job of the caller's, or
/// `base+adapter`, both known to the scheduler.
pub(super) async fn named(shared: &Arc<Shared>, caller: &Caller, name: &str) -> Result<Model, ApiError> {
    let made = |artifact, adapter, format: &str| Model {
        name: name.to_owned(),
        artifact,
        adapter,
        format: format.to_owned(),
    };
    if let Some(found) = shared.model(name).await {
        return Ok(made(found.artifact, None, &found.format));
    }
    if let Some((base, adapter)) = tuning::resolve(shared, caller, name).await? {
        return Ok(made(base, Some(adapter), GGUF));
    }
    let halves = name.rsplit_once('+').and_then(|(base, adapter)| {
        let known = |name| shared.catalogue.get(name);
        known(base).zip(known(adapter))
    });
    let (base, adapter) = halves.ok_or_else(|| ApiError::no_model(name))?;
    if adapter.format != GGUF {
        let why = format!(
            "has an adapter that is stored as {}: {GGUF} is needed",
            adapter.format
        );
        return Err(ApiError::param("model", why));
    }
    Ok(made(base.artifact, Some(adapter.artifact), &base.format))
}

impl Model {
    /// Writing with it, as likely as can be.
    pub(super) fn writes(&self, tokens_max: u32) -> Result<Generate, ApiError> {
        let Self { name, format, .. } = self;
        if !matches!(format.as_str(), "" | GGUF | SERVED) {
            let why = format!("{name:?} is stored as {format} and writes no text: choose one stored as gguf");
            return Err(ApiError::param("model", why));
        }
        let short: String = name.chars().take(MODEL_NAME_MAX).collect();
        Ok(Generate {
            adapter: self.adapter,
            ..Generate::greedy(self.artifact, short, tokens_max)
        })
    }

    /// The model for work that takes no adapter.
    pub(super) fn alone(&self) -> Result<ArtifactRef, ApiError> {
        match self.adapter {
            None => Ok(self.artifact),
            Some(_) => Err(ApiError::param(
                "model",
                "has an adapter over it, which writes text only",
            )),
        }
    }
}

/// How to sample, checked, as a line of a job's input says it. Fields unknown to it are left out.
pub(super) fn sampling(body: &Fields) -> Result<Fields, ApiError> {
    for (name, least, most) in [
        ("temperature", 0.0, 5.0),
        ("top_p", 0.0, 1.0),
        ("min_p", 0.0, 1.0),
        ("repetition_penalty", 0.0, 10.0),
        ("presence_penalty", -2.0, 2.0),
        ("frequency_penalty", -2.0, 2.0),
    ] {
        number(body, name, least, most)?;
    }
    whole(body, "max_tokens", 1, 131_072)?;
    whole(body, "max_completion_tokens", 1, 131_072)?;
    whole(body, "top_logprobs", 0, 20)?;
    whole(body, "top_k", 0, u64::from(u32::MAX))?;
    if whole(body, "n", 1, u64::MAX)?.is_some_and(|n| n != 1) {
        return Err(ApiError::param(
            "n",
            "is more than 1: ask as often as you want answers",
        ));
    }
    if let Some(seed) = some(body, "seed")
        && seed.as_i64().is_none()
    {
        return Err(ApiError::param("seed", "must be a whole number of 64 bits"));
    }
    match some(body, "stop") {
        None | Some(Value::String(_)) => {}
        Some(Value::Array(list)) if list.len() <= 16 && list.iter().all(Value::is_string) => {}
        Some(_) => return Err(ApiError::param("stop", "must be a string or up to 16 of them")),
    }
    match some(body, "logit_bias") {
        None => {}
        Some(Value::Object(map))
            if map.iter().all(|(k, v)| {
                k.parse::<u32>().is_ok() && v.as_f64().is_some_and(|b| (-100.0..=100.0).contains(&b))
            }) => {}
        Some(_) => {
            return Err(ApiError::param(
                "logit_bias",
                "must map token numbers to numbers from -100 to 100",
            ));
        }
    }
    if let Some(format) = some(body, "response_format") {
        let kind = format.get("type").and_then(Value::as_str);
        if !matches!(kind, Some("text" | "json_object" | "json_schema")) {
            let why = "must have the type text, json_object or json_schema";
            return Err(ApiError::param("response_format", why));
        }
    }
    let mut line = Fields::new();
    for name in [
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "seed",
        "stop",
        "logit_bias",
        "logprobs",
        "top_logprobs",
        "response_format",
        "max_tokens",
        "max_completion_tokens",
    ] {
        if let Some(value) = some(body, name) {
            line.insert(name.into(), value.clone());
        }
    }
    // OpenAI's default; Karez's own commands are greedy by default.
    line.entry("temperature").or_insert_with(|| 1.into());
    if !line.contains_key("seed") {
        // The same wherever the answer goes on, so that a move draws no other token.
        let seed =
            getrandom::u64().map_err(|e| ApiError::server(format!("the system has no randomness: {e}")))?;
        line.insert("seed".into(), (seed >> 1).into());
    }
    Ok(line)
}

/// Where a request may run and what it may cost.
#[derive(Debug, Clone, Default)]
pub(super) struct Wishes {
    pub(super) constraints: Constraints,
    /// Tried first; any other that is allowed when none of these ever could.
    pub(super) prefer: Vec<Institution>,
    pub(super) cost_max: Option<Credits>,
    pub(super) verification: Verification,
}

/// How an answer is checked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Verification {
    /// By its signatures and meters alone, as everything is.
    #[default]
    None,
    /// The question is asked again, with the same seed, at another institution, and the answers are compared.
    Repeat,
}

impl Wishes {
    /// Of the optional `karez` object of a request that is no question.
    pub(super) fn of(body: &Fields) -> Result<Self, ApiError> {
        let wishes = Self::of_question(body)?;
        match wishes.verification {
            Verification::None => Ok(wishes),
            Verification::Repeat => Err(ApiError::param(
                "karez.verification",
                "may be \"repeat\" where one answer is asked for: ask /v1/chat/completions, or /v1/completions with one prompt",
            )),
        }
    }

    /// Of the optional `karez` object of a request for one answer.
    pub(super) fn of_question(body: &Fields) -> Result<Self, ApiError> {
        let karez = match some(body, "karez") {
            None => return Ok(Self::default()),
            Some(Value::Object(karez)) => karez,
            Some(_) => return Err(ApiError::param("karez", "must be an object")),
        };
        let donated_only = match some(karez, "donated_only") {
            None => false,
            Some(Value::Bool(flag)) => *flag,
            Some(_) => return Err(ApiError::param("karez.donated_only", "must be true or false")),
        };
        let mut avoid = list(karez, "avoid")?;
        avoid.extend(list(karez, "exclude_institutions")?);
        Ok(Self {
            constraints: Constraints {
                countries: list(karez, "countries")?,
                countries_excluded: list(karez, "exclude_countries")?,
                institutions: list(karez, "institutions")?,
                institutions_excluded: avoid,
                device: match some(karez, "device") {
                    None => String::new(),
                    Some(Value::String(class)) if class.len() <= 64 => class.clone(),
                    Some(_) => {
                        return Err(ApiError::param(
                            "karez.device",
                            "must be a class like cuda or cpu",
                        ));
                    }
                },
                donated_only,
                rate_max: credits(karez, "max_price")?.map(|c| Rate(c.0)),
                ..Constraints::default()
            },
            prefer: list(karez, "prefer")?,
            cost_max: credits(karez, "max_cost")?,
            verification: match some(karez, "verification").map(Value::as_str) {
                None | Some(Some("none")) => Verification::None,
                Some(Some("repeat")) => Verification::Repeat,
                Some(_) => {
                    let why = "must be \"none\" or \"repeat\"";
                    return Err(ApiError::param("karez.verification", why));
                }
            },
        })
    }

    /// What to set aside, out of what there is.
    pub(super) fn ceiling(&self, budget: Credits) -> Result<Credits, ApiError> {
        match self.cost_max {
            Some(wanted) if wanted > budget => Err(ApiError::budget(format!(
                "karez.max_cost is {wanted}, this key has {budget} credits left: lower it, or make a key with more"
            ))),
            Some(wanted) => Ok(wanted),
            None => Ok(COST_MAX.min(budget)),
        }
    }
}

fn list<T: std::str::FromStr>(karez: &Fields, name: &str) -> Result<Vec<T>, ApiError>
where
    T::Err: std::fmt::Display,
{
    let param = || format!("karez.{name}");
    let items = match some(karez, name) {
        None => return Ok(Vec::new()),
        Some(Value::Array(items)) if items.len() <= 256 => items,
        Some(_) => return Err(ApiError::param(param(), "must be a list of at most 256 names")),
    };
    let read = |item: &Value| match item.as_str() {
        Some(text) => text
            .parse()
            .map_err(|e| ApiError::param(param(), format!("holds {text:?}: {e}"))),
        None => Err(ApiError::param(param(), "must hold strings only")),
    };
    items.iter().map(read).collect()
}

/// Credits as a number or as text.
fn credits(karez: &Fields, name: &str) -> Result<Option<Credits>, ApiError> {
    let text = match some(karez, name) {
        None => return Ok(None),
        Some(Value::String(text)) => text.clone(),
        Some(Value::Number(n)) => match n.as_f64() {
            Some(n) if (0.0..1e12).contains(&n) => format!("{n:.6}"),
            _ => String::new(),
        },
        Some(_) => String::new(),
    };
    match text.parse() {
        Ok(credits) => Ok(Some(credits)),
        Err(_) => Err(ApiError::param(
            format!("karez.{name}"),
            "must be credits, like 0.25",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn fields(value: Value) -> Fields {
        match value {
            Value::Object(map) => map,
            _ => panic!("an object"),
        }
    }

    #[test]
    fn a_wrong_field_is_named_and_unknown_ones_are_passed_over() {
        for (body, param) in [
            (json!({"temperature": "hot"}), "temperature"),
            (json!({"temperature": 9}), "temperature"),
            (json!({"max_tokens": 0}), "max_tokens"),
            (json!({"n": 2}), "n"),
            (json!({"seed": 0.5}), "seed"),
            (json!({"stop": [1]}), "stop"),
            (json!({"logit_bias": {"x": 1}}), "logit_bias"),
            (json!({"response_format": {"type": "poem"}}), "response_format"),
        ] {
            let error = sampling(&fields(body.clone())).unwrap_err();
            assert_eq!(error.json()["error"]["param"], param, "{body}");
        }
        let line = sampling(&fields(
            json!({"top_p": 0.5, "user": "x", "metadata": {}, "stop": null}),
        ))
        .unwrap();
        assert_eq!(line.get("top_p"), Some(&json!(0.5)));
        assert_eq!(line.get("temperature"), Some(&json!(1)));
        assert!(line.contains_key("seed") && !line.contains_key("user") && !line.contains_key("stop"));
    }

    #[test]
    fn wishes_become_masks_and_a_ceiling() {
        let wishes = Wishes::of(&fields(json!({"karez": {
            "countries": ["KE", "BR"], "avoid": ["coast-computing"], "prefer": ["lake-university"],
            "max_price": 0.3, "max_cost": "0.5", "donated_only": true, "unheard_of": 1,
        }})))
        .unwrap();
        assert_eq!(wishes.constraints.countries.len(), 2);
        assert_eq!(wishes.constraints.institutions_excluded.len(), 1);
        assert_eq!(wishes.constraints.rate_max, Some(Rate(300_000)));
        assert!(wishes.constraints.donated_only);
        assert_eq!(wishes.ceiling(Credits(700_000)).unwrap(), Credits(500_000));
        assert_eq!(wishes.ceiling(Credits(1)).unwrap_err().status(), 429);
        assert_eq!(Wishes::default().ceiling(Credits(1)).unwrap(), Credits(1));
        for (karez, param) in [
            (json!(3), "karez"),
            (json!({"countries": ["Kenya"]}), "karez.countries"),
            (json!({"max_price": "cheap"}), "karez.max_price"),
            (json!({"verification": "full"}), "karez.verification"),
        ] {
            let error = Wishes::of(&fields(json!({ "karez": karez }))).unwrap_err();
            assert_eq!(error.json()["error"]["param"], param);
        }
        // Only one answer can be asked for again.
        let again = fields(json!({"karez": {"verification": "repeat"}}));
        assert_eq!(
            Wishes::of_question(&again).unwrap().verification,
            Verification::Repeat
        );
        let error = Wishes::of(&again).unwrap_err();
        assert_eq!(error.json()["error"]["param"], "karez.verification");
    }
}
