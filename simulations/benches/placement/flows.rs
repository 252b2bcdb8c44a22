//! `gap_batch`, `gap_online` and `solve_tick`: how near to the optimum the slow path brings placement.
//!
//! Jobs of the trace's mix ask for devices in many countries at market prices. Cheapest-first takes the scarce models
//! for work that could run anywhere; the flow's quotas keep them for what can run nowhere else. The optimum is that
//! of a linear program over every distinct price, solved by another solver than ours.
use crate::{
    cpu_seconds,
    inventory::{Inventory, MODELS},
    median,
};
use karez_core::placement::{
    flow::{FORBIDDEN, Problem, Solution, by_price, solve, tiers},
    index::{ClassId, Costs, Found, Index, Level, SlotId},
};
use karez_simulations::rng::Rng;
use microlp::{ComparisonOp, LinearExpr, OptimizationDirection, Problem as Linear};
use serde_json::{Value, json};

const COUNTRIES: usize = 6;
/// Distinct prices of a model in a country.
const PRICES: usize = 8;

/// Work that may use the same models and comes from the same country.
struct Shape {
    models: u8,
    country: usize,
}

/// Devices of one model in one country, by price.
struct Capacity {
    model: usize,
    country: usize,
    /// Price and how many of each, cheapest first.
    tiers: Vec<(u32, u64)>,
}

struct World {
    shapes: Vec<Shape>,
    capacity: Vec<Capacity>,
    /// The shape of each job, in order of arrival; each takes one device.
    jobs: Vec<usize>,
    /// Thousandths of a dollar between countries.
    transfer: Vec<u32>,
    devices: u64,
    constrained: f64,
}

impl World {
    /// Jobs for that share of all devices.
    fn new(inventory: &Inventory, load: f64, seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let mut capacity: Vec<Capacity> = (0..MODELS.len() * COUNTRIES)
            .map(|i| Capacity {
                model: i / COUNTRIES,
                country: i % COUNTRIES,
                tiers: Vec::new(),
            })
            .collect();
        for class in &mut capacity {
            let list = u64::from(MODELS[class.model].1);
            // A tenth is donated; the rest is spread around the list price as markets spread.
            class.tiers = (0..PRICES)
                .map(|t| {
                    if t == 0 {
                        (0, 0)
                    } else {
                        ((list * (450 + 150 * t as u64 + rng.below(100)) / 1_000) as u32, 0)
                    }
                })
                .collect();
            class.tiers.sort_unstable();
        }
        let mut devices = 0;
        for machine in inventory.machines.iter().filter(|m| m.gpus > 0) {
            let Some(model) = MODELS.iter().position(|(name, _)| *name == machine.model) else {
                continue;
            };
            let class = &mut capacity[model * COUNTRIES + rng.below(COUNTRIES as u64) as usize];
            let tier = if rng.chance(100) {
                0
            } else {
                rng.between(1, PRICES as u64 - 1) as usize
            };
            class.tiers[tier].1 += u64::from(machine.gpus);
            devices += u64::from(machine.gpus);
        }
        for class in &mut capacity {
            class.tiers.retain(|(_, count)| *count > 0);
        }
        let mut shapes: Vec<Shape> = Vec::new();
        let mut jobs = Vec::new();
        let pods: Vec<_> = inventory.pods.iter().filter(|p| p.gpus > 0).collect();
        // No more constrained work than there is capacity for it: the rest could not be met by anybody.
        let mut room: Vec<u64> = (0..MODELS.len())
            .map(|m| {
                capacity
                    .iter()
                    .filter(|c| c.model == m)
                    .flat_map(|c| &c.tiers)
                    .map(|t| t.1)
                    .sum::<u64>()
                    * 9
                    / 10
            })
            .collect();
        let mut constrained = 0u64;
        while (jobs.len() as f64) < devices as f64 * load {
            let pod = pods[rng.below(pods.len() as u64) as usize];
            let named = MODELS
                .iter()
                .enumerate()
                .filter(|(_, (name, _))| pod.models.iter().any(|m| m == name));
            let mut models = named.fold(0u8, |mask, (i, _)| mask | 1 << i);
            if models == 0 {
                models = 127;
            } else {
                let Some(free) = (0..MODELS.len()).find(|m| models >> m & 1 == 1 && room[*m] > 0) else {
                    continue;
                };
                room[free] -= 1;
                constrained += 1;
            }
            let country = rng.below(COUNTRIES as u64) as usize;
            let known = shapes
                .iter()
                .position(|s| s.models == models && s.country == country);
            jobs.push(known.unwrap_or_else(|| {
                shapes.push(Shape { models, country });
                shapes.len() - 1
            }));
        }
        let transfer = (0..COUNTRIES * COUNTRIES)
            .map(|i| match (i / COUNTRIES, i % COUNTRIES) {
                (a, b) if a == b => 0,
                (a, b) => 20 + ((a * 7_919 + b * 104_729) % 300) as u32,
            })
            .collect();
        let constrained = constrained as f64 / jobs.len() as f64;
        Self {
            shapes,
            capacity,
            jobs,
            transfer,
            devices,
            constrained,
        }
    }

