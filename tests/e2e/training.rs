//! Fine-tuning on the local network: it ends where it would have ended, whatever happens to its machines.
use crate::net::{Net, kill_9};
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

/// The shipped model as a Hugging Face directory.
pub(crate) fn base() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("engine/models/karez-tiny")
}

/// Questions with answers that no corpus holds, in two languages.
pub(crate) fn lessons() -> String {
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

pub(crate) fn submit(net: &Net, data: &str, more: &[&str]) -> String {
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
pub(crate) fn collected(net: &Net, id: &str, name: &str) -> (Value, Vec<u8>, PathBuf) {
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

pub(crate) const SETTINGS: [&str; 10] = [
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

/// What a job has stored, and the institution that works on it now.
fn stored_and_worker(job: &Value) -> (u64, Option<String>) {
    let parts = job["parts"].as_array().unwrap();
    let done = parts.iter().filter(|part| part["state"] == "done");
    let stored = done.map(|part| part["items"].as_u64().unwrap()).sum();
    let running = parts.iter().find(|part| part["state"] == "running");
    let worker = running.and_then(|part| part["institution"].as_str().map(str::to_owned));
    (stored, worker)
}

#[test]
fn ten_kills_at_random_moments_cost_an_interval_each_and_change_nothing() {
    if std::env::var_os("KAREZ_LONG").is_none() {
        println!("skipped: takes minutes; KAREZ_LONG=1 runs it");
        return;
    }
    const KILLS: usize = 10;
    const INTERVAL: u64 = 20;
    let mut net = Net::up();
    let data = net.file("data.jsonl", lessons());
    let mut settings = SETTINGS.to_vec();
    settings[1] = "num_epochs=150";
    settings[7] = "save_steps=20";
    let quiet = submit(&net, &data, &settings);
    let job = net.ended(&quiet, Duration::from_secs(600));
    assert_eq!(job["state"], "done", "{job}\n{}", net.logs());
    let (expected, adapter, _) = collected(&net, &quiet, "quiet");

    let id = submit(&net, &data, &[&settings[..], &["--attempts", "60"]].concat());
    let seed = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .subsec_nanos();
    println!("moments drawn from {seed}");
    let mut random = u64::from(seed) | 1;
    let mut pids = std::collections::BTreeMap::new();
    let (mut kills, mut worst) = (Vec::new(), 0);
    while kills.len() < KILLS {
        // A moment at random, once somebody is at work again and some step was taken.
        let least = kills.last().map_or(1, |(_, stored)| stored + 1);
        net.until(Duration::from_secs(200), "steps after a death", || {
            let job = net.job(&id);
            assert_ne!(
                job["state"],
                "done",
                "over after {} deaths: {kills:?}",
                kills.len()
            );
            (job["items_done"].as_u64()? >= least && stored_and_worker(&job).1.is_some()).then_some(())
        });
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        std::thread::sleep(Duration::from_millis(random % 1500));
        // Between two parts nobody is at work.
        let (victim, before) = net.until(Duration::from_secs(120), "somebody at work", || {
            let job = net.job(&id);
            Some((stored_and_worker(&job).1?, job["items_done"].as_u64()?))
        });
        let pid = *pids.entry(victim.clone()).or_insert_with(|| net.pid(&victim));
        kill_9(pid);
        // What is stored when another attempt begins is what it goes on from.
        let stored = net.until(Duration::from_secs(120), "somebody else to take over", || {
            let (stored, worker) = stored_and_worker(&net.job(&id));
            worker.filter(|worker| *worker != victim).map(|_| stored)
        });
        assert!(
            stored + INTERVAL >= before,
            "{before} steps were done when {victim} died, {stored} were left"
        );
        worst = worst.max(before.saturating_sub(stored));
        kills.push((before, stored));
        let again = net.restart("node", &victim);
        pids.insert(victim, again);
    }
    let job = net.ended(&id, Duration::from_secs(600));
    assert_eq!(job["state"], "done", "{job}\n{}", net.logs());
    let (found, same, _) = collected(&net, &id, "killed");
    assert_eq!(
        found["loss"], expected["loss"],
        "every step's loss, after {kills:?}"
    );
    assert_eq!(same, adapter, "and every number of the adapter");
    net.verified_ledger();
    println!("{KILLS} deaths, at most {worst} steps lost each: {kills:?}");
}

/// Real questions in Swahili with their answers, where the folder of public data is there.
fn swahili(net: &Net, count: usize) -> Option<String> {
    let Some(folder) = std::env::var_os("KAREZ_DATA") else {
        println!("skipped: KAREZ_DATA names no folder of public data");
        return None;
    };
    let path = Path::new(&folder).join("text/afriqa_swahili_train.jsonl");
    let Ok(text) = fs::read_to_string(&path) else {
        println!("skipped: {} is absent", path.display());
        return None;
    };
    let lines = text.lines().take(count).map(|line| {
        let line: Value = serde_json::from_str(line).unwrap();
        // The list of answers is Python's.
        let answers = line["answers"].as_str().unwrap().trim_matches(['[', ']']);
        let answer = answers.split("', '").next().unwrap().trim_matches('\'');
        json!({"prompt": line["question"], "completion": answer}).to_string() + "\n"
    });
    Some(net.file("swahili.jsonl", lines.collect::<String>()))
}

#[test]
fn an_adapter_is_used_over_its_base_and_over_no_other() {
    let net = Net::up();
    let data = net.file("data.jsonl", lessons());
    let id = submit(&net, &data, &SETTINGS);
    let job = net.ended(&id, Duration::from_secs(300));
    assert_eq!(job["state"], "done", "{job}\n{}", net.logs());
    let (_, _, folder) = collected(&net, &id, "farmer");
    let (base, farmer) = (base(), folder.to_str().unwrap().to_owned());
    let question = "Tupande ndizi lini kwenye kilima cha Mei?";
    let whole = format!("{}+{farmer}", base.display());
    let answer = net.run(&["generate", question, "--model", &whole]).ok();
    assert!(answer.out.contains("mwanzoni mwa Mei"), "{answer:?}");
    // The file of the adapter will do, and the base's name in the catalogue, once it has one.
    let gguf = format!("{}+{farmer}/adapter.gguf", base.display());
    let same = net.run(&["generate", question, "--model", &gguf]).ok();
    assert_eq!(same.out, answer.out);

    // The shipped file is the same model in other numbers: not what the adapter was made for.
    let other = format!("karez-tiny+{farmer}");
    net.run(&["generate", question, "--model", &other])
        .refused(3, &["is an adapter for the base", "give the folder"]);
    let none = format!("{}+nothing", base.display());
    net.run(&["generate", question, "--model", &none])
        .refused(4, &["\"nothing\" is neither a model of the scheduler nor a file"]);
    let model = format!("{}+{}/model.gguf", base.display(), farmer);
    net.run(&["generate", question, "--model", &model])
        .refused(3, &["where a LoRA adapter is expected"]);

    // What a node is told by somebody who does not look is refused there, too.
    let adapter = folder.join("adapter.gguf");
    let mut bytes = fs::read(&adapter).unwrap();
    let key = b"karez.base.blake3";
    let at = bytes.windows(key.len()).position(|part| part == key).unwrap();
    // After the key: its type and length, then the digest; another one of the same length.
    let digest = at + key.len() + 12;
    bytes[digest] = if bytes[digest] == b'0' { b'1' } else { b'0' };
    fs::write(&adapter, &bytes).unwrap();
    net.run(&[
        "artifact",
        "add",
        &format!("{farmer}/adapter.gguf"),
        "--model",
        "forged",
    ])
    .ok();
    net.run(&[
        "generate",
        question,
        "--model",
        &format!("{}+forged", base.display()),
    ])
    .refused(8, &["an adapter for the base model"]);
}

#[test]
fn real_swahili_is_learnt_with_one_command_and_spoken_with_the_next() {
    let net = Net::up();
    let Some(data) = swahili(&net, 60) else { return };
    let base = base();
    let base = base.to_str().unwrap();
    let to = net.path("adapter");
    let args = [
        "finetune",
        "--base",
        base,
        "--data",
        &data,
        "--lang",
        "sw",
        "--set",
        "num_epochs=8",
        "--set",
        "learning_rate=0.005",
        "--set",
        "sequence_len=256",
        "-o",
        to.to_str().unwrap(),
    ];
    let answer = net.run(&args).ok();
    assert!(answer.out.contains("| sw |"), "{answer:?}");
    let report: Value = serde_json::from_slice(&fs::read(to.join("report.json")).unwrap()).unwrap();
    let held = &report["held_out"]["sw"];
    let bits = |when: &str| held[when]["bits_per_byte"].as_f64().unwrap();
    println!(
        "bits per byte of held-out Swahili: {} before, {} after",
        bits("before"),
        bits("after")
    );
    assert!(bits("after") < bits("before"), "{held}");
    let first: Value =
        serde_json::from_str(fs::read_to_string(&data).unwrap().lines().next().unwrap()).unwrap();
    let model = format!("{base}+{}", to.display());
    let said = net
        .run(&[
            "generate",
            first["prompt"].as_str().unwrap(),
            "--model",
            &model,
            "--max-tokens",
            "40",
        ])
        .ok();
    assert!(!said.out.trim().is_empty(), "{said:?}");
}

#[test]
fn a_provider_s_pytorch_does_the_same_job() {
    let Some(python) = std::env::var_os("KAREZ_TEST_PYTHON") else {
        println!("skipped: KAREZ_TEST_PYTHON names no Python with torch, transformers and peft");
        return;
    };
    let mut net = Net::up();
    let data = net.file("data.jsonl", lessons());
    let mut settings = SETTINGS.to_vec();
    settings[1] = "num_epochs=1";
    let own = submit(&net, &data, &settings);
    assert_eq!(
        net.ended(&own, Duration::from_secs(300))["state"],
        "done",
        "{}",
        net.logs()
    );
    let (expected, ..) = collected(&net, &own, "own");

    // One node offers its owner's trainer.
    let parts = net.job(&own);
    let name = parts["parts"][0]["institution"].as_str().unwrap().to_owned();
    kill_9(net.pid(&name));
    let path = net.dir(&name).join("node.toml");
    let table = format!("\n[trainer]\npython = {python:?}\ncpu = true\n\n[limits]");
    let text = fs::read_to_string(&path)
        .unwrap()
        .replacen("\n[limits]", &table, 1);
    fs::write(&path, text).unwrap();
    let pid = net.restart("node", &name);
    net.until(Duration::from_secs(200), "the node to offer PyTorch", || {
        let status = net.run(&[
            "node",
            "status",
            "--dir",
            net.dir(&name).to_str().unwrap(),
            "--json",
        ]);
        (status.code == 0 && status.out.contains("\"torch\"")).then_some(())
    });
    let only: Vec<&str> = [&settings[..], &["--institution", &name]].concat();
    let job = submit(&net, &data, &only);
    let view = net.ended(&job, Duration::from_secs(400));
    assert_eq!(view["state"], "done", "{view}\n{}", net.logs());
    let (found, adapter, folder) = collected(&net, &job, "torch");
    let trainers = found["trainers"].to_string();
    assert!(trainers.contains("torch "), "{trainers}");
    let losses = |report: &Value| -> Vec<f64> {
        report["loss"]
            .as_array()
            .unwrap()
            .iter()
            .map(|loss| loss.as_f64().unwrap())
            .collect()
    };
    for (at, (found, expected)) in losses(&found).iter().zip(losses(&expected)).enumerate() {
        assert!(
            (found - expected).abs() < 5e-3 * expected,
            "step {at}: {found}, not {expected}"
        );
    }
    for part in view["parts"].as_array().unwrap() {
        assert!(
            part["receipt"].is_string() && part["meters"]["cpu_ms"].as_u64() > Some(0),
            "{part}"
        );
    }
    net.verified_ledger();
    let manifest = fs::read_to_string(folder.join("manifest.json")).unwrap();
    assert!(manifest.contains("torch "), "{manifest}");

    // Killed in the middle and begun again there, it ends with the same bits: one trainer, one machine.
    let job = submit(&net, &data, &[&only[..], &["--attempts", "20"]].concat());
    net.until(Duration::from_secs(200), "some steps", || {
        (net.job(&job)["items_done"].as_u64()? >= 7).then_some(())
    });
    kill_9(pid);
    net.restart("node", &name);
    let view = net.ended(&job, Duration::from_secs(400));
    assert_eq!(view["state"], "done", "{view}\n{}", net.logs());
    let (again, same, _) = collected(&net, &job, "torch-killed");
    assert_eq!(again["loss"], found["loss"]);
    assert_eq!(same, adapter);
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
    let sets = write("sets.yaml", "datasets: []\n");
    for (args, code, words) in [
        (
            vec!["--data", &bad],
            3,
            vec!["bad.jsonl", "line 2 is not JSON", "line 3 has an empty answer"],
        ),
        (
            vec!["--data", &good, "--config", &yaml],
            2,
            vec!["run.yaml: lerning_rate", "did you mean learning_rate"],
        ),
        (
            vec!["--data", &good, "--config", &sets],
            2,
            vec!["sets.yaml: datasets names not exactly one"],
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
