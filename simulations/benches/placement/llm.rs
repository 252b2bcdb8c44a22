//! `llm_route`: an hour of real questions, once, ten and a hundred times over, on mixed machines in twenty countries.
//!
//! Karez's own market, matcher and routing rule send each question to a free device, or keep it until one is free;
//! beside it, on the same machines and with the same times of service, each question joins the shortest queue at once.
//! A device answers one question at a time: it reads the prompt, then writes.
use crate::{inventory::Inventory, load};
use karez_core::{
    artifact::{ArtifactKind, ArtifactRef},
    id::{Country, Digest},
    key::{NodeId, PublicKey, SecretKey},
    market::Market,
    placement::{Matcher, Policy, Request},
    records::{Constraints, Device, Engine, NodeState, Offer, OwnerPolicy, Signed, WorkKind},
    routing::{self, Hearth, Prefix, Question, Route, Warmth},
    unit::{Bytes, Credits, Millis, MonoMillis, Now, Portion, Rate, Speed, UtcMillis},
};
use karez_simulations::{
    geo::Links,
    rng::Rng,
    traces::{
        TraceError, azure, latency,
        market::{self, GpuOffer},
    },
};
use serde_json::{Value, json};
use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque},
    time::Instant,
};

/// The model: eight thousand million weights, in about five bits each.
const WEIGHTS: f64 = 8e9;
const MODEL_BYTES: u64 = 5_000_000_000;
/// What an answer may have at most: nobody knows beforehand how long it will be.
const ANSWER_MAX: u64 = 1_000;
/// The share of its bandwidth that a device writes with, and of its arithmetic that it reads with.
const WRITES: f64 = 0.5;
const READS: f64 = 0.4;

/// Model of GPU; GB/s of memory, TFLOP/s dense in 16 bits, GiB, after the makers' data sheets; dollars an hour, for worlds
/// without prices.
const GPUS: [(&str, f64, f64, u64, f64); 19] = [
    ("B200", 8_000.0, 2_250.0, 179, 4.7),
    ("H200", 4_800.0, 989.0, 140, 2.6),
    ("H100", 3_350.0, 989.0, 80, 2.1),
    ("A100", 1_555.0, 312.0, 40, 0.78),
    ("L40S", 864.0, 362.0, 45, 0.6),
    ("A40", 696.0, 150.0, 45, 0.67),
    ("V100", 900.0, 125.0, 16, 0.11),
    ("RTX6000-Ada", 960.0, 364.0, 48, 0.37),
    ("RTXPRO6000S", 1_597.0, 480.0, 95, 1.13),
    ("RTXA6000", 768.0, 155.0, 48, 0.43),
    ("RTXA2000", 288.0, 32.0, 6, 0.67),
    ("RTX5090", 1_792.0, 210.0, 32, 0.47),
    ("RTX4090", 1_008.0, 165.0, 24, 0.37),
    ("RTX4070", 504.0, 58.0, 16, 0.18),
    ("RTX4060", 272.0, 30.0, 16, 0.13),
    ("RTX3090", 936.0, 71.0, 24, 0.17),
    ("RTX3080", 760.0, 59.0, 10, 0.09),
    ("RTX3070", 448.0, 40.0, 8, 0.48),
    ("RTX3060", 360.0, 25.0, 12, 0.18),
];

/// Where questions come from, and machines stand in worlds without a marketplace.
const COUNTRIES: [&str; 20] = [
    "US", "CA", "FR", "DE", "GB", "IT", "SE", "FI", "JP", "AU", "IN", "KE", "NG", "ZA", "BR", "AR", "MX",
    "ID", "VN", "TH",
];
const EUROPE: [&str; 12] = [
    "BG", "DE", "FI", "FR", "GB", "HR", "HU", "IS", "IT", "RO", "SE", "SI",
];

/// What a question may be bound to; the shares of them, in thousandths: data that stays in Europe, a budget under which
/// the dear half of the market lies.
const BOUND: [u64; 3] = [700, 200, 100];
const CHEAP: f64 = 0.5;

