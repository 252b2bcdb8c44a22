//! The network's own cost, with the real binary on loopback: idle node, submit to done, join to first placement.
//!
//! `cargo bench --bench network -- [FILE] [tasks]` writes JSON to FILE and prints a table; `tasks` runs the array jobs only.
//! Load is bounded: one user, one job at a time, a few hundred jobs.
use karez_core::{
    artifact::ArtifactRef,
    key::{PublicKey, SchedulerId, SecretKey, UserId},
    records::{Constraints, Order, Signed, Work},
    unit::{Bytes, Credits, UtcMillis},
};
use karez_net::{
    control, identity,
    store::ArtifactStore,
    transfer::{Holder, Transfers},
};
use karez_proto::control::{self as wire, control_client::ControlClient};
use serde_json::{Value, json};
use std::{
    error::Error,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};
use tonic::transport::Channel;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const JOBS: usize = 300;
const JOINS: usize = 5;
const IDLE: Duration = Duration::from_secs(30);
/// Items of an array job.
const ITEMS: u64 = 100_000;
/// Array jobs; the middle one counts.
const ARRAYS: usize = 5;
/// Parts of the job that has a lease for each item.
const PARTS: u64 = 500;
/// Calls that do nothing, at once and in all: what the wire alone allows.
const ECHOES: (usize, usize) = (64, 20_000);

fn main() -> Result<()> {
    let mut words: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let tasks_only = words
        .iter()
        .position(|w| w == "tasks")
        .map(|at| words.remove(at))
        .is_some();
    let file = words.pop();
    let dir = tempfile::tempdir()?;
    let home = dir.path().join("home");
    karez(&home, &["up"])?;
    // One key may not call so often otherwise.
    karez(&home, &["down"])?;
    let settings = home.join("up/scheduler/scheduler.toml");
    let narrow = fs::read_to_string(&settings)?;
    let wide = narrow.replace("[limits]", "[limits]\ncalls_per_second = 100000");
    fs::write(&settings, wide)?;
    karez(&home, &["up"])?;
    let measured = measure(&home, dir.path(), tasks_only);
    karez(&home, &["down"])?;
    let measured = measured?;
    if let Some(file) = file {
        fs::write(file, serde_json::to_vec_pretty(&measured)?)?;
    }
    for row in measured["figures"].as_array().into_iter().flatten() {
        println!(
            "{:<34} {:>12} {:<10} aim {}",
            text(&row["name"]),
            row["value"],
            text(&row["unit"]),
            text(&row["aim"])
        );
    }
    println!("machine: {}", measured["machine"]);
    Ok(())
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("")
}

fn measure(home: &Path, scratch: &Path, tasks_only: bool) -> Result<Value> {
    let load_before = load();
    let figure = |name: &str, value: f64, unit: &str, aim: &str| json!({"name": name, "value": (value * 1000.0).round() / 1000.0, "unit": unit, "aim": aim});
    let mut figures = Vec::new();
    let runtime = tokio::runtime::Runtime::new()?;
    if !tasks_only {
        let (memory, cpu) = idle(home)?;
        figures.push(figure("idle node, resident", memory, "MB", "<= 20"));
        figures.push(figure("idle node, CPU", cpu, "% of core", "<= 0.2"));
    }
    let mut desk = runtime.block_on(Desk::open(home, scratch))?;
    if !tasks_only {
        let (p50, p99) = runtime.block_on(submit_to_done(&mut desk))?;
        figures.push(figure("no-op submit to done, p50", p50, "ms", "<= 20"));
        figures.push(figure("no-op submit to done, p99", p99, "ms", "<= 60"));
        let join = join_to_placement(home, scratch)?;
        figures.push(figure("join to first placement, median", join, "s", "<= 5"));
    }
    let (seconds, _) = runtime.block_on(array_job(&mut desk, ITEMS, 0, ARRAYS))?;
    figures.push(figure(
        "array job of 100,000 items",
        ITEMS as f64 / seconds,
        "items/s",
        ">= 60000",
    ));
    // In so many parts that each is a lease, a usage and a receipt of its own: what one lease after another costs.
    let (seconds, leases) = runtime.block_on(array_job(&mut desk, PARTS, 1, 1))?;
    figures.push(figure(
        "array job, a lease for each item",
        leases as f64 / seconds,
        "leases/s",
        "-",
    ));
    let echo = runtime.block_on(echo(&desk))?;
    figures.push(figure("gRPC calls that do nothing", echo, "calls/s", "the limit"));
    Ok(json!({
        "figures": figures,
        "samples": {"jobs": JOBS, "joins": JOINS, "idle_s": IDLE.as_secs(), "arrays": ARRAYS, "items": ITEMS, "parts": PARTS},
        "machine": {
            "cpu": cpu_name(), "cores": thread::available_parallelism()?.get(),
            "load_before": load_before, "load_after": load(),
        },
    }))
}

