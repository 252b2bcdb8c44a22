//! Placement: choose a node for one part of a job from a frozen view of the market.
//!
//! Equal inputs give equal plans: time, policy and preferences are arguments.
//! The answer is always the exact cheapest of all feasible nodes: [`place`] finds it through the market's index,
//! [`scan`] by looking at every node, with the same judgement ([`quote()`]).
//!
//! Not here: hearing offers ([`crate::market`]), promising (the agent), paying (the ledger).
//! Start at [`place`]: a [`Plan`] comes out, or a [`Refusal`] that says why.
pub mod deadline;
pub mod flow;
pub mod index;
mod mask;
mod matcher;
pub mod pack;
mod quote;
mod stock;
#[cfg(test)]
mod tests;

pub use index::ClassId;
pub use matcher::Matcher;
pub(crate) use quote::is_reliable;
pub use quote::{Energy, Grid, Lack, Quote, quote};
pub(crate) use stock::Shelved;
pub use stock::{CLASSES_MAX, GROUPS_MAX, Group, Place, Signature, Stock};

use crate::{
    id::{Country, Institution},
    key::NodeId,
    market::{Listing, Market},
    prelude::*,
    records::{Constraints, NodeState, WorkKind},
    unit::{Bytes, Credits, Millis, Portion, Rate},
};
use core::fmt;

/// What one part needs.
#[derive(Debug, Clone)]
pub struct Request<'a> {
    /// The kind of work.
    pub kind: WorkKind,
    /// Work units (tokens, items) the part is expected to take.
    pub units: u64,
    /// A fixed time the part takes on any machine, besides its units.
    pub fixed: Millis,
    /// The model it needs: not every device can run every one.
    pub model: Option<crate::artifact::ArtifactRef>,
    /// Artifacts it needs, with their sizes.
    pub artifacts: Vec<(crate::id::Digest, Bytes)>,
    /// The user's masks.
    pub constraints: &'a Constraints,
    /// Memory the worker needs on a device.
    pub memory: Bytes,
    /// What the part may cost at most.
    pub ceiling: Credits,
    /// Nodes that failed at this very part.
    pub avoid: &'a [NodeId],
    /// Devices of one class on one node that it takes all at once, or a share of one.
    pub devices: Portion,
    /// Any number, as different as can be from one request to the next: equals take turns by it.
    pub turn: u32,
    /// Whose work it is, for owners who do not serve everybody.
    pub user: Option<&'a Institution>,
    /// It must be over within so long, transfer included.
    pub within: Option<Millis>,
    /// Only where hardly any work is lost: no recent failure, and a reclaim of less than [`RISK_PERCENT`].
    pub reliable: bool,
    /// Somebody waits for it: an hour of that is worth [`Policy::question_rate`].
    pub waited_for: bool,
}

/// Nothing is asked for: what a request begins with.
impl Default for Request<'_> {
    fn default() -> Self {
        static ANY: Constraints = Constraints::ANY;
        Self {
            kind: WorkKind::Noop,
            units: 0,
            fixed: Millis::ZERO,
            artifacts: Vec::new(),
            constraints: &ANY,
            memory: Bytes::ZERO,
            ceiling: Credits(u64::MAX),
            avoid: &[],
            devices: Portion::ONE,
            turn: 0,
            user: None,
            within: None,
            reliable: false,
            waited_for: false,
            model: None,
        }
    }
}

impl Request<'_> {
    /// Whether devices of that class can run its model. Work without one needs no server.
    pub(crate) fn runs_on(&self, device_class: &str) -> bool {
        match &self.model {
            Some(model) => model.runs_on(device_class),
            None => !device_class.starts_with(crate::artifact::SERVER_CLASS),
        }
    }
}

/// A place is reliable where its owner is expected to take it back during the work with less than this probability.
pub const RISK_PERCENT: u64 = 2;

