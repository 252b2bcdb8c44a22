//! The file as it is written, and what of it is allowed.
use super::{
    Limits, Listen, Models, NodeConfig, Policy, SCHEDULERS_MAX, SEQUENCES, SchedulerEntry, Server, Timing,
    TrainerConfig,
};
use crate::human::{Price, Share, Size, Span};
use karez_core::{
    id::{Country, Institution},
    key::SchedulerId,
    records::{DataClass, LICENCE_BYTES_MAX, TERMS_MAX, WorkKind},
    unit::{Bytes, Millis},
};
use karez_engine::protocol::SEQUENCES_MAX;
use serde::Deserialize;
use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawConfig {
    name: String,
    institution: Institution,
    country: Country,
    #[serde(default)]
    rates: BTreeMap<String, Price>,
    #[serde(default)]
    shares: BTreeMap<String, Share>,
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
    pub(super) fn checked(self) -> Result<NodeConfig, Bad> {
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
        for (key, many) in [("rates", self.rates.len()), ("shares", self.shares.len())] {
            if many > 64 {
                return Err((key, format!("has {many} entries, the limit is 64")));
            }
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
            shares: self
                .shares
                .into_iter()
                .map(|(start, share)| (start, share.0))
                .collect(),
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
