//! How many durable entries a second, how long one commit takes, how fast an export is checked.
//!
//! `cargo run --release -p karez-ledger --example ledger_bench -- OUT.json [DIR]`
//!
//! Beside each figure stands a bare file that appends the same number of bytes and calls `sync_data`, and redb with one
//! durable transaction per group, in the same run on the same disk: compare those, not the figures of different
//! machines. The bare file is also put behind a queue, with as many tasks that wait for it: the load without a ledger. Figures
//! "per core second" count CPU time. KAREZ_BENCH_RECEIPTS sets the size of the large ledger (100,000); `--commits DIR`
//! measures commits alone;
//! `--make DIR COUNT` makes one beforehand, and KAREZ_BENCH_LEDGER=DIR measures it.
#![allow(clippy::unwrap_used)]
#[path = "../tests/common/mod.rs"]
mod common;

use common::{AT, Part, grant, order, reserve, scheduler, scheduler_secret};
use karez_core::{
    money::Posting,
    records::{Receipt, SignatureCheck, Signed, Strict, to_check},
};
use karez_ledger::{
    Checker, Exporter, Op, Options, Transaction, VerifyOptions, Writer, examine, examine_by, verify,
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
    let (writer, _) = Writer::open(dir, options()).unwrap();
    // Made before: deriving keys is not what is measured.
    let grants: Vec<Posting> = (0..8).map(|n| grant(n, 1)).collect();
    let start = Instant::now();
    let tasks: Vec<_> = (0..writers)
        .map(|w| {
            let (writer, grant) = (writer.clone(), grants[(w % 8) as usize].clone());
            tokio::spawn(async move {
                let mut times = Vec::new();
                for i in 0..each {
                    let begin = Instant::now();
                    let next = transaction(w * each + i, grant.clone());
                    writer.commit(next).await.unwrap();
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
    assert!(
        journal > 0,
        "the journal was compacted: its length no longer tells what a commit takes"
    );
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

/// The bare file behind a queue: as many tasks, each of which waits until its bytes are synced together with others'. What
/// the ledger adds to that is the ledger's own: checks, hashes, tree, balances, index.
async fn queued(dir: &Path, bytes: u64, writers: u64, each: u64) -> Value {
    type Asked = (Vec<u8>, tokio::sync::oneshot::Sender<()>);
    let path = dir.join("queued");
    let mut file = File::create(&path).unwrap();
    let (queue, mut asked) = tokio::sync::mpsc::channel::<Asked>(1024);
    let thread = std::thread::spawn(move || {
        while let Some(first) = asked.blocking_recv() {
            let (mut block, mut replies) = (first.0, vec![first.1]);
            while replies.len() < 1024
                && let Ok((bytes, reply)) = asked.try_recv()
            {
                block.extend_from_slice(&bytes);
                replies.push(reply);
            }
            file.write_all(&block).unwrap();
            file.sync_data().unwrap();
            for reply in replies {
                let _ = reply.send(());
            }
        }
    });
    let start = Instant::now();
    let tasks: Vec<_> = (0..writers)
        .map(|_| {
            let queue = queue.clone();
            tokio::spawn(async move {
                let mut times = Vec::new();
                for _ in 0..each {
                    let begin = Instant::now();
                    let (reply, done) = tokio::sync::oneshot::channel();
                    queue.send((vec![7; bytes as usize], reply)).await.unwrap();
                    done.await.unwrap();
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
    drop(queue);
    thread.join().unwrap();
    std::fs::remove_file(path).unwrap();
    result
}

/// redb with the same bytes: one durable transaction for each group of as many writers.
fn redb(dir: &Path, bytes: u64, group: usize, syncs: usize) -> Value {
    const TABLE: redb::TableDefinition<'_, u64, &[u8]> = redb::TableDefinition::new("entries");
    let path = dir.join("redb");
    let db = redb::Database::create(&path).unwrap();
    let value = vec![7; bytes as usize];
    let mut times = Vec::new();
    let start = Instant::now();
    for n in 0..syncs {
        let begin = Instant::now();
        let transaction = db.begin_write().unwrap();
        {
            let mut table = transaction.open_table(TABLE).unwrap();
            for i in 0..group {
                table.insert((n * group + i) as u64, value.as_slice()).unwrap();
            }
        }
        transaction.commit().unwrap();
        times.push(begin.elapsed());
    }
    let wall = start.elapsed();
    drop(db);
    std::fs::remove_file(path).unwrap();
    times.sort_unstable();
    json!({
        "group": group,
        "per_second": ((syncs * group) as f64 / wall.as_secs_f64()).round(),
        "p50_ms": quantile(&times, 0.5),
        "p99_ms": quantile(&times, 0.99),
    })
}

/// Seconds of CPU that this thread, or the whole process, has used: what a core can do, however busy the machine is.
fn cpu(clock: rustix::time::ClockId) -> f64 {
    let at = rustix::time::clock_gettime(clock);
    at.tv_sec as f64 + at.tv_nsec as f64 / 1e9
}

fn peak_memory_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.unwrap_or(0) / 1024
}

/// Jobs of a hundred parts, one reading each: the ledger of a busy federation.
struct Ledger {
    left: u64,
    part: u32,
    order: Option<karez_core::records::Verified<karez_core::records::Order>>,
    nonce: u64,
}

impl Iterator for Ledger {
    type Item = Posting;

    fn next(&mut self) -> Option<Posting> {
        if self.nonce == 0 {
            self.nonce = 1;
            return Some(grant(0, 1 << 60));
        }
        if self.left == 0 {
            return None;
        }
        let Some(current) = self.order.clone() else {
            let next = order(0, self.nonce, 1_000_000);
            self.nonce += 1;
            let posting = reserve(&next, 1_000_000);
            self.order = Some(next);
            return Some(posting);
        };
        let mut part = Part::of(&current, self.part, 1);
        part.readings = 1;
        let posting = part.settle();
        self.left -= 1;
        self.part = (self.part + 1) % 100;
        if self.part == 0 {
            self.order = None;
        }
        Some(posting)
    }
}

fn ledger(receipts: u64) -> Ledger {
    Ledger {
        left: receipts,
        part: 0,
        order: None,
        nonce: 0,
    }
}

/// What one core checks, each by itself and many together: receipts with the whole trail they rest on (the last in a
/// settlement's evidence, after order, lease, reading and usage), and the receipts' own records.
fn receipts(count: u64) -> Value {
    let thread = rustix::time::ClockId::ThreadCPUTime;
    let settlements: Vec<Posting> = ledger(count)
        .filter(|p| p.kind == karez_core::money::PostingKind::Settle)
        .collect();
    let start = cpu(thread);
    for posting in settlements.iter().take(1_000) {
        examine(posting.clone(), scheduler()).unwrap();
    }
    let alone = 1_000.0 / (cpu(thread) - start);
    let mut checker = Checker::default();
    let start = cpu(thread);
    for batch in settlements.chunks(1536) {
        let records = batch.iter().flat_map(|p| &p.evidence);
        checker.take(records.filter_map(|bytes| to_check(bytes)));
        for posting in batch {
            examine_by(posting.clone(), scheduler(), &checker).unwrap();
        }
    }
    let together = count as f64 / (cpu(thread) - start);
    // The receipts without what they rest on: one signature and one record each.
    let alone_of = |count: usize, by: &dyn SignatureCheck| {
        let start = cpu(thread);
        for posting in settlements.iter().take(count) {
            let last = posting.evidence.last().unwrap();
            Signed::<Receipt>::decode(last).unwrap().verify_by(by).unwrap();
        }
        cpu(thread) - start
    };
    let record_alone = 5_000.0 / alone_of(5_000, &Strict);
    let mut checker = Checker::default();
    let start = cpu(thread);
    let last = settlements.iter().filter_map(|p| to_check(p.evidence.last()?));
    checker.take(last);
    let record_together = count as f64 / (cpu(thread) - start + alone_of(settlements.len(), &checker));
    json!({
        "record_alone_per_core_second": record_alone.round(),
        "record_together_per_core_second": record_together.round(),
        "records_per_receipt": 5,
        "alone_per_core_second": alone.round(),
        "together_per_core_second": together.round(),
    })
}

/// Makes a ledger of `count` receipts in `dir`: a store, and its export beside it. Two threads sign, this one posts.
fn make(dir: &Path, count: u64) {
    let (writer, _) = Writer::open(&dir.join("store"), options()).unwrap();
    writer.commit_blocking(posts(vec![grant(0, 1 << 60)])).unwrap();
    let jobs = count.div_ceil(PARTS);
    std::thread::scope(|scope| {
        let (send, made) = std::sync::mpsc::sync_channel::<Vec<Posting>>(16);
        for thread in 0..2 {
            let send = send.clone();
            scope.spawn(move || {
                for job in (thread..jobs).step_by(2) {
                    let next = order(0, 1 + job, 1_000_000);
                    let mut postings = vec![reserve(&next, 1_000_000)];
                    for part in 0..PARTS.min(count - job * PARTS) {
                        let mut part = Part::of(&next, part as u32, 1);
                        part.readings = 1;
                        postings.push(part.settle());
                    }
                    send.send(postings).unwrap();
                }
            });
        }
        drop(send);
        let mut group = Vec::new();
        for postings in made {
            group.extend(postings);
            if group.len() >= 1_000 {
                writer.commit_blocking(posts(std::mem::take(&mut group))).unwrap();
            }
        }
        writer.commit_blocking(posts(group)).unwrap();
    });
    let mut out = std::io::BufWriter::new(File::create(dir.join("ledger.jsonl")).unwrap());
    let secret = scheduler_secret();
    let mut exporter = Exporter::begin(&mut out, &secret, AT).unwrap();
    for entry in writer.entries(0) {
        exporter.entry(entry.unwrap()).unwrap();
    }
    exporter.finish(&writer.accounts()).unwrap();
    out.flush().unwrap();
}

/// Parts of a job.
const PARTS: u64 = 100;

fn options() -> Options {
    Options {
        scheduler: Some(scheduler()),
        ..Options::default()
    }
}

fn posts(postings: Vec<Posting>) -> Transaction {
    Transaction {
        ops: postings
            .into_iter()
            .map(|posting| Op::Post(posting, AT))
            .collect(),
    }
}

/// Opens a ledger that [`make`] made, proves a hundred entries, and verifies its export in a process of its own.
fn large(dir: &Path) -> Value {
    let export = dir.join("ledger.jsonl");
    let begin = Instant::now();
    let (writer, recovered) = Writer::open(&dir.join("store"), options()).unwrap();
    let reopen = begin.elapsed().as_secs_f64();
    assert_eq!(recovered.report, Vec::<String>::new());
    let (size, root) = writer.tree();
    let count = size - 1 - (size - 1).div_ceil(PARTS + 1);
    let secret = scheduler_secret();
    let begin = Instant::now();
    let mut proof_bytes = 0;
    for n in 0..100 {
        let head = karez_ledger::Head::sign(&secret, size, root);
        let proof = writer.prove(n * (size / 100), head).unwrap().unwrap();
        proof_bytes = proof.path.len() * 32;
    }
    let proof_ms = begin.elapsed().as_secs_f64() * 10.0;
    drop((writer, recovered));
    let stored: u64 = walk(&dir.join("store")).iter().map(|(_, len)| len).sum();
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .arg("--verify")
        .arg(&export)
        .output()
        .unwrap();
    let verified: Value = serde_json::from_slice(&output.stdout).unwrap();
    json!({
        "receipts": count,
        "export_bytes_per_receipt": std::fs::metadata(&export).unwrap().len() / count,
        "stored_bytes_per_receipt": stored / count,
        "inclusion_path_bytes": proof_bytes,
        "proof_ms": proof_ms,
        "reopen_s": reopen,
        "verify": verified,
    })
}

fn walk(dir: &Path) -> Vec<(PathBuf, u64)> {
    let mut out = Vec::new();
    for item in std::fs::read_dir(dir).unwrap().flatten() {
        let meta = item.metadata().unwrap();
        if meta.is_dir() {
            out.extend(walk(&item.path()));
        } else {
            out.push((item.path(), meta.len()));
        }
    }
    out
}

/// The child's part: time, CPU and peak memory of one verification.
fn verify_file(path: &str) {
    let process = rustix::time::ClockId::ProcessCPUTime;
    let start = Instant::now();
    let mut reader = std::io::BufReader::with_capacity(1 << 20, File::open(path).unwrap());
    let summary = verify(&mut reader, &VerifyOptions::default()).unwrap();
    println!(
        "{}",
        json!({
            "wall_s": start.elapsed().as_secs_f64(),
            "cpu_s": cpu(process),
            "peak_memory_mib": peak_memory_mib(),
            "records": summary.records,
        })
    );
}

/// Commits alone, beside a bare file and redb: for whoever works on the writer.
fn commits_only(place: &Path) -> Vec<Value> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    let mut rows = Vec::new();
    for (writers, each) in [(1, 300), (16, 200), (256, 400)] {
        let dir = tempfile::tempdir_in(place).unwrap();
        let (ledger, bytes) = runtime.block_on(commits(dir.path(), writers, each));
        let file = bare(dir.path(), bytes, writers as usize, 200);
        let queue = runtime.block_on(queued(dir.path(), bytes, writers, each));
        let peer = redb(dir.path(), bytes, writers as usize, 60);
        println!(
            "{writers} writers: {ledger}\n  bare file: {file}\n  bare file behind a queue: {queue}\n  redb: {peer}"
        );
        rows.push(json!({
            "writers": writers,
            "bytes_per_commit": bytes,
            "ledger": ledger,
            "bare_file": file,
            "bare_file_behind_a_queue": queue,
            "redb": peer,
        }));
    }
    rows
}

fn main() {
    let mut args = std::env::args().skip(1);
    let given: Vec<String> = std::env::args().skip(1).collect();
    match given.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--verify", file] => return verify_file(file),
        ["--commits", dir] => {
            commits_only(Path::new(dir));
            return;
        }
        ["--make", dir, count] => return make(Path::new(dir), count.parse().unwrap()),
        _ => {}
    }
    let out = PathBuf::from(args.next().expect("usage: ledger_bench OUT.json [DIR]"));
    let place = args.next().map_or_else(std::env::temp_dir, PathBuf::from);
    let rows = commits_only(&place);
    let receipts = receipts(20_000);
    println!("receipts: {receipts}");
    let large = match std::env::var_os("KAREZ_BENCH_LEDGER") {
        Some(dir) => large(Path::new(&dir)),
        None => {
            let count = std::env::var("KAREZ_BENCH_RECEIPTS").ok();
            let dir = tempfile::tempdir_in(&place).unwrap();
            make(dir.path(), count.and_then(|n| n.parse().ok()).unwrap_or(100_000));
            large(dir.path())
        }
    };
    println!("ledger: {large}");
    let report = json!({
        "bench": "ledger",
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
        "profile": if cfg!(debug_assertions) { "dev" } else { "release" },
        "commit": "one entry and one 300-byte row",
        "commits": rows,
        "receipts": receipts,
        "ledger": large,
        "load": std::fs::read_to_string("/proc/loadavg").unwrap_or_default().trim(),
    });
    std::fs::write(&out, serde_json::to_vec_pretty(&report).unwrap()).unwrap();
    println!("wrote {}", out.display());
}
