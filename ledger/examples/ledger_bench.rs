//! How many durable entries a second, how long one commit takes, how fast an export is checked.
//!
//! `cargo run --release -p karez-ledger --example ledger_bench -- OUT.json [DIR]`
//!
//! Beside each figure stands a bare file that appends the same number of bytes and calls `sync_data`, in the same run
//! on the same disk: compare the two, not the figures of different machines.
#![allow(clippy::unwrap_used)]
#[path = "../tests/common/mod.rs"]
mod common;

use common::{AT, Part, grant, order, reserve, scheduler, scheduler_secret};
use karez_core::{money::Posting, records::to_check};
use karez_ledger::{
    Book, Checker, Op, Options, Transaction, VerifyOptions, Writer, examine, examine_by, export, verify,
};
use serde_json::{Value, json};
use std::{
    fs::File,
    io::Write,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// What a daemon commits at once: one entry and one row of its state.
const ROW_BYTES: usize = 300;

fn quantile(sorted: &[Duration], q: f64) -> f64 {
    let at = ((sorted.len() - 1) as f64 * q).round() as usize;
    sorted[at].as_secs_f64() * 1e3
}

fn figures(mut times: Vec<Duration>, wall: Duration) -> Value {
    times.sort_unstable();
    json!({
        "commits": times.len(),
        "per_second": (times.len() as f64 / wall.as_secs_f64()).round(),
        "p50_ms": quantile(&times, 0.5),
        "p99_ms": quantile(&times, 0.99),
    })
}

fn transaction(n: u64, posting: Posting) -> Transaction {
    Transaction {
        ops: vec![
            Op::Post(posting, AT),
            Op::Put {
                table: "bench",
                key: (n % 1000).to_be_bytes().to_vec(),
                value: vec![7; ROW_BYTES],
            },
        ],
    }
}

async fn commits(dir: &Path, writers: u64, each: u64) -> (Value, u64) {
    let options = Options {
        scheduler: Some(scheduler()),
        ..Options::default()
    };
    let (writer, _) = Writer::open(dir, options).unwrap();
    let start = Instant::now();
    let tasks: Vec<_> = (0..writers)
        .map(|w| {
            let writer = writer.clone();
            tokio::spawn(async move {
                let mut times = Vec::new();
                for i in 0..each {
                    let begin = Instant::now();
                    let posting = grant((w % 8) as u8, 1);
                    writer.commit(transaction(w * each + i, posting)).await.unwrap();
                    times.push(begin.elapsed());
                }
                times
            })
        })
        .collect();
    let mut times = Vec::new();
    for task in tasks {
        times.extend(task.await.unwrap());
    }
    let result = figures(times, start.elapsed());
    let journal = std::fs::metadata(dir.join("journal-000001")).map_or(0, |m| m.len());
    (result, journal / (writers * each))
}

/// The same bytes with nothing around them: `group` transactions to one append and one sync.
fn bare(dir: &Path, bytes: u64, group: usize, syncs: usize) -> Value {
    let path = dir.join("bare");
    let mut file = File::create(&path).unwrap();
    let block = vec![7; bytes as usize * group];
    let mut times = Vec::new();
    let start = Instant::now();
    for _ in 0..syncs {
        let begin = Instant::now();
        file.write_all(&block).unwrap();
        file.sync_data().unwrap();
        times.push(begin.elapsed());
    }
    let wall = start.elapsed();
    std::fs::remove_file(path).unwrap();
    times.sort_unstable();
    json!({
        "group": group,
        "per_second": ((syncs * group) as f64 / wall.as_secs_f64()).round(),
        "p50_ms": quantile(&times, 0.5),
        "p99_ms": quantile(&times, 0.99),
    })
}

/// Paper trails of three readings each: examined one by one, then verified from an export.
fn receipts(count: u64) -> Value {
    let mut postings = vec![grant(0, 1 << 60)];
    let mut settlements = Vec::new();
    for nonce in 0..count {
        let order = order(0, nonce, 10_000_000);
        postings.push(reserve(&order, 10_000_000));
        let settle = Part::of(&order, 0, 1).settle();
        settlements.push(settle.clone());
        postings.push(settle);
    }
    let batched = settlements.clone();
    let start = Instant::now();
    for posting in settlements {
        examine(posting, scheduler()).unwrap();
    }
    let examined = start.elapsed();
    let mut checker = Checker::default();
    let start = Instant::now();
    for batch in batched.chunks(768) {
        let records = batch.iter().flat_map(|p| &p.evidence);
        checker.take(records.filter_map(|bytes| to_check(bytes)));
        for posting in batch {
            examine_by(posting.clone(), scheduler(), &checker).unwrap();
        }
    }
    let together = start.elapsed();
    let mut book = Book::new(scheduler());
    let entries: Vec<_> = postings
        .into_iter()
        .map(|p| book.append(AT, p).unwrap())
        .collect();
    let mut file = Vec::new();
    export(&mut file, &scheduler_secret(), AT, entries.into_iter().map(Ok)).unwrap();
    let start = Instant::now();
    let summary = verify(&mut file.as_slice(), &VerifyOptions::default()).unwrap();
    let verified = start.elapsed();
    json!({
        "records_per_receipt": 7,
        "examined_per_second_one_thread": (count as f64 / examined.as_secs_f64()).round(),
        "examined_together_per_second_one_thread": (count as f64 / together.as_secs_f64()).round(),
        "verified_per_second_from_export": (count as f64 / verified.as_secs_f64()).round(),
        "export_bytes": file.len(),
        "records": summary.records,
    })
}

fn main() {
    let mut args = std::env::args().skip(1);
    let out = PathBuf::from(args.next().expect("usage: ledger_bench OUT.json [DIR]"));
    let place = args.next().map_or_else(std::env::temp_dir, PathBuf::from);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    let mut rows = Vec::new();
    for (writers, each) in [(1, 300), (16, 100), (256, 60)] {
        let dir = tempfile::tempdir_in(&place).unwrap();
        let (ledger, bytes) = runtime.block_on(commits(dir.path(), writers, each));
        let file = bare(dir.path(), bytes, writers as usize, 200);
        println!("{writers} writers: {ledger} bare file: {file}");
        rows.push(json!({
            "writers": writers,
            "bytes_per_commit": bytes,
            "ledger": ledger,
            "bare_file": file,
        }));
    }
    let receipts = receipts(2_000);
    println!("receipts: {receipts}");
    let report = json!({
        "bench": "ledger",
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
        "profile": if cfg!(debug_assertions) { "dev" } else { "release" },
        "commit": "one entry and one 300-byte row",
        "commits": rows,
        "receipts": receipts,
    });
    std::fs::write(&out, serde_json::to_vec_pretty(&report).unwrap()).unwrap();
    println!("wrote {}", out.display());
}
