//! Batch files in OpenAI's format, submitted from the command line: lines in, lines out, in their order.
use crate::{
    cli::Context,
    fault::{Kind, fault},
    input::Items,
    link,
    options::JobOptions,
    out::plural,
    report,
    sink::{Lines, Sink},
    task::{self, Sampling, Task, What, interruptible},
    view,
};
use anyhow::{Context as _, Result};
use karez_scheduler::BatchFile;
use serde_json::{Map, Value, json};
use std::{io, path::Path};

/// Whether the path is a batch file's.
pub(crate) fn is_one(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "jsonl")
}

/// Submits the batch and, unless detached, writes what comes of it as OpenAI's API would.
pub(crate) async fn submit(context: &Context, path: &Path, options: JobOptions) -> Result<()> {
    let out = context.out;
    if !options.detach {
        Sink::check(out, options.output.as_deref())?;
    }
    let name = path.display();
    if !path.is_file() {
        return Err(fault(Kind::NotFound, format!("there is no file {name}")));
    }
    let (file, batch) = BatchFile::read(path, context.home.dir())
        .map_err(|why| fault(Kind::Refused, format!("{name}: {why}")))?;
    let what = if batch.embeds() {
        What::Embed {
            model: batch.model.clone(),
        }
    } else {
        What::Generate {
            model: batch.model.clone(),
            sampling: Sampling {
                max_tokens: batch.tokens_max,
                temperature_milli: 0,
                top_k: 0,
                top_p_milli: 1000,
                seed: 0,
                raw: batch.is_raw(),
                system: String::new(),
                stream: false,
                keep_going: true,
            },
        }
    };
    let task = Task {
        what,
        items: Items::of_file(file, batch.lines),
        options,
    };
    let link = link::open(&context.home).await?;
    interruptible(async {
        let mut running = task::submit(out, &context.home, link, &task).await?;
        task::set_current(Some(running.job));
        if task.options.detach {
            if out.json {
                out.json(&view::job(&running.view));
            } else {
                out.line(running.job.to_string());
            }
            running.close().await;
            return Ok(());
        }
        running.finish(out).await?;
        let id = format!("batch_{}", running.job.short());
        let sink = Sink::choose(out, task.options.output.as_deref(), &running.job);
        let mut opened = sink.open(out)?;
        let mut lines = Lines::new(|line: &[u8]| {
            let result: Map<String, Value> = serde_json::from_slice(line).map_err(io::Error::other)?;
            writeln!(opened.writer(), "{}", batch.answer(&id, &result))
        });
        let written = running.results(out, &mut lines).await;
        let written = written.context("the job is done and its results are kept")?;
        opened.done()?;
        match (out.json, sink.path()) {
            (false, path) => report::print(out, &running.view, path.map(|p| (p, written))),
            (true, Some(path)) => out.json(&json!({
                "report": view::job(&running.view), "results": path.display().to_string(), "lines": written,
            })),
            (true, None) => {}
        }
        out.note(format!(
            "{} answered, each once and in order",
            plural(written, "line")
        ));
        running.close().await;
        Ok(())
    })
    .await
}
