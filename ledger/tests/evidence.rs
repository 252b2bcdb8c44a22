//! The rules of postings, one wrong record at a time.
#![allow(clippy::unwrap_used)]
mod common;
use common::*;
use karez_core::{
    id::Digest,
    money::{Account, Posting, PostingKind},
    records::{Delegation, Flag, Order, Outcome, Verified},
    unit::{Credits, DeviceMillis},
};
use karez_ledger::{Book, Entry};

fn book_with(order: &Verified<Order>) -> Book {
    let mut book = Book::new(scheduler());
    book.append(AT, grant(0, 1_000_000_000)).unwrap();
    book.append(AT, reserve(order, 10_000_000)).unwrap();
    book
}

#[test]
fn a_whole_job_passes_and_money_is_conserved() {
    let mut book = Book::new(scheduler());
    let mut copy = Book::new(scheduler());
    let mut disk = Book::new(scheduler());
    for posting in postings(9) {
        let entry = book.append(AT, posting).unwrap();
        let decoded = Entry::decode(&entry.encode()).unwrap();
        assert_eq!(decoded, entry);
        copy.replay(&decoded).unwrap();
        disk.recall(&decoded).unwrap();
        assert_eq!(book.accounts().sum(), 0);
    }
    assert_eq!((book.head(), book.entries()), (copy.head(), copy.entries()));
    assert_eq!((book.head(), book.accounts()), (disk.head(), disk.accounts()));
}

