//! Starting, wiring and stopping a scheduler.
//!
//! [`run`] is the whole life of one; [`Daemon`] is the same in two steps, for callers who want to know its addresses.
use crate::{
    catalogue::Catalogue,
    config::{self, Config, ConfigError},
    gateway,
    mind::{self, Clock, Members, Parts, Shared},
    monitor, peers, service,
    setup::{self, ARTIFACTS_DIR, STATE_DIR},
    tuner::{Tuner, TunerProgram},
    witness,
};
use karez_core::{
    controller::Controller,
    key::{PublicKey, SchedulerId},
    store::{Stored, StoredError},
    translate::MESSAGE_BYTES_MAX,
};
use karez_ledger::{Options, StoreError, Writer};
use karez_net::{
    control,
    identity::IdentityError,
    peer::{Multiaddr, Peer, PeerConfig, PeerError},
    store::{ArtifactStore, StoreError as ArtifactStoreError},
    tls,
    transfer::{Op, TransferError, Transfers},
};
use karez_proto::control::control_server::ControlServer;
use std::{
    future::Future,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::{net::TcpListener, sync::watch, task::JoinHandle, time::timeout};

/// Goodbyes get this long to leave; what still talks then is cut.
const STOP_MAX: Duration = Duration::from_secs(2);
/// Pins and watchers that are no longer needed are looked for this often.
const SWEEP_EVERY: Duration = Duration::from_secs(5);

/// Why a scheduler does not run.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The key cannot be read.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The books cannot be opened, or a commit failed.
    #[error("the scheduler's books: {0}")]
    Books(Box<StoreError>),
    /// The books hold something this version cannot read.
    #[error("the scheduler's books: {0}: run the version that wrote them, or restore a backup")]
    Stored(#[from] StoredError),
    /// The artifact store cannot be opened.
    #[error("the artifact store: {0}")]
    Artifacts(#[from] ArtifactStoreError),
    /// A file named in the configuration cannot be read.
    #[error("cannot read {} ({setting}): {error}", path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// Which setting names it.
        setting: &'static str,
        /// Why not.
        error: io::Error,
    },
    /// An address cannot be listened on.
    #[error("cannot listen on {addr} ({setting}): {why}; change {setting} in {}", config.display())]
    Listen {
        /// Where.
        addr: String,
        /// Which setting names it.
        setting: &'static str,
        /// Why not.
        why: String,
        /// The file with the setting.
        config: PathBuf,
    },
    /// The peer network cannot start.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// A listener stopped.
    #[error("the {what} listener on {addr} stopped: {why}")]
    Serve {
        /// Which one.
        what: &'static str,
        /// Where.
        addr: SocketAddr,
        /// Why.
        why: String,
    },
}

impl From<StoreError> for DaemonError {
    fn from(error: StoreError) -> Self {
        Self::Books(Box::new(error))
    }
}

/// What the binary adds to the operator's settings.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RunOptions {
    /// Knows what the trainer knows; without, nobody can ask for fine-tuning over HTTP.
    pub tuner: Option<TunerProgram>,
}

/// Runs the scheduler in `dir` until `shutdown` resolves or its disk fails. Ends within three seconds of `shutdown`.
pub async fn run(
    dir: &Path,
    options: RunOptions,
    shutdown: impl Future<Output = ()>,
) -> Result<(), DaemonError> {
    let mut daemon = Daemon::start(dir, options).await?;
    tokio::select! {
        () = shutdown => daemon.stop().await,
        failed = daemon.failed() => {
            tracing::error!(error = %failed, "the scheduler stops: what it believes can no longer be kept on disk");
            let _ = daemon.stop().await;
            Err(failed)
        }
    }
}

/// A running scheduler. Stop it with [`Daemon::stop`]; dropping it cuts everybody off.
#[derive(Debug)]
pub struct Daemon {
    id: SchedulerId,
    control_addr: SocketAddr,
    monitor_addr: Option<SocketAddr>,
    gateway_addr: Option<SocketAddr>,
    stop: watch::Sender<bool>,
    mind: JoinHandle<Result<(), StoreError>>,
    mind_ended: bool,
    servers: Vec<JoinHandle<Result<(), DaemonError>>>,
    helpers: Vec<JoinHandle<()>>,
    transfers: Transfers,
    peer: Peer,
}

