//! Reading the headers of model files, without trusting a byte of them.
//!
//! Only GGUF and safetensors are ever opened. Every length is checked against what is left of the file before it is
//! believed, so a corrupt, truncated or hostile file gives [`EngineError::BadModel`] that names the file and what
//! is wrong with it; it never panics and never allocates more than [`TEXT_MAX`] for one value.
//! Start at [`inspect`].
use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use serde::Deserialize;

use crate::error::EngineError;
use crate::unit::Bytes;

/// Bytes of one string in a header at most. Chat templates are the longest known, at some tens of kilobytes.
pub const TEXT_MAX: u64 = 4 << 20;
/// Tensors in one file at most.
pub const TENSORS_MAX: u64 = 1 << 17;
/// Bytes of a safetensors header, and of a configuration or tokenizer file beside it, at most.
pub const JSON_MAX: u64 = 64 << 20;

const KEYS_MAX: u64 = 1 << 14;
const DIMENSIONS_MAX: u32 = 4;
/// Tokens that llama.cpp computes in one step here; its working memory grows with it.
pub(crate) const STEP_TOKENS: u32 = 256;

/// How a model is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// One GGUF file.
    Gguf,
    /// A directory with `config.json`, `tokenizer.json` and `model.safetensors`.
    Safetensors,
}

/// What the headers of a model say, checked for consistency.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelFile {
    /// How it is stored.
    pub format: Format,
    /// As the file calls itself; the file's name when it does not.
    pub name: String,
    /// `llama`, `qwen2`, `bert` …
    pub architecture: String,
    /// Tokens the model was made for; 0 when it does not say.
    pub context_tokens: u32,
    /// Numbers in its weights.
    pub parameters: u64,
    /// Bytes of its weights.
    pub weights: Bytes,
    /// Length of its inner vectors; 0 when it does not say.
    pub dimensions: u32,
    /// Entries of its vocabulary; 0 when it does not say.
    pub vocabulary: u32,
    /// Whether it says how a chat is written down.
    pub chat_template: bool,
    /// The type most of its weights are stored in.
    pub weight_type: String,
    /// Bytes of attention cache for each token of context.
    cache_per_token: u64,
    /// For an adapter: the base it was made for, if it says so.
    base: Option<String>,
    adapter: bool,
}

/// A LoRA adapter, as its headers describe it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterFile {
    /// The architecture of its base.
    pub architecture: String,
    /// Bytes of its weights.
    pub weights: Bytes,
    /// The BLAKE3 digest of the base model's file in hexadecimal, from the key [`BASE_KEY`]; none when the file does not say.
    pub base: Option<String>,
}

/// The key of a GGUF adapter that names its base by digest.
pub const BASE_KEY: &str = "karez.base.blake3";

/// Reads and checks the headers of the LoRA adapter (GGUF) at `path`.
pub fn adapter(path: &Path) -> Result<AdapterFile, EngineError> {
    let file = inspect(path)?;
    if !file.adapter {
        return Err(EngineError::bad_model(
            path,
            "a model, where a LoRA adapter is expected",
        ));
    }
    Ok(AdapterFile {
        architecture: file.architecture,
        weights: file.weights,
        base: file.base,
    })
}

impl ModelFile {
    /// Memory a worker needs for this model with `context_tokens` of context: the weights, keys and values of every
    /// token as 16-bit numbers in every layer, one step's logits and activations, and 64 MiB for the process.
    pub fn memory_estimate(&self, context_tokens: u32) -> Bytes {
        let per_step = match self.format {
            // Logits of every token of a step, and about 48 rows of activations.
            Format::Gguf => u64::from(self.vocabulary)
                .saturating_mul(4)
                .saturating_add(u64::from(self.dimensions) * 192),
            // Attention scores of one batch dominate, and are small beside the rest.
            Format::Safetensors => u64::from(self.dimensions) * 4 * 64,
        };
        let cache = self.cache_per_token.saturating_mul(u64::from(context_tokens));
        let sum = self
            .weights
            .0
            .saturating_add(cache)
            .saturating_add(per_step.saturating_mul(u64::from(STEP_TOKENS)))
            .saturating_add(64 << 20);
        Bytes(sum)
    }