/// Seconds after the last question within which its answer is there, on the slowest machines too.
const LAST_S: f64 = 30.0;
/// Steps in which the bound on what any rule spends is drawn up.
const STEPS: u32 = 60;

struct Machine {
    offer: GpuOffer,
    country: Country,
    secret: SecretKey,
    id: NodeId,
    /// Tokens per second.
    reads: f64,
    writes: f64,
}

impl Machine {
    /// Microseconds until the first token is written, and until the last.
    fn serves(&self, asked: &Asked) -> (u64, u64) {
        let first = f64::from(asked.reads) / self.reads + 1.0 / self.writes;
        let all = first + f64::from(asked.writes.max(1) - 1) / self.writes;
        ((first * 1e6) as u64, (all * 1e6) as u64)
    }

    fn dollars_a_second(&self) -> f64 {
        self.offer.usd / 3_600.0
    }

    fn admits(&self, bound: usize) -> bool {
        match bound {
            0 => true,
            1 => EUROPE.contains(&self.offer.country.as_str()),
            _ => self.offer.usd <= CHEAP,
        }
    }
}

/// One question.
#[derive(Clone, Copy)]
struct Asked {
    at_us: u64,
    reads: u32,
    writes: u32,
    from: usize,
    /// Which of [`BOUND`].
    bound: usize,
}

/// Tokens to read and to write.
struct Shape {
    reads: f64,
    writes: f64,
}

impl Shape {
    /// Seconds on a device of that machine.
    fn on(&self, machine: &Machine) -> f64 {
        self.reads / machine.reads + self.writes / machine.writes
    }
}

/// What all questions cost at least, as far as some prices tell.
struct Bound {
    dollars: f64,
    rates: Vec<f64>,
    /// By model: what is asked of it beyond what it has, as a share of both; negative where it has more.
    excess: Vec<f64>,
}

struct World<'a> {
    machines: &'a [Machine],
    links: &'a Links,
    asked: Vec<Asked>,
}

#[derive(Default)]
struct Outcome {
    /// Milliseconds to the first token, sorted.
    first_ms: Vec<f64>,
    dollars: f64,
    /// Device time, in seconds.
    busy_s: f64,
    unplaced: usize,
    decisions_per_s: f64,
}

impl Outcome {
    fn quantile(&self, share: f64) -> f64 {
        let at = (self.first_ms.len() as f64 * share) as usize;
        self.first_ms
            .get(at.min(self.first_ms.len().saturating_sub(1)))
            .copied()
            .unwrap_or(f64::NAN)
    }
}

/// The trace and the marketplace, or what stands in for them.
struct Sources {
    requests: Vec<azure::Request>,
    offers: Vec<GpuOffer>,
    links: Links,
    source: String,
}

fn sources(inventory: &Inventory) -> Result<Sources, TraceError> {
    if let Some(folder) = &inventory.folder {
        return Ok(Sources {
            requests: azure::requests(&folder.azure_llm())?,
            offers: market::offers(&folder.gpu_market())?,
            links: Links::measured(latency::round_trips(&folder.latency())?),
            source: "the trace azure_llm_conv, offers of a GPU marketplace, measured round trips".into(),
        });
    }
    // After the published means of the same hour: 5.4 questions a second, 1,155 tokens to read, 211 to write.
    let mut rng = Rng::new(11);
    let mut unit = move || (rng.below(1 << 32) + 1) as f64 / (1u64 << 32) as f64;
    let mut at = 0.0;
    let requests = (0..19_366)
        .map(|_| {
            at += -unit().ln() * 1_000.0 / 5.4;
            azure::Request {
                at_ms: at as u64,
                context_tokens: (-unit().ln() * 1_155.0) as u32 + 1,
                generated_tokens: ((-unit().ln() * 211.0) as u32 + 1).min(1_000),
            }
        })
        .collect();
    let offers = (0..120)
        .map(|i| {
            let (model, _, _, gib, usd) = GPUS[i % GPUS.len()];
            GpuOffer {
                model: model.into(),
                gpus: [1, 2, 4, 8][i % 4],
                memory_mib: gib << 10,
                usd: usd * (0.7 + 0.6 * unit()),
                country: COUNTRIES[(i * 7) % 20].into(),
            }
        })
        .collect();
    Ok(Sources {
        requests,
        offers,
        links: Links::default(),
        source:
            "a generator after the published means of the Azure trace; list prices (no data folder given)"
                .into(),
    })
}