impl Daemon {
    /// Opens the books, takes the jobs up where they were, and listens.
    pub async fn start(dir: &Path, options: RunOptions) -> Result<Self, DaemonError> {
        let RunOptions { tuner } = options;
        let config = Config::load(dir)?;
        let secret = setup::load_key(dir)?;
        let id = SchedulerId(PublicKey::of(&secret));
        let file = dir.join(config::FILE);
        let tls_identity = monitor::identity(&config, dir)?;
        let gateway_tls = gateway::tls(&config.gateway, dir)?;

        // Ports first: they fail often, and a failure then leaves everything as it was.
        let control_listener = listen(config.control.listen, "control.listen", &file).await?;
        let monitor_listener = match config.monitor.enabled {
            true => Some(listen(config.monitor.listen, "monitor.listen", &file).await?),
            false => None,
        };
        let gateway_listener = match config.gateway.enabled {
            true => Some(listen(config.gateway.listen, "gateway.listen", &file).await?),
            false => None,
        };
        let gateway_addr = gateway_listener
            .as_ref()
            .map(|l| local(l, "gateway.listen", &file))
            .transpose()?;
        for addr in &config.peer.listen {
            // The swarm listens later and cannot say so well what is wrong.
            if let Some(addr) = tcp_of(addr) {
                drop(listen(addr, "peer.listen", &file).await?);
            }
        }
        let control_addr = local(&control_listener, "control.listen", &file)?;
        let monitor_addr = monitor_listener
            .as_ref()
            .map(|l| local(l, "monitor.listen", &file))
            .transpose()?;

        let clock = Clock::start();
        let (state_dir, store_dir, limit) = (
            dir.join(STATE_DIR),
            dir.join(ARTIFACTS_DIR),
            config.artifacts.limit,
        );
        let options = Options {
            scheduler: Some(id),
            ..Options::default()
        };
        let opened = blocking(move || Writer::open(&state_dir, options).map_err(DaemonError::from)).await;
        let (writer, recovered) = opened.unwrap_or(Err(StoreError::Stopped.into()))?;
        for repaired in &recovered.report {
            tracing::warn!("{repaired}");
        }
        let store = match blocking(move || ArtifactStore::open(&store_dir, limit)).await {
            Some(store) => store?,
            None => return Err(StoreError::Stopped.into()),
        };
        let stored: Vec<Stored> = Controller::TABLES
            .iter()
            .flat_map(|table| {
                recovered.tables.rows(table).map(|(key, value)| Stored {
                    table: (*table).to_owned(),
                    key: key.to_vec(),
                    value: value.to_vec(),
                })
            })
            .collect();
        let accounts = recovered.book.accounts().clone();
        let catalogue = Catalogue::restore(&recovered.tables);
        gateway::files::sweep(dir);
        let files = gateway::files::Files::restore(&recovered.tables, &store);
        let batches = gateway::batches::Batches::restore(&recovered.tables);
        let tunings = gateway::tuning::Tunings::restore(&recovered.tables, &store);
        let heads = witness::Heads::restore(&recovered.tables);
        drop(recovered);
        let mut controller =
            Controller::restore(config.controller(secret.clone()), clock.now(), &stored, accounts)?;
        if controller.shares_stale() {
            controller = recounted(controller, &writer).await?;
        }
        // Member rows are named by their keys; what is no member's row is no member.
        let members = Members::default();
        for key in stored
            .iter()
            .filter_map(|row| PublicKey::from_bytes(&row.key).ok())
        {
            if let Some(member) = controller.member(&key) {
                members.admit(key, member.role);
            }
        }
        drop(stored);
        let open_jobs = controller.jobs(None, false, usize::MAX);

        let (stop, stopping) = watch::channel(false);
        let parts = Parts {
            secret: secret.clone(),
            dir: dir.to_owned(),
            clock,
            controller,
            writer,
            store: store.clone(),
            catalogue,
            files,
            batches,
            tunings,
            tuner: Tuner::new(tuner),
            members: members.clone(),
            heads,
            stopping,
            config,
        };
        let (shared, queue) = Shared::new(parts);
        let config = &shared.config;
        shared.pins.restore(&open_jobs);
        let jobs = open_jobs.len();
        drop(open_jobs);

        let policy = Arc::new(move |key: &PublicKey, op: Op| match op {
            // The store itself refuses what exceeds its limit.
            Op::Get(_) | Op::Has(_) | Op::Put(_) => *key == id.0 || members.contains(key),
        });
        let transfers = Transfers::bind(config.artifacts.listen, &secret, store, policy)
            .map_err(|e| listen_error(&e, config.artifacts.listen, "artifacts.listen", &file))?;
        let (peer, events) = Peer::start(&secret, peer_config(config))?;

        let incoming = control::serve_incoming(control_listener, &secret, tls::anyone()).map_err(|e| {
            DaemonError::Serve {
                what: "control",
                addr: control_addr,
                why: e.to_string(),
            }
        })?;
        let api = ControlServer::new(service::Service(shared.clone()))
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let until = shared.clone();
        let control = tokio::spawn(async move {
            control::server_builder()
                .add_service(api)
                .serve_with_incoming_shutdown(incoming, async move { until.stopped().await })
                .await
                .map_err(|e| DaemonError::Serve {
                    what: "control",
                    addr: control_addr,
                    why: e.to_string(),
                })
        });
        let mut servers = vec![control];
        if let Some(listener) = monitor_listener {
            servers.push(tokio::spawn(monitor::serve(
                shared.clone(),
                listener,
                tls_identity,
            )));
        }
        if let Some(listener) = gateway_listener {
            let served = gateway::serve(shared.clone(), listener, gateway_tls);
            servers.push(tokio::spawn(async move {
                served.await;
                Ok(())
            }));
        }
        let helpers = vec![
            tokio::spawn(peers::listen(shared.clone(), events)),
            tokio::spawn(peers::announce(shared.clone(), peer.clone())),
            tokio::spawn(witness::spread(shared.clone())),
            tokio::spawn(sweep(shared.clone())),
        ];
        let name = shared.config.name.clone();
        let mind = tokio::spawn(mind::run(shared, queue));
        tracing::info!(
            scheduler = %id, %name, control = %control_addr, artifacts = %transfers.local_addr(), jobs,
            "the scheduler runs"
        );
        Ok(Self {
            id,
            control_addr,
            monitor_addr,
            gateway_addr,
            stop,
            mind,
            mind_ended: false,
            servers,
            helpers,
            transfers,
            peer,
        })
    }

