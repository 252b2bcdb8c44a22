//! The durable writer with both indexes: transactions, refusals, reopening, compaction, proofs.
#![allow(clippy::unwrap_used)]
mod common;
#[path = "common/durable.rs"]
mod durable;

use common::*;
use durable::*;
use karez_core::{
    id::JobId,
    money::{Account, Posting},
};
use karez_ledger::{Book, Op, Options, StoreError, Writer, store::SledStore};
use std::{fs, path::Path, thread, time::Duration};

#[test]
fn rows_and_entries_survive_reopening() {
    for (name, index) in INDEXES {
        let dir = tempfile::tempdir().unwrap();
        let mut book = Book::new(scheduler());
        {
            let (writer, recovered) = open(dir.path(), options(), index);
            assert_eq!(recovered.book.entries(), 0);
            for (i, posting) in postings(4).into_iter().enumerate() {
                let entry = book.append(AT, posting.clone()).unwrap();
                let done = writer
                    .commit_blocking(tx([
                        put(&format!("k{i}"), "v"),
                        post(posting),
                        put("last", i.to_string()),
                    ]))
                    .unwrap();
                assert_eq!((done.number, done.entries[0].seq), (i as u64 + 1, entry.seq));
                assert_eq!(done.entries[0].hash, book.head());
            }
            writer
                .commit_blocking(tx([delete("k0"), delete("never")]))
                .unwrap();
            assert_eq!(writer.head(), (book.entries(), book.head()));
            assert_eq!(writer.accounts(), *book.accounts());
        }
        let (writer, recovered) = open(dir.path(), options(), index);
        assert_eq!(recovered.report, Vec::<String>::new(), "{name}");
        assert_eq!(recovered.book.head(), book.head());
        let rows = rows(&recovered);
        assert_eq!(rows.len() as u64, book.entries());
        assert!(!rows.contains_key("k0"));
        assert_eq!(rows["last"], (book.entries() - 1).to_string().into_bytes());
        let mut copy = Book::new(scheduler());
        for entry in writer.entries(0) {
            copy.replay(&entry.unwrap()).unwrap();
        }
        assert_eq!(copy.head(), book.head());
        let tail: Vec<_> = writer.entries(book.entries() - 2).map(Result::unwrap).collect();
        assert_eq!(tail.len(), 2);
    }
}

#[test]
fn compaction_keeps_everything_and_bounds_the_journal() {
    for (name, index) in INDEXES {
        let dir = tempfile::tempdir().unwrap();
        let mut book = Book::new(scheduler());
        let mut largest = 0;
        for round in 0..3 {
            let (writer, recovered) = open(dir.path(), small_journal(), index);
            assert_eq!(recovered.report, Vec::<String>::new(), "{name}");
            assert_eq!(recovered.book.head(), book.head(), "{name}");
            assert_eq!(rows(&recovered).len(), if round == 0 { 0 } else { 5 });
            for i in 0..40 {
                let posting = grant(i % 3, 10);
                book.append(AT, posting.clone()).unwrap();
                let key = format!("k{}", i % 5);
                writer
                    .commit_blocking(tx([post(posting), put(&key, vec![i; 2_000])]))
                    .unwrap();
                largest = largest.max(journal_bytes(dir.path()));
            }
            assert_eq!(writer.entries(0).count() as u64, book.entries());
        }
        assert!(largest < 100_000, "{name}: {largest}");
        let (_writer, recovered) = open(dir.path(), small_journal(), index);
        assert_eq!(rows(&recovered)["k4"], vec![39; 2_000]);
    }
}

fn journal_bytes(dir: &Path) -> u64 {
    let files = fs::read_dir(dir).unwrap().flatten();
    let journals = files.filter(|f| f.file_name().to_string_lossy().starts_with("journal-"));
    journals.map(|f| f.metadata().map_or(0, |m| m.len())).sum()
}

#[test]
fn a_refused_posting_refuses_its_transaction_only() {
    let dir = tempfile::tempdir().unwrap();
    let order = order(0, 1, 10_000_000);
    {
        let (writer, _) = open(dir.path(), options(), SledStore::open);
        writer.commit_blocking(tx([post(grant(0, 100))])).unwrap();
        let error = writer
            .commit_blocking(tx([put("a", "1"), post(grant(0, 5)), post(reserve(&order, 200))]))
            .unwrap_err();
        assert!(matches!(error, StoreError::Refused(_)), "{error}");
        assert!(error.to_string().contains("has 105 micro-credits"), "{error}");
        assert_eq!(writer.balance(&Account::User(user(0))), 100);
        writer.commit_blocking(tx([post(reserve(&order, 100))])).unwrap();
        for (what, op) in [
            ("long key", put(&"k".repeat(5_000), "v")),
            ("long value", put("k", vec![0; 3 << 20])),
            (
                "no table",
                Op::Delete {
                    table: "",
                    key: vec![],
                },
            ),
            (
                "bad table",
                Op::Delete {
                    table: "a\0b",
                    key: vec![],
                },
            ),
        ] {
            assert!(writer.commit_blocking(tx([put("b", "2"), op])).is_err(), "{what}");
        }
    }
    let (writer, recovered) = open(dir.path(), options(), SledStore::open);
    assert!(rows(&recovered).is_empty());
    assert_eq!(writer.balance(&Account::Escrow(JobId(order.id()))), 100);
    assert_eq!(writer.head().0, 2);
}

