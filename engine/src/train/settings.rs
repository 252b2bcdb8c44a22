//! What a researcher can set, under the names that Axolotl made common. Unknown names are refused, not ignored: a
//! misspelt learning rate must not cost a night.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::TrainError;

/// Bytes of settings at most, as JSON or YAML.
pub const SETTINGS_MAX: usize = 16 * 1024;

/// How the learning rate moves after warming up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scheduler {
    /// Along half a cosine to `cosine_min_lr_ratio` of the peak.
    Cosine,
    /// In a straight line to zero.
    Linear,
    /// Not at all.
    Constant,
}

/// What to do with an example longer than `sequence_len`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ExcessLength {
    /// Say so, and do not begin.
    Raise,
    /// Leave it out.
    Drop,
    /// Cut its end off.
    Truncate,
}

/// All of them, with their defaults.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Only `lora`.
    pub adapter: String,
    /// Width of the bottleneck.
    pub lora_r: usize,
    /// The adapter's result is multiplied by `lora_alpha / lora_r`.
    pub lora_alpha: f64,
    /// Share of what enters an adapter that a training step leaves out.
    pub lora_dropout: f64,
    /// Adapt every matrix of every layer; the default when `lora_target_modules` is empty.
    pub lora_target_linear: bool,
    /// Names of the matrices to adapt: `q_proj`, `down_proj` …
    pub lora_target_modules: Vec<String>,
    /// Tokens of one row at most.
    pub sequence_len: usize,
    /// Put several examples in one row. They do not see each other.
    pub sample_packing: bool,
    /// What to do with longer examples.
    pub excess_length_strategy: ExcessLength,
    /// Learn questions too, not only answers.
    pub train_on_inputs: bool,
    /// Rows worked on at once.
    pub micro_batch_size: usize,
    /// Such batches that make one step.
    pub gradient_accumulation_steps: usize,
    /// Times the data is gone through.
    pub num_epochs: usize,
    /// Steps at most; 0 for as many as the epochs have.
    pub max_steps: usize,
    /// Its peak.
    pub learning_rate: f64,
    /// How it falls.
    pub lr_scheduler: Scheduler,
    /// Steps to the peak; `warmup_ratio` decides when 0.
    pub warmup_steps: usize,
    /// Share of all steps that lead to the peak.
    pub warmup_ratio: f64,
    /// Where a cosine ends, as a share of the peak.
    pub cosine_min_lr_ratio: f64,
    /// Only `adamw_torch`, `adamw_torch_fused` and `adamw`, which are the same here.
    pub optimizer: String,
    /// Fraction of a weight taken away per step and unit of rate.
    pub weight_decay: f64,
    /// Decay of the mean of gradients.
    pub adam_beta1: f64,
    /// Decay of the mean of squared gradients.
    pub adam_beta2: f64,
    /// Keeps the division finite.
    pub adam_epsilon: f64,
    /// Longest gradient.
    pub max_grad_norm: f64,
    /// Hold the base model's matrices as bf16; arithmetic stays f32.
    pub bf16: bool,
    /// Work activations out again on the way back instead of keeping them.
    pub gradient_checkpointing: bool,
    /// Held out of the data: a share below 1, or a number of examples; of every language.
    pub val_set_size: f64,
    /// Steps between two looks at what was held out; 0 for the beginning and the end only.
    pub eval_steps: usize,
    /// Looks without improvement after which training ends; 0 for never.
    pub early_stopping_patience: usize,
    /// Steps between two checkpoints; 0 leaves it to Karez.
    pub save_steps: usize,
    /// Of everything that is drawn.
    pub seed: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            adapter: "lora".into(),
            lora_r: 8,
            lora_alpha: 16.0,
            lora_dropout: 0.0,
            lora_target_linear: false,
            lora_target_modules: Vec::new(),
            sequence_len: 512,
            sample_packing: true,
            excess_length_strategy: ExcessLength::Raise,
            train_on_inputs: false,
            micro_batch_size: 2,
            gradient_accumulation_steps: 1,
            num_epochs: 3,
            max_steps: 0,
            learning_rate: 2e-4,
            lr_scheduler: Scheduler::Cosine,
            warmup_steps: 0,
            warmup_ratio: 0.03,
            cosine_min_lr_ratio: 0.0,
            optimizer: "adamw_torch".into(),
            weight_decay: 0.0,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            max_grad_norm: 1.0,
            bf16: false,
            gradient_checkpointing: false,
            val_set_size: 0.1,
            eval_steps: 0,
            early_stopping_patience: 0,
            save_steps: 0,
            seed: 42,
        }
    }
}

