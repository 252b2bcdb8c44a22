//! What follows a receipt: acceptance, or a dispute and its ruling. Silence accepts.
use super::{
    envelope::{Record, RecordError},
    wire::{Fields, UTC_MAX},
};
use crate::{
    id::{Digest, RecordId},
    key::{PublicKey, SchedulerId, UserId},
    prelude::*,
    unit::{Credits, Millis, UtcMillis},
};
use karez_proto::records as wire;
use serde::{Deserialize, Serialize};

/// How long after it was issued a receipt can be disputed, where the operator sets nothing else: seven days.
pub const DISPUTE_WINDOW: Millis = Millis(7 * 24 * 3_600_000);
/// The longest reason of a dispute or a ruling, in bytes.
pub const REASON_BYTES_MAX: usize = 500;

/// The researcher agrees before the window ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Acceptance {
    /// Record id of the receipt.
    pub receipt: RecordId,
    /// Who paid.
    pub user: UserId,
    /// When.
    pub issued_at: UtcMillis,
}

impl Record for Acceptance {
    const TYPE: &'static str = "karez.acceptance.v1";
    const BYTES_MAX: usize = 1024;
    type Wire = wire::Acceptance;

    fn signer(&self) -> PublicKey {
        self.user.0
    }

    fn to_wire(&self) -> wire::Acceptance {
        wire::Acceptance {
            receipt: self.receipt.0.to_vec(),
            user: self.user.0.0.to_vec(),
            issued_at: self.issued_at.0,
        }
    }

    fn from_wire(w: wire::Acceptance) -> Result<Self, RecordError> {
        let f = Fields(Self::TYPE);
        Ok(Self {
            receipt: f.digest("receipt", &w.receipt)?,
            user: UserId(f.key("user", &w.user)?),
            issued_at: UtcMillis(f.within("issued_at", w.issued_at, UTC_MAX)?),
        })
    }
}

/// The researcher does not agree: the receipt's credits are frozen until a ruling.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dispute {
    /// Record id of the receipt.
    pub receipt: RecordId,
    /// Who paid.
    pub user: UserId,
    /// Why; at most 500 bytes, and public: no names.
    pub reason: String,
    /// Digests of what the researcher can show; at most 16.
    pub evidence: Vec<Digest>,
    /// When.
    pub issued_at: UtcMillis,
}

impl Record for Dispute {
    const TYPE: &'static str = "karez.dispute.v1";
    const BYTES_MAX: usize = 2 * 1024;
    type Wire = wire::Dispute;

    fn signer(&self) -> PublicKey {
        self.user.0
    }

    fn to_wire(&self) -> wire::Dispute {
        wire::Dispute {
            receipt: self.receipt.0.to_vec(),
            user: self.user.0.0.to_vec(),
            reason: self.reason.clone(),
            evidence: self.evidence.iter().map(|d| d.0.to_vec()).collect(),
            issued_at: self.issued_at.0,
        }
    }

    fn from_wire(w: wire::Dispute) -> Result<Self, RecordError> {
        let f = Fields(Self::TYPE);
        Ok(Self {
            receipt: f.digest("receipt", &w.receipt)?,
            user: UserId(f.key("user", &w.user)?),
            reason: f.text("reason", w.reason, REASON_BYTES_MAX)?,
            evidence: f.list("evidence", w.evidence, 16, |d| f.digest("evidence", &d))?,
            issued_at: UtcMillis(f.within("issued_at", w.issued_at, UTC_MAX)?),
        })
    }
}

/// How a dispute ends: by the scheduler's operator, with compensating entries.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ruling {
    /// Record id of the dispute.
    pub dispute: RecordId,
    /// Record id of the receipt.
    pub receipt: RecordId,
    /// Who rules.
    pub scheduler: SchedulerId,
    /// What the researcher gets back; the rest goes to the institution after all.
    pub refund: Credits,
    /// Why; at most 500 bytes, and public.
    pub reason: String,
    /// When.
    pub issued_at: UtcMillis,
}

impl Record for Ruling {
    const TYPE: &'static str = "karez.ruling.v1";
    const BYTES_MAX: usize = 2 * 1024;
    type Wire = wire::Ruling;

    fn signer(&self) -> PublicKey {
        self.scheduler.0
    }

    fn to_wire(&self) -> wire::Ruling {
        wire::Ruling {
            dispute: self.dispute.0.to_vec(),
            receipt: self.receipt.0.to_vec(),
            scheduler: self.scheduler.0.0.to_vec(),
            refund: self.refund.0,
            reason: self.reason.clone(),
            issued_at: self.issued_at.0,
        }
    }

    fn from_wire(w: wire::Ruling) -> Result<Self, RecordError> {
        let f = Fields(Self::TYPE);
        Ok(Self {
            dispute: f.digest("dispute", &w.dispute)?,
            receipt: f.digest("receipt", &w.receipt)?,
            scheduler: SchedulerId(f.key("scheduler", &w.scheduler)?),
            refund: Credits(f.within("refund", w.refund, i64::MAX as u64)?),
            reason: f.text("reason", w.reason, REASON_BYTES_MAX)?,
            issued_at: UtcMillis(f.within("issued_at", w.issued_at, UTC_MAX)?),
        })
    }
}