#[test]
fn concurrent_commits_are_all_there_and_money_is_conserved() {
    for (name, index) in INDEXES {
        let dir = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .build()
            .unwrap();
        let (refused, head) = runtime.block_on(async {
            let (writer, _) = open(dir.path(), options(), index);
            let mut tasks = Vec::new();
            for n in 0..64u8 {
                let writer = writer.clone();
                tasks.push(tokio::spawn(async move {
                    let mut refused = 0;
                    for i in 0..6u64 {
                        let key = format!("{n}/{i}");
                        // Every third asks for more than anybody can have.
                        let op = if i % 3 == 2 {
                            post(reserve(&order(n, u64::from(n) * 100 + i, 1 << 60), 1 << 60))
                        } else {
                            post(grant(n, 10))
                        };
                        match writer.commit(tx([put(&key, "x"), op])).await {
                            Ok(_) => {}
                            Err(StoreError::Refused(_)) => refused += 1,
                            Err(other) => panic!("{other}"),
                        }
                    }
                    refused
                }));
            }
            let mut refused = 0;
            for task in tasks {
                refused += task.await.unwrap();
            }
            assert_eq!(writer.accounts().sum(), 0);
            (refused, writer.head())
        });
        assert_eq!((refused, head.0), (128, 256), "{name}");
        let (_writer, recovered) = open(dir.path(), options(), index);
        assert_eq!((recovered.book.entries(), recovered.book.head()), head);
        assert_eq!(rows(&recovered).len(), 256);
    }
}

#[test]
fn one_process_and_one_ledger_per_directory() {
    let dir = tempfile::tempdir().unwrap();
    let (writer, _) = open(
        dir.path(),
        Options {
            scheduler: None,
            ..options()
        },
        SledStore::open,
    );
    let error = writer.commit_blocking(tx([post(grant(0, 1))])).unwrap_err();
    assert!(error.to_string().contains("keeps no ledger"), "{error}");
    writer.commit_blocking(tx([put("a", "1")])).unwrap();
    let error = Writer::open(dir.path(), options()).unwrap_err().to_string();
    assert!(
        error.contains(&dir.path().display().to_string()) && error.contains("in use"),
        "{error}"
    );
    drop(writer);
    // A node's directory becomes a scheduler's: what was there stays.
    let (writer, recovered) = open(dir.path(), options(), SledStore::open);
    assert_eq!(rows(&recovered).len(), 1);
    writer.commit_blocking(tx([post(grant(0, 1))])).unwrap();
    drop((writer, recovered));
    for other in [None, Some(karez_core::key::SchedulerId(user(0).0))] {
        let error = Writer::open(
            dir.path(),
            Options {
                scheduler: other,
                ..options()
            },
        )
        .unwrap_err();
        assert!(matches!(error, StoreError::OtherLedger { .. }), "{error}");
    }
    assert_eq!(open(dir.path(), options(), SledStore::open).0.head().0, 1);
}

#[test]
fn a_holder_on_its_way_out_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let (writer, recovered) = open(dir.path(), options(), SledStore::open);
    writer.commit_blocking(tx([post(grant(0, 1))])).unwrap();
    let leaving = thread::spawn(move || {
        thread::sleep(Duration::from_millis(100));
        drop((writer, recovered));
    });
    assert_eq!(open(dir.path(), options(), SledStore::open).0.head().0, 1);
    leaving.join().unwrap();
}

/// A ledger with an entry of every kind, and with a job, a grant and a dispute still open.
fn with_open_ends() -> (Vec<Posting>, Book) {
    let mut postings = all_kinds(3);
    postings.push(fund(&grant_record(77, |g| g.nonce = 9)));
    let open = order(2, 555, 5_000);
    postings.push(reserve(&open, 5_000));
    let settled = Part::of(&open, 0, 1).settle();
    postings.push(settled.clone());
    postings.push(dispute(&settled, 2, |_| {}).0);
    let mut book = Book::new(scheduler());
    for posting in &postings {
        book.append(AT, posting.clone()).unwrap();
    }
    (postings, book)
}

