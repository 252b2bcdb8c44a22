//! A scheduler's directory: making one, and inviting others with its key.
//!
//! The directory holds `scheduler.toml`, `scheduler.key` (readable by its owner only), `state/` (the durable writer's:
//! jobs, members and the ledger) and `artifacts/` (the store).
use crate::config::{self, Config, ConfigError};
use karez_core::{
    id::Institution,
    invite,
    key::{PublicKey, SchedulerId, SecretKey},
    records::{Invitation, Record, Role, Signed},
    unit::{Credits, UtcMillis},
};
use karez_net::identity::{self, IdentityError};
use std::{
    fs,
    io::{self, Write},
    net::{IpAddr, SocketAddr},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// The key's file in a scheduler's directory.
pub const KEY_FILE: &str = "scheduler.key";
/// The durable writer's directory in a scheduler's directory.
pub(crate) const STATE_DIR: &str = "state";
/// The artifact store's directory in a scheduler's directory.
pub(crate) const ARTIFACTS_DIR: &str = "artifacts";

/// What a new scheduler is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InitOptions {
    /// A name for people; at most 64 bytes.
    pub name: String,
    /// Who runs it.
    pub institution: Institution,
    /// The host name or address under which others reach it.
    pub host: String,
    /// The local address to listen on.
    pub listen: IpAddr,
    /// TCP port of the control API.
    pub control_port: u16,
    /// TCP port of the peer network.
    pub peer_port: u16,
    /// UDP port of artifact transfer.
    pub artifact_port: u16,
    /// TCP port of health checks, on loopback.
    pub monitor_port: u16,
    /// TCP port of HTTP for OpenAI's clients, on loopback; off when 0.
    pub gateway_port: u16,
    /// Admits any key, with this budget for a user. For trials on one machine.
    pub open: Option<Credits>,
}

impl InitOptions {
    /// A scheduler of `institution` reached as `host`, listening on all addresses at the usual ports.
    pub fn new(institution: Institution, host: &str) -> Self {
        let local = host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback()) || host == "localhost";
        Self {
            name: institution.to_string(),
            institution,
            host: host.to_owned(),
            listen: IpAddr::from(if local { [127, 0, 0, 1] } else { [0, 0, 0, 0] }),
            control_port: 7400,
            peer_port: 7401,
            artifact_port: 7402,
            monitor_port: 7403,
            gateway_port: 0,
            open: None,
        }
    }
}

/// What [`init`] made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Created {
    /// The scheduler's key.
    pub id: SchedulerId,
    /// The configuration to read and change.
    pub config: PathBuf,
}

/// Whom to invite.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InviteOptions {
    /// As what.
    pub role: Role,
    /// Into which institution; the scheduler's own when left out.
    pub institution: Option<Institution>,
    /// A user's first budget.
    pub credits: Credits,
    /// How long the invitation can be redeemed.
    pub valid: Duration,
    /// How many keys may redeem it; at least 1.
    pub uses: u32,
}

/// Why a directory or an invitation could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// There is a scheduler already.
    #[error("{} exists already: this directory has a scheduler; run it, or choose another directory", path.display())]
    Exists {
        /// What lies in the way.
        path: PathBuf,
    },
    /// An option breaks its rule.
    #[error("{what} {why}")]
    Option {
        /// Which option.
        what: &'static str,
        /// Which rule.
        why: String,
    },
    /// The disk refused.
    #[error("cannot write {}: {error}", path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The key could not be made or read.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// Makes the directory of a new scheduler: key, commented configuration. Never overwrites one.
pub fn init(dir: &Path, options: &InitOptions) -> Result<Created, SetupError> {
    let file = dir.join(config::FILE);
    let text = template(options);
    // Our own reader decides whether the options are sound, before anything is written.
    Config::parse(&text, &file)?;
    if file.exists() {
        return Err(SetupError::Exists { path: file });
    }
    let io = |path: &Path| {
        let path = path.to_owned();
        move |error| SetupError::Io { path, error }
    };
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(io(dir))?;
    // The configuration comes last: a directory with one is complete.
    let secret = identity::load_or_create(&dir.join(KEY_FILE), "scheduler")?;
    let mut out = fs::File::create_new(&file).map_err(io(&file))?;
    out.write_all(text.as_bytes())
        .and_then(|()| out.sync_all())
        .map_err(io(&file))?;
    Ok(Created {
        id: SchedulerId(PublicKey::of(&secret)),
        config: file,
    })
}

