//! Credits that come and go around the work: grants, reservations, releases, rates, limits, payments.
use super::{
    Claim, Redeem, Reserved,
    error::{EvidenceError, Rule},
    given,
    paper::Paper,
    received, shape, two_legs,
};
use karez_core::{
    id::{JobId, RecordId},
    key::{SchedulerId, UserId},
    money::{Account, Posting, PostingKind},
    records::{
        CreditLimit, Delegation, Floors, Grant, Invitation, Order, Payment, RateCard, Role, SignatureCheck,
    },
    unit::Credits,
};

type Claimed = Result<Claim, EvidenceError>;

pub(super) fn grant(posting: &Posting, scheduler: SchedulerId, by: &dyn SignatureCheck) -> Claimed {
    if let Some((from, to @ Account::Grant(_), moved)) = two_legs(posting) {
        return fund(posting, (from, to, moved), scheduler, by);
    }
    if let Some((from @ Account::User(_), to @ Account::User(_), moved)) = two_legs(posting) {
        return delegate(posting, (from, to, moved), scheduler, by);
    }
    let wrong = || shape(PostingKind::Grant);
    let Some(((Account::Federation, gives), users)) = posting.legs.split_first() else {
        return Err(wrong());
    };
    let receives = |(account, amount): &(Account, i64)| matches!(account, Account::User(_)) && *amount >= 0;
    // The lowest number has no opposite, so such a leg could not be taken back.
    let gives_ok = *gives <= 0 && *gives != i64::MIN;
    if !gives_ok || users.is_empty() || !users.iter().all(receives) || posting.evidence.len() > 1 {
        return Err(wrong());
    }
    let Some(bytes) = posting.evidence.first() else {
        return Ok(Claim::Grant(None));
    };
    let invitation: Paper<Invitation> = Paper::open(by, 0, bytes)?;
    let Some((_, Account::User(user), moved)) = two_legs(posting) else {
        return Err(wrong());
    };
    invitation.same("scheduler", invitation.scheduler, "the ledger", scheduler)?;
    if invitation.role != Role::User {
        return invitation.breaks(Rule::Role);
    }
    if moved > invitation.credits {
        let says = invitation.credits;
        return invitation.breaks(Rule::Amount { moved, says });
    }
    Ok(Claim::Grant(Some(Redeem {
        invitation: invitation.id(),
        uses_max: invitation.uses_max,
        user: *user,
    })))
}

fn fund(
    posting: &Posting,
    (from, to, moved): (&Account, &Account, Credits),
    scheduler: SchedulerId,
    by: &dyn SignatureCheck,
) -> Claimed {
    let [bytes] = posting.evidence.as_slice() else {
        return Err(shape(PostingKind::Grant));
    };
    let grant: Paper<Grant> = Paper::open(by, 0, bytes)?;
    grant.same("scheduler", grant.scheduler, "the ledger", scheduler)?;
    grant.account(from, grant.from())?;
    grant.account(to, Account::Grant(grant.id()))?;
    if moved != grant.credits {
        let says = grant.credits;
        return grant.breaks(Rule::Amount { moved, says });
    }
    let value: &Grant = &grant;
    Ok(Claim::Fund(grant.id(), Box::new(value.clone())))
}

/// Credits that a user lends to a delegated key, or their way back: both stand on the user's own record.
fn delegate(
    posting: &Posting,
    (from, to, moved): (&Account, &Account, Credits),
    scheduler: SchedulerId,
    by: &dyn SignatureCheck,
) -> Claimed {
    let [bytes] = posting.evidence.as_slice() else {
        return Err(shape(PostingKind::Grant));
    };
    let delegation: Paper<Delegation> = Paper::open(by, 0, bytes)?;
    delegation.same("scheduler", delegation.scheduler, "the ledger", scheduler)?;
    let (user, key) = (
        Account::User(delegation.user),
        Account::User(UserId(delegation.key)),
    );
    let there = *from == user;
    let (gives, receives) = if there { (user, key) } else { (key, user) };
    delegation.account(from, gives)?;
    delegation.account(to, receives)?;
    if there && moved != delegation.credits {
        let says = delegation.credits;
        return delegation.breaks(Rule::Amount { moved, says });
    }
    Ok(Claim::Delegate {
        id: delegation.id(),
        there,
    })
}

/// What the legs of a reservation say.
pub(super) struct ReserveLegs {
    pub(super) job: JobId,
    /// If it pays anything itself.
    pub(super) user: Option<UserId>,
    pub(super) from_user: Credits,
    pub(super) from_grant: Option<(RecordId, Credits)>,
}

pub(super) fn reserve_legs(posting: &Posting) -> Option<ReserveLegs> {
    let ((Account::Escrow(job), receives), from) = posting.legs.split_last()? else {
        return None;
    };
    received(*receives)?;
    let (grant, user) = match from {
        [(Account::User(user), leg)] => (None, Some((user, leg))),
        [(Account::Grant(id), leg)] => (Some((id, leg)), None),
        [(Account::Grant(id), first), (Account::User(user), second)] => {
            (Some((id, first)), Some((user, second)))
        }
        _ => return None,
    };
    let from_grant = match grant {
        Some((id, leg)) => Some((*id, given(*leg)?)),
        None => None,
    };
    let from_user = match user {
        Some((_, leg)) => given(*leg)?,
        None => Credits::ZERO,
    };
    Some(ReserveLegs {
        job: *job,
        user: user.map(|(user, _)| *user),
        from_user,
        from_grant,
    })
}