/// Questions as they come: the trace so many times over, of its first so many minutes.
fn traffic(sources: &Sources, scale: usize, minutes: u64, rng: &mut Rng) -> Vec<Asked> {
    let mut asked = Vec::new();
    for copy in 0..scale {
        for request in sources.requests.iter().take_while(|r| r.at_ms < minutes * 60_000) {
            // Copies of one question come within the same minute, not together.
            let later = if copy == 0 { 0 } else { rng.below(60_000_000) };
            let draw = rng.below(1_000);
            asked.push(Asked {
                at_us: request.at_ms * 1_000 + later,
                reads: request.context_tokens,
                writes: request.generated_tokens,
                from: rng.below(20) as usize,
                bound: usize::from(draw >= BOUND[0]) + usize::from(draw >= BOUND[0] + BOUND[1]),
            });
        }
    }
    asked.sort_by_key(|a| a.at_us);
    asked
}

/// Machines drawn from the marketplace that could answer so many questions a second between them.
fn fleet(sources: &Sources, wanted: f64, rng: &mut Rng) -> Vec<Machine> {
    let fits: Vec<&GpuOffer> = sources
        .offers
        .iter()
        .filter(|o| o.memory_mib << 20 > MODEL_BYTES)
        .collect();
    let (mut machines, mut able): (Vec<Machine>, f64) = (Vec::new(), 0.0);
    while able < wanted {
        let mut offer = fits[rng.below(fits.len() as u64) as usize].clone();
        let gpu = GPUS.iter().find(|(name, ..)| *name == offer.model);
        let (Some((_, gbs, tflops, _, _)), Ok(country)) = (gpu, offer.country.parse()) else {
            continue;
        };
        offer.usd *= rng.between(85, 115) as f64 / 100.0;
        let name = format!("machine {}", machines.len());
        let secret = SecretKey::from_bytes(&Digest::of(name.as_bytes()).0);
        let machine = Machine {
            country,
            id: NodeId(PublicKey::of(&secret)),
            secret,
            reads: tflops * 1e12 * READS / (2.0 * WEIGHTS),
            writes: gbs * 1e9 * WRITES / MODEL_BYTES as f64,
            offer,
        };
        able += f64::from(machine.offer.gpus) * 1e6 / machine.serves(&USUAL).1 as f64;
        machines.push(machine);
    }
    machines
}

/// A question with the means of the whole trace, by which fleets are sized.
const USUAL: Asked = Asked {
    at_us: 0,
    reads: 1_155,
    writes: 211,
    from: 0,
    bound: 0,
};

