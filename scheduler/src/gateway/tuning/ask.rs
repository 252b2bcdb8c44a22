//! What a request for fine-tuning asks for, in the trainer's words: OpenAI's three hyper-parameters, and under
//! `karez.settings` all of the trainer's own.
use crate::gateway::{ask, error::ApiError};
use serde_json::{Map, Value, json};

type Fields = Map<String, Value>;

/// Rows of one step at most.
const BATCH_MAX: u64 = 1024;
/// Rows worked on at once; more of a step come one after the other.
const AT_ONCE: u64 = 4;
/// The rate that a multiplier multiplies: the trainer's own.
const RATE: f64 = 2e-4;
const MULTIPLIER_MAX: f64 = 1000.0;
/// Letters of a suffix at most, as OpenAI has it.
const SUFFIX_MAX: usize = 64;

/// A request, read.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Wanted {
    pub(super) model: String,
    pub(super) file: String,
    /// Under the trainer's names.
    pub(super) settings: Fields,
    pub(super) language: String,
    pub(super) suffix: Option<String>,
    pub(super) metadata: Option<Value>,
    pub(super) seed: u64,
    /// As they were given, for showing.
    pub(super) batch_size: Value,
    pub(super) multiplier: Value,
    /// Where the hyper-parameters stood.
    at: &'static str,
    /// Names that `karez.settings` gave.
    own: Vec<String>,
}

pub(super) fn read(body: &Fields) -> Result<Wanted, ApiError> {
    let required = |name: &str, why: &str| {
        ask::text(body, name)?
            .map(str::to_owned)
            .ok_or_else(|| ApiError::param(name, why))
    };
    let model = required("model", "is missing: name a base model of GET /v1/models")?;
    let file = required(
        "training_file",
        "is missing: send the id of a file of POST /v1/files",
    )?;
    if ask::some(body, "validation_file").is_some() {
        let why =
            "is not taken: a share of training_file is held out, karez.settings.val_set_size says how much";
        return Err(ApiError::param("validation_file", why));
    }
    match ask::some(body, "integrations") {
        None => {}
        Some(Value::Array(list)) if list.is_empty() => {}
        Some(_) => return Err(ApiError::param("integrations", "are not offered: leave them out")),
    }
    let (hyper, at) = hyperparameters(body)?;
    let mut settings = Fields::new();
    let inside = |error: ApiError| error.inside(at);
    if let Some(epochs) = number(&hyper, "n_epochs", 1, 10_000).map_err(inside)? {
        settings.insert("num_epochs".into(), epochs.into());
    }
    let batch = number(&hyper, "batch_size", 1, BATCH_MAX).map_err(inside)?;
    if let Some(rows) = batch {
        let at_once = (1..=AT_ONCE).rev().find(|n| rows % n == 0).unwrap_or(1);
        settings.insert("micro_batch_size".into(), at_once.into());
        settings.insert("gradient_accumulation_steps".into(), (rows / at_once).into());
        // So that a step has as many examples as were asked for.
        settings.insert("sample_packing".into(), false.into());
    }
    let multiplier = match given(&hyper, "learning_rate_multiplier") {
        None => None,
        Some(value) => match value.as_f64() {
            Some(n) if n > 0.0 && n <= MULTIPLIER_MAX => Some(n),
            _ => {
                let why = format!("is {value}: \"auto\" or a number above 0, up to {MULTIPLIER_MAX}");
                return Err(inside(ApiError::param("learning_rate_multiplier", why)));
            }
        },
    };
    if let Some(multiplier) = multiplier {
        settings.insert("learning_rate".into(), json!(RATE * multiplier));
    }
    let seed = match ask::whole(body, "seed", 0, i64::MAX.unsigned_abs())? {
        Some(seed) => seed,
        None => {
            let drawn = getrandom::u32();
            u64::from(drawn.map_err(|e| ApiError::server(format!("the system has no randomness: {e}")))?)
        }
    };
    settings.insert("seed".into(), seed.into());
    let (mut own, mut language) = (Vec::new(), String::new());
    // That it is an object is found out where wishes are read.
    if let Some(Value::Object(karez)) = ask::some(body, "karez") {
        language = ask::text(karez, "language")
            .map_err(|e| e.inside("karez"))?
            .unwrap_or_default()
            .to_owned();
        match ask::some(karez, "settings") {
            None => {}
            Some(Value::Object(given)) => {
                for (name, value) in given {
                    own.push(name.clone());
                    settings.insert(name.clone(), value.clone());
                }
            }
            Some(_) => return Err(ApiError::param("karez.settings", "must be an object")),
        }
    }
    let suffix = ask::text(body, "suffix")?.filter(|suffix| !suffix.is_empty());
    if suffix.is_some_and(|suffix| suffix.chars().count() > SUFFIX_MAX) {
        let why = format!("is longer than {SUFFIX_MAX} letters");
        return Err(ApiError::param("suffix", why));
    }
    let metadata = ask::some(body, "metadata").cloned();
    if metadata.as_ref().is_some_and(|m| m.to_string().len() > 16 << 10) {
        return Err(ApiError::param("metadata", "is longer than 16 KiB"));
    }
    Ok(Wanted {
        model,
        file,
        settings,
        language,
        suffix: suffix.map(str::to_owned),
        metadata,
        seed,
        batch_size: batch.map_or_else(|| "auto".into(), Value::from),
        multiplier: multiplier.map_or_else(|| "auto".into(), Value::from),
        at,
        own,
    })
}

