//! Signed records for the books: answers of researchers, and what the operator decides.
use crate::{
    cli::Context,
    fault::{Kind, fault},
    link::{self, Link, call},
    out::{Column, Table, credits, moment, rate, span},
    view,
};
use anyhow::{Context as _, Result};
use clap::Args;
use karez_core::{
    fair::Shares,
    id::{Digest, Institution},
    key::{PublicKey, UserId},
    records::{
        Acceptance, Beneficiary, CreditLimit, Dispute, Floors, Grant, Lease, Payment, RateCard, Receipt,
        Record, Ruling, Signed, Verified, WorkKind,
    },
    unit::{Credits, Millis, Rate, UtcMillis},
};
use karez_ledger::Proof;
use karez_proto::control as wire;
use serde_json::json;
use std::{path::PathBuf, time::SystemTime};

/// What the operator's commands share.
#[derive(Debug, Clone, Args)]
pub(super) struct Operator {
    /// The scheduler's directory, whose key signs [default: the one of `karez up`, else your own key]
    #[arg(long, value_name = "DIR")]
    scheduler: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct AcceptArgs {
    /// The receipt's id, as `karez job show` prints it
    receipt: Digest,
}

#[derive(Debug, Args)]
pub(super) struct DisputeArgs {
    /// The receipt's id, as `karez job show` prints it
    receipt: Digest,
    /// Why, in a sentence; it is public, so name nobody
    #[arg(long, value_name = "TEXT")]
    because: String,
    /// A file that shows it; only its digest is sent
    #[arg(long, value_name = "FILE")]
    evidence: Vec<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct RuleArgs {
    /// The disputed receipt; the beginning that `karez ledger disputes` shows will do
    receipt: String,
    /// What the researcher gets back; the rest goes to the institution
    #[arg(long, value_name = "CREDITS")]
    refund: Credits,
    /// Why, in a sentence; it is public
    #[arg(long, value_name = "TEXT")]
    because: String,
    #[command(flatten)]
    operator: Operator,
}

#[derive(Debug, Args)]
pub(super) struct GrantArgs {
    /// A researcher's key, or an institution whose researchers all may use it
    #[arg(long, value_name = "WHOM")]
    to: String,
    /// How much
    #[arg(long, value_name = "N")]
    credits: Credits,
    /// How long, like 30days
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    valid: std::time::Duration,
    /// Who pays [default: the federation]
    #[arg(long, value_name = "INSTITUTION")]
    from: Option<Institution>,
    /// Only for this kind of work: embed, generate
    #[arg(long = "for", value_name = "WORK")]
    work: Vec<WorkKind>,
    /// For people; it is public
    #[arg(long, value_name = "TEXT", default_value = "")]
    purpose: String,
    #[command(flatten)]
    operator: Operator,
}

#[derive(Debug, Args)]
pub(super) struct RatesArgs {
    /// Set new rates: start of a device class and credits per device-hour
    #[arg(long, value_name = "DEVICE=CREDITS")]
    set: Vec<String>,
    #[command(flatten)]
    operator: Operator,
}

#[derive(Debug, Args)]
pub(super) struct FloorsArgs {
    /// The part of everything that is the same for all, in percent
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u32).range(0..=100))]
    floor: Option<u32>,
    /// After so long, use and contribution count half
    #[arg(long, value_name = "TIME", value_parser = crate::options::span)]
    half_life: Option<Millis>,
    /// Credits that an hour of a donated device counts as
    #[arg(long, value_name = "CREDITS")]
    donated: Option<Credits>,
    /// Extra weight of an institution, in percent of an equal share; 0 takes it away
    #[arg(long, value_name = "NAME=PERCENT", value_parser = super::report::extra)]
    extra: Vec<(Institution, u32)>,
    #[command(flatten)]
    operator: Operator,
}

#[derive(Debug, Args)]
pub(super) struct LimitArgs {
    /// Whose account
    institution: Institution,
    /// How far it may go under zero
    credits: Credits,
    #[command(flatten)]
    operator: Operator,
}

