//! What a posting must prove: the signed records behind it, checked when it is posted and again by the verifier.
//!
//! | kind | legs, in this order | evidence, in this order |
//! |---|---|---|
//! | grant | federation −, users + | nothing, or the invitation of the one user (amount up to its credits) |
//! | reserve | `user:order.user` −, `escrow:job` + | the order (amount up to `credits_max`; once per job) |
//! | settle | `escrow:job` −, `institution:lease.institution` + | order, lease, all readings, usage, receipt |
//! | release | `escrow:job` −, the job's user + | nothing (all that is left; once per job) |
//!
//! Legs of zero are legs: a donated part still leaves an entry with its receipt.
//!
//! [`examine`] checks what the posting says by itself (signatures, who names whom, amounts): the dear part, and it
//! needs no book. What depends on earlier entries (a lease settles once, a part is done once, no job settles more
//! than it reserved) is checked by the book in the order of its entries.
use karez_core::{
    id::{Institution, JobId, LeaseKey, RecordId},
    key::{SchedulerId, UserId},
    money::{Account, Accounts, Posting, PostingKind},
    records::{
        Flag, Invitation, Lease, MeterReading, Order, Outcome, Receipt, Record, RecordError, Role, Signed,
        Usage, Verified, describe,
    },
    unit::{Credits, DeviceMillis},
};
use karez_proto::records as wire;
use prost::Message;
use std::collections::{HashMap, HashSet};

/// Why the evidence does not carry a posting.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EvidenceError {
    /// Legs or evidence have the wrong shape for the kind of posting.
    #[error("a {kind} posting needs {needs}")]
    Shape {
        /// Which kind.
        kind: &'static str,
        /// What it needs.
        needs: &'static str,
    },
    /// A record cannot be read, or its signature is bad.
    #[error("evidence {index}, record {id}: {error}")]
    Record {
        /// Its place in the evidence, from 0.
        index: usize,
        /// The id its bytes have.
        id: RecordName,
        /// What is wrong with it.
        error: Box<RecordError>,
    },
    /// A record is sound by itself but breaks a rule here.
    #[error("evidence {index}, {record} {id}: {rule}")]
    Rule {
        /// Its place in the evidence, from 0.
        index: usize,
        /// Its type.
        record: &'static str,
        /// Its id.
        id: RecordId,
        /// Which rule.
        rule: Box<Rule>,
    },
    /// The job's money does not allow it.
    #[error("job {job}: {rule}")]
    Job {
        /// Which job.
        job: JobId,
        /// Which rule.
        rule: Box<Rule>,
    },
    /// The records are for another scheduler's ledger.
    #[error("the records are for the ledger of scheduler {scheduler}")]
    OtherLedger {
        /// Whose.
        scheduler: SchedulerId,
    },
}

/// The id of a record that may be too damaged to have one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordName(pub Option<RecordId>);

impl std::fmt::Display for RecordName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(id) => id.fmt(f),
            None => f.write_str("(unreadable)"),
        }
    }
}

