//! `karez balance` and `karez ledger`: the books, and the check that needs nobody's word.
mod check;
mod file;
mod forget;
mod report;

pub(crate) use check::{check, verify_file};

use crate::{
    cli::Context,
    fault::{Kind, fault, refused},
    link::{self, Link, call},
    out::{Column, Table, minute, moment, plural, signed_credits},
    sink::{Lines, Sink},
    task::interruptible,
};
use anyhow::{Context as _, Result};
use clap::{Args, Subcommand};
use karez_core::key::{PublicKey, SchedulerId};
use karez_ledger::{
    Head, Proof,
    head::{self, HeadError},
    note,
};
use karez_proto::control as wire;
use serde::Deserialize;
use serde_json::{Value, json};
use std::{collections::VecDeque, io::Write, path::PathBuf};

/// `karez balance`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  karez balance")]
pub(crate) struct BalanceArgs {
    /// The accounts of institutions too
    #[arg(short, long)]
    all: bool,
}

/// `karez ledger`.
#[derive(Debug, Args)]
#[command(
    arg_required_else_help = true,
    after_help = "Example:\n  karez ledger export -o ledger.jsonl && karez ledger verify ledger.jsonl"
)]
pub(crate) struct LedgerArgs {
    #[command(subcommand)]
    command: LedgerCommand,
}

#[derive(Debug, Subcommand)]
enum LedgerCommand {
    /// The latest entries
    #[command(after_help = "Example:\n  karez ledger show -n 50")]
    Show(ShowArgs),
    /// Your budget, and with --all every account
    #[command(after_help = "Example:\n  karez ledger balance --all")]
    Balance(BalanceArgs),
    /// Write the whole ledger to a file that anyone can check
    #[command(after_help = "Example:\n  karez ledger export -o ledger.jsonl")]
    Export(ExportArgs),
    /// The latest signed tree head, a line of text that stands for every entry
    #[command(after_help = "\
Example:
  karez ledger head >> heads    (keep them: a later export must fit)")]
    Head(HeadArgs),
    /// Prove that a record or an entry is in the ledger
    #[command(after_help = "\
Example:
  karez ledger prove RECEIPT -o receipt.tlog-proof
  karez ledger verify receipt.tlog-proof")]
    Prove(ProveArgs),
    /// Check an export or a proof from files and public keys alone; needs no network
    #[command(after_help = "\
Examples:
  karez ledger verify ledger.jsonl
  karez ledger verify ledger.jsonl --heads heads --against theirs.jsonl
  karez ledger verify ledger.jsonl --receipts ~/.karez/node/receipts
  karez ledger verify receipt.tlog-proof --key KEY")]
    Verify(VerifyArgs),
    /// One institution's month as a signed text or CSV
    #[command(after_help = "\
Examples:
  karez ledger statement --institution uni-nairobi --month 2026-11
  karez ledger statement --institution lab-7 --month 2026-11 --check theirs.txt")]
    Statement(report::StatementArgs),
    /// Who owes whom among institutions, since when, and what would settle it
    #[command(after_help = "Example:\n  karez ledger netting --month 2026-11")]
    Netting(report::NettingArgs),
    /// What each institution used and gave lately, and the share that follows:
    /// anyone's recount of a scheduler's fair share
    #[command(after_help = "\
Examples:
  karez ledger shares
  karez ledger shares --file ledger.jsonl --half-life 14days")]
    Shares(report::SharesArgs),
    /// Usage in the forms of other systems; users are pseudonyms
    #[command(after_help = "\
Example:
  karez ledger usage --form focus --month 2026-11 -o november.csv")]
    Usage(report::UsageArgs),
    /// Agree with a receipt of yours before its window ends
    #[command(after_help = "Example:\n  karez ledger accept RECEIPT")]
    Accept(file::AcceptArgs),
    /// Dispute a receipt of yours: what it paid is frozen until a ruling
    #[command(
        after_help = "Example:\n  karez ledger dispute RECEIPT --because \"half the vectors are zero\""
    )]
    Dispute(file::DisputeArgs),
    /// The open disputes: yours, or with the scheduler's key all
    #[command(after_help = "Example:\n  karez ledger disputes")]
    Disputes(file::Operator),
    /// Operator: end a dispute
    #[command(
        after_help = "Example:\n  karez ledger rule RECEIPT --refund 0.5 --because \"half was usable\""
    )]
    Rule(file::RuleArgs),
    /// Operator: fund a grant
    #[command(after_help = "\