#[derive(Debug, Args)]
pub(super) struct PayArgs {
    /// Who paid
    from: Institution,
    /// Who was paid
    to: Institution,
    /// How much
    credits: Credits,
    /// Of the bank, or of the statement it settles
    #[arg(long, value_name = "TEXT")]
    reference: String,
    #[command(flatten)]
    operator: Operator,
}

pub(super) fn now() -> UtcMillis {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let ms = since.map_or(0, |d| d.as_millis());
    UtcMillis(u64::try_from(ms).unwrap_or(u64::MAX))
}

fn nonce() -> Result<u64> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(|e| anyhow::anyhow!("no randomness: {e}"))?;
    Ok(u64::from_be_bytes(bytes))
}

/// The user's line, or the operator's: with the scheduler's own key.
async fn operator(context: &Context, operator: &Operator) -> Result<Link> {
    let local = context.home.dir().join("up/scheduler");
    let dir = match &operator.scheduler {
        Some(dir) => dir.clone(),
        None if local.is_dir() => local,
        None => {
            let link = link::open(&context.home).await?;
            if link.user().0 == link.config.scheduler.0 {
                return Ok(link);
            }
            let why =
                "only the scheduler's operator may do this: say where its folder is with --scheduler DIR";
            return Err(fault(Kind::NotAdmitted, why));
        }
    };
    let name = dir.display().to_string();
    let secret = karez_scheduler::setup::load_key(&dir).with_context(|| name.clone())?;
    let config = karez_scheduler::Config::load(&dir).with_context(|| name)?;
    let key = PublicKey::of(&secret);
    let client = link::dial(&config.control.advertise, &secret, key).await?;
    Ok(Link {
        client,
        secret,
        config: crate::home::ClientConfig {
            scheduler: karez_core::key::SchedulerId(key),
            control_addr: config.control.advertise,
            institution: config.institution,
        },
    })
}

async fn file(context: &Context, link: &mut Link, records: Vec<Vec<u8>>, done: &str) -> Result<()> {
    let reply = call(link.client.file(wire::FileRequest { records })).await?;
    let record = view::hex(&reply.record);
    let out = context.out;
    if out.json {
        out.json(&json!({"record": record, "entry": reply.entry}));
    } else {
        out.line(format!("{done}: entry {}", reply.entry));
        out.line(format!("record {record}"));
        out.note(format!("next: `karez ledger prove {}`", reply.entry));
    }
    Ok(())
}

/// The lease and the receipt, out of the ledger's own proof.
async fn settled(link: &mut Link, receipt: Digest) -> Result<(Verified<Lease>, Verified<Receipt>)> {
    let id = receipt.to_string();
    let text = call(link.client.prove(wire::ProveRequest { id })).await?.proof;
    let bad = |why: String| fault(Kind::NotVerified, format!("the scheduler's proof: {why}"));
    let entry = Proof::parse(&text)
        .and_then(|proof| proof.verify())
        .map_err(|e| bad(e.to_string()))?;
    let evidence = entry.posting.evidence;
    let [_, lease, .., last] = evidence.as_slice() else {
        return Err(fault(Kind::NotFound, format!("{receipt} is no receipt")));
    };
    let lease = Signed::<Lease>::open(lease).map_err(|e| bad(e.to_string()))?;
    let last = Signed::<Receipt>::open(last).map_err(|e| bad(e.to_string()))?;
    if last.id() != receipt {
        return Err(bad(format!("it shows receipt {}", last.id())));
    }
    Ok((lease, last))
}

pub(super) async fn accept(context: &Context, args: &AcceptArgs) -> Result<()> {
    let mut link = link::open(&context.home).await?;
    let (lease, receipt) = settled(&mut link, args.receipt).await?;
    let acceptance = Acceptance {
        receipt: receipt.id(),
        user: link.user(),
        issued_at: now(),
    };
    let acceptance = Signed::sign(acceptance, &link.secret);
    let records = vec![lease.encode(), receipt.encode(), acceptance.encode()];
    file(context, &mut link, records, "accepted").await
}

