//! `node.toml`: what the owner decides, parsed once into types.
//!
//! Unknown keys are errors: a misspelt limit must not silently be no limit. Every error names the file, the line
//! and the key. Start at [`NodeConfig::load`]; [`template`] writes the commented file that `init` leaves behind.
use crate::human::{Price, Size, Span};
use karez_core::{
    id::{Country, Institution},
    key::SchedulerId,
    records::{DataClass, LICENCE_BYTES_MAX, TERMS_MAX, WorkKind},
    unit::{Bytes, Millis, Rate},
};
use karez_engine::protocol::SEQUENCES_MAX;
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    fmt::Write as _,
    net::SocketAddr,
    path::{Path, PathBuf},
};

/// Schedulers one node may serve.
pub const SCHEDULERS_MAX: usize = 8;
/// Generations that one model computes at a time, unless the owner says otherwise.
const SEQUENCES: u16 = 16;
/// Bytes of a configuration file at most.
const FILE_MAX: u64 = 256 << 10;

/// Why a configuration is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// There is no file.
    #[error("there is no {}: run `karez node init` first, or name the node's directory with --dir", path.display())]
    Missing {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// The file cannot be read.
    #[error("{}: {why}", path.display())]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        why: String,
    },
    /// A key is missing, unknown, or has a value that is not allowed.
    #[error("{}:{line}: {}{why}", path.display(), if key.is_empty() { String::new() } else { format!("{key}: ") })]
    Value {
        /// Which file.
        path: PathBuf,
        /// Which line, from 1.
        line: usize,
        /// Which key; empty when the line has none.
        key: String,
        /// What is wrong with it.
        why: String,
    },
}

/// Everything the owner decides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeConfig {
    /// A name for people.
    pub name: String,
    /// Whose machine.
    pub institution: Institution,
    /// Where it stands.
    pub country: Country,
    /// Credits per device-hour by the start of the device class; see [`NodeConfig::rate_of`].
    pub rates: BTreeMap<String, Rate>,
    /// What guests may use.
    pub limits: Limits,
    /// How models are run and kept.
    pub models: Models,
    /// The owner's own trainer; ours serves where there is none.
    pub trainer: Option<TrainerConfig>,
    /// A server of the owner's that answers instead of this machine's own engines.
    pub server: Option<Server>,
    /// Whom and what the owner serves.
    pub policy: Policy,
    /// Where the node listens.
    pub listen: Listen,
    /// Spans between things.
    pub timing: Timing,
    /// Whom the node offers its capacity to, in no particular order.
    pub schedulers: Vec<SchedulerEntry>,
}

/// What guests may use of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Leases that run on the CPU at once; 0 lends no CPU.
    pub cpu_slots: u32,
    /// Whether GPUs are lent.
    pub gpus: bool,
    /// Threads all workers together compute with; all the machine has when absent.
    pub threads: Option<u16>,
    /// Memory all workers together may use; half of the machine's when absent.
    pub memory: Option<Bytes>,
    /// Disk the artifact store may use.
    pub store: Bytes,
    /// Tokens of context a generation may use; the engine's own limit when absent.
    pub context_tokens: Option<u32>,
}

/// How models are run and kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Models {
    /// Generations that one model computes at a time. With 1, answers are the same to the last bit whatever else runs.
    pub sequences: u16,
    /// Models that stay once they are loaded, by the beginning of their digest.
    pub pinned: Vec<String>,
}

/// The owner's own trainer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrainerConfig {
    /// A Python that can import torch, transformers and peft.
    pub python: PathBuf,
    /// Whether it serves leases on the CPU too, where our own is mostly faster.
    pub cpu: bool,
}

/// A server that speaks OpenAI's API and runs already: vLLM, llama-server, Ollama, SGLang.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    /// `http://host:port`, with or without `/v1`, on this machine or in its own network.
    pub url: String,
    /// The models to offer, by the server's names; all it has when empty.
    pub models: Vec<String>,
    /// Requests at a time for each model.
    pub requests: u32,
    /// A server that writes nothing for so long is given up.
    pub silence: Millis,
    /// A file with the bearer token it asks for.
    pub key_file: Option<PathBuf>,
    /// A `tokenizer.json` to check its counts with.
    pub tokenizer: Option<PathBuf>,
}

