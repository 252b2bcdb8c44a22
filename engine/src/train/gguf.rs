//! A Hugging Face folder of a Llama, Qwen2 or Qwen3 model, as one GGUF file for llama.cpp.
//!
//! Two things are easily got wrong. llama.cpp turns neighbouring columns of a head where Hugging Face turns the two
//! halves, so the rows of Q and K change places. And it splits text itself, by the rule named in
//! `tokenizer.ggml.pre` or by the scores of SentencePiece: only tokenizers for which that gives the same tokens are taken,
//! and nothing else is guessed.

use std::collections::{HashMap, HashSet};
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
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;
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
    let weights = load(&folder.join("model.safetensors"), &Device::Cpu)?;
    export_weights(folder, &weights, name, precision, out)
}

/// What [`export_base`] calls every model: the name is part of the bytes.
const BASE: &str = "base";

/// Writes the model in `folder`, in one file or several shards, as 16-bit GGUF: the same bytes for the same folder, so that
/// an adapter can name its base by their digest.
pub fn export_base<W: Write + Seek>(folder: &Path, out: &mut W) -> Result<(), TrainError> {
    let mut weights = Weights::new();
    for path in super::base::weight_files(folder)? {
        weights.extend(load(&path, &Device::Cpu)?);
    }
    export_weights(folder, &weights, BASE, Precision::F16, out)
}

/// The digest of what [`export_base`] writes, in hexadecimal.
pub fn base_digest(folder: &Path) -> Result<String, TrainError> {
    let mut out = Digester::default();
    export_base(folder, &mut out)?;
    Ok(out.hash.finalize().to_hex().to_string())
}

/// Takes bytes in order and keeps only their digest.
#[derive(Default)]
struct Digester {
    hash: blake3::Hasher,
    written: u64,
}

