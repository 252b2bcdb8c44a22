//! `/v1/batches`: many requests as one order, split over nodes; answers in the order of the lines, each exactly once.
//!
//! Lines are translated one by one on their way in and on their way out, so a batch of a million takes no more memory
//! than one of ten. A line at fault is answered with its error; the others go on.
//!
//! Here stand the batches themselves, from request to end; `lines` translates what goes in, `outputs` what comes out, and
//! `file` does both for those who submit a batch file without HTTP.
mod file;
mod lines;
mod outputs;

use super::{
    Answer, Caller, ask,
    ask::Wishes,
    error::{ApiError, json_response},
    files::{self, File, fresh},
    list, object,
    work::{self, now},
};
use crate::mind::{Shared, lock};
use axum::{
    body::Body,
    extract::{Path as UrlPath, State},
    http::{HeaderMap, StatusCode, Uri},
};
use karez_core::{
    controller::{Event, JobState, JobView},
    id::JobId,
    key::PublicKey,
    records::{Generate, Work},
};
use karez_ledger::{Op, Tables};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{Arc, Mutex},
};

pub use file::BatchFile;
use lines::{Endpoint, translate};
use outputs::{About, outputs};

/// The table of the durable writer.
pub(crate) const TABLE: &str = "batches";
/// Batches of one key, and of all keys.
const BATCHES_OF_KEY_MAX: usize = 1_000;
const BATCHES_MAX: usize = 50_000;

/// One batch.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Batch {
    id: String,
    owner: PublicKey,
    job: JobId,
    endpoint: Endpoint,
    model: String,
    input: String,
    window: String,
    metadata: Option<Value>,
    lines: u64,
    created_at: u64,
    cancelling_at: Option<u64>,
    over: Option<Over>,
}

impl list::Row for Batch {
    fn id(&self) -> &str {
        &self.id
    }
    fn created_at(&self) -> u64 {
        self.created_at
    }
}

impl Batch {
    fn about(&self) -> About {
        About {
            id: self.id.clone(),
            endpoint: self.endpoint,
            model: self.model.clone(),
            created_at: self.created_at,
        }
    }
}

/// How it ended.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Over {
    at: u64,
    state: JobState,
    cause: String,
    output: Option<String>,
    errors: Option<String>,
    completed: u64,
    failed: u64,
}

#[derive(Default)]
pub(crate) struct Batches {
    rows: Mutex<BTreeMap<String, Batch>>,
    /// Those whose results are being put together.
    closing: Mutex<BTreeSet<String>>,
}

impl Batches {
    /// The batches on disk. A row that cannot be read is left out, with a warning.
    pub(crate) fn restore(tables: &Tables) -> Self {
        let batches = Self::default();
        for (key, value) in tables.rows(TABLE) {
            match serde_json::from_slice::<Batch>(value) {
                Ok(batch) => drop(lock(&batches.rows).insert(batch.id.clone(), batch)),
                Err(error) => {
                    let id = String::from_utf8_lossy(key);
                    tracing::warn!(%id, %error, "a stored batch cannot be read: left out");
                }
            }
        }
        batches
    }

    fn get(&self, owner: PublicKey, id: &str) -> Result<Batch, ApiError> {
        let found = lock(&self.rows)
            .get(id)
            .filter(|batch| batch.owner == owner)
            .cloned();
        found.ok_or_else(|| ApiError::not_found("there is no such batch of yours"))
    }

    async fn put(&self, shared: &Shared, batch: Batch, files: Vec<File>) -> Result<(), ApiError> {
        let op = Op::Put {
            table: TABLE,
            key: batch.id.clone().into_bytes(),
            value: serde_json::to_vec(&batch).unwrap_or_default(),
        };
        shared.files.keep(shared, files, vec![op]).await?;
        lock(&self.rows).insert(batch.id.clone(), batch);
        Ok(())
    }

    /// Puts together what came of batches whose jobs have ended. Before their results may be evicted.
    pub(crate) async fn sweep(&self, shared: &Arc<Shared>) {
        let left: Vec<String> = lock(&self.rows)
            .values()
            .filter(|batch| !shared.members.contains(&batch.owner))
            .map(|batch| batch.id.clone())
            .collect();
        for id in left {
            let op = Op::Delete {
                table: TABLE,
                key: id.as_bytes().to_vec(),
            };
            if files::commit(shared, vec![op]).await.is_ok() {
                lock(&self.rows).remove(&id);
            }
        }
        let open: Vec<Batch> = lock(&self.rows)
            .values()
            .filter(|batch| batch.over.is_none())
            .cloned()
            .collect();
        for batch in open {
            let view = shared.look(|c| c.job(&batch.job)).await;
            if view.as_ref().is_none_or(|view| view.state.ended())
                && lock(&self.closing).insert(batch.id.clone())
            {
                let id = batch.id.clone();
                if let Err(error) = close(shared, batch, view).await {
                    tracing::warn!(batch = %id, error = %error.json(), "a batch cannot be closed yet");
                }
                lock(&self.closing).remove(&id);
            }
        }
    }
}

