//! `karez ledger statement`, `netting` and `usage`: computed here, from an export that was verified first.
use super::{check, export};
use crate::{
    cli::Context,
    fault::{Kind, fault},
    link,
    out::{Column, Table, moment, plural},
    sink::Sink,
};
use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum};
use karez_core::{
    fair::{FairShare, Shares},
    id::Institution,
    key::SchedulerId,
    money::Account,
    unit::{Credits, Millis, Rate},
};
use karez_ledger::{
    Entry, Summary,
    note::Note,
    report::{
        Form, FormWriter, Month, Pseudonyms, Standing, StandingBuilder, Statement, StatementBuilder, floors,
        work,
    },
    verify_each,
};
use serde_json::json;
use std::{
    fs::File,
    io::{self, BufWriter, Seek as _, Write as _},
    path::{Path, PathBuf},
};

/// From which copy of the ledger.
#[derive(Debug, Args)]
pub(super) struct Source {
    /// An export to compute from [default: the scheduler's ledger as it is now]
    #[arg(long, value_name = "LEDGER")]
    file: Option<PathBuf>,
    /// The scheduler whose ledger it must be [default: the one of this home, else any]
    #[arg(long, value_name = "KEY")]
    key: Vec<SchedulerId>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Shape {
    /// Signed text
    Text,
    /// A line per counterpart
    Csv,
}

#[derive(Debug, Args)]
pub(super) struct StatementArgs {
    /// Whose statement
    #[arg(long, value_name = "NAME")]
    institution: Institution,
    /// Which month, in UTC
    #[arg(long, value_name = "YYYY-MM")]
    month: Month,
    /// Text is a signed note: keep it, or check another's with --check
    #[arg(long, value_enum, default_value_t = Shape::Text)]
    format: Shape,
    /// Compare with a signed statement, instead of printing one
    #[arg(long, value_name = "STATEMENT")]
    check: Option<PathBuf>,
    #[command(flatten)]
    source: Source,
}

#[derive(Debug, Args)]
pub(super) struct NettingArgs {
    /// Up to the end of this month [default: up to now]
    #[arg(long, value_name = "YYYY-MM")]
    month: Option<Month>,
    #[command(flatten)]
    source: Source,
}

#[derive(Debug, Args)]
pub(super) struct UsageArgs {
    /// The form: ogf, apel, focus, auditor, csv or ndjson
    #[arg(long)]
    form: Form,
    /// Only this month, in UTC
    #[arg(long, value_name = "YYYY-MM")]
    month: Option<Month>,
    /// Only what this institution lent or used
    #[arg(long, value_name = "NAME")]
    institution: Option<Institution>,
    /// Where to write; - for standard output
    #[arg(short, long, value_name = "FILE", default_value = "-")]
    output: PathBuf,
    #[command(flatten)]
    source: Source,
}

/// Verifies the ledger and hands over its entries.
async fn walk(
    context: &Context,
    source: &Source,
    each: &mut dyn FnMut(&Entry) -> io::Result<()>,
) -> Result<Summary> {
    let mut keys = source.key.clone();
    if keys.is_empty()
        && let Some(config) = context.home.config_if_any()?
    {
        keys.push(config.scheduler);
    }
    if let Some(path) = &source.file {
        let name = check::name_of(path);
        return verify_each(&mut check::open(path)?, &check::options(&keys), each)
            .map_err(|found| fault(Kind::NotVerified, format!("{name}: {found}")));
    }
    let link = link::open(&context.home).await?;
    // It is read once it is whole: a file without a name, gone when it is closed.
    let path = context
        .home
        .dir()
        .join(format!("ledger-{}.part", std::process::id()));
    let name = path.display().to_string();
    let mut file = File::options()
        .create_new(true)
        .read(true)
        .write(true)
        .open(&path)
        .with_context(|| name.clone())?;
    std::fs::remove_file(&path).with_context(|| name.clone())?;
    let mut out = BufWriter::new(&mut file);
    export(&link, &mut out).await?;
    out.flush().with_context(|| name.clone())?;
    drop(out);
    file.rewind().with_context(|| name.clone())?;
    verify_each(
        &mut io::BufReader::with_capacity(1 << 20, file),
        &check::options(&keys),
        each,
    )
    .map_err(|found| fault(Kind::NotVerified, format!("the scheduler's ledger: {found}")))
}

pub(super) async fn statement(context: &Context, args: &StatementArgs) -> Result<()> {
    let mut builder = StatementBuilder::new(args.institution.clone(), args.month);
    let summary = walk(context, &args.source, &mut |entry| {
        builder.take(entry);
        Ok(())
    })
    .await?;
    let (statement, _) = builder.finish(&summary.tree_head);
    if let Some(path) = &args.check {
        return compare(context, path, &statement);
    }
    let out = context.out;
    // Only a text is signed: rows are for spreadsheets, and for people without a key.
    if !out.json && matches!(args.format, Shape::Csv) {
        out.raw(statement.csv().as_bytes());
        return Ok(());
    }
    let Some(key) = context.home.key_if_any()? else {
        out.warn("there is no key here, so nobody signs this");
        if out.json {
            out.json(&json!({"institution": statement.institution.as_str(), "month": statement.month.to_string(), "csv": statement.csv()}));
        } else {
            out.raw(statement.text().as_bytes());
        }
        return Ok(());
    };
    let note = statement.sign(&key).to_string();
    if out.json {
        out.json(&json!({
            "institution": statement.institution.as_str(), "month": statement.month.to_string(), "note": note,
            "csv": statement.csv(), "net_microcredits": statement.net.to_string(),
            "account_microcredits": statement.closing, "owed_microcredits": statement.age.total(),
        }));
        return Ok(());
    }
    out.raw(note.as_bytes());
    Ok(())
}

/// Is another's signed statement what this ledger gives?
fn compare(context: &Context, path: &Path, ours: &Statement) -> Result<()> {
    let name = path.display().to_string();
    let bad = |why: String| fault(Kind::NotVerified, format!("{name}: {why}"));
    let text = std::fs::read_to_string(path).with_context(|| name.clone())?;
    let note = Note::parse(&text).map_err(|e| bad(e.to_string()))?;
    let signer = note
        .signatures
        .iter()
        .find_map(|line| line.name.strip_prefix("karez-statement/")?.parse().ok());
    let signer = signer.ok_or_else(|| bad("nobody signed it as a statement".into()))?;
    if ours.is_signed(&note, &signer).map_err(|e| bad(e.to_string()))? {
        context.out.line(format!("the same, signed by {signer}"));
        return Ok(());
    }
    let mine = ours.text();
    let differs = note
        .text()
        .lines()
        .zip(mine.lines())
        .find(|(theirs, ours)| theirs != ours);
    Err(bad(match differs {
        Some((theirs, ours)) => format!("it says {theirs:?}, this ledger gives {ours:?}"),
        None => "it has other lines than this ledger gives".into(),
    }))
}

pub(super) async fn netting(context: &Context, args: &NettingArgs) -> Result<()> {
    let end = match args.month {
        Some(month) => month,
        None => Month::of(super::file::now()),
    };
    let mut builder = StandingBuilder::new(end, "any-one".parse()?);
    let summary = walk(context, &args.source, &mut |entry| {
        builder.take(entry).map_err(io::Error::other)
    })
    .await?;
    print_netting(context, &builder.finish(&summary));
    Ok(())
}

fn print_netting(context: &Context, standing: &Standing) {
    let Standing {
        at,
        netting,
        accounts,
    } = standing;
    let out = context.out;
    let credits = |micro: i128| crate::out::signed_credits(i64::try_from(micro).unwrap_or(i64::MAX));
    let owed = |micro: u64| credits(i128::from(micro));
    if out.json {
        for (name, net) in netting.positions() {
            let age = netting.age(name, *at);
            out.json(&json!({
                "institution": name.as_str(), "net_microcredits": net.to_string(),
                "account_microcredits": accounts.balance(&Account::Institution(name.clone())),
                "limit_microcredits": accounts.limit(name).0,
                "owed_to_30_days": age.current, "owed_31_to_60_days": age.over_30,
                "owed_61_to_90_days": age.over_60, "owed_over_90_days": age.over_90,
            }));
        }
        for t in netting.transfers() {
            out.json(&json!({"from": t.from.as_str(), "to": t.to.as_str(), "microcredits": t.credits}));
        }
        return;
    }
    // The table has room for hundredths; --json has every digit.
    let credits = |micro: i128| {
        let hundredths = (micro.unsigned_abs() + 5_000) / 10_000;
        let sign = if micro < 0 && hundredths > 0 { "-" } else { "" };
        format!("{sign}{}.{:02}", hundredths / 100, hundredths % 100)
    };
    let near = |micro: u64| credits(i128::from(micro));
    out.line(format!(
        "net of lending and use among institutions, {}",
        moment(at.0)
    ));
    let mut table = Table::new(&[
        ("INSTITUTION", Column::Cut),
        ("NET", Column::Right),
        ("ACCOUNT", Column::Right),
        ("LIMIT", Column::Right),
        ("OWED <=30 D", Column::Right),
        ("31-60", Column::Right),
        ("61-90", Column::Right),
        (">90", Column::Right),
    ]);
    for (name, net) in netting.positions() {
        let age = netting.age(name, *at);
        table.row(vec![
            name.to_string(),
            credits(net),
            credits(accounts.balance(&Account::Institution(name.clone())).into()),
            near(accounts.limit(name).0),
            near(age.current),
            near(age.over_30),
            near(age.over_60),
            near(age.over_90),
        ]);
    }
    out.table(&table);
    for t in netting.transfers() {
        out.line(format!("{} pays {} {}", t.from, t.to, owed(t.credits)));
    }
}

/// `karez ledger shares`.
#[derive(Debug, Args)]
pub(super) struct SharesArgs {
    /// Another half-life than the ledger's floors say [default: theirs, else 7days]
    #[arg(long, value_name = "TIME", value_parser = crate::options::span)]
    half_life: Option<Millis>,
    /// Credits that an hour of a donated device counts as [default: the same, else 0.1]
    #[arg(long, value_name = "CREDITS")]
    donated: Option<Credits>,
    /// The part that is the same for all, in percent [default: the same, else 50]
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u32).range(0..=100))]
    floor: Option<u32>,
    /// Extra weight of an institution, in percent of an equal share
    #[arg(long = "grant", value_name = "NAME=PERCENT", value_parser = extra)]
    grants: Vec<(Institution, u32)>,
    #[command(flatten)]
    source: Source,
}

