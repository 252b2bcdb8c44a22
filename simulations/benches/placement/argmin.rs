//! `place_argmin` and `place_1m`: exact cheapest feasible nodes under load, beside a full scan of the same state.
//!
//! As in Karez's offers, a device is lent with its share of cores and memory: what is counted is whole devices, several
//! of them on one node, and thousandths of one.
use crate::{
    cpu_seconds,
    inventory::{Inventory, MODELS},
    median,
};
use karez_core::placement::index::{ClassId, Costs, Found, Index, Level, SlotId, Steps};
use karez_simulations::rng::Rng;
use serde_json::{Value, json};
use std::{collections::HashMap, time::Instant};

const COUNTRIES: u64 = 100;
const LOAD_PERCENT: u64 = 80;

/// One machine. Its place in the index is its number.
#[derive(Clone)]
struct Node {
    free: [u16; 8],
    price: u32,
    model: u8,
    country: u8,
}

impl Node {
    /// Whole devices, or the largest free share of one.
    fn level(&self, steps: &Steps) -> Level {
        let whole = self.free.iter().filter(|f| **f == 1_000).count() as u32;
        match whole {
            0 => steps.level(u32::from(self.free.iter().copied().max().unwrap_or(0))),
            n => steps.level(n * 1_000),
        }
    }
    fn holds(&self, need: &Need) -> bool {
        let whole = |n: u8| self.free.iter().filter(|f| **f == 1_000).count() >= usize::from(n);
        if need.share < 1_000 {
            self.free.iter().any(|f| *f >= need.share)
        } else {
            whole(need.gpus)
        }
    }
    /// Takes the devices: a share from the fullest one that still has it, whole ones from the first.
    fn take(&mut self, need: &Need) -> u8 {
        let mut taken = 0u8;
        if need.share < 1_000 {
            let fits = (0..8).filter(|i| self.free[*i] >= need.share);
            let best = fits.min_by_key(|i| self.free[*i]).unwrap_or(0);
            self.free[best] -= need.share;
            return 1 << best;
        }
        for i in 0..8 {
            if self.free[i] == 1_000 && taken.count_ones() < u32::from(need.gpus) {
                self.free[i] = 0;
                taken |= 1 << i;
            }
        }
        taken
    }
    fn give_back(&mut self, need: &Need, taken: u8) {
        for i in 0..8 {
            if taken >> i & 1 == 1 {
                self.free[i] += need.share.min(1_000);
            }
        }
    }
}

#[derive(Clone, Copy)]
struct Need {
    share: u16,
    gpus: u8,
    models: u8,
    country: u8,
    /// Which cost vector.
    costs: u32,
    level: Level,
}

struct World {
    nodes: Vec<Node>,
    steps: Steps,
    index: Index,
    classes: Vec<(u8, u8)>,
    costs: Vec<Costs>,
    needs: Vec<Need>,
    transfer: Vec<u32>,
    gpus: u64,
    constrained: f64,
}

impl World {
    fn new(inventory: &Inventory, scale: usize) -> Self {
        let mut rng = Rng::new(7);
        let machines: Vec<(u8, u8)> = inventory
            .machines
            .iter()
            .filter(|m| m.gpus > 0 && m.gpus <= 8)
            .filter_map(|m| {
                let model = MODELS.iter().position(|(name, _)| *name == m.model)? as u8;
                Some((model, m.gpus as u8))
            })
            .collect();
        let pods: Vec<_> = inventory
            .pods
            .iter()
            .filter(|p| p.gpus > 0 && p.gpus <= 8)
            .collect();
        let steps = Steps::of(pods.iter().map(|p| match p.gpus {
            1 => p.gpu_milli.clamp(1, 1_000),
            n => n * 1_000,
        }));
        let mut index = Index::default();
        let mut classes = Vec::new();
        let mut known: HashMap<(u8, u8), ClassId> = HashMap::new();
        let mut nodes = Vec::new();
        for _ in 0..scale {
            for (model, gpus) in &machines {
                let country = rng.below(COUNTRIES) as u8;
                let class = *known.entry((*model, country)).or_insert_with(|| {
                    classes.push((*model, country));
                    index.add_class()
                });
                let list = u64::from(MODELS[usize::from(*model)].1);
                let price = if rng.chance(100) {
                    0
                } else {
                    list * rng.between(500, 1_500) / 1_000
                };
                let mut node = Node {
                    free: [0; 8],
                    price: price as u32,
                    model: *model,
                    country,
                };
                node.free[..usize::from(*gpus)].fill(1_000);
                let slot = index.insert(class, price as f32, node.level(&steps));
                assert_eq!(slot.0 as usize, nodes.len(), "slots are numbered as they come");
                nodes.push(node);
            }
        }
        // Far countries cost more to move data to; thousandths of a dollar, from none to about a third of one.
        let transfer: Vec<u32> = (0..COUNTRIES * COUNTRIES)
            .map(|i| match (i / COUNTRIES, i % COUNTRIES) {
                (a, b) if a == b => 0,
                (a, b) => 20 + ((a * 7_919 + b * 104_729) % 300) as u32,
            })
            .collect();
        let (mut costs, mut ids) = (Vec::new(), HashMap::new());
        let pods: Vec<_> = inventory
            .pods
            .iter()
            .filter(|p| p.gpus > 0 && p.gpus <= 8)
            .collect();
        let mut needs = Vec::new();
        for i in 0..200_000u64 {
            let pod = pods[rng.below(pods.len() as u64) as usize];
            let named = MODELS
                .iter()
                .enumerate()
                .filter(|(_, (name, _))| pod.models.iter().any(|m| m == name));
            let models = named.fold(0u8, |mask, (i, _)| mask | 1 << i);
            let models = if models == 0 { 127 } else { models };
            let country = (i % COUNTRIES) as u8;
            let id = *ids.entry((models, country)).or_insert_with(|| {
                let base = classes.iter().map(|(model, there)| {
                    if models >> model & 1 == 1 {
                        transfer[usize::from(country) * COUNTRIES as usize + usize::from(*there)] as f32
                    } else {
                        f32::INFINITY
                    }
                });
                costs.push(Costs::exact(base.collect()));
                costs.len() - 1
            });
            let share = if pod.gpus == 1 {
                pod.gpu_milli.min(1_000) as u16
            } else {
                1_000
            };
            let level = match share {
                1_000 => steps.level(pod.gpus * 1_000),
                share => steps.level(u32::from(share.max(1))),
            };
            needs.push(Need {
                share: share.max(1),
                gpus: pod.gpus as u8,
                models,
                country,
                costs: id as u32,
                level,
            });
        }
        let constrained = needs.iter().filter(|n| n.models != 127).count() as f64 / needs.len() as f64;
        let gpus = nodes.iter().flat_map(|n| n.free).map(u64::from).sum::<u64>();
        Self {
            nodes,
            steps,
            index,
            classes,
            costs,
            needs,
            transfer,
            gpus,
            constrained,
        }
    }