    /// How many tokens `sequences` generations should share, where each may hold `context_tokens` and all of it may take
    /// `memory`: 1024 each, but no more than a quarter of the memory unless a single one needs more.
    pub fn cache_tokens(&self, context_tokens: u32, sequences: u16, memory: Bytes) -> u32 {
        let wanted = u32::from(sequences).saturating_mul(1024).max(context_tokens);
        let left = memory
            .0
            .saturating_sub(self.memory_estimate(0).0)
            .min(memory.0 / 4);
        let fit = left.checked_div(self.cache_per_token).unwrap_or(u64::MAX);
        wanted
            .min(u32::try_from(fit).unwrap_or(u32::MAX))
            .max(context_tokens)
    }

    /// The context a worker uses when asked for `wanted`: never more than the model was made for, 8192 unless asked.
    pub fn context_for(&self, wanted: Option<u32>) -> u32 {
        let most = if self.context_tokens == 0 {
            u32::MAX
        } else {
            self.context_tokens
        };
        wanted.unwrap_or(8192).clamp(1, most)
    }
}

/// Reads and checks the headers of the model at `path`: a GGUF file, or a safetensors directory.
pub fn inspect(path: &Path) -> Result<ModelFile, EngineError> {
    let meta = std::fs::metadata(path).map_err(|error| EngineError::bad_model(path, error))?;
    if meta.is_dir() {
        safetensors_directory(path)
    } else if meta.is_file() {
        gguf(path, meta.len())
    } else {
        Err(EngineError::bad_model(path, "neither a file nor a directory"))
    }
}

// ---- GGUF ----

/// A reader that knows how much of the file is left.
struct Bounded<R> {
    inner: R,
    left: u64,
    read: u64,
}

type Parsed<T> = Result<T, String>;

impl<R: BufRead> Bounded<R> {
    fn bytes<const N: usize>(&mut self, what: &str) -> Parsed<[u8; N]> {
        self.claim(N as u64, what)?;
        let mut buffer = [0; N];
        self.inner
            .read_exact(&mut buffer)
            .map_err(|error| format!("{what}: {error}"))?;
        Ok(buffer)
    }

    /// Takes `length` from what is left before anyone reads or allocates it.
    fn claim(&mut self, length: u64, what: &str) -> Parsed<()> {
        if length > self.left {
            return Err(format!(
                "truncated: {what} at byte {} needs {length} bytes and the file has {} more",
                self.read, self.left
            ));
        }
        self.left -= length;
        self.read += length;
        Ok(())
    }

