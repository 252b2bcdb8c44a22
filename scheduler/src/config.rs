//! `scheduler.toml`, typed: parsed once, checked once, then passed down.
//!
//! Durations are written like `15s`, sizes like `20 GiB`, credits like `2.5`. An unknown key is an error.
use crate::pricing::{Fair, Placement};
use karez_core::{
    controller::{Admission, ControllerConfig},
    id::Institution,
    key::SecretKey,
    records::DISPUTE_WINDOW,
    unit::{Bytes, Credits, Millis},
};
use serde::{Deserialize, Deserializer, de::Error as _};
use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
};

/// The name of the file in a scheduler's directory.
pub const FILE: &str = "scheduler.toml";
/// A configuration is never larger.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// The most addresses a list may hold.
const ADDRS_MAX: usize = 8;
/// The most base models that the gateway's list may name.
const BASES_MAX: usize = 256;

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// There is none.
    #[error("no {FILE} in {}: create one with `karez scheduler init`", dir.display())]
    Missing {
        /// The directory.
        dir: PathBuf,
    },
    /// The file cannot be read.
    #[error("cannot read {}: {error}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// A line of it is wrong.
    #[error("{}, line {line}: {why}\n  {text}", path.display())]
    Line {
        /// Which file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// The line itself.
        text: String,
        /// What is wrong with it.
        why: String,
    },
    /// Each value is well formed, but they contradict each other or are unsafe.
    #[error("{}: {key} {why}", path.display())]
    Rule {
        /// Which file.
        path: PathBuf,
        /// Which key.
        key: &'static str,
        /// Which rule it breaks, and what to do.
        why: String,
    },
}

/// Everything the operator sets.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// A name for people.
    pub name: String,
    /// The institution that runs the scheduler: the default of its invitations.
    pub institution: Institution,
    /// The control API.
    pub control: Control,
    /// Health checks and reflection.
    #[serde(default)]
    pub monitor: Monitor,
    /// HTTP for OpenAI's clients.
    #[serde(default)]
    pub gateway: Gateway,
    /// The peer network.
    pub peer: Peer,
    /// Artifacts.
    pub artifacts: Artifacts,
    /// Who may join.
    #[serde(default)]
    pub admission: AdmissionConfig,
    /// What is late, and when.
    #[serde(default)]
    pub timing: Timing,
    /// Bounds.
    #[serde(default)]
    pub limits: Limits,
    /// The cost of finished work.
    #[serde(default)]
    pub placement: Placement,
    /// How institutions share.
    #[serde(default)]
    pub fair: Fair,
}

/// `[control]`: gRPC for nodes, users and tools, over TLS with Karez keys.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Control {
    /// Where to listen (TCP).
    pub listen: SocketAddr,
    /// `host:port` that invitations name.
    pub advertise: String,
}

/// `[monitor]`: an ordinary listener without Karez keys, for health checks and reflection only.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Monitor {
    /// Whether it runs at all.
    #[serde(default = "yes")]
    pub enabled: bool,
    /// Where to listen (TCP). Anything but loopback needs a certificate.
    #[serde(default = "monitor_listen")]
    pub listen: SocketAddr,
    /// PEM file of an X.509 certificate chain.
    pub certificate: Option<PathBuf>,
    /// PEM file of its private key.
    pub key: Option<PathBuf>,
}

/// `[gateway]`: HTTP as OpenAI's clients speak it, for holders of API keys.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gateway {
    /// Whether it runs at all.
    #[serde(default)]
    pub enabled: bool,
    /// Where to listen (TCP). Anything but loopback needs a certificate: API keys are secrets.
    #[serde(default = "gateway_listen")]
    pub listen: SocketAddr,
    /// `host:port` that users are told; where it listens when left out.
    pub advertise: Option<String>,
    /// PEM file of an X.509 certificate chain.
    pub certificate: Option<PathBuf>,
    /// PEM file of its private key.
    pub key: Option<PathBuf>,
    /// Names of base models of the catalogue (Hugging Face folders) that may be fine-tuned over HTTP; `*` for any. This
    /// machine reads them, checks the data, and writes the results as GGUF. None when empty.
    #[serde(default)]
    pub fine_tuning: Vec<String>,
}

