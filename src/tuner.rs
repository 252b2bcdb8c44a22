//! `karez tuner`: answers one question of the scheduler about training, and ends.
//!
//! The scheduler imports no engine, and what is read here comes from strangers: so it is a process of its own, closed off
//! like a worker before it opens a file. The conversation's types are [`karez_scheduler::tuner`]'s.
use crate::finetune::{steps_per_part, tokens_per_step};
use anyhow::{Context as _, Result};
use karez_core::unit::Bytes;
use karez_engine::{
    train::{
        Settings, TrainError,
        base::read_config,
        checkpoint::{CHECKPOINT_MAX, losses_of, state_of},
        gguf,
        results::Finished,
        trainer::{self, Spec},
    },
    worker,
};
use karez_scheduler::tuner::{ADAPTER_FILE, Ask, BASE_FILE, Fault, Outline, Progress, Question, Told};
use serde_json::{Map, Value};
use std::{
    fs::File,
    io::{BufWriter, Read as _, Write as _},
    path::Path,
};

/// Bytes of a question at most.
const QUESTION_MAX: u64 = 1 << 20;

/// Reads the question, closes the sandbox, and answers. To be called before anything starts a thread.
pub(crate) fn answer() -> Result<()> {
    let mut text = Vec::new();
    std::io::stdin().take(QUESTION_MAX).read_to_end(&mut text)?;
    let Question { memory, what } = serde_json::from_slice(&text).context("the question")?;
    let (readable, also, folder) = match &what {
        Ask::Check { base, data, .. } => (base, Some(data), None),
        Ask::Read { checkpoint } => (checkpoint, None, None),
        Ask::Base { base, folder } => (base, None, Some(folder)),
        Ask::Adapter {
            base,
            checkpoint,
            folder,
            ..
        } => (base, Some(checkpoint), Some(folder)),
    };
    // What the kernel does not offer is left out, and said on standard error; workers on nodes say so in their offers.
    let _ = worker::enclose(
        Some(readable),
        also.map(|path| path.as_path()),
        folder.map(|path| path.as_path()),
        Bytes(memory),
    );
    let told = match told(&what) {
        Ok(told) => told,
        Err(error) => refusal(error, &what)?,
    };
    let mut out = std::io::stdout().lock();
    serde_json::to_writer(&mut out, &told)?;
    Ok(out.flush()?)
}

fn told(ask: &Ask) -> Result<Told, TrainError> {
    match ask {
        Ask::Check {
            base,
            data,
            settings,
            language,
        } => check(base, data, settings, language).map(Told::Checked),
        Ask::Read { checkpoint } => progress(checkpoint).map(Told::Read),
        Ask::Base { base, folder } => {
            written(&folder.join(BASE_FILE), |out| gguf::export_base(base, out))?;
            Ok(Told::Written)
        }
        Ask::Adapter {
            base,
            checkpoint,
            name,
            over,
            folder,
        } => {
            let finished = Finished::read(base, &read(checkpoint)?)?;
            written(&folder.join(ADAPTER_FILE), |out| {
                finished.write_gguf_adapter(name, Some(over), out)
            })?;
            Ok(Told::Written)
        }
    }
}

fn check(
    base: &Path,
    data: &Path,
    settings: &Map<String, Value>,
    language: &str,
) -> Result<Outline, TrainError> {
    let mut settings = settings.clone();
    if !settings.contains_key("sequence_len") {
        // Whoever asks over HTTP has not seen the base model's description.
        let most = read_config(base)?.max_position_embeddings;
        settings.insert(
            "sequence_len".into(),
            most.min(Settings::default().sequence_len).into(),
        );
    }
    let settings = Settings::from_json(Value::Object(settings))?;
    let spec = Spec {
        base,
        base_digest: "",
        data,
        data_digest: "",
        settings: &settings,
        language: Some(language).filter(|language| !language.is_empty()),
        threads: 1,
        memory: None,
    };
    let outline = trainer::outline(&spec)?;
    // The store's name for the data says nothing to whoever sent it.
    let here = data.display().to_string();
    let named = data.file_name().unwrap_or_default().to_string_lossy();
    let plain = |notice: &String| notice.replace(&here, "the data").replace(&*named, "the data");
    Ok(Outline {
        settings: settings.canonical(),
        steps: outline.steps as u64,
        steps_per_part: steps_per_part(&outline, &settings),
        tokens_per_step: tokens_per_step(&outline, &settings),
        examples: outline.examples as u64,
        held_out: outline.held_out as u64,
        epochs: settings.num_epochs as u64,
        memory: outline.memory,
        notices: outline.notices.iter().map(plain).collect(),
    })
}

fn progress(checkpoint: &Path) -> Result<Progress, TrainError> {
    let bytes = read(checkpoint)?;
    let state = state_of(&bytes)?;
    // Where nothing was held out, there was nothing to see.
    let looks = state.looks.iter().filter(|look| !look.languages.is_empty());
    let looks = looks.map(|look| (look.step as u64, look.loss()));
    Ok(Progress {
        losses: losses_of(&bytes)?,
        held_out: looks.collect(),
        tokens: state.tokens,
    })
}

fn read(path: &Path) -> Result<Vec<u8>, TrainError> {
    let mut bytes = Vec::new();
    File::open(path)?.take(CHECKPOINT_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn written(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> Result<(), TrainError>,
) -> Result<(), TrainError> {
    let mut out = BufWriter::new(File::create(path)?);
    write(&mut out)?;
    Ok(out.flush()?)
}

/// A fault of what was given, in words that name no path of this machine; anything else is an error of this process.
fn refusal(error: TrainError, ask: &Ask) -> Result<Told> {
    let (base, data) = match ask {
        Ask::Check { base, data, .. } => (Some(base), Some(data)),
        Ask::Base { base, .. } | Ask::Adapter { base, .. } => (Some(base), None),
        Ask::Read { .. } => (None, None),
    };
    let (what, why) = match error {
        TrainError::Setting { name, why } => (Fault::Setting(name), why),
        TrainError::Data { faults, .. } => (Fault::Data, faults.join("; ")),
        TrainError::File { path, why } if data.is_some_and(|data| *data == path) => (Fault::Data, why),
        TrainError::File { path, why } => {
            let name = base.and_then(|base| path.strip_prefix(base).ok());
            let name = name.map(|name| name.display().to_string());
            let name = name.filter(|name| !name.is_empty());
            let why = name.map_or_else(|| why.clone(), |name| format!("{name}: {why}"));
            (Fault::Base, why)
        }
        error @ TrainError::Checkpoint(_) => (Fault::Checkpoint, error.to_string()),
        error @ (TrainError::Json(_)
        | TrainError::Tokenizer(_)
        | TrainError::Unsupported(_)
        | TrainError::Missing(_)
        | TrainError::Shape { .. }) => (Fault::Base, error.to_string()),
        error => return Err(error.into()),
    };
    Ok(Told::Refused { what, why })
}
