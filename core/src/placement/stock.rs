//! What is on the shelf: every device of every node, once for each kind of work it can do, in the classes of an
//! [`Index`].
//!
//! A class holds what is alike in everything that a request can rule out, and nearly alike in speed, failures and
//! reclaims. Its [`Signature`] is all that a request's masks need to see, and gives each request its cost there
//! ([`Stock::costs`]), a bound from below for all places of the class. Price and speed are in the sort key.
use super::{
    Policy, Request,
    index::{ClassId, Costs, Index, Level, SlotId},
    mask::{self, Face},
    quote,
};
use crate::{
    id::{Country, Institution},
    market::Listing,
    prelude::*,
    records::{NodeState, Offer, OwnerPolicy, Tier, WorkKind},
    unit::{Bytes, Millis, Rate, WHOLE},
};

/// The most classes. What would need another goes into one mixed class, where each place is judged by itself.
pub const CLASSES_MAX: usize = 16_384;

/// What all places of a class have in common.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Signature {
    /// The kind of work.
    pub kind: WorkKind,
    /// Class of device.
    pub device: String,
    /// Memory of one device.
    pub memory: Bytes,
    /// The smallest share that is lent; 0 for whole devices only.
    pub share_min: u32,
    /// Where.
    pub country: Country,
    /// Whose.
    pub institution: Institution,
    /// Priced at zero.
    pub donated: bool,
    /// Whom and what the owner serves.
    pub terms: OwnerPolicy,
    /// How far its workers are cut off.
    pub tier: Tier,
    /// Failures since the last success, up to three.
    failures: u8,
    /// Octave of its reclaims.
    hazard: u8,
    /// Quarter octave of its speed.
    speed: u16,
}

/// A place: one device class of one node, for one kind of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The market's handle of the node.
    pub node: u32,
    /// Which entry of the offer's devices.
    pub device: u8,
    /// For which kind of work.
    pub kind: WorkKind,
    /// The group whose shadow price it bears.
    pub group: u32,
}

/// What the slow path tells apart: capacity that is alike for every request, whatever it is used for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Group {
    /// Class of device.
    pub device: String,
    /// Memory of one device.
    pub memory: Bytes,
    /// The smallest share that is lent; 0 for whole devices only.
    pub share_min: u32,
    /// Where.
    pub country: Country,
    /// Whose.
    pub institution: Institution,
    /// Priced at zero.
    pub donated: bool,
    /// Whom and what the owner serves.
    pub terms: OwnerPolicy,
    /// How far its workers are cut off.
    pub tier: Tier,
}

/// What an owner's terms may exclude; who is first among its own is no such thing.
fn terms_of(offer: &Offer) -> OwnerPolicy {
    OwnerPolicy {
        local_first: false,
        ..offer.terms.clone()
    }
}

/// The most groups; later ones share the last, which never has a shadow price.
pub const GROUPS_MAX: usize = 8_192;

/// See the module's note.
#[derive(Debug, Clone, Default)]
pub struct Stock {
    index: Index,
    /// By class. `None` for the mixed class and for those that are vacant.
    signatures: Vec<Option<Signature>>,
    by_signature: BTreeMap<Signature, ClassId>,
    /// By class: the group its places belong to.
    class_groups: Vec<u32>,
    /// By class: devices of all its places, free or not.
    class_devices: Vec<u64>,
    vacant: Vec<ClassId>,
    mixed: Option<ClassId>,
    /// By slot.
    places: Vec<Option<Place>>,
    groups: BTreeMap<Group, u32>,
    /// By group: what an hour of one device is kept from.
    shadows: Vec<Rate>,
}

/// One place of a listing as it stands in the stock.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shelved {
    pub(crate) slot: SlotId,
    pub(crate) device: u8,
    /// How many of it there are.
    count: u32,
    kind: WorkKind,
    key: f32,
}

