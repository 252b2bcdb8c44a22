//! The Llama architecture (RMSNorm, rotary positions, grouped-query attention, SwiGLU) and its near relatives Qwen2
//! (biases on Q, K and V) and Qwen3 (norms on the heads of Q and K), in operations that candle can differentiate, on
//! any of its devices. Weights go by their Hugging Face names; whichever of them are variables will train.
//!
//! This is the reference that the faster [`super::fused`] model is held to, and what trains on a GPU.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{D, DType, Device, Tensor};

pub use super::config::{Config, RopeScaling};
use super::fused::Dropout;
use super::{Batch, TrainError, Weights};

/// A low-rank addition to one matrix: `y = W x + scale · B (A x)`.
#[derive(Debug, Clone)]
pub struct LowRank {
    /// `[rank, in]`.
    pub a: Tensor,
    /// `[out, rank]`; zeros at the start, so that an untrained adapter changes nothing.
    pub b: Tensor,
    /// `alpha / rank`.
    pub scale: f64,
    /// What is left out of `x` on its way to A.
    pub thin: Option<Thin>,
}

/// Numbers left out before an adapter, pass by pass.
#[derive(Debug, Clone)]
pub struct Thin {
    /// Which adapter: each leaves out others.
    pub place: usize,
    /// What this pass leaves out.
    pub dropout: Arc<Mutex<Option<Dropout>>>,
}

impl Thin {
    fn apply(&self, x: &Tensor) -> Result<Tensor, TrainError> {
        let dropout = *self.dropout.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(dropout) = dropout else {
            return Ok(x.clone());
        };
        let (rows, width) = x.dims2()?;
        let mut mask = vec![0.0; rows * width];
        dropout
            .at(self.place)
            .thin(&mut mask, &vec![1.0; rows * width], width);
        Ok((x * Tensor::from_vec(mask, (rows, width), x.device())?)?)
    }
}

struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
    adapter: Option<LowRank>,
}

impl Linear {
    /// `[n, in]` to `[n, out]`.
    fn forward(&self, x: &Tensor) -> Result<Tensor, TrainError> {
        let y = x.matmul(&whole(&self.weight)?.t()?)?;
        let y = match &self.bias {
            None => y,
            Some(bias) => y.broadcast_add(bias)?,
        };
        Ok(match &self.adapter {
            None => y,
            Some(LowRank { a, b, scale, thin }) => {
                let seen = thin
                    .as_ref()
                    .map_or_else(|| Ok(x.clone()), |thin| thin.apply(x))?;
                (y + (seen.matmul(&a.t()?)?.matmul(&b.t()?)? * *scale)?)?
            }
        })
    }
}

struct Layer {
    attention_norm: Tensor,
    mlp_norm: Tensor,
    /// Norms of the heads of Q and K.
    head_norms: Option<(Tensor, Tensor)>,
    linears: BTreeMap<&'static str, Linear>,
}

/// A matrix as f32: itself, or widened for as long as it is used.
fn whole(weight: &Tensor) -> Result<Tensor, TrainError> {
    Ok(match weight.dtype() {
        DType::F32 => weight.clone(),
        _ => weight.to_dtype(DType::F32)?,
    })
}

/// What all layers of one pass share.
pub struct Pass {
    examples: usize,
    length: usize,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor,
}

/// Longest sequence that is trained on, whatever the model could read.
pub const POSITIONS_MAX: usize = 32_768;

/// The matrices of a layer that an adapter can be put on.
pub const MODULES: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

impl Layer {
    fn linear(&self, module: &str, x: &Tensor) -> Result<Tensor, TrainError> {
        let linear = self
            .linears
            .get(module)
            .ok_or_else(|| TrainError::Missing(module.to_owned()))?;
        linear.forward(x)
    }
}

/// A Llama model over whatever tensors it was given.
pub struct Llama {
    config: Config,
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    head: Tensor,
    /// `[max_position_embeddings, head_width]`, each half the same.
    cos: Tensor,
    sin: Tensor,
}