/// `[peer]`: the peer network.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Peer {
    /// Multiaddresses to listen on.
    pub listen: Vec<String>,
    /// Multiaddresses under which others reach this scheduler; invitations name them.
    #[serde(default)]
    pub advertise: Vec<String>,
    /// Members of the network to start from.
    #[serde(default)]
    pub bootstrap: Vec<String>,
}

/// `[artifacts]`: the scheduler's own store, where users leave inputs and fetch results.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Artifacts {
    /// Where to listen (UDP).
    pub listen: SocketAddr,
    /// `host:port` that nodes and users are told.
    pub advertise: Vec<String>,
    /// The most bytes the store keeps.
    #[serde(default = "store_limit", deserialize_with = "size")]
    pub limit: Bytes,
}

/// `[admission]`: who may join.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdmissionConfig {
    /// `invited` or `open`.
    pub mode: Mode,
    /// With `open`: a new user's budget.
    #[serde(default, deserialize_with = "credits")]
    pub credits: Credits,
}

/// Who may join.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Keys that redeem an invitation.
    Invited,
    /// Any key.
    Open,
}

/// `[timing]`: what is late, and when.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Timing {
    /// How often nodes report.
    #[serde(deserialize_with = "duration")]
    pub heartbeat: Millis,
    /// How long a lease lasts without renewal.
    #[serde(deserialize_with = "duration")]
    pub lease_ttl: Millis,
    /// How long a node that lost its session keeps its leases in the scheduler's belief.
    #[serde(deserialize_with = "duration")]
    pub reconnect_grace: Millis,
    /// How long a node may think about a lease.
    #[serde(deserialize_with = "duration")]
    pub ask_timeout: Millis,
    /// How often other schedulers are told what can be placed here.
    #[serde(deserialize_with = "duration")]
    pub summary_every: Millis,
}

/// `[limits]`: bounds.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// The most unfinished jobs, of everybody.
    pub jobs_open_max: usize,
    /// The most unfinished jobs of one user.
    pub jobs_open_user_max: usize,
    /// Finished jobs kept for listing.
    pub jobs_kept: usize,
    /// The longest one lease may bill.
    #[serde(deserialize_with = "duration")]
    pub device_time_max: Millis,
    /// How long a receipt can be disputed; silence accepts.
    #[serde(deserialize_with = "duration")]
    pub dispute_window: Millis,
    /// Calls of one key per second, after a burst of four times as many.
    pub calls_per_second: u32,
    /// Watches of one key at a time.
    pub watches_max: usize,
}

impl Default for Monitor {
    fn default() -> Self {
        Self {
            enabled: true,
            listen: monitor_listen(),
            certificate: None,
            key: None,
        }
    }
}

impl Default for Gateway {
    fn default() -> Self {
        Self {
            enabled: false,
            listen: gateway_listen(),
            advertise: None,
            certificate: None,
            key: None,
            fine_tuning: Vec::new(),
        }
    }
}

impl Default for AdmissionConfig {
    fn default() -> Self {
        Self {
            mode: Mode::Invited,
            credits: Credits::ZERO,
        }
    }
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            heartbeat: Millis(2_000),
            lease_ttl: Millis(15_000),
            reconnect_grace: Millis(5_000),
            ask_timeout: Millis(5_000),
            summary_every: Millis(10_000),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            jobs_open_max: 10_000,
            jobs_open_user_max: 1_000,
            jobs_kept: 10_000,
            device_time_max: Millis(24 * 3_600_000),
            dispute_window: DISPUTE_WINDOW,
            calls_per_second: 100,
            watches_max: 64,
        }
    }
}