    fn way(&self, shape: &Shape, class: &Capacity) -> Option<u32> {
        (shape.models >> class.model & 1 == 1)
            .then(|| self.transfer[shape.country * COUNTRIES + class.country])
    }

    /// What the slow path sees: demand by shape, capacity by class in steps of price, as the controller's slow path does.
    fn problem(&self, demand: Vec<u64>, left: impl Fn(usize, usize) -> u64) -> (Problem, Vec<usize>) {
        let mut problem = Problem {
            unserved: vec![1 << 20; demand.len()],
            demand,
            ..Problem::default()
        };
        let mut columns = Vec::new();
        let mut prices = Vec::new();
        for (c, class) in self.capacity.iter().enumerate() {
            let there = class.tiers.iter().enumerate();
            let there = there.map(|(t, (price, _))| (u64::from(*price), left(c, t)));
            for (price, count) in by_price(there, tiers(self.capacity.len())) {
                problem.supply.push(count);
                columns.push(c);
                prices.push(price as i64);
            }
        }
        for shape in &self.shapes {
            for (c, price) in columns.iter().zip(&prices) {
                let way = self.way(shape, &self.capacity[*c]);
                problem
                    .cost
                    .push(way.map_or(FORBIDDEN, |way| price + i64::from(way)));
            }
        }
        (problem, columns)
    }

    fn quotas(&self, solution: &Solution, columns: &[usize]) -> Vec<Vec<u64>> {
        let mut quotas = vec![vec![0; self.capacity.len()]; self.shapes.len()];
        for (row, column, units) in &solution.flow {
            quotas[*row as usize][columns[*column as usize]] += units;
        }
        quotas
    }

    /// The least that all jobs could cost, by a linear program over every distinct price.
    fn optimum(&self) -> f64 {
        let mut linear = Linear::new(OptimizationDirection::Minimize);
        let mut demand = vec![0u64; self.shapes.len()];
        for job in &self.jobs {
            demand[*job] += 1;
        }
        let mut rows: Vec<LinearExpr> = (0..self.shapes.len()).map(|_| LinearExpr::empty()).collect();
        for class in &self.capacity {
            for (price, count) in &class.tiers {
                let mut column = LinearExpr::empty();
                for (row, shape) in self.shapes.iter().enumerate() {
                    if let Some(way) = self.way(shape, class) {
                        let units = linear.add_var(f64::from(price + way), (0.0, demand[row] as f64));
                        rows[row].add(units, 1.0);
                        column.add(units, 1.0);
                    }
                }
                linear.add_constraint(column, ComparisonOp::Le, *count as f64);
            }
        }
        for (row, units) in rows.into_iter().enumerate() {
            linear.add_constraint(units, ComparisonOp::Eq, demand[row] as f64);
        }
        linear.solve().map_or(f64::NAN, |solution| solution.objective())
    }
}

/// The devices of a world behind the index, one place per price of a class.
struct Shelf {
    index: Index,
    /// Class, tier and devices left, by slot.
    places: Vec<(usize, usize, u64)>,
    masks: Vec<Vec<f32>>,
    found: Vec<Found>,
}

impl Shelf {
    fn new(world: &World) -> Self {
        let mut index = Index::default();
        let mut places = Vec::new();
        for (c, class) in world.capacity.iter().enumerate() {
            let id = index.add_class();
            assert_eq!(id, ClassId(c as u32));
            for (t, (price, count)) in class.tiers.iter().enumerate() {
                index.insert(id, *price as f32, Level::of_devices(*count as u32));
                places.push((c, t, *count));
            }
        }
        let masks = world.shapes.iter().map(|shape| {
            let way = |class| world.way(shape, class).map_or(f32::INFINITY, |way| way as f32);
            world.capacity.iter().map(way).collect()
        });
        Self {
            index,
            places,
            masks: masks.collect(),
            found: Vec::new(),
        }
    }

