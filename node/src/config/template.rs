//! The commented file that `karez node init` leaves behind.
use super::SchedulerEntry;
use karez_core::{
    id::{Country, Institution},
    unit::Rate,
};
use std::fmt::Write as _;

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

# The smallest share of one device that is lent, by the start of its class; without an entry, devices are lent whole.
# Guests then share a device: its memory is divided among them, its arithmetic where CUDA's multi-process service runs.
# [shares]
# cuda = 0.25

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
