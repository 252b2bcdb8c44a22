//! `karez node`: lending this machine, and taking it back.
use crate::{
    cli::Context,
    fault::{Kind, fault},
    options::rate,
    out::{Column, Table, clean, credits, minute, rate as price, size, span},
    process,
};
use anyhow::{Context as _, Result};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use clap::{Args, Subcommand};
use karez_core::{
    id::{Country, Institution},
    key::SchedulerId,
    records::{Receipt, Signed},
    unit::Rate,
};
use karez_node::{
    ControlError, InitOptions, NodeFiles, NodeStatus, WorkerProgram,
    control::{self, Command},
    daemon::RunOptions,
    init::JoinBy,
};
use serde_json::json;
use std::{
    collections::VecDeque,
    fs::File,
    future::Future,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    time::Duration,
};

/// `karez node`.
#[derive(Debug, Args)]
#[command(
    arg_required_else_help = true,
    after_help = "\
Example:
  karez node init --join karez1... --country KE --price 0.40
  karez node run"
)]
pub(crate) struct NodeArgs {
    #[command(subcommand)]
    command: NodeCommand,
    /// The node's folder [default: HOME/node]
    #[arg(long, global = true, value_name = "DIR")]
    dir: Option<PathBuf>,
}

impl NodeArgs {
    pub(crate) fn is_run(&self) -> bool {
        matches!(self.command, NodeCommand::Run)
    }
}

#[derive(Debug, Subcommand)]
enum NodeCommand {
    /// Make a node's folder and join a scheduler
    #[command(after_help = "\
Examples:
  karez node init --join karez1... --country KE --price 0.40
  karez node init --country BR --institution my-lab    # join later")]
    Init(InitArgs),
    /// Lend this machine until stopped
    #[command(after_help = "Example:\n  karez node run --dir /var/lib/karez/node")]
    Run,
    /// What is lent, and to whom
    #[command(after_help = "Example:\n  karez node status --json")]
    Status,
    /// Take no new work; what runs goes on
    #[command(after_help = "Example:\n  karez node pause")]
    Pause,
    /// Take new work again
    #[command(after_help = "Example:\n  karez node open")]
    Open,
    /// Take no new work until `open`; the node stops when the last job has ended
    #[command(after_help = "Example:\n  karez node drain --wait 10min")]
    Drain(WaitArgs),
    /// Everybody out, within the owner's grace
    #[command(after_help = "Example:\n  karez node reclaim")]
    Reclaim(WaitArgs),
    /// What schedulers have signed for the work done here
    #[command(after_help = "\
Examples:
  karez node receipts -n 50
  karez ledger verify ledger.jsonl --receipts \"$(karez node receipts --path)\"")]
    Receipts(ReceiptsArgs),
    /// Measure how fast models run here; offers say so from the node's next start on
    #[command(after_help = "Examples:\n  karez node bench\n  karez node bench --small --model llama-3b.gguf")]
    Bench(BenchArgs),
}

#[derive(Debug, Args)]
struct ReceiptsArgs {
    /// How many, the newest last
    #[arg(short = 'n', long, value_name = "N", default_value_t = 20)]
    limit: usize,
    /// Only say where the file is
    #[arg(long)]
    path: bool,
}

#[derive(Debug, Args)]
struct BenchArgs {
    /// Only the shipped model: seconds instead of minutes, and nothing for offers
    #[arg(long)]
    small: bool,
    /// A GGUF file to measure too; may be given more than once
    #[arg(long, value_name = "FILE")]
    model: Vec<PathBuf>,
}

