//! `karez`: the one binary. Parses the command line and hands over to one file per command group.
//!
//! | file | commands |
//! |---|---|
//! | [`network`] | `up`, `down`: a whole network on this machine |
//! | [`demo`] | `demo`: the same network, put to work and checked |
//! | [`join`] | `init`, `join` |
//! | [`node`], [`scheduler`] | the daemons and their owners' commands |
//! | [`embed`], [`generate`], [`chat`], [`submit`], [`batch`], `finetune` | giving work |
//! | [`jobs`] | watching it |
//! | [`key`] | API keys |
//! | `tuner` | what the scheduler asks the trainer, in a process of its own |
//! | [`market`], [`artifact`], [`ledger`] | offers and models, files, the books |
//!
//! Shared by them: [`home`] (the user's folder), [`link`] (the line to the scheduler), [`task`] (one job from
//! order to results), [`input`] and [`sink`] (what goes in and comes out), [`out`] (what is printed) and [`fault`] (exit codes). Start at [`cli::Cli`].

mod answer;
mod artifact;
mod batch;
mod chat;
mod cli;
mod demo;
mod embed;
mod fault;
#[cfg(feature = "engine")]
mod finetune;
mod follow;
mod generate;
mod home;
mod input;
mod jobfile;
mod jobs;
mod join;
mod key;
mod ledger;
mod link;
mod market;
mod network;
mod node;
mod options;
mod out;
mod over;
#[cfg(feature = "engine")]
mod parquet;
mod process;
mod report;
mod scheduler;
mod sink;
mod submit;
mod task;
mod texts;
#[cfg(feature = "engine")]
mod tuner;
mod view;

use anyhow::{Context as _, Result};
use clap::Parser;
use cli::{Cli, Command, Context};
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let talkative = cli.global.verbose > 0 || matches!(cli.command, Command::Up(_) | Command::Demo(_));
    let out = out::Out::new(cli.global.json, cli.global.quiet, talkative);
    let out: &'static out::Out = Box::leak(Box::new(out));
    process::die_with_parent_if_asked();
    log(&cli);
    match run(cli, out) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let code = fault::code(&error);
            out.error(&fault::one_line(&error), code);
            ExitCode::from(code)
        }
    }
}

/// Logs go to standard error: warnings for commands, everything an operator wants to know for daemons.
fn log(cli: &Cli) {
    let daemon = matches!(&cli.command, Command::Node(n) if n.is_run())
        || matches!(&cli.command, Command::Scheduler(s) if s.is_run());
    let default = match (cli.global.verbose, daemon) {
        (0, false) => "warn",
        (0, true) | (1, false) => "info",
        (1, true) | (2, _) => "debug",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| {
        EnvFilter::new(format!(
            "{default},libp2p=warn,libp2p_kad=error,libp2p_gossipsub=error"
        ))
    });
    let plain = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty())
        || !std::io::IsTerminal::is_terminal(&std::io::stderr());
    // A second subscriber can only be a test's: then that one stands.
    drop(
        tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(std::io::stderr)
            .with_ansi(!plain)
            .with_target(daemon)
            .try_init(),
    );
}

fn run(cli: Cli, out: &'static out::Out) -> Result<()> {
    if let Command::Worker = cli.command {
        return worker();
    }
    #[cfg(feature = "engine")]
    if let Command::Tuner = cli.command {
        return tuner::answer();
    }
    let context = Context {
        out,
        home: home::Home::new(cli.global.home)?,
    };
    // Commands without a runtime of their own share this one. It has one thread, the main one.
    let local = |work: std::pin::Pin<Box<dyn Future<Output = Result<()>>>>| -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("starting the runtime")?;
        let done = runtime.block_on(work);
        runtime.shutdown_background();
        done
    };
    let c = context.clone();
    match cli.command {
        Command::Up(args) => local(Box::pin(async move { network::up(&c, args).await })),
        Command::Down(args) => local(Box::pin(async move { network::down(&c, args).await })),
        Command::Demo(args) => local(Box::pin(async move { demo::run(&c, args).await })),
        Command::Init(args) => join::init(&context, args),
        Command::Join(args) => local(Box::pin(async move { join::join(&c, args).await })),
        Command::Node(args) => node::run(&context, args),
        Command::Scheduler(args) => scheduler::run(&context, args),
        Command::Embed(args) => local(Box::pin(async move { embed::run(&c, args).await })),
        Command::Generate(args) => local(Box::pin(async move { generate::run(&c, args).await })),
        #[cfg(feature = "engine")]
        Command::Finetune(args) => local(Box::pin(async move { finetune::run(&c, *args).await })),
        Command::Estimate(args) => local(Box::pin(async move { submit::estimate(&c, args).await })),
        Command::Chat(args) => local(Box::pin(async move { chat::run(&c, args).await })),
        Command::Submit(args) => local(Box::pin(async move { submit::run(&c, args).await })),
        Command::Jobs(args) => local(Box::pin(async move { jobs::list(&c, args).await })),
        Command::Job(args) => local(Box::pin(async move { jobs::run(&c, args).await })),
        Command::Offers(args) => local(Box::pin(async move { market::offers(&c, args).await })),
        Command::Models(args) => local(Box::pin(async move { market::models(&c, args).await })),
        Command::Artifact(args) => local(Box::pin(async move { artifact::run(&c, args).await })),
        Command::Key(args) => local(Box::pin(async move { key::run(&c, args).await })),
        Command::Balance(args) => local(Box::pin(async move { ledger::balance(&c, args).await })),
        Command::Ledger(args) => local(Box::pin(async move { ledger::run(&c, args).await })),
        Command::Schema(args) => submit::schema(&context, &args),
        Command::Completions(args) => cli::completions(&context, &args),
        Command::ExitCodes => {
            if out.json {
                out.json(&fault::exit_codes_json());
            } else {
                out.line(fault::EXIT_CODES);
            }
            Ok(())
        }
        Command::Worker => Ok(()),
        #[cfg(feature = "engine")]
        Command::Tuner => Ok(()),
    }
}

#[cfg(feature = "engine")]
fn worker() -> Result<()> {
    karez_engine::worker::main();
    Ok(())
}

#[cfg(not(feature = "engine"))]
fn worker() -> Result<()> {
    Err(fault::fault(
        fault::Kind::Other,
        "this build has no engine: build it with the feature `engine`, which is on by default",
    ))
}
