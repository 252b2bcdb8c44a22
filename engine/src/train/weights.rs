//! Weights by their Hugging Face names: drawing, reading, writing, and making them trainable.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{DType, Device, Tensor, Var};

use super::{Config, Rng, TrainError};

/// Tensors by name, in a fixed order.
pub type Weights = BTreeMap<String, Tensor>;

/// Draws fresh f32 weights: normal, and as wide as keeps a unit signal a unit signal (deviation 1/√in), narrower where
/// a layer writes into the residual stream. The customary 0.02 is too timid for models a few hundred wide.
pub fn initial(config: &Config, rng: &mut Rng, device: &Device) -> Result<Weights, TrainError> {
    let residual = 1.0 / (2.0 * config.num_hidden_layers as f64).sqrt();
    let mut weights = Weights::new();
    for (name, shape) in config.shapes() {
        let count = shape.iter().product();
        let values: Vec<f32> = if name.ends_with("norm.weight") {
            vec![1.0; count]
        } else {
            let narrow = name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight");
            let width = shape.last().copied().unwrap_or(1).max(1) as f64;
            let deviation = if narrow { residual } else { 1.0 } / width.sqrt();
            (0..count).map(|_| (rng.normal() * deviation) as f32).collect()
        };
        weights.insert(name, Tensor::from_vec(values, shape, device)?);
    }
    Ok(weights)
}

/// Reads a safetensors file as f32.
pub fn load(path: &Path, device: &Device) -> Result<Weights, TrainError> {
    let tensors = candle_core::safetensors::load(path, device)?;
    let mut weights = Weights::new();
    for (name, tensor) in tensors {
        weights.insert(name, tensor.to_dtype(DType::F32)?);
    }
    Ok(weights)
}

/// Writes a safetensors file in `dtype`, with the metadata that Hugging Face's loaders look for.
pub fn save(weights: &Weights, path: &Path, dtype: DType) -> Result<(), TrainError> {
    let mut tensors = Vec::with_capacity(weights.len());
    for (name, tensor) in weights {
        tensors.push((name.as_str(), tensor.detach().to_dtype(dtype)?.contiguous()?));
    }
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    // Written here, because safetensors makes files that nobody else may read.
    let bytes = safetensors::serialize(tensors, Some(metadata)).map_err(candle_core::Error::from)?;
    Ok(std::fs::write(path, bytes)?)
}

/// Turns weights into variables, and gives back the tensors that stand for them in a model.
pub fn trainable(weights: &Weights) -> Result<(BTreeMap<String, Var>, Weights), TrainError> {
    let mut vars = BTreeMap::new();
    let mut tensors = Weights::new();
    for (name, tensor) in weights {
        let var = Var::from_tensor(tensor)?;
        // A clone keeps the variable's identity, so gradients find their way back to it.
        tensors.insert(name.clone(), var.as_tensor().clone());
        vars.insert(name.clone(), var);
    }
    Ok((vars, tensors))
}
