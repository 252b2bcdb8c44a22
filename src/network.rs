//! `karez up` and `karez down`: one scheduler and three nodes on this machine, as processes of their own.
//!
//! Everything lies under `HOME/up`: a folder for each process, its log, and `network.toml` with the processes
//! that run. The demo uses the same network in a home that it throws away.
use crate::{
    artifact,
    cli::Context,
    fault::{Kind, fault},
    home::write_atomic,
    join, link, node,
    out::{Column, Table, credits, rate},
    process::{self, Known, all_alive},
    scheduler, view,
};
use anyhow::{Context as _, Result};
use clap::Args;
use karez_core::{
    records::Role,
    unit::{Credits, Rate},
};
use karez_engine::shipped;
use karez_node::{InitOptions, init::JoinBy};
use karez_proto::control as wire;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::{
    ffi::OsStr,
    fs::{self, File},
    io,
    os::unix::fs::DirBuilderExt,
    path::PathBuf,
    process::Child,
    time::{Duration, Instant},
};

/// The shipped model's name in the catalogue.
pub(crate) const SHIPPED_MODEL: &str = "karez-tiny";
/// The budget of the local user.
const BUDGET: Credits = Credits(100_000_000);
/// The institution of the local user.
const USER_INSTITUTION: &str = "local-lab";
/// Starting must be done by then; a slow disk and a busy machine included.
const START_MAX: Duration = Duration::from_secs(60);
/// How long a process has to stop by itself.
const STOP_PATIENCE: Duration = Duration::from_secs(6);

/// A provider of the local network.
struct Member {
    institution: &'static str,
    country: &'static str,
    rate: Rate,
}

/// Made-up institutions on three continents: the dearest, a cheaper one, and one that donates.
const MEMBERS: [Member; 3] = [
    Member {
        institution: "lake-university",
        country: "KE",
        rate: Rate(400_000),
    },
    Member {
        institution: "coast-computing",
        country: "BR",
        rate: Rate(250_000),
    },
    Member {
        institution: "hill-institute",
        country: "IN",
        rate: Rate(0),
    },
];

/// `karez up`.
#[derive(Debug, Args)]
#[command(after_help = "\
The network lies under HOME/up and listens on this machine only.

Examples:
  karez up
  karez up --home /tmp/try")]
pub(crate) struct UpArgs {}

/// `karez down`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  karez down")]
pub(crate) struct DownArgs {
    /// Forget the network too: its books, its jobs and its files
    #[arg(long)]
    purge: bool,
}

/// `network.toml`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Running {
    #[serde(default)]
    process: Vec<Known>,
}

/// The network of one home.
pub(crate) struct Network {
    dir: PathBuf,
    running: Running,
    children: Vec<Child>,
    with_parent: bool,
    // Held as long as this value lives: two commands must not start or stop the same network at once.
    _lock: File,
}

pub(crate) async fn up(context: &Context, _: UpArgs) -> Result<()> {
    let out = context.out;
    let mut network = Network::open(context, false)?;
    let dead: Vec<&str> = network
        .running
        .process
        .iter()
        .filter(|p| !p.is_alive())
        .map(|p| p.name.as_str())
        .collect();
    let already = dead.is_empty() && !network.running.process.is_empty();
    if !already && !network.running.process.is_empty() {
        out.note(format!(
            "half of the network is gone ({}): stopping the rest and starting anew",
            dead.join(", ")
        ));
        network.stop().await?;
    }
    if !already {
        let started = tokio::select! {
            started = network.bring_up(context) => started,
            () = process::told_to_stop() => Err(fault(Kind::Interrupted, "interrupted: nothing was left running")),
        };
        if let Err(error) = started {
            network.stop().await?;
            return Err(error);
        }
    }
    let link = link::open(&context.home).await?;
    if out.json {
        let process = |p: &Known| json!({"name": p.name, "pid": p.pid, "log": p.log});
        out.json(&json!({
            "already_up": already,
            "control_addr": link.config.control_addr, "scheduler": link.config.scheduler.to_string(),
            "processes": network.running.process.iter().map(process).collect::<Vec<_>>(),
        }));
        return Ok(());
    }
    out.line(if already {
        "the network is already up"
    } else {
        "the network is up"
    });
    let mut table = Table::new(&[
        ("NODE", Column::Left),
        ("IN", Column::Left),
        ("PRICE", Column::Right),
    ]);
    for m in &MEMBERS {
        table.row(vec![m.institution.into(), m.country.into(), rate(m.rate.0)]);
    }
    out.table(&table);
    out.line(format!(
        "scheduler {} at {}",
        link.config.scheduler.short(),
        link.config.control_addr
    ));
    out.line(format!("files and logs: {}", network.dir.display()));
    let home = if std::env::var_os("KAREZ_HOME").is_none() && context.home.dir() != default_home() {
        format!(" --home {}", context.home.dir().display())
    } else {
        String::new()
    };
    out.note(format!(
        "\ntry:\n  karez{home} offers\n  karez{home} generate \"Why should I rotate my crops?\"\n  karez{home} balance\n  karez{home} down"
    ));
    Ok(())
}

