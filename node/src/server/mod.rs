//! A server of the owner's that runs already and speaks OpenAI's API: vLLM, llama-server, Ollama, SGLang.
//!
//! Each of its models is a class of device, `server/NAME`, with as many devices as it takes requests at a time. What it can
//! do is found out by asking it ([`Server::look`]), again and again while the node lives. A node that fronts a server lends
//! nothing else: one speed and one price hold for a kind of work.
//!
//! | file | what lives there |
//! |---|---|
//! | `mod` | which models it has, how fast they are |
//! | `answer` | one request, its answer, its counts |
//! | `http` | plain HTTP |
//!
//! Not here: running a lease against it (`runner::served`).
mod answer;
mod http;

use crate::{
    config::{self, SERVED_NAME_RULE, is_served_name},
    daemon::WorkerProgram,
};
pub(crate) use answer::Counts;
use http::Http;
use karez_core::{
    artifact::{ArtifactRef, SERVER_CLASS},
    records::{Engine, WorkKind},
    unit::Speed,
};
use karez_engine::{
    EngineError, SpawnOptions, Worker,
    protocol::{Generate, Load, LoadKind, Output, Prompt, Work},
};
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// How its speeds are measured.
const METHOD: &str = "server-probe/1";
/// How often it is asked for its models.
pub(crate) const LOOK_EVERY: Duration = Duration::from_secs(10);
/// It must name its models within this.
const MODELS_MAX: Duration = Duration::from_secs(5);
/// The first answer of a model may take this long: some servers load it only then.
const FIRST_MAX: Duration = Duration::from_secs(300);
/// Tokens of the answer that is measured.
const MEASURED_TOKENS: u32 = 24;
/// The tokenizer must be there within this.
const TOKENIZER_MAX: Duration = Duration::from_secs(30);

/// The server, as the node knows it.
pub(crate) struct Server {
    settings: config::Server,
    http: Http,
    program: Option<WorkerProgram>,
    /// The models it answers for, as last seen.
    models: Mutex<Vec<Served>>,
    /// Counts tokens, once it was needed.
    counter: tokio::sync::Mutex<Option<Worker>>,
}

/// A model of the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Served {
    pub(crate) name: String,
    pub(crate) work: WorkKind,
    pub(crate) speed: Speed,
}

/// What was found when the server was looked at.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) models: Vec<Served>,
    /// What is not offered, and why.
    pub(crate) notes: Vec<String>,
}

/// Something is wrong with the server: elsewhere the work may succeed.
fn fault(why: impl Into<String>) -> EngineError {
    EngineError::Server { reason: why.into() }
}

impl Served {
    /// Its class of device.
    pub(crate) fn class(&self) -> String {
        format!("{SERVER_CLASS}{}", self.name)
    }
}

impl Seen {
    /// One engine for each kind of work; the slowest model speaks for the kind.
    pub(crate) fn engines(&self) -> Vec<Engine> {
        let mut speeds: BTreeMap<WorkKind, Speed> = BTreeMap::new();
        for model in &self.models {
            let speed = speeds.entry(model.work).or_insert(model.speed);
            *speed = model.speed.min(*speed);
        }
        let engine = |(work, speed)| Engine {
            name: "server".into(),
            version: "openai/1".into(),
            work,
            speed,
            method: METHOD.into(),
        };
        speeds.into_iter().map(engine).collect()
    }
}

impl Server {
    /// Reads the token's file, if there is one; paths are relative to the node's directory.
    pub(crate) fn new(
        mut settings: config::Server,
        dir: &Path,
        program: Option<WorkerProgram>,
    ) -> Result<Self, std::io::Error> {
        let key = match &settings.key_file {
            Some(path) => Some(std::fs::read_to_string(dir.join(path))?.trim().to_owned()),
            None => None,
        };
        settings.tokenizer = settings.tokenizer.map(|path| dir.join(path));
        Ok(Self {
            http: Http::new(&settings.url, key),
            settings,
            program,
            models: Mutex::default(),
            counter: tokio::sync::Mutex::default(),
        })
    }

    /// Requests at a time for each model.
    pub(crate) fn requests(&self) -> u32 {
        self.settings.requests
    }

    /// How long it may write nothing.
    pub(crate) fn silence(&self) -> Duration {
        Duration::from_millis(self.settings.silence.0)
    }

    fn models(&self) -> MutexGuard<'_, Vec<Served>> {
        self.models.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The server's own name of a model.
    pub(crate) fn name_of(&self, model: &ArtifactRef) -> Option<String> {
        let models = self.models();
        let found = models
            .iter()
            .find(|served| ArtifactRef::served(&served.name) == *model);
        found.map(|served| served.name.clone())
    }

    /// Asks for its models, and measures those that are new.
    pub(crate) async fn look(&self) -> Seen {
        let mut seen = Seen::default();
        let named = match self.named(&mut seen.notes).await {
            Ok(named) => named,
            Err(error) => {
                seen.notes.push(error.to_string());
                // When it comes back it may be another one.
                self.models().clear();
                return seen;
            }
        };
        if let Err(error) = self.tokens(vec!["one".into()], "").await {
            seen.notes.push(error.to_string());
            self.models().clear();
            return seen;
        }
        for name in named {
            let known = self.models().iter().find(|served| served.name == name).cloned();
            match known {
                Some(known) => seen.models.push(known),
                None => match self.measure(&name).await {
                    Ok(new) => seen.models.push(new),
                    Err(error) => seen.notes.push(format!("{name} is not lent: {error}")),
                },
            }
        }
        self.models().clone_from(&seen.models);
        seen
    }

