//! `frag`: jobs of the trace arrive until the machines are full; how much of the devices is in use then.
//!
//! Peers, both ours: fragmentation-gradient descent as its authors describe it (the first of equal nodes), and best fit.
use crate::{
    inventory::{Inventory, MODELS},
    median,
};
use karez_core::placement::pack::{DEVICES, Fit, Mix, Need, Room, best};
use karez_simulations::rng::Rng;
use serde_json::{Value, json};
use std::collections::HashMap;

/// Jobs go on arriving until they ask for so many percent of all devices.
const DEMAND_PERCENT: u64 = 130;
/// So many kinds of work make the mix.
const KINDS: usize = 300;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Rule {
    Ours,
    Gradient,
    BestFit,
}

struct Outcome {
    /// Share of devices in use when as much was asked for as there is, and in the end.
    at_full: f64,
    at_end: f64,
    unplaced: f64,
}

struct Cluster {
    rooms: Vec<Room>,
    /// What [`Mix::stranded`] says of each.
    stranded: Vec<i64>,
    /// How often each has changed.
    changes: Vec<u32>,
    mix: Mix,
    /// By kind of work: the choice on each room, and after how many changes it was made.
    known: HashMap<Need, Vec<(u32, Option<Fit>)>>,
    /// What the largest node has, for best fit.
    cpu_max: u64,
    memory_max: u64,
}

impl Cluster {
    fn new(rooms: Vec<Room>, mix: Mix) -> Self {
        Self {
            stranded: rooms.iter().map(|room| mix.stranded(room)).collect(),
            changes: vec![0; rooms.len()],
            cpu_max: rooms.iter().map(|r| r.cpu_milli).max().unwrap_or(1).max(1),
            memory_max: rooms.iter().map(|r| r.memory_mib).max().unwrap_or(1).max(1),
            rooms,
            mix,
            known: HashMap::new(),
        }
    }

    fn choose(&mut self, rule: Rule, need: &Need) -> Option<(usize, Fit)> {
        if rule == Rule::BestFit {
            return self.best_fit(need);
        }
        let count = self.rooms.len();
        let known = self
            .known
            .entry(*need)
            .or_insert_with(|| vec![(u32::MAX, None); count]);
        let mut chosen: Option<(usize, Fit)> = None;
        for (i, (when, fit)) in known.iter_mut().enumerate() {
            if *when != self.changes[i] {
                *when = self.changes[i];
                *fit = best(&self.rooms[i], self.stranded[i], need, &self.mix);
            }
            let Some(fit) = *fit else { continue };
            let better = chosen.is_none_or(|(_, known)| match rule {
                Rule::Ours => fit < known,
                _ => fit.stranded < known.stranded,
            });
            if better {
                chosen = Some((i, fit));
            }
        }
        chosen
    }

    /// The node that would have least left of everything, and the device that would.
    fn best_fit(&self, need: &Need) -> Option<(usize, Fit)> {
        let rooms = self.rooms.iter().enumerate().filter(|(_, room)| room.holds(need));
        let chosen = rooms.min_by_key(|(_, room)| {
            let devices =
                u64::from(room.devices.iter().sum::<u32>() - need.devices * need.share) / DEVICES as u64;
            let cpu = (room.cpu_milli - need.cpu_milli) * 1_000 / self.cpu_max;
            devices + cpu + (room.memory_mib - need.memory_mib) * 1_000 / self.memory_max
        });
        let (at, room) = chosen?;
        let mut fits: Vec<usize> = (0..DEVICES).filter(|i| room.devices[*i] >= need.share).collect();
        fits.sort_by_key(|i| room.devices[*i]);
        let taken = fits
            .iter()
            .take(need.devices as usize)
            .fold(0, |mask, i| mask | 1 << i);
        Some((
            at,
            Fit {
                stranded: 0,
                left: 0,
                skew: 0,
                taken,
            },
        ))
    }

    fn take(&mut self, at: usize, need: &Need, taken: u8) {
        self.rooms[at] = self.rooms[at].after(need, taken);
        self.stranded[at] = self.mix.stranded(&self.rooms[at]);
        self.changes[at] += 1;
    }
}