/// Signs an invitation with the key in `dir`; the scheduler need not run. Gives the text to paste.
pub fn invite(dir: &Path, options: &InviteOptions) -> Result<String, SetupError> {
    let config = Config::load(dir)?;
    let secret = load_key(dir)?;
    let id = SchedulerId(PublicKey::of(&secret));
    if options.uses == 0 {
        return Err(SetupError::Option {
            what: "uses",
            why: "must be at least 1".into(),
        });
    }
    if options.role == Role::Node && options.credits != Credits::ZERO {
        return Err(SetupError::Option {
            what: "credits",
            why: "are a user's budget: a node earns, leave them out".into(),
        });
    }
    let nonce = getrandom::u64().map_err(|e| SetupError::Option {
        what: "nonce",
        why: format!("cannot be drawn, the system has no randomness ({e})"),
    })?;
    let valid = u64::try_from(options.valid.as_millis()).unwrap_or(u64::MAX);
    let expires_at = UtcMillis(utc_now().0.saturating_add(valid));
    let invitation = Invitation {
        scheduler: id,
        institution: options
            .institution
            .clone()
            .unwrap_or_else(|| config.institution.clone()),
        role: options.role,
        control_addr: config.control.advertise.clone(),
        peer_addrs: peer_addrs(&config, id),
        credits: options.credits,
        nonce,
        uses_max: options.uses,
        expires_at,
    };
    // Reading it back finds every limit that the reader would find.
    Invitation::from_wire(invitation.to_wire()).map_err(|e| SetupError::Option {
        what: "the invitation",
        why: format!("cannot be made: {e}"),
    })?;
    Ok(invite::encode(&Signed::sign(invitation, &secret)))
}

/// Where the scheduler of `dir` keeps its state and its ledger.
pub fn books(dir: &Path) -> PathBuf {
    dir.join(STATE_DIR)
}

/// The key in `dir`.
pub fn load_key(dir: &Path) -> Result<SecretKey, IdentityError> {
    identity::load(&dir.join(KEY_FILE), "scheduler")
}

/// The multiaddresses others are told, each with the scheduler's libp2p id.
pub(crate) fn peer_addrs(config: &Config, id: SchedulerId) -> Vec<String> {
    let Ok(peer_id) = identity::to_peer_id(id.0) else {
        return Vec::new();
    };
    let known = if config.peer.advertise.is_empty() {
        // An address that listens everywhere can be dialled nowhere.
        config
            .peer
            .listen
            .iter()
            .filter(|a| !a.contains("/0.0.0.0/") && !a.contains("/ip6/::/"))
            .collect()
    } else {
        config.peer.advertise.iter().collect::<Vec<_>>()
    };
    known
        .into_iter()
        .map(|addr| {
            if addr.contains("/p2p/") {
                addr.clone()
            } else {
                format!("{addr}/p2p/{peer_id}")
            }
        })
        .collect()
}

