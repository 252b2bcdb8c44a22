//! What a posting must prove: the signed records behind it, checked when it is posted and again by the verifier.
//!
//! | kind | legs, in this order | evidence, in this order |
//! |---|---|---|
//! | grant | federation −, users + | nothing, or the invitation of the one user (amount up to its credits) |
//! | grant | the payer −, `grant:ID` + | the grant (all its credits; once) |
//! | grant | `user:delegation.user` −, `user:delegation.key` + | the delegation (all its credits; once) |
//! | grant | `user:delegation.key` −, `user:delegation.user` + | the same delegation, after it lent |
//! | reserve | `grant:ID` −, if one pays; `user:order.user` −; `escrow:job` + | the order (up to `credits_max`; once per job; the grant covers it) |
//! | settle | `escrow:job` −, `institution:lease.institution` + | order, lease, all readings, usage, receipt |
//! | release | `escrow:job` −, the job's user +, `grant:ID` + if one paid | nothing (all that is left, the user's own first; once per job) |
//! | accept | the institution 0 | lease, receipt, acceptance |
//! | dispute | the institution −, `disputed:RECEIPT` + | lease, receipt, dispute (all the receipt paid) |
//! | ruling | `disputed:RECEIPT` −, the user +, the institution + | the ruling (refund to the user, the rest to the institution) |
//! | expire | `grant:ID` −, the payer + | nothing (all that is left, past the grant's date) |
//! | rates | federation 0 | the rate card (the next version) |
//! | limit | the institution 0 | the credit limit (later than the last one) |
//! | floors | federation 0 | how institutions share (the next version) |
//! | payment | `institution:payee` −, `institution:payer` + | the payment (once) |
//!
//! Legs of zero are legs: a donated part still leaves an entry with its receipt.
//!
//! [`examine`] checks what the posting says by itself (signatures, who names whom, amounts): the dear part, and it
//! needs no book. What depends on earlier entries (a lease settles once, a part is done once, no job settles more
//! than it reserved) is checked by the book in the order of its entries.
mod error;
mod fund;
mod gist;
mod paper;
mod settle;
mod trail;
mod verdict;

pub use error::{EvidenceError, RecordName, Rule};
pub(crate) use gist::{GIST_MAX, is_droppable, receipt_of, remains};
use trail::Mark;
pub(crate) use trail::{Change, Job, Trail};

use crate::book::{Entry, evidence_digest};
use karez_core::{
    id::{Digest, Institution, JobId, LeaseKey, RecordId},
    key::{KeyError, PublicKey, SchedulerId, UserId},
    money::{Account, Posting, PostingKind},
    records::{Benchmark, Grant, SignatureCheck, Strict, WorkKind},
    unit::{Credits, DeviceMillis, UtcMillis},
};

/// A posting whose records were all verified and fit each other and its legs. Only a book can say the rest.
#[derive(Debug, Clone)]
pub struct Examined {
    scheduler: SchedulerId,
    posting: Posting,
    claim: Claim,
    gist: Vec<u8>,
    evidence: Digest,
    dropped: bool,
}

impl Examined {
    /// For whose ledger.
    pub fn scheduler(&self) -> SchedulerId {
        self.scheduler
    }
    /// The posting itself.
    pub fn posting(&self) -> &Posting {
        &self.posting
    }
    pub(crate) fn claim(&self) -> &Claim {
        &self.claim
    }
    /// What stays of the records when they are dropped.
    pub fn gist(&self) -> &[u8] {
        &self.gist
    }
    /// The digest of the records.
    pub(crate) fn evidence(&self) -> Digest {
        self.evidence
    }
    /// The entry it makes.
    pub(crate) fn into_entry(self, seq: u64, previous: Digest, at: UtcMillis) -> Entry {
        Entry {
            seq,
            previous,
            at,
            posting: self.posting,
            gist: self.gist,
            dropped: self.dropped.then_some(self.evidence),
        }
    }
}

