//! A receipt: the scheduler's countersignature under a usage, with what it bills.
use super::{
    envelope::{Record, RecordError},
    wire::{Fields, UTC_MAX},
};
use crate::{
    id::{Institution, JobId, RecordId},
    key::{NodeId, PublicKey, SchedulerId, UserId},
    prelude::*,
    unit::{Credits, DeviceMillis, Millis, UtcMillis},
};
use karez_proto::records as wire;
use serde::{Deserialize, Serialize};

/// How much longer than the scheduler saw a node may say it worked before the receipt must remark on it: clocks and
/// messages take their time. Two seconds and five percent. Only the remark has a tolerance: the smaller is billed, always.
pub const TOLERANCE: Millis = Millis(2_000);
/// The part of it that grows with the work.
pub const TOLERANCE_PERCENT: u64 = 5;

/// What the scheduler noticed while checking a usage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Flag {
    /// The node reports more device time than the scheduler saw go by: the smaller is billed.
    LongerThanObserved,
    /// The node reports more device time than its lease allows: the lease's limit is billed.
    OverLease,
    /// The bill was cut to what was left of the job's ceiling.
    CutToCeiling,
    /// The part did not finish, so nothing is billed.
    NotDone,
}

impl Flag {
    /// The wire name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::LongerThanObserved => "longer-than-observed",
            Self::OverLease => "over-lease",
            Self::CutToCeiling => "cut-to-ceiling",
            Self::NotDone => "not-done",
        }
    }
}

impl core::str::FromStr for Flag {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "longer-than-observed" => Ok(Self::LongerThanObserved),
            "over-lease" => Ok(Self::OverLease),
            "cut-to-ceiling" => Ok(Self::CutToCeiling),
            "not-done" => Ok(Self::NotDone),
            _ => Err(format!("{text:?} is no receipt flag")),
        }
    }
}

/// One per lease that counts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receipt {
    /// Record id of the usage.
    pub usage: RecordId,
    /// Record id of the lease.
    pub lease: RecordId,
    /// The job, hence its order.
    pub job: JobId,
    /// Who countersigns.
    pub scheduler: SchedulerId,
    /// Who worked.
    pub node: NodeId,
    /// Who is paid.
    pub node_institution: Institution,
    /// Who pays.
    pub user: UserId,
    /// The user's institution.
    pub user_institution: Institution,
    /// Device time the scheduler itself saw go by.
    pub observed: DeviceMillis,
    /// Device time billed.
    pub billed: DeviceMillis,
    /// What that costs at the lease's rate.
    pub credits: Credits,
    /// What was noticed.
    pub flags: Vec<Flag>,
    /// When.
    pub issued_at: UtcMillis,
    /// Until when the researcher may dispute it; silence accepts.
    pub disputable_until: UtcMillis,
    /// Version of the standard rates in force; 0 while there are none.
    pub rate_card: u32,
}

impl Receipt {
    /// The device time that a finished part is billed: the smallest of what the node measured, what the scheduler saw and
    /// what the lease allows.
    pub fn due(&self, measured: DeviceMillis, allowed: DeviceMillis) -> DeviceMillis {
        measured.min(self.observed).min(allowed)
    }

    /// The remarks that these figures call for, and no others of their kind.
    pub fn remarks(&self, measured: DeviceMillis, allowed: DeviceMillis) -> [(Flag, bool); 2] {
        let observed = self.observed.0;
        let tolerated = observed
            .saturating_add(observed / 100 * TOLERANCE_PERCENT)
            .saturating_add(TOLERANCE.0);
        [
            (Flag::LongerThanObserved, measured.0 > tolerated),
            (Flag::OverLease, measured.min(self.observed) > allowed),
        ]
    }
}

impl Record for Receipt {
    const TYPE: &'static str = "karez.receipt.v1";
    const BYTES_MAX: usize = 4 * 1024;
    type Wire = wire::Receipt;

    fn signer(&self) -> PublicKey {
        self.scheduler.0
    }

    fn to_wire(&self) -> wire::Receipt {
        wire::Receipt {
            usage: self.usage.0.to_vec(),
            lease: self.lease.0.to_vec(),
            order: self.job.0.0.to_vec(),
            scheduler: self.scheduler.0.0.to_vec(),
            node: self.node.0.0.to_vec(),
            node_institution: self.node_institution.to_string(),
            user: self.user.0.0.to_vec(),
            user_institution: self.user_institution.to_string(),
            observed_ms: self.observed.0,
            billed_ms: self.billed.0,
            credits: self.credits.0,
            flags: self.flags.iter().map(|f| f.as_str().into()).collect(),
            issued_at: self.issued_at.0,
            disputable_until: self.disputable_until.0,
            rate_card: self.rate_card,
        }
    }

    fn from_wire(w: wire::Receipt) -> Result<Self, RecordError> {
        let f = Fields(Self::TYPE);
        Ok(Self {
            usage: f.digest("usage", &w.usage)?,
            lease: f.digest("lease", &w.lease)?,
            job: JobId(f.digest("order", &w.order)?),
            scheduler: SchedulerId(f.key("scheduler", &w.scheduler)?),
            node: NodeId(f.key("node", &w.node)?),
            node_institution: f.parse("node_institution", &w.node_institution)?,
            user: UserId(f.key("user", &w.user)?),
            user_institution: f.parse("user_institution", &w.user_institution)?,
            observed: DeviceMillis(w.observed_ms),
            billed: DeviceMillis(w.billed_ms),
            credits: Credits(f.within("credits", w.credits, i64::MAX as u64)?),
            flags: f.list("flags", w.flags, 16, |t| f.parse("flags", &t))?,
            issued_at: UtcMillis(f.within("issued_at", w.issued_at, UTC_MAX)?),
            disputable_until: UtcMillis(f.within("disputable_until", w.disputable_until, UTC_MAX)?),
            rate_card: w.rate_card,
        })
    }
}