    /// The scheduler's key.
    pub fn id(&self) -> SchedulerId {
        self.id
    }

    /// Where the control API listens.
    pub fn control_addr(&self) -> SocketAddr {
        self.control_addr
    }

    /// Where health checks are answered.
    pub fn monitor_addr(&self) -> Option<SocketAddr> {
        self.monitor_addr
    }

    /// Where OpenAI's clients are answered.
    pub fn gateway_addr(&self) -> Option<SocketAddr> {
        self.gateway_addr
    }

    /// Where artifacts are served (UDP).
    pub fn artifact_addr(&self) -> SocketAddr {
        self.transfers.local_addr()
    }

    /// Where the peer network listens by now.
    pub async fn peer_addrs(&self) -> Vec<Multiaddr> {
        self.peer.listen_addrs().await.unwrap_or_default()
    }

    /// Resolves when the scheduler cannot go on.
    pub async fn failed(&mut self) -> DaemonError {
        let ended = (&mut self.mind).await;
        self.mind_ended = true;
        match ended {
            Ok(Err(error)) => error.into(),
            // The loop ends well only when told to stop.
            Ok(Ok(())) | Err(_) => StoreError::Stopped.into(),
        }
    }

    /// Says goodbye to everyone, waits briefly, and ends. Everything is on disk when it returns.
    pub async fn stop(mut self) -> Result<(), DaemonError> {
        tracing::info!("the scheduler stops");
        self.stop.send_replace(true);
        let mut outcome = Ok(());
        if !self.mind_ended
            && let Ok(Ok(Err(error))) = timeout(STOP_MAX, &mut self.mind).await
        {
            outcome = Err(error.into());
        }
        self.peer.stop().await;
        self.transfers.close().await;
        let mut servers = std::mem::take(&mut self.servers);
        let all = async {
            for server in &mut servers {
                if let Ok(Err(error)) = server.await {
                    tracing::warn!(%error, "while stopping");
                }
            }
        };
        if timeout(STOP_MAX, all).await.is_err() {
            tracing::debug!("some connections did not end in time: cut");
        }
        for server in servers {
            server.abort();
        }
        for helper in self.helpers.drain(..) {
            helper.abort();
        }
        outcome
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        for server in &self.servers {
            server.abort();
        }
        for helper in &self.helpers {
            helper.abort();
        }
    }
}

