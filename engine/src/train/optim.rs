//! AdamW with decoupled weight decay (Loshchilov and Hutter, 2019), clipping, and a state that can be stored.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};

use super::{TrainError, Weights};

/// The optimiser's constants; the learning rate comes with each step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWSettings {
    /// Decay of the mean of gradients.
    pub beta1: f64,
    /// Decay of the mean of squared gradients.
    pub beta2: f64,
    /// Keeps the division finite.
    pub epsilon: f64,
    /// Fraction of a matrix taken away per step and unit of rate. Vectors (norms) are left alone.
    pub weight_decay: f64,
    /// Longest gradient, in the Euclidean norm over all weights; longer ones are scaled down to it.
    pub clip: f64,
}

impl Default for AdamWSettings {
    fn default() -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.01,
            clip: 1.0,
        }
    }
}

struct Slot {
    var: Var,
    mean: Vec<f32>,
    square: Vec<f32>,
}

/// AdamW over named f32 variables. Its state lives in host memory and is updated in one pass: on a CPU that is several
/// times quicker than the same formula spelt out in tensor operations.
pub struct AdamW {
    settings: AdamWSettings,
    steps: u32,
    slots: BTreeMap<String, Slot>,
}

impl AdamW {
    /// Starts with both means at zero.
    pub fn new(vars: BTreeMap<String, Var>, settings: AdamWSettings) -> Self {
        let slots = vars.into_iter().map(|(name, var)| {
            let zeros = vec![0.0; var.as_tensor().elem_count()];
            (
                name,
                Slot {
                    var,
                    mean: zeros.clone(),
                    square: zeros,
                },
            )
        });
        Self {
            settings,
            steps: 0,
            slots: slots.collect(),
        }
    }

    /// Steps taken so far.
    pub fn steps(&self) -> u32 {
        self.steps
    }

    /// The weights as they are now, free of any graph.
    pub fn weights(&self) -> Result<Weights, TrainError> {
        // Copies, for the variables themselves change in place.
        let copy = |(name, slot): (&String, &Slot)| Ok((name.clone(), slot.var.as_tensor().copy()?.detach()));
        self.slots.iter().map(copy).collect()
    }

    /// One update by the sum of `grads`: one store per part of the batch. Returns the gradient's norm before clipping.
    ///
    /// A weight without gradient is an error and leaves everything as it was: it would otherwise stay silently untrained.
    pub fn step(&mut self, grads: &[GradStore], rate: f64) -> Result<f64, TrainError> {
        let mut sums = Vec::with_capacity(self.slots.len());
        let mut squares = 0f64;
        for (name, slot) in &self.slots {
            let mut sum: Option<Vec<f32>> = None;
            for store in grads {
                let grad = store
                    .get(slot.var.as_tensor())
                    .ok_or_else(|| TrainError::NoGradient(name.clone()))?;
                let grad = grad.flatten_all()?.to_vec1::<f32>()?;
                match &mut sum {
                    None => sum = Some(grad),
                    Some(sum) => sum.iter_mut().zip(grad).for_each(|(sum, grad)| *sum += grad),
                }
            }
            let sum = sum.ok_or_else(|| TrainError::NoGradient(name.clone()))?;
            squares += sum.iter().map(|grad| f64::from(grad * grad)).sum::<f64>();
            sums.push(sum);
        }
        let norm = squares.sqrt();
        let AdamWSettings {
            beta1,
            beta2,
            epsilon,
            weight_decay,
            clip,
        } = self.settings;
        let scale = (if norm > clip { clip / norm } else { 1.0 }) as f32;

        self.steps += 1;
        let unbias1 = 1.0 / (1.0 - beta1.powf(f64::from(self.steps)));
        let unbias2 = (1.0 / (1.0 - beta2.powf(f64::from(self.steps)))) as f32;
        let pace = (rate * unbias1) as f32;
        let (beta1, beta2, epsilon) = (beta1 as f32, beta2 as f32, epsilon as f32);
        for (slot, sum) in self.slots.values_mut().zip(sums) {
            let tensor = slot.var.as_tensor();
            let kept = if tensor.rank() >= 2 {
                (1.0 - rate * weight_decay) as f32
            } else {
                1.0
            };
            let mut weights = tensor.flatten_all()?.to_vec1::<f32>()?;
            let means = slot.mean.iter_mut().zip(slot.square.iter_mut());
            for ((weight, grad), (mean, square)) in weights.iter_mut().zip(sum).zip(means) {
                let grad = grad * scale;
                *mean = beta1 * *mean + (1.0 - beta1) * grad;
                *square = beta2 * *square + (1.0 - beta2) * grad * grad;
                *weight = kept * *weight - pace * *mean / ((*square * unbias2).sqrt() + epsilon);
            }
            slot.var
                .set(&Tensor::from_vec(weights, tensor.shape(), tensor.device())?)?;
        }
        Ok(norm)
    }

