//! A Hugging Face folder of a Llama model, as one GGUF file for llama.cpp.
//!
//! Two things are easily got wrong. llama.cpp turns neighbouring columns of a head where Hugging Face turns the two
//! halves, so the rows of Q and K change places. And it splits text itself, by the rule named in
//! `tokenizer.ggml.pre`: only tokenizers that split by GPT-2's rule are taken, and nothing else is guessed.

use std::fs;
use std::io::{Seek, Write};
use std::path::Path;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use serde_json::Value as Json;

use super::{Config, TrainError, Weights, load};

/// llama.cpp's codes of token types.
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
/// llama.cpp's codes of file types.
const MOSTLY_F16: u32 = 1;
const MOSTLY_Q8_0: u32 = 7;

/// How matrices are stored. Vectors stay f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// Half floats.
    F16,
    /// Blocks of 32 bytes with one scale; every matrix row must be a multiple of 32 wide.
    Q8_0,
}

/// Writes the model in `folder` (config.json, tokenizer.json, tokenizer_config.json, model.safetensors) to `out`.
pub fn export<W: Write + Seek>(
    folder: &Path,
    name: &str,
    precision: Precision,
    out: &mut W,
) -> Result<(), TrainError> {
    let config: Config = read(&folder.join("config.json"))?;
    config.check()?;
    let tokenizer: Json = read(&folder.join("tokenizer.json"))?;
    let tokenizer_config: Json = read(&folder.join("tokenizer_config.json"))?;
    let weights = load(&folder.join("model.safetensors"), &Device::Cpu)?;

    let file_type = match precision {
        Precision::F16 => MOSTLY_F16,
        Precision::Q8_0 => MOSTLY_Q8_0,
    };
    let mut metadata = vec![
        ("general.architecture", text("llama")),
        ("general.name", text(name)),
        ("general.file_type", Value::U32(file_type)),
        ("general.quantization_version", Value::U32(2)),
        ("llama.block_count", count(config.num_hidden_layers)),
        ("llama.context_length", count(config.max_position_embeddings)),
        ("llama.embedding_length", count(config.hidden_size)),
        ("llama.feed_forward_length", count(config.intermediate_size)),
        ("llama.attention.head_count", count(config.num_attention_heads)),
        ("llama.attention.head_count_kv", count(config.kv_heads())),
        ("llama.attention.key_length", count(config.head_width())),
        ("llama.attention.value_length", count(config.head_width())),
        (
            "llama.attention.layer_norm_rms_epsilon",
            Value::F32(config.rms_norm_eps as f32),
        ),
        ("llama.rope.dimension_count", count(config.head_width())),
        ("llama.rope.freq_base", Value::F32(config.rope_theta as f32)),
        ("llama.vocab_size", count(config.vocab_size)),
    ];
    metadata.extend(vocabulary(&config, &tokenizer, &tokenizer_config)?);
    let tensors = tensors(&config, &weights, precision)?;

    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let tensors: Vec<_> = tensors
        .iter()
        .map(|(name, tensor)| (name.as_str(), tensor))
        .collect();
    gguf_file::write(out, &metadata, &tensors)?;
    Ok(())
}

fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, TrainError> {
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}

fn text(value: &str) -> Value {
    Value::String(value.to_owned())
}

fn count(value: usize) -> Value {
    Value::U32(u32::try_from(value).unwrap_or(u32::MAX))
}

