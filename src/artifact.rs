//! `karez artifact`: files, directories and models by content.
use crate::{
    cli::Context,
    fault::{Kind, fault},
    link::{self, Link, call},
    network,
    out::{Column, Table, minute, size},
    task,
};
use anyhow::{Context as _, Result};
use clap::{Args, Subcommand};
use karez_core::{
    artifact::{ArtifactKind, ArtifactRef},
    id::Digest,
};
use karez_engine::inspect::{self, Format};
use karez_proto::control as wire;
use serde_json::{Value, json};
use std::path::PathBuf;

/// `karez artifact`.
#[derive(Debug, Args)]
#[command(
    arg_required_else_help = true,
    after_help = "Example:\n  karez artifact add ./all-MiniLM-L6-v2 --model all-MiniLM-L6-v2"
)]
pub(crate) struct ArtifactArgs {
    #[command(subcommand)]
    command: ArtifactCommand,
}

#[derive(Debug, Subcommand)]
enum ArtifactCommand {
    /// Send a file or directory to the scheduler, as a model with --model
    #[command(after_help = "\
Examples:
  karez artifact add data.jsonl
  karez artifact add --shipped
  karez artifact add ./my-model --model my-model --licence Apache-2.0")]
    Add(AddArgs),
    /// Fetch an artifact from the scheduler, or from the local store
    #[command(
        after_help = "Examples:\n  karez artifact get karez-tiny -o karez-tiny.gguf\n  karez artifact get blob:DIGEST:BYTES -o data.jsonl"
    )]
    Get(GetArgs),
    /// List the local store
    #[command(after_help = "Example:\n  karez artifact ls")]
    Ls,
}

#[derive(Debug, Args)]
struct AddArgs {
    /// A file, or a directory
    #[arg(required_unless_present = "shipped", conflicts_with = "shipped")]
    path: Option<PathBuf>,
    /// The small model that is part of this program, as karez-tiny
    #[arg(long, conflicts_with = "model")]
    shipped: bool,
    /// Give it this name in the scheduler's catalogue; its headers are checked first
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// The model's licence, shown in `karez models`
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        requires = "model",
        hide_default_value = true
    )]
    licence: String,
}

#[derive(Debug, Args)]
struct GetArgs {
    /// blob:DIGEST:BYTES, tree:DIGEST:BYTES, a model's name, or the digest of something in the local store
    artifact: String,
    /// Where to write it
    #[arg(short, long, value_name = "PATH")]
    output: PathBuf,
}

pub(crate) async fn run(context: &Context, args: ArtifactArgs) -> Result<()> {
    match args.command {
        ArtifactCommand::Add(args) => add(context, args).await,
        ArtifactCommand::Get(args) => get(context, args).await,
        ArtifactCommand::Ls => ls(context),
    }
}

async fn add(context: &Context, args: AddArgs) -> Result<()> {
    let Some(path) = args.path else {
        let link = link::open(&context.home).await?;
        network::add_shipped_model(context, &link).await?;
        return named(context, network::SHIPPED_MODEL);
    };
    match std::fs::symlink_metadata(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(fault(
                Kind::NotFound,
                format!("{} does not exist: give a file or a directory", path.display()),
            ));
        }
        _ if path.is_file() || path.is_dir() => {}
        _ => {
            return Err(fault(
                Kind::Refused,
                format!(
                    "{} is neither a file nor a directory that can be read",
                    path.display()
                ),
            ));
        }
    }
    let format = match &args.model {
        Some(_) => Some(check_model(&path)?),
        None => None,
    };
    let link = link::open(&context.home).await?;
    let artifacts = link.artifacts(&context.home).await?;
    let store = artifacts.store.clone();
    let from = path.clone();
    let artifact = tokio::task::spawn_blocking(move || {
        if from.is_dir() {
            store.add_dir(&from)
        } else {
            store.add_file(&from)
        }
    })
    .await?
    .with_context(|| path.display().to_string())?;
    artifacts
        .push(context.out, &path.display().to_string(), artifact)
        .await?;
    artifacts.close().await;
    if let (Some(name), Some(format)) = (&args.model, format) {
        name_model(&link, name, artifact, format, &args.licence).await?;
    }
    let out = context.out;
    if out.json {
        out.json(&json!({"artifact": artifact.to_string(), "model": args.model}));
    } else {
        out.line(artifact.to_string());
        if let Some(name) = &args.model {
            out.note(format!("named {name}: `karez models` lists it"));
        }
    }
    Ok(())
}

/// Reads the headers of the model at `path`; the format's name in the catalogue, or why it is no model.
pub(crate) fn check_model(path: &std::path::Path) -> Result<&'static str> {
    if path.is_dir() && !path.join("config.json").exists() {
        let name = path.display();
        let why = format!(
            "{name} holds no config.json: a model is a .gguf file, or a directory with config.json, tokenizer.json and model.safetensors"
        );
        return Err(fault(Kind::Refused, why));
    }
    let found = inspect::inspect(path).map_err(|error| fault(Kind::Refused, error.to_string()))?;
    Ok(format_name(found.format))
}

