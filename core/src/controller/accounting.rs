//! What the books take besides the work itself: answers to receipts, rulings, grants, rates, limits, payments.
//!
//! Every rule here is one of the ledger's own (`karez-ledger`, `evidence`), checked before, so that a bad record is
//! refused to whoever sent it and never reaches the writer.
use super::{Denial, Effect, Reply, RequestId, mind::Controller};
use crate::{
    id::{Institution, RecordId},
    key::{PublicKey, UserId},
    money::{Account, Posting, PostingKind},
    prelude::*,
    records::{
        Acceptance, Beneficiary, CreditLimit, Dispute, Floors, Grant, Lease, Order, Payment, RateCard,
        Receipt, Ruling, Verified,
    },
    store::{Change, put},
    unit::{Credits, Now, UtcMillis},
};
use alloc::boxed::Box;
use serde::{Deserialize, Serialize};

pub(super) const ANSWERS: &str = "answers";
pub(super) const GRANTS: &str = "grants";
pub(super) const RATES: &str = "rates";
pub(super) const FLOORS: &str = "floors";
pub(super) const LIMITS: &str = "limits";
pub(super) const PAYMENTS: &str = "payments";

/// The most receipts whose answers are remembered; those past their window make room.
pub const ANSWERS_MAX: usize = 1_000_000;
/// The most grants that are open at a time.
pub const GRANTS_MAX: usize = 10_000;
/// The most payments.
const PAYMENTS_MAX: usize = 1_000_000;

/// A signed record for the books, with the records it stands on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Filed {
    /// The user agrees with a receipt.
    Acceptance(Box<(Verified<Lease>, Verified<Receipt>, Verified<Acceptance>)>),
    /// The user does not.
    Dispute(Box<(Verified<Lease>, Verified<Receipt>, Verified<Dispute>)>),
    /// The operator ends a dispute.
    Ruling(Verified<Ruling>),
    /// The operator funds a grant.
    Grant(Verified<Grant>),
    /// The operator sets the standard rates.
    Rates(Verified<RateCard>),
    /// The operator promises how institutions share.
    Floors(Verified<Floors>),
    /// The operator sets how far an institution may go under zero.
    Limit(Verified<CreditLimit>),
    /// The operator notes a payment between institutions.
    Payment(Verified<Payment>),
}

/// A receipt that was answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Answered {
    /// Of an open dispute.
    open: Option<Open>,
    until: UtcMillis,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Open {
    dispute: RecordId,
    user: UserId,
    institution: Institution,
    credits: Credits,
}

/// Grants, rates and answers as they stand.
#[derive(Debug, Default)]
pub(super) struct Books {
    pub(super) answers: BTreeMap<RecordId, Answered>,
    pub(super) grants: BTreeMap<RecordId, Grant>,
    pub(super) rates: Option<RateCard>,
    pub(super) floors: Option<Floors>,
    pub(super) limits: BTreeMap<Institution, UtcMillis>,
    pub(super) payments: BTreeSet<RecordId>,
}

impl Controller {
    pub(super) fn on_file(
        &mut self,
        now: Now,
        request: RequestId,
        caller: PublicKey,
        filed: Filed,
        out: &mut Vec<Effect>,
    ) {
        let reply = match self.file(now, caller, &filed, out) {
            Ok(record) => Reply::Filed(record),
            Err(denial) => Reply::Refused(denial),
        };
        out.push(Effect::Reply(request, reply));
    }

