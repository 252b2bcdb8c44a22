//! Nodes that front a server: a real one (another Karez network), and ones that misbehave.
use crate::net::{Net, asked, encoder, kill_9};
use serde_json::{Value, json};
use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

const QUESTION: &str = "How should I wash my hands?";
const PATIENCE: Duration = Duration::from_secs(60);

/// Restarts a node with a `[server]` in its settings, and waits until its models are known.
fn front(net: &mut Net, node: &str, price: &str, settings: &str, model: &str) {
    kill_9(net.pid(node));
    let path = net.dir(node).join("node.toml");
    let before = fs::read_to_string(&path).unwrap();
    // Before the first table of a list: what follows one belongs to it.
    let after = before
        .replacen("[[scheduler]]", &format!("{settings}\n[[scheduler]]"), 1)
        .replacen("[rates]", &format!("[rates]\n\"server/\" = {price}"), 1);
    fs::write(&path, after).unwrap();
    net.restart("node", node);
    net.until(PATIENCE, model, || {
        // Its own offer: another node may lend the same model already.
        let offers = net.run(&["offers", "--json"]).ok().json();
        let class = format!("server/{model}");
        let lends = |offer: &Value| {
            offer["connected"] == true && offer["institution"] == node && offer.to_string().contains(&class)
        };
        let lends = offers.as_array()?.iter().any(lends);
        lends.then(|| known(net, model))?
    });
}

fn known(net: &Net, model: &str) -> Option<()> {
    let models = net.run(&["models", "--json"]).ok().json();
    let found = |m: &Value| m["name"] == model && m["format"] == "served";
    models.as_array()?.iter().any(found).then_some(())
}

/// The methods that a network's readings of some work name.
fn methods(net: &Net) -> Vec<String> {
    let rows = net.run(&["ledger", "usage", "--form", "ndjson"]).ok().out;
    let rows = rows
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    rows.filter_map(|row| Some(row["method"].as_str()?.to_owned()))
        .collect()
}

#[test]
fn a_node_lends_what_another_server_computes() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    // A network whose gateway is the server: nothing in the node that fronts it knows.
    let far = Net::up();
    let gguf = root.join("engine/models/karez-tiny.gguf");
    far.run(&["artifact", "add", gguf.to_str().unwrap(), "--model", "far-tiny"])
        .ok();
    let key = far
        .run(&["key", "new", "--name", "server", "--budget", "5", "--json"])
        .ok()
        .json();
    let whole = far
        .run(&["generate", "--json", "--max-tokens", "24", QUESTION])
        .ok();
    let whole = whole.json()["answers"][0]["text"].clone();

    let mut net = Net::up();
    let secret = net.file("server.key", key["api_key"].as_str().unwrap());
    let tokenizer = root.join("engine/models/karez-tiny/tokenizer.json");
    let settings = format!(
        "[server]\nurl = {:?}\nmodels = [\"far-tiny\"]\nkey_file = {secret:?}\ntokenizer = {tokenizer:?}\n",
        key["base_url"].as_str().unwrap()
    );
    front(&mut net, "hill-institute", "0", &settings, "far-tiny");
    let ask = [
        "generate",
        "--model",
        "far-tiny",
        "--json",
        "--max-tokens",
        "24",
        QUESTION,
    ];
    let answer = net.run(&ask).ok().json();
    assert_eq!(answer["answers"][0]["text"], whole, "{answer}");
    let mut streaming = ask.to_vec();
    streaming.insert(1, "--stream");
    let streamed = net.run(&streaming).ok().out;
    let lines: Vec<Value> = streamed
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    let pieces: Vec<&str> = lines.iter().filter_map(|l| l["piece"].as_str()).collect();
    assert!(pieces.len() > 1, "it came in one piece: {streamed}");
    assert_eq!(json!(pieces.concat()), whole);
    // Its own tokenizer agreed with what the server said, and the record says so.
    let methods = methods(&net);
    assert!(
        methods.iter().all(|m| m == "wall+server-usage+tokenizer/1"),
        "{methods:?}"
    );
    assert!(!methods.is_empty());
    // What the server refuses is the request's fault, with both lengths.
    let long = net.file(
        "long.jsonl",
        json!({"prompt": "water ".repeat(10_000)}).to_string() + "\n",
    );
    net.run(&["generate", "--model", "far-tiny", "--file", &long])
        .refused(8, &["tokens long", "the context holds"]);
    net.verified_ledger();
}

