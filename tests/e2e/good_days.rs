//! What a new user does first.
use crate::net::{Net, run, settlements};
use std::{fs, time::Duration};

#[test]
fn a_prompt_is_answered_and_billed_and_the_books_hold() {
    let net = Net::up();
    let answer = net
        .run(&[
            "generate",
            "--json",
            "--max-tokens",
            "24",
            "Why should I wash my hands?",
        ])
        .ok();
    assert!(!answer.out.trim().is_empty(), "{answer:?}");
    let jobs = net.run(&["jobs", "--all", "--json"]).ok().json();
    let id = find_id(&jobs);
    let job = net.job(&id);
    assert_eq!(job["state"], "done", "{job}");
    let ledger = net.verified_ledger();
    assert_eq!(settlements(&ledger, &id).len(), 1);
    let balance = net.run(&["balance", "--json"]).ok().json();
    let spent = job["spent_microcredits"].as_i64().unwrap();
    assert_eq!(
        balance[0]["microcredits"].as_i64().unwrap(),
        100_000_000 - spent,
        "{balance}"
    );
    net.run(&["job", "explain", &id]).ok();
    net.run(&["job", "logs", &id]).ok();
    net.run(&["offers"]).ok();
    let out = net.path("answers.jsonl");
    net.run(&["job", "fetch", &id, "-o", out.to_str().unwrap()]).ok();
    assert_eq!(fs::read_to_string(out).unwrap().lines().count(), 1);
}

fn find_id(jobs: &serde_json::Value) -> String {
    let list = jobs.as_array().or_else(|| jobs["jobs"].as_array()).unwrap();
    list[0]["job"].as_str().unwrap().to_owned()
}

#[test]
fn the_same_order_of_prompts_comes_back_from_many_parts() {
    let net = Net::up();
    let prompts: String = (0..24)
        .map(|i| format!("{{\"prompt\":\"question {i}\",\"id\":\"q{i}\"}}\n"))
        .collect();
    let input = net.file("prompts.jsonl", prompts);
    let out = net.path("out.jsonl");
    net.run(&[
        "generate",
        "--file",
        &input,
        "--max-tokens",
        "4",
        "--part-items",
        "5",
        "-o",
        out.to_str().unwrap(),
    ])
    .ok();
    let text = fs::read_to_string(out).unwrap();
    let ids: Vec<String> = text
        .lines()
        .map(|l| {
            serde_json::from_str::<serde_json::Value>(l).unwrap()["id"]
                .as_str()
                .unwrap()
                .to_owned()
        })
        .collect();
    assert_eq!(ids, (0..24).map(|i| format!("q{i}")).collect::<Vec<_>>());
}

#[test]
fn one_flipped_byte_in_the_books_is_named() {
    let net = Net::up();
    let id = net.noops(3, 0, 1);
    net.ended(&id, Duration::from_secs(30));
    net.verified_ledger();
    let good = fs::read(net.path("books.ndjson")).unwrap();
    for at in [good.len() / 5, good.len() / 2, good.len() * 4 / 5] {
        let mut bad = good.clone();
        bad[at] ^= 1;
        let file = net.file("flipped.ndjson", bad);
        net.run(&["ledger", "verify", &file]).refused(9, &["line"]);
    }
    let mut cut = good.clone();
    cut.truncate(good.len() * 3 / 4);
    let file = net.file("cut.ndjson", cut);
    assert_eq!(net.run(&["ledger", "verify", &file]).code, 9);
}

#[test]
fn down_leaves_no_process_behind() {
    let net = Net::up();
    let pids: Vec<i32> = [
        "scheduler",
        "lake-university",
        "coast-computing",
        "hill-institute",
    ]
    .map(|name| net.pid(name))
    .into();
    // Up twice is up once.
    net.run(&["up"]).ok();
    net.run(&["down"]).ok();
    for pid in pids {
        assert!(
            !std::path::Path::new(&format!("/proc/{pid}/exe")).exists(),
            "process {pid} still runs"
        );
    }
    assert_eq!(run(&net.home, &["jobs"]).code, 6);
}