impl Settings {
    /// Reads settings from a JSON object, and checks them. A name that is not known is refused with its nearest kin.
    pub fn from_json(value: Value) -> Result<Self, TrainError> {
        let Value::Object(map) = value else {
            return Err(TrainError::Setting {
                name: "settings".into(),
                why: "must be names with values".into(),
            });
        };
        let known = Self::names();
        for name in map.keys() {
            if !known.contains(name) {
                return Err(TrainError::Setting {
                    name: name.clone(),
                    why: match nearest(name, known.iter().map(String::as_str)) {
                        Some(near) => format!("is not a setting; did you mean {near}?"),
                        None => "is not a setting".into(),
                    },
                });
            }
        }
        // One at a time, so that the error can name the setting that has the wrong kind of value.
        for (name, value) in &map {
            let alone = Value::Object(Map::from_iter([(name.clone(), value.clone())]));
            if let Err(error) = serde_json::from_value::<Self>(alone) {
                return Err(TrainError::Setting {
                    name: name.clone(),
                    why: format!("cannot be {:.60}: {error}", value.to_string()),
                });
            }
        }
        let settings: Self = serde_json::from_value(Value::Object(map)).map_err(TrainError::Json)?;
        settings.check()?;
        Ok(settings)
    }

    /// The names of all settings.
    pub fn names() -> Vec<String> {
        match serde_json::to_value(Self::default()) {
            Ok(Value::Object(map)) => map.keys().cloned().collect(),
            _ => Vec::new(),
        }
    }

    /// One text for equal settings, whatever order they came in.
    pub fn canonical(&self) -> String {
        serde_json::to_value(self).map_or_else(|_| String::new(), |value| value.to_string())
    }

    /// The matrices to adapt, by their short names.
    pub fn modules(&self) -> Vec<String> {
        if self.lora_target_modules.is_empty() || self.lora_target_linear {
            let short = |path: &&str| path.rsplit('.').next().unwrap_or(path).to_owned();
            super::llama::MODULES.iter().map(short).collect()
        } else {
            self.lora_target_modules.clone()
        }
    }

    /// Names the first setting that makes no sense.
    pub fn check(&self) -> Result<(), TrainError> {
        let no = |name: &str, why: String| {
            Err(TrainError::Setting {
                name: name.into(),
                why,
            })
        };
        let whole = [
            ("lora_r", self.lora_r, 1, 512),
            ("sequence_len", self.sequence_len, 8, super::llama::POSITIONS_MAX),
            ("micro_batch_size", self.micro_batch_size, 1, 1024),
            (
                "gradient_accumulation_steps",
                self.gradient_accumulation_steps,
                1,
                4096,
            ),
            ("num_epochs", self.num_epochs, 1, 10_000),
            ("max_steps", self.max_steps, 0, 10_000_000),
            ("warmup_steps", self.warmup_steps, 0, 10_000_000),
            ("eval_steps", self.eval_steps, 0, 10_000_000),
            ("early_stopping_patience", self.early_stopping_patience, 0, 10_000),
            ("save_steps", self.save_steps, 0, 10_000_000),
        ];
        for (name, value, least, most) in whole {
            if !(least..=most).contains(&value) {
                return no(name, format!("is {value}; {least} to {most} are possible"));
            }
        }
        let real = [
            ("lora_alpha", self.lora_alpha, 1e-6, 1e6),
            ("lora_dropout", self.lora_dropout, 0.0, 0.9),
            ("learning_rate", self.learning_rate, 1e-12, 10.0),
            ("warmup_ratio", self.warmup_ratio, 0.0, 1.0),
            ("cosine_min_lr_ratio", self.cosine_min_lr_ratio, 0.0, 1.0),
            ("weight_decay", self.weight_decay, 0.0, 1.0),
            ("adam_beta1", self.adam_beta1, 0.0, 0.999_999),
            ("adam_beta2", self.adam_beta2, 0.0, 0.999_999_9),
            ("adam_epsilon", self.adam_epsilon, 1e-16, 1e-2),
            ("max_grad_norm", self.max_grad_norm, 1e-6, 1e9),
            ("val_set_size", self.val_set_size, 0.0, 1e6),
        ];
        for (name, value, least, most) in real {
            if !(least..=most).contains(&value) {
                return no(name, format!("is {value}; {least} to {most} are possible"));
            }
        }
        if self.adapter != "lora" {
            return no(
                "adapter",
                format!("is {:?}; only \"lora\" is possible", self.adapter),
            );
        }
        if !["adamw_torch", "adamw_torch_fused", "adamw"].contains(&self.optimizer.as_str()) {
            return no(
                "optimizer",
                format!("is {:?}; only \"adamw_torch\" is possible", self.optimizer),
            );
        }
        if self.early_stopping_patience > 0 && (self.eval_steps == 0 || self.val_set_size == 0.0) {
            return no(
                "early_stopping_patience",
                "needs eval_steps and val_set_size above 0 to have something to look at".into(),
            );
        }
        if self.val_set_size >= 1.0 && self.val_set_size.fract() != 0.0 {
            return no(
                "val_set_size",
                format!("is {}; a number of examples is whole", self.val_set_size),
            );
        }
        let known: Vec<&str> = super::llama::MODULES
            .iter()
            .filter_map(|path| path.rsplit('.').next())
            .collect();
        if let Some(bad) = self
            .lora_target_modules
            .iter()
            .find(|name| !known.contains(&name.as_str()))
        {
            return no(
                "lora_target_modules",
                format!("names {bad:?}; possible are {}", known.join(", ")),
            );
        }
        Ok(())
    }