    /// Takes the cheapest device for a shape where `quota` allows; all classes without one.
    fn take(&mut self, world: &World, shape: usize, quota: Option<&mut Vec<u64>>) -> Option<u64> {
        let mut base = self.masks[shape].clone();
        if let Some(quota) = &quota {
            for (b, q) in base.iter_mut().zip(quota.iter()) {
                if *q == 0 {
                    *b = f32::INFINITY;
                }
            }
        }
        let price = |slot: SlotId| {
            let (c, t, _) = self.places[slot.0 as usize];
            let way = world.way(&world.shapes[shape], &world.capacity[c])?;
            Some(u64::from(world.capacity[c].tiers[t].0 + way))
        };
        self.found.clear();
        self.index.cheapest(
            &Costs::exact(base),
            Level::of_devices(1),
            1,
            0,
            price,
            &mut self.found,
        );
        let found = self.found.first().copied()?;
        let place = &mut self.places[found.slot.0 as usize];
        place.2 -= 1;
        if let Some(quota) = quota {
            quota[place.0] -= 1;
        }
        let level = Level::of_devices(place.2 as u32);
        self.index.set_level(found.slot, level);
        Some(found.score)
    }

    fn left(&self, class: usize, tier: usize) -> u64 {
        let place = self.places.iter().find(|(c, t, _)| (*c, *t) == (class, tier));
        place.map_or(0, |(_, _, left)| *left)
    }
}

/// What it cost and how many jobs found nothing. One that finds nothing is charged twice the dearest device.
#[derive(Clone, Copy, Default)]
struct Outcome {
    cost: f64,
    unplaced: u64,
}

impl Outcome {
    fn add(&mut self, score: Option<u64>) {
        match score {
            Some(score) => self.cost += score as f64,
            None => {
                self.unplaced += 1;
                self.cost += 2.0 * 1_800.0;
            }
        }
    }
}

fn greedy(world: &World) -> Outcome {
    let mut shelf = Shelf::new(world);
    let mut out = Outcome::default();
    for job in &world.jobs {
        out.add(shelf.take(world, *job, None));
    }
    out
}

fn batch(world: &World) -> (Outcome, f64, u32) {
    let mut shelf = Shelf::new(world);
    let mut demand = vec![0u64; world.shapes.len()];
    for job in &world.jobs {
        demand[*job] += 1;
    }
    let (problem, columns) = world.problem(demand, |c, t| world.capacity[c].tiers[t].1);
    let start = cpu_seconds();
    let solution = solve(&problem, u32::MAX).unwrap_or_default();
    let millis = (cpu_seconds() - start) * 1e3;
    let mut quotas = world.quotas(&solution, &columns);
    let mut out = Outcome::default();
    for job in &world.jobs {
        let score = shelf.take(world, *job, Some(&mut quotas[*job]));
        out.add(score.or_else(|| shelf.take(world, *job, None)));
    }
    (out, millis, solution.steps)
}

/// One job after another; what is still to come is only forecast, each shape wrongly by up to `wrong` percent. The
/// flow is solved anew after every fiftieth part of the jobs, on what is left.
fn online(world: &World, wrong: u64, seed: u64) -> Outcome {
    let mut rng = Rng::new(seed);
    let mut shelf = Shelf::new(world);
    let mut total = vec![0u64; world.shapes.len()];
    for job in &world.jobs {
        total[*job] += 1;
    }
    let factor: Vec<f64> = total
        .iter()
        .map(|_| rng.between(100 - wrong, 100 + wrong) as f64 / 100.0)
        .collect();
    let mut seen = vec![0u64; world.shapes.len()];
    let mut quotas: Vec<Vec<u64>> = Vec::new();
    let round = world.jobs.len().div_ceil(50);
    let mut out = Outcome::default();
    for (i, job) in world.jobs.iter().enumerate() {
        if i % round == 0 {
            let forecast = (0..total.len())
                .map(|s| ((total[s] - seen[s]) as f64 * factor[s]).ceil() as u64)
                .collect();
            let (problem, columns) = world.problem(forecast, |c, t| shelf.left(c, t));
            if let Some(solution) = solve(&problem, 100_000) {
                quotas = world.quotas(&solution, &columns);
            }
        }
        seen[*job] += 1;
        let score = shelf.take(world, *job, Some(&mut quotas[*job]));
        out.add(score.or_else(|| shelf.take(world, *job, None)));
    }
    out
}

