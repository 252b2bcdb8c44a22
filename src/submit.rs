//! `karez submit`, `karez estimate` and `karez schema`: jobs described in files.
use crate::{
    batch,
    cli::Context,
    embed::{ready, submit_and_wait},
    input, jobfile, jobs, link,
    options::{JobOptions, MAX_COST},
    task, view,
};
use anyhow::Result;
use clap::{Args, ValueEnum};
use karez_core::unit::Credits;
use std::path::PathBuf;

/// `karez submit`.
#[derive(Debug, Args)]
#[command(after_help = "\
A job file is TOML; `karez schema job` prints its JSON Schema. The least of it:
  work  = \"embed\"
  model = \"all-MiniLM-L6-v2\"
  input = \"sentences.txt\"

Examples:
  karez submit job.toml
  karez submit job.toml --detach
  karez submit batch.jsonl -o answers.jsonl    # a batch in OpenAI's format")]
pub(crate) struct SubmitArgs {
    /// The job file, or a .jsonl file of requests in OpenAI's batch format
    file: PathBuf,
    /// Where to write the results; - for standard output
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Credits set aside for a batch and never exceeded; a job file says it itself
    #[arg(long, value_name = "CREDITS")]
    max_cost: Option<Credits>,
    /// Submit, print the job's id and return at once
    #[arg(long)]
    detach: bool,
}

/// `karez estimate`.
#[derive(Debug, Args)]
#[command(after_help = "\
Nothing is sent, set aside or run. The scheduler answers by the judgement with
which it places.

Examples:
  karez estimate job.toml
  karez estimate job.toml --json")]
pub(crate) struct EstimateArgs {
    /// The job file
    file: PathBuf,
}

/// `karez schema`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  karez schema job > karez-job.schema.json")]
pub(crate) struct SchemaArgs {
    /// Which file format
    what: SchemaOf,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum SchemaOf {
    /// The job file of `karez submit`
    Job,
}

pub(crate) async fn run(context: &Context, args: SubmitArgs) -> Result<()> {
    if batch::is_one(&args.file) {
        let options = JobOptions {
            detach: args.detach,
            output: args.output,
            max_cost: args.max_cost.unwrap_or(MAX_COST),
            ..JobOptions::default()
        };
        return batch::submit(context, &args.file, options).await;
    }
    let mut job = jobfile::read(&args.file)?;
    job.options.detach |= args.detach;
    if args.output.is_some() {
        job.options.output = args.output;
    }
    job.options.max_cost = args.max_cost.unwrap_or(job.options.max_cost);
    let task = ready(context, job.what, job.options, true, |field, dir| {
        input::read(&job.input, field, dir)
    })?;
    let link = link::open(&context.home).await?;
    submit_and_wait(context, link, task).await
}

pub(crate) async fn estimate(context: &Context, args: EstimateArgs) -> Result<()> {
    let mut job = jobfile::read(&args.file)?;
    // Results are not written.
    job.options.detach = true;
    let task = ready(context, job.what, job.options, false, |field, dir| {
        input::read(&job.input, field, dir)
    })?;
    let link = link::open(&context.home).await?;
    let reply = task::explain(&context.home, &link, &task).await?;
    if context.out.json {
        context.out.json(&view::explanation(&reply));
    } else {
        jobs::print_explanation(context, &reply);
    }
    Ok(())
}

pub(crate) fn schema(context: &Context, args: &SchemaArgs) -> Result<()> {
    let SchemaOf::Job = args.what;
    context
        .out
        .line(serde_json::to_string_pretty(&jobfile::schema())?);
    Ok(())
}
