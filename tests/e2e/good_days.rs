//! What a new user does first.
use crate::net::{Net, run, settlements};
use std::{fs, time::Duration};

#[test]
fn a_prompt_is_answered_and_billed_and_the_books_hold() {
    let net = Net::up();
    let answer = net
        .run(&[
            "generate",
            "--json",
            "--max-tokens",
            "24",
            "Why should I wash my hands?",
        ])
        .ok();
    assert!(!answer.out.trim().is_empty(), "{answer:?}");
    let jobs = net.run(&["jobs", "--all", "--json"]).ok().json();
    let id = find_id(&jobs);
    let job = net.job(&id);
    assert_eq!(job["state"], "done", "{job}");
    let ledger = net.verified_ledger();
    assert_eq!(settlements(&ledger, &id).len(), 1);
    let balance = net.run(&["balance", "--json"]).ok().json();
    let spent = job["spent_microcredits"].as_i64().unwrap();
    assert_eq!(
        balance[0]["microcredits"].as_i64().unwrap(),
        100_000_000 - spent,
        "{balance}"
    );
    net.run(&["job", "explain", &id]).ok();
    net.run(&["job", "logs", &id]).ok();
    net.run(&["offers"]).ok();
    let out = net.path("answers.jsonl");
    net.run(&["job", "fetch", &id, "-o", out.to_str().unwrap()]).ok();
    assert_eq!(fs::read_to_string(out).unwrap().lines().count(), 1);
}

#[test]
fn a_deadline_parts_together_and_a_recount_of_shares() {
    let net = Net::up();
    net.run(&[
        "generate",
        "--max-tokens",
        "8",
        "--together",
        "--deadline",
        "1h",
        "--data-class",
        "internal",
        "Why should I wash my hands?",
    ])
    .ok();
    let jobs = net.run(&["jobs", "--all", "--json"]).ok().json();
    let job = net.job(&find_id(&jobs));
    assert_eq!(job["state"], "done", "{job}");
    // Anyone can recount from an export what the scheduler counted.
    let export = net.path("ledger.jsonl");
    let export = export.to_str().unwrap();
    net.run(&["ledger", "export", "-o", export]).ok();
    let shares = net
        .run(&["ledger", "shares", "--file", export, "--json"])
        .ok()
        .out;
    let sum = |what: &str| -> u64 {
        let lines = shares.lines();
        let lines = lines.map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        lines.map(|line| line[what].as_u64().unwrap()).sum()
    };
    // Donated work costs nothing, yet counts at the standard rate: what one has used, another has given.
    let (given, used) = (sum("given_microcredits"), sum("used_microcredits"));
    assert!(given > 0 && given.abs_diff(used) <= 1, "{shares}");
    net.run(&["ledger", "shares"]).ok();
}

/// Half a device does the same work, is metered by halves, and is given by nobody who lends whole ones only.
#[test]
fn a_share_of_a_device_is_ordered_lent_and_billed() {
    let net = Net::up();
    let ask = |share: &str| {
        net.run(&[
            "generate",
            "--json",
            "--share",
            share,
            "--max-tokens",
            "8",
            "Why should I wash my hands?",
        ])
    };
    ask("0.5").refused(5, &["share of a device", "devices are lent whole"]);
    net.run(&["down"]).ok();
    let mut lenders = 0;
    for entry in fs::read_dir(net.home.join("up")).unwrap() {
        let settings = entry.unwrap().path().join("node.toml");
        if let Ok(text) = fs::read_to_string(&settings) {
            let shares = "[shares]\ncpu = 0.25\n\n[limits]";
            fs::write(settings, text.replacen("[limits]", shares, 1)).unwrap();
            lenders += 1;
        }
    }
    assert_eq!(lenders, 3);
    net.run(&["up"]).ok();
    let answer = ask("0.5").ok();
    assert!(!answer.out.trim().is_empty(), "{answer:?}");
    ask("0.2").refused(5, &["the smallest share lent is 0.25 of a device"]);
    let jobs = net.run(&["jobs", "--all", "--json"]).ok().json();
    let job = net.job(&find_id(&jobs));
    assert_eq!(job["state"], "done", "{job}");
    net.verified_ledger();
    let lines = net.run(&["ledger", "usage", "--form", "ndjson"]).ok().out;
    let used: serde_json::Value = serde_json::from_str(lines.lines().next().unwrap()).unwrap();
    assert_eq!(used["devices"], 0.5, "{used}");
}

