//! `/v1/batches`: many requests as one order, split over nodes; answers in the order of the lines, each exactly once.
//!
//! Lines are translated one by one on their way in and on their way out, so a batch of a million takes no more memory
//! than one of ten. A line at fault is answered with its error; the others go on.
use super::{
    Answer, Caller, ask,
    ask::Wishes,
    chat, completions,
    error::{ApiError, json_response},
    files::{self, File, fresh, scratch},
    object,
    work::{self, now},
};
use crate::mind::{Shared, lock};
use axum::{
    body::Body,
    extract::{Path as UrlPath, State},
    http::{HeaderMap, StatusCode, Uri},
};
use karez_core::{
    artifact::ArtifactRef,
    controller::{Event, JobState, JobView},
    id::JobId,
    key::PublicKey,
    records::{Generate, Work},
};
use karez_ledger::{Op, Tables};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    hash::{BuildHasher, RandomState},
    io::{BufRead, BufReader, BufWriter, Read, Write},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};
use tempfile::NamedTempFile;

/// The table of the durable writer.
pub(crate) const TABLE: &str = "batches";
/// Lines of one batch at most.
const LINES_MAX: u64 = 2_000_000;
/// Batches of one key, and of all keys.
const BATCHES_OF_KEY_MAX: usize = 1_000;
const BATCHES_MAX: usize = 50_000;
/// Bytes of one result line at most.
const RESULT_MAX: u64 = 16 << 20;

/// What the lines ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Endpoint {
    #[serde(rename = "/v1/chat/completions")]
    Chat,
    #[serde(rename = "/v1/completions")]
    Completions,
    #[serde(rename = "/v1/embeddings")]
    Embeddings,
}

impl Endpoint {
    fn path(self) -> &'static str {
        match self {
            Self::Chat => "/v1/chat/completions",
            Self::Completions => "/v1/completions",
            Self::Embeddings => "/v1/embeddings",
        }
    }
}

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
    let (state, cause) = match &view {
        Some(view) => (view.state, view.cause.clone()),
        None => (JobState::Failed, "its job is no longer listed".into()),
    };
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
            outputs(&dir, &about, &parts)
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

type Written = (NamedTempFile, u64);

/// Result lines as OpenAI's: what was answered, and what was refused, both in the order of the input.
fn outputs(dir: &Path, batch: &Batch, parts: &[(PathBuf, Value)]) -> Result<(Written, Written), ApiError> {
    let disk = |e: std::io::Error| ApiError::unavailable(format!("the scheduler's disk: {e}"));
    let (mut good, mut bad) = (BufWriter::new(scratch(dir)?), BufWriter::new(scratch(dir)?));
    let (mut goods, mut bads, mut line) = (0, 0, Vec::new());
    let about = batch.about();
    for (path, place) in parts {
        let mut from = BufReader::new(std::fs::File::open(path).map_err(disk)?);
        loop {
            line.clear();
            let got = (&mut from)
                .take(RESULT_MAX)
                .read_until(b'\n', &mut line)
                .map_err(disk)?;
            if got == 0 {
                break;
            }
            let result: Map<String, Value> = serde_json::from_slice(&line)
                .map_err(|e| ApiError::server(format!("result {} is broken: {e}", goods + bads + 1)))?;
            let index = goods + bads;
            if result.get("index").and_then(Value::as_u64) != Some(index) {
                return Err(ApiError::server(format!(
                    "result {} belongs to another line",
                    index + 1
                )));
            }
            let (to, count, answer) = match answer(&about, index, &result, Some(place)) {
                (answer, true) => (&mut good, &mut goods, answer),
                (answer, false) => (&mut bad, &mut bads, answer),
            };
            writeln!(to, "{answer}").map_err(disk)?;
            *count += 1;
        }
    }
    if goods + bads != batch.lines {
        let why = format!("{} of {} lines were answered", goods + bads, batch.lines);
        return Err(ApiError::server(why));
    }
    let done = |file: BufWriter<NamedTempFile>| file.into_inner().map_err(|e| disk(e.into_error()));
    Ok(((done(good)?, goods), (done(bad)?, bads)))
}

