//! `/v1/files`: inputs of batches, data to learn from, and what came of both, kept as artifacts.
//!
//! A row names the artifact, and a pin keeps it while the row stands. Bounded by files and bytes of a key and of all.
use super::{
    Answer, Caller,
    error::{ApiError, json_response},
    list,
};
use crate::{
    mind::{Shared, lock},
    service::Service,
};
use axum::{
    body::{Body, Bytes},
    extract::{Path as UrlPath, State},
    http::{HeaderMap, HeaderValue, StatusCode, Uri, header},
    response::Response,
};
use karez_core::{artifact::ArtifactRef, key::PublicKey};
use karez_ledger::{Op, Tables, Transaction};
use karez_net::store::{ArtifactStore, Pin};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, HashMap},
    io::{Read, Write},
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};
use tempfile::{NamedTempFile, TempDir};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;

/// The table of the durable writer.
pub(crate) const TABLE: &str = "files";
/// The purpose of files to learn from.
pub(super) const TRAINING: &str = "fine-tune";
/// Where uploads wait, in the scheduler's directory.
const FOLDER: &str = "uploads";
/// Bytes of one upload at most.
const FILE_MAX: u64 = 4 << 30;
/// Files of one key, and of all keys.
const FILES_OF_KEY_MAX: usize = 1_000;
const FILES_MAX: usize = 50_000;
/// Between two pieces of an upload.
const PIECE_WAIT: Duration = Duration::from_secs(60);

/// One file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct File {
    pub(super) id: String,
    pub(super) owner: PublicKey,
    pub(super) artifact: ArtifactRef,
    pub(super) name: String,
    pub(super) purpose: String,
    pub(super) created_at: u64,
}

impl list::Row for File {
    fn id(&self) -> &str {
        &self.id
    }
    fn created_at(&self) -> u64 {
        self.created_at
    }
}

#[derive(Default)]
pub(crate) struct Files {
    rows: Mutex<BTreeMap<String, File>>,
    pins: Mutex<HashMap<String, Pin>>,
    /// One change at a time, so that disk and memory agree.
    changing: tokio::sync::Mutex<()>,
}

impl Files {
    /// The files on disk. A row that cannot be read is left out, with a warning.
    pub(crate) fn restore(tables: &Tables, store: &ArtifactStore) -> Self {
        let files = Self::default();
        for (key, value) in tables.rows(TABLE) {
            match serde_json::from_slice::<File>(value) {
                Ok(file) => {
                    if let Ok(pin) = store.pin(&file.artifact) {
                        lock(&files.pins).insert(file.id.clone(), pin);
                    }
                    lock(&files.rows).insert(file.id.clone(), file);
                }
                Err(error) => {
                    let id = String::from_utf8_lossy(key);
                    tracing::warn!(%id, %error, "a stored file cannot be read: left out");
                }
            }
        }
        files
    }

    pub(super) fn get(&self, owner: PublicKey, id: &str) -> Result<File, ApiError> {
        let found = lock(&self.rows)
            .get(id)
            .filter(|file| file.owner == owner)
            .cloned();
        found.ok_or_else(|| ApiError::not_found(format!("there is no file {:?} of yours", cut(id))))
    }

    /// Keeps a file, with other rows in the same transaction. On disk when it returns `Ok`.
    pub(super) async fn keep(
        &self,
        shared: &Shared,
        files: Vec<File>,
        mut more: Vec<Op>,
    ) -> Result<(), ApiError> {
        let _one = self.changing.lock().await;
        let mut pins = Vec::new();
        for file in &files {
            let pin = shared.store.pin(&file.artifact);
            pins.push(pin.map_err(|e| ApiError::unavailable(format!("the file cannot be kept: {e}")))?);
            more.push(Op::Put {
                table: TABLE,
                key: file.id.clone().into_bytes(),
                value: serde_json::to_vec(file).unwrap_or_default(),
            });
        }
        commit(shared, more).await?;
        for (file, pin) in files.into_iter().zip(pins) {
            lock(&self.pins).insert(file.id.clone(), pin);
            lock(&self.rows).insert(file.id.clone(), file);
        }
        Ok(())
    }

    async fn remove(&self, shared: &Shared, id: &str) -> Result<(), ApiError> {
        let _one = self.changing.lock().await;
        let op = Op::Delete {
            table: TABLE,
            key: id.as_bytes().to_vec(),
        };
        commit(shared, vec![op]).await?;
        lock(&self.rows).remove(id);
        let pin = lock(&self.pins).remove(id);
        drop(pin);
        Ok(())
    }

    /// Lets go of what belonged to keys that were taken back.
    pub(crate) async fn sweep(&self, shared: &Shared) {
        let left: Vec<String> = lock(&self.rows)
            .values()
            .filter(|file| !shared.members.contains(&file.owner))
            .map(|file| file.id.clone())
            .collect();
        for id in left {
            // Tried again at the next sweep.
            let _ = self.remove(shared, &id).await;
        }
    }

