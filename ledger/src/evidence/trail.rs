//! What the rules remember of earlier entries.
use super::{
    Answer, Claim, Frozen, Redeem, Reserved, Settled,
    error::{EvidenceError, Rule},
};
use karez_core::{
    id::{Institution, JobId, LeaseKey, RecordId},
    key::UserId,
    money::{Account, Accounts},
    records::{
        CreditLimit, Delegation, Floors, Grant, Invitation, Order, Payment, RateCard, Receipt, Record, Ruling,
    },
    unit::{Credits, UtcMillis},
};
use std::{
    collections::{HashMap, HashSet},
    sync::LazyLock,
};

/// 16 bytes of a BLAKE3 hash: enough to tell honest leases apart, and who crafts a collision only bars his own.
pub(crate) type Mark = [u8; MARK];
pub(super) const MARK: usize = 16;

static MARKS: LazyLock<blake3::Hasher> =
    LazyLock::new(|| blake3::Hasher::new_derive_key("karez-ledger/1 mark"));

fn mark(parts: &[&[u8]]) -> Mark {
    // The context was hashed before.
    let mut hasher = blake3::Hasher::clone(&MARKS);
    for part in parts {
        hasher.update(part);
    }
    let mut out = [0; 16];
    out.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    out
}

pub(super) fn lease_mark(key: &LeaseKey) -> Mark {
    mark(&[
        b"lease",
        &key.job.0.0,
        &key.part.to_be_bytes(),
        &key.fence.to_be_bytes(),
    ])
}

pub(super) fn part_mark(key: &LeaseKey) -> Mark {
    mark(&[b"part", &key.job.0.0, &key.part.to_be_bytes()])
}

fn redeem_mark(redeem: &Redeem) -> Mark {
    mark(&[b"redeem", &redeem.invitation.0, &redeem.user.0.0])
}

fn released_mark(job: &JobId) -> Mark {
    mark(&[b"released", &job.0.0])
}

pub(super) fn answered_mark(receipt: &RecordId) -> Mark {
    mark(&[b"answered", &receipt.0])
}

fn delegation_mark(delegation: &RecordId) -> Mark {
    mark(&[b"delegation", &delegation.0])
}

fn payment_mark(payment: &RecordId) -> Mark {
    mark(&[b"payment", &payment.0])
}

/// Sixteen bytes of a receipt's id, as a gist has them.
pub(super) fn beginning(receipt: &RecordId) -> Mark {
    let mut out = [0; MARK];
    out.copy_from_slice(&receipt.0[..MARK]);
    out
}

/// Eight bytes of a receipt's id: beside its lease they tell whether just this receipt was settled.
fn tag(receipt: &[u8]) -> [u8; 8] {
    let mut out = [0; 8];
    out.copy_from_slice(&receipt[..8]);
    out
}

/// What the rules remember. About 25 bytes per settled lease, 17 per finished part and per job that is over, and
/// 150 per job, grant or dispute that is still open.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Trail {
    pub(crate) jobs: HashMap<JobId, Job>,
    /// Leases settled, and by which receipt.
    pub(crate) leases: HashMap<Mark, [u8; 8]>,
    /// Parts done, jobs released, invitations redeemed by a user, receipts answered, payments posted.
    pub(crate) marks: HashSet<Mark>,
    pub(crate) invitations: HashMap<RecordId, u32>,
    pub(crate) grants: HashMap<RecordId, Grant>,
    pub(crate) disputes: HashMap<RecordId, Frozen>,
    pub(crate) limits: HashMap<Institution, UtcMillis>,
    pub(crate) rate_card: u32,
    pub(crate) floors: u32,
}

/// A job whose escrow is still open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Job {
    pub(crate) user: UserId,
    pub(crate) reserved: u64,
    /// How much of it is the user's own.
    pub(crate) own: u64,
    pub(crate) grant: Option<RecordId>,
    pub(crate) settled: u64,
}

