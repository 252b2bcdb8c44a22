//! Putting a node together from its directory.
use super::{Daemon, DaemonError, INPUTS_MAX, Input, Known, MODELS, RunOptions, clock};
use crate::{
    advertise::{self, advertise},
    artifacts::Artifacts,
    config::{NodeConfig, SchedulerEntry},
    control,
    energy::Meters,
    files::NodeFiles,
    probe::{self, Found},
    receipts::Receipts,
    runner::{ALIVE_EVERY, Tools, Warm, WarmPolicy},
    server::{LOOK_EVERY, Server},
    session::{self, Dial},
    trainer::Trainer,
};
use karez_core::{
    agent::{Agent, AgentConfig, OwnerPolicy},
    id::Digest,
    key::{NodeId, PublicKey, SecretKey},
    records::{Device, WorkKind},
    store::Stored,
};
use karez_engine::protocol::Isolation;
use karez_ledger::{Op, Options, StoreError, Writer};
use karez_net::{
    identity,
    peer::{Peer, PeerConfig},
    store::ArtifactStore,
};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    io,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};

impl Daemon {
    pub(super) async fn start(dir: &Path, options: RunOptions) -> Result<Self, DaemonError> {
        let began = Instant::now();
        let files = NodeFiles::new(dir);
        let config = NodeConfig::load(&files.config())?;
        let secret = identity::load(&files.key(), "node")?;
        let id = NodeId(PublicKey::of(&secret));
        let state = files.state();
        let opened = tokio::task::spawn_blocking(move || {
            Writer::open(&state, Options::default()).map_err(DaemonError::from)
        });
        let (writer, recovered) = opened.await.map_err(|_| StoreError::Stopped)??;
        for repaired in &recovered.report {
            tracing::warn!("{repaired}");
        }
        // From here on this is the only process of this node: what a crash left may be swept.
        let scratch = files.scratch();
        sweep(&scratch).map_err(|error| DaemonError::Io {
            path: scratch.clone(),
            error,
        })?;
        let receipts = Receipts::open(files.receipts()).map_err(|error| DaemonError::Io {
            path: files.receipts(),
            error,
        })?;
        let (listener, requests) = control::listen(&files)?;
        let asked = match &config.trainer {
            Some(settings) => Some(Trainer::find(settings).await),
            None => None,
        };
        let (trainer, why_none) = match asked {
            Some(Ok(trainer)) => (Some(trainer), None),
            Some(Err(why)) => (None, Some(why)),
            None => (None, None),
        };
        // A build without a GPU back end lends GPUs to nobody but the owner's trainer.
        let only_training = config.policy.work == [WorkKind::Train];
        let trains_on_gpus = trainer.as_ref().is_some_and(Trainer::has_gpus);
        let mut found = probe::probe(
            &files.probe(),
            &config.limits,
            options.worker.as_ref(),
            options.gpu || (only_training && trains_on_gpus),
        )
        .await;
        found.notes.extend(why_none);
        if let Some(trainer) = &trainer {
            trainer.show(&mut found);
            if trains_on_gpus && !options.gpu && !only_training {
                let how = "set policy.work = [\"train\"] to lend them for training alone";
                found
                    .notes
                    .push(format!("PyTorch could train on the GPUs: {how}"));
            }
        }
        if config.server.is_some() {
            // What is lent is the server, as soon as it has answered; what it computes with is its own affair.
            found.devices.clear();
            found.engines.clear();
            found.isolation = Isolation::None.to_string();
            found.notes.clear();
        }
        for note in &found.notes {
            tracing::warn!("{note}");
        }

        let (artifacts_dir, limit) = (files.artifacts(), config.limits.store);
        let opened = tokio::task::spawn_blocking(move || ArtifactStore::open(&artifacts_dir, limit)).await;
        let store = opened.map_err(|_| StoreError::Stopped)??;
        let here: BTreeSet<Digest> = store.list().into_iter().map(|s| s.artifact.digest).collect();
        let rows = recovered
            .tables
            .rows(MODELS)
            .filter_map(|(key, _)| Digest::try_from(key).ok());
        let (models, gone): (BTreeSet<Digest>, BTreeSet<Digest>) =
            rows.partition(|digest| here.contains(digest));
        let own = gone
            .iter()
            .map(|d| Op::Delete {
                table: MODELS,
                key: d.0.to_vec(),
            })
            .collect();
        let artifacts = Artifacts::serve(store, config.listen.artifacts, &secret, models)?;

        let stored: Vec<Stored> = Agent::TABLES
            .iter()
            .flat_map(|table| {
                recovered.tables.rows(table).map(|(key, value)| Stored {
                    table: (*table).to_owned(),
                    key: key.to_vec(),
                    value: value.to_vec(),
                })
            })
            .collect();
        drop(recovered);
        let agent = Agent::restore(
            agent_config(&config, &found, secret.clone()),
            clock(began),
            &stored,
        )?;

        let peer_config = peer_config(&config, &files.config())?;
        let (peer, events) = Peer::start(&secret, peer_config)?;
        let (back, inputs) = mpsc::channel(INPUTS_MAX);
        let (offers, newest) = watch::channel(None);
        let mut background = JoinSet::new();
        background.spawn(advertise::find(
            peer.clone(),
            events,
            config.schedulers.iter().map(|s| s.key).collect(),
            config.policy.find_schedulers,
            newest,
            back.clone(),
        ));
        if config.schedulers.is_empty() {
            tracing::warn!(
                "no [[scheduler]] in {}: nobody will place anything here",
                files.config().display()
            );
        }
        let keep = WarmPolicy {
            stay: Duration::from_millis(config.timing.warm.0),
            memory: found.memory_lent,
            pinned: config.models.pinned.clone(),
        };
        background.spawn(pulse(back.clone()));
        let server = match &config.server {
            None => None,
            Some(settings) => {
                let server = Server::new(settings.clone(), dir, options.worker.clone());
                let server = server.map_err(|error| DaemonError::Io {
                    path: settings.key_file.clone().unwrap_or_default(),
                    error,
                })?;
                let server = Arc::new(server);
                background.spawn(watch_server(server.clone(), back.clone()));
                Some(server)
            }
        };
        let warm = Warm::new(options.worker, keep);
        tracing::info!(node = %id, name = %config.name, "the node runs");
        let (threads, sequences) = (found.threads, config.models.sequences);
        let mut daemon = Self {
            began,
            id,
            found,
            agent,
            writer,
            tools: Arc::new(Tools {
                artifacts,
                scratch,
                warm,
                threads,
                sequences,
                trainer,
                energy: Arc::new(Meters::find()),
                server,
            }),
            inputs,
            back,
            waiting: VecDeque::new(),
            requests,
            links: BTreeMap::new(),
            known: BTreeMap::new(),
            guests: BTreeMap::new(),
            fetches: BTreeMap::new(),
            pins: BTreeMap::new(),
            own,
            receipts,
            offers,
            sessions: JoinSet::new(),
            peer,
            secret,
            told_warm: BTreeMap::new(),
            stalled: None,
            draining: false,
            leaving: false,
            background,
            _listener: listener,
            config,
        };
        for scheduler in daemon.config.schedulers.clone() {
            daemon.offer_to(scheduler);
        }
        Ok(daemon)
    }