#[derive(Debug, Args)]
struct InitArgs {
    /// The scheduler's invitation for a node
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["scheduler", "institution"])]
    join: Option<String>,
    /// The key of a scheduler that admits anybody
    #[arg(long, value_name = "KEY", requires_all = ["control_addr", "institution"])]
    scheduler: Option<SchedulerId>,
    /// Where that scheduler's control API is
    #[arg(long, value_name = "HOST:PORT", requires = "scheduler")]
    control_addr: Option<String>,
    /// And its libp2p addresses
    #[arg(
        long,
        value_name = "MULTIADDRS",
        value_delimiter = ',',
        requires = "scheduler"
    )]
    peer_addr: Vec<String>,
    /// Whose machine this is; an invitation says so itself
    #[arg(long, value_name = "NAME", required_unless_present = "join")]
    institution: Option<Institution>,
    /// Where it stands (ISO 3166-1: KE)
    #[arg(long, value_name = "CODE")]
    country: Country,
    /// A name for people [default: the machine's host name]
    #[arg(long, value_name = "TEXT")]
    name: Option<String>,
    /// Credits for one CPU slot and hour; 0 donates
    #[arg(long, value_name = "CREDITS", default_value = "0", value_parser = rate)]
    price: Rate,
    /// Jobs that may run on the CPU at once
    #[arg(long, value_name = "N", default_value_t = 1)]
    slots: u32,
}

#[derive(Debug, Args)]
struct WaitArgs {
    /// Wait until the last guest has left, at most this long
    #[arg(long, value_name = "SPAN", value_parser = humantime::parse_duration)]
    wait: Option<Duration>,
}

pub(crate) fn run(context: &Context, args: NodeArgs) -> Result<()> {
    let dir = args.dir.unwrap_or_else(|| context.home.dir().join("node"));
    // One thread: an idle node must cost its owner next to nothing.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the runtime")?;
    let done = runtime.block_on(async {
        match args.command {
            NodeCommand::Init(args) => init(context, dir, args).await,
            NodeCommand::Run => daemon(dir).await,
            NodeCommand::Status => show(context, &asked(control::status(&dir)).await?),
            NodeCommand::Pause => show(context, &asked(control::command(&dir, Command::Pause)).await?),
            NodeCommand::Open => show(context, &asked(control::command(&dir, Command::Open)).await?),
            NodeCommand::Drain(args) => leave(context, dir, Command::Drain, args.wait).await,
            NodeCommand::Reclaim(args) => leave(context, dir, Command::Reclaim, args.wait).await,
            NodeCommand::Receipts(args) => receipts(context, &dir, &args),
            NodeCommand::Bench(args) => bench(context, dir, args).await,
        }
    });
    runtime.shutdown_timeout(Duration::from_secs(1));
    done
}

/// The engine is this very program in a process of its own; without one, only no-ops are offered.
fn worker_program() -> Result<Option<WorkerProgram>> {
    if !cfg!(feature = "engine") {
        return Ok(None);
    }
    let own = std::env::current_exe().context("finding this program's own file")?;
    Ok(Some(WorkerProgram::new(own)))
}

/// The owner's copy of what was signed, as it lies in the node's folder; the node need not run.
fn receipts(context: &Context, dir: &Path, args: &ReceiptsArgs) -> Result<()> {
    let files = NodeFiles::new(dir);
    let (path, out) = (files.receipts(), context.out);
    if args.path {
        out.line(path.display().to_string());
        return Ok(());
    }
    let mut newest = VecDeque::new();
    for path in [files.receipts_older(), path.clone()] {
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error).context(path.display().to_string()),
        };
        for line in BufReader::new(file).lines() {
            let line = line.with_context(|| path.display().to_string())?;
            // What a crash cut off is passed over here; the check against a ledger names it.
            let bytes = BASE64_STANDARD.decode(&line).ok();
            let receipt = bytes.and_then(|bytes: Vec<u8>| Signed::<Receipt>::open(&bytes).ok());
            newest.extend(receipt);
            if newest.len() > args.limit {
                newest.pop_front();
            }
        }
    }
    let flags = |receipt: &Receipt| {
        let flags: Vec<&str> = receipt.flags.iter().map(|flag| flag.as_str()).collect();
        flags.join(" ")
    };
    if out.json {
        for r in &newest {
            out.json(&json!({
                "receipt": r.id().to_string(), "scheduler": r.scheduler.to_string(), "job": r.job.0.to_string(),
                "user_institution": r.user_institution.as_str(), "issued_at_ms": r.issued_at.0,
                "observed_ms": r.observed.0, "billed_ms": r.billed.0, "microcredits": r.credits.0, "flags": flags(r),
            }));
        }
        return Ok(());
    }
    if newest.is_empty() {
        out.note(format!("no receipts yet; they will be in {}", path.display()));
        return Ok(());
    }
    let mut table = Table::new(&[
        ("TIME (UTC)", Column::Left),
        ("RECEIPT", Column::Left),
        ("FOR", Column::Cut),
        ("BILLED", Column::Right),
        ("CREDITS", Column::Right),
        ("REMARKS", Column::Cut),
    ]);
    for r in &newest {
        let id = r.id().to_string();
        table.row(vec![
            minute(r.issued_at.0),
            id.get(..12).unwrap_or(&id).to_owned(),
            r.user_institution.to_string(),
            span(r.billed.0),
            credits(r.credits.0),
            flags(r),
        ]);
    }
    out.table(&table);
    out.note(format!("in {}", path.display()));
    Ok(())
}