    /// The learning rate of a step, counted from 0.
    pub fn rate(&self, step: usize, total: usize) -> f64 {
        let warmup = match self.warmup_steps {
            0 => (self.warmup_ratio * total as f64).round() as usize,
            steps => steps,
        };
        let peak = self.learning_rate;
        if step < warmup {
            return peak * (step + 1) as f64 / warmup as f64;
        }
        let way = ((step - warmup) as f64 / total.saturating_sub(warmup).max(1) as f64).min(1.0);
        match self.lr_scheduler {
            Scheduler::Constant => peak,
            Scheduler::Linear => peak * (1.0 - way),
            Scheduler::Cosine => {
                let floor = peak * self.cosine_min_lr_ratio;
                floor + (peak - floor) * 0.5 * (1.0 + (std::f64::consts::PI * way).cos())
            }
        }
    }
}

/// The known name that a misspelt one is nearest to, if any is near.
fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let apart = |other: &str| {
        let (left, right): (Vec<char>, Vec<char>) =
            (name.chars().take(64).collect(), other.chars().collect());
        let mut row: Vec<usize> = (0..=right.len()).collect();
        for (i, a) in left.iter().enumerate() {
            let mut corner = row[0];
            row[0] = i + 1;
            for (j, b) in right.iter().enumerate() {
                let here = (corner + usize::from(a != b)).min(row[j] + 1).min(row[j + 1] + 1);
                corner = row[j + 1];
                row[j + 1] = here;
            }
        }
        row[right.len()]
    };
    known
        .map(|other| (apart(other), other))
        .min()
        .filter(|(apart, other)| *apart <= other.len() / 3)
        .map(|(_, other)| other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn bad_settings_are_refused_by_name() {
        for (given, says) in [
            (
                json!({"lerning_rate": 1e-4}),
                "lerning_rate is not a setting; did you mean learning_rate?",
            ),
            (json!({"galore": true}), "galore is not a setting"),
            (
                json!({"learning_rate": "fast"}),
                "learning_rate cannot be \"fast\"",
            ),
            (json!({"lora_r": 0}), "lora_r is 0; 1 to 512"),
            (json!({"lora_r": -1}), "lora_r"),
            (json!({"lora_dropout": 1}), "lora_dropout is 1; 0 to 0.9"),
            (json!({"adapter": "qlora"}), "adapter is \"qlora\""),
            (json!({"optimizer": "lion"}), "optimizer"),
            (
                json!({"lora_target_modules": ["c_attn"]}),
                "lora_target_modules names \"c_attn\"",
            ),
            (
                json!({"early_stopping_patience": 3}),
                "early_stopping_patience needs eval_steps",
            ),
            (json!({"val_set_size": 1.5}), "val_set_size is 1.5"),
            (json!({"lr_scheduler": "one_cycle"}), "lr_scheduler"),
            (json!([1]), "settings must be names with values"),
        ] {
            let error = Settings::from_json(given.clone()).unwrap_err().to_string();
            assert!(error.contains(says), "{given}: {error}");
        }
    }

    #[test]
    fn equal_settings_have_one_text() {
        let one = Settings::from_json(json!({"lora_r": 4, "seed": 7})).unwrap();
        let other = Settings::from_json(json!({"seed": 7, "lora_r": 4})).unwrap();
        assert_eq!(one.canonical(), other.canonical());
        let again = Settings::from_json(serde_json::from_str(&one.canonical()).unwrap()).unwrap();
        assert_eq!(again, one);
    }

    #[test]
    fn the_rate_rises_and_falls() {
        let settings = Settings {
            learning_rate: 1.0,
            warmup_steps: 4,
            ..Settings::default()
        };
        assert_eq!(settings.rate(0, 100), 0.25);
        assert_eq!(settings.rate(3, 100), 1.0);
        assert_eq!(settings.rate(4, 100), 1.0);
        assert!((settings.rate(52, 100) - 0.5).abs() < 1e-9);
        assert!(settings.rate(100, 100) < 1e-9);
    }
}