fn vocabulary(
    config: &Config,
    tokenizer: &Json,
    tokenizer_config: &Json,
) -> Result<Vec<(&'static str, Value)>, TrainError> {
    let refuse = |why: &str| TrainError::Unsupported(format!("tokenizer: {why}"));
    let pre = &tokenizer["pre_tokenizer"];
    // `use_regex` absent means true; anything beside a plain byte-level rule would split otherwise than llama.cpp.
    if tokenizer["model"]["type"] != "BPE"
        || pre["type"] != "ByteLevel"
        || pre["use_regex"] == Json::Bool(false)
    {
        return Err(refuse("not a byte-level BPE that splits by GPT-2's rule"));
    }
    if pre["add_prefix_space"] == Json::Bool(true) || !tokenizer["normalizer"].is_null() {
        return Err(refuse("it changes the text before splitting it"));
    }
    let vocab = tokenizer["model"]["vocab"]
        .as_object()
        .ok_or_else(|| refuse("no vocabulary"))?;
    let mut tokens = vec![String::new(); config.vocab_size];
    let mut kinds = vec![NORMAL; config.vocab_size];
    let mut place = |token: &str, id: Option<u64>, kind: i32| -> Result<(), TrainError> {
        let id = id
            .and_then(|id| usize::try_from(id).ok())
            .filter(|id| *id < config.vocab_size);
        let id = id.ok_or_else(|| refuse("a token's id lies outside the vocabulary"))?;
        tokens[id] = token.to_owned();
        kinds[id] = kind;
        Ok(())
    };
    for (token, id) in vocab {
        place(token, id.as_u64(), NORMAL)?;
    }
    for added in tokenizer["added_tokens"].as_array().into_iter().flatten() {
        let content = added["content"]
            .as_str()
            .ok_or_else(|| refuse("an added token has no content"))?;
        let kind = if added["special"] == Json::Bool(true) {
            CONTROL
        } else {
            NORMAL
        };
        place(content, added["id"].as_u64(), kind)?;
    }
    if tokens.iter().any(String::is_empty) {
        return Err(refuse("its ids have gaps"));
    }
    // Newer files hold merges as pairs, older ones as text with a space between.
    let merges = tokenizer["model"]["merges"]
        .as_array()
        .ok_or_else(|| refuse("no merges"))?;
    let merges = merges.iter().map(
        |merge| match (merge.as_str(), merge[0].as_str(), merge[1].as_str()) {
            (Some(merge), _, _) => Ok(text(merge)),
            (None, Some(left), Some(right)) => Ok(Value::String(format!("{left} {right}"))),
            _ => Err(refuse("a merge is no pair")),
        },
    );
    let id_of = |key: &str| -> Result<Option<Value>, TrainError> {
        let token = &tokenizer_config[key];
        let Some(token) = token.as_str().or_else(|| token["content"].as_str()) else {
            return Ok(None);
        };
        let id = tokens.iter().position(|known| known == token);
        id.map(|id| Some(count(id)))
            .ok_or_else(|| refuse(&format!("{key} {token} is not in its vocabulary")))
    };

    let mut metadata = vec![
        ("tokenizer.ggml.model", text("gpt2")),
        ("tokenizer.ggml.pre", text("gpt-2")),
        (
            "tokenizer.ggml.add_bos_token",
            Value::Bool(tokenizer_config["add_bos_token"] == Json::Bool(true)),
        ),
    ];
    for (key, name) in [
        ("tokenizer.ggml.bos_token_id", "bos_token"),
        ("tokenizer.ggml.eos_token_id", "eos_token"),
        ("tokenizer.ggml.padding_token_id", "pad_token"),
    ] {
        metadata.extend(id_of(name)?.map(|id| (key, id)));
    }
    if let Some(template) = tokenizer_config["chat_template"].as_str() {
        metadata.push(("tokenizer.chat_template", text(template)));
    }
    metadata.push((
        "tokenizer.ggml.merges",
        Value::Array(merges.collect::<Result<_, _>>()?),
    ));
    metadata.push((
        "tokenizer.ggml.token_type",
        Value::Array(kinds.into_iter().map(Value::I32).collect()),
    ));
    metadata.push((
        "tokenizer.ggml.tokens",
        Value::Array(tokens.into_iter().map(Value::String).collect()),
    ));
    Ok(metadata)
}

fn tensors(
    config: &Config,
    weights: &Weights,
    precision: Precision,
) -> Result<Vec<(String, QTensor)>, TrainError> {
    let mut tensors = Vec::new();
    for name in config.shapes().keys() {
        let weight = weights
            .get(name)
            .ok_or_else(|| TrainError::Missing(name.clone()))?;
        let heads = match name.rsplit('.').nth(1) {
            Some("q_proj") => Some(config.num_attention_heads),
            Some("k_proj") => Some(config.kv_heads()),
            _ => None,
        };
        let weight = match heads {
            Some(heads) => interleave(weight, heads)?,
            None => weight.clone(),
        };
        let dtype = match precision {
            _ if weight.rank() < 2 => GgmlDType::F32,
            Precision::F16 => GgmlDType::F16,
            Precision::Q8_0 => GgmlDType::Q8_0,
        };
        tensors.push((gguf_name(name), QTensor::quantize(&weight, dtype)?));
    }
    Ok(tensors)
}

/// Rows of each head from "first half, second half" to "pair by pair".
fn interleave(weight: &Tensor, heads: usize) -> Result<Tensor, TrainError> {
    let (rows, columns) = weight.dims2()?;
    let pairs = weight
        .reshape((heads, 2, rows / heads / 2, columns))?
        .transpose(1, 2)?;
    Ok(pairs.contiguous()?.reshape((rows, columns))?)
}

fn gguf_name(name: &str) -> String {
    let mut name = name.to_owned();
    for (from, to) in [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers", "blk"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ] {
        name = name.replace(from, to);
    }
    name
}