impl Llama {
    /// Takes `weights` as they are: one that stands for a variable will train, any other stays frozen. Vectors are f32,
    /// matrices f32 or bf16; all arithmetic is f32.
    pub fn new(config: &Config, weights: &Weights) -> Result<Self, TrainError> {
        config.check()?;
        let shapes = config.shapes();
        let find = |name: String| -> Result<Tensor, TrainError> {
            let tensor = weights
                .get(&name)
                .ok_or_else(|| TrainError::Missing(name.clone()))?;
            match shapes.get(&name) {
                Some(expected) if tensor.dims() != expected.as_slice() => Err(TrainError::Shape {
                    name,
                    found: tensor.dims().to_vec(),
                    expected: expected.clone(),
                }),
                _ => Ok(tensor.clone()),
            }
        };
        let embedding = find("model.embed_tokens.weight".to_owned())?;
        let head = if config.tie_word_embeddings {
            embedding.clone()
        } else {
            find("lm_head.weight".to_owned())?
        };
        let mut layers = Vec::with_capacity(config.num_hidden_layers);
        for index in 0..config.num_hidden_layers {
            let at = |name: &str| find(format!("model.layers.{index}.{name}.weight"));
            let mut linears = BTreeMap::new();
            for module in MODULES {
                let bias = format!("model.layers.{index}.{module}.bias");
                let bias = shapes.contains_key(&bias).then(|| find(bias)).transpose()?;
                linears.insert(
                    module,
                    Linear {
                        weight: at(module)?,
                        bias,
                        adapter: None,
                    },
                );
            }
            let head_norms = config
                .has_head_norms()
                .then(|| Ok::<_, TrainError>((at("self_attn.q_norm")?, at("self_attn.k_norm")?)))
                .transpose()?;
            let (attention_norm, mlp_norm) = (at("input_layernorm")?, at("post_attention_layernorm")?);
            layers.push(Layer {
                attention_norm,
                mlp_norm,
                head_norms,
                linears,
            });
        }
        let (cos, sin) = rotary(config, embedding.device())?;
        Ok(Self {
            config: config.clone(),
            embedding,
            layers,
            norm: find("model.norm.weight".to_owned())?,
            head,
            cos,
            sin,
        })
    }

    /// The configuration it was built from.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Adds an adapter to a matrix, by its name without `.weight`: `model.layers.0.self_attn.q_proj`.
    /// A second one replaces the first.
    pub fn adapt(&mut self, module: &str, adapter: LowRank) -> Result<(), TrainError> {
        let missing = || TrainError::Missing(module.to_owned());
        let path = module.strip_prefix("model.layers.").ok_or_else(missing)?;
        let (index, name) = path.split_once('.').ok_or_else(missing)?;
        let index: usize = index.parse().map_err(|_| missing())?;
        let linear = self
            .layers
            .get_mut(index)
            .and_then(|layer| layer.linears.get_mut(name))
            .ok_or_else(missing)?;
        let (out, input) = linear.weight.dims2()?;
        let (rank, _) = adapter.a.dims2()?;
        for (part, tensor, expected) in [("A", &adapter.a, [rank, input]), ("B", &adapter.b, [out, rank])] {
            if tensor.dims() != expected {
                let (name, found) = (format!("{module}.lora_{part}"), tensor.dims().to_vec());
                return Err(TrainError::Shape {
                    name,
                    found,
                    expected: expected.to_vec(),
                });
            }
        }
        linear.adapter = Some(adapter);
        Ok(())
    }

    /// Layers.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// Prepares for tokens, u32 `[examples, length]`.
    pub fn pass(&self, ids: &Tensor) -> Result<Pass, TrainError> {
        let (examples, length) = ids.dims2()?;
        let limit = self.config.max_position_embeddings.min(POSITIONS_MAX);
        if length > limit {
            return Err(TrainError::Unsupported(format!(
                "{length} tokens in a row; its context holds {limit}"
            )));
        }
        Ok(Pass {
            examples,
            length,
            cos: self.cos.narrow(0, 0, length)?,
            sin: self.sin.narrow(0, 0, length)?,
            mask: causal_mask(length, ids.device())?,
        })
    }

