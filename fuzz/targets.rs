//! What fuzzers throw bytes at. Each target panics when a decoder breaks a promise; errors are fine.
//!
//! `cargo +nightly fuzz run entry` (from the repository's root) runs one without end; `ledger/tests/fuzz.rs` runs all of
//! them for a moment in every `make test`, longer with `KAREZ_LONG=1`.
#![allow(dead_code, clippy::unwrap_used, missing_docs, unreachable_pub)]
use karez_core::{
    id::Digest,
    records::{
        Acceptance, CreditLimit, Delegation, Dispute, Floors, Grant, Invitation, Lease, MeterReading, Offer,
        Order, Payment, RateCard, Receipt, Record, Ruling, Signed, Usage, describe, is_canonical, to_check,
    },
};
use karez_ledger::{
    Entry, Proof, VerifyOptions, compare,
    head::{Head, read_heads},
    inside,
    journal::Journal,
    note::Note,
    verify,
};
use std::sync::atomic::{AtomicU64, Ordering};

/// A name and what takes bytes.
pub type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const ALL: [Target; 8] = [
    ("record", record),
    ("entry", entry),
    ("note", note),
    ("proof", proof),
    ("export", export),
    ("journal", journal),
    ("change", change),
    ("book", book),
];

/// An envelope of any type.
pub fn record(bytes: &[u8]) {
    one::<Acceptance>(bytes);
    one::<CreditLimit>(bytes);
    one::<Delegation>(bytes);
    one::<Dispute>(bytes);
    one::<Floors>(bytes);
    one::<Grant>(bytes);
    one::<Invitation>(bytes);
    one::<Lease>(bytes);
    one::<MeterReading>(bytes);
    one::<Offer>(bytes);
    one::<Order>(bytes);
    one::<Payment>(bytes);
    one::<RateCard>(bytes);
    one::<Receipt>(bytes);
    one::<Ruling>(bytes);
    one::<Usage>(bytes);
    if is_canonical(bytes) {
        let (_, id, signer) = describe(bytes).expect("a canonical envelope can be described");
        let checked = to_check(bytes).expect("and checked");
        assert_eq!((Digest::of(&checked.message), checked.signer), (id, signer));
    }
}

fn one<T: Record>(bytes: &[u8]) {
    let Ok(signed) = Signed::<T>::decode(bytes) else {
        return;
    };
    let again = signed.encode();
    assert_eq!(
        again == bytes,
        is_canonical(bytes),
        "one canonical form, no more and no less"
    );
    assert!(is_canonical(&again));
    let id = describe(bytes).map(|(_, id, _)| id);
    assert_eq!(
        describe(&again).map(|(_, id, _)| id),
        id,
        "the same record has the same id"
    );
    if let Ok(verified) = signed.verify() {
        assert_eq!(Some(verified.id()), id);
        assert_eq!(Signed::<T>::open(&verified.encode()).unwrap().id(), verified.id());
    }
}

/// An entry as it is hashed and kept.
pub fn entry(bytes: &[u8]) {
    let Ok(entry) = Entry::decode(bytes) else {
        return;
    };
    assert_eq!(entry.encode(), bytes, "an entry has one spelling");
    if let Some(less) = entry.without_records() {
        assert_eq!(less.hash(), entry.hash(), "dropping records changes no hash");
        assert_eq!(Entry::decode(&less.encode()).as_ref(), Ok(&less));
    }
}

/// A signed note, a head, a file of heads.
pub fn note(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    if let Ok(note) = Note::parse(&text) {
        assert_eq!(
            Note::parse(&note.to_string()).unwrap().to_string(),
            note.to_string()
        );
    }
    if let Ok(head) = Head::parse(&text) {
        assert_eq!(Head::parse(&head.to_string()).unwrap(), head);
    }
    let _ = read_heads(&text);
}

/// A proof of inclusion with its entry and head.
pub fn proof(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let Ok(proof) = Proof::parse(&text) else {
        return;
    };
    assert_eq!(Proof::parse(&proof.to_string()).as_ref(), Ok(&proof));
    if let Ok(entry) = proof.verify() {
        assert_eq!(entry.seq, proof.index);
        assert!(proof.head.size > proof.index);
    }
}

/// A whole export.
pub fn export(mut bytes: &[u8]) {
    let whole = bytes;
    let verified = verify(&mut bytes, &VerifyOptions::default());
    if let Ok(summary) = verified {
        // What was accepted is one history: it equals itself and its head is its own.
        assert_eq!(summary.tree_head.size, summary.entries);
    }
    let _ = compare(&mut &*whole, &mut &*whole);
}

/// A whole journal: what is read of it is its beginning, frame by frame, and reading it again gives the same.
pub fn journal(bytes: &[u8]) {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("karez-fuzz-{}-{number}", std::process::id()));
    std::fs::write(&path, bytes).unwrap();
    let read = || {
        let mut again = Vec::new();
        let opened = Journal::open(&path, &mut |frame| {
            assert_eq!(frame.offset, again.len() as u64, "frames leave no gap");
            inside::frame(&mut again, frame.number, &frame.payload);
            Ok(())
        });
        let (journal, scan) = opened.unwrap();
        (again, scan, journal.bytes())
    };
    let (frames, scan, length) = read();
    assert!(bytes.starts_with(&frames), "a frame has one spelling");
    match (scan.torn, scan.damage) {
        (None, None) => assert_eq!(frames.len(), bytes.len()),
        (Some(torn), None) => {
            assert_eq!((torn.offset, length), (frames.len() as u64, frames.len() as u64));
            assert_eq!(torn.offset + torn.bytes, bytes.len() as u64);
        }
        (None, Some(damage)) => {
            assert_eq!((damage.offset, length), (frames.len() as u64, bytes.len() as u64));
        }
        both => panic!("{both:?}"),
    }
    let (again, twice, _) = read();
    assert_eq!(again, frames);
    assert_eq!(
        (twice.torn, twice.damage),
        (None, scan.damage),
        "nothing is cut twice"
    );
    std::fs::remove_file(&path).unwrap();
}

/// What a frame of the journal holds.
pub fn change(bytes: &[u8]) {
    if let Some(again) = inside::change(bytes) {
        // The one field that says less than its byte could: whether there is a scheduler.
        assert_eq!(inside::change(&again), Some(again.clone()));
        assert_eq!(again.len(), bytes.len());
    }
}

/// The state of a book beside its journal.
pub fn book(bytes: &[u8]) {
    let Some(book) = inside::book(bytes) else {
        return;
    };
    let written = inside::book_bytes(&book).expect("it has a scheduler");
    assert_eq!(
        inside::book(&written),
        Some(book),
        "what is written is what is read"
    );
}