    fn file(
        &mut self,
        now: Now,
        caller: PublicKey,
        filed: &Filed,
        out: &mut Vec<Effect>,
    ) -> Result<RecordId, Denial> {
        match filed {
            Filed::Acceptance(papers) => {
                let (lease, receipt, paper) = &**papers;
                self.answerable(
                    now,
                    caller,
                    lease,
                    receipt,
                    (paper.receipt, paper.user, paper.issued_at),
                )?;
                let answered = Answered {
                    open: None,
                    until: receipt.disputable_until,
                };
                let posting = Posting {
                    kind: PostingKind::Accept,
                    legs: vec![(Account::Institution(receipt.node_institution.clone()), 0)],
                    evidence: vec![lease.encode(), receipt.encode(), paper.encode()],
                };
                let row = put(ANSWERS, &receipt.id().0, &answered);
                self.post(now, posting, vec![row], out)?;
                self.books.answers.insert(receipt.id(), answered);
                Ok(paper.id())
            }
            Filed::Dispute(papers) => {
                let (lease, receipt, paper) = &**papers;
                self.answerable(
                    now,
                    caller,
                    lease,
                    receipt,
                    (paper.receipt, paper.user, paper.issued_at),
                )?;
                let answered = Answered {
                    open: Some(Open {
                        dispute: paper.id(),
                        user: receipt.user,
                        institution: receipt.node_institution.clone(),
                        credits: receipt.credits,
                    }),
                    until: receipt.disputable_until,
                };
                let (from, to) = (
                    Account::Institution(receipt.node_institution.clone()),
                    Account::Disputed(receipt.id()),
                );
                let evidence = vec![lease.encode(), receipt.encode(), paper.encode()];
                let posting = Posting::transfer(PostingKind::Dispute, from, to, receipt.credits, evidence)
                    .ok_or_else(too_much)?;
                let row = put(ANSWERS, &receipt.id().0, &answered);
                self.post(now, posting, vec![row], out)?;
                self.books.answers.insert(receipt.id(), answered);
                out.push(Effect::Log(format!(
                    "receipt {} is disputed: {} credits are frozen until `karez ledger rule`",
                    receipt.id().short(),
                    receipt.credits
                )));
                Ok(paper.id())
            }
            Filed::Ruling(ruling) => self.rule(now, caller, ruling, out),
            Filed::Grant(grant) => self.fund(now, caller, grant, out),
            Filed::Rates(card) => {
                self.operator(caller, card.scheduler.0)?;
                let next = self.books.rates.as_ref().map_or(1, |card| card.version + 1);
                if card.version != next {
                    return no(format!("has version {}, the next one is {next}", card.version));
                }
                let posting = Posting {
                    kind: PostingKind::Rates,
                    legs: vec![(Account::Federation, 0)],
                    evidence: vec![card.encode()],
                };
                let value: &RateCard = card;
                self.post(now, posting, vec![put(RATES, b"current", value)], out)?;
                self.books.rates = Some(value.clone());
                Ok(card.id())
            }
            Filed::Floors(floors) => self.set_floors(now, caller, floors, out),
            Filed::Limit(limit) => {
                self.operator(caller, limit.scheduler.0)?;
                let name = &limit.institution;
                if self
                    .books
                    .limits
                    .get(name)
                    .is_some_and(|at| *at >= limit.issued_at)
                {
                    return no("is older than the one in force".into());
                }
                let posting = Posting {
                    kind: PostingKind::Limit,
                    legs: vec![(Account::Institution(name.clone()), 0)],
                    evidence: vec![limit.encode()],
                };
                let row = put(LIMITS, name.as_str().as_bytes(), &limit.issued_at);
                self.post(now, posting, vec![row], out)?;
                self.accounts.set_limit(name.clone(), limit.credits);
                self.books.limits.insert(name.clone(), limit.issued_at);
                Ok(limit.id())
            }
            Filed::Payment(payment) => {
                self.operator(caller, payment.scheduler.0)?;
                if self.books.payments.contains(&payment.id()) {
                    return no("was posted before".into());
                }
                if self.books.payments.len() >= PAYMENTS_MAX {
                    return no(format!("would be more than {PAYMENTS_MAX} payments"));
                }
                let (from, to) = (
                    Account::Institution(payment.payee.clone()),
                    Account::Institution(payment.payer.clone()),
                );
                let evidence = vec![payment.encode()];
                let posting = Posting::transfer(PostingKind::Payment, from, to, payment.credits, evidence)
                    .ok_or_else(too_much)?;
                self.post(now, posting, vec![put(PAYMENTS, &payment.id().0, &())], out)?;
                self.books.payments.insert(payment.id());
                Ok(payment.id())
            }
        }
    }

    /// From now on institutions share so. Another half-life counts from the next start on, when histories are counted anew.
    fn set_floors(
        &mut self,
        now: Now,
        caller: PublicKey,
        floors: &Verified<Floors>,
        out: &mut Vec<Effect>,
    ) -> Result<RecordId, Denial> {
        self.operator(caller, floors.scheduler.0)?;
        let next = self.books.floors.as_ref().map_or(1, |before| before.version + 1);
        if floors.version != next {
            return no(format!("has version {}, the next one is {next}", floors.version));
        }
        let posting = Posting {
            kind: PostingKind::Floors,
            legs: vec![(Account::Federation, 0)],
            evidence: vec![floors.encode()],
        };
        let value: &Floors = floors;
        self.post(now, posting, vec![put(FLOORS, b"current", value)], out)?;
        if value.shares.half_life != self.fair.shares().half_life {
            let why = "another half-life was signed: it counts from the scheduler's next start on";
            out.push(Effect::Log(why.into()));
        }
        self.fair.set_shares(value.shares.clone());
        self.books.floors = Some(value.clone());
        Ok(floors.id())
    }

