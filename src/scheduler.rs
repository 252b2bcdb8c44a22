//! `karez scheduler`: running one, and inviting others to it.
use crate::{
    cli::Context,
    fault::{Kind, fault},
    out::credits,
    process,
};
use anyhow::{Context as _, Result};
use clap::{Args, Subcommand, ValueEnum};
use karez_core::{
    id::Institution,
    key::{PublicKey, SchedulerId},
    records::Role,
    unit::Credits,
};
use karez_net::identity;
use karez_scheduler::{Config, InitOptions, InviteOptions, RunOptions, config, setup, tuner::TunerProgram};
use serde_json::json;
use std::{
    net::{IpAddr, Ipv4Addr, TcpListener, UdpSocket},
    path::{Path, PathBuf},
    time::Duration,
};

/// How long an invitation inside one machine can be redeemed.
const LOCAL_INVITATION: Duration = Duration::from_secs(10 * 60);

/// `karez scheduler`.
#[derive(Debug, Args)]
#[command(
    arg_required_else_help = true,
    after_help = "\
Example:
  karez scheduler init --institution my-university --host karez.example.org
  karez scheduler run
  karez scheduler invite --role user --institution my-lab --credits 50"
)]
pub(crate) struct SchedulerArgs {
    #[command(subcommand)]
    command: SchedulerCommand,
    /// The scheduler's folder [default: HOME/scheduler]
    #[arg(long, global = true, value_name = "DIR")]
    dir: Option<PathBuf>,
}

impl SchedulerArgs {
    pub(crate) fn is_run(&self) -> bool {
        matches!(self.command, SchedulerCommand::Run)
    }
}

#[derive(Debug, Subcommand)]
enum SchedulerCommand {
    /// Make a scheduler's folder: key and configuration
    #[command(after_help = "\
Examples:
  karez scheduler init --institution my-university --host karez.example.org
  karez scheduler init --institution try --host 127.0.0.1 --open 10")]
    Init(InitArgs),
    /// Run the scheduler until stopped
    #[command(after_help = "Example:\n  karez scheduler run --dir /var/lib/karez/scheduler")]
    Run,
    /// Sign an invitation for nodes or users; the scheduler need not run
    #[command(after_help = "\
Examples:
  karez scheduler invite --role node --institution my-university
  karez scheduler invite --role user --institution my-lab --credits 50 --uses 20")]
    Invite(InviteArgs),
}

#[derive(Debug, Args)]
struct InitArgs {
    /// Who runs it
    #[arg(long, value_name = "NAME")]
    institution: Institution,
    /// The host name or address under which others reach it
    #[arg(long, value_name = "HOST")]
    host: String,
    /// A name for people [default: the institution]
    #[arg(long, value_name = "TEXT")]
    name: Option<String>,
    /// The local address to listen on [default: all, or loopback for a loopback host]
    #[arg(long, value_name = "IP")]
    listen: Option<IpAddr>,
    /// TCP port of the control API; peers use the next one, artifacts (UDP) the one after, health checks the third
    #[arg(long, value_name = "PORT", default_value_t = 7400)]
    port: u16,
    /// Admit any key, with this budget for a user; for trials
    #[arg(long, value_name = "CREDITS")]
    open: Option<Credits>,
}

#[derive(Debug, Args)]
struct InviteArgs {
    /// As what
    #[arg(long)]
    role: RoleArg,
    /// Into which institution [default: the scheduler's own]
    #[arg(long, value_name = "NAME")]
    institution: Option<Institution>,
    /// A user's first budget
    #[arg(long, value_name = "CREDITS", default_value = "0")]
    credits: Credits,
    /// How many keys may redeem it
    #[arg(long, value_name = "N", default_value_t = 1)]
    uses: u32,
    /// How long it can be redeemed
    #[arg(long, value_name = "SPAN", default_value = "7days", value_parser = humantime::parse_duration)]
    valid: Duration,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum RoleArg {
    /// A provider's machine
    Node,
    /// A researcher
    User,
}

pub(crate) fn run(context: &Context, args: SchedulerArgs) -> Result<()> {
    let dir = args.dir.unwrap_or_else(|| context.home.dir().join("scheduler"));
    match args.command {
        SchedulerCommand::Init(args) => init(context, &dir, args),
        SchedulerCommand::Run => daemon(&dir),
        SchedulerCommand::Invite(args) => invite_command(context, &dir, &args),
    }
}

fn daemon(dir: &Path) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("starting the runtime")?;
    let options = RunOptions {
        tuner: tuner_program()?,
    };
    let done = runtime.block_on(karez_scheduler::run(dir, options, process::told_to_stop()));
    runtime.shutdown_timeout(Duration::from_secs(1));
    Ok(done?)
}

/// What the trainer knows is asked of this very program in a process of its own; without an engine, of nobody.
fn tuner_program() -> Result<Option<TunerProgram>> {
    if !cfg!(feature = "engine") {
        return Ok(None);
    }
    let own = std::env::current_exe().context("finding this program's own file")?;
    Ok(Some(TunerProgram::new(own)))
}

