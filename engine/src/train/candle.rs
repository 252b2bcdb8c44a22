//! A [`Learner`] on candle's tensors and its backward pass: what computes on a GPU in builds that have one.
//!
//! The same model as [`super::fused`], slower on a CPU and larger in memory. Its backward pass keeps every matrix of the graph,
//! in f32: `bf16` saves memory together with `gradient_checkpointing`, which makes a graph of one layer at a time. The
//! optimiser's state lives in host memory: an adapter is small.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};

use super::adapter::{Adapter, Slot};
use super::base::weight_files;
use super::data::Packed;
use super::fused::Dropout;
use super::learner::{Learner, Numbers, optimiser};
use super::llama::{Llama, LowRank, Thin};
use super::optim::Moments;
use super::trainer::Spec;
use super::{Batch, TrainError, Weights, load};

/// A run on a device of candle's.
pub struct OnDevice {
    device: Device,
    model: Llama,
    vars: Vec<(Slot, Var, Var)>,
    adapter: Adapter,
    moments: Moments,
    grads: Vec<f32>,
    share: f32,
    recompute: bool,
    thin: Arc<Mutex<Option<Dropout>>>,
}

impl OnDevice {
    /// Reads the base model onto a device.
    pub fn new(spec: &Spec<'_>, adapter: &Adapter, device: Device) -> Result<Self, TrainError> {
        let config = super::base::read_config(spec.base)?;
        let mut weights = Weights::new();
        for path in weight_files(spec.base)? {
            for (name, weight) in load(&path, &device)? {
                let weight = match spec.settings.bf16 && weight.rank() == 2 {
                    true => weight.to_dtype(DType::BF16)?,
                    false => weight,
                };
                weights.insert(name, weight);
            }
        }
        let mut model = Llama::new(&config, &weights)?;
        let thin: Arc<Mutex<Option<Dropout>>> = Arc::default();
        let rank = adapter.rank();
        let mut vars = Vec::with_capacity(adapter.slots().len());
        for slot in adapter.slots() {
            let var = |values: &[f32], shape| Var::from_slice(values, shape, &device);
            let a = var(adapter.a(slot), (rank, slot.columns))?;
            let b = var(adapter.b(slot), (slot.rows, rank))?;
            let low = LowRank {
                a: a.as_tensor().clone(),
                b: b.as_tensor().clone(),
                scale: adapter.scale().into(),
                thin: Some(Thin {
                    place: slot.a_range(rank).start,
                    dropout: Arc::clone(&thin),
                }),
            };
            model.adapt(&slot.path(), low)?;
            vars.push((*slot, a, b));
        }
        let count = adapter.values.len();
        Ok(Self {
            device,
            model,
            vars,
            adapter: adapter.clone(),
            moments: Moments::new(count, optimiser(spec)),
            grads: vec![0.0; count],
            share: spec.settings.lora_dropout as f32,
            recompute: spec.settings.gradient_checkpointing,
            thin,
        })
    }

    fn leave_out(&self, dropout: Option<Dropout>) {
        *self.thin.lock().unwrap_or_else(PoisonError::into_inner) = dropout;
    }

    /// Sequences side by side, padded on the right: attention is causal, so padding changes nothing before it.
    fn batch(&self, packed: &Packed) -> Result<Batch, TrainError> {
        let width = packed.lengths.iter().copied().max().unwrap_or(0);
        let mut ids = Vec::with_capacity(width * packed.lengths.len());
        let mut place = Vec::with_capacity(packed.ids.len());
        let mut rest = packed.ids.as_slice();
        for (row, length) in packed.lengths.iter().enumerate() {
            let (own, later) = rest.split_at(*length);
            rest = later;
            place.extend((0..*length).map(|column| (row * width + column) as u32));
            ids.extend_from_slice(own);
            ids.resize((row + 1) * width, 0);
        }
        let count = packed.targets.len();
        let picks: Vec<u32> = packed.targets.iter().map(|(at, _)| place[*at as usize]).collect();
        let targets: Vec<u32> = packed.targets.iter().map(|(_, target)| *target).collect();
        Ok(Batch {
            ids: Tensor::from_vec(ids, (packed.lengths.len(), width), &self.device)?,
            picks: Tensor::from_vec(picks, count, &self.device)?,
            targets: Tensor::from_vec(targets, count, &self.device)?,
            counts: vec![count],
        })
    }

