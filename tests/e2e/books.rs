//! The books among people who do not trust each other: answers, rulings, statements, forms, witnesses, retention.
use crate::{
    good_days::{Daemons, free_ports, patiently},
    net::{Answer, run},
};
use karez_core::unit::UtcMillis;
use karez_ledger::report::Month;
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tempfile::TempDir;

fn now() -> UtcMillis {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    UtcMillis(u64::try_from(since.as_millis()).unwrap())
}

/// A federation that lends nothing, a university whose machine has a price, and a researcher of another one.
struct Federation {
    dir: TempDir,
    daemons: Daemons,
}

impl Federation {
    fn up() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut all = Self {
            dir,
            daemons: Daemons::default(),
        };
        all.scheduler("federation", &[]);
        all.daemons.start(&all.home("federation"), "scheduler");
        let for_node = all.invite("federation", "node", &["--institution", "uni-nairobi"]);
        let for_user = ["--institution", "lab-recife", "--credits", "100"];
        let for_user = all.invite("federation", "user", &for_user);
        patiently(|| all.run("researcher", &["join", &for_user]).code == 0);
        let own = all.invite("federation", "user", &[]);
        all.run("federation", &["join", &own]).ok();
        let machine = ["--name", "lab-7", "--country", "KE", "--price", "40"];
        let init = [&["node", "init", "--join", &for_node][..], &machine].concat();
        all.run("university", &init).ok();
        all.daemons.start(&all.home("university"), "node");
        patiently(|| {
            let status = all.run("university", &["node", "status"]);
            status.out.contains("connected, offer accepted")
        });
        all
    }

    fn home(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn scheduler(&self, name: &str, more: &[&str]) {
        let port = free_ports().to_string();
        let init = ["scheduler", "init", "--institution", "my-federation"];
        let at = ["--host", "127.0.0.1", "--port", &port];
        self.run(name, &[&init[..], &at, more].concat()).ok();
    }

    fn invite(&self, scheduler: &str, role: &str, more: &[&str]) -> String {
        let args = [&["scheduler", "invite", "--role", role][..], more].concat();
        self.run(scheduler, &args).ok().out.trim().to_owned()
    }

    fn run(&self, home: &str, args: &[&str]) -> Answer {
        run(&self.home(home), args)
    }

    /// As the operator, with the scheduler's own key.
    fn operate(&self, args: &[&str]) -> Answer {
        let dir = self.text("federation/scheduler");
        self.run("federation", &[args, &["--scheduler", &dir]].concat())
    }

    fn text(&self, name: &str) -> String {
        self.home(name).to_str().unwrap().to_owned()
    }

    /// A job of one part that takes a second of a machine; gives its receipt once it is settled.
    fn receipt(&self) -> (String, u64) {
        fs::write(self.home("input.jsonl"), "{}\n".repeat(10)).unwrap();
        let input = self.home("input.jsonl");
        let job = format!("work = \"noop\"\ninput = {input:?}\n[noop]\nmillis_per_item = 100\n");
        fs::write(self.home("job.toml"), job).unwrap();
        let job = self.text("job.toml");
        let id = self.run("researcher", &["submit", &job, "--detach"]).ok().out;
        let id = id.trim();
        let mut shown = Value::Null;
        patiently(|| {
            shown = self.run("researcher", &["job", "show", id, "--json"]).ok().json();
            assert_ne!(shown["state"], "failed", "{shown}");
            shown["state"] == "done" && shown["parts"][0]["receipt"].is_string()
        });
        let part = &shown["parts"][0];
        let paid = part["credits_microcredits"].as_u64().unwrap();
        assert!(paid > 0, "{shown}");
        (part["receipt"].as_str().unwrap().to_owned(), paid)
    }

    fn export(&self, name: &str) -> String {
        let file = self.text(name);
        self.run("researcher", &["ledger", "export", "-o", &file]).ok();
        file
    }

    fn balance(&self, account: &str) -> i64 {
        let all = self
            .run("federation", &["balance", "--all", "--json"])
            .ok()
            .json();
        let found = all.as_array().unwrap().iter().find(|a| a["account"] == account);
        found.map_or(0, |a| a["microcredits"].as_i64().unwrap())
    }
}

