//! Answers, rulings, grants, limits and payments: what the book takes, and what it refuses by name.
#![allow(clippy::unwrap_used)]
mod common;
use common::*;
use karez_core::{
    id::JobId,
    money::{Account, Posting, PostingKind},
    unit::{Credits, UtcMillis},
};
use karez_ledger::{
    Book, FaultKind, Head, Relation, VerifyOptions, compare, export,
    tree::{Frontier, entry_leaf},
    verify,
};

fn book_of(postings: Vec<Posting>) -> Book {
    let mut book = Book::new(scheduler());
    for posting in postings {
        book.append(AT, posting).unwrap();
    }
    book
}

fn refused(book: &mut Book, at: UtcMillis, posting: Posting, expected: &str) {
    let before = book.clone();
    let error = book.append(at, posting).unwrap_err().to_string();
    assert!(error.contains(expected), "{error}\nexpected: {expected}");
    assert_eq!(*book, before, "a refused posting changed the book");
}

fn settled_book() -> (Book, Posting) {
    let order = order(0, 1, 2_000);
    let settled = Part::of(&order, 0, 1).settle();
    let book = book_of(vec![grant(0, 5_000), reserve(&order, 2_000), settled.clone()]);
    (book, settled)
}

#[test]
fn a_ledger_of_all_kinds_verifies_and_keeps_every_credit() {
    let postings = all_kinds(3);
    let kinds: std::collections::BTreeSet<_> = postings.iter().map(|p| p.kind).collect();
    assert_eq!(
        kinds.len(),
        PostingKind::ALL.len() - 1,
        "all but an expired grant"
    );
    let book = book_of(postings);
    assert_eq!(book.accounts().sum(), 0);
    assert_eq!(book.disputes_open(), 0);
    assert_eq!(book.accounts().balance(&institution("uni-lagos")), 700);
}

#[test]
fn a_receipt_is_answered_once_by_its_user_in_its_window() {
    let (mut book, settled) = settled_book();
    refused(&mut book, AT, accept(&settled, 1, |_| {}), "user");
    let late = AT.0 + 1_000_001;
    refused(
        &mut book,
        AT,
        accept(&settled, 0, |a| a.issued_at = UtcMillis(late)),
        "could be answered until",
    );
    // Dated in time, written down too late: its date is only its signer's word.
    for posting in [accept(&settled, 0, |_| {}), dispute(&settled, 0, |_| {}).0] {
        refused(&mut book, UtcMillis(late), posting, "could be answered until");
    }
    let (mut less, _) = dispute(&settled, 0, |_| {});
    less.legs[0].1 += 1;
    less.legs[1].1 -= 1;
    refused(&mut book, AT, less, "the posting moves");
    // A receipt that was signed but never settled here.
    let other = Part::of(&order(0, 2, 2_000), 0, 1).settle();
    refused(&mut book, AT, accept(&other, 0, |_| {}), "never settled");
    let first = order(0, 1, 2_000);
    let mut twin = Part::of(&first, 0, 1);
    twin.receipt = Box::new(|r| r.observed.0 += 1);
    refused(&mut book, AT, accept(&twin.settle(), 0, |_| {}), "never settled");

    book.append(AT, accept(&settled, 0, |_| {})).unwrap();
    refused(
        &mut book,
        AT,
        dispute(&settled, 0, |_| {}).0,
        "accepted or disputed before",
    );
}

#[test]
fn a_dispute_freezes_and_a_ruling_shares_out() {
    let (mut book, settled) = settled_book();
    let (posting, paper) = dispute(&settled, 0, |_| {});
    refused(&mut book, AT, ruling(&settled, &paper, 1), "no such dispute");
    book.append(AT, posting).unwrap();
    assert_eq!(book.disputes_open(), 1);
    assert_eq!(book.accounts().balance(&institution("uni-0")), 0);
    let frozen = Account::Disputed(papers(&settled).1.id());
    assert_eq!(book.accounts().balance(&frozen), 1_000);
    refused(
        &mut book,
        AT,
        ruling(&settled, &paper, 1_001),
        "ruling posting needs",
    );
    let mut forged = ruling(&settled, &paper, 400);
    forged.legs[1].0 = Account::User(user(3));
    refused(&mut book, AT, forged, "expected user:");
    book.append(AT, ruling(&settled, &paper, 400)).unwrap();
    assert_eq!(book.accounts().balance(&institution("uni-0")), 600);
    assert_eq!(book.accounts().balance(&Account::User(user(0))), 3_000 + 400);
    assert_eq!(book.accounts().balance(&frozen), 0);
    refused(&mut book, AT, ruling(&settled, &paper, 400), "no such dispute");
}