pub(super) fn extra(text: &str) -> Result<(Institution, u32), String> {
    let (name, percent) = text
        .split_once('=')
        .ok_or_else(|| format!("{text:?} is not NAME=PERCENT, like uni-nairobi=50"))?;
    let name = name
        .parse()
        .map_err(|e: karez_core::id::NameError| e.to_string())?;
    let percent = percent.parse().ok().filter(|p| *p <= 10_000);
    let percent = percent.ok_or_else(|| format!("{text:?}: the percent must be 0 to 10000"))?;
    Ok((name, percent))
}

pub(super) async fn shares(context: &Context, args: &SharesArgs) -> Result<()> {
    // The floors that count are those in force at the end; until then only what they need is kept of each settlement.
    let (mut works, mut promised) = (Vec::new(), None);
    let summary = walk(context, &args.source, &mut |entry| {
        works.extend(work(entry));
        promised = floors(&entry.posting).or(promised.take());
        Ok(())
    })
    .await?;
    let signed = promised.as_ref().map(|floors| floors.version);
    let mut shares = promised.map_or_else(Shares::default, |floors| floors.shares);
    shares.half_life = args.half_life.unwrap_or(shares.half_life);
    shares.donated = args.donated.map_or(shares.donated, |credits| Rate(credits.0));
    shares.floor_percent = args.floor.unwrap_or(shares.floor_percent);
    shares.grants_percent.extend(args.grants.iter().cloned());
    let mut fair = FairShare::new(shares);
    for work in &works {
        fair.note_work(work);
    }
    let at = summary.created;
    let out = context.out;
    let standings = fair.standings(at);
    if out.json {
        for s in standings {
            out.json(&json!({
                "institution": s.institution.as_str(), "used_microcredits": s.used.0,
                "given_microcredits": s.given.0, "target_ppm": s.target_ppm,
            }));
        }
        return Ok(());
    }
    let by = match signed {
        Some(version) => format!("by floors of version {version}"),
        None => "nobody has signed floors".into(),
    };
    out.line(format!(
        "used of others and given to others, {}; {by}",
        moment(at.0)
    ));
    let mut table = Table::new(&[
        ("INSTITUTION", Column::Cut),
        ("USED", Column::Right),
        ("GIVEN", Column::Right),
        ("TARGET", Column::Right),
    ]);
    for s in standings {
        let credits =
            |amount: Credits| crate::out::signed_credits(i64::try_from(amount.0).unwrap_or(i64::MAX));
        table.row(vec![
            s.institution.to_string(),
            credits(s.used),
            credits(s.given),
            format!("{}.{:02} %", s.target_ppm / 10_000, s.target_ppm / 100 % 100),
        ]);
    }
    out.table(&table);
    Ok(())
}