fn find_id(jobs: &serde_json::Value) -> String {
    let list = jobs.as_array().or_else(|| jobs["jobs"].as_array()).unwrap();
    list[0]["job"].as_str().unwrap().to_owned()
}

#[test]
fn the_same_order_of_prompts_comes_back_from_many_parts() {
    let net = Net::up();
    let prompts: String = (0..24)
        .map(|i| format!("{{\"prompt\":\"question {i}\",\"id\":\"q{i}\"}}\n"))
        .collect();
    let input = net.file("prompts.jsonl", prompts);
    let out = net.path("out.jsonl");
    net.run(&[
        "generate",
        "--file",
        &input,
        "--max-tokens",
        "4",
        "--part-items",
        "5",
        "-o",
        out.to_str().unwrap(),
    ])
    .ok();
    let text = fs::read_to_string(out).unwrap();
    let ids: Vec<String> = text
        .lines()
        .map(|l| {
            serde_json::from_str::<serde_json::Value>(l).unwrap()["id"]
                .as_str()
                .unwrap()
                .to_owned()
        })
        .collect();
    assert_eq!(ids, (0..24).map(|i| format!("q{i}")).collect::<Vec<_>>());
}

#[test]
fn one_flipped_byte_in_the_books_is_named() {
    let net = Net::up();
    let id = net.noops(3, 0, 1);
    net.ended(&id, Duration::from_secs(30));
    net.verified_ledger();
    let good = fs::read(net.path("books.ndjson")).unwrap();
    for at in [good.len() / 5, good.len() / 2, good.len() * 4 / 5] {
        let mut bad = good.clone();
        bad[at] ^= 1;
        let file = net.file("flipped.ndjson", bad);
        net.run(&["ledger", "verify", &file]).refused(9, &["line"]);
    }
    let mut cut = good.clone();
    cut.truncate(good.len() * 3 / 4);
    let file = net.file("cut.ndjson", cut);
    assert_eq!(net.run(&["ledger", "verify", &file]).code, 9);
}

#[test]
fn down_leaves_no_process_behind() {
    let net = Net::up();
    let pids: Vec<i32> = [
        "scheduler",
        "lake-university",
        "coast-computing",
        "hill-institute",
    ]
    .map(|name| net.pid(name))
    .into();
    // Up twice is up once.
    net.run(&["up"]).ok();
    net.run(&["down"]).ok();
    for pid in pids {
        assert!(
            !std::path::Path::new(&format!("/proc/{pid}/exe")).exists(),
            "process {pid} still runs"
        );
    }
    assert_eq!(run(&net.home, &["jobs"]).code, 6);
}

#[test]
fn results_fetched_later_are_the_results_waited_for() {
    let net = Net::up();
    // No-ops need no text, and what the lines hold comes back.
    let input = net.file("in.jsonl", "{\"id\":\"a\"}\n{\"id\":\"ب\",\"n\":[1,2]}\n{}\n");
    let job = net.file(
        "job.toml",
        format!(
            "work = \"noop\"\ninput = {input:?}\noutput = \"waited.jsonl\"\n[noop]\nmillis_per_item = 0\n"
        ),
    );
    let waited = net.run(&["submit", &job]).ok();
    assert_eq!(waited.err, "", "piped, there is nothing to remark");
    let expected = "{\"index\":0,\"id\":\"a\"}\n{\"index\":1,\"id\":\"ب\",\"n\":[1,2]}\n{\"index\":2}\n";
    assert_eq!(fs::read_to_string(net.path("waited.jsonl")).unwrap(), expected);

    let id = net.run(&["submit", &job, "--detach"]).ok().out.trim().to_owned();
    net.ended(&id, Duration::from_secs(30));
    assert_eq!(net.run(&["job", "fetch", &id]).ok().out, expected);
    // From another machine with the same key, too: the scheduler still has the input.
    fs::remove_dir_all(net.home.join("artifacts")).unwrap();
    assert_eq!(net.run(&["job", "fetch", &id, "-o", "-"]).ok().out, expected);

    let late = net.run(&["job", "cancel", &id]).ok();
    assert!(late.out.contains("was done already"), "{late:?}");
    // A donated part is a settlement too, and says whose work it was.
    let shown = net.run(&["ledger", "show"]).ok().out;
    let settle = shown.lines().find(|l| l.contains(" settle ")).unwrap();
    assert!(
        settle.contains("escrow:") && settle.contains("institution:"),
        "{shown}"
    );
}

