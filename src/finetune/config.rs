//! Configurations in YAML, as Axolotl's users write them.
use crate::fault::{Kind, fault};
use anyhow::{Context as _, Result};
use serde_json::{Map, Value};
use std::{fs, path::Path};

/// Settings of Axolotl's that change nothing of what is learnt: where it reports to, how it computes the same.
const MEANINGLESS: [&str; 24] = [
    "base_model_ignore_patterns",
    "dataset_prepared_path",
    "dataset_processes",
    "ddp_timeout",
    "debug",
    "eager_attention",
    "eval_sample_packing",
    "eval_table_size",
    "flash_attention",
    "gradient_checkpointing_kwargs",
    "hub_model_id",
    "hub_strategy",
    "local_rank",
    "logging_steps",
    "model_type",
    "pad_to_sequence_len",
    "save_safetensors",
    "save_total_limit",
    "sdp_attention",
    "strict",
    "tf32",
    "tokenizer_type",
    "xformers_attention",
    "use_tensorboard",
];
/// The same, by how their names begin.
const MEANINGLESS_FAMILIES: [&str; 4] = ["wandb_", "mlflow_", "comet_", "use_wandb"];
/// Settings of Axolotl's that are not offered: they may stand in a file when they are off.
const OFF: [&str; 22] = [
    "adam_beta3",
    "chat_template_jinja",
    "deepspeed",
    "fp16",
    "fsdp",
    "fsdp_config",
    "group_by_length",
    "load_in_4bit",
    "load_in_8bit",
    "lora_fan_in_fan_out",
    "lora_model_dir",
    "lora_modules_to_save",
    "loraplus_lr_ratio",
    "neftune_noise_alpha",
    "peft_use_dora",
    "peft_use_rslora",
    "plugins",
    "relora",
    "resume_from_checkpoint",
    "special_tokens",
    "tokens",
    "trust_remote_code",
];

/// The settings of a file, and the names of those that were passed over.
pub(super) fn read(path: &Path) -> Result<(Map<String, Value>, Vec<String>)> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let wrong = |why: &str| fault(Kind::Usage, format!("{}: {why}", path.display()));
    if text.len() > karez_engine::train::settings::SETTINGS_MAX {
        return Err(wrong("is too long for a configuration"));
    }
    match serde_yaml_ng::from_str(&text) {
        Ok(Value::Object(mut map)) => {
            let passed: Vec<String> = map
                .iter()
                .filter(|(name, value)| is_passed_over(name, value))
                .map(|(name, _)| name.clone())
                .collect();
            passed.iter().for_each(|name| drop(map.remove(name)));
            Ok((map, passed))
        }
        Ok(_) => Err(wrong("is not a list of names with values")),
        Err(error) => Err(wrong(&error.to_string())),
    }
}

fn is_passed_over(name: &str, value: &Value) -> bool {
    let off = match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    };
    MEANINGLESS.contains(&name)
        || MEANINGLESS_FAMILIES.iter().any(|family| name.starts_with(family))
        || (off && OFF.contains(&name))
}

/// Axolotl takes a list of data sets; one is possible here.
pub(super) fn one_dataset(value: Value) -> Result<Value, &'static str> {
    let Value::Array(sets) = value else {
        return Err("datasets is not a list");
    };
    let [set] = sets.as_slice() else {
        return Err("datasets names not exactly one data set");
    };
    set.get("path").cloned().ok_or("datasets[0] has no path")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_changes_nothing_is_passed_over_and_what_would_is_not() {
        for (name, value, passed) in [
            ("load_in_4bit", json!(false), true),
            ("load_in_4bit", json!(true), false),
            ("special_tokens", json!(null), true),
            ("special_tokens", json!({"pad_token": "<pad>"}), false),
            ("wandb_project", json!("swahili"), true),
            ("flash_attention", json!(true), true),
            ("lerning_rate", json!(null), false),
            ("learning_rate", json!(null), false),
        ] {
            assert_eq!(is_passed_over(name, &value), passed, "{name}: {value}");
        }
    }
}
