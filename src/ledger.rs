//! `karez balance` and `karez ledger`: the books, and the check that needs nobody's word.
use crate::{
    cli::Context,
    fault::{Kind, fault, refused},
    link::{self, Link, call},
    out::{Column, Out, Table, count, credits, minute, moment, plural, signed_credits, span},
    sink::{Lines, Sink},
    task::interruptible,
    view,
};
use anyhow::{Context as _, Result};
use clap::{Args, Subcommand};
use karez_core::key::SchedulerId;
use karez_ledger::{Fault, Summary, VerifyOptions, verify};
use karez_proto::control as wire;
use serde::Deserialize;
use serde_json::{Value, json};
use std::{
    collections::VecDeque,
    fs::File,
    io::{self, BufReader, Write},
    path::{Path, PathBuf},
};

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
    /// Check an export from the file and public keys alone; needs no network
    #[command(after_help = "\
Examples:
  karez ledger verify ledger.jsonl
  karez ledger verify ledger.jsonl --key KEY")]
    Verify(VerifyArgs),
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
    /// The export, or - for standard input
    file: PathBuf,
    /// The scheduler whose ledger this must be [default: the one of this home, else any]
    #[arg(long, value_name = "KEY")]
    key: Vec<SchedulerId>,
}

pub(crate) async fn run(context: &Context, args: LedgerArgs) -> Result<()> {
    match args.command {
        LedgerCommand::Show(args) => show(context, &args).await,
        LedgerCommand::Balance(args) => balance(context, args).await,
        LedgerCommand::Export(args) => export_command(context, &args).await,
        LedgerCommand::Verify(args) => verify_command(context, &args),
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
        Some((kind @ ("user" | "escrow"), id)) => format!("{kind}:{}", id.get(..12).unwrap_or(id)),
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

fn verify_command(context: &Context, args: &VerifyArgs) -> Result<()> {
    let mut keys = args.key.clone();
    if keys.is_empty()
        && let Some(config) = context.home.config_if_any()?
    {
        keys.push(config.scheduler);
    }
    let pinned = !keys.is_empty();
    let summary = verify_file(&args.file, keys)?;
    let out = context.out;
    if out.json {
        out.json(&summary_json(&summary));
        return Ok(());
    }
    print_summary(out, &summary);
    if !pinned {
        out.warn("no key was given, so any scheduler's ledger is accepted: compare the key above with the one you know");
    }
    Ok(())
}

/// Checks an export; the first fault is an error with exit code 9.
pub(crate) fn verify_file(path: &Path, keys: Vec<SchedulerId>) -> Result<Summary> {
    let mut name = path.display().to_string();
    let file: Box<dyn io::Read> = if name == "-" {
        name = "standard input".into();
        Box::new(io::stdin())
    } else {
        match File::open(path) {
            Ok(file) if file.metadata().is_ok_and(|m| m.is_dir()) => {
                let why = format!("{name} is a directory: give the file that `karez ledger export` wrote");
                return Err(fault(Kind::Refused, why));
            }
            Ok(file) => Box::new(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(fault(Kind::NotFound, format!("{name} does not exist")));
            }
            Err(error) => return Err(error).context(name),
        }
    };
    check(&mut BufReader::new(file), keys)
        .map_err(|found| fault(Kind::NotVerified, format!("{name}: {found}")))
}

/// The same from a reader, with the fault as it is.
pub(crate) fn check(from: &mut dyn io::BufRead, keys: Vec<SchedulerId>) -> Result<Summary, Fault> {
    let keys = if keys.is_empty() {
        None
    } else {
        Some(keys.into_iter().collect())
    };
    verify(from, &VerifyOptions { keys })
}

/// The summary as text.
pub(crate) fn print_summary(out: &Out, s: &Summary) {
    out.line(format!(
        "verified: {} with {} signed records, chain, balances and signatures hold",
        plural(s.entries, "entry").replace("entrys", "entries"),
        count(s.records)
    ));
    out.line(format!("scheduler {}", s.scheduler));
    out.line(format!("head {} of {}", s.head.short(), moment(s.created.0)));
    out.line(format!(
        "granted {}, reserved {}, settled {}, released {} credits",
        credits(s.granted.0),
        credits(s.reserved.0),
        credits(s.settled.0),
        credits(s.released.0)
    ));
    if s.institutions.is_empty() {
        return;
    }
    let mut table = Table::new(&[
        ("INSTITUTION", Column::Cut),
        ("RECEIPTS", Column::Right),
        ("DEVICE TIME", Column::Right),
        ("EARNED", Column::Right),
    ]);
    for (institution, earned) in &s.institutions {
        table.row(vec![
            institution.to_string(),
            count(earned.receipts),
            span(earned.billed.0),
            credits(earned.credits.0),
        ]);
    }
    out.table(&table);
}

fn summary_json(s: &Summary) -> Value {
    let institutions: serde_json::Map<String, Value> = s
        .institutions
        .iter()
        .map(|(name, e)| {
            (
                name.to_string(),
                json!({"receipts": e.receipts, "billed_ms": e.billed.0, "microcredits": e.credits.0}),
            )
        })
        .collect();
    json!({
        "verified": true, "scheduler": s.scheduler.to_string(), "created_ms": s.created.0,
        "entries": s.entries, "records": s.records, "head": view::hex(&s.head.0), "balances": view::hex(&s.balances.0),
        "granted_microcredits": s.granted.0, "reserved_microcredits": s.reserved.0,
        "settled_microcredits": s.settled.0, "released_microcredits": s.released.0,
        "institutions": institutions,
    })
}
