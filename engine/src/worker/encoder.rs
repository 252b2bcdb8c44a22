//! The BERT encoder itself: embeddings, self-attention and feed-forward layers, for inference only.
//!
//! Written here because candle's collection of models takes longer to compile than everything else of the engine
//! together, for this one. Names of tensors and settings are Hugging Face's. Source of the architecture: Devlin et
//! al., "BERT: Pre-training of Deep Bidirectional Transformers" (2019).
use candle_core::{DType, Result, Tensor};
use candle_nn::{Embedding, LayerNorm, Linear, Module, VarBuilder, embedding, layer_norm, linear, ops};
use serde::Deserialize;

/// `config.json`, as far as inference needs it.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(super) struct Config {
    pub(super) vocab_size: usize,
    pub(super) hidden_size: usize,
    pub(super) max_position_embeddings: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    intermediate_size: usize,
    type_vocab_size: usize,
    #[serde(default = "layer_norm_eps")]
    layer_norm_eps: f64,
    #[serde(default)]
    hidden_act: Activation,
    position_embedding_type: Option<String>,
}

fn layer_norm_eps() -> f64 {
    1e-12
}

/// What the feed-forward layers bend with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Activation {
    #[default]
    Gelu,
    /// With the tanh approximation.
    #[serde(alias = "gelu_pytorch_tanh", alias = "gelu_fast")]
    GeluNew,
    Relu,
}

impl Activation {
    fn forward(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Gelu => x.gelu_erf(),
            Self::GeluNew => x.gelu(),
            Self::Relu => x.relu(),
        }
    }
}

/// The whole encoder.
pub(super) struct Encoder {
    words: Embedding,
    positions: Embedding,
    types: Embedding,
    norm: LayerNorm,
    layers: Vec<Layer>,
}

struct Layer {
    query: Linear,
    key: Linear,
    value: Linear,
    attended: Linear,
    attended_norm: LayerNorm,
    widen: Linear,
    narrow: Linear,
    norm: LayerNorm,
    heads: usize,
    activation: Activation,
}

impl Encoder {
    /// Takes the weights out of `weights`, with or without the prefix `bert.`.
    pub(super) fn load(weights: &VarBuilder<'_>, config: &Config) -> Result<Self> {
        let c = config;
        if c.num_attention_heads == 0 || !c.hidden_size.is_multiple_of(c.num_attention_heads) {
            candle_core::bail!(
                "hidden_size {} does not divide into {} heads",
                c.hidden_size,
                c.num_attention_heads
            );
        }
        // The relative kinds have the same tensors and would give wrong vectors without a word.
        if let Some(kind) = c
            .position_embedding_type
            .as_deref()
            .filter(|kind| *kind != "absolute")
        {
            candle_core::bail!("position_embedding_type {kind:?}; only absolute positions are known here");
        }
        let prefixed = weights.pp("bert");
        let bare = weights.contains_tensor("embeddings.word_embeddings.weight");
        let weights = if bare { weights } else { &prefixed };
        let e = weights.pp("embeddings");
        let layers = (0..c.num_hidden_layers)
            .map(|i| Layer::load(&weights.pp("encoder.layer").pp(i), c))
            .collect::<Result<_>>()?;
        Ok(Self {
            words: embedding(c.vocab_size, c.hidden_size, e.pp("word_embeddings"))?,
            positions: embedding(
                c.max_position_embeddings,
                c.hidden_size,
                e.pp("position_embeddings"),
            )?,
            types: embedding(c.type_vocab_size, c.hidden_size, e.pp("token_type_embeddings"))?,
            norm: layer_norm(c.hidden_size, c.layer_norm_eps, e.pp("LayerNorm"))?,
            layers,
        })
    }

    /// Hidden states of the last layer, [texts, tokens, hidden], for `ids` [texts, tokens] of one sentence each.
    /// `mask` [texts, tokens] is 1 where a token stands and 0 where padding does.
    pub(super) fn forward(&self, ids: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let (_, tokens) = ids.dims2()?;
        let places = Tensor::arange(0, u32::try_from(tokens)?, ids.device())?;
        let mut hidden = self
            .words
            .forward(ids)?
            .broadcast_add(&self.positions.forward(&places)?)?
            .add(&self.types.forward(&ids.zeros_like()?)?)?;
        hidden = self.norm.forward(&hidden)?;
        // 0 where a token may be looked at, the lowest number where padding is: [texts, 1, 1, tokens].
        let mask = mask.to_dtype(DType::F32)?.unsqueeze(1)?.unsqueeze(1)?;
        let hide = ((mask - 1.0)? * f64::from(f32::MAX))?;
        for layer in &self.layers {
            hidden = layer.forward(&hidden, &hide)?;
        }
        Ok(hidden)
    }
}

impl Layer {
    fn load(w: &VarBuilder<'_>, c: &Config) -> Result<Self> {
        let (hidden, wide) = (c.hidden_size, c.intermediate_size);
        let own = w.pp("attention.self");
        Ok(Self {
            query: linear(hidden, hidden, own.pp("query"))?,
            key: linear(hidden, hidden, own.pp("key"))?,
            value: linear(hidden, hidden, own.pp("value"))?,
            attended: linear(hidden, hidden, w.pp("attention.output.dense"))?,
            attended_norm: layer_norm(hidden, c.layer_norm_eps, w.pp("attention.output.LayerNorm"))?,
            widen: linear(hidden, wide, w.pp("intermediate.dense"))?,
            narrow: linear(wide, hidden, w.pp("output.dense"))?,
            norm: layer_norm(hidden, c.layer_norm_eps, w.pp("output.LayerNorm"))?,
            heads: c.num_attention_heads,
            activation: c.hidden_act,
        })
    }

    fn forward(&self, hidden: &Tensor, hide: &Tensor) -> Result<Tensor> {
        let (texts, tokens, width) = hidden.dims3()?;
        let head = width / self.heads;
        let split = |x: Tensor| {
            x.reshape((texts, tokens, self.heads, head))?
                .transpose(1, 2)?
                .contiguous()
        };
        let query = (split(self.query.forward(hidden)?)? / (head as f64).sqrt())?;
        let key = split(self.key.forward(hidden)?)?;
        let value = split(self.value.forward(hidden)?)?;
        let scores = query
            .matmul(&key.transpose(2, 3)?.contiguous()?)?
            .broadcast_add(hide)?;
        let seen = ops::softmax_last_dim(&scores)?.matmul(&value)?;
        let seen = seen.transpose(1, 2)?.reshape((texts, tokens, width))?;
        let hidden = self
            .attended_norm
            .forward(&(self.attended.forward(&seen)? + hidden)?)?;
        let wide = self.activation.forward(&self.widen.forward(&hidden)?)?;
        self.norm.forward(&(self.narrow.forward(&wide)? + hidden)?)
    }
}
