//! The slow path: a few times a second, what is queued is held against all that is free, and a flow says which kind
//! of work should go to which kind of capacity ([`crate::placement::flow`]).
//!
//! Cheapest-first alone gives scarce capacity to work that could run anywhere. The flow's quotas keep it for what can
//! run nowhere else, and its prices tell everybody else what they would keep it from. Nothing here decides alone: a
//! quota is where a part is tried first, and exact placement chooses the node.
use super::mind::Controller;
use super::placing::request;
use crate::{
    id::{Digest, JobId},
    placement::{
        Matcher,
        flow::{self, FORBIDDEN, Problem},
    },
    prelude::*,
    records::{NodeState, Order, OwnerPolicy},
    unit::{Millis, Now, Rate},
};

/// Between two solutions.
const GAP: Millis = Millis(500);
/// The deadline, in steps of the solver: about fifty milliseconds for the largest problem. On a miss the last
/// advice stays.
const STEPS_MAX: u32 = 20_000;
/// The most kinds of work and of capacity in one problem; what is beyond is placed without advice.
const SHAPES_MAX: usize = 700;
const GROUPS_MAX: usize = 700;

/// What the slow path advises.
#[derive(Debug, Clone, Default)]
pub(super) struct Guide {
    /// By shape of work: how many parts should go to which group of the stock.
    pub(super) quotas: BTreeMap<Digest, BTreeMap<u32, u64>>,
    /// Shapes tell users apart.
    pub(super) by_user: bool,
}

/// What orders share that can run on the same capacity: kind, masks and memory; and whose they are, where some owners
/// do not serve everybody.
pub(super) fn shape_of(order: &Order, by_user: bool) -> Digest {
    let (kind, c) = (order.work.kind().as_str(), &order.constraints);
    let memory = order.work.model().map_or(0, |m| m.bytes.0);
    let mut text = format!(
        "{kind} {} {} {:?} {memory} {} {} {} {} {}",
        c.device,
        c.memory.0,
        c.rate_max,
        c.donated_only,
        c.isolation,
        c.data,
        c.licence.escape_debug(),
        c.devices(),
    );
    if by_user {
        text.push_str(&format!(" of {}", order.institution));
    }
    if let Some(served) = order.work.model().filter(|m| !m.is_content()) {
        text.push_str(&served.digest.to_string());
    }
    for code in c
        .countries
        .iter()
        .map(|c| ('+', c))
        .chain(c.countries_excluded.iter().map(|c| ('-', c)))
    {
        text.push_str(&format!(" {}{}", code.0, code.1));
    }
    for name in c
        .institutions
        .iter()
        .map(|n| ('+', n))
        .chain(c.institutions_excluded.iter().map(|n| ('-', n)))
    {
        text.push_str(&format!(" {}{}", name.0, name.1));
    }
    Digest::of(text.as_bytes())
}

struct Shape {
    /// One that stands for all.
    job: JobId,
    parts: u64,
}