fn reserve_from(grant: karez_core::id::RecordId, nonce: u64, from_grant: i64, own: i64) -> (Posting, JobId) {
    let order = order(0, nonce, 10_000);
    let id = JobId(order.id());
    let mut legs = vec![(Account::Grant(grant), -from_grant)];
    if own > 0 {
        legs.push((Account::User(order.user), -own));
    }
    legs.push((Account::Escrow(id), from_grant + own));
    let posting = Posting {
        kind: PostingKind::Reserve,
        legs,
        evidence: vec![order.encode()],
    };
    (posting, id)
}

#[test]
fn a_grant_pays_for_its_users_until_its_date() {
    let mut book = book_of(vec![grant(0, 5_000)]);
    let record = grant_record(3_000, |_| {});
    refused(
        &mut book,
        AT,
        reserve_from(record.id(), 1, 100, 0).0,
        "is not in this ledger",
    );
    book.append(AT, fund(&record)).unwrap();
    refused(&mut book, AT, fund(&record), "posted before");
    refused(
        &mut book,
        AT,
        reserve_from(record.id(), 1, 3_001, 0).0,
        "the posting takes",
    );
    let expiry = record.expires_at;
    refused(
        &mut book,
        expiry,
        reserve_from(record.id(), 1, 100, 0).0,
        "expires at",
    );
    let other = grant_record(10, |g| {
        g.nonce = 2;
        g.beneficiary = karez_core::records::Beneficiary::User(user(4));
    });
    book.append(AT, fund(&other)).unwrap();
    refused(
        &mut book,
        AT,
        reserve_from(other.id(), 1, 5, 0).0,
        "not for this user",
    );

    let (posting, job) = reserve_from(record.id(), 1, 3_000, 1_000);
    book.append(AT, posting).unwrap();
    let back = |own: i64, granted: i64| Posting {
        kind: PostingKind::Release,
        legs: vec![
            (Account::Escrow(job), -(own + granted)),
            (Account::User(user(0)), own),
            (Account::Grant(record.id()), granted),
        ],
        evidence: Vec::new(),
    };
    refused(&mut book, AT, back(2_000, 2_000), "the posting moves");
    book.append(AT, back(1_000, 3_000)).unwrap();
    let expire = |amount| {
        let (from, to) = (Account::Grant(record.id()), Account::Federation);
        Posting::transfer(PostingKind::Expire, from, to, Credits(amount), Vec::new()).unwrap()
    };
    refused(&mut book, AT, expire(3_000), "expires at");
    refused(&mut book, expiry, expire(2_999), "the posting moves");
    book.append(expiry, expire(3_000)).unwrap();
    assert_eq!(book.accounts().balance(&Account::Federation), -5_010);
}

#[test]
fn institutions_grant_what_they_earned_and_as_far_as_their_limit() {
    let (mut book, _) = settled_book();
    let from = |credits, nonce| {
        fund(&grant_record(credits, |g| {
            g.payer = Some("uni-0".parse().unwrap());
            g.nonce = nonce;
        }))
    };
    refused(&mut book, AT, from(1_001, 1), "has 1000 micro-credits");
    book.append(AT, limit("uni-0", 500, AT.0)).unwrap();
    refused(&mut book, AT, limit("uni-0", 900, AT.0), "does not follow");
    refused(&mut book, AT, from(1_501, 1), "has 1000 micro-credits");
    book.append(AT, from(1_500, 1)).unwrap();
    assert_eq!(book.accounts().balance(&institution("uni-0")), -500);
    // What it owes is paid to whom it is owed: here to nobody, so the payee must have it.
    refused(
        &mut book,
        AT,
        payment("uni-0", "uni-1", 500, 1),
        "has 0 micro-credits",
    );
    // A lowered limit takes nothing back, but allows nothing more.
    book.append(AT, limit("uni-0", 0, AT.0 + 1)).unwrap();
    refused(&mut book, AT, from(1, 2), "has -500 micro-credits");
}

#[test]
fn cards_follow_each_other_and_payments_count_once() {
    let mut book = book_of(vec![rates(1)]);
    refused(&mut book, AT, rates(1), "does not follow");
    refused(&mut book, AT, rates(3), "does not follow");
    book.append(AT, rates(2)).unwrap();
    refused(&mut book, AT, floors(2, 30), "does not follow");
    book.append(AT, floors(1, 30)).unwrap();
    refused(&mut book, AT, floors(1, 30), "does not follow");
    refused(&mut book, AT, floors(2, 101), "the limit is 100");
    let (mut book, _) = settled_book();
    book.append(AT, payment("uni-1", "uni-0", 400, 1)).unwrap();
    refused(&mut book, AT, payment("uni-1", "uni-0", 400, 1), "posted before");
    book.append(AT, payment("uni-1", "uni-0", 400, 2)).unwrap();
    assert_eq!(book.accounts().balance(&institution("uni-1")), 800);
}