impl Write for Digester {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.hash.update(bytes);
        self.written += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Seek for Digester {
    /// Says where it is; it cannot go elsewhere.
    fn seek(&mut self, to: std::io::SeekFrom) -> std::io::Result<u64> {
        match to {
            std::io::SeekFrom::Current(0) => Ok(self.written),
            _ => Err(std::io::ErrorKind::Unsupported.into()),
        }
    }
}

/// The same with other weights than the folder's.
pub fn export_weights<W: Write + Seek>(
    folder: &Path,
    weights: &Weights,
    name: &str,
    precision: Precision,
    out: &mut W,
) -> Result<(), TrainError> {
    let config: Config = read(&folder.join("config.json"))?;
    config.check()?;
    let tokenizer: Json = read(&folder.join("tokenizer.json"))?;
    let tokenizer_config: Json = read(&folder.join("tokenizer_config.json"))?;

    let file_type = match precision {
        Precision::F16 => MOSTLY_F16,
        Precision::Q8_0 => MOSTLY_Q8_0,
    };
    let architecture = config.model_type.as_str();
    let of = |key: &str| format!("{architecture}.{key}");
    let mut metadata = vec![
        ("general.architecture".to_owned(), text(architecture)),
        ("general.name".to_owned(), text(name)),
        ("general.file_type".to_owned(), Value::U32(file_type)),
        ("general.quantization_version".to_owned(), Value::U32(2)),
        (of("block_count"), count(config.num_hidden_layers)),
        (of("context_length"), count(config.max_position_embeddings)),
        (of("embedding_length"), count(config.hidden_size)),
        (of("feed_forward_length"), count(config.intermediate_size)),
        (of("attention.head_count"), count(config.num_attention_heads)),
        (of("attention.head_count_kv"), count(config.kv_heads())),
        (of("attention.key_length"), count(config.head_width())),
        (of("attention.value_length"), count(config.head_width())),
        (
            of("attention.layer_norm_rms_epsilon"),
            Value::F32(config.rms_norm_eps as f32),
        ),
        (of("rope.dimension_count"), count(config.head_width())),
        (of("rope.freq_base"), Value::F32(config.theta() as f32)),
        (of("vocab_size"), count(config.vocab_size)),
    ];
    let vocabulary = vocabulary(&config, &tokenizer, &tokenizer_config)?;
    metadata.extend(vocabulary.into_iter().map(|(key, value)| (key.to_owned(), value)));
    let template = chat_template(folder, &tokenizer_config)?;
    metadata.extend(template.map(|template| ("tokenizer.chat_template".to_owned(), text(&template))));
    let mut tensors = tensors(&config, weights, precision)?;
    match stretched(&config)? {
        Stretched::No => {}
        Stretched::Alike(factor) => {
            metadata.push((of("rope.scaling.type"), text("linear")));
            metadata.push((of("rope.scaling.factor"), Value::F32(factor)));
        }
        Stretched::Each(factors) => {
            let count = factors.len();
            let factors = Tensor::from_vec(factors, count, &Device::Cpu)?;
            tensors.push((FACTORS.to_owned(), QTensor::quantize(&factors, GgmlDType::F32)?));
        }
    }

    let metadata: Vec<_> = metadata
        .iter()
        .map(|(key, value)| (key.as_str(), value))
        .collect();
    let tensors: Vec<_> = tensors
        .iter()
        .map(|(name, tensor)| (name.as_str(), tensor))
        .collect();
    gguf_file::write(out, &metadata, &tensors)?;
    Ok(())
}

/// By what llama.cpp divides each frequency of rotary positions.
const FACTORS: &str = "rope_freqs.weight";

/// How a model's rotary positions are stretched.
enum Stretched {
    No,
    /// All by one factor.
    Alike(f32),
    /// Each pair of a head by its own.
    Each(Vec<f32>),
}

fn stretched(config: &Config) -> Result<Stretched, TrainError> {
    let (plain, real) = (config.plain_frequencies(), config.frequencies()?);
    let factors: Vec<f32> = plain
        .zip(real)
        .map(|(plain, real)| (plain / real) as f32)
        .collect();
    let first = factors.first().copied().unwrap_or(1.0);
    if factors.iter().any(|factor| (factor - first).abs() > 1e-6 * first) {
        // Only its Llama reads them.
        return match config.model_type.as_str() {
            "llama" => Ok(Stretched::Each(factors)),
            other => Err(TrainError::Unsupported(format!(
                "llama.cpp does not stretch the rotary positions of {other} like this"
            ))),
        };
    }
    if (first - 1.0).abs() > 1e-6 {
        return Ok(Stretched::Alike(first));
    }
    Ok(Stretched::No)
}

/// The chat template of a model directory: a file of its own in newer ones, a field of the tokenizer's settings in others,
/// there as text or as a list of named ones.
pub(super) fn chat_template(folder: &Path, tokenizer_config: &Json) -> Result<Option<String>, TrainError> {
    match fs::read_to_string(folder.join("chat_template.jinja")) {
        Ok(text) => return Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => {
            return Err(TrainError::File {
                path: folder.join("chat_template.jinja"),
                why: format!("cannot be read: {error}"),
            });
        }
    }
    let field = &tokenizer_config["chat_template"];
    let named = field.as_array().and_then(|all| {
        let default = all.iter().find(|one| one["name"] == "default");
        default.and_then(|one| one["template"].as_str())
    });
    Ok(field.as_str().or(named).map(str::to_owned))
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
    let cut = cut(tokenizer).map_err(refuse)?;
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
            USER_DEFINED
        };
        place(content, added["id"].as_u64(), kind)?;
    }
    // Models are made a little wider than their vocabularies: what nothing stands for is never said.
    for (id, (token, kind)) in tokens.iter_mut().zip(&mut kinds).enumerate() {
        if token.is_empty() {
            (*token, *kind) = (format!("[PAD{id}]"), UNUSED);
        }
    }
    // Newer files hold merges as pairs, older ones as text with a space between.
    let merges = tokenizer["model"]["merges"]
        .as_array()
        .ok_or_else(|| refuse("no merges"))?;
    let merges = merges.iter().map(|merge| {
        let pair = merge.as_str().and_then(|merge| merge.split_once(' '));
        pair.or_else(|| merge[0].as_str().zip(merge[1].as_str()))
            .ok_or_else(|| refuse("a merge is no pair"))
    });
    let merges: Vec<(&str, &str)> = merges.collect::<Result<_, _>>()?;
    let id_of = |key: &str| -> Result<Option<Value>, TrainError> {
        let token = &tokenizer_config[key];
        let Some(token) = token.as_str().or_else(|| token["content"].as_str()) else {
            return Ok(None);
        };
        let id = tokens.iter().position(|known| known == token);
        id.map(|id| Some(count(id)))
            .ok_or_else(|| refuse(&format!("{key} {token} is not in its vocabulary")))
    };

    let (model, rule) = match cut {
        Cut::Bytes(rule) => ("gpt2", rule),
        Cut::Pieces { .. } => ("llama", "default"),
    };
    let mut metadata = vec![
        ("tokenizer.ggml.model", text(model)),
        ("tokenizer.ggml.pre", text(rule)),
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
    match cut {
        Cut::Bytes(_) => {
            let merges = merges
                .iter()
                .map(|(left, right)| Value::String(format!("{left} {right}")));
            metadata.push(("tokenizer.ggml.merges", Value::Array(merges.collect())));
        }
        Cut::Pieces { prefix } => {
            let place = |name: &str| tokens.iter().position(|token| token == name);
            for byte in 0..=u8::MAX {
                let id = place(&format!("<0x{byte:02X}>"));
                let kind = id.and_then(|id| kinds.get_mut(id));
                *kind.ok_or_else(|| refuse("not every byte has a token to fall back on"))? = BYTE;
            }
            let unknown = tokenizer["model"]["unk_token"].as_str().and_then(place);
            if let Some(unknown) = unknown {
                kinds[unknown] = UNKNOWN;
                metadata.push(("tokenizer.ggml.unknown_token_id", count(unknown)));
            }
            metadata.push(("tokenizer.ggml.add_space_prefix", Value::Bool(prefix)));
            let scores = scores(&tokens, &merges).map_err(refuse)?;
            let scores = scores.into_iter().map(Value::F32).collect();
            metadata.push(("tokenizer.ggml.scores", Value::Array(scores)));
        }
    }
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

/// How a tokenizer cuts text.
enum Cut {
    /// Bytes, split by a rule that llama.cpp has a name for, then merged.
    Bytes(&'static str),
    /// SentencePiece: characters merged, with a mark for a space, before all the text too where `prefix`.
    Pieces { prefix: bool },
}

fn cut(tokenizer: &Json) -> Result<Cut, &'static str> {
    const OTHER: &str = "neither a byte-level BPE that splits by the rule of GPT-2, Llama 3 or Qwen2, nor a BPE of SentencePiece";
    const CHANGES: &str = "it changes the text before splitting it";
    let (model, pre, normalizer) = (
        &tokenizer["model"],
        &tokenizer["pre_tokenizer"],
        &tokenizer["normalizer"],
    );
    if model["type"] != "BPE" {
        return Err(OTHER);
    }
    if let Some(rule) = split_rule(pre) {
        // Composing (NFC) changes nothing in text that is composed, as most is; llama.cpp leaves it out.
        let composes = normalizer.is_null() || normalizer["type"] == "NFC";
        return if composes && pre["add_prefix_space"] != Json::Bool(true) {
            Ok(Cut::Bytes(rule))
        } else {
            Err(CHANGES)
        };
    }
    if model["byte_fallback"] != Json::Bool(true) {
        return Err(OTHER);
    }
    let marks = |step: &Json| {
        step["type"] == "Replace" && step["pattern"]["String"] == " " && step["content"] == MARK
    };
    let puts_before = |step: &Json| step["type"] == "Prepend" && step["prepend"] == MARK;
    if pre.is_null() {
        let steps = normalizer["normalizers"].as_array();
        return match steps.map_or(std::slice::from_ref(normalizer), Vec::as_slice) {
            [first, second] if puts_before(first) && marks(second) => Ok(Cut::Pieces { prefix: true }),
            [only] if marks(only) => Ok(Cut::Pieces { prefix: false }),
            _ => Err(CHANGES),
        };
    }
    let whole = pre["type"] == "Metaspace" && pre["replacement"] == MARK && pre["split"] == Json::Bool(false);
    match pre["prepend_scheme"].as_str() {
        _ if !whole || !normalizer.is_null() => Err(OTHER),
        Some("always") => Ok(Cut::Pieces { prefix: true }),
        Some("never") => Ok(Cut::Pieces { prefix: false }),
        // llama.cpp puts it after every special token or after none.
        _ => Err("it puts a space before the first word only"),
    }
}

/// What SentencePiece writes for a space.
const MARK: &str = "\u{2581}";

/// What llama.cpp merges by: of all neighbours that make up a token, those of the highest score first. That is the order of
/// `merges` where these name every such pair, and the pairs of a token one after the other.
fn scores(tokens: &[String], merges: &[(&str, &str)]) -> Result<Vec<f32>, &'static str> {
    const UNLIKE: &str = "its merges are not those of a SentencePiece vocabulary";
    let ids: HashMap<&str, usize> = (0..)
        .zip(tokens)
        .map(|(id, token)| (token.as_str(), id))
        .collect();
    let known: HashSet<(&str, &str)> = merges.iter().copied().collect();
    let mut scores = vec![0.0; tokens.len()];
    let mut ranked = HashSet::new();
    let mut last = None;
    for (left, right) in merges {
        let whole = format!("{left}{right}");
        let id = *ids.get(whole.as_str()).ok_or("a merge makes up no token")?;
        if last == Some(id) {
            continue;
        }
        if !ranked.insert(id) {
            return Err(UNLIKE);
        }
        scores[id] = -(ranked.len() as f32);
        last = Some(id);
    }
    for token in ranked.iter().filter_map(|id| tokens.get(*id)) {
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if ids.contains_key(left) && ids.contains_key(right) && !known.contains(&(left, right)) {
                return Err(UNLIKE);
            }
        }
    }
    Ok(scores)
}