    fn operator(&self, caller: PublicKey, names: PublicKey) -> Result<(), Denial> {
        if caller != self.id.0 {
            return Err(Denial::NotOperator);
        }
        if names != self.id.0 {
            return no("is for another scheduler's ledger".into());
        }
        Ok(())
    }

    /// May this user answer this receipt now?
    fn answerable(
        &mut self,
        now: Now,
        caller: PublicKey,
        lease: &Verified<Lease>,
        receipt: &Verified<Receipt>,
        (named, user, dated): (RecordId, UserId, UtcMillis),
    ) -> Result<(), Denial> {
        if receipt.scheduler != self.id || receipt.lease != lease.id() || named != receipt.id() {
            return no("does not name a receipt of this ledger, or comes with another lease".into());
        }
        if user.0 != caller || receipt.user != user {
            return no("is for whoever paid: answer your own receipts".into());
        }
        if now.utc > receipt.disputable_until || dated > receipt.disputable_until {
            return no("comes too late: the receipt's window is over, and silence accepted it".into());
        }
        if let Some(before) = self.books.answers.get(&receipt.id()) {
            return no(if before.open.is_some() {
                "is about a receipt whose dispute is open".into()
            } else {
                "is about a receipt that was answered before".into()
            });
        }
        if self.books.answers.len() >= ANSWERS_MAX {
            // Past its window no receipt can be answered again, so its answer need not be remembered.
            let (books, now) = (&mut self.books, now.utc);
            books.answers.retain(|_, a| a.open.is_some() || a.until >= now);
            if books.answers.len() >= ANSWERS_MAX {
                return no("cannot be taken while so many others are open: try again later".into());
            }
        }
        Ok(())
    }

    fn rule(
        &mut self,
        now: Now,
        caller: PublicKey,
        ruling: &Verified<Ruling>,
        out: &mut Vec<Effect>,
    ) -> Result<RecordId, Denial> {
        self.operator(caller, ruling.scheduler.0)?;
        let answered = self.books.answers.get(&ruling.receipt);
        let open = answered.and_then(|a| a.open.clone().map(|open| (open, a.until)));
        let Some((open, until)) = open.filter(|(open, _)| open.dispute == ruling.dispute) else {
            return no("is about no open dispute: `karez ledger disputes` lists them".into());
        };
        if ruling.refund > open.credits {
            return no(format!(
                "refunds {}, but the receipt paid {}",
                ruling.refund, open.credits
            ));
        }
        let rest = open.credits.saturating_sub(ruling.refund);
        let leg = |credits: Credits| credits.leg().ok_or_else(too_much);
        let posting = Posting {
            kind: PostingKind::Ruling,
            legs: vec![
                (Account::Disputed(ruling.receipt), -leg(open.credits)?),
                (Account::User(open.user), leg(ruling.refund)?),
                (Account::Institution(open.institution), leg(rest)?),
            ],
            evidence: vec![ruling.encode()],
        };
        let answered = Answered { open: None, until };
        let row = put(ANSWERS, &ruling.receipt.0, &answered);
        self.post(now, posting, vec![row], out)?;
        self.books.answers.insert(ruling.receipt, answered);
        Ok(ruling.id())
    }

    fn fund(
        &mut self,
        now: Now,
        caller: PublicKey,
        grant: &Verified<Grant>,
        out: &mut Vec<Effect>,
    ) -> Result<RecordId, Denial> {
        self.operator(caller, grant.scheduler.0)?;
        if self.books.grants.contains_key(&grant.id()) {
            return no("was posted before".into());
        }
        if grant.expires_at <= now.utc {
            return no("has expired".into());
        }
        if self.books.grants.len() >= GRANTS_MAX {
            return no(format!("would be more than {GRANTS_MAX} open grants"));
        }
        if let Beneficiary::User(user) = &grant.beneficiary
            && !self.members.contains_key(&user.0)
        {
            return no(format!("is for {}, who is not admitted here", user.short()));
        }
        let to = Account::Grant(grant.id());
        let evidence = vec![grant.encode()];
        let posting = Posting::transfer(PostingKind::Grant, grant.from(), to, grant.credits, evidence)
            .ok_or_else(too_much)?;
        let value: &Grant = grant;
        let row = put(GRANTS, &grant.id().0, value);
        self.post(now, posting, vec![row], out)?;
        self.books.grants.insert(grant.id(), value.clone());
        Ok(grant.id())
    }

