//! `karez ledger verify`: files and public keys, and nobody's word.
use super::{VerifyArgs, short_account};
use crate::{
    cli::Context,
    fault::{Kind, fault},
    out::{Column, Out, Table, count, credits, moment, plural, span},
    view,
};
use anyhow::{Context as _, Result};
use karez_core::key::SchedulerId;
use karez_ledger::{
    Fault, FaultKind, Head, Held, Proof, Relation, Summary, VerifyOptions, compare,
    head::{self, read_heads},
    held::HeldSummary,
    verify, verify_each,
};
use serde_json::{Value, json};
use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read as _},
    path::Path,
};

/// The largest file of heads that is read.
const HEADS_BYTES_MAX: u64 = 64 << 20;
/// How a proof begins.
const PROOF: &[u8] = b"c2sp.org/tlog-proof";

pub(super) fn command(context: &Context, args: &VerifyArgs) -> Result<()> {
    let mut keys = args.key.clone();
    if keys.is_empty()
        && let Some(config) = context.home.config_if_any()?
    {
        keys.push(config.scheduler);
    }
    let pinned = !keys.is_empty();
    let heads = match &args.heads {
        Some(path) => heads_of(path)?,
        None => Vec::new(),
    };
    let given = heads.len();
    let options = VerifyOptions {
        whole: args.whole,
        ..options(&keys).with_heads(heads)
    };
    let out = context.out;
    let name = name_of(&args.file);
    let mut reader = open(&args.file)?;
    let begin = reader.fill_buf().with_context(|| name.clone())?;
    if begin.starts_with(PROOF) {
        return check_proof(context, &name, &mut reader, &keys);
    }
    let mut held = Held::default();
    for path in &args.receipts {
        let name = name_of(path);
        let read = held.read(&mut open(path)?);
        read.map_err(|e| fault(Kind::NotVerified, format!("{name}: {e}")))?;
    }
    let verified = verify_each(&mut reader, &options, &mut |entry| {
        held.see(entry);
        Ok(())
    });
    if let Err(found) = &verified {
        show_heads(out, found);
    }
    if let Some(other) = &args.against {
        against(out, &args.file, other, &keys, &verified)?;
    }
    let summary = verified.map_err(|found| fault(Kind::NotVerified, format!("{name}: {found}")))?;
    let held = (!args.receipts.is_empty()).then(|| held.finish(&summary));
    if let Some(held) = &held {
        lacks_none(&name, held)?;
    }
    if out.json {
        let mut json = summary_json(&summary);
        if let Some(held) = &held {
            json["receipts_found"] = json!(held.found);
            json["receipts_later"] = json!(held.later);
        }
        out.json(&json);
        return Ok(());
    }
    print_summary(out, &summary);
    if let Some(held) = &held {
        out.line(format!(
            "has all {} that were given, over {} credits",
            plural(held.found, "receipt"),
            credits(held.credits.0)
        ));
        for (n, what) in [
            (held.later, "later than this export"),
            (held.others, "of other schedulers"),
        ] {
            if n > 0 {
                out.note(format!("{} more: {what}", count(n)));
            }
        }
    }
    if given > 0 {
        let unused = given - summary.heads;
        let others = match unused {
            0 => String::new(),
            n => format!("; {n} are of other ledgers"),
        };
        out.line(format!(
            "fits {} of {given} published heads{others}",
            summary.heads
        ));
    }
    if let Some(other) = &args.against {
        out.line(format!("agrees with {} as far as both go", other.display()));
    }
    if !pinned {
        out.warn("no key was given, so any scheduler's ledger is accepted: compare the key above with the one you know");
    }
    Ok(())
}

pub(super) fn options(keys: &[SchedulerId]) -> VerifyOptions {
    VerifyOptions {
        keys: (!keys.is_empty()).then(|| keys.iter().copied().collect()),
        ..VerifyOptions::default()
    }
}

/// What to call a file in messages.
pub(super) fn name_of(path: &Path) -> String {
    match path.as_os_str() == "-" {
        true => "standard input".into(),
        false => path.display().to_string(),
    }
}

