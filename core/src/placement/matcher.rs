//! From one request to the cheapest place, through the index.
use super::{
    Plan, Request, candidate,
    index::{ClassId, Costs, Found, Level, SlotId},
    mask,
    quote::{self, quote},
};
use crate::{id::Digest, market::Market, prelude::*, records::NodeState, unit::Millis};

/// An artifact that so few nodes hold is looked for where it is; one that more hold is assumed to be anywhere until
/// the very place is judged.
const HOLDERS_FEW: usize = 512;
/// Up to so many places are counted one by one.
const COUNT_MAX: u32 = 64;

/// What one request costs on every class. Made once for all parts of a job that differ only in what they avoid or
/// may cost; valid until a listing of the market is shelved anew.
#[derive(Debug, Clone)]
pub struct Matcher {
    costs: Costs,
    level: Level,
    /// Artifacts that few nodes hold: those nodes are judged apart.
    rare: Vec<Digest>,
}

impl Matcher {
    /// For requests of that shape: kind, work, artifacts, masks.
    pub fn new(market: &Market, request: &Request<'_>) -> Self {
        Self::within(market, request, |_| true)
    }

    /// The same, but only on the groups of the stock that `allowed` says.
    pub fn within(market: &Market, request: &Request<'_>, allowed: impl Fn(u32) -> bool) -> Self {
        let rare: Vec<Digest> = request
            .artifacts
            .iter()
            .map(|(digest, _)| *digest)
            .filter(|digest| market.holders(digest).len() <= HOLDERS_FEW)
            .collect();
        let missing = request
            .artifacts
            .iter()
            .filter(|(digest, _)| rare.contains(digest))
            .fold(0u64, |sum, (_, bytes)| sum.saturating_add(bytes.0));
        let missing = quote::transfer(missing, market.policy());
        Self {
            costs: market.stock().costs(request, market.policy(), missing.0, allowed),
            level: Level::of_milli(request.devices.milli()),
            rare,
        }
    }

    /// The cheapest place and the next best, or `None` when nothing that could do it is free.
    pub fn place(&self, market: &Market, request: &Request<'_>) -> Option<Plan> {
        let held = self.held(market, request);
        let chosen = self.cheapest(market, request, 1, &held).pop()?;
        let policy = market.policy();
        let mut few = self.cheapest(market, request, policy.alternatives + 1, &held);
        few.retain(|found| found.slot != chosen.slot);
        few.truncate(policy.alternatives);
        let describe = |found: &Found| {
            let place = market.stock().place(found.slot)?;
            let (node, listing) = market.at(place.node)?;
            let i = usize::from(place.device);
            let quote = quote(listing, i, market.stock().shadow(place.group), request, policy).ok()?;
            Some(candidate(node, listing, i, quote, request))
        };
        Some(Plan {
            chosen: describe(&chosen)?,
            alternatives: few.iter().filter_map(describe).collect(),
            feasible: self.feasible(market, request),
            known: u32::try_from(market.len()).unwrap_or(u32::MAX),
            warm: String::new(),
            advised: false,
        })
    }

    /// Places on nodes that hold a rare artifact, by exact score, and those nodes.
    fn held(&self, market: &Market, request: &Request<'_>) -> (Vec<Found>, BTreeSet<u32>) {
        let holders: BTreeSet<u32> = self
            .rare
            .iter()
            .flat_map(|digest| market.holders(digest))
            .collect();
        let mut found = Vec::new();
        for (_, listing) in holders.iter().filter_map(|handle| market.at(*handle)) {
            if !listing.connected || listing.offer.state != NodeState::Open {
                continue;
            }
            for shelved in &listing.shelved {
                if let Some(score) = self.judge(market, request, shelved.slot) {
                    let slot = shelved.slot;
                    found.push(Found { score, slot });
                }
            }
        }
        // Equals stay in the order they were found in.
        found.sort_by_key(|f| f.score);
        (found, holders)
    }

    /// The cheapest places, by exact score.
    fn cheapest(
        &self,
        market: &Market,
        request: &Request<'_>,
        many: usize,
        (held, holders): &(Vec<Found>, BTreeSet<u32>),
    ) -> Vec<Found> {
        let stock = market.stock();
        let mut found: Vec<Found> = held.iter().take(many).copied().collect();
        let exact = |slot: SlotId| {
            let place = stock.place(slot)?;
            if holders.contains(&place.node) {
                return None;
            }
            self.judge(market, request, slot)
        };
        stock
            .index()
            .cheapest(&self.costs, self.level, many, request.turn, exact, &mut found);
        found
    }

    /// The exact score of a place that is open, or `None` when it will not do.
    fn judge(&self, market: &Market, request: &Request<'_>, slot: SlotId) -> Option<u64> {
        let place = market.stock().place(slot)?;
        let (node, listing) = market.at(place.node)?;
        let i = usize::from(place.device);
        if place.kind != request.kind
            || !listing.has(i, request.devices)
            || request.avoid.contains(node)
            || mask::fails(mask::Face::of(&listing.offer), request, market.policy()).is_some()
        {
            return None;
        }
        let shadow = market.stock().shadow(place.group);
        quote(listing, i, shadow, request, market.policy())
            .ok()
            .map(|q| q.score.0)
    }

    /// By group: the score of its cheapest place that is free, and how long the work takes there. Holders of rare
    /// artifacts count like any other place.
    pub fn least(&self, market: &Market, request: &Request<'_>) -> BTreeMap<u32, (u64, Millis)> {
        let stock = market.stock();
        let mut least = BTreeMap::new();
        for class in (0..stock.index().classes() as u32).map(ClassId) {
            if !self.costs.allows(class) {
                continue;
            }
            let open = stock.index().places(class, self.level);
            let first = open
                .filter_map(|slot| Some((slot, self.judge(market, request, slot)?)))
                .next();
            let Some((place, score)) = first.and_then(|(slot, score)| Some((stock.place(slot)?, score)))
            else {
                continue;
            };
            let speed = market
                .at(place.node)
                .and_then(|(_, listing)| listing.speed(request.kind));
            let length = quote::duration(request, speed.map_or(1, |s| s.0));
            let known = least.entry(place.group).or_insert((score, length));
            if score < known.0 {
                *known = (score, length);
            }
        }
        least
    }

    /// Places that could do it: one by one while they are few, else by class.
    fn feasible(&self, market: &Market, request: &Request<'_>) -> u32 {
        let index = market.stock().index();
        let allowed = || {
            (0..index.classes() as u32)
                .map(ClassId)
                .filter(|class| self.costs.allows(*class))
        };
        let open: u32 = allowed().map(|class| index.count(class).1).sum();
        if open > COUNT_MAX {
            return open;
        }
        let able = allowed()
            .flat_map(|class| index.places(class, self.level))
            .filter(|slot| self.judge(market, request, *slot).is_some());
        able.count() as u32
    }
}