/// Writes the output and error files and the batch's end.
async fn close(shared: &Arc<Shared>, mut batch: Batch, view: Option<JobView>) -> Result<(), ApiError> {
    let (state, cause) = work::ended_as(view.as_ref());
    let mut over = Over {
        at: now(),
        state,
        cause,
        output: None,
        errors: None,
        completed: 0,
        failed: 0,
    };
    let mut kept = Vec::new();
    if let Some(view) = view.filter(|view| view.state == JobState::Done) {
        let (dir, store, about) = (shared.dir.clone(), shared.store.clone(), batch.clone());
        let written = tokio::task::spawn_blocking(move || {
            let parts: Result<Vec<(PathBuf, Value)>, _> = view
                .parts
                .iter()
                .map(|part| {
                    let result = part.result.as_ref().ok_or("a part has no result")?;
                    let path = store.path(result).map_err(|e| e.to_string())?;
                    let place = json!({
                        "node": part.node_name, "receipt": part.receipt.map(|id| id.to_string()),
                        "institution": part.institution.as_ref().map(ToString::to_string),
                    });
                    Ok::<_, String>((path, place))
                })
                .collect();
            let parts = parts.map_err(ApiError::server)?;
            outputs(&dir, &about.about(), about.lines, &parts)
        });
        match written
            .await
            .map_err(|_| ApiError::server("putting the results together failed"))?
        {
            Ok(files) => {
                for (what, (file, lines)) in [("output", files.0), ("errors", files.1)] {
                    let errors = what == "errors";
                    if errors {
                        over.failed = lines;
                    } else {
                        over.completed = lines;
                    }
                    if lines == 0 {
                        continue;
                    }
                    let file = File {
                        id: fresh("file")?,
                        owner: batch.owner,
                        artifact: files::store(shared, file).await?,
                        name: format!("{}_{what}.jsonl", batch.id),
                        purpose: "batch_output".into(),
                        created_at: over.at,
                    };
                    *(if errors {
                        &mut over.errors
                    } else {
                        &mut over.output
                    }) = Some(file.id.clone());
                    kept.push(file);
                }
            }
            // Nothing that trying again would mend.
            Err(error) => {
                over.state = JobState::Failed;
                over.cause = error.json()["error"]["message"]
                    .as_str()
                    .unwrap_or_default()
                    .to_owned();
            }
        }
    }
    batch.over = Some(over);
    shared.batches.put(shared, batch, kept).await
}

pub(super) async fn create(State(shared): State<Arc<Shared>>, headers: HeaderMap, body: Body) -> Answer {
    let caller = Caller::of(&shared, &headers).await?;
    let body = object(body).await?;
    let endpoint = ask::some(&body, "endpoint").cloned().unwrap_or_default();
    let endpoint: Endpoint = serde_json::from_value(endpoint).map_err(|_| {
        ApiError::param(
            "endpoint",
            "must be /v1/chat/completions, /v1/completions or /v1/embeddings",
        )
    })?;
    let input = ask::text(&body, "input_file_id")?;
    let input = input.ok_or_else(|| ApiError::param("input_file_id", "is missing"))?;
    let file = shared.files.get(caller.key, input)?;
    let window = ask::text(&body, "completion_window")?.unwrap_or("24h").to_owned();
    let metadata = ask::some(&body, "metadata").cloned();
    if metadata.as_ref().is_some_and(|m| m.to_string().len() > 16 << 10) {
        return Err(ApiError::param("metadata", "is longer than 16 KiB"));
    }
    let wishes = Wishes::of(&body)?;
    {
        let rows = lock(&shared.batches.rows);
        let mine = rows.values().filter(|batch| batch.owner == caller.key).count();
        if mine >= BATCHES_OF_KEY_MAX || rows.len() >= BATCHES_MAX {
            let why = format!("{mine} batches are kept for this key, the limit is {BATCHES_OF_KEY_MAX}");
            return Err(ApiError::budget(why));
        }
    }
    let pin = shared.store.pin(&file.artifact);
    let pin = pin.map_err(|e| ApiError::unavailable(format!("the file cannot be read: {e}")))?;
    let path = shared.store.path(&file.artifact);
    let path = path.map_err(|e| ApiError::unavailable(format!("the file cannot be read: {e}")))?;
    let dir = shared.dir.clone();
    let translated = tokio::task::spawn_blocking(move || {
        let _pin = pin;
        translate(&dir, &path, endpoint)
    });
    let translated = translated
        .await
        .map_err(|_| ApiError::server("reading the batch failed"))??;
    let (model, lines, tokens_max) = (translated.model, translated.lines, translated.tokens_max);
    let found = ask::named(&shared, &caller, &model).await?;
    let input = files::store(&shared, translated.file).await?;
    let work = match endpoint {
        Endpoint::Embeddings => Work::Embed {
            model: found.alone()?,
            model_name: model.clone(),
        },
        _ => Work::Generate(Generate {
            raw: endpoint == Endpoint::Completions,
            keep_going: true,
            ..found.writes(tokens_max)?
        }),
    };
    let order = work::Wanted {
        work,
        input,
        items: lines,
        items_per_part: 0,
        label: "batch",
    };
    let job = work::order(&shared, &caller, &order, &wishes).await?;
    let batch = Batch {
        id: fresh("batch")?.replace('-', "_"),
        owner: caller.key,
        job,
        endpoint,
        model,
        input: file.id,
        window,
        metadata,
        lines,
        created_at: now(),
        cancelling_at: None,
        over: None,
    };
    if let Err(error) = shared.batches.put(&shared, batch.clone(), Vec::new()).await {
        call_off(&shared, &batch).await;
        return Err(error);
    }
    Ok(json_response(StatusCode::OK, &shown(&shared, &batch).await))
}

