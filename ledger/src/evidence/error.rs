//! Why evidence does not carry a posting.
use karez_core::{
    id::{JobId, LeaseKey, RecordId},
    key::SchedulerId,
    money::Account,
    records::RecordError,
    unit::Credits,
};

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
    /// What is left of dropped records breaks a rule.
    #[error("what is left of its dropped records: {rule}")]
    Gist {
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
    /// Less device time is billed than measured, observed and leased.
    #[error("bills {billed} device-ms, but {due} are due: the smallest of measured, observed and leased")]
    UnderMeter {
        /// Billed.
        billed: u64,
        /// What should be.
        due: u64,
    },
    /// A remark must be there just when the figures call for it.
    #[error("{} the remark {flag}, which its figures {} call for", if *.due { "lacks" } else { "has" }, if *.due { "do" } else { "do not" })]
    Remark {
        /// Which.
        flag: &'static str,
        /// Whether they call for it.
        due: bool,
    },
    /// Only finished parts are paid.
    #[error("asks {asked} and bills {billed} device-ms for a part that did not finish")]
    NotDone {
        /// What the receipt asks.
        asked: Credits,
        /// What it bills.
        billed: u64,
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
    /// Only what a delegation lent can come back by it.
    #[error("it never lent credits")]
    NeverLent,
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
    /// The gist does not have the form of its kind, or speaks of other accounts than the legs.
    #[error("they do not fit the legs")]
    GistUnreadable,
    /// Records that were dropped may not be settled or answered again.
    #[error("they were settled or answered before")]
    Repeated,
    /// The posting draws on a grant that was never posted.
    #[error("grant {grant} is not in this ledger")]
    NoGrant {
        /// Which.
        grant: RecordId,
    },
    /// A grant is posted once, a payment too.
    #[error("it has been posted before")]
    PostedTwice,
    /// The grant is for other users or other work.
    #[error("grant {grant} is not for this user and this work")]
    OutOfScope {
        /// Which.
        grant: RecordId,
    },
    /// The grant's date is past, or not yet.
    #[error("grant {grant} expires at {expires}, the entry is of {at}")]
    Expiry {
        /// Which.
        grant: RecordId,
        /// Its date, in ms.
        expires: u64,
        /// The entry's, in ms.
        at: u64,
    },
    /// Only a receipt of this ledger is accepted or disputed.
    #[error("its receipt was never settled in this ledger")]
    NotSettled,
    /// A receipt is answered once.
    #[error("its receipt has been accepted or disputed before")]
    Answered,
    /// The window is over.
    #[error("it is of {at}, its receipt could be answered until {until}")]
    TooLate {
        /// Its own date or that of its entry, in ms.
        at: u64,
        /// The receipt's window, in ms.
        until: u64,
    },
    /// A ruling needs an open dispute over its receipt.
    #[error("no such dispute over this receipt is open")]
    NoDispute,
    /// No more comes back than was paid.
    #[error("it refunds {refund}, the receipt paid {paid}")]
    OverRefund {
        /// To the user.
        refund: Credits,
        /// By the receipt.
        paid: Credits,
    },
    /// Cards and limits follow each other.
    #[error("it does not follow the one before: {found} after {before}")]
    Order {
        /// Its version or date.
        found: u64,
        /// The last one's.
        before: u64,
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