    fn score(&self, need: &Need, node: &Node) -> u64 {
        let way = usize::from(need.country) * COUNTRIES as usize + usize::from(node.country);
        u64::from(node.price + self.transfer[way])
    }

    fn choose(&self, need: &Need, turn: u32, found: &mut Vec<Found>, judged: &mut u64) -> Option<Found> {
        found.clear();
        let exact = |slot: SlotId| {
            *judged += 1;
            let node = &self.nodes[slot.0 as usize];
            node.holds(need).then(|| self.score(need, node))
        };
        let costs = &self.costs[need.costs as usize];
        self.index.cheapest(costs, need.level, 1, turn, exact, found);
        found.first().copied()
    }

    fn scan(&self, need: &Need) -> Option<u64> {
        let fits = self
            .nodes
            .iter()
            .filter(|n| need.models >> n.model & 1 == 1 && n.holds(need));
        fits.map(|n| self.score(need, n)).min()
    }
}

struct Running {
    node: u32,
    need: u32,
    taken: u8,
}

/// The world under load: jobs arrive, and as many leave as keep the load where it is.
struct Bed {
    world: World,
    running: Vec<Running>,
    used: u64,
    unplaced: u64,
    rng: Rng,
    found: Vec<Found>,
    /// Places looked at one by one.
    judged: u64,
}

impl Bed {
    fn arrive(&mut self, i: u64) {
        let at = (i % self.world.needs.len() as u64) as usize;
        let need = self.world.needs[at];
        let turn = (i as u32).wrapping_mul(0x9e37_79b9);
        match self.world.choose(&need, turn, &mut self.found, &mut self.judged) {
            Some(found) => {
                let node = &mut self.world.nodes[found.slot.0 as usize];
                let taken = node.take(&need);
                let level = node.level(&self.world.steps);
                self.world.index.set_level(found.slot, level);
                self.used += u64::from(need.share) * u64::from(taken.count_ones());
                self.running.push(Running {
                    node: found.slot.0,
                    need: at as u32,
                    taken,
                });
            }
            None => self.unplaced += 1,
        }
    }

    fn depart(&mut self) {
        while self.used * 100 > self.world.gpus * LOAD_PERCENT {
            let at = self.rng.below(self.running.len() as u64) as usize;
            let gone = self.running.swap_remove(at);
            let need = self.world.needs[gone.need as usize];
            let node = &mut self.world.nodes[gone.node as usize];
            node.give_back(&need, gone.taken);
            let level = node.level(&self.world.steps);
            self.world.index.set_level(SlotId(gone.node), level);
            self.used -= u64::from(need.share) * u64::from(gone.taken.count_ones());
        }
    }
}

struct Measured {
    nodes: usize,
    classes: usize,
    rate: f64,
    wall_rate: f64,
    scan_rate: f64,
    p50_ns: u32,
    p99_ns: u32,
    sampled: u64,
    unequal: u64,
    unplaced: f64,
    judged: f64,
    load: f64,
    constrained: f64,
    bytes_per_node: f64,
}