impl Config {
    /// Reads and checks `scheduler.toml` in `dir`.
    pub fn load(dir: &Path) -> Result<Self, ConfigError> {
        let path = dir.join(FILE);
        let meta = match fs::metadata(&path) {
            Ok(meta) => meta,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(ConfigError::Missing { dir: dir.to_owned() });
            }
            Err(error) => return Err(ConfigError::Io { path, error }),
        };
        if meta.len() > FILE_BYTES_MAX {
            let why = format!(
                "{} bytes are no configuration, the limit is {FILE_BYTES_MAX}",
                meta.len()
            );
            return Err(ConfigError::Io {
                path,
                error: io::Error::other(why),
            });
        }
        match fs::read_to_string(&path) {
            Ok(text) => Self::parse(&text, &path),
            Err(error) => Err(ConfigError::Io { path, error }),
        }
    }

    /// Parses and checks `text`; `path` only names it in errors.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|error| {
            let at = error.span().map_or(0, |span| span.start).min(text.len());
            let line = text.as_bytes()[..at].iter().filter(|b| **b == b'\n').count();
            ConfigError::Line {
                path: path.to_owned(),
                line: line + 1,
                text: text
                    .lines()
                    .nth(line)
                    .unwrap_or_default()
                    .trim()
                    .chars()
                    .take(200)
                    .collect(),
                why: error.message().to_owned(),
            }
        })?;
        config.check(path)?;
        Ok(config)
    }

    fn check(&self, path: &Path) -> Result<(), ConfigError> {
        let rule = |key, why: String| {
            Err(ConfigError::Rule {
                path: path.to_owned(),
                key,
                why,
            })
        };
        if self.name.is_empty() || self.name.len() > 64 || self.name.chars().any(char::is_control) {
            return rule("name", "must have 1 to 64 bytes and no control characters".into());
        }
        if !host_and_port(&self.control.advertise) {
            return rule(
                "control.advertise",
                format!(
                    "is {:?}: write the host and port that others reach, like karez.example.org:7400",
                    self.control.advertise
                ),
            );
        }
        let monitor = &self.monitor;
        if monitor.certificate.is_some() != monitor.key.is_some() {
            return rule(
                "monitor.certificate",
                "and monitor.key go together: set both or neither".into(),
            );
        }
        if monitor.enabled && !monitor.listen.ip().is_loopback() && monitor.certificate.is_none() {
            return rule(
                "monitor.listen",
                format!(
                    "is {}, which other machines can reach: set monitor.certificate and monitor.key, or listen on 127.0.0.1",
                    monitor.listen
                ),
            );
        }
        let gateway = &self.gateway;
        if gateway.certificate.is_some() != gateway.key.is_some() {
            return rule(
                "gateway.certificate",
                "and gateway.key go together: set both or neither".into(),
            );
        }
        if gateway.enabled && !gateway.listen.ip().is_loopback() && gateway.certificate.is_none() {
            return rule(
                "gateway.listen",
                format!(
                    "is {}, which other machines can reach, and API keys must not travel in the clear: set gateway.certificate and gateway.key, or listen on 127.0.0.1",
                    gateway.listen
                ),
            );
        }
        if gateway.fine_tuning.len() > BASES_MAX {
            let why = format!(
                "names {} models, the limit is {BASES_MAX}",
                gateway.fine_tuning.len()
            );
            return rule("gateway.fine_tuning", why);
        }
        if gateway.advertise.as_deref().is_some_and(|a| !host_and_port(a)) {
            return rule(
                "gateway.advertise",
                "is no host and port: write it like karez.example.org:7404".into(),
            );
        }
        for (key, list, least) in [
            ("peer.listen", &self.peer.listen, 1),
            ("peer.advertise", &self.peer.advertise, 0),
            ("peer.bootstrap", &self.peer.bootstrap, 0),
        ] {
            if list.len() < least || list.len() > ADDRS_MAX {
                return rule(
                    key,
                    format!("has {} addresses: {least} to {ADDRS_MAX} are allowed", list.len()),
                );
            }
            for addr in list {
                if let Err(error) = addr.parse::<karez_net::peer::Multiaddr>() {
                    return rule(
                        key,
                        format!("holds {addr:?}: {error}; write it like /ip4/0.0.0.0/tcp/7401"),
                    );
                }
            }
        }
        let artifacts = &self.artifacts.advertise;
        if artifacts.is_empty() || artifacts.len() > ADDRS_MAX {
            return rule(
                "artifacts.advertise",
                format!("needs 1 to {ADDRS_MAX} addresses like 203.0.113.7:7402"),
            );
        }
        if let Some(bad) = artifacts.iter().find(|a| !host_and_port(a)) {
            return rule(
                "artifacts.advertise",
                format!("holds {bad:?}: write it like 203.0.113.7:7402"),
            );
        }
        if self.artifacts.limit < Bytes(1 << 20) {
            return rule("artifacts.limit", "must be at least 1 MiB".into());
        }
        for found in [self.placement.check(), self.fair.check()] {
            if let Err((key, why)) = found {
                return rule(key, why);
            }
        }
        let t = &self.timing;
        for (key, value, least, most) in [
            ("timing.heartbeat", t.heartbeat, 100, 60_000),
            ("timing.lease_ttl", t.lease_ttl, 1_000, 3_600_000),
            ("timing.reconnect_grace", t.reconnect_grace, 100, 3_600_000),
            ("timing.ask_timeout", t.ask_timeout, 100, 600_000),
            ("timing.summary_every", t.summary_every, 1_000, 3_600_000),
            (
                "limits.device_time_max",
                self.limits.device_time_max,
                1_000,
                31 * 24 * 3_600_000,
            ),
            (
                "limits.dispute_window",
                self.limits.dispute_window,
                1_000,
                366 * 24 * 3_600_000,
            ),
        ] {
            if value.0 < least || value.0 > most {
                return rule(
                    key,
                    format!(
                        "is {}: {} to {} is allowed",
                        human(value),
                        human(Millis(least)),
                        human(Millis(most))
                    ),
                );
            }
        }
        if t.lease_ttl.0 < 2 * t.heartbeat.0 {
            return rule(
                "timing.lease_ttl",
                format!(
                    "is {}: at least two heartbeats ({}) must fit, or one lost packet ends a lease",
                    human(t.lease_ttl),
                    human(Millis(2 * t.heartbeat.0))
                ),
            );
        }
        let l = &self.limits;
        for (key, value) in [
            ("limits.jobs_open_max", l.jobs_open_max),
            ("limits.jobs_open_user_max", l.jobs_open_user_max),
            ("limits.jobs_kept", l.jobs_kept),
            ("limits.calls_per_second", l.calls_per_second as usize),
            ("limits.watches_max", l.watches_max),
        ] {
            if value == 0 || value > 1_000_000 {
                return rule(key, format!("is {value}: 1 to 1000000 is allowed"));
            }
        }
        Ok(())
    }

    /// What the controller is told.
    pub fn controller(&self, secret: SecretKey) -> ControllerConfig {
        ControllerConfig {
            secret,
            name: self.name.clone(),
            artifact_addrs: self.artifacts.advertise.clone(),
            admission: match self.admission.mode {
                Mode::Invited => Admission::Invited,
                Mode::Open => Admission::Open {
                    credits: self.admission.credits,
                },
            },
            heartbeat: self.timing.heartbeat,
            lease_ttl: self.timing.lease_ttl,
            reconnect_grace: self.timing.reconnect_grace,
            ask_timeout: self.timing.ask_timeout,
            jobs_open_max: self.limits.jobs_open_max,
            jobs_open_user_max: self.limits.jobs_open_user_max,
            jobs_kept: self.limits.jobs_kept,
            device_time_max: self.limits.device_time_max,
            dispute_window: self.limits.dispute_window,
            policy: self.placement.policy(),
            shares: self.fair.shares(),
        }
    }
}

