//! Training in a worker: from one checkpoint to the next, with what was read and computed kept in between.
use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Instant;

use super::{Desk, Engine};
use crate::error::EngineError;
use crate::protocol::{Checkpointed, Isolation, Load, ModelFacts, Output, Progress, Train, Work};
use crate::train::learner::Taken;
use crate::train::torch::{Process, Torch};
use crate::train::trainer::{Spec, Step, Trainer};
use crate::train::{Settings, TrainError, base, checkpoint};
use crate::unit::{Bytes, Millis};

/// Bytes of a model that is read whole before training begins are not counted as memory here: the node's estimate is.
pub(super) struct Training {
    model: PathBuf,
    scratch: PathBuf,
    threads: u16,
    facts: ModelFacts,
    /// Private memory that a run may take.
    memory: Option<Bytes>,
    /// A provider's trainer, which takes the place of our own.
    provided: Option<Rc<RefCell<Process>>>,
    /// The run in memory, as its last checkpoint left it.
    current: Option<Trainer>,
}

impl Training {
    /// Checks the model's description; its weights wait for the first run.
    pub(super) fn open(load: &Load, scratch: &Path, threads: u16) -> Result<Self, EngineError> {
        let config = base::read_config(&load.model)?;
        let count = |shape: &Vec<usize>| shape.iter().map(|n| *n as u64).product::<u64>();
        let parameters = config.shapes().values().map(count).sum::<u64>();
        let needs = Bytes(parameters.saturating_mul(2));
        if let Some(has) = load.memory_limit.filter(|has| needs > *has) {
            return Err(EngineError::TooLarge { needs, has });
        }
        let name = load.model.file_name().unwrap_or_default().to_string_lossy();
        let facts = ModelFacts {
            name: name.into_owned(),
            architecture: config.model_type.clone(),
            context_tokens: u32::try_from(config.max_position_embeddings).unwrap_or(u32::MAX),
            parameters,
            dimensions: None,
            memory_estimate: needs,
            engine: format!(
                "karez-train {} {}",
                env!("CARGO_PKG_VERSION"),
                std::env::consts::ARCH
            ),
            threads,
            isolation: Isolation::None,
        };
        Ok(Self {
            model: load.model.clone(),
            scratch: scratch.to_owned(),
            threads,
            facts,
            memory: load.memory_limit,
            provided: None,
            current: None,
        })
    }

    /// Hands the arithmetic over to a provider's trainer.
    pub(super) fn provide(&mut self, process: Process, name: String) {
        self.provided = Some(Rc::new(RefCell::new(process)));
        self.facts.engine = name;
    }

    /// What was taken by the process of a provider's trainer so far.
    fn taken(&self) -> Taken {
        self.provided
            .as_ref()
            .map_or_else(Taken::default, |process| process.borrow().taken())
    }

    /// A file in the scratch directory, by its plain name.
    fn file(&self, name: &str) -> Result<PathBuf, EngineError> {
        let plain = name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.');
        if !plain || name.starts_with('.') || name.is_empty() {
            return Err(EngineError::protocol(format!("{name:?} is no plain file name")));
        }
        Ok(self.scratch.join(name))
    }

    /// The run as it stands after `work.from`: the one in memory when it is that, or a new one from its files.
    fn take_up(&mut self, work: &Train) -> Result<Trainer, EngineError> {
        let value = serde_json::from_str(&work.settings)
            .map_err(|error| EngineError::bad_input(format!("the settings are not JSON: {error}")))?;
        let settings = Settings::from_json(value)?;
        let from = work.from.as_ref().map(|(_, digest)| digest.clone());
        if let Some(trainer) = self.current.take() {
            let state = trainer.state();
            let same = state.base == work.base_digest
                && state.data == work.data_digest
                && state.settings == settings.canonical()
                && state.previous == from
                && from.is_some();
            if same {
                return Ok(trainer);
            }
        }
        let data = self.file(&work.data)?;
        let spec = Spec {
            base: &self.model,
            base_digest: &work.base_digest,
            data: &data,
            data_digest: &work.data_digest,
            settings: &settings,
            language: work.language.as_deref(),
            threads: self.threads.into(),
            // A provider's trainer lays its memory out in its own way, and so does a GPU.
            memory: self
                .memory
                .filter(|_| self.provided.is_none() && !on_gpu())
                .map(|has| has.0),
        };
        let make = |spec: &Spec<'_>| match &self.provided {
            #[cfg(feature = "cuda")]
            None if on_gpu() => Trainer::with(spec, |spec, adapter| {
                let device = candle_core::Device::new_cuda(0)?;
                Ok(Box::new(crate::train::candle::OnDevice::new(
                    spec, adapter, device,
                )?))
            }),
            None => Trainer::new(spec),
            Some(process) => Trainer::with(spec, |spec, adapter| {
                Ok(Box::new(Torch::open(process.clone(), spec, adapter)?))
            }),
        };
        let Some((name, digest)) = &work.from else {
            return Ok(make(&spec)?);
        };
        let bytes = std::fs::read(self.file(name)?).map_err(|error| EngineError::Crashed {
            how: format!("the checkpoint cannot be read: {error}"),
        })?;
        if checkpoint::digest(&bytes) != *digest {
            return Err(EngineError::Crashed {
                how: format!("the checkpoint is not {digest}"),
            });
        }
        let mut trainer = make(&spec)?;
        trainer.restore(&bytes)?;
        Ok(trainer)
    }
}

