//! Records that are long over can go; every hash, proof, balance and sum stays, and nothing settles twice.
#![allow(clippy::unwrap_used)]
mod common;
use common::*;
use karez_core::{
    money::PostingKind,
    records::{Receipt, Signed},
    unit::UtcMillis,
};
use karez_ledger::{
    Book, Entry, FaultKind, Head, Op, Options, Relation, Transaction, VerifyOptions, Writer, compare, export,
    forget,
    report::{Form, FormWriter, Month, Pseudonyms, StatementBuilder},
    verify, verify_each,
};
use std::path::Path;

fn open(dir: &Path) -> Writer {
    let options = Options {
        scheduler: Some(scheduler()),
        ..Options::default()
    };
    let (writer, recovered) = Writer::open(dir, options).unwrap();
    assert_eq!(recovered.report, Vec::<String>::new());
    writer
}

fn post(writer: &Writer, postings: impl IntoIterator<Item = karez_core::money::Posting>) {
    let ops = postings.into_iter().map(|p| Op::Post(p, AT)).collect();
    writer.commit_blocking(Transaction { ops }).unwrap();
}

fn exported(writer: &Writer) -> Vec<u8> {
    let mut out = Vec::new();
    export(&mut out, &scheduler_secret(), AT, writer.entries(0)).unwrap();
    out
}

/// After every window of these tests.
const LATER: UtcMillis = UtcMillis(AT.0 + 10_000_000);

/// A ledger of all kinds, and at its end a job that is still open.
fn filled(dir: &Path) -> Writer {
    let writer = open(dir);
    post(&writer, all_kinds(4));
    let last = order(0, 4_711, 1_000_000);
    post(
        &writer,
        [reserve(&last, 1_000_000), Part::of(&last, 0, 1).settle()],
    );
    writer
}

fn statement(file: &[u8], name: &str) -> String {
    let month = Month::of(AT);
    let mut builder = StatementBuilder::new(name.parse().unwrap(), month);
    let summary = verify_each(&mut &*file, &VerifyOptions::default(), &mut |entry| {
        builder.take(entry);
        Ok(())
    });
    builder.finish(&summary.unwrap().tree_head).0.text()
}

#[test]
fn what_is_dropped_leaves_every_proof_and_sum() {
    let dir = tempfile::tempdir().unwrap();
    let writer = filled(dir.path());
    let (before, head, accounts) = (exported(&writer), writer.head(), writer.accounts());
    let full = verify(&mut &*before, &VerifyOptions::default()).unwrap();
    assert_eq!(full.dropped, 0);
    let (size, root) = writer.tree();
    let receipts: Vec<_> = writer
        .entries(0)
        .map(Result::unwrap)
        .filter(|e| e.posting.kind == PostingKind::Settle)
        .map(|e| {
            Signed::<Receipt>::open(e.posting.evidence.last().unwrap())
                .unwrap()
                .id()
        })
        .collect();
    let (dropped, staying): (Vec<Entry>, Vec<Entry>) = writer
        .entries(0)
        .map(Result::unwrap)
        .partition(|e| e.without_records().is_some() && e.seq + 2 < size);
    // A dispute keeps its lease and its receipt.
    let staying: Vec<Vec<u8>> = staying.into_iter().flat_map(|e| e.posting.evidence).collect();
    drop(writer);

    // Windows are open at first, and nothing is old enough.
    assert_eq!(
        forget(dir.path(), scheduler(), UtcMillis(AT.0 + 1), AT)
            .unwrap()
            .entries,
        5
    );
    assert_eq!(forget(dir.path(), scheduler(), AT, LATER).unwrap().entries, 0);
    let done = forget(dir.path(), scheduler(), UtcMillis(AT.0 + 1), LATER).unwrap();
    assert!(done.entries > 5 && done.bytes > 10_000, "{done:?}");
    // The open job keeps its order and its settlement.
    assert_eq!(done.kept, 2, "{done:?}");
    assert_eq!(
        forget(dir.path(), scheduler(), UtcMillis(AT.0 + 1), LATER)
            .unwrap()
            .entries,
        0
    );

    // Nothing of what was dropped is anywhere in the directory any more.
    let gone: Vec<&Vec<u8>> = dropped.iter().flat_map(|e| &e.posting.evidence).collect();
    let kept = files(dir.path());
    for record in gone {
        let signature = &record[record.len() - 64..];
        assert!(staying.contains(record) || kept.iter().all(|file| count(file, signature) == 0));
    }
    // Also when what follows from the entries has to be made anew from them.
    for lost in ["", "book", "tree"] {
        if !lost.is_empty() {
            std::fs::remove_file(dir.path().join(lost)).unwrap();
        }
        let options = Options {
            scheduler: Some(scheduler()),
            ..Options::default()
        };
        let (writer, _) = Writer::open(dir.path(), options).unwrap();
        assert_eq!((writer.head(), writer.tree()), (head, (size, root)));
        assert_eq!(writer.accounts(), accounts);
        let after = exported(&writer);
        let less = verify(&mut &*after, &VerifyOptions::default()).unwrap();
        assert_eq!(less.dropped, done.entries + 5);
        assert_eq!(
            (less.balances, less.settled, &less.institutions),
            (full.balances, full.settled, &full.institutions)
        );
        // Statements and netting are the same; forms have what is left and say what is not.
        for name in ["uni-0", "uni-1", "uni-nairobi", "uni-lagos"] {
            assert_eq!(statement(&before, name), statement(&after, name));
        }
        let mut out = Vec::new();
        let names = Pseudonyms::new(b"x");
        let mut form = FormWriter::begin(&mut out, Form::Csv, names, None, None).unwrap();
        verify_each(&mut &*after, &VerifyOptions::default(), &mut |entry| {
            form.take(entry)
        })
        .unwrap();
        assert_eq!(form.dropped() + 1, receipts.len() as u64);
        assert_eq!(form.finish().unwrap(), 1);
        // The older whole copy shows that it is the same history.
        assert_eq!(compare(&mut &*after, &mut &*before).unwrap(), Relation::Same);
        let whole = VerifyOptions {
            whole: true,
            ..VerifyOptions::default()
        };
        verify(&mut &*before, &whole).unwrap();
        let refused = verify(&mut &*after, &whole).unwrap_err();
        assert!(matches!(*refused.kind, FaultKind::Dropped), "{refused}");
        // Receipts are found and proven as before.
        for receipt in &receipts {
            let at = writer.find(receipt).unwrap().unwrap();
            let proof = writer
                .prove(at, Head::sign(&scheduler_secret(), size, root))
                .unwrap()
                .unwrap();
            proof.verify().unwrap();
        }
    }
}