#[test]
fn receipts_are_answered_and_the_month_is_stated_netted_and_exported() {
    let net = Federation::up();
    let month = Month::of(now()).to_string();
    net.operate(&["ledger", "rates", "--set", "cpu=0.5"]).ok();
    floors(&net);
    let (first, paid_first) = net.receipt();
    let (second, paid) = net.receipt();
    assert_eq!(
        net.balance("institution:uni-nairobi"),
        i64::try_from(paid_first + paid).unwrap()
    );

    // Agreed: once, and by nobody else.
    let foreign = net.run("federation", &["ledger", "accept", &first]);
    assert!(
        foreign.code != 0 && foreign.err.contains("whoever paid"),
        "{foreign:?}"
    );
    let accepted = net.run("researcher", &["ledger", "accept", &first]).ok();
    assert!(accepted.out.contains("accepted: entry"), "{accepted:?}");
    let again = net.run("researcher", &["ledger", "accept", &first]);
    assert!(again.code != 0 && again.err.contains("before"), "{again:?}");

    // Disputed: frozen, listed, ruled on.
    let shot = net.home("zeros.jsonl");
    fs::write(&shot, "{\"embedding\":[0,0]}\n").unwrap();
    let because = ["--because", "all zero", "--evidence", shot.to_str().unwrap()];
    let disputed = [&["ledger", "dispute", &second][..], &because].concat();
    net.run("researcher", &disputed).ok();
    let institution = "institution:uni-nairobi";
    assert_eq!(net.balance(institution), i64::try_from(paid_first).unwrap());
    let open = net.operate(&["ledger", "disputes", "--json"]).ok().json();
    assert_eq!(open["receipt"], second.as_str(), "{open}");
    assert_eq!(open["microcredits"], paid, "{open}");
    let refund = paid / 4;
    let credits = format!("0.{refund:06}");
    let rule = ["ledger", "rule", &second, "--because", "a quarter was useless"];
    let over = [&rule[..], &["--refund", "99"]].concat();
    assert_ne!(net.operate(&over).code, 0);
    net.operate(&[&rule[..], &["--refund", &credits]].concat()).ok();
    assert_eq!(
        net.balance(institution),
        i64::try_from(paid_first + paid - refund).unwrap()
    );
    net.operate(&[
        "ledger",
        "pay",
        "lab-recife",
        "uni-nairobi",
        "0.01",
        "--reference",
        "t1",
    ])
    .ok();

    let books = net.export("books.jsonl");
    let verified = net.run("nobody", &["ledger", "verify", &books]).ok();
    assert!(verified.out.contains("verified"), "{verified:?}");
    let proof = net.text("second.tlog-proof");
    net.run("researcher", &["ledger", "prove", &second, "-o", &proof])
        .ok();
    let proven = net.run("nobody", &["ledger", "verify", &proof]).ok();
    assert!(proven.out.contains("\n  receipt "), "{proven:?}");

    let shares = net
        .run("nobody", &["ledger", "shares", "--file", &books])
        .ok()
        .out;
    assert!(shares.contains("by floors of version 2"), "{shares}");
    held(&net, &books, [&first, &second]);
    statements(&net, &books, &month, paid_first + paid, refund);
    let netting = net.run(
        "nobody-2",
        &["ledger", "netting", "--month", &month, "--file", &books],
    );
    let netting = netting.ok().out;
    assert!(netting.contains("lab-recife pays uni-nairobi"), "{netting}");
    // The last entry is of this month: with or without it, the figures are the same.
    assert_eq!(
        net.run("nobody-2", &["ledger", "netting", "--file", &books])
            .ok()
            .out
            .lines()
            .count(),
        netting.lines().count()
    );
    forms(&net, &books, &month);
    cut(&net, &books);
}