/// What a posting says in the end, for the rules that look back.
#[derive(Debug, Clone)]
pub(crate) enum Claim {
    Grant(Option<Redeem>),
    Fund(RecordId, Box<Grant>),
    /// Credits lent to a delegated key, or coming back from it.
    Delegate {
        id: RecordId,
        there: bool,
    },
    Reserve(Reserved),
    Settle(Settled),
    Release {
        job: JobId,
        user: (UserId, Credits),
        grant: Option<(RecordId, Credits)>,
    },
    Answer(Answer),
    Ruling {
        ruling: RecordId,
        dispute: RecordId,
        receipt: RecordId,
        user: (UserId, Credits),
        institution: (Institution, Credits),
    },
    Expire {
        grant: RecordId,
        to: Account,
        amount: Credits,
    },
    Rates {
        id: RecordId,
        version: u32,
    },
    Floors {
        id: RecordId,
        version: u32,
    },
    Limit {
        id: RecordId,
        institution: Institution,
        limit: Credits,
        issued_at: UtcMillis,
    },
    Payment(RecordId),
    /// An acceptance whose records were dropped.
    Answered(Mark),
}

#[derive(Debug, Clone)]
pub(crate) struct Redeem {
    invitation: RecordId,
    uses_max: u32,
    user: UserId,
}

#[derive(Debug, Clone)]
pub(crate) struct Reserved {
    job: JobId,
    user: UserId,
    /// What a grant may be for; `None` once the order was dropped.
    scope: Option<(Institution, WorkKind)>,
    from_user: Credits,
    from_grant: Option<(RecordId, Credits)>,
}

#[derive(Debug, Clone)]
pub(crate) struct Settled {
    job: JobId,
    /// By which a second settlement of the lease is known.
    lease: Mark,
    /// The beginning of the receipt's id.
    receipt: Mark,
    /// By which a second one of the part is known; `None` when it was not done.
    part: Option<Mark>,
    /// What to name in errors; `None` once the records were dropped.
    origin: Option<Origin>,
    pub(crate) credits: Credits,
    pub(crate) billed: DeviceMillis,
    pub(crate) institution: Institution,
    user_institution: Institution,
    device_class: String,
    /// What a device of that class was measured to do, if its readings say.
    benchmark: Option<Benchmark>,
}

/// The records behind a settlement.
#[derive(Debug, Clone)]
pub(crate) struct Origin {
    key: LeaseKey,
    receipt: RecordId,
    receipt_at: usize,
}

/// An acceptance or a dispute.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    key: LeaseKey,
    receipt: RecordId,
    /// Its own id and type.
    id: RecordId,
    record: &'static str,
    /// When the receipt's window ends.
    until: UtcMillis,
    /// Of a dispute: what is frozen.
    frozen: Option<Frozen>,
}

/// What an open dispute holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Frozen {
    pub(crate) receipt: RecordId,
    pub(crate) user: UserId,
    pub(crate) institution: Institution,
    pub(crate) credits: Credits,
}

impl Claim {
    /// Of a settlement: whom it pays what.
    pub(crate) fn settled(&self) -> Option<&Settled> {
        match self {
            Self::Settle(settled) => Some(settled),
            _ => None,
        }
    }
}

/// Checks everything about `posting` that needs no earlier entry: legs, signatures, and that the records name each
/// other. About 40 microseconds per record.
pub fn examine(posting: Posting, scheduler: SchedulerId) -> Result<Examined, EvidenceError> {
    examine_by(posting, scheduler, &Strict)
}

/// As [`examine`], with signatures checked by `by`: see [`crate::Checker`].
pub fn examine_by(
    posting: Posting,
    scheduler: SchedulerId,
    by: &dyn SignatureCheck,
) -> Result<Examined, EvidenceError> {
    let evidence = evidence_digest(&posting.evidence);
    examine_digested(posting, scheduler, by, evidence)
}

/// The same when the digest of the evidence is known.
pub(crate) fn examine_digested(
    posting: Posting,
    scheduler: SchedulerId,
    by: &dyn SignatureCheck,
    evidence: Digest,
) -> Result<Examined, EvidenceError> {
    let claim = match posting.kind {
        PostingKind::Grant => fund::grant(&posting, scheduler, by)?,
        PostingKind::Reserve => fund::reserve(&posting, scheduler, by)?,
        PostingKind::Settle => Claim::Settle(settle::examine(&posting, scheduler, by)?),
        PostingKind::Release => fund::release(&posting)?,
        PostingKind::Accept => verdict::accept(&posting, scheduler, by)?,
        PostingKind::Dispute => verdict::dispute(&posting, scheduler, by)?,
        PostingKind::Ruling => verdict::ruling(&posting, scheduler, by)?,
        PostingKind::Expire => fund::expire(&posting)?,
        PostingKind::Rates => fund::rates(&posting, scheduler, by)?,
        PostingKind::Floors => fund::floors(&posting, scheduler, by)?,
        PostingKind::Limit => fund::limit(&posting, scheduler, by)?,
        PostingKind::Payment => fund::payment(&posting, scheduler, by)?,
    };
    Ok(Examined {
        scheduler,
        gist: gist::of(&claim),
        evidence,
        posting,
        claim,
        dropped: false,
    })
}