/// What the answers of one batch have in common.
#[derive(Debug, Clone)]
struct About {
    id: String,
    endpoint: Endpoint,
    model: String,
    created_at: u64,
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

/// One line of an output file; false for an error file.
fn answer(batch: &About, index: u64, result: &Map<String, Value>, place: Option<&Value>) -> (Value, bool) {
    let request = format!("{}-{index}", batch.id);
    let custom_id = result.get("id").cloned().unwrap_or_default();
    let (status, body) = match result.get("error") {
        Some(error) => {
            let of = |name| error.get(name).and_then(Value::as_str).unwrap_or_default();
            (400, ApiError::line(of("kind"), of("message")).json())
        }
        None => (200, body(batch, &request, result)),
    };
    let mut line = json!({
        "id": request, "custom_id": custom_id,
        "response": {"status_code": status, "request_id": request, "body": body},
        "error": null,
    });
    if let Some(place) = place {
        line["karez"] = place.clone();
    }
    (line, status == 200)
}

fn body(batch: &About, request: &str, result: &Map<String, Value>) -> Value {
    let number = |name| result.get(name).and_then(Value::as_u64).unwrap_or(0);
    let (tokens_in, tokens_out) = (number("tokens_in"), number("tokens_out"));
    let usage = json!({
        "prompt_tokens": tokens_in, "completion_tokens": tokens_out, "total_tokens": tokens_in + tokens_out,
    });
    let text = result.get("text").cloned().unwrap_or_default();
    let (model, created, finish) = (&batch.model, batch.created_at, work::finish(result));
    match batch.endpoint {
        Endpoint::Chat => json!({
            "id": format!("chatcmpl-{request}"), "object": "chat.completion", "created": created, "model": model,
            "choices": [{
                "index": 0, "message": {"role": "assistant", "content": text, "refusal": null},
                "logprobs": result.get("logprobs").map(|logs| json!({"content": logs, "refusal": null})),
                "finish_reason": finish,
            }],
            "usage": usage,
        }),
        Endpoint::Completions => json!({
            "id": format!("cmpl-{request}"), "object": "text_completion", "created": created, "model": model,
            "choices": [{"index": 0, "text": text, "logprobs": null, "finish_reason": finish}],
            "usage": usage,
        }),
        Endpoint::Embeddings => json!({
            "object": "list", "model": model,
            "data": [{"object": "embedding", "index": 0, "embedding": result.get("embedding")}],
            "usage": {"prompt_tokens": 0, "total_tokens": 0},
        }),
    }
}

/// A batch file in OpenAI's format, as the input of a job: for whoever submits one without HTTP.
#[derive(Debug)]
pub struct BatchFile {
    /// Its lines.
    pub lines: u64,
    /// The model that all of them name.
    pub model: String,
    endpoint: Endpoint,
}

impl BatchFile {
    /// Reads and checks the file at `input`; the job's input is put together in `dir` and goes away with its handle. An
    /// error names the line.
    pub fn read(input: &Path, dir: &Path) -> Result<(NamedTempFile, Self), String> {
        let text = |e: ApiError| {
            e.json()["error"]["message"]
                .as_str()
                .unwrap_or_default()
                .to_owned()
        };
        let endpoint = Endpoint::of_file(input).map_err(text)?;
        let Translated { file, lines, model } = translate(dir, input, endpoint).map_err(text)?;
        let batch = Self {
            lines,
            model,
            endpoint,
        };
        Ok((file, batch))
    }

    /// Texts are to become vectors.
    pub fn embeds(&self) -> bool {
        self.endpoint == Endpoint::Embeddings
    }

    /// Prompts are continued as they stand.
    pub fn is_raw(&self) -> bool {
        self.endpoint == Endpoint::Completions
    }