/// The operator's constants of the cost of finished work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Assumed speed of fetching missing artifacts, bytes per second.
    pub transfer_speed: Bytes,
    /// What a second of a researcher's waiting is worth: breaks ties between prices, and makes free but endless machines lose.
    pub delay_rate: Rate,
    /// The same for a question, whose answer somebody sits and waits for: what a faster machine may cost more.
    pub question_rate: Rate,
    /// Each recent failure multiplies the expected cost by this many percent more.
    pub failure_percent: u64,
    /// How many alternatives a plan names.
    pub alternatives: usize,
    /// Time between two checkpoints: half of it is lost when an owner takes a machine back.
    pub checkpoint_interval: Millis,
    /// Time to start again elsewhere.
    pub restart: Millis,
    /// What power costs and weighs.
    pub energy: Energy,
}

/// What an hour of waiting for an answer is worth: a tenth of a credit, about what the cheapest GPUs of marketplaces
/// ask. `llm_route` of the benchmarks shows what it does to costs and waits.
pub const QUESTION_RATE: Rate = Rate(100_000);

impl Default for Policy {
    fn default() -> Self {
        Self {
            transfer_speed: Bytes(12_500_000),
            // A hundredth of a credit per hour: far under any real price.
            delay_rate: Rate(10_000),
            question_rate: QUESTION_RATE,
            failure_percent: 25,
            alternatives: 4,
            checkpoint_interval: Millis(600_000),
            restart: Millis(30_000),
            energy: Energy::default(),
        }
    }
}

/// A node that could do it, and what finished work would cost there.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Candidate {
    /// Which node.
    pub node: NodeId,
    /// Its name.
    pub name: String,
    /// Whose it is.
    pub institution: Institution,
    /// Where it stands.
    pub country: Country,
    /// On which class of device.
    pub device_class: String,
    /// At what price.
    pub rate: Rate,
    /// Expected bill.
    pub cost: Credits,
    /// Expected bill plus delay and risk: what is compared.
    pub score: Credits,
    /// Expected time of the work itself.
    pub duration: Millis,
    /// Expected time of fetching what is missing.
    pub transfer: Millis,
    /// It could, but all its devices are held now.
    pub busy: bool,
}

/// Where a part goes.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Plan {
    /// The cheapest feasible node.
    pub chosen: Candidate,
    /// The next best that are free, cheapest first.
    pub alternatives: Vec<Candidate>,
    /// Places that could do it now: exact while they are few, else those whose class passes.
    pub feasible: u32,
    /// Nodes known.
    pub known: u32,
    /// What its being warm, or not knowing about that, had to do with it; empty for nothing.
    #[serde(default)]
    pub warm: String,
    /// The slow path advised that kind of capacity where a cheaper one was free: that is kept for other work.
    #[serde(default)]
    pub advised: bool,
}

impl Plan {
    /// One sentence: why there.
    pub fn why(&self) -> String {
        let c = &self.chosen;
        let price = if c.rate == Rate::FREE {
            "donated".to_string()
        } else {
            format!("{} credits/h, about {} credits", Credits(c.rate.0), c.cost)
        };
        let why = if self.advised {
            format!(
                "one of the free nodes that may run it ({price}); scarcer capacity is kept for other work, waiting or expected"
            )
        } else if self.feasible <= 1 {
            format!("the only free node that may run it ({price})")
        } else {
            format!("cheapest finished work of {} free nodes ({price})", self.feasible)
        };
        match self.warm.as_str() {
            "" => why,
            warm => format!("{why}; {warm}"),
        }
    }
}

/// A requirement a node can fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Requirement {
    /// Allowed countries.
    Country,
    /// Allowed institutions.
    Institution,
    /// Power that is clean enough.
    Carbon,
    /// The owner serves such users and does such work.
    Owner,
    /// The owner takes data of that class.
    Data,
    /// The owner runs models under that licence.
    Licence,
    /// Workers are cut off far enough.
    Isolation,
    /// An engine for the kind of work.
    Engine,
    /// Class of device.
    Device,
    /// Memory of a device.
    Memory,
    /// So many devices on one node.
    Count,
    /// The owner lends such shares of a device.
    Share,
    /// An end within ten years.
    Duration,
    /// An end before the deadline.
    Deadline,
    /// Hardly any danger of losing the work, where there is no time to do it twice.
    Reliable,
    /// Price limit or donated only.
    Price,
    /// The job's ceiling covers the part.
    Budget,
    /// The owner lends.
    Open,
    /// A session stands.
    Connected,
    /// It has not just failed at this part.
    Untried,
    /// A device is free.
    Free,
}