async fn sweep(shared: Arc<Shared>) {
    loop {
        tokio::select! {
            () = tokio::time::sleep(SWEEP_EVERY) => {}
            () = shared.stopped() => return,
        }
        // First: the pins of a job that has ended are let go of next.
        shared.batches.sweep(&shared).await;
        shared.tunings.sweep(&shared).await;
        shared.files.sweep(&shared).await;
        shared.pins.sweep(&shared).await;
        shared.streams.sweep(&shared).await;
        shared.watchers.sweep();
    }
}

fn peer_config(config: &Config) -> PeerConfig {
    // The configuration was checked when it was read: every address parses.
    let addrs = |list: &[String]| {
        list.iter()
            .filter_map(|a| a.parse().ok())
            .collect::<Vec<Multiaddr>>()
    };
    let mut peer = PeerConfig::scheduler(addrs(&config.peer.listen), addrs(&config.peer.bootstrap));
    peer.external = addrs(&config.peer.advertise);
    peer
}

/// `/ip4/HOST/tcp/PORT` as a socket address; `None` for other forms and for port 0.
fn tcp_of(addr: &str) -> Option<SocketAddr> {
    let mut fields = addr.split('/').skip(1);
    let (_, ip, tcp, port) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
    let addr = SocketAddr::new(ip.parse().ok()?, port.parse().ok()?);
    (tcp == "tcp" && addr.port() != 0).then_some(addr)
}

async fn listen(addr: SocketAddr, setting: &'static str, file: &Path) -> Result<TcpListener, DaemonError> {
    TcpListener::bind(addr)
        .await
        .map_err(|error| refused(&error, addr, setting, file))
}

fn local(listener: &TcpListener, setting: &'static str, file: &Path) -> Result<SocketAddr, DaemonError> {
    listener
        .local_addr()
        .map_err(|error| refused(&error, SocketAddr::from(([0, 0, 0, 0], 0)), setting, file))
}

fn refused(error: &io::Error, addr: SocketAddr, setting: &'static str, config: &Path) -> DaemonError {
    let why = match error.kind() {
        io::ErrorKind::AddrInUse => {
            format!(
                "port {} is taken by another program (perhaps another scheduler): stop it",
                addr.port()
            )
        }
        io::ErrorKind::PermissionDenied => format!("port {} needs rights that this user lacks", addr.port()),
        io::ErrorKind::AddrNotAvailable => format!("this machine does not have the address {}", addr.ip()),
        _ => error.to_string(),
    };
    DaemonError::Listen {
        addr: addr.to_string(),
        setting,
        why,
        config: config.to_owned(),
    }
}

fn listen_error(
    error: &TransferError,
    addr: SocketAddr,
    setting: &'static str,
    config: &Path,
) -> DaemonError {
    match error {
        TransferError::Bind { error, .. } => refused(error, addr, setting, config),
        other => DaemonError::Listen {
            addr: addr.to_string(),
            setting,
            why: other.to_string(),
            config: config.to_owned(),
        },
    }
}

/// Runs what blocks on the disk elsewhere. `None` when it panicked.
/// The operator changed the half-life of fair share: the histories are counted anew, from the ledger.
async fn recounted(mut controller: Controller, writer: &Writer) -> Result<Controller, DaemonError> {
    let entries = writer.entries(0);
    let counted = blocking(move || {
        let mut failed = None;
        let entries = entries.map_while(|entry| entry.map_err(|error| failed = Some(error)).ok());
        let changes = controller.recount(entries.filter_map(|entry| karez_ledger::report::work(&entry)));
        match failed {
            Some(error) => Err(error),
            None => Ok((controller, changes)),
        }
    })
    .await;
    let (controller, changes) = counted.unwrap_or(Err(StoreError::Stopped))?;
    tracing::info!(
        institutions = changes.len(),
        "fair share was counted anew from the ledger, with another half-life"
    );
    crate::mind::commit(writer, vec![karez_core::controller::Effect::Persist(changes)]).await?;
    Ok(controller)
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    tokio::task::spawn_blocking(work).await.ok()
}
