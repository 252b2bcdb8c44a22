//! The tree of commands. The arguments of each group stand in that group's file.
use crate::{
    artifact, demo, embed, fault, generate, home::Home, jobs, join, ledger, market, network, node, out::Out,
    scheduler, submit,
};
use anyhow::Result;
use clap::{ArgAction, Args, CommandFactory, Parser, Subcommand};
use std::path::PathBuf;

const ROOT_EXAMPLES: &str = "\
Examples:
  karez up                                  a network on this machine
  karez embed sentences.txt -o vectors.jsonl
  karez generate \"Why rotate crops?\"
  karez down

`karez help exit-codes` lists the exit codes.";

/// Lend spare machines, run open models, keep books anyone can check.
#[derive(Debug, Parser)]
#[command(name = "karez", version, after_help = ROOT_EXAMPLES, max_term_width = 100, subcommand_required = true, arg_required_else_help = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options that every command takes.
#[derive(Debug, Clone, Args)]
pub(crate) struct Global {
    /// Print JSON instead of text: one document, or one per line for streams
    #[arg(long, global = true, help_heading = "Everywhere")]
    pub(crate) json: bool,
    /// The folder with your key, your settings and your artifacts [default: ~/.karez]
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        env = "KAREZ_HOME",
        hide_env_values = true,
        help_heading = "Everywhere"
    )]
    pub(crate) home: Option<PathBuf>,
    /// No progress and no remarks
    #[arg(
        short,
        long,
        global = true,
        conflicts_with = "verbose",
        help_heading = "Everywhere"
    )]
    pub(crate) quiet: bool,
    /// Log more to standard error; twice for still more
    #[arg(short, long, global = true, action = ArgAction::Count, help_heading = "Everywhere")]
    pub(crate) verbose: u8,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start a network on this machine: a scheduler and three nodes
    Up(network::UpArgs),
    /// Stop the network that `up` started
    Down(network::DownArgs),
    /// Start a network, put it to work, check its books, stop it
    Demo(demo::DemoArgs),
    /// Turn lines of text into vectors
    Embed(embed::EmbedArgs),
    /// Answer prompts
    Generate(generate::GenerateArgs),
    /// Submit a job described in a file
    Submit(submit::SubmitArgs),
    /// List your jobs
    Jobs(jobs::ListArgs),
    /// Look at one job, or stop it
    Job(jobs::JobArgs),
    /// List the capacity on offer
    Offers(market::OffersArgs),
    /// List the models the scheduler knows
    Models(market::ModelsArgs),
    /// Add, fetch and list files and models
    Artifact(artifact::ArtifactArgs),
    /// Show your budget
    Balance(ledger::BalanceArgs),
    /// Read, export and verify the books
    Ledger(ledger::LedgerArgs),
    /// Join a network with an invitation
    Join(join::JoinArgs),
    /// Make your key
    Init(join::InitArgs),
    /// Lend this machine
    Node(node::NodeArgs),
    /// Run a scheduler
    Scheduler(scheduler::SchedulerArgs),
    /// Print the JSON Schema of a file format
    Schema(submit::SchemaArgs),
    /// Print completions for a shell
    Completions(CompletionsArgs),
    /// The exit codes of every command
    #[command(name = "exit-codes", hide = true, long_about = fault::EXIT_CODES, after_help = "Example:\n  karez exit-codes")]
    ExitCodes,
    /// The engine's process; started by nodes
    #[command(
        hide = true,
        after_help = "Example:\n  karez worker    (speaks frames on standard input and output)"
    )]
    Worker,
}

/// What every command gets.
#[derive(Debug, Clone)]
pub(crate) struct Context {
    pub(crate) out: &'static Out,
    pub(crate) home: Home,
}

/// `karez completions`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  karez completions bash > ~/.local/share/bash-completion/completions/karez"
)]
pub(crate) struct CompletionsArgs {
    /// For which shell
    shell: clap_complete::Shell,
}

pub(crate) fn completions(context: &Context, args: &CompletionsArgs) -> Result<()> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "karez", &mut text);
    context.out.raw(&text);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn walk(command: &clap::Command, path: &str, visit: &mut impl FnMut(&clap::Command, &str)) {
        visit(command, path);
        for sub in command.get_subcommands() {
            walk(sub, &format!("{path} {}", sub.get_name()), visit);
        }
    }

    #[test]
    fn the_tree_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn help_fits_eighty_columns() {
        let mut root = Cli::command().term_width(80);
        root.build();
        walk(&root, "karez", &mut |command, path| {
            let help = command.clone().term_width(80).render_long_help().to_string();
            for line in help.lines() {
                assert!(
                    line.chars().count() <= 80,
                    "`{path} --help` is too wide: {line:?}"
                );
            }
        });
    }

    #[test]
    fn every_command_shows_an_example() {
        walk(&Cli::command(), "karez", &mut |command, path| {
            let help = command
                .get_after_help()
                .map(ToString::to_string)
                .unwrap_or_default();
            assert!(help.contains("Example"), "`{path} --help` has no example");
            let own = if command.has_subcommands() {
                "karez".to_owned()
            } else {
                path.to_owned()
            };
            assert!(
                help.contains(&own),
                "the example of `{path}` shows another command: {help}"
            );
            assert!(command.get_about().is_some(), "{path} says not what it does");
            for line in help.lines().chain([path]) {
                assert!(line.chars().count() <= 80, "{path}: {line:?} is over 80 columns");
            }
        });
    }
}
