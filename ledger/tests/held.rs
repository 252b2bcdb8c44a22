//! Receipts that a counterparty holds: what a scheduler signed and left out of its ledger is found.
#![allow(clippy::unwrap_used)]
mod common;
use base64::{Engine, prelude::BASE64_STANDARD};
use common::*;
use karez_core::{
    money::{Posting, PostingKind},
    unit::UtcMillis,
};
use karez_ledger::{Book, Entry, Held, VerifyOptions, export, held::HeldSummary, verify_each};

fn ledger(postings: Vec<Posting>, drop: bool, created: UtcMillis) -> Vec<u8> {
    let mut book = Book::new(scheduler());
    let entries: Vec<Entry> = postings
        .into_iter()
        .map(|p| book.append(AT, p).unwrap())
        .map(|entry| entry.without_records().filter(|_| drop).unwrap_or(entry))
        .collect();
    let mut out = Vec::new();
    export(
        &mut out,
        &scheduler_secret(),
        created,
        entries.into_iter().map(Ok),
    )
    .unwrap();
    out
}

fn held(postings: &[Posting]) -> String {
    let settled = postings.iter().filter(|p| p.kind == PostingKind::Settle);
    settled
        .map(|p| BASE64_STANDARD.encode(papers(p).1.encode()) + "\n")
        .collect()
}

fn judged(ledger: &[u8], receipts: &str) -> HeldSummary {
    let mut held = Held::default();
    held.read(&mut receipts.as_bytes()).unwrap();
    let options = VerifyOptions::default();
    let summary = verify_each(&mut &*ledger, &options, &mut |entry| {
        held.see(entry);
        Ok(())
    });
    held.finish(&summary.unwrap())
}

#[test]
fn what_was_signed_for_and_left_out_is_found() {
    let all = postings(6);
    let receipts = held(&all);
    let later = UtcMillis(AT.0 + 3_600_000);
    let count = receipts.lines().count() as u64;
    for dropped in [false, true] {
        let whole = judged(&ledger(all.clone(), dropped, later), &receipts.repeat(2));
        assert_eq!((whole.found, whole.missing.len()), (count, 0));
        assert!(whole.credits.0 > 0);
    }
    // The scheduler leaves the last job's work out: sound in itself, and short of what it signed.
    let mut less = all.clone();
    let last = less.iter().rposition(|p| p.kind == PostingKind::Settle).unwrap();
    less.truncate(last);
    let short = judged(&ledger(less.clone(), false, later), &receipts);
    assert_eq!((short.found, short.missing.len()), (count - 1, 1));
    assert_eq!(short.missing[0].id, papers(&all[last]).1.id());
    // An export of before is not to blame, and other schedulers' receipts are theirs.
    let early = judged(&ledger(less, false, UtcMillis(AT.0 + 2_000)), &receipts);
    assert_eq!((early.later, early.missing.len()), (1, 0));
    let mut foreign = Part::of(&order(0, 7, 2_000), 0, 1).evidence().1;
    foreign.scheduler = karez_core::key::SchedulerId(user(1).0);
    let foreign = karez_core::records::Signed::sign(foreign, &user_secret(1));
    let text = BASE64_STANDARD.encode(foreign.encode());
    assert_eq!(judged(&ledger(all, false, later), &text).others, 1);
}

#[test]
fn a_bad_line_is_named() {
    let good = held(&postings(1));
    let flipped = {
        let mut bytes = BASE64_STANDARD.decode(good.lines().next().unwrap()).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        BASE64_STANDARD.encode(bytes)
    };
    for (bad, expected) in [
        ("not base64!".to_owned(), "line 3: not a receipt"),
        (flipped, "line 3: karez.receipt.v1 signed by"),
        ("A".repeat(9_000), "line 3: not a receipt"),
    ] {
        let text = format!("{good}\n{bad}\n");
        let error = Held::default()
            .read(&mut text.as_bytes())
            .unwrap_err()
            .to_string();
        assert!(error.starts_with(expected), "{error}");
    }
}