/// The rules of the paper trail.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Rule {
    /// The envelope has bytes that its fields do not account for.
    #[error("the envelope is not in its one canonical form")]
    Canonical,
    /// A field must equal what an earlier record says.
    #[error("{field} is {found}, {of} says {expected}")]
    Field {
        /// Which field.
        field: &'static str,
        /// What it holds.
        found: String,
        /// Where the right value stands.
        of: &'static str,
        /// The right value.
        expected: String,
    },
    /// Readings are numbered without gaps.
    #[error("sequence is {found}, expected {expected}")]
    Sequence {
        /// Its number.
        found: u32,
        /// The next number.
        expected: u32,
    },
    /// Each reading names the one before.
    #[error("it does not name the reading before it")]
    Chain,
    /// Totals never fall.
    #[error("a meter is lower than in the reading before it")]
    MetersFell,
    /// The last word equals the last reading.
    #[error("its meters differ from the last reading's")]
    MetersDiffer,
    /// The part reaches beyond the order.
    #[error("it covers items {first} to {end}, the order has {items}")]
    Items {
        /// First item.
        first: u64,
        /// One past the last.
        end: u64,
        /// Items of the order.
        items: u64,
    },
    /// The lease is dearer than the order allows.
    #[error("its rate is {rate} micro-credits per hour, the order allows {allowed}")]
    Rate {
        /// The lease's.
        rate: u64,
        /// The order's.
        allowed: u64,
    },
    /// More device time is billed than the lease allows.
    #[error("bills {billed} device-ms, its lease allows {allowed}")]
    OverLease {
        /// Billed.
        billed: u64,
        /// The lease's limit.
        allowed: u64,
    },
    /// More device time is billed than was measured.
    #[error("bills {billed} device-ms, {of} says {measured}")]
    OverMeter {
        /// Billed.
        billed: u64,
        /// Who measured.
        of: &'static str,
        /// What was measured.
        measured: u64,
    },
    /// The bill is not rate × time.
    #[error("asks {asked}, the bill is {bill}")]
    Bill {
        /// What the receipt asks.
        asked: Credits,
        /// What it may ask.
        bill: Credits,
    },
    /// Only finished parts are paid.
    #[error("asks {asked} for a part that did not finish")]
    NotDone {
        /// What the receipt asks.
        asked: Credits,
    },
    /// The posting moves something else than the record says.
    #[error("the posting moves {moved}, the record says {says}")]
    Amount {
        /// By the legs.
        moved: Credits,
        /// By the record.
        says: Credits,
    },
    /// The posting has other accounts than the record.
    #[error("the posting's account is {found}, expected {expected}")]
    Account {
        /// In the legs.
        found: Account,
        /// By the records.
        expected: Account,
    },
    /// An invitation is for a user.
    #[error("it does not invite a user")]
    Role,
    /// An invitation counts its uses.
    #[error("it was redeemed {uses} times already, or by this user before")]
    Redeemed {
        /// How often.
        uses: u32,
    },
    /// A job reserves once.
    #[error("it has reserved its credits before")]
    Reserved,
    /// A release needs a reservation.
    #[error("it never reserved credits")]
    NotReserved,
    /// A job is released once.
    #[error("it has been released before")]
    Released,
    /// A lease is paid once.
    #[error("lease {key} has been settled before")]
    SettledTwice {
        /// Which lease.
        key: LeaseKey,
    },
    /// A part is done once.
    #[error("part {part} has been settled as done before")]
    DoneTwice {
        /// Which part.
        part: u32,
    },
    /// No job pays more than it reserved.
    #[error("it would settle {settled}, it reserved {reserved}")]
    OverReserved {
        /// With this posting.
        settled: Credits,
        /// In all.
        reserved: Credits,
    },
}

/// A posting whose records were all verified and fit each other and its legs. Only a book can say the rest.
#[derive(Debug, Clone)]
pub struct Examined {
    scheduler: SchedulerId,
    posting: Posting,
    claim: Claim,
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
    pub(crate) fn into_posting(self) -> Posting {
        self.posting
    }
}

/// What a posting says in the end, for the rules that look back.
#[derive(Debug, Clone)]
pub(crate) enum Claim {
    Grant(Option<Redeem>),
    Reserve {
        job: JobId,
        order_at: usize,
        user: UserId,
        amount: Credits,
    },
    Settle(Settled),
    Release {
        job: JobId,
        user: UserId,
        amount: Credits,
    },
}

#[derive(Debug, Clone)]
pub(crate) struct Redeem {
    invitation: RecordId,
    uses_max: u32,
    user: UserId,
}

#[derive(Debug, Clone)]
pub(crate) struct Settled {
    key: LeaseKey,
    done: bool,
    receipt: RecordId,
    receipt_at: usize,
    pub(crate) credits: Credits,
    pub(crate) billed: DeviceMillis,
    pub(crate) institution: Institution,
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
    let claim = match posting.kind {
        PostingKind::Grant => Claim::Grant(examine_grant(&posting, scheduler)?),
        PostingKind::Reserve => examine_reserve(&posting, scheduler)?,
        PostingKind::Settle => Claim::Settle(examine_settle(&posting, scheduler)?),
        PostingKind::Release => claim_release(&posting)?,
    };
    Ok(Examined {
        scheduler,
        posting,
        claim,
    })
}