Example:
  karez ledger grant --to uni-nairobi --credits 100 --valid 90days")]
    Grant(file::GrantArgs),
    /// The open grants
    #[command(after_help = "Example:\n  karez ledger grants")]
    Grants,
    /// The standard rates; operator: set them
    #[command(after_help = "Example:\n  karez ledger rates --set cpu=0.05 --set cuda=1")]
    Rates(file::RatesArgs),
    /// How institutions share the network; operator: promise it
    #[command(after_help = "Example:\n  karez ledger floors --floor 40 --extra uni-nairobi=50")]
    Floors(file::FloorsArgs),
    /// Operator: how far an institution's account may go under zero
    #[command(after_help = "Example:\n  karez ledger limit uni-nairobi 50")]
    Limit(file::LimitArgs),
    /// Operator: drop the records of work that is long over; every proof and sum still holds
    #[command(after_help = "\
Example:
  karez ledger forget --before 2026-01    (with the scheduler stopped)")]
    Forget(forget::ForgetArgs),
    /// Operator: note that one institution has paid another
    #[command(
        after_help = "Example:\n  karez ledger pay uni-nairobi lab-7 12.5 --reference \"transfer 4711\""
    )]
    Pay(file::PayArgs),
}

#[derive(Debug, Args)]
struct HeadArgs {
    /// Show contradictory heads that were found, of this and other ledgers
    #[arg(long)]
    forks: bool,
}

#[derive(Debug, Args)]
struct ProveArgs {
    /// The id of a receipt, an order or another record in hex, or the number of an entry
    id: String,
    /// Where to write; - for standard output
    #[arg(short, long, value_name = "FILE", default_value = "-")]
    output: PathBuf,
}

#[derive(Debug, Args)]
struct ShowArgs {
    /// How many entries, the newest last
    #[arg(short = 'n', long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    limit: u32,
}

