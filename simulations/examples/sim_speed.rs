//! How fast and how large simulated worlds are: events per second, bytes per node, and what a day of a million costs.
//!
//! ```text
//! sim_speed OUT.json [--nodes N] [--hours H] [--day-nodes N]
//! ```
//!
//! Two worlds. The large one (100,000 nodes before ten schedulers unless said otherwise) runs for its start and a
//! little more; the small one runs a whole day. What a whole day of the large one, or of a million nodes, would take
//! is extrapolated and marked so: time from the steady hours; memory from the bytes of a node, and from what the
//! small world's jobs left behind in its day. Beside them stand the bounds: the bare event queue without
//! minds, and one real signature.
use karez_core::{
    key::{SecretKey, sign},
    unit::{Credits, Millis, Rate},
};
use karez_simulations::{
    World,
    report::{memory_now, memory_peak},
    setup::{Arrivals, HOUR, Item, Machine, Member, Seat, Setup, Timing, Workload},
};
use serde_json::json;
use std::{collections::BinaryHeap, time::Instant};

const PLACES: [&str; 10] = ["KE", "BR", "VN", "FR", "IN", "NG", "CA", "ID", "PL", "CO"];

fn parse<T: std::str::FromStr>(text: &str) -> T {
    match text.parse() {
        Ok(value) => value,
        Err(_) => panic!("{text:?} is a constant of this benchmark"),
    }
}

fn world(nodes: usize, jobs_per_hour: u64) -> Setup {
    let machine = |class: &str, devices, gib: u64| Machine {
        class: class.into(),
        devices,
        memory: karez_core::unit::Bytes(gib << 30),
        generate_milli: 400_000,
        embed_milli: 20_000_000,
    };
    let share = nodes / PLACES.len();
    let members = PLACES
        .iter()
        .enumerate()
        .map(|(i, code)| Member {
            institution: parse(&format!("lenders-{}", code.to_lowercase())),
            country: parse(code),
            machines: vec![
                (machine("cpu/x86-64-v3", 2, 16), share * 6 / 10),
                (machine("cuda/NVIDIA T4", 1, 16), share - share * 6 / 10),
            ],
            users: 5,
            budget: Credits(1_000_000 * Credits::ONE.0),
            rate: Rate(200_000 + 30_000 * i as u64),
            rate_spread_percent: 40,
            habit: None,
            schedulers: vec![i],
            pricing: None,
        })
        .collect();
    let workloads = vec![Workload {
        name: "batches".into(),
        institutions: Vec::new(),
        arrivals: Arrivals::Steady {
            per_hour_milli: jobs_per_hour * 1_000,
        },
        item: Item::Fixed(5_000, 20_000),
        items: (20, 60),
        items_per_part: 10,
        at_home_per_mille: 0,
        countries: Vec::new(),
        donated_per_mille: 0,
        device: String::new(),
        cancelled_per_mille: 0,
        credits_max: Credits(20 * Credits::ONE.0),
        attempts_max: 20,
    }];
    Setup {
        name: "sim_speed".into(),
        nodes: 0,
        users: 0,
        orders: 0,
        members,
        schedulers: PLACES
            .iter()
            .map(|code| Seat {
                name: code.to_lowercase(),
                country: parse(code),
            })
            .collect(),
        workloads,
        storm_ms: 25 * HOUR,
        faults_per_minute: 0,
        liars_per_mille: 0,
        boot_ms: HOUR / 3,
        jobs_kept: 1_000,
        timing: Timing {
            heartbeat: Millis(600_000),
            offer_ttl: Millis(HOUR),
            lease_ttl: Millis(1_800_000),
            reconnect_grace: Millis(900_000),
            ask_timeout: Millis(60_000),
            reading_interval: Millis(900_000),
            ..Timing::DAILY
        },
        keep_books: false,
        ..Setup::default()
    }
}

/// Processor seconds this process has used; real time where the system does not say. On a shared machine only these
/// can be compared between runs.
fn processor_seconds(began: Instant) -> f64 {
    let text = std::fs::read_to_string("/proc/self/schedstat").unwrap_or_default();
    let nanos = text.split_whitespace().next().and_then(|n| n.parse::<f64>().ok());
    nanos.map_or_else(|| began.elapsed().as_secs_f64(), |n| n / 1e9)
}