fn files(dir: &Path) -> Vec<Vec<u8>> {
    let mut out = Vec::new();
    for item in std::fs::read_dir(dir).unwrap().flatten() {
        match item.metadata().unwrap().is_dir() {
            true => out.extend(files(&item.path())),
            false => out.push(std::fs::read(item.path()).unwrap()),
        }
    }
    out
}

fn count(bytes: &[u8], wanted: &[u8]) -> usize {
    bytes.windows(wanted.len()).filter(|w| *w == wanted).count()
}

#[test]
fn what_was_dropped_settles_no_second_time() {
    let dir = tempfile::tempdir().unwrap();
    let writer = open(dir.path());
    let job = order(0, 1, 1_000_000);
    let settled = Part::of(&job, 0, 1).settle();
    let paid = settled.legs[1].1 as u64;
    let accepted = accept(&settled, 0, |_| {});
    post(
        &writer,
        [grant(0, 2_000_000), reserve(&job, 1_000_000), settled.clone()],
    );
    post(&writer, [accepted.clone(), release(&job, 1_000_000 - paid)]);
    drop(writer);
    let done = forget(dir.path(), scheduler(), UtcMillis(AT.0 + 1), LATER).unwrap();
    assert_eq!((done.entries, done.kept), (3, 0));
    // From the entries alone, without what the snapshot remembers.
    std::fs::remove_file(dir.path().join("book")).unwrap();
    let writer = open(dir.path());
    for (posting, why) in [
        (settled, "has been settled before"),
        (reserve(&job, 1_000_000), "has reserved its credits before"),
        (accepted, "accepted or disputed before"),
    ] {
        let ops = vec![Op::Post(posting, AT)];
        let refused = writer
            .commit_blocking(Transaction { ops })
            .unwrap_err()
            .to_string();
        assert!(refused.contains(why), "{refused}");
    }
}

/// Whoever holds the scheduler's key cannot make what is left say something else.
#[test]
fn a_changed_gist_or_leg_of_a_dropped_entry_is_noticed() {
    let mut book = Book::new(scheduler());
    let entries: Vec<Entry> = all_kinds(1)
        .into_iter()
        .map(|p| book.append(AT, p).unwrap())
        .map(|e| e.without_records().unwrap_or(e))
        .collect();
    let file = |entries: &[Entry]| {
        let mut out = Vec::new();
        let secret = scheduler_secret();
        let mut exporter = karez_ledger::Exporter::begin(&mut out, &secret, AT).unwrap();
        for entry in entries {
            exporter.entry(entry.clone()).unwrap();
        }
        exporter.finish(book.accounts()).unwrap();
        out
    };
    let published = Head::sign(&scheduler_secret(), book.entries(), book.tree().root());
    let options = VerifyOptions::default().with_heads([published]);
    verify(&mut &*file(&entries), &options).unwrap();
    let mut tried = 0;
    for (n, entry) in entries.iter().enumerate().filter(|(_, e)| e.dropped.is_some()) {
        for at in 0..entry.gist.len() {
            let mut forged = entries.clone();
            forged[n].gist[at] ^= 1;
            // The chain after it is mended by the forger; the published head is not.
            let mut previous = forged[n].hash();
            for next in &mut forged[n + 1..] {
                next.previous = previous;
                previous = next.hash();
            }
            let fault = verify(&mut &*file(&forged), &options).unwrap_err();
            assert!(fault.entry.unwrap() >= n as u64, "{fault}");
            tried += 1;
        }
    }
    assert!(tried > 200, "{tried}");
    // A kind whose records must stay may not do without.
    let rates = entries
        .iter()
        .position(|e| e.posting.kind == PostingKind::Rates)
        .unwrap();
    let mut forged = entries.clone();
    forged[rates].dropped = Some(karez_core::id::Digest([7; 32]));
    forged[rates].posting.evidence.clear();
    let fault = verify(&mut &*file(&forged), &VerifyOptions::default()).unwrap_err();
    assert_eq!(fault.entry, Some(rates as u64), "{fault}");
}