fn karez(home: &Path, args: &[&str]) -> Result<String> {
    let out = Command::new(env!("CARGO_BIN_EXE_karez"))
        .args(args)
        .env("KAREZ_HOME", home)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()?;
    if out.status.success() {
        Ok(String::from_utf8(out.stdout)?)
    } else {
        Err(format!("karez {args:?}: {}", out.status).into())
    }
}

/// Resident memory in MB and CPU in percent of a core of one node that has nothing to do.
fn idle(home: &Path) -> Result<(f64, f64)> {
    let text = fs::read_to_string(home.join("up/network.toml"))?;
    let table: toml::Table = toml::from_str(&text)?;
    let nodes: Vec<i64> = table["process"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|p| p["name"].as_str().is_some_and(|n| n.starts_with("node")))
        .filter_map(|p| p["pid"].as_integer())
        .collect();
    thread::sleep(Duration::from_secs(10));
    let ticks = |pid: &i64| -> Result<f64> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
        Ok(fields[11].parse::<f64>()? + fields[12].parse::<f64>()?)
    };
    let before: Vec<f64> = nodes.iter().map(ticks).collect::<Result<_>>()?;
    thread::sleep(IDLE);
    let mut cpu = Vec::new();
    let mut memory = Vec::new();
    for (pid, before) in nodes.iter().zip(before) {
        // The kernel counts in hundredths of a second.
        cpu.push((ticks(pid)? - before) / IDLE.as_secs_f64());
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let kb = status
            .lines()
            .find_map(|l| l.strip_prefix("VmRSS:"))
            .ok_or("VmRSS")?;
        memory.push(kb.trim().trim_end_matches(" kB").parse::<f64>()? / 1000.0);
    }
    Ok((median(&mut memory), median(&mut cpu)))
}

/// One user at the scheduler of `karez up`.
struct Desk {
    client: ControlClient<Channel>,
    secret: SecretKey,
    scheduler: SchedulerId,
    institution: String,
    input: ArtifactRef,
    nonce: u64,
}

impl Desk {
    async fn open(home: &Path, scratch: &Path) -> Result<Self> {
        let config: toml::Table = toml::from_str(&fs::read_to_string(home.join("client.toml"))?)?;
        let of = |key: &str| config[key].as_str().ok_or("client.toml");
        let scheduler: SchedulerId = of("scheduler")?.parse()?;
        let secret = identity::load(&home.join("user.pem"), "")?;
        let channel = control::connect(of("control_addr")?, &secret, scheduler.0).await?;
        let mut client = ControlClient::new(channel);
        let status = client.status(wire::StatusRequest {}).await?.into_inner();
        let store = ArtifactStore::open(&scratch.join("artifacts"), Bytes(1 << 30))?;
        let input = store.add_bytes(b"{}\n")?;
        let transfers = Transfers::bind("127.0.0.1:0".parse()?, &secret, store, Arc::new(|_, _| false))?;
        let addrs = status
            .artifact_addrs
            .iter()
            .filter_map(|a| a.parse().ok())
            .collect();
        let holder = Holder {
            key: scheduler.0,
            addrs,
        };
        transfers.push(input, &holder, Arc::new(|_| {})).await?;
        Ok(Self {
            client,
            secret,
            scheduler,
            institution: of("institution")?.to_owned(),
            input,
            nonce: 0,
        })
    }

    /// Submits a job and waits for its end: signed order, leases, usage, receipts and entries on disk. Seconds, and its parts.
    async fn job(&mut self, items: u64, per_part: u32) -> Result<(f64, u64)> {
        self.nonce += 1;
        let order = order(self, items, per_part)?;
        let began = Instant::now();
        let request = wire::SubmitRequest {
            order,
            label: String::new(),
            wait: false,
        };
        let job = self.client.submit(request).await?.into_inner().job;
        let id = job.iter().map(|b| format!("{b:02x}")).collect();
        let mut views = self
            .client
            .watch(wire::JobRequest { job: id })
            .await?
            .into_inner();
        while let Some(view) = views.message().await? {
            match view.state.as_str() {
                "done" => return Ok((began.elapsed().as_secs_f64(), view.parts.len() as u64)),
                "failed" | "cancelled" => return Err(view.cause.into()),
                _ => {}
            }
        }
        Err("the scheduler stopped telling of the job".into())
    }
}