/// The README's first steps, word for word but for addresses: a federation, a university and a researcher.
#[test]
fn three_parties_meet_by_the_readme() {
    let dir = tempfile::tempdir().unwrap();
    let home = |name: &str| dir.path().join(name);
    let (federation, university, researcher) = (home("federation"), home("university"), home("researcher"));
    let port = free_ports().to_string();
    let at = ["--host", "127.0.0.1", "--port", &port];
    let init = ["scheduler", "init", "--institution", "my-federation"];
    run(&federation, &[&init[..], &at].concat()).ok();
    let mut daemons = Daemons::default();
    daemons.start(&federation, "scheduler");
    let invite = |role, more: &[&str]| {
        let args = [&["scheduler", "invite", "--role", role][..], more].concat();
        run(&federation, &args).ok().out.trim().to_owned()
    };
    let at_uni = ["--institution", "uni-nairobi"];
    let for_node = invite("node", &at_uni);
    let for_user = invite("user", &[&at_uni[..], &["--credits", "100"]].concat());
    let own = invite("user", &[]);
    patiently(|| run(&federation, &["join", &own]).code == 0);
    run(&federation, &["artifact", "add", "--shipped"]).ok();

    let node = ["--name", "lab-7", "--country", "KE", "--price", "0.40"];
    run(
        &university,
        &[&["node", "init", "--join", &for_node][..], &node].concat(),
    )
    .ok();
    daemons.start(&university, "node");
    patiently(|| {
        run(&university, &["node", "status"])
            .out
            .contains("connected, offer accepted")
    });

    run(&researcher, &["init"]).ok();
    run(&researcher, &["join", &for_user]).ok();
    let asked = [
        "generate",
        "Why should I rotate my crops?",
        "--country",
        "KE,BR",
        "--max-cost",
        "0.5",
    ];
    let answer = run(
        &researcher,
        &[&asked[..], &["--max-tokens", "8", "--json"]].concat(),
    )
    .ok()
    .json();
    assert_eq!(
        answer["report"]["parts"][0]["institution"], "uni-nairobi",
        "{answer}"
    );
    let books = home("books.ndjson");
    let books = books.to_str().unwrap();
    run(&researcher, &["ledger", "export", "-o", books]).ok();
    // The auditor belongs to nobody.
    let verified = run(&home("auditor"), &["ledger", "verify", books, "--json"])
        .ok()
        .json();
    assert_eq!(
        verified["institutions"]["uni-nairobi"]["receipts"], 1,
        "{verified}"
    );
    let spent = &answer["report"]["spent_microcredits"];
    assert_eq!(&verified["settled_microcredits"], spent);
    assert!(spent.as_u64().unwrap() > 0, "{answer}");
}

