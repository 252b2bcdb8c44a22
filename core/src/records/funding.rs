//! Who pays for whom: grants, standard rates, floors, credit limits and payments. All signed by the scheduler's operator.
use super::{
    envelope::{Record, RecordError},
    offer::WorkKind,
    wire::{Fields, UTC_MAX},
};
use crate::{
    fair::Shares,
    id::Institution,
    key::{PublicKey, SchedulerId, UserId},
    money::Account,
    prelude::*,
    unit::{Credits, Millis, Rate, UtcMillis},
};
use karez_proto::records as wire;
use serde::{Deserialize, Serialize};

/// For whom a grant is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Beneficiary {
    /// One researcher.
    User(UserId),
    /// Every researcher of an institution.
    Institution(Institution),
}

/// Credits for certain users and kinds of work, from a payer, until a date. They lie in an account of their own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// Whose ledger, and who signs.
    pub scheduler: SchedulerId,
    /// Which institution pays; `None`: the federation.
    pub payer: Option<Institution>,
    /// For whom.
    pub beneficiary: Beneficiary,
    /// For which kinds of work; empty for any.
    pub work: Vec<WorkKind>,
    /// The ceiling.
    pub credits: Credits,
    /// For people; at most 200 bytes.
    pub purpose: String,
    /// Tells equal grants apart.
    pub nonce: u64,
    /// When it was signed.
    pub issued_at: UtcMillis,
    /// What is left then goes back to the payer.
    pub expires_at: UtcMillis,
}

impl Grant {
    /// Whose account it comes from.
    pub fn from(&self) -> Account {
        self.payer
            .clone()
            .map_or(Account::Federation, Account::Institution)
    }

    /// May it pay for this work of this user?
    pub fn covers(&self, user: UserId, institution: &Institution, work: WorkKind) -> bool {
        let who = match &self.beneficiary {
            Beneficiary::User(one) => *one == user,
            Beneficiary::Institution(all) => all == institution,
        };
        who && (self.work.is_empty() || self.work.contains(&work))
    }
}

impl Record for Grant {
    const TYPE: &'static str = "karez.grant.v1";
    const BYTES_MAX: usize = 1024;
    type Wire = wire::Grant;

    fn signer(&self) -> PublicKey {
        self.scheduler.0
    }

    fn to_wire(&self) -> wire::Grant {
        let (user, institution) = match &self.beneficiary {
            Beneficiary::User(user) => (user.0.0.to_vec(), String::new()),
            Beneficiary::Institution(all) => (Vec::new(), all.to_string()),
        };
        wire::Grant {
            scheduler: self.scheduler.0.0.to_vec(),
            payer: self.payer.as_ref().map(ToString::to_string).unwrap_or_default(),
            user,
            institution,
            work: self.work.iter().map(|w| w.as_str().into()).collect(),
            credits: self.credits.0,
            purpose: self.purpose.clone(),
            nonce: self.nonce,
            issued_at: self.issued_at.0,
            expires_at: self.expires_at.0,
        }
    }

    fn from_wire(w: wire::Grant) -> Result<Self, RecordError> {
        let f = Fields(Self::TYPE);
        let beneficiary = match (w.user.is_empty(), w.institution.is_empty()) {
            (false, true) => Beneficiary::User(UserId(f.key("user", &w.user)?)),
            (true, false) => Beneficiary::Institution(f.parse("institution", &w.institution)?),
            _ => return Err(f.bad("user", "and institution: exactly one of them must be named")),
        };
        Ok(Self {
            scheduler: SchedulerId(f.key("scheduler", &w.scheduler)?),
            payer: if w.payer.is_empty() {
                None
            } else {
                Some(f.parse("payer", &w.payer)?)
            },
            beneficiary,
            work: f.list("work", w.work, 16, |kind| f.parse("work", &kind))?,
            credits: Credits(f.within("credits", w.credits, i64::MAX as u64)?),
            purpose: f.text("purpose", w.purpose, 200)?,
            nonce: w.nonce,
            issued_at: UtcMillis(f.within("issued_at", w.issued_at, UTC_MAX)?),
            expires_at: UtcMillis(f.within("expires_at", w.expires_at, UTC_MAX)?),
        })
    }
}