impl World<'_> {
    /// What all questions ask for, of what all devices could give.
    fn load(&self) -> f64 {
        let mean = self.mean();
        let able: f64 = self
            .machines
            .iter()
            .map(|m| f64::from(m.offer.gpus) / mean.on(m))
            .sum();
        self.asked.len() as f64 / (able * self.length_us() / 1e6)
    }

    fn length_us(&self) -> f64 {
        self.asked.last().map_or(1.0, |a| a.at_us as f64)
    }

    fn mean(&self) -> Shape {
        let count = self.asked.len().max(1) as f64;
        let sum = |of: fn(&Asked) -> u32| self.asked.iter().map(|a| f64::from(of(a))).sum::<f64>();
        Shape {
            reads: sum(|a| a.reads) / count,
            writes: sum(|a| a.writes.max(1)) / count,
        }
    }

    /// No rule spends less, wherever questions may go, however long they wait and whatever it knows of answers beforehand:
    /// put any price on a second of each device, let each question go where it is cheapest with that price, and take off
    /// what all devices would earn by it if they were never idle (weak duality). Tried are prices that make all cheaper
    /// models equal to one of them for the mean question; the best of these then rise where more is asked for than there
    /// is, and fall elsewhere.
    fn least_dollars(&self) -> f64 {
        let mut models: BTreeMap<&str, Vec<&Machine>> = BTreeMap::new();
        for machine in self.machines {
            models.entry(&machine.offer.model).or_default().push(machine);
        }
        let models: Vec<Vec<&Machine>> = models.into_values().collect();
        let mean = self.mean();
        let costs = self.machines.iter().map(|m| m.dollars_a_second() * mean.on(m));
        let mut costs: Vec<f64> = costs.collect();
        costs.sort_by(f64::total_cmp);
        let levels = costs.iter().step_by(costs.len().div_ceil(24).max(1));
        let equal = levels.map(|level| {
            let rates = models.iter().map(|model| level / mean.on(model[0]));
            self.least_at(&models, rates.collect())
        });
        let Some(mut at) = equal.max_by(|a, b| a.dollars.total_cmp(&b.dollars)) else {
            return 0.0;
        };
        let mut best = at.dollars;
        for step in 0..STEPS {
            let rates = at.rates.iter().zip(&at.excess);
            let size = 0.04 / (1.0 + f64::from(step) / 8.0);
            at = self.least_at(
                &models,
                rates.map(|(rate, excess)| rate * (1.0 + size * excess)).collect(),
            );
            best = best.max(at.dollars);
        }
        best
    }

    /// The bound with these prices of a second on a device of each model, what its owner asks included.
    fn least_at(&self, models: &[Vec<&Machine>], mut rates: Vec<f64>) -> Bound {
        for (rate, model) in rates.iter_mut().zip(models) {
            let asked = model.iter().map(|m| m.dollars_a_second());
            *rate = asked.fold(f64::INFINITY, f64::min).max(*rate);
        }
        let (mut dollars, mut busy) = (0.0, vec![0.0; models.len()]);
        for asked in &self.asked {
            let shape = Shape {
                reads: asked.reads.into(),
                writes: asked.writes.max(1).into(),
            };
            let mut least = (f64::INFINITY, 0, 0.0);
            for (k, (rate, model)) in rates.iter().zip(models).enumerate() {
                let time = shape.on(model[0]);
                if rate * time < least.0 {
                    least = (rate * time, k, time);
                }
            }
            dollars += least.0;
            busy[least.1] += least.2;
        }
        let mut excess = Vec::new();
        for ((rate, model), busy) in rates.iter().zip(models).zip(busy) {
            let mut able = 0.0;
            for machine in model.iter().filter(|m| m.dollars_a_second() < *rate) {
                // A rule may also use what devices do until the last answers are written.
                let all = f64::from(machine.offer.gpus) * (self.length_us() / 1e6 + LAST_S);
                able += all;
                dollars -= (rate - machine.dollars_a_second()) * all;
            }
            excess.push((busy - able) / (busy + able).max(1.0));
        }
        Bound {
            dollars,
            rates,
            excess,
        }
    }

    /// Milliseconds there and back.
    fn trip(&self, asked: &Asked, machine: &Machine) -> f64 {
        let Ok(from) = COUNTRIES[asked.from].parse() else {
            return 0.0;
        };
        2.0 * self.links.delay(&from, &machine.country).base as f64
    }

    /// Counts an answer that a device began at `begins`; says when the device is free again.
    fn answer(&self, asked: &Asked, machine: &Machine, begins: u64, out: &mut Outcome) -> u64 {
        let (first, all) = machine.serves(asked);
        out.first_ms
            .push((begins + first - asked.at_us) as f64 / 1e3 + self.trip(asked, machine));
        out.dollars += machine.offer.usd * all as f64 / 3.6e9;
        out.busy_s += all as f64 / 1e6;
        begins + all
    }

    /// Each question goes at once to a machine that may answer it with the fewest questions per device, whichever comes first of equals.
    fn shortest_queue(&self, seed: u64) -> Outcome {
        let mut rng = Rng::new(seed);
        let mut out = Outcome::default();
        let lists: Vec<Vec<usize>> = (0..BOUND.len())
            .map(|bound| {
                (0..self.machines.len())
                    .filter(|i| self.machines[*i].admits(bound))
                    .collect()
            })
            .collect();
        // When each device of a machine is free again, and what is there.
        let mut free: Vec<BinaryHeap<Reverse<u64>>> = self
            .machines
            .iter()
            .map(|m| (0..m.offer.gpus).map(|_| Reverse(0)).collect())
            .collect();
        let mut there = vec![0u32; self.machines.len()];
        let mut gone: BinaryHeap<Reverse<(u64, usize)>> = BinaryHeap::new();
        for asked in &self.asked {
            while let Some(Reverse((at, i))) = gone.peek().copied()
                && at <= asked.at_us
            {
                gone.pop();
                there[i] -= 1;
            }
            let list = &lists[asked.bound];
            if list.is_empty() {
                out.unplaced += 1;
                continue;
            }
            // In thousandths; from another place each time, so that equals take turns.
            let length = |i: usize| there[i] * 1_000 / self.machines[i].offer.gpus;
            let start = rng.below(list.len() as u64) as usize;
            let mut best = (u32::MAX, 0);
            for i in list[start..].iter().chain(&list[..start]) {
                let length = length(*i);
                if length < best.0 {
                    best = (length, *i);
                    if length == 0 {
                        break;
                    }
                }
            }
            let machine = &self.machines[best.1];
            let Some(Reverse(at)) = free[best.1].pop() else {
                continue;
            };
            let until = self.answer(asked, machine, at.max(asked.at_us), &mut out);
            free[best.1].push(Reverse(until));
            there[best.1] += 1;
            gone.push(Reverse((until, best.1)));
        }
        out.first_ms.sort_by(f64::total_cmp);
        out
    }

    /// As schedulers do: the real market, matcher and routing rule; what finds no free device waits its turn.
    fn karez(&self) -> Outcome {
        let now = Now {
            utc: UtcMillis(1_000_000),
            mono: MonoMillis(1_000),
        };
        let model = ArtifactRef {
            digest: Digest::of(b"a model"),
            bytes: Bytes(MODEL_BYTES),
            kind: ArtifactKind::Blob,
        };
        let (mut market, mut hearth) = (Market::new(Policy::default()), Hearth::default());
        let warm = Warmth {
            models: vec![model.digest],
            prefixes: Vec::new(),
        };
        for (i, machine) in self.machines.iter().enumerate() {
            let Ok(()) = list(&mut market, now, machine, i, &model) else {
                continue;
            };
            hearth.tell(machine.id, now.mono, &warm);
        }
        let bounds: Vec<Constraints> = (0..BOUND.len())
            .map(|bound| {
                let mut c = Constraints::ANY;
                match bound {
                    0 => {}
                    1 => c.countries = EUROPE.iter().filter_map(|code| code.parse().ok()).collect(),
                    _ => c.rate_max = Some(Rate((CHEAP * 1e6) as u64)),
                }
                c
            })
            .collect();
        let mut shop = Shop {
            world: self,
            market,
            hearth,
            model,
            by_id: self.machines.iter().enumerate().map(|(i, m)| (m.id, i)).collect(),
            out: Outcome::default(),
            ends: BinaryHeap::new(),
            tried: 0,
        };
        let began = Instant::now();
        let mut queues: Vec<VecDeque<usize>> = vec![VecDeque::new(); BOUND.len()];
        let mut next = 0;
        loop {
            let arrives = self.asked.get(next).map(|a| a.at_us);
            let ends = shop.ends.peek().map(|Reverse((at, _))| *at);
            let at = match (arrives, ends) {
                (Some(a), Some(e)) if a < e => a,
                (Some(a), None) => a,
                (_, Some(e)) => e,
                (None, None) => break,
            };
            if Some(at) == ends && arrives != Some(at) {
                if let Some(Reverse((_, i))) = shop.ends.pop() {
                    let machine = &self.machines[i];
                    shop.market
                        .give_back(&machine.id, &class_of(machine), Portion::ONE);
                }
            } else {
                queues[self.asked[next].bound].push_back(next);
                next += 1;
            }
            // The oldest first; where one of a kind finds nothing, none of its kind does.
            let mut kinds: BTreeSet<(usize, usize)> = BTreeSet::new();
            for (bound, queue) in queues.iter().enumerate() {
                kinds.extend(queue.front().map(|first| (*first, bound)));
            }
            while let Some((first, bound)) = kinds.pop_first() {
                if shop.send(at, first, &bounds[bound]) {
                    queues[bound].pop_front();
                    kinds.extend(queues[bound].front().map(|first| (*first, bound)));
                }
            }
        }
        let mut out = shop.out;
        out.unplaced = queues.iter().map(VecDeque::len).sum();
        out.decisions_per_s = shop.tried as f64 / began.elapsed().as_secs_f64();
        out.first_ms.sort_by(f64::total_cmp);
        out
    }
}

