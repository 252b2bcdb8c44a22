//! What a model's `config.json` says of its arithmetic: shapes, and how positions turn.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::TrainError;

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

    /// Refuses what [`super::Llama`] would get wrong.
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

    fn scaling(&self) -> Option<&RopeScaling> {
        self.rope_parameters.as_ref().or(self.rope_scaling.as_ref())
    }

    /// Base of the rotary frequencies, wherever it stands.
    pub fn theta(&self) -> f64 {
        self.scaling()
            .and_then(|scaling| scaling.rope_theta)
            .unwrap_or(self.rope_theta)
    }

    /// [`Config::frequencies`] before they are stretched.
    pub fn plain_frequencies(&self) -> impl Iterator<Item = f64> + use<> {
        let (theta, width) = (self.theta(), self.head_width());
        (0..width / 2).map(move |pair| theta.powf(-2.0 * pair as f64 / width as f64))
    }

    /// The angle by which each pair of a head turns from one position to the next, in radians; half a head's width of
    /// them. Stretched as `transformers` does it.
    pub fn frequencies(&self) -> Result<Vec<f64>, TrainError> {
        let refuse = |why: String| Err(TrainError::Unsupported(why));
        let plain = self.plain_frequencies();
        let Some(scaling) = self.scaling() else {
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
