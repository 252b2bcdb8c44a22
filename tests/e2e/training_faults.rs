//! Fine-tuning that goes wrong: what is good is kept, and named.
use crate::{
    bad_days::{Disk, fill},
    net::{Net, kill_9},
    training::{SETTINGS, collected, lessons, submit},
};
use serde_json::Value;
use std::{fs, process::Command, time::Duration};

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