/// Reads the claim of a posting that was examined before it was stored: no signature is checked.
pub(crate) fn recall(posting: Posting, scheduler: SchedulerId) -> Result<Examined, EvidenceError> {
    let claim = match posting.kind {
        PostingKind::Grant => recall_grant(&posting)?,
        PostingKind::Reserve => {
            let (user, _, amount) = reserve_legs(&posting)?;
            let job = posting.evidence.first().and_then(|order| describe(order));
            let (_, job, _) = job.ok_or_else(|| RESERVE.clone())?;
            Claim::Reserve {
                job: JobId(job),
                order_at: 0,
                user,
                amount,
            }
        }
        PostingKind::Settle => Claim::Settle(recall_settle(&posting).ok_or_else(|| SETTLE.clone())?),
        PostingKind::Release => claim_release(&posting)?,
    };
    Ok(Examined {
        scheduler,
        posting,
        claim,
    })
}

const GRANT: EvidenceError = EvidenceError::Shape {
    kind: "grant",
    needs: "a leg of the federation that gives, then legs of users that receive, and no evidence but one invitation",
};
const RESERVE: EvidenceError = EvidenceError::Shape {
    kind: "reserve",
    needs: "two legs, a user that gives and an escrow that receives, and the order as evidence",
};
const SETTLE: EvidenceError = EvidenceError::Shape {
    kind: "settle",
    needs: "two legs, an escrow that gives and an institution that receives, and as evidence order, lease, at least \
            one reading, usage and receipt",
};
const RELEASE: EvidenceError = EvidenceError::Shape {
    kind: "release",
    needs: "two legs, an escrow that gives and a user that receives, and no evidence",
};

/// The amount that the first leg gives and the second receives.
fn two_legs(posting: &Posting) -> Option<(&Account, &Account, Credits)> {
    let [(from, gives), (to, receives)] = posting.legs.as_slice() else {
        return None;
    };
    let amount = u64::try_from(*receives).ok()?;
    (gives.checked_add(*receives) == Some(0)).then_some((from, to, Credits(amount)))
}

fn reserve_legs(posting: &Posting) -> Result<(UserId, JobId, Credits), EvidenceError> {
    match two_legs(posting) {
        Some((Account::User(user), Account::Escrow(job), amount)) => Ok((*user, *job, amount)),
        _ => Err(RESERVE.clone()),
    }
}

fn claim_release(posting: &Posting) -> Result<Claim, EvidenceError> {
    match two_legs(posting) {
        Some((Account::Escrow(job), Account::User(user), amount)) if posting.evidence.is_empty() => {
            Ok(Claim::Release {
                job: *job,
                user: *user,
                amount,
            })
        }
        _ => Err(RELEASE.clone()),
    }
}

fn grant_legs(posting: &Posting) -> Result<(), EvidenceError> {
    let Some(((Account::Federation, gives), users)) = posting.legs.split_first() else {
        return Err(GRANT.clone());
    };
    let receives = |(account, amount): &(Account, i64)| matches!(account, Account::User(_)) && *amount >= 0;
    // The lowest number has no opposite, so such a leg could not be taken back.
    let gives_ok = *gives <= 0 && *gives != i64::MIN;
    if !gives_ok || users.is_empty() || !users.iter().all(receives) || posting.evidence.len() > 1 {
        return Err(GRANT.clone());
    }
    Ok(())
}

fn examine_grant(posting: &Posting, scheduler: SchedulerId) -> Result<Option<Redeem>, EvidenceError> {
    grant_legs(posting)?;
    let Some(bytes) = posting.evidence.first() else {
        return Ok(None);
    };
    let invitation: Paper<Invitation> = Paper::open(0, bytes)?;
    let Some((_, Account::User(user), moved)) = two_legs(posting) else {
        return Err(GRANT.clone());
    };
    invitation.same("scheduler", invitation.scheduler, "the ledger", scheduler)?;
    if invitation.role != Role::User {
        return invitation.breaks(Rule::Role);
    }
    if moved > invitation.credits {
        let says = invitation.credits;
        return invitation.breaks(Rule::Amount { moved, says });
    }
    Ok(Some(Redeem {
        invitation: invitation.id(),
        uses_max: invitation.uses_max,
        user: *user,
    }))
}

