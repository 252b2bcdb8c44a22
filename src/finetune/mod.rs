//! `karez finetune`: a base model and some text in, an adapter out; and checking where an adapter comes from.
//!
//! Here a run is checked and sent; what comes back is `collect`'s.
mod collect;
mod config;

use crate::{
    cli::Context,
    fault::{Kind, fault},
    link::{self, Artifacts, Link, call},
    options::JobOptions,
    out::{clean, count, plural},
    task::{interruptible, nonce, utc_now},
    view,
};
use anyhow::{Context as _, Result};
use clap::Args;
use collect::{Which, collect, verify};
use karez_core::{
    artifact::ArtifactRef,
    id::JobId,
    records::{Constraints, Order, Signed, Train, Work},
    unit::{Bytes, Millis},
};
use karez_engine::train::{
    Settings, TrainError,
    base::{check_numbers, weight_files},
    trainer::{Outline, Spec, outline},
};
use karez_proto::control as wire;
use serde_json::{Map, Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// How long a signed order may be accepted.
const ORDER_LIFE: Millis = Millis(10 * 60 * 1000);
/// Parts that a run is cut into when nobody says how often to store it.
const PARTS: usize = 20;
/// Steps between two checkpoints then, at least and at most.
const STEPS: (usize, usize) = (5, 500);

/// `karez finetune`.
#[derive(Debug, Args)]
#[command(after_help = "\
Data is JSON lines: {\"messages\": [...]}, {\"prompt\": ..., \"completion\": ...},
{\"text\": ...}, or {\"instruction\": ..., \"input\": ..., \"output\": ...};
each may name its \"lang\". A configuration is YAML with Axolotl's names.

Examples:
  karez finetune --base ./qwen3-0.6b --data swahili.jsonl --lang sw
  karez finetune --config run.yaml --set learning_rate=1e-4 -o adapter
  karez finetune --job 3f9c12 --base ./qwen3-0.6b -o adapter
  karez finetune --verify adapter")]
pub(crate) struct FinetuneArgs {
    /// The base model: a Hugging Face directory of the Llama, Qwen2 or Qwen3 family
    #[arg(long, value_name = "DIR")]
    base: Option<PathBuf>,
    /// What to learn, as JSON lines or Parquet
    #[arg(long, value_name = "FILE")]
    data: Option<PathBuf>,
    /// The language of lines that name none: sw, pt-BR
    #[arg(long, value_name = "TAG")]
    lang: Option<String>,
    /// Settings in YAML; may also name base_model, datasets and output_dir
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// One setting; stands above the file's
    #[arg(long = "set", value_name = "NAME=VALUE")]
    set: Vec<String>,
    /// Check base, data and settings, and stop there
    #[arg(long)]
    check: bool,
    /// Take up a job that was submitted before
    #[arg(long, value_name = "ID", conflicts_with_all = ["data", "config", "set", "check"])]
    job: Option<String>,
    /// With --job: make an adapter of its last checkpoint now, without waiting for the end
    #[arg(long, requires = "job")]
    last: bool,
    /// Check an adapter's files against its signed manifest
    #[arg(long, value_name = "DIR", conflicts_with_all = ["base", "data", "config", "set", "check", "job"])]
    verify: Option<PathBuf>,
    #[command(flatten)]
    options: JobOptions,
}

/// All that a run needs to be known before it is sent.
struct Plan {
    base: PathBuf,
    data: PathBuf,
    /// Where the data came as Parquet: the lines it was made into, gone with the plan.
    _lines: Option<tempfile::NamedTempFile>,
    settings: Settings,
    outline: Outline,
    output: Option<PathBuf>,
}

pub(crate) async fn run(context: &Context, args: FinetuneArgs) -> Result<()> {
    if let Some(folder) = &args.verify {
        return verify(context, folder);
    }
    if let Some(job) = &args.job {
        let base = args.base.as_deref().ok_or_else(|| missing("--base"))?;
        let link = link::open(&context.home).await?;
        let view = link.job(job).await?;
        let which = if args.last { Which::Last } else { Which::Final };
        return interruptible(collect(
            context,
            link,
            view,
            base,
            args.options.output.clone(),
            which,
        ))
        .await;
    }
    let plan = plan(&args)?;
    let out = context.out;
    for notice in &plan.outline.notices {
        out.warn(clean(notice));
    }
    let Outline {
        steps,
        examples,
        held_out,
        tokens,
        languages,
        parameters,
        memory,
        ..
    } = &plan.outline;
    let summary = format!(
        "{} to train on and {held_out} held out ({}), {} tokens; {} steps; {} numbers will train; {} MiB of memory \
         are needed",
        plural(*examples as u64, "example"),
        languages.join(", "),
        count(*tokens as u64),
        count(*steps as u64),
        count(*parameters as u64),
        count(memory.div_ceil(1 << 20)),
    );
    if args.check {
        if out.json {
            out.json(&json!({
                "steps": steps, "examples": examples, "held_out": held_out, "tokens": tokens, "languages": languages,
                "parameters": parameters, "memory_bytes": memory, "notices": plan.outline.notices, "settings": plan.settings,
            }));
        } else {
            out.line("base, data and settings fit together");
            out.line(summary);
        }
        return Ok(());
    }
    out.note(summary);
    let link = link::open(&context.home).await?;
    interruptible(async {
        let view = submit(context, &link, &plan, &args).await?;
        if args.options.detach {
            let short = view::short(&view.job);
            if out.json {
                out.json(&view::job(&view));
            } else {
                out.line(view::hex(&view.job));
                let base = plan.base.display();
                out.note(format!(
                    "next: `karez job watch {short}`, then `karez finetune --job {short} --base {base}`"
                ));
            }
            return Ok(());
        }
        collect(context, link, view, &plan.base, plan.output.clone(), Which::Final).await
    })
    .await
}

fn missing(what: &str) -> anyhow::Error {
    fault(
        Kind::Usage,
        format!("{what} is missing: `karez finetune --help` shows how it is used"),
    )
}

/// The trainer's complaint with the exit code that it deserves.
fn refused(error: TrainError) -> anyhow::Error {
    let kind = match error {
        TrainError::Setting { .. } => Kind::Usage,
        _ => Kind::Refused,
    };
    fault(kind, error.to_string())
}

/// Reads and checks everything: what is wrong is said before anybody else is asked for anything.
fn plan(args: &FinetuneArgs) -> Result<Plan> {
    let (mut config, passed): (Map<String, Value>, Vec<String>) = match &args.config {
        Some(path) => config::read(path)?,
        None => Default::default(),
    };
    let mut take = |name: &str| config.remove(name);
    let in_config = |why: String| match &args.config {
        Some(file) => fault(Kind::Usage, format!("{}: {why}", file.display())),
        None => fault(Kind::Usage, why),
    };
    let path = |value: Option<Value>, name: &str| match value {
        None => Ok(None),
        Some(Value::String(path)) => Ok(Some(PathBuf::from(path))),
        Some(_) => Err(in_config(format!("{name} is not a path"))),
    };
    let base = path(take("base_model"), "base_model")?;
    let output = path(take("output_dir"), "output_dir")?;
    let data = take("datasets")
        .map(config::one_dataset)
        .transpose()
        .map_err(|why| in_config(why.into()))?;
    let data = path(data, "datasets[0].path")?;
    let mut by_flag = Vec::new();
    for text in &args.set {
        let Some((name, value)) = text.split_once('=') else {
            return Err(fault(Kind::Usage, format!("--set {text:?} is not NAME=VALUE")));
        };
        // A number, a list or a truth value where it reads as one; else the text itself.
        let value = serde_json::from_str(value).unwrap_or_else(|_| Value::String(value.to_owned()));
        by_flag.push(name.trim());
        config.insert(name.trim().to_owned(), value);
    }
    let settings = Settings::from_json(Value::Object(config)).map_err(|error| match &error {
        TrainError::Setting { name, .. } if !by_flag.contains(&name.as_str()) => in_config(error.to_string()),
        _ => refused(error),
    })?;
    let base = args.base.clone().or(base).ok_or_else(|| missing("--base"))?;
    let given = args.data.clone().or(data).ok_or_else(|| missing("--data"))?;
    let lines = match crate::parquet::is_parquet(&given) {
        true => Some(crate::parquet::lines(&given)?),
        false => None,
    };
    let data = lines
        .as_ref()
        .map_or(given.clone(), |lines| lines.path().to_owned());
    let spec = Spec {
        base: &base,
        base_digest: "",
        data: &data,
        data_digest: "",
        settings: &settings,
        language: args.lang.as_deref(),
        threads: 1,
        memory: None,
    };
    let mut outline = outline(&spec).map_err(|error| match error {
        // Its rows have the numbers of the lines.
        TrainError::File { path, why } if path == data => refused(TrainError::File { path: given, why }),
        TrainError::Data { path, faults } if path == data => {
            refused(TrainError::Data { path: given, faults })
        }
        other => refused(other),
    })?;
    check_numbers(&base).map_err(refused)?;
    if let (Some(file), false) = (&args.config, passed.is_empty()) {
        let (file, names) = (file.display(), passed.join(", "));
        let notice = format!("{file}: passed over, for it changes nothing here: {names}");
        outline.notices.push(notice);
    }
    let output = args.options.output.clone().or(output);
    Ok(Plan {
        base,
        data,
        _lines: lines,
        settings,
        outline,
        output,
    })
}

/// Steps between two checkpoints, unless somebody says so.
pub(crate) fn steps_per_part(outline: &Outline, settings: &Settings) -> u32 {
    let every = match settings.save_steps {
        0 => outline.steps.div_ceil(PARTS).clamp(STEPS.0, STEPS.1),
        steps => steps,
    };
    u32::try_from(every).unwrap_or(u32::MAX)
}

/// Tokens of one step, about.
pub(crate) fn tokens_per_step(outline: &Outline, settings: &Settings) -> u32 {
    let tokens = outline.tokens * settings.num_epochs / outline.steps.max(1);
    u32::try_from(tokens).unwrap_or(u32::MAX)
}

/// Sends base and data, signs the order and submits it.
async fn submit(context: &Context, link: &Link, plan: &Plan, args: &FinetuneArgs) -> Result<wire::JobView> {
    let out = context.out;
    let artifacts = link.artifacts(&context.home).await?;
    let base = stage(context, &artifacts, &plan.base).await?;
    let (store, data) = (artifacts.store.clone(), plan.data.clone());
    let input = tokio::task::spawn_blocking(move || store.add_file(&data)).await??;
    artifacts.push(out, "the base model", base).await?;
    artifacts.push(out, "the data", input).await?;
    artifacts.close().await;
    let steps = plan.outline.steps;
    let every = match args.options.part_items {
        0 => steps_per_part(&plan.outline, &plan.settings),
        items => items,
    };
    let name = plan.base.canonicalize().unwrap_or_else(|_| plan.base.clone());
    let name = name
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let issued_at = utc_now();
    let constraints = args.options.constraints(issued_at, "");
    let order = Order {
        user: link.user(),
        institution: link.config.institution.clone(),
        scheduler: link.config.scheduler,
        work: Work::Train(Train {
            model: base,
            model_name: name.chars().filter(|c| !c.is_control()).take(60).collect(),
            settings: plan.settings.canonical(),
            language: args.lang.clone().unwrap_or_default(),
            tokens_per_step: tokens_per_step(&plan.outline, &plan.settings),
        }),
        input,
        items: steps as u64,
        items_per_part: every,
        constraints: Constraints {
            memory: constraints.memory.max(Bytes(plan.outline.memory)),
            ..constraints
        },
        credits_max: args.options.max_cost,
        attempts_max: args.options.attempts,
        nonce: nonce()?,
        issued_at,
        expires_at: issued_at.after(ORDER_LIFE),
    };
    let signed = Signed::sign(order, &link.secret);
    // The scheduler will check every field: find out here first, in the same words.
    let order =
        Signed::<Order>::open(&signed.encode()).map_err(|error| fault(Kind::Refused, error.to_string()))?;
    let job = JobId(order.id());
    let request = wire::SubmitRequest {
        order: order.encode(),
        label: args.options.label.clone(),
        wait: args.options.wait,
    };
    let reply = call(link.client.clone().submit(request)).await?;
    if reply.job != job.0.0 {
        let why = format!("the scheduler named another job than the order {job} it was sent");
        return Err(fault(Kind::NotVerified, why));
    }
    out.note(format!(
        "job {} submitted: {} steps, a checkpoint every {every}",
        job.short(),
        count(steps as u64)
    ));
    Ok(reply.view.unwrap_or_default())
}

/// The files of a base model that training reads, and no others that lie beside them.
fn base_files(base: &Path) -> Result<Vec<PathBuf>> {
    let mut files: Vec<PathBuf> = weight_files(base).map_err(refused)?;
    let small = [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "model.safetensors.index.json",
    ];
    let there = small
        .iter()
        .map(|name| base.join(name))
        .filter(|path| path.exists());
    files.extend(there);
    Ok(files)
}

/// Brings a base model into the store.
async fn stage(context: &Context, artifacts: &Artifacts, base: &Path) -> Result<ArtifactRef> {
    let files = base_files(base)?;
    let folder = context.home.dir().join(format!("staged-{:016x}", nonce()?));
    let store = artifacts.store.clone();
    let staged = tokio::task::spawn_blocking(move || {
        let add = || -> Result<ArtifactRef> {
            fs::create_dir_all(&folder)?;
            for file in files {
                // Model caches keep their files behind links.
                let real = file.canonicalize().with_context(|| file.display().to_string())?;
                let to = folder.join(file.file_name().unwrap_or_default());
                if fs::hard_link(&real, &to).is_err() {
                    fs::copy(&real, &to).with_context(|| file.display().to_string())?;
                }
            }
            Ok(store.add_dir(&folder)?)
        };
        let added = add();
        let _ = fs::remove_dir_all(&folder);
        added
    });
    staged.await?
}
