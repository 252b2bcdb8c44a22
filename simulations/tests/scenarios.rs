//! The scenarios that come with Karez are readable, a small one runs to its end, and its report tells it.
use karez_simulations::{
    Sabotage, World,
    report::{Report, html},
    scenario,
};
use std::path::Path;

const SMALL: &str = r#"
name = "Small & <quick>"
about = "Two countries, owners at nine, one country cut off, one scheduler lost."
seed = 3
hours = 14.0
sample_minutes = 30.0
[habit.nine]
from = "09:00"
to = "12:00"
notice_minutes = 20
[[scheduler]]
name = "nairobi"
country = "KE"
[[scheduler]]
name = "paris"
country = "FR"
[[institution]]
name = "uni-nairobi"
country = "KE"
machines = { t4 = 4, cpu = 2 }
users = 2
price_credits_per_hour = 0.5
habit = "nine"
[[institution]]
name = "lyon-dc"
country = "FR"
machines = { t4 = 6 }
users = 2
price_credits_per_hour = 0.8
pricing = { every_minutes = 30.0, step_percent = 10, floor_credits_per_hour = 0.2, ceiling_credits_per_hour = 2.0 }
[[workload]]
name = "batches"
arrivals = { pattern = "steady", jobs_per_hour = 6.0 }
item = { kind = "fixed", seconds = [30.0, 90.0] }
items = [5, 30]
items_per_part = 8
cancelled_percent = 5.0
[[workload]]
name = "at home"
arrivals = { pattern = "diurnal", jobs_per_busy_hour = 3.0 }
item = { kind = "generate", tokens = 100 }
items = [5, 30]
at_home_percent = 100.0
[[fault]]
at_hours = 2.0
hours = 2.0
what = "country-dark"
country = "KE"
[[fault]]
at_hours = 8.0
hours = 1.0
what = "scheduler-lost"
scheduler = "paris"
"#;

#[test]
fn every_scenario_that_comes_with_karez_is_readable() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        // Those that need traces are read where a data folder is named.
        let data = std::env::var_os("KAREZ_DATA").map(karez_simulations::traces::Folder::new);
        match scenario::read(&path, data.as_ref()) {
            Ok(scenario) => names.push(scenario.setup.name),
            Err(error) if data.is_none() && error.to_string().contains("--data") => {
                println!("skipped: {error}");
            }
            Err(error) => panic!("{error}"),
        }
    }
    assert!(names.len() >= 7, "{names:?}");
}

#[test]
fn a_scenario_runs_to_its_end_and_its_report_tells_it() {
    let scenario = scenario::parse(Path::new("small.toml"), SMALL, None).unwrap();
    let run = || World::new(3, scenario.setup.clone()).run_recorded();
    let (summary, recorder) = run().unwrap_or_else(|failure| panic!("{failure}"));
    assert_eq!(run().map(|(again, _)| again), Ok(summary.clone()), "equal seeds");
    // Large worlds do without books that are read a second time.
    let mut lean = scenario.setup.clone();
    lean.keep_books = false;
    assert_eq!(World::new(3, lean).run().as_ref(), Ok(&summary));
    assert!(
        summary.done > 40 && summary.reclaims >= 6 && summary.restarts > 0,
        "{summary:?}"
    );
    assert!(recorder.leaving_ms_max <= scenario.setup.timing.reclaim_grace.0 + 500);
    let report = Report::of(&scenario, 3, &summary, recorder, 1.0);
    assert!(
        report.rules.iter().all(|rule| rule.judged > 0),
        "{:?}",
        report.rules
    );
    // While Kenya was dark, its machines were given no work from Paris and its people none to it.
    assert!(report.figures.device_hours_billed <= report.figures.device_hours_used);
    assert!(report.figures.device_hours_used <= report.figures.device_hours_lent);
    let page = html(&report);
    for words in [
        "Every rule held",
        "Small &amp; &lt;quick&gt;",
        "KE cut off",
        "paris lost",
        "lyon-dc",
    ] {
        assert!(page.contains(words), "{words}");
    }
    for foreign in ["http://", "https://", "<script", "url("] {
        assert!(!page.contains(foreign), "the page must stand alone: {foreign}");
    }
    let json: serde_json::Value = serde_json::from_str(&report.json()).unwrap();
    assert_eq!(json["figures"]["done"], summary.done);
    assert_eq!(json["samples"][0]["busy"].as_array().map(Vec::len), Some(2));
}

/// With `KAREZ_LONG` set, every scenario that comes with Karez is run to its end, but for the one of a million nodes.
#[test]
fn every_scenario_keeps_every_rule() {
    if std::env::var_os("KAREZ_LONG").is_none() {
        println!("skipped: KAREZ_LONG is not set");
        return;
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.ends_with("million.toml") {
            continue;
        }
        let data = std::env::var_os("KAREZ_DATA").map(karez_simulations::traces::Folder::new);
        let scenario = match scenario::read(&path, data.as_ref()) {
            Ok(scenario) => scenario,
            Err(error) if data.is_none() && error.to_string().contains("--data") => {
                println!("skipped: {error}");
                continue;
            }
            Err(error) => panic!("{error}"),
        };
        match World::new(scenario.seed, scenario.setup).run() {
            Ok(summary) => println!("{}: {summary:?}", path.display()),
            Err(failure) => panic!("{}: {failure}", path.display()),
        }
    }
}

#[test]
fn a_scenario_that_breaks_a_rule_names_its_seed() {
    let mut scenario = scenario::parse(Path::new("small.toml"), SMALL, None).unwrap();
    scenario.setup.sabotage = Some(Sabotage::Mint);
    let failure = World::new(5, scenario.setup).run().unwrap_err().to_string();
    assert!(
        failure.contains("seed 5") && failure.contains("makes or loses money"),
        "{failure}"
    );
    assert!(failure.contains("--seed 5"), "{failure}");
}