fn recall_grant(posting: &Posting) -> Result<Claim, EvidenceError> {
    grant_legs(posting)?;
    let Some(bytes) = posting.evidence.first() else {
        return Ok(Claim::Grant(None));
    };
    let read = || {
        let (_, invitation, _) = describe(bytes)?;
        let fields = payload::<wire::Invitation>(bytes)?;
        let (_, Account::User(user), _) = two_legs(posting)? else {
            return None;
        };
        Some(Redeem {
            invitation,
            uses_max: fields.uses_max.max(1),
            user: *user,
        })
    };
    read()
        .map(|redeem| Claim::Grant(Some(redeem)))
        .ok_or_else(|| GRANT.clone())
}

fn examine_reserve(posting: &Posting, scheduler: SchedulerId) -> Result<Claim, EvidenceError> {
    let (user, job, amount) = reserve_legs(posting)?;
    let [bytes] = posting.evidence.as_slice() else {
        return Err(RESERVE.clone());
    };
    let order: Paper<Order> = Paper::open(0, bytes)?;
    order.same("scheduler", order.scheduler, "the ledger", scheduler)?;
    order.account(&Account::Escrow(job), Account::Escrow(JobId(order.id())))?;
    order.account(&Account::User(user), Account::User(order.user))?;
    if amount > order.credits_max {
        let says = order.credits_max;
        return order.breaks(Rule::Amount { moved: amount, says });
    }
    Ok(Claim::Reserve {
        job,
        order_at: 0,
        user,
        amount,
    })
}

fn examine_settle(posting: &Posting, scheduler: SchedulerId) -> Result<Settled, EvidenceError> {
    let Some((from @ Account::Escrow(_), to @ Account::Institution(_), moved)) = two_legs(posting) else {
        return Err(SETTLE.clone());
    };
    let [order, lease, readings @ .., usage, receipt] = posting.evidence.as_slice() else {
        return Err(SETTLE.clone());
    };
    if readings.is_empty() {
        return Err(SETTLE.clone());
    }
    let order: Paper<Order> = Paper::open(0, order)?;
    order.same("scheduler", order.scheduler, "the ledger", scheduler)?;

    let lease: Paper<Lease> = Paper::open(1, lease)?;
    lease.same("job", lease.job.0, "the order", order.id())?;
    lease.same("scheduler", lease.scheduler, "the order", order.scheduler)?;
    check_lease_limits(&order, &lease)?;

    let last = check_readings(&lease, readings)?;

    let usage: Paper<Usage> = Paper::open(2 + readings.len(), usage)?;
    usage.same("lease", usage.lease, "the lease", lease.id())?;
    usage.same("node", usage.node, "the lease", lease.node)?;
    usage.same("last_reading", usage.last_reading, "the last reading", last.id())?;
    usage.same(
        "readings",
        u64::from(usage.readings),
        "the evidence",
        readings.len() as u64,
    )?;
    if usage.meters != last.meters {
        return usage.breaks(Rule::MetersDiffer);
    }

    let receipt: Paper<Receipt> = Paper::open(3 + readings.len(), receipt)?;
    receipt.same("usage", receipt.usage, "the usage", usage.id())?;
    receipt.same("lease", receipt.lease, "the lease", lease.id())?;
    receipt.same("order", receipt.job.0, "the order", order.id())?;
    receipt.same("scheduler", receipt.scheduler, "the order", order.scheduler)?;
    receipt.same("node", receipt.node, "the lease", lease.node)?;
    receipt.same(
        "node_institution",
        &receipt.node_institution,
        "the lease",
        &lease.institution,
    )?;
    receipt.same("user", receipt.user, "the order", order.user)?;
    receipt.same(
        "user_institution",
        &receipt.user_institution,
        "the order",
        &order.institution,
    )?;
    check_bill(&lease, &usage, &receipt)?;
    receipt.account(from, Account::Escrow(JobId(order.id())))?;
    receipt.account(to, Account::Institution(lease.institution.clone()))?;
    if moved != receipt.credits {
        let says = receipt.credits;
        return receipt.breaks(Rule::Amount { moved, says });
    }
    Ok(Settled {
        key: lease.key(),
        done: usage.outcome == Outcome::Done,
        receipt: receipt.id(),
        receipt_at: receipt.index,
        credits: receipt.credits,
        billed: receipt.billed,
        institution: lease.institution.clone(),
    })
}