impl Stock {
    /// The index beneath.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// Where a slot is.
    pub fn place(&self, slot: SlotId) -> Option<Place> {
        self.places.get(slot.0 as usize).copied().flatten()
    }

    /// Every class in use with what it holds.
    pub fn classes(&self) -> impl Iterator<Item = (ClassId, &Signature)> {
        self.by_signature
            .iter()
            .map(|(signature, class)| (*class, signature))
    }

    /// What a class holds; `None` for the mixed one.
    pub fn signature(&self, class: ClassId) -> Option<&Signature> {
        self.signatures.get(class.0 as usize)?.as_ref()
    }

    /// Groups seen so far, with their numbers.
    pub fn groups(&self) -> impl Iterator<Item = (u32, &Group)> {
        self.groups.iter().map(|(group, id)| (*id, group))
    }

    /// The shadow price of a group.
    pub fn shadow(&self, group: u32) -> Rate {
        self.shadows.get(group as usize).copied().unwrap_or(Rate::FREE)
    }

    /// Sets all shadow prices; groups that are not named have none.
    pub(crate) fn set_shadows(&mut self, prices: impl IntoIterator<Item = (u32, Rate)>) {
        self.shadows.fill(Rate::FREE);
        for (group, rate) in prices {
            if let Some(shadow) = self.shadows.get_mut(group as usize) {
                *shadow = rate;
            }
        }
    }

    fn group_of(&mut self, listing: &Listing, device: usize) -> u32 {
        let (offer, d) = (&listing.offer, &listing.offer.devices[device]);
        let group = Group {
            device: d.class.clone(),
            memory: d.memory,
            share_min: d.share_min,
            country: offer.country,
            institution: offer.institution.clone(),
            donated: d.rate == Rate::FREE,
            terms: terms_of(offer),
            tier: Tier::of_offer(&offer.isolation),
        };
        if let Some(id) = self.groups.get(&group) {
            return *id;
        }
        if self.groups.len() >= GROUPS_MAX {
            return GROUPS_MAX as u32;
        }
        let id = self.groups.len() as u32;
        self.groups.insert(group, id);
        self.shadows.push(Rate::FREE);
        id
    }

    /// Brings the places of one node in step with its listing.
    pub(crate) fn shelve(&mut self, node: u32, listing: &mut Listing, policy: &Policy) {
        let mut old = core::mem::take(&mut listing.shelved);
        let mut new = Vec::with_capacity(old.len());
        let kinds: BTreeSet<WorkKind> = listing.offer.engines.iter().map(|e| e.work).collect();
        listing.groups.clear();
        for device in 0..listing.offer.devices.len().min(16) {
            let group = self.group_of(listing, device);
            listing.groups.push(group);
            for kind in &kinds {
                let Some((signature, key)) = describe(listing, device, *kind, policy) else {
                    continue;
                };
                let device = device as u8;
                let known = old.iter().position(|s| s.device == device && s.kind == *kind);
                let known = known.map(|at| old.swap_remove(at));
                let level = level_of(listing, device.into());
                let count = listing.offer.devices[usize::from(device)].count;
                if let Some(mut known) = known {
                    let class = self.index.class_of(known.slot);
                    if known.key == key && self.signature(class) == Some(&signature) {
                        self.index.set_level(known.slot, level);
                        let devices = &mut self.class_devices[class.0 as usize];
                        *devices = *devices - u64::from(known.count) + u64::from(count);
                        known.count = count;
                        new.push(known);
                        continue;
                    }
                    self.unshelve(&known);
                }
                let class = self.class_for(signature, group);
                let slot = self.index.insert(class, key, level);
                self.class_devices[class.0 as usize] += u64::from(count);
                if self.places.len() <= slot.0 as usize {
                    self.places.resize(slot.0 as usize + 1, None);
                }
                self.places[slot.0 as usize] = Some(Place {
                    node,
                    device,
                    kind: *kind,
                    group,
                });
                new.push(Shelved {
                    slot,
                    device,
                    count,
                    kind: *kind,
                    key,
                });
            }
        }
        for gone in old {
            self.unshelve(&gone);
        }
        listing.shelved = new;
    }

