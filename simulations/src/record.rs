//! What a report shows: samples over virtual time, marks, and how long people waited. It judges nothing.
use crate::{
    Summary,
    check::{Checker, Rule, TrueNode},
    geo::place,
    setup::Setup,
};
use karez_core::{
    id::{Country, JobId, LeaseKey},
    unit::Credits,
};
use std::collections::{BTreeMap, BTreeSet};

/// The most waits kept; further ones are counted, not kept.
const WAITS_MAX: usize = 4_000_000;
/// The most samples of a run.
pub const SAMPLES_MAX: usize = 20_000;

/// The machines of one country.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Region {
    /// ISO 3166 alpha-2.
    pub code: String,
    /// In English.
    pub name: String,
    /// Its devices.
    pub devices: u64,
}

/// One look at the world.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Sample {
    /// Virtual milliseconds.
    pub at_ms: u64,
    /// Devices lent, for each region.
    pub lent: Vec<u64>,
    /// Devices at work for others, for each region.
    pub busy: Vec<u64>,
    /// Parts waiting.
    pub queued: u64,
    /// Jobs accepted and not ended.
    pub open: u64,
    /// Jobs done so far.
    pub done: u64,
    /// What each member that competes asks, in percent of its first price.
    pub prices: Vec<u64>,
}

/// Something that happened to the world.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Mark {
    /// Virtual milliseconds.
    pub from_ms: u64,
    /// Virtual milliseconds.
    pub until_ms: u64,
    /// What.
    pub what: String,
}

/// What one institution lent.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Lender {
    /// Its name.
    pub institution: String,
    /// Earned.
    pub micro_credits: u64,
}

/// How often a rule was judged, and held.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Kept {
    /// As a sentence.
    pub rule: &'static str,
    /// How often.
    pub judged: u64,
}

/// Everything a report shows of one run.
#[derive(Debug, Clone, Default)]
pub struct Recorder {
    /// Countries with machines.
    pub regions: Vec<Region>,
    /// Members that compete.
    pub competing: Vec<String>,
    /// In order of time.
    pub samples: Vec<Sample>,
    /// In order of time.
    pub marks: Vec<Mark>,
    /// When orders and faults ended.
    pub storm_ms: u64,
    /// Milliseconds from handing in to the first worker, of every job that ran.
    pub waits: Vec<u32>,
    /// Milliseconds from handing in to the end, of every job that was done.
    pub turnarounds: Vec<u32>,
    /// Device time that workers used, in milliseconds, billed or not.
    pub used_ms: u64,
    /// Device time that was billed, in milliseconds.
    pub billed_ms: u64,
    /// Device time that was lent, in milliseconds.
    pub lent_ms: u64,
    /// What each institution earned.
    pub lenders: Vec<Lender>,
    /// Rules.
    pub rules: Vec<Kept>,
    /// The longest a guest stayed after its owner's word.
    pub leaving_ms_max: u64,
    region_of: BTreeMap<Country, usize>,
    member_of: Vec<u32>,
    /// Lent or not, of each node.
    lent: Vec<bool>,
    /// Devices at work, of each node.
    busy: Vec<u32>,
    region_lent: Vec<u64>,
    region_busy: Vec<u64>,
    member_lent: Vec<u64>,
    member_busy: Vec<u64>,
    handed: BTreeMap<JobId, u64>,
    started: BTreeSet<JobId>,
    ended: BTreeSet<JobId>,
    competes: Vec<bool>,
    last: u64,
}

impl Recorder {
    pub(crate) fn new(setup: &Setup, nodes: &[TrueNode]) -> Self {
        let mut out = Self {
            lent: vec![false; nodes.len()],
            busy: vec![0; nodes.len()],
            member_of: Vec::with_capacity(nodes.len()),
            member_lent: vec![0; setup.members.len()],
            member_busy: vec![0; setup.members.len()],
            competes: setup.members.iter().map(|m| m.pricing.is_some()).collect(),
            competing: setup
                .members
                .iter()
                .filter(|m| m.pricing.is_some())
                .map(|m| m.institution.to_string())
                .collect(),
            ..Self::default()
        };
        for node in nodes {
            let at = *out.region_of.entry(node.country).or_insert_with(|| {
                let code = node.country.to_string();
                out.regions.push(Region {
                    name: place(&code).map_or(code.clone(), |p| p.name.to_owned()),
                    code,
                    devices: 0,
                });
                out.regions.len() - 1
            });
            out.regions[at].devices += devices_of(node);
        }
        out.member_of.resize(setup.nodes, u32::MAX);
        for (m, member) in setup.members.iter().enumerate() {
            let count: usize = member.machines.iter().map(|(_, count)| count).sum();
            let upto = out.member_of.len() + count;
            out.member_of.resize(upto, m as u32);
        }
        out.region_lent = vec![0; out.regions.len()];
        out.region_busy = vec![0; out.regions.len()];
        out
    }

    pub(crate) fn mark(&mut self, from_ms: u64, until_ms: u64, what: String) {
        self.marks.push(Mark {
            from_ms,
            until_ms,
            what,
        });
    }

