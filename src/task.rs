//! One job from the user's side: resolve the model, send the input, sign the order, follow, fetch the results.
use crate::{
    fault::{Kind, fault},
    follow,
    home::Home,
    input::{Field, Items, SYSTEM, line_of},
    link::{Artifacts, Link, call},
    options::JobOptions,
    out::{Out, plural},
    over, view,
};
use anyhow::{Context as _, Result};
use karez_core::{
    artifact::ArtifactRef,
    id::JobId,
    records::{Generate, Order, Signed, Work},
    unit::{Millis, UtcMillis},
};
use karez_proto::control as wire;
use serde::Serializer as _;
use serde_json::{Map, Value};
use std::{
    fs::File,
    io::{BufReader, Write},
    path::Path,
    sync::Mutex,
    time::{SystemTime, UNIX_EPOCH},
};

/// Bytes of one result line at most: the longest answer and the longest vector fit many times over.
const RESULT_LINE_BYTES_MAX: usize = 16 << 20;
/// How long a signed order may be accepted.
const ORDER_LIFE: Millis = Millis(10 * 60 * 1000);

/// How to continue prompts; the model comes from the catalogue.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Sampling {
    pub(crate) max_tokens: u32,
    pub(crate) temperature_milli: u32,
    pub(crate) top_k: u32,
    pub(crate) top_p_milli: u32,
    pub(crate) seed: u64,
    pub(crate) raw: bool,
    pub(crate) system: String,
    /// Answers are told as they are written.
    pub(crate) stream: bool,
    /// A line at fault is answered with its error, and the others go on.
    pub(crate) keep_going: bool,
}

/// What is to be done with each item.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum What {
    Embed { model: String },
    Generate { model: String, sampling: Sampling },
    Noop { millis_per_item: u32 },
}

impl What {
    /// What of an input line is worked on.
    pub(crate) fn field(&self) -> Field {
        match self {
            Self::Generate { .. } => Field::Prompt,
            Self::Embed { .. } => Field::Text,
            Self::Noop { .. } => Field::Any,
        }
    }
}

/// A job about to be submitted.
pub(crate) struct Task {
    pub(crate) what: What,
    pub(crate) items: Items,
    pub(crate) options: JobOptions,
}

/// A job that was accepted, and where it can be asked about.
pub(crate) struct Running {
    pub(crate) job: JobId,
    pub(crate) view: wire::JobView,
    link: Link,
    artifacts: Artifacts,
    input: ArtifactRef,
}