pub(super) async fn usage(context: &Context, args: &UsageArgs) -> Result<()> {
    // The secret of these names is the home's own: the same user has the same name in the next export of a month.
    let names = match context.home.key_if_any()? {
        Some(key) => Pseudonyms::new(key.as_bytes()),
        None => {
            let mut secret = [0; 32];
            getrandom::fill(&mut secret).map_err(|e| anyhow::anyhow!("no randomness: {e}"))?;
            context
                .out
                .warn("there is no key here, so users have names that are of this file alone");
            Pseudonyms::new(&secret)
        }
    };
    let stdout = args.output.as_os_str() == "-";
    let name = args.output.display().to_string();
    let out = context.out;
    // What a ledger that does not verify adds up to replaces nobody's file.
    let mut opened = Sink::at(&args.output).open(out)?;
    let to = opened.writer();
    let mut writer = FormWriter::begin(to, args.form, names, args.month, args.institution.clone())?;
    walk(context, &args.source, &mut |entry| writer.take(entry)).await?;
    let dropped = writer.dropped();
    let records = writer.finish().with_context(|| name.clone())?;
    opened.done()?;
    if dropped > 0 {
        out.warn(format!(
            "{} of the period had their records dropped and are not among them",
            plural(dropped, "settlement")
        ));
    }
    if !stdout && out.json {
        out.json(&json!({"path": args.output, "records": records, "form": args.form.to_string()}));
    } else if !stdout {
        out.line(format!("{name}: {records} records as {}", args.form));
    }
    Ok(())
}