/// The hyper-parameters, and where they stood: today under the method, before on their own.
fn hyperparameters(body: &Fields) -> Result<(Fields, &'static str), ApiError> {
    const METHOD: &str = "method.supervised.hyperparameters";
    let object = |value: Option<&Value>, at: &str| match value {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Object(map)) => Ok(Some(map.clone())),
        Some(_) => Err(ApiError::param(at, "must be an object")),
    };
    let method = object(body.get("method"), "method")?.unwrap_or_default();
    match ask::text(&method, "type").map_err(|e| e.inside("method"))? {
        None | Some("supervised") => {}
        Some(other) => {
            let why = format!("is {other:?}: supervised is the one that is offered");
            return Err(ApiError::param("method.type", why));
        }
    }
    let supervised = object(method.get("supervised"), "method.supervised")?.unwrap_or_default();
    if let Some(hyper) = object(supervised.get("hyperparameters"), METHOD)? {
        return Ok((hyper, METHOD));
    }
    let hyper = object(body.get("hyperparameters"), "hyperparameters")?;
    Ok((hyper.unwrap_or_default(), "hyperparameters"))
}

/// The field, unless it is left to us.
fn given<'a>(fields: &'a Fields, name: &str) -> Option<&'a Value> {
    ask::some(fields, name).filter(|value| *value != "auto")
}

fn number(fields: &Fields, name: &str, least: u64, most: u64) -> Result<Option<u64>, ApiError> {
    match given(fields, name) {
        None => Ok(None),
        Some(value) => match value.as_u64() {
            Some(n) if (least..=most).contains(&n) => Ok(Some(n)),
            _ => {
                let why = format!("is {value}: \"auto\" or a whole number from {least} to {most}");
                Err(ApiError::param(name, why))
            }
        },
    }
}

impl Wanted {
    /// The field of the request that a setting of the trainer's came from.
    pub(super) fn field(&self, setting: &str) -> String {
        let at = self.at;
        match setting {
            _ if self.own.iter().any(|own| own == setting) => format!("karez.settings.{setting}"),
            "num_epochs" => format!("{at}.n_epochs"),
            "learning_rate" => format!("{at}.learning_rate_multiplier"),
            "micro_batch_size" | "gradient_accumulation_steps" => format!("{at}.batch_size"),
            "seed" => "seed".into(),
            "lang" => "karez.language".into(),
            other => format!("karez.settings.{other}"),
        }
    }

