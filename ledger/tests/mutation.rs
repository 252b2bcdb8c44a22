//! The verifier against a stranger with an editor: whatever is changed in an export is noticed, and named.
#![allow(clippy::unwrap_used)]
mod common;
use common::*;
use karez_ledger::{Book, Entry, Fault, FaultKind, VerifyOptions, export, export::LINE_BYTES_MAX, verify};
use std::sync::LazyLock;

fn export_of(postings: Vec<karez_core::money::Posting>) -> Vec<u8> {
    let mut book = Book::new(scheduler());
    let entries: Vec<Entry> = postings
        .into_iter()
        .map(|p| book.append(AT, p).unwrap())
        .collect();
    let mut out = Vec::new();
    export(&mut out, &scheduler_secret(), AT, entries.into_iter().map(Ok)).unwrap();
    out
}

static WHOLE: LazyLock<Vec<u8>> = LazyLock::new(|| export_of(all_kinds(1)));

fn check(file: &[u8]) -> Result<(), Fault> {
    verify(&mut &*file, &VerifyOptions::default()).map(drop)
}

/// A line without an end is named where it stands, not where the lines that are checked with it begin.
#[test]
fn an_endless_line_is_named_where_it_stands() {
    let mut lines: Vec<Vec<u8>> = WHOLE
        .split_inclusive(|b| *b == b'\n')
        .map(<[u8]>::to_vec)
        .collect();
    lines[4] = vec![b'x'; LINE_BYTES_MAX + 2];
    let fault = check(&lines.concat()).unwrap_err();
    assert_eq!((fault.line, fault.entry), (5, Some(3)), "{fault}");
    assert!(matches!(*fault.kind, FaultKind::TooLong { .. }), "{fault}");
}

/// A small generator, so that a failing case is found again by its number.
struct Rng(u64);

impl Rng {
    fn next(&mut self, below: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % below.max(1)
    }
}

/// One random change; gives the first line that it touches, from 1.
fn tamper(rng: &mut Rng, file: &mut Vec<u8>) -> (usize, &'static str) {
    let line_of = |file: &[u8], at: usize| file[..at].iter().filter(|b| **b == b'\n').count() + 1;
    let lines: Vec<Vec<u8>> = file
        .split_inclusive(|b| *b == b'\n')
        .map(<[u8]>::to_vec)
        .collect();
    let at = rng.next(file.len());
    match rng.next(9) {
        0 => {
            file[at] ^= 1 << rng.next(8);
            (line_of(file, at), "a bit flipped")
        }
        1 => {
            let line = line_of(file, at);
            file.remove(at);
            (line, "a byte removed")
        }
        2 => {
            let byte = b" \n0a\"}9f"[rng.next(8)];
            let line = line_of(file, at);
            file.insert(at, byte);
            (line, "a byte put in")
        }
        3 => {
            let mut left = lines.clone();
            let n = rng.next(lines.len());
            left.remove(n);
            *file = left.concat();
            (n + 1, "a line dropped")
        }
        4 => {
            let mut more = lines.clone();
            let (from, to) = (rng.next(lines.len()), rng.next(lines.len()));
            more.insert(to, lines[from].clone());
            *file = more.concat();
            (to + 1, "a line repeated")
        }
        5 => {
            let mut other = lines.clone();
            let a = rng.next(lines.len() - 1);
            let b = a + 1 + rng.next(lines.len() - a - 1);
            other.swap(a, b);
            *file = other.concat();
            (a + 1, "two lines swapped")
        }
        6 => {
            file.truncate(at);
            (line_of(file, at), "the tail cut")
        }
        7 => {
            // A digit or a letter of the same kind: the JSON stays well formed.
            let digits: Vec<usize> = (0..file.len()).filter(|i| file[*i].is_ascii_digit()).collect();
            let at = digits[rng.next(digits.len())];
            file[at] = b'0' + ((file[at] - b'0') + 1 + rng.next(9) as u8) % 10;
            (line_of(file, at), "a digit changed")
        }
        _ => {
            // A piece of one line over another of the same length.
            let (from, to) = (rng.next(file.len()), at);
            let len = (1 + rng.next(40)).min(file.len() - from.max(to));
            let piece = file[from..from + len].to_vec();
            file[to..to + len].copy_from_slice(&piece);
            (line_of(file, to), "a piece copied over another")
        }
    }
}

#[test]
fn every_tampering_is_caught_and_named() {
    check(&WHOLE).unwrap();
    let count = if std::env::var_os("KAREZ_LONG").is_some() {
        40_000
    } else {
        600
    };
    let mut named = 0;
    for seed in 0..count {
        let mut file = WHOLE.clone();
        let mut rng = Rng(seed);
        let (line, how) = tamper(&mut rng, &mut file);
        if file == *WHOLE {
            continue;
        }
        let fault = match check(&file) {
            Err(fault) => fault,
            Ok(()) => panic!("seed {seed}: {how} in line {line}, and the file passes"),
        };
        // Never before the change; after it only where what is missing shows in the line that took its place.
        assert!(
            fault.line == line as u64 || fault.line == line as u64 + 1,
            "seed {seed}: {how} in line {line}, named: {fault}"
        );
        named += 1;
    }
    assert!(named > count * 9 / 10, "{named} of {count}");
}

