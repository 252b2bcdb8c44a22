//! Checkpoints: everything a run needs to go on elsewhere as if nothing had happened, in one file.
//!
//! A checkpoint is a safetensors file: the adapter under PEFT's names, both of the optimiser's moments, and the loss of
//! every step so far; its metadata says what it belongs to. Equal states give equal bytes, and each checkpoint names the
//! digest of the one before, so a chain of them can be checked from its end.
//!
//! Not here: keeping them. A worker writes one into its own folder; the node's store takes it whole or not at all.

use std::collections::{BTreeMap, HashMap};

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use super::TrainError;
use super::adapter::Adapter;

/// Bytes of a checkpoint at most.
pub const CHECKPOINT_MAX: u64 = 8 << 30;
const KEY: &str = "karez.checkpoint";
const FORMAT: u32 = 1;

/// What was held out, looked at.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// Sum of cross-entropies, in billionths of a nat: whole, so that it survives any number of readings and writings.
    pub nanonats: u64,
    /// Tokens that were to be said.
    pub tokens: u64,
    /// Bytes of their text.
    pub bytes: u64,
}

impl Held {
    /// Mean cross-entropy in nats per token.
    pub fn loss(&self) -> f64 {
        self.nats() / self.tokens.max(1) as f64
    }

    fn nats(&self) -> f64 {
        self.nanonats as f64 / 1e9
    }

    /// How many bits a byte of text costs: comparable between tokenizers and languages.
    pub fn bits_per_byte(&self) -> f64 {
        self.nats() / std::f64::consts::LN_2 / self.bytes.max(1) as f64
    }
}

/// One look at what was held out, language by language.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Look {
    /// After so many steps.
    pub step: usize,
    /// By language tag.
    pub languages: BTreeMap<String, Held>,
}

impl Look {
    /// Mean over all languages' tokens.
    pub fn loss(&self) -> f64 {
        let (mut nats, mut tokens) = (0.0, 0);
        for held in self.languages.values() {
            nats += held.nats();
            tokens += held.tokens;
        }
        nats / tokens.max(1) as f64
    }
}

/// What a checkpoint belongs to and how far it got.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Version of this layout; written by [`Checkpoint::encode`].
    pub format: u32,
    /// Digest of the base model.
    pub base: String,
    /// Digest of the data.
    pub data: String,
    /// Canonical settings.
    pub settings: String,
    /// Digest of the checkpoint before; none for the first.
    pub previous: Option<String>,
    /// Steps taken.
    pub step: usize,
    /// Steps in all.
    pub total: usize,
    /// Nothing is left to do: all steps are taken, or training ended early.
    pub finished: bool,
    /// The data's cursor: epoch, and row in it.
    pub cursor: (usize, usize),
    /// State of the generator that everything is drawn from.
    pub rng: u64,
    /// Tokens that went through the model.
    pub tokens: u64,
    /// Looks at what was held out; the first is from before the first step.
    pub looks: Vec<Look>,
    /// Examples trained on, and held out.
    pub examples: (usize, usize),
    /// What computed it, each as it took over.
    #[serde(default)]
    pub learners: Vec<String>,
}

/// A checkpoint in memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Checkpoint {
    /// What it belongs to.
    pub state: State,
    /// The adapter's numbers, as [`Adapter`] lays them out.
    pub values: Vec<f32>,
    /// The optimiser's mean of gradients.
    pub mean: Vec<f32>,
    /// The optimiser's mean of squared gradients.
    pub square: Vec<f32>,
    /// Loss of every step.
    pub losses: Vec<f32>,
}

