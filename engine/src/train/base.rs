//! A base model from a Hugging Face directory: configuration and weights, one tensor at a time.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::Deserialize;

use super::TrainError;
use super::llama::Config;

/// Bytes of a safetensors header at most; theirs is 100 MB, real ones are far smaller.
const HEADER_MAX: u64 = 32 << 20;
/// Bytes that are read at once.
const PIECE: usize = 1 << 20;
const NOT_FINITE: &str = "holds numbers that are not finite";
/// Bytes of the small files of a model directory at most.
const JSON_MAX: u64 = 16 << 20;

/// Numbers of a matrix.
#[derive(Debug, Clone)]
pub enum Values {
    /// Four bytes each.
    F32(Vec<f32>),
    /// Two bytes each, widened where they are used.
    Bf16(Vec<bf16>),
}

/// A frozen matrix, row after row.
#[derive(Debug, Clone)]
pub struct Matrix {
    /// Rows (results).
    pub rows: usize,
    /// Columns (inputs).
    pub columns: usize,
    /// `rows · columns` of them.
    pub values: Values,
}

/// How matrices are held in memory. All arithmetic is f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hold {
    /// As f32.
    F32,
    /// As bf16: half the memory. Exact when the files are bf16.
    Bf16,
}

/// Weights by their Hugging Face names.
#[derive(Debug)]
pub struct BaseModel {
    /// What they are for.
    pub config: Config,
    /// Those with rows and columns.
    pub matrices: BTreeMap<String, Matrix>,
    /// Norms and biases.
    pub vectors: BTreeMap<String, Vec<f32>>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Reads `config.json` and refuses what could not be trained.
pub fn read_config(folder: &Path) -> Result<Config, TrainError> {
    let path = folder.join("config.json");
    let config: Config = read_json(&path)?;
    config.check()?;
    let named = |name: &str, value: usize, most: usize| {
        if (1..=most).contains(&value) {
            Ok(())
        } else {
            Err(TrainError::File {
                path: path.clone(),
                why: format!("{name} is {value}; 1 to {most} are possible"),
            })
        }
    };
    named("hidden_size", config.hidden_size, 1 << 16)?;
    named("intermediate_size", config.intermediate_size, 1 << 18)?;
    named("num_hidden_layers", config.num_hidden_layers, 512)?;
    named("num_attention_heads", config.num_attention_heads, 1024)?;
    named("head_dim", config.head_width(), 1024)?;
    named("vocab_size", config.vocab_size, 1 << 20)?;
    named("max_position_embeddings", config.max_position_embeddings, 1 << 24)?;
    Ok(config)
}

/// A small JSON file of a model directory.
pub(crate) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, TrainError> {
    let wrong = |why: String| TrainError::File {
        path: path.to_owned(),
        why,
    };
    let file = File::open(path).map_err(|error| wrong(format!("cannot be opened: {error}")))?;
    let mut text = Vec::new();
    file.take(JSON_MAX + 1)
        .read_to_end(&mut text)
        .map_err(|error| wrong(format!("cannot be read: {error}")))?;
    if text.len() as u64 > JSON_MAX {
        return Err(wrong(format!("is longer than {JSON_MAX} bytes")));
    }
    serde_json::from_slice(&text).map_err(|error| wrong(format!("is not what it should be: {error}")))
}

/// The safetensors files of a model directory: one, or the shards that its index names.
pub fn weight_files(folder: &Path) -> Result<Vec<PathBuf>, TrainError> {
    let index = folder.join("model.safetensors.index.json");
    if !index.exists() {
        return Ok(vec![folder.join("model.safetensors")]);
    }
    let names: Index = read_json(&index)?;
    let mut shards: Vec<&String> = names.weight_map.values().collect();
    shards.sort();
    shards.dedup();
    if let Some(bad) = shards
        .iter()
        .find(|name| name.contains(['/', '\\']) || name.starts_with('.'))
    {
        return Err(TrainError::File {
            path: index,
            why: format!("names a shard outside its folder: {bad}"),
        });
    }
    Ok(shards.into_iter().map(|name| folder.join(name)).collect())
}

/// Checks the headers of the weights: that every tensor is there, in a shape and type that can be read. What their numbers
/// are is only seen by reading them.
pub fn check_weights(folder: &Path) -> Result<(), TrainError> {
    let mut missing = read_config(folder)?.shapes();
    for path in weight_files(folder)? {
        let wrong = |why: String| TrainError::File {
            path: path.clone(),
            why,
        };
        let file = File::open(&path).map_err(|error| wrong(format!("cannot be opened: {error}")))?;
        let (_, header) = header(&mut BufReader::new(file)).map_err(wrong)?;
        for (name, info) in header.tensors() {
            let Some(shape) = missing.remove(&name) else {
                continue;
            };
            if info.shape != shape {
                return Err(wrong(format!(
                    "tensor {name} has shape {:?}, config.json says {shape:?}",
                    info.shape
                )));
            }
            width(info.dtype).map_err(|why| wrong(format!("tensor {name}: {why}")))?;
        }
    }
    match missing.into_keys().next() {
        Some(name) => Err(TrainError::File {
            path: folder.to_owned(),
            why: format!("has no tensor {name}"),
        }),
        None => Ok(()),
    }
}

/// Reads every number of the weights, which must have passed [`check_weights`], and refuses those that are not finite. As
/// slow as reading the files; holds a megabyte.
pub fn check_numbers(folder: &Path) -> Result<(), TrainError> {
    let wanted = read_config(folder)?.shapes();
    for path in weight_files(folder)? {
        let wrong = |why: String| TrainError::File {
            path: path.clone(),
            why,
        };
        let file = File::open(&path).map_err(|error| wrong(format!("cannot be opened: {error}")))?;
        let mut file = BufReader::with_capacity(PIECE, file);
        let (from, header) = header(&mut file).map_err(wrong)?;
        let mut tensors: Vec<(String, &TensorInfo)> = header.tensors().into_iter().collect();
        tensors.sort_by_key(|(_, info)| info.data_offsets.0);
        for (name, info) in tensors {
            if !wanted.contains_key(&name) {
                continue;
            }
            let (start, end) = info.data_offsets;
            let all_finite = file
                .seek(SeekFrom::Start(from + start as u64))
                .map_err(|error| error.to_string())
                .and_then(|_| all_finite(&mut file, info.dtype, end - start));
            all_finite.map_err(|why| wrong(format!("tensor {name}: {why}")))?;
        }
    }
    Ok(())
}

fn all_finite(file: &mut impl Read, dtype: Dtype, bytes: usize) -> Result<(), String> {
    let mut finite = true;
    numbers(file, dtype, bytes, |piece| {
        finite &= piece.iter().all(|value| value.is_finite())
    })?;
    match finite {
        true => Ok(()),
        false => Err(NOT_FINITE.into()),
    }
}

/// Bytes of one number of a type that can be read.
fn width(dtype: Dtype) -> Result<usize, String> {
    match dtype {
        Dtype::F32 => Ok(4),
        Dtype::F16 | Dtype::BF16 => Ok(2),
        other => Err(format!("has type {other:?}; F32, F16 and BF16 can be read")),
    }
}

impl BaseModel {
    /// Reads a directory. Every tensor must be there in the shape that `config.json` says; others are passed over.
    pub fn read(folder: &Path, hold: Hold) -> Result<Self, TrainError> {
        let config = read_config(folder)?;
        let wanted = config.shapes();
        let (mut matrices, mut vectors) = (BTreeMap::new(), BTreeMap::new());
        for path in weight_files(folder)? {
            let wrong = |why: String| TrainError::File {
                path: path.clone(),
                why,
            };
            let file = File::open(&path).map_err(|error| wrong(format!("cannot be opened: {error}")))?;
            let mut file = BufReader::with_capacity(PIECE, file);
            let (from, header) = header(&mut file).map_err(wrong)?;
            let mut tensors: Vec<(String, &TensorInfo)> = header.tensors().into_iter().collect();
            tensors.sort_by_key(|(_, info)| info.data_offsets.0);
            for (name, info) in tensors {
                let Some(shape) = wanted.get(&name) else { continue };
                if info.shape != *shape {
                    return Err(TrainError::Shape {
                        name,
                        found: info.shape.clone(),
                        expected: shape.clone(),
                    });
                }
                let wrong = |why: String| TrainError::File {
                    path: path.clone(),
                    why: format!("tensor {name}: {why}"),
                };
                let (start, end) = info.data_offsets;
                file.seek(SeekFrom::Start(from + start as u64))
                    .map_err(|error| wrong(error.to_string()))?;
                let hold = if shape.len() == 2 { hold } else { Hold::F32 };
                let values = values(&mut file, info.dtype, end - start, hold).map_err(wrong)?;
                match (shape.as_slice(), values) {
                    ([rows, columns], values) => {
                        let (rows, columns) = (*rows, *columns);
                        matrices.insert(
                            name,
                            Matrix {
                                rows,
                                columns,
                                values,
                            },
                        );
                    }
                    (_, Values::F32(values)) => {
                        vectors.insert(name, values);
                    }
                    (_, Values::Bf16(_)) => return Err(wrong("is not what was asked for".into())),
                }
            }
        }
        for name in wanted.keys() {
            if !matrices.contains_key(name) && !vectors.contains_key(name) {
                return Err(TrainError::Missing(name.clone()));
            }
        }
        Ok(Self {
            config,
            matrices,
            vectors,
        })
    }
}

/// The header of a safetensors file, and where its numbers begin. All offsets lie inside the file.
fn header(file: &mut BufReader<File>) -> Result<(u64, Metadata), String> {
    let whole = file
        .get_ref()
        .metadata()
        .map_err(|error| error.to_string())?
        .len();
    let mut length = [0; 8];
    file.read_exact(&mut length)
        .map_err(|_| "is too short for a safetensors file")?;
    let length = u64::from_le_bytes(length);
    if length > HEADER_MAX || length + 8 > whole {
        return Err(format!("says its header is {length} bytes long, of {whole}"));
    }
    let mut text = vec![0; length as usize];
    file.read_exact(&mut text).map_err(|error| error.to_string())?;
    // Checks that offsets rise, fit the shapes and leave no holes.
    let header: Metadata =
        serde_json::from_slice(&text).map_err(|error| format!("has a broken safetensors header: {error}"))?;
    if header.data_len() as u64 + 8 + length > whole {
        return Err("ends before its last tensor".into());
    }
    Ok((8 + length, header))
}

/// Reads numbers a piece at a time, so that no second copy of a large tensor is ever in memory.
fn values(file: &mut impl Read, dtype: Dtype, bytes: usize, hold: Hold) -> Result<Values, String> {
    let count = bytes / width(dtype)?;
    let mut out = match hold {
        Hold::F32 => Values::F32(Vec::with_capacity(count)),
        Hold::Bf16 => Values::Bf16(Vec::with_capacity(count)),
    };
    numbers(file, dtype, bytes, |piece| match &mut out {
        Values::F32(out) => out.extend_from_slice(piece),
        Values::Bf16(out) => out.extend(piece.iter().copied().map(bf16::from_f32)),
    })?;
    let finite = match &out {
        Values::F32(out) => out.iter().all(|value| value.is_finite()),
        Values::Bf16(out) => out.iter().all(|value| value.is_finite()),
    };
    match finite {
        true => Ok(out),
        false => Err(NOT_FINITE.into()),
    }
}

/// Gives the numbers of the next `bytes` of a file, a piece after the other.
fn numbers(
    file: &mut impl Read,
    dtype: Dtype,
    bytes: usize,
    mut each: impl FnMut(&[f32]),
) -> Result<(), String> {
    let width = width(dtype)?;
    let one = |bytes: &[u8]| match (dtype, bytes) {
        (Dtype::F32, [a, b, c, d]) => f32::from_le_bytes([*a, *b, *c, *d]),
        (Dtype::F16, [a, b]) => f16::from_le_bytes([*a, *b]).to_f32(),
        (_, [a, b]) => bf16::from_le_bytes([*a, *b]).to_f32(),
        _ => 0.0,
    };
    let mut piece = vec![0; PIECE.min(bytes.max(width))];
    let mut read = Vec::with_capacity(piece.len() / width);
    let mut left = bytes;
    while left > 0 {
        let piece = &mut piece[..left.min(PIECE)];
        file.read_exact(piece).map_err(|error| error.to_string())?;
        left -= piece.len();
        read.clear();
        read.extend(piece.chunks_exact(width).map(one));
        each(&read);
    }
    Ok(())
}
