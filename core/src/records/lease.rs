//! A lease: a node's promise to run one part of a job, once, within limits.
use super::{
    envelope::{Record, RecordError},
    wire::{Fields, UTC_MAX},
};
use crate::{
    id::{Fence, Institution, JobId, LeaseKey, PartIndex},
    key::{NodeId, PublicKey, SchedulerId},
    prelude::*,
    unit::{DeviceMillis, Portion, Rate, UtcMillis},
};
use karez_proto::records as wire;
use serde::{Deserialize, Serialize};

/// Granted by the node alone. A later fence for the same part makes it void.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// The order, hence the job.
    pub job: JobId,
    /// Which part.
    pub part: PartIndex,
    /// Which attempt.
    pub fence: Fence,
    /// Who grants.
    pub node: NodeId,
    /// To whom.
    pub scheduler: SchedulerId,
    /// The node's institution, which will be paid.
    pub institution: Institution,
    /// On which devices.
    pub device_class: String,
    /// How many of them, or what share of one.
    pub devices: Portion,
    /// At what price for one.
    pub rate: Rate,
    /// The most that can be billed.
    pub device_ms_max: DeviceMillis,
    /// First item of the part.
    pub first_item: u64,
    /// Items in the part.
    pub items: u64,
    /// When granted.
    pub granted_at: UtcMillis,
    /// When it ends unless renewed.
    pub expires_at: UtcMillis,
}

impl Lease {
    /// What names it between node and scheduler.
    pub fn key(&self) -> LeaseKey {
        LeaseKey {
            job: self.job,
            part: self.part,
            fence: self.fence,
        }
    }
}

impl Record for Lease {
    const TYPE: &'static str = "karez.lease.v1";
    const BYTES_MAX: usize = 4 * 1024;
    type Wire = wire::Lease;

    fn signer(&self) -> PublicKey {
        self.node.0
    }

    fn to_wire(&self) -> wire::Lease {
        wire::Lease {
            order: self.job.0.0.to_vec(),
            part: self.part,
            fence: self.fence,
            node: self.node.0.0.to_vec(),
            scheduler: self.scheduler.0.0.to_vec(),
            device_class: self.device_class.clone(),
            devices: self.devices.count(),
            share_milli: self.devices.share_milli(),
            rate: self.rate.0,
            device_ms_max: self.device_ms_max.0,
            first_item: self.first_item,
            items: self.items,
            granted_at: self.granted_at.0,
            expires_at: self.expires_at.0,
            institution: self.institution.to_string(),
        }
    }

    fn from_wire(w: wire::Lease) -> Result<Self, RecordError> {
        let f = Fields(Self::TYPE);
        Ok(Self {
            job: JobId(f.digest("order", &w.order)?),
            part: w.part,
            fence: w.fence,
            node: NodeId(f.key("node", &w.node)?),
            scheduler: SchedulerId(f.key("scheduler", &w.scheduler)?),
            institution: f.parse("institution", &w.institution)?,
            device_class: f.text("device_class", w.device_class, 64)?,
            devices: f.portion(w.devices, w.share_milli)?,
            rate: Rate(w.rate),
            device_ms_max: DeviceMillis(w.device_ms_max),
            first_item: w.first_item,
            items: w.items,
            granted_at: UtcMillis(f.within("granted_at", w.granted_at, UTC_MAX)?),
            expires_at: UtcMillis(f.within("expires_at", w.expires_at, UTC_MAX)?),
        })
    }
}
