//! The shape of a scenario file: which keys there are, and what is meant where one is left out.
use serde::Deserialize;
use std::collections::BTreeMap;
use toml::Spanned;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct File {
    pub(super) name: String,
    pub(super) about: String,
    #[serde(default = "one")]
    pub(super) seed: u64,
    pub(super) hours: f64,
    #[serde(default = "default_calm")]
    pub(super) calm_hours_max: f64,
    #[serde(default = "default_sample")]
    pub(super) sample_minutes: f64,
    #[serde(default)]
    pub(super) boot_minutes: f64,
    #[serde(default = "default_jobs_kept")]
    pub(super) jobs_kept: usize,
    #[serde(default = "default_true")]
    pub(super) keep_books: bool,
    #[serde(default)]
    pub(super) timing: TimingFile,
    #[serde(default)]
    pub(super) storm: StormFile,
    pub(super) power: Option<PowerFile>,
    #[serde(default)]
    pub(super) machine: BTreeMap<String, MachineFile>,
    #[serde(default)]
    pub(super) habit: BTreeMap<String, HabitFile>,
    pub(super) scheduler: Vec<SeatFile>,
    pub(super) institution: Vec<InstitutionFile>,
    #[serde(default)]
    pub(super) workload: Vec<WorkloadFile>,
    #[serde(default)]
    pub(super) fault: Vec<FaultFile>,
}

fn one() -> u64 {
    1
}
fn default_calm() -> f64 {
    48.0
}
fn default_sample() -> f64 {
    10.0
}
fn default_jobs_kept() -> usize {
    1_000
}
fn default_true() -> bool {
    true
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct TimingFile {
    pub(super) heartbeat_seconds: Option<u64>,
    pub(super) offer_seconds: Option<u64>,
    pub(super) lease_seconds: Option<u64>,
    pub(super) reconnect_seconds: Option<u64>,
    pub(super) ask_seconds: Option<u64>,
    pub(super) reading_seconds: Option<u64>,
    pub(super) reclaim_seconds: Option<u64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct StormFile {
    pub(super) faults_per_hour: u64,
    pub(super) liars_per_mille: u64,
    pub(super) slow_per_mille: u64,
    pub(super) skew_seconds: f64,
}

/// What schedulers know of electricity and carbon.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct PowerFile {
    pub(super) watts: BTreeMap<String, Spanned<u32>>,
    pub(super) carbon_price_credits_per_kg: f64,
    pub(super) carbon_max_grams: Option<Spanned<u32>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MachineFile {
    pub(super) class: String,
    #[serde(default = "one")]
    pub(super) devices: u64,
    pub(super) memory_gib: u64,
    #[serde(default)]
    pub(super) generate_tokens_per_second: f64,
    #[serde(default)]
    pub(super) embed_tokens_per_second: f64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct HabitFile {
    pub(super) from: String,
    pub(super) to: String,
    #[serde(default = "default_true")]
    pub(super) weekdays_only: bool,
    #[serde(default)]
    pub(super) jitter_minutes: u64,
    #[serde(default)]
    pub(super) notice_minutes: u64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SeatFile {
    pub(super) name: String,
    pub(super) country: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct InstitutionFile {
    pub(super) name: String,
    pub(super) country: String,
    #[serde(default)]
    pub(super) machines: BTreeMap<String, usize>,
    #[serde(default)]
    pub(super) users: usize,
    #[serde(default = "default_budget")]
    pub(super) budget_credits: f64,
    #[serde(default)]
    pub(super) price_credits_per_hour: f64,
    #[serde(default)]
    pub(super) price_spread_percent: u64,
    pub(super) habit: Option<String>,
    #[serde(default)]
    pub(super) schedulers: Vec<String>,
    pub(super) pricing: Option<PricingFile>,
}

fn default_budget() -> f64 {
    1_000_000.0
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PricingFile {
    pub(super) every_minutes: f64,
    pub(super) step_percent: u64,
    pub(super) floor_credits_per_hour: f64,
    pub(super) ceiling_credits_per_hour: f64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WorkloadFile {
    pub(super) name: String,
    #[serde(default)]
    pub(super) institutions: Vec<String>,
    pub(super) arrivals: ArrivalsFile,
    pub(super) item: ItemFile,
    #[serde(default = "default_items")]
    pub(super) items: [u64; 2],
    #[serde(default)]
    pub(super) items_per_part: u32,
    #[serde(default)]
    pub(super) at_home_percent: f64,
    #[serde(default)]
    pub(super) countries: Vec<String>,
    #[serde(default)]
    pub(super) donated_percent: f64,
    #[serde(default)]
    pub(super) device: String,
    #[serde(default)]
    pub(super) cancelled_percent: f64,
    #[serde(default = "default_credits")]
    pub(super) credits_max: f64,
    #[serde(default = "default_attempts")]
    pub(super) attempts_max: u32,
}

fn default_items() -> [u64; 2] {
    [1, 1]
}
fn default_credits() -> f64 {
    100.0
}
fn default_attempts() -> u32 {
    20
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", tag = "pattern")]
pub(super) enum ArrivalsFile {
    Steady {
        jobs_per_hour: f64,
    },
    Diurnal {
        jobs_per_busy_hour: f64,
    },
    Flash {
        at_hours: f64,
        over_minutes: f64,
        jobs: u64,
    },
    AzureLlm {
        at_hours: f64,
        gather_seconds: u64,
        times: u64,
    },
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", tag = "kind")]
pub(super) enum ItemFile {
    Fixed { seconds: [f64; 2] },
    Generate { tokens: u32 },
    Embed { bytes: u32 },
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FaultFile {
    pub(super) at_hours: f64,
    pub(super) hours: f64,
    pub(super) what: WhatFile,
    pub(super) country: Option<String>,
    pub(super) scheduler: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum WhatFile {
    CountryDark,
    CountryDown,
    SchedulerLost,
    OwnersReturn,
}