fn class_of(machine: &Machine) -> String {
    format!("cuda/{}", machine.offer.model)
}

fn list(
    market: &mut Market,
    now: Now,
    machine: &Machine,
    i: usize,
    model: &ArtifactRef,
) -> Result<(), String> {
    let mixed = 1_155.0 / machine.reads + 211.0 / machine.writes;
    let offer = Offer {
        node: machine.id,
        name: format!("n{i}"),
        institution: format!("uni-{}", i % 40).parse().map_err(|_| "institution")?,
        country: machine.country,
        devices: vec![Device {
            class: class_of(machine),
            count: machine.offer.gpus,
            free: machine.offer.gpus,
            memory: Bytes(machine.offer.memory_mib << 20),
            rate: Rate((machine.offer.usd * 1e6) as u64),
            share_min: 0,
            shared: Vec::new(),
        }],
        engines: vec![Engine {
            name: "llama.cpp".into(),
            version: "1".into(),
            work: WorkKind::Generate,
            // As a probe measures it: tokens read and written in the time of a usual answer.
            speed: Speed((1_366.0 / mixed * 1_000.0) as u64),
            method: "probe/1".into(),
        }],
        cores: 16,
        memory: Bytes(64 << 30),
        isa: "x86-64-v3".into(),
        isolation: "landlock".into(),
        cached: vec![model.digest],
        artifact_addrs: Vec::new(),
        sequence: 1,
        issued_at: now.utc,
        expires_at: now.utc.after(Millis(3_600_000)),
        state: NodeState::Open,
        terms: OwnerPolicy::default(),
    };
    let offer = Signed::sign(offer, &machine.secret);
    market.hear(now, machine.id.0, offer).map_err(|e| e.to_string())?;
    market.set_connected(machine.id, true);
    Ok(())
}

