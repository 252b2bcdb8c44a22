//! Model directories as they come, and adapters as others load them.

use candle_core::DType;
use serde_json::json;

use super::base::{BaseModel, Hold};
use super::data::Packed;
use super::fused::Fused;
use super::run_tests::{families, sequences, small, woken};
use super::*;

#[test]
fn broken_model_directories_are_refused_by_file_and_field() {
    let small = small("llama", json!({}));
    let folder = small.folder.path();
    let read = || {
        let early = base::check_weights(folder).unwrap_err().to_string();
        let late = BaseModel::read(folder, Hold::F32).unwrap_err().to_string();
        // Found before anything is sent, and again by whoever reads it.
        assert!(
            early.contains(
                late.rsplit(": ")
                    .next()
                    .unwrap()
                    .trim_start_matches("the checkpoint ")
            ),
            "{early} and {late}"
        );
        late
    };
    let whole = std::fs::read(folder.join("model.safetensors")).unwrap();
    std::fs::write(folder.join("model.safetensors"), &whole[..whole.len() - 40]).unwrap();
    assert!(
        read().contains("model.safetensors: ends before its last tensor"),
        "{}",
        read()
    );
    std::fs::write(folder.join("model.safetensors"), [0xff; 64]).unwrap();
    assert!(
        read().contains("model.safetensors: says its header is"),
        "{}",
        read()
    );
    let mut weights = small.weights.clone();
    let norm = weights.get_mut("model.norm.weight").unwrap();
    *norm = (norm.zeros_like().unwrap() / 0.0).unwrap();
    save(&weights, &folder.join("model.safetensors"), DType::BF16).unwrap();
    let error = base::check_numbers(folder).unwrap_err().to_string();
    assert!(
        error.contains("tensor model.norm.weight: holds numbers that are not finite"),
        "{error}"
    );
    assert_eq!(BaseModel::read(folder, Hold::F32).unwrap_err().to_string(), error);
    let mut weights = small.weights.clone();
    weights.remove("model.layers.1.mlp.up_proj.weight");
    save(&weights, &folder.join("model.safetensors"), DType::F32).unwrap();
    assert!(
        read().contains("no tensor model.layers.1.mlp.up_proj.weight"),
        "{}",
        read()
    );
    std::fs::write(
        folder.join("model.safetensors.index.json"),
        r#"{"weight_map": {"a": "../x"}}"#,
    )
    .unwrap();
    assert!(read().contains("names a shard outside its folder"), "{}", read());
    let mut config = serde_json::to_value(&small.config).unwrap();
    config["hidden_size"] = json!(0);
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    assert!(read().contains("config.json: hidden_size is 0"), "{}", read());
    std::fs::write(folder.join("config.json"), "{").unwrap();
    assert!(
        read().contains("config.json: is not what it should be"),
        "{}",
        read()
    );
}

#[test]
fn shards_are_read_as_one_model() {
    let small = small("llama", json!({}));
    let folder = small.folder.path();
    let mut map = serde_json::Map::new();
    for (index, part) in small.weights.iter().collect::<Vec<_>>().chunks(7).enumerate() {
        let name = format!("model-{index}.safetensors");
        let part: Weights = part
            .iter()
            .map(|(name, weight)| ((*name).clone(), (*weight).clone()))
            .collect();
        save(&part, &folder.join(&name), DType::BF16).unwrap();
        map.extend(part.keys().map(|tensor| (tensor.clone(), json!(name))));
    }
    std::fs::remove_file(folder.join("model.safetensors")).unwrap();
    std::fs::write(
        folder.join("model.safetensors.index.json"),
        json!({"weight_map": map}).to_string(),
    )
    .unwrap();
    let base = BaseModel::read(folder, Hold::Bf16).unwrap();
    assert_eq!(base.matrices.len() + base.vectors.len(), small.weights.len());
}

/// Loads base and adapter with transformers and peft and prints the largest difference of logits.
const PEER: &str = r#"
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, expected = sys.argv[1:4]
want = json.load(open(expected))
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
with torch.no_grad():
    got = model(input_ids=torch.tensor([want["ids"]])).logits[0]
print((got - torch.tensor(want["logits"])).abs().max().item(), got.abs().max().item())
"#;

#[test]
fn peft_loads_the_adapter_and_its_logits_agree() {
    let python = std::env::var("KAREZ_TEST_PYTHON").unwrap_or_else(|_| "python3".into());
    let found = std::process::Command::new(&python)
        .args(["-c", "import torch, transformers, peft"])
        .output();
    if !found.is_ok_and(|output| output.status.success()) {
        println!(
            "skipped: {python} cannot import torch, transformers and peft; KAREZ_TEST_PYTHON names another"
        );
        return;
    }
    for (name, small) in families() {
        let folder = small.folder.path();
        let mut config = serde_json::to_value(&small.config).unwrap();
        let class = match name {
            "qwen2" => "Qwen2ForCausalLM",
            "qwen3" => "Qwen3ForCausalLM",
            _ => "LlamaForCausalLM",
        };
        config["architectures"] = json!([class]);
        std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
        let settings = Settings {
            lora_r: 3,
            lora_alpha: 6.0,
            ..Settings::default()
        };
        let adapter = woken(&small.config, &settings.modules());
        let checkpoint = Checkpoint {
            state: checkpoint::State {
                settings: settings.canonical(),
                ..checkpoint::State::default()
            },
            values: adapter.values.clone(),
            mean: vec![0.0; adapter.values.len()],
            square: vec![0.0; adapter.values.len()],
            losses: Vec::new(),
        };
        let finished = results::Finished::read(folder, &checkpoint.encode(&adapter).unwrap()).unwrap();
        let out = tempfile::tempdir().unwrap();
        finished
            .write_peft(out.path(), &folder.display().to_string())
            .unwrap();
        let mut model = Fused::new(BaseModel::read(folder, Hold::F32).unwrap(), &adapter, 2, false).unwrap();
        let batch = Packed::new([&sequences()[1]]);
        let logits = model.logits(&adapter, &batch).unwrap();
        let rows: Vec<&[f32]> = logits.chunks(small.config.vocab_size).collect();
        let expected = out.path().join("expected.json");
        std::fs::write(&expected, json!({"ids": batch.ids, "logits": rows}).to_string()).unwrap();
        let output = std::process::Command::new(&python)
            .args(["-c", PEER])
            .args([folder, out.path(), &expected])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let numbers: Vec<f64> = text.split_whitespace().filter_map(|n| n.parse().ok()).collect();
        let [apart, largest] = numbers[..] else {
            panic!("{name}: {text} {}", String::from_utf8_lossy(&output.stderr));
        };
        println!("{name}: logits of up to {largest} agree to {apart}");
        assert!(apart < 1e-3, "{name}: logits are {apart} apart");
    }
}