fn measure(inventory: &Inventory, scale: usize, arrivals: u64) -> Measured {
    let world = World::new(inventory, scale);
    let mut bed = Bed {
        world,
        running: Vec::new(),
        used: 0,
        unplaced: 0,
        rng: Rng::new(3),
        found: Vec::new(),
        judged: 0,
    };
    let mut i = 0;
    while bed.used * 100 < bed.world.gpus * (LOAD_PERCENT - 1) && i < 8_000_000 {
        bed.arrive(i);
        i += 1;
    }
    (bed.unplaced, bed.judged) = (0, 0);
    // Rates by fifths of the arrivals: the median leaves out what others did on this machine meanwhile.
    let (mut rates, mut wall_rates) = (Vec::new(), Vec::new());
    for _ in 0..5 {
        let (start, wall) = (cpu_seconds(), Instant::now());
        for _ in 0..arrivals / 5 {
            bed.arrive(i);
            bed.depart();
            i += 1;
        }
        rates.push((arrivals / 5) as f64 / (cpu_seconds() - start));
        wall_rates.push((arrivals / 5) as f64 / wall.elapsed().as_secs_f64());
    }
    let unplaced = bed.unplaced as f64 / arrivals as f64;
    let judged = bed.judged as f64 / arrivals as f64;
    // One by one, clock included, departures included.
    let mut times: Vec<u32> = (0..arrivals / 5)
        .map(|_| {
            let start = Instant::now();
            bed.arrive(i);
            bed.depart();
            i += 1;
            start.elapsed().as_nanos() as u32
        })
        .collect();
    times.sort_unstable();
    let (mut sampled, mut unequal) = (0, 0);
    let mut scanning = 0.0;
    let samples = if scale > 100 { 40 } else { 200 };
    for _ in 0..samples {
        for _ in 0..97 {
            bed.arrive(i);
            bed.depart();
            i += 1;
        }
        let need = bed.world.needs[(i % bed.world.needs.len() as u64) as usize];
        let start = cpu_seconds();
        let scanned = bed.world.scan(&need);
        scanning += cpu_seconds() - start;
        let mut found = Vec::new();
        let fast = bed
            .world
            .choose(&need, i as u32, &mut found, &mut 0)
            .map(|f| f.score);
        sampled += 1;
        unequal += u64::from(fast != scanned);
    }
    let nodes = bed.world.nodes.len();
    Measured {
        nodes,
        classes: bed.world.classes.len(),
        rate: median(rates),
        wall_rate: median(wall_rates),
        scan_rate: sampled as f64 / scanning,
        p50_ns: times[times.len() / 2],
        p99_ns: times[times.len() * 99 / 100],
        sampled,
        unequal,
        unplaced,
        judged,
        load: bed.used as f64 / bed.world.gpus as f64,
        constrained: bed.world.constrained,
        bytes_per_node: bed.world.index.bytes() as f64 / nodes as f64,
    }
}

fn print(name: &str, m: &Measured, aim: &str) -> Value {
    println!(
        "{name}: {} nodes in {} classes at {:.0} % load, {:.0} % of jobs constrained, {:.2} % unplaced: {:.2} M decisions/s of \
         one thread ({:.2} M by the wall clock; full scan {:.1} k/s), {:.1} places judged each, p50 {} ns, p99 {} ns, {:.0} bytes of index per node; {} of {} sampled \
         decisions equal a full scan [aim {aim}]",
        m.nodes,
        m.classes,
        m.load * 100.0,
        m.constrained * 100.0,
        m.unplaced * 100.0,
        m.rate / 1e6,
        m.wall_rate / 1e6,
        m.scan_rate / 1e3,
        m.judged,
        m.p50_ns,
        m.p99_ns,
        m.bytes_per_node,
        m.sampled - m.unequal,
        m.sampled,
    );
    json!({
        "nodes": m.nodes, "classes": m.classes, "load": m.load, "constrained_share": m.constrained,
        "unplaced_share": m.unplaced, "decisions_per_cpu_s": m.rate, "decisions_per_s": m.wall_rate, "full_scan_per_cpu_s": m.scan_rate, "judged": m.judged, "p50_ns": m.p50_ns,
        "p99_ns": m.p99_ns, "index_bytes_per_node": m.bytes_per_node, "sampled": m.sampled, "unequal": m.unequal,
        "aim": aim,
    })
}

pub(crate) fn place_argmin(inventory: &Inventory) -> Value {
    let m = measure(inventory, 80, 2_000_000);
    print("place_argmin", &m, "3 M decisions/s, p99 2000 ns, all equal")
}

pub(crate) fn place_1m(inventory: &Inventory) -> Value {
    let small = measure(inventory, 80, 500_000);
    let m = measure(inventory, 800, 1_000_000);
    let share = m.rate / small.rate;
    let mut value = print(
        "place_1m",
        &m,
        "0.8 of the rate with a tenth of the nodes, 100 bytes per node",
    );
    println!(
        "place_1m: {share:.2} of the rate at {} nodes in the same run",
        small.nodes
    );
    value["rate_share"] = share.into();
    value
}