/// One world, measured; it is handed back so that its memory is not used again by the next.
fn measure(nodes: usize, hours: f64, jobs_per_hour: u64) -> (serde_json::Value, World) {
    let before = memory_now();
    let began = Instant::now();
    let mut world = World::new(1, world(nodes, jobs_per_hour));
    let built = began.elapsed().as_secs_f64();
    let start = HOUR / 3 + 60_000;
    let pass = |world: &mut World, until| {
        if let Err(failure) = world.advance(until) {
            eprintln!("{failure}");
            std::process::exit(1);
        }
        let spent = (began.elapsed().as_secs_f64(), processor_seconds(began));
        (spent, world.summarise())
    };
    let ((started_s, started_cpu), started) = pass(&mut world, start);
    let after_start = memory_now();
    let until = start + (hours * HOUR as f64) as u64;
    let ((ended_s, ended_cpu), ended) = pass(&mut world, until);
    let after = memory_now();
    let seconds = ended_s - started_s;
    let cpu = ended_cpu - started_cpu;
    let events = ended.events - started.events;
    let grown = after.saturating_sub(after_start);
    let per_node = after.saturating_sub(before) as f64 / nodes as f64;
    let hour_s = seconds / hours;
    println!(
        "{nodes:>9} nodes: built in {built:.1} s, started in {:.1} s; {hours} virtual hours in {seconds:.1} s ({cpu:.1} s of \
         processor): {:.0} events/s, {:.0} per processor second, {:.0} bytes per node, {} jobs done",
        started_s - built,
        events as f64 / seconds,
        events as f64 / cpu,
        per_node,
        ended.done
    );
    let figures = json!({
        "nodes": nodes, "schedulers": PLACES.len(), "virtual_hours": hours, "seconds": seconds,
        "built_seconds": built, "started_seconds": started_s - built,
        "processor_seconds": cpu, "events_per_processor_second": events as f64 / cpu,
        "events": events, "events_per_second": events as f64 / seconds,
        "messages": ended.messages - started.messages,
        "jobs_per_virtual_hour": jobs_per_hour, "jobs_done": ended.done, "leases": ended.leases,
        "bytes_per_node": per_node, "bytes": after.saturating_sub(before), "bytes_grown_after_start": grown,
        "day_seconds_extrapolated": hour_s * 24.0,
        "day_processor_seconds_extrapolated": cpu / hours * 24.0,
    });
    (figures, world)
}

/// Pops and pushes of a bare heap that holds as many: what no world can be faster than.
fn bare_queue(held: u64) -> f64 {
    let mut heap: BinaryHeap<std::cmp::Reverse<(u64, u64, [u64; 3])>> = (0..held)
        .map(|i| std::cmp::Reverse((i * 7_919 % held, i, [i; 3])))
        .collect();
    let began = Instant::now();
    let rounds = 2_000_000;
    for i in 0..rounds {
        if let Some(std::cmp::Reverse((at, _, rest))) = heap.pop() {
            heap.push(std::cmp::Reverse((at + held, held + i, rest)));
        }
    }
    rounds as f64 / began.elapsed().as_secs_f64()
}

fn signature_us() -> f64 {
    let secret = SecretKey::from_bytes(&[9; 32]);
    let message = [1; 600];
    let began = Instant::now();
    let rounds = 2_000;
    for _ in 0..rounds {
        std::hint::black_box(sign(&secret, std::hint::black_box(&message)));
    }
    began.elapsed().as_secs_f64() * 1e6 / f64::from(rounds)
}

fn main() {
    let mut words = std::env::args().skip(1);
    let out = words.next().unwrap_or_else(|| "sim_speed.json".into());
    let (mut nodes, mut hours, mut day_nodes) = (100_000, 0.5, 2_000);
    while let Some(word) = words.next() {
        let value = words.next().unwrap_or_default();
        match word.as_str() {
            "--nodes" => nodes = parse(&value),
            "--hours" => hours = parse(&value),
            "--day-nodes" => day_nodes = parse(&value),
            _ => {
                eprintln!("usage: sim_speed OUT.json [--nodes N] [--hours H] [--day-nodes N]");
                std::process::exit(2);
            }
        }
    }
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!("load: {}", load.trim());
    let queue = bare_queue(3 * nodes as u64);
    let signature = signature_us();
    println!("bounds: the bare queue {queue:.0} events/s; one signature {signature:.1} us");
    let day = (day_nodes > 0).then(|| measure(day_nodes, 24.0, 60));
    let (large, _world) = measure(nodes, hours, 60);
    let of = |key: &str| large[key].as_f64().unwrap_or_default();
    let times = 1e6 / nodes as f64;
    let day = day.as_ref().map(|(figures, _)| figures);
    let history = day.and_then(|d| d["bytes_grown_after_start"].as_f64());
    let million_bytes = of("bytes") * times + history.unwrap_or_default();
    println!(
        "a day of {nodes}: {:.0} s of processor (extrapolated); a day of 1,000,000: {:.0} min of processor and {:.1} GB \
         (extrapolated; the bound is 16 GB)",
        of("day_processor_seconds_extrapolated"),
        of("day_processor_seconds_extrapolated") * times / 60.0,
        million_bytes / 1e9
    );
    let report = json!({
        "load": load.trim(), "bare_queue_events_per_second": queue, "signature_us": signature,
        "large": large, "day": day,
        "million_day_bytes_extrapolated": million_bytes,
        "million_day_processor_seconds_extrapolated": of("day_processor_seconds_extrapolated") * times,
        "million_day_bytes_bound": 16e9, "memory_peak_bytes": memory_peak(),
    });
    if let Err(error) = std::fs::write(&out, format!("{report:#}\n")) {
        eprintln!("{out}: {error}");
        std::process::exit(1);
    }
}