/// Milliseconds from the call to the view that says done.
async fn submit_to_done(desk: &mut Desk) -> Result<(f64, f64)> {
    let mut millis = Vec::new();
    for _ in 0..JOBS {
        millis.push(desk.job(1, 0).await?.0 * 1000.0);
    }
    millis.sort_by(f64::total_cmp);
    Ok((millis[millis.len() / 2], millis[millis.len() * 99 / 100]))
}

/// Seconds that such a job takes, the median of so many, and how many leases it was cut into.
async fn array_job(desk: &mut Desk, items: u64, per_part: u32, times: usize) -> Result<(f64, u64)> {
    let (mut seconds, mut leases) = (Vec::new(), 0);
    for _ in 0..times {
        let (took, parts) = desk.job(items, per_part).await?;
        seconds.push(took);
        leases = parts;
    }
    Ok((median(&mut seconds), leases))
}

/// Calls a second that the same server answers when it has nothing to do for them.
async fn echo(desk: &Desk) -> Result<f64> {
    let (at_once, all) = ECHOES;
    let began = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..at_once {
        let mut client = desk.client.clone();
        tasks.spawn(async move {
            for _ in 0..all / at_once {
                client.status(wire::StatusRequest {}).await?;
            }
            Ok::<_, tonic::Status>(())
        });
    }
    while let Some(done) = tasks.join_next().await {
        done??;
    }
    Ok((all / at_once * at_once) as f64 / began.elapsed().as_secs_f64())
}

fn order(desk: &Desk, items: u64, items_per_part: u32) -> Result<Vec<u8>> {
    let now = u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis())?;
    let order = Order {
        user: UserId(PublicKey::of(&desk.secret)),
        institution: desk.institution.parse()?,
        scheduler: desk.scheduler,
        work: Work::Noop { millis_per_item: 0 },
        input: desk.input,
        items,
        items_per_part,
        constraints: Constraints::default(),
        credits_max: Credits(1_000.max(100 * items)),
        attempts_max: 3,
        nonce: now << 16 | desk.nonce,
        issued_at: UtcMillis(now),
        expires_at: UtcMillis(now + 600_000),
    };
    Ok(Signed::sign(order, &desk.secret).encode())
}

/// Seconds from `node init` with an invitation to the end of the first job placed on that node.
fn join_to_placement(home: &Path, scratch: &Path) -> Result<f64> {
    let input = scratch.join("one.jsonl");
    fs::write(&input, "{\"text\":\"x\"}\n")?;
    let mut seconds = Vec::new();
    for i in 0..JOINS {
        let scheduler = home.join("up/scheduler");
        let institution = format!("newcomer-{i}");
        let dir: PathBuf = scratch.join(&institution);
        let job = scratch.join(format!("join-{i}.toml"));
        fs::write(
            &job,
            format!(
                "work = \"noop\"\ninput = {input:?}\n[noop]\nmillis_per_item = 0\n[where]\ninstitution = [{institution:?}]\n[run]\nwait = true\n"
            ),
        )?;
        let s = |path: &Path| path.to_string_lossy().into_owned();
        let invitation = karez(
            home,
            &[
                "scheduler",
                "invite",
                "--dir",
                &s(&scheduler),
                "--role",
                "node",
                "--institution",
                &institution,
            ],
        )?;
        let began = Instant::now();
        karez(
            home,
            &[
                "node",
                "init",
                "--dir",
                &s(&dir),
                "--join",
                invitation.trim(),
                "--country",
                "NP",
            ],
        )?;
        let mut child = Command::new(env!("CARGO_BIN_EXE_karez"))
            .args(["node", "run", "--dir", &s(&dir)])
            .env("KAREZ_HOME", home)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let done = karez(home, &["submit", &s(&job), "--quiet"]);
        seconds.push(began.elapsed().as_secs_f64());
        child.kill()?;
        child.wait()?;
        done?;
    }
    Ok(median(&mut seconds))
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn load() -> String {
    fs::read_to_string("/proc/loadavg")
        .unwrap_or_default()
        .split(' ')
        .take(3)
        .collect::<Vec<_>>()
        .join(" ")
}

fn cpu_name() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text
        .lines()
        .find(|l| l.starts_with("model name"))
        .unwrap_or_default();
    line.rsplit(": ").next().unwrap_or("unknown").to_owned()
}
