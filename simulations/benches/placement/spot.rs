//! `spot_deadline`: jobs with a deadline on machines that come and go as real ones did.
//!
//! The rule is the one of the core ([`advise`]): it knows what was seen before the job came, and nothing of what comes.
//! The optimum knows everything: a dynamic program over time, work left and machine, apart from the rule. One step of
//! the trace is the unit of time; a start takes two of them, and they are paid.
use crate::{inventory::Inventory, median};
use karez_core::{
    placement::deadline::{Advice, On, Race, advise, possible},
    unit::Millis,
};
use karez_simulations::{
    rng::Rng,
    traces::{
        Folder,
        availability::{Availability, spot},
    },
};
use serde_json::{Value, json};

/// What a step costs on a machine that may be taken back, where one on a reliable machine costs a hundred: about what
/// clouds ask for such capacity.
const FICKLE: u32 = 35;
const RELIABLE: u32 = 100;
/// Steps from taking a machine to the first work on it.
const START: u32 = 2;
const JOBS: usize = 300;
const ZONES: [&str; 3] = ["us-east-1a", "us-east-1c", "us-west-2b"];

/// Machines that come and go, by step.
struct World {
    name: String,
    gap_s: u64,
    up: Vec<Vec<bool>>,
}

struct Job {
    at: usize,
    /// Steps of work, and from start to deadline.
    work: u32,
    window: u32,
}

fn worlds(folder: Option<&Folder>) -> Result<(String, Vec<World>), String> {
    let traces: Vec<(String, Availability)> = match folder {
        Some(folder) => {
            let read = ZONES.iter().map(|zone| {
                let trace = spot(&folder.spot(zone)).map_err(|why| why.to_string())?;
                Ok(((*zone).to_string(), trace))
            });
            read.collect::<Result<_, String>>()?
        }
        None => [(13, 64), (27, 31), (192, 20)]
            .into_iter()
            .map(|(up, down)| (format!("drawn-{up}-{down}"), drawn(up, down)))
            .collect(),
    };
    let source = match folder {
        Some(folder) => format!("spot availability in {}", folder.path().display()),
        None => "availability drawn after the mean times of three published traces".into(),
    };
    let mut worlds: Vec<World> = traces
        .iter()
        .map(|(name, trace)| World {
            name: name.clone(),
            gap_s: trace.gap_s,
            up: vec![trace.up.clone()],
        })
        .collect();
    let steps = traces.iter().map(|(_, trace)| trace.up.len()).min().unwrap_or(0);
    worlds.push(World {
        name: "all of them".into(),
        gap_s: traces.first().map_or(0, |(_, trace)| trace.gap_s),
        up: traces
            .iter()
            .map(|(_, trace)| trace.up[..steps].to_vec())
            .collect(),
    });
    Ok((source, worlds))
}

/// Times up and down of those means, in steps.
fn drawn(up: u64, down: u64) -> Availability {
    let mut rng = Rng::new(up);
    let mut there = false;
    let steps = (0..20_000).map(|_| {
        there ^= rng.chance(1_000 / if there { up } else { down });
        there
    });
    Availability {
        gap_s: 195,
        up: steps.collect(),
    }
}

impl World {
    fn steps(&self) -> usize {
        self.up.first().map_or(0, Vec::len)
    }

    fn jobs(&self) -> Vec<Job> {
        let mut rng = Rng::new(9);
        let hour = 3_600 / self.gap_s;
        (0..JOBS)
            .map(|_| {
                let work = rng.between(2 * hour, 16 * hour) as u32;
                let window = (u64::from(work) * rng.between(110, 200)).div_ceil(100) as u32;
                // A week goes before the first, to learn from.
                let at = rng.between(7 * 24 * hour, (self.steps() as u64).saturating_sub(33 * hour)) as usize;
                Job { at, work, window }
            })
            .collect()
    }