#[test]
fn each_broken_record_is_refused_by_name() {
    let order = order(0, 1, 10_000_000);
    type Spoil = fn(&mut Part<'_>);
    let cases: &[(&str, Spoil, &str)] = &[
        (
            "other job",
            |p| p.lease = Box::new(|l| l.job.0 = Digest::of(b"x")),
            "job is",
        ),
        (
            "other scheduler",
            |p| p.lease = Box::new(|l| l.scheduler.0 = user(1).0),
            "scheduler is",
        ),
        (
            "too many items",
            |p| p.lease = Box::new(|l| l.items = 1_001),
            "covers items",
        ),
        (
            "wrong key for the lease",
            |p| p.node_signs = secret(99),
            "is signed by",
        ),
        (
            "reading of another lease",
            |p| p.reading = Box::new(|r| r.lease = Digest::of(b"x")),
            "lease is",
        ),
        (
            "gap in the readings",
            |p| p.reading = Box::new(|r| r.sequence += u32::from(r.sequence == 1)),
            "sequence is 2",
        ),
        (
            "unchained reading",
            |p| p.reading = Box::new(|r| r.previous = None),
            "does not name the reading before",
        ),
        (
            "first reading has a predecessor",
            |p| p.reading = Box::new(|r| r.previous = Some(Digest::of(b"x"))),
            "does not name",
        ),
        (
            "falling meter",
            |p| {
                p.reading = Box::new(|r| {
                    if r.sequence == 2 {
                        r.meters.device_ms.0 = 1
                    }
                })
            },
            "a meter is lower",
        ),
        (
            "falling bytes",
            |p| p.reading = Box::new(|r| r.meters.bytes_out.0 = u64::from(r.sequence == 0)),
            "a meter is lower",
        ),
        (
            "energy that falls silent",
            |p| p.reading = Box::new(|r| r.meters.millijoules = (r.sequence < 2).then_some(5)),
            "a meter is lower",
        ),
        ("no readings", |p| p.readings = 0, "at least one reading"),
        (
            "usage of another lease",
            |p| p.usage = Box::new(|u| u.lease = Digest::of(b"x")),
            "lease is",
        ),
        (
            "usage names another reading",
            |p| p.usage = Box::new(|u| u.last_reading = Digest::of(b"x")),
            "last_reading is",
        ),
        (
            "usage hides a reading",
            |p| p.usage = Box::new(|u| u.readings = 2),
            "readings is 2",
        ),
        (
            "usage inflates",
            |p| p.usage = Box::new(|u| u.meters.device_ms.0 += 1),
            "meters differ",
        ),
        (
            "receipt of another usage",
            |p| p.receipt = Box::new(|r| r.usage = Digest::of(b"x")),
            "usage is",
        ),
        (
            "receipt of another lease",
            |p| p.receipt = Box::new(|r| r.lease = Digest::of(b"x")),
            "lease is",
        ),
        (
            "receipt of another order",
            |p| p.receipt = Box::new(|r| r.job.0 = Digest::of(b"x")),
            "order is",
        ),
        (
            "receipt for another node",
            |p| p.receipt = Box::new(|r| r.node.0 = user(1).0),
            "node is",
        ),
        (
            "receipt pays another institution",
            |p| p.receipt = Box::new(|r| r.node_institution = "uni-9".parse().unwrap()),
            "node_institution is",
        ),
        (
            "receipt charges another user",
            |p| p.receipt = Box::new(|r| r.user = user(1)),
            "user is",
        ),
        (
            "receipt not by the scheduler",
            |p| p.scheduler_signs = secret(99),
            "is signed by",
        ),
        (
            "over the lease",
            |p| {
                p.device_ms = 70_000;
                p.receipt = Box::new(|r| r.credits = Credits(70_000))
            },
            "its lease allows 60000",
        ),
        (
            "over the meter",
            |p| {
                p.receipt = Box::new(|r| {
                    r.billed.0 += 1;
                    r.credits.0 += 1000
                })
            },
            "the usage says 1000",
        ),
        (
            "over the observation",
            |p| p.receipt = Box::new(|r| r.observed = DeviceMillis(999)),
            "the observation says 999",
        ),
        (
            "bills too little time",
            |p| {
                p.receipt = Box::new(|r| {
                    r.billed.0 -= 1;
                    r.credits.0 -= 1000
                })
            },
            "bills 999 device-ms, but 1000 are due",
        ),
        (
            "keeps quiet about a difference",
            |p| {
                p.device_ms = 50_000;
                p.receipt = Box::new(|r| {
                    r.observed.0 = 10_000;
                    r.billed.0 = 10_000;
                    r.credits.0 = 10_000_000
                })
            },
            "lacks the remark longer-than-observed",
        ),
        (
            "remarks on nothing",
            |p| p.receipt = Box::new(|r| r.flags = vec![Flag::OverLease]),
            "has the remark over-lease",
        ),
        (
            "a failed part passes for a finished one",
            |p| {
                p.outcome = Outcome::Failed;
                p.receipt = Box::new(|r| r.flags = Vec::new())
            },
            "lacks the remark not-done",
        ),
        (
            "a failed part counts as work",
            |p| {
                p.outcome = Outcome::Failed;
                p.receipt = Box::new(|r| r.billed.0 = 5)
            },
            "bills 5 device-ms for a part that did not finish",
        ),
        (
            "asks too much",
            |p| p.receipt = Box::new(|r| r.credits.0 += 1),
            "the bill is",
        ),
        (
            "asks too little unflagged",
            |p| p.receipt = Box::new(|r| r.credits.0 -= 1),
            "the bill is",
        ),
        (
            "more than the bill, though flagged",
            |p| {
                p.receipt = Box::new(|r| {
                    r.flags = vec![Flag::CutToCeiling];
                    r.credits.0 += 1
                })
            },
            "the bill is",
        ),
        (
            "a failed part is paid",
            |p| {
                p.outcome = Outcome::Failed;
                p.receipt = Box::new(|r| r.credits = Credits(5))
            },
            "did not finish",
        ),
    ];
    for (name, spoil, expected) in cases {
        let mut book = book_with(&order);
        let before = (book.head(), book.accounts().clone());
        let mut part = Part::of(&order, 0, 1);
        spoil(&mut part);
        let error = book.append(AT, part.settle()).unwrap_err().to_string();
        assert!(error.contains(expected), "{name}: {error}");
        assert!(
            error.contains("evidence") || error.contains("needs"),
            "{name}: {error}"
        );
        assert_eq!(before, (book.head(), book.accounts().clone()), "{name}");
        book.append(AT, Part::of(&order, 0, 1).settle()).unwrap();
    }
}

#[test]
fn a_cut_bill_passes_when_it_says_so() {
    let order = order(0, 1, 10_000_000);
    let mut part = Part::of(&order, 0, 1);
    part.receipt = Box::new(|r| {
        r.flags = vec![Flag::CutToCeiling];
        r.credits.0 = 7;
    });
    book_with(&order).append(AT, part.settle()).unwrap();
}

#[test]
fn limits_of_the_order_hold() {
    let order = order_with(0, 1, 10_000_000, |o| {
        o.constraints.rate_max = Some(karez_core::unit::Rate(100))
    });
    let mut book = book_with(&order);
    let error = book
        .append(AT, Part::of(&order, 0, 1).settle())
        .unwrap_err()
        .to_string();
    assert!(error.contains("the order allows 100"), "{error}");
    let mut cheap = Part::of(&order, 0, 1);
    cheap.rate = 100;
    book.append(AT, cheap.settle()).unwrap();
}

#[test]
fn what_looks_back() {
    let order = order(0, 1, 10_000_000);
    let mut book = book_with(&order);
    let refuse = |posting: Posting, expected: &str| {
        let error = book.clone().append(AT, posting).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    refuse(reserve(&order, 1), "reserved its credits before");
    refuse(release(&order, 5), "the posting moves");
    let elsewhere = common::order(0, 2, 10_000_000);
    refuse(release(&elsewhere, 0), "never reserved");
    refuse(Part::of(&elsewhere, 0, 1).settle(), "would settle");
    refuse(reserve(&elsewhere, 10_000_001), "the record says 10.000000");
    refuse(reserve(&common::order(1, 3, 5), 5), "has 0 micro-credits");

    book.append(AT, Part::of(&order, 0, 1).settle()).unwrap();
    let refuse = |posting: Posting, expected: &str| {
        let error = book.clone().append(AT, posting).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    refuse(Part::of(&order, 0, 1).settle(), "settled before");
    refuse(Part::of(&order, 0, 2).settle(), "settled as done before");
    let mut failed = Part::of(&order, 0, 2);
    failed.outcome = Outcome::Failed;
    book.append(AT, failed.settle()).unwrap();
    let left = book
        .accounts()
        .balance(&Account::Escrow(karez_core::id::JobId(order.id()))) as u64;
    book.append(AT, release(&order, left)).unwrap();
    let error = book.append(AT, release(&order, 0)).unwrap_err().to_string();
    assert!(error.contains("released before"), "{error}");
    // A late word about an unfinished attempt costs nothing and is still written down.
    let mut late = Part::of(&order, 5, 1);
    late.outcome = Outcome::Cancelled;
    book.append(AT, late.settle()).unwrap();
}

#[test]
fn a_donated_part_of_a_job_without_reservation_settles_at_zero() {
    let order = order(0, 7, 0);
    let mut part = Part::of(&order, 0, 1);
    part.rate = 0;
    let entry = Book::new(scheduler()).append(AT, part.settle()).unwrap();
    assert_eq!(entry.posting.legs[1].1, 0);
}

#[test]
fn invitations_are_redeemed_as_often_as_they_say() {
    let invitation = invitation(1, 2, 500);
    let redeem = |n: u8, micro| Posting {
        evidence: vec![invitation.encode()],
        ..grant(n, micro)
    };
    let mut book = Book::new(scheduler());
    assert!(book.append(AT, redeem(0, 501)).is_err());
    book.append(AT, redeem(0, 500)).unwrap();
    assert!(book.append(AT, redeem(0, 500)).is_err());
    book.append(AT, redeem(1, 10)).unwrap();
    assert!(book.append(AT, redeem(2, 10)).is_err());
}

#[test]
fn shapes_are_checked() {
    let order = order(0, 1, 10_000_000);
    let whole = Part::of(&order, 0, 1).settle();
    for (name, posting) in [
        (
            "a leg to nobody",
            Posting {
                legs: vec![(Account::Federation, 0)],
                ..grant(0, 1)
            },
        ),
        (
            "grant backwards",
            Posting {
                legs: vec![(Account::Federation, 5), (Account::User(user(0)), -5)],
                ..grant(0, 1)
            },
        ),
        (
            "grant off balance",
            Posting {
                legs: vec![(Account::Federation, -5), (Account::User(user(0)), 4)],
                ..grant(0, 1)
            },
        ),
        (
            "lowest number",
            Posting {
                legs: vec![
                    (Account::Federation, i64::MIN),
                    (Account::User(user(0)), 1 << 62),
                    (Account::User(user(1)), 1 << 62),
                ],
                ..grant(0, 1)
            },
        ),
        (
            "settle as release",
            Posting {
                kind: PostingKind::Release,
                ..whole.clone()
            },
        ),
        ("evidence out of order", {
            let mut p = whole.clone();
            p.evidence.swap(2, 3);
            p
        }),
        ("evidence missing", {
            let mut p = whole.clone();
            p.evidence.remove(0);
            p
        }),
        (
            "reserve without order",
            Posting {
                evidence: vec![],
                ..reserve(&order, 5)
            },
        ),
        (
            "reserve from another",
            Posting {
                legs: vec![
                    (Account::User(user(1)), -5),
                    (Account::Escrow(karez_core::id::JobId(order.id())), 5),
                ],
                ..reserve(&order, 5)
            },
        ),
    ] {
        assert!(
            book_with(&common::order(0, 99, 10_000_000))
                .append(AT, posting)
                .is_err(),
            "{name}"
        );
    }
    // An unknown field hidden in an envelope changes no signature, but it is not the canonical envelope.
    let mut padded = whole;
    padded.evidence[1].extend_from_slice(&[0xf8, 0x07, 0x01]);
    let error = book_with(&order).append(AT, padded).unwrap_err().to_string();
    assert!(error.contains("canonical"), "{error}");
}

#[test]
fn a_delegation_lends_once_and_only_what_it_lent_comes_back() {
    let record = delegation(0, 1, 5_000_000);
    let mut book = Book::new(scheduler());
    book.append(AT, grant(0, 19_000_000)).unwrap();
    let moved = |from: Account, to: Account, micro: u64, record: &Verified<Delegation>| {
        let evidence = vec![record.encode()];
        Posting::transfer(PostingKind::Grant, from, to, Credits(micro), evidence).unwrap()
    };
    let (own, key) = (|| Account::User(user(0)), || Account::User(user(1)));
    for (name, posting, says) in [
        (
            "back before it was lent",
            moved(key(), own(), 0, &record),
            "never lent",
        ),
        ("too little", moved(own(), key(), 1, &record), "5.000000"),
        (
            "to somebody else",
            moved(own(), Account::User(user(2)), 5_000_000, &record),
            "user:",
        ),
        (
            "another scheduler's",
            moved(
                own(),
                key(),
                5_000_000,
                &delegation_with(0, 1, 5_000_000, |d| d.scheduler.0 = user(3).0),
            ),
            "scheduler is",
        ),
    ] {
        let error = book.append(AT, posting).expect_err(name).to_string();
        assert!(error.contains(says), "{name}: {error}");
    }
    book.append(AT, moved(own(), key(), 5_000_000, &record)).unwrap();
    let twice = book.append(AT, moved(own(), key(), 4_000_000, &record));
    assert!(twice.is_err());
    let twice = book
        .append(AT, moved(own(), key(), 5_000_000, &record))
        .unwrap_err();
    assert!(twice.to_string().contains("before"), "{twice}");
    book.append(AT, moved(key(), own(), 2_000_000, &record)).unwrap();
    assert_eq!(book.accounts().balance(&own()), 16_000_000);
    // Nobody takes from a user without the user's word.
    let none = Posting::transfer(PostingKind::Grant, own(), key(), Credits(1), Vec::new()).unwrap();
    assert!(book.append(AT, none).is_err());
}