    /// What the result is called: the base model, a plus sign, and a name of its own.
    pub(super) fn result_name(&self, id: &str) -> String {
        let tail = id.get(id.len().saturating_sub(8)..).unwrap_or(id);
        let letters = |c: char| match c {
            c if c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_') => c,
            _ => '-',
        };
        let suffix = self.suffix.iter();
        let suffix: String = suffix.flat_map(|s| s.chars().map(letters).chain(['-'])).collect();
        format!("{}+ft-{suffix}{tail}", self.model)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(mut value: Value) -> Fields {
        for (name, default) in [("model", "m"), ("training_file", "file-1")] {
            if value.get(name).is_none() {
                value[name] = default.into();
            }
        }
        match value {
            Value::Object(map) => map,
            _ => panic!("an object"),
        }
    }

    #[test]
    fn openai_s_three_become_the_trainer_s() {
        let hyper = json!({"n_epochs": 4, "batch_size": 6, "learning_rate_multiplier": 2});
        for body in [
            json!({"hyperparameters": hyper, "seed": 7}),
            json!({"method": {"type": "supervised", "supervised": {"hyperparameters": hyper}}, "seed": 7}),
        ] {
            let wanted = read(&fields(body)).unwrap();
            assert_eq!(
                Value::Object(wanted.settings.clone()),
                json!({
                    "num_epochs": 4, "micro_batch_size": 3, "gradient_accumulation_steps": 2,
                    "sample_packing": false, "learning_rate": 4e-4, "seed": 7,
                })
            );
            assert_eq!(wanted.multiplier, json!(2.0));
        }
        let auto = json!({"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"});
        let wanted = read(&fields(
            json!({"hyperparameters": auto, "karez": {"settings": {"lora_r": 4}}}),
        ))
        .unwrap();
        assert_eq!(wanted.settings.keys().collect::<Vec<_>>(), ["lora_r", "seed"]);
        assert_eq!(wanted.field("lora_r"), "karez.settings.lora_r");
        assert_eq!(wanted.field("num_epochs"), "hyperparameters.n_epochs");
    }

    #[test]
    fn a_wrong_field_is_named_where_it_stood() {
        let method = |hyper: Value| json!({"method": {"type": "supervised", "supervised": {"hyperparameters": hyper}}});
        for (body, param) in [
            (json!({"model": null}), "model"),
            (json!({"training_file": 7}), "training_file"),
            (json!({"validation_file": "file-2"}), "validation_file"),
            (
                json!({"hyperparameters": {"n_epochs": 0}}),
                "hyperparameters.n_epochs",
            ),
            (json!({"hyperparameters": 3}), "hyperparameters"),
            (
                method(json!({"batch_size": "many"})),
                "method.supervised.hyperparameters.batch_size",
            ),
            (
                method(json!({"learning_rate_multiplier": -1})),
                "method.supervised.hyperparameters.learning_rate_multiplier",
            ),
            (json!({"method": {"type": "dpo"}}), "method.type"),
            (json!({"suffix": "x".repeat(65)}), "suffix"),
            (json!({"seed": -1}), "seed"),
            (json!({"integrations": [{"type": "wandb"}]}), "integrations"),
            (json!({"karez": {"settings": []}}), "karez.settings"),
            (json!({"karez": {"language": 5}}), "karez.language"),
        ] {
            let error = read(&fields(body.clone())).unwrap_err();
            assert_eq!(error.json()["error"]["param"], param, "{body}");
        }
    }

    #[test]
    fn a_result_is_called_after_its_base_and_its_suffix() {
        let wanted = |suffix: &str| read(&fields(json!({"suffix": suffix}))).unwrap();
        assert_eq!(
            wanted("mkulima").result_name("ftjob-00aabbccdd"),
            "m+ft-mkulima-aabbccdd"
        );
        assert_eq!(wanted("a b/+").result_name("x"), "m+ft-a-b---x");
        assert_eq!(wanted("").result_name("x"), "m+ft-x");
    }
}