/// Whom and what the owner serves.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Policy {
    /// Users of these institutions only; empty for all.
    pub institutions: Vec<Institution>,
    /// Never users of these institutions.
    pub institutions_excluded: Vec<Institution>,
    /// These kinds of work only; empty for all.
    pub work: Vec<WorkKind>,
    /// Models under these licences only, by their SPDX names; empty for all.
    pub licences: Vec<String>,
    /// No data that must be handled with more care than this; internal data when absent.
    pub data: Option<DataClass>,
    /// Guests leave when users of the owner's institution wait for the machine.
    pub local_first: bool,
    /// Whether the machine is also offered to schedulers that are found on the peer network and admit it.
    pub find_schedulers: bool,
}

/// Where the node listens. It needs no open port: all it must do is dial out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listen {
    /// UDP address of artifact transfer.
    pub artifacts: SocketAddr,
    /// `ip:port` under which others reach that address; found out when empty.
    pub artifact_addrs: Vec<String>,
    /// libp2p multiaddresses to listen on; none are needed.
    pub peer: Vec<String>,
}

/// Spans between things.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// Between two reports to a scheduler.
    pub heartbeat: Millis,
    /// How long an offer is believed.
    pub offer_lifetime: Millis,
    /// Between the first meter readings of a lease.
    pub reading_interval: Millis,
    /// How long a guest has to leave when the owner wants the machine back.
    pub reclaim_grace: Millis,
    /// How long a worker with a loaded model is kept for the next lease.
    pub warm: Millis,
}

/// A scheduler the node offers its capacity to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SchedulerEntry {
    /// Its key: whoever answers with another one is not believed.
    pub key: SchedulerId,
    /// `host:port` of its control API.
    pub control_addr: String,
    /// libp2p multiaddresses.
    pub peer_addrs: Vec<String>,
}

impl NodeConfig {
    /// Reads the file at `path`.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let unreadable = |why: String| ConfigError::Unreadable {
            path: path.to_owned(),
            why,
        };
        let bytes = std::fs::metadata(path)
            .map(|meta| meta.len())
            .map_err(|error| match error.kind() {
                std::io::ErrorKind::NotFound => ConfigError::Missing {
                    path: path.to_owned(),
                },
                _ => unreadable(error.to_string()),
            })?;
        if bytes > FILE_MAX {
            return Err(unreadable(format!(
                "{bytes} bytes are too many for a configuration, the limit is {FILE_MAX}"
            )));
        }
        let text = std::fs::read_to_string(path).map_err(|error| unreadable(error.to_string()))?;
        Self::parse(&text, path)
    }

    /// Reads `text`; `path` only completes the errors.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let raw: RawConfig = toml::from_str(text).map_err(|error| {
            let start = error.span().map_or(0, |span| span.start);
            let line = text.get(..start).unwrap_or(text).matches('\n').count() + 1;
            let key = key_on(text, line);
            let why = error.message().replace('\n', " ");
            ConfigError::Value {
                path: path.to_owned(),
                line,
                key,
                why,
            }
        })?;
        raw.checked().map_err(|(key, why)| {
            let line = line_of(text, key);
            ConfigError::Value {
                path: path.to_owned(),
                line,
                key: key.to_owned(),
                why,
            }
        })
    }

    /// What one device of `class` costs for an hour: the entry of `[rates]` with the longest matching start;
    /// without any, the capacity is donated.
    pub fn rate_of(&self, class: &str) -> Rate {
        let matching = self
            .rates
            .iter()
            .filter(|(prefix, _)| class.starts_with(prefix.as_str()));
        matching
            .max_by_key(|(prefix, _)| prefix.len())
            .map_or(Rate::FREE, |(_, rate)| *rate)
    }
}

/// The key that stands on a line, if one does.
fn key_on(text: &str, line: usize) -> String {
    let line = text.lines().nth(line - 1).unwrap_or("").trim();
    let key = match line.split_once('=') {
        Some((key, _)) => key.trim(),
        None => line.trim_matches(['[', ']']),
    };
    key.chars().take(80).collect()
}