    fn post(
        &mut self,
        now: Now,
        posting: Posting,
        mut changes: Vec<Change>,
        out: &mut Vec<Effect>,
    ) -> Result<(), Denial> {
        self.accounts.apply(&posting).map_err(Denial::Ledger)?;
        changes.push(Change::Post { posting, at: now.utc });
        out.push(Effect::Persist(changes));
        Ok(())
    }

    /// Gives back what is left of grants past their date, and forgets those that nothing can come back to.
    pub(super) fn expire_grants(&mut self, now: Now, out: &mut Vec<Effect>) {
        let expired: Vec<RecordId> = self
            .books
            .grants
            .iter()
            .filter(|(_, grant)| grant.expires_at <= now.utc)
            .map(|(id, _)| *id)
            .collect();
        for id in expired {
            let Some(grant) = self.books.grants.get(&id) else {
                continue;
            };
            let left = u64::try_from(self.accounts.balance(&Account::Grant(id))).unwrap_or(0);
            let to = grant.from();
            let posting = Posting::transfer(
                PostingKind::Expire,
                Account::Grant(id),
                to,
                Credits(left),
                Vec::new(),
            );
            if let Some(posting) = posting.filter(|_| left > 0)
                && let Err(denial) = self.post(now, posting, Vec::new(), out)
            {
                out.push(Effect::Log(format!(
                    "grant {} cannot expire: {denial}",
                    id.short()
                )));
                continue;
            }
            // An open job may still release credits to it.
            let waited_for = self
                .jobs
                .values()
                .any(|job| !job.state.ended() && job.grant.is_some_and(|(from, _)| from == id));
            if !waited_for {
                self.books.grants.remove(&id);
                out.push(Effect::Persist(vec![Change::Delete {
                    table: GRANTS,
                    key: id.0.to_vec(),
                }]));
            }
        }
    }

    /// The grant that pays for an order: of those that cover it and have anything left, the one that expires first.
    pub(super) fn grant_for(&self, now: Now, order: &Order) -> Option<(RecordId, Credits)> {
        self.books
            .grants
            .iter()
            .filter(|(_, grant)| {
                grant.expires_at > now.utc && grant.covers(order.user, &order.institution, order.work.kind())
            })
            .filter_map(|(id, grant)| {
                let left = u64::try_from(self.accounts.balance(&Account::Grant(*id))).ok()?;
                (left > 0).then_some((grant.expires_at, *id, Credits(left)))
            })
            .min()
            .map(|(_, id, left)| (id, left))
    }

    /// The grants that are open, with what is left of each.
    pub fn grants(&self) -> impl Iterator<Item = (RecordId, &Grant, Credits)> {
        self.books.grants.iter().map(|(id, grant)| {
            let left = u64::try_from(self.accounts.balance(&Account::Grant(*id))).unwrap_or(0);
            (*id, grant, Credits(left))
        })
    }

    /// The standard rates in force.
    pub fn rate_card(&self) -> Option<&RateCard> {
        self.books.rates.as_ref()
    }

    /// How institutions share: what was signed, or with version 0 what the settings say.
    pub fn floors(&self) -> Floors {
        let unsigned = || Floors {
            scheduler: self.id,
            version: 0,
            shares: self.fair.shares().clone(),
            issued_at: UtcMillis(0),
        };
        self.books.floors.clone().unwrap_or_else(unsigned)
    }

    /// Open disputes: receipt, dispute, user, institution, credits.
    pub fn disputes(&self) -> impl Iterator<Item = (RecordId, RecordId, UserId, &Institution, Credits)> {
        self.books.answers.iter().filter_map(|(receipt, answered)| {
            let open = answered.open.as_ref()?;
            Some((*receipt, open.dispute, open.user, &open.institution, open.credits))
        })
    }
}

fn no<T>(why: String) -> Result<T, Denial> {
    Err(Denial::Record(why))
}

fn too_much() -> Denial {
    Denial::Record("is about more credits than an account can hold".into())
}