/// How institutions share is promised by the operator alone, in the ledger, version after version.
fn floors(net: &Federation) {
    let unsigned = net.run("researcher", &["ledger", "floors"]).ok().out;
    assert!(unsigned.contains("nobody has signed"), "{unsigned}");
    let set = ["ledger", "floors", "--floor", "40", "--extra", "uni-nairobi=50"];
    assert_ne!(net.run("researcher", &set).code, 0);
    net.operate(&set).ok();
    net.operate(&["ledger", "floors", "--donated", "0.2"]).ok();
    let now = net.run("researcher", &["ledger", "floors", "--json"]).ok().json();
    assert_eq!(
        (&now["version"], &now["floor_percent"]),
        (&2.into(), &40.into()),
        "{now}"
    );
    assert_eq!(now["donated_microcredits_per_hour"], 200_000, "{now}");
    assert_eq!(now["extra_percent"]["uni-nairobi"], 50, "{now}");
}

/// The node kept what the scheduler signed, and anybody can hold it against the ledger.
fn held(net: &Federation, books: &str, receipts: [&str; 2]) {
    let listed = net.run("university", &["node", "receipts", "--json"]).ok().out;
    assert_eq!(listed.lines().count(), 2, "{listed}");
    assert!(receipts.iter().all(|id| listed.contains(id)), "{listed}");
    let path = net.run("university", &["node", "receipts", "--path"]).ok().out;
    let path = path.trim();
    let whole = net
        .run("nobody", &["ledger", "verify", books, "--receipts", path])
        .ok()
        .out;
    assert!(whole.contains("has all 2 receipts"), "{whole}");
    // One character of one receipt: its line is named.
    let bad = net.text("bad-receipts");
    let text = fs::read_to_string(path).unwrap();
    fs::write(&bad, text.replacen('A', "B", 1)).unwrap();
    net.run("nobody", &["ledger", "verify", books, "--receipts", &bad])
        .refused(9, &["line"]);
}

/// The same statement from the network and from a file, by anyone; signed, compared, as text and as CSV.
fn statements(net: &Federation, books: &str, month: &str, paid: u64, refund: u64) {
    let of = |home: &str, name: &str, more: &[&str]| {
        let args = ["ledger", "statement", "--institution", name, "--month", month];
        net.run(home, &[&args[..], more].concat())
    };
    let text = of("researcher", "uni-nairobi", &[]).ok().out;
    let line = text
        .lines()
        .find(|line| line.starts_with("lent to lab-recife"))
        .unwrap();
    assert!(line.contains("receipts 2"), "{line}");
    assert!(line.contains(&format!("credits 0.{paid:06}")), "{line} {paid}");
    assert!(
        line.contains(&format!("refunded 0.{refund:06}")),
        "{line} {refund}"
    );
    let signed = net.text("uni-nairobi.txt");
    fs::write(&signed, &text).unwrap();
    let agreed = of("auditor", "uni-nairobi", &["--file", books, "--check", &signed]).ok();
    assert!(agreed.out.contains("the same, signed by"), "{agreed:?}");
    fs::write(&signed, text.replace("receipts 2", "receipts 3")).unwrap();
    of("auditor", "uni-nairobi", &["--file", books, "--check", &signed]).refused(9, &["signature", "wrong"]);
    let csv = of("auditor", "lab-recife", &["--file", books, "--format", "csv"])
        .ok()
        .out;
    let row = csv.lines().nth(1).unwrap();
    assert!(
        row.starts_with(&format!("{month},lab-recife,used,uni-nairobi,2,")),
        "{csv}"
    );
    let empty = of("auditor", "lab-recife", &["--file", books, "--format", "csv"]);
    assert_eq!(empty.ok().out, csv, "twice the same");
}