    /// Takes a node's places out.
    pub(crate) fn clear(&mut self, listing: &mut Listing) {
        for gone in core::mem::take(&mut listing.shelved) {
            self.unshelve(&gone);
        }
    }

    /// Only how much is free has changed.
    pub(crate) fn set_free(&mut self, listing: &Listing) {
        for shelved in &listing.shelved {
            self.index
                .set_level(shelved.slot, level_of(listing, shelved.device.into()));
        }
    }

    fn unshelve(&mut self, gone: &Shelved) {
        let slot = gone.slot;
        let class = self.index.class_of(slot);
        self.class_devices[class.0 as usize] -= u64::from(gone.count);
        self.index.remove(slot);
        self.places[slot.0 as usize] = None;
        if self.index.count(class).0 == 0
            && let Some(signature) = self.signatures[class.0 as usize].take()
        {
            self.by_signature.remove(&signature);
            self.vacant.push(class);
        }
    }

    fn class_for(&mut self, signature: Signature, group: u32) -> ClassId {
        if let Some(class) = self.by_signature.get(&signature) {
            return *class;
        }
        let class = match self.vacant.pop() {
            Some(class) => class,
            None if self.signatures.len() < CLASSES_MAX => self.new_class(),
            None => {
                return match self.mixed {
                    Some(class) => class,
                    None => {
                        let class = self.new_class();
                        self.mixed = Some(class);
                        class
                    }
                };
            }
        };
        self.signatures[class.0 as usize] = Some(signature.clone());
        self.class_groups[class.0 as usize] = group;
        self.by_signature.insert(signature, class);
        class
    }

    fn new_class(&mut self) -> ClassId {
        self.signatures.push(None);
        self.class_devices.push(0);
        self.class_groups.push(GROUPS_MAX as u32);
        self.index.add_class()
    }

    /// Each class that could run the request, as far as the class tells: how long it takes there, on how many places, and
    /// how many such parts all of them could hold at once.
    pub(crate) fn capacity(&self, request: &Request<'_>, policy: &Policy) -> Vec<(Millis, u32, u64)> {
        let able = self
            .classes()
            .filter(|(_, s)| s.kind == request.kind && admits(s, request, policy));
        able.map(|(class, s)| {
            let speed = speeds_of(s.speed).0 as u64;
            let devices = self.class_devices[class.0 as usize];
            let milli = u64::from(request.devices.milli());
            let seats = if request.devices.is_share() {
                devices.saturating_mul(u64::from(WHOLE) / milli)
            } else {
                devices * u64::from(WHOLE) / milli
            };
            (quote::duration(request, speed), self.index.count(class).0, seats)
        })
        .collect()
    }

    /// What the request costs at least on each class, as far as the class tells. `missing` is the time of fetching
    /// what no place of the walk has, in milliseconds.
    pub(crate) fn costs(
        &self,
        request: &Request<'_>,
        policy: &Policy,
        missing: u64,
        allowed: impl Fn(u32) -> bool,
    ) -> Costs {
        let units = request.units as f32 * 1e6;
        let devices = request.devices.milli() as f32 / WHOLE as f32;
        let fixed = request.fixed.0 as f32;
        let hour = 3_600_000f32;
        let patience = quote::waited_for(request, policy).0 as f32;
        let fetch = (policy.delay_rate.0 as f32 + patience) * missing as f32 / hour;
        Costs::weighted((0..self.signatures.len()).map(|i| {
            let class = ClassId(i as u32);
            let Some(s) = self.signature(class) else {
                // Anything may be in the mixed class; a vacant one holds nothing.
                let base = if self.mixed == Some(class) {
                    fetch
                } else {
                    f32::INFINITY
                };
                return (base, (units / hour).max(1e-9));
            };
            if s.kind != request.kind || !allowed(self.class_groups[i]) || !admits(s, request, policy) {
                return (f32::INFINITY, 1.0);
            }
            let (slowest, fastest) = speeds_of(s.speed);
            let shortest = units / (fastest * devices) + fixed;
            let lost = shortest.min(policy.checkpoint_interval.0 as f32) / 2.0 + policy.restart.0 as f32;
            let hazard = if s.hazard == 0 {
                0.0
            } else {
                (1u64 << (s.hazard - 1)) as f32
            };
            let risk = quote::failure_percent(s.failures.into(), policy) as f32 / 100.0
                * (1.0 + hazard * lost / quote::HAZARD_UNIT as f32);
            let wanted = (self.shadow(self.class_groups[i]).0 as f32 * devices + patience) * shortest / hour;
            let weight = (units + slowest * devices * fixed) / hour;
            ((fetch + wanted) * risk, (weight * risk).max(1e-9))
        }))
        .snug(request.devices.is_share())
    }
}

