//! The cost of finished work, in one unit: what a place would bill, and what else it costs the federation.
//!
//! [`quote`] is the exact judgement of one device of one node. Everything is rounded up, in integers, so that equal
//! inputs give equal scores everywhere and the bounds of [`super::stock`] hold.
use super::{Policy, Request, Requirement};
use crate::{
    id::Country,
    market::Listing,
    prelude::*,
    records::Device,
    unit::{Credits, Millis, Rate, WHOLE},
};

const HOUR: u128 = 3_600_000;
/// Ten years. What would take longer is not placed: a wrong speed or a slip in the order.
const DURATION_MAX: Millis = Millis(10 * 366 * 24 * 3_600_000);

/// What electricity costs and weighs in a country.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Grid {
    /// Micro-credits for a kilowatt-hour.
    pub price: Credits,
    /// Grams of CO₂ for a kilowatt-hour.
    pub grams: u32,
}

/// What devices draw and what power costs, where the operator knows: for capacity that is priced at zero, and for
/// those who put a price on carbon.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Energy {
    /// Watts of a device, by the start of its class; the longest match counts.
    pub watts: BTreeMap<String, u32>,
    /// By country.
    pub grids: BTreeMap<Country, Grid>,
    /// Micro-credits for a kilogram of CO₂; zero leaves it out.
    pub carbon_price: Credits,
    /// No node where a kilowatt-hour weighs more grams than this. A mask, never a score.
    pub carbon_max: Option<u32>,
}

impl Energy {
    /// What an hour of such a device costs besides its price: electricity where nobody charges for it, and carbon.
    pub fn rate(&self, country: &Country, device: &Device) -> Rate {
        let Some(grid) = self.grids.get(country) else {
            return Rate::FREE;
        };
        let watts = self
            .watts
            .iter()
            .filter(|(class, _)| device.class.starts_with(class.as_str()))
            .max_by_key(|(class, _)| class.len())
            .map_or(0, |(_, watts)| u128::from(*watts));
        let power = if device.rate == Rate::FREE {
            grid.price.0
        } else {
            0
        };
        // Grams of a watt-hour times micro-credits of a kilogram: a millionth of what an hour costs.
        let carbon = watts * u128::from(grid.grams) * u128::from(self.carbon_price.0) / 1_000_000;
        Rate(saturate(watts * u128::from(power) / 1_000 + carbon))
    }

    /// Whether that country's power is clean enough.
    pub fn allows(&self, country: &Country) -> bool {
        match (self.carbon_max, self.grids.get(country)) {
            (Some(most), Some(grid)) => grid.grams <= most,
            _ => true,
        }
    }
}

/// What finished work would cost on one device of one node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quote {
    /// The expected bill.
    pub cost: Credits,
    /// What is compared.
    pub score: Credits,
    /// How long the work takes.
    pub duration: Millis,
    /// How long fetching what is missing takes.
    pub transfer: Millis,
}

/// Why a device will not do, and by how much: missing memory in bytes, an asked rate, an expected bill.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lack {
    /// Which requirement it fails first.
    pub requirement: Requirement,
    /// By how much, where that is a number.
    pub missed: u64,
}