fn init(context: &Context, dir: &Path, args: InitArgs) -> Result<()> {
    let mut options = InitOptions::new(args.institution, &args.host);
    if let Some(name) = args.name {
        options.name = name;
    }
    if let Some(listen) = args.listen {
        options.listen = listen;
    }
    let port = |after: u16| {
        args.port.checked_add(after).ok_or_else(|| {
            fault(
                Kind::Usage,
                format!("--port {} leaves no room for the three ports after it", args.port),
            )
        })
    };
    (
        options.control_port,
        options.peer_port,
        options.artifact_port,
        options.monitor_port,
    ) = (args.port, port(1)?, port(2)?, port(3)?);
    options.open = args.open;
    let made = setup::init(dir, &options).map_err(refused)?;
    if context.out.json {
        context
            .out
            .json(&json!({"scheduler": made.id.to_string(), "config": made.config}));
    } else {
        context.out.line(format!("scheduler {}", made.id));
        context
            .out
            .line(format!("configuration: {}", made.config.display()));
        context.out.note(format!(
            "next: look through the configuration, then `karez scheduler run --dir {}`",
            dir.display()
        ));
    }
    Ok(())
}

fn invite_command(context: &Context, dir: &Path, args: &InviteArgs) -> Result<()> {
    let (role, next) = match args.role {
        RoleArg::Node => (Role::Node, "karez node init --country CODE --join INVITATION"),
        RoleArg::User => (Role::User, "karez join INVITATION"),
    };
    let options = InviteOptions {
        role,
        institution: args.institution.clone(),
        credits: args.credits,
        valid: args.valid,
        uses: args.uses,
    };
    let text = setup::invite(dir, &options).map_err(refused)?;
    if context.out.json {
        context
            .out
            .json(&json!({"invitation": text, "role": role.as_str(), "uses": args.uses}));
        return Ok(());
    }
    context.out.line(&text);
    let budget = if args.credits == Credits::ZERO {
        String::new()
    } else {
        format!(", {} credits each", credits(args.credits.0))
    };
    context.out.note(format!(
        "for {} {}{budget}, within {}; whoever gets it runs `{next}`",
        args.uses,
        role.as_str(),
        humantime::format_duration(args.valid)
    ));
    Ok(())
}

/// Setup errors with their exit codes.
fn refused(error: setup::SetupError) -> anyhow::Error {
    use config::ConfigError;
    use setup::SetupError;
    match &error {
        SetupError::Exists { .. } | SetupError::Option { .. } => fault(Kind::Refused, error.to_string()),
        SetupError::Config(ConfigError::Missing { .. }) => fault(Kind::NotFound, error.to_string()),
        SetupError::Config(_) => fault(Kind::Refused, error.to_string()),
        SetupError::Io { .. } | SetupError::Identity(_) => error.into(),
    }
}

/// Whether `dir` holds a scheduler.
pub(crate) fn is_made(dir: &Path) -> bool {
    dir.join(config::FILE).exists()
}

/// Makes a scheduler for this machine alone, at ports that are free now.
pub(crate) fn make_local(dir: &Path) -> Result<()> {
    let mut options = InitOptions::new("local-federation".parse().context("a name")?, "127.0.0.1");
    [
        options.control_port,
        options.peer_port,
        options.monitor_port,
        options.gateway_port,
        options.artifact_port,
    ] = free_ports().context("finding free ports")?;
    setup::init(dir, &options).map(drop).map_err(refused)
}

/// Four free TCP ports and a free UDP port. All are held until all are known, so that they differ.
fn free_ports() -> std::io::Result<[u16; 5]> {
    let any = (Ipv4Addr::LOCALHOST, 0);
    let tcp = [
        TcpListener::bind(any)?,
        TcpListener::bind(any)?,
        TcpListener::bind(any)?,
        TcpListener::bind(any)?,
    ];
    let udp = UdpSocket::bind(any)?;
    Ok([
        tcp[0].local_addr()?.port(),
        tcp[1].local_addr()?.port(),
        tcp[2].local_addr()?.port(),
        tcp[3].local_addr()?.port(),
        udp.local_addr()?.port(),
    ])
}

/// Its key, and where its control API is.
pub(crate) fn who_and_where(dir: &Path) -> Result<(SchedulerId, String)> {
    let config = Config::load(dir)?;
    let secret = identity::load(&dir.join(setup::KEY_FILE), "scheduler")?;
    Ok((SchedulerId(PublicKey::of(&secret)), config.control.advertise))
}

/// An invitation for one key on this machine.
pub(crate) fn invite(dir: &Path, role: Role, institution: &str, credits: Credits) -> Result<String> {
    let institution = Some(institution.parse().context("a name")?);
    setup::invite(
        dir,
        &InviteOptions {
            role,
            institution,
            credits,
            valid: LOCAL_INVITATION,
            uses: 1,
        },
    )
    .map_err(refused)
}
