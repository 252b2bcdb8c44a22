//! The tree of commands. The arguments of each group stand in that group's file.
#[cfg(feature = "engine")]
use crate::finetune;
use crate::{
    artifact, chat, demo, embed, fault, generate, home::Home, jobs, join, key, ledger, market, network, node,
    out::Out, scheduler, submit,
};
use anyhow::Result;
use clap::{ArgAction, Args, CommandFactory, Parser, Subcommand};
use std::path::PathBuf;

const ROOT_EXAMPLES: &str = "\
Examples:
  karez up        # a network on this machine
  karez generate \"Why should I rotate my crops?\"
  karez embed sentences.txt -o vectors.jsonl
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
    // Not clap's `env`: a variable would count as an argument, and `karez` alone would no longer show its help.
    /// The folder with your key, your settings and your artifacts [default: $KAREZ_HOME, else ~/.karez]
    #[arg(long, global = true, value_name = "DIR", help_heading = "Everywhere")]
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
    /// Train an adapter on your own text
    #[cfg(feature = "engine")]
    Finetune(Box<finetune::FinetuneArgs>),
    /// Talk with a model
    Chat(chat::ChatArgs),
    /// Submit a job described in a file
    Submit(submit::SubmitArgs),
    /// Say where a job described in a file would run, from when and for how much
    Estimate(submit::EstimateArgs),
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
    /// Keys for programs: OpenAI's clients, notebooks
    Key(key::KeyArgs),
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
        after_help = "Example:\n  karez worker    # speaks frames on standard input and output"
    )]
    Worker,
    /// What the trainer knows of files; started by schedulers
    #[cfg(feature = "engine")]
    #[command(
        hide = true,
        after_help = "Example:\n  karez tuner     # one question on standard input, one answer back"
    )]
    Tuner,
}

/// What every command gets.
#[derive(Debug, Clone)]
pub(crate) struct Context {
    pub(crate) out: &'static Out,
    pub(crate) home: Home,
}

/// `karez completions`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  source <(karez completions bash)            # for this shell
  karez completions bash >> ~/.bash_completion")]
pub(crate) struct CompletionsArgs {
    /// For which shell
    shell: clap_complete::Shell,
}

pub(crate) fn completions(context: &Context, args: &CompletionsArgs) -> Result<()> {
    let mut text = Vec::new();
    // Commands for machines are not offered.
    let all = Cli::command();
    let visible = all.get_subcommands().filter(|c| !c.is_hide_set()).cloned();
    let mut shown = clap::Command::new("karez")
        .args(all.get_arguments().cloned())
        .subcommands(visible);
    clap_complete::generate(args.shell, &mut shown, "karez", &mut text);
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

    /// The `karez` commands in lines of shell, cut into words as a shell would. Comments, redirections and what is
    /// not `karez` are left out.
    fn commands(text: &str) -> Vec<Vec<String>> {
        let mut found = Vec::new();
        for line in text.lines().filter(|l| l.contains("karez ")) {
            let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
            for c in line.chars().chain(['\n']) {
                match (quote, c) {
                    (Some(q), _) if q == c => quote = None,
                    (Some(_), _) => word.get_or_insert_default().push(c),
                    (None, '"' | '\'') => {
                        quote = Some(c);
                        word.get_or_insert_default();
                    }
                    (None, '#') if word.is_none() => break,
                    (None, '|' | '&' | '<' | '>' | '(' | ')' | '\n') => {
                        words.extend(word.take());
                        found.push(std::mem::take(&mut words));
                    }
                    (None, _) if c.is_whitespace() => words.extend(word.take()),
                    (None, _) => word.get_or_insert_default().push(c),
                }
            }
            words.extend(word);
            found.push(words);
        }
        found.retain(|words| words.first().is_some_and(|w| w == "karez"));
        found
    }

    /// Every command of `text` is understood. Stand-ins for ids become ids.
    #[track_caller]
    fn understood(text: &str) -> usize {
        let commands = commands(text);
        for words in &commands {
            let words = words.iter().map(|w| match w.as_str() {
                "JOB" => "3f2a1b".to_owned(),
                "KEY" | "RECEIPT" => {
                    "3b6a27bcceb6a42d62a3a8d02a6f0d73653215771de243a63ac048a18b59da29".to_owned()
                }
                w => w.to_owned(),
            });
            let words: Vec<String> = words.collect();
            if let Err(error) = Cli::try_parse_from(&words) {
                use clap::error::ErrorKind::{DisplayHelp, DisplayVersion};
                let fine = matches!(error.kind(), DisplayHelp | DisplayVersion);
                assert!(fine, "{words:?} is not understood: {error}");
            }
        }
        commands.len()
    }

    #[test]
    fn what_help_and_readme_show_is_understood_as_it_stands() {
        let mut seen = 0;
        walk(&Cli::command(), "karez", &mut |command, _| {
            let help = command.get_after_help().map(ToString::to_string);
            seen += understood(&help.unwrap_or_default());
        });
        assert!(seen > 40, "only {seen} examples were found");
        let readme = include_str!("../README.md");
        let blocks = readme.split("```sh\n").skip(1);
        let shown: usize = blocks
            .map(|block| understood(block.split("```").next().unwrap_or_default()))
            .sum();
        assert!(shown > 15, "only {shown} commands were found in the README");
    }

    #[test]
    fn completions_offer_what_people_use() {
        let root = Cli::command();
        assert!(
            root.find_subcommand("worker")
                .is_some_and(clap::Command::is_hide_set)
        );
        assert_eq!(
            commands("a | karez x 'b c' # d\nkarez y > z && karez \"\""),
            [vec!["karez", "x", "b c"], vec!["karez", "y"], vec!["karez", ""]]
        );
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