/// Judges device `i` of a node as if it were free; whether it is, and whether the node is there, is not asked here.
///
/// `shadow` is what better use an hour of the device is kept from, as the slow path last found.
pub fn quote(
    listing: &Listing,
    i: usize,
    shadow: Rate,
    request: &Request<'_>,
    policy: &Policy,
) -> Result<Quote, Lack> {
    let lack = |requirement, missed| Err(Lack { requirement, missed });
    let offer = &listing.offer;
    let c = request.constraints;
    let (Some(device), Some(speed)) = (offer.devices.get(i), listing.speed(request.kind)) else {
        return lack(Requirement::Engine, 0);
    };
    if !device.class.starts_with(c.device.as_str()) || !request.runs_on(&device.class) {
        return lack(Requirement::Device, 0);
    }
    let memory = request.memory.max(c.memory);
    let has = request.devices.memory_of_one(device.memory);
    if has < memory {
        return lack(Requirement::Memory, memory.0 - has.0);
    }
    if device.count < request.devices.touched() {
        return lack(
            Requirement::Count,
            u64::from(request.devices.touched() - device.count),
        );
    }
    if !device.lends(request.devices) {
        let least = if device.share_min == 0 {
            WHOLE
        } else {
            device.share_min
        };
        return lack(Requirement::Share, least.into());
    }
    let duration = duration(request, speed.0);
    if duration > DURATION_MAX {
        return lack(Requirement::Duration, duration.0);
    }
    let missing: u64 = request
        .artifacts
        .iter()
        .filter(|(digest, _)| !offer.cached.contains(digest))
        .fold(0, |sum, (_, bytes)| sum.saturating_add(bytes.0));
    let transfer = transfer(missing, policy);
    // Of a speed that nobody knows no end can be told.
    if let Some(within) = request.within
        && speed.0 > 0
    {
        let takes = duration.saturating_add(transfer);
        if takes > within {
            return lack(Requirement::Deadline, takes.0 - within.0);
        }
    }
    if request.reliable && !is_reliable(listing, duration) {
        return lack(Requirement::Reliable, 0);
    }
    let limit = if c.donated_only {
        Some(Rate::FREE)
    } else {
        c.rate_max
    };
    if limit.is_some_and(|limit| device.rate > limit) {
        return lack(Requirement::Price, device.rate.0);
    }
    let held = request.devices.time(duration);
    let cost = match device.rate.bill(held) {
        Some(cost) if cost <= request.ceiling => cost,
        cost => return lack(Requirement::Budget, cost.map_or(u64::MAX, |c| c.0)),
    };
    let besides = u128::from(running(listing, i, policy).0) + u128::from(shadow.0);
    let patience = waited_for(request, policy);
    let waiting = besides * u128::from(held.0)
        + u128::from(policy.delay_rate.0) * u128::from(transfer.0)
        + u128::from(patience.0) * u128::from(duration.saturating_add(transfer).0);
    let plain = u128::from(cost.0) + waiting.div_ceil(HOUR);
    let risky = plain * u128::from(failure_percent(listing.failures, policy));
    let lost = u128::from(listing.hazard()) * u128::from(lost(duration, policy).0);
    let score = (risky.div_ceil(100) * (HAZARD_UNIT + lost)).div_ceil(HAZARD_UNIT);
    Ok(Quote {
        cost,
        score: Credits(saturate(score)),
        duration,
        transfer,
    })
}

/// What an hour is worth to who waits for it, besides what any delay costs.
pub(super) fn waited_for(request: &Request<'_>, policy: &Policy) -> Rate {
    match request.waited_for {
        true => policy.question_rate,
        false => Rate::FREE,
    }
}

/// The owner of the place hardly ever takes it back within so long, and the last work there was no failure.
pub(crate) fn is_reliable(listing: &Listing, duration: Millis) -> bool {
    let reclaims = u128::from(listing.hazard()) * u128::from(duration.0);
    listing.failures == 0 && reclaims * 100 <= HAZARD_UNIT * u128::from(super::RISK_PERCENT)
}

/// Hazard is counted per thousand device-hours.
pub(super) const HAZARD_UNIT: u128 = 1_000 * HOUR;

/// What an hour of the device costs besides its price, whoever uses it.
pub(crate) fn running(listing: &Listing, i: usize, policy: &Policy) -> Rate {
    let energy = match listing.offer.devices.get(i) {
        Some(device) => policy.energy.rate(&listing.offer.country, device),
        None => Rate::FREE,
    };
    Rate(policy.delay_rate.0.saturating_add(energy.0))
}

/// Each recent failure makes the work likelier to be done twice.
pub(super) fn failure_percent(failures: u32, policy: &Policy) -> u64 {
    100 + policy.failure_percent.min(1_000) * u64::from(failures.min(FAILURES_MAX))
}

/// Failures beyond this make no node dearer: it is far behind already.
pub(super) const FAILURES_MAX: u32 = 16;

/// Time that one reclaim throws away: half of what lies between two checkpoints, and the start elsewhere.
pub(super) fn lost(duration: Millis, policy: &Policy) -> Millis {
    Millis(duration.min(policy.checkpoint_interval).0.div_ceil(2)).saturating_add(policy.restart)
}

/// Work ÷ speed, plus what takes its time anywhere. At least a millisecond: work that seemed free on a priced
/// device would get a lease over no time at all.
pub(super) fn duration(request: &Request<'_>, speed_milli: u64) -> Millis {
    let speed = u128::from(speed_milli.max(1)) * u128::from(request.devices.milli());
    let units = (u128::from(request.units) * 1_000_000 * u128::from(WHOLE)).div_ceil(speed);
    Millis(saturate(units).saturating_add(request.fixed.0).max(1))
}

pub(super) fn transfer(missing: u64, policy: &Policy) -> Millis {
    Millis(saturate(
        (u128::from(missing) * 1_000).div_ceil(u128::from(policy.transfer_speed.0.max(1))),
    ))
}

fn saturate(n: u128) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}
