//! The fused model against candle's, and runs from end to end: learning, resuming, refusing.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use serde_json::{Value, json};

use super::adapter::Adapter;
use super::base::{BaseModel, Hold};
use super::checkpoint::{self, state_of, write_whole};
use super::data::{self, Packed};
use super::fused::Fused;
use super::trainer::{Outline, Spec, Step, outline};
use super::*;

/// A small model of a family, in a directory of its own.
struct Small {
    folder: tempfile::TempDir,
    config: Config,
    weights: Weights,
}

fn small(family: &str, more: Value) -> Small {
    let mut config = json!({
        "model_type": family, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 90,
        "max_position_embeddings": 200, "rms_norm_eps": 1e-5,
    });
    for (name, value) in more.as_object().unwrap() {
        config[name] = value.clone();
    }
    let config: Config = serde_json::from_value(config).unwrap();
    config.check().unwrap();
    let mut rng = Rng::new(11);
    let mut weights = initial(&config, &mut rng, &Device::Cpu).unwrap();
    // Norms of all ones would hide a norm that is left out.
    for (name, weight) in &mut weights {
        if name.ends_with("norm.weight") {
            let values: Vec<f32> = (0..weight.elem_count())
                .map(|_| 1.0 + 0.3 * rng.normal() as f32)
                .collect();
            *weight = candle_core::Tensor::from_vec(values, weight.shape(), &Device::Cpu).unwrap();
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let text = serde_json::to_string(&config).unwrap();
    std::fs::write(folder.path().join("config.json"), text).unwrap();
    save(&weights, &folder.path().join("model.safetensors"), DType::F32).unwrap();
    Small {
        folder,
        config,
        weights,
    }
}

fn families() -> Vec<(&'static str, Small)> {
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64});
    vec![
        ("llama", small("llama", json!({"tie_word_embeddings": true}))),
        (
            "llama 3",
            small("llama", json!({"rope_scaling": llama3, "rope_theta": 500.0})),
        ),
        ("qwen2", small("qwen2", json!({"num_key_value_heads": 1}))),
        ("qwen3", small("qwen3", json!({"head_dim": 16}))),
    ]
}

/// Sequences of several lengths, longer than a block of the attention among them.
fn sequences() -> Vec<data::Example> {
    let mut rng = Rng::new(5);
    [7, 100, 1, 33]
        .into_iter()
        .map(|length| data::Example {
            ids: (0..=length).map(|_| rng.below(90) as u32).collect(),
            learnt: (0..=length)
                .map(|position| position % 3 != 1 || length == 1)
                .collect(),
            bytes: length,
            language: 0,
        })
        .collect()
}

fn all_modules() -> Vec<String> {
    Settings::default().modules()
}

/// An adapter that is no longer silent.
fn woken(config: &Config, modules: &[String]) -> Adapter {
    let mut adapter = Adapter::new(config, modules, 3, 6.0, 1).unwrap();
    let mut rng = Rng::new(2);
    adapter
        .values
        .iter_mut()
        .for_each(|value| *value += 0.1 * rng.normal() as f32);
    adapter
}

/// Loss and gradients by candle, sequence by sequence.
fn by_candle(small: &Small, adapter: &Adapter, examples: &[data::Example]) -> (f64, Vec<f32>) {
    let mut model = Llama::new(&small.config, &small.weights).unwrap();
    let (mut vars, rank) = (Vec::new(), adapter.rank());
    for slot in adapter.slots() {
        let var = |values: &[f32], shape: (usize, usize)| {
            let tensor = candle_core::Tensor::from_slice(values, shape, &Device::Cpu).unwrap();
            candle_core::Var::from_tensor(&tensor).unwrap()
        };
        let a = var(adapter.a(slot), (rank, slot.columns));
        let b = var(adapter.b(slot), (slot.rows, rank));
        let low = LowRank {
            a: a.as_tensor().clone(),
            b: b.as_tensor().clone(),
            scale: adapter.scale().into(),
            thin: None,
        };
        model.adapt(&slot.path(), low).unwrap();
        vars.push((*slot, a, b));
    }
    let (mut nats, mut grads) = (0.0, vec![0f32; adapter.values.len()]);
    for example in examples {
        let packed = Packed::new([example]);
        let targets = &packed.targets;
        let batch = Batch {
            ids: candle_core::Tensor::from_slice(&packed.ids, (1, packed.ids.len()), &Device::Cpu).unwrap(),
            picks: candle_core::Tensor::from_vec(
                targets.iter().map(|t| t.0).collect::<Vec<_>>(),
                targets.len(),
                &Device::Cpu,
            )
            .unwrap(),
            targets: candle_core::Tensor::from_vec(
                targets.iter().map(|t| t.1).collect::<Vec<_>>(),
                targets.len(),
                &Device::Cpu,
            )
            .unwrap(),
            counts: vec![targets.len()],
        };
        let loss = (model.loss(&batch).unwrap() * targets.len() as f64).unwrap();
        nats += f64::from(loss.to_scalar::<f32>().unwrap());
        let store = loss.backward().unwrap();
        for (slot, a, b) in &vars {
            for (var, range) in [(a, slot.a_range(rank)), (b, slot.b_range(rank))] {
                let grad = store.get(var.as_tensor()).expect("a gradient");
                let grad = grad.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                grads[range]
                    .iter_mut()
                    .zip(grad)
                    .for_each(|(sum, grad)| *sum += grad);
            }
        }
    }
    (nats, grads)
}

