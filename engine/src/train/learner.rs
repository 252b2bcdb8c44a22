//! What a run computes with: our own model on the CPU, or a provider's trainer in a process of its own.
//!
//! A [`Learner`] holds weights, an adapter and its optimiser, and does arithmetic. Everything else, which tokens come
//! when, at what rate, what was held out, what a checkpoint is, stays with [`super::Trainer`], so that a run may change
//! from one learner to another at any checkpoint.

use super::TrainError;
use super::adapter::Adapter;
use super::base::{BaseModel, Hold};
use super::data::Packed;
use super::fused::Fused;
use super::optim::{AdamWSettings, Moments};
use super::trainer::Spec;

/// All numbers of a run in progress, each row as [`Adapter`] lays its values out.
#[derive(Debug, Clone, PartialEq)]
pub struct Numbers {
    /// The adapter's.
    pub values: Vec<f32>,
    /// The optimiser's mean of gradients.
    pub mean: Vec<f32>,
    /// The optimiser's mean of squared gradients.
    pub square: Vec<f32>,
}

/// What was taken from the machine outside this process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Taken {
    /// Microseconds of processor time so far.
    pub cpu_us: u64,
    /// The largest resident size so far, in bytes.
    pub peak_rss: u64,
}

/// Weights, an adapter on them, and its optimiser.
pub trait Learner {
    /// Name and version, and what it computes on: `karez-train 0.1.0 x86_64`. Exact comparison holds within one.
    fn name(&self) -> String;

    /// Forgets gradients that were added up and not applied.
    fn begin(&mut self);

    /// Adds the gradient of the batch's summed cross-entropy times `scale`, and returns that sum in nats. `seed` is of
    /// what is drawn for this batch.
    fn add(&mut self, batch: &Packed, scale: f32, seed: u64) -> Result<f64, TrainError>;

    /// One update by the gradients that were added up. Returns their length before clipping; `None`, and nothing has
    /// changed, when it is not finite.
    fn apply(&mut self, rate: f64) -> Result<Option<f64>, TrainError>;

    /// Sum of cross-entropies over the batch's targets, in nats.
    fn loss(&mut self, batch: &Packed) -> Result<f64, TrainError>;

    /// The numbers as they are now.
    fn numbers(&mut self) -> Result<Numbers, TrainError>;

    /// Takes up numbers, after so many steps.
    fn take_up(&mut self, numbers: Numbers, steps: usize) -> Result<(), TrainError>;

    /// What it took beside this process.
    fn taken(&self) -> Taken {
        Taken::default()
    }
}

/// The optimiser that the settings ask for.
pub(super) fn optimiser(spec: &Spec<'_>) -> AdamWSettings {
    let settings = spec.settings;
    AdamWSettings {
        beta1: settings.adam_beta1,
        beta2: settings.adam_beta2,
        epsilon: settings.adam_epsilon,
        weight_decay: settings.weight_decay,
        clip: settings.max_grad_norm,
    }
}

/// Our own, in this process.
pub struct Own {
    model: Fused,
    adapter: Adapter,
    moments: Moments,
    grads: Vec<f32>,
    dropout: f32,
}

impl Own {
    /// Reads the base model.
    pub fn new(spec: &Spec<'_>, adapter: &Adapter) -> Result<Self, TrainError> {
        let settings = spec.settings;
        let hold = if settings.bf16 { Hold::Bf16 } else { Hold::F32 };
        let base = BaseModel::read(spec.base, hold)?;
        let model = Fused::new(base, adapter, spec.threads, settings.gradient_checkpointing)?;
        let count = adapter.values.len();
        Ok(Self {
            model,
            adapter: adapter.clone(),
            moments: Moments::new(count, optimiser(spec)),
            grads: vec![0.0; count],
            dropout: settings.lora_dropout as f32,
        })
    }
}

impl Learner for Own {
    fn name(&self) -> String {
        format!(
            "karez-train {} {}",
            env!("CARGO_PKG_VERSION"),
            std::env::consts::ARCH
        )
    }

    fn begin(&mut self) {
        self.grads.fill(0.0);
    }

    fn add(&mut self, batch: &Packed, scale: f32, seed: u64) -> Result<f64, TrainError> {
        self.model.drop_out(self.dropout, seed);
        self.model.gradients(&self.adapter, batch, scale, &mut self.grads)
    }

    fn apply(&mut self, rate: f64) -> Result<Option<f64>, TrainError> {
        Ok(self.moments.step(&mut self.adapter.values, &self.grads, rate))
    }

    fn loss(&mut self, batch: &Packed) -> Result<f64, TrainError> {
        self.model.loss(&self.adapter, batch)
    }

    fn numbers(&mut self) -> Result<Numbers, TrainError> {
        let (mean, square) = self.moments.parts();
        Ok(Numbers {
            values: self.adapter.values.clone(),
            mean: mean.to_vec(),
            square: square.to_vec(),
        })
    }

    fn take_up(&mut self, numbers: Numbers, steps: usize) -> Result<(), TrainError> {
        self.adapter.values = numbers.values;
        self.moments.restore(numbers.mean, numbers.square, steps);
        Ok(())
    }
}