/// Every form has both receipts and no key of a user; a ledger that does not verify gives no file.
fn forms(net: &Federation, books: &str, month: &str) {
    let key = net.run("researcher", &["status", "--json"]);
    let user = serde_json::from_str::<Value>(&key.out).ok();
    let user = user.and_then(|v| v["key"].as_str().map(str::to_owned));
    for form in ["csv", "ndjson", "ogf", "apel", "focus", "auditor"] {
        let file = net.text(&format!("usage.{form}"));
        let args = [
            "ledger", "usage", "--form", form, "--month", month, "--file", books,
        ];
        let to_file = net.run("federation", &[&args[..], &["-o", &file]].concat()).ok();
        assert!(to_file.out.contains("2 records"), "{to_file:?}");
        let text = fs::read_to_string(&file).unwrap();
        assert_eq!(net.run("federation", &args).ok().out, text, "{form}");
        assert!(text.contains("u-"), "{form}: {text}");
        if let Some(user) = &user {
            assert!(!text.contains(user.as_str()), "{form}: {text}");
        }
    }
    let bad = net.text("bad.jsonl");
    fs::write(
        &bad,
        fs::read_to_string(books)
            .unwrap()
            .replacen("\"at\":", "\"at\":1", 1),
    )
    .unwrap();
    let out = net.text("never.csv");
    let args = ["ledger", "usage", "--form", "csv", "--file", &bad, "-o", &out];
    net.run("federation", &args).refused(9, &["line"]);
    assert!(!Path::new(&out).exists());
}

/// A copy that lost its tail is told so by another's copy, and by a published head.
fn cut(net: &Federation, books: &str) {
    let text = fs::read_to_string(books).unwrap();
    let lines: Vec<&str> = text.split_inclusive('\n').collect();
    let entries = lines.len() - 2;
    let short = net.text("short.jsonl");
    fs::write(&short, lines[..lines.len() - 3].concat()).unwrap();
    let against = ["ledger", "verify", &short, "--against", books];
    let lacks = net.run("nobody", &against);
    let first = format!("entry {}", entries - 2);
    lacks.refused(9, &["lacks its tail", "2 entries", &first]);
    net.run("nobody", &["ledger", "verify", &short])
        .refused(9, &["its tail was cut off"]);
    let heads = net.text("heads");
    fs::write(&heads, net.run("researcher", &["ledger", "head"]).ok().out).unwrap();
    net.run("nobody", &["ledger", "verify", books, "--heads", &heads])
        .ok();
    net.run("nobody", &["ledger", "verify", &short, "--heads", &heads])
        .refused(9, &["its tail is missing"]);
}

