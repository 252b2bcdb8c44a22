//! Placement: choose a node for one part of a job from a frozen view of the market.
//!
//! Equal inputs give equal plans: time, policy and preferences are arguments.
//! Not here: hearing offers ([`crate::market`]), promising (the agent), paying (the ledger).
//! Start at [`place`]: a [`Plan`] comes out, or a [`Refusal`] that says why.
use crate::{
    id::{Country, Institution},
    key::NodeId,
    market::{Listing, Market},
    prelude::*,
    records::{Constraints, NodeState, WorkKind},
    unit::{Bytes, Credits, DeviceMillis, Millis, Rate},
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
}

/// The operator's constants of the cost of finished work.
#[derive(Debug, Clone)]
pub struct Policy {
    /// Assumed speed of fetching missing artifacts, bytes per second.
    pub transfer_speed: Bytes,
    /// What a second of a researcher's waiting is worth: breaks ties between prices, and makes free but endless machines lose.
    pub delay_rate: Rate,
    /// Each recent failure multiplies the expected cost by this many percent more.
    pub failure_percent: u64,
    /// How many alternatives a plan names.
    pub alternatives: usize,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            transfer_speed: Bytes(12_500_000),
            // A hundredth of a credit per hour: far under any real price.
            delay_rate: Rate(10_000),
            failure_percent: 25,
            alternatives: 4,
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
    /// The next best, cheapest first, busy ones included.
    pub alternatives: Vec<Candidate>,
    /// Nodes that could do it now.
    pub feasible: u32,
    /// Nodes known.
    pub known: u32,
}

