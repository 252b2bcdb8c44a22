//! The fuzz targets for a moment: good bytes with a few changes, and bytes that nobody made. `fuzz/` runs the same
//! functions under a fuzzer that learns.
#![allow(clippy::unwrap_used)]
mod common;
#[path = "../../fuzz/targets.rs"]
mod targets;

use common::*;
use karez_ledger::{
    Book, Entry, Head, Op, Options, Proof, Transaction, Writer, export, inside, journal::Journal,
};

struct Rng(u64);

impl Rng {
    fn next(&mut self, below: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % below.max(1)
    }

    /// One of the seeds with up to four changes, pieces of others among them.
    fn mutant(&mut self, seeds: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = seeds[self.next(seeds.len())].clone();
        for _ in 0..self.next(5) {
            let at = self.next(bytes.len());
            match self.next(6) {
                _ if bytes.is_empty() => bytes.push(self.next(256) as u8),
                0 => bytes[at] ^= 1 << self.next(8),
                1 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][self.next(5)],
                2 => bytes.truncate(at),
                3 => bytes.insert(at, self.next(256) as u8),
                4 => drop(bytes.drain(at..(at + 1 + self.next(8)).min(bytes.len()))),
                _ => {
                    let other = &seeds[self.next(seeds.len())];
                    let from = self.next(other.len());
                    let len = self.next(64).min(other.len() - from);
                    bytes.splice(at..at, other[from..from + len].iter().copied());
                }
            }
        }
        bytes
    }
}

/// For each target, bytes that it takes.
fn seeds() -> [Vec<Vec<u8>>; 8] {
    let mut book = Book::new(scheduler());
    let entries: Vec<Entry> = all_kinds(1)
        .into_iter()
        .map(|posting| book.append(AT, posting).unwrap())
        .collect();
    let records = entries.iter().flat_map(|e| e.posting.evidence.clone()).collect();
    let mut encoded: Vec<Vec<u8>> = entries.iter().map(Entry::encode).collect();
    encoded.extend(
        entries
            .iter()
            .filter_map(Entry::without_records)
            .map(|e| e.encode()),
    );
    let head = Head::sign(&scheduler_secret(), book.entries(), book.tree().root());
    let mut first = Book::new(scheduler());
    let entry = first.append(AT, grant(0, 5)).unwrap();
    let proof = Proof {
        entry: entry.encode(),
        index: 0,
        path: Vec::new(),
        head: Head::sign(&scheduler_secret(), 1, first.tree().root()),
    };
    let exported = |entries: Vec<Entry>| {
        let mut out = Vec::new();
        export(&mut out, &scheduler_secret(), AT, entries.into_iter().map(Ok)).unwrap();
        out
    };
    let less = entries
        .iter()
        .map(|e| e.without_records().unwrap_or_else(|| e.clone()));
    let exports = vec![exported(less.collect()), exported(entries[..2].to_vec())];
    [
        records,
        encoded,
        vec![head.to_string().into_bytes(), Vec::new()],
        vec![proof.to_string().into_bytes()],
        exports,
        vec![journal(), Vec::new()],
        payloads(),
        vec![
            inside::book_bytes(&book).unwrap(),
            inside::book_bytes(&first).unwrap(),
        ],
    ]
}

/// What a writer leaves: the base of a generation, rows, transactions.
fn journal() -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let options = Options {
        scheduler: Some(scheduler()),
        ..Options::default()
    };
    let key = |n: u8| ("fuzz", vec![n; 3]);
    for round in 0..2 {
        let (writer, _) = Writer::open(dir.path(), options.clone()).unwrap();
        for n in 0..3 {
            let (table, row) = key(n);
            let mut ops = vec![Op::Put {
                table,
                key: row,
                value: vec![round; 40],
            }];
            if n == 1 {
                let (table, key) = key(0);
                ops.push(Op::Delete { table, key });
            }
            ops.push(Op::Post(grant(n, 7), AT));
            writer.commit_blocking(Transaction { ops }).unwrap();
        }
    }
    std::fs::read(dir.path().join("journal-000001")).unwrap()
}

fn payloads() -> Vec<Vec<u8>> {
    let path = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(path.path(), journal()).unwrap();
    let mut out = Vec::new();
    Journal::open(path.path(), &mut |frame| {
        out.push(frame.payload);
        Ok(())
    })
    .unwrap();
    assert!(out.len() > 6, "a base, and every transaction");
    out
}

#[test]
fn no_target_is_broken_by_changed_or_random_bytes() {
    let count = if std::env::var_os("KAREZ_LONG").is_some() {
        100_000
    } else {
        1_000
    };
    for ((name, target), seeds) in targets::ALL.into_iter().zip(seeds()) {
        for seed in &seeds {
            target(seed);
        }
        for seed in 0..count {
            let mut rng = Rng(seed);
            let bytes = match rng.next(8) {
                0 => (0..rng.next(300)).map(|_| rng.next(256) as u8).collect(),
                _ => rng.mutant(&seeds),
            };
            let outcome = std::panic::catch_unwind(|| target(&bytes));
            assert!(outcome.is_ok(), "{name} with seed {seed}");
        }
    }
}
