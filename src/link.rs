//! The user's line to the scheduler: control calls over gRPC, artifacts over QUIC.
use crate::{
    fault::{Kind, fault, refused},
    home::{ClientConfig, Home},
    out::{self, Out},
};
use anyhow::{Context as _, Result};
use indicatif::{ProgressBar, ProgressStyle};
use karez_core::{
    artifact::ArtifactRef,
    key::{PublicKey, SecretKey, UserId},
};
use karez_net::{
    control,
    store::ArtifactStore,
    transfer::{Holder, OnProgress, Transfers},
};
use karez_proto::control::{self as wire, control_client::ControlClient};
use std::{
    future::Future,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};
use tonic::{Request, Response, Status, transport::Channel};

/// A call that is no stream must be answered within this.
pub(crate) const CALL_MAX: Duration = Duration::from_secs(30);
/// The largest answer accepted: a listing of ten thousand parts with their alternatives fits.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// A client of the control API.
pub(crate) type Client = ControlClient<Channel>;

/// One user talking to one scheduler.
#[derive(Clone)]
pub(crate) struct Link {
    pub(crate) client: Client,
    pub(crate) secret: SecretKey,
    pub(crate) config: ClientConfig,
}

/// Artifacts between the user's store and the scheduler's.
pub(crate) struct Artifacts {
    pub(crate) store: ArtifactStore,
    transfers: Transfers,
    scheduler: Holder,
}

/// Connects to the scheduler of `home`.
pub(crate) async fn open(home: &Home) -> Result<Link> {
    let config = home.config()?;
    let secret = home.key()?;
    let client = dial(&config.control_addr, &secret, config.scheduler.0)
        .await
        .map_err(|error| match local(home) {
            true => error.context("the local network is not up, `karez up` starts it again"),
            false => error,
        })?;
    Ok(Link {
        client,
        secret,
        config,
    })
}

/// Whether this home has a network of its own.
fn local(home: &Home) -> bool {
    home.dir().join("up/scheduler").is_dir()
}

/// Connects to the control API at `addr` and insists on its key.
pub(crate) async fn dial(addr: &str, secret: &SecretKey, expected: PublicKey) -> Result<Client> {
    let channel = control::connect(addr, secret, expected)
        .await
        .context("the scheduler")?;
    Ok(ControlClient::new(channel)
        .max_decoding_message_size(ANSWER_BYTES_MAX)
        .max_encoding_message_size(ANSWER_BYTES_MAX))
}

/// One call that is answered once, or an error that says what the scheduler said.
pub(crate) async fn call<T>(answer: impl Future<Output = Result<Response<T>, Status>>) -> Result<T> {
    match tokio::time::timeout(CALL_MAX, answer).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => Err(refused(status)),
        Err(_) => Err(fault(
            Kind::Unreachable,
            format!(
                "the scheduler did not answer in {} s: check that it runs, then try again",
                CALL_MAX.as_secs()
            ),
        )),
    }
}

impl Link {
    pub(crate) fn user(&self) -> UserId {
        UserId(PublicKey::of(&self.secret))
    }

    /// One job by its id or a prefix of it.
    pub(crate) async fn job(&self, job: &str) -> Result<wire::JobView> {
        let mut client = self.client.clone();
        call(client.job(Request::new(wire::JobRequest { job: job.to_owned() }))).await
    }

    /// Opens the user's store and the QUIC endpoint to the scheduler.
    pub(crate) async fn artifacts(&self, home: &Home) -> Result<Artifacts> {
        let mut client = self.client.clone();
        let status = call(client.status(wire::StatusRequest {})).await?;
        let addrs = resolve(&status.artifact_addrs, &self.config.control_addr).await;
        if addrs.is_empty() {
            return Err(fault(
                Kind::Unreachable,
                format!(
                    "the scheduler at {} names no address for artifacts: ask its operator to set one",
                    self.config.control_addr
                ),
            ));
        }
        let any: SocketAddr = match addrs[0] {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let home = home.clone();
        let store = tokio::task::spawn_blocking(move || home.store()).await??;
        // A user's machine serves nobody: it pushes and fetches.
        let transfers = Transfers::bind(any, &self.secret, store.clone(), Arc::new(|_, _| false))?;
        Ok(Artifacts {
            store,
            transfers,
            scheduler: Holder {
                key: self.config.scheduler.0,
                addrs,
            },
        })
    }
}

/// `host:port` texts as socket addresses. A wildcard address means the host that serves the control API.
async fn resolve(texts: &[String], control_addr: &str) -> Vec<SocketAddr> {
    let mut found = Vec::new();
    for text in texts.iter().take(8) {
        let Ok(addrs) = tokio::net::lookup_host(text.as_str()).await else {
            continue;
        };
        for addr in addrs {
            if !addr.ip().is_unspecified() {
                found.push(addr);
            } else if let Ok(hosts) = tokio::net::lookup_host(control_addr).await {
                found.extend(hosts.map(|host| SocketAddr::new(host.ip(), addr.port())));
            }
        }
    }
    found
}

impl Artifacts {
    /// Brings an artifact of the own store to the scheduler.
    pub(crate) async fn push(&self, out: &Out, what: &str, artifact: ArtifactRef) -> Result<()> {
        let (bar, progress) = bar(out, &format!("sending {what}"), artifact.bytes.0);
        let pushed = self.transfers.push(artifact, &self.scheduler, progress).await;
        bar.finish_and_clear();
        pushed.with_context(|| format!("sending {what} to the scheduler"))
    }

    /// Brings artifacts from the scheduler into the own store, where they stay until evicted.
    pub(crate) async fn fetch(&self, out: &Out, what: &str, artifacts: &[ArtifactRef]) -> Result<()> {
        let total = artifacts.iter().map(|a| a.bytes.0).sum();
        let (bar, progress) = bar(out, &format!("fetching {what}"), total);
        let fetched = self
            .transfers
            .fetch(artifacts, std::slice::from_ref(&self.scheduler), progress)
            .await;
        bar.finish_and_clear();
        fetched
            .map(drop)
            .with_context(|| format!("fetching {what} from the scheduler"))
    }

    pub(crate) async fn close(self) {
        self.transfers.close().await;
    }
}

/// A bar of bytes that shows only when there is something to wait for.
fn bar(out: &Out, label: &str, total: u64) -> (ProgressBar, OnProgress) {
    let bar = if out.bars && total > 1 << 20 {
        ProgressBar::new(total)
    } else {
        ProgressBar::hidden()
    };
    let style = ProgressStyle::with_template("{msg} {bar:24} {bytes}/{total_bytes} {bytes_per_sec}");
    bar.set_style(
        style
            .unwrap_or_else(|_| ProgressStyle::default_bar())
            .progress_chars(out::bar_letters()),
    );
    bar.set_message(out::cut(label, 30));
    let shown = bar.clone();
    (bar, Arc::new(move |p| shown.set_position(p.done.0)))
}