    fn u32(&mut self, what: &str) -> Parsed<u32> {
        self.bytes(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Parsed<u64> {
        self.bytes(what).map(u64::from_le_bytes)
    }

    fn text(&mut self, what: &str) -> Parsed<String> {
        let length = self.u64(what)?;
        if length > TEXT_MAX {
            return Err(format!(
                "{what} at byte {} claims {length} bytes, {TEXT_MAX} are allowed",
                self.read
            ));
        }
        self.claim(length, what)?;
        let mut buffer = vec![0; length as usize];
        self.inner
            .read_exact(&mut buffer)
            .map_err(|error| format!("{what}: {error}"))?;
        String::from_utf8(buffer).map_err(|_| format!("{what} at byte {} is not UTF-8", self.read))
    }

    fn skip(&mut self, length: u64, what: &str) -> Parsed<()> {
        self.claim(length, what)?;
        let skipped = std::io::copy(&mut self.inner.by_ref().take(length), &mut std::io::sink());
        match skipped {
            Ok(n) if n == length => Ok(()),
            Ok(_) => Err(format!("{what}: the file shrank while it was read")),
            Err(error) => Err(format!("{what}: {error}")),
        }
    }
}

/// The values a header holds, as far as anything here asks for them.
enum Value {
    Number(u64),
    Text(String),
    /// Length, and the elements when they are whole numbers and few.
    List(u64, Vec<u64>),
    Other,
}

/// GGUF's value types: bytes of one element, and whether it is a whole number.
fn scalar(kind: u32) -> Option<(u64, bool)> {
    Some(match kind {
        0 | 1 => (1, true),
        2 | 3 => (2, true),
        4 | 5 => (4, true),
        6 => (4, false),
        7 => (1, true),
        10 | 11 => (8, true),
        12 => (8, false),
        _ => return None,
    })
}

fn number<R: BufRead>(from: &mut Bounded<R>, kind: u32, what: &str) -> Parsed<u64> {
    // Negative numbers are read as huge ones: none of the values asked for may be negative.
    Ok(match scalar(kind) {
        Some((1, _)) => u64::from(from.bytes::<1>(what)?[0]),
        Some((2, _)) => u64::from(u16::from_le_bytes(from.bytes(what)?)),
        Some((4, _)) => u64::from(from.u32(what)?),
        _ => from.u64(what)?,
    })
}

fn value<R: BufRead>(from: &mut Bounded<R>, key: &str) -> Parsed<Value> {
    let kind = from.u32(key)?;
    if let Some((_, whole)) = scalar(kind) {
        let number = number(from, kind, key)?;
        return Ok(if whole {
            Value::Number(number)
        } else {
            Value::Other
        });
    }
    match kind {
        8 => from.text(key).map(Value::Text),
        9 => {
            let of = from.u32(key)?;
            let count = from.u64(key)?;
            match scalar(of) {
                Some((_, true)) if count <= 4096 => (0..count)
                    .map(|_| number(from, of, key))
                    .collect::<Parsed<_>>()
                    .map(|all| Value::List(count, all)),
                Some((size, _)) => {
                    let length = count
                        .checked_mul(size)
                        .ok_or_else(|| format!("{key} claims {count} elements"))?;
                    from.skip(length, key)?;
                    Ok(Value::List(count, Vec::new()))
                }
                None if of == 8 => {
                    // Eight bytes of length each: a false count ends at the end of the file.
                    for _ in 0..count {
                        let length = from.u64(key)?;
                        from.skip(length, key)?;
                    }
                    Ok(Value::List(count, Vec::new()))
                }
                None => Err(format!("{key} is a list of unknown type {of}")),
            }
        }
        _ => Err(format!("{key} has the unknown type {kind}")),
    }
}

/// ggml's storage types: name, numbers in a block, bytes of a block.
fn storage(kind: u32) -> Option<(&'static str, u64, u64)> {
    Some(match kind {
        0 => ("F32", 1, 4),
        1 => ("F16", 1, 2),
        2 => ("Q4_0", 32, 18),
        3 => ("Q4_1", 32, 20),
        6 => ("Q5_0", 32, 22),
        7 => ("Q5_1", 32, 24),
        8 => ("Q8_0", 32, 34),
        9 => ("Q8_1", 32, 36),
        10 => ("Q2_K", 256, 84),
        11 => ("Q3_K", 256, 110),
        12 => ("Q4_K", 256, 144),
        13 => ("Q5_K", 256, 176),
        14 => ("Q6_K", 256, 210),
        15 => ("Q8_K", 256, 292),
        16 => ("IQ2_XXS", 256, 66),
        17 => ("IQ2_XS", 256, 74),
        18 => ("IQ3_XXS", 256, 98),
        19 => ("IQ1_S", 256, 50),
        20 => ("IQ4_NL", 32, 18),
        21 => ("IQ3_S", 256, 110),
        22 => ("IQ2_S", 256, 82),
        23 => ("IQ4_XS", 256, 136),
        24 => ("I8", 1, 1),
        25 => ("I16", 1, 2),
        26 => ("I32", 1, 4),
        27 => ("I64", 1, 8),
        28 => ("F64", 1, 8),
        29 => ("IQ1_M", 256, 56),
        30 => ("BF16", 1, 2),
        34 => ("TQ1_0", 256, 54),
        35 => ("TQ2_0", 256, 66),
        39 => ("MXFP4", 32, 17),
        _ => return None,
    })
}

fn gguf(path: &Path, length: u64) -> Result<ModelFile, EngineError> {
    let file = File::open(path).map_err(|error| EngineError::bad_model(path, error))?;
    let fallback = path
        .file_stem()
        .map(|stem| stem.to_string_lossy().into_owned())
        .unwrap_or_default();
    let mut reader = Bounded {
        inner: BufReader::with_capacity(1 << 16, file),
        left: length,
        read: 0,
    };
    parse_gguf(&mut reader, fallback).map_err(|reason| EngineError::bad_model(path, reason))
}

/// The same check on bytes in memory, for a model that is part of the program and for fuzzing.
pub fn inspect_gguf_bytes(bytes: &[u8], name: &str) -> Result<ModelFile, EngineError> {
    let mut reader = Bounded {
        inner: bytes,
        left: bytes.len() as u64,
        read: 0,
    };
    parse_gguf(&mut reader, name.to_owned()).map_err(|reason| EngineError::BadModel {
        file: name.to_owned(),
        reason,
    })
}

fn parse_gguf<R: BufRead>(from: &mut Bounded<R>, fallback: String) -> Parsed<ModelFile> {
    if from.left < 4 || &from.bytes::<4>("magic")? != b"GGUF" {
        return Err(
            "it does not begin with GGUF; only GGUF files and safetensors directories are read".into(),
        );
    }
    let version = from.u32("version")?;
    if !(2..=3).contains(&version) {
        return Err(format!(
            "GGUF version {version}; versions 2 and 3, little-endian, are read"
        ));
    }
    let tensors = from.u64("number of tensors")?;
    let keys = from.u64("number of keys")?;
    if tensors > TENSORS_MAX || keys > KEYS_MAX {
        return Err(format!(
            "claims {tensors} tensors and {keys} keys; {TENSORS_MAX} and {KEYS_MAX} are allowed"
        ));
    }
    let mut values = BTreeMap::new();
    for _ in 0..keys {
        let key = from.text("a key")?;
        if key.len() > 256 || key.is_empty() {
            return Err(format!("a key of {} bytes before byte {}", key.len(), from.read));
        }
        let value = value(from, &key)?;
        if values.insert(key.clone(), value).is_some() {
            return Err(format!("the key {key} appears twice"));
        }
    }
    let number = |key: &str| match values.get(key) {
        Some(Value::Number(n)) => Some(*n),
        _ => None,
    };
    let text = |key: &str| match values.get(key) {
        Some(Value::Text(text)) => Some(text.as_str()),
        _ => None,
    };
    if number("split.count").is_some_and(|parts| parts > 1) {
        return Err("one part of a model split into several files; merge them first".into());
    }
    let alignment = number("general.alignment").unwrap_or(32);
    if !alignment.is_power_of_two() || alignment > 1 << 20 {
        return Err(format!(
            "general.alignment is {alignment}, which is not a sensible power of two"
        ));
    }

    struct Extent {
        name: String,
        offset: u64,
        size: u64,
    }
    let mut extents = Vec::new();
    let mut names = HashSet::new();
    let mut parameters = 0u64;
    let mut weights = 0u64;
    let mut by_type: BTreeMap<&'static str, u64> = BTreeMap::new();
    for _ in 0..tensors {
        let name = from.text("a tensor's name")?;
        if name.len() >= 64 {
            return Err(format!("a tensor's name of {} bytes; 63 are allowed", name.len()));
        }
        if !names.insert(name.clone()) {
            return Err(format!("the tensor {name} appears twice"));
        }
        let dimensions = from.u32(&name)?;
        if dimensions > DIMENSIONS_MAX {
            return Err(format!(
                "tensor {name} has {dimensions} dimensions, {DIMENSIONS_MAX} are allowed"
            ));
        }
        let mut elements = 1u64;
        let mut row = 1;
        for dimension in 0..dimensions {
            let size = from.u64(&name)?;
            if size == 0 || size > i64::MAX as u64 {
                return Err(format!("tensor {name} has a dimension of {size}"));
            }
            if dimension == 0 {
                row = size;
            }
            elements = elements
                .checked_mul(size)
                .filter(|n| *n <= i64::MAX as u64)
                .ok_or_else(|| format!("tensor {name} has too many elements"))?;
        }
        let kind = from.u32(&name)?;
        let offset = from.u64(&name)?;
        let (kind, block, block_bytes) =
            storage(kind).ok_or_else(|| format!("tensor {name} has the unknown type {kind}"))?;
        if row % block != 0 {
            return Err(format!(
                "tensor {name}: rows of {row} do not divide into {kind} blocks of {block}"
            ));
        }
        let size = (elements / block)
            .checked_mul(block_bytes)
            .ok_or_else(|| format!("tensor {name} is too large"))?;
        if offset % alignment != 0 {
            return Err(format!(
                "tensor {name} begins at {offset}, not a multiple of {alignment}"
            ));
        }
        parameters = parameters.saturating_add(elements);
        weights = weights.saturating_add(size);
        *by_type.entry(kind).or_default() += size;
        extents.push(Extent { name, offset, size });
    }
    let begin = from.read.next_multiple_of(alignment);
    let data = (from.read + from.left).saturating_sub(begin);
    for Extent { name, offset, size } in &extents {
        if offset.checked_add(*size).is_none_or(|end| end > data) {
            return Err(format!(
                "truncated: tensor {name} takes bytes {offset} to {} of the data, which has {data}",
                offset.saturating_add(*size)
            ));
        }
    }
    // Each tensor must begin where the one before it, padded, ends: anything else is two tensors in one place, or
    // bytes that nobody accounts for.
    let mut next = 0u64;
    for Extent { name, offset, size } in &extents {
        if *offset != next {
            return Err(format!("tensor {name} begins at {offset}, expected at {next}"));
        }
        next = next.saturating_add(*size).saturating_add(alignment - 1) & !(alignment - 1);
    }

    let architecture = text("general.architecture")
        .ok_or("general.architecture is missing")?
        .to_owned();
    if architecture.is_empty() || architecture.len() > 64 {
        return Err("general.architecture is not a name".into());
    }
    let of = |key: &str| number(&format!("{architecture}.{key}")).unwrap_or(0);
    let layers = of("block_count").min(1 << 16);
    let dimensions = of("embedding_length").min(1 << 24);
    let heads = match values.get(&format!("{architecture}.attention.head_count")) {
        Some(Value::Number(n)) => *n,
        Some(Value::List(_, each)) => each.iter().copied().max().unwrap_or(0),
        _ => 0,
    }
    .min(1 << 20);
    // Heads whose keys and values are kept, summed over the layers.
    let kept_heads = match values.get(&format!("{architecture}.attention.head_count_kv")) {
        Some(Value::Number(n)) => n.saturating_mul(layers),
        Some(Value::List(_, each)) => each.iter().fold(0u64, |sum, n| sum.saturating_add(*n)),
        _ => heads * layers,
    };
    let head = dimensions.checked_div(heads).unwrap_or(0);
    let key = Some(of("attention.key_length"))
        .filter(|n| *n > 0)
        .unwrap_or(head);
    let val = Some(of("attention.value_length"))
        .filter(|n| *n > 0)
        .unwrap_or(head);
    let vocabulary = match values.get("tokenizer.ggml.tokens") {
        Some(Value::List(count, _)) => *count,
        _ => of("vocab_size"),
    };
    let name = text("general.name").filter(|name| !name.is_empty() && name.len() <= 256);
    Ok(ModelFile {
        format: Format::Gguf,
        name: name.map_or(fallback, str::to_owned),
        context_tokens: u32::try_from(of("context_length")).unwrap_or(u32::MAX),
        parameters,
        weights: Bytes(weights),
        dimensions: dimensions as u32,
        vocabulary: u32::try_from(vocabulary).unwrap_or(u32::MAX),
        chat_template: text("tokenizer.chat_template").is_some(),
        weight_type: most(by_type),
        cache_per_token: kept_heads
            .saturating_mul(key.saturating_add(val))
            .saturating_mul(2),
        base: text(BASE_KEY).map(str::to_owned),
        adapter: text("general.type") == Some("adapter") && text("adapter.type") == Some("lora"),
        architecture,
    })
}

fn most(by_type: BTreeMap<&'static str, u64>) -> String {
    by_type
        .into_iter()
        .max_by_key(|(_, size)| *size)
        .map_or("none", |(name, _)| name)
        .to_owned()
}

// ---- safetensors ----

#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    model_type: String,
    #[serde(default)]
    max_position_embeddings: u32,
    #[serde(default)]
    hidden_size: u32,
    #[serde(default)]
    vocab_size: u32,
}

#[derive(Deserialize)]
struct Tensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

fn safetensors_directory(path: &Path) -> Result<ModelFile, EngineError> {
    let config = path.join("config.json");
    let config: Config = serde_json::from_slice(&read_capped(&config)?)
        .map_err(|error| EngineError::bad_model(&config, error))?;
    let tokenizer = path.join("tokenizer.json");
    serde_json::from_slice::<serde::de::IgnoredAny>(&read_capped(&tokenizer)?)
        .map_err(|error| EngineError::bad_model(&tokenizer, error))?;
    let weights = path.join("model.safetensors");
    let (parameters, size, weight_type) = safetensors(&weights)?;
    Ok(ModelFile {
        format: Format::Safetensors,
        // The configuration often names the model this one was made from, which misleads.
        name: path
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default(),
        architecture: config.model_type,
        context_tokens: config.max_position_embeddings,
        parameters,
        // The file's bytes and the tensors made of them are both in memory while loading.
        weights: Bytes(size.saturating_mul(2)),
        dimensions: config.hidden_size.min(1 << 24),
        vocabulary: config.vocab_size,
        chat_template: false,
        weight_type,
        cache_per_token: 0,
        base: None,
        adapter: false,
    })
}

/// The whole of a small file, refused when it is not small.
pub(crate) fn read_capped(path: &Path) -> Result<Vec<u8>, EngineError> {
    let file = File::open(path).map_err(|error| EngineError::bad_model(path, error))?;
    let mut bytes = Vec::new();
    file.take(JSON_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| EngineError::bad_model(path, error))?;
    if bytes.len() as u64 > JSON_MAX {
        return Err(EngineError::bad_model(
            path,
            format!("longer than the {JSON_MAX} bytes allowed"),
        ));
    }
    Ok(bytes)
}

fn safetensors(path: &Path) -> Result<(u64, u64, String), EngineError> {
    let bad = |reason: String| EngineError::bad_model(path, reason);
    let mut file = File::open(path).map_err(|error| bad(error.to_string()))?;
    let meta = file.metadata().map_err(|error| bad(error.to_string()))?;
    if !meta.is_file() {
        return Err(bad("not a regular file".into()));
    }
    let mut length = [0; 8];
    file.read_exact(&mut length)
        .map_err(|_| bad("truncated: shorter than its own length field".into()))?;
    let length = u64::from_le_bytes(length);
    let after = meta.len().saturating_sub(8);
    if length > after || length > JSON_MAX {
        return Err(bad(format!(
            "truncated or not safetensors: a header of {length} bytes is announced, {after} follow and {JSON_MAX} \
             are allowed"
        )));
    }
    let mut header = vec![0; length as usize];
    file.read_exact(&mut header)
        .map_err(|error| bad(error.to_string()))?;
    check_safetensors(&header, after - length).map_err(bad)
}

/// Checks a safetensors header against the bytes of data that follow it; gives parameters, bytes and main type.
fn check_safetensors(header: &[u8], data: u64) -> Parsed<(u64, u64, String)> {
    let mut tensors: BTreeMap<String, serde_json::Value> =
        serde_json::from_slice(header).map_err(|error| format!("header: {error}"))?;
    tensors.remove("__metadata__");
    if tensors.len() as u64 > TENSORS_MAX {
        return Err(format!("{} tensors, {TENSORS_MAX} are allowed", tensors.len()));
    }
    let mut parameters = 0u64;
    let mut by_type: BTreeMap<&'static str, u64> = BTreeMap::new();
    let mut extents = Vec::new();
    for (name, tensor) in tensors {
        let tensor: Tensor =
            serde_json::from_value(tensor).map_err(|error| format!("tensor {name}: {error}"))?;
        let (kind, size) = match tensor.dtype.as_str() {
            "F64" => ("F64", 8),
            "F32" => ("F32", 4),
            "F16" => ("F16", 2),
            "BF16" => ("BF16", 2),
            "I64" => ("I64", 8),
            "I32" => ("I32", 4),
            "I16" => ("I16", 2),
            "I8" => ("I8", 1),
            "U8" => ("U8", 1),
            "BOOL" => ("BOOL", 1),
            other => {
                return Err(format!(
                    "tensor {name} has the type {other:?}, which is not read here"
                ));
            }
        };
        let elements = tensor.shape.iter().try_fold(1u64, |n, size| n.checked_mul(*size));
        let bytes = elements.and_then(|n| n.checked_mul(size));
        let (begin, end) = tensor.data_offsets;
        let (Some(elements), Some(bytes)) = (elements, bytes) else {
            return Err(format!("tensor {name} has too many elements"));
        };
        if end > data {
            return Err(format!(
                "truncated: tensor {name} ends at byte {end} of the data, which has {data}"
            ));
        }
        if end.checked_sub(begin) != Some(bytes) {
            return Err(format!(
                "tensor {name} takes bytes {begin} to {end}, but its shape needs {bytes}"
            ));
        }
        parameters = parameters.saturating_add(elements);
        *by_type.entry(kind).or_default() += bytes;
        extents.push((begin, end));
    }
    extents.sort_unstable();
    let mut next = 0;
    for (begin, end) in extents {
        if begin != next {
            return Err(format!(
                "tensors overlap or leave a gap at byte {begin} of the data"
            ));
        }
        next = end;
    }
    if next != data {
        return Err(format!("{} bytes follow the last tensor", data - next));
    }
    Ok((parameters, next, most(by_type)))
}