    /// Adds what a backward pass found for the adapters in `layers`.
    fn gather(&mut self, store: &GradStore, layers: std::ops::Range<usize>) -> Result<(), TrainError> {
        let rank = self.adapter.rank();
        for (slot, a, b) in self.vars.iter().filter(|(slot, ..)| layers.contains(&slot.layer)) {
            for (var, range) in [(a, slot.a_range(rank)), (b, slot.b_range(rank))] {
                let grad = store
                    .get(var.as_tensor())
                    .ok_or_else(|| TrainError::NoGradient(slot.path()))?;
                let grad = grad.flatten_all()?.to_vec1::<f32>()?;
                let sums = self.grads[range].iter_mut();
                sums.zip(grad).for_each(|(sum, grad)| *sum += grad);
            }
        }
        Ok(())
    }

    /// The loss, in nats, with its gradients times `scale`: of the whole model at once.
    fn at_once(&mut self, batch: &Batch, count: f64, scale: f64) -> Result<f64, TrainError> {
        let loss = (self.model.loss(batch)? * count)?;
        let nats = f64::from(loss.to_scalar::<f32>()?);
        let store = (loss * scale)?.backward()?;
        self.gather(&store, 0..self.model.layers())?;
        Ok(nats)
    }

    /// Goes through all layers without keeping a graph, shows what enters each, and gives what leaves the last.
    fn entering(&self, batch: &Batch, mut show: impl FnMut(&Tensor)) -> Result<Tensor, TrainError> {
        let pass = self.model.pass(&batch.ids)?;
        let mut x = self.model.embed(&batch.ids)?.detach();
        for index in 0..self.model.layers() {
            show(&x);
            x = self.model.layer(index, &x, &pass)?.detach();
        }
        Ok(x)
    }

    /// The same, keeping only what enters each layer, and working the rest out again on the way back.
    fn layer_by_layer(&mut self, batch: &Batch, count: f64, scale: f64) -> Result<f64, TrainError> {
        let (pass, layers) = (self.model.pass(&batch.ids)?, self.model.layers());
        let mut entered = Vec::with_capacity(layers);
        let last = self.entering(batch, |x| entered.push(x.clone()))?;
        let last = Var::from_tensor(&last)?;
        let loss = (self.model.loss_after(last.as_tensor(), batch)? * count)?;
        let nats = f64::from(loss.to_scalar::<f32>()?);
        let cut = |path: &str| TrainError::NoGradient(path.to_owned());
        let mut slope = (loss * scale)?
            .backward()?
            .remove(last.as_tensor())
            .ok_or_else(|| cut("model.norm"))?;
        for index in (0..layers).rev() {
            let x = Var::from_tensor(&entered[index])?;
            entered.truncate(index);
            // The gradient of this sum by anything is that of the loss.
            let left = self.model.layer(index, x.as_tensor(), &pass)?;
            let mut store = (left * slope.detach())?.sum_all()?.backward()?;
            self.gather(&store, index..index + 1)?;
            slope = store
                .remove(x.as_tensor())
                .ok_or_else(|| cut(&format!("model.layers.{index}")))?;
        }
        Ok(nats)
    }

    fn show(&mut self) -> Result<(), TrainError> {
        let rank = self.adapter.rank();
        for (slot, a, b) in &self.vars {
            a.set(&Tensor::from_slice(
                self.adapter.a(slot),
                (rank, slot.columns),
                &self.device,
            )?)?;
            b.set(&Tensor::from_slice(
                self.adapter.b(slot),
                (slot.rows, rank),
                &self.device,
            )?)?;
        }
        Ok(())
    }
}

impl Learner for OnDevice {
    fn name(&self) -> String {
        let device = self.device.location();
        format!("karez-train {} on {device:?}", env!("CARGO_PKG_VERSION"))
    }

    fn begin(&mut self) {
        self.grads.fill(0.0);
    }

    fn add(&mut self, packed: &Packed, scale: f32, seed: u64) -> Result<f64, TrainError> {
        if packed.targets.is_empty() {
            return Ok(0.0);
        }
        self.leave_out(Dropout::new(self.share, seed));
        let batch = self.batch(packed)?;
        let (count, scale) = (packed.targets.len() as f64, f64::from(scale));
        let nats = if self.recompute {
            self.layer_by_layer(&batch, count, scale)
        } else {
            self.at_once(&batch, count, scale)
        };
        self.leave_out(None);
        nats
    }

    fn apply(&mut self, rate: f64) -> Result<Option<f64>, TrainError> {
        let norm = self.moments.step(&mut self.adapter.values, &self.grads, rate);
        self.show()?;
        Ok(norm)
    }

    fn loss(&mut self, packed: &Packed) -> Result<f64, TrainError> {
        if packed.targets.is_empty() {
            return Ok(0.0);
        }
        let batch = self.batch(packed)?;
        let last = self.entering(&batch, |_| ())?;
        let mean = self.model.loss_after(&last, &batch)?.to_scalar::<f32>()?;
        Ok(f64::from(mean) * packed.targets.len() as f64)
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
        self.show()
    }
}
