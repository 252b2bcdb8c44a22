//! `karez finetune`: a base model and some text in, an adapter out; and checking where an adapter comes from.
use crate::{
    cli::Context,
    fault::{Kind, fault},
    follow,
    home::write_atomic,
    link::{self, Artifacts, Link, call},
    options::JobOptions,
    out::{clean, count, plural},
    report,
    task::{self, interruptible, nonce, utc_now},
    view,
};
use anyhow::{Context as _, Result};
use clap::Args;
use karez_core::{
    artifact::ArtifactRef,
    id::{Digest, JobId},
    key::{PublicKey, sign},
    records::{Order, Signed, Train, Work},
    unit::Millis,
};
use karez_engine::train::{
    Settings, TrainError,
    base::{check_numbers, weight_files},
    results::Finished,
    trainer::{Outline, Spec, outline},
};
use karez_proto::control as wire;
use serde_json::{Map, Value, json};
use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

/// How long a signed order may be accepted.
const ORDER_LIFE: Millis = Millis(10 * 60 * 1000);
/// Parts that a run is cut into when nobody says how often to store it.
const PARTS: usize = 20;
/// Steps between two checkpoints then, at least and at most.
const STEPS: (usize, usize) = (5, 500);
/// Bytes of a checkpoint that is read into memory at most.
const CHECKPOINT_MAX: karez_core::unit::Bytes = karez_core::unit::Bytes(8 << 30);
/// What a manifest's signature covers, before the manifest itself.
const SIGNED_AS: &[u8] = b"KarezV1 adapter manifest\n";
const MANIFEST: &str = "manifest.json";
const SIGNATURE: &str = "manifest.sig";

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
        return interruptible(collect(context, link, view, base, args.options.output.clone())).await;
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
        ..
    } = &plan.outline;
    let summary = format!(
        "{} to train on and {held_out} held out ({}), {} tokens; {} steps; {} numbers will train",
        plural(*examples as u64, "example"),
        languages.join(", "),
        count(*tokens as u64),
        count(*steps as u64),
        count(*parameters as u64),
    );
    if args.check {
        if out.json {
            out.json(&json!({
                "steps": steps, "examples": examples, "held_out": held_out, "tokens": tokens, "languages": languages,
                "parameters": parameters, "notices": plan.outline.notices, "settings": plan.settings,
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
        collect(context, link, view, &plan.base, plan.output.clone()).await
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
    let mut config = match &args.config {
        Some(path) => read_config(path)?,
        None => Map::new(),
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
        .map(one_dataset)
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
    };
    let outline = outline(&spec).map_err(|error| match error {
        // Its rows have the numbers of the lines.
        TrainError::File { path, why } if path == data => refused(TrainError::File { path: given, why }),
        TrainError::Data { path, faults } if path == data => {
            refused(TrainError::Data { path: given, faults })
        }
        other => refused(other),
    })?;
    check_numbers(&base).map_err(refused)?;
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

fn read_config(path: &Path) -> Result<Map<String, Value>> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let wrong = |why: &str| fault(Kind::Usage, format!("{}: {why}", path.display()));
    if text.len() > karez_engine::train::settings::SETTINGS_MAX {
        return Err(wrong("is too long for a configuration"));
    }
    match serde_yaml_ng::from_str(&text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(wrong("is not a list of names with values")),
        Err(error) => Err(wrong(&error.to_string())),
    }
}

/// Axolotl takes a list of data sets; one is possible here.
fn one_dataset(value: Value) -> Result<Value, &'static str> {
    let Value::Array(sets) = value else {
        return Err("datasets is not a list");
    };
    let [set] = sets.as_slice() else {
        return Err("datasets names not exactly one data set");
    };
    set.get("path").cloned().ok_or("datasets[0] has no path")
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
        constraints: args.options.constraints(issued_at, ""),
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

/// Brings a base model into the store: the files that training reads, and no others that lie beside them.
async fn stage(context: &Context, artifacts: &Artifacts, base: &Path) -> Result<ArtifactRef> {
    let mut files: Vec<PathBuf> = weight_files(base).map_err(refused)?;
    let small = [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "model.safetensors.index.json",
    ];
    files.extend(
        small
            .iter()
            .map(|name| base.join(name))
            .filter(|path| path.exists()),
    );
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

/// Follows a job to its end and writes what came of it.
async fn collect(
    context: &Context,
    link: Link,
    view: wire::JobView,
    base: &Path,
    output: Option<PathBuf>,
) -> Result<()> {
    let out = context.out;
    let id = JobId(
        Digest::try_from(view.job.as_slice())
            .map_err(|_| fault(Kind::Other, "the scheduler named no job"))?,
    );
    if view.work != "train" {
        return Err(fault(Kind::Usage, format!("job {} trains nothing", id.short())));
    }
    task::set_current(Some(id));
    let view = follow::to_the_end(out, &link, &id.to_string()).await?;
    if let Err(error) = task::ended_well(&view) {
        if let Some(last) = last_done(&view) {
            let (artifact, step) = (
                view::artifact(last.result.as_ref())?,
                last.first_item + last.items,
            );
            out.note(format!(
                "the last good checkpoint is of step {step}: `karez artifact get {artifact} -o checkpoint.safetensors`"
            ));
        }
        return Err(error);
    }
    let last = last_done(&view).ok_or_else(|| fault(Kind::Other, "the job has no parts"))?;
    let result = view::artifact(last.result.as_ref())?;
    let artifacts = link.artifacts(&context.home).await?;
    artifacts.fetch(out, "the checkpoint", &[result]).await?;
    let store = artifacts.store.clone();
    artifacts.close().await;
    let output = output.unwrap_or_else(|| format!("karez-adapter-{}", id.short()).into());
    if output.exists() && fs::read_dir(&output).is_ok_and(|mut files| files.next().is_some()) {
        let why = format!("{} is not empty: choose another folder with -o", output.display());
        return Err(fault(Kind::Refused, why));
    }
    fs::create_dir_all(&output).with_context(|| output.display().to_string())?;
    let bytes = store.read(&result, CHECKPOINT_MAX)?;
    let finished = Finished::read(base, &bytes).map_err(refused)?;
    let name = output
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let base_name = base.display().to_string();
    let remarks = finished
        .write_all(&output, base, &base_name, &name)
        .map_err(refused)?;
    write_manifest(&output, &link, &view, &finished, result, &base_name)?;
    for remark in remarks {
        out.note(clean(&remark));
    }
    if out.json {
        out.json(&json!({"output": output, "report": finished.report(), "job": view::job(&view)}));
        return Ok(());
    }
    report::print(out, &view, None);
    out.line("");
    for line in finished.table().lines() {
        out.line(line);
    }
    out.line("");
    out.line(format!("the adapter is in {}", output.display()));
    let (base, adapter) = (base.display(), output.display());
    out.note(format!("next: `karez generate \"...\" --model {base}+{adapter}`"));
    Ok(())
}

/// The last part that is done.
fn last_done(view: &wire::JobView) -> Option<&wire::PartView> {
    let done = view
        .parts
        .iter()
        .filter(|part| part.state == "done" && part.result.is_some());
    done.max_by_key(|part| part.part)
}

/// Says where the adapter comes from, signed by whoever ordered it.
fn write_manifest(
    folder: &Path,
    link: &Link,
    view: &wire::JobView,
    finished: &Finished,
    checkpoint: ArtifactRef,
    base_name: &str,
) -> Result<()> {
    let state = finished.state();
    let mut files = Map::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        files.insert(name, json!(digest_of(&path)?));
    }
    let nodes: Vec<Value> = view
        .parts
        .iter()
        .map(|part| {
            json!({
                "part": part.part, "steps": [part.first_item, part.first_item + part.items],
                "node": view::hex(&part.node), "name": part.node_name, "institution": part.institution,
                "country": part.country, "device_class": part.device_class, "attempt": part.fence,
                "checkpoint": view::artifact_text(part.result.as_ref()), "receipt": view::hex(&part.receipt),
            })
        })
        .collect();
    let manifest = json!({
        "format": "karez.adapter.v1",
        "base": {"name": base_name, "digest": state.base},
        "data": {"digest": state.data, "examples": state.examples.0, "held_out": state.examples.1},
        "settings": finished.settings,
        "steps": state.step,
        "tokens": state.tokens,
        "trainers": state.learners,
        "losses": {"first": finished.checkpoint.losses.first(), "last": finished.checkpoint.losses.last(), "looks": state.looks},
        "checkpoint": checkpoint.to_string(),
        "job": view::hex(&view.job),
        "scheduler": link.config.scheduler.0.to_string(),
        "parts": nodes,
        "credits_microcredits": view.credits_spent,
        "files": files,
        "made_at_ms": utc_now().0,
    });
    let text = serde_json::to_string_pretty(&manifest)? + "\n";
    let signature = sign(&link.secret, &[SIGNED_AS, text.as_bytes()].concat());
    let signature =
        json!({"signer": PublicKey::of(&link.secret).to_string(), "ed25519": view::hex(&signature)});
    write_atomic(&folder.join(MANIFEST), text.as_bytes())?;
    write_atomic(
        &folder.join(SIGNATURE),
        (serde_json::to_string(&signature)? + "\n").as_bytes(),
    )
}

fn digest_of(path: &Path) -> Result<String> {
    let bytes = fs::read(path).with_context(|| path.display().to_string())?;
    Ok(Digest::of(&bytes).to_string())
}

/// Checks a manifest's signature, and every file that it names.
fn verify(context: &Context, folder: &Path) -> Result<()> {
    let bad = |why: String| fault(Kind::NotVerified, format!("{}: {why}", folder.display()));
    let read =
        |name: &str| fs::read(folder.join(name)).with_context(|| folder.join(name).display().to_string());
    let text = read(MANIFEST)?;
    let signature: Value = serde_json::from_slice(&read(SIGNATURE)?)?;
    let signer: PublicKey = signature["signer"]
        .as_str()
        .and_then(|key| key.parse().ok())
        .ok_or_else(|| bad("the signature names no key".into()))?;
    let bytes = signature["ed25519"].as_str().and_then(unhex);
    let bytes = bytes.ok_or_else(|| bad("the signature is not 64 bytes in hexadecimal".into()))?;
    signer
        .verify(&[SIGNED_AS, text.as_slice()].concat(), &bytes)
        .map_err(|_| bad(format!("the manifest is not signed by {signer}")))?;
    let manifest: Value = serde_json::from_slice(&text)?;
    let files = manifest["files"]
        .as_object()
        .ok_or_else(|| bad("the manifest names no files".into()))?;
    for (name, digest) in files {
        if Path::new(name).file_name() != Some(OsString::from(name).as_os_str()) {
            return Err(bad(format!("the manifest names a file elsewhere: {name}")));
        }
        if digest.as_str() != Some(digest_of(&folder.join(name))?.as_str()) {
            return Err(bad(format!("{name} is not what the manifest says")));
        }
    }
    let out = context.out;
    if out.json {
        out.json(&json!({"signer": signer.to_string(), "manifest": manifest}));
    } else {
        let count = plural(files.len() as u64, "file");
        out.line(format!(
            "{count} as signed by {signer}; base {}",
            manifest["base"]["digest"].as_str().unwrap_or("?")
        ));
    }
    Ok(())
}

fn unhex(text: &str) -> Option<[u8; 64]> {
    let mut out = [0; 64];
    if text.len() != 128 || !text.is_ascii() {
        return None;
    }
    for (byte, pair) in out.iter_mut().zip(text.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(out)
}