/// The masks that a class can answer for all its places.
fn admits(s: &Signature, request: &Request<'_>, policy: &Policy) -> bool {
    let c = request.constraints;
    let face = Face {
        country: &s.country,
        institution: &s.institution,
        terms: &s.terms,
        tier: s.tier,
    };
    mask::fails(face, request, policy).is_none()
        && s.device.starts_with(c.device.as_str())
        && request.runs_on(&s.device)
        && (!request.devices.is_share() || (s.share_min > 0 && request.devices.milli() >= s.share_min))
        && request.devices.memory_of_one(s.memory) >= request.memory.max(c.memory)
        && (s.donated || !(c.donated_only || c.rate_max == Some(Rate::FREE)))
}

fn level_of(listing: &Listing, device: usize) -> Level {
    if listing.connected && listing.offer.state == NodeState::Open {
        Level::of_milli(listing.room(device))
    } else {
        Level::NONE
    }
}

/// Class and key of one device for one kind of work: micro-credits per hour for a thousandth of a unit per second.
fn describe(listing: &Listing, device: usize, kind: WorkKind, policy: &Policy) -> Option<(Signature, f32)> {
    let offer = &listing.offer;
    let d = offer.devices.get(device)?;
    let speed = listing.speed(kind)?.0.max(1);
    let hazard = listing.hazard();
    let signature = Signature {
        kind,
        device: d.class.clone(),
        memory: d.memory,
        share_min: d.share_min,
        country: offer.country,
        institution: offer.institution.clone(),
        donated: d.rate == Rate::FREE,
        terms: terms_of(offer),
        tier: Tier::of_offer(&offer.isolation),
        failures: listing.failures.min(3) as u8,
        hazard: (u32::BITS - hazard.leading_zeros()) as u8,
        speed: octave_of(speed),
    };
    let rate = d.rate.0.saturating_add(quote::running(listing, device, policy).0);
    Some((signature, rate as f32 / speed as f32))
}

/// Quarter octaves: four even steps from each power of two to the next.
fn octave_of(speed: u64) -> u16 {
    let octave = speed.max(1).ilog2();
    let step = if octave >= 2 {
        speed >> (octave - 2)
    } else {
        speed << (2 - octave)
    };
    octave as u16 * 4 + (step & 3) as u16
}

/// From which to which speed such a step reaches.
fn speeds_of(step: u16) -> (f32, f32) {
    let unit = (1u64 << (step / 4).min(63)) as f32 / 4.0;
    let within = f32::from(step % 4);
    (unit * (4.0 + within), unit * (5.0 + within))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_speed_lies_within_its_step() {
        for speed in (1..5_000).chain([10_000, 1 << 30, 1_000_000_000_000]) {
            let (low, high) = speeds_of(octave_of(speed));
            let speed = speed as f32;
            assert!(
                low <= speed * 1.000_001 && speed <= high * 1.000_001,
                "{speed} in {low}..{high}"
            );
        }
    }
}