pub(crate) fn gap_batch(inventory: &Inventory) -> Value {
    let mut rows = Vec::new();
    for load in [0.5, 0.8, 0.95] {
        let world = World::new(inventory, load, 11);
        let optimum = world.optimum();
        let (ours, millis, steps) = batch(&world);
        let greedy = greedy(&world);
        println!(
            "gap_batch: {:.0} % load of {} devices, {:.0} % of jobs constrained: {:.4} x the optimum ({} unplaced), cheapest \
             first {:.2} x ({} unplaced); {} x {} classes solved in {millis:.1} ms, {steps} steps [aim 1.005]",
            load * 100.0,
            world.devices,
            world.constrained * 100.0,
            ours.cost / optimum,
            ours.unplaced,
            greedy.cost / optimum,
            greedy.unplaced,
            world.shapes.len(),
            world.capacity.len(),
        );
        rows.push(json!({
            "load": load, "devices": world.devices, "constrained_share": world.constrained, "optimum": optimum,
            "ratio": ours.cost / optimum, "unplaced": ours.unplaced, "greedy_ratio": greedy.cost / optimum,
            "greedy_unplaced": greedy.unplaced, "solve_ms": millis, "steps": steps,
        }));
    }
    json!({ "rows": rows, "aim": "1.005 x the optimum of an independent linear program" })
}

pub(crate) fn gap_online(inventory: &Inventory) -> Value {
    let mut rows = Vec::new();
    for (load, aim) in [(0.5, 1.10), (0.8, 1.05), (0.95, 1.05)] {
        let world = World::new(inventory, load, 11);
        let optimum = world.optimum();
        let ours: Vec<Outcome> = (1..=5).map(|seed| online(&world, 30, seed)).collect();
        let ratio = median(ours.iter().map(|o| o.cost / optimum).collect());
        let unplaced = ours.iter().map(|o| o.unplaced).max().unwrap_or(0);
        let greedy = greedy(&world);
        println!(
            "gap_online: {:.0} % load, {:.0} % of jobs constrained, forecast up to 30 % wrong: {ratio:.4} x clairvoyant (at \
             most {unplaced} unplaced), cheapest first {:.2} x ({} unplaced) [aim {aim}]",
            load * 100.0,
            world.constrained * 100.0,
            greedy.cost / optimum,
            greedy.unplaced,
        );
        rows.push(json!({
            "load": load, "constrained_share": world.constrained, "ratio": ratio, "unplaced": unplaced,
            "greedy_ratio": greedy.cost / optimum, "greedy_unplaced": greedy.unplaced, "aim": aim,
        }));
    }
    json!({ "rows": rows })
}

/// 700 kinds of work against 700 of capacity, scarce: three quarters of all pairs are forbidden.
pub(crate) fn solve_tick(_: &Inventory) -> Value {
    let n = 700usize;
    let mut times = Vec::new();
    let mut steps = 0;
    for seed in 0..5 {
        let mut rng = Rng::new(seed);
        let problem = Problem {
            demand: (0..n).map(|_| rng.between(1, 1_000)).collect(),
            supply: (0..n).map(|_| rng.between(1, 1_000)).collect(),
            unserved: vec![100_000_000; n],
            cost: (0..n * n)
                .map(|_| {
                    if rng.chance(250) {
                        rng.between(100_000, 10_000_000) as i64
                    } else {
                        FORBIDDEN
                    }
                })
                .collect(),
        };
        let start = cpu_seconds();
        let solution = solve(&problem, u32::MAX).unwrap_or_default();
        times.push((cpu_seconds() - start) * 1e3);
        steps = steps.max(solution.steps);
    }
    let millis = median(times);
    println!(
        "solve_tick: {n} x {n} classes in {millis:.1} ms (median of 5), at most {steps} steps [aim 50 ms]"
    );
    json!({ "rows": n, "columns": n, "millis": millis, "steps": steps, "aim": "50 ms" })
}
