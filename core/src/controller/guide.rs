//! The slow path: a few times a second, what is queued and what is likely to come is held against what is free or soon
//! will be, and a flow says which kind of work should go to which kind of capacity ([`crate::placement::flow`]).
//!
//! Cheapest-first alone gives scarce capacity to work that could run anywhere. The flow's quotas keep it for what can
//! run nowhere else, and its prices tell everybody else what they would keep it from. Nothing here decides alone: a
//! quota is where a part is tried first, and exact placement chooses the node.
use super::{
    JobState,
    forecast::WINDOW,
    mind::{Controller, JUDGEMENTS_PER_MS},
    placing::request,
};
use crate::{
    id::Digest,
    placement::{
        self, Matcher,
        flow::{self, FORBIDDEN, Problem},
    },
    prelude::*,
    records::{NodeState, Order, OwnerPolicy},
    unit::{Credits, Millis, Now, Rate, WHOLE},
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

/// What waits of one kind of work, and what is likely to come; by a part that stands for all.
struct Shape<'a> {
    order: &'a Order,
    items: u64,
    ceiling: Credits,
    /// Parts that wait, and parts that are expected.
    waiting: u64,
    expected: u64,
}

impl Shape<'_> {
    /// Thousandths of devices that each of its parts takes.
    fn milli(&self) -> u64 {
        self.order.constraints.devices().milli().into()
    }
}

impl Controller {
    /// Asks the slow path when it is time and more than one kind of work waits or is likely to come; else what it said
    /// stays.
    pub(super) fn consult(&mut self, now: Now) {
        if now.mono < self.guide_at || self.queue.is_empty() {
            return;
        }
        let picky =
            |terms: &OwnerPolicy| !(terms.institutions.is_empty() && terms.institutions_excluded.is_empty());
        let by_user = self.market.stock().groups().any(|(_, group)| picky(&group.terms));
        let shapes = self.shapes(now, by_user);
        // Half a second, or twenty times as long as finding out what each kind costs where takes.
        let judged = (shapes.len() * self.market.stock().index().classes()) as u64;
        let gap = GAP.max(Millis(judged / JUDGEMENTS_PER_MS * 20));
        if shapes.len() < 2 {
            // One kind of work keeps nothing from anybody.
            self.guide_at = now.mono.after(gap);
            self.guide = None;
            self.market.set_shadows([]);
            return;
        }
        let columns = self.columns(now);
        let advice = self.advise(by_user, &shapes, &columns);
        self.guide_at = now.mono.after(gap);
        self.judged += judged;
        let Some((guide, prices)) = advice else {
            return;
        };
        let scarce = prices.values().any(|price| *price > 0);
        self.market
            .set_shadows(prices.into_iter().map(|(group, rate)| (group, Rate(rate))));
        self.guide = scarce.then_some(guide);
    }

