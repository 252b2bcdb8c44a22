//! HTTP as OpenAI's clients speak it, in front of ordinary orders.
//!
//! | file | what lives there |
//! |---|---|
//! | `mod` | the listener, the routes, who calls |
//! | `ask` | what requests have in common: fields, wishes where to run |
//! | `work` | one request as one signed order, from its input to its results; answers that move between nodes |
//! | `verify` | an answer held against another institution's |
//! | `chat`, `completions`, `embeddings` | what is asked and how it is answered |
//! | `files`, `batches` | many lines at a time |
//! | `tuning` | fine-tuning jobs, and the models that come of them |
//! | `list` | pages of lists |
//! | `error` | refusals in OpenAI's shape |
//!
//! The bearer token *is* the key: the Ed25519 secret that signs the orders is derived from it for as long as the request
//! lasts, and kept nowhere. What the scheduler stores is the public key, as of every member, and the user's signed
//! delegation that admitted it.
mod ask;
pub(crate) mod batches;
mod chat;
mod completions;
mod embeddings;
mod error;
pub(crate) mod files;
mod list;
pub(crate) mod tuning;
mod verify;
mod work;

use crate::{config, daemon::DaemonError, mind::Shared};
use axum::{
    Router,
    body::Body,
    extract::{Path as UrlPath, State},
    http::{HeaderMap, StatusCode, header},
    response::Response,
    routing::{get, post},
};
use error::{ApiError, json_response};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use karez_core::{
    apikey::ApiToken,
    id::Institution,
    key::{PublicKey, SecretKey, UserId},
    unit::Credits,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use serde_json::{Map, Value, json};
use std::{fs, path::Path, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    sync::Semaphore,
    task::JoinSet,
    time::timeout,
};
use tokio_rustls::TlsAcceptor;

/// Connections at a time.
const CONNECTIONS_MAX: usize = 2048;
/// Bytes of a JSON request at most.
const BODY_MAX: usize = 16 << 20;
/// A request's headers must have arrived within this, its body too.
const HEADERS_MAX: Duration = Duration::from_secs(30);
const BODY_WAIT: Duration = Duration::from_secs(120);
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);

type Answer = Result<Response, ApiError>;

/// The certificate, when one is configured.
pub(crate) fn tls(config: &config::Gateway, dir: &Path) -> Result<Option<TlsAcceptor>, DaemonError> {
    let config::Gateway {
        certificate: Some(certificate),
        key: Some(key),
        ..
    } = config
    else {
        return Ok(None);
    };
    let read = |path: &Path, setting| {
        let path = dir.join(path);
        fs::read(&path).map_err(|error| DaemonError::File { path, setting, error })
    };
    let bad = |path: &Path, setting, why: String| DaemonError::File {
        path: dir.join(path),
        setting,
        error: std::io::Error::other(why),
    };
    let chain: Result<Vec<_>, _> =
        CertificateDer::pem_slice_iter(&read(certificate, "gateway.certificate")?).collect();
    let chain = chain.map_err(|e| bad(certificate, "gateway.certificate", e.to_string()))?;
    let secret = PrivateKeyDer::from_pem_slice(&read(key, "gateway.key")?)
        .map_err(|e| bad(key, "gateway.key", e.to_string()))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let server = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, secret))
        .map_err(|e| {
            bad(
                key,
                "gateway.key",
                format!("does not fit gateway.certificate: {e}"),
            )
        })?;
    Ok(Some(TlsAcceptor::from(Arc::new(server))))
}

/// Serves until the daemon stops.
pub(crate) async fn serve(shared: Arc<Shared>, listener: TcpListener, tls: Option<TlsAcceptor>) {
    let router = router(shared.clone());
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    // Dropped with this task: no connection outlives it.
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = connections.join_next(), if !connections.is_empty() => continue,
            () = shared.stopped() => break,
        };
        let Ok((stream, _)) = accepted else {
            // Out of descriptors: some will come free.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let Ok(place) = places.clone().try_acquire_owned() else {
            continue;
        };
        // Pieces of answers are small and wanted at once.
        let _ = stream.set_nodelay(true);
        let (router, shared, tls) = (router.clone(), shared.clone(), tls.clone());
        connections.spawn(async move {
            let _place = place;
            match tls {
                None => talk(stream, router, &shared).await,
                Some(tls) => {
                    if let Ok(Ok(stream)) = timeout(HANDSHAKE_MAX, tls.accept(stream)).await {
                        talk(stream, router, &shared).await;
                    }
                }
            }
        });
    }
    // What is being answered may end; the daemon cuts the rest.
    while connections.join_next().await.is_some() {}
}

async fn talk(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, router: Router, shared: &Shared) {
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADERS_MAX)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = shared.stopped() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "an HTTP connection ended");
    }
}

fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/v1/models", get(models))
        .route("/v1/models/{model}", get(model).delete(tuning::delete_model))
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/completions", post(completions::create))
        .route("/v1/embeddings", post(embeddings::create))
        .route("/v1/files", get(files::list).post(files::create))
        .route("/v1/files/{id}", get(files::show).delete(files::delete))
        .route("/v1/files/{id}/content", get(files::content))
        .route("/v1/batches", get(batches::list).post(batches::create))
        .route("/v1/batches/{id}", get(batches::show))
        .route("/v1/batches/{id}/cancel", post(batches::cancel))
        .route("/v1/fine_tuning/jobs", get(tuning::list).post(tuning::create))
        .route("/v1/fine_tuning/jobs/{id}", get(tuning::show))
        .route("/v1/fine_tuning/jobs/{id}/cancel", post(tuning::cancel))
        .route("/v1/fine_tuning/jobs/{id}/events", get(tuning::events))
        .route("/v1/fine_tuning/jobs/{id}/checkpoints", get(tuning::checkpoints))
        .fallback(async || ApiError::not_found("there is no such path here: the API begins with /v1"))
        .method_not_allowed_fallback(async || ApiError::method())
        .with_state(shared)
}

/// Who calls, for as long as the request lasts.
#[derive(Clone)]
pub(crate) struct Caller {
    key: PublicKey,
    secret: SecretKey,
    institution: Institution,
}

impl Caller {
    /// The key whose secret the bearer token is.
    pub(crate) async fn of(shared: &Shared, headers: &HeaderMap) -> Result<Self, ApiError> {
        let bearer = headers
            .get(header::AUTHORIZATION)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.strip_prefix("Bearer "))
            .ok_or_else(|| {
                ApiError::key("send an API key as `Authorization: Bearer kz-…`: `karez key new` makes one")
            })?;
        let token: ApiToken = bearer.trim().parse().map_err(|e| ApiError::key(format!("{e}")))?;
        let secret = token.secret();
        let key = PublicKey::of(&secret);
        let unknown = || {
            ApiError::key("this API key is not admitted here, or was taken back: `karez key new` makes one")
        };
        if !shared.members.contains(&key) {
            return Err(unknown());
        }
        shared.limits.call(key)?;
        let institution = shared
            .look(|c| {
                c.delegation(&key)?;
                c.member(&key).map(|m| m.institution.clone())
            })
            .await
            .ok_or_else(unknown)?;
        Ok(Self {
            key,
            secret,
            institution,
        })
    }

    pub(crate) fn user(&self) -> UserId {
        UserId(self.key)
    }

    /// What it can still spend.
    pub(crate) async fn budget(&self, shared: &Shared) -> Credits {
        shared.look(|c| c.budget(self.user())).await
    }
}

/// The JSON object in a body.
async fn object(body: Body) -> Result<Map<String, Value>, ApiError> {
    let bytes = match timeout(BODY_WAIT, axum::body::to_bytes(body, BODY_MAX)).await {
        Ok(Ok(bytes)) => bytes,
        Ok(Err(_)) => return Err(ApiError::too_large(BODY_MAX)),
        Err(_) => return Err(ApiError::request("the body did not arrive in time")),
    };
    match serde_json::from_slice(&bytes) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(ApiError::request("the body is not a JSON object")),
        Err(error) => Err(ApiError::request(format!("the body is not JSON: {error}"))),
    }
}

fn shown(name: &str, named: &crate::catalogue::Named) -> Value {
    json!({
        "id": name, "object": "model", "created": 0, "owned_by": named.by.short(),
        "karez": {
            "digest": named.artifact.digest.to_string(), "bytes": named.artifact.bytes.0,
            "format": named.format, "licence": named.licence,
        },
    })
}

async fn models(State(shared): State<Arc<Shared>>, headers: HeaderMap) -> Answer {
    let caller = Caller::of(&shared, &headers).await?;
    let mut data: Vec<Value> = shared
        .models()
        .await
        .iter()
        .map(|(name, named)| shown(name, named))
        .collect();
    data.append(&mut shared.tunings.models(caller.key));
    Ok(json_response(
        StatusCode::OK,
        &json!({"object": "list", "data": data}),
    ))
}

async fn model(
    State(shared): State<Arc<Shared>>,
    UrlPath(name): UrlPath<String>,
    headers: HeaderMap,
) -> Answer {
    let caller = Caller::of(&shared, &headers).await?;
    let found = match shared.model(&name).await {
        Some(named) => Some(shown(&name, &named)),
        None => shared.tunings.model(caller.key, &name),
    };
    let found = found.ok_or_else(|| ApiError::no_model(&name))?;
    Ok(json_response(StatusCode::OK, &found))
}

/// Where OpenAI's clients find it, for people.
pub(crate) fn url(config: &config::Gateway) -> String {
    let scheme = if config.certificate.is_some() {
        "https"
    } else {
        "http"
    };
    match &config.advertise {
        Some(host) => format!("{scheme}://{host}/v1"),
        None => format!("{scheme}://{}/v1", config.listen),
    }
}
