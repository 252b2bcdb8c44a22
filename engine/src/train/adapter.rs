//! A low-rank adapter (Hu and others, 2021) as one row of numbers, with the places of its matrices in it.

use std::ops::Range;

use super::llama::{Config, MODULES};
use super::{Rng, TrainError};

/// One adapted matrix: `y = W x + scale · B (A x)`, A `[rank, columns]`, B `[rows, rank]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// Which layer.
    pub layer: usize,
    /// Which of [`MODULES`].
    pub module: usize,
    /// Results of the matrix.
    pub rows: usize,
    /// Inputs of the matrix.
    pub columns: usize,
    start: usize,
}

impl Slot {
    /// Where A lies.
    pub fn a_range(&self, rank: usize) -> Range<usize> {
        self.start..self.start + rank * self.columns
    }

    /// Where B lies.
    pub fn b_range(&self, rank: usize) -> Range<usize> {
        let start = self.start + rank * self.columns;
        start..start + rank * self.rows
    }

    /// The adapted matrix, as Hugging Face names it, without `.weight`.
    pub fn path(&self) -> String {
        format!("model.layers.{}.{}", self.layer, MODULES[self.module])
    }

    /// The names of A and B in a PEFT adapter.
    pub fn peft_names(&self) -> [String; 2] {
        ["A", "B"].map(|part| format!("base_model.model.{}.lora_{part}.weight", self.path()))
    }
}

/// The numbers that train.
#[derive(Debug, Clone, PartialEq)]
pub struct Adapter {
    rank: usize,
    alpha: f64,
    slots: Vec<Slot>,
    /// A and B of each slot, one after the other.
    pub values: Vec<f32>,
}

impl Adapter {
    /// A fresh adapter on `modules` (as [`MODULES`] names them, or by their last part) of every layer: A uniform
    /// within 1/√columns, as PEFT draws it, B zero, so that nothing changes before the first step.
    pub fn new(
        config: &Config,
        modules: &[String],
        rank: usize,
        alpha: f64,
        seed: u64,
    ) -> Result<Self, TrainError> {
        let shapes = config.shapes();
        let mut slots = Vec::new();
        let mut start = 0;
        for name in modules {
            let known = MODULES
                .iter()
                .any(|module| module.rsplit('.').next() == Some(name));
            if !known {
                return Err(TrainError::Unsupported(format!(
                    "there is no matrix {name} to adapt"
                )));
            }
        }
        for layer in 0..config.num_hidden_layers {
            for (module, path) in MODULES.iter().enumerate() {
                let short = path.rsplit('.').next().unwrap_or(path);
                if !modules.iter().any(|name| name == short) {
                    continue;
                }
                let name = format!("model.layers.{layer}.{path}.weight");
                let Some([rows, columns]) = shapes.get(&name).map(Vec::as_slice) else {
                    return Err(TrainError::Missing(name));
                };
                let slot = Slot {
                    layer,
                    module,
                    rows: *rows,
                    columns: *columns,
                    start,
                };
                start = slot.b_range(rank).end;
                slots.push(slot);
            }
        }
        let mut values = vec![0.0; start];
        let mut rng = Rng::new(seed);
        for slot in &slots {
            let bound = 1.0 / (slot.columns as f64).sqrt();
            for value in &mut values[slot.a_range(rank)] {
                *value = ((rng.unit() * 2.0 - 1.0) * bound) as f32;
            }
        }
        Ok(Self {
            rank,
            alpha,
            slots,
            values,
        })
    }

    /// The width of the bottleneck.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// `alpha`, as it was set.
    pub fn alpha(&self) -> f64 {
        self.alpha
    }

    /// What B's result is multiplied by.
    pub fn scale(&self) -> f32 {
        (self.alpha / self.rank as f64) as f32
    }

    /// All adapted matrices, layer by layer.
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// The place of one matrix's adapter.
    pub fn slot(&self, layer: usize, module: usize) -> Option<&Slot> {
        self.slots
            .iter()
            .find(|slot| slot.layer == layer && slot.module == module)
    }

    /// A of a slot.
    pub fn a(&self, slot: &Slot) -> &[f32] {
        &self.values[slot.a_range(self.rank)]
    }

    /// B of a slot.
    pub fn b(&self, slot: &Slot) -> &[f32] {
        &self.values[slot.b_range(self.rank)]
    }

    /// What the adapter adds to one matrix: `scale · B A`, `[rows, columns]`.
    pub fn addition(&self, slot: &Slot) -> Vec<f32> {
        let (a, b, rank, scale) = (self.a(slot), self.b(slot), self.rank, self.scale());
        let mut out = vec![0.0; slot.rows * slot.columns];
        for (b, out) in b.chunks_exact(rank).zip(out.chunks_exact_mut(slot.columns)) {
            for (b, a) in b.iter().zip(a.chunks_exact(slot.columns)) {
                out.iter_mut().zip(a).for_each(|(out, a)| *out += scale * b * a);
            }
        }
        out
    }
}