    /// Whether `owner` may keep one more.
    fn room(&self, shared: &Shared, owner: PublicKey) -> Result<(), ApiError> {
        let rows = lock(&self.rows);
        let mine = rows.values().filter(|file| file.owner == owner).count();
        if mine >= FILES_OF_KEY_MAX || rows.len() >= FILES_MAX {
            return Err(ApiError::budget(format!(
                "{mine} files are kept for this key, the limit is {FILES_OF_KEY_MAX}: delete some"
            )));
        }
        let kept: u64 = rows.values().map(|file| file.artifact.bytes.0).sum();
        if kept > shared.config.artifacts.limit.0 / 2 {
            return Err(ApiError::budget(
                "the scheduler keeps as many bytes of files as it may: delete some of yours",
            ));
        }
        Ok(())
    }
}

pub(super) async fn commit(shared: &Shared, ops: Vec<Op>) -> Result<(), ApiError> {
    let done = shared.writer.commit(Transaction { ops }).await;
    done.map(drop).map_err(|e| ApiError::unavailable(e.to_string()))
}

/// A fresh id.
pub(super) fn fresh(prefix: &str) -> Result<String, ApiError> {
    let mut random = [0; 12];
    getrandom::fill(&mut random)
        .map_err(|e| ApiError::server(format!("the system has no randomness: {e}")))?;
    Ok(random
        .iter()
        .fold(format!("{prefix}-"), |id, byte| format!("{id}{byte:02x}")))
}

/// A file for what is being written, empty; gone with the value.
pub(super) fn scratch(dir: &std::path::Path) -> Result<NamedTempFile, ApiError> {
    let folder: PathBuf = dir.join(FOLDER);
    std::fs::create_dir_all(&folder)
        .and_then(|()| NamedTempFile::new_in(&folder))
        .map_err(|e| ApiError::unavailable(format!("the scheduler's disk: {e}")))
}

/// The same for a folder.
pub(super) fn scratch_folder(dir: &std::path::Path) -> Result<TempDir, ApiError> {
    let folder: PathBuf = dir.join(FOLDER);
    std::fs::create_dir_all(&folder)
        .and_then(|()| TempDir::new_in(&folder))
        .map_err(|e| ApiError::unavailable(format!("the scheduler's disk: {e}")))
}

/// Removes what a crash left of uploads.
pub(crate) fn sweep(dir: &std::path::Path) {
    let _ = std::fs::remove_dir_all(dir.join(FOLDER));
}

fn cut(text: &str) -> String {
    text.chars().take(80).collect()
}

pub(super) fn shown(file: &File) -> Value {
    json!({
        "id": file.id, "object": "file", "bytes": file.artifact.bytes.0, "created_at": file.created_at,
        "filename": file.name, "purpose": file.purpose, "status": "processed",
        "karez": {"digest": file.artifact.digest.to_string()},
    })
}

pub(super) async fn create(State(shared): State<Arc<Shared>>, headers: HeaderMap, body: Body) -> Answer {
    let caller = Caller::of(&shared, &headers).await?;
    Service(shared.clone()).room_on_disk()?;
    shared.files.room(&shared, caller.key)?;
    let kind = headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok());
    let boundary = kind
        .and_then(|kind| multer::parse_boundary(kind).ok())
        .ok_or_else(|| ApiError::request("send the file as multipart/form-data"))?;
    let mut form = multer::Multipart::new(body.into_data_stream(), boundary);
    let (mut purpose, mut taken) = (None, None);
    let broken = |error: multer::Error| ApiError::request(format!("the form is broken: {error}"));
    while let Some(mut field) = timeout(PIECE_WAIT, form.next_field())
        .await
        .map_err(|_| late())?
        .map_err(broken)?
    {
        match field.name() {
            Some("purpose") => {
                let mut text = Vec::new();
                while let Some(piece) = field.chunk().await.map_err(broken)? {
                    if text.len() + piece.len() > 64 {
                        return Err(ApiError::param("purpose", "is longer than 64 bytes"));
                    }
                    text.extend_from_slice(&piece);
                }
                purpose = String::from_utf8(text).ok();
            }
            Some("file") => {
                let name = cut(field.file_name().unwrap_or("file"));
                let file = scratch(&shared.dir)?;
                // A thread writes, two pieces behind at most.
                let (pieces, mut to_write) = mpsc::channel::<Bytes>(2);
                let writing = tokio::task::spawn_blocking(move || {
                    let mut file = file;
                    while let Some(piece) = to_write.blocking_recv() {
                        file.write_all(&piece)?;
                    }
                    file.flush()?;
                    Ok::<_, std::io::Error>(file)
                });
                let mut bytes = 0;
                while let Some(piece) = timeout(PIECE_WAIT, field.chunk())
                    .await
                    .map_err(|_| late())?
                    .map_err(broken)?
                {
                    bytes += piece.len() as u64;
                    if bytes > FILE_MAX {
                        return Err(ApiError::param(
                            "file",
                            format!("is larger than {} GiB", FILE_MAX >> 30),
                        ));
                    }
                    if pieces.send(piece).await.is_err() {
                        break;
                    }
                }
                drop(pieces);
                let file = writing
                    .await
                    .map_err(|_| ApiError::server("writing the file failed"))?
                    .map_err(|e| ApiError::unavailable(format!("the scheduler's disk: {e}")))?;
                taken = Some((name, file, bytes));
            }
            _ => {}
        }
    }
    let purpose = purpose.unwrap_or_default();
    if !matches!(purpose.as_str(), "batch" | TRAINING) {
        return Err(ApiError::param("purpose", "must be batch or fine-tune"));
    }
    let Some((name, file, bytes)) = taken else {
        return Err(ApiError::param("file", "is missing"));
    };
    if bytes == 0 {
        return Err(ApiError::param("file", "is empty"));
    }
    let artifact = store(&shared, file).await?;
    let file = File {
        id: fresh("file")?,
        owner: caller.key,
        artifact,
        name,
        purpose,
        created_at: super::work::now(),
    };
    shared.files.keep(&shared, vec![file.clone()], Vec::new()).await?;
    Ok(json_response(StatusCode::OK, &shown(&file)))
}