fn check_lease_limits(order: &Paper<Order>, lease: &Paper<Lease>) -> Result<(), EvidenceError> {
    let end = lease.first_item.saturating_add(lease.items);
    if end > order.items {
        return lease.breaks(Rule::Items {
            first: lease.first_item,
            end,
            items: order.items,
        });
    }
    let limits = &order.constraints;
    let allowed = if limits.donated_only {
        0
    } else {
        limits.rate_max.map_or(u64::MAX, |rate| rate.0)
    };
    if lease.rate.0 > allowed {
        let rate = lease.rate.0;
        return lease.breaks(Rule::Rate { rate, allowed });
    }
    Ok(())
}

fn check_readings(lease: &Paper<Lease>, readings: &[Vec<u8>]) -> Result<Paper<MeterReading>, EvidenceError> {
    let mut last: Option<Paper<MeterReading>> = None;
    for (i, bytes) in readings.iter().enumerate() {
        let reading: Paper<MeterReading> = Paper::open(2 + i, bytes)?;
        reading.same("lease", reading.lease, "the lease", lease.id())?;
        reading.same("node", reading.node, "the lease", lease.node)?;
        let expected = i as u32;
        if reading.sequence != expected {
            let found = reading.sequence;
            return reading.breaks(Rule::Sequence { found, expected });
        }
        if reading.previous != last.as_ref().map(|before| before.id()) {
            return reading.breaks(Rule::Chain);
        }
        if last
            .as_ref()
            .is_some_and(|before| !reading.meters.grew_from(&before.meters))
        {
            return reading.breaks(Rule::MetersFell);
        }
        last = Some(reading);
    }
    last.ok_or_else(|| SETTLE.clone())
}

fn check_bill(
    lease: &Paper<Lease>,
    usage: &Paper<Usage>,
    receipt: &Paper<Receipt>,
) -> Result<(), EvidenceError> {
    let billed = receipt.billed.0;
    if billed > lease.device_ms_max.0 {
        let allowed = lease.device_ms_max.0;
        return receipt.breaks(Rule::OverLease { billed, allowed });
    }
    for (of, measured) in [
        ("the usage", usage.meters.device_ms.0),
        ("the observation", receipt.observed.0),
    ] {
        if billed > measured {
            return receipt.breaks(Rule::OverMeter { billed, of, measured });
        }
    }
    let asked = receipt.credits;
    if usage.outcome != Outcome::Done || receipt.flags.contains(&Flag::NotDone) {
        if asked > Credits::ZERO {
            return receipt.breaks(Rule::NotDone { asked });
        }
        return Ok(());
    }
    let bill = lease.rate.bill(receipt.billed).unwrap_or(Credits(u64::MAX));
    let cut = receipt.flags.contains(&Flag::CutToCeiling);
    if asked > bill || (asked < bill && !cut) {
        return receipt.breaks(Rule::Bill { asked, bill });
    }
    Ok(())
}

fn payload<M: Message + Default>(envelope: &[u8]) -> Option<M> {
    let envelope = wire::Envelope::decode(envelope).ok()?;
    M::decode(envelope.payload.as_slice()).ok()
}

fn recall_settle(posting: &Posting) -> Option<Settled> {
    let (Account::Escrow(job), Account::Institution(institution), credits) = two_legs(posting)? else {
        return None;
    };
    let [_, lease, _, .., usage, receipt] = posting.evidence.as_slice() else {
        return None;
    };
    let lease: wire::Lease = payload(lease)?;
    let usage: wire::Usage = payload(usage)?;
    let (_, id, _) = describe(receipt)?;
    let receipt: wire::Receipt = payload(receipt)?;
    Some(Settled {
        key: LeaseKey {
            job: *job,
            part: lease.part,
            fence: lease.fence,
        },
        done: usage.outcome == Outcome::Done.as_str(),
        receipt: id,
        receipt_at: posting.evidence.len() - 1,
        credits,
        billed: DeviceMillis(receipt.billed_ms),
        institution: institution.clone(),
    })
}

/// A verified record and its place in the evidence.
struct Paper<T> {
    index: usize,
    record: Verified<T>,
}