/// How a posting changes the trail; can be taken back.
#[derive(Debug, Clone)]
pub(crate) enum Change {
    Nothing,
    Mark(Mark),
    Redeem(RecordId, Mark),
    Fund(RecordId, Box<Grant>),
    Reserve(JobId, Job),
    Settle {
        job: JobId,
        credits: u64,
        lease: Mark,
        receipt: [u8; 8],
        part: Option<Mark>,
        /// The job, when this takes the last of what it reserved.
        spent: Option<Job>,
    },
    Release(JobId, Job),
    Dispute(RecordId, Mark, Frozen),
    Ruling(RecordId, Frozen),
    Rates {
        before: u32,
        version: u32,
    },
    Floors {
        before: u32,
        version: u32,
    },
    Limit {
        institution: Institution,
        limit: Credits,
        before: Credits,
        issued_at: UtcMillis,
        issued_before: Option<UtcMillis>,
    },
}

type Checked = Result<Change, EvidenceError>;

fn breaks<T: Record>(index: usize, id: RecordId, rule: Rule) -> Checked {
    Err(EvidenceError::Rule {
        index,
        record: T::TYPE,
        id,
        rule: Box::new(rule),
    })
}

/// Versions follow each other without gaps.
fn follows<T: Record>(id: RecordId, before: u32, version: u32) -> Result<(), EvidenceError> {
    if before.checked_add(1) == Some(version) {
        return Ok(());
    }
    let (found, before) = (u64::from(version), u64::from(before));
    breaks::<T>(0, id, Rule::Order { found, before }).map(drop)
}

impl Trail {
    /// Applies the rules that look back, for an entry of `at`.
    pub(crate) fn check(&self, at: UtcMillis, claim: &Claim, accounts: &Accounts) -> Checked {
        match claim {
            Claim::Grant(None) => Ok(Change::Nothing),
            Claim::Grant(Some(redeem)) => self.check_redeem(redeem),
            Claim::Fund(id, grant) => {
                if self.grants.contains_key(id) {
                    return breaks::<Grant>(0, *id, Rule::PostedTwice);
                }
                Ok(Change::Fund(*id, grant.clone()))
            }
            Claim::Delegate { id, there } => {
                let mark = delegation_mark(id);
                match (self.marks.contains(&mark), there) {
                    (false, true) => Ok(Change::Mark(mark)),
                    (true, false) => Ok(Change::Nothing),
                    (true, true) => breaks::<Delegation>(0, *id, Rule::PostedTwice),
                    (false, false) => breaks::<Delegation>(0, *id, Rule::NeverLent),
                }
            }
            Claim::Reserve(reserved) => self.check_reserve(at, reserved),
            Claim::Settle(settled) => self.check_settle(settled),
            Claim::Release { job, user, grant } => self.check_release(*job, *user, *grant, accounts),
            Claim::Answer(answer) => self.check_answer(at, answer),
            Claim::Ruling { .. } => self.check_ruling(claim),
            Claim::Expire { grant, to, amount } => self.check_expire(at, *grant, to, *amount, accounts),
            Claim::Rates { id, version } => {
                let (before, version) = (self.rate_card, *version);
                follows::<RateCard>(*id, before, version)?;
                Ok(Change::Rates { before, version })
            }
            Claim::Floors { id, version } => {
                let (before, version) = (self.floors, *version);
                follows::<Floors>(*id, before, version)?;
                Ok(Change::Floors { before, version })
            }
            Claim::Limit {
                id,
                institution,
                limit,
                issued_at,
            } => {
                let issued_before = self.limits.get(institution).copied();
                if let Some(before) = issued_before.filter(|before| before >= issued_at) {
                    let (found, before) = (issued_at.0, before.0);
                    return breaks::<CreditLimit>(0, *id, Rule::Order { found, before });
                }
                Ok(Change::Limit {
                    institution: institution.clone(),
                    limit: *limit,
                    before: accounts.limit(institution),
                    issued_at: *issued_at,
                    issued_before,
                })
            }
            Claim::Answered(mark) if self.marks.contains(mark) => Err(EvidenceError::Gist {
                rule: Box::new(Rule::Repeated),
            }),
            Claim::Answered(mark) => Ok(Change::Mark(*mark)),
            Claim::Payment(id) => {
                let mark = payment_mark(id);
                if self.marks.contains(&mark) {
                    return breaks::<Payment>(0, *id, Rule::PostedTwice);
                }
                Ok(Change::Mark(mark))
            }
        }
    }

