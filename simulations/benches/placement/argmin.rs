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
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::Instant,
};

const COUNTRIES: u64 = 100;
const LOAD_PERCENT: u64 = 80;
/// Jobs that end together.
const GONE: usize = 8;

/// Hundredths of a device: the whole of one.
const WHOLE: u8 = 100;

/// One machine. Its place in the index is its number. Four of them lie in one cache line.
#[derive(Clone, Copy)]
#[repr(align(16))]
struct Node {
    /// Of each device, in hundredths.
    free: [u8; 8],
    price: u16,
    model: u8,
    country: u8,
}

impl Node {
    fn whole(&self) -> u32 {
        let mut whole = 0u64;
        for (i, free) in self.free.iter().enumerate() {
            whole |= u64::from(*free == WHOLE) << (i * 8);
        }
        whole.count_ones()
    }
    /// Whole devices, or the largest free share of one; in hundredths.
    fn holding(&self) -> usize {
        match self.whole() as usize {
            0 => usize::from(self.free.iter().fold(0, |most, f| most.max(*f))),
            n => n * usize::from(WHOLE),
        }
    }
    fn holds(&self, need: &Need) -> bool {
        if need.share < WHOLE {
            self.free.iter().fold(0, |most, f| most.max(*f)) >= need.share
        } else {
            self.whole() >= u32::from(need.gpus)
        }
    }
    /// Takes the devices: a share from the fullest one that still has it, whole ones from the first.
    fn take(&mut self, need: &Need) -> u8 {
        let mut taken = 0u8;
        if need.share < WHOLE {
            let mut best = (u8::MAX, 0);
            for (i, free) in self.free.iter().enumerate() {
                let fits = if *free >= need.share { *free } else { u8::MAX };
                best = if fits < best.0 { (fits, i) } else { best };
            }
            self.free[best.1] -= need.share;
            return 1 << best.1;
        }
        for i in 0..8 {
            if self.free[i] == WHOLE && taken.count_ones() < u32::from(need.gpus) {
                self.free[i] = 0;
                taken |= 1 << i;
            }
        }
        taken
    }
    fn give_back(&mut self, gone: &Running) {
        let mut more = [0; 8];
        for (i, more) in more.iter_mut().enumerate() {
            *more = if gone.taken >> i & 1 == 1 { gone.share } else { 0 };
        }
        // No byte carries into the next: a device never has more than all of itself.
        let sum = u64::from_le_bytes(self.free).wrapping_add(u64::from_le_bytes(more));
        self.free = sum.to_le_bytes();
    }
}

#[derive(Clone, Copy)]
struct Need {
    /// Hundredths of each device.
    share: u8,
    gpus: u8,
    models: u8,
    country: u8,
    /// Which cost vector.
    costs: u16,
    level: Level,
}

struct World {
    nodes: Vec<Node>,
    /// By hundredths of a device.
    levels: Vec<Level>,
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
        let levels: Vec<Level> = (0..=800).map(|n| steps.level(n * 10)).collect();
        let mut nodes = Vec::new();
        for _ in 0..scale {
            for (model, gpus) in &machines {
                let country = rng.below(COUNTRIES) as u8;
                let list = u64::from(MODELS[usize::from(*model)].1);
                let price = if rng.chance(100) {
                    0
                } else {
                    list * rng.between(500, 1_500) / 1_000
                };
                let mut node = Node {
                    free: [0; 8],
                    price: price as u16,
                    model: *model,
                    country,
                };
                node.free[..usize::from(*gpus)].fill(WHOLE);
                nodes.push(node);
            }
        }
        // Classes of one model side by side: who needs that model looks at no others.
        let mut index = Index::default();
        let known: BTreeSet<(u8, u8)> = nodes.iter().map(|n| (n.model, n.country)).collect();
        let known: BTreeMap<(u8, u8), ClassId> =
            known.into_iter().map(|pair| (pair, index.add_class())).collect();
        let classes: Vec<(u8, u8)> = known.keys().copied().collect();
        for (i, node) in nodes.iter().enumerate() {
            let class = known[&(node.model, node.country)];
            let slot = index.insert(class, f32::from(node.price), levels[node.holding()]);
            assert_eq!(slot.0 as usize, i, "slots are numbered as they come");
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
            // All shares of the trace are hundredths.
            let share = match pod.gpus {
                1 => pod.gpu_milli.div_ceil(10).clamp(1, WHOLE.into()),
                _ => WHOLE.into(),
            };
            let level = steps.level(share * 10 * pod.gpus);
            needs.push(Need {
                share: share as u8,
                gpus: pod.gpus as u8,
                models,
                country,
                costs: id as u16,
                level,
            });
        }
        let constrained = needs.iter().filter(|n| n.models != 127).count() as f64 / needs.len() as f64;
        let gpus = nodes.iter().flat_map(|n| n.free).map(u64::from).sum::<u64>();
        Self {
            nodes,
            levels,
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
        u64::from(u32::from(node.price) + self.transfer[way])
    }

