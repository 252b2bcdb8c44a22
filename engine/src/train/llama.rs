//! The Llama architecture (RMSNorm, rotary positions, grouped-query attention, SwiGLU) and its near relatives Qwen2
//! (biases on Q, K and V) and Qwen3 (norms on the heads of Q and K), in operations that candle can differentiate, on
//! any of its devices. Weights go by their Hugging Face names; whichever of them are variables will train.
//!
//! This is the reference that the faster [`super::fused`] model is held to, and what trains on a GPU.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{D, DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use super::fused::Dropout;
use super::{Batch, TrainError, Weights};

/// A `config.json` of the Llama, Qwen2 or Qwen3 family. Fields that do not change the arithmetic are ignored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the feed-forward part.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; as many as query heads when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_key_value_heads: Option<usize>,
    /// Width of one head; an equal share of the residual stream when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head_dim: Option<usize>,
    /// Tokens.
    pub vocab_size: usize,
    /// Longest sequence.
    pub max_position_embeddings: usize,
    /// Keeps RMSNorm's division finite.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    #[serde(default = "default_theta")]
    pub rope_theta: f64,
    /// Whether the output matrix is the embedding.
    #[serde(default)]
    pub tie_word_embeddings: bool,
    /// Architecture family: `llama`, `qwen2` or `qwen3`.
    #[serde(default = "default_type")]
    pub model_type: String,
    /// Activation of the feed-forward part: `silu`.
    #[serde(default = "default_activation")]
    pub hidden_act: String,
    /// Biases in attention: not supported.
    #[serde(default)]
    pub attention_bias: bool,
    /// Biases in the feed-forward part: not supported.
    #[serde(default)]
    pub mlp_bias: bool,
    /// Stretched rotary positions: none, `linear` or `llama3`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<RopeScaling>,
    /// The same under its newer name, with `rope_theta` inside.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_parameters: Option<RopeScaling>,
    /// Attention that looks back only so far: not supported.
    #[serde(default)]
    pub use_sliding_window: bool,
}

/// How rotary positions are stretched beyond the length that a model was first trained for.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RopeScaling {
    /// `default`, `linear` or `llama3`.
    #[serde(default, alias = "type", skip_serializing_if = "Option::is_none")]
    pub rope_type: Option<String>,
    /// Base of the frequencies, in newer files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_theta: Option<f64>,
    /// How far positions are stretched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub factor: Option<f64>,
    /// `llama3`: waves longer than the old context by this are stretched in full.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub low_freq_factor: Option<f64>,
    /// `llama3`: waves shorter than the old context by this are left alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub high_freq_factor: Option<f64>,
    /// `llama3`: the context before stretching.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub original_max_position_embeddings: Option<f64>,
}

fn default_theta() -> f64 {
    10_000.0
}

fn default_type() -> String {
    "llama".to_owned()
}

fn default_activation() -> String {
    "silu".to_owned()
}