    fn check_redeem(&self, redeem: &Redeem) -> Checked {
        let uses = self.invitations.get(&redeem.invitation).copied().unwrap_or(0);
        let mark = redeem_mark(redeem);
        if uses >= redeem.uses_max || self.marks.contains(&mark) {
            return breaks::<Invitation>(0, redeem.invitation, Rule::Redeemed { uses });
        }
        Ok(Change::Redeem(redeem.invitation, mark))
    }

    fn check_reserve(&self, at: UtcMillis, reserved: &Reserved) -> Checked {
        let job = reserved.job;
        let no = |rule| breaks::<Order>(0, job.0, rule);
        if self.jobs.contains_key(&job) || self.marks.contains(&released_mark(&job)) {
            return no(Rule::Reserved);
        }
        if let Some((id, _)) = reserved.from_grant {
            let scope = reserved.scope.as_ref();
            let Some(grant) = self.grants.get(&id) else {
                return no(Rule::NoGrant { grant: id });
            };
            if scope.is_some_and(|(of, work)| !grant.covers(reserved.user, of, *work)) {
                return no(Rule::OutOfScope { grant: id });
            }
            if at >= grant.expires_at {
                let (expires, at) = (grant.expires_at.0, at.0);
                return no(Rule::Expiry {
                    grant: id,
                    expires,
                    at,
                });
            }
        }
        let granted = reserved.from_grant.map_or(0, |(_, credits)| credits.0);
        let state = Job {
            user: reserved.user,
            reserved: reserved.from_user.0.saturating_add(granted),
            own: reserved.from_user.0,
            grant: reserved.from_grant.map(|(id, _)| id),
            settled: 0,
        };
        Ok(Change::Reserve(job, state))
    }

    fn check_settle(&self, settled: &Settled) -> Checked {
        let origin = settled.origin.as_ref();
        let no = |rule| match origin {
            Some(origin) => breaks::<Receipt>(origin.receipt_at, origin.receipt, rule),
            None => {
                let rule = Box::new(rule);
                Err(EvidenceError::Gist { rule })
            }
        };
        let (job, lease, part) = (settled.job, settled.lease, settled.part);
        if self.leases.contains_key(&lease) {
            return no(origin.map_or(Rule::Repeated, |o| Rule::SettledTwice { key: o.key }));
        }
        if part.is_some_and(|part| self.marks.contains(&part)) {
            return no(origin.map_or(Rule::Repeated, |o| Rule::DoneTwice { part: o.key.part }));
        }
        // A job that never reserved, or is over, may still receive what is donated.
        let (reserved, before) = self
            .jobs
            .get(&job)
            .map_or((0, 0), |job| (job.reserved, job.settled));
        let after = before.saturating_add(settled.credits.0);
        if after > reserved {
            return no(Rule::OverReserved {
                settled: Credits(after),
                reserved: Credits(reserved),
            });
        }
        Ok(Change::Settle {
            job,
            credits: settled.credits.0,
            lease,
            receipt: tag(&settled.receipt),
            part,
            spent: self
                .jobs
                .get(&job)
                .filter(|job| after == job.reserved && after > 0)
                .cloned(),
        })
    }

