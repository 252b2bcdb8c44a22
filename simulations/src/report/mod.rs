//! What a run tells: one self-contained page for people, and JSON for programs.
//!
//! The page needs no network and no script: its plots are SVG drawn here, its colours follow the reader's own
//! preference, and it reads on a phone. Every figure on it is in the JSON too.
mod page;
mod plot;

pub use page::html;

use crate::{
    Failure, Summary,
    record::{Kept, Lender, Mark, Recorder, Region, Sample, percentile},
    scenario::Scenario,
};
use serde::Serialize;

/// The figures of one run.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The scenario.
    pub scenario: String,
    /// What it shows.
    pub about: String,
    /// Equal seeds give equal worlds.
    pub seed: u64,
    /// The broken rule; none when all held.
    pub broken: Option<String>,
    /// Nodes.
    pub nodes: u64,
    /// Devices.
    pub devices: u64,
    /// Schedulers.
    pub schedulers: Vec<String>,
    /// Researchers.
    pub users: u64,
    /// Where latencies come from.
    pub links: String,
    /// Virtual hours of orders and faults.
    pub hours: f64,
    /// Figures.
    pub figures: Figures,
    /// Rules and how often they were judged.
    pub rules: Vec<Kept>,
    /// Countries with machines, in the order of the samples' lists.
    pub regions: Vec<Region>,
    /// Members that compete, in the order of the samples' prices.
    pub competing: Vec<String>,
    /// Over virtual time.
    pub samples: Vec<Sample>,
    /// What happened to the world.
    pub marks: Vec<Mark>,
    /// What institutions earned.
    pub lenders: Vec<Lender>,
    /// How it ran here.
    pub run: Run,
}

/// Counts and times of one run.
#[derive(Debug, Clone, Serialize)]
pub struct Figures {
    /// Jobs accepted.
    pub jobs: u64,
    /// Of them, done.
    pub done: u64,
    /// Failed.
    pub failed: u64,
    /// Called off.
    pub cancelled: u64,
    /// Orders refused.
    pub refused: u64,
    /// Leases granted.
    pub leases: u64,
    /// Attempts settled.
    pub settled: u64,
    /// Times an owner took a machine back.
    pub reclaims: u64,
    /// The longest a guest stayed after its owner's word, in seconds.
    pub leaving_s_max: f64,
    /// What the owner allows, in seconds.
    pub leaving_s_allowed: f64,
    /// Crashes of processes.
    pub crashes: u64,
    /// Sessions that broke.
    pub breaks: u64,
    /// From handing in to the first worker, in seconds: median and 95th percentile.
    pub wait_s: [f64; 2],
    /// From handing in to the end, in seconds: median and 95th percentile.
    pub turnaround_s: [f64; 2],
    /// Device hours lent.
    pub device_hours_lent: f64,
    /// Device hours used by workers.
    pub device_hours_used: f64,
    /// Device hours billed; the rest was lost to reclaims, crashes and failures, or rounded.
    pub device_hours_billed: f64,
    /// Credits billed.
    pub credits: f64,
    /// Hours from the end of the storm to the end of the last job.
    pub calm_hours: f64,
}

/// How a run went on this machine.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Run {
    /// Events handled by minds.
    pub events: u64,
    /// Messages sent.
    pub messages: u64,
    /// Real seconds.
    pub seconds: f64,
    /// Events per real second.
    pub events_per_second: f64,
    /// Largest resident memory of the process, in bytes; 0 where the system does not say.
    pub memory_peak_bytes: u64,
}

impl Report {
    /// Puts a run that kept every rule together.
    pub fn of(scenario: &Scenario, seed: u64, summary: &Summary, recorder: Recorder, seconds: f64) -> Self {
        let setup = &scenario.setup;
        let hours = |ms: u64| ms as f64 / 3_600_000.0;
        let both = |sorted: &[u32]| [50, 95].map(|p| f64::from(percentile(sorted, p)) / 1_000.0);
        Self {
            scenario: setup.name.clone(),
            about: setup.about.clone(),
            seed,
            broken: None,
            nodes: setup
                .members
                .iter()
                .flat_map(|m| m.machines.iter().map(|(_, count)| *count as u64))
                .sum(),
            devices: recorder.regions.iter().map(|r| r.devices).sum(),
            schedulers: setup
                .schedulers
                .iter()
                .map(|s| format!("{} ({})", s.name, s.country))
                .collect(),
            users: setup.members.iter().map(|m| m.users as u64).sum(),
            links: scenario.links_from.clone(),
            hours: hours(setup.storm_ms),
            figures: Figures {
                jobs: summary.jobs,
                done: summary.done,
                failed: summary.failed,
                cancelled: summary.cancelled,
                refused: summary.refused,
                leases: summary.leases,
                settled: summary.settled,
                reclaims: summary.reclaims,
                leaving_s_max: recorder.leaving_ms_max as f64 / 1_000.0,
                leaving_s_allowed: setup.timing.reclaim_grace.0 as f64 / 1_000.0,
                crashes: summary.crashes,
                breaks: summary.breaks,
                wait_s: both(&recorder.waits),
                turnaround_s: both(&recorder.turnarounds),
                device_hours_lent: hours(recorder.lent_ms),
                device_hours_used: hours(recorder.used_ms),
                device_hours_billed: hours(recorder.billed_ms),
                credits: recorder.earned().0 as f64 / 1e6,
                calm_hours: hours(summary.calm_ms),
            },
            rules: recorder.rules,
            regions: recorder.regions,
            competing: recorder.competing,
            samples: recorder.samples,
            marks: recorder.marks,
            lenders: recorder.lenders,
            run: Run {
                events: summary.events,
                messages: summary.messages,
                seconds,
                events_per_second: summary.events as f64 / seconds.max(1e-9),
                memory_peak_bytes: memory_peak(),
            },
        }
    }

    /// Notes the rule that broke.
    pub fn broken(mut self, failure: &Failure) -> Self {
        self.broken = Some(failure.rule.clone());
        self
    }

    /// As JSON, readable.
    pub fn json(&self) -> String {
        serde_json::to_string_pretty(self).unwrap_or_default()
    }
}

/// Largest resident memory of this process so far, in bytes; 0 where the system does not say.
pub fn memory_peak() -> u64 {
    proc_status("VmHWM:")
}

/// Resident memory of this process now, in bytes; 0 where the system does not say.
pub fn memory_now() -> u64 {
    proc_status("VmRSS:")
}

fn proc_status(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let kib = line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1_024
}