pub(super) async fn dispute(context: &Context, args: &DisputeArgs) -> Result<()> {
    let mut link = link::open(&context.home).await?;
    let (lease, receipt) = settled(&mut link, args.receipt).await?;
    let digest = |path: &PathBuf| -> Result<Digest> {
        let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
        Ok(Digest::of(&bytes))
    };
    let dispute = Dispute {
        receipt: receipt.id(),
        user: link.user(),
        reason: args.because.clone(),
        evidence: args.evidence.iter().map(digest).collect::<Result<_>>()?,
        issued_at: now(),
    };
    let dispute = Signed::sign(dispute, &link.secret);
    let records = vec![lease.encode(), receipt.encode(), dispute.encode()];
    let done = format!("disputed, {} credits are frozen", credits(receipt.credits.0));
    file(context, &mut link, records, &done).await
}

pub(super) async fn rule(context: &Context, args: &RuleArgs) -> Result<()> {
    let mut link = operator(context, &args.operator).await?;
    let books = call(link.client.books(wire::BooksRequest {})).await?;
    let begins = |d: &&wire::DisputeView| {
        args.receipt.len() >= 8 && view::hex(&d.receipt).starts_with(&args.receipt.to_lowercase())
    };
    let mut open = books.disputes.iter().filter(begins);
    let (Some(open), None) = (open.next(), open.next()) else {
        let why = format!(
            "no dispute over just this receipt is open: {}; `karez ledger disputes` lists them, and 8 hex digits are enough",
            args.receipt.chars().take(64).collect::<String>()
        );
        return Err(fault(Kind::NotFound, why));
    };
    let ruling = Ruling {
        dispute: Digest::try_from(open.dispute.as_slice())?,
        receipt: Digest::try_from(open.receipt.as_slice())?,
        scheduler: link.config.scheduler,
        refund: args.refund,
        reason: args.because.clone(),
        issued_at: now(),
    };
    let records = vec![Signed::sign(ruling, &link.secret).encode()];
    file(context, &mut link, records, "ruled").await
}

pub(super) async fn disputes(context: &Context, args: &Operator) -> Result<()> {
    let mut link = match args.scheduler {
        Some(_) => operator(context, args).await?,
        None => link::open(&context.home).await?,
    };
    let books = call(link.client.books(wire::BooksRequest {})).await?;
    let out = context.out;
    if out.json {
        for d in &books.disputes {
            out.json(&json!({
                "receipt": view::hex(&d.receipt), "dispute": view::hex(&d.dispute), "user": view::hex(&d.user),
                "institution": d.institution, "microcredits": d.credits,
            }));
        }
        return Ok(());
    }
    let mut table = Table::new(&[
        ("RECEIPT", Column::Left),
        ("INSTITUTION", Column::Cut),
        ("FROZEN", Column::Right),
    ]);
    for d in &books.disputes {
        let receipt = view::hex(&d.receipt);
        table.row(vec![
            receipt.get(..16).unwrap_or(&receipt).to_owned(),
            d.institution.clone(),
            credits(d.credits),
        ]);
    }
    if books.disputes.is_empty() {
        out.note("no dispute is open");
    } else {
        out.table(&table);
    }
    Ok(())
}

pub(super) async fn grant(context: &Context, args: &GrantArgs) -> Result<()> {
    let mut link = operator(context, &args.operator).await?;
    let beneficiary = match args.to.parse::<UserId>() {
        Ok(user) => Beneficiary::User(user),
        Err(_) => Beneficiary::Institution(
            args.to
                .parse()
                .map_err(|e| fault(Kind::Usage, format!("--to: {e}")))?,
        ),
    };
    let issued_at = now();
    let valid = Millis(u64::try_from(args.valid.as_millis()).unwrap_or(u64::MAX));
    let grant = Grant {
        scheduler: link.config.scheduler,
        payer: args.from.clone(),
        beneficiary,
        work: args.work.clone(),
        credits: args.credits,
        purpose: args.purpose.clone(),
        nonce: nonce()?,
        issued_at,
        expires_at: issued_at.after(valid),
    };
    let records = vec![Signed::sign(grant, &link.secret).encode()];
    file(context, &mut link, records, "granted").await
}