    /// Mean time from one return of any of these machines to the next, as seen in a week before `at`.
    fn between(&self, at: usize) -> u64 {
        let any = |t: usize| self.up.iter().any(|up| up[t]);
        let from = at.saturating_sub(7 * 24 * 3_600 / self.gap_s as usize);
        let returns = (from + 1..at).filter(|t| any(*t) && !any(*t - 1)).count();
        ((at - from) / returns.max(1)) as u64
    }
}

/// What a rule wants in the coming step.
trait Rule {
    fn next(&mut self, until: u32, left: u32, on: On, fickle: bool) -> Advice;
}

struct Ours {
    between: u64,
}

impl Rule for Ours {
    fn next(&mut self, until: u32, left: u32, on: On, fickle: bool) -> Advice {
        let steps = |n: u32| Millis(n.into());
        advise(&Race {
            until: steps(until),
            left: steps(left),
            start: steps(START),
            step: steps(1),
            on,
            fickle,
            between: Millis(self.between),
        })
    }
}

/// Cheap machines until the last moment, then a reliable one for good.
struct LastMoment;

impl Rule for LastMoment {
    fn next(&mut self, until: u32, left: u32, on: On, fickle: bool) -> Advice {
        match (on, fickle) {
            (On::Reliable, _) => Advice::Reliable,
            _ if until < left + 2 * START + 1 => Advice::Reliable,
            (_, true) => Advice::Any,
            _ => Advice::Wait,
        }
    }
}

/// An even pace: a reliable machine whenever the job is behind the straight line from order to deadline (Wu et al.).
struct EvenPace {
    work: u32,
    window: u32,
}

impl Rule for EvenPace {
    fn next(&mut self, until: u32, left: u32, on: On, fickle: bool) -> Advice {
        let (done, gone) = (self.work - left, self.window - until);
        let line = |ahead: u32| {
            (done as u64) * u64::from(self.window) >= u64::from(gone + ahead) * u64::from(self.work)
        };
        if until < left + 2 * START + 1 {
            return Advice::Reliable;
        }
        match on {
            On::Fickle if fickle => Advice::Any,
            On::Reliable if !line(2 * START) => Advice::Reliable,
            _ if fickle => Advice::Any,
            _ if line(0) => Advice::Wait,
            _ => Advice::Reliable,
        }
    }
}

/// What a job costs under a rule, and whether it was done in time.
fn run(world: &World, job: &Job, rule: &mut dyn Rule) -> (u32, bool) {
    let (mut left, mut cost, mut starting) = (job.work, 0, 0);
    // `None`: nowhere. `Some(None)`: reliable.
    let mut on: Option<Option<usize>> = None;
    for step in 0..job.window {
        if left == 0 {
            break;
        }
        let now = job.at + step as usize;
        if matches!(on, Some(Some(m)) if !world.up[m][now]) {
            on = None;
        }
        let fickle = match on {
            Some(Some(m)) => Some(m),
            // Of those that are there, the one that has been there longest is likeliest to stay.
            _ => (0..world.up.len())
                .filter(|m| world.up[*m][now])
                .max_by_key(|m| (0..now).rev().take_while(|t| world.up[*m][*t]).count()),
        };
        let place = match on {
            None => On::Nothing,
            Some(None) => On::Reliable,
            Some(Some(_)) => On::Fickle,
        };
        let next = match rule.next(job.window - step, left, place, fickle.is_some()) {
            Advice::Any => fickle.map(Some),
            Advice::Reliable => Some(None),
            Advice::Wait => None,
        };
        if next != on {
            (on, starting) = (next, START);
        }
        let Some(machine) = on else { continue };
        cost += if machine.is_some() { FICKLE } else { RELIABLE };
        if starting > 0 {
            starting -= 1;
        } else {
            left -= 1;
        }
    }
    (cost, left == 0)
}