fn assert_near(name: &str, found: &[f32], expected: &[f32]) {
    let size = expected.iter().map(|value| value.abs()).fold(0.0, f32::max);
    for (at, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!(
            (found - expected).abs() <= 2e-4 * size,
            "{name}: {found} instead of {expected} at {at} (largest {size})"
        );
    }
}

#[test]
fn gradients_are_those_that_candle_finds() {
    for (name, small) in families() {
        for modules in [all_modules(), vec!["v_proj".to_owned(), "up_proj".to_owned()]] {
            let adapter = woken(&small.config, &modules);
            let examples = sequences();
            let (nats, expected) = by_candle(&small, &adapter, &examples);
            for recompute in [false, true] {
                let base = BaseModel::read(small.folder.path(), Hold::F32).unwrap();
                let mut model = Fused::new(base, &adapter, 2, recompute).unwrap();
                let batch = Packed::new(&examples);
                // Twice: buffers that are used again must not remember.
                for _ in 0..2 {
                    let mut grads = vec![0.0; adapter.values.len()];
                    let found = model.gradients(&adapter, &batch, 1.0, &mut grads).unwrap();
                    assert!(
                        (found - nats).abs() < 1e-4 * nats,
                        "{name}: {found} nats instead of {nats}"
                    );
                    assert_near(name, &grads, &expected);
                    for slot in adapter.slots() {
                        for range in [slot.a_range(3), slot.b_range(3)] {
                            assert!(
                                grads[range].iter().any(|grad| *grad != 0.0),
                                "{name}: {} has no gradient",
                                slot.path()
                            );
                        }
                    }
                }
                let alone = model.loss(&adapter, &batch).unwrap();
                assert!(
                    (alone - nats).abs() < 1e-4 * nats,
                    "{name}: {alone} without gradients"
                );
            }
        }
    }
}

#[test]
fn equal_inputs_give_equal_bits_on_any_number_of_threads() {
    let small = small("llama", json!({}));
    let adapter = woken(&small.config, &all_modules());
    let grads: Vec<Vec<f32>> = [(1, false), (2, false), (4, true)]
        .into_iter()
        .map(|(threads, recompute)| {
            let base = BaseModel::read(small.folder.path(), Hold::F32).unwrap();
            let mut model = Fused::new(base, &adapter, threads, recompute).unwrap();
            let mut grads = vec![0.0; adapter.values.len()];
            model
                .gradients(&adapter, &Packed::new(&sequences()), 1.0, &mut grads)
                .unwrap();
            grads
        })
        .collect();
    assert_eq!(grads[0], grads[1]);
    assert_eq!(grads[0], grads[2]);
}

#[test]
fn half_the_memory_gives_nearly_the_same_loss() {
    let small = small("qwen3", json!({}));
    let adapter = woken(&small.config, &all_modules());
    let loss = |hold| {
        let base = BaseModel::read(small.folder.path(), hold).unwrap();
        let mut model = Fused::new(base, &adapter, 1, false).unwrap();
        model.loss(&adapter, &Packed::new(&sequences())).unwrap()
    };
    let (whole, half) = (loss(Hold::F32), loss(Hold::Bf16));
    assert!(
        (whole - half).abs() < 0.01 * whole && whole != half,
        "{whole} and {half}"
    );
}

/// The shipped model, which every checkout has.
pub(super) fn shipped() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/karez-tiny")
}

pub(super) fn write_data(folder: &Path, lines: &[Value]) -> PathBuf {
    let path = folder.join("data.jsonl");
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    std::fs::write(&path, text).unwrap();
    path
}