    /// Offers this node to a scheduler from now on, and keeps a session with it.
    pub(super) fn offer_to(&mut self, scheduler: SchedulerEntry) {
        let to = scheduler.key;
        if self.known.contains_key(&to) {
            return;
        }
        let (tell_addrs, artifact_addrs) = watch::channel(Vec::new());
        self.known.insert(
            to,
            Known {
                name: String::new(),
                control_addr: scheduler.control_addr.clone(),
                connected: false,
                why: "not reached yet".into(),
                offer: String::new(),
                artifact_addrs,
            },
        );
        self.tools.artifacts.trust(to);
        let tell = self.back.clone();
        let newest = self.offers.subscribe();
        self.background
            .spawn(advertise(self.peer.clone(), to, newest, move |text| {
                // Status for people: the next word replaces it anyway.
                let _ = tell.try_send(Input::OfferHeard { scheduler: to, text });
            }));
        self.sessions.spawn(session::keep(Dial {
            scheduler,
            secret: self.secret.clone(),
            name: self.config.name.clone(),
            inputs: self.back.clone(),
            artifact_addrs: tell_addrs,
        }));
    }
}

/// An empty directory, whatever was there.
fn sweep(dir: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    std::fs::create_dir_all(dir)
}

fn agent_config(config: &NodeConfig, found: &Found, secret: SecretKey) -> AgentConfig {
    AgentConfig {
        secret,
        name: config.name.clone(),
        institution: config.institution.clone(),
        country: config.country,
        devices: found
            .devices
            .iter()
            .map(|device| Device {
                class: device.class.clone(),
                count: device.count,
                free: device.count,
                memory: device.memory,
                rate: config.rate_of(&device.class),
                share_min: config.share_of(&device.class),
                shared: Vec::new(),
            })
            .collect(),
        engines: found.engines.clone(),
        cores: found.cores,
        memory: found.memory,
        isa: found.isa.clone(),
        isolation: found.isolation.clone(),
        policy: OwnerPolicy {
            institutions: config.policy.institutions.clone(),
            institutions_excluded: config.policy.institutions_excluded.clone(),
            work: config.policy.work.clone(),
            licences: config.policy.licences.clone(),
            data: config.policy.data.unwrap_or(OwnerPolicy::default().data),
            local_first: config.policy.local_first,
        },
        offer_ttl: config.timing.offer_lifetime,
        heartbeat: config.timing.heartbeat,
        reading_interval: config.timing.reading_interval,
        reclaim_grace: config.timing.reclaim_grace,
    }
}

/// Wakes the loop every second. One that is late is not made up for.
async fn pulse(back: mpsc::Sender<Input>) {
    let mut beat = tokio::time::interval(ALIVE_EVERY);
    beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        beat.tick().await;
        if back.send(Input::Pulse).await.is_err() {
            return;
        }
    }
}

/// Tells the loop what the provider's own server can do, whenever that changes.
async fn watch_server(server: Arc<Server>, back: mpsc::Sender<Input>) {
    let mut last = None;
    loop {
        let seen = server.look().await;
        if last.as_ref() != Some(&seen) {
            last = Some(seen.clone());
            if back.send(Input::Server(seen)).await.is_err() {
                return;
            }
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

fn peer_config(config: &NodeConfig, path: &Path) -> Result<PeerConfig, DaemonError> {
    let peers = config.schedulers.iter().flat_map(|s| &s.peer_addrs);
    let listen = multiaddrs(config.listen.peer.iter(), path)?;
    Ok(PeerConfig {
        listen,
        ..PeerConfig::node(multiaddrs(peers, path)?)
    })
}

/// Reads multiaddresses; generic only so that this crate need not name libp2p.
fn multiaddrs<'a, T: std::str::FromStr>(
    addrs: impl Iterator<Item = &'a String>,
    path: &Path,
) -> Result<Vec<T>, DaemonError>
where
    T::Err: std::fmt::Display,
{
    let read = |addr: &'a String| {
        addr.parse().map_err(|why: T::Err| DaemonError::PeerAddr {
            path: path.to_owned(),
            addr: addr.clone(),
            why: why.to_string(),
        })
    };
    addrs.map(read).collect()
}
