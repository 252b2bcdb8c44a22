//! `/v1/fine_tuning/jobs`: an adapter over a base model of the catalogue, as an order like any other.
//!
//! Which base models may be trained over HTTP is the operator's choice (`gateway.fine_tuning`); they are Hugging Face
//! folders of the catalogue. What only the trainer knows (is the data well formed, how long is the run, what does a
//! checkpoint hold) is asked of [`crate::tuner`]. All of it is asked while the request lasts: the key that signs the order is
//! kept no longer.
//!
//! Here stand the jobs themselves; `ask` reads requests, `shown` writes answers, `results` makes models of checkpoints.
mod ask;
mod results;
mod shown;

use super::{
    Answer, Caller,
    ask::Wishes,
    error::{ApiError, json_response},
    files::{self, fresh},
    list, object,
    work::{self, now},
};
use crate::{
    mind::{Shared, lock},
    tuner::{Ask, Fault, Outline, Progress, Told, TunerError},
};
use ask::Wanted;
use axum::{
    body::Body,
    extract::{Path as UrlPath, State},
    http::{HeaderMap, StatusCode, Uri},
};
use karez_core::{
    artifact::ArtifactRef,
    controller::{Event, JobState, LogLine},
    id::{Digest, JobId},
    key::PublicKey,
    records::{Train, Work},
    unit::{Bytes, Credits},
};
use karez_ledger::{Op, Tables};
use karez_net::store::{ArtifactStore, Pin, StoreError};
pub(super) use results::resolve;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex},
};

/// The table of the durable writer.
pub(crate) const TABLE: &str = "tunings";
/// Jobs of one key, and of all keys.
const JOBS_OF_KEY_MAX: usize = 200;
const JOBS_MAX: usize = 10_000;
/// Bytes of data that is checked on this machine at most; `karez finetune` checks on the researcher's own.
const DATA_MAX: u64 = 256 << 20;
/// The format of models that can be trained.
const TRAINABLE: &str = "safetensors";
/// Any base model of the catalogue, in the operator's list.
const ANY: &str = "*";

/// One job.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Tuning {
    id: String,
    owner: PublicKey,
    job: JobId,
    /// The base model's name, its folder, and the same as one file for llama.cpp.
    model: String,
    base: ArtifactRef,
    served: ArtifactRef,
    /// What the result is called.
    name: String,
    file: String,
    suffix: Option<String>,
    metadata: Option<Value>,
    epochs: u64,
    batch_size: Value,
    multiplier: Value,
    seed: u64,
    steps: u64,
    examples: (u64, u64),
    notices: Vec<String>,
    created_at: u64,
    over: Option<Over>,
}

/// How it ended, and all of its history that is kept: the scheduler forgets its jobs in time.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Over {
    at: u64,
    state: JobState,
    cause: String,
    /// Files of the owner's.
    results: Vec<String>,
    /// None once it was deleted, too.
    adapter: Option<ArtifactRef>,
    tokens: u64,
    trail: Trail,
}

/// What is told of a run's course.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Trail {
    /// Loss after so many steps, in nats; thinned where there are too many.
    losses: Vec<(u64, f64)>,
    held_out: BTreeMap<u64, f64>,
    checkpoints: Vec<Stored>,
    log: Vec<LogLine>,
}

/// A checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Stored {
    step: u64,
    at: u64,
    artifact: ArtifactRef,
}

impl list::Row for Tuning {
    fn id(&self) -> &str {
        &self.id
    }
    fn created_at(&self) -> u64 {
        self.created_at
    }
}

#[derive(Default)]
pub(crate) struct Tunings {
    rows: Mutex<BTreeMap<String, Tuning>>,
    /// What rows need of the store.
    pins: Mutex<HashMap<String, Vec<Pin>>>,
    /// Those whose results are being made, and how often that failed.
    closing: Mutex<BTreeSet<String>>,
    failed: Mutex<HashMap<String, u32>>,
    /// The latest checkpoint that was read, of each job under way.
    read: Mutex<HashMap<String, (Digest, Arc<Progress>)>>,
    /// Adapters of checkpoints on the way, as they were asked for.
    made: Mutex<Vec<(Digest, ArtifactRef, Pin)>>,
}

impl Tunings {
    /// The jobs on disk. A row that cannot be read is left out, with a warning.
    pub(crate) fn restore(tables: &Tables, store: &ArtifactStore) -> Self {
        let tunings = Self::default();
        for (key, value) in tables.rows(TABLE) {
            match serde_json::from_slice::<Tuning>(value) {
                Ok(row) => {
                    tunings.pin(store, &row);
                    lock(&tunings.rows).insert(row.id.clone(), row);
                }
                Err(error) => {
                    let id = String::from_utf8_lossy(key);
                    tracing::warn!(%id, %error, "a stored fine-tuning job cannot be read: left out");
                }
            }
        }
        tunings
    }

