//! What follows a receipt: acceptances, disputes, rulings.
use super::{
    Answer, Claim, Frozen,
    error::{EvidenceError, Rule},
    given,
    paper::Paper,
    received, shape, two_legs,
};
use karez_core::{
    key::{SchedulerId, UserId},
    money::{Account, Posting, PostingKind},
    records::{Acceptance, Dispute, Lease, Receipt, Record, Ruling, SignatureCheck},
    unit::{Credits, UtcMillis},
};

type Claimed = Result<Claim, EvidenceError>;

pub(super) fn accept(posting: &Posting, scheduler: SchedulerId, by: &dyn SignatureCheck) -> Claimed {
    let ([(account, 0)], [lease, receipt, acceptance]) =
        (posting.legs.as_slice(), posting.evidence.as_slice())
    else {
        return Err(shape(PostingKind::Accept));
    };
    let (lease, receipt) = settled(lease, receipt, scheduler, by)?;
    let paper: Paper<Acceptance> = Paper::open(by, 2, acceptance)?;
    paper.same("receipt", paper.receipt, "the receipt", receipt.id())?;
    answers(&paper, &receipt, paper.user, paper.issued_at)?;
    paper.account(account, Account::Institution(receipt.node_institution.clone()))?;
    Ok(Claim::Answer(Answer {
        key: lease.key(),
        receipt: receipt.id(),
        id: paper.id(),
        record: Acceptance::TYPE,
        until: receipt.disputable_until,
        frozen: None,
    }))
}

pub(super) fn dispute(posting: &Posting, scheduler: SchedulerId, by: &dyn SignatureCheck) -> Claimed {
    let (Some((from, to, moved)), [lease, receipt, dispute]) =
        (two_legs(posting), posting.evidence.as_slice())
    else {
        return Err(shape(PostingKind::Dispute));
    };
    let (lease, receipt) = settled(lease, receipt, scheduler, by)?;
    let paper: Paper<Dispute> = Paper::open(by, 2, dispute)?;
    paper.same("receipt", paper.receipt, "the receipt", receipt.id())?;
    answers(&paper, &receipt, paper.user, paper.issued_at)?;
    paper.account(from, Account::Institution(receipt.node_institution.clone()))?;
    paper.account(to, Account::Disputed(receipt.id()))?;
    if moved != receipt.credits {
        let says = receipt.credits;
        return paper.breaks(Rule::Amount { moved, says });
    }
    Ok(Claim::Answer(Answer {
        key: lease.key(),
        receipt: receipt.id(),
        id: paper.id(),
        record: Dispute::TYPE,
        until: receipt.disputable_until,
        frozen: Some(Frozen {
            receipt: receipt.id(),
            user: receipt.user,
            institution: receipt.node_institution.clone(),
            credits: moved,
        }),
    }))
}

/// The lease and the receipt that an answer is about.
fn settled(
    lease: &[u8],
    receipt: &[u8],
    scheduler: SchedulerId,
    by: &dyn SignatureCheck,
) -> Result<(Paper<Lease>, Paper<Receipt>), EvidenceError> {
    let lease: Paper<Lease> = Paper::open(by, 0, lease)?;
    let receipt: Paper<Receipt> = Paper::open(by, 1, receipt)?;
    receipt.same("scheduler", receipt.scheduler, "the ledger", scheduler)?;
    receipt.same("lease", receipt.lease, "the lease", lease.id())?;
    Ok((lease, receipt))
}

fn answers<T: Record>(
    paper: &Paper<T>,
    receipt: &Receipt,
    user: UserId,
    at: UtcMillis,
) -> Result<(), EvidenceError> {
    paper.same("user", user, "the receipt", receipt.user)?;
    if at > receipt.disputable_until {
        let until = receipt.disputable_until.0;
        return paper.breaks(Rule::TooLate { at: at.0, until });
    }
    Ok(())
}

pub(super) fn ruling(posting: &Posting, scheduler: SchedulerId, by: &dyn SignatureCheck) -> Claimed {
    let wrong = || shape(PostingKind::Ruling);
    let [
        (from @ Account::Disputed(_), frozen),
        (Account::User(user), refund),
        (Account::Institution(institution), rest),
    ] = posting.legs.as_slice()
    else {
        return Err(wrong());
    };
    let [bytes] = posting.evidence.as_slice() else {
        return Err(wrong());
    };
    let legs: Option<[Credits; 3]> = (|| Some([given(*frozen)?, received(*refund)?, received(*rest)?]))();
    let [paid, refund, rest] = legs.ok_or_else(wrong)?;
    let ruling: Paper<Ruling> = Paper::open(by, 0, bytes)?;
    ruling.same("scheduler", ruling.scheduler, "the ledger", scheduler)?;
    ruling.account(from, Account::Disputed(ruling.receipt))?;
    if ruling.refund > paid {
        let refund = ruling.refund;
        return ruling.breaks(Rule::OverRefund { refund, paid });
    }
    if refund != ruling.refund {
        let (moved, says) = (refund, ruling.refund);
        return ruling.breaks(Rule::Amount { moved, says });
    }
    Ok(Claim::Ruling {
        ruling: ruling.id(),
        dispute: ruling.dispute,
        receipt: ruling.receipt,
        user: (*user, refund),
        institution: (institution.clone(), rest),
    })
}