async fn call_off(shared: &Shared, batch: &Batch) {
    let (caller, job) = (batch.owner, batch.job);
    let _ = shared
        .ask(move |request| Event::Cancel { request, caller, job })
        .await;
}

async fn shown(shared: &Shared, batch: &Batch) -> Value {
    let view = match &batch.over {
        Some(_) => None,
        None => shared.look(|c| c.job(&batch.job)).await,
    };
    let (status, completed, failed) = match (&batch.over, &view) {
        (Some(over), _) => {
            let status = match over.state {
                JobState::Done => "completed",
                JobState::Cancelled => "cancelled",
                _ => "failed",
            };
            (status, over.completed, over.failed)
        }
        (None, Some(view)) => {
            let status = match (view.state, batch.cancelling_at) {
                (JobState::Done, _) => "finalizing",
                (_, Some(_)) => "cancelling",
                (_, None) => "in_progress",
            };
            (status, view.items_done, 0)
        }
        (None, None) => ("finalizing", 0, 0),
    };
    // What holds up the first that is held up.
    let waits = view.as_ref().and_then(|view| {
        let mut queued = view.parts.iter().filter(|part| part.state == JobState::Queued);
        queued.find(|part| !part.cause.is_empty()).map(|part| &part.cause)
    });
    let over = batch.over.as_ref();
    let when = |state: JobState| over.filter(|over| over.state == state).map(|over| over.at);
    let errors = over.filter(|over| over.state == JobState::Failed).map(|over| {
        json!({"object": "list", "data": [{"code": "failed", "message": over.cause, "param": null, "line": null}]})
    });
    json!({
        "id": batch.id, "object": "batch", "endpoint": batch.endpoint, "model": batch.model, "errors": errors,
        "input_file_id": batch.input, "completion_window": batch.window, "status": status,
        "output_file_id": over.and_then(|over| over.output.as_ref()),
        "error_file_id": over.and_then(|over| over.errors.as_ref()),
        "created_at": batch.created_at, "in_progress_at": batch.created_at, "expires_at": null,
        "finalizing_at": null, "expired_at": null, "cancelling_at": batch.cancelling_at,
        "completed_at": when(JobState::Done), "failed_at": when(JobState::Failed),
        "cancelled_at": when(JobState::Cancelled),
        "request_counts": {"total": batch.lines, "completed": completed, "failed": failed},
        "metadata": batch.metadata,
        "karez": {"job": batch.job.to_string(), "waits": waits},
    })
}

pub(super) async fn list(State(shared): State<Arc<Shared>>, uri: Uri, headers: HeaderMap) -> Answer {
    let caller = Caller::of(&shared, &headers).await?;
    let page = {
        let rows = lock(&shared.batches.rows);
        let mine = rows.values().filter(|batch| batch.owner == caller.key);
        list::newest(&uri, 20, mine)
    };
    let mut batches = Vec::with_capacity(page.rows.len());
    for batch in &page.rows {
        batches.push(shown(&shared, batch).await);
    }
    Ok(json_response(StatusCode::OK, &page.body(&batches)))
}

pub(super) async fn show(
    State(shared): State<Arc<Shared>>,
    UrlPath(id): UrlPath<String>,
    headers: HeaderMap,
) -> Answer {
    let caller = Caller::of(&shared, &headers).await?;
    let batch = shared.batches.get(caller.key, &id)?;
    Ok(json_response(StatusCode::OK, &shown(&shared, &batch).await))
}

pub(super) async fn cancel(
    State(shared): State<Arc<Shared>>,
    UrlPath(id): UrlPath<String>,
    headers: HeaderMap,
) -> Answer {
    let caller = Caller::of(&shared, &headers).await?;
    let mut batch = shared.batches.get(caller.key, &id)?;
    if batch.over.is_none() {
        call_off(&shared, &batch).await;
        batch.cancelling_at = Some(now());
        shared.batches.put(&shared, batch.clone(), Vec::new()).await?;
    }
    Ok(json_response(StatusCode::OK, &shown(&shared, &batch).await))
}
