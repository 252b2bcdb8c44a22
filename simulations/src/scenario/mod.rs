//! Scenarios: worlds written down as TOML, one file each.
//!
//! Every key has a unit in its name or is a text; an unknown key, a wrong type or an impossible value is refused with
//! the file and, where the file shows it, the line. What a file leaves out has the default that the tables below
//! give. A data folder brings measured latencies and request traces; without one, latencies come from distance
//! (see [`crate::geo`]) and a workload that needs a trace is refused.
mod shape;
#[cfg(test)]
mod tests;

use crate::{
    geo::{Links, PLACES, place},
    setup::{
        Arrivals, HOUR, Habit, Item, MINUTE, Machine, Member, PlannedFault, Pricing, Seat, Setup, Timing,
        Trouble, Workload,
    },
    traces::{self, Folder, TraceError},
};
use karez_core::{
    fair::Shares,
    id::{Country, Institution},
    placement::{Grid, Policy},
    unit::{Bytes, Credits, Millis, Rate},
};
use shape::{
    ArrivalsFile, FaultFile, File, HabitFile, ItemFile, MachineFile, PowerFile, TimingFile, WhatFile,
    WorkloadFile,
};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};
use toml::Spanned;

/// The most machines a scenario may have: ten schedulers' markets with room for restarts.
pub const MACHINES_MAX: usize = 2_000_000;
/// The most schedulers.
const SCHEDULERS_MAX: usize = 64;
/// No device draws more; brown coal in old plants weighs less for a kilowatt-hour.
const WATTS_MAX: u32 = 100_000;
const GRAMS_MAX: u32 = 2_000;
/// A kilowatt-hour about anywhere: credits, and grams of CO2. The means by country of the public tables in `prices`, rounded.
const USUAL: (f64, f64) = (0.12, 440.0);
/// The longest scenario.
const HOURS_MAX: f64 = 24.0 * 366.0;

/// Why a scenario was refused.
#[derive(Debug, thiserror::Error)]
pub enum ScenarioError {
    /// The file cannot be read.
    #[error("{}: {error}", .file.display())]
    File {
        /// Which file.
        file: PathBuf,
        /// What the system says.
        error: std::io::Error,
    },
    /// Not TOML, an unknown key, or a wrong type. The text shows the line and the key.
    #[error("{}: {text}", .file.display())]
    Toml {
        /// Which file.
        file: PathBuf,
        /// What is wrong, and where.
        text: String,
    },
    /// A value that makes no sense.
    #[error("{}: {key}: {why}", .file.display())]
    Value {
        /// Which file.
        file: PathBuf,
        /// Which key.
        key: String,
        /// What is wrong, and what would be right.
        why: String,
    },
    /// A trace it needs.
    #[error(transparent)]
    Trace(#[from] TraceError),
}

/// A scenario with the seed it names.
#[derive(Debug, Clone)]
pub struct Scenario {
    /// The seed of the file.
    pub seed: u64,
    /// The world.
    pub setup: Setup,
    /// Where its latencies come from, for the report.
    pub links_from: String,
}

/// Reads a scenario; traces come from `data`.
pub fn read(file: &Path, data: Option<&Folder>) -> Result<Scenario, ScenarioError> {
    let text = std::fs::read_to_string(file).map_err(|error| ScenarioError::File {
        file: file.to_owned(),
        error,
    })?;
    parse(file, &text, data)
}

/// As [`read`], from text; `file` is named in errors.
pub fn parse(file: &Path, text: &str, data: Option<&Folder>) -> Result<Scenario, ScenarioError> {
    let parsed: File = toml::from_str(text).map_err(|e| ScenarioError::Toml {
        file: file.to_owned(),
        text: e.to_string().trim_end().to_owned(),
    })?;
    Reader { file, text, data }.scenario(parsed)
}

struct Reader<'a> {
    file: &'a Path,
    text: &'a str,
    data: Option<&'a Folder>,
}

