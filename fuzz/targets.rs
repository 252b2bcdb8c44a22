//! What fuzzers throw bytes at. Each target panics when a decoder breaks a promise; errors are fine.
//!
//! `cargo +nightly fuzz run entry` (from the repository's root) runs one without end; `ledger/tests/fuzz.rs` runs all of
//! them for a moment in every `make test`, longer with `KAREZ_LONG=1`.
#![allow(dead_code, clippy::unwrap_used, missing_docs, unreachable_pub)]
use karez_core::records::{
    Acceptance, CreditLimit, Delegation, Dispute, Grant, Invitation, Lease, MeterReading, Offer, Order,
    Payment, RateCard, Receipt, Record, Ruling, Signed, Usage, describe, is_canonical, to_check,
};
use karez_ledger::{
    Entry, Proof, VerifyOptions, compare,
    head::{Head, read_heads},
    note::Note,
    verify,
};

/// A name and what takes bytes.
pub type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const ALL: [Target; 5] = [
    ("record", record),
    ("entry", entry),
    ("note", note),
    ("proof", proof),
    ("export", export),
];

/// An envelope of any type.
pub fn record(bytes: &[u8]) {
    one::<Acceptance>(bytes);
    one::<CreditLimit>(bytes);
    one::<Delegation>(bytes);
    one::<Dispute>(bytes);
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
        assert_eq!((checked.id, checked.signer), (id, signer));
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