fn exported(postings: Vec<Posting>) -> (Vec<u8>, Vec<Head>) {
    let mut book = Book::new(scheduler());
    let mut tree = Frontier::default();
    let mut heads = Vec::new();
    let entries: Vec<_> = postings
        .into_iter()
        .map(|p| book.append(AT, p).unwrap())
        .collect();
    for entry in &entries {
        tree.push(entry_leaf(&entry.hash()));
        heads.push(Head::sign(&scheduler_secret(), tree.size(), tree.root()));
    }
    let mut out = Vec::new();
    export(&mut out, &scheduler_secret(), AT, entries.into_iter().map(Ok)).unwrap();
    (out, heads)
}

#[test]
fn published_heads_show_cut_tails_and_forks() {
    let whole = all_kinds(2);
    let (file, heads) = exported(whole.clone());
    let options = VerifyOptions::default().with_heads(heads.clone());
    let summary = verify(&mut file.as_slice(), &options).unwrap();
    assert_eq!(summary.heads, heads.len());
    assert_eq!(&summary.tree_head, heads.last().unwrap());

    // A shorter ledger with a trailer in order: only a head can tell.
    let (short, _) = exported(whole[..whole.len() - 2].to_vec());
    verify(&mut short.as_slice(), &VerifyOptions::default()).unwrap();
    let fault = verify(&mut short.as_slice(), &options).unwrap_err();
    assert_eq!(fault.entry, Some(whole.len() as u64 - 2));
    assert!(matches!(*fault.kind, FaultKind::Tail { .. }), "{fault}");
    // Cut in the middle of a line.
    let fault = verify(&mut &file[..file.len() / 2], &options).unwrap_err();
    assert!(matches!(*fault.kind, FaultKind::Tail { .. }), "{fault}");

    // Another history from entry 3 on, with everything about it in order.
    let mut other = whole.clone();
    other[2] = grant(2, 999_999_999);
    let (forked, _) = exported(other);
    verify(&mut forked.as_slice(), &VerifyOptions::default()).unwrap();
    let fault = verify(&mut forked.as_slice(), &options).unwrap_err();
    assert_eq!(fault.entry, Some(2));
    let FaultKind::Fork {
        published, agreed, ..
    } = &*fault.kind
    else {
        panic!("{fault}");
    };
    assert_eq!((**published).clone(), heads[2]);
    assert_eq!(*agreed, 2);
    assert!(fault.to_string().contains(&heads[2].to_string()), "{fault}");

    let relation = |a: &[u8], b: &[u8]| compare(&mut &*a, &mut &*b).unwrap();
    assert_eq!(relation(&file, &file), Relation::Same);
    assert_eq!(relation(&file, &short), Relation::Longer { by: 2 });
    let Relation::Shorter { entry, missing, .. } = relation(&short, &file) else {
        panic!();
    };
    assert_eq!((entry, missing), (whole.len() as u64 - 2, 2));
    let Relation::Fork {
        entry,
        our_head,
        their_head,
        ..
    } = relation(&file, &forked)
    else {
        panic!();
    };
    assert_eq!(entry, 2);
    assert_eq!(our_head.unwrap().root, heads.last().unwrap().root);
    assert_ne!(their_head.unwrap().root, heads.last().unwrap().root);
}

/// Random debits of random users, within and beyond their means: a shadow of plain numbers decides what must pass.
#[test]
fn random_debits_never_overspend() {
    let count = if std::env::var_os("KAREZ_LONG").is_some() {
        1_000_000u64
    } else {
        5_000
    };
    let mut book = Book::new(scheduler());
    let mut shadow = [0u64; 4];
    let mut random = 7u64;
    let mut next = |below: u64| {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % below
    };
    let mut refused = 0;
    for nonce in 0..count {
        let n = next(4) as usize;
        if next(5) == 0 {
            let amount = next(3_000);
            book.append(AT, grant(n as u8, amount)).unwrap();
            shadow[n] += amount;
            continue;
        }
        let amount = next(1_500);
        let fits = amount <= shadow[n];
        let result = book.append(AT, reserve(&order(n as u8, nonce, amount), amount));
        assert_eq!(result.is_ok(), fits, "debit {nonce} of {amount} on {}", shadow[n]);
        if fits {
            shadow[n] -= amount;
        } else {
            refused += 1;
        }
        assert_eq!(
            book.accounts().balance(&Account::User(user(n as u8))),
            shadow[n] as i64
        );
    }
    assert_eq!(book.accounts().sum(), 0);
    assert!(refused > count / 20, "{refused} refused");
}