    /// Keeps what the row needs: the base's folder until the result is made, then base file and adapter.
    fn pin(&self, store: &ArtifactStore, row: &Tuning) {
        let adapter = row.over.as_ref().and_then(|over| over.adapter);
        let needed = match &row.over {
            None => vec![row.base, row.served],
            Some(_) => adapter.into_iter().chain(adapter.map(|_| row.served)).collect(),
        };
        let pins = needed
            .iter()
            .filter_map(|artifact| store.pin(artifact).ok())
            .collect();
        let before = lock(&self.pins).insert(row.id.clone(), pins);
        drop(before);
    }

    fn get(&self, owner: PublicKey, id: &str) -> Result<Tuning, ApiError> {
        let found = lock(&self.rows).get(id).filter(|row| row.owner == owner).cloned();
        found.ok_or_else(|| ApiError::not_found("there is no such fine-tuning job of yours"))
    }

    /// On disk when it returns `Ok`, with the files.
    async fn put(&self, shared: &Shared, row: Tuning, files: Vec<files::File>) -> Result<(), ApiError> {
        let op = Op::Put {
            table: TABLE,
            key: row.id.clone().into_bytes(),
            value: serde_json::to_vec(&row).unwrap_or_default(),
        };
        shared.files.keep(shared, files, vec![op]).await?;
        self.pin(&shared.store, &row);
        lock(&self.rows).insert(row.id.clone(), row);
        Ok(())
    }

    async fn remove(&self, shared: &Shared, id: &str) {
        let op = Op::Delete {
            table: TABLE,
            key: id.as_bytes().to_vec(),
        };
        if files::commit(shared, vec![op]).await.is_ok() {
            lock(&self.rows).remove(id);
            lock(&self.read).remove(id);
            let pins = lock(&self.pins).remove(id);
            drop(pins);
        }
    }

    /// The owner's models that are ready, for `/v1/models`.
    pub(super) fn models(&self, owner: PublicKey) -> Vec<Value> {
        let rows = lock(&self.rows);
        let ready = rows.values().filter(|row| row.owner == owner && row.is_ready());
        ready.map(shown::model).collect()
    }

    /// One of them.
    pub(super) fn model(&self, owner: PublicKey, name: &str) -> Option<Value> {
        let rows = lock(&self.rows);
        let mut ready = rows.values().filter(|row| row.owner == owner && row.is_ready());
        ready.find(|row| row.name == name).map(shown::model)
    }

    /// Whether `owner` may keep one more.
    fn room(&self, owner: PublicKey) -> Result<(), ApiError> {
        let rows = lock(&self.rows);
        let mine = rows.values().filter(|row| row.owner == owner).count();
        if mine >= JOBS_OF_KEY_MAX || rows.len() >= JOBS_MAX {
            let why =
                format!("{mine} fine-tuning jobs are kept for this key, the limit is {JOBS_OF_KEY_MAX}");
            return Err(ApiError::budget(why));
        }
        Ok(())
    }
}

impl Tuning {
    fn is_ready(&self) -> bool {
        self.over.as_ref().is_some_and(|over| over.adapter.is_some())
    }
}

/// What a process may hold that reads or writes so many bytes, times what its structures take for each.
fn memory(bytes: u64, times: u64) -> Bytes {
    Bytes((1 << 30) + bytes.saturating_mul(times))
}

/// Refusals of the store, and of the trainer's process: none of them the request's fault.
fn unread(error: StoreError) -> ApiError {
    ApiError::unavailable(format!("what is needed cannot be read: {error}"))
}

fn unanswered(error: TunerError) -> ApiError {
    match error {
        TunerError::None => ApiError::unavailable(error.to_string()),
        error => ApiError::server(error.to_string()),
    }
}