#[test]
fn a_ledger_with_two_histories_is_seen_by_its_witness() {
    let net = Federation {
        dir: tempfile::tempdir().unwrap(),
        daemons: Daemons::default(),
    };
    let mut net = net;
    let quick = |home: std::path::PathBuf| {
        let file = home.join("scheduler/scheduler.toml");
        let text = fs::read_to_string(&file).unwrap();
        let text = text.replace("# summary_every = \"10s\"", "summary_every = \"1s\"");
        assert!(text.contains("\nsummary_every"), "{text}");
        fs::write(&file, text).unwrap();
    };
    net.scheduler("federation", &[]);
    quick(net.home("federation"));
    let forked = {
        let home = net.home("federation");
        net.daemons.start(&home, "scheduler")
    };
    // The witness finds it by the address that an invitation carries.
    let node = net.invite("federation", "node", &[]);
    patiently(|| {
        net.run("machine", &["node", "init", "--country", "KE", "--join", &node])
            .code
            == 0
    });
    let settings = fs::read_to_string(net.home("machine/node/node.toml")).unwrap();
    let peers = settings
        .lines()
        .find(|line| line.starts_with("peer_addrs"))
        .unwrap();
    let peers = peers.split_once('=').unwrap().1;
    net.scheduler("witness", &[]);
    quick(net.home("witness"));
    let file = net.home("witness/scheduler/scheduler.toml");
    let text = fs::read_to_string(&file).unwrap();
    fs::write(
        &file,
        text.replace("bootstrap = []", &format!("bootstrap = {peers}")),
    )
    .unwrap();
    net.daemons.start(&net.home("witness"), "scheduler");
    for name in ["federation", "witness"] {
        let own = net.invite(name, "user", &["--credits", "1"]);
        patiently(|| net.run(name, &["join", &own]).code == 0);
    }
    let limit = |credits: &str| net.operate(&["ledger", "limit", "uni-a", credits]).code == 0;
    assert!(limit("1"));
    let before = net.run("federation", &["ledger", "head", "--json"]).ok().json()["size"]
        .as_u64()
        .unwrap();
    patiently(|| is_witnessed(&net, before));

    // The scheduler's disk is set back to an older copy, and another history grows from there.
    let (state, copy) = (net.home("federation/scheduler/state"), net.home("copy"));
    net.daemons.stop(forked);
    copy_dir(&state, &copy);
    let again = {
        let home = net.home("federation");
        net.daemons.start(&home, "scheduler")
    };
    let net = &mut net;
    patiently(|| net.operate(&["ledger", "limit", "uni-a", "2"]).code == 0);
    patiently(|| is_witnessed(net, before + 1));
    net.daemons.stop(again);
    fs::remove_dir_all(&state).unwrap();
    copy_dir(&copy, &state);
    {
        let home = net.home("federation");
        net.daemons.start(&home, "scheduler")
    };
    patiently(|| net.operate(&["ledger", "limit", "uni-a", "3"]).code == 0);
    let mut shown = String::new();
    patiently(|| {
        shown = net.run("witness", &["ledger", "head", "--forks"]).out;
        shown.contains("and another:")
    });
    let heads = shown.matches(&format!("\n{}\n", before + 1)).count();
    assert_eq!(heads, 2, "both heads, of the same size: {shown}");
    // The scheduler itself hears of it, too.
    patiently(|| {
        let own = net.run("federation", &["ledger", "head", "--forks"]);
        own.out.contains("and another:")
    });
    let note = net.run("witness", &["ledger", "head", "--json"]).ok().json();
    assert!(!note["forks"].as_array().unwrap().is_empty(), "{note}");
}

/// Whether the head of so many entries bears the scheduler's signature and another's.
fn is_witnessed(net: &Federation, entries: u64) -> bool {
    let head = net.run("federation", &["ledger", "head", "--json"]);
    head.code == 0 && {
        let head = head.json();
        let note = head["note"].as_str().unwrap();
        head["size"] == entries && note.matches("\n\u{2014} ").count() == 2
    }
}

fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for item in fs::read_dir(from).unwrap().flatten() {
        let (path, target) = (item.path(), to.join(item.file_name()));
        if path.is_dir() {
            copy_dir(&path, &target);
        } else {
            fs::copy(&path, &target).unwrap();
        }
    }
}