/// A scheduler's part of the run.
struct Shop<'a> {
    world: &'a World<'a>,
    market: Market,
    hearth: Hearth,
    model: ArtifactRef,
    by_id: BTreeMap<NodeId, usize>,
    out: Outcome,
    ends: BinaryHeap<Reverse<(u64, usize)>>,
    tried: u64,
}

impl Shop<'_> {
    /// Sends one question to the node that placement and routing choose. Says whether there was one.
    fn send(&mut self, at: u64, which: usize, constraints: &Constraints) -> bool {
        let asked = &self.world.asked[which];
        let request = Request {
            kind: WorkKind::Generate,
            units: u64::from(asked.reads) + ANSWER_MAX,
            model: Some(self.model),
            artifacts: vec![(self.model.digest, self.model.bytes)],
            constraints,
            memory: self.model.bytes,
            ceiling: Credits(u64::MAX),
            turn: (which as u32).wrapping_mul(0x9e37_79b9),
            waited_for: true,
            ..Request::default()
        };
        self.tried += 1;
        let Some(plan) = Matcher::new(&self.market, &request).place(&self.market, &request) else {
            return false;
        };
        let question = Question {
            request: &request,
            model: &self.model,
            prefix: &Prefix::default(),
            age: Millis((at - asked.at_us) / 1_000),
        };
        let Route::Go(plan) = routing::route(MonoMillis(1_000), &self.market, &self.hearth, &question, plan)
        else {
            return false;
        };
        let i = self.by_id[&plan.chosen.node];
        let machine = &self.world.machines[i];
        self.market
            .take(&machine.id, &plan.chosen.device_class, Portion::ONE);
        let until = self.world.answer(asked, machine, at, &mut self.out);
        self.ends.push(Reverse((until, i)));
        true
    }
}