/// What is left of a posting whose records were dropped: legs, gist, and the digest of what is gone. Nobody can check
/// their signatures any more; everything else still is.
pub(crate) fn examine_dropped(
    posting: Posting,
    scheduler: SchedulerId,
    gist: &[u8],
    evidence: Digest,
) -> Result<Examined, EvidenceError> {
    if !is_droppable(posting.kind) || !posting.evidence.is_empty() {
        return Err(shape(posting.kind));
    }
    let claim = gist::read(&posting, gist).ok_or(EvidenceError::Gist {
        rule: Box::new(Rule::GistUnreadable),
    })?;
    Ok(Examined {
        scheduler,
        posting,
        claim,
        gist: gist.to_vec(),
        evidence,
        dropped: true,
    })
}

/// Reads the claim of an entry that was examined before it was stored: no signature is checked.
pub(crate) fn recall(entry: &Entry, scheduler: SchedulerId) -> Result<Examined, EvidenceError> {
    struct Before;
    impl SignatureCheck for Before {
        fn check(&self, _: &PublicKey, message: &[u8], _: &[u8; 64]) -> Result<RecordId, KeyError> {
            Ok(Digest::of(message))
        }
    }
    match entry.dropped {
        None => examine_by(entry.posting.clone(), scheduler, &Before),
        Some(digest) => examine_dropped(entry.posting.clone(), scheduler, &entry.gist, digest),
    }
}

/// The wrong legs or evidence for its kind.
fn shape(kind: PostingKind) -> EvidenceError {
    EvidenceError::Shape {
        kind: kind.as_str(),
        needs: match kind {
            PostingKind::Grant => {
                "a leg of the federation that gives, then legs of users that receive, and no evidence but one \
                 invitation; or a payer that gives, a grant that receives, and that grant as evidence; \
                 or a user and the key it delegated, and that delegation as evidence"
            }
            PostingKind::Reserve => {
                "a grant or a user or both that give, an escrow that receives, and the order as evidence"
            }
            PostingKind::Settle => {
                "two legs, an escrow that gives and an institution that receives, and as evidence order, lease, at \
                 least one reading, usage and receipt"
            }
            PostingKind::Release => {
                "an escrow that gives, a user that receives, a grant if one paid, and no evidence"
            }
            PostingKind::Accept => {
                "a leg of zero for the institution, and lease, receipt and acceptance as evidence"
            }
            PostingKind::Dispute => {
                "an institution that gives, the receipt's frozen account that receives, and lease, receipt and \
                 dispute as evidence"
            }
            PostingKind::Ruling => {
                "a frozen account that gives, a user and an institution that receive, and the ruling as evidence"
            }
            PostingKind::Expire => "a grant that gives, its payer that receives, and no evidence",
            PostingKind::Rates => "a leg of zero for the federation, and the rate card as evidence",
            PostingKind::Floors => "a leg of zero for the federation, and the signed floors as evidence",
            PostingKind::Limit => "a leg of zero for the institution, and the credit limit as evidence",
            PostingKind::Payment => {
                "the payee's institution that gives, the payer's that receives, and the payment as evidence"
            }
        },
    }
}

/// The amount that the first leg gives and the second receives.
fn two_legs(posting: &Posting) -> Option<(&Account, &Account, Credits)> {
    let [(from, gives), (to, receives)] = posting.legs.as_slice() else {
        return None;
    };
    let amount = received(*receives)?;
    (gives.checked_add(*receives) == Some(0)).then_some((from, to, amount))
}

/// A leg that receives, or is zero.
fn received(leg: i64) -> Option<Credits> {
    u64::try_from(leg).ok().map(Credits)
}

/// A leg that gives, or is zero.
fn given(leg: i64) -> Option<Credits> {
    leg.checked_neg().and_then(received)
}