    fn choose(&self, need: &Need, turn: u32, found: &mut Vec<Found>, judged: &mut u64) -> Option<Found> {
        found.clear();
        let exact = |slot: SlotId| {
            *judged += 1;
            let node = &self.nodes[slot.0 as usize];
            node.holds(need).then(|| self.score(need, node))
        };
        let costs = &self.costs[usize::from(need.costs)];
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

#[derive(Clone, Copy)]
struct Running {
    node: u32,
    share: u8,
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
        // The queue is known: what the request after next will need is fetched meanwhile.
        let later = &self.world.needs[((i + 2) % self.world.needs.len() as u64) as usize];
        self.world.costs[usize::from(later.costs)].touch();
        match self.world.choose(&need, turn, &mut self.found, &mut self.judged) {
            Some(found) => {
                let node = &mut self.world.nodes[found.slot.0 as usize];
                let taken = node.take(&need);
                let level = self.world.levels[node.holding()];
                self.world.index.set_level(found.slot, level);
                self.used += u64::from(need.share) * u64::from(taken.count_ones());
                self.running.push(Running {
                    node: found.slot.0,
                    share: need.share,
                    taken,
                });
            }
            None => self.unplaced += 1,
        }
    }

    /// Jobs end in small groups, as a scheduler hears of them.
    fn depart(&mut self) {
        let target = self.world.gpus * LOAD_PERCENT / 100;
        let mean = self.used / self.running.len().max(1) as u64;
        if self.used <= target + mean * GONE as u64 {
            return;
        }
        let mut gone = [Running {
            node: 0,
            share: 0,
            taken: 0,
        }; GONE];
        let mut draw = [0; GONE];
        for (i, at) in draw.iter_mut().enumerate() {
            *at = self.rng.below((self.running.len() - i) as u64) as usize;
        }
        for (gone, at) in gone.iter_mut().zip(draw) {
            *gone = self.running.swap_remove(at);
        }
        // Side by side, as the index does with what it needs of them.
        let seen = gone
            .iter()
            .fold(0, |seen, gone| seen ^ self.world.nodes[gone.node as usize].price);
        std::hint::black_box(seen);
        let mut changes = [(SlotId(0), Level::NONE); GONE];
        for (gone, change) in gone.iter().zip(&mut changes) {
            let node = &mut self.world.nodes[gone.node as usize];
            node.give_back(gone);
            *change = (SlotId(gone.node), self.world.levels[node.holding()]);
            self.used -= u64::from(gone.share) * u64::from(gone.taken.count_ones());
        }
        self.world.index.set_levels(&changes);
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
    let m = measure(inventory, 80, 4_000_000);
    print("place_argmin", &m, "3 M decisions/s, p99 2000 ns, all equal")
}

pub(crate) fn place_1m(inventory: &Inventory) -> Value {
    // A kernel may count a thread's time in steps of 4 ms: so many arrivals that these do not matter, and that most of
    // what ran at first has left: a world just filled is kinder to the cache.
    let small = measure(inventory, 80, 4_000_000);
    let m = measure(inventory, 800, 4_000_000);
    let share = m.rate / small.rate;
    let mut value = print(
        "place_1m",
        &m,
        "0.8 of the rate with a tenth of the nodes, 100 bytes per node",
    );
    println!(
        "place_1m: {share:.2} of the rate at {} nodes in the same run, {:.2} M decisions/s",
        small.nodes,
        small.rate / 1e6,
    );
    value["rate_share"] = share.into();
    value
}