/// Now, for records and listings.
pub(crate) fn utc_now() -> UtcMillis {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    UtcMillis(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// Eight bytes nobody else will draw.
pub(crate) fn nonce() -> Result<u64> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(|e| anyhow::anyhow!("the system gives no randomness: {e}"))?;
    Ok(u64::from_le_bytes(bytes))
}

/// The model of that name, or an error that names its neighbours.
pub(crate) async fn model(link: &Link, name: &str) -> Result<(ArtifactRef, wire::Model)> {
    let mut client = link.client.clone();
    let models = call(client.models(wire::ModelsRequest {})).await?.models;
    if let Some(found) = models.iter().find(|m| m.name == name) {
        return Ok((view::artifact(found.artifact.as_ref())?, found.clone()));
    }
    let mut near: Vec<&str> = models
        .iter()
        .map(|m| m.name.as_str())
        .filter(|known| is_near(name, known))
        .collect();
    near.sort_unstable();
    near.truncate(3);
    let known = match (near.as_slice(), models.len()) {
        ([], 0) => "it knows none yet".to_owned(),
        ([], n) => format!("it knows {}, see `karez models`", plural(n as u64, "other")),
        (names, _) => format!("did you mean {}?", names.join(" or ")),
    };
    Err(fault(
        Kind::NotFound,
        format!(
            "the scheduler knows no model {name:?} ({known}): pick one of `karez models`, or add it with `karez artifact add PATH --model {name}`"
        ),
    ))
}

fn is_near(wanted: &str, known: &str) -> bool {
    let (wanted, known) = (wanted.to_lowercase(), known.to_lowercase());
    (wanted.len() > 2 && (known.contains(&wanted) || wanted.contains(&known)))
        || strsim::jaro_winkler(&wanted, &known) > 0.8
}

/// What the scheduler would do with such an order now. Signed as for submitting, but nothing is sent, set aside or run.
pub(crate) async fn explain(home: &Home, link: &Link, task: &Task) -> Result<wire::ExplainReply> {
    let artifacts = link.artifacts(home).await?;
    let (work, licence) = work(None, link, &artifacts, &task.what).await?;
    let input = stored(home, &artifacts, task).await?;
    let order = order(link, work, &licence, input, task)?;
    let request = wire::ExplainRequest {
        job: String::new(),
        order: order.encode(),
    };
    call(link.client.clone().explain(request)).await
}

/// Sends the input, signs the order and submits it.
pub(crate) async fn submit(out: &Out, home: &Home, link: Link, task: &Task) -> Result<Running> {
    let artifacts = link.artifacts(home).await?;
    let (work, licence) = work(Some(out), &link, &artifacts, &task.what).await?;
    let input = stored(home, &artifacts, task).await?;
    artifacts.push(out, "the input", input).await?;
    let order = order(&link, work, &licence, input, task)?;
    let job = JobId(order.id());
    let request = wire::SubmitRequest {
        order: order.encode(),
        label: task.options.label.clone(),
        wait: task.options.wait,
    };
    let mut client = link.client.clone();
    let reply = call(client.submit(request)).await?;
    if reply.job != job.0.0 {
        return Err(fault(
            Kind::NotVerified,
            format!("the scheduler named another job than the order {job} it was sent"),
        ));
    }
    let view = reply.view.unwrap_or_default();
    out.note(format!(
        "job {} submitted: {} to {}",
        job.short(),
        plural(task.items.count, "item"),
        view::work_text(&view)
    ));
    Ok(Running {
        job,
        view,
        link,
        artifacts,
        input,
    })
}

/// The input, in this machine's store. A system prompt goes with its lines: an order is kept in the books by everybody, and
/// holds no more of a prompt than the input's digest.
async fn stored(home: &Home, artifacts: &Artifacts, task: &Task) -> Result<ArtifactRef> {
    let (store, content, dir) = (
        artifacts.store.clone(),
        task.items.content(),
        home.dir().to_owned(),
    );
    let system = match &task.what {
        What::Generate { sampling, .. } if !sampling.raw => sampling.system.clone(),
        _ => String::new(),
    };
    let kept = tokio::task::spawn_blocking(move || -> Result<ArtifactRef> {
        match system.as_str() {
            "" => Ok(content.store(&store)?),
            system => Ok(content.told(system, &dir)?.content().store(&store)?),
        }
    });
    kept.await?
}

/// The work of an order, and the licence of its model. With `out`, what lies on this machine is sent along.
async fn work(out: Option<&Out>, link: &Link, artifacts: &Artifacts, what: &What) -> Result<(Work, String)> {
    Ok(match what {
        What::Noop { millis_per_item } => {
            let work = Work::Noop {
                millis_per_item: *millis_per_item,
            };
            (work, String::new())
        }
        What::Embed { model: name } => {
            let (artifact, found) = model(link, name).await?;
            expect_format(&found, "safetensors", "embed")?;
            let work = Work::Embed {
                model: artifact,
                model_name: name.clone(),
            };
            (work, found.licence)
        }
        What::Generate {
            model: name,
            sampling: s,
        } => {
            let (artifact, adapter, name, licence) = match model(link, name).await {
                Ok((artifact, found)) => {
                    expect_format(&found, "gguf", "generate")?;
                    (artifact, None, name.clone(), found.licence)
                }
                Err(_) if over::halves(name).is_some() => {
                    let chosen = over::choose(out, link, artifacts, name).await?;
                    (chosen.model, Some(chosen.adapter), chosen.name, String::new())
                }
                Err(error) => return Err(error),
            };
            let work = Work::Generate(Generate {
                adapter,
                temperature_milli: s.temperature_milli,
                top_k: s.top_k,
                top_p_milli: s.top_p_milli,
                seed: s.seed,
                raw: s.raw,
                stream: s.stream,
                keep_going: s.keep_going,
                ..Generate::greedy(artifact, name, s.max_tokens)
            });
            (work, licence)
        }
    })
}

pub(crate) fn expect_format(model: &wire::Model, wanted: &str, command: &str) -> Result<()> {
    // What a provider's own server does with a model, only the server knows.
    if model.format.is_empty() || model.format == wanted || model.format == "served" {
        return Ok(());
    }
    Err(fault(
        Kind::Refused,
        format!(
            "model {:?} is stored as {}, `karez {command}` needs {wanted}: pick another of `karez models`",
            model.name, model.format
        ),
    ))
}

fn order(
    link: &Link,
    work: Work,
    licence: &str,
    input: ArtifactRef,
    task: &Task,
) -> Result<karez_core::records::Verified<Order>> {
    let issued_at = utc_now();
    let order = Order {
        user: link.user(),
        institution: link.config.institution.clone(),
        scheduler: link.config.scheduler,
        work,
        input,
        items: task.items.count,
        items_per_part: task.options.part_items,
        constraints: task.options.constraints(issued_at, licence),
        credits_max: task.options.max_cost,
        attempts_max: task.options.attempts,
        nonce: nonce()?,
        issued_at,
        expires_at: issued_at.after(ORDER_LIFE),
    };
    let signed = Signed::sign(order, &link.secret);
    // The scheduler will check every field: find out here first, in the same words.
    Signed::<Order>::open(&signed.encode()).map_err(|error| fault(Kind::Refused, error.to_string()))
}

impl Running {
    /// Follows the job to its end. An error when it failed or was cancelled.
    pub(crate) async fn finish(&mut self, out: &Out) -> Result<()> {
        self.view = follow::to_the_end(out, &self.link, &self.job.to_string()).await?;
        ended_well(&self.view)
    }

    /// Writes the results, merged with the input, to `sink`.
    pub(crate) async fn results(&self, out: &Out, sink: &mut (dyn Write + Send)) -> Result<u64> {
        let parts = parts(&self.view)?;
        self.artifacts.fetch(out, "the results", &parts).await?;
        let input = self.artifacts.store.path(&self.input)?;
        merge(&self.artifacts, &parts, Some(&input), sink)
    }

    pub(crate) async fn close(self) {
        self.artifacts.close().await;
    }
}

/// The results of a finished job, merged with its input where that can still be had.
pub(crate) async fn fetch(
    out: &Out,
    home: &Home,
    link: &Link,
    view: &wire::JobView,
    sink: &mut (dyn Write + Send),
) -> Result<u64> {
    let parts = parts(view)?;
    let artifacts = link.artifacts(home).await?;
    artifacts.fetch(out, "the results", &parts).await?;
    let input = match view::artifact(view.input.as_ref()) {
        Ok(input) if artifacts.store.contains(&input) => Some(input),
        Ok(input) => {
            let fetched = artifacts.fetch(out, "the input", &[input]).await;
            fetched.ok().map(|()| input)
        }
        Err(_) => None,
    };
    let input = input.and_then(|input| artifacts.store.path(&input).ok());
    if input.is_none() {
        out.warn("the input is no longer there: the results come without it");
    }
    let written = merge(&artifacts, &parts, input.as_deref(), sink);
    artifacts.close().await;
    written
}

/// An error with the cause when the job did not end well.
pub(crate) fn ended_well(view: &wire::JobView) -> Result<()> {
    let short = view::short(&view.job);
    match view.state.as_str() {
        "done" => Ok(()),
        "failed" => {
            let cause = if view.cause.is_empty() {
                "no cause was given"
            } else {
                &view.cause
            };
            Err(fault(
                Kind::JobFailed,
                format!("job {short} failed: {cause}; `karez job logs {short}` tells more"),
            ))
        }
        "cancelled" => Err(fault(
            Kind::JobFailed,
            format!("job {short} was cancelled: nothing more will run or be billed"),
        )),
        other => Err(fault(
            Kind::NotFound,
            format!("job {short} is {other}, so there are no results yet: `karez job watch {short}`"),
        )),
    }
}

fn parts(view: &wire::JobView) -> Result<Vec<ArtifactRef>> {
    ended_well(view)?;
    let mut parts: Vec<_> = view.parts.iter().collect();
    parts.sort_by_key(|p| p.part);
    parts
        .iter()
        .map(|p| view::artifact(p.result.as_ref()).with_context(|| format!("the result of part {}", p.part)))
        .collect()
}

/// Result lines in the order of the items, each with what its input line held.
fn merge(
    artifacts: &Artifacts,
    parts: &[ArtifactRef],
    input: Option<&Path>,
    sink: &mut (dyn Write + Send),
) -> Result<u64> {
    let mut input = match input {
        Some(path) => Some(BufReader::new(File::open(path)?)),
        None => None,
    };
    let (mut line, mut asked) = (Vec::new(), Vec::new());
    let mut written = 0u64;
    for part in parts {
        let mut results = BufReader::new(File::open(artifacts.store.path(part)?)?);
        while line_of(&mut results, RESULT_LINE_BYTES_MAX, &mut line).with_context(|| part.to_string())? {
            let result: Map<String, Value> = serde_json::from_slice(&line).map_err(|error| {
                fault(
                    Kind::NotVerified,
                    format!("result {written} in {part} is not a JSON object: {error}"),
                )
            })?;
            if result.get("index").and_then(Value::as_u64) != Some(written) {
                let why = format!(
                    "result {written} in {part} belongs to another item: the node mixed up its results"
                );
                return Err(fault(Kind::NotVerified, why));
            }
            asked.clear();
            if let Some(lines) = &mut input {
                line_of(lines, RESULT_LINE_BYTES_MAX, &mut asked)?;
            }
            // An input line need not be an object; then the result stands alone.
            let asked: Map<String, Value> = serde_json::from_slice(&asked).unwrap_or_default();
            // What every line was told beforehand is not repeated in every answer.
            let asked = asked
                .iter()
                .filter(|(key, _)| !result.contains_key(*key) && *key != SYSTEM);
            // For people: first which item, then what was asked, then what came of it.
            let (names, rest): (Vec<_>, Vec<_>) = result
                .iter()
                .partition(|(key, _)| *key == "index" || *key == "id");
            let whole = names.into_iter().chain(asked).chain(rest);
            serde_json::Serializer::new(&mut *sink).collect_map(whole)?;
            sink.write_all(b"\n")?;
            written += 1;
        }
    }
    sink.flush()?;
    Ok(written)
}

/// The job that an interrupt should mention, once there is one.
static CURRENT: Mutex<Option<JobId>> = Mutex::new(None);

pub(crate) fn set_current(job: Option<JobId>) {
    *CURRENT.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = job;
}

/// The same, and forgets it.
pub(crate) fn take_current() -> Option<JobId> {
    CURRENT
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
        .take()
}

/// Runs `work` until it ends or the user interrupts. An interrupt only detaches: the job goes on.
pub(crate) async fn interruptible<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let interrupted = tokio::select! {
        done = work => return done,
        caught = tokio::signal::ctrl_c() => caught,
    };
    interrupted.context("waiting for an interrupt")?;
    Err(match take_current() {
        Some(job) => {
            let short = job.short();
            fault(
                Kind::Interrupted,
                format!(
                    "detached; job {short} goes on: `karez job watch {short}` to come back, `karez job cancel {short}` to stop it"
                ),
            )
        }
        None => fault(Kind::Interrupted, "interrupted before anything was submitted"),
    })
}