pub(crate) fn utc_now() -> UtcMillis {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    UtcMillis(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

fn template(options: &InitOptions) -> String {
    let InitOptions {
        host,
        listen,
        control_port,
        peer_port,
        artifact_port,
        monitor_port,
        gateway_port,
        ..
    } = options;
    let gateway_at = if *gateway_port == 0 { 7404 } else { *gateway_port };
    let quoted = |text: &str| toml::Value::String(text.to_owned()).to_string();
    let reached = |port: &u16| match host.parse::<IpAddr>() {
        Ok(ip) => SocketAddr::new(ip, *port).to_string(),
        Err(_) => format!("{host}:{port}"),
    };
    let multi = |ip: &IpAddr| match ip {
        IpAddr::V4(ip) => format!("/ip4/{ip}/tcp/{peer_port}"),
        IpAddr::V6(ip) => format!("/ip6/{ip}/tcp/{peer_port}"),
    };
    let peer_reached = match host.parse::<IpAddr>() {
        Ok(ip) => multi(&ip),
        Err(_) => format!("/dns/{host}/tcp/{peer_port}"),
    };
    let (mode, budget) = match options.open {
        None => ("invited", Credits::ZERO),
        Some(credits) => ("open", credits),
    };
    format!(
        r#"# A Karez scheduler. Changes are read at the next start.

# For people.
name = {name}
# Who runs it: the default of its invitations.
institution = {institution}

# gRPC for nodes, users and tools, over TLS with Karez keys (TCP).
[control]
listen = {control_listen}
# The host and port that invitations name: others must reach the scheduler there.
advertise = {control_advertise}

# The peer network (TCP): offers from nodes, summaries from other schedulers.
[peer]
listen = [{peer_listen}]
# Where others reach it.
advertise = [{peer_advertise}]
# Other schedulers to start from, like "/dns/karez.example.org/tcp/7401/p2p/12D3KooW…".
bootstrap = []

# The scheduler's artifact store, where users leave inputs and fetch results (UDP).
[artifacts]
listen = {artifact_listen}
advertise = [{artifact_advertise}]
# Artifacts that no unfinished job needs make room when the store is full, the least recently used first.
limit = "20 GiB"

# Health checks and reflection without Karez keys, for grpcurl and probes (TCP).
[monitor]
enabled = true
listen = {monitor_listen}
# Needed to listen anywhere but on this machine: an X.509 certificate and its key, as PEM files.
# certificate = "/etc/karez/monitor.pem"
# key = "/etc/karez/monitor.key"

# HTTP as OpenAI's clients speak it, for holders of API keys (`karez key new`) (TCP).
[gateway]
enabled = {gateway}
listen = {gateway_listen}
# The host and port that users are told, where it is another.
# advertise = "karez.example.org:7404"
# Needed to listen anywhere but on this machine: an X.509 certificate and its key, as PEM files.
# certificate = "/etc/karez/gateway.pem"
# key = "/etc/karez/gateway.key"
# Base models that may be fine-tuned over HTTP, by their names in the catalogue; ["*"] for any. They are Hugging Face
# folders: `karez artifact add FOLDER --model NAME`. This machine reads them, checks the data and writes the results.
fine_tuning = [{fine_tuning}]

# "invited": keys that redeem an invitation. "open": any key; each user starts with these credits.
[admission]
mode = "{mode}"
credits = "{budget}"

# What is late, and when.
[timing]
# heartbeat = "2s"          # how often nodes report
# lease_ttl = "15s"         # how long a lease lasts without renewal
# reconnect_grace = "5s"    # how long a node that lost its session keeps its leases
# ask_timeout = "5s"        # how long a node may think about a lease
# summary_every = "10s"     # how often other schedulers hear from this one

[limits]
# jobs_open_max = 10000       # unfinished jobs, of everybody
# jobs_open_user_max = 1000   # unfinished jobs of one user
# jobs_kept = 10000           # finished jobs kept for listing
# device_time_max = "24h"     # the longest one lease may bill
# dispute_window = "7d"       # how long a receipt can be disputed; silence accepts
# calls_per_second = 100      # of one key, after a burst of four times as many
# watches_max = 64            # of one key at a time

[placement]                   # what counts into the cost of finished work besides prices
# carbon_price = "0.05"       # for a kilogram of CO2
# carbon_max = 600            # no node where a kilowatt-hour weighs more grams
# watts = {{ cuda = 400, cpu = 15 }}
# grid.KE = {{ price = "0.2", grams = 100 }}   # of a kilowatt-hour; the price counts where capacity is free

[fair]                        # whose turn it is, until `karez ledger floors` promises it in the books
# half_life = "7d"            # after so long, use and contribution count half
# donated = "0.1"             # what an hour of a donated device counts as
# floor_percent = 50          # of everything, the same for all; the rest by contribution
# grants = {{ uni-nairobi = 50 }}   # extra weight, in percent of an equal share
"#,
        name = quoted(&options.name),
        gateway = *gateway_port != 0,
        // On one machine, whoever uses it is its operator.
        fine_tuning = if *gateway_port == 0 { "" } else { "\"*\"" },
        gateway_listen = quoted(&SocketAddr::from(([127, 0, 0, 1], gateway_at)).to_string()),
        institution = quoted(options.institution.as_str()),
        control_listen = quoted(&SocketAddr::new(*listen, *control_port).to_string()),
        control_advertise = quoted(&reached(control_port)),
        peer_listen = quoted(&multi(listen)),
        peer_advertise = quoted(&peer_reached),
        artifact_listen = quoted(&SocketAddr::new(*listen, *artifact_port).to_string()),
        artifact_advertise = quoted(&reached(artifact_port)),
        monitor_listen = quoted(&format!("127.0.0.1:{monitor_port}")),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_new_directory_invites_and_is_never_overwritten() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("deep/scheduler");
        let options = InitOptions::new("uni-nairobi".parse().unwrap(), "karez.example.org");
        let created = init(&dir, &options).unwrap();
        assert_eq!(
            fs::metadata(dir.join(KEY_FILE)).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert!(matches!(init(&dir, &options), Err(SetupError::Exists { .. })));

        let ask = InviteOptions {
            role: Role::User,
            institution: None,
            credits: Credits(2_500_000),
            valid: Duration::from_secs(3_600),
            uses: 3,
        };
        let invitation = invite::decode(&invite(&dir, &ask).unwrap()).unwrap();
        assert_eq!(invitation.scheduler, created.id);
        assert_eq!(invitation.institution.as_str(), "uni-nairobi");
        assert_eq!(invitation.control_addr, "karez.example.org:7400");
        assert!(
            invitation.peer_addrs[0].starts_with("/dns/karez.example.org/tcp/7401/p2p/12D3"),
            "{invitation:?}"
        );
        assert_eq!((invitation.uses_max, invitation.credits), (3, Credits(2_500_000)));

        let node = invite(
            &dir,
            &InviteOptions {
                role: Role::Node,
                ..ask.clone()
            },
        )
        .unwrap_err();
        assert!(node.to_string().contains("a node earns"), "{node}");
        assert!(invite(&dir, &InviteOptions { uses: 0, ..ask }).is_err());
        assert!(
            invite(
                temp.path(),
                &InviteOptions {
                    role: Role::Node,
                    institution: None,
                    credits: Credits::ZERO,
                    valid: Duration::from_secs(1),
                    uses: 1
                }
            )
            .unwrap_err()
            .to_string()
            .contains("karez scheduler init")
        );
    }

    #[test]
    fn unsound_options_leave_nothing_behind() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("scheduler");
        let options = InitOptions::new("uni-nairobi".parse().unwrap(), "two words");
        assert!(init(&dir, &options).is_err());
        assert!(!dir.exists());
    }
}
