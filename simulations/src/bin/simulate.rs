//! Runs scenarios and writes a page and JSON about each:
//!
//! ```text
//! simulate [--data DIR] [--out DIR] [--seed N] [--trace] FILE...
//! ```
//!
//! Exit code 0: every rule held. 1: one broke; its seed is printed. 2: a file or an argument was refused.
use karez_simulations::{
    World,
    report::{Report, html},
    scenario,
    traces::Folder,
};
use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

const USAGE: &str = "usage: simulate [--data DIR] [--out DIR] [--seed N] [--trace] FILE...

  FILE         a scenario; those that come with Karez are in simulations/scenarios/
  --data DIR   a folder of public traces: latencies, requests
  --out DIR    where page and JSON go; target/simulations by default
  --seed N     another seed than the file's
  --trace      tell what happened before a rule broke";

struct Arguments {
    files: Vec<PathBuf>,
    data: Option<Folder>,
    out: PathBuf,
    seed: Option<u64>,
    trace: bool,
}

fn arguments() -> Result<Arguments, String> {
    let mut out = Arguments {
        files: Vec::new(),
        data: None,
        out: PathBuf::from("target/simulations"),
        seed: None,
        trace: false,
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || {
            words
                .next()
                .ok_or_else(|| format!("{word} needs a value\n{USAGE}"))
        };
        match word.as_str() {
            "--data" => out.data = Some(Folder::new(value()?)),
            "--out" => out.out = value()?.into(),
            "--seed" => {
                let text = value()?;
                let seed = text.parse().map_err(|_| format!("{text:?} is no seed"))?;
                out.seed = Some(seed);
            }
            "--trace" => out.trace = true,
            "--help" | "-h" => return Err(USAGE.into()),
            option if option.starts_with('-') => return Err(format!("unknown option {option}\n{USAGE}")),
            file => out.files.push(file.into()),
        }
    }
    if out.files.is_empty() {
        return Err(format!("no scenario was named\n{USAGE}"));
    }
    Ok(out)
}

fn main() -> ExitCode {
    let arguments = match arguments() {
        Ok(arguments) => arguments,
        Err(said) => {
            eprintln!("{said}");
            return ExitCode::from(2);
        }
    };
    let mut worst = 0;
    for file in &arguments.files {
        match one(file, &arguments) {
            Ok(true) => {}
            Ok(false) => worst = worst.max(1),
            Err(said) => {
                eprintln!("{said}");
                worst = 2;
            }
        }
    }
    ExitCode::from(worst)
}

/// Whether every rule held.
fn one(file: &Path, arguments: &Arguments) -> Result<bool, String> {
    let mut scenario = scenario::read(file, arguments.data.as_ref()).map_err(|e| e.to_string())?;
    scenario.setup.trace = arguments.trace;
    let seed = arguments.seed.unwrap_or(scenario.seed);
    let began = Instant::now();
    let run = World::new(seed, scenario.setup.clone()).run_recorded();
    let seconds = began.elapsed().as_secs_f64();
    let (summary, recorder) = match run {
        Ok(run) => run,
        Err(failure) => {
            for line in &failure.trace {
                println!("{line}");
            }
            println!("{}: {failure}", file.display());
            println!("  simulate --seed {seed} --trace {}", file.display());
            return Ok(false);
        }
    };
    let report = Report::of(&scenario, seed, &summary, recorder, seconds);
    let stem = file
        .file_stem()
        .map_or("scenario".into(), |s| s.to_string_lossy());
    std::fs::create_dir_all(&arguments.out).map_err(|e| format!("{}: {e}", arguments.out.display()))?;
    for (ending, text) in [("html", html(&report)), ("json", report.json())] {
        let path = arguments.out.join(format!("{stem}.{ending}"));
        std::fs::write(&path, text).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    let f = &report.figures;
    println!(
        "{}: every rule held; {} of {} jobs done, wait {:.0} s median and {:.0} s at 95 %, {:.0} % of lent time used, \
         {} reclaims, {} crashes; {} events in {seconds:.1} s\n  {}",
        report.scenario,
        f.done,
        f.jobs,
        f.wait_s[0],
        f.wait_s[1],
        100.0 * f.device_hours_used / f.device_hours_lent.max(1e-9),
        f.reclaims,
        f.crashes,
        report.run.events,
        arguments.out.join(format!("{stem}.html")).display()
    );
    Ok(true)
}