fn run(rooms: &[Room], needs: &[Need], rule: Rule, seed: u64) -> Outcome {
    let mut cluster = Cluster::new(rooms.to_vec(), Mix::of(needs, KINDS));
    let mut rng = Rng::new(seed);
    let all: u64 = rooms.iter().flat_map(|r| r.devices).map(u64::from).sum();
    let (mut asked, mut used, mut jobs, mut unplaced) = (0u64, 0u64, 0u64, 0u64);
    let mut at_full = 0.0;
    while asked * 100 < all * DEMAND_PERCENT {
        let need = needs[rng.below(needs.len() as u64) as usize];
        let size = u64::from(need.devices * need.share);
        if asked <= all && asked + size > all {
            at_full = used as f64 / all as f64;
        }
        asked += size;
        jobs += 1;
        match cluster.choose(rule, &need) {
            Some((at, fit)) => {
                cluster.take(at, &need, fit.taken);
                used += size;
            }
            None => unplaced += 1,
        }
    }
    Outcome {
        at_full,
        at_end: used as f64 / all as f64,
        unplaced: unplaced as f64 / jobs as f64,
    }
}

pub(crate) fn frag(inventory: &Inventory) -> Value {
    let class = |name: &str| MODELS.iter().position(|(model, _)| *model == name);
    let rooms: Vec<Room> = inventory
        .machines
        .iter()
        .filter_map(|m| {
            let mut devices = [0; DEVICES];
            devices[..(m.gpus as usize).min(DEVICES)].fill(1_000);
            let class = if m.gpus == 0 { 63 } else { class(&m.model)? as u8 };
            Some(Room {
                cpu_milli: m.cpu_milli,
                memory_mib: m.memory_mib,
                devices,
                class,
            })
        })
        .collect();
    let needs: Vec<Need> = inventory
        .pods
        .iter()
        .filter(|p| p.gpus as usize <= DEVICES)
        .map(|p| {
            let named = p
                .models
                .iter()
                .filter_map(|m| class(m))
                .fold(0u64, |mask, m| mask | 1 << m);
            Need {
                cpu_milli: p.cpu_milli,
                memory_mib: p.memory_mib,
                devices: p.gpus,
                share: if p.gpus == 1 {
                    p.gpu_milli.clamp(1, 1_000)
                } else {
                    1_000
                },
                classes: if named == 0 { u64::MAX } else { named },
            }
        })
        .collect();
    let constrained = needs.iter().filter(|n| n.classes != u64::MAX).count() as f64 / needs.len() as f64;
    let shared = needs.iter().filter(|n| n.share < 1_000).count() as f64 / needs.len() as f64;
    let measured = |rule| {
        let runs: Vec<Outcome> = (1..=3).map(|seed| run(&rooms, &needs, rule, seed)).collect();
        let of = |f: fn(&Outcome) -> f64| median(runs.iter().map(f).collect());
        Outcome {
            at_full: of(|r| r.at_full),
            at_end: of(|r| r.at_end),
            unplaced: of(|r| r.unplaced),
        }
    };
    let [ours, gradient, fit] = [Rule::Ours, Rule::Gradient, Rule::BestFit].map(measured);
    println!(
        "frag: {} machines, {:.0} % of jobs constrained, {:.0} % want a share of a device, medians of 3: {:.2} % of all devices in \
         use when {DEMAND_PERCENT} % were asked for ({:.2} % at 100 %; {:.1} % of jobs unplaced), gradient descent {:.2} % ({:.2} %; {:.1} %), best \
         fit {:.2} % ({:.2} %; {:.1} %) [aim: no less than gradient descent]",
        rooms.len(),
        constrained * 100.0,
        shared * 100.0,
        ours.at_end * 100.0,
        ours.at_full * 100.0,
        ours.unplaced * 100.0,
        gradient.at_end * 100.0,
        gradient.at_full * 100.0,
        gradient.unplaced * 100.0,
        fit.at_end * 100.0,
        fit.at_full * 100.0,
        fit.unplaced * 100.0,
    );
    let row = |o: &Outcome| json!({ "allocated": o.at_end, "allocated_at_100": o.at_full, "unplaced_share": o.unplaced });
    json!({
        "machines": rooms.len(), "constrained_share": constrained, "demand_percent": DEMAND_PERCENT, "ours": row(&ours),
        "gradient_descent": row(&gradient), "best_fit": row(&fit), "aim": "no less than gradient descent",
    })
}