impl fmt::Display for Requirement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Country => "country",
            Self::Institution => "institution",
            Self::Carbon => "carbon",
            Self::Owner => "owner",
            Self::Data => "data class",
            Self::Licence => "licence",
            Self::Isolation => "isolation",
            Self::Engine => "engine",
            Self::Device => "device",
            Self::Memory => "memory",
            Self::Count => "number of devices",
            Self::Share => "share of a device",
            Self::Duration => "duration",
            Self::Deadline => "deadline",
            Self::Reliable => "reliability",
            Self::Price => "price",
            Self::Budget => "budget",
            Self::Open => "open",
            Self::Connected => "connected",
            Self::Untried => "untried",
            Self::Free => "free device",
        })
    }
}

/// How many nodes one requirement excluded, and the nearest change that would have kept one of them.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Exclusion {
    /// Which requirement.
    pub requirement: Requirement,
    /// Nodes that failed it first.
    pub nodes: u32,
    /// The nearest change that would fit; empty when only time helps.
    pub nearest: String,
}

/// Why no node can take the part now.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Refusal {
    /// Nodes known.
    pub known: u32,
    /// In the order the requirements are checked; every known node is counted once.
    pub exclusions: Vec<Exclusion>,
}

impl Refusal {
    /// Waiting may help: some node failed only what time changes (no free device, no session, paused).
    pub fn passes_with_time(&self) -> bool {
        use Requirement::{Connected, Free, Open, Untried};
        self.exclusions
            .iter()
            .any(|e| matches!(e.requirement, Free | Connected | Open | Untried))
    }
}

impl Refusal {
    /// Some node failed that requirement first.
    pub fn excluded_by(&self, requirement: Requirement) -> bool {
        self.exclusions.iter().any(|e| e.requirement == requirement)
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.known == 0 {
            return f
                .write_str("no node is known to this scheduler yet: wait for one to join, or invite one");
        }
        write!(f, "none of {} known nodes can run it:", self.known)?;
        for (i, e) in self.exclusions.iter().enumerate() {
            let comma = if i == 0 { "" } else { ";" };
            write!(f, "{comma} {} excluded by {}", e.nodes, e.requirement)?;
            if !e.nearest.is_empty() {
                write!(f, " ({})", e.nearest)?;
            }
        }
        Ok(())
    }
}

impl core::error::Error for Refusal {}

/// The exact cheapest feasible node by cost of finished work.
///
/// Cost of finished work = price × work ÷ measured speed, plus the worth of the time it takes (work, and transfer of
/// what is missing), what better use the device is kept from, and power where it has a price; raised by recent
/// failures and by how often owners there take machines back. Masks exclude, they never weigh. Between equals the
/// most free wins, then they take turns.
pub fn place(market: &Market, request: &Request<'_>, policy: &Policy) -> Result<Plan, Refusal> {
    if policy != market.policy() {
        // The index is sorted by other costs than these.
        return scan(market, request, policy);
    }
    Matcher::new(market, request)
        .place(market, request)
        .ok_or_else(|| refuse(market, request, policy))
}

/// As [`place`], by looking at every node: what the index is held against, and the way when policies differ.
pub fn scan(market: &Market, request: &Request<'_>, policy: &Policy) -> Result<Plan, Refusal> {
    let (mut able, refusal) = survey(market, request, policy);
    able.retain(|c| !c.busy);
    let feasible = u32::try_from(able.len()).unwrap_or(u32::MAX);
    if able.is_empty() {
        return Err(refusal);
    }
    let chosen = able.remove(0);
    able.truncate(policy.alternatives);
    Ok(Plan {
        chosen,
        alternatives: able,
        feasible,
        known: refusal.known,
        warm: String::new(),
        advised: false,
    })
}

