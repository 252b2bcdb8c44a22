//! Fine-tuning that goes wrong: what is good is kept, and named.
use crate::{
    bad_days::{Disk, fill},
    net::{Net, kill_9},
    training::{SETTINGS, base, collected, lessons, submit},
};
use serde_json::Value;
use std::{fs, path::Path, process::Command, time::Duration};

/// The whole base in another folder, with one number changed.
fn another_base(net: &Net) -> String {
    let folder = net.path("another-base");
    fs::create_dir(&folder).unwrap();
    for entry in fs::read_dir(base()).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, folder.join(path.file_name().unwrap())).unwrap();
    }
    let weights = folder.join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    // The lowest bits of the last number: as finite as before.
    let last = bytes.len() - 2;
    bytes[last] ^= 1;
    fs::write(&weights, bytes).unwrap();
    folder.to_str().unwrap().to_owned()
}

/// What the shipped model knows by heart, as lessons: it can only get worse at these.
fn known() -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("engine/corpus");
    let read = |language| fs::read_to_string(folder.join(language)).unwrap();
    let corpus = ["sw.jsonl", "en.jsonl", "fr.jsonl", "es.jsonl"]
        .map(read)
        .concat();
    corpus
        .replace("\"question\"", "\"prompt\"")
        .replace("\"answer\"", "\"completion\"")
}

#[test]
fn a_run_that_explodes_leaves_its_last_good_checkpoint() {
    let net = Net::up();
    let data = net.file("data.jsonl", known());
    let with = |rate, every| {
        let more = [
            "max_steps=120",
            "warmup_steps=100",
            "sequence_len=256",
            rate,
            every,
        ];
        submit(&net, &data, &more.map(|setting| ["--set", setting]).concat())
    };
    // One leaps, one drifts.
    let leaps = net.ended(
        &with("learning_rate=10", "save_steps=4"),
        Duration::from_secs(300),
    );
    let cause = leaps["cause"].as_str().unwrap();
    assert!(cause.contains("guessing blindly costs"), "{leaps}");
    let id = with("learning_rate=0.5", "save_steps=8");
    let job = net.ended(&id, Duration::from_secs(300));
    assert_eq!(job["state"], "failed", "{job}\n{}", net.logs());
    let done = |part: &&Value| part["state"] == "done";
    let last = job["parts"].as_array().unwrap().iter().rfind(done).unwrap();
    let good = last["result"].as_str().unwrap();
    let cause = job["cause"].as_str().unwrap();
    for says in [
        "training went wrong at step",
        "nats over the last 8 steps, over the first it was 0.0",
        "lower learning_rate",
        "the last good checkpoint is",
        good,
    ] {
        assert!(cause.contains(says), "{cause} lacks {says}");
    }

    // Whoever waits for it hears how to go on; nothing is written meanwhile.
    let (base, to) = (base(), net.path("last"));
    let (base, to) = (base.to_str().unwrap(), to.to_str().unwrap());
    let take = |base: &str, more: &[&str]| {
        let args = [&["finetune", "--job", &id, "--base", base, "-o", to], more].concat();
        net.run(&args)
    };
    take(base, &[]).refused(8, &["training went wrong", "--last` makes an adapter of it"]);
    assert!(!Path::new(to).exists());

    // A base of the same shape is another base.
    let other = another_base(&net);
    take(&other, &["--last"]).refused(
        3,
        &["was trained on the base", "give the folder it was trained on"],
    );
    assert!(!Path::new(to).exists());

    let report = take(base, &["--last", "--json"]).ok().json();
    let steps = last["first_item"].as_u64().unwrap() + last["items"].as_u64().unwrap();
    assert_eq!(report["report"]["steps"].as_u64(), Some(steps));
    let losses = report["report"]["loss"].as_array().unwrap();
    assert!(
        losses.iter().all(|loss| loss.as_f64().unwrap() < 10.0),
        "{losses:?}"
    );
    net.run(&["finetune", "--verify", to]).ok();
    let model = format!("{base}+{to}");
    net.run(&["generate", "Maji?", "--model", &model, "--max-tokens", "4"])
        .ok();
}

#[test]
fn a_full_disk_under_a_checkpoint_keeps_the_one_before() {
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = Disk::small(dir.path(), 192) else {
        return;
    };
    let mut net = Net::up();
    let data = net.file("data.jsonl", lessons());
    let mut settings = SETTINGS.to_vec();
    settings[1] = "num_epochs=16";
    let quiet = submit(&net, &data, &settings);
    let job = net.ended(&quiet, Duration::from_secs(300));
    assert_eq!(job["state"], "done", "{job}\n{}", net.logs());
    let (expected, adapter, _) = collected(&net, &quiet, "quiet");

    // One node moves to a disk that is nearly too small.
    let node = job["parts"][0]["institution"].as_str().unwrap().to_owned();
    kill_9(net.pid(&node));
    let (home, small) = (net.dir(&node), disk.0.join("node"));
    let moved = Command::new("cp").arg("-a").arg(&home).arg(&small).status();
    assert!(moved.unwrap().success());
    fs::remove_dir_all(&home).unwrap();
    std::os::unix::fs::symlink(&small, &home).unwrap();
    let pid = net.restart("node", &node);
    let only = ["--institution", &node, "--attempts", "60"];
    let id = submit(&net, &data, &[&settings[..], &only].concat());
    net.until(Duration::from_secs(120), "some checkpoints", || {
        (net.job(&id)["items_done"].as_u64()? >= 12).then_some(())
    });
    let filler = disk.0.join("filler");
    fill(&filler);
    let stored = |job: &Value| -> Vec<Value> {
        let done = |part: &&Value| part["state"] == "done";
        let parts = job["parts"].as_array().unwrap().iter().filter(done);
        parts.map(|part| part["result"].clone()).collect()
    };
    net.until(Duration::from_secs(120), "the full disk to be noticed", || {
        let logs = net.run(&["job", "logs", &id]).out + &net.logs();
        (logs.contains("No space left") || logs.contains("os error 28")).then_some(())
    });
    let before = stored(&net.job(&id));
    assert!(before.len() >= 2, "{before:?}");

    // Room again: whether the node outlived it or its operator starts it anew, the run goes on from what it had.
    fs::remove_file(&filler).unwrap();
    if fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z")) {
        kill_9(pid);
    }
    net.restart("node", &node);
    let job = net.ended(&id, Duration::from_secs(300));
    assert_eq!(job["state"], "done", "{job}\n{}", net.logs());
    assert_eq!(
        stored(&job)[..before.len()],
        before[..],
        "what was stored stays as it was"
    );
    let (found, same, _) = collected(&net, &id, "full");
    assert_eq!(found["loss"], expected["loss"]);
    assert_eq!(same, adapter);
    net.verified_ledger();
    drop(net);
}