/// The rates by which contributions are valued, whatever was charged for them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateCard {
    /// Whose ledger, and who signs.
    pub scheduler: SchedulerId,
    /// From 1, rising.
    pub version: u32,
    /// Start of a device class and its rate; at most 64. The longest start that fits counts.
    pub rates: Vec<(String, Rate)>,
    /// Since when they count.
    pub effective_from: UtcMillis,
    /// When it was signed.
    pub issued_at: UtcMillis,
}

impl RateCard {
    /// The standard rate of a class of device; `None` when the card does not know it.
    pub fn rate(&self, device_class: &str) -> Option<Rate> {
        self.rates
            .iter()
            .filter(|(start, _)| device_class.starts_with(start.as_str()))
            .max_by_key(|(start, _)| start.len())
            .map(|(_, rate)| *rate)
    }
}

impl Record for RateCard {
    const TYPE: &'static str = "karez.ratecard.v1";
    const BYTES_MAX: usize = 8 * 1024;
    type Wire = wire::RateCard;

    fn signer(&self) -> PublicKey {
        self.scheduler.0
    }

    fn to_wire(&self) -> wire::RateCard {
        wire::RateCard {
            scheduler: self.scheduler.0.0.to_vec(),
            version: self.version,
            rates: self
                .rates
                .iter()
                .map(|(device, rate)| wire::StandardRate {
                    device: device.clone(),
                    rate: rate.0,
                })
                .collect(),
            effective_from: self.effective_from.0,
            issued_at: self.issued_at.0,
        }
    }

    fn from_wire(w: wire::RateCard) -> Result<Self, RecordError> {
        let f = Fields(Self::TYPE);
        if w.version == 0 {
            return Err(f.bad("version", "is 0: versions count from 1"));
        }
        Ok(Self {
            scheduler: SchedulerId(f.key("scheduler", &w.scheduler)?),
            version: w.version,
            rates: f.list("rates", w.rates, 64, |r| {
                Ok((f.text("rates.device", r.device, 64)?, Rate(r.rate)))
            })?,
            effective_from: UtcMillis(f.within("effective_from", w.effective_from, UTC_MAX)?),
            issued_at: UtcMillis(f.within("issued_at", w.issued_at, UTC_MAX)?),
        })
    }
}

/// How institutions share, as the operator has promised it: the floor that all have, and what else decides whose turn it is
/// (see [`crate::fair`]).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Floors {
    /// Whose ledger, and who signs.
    pub scheduler: SchedulerId,
    /// From 1, rising; 0 in what nobody signed yet.
    pub version: u32,
    /// The constants.
    pub shares: Shares,
    /// When it was signed.
    pub issued_at: UtcMillis,
}

impl Record for Floors {
    const TYPE: &'static str = "karez.floors.v1";
    const BYTES_MAX: usize = 32 * 1024;
    type Wire = wire::Floors;

    fn signer(&self) -> PublicKey {
        self.scheduler.0
    }

    fn to_wire(&self) -> wire::Floors {
        let extra = |(institution, percent): (&Institution, &u32)| wire::ExtraShare {
            institution: institution.to_string(),
            percent: *percent,
        };
        wire::Floors {
            scheduler: self.scheduler.0.0.to_vec(),
            version: self.version,
            floor_percent: self.shares.floor_percent,
            half_life_ms: self.shares.half_life.0,
            donated: self.shares.donated.0,
            extra: self.shares.grants_percent.iter().map(extra).collect(),
            issued_at: self.issued_at.0,
        }
    }