pub(super) async fn create(State(shared): State<Arc<Shared>>, headers: HeaderMap, body: Body) -> Answer {
    let caller = Caller::of(&shared, &headers).await?;
    let body = object(body).await?;
    let wanted = ask::read(&body)?;
    let mut wishes = Wishes::of(&body)?;
    let base = base(&shared, &wanted.model)?;
    let file = shared.files.get(caller.key, &wanted.file).map_err(|_| {
        ApiError::param(
            "training_file",
            "names no file of yours: send it to POST /v1/files",
        )
    })?;
    if file.purpose != files::TRAINING {
        let why = format!("has the purpose {:?}: upload it with fine-tune", file.purpose);
        return Err(ApiError::param("training_file", why));
    }
    if file.artifact.bytes.0 > DATA_MAX {
        let why = format!(
            "is larger than {} MiB: use `karez finetune`, which checks data on your own machine",
            DATA_MAX >> 20
        );
        return Err(ApiError::param("training_file", why));
    }
    shared.tunings.room(caller.key)?;
    let outline = outline(&shared, &wanted, base, file.artifact).await?;
    wishes.constraints.memory = wishes.constraints.memory.max(Bytes(outline.memory));
    // Before anything is trained: what cannot be served afterwards would be paid for nothing.
    let served = results::base_file(&shared, base).await?;
    let work = Work::Train(Train {
        model: base,
        model_name: wanted.model.clone(),
        settings: outline.settings.clone(),
        language: wanted.language.clone(),
        tokens_per_step: outline.tokens_per_step,
    });
    let order = work::Wanted {
        work,
        input: file.artifact,
        items: outline.steps,
        items_per_part: outline.steps_per_part,
        label: "fine-tune",
    };
    if wishes.cost_max.is_none() {
        wishes.cost_max = Some(ceiling(&shared, &caller, &order, &wishes).await?);
    }
    let job = work::order(&shared, &caller, &order, &wishes).await?;
    let id = fresh("ftjob")?;
    let row = Tuning {
        name: wanted.result_name(&id),
        id,
        owner: caller.key,
        job,
        model: wanted.model,
        base,
        served,
        file: file.id,
        suffix: wanted.suffix,
        metadata: wanted.metadata,
        epochs: outline.epochs,
        batch_size: wanted.batch_size,
        multiplier: wanted.multiplier,
        seed: wanted.seed,
        steps: outline.steps,
        examples: (outline.examples, outline.held_out),
        notices: outline.notices,
        created_at: now(),
        over: None,
    };
    if let Err(error) = shared.tunings.put(&shared, row.clone(), Vec::new()).await {
        call_off(&shared, &row).await;
        return Err(error);
    }
    Ok(json_response(StatusCode::OK, &shown::job(&shared, &row).await))
}

/// The folder of a base model that may be trained here.
fn base(shared: &Shared, name: &str) -> Result<ArtifactRef, ApiError> {
    let allowed = &shared.config.gateway.fine_tuning;
    if !allowed.iter().any(|base| base == name || base == ANY) {
        let why = match allowed.as_slice() {
            [] => {
                "cannot be fine-tuned: this scheduler's operator names no base models (gateway.fine_tuning)"
                    .to_owned()
            }
            some => format!(
                "cannot be fine-tuned here: the operator allows {}",
                some.join(", ")
            ),
        };
        return Err(ApiError::param("model", why));
    }
    let named = shared
        .catalogue
        .get(name)
        .ok_or_else(|| ApiError::no_model(name))?;
    if named.format != TRAINABLE {
        let why = format!(
            "is stored as {}: what is trained is a Hugging Face folder, stored as {TRAINABLE}",
            named.format
        );
        return Err(ApiError::param("model", why));
    }
    Ok(named.artifact)
}

/// Has data, base and settings checked by the trainer.
async fn outline(
    shared: &Shared,
    wanted: &Wanted,
    base: ArtifactRef,
    data: ArtifactRef,
) -> Result<Outline, ApiError> {
    let _pins = (
        shared.store.pin(&base).map_err(unread)?,
        shared.store.pin(&data).map_err(unread)?,
    );
    let desk = results::desk(shared, base).await?;
    let question = Ask::Check {
        base: desk.base(),
        data: shared.store.path(&data).map_err(unread)?,
        settings: wanted.settings.clone(),
        language: wanted.language.clone(),
    };
    match shared.tuner.ask(question, memory(data.bytes.0, 24)).await {
        Ok(Told::Checked(outline)) => Ok(outline),
        Ok(Told::Refused { what, why }) => Err(match what {
            Fault::Setting(name) => ApiError::param(wanted.field(&name), why),
            Fault::Data => ApiError::param("training_file", why),
            Fault::Base | Fault::Checkpoint => ApiError::param("model", format!("cannot be trained: {why}")),
        }),
        Ok(_) => Err(ApiError::server(
            "the trainer's process answered another question",
        )),
        Err(error) => Err(unanswered(error)),
    }
}

