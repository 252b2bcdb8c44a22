//! The official OpenAI client from PyPI, unmodified, against a real network.
use crate::net::{Net, asked, encoder, kill_9};
use serde_json::Value;
use std::{
    io::{BufRead, BufReader, Lines, Read},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    sync::OnceLock,
    time::Duration,
};

/// A Python that has the client; nothing where PyPI cannot be reached.
fn python() -> Option<&'static Path> {
    static PYTHON: OnceLock<Option<PathBuf>> = OnceLock::new();
    PYTHON
        .get_or_init(|| {
            let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/openai-client");
            let said = Command::new(script).output().unwrap();
            if !said.status.success() {
                println!("skipped: {}", String::from_utf8_lossy(&said.stderr).trim());
                return None;
            }
            Some(PathBuf::from(String::from_utf8(said.stdout).unwrap().trim()))
        })
        .as_deref()
}

/// A network, an API key of its user, and where to use it.
struct Served {
    net: Net,
    key: Value,
}

/// Starts a check that tells how far it is, line by line.
fn started(check: &mut Command) -> (Child, Lines<BufReader<ChildStdout>>) {
    let mut child = check
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let said = BufReader::new(child.stdout.take().unwrap()).lines();
    (child, said)
}

impl Served {
    fn up(budget: &str) -> Self {
        let net = Net::up();
        let key = net
            .run(&["key", "new", "--name", "client", "--budget", budget, "--json"])
            .ok()
            .json();
        Self { net, key }
    }

    fn client(&self, args: &[&str]) -> Option<Command> {
        let mut command = Command::new(python()?);
        command
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/openai/client.py"))
            .args(args)
            .env("OPENAI_BASE_URL", self.key["base_url"].as_str().unwrap())
            .env("OPENAI_API_KEY", self.key["api_key"].as_str().unwrap())
            .env("NO_PROXY", "*")
            .stdin(Stdio::null());
        Some(command)
    }

    /// Runs one check to its end.
    fn check(&self, args: &[&str]) {
        let Some(mut client) = self.client(args) else {
            return;
        };
        let said = client.output().unwrap();
        assert!(
            said.status.success(),
            "{args:?}: {}\n{}",
            String::from_utf8_lossy(&said.stderr),
            self.net.logs()
        );
    }

    fn left(&self) -> i64 {
        let keys = self.net.run(&["key", "list", "--json"]).ok().json();
        keys["keys"][0]["left_microcredits"].as_i64().unwrap()
    }
}

#[test]
fn the_client_finds_what_it_expects() {
    let served = Served::up("5");
    for check in [
        "models",
        "chat",
        "schema",
        "completions",
        "errors",
        "wishes",
        "verification",
    ] {
        served.check(&[check]);
    }
    // Everything was billed to the key, and nothing beyond it to the user.
    let (left, balance) = (served.left(), served.net.run(&["balance", "--json"]).ok().json());
    assert!(left <= 5_000_000, "{left}");
    assert_eq!(balance[0]["microcredits"], 95_000_000, "{balance}");
    let back = served.net.run(&["key", "revoke", "client", "--json"]).ok().json();
    assert_eq!(back["returned_microcredits"].as_i64().unwrap(), left);
    let balance = served.net.run(&["balance", "--json"]).ok().json();
    assert_eq!(balance[0]["microcredits"].as_i64().unwrap(), 95_000_000 + left);
    // The books tell the same, to whoever checks them offline.
    served.net.verified_ledger();
    if let Some(mut client) = served.client(&["models"]) {
        let said = client.output().unwrap();
        let error = String::from_utf8_lossy(&said.stderr);
        assert!(!said.status.success() && error.contains("taken back"), "{error}");
    }
}

#[test]
fn a_batch_is_answered_in_order_and_each_line_once() {
    let served = Served::up("5");
    served.check(&["batches"]);
    let minilm = encoder();
    if let Some(minilm) = &minilm {
        served
            .net
            .run(&["artifact", "add", minilm, "--model", "minilm"])
            .ok();
    }
    served.check(&["more_batches", if minilm.is_some() { "minilm" } else { "" }]);
    served.net.verified_ledger();
}

/// The most memory a process has held, in MiB.
fn peak_mib(pid: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap();
    line.trim()
        .strip_suffix(" kB")
        .unwrap()
        .trim()
        .parse::<u64>()
        .unwrap()
        >> 10
}