impl Controller {
    /// Asks the slow path when it is time and more than one kind of work waits; else what it said stays.
    pub(super) fn consult(&mut self, now: Now) {
        if now.mono < self.guide_at {
            return;
        }
        self.guide_at = now.mono.after(GAP);
        let picky =
            |terms: &OwnerPolicy| !(terms.institutions.is_empty() && terms.institutions_excluded.is_empty());
        let by_user = self.market.stock().groups().any(|(_, group)| picky(&group.terms));
        let mut shapes: BTreeMap<Digest, Shape> = BTreeMap::new();
        for (_, id) in &self.queue {
            let Some(job) = self.jobs.get(id) else { continue };
            let parts = job
                .parts
                .iter()
                .filter(|p| p.state == super::JobState::Queued)
                .count() as u64;
            let key = shape_of(&job.order, by_user);
            if shapes.len() < SHAPES_MAX || shapes.contains_key(&key) {
                shapes.entry(key).or_insert(Shape { job: *id, parts: 0 }).parts += parts;
            }
        }
        if shapes.len() < 2 {
            // One kind of work keeps nothing from anybody.
            self.guide = None;
            self.market.set_shadows([]);
            return;
        }
        let columns = self.columns();
        let Some((problem, hours)) = self.problem(&shapes, &columns) else {
            return;
        };
        let Some(solution) = flow::solve(&problem, STEPS_MAX) else {
            return;
        };
        let mut guide = Guide {
            by_user,
            ..Guide::default()
        };
        let keys: Vec<&Digest> = shapes.keys().collect();
        for (row, column, units) in &solution.flow {
            let quota = guide.quotas.entry(*keys[*row as usize]).or_default();
            *quota.entry(columns[*column as usize].group).or_insert(0) += units;
        }
        // The least of a group's tiers is what its next device is wanted for.
        let mut prices: BTreeMap<u32, u64> = BTreeMap::new();
        for (column, price) in columns.iter().zip(&solution.prices) {
            let rate = (*price as f64 / hours) as u64;
            prices
                .entry(column.group)
                .and_modify(|p| *p = (*p).min(rate))
                .or_insert(rate);
        }
        let scarce = prices.values().any(|p| *p > 0);
        self.market
            .set_shadows(prices.into_iter().map(|(group, rate)| (group, Rate(rate))));
        self.guide = scarce.then_some(guide);
    }

    /// Free devices by group and step of price.
    fn columns(&self) -> Vec<Column> {
        let mut by_group: BTreeMap<u32, Vec<(u64, u64)>> = BTreeMap::new();
        for (_, listing) in self.market.iter() {
            if !listing.connected || listing.offer.state != NodeState::Open {
                continue;
            }
            for (i, device) in listing.offer.devices.iter().enumerate() {
                let free = listing.free(i);
                if let Some(group) = listing.groups.get(i)
                    && free > 0
                    && (by_group.len() < GROUPS_MAX || by_group.contains_key(group))
                {
                    let list = by_group.entry(*group).or_default();
                    list.push((device.rate.0, free.into()));
                }
            }
        }
        let mut columns = Vec::new();
        let tiers = flow::tiers(by_group.len());
        for (group, devices) in by_group {
            let least = devices.iter().map(|(rate, _)| *rate).min().unwrap_or(0);
            for (mean, free) in flow::by_price(devices, tiers) {
                columns.push(Column {
                    group,
                    free,
                    above: mean - least,
                });
            }
        }
        columns
    }

    /// What waits against what is free, and how long a part takes on the average, in hours.
    fn problem(&self, shapes: &BTreeMap<Digest, Shape>, columns: &[Column]) -> Option<(Problem, f64)> {
        let mut problem = Problem {
            supply: columns.iter().map(|c| c.free).collect(),
            ..Problem::default()
        };
        let (mut hours, mut parts) = (0.0, 0.0);
        for shape in shapes.values() {
            let job = self.jobs.get(&shape.job)?;
            let part = job.parts.iter().find(|p| p.state == super::JobState::Queued)?;
            let request = request(&job.order, part.items, part.ceiling, &[]);
            let least = Matcher::new(&self.market, &request).least(&self.market, &request);
            let mut dearest = 0;
            for column in columns {
                let cost = least.get(&column.group).map_or(FORBIDDEN, |(cost, length)| {
                    let above = u128::from(column.above) * u128::from(length.0) / 3_600_000;
                    hours += length.0 as f64 / 3_600_000.0 * shape.parts as f64;
                    parts += shape.parts as f64;
                    let cost = i64::try_from(u128::from(*cost) + above).unwrap_or(i64::MAX / 2);
                    dearest = dearest.max(cost);
                    cost
                });
                problem.cost.push(cost);
            }
            problem.demand.push(shape.parts);
            // Waiting is dearer than the dearest place: work is never left out to save money.
            problem
                .unserved
                .push(dearest.saturating_mul(4).saturating_add(1_000));
        }
        Some((
            problem,
            if parts > 0.0 {
                (hours / parts).max(1e-6)
            } else {
                1.0
            },
        ))
    }
}

/// Capacity that is alike, and how many devices of it are free.
struct Column {
    group: u32,
    free: u64,
    /// How far its price lies above the group's lowest, per hour.
    above: u64,
}
