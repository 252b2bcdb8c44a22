//! A scheduler's mind: admits, places, watches, bills.
//!
//! [`Controller::handle`] is the one entrance; questions are answered by methods that change nothing.
//! The shell's promise: every [`Effect::Persist`] of a batch is on disk before any other effect of that batch
//! leaves the process. When a commit fails the shell stops the process: what the mind believes is then rebuilt from disk.
//!
//! Not here: sockets and stores (`karez-scheduler`); the chain of ledger entries (`karez-ledger`).
mod accounting;
mod admission;
mod billing;
mod deadline;
mod forecast;
mod gang;
mod guide;
mod job;
mod jobs;
mod keys;
mod mind;
mod moving;
mod nodes;
mod placing;
mod questions;
#[cfg(test)]
mod tests;
mod view;

pub use accounting::{ANSWERS_MAX, Filed, GRANTS_MAX};
pub use admission::{Member, REDEMPTIONS_MAX};
pub use job::{Job, JobState, Part, PartState, work_units};
pub use jobs::{ORDER_LIFE_MAX, SPENT_MAX};
pub use keys::KEYS_OF_USER_MAX;
pub use mind::Controller;
pub use moving::MOVES_MAX;
pub use view::{Explanation, JobView, LogLine, NodeStatus, PartView, Start};

use crate::{
    exchange::{ToNode, ToScheduler},
    fair::Shares,
    id::{Institution, JobId, RecordId},
    key::{NodeId, PublicKey, SchedulerId, SecretKey, UserId},
    money::PostingError,
    placement,
    prelude::*,
    records::{Delegation, Invitation, Offer, Order, Role, Verified},
    routing::Prefix,
    store::Change,
    unit::{Credits, Millis},
};

/// What the operator set. Fixed while the controller lives.
#[derive(Debug, Clone)]
pub struct ControllerConfig {
    /// The scheduler's key.
    pub secret: SecretKey,
    /// A name for people.
    pub name: String,
    /// Where the scheduler's own artifact store is served.
    pub artifact_addrs: Vec<String>,
    /// Who may join without an invitation.
    pub admission: Admission,
    /// How often nodes report.
    pub heartbeat: Millis,
    /// How long a lease lasts without renewal.
    pub lease_ttl: Millis,
    /// How long a node that lost its session keeps its leases in the scheduler's belief.
    pub reconnect_grace: Millis,
    /// How long an ask may stay unanswered.
    pub ask_timeout: Millis,
    /// The most unfinished jobs, of everybody.
    pub jobs_open_max: usize,
    /// The most unfinished jobs of one user.
    pub jobs_open_user_max: usize,
    /// Finished jobs kept for listing.
    pub jobs_kept: usize,
    /// The longest a lease on donated capacity may bill, and the cap for all others.
    pub device_time_max: Millis,
    /// How long a receipt can be disputed.
    pub dispute_window: Millis,
    /// The constants of the cost of finished work.
    pub policy: placement::Policy,
    /// The constants of fair share.
    pub shares: Shares,
}

/// Who may join.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Admission {
    /// Keys redeem an invitation or are listed.
    Invited,
    /// Any strong key: a user starts with this budget, under the institution it names.
    Open {
        /// A new user's budget.
        credits: Credits,
    },
}

/// Pairs a question of the shell with its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// What happens to a scheduler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// First event after [`Controller::restore`].
    Started,
    /// A key redeems an invitation, or asks to be admitted without one where admission is open.
    Join {
        /// To be answered with [`Reply::Joined`].
        request: RequestId,
        /// The caller's key, as its TLS session proved it.
        caller: PublicKey,
        /// A name for people.
        name: String,
        /// The invitation, or what is wanted of open admission.
        by: JoinBy,
    },
    /// The operator lists a key.
    Admit {
        /// To be answered with [`Reply::Joined`].
        request: RequestId,
        /// The key.
        key: PublicKey,
        /// As what.
        member: Member,
        /// A user's budget.
        credits: Credits,
    },
    /// A node's offer, over the peer network.
    Offer {
        /// To be answered with [`Reply::OfferTaken`] or [`Reply::Refused`].
        request: RequestId,
        /// Whose connection it came over.
        from: PublicKey,
        /// The offer.
        offer: Verified<Offer>,
    },
    /// A node's session stands.
    NodeConnected(NodeId),
    /// It broke or ended.
    NodeGone(NodeId),
    /// A node said something.
    Heard(NodeId, ToScheduler),
    /// How the prompt of a question begins, before its order is submitted. Without it, where its cache is warm is a guess.
    Prompt {
        /// The job that the order will be.
        job: JobId,
        /// The beginning of its prompt.
        prefix: Prefix,
    },
    /// A user's order.
    Submit {
        /// To be answered with [`Reply::Submitted`] or [`Reply::Refused`].
        request: RequestId,
        /// The caller's key.
        caller: PublicKey,
        /// The order.
        order: Verified<Order>,
        /// What the user calls it; kept, never put into records.
        label: String,
        /// Queue it even when no known node could ever run it.
        wait: bool,
    },
    /// A user calls a job off.
    Cancel {
        /// To be answered with [`Reply::Cancelled`] or [`Reply::Refused`].
        request: RequestId,
        /// The caller's key.
        caller: PublicKey,
        /// Which job.
        job: JobId,
    },
    /// A signed record for the books.
    File {
        /// To be answered with [`Reply::Filed`] or [`Reply::Refused`].
        request: RequestId,
        /// The caller's key.
        caller: PublicKey,
        /// The record.
        filed: Filed,
    },
    /// A user lets another key sign orders.
    Delegate {
        /// To be answered with [`Reply::Delegated`] or [`Reply::Refused`].
        request: RequestId,
        /// The caller's key.
        caller: PublicKey,
        /// The grant.
        delegation: Verified<Delegation>,
    },
    /// A user takes such a key back.
    Revoke {
        /// To be answered with [`Reply::Delegated`] or [`Reply::Refused`].
        request: RequestId,
        /// The caller's key.
        caller: PublicKey,
        /// Which key.
        key: PublicKey,
    },
    /// Time passed. The shell sends one at [`Controller::wake_at`], and at least every second while jobs are open.
    Tick,
}

