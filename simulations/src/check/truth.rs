//! Machines as they truly are, whatever they say of themselves.
use karez_core::{
    id::{Country, Institution},
    key::NodeId,
    records::{DataClass, Order, Tier, WorkKind},
    unit::{Bytes, Rate},
};

/// One class of devices of a machine, as it truly is.
#[derive(Debug, Clone)]
pub struct TrueDevice {
    /// Its class.
    pub class: String,
    /// How many there are.
    pub count: u32,
    /// Memory of one.
    pub memory: Bytes,
    /// What the owner asks now.
    pub rate: Rate,
    /// The smallest share of one that is lent, in thousandths; 0 for whole ones only.
    pub share_min: u32,
}

/// A machine as it truly is.
#[derive(Debug, Clone)]
pub struct TrueNode {
    /// Its key.
    pub id: NodeId,
    /// Whose it is.
    pub institution: Institution,
    /// Where it stands.
    pub country: Country,
    /// What it has.
    pub devices: Vec<TrueDevice>,
    /// What it can do, with units per second in thousandths.
    pub speeds: Vec<(WorkKind, u64)>,
    /// Whose users its owner refuses.
    pub refuses: Vec<Institution>,
    /// How far its workers are truly cut off.
    pub isolation: Tier,
    /// The most delicate data its owner takes.
    pub data: DataClass,
    /// Models under these licences only; empty for all.
    pub licences: Vec<String>,
    /// Its messages are its agent's own.
    pub honest: bool,
}

impl TrueNode {
    /// Units per second in thousandths; none when it cannot do that.
    pub fn speed(&self, kind: WorkKind) -> Option<u64> {
        self.speeds
            .iter()
            .find(|(k, _)| *k == kind)
            .map(|(_, speed)| *speed)
    }

    pub(super) fn device(&self, class: &str) -> Option<&TrueDevice> {
        self.devices.iter().find(|d| d.class == class)
    }

    /// May `order` run on `device` of this machine, by the user's own words?
    pub(super) fn allowed(&self, order: &Order, device: &TrueDevice) -> Result<(), String> {
        let c = &order.constraints;
        if !c.countries.is_empty() && !c.countries.contains(&self.country) {
            return Err(format!("{} is none of its countries", self.country));
        }
        if c.countries_excluded.contains(&self.country) {
            return Err(format!("{} is excluded", self.country));
        }
        if !c.institutions.is_empty() && !c.institutions.contains(&self.institution) {
            return Err(format!("{} is none of its institutions", self.institution));
        }
        if c.institutions_excluded.contains(&self.institution) {
            return Err(format!("{} is excluded", self.institution));
        }
        if self.refuses.contains(&order.institution) {
            return Err(format!("the owner refuses users of {}", order.institution));
        }
        if self.speed(order.work.kind()).is_none() {
            return Err("it has no such engine".into());
        }
        if !device.class.starts_with(&c.device) {
            return Err(format!("{} is not {}", device.class, c.device));
        }
        let share = u64::from(c.share_milli);
        if share > 0 && (device.share_min == 0 || c.share_milli < device.share_min) {
            return Err(format!("it lends no {share} thousandths of a {}", device.class));
        }
        let memory = if share > 0 {
            device.memory.0 / 1_000 * share
        } else {
            device.memory.0
        };
        // What a thousandth is of a size that a thousand does not divide, is nobody's business.
        if memory + 1_000 < c.memory.0 {
            return Err("it has too little memory".into());
        }
        if device.count < c.devices.max(1) {
            return Err("it has too few devices".into());
        }
        if self.isolation < c.isolation {
            return Err(format!("its isolation is {}", self.isolation));
        }
        if self.data < c.data {
            return Err(format!("its owner takes no {} data", c.data));
        }
        let has_model = order.work.kind() != WorkKind::Noop;
        if has_model && !self.licences.is_empty() && !self.licences.contains(&c.licence) {
            return Err(format!("its owner runs no model under {:?}", c.licence));
        }
        if c.donated_only && device.rate > Rate::FREE {
            return Err("it is not donated".into());
        }
        if c.rate_max.is_some_and(|max| device.rate > max) {
            return Err("it is dearer than the order allows".into());
        }
        Ok(())
    }

    /// Parts of `order` that could run here at once, money aside.
    pub fn room_for(&self, order: &Order) -> u32 {
        let able = self.devices.iter().filter(|d| self.allowed(order, d).is_ok());
        let c = &order.constraints;
        able.map(|d| match c.share_milli {
            0 => d.count / c.devices.max(1),
            share => d.count * (1_000 / share),
        })
        .sum()
    }

    /// Could some device of this machine ever run `order`, money aside?
    pub fn could_run(&self, order: &Order) -> bool {
        self.devices.iter().any(|d| self.allowed(order, d).is_ok())
    }
}