    /// All that is needed to go on later, as tensors: `<weight>.mean`, `<weight>.square` and `steps`.
    /// The weights themselves are stored beside it ([`AdamW::weights`]).
    pub fn state(&self) -> Result<Weights, TrainError> {
        let mut state = Weights::new();
        for (name, slot) in &self.slots {
            let shape = slot.var.as_tensor().shape();
            state.insert(
                format!("{name}.mean"),
                Tensor::from_slice(&slot.mean, shape, &Device::Cpu)?,
            );
            state.insert(
                format!("{name}.square"),
                Tensor::from_slice(&slot.square, shape, &Device::Cpu)?,
            );
        }
        // f32 counts exactly up to 16.7 million steps.
        state.insert(
            "steps".to_owned(),
            Tensor::new(&[self.steps as f32], &Device::Cpu)?,
        );
        Ok(state)
    }

    /// Takes up a stored [`AdamW::state`] for the same weights; on an error nothing has changed.
    pub fn restore(&mut self, state: &Weights) -> Result<(), TrainError> {
        let find = |name: String, expected: &[usize]| -> Result<Vec<f32>, TrainError> {
            let tensor = state
                .get(&name)
                .ok_or_else(|| TrainError::Missing(name.clone()))?;
            if tensor.dims() != expected {
                return Err(TrainError::Shape {
                    name,
                    found: tensor.dims().to_vec(),
                    expected: expected.to_vec(),
                });
            }
            Ok(tensor.flatten_all()?.to_vec1::<f32>()?)
        };
        let steps = find("steps".to_owned(), &[1])?;
        let mut found = Vec::with_capacity(self.slots.len());
        for (name, slot) in &self.slots {
            let shape = slot.var.as_tensor().dims();
            found.push((
                find(format!("{name}.mean"), shape)?,
                find(format!("{name}.square"), shape)?,
            ));
        }
        for (slot, (mean, square)) in self.slots.values_mut().zip(found) {
            slot.mean = mean;
            slot.square = square;
        }
        self.steps = steps.first().copied().unwrap_or(0.0) as u32;
        Ok(())
    }
}

/// AdamW over one row of numbers, for weights that are not candle's.
#[derive(Debug, Clone)]
pub struct Moments {
    settings: AdamWSettings,
    steps: usize,
    mean: Vec<f32>,
    square: Vec<f32>,
}

impl Moments {
    /// Starts with both means at zero.
    pub fn new(count: usize, settings: AdamWSettings) -> Self {
        let (mean, square) = (vec![0.0; count], vec![0.0; count]);
        Self {
            settings,
            steps: 0,
            mean,
            square,
        }
    }

    /// The mean of gradients, and of their squares.
    pub fn parts(&self) -> (&[f32], &[f32]) {
        (&self.mean, &self.square)
    }

    /// Takes up stored moments after so many steps.
    pub fn restore(&mut self, mean: Vec<f32>, square: Vec<f32>, steps: usize) {
        (self.mean, self.square, self.steps) = (mean, square, steps);
    }

    /// One update. Returns the gradient's length before clipping; `None`, and nothing has changed, when it is not finite.
    pub fn step(&mut self, values: &mut [f32], grads: &[f32], rate: f64) -> Option<f64> {
        let norm = grads
            .iter()
            .map(|grad| f64::from(*grad).powi(2))
            .sum::<f64>()
            .sqrt();
        if !norm.is_finite() {
            return None;
        }
        let AdamWSettings {
            beta1,
            beta2,
            epsilon,
            weight_decay,
            clip,
        } = self.settings;
        self.steps += 1;
        let scale = (if norm > clip { clip / norm } else { 1.0 }) as f32;
        let pace = (rate / (1.0 - beta1.powf(self.steps as f64))) as f32;
        let unbias = (1.0 / (1.0 - beta2.powf(self.steps as f64))) as f32;
        let kept = (1.0 - rate * weight_decay) as f32;
        let (beta1, beta2, epsilon) = (beta1 as f32, beta2 as f32, epsilon as f32);
        let moments = self.mean.iter_mut().zip(&mut self.square);
        for ((value, grad), (mean, square)) in values.iter_mut().zip(grads).zip(moments) {
            let grad = grad * scale;
            *mean = beta1 * *mean + (1.0 - beta1) * grad;
            *square = beta2 * *square + (1.0 - beta2) * grad * grad;
            *value = kept * *value - pace * *mean / ((*square * unbias).sqrt() + epsilon);
        }
        Some(norm)
    }
}

/// Rises in a line to `peak` over `warmup` steps, then falls along half a cosine to a twentieth of it at `total`.
pub fn cosine_rate(step: u32, warmup: u32, total: u32, peak: f64) -> f64 {
    if step < warmup {
        return peak * f64::from(step + 1) / f64::from(warmup);
    }
    let way = f64::from(step - warmup) / f64::from(total.saturating_sub(warmup).max(1));
    let floor = peak / 20.0;
    floor + (peak - floor) * 0.5 * (1.0 + (std::f64::consts::PI * way.min(1.0)).cos())
}
