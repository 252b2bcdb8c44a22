//! `karez jobs` and `karez job`: watching work, explaining it, stopping it, fetching its results.
use crate::{
    cli::Context,
    fault::{Kind, fault},
    follow,
    link::{self, call},
    out::{Column, Table, clean, credits, minute, moment, plural, wrap},
    report,
    sink::Sink,
    task::{self, interruptible},
    view,
};
use anyhow::Result;
use clap::{Args, Subcommand};
use karez_core::id::{Digest, JobId};
use karez_proto::control as wire;
use serde_json::{Value, json};
use std::path::PathBuf;

/// `karez jobs`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  karez jobs\n  karez jobs --all --json")]
pub(crate) struct ListArgs {
    /// Finished jobs too
    #[arg(short, long)]
    all: bool,
    /// How many at most, newest first
    #[arg(short = 'n', long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=1000))]
    limit: u32,
}

/// `karez job`.
#[derive(Debug, Args)]
#[command(
    arg_required_else_help = true,
    after_help = "Example:\n  karez job show 3f2a1b\n\nA job is named by its id or by the beginning of it."
)]
pub(crate) struct JobArgs {
    #[command(subcommand)]
    command: JobCommand,
}

#[derive(Debug, Subcommand)]
enum JobCommand {
    /// Where a job stands, part by part
    #[command(after_help = "Example:\n  karez job show 3f2a1b")]
    Show(One),
    /// Follow a job to its end
    #[command(after_help = "Example:\n  karez job watch 3f2a1b")]
    Watch(One),
    /// What happened to a job, line by line
    #[command(after_help = "Example:\n  karez job logs 3f2a1b")]
    Logs(One),
    /// Why each part runs where it runs, or what it waits for
    #[command(after_help = "Example:\n  karez job explain 3f2a1b")]
    Explain(One),
    /// Stop a job; what was not used is returned
    #[command(after_help = "Example:\n  karez job cancel 3f2a1b")]
    Cancel(One),
    /// Write the results of a finished job
    #[command(after_help = "Example:\n  karez job fetch 3f2a1b -o results.jsonl")]
    Fetch(FetchArgs),
}

#[derive(Debug, Args)]
struct One {
    /// The job's id, or the beginning of it
    #[arg(value_parser = prefix)]
    job: String,
}

/// The beginning of a job's id.
fn prefix(text: &str) -> Result<String, String> {
    let hex = text.bytes().all(|b| b.is_ascii_hexdigit());
    if hex && (4..=64).contains(&text.len()) {
        Ok(text.to_ascii_lowercase())
    } else {
        Err("a job is named by 4 to 64 hex digits, `karez jobs --all` lists them".into())
    }
}

