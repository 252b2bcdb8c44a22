//! One run on every learner: near each other, exact on each, and no believing what a provider's trainer says.

use std::cell::RefCell;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use candle_core::Device;
use serde_json::{Value, json};

use super::candle::OnDevice;
use super::run_tests::{lessons, quick, shipped, spec, step, write_data};
use super::torch::{Process, Torch};
use super::trainer::Spec;
use super::{Settings, TrainError, Trainer};
use crate::provided::{self, Provided};

/// Trains to the end, or so many steps, and gives the checkpoint.
fn run(trainer: &mut Trainer, until: usize) -> Vec<u8> {
    while !trainer.state().finished && trainer.state().step < until {
        step(trainer).unwrap();
    }
    trainer.checkpoint().unwrap().0
}

fn assert_near(name: &str, found: &[f32], expected: &[f32], within: f32) {
    assert_eq!(found.len(), expected.len(), "{name}");
    for (at, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!(
            (found - expected).abs() <= within * expected.abs().max(0.1),
            "{name}: step {at} has loss {found} instead of {expected}"
        );
    }
}

fn on_candle(spec: &Spec<'_>) -> Trainer {
    Trainer::with(spec, |spec, adapter| {
        Ok(Box::new(OnDevice::new(spec, adapter, Device::Cpu)?))
    })
    .unwrap()
}

#[test]
fn candle_learns_what_the_fused_model_learns() {
    let folder = tempfile::tempdir().unwrap();
    let data = write_data(folder.path(), &lessons());
    let base = shipped();
    // Without packing, rows are alike, and with them what is left out.
    for more in [
        json!({"max_steps": 6}),
        json!({"max_steps": 6, "lora_dropout": 0.2, "sample_packing": false}),
        json!({"max_steps": 6, "gradient_checkpointing": true, "bf16": true}),
        json!({"max_steps": 6, "gradient_checkpointing": true, "lora_dropout": 0.2, "sample_packing": false}),
    ] {
        let settings = quick(more);
        let spec = spec(&base, &data, &settings);
        let mut own = Trainer::new(&spec).unwrap();
        run(&mut own, 6);
        let mut candle = on_candle(&spec);
        let half = run(&mut candle, 3);
        let whole = run(&mut candle, 6);
        assert_near("candle", candle.losses(), own.losses(), 1e-3);
        // And it goes on where it was.
        let mut again = on_candle(&spec);
        again.restore(&half).unwrap();
        assert!(run(&mut again, 6) == whole, "another end after a rest");
    }
}

#[test]
fn what_is_left_out_follows_from_the_seed_and_comes_back_after_a_rest() {
    let folder = tempfile::tempdir().unwrap();
    let data = write_data(folder.path(), &lessons());
    let base = shipped();
    let losses = |more: Value| {
        let settings = quick(more);
        let spec = spec(&base, &data, &settings);
        let mut trainer = Trainer::new(&spec).unwrap();
        let half = run(&mut trainer, 4);
        let whole = run(&mut trainer, 8);
        let mut again = Trainer::resume(&spec, &half).unwrap();
        assert!(run(&mut again, 8) == whole, "another end after a rest");
        trainer.losses().to_vec()
    };
    let with = |more: Value| {
        let mut settings = json!({"max_steps": 8, "lora_dropout": 0.3});
        settings
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        losses(settings)
    };
    let plain = losses(json!({"max_steps": 8}));
    let thinned = with(json!({}));
    assert_ne!(plain, thinned);
    assert_eq!(
        thinned,
        with(json!({"gradient_checkpointing": true})),
        "worked out again"
    );
    assert!(thinned[7] < thinned[0] * 0.9, "{thinned:?}");
}

fn python() -> Option<Provided> {
    let python = std::env::var("KAREZ_TEST_PYTHON").ok()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    match runtime.block_on(provided::probe(Path::new(&python))) {
        Ok(provided) => Some(provided),
        Err(why) => panic!("KAREZ_TEST_PYTHON: {why}"),
    }
}

fn on_torch(spec: &Spec<'_>, process: &Rc<RefCell<Process>>) -> Result<Trainer, TrainError> {
    Trainer::with(spec, |spec, adapter| {
        Ok(Box::new(Torch::open(process.clone(), spec, adapter)?))
    })
}

