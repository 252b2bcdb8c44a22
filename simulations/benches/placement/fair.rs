//! `fair`: twenty institutions, one of which floods the queue.
use crate::inventory::Inventory;
use karez_core::{
    fair::{FairShare, Shares},
    id::{Digest, Institution, JobId},
    key::{NodeId, PublicKey, SchedulerId, SecretKey, UserId},
    records::Receipt,
    unit::{Credits, DeviceMillis, Millis, UtcMillis},
};
use karez_simulations::rng::Rng;
use serde_json::{Value, json};
use std::collections::{BTreeMap, VecDeque};

const INSTITUTIONS: usize = 20;
const DEVICES: usize = 200;
const HOUR: u64 = 3_600_000;
const HALF_LIFE: u64 = 24 * HOUR;

struct Run {
    /// Of all device time, weighed by its age as fair share does, what each had by the end.
    decayed: Vec<f64>,
    /// Of the device time of the last half-life, what each had.
    lately: Vec<f64>,
}

/// Jobs queue by institution; whenever a device is free, it goes to whose turn it is (`fair`), or to the oldest job.
fn run(fair: bool) -> Run {
    let names: Vec<Institution> = (0..INSTITUTIONS)
        .filter_map(|i| format!("uni-{i:02}").parse().ok())
        .collect();
    let mut book = FairShare::new(Shares {
        half_life: Millis(HALF_LIFE),
        ..Shares::default()
    });
    let key = PublicKey::of(&SecretKey::from_bytes(&[1; 32]));
    let mut rng = Rng::new(5);
    let mut queues: Vec<VecDeque<(u64, u64)>> = vec![VecDeque::new(); INSTITUTIONS];
    let mut running: Vec<(u64, usize, u64)> = Vec::new();
    let (mut decayed, mut lately) = ([0.0; INSTITUTIONS], [0.0; INSTITUTIONS]);
    let (mut now, minute) = (1_000 * HALF_LIFE, 60_000);
    let end = now + 3 * HALF_LIFE;
    // For half a half-life the flood has everything to itself.
    let calm = now + HALF_LIFE / 2;
    while now < end {
        for (i, queue) in queues.iter_mut().enumerate() {
            let (floods, begins) = (i == 0, i == 0 || now >= calm);
            while begins && queue.len() < if floods { 5_000 } else { 40 } {
                queue.push_back((now, rng.between(10, 50) * minute));
            }
        }
        running.retain(|(until, who, length)| {
            if *until > now {
                return true;
            }
            let worth = Credits(length * 1_000);
            book.stop(&names[*who], worth);
            book.note(&Receipt {
                usage: Digest([0; 32]),
                lease: Digest([0; 32]),
                job: JobId(Digest([0; 32])),
                scheduler: SchedulerId(key),
                node: NodeId(key),
                node_institution: "grid".parse().unwrap_or_else(|_| names[0].clone()),
                user: UserId(key),
                user_institution: names[*who].clone(),
                observed: DeviceMillis(*length),
                billed: DeviceMillis(*length),
                credits: worth,
                flags: Vec::new(),
                rate_card: 0,
                disputable_until: UtcMillis(0),
                issued_at: UtcMillis(now),
            });
            false
        });
        while running.len() < DEVICES {
            let wanting = || (0..INSTITUTIONS).filter(|i| !queues[*i].is_empty());
            let next = if fair {
                let targets: BTreeMap<&Institution, u64> =
                    book.targets(UtcMillis(now), wanting().map(|i| &names[i]));
                wanting().min_by_key(|i| {
                    let target = targets.get(&names[*i]).copied().unwrap_or(1);
                    (book.turn(UtcMillis(now), &names[*i], target), *i)
                })
            } else {
                wanting().min_by_key(|i| queues[*i].front().copied())
            };
            let Some(who) = next else { break };
            let Some((_, length)) = queues[who].pop_front() else {
                break;
            };
            book.start(&names[who], Credits(length * 1_000));
            running.push((now + length, who, length));
        }
        let weight = (-((end - now) as f64) / HALF_LIFE as f64).exp2();
        for (_, who, _) in &running {
            decayed[*who] += weight;
            if now >= end - HALF_LIFE {
                lately[*who] += 1.0;
            }
        }
        now += minute;
    }
    let shares = |had: [f64; INSTITUTIONS]| {
        let all: f64 = had.iter().sum();
        had.iter().map(|h| h / all).collect()
    };
    Run {
        decayed: shares(decayed),
        lately: shares(lately),
    }
}

/// The least of these shares, of an even one.
fn worst(shares: &[f64]) -> f64 {
    shares.iter().fold(f64::INFINITY, |least, s| s.min(least)) * INSTITUTIONS as f64
}

pub(crate) fn fair(_: &Inventory) -> Value {
    let (ours, oldest) = (run(true), run(false));
    let (least, peer) = (worst(&ours.decayed), worst(&oldest.decayed));
    // The flood pays back what it had alone; nobody else should notice it.
    let (calm, calm_peer) = (worst(&ours.lately[1..]), worst(&oldest.lately[1..]));
    println!(
        "fair: {INSTITUTIONS} institutions on {DEVICES} devices, all always full, one floods with 5000 jobs and had everything \
         for half a half-life before: after three half-lives the least share of decayed use is {least:.3} of its target, oldest \
         first {peer:.3} [aim 0.95]; in the last half-life the least of the other 19 had {calm:.3}, oldest first {calm_peer:.3}"
    );
    json!({
        "institutions": INSTITUTIONS, "devices": DEVICES, "least_of_target": least, "oldest_first": peer,
        "least_of_others_lately": calm, "oldest_first_lately": calm_peer, "aim": 0.95,
    })
}
