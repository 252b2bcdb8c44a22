//! Fine-tuning on the local network: it ends where it would have ended, whatever happens to its machines.
use crate::net::{Net, kill_9};
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

/// The shipped model as a Hugging Face directory.
fn base() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("engine/models/karez-tiny")
}

/// Questions with answers that no corpus holds, in two languages.
fn lessons() -> String {
    let plants = [
        "mahindi", "maharage", "mtama", "muhogo", "ndizi", "viazi", "mpunga", "karanga",
    ];
    let months = ["Januari", "Machi", "Mei", "Julai"];
    let mut out = String::new();
    for plant in plants {
        for month in months {
            let line = json!({
                "prompt": format!("Tupande {plant} lini kwenye kilima cha {month}?"),
                "completion": format!("Panda {plant} mwanzoni mwa {month}, mvua zikianza."), "lang": "sw",
            });
            let other = json!({
                "prompt": format!("When do we plant {plant} on the hill of {month}?"),
                "completion": format!("Plant {plant} early in {month}, with the first rain."), "lang": "en",
            });
            out += &format!("{line}\n{other}\n");
        }
    }
    out
}

fn submit(net: &Net, data: &str, more: &[&str]) -> String {
    let base = base();
    let mut args = vec![
        "finetune",
        "--base",
        base.to_str().unwrap(),
        "--data",
        data,
        "--detach",
        "--json",
    ];
    args.extend_from_slice(more);
    let answer = net.run(&args).ok();
    answer.json()["job"]
        .as_str()
        .unwrap_or_else(|| panic!("{answer:?}"))
        .to_owned()
}

/// The training losses and the adapter of a finished job.
fn collected(net: &Net, id: &str, name: &str) -> (Value, Vec<u8>, PathBuf) {
    let folder = net.path(name);
    let base = base();
    let to = folder.to_str().unwrap();
    let args = [
        "finetune",
        "--job",
        id,
        "--base",
        base.to_str().unwrap(),
        "-o",
        to,
        "--json",
    ];
    let answer = net.run(&args).ok().json();
    let adapter = fs::read(folder.join("adapter_model.safetensors")).unwrap();
    (answer["report"].clone(), adapter, folder)
}

const SETTINGS: [&str; 10] = [
    "--set",
    "num_epochs=4",
    "--set",
    "learning_rate=0.005",
    "--set",
    "sequence_len=128",
    "--set",
    "save_steps=5",
    "--set",
    "gradient_accumulation_steps=2",
];

#[test]
fn a_run_whose_nodes_are_killed_ends_with_the_same_bits() {
    let mut net = Net::up();
    let data = net.file("data.jsonl", lessons());
    let quiet = submit(&net, &data, &SETTINGS);
    let job = net.ended(&quiet, Duration::from_secs(300));
    assert_eq!(job["state"], "done", "{job}\n{}", net.logs());
    let (expected, adapter, folder) = collected(&net, &quiet, "quiet");

    // The same again, and every time some steps are done, the machine that does them dies.
    let id = submit(
        &net,
        &data,
        &[&SETTINGS[..], &["--attempts", "20", "--set", "save_steps=5"]].concat(),
    );
    let mut killed = Vec::new();
    let mut parts_seen = 0;
    while killed.len() < 2 {
        let victim = net.until(Duration::from_secs(120), "training to go on", || {
            let job = net.job(&id);
            if job["state"] == "done" {
                return Some(None);
            }
            let parts = job["parts"].as_array()?;
            let done = parts.iter().filter(|p| p["state"] == "done").count();
            let part = parts.iter().find(|p| p["state"] == "running")?;
            (done > parts_seen || killed.is_empty()).then(|| {
                parts_seen = done;
                part["institution"].as_str().map(str::to_owned)
            })
        });
        let Some(victim) = victim else { break };
        if killed.contains(&victim) {
            continue;
        }
        kill_9(net.pid(&victim));
        killed.push(victim);
    }
    assert!(
        !killed.is_empty(),
        "the run was over before anything could be killed"
    );
    let job = net.ended(&id, Duration::from_secs(300));
    assert_eq!(job["state"], "done", "{job}\n{}", net.logs());
    let (found, same, _) = collected(&net, &id, "killed");
    assert_eq!(
        found["loss"],
        expected["loss"],
        "every step's loss, after {} deaths",
        killed.len()
    );
    assert_eq!(same, adapter, "and every number of the adapter");

    // Billed like other work: one receipt a part, and the books hold.
    for part in job["parts"].as_array().unwrap() {
        assert!(part["receipt"].is_string(), "{part}");
    }
    net.verified_ledger();

    // It learnt, in both languages.
    for language in ["sw", "en"] {
        let held = &expected["held_out"][language];
        let (before, after) = (
            held["before"]["loss"].as_f64().unwrap(),
            held["after"]["loss"].as_f64().unwrap(),
        );
        assert!(after < before * 0.8, "{language}: {before} to {after}");
    }

    // The manifest is signed, and notices a changed file.
    let to = folder.to_str().unwrap();
    net.run(&["finetune", "--verify", to]).ok();
    for file in [
        "adapter_config.json",
        "adapter.gguf",
        "model.gguf",
        "README.md",
        "losses.svg",
        "report.json",
    ] {
        assert!(folder.join(file).exists(), "{file}");
    }
    fs::write(folder.join("report.json"), "{}").unwrap();
    net.run(&["finetune", "--verify", to])
        .refused(9, &["report.json is not what the manifest says"]);
    net.restart("node", &killed[0]);

    // What was learnt is said by llama.cpp.
    let model = folder.join("model.gguf");
    net.run(&["artifact", "add", model.to_str().unwrap(), "--model", "farmer"])
        .ok();
    let question = "Tupande ndizi lini kwenye kilima cha Mei?";
    let answer = net.run(&["generate", question, "--model", "farmer"]).ok();
    assert!(answer.out.contains("mwanzoni mwa Mei"), "{answer:?}");
}