impl Config {
    /// Key and value heads.
    pub fn kv_heads(&self) -> usize {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    /// Width of one head.
    pub fn head_width(&self) -> usize {
        self.head_dim
            .unwrap_or(self.hidden_size / self.num_attention_heads.max(1))
    }

    /// Refuses what [`Llama`] would get wrong.
    pub fn check(&self) -> Result<(), TrainError> {
        let refuse = |why: String| Err(TrainError::Unsupported(why));
        if !["llama", "qwen2", "qwen3"].contains(&self.model_type.as_str()) {
            return refuse(format!(
                "model_type is {}, not llama, qwen2 or qwen3",
                self.model_type
            ));
        }
        if self.hidden_act != "silu" {
            return refuse(format!("hidden_act is {}, not silu", self.hidden_act));
        }
        if self.attention_bias || self.mlp_bias {
            return refuse("it has biases".to_owned());
        }
        if self.use_sliding_window {
            return refuse("its attention slides (use_sliding_window)".to_owned());
        }
        self.frequencies()?;
        let (heads, kv_heads, width) = (self.num_attention_heads, self.kv_heads(), self.head_width());
        if kv_heads == 0 || heads == 0 || heads % kv_heads != 0 {
            return refuse(format!(
                "{heads} query heads do not share {kv_heads} key heads evenly"
            ));
        }
        if width == 0 || width % 2 != 0 {
            return refuse(format!(
                "its heads are {width} wide; rotary positions need an even width"
            ));
        }
        Ok(())
    }

    /// Whether Q, K and V have biases.
    pub fn has_biases(&self) -> bool {
        self.model_type == "qwen2"
    }

    /// Whether each head of Q and K is normalised.
    pub fn has_head_norms(&self) -> bool {
        self.model_type == "qwen3"
    }

    /// The angle by which each pair of a head turns from one position to the next, in radians; half a head's width of
    /// them. Stretched as `transformers` does it.
    pub fn frequencies(&self) -> Result<Vec<f64>, TrainError> {
        let refuse = |why: String| Err(TrainError::Unsupported(why));
        let scaling = self.rope_parameters.as_ref().or(self.rope_scaling.as_ref());
        let theta = scaling.and_then(|s| s.rope_theta).unwrap_or(self.rope_theta);
        let width = self.head_width();
        let plain = (0..width / 2).map(|pair| theta.powf(-2.0 * pair as f64 / width as f64));
        let Some(scaling) = scaling else {
            return Ok(plain.collect());
        };
        let need = |name: &str, value: Option<f64>| match value {
            Some(value) if value > 0.0 => Ok(value),
            _ => Err(TrainError::Unsupported(format!(
                "its rotary scaling has no {name} above zero"
            ))),
        };
        match scaling.rope_type.as_deref().unwrap_or("default") {
            "default" => Ok(plain.collect()),
            "linear" => {
                let factor = need("factor", scaling.factor)?;
                Ok(plain.map(|frequency| frequency / factor).collect())
            }
            "llama3" => {
                let factor = need("factor", scaling.factor)?;
                let low = need("low_freq_factor", scaling.low_freq_factor)?;
                let high = need("high_freq_factor", scaling.high_freq_factor)?;
                let old = need(
                    "original_max_position_embeddings",
                    scaling.original_max_position_embeddings,
                )?;
                if high <= low {
                    return refuse(
                        "its rotary scaling has high_freq_factor below low_freq_factor".to_owned(),
                    );
                }
                let stretch = |frequency: f64| {
                    let turns = old * frequency / std::f64::consts::TAU;
                    let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                    (1.0 - kept) * frequency / factor + kept * frequency
                };
                Ok(plain.map(stretch).collect())
            }
            other => refuse(format!("its rotary positions are scaled by {other}")),
        }
    }

    /// Every tensor of the checkpoint and its shape, matrices as `[out, in]`.
    pub fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let query = self.num_attention_heads * self.head_width();
        let key = self.kv_heads() * self.head_width();
        let mut shapes = BTreeMap::from([
            (
                "model.embed_tokens.weight".to_owned(),
                vec![self.vocab_size, hidden],
            ),
            ("model.norm.weight".to_owned(), vec![hidden]),
        ]);
        if !self.tie_word_embeddings {
            shapes.insert("lm_head.weight".to_owned(), vec![self.vocab_size, hidden]);
        }
        for layer in 0..self.num_hidden_layers {
            for (name, shape) in [
                ("input_layernorm", vec![hidden]),
                ("post_attention_layernorm", vec![hidden]),
                ("self_attn.q_proj", vec![query, hidden]),
                ("self_attn.k_proj", vec![key, hidden]),
                ("self_attn.v_proj", vec![key, hidden]),
                ("self_attn.o_proj", vec![hidden, query]),
                ("mlp.gate_proj", vec![inner, hidden]),
                ("mlp.up_proj", vec![inner, hidden]),
                ("mlp.down_proj", vec![hidden, inner]),
            ] {
                shapes.insert(format!("model.layers.{layer}.{name}.weight"), shape);
            }
            let at = |name: &str| format!("model.layers.{layer}.self_attn.{name}");
            if self.has_biases() {
                shapes.insert(at("q_proj.bias"), vec![query]);
                shapes.insert(at("k_proj.bias"), vec![key]);
                shapes.insert(at("v_proj.bias"), vec![key]);
            }
            if self.has_head_norms() {
                shapes.insert(at("q_norm.weight"), vec![self.head_width()]);
                shapes.insert(at("k_norm.weight"), vec![self.head_width()]);
            }
        }
        shapes
    }
}

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
        let y = x.matmul(&self.weight.t()?)?;
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
    /// Takes f32 `weights` as they are: one that stands for a variable will train, any other stays frozen.
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

    /// Tokens, u32 `[examples, length]`, to normalised states `[examples · length, hidden_size]`.
    pub fn states(&self, ids: &Tensor) -> Result<Tensor, TrainError> {
        let (examples, length) = ids.dims2()?;
        let limit = self.config.max_position_embeddings.min(POSITIONS_MAX);
        if length > limit {
            return Err(TrainError::Unsupported(format!(
                "{length} tokens in a row; its context holds {limit}"
            )));
        }
        let mask = causal_mask(length, ids.device())?;
        let cos = self.cos.narrow(0, 0, length)?;
        let sin = self.sin.narrow(0, 0, length)?;
        let mut x = self.embedding.index_select(&ids.flatten_all()?, 0)?;
        for layer in &self.layers {
            let normed = self.rms_norm(&x, &layer.attention_norm)?;
            let attended = self.attention(layer, &normed, examples, length, &cos, &sin, &mask)?;
            x = (x + attended)?;
            let normed = self.rms_norm(&x, &layer.mlp_norm)?;
            let gate = layer.linear("mlp.gate_proj", &normed)?.silu()?;
            let up = layer.linear("mlp.up_proj", &normed)?;
            x = (x + layer.linear("mlp.down_proj", &(gate * up)?)?)?;
        }
        self.rms_norm(&x, &self.norm)
    }

    /// States `[n, hidden_size]` to logits `[n, vocab_size]`.
    pub fn logits(&self, states: &Tensor) -> Result<Tensor, TrainError> {
        Ok(states.matmul(&self.head.t()?)?)
    }

    /// Logits `[n, vocab_size]` at the positions that count in a batch.
    pub fn batch_logits(&self, batch: &Batch) -> Result<Tensor, TrainError> {
        self.logits(&self.states(&batch.ids)?.index_select(&batch.picks, 0)?)
    }

    /// Mean cross-entropy, in nats per counted token.
    pub fn loss(&self, batch: &Batch) -> Result<Tensor, TrainError> {
        let logits = self.batch_logits(batch)?;
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

    #[expect(
        clippy::too_many_arguments,
        reason = "the three tables are cut once per pass and shared by all layers"
    )]
    fn attention(
        &self,
        layer: &Layer,
        x: &Tensor,
        examples: usize,
        length: usize,
        cos: &Tensor,
        sin: &Tensor,
        mask: &Tensor,
    ) -> Result<Tensor, TrainError> {
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