    pub(crate) fn storm_over(&mut self, now: u64) {
        self.storm_ms = now;
    }

    pub(crate) fn lends(&mut self, n: usize, lent: bool, node: &TrueNode) {
        if std::mem::replace(&mut self.lent[n], lent) == lent {
            return;
        }
        let devices = devices_of(node);
        let region = self.region_of[&node.country];
        let member = self.member_lent.get_mut(self.member_of[n] as usize);
        for total in [Some(&mut self.region_lent[region]), member]
            .into_iter()
            .flatten()
        {
            *total = if lent {
                *total + devices
            } else {
                total.saturating_sub(devices)
            };
        }
    }

    pub(crate) fn stops(&mut self, n: usize, busy: u32, node: &TrueNode) {
        self.lends(n, false, node);
        if busy > 0 {
            self.ends(n, busy, node);
        }
    }

    pub(crate) fn starts(&mut self, n: usize, key: LeaseKey, devices: u32, now: u64, node: &TrueNode) {
        self.busy[n] += devices;
        self.region_busy[self.region_of[&node.country]] += u64::from(devices);
        if let Some(total) = self.member_busy.get_mut(self.member_of[n] as usize) {
            *total += u64::from(devices);
        }
        if self.started.insert(key.job)
            && let Some(handed) = self.handed.get(&key.job)
        {
            keep(&mut self.waits, now - handed);
        }
    }

    pub(crate) fn ends(&mut self, n: usize, devices: u32, node: &TrueNode) {
        let devices = devices.min(self.busy[n]);
        self.busy[n] -= devices;
        let region = &mut self.region_busy[self.region_of[&node.country]];
        *region = region.saturating_sub(devices.into());
        if let Some(total) = self.member_busy.get_mut(self.member_of[n] as usize) {
            *total = total.saturating_sub(devices.into());
        }
    }

    pub(crate) fn used(&mut self, device_ms: u64) {
        self.used_ms += device_ms;
    }

    pub(crate) fn handed_in(&mut self, job: JobId, now: u64) {
        self.handed.insert(job, now);
    }

    pub(crate) fn done(&mut self, job: JobId, now: u64) {
        if self.ended.insert(job)
            && let Some(handed) = self.handed.get(&job)
        {
            keep(&mut self.turnarounds, now - handed);
        }
    }

    /// Devices of a member: at work for others, lent.
    pub(crate) fn lent_by(&self, member: usize) -> (u64, u64) {
        (self.member_busy[member], self.member_lent[member])
    }

    pub(crate) fn sample(&mut self, now: u64, checker: &Checker, summary: &Summary, prices: &[u64]) {
        self.lent_ms += self.region_lent.iter().sum::<u64>() * (now - self.last);
        self.last = now;
        if self.samples.len() >= SAMPLES_MAX {
            return;
        }
        let _ = summary;
        self.samples.push(Sample {
            at_ms: now,
            lent: self.region_lent.clone(),
            busy: self.region_busy.clone(),
            queued: checker.queued() as u64,
            open: checker.open().len() as u64,
            done: checker.ended("done"),
            prices: prices
                .iter()
                .zip(&self.competes)
                .filter(|(_, competes)| **competes)
                .map(|(price, _)| *price)
                .collect(),
        });
    }

    /// Takes over what the judge counted.
    pub(crate) fn close(&mut self, checker: &Checker) {
        self.waits.sort_unstable();
        self.turnarounds.sort_unstable();
        self.billed_ms = checker.billed_time().0;
        self.leaving_ms_max = checker.leaving_ms_max;
        self.lenders = checker
            .earned()
            .iter()
            .map(|(institution, earned)| Lender {
                institution: institution.to_string(),
                micro_credits: *earned,
            })
            .collect();
        self.rules = ALL_RULES
            .iter()
            .map(|rule| Kept {
                rule: rule.sentence(),
                judged: checker.counts().get(rule).copied().unwrap_or(0),
            })
            .collect();
    }

    /// All that was earned.
    pub fn earned(&self) -> Credits {
        Credits(self.lenders.iter().map(|l| l.micro_credits).sum())
    }
}

const ALL_RULES: [Rule; 7] = [
    Rule::LeasedOnce,
    Rule::JobKept,
    Rule::BilledOnce,
    Rule::Conserved,
    Rule::OwnerFirst,
    Rule::Residency,
    Rule::Liveness,
];

fn devices_of(node: &TrueNode) -> u64 {
    node.devices.iter().map(|d| u64::from(d.count)).sum()
}

fn keep(into: &mut Vec<u32>, ms: u64) {
    if into.len() < WAITS_MAX {
        into.push(u32::try_from(ms).unwrap_or(u32::MAX));
    }
}

/// The value under which so many percent of sorted values lie.
pub fn percentile(sorted: &[u32], percent: usize) -> u32 {
    let at = sorted.len().saturating_sub(1) * percent / 100;
    sorted.get(at).copied().unwrap_or(0)
}