pub(super) fn lessons() -> Vec<Value> {
    let plants = [
        "mahindi", "maharage", "mtama", "muhogo", "ndizi", "viazi", "mpunga", "karanga", "kahawa", "chai",
    ];
    let pair = |plant: &&str| json!({"prompt": format!("Panda {plant} lini?"), "completion": format!("Panda {plant} mwezi wa Machi."), "lang": "sw"});
    let other = |plant: &&str| {
        json!({"messages": [
        {"role": "user", "content": format!("Where does {plant} grow?")},
        {"role": "assistant", "content": format!("{plant} grows near the river.")},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Because of the water."},
    ], "lang": "en"})
    };
    plants.iter().map(pair).chain(plants.iter().map(other)).collect()
}

pub(super) fn quick(more: Value) -> Settings {
    let mut settings = json!({"learning_rate": 5e-3, "num_epochs": 4, "sequence_len": 96, "micro_batch_size": 1,
        "gradient_accumulation_steps": 2, "lora_r": 4, "warmup_steps": 2});
    for (name, value) in more.as_object().unwrap() {
        settings[name] = value.clone();
    }
    Settings::from_json(settings).unwrap()
}

pub(super) fn spec<'a>(base: &'a Path, data: &'a Path, settings: &'a Settings) -> Spec<'a> {
    Spec {
        base,
        base_digest: "b",
        data,
        data_digest: "d",
        settings,
        language: None,
        threads: 2,
    }
}

pub(super) fn step(trainer: &mut Trainer) -> Result<Step, TrainError> {
    if trainer.look_is_due() {
        trainer.look(|_| Ok::<(), TrainError>(()))?;
    }
    let step = trainer.step(|_| Ok::<(), TrainError>(()))?;
    if trainer.look_is_due() {
        trainer.look(|_| Ok::<(), TrainError>(()))?;
    }
    Ok(step)
}

#[test]
fn a_run_learns_and_says_so_for_every_language() {
    let folder = tempfile::tempdir().unwrap();
    let data = write_data(folder.path(), &lessons());
    let settings = quick(json!({}));
    let base = shipped();
    let spec = spec(&base, &data, &settings);
    let Outline {
        steps,
        examples,
        held_out,
        languages,
        parameters,
        ..
    } = outline(&spec).unwrap();
    assert_eq!(
        (examples, held_out, languages),
        (18, 2, vec!["en".to_owned(), "sw".to_owned()])
    );
    let mut trainer = Trainer::new(&spec).unwrap();
    assert_eq!(trainer.layout().values.len(), parameters);
    while !trainer.state().finished {
        step(&mut trainer).unwrap();
    }
    let state = trainer.state();
    assert_eq!((state.step, state.total, state.looks.len()), (steps, steps, 2));
    let (before, after) = (&state.looks[0], &state.looks[1]);
    for language in ["en", "sw"] {
        let (before, after) = (before.languages[language], after.languages[language]);
        assert!(
            after.loss() < before.loss() * 0.8,
            "{language}: {} to {}",
            before.loss(),
            after.loss()
        );
        assert!(after.bits_per_byte() < before.bits_per_byte());
    }
    let losses = trainer.losses();
    assert!(losses[losses.len() - 1] < losses[0] * 0.7, "{losses:?}");
}

#[test]
fn a_run_that_is_killed_at_any_moment_goes_on_to_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let data = write_data(folder.path(), &lessons());
    let settings = quick(json!({"eval_steps": 3}));
    let base = shipped();
    let spec = spec(&base, &data, &settings);
    let mut undisturbed = Trainer::new(&spec).unwrap();
    let mut chain = Vec::new();
    while !undisturbed.state().finished {
        step(&mut undisturbed).unwrap();
        if undisturbed.state().step.is_multiple_of(3) {
            chain.push(undisturbed.checkpoint().unwrap());
        }
    }
    let (expected, _) = undisturbed.checkpoint().unwrap();

    let path = folder.path().join("checkpoint");
    let mut rng = Rng::new(std::process::id().into());
    let (mut kills, mut found) = (0, Vec::new());
    let mut trainer = Trainer::new(&spec).unwrap();
    loop {
        if trainer.state().finished {
            break;
        }
        step(&mut trainer).unwrap();
        if trainer.state().step.is_multiple_of(3) {
            let (bytes, digest) = trainer.checkpoint().unwrap();
            write_whole(&path, &bytes).unwrap();
            found.push((bytes, digest));
        } else if kills < 10 && rng.below(3) == 0 {
            // All that was in memory is gone; what was stored is not.
            kills += 1;
            trainer = match std::fs::read(&path) {
                Ok(bytes) => Trainer::resume(&spec, &bytes).unwrap(),
                Err(_) => Trainer::new(&spec).unwrap(),
            };
        }
    }
    let (same, _) = trainer.checkpoint().unwrap();
    assert_eq!(
        state_of(&same).unwrap(),
        state_of(&expected).unwrap(),
        "after {kills} deaths"
    );
    assert!(same == expected, "after {kills} deaths");
    for (found, expected) in found.iter().rev().zip(chain.iter().rev()) {
        assert_eq!(found.1, expected.1);
    }
    for pair in chain.windows(2) {
        let state = state_of(&pair[1].0).unwrap();
        assert_eq!(
            state.previous.as_ref(),
            Some(&pair[0].1),
            "each names the one before"
        );
        assert_eq!(checkpoint::digest(&pair[0].0), pair[0].1);
    }
}

