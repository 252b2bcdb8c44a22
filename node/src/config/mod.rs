//! `node.toml`: what the owner decides, parsed once into types.
//!
//! Unknown keys are errors: a misspelt limit must not silently be no limit. Every error names the file, the line
//! and the key. Start at [`NodeConfig::load`]; [`template`] writes the commented file that `init` leaves behind.
mod raw;
mod template;

use karez_core::{
    id::{Country, Institution},
    key::SchedulerId,
    records::{DataClass, WorkKind},
    unit::{Bytes, Millis, Rate},
};
use raw::RawConfig;
use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
};

pub(crate) use raw::{SERVED_MAX, SERVED_NAME_RULE, is_host_port, is_served_name};
pub use template::{Template, template};

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
    /// The smallest share of one device that is lent, in thousandths, by the start of its class; see
    /// [`NodeConfig::share_of`].
    pub shares: BTreeMap<String, u32>,
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
        longest(&self.rates, class).unwrap_or(Rate::FREE)
    }

    /// The smallest share of one device of `class` that is lent: the entry of `[shares]` with the longest matching
    /// start; without any, devices are lent whole.
    pub fn share_of(&self, class: &str) -> u32 {
        longest(&self.shares, class).unwrap_or(0)
    }
}

fn longest<T: Copy>(by_start: &BTreeMap<String, T>, class: &str) -> Option<T> {
    let matching = by_start
        .iter()
        .filter(|(start, _)| class.starts_with(start.as_str()));
    matching
        .max_by_key(|(start, _)| start.len())
        .map(|(_, value)| *value)
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
            ("[shares]\ncpu = 1.5\n", 5, "cpu"),
            ("[shares]\ncuda = 0.0001\n", 5, "cuda"),
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