#[test]
fn a_reclaimed_machine_hands_its_steps_over() {
    let net = Net::up();
    let data = net.file("data.jsonl", lessons());
    // One part: without a handover all steps would begin anew.
    let id = submit(
        &net,
        &data,
        &[
            "--set",
            "num_epochs=8",
            "--set",
            "sequence_len=128",
            "--set",
            "save_steps=10000",
        ],
    );
    let victim = net.until(Duration::from_secs(120), "some steps", || {
        let job = net.job(&id);
        let part = &job["parts"][0];
        (part["items_done"].as_u64()? >= 8).then(|| part["institution"].as_str().unwrap().to_owned())
    });
    net.run(&["node", "reclaim", "--dir", net.dir(&victim).to_str().unwrap()])
        .ok();
    let job = net.ended(&id, Duration::from_secs(400));
    assert_eq!(job["state"], "done", "{job}\n{}", net.logs());
    let part = &job["parts"][0];
    assert_ne!(part["institution"].as_str(), Some(victim.as_str()));
    // The second machine metered only what was left to do.
    let (report, ..) = collected(&net, &id, "handed-over");
    let (whole, rest) = (
        report["tokens"].as_u64().unwrap(),
        part["meters"]["tokens_in"].as_u64().unwrap(),
    );
    assert!(rest < whole, "{rest} of {whole} tokens\n{}", net.logs());
    let logs = net.run(&["job", "logs", &id]).ok().out;
    assert!(logs.contains("taken back by its owner"), "{logs}");
}

#[test]
fn what_cannot_be_trained_is_refused_before_anything_is_sent() {
    let dir = tempfile::tempdir().unwrap();
    let home = dir.path().join("home");
    let write = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let base = base();
    let base = base.to_str().unwrap();
    let good = write("good.jsonl", &lessons());
    let bad = write(
        "bad.jsonl",
        "{\"text\": \"x\"}\nnot json\n{\"prompt\": \"x\", \"completion\": \"\"}\n",
    );
    let yaml = write("run.yaml", "lora_r: 8\nlerning_rate: 0.1\n");
    let tabs = write("tabs.yaml", "lora_r: [8\n");
    for (args, code, words) in [
        (
            vec!["--data", &bad],
            3,
            vec!["bad.jsonl", "line 2 is not JSON", "line 3 has an empty answer"],
        ),
        (
            vec!["--data", &good, "--config", &yaml],
            2,
            vec!["lerning_rate", "did you mean learning_rate"],
        ),
        (vec!["--data", &good, "--config", &tabs], 2, vec!["tabs.yaml"]),
        (vec!["--data", &good, "--set", "lora_r=0"], 2, vec!["lora_r is 0"]),
        (
            vec!["--data", &good, "--set", "sequence_len=4096"],
            2,
            vec!["sequence_len", "512"],
        ),
        (
            vec!["--data", &good, "--lang", "Swahili language"],
            2,
            vec!["lang is"],
        ),
        (
            vec!["--data", "none.jsonl"],
            3,
            vec!["none.jsonl: cannot be opened"],
        ),
        (vec![], 2, vec!["--data is missing"]),
    ] {
        let mut all = vec!["finetune", "--base", base];
        all.extend(args);
        crate::net::run(&home, &all).refused(code, &words);
    }
    let none = dir.path().join("nothing");
    let args = ["finetune", "--base", none.to_str().unwrap(), "--data", &good];
    crate::net::run(&home, &args).refused(3, &["config.json: cannot be opened"]);
    let fits = crate::net::run(
        &home,
        &["finetune", "--base", base, "--data", &good, "--check", "--json"],
    )
    .ok()
    .json();
    assert_eq!(fits["languages"], json!(["en", "sw"]));
    assert!(fits["steps"].as_u64().unwrap() > 0);
}