/// How somebody joins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JoinBy {
    /// With a signed invitation.
    Invitation(Verified<Invitation>),
    /// By open admission.
    Open {
        /// As what.
        role: Role,
        /// Of which institution.
        institution: Institution,
    },
}

/// What the shell must do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Before anything else of this batch.
    Persist(Vec<Change>),
    /// Say this to a node; dropped when no session stands.
    Send(NodeId, ToNode),
    /// Answer a question.
    Reply(RequestId, Reply),
    /// Watchers of this job should look again.
    Changed(JobId),
    /// For the scheduler's own log.
    Log(String),
}

/// Answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// Admitted.
    Joined(Member, Credits),
    /// The offer is believed until it expires.
    OfferTaken,
    /// The job is stored (now or before).
    Submitted(JobId),
    /// The job is called off, or had ended before.
    Cancelled(JobId),
    /// The record is in the books.
    Filed(RecordId),
    /// The key is admitted with that budget, or taken back with what was left.
    Delegated(Credits),
    /// No.
    Refused(Denial),
}

/// Why a request was refused. Nothing changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denial {
    /// The key is not admitted.
    #[error("key {} is not admitted here: ask the operator for an invitation and run `karez join INVITATION`", .0.short())]
    NotAdmitted(PublicKey),
    /// The key is admitted as something else.
    #[error("key {} is admitted as a {}, this needs a {}", .key.short(), .is.as_str(), .needs.as_str())]
    WrongRole {
        /// Whose.
        key: PublicKey,
        /// What it is.
        is: Role,
        /// What it should be.
        needs: Role,
    },
    /// The invitation expired, was used up, or is another scheduler's.
    #[error("the invitation {0}: ask the operator for a new one")]
    Invitation(String),
    /// The offer is refused; counted.
    #[error("the offer {0}")]
    Offer(String),
    /// The order is for another scheduler, expired, or not the caller's.
    #[error("the order {0}")]
    Order(String),
    /// The budget does not cover the job's ceiling.
    #[error(
        "the budget holds {has} credits, the job asks to reserve {wants}: lower --max-cost, or ask for a grant"
    )]
    Budget {
        /// The balance.
        has: Credits,
        /// The ceiling.
        wants: Credits,
    },
    /// Too many unfinished jobs.
    #[error(
        "{open} jobs are open, the limit is {max}: wait for some to finish, or cancel some with `karez job cancel`"
    )]
    Queue {
        /// How many there are.
        open: usize,
        /// The limit.
        max: usize,
    },
    /// No known node could ever run it.
    #[error("{0}")]
    Unplaceable(placement::Refusal),
    /// No such job, or not the caller's.
    #[error("there is no job {0} of yours: `karez jobs` lists them")]
    NoJob(String),
    /// A record that the books do not take.
    #[error("the record {0}")]
    Record(String),
    /// Only the operator may.
    #[error("only the scheduler's operator may do this: run it with the scheduler's key")]
    NotOperator,
    /// A delegated key that cannot be, or not any more.
    #[error("the key {0}")]
    Key(String),
    /// The books refuse.
    #[error("the ledger refuses: {0}")]
    Ledger(PostingError),
}

impl ControllerConfig {
    /// The scheduler's id.
    pub fn id(&self) -> SchedulerId {
        SchedulerId(PublicKey::of(&self.secret))
    }
}

/// The user whose key this is.
pub(crate) fn user(key: PublicKey) -> UserId {
    UserId(key)
}