#[derive(Debug, Args)]
struct ExportArgs {
    /// Where to write; - for standard output
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

#[derive(Debug, Args)]
struct VerifyArgs {
    /// The export or the proof, or - for standard input
    file: PathBuf,
    /// Another copy of the same ledger: shows which entries are missing here, or where the two part
    #[arg(long, value_name = "OTHER")]
    against: Option<PathBuf>,
    /// Signed tree heads that were published: the ledger must fit each of them
    #[arg(long, value_name = "FILE")]
    heads: Option<PathBuf>,
    /// Receipts that a node was given (`karez node receipts` says where): each must be in the ledger
    #[arg(long, value_name = "FILE")]
    receipts: Vec<PathBuf>,
    /// The scheduler whose ledger this must be [default: the one of this home, else any]
    #[arg(long, value_name = "KEY")]
    key: Vec<SchedulerId>,
    /// All records must be there: refuse entries whose records were dropped
    #[arg(long)]
    whole: bool,
}

pub(crate) async fn run(context: &Context, args: LedgerArgs) -> Result<()> {
    match args.command {
        LedgerCommand::Show(args) => show(context, &args).await,
        LedgerCommand::Balance(args) => balance(context, args).await,
        LedgerCommand::Export(args) => export_command(context, &args).await,
        LedgerCommand::Head(args) => head(context, &args).await,
        LedgerCommand::Prove(args) => prove(context, &args).await,
        LedgerCommand::Verify(args) => check::command(context, &args),
        LedgerCommand::Statement(args) => report::statement(context, &args).await,
        LedgerCommand::Netting(args) => report::netting(context, &args).await,
        LedgerCommand::Shares(args) => report::shares(context, &args).await,
        LedgerCommand::Usage(args) => report::usage(context, &args).await,
        LedgerCommand::Accept(args) => file::accept(context, &args).await,
        LedgerCommand::Dispute(args) => file::dispute(context, &args).await,
        LedgerCommand::Disputes(args) => file::disputes(context, &args).await,
        LedgerCommand::Rule(args) => file::rule(context, &args).await,
        LedgerCommand::Grant(args) => file::grant(context, &args).await,
        LedgerCommand::Grants => file::grants(context).await,
        LedgerCommand::Rates(args) => file::rates(context, &args).await,
        LedgerCommand::Floors(args) => file::floors(context, &args).await,
        LedgerCommand::Limit(args) => file::limit(context, &args).await,
        LedgerCommand::Forget(args) => forget::forget(context, &args),
        LedgerCommand::Pay(args) => file::pay(context, &args).await,
    }
}

pub(crate) async fn balance(context: &Context, args: BalanceArgs) -> Result<()> {
    let mut link = link::open(&context.home).await?;
    let accounts = call(link.client.balance(wire::BalanceRequest { all: args.all }))
        .await?
        .accounts;
    let out = context.out;
    if out.json {
        let one = |a: &wire::Account| json!({"account": a.name, "microcredits": a.balance});
        out.json(&Value::Array(accounts.iter().map(one).collect()));
        return Ok(());
    }
    let own = format!("user:{}", link.user());
    let mut table = Table::new(&[
        ("ACCOUNT", Column::Cut),
        ("CREDITS", Column::Right),
        ("", Column::Left),
    ]);
    for account in &accounts {
        let note = if account.name == own { "you" } else { "" };
        table.row(vec![
            short_account(&account.name),
            signed_credits(account.balance),
            note.into(),
        ]);
    }
    out.table(&table);
    Ok(())
}

/// Keys and ids in account names cut to what people compare.
fn short_account(name: &str) -> String {
    match name.split_once(':') {
        Some((kind @ ("user" | "escrow" | "grant" | "disputed"), id)) => {
            format!("{kind}:{}", id.get(..12).unwrap_or(id))
        }
        _ => name.to_owned(),
    }
}

async fn show(context: &Context, args: &ShowArgs) -> Result<()> {
    let link = link::open(&context.home).await?;
    // The whole ledger passes by; only the last entries are kept.
    let mut entries = VecDeque::new();
    export(
        &link,
        &mut Lines::new(|line: &[u8]| {
            entries.extend(Shown::parse(line));
            if entries.len() > args.limit as usize {
                entries.pop_front();
            }
            Ok(())
        }),
    )
    .await?;
    let out = context.out;
    if out.json {
        for entry in &entries {
            out.json(&entry.json());
        }
        return Ok(());
    }
    if entries.is_empty() {
        out.note("the ledger is empty");
        return Ok(());
    }
    let mut table = Table::new(&[
        ("ENTRY", Column::Right),
        ("TIME (UTC)", Column::Left),
        ("KIND", Column::Left),
        ("CREDITS", Column::Right),
        ("FROM", Column::Cut),
        ("TO", Column::Cut),
    ]);
    for entry in &entries {
        let side = |gains: bool| {
            // Donated work moves nothing, from the job to whoever did it.
            let gaining = |(name, amount): &&(String, i64)| match *amount {
                0 => !name.starts_with("escrow:"),
                amount => amount > 0,
            };
            let legs = entry.legs.iter().filter(|leg| gaining(leg) == gains);
            legs.map(|(name, _)| short_account(name))
                .collect::<Vec<_>>()
                .join(" ")
        };
        let moved: i64 = entry
            .legs
            .iter()
            .map(|(_, amount)| *amount)
            .filter(|a| *a > 0)
            .sum();
        table.row(vec![
            entry.seq.to_string(),
            minute(entry.at),
            entry.kind.clone(),
            signed_credits(moved),
            side(false),
            side(true),
        ]);
    }
    out.table(&table);
    Ok(())
}

/// What a listing tells of an entry; header and trailer of an export have other fields and are passed over.
#[derive(Deserialize)]
struct Shown {
    seq: u64,
    at: u64,
    kind: String,
    legs: Vec<(String, i64)>,
    /// None where the records were dropped.
    #[serde(default)]
    evidence: Vec<String>,
}

impl Shown {
    fn parse(line: &[u8]) -> Option<Self> {
        serde_json::from_slice(line).ok()
    }

