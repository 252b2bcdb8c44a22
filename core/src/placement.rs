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
            format!("{} credits/h, about {} credits", Credits(c.rate.0), c.cost)
        };
        if self.feasible <= 1 {
            format!("the only free node that may run it ({price})")
        } else {
            format!("cheapest finished work of {} free nodes ({price})", self.feasible)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::market::tests::{market_of, node_of};

    /// What the words of a request set: `gpu<=9,in:KE,not:BR,of:uni-nairobi,mem:8,budget:10,donated,avoid:a`.
    struct Wish {
        constraints: Constraints,
        ceiling: Credits,
        avoid: Vec<NodeId>,
    }

    fn wish_of(text: &str) -> Wish {
        let mut words = text.split(',');
        let device = words.next().unwrap();
        let mut wish = Wish {
            constraints: Constraints::default(),
            ceiling: Credits(u64::MAX),
            avoid: Vec::new(),
        };
        let c = &mut wish.constraints;
        match device.split_once("<=") {
            Some((class, rate)) => {
                c.device = class.into();
                c.rate_max = Some(Rate(rate.parse::<u64>().unwrap() * 1_000_000));
            }
            None => c.device = device.into(),
        }
        for word in words {
            match word.split_once(':') {
                None => c.donated_only = word == "donated",
                Some(("in", code)) => c.countries.push(code.parse().unwrap()),
                Some(("not", code)) => c.countries_excluded.push(code.parse().unwrap()),
                Some(("of", name)) => c.institutions.push(name.parse().unwrap()),
                Some(("mem", gib)) => c.memory = Bytes(gib.parse::<u64>().unwrap() << 30),
                Some(("budget", credits)) => wish.ceiling = credits.parse().unwrap(),
                Some(("avoid", name)) => wish.avoid.push(node_of(name)),
                Some(other) => panic!("{other:?}"),
            }
        }
        wish
    }

    fn request_of(wish: &Wish) -> Request<'_> {
        Request {
            kind: WorkKind::Noop,
            // An hour on a device of usual speed.
            units: 3_600,
            fixed: Millis::ZERO,
            artifacts: Vec::new(),
            constraints: &wish.constraints,
            memory: Bytes::ZERO,
            ceiling: wish.ceiling,
            avoid: &wish.avoid,
        }
    }

    fn describe(got: &Result<Plan, Refusal>) -> String {
        match got {
            Ok(plan) => {
                let others: Vec<&str> = plan.alternatives.iter().map(|c| c.name.as_str()).collect();
                format!(
                    "{} of {}, then {}",
                    plan.chosen.name,
                    plan.feasible,
                    others.join(" ")
                )
                .trim_end_matches(", then ")
                .into()
            }
            Err(refusal) => format!("refused: {refusal}"),
        }
    }

    #[test]
    fn cheapest_fit_wins_and_a_refusal_says_what_would_fit() {
        for (name, market, wish, expected) in [
            ("one fits", "a:1gpu@5", "gpu<=9", "a of 1"),
            ("cheaper wins", "a:1gpu@5 b:1gpu@3", "gpu<=9", "b of 2, then a"),
            ("donated wins", "a:1gpu@1 b:1gpu@0", "gpu", "b of 2, then a"),
            (
                "cheap but slow loses",
                "a:1gpu@4 b:1gpu@8,fast",
                "gpu",
                "b of 2, then a",
            ),
            (
                "busy waits behind",
                "a:1gpu@1,busy b:1gpu@3",
                "gpu",
                "b of 1, then a",
            ),
            (
                "too dear",
                "a:1gpu@5 b:1gpu@7",
                "gpu<=4",
                "refused: none of 2 known nodes can run it: 2 excluded by price (the cheapest asks 5.000000 credits/h)",
            ),
            (
                "not donated",
                "a:1gpu@5",
                "gpu,donated",
                "refused: none of 1 known nodes can run it: 1 excluded by price (the cheapest asks 5.000000 credits/h)",
            ),
            (
                "another country",
                "a:1gpu@5,BR b:1gpu@5,VN c:1gpu@9,KE",
                "gpu,in:KE",
                "c of 1",
            ),
            (
                "no such country",
                "a:1gpu@5,BR b:1gpu@5,VN",
                "gpu,in:KE",
                "refused: none of 2 known nodes can run it: 2 excluded by country (nodes are in BR, VN)",
            ),
            (
                "excluded country",
                "a:1gpu@5,BR",
                "gpu,not:BR",
                "refused: none of 1 known nodes can run it: 1 excluded by country (nodes are in BR)",
            ),
            (
                "another institution",
                "a:1gpu@5,usp-brazil",
                "gpu,of:uni-nairobi",
                "refused: none of 1 known nodes can run it: 1 excluded by institution (nodes belong to usp-brazil)",
            ),
            (
                "another device",
                "a:1gpu@5",
                "tpu",
                "refused: none of 1 known nodes can run it: 1 excluded by device (nodes have gpu)",
            ),
            (
                "no engine",
                "a:1gpu@5,dumb",
                "gpu",
                "refused: none of 1 known nodes can run it: 1 excluded by engine",
            ),
            (
                "too little memory",
                "a:1gpu@5,4G b:1gpu@5,6G",
                "gpu,mem:8",
                "refused: none of 2 known nodes can run it: 2 excluded by memory (the nearest lacks 2048 MiB of device memory)",
            ),
            (
                "too small a budget",
                "a:1gpu@5 b:1gpu@6",
                "gpu,budget:4.5",
                "refused: none of 2 known nodes can run it: 2 excluded by budget (the cheapest would cost 5.000000 credits for this part: raise --max-cost)",
            ),
            (
                "each for its own reason",
                "a:1gpu@5,paused b:1gpu@5,gone c:1gpu@5 d:1gpu@5,busy",
                "gpu,avoid:c",
                "refused: none of 4 known nodes can run it: 1 excluded by open; 1 excluded by connected; 1 excluded by untried; 1 excluded by free device",
            ),
            (
                "nobody there",
                "",
                "gpu",
                "refused: no node is known to this scheduler yet: wait for one to join, or invite one",
            ),
        ] {
            let wish = wish_of(wish);
            let got = place(&market_of(market), &request_of(&wish), &Policy::default());
            assert_eq!(describe(&got), expected, "{name}");
        }
    }

    #[test]
    fn ties_go_to_the_less_loaded_then_to_the_lower_id() {
        let mut market = market_of("a:2gpu@5 b:2gpu@5");
        let (low, high) = if node_of("a") < node_of("b") {
            ("a", "b")
        } else {
            ("b", "a")
        };
        let wish = wish_of("gpu");
        let place = |m: &Market| {
            place(m, &request_of(&wish), &Policy::default())
                .unwrap()
                .chosen
                .name
        };
        assert_eq!(place(&market), low);
        market.take(&node_of(low), "gpu", 1);
        assert_eq!(place(&market), high);
    }

    #[test]
    fn failures_raise_the_price_and_success_forgives() {
        let mut market = market_of("a:1gpu@4 b:1gpu@5");
        let wish = wish_of("gpu");
        let place = |m: &Market| {
            place(m, &request_of(&wish), &Policy::default())
                .unwrap()
                .chosen
                .name
        };
        assert_eq!(place(&market), "a");
        market.note_failure(&node_of("a"));
        market.note_failure(&node_of("a"));
        assert_eq!(place(&market), "b");
        market.note_success(&node_of("a"), WorkKind::Noop, None);
        assert_eq!(place(&market), "a");
    }

    #[test]
    fn what_only_time_changes_is_told_apart() {
        for (market, wish, expected) in [
            ("a:1gpu@5,busy", "gpu", true),
            ("a:1gpu@5,paused", "gpu", true),
            ("a:1gpu@5,gone", "gpu", true),
            ("a:1gpu@5", "gpu,avoid:a", true),
            ("a:1gpu@5", "tpu", false),
            ("a:1gpu@5", "gpu<=4", false),
            ("", "gpu", false),
        ] {
            let wish = wish_of(wish);
            let refusal = place(&market_of(market), &request_of(&wish), &Policy::default()).unwrap_err();
            assert_eq!(refusal.passes_with_time(), expected, "{market}");
        }
    }

    #[test]
    fn work_that_takes_no_time_is_not_free_on_a_priced_device() {
        let wish = wish_of("gpu,budget:0");
        let request = Request {
            units: 0,
            ..request_of(&wish)
        };
        let got = place(&market_of("a:1gpu@5"), &request, &Policy::default());
        assert!(got.unwrap_err().excluded_by(Requirement::Budget));
        assert!(place(&market_of("a:1gpu@0"), &request, &Policy::default()).is_ok());
    }
}