/// Why nothing can take the part now, node by node.
pub fn refuse(market: &Market, request: &Request<'_>, policy: &Policy) -> Refusal {
    survey(market, request, policy).1
}

/// Every node that could run it were its devices free, cheapest first, and why the others could not: the very
/// same judgement as [`place`], for explaining and estimating.
pub fn survey(market: &Market, request: &Request<'_>, policy: &Policy) -> (Vec<Candidate>, Refusal) {
    look_over(market, |node, listing| {
        judge(market, node, listing, request, policy).map(|best| vec![best])
    })
}

/// As [`survey`], with every class of devices of every node that could run it: what runs all at once may use several.
pub fn survey_classes(market: &Market, request: &Request<'_>, policy: &Policy) -> (Vec<Candidate>, Refusal) {
    look_over(market, |node, listing| {
        judge_classes(market, node, listing, request, policy)
    })
}

fn look_over(
    market: &Market,
    judge: impl Fn(&NodeId, &Listing) -> Result<Vec<Candidate>, (Requirement, Hint)>,
) -> (Vec<Candidate>, Refusal) {
    let mut able: Vec<(Candidate, u32)> = Vec::new();
    let mut misses: BTreeMap<Requirement, Miss> = BTreeMap::new();
    for (node, listing) in market.iter() {
        match judge(node, listing) {
            Ok(candidates) => {
                if candidates.iter().all(|candidate| candidate.busy) {
                    misses.entry(Requirement::Free).or_default().nodes += 1;
                }
                able.extend(
                    candidates
                        .into_iter()
                        .map(|candidate| (candidate, listing.ours())),
                );
            }
            Err((requirement, hint)) => misses.entry(requirement).or_default().add(hint),
        }
    }
    able.sort_by(|(a, load_a), (b, load_b)| (a.score, load_a, a.node).cmp(&(b.score, load_b, b.node)));
    let refusal = Refusal {
        known: u32::try_from(market.len()).unwrap_or(u32::MAX),
        exclusions: misses
            .into_iter()
            .map(|(requirement, miss)| Exclusion {
                requirement,
                nodes: miss.nodes,
                nearest: miss.nearest(requirement),
            })
            .collect(),
    };
    (able.into_iter().map(|(c, _)| c).collect(), refusal)
}

/// The judgement of one node, if it could run the request were its devices free.
pub(crate) fn candidate_at(
    market: &Market,
    node: &NodeId,
    request: &Request<'_>,
    policy: &Policy,
) -> Option<Candidate> {
    judge(market, node, market.get(node)?, request, policy).ok()
}

/// What a node that failed a requirement would have needed.
enum Hint {
    Nothing,
    Number(u64),
    Name(String),
}

#[derive(Default)]
struct Miss {
    nodes: u32,
    number: Option<u64>,
    names: BTreeSet<String>,
}

impl Miss {
    fn add(&mut self, hint: Hint) {
        self.nodes += 1;
        match hint {
            Hint::Nothing => {}
            Hint::Number(n) => self.number = Some(self.number.map_or(n, |known| known.min(n))),
            // A handful of names is a hint; all of them would be a directory.
            Hint::Name(name) => {
                if self.names.len() < 8 {
                    self.names.insert(name);
                }
            }
        }
    }