/// Reads a size: `20 GiB`, `500MB`, `1048576`.
pub fn parse_size(text: &str) -> Result<Bytes, String> {
    let bad = || format!("{text:?} is no size: write it like 20 GiB or 500 MB");
    let text = text.trim();
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit: u64 = match unit.trim() {
        "" | "B" => 1,
        "kB" | "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1 << 40,
        _ => return Err(bad()),
    };
    // Whole and thousandths apart, so that no float rounds a size.
    let (whole, part) = number.split_once('.').unwrap_or((number, ""));
    if part.len() > 3 {
        return Err(bad());
    }
    let whole: u64 = whole.parse().map_err(|_| bad())?;
    let part: u64 = format!("{part:0<3}").parse().map_err(|_| bad())?;
    let bytes = (u128::from(whole) * 1_000 + u128::from(part)) * u128::from(unit) / 1_000;
    u64::try_from(bytes).map(Bytes).map_err(|_| bad())
}

fn host_and_port(text: &str) -> bool {
    text.len() <= 128
        && text.rsplit_once(':').is_some_and(|(host, port)| {
            !host.is_empty()
                && !host.chars().any(|c| c.is_whitespace() || c.is_control())
                && port.parse::<u16>().is_ok()
        })
}

fn human(span: Millis) -> String {
    humantime::format_duration(std::time::Duration::from_millis(span.0)).to_string()
}