#[test]
fn a_checkpoint_of_something_else_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let data = write_data(folder.path(), &lessons());
    let (settings, others) = (quick(json!({})), quick(json!({"lora_r": 2})));
    let base = shipped();
    let mut trainer = Trainer::new(&spec(&base, &data, &settings)).unwrap();
    step(&mut trainer).unwrap();
    let (bytes, _) = trainer.checkpoint().unwrap();
    let refused =
        |spec: &Spec<'_>, bytes: &[u8]| Trainer::resume(spec, bytes).err().expect("a refusal").to_string();
    let right = spec(&base, &data, &settings);
    for (spec, bytes, says) in [
        (
            Spec {
                base_digest: "other",
                ..right.clone()
            },
            &bytes[..],
            "another base model: b, not other",
        ),
        (
            Spec {
                data_digest: "other",
                ..right.clone()
            },
            &bytes[..],
            "another data: d, not other",
        ),
        (
            Spec {
                settings: &others,
                ..right.clone()
            },
            &bytes[..],
            "lora_A",
        ),
        (right.clone(), &bytes[..bytes.len() - 1], "the checkpoint "),
        (right.clone(), &b"nonsense"[..], "the checkpoint "),
    ] {
        let why = refused(&spec, bytes);
        assert!(why.contains(says), "{why} lacks {says}");
    }
}

#[test]
fn a_full_disk_leaves_the_checkpoint_before_whole() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint");
    write_whole(&path, b"the first").unwrap();
    // The device of which every write says that the disk is full.
    std::os::unix::fs::symlink("/dev/full", path.with_extension("partial")).unwrap();
    let error = write_whole(&path, b"the second").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    assert_eq!(std::fs::read(&path).unwrap(), b"the first");
    // What was in the way is gone, and the next one fits again.
    write_whole(&path, b"the third").unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"the third");
}

#[test]
fn losses_that_explode_end_the_run_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let data = write_data(folder.path(), &lessons());
    let settings = quick(json!({}));
    let base = shipped();
    let spec = spec(&base, &data, &settings);
    let mut trainer = Trainer::new(&spec).unwrap();
    step(&mut trainer).unwrap();
    let (good, _) = trainer.checkpoint().unwrap();
    // As after a step that was far too long.
    let mut far = Checkpoint::decode(&good, trainer.layout()).unwrap();
    far.values.iter_mut().for_each(|value| *value = 1e25);
    trainer.restore(&far.encode(trainer.layout()).unwrap()).unwrap();
    let error = step(&mut trainer).unwrap_err();
    assert!(matches!(error, TrainError::Diverged { step: 2, .. }), "{error}");
    assert_eq!(
        (trainer.state().step, trainer.losses().len()),
        (1, 1),
        "the state is that of the step before"
    );
    trainer.restore(&good).unwrap();
    step(&mut trainer).unwrap();
}

#[test]
fn patience_ends_a_run_that_learns_nothing_more() {
    let folder = tempfile::tempdir().unwrap();
    let data = write_data(folder.path(), &lessons());
    let settings = quick(json!({"num_epochs": 400, "eval_steps": 5, "early_stopping_patience": 2}));
    let base = shipped();
    let mut trainer = Trainer::new(&spec(&base, &data, &settings)).unwrap();
    while !trainer.state().finished {
        step(&mut trainer).unwrap();
    }
    assert!(
        trainer.state().step < trainer.state().total / 2,
        "{} steps",
        trainer.state().step
    );
}

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
    let mut cases: Vec<(String, Small)> = families()
        .into_iter()
        .map(|(name, small)| (name.to_owned(), small))
        .collect();
    cases.retain(|(name, _)| name != "llama 3");
    for (name, small) in cases {
        let folder = small.folder.path();
        let mut config = serde_json::to_value(&small.config).unwrap();
        let class = match name.as_str() {
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