    fn check_release(
        &self,
        job: JobId,
        (user, own): (UserId, Credits),
        grant: Option<(RecordId, Credits)>,
        accounts: &Accounts,
    ) -> Checked {
        let no = |rule| {
            let rule = Box::new(rule);
            Err(EvidenceError::Job { job, rule })
        };
        let Some(state) = self.jobs.get(&job) else {
            let over = self.marks.contains(&released_mark(&job));
            return no(if over { Rule::Released } else { Rule::NotReserved });
        };
        if state.user != user {
            return no(Rule::Account {
                found: Account::User(user),
                expected: Account::User(state.user),
            });
        }
        let left = u64::try_from(accounts.balance(&Account::Escrow(job))).unwrap_or(0);
        // The user's own credits were the last to be spent.
        let own_left = match state.grant {
            Some(_) => left.min(state.own),
            None => left,
        };
        if own.0 != own_left {
            let says = Credits(own_left);
            return no(Rule::Amount { moved: own, says });
        }
        match (state.grant, grant) {
            (None, None) => {}
            (Some(id), Some((found, moved))) if id == found => {
                let says = Credits(left - own_left);
                if moved != says {
                    return no(Rule::Amount { moved, says });
                }
            }
            (None, Some((found, _))) => {
                return no(Rule::Account {
                    found: Account::Grant(found),
                    expected: Account::User(user),
                });
            }
            (Some(id), found) => {
                return no(Rule::Account {
                    found: found.map_or(Account::User(user), |(id, _)| Account::Grant(id)),
                    expected: Account::Grant(id),
                });
            }
        }
        Ok(Change::Release(job, state.clone()))
    }

    fn check_answer(&self, at: UtcMillis, answer: &Answer) -> Checked {
        let no = |rule| {
            Err(EvidenceError::Rule {
                index: 2,
                record: answer.record,
                id: answer.id,
                rule: Box::new(rule),
            })
        };
        if self.leases.get(&lease_mark(&answer.key)) != Some(&tag(&answer.receipt.0)) {
            return no(Rule::NotSettled);
        }
        let mark = answered_mark(&answer.receipt);
        if self.marks.contains(&mark) {
            return no(Rule::Answered);
        }
        // Its own date is its signer's word: what was written down after the window is late, whatever it says.
        if at > answer.until {
            let (at, until) = (at.0, answer.until.0);
            return no(Rule::TooLate { at, until });
        }
        Ok(match &answer.frozen {
            None => Change::Mark(mark),
            Some(frozen) => Change::Dispute(answer.id, mark, frozen.clone()),
        })
    }

    fn check_ruling(&self, claim: &Claim) -> Checked {
        let Claim::Ruling {
            ruling,
            dispute,
            receipt,
            user,
            institution,
        } = claim
        else {
            return Ok(Change::Nothing);
        };
        let no = |rule| breaks::<Ruling>(0, *ruling, rule);
        let Some(frozen) = self.disputes.get(dispute).filter(|f| f.receipt == *receipt) else {
            return no(Rule::NoDispute);
        };
        for (found, expected) in [
            (Account::User(user.0), Account::User(frozen.user)),
            (
                Account::Institution(institution.0.clone()),
                Account::Institution(frozen.institution.clone()),
            ),
        ] {
            if found != expected {
                return no(Rule::Account { found, expected });
            }
        }
        let moved = user.1.saturating_add(institution.1);
        if moved != frozen.credits {
            let says = frozen.credits;
            return no(Rule::Amount { moved, says });
        }
        Ok(Change::Ruling(*dispute, frozen.clone()))
    }