async fn bench(context: &Context, dir: PathBuf, args: BenchArgs) -> Result<()> {
    let worker =
        worker_program()?.ok_or_else(|| fault(Kind::Refused, "this build has no engine to measure"))?;
    let said = |text: &str| eprintln!("{text}");
    let mut models = Vec::new();
    for path in &args.model {
        models.push(path.canonicalize().with_context(|| path.display().to_string())?);
    }
    let speeds = karez_node::bench::bench(&dir, &worker, args.small, &models, said).await?;
    let out = context.out;
    if out.json {
        out.json(&serde_json::to_value(&speeds)?);
        return Ok(());
    }
    let right = |name| (name, Column::Right);
    let mut table = Table::new(&[
        ("MODEL", Column::Cut),
        right("THREADS"),
        right("PROMPT/S"),
        right("DECODE/S"),
        right("16 AT ONCE/S"),
    ]);
    let tokens = |milli: u64| format!("{:.1}", milli as f64 / 1000.0);
    for speed in &speeds {
        table.row(vec![
            clean(&speed.class),
            speed.threads.to_string(),
            tokens(speed.prompt_milli),
            tokens(speed.decode_milli),
            tokens(speed.many_milli),
        ]);
    }
    out.table(&table);
    out.line("tokens per second on one CPU slot; median of 3");
    Ok(())
}

async fn daemon(dir: PathBuf) -> Result<()> {
    let worker = worker_program()?;
    let gpu = cfg!(any(feature = "cuda", feature = "vulkan", feature = "metal"));
    // Workers run in another folder: a relative path would mean another place there.
    let dir = std::path::absolute(&dir).with_context(|| dir.display().to_string())?;
    karez_node::run(&dir, RunOptions { worker, gpu }, process::told_to_stop()).await?;
    Ok(())
}

async fn init(context: &Context, dir: PathBuf, args: InitArgs) -> Result<()> {
    let join = match (args.join, args.scheduler, args.institution) {
        (Some(text), _, _) => JoinBy::Invitation(text),
        (None, Some(scheduler), Some(institution)) => JoinBy::Open {
            scheduler,
            control_addr: args.control_addr.unwrap_or_default(),
            peer_addrs: args.peer_addr,
            institution,
        },
        (None, _, Some(institution)) => JoinBy::Nobody { institution },
        (None, _, None) => {
            return Err(fault(
                Kind::Usage,
                "give --join INVITATION, or --institution NAME",
            ));
        }
    };
    let name = args.name.unwrap_or_else(host_name);
    let options = InitOptions {
        join,
        name,
        country: args.country,
        cpu_rate: args.price,
        cpu_slots: args.slots,
    };
    let made = make(&dir, options).await?;
    if context.out.json {
        context.out.json(&json!({
            "node": made.node.to_string(), "institution": made.institution.to_string(),
            "config": made.config, "joined": made.joined,
        }));
    } else {
        let joined = if made.joined {
            "joined its scheduler"
        } else {
            "not joined yet: add a scheduler to its configuration"
        };
        context
            .out
            .line(format!("node {} of {}, {joined}", made.node, made.institution));
        context
            .out
            .line(format!("configuration: {}", made.config.display()));
        context.out.note(format!(
            "next: look through the configuration, then `karez node run --dir {}`",
            dir.display()
        ));
    }
    Ok(())
}

