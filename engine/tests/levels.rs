//! One binary, many processors: every instruction set that this one has computes what the model was trained to say.
#![allow(clippy::unwrap_used, reason = "in a test, the panic is the report")]

mod common;

use common::{program, work};
use karez_engine::level;
use karez_engine::protocol::{Generate, Load, LoadKind, Output, Prompt};
use karez_engine::{SpawnOptions, Worker, shipped};
use std::path::{Path, PathBuf};
use std::process::Command;

async fn worker(program: &Path, args: &[std::ffi::OsString], level: &str) -> Worker {
    let options = SpawnOptions {
        env: vec![(level::WISH.into(), level.into())],
        ..SpawnOptions::default()
    };
    Worker::spawn(program, args, options).await.unwrap()
}

/// How many of the first answers are as trained, and what the worker says it computes with.
async fn answers(worker: Worker, folder: &Path, pairs: usize) -> (usize, String) {
    let path = folder.join("karez-tiny.gguf");
    std::fs::write(&path, shipped::MODEL).unwrap();
    let load = Load {
        threads: Some(1),
        ..Load::new(LoadKind::Generate, &path)
    };
    let facts = worker.load(load, None).await.unwrap();
    let mut right = 0;
    for line in include_str!("../corpus/en.jsonl").lines().take(pairs) {
        let pair: serde_json::Value = serde_json::from_str(line).unwrap();
        let prompt = Prompt::Text {
            text: pair["question"].as_str().unwrap().into(),
            system: None,
        };
        let run = worker.run(work(Generate::greedy(prompt, 200))).unwrap();
        let (output, _) = run.finish().await.unwrap();
        right += usize::from(matches!(output, Output::Text { text, .. } if text == pair["answer"]));
    }
    (right, facts.engine)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_level_of_this_processor_answers_as_trained() {
    let folder = tempfile::tempdir().unwrap();
    let levels = level::usable();
    let (_, best) = answers(worker(program(), &[], "").await, folder.path(), 0).await;
    assert!(
        best.ends_with(&format!(" {}", levels[0])),
        "{best} is not {}",
        levels[0]
    );
    for name in levels {
        let (right, engine) = answers(worker(program(), &[], name).await, folder.path(), 3).await;
        assert!(engine.ends_with(&format!(" {name}")), "{engine} is not {name}");
        assert!(right >= 2, "{name}: {right} of 3 answers are as trained");
    }
    let worker = worker(program(), &[], "x86-64-v9").await;
    let error = worker
        .load(
            Load::new(LoadKind::Generate, folder.path().join("karez-tiny.gguf")),
            None,
        )
        .await;
    assert!(error.unwrap_err().to_string().contains("x86-64-v9"));
}

/// Where user-mode QEMU is installed: processors that are not here, down to the first with 64 bits. What one lacks ends the
/// process.
#[tokio::test(flavor = "multi_thread")]
async fn old_processors_are_served_too() {
    let Ok(said) = Command::new("qemu-x86_64").arg("--version").output() else {
        println!("skipped: there is no qemu-x86_64 (Debian: qemu-user) to play an older processor");
        return;
    };
    assert!(said.status.success());
    if !level::SERVES_ALL {
        println!("skipped: llama.cpp was configured for newer processors in this build folder");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let qemu = PathBuf::from("qemu-x86_64");
    for (cpu, expected) in [
        ("core2duo", "x86-64"),
        ("Nehalem", "x86-64-v2"),
        ("SandyBridge", "x86-64-v2+avx"),
        ("Haswell", "x86-64-v3"),
    ] {
        let args = ["-cpu".into(), cpu.into(), program().into()];
        let (right, engine) = answers(worker(&qemu, &args, "").await, folder.path(), 1).await;
        assert!(engine.ends_with(&format!(" {expected}")), "{cpu}: {engine}");
        assert_eq!(right, 1, "{cpu}");
    }
}