/// 3,000 lines; a million with KAREZ_LONG. Whatever their number, what scheduler and nodes hold of them is the same.
#[test]
fn a_long_batch_loses_nothing_when_a_node_dies_and_is_held_by_nobody() {
    let (lines, budget) = match std::env::var_os("KAREZ_LONG") {
        Some(_) => (1_000_000, "500"),
        None => (3_000, "5"),
    };
    let served = Served::up(budget);
    let Some(mut client) = served.client(&["many", &lines.to_string()]) else {
        return;
    };
    let daemons = [served.net.pid("scheduler"), served.net.pid("lake-university")];
    let before = daemons.map(peak_mib);
    let (client, mut said) = started(&mut client);
    assert_eq!(
        said.next().map(Result::unwrap).as_deref(),
        Some("begun"),
        "{}",
        served.net.logs()
    );
    // In the middle of it: some parts are done, others under way there.
    std::thread::sleep(Duration::from_secs(2));
    kill_9(served.net.pid("hill-institute"));
    let ended = client.wait_with_output().unwrap();
    let error = String::from_utf8_lossy(&ended.stderr);
    assert!(ended.status.success(), "{error}\n{}", served.net.logs());
    let grown: Vec<u64> = daemons
        .map(peak_mib)
        .iter()
        .zip(before)
        .map(|(after, before)| after - before)
        .collect();
    println!("{lines} lines: scheduler and a node grew by {grown:?} MiB");
    assert!(grown.iter().all(|mib| *mib < 160), "{grown:?} MiB");
    served.net.verified_ledger();
}

#[test]
fn a_batch_that_waits_says_for_what() {
    let served = Served::up("5");
    let Some(mut client) = served.client(&["waits", ""]) else {
        return;
    };
    let (client, mut said) = started(&mut client);
    let begun = said.next().map(Result::unwrap);
    if begun.is_some() {
        kill_9(served.net.pid("hill-institute"));
    }
    let waits = said.next().map(Result::unwrap).unwrap_or_default();
    let ended = client.wait_with_output().unwrap();
    let error = String::from_utf8_lossy(&ended.stderr);
    assert!(ended.status.success(), "{error}\n{}", served.net.logs());
    assert!(waits.contains("2 excluded by institution"), "{waits}");
}

/// The shipped model with a template that shows tools, calls and their results.
fn with_tools() -> Vec<u8> {
    const TEMPLATE: &str = "{% for t in tools or [] %}{{ t|tojson }}{% endfor %}{% for m in messages %}{{ m.role + '\\n' + \
                            (m.content or '') }}{% if m.tool_calls %}{{ m.tool_calls|tojson }}{% endif %}{% endfor %}";
    const KEY: &[u8] = b"tokenizer.chat_template";
    let mut gguf = karez_engine::shipped::MODEL.to_vec();
    let at = gguf.windows(KEY.len()).position(|bytes| bytes == KEY).unwrap() + KEY.len();
    // A type of four bytes, a length of eight, the text: the new one is made as long.
    let length = u64::from_le_bytes(gguf[at + 4..at + 12].try_into().unwrap()) as usize;
    let template = format!("{TEMPLATE:length$}");
    assert_eq!(template.len(), length, "the template is too long");
    gguf[at + 12..at + 12 + length].copy_from_slice(template.as_bytes());
    gguf
}

#[test]
fn tools_reach_the_template() {
    let served = Served::up("5");
    let path = served.net.file("tools.gguf", with_tools());
    served
        .net
        .run(&["artifact", "add", &path, "--model", "with-tools"])
        .ok();
    served.check(&["tools", "with-tools"]);
}

#[test]
fn a_batch_file_is_a_job_too() {
    let net = Net::up();
    let line = |i: usize, water: usize| {
        serde_json::json!({
            "custom_id": format!("l{i}"), "url": "/v1/chat/completions",
            "body": {"model": "karez-tiny", "temperature": 0, "max_tokens": 4,
                     "messages": [{"role": "user", "content": "water ".repeat(water)}]},
        })
    };
    let lines: Vec<String> = (0..30)
        .map(|i| line(i, if i == 3 { 20_000 } else { 2 }).to_string())
        .collect();
    let file = net.file("batch.jsonl", lines.join("\n") + "\n");
    let answers = net.run(&["submit", &file, "-o", "-"]).ok().out;
    let answers: Vec<Value> = answers
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert_eq!(answers.len(), 30);
    for (i, answer) in answers.iter().enumerate() {
        assert_eq!(answer["custom_id"], format!("l{i}"));
        let status = if i == 3 { 400 } else { 200 };
        assert_eq!(answer["response"]["status_code"], status, "{answer}");
    }
    let bad = net.file("bad.jsonl", format!("{}\n{{}}\n", lines[0]));
    net.run(&["submit", &bad])
        .refused(3, &["bad.jsonl", "line 2", "custom_id"]);
}