    fn nearest(&self, requirement: Requirement) -> String {
        let names = self
            .names
            .iter()
            .map(String::as_str)
            .collect::<Vec<_>>()
            .join(", ");
        match (requirement, self.number) {
            (Requirement::Country, _) => format!("nodes are in {names}"),
            (Requirement::Institution, _) => format!("nodes belong to {names}"),
            (Requirement::Device, _) => format!("nodes have {names}"),
            (Requirement::Memory, Some(most)) => {
                format!(
                    "the nearest lacks {} MiB of device memory",
                    most.div_ceil(1 << 20)
                )
            }
            (Requirement::Carbon, _) => format!("nodes are in {names}"),
            (Requirement::Owner, _) => names,
            (Requirement::Data, _) => format!("nodes take data up to {names}"),
            (Requirement::Licence, _) => format!("nodes run models under {names}"),
            (Requirement::Isolation, _) => format!("nodes have {names}"),
            (Requirement::Deadline, Some(late)) => {
                format!("the nearest would end {} s late", late.div_ceil(1_000))
            }
            (Requirement::Count, Some(fewest)) => format!("the nearest has {fewest} too few"),
            (Requirement::Share, Some(least)) => match Portion::of(0, least as u32) {
                Some(least) => format!("the smallest share lent is {least} of a device"),
                None => "devices are lent whole".to_string(),
            },
            (Requirement::Duration, Some(fastest)) => {
                format!("the fastest would take {} days", fastest / 86_400_000)
            }
            (Requirement::Price, Some(0)) => "the nearest is donated".to_string(),
            (Requirement::Price, Some(rate)) => format!("the cheapest asks {} credits/h", Credits(rate)),
            (Requirement::Budget, Some(cost)) => {
                format!(
                    "the cheapest would cost {} credits for this part: raise --max-cost",
                    Credits(cost)
                )
            }
            _ => String::new(),
        }
    }
}

/// Judges a node by the best of its devices: a free one before a busy one, then the cheapest, then the first listed.
fn judge(
    market: &Market,
    node: &NodeId,
    listing: &Listing,
    request: &Request<'_>,
    policy: &Policy,
) -> Result<Candidate, (Requirement, Hint)> {
    let able = judge_classes(market, node, listing, request, policy)?;
    let best = able.into_iter().min_by_key(|c| (c.busy, c.score));
    best.ok_or((Requirement::Device, Hint::Nothing))
}

/// Judges a node by each class of its devices: those that could run the request, at least one.
fn judge_classes(
    market: &Market,
    node: &NodeId,
    listing: &Listing,
    request: &Request<'_>,
    policy: &Policy,
) -> Result<Vec<Candidate>, (Requirement, Hint)> {
    let offer = &listing.offer;
    if let Some(failed) = mask::fails(mask::Face::of(offer), request, policy) {
        return Err((failed, mask::hint(offer, request, failed)));
    }
    if listing.speed(request.kind).is_none() {
        return Err((Requirement::Engine, Hint::Nothing));
    }
    // The failing of the device that came furthest is the one worth telling.
    let mut furthest = (Requirement::Device, Hint::Name(classes_of(offer)));
    let mut able = Vec::new();
    for i in 0..offer.devices.len() {
        match quote(listing, i, market.shadow(listing, i), request, policy) {
            Ok(quote) => able.push(candidate(node, listing, i, quote, request)),
            Err(lack) => {
                let nearer = match (&furthest.1, lack.requirement.cmp(&furthest.0)) {
                    (_, core::cmp::Ordering::Greater) => true,
                    (Hint::Number(known), core::cmp::Ordering::Equal) => lack.missed < *known,
                    _ => false,
                };
                if nearer {
                    furthest = (lack.requirement, Hint::Number(lack.missed));
                }
            }
        }
    }
    if able.is_empty() {
        return Err(furthest);
    }
    if offer.state != NodeState::Open {
        return Err((Requirement::Open, Hint::Nothing));
    }
    if !listing.connected {
        return Err((Requirement::Connected, Hint::Nothing));
    }
    if request.avoid.contains(node) {
        return Err((Requirement::Untried, Hint::Nothing));
    }
    Ok(able)
}

fn candidate(node: &NodeId, listing: &Listing, i: usize, quote: Quote, request: &Request<'_>) -> Candidate {
    let offer = &listing.offer;
    let (class, rate) = offer
        .devices
        .get(i)
        .map(|d| (d.class.clone(), d.rate))
        .unwrap_or_default();
    Candidate {
        node: *node,
        name: offer.name.clone(),
        institution: offer.institution.clone(),
        country: offer.country,
        device_class: class,
        rate,
        cost: quote.cost,
        score: quote.score,
        duration: quote.duration,
        transfer: quote.transfer,
        busy: !listing.has(i, request.devices),
    }
}

fn classes_of(offer: &crate::records::Offer) -> String {
    offer
        .devices
        .iter()
        .map(|d| d.class.as_str())
        .collect::<Vec<_>>()
        .join("+")
}