pub(super) async fn grants(context: &Context) -> Result<()> {
    let mut link = link::open(&context.home).await?;
    let books = call(link.client.books(wire::BooksRequest {})).await?;
    let out = context.out;
    let mut table = Table::new(&[
        ("GRANT", Column::Left),
        ("FROM", Column::Cut),
        ("TO", Column::Cut),
        ("LEFT", Column::Right),
        ("OF", Column::Right),
        ("UNTIL (UTC)", Column::Left),
        ("PURPOSE", Column::Cut),
    ]);
    for view in books.grants {
        let Some(grant) = view.grant.and_then(|g| Grant::from_wire(g).ok()) else {
            continue;
        };
        let id = view::hex(&view.id);
        let from = grant.from().to_string();
        let to = match &grant.beneficiary {
            Beneficiary::User(user) => format!("user:{}", user.short()),
            Beneficiary::Institution(name) => name.to_string(),
        };
        if out.json {
            out.json(&json!({
                "grant": id, "from": from, "to": to, "left_microcredits": view.left,
                "microcredits": grant.credits.0, "expires_at_ms": grant.expires_at.0, "purpose": grant.purpose,
                "work": grant.work.iter().map(|w| w.as_str()).collect::<Vec<_>>(),
            }));
        }
        table.row(vec![
            id[..12].to_owned(),
            from,
            to,
            credits(view.left),
            credits(grant.credits.0),
            moment(grant.expires_at.0),
            grant.purpose,
        ]);
    }
    if !out.json {
        out.table(&table);
    }
    Ok(())
}

pub(super) async fn rates(context: &Context, args: &RatesArgs) -> Result<()> {
    let out = context.out;
    if args.set.is_empty() {
        let mut link = link::open(&context.home).await?;
        let books = call(link.client.books(wire::BooksRequest {})).await?;
        let Some(card) = books.rates.and_then(|card| RateCard::from_wire(card).ok()) else {
            out.note("no standard rates are set: `karez ledger rates --set cpu=0.05 --set cuda=1`");
            return Ok(());
        };
        if out.json {
            let one =
                |(device, rate): &(String, Rate)| json!({"device": device, "microcredits_per_hour": rate.0});
            out.json(&json!({
                "version": card.version, "effective_from_ms": card.effective_from.0,
                "rates": card.rates.iter().map(one).collect::<Vec<_>>(),
            }));
            return Ok(());
        }
        out.line(format!(
            "version {}, since {}",
            card.version,
            moment(card.effective_from.0)
        ));
        let mut table = Table::new(&[("DEVICE", Column::Left), ("CREDITS PER HOUR", Column::Right)]);
        for (device, value) in &card.rates {
            table.row(vec![device.clone(), rate(value.0)]);
        }
        out.table(&table);
        return Ok(());
    }
    let mut rates = Vec::new();
    for text in &args.set {
        let bad = || {
            fault(
                Kind::Usage,
                format!("--set {text:?}: expected a device class and credits, like cuda=1.5"),
            )
        };
        let (device, rate) = text.split_once('=').ok_or_else(bad)?;
        rates.push((
            device.to_owned(),
            Rate(rate.parse::<Credits>().map_err(|_| bad())?.0),
        ));
    }
    let mut link = operator(context, &args.operator).await?;
    let books = call(link.client.books(wire::BooksRequest {})).await?;
    let issued_at = now();
    let card = RateCard {
        scheduler: link.config.scheduler,
        version: books.rates.map_or(1, |card| card.version + 1),
        rates,
        effective_from: issued_at,
        issued_at,
    };
    let records = vec![Signed::sign(card, &link.secret).encode()];
    file(context, &mut link, records, "rates set").await
}

