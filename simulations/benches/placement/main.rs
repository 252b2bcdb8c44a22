//! Benchmarks of placement: `cargo bench -p karez-simulations --bench placement -- OUT.json [--data DIR] [NAME…]`.
//!
//! Real inventories, jobs and prices come from a data folder (`--data` or `KAREZ_DATA`); without one the worlds are
//! drawn from the published statistics of the same traces, and every line says so. Each figure is printed beside a
//! peer of the same run and its aim, with the load of the machine at the time. Medians of several runs.
mod argmin;
mod fair;
mod flows;
mod frag;
mod inventory;
mod llm;
mod spot;

use inventory::Inventory;
use karez_simulations::traces::Folder;
use serde_json::{Map, Value};
use std::path::PathBuf;

type Bench = fn(&Inventory) -> Value;

/// By name, in the order they run.
const BENCHES: &[(&str, Bench)] = &[
    ("place_argmin", argmin::place_argmin),
    ("place_1m", argmin::place_1m),
    ("gap_batch", flows::gap_batch),
    ("gap_online", flows::gap_online),
    ("solve_tick", flows::solve_tick),
    ("fair", fair::fair),
    ("frag", frag::frag),
    ("spot_deadline", spot::spot_deadline),
    ("llm_route", llm::llm_route),
];

fn main() {
    let mut out = None;
    let mut data = std::env::var_os("KAREZ_DATA").map(PathBuf::from);
    let mut names = Vec::new();
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            // Cargo's own.
            "--bench" => {}
            "--data" => data = args.next().map(PathBuf::from),
            name if BENCHES.iter().any(|(known, _)| *known == name) => names.push(arg),
            path if path.ends_with(".json") => out = Some(PathBuf::from(arg)),
            _ => {
                let known: Vec<&str> = BENCHES.iter().map(|(name, _)| *name).collect();
                eprintln!("{arg:?} is neither a .json file nor one of {}", known.join(", "));
                std::process::exit(2);
            }
        }
    }
    let inventory = match Inventory::load(data.map(Folder::new).as_ref()) {
        Ok(inventory) => inventory,
        Err(why) => {
            eprintln!("{why}");
            std::process::exit(1);
        }
    };
    println!("worlds from {}; machine load {}", inventory.source, load());
    let mut results = Map::new();
    for (name, bench) in BENCHES {
        if names.is_empty() || names.iter().any(|n| n == name) {
            let mut value = bench(&inventory);
            value["source"] = inventory.source.clone().into();
            value["machine_load"] = load().into();
            results.insert((*name).into(), value);
        }
    }
    if let Some(out) = out {
        let text = serde_json::to_string_pretty(&Value::Object(results)).unwrap_or_default();
        if let Err(why) = std::fs::write(&out, text) {
            eprintln!("{}: {why}", out.display());
            std::process::exit(1);
        }
    }
}

/// The machine's own load averages: figures of a busy machine are lower.
fn load() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').take(3).collect::<Vec<_>>().join(" ")
}

/// Seconds that this thread has had of a processor: on a busy machine the only honest clock for a rate.
fn cpu_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanos = text.split(' ').next().and_then(|n| n.parse::<f64>().ok());
    nanos.unwrap_or(f64::NAN) / 1e9
}

/// The middle one.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