#[test]
fn prompts_as_they_stand_and_vectors_come_from_a_server_too() {
    let Some(minilm) = encoder() else { return };
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let far = Net::up();
    let gguf = root.join("engine/models/karez-tiny.gguf");
    for (path, name) in [
        (gguf.to_str().unwrap(), "far-tiny"),
        (minilm.as_str(), "far-vectors"),
    ] {
        far.run(&["artifact", "add", path, "--model", name]).ok();
    }
    let key = far
        .run(&["key", "new", "--name", "server", "--budget", "5", "--json"])
        .ok()
        .json();
    let mut net = Net::up();
    let secret = net.file("server.key", key["api_key"].as_str().unwrap());
    let settings = format!(
        "[server]\nurl = {:?}\nmodels = [\"far-tiny\", \"far-vectors\"]\nkey_file = {secret:?}\n",
        key["base_url"].as_str().unwrap()
    );
    front(&mut net, "hill-institute", "0", &settings, "far-vectors");
    let texts = net.file(
        "texts.txt",
        "Rain fills the channel.\nShe sold her bicycle.\nWater\n",
    );
    let vectors = |net: &Net, name: &str| -> Vec<Vec<f64>> {
        let to = net.path(name);
        net.run(&[
            "embed",
            &texts,
            "--model",
            "far-vectors",
            "-o",
            to.to_str().unwrap(),
        ])
        .ok();
        let lines = fs::read_to_string(to).unwrap();
        let vector = |line: &str| serde_json::from_str::<Value>(line).unwrap()["embedding"].clone();
        lines
            .lines()
            .map(|line| serde_json::from_value(vector(line)).unwrap())
            .collect()
    };
    let (theirs, ours) = (vectors(&far, "theirs.jsonl"), vectors(&net, "ours.jsonl"));
    assert_eq!(ours.len(), 3);
    for (a, b) in theirs.iter().flatten().zip(ours.iter().flatten()) {
        assert!((a - b).abs() < 1e-6, "{a} {b}");
    }
    let ask = [
        "generate",
        "--raw",
        "--model",
        "far-tiny",
        "--json",
        "--max-tokens",
        "12",
        "Water",
    ];
    let (theirs, ours) = (far.run(&ask).ok().json(), net.run(&ask).ok().json());
    assert_eq!(ours["answers"][0]["text"], theirs["answers"][0]["text"], "{ours}");
    assert_eq!(
        ours["report"]["meters"]["tokens_out"],
        theirs["report"]["meters"]["tokens_out"]
    );
    let methods = methods(&net);
    assert!(methods.len() >= 2, "{methods:?}");
    assert!(methods.iter().all(|m| m == "wall+server-usage/1"), "{methods:?}");
    net.verified_ledger();
}

/// How a server misbehaves.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    Well,
    Hangs,
    Rubbish,
    Lies,
    BreaksOff,
    NoUsage,
    Falsely,
}

/// A server with one model, whose ways can be changed while it runs. It goes away with the test's process.
struct Odd {
    url: String,
    way: Arc<AtomicU8>,
}

impl Odd {
    fn up() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let way = Arc::new(AtomicU8::new(Way::Well as u8));
        let ways = way.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let way = ways.load(Ordering::Relaxed);
                thread::spawn(move || answer(stream, way));
            }
        });
        Self { url, way }
    }

    fn be(&self, way: Way) {
        self.way.store(way as u8, Ordering::Relaxed);
    }
}