/// What to set aside where nobody says: twice what the run would cost on the dearest machine that could do it now, so that it
/// does not end half-way for want of it.
async fn ceiling(
    shared: &Arc<Shared>,
    caller: &Caller,
    order: &work::Wanted,
    wishes: &Wishes,
) -> Result<Credits, ApiError> {
    let budget = caller.budget(shared).await;
    let order = work::signed(shared, caller, order, &wishes.constraints, budget)?;
    let clock = shared.clock.now();
    let cost = shared.look(|c| c.explain_order(clock, &order).cost).await;
    let usual = wishes.ceiling(budget)?;
    Ok(match cost {
        Some((_, dearest)) => Credits(dearest.0.saturating_mul(2)).max(usual).min(budget),
        None => usual,
    })
}

async fn call_off(shared: &Shared, row: &Tuning) {
    let (caller, job) = (row.owner, row.job);
    let _ = shared
        .ask(move |request| Event::Cancel { request, caller, job })
        .await;
}

pub(super) async fn list(State(shared): State<Arc<Shared>>, uri: Uri, headers: HeaderMap) -> Answer {
    let caller = Caller::of(&shared, &headers).await?;
    let page = {
        let rows = lock(&shared.tunings.rows);
        let mine = rows.values().filter(|row| row.owner == caller.key);
        list::newest(&uri, 20, mine)
    };
    let mut jobs = Vec::with_capacity(page.rows.len());
    for row in &page.rows {
        jobs.push(shown::job(&shared, row).await);
    }
    Ok(json_response(StatusCode::OK, &page.body(&jobs)))
}

pub(super) async fn show(
    State(shared): State<Arc<Shared>>,
    UrlPath(id): UrlPath<String>,
    headers: HeaderMap,
) -> Answer {
    let caller = Caller::of(&shared, &headers).await?;
    let row = shared.tunings.get(caller.key, &id)?;
    Ok(json_response(StatusCode::OK, &shown::job(&shared, &row).await))
}

pub(super) async fn cancel(
    State(shared): State<Arc<Shared>>,
    UrlPath(id): UrlPath<String>,
    headers: HeaderMap,
) -> Answer {
    let caller = Caller::of(&shared, &headers).await?;
    let row = shared.tunings.get(caller.key, &id)?;
    let state = match &row.over {
        Some(over) => Some(over.state),
        None => shared.look(|c| c.job(&row.job)).await.map(|view| view.state),
    };
    if let Some(state) = state.filter(|state| state.ended()) {
        let why = format!(
            "the job has ended ({}): there is nothing to cancel",
            state.as_str()
        );
        return Err(ApiError::request(why));
    }
    call_off(&shared, &row).await;
    Ok(json_response(StatusCode::OK, &shown::job(&shared, &row).await))
}

pub(super) async fn events(
    State(shared): State<Arc<Shared>>,
    UrlPath(id): UrlPath<String>,
    uri: Uri,
    headers: HeaderMap,
) -> Answer {
    let caller = Caller::of(&shared, &headers).await?;
    let row = shared.tunings.get(caller.key, &id)?;
    let trail = results::trail(&shared, &row).await?;
    let page = list::page(&uri, 20, shown::events(&row, &trail), |event| {
        event["id"].as_str().unwrap_or_default()
    });
    Ok(json_response(StatusCode::OK, &page.body(&page.rows)))
}

pub(super) async fn checkpoints(
    State(shared): State<Arc<Shared>>,
    UrlPath(id): UrlPath<String>,
    uri: Uri,
    headers: HeaderMap,
) -> Answer {
    let caller = Caller::of(&shared, &headers).await?;
    let row = shared.tunings.get(caller.key, &id)?;
    let trail = results::trail(&shared, &row).await?;
    let page = list::page(
        &uri,
        10,
        shown::checkpoints(&shared.store, &row, &trail),
        |point| point["id"].as_str().unwrap_or_default(),
    );
    Ok(json_response(StatusCode::OK, &page.body(&page.rows)))
}

/// `DELETE /v1/models/NAME`, for the owner's own models. Its job and files stay.
pub(super) async fn delete_model(
    State(shared): State<Arc<Shared>>,
    UrlPath(name): UrlPath<String>,
    headers: HeaderMap,
) -> Answer {
    let caller = Caller::of(&shared, &headers).await?;
    let found = {
        let rows = lock(&shared.tunings.rows);
        let mut ready = rows
            .values()
            .filter(|row| row.owner == caller.key && row.is_ready());
        ready.find(|row| row.name == name).cloned()
    };
    let mut row = found.ok_or_else(|| ApiError::no_model(&name))?;
    if let Some(over) = &mut row.over {
        over.adapter = None;
    }
    shared.tunings.put(&shared, row, Vec::new()).await?;
    let body = serde_json::json!({"id": name, "object": "model", "deleted": true});
    Ok(json_response(StatusCode::OK, &body))
}
