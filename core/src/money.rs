//! Double entry: accounts, postings that sum to zero, and balances that never go under their limit.
//!
//! Not here: the chain of entries, proofs and files (`karez-ledger`).
use crate::{
    id::{Institution, JobId, RecordId},
    key::{PublicKey, UserId},
    prelude::*,
    unit::Credits,
};
use core::fmt;
use serde::{Deserialize, Serialize};

/// Where credits can be.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Account {
    /// The federation: issues budgets, so it alone may be negative.
    Federation,
    /// A researcher's budget.
    User(UserId),
    /// Credits set aside for one job until it is settled.
    Escrow(JobId),
    /// What an institution has earned by lending capacity, less what it granted: under zero as far as its limit.
    Institution(Institution),
    /// What is left of a grant.
    Grant(RecordId),
    /// What a receipt paid, frozen until the dispute over it is ruled on.
    Disputed(RecordId),
}

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Federation => f.write_str("federation"),
            Self::User(id) => write!(f, "user:{id}"),
            Self::Escrow(job) => write!(f, "escrow:{job}"),
            Self::Institution(name) => write!(f, "institution:{name}"),
            Self::Grant(id) => write!(f, "grant:{id}"),
            Self::Disputed(receipt) => write!(f, "disputed:{receipt}"),
        }
    }
}

/// Text that names no account.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not an account: expected federation, user:KEY, escrow:JOB, institution:NAME, grant:ID or disputed:RECEIPT"
)]
pub struct AccountError(String);

impl core::str::FromStr for Account {
    type Err = AccountError;
    fn from_str(text: &str) -> Result<Self, AccountError> {
        let bad = || AccountError(text.chars().take(100).collect());
        match text.split_once(':') {
            None if text == "federation" => Ok(Self::Federation),
            Some(("user", key)) => hex::decode(key)
                .ok()
                .and_then(|key| PublicKey::named(&key).ok())
                .map(|key| Self::User(UserId(key)))
                .ok_or_else(bad),
            Some(("escrow", job)) => job.parse().map(|d| Self::Escrow(JobId(d))).map_err(|_| bad()),
            Some(("grant", id)) => id.parse().map(Self::Grant).map_err(|_| bad()),
            Some(("disputed", id)) => id.parse().map(Self::Disputed).map_err(|_| bad()),
            Some(("institution", name)) => name.parse().map(Self::Institution).map_err(|_| bad()),
            _ => Err(bad()),
        }
    }
}
impl Serialize for Account {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&self.to_string())
    }
}
impl<'de> Deserialize<'de> for Account {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        String::deserialize(from)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// Why credits move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PostingKind {
    /// The federation gives a user a budget, or a payer funds a grant.
    Grant,
    /// A job's ceiling moves from its user to escrow.
    Reserve,
    /// Escrow pays the institution that ran a part; evidence holds the whole paper trail.
    Settle,
    /// What is left in escrow goes back to where it came from.
    Release,
    /// The user agrees with a receipt; nothing moves.
    Accept,
    /// The user does not: what the receipt paid is frozen.
    Dispute,
    /// A dispute ends: the frozen credits go to the user, to the institution, or to both.
    Ruling,
    /// What is left of a grant past its date goes back to its payer.
    Expire,
    /// New standard rates; nothing moves.
    Rates,
    /// A new credit limit of an institution; nothing moves.
    Limit,
    /// An institution was paid by another outside the ledger.
    Payment,
    /// How institutions share from now on; nothing moves.
    Floors,
}

impl PostingKind {
    /// Every kind, by its number in encoded entries.
    pub const ALL: [Self; 12] = [
        Self::Grant,
        Self::Reserve,
        Self::Settle,
        Self::Release,
        Self::Accept,
        Self::Dispute,
        Self::Ruling,
        Self::Expire,
        Self::Rates,
        Self::Limit,
        Self::Payment,
        Self::Floors,
    ];

    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Grant => "grant",
            Self::Reserve => "reserve",
            Self::Settle => "settle",
            Self::Release => "release",
            Self::Accept => "accept",
            Self::Dispute => "dispute",
            Self::Ruling => "ruling",
            Self::Expire => "expire",
            Self::Rates => "rates",
            Self::Limit => "limit",
            Self::Payment => "payment",
            Self::Floors => "floors",
        }
    }
}

/// One movement of credits: legs that sum to zero, with the signed records that justify it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Posting {
    /// Why.
    pub kind: PostingKind,
    /// Changes in micro-credits; at most [`LEGS_MAX`], summing to zero, no account twice.
    pub legs: Vec<(Account, i64)>,
    /// Encoded envelopes of the records behind it, first cause first; at most [`EVIDENCE_MAX`].
    pub evidence: Vec<Vec<u8>>,
}

/// The most legs one posting may have.
pub const LEGS_MAX: usize = 16;
/// The most evidence envelopes one posting may carry.
pub const EVIDENCE_MAX: usize = 512;

