use super::*;

const LEAST: &str = r#"
name = "least"
about = "As little as there can be."
hours = 1.0
[[scheduler]]
name = "s"
country = "KE"
[[institution]]
name = "uni-nairobi"
country = "KE"
machines = { cpu = 2 }
users = 1
"#;

fn refusal(text: &str) -> String {
    match parse(Path::new("w.toml"), text, None) {
        Ok(_) => "read".into(),
        Err(error) => error.to_string(),
    }
}

#[test]
fn the_least_scenario_is_read() {
    let scenario = parse(Path::new("w.toml"), LEAST, None).unwrap();
    assert_eq!(scenario.setup.members[0].machines[0].1, 2);
    assert_eq!(scenario.setup.timing, Timing::DAILY);
}

#[test]
fn unknown_keys_are_refused_with_file_line_and_key() {
    for (added, key) in [
        ("wind = 3\n", "wind"),
        ("[timing]\nheart = 3\n", "heart"),
        ("[storm]\nrain = 3\n", "rain"),
        ("[habit.h]\nfrom = \"09:00\"\nto = \"18:00\"\nmood = 1\n", "mood"),
        (
            "[[fault]]\nat_hours = 1.0\nhours = 1.0\nwhat = \"owners-return\"\nwhere = \"KE\"\n",
            "where",
        ),
    ] {
        let text = if added.starts_with('[') {
            format!("{LEAST}{added}")
        } else {
            format!("{added}{LEAST}")
        };
        let said = refusal(&text);
        let line = text.lines().position(|l| l.starts_with(key)).unwrap() + 1;
        assert!(said.starts_with("w.toml: "), "{said}");
        assert!(said.contains(&format!("line {line}")), "{said}");
        assert!(said.contains(&format!("unknown field `{key}`")), "{said}");
    }
    let said = refusal(&LEAST.replace("hours = 1.0", "hours = \"one\""));
    assert!(said.contains("line 4") && said.contains("hours"), "{said}");
}

#[test]
fn impossible_values_are_refused_with_their_key() {
    let workload = |lines: &str| {
        format!(
            "{LEAST}[[workload]]\nname = \"w\"\narrivals = {{ pattern = \"steady\", jobs_per_hour = 1.0 }}\nitem = {{ kind = \"fixed\", seconds = [1.0, 2.0] }}\n{lines}"
        )
    };
    assert_eq!(refusal(&workload("")), "read");
    for (text, expected) in [
        (
            LEAST.replace("country = \"KE\"\nmachines", "country = \"XX\"\nmachines"),
            "w.toml: institution \"uni-nairobi\", country: \"XX\" is none of",
        ),
        (
            LEAST.replace("cpu = 2", "abacus = 2"),
            "w.toml: institution \"uni-nairobi\", machines: \"abacus\" is none of a100, cpu, h100, t4",
        ),
        (
            LEAST.replace("cpu = 2", "cpu = 0"),
            "w.toml: institution.machines: 0 in all; there must be 1 to 2000000",
        ),
        (
            LEAST.replace("hours = 1.0", "hours = -1.0"),
            "w.toml: hours: -1 is not between 0 and 8784",
        ),
        (
            LEAST.replace("users = 1", "habit = \"late\""),
            "w.toml: institution \"uni-nairobi\", habit: there is no [habit.late]",
        ),
        (
            LEAST.replace("users = 1", "schedulers = [\"t\"]"),
            "w.toml: institution \"uni-nairobi\", schedulers: there is no scheduler \"t\"",
        ),
        (
            format!("{LEAST}[timing]\nlease_seconds = 30\n"),
            "w.toml: timing.lease_seconds: is under two heartbeats",
        ),
        (
            workload("items = [3, 2]\n"),
            "w.toml: workload \"w\", items: [3, 2] is no range from 1 upwards",
        ),
        (
            workload("donated_percent = 101.0\n"),
            "w.toml: workload \"w\", donated_percent: 101 is not between 0 and 100",
        ),
        (
            workload("institutions = [\"mit\"]\n"),
            "w.toml: workload \"w\", institutions: no institution \"mit\" has users",
        ),
        (
            format!("{LEAST}[[fault]]\nat_hours = 1.0\nhours = 1.0\nwhat = \"country-dark\"\n"),
            "w.toml: fault.country: is missing: which country?",
        ),
        (
            format!("{LEAST}[power]\nwatts = {{ cpu = 90, \"cuda/h100\" = 700000 }}\n"),
            "w.toml: line 14, column 35, power.watts.cuda/h100: 700000 is over 100000 watts: is it in another unit?",
        ),
        (
            format!("{LEAST}[power]\ncarbon_max_grams = 400000\n"),
            "w.toml: line 14, column 20, power.carbon_max_grams: 400000 is over 2000 grams for a kilowatt-hour",
        ),
        (
            workload("").replace(
                "pattern = \"steady\", jobs_per_hour = 1.0",
                "pattern = \"azure-llm\", at_hours = 0.0, gather_seconds = 60, times = 1",
            ),
            "w.toml: workload \"w\", arrivals: needs the trace of requests: name a data folder with --data",
        ),
    ] {
        let said = refusal(&text);
        assert!(said.starts_with(expected), "{said}");
    }
}
