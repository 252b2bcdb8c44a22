//! Sentence vectors from BERT encoders in safetensors, by candle.
//!
//! A directory holds `config.json`, `tokenizer.json`, `model.safetensors` and perhaps `1_Pooling/config.json`, the
//! layout of the sentence-transformers. Vectors are pooled over the tokens that are not padding and have length 1.
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use serde::Deserialize;
use tokenizers::{Tokenizer, TruncationParams};

use super::{
    Desk, Engine,
    encoder::{Config, Encoder},
};
use crate::error::EngineError;
use crate::inspect::{ModelFile, read_capped};
use crate::protocol::{Isolation, Load, ModelFacts, Output, TEXTS_MAX, Work};

/// The version of the candle crates in the workspace table.
const VERSION: &str = "0.11.1";
/// Tokens in one batch at most, padding counted: its attention scores then stay within some tens of megabytes.
const BATCH_TOKENS: usize = 4096;

pub(super) struct Bert {
    model: Encoder,
    tokenizer: Tokenizer,
    pooling: Pooling,
    facts: ModelFacts,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pooling {
    Mean,
    FirstToken,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct PoolingConfig {
    pooling_mode_cls_token: bool,
    pooling_mode_mean_tokens: bool,
    pooling_mode_max_tokens: bool,
    pooling_mode_mean_sqrt_len_tokens: bool,
}

impl Bert {
    pub(super) fn load(load: &Load, file: &ModelFile, threads: u16) -> Result<Self, EngineError> {
        let path = |name: &str| load.model.join(name);
        let json = path("config.json");
        if file.architecture != "bert" {
            return Err(EngineError::Unsupported {
                reason: format!(
                    "an encoder of the type {:?}; BERT is supported",
                    file.architecture
                ),
            });
        }
        let config: Config = serde_json::from_slice(&read_capped(&json)?).map_err(|error| {
            EngineError::bad_model(&json, format!("not a BERT this engine knows: {error}"))
        })?;
        let pooling = pooling(load)?;

        let json = path("tokenizer.json");
        let mut tokenizer = Tokenizer::from_bytes(read_capped(&json)?)
            .map_err(|error| EngineError::bad_model(&json, error))?;
        let positions = config.max_position_embeddings;
        let positions = load
            .context_tokens
            .map_or(positions, |wanted| positions.min(wanted as usize))
            .max(3);
        // The file's own settings suit its author's benchmark: padding to a fixed length, and cutting far too early.
        tokenizer.with_padding(None);
        let truncation = TruncationParams {
            max_length: positions,
            ..TruncationParams::default()
        };
        tokenizer
            .with_truncation(Some(truncation))
            .map_err(|error| EngineError::bad_model(&json, error))?;

        let weights = path("model.safetensors");
        let unusable = |error: &dyn std::fmt::Display| EngineError::bad_model(&weights, error.to_string());
        let bytes = std::fs::read(&weights).map_err(|error| unusable(&error))?;
        let variables = VarBuilder::from_buffered_safetensors(bytes, DType::F32, &Device::Cpu)
            .map_err(|error| unusable(&error))?;
        let model = Encoder::load(&variables, &config).map_err(|error| unusable(&error))?;
        let vocabulary = tokenizer.get_vocab_size(true);
        if vocabulary > config.vocab_size {
            return Err(EngineError::bad_model(
                &json,
                format!("knows {vocabulary} tokens and the model {}", config.vocab_size),
            ));
        }
        let facts = ModelFacts {
            name: file.name.clone(),
            architecture: file.architecture.clone(),
            context_tokens: u32::try_from(positions).unwrap_or(u32::MAX),
            parameters: file.parameters,
            dimensions: u32::try_from(config.hidden_size).ok(),
            memory_estimate: file.memory_estimate(u32::try_from(positions).unwrap_or(u32::MAX)),
            engine: format!("candle {VERSION} {}", std::env::consts::ARCH),
            threads,
            isolation: Isolation::None,
        };
        Ok(Self {
            model,
            tokenizer,
            pooling,
            facts,
        })
    }

    fn embed(&self, texts: &[String], desk: &mut Desk<'_>) -> Result<Output, EngineError> {
        if texts.is_empty() || texts.len() > TEXTS_MAX {
            return Err(EngineError::bad_input(format!(
                "{} texts; 1 to {TEXTS_MAX} are allowed",
                texts.len()
            )));
        }
        let mut truncated = 0;
        let mut tokens = Vec::with_capacity(texts.len());
        for text in texts {
            desk.check()?;
            let encoding = self
                .tokenizer
                .encode(text.as_str(), true)
                .map_err(EngineError::bad_input)?;
            truncated += u32::from(!encoding.get_overflowing().is_empty());
            desk.tokens_in += encoding.get_ids().len() as u64;
            tokens.push(encoding.get_ids().to_vec());
        }
        // Neighbours in length share a batch, so that little of it is padding.
        let mut order: Vec<usize> = (0..tokens.len()).collect();
        order.sort_by_key(|index| tokens[*index].len());
        let mut vectors = vec![Vec::new(); tokens.len()];
        let mut rest = &order[..];
        while let Some(first) = rest.first() {
            desk.check()?;
            let mut size = 1;
            // Sorted: the last one taken is the longest.
            while size < rest.len()
                && (size + 1) * tokens[rest[size]].len() <= BATCH_TOKENS
                && tokens[rest[size]].len() <= tokens[*first].len() * 5 / 4 + 8
            {
                size += 1;
            }
            let (batch, after) = rest.split_at(size);
            let texts: Vec<&[u32]> = batch.iter().map(|index| tokens[*index].as_slice()).collect();
            let computed = self.forward(&texts).map_err(|error| EngineError::Crashed {
                how: format!("candle: {error}"),
            })?;
            for (index, vector) in batch.iter().zip(computed) {
                vectors[*index] = vector;
            }
            rest = after;
            desk.alive();
        }
        Ok(Output::Vectors { vectors, truncated })
    }

    fn forward(&self, texts: &[&[u32]]) -> candle_core::Result<Vec<Vec<f32>>> {
        let longest = texts.iter().map(|ids| ids.len()).max().unwrap_or(0);
        let shape = (texts.len(), longest);
        let padded = |fill: &dyn Fn(&[u32], usize) -> u32| -> candle_core::Result<Tensor> {
            let flat = texts
                .iter()
                .flat_map(|ids| (0..longest).map(|at| fill(ids, at)))
                .collect::<Vec<u32>>();
            Tensor::from_vec(flat, shape, &Device::Cpu)
        };
        let ids = padded(&|ids, at| ids.get(at).copied().unwrap_or(0))?;
        let mask = padded(&|ids, at| u32::from(at < ids.len()))?;
        let hidden = self.model.forward(&ids, &mask)?;
        let pooled = match self.pooling {
            Pooling::FirstToken => hidden.narrow(1, 0, 1)?.squeeze(1)?,
            Pooling::Mean => {
                let mask = mask.to_dtype(DType::F32)?.unsqueeze(2)?;
                let sum = hidden.broadcast_mul(&mask)?.sum(1)?;
                sum.broadcast_div(&mask.sum(1)?)?
            }
        };
        let length = pooled.sqr()?.sum_keepdim(1)?.sqrt()?.clamp(1e-12, f64::MAX)?;
        pooled.broadcast_div(&length)?.to_vec2()
    }
}

impl Engine for Bert {
    fn facts(&self) -> ModelFacts {
        self.facts.clone()
    }

    fn run(&mut self, work: Work, desk: &mut Desk<'_>) -> Result<Output, EngineError> {
        match work {
            Work::Embed { texts } => self.embed(&texts, desk),
            _ => Err(EngineError::bad_input(
                "this worker holds a model that embeds texts",
            )),
        }
    }
}

fn pooling(load: &Load) -> Result<Pooling, EngineError> {
    let path = load.model.join("1_Pooling").join("config.json");
    if !path.exists() {
        return Ok(Pooling::Mean);
    }
    let config: PoolingConfig =
        serde_json::from_slice(&read_capped(&path)?).map_err(|error| EngineError::bad_model(&path, error))?;
    match (config.pooling_mode_mean_tokens, config.pooling_mode_cls_token) {
        _ if config.pooling_mode_max_tokens || config.pooling_mode_mean_sqrt_len_tokens => {}
        (true, false) => return Ok(Pooling::Mean),
        (false, true) => return Ok(Pooling::FirstToken),
        _ => {}
    }
    Err(EngineError::Unsupported {
        reason: "pooling other than the mean or the first token".into(),
    })
}