    /// A result line as OpenAI's batch output has it. `id` names the batch.
    pub fn answer(&self, id: &str, result: &Map<String, Value>) -> Value {
        let about = About {
            id: id.to_owned(),
            endpoint: self.endpoint,
            model: self.model.clone(),
            created_at: now(),
        };
        let index = result.get("index").and_then(Value::as_u64).unwrap_or(0);
        answer(&about, index, result, None).0
    }
}

impl Endpoint {
    /// What the first line asks for.
    fn of_file(path: &Path) -> Result<Self, ApiError> {
        let disk = |e: std::io::Error| ApiError::request(format!("the file cannot be read: {e}"));
        let mut first = Vec::new();
        BufReader::new(std::fs::File::open(path).map_err(disk)?)
            .take(ask::LINE_MAX as u64)
            .read_until(b'\n', &mut first)
            .map_err(disk)?;
        let line: Map<String, Value> = serde_json::from_slice(&first)
            .map_err(|e| ApiError::request(format!("is no JSON object: {e}")).at_line(1))?;
        match ask::some(&line, "url") {
            None => Ok(Self::Chat),
            Some(url) => serde_json::from_value(url.clone()).map_err(|_| {
                let why = "must be /v1/chat/completions, /v1/completions or /v1/embeddings";
                ApiError::param("url", why).at_line(1)
            }),
        }
    }
}

/// What all lines have in common, found out on the way.
struct Translated {
    file: NamedTempFile,
    lines: u64,
    model: String,
}

/// The lines of a batch as those of a job's input.
fn translate(dir: &Path, input: &Path, endpoint: Endpoint) -> Result<Translated, ApiError> {
    let disk = |e: std::io::Error| ApiError::unavailable(format!("the scheduler's disk: {e}"));
    let mut from = BufReader::with_capacity(256 << 10, std::fs::File::open(input).map_err(disk)?);
    let mut to = BufWriter::with_capacity(256 << 10, scratch(dir)?);
    let hasher = RandomState::new();
    // Eight bytes for each id: of two million, two differ and collide once in ten million batches.
    let mut ids = HashSet::new();
    let (mut lines, mut number, mut model, mut line) = (0, 0u64, None::<String>, Vec::new());
    loop {
        line.clear();
        let most = ask::LINE_MAX as u64 + 2;
        let got = (&mut from)
            .take(most)
            .read_until(b'\n', &mut line)
            .map_err(disk)?;
        if got == 0 {
            break;
        }
        number += 1;
        if line.trim_ascii().is_empty() {
            continue;
        }
        let at = |error: ApiError| error.at_line(number);
        if line.len() as u64 >= most {
            return Err(at(ApiError::request(format!(
                "is longer than {} bytes",
                ask::LINE_MAX
            ))));
        }
        let (id, name, out) = one(&line, endpoint).map_err(at)?;
        if !ids.insert(hasher.hash_one(&id)) {
            return Err(at(ApiError::param(
                "custom_id",
                format!("{id:?} stands on an earlier line too"),
            )));
        }
        match &model {
            None => model = Some(name),
            Some(first) if *first != name => {
                let why = format!("is {name:?}, the lines before it say {first:?}: one model for each batch");
                return Err(at(ApiError::param("body.model", why)));
            }
            Some(_) => {}
        }
        lines += 1;
        if lines > LINES_MAX {
            return Err(ApiError::request(format!(
                "the batch has more than {LINES_MAX} lines: cut it"
            )));
        }
        let out = out.to_string();
        if out.len() > ask::LINE_MAX {
            return Err(at(ApiError::request(format!(
                "is longer than {} bytes",
                ask::LINE_MAX
            ))));
        }
        writeln!(to, "{out}").map_err(disk)?;
    }
    let model = model.ok_or_else(|| ApiError::request("the batch has no lines"))?;
    let file = to.into_inner().map_err(|e| disk(e.into_error()))?;
    Ok(Translated { file, lines, model })
}

/// One line: its id, its model, and what the job's input says instead.
fn one(line: &[u8], endpoint: Endpoint) -> Result<(String, String, Value), ApiError> {
    let line: Map<String, Value> =
        serde_json::from_slice(line).map_err(|e| ApiError::request(format!("is no JSON object: {e}")))?;
    let id = match ask::text(&line, "custom_id")? {
        Some(id) if (1..=512).contains(&id.len()) => id.to_owned(),
        _ => return Err(ApiError::param("custom_id", "must be a text of 1 to 512 bytes")),
    };
    if ask::text(&line, "method")?.is_some_and(|method| method != "POST") {
        return Err(ApiError::param("method", "must be POST"));
    }
    if ask::text(&line, "url")?.is_some_and(|url| url != endpoint.path()) {
        return Err(ApiError::param(
            "url",
            format!("must be {}, as the batch says", endpoint.path()),
        ));
    }
    let Some(Value::Object(body)) = line.get("body") else {
        return Err(ApiError::param("body", "must be an object"));
    };
    let inside = |error: ApiError| error.inside("body");
    let model = ask::text(body, "model").map_err(inside)?;
    let model = model
        .ok_or_else(|| inside(ApiError::param("model", "is missing")))?
        .to_owned();
    let mut out = match endpoint {
        Endpoint::Chat => chat::chat_line(body).map_err(inside)?,
        Endpoint::Completions => {
            let mut out = completions::sampling(body).map_err(inside)?;
            let prompt = ask::text(body, "prompt").map_err(inside)?;
            let prompt = prompt.ok_or_else(|| inside(ApiError::param("prompt", "must be a text")))?;
            out.insert("prompt".into(), prompt.into());
            out
        }
        Endpoint::Embeddings => {
            let text = ask::text(body, "input").map_err(inside)?;
            let text = text.ok_or_else(|| inside(ApiError::param("input", "must be a text")))?;
            Map::from_iter([("text".to_owned(), text.into())])
        }
    };
    out.insert("id".into(), id.clone().into());
    Ok((id, model, Value::Object(out)))
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
    let (model, lines) = (translated.model, translated.lines);
    let named = shared
        .model(&model)
        .await
        .ok_or_else(|| ApiError::no_model(&model))?;
    let input = files::store(&shared, translated.file).await?;
    let work = match endpoint {
        Endpoint::Embeddings => Work::Embed {
            model: named.artifact,
            model_name: model.clone(),
        },
        _ => {
            chat::expect_gguf(&model, &named.format)?;
            Work::Generate(Generate {
                raw: endpoint == Endpoint::Completions,
                keep_going: true,
                ..Generate::greedy(named.artifact, model.clone(), chat::TOKENS_MAX)
            })
        }
    };
    let job = order(&shared, &caller, work, input, lines, &wishes).await?;
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

async fn order(
    shared: &Arc<Shared>,
    caller: &Caller,
    work: Work,
    input: ArtifactRef,
    lines: u64,
    wishes: &Wishes,
) -> Result<JobId, ApiError> {
    work::order(shared, caller, work, input, lines, wishes, "batch").await
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
        (None, Some(view)) if !view.state.ended() => match batch.cancelling_at {
            Some(_) => ("cancelling", view.items_done, 0),
            None => ("in_progress", view.items_done, 0),
        },
        (None, _) => ("finalizing", batch.lines, 0),
    };
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
        "karez": {"job": batch.job.to_string()},
    })
}