pub(super) fn reserve(posting: &Posting, scheduler: SchedulerId, by: &dyn SignatureCheck) -> Claimed {
    let wrong = || shape(PostingKind::Reserve);
    let [bytes] = posting.evidence.as_slice() else {
        return Err(wrong());
    };
    let ReserveLegs {
        job: escrow,
        user,
        from_user,
        from_grant,
    } = reserve_legs(posting).ok_or_else(wrong)?;
    let amount = posting.legs.last().and_then(|(_, leg)| received(*leg));
    let amount = amount.ok_or_else(wrong)?;
    let order: Paper<Order> = Paper::open(by, 0, bytes)?;
    order.same("scheduler", order.scheduler, "the ledger", scheduler)?;
    order.account(&Account::Escrow(escrow), Account::Escrow(JobId(order.id())))?;
    if let Some(user) = user {
        order.account(&Account::User(user), Account::User(order.user))?;
    }
    if amount > order.credits_max {
        let says = order.credits_max;
        return order.breaks(Rule::Amount { moved: amount, says });
    }
    Ok(Claim::Reserve(Reserved {
        job: escrow,
        user: order.user,
        scope: Some((order.institution.clone(), order.work.kind())),
        from_user,
        from_grant,
    }))
}

pub(super) fn release(posting: &Posting) -> Claimed {
    let wrong = || shape(PostingKind::Release);
    if !posting.evidence.is_empty() {
        return Err(wrong());
    }
    let (job, rest) = match posting.legs.split_first() {
        Some(((Account::Escrow(job), leg), rest)) if *leg <= 0 => (*job, rest),
        _ => return Err(wrong()),
    };
    let (user, grant) = match rest {
        [(Account::User(user), own)] => ((*user, *own), None),
        [(Account::User(user), own), (Account::Grant(id), leg)] => {
            let leg = received(*leg).ok_or_else(wrong)?;
            ((*user, *own), Some((*id, leg)))
        }
        _ => return Err(wrong()),
    };
    Ok(Claim::Release {
        job,
        user: (user.0, received(user.1).ok_or_else(wrong)?),
        grant,
    })
}

pub(super) fn expire(posting: &Posting) -> Claimed {
    match two_legs(posting) {
        Some((Account::Grant(grant), to, amount)) if posting.evidence.is_empty() => Ok(Claim::Expire {
            grant: *grant,
            to: to.clone(),
            amount,
        }),
        _ => Err(shape(PostingKind::Expire)),
    }
}

/// The one leg of zero and the one record of postings that move nothing.
fn nothing_moves(posting: &Posting) -> Result<(&Account, &[u8]), EvidenceError> {
    match (posting.legs.as_slice(), posting.evidence.as_slice()) {
        ([(account, 0)], [bytes]) => Ok((account, bytes)),
        _ => Err(shape(posting.kind)),
    }
}

pub(super) fn rates(posting: &Posting, scheduler: SchedulerId, by: &dyn SignatureCheck) -> Claimed {
    let (account, bytes) = nothing_moves(posting)?;
    let card: Paper<RateCard> = Paper::open(by, 0, bytes)?;
    card.same("scheduler", card.scheduler, "the ledger", scheduler)?;
    card.account(account, Account::Federation)?;
    Ok(Claim::Rates {
        id: card.id(),
        version: card.version,
    })
}

pub(super) fn floors(posting: &Posting, scheduler: SchedulerId, by: &dyn SignatureCheck) -> Claimed {
    let (account, bytes) = nothing_moves(posting)?;
    let floors: Paper<Floors> = Paper::open(by, 0, bytes)?;
    floors.same("scheduler", floors.scheduler, "the ledger", scheduler)?;
    floors.account(account, Account::Federation)?;
    Ok(Claim::Floors {
        id: floors.id(),
        version: floors.version,
    })
}

pub(super) fn limit(posting: &Posting, scheduler: SchedulerId, by: &dyn SignatureCheck) -> Claimed {
    let (account, bytes) = nothing_moves(posting)?;
    let limit: Paper<CreditLimit> = Paper::open(by, 0, bytes)?;
    limit.same("scheduler", limit.scheduler, "the ledger", scheduler)?;
    limit.account(account, Account::Institution(limit.institution.clone()))?;
    Ok(Claim::Limit {
        id: limit.id(),
        institution: limit.institution.clone(),
        limit: limit.credits,
        issued_at: limit.issued_at,
    })
}

pub(super) fn payment(posting: &Posting, scheduler: SchedulerId, by: &dyn SignatureCheck) -> Claimed {
    let wrong = || shape(PostingKind::Payment);
    let (Some((from, to, moved)), [bytes]) = (two_legs(posting), posting.evidence.as_slice()) else {
        return Err(wrong());
    };
    let payment: Paper<Payment> = Paper::open(by, 0, bytes)?;
    payment.same("scheduler", payment.scheduler, "the ledger", scheduler)?;
    payment.account(from, Account::Institution(payment.payee.clone()))?;
    payment.account(to, Account::Institution(payment.payer.clone()))?;
    if moved != payment.credits {
        let says = payment.credits;
        return payment.breaks(Rule::Amount { moved, says });
    }
    Ok(Claim::Payment(payment.id()))
}