pub(super) fn open(path: &Path) -> Result<BufReader<Box<dyn io::Read>>> {
    let name = path.display().to_string();
    let file: Box<dyn io::Read> = if path.as_os_str() == "-" {
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
    Ok(BufReader::with_capacity(1 << 20, file))
}

fn heads_of(path: &Path) -> Result<Vec<Head>> {
    let name = path.display().to_string();
    let mut text = String::new();
    let read = open(path)?.take(HEADS_BYTES_MAX).read_to_string(&mut text);
    read.with_context(|| name.clone())?;
    read_heads(&text)
        .map_err(|(number, error)| fault(Kind::NotVerified, format!("{name}: head {number}: {error}")))
}

/// The signed heads that a fault is about, as they can be passed on: an error has one line.
fn show_heads(out: &Out, found: &Fault) {
    if out.json {
        return;
    }
    match &*found.kind {
        FaultKind::Tail { published, .. } => out.raw(published.to_string().as_bytes()),
        FaultKind::Fork {
            published, computed, ..
        } => {
            out.line("published:");
            out.raw(published.to_string().as_bytes());
            out.line("and from this file:");
            out.line(head::origin(published.scheduler));
            out.line(published.size.to_string());
            out.line(computed.to_string());
        }
        _ => {}
    }
}

/// Fails when receipts were signed for that are not in the ledger.
fn lacks_none(name: &str, held: &HeldSummary) -> Result<()> {
    let Some(first) = held.missing.first() else {
        return Ok(());
    };
    let lost = held
        .missing
        .iter()
        .fold(0, |sum: u64, r| sum.saturating_add(r.credits.0));
    Err(fault(
        Kind::NotVerified,
        format!(
            "{name} lacks {} over {} credits that its scheduler signed: the first is {} of {} over {} credits for {}",
            plural(held.missing.len() as u64, "receipt"),
            credits(lost),
            first.id,
            moment(first.issued_at.0),
            credits(first.credits.0),
            first.institution
        ),
    ))
}

/// Fails when the two copies part, or when this one lacks entries.
fn against(
    out: &Out,
    ours: &Path,
    theirs: &Path,
    keys: &[SchedulerId],
    verified: &Result<Summary, Fault>,
) -> Result<()> {
    let bad = |text: String| Err(fault(Kind::NotVerified, text));
    let (name, other) = (ours.display(), theirs.display());
    let cut = matches!(verified, Err(f) if matches!(*f.kind, FaultKind::Truncated | FaultKind::Tail { .. }));
    if verified.is_err() && !cut {
        // What is wrong with this copy itself is said first.
        return Ok(());
    }
    if ours.as_os_str() == "-" || theirs.as_os_str() == "-" {
        return bad("--against reads both copies twice: give files, not standard input".into());
    }
    let copy = match verify(&mut open(theirs)?, &options(keys)) {
        Ok(copy) => copy,
        Err(found) => return bad(format!("the other copy is itself not in order: {other}: {found}")),
    };
    if let Ok(summary) = verified
        && summary.scheduler != copy.scheduler
    {
        return bad(format!(
            "{name} is the ledger of {}, {other} the one of {}: they have nothing in common",
            summary.scheduler, copy.scheduler
        ));
    }
    match compare(&mut open(ours)?, &mut open(theirs)?) {
        Err(error) => bad(format!("{name} beside {other}: {error}")),
        Ok(Relation::Same | Relation::Longer { .. }) => Ok(()),
        Ok(Relation::Shorter { entry, hash, missing }) => bad(format!(
            "{name} lacks its tail: {} from entry {entry} (hash {hash}) to entry {} stand in {other}",
            plural(missing, "entry"),
            entry + missing - 1
        )),
        Ok(Relation::Fork {
            entry,
            ours,
            theirs,
            common,
            our_head,
            their_head,
        }) => {
            let mut heads = String::new();
            for (of, head) in [(&name, our_head), (&other, their_head)] {
                match head {
                    Some(head) if out.json => heads += &format!("; {of} ends with {head}"),
                    Some(head) => {
                        out.line(format!("signed at the end of {of}:"));
                        out.raw(head.to_string().as_bytes());
                    }
                    None => {}
                }
            }
            bad(format!(
                "a fork at entry {entry}: {name} has hash {ours}, {other} has {theirs}; before it both have the root {common}{heads}"
            ))
        }
    }
}

fn check_proof(context: &Context, name: &str, reader: &mut dyn io::Read, keys: &[SchedulerId]) -> Result<()> {
    let bad = |why: String| fault(Kind::NotVerified, format!("{name}: {why}"));
    let mut text = String::new();
    reader
        .take(HEADS_BYTES_MAX)
        .read_to_string(&mut text)
        .with_context(|| name.to_owned())?;
    let proof = Proof::parse(&text).map_err(|e| bad(e.to_string()))?;
    let entry = proof.verify().map_err(|e| bad(e.to_string()))?;
    let scheduler = proof.head.scheduler;
    if !keys.is_empty() && !keys.contains(&scheduler) {
        return Err(bad(format!(
            "it is of the ledger of scheduler {scheduler}, which is not among the given keys"
        )));
    }
    if entry.dropped.is_none() {
        karez_ledger::examine(entry.posting.clone(), scheduler).map_err(|e| bad(e.to_string()))?;
    }
    let records: Vec<(String, String)> = entry
        .posting
        .evidence
        .iter()
        .filter_map(|bytes| karez_core::records::describe(bytes))
        .map(|(kind, id, _)| (kind, id.to_string()))
        .collect();
    let witnesses = proof.head.witnesses();
    let out = context.out;
    if out.json {
        let record = |(kind, id): &(String, String)| json!({"type": kind, "id": id});
        out.json(&json!({
            "verified": true, "scheduler": scheduler.to_string(), "entry": proof.index, "entries": proof.head.size,
            "root": proof.head.root.to_string(), "kind": entry.posting.kind.as_str(), "at_ms": entry.at.0,
            "dropped": entry.dropped.map(|digest| digest.to_string()), "legs": entry.posting.legs, "records": records.iter().map(record).collect::<Vec<_>>(),
            "witnesses": witnesses.iter().map(|(key, _)| key.to_string()).collect::<Vec<_>>(),
        }));
        return Ok(());
    }
    out.line(format!(
        "verified: entry {} ({}, {}) is in the ledger of",
        proof.index,
        entry.posting.kind.as_str(),
        moment(entry.at.0)
    ));
    out.line(format!("scheduler {scheduler}"));
    out.line(format!("under its head of {} entries", proof.head.size));
    out.line(format!("tree root {}", proof.head.root));
    for (account, amount) in &entry.posting.legs {
        let account = short_account(&account.to_string());
        out.line(format!("  {} {account}", crate::out::signed_credits(*amount)));
    }
    for (kind, id) in &records {
        let kind = kind.strip_prefix("karez.").unwrap_or(kind);
        out.line(format!("  {} {id}", kind.strip_suffix(".v1").unwrap_or(kind)));
    }
    if let Some(digest) = entry.dropped {
        out.line("  its records were dropped; their digest is");
        out.line(format!("  {digest}"));
    }
    match witnesses.len() {
        0 => out.note(format!(
            "no witness has cosigned the head; its log is {}",
            head::origin(scheduler)
        )),
        n => out.line(format!("cosigned by {}", plural(n as u64, "witness"))),
    }
    Ok(())
}

/// Checks an export; the first fault is an error with exit code 9.
pub(crate) fn verify_file(path: &Path, keys: Vec<SchedulerId>) -> Result<Summary> {
    let name = name_of(path);
    check(&mut open(path)?, keys).map_err(|found| fault(Kind::NotVerified, format!("{name}: {found}")))
}

/// The same from a reader, with the fault as it is.
pub(crate) fn check(from: &mut dyn io::BufRead, keys: Vec<SchedulerId>) -> Result<Summary, Fault> {
    verify(from, &options(&keys))
}

/// The summary as text.
pub(crate) fn print_summary(out: &Out, s: &Summary) {
    out.line(format!(
        "verified: {} with {} signed records, chain, balances and signatures hold",
        plural(s.entries, "entry"),
        count(s.records)
    ));
    if s.dropped > 0 {
        out.line(format!(
            "{} had their records dropped: their signatures cannot be checked any more",
            plural(s.dropped, "entry")
        ));
    }
    out.line(format!("scheduler {}", s.scheduler));
    out.line(format!("head {} of {}", s.head.short(), moment(s.created.0)));
    out.line(format!("tree root {}", s.tree_head.root));
    if s.disputes_open > 0 {
        out.line(format!("{} open", plural(s.disputes_open as u64, "dispute")));
    }
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
        "entries": s.entries, "records": s.records, "dropped": s.dropped, "head": view::hex(&s.head.0), "balances": view::hex(&s.balances.0),
        "tree_head": s.tree_head.to_string(), "heads_that_fit": s.heads, "disputes_open": s.disputes_open,
        "granted_microcredits": s.granted.0, "reserved_microcredits": s.reserved.0,
        "settled_microcredits": s.settled.0, "released_microcredits": s.released.0,
        "institutions": institutions,
    })
}