fn answer(mut stream: TcpStream, way: u8) -> Option<()> {
    let is = |other: Way| way == other as u8;
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let (mut first, mut line, mut length) = (String::new(), String::new(), 0);
    reader.read_line(&mut first).ok()?;
    loop {
        line.clear();
        reader.read_line(&mut line).ok()?;
        if let Some(bytes) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = bytes.trim().parse().ok()?;
        }
        if line.trim().is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let kind = if first.starts_with("GET") {
        "application/json"
    } else {
        "text/event-stream"
    };
    if is(Way::Hangs) && !first.starts_with("GET") {
        thread::sleep(Duration::from_secs(120));
    }
    write!(
        stream,
        "HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\nconnection: close\r\n\r\n"
    )
    .ok()?;
    if first.starts_with("GET") {
        return write!(stream, "{}", json!({"object": "list", "data": [{"id": "odd"}]})).ok();
    }
    if is(Way::Rubbish) {
        return write!(stream, "data: {{\"choices\": 7}}\n\n").ok();
    }
    let words = match is(Way::Falsely) {
        false => ["Wash ", "them ", "well."],
        true => ["Wash ", "them ", "never."],
    };
    for word in words {
        let chunk = json!({"choices": [{"index": 0, "delta": {"content": word}, "finish_reason": null}]});
        write!(stream, "data: {chunk}\n\n").ok()?;
        stream.flush().ok()?;
        thread::sleep(Duration::from_millis(5));
    }
    if is(Way::BreaksOff) {
        return None;
    }
    let wrote = if is(Way::Lies) { 90_000 } else { 3 };
    let end = json!({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]});
    write!(stream, "data: {end}\n\n").ok()?;
    if !is(Way::NoUsage) {
        let usage = json!({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": wrote}});
        write!(stream, "data: {usage}\n\n").ok()?;
    }
    write!(stream, "data: [DONE]\n\n").ok()
}

#[test]
fn a_server_that_misbehaves_is_left_for_another() {
    let mut net = Net::up();
    let (odd, good) = (Odd::up(), Odd::up());
    let settings = |server: &Odd| format!("[server]\nurl = {:?}\nsilence = \"1 s\"\n", server.url);
    front(&mut net, "coast-computing", "9", &settings(&good), "odd");
    // Donated, while the other is paid for: always the first choice.
    front(&mut net, "hill-institute", "0", &settings(&odd), "odd");
    let ask = [
        "generate",
        "--model",
        "odd",
        "--json",
        "--max-tokens",
        "24",
        QUESTION,
    ];
    for (way, says) in [
        (Way::Hangs, "wrote nothing for 1000 ms"),
        (Way::Rubbish, "not as OpenAI's"),
        (Way::Lies, "says it wrote 90000 tokens"),
        (Way::BreaksOff, "broke off before its end"),
    ] {
        odd.be(way);
        let began = Instant::now();
        let answer = net.run(&ask).ok().json();
        assert_eq!(answer["answers"][0]["text"], "Wash them well.", "{answer}");
        assert!(began.elapsed() < PATIENCE, "{:?}", began.elapsed());
        let job = answer["report"]["job"].as_str().unwrap().to_owned();
        let logs = net.run(&["job", "logs", &job]).ok().out;
        assert!(logs.contains(says), "{says:?} is not in {logs}");
    }
    // Without its word, its text is counted, and the record says how.
    odd.be(Way::NoUsage);
    good.be(Way::NoUsage);
    net.run(&ask).ok();
    let methods = methods(&net);
    assert!(methods.iter().any(|m| m == "wall+bytes-by-four/1"), "{methods:?}");
    assert!(methods.iter().any(|m| m == "wall+server-usage/1"), "{methods:?}");
    net.verified_ledger();
}

/// What the gateway answers to a request.
fn post(key: &Value, path: &str, body: &Value) -> Value {
    let mut said = String::new();
    asked(key, path, body).read_to_string(&mut said).unwrap();
    let body = said.split_once("\r\n\r\n").unwrap().1;
    serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {said}"))
}

#[test]
fn a_second_answer_tells_that_one_of_them_is_false() {
    let mut net = Net::up();
    let (one, other) = (Odd::up(), Odd::up());
    let settings = |server: &Odd| format!("[server]\nurl = {:?}\n", server.url);
    front(&mut net, "coast-computing", "9", &settings(&other), "odd");
    front(&mut net, "hill-institute", "0", &settings(&one), "odd");
    let key = net
        .run(&["key", "new", "--name", "careful", "--budget", "5", "--json"])
        .ok()
        .json();
    let ask = json!({
        "model": "odd", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 24,
        "karez": {"verification": "repeat"},
    });
    let answer = post(&key, "/v1/chat/completions", &ask);
    assert_eq!(answer["karez"]["verification"]["agrees"], true, "{answer}");
    one.be(Way::Falsely);
    let answer = post(&key, "/v1/chat/completions", &ask);
    let told = &answer["karez"]["verification"];
    assert_eq!(
        answer["choices"][0]["message"]["content"], "Wash them never.",
        "{answer}"
    );
    assert_eq!(
        (&told["agrees"], &told["agreed_characters"]),
        (&json!(false), &json!(10)),
        "{answer}"
    );
    assert_eq!(told["institution"], "coast-computing", "{answer}");
    // Both were paid for what they did, and each has a receipt.
    assert!(
        told["receipt"].is_string() && told["receipt"] != answer["karez"]["receipt"],
        "{answer}"
    );
    net.verified_ledger();
}
