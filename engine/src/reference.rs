//! A model file made of random numbers, in the shape of a common model of 1.1 billion: to measure speed with, where no
//! real weights are at hand. What it writes means nothing; what it costs is what the real one would.
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

/// The shape of a Llama.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Length of the inner vectors; a multiple of 32.
    pub hidden: u64,
    /// Width of the feed-forward layers; a multiple of 32.
    pub inner: u64,
    /// Layers.
    pub layers: u64,
    /// Heads of attention.
    pub heads: u64,
    /// Heads whose keys and values are kept.
    pub kept_heads: u64,
    /// Tokens; at least 259.
    pub vocabulary: u64,
    /// Tokens of context.
    pub context: u32,
}

/// 1.1 billion numbers, about 620 MB in Q4_0.
pub const ONE_BILLION: Shape = Shape {
    hidden: 2048,
    inner: 5632,
    layers: 22,
    heads: 32,
    kept_heads: 4,
    vocabulary: 32_000,
    context: 2048,
};

/// Writes a GGUF file of random Q4_0 weights to `path`. Its tokens are single bytes, and further ones that no text
/// has. The same shape gives the same file.
pub fn write(path: &Path, shape: &Shape) -> io::Result<()> {
    let mut out = BufWriter::with_capacity(1 << 20, File::create(path)?);
    let tensors = tensors(shape);
    let header = header(shape);
    out.write_all(b"GGUF")?;
    out.write_all(&3u32.to_le_bytes())?;
    out.write_all(&(tensors.len() as u64).to_le_bytes())?;
    out.write_all(&header.count.to_le_bytes())?;
    let mut infos = Vec::new();
    let mut offset = 0u64;
    for tensor in &tensors {
        text(&mut infos, &tensor.name);
        infos.extend((tensor.shape.len() as u32).to_le_bytes());
        tensor
            .shape
            .iter()
            .for_each(|size| infos.extend(size.to_le_bytes()));
        infos.extend((if tensor.quantised() { 2u32 } else { 0 }).to_le_bytes());
        infos.extend(offset.to_le_bytes());
        offset += tensor.bytes().next_multiple_of(ALIGNMENT);
    }
    out.write_all(&header.bytes)?;
    out.write_all(&infos)?;
    let written = 24 + (header.bytes.len() + infos.len()) as u64;
    pad(&mut out, written)?;
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for tensor in &tensors {
        if tensor.quantised() {
            for _ in 0..tensor.numbers() / 32 {
                // The scale 2^-8 as a 16-bit float, which keeps the sums of 2048 products near 1, and 32 numbers of 4 bits.
                out.write_all(&[0x00, 0x1c])?;
                out.write_all(&random.bits().to_le_bytes())?;
                out.write_all(&random.bits().to_le_bytes())?;
            }
        } else {
            for _ in 0..tensor.numbers() {
                out.write_all(&1f32.to_le_bytes())?;
            }
        }
        pad(&mut out, tensor.bytes())?;
    }
    out.flush()
}

const ALIGNMENT: u64 = 32;

fn pad(out: &mut impl Write, written: u64) -> io::Result<()> {
    let missing = written.next_multiple_of(ALIGNMENT) - written;
    out.write_all(&[0; ALIGNMENT as usize][..missing as usize])
}

struct Tensor {
    name: String,
    shape: Vec<u64>,
}

impl Tensor {
    fn numbers(&self) -> u64 {
        self.shape.iter().product()
    }
    fn quantised(&self) -> bool {
        self.shape.len() > 1
    }
    fn bytes(&self) -> u64 {
        if self.quantised() {
            self.numbers() / 32 * 18
        } else {
            self.numbers() * 4
        }
    }
}

fn tensors(shape: &Shape) -> Vec<Tensor> {
    let Shape { hidden, inner, .. } = *shape;
    let kv = hidden / shape.heads * shape.kept_heads;
    let tensor = |name: String, shape: &[u64]| Tensor {
        name,
        shape: shape.to_vec(),
    };
    let mut all = vec![
        tensor("token_embd.weight".into(), &[hidden, shape.vocabulary]),
        tensor("output_norm.weight".into(), &[hidden]),
        tensor("output.weight".into(), &[hidden, shape.vocabulary]),
    ];
    for layer in 0..shape.layers {
        for (name, shape) in [
            ("attn_norm", &[hidden][..]),
            ("attn_q", &[hidden, hidden]),
            ("attn_k", &[hidden, kv]),
            ("attn_v", &[hidden, kv]),
            ("attn_output", &[hidden, hidden]),
            ("ffn_norm", &[hidden]),
            ("ffn_gate", &[hidden, inner]),
            ("ffn_up", &[hidden, inner]),
            ("ffn_down", &[inner, hidden]),
        ] {
            all.push(tensor(format!("blk.{layer}.{name}.weight"), shape));
        }
    }
    all
}