/// The least it could have cost, knowing all that came.
fn optimum(world: &World, job: &Job) -> u32 {
    const NEVER: u32 = u32::MAX / 2;
    let machines = world.up.len() + 1;
    // Nowhere, then each machine (the reliable one first) by steps of its start that are left.
    let states = 1 + machines * (START as usize + 1);
    let state = |machine: usize, starting: u32| 1 + machine * (START as usize + 1) + starting as usize;
    let rows = job.work as usize + 1;
    let mut later = vec![NEVER; rows * states];
    later[..states].fill(0);
    let mut now = later.clone();
    for step in (0..job.window).rev() {
        let t = job.at + step as usize;
        for left in 1..rows {
            // From a machine that is there, with so much of its start left: one step on.
            let on = |machine: usize, starting: u32| {
                let price = if machine == 0 { RELIABLE } else { FICKLE };
                match starting {
                    0 => price + later[(left - 1) * states + state(machine, 0)],
                    n => price + later[left * states + state(machine, n - 1)],
                }
            };
            let there = |machine: usize| machine == 0 || world.up[machine - 1][t];
            let fresh = (0..machines)
                .filter(|m| there(*m))
                .map(|m| on(m, START))
                .min()
                .unwrap_or(NEVER);
            let anew = fresh.min(later[left * states]);
            now[left * states] = anew;
            for machine in 0..machines {
                for starting in 0..=START {
                    let stay = if there(machine) {
                        on(machine, starting)
                    } else {
                        NEVER
                    };
                    now[left * states + state(machine, starting)] = stay.min(anew);
                }
            }
        }
        std::mem::swap(&mut now, &mut later);
        later[..states].fill(0);
    }
    later[job.work as usize * states]
}

pub(crate) fn spot_deadline(inventory: &Inventory) -> Value {
    let (source, worlds) = match worlds(inventory.folder.as_ref()) {
        Ok(found) => found,
        Err(why) => {
            println!("spot_deadline: skipped: {why}");
            return json!({ "skipped": why });
        }
    };
    let mut rows = Vec::new();
    for world in &worlds {
        let jobs = world.jobs();
        let (mut ratios, mut missed, mut sums) = (Vec::new(), [0; 3], [0u64; 5]);
        for job in &jobs {
            let able = possible(
                Millis(job.window.into()),
                Millis(job.work.into()),
                Millis(START.into()),
            );
            let best = optimum(world, job);
            let mut ours = Ours {
                between: world.between(job.at),
            };
            let mut even = EvenPace {
                work: job.work,
                window: job.window,
            };
            let rules: [&mut dyn Rule; 3] = [&mut ours, &mut LastMoment, &mut even];
            for (i, rule) in rules.into_iter().enumerate() {
                let (cost, met) = run(world, job, rule);
                missed[i] += u32::from(able && !met);
                sums[i] += u64::from(cost);
                if i == 0 {
                    ratios.push(f64::from(cost) / f64::from(best));
                }
            }
            sums[3] += u64::from(best);
            sums[4] += u64::from((job.work + START) * RELIABLE);
        }
        let times = |i: usize| sums[i] as f64 / sums[3] as f64;
        ratios.sort_by(f64::total_cmp);
        let (middle, p90) = (median(ratios.clone()), ratios[ratios.len() * 9 / 10]);
        let up = world.up.iter().flatten().filter(|up| **up).count() * 100
            / world.up.iter().map(Vec::len).sum::<usize>().max(1);
        println!(
            "spot_deadline: {}, there {up} % of the time, {JOBS} jobs of 2 to 16 hours, deadlines 1.1 to 2 x the work: {:.3} x \
             the offline optimum in all (median {middle:.3}, p90 {p90:.3}), {} missed; the last moment {:.3} x ({} missed), an \
             even pace {:.3} x ({} missed), always reliable {:.2} x [aim 1.10, none missed]",
            world.name,
            times(0),
            missed[0],
            times(1),
            missed[1],
            times(2),
            missed[2],
            times(4),
        );
        rows.push(json!({
            "trace": world.name, "there_percent": up, "jobs": JOBS, "ratio": times(0), "median": middle, "p90": p90,
            "missed": missed[0], "last_moment": times(1), "last_moment_missed": missed[1], "even_pace": times(2),
            "even_pace_missed": missed[2], "always_reliable": times(4),
        }));
    }
    json!({ "rows": rows, "traces": source, "fickle_percent": FICKLE, "aim": "1.10 x the offline optimum, none missed" })
}
