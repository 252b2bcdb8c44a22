//! What holds the network together: invitations, and what schedulers tell each other.
use super::{
    envelope::{Record, RecordError},
    wire::{Fields, UTC_MAX},
};
use crate::{
    id::{Country, Digest, Institution},
    key::{PublicKey, SchedulerId},
    prelude::*,
    unit::{Credits, Rate, UtcMillis},
};
use karez_proto::records as wire;
use serde::{Deserialize, Serialize};

/// What an invited key becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// A provider's machine.
    Node,
    /// A researcher.
    User,
}

impl Role {
    /// The wire name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::User => "user",
        }
    }
}

impl core::str::FromStr for Role {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "node" => Ok(Self::Node),
            "user" => Ok(Self::User),
            _ => Err(format!("{text:?} is no role: expected node or user")),
        }
    }
}

/// Pasted by whoever joins: whom to dial, whom to trust, as what. Not a secret worth much: it expires and counts its uses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invitation {
    /// Who invites.
    pub scheduler: SchedulerId,
    /// Into which institution.
    pub institution: Institution,
    /// As what.
    pub role: Role,
    /// `host:port` of the control API.
    pub control_addr: String,
    /// libp2p multiaddresses of the scheduler; at most 8.
    pub peer_addrs: Vec<String>,
    /// A user's first budget.
    pub credits: Credits,
    /// Tells invitations apart.
    pub nonce: u64,
    /// How many keys may redeem it.
    pub uses_max: u32,
    /// Until when.
    pub expires_at: UtcMillis,
}

impl Record for Invitation {
    const TYPE: &'static str = "karez.invitation.v1";
    const BYTES_MAX: usize = 4 * 1024;
    type Wire = wire::Invitation;

    fn signer(&self) -> PublicKey {
        self.scheduler.0
    }

    fn to_wire(&self) -> wire::Invitation {
        wire::Invitation {
            scheduler: self.scheduler.0.0.to_vec(),
            institution: self.institution.to_string(),
            role: self.role.as_str().into(),
            control_addr: self.control_addr.clone(),
            peer_addrs: self.peer_addrs.clone(),
            credits: self.credits.0,
            nonce: self.nonce,
            uses_max: self.uses_max,
            expires_at: self.expires_at.0,
        }
    }

    fn from_wire(w: wire::Invitation) -> Result<Self, RecordError> {
        let f = Fields(Self::TYPE);
        Ok(Self {
            scheduler: SchedulerId(f.key("scheduler", &w.scheduler)?),
            institution: f.parse("institution", &w.institution)?,
            role: f.parse("role", &w.role)?,
            control_addr: f.text("control_addr", w.control_addr, 128)?,
            peer_addrs: f.list("peer_addrs", w.peer_addrs, 8, |a| f.text("peer_addrs", a, 256))?,
            credits: Credits(f.within("credits", w.credits, i64::MAX as u64)?),
            nonce: w.nonce,
            uses_max: w.uses_max.max(1),
            expires_at: UtcMillis(f.within("expires_at", w.expires_at, UTC_MAX)?),
        })
    }
}

/// Free capacity of one class of device in one country.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClassSummary {
    /// Device class.
    pub device_class: String,
    /// Country.
    pub country: Country,
    /// Nodes that have it.
    pub nodes: u32,
    /// Free devices.
    pub free: u32,
    /// The lowest price.
    pub rate_min: Rate,
}

/// What one scheduler gossips to the others: what it can place, and where its book stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    /// Who speaks.
    pub scheduler: SchedulerId,
    /// At most 256 classes.
    pub classes: Vec<ClassSummary>,
    /// Entries in its ledger.
    pub ledger_entries: u64,
    /// Hash of the last one: two heads for one number show a fork.
    pub ledger_head: Digest,
    /// Rises with every summary.
    pub sequence: u64,
    /// When.
    pub issued_at: UtcMillis,
    /// Where its control API listens; at most 8.
    pub addrs: Vec<String>,
}

impl Record for Summary {
    const TYPE: &'static str = "karez.summary.v1";
    // Gossipsub carries 64 KiB in one message.
    const BYTES_MAX: usize = 48 * 1024;
    type Wire = wire::Summary;

    fn signer(&self) -> PublicKey {
        self.scheduler.0
    }

    fn to_wire(&self) -> wire::Summary {
        wire::Summary {
            scheduler: self.scheduler.0.0.to_vec(),
            classes: self
                .classes
                .iter()
                .map(|c| wire::ClassSummary {
                    device_class: c.device_class.clone(),
                    country: c.country.to_string(),
                    nodes: c.nodes,
                    free: c.free,
                    rate_min: c.rate_min.0,
                })
                .collect(),
            ledger_entries: self.ledger_entries,
            ledger_head: self.ledger_head.0.to_vec(),
            sequence: self.sequence,
            issued_at: self.issued_at.0,
            addrs: self.addrs.clone(),
        }
    }

    fn from_wire(w: wire::Summary) -> Result<Self, RecordError> {
        let f = Fields(Self::TYPE);
        let class = |c: wire::ClassSummary| {
            Ok(ClassSummary {
                device_class: f.text("classes.device_class", c.device_class, 64)?,
                country: f.parse("classes.country", &c.country)?,
                nodes: c.nodes,
                free: c.free,
                rate_min: Rate(c.rate_min),
            })
        };
        Ok(Self {
            scheduler: SchedulerId(f.key("scheduler", &w.scheduler)?),
            classes: f.list("classes", w.classes, 256, class)?,
            ledger_entries: w.ledger_entries,
            ledger_head: f.digest("ledger_head", &w.ledger_head)?,
            sequence: w.sequence,
            issued_at: UtcMillis(f.within("issued_at", w.issued_at, UTC_MAX)?),
            addrs: f.list("addrs", w.addrs, 8, |a| f.text("addrs", a, 256))?,
        })
    }
}