    /// The names of its models that may be lent.
    async fn named(&self, notes: &mut Vec<String>) -> Result<Vec<String>, EngineError> {
        #[derive(Deserialize)]
        struct List {
            data: Vec<Entry>,
        }
        #[derive(Deserialize)]
        struct Entry {
            id: String,
        }
        let list = self.http.get("/v1/models", MODELS_MAX).await?;
        let list: List = serde_json::from_value(list).map_err(|error| {
            fault(format!(
                "its list of models has another shape than OpenAI's: {error}"
            ))
        })?;
        let mut named: Vec<String> = list.data.into_iter().map(|entry| entry.id).take(1000).collect();
        let wanted = &self.settings.models;
        notes.extend(
            wanted
                .iter()
                .filter(|name| !named.contains(name))
                .map(|name| format!("the provider's own server has no model {name:?} now")),
        );
        named.retain(|name| wanted.is_empty() || wanted.contains(name));
        named.retain(|name| {
            let fits = is_served_name(name);
            if !fits {
                let start: String = name.chars().filter(|c| !c.is_control()).take(80).collect();
                notes.push(format!("the model {start:?} is not lent: it {SERVED_NAME_RULE}"));
            }
            fits
        });
        named.sort();
        named.dedup();
        if named.len() > config::SERVED_MAX {
            notes.push(format!(
                "{} of its models are not lent, {} are at most: choose with server.models",
                named.len() - config::SERVED_MAX,
                config::SERVED_MAX
            ));
            named.truncate(config::SERVED_MAX);
        }
        notes.truncate(16);
        Ok(named)
    }

    /// Finds out what a model does, and how fast, by having it do a little.
    async fn measure(&self, name: &str) -> Result<Served, EngineError> {
        let prompt = Prompt::Text {
            text: "Count from one to forty.".into(),
            system: None,
        };
        let request = Generate::greedy(prompt, MEASURED_TOKENS);
        let mut began = Instant::now();
        let mut pieces = 0u64;
        // The first piece may have waited for the model to be loaded: what comes after it tells its speed.
        let written = self
            .generate(name, &request, FIRST_MAX, &mut |_| {
                if pieces == 0 {
                    began = Instant::now();
                }
                pieces += 1;
            })
            .await;
        let refused = match written {
            Ok(answered) => {
                let tokens = answered.counts.tokens_out.max(1);
                return Ok(served(name, WorkKind::Generate, tokens, began.elapsed()));
            }
            Err(error) => error,
        };
        let texts = vec!["Rain fills the channel under the hill. ".repeat(8); 8];
        // Once to load it, once to measure it.
        let first = self.embed(name, texts.clone(), FIRST_MAX).await;
        first.map_err(|error| {
            fault(format!(
                "it writes no text ({refused}) and makes no vectors ({error})"
            ))
        })?;
        let began = Instant::now();
        let (_, counts) = self.embed(name, texts, FIRST_MAX).await?;
        Ok(served(
            name,
            WorkKind::Embed,
            counts.tokens_in.max(1),
            began.elapsed(),
        ))
    }

    /// How many tokens were read and written, by the node's own tokenizer; nothing without one.
    async fn tokens(&self, mut asked: Vec<String>, written: &str) -> Result<Option<(u64, u64)>, EngineError> {
        let Some(path) = &self.settings.tokenizer else {
            return Ok(None);
        };
        asked.push(written.to_owned());
        let mut counter = self.counter.lock().await;
        if counter.as_ref().is_none_or(|worker| worker.ended().is_some()) {
            let program = self
                .program
                .as_ref()
                .ok_or_else(|| fault("server.tokenizer needs a worker program, and this node has none"))?;
            let worker = Worker::spawn(&program.path, &program.args, SpawnOptions::default()).await?;
            let load = Load::new(LoadKind::Count, path.clone());
            let loaded = worker.load(load, Some(TOKENIZER_MAX)).await;
            loaded.map_err(|error| fault(format!("server.tokenizer: {error}")))?;
            *counter = Some(worker);
        }
        let Some(worker) = counter.as_ref() else {
            return Ok(None);
        };
        let mut all = Vec::with_capacity(asked.len());
        for texts in asked.chunks(karez_engine::protocol::TEXTS_MAX) {
            let work = Work::Count {
                texts: texts.to_vec(),
            };
            match worker.run(work)?.finish().await {
                Ok((Output::Counts { tokens }, _)) => all.extend(tokens),
                Ok(_) => return Err(fault("the tokenizer answered something else than was asked")),
                Err((error, _)) => return Err(fault(format!("the tokenizer: {error}"))),
            }
        }
        let wrote = all.pop().unwrap_or(0);
        Ok(Some((all.iter().sum(), wrote)))
    }
}

fn served(name: &str, work: WorkKind, tokens: u64, took: Duration) -> Served {
    let millis = u64::try_from(took.as_millis()).unwrap_or(u64::MAX).max(1);
    Served {
        name: name.to_owned(),
        work,
        // Thousandths of a token in a second.
        speed: Speed(tokens.saturating_mul(1_000_000) / millis),
    }
}