impl<T> std::ops::Deref for Paper<T> {
    type Target = Verified<T>;
    fn deref(&self) -> &Verified<T> {
        &self.record
    }
}

impl<T: Record> Paper<T> {
    fn open(index: usize, bytes: &[u8]) -> Result<Self, EvidenceError> {
        let record = Signed::<T>::open(bytes).map_err(|error| EvidenceError::Record {
            index,
            id: RecordName(describe(bytes).map(|(_, id, _)| id)),
            error: Box::new(error),
        })?;
        let paper = Self { index, record };
        if paper.encode() != bytes {
            return paper.breaks(Rule::Canonical);
        }
        Ok(paper)
    }

    fn breaks<X>(&self, rule: Rule) -> Result<X, EvidenceError> {
        Err(EvidenceError::Rule {
            index: self.index,
            record: T::TYPE,
            id: self.record.id(),
            rule: Box::new(rule),
        })
    }

    fn same<V: PartialEq + std::fmt::Display>(
        &self,
        field: &'static str,
        found: V,
        of: &'static str,
        expected: V,
    ) -> Result<(), EvidenceError> {
        if found == expected {
            return Ok(());
        }
        self.breaks(Rule::Field {
            field,
            found: found.to_string(),
            of,
            expected: expected.to_string(),
        })
    }

    fn account(&self, found: &Account, expected: Account) -> Result<(), EvidenceError> {
        if *found == expected {
            return Ok(());
        }
        let found = found.clone();
        self.breaks(Rule::Account { found, expected })
    }
}

/// 16 bytes of a BLAKE3 hash: enough to tell honest leases apart, and who crafts a collision only bars his own.
type Mark = [u8; 16];

fn mark(parts: &[&[u8]]) -> Mark {
    let mut hasher = blake3::Hasher::new_derive_key("karez-ledger/1 mark");
    for part in parts {
        hasher.update(part);
    }
    let mut out = [0; 16];
    out.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    out
}

fn lease_mark(key: &LeaseKey) -> Mark {
    mark(&[
        b"lease",
        &key.job.0.0,
        &key.part.to_be_bytes(),
        &key.fence.to_be_bytes(),
    ])
}

fn part_mark(key: &LeaseKey) -> Mark {
    mark(&[b"part", &key.job.0.0, &key.part.to_be_bytes()])
}

fn redeem_mark(redeem: &Redeem) -> Mark {
    mark(&[b"redeem", &redeem.invitation.0, &redeem.user.0.0])
}

/// What the rules remember of earlier entries.
#[derive(Debug, Clone, Default)]
pub(crate) struct Trail {
    jobs: HashMap<JobId, Job>,
    /// Leases settled, parts done, invitations redeemed by a user.
    marks: HashSet<Mark>,
    invitations: HashMap<RecordId, u32>,
}

#[derive(Debug, Clone, Copy)]
struct Job {
    user: UserId,
    reserved: u64,
    settled: u64,
    released: bool,
}

/// How a posting changes the trail; can be taken back.
#[derive(Debug, Clone)]
pub(crate) enum Change {
    Nothing,
    Redeem(RecordId, Mark),
    Reserve(JobId, UserId, u64),
    Settle {
        job: JobId,
        credits: u64,
        lease: Mark,
        part: Option<Mark>,
    },
    Release(JobId),
}

impl Trail {
    /// Applies the rules that look back.
    pub(crate) fn check(&self, claim: &Claim, accounts: &Accounts) -> Result<Change, EvidenceError> {
        match claim {
            Claim::Grant(None) => Ok(Change::Nothing),
            Claim::Grant(Some(redeem)) => self.check_redeem(redeem),
            Claim::Reserve {
                job,
                order_at,
                user,
                amount,
            } => {
                if self.jobs.contains_key(job) {
                    return Err(EvidenceError::Rule {
                        index: *order_at,
                        record: Order::TYPE,
                        id: job.0,
                        rule: Box::new(Rule::Reserved),
                    });
                }
                Ok(Change::Reserve(*job, *user, amount.0))
            }
            Claim::Settle(settled) => self.check_settle(settled),
            Claim::Release { job, user, amount } => self.check_release(*job, *user, *amount, accounts),
        }
    }