    /// What enters the first layer, `[examples · length, hidden_size]`.
    pub fn embed(&self, ids: &Tensor) -> Result<Tensor, TrainError> {
        whole(&self.embedding.index_select(&ids.flatten_all()?, 0)?)
    }

    /// One layer.
    pub fn layer(&self, index: usize, x: &Tensor, pass: &Pass) -> Result<Tensor, TrainError> {
        let layer = &self.layers[index];
        let normed = self.rms_norm(x, &layer.attention_norm)?;
        let x = (x + self.attention(layer, &normed, pass)?)?;
        let normed = self.rms_norm(&x, &layer.mlp_norm)?;
        let gate = layer.linear("mlp.gate_proj", &normed)?.silu()?;
        let up = layer.linear("mlp.up_proj", &normed)?;
        Ok((&x + layer.linear("mlp.down_proj", &(gate * up)?)?)?)
    }

    /// Tokens, u32 `[examples, length]`, to normalised states `[examples · length, hidden_size]`.
    pub fn states(&self, ids: &Tensor) -> Result<Tensor, TrainError> {
        let pass = self.pass(ids)?;
        let mut x = self.embed(ids)?;
        for index in 0..self.layers.len() {
            x = self.layer(index, &x, &pass)?;
        }
        self.rms_norm(&x, &self.norm)
    }

    /// States `[n, hidden_size]` to logits `[n, vocab_size]`.
    pub fn logits(&self, states: &Tensor) -> Result<Tensor, TrainError> {
        Ok(states.matmul(&whole(&self.head)?.t()?)?)
    }

    /// Logits `[n, vocab_size]` at the positions that count in a batch.
    pub fn batch_logits(&self, batch: &Batch) -> Result<Tensor, TrainError> {
        self.logits(&self.states(&batch.ids)?.index_select(&batch.picks, 0)?)
    }

    /// Mean cross-entropy, in nats per counted token.
    pub fn loss(&self, batch: &Batch) -> Result<Tensor, TrainError> {
        Self::cross_entropy(&self.batch_logits(batch)?, batch)
    }

    /// The same from what left the last layer.
    pub fn loss_after(&self, x: &Tensor, batch: &Batch) -> Result<Tensor, TrainError> {
        let picked = self.rms_norm(&x.index_select(&batch.picks, 0)?, &self.norm)?;
        Self::cross_entropy(&self.logits(&picked)?, batch)
    }

    fn cross_entropy(logits: &Tensor, batch: &Batch) -> Result<Tensor, TrainError> {
        let logits = logits.broadcast_sub(&logits.detach().max_keepdim(D::Minus1)?)?;
        let whole = logits.exp()?.sum_keepdim(D::Minus1)?.log()?;
        let right = logits.gather(&batch.targets.unsqueeze(1)?.contiguous()?, 1)?;
        Ok((whole - right)?.mean_all()?)
    }

