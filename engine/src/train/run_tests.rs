//! The fused model against candle's, and runs from end to end: learning, resuming, refusing.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use serde_json::{Value, json};

use super::adapter::Adapter;
use super::base::{BaseModel, Hold};
use super::checkpoint::{self, state_of};
use super::data::{self, Packed};
use super::fused::Fused;
use super::trainer::{Outline, Spec, Step, outline};
use super::*;

/// A small model of a family, in a directory of its own.
pub(super) struct Small {
    pub(super) folder: tempfile::TempDir,
    pub(super) config: Config,
    pub(super) weights: Weights,
}

pub(super) fn small(family: &str, more: Value) -> Small {
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

pub(super) fn families() -> Vec<(&'static str, Small)> {
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
pub(super) fn sequences() -> Vec<data::Example> {
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
pub(super) fn woken(config: &Config, modules: &[String]) -> Adapter {
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

#[test]
fn memory_is_planned_as_it_is_used() {
    for (name, small) in families() {
        for more in [
            json!({}),
            json!({"bf16": true, "gradient_checkpointing": true}),
            json!({"lora_dropout": 0.1, "sample_packing": false, "micro_batch_size": 4}),
        ] {
            let mut settings = quick(json!({"sequence_len": 200}));
            let mut all = serde_json::to_value(&settings).unwrap();
            all.as_object_mut()
                .unwrap()
                .extend(more.as_object().unwrap().clone());
            settings = Settings::from_json(all).unwrap();
            let data = Data {
                examples: sequences(),
                ..Data::default()
            };
            let adapter = woken(&small.config, &settings.modules());
            let numbers = adapter.values.len();
            let planned = memory::needed(&small.config, &settings, &data, numbers) - memory::PROCESS;
            let hold = if settings.bf16 { Hold::Bf16 } else { Hold::F32 };
            let base = BaseModel::read(small.folder.path(), hold).unwrap();
            let width = if settings.bf16 { 2 } else { 4 };
            let weights: usize = base.matrices.values().map(|m| m.rows * m.columns * width).sum();
            let mut model = Fused::new(base, &adapter, 2, settings.gradient_checkpointing).unwrap();
            model.drop_out(settings.lora_dropout as f32, 1);
            let batch = Packed::new(&data.examples);
            model
                .gradients(&adapter, &batch, 1.0, &mut vec![0.0; numbers])
                .unwrap();
            let held = (model.held() + weights + 9 * 4 * numbers) as u64;
            assert!(
                held <= planned && planned < held * 2,
                "{name}, {more}: {held} bytes held, {planned} planned"
            );
        }
    }
    // A run with less does not begin.
    let folder = tempfile::tempdir().unwrap();
    let data = write_data(folder.path(), &lessons());
    let (base, settings) = (shipped(), quick(json!({})));
    let all = spec(&base, &data, &settings);
    let needs = outline(&all).unwrap().memory;
    let with = |memory| {
        Trainer::new(&Spec {
            memory: Some(memory),
            ..all.clone()
        })
    };
    assert!(with(needs).is_ok());
    let error = with(needs - 1).err().unwrap().to_string();
    assert!(
        error.contains("MiB of memory") && error.contains("micro_batch_size"),
        "{error}"
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
        memory: None,
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
            std::fs::write(&path, &bytes).unwrap();
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