impl Reader<'_> {
    fn bad<T>(&self, key: impl Into<String>, why: impl Into<String>) -> Result<T, ScenarioError> {
        Err(ScenarioError::Value {
            file: self.file.to_owned(),
            key: key.into(),
            why: why.into(),
        })
    }

    /// A whole number up to `most`, or where in the file one stands that is not.
    fn up_to(&self, key: &str, value: &Spanned<u32>, most: u32, unit: &str) -> Result<u32, ScenarioError> {
        let number = *value.get_ref();
        if number <= most {
            return Ok(number);
        }
        let before = &self.text[..value.span().start.min(self.text.len())];
        let line = before.matches('\n').count() + 1;
        let column = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
        self.bad(
            format!("line {line}, column {column}, {key}"),
            format!("{number} is over {most} {unit}: is it in another unit?"),
        )
    }

    /// A number between bounds, times `unit`, rounded.
    fn scaled(&self, key: &str, value: f64, least: f64, most: f64, unit: f64) -> Result<u64, ScenarioError> {
        if !(least..=most).contains(&value) {
            return self.bad(key, format!("{value} is not between {least} and {most}"));
        }
        Ok((value * unit).round() as u64)
    }

    fn hours(&self, key: &str, value: f64) -> Result<u64, ScenarioError> {
        self.scaled(key, value, 0.0, HOURS_MAX, HOUR as f64)
    }

    fn credits(&self, key: &str, value: f64) -> Result<Credits, ScenarioError> {
        self.scaled(key, value, 0.0, 1e9, Credits::ONE.0 as f64)
            .map(Credits)
    }

    fn rate(&self, key: &str, value: f64) -> Result<Rate, ScenarioError> {
        self.scaled(key, value, 0.0, 1e6, Credits::ONE.0 as f64).map(Rate)
    }

    fn per_mille(&self, key: &str, percent: f64) -> Result<u64, ScenarioError> {
        self.scaled(key, percent, 0.0, 100.0, 10.0)
    }

    fn country(&self, key: &str, code: &str) -> Result<Country, ScenarioError> {
        match (place(code), code.parse()) {
            (Some(_), Ok(country)) => Ok(country),
            _ => {
                let known: Vec<&str> = PLACES.iter().map(|p| p.code).collect();
                self.bad(key, format!("{code:?} is none of {}", known.join(" ")))
            }
        }
    }

    fn institution(&self, key: &str, name: &str) -> Result<Institution, ScenarioError> {
        name.parse()
            .or_else(|e: karez_core::id::NameError| self.bad(key, e.to_string()))
    }

    fn scenario(&self, f: File) -> Result<Scenario, ScenarioError> {
        if f.scheduler.is_empty() || f.scheduler.len() > SCHEDULERS_MAX {
            return self.bad(
                "scheduler",
                format!("there must be 1 to {SCHEDULERS_MAX} of them"),
            );
        }
        let mut seats: Vec<Seat> = Vec::new();
        for s in &f.scheduler {
            let key = format!("scheduler {:?}", s.name);
            if seats.iter().any(|seat| seat.name == s.name) {
                return self.bad(key, "is there twice");
            }
            let country = self.country(&key, &s.country)?;
            seats.push(Seat {
                name: s.name.clone(),
                country,
            });
        }
        let members = self.members(&f, &seats)?;
        let machines: usize = members
            .iter()
            .flat_map(|m| m.machines.iter().map(|(_, count)| count))
            .sum();
        if machines == 0 || machines > MACHINES_MAX {
            return self.bad(
                "institution.machines",
                format!("{machines} in all; there must be 1 to {MACHINES_MAX}"),
            );
        }
        let storm_ms = self.hours("hours", f.hours)?;
        if storm_ms < MINUTE {
            return self.bad("hours", "is under a minute");
        }
        let workloads = f
            .workload
            .iter()
            .map(|w| self.workload(w, &members))
            .collect::<Result<_, _>>()?;
        let faults = f
            .fault
            .iter()
            .map(|fault| self.fault(fault, &seats))
            .collect::<Result<_, _>>()?;
        let (policy, power_from) = self.power(f.power.as_ref())?;
        let (links, mut links_from) = match self.data {
            Some(data) => {
                let links = Links::measured(traces::latency::round_trips(&data.latency())?);
                let from = format!("{} measured pairs of countries", links.pairs());
                (links, from)
            }
            None => (
                Links::default(),
                "a line fitted to measured pairs of countries".to_owned(),
            ),
        };
        links_from.push_str(&power_from);
        let setup = Setup {
            policy,
            shares: Shares::default(),
            name: f.name,
            about: f.about,
            nodes: 0,
            users: 0,
            orders: 0,
            members,
            schedulers: seats,
            workloads,
            links: Arc::new(links),
            storm_ms,
            calm_ms_max: self.hours("calm_hours_max", f.calm_hours_max)?,
            // Drawn per minute; rarer storms are drawn as one fault in several minutes.
            faults_per_minute: f.storm.faults_per_hour.div_ceil(60),
            faults,
            liars_per_mille: self.scaled(
                "storm.liars_per_mille",
                f.storm.liars_per_mille as f64,
                0.0,
                1_000.0,
                1.0,
            )?,
            slow_per_mille: self.scaled(
                "storm.slow_per_mille",
                f.storm.slow_per_mille as f64,
                0.0,
                1_000.0,
                1.0,
            )?,
            skew_ms_max: self.scaled("storm.skew_seconds", f.storm.skew_seconds, 0.0, 240.0, 1_000.0)?,
            boot_ms: self.scaled("boot_minutes", f.boot_minutes, 0.0, 1_440.0, MINUTE as f64)?,
            jobs_kept: f.jobs_kept,
            timing: self.timing(&f.timing)?,
            sample_ms: self.scaled("sample_minutes", f.sample_minutes, 0.0, 1_440.0, MINUTE as f64)?,
            keep_books: f.keep_books,
            trace: false,
            sabotage: None,
        };
        Ok(Scenario {
            seed: f.seed,
            setup,
            links_from,
        })
    }

    /// Electricity and carbon as the data folder's tables have them, else the same everywhere.
    fn power(&self, power: Option<&PowerFile>) -> Result<(Policy, String), ScenarioError> {
        let mut policy = Policy::default();
        let Some(power) = power else {
            return Ok((policy, String::new()));
        };
        for (class, watts) in &power.watts {
            let watts = self.up_to(&format!("power.watts.{class}"), watts, WATTS_MAX, "watts")?;
            policy.energy.watts.insert(class.clone(), watts);
        }
        policy.energy.carbon_price = self.credits(
            "power.carbon_price_credits_per_kg",
            power.carbon_price_credits_per_kg,
        )?;
        if let Some(grams) = &power.carbon_max_grams {
            let key = "power.carbon_max_grams";
            policy.energy.carbon_max =
                Some(self.up_to(key, grams, GRAMS_MAX, "grams for a kilowatt-hour")?);
        }
        let tables = match self.data {
            Some(data) => Some((
                traces::energy::electricity(&data.electricity())?,
                traces::energy::carbon(&data.carbon())?,
            )),
            None => None,
        };
        let mut known = 0;
        for place in PLACES {
            let (price, grams) = match &tables {
                Some((prices, carbon)) => {
                    let found = (prices.get(place.iso3), carbon.get(place.iso3));
                    known += usize::from(found.0.is_some() && found.1.is_some());
                    (*found.0.unwrap_or(&USUAL.0), *found.1.unwrap_or(&USUAL.1))
                }
                None => USUAL,
            };
            let Ok(country) = place.code.parse() else { continue };
            let grid = Grid {
                // A dollar is a credit.
                price: self.credits("electricity", price)?,
                grams: grams.round() as u32,
            };
            policy.energy.grids.insert(country, grid);
        }
        let from = match tables {
            Some(_) => format!("; power from tables of {known} of these countries"),
            None => format!(
                "; power assumed alike everywhere, {} credits and {} g of CO2 for a kilowatt-hour",
                USUAL.0, USUAL.1
            ),
        };
        Ok((policy, from))
    }

    fn timing(&self, t: &TimingFile) -> Result<Timing, ScenarioError> {
        let of = |key: &str, seconds: Option<u64>, usual: Millis| match seconds {
            None => Ok(usual),
            Some(s @ 1..=3_600) => Ok(Millis(s * 1_000)),
            Some(s) => self.bad(format!("timing.{key}"), format!("{s} is not between 1 and 3600")),
        };
        let d = Timing::DAILY;
        let timing = Timing {
            heartbeat: of("heartbeat_seconds", t.heartbeat_seconds, d.heartbeat)?,
            offer_ttl: of("offer_seconds", t.offer_seconds, d.offer_ttl)?,
            lease_ttl: of("lease_seconds", t.lease_seconds, d.lease_ttl)?,
            reconnect_grace: of("reconnect_seconds", t.reconnect_seconds, d.reconnect_grace)?,
            ask_timeout: of("ask_seconds", t.ask_seconds, d.ask_timeout)?,
            reading_interval: of("reading_seconds", t.reading_seconds, d.reading_interval)?,
            reclaim_grace: of("reclaim_seconds", t.reclaim_seconds, d.reclaim_grace)?,
        };
        if timing.lease_ttl.0 < 2 * timing.heartbeat.0 {
            return self.bad(
                "timing.lease_seconds",
                "is under two heartbeats: one lost report would end every lease",
            );
        }
        Ok(timing)
    }

    fn members(&self, f: &File, seats: &[Seat]) -> Result<Vec<Member>, ScenarioError> {
        let kinds = self.machines(&f.machine)?;
        let mut out: Vec<Member> = Vec::new();
        for i in &f.institution {
            let at = |key: &str| format!("institution {:?}, {key}", i.name);
            let institution = self.institution(&at("name"), &i.name)?;
            let mut machines = Vec::new();
            for (kind, count) in &i.machines {
                let Some(machine) = kinds.get(kind.as_str()) else {
                    let known: Vec<&str> = kinds.keys().map(String::as_str).collect();
                    return self.bad(
                        at("machines"),
                        format!("{kind:?} is none of {}", known.join(", ")),
                    );
                };
                machines.push((machine.clone(), *count));
            }
            let habit = match &i.habit {
                None => None,
                Some(name) => match f.habit.get(name) {
                    Some(habit) => Some(self.habit(name, habit)?),
                    None => return self.bad(at("habit"), format!("there is no [habit.{name}]")),
                },
            };
            let mut schedulers = Vec::new();
            for name in &i.schedulers {
                match seats.iter().position(|seat| seat.name == *name) {
                    Some(s) if !schedulers.contains(&s) => schedulers.push(s),
                    Some(_) => return self.bad(at("schedulers"), format!("{name:?} is there twice")),
                    None => return self.bad(at("schedulers"), format!("there is no scheduler {name:?}")),
                }
            }
            if schedulers.is_empty() {
                schedulers = (0..seats.len()).collect();
            }
            let rate = self.rate(&at("price_credits_per_hour"), i.price_credits_per_hour)?;
            let pricing = match &i.pricing {
                None => None,
                Some(_) if rate == Rate::FREE => {
                    return self.bad(at("pricing"), "what is donated has no price to change");
                }
                Some(p) => Some(Pricing {
                    every_ms: self.scaled(
                        &at("every_minutes"),
                        p.every_minutes,
                        1.0,
                        10_080.0,
                        MINUTE as f64,
                    )?,
                    step_percent: self.scaled(&at("step_percent"), p.step_percent as f64, 1.0, 90.0, 1.0)?,
                    floor: self.rate(&at("floor_credits_per_hour"), p.floor_credits_per_hour)?,
                    ceiling: self.rate(&at("ceiling_credits_per_hour"), p.ceiling_credits_per_hour)?,
                }),
            };
            if pricing.is_some_and(|p| p.floor > p.ceiling) {
                return self.bad(at("pricing"), "the floor lies over the ceiling");
            }
            out.push(Member {
                institution,
                country: self.country(&at("country"), &i.country)?,
                machines,
                users: i.users,
                budget: self.credits(&at("budget_credits"), i.budget_credits)?,
                rate,
                rate_spread_percent: i.price_spread_percent.min(100),
                habit,
                schedulers,
                pricing,
            });
        }
        Ok(out)
    }

    /// The kinds every scenario knows, and its own. Speeds of the known ones are round figures for a small
    /// language model and a sentence encoder.
    fn machines(
        &self,
        own: &BTreeMap<String, MachineFile>,
    ) -> Result<BTreeMap<String, Machine>, ScenarioError> {
        let known = |class: &str, devices, gib: u64, generate: u64, embed: u64| Machine {
            class: class.into(),
            devices,
            memory: Bytes(gib << 30),
            generate_milli: generate * 1_000,
            embed_milli: embed * 1_000,
        };
        let mut out = BTreeMap::from([
            ("cpu".to_owned(), known("cpu/x86-64-v3", 2, 16, 40, 2_000)),
            ("t4".to_owned(), known("cuda/NVIDIA T4", 1, 16, 400, 20_000)),
            (
                "a100".to_owned(),
                known("cuda/NVIDIA A100", 4, 80, 2_500, 150_000),
            ),
            (
                "h100".to_owned(),
                known("cuda/NVIDIA H100", 8, 80, 5_000, 300_000),
            ),
        ]);
        for (name, m) in own {
            let at = |key: &str| format!("machine.{name}.{key}");
            if m.class.is_empty() || m.class.len() > 64 {
                return self.bad(at("class"), "is empty or over 64 bytes");
            }
            let speed = |key: &str, value| self.scaled(&at(key), value, 0.0, 1e8, 1_000.0);
            out.insert(
                name.clone(),
                Machine {
                    class: m.class.clone(),
                    devices: self.scaled(&at("devices"), m.devices as f64, 1.0, 1_024.0, 1.0)? as u32,
                    memory: Bytes(
                        self.scaled(&at("memory_gib"), m.memory_gib as f64, 1.0, 4_096.0, 1.0)? << 30,
                    ),
                    generate_milli: speed("generate_tokens_per_second", m.generate_tokens_per_second)?,
                    embed_milli: speed("embed_tokens_per_second", m.embed_tokens_per_second)?,
                },
            );
        }
        Ok(out)
    }

    fn habit(&self, name: &str, h: &HabitFile) -> Result<Habit, ScenarioError> {
        let clock = |key: &str, text: &str| {
            let parsed = text
                .split_once(':')
                .and_then(|(h, m)| Some((h.parse::<u64>().ok()?, m.parse::<u64>().ok()?)));
            match parsed {
                Some((h, m)) if h < 24 && m < 60 => Ok::<u64, ScenarioError>(h * 60 + m),
                _ => self.bad(
                    format!("habit.{name}.{key}"),
                    format!("{text:?} is no time from 00:00 to 23:59"),
                ),
            }
        };
        let habit = Habit {
            from: clock("from", &h.from)?,
            to: clock("to", &h.to)?,
            weekdays_only: h.weekdays_only,
            jitter_minutes: h.jitter_minutes.min(600),
            notice_minutes: h.notice_minutes,
        };
        if habit.from == habit.to {
            return self.bad(format!("habit.{name}"), "from and to are the same");
        }
        Ok(habit)
    }

    fn workload(&self, w: &WorkloadFile, members: &[Member]) -> Result<Workload, ScenarioError> {
        let at = |key: &str| format!("workload {:?}, {key}", w.name);
        let mut institutions = Vec::new();
        for name in &w.institutions {
            let institution = self.institution(&at("institutions"), name)?;
            if !members
                .iter()
                .any(|m| m.institution == institution && m.users > 0)
            {
                return self.bad(at("institutions"), format!("no institution {name:?} has users"));
            }
            institutions.push(institution);
        }
        if institutions.is_empty() && members.iter().all(|m| m.users == 0) {
            return self.bad(at("institutions"), "no institution has users");
        }
        let rate = |key: &str, value| self.scaled(&at(key), value, 0.001, 1e7, 1_000.0);
        let arrivals = match &w.arrivals {
            ArrivalsFile::Steady { jobs_per_hour } => Arrivals::Steady {
                per_hour_milli: rate("jobs_per_hour", *jobs_per_hour)?,
            },
            ArrivalsFile::Diurnal { jobs_per_busy_hour } => Arrivals::Diurnal {
                per_hour_milli: rate("jobs_per_busy_hour", *jobs_per_busy_hour)?,
            },
            ArrivalsFile::Flash {
                at_hours,
                over_minutes,
                jobs,
            } => Arrivals::Flash {
                at_ms: self.hours(&at("at_hours"), *at_hours)?,
                over_ms: self.scaled(&at("over_minutes"), *over_minutes, 0.1, 1_440.0, MINUTE as f64)?,
                jobs: *jobs,
            },
            ArrivalsFile::AzureLlm {
                at_hours,
                gather_seconds,
                times,
            } => {
                let Some(data) = self.data else {
                    return self.bad(
                        at("arrivals"),
                        "needs the trace of requests: name a data folder with --data",
                    );
                };
                Arrivals::Requests {
                    requests: Arc::new(traces::azure::requests(&data.azure_llm())?),
                    at_ms: self.hours(&at("at_hours"), *at_hours)?,
                    gather_ms: self.scaled(
                        &at("gather_seconds"),
                        *gather_seconds as f64,
                        1.0,
                        3_600.0,
                        1_000.0,
                    )?,
                    times: self.scaled(&at("times"), *times as f64, 1.0, 10_000.0, 1.0)?,
                }
            }
        };
        let item = match &w.item {
            ItemFile::Fixed {
                seconds: [least, most],
            } => {
                let ms = |value| self.scaled(&at("item.seconds"), value, 0.0, 3_600.0, 1_000.0);
                let (least, most) = (ms(*least)?, ms(*most)?);
                if least > most {
                    return self.bad(at("item.seconds"), "the least is over the most");
                }
                Item::Fixed(least as u32, most as u32)
            }
            ItemFile::Generate { tokens } => Item::Generate((*tokens).clamp(1, 131_072)),
            ItemFile::Embed { bytes } => Item::Embed((*bytes).max(1)),
        };
        let [least, most] = w.items;
        if least == 0 || least > most || most > karez_core::records::ITEMS_MAX {
            return self.bad(
                at("items"),
                format!("[{least}, {most}] is no range from 1 upwards"),
            );
        }
        if !(1..=100).contains(&w.attempts_max) {
            return self.bad(
                at("attempts_max"),
                format!("{} is not between 1 and 100", w.attempts_max),
            );
        }
        Ok(Workload {
            name: w.name.clone(),
            institutions,
            arrivals,
            item,
            items: (least, most),
            items_per_part: w.items_per_part,
            at_home_per_mille: self.per_mille(&at("at_home_percent"), w.at_home_percent)?,
            countries: w
                .countries
                .iter()
                .map(|code| self.country(&at("countries"), code))
                .collect::<Result<_, _>>()?,
            donated_per_mille: self.per_mille(&at("donated_percent"), w.donated_percent)?,
            device: w.device.clone(),
            cancelled_per_mille: self.per_mille(&at("cancelled_percent"), w.cancelled_percent)?,
            credits_max: self.credits(&at("credits_max"), w.credits_max)?,
            attempts_max: w.attempts_max,
        })
    }

    fn fault(&self, f: &FaultFile, seats: &[Seat]) -> Result<PlannedFault, ScenarioError> {
        let country = || match &f.country {
            Some(code) => self.country("fault.country", code),
            None => self.bad("fault.country", "is missing: which country?"),
        };
        let what = match f.what {
            WhatFile::CountryDark => Trouble::CountryDark(country()?),
            WhatFile::CountryDown => Trouble::CountryDown(country()?),
            WhatFile::OwnersReturn if f.country.is_none() => Trouble::OwnersReturn(None),
            WhatFile::OwnersReturn => Trouble::OwnersReturn(Some(country()?)),
            WhatFile::SchedulerLost => {
                let name = f.scheduler.as_deref().unwrap_or_default();
                match seats.iter().position(|seat| seat.name == name) {
                    Some(s) => Trouble::SchedulerLost(s),
                    None => return self.bad("fault.scheduler", format!("there is no scheduler {name:?}")),
                }
            }
        };
        Ok(PlannedFault {
            at_ms: self.hours("fault.at_hours", f.at_hours)?,
            for_ms: self.hours("fault.hours", f.hours)?,
            what,
        })
    }
}