/// As above, by whoever holds the scheduler's key: hashes, chain and trailer are made to fit again.
#[test]
fn every_forged_record_is_caught_though_the_scheduler_signs_the_file() {
    let count = if std::env::var_os("KAREZ_LONG").is_some() {
        20_000
    } else {
        300
    };
    let postings = all_kinds(1);
    let gists: Vec<Vec<u8>> = postings.iter().map(gist).collect();
    let mut caught = 0;
    for seed in 0..count {
        let mut rng = Rng(seed);
        let mut forged = postings.clone();
        let n = rng.next(forged.len());
        let posting = &mut forged[n];
        if posting.evidence.is_empty() {
            continue;
        }
        let e = rng.next(posting.evidence.len());
        let record = &mut posting.evidence[e];
        let at = rng.next(record.len());
        match rng.next(3) {
            0 => record[at] ^= 1 << rng.next(8),
            1 => drop(record.remove(at)),
            _ => drop(posting.evidence.remove(e)),
        }
        let mut out = Vec::new();
        let secret = scheduler_secret();
        let mut exporter = karez_ledger::Exporter::begin(&mut out, &secret, AT).unwrap();
        let mut accounts = karez_core::money::Accounts::default();
        let mut previous = karez_ledger::book::genesis(scheduler());
        for (seq, posting) in forged.into_iter().enumerate() {
            let entry = Entry {
                seq: seq as u64,
                previous,
                at: AT,
                posting,
                gist: gists[seq].clone(),
                dropped: None,
            };
            previous = entry.hash();
            if let Some((name, limit)) = karez_ledger::report::limit(&entry.posting) {
                accounts.set_limit(name, limit);
            }
            accounts.apply(&entry.posting).unwrap();
            exporter.entry(entry).unwrap();
        }
        exporter.finish(&accounts).unwrap();
        let fault = check(&out).expect_err(&format!("seed {seed}: entry {n}, evidence {e} at {at}"));
        assert_eq!(fault.entry, Some(n as u64), "seed {seed}: {fault}");
        caught += 1;
    }
    assert!(caught > count / 2, "{caught} of {count}");
}

/// Bytes that nobody made: every decoder answers with an error, never with a panic.
#[test]
fn garbage_is_refused_by_every_decoder() {
    let proof = {
        let mut book = Book::new(scheduler());
        let entry = book.append(AT, grant(0, 5)).unwrap();
        let head = karez_ledger::Head::sign(&scheduler_secret(), 1, book.tree().root());
        let proof = karez_ledger::Proof {
            entry: entry.encode(),
            index: 0,
            path: Vec::new(),
            head,
        };
        proof.verify().unwrap();
        proof.to_string()
    };
    let entry = {
        let mut book = Book::new(scheduler());
        all_kinds(1)
            .into_iter()
            .map(|p| book.append(AT, p).unwrap().encode())
            .max_by_key(Vec::len)
            .unwrap()
    };
    let count = if std::env::var_os("KAREZ_LONG").is_some() {
        200_000
    } else {
        4_000
    };
    for seed in 0..count {
        let mut rng = Rng(seed);
        let mutate = |rng: &mut Rng, bytes: &[u8]| {
            let mut bytes = bytes.to_vec();
            for _ in 0..1 + rng.next(4) {
                let at = rng.next(bytes.len());
                match rng.next(4) {
                    0 => bytes[at] ^= 1 << rng.next(8),
                    1 => bytes.truncate(at.max(1)),
                    2 => bytes.insert(at, rng.next(256) as u8),
                    _ => bytes[at] = 0xff,
                }
            }
            bytes
        };
        let bytes = mutate(&mut rng, &entry);
        if let Ok(read) = Entry::decode(&bytes) {
            assert_eq!(read.encode(), bytes, "seed {seed}: an entry has two spellings");
        }
        let text = String::from_utf8_lossy(&mutate(&mut rng, proof.as_bytes())).into_owned();
        if let Ok(read) = karez_ledger::Proof::parse(&text)
            && read.verify().is_ok()
        {
            assert_eq!(read.entry, karez_ledger::Proof::parse(&proof).unwrap().entry);
        }
        let _ = karez_ledger::head::read_heads(&text);
        let random: Vec<u8> = (0..rng.next(200)).map(|_| rng.next(256) as u8).collect();
        let _ = Entry::decode(&random);
        assert!(check(&random).is_err());
    }
}