pub(super) async fn floors(context: &Context, args: &FloorsArgs) -> Result<()> {
    let asks =
        args.floor.is_some() || args.half_life.is_some() || args.donated.is_some() || !args.extra.is_empty();
    let mut link = match asks {
        true => operator(context, &args.operator).await?,
        false => link::open(&context.home).await?,
    };
    let reply = call(link.client.books(wire::BooksRequest {})).await?;
    let now_in_force = reply.floors.unwrap_or_default();
    let version = now_in_force.version;
    let issued_at = now_in_force.issued_at;
    // What nobody signed yet has version 0, which no record may have.
    let read = Floors::from_wire(wire_of(now_in_force));
    let shares = read
        .map_err(|e| fault(Kind::NotVerified, format!("the scheduler's answer: {e}")))?
        .shares;
    if !asks {
        show_floors(context, version, issued_at, &shares);
        return Ok(());
    }
    let mut grants_percent = shares.grants_percent;
    grants_percent.extend(args.extra.iter().cloned());
    grants_percent.retain(|_, percent| *percent > 0);
    let floors = Floors {
        scheduler: link.config.scheduler,
        version: version + 1,
        shares: Shares {
            half_life: args.half_life.unwrap_or(shares.half_life),
            donated: args.donated.map_or(shares.donated, |credits| Rate(credits.0)),
            floor_percent: args.floor.unwrap_or(shares.floor_percent),
            grants_percent,
        },
        issued_at: now(),
    };
    if floors.shares.half_life != shares.half_life {
        context
            .out
            .warn("another half-life counts from the scheduler's next start on");
    }
    let records = vec![Signed::sign(floors, &link.secret).encode()];
    file(context, &mut link, records, "floors set").await
}

fn wire_of(floors: karez_proto::records::Floors) -> karez_proto::records::Floors {
    karez_proto::records::Floors {
        version: floors.version.max(1),
        ..floors
    }
}

fn show_floors(context: &Context, version: u32, issued_at: u64, shares: &Shares) {
    let out = context.out;
    if out.json {
        let extra: serde_json::Map<String, serde_json::Value> = shares
            .grants_percent
            .iter()
            .map(|(name, percent)| (name.to_string(), json!(percent)))
            .collect();
        out.json(&json!({
            "version": version, "issued_at_ms": issued_at, "floor_percent": shares.floor_percent,
            "half_life_ms": shares.half_life.0, "donated_microcredits_per_hour": shares.donated.0,
            "extra_percent": extra,
        }));
        return;
    }
    out.line(match version {
        0 => "as the scheduler's settings say; nobody has signed it".to_owned(),
        n => format!("version {n}, signed {}", moment(issued_at)),
    });
    out.line(format!(
        "{} % of everything is the same for all, the rest goes by contribution",
        shares.floor_percent
    ));
    out.line(format!(
        "use and contribution count half after {}",
        span(shares.half_life.0)
    ));
    out.line(format!(
        "an hour of a donated device counts as {} credits",
        credits(shares.donated.0)
    ));
    for (name, percent) in &shares.grants_percent {
        out.line(format!("{name} has {percent} % of an equal share on top"));
    }
}

pub(super) async fn limit(context: &Context, args: &LimitArgs) -> Result<()> {
    let mut link = operator(context, &args.operator).await?;
    let limit = CreditLimit {
        scheduler: link.config.scheduler,
        institution: args.institution.clone(),
        credits: args.credits,
        issued_at: now(),
    };
    let records = vec![Signed::sign(limit, &link.secret).encode()];
    file(context, &mut link, records, "limit set").await
}

pub(super) async fn pay(context: &Context, args: &PayArgs) -> Result<()> {
    let mut link = operator(context, &args.operator).await?;
    let payment = Payment {
        scheduler: link.config.scheduler,
        payer: args.from.clone(),
        payee: args.to.clone(),
        credits: args.credits,
        reference: args.reference.clone(),
        nonce: nonce()?,
        issued_at: now(),
    };
    let records = vec![Signed::sign(payment, &link.secret).encode()];
    file(context, &mut link, records, "noted").await
}