fn late() -> ApiError {
    ApiError::request("the upload stood still for too long")
}

/// A scratch file as an artifact.
pub(super) async fn store(shared: &Shared, file: NamedTempFile) -> Result<ArtifactRef, ApiError> {
    let store = shared.store.clone();
    let stored = tokio::task::spawn_blocking(move || store.add_file(file.path())).await;
    match stored {
        Ok(Ok(artifact)) => Ok(artifact),
        Ok(Err(error)) => Err(ApiError::unavailable(format!(
            "the file cannot be stored: {error}"
        ))),
        Err(_) => Err(ApiError::server("storing the file failed")),
    }
}

pub(super) async fn list(State(shared): State<Arc<Shared>>, uri: Uri, headers: HeaderMap) -> Answer {
    let caller = Caller::of(&shared, &headers).await?;
    let page = {
        let rows = lock(&shared.files.rows);
        list::newest(
            &uri,
            10_000,
            rows.values().filter(|file| file.owner == caller.key),
        )
    };
    let files: Vec<Value> = page.rows.iter().map(shown).collect();
    Ok(json_response(StatusCode::OK, &page.body(&files)))
}

pub(super) async fn show(
    State(shared): State<Arc<Shared>>,
    UrlPath(id): UrlPath<String>,
    headers: HeaderMap,
) -> Answer {
    let caller = Caller::of(&shared, &headers).await?;
    let file = shared.files.get(caller.key, &id)?;
    Ok(json_response(StatusCode::OK, &shown(&file)))
}

pub(super) async fn delete(
    State(shared): State<Arc<Shared>>,
    UrlPath(id): UrlPath<String>,
    headers: HeaderMap,
) -> Answer {
    let caller = Caller::of(&shared, &headers).await?;
    let file = shared.files.get(caller.key, &id)?;
    shared.files.remove(&shared, &file.id).await?;
    Ok(json_response(
        StatusCode::OK,
        &json!({"id": file.id, "object": "file", "deleted": true}),
    ))
}

pub(super) async fn content(
    State(shared): State<Arc<Shared>>,
    UrlPath(id): UrlPath<String>,
    headers: HeaderMap,
) -> Answer {
    let caller = Caller::of(&shared, &headers).await?;
    let file = shared.files.get(caller.key, &id)?;
    let gone =
        |e: karez_net::store::StoreError| ApiError::unavailable(format!("the file cannot be read: {e}"));
    let pin = shared.store.pin(&file.artifact).map_err(gone)?;
    let path = shared.store.path(&file.artifact).map_err(gone)?;
    let (pieces, body) = mpsc::channel::<Result<Bytes, std::io::Error>>(2);
    tokio::task::spawn_blocking(move || {
        let _pin = pin;
        let read = || {
            let mut from = std::fs::File::open(path)?;
            let mut buffer = vec![0; 256 << 10];
            loop {
                let got = from.read(&mut buffer)?;
                if got == 0
                    || pieces
                        .blocking_send(Ok(Bytes::copy_from_slice(&buffer[..got])))
                        .is_err()
                {
                    return Ok(());
                }
            }
        };
        if let Err(error) = read() {
            let _ = pieces.blocking_send(Err(error));
        }
    });
    let mut response = Response::new(Body::from_stream(ReceiverStream::new(body)));
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/octet-stream"),
    );
    headers.insert(header::CONTENT_LENGTH, file.artifact.bytes.0.into());
    Ok(response)
}