    fn check_redeem(&self, redeem: &Redeem) -> Result<Change, EvidenceError> {
        let uses = self.invitations.get(&redeem.invitation).copied().unwrap_or(0);
        let mark = redeem_mark(redeem);
        if uses >= redeem.uses_max || self.marks.contains(&mark) {
            return Err(EvidenceError::Rule {
                index: 0,
                record: Invitation::TYPE,
                id: redeem.invitation,
                rule: Box::new(Rule::Redeemed { uses }),
            });
        }
        Ok(Change::Redeem(redeem.invitation, mark))
    }

    fn check_settle(&self, settled: &Settled) -> Result<Change, EvidenceError> {
        let breaks = |rule| {
            Err(EvidenceError::Rule {
                index: settled.receipt_at,
                record: Receipt::TYPE,
                id: settled.receipt,
                rule: Box::new(rule),
            })
        };
        let key = settled.key;
        let lease = lease_mark(&key);
        if self.marks.contains(&lease) {
            return breaks(Rule::SettledTwice { key });
        }
        let part = settled.done.then(|| part_mark(&key));
        if part.is_some_and(|part| self.marks.contains(&part)) {
            return breaks(Rule::DoneTwice { part: key.part });
        }
        // A job that never reserved may still receive what is donated.
        let (reserved, before) = self
            .jobs
            .get(&key.job)
            .map_or((0, 0), |job| (job.reserved, job.settled));
        let after = before.saturating_add(settled.credits.0);
        if after > reserved {
            return breaks(Rule::OverReserved {
                settled: Credits(after),
                reserved: Credits(reserved),
            });
        }
        Ok(Change::Settle {
            job: key.job,
            credits: settled.credits.0,
            lease,
            part,
        })
    }

    fn check_release(
        &self,
        job: JobId,
        user: UserId,
        amount: Credits,
        accounts: &Accounts,
    ) -> Result<Change, EvidenceError> {
        let breaks = |rule| {
            let rule = Box::new(rule);
            Err(EvidenceError::Job { job, rule })
        };
        let Some(state) = self.jobs.get(&job) else {
            return breaks(Rule::NotReserved);
        };
        if state.released {
            return breaks(Rule::Released);
        }
        if state.user != user {
            return breaks(Rule::Account {
                found: Account::User(user),
                expected: Account::User(state.user),
            });
        }
        let left = Credits(u64::try_from(accounts.balance(&Account::Escrow(job))).unwrap_or(0));
        if amount != left {
            return breaks(Rule::Amount {
                moved: amount,
                says: left,
            });
        }
        Ok(Change::Release(job))
    }

    pub(crate) fn apply(&mut self, change: &Change) {
        match change {
            Change::Nothing => {}
            Change::Redeem(invitation, mark) => {
                *self.invitations.entry(*invitation).or_default() += 1;
                self.marks.insert(*mark);
            }
            Change::Reserve(job, user, reserved) => {
                self.jobs.insert(
                    *job,
                    Job {
                        user: *user,
                        reserved: *reserved,
                        settled: 0,
                        released: false,
                    },
                );
            }
            Change::Settle {
                job,
                credits,
                lease,
                part,
            } => {
                if let Some(job) = self.jobs.get_mut(job) {
                    job.settled += credits;
                }
                self.marks.insert(*lease);
                self.marks.extend(*part);
            }
            Change::Release(job) => {
                if let Some(job) = self.jobs.get_mut(job) {
                    job.released = true;
                }
            }
        }
    }

    pub(crate) fn revert(&mut self, change: &Change) {
        match change {
            Change::Nothing => {}
            Change::Redeem(invitation, mark) => {
                if let Some(uses) = self.invitations.get_mut(invitation) {
                    *uses -= 1;
                }
                self.marks.remove(mark);
            }
            Change::Reserve(job, ..) => {
                self.jobs.remove(job);
            }
            Change::Settle {
                job,
                credits,
                lease,
                part,
            } => {
                if let Some(job) = self.jobs.get_mut(job) {
                    job.settled -= credits;
                }
                self.marks.remove(lease);
                if let Some(part) = part {
                    self.marks.remove(part);
                }
            }
            Change::Release(job) => {
                if let Some(job) = self.jobs.get_mut(job) {
                    job.released = false;
                }
            }
        }
    }
}