#[test]
fn the_operator_drops_what_is_long_over() {
    let mut net = Federation::up();
    net.receipt();
    let whole = net.export("whole.jsonl");
    let next = Month::of(Month::of(now()).end()).to_string();
    let dir = net.text("federation/scheduler");
    let forget = ["ledger", "forget", "--before", &next, "--scheduler", &dir];
    net.run("federation", &forget).refused(3, &["is running"]);
    net.daemons.stop(0);
    // Its window is open for a week.
    let kept = net
        .run("federation", &[&forget[..], &["--json"]].concat())
        .ok()
        .json();
    assert_eq!(
        (&kept["entries"], &kept["kept"]),
        (&1.into(), &1.into()),
        "{kept}"
    );
    let file = net.home("federation/scheduler/scheduler.toml");
    let text = fs::read_to_string(&file).unwrap();
    fs::write(
        &file,
        text.replace("# dispute_window = \"7d\"", "dispute_window = \"1s\""),
    )
    .unwrap();
    let running = {
        let home = net.home("federation");
        net.daemons.start(&home, "scheduler")
    };
    patiently(|| net.run("researcher", &["offers"]).out.contains("lab-7"));
    let (receipt, _) = net.receipt();
    let full = net.export("full.jsonl");
    std::thread::sleep(Duration::from_millis(1_100));
    net.daemons.stop(running);
    let done = net
        .run("federation", &[&forget[..], &["--json"]].concat())
        .ok()
        .json();
    assert_eq!(
        (&done["entries"], &done["kept"]),
        (&2.into(), &1.into()),
        "{done}"
    );
    {
        let home = net.home("federation");
        net.daemons.start(&home, "scheduler")
    };
    patiently(|| net.run("researcher", &["balance"]).code == 0);
    let listed = net
        .run("researcher", &["ledger", "show", "-n", "1000", "--json"])
        .ok()
        .out;
    let less = net.export("less.jsonl");
    let entries = fs::read_to_string(&less).unwrap().lines().count() - 2;
    assert_eq!(
        listed.lines().count(),
        entries,
        "what was dropped is listed: {listed}"
    );
    let verified = net
        .run("nobody", &["ledger", "verify", &less, "--against", &full])
        .ok()
        .out;
    assert!(
        verified.contains("3 entries had their records dropped"),
        "{verified}"
    );
    net.run("nobody", &["ledger", "verify", &less, "--whole"])
        .refused(9, &["dropped"]);
    net.run("nobody", &["ledger", "verify", &whole, "--whole"]).ok();
    let proof = net.run("researcher", &["ledger", "prove", &receipt]).ok().out;
    let file = net.text("dropped.tlog-proof");
    fs::write(&file, proof).unwrap();
    let proven = net.run("nobody", &["ledger", "verify", &file]).ok().out;
    assert!(proven.contains("its records were dropped"), "{proven}");
}

/// A balance for ten jobs, and many more processes that ask at the same time: exactly ten are taken.
#[test]
fn many_at_once_on_a_balance_for_ten_are_exactly_ten() {
    let net = Federation::up();
    let invited = net.invite("federation", "user", &["--credits", "100"]);
    net.run("student", &["join", &invited]).ok();
    let input = net.home("input.jsonl");
    fs::write(&input, "{}\n").unwrap();
    let job = net.text("job.toml");
    let text = format!("work = \"noop\"\ninput = {input:?}\n[noop]\nmillis_per_item = 600000\n");
    fs::write(&job, text).unwrap();
    let tries = if std::env::var_os("KAREZ_LONG").is_some() {
        100
    } else {
        24
    };
    let submit = ["submit", &job, "--detach", "--max-cost", "10"];
    // A scheduler shakes at most sixteen hands of one address at a time.
    let answers: Vec<Answer> = std::thread::scope(|scope| {
        let (net, submit) = (&net, &submit);
        let all: Vec<_> = (0..12)
            .map(|n| {
                scope.spawn(move || {
                    (n..tries)
                        .step_by(12)
                        .map(|_| net.run("student", submit))
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        all.into_iter().flat_map(|one| one.join().unwrap()).collect()
    });
    let (taken, refused): (Vec<&Answer>, Vec<&Answer>) = answers.iter().partition(|a| a.code == 0);
    assert_eq!((taken.len(), refused.len()), (10, tries - 10), "{refused:?}");
    for answer in refused {
        assert!(answer.err.contains("credits"), "{answer:?}");
    }
    let left = net.run("student", &["balance", "--json"]).ok().json();
    assert_eq!(left[0]["microcredits"], 0, "{left}");
    let books = net.export("books.jsonl");
    net.run("nobody", &["ledger", "verify", &books]).ok();
}