    /// The likeliest continuation of `prompt`, up to `limit` tokens or to `end`, which is not returned.
    ///
    /// Reads the whole sequence anew for every token: for checks, not for service.
    pub fn greedy(&self, prompt: &[u32], limit: usize, end: u32) -> Result<Vec<u32>, TrainError> {
        let mut ids = prompt.to_vec();
        while ids.len() < prompt.len() + limit {
            let input = Tensor::new(ids.as_slice(), self.embedding.device())?.unsqueeze(0)?;
            let last = self.states(&input)?.narrow(0, ids.len() - 1, 1)?;
            let next = self.logits(&last)?.squeeze(0)?.argmax(0)?.to_scalar::<u32>()?;
            if next == end {
                break;
            }
            ids.push(next);
        }
        Ok(ids.split_off(prompt.len()))
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor, TrainError> {
        // One small reciprocal instead of a large division: the backward pass of a product is far cheaper.
        let scale = (x.sqr()?.mean_keepdim(D::Minus1)? + self.config.rms_norm_eps)?
            .sqrt()?
            .recip()?;
        Ok(x.broadcast_mul(&scale)?.broadcast_mul(weight)?)
    }

    fn attention(&self, layer: &Layer, x: &Tensor, pass: &Pass) -> Result<Tensor, TrainError> {
        let Pass {
            examples,
            length,
            cos,
            sin,
            mask,
        } = pass;
        let (examples, length) = (*examples, *length);
        let (heads, kv_heads, width) = (
            self.config.num_attention_heads,
            self.config.kv_heads(),
            self.config.head_width(),
        );
        let split = |module: &str, heads: usize, norm: Option<&Tensor>| -> Result<Tensor, TrainError> {
            let mut y = layer
                .linear(module, x)?
                .reshape((examples, length, heads, width))?;
            if let Some(norm) = norm {
                y = self.rms_norm(&y, norm)?;
            }
            Ok(y.transpose(1, 2)?.contiguous()?)
        };
        let norms = layer.head_norms.as_ref();
        let query = split("self_attn.q_proj", heads, norms.map(|(query, _)| query))?;
        let key = split("self_attn.k_proj", kv_heads, norms.map(|(_, key)| key))?;
        let (query, key) = (turn(&query, cos, sin)?, turn(&key, cos, sin)?);
        let value = split("self_attn.v_proj", kv_heads, None)?;
        // Query heads that share a key head lie side by side: stack them as more rows instead of copying keys.
        let rows = heads / kv_heads * length;
        let query = (query.reshape((examples, kv_heads, rows, width))? * (1.0 / (width as f64).sqrt()))?;
        let scores = query.matmul(&key.transpose(2, 3)?.contiguous()?)?;
        let scores = scores
            .reshape((examples, heads, length, length))?
            .broadcast_add(mask)?;
        let scores = scores
            .broadcast_sub(&scores.detach().max_keepdim(D::Minus1)?)?
            .exp()?;
        let shares = scores.broadcast_mul(&scores.sum_keepdim(D::Minus1)?.recip()?)?;
        let mixed = shares
            .reshape((examples, kv_heads, rows, length))?
            .matmul(&value)?;
        let mixed = mixed.reshape((examples, heads, length, width))?.transpose(1, 2)?;
        layer.linear(
            "self_attn.o_proj",
            &mixed.reshape((examples * length, heads * width))?,
        )
    }
}

/// Rotary positions (Su and others, 2021) in the half-split layout of Hugging Face.
fn turn(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor, TrainError> {
    let half = x.dim(D::Minus1)? / 2;
    let (first, second) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
    let turned = Tensor::cat(&[&second.neg()?, &first], D::Minus1)?;
    Ok((x.broadcast_mul(cos)? + turned.broadcast_mul(sin)?)?)
}

fn rotary(config: &Config, device: &Device) -> Result<(Tensor, Tensor), TrainError> {
    let (width, positions) = (
        config.head_width(),
        config.max_position_embeddings.min(POSITIONS_MAX),
    );
    let frequencies = config.frequencies()?;
    let mut angles = Vec::with_capacity(positions * width);
    for position in 0..positions {
        for column in 0..width {
            angles.push((position as f64 * frequencies[column % (width / 2)]) as f32);
        }
    }
    let angles = Tensor::from_vec(angles, (positions, width), device)?;
    Ok((angles.cos()?, angles.sin()?))
}

/// Zero where a token may look, minus infinity ahead of it.
fn causal_mask(length: usize, device: &Device) -> Result<Tensor, TrainError> {
    let mut mask = vec![0f32; length * length];
    for row in 0..length {
        mask[row * length + row + 1..(row + 1) * length].fill(f32::NEG_INFINITY);
    }
    Ok(Tensor::from_vec(mask, (length, length), device)?.to_dtype(DType::F32)?)
}