impl Plan {
    /// One sentence: why there.
    pub fn why(&self) -> String {
        let c = &self.chosen;
        let price = if c.rate == Rate::FREE {
            "donated".to_string()
        } else {
            format!("{} credits/h", Credits(c.rate.0))
        };
        if self.feasible <= 1 {
            format!("the only free node that may run it ({price})")
        } else {
            format!(
                "cheapest finished work of {} free nodes ({price}, about {} credits)",
                self.feasible, c.cost
            )
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
    /// An engine for the kind of work.
    Engine,
    /// Class of device.
    Device,
    /// Memory of a device.
    Memory,
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
            Self::Engine => "engine",
            Self::Device => "device",
            Self::Memory => "memory",
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

/// The exact cheapest feasible node by cost of finished work; ties go to the less loaded, then to the lower id.
///
/// Cost of finished work = price × work ÷ measured speed, plus the worth of the time it takes (work and
/// transfer of what is missing), raised by recent failures. Masks exclude, they never weigh.
pub fn place(market: &Market, request: &Request<'_>, policy: &Policy) -> Result<Plan, Refusal> {
    let mut able: Vec<(Candidate, u32)> = Vec::new();
    let mut misses: BTreeMap<Requirement, Miss> = BTreeMap::new();
    for (node, listing) in market.iter() {
        match judge(node, listing, request, policy) {
            Ok(candidate) => {
                if candidate.busy {
                    misses.entry(Requirement::Free).or_default().nodes += 1;
                }
                able.push((candidate, listing.ours()));
            }
            Err((requirement, hint)) => misses.entry(requirement).or_default().add(hint),
        }
    }
    let known = u32::try_from(market.len()).unwrap_or(u32::MAX);
    let refusal = Refusal {
        known,
        exclusions: misses
            .into_iter()
            .map(|(requirement, miss)| Exclusion {
                requirement,
                nodes: miss.nodes,
                nearest: miss.nearest(requirement),
            })
            .collect(),
    };
    able.sort_by(|(a, load_a), (b, load_b)| {
        (a.busy, a.score, load_a, a.node).cmp(&(b.busy, b.score, load_b, b.node))
    });
    let feasible = able.iter().filter(|(c, _)| !c.busy).count();
    if feasible == 0 {
        return Err(refusal);
    }
    let chosen = able.remove(0).0;
    let mut alternatives: Vec<Candidate> = able.into_iter().map(|(c, _)| c).collect();
    alternatives.sort_by_key(|c| (c.score, c.node));
    alternatives.truncate(policy.alternatives);
    Ok(Plan {
        chosen,
        alternatives,
        feasible: u32::try_from(feasible).unwrap_or(u32::MAX),
        known,
    })
}

/// Every node that could run it were its devices free, cheapest first, and why the others could not: the very
/// same judgement as [`place`], for explaining and estimating.
pub fn survey(market: &Market, request: &Request<'_>, policy: &Policy) -> (Vec<Candidate>, Refusal) {
    let wide = Policy {
        alternatives: usize::MAX,
        ..policy.clone()
    };
    match place(market, request, &wide) {
        Ok(plan) => {
            let known = plan.known;
            let mut all = vec![plan.chosen];
            all.extend(plan.alternatives);
            (
                all,
                Refusal {
                    known,
                    exclusions: exclusions(market, request, policy),
                },
            )
        }
        Err(refusal) => {
            let mut busy: Vec<Candidate> = market
                .iter()
                .filter_map(|(node, listing)| judge(node, listing, request, policy).ok())
                .collect();
            busy.sort_by_key(|c| (c.score, c.node));
            (busy, refusal)
        }
    }
}

fn exclusions(market: &Market, request: &Request<'_>, policy: &Policy) -> Vec<Exclusion> {
    let mut misses: BTreeMap<Requirement, Miss> = BTreeMap::new();
    for (node, listing) in market.iter() {
        if let Err((requirement, hint)) = judge(node, listing, request, policy) {
            misses.entry(requirement).or_default().add(hint);
        }
    }
    misses
        .into_iter()
        .map(|(requirement, miss)| Exclusion {
            requirement,
            nodes: miss.nodes,
            nearest: miss.nearest(requirement),
        })
        .collect()
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

fn judge(
    node: &NodeId,
    listing: &Listing,
    request: &Request<'_>,
    policy: &Policy,
) -> Result<Candidate, (Requirement, Hint)> {
    let offer = &listing.offer;
    let c = request.constraints;
    if (!c.countries.is_empty() && !c.countries.contains(&offer.country))
        || c.countries_excluded.contains(&offer.country)
    {
        return Err((Requirement::Country, Hint::Name(offer.country.to_string())));
    }
    if (!c.institutions.is_empty() && !c.institutions.contains(&offer.institution))
        || c.institutions_excluded.contains(&offer.institution)
    {
        return Err((
            Requirement::Institution,
            Hint::Name(offer.institution.to_string()),
        ));
    }
    let Some(speed) = listing.speed(request.kind) else {
        return Err((Requirement::Engine, Hint::Nothing));
    };
    let classes = offer
        .devices
        .iter()
        .enumerate()
        .filter(|(_, d)| d.class.starts_with(c.device.as_str()));
    let duration = duration(request, speed.0);
    let missing: u64 = request
        .artifacts
        .iter()
        .filter(|(digest, _)| !offer.cached.contains(digest))
        .fold(0, |sum, (_, bytes)| sum.saturating_add(bytes.0));
    let transfer = Millis(missing.saturating_mul(1_000) / policy.transfer_speed.0.max(1));
    // The failing of the device that came furthest is the one worth telling.
    let mut furthest = (Requirement::Device, Hint::Name(classes_of(offer)));
    let mut best: Option<Candidate> = None;
    for (i, device) in classes {
        let miss = |requirement: Requirement, missed: u64, furthest: &mut (Requirement, Hint)| {
            let nearer = match (&furthest.1, requirement.cmp(&furthest.0)) {
                (_, core::cmp::Ordering::Greater) => true,
                (Hint::Number(known), core::cmp::Ordering::Equal) => missed < *known,
                _ => false,
            };
            if nearer {
                *furthest = (requirement, Hint::Number(missed));
            }
        };
        let memory = request.memory.max(c.memory);
        if device.memory < memory {
            miss(Requirement::Memory, memory.0 - device.memory.0, &mut furthest);
            continue;
        }
        let limit = if c.donated_only {
            Some(Rate::FREE)
        } else {
            c.rate_max
        };
        if limit.is_some_and(|limit| device.rate > limit) {
            miss(Requirement::Price, device.rate.0, &mut furthest);
            continue;
        }
        let cost = device
            .rate
            .bill(DeviceMillis(duration.0))
            .unwrap_or(Credits(u64::MAX));
        if cost > request.ceiling {
            miss(Requirement::Budget, cost.0, &mut furthest);
            continue;
        }
        let delay = DeviceMillis(duration.0.saturating_add(transfer.0));
        let waiting = policy.delay_rate.bill(delay).unwrap_or(Credits(u64::MAX));
        let risk = 100 + u128::from(policy.failure_percent) * u128::from(listing.failures);
        let score = u128::from(cost.saturating_add(waiting).0) * risk / 100;
        let candidate = Candidate {
            node: *node,
            name: offer.name.clone(),
            institution: offer.institution.clone(),
            country: offer.country,
            device_class: device.class.clone(),
            rate: device.rate,
            cost,
            score: Credits(u64::try_from(score).unwrap_or(u64::MAX)),
            duration,
            transfer,
            busy: listing.free(i) == 0,
        };
        if best
            .as_ref()
            .is_none_or(|b| (candidate.busy, candidate.score) < (b.busy, b.score))
        {
            best = Some(candidate);
        }
    }
    let Some(candidate) = best else {
        return Err(furthest);
    };
    if offer.state != NodeState::Open {
        return Err((Requirement::Open, Hint::Nothing));
    }
    if !listing.connected {
        return Err((Requirement::Connected, Hint::Nothing));
    }
    if request.avoid.contains(node) {
        return Err((Requirement::Untried, Hint::Nothing));
    }
    Ok(candidate)
}

fn classes_of(offer: &crate::records::Offer) -> String {
    offer
        .devices
        .iter()
        .map(|d| d.class.as_str())
        .collect::<Vec<_>>()
        .join("+")
}

/// Work ÷ speed, plus what takes its time anywhere.
fn duration(request: &Request<'_>, speed_milli: u64) -> Millis {
    let units = u128::from(request.units) * 1_000_000 / u128::from(speed_milli.max(1));
    // Nothing takes no time: work that seemed free on a priced device would get a lease over no time at all.
    Millis(
        u64::try_from(units)
            .unwrap_or(u64::MAX)
            .saturating_add(request.fixed.0)
            .max(1),
    )
}