/// What is run: times the trace, its minutes, and the load of a hundred times the trace on the same machines.
const RUNS: [(usize, u64, f64); 4] = [(1, 60, 0.5), (10, 60, 0.5), (100, 15, 0.5), (100, 15, 0.8)];

pub(crate) fn llm_route(inventory: &Inventory) -> Value {
    let sources = match sources(inventory) {
        Ok(sources) => sources,
        Err(why) => {
            eprintln!("{why}");
            std::process::exit(1);
        }
    };
    println!("llm_route: questions from {}", sources.source);
    let hour = sources.requests.last().map_or(1.0, |r| r.at_ms as f64 / 1_000.0);
    let mut rows = Vec::new();
    for (scale, minutes, full) in RUNS {
        let wanted = 100.0 * sources.requests.len() as f64 / hour / full;
        let machines = fleet(&sources, wanted, &mut Rng::new(3));
        let world = World {
            machines: &machines,
            links: &sources.links,
            asked: traffic(&sources, scale, minutes, &mut Rng::new(scale as u64)),
        };
        rows.push(compare(&world, scale));
    }
    json!({ "rows": rows, "questions": sources.source, "aim_p99_ratio": 1.0, "aim_cost_ratio": 0.7 })
}

fn compare(world: &World<'_>, scale: usize) -> Value {
    let (ours, peer) = (world.karez(), world.shortest_queue(5));
    let countries: BTreeSet<&str> = world.machines.iter().map(|m| m.offer.country.as_str()).collect();
    let devices: u32 = world.machines.iter().map(|m| m.offer.gpus).sum();
    let asked = world.asked.len();
    let bound = world.asked.iter().filter(|a| a.bound > 0).count() as f64 / asked as f64;
    let (first, cost) = (
        ours.quantile(0.99) / peer.quantile(0.99),
        ours.dollars / peer.dollars,
    );
    let least = world.least_dollars() / peer.dollars;
    println!(
        "llm_route: {scale} x the trace, {asked} questions in {:.0} min on {devices} devices of {} machines in {} countries, load \
         {:.3}, constrained {bound:.2}",
        world.length_us() / 6e7,
        world.machines.len(),
        countries.len(),
        world.load(),
    );
    for (name, run) in [("Karez", &ours), ("joining the shortest queue", &peer)] {
        println!(
            "  {name}: first token p50 {:.0} ms, p99 {:.0} ms; ${:.2}; devices busy {:.3}; unplaced {}",
            run.quantile(0.5),
            run.quantile(0.99),
            run.dollars,
            run.busy_s * 1e6 / (world.length_us() * f64::from(devices)),
            run.unplaced,
        );
    }
    println!(
        "  {first:.2} of its p99 [aim 1] at {cost:.2} of its cost [aim 0.7; no rule can be under {least:.2}]; {:.0} decisions/s; \
         machine load {}",
        ours.decisions_per_s,
        load(),
    );
    json!({
        "scale": scale, "questions": asked, "devices": devices, "machines": world.machines.len(), "load": world.load(),
        "constrained": bound, "p50_ms": ours.quantile(0.5), "p99_ms": ours.quantile(0.99), "dollars": ours.dollars,
        "unplaced": ours.unplaced, "jsq_p50_ms": peer.quantile(0.5), "jsq_p99_ms": peer.quantile(0.99),
        "jsq_dollars": peer.dollars, "jsq_unplaced": peer.unplaced, "p99_ratio": first, "cost_ratio": cost,
        "least_cost_ratio": least, "decisions_per_s": ours.decisions_per_s,
    })
}