#[test]
fn a_node_finds_a_scheduler_that_admits_it() {
    let dir = tempfile::tempdir().unwrap();
    let home = |name: &str| dir.path().join(name);
    let (known, open, machine) = (home("known"), home("open"), home("machine"));
    let scheduler = |home: &std::path::Path, more: &[&str]| {
        let port = free_ports().to_string();
        let init = [
            "scheduler",
            "init",
            "--institution",
            "my-federation",
            "--host",
            "127.0.0.1",
            "--port",
            &port,
        ];
        run(home, &[&init[..], more].concat()).ok();
    };
    let edit = |file: std::path::PathBuf, from: &str, to: &str| {
        let text = fs::read_to_string(&file).unwrap();
        assert!(text.contains(from), "{text}");
        fs::write(file, text.replace(from, to)).unwrap();
    };
    let mut daemons = Daemons::default();
    scheduler(&known, &[]);
    daemons.start(&known, "scheduler");
    let invite = |home: &std::path::Path, role| {
        let args = ["scheduler", "invite", "--role", role, "--credits", "10"];
        let args = if role == "node" { &args[..4] } else { &args[..] };
        run(home, args).ok().out.trim().to_owned()
    };
    let init = ["node", "init", "--country", "KE", "--name", "wanderer", "--join"];
    let invitation = invite(&known, "node");
    patiently(|| run(&machine, &[&init[..], &[&invitation]].concat()).code == 0);
    let settings = machine.join("node/node.toml");
    let text = fs::read_to_string(&settings).unwrap();
    let peers = text.lines().find(|line| line.starts_with("peer_addrs")).unwrap();
    let peers = peers.split_once('=').unwrap().1;

    // All that the second scheduler and the node know of each other is the first scheduler's address.
    scheduler(&open, &["--open", "10"]);
    let its_settings = open.join("scheduler/scheduler.toml");
    edit(its_settings, "bootstrap = []", &format!("bootstrap = {peers}"));
    daemons.start(&open, "scheduler");
    let user = invite(&open, "user");
    patiently(|| run(&home("user"), &["join", &user]).code == 0);
    edit(settings, "# find_schedulers = true", "find_schedulers = true");
    daemons.start(&machine, "node");
    patiently(|| {
        let offers = run(&home("user"), &["offers"]);
        offers.code == 0 && offers.out.contains("wanderer")
    });
    // It is not only listed: it works for the one that found it, too.
    fs::write(home("input.jsonl"), "{}\n").unwrap();
    let input = home("input.jsonl");
    let job = format!("work = \"noop\"\ninput = {input:?}\n[noop]\nmillis_per_item = 1\n");
    fs::write(home("job.toml"), job).unwrap();
    let job = home("job.toml");
    let done = run(&home("user"), &["submit", job.to_str().unwrap(), "--json"]).ok();
    assert!(done.out.contains("wanderer"), "{done:?}");
    let status = run(&machine, &["node", "status"]).ok();
    assert_eq!(
        status.out.matches("connected, offer accepted").count(),
        2,
        "{status:?}"
    );
}

/// Daemons that end with the test.
#[derive(Default)]
pub(crate) struct Daemons(Vec<std::process::Child>);

impl Daemons {
    /// Gives the number to stop it by.
    pub(crate) fn start(&mut self, home: &std::path::Path, kind: &str) -> usize {
        let log = fs::File::create(home.join(format!("{kind}.log"))).unwrap();
        let mut command = crate::net::karez(home, &[kind, "run"]);
        let child = command.stdout(log.try_clone().unwrap()).stderr(log).spawn();
        self.0.push(child.unwrap());
        self.0.len() - 1
    }

    pub(crate) fn stop(&mut self, number: usize) {
        let child = &mut self.0[number];
        let pid = i32::try_from(child.id()).unwrap();
        crate::net::signal(pid, rustix::process::Signal::TERM);
        child.wait().unwrap();
    }
}

impl Drop for Daemons {
    fn drop(&mut self) {
        for child in self.0.iter_mut().rev() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

pub(crate) fn patiently(mut ask: impl FnMut() -> bool) {
    let began = std::time::Instant::now();
    while !ask() {
        assert!(began.elapsed() < Duration::from_secs(30), "waited in vain");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// The first of four ports in a row that are free now.
pub(crate) fn free_ports() -> u16 {
    // Tests run side by side, in processes of neighbouring numbers: each looks in a range of its own, below the ports
    // that the system gives out by itself.
    let from = 10_000 + 32 * u16::try_from(std::process::id() % 700).unwrap();
    let free = |port: u16| {
        std::net::TcpListener::bind(("127.0.0.1", port)).is_ok()
            && std::net::UdpSocket::bind(("127.0.0.1", port)).is_ok()
    };
    (from..32_700).step_by(4).find(|p| (*p..p + 4).all(free)).unwrap()
}

#[test]
fn a_paused_node_stays_paused_and_up_says_so() {
    let net = Net::up();
    let dir = net.dir("hill-institute");
    let dir = dir.to_str().unwrap();
    net.run(&["node", "pause", "--dir", dir]).ok();
    net.run(&["down"]).ok();
    let up = net.run(&["up"]).ok();
    assert!(
        up.err.contains("paused") && up.err.contains("karez node open"),
        "{up:?}"
    );
    net.run(&["node", "open", "--dir", dir]).ok();
    net.until(Duration::from_secs(10), "the node to be open", || {
        let offers = net.run(&["offers", "--json"]).ok().json();
        let all = offers.as_array()?;
        all.iter().all(|o| o["state"] == "open").then_some(())
    });
}