pub(super) async fn list(State(shared): State<Arc<Shared>>, uri: Uri, headers: HeaderMap) -> Answer {
    let caller = Caller::of(&shared, &headers).await?;
    let mut mine: Vec<Batch> = lock(&shared.batches.rows)
        .values()
        .filter(|batch| batch.owner == caller.key)
        .cloned()
        .collect();
    mine.sort_by(|a, b| (b.created_at, &b.id).cmp(&(a.created_at, &a.id)));
    let mut all = Vec::with_capacity(mine.len());
    for batch in &mine {
        all.push((batch.id.as_str(), shown(&shared, batch).await));
    }
    Ok(json_response(
        StatusCode::OK,
        &files::page(&uri, all.into_iter(), 20),
    ))
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

#[cfg(test)]
mod tests {
    use super::*;
    use karez_core::id::Digest;

    fn batch(lines: u64) -> Batch {
        Batch {
            id: "batch_1".into(),
            owner: PublicKey([1; 32]),
            job: JobId(Digest::of(b"job")),
            endpoint: Endpoint::Chat,
            model: "m".into(),
            input: "file-1".into(),
            window: "24h".into(),
            metadata: None,
            lines,
            created_at: 1,
            cancelling_at: None,
            over: None,
        }
    }

    fn chat(id: &str, model: &str) -> String {
        json!({"custom_id": id, "method": "POST", "url": "/v1/chat/completions",
               "body": {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}})
        .to_string()
    }

    fn translated(text: &str) -> Result<(u64, String), String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("in");
        std::fs::write(&path, text).unwrap();
        translate(dir.path(), &path, Endpoint::Chat)
            .map(|t| (t.lines, std::fs::read_to_string(t.file.path()).unwrap()))
            .map_err(|e| e.json()["error"]["message"].as_str().unwrap().to_owned())
    }

    #[test]
    fn lines_keep_their_ids_and_their_wishes() {
        let (lines, text) = translated(&format!("{}\n\n{}\n", chat("a", "m"), chat("b", "m"))).unwrap();
        assert_eq!(lines, 2);
        let first: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        assert_eq!((&first["id"], &first["max_tokens"]), (&json!("a"), &json!(3)));
        assert_eq!(first["messages"][0]["content"], "hi");
    }

    #[test]
    fn a_bad_line_is_named_with_its_field() {
        let good = chat("a", "m");
        for (line, says) in [
            ("{".to_owned(), &["line 2", "JSON"][..]),
            (chat("a", "m"), &["line 2", "custom_id", "earlier"]),
            (chat("b", "other"), &["line 2", "body.model", "one model"]),
            (json!({"body": {}}).to_string(), &["line 2", "custom_id"]),
            (json!({"custom_id": "b"}).to_string(), &["line 2", "body"]),
            (
                json!({"custom_id": "b", "url": "/v1/embeddings", "body": {}}).to_string(),
                &["line 2", "url"],
            ),
            (
                json!({"custom_id": "b", "body": {"model": "m", "messages": [], "temperature": 1}}).to_string(),
                &["line 2", "body.messages"],
            ),
            (
                json!({"custom_id": "b", "body": {"model": "m", "messages": [{"role": "user"}], "temperature": 99}})
                    .to_string(),
                &["line 2", "body.temperature"],
            ),
        ] {
            let error = translated(&format!("{good}\n{line}\n")).unwrap_err();
            for word in says {
                assert!(error.contains(word), "{word} is not in {error}");
            }
        }
        assert!(translated("\n").unwrap_err().contains("no lines"));
    }

    #[test]
    fn results_must_be_each_line_once_and_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let part = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            (path, json!({"node": name}))
        };
        let good = r#"{"index":0,"id":"a","text":"x","tokens_in":1,"tokens_out":2,"finish":"stop"}"#;
        let bad = r#"{"index":1,"id":"b","error":{"kind":"context_overflow","message":"too long"}}"#;
        let parts = [
            part("one", &format!("{good}\n")),
            part("two", &format!("{bad}\n")),
        ];
        let ((good, goods), (bad, bads)) = outputs(dir.path(), &batch(2), &parts).unwrap();
        assert_eq!((goods, bads), (1, 1));
        let read = |file: &NamedTempFile| -> Value {
            serde_json::from_str(std::fs::read_to_string(file.path()).unwrap().trim()).unwrap()
        };
        let (good, bad) = (read(&good), read(&bad));
        assert_eq!(
            (&good["custom_id"], &bad["custom_id"]),
            (&json!("a"), &json!("b"))
        );
        assert_eq!(good["response"]["body"]["choices"][0]["message"]["content"], "x");
        assert_eq!(
            bad["response"]["body"]["error"]["code"],
            "context_length_exceeded"
        );
        assert_eq!(bad["karez"]["node"], "two");
        // One too few, one twice.
        assert!(outputs(dir.path(), &batch(3), &parts).is_err());
        let twice = [parts[0].clone(), parts[0].clone()];
        assert!(outputs(dir.path(), &batch(2), &twice).is_err());
    }
}