/// llama.cpp's name for the rule by which a tokenizer splits text; none when it knows no such rule.
fn split_rule(pre: &Json) -> Option<&'static str> {
    const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    let plain = |step: &Json, regex: bool| {
        // `use_regex` absent means true.
        step["type"] == "ByteLevel" && (step["use_regex"] != Json::Bool(false)) == regex
    };
    if plain(pre, true) {
        return Some("gpt-2");
    }
    let [split, bytes] = pre["pretokenizers"].as_array()?.as_slice() else {
        return None;
    };
    if split["type"] != "Split" || split["behavior"] != "Isolated" || !plain(bytes, false) {
        return None;
    }
    match split["pattern"]["Regex"].as_str()? {
        LLAMA3 => Some("llama-bpe"),
        QWEN2 => Some("qwen2"),
        _ => None,
    }
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
        let path = name.strip_suffix(".weight").unwrap_or(name);
        let weight = match turned_heads(config, path) {
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

/// The heads of a matrix whose rows change places: Q and K of a Llama. Qwen's are turned in halves there too.
pub(super) fn turned_heads(config: &Config, path: &str) -> Option<usize> {
    match path.rsplit('.').next() {
        _ if config.model_type != "llama" => None,
        Some("q_proj") => Some(config.num_attention_heads),
        Some("k_proj") => Some(config.kv_heads()),
        _ => None,
    }
}

/// Rows of each head from "first half, second half" to "pair by pair".
pub(super) fn interleave(weight: &Tensor, heads: usize) -> Result<Tensor, TrainError> {
    let (rows, columns) = weight.dims2()?;
    let pairs = weight
        .reshape((heads, 2, rows / heads / 2, columns))?
        .transpose(1, 2)?;
    Ok(pairs.contiguous()?.reshape((rows, columns))?)
}

pub(super) fn gguf_name(name: &str) -> String {
    let mut name = name.to_owned();
    for (from, to) in [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers", "blk"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
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