    /// What waits and what is expected, by kind.
    fn shapes(&self, now: Now, by_user: bool) -> BTreeMap<Digest, Shape<'_>> {
        let mut shapes: BTreeMap<Digest, Shape<'_>> = BTreeMap::new();
        let mut add = |order, waiting: u64, expected: u64, items, ceiling| {
            let key = shape_of(order, by_user);
            if shapes.len() < SHAPES_MAX || shapes.contains_key(&key) {
                let shape = shapes.entry(key).or_insert(Shape {
                    order,
                    items,
                    ceiling,
                    waiting: 0,
                    expected: 0,
                });
                shape.waiting = shape.waiting.saturating_add(waiting);
                shape.expected = shape.expected.saturating_add(expected);
            }
        };
        for (_, id) in &self.queue {
            let Some(job) = self.jobs.get(id) else { continue };
            let mut queued = job.parts.iter().filter(|p| p.state == JobState::Queued);
            if let Some(first) = queued.next() {
                add(
                    &job.order,
                    1 + queued.count() as u64,
                    0,
                    first.items,
                    first.ceiling,
                );
            }
        }
        for (kind, parts) in self.forecast.expected(now.mono) {
            add(&kind.order, 0, parts, kind.items, kind.ceiling);
        }
        shapes
    }

    /// Solves the flow, and reads quotas and prices from it.
    fn advise(
        &self,
        by_user: bool,
        shapes: &BTreeMap<Digest, Shape<'_>>,
        columns: &[Column],
    ) -> Option<(Guide, BTreeMap<u32, u64>)> {
        let (problem, hours) = self.problem(shapes, columns);
        let solution = flow::solve(&problem, STEPS_MAX)?;
        let mut guide = Guide {
            by_user,
            ..Guide::default()
        };
        let rows: Vec<(&Digest, u64)> = shapes.iter().map(|(key, shape)| (key, shape.milli())).collect();
        for (row, column, units) in &solution.flow {
            // Quotas are for what waits; what is expected comes in the rows behind.
            let Some((shape, of_part)) = rows.get(*row as usize) else {
                continue;
            };
            let quota = guide.quotas.entry(**shape).or_default();
            *quota.entry(columns[*column as usize].group).or_insert(0) += units.div_ceil(*of_part);
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
        Some((guide, prices))
    }

    /// Devices that are free, or held for us and likely to be free before what is expected has come, by group and step
    /// of price; in thousandths.
    fn columns(&self, now: Now) -> Vec<Column> {
        let mut by_group: BTreeMap<u32, Vec<(u64, u64)>> = BTreeMap::new();
        let mut add = |group: u32, rate: u64, milli: u64| {
            if milli > 0 && (by_group.len() < GROUPS_MAX || by_group.contains_key(&group)) {
                by_group.entry(group).or_default().push((rate, milli));
            }
        };
        for (_, listing) in self.market.iter() {
            if !listing.connected || listing.offer.state != NodeState::Open {
                continue;
            }
            for (i, device) in listing.offer.devices.iter().enumerate() {
                if let Some(group) = listing.groups.get(i) {
                    add(
                        *group,
                        device.rate.0,
                        u64::from(listing.free(i)) * u64::from(WHOLE),
                    );
                }
            }
        }
        let until = now.utc.after(WINDOW);
        for (key, claim) in &self.claims {
            let (Some(part), Some(listing)) = (self.part(key), self.market.get(&claim.node)) else {
                continue;
            };
            let devices = &listing.offer.devices;
            let at = devices.iter().position(|d| d.class == claim.class);
            let ends = part.plan.as_ref().map(|plan| {
                part.asked_at
                    .after(plan.chosen.transfer)
                    .after(plan.chosen.duration)
            });
            if let Some(at) = at
                && ends.is_some_and(|ends| ends <= until)
                && let Some(group) = listing.groups.get(at)
            {
                add(*group, devices[at].rate.0, claim.devices.milli().into());
            }
        }
        let mut columns = Vec::new();
        let tiers = flow::tiers(by_group.len());
        for (group, devices) in by_group {
            let least = devices.iter().map(|(rate, _)| *rate).min().unwrap_or(0);
            for (mean, milli) in flow::by_price(devices, tiers) {
                columns.push(Column {
                    group,
                    milli,
                    above: mean - least,
                });
            }
        }
        columns
    }

    /// What is wanted against what there is, and how long a part takes on the average, in hours. Units are thousandths
    /// of a device; costs are those of a whole one for as long as a part takes. What waits comes first, kind by kind, then
    /// what is expected.
    fn problem(&self, shapes: &BTreeMap<Digest, Shape<'_>>, columns: &[Column]) -> (Problem, f64) {
        let mut problem = Problem {
            supply: columns.iter().map(|c| c.milli).collect(),
            ..Problem::default()
        };
        let total: u64 = problem
            .supply
            .iter()
            .fold(0, |sum, milli| sum.saturating_add(*milli));
        let (mut hours, mut parts, mut dearest) = (0.0, 0.0, 0);
        let mut reach = Vec::with_capacity(shapes.len());
        for shape in shapes.values() {
            let request = request(shape.order, shape.items, shape.ceiling, &[]);
            let milli = u128::from(request.devices.milli());
            let least = Matcher::new(&self.market, &request).least(&self.market, &request);
            let many = shape.waiting.saturating_add(shape.expected) as f64;
            let mut there = 0u64;
            for column in columns {
                let cost = least.get(&column.group).map_or(FORBIDDEN, |(cost, length)| {
                    let above = u128::from(column.above) * u128::from(length.0) / 3_600_000;
                    hours += length.0 as f64 / 3_600_000.0 * many;
                    parts += many;
                    there = there.saturating_add(column.milli);
                    let of_one = u128::from(*cost) * u128::from(WHOLE) / milli;
                    let cost = i64::try_from(of_one + above).unwrap_or(i64::MAX / 2);
                    dearest = dearest.max(cost);
                    cost
                });
                problem.cost.push(cost);
            }
            reach.push(there);
        }
        // Waiting is dearer than the dearest place: work is never left out to save money. What waits already goes before
        // what may come, and what can run in few places before what can run in many.
        let waiting = dearest.clamp(250, i64::MAX / 16) * 4;
        let unserved = |reach: u64| {
            let elsewhere = u128::from(waiting as u64 / 4) * u128::from(total - reach.min(total));
            waiting + (elsewhere / u128::from(total.max(1))) as i64
        };
        let units = |parts: u64, shape: &Shape<'_>| {
            let units = u128::from(parts) * u128::from(shape.milli());
            u64::try_from(units).unwrap_or(u64::MAX >> 16).min(u64::MAX >> 16)
        };
        problem.demand = shapes.values().map(|shape| units(shape.waiting, shape)).collect();
        problem.unserved = reach.iter().map(|reach| unserved(*reach)).collect();
        for (i, shape) in shapes.values().enumerate() {
            if shape.expected > 0 {
                problem.demand.push(units(shape.expected, shape));
                problem.unserved.push(unserved(reach[i]) / 2);
                let row = i * columns.len()..(i + 1) * columns.len();
                problem.cost.extend_from_within(row);
            }
        }
        let mean = if parts > 0.0 {
            (hours / parts).max(1e-6)
        } else {
            1.0
        };
        (problem, mean)
    }

    /// Whether the slow path advises work of that kind to go to that device.
    pub(super) fn is_advised(&self, order: &Order, candidate: &placement::Candidate) -> bool {
        let Some(guide) = &self.guide else { return false };
        let Some(quota) = guide.quotas.get(&shape_of(order, guide.by_user)) else {
            return false;
        };
        let group = self.market.get(&candidate.node).and_then(|listing| {
            let devices = &listing.offer.devices;
            let at = devices.iter().position(|d| d.class == candidate.device_class)?;
            listing.groups.get(at)
        });
        group.is_some_and(|group| quota.contains_key(group))
    }
}

/// Capacity that is alike, and how much of it there is, in thousandths of a device.
struct Column {
    group: u32,
    milli: u64,
    /// How far its price lies above the group's lowest, per hour.
    above: u64,
}