/// Makes a node's folder; errors get their exit codes.
pub(crate) async fn make(dir: &std::path::Path, options: InitOptions) -> Result<karez_node::Initialised> {
    use karez_node::InitError;
    karez_node::init(dir, options).await.map_err(|error| match error {
        InitError::Exists { .. }
        | InitError::Invitation(_)
        | InitError::WrongRole(_)
        | InitError::Expired
        | InitError::Setting(_) => fault(Kind::Refused, error.to_string()),
        InitError::Refused { .. } | InitError::Identity(_) => fault(Kind::NotAdmitted, error.to_string()),
        InitError::Connect(_) => fault(Kind::Unreachable, error.to_string()),
        other => other.into(),
    })
}

fn host_name() -> String {
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    if name.is_empty() { "node".into() } else { name }
}

async fn asked(answer: impl Future<Output = Result<NodeStatus, ControlError>>) -> Result<NodeStatus> {
    answer
        .await
        .map_err(|error| fault(Kind::Unreachable, error.to_string()))
}

async fn leave(context: &Context, dir: PathBuf, command: Command, wait: Option<Duration>) -> Result<()> {
    let mut status = asked(control::command(&dir, command)).await?;
    if let Some(patience) = wait {
        status = asked(control::until_empty(&dir, patience)).await?;
    }
    show(context, &status)
}

fn show(context: &Context, status: &NodeStatus) -> Result<()> {
    let out = context.out;
    if out.json {
        out.json(&serde_json::to_value(status)?);
        return Ok(());
    }
    out.line(format!(
        "{} of {} in {}: {}, up {}, {}",
        clean(&status.name),
        status.institution,
        status.country,
        status.state,
        span(status.uptime_ms),
        match status.guests {
            0 => "no guest on the machine".to_owned(),
            1 => "1 guest on the machine".to_owned(),
            n => format!("{n} guests on the machine"),
        }
    ));
    let mut devices = Table::new(&[
        ("DEVICE", Column::Cut),
        ("COUNT", Column::Right),
        ("MEMORY", Column::Right),
        ("PRICE", Column::Right),
    ]);
    for d in &status.devices {
        devices.row(vec![
            d.class.clone(),
            d.count.to_string(),
            size(d.memory_bytes),
            price(d.rate),
        ]);
    }
    out.table(&devices);
    for s in &status.schedulers {
        let name = if s.name.is_empty() {
            &s.control_addr
        } else {
            &s.name
        };
        let state = if s.connected {
            format!("connected, offer {}", s.offer)
        } else {
            format!("not connected: {}", s.why)
        };
        out.line(format!("scheduler {}: {}", clean(name), clean(&state)));
    }
    for lease in &status.leases {
        let job = lease.job.get(..12).unwrap_or(&lease.job);
        out.line(format!(
            "job {job} part {}: {}, {} items done",
            lease.part, lease.phase, lease.items_done
        ));
    }
    out.line(format!(
        "store: {} of {}; isolation: {}",
        size(status.store_bytes),
        size(status.store_bytes_max),
        status.isolation
    ));
    for note in &status.notes {
        out.note(clean(note));
    }
    Ok(())
}

/// Where a node's folder keeps its configuration: its presence says that the node was made.
pub(crate) fn is_made(dir: &std::path::Path) -> bool {
    NodeFiles::new(dir).config().exists()
}
