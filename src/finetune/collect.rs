//! What a training job left: fetched, written as an adapter, signed; and checking such a signature.
use super::base_files;
use crate::{
    cli::Context,
    fault::{Kind, fault},
    follow,
    home::write_atomic,
    link::Link,
    out::{clean, count, plural},
    report,
    task::{self, utc_now},
    view,
};
use anyhow::{Context as _, Result};
use karez_core::{
    artifact::ArtifactRef,
    id::{Digest, JobId},
    key::{PublicKey, sign},
    unit::Bytes,
};
use karez_engine::train::results::Finished;
use karez_net::manifest::{Manifest, ManifestEntry};
use karez_proto::control as wire;
use serde_json::{Map, Value, json};
use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

/// Bytes of a checkpoint that is read into memory at most.
const CHECKPOINT_MAX: Bytes = Bytes(8 << 30);
/// What a manifest's signature covers, before the manifest itself.
const SIGNED_AS: &[u8] = b"KarezV1 adapter manifest\n";
const MANIFEST: &str = "manifest.json";
const SIGNATURE: &str = "manifest.sig";

/// Which of a job's checkpoints is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Which {
    /// The one at the end, which is waited for.
    Final,
    /// The last one there is now, of a job that still runs or went wrong.
    Last,
}

/// Follows a job to its end, or takes what it has, and writes what came of it.
pub(super) async fn collect(
    context: &Context,
    link: Link,
    view: wire::JobView,
    base: &Path,
    output: Option<PathBuf>,
    which: Which,
) -> Result<()> {
    let out = context.out;
    let id = JobId(
        Digest::try_from(view.job.as_slice())
            .map_err(|_| fault(Kind::Other, "the scheduler named no job"))?,
    );
    if view.work != "train" {
        return Err(fault(Kind::Usage, format!("job {} trains nothing", id.short())));
    }
    let output = output.unwrap_or_else(|| format!("karez-adapter-{}", id.short()).into());
    if output.exists() && fs::read_dir(&output).is_ok_and(|mut files| files.next().is_some()) {
        let why = format!("{} is not empty: choose another folder with -o", output.display());
        return Err(fault(Kind::Refused, why));
    }
    let view = match which {
        Which::Last => view,
        Which::Final => {
            task::set_current(Some(id));
            let view = follow::to_the_end(out, &link, &id.to_string()).await?;
            task::ended_well(&view).map_err(|error| match last_done(&view) {
                Some(last) => with_last(error, last, &id, base),
                None => error,
            })?;
            view
        }
    };
    let last = last_done(&view).ok_or_else(|| {
        let why = format!("job {} has stored no checkpoint yet", id.short());
        fault(Kind::NotFound, why)
    })?;
    let result = view::artifact(last.result.as_ref())?;
    let artifacts = link.artifacts(&context.home).await?;
    artifacts.fetch(out, "the checkpoint", &[result]).await?;
    let store = artifacts.store.clone();
    artifacts.close().await;
    let bytes = store.read(&result, CHECKPOINT_MAX)?;
    let finished = Finished::read(base, &bytes).map_err(super::refused)?;
    expect_base(base, &finished.state().base)?;
    fs::create_dir_all(&output).with_context(|| output.display().to_string())?;
    let name = output
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let base_name = base.display().to_string();
    let remarks = finished
        .write_all(&output, base, &base_name, &name)
        .map_err(super::refused)?;
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
    let state = finished.state();
    if !state.finished {
        let (step, total) = (count(state.step as u64), count(state.total as u64));
        out.note(format!(
            "this is step {step} of {total}: the job has not come further"
        ));
    }
    out.line(format!("the adapter is in {}", output.display()));
    let (base, adapter) = (base.display(), output.display());
    out.note(format!("next: `karez generate \"...\" --model {base}+{adapter}`"));
    Ok(())
}

/// What a job that went wrong leaves, after why it did.
fn with_last(error: anyhow::Error, last: &wire::PartView, id: &JobId, base: &Path) -> anyhow::Error {
    let step = last.first_item + last.items;
    let (id, base) = (id.short(), base.display());
    fault(
        Kind::JobFailed,
        format!(
            "{error:#}; its checkpoint after step {step} is good: `karez finetune --job {id} --base {base} --last` makes an \
             adapter of it"
        ),
    )
}

/// A checkpoint fits every base of the same shape, so only the digest tells whether this is the one it was trained on. It may
/// have been sent as `karez finetune` does, or as the catalogue holds it, with whatever lies beside.
fn expect_base(base: &Path, trained_on: &str) -> Result<()> {
    let sent = digest_of_files(base_files(base)?)?;
    if sent.to_string() == trained_on {
        return Ok(());
    }
    let mut all = Vec::new();
    for entry in fs::read_dir(base).with_context(|| base.display().to_string())? {
        let path = entry?.path();
        if path.is_file() {
            all.push(path);
        }
    }
    if digest_of_files(all)?.to_string() == trained_on {
        return Ok(());
    }
    Err(fault(
        Kind::Refused,
        format!(
            "the checkpoint was trained on the base {trained_on}, {} is {sent}: give the folder it was trained on, unchanged, \
             with --base",
            base.display()
        ),
    ))
}

/// The digest that these files have as a folder in a store.
fn digest_of_files(files: Vec<PathBuf>) -> Result<Digest> {
    let mut entries = Vec::with_capacity(files.len());
    for file in files {
        let mut hash = blake3::Hasher::new();
        let mut from = fs::File::open(&file).with_context(|| file.display().to_string())?;
        let bytes = std::io::copy(&mut from, &mut hash).with_context(|| file.display().to_string())?;
        entries.push(ManifestEntry {
            path: file
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
            bytes: Bytes(bytes),
            digest: Digest(*hash.finalize().as_bytes()),
        });
    }
    Ok(Digest::of(&Manifest::new(entries)?.encode()))
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
pub(super) fn verify(context: &Context, folder: &Path) -> Result<()> {
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