impl Posting {
    /// Moves `amount` from one account to another. `None` when the amount does not fit a leg.
    pub fn transfer(
        kind: PostingKind,
        from: Account,
        to: Account,
        amount: Credits,
        evidence: Vec<Vec<u8>>,
    ) -> Option<Self> {
        let leg = amount.leg()?;
        Some(Self {
            kind,
            legs: vec![(from, -leg), (to, leg)],
            evidence,
        })
    }
}

/// Why a posting was refused. The accounts are unchanged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PostingError {
    /// The legs do not sum to zero.
    #[error("the posting is off balance by {by} micro-credits")]
    Unbalanced {
        /// The sum of the legs.
        by: i128,
    },
    /// An account would fall under its limit.
    #[error("{account} has {has} micro-credits, the posting takes {takes}")]
    Overdraft {
        /// Which account.
        account: Account,
        /// Its balance.
        has: i64,
        /// What would be taken.
        takes: i64,
    },
    /// Too many legs or evidence, an account twice, or an amount beyond 64 bits.
    #[error("the posting is malformed: {why}")]
    Malformed {
        /// Which rule it breaks.
        why: &'static str,
    },
}

/// The balances of all accounts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Accounts {
    balances: BTreeMap<Account, i64>,
    /// How far institutions may go under zero.
    limits: BTreeMap<Institution, Credits>,
}

impl Accounts {
    /// What `account` holds, in micro-credits. Negative only for the federation.
    pub fn balance(&self, account: &Account) -> i64 {
        self.balances.get(account).copied().unwrap_or(0)
    }

    /// Every account that is not at zero.
    pub fn iter(&self) -> impl Iterator<Item = (&Account, i64)> {
        self.balances.iter().map(|(account, balance)| (account, *balance))
    }

    /// How far `institution` may go under zero.
    pub fn limit(&self, institution: &Institution) -> Credits {
        self.limits.get(institution).copied().unwrap_or(Credits::ZERO)
    }

    /// Every institution with a limit.
    pub fn limits(&self) -> impl Iterator<Item = (&Institution, Credits)> {
        self.limits.iter().map(|(name, limit)| (name, *limit))
    }

    /// Sets how far `institution` may go under zero; gives what it was. A balance beyond a lowered limit stays, but
    /// takes no further debit.
    pub fn set_limit(&mut self, institution: Institution, limit: Credits) -> Credits {
        let before = if limit == Credits::ZERO {
            self.limits.remove(&institution)
        } else {
            self.limits.insert(institution, limit)
        };
        before.unwrap_or(Credits::ZERO)
    }

    /// Sets a balance as it was written down: for a copy of accounts that were checked before.
    pub fn restore(&mut self, account: Account, balance: i64) {
        if balance != 0 {
            self.balances.insert(account, balance);
        }
    }

    /// The lowest balance of an account; `None`: any.
    fn floor(&self, account: &Account) -> Option<i64> {
        match account {
            Account::Federation => None,
            Account::Institution(name) => Some(-self.limit(name).leg().unwrap_or(i64::MAX)),
            _ => Some(0),
        }
    }

    /// The sum over all accounts: zero, always.
    pub fn sum(&self) -> i128 {
        self.balances.values().map(|b| i128::from(*b)).sum()
    }

    /// Would `posting` be accepted?
    pub fn check(&self, posting: &Posting) -> Result<(), PostingError> {
        let malformed = |why| Err(PostingError::Malformed { why });
        if posting.legs.is_empty() || posting.legs.len() > LEGS_MAX {
            return malformed("between 1 and 16 legs are allowed");
        }
        if posting.evidence.len() > EVIDENCE_MAX {
            return malformed("at most 512 evidence records are allowed");
        }
        let by: i128 = posting.legs.iter().map(|(_, leg)| i128::from(*leg)).sum();
        if by != 0 {
            return Err(PostingError::Unbalanced { by });
        }
        for (i, (account, leg)) in posting.legs.iter().enumerate() {
            if posting.legs[..i].iter().any(|(other, _)| other == account) {
                return malformed("an account appears twice");
            }
            let has = self.balance(account);
            let Some(after) = has.checked_add(*leg) else {
                return malformed("a balance would exceed 64 bits");
            };
            if *leg < 0 && self.floor(account).is_some_and(|floor| after < floor) {
                return Err(PostingError::Overdraft {
                    account: account.clone(),
                    has,
                    takes: leg.saturating_neg(),
                });
            }
        }
        Ok(())
    }

    /// Applies `posting`, or changes nothing.
    pub fn apply(&mut self, posting: &Posting) -> Result<(), PostingError> {
        self.check(posting)?;
        for (account, leg) in &posting.legs {
            let balance = self.balances.entry(account.clone()).or_insert(0);
            *balance += leg;
            if *balance == 0 {
                self.balances.remove(account);
            }
        }
        Ok(())
    }
}