fn size<'de, D: Deserializer<'de>>(from: D) -> Result<Bytes, D::Error> {
    parse_size(&String::deserialize(from)?).map_err(D::Error::custom)
}

pub(crate) fn duration<'de, D: Deserializer<'de>>(from: D) -> Result<Millis, D::Error> {
    let text = String::deserialize(from)?;
    let span = humantime::parse_duration(&text).map_err(|e| {
        D::Error::custom(format!(
            "{text:?} is no duration ({e}): write it like 15s or 500ms"
        ))
    })?;
    u64::try_from(span.as_millis())
        .map(Millis)
        .map_err(D::Error::custom)
}

pub(crate) fn credits<'de, D: Deserializer<'de>>(from: D) -> Result<Credits, D::Error> {
    String::deserialize(from)?.parse().map_err(D::Error::custom)
}

fn yes() -> bool {
    true
}

fn monitor_listen() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 7403))
}

fn gateway_listen() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 7404))
}

fn store_limit() -> Bytes {
    Bytes(20 << 30)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
name = "Nairobi"
institution = "uni-nairobi"
[control]
listen = "127.0.0.1:7400"
advertise = "127.0.0.1:7400"
[peer]
listen = ["/ip4/127.0.0.1/tcp/7401"]
[artifacts]
listen = "127.0.0.1:7402"
advertise = ["127.0.0.1:7402"]
"#;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(text, Path::new("scheduler.toml")).map_err(|e| e.to_string())
    }

    #[test]
    fn what_is_left_out_has_a_default() {
        let config = parse(GOOD).unwrap();
        assert_eq!(config.timing, Timing::default());
        assert_eq!(config.artifacts.limit, Bytes(20 << 30));
        assert_eq!(config.admission.mode, Mode::Invited);
    }

    #[test]
    fn errors_name_file_line_and_key() {
        for (name, text, expected) in [
            (
                "unknown key",
                GOOD.replace("[peer]", "lisen = 1\n[peer]"),
                &["scheduler.toml, line 7", "lisen"][..],
            ),
            (
                "bad duration",
                format!("{GOOD}[timing]\nheartbeat = \"soon\"\n"),
                &["line 13", "heartbeat", "15s"],
            ),
            (
                "bad size",
                GOOD.replace("[artifacts]", "[artifacts]\nlimit = \"20 potatoes\""),
                &["line 10", "20 GiB"],
            ),
            (
                "missing",
                GOOD.replace("advertise = \"127.0.0.1:7400\"\n", ""),
                &["scheduler.toml", "advertise"],
            ),
            (
                "bad name",
                GOOD.replace("uni-nairobi", "Uni Nairobi"),
                &["line 3", "institution"],
            ),
            (
                "open monitor",
                format!("{GOOD}[monitor]\nlisten = \"0.0.0.0:7403\"\n"),
                &["monitor.listen", "monitor.certificate"],
            ),
            (
                "half a pair",
                format!("{GOOD}[monitor]\nkey = \"k.pem\"\n"),
                &["monitor.certificate", "both or neither"],
            ),
            (
                "open gateway",
                format!("{GOOD}[gateway]\nenabled = true\nlisten = \"0.0.0.0:7404\"\n"),
                &["gateway.listen", "gateway.certificate", "in the clear"],
            ),
            (
                "short lease",
                format!("{GOOD}[timing]\nlease_ttl = \"3s\"\n"),
                &["timing.lease_ttl is 3s", "two heartbeats"],
            ),
            (
                "bad multiaddr",
                GOOD.replace("/ip4/127.0.0.1/tcp/7401", "127.0.0.1:7401"),
                &["peer.listen"],
            ),
            ("no toml", "name = ".into(), &["line 1"]),
        ] {
            let error = parse(&text).expect_err(name);
            for part in expected {
                assert!(error.contains(part), "{name}: {part:?} is not in:\n{error}");
            }
        }
    }

    #[test]
    fn sizes_are_exact() {
        for (text, expected) in [
            ("1", Some(1)),
            ("20 GiB", Some(20 << 30)),
            ("1.5GB", Some(1_500_000_000)),
            ("0.5 KiB", Some(512)),
            ("", None),
            ("-1", None),
            ("1 gib", None),
            ("99999999999 TiB", None),
        ] {
            assert_eq!(parse_size(text).ok(), expected.map(Bytes), "{text}");
        }
    }
}