/// A format's name in the catalogue.
pub(crate) fn format_name(format: Format) -> &'static str {
    match format {
        Format::Gguf => "gguf",
        Format::Safetensors => "safetensors",
    }
}

/// Enters an artifact that the scheduler has into its catalogue.
pub(crate) async fn name_model(
    link: &Link,
    name: &str,
    artifact: ArtifactRef,
    format: &str,
    licence: &str,
) -> Result<()> {
    let model = wire::Model {
        name: name.to_owned(),
        artifact: Some(artifact.into()),
        format: format.to_owned(),
        licence: licence.to_owned(),
    };
    let mut client = link.client.clone();
    call(client.name_model(wire::NameModelRequest { model: Some(model) })).await?;
    Ok(())
}

/// Says that the model of that name can be used now.
fn named(context: &Context, model: &str) -> Result<()> {
    if context.out.json {
        context.out.json(&json!({"model": model}));
    } else {
        context
            .out
            .line(format!("{model} is known: `karez models` lists it"));
    }
    Ok(())
}

async fn get(context: &Context, args: GetArgs) -> Result<()> {
    let output = args.output;
    if std::fs::symlink_metadata(&output).is_ok() {
        return Err(fault(
            Kind::Refused,
            format!("{} exists already: choose another path with -o", output.display()),
        ));
    }
    let (artifact, store) = match find_local(context, &args.artifact)? {
        Some(found) => found,
        None => {
            let link = link::open(&context.home).await?;
            let artifact = match args.artifact.parse::<ArtifactRef>() {
                Ok(artifact) => artifact,
                Err(error) if args.artifact.contains(':') => {
                    return Err(fault(Kind::Refused, error.to_string()));
                }
                Err(_) if args.artifact.parse::<Digest>().is_ok() => {
                    return Err(fault(
                        Kind::NotFound,
                        format!(
                            "{} is not in the local store: to fetch it, name it as blob:DIGEST:BYTES or tree:DIGEST:BYTES",
                            args.artifact
                        ),
                    ));
                }
                Err(_) => task::model(&link, &args.artifact).await?.0,
            };
            let artifacts = link.artifacts(&context.home).await?;
            artifacts.fetch(context.out, "the artifact", &[artifact]).await?;
            let store = artifacts.store.clone();
            artifacts.close().await;
            (artifact, store)
        }
    };
    let to = output.clone();
    tokio::task::spawn_blocking(move || store.export(&artifact, &to))
        .await?
        .with_context(|| output.display().to_string())?;
    if context.out.json {
        context
            .out
            .json(&json!({"artifact": artifact.to_string(), "path": output}));
    } else {
        let what = if artifact.kind == ArtifactKind::Tree {
            "directory"
        } else {
            "file"
        };
        context.out.line(format!(
            "{what} {} ({}), verified",
            output.display(),
            size(artifact.bytes.0)
        ));
    }
    Ok(())
}

fn find_local(
    context: &Context,
    name: &str,
) -> Result<Option<(ArtifactRef, karez_net::store::ArtifactStore)>> {
    let store = context.home.store()?;
    let whole = name.parse::<ArtifactRef>().ok().filter(|a| store.contains(a));
    let by_digest = || {
        let wanted = name.len() >= 8 && name.bytes().all(|b| b.is_ascii_hexdigit());
        let found = |s: &karez_net::store::StoredArtifact| {
            s.complete && s.artifact.digest.to_string().starts_with(name)
        };
        if wanted {
            store.list().into_iter().find(found).map(|s| s.artifact)
        } else {
            None
        }
    };
    Ok(whole.or_else(by_digest).map(|artifact| (artifact, store)))
}

fn ls(context: &Context) -> Result<()> {
    let store = context.home.store()?;
    let list = store.list();
    let out = context.out;
    if out.json {
        let one = |s: &karez_net::store::StoredArtifact| json!({"artifact": s.artifact.to_string(), "bytes": s.artifact.bytes.0, "complete": s.complete, "used_at_ms": s.used_at.0});
        out.json(&Value::Array(list.iter().map(one).collect()));
        return Ok(());
    }
    if list.is_empty() {
        out.note("the local store is empty");
        return Ok(());
    }
    let mut table = Table::new(&[
        ("KIND", Column::Left),
        ("DIGEST", Column::Cut),
        ("SIZE", Column::Right),
        ("USED (UTC)", Column::Left),
        ("", Column::Left),
    ]);
    for s in &list {
        table.row(vec![
            s.artifact.kind.to_string(),
            s.artifact.digest.to_string(),
            size(s.artifact.bytes.0),
            minute(s.used_at.0),
            if s.complete {
                String::new()
            } else {
                "incomplete".into()
            },
        ]);
    }
    out.table(&table);
    out.note(format!(
        "{} of {} used",
        size(store.used().0),
        size(store.limit().0)
    ));
    Ok(())
}