impl Engine for Training {
    fn facts(&self) -> ModelFacts {
        self.facts.clone()
    }

    fn spent(&self) -> bool {
        let process = self.provided.as_ref();
        process.is_some_and(|process| process.borrow().ended().is_some())
    }

    fn run(&mut self, work: Work, desk: &mut Desk<'_>) -> Result<Output, EngineError> {
        let Work::Train(work) = work else {
            return Err(EngineError::bad_input(
                "this worker trains, and does nothing else",
            ));
        };
        let before = self.taken();
        let made = self.go_on(&work, desk);
        let after = self.taken();
        desk.elsewhere = Taken {
            cpu_us: after.cpu_us.saturating_sub(before.cpu_us),
            peak_rss: after.peak_rss,
        };
        made.map(Output::Checkpoint)
    }
}

impl Training {
    /// From one checkpoint to the next.
    fn go_on(&mut self, work: &Train, desk: &mut Desk<'_>) -> Result<Checkpointed, EngineError> {
        let out = self.file(&work.out)?;
        desk.alive();
        let mut trainer = self.take_up(work)?;
        match advance(&mut trainer, work.until, desk) {
            // Told to leave: what is done so far goes along.
            Ok(()) | Err(EngineError::Cancelled) => {}
            Err(error) => return Err(error),
        }
        let began = Instant::now();
        let (bytes, digest) = trainer.checkpoint()?;
        std::fs::write(&out, &bytes).map_err(|error| EngineError::Crashed {
            how: format!("the checkpoint cannot be written: {error}"),
        })?;
        let state = trainer.state();
        let done = Checkpointed {
            digest,
            bytes: Bytes(bytes.len() as u64),
            step: state.step as u64,
            finished: state.finished,
            loss: trainer.losses().last().map(|loss| f64::from(*loss)),
            took_ms: Millis(u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX)).0,
        };
        self.current = Some(trainer);
        Ok(done)
    }
}

/// Whether this lease has a GPU to itself.
fn on_gpu() -> bool {
    cfg!(feature = "cuda") && std::env::var_os("CUDA_VISIBLE_DEVICES").is_some_and(|gpus| !gpus.is_empty())
}

/// Steps, and looks where they are due, until `until` or the end.
fn advance(trainer: &mut Trainer, until: u64, desk: &mut Desk<'_>) -> Result<(), EngineError> {
    let mut tokens = 0;
    loop {
        if trainer.look_is_due() {
            trainer.look(|_| alive(desk))?;
        }
        let state = trainer.state();
        if state.finished || state.step as u64 >= until {
            return Ok(());
        }
        let total = state.total as u64;
        let Step {
            step,
            loss,
            tokens: more,
            ..
        } = trainer.step(|_| alive(desk))?;
        tokens += more as u64;
        desk.tokens_in += more as u64;
        let progress = Progress {
            step: step as u64,
            total,
            loss,
            tokens,
        };
        // A line each: what waits to be written may be put together.
        desk.progress(serde_json::to_string(&progress).unwrap_or_default() + "\n");
    }
}

fn alive(desk: &Desk<'_>) -> Result<(), EngineError> {
    desk.check()?;
    desk.alive();
    Ok(())
}

impl From<TrainError> for EngineError {
    fn from(error: TrainError) -> Self {
        let reason = error.to_string();
        match error {
            TrainError::Tensor(_) | TrainError::Io(_) | TrainError::Trainer(_) => {
                Self::Crashed { how: reason }
            }
            TrainError::Missing(_)
            | TrainError::Shape { .. }
            | TrainError::Json(_)
            | TrainError::Tokenizer(_) => Self::BadModel {
                file: "the base model".into(),
                reason,
            },
            TrainError::Unsupported(_) | TrainError::Incapable(_) | TrainError::Memory { .. } => {
                Self::Unsupported { reason }
            }
            _ => Self::BadInput { reason },
        }
    }
}