/// The first line that sets `key` (`table.name` or `name`); 1 when none does.
fn line_of(text: &str, key: &str) -> usize {
    let (table, name) = key.rsplit_once('.').unwrap_or(("", key));
    let mut current = "";
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.starts_with('[') {
            current = line
                .split('#')
                .next()
                .unwrap_or(line)
                .trim()
                .trim_matches(['[', ']']);
            if current == key {
                return number + 1;
            }
        } else if current == table
            && line
                .split_once('=')
                .is_some_and(|(k, _)| k.trim().trim_matches('"') == name)
        {
            return number + 1;
        }
    }
    1
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawConfig {
    name: String,
    institution: Institution,
    country: Country,
    #[serde(default)]
    rates: BTreeMap<String, Price>,
    #[serde(default)]
    limits: RawLimits,
    #[serde(default)]
    models: RawModels,
    trainer: Option<RawTrainer>,
    server: Option<RawServer>,
    #[serde(default)]
    policy: RawPolicy,
    #[serde(default)]
    listen: RawListen,
    #[serde(default)]
    timing: RawTiming,
    #[serde(default)]
    scheduler: Vec<RawScheduler>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawLimits {
    cpu_slots: Option<u32>,
    gpus: Option<bool>,
    threads: Option<u16>,
    memory: Option<Size>,
    store: Option<Size>,
    context_tokens: Option<u32>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawModels {
    sequences: Option<u16>,
    pinned: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTrainer {
    python: PathBuf,
    #[serde(default)]
    cpu: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawServer {
    url: String,
    #[serde(default)]
    models: Vec<String>,
    requests: Option<u32>,
    silence: Option<Span>,
    key_file: Option<PathBuf>,
    tokenizer: Option<PathBuf>,
}

impl RawServer {
    fn checked(self) -> Result<Server, Bad> {
        let rest = self.url.strip_prefix("http://").unwrap_or_default();
        let host = rest.strip_suffix('/').unwrap_or(rest);
        let host = host.strip_suffix("/v1").unwrap_or(host);
        if !is_host_port(host) || host.contains(['/', '@', '?', '#']) {
            let why = format!(
                "{:?} is not http://host:port, like http://127.0.0.1:8000",
                self.url
            );
            return Err(("server.url", why));
        }
        if self.models.len() > SERVED_MAX {
            return Err(("server.models", format!("names more than {SERVED_MAX} models")));
        }
        if let Some(bad) = self.models.iter().find(|name| !is_served_name(name)) {
            return Err(("server.models", format!("{bad:?} {SERVED_NAME_RULE}")));
        }
        Ok(Server {
            url: format!("http://{host}"),
            models: self.models,
            requests: within("server.requests", self.requests.unwrap_or(8), 1, 1024)?,
            silence: within(
                "server.silence",
                self.silence.map_or(Millis(30_000), |s| s.0),
                Millis(100),
                Millis(600_000),
            )?,
            key_file: self.key_file,
            tokenizer: self.tokenizer,
        })
    }
}

/// Models of a server that one node offers at most: each is a class of device.
pub(crate) const SERVED_MAX: usize = 15;
/// What is wrong with a name that is not [`is_served_name`].
pub(crate) const SERVED_NAME_RULE: &str =
    "is no name for a model here: 1 to 56 letters, digits and -._:/@+ are";

/// A server's model becomes a class of device, whose name is short and plain.
pub(crate) fn is_served_name(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._:/@+".contains(&b);
    (1..=56).contains(&name.len()) && name.bytes().all(plain)
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawPolicy {
    institutions: Vec<Institution>,
    institutions_excluded: Vec<Institution>,
    work: Vec<WorkKind>,
    licences: Vec<String>,
    data: Option<DataClass>,
    local_first: bool,
    find_schedulers: bool,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawListen {
    artifacts: Option<SocketAddr>,
    artifact_addrs: Vec<String>,
    peer: Vec<String>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawTiming {
    heartbeat: Option<Span>,
    offer_lifetime: Option<Span>,
    reading_interval: Option<Span>,
    reclaim_grace: Option<Span>,
    warm: Option<Span>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawScheduler {
    key: SchedulerId,
    control_addr: String,
    #[serde(default)]
    peer_addrs: Vec<String>,
}

type Bad = (&'static str, String);

impl RawConfig {
    fn checked(self) -> Result<NodeConfig, Bad> {
        let l = &self.limits;
        let limits = Limits {
            cpu_slots: within("limits.cpu_slots", l.cpu_slots.unwrap_or(1), 0, 1024)?,
            gpus: l.gpus.unwrap_or(true),
            threads: l
                .threads
                .map(|n| within("limits.threads", n, 1, 1024))
                .transpose()?,
            memory: l
                .memory
                .map(|s| within("limits.memory", s.0, Bytes(64 << 20), Bytes(u64::MAX)))
                .transpose()?,
            store: within(
                "limits.store",
                l.store.map_or(Bytes(20 << 30), |s| s.0),
                Bytes(16 << 20),
                Bytes(u64::MAX),
            )?,
            context_tokens: l
                .context_tokens
                .map(|n| within("limits.context_tokens", n, 16, 1 << 24))
                .transpose()?,
        };
        let models = Models {
            sequences: within(
                "models.sequences",
                self.models.sequences.unwrap_or(SEQUENCES),
                1,
                SEQUENCES_MAX,
            )?,
            pinned: self.models.pinned,
        };
        let is_digest = |pin: &String| {
            (8..=64).contains(&pin.len()) && pin.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
        };
        if models.pinned.len() > 64 {
            return Err(("models.pinned", "names more than 64 models".into()));
        }
        if let Some(bad) = models.pinned.iter().find(|pin| !is_digest(pin)) {
            return Err((
                "models.pinned",
                format!(
                    "{bad:?} is not the beginning of a digest: give at least 8 of its hex digits, in small letters"
                ),
            ));
        }
        if let Some(trainer) = &self.trainer
            && !trainer.python.is_absolute()
        {
            let given = trainer.python.display();
            return Err((
                "trainer.python",
                format!("{given} is not a path from the root, like /opt/torch/bin/python"),
            ));
        }
        let t = &self.timing;
        let span = |key, given: Option<Span>, default: u64, min: u64, max: u64| {
            within(
                key,
                given.map_or(Millis(default), |s| s.0),
                Millis(min),
                Millis(max),
            )
        };
        let timing = Timing {
            heartbeat: span("timing.heartbeat", t.heartbeat, 2_000, 100, 60_000)?,
            offer_lifetime: span(
                "timing.offer_lifetime",
                t.offer_lifetime,
                90_000,
                1_000,
                3_600_000,
            )?,
            reading_interval: span(
                "timing.reading_interval",
                t.reading_interval,
                10_000,
                100,
                600_000,
            )?,
            reclaim_grace: span("timing.reclaim_grace", t.reclaim_grace, 10_000, 100, 3_600_000)?,
            warm: span("timing.warm", t.warm, 300_000, 0, 86_400_000)?,
        };
        if self.name.is_empty() || self.name.len() > 64 || self.name.chars().any(char::is_control) {
            return Err((
                "name",
                "must be 1 to 64 bytes of text without control characters".into(),
            ));
        }
        if self.rates.len() > 64 {
            return Err((
                "rates",
                format!("has {} entries, the limit is 64", self.rates.len()),
            ));
        }
        if self.listen.artifact_addrs.len() > 8 {
            return Err(("listen.artifact_addrs", "names more than 8 addresses".into()));
        }
        if let Some(bad) = self.listen.artifact_addrs.iter().find(|a| !is_host_port(a)) {
            return Err(("listen.artifact_addrs", format!("{bad:?} is not host:port")));
        }
        if let Some(bad) = self.listen.peer.iter().find(|a| !is_multiaddr(a)) {
            return Err((
                "listen.peer",
                format!("{bad:?} is not a multiaddress: write it like /ip4/0.0.0.0/tcp/7420"),
            ));
        }
        for (key, many) in [
            ("policy.institutions", self.policy.institutions.len()),
            (
                "policy.institutions_excluded",
                self.policy.institutions_excluded.len(),
            ),
            ("policy.licences", self.policy.licences.len()),
        ] {
            if many > TERMS_MAX {
                return Err((key, format!("has {many} entries, the limit is {TERMS_MAX}")));
            }
        }
        let named = |name: &&String| {
            name.is_empty() || name.len() > LICENCE_BYTES_MAX || name.chars().any(char::is_control)
        };
        if let Some(bad) = self.policy.licences.iter().find(named) {
            return Err((
                "policy.licences",
                format!(
                    "{bad:?} is no name of a licence: write it like apache-2.0, in at most {LICENCE_BYTES_MAX} bytes"
                ),
            ));
        }
        let both = |name: &&Institution| self.policy.institutions_excluded.contains(name);
        if let Some(both) = self.policy.institutions.iter().find(both) {
            return Err((
                "policy.institutions_excluded",
                format!("names {both}, which policy.institutions names too: remove one of them"),
            ));
        }
        if self.scheduler.len() > SCHEDULERS_MAX {
            return Err((
                "scheduler",
                format!(
                    "is given {} times, the limit is {SCHEDULERS_MAX}",
                    self.scheduler.len()
                ),
            ));
        }
        let mut schedulers: Vec<SchedulerEntry> = Vec::new();
        for entry in self.scheduler {
            if !is_host_port(&entry.control_addr) {
                let why = format!("{:?} is not host:port", entry.control_addr);
                return Err(("scheduler.control_addr", why));
            }
            if let Some(bad) = entry.peer_addrs.iter().find(|a| !is_multiaddr(a)) {
                let why = format!("{bad:?} is not a multiaddress: write it like /ip4/192.0.2.1/tcp/7421");
                return Err(("scheduler.peer_addrs", why));
            }
            if schedulers.iter().any(|s| s.key == entry.key) {
                return Err(("scheduler.key", format!("{} is listed twice", entry.key.short())));
            }
            schedulers.push(SchedulerEntry {
                key: entry.key,
                control_addr: entry.control_addr,
                peer_addrs: entry.peer_addrs,
            });
        }
        Ok(NodeConfig {
            name: self.name,
            institution: self.institution,
            country: self.country,
            rates: self
                .rates
                .into_iter()
                .map(|(class, price)| (class, price.0))
                .collect(),
            models,
            server: self.server.map(RawServer::checked).transpose()?,
            limits,
            trainer: self.trainer.map(|trainer| TrainerConfig {
                python: trainer.python,
                cpu: trainer.cpu,
            }),
            policy: Policy {
                institutions: self.policy.institutions,
                institutions_excluded: self.policy.institutions_excluded,
                work: self.policy.work,
                licences: self.policy.licences,
                data: self.policy.data,
                local_first: self.policy.local_first,
                find_schedulers: self.policy.find_schedulers,
            },
            listen: Listen {
                artifacts: self
                    .listen
                    .artifacts
                    .unwrap_or_else(|| SocketAddr::from(([0, 0, 0, 0], 0))),
                artifact_addrs: self.listen.artifact_addrs,
                peer: self.listen.peer,
            },
            timing,
            schedulers,
        })
    }
}

/// How a limit is shown to the person who broke it.
trait Shown: PartialOrd + Copy {
    fn shown(self) -> String;
}
impl Shown for u16 {
    fn shown(self) -> String {
        self.to_string()
    }
}
impl Shown for u32 {
    fn shown(self) -> String {
        self.to_string()
    }
}
impl Shown for Bytes {
    fn shown(self) -> String {
        crate::human::bytes(self)
    }
}
impl Shown for Millis {
    fn shown(self) -> String {
        format!("{} ms", self.0)
    }
}

fn within<T: Shown>(key: &'static str, value: T, min: T, max: T) -> Result<T, Bad> {
    if value < min {
        Err((
            key,
            format!("{} is too small, the least is {}", value.shown(), min.shown()),
        ))
    } else if value > max {
        Err((
            key,
            format!("{} is too large, the most is {}", value.shown(), max.shown()),
        ))
    } else {
        Ok(value)
    }
}

pub(crate) fn is_host_port(text: &str) -> bool {
    text.len() <= 256
        && text.rsplit_once(':').is_some_and(|(host, port)| {
            !host.is_empty()
                && port.parse::<u16>().is_ok()
                && !text.chars().any(|c| c.is_control() || c == ' ')
        })
}

/// Enough to catch a `host:port` in the wrong place; the peer network parses it for good.
fn is_multiaddr(text: &str) -> bool {
    text.starts_with('/') && text.len() <= 256 && !text.chars().any(|c| c.is_control() || c == ' ')
}

/// What a new `node.toml` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    /// A name for people.
    pub name: String,
    /// Whose machine.
    pub institution: Institution,
    /// Where it stands.
    pub country: Country,
    /// What one CPU slot costs for an hour.
    pub cpu_rate: Rate,
    /// Leases on the CPU at once.
    pub cpu_slots: u32,
    /// Whom to offer it to.
    pub schedulers: Vec<SchedulerEntry>,
}

/// A commented `node.toml`.
pub fn template(t: &Template) -> String {
    let mut out = String::new();
    let q = |text: &str| toml::Value::String(text.to_owned()).to_string();
    // Writing to a string cannot fail.
    let _ = write!(
        out,
        r#"# A Karez node. Restart it after a change: `karez node run`.
name = {name}
institution = {institution}
country = "{country}"

# Credits for one device during one hour, by the start of its class; 0 donates it.
# `karez node status` lists this machine's classes.
[rates]
cpu = {cpu}
# "cuda/NVIDIA H200" = 2.5

# What guests may use.
[limits]
# Leases that run on the CPU at once; 0 lends no CPU.
cpu_slots = {slots}
# gpus = true
# Threads all workers together compute with. Default: all.
# threads = 8
# Memory all workers together may use. Default: half of the machine's.
# memory = "16 GiB"
# Disk for models, inputs and results.
store = "20 GiB"
# Tokens of context a generation may use. Default: 8192, or less where the model is made for less.
# context_tokens = 8192

# How models are run and kept.
[models]
# Generations that one model computes at a time; with 1, answers are the same to the last bit whatever else runs.
# sequences = 16
# Models that stay once they are loaded, by the beginning of their digest.
# pinned = ["53aa51172d14"]

# Fine-tuning on your own PyTorch, above all on GPUs: a Python that can import torch, transformers and peft.
# [trainer]
# python = "/opt/torch/bin/python"
# Use it on CPUs too; Karez's own trainer is mostly faster there.
# cpu = true

# A server of yours that runs already and speaks OpenAI's API, instead of this machine's own engines: vLLM, llama-server,
# Ollama, SGLang. It must be on this machine or in its own network.
# [server]
# url = "http://127.0.0.1:8000"
# Its names of the models to lend. Default: all it has, 15 at most.
# models = ["llama3.1:8b"]
# Requests at a time for each model: each is a lease, at the price of "server/NAME" in [rates].
# requests = 8
# silence = "30 s"
# key_file = "server.key"
# Checks what the server says it counted.
# tokenizer = "/path/to/tokenizer.json"

# Whom and what you serve; empty lists mean everybody and everything.
[policy]
# institutions = ["uni-nairobi"]
# institutions_excluded = []
# work = ["noop", "embed", "generate"]
# Run models under these licences only, by their SPDX names.
# licences = ["apache-2.0", "mit"]
# The most delicate data this machine may be given: public, internal, personal or sensitive. Its owner answers for it.
# data = "internal"
# Guests leave, and their work goes on elsewhere, when your own institution's users wait for this machine.
# local_first = true
# Offer this machine also to schedulers that it finds on the peer network, if they admit it.
# find_schedulers = true

# A node dials out; none of these ports has to be reachable. If the artifact port is, others fetch models from here.
[listen]
# artifacts = "0.0.0.0:7430"
# artifact_addrs = ["node.example.org:7430"]
# peer = ["/ip4/0.0.0.0/tcp/7431"]

[timing]
# heartbeat = "2 s"
# offer_lifetime = "90 s"
# reading_interval = "10 s"
# How long a guest has to leave after `karez node reclaim`.
reclaim_grace = "10 s"
# How long a loaded model is kept for the next lease.
# warm = "5 min"
"#,
        name = q(&t.name),
        institution = q(t.institution.as_str()),
        country = t.country,
        cpu = price(t.cpu_rate),
        slots = t.cpu_slots,
    );
    for scheduler in &t.schedulers {
        let peers: Vec<String> = scheduler.peer_addrs.iter().map(|a| q(a)).collect();
        let _ = write!(
            out,
            "\n[[scheduler]]\nkey = \"{}\"\ncontrol_addr = {}\npeer_addrs = [{}]\n",
            scheduler.key,
            q(&scheduler.control_addr),
            peers.join(", "),
        );
    }
    out
}

/// Credits without needless zeros, quoted so that no decimal is lost: `"0.25"`, or `0`.
fn price(rate: Rate) -> String {
    if rate == Rate::FREE {
        return "0".into();
    }
    let text = karez_core::unit::Credits(rate.0).to_string();
    format!("\"{}\"", text.trim_end_matches('0').trim_end_matches('.'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use karez_core::key::{PublicKey, SecretKey};

    fn example() -> Template {
        Template {
            name: "gpu \"7\"".into(),
            institution: "uni-nairobi".parse().unwrap(),
            country: "KE".parse().unwrap(),
            cpu_rate: Rate(250_000),
            cpu_slots: 2,
            schedulers: vec![SchedulerEntry {
                key: SchedulerId(PublicKey::of(&SecretKey::from_bytes(&[1; 32]))),
                control_addr: "karez.example:7400".into(),
                peer_addrs: vec!["/ip4/127.0.0.1/tcp/7401".into()],
            }],
        }
    }

    fn parse(text: &str) -> Result<NodeConfig, String> {
        NodeConfig::parse(text, Path::new("node.toml")).map_err(|e| e.to_string())
    }

    #[test]
    fn the_template_reads_as_what_it_was_made_from() {
        let t = example();
        let config = parse(&template(&t)).unwrap();
        assert_eq!(
            (config.name, config.institution, config.country),
            (t.name, t.institution, t.country)
        );
        assert_eq!(config.schedulers, t.schedulers);
        assert_eq!(config.rates["cpu"], Rate(250_000));
        assert_eq!(config.limits.cpu_slots, 2);
        assert_eq!(config.timing.reclaim_grace, Millis(10_000));
    }

    #[test]
    fn the_longest_matching_rate_counts() {
        let text =
            "name = 'a'\ninstitution = 'uni-a'\ncountry = 'ke'\n[rates]\ncpu = 1\n\"cpu/x86-64-v4\" = 0.25\n";
        let config = parse(text).unwrap();
        assert_eq!(config.rate_of("cpu/x86-64-v3"), Rate(1_000_000));
        assert_eq!(config.rate_of("cpu/x86-64-v4"), Rate(250_000));
        assert_eq!(config.rate_of("cuda/NVIDIA H200"), Rate::FREE);
    }

    #[test]
    fn errors_name_file_line_and_key() {
        let base = "name = 'a'\ninstitution = 'uni-a'\ncountry = 'KE'\n";
        for (more, line, says) in [
            ("[limits]\nmemroy = '1 GiB'\n", 5, "memroy"),
            ("[limits]\nmemory = 'a lot'\n", 5, "memory"),
            ("[limits]\nmemory = '1 B'\n", 5, "limits.memory"),
            ("[rates]\ncpu = 0.12345678\n", 5, "cpu"),
            ("[rates]\ncpu = -1\n", 5, "cpu"),
            ("[timing]\nheartbeat = '1 ms'\n", 5, "timing.heartbeat"),
            ("[policy]\nwork = ['mining']\n", 5, "work"),
            ("[trainer]\npython = 'python3'\n", 5, "trainer.python"),
            ("[trainer]\ncpu = true\n", 4, "python"),
            ("[policy]\ninstitutions = ['UPPER']\n", 5, "institutions"),
            ("[[scheduler]]\nkey = 'abc'\ncontrol_addr = 'x:1'\n", 5, "key"),
            ("[listen]\npeer = ['0.0.0.0:1']\n", 5, "multiaddress"),
            ("[server]\nurl = 'https://x:1'\n", 5, "server.url"),
            ("[server]\nurl = 'http://x'\n", 5, "server.url"),
            (
                "[server]\nurl = 'http://x:1'\nmodels = ['a b']\n",
                6,
                "server.models",
            ),
            ("what\n", 4, "what"),
        ] {
            let error = parse(&format!("{base}{more}")).unwrap_err();
            assert!(
                error.starts_with(&format!("node.toml:{line}: ")),
                "{more:?} gave {error}"
            );
            assert!(error.contains(says), "{more:?} gave {error}");
        }
        let error = parse("name = 'a'\ncountry = 'KE'\n").unwrap_err();
        assert!(error.contains("institution"), "{error}");
    }
}
