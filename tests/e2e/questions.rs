//! Questions whose worker hangs or breaks down: asked again elsewhere, or there, without anybody waiting long.
use crate::net::{Net, signal};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use rustix::process::Signal;
use serde_json::Value;
use std::{
    fs,
    time::{Duration, Instant},
};

const QUESTION: &str = "How should I wash my hands?";
/// Donated, so the first choice.
const FIRST: &str = "hill-institute";

/// The process in which a node's model lies.
fn worker_of(net: &Net, node: &str) -> i32 {
    let parent = net.pid(node).to_string();
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let mut pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.find(|pid| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let after = stat.rsplit(')').next().unwrap_or_default();
        after.split_whitespace().nth(1) == Some(&parent) && line.contains("worker")
    })
    .expect("a worker that stays warm")
}

/// Asks, and gives the answer's text and who wrote it.
fn ask(net: &Net, more: &[&str]) -> (String, String) {
    let args = ["generate", "--stream", "--json", "--max-tokens", "24", QUESTION];
    let said = net.run(&[&args, more].concat()).ok().out;
    let last: Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
    let by = last["report"]["parts"][0]["institution"]
        .as_str()
        .unwrap()
        .to_owned();
    (last["text"].as_str().unwrap().to_owned(), by)
}

/// Every text in it that is base64, decoded.
fn decoded(value: &Value, out: &mut Vec<Vec<u8>>) {
    match value {
        Value::String(text) => out.extend(BASE64_STANDARD.decode(text)),
        Value::Array(all) => all.iter().for_each(|value| decoded(value, out)),
        Value::Object(all) => all.values().for_each(|value| decoded(value, out)),
        _ => {}
    }
}

#[test]
fn a_system_prompt_stays_out_of_the_books() {
    let net = Net::up();
    let told = "Answer like somebody from Zwetschgenkuchen would.";
    let read = |more: &[&str]| {
        let ask = [
            "generate",
            "--json",
            "--max-tokens",
            "4",
            "How should I wash my hands?",
        ];
        let answer = net.run(&[&ask[..], more].concat()).ok().json();
        assert!(!answer.to_string().contains("Zwetschgen"), "{answer}");
        answer["report"]["meters"]["tokens_in"].as_u64().unwrap()
    };
    // The model was told.
    assert!(read(&["--system", told]) > read(&[]) + 5);
    let streamed = net.run(&[
        "generate",
        "--stream",
        "--system",
        told,
        "--max-tokens",
        "4",
        "Why?",
    ]);
    streamed.ok();
    // Why a question went where it went is told by both who tell of it.
    let asked = net
        .run(&["generate", "--json", "--max-tokens", "4", "Why?"])
        .ok()
        .json();
    let id = asked["report"]["job"].as_str().unwrap();
    let job = net.job(id);
    let why = job["parts"][0]["why"].as_str().unwrap();
    let said = net.run(&["job", "explain", id]).ok().out;
    let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(
        !why.is_empty() && said.contains(why),
        "{why:?} is not in {said:?}"
    );
    // Orders stand in the books, and it in none of them.
    let mut records = Vec::new();
    for line in net.verified_ledger() {
        decoded(&line, &mut records);
    }
    let holds = |what: &[u8]| {
        records
            .iter()
            .filter(|record| record.windows(what.len()).any(|part| part == what))
            .count()
    };
    assert!(holds(b"karez-tiny") >= 3, "{} records", records.len());
    assert_eq!(holds(b"Zwetschgen"), 0);
}

#[test]
fn a_node_that_writes_nothing_is_left_and_avoided() {
    let net = Net::up();
    let (text, by) = ask(&net, &[]);
    assert_eq!(by, FIRST);
    // The others know the model too, so that only the silence costs time.
    for other in ["lake-university", "coast-computing"] {
        assert_eq!(ask(&net, &["--institution", other]).1, other);
    }
    let worker = worker_of(&net, FIRST);
    signal(worker, Signal::STOP);
    let began = Instant::now();
    let (again, by) = ask(&net, &[]);
    let took = began.elapsed();
    assert_eq!(again, text);
    assert_ne!(by, FIRST);
    // Five seconds of silence, and what a busy machine needs for the rest.
    assert!(took < Duration::from_secs(15), "{took:?}");
    let began = Instant::now();
    assert_ne!(ask(&net, &[]).1, FIRST, "it is tried again at once");
    assert!(began.elapsed() < took, "{:?}", began.elapsed());
    signal(worker, Signal::CONT);
    net.verified_ledger();
}

#[test]
fn a_worker_that_breaks_down_is_back_within_seconds() {
    let net = Net::up();
    let here = ["--institution", FIRST];
    let (text, _) = ask(&net, &here);
    let (node, worker) = (net.pid(FIRST), worker_of(&net, FIRST));
    // A handler of the runtime's swallows the first that comes from outside, and two at once are one.
    net.until(Duration::from_secs(10), "the worker to be gone", || {
        let stat = fs::read_to_string(format!("/proc/{worker}/stat")).unwrap_or_default();
        let state = stat.rsplit(") ").next().and_then(|rest| rest.chars().next());
        if matches!(state, None | Some('Z')) {
            return Some(());
        }
        signal(worker, Signal::SEGV);
        None
    });
    let began = Instant::now();
    assert_eq!(ask(&net, &here), (text, FIRST.to_owned()));
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    assert_eq!(net.pid(FIRST), node, "the node itself is untouched");
    assert_ne!(worker_of(&net, FIRST), worker);
    net.verified_ledger();
}