#[derive(Default)]
struct Header {
    bytes: Vec<u8>,
    count: u64,
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

impl Header {
    fn put(&mut self, key: &str, kind: u32, value: &[u8]) {
        self.count += 1;
        text(&mut self.bytes, key);
        self.bytes.extend(kind.to_le_bytes());
        self.bytes.extend(value);
    }
    fn number(&mut self, key: &str, value: u32) {
        self.put(key, 4, &value.to_le_bytes());
    }
    fn text(&mut self, key: &str, value: &str) {
        let mut bytes = Vec::new();
        text(&mut bytes, value);
        self.put(key, 8, &bytes);
    }
    fn texts(&mut self, key: &str, values: &[String]) {
        let mut bytes = 8u32.to_le_bytes().to_vec();
        bytes.extend((values.len() as u64).to_le_bytes());
        values.iter().for_each(|value| text(&mut bytes, value));
        self.put(key, 9, &bytes);
    }
}

fn header(shape: &Shape) -> Header {
    // GPT-2's way to write bytes as printable characters.
    let printable = |byte: u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut spare = 256;
    let bytes = (0..256u32).map(|byte| {
        let point = if printable(byte) { byte } else { spare };
        spare += u32::from(!printable(byte));
        char::from_u32(point).map(String::from).unwrap_or_default()
    });
    let mut tokens: Vec<String> = bytes.collect();
    tokens.extend(["ab".into(), "<s>".into(), "</s>".into()]);
    tokens.extend((259..shape.vocabulary).map(|n| format!("<unused{n}>")));
    let mut types = 5u32.to_le_bytes().to_vec();
    types.extend(shape.vocabulary.to_le_bytes());
    for token in 0..shape.vocabulary {
        let control = token == 257 || token == 258;
        types.extend((if control { 3i32 } else { 1 }).to_le_bytes());
    }
    let mut header = Header::default();
    header.text("general.architecture", "llama");
    header.text("general.name", "random numbers");
    header.number("llama.context_length", shape.context);
    header.number("llama.embedding_length", shape.hidden as u32);
    header.number("llama.block_count", shape.layers as u32);
    header.number("llama.feed_forward_length", shape.inner as u32);
    header.number("llama.attention.head_count", shape.heads as u32);
    header.number("llama.attention.head_count_kv", shape.kept_heads as u32);
    header.put(
        "llama.attention.layer_norm_rms_epsilon",
        6,
        &1e-5f32.to_le_bytes(),
    );
    header.number("llama.rope.dimension_count", (shape.hidden / shape.heads) as u32);
    header.number("llama.vocab_size", shape.vocabulary as u32);
    header.text("tokenizer.ggml.model", "gpt2");
    header.text("tokenizer.ggml.pre", "gpt-2");
    header.texts("tokenizer.ggml.tokens", &tokens);
    header.put("tokenizer.ggml.token_type", 9, &types);
    header.texts("tokenizer.ggml.merges", &["a b".to_owned()]);
    header.number("tokenizer.ggml.bos_token_id", 257);
    header.number("tokenizer.ggml.eos_token_id", 258);
    header.put("tokenizer.ggml.add_bos_token", 7, &[0]);
    header
}

/// Marsaglia's xorshift.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_one_is_a_model() {
        let shape = Shape {
            hidden: 64,
            inner: 128,
            layers: 2,
            heads: 4,
            kept_heads: 2,
            vocabulary: 300,
            context: 128,
        };
        let file = tempfile::NamedTempFile::new().unwrap();
        write(file.path(), &shape).unwrap();
        let model = crate::inspect::inspect(file.path()).unwrap();
        assert_eq!((model.architecture.as_str(), model.vocabulary), ("llama", 300));
        assert_eq!(model.weight_type, "Q4_0");
    }
}