    fn json(&self) -> Value {
        let leg = |(account, amount): &(String, i64)| json!({"account": account, "microcredits": amount});
        json!({
            "entry": self.seq, "at_ms": self.at, "kind": self.kind,
            "legs": self.legs.iter().map(leg).collect::<Vec<_>>(), "records": self.evidence.len(),
        })
    }
}

/// Streams the scheduler's export to `to`; gives the bytes written.
pub(crate) async fn export(link: &Link, to: &mut dyn Write) -> Result<u64> {
    let mut stream = link
        .client
        .clone()
        .ledger(wire::LedgerRequest { from: 0 })
        .await
        .map_err(refused)?
        .into_inner();
    let mut written = 0;
    while let Some(chunk) = stream.message().await.map_err(refused)? {
        to.write_all(&chunk.bytes)?;
        written += chunk.bytes.len() as u64;
    }
    to.flush()?;
    Ok(written)
}

async fn export_command(context: &Context, args: &ExportArgs) -> Result<()> {
    let out = context.out;
    Sink::check(out, Some(&args.output))?;
    let link = link::open(&context.home).await?;
    let sink = Sink::at(&args.output);
    let name = args.output.display().to_string();
    // An interrupt leaves what was there before, not half an export.
    let written = interruptible(async {
        let mut opened = sink.open(out)?;
        let written = export(&link, opened.writer()).await?;
        opened.done()?;
        Ok(written)
    })
    .await?;
    if sink == Sink::Stdout {
        return Ok(());
    }
    if out.json {
        out.json(&json!({"path": args.output, "bytes": written}));
    } else {
        out.line(format!("{name}: {}", crate::out::size(written)));
        out.note(format!("next: `karez ledger verify {name}`"));
    }
    Ok(())
}

async fn head(context: &Context, args: &HeadArgs) -> Result<()> {
    let mut link = link::open(&context.home).await?;
    let reply = call(link.client.head(wire::HeadRequest { old: None })).await?;
    let out = context.out;
    let name = |e: HeadError| fault(Kind::NotVerified, format!("the scheduler's head: {e}"));
    let head = Head::parse(&reply.head).map_err(name)?;
    if head.scheduler != link.config.scheduler {
        let why = format!("the scheduler answered with a head of {}", head.scheduler);
        return Err(fault(Kind::NotVerified, why));
    }
    let forks = || {
        let fork = |f: &wire::Fork| json!({"known": f.known, "other": f.other, "heard_at_ms": f.heard_at});
        reply.forks.iter().map(fork).collect::<Vec<_>>()
    };
    if out.json {
        let witness = |(key, at): &(PublicKey, u64)| json!({"key": key.to_string(), "at_s": at});
        out.json(&json!({
            "scheduler": head.scheduler.to_string(), "size": head.size, "root": head.root.to_string(),
            "note": reply.head, "cosigned": reply.cosigned, "forks": forks(),
            "witnesses": head.witnesses().iter().map(witness).collect::<Vec<_>>(),
        }));
        return Ok(());
    }
    if args.forks {
        for fork in &reply.forks {
            out.line(format!("heard {}, known:", moment(fork.heard_at)));
            out.raw(fork.known.as_bytes());
            out.line("and another:");
            out.raw(fork.other.as_bytes());
        }
        if reply.forks.is_empty() {
            out.note("no contradictory heads are known");
        }
        return Ok(());
    }
    out.raw(reply.head.as_bytes());
    if !reply.cosigned.is_empty() {
        out.line("");
        out.raw(reply.cosigned.as_bytes());
    }
    let key = note::verifier_key(&head::origin(head.scheduler), &head.scheduler.0, false);
    out.note(format!("verifier key: {key}"));
    if !reply.forks.is_empty() {
        out.note(format!(
            "{} forked: see `karez ledger head --forks`",
            plural(reply.forks.len() as u64, "ledger")
        ));
    }
    Ok(())
}

async fn prove(context: &Context, args: &ProveArgs) -> Result<()> {
    let mut link = link::open(&context.home).await?;
    let id = args.id.clone();
    let text = call(link.client.prove(wire::ProveRequest { id })).await?.proof;
    let proof = Proof::parse(&text).and_then(|proof| proof.verify().map(|_| proof));
    let proof = proof.map_err(|e| fault(Kind::NotVerified, format!("the scheduler's proof: {e}")))?;
    if proof.head.scheduler != link.config.scheduler {
        let why = format!("the proof is of the ledger of {}", proof.head.scheduler);
        return Err(fault(Kind::NotVerified, why));
    }
    let out = context.out;
    if args.output.as_os_str() == "-" {
        out.raw(text.as_bytes());
        return Ok(());
    }
    let name = args.output.display().to_string();
    std::fs::write(&args.output, &text).with_context(|| name.clone())?;
    if out.json {
        out.json(&json!({"path": args.output, "entry": proof.index, "bytes": text.len()}));
    } else {
        out.line(format!("{name}: entry {} of {}", proof.index, proof.head.size));
        out.note(format!("next: `karez ledger verify {name}`"));
    }
    Ok(())
}