    fn from_wire(w: wire::Floors) -> Result<Self, RecordError> {
        let f = Fields(Self::TYPE);
        if w.version == 0 {
            return Err(f.bad("version", "is 0: versions count from 1"));
        }
        if w.half_life_ms < HALF_LIFE_MIN.0 {
            return Err(f.bad("half_life_ms", "is under a minute"));
        }
        let extra = f.list("extra", w.extra, EXTRA_MAX, |one| {
            let percent = f.within("extra.percent", one.percent.into(), 10_000)?;
            // Within 32 bits, as was just checked.
            Ok((f.parse("extra.institution", &one.institution)?, percent as u32))
        })?;
        let many = extra.len();
        let grants_percent: BTreeMap<Institution, u32> = extra.into_iter().collect();
        if grants_percent.len() != many {
            return Err(f.bad("extra", "names an institution twice"));
        }
        Ok(Self {
            scheduler: SchedulerId(f.key("scheduler", &w.scheduler)?),
            version: w.version,
            shares: Shares {
                half_life: Millis(f.within("half_life_ms", w.half_life_ms, UTC_MAX)?),
                donated: Rate(f.within("donated", w.donated, i64::MAX as u64)?),
                floor_percent: f.within("floor_percent", w.floor_percent.into(), 100)? as u32,
                grants_percent,
            },
            issued_at: UtcMillis(f.within("issued_at", w.issued_at, UTC_MAX)?),
        })
    }
}

/// The shortest half-life of fair share.
const HALF_LIFE_MIN: Millis = Millis(60_000);
/// The most institutions with an extra share.
const EXTRA_MAX: usize = 256;

/// How far an institution's account may be under zero: what it may grant beyond what it has earned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreditLimit {
    /// Whose ledger, and who signs.
    pub scheduler: SchedulerId,
    /// Whose account.
    pub institution: Institution,
    /// How far.
    pub credits: Credits,
    /// When it was signed.
    pub issued_at: UtcMillis,
}

impl Record for CreditLimit {
    const TYPE: &'static str = "karez.limit.v1";
    const BYTES_MAX: usize = 1024;
    type Wire = wire::CreditLimit;

    fn signer(&self) -> PublicKey {
        self.scheduler.0
    }

    fn to_wire(&self) -> wire::CreditLimit {
        wire::CreditLimit {
            scheduler: self.scheduler.0.0.to_vec(),
            institution: self.institution.to_string(),
            credits: self.credits.0,
            issued_at: self.issued_at.0,
        }
    }

    fn from_wire(w: wire::CreditLimit) -> Result<Self, RecordError> {
        let f = Fields(Self::TYPE);
        Ok(Self {
            scheduler: SchedulerId(f.key("scheduler", &w.scheduler)?),
            institution: f.parse("institution", &w.institution)?,
            credits: Credits(f.within("credits", w.credits, i64::MAX as u64)?),
            issued_at: UtcMillis(f.within("issued_at", w.issued_at, UTC_MAX)?),
        })
    }
}

/// One institution has paid another outside the ledger: what the payee is owed falls, and what the payer owes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Payment {
    /// Whose ledger, and who signs.
    pub scheduler: SchedulerId,
    /// Who paid.
    pub payer: Institution,
    /// Who was paid.
    pub payee: Institution,
    /// How much.
    pub credits: Credits,
    /// Of the bank, or of the statement it settles; at most 200 bytes.
    pub reference: String,
    /// Tells equal payments apart.
    pub nonce: u64,
    /// When.
    pub issued_at: UtcMillis,
}

impl Record for Payment {
    const TYPE: &'static str = "karez.payment.v1";
    const BYTES_MAX: usize = 1024;
    type Wire = wire::Payment;

    fn signer(&self) -> PublicKey {
        self.scheduler.0
    }

    fn to_wire(&self) -> wire::Payment {
        wire::Payment {
            scheduler: self.scheduler.0.0.to_vec(),
            payer: self.payer.to_string(),
            payee: self.payee.to_string(),
            credits: self.credits.0,
            reference: self.reference.clone(),
            nonce: self.nonce,
            issued_at: self.issued_at.0,
        }
    }

    fn from_wire(w: wire::Payment) -> Result<Self, RecordError> {
        let f = Fields(Self::TYPE);
        Ok(Self {
            scheduler: SchedulerId(f.key("scheduler", &w.scheduler)?),
            payer: f.parse("payer", &w.payer)?,
            payee: f.parse("payee", &w.payee)?,
            credits: Credits(f.within("credits", w.credits, i64::MAX as u64)?),
            reference: f.text("reference", w.reference, 200)?,
            nonce: w.nonce,
            issued_at: UtcMillis(f.within("issued_at", w.issued_at, UTC_MAX)?),
        })
    }
}