fn default_home() -> PathBuf {
    std::env::home_dir().unwrap_or_default().join(".karez")
}

pub(crate) async fn down(context: &Context, args: DownArgs) -> Result<()> {
    let out = context.out;
    let mut network = Network::open(context, false)?;
    let alive = network.running.process.iter().filter(|p| p.is_alive()).count();
    network.stop().await?;
    if args.purge {
        let dir = network.dir.clone();
        drop(network);
        fs::remove_dir_all(&dir).with_context(|| dir.display().to_string())?;
        context.home.forget_config()?;
    }
    if out.json {
        out.json(&json!({"stopped": alive, "purged": args.purge}));
    } else if alive == 0 {
        out.line("the network is not up");
    } else {
        out.line(format!("stopped {alive} processes"));
    }
    Ok(())
}

impl Network {
    /// The network of this home, as far as it runs.
    pub(crate) fn open(context: &Context, with_parent: bool) -> Result<Self> {
        let dir = context.home.dir().join("up");
        let subject = || dir.display().to_string();
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .with_context(subject)?;
        let lock = File::create(dir.join("lock")).with_context(subject)?;
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Err(fault(
                Kind::Other,
                format!(
                    "another command starts or stops the network in {} just now: try again when it is done",
                    dir.display()
                ),
            ));
        }
        let path = dir.join("network.toml");
        let running = match fs::read_to_string(&path) {
            Ok(text) => toml::from_str(&text).with_context(|| path.display().to_string())?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Running::default(),
            Err(error) => return Err(error).with_context(|| path.display().to_string()),
        };
        Ok(Self {
            dir,
            running,
            children: Vec::new(),
            with_parent,
            _lock: lock,
        })
    }

    /// Starts everything and waits until all nodes have offers and the shipped model can be used.
    pub(crate) async fn bring_up(&mut self, context: &Context) -> Result<()> {
        let out = context.out;
        let began = Instant::now();
        let home = self.dir.join("scheduler");
        if !scheduler::is_made(&home) {
            scheduler::make_local(&home)?;
        }
        let (key, control_addr) = scheduler::who_and_where(&home)?;
        if let Some(known) = context.home.config_if_any()?
            && known.scheduler != key
        {
            return Err(fault(
                Kind::Refused,
                format!(
                    "{} already belongs to the network of scheduler {} at {}: use another folder for this one with --home DIR",
                    context.home.dir().display(),
                    known.scheduler.short(),
                    known.control_addr
                ),
            ));
        }
        out.note("starting the scheduler");
        self.spawn(
            "scheduler",
            &[
                OsStr::new("scheduler"),
                OsStr::new("run"),
                OsStr::new("--dir"),
                home.as_os_str(),
            ],
        )?;
        let (secret, _) = context.home.key_or_new()?;
        self.until(began, "the scheduler to answer", async || {
            Ok(link::dial(&control_addr, &secret, key.0)
                .await
                .is_ok()
                .then_some(()))
        })
        .await?;
        for member in &MEMBERS {
            let dir = self.dir.join(member.institution);
            out.note(format!(
                "starting {} in {}, {}",
                member.institution,
                member.country,
                rate(member.rate.0)
            ));
            if !node::is_made(&dir) {
                let invitation = scheduler::invite(&home, Role::Node, member.institution, Credits::ZERO)?;
                let options = InitOptions {
                    join: JoinBy::Invitation(invitation),
                    name: format!("{}-1", member.institution),
                    country: member.country.parse().context("a country")?,
                    cpu_rate: member.rate,
                    cpu_slots: 1,
                };
                node::make(&dir, options).await?;
                share_machine(&dir)?;
            }
            let name = format!("node {}", member.institution);
            self.spawn(
                &name,
                &[
                    OsStr::new("node"),
                    OsStr::new("run"),
                    OsStr::new("--dir"),
                    dir.as_os_str(),
                ],
            )?;
        }
        if context.home.config_if_any()?.is_none() {
            let invitation = scheduler::invite(&home, Role::User, USER_INSTITUTION, BUDGET)?;
            let reply = join::redeem(context, &invitation, "local user", false).await?;
            out.note(format!(
                "you are a user of {} with {} credits",
                reply.institution,
                credits(reply.credits)
            ));
        }
        let link = link::open(&context.home).await?;
        let offers = self
            .until(began, "all nodes to offer their capacity", async || {
                let offers = link::call(link.client.clone().offers(wire::OffersRequest {}))
                    .await?
                    .offers;
                let ready = |v: &&wire::OfferView| v.connected && v.offer.is_some();
                Ok((offers.iter().filter(ready).count() >= MEMBERS.len()).then_some(offers))
            })
            .await?;
        // Its owner's last word holds: a node that was paused or drained before comes back so.
        for offer in offers
            .iter()
            .filter_map(|v| v.offer.as_ref())
            .filter(|o| o.state != "open")
        {
            let dir = self.dir.join(&offer.institution);
            out.warn(format!(
                "{} takes no work, it is {}: `karez node open --dir {}` changes that",
                offer.name,
                offer.state,
                dir.display()
            ));
        }
        add_shipped_model(context, &link).await
    }

    fn spawn(&mut self, name: &str, args: &[&OsStr]) -> Result<()> {
        let log = self
            .dir
            .join(format!("{}.log", name.rsplit(' ').next().unwrap_or(name)));
        let (known, child) = process::start(name, args, &log, self.with_parent)?;
        self.running.process.push(known);
        self.children.push(child);
        self.save()
    }

    fn save(&self) -> Result<()> {
        write_atomic(
            &self.dir.join("network.toml"),
            toml::to_string(&self.running)?.as_bytes(),
        )
    }

    /// Asks again and again until `question` is answered, a process dies or the time is up.
    async fn until<T>(
        &mut self,
        began: Instant,
        what: &str,
        mut question: impl AsyncFnMut() -> Result<Option<T>>,
    ) -> Result<T> {
        loop {
            self.children.iter_mut().for_each(|c| drop(c.try_wait()));
            all_alive(&self.running.process)?;
            if let Some(answer) = question().await? {
                return Ok(answer);
            }
            if began.elapsed() > START_MAX {
                return Err(fault(
                    Kind::Unreachable,
                    format!(
                        "waited {} s for {what}: look into the logs in {}",
                        START_MAX.as_secs(),
                        self.dir.display()
                    ),
                ));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Stops exactly the processes that were started. An error when one will not go.
    pub(crate) async fn stop(&mut self) -> Result<()> {
        let (nodes, schedulers): (Vec<_>, Vec<_>) = self
            .running
            .process
            .drain(..)
            .partition(|p| p.name.starts_with("node"));
        // Nodes first, so that they can say goodbye to somebody.
        let mut left = process::stop(&nodes, &mut self.children, STOP_PATIENCE).await;
        left.extend(process::stop(&schedulers, &mut self.children, STOP_PATIENCE).await);
        self.children.clear();
        self.running.process = left;
        self.save()?;
        match self.running.process.first() {
            None => Ok(()),
            Some(p) => Err(fault(
                Kind::Other,
                format!("the {} (process {}) cannot be stopped", p.name, p.pid),
            )),
        }
    }

    /// Whose processes run.
    pub(crate) fn processes(&self) -> usize {
        self.running.process.len()
    }
}

/// The nodes of one machine share its cores, and nobody outside needs to reach them.
fn share_machine(dir: &std::path::Path) -> Result<()> {
    let path = karez_node::NodeFiles::new(dir).config();
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = (cores / MEMBERS.len()).max(1);
    let text = text
        .replacen("[limits]\n", &format!("[limits]\nthreads = {threads}\n"), 1)
        .replacen("[listen]\n", "[listen]\nartifacts = \"127.0.0.1:0\"\n", 1);
    write_atomic(&path, text.as_bytes())
}

/// Puts the model that comes with the engine into the scheduler's catalogue, unless it is there.
pub(crate) async fn add_shipped_model(context: &Context, link: &link::Link) -> Result<()> {
    let models = link::call(link.client.clone().models(wire::ModelsRequest {}))
        .await?
        .models;
    let known = models
        .iter()
        .find(|m| m.name == SHIPPED_MODEL)
        .and_then(|m| view::artifact(m.artifact.as_ref()).ok());
    let artifacts = link.artifacts(&context.home).await?;
    let store = artifacts.store.clone();
    let model = tokio::task::spawn_blocking(move || store.add_bytes(shipped::MODEL)).await??;
    if known != Some(model) {
        artifacts.push(context.out, SHIPPED_MODEL, model).await?;
        artifact::name_model(link, SHIPPED_MODEL, model, "gguf", "Apache-2.0").await?;
    }
    artifacts.close().await;
    Ok(())
}