#[test]
fn the_book_is_the_same_from_its_snapshot_and_without_it() {
    for (name, index) in INDEXES {
        let dir = tempfile::tempdir().unwrap();
        let (postings, book) = with_open_ends();
        {
            let (writer, _) = open(dir.path(), options(), index);
            for posting in postings {
                writer.commit_blocking(tx([post(posting)])).unwrap();
            }
        }
        let snapshot = dir.path().join("book");
        let whole = fs::read(&snapshot).unwrap();
        let again = || {
            let (writer, recovered) = open(dir.path(), options(), index);
            assert_eq!(recovered.report, Vec::<String>::new(), "{name}");
            assert_eq!(recovered.book, book, "{name}");
            assert_eq!(writer.tree(), (book.entries(), book.tree().root()));
        };
        again();
        // Damaged, cut, gone: made from the entries again.
        for at in (0..whole.len()).step_by(whole.len() / 7) {
            let mut bad = whole.clone();
            bad[at] ^= 1;
            fs::write(&snapshot, &bad).unwrap();
            again();
        }
        fs::write(&snapshot, &whole[..whole.len() / 2]).unwrap();
        again();
        fs::remove_file(&snapshot).unwrap();
        again();
        // Of another history: as a whole file from elsewhere would be.
        let other = tempfile::tempdir().unwrap();
        {
            let (writer, _) = open(other.path(), options(), index);
            writer.commit_blocking(tx([post(grant(5, 3))])).unwrap();
        }
        fs::copy(other.path().join("book"), &snapshot).unwrap();
        again();
    }
}

#[test]
fn proofs_hold_and_their_files_are_put_back() {
    let dir = tempfile::tempdir().unwrap();
    let (postings, book) = with_open_ends();
    let receipt = postings
        .iter()
        .position(|p| p.kind == karez_core::money::PostingKind::Settle)
        .unwrap();
    let id = papers(&postings[receipt]).1.id();
    {
        let (writer, _) = open(dir.path(), options(), SledStore::open);
        for posting in postings {
            writer.commit_blocking(tx([post(posting)])).unwrap();
        }
    }
    let check = |repaired: bool| {
        let (writer, recovered) = open(dir.path(), options(), SledStore::open);
        assert_eq!(
            recovered.report.len(),
            usize::from(repaired),
            "{:?}",
            recovered.report
        );
        let (size, root) = writer.tree();
        assert_eq!((size, root), (book.entries(), book.tree().root()));
        assert_eq!(writer.find(&id).unwrap(), Some(receipt as u64));
        assert_eq!(writer.find(&karez_core::id::Digest([9; 32])).unwrap(), None);
        for index in 0..size {
            let head = karez_ledger::Head::sign(&scheduler_secret(), size, root);
            let proof = writer.prove(index, head).unwrap().unwrap();
            assert_eq!(proof.verify().unwrap().seq, index);
        }
        for old in 0..=size {
            let before = writer.root_at(old).unwrap().unwrap();
            let path = writer.prove_consistency(old, size).unwrap().unwrap();
            karez_ledger::tree::verify_consistency((old, before), (size, root), &path).unwrap();
        }
        assert_eq!(writer.prove_consistency(1, size + 1).unwrap(), None);
    };
    check(false);
    for name in ["tree", "records"] {
        let path = dir.path().join(name);
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..whole.len() / 2]).unwrap();
        check(true);
        assert_eq!(fs::read(&path).unwrap(), whole);
        fs::remove_file(&path).unwrap();
        // Gone without a trace, as in a directory from before there were such files: nothing to report.
        check(false);
        assert_eq!(fs::read(&path).unwrap(), whole);
    }
}

#[test]
fn a_hundred_at_once_on_a_balance_for_ten_are_exactly_ten() {
    let dir = tempfile::tempdir().unwrap();
    let (writer, _) = open(dir.path(), options(), SledStore::open);
    writer.commit_blocking(tx([post(grant(0, 1_000))])).unwrap();
    let taken = std::thread::scope(|scope| {
        let tries: Vec<_> = (0..100)
            .map(|nonce| {
                let writer = writer.clone();
                scope.spawn(move || {
                    let posting = reserve(&order(0, nonce, 100), 100);
                    match writer.commit_blocking(tx([post(posting)])) {
                        Ok(_) => true,
                        Err(StoreError::Refused(why)) => {
                            assert!(why.to_string().contains("the posting takes 100"), "{why}");
                            false
                        }
                        Err(other) => panic!("{other}"),
                    }
                })
            })
            .collect();
        tries
            .into_iter()
            .map(|t| t.join().unwrap())
            .filter(|taken| *taken)
            .count()
    });
    assert_eq!(taken, 10);
    assert_eq!(writer.balance(&Account::User(user(0))), 0);
    assert_eq!(writer.accounts().sum(), 0);
}