    fn check_expire(
        &self,
        at: UtcMillis,
        id: RecordId,
        to: &Account,
        moved: Credits,
        accounts: &Accounts,
    ) -> Checked {
        let no = |rule| breaks::<Grant>(0, id, rule);
        let Some(grant) = self.grants.get(&id) else {
            return no(Rule::NoGrant { grant: id });
        };
        if at < grant.expires_at {
            let (expires, at) = (grant.expires_at.0, at.0);
            return no(Rule::Expiry {
                grant: id,
                expires,
                at,
            });
        }
        let expected = grant.from();
        if *to != expected {
            let found = to.clone();
            return no(Rule::Account { found, expected });
        }
        let left = Credits(u64::try_from(accounts.balance(&Account::Grant(id))).unwrap_or(0));
        if moved != left || left == Credits::ZERO {
            return no(Rule::Amount { moved, says: left });
        }
        Ok(Change::Nothing)
    }

    pub(crate) fn apply(&mut self, change: &Change) {
        match change {
            Change::Nothing => {}
            Change::Mark(mark) => {
                self.marks.insert(*mark);
            }
            Change::Redeem(invitation, mark) => {
                *self.invitations.entry(*invitation).or_default() += 1;
                self.marks.insert(*mark);
            }
            Change::Fund(id, grant) => {
                self.grants.insert(*id, Grant::clone(grant));
            }
            Change::Reserve(job, state) => {
                self.jobs.insert(*job, state.clone());
            }
            Change::Settle {
                job,
                credits,
                lease,
                receipt,
                part,
                spent,
            } => {
                if spent.is_some() {
                    // Nothing is left to release: it is over.
                    self.jobs.remove(job);
                    self.marks.insert(released_mark(job));
                } else if let Some(job) = self.jobs.get_mut(job) {
                    job.settled += credits;
                }
                self.leases.insert(*lease, *receipt);
                self.marks.extend(*part);
            }
            Change::Release(job, _) => {
                self.jobs.remove(job);
                self.marks.insert(released_mark(job));
            }
            Change::Dispute(id, mark, frozen) => {
                self.marks.insert(*mark);
                self.disputes.insert(*id, frozen.clone());
            }
            Change::Ruling(dispute, _) => {
                self.disputes.remove(dispute);
            }
            Change::Rates { version, .. } => self.rate_card = *version,
            Change::Floors { version, .. } => self.floors = *version,
            Change::Limit {
                institution,
                issued_at,
                ..
            } => {
                self.limits.insert(institution.clone(), *issued_at);
            }
        }
    }

    pub(crate) fn revert(&mut self, change: &Change) {
        match change {
            Change::Nothing => {}
            Change::Mark(mark) => {
                self.marks.remove(mark);
            }
            Change::Redeem(invitation, mark) => {
                if let Some(uses) = self.invitations.get_mut(invitation) {
                    *uses -= 1;
                }
                self.marks.remove(mark);
            }
            Change::Fund(id, _) => {
                self.grants.remove(id);
            }
            Change::Reserve(job, _) => {
                self.jobs.remove(job);
            }
            Change::Settle {
                job,
                credits,
                lease,
                part,
                spent,
                ..
            } => {
                if let Some(state) = spent {
                    self.marks.remove(&released_mark(job));
                    self.jobs.insert(*job, state.clone());
                } else if let Some(job) = self.jobs.get_mut(job) {
                    job.settled -= credits;
                }
                self.leases.remove(lease);
                if let Some(part) = part {
                    self.marks.remove(part);
                }
            }
            Change::Release(job, state) => {
                self.marks.remove(&released_mark(job));
                self.jobs.insert(*job, state.clone());
            }
            Change::Dispute(id, mark, _) => {
                self.disputes.remove(id);
                self.marks.remove(mark);
            }
            Change::Ruling(dispute, frozen) => {
                self.disputes.insert(*dispute, frozen.clone());
            }
            Change::Rates { before, .. } => self.rate_card = *before,
            Change::Floors { before, .. } => self.floors = *before,
            Change::Limit {
                institution,
                issued_before,
                ..
            } => match issued_before {
                Some(at) => {
                    self.limits.insert(institution.clone(), *at);
                }
                None => {
                    self.limits.remove(institution);
                }
            },
        }
    }
}