#[test]
fn a_conversation_from_the_command_line_is_written_as_it_comes() {
    use std::io::Write;
    let net = Net::up();
    let question = "How should I wash my hands?";
    let asked = ["generate", "--json", "--max-tokens", "24", question];
    let whole = net.run(&asked).ok().json()["answers"][0]["text"]
        .as_str()
        .unwrap()
        .to_owned();
    // Long enough to be written for a while, as hardly any token is likelier than another: what comes within some
    // milliseconds is one piece.
    let long = [
        "--json",
        "--temperature",
        "3",
        "--seed",
        "5",
        "--max-tokens",
        "400",
        question,
    ];
    let streamed = net.run(&[&["generate", "--stream"], &long[..]].concat()).ok().out;
    let lines: Vec<Value> = streamed
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    let pieces: Vec<&str> = lines.iter().filter_map(|l| l["piece"].as_str()).collect();
    assert!(pieces.len() > 1, "it came in one piece: {streamed}");
    let same = net.run(&[&["generate"], &long[..]].concat()).ok().json()["answers"][0]["text"].clone();
    assert_eq!(Value::from(pieces.concat()), same);
    assert_eq!(lines.last().unwrap()["text"], same);

    let mut chat = crate::net::karez(&net.home, &["chat", "--json", "--max-tokens", "24"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    writeln!(chat.stdin.take().unwrap(), "{question}\n/new\n{question}\n/bye").unwrap();
    let said = chat.wait_with_output().unwrap();
    assert!(said.status.success());
    let answers: Vec<Value> = String::from_utf8(said.stdout)
        .unwrap()
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert_eq!(answers.len(), 2, "{answers:?}");
    assert!(answers.iter().all(|a| a["content"] == whole), "{answers:?}");
}

#[test]
fn vectors_are_the_same_packed_and_plain() {
    let Some(minilm) = encoder() else { return };
    let served = Served::up("5");
    served
        .net
        .run(&["artifact", "add", &minilm, "--model", "all-MiniLM-L6-v2"])
        .ok();
    served.check(&["embeddings", "all-MiniLM-L6-v2"]);
}

#[test]
fn a_model_is_taught_over_http_and_outlives_its_scheduler() {
    let mut served = Served::up("20");
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("engine/models/karez-tiny");
    served
        .net
        .run(&["artifact", "add", base.to_str().unwrap(), "--model", "tiny-base"])
        .ok();
    let Some(mut client) = served.client(&["tuning", "tiny-base"]) else {
        return;
    };
    let said = client.output().unwrap();
    let error = String::from_utf8_lossy(&said.stderr);
    assert!(said.status.success(), "{error}\n{}", served.net.logs());
    let model = String::from_utf8(said.stdout).unwrap().trim().to_owned();
    kill_9(served.net.pid("scheduler"));
    served.net.restart("scheduler", "scheduler");
    served
        .net
        .until(Duration::from_secs(30), "the scheduler to be back", || {
            (served.net.run(&["offers"]).code == 0).then_some(())
        });
    served.net.until(Duration::from_secs(30), "nodes to be back", || {
        let offers = served.net.run(&["offers", "--json"]);
        (offers.code == 0 && offers.out.contains("hill-institute")).then_some(())
    });
    served.check(&["taught", &model]);
    served.net.verified_ledger();
}

#[test]
fn a_client_that_goes_away_ends_its_job() {
    let served = Served::up("5");
    let Some(mut client) = served.client(&["leave"]) else {
        return;
    };
    let said = client.output().unwrap();
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    // What was set aside for it comes back: nothing is billed for an answer nobody took.
    served
        .net
        .until(Duration::from_secs(20), "the job to be called off", || {
            (served.left() == 5_000_000).then_some(())
        });
}

#[test]
fn a_client_that_does_not_read_holds_up_nobody() {
    let served = Served::up("5");
    let question = |tokens: usize| {
        serde_json::json!({
            "model": "karez-tiny", "messages": [{"role": "user", "content": "How should I wash my hands?"}],
            "max_tokens": tokens, "temperature": 0, "stream": true, "logit_bias": {"0": -100, "1": -100, "2": -100},
            "karez": {"institutions": ["hill-institute"]},
        })
    };
    // The node lends one device: what is not read must not keep it.
    let deaf: Vec<_> = (0..3)
        .map(|_| asked(&served.key, "/v1/chat/completions", &question(440)))
        .collect();
    let began = std::time::Instant::now();
    let mut said = String::new();
    asked(&served.key, "/v1/chat/completions", &question(4))
        .read_to_string(&mut said)
        .unwrap();
    assert!(said.contains("[DONE]") && !said.contains("\"error\""), "{said}");
    assert!(began.elapsed() < Duration::from_secs(60), "{:?}", began.elapsed());
    // What was written waits for whoever reads at last.
    for mut stream in deaf {
        let mut said = String::new();
        stream.read_to_string(&mut said).unwrap();
        assert!(said.contains("[DONE]") && !said.contains("\"error\""), "{said}");
    }
}

#[test]
fn an_answer_outlives_its_node() {
    let served = Served::up("5");
    // What an answer that nobody disturbs looks like.
    let Some(undisturbed) = follow(&served, |_| {}) else {
        return;
    };
    assert_eq!(undisturbed.at, "hill-institute", "donated, so the cheapest");
    let mut killed = false;
    let moved = follow(&served, |seen| {
        if !killed && !seen.is_empty() {
            killed = true;
            kill_9(served.net.pid("hill-institute"));
        }
    })
    .unwrap();
    assert!(killed);
    assert_ne!(moved.at, "hill-institute", "it was done before its node died");
    assert_eq!(moved.tokens.len(), 440, "a token was lost or doubled");
    // The new worker reads the tokens so far at once, where the old one wrote them one by one: sums are added up in another
    // order, and where two tokens were as good as equal (there are such in what a model says that may not end) the other
    // may be taken. A lost or doubled token would show at once, and anywhere.
    let mut pairs = moved.tokens.iter().zip(&undisturbed.tokens);
    if let Some((moved, undisturbed)) = pairs.find(|(moved, undisturbed)| moved.0 != undisturbed.0) {
        assert!(
            undisturbed.1 < 0.1,
            "a token was lost or doubled: {moved:?} for {undisturbed:?}"
        );
    }
    // The first answer was a gift. Of the other, only the order that ended it is paid; the use of one called off
    // may stand in the books, but without a price.
    let ledger = served.net.verified_ledger();
    let settled: Vec<i64> = ledger
        .iter()
        .filter(|line| line["kind"] == "settle")
        .map(|line| line["legs"][1][1].as_i64().unwrap())
        .collect();
    assert!((2..=3).contains(&settled.len()), "{settled:?}");
    assert_eq!(settled.iter().filter(|paid| **paid > 0).count(), 1, "{settled:?}");
}

/// An answer to its end.
struct Followed {
    /// Each token, and by how many nats the next best was worse.
    tokens: Vec<(String, f64)>,
    /// Who finished it.
    at: String,
}

/// The whole answer; `look` sees what has come so far.
fn follow(served: &Served, mut look: impl FnMut(&str)) -> Option<Followed> {
    let mut child = served
        .client(&["follow"])?
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut last = Value::Null;
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        last = serde_json::from_str(&line.unwrap()).unwrap();
        look(last["seen"].as_str().unwrap());
    }
    let said = child.wait_with_output().unwrap();
    assert!(
        said.status.success(),
        "{}\n{}",
        String::from_utf8_lossy(&said.stderr),
        served.net.logs()
    );
    assert_eq!(last["finish"], "length", "{last}");
    let tokens: Vec<(String, f64)> = serde_json::from_value(last["tokens"].clone()).unwrap();
    let said: String = tokens.iter().map(|(token, _)| token.as_str()).collect();
    // A character may come in two tokens, neither of which is one.
    if !said.contains('\u{fffd}') {
        assert_eq!(last["seen"], said, "the tokens are not those of the text");
    }
    let at = last["institution"].as_str().unwrap().to_owned();
    Some(Followed { tokens, at })
}