#[derive(Debug, Args)]
struct FetchArgs {
    /// The job's id, or the beginning of it
    #[arg(value_parser = prefix)]
    job: String,
    /// Where to write, - for standard output [default: standard output when piped, else karez-JOB.jsonl]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

pub(crate) async fn list(context: &Context, args: ListArgs) -> Result<()> {
    let mut link = link::open(&context.home).await?;
    let request = wire::JobsRequest {
        all: args.all,
        limit: args.limit,
        everyone: false,
    };
    let jobs = call(link.client.jobs(request)).await?.jobs;
    let out = context.out;
    if out.json {
        out.json(&Value::Array(jobs.iter().map(view::job).collect()));
        return Ok(());
    }
    if jobs.is_empty() {
        out.note(if args.all {
            "no jobs yet"
        } else {
            "no job is open; `karez jobs --all` lists finished ones"
        });
        return Ok(());
    }
    let labelled = jobs.iter().any(|job| !job.label.is_empty());
    let mut table = Table::new(&[
        ("JOB", Column::Left),
        ("STATE", Column::Left),
        ("WORK", Column::Cut),
        ("DONE", Column::Right),
        ("SPENT", Column::Right),
        ("SUBMITTED (UTC)", Column::Left),
        (if labelled { "LABEL" } else { "" }, Column::Cut),
    ]);
    for job in &jobs {
        table.row(vec![
            view::short(&job.job),
            job.state.clone(),
            [job.work.as_str(), &job.model].join(" "),
            format!("{}/{}", job.items_done, job.items),
            credits(job.credits_spent),
            minute(job.submitted_at),
            job.label.clone(),
        ]);
    }
    out.table(&table);
    Ok(())
}

pub(crate) async fn run(context: &Context, args: JobArgs) -> Result<()> {
    match args.command {
        JobCommand::Show(one) => show(context, &one.job).await,
        JobCommand::Watch(one) => watch(context, &one.job).await,
        JobCommand::Logs(one) => logs(context, &one.job).await,
        JobCommand::Explain(one) => explain(context, &one.job).await,
        JobCommand::Cancel(one) => cancel(context, &one.job).await,
        JobCommand::Fetch(args) => fetch(context, args).await,
    }
}

async fn show(context: &Context, job: &str) -> Result<()> {
    let job = link::open(&context.home).await?.job(job).await?;
    let out = context.out;
    if out.json {
        out.json(&view::job(&job));
        return Ok(());
    }
    for line in report::lines(&job, None, out.terminal.then(|| out.width())) {
        out.line(line);
    }
    let waiting = job.parts.iter().filter(|p| !follow::has_ended(&p.state));
    for part in waiting {
        let cause = if part.cause.is_empty() {
            String::new()
        } else {
            format!(": {}", clean(&part.cause))
        };
        for line in wrap(
            &format!("part {} {}{cause}", part.part, part.state),
            out.width(),
            "  ",
        ) {
            out.line(line);
        }
    }
    if !job.cause.is_empty() {
        for line in wrap(
            &format!("{}: {}", job.state, clean(&job.cause)),
            out.width(),
            "  ",
        ) {
            out.line(line);
        }
    }
    Ok(())
}

async fn watch(context: &Context, job: &str) -> Result<()> {
    let out = context.out;
    let link = link::open(&context.home).await?;
    let known = link.job(job).await?;
    task::set_current(Digest::try_from(known.job.as_slice()).ok().map(JobId));
    interruptible(async {
        let view = follow::each_change(out, &link, &view::hex(&known.job), |view| {
            if out.json {
                out.json(&view::job(view));
            }
        })
        .await?;
        if !out.json {
            for line in report::lines(&view, None, out.terminal.then(|| out.width())) {
                out.line(line);
            }
        }
        task::ended_well(&view)
    })
    .await
}

async fn logs(context: &Context, job: &str) -> Result<()> {
    let mut link = link::open(&context.home).await?;
    let request = wire::JobRequest { job: job.to_owned() };
    let entries = call(link.client.logs(request)).await?.entries;
    for entry in entries {
        if context.out.json {
            context
                .out
                .json(&json!({"at_ms": entry.at, "part": entry.part, "text": entry.text}));
        } else {
            let who = entry.part.map_or("job".to_owned(), |p| format!("part {p}"));
            context
                .out
                .line(format!("{}  {who:8}  {}", moment(entry.at), clean(&entry.text)));
        }
    }
    Ok(())
}

async fn explain(context: &Context, job: &str) -> Result<()> {
    let mut link = link::open(&context.home).await?;
    let request = wire::ExplainRequest {
        job: job.to_owned(),
        order: Vec::new(),
    };
    let reply = call(link.client.explain(request)).await?;
    if context.out.json {
        context.out.json(&view::explanation(&reply));
    } else {
        print_explanation(context, &reply);
    }
    Ok(())
}

/// The explanation as text.
pub(crate) fn print_explanation(context: &Context, reply: &wire::ExplainReply) {
    let out = context.out;
    for line in wrap(&clean(&reply.summary), out.width(), "  ") {
        out.line(line);
    }
    for part in reply
        .job
        .iter()
        .flat_map(|j| &j.parts)
        .filter(|p| !p.why.is_empty() || !p.cause.is_empty())
    {
        let place = if part.node_name.is_empty() {
            String::new()
        } else {
            format!(" on {} in {}", part.node_name, part.country)
        };
        // While it waits, what it waits for; once it has a place, why that one, whatever has happened there since.
        let waits = part.state == "queued" && !part.cause.is_empty();
        let why = if waits || part.why.is_empty() {
            &part.cause
        } else {
            &part.why
        };
        for line in wrap(
            &format!("part {} {}{place}: {}", part.part, part.state, clean(why)),
            out.width(),
            "  ",
        ) {
            out.line(line);
        }
    }
    out.line(format!(
        "{} of {} could run it now",
        reply.nodes_feasible,
        plural(reply.nodes_known.into(), "known node")
    ));
    if let (Some(low), Some(high)) = (reply.cost_low, reply.cost_high) {
        out.line(format!(
            "the whole job would cost {} to {} credits",
            credits(low),
            credits(high)
        ));
    }
    if reply.starts == "later" {
        let seconds = reply.starts_in_ms.div_ceil(1_000);
        out.line(format!("it would start in about {}", plural(seconds, "second")));
    }
    if !reply.candidates.is_empty() {
        let mut table = Table::new(&[
            ("NODE", Column::Cut),
            ("INSTITUTION", Column::Cut),
            ("IN", Column::Left),
            ("COST", Column::Right),
            ("NOTE", Column::Cut),
        ]);
        for c in &reply.candidates {
            table.row(vec![
                c.node_name.clone(),
                c.institution.clone(),
                c.country.clone(),
                credits(c.cost_estimate),
                c.note.clone(),
            ]);
        }
        out.table(&table);
    }
    if !reply.exclusions.is_empty() {
        let mut table = Table::new(&[
            ("EXCLUDED BY", Column::Left),
            ("NODES", Column::Right),
            ("NEAREST CHANGE", Column::Cut),
        ]);
        for x in &reply.exclusions {
            table.row(vec![
                x.requirement.clone(),
                x.nodes.to_string(),
                x.nearest.clone(),
            ]);
        }
        out.table(&table);
    }
}

async fn cancel(context: &Context, job: &str) -> Result<()> {
    let mut link = link::open(&context.home).await?;
    let before = link.job(job).await?.state;
    let request = wire::JobRequest { job: job.to_owned() };
    let job = call(link.client.cancel(request)).await?;
    if context.out.json {
        context.out.json(&view::job(&job));
    } else if follow::has_ended(&before) {
        let short = view::short(&job.job);
        context.out.line(format!(
            "job {short} was {before} already: there is nothing to stop"
        ));
    } else {
        let back = job.credits_reserved.saturating_sub(job.credits_spent);
        context.out.line(format!(
            "job {} is {}: {} credits paid, {} returned once its parts have stopped",
            view::short(&job.job),
            job.state,
            credits(job.credits_spent),
            credits(back)
        ));
    }
    Ok(())
}

async fn fetch(context: &Context, args: FetchArgs) -> Result<()> {
    let out = context.out;
    Sink::check(out, args.output.as_deref())?;
    let link = link::open(&context.home).await?;
    let job = link.job(&args.job).await?;
    task::ended_well(&job)?;
    let id = Digest::try_from(job.job.as_slice())
        .map_err(|e| fault(Kind::Other, format!("the scheduler's answer: {e}")))?;
    let sink = Sink::choose(out, args.output.as_deref(), &JobId(id));
    let mut opened = sink.open(out)?;
    let written = task::fetch(out, &context.home, &link, &job, opened.writer()).await?;
    opened.done()?;
    match sink.path() {
        Some(path) if out.json => {
            out.json(&json!({"job": view::hex(&job.job), "results": path, "lines": written}))
        }
        Some(path) => out.line(format!("{} in {}", plural(written, "line"), path.display())),
        None => {}
    }
    Ok(())
}