/// The digest of a checkpoint's bytes, as artifacts are named.
pub fn digest(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

impl Checkpoint {
    /// The file.
    pub fn encode(&self, adapter: &Adapter) -> Result<Vec<u8>, TrainError> {
        let rank = adapter.rank();
        let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
        for slot in adapter.slots() {
            let [a, b] = slot.peft_names();
            for (name, shape, range) in [
                (a, vec![rank, slot.columns], slot.a_range(rank)),
                (b, vec![slot.rows, rank], slot.b_range(rank)),
            ] {
                for (values, suffix) in [
                    (&self.values, ""),
                    (&self.mean, ".mean"),
                    (&self.square, ".square"),
                ] {
                    let bytes = bytes_of(&values[range.clone()]);
                    tensors.push((format!("{name}{suffix}"), shape.clone(), bytes));
                }
            }
        }
        if !self.losses.is_empty() {
            tensors.push(("losses".into(), vec![self.losses.len()], bytes_of(&self.losses)));
        }
        let views: Vec<(String, TensorView<'_>)> = tensors
            .iter()
            .map(|(name, shape, bytes)| {
                Ok((name.clone(), TensorView::new(Dtype::F32, shape.clone(), bytes)?))
            })
            .collect::<Result<_, safetensors::SafeTensorError>>()
            .map_err(candle_core::Error::from)?;
        let state = State {
            format: FORMAT,
            ..self.state.clone()
        };
        // One key only: with several, their order in the file would be a matter of chance.
        let metadata = HashMap::from([(KEY.to_owned(), serde_json::to_string(&state)?)]);
        Ok(safetensors::serialize(views, Some(metadata)).map_err(candle_core::Error::from)?)
    }

    /// Reads a file for a run with this adapter. What does not belong to it is refused by name.
    pub fn decode(bytes: &[u8], adapter: &Adapter) -> Result<Self, TrainError> {
        let bad = |why: String| TrainError::Checkpoint(why);
        let state = state_of(bytes)?;
        let file = SafeTensors::deserialize(bytes).map_err(|error| bad(error.to_string()))?;
        let read = |name: String, shape: &[usize]| -> Result<Vec<f32>, TrainError> {
            let tensor = file
                .tensor(&name)
                .map_err(|_| bad(format!("has no tensor {name}")))?;
            if tensor.dtype() != Dtype::F32 || tensor.shape() != shape {
                return Err(bad(format!(
                    "has {name} in shape {:?}, {shape:?} is needed",
                    tensor.shape()
                )));
            }
            Ok(numbers_of(tensor.data()))
        };
        let count = adapter.values.len();
        let rank = adapter.rank();
        let (mut values, mut mean, mut square) = (vec![0.0; count], vec![0.0; count], vec![0.0; count]);
        for slot in adapter.slots() {
            let [a, b] = slot.peft_names();
            for (name, shape, range) in [
                (a, [rank, slot.columns], slot.a_range(rank)),
                (b, [slot.rows, rank], slot.b_range(rank)),
            ] {
                values[range.clone()].copy_from_slice(&read(name.clone(), &shape)?);
                mean[range.clone()].copy_from_slice(&read(format!("{name}.mean"), &shape)?);
                square[range].copy_from_slice(&read(format!("{name}.square"), &shape)?);
            }
        }
        let losses = match state.step {
            0 => Vec::new(),
            steps => read("losses".into(), &[steps])?,
        };
        if let Some(at) = values
            .iter()
            .chain(&mean)
            .chain(&square)
            .position(|value| !value.is_finite())
        {
            return Err(bad(format!("holds a number that is not finite (the {at}th)")));
        }
        Ok(Self {
            state,
            values,
            mean,
            square,
            losses,
        })
    }
}

/// What a checkpoint says of itself, without reading its numbers.
pub fn state_of(bytes: &[u8]) -> Result<State, TrainError> {
    let bad = |why: String| TrainError::Checkpoint(why);
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(|error| bad(error.to_string()))?;
    let text = header.metadata().as_ref().and_then(|metadata| metadata.get(KEY));
    let text = text.ok_or_else(|| bad("is not one of Karez's checkpoints".into()))?;
    let state: State =
        serde_json::from_str(text).map_err(|error| bad(format!("has broken metadata: {error}")))?;
    if state.format != FORMAT {
        return Err(bad(format!("has format {}; {FORMAT} can be read", state.format)));
    }
    Ok(state)
}

/// The loss of every step that a checkpoint holds, without reading what it trained.
pub fn losses_of(bytes: &[u8]) -> Result<Vec<f32>, TrainError> {
    let bad = |why: String| TrainError::Checkpoint(why);
    let steps = state_of(bytes)?.step;
    if steps == 0 {
        return Ok(Vec::new());
    }
    let file = SafeTensors::deserialize(bytes).map_err(|error| bad(error.to_string()))?;
    let losses = file
        .tensor("losses")
        .map_err(|_| bad("has no tensor losses".into()))?;
    if losses.dtype() != Dtype::F32 || losses.shape() != [steps] {
        return Err(bad(format!(
            "has losses in shape {:?}, [{steps}] is needed",
            losses.shape()
        )));
    }
    Ok(numbers_of(losses.data()))
}

fn numbers_of(bytes: &[u8]) -> Vec<f32> {
    let numbers = bytes.chunks_exact(4);
    numbers
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect()
}
