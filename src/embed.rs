//! `karez embed`: texts in, vectors out.
use crate::{
    cli::Context,
    input::{self, Field, Items},
    link::{self, Link},
    options::JobOptions,
    out::plural,
    report,
    sink::Sink,
    task::{self, Task, What, interruptible},
    view,
};
use anyhow::{Context as _, Result};
use clap::Args;
use serde_json::json;
use std::path::{Path, PathBuf};

/// `karez embed`.
#[derive(Debug, Args)]
#[command(after_help = "\
Input is plain text, one item per line, or JSON lines with a \"text\" field.
Each result line holds its input line, the item's number and the vector.

Examples:
  karez embed sentences.txt -o vectors.jsonl
  karez embed - --donated --country KE,BR < sentences.jsonl > vectors.jsonl")]
pub(crate) struct EmbedArgs {
    /// The texts, or - for standard input
    file: PathBuf,
    /// The model, by its name in `karez models`
    #[arg(short, long, value_name = "NAME", default_value = "all-MiniLM-L6-v2")]
    model: String,
    #[command(flatten)]
    options: JobOptions,
}

pub(crate) async fn run(context: &Context, args: EmbedArgs) -> Result<()> {
    let what = What::Embed { model: args.model };
    let task = ready(context, what, args.options, true, |field, dir| {
        input::read(&args.file, field, dir)
    })?;
    let link = link::open(&context.home).await?;
    submit_and_wait(context, link, task).await
}

/// Everything that can be found out before the scheduler is asked: whether the results could be written, if they go
/// `to_file`, and whether every item is good.
pub(crate) fn ready(
    context: &Context,
    what: What,
    options: JobOptions,
    to_file: bool,
    read: impl FnOnce(Field, &Path) -> Result<Items>,
) -> Result<Task> {
    if to_file && !options.detach {
        Sink::check(context.out, options.output.as_deref())?;
    }
    let items = read(what.field(), context.home.dir())?;
    if items.blank > 0 {
        let blank = plural(items.blank, "blank line");
        context.out.warn(format!("{blank} passed over"));
    }
    Ok(Task { what, items, options })
}

/// Submits `task`; unless detached, waits, writes the results and prints the report.
pub(crate) async fn submit_and_wait(context: &Context, link: Link, task: Task) -> Result<()> {
    let out = context.out;
    interruptible(async {
        let mut running = task::submit(out, &context.home, link, &task).await?;
        task::set_current(Some(running.job));
        if task.options.detach {
            let short = running.job.short();
            if out.json {
                out.json(&view::job(&running.view));
            } else {
                out.line(running.job.to_string());
                out.note(format!(
                    "next: `karez job watch {short}`, then `karez job fetch {short}`"
                ));
            }
            running.close().await;
            return Ok(());
        }
        running.finish(out).await?;
        let sink = Sink::choose(out, task.options.output.as_deref(), &running.job);
        let written = async {
            let mut opened = sink.open(out)?;
            let written = running.results(out, opened.writer()).await?;
            opened.done()?;
            anyhow::Ok(written)
        };
        let written = written.await.with_context(|| {
            let short = running.job.short();
            format!(
                "the job is done and its results are kept, `karez job fetch {short} -o FILE` gets them again"
            )
        })?;
        if out.json {
            let path = sink.path().map(|p| p.display().to_string());
            if path.is_some() {
                out.json(&json!({"report": view::job(&running.view), "results": path, "lines": written}));
            }
        } else {
            report::print(out, &running.view, sink.path().map(|p| (p, written)));
        }
        running.close().await;
        Ok(())
    })
    .await
}