#[test]
fn pytorch_takes_over_a_run_and_hands_it_back() {
    let Some(provided) = python() else {
        println!("skipped: KAREZ_TEST_PYTHON names no Python with torch, transformers and peft");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let data = write_data(folder.path(), &lessons());
    let base = shipped();
    let start = || Rc::new(RefCell::new(Process::start(&provided, folder.path(), 2).unwrap()));
    let process = start();
    for (more, exact) in [
        (json!({"max_steps": 8, "eval_steps": 4}), true),
        (json!({"max_steps": 8, "lora_dropout": 0.2}), false),
        (
            json!({"max_steps": 8, "gradient_checkpointing": true, "weight_decay": 0.1}),
            true,
        ),
    ] {
        let settings = quick(more);
        let spec = spec(&base, &data, &settings);
        let mut own = Trainer::new(&spec).unwrap();
        let own_half = run(&mut own, 4);
        let own_whole = run(&mut own, 8);
        let mut torch = on_torch(&spec, &process).unwrap();
        let half = run(&mut torch, 4);
        let whole = run(&mut torch, 8);
        if exact {
            assert_near("PyTorch", torch.losses(), own.losses(), 2e-3);
        }
        // On the same trainer, another process ends with the same bits.
        let mut again = on_torch(&spec, &start()).unwrap();
        again.restore(&half).unwrap();
        assert!(run(&mut again, 8) == whole, "another end after a rest");
        // Across trainers: near, and the checkpoint says who computed it.
        let mut over = on_torch(&spec, &process).unwrap();
        over.restore(&own_half).unwrap();
        run(&mut over, 8);
        let mut back = Trainer::resume(&spec, &half).unwrap();
        run(&mut back, 8);
        if exact {
            assert_near("own, then PyTorch", over.losses(), own.losses(), 2e-3);
            assert_near("PyTorch, then own", back.losses(), own.losses(), 2e-3);
        }
        let [first, second] = &over.state().learners[..] else {
            panic!("{:?}", over.state().learners);
        };
        assert!(
            first.starts_with("karez-train") && second.starts_with("torch "),
            "{first}, {second}"
        );
        assert!(!own_whole.is_empty() && torch.taken().cpu_us > 0);
    }
}

/// A trainer that says what a shell script says.
fn scripted(folder: &Path, name: &str, script: &str) -> Provided {
    let python: PathBuf = folder.join(name);
    std::fs::write(&python, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&python, std::fs::Permissions::from_mode(0o755)).unwrap();
    Provided {
        python,
        reads: Vec::new(),
        torch: "0".into(),
        transformers: "0".into(),
        peft: "0".into(),
        gpus: Vec::new(),
    }
}

#[test]
fn a_trainer_that_lies_hangs_or_dies_fails_the_part_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let data = write_data(folder.path(), &lessons());
    let base = shipped();
    let settings: Settings = quick(json!({"max_steps": 2}));
    let spec = spec(&base, &data, &settings);
    // It opens and takes numbers up like a good one.
    let good = "read a; echo '{\"ok\":true}'; read a; echo '{\"ok\":true}'";
    // The look before the first step asks for a loss of each language.
    let looks = "read a; echo '{\"ok\":true,\"nats\":10}'; read a; echo '{\"ok\":true,\"nats\":10}'";
    for (name, script, says) in [
        ("dies", "exit 3".to_owned(), "ended on its own: exit status: 3"),
        (
            "dies-later",
            format!("{good}; kill -9 $$"),
            "ended on its own: signal: 9",
        ),
        (
            "hangs",
            format!("{good}; exec sleep 60"),
            "gave no answer for 1 s and was stopped",
        ),
        ("babbles", "read a; echo hello".to_owned(), "answered nonsense"),
        (
            "endless",
            "read a; exec tr '\\0' y </dev/zero".to_owned(),
            "answered without end",
        ),
        (
            "negative",
            format!("{good}; read a; echo '{{\"ok\":true,\"nats\":-1}}'"),
            "answered -1 for nats, which cannot be",
        ),
        (
            "silent",
            format!("{good}; read a; echo '{{\"ok\":true}}'"),
            "answered nothing for nats",
        ),
        (
            "not-a-number",
            format!(
                "{good}; {looks}; read a; echo '{{\"ok\":true,\"nats\":null}}'; read a; echo '{{\"ok\":true,\"nats\":null}}'"
            ),
            "training went wrong at step 1",
        ),
        (
            "lacks-memory",
            "read a; echo '{\"ok\":false,\"memory\":true,\"error\":\"CUDA out of memory\"}'".to_owned(),
            "its memory does not suffice: CUDA out of memory",
        ),
        (
            "keeps-the-numbers",
            format!(
                "{good}; {looks}; read a; echo '{{\"ok\":true,\"nats\":10}}'; read a; echo '{{\"ok\":true,\"nats\":10}}'; read a; echo '{{\"ok\":true,\"norm\":1}}'; read a; echo '{{\"ok\":true}}'; sleep 5"
            ),
            "handed over broken numbers",
        ),
    ] {
        let provided = scripted(folder.path(), name, &script);
        let process = Process::start(&provided, folder.path(), 1)
            .unwrap()
            .with_limits(Duration::from_secs(30), Duration::from_secs(1));
        let process = Rc::new(RefCell::new(process));
        let ended = on_torch(&spec, &process).and_then(|mut trainer| {
            step(&mut trainer)?;
            trainer.checkpoint().map(drop)
        });
        let why = ended.expect_err(name).to_string();
        assert!(why.contains(says), "{name}: {why} lacks {says}");
        if name != "not-a-number" {
            assert!(
                process.borrow().ended().is_some(),
                "{name}: nothing more is asked of it"
            );
        }
    }
}
