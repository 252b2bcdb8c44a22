//! Tiny models with random weights, written from scratch: enough to run every engine, too small to say anything.
#![allow(dead_code, unreachable_pub, reason = "each test program uses its own part")]

use std::path::{Path, PathBuf};

use karez_engine::protocol::{Generate, Load, LoadKind, Prompt, Work};
use karez_engine::{EngineError, SpawnOptions, Worker};

/// Repeatable numbers between -1 and 1.
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn number(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn below(&mut self, limit: usize) -> usize {
        (self.bits() % limit as u64) as usize
    }
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

struct Header {
    bytes: Vec<u8>,
    count: u64,
}

impl Header {
    fn key(&mut self, key: &str, kind: u32) {
        self.count += 1;
        text(&mut self.bytes, key);
        self.bytes.extend(kind.to_le_bytes());
    }

    fn u32(&mut self, key: &str, value: u32) {
        self.key(key, 4);
        self.bytes.extend(value.to_le_bytes());
    }

    fn f32(&mut self, key: &str, value: f32) {
        self.key(key, 6);
        self.bytes.extend(value.to_le_bytes());
    }

    fn bool(&mut self, key: &str, value: bool) {
        self.key(key, 7);
        self.bytes.push(value.into());
    }

    fn text(&mut self, key: &str, value: &str) {
        self.key(key, 8);
        text(&mut self.bytes, value);
    }

    fn texts(&mut self, key: &str, values: &[String]) {
        self.key(key, 9);
        self.bytes.extend(8u32.to_le_bytes());
        self.bytes.extend((values.len() as u64).to_le_bytes());
        values.iter().for_each(|value| text(&mut self.bytes, value));
    }

    fn i32s(&mut self, key: &str, values: &[i32]) {
        self.key(key, 9);
        self.bytes.extend(5u32.to_le_bytes());
        self.bytes.extend((values.len() as u64).to_le_bytes());
        values
            .iter()
            .for_each(|value| self.bytes.extend(value.to_le_bytes()));
    }
}

pub const CONTEXT: u32 = 1024;
const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}\
                      {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// A Llama of two layers whose tokens are single bytes. It never ends by itself when sampled greedily.
pub fn gguf() -> Vec<u8> {
    let (hidden, heads, kept, inner, layers) = (64u64, 4u64, 2u64, 128u64, 2);
    // GPT-2's way to write bytes as printable characters.
    let printable = |byte: u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut spare = 256;
    let mut tokens: Vec<String> = (0..256u32)
        .map(|byte| {
            let point = if printable(byte) { byte } else { spare };
            spare += u32::from(!printable(byte));
            char::from_u32(point).unwrap().to_string()
        })
        .collect();
    tokens.extend(["ab", "<|im_start|>", "<|im_end|>"].map(String::from));
    let mut types = vec![1; 257];
    types.extend([3, 3]);
    let vocabulary = tokens.len() as u64;

    let mut header = Header {
        bytes: Vec::new(),
        count: 0,
    };
    header.text("general.architecture", "llama");
    header.text("general.name", "Tiny Test");
    header.u32("llama.context_length", CONTEXT);
    header.u32("llama.embedding_length", hidden as u32);
    header.u32("llama.block_count", layers);
    header.u32("llama.feed_forward_length", inner as u32);
    header.u32("llama.attention.head_count", heads as u32);
    header.u32("llama.attention.head_count_kv", kept as u32);
    header.f32("llama.attention.layer_norm_rms_epsilon", 1e-5);
    header.u32("llama.rope.dimension_count", (hidden / heads) as u32);
    header.u32("llama.vocab_size", vocabulary as u32);
    header.text("tokenizer.ggml.model", "gpt2");
    header.text("tokenizer.ggml.pre", "gpt-2");
    header.texts("tokenizer.ggml.tokens", &tokens);
    header.i32s("tokenizer.ggml.token_type", &types);
    header.texts("tokenizer.ggml.merges", &["a b".to_owned()]);
    header.u32("tokenizer.ggml.bos_token_id", 257);
    header.u32("tokenizer.ggml.eos_token_id", 258);
    header.bool("tokenizer.ggml.add_bos_token", false);
    header.text("tokenizer.chat_template", CHATML);

    let kv = hidden / heads * kept;
    let mut shapes = vec![
        ("token_embd.weight".to_owned(), vec![hidden, vocabulary]),
        ("output_norm.weight".to_owned(), vec![hidden]),
        ("output.weight".to_owned(), vec![hidden, vocabulary]),
    ];
    for layer in 0..layers {
        for (name, shape) in [
            ("attn_norm", vec![hidden]),
            ("attn_q", vec![hidden, hidden]),
            ("attn_k", vec![hidden, kv]),
            ("attn_v", vec![hidden, kv]),
            ("attn_output", vec![hidden, hidden]),
            ("ffn_norm", vec![hidden]),
            ("ffn_gate", vec![hidden, inner]),
            ("ffn_up", vec![hidden, inner]),
            ("ffn_down", vec![inner, hidden]),
        ] {
            shapes.push((format!("blk.{layer}.{name}.weight"), shape));
        }
    }

    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut infos = Vec::new();
    let mut data: Vec<u8> = Vec::new();
    for (name, shape) in &shapes {
        text(&mut infos, name);
        infos.extend((shape.len() as u32).to_le_bytes());
        shape.iter().for_each(|size| infos.extend(size.to_le_bytes()));
        infos.extend(0u32.to_le_bytes());
        infos.extend((data.len() as u64).to_le_bytes());
        let count = shape.iter().product::<u64>();
        for index in 0..count {
            let ends = name == "output.weight" && index / hidden >= 257;
            let value = if shape.len() == 1 {
                1.0
            } else {
                random.number() * 0.5
            };
            data.extend((if ends { 0.0 } else { value }).to_le_bytes());
        }
        data.resize(data.len().next_multiple_of(32), 0);
    }
    let mut file = b"GGUF".to_vec();
    file.extend(3u32.to_le_bytes());
    file.extend((shapes.len() as u64).to_le_bytes());
    file.extend(header.count.to_le_bytes());
    file.extend(header.bytes);
    file.extend(infos);
    file.resize(file.len().next_multiple_of(32), 0);
    file.extend(data);
    file
}

pub fn gguf_file(directory: &Path) -> PathBuf {
    let path = directory.join("tiny.gguf");
    std::fs::write(&path, gguf()).unwrap();
    path
}

/// A LoRA adapter in GGUF over the query of each layer of [`gguf`]; `hidden` other than 64 does not fit.
pub fn lora(architecture: &str, base: Option<&str>, hidden: u64) -> Vec<u8> {
    let rank = 4;
    let mut header = Header {
        bytes: Vec::new(),
        count: 0,
    };
    header.text("general.type", "adapter");
    header.text("general.architecture", architecture);
    header.text("adapter.type", "lora");
    header.f32("adapter.lora.alpha", rank as f32);
    if let Some(base) = base {
        header.text("karez.base.blake3", base);
    }
    let mut random = Random(77);
    let (mut infos, mut data) = (Vec::new(), Vec::<u8>::new());
    let mut tensors = 0u64;
    for layer in 0..2 {
        for (end, shape) in [("a", [hidden, rank]), ("b", [rank, hidden])] {
            text(&mut infos, &format!("blk.{layer}.attn_q.weight.lora_{end}"));
            infos.extend(2u32.to_le_bytes());
            shape.iter().for_each(|size| infos.extend(size.to_le_bytes()));
            infos.extend(0u32.to_le_bytes());
            infos.extend((data.len() as u64).to_le_bytes());
            for _ in 0..shape[0] * shape[1] {
                data.extend((random.number() * 2.0).to_le_bytes());
            }
            data.resize(data.len().next_multiple_of(32), 0);
            tensors += 1;
        }
    }
    let mut file = b"GGUF".to_vec();
    file.extend(3u32.to_le_bytes());
    file.extend(tensors.to_le_bytes());
    file.extend(header.count.to_le_bytes());
    file.extend(header.bytes);
    file.extend(infos);
    file.resize(file.len().next_multiple_of(32), 0);
    file.extend(data);
    file
}

const WORDS: [&str; 12] = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "water", "flows", "under", "ground", "stars", "shine", "at", "night",
];

/// A BERT of one layer that knows twelve words.
pub fn bert_directory(directory: &Path) -> PathBuf {
    let path = directory.join("tiny-bert");
    std::fs::create_dir_all(&path).unwrap();
    let (hidden, inner, positions) = (32u64, 64u64, 16u64);
    let config = serde_json::json!({
        "model_type": "bert", "vocab_size": WORDS.len(), "hidden_size": hidden, "num_hidden_layers": 1,
        "num_attention_heads": 4, "intermediate_size": inner, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
        "max_position_embeddings": positions, "type_vocab_size": 2, "initializer_range": 0.02,
        "layer_norm_eps": 1e-12, "pad_token_id": 0,
    });
    std::fs::write(path.join("config.json"), config.to_string()).unwrap();
    let vocabulary: serde_json::Map<_, _> = WORDS
        .iter()
        .enumerate()
        .map(|(id, word)| (word.to_string(), id.into()))
        .collect();
    let special = |id: usize| {
        serde_json::json!({"id": id, "content": WORDS[id], "single_word": false, "lstrip": false, "rstrip": false,
                           "normalized": false, "special": true})
    };
    // The padding and truncation are there to be overridden.
    let tokenizer = serde_json::json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 12}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
                    "pad_type_id": 0, "pad_token": "[PAD]"},
        "added_tokens": [special(0), special(1), special(2), special(3)],
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                       "strip_accents": null, "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": vocabulary},
    });
    std::fs::write(path.join("tokenizer.json"), tokenizer.to_string()).unwrap();

    let mut shapes = vec![
        (
            "embeddings.word_embeddings.weight".to_owned(),
            vec![WORDS.len() as u64, hidden],
        ),
        (
            "embeddings.position_embeddings.weight".to_owned(),
            vec![positions, hidden],
        ),
        (
            "embeddings.token_type_embeddings.weight".to_owned(),
            vec![2, hidden],
        ),
        ("embeddings.LayerNorm.weight".to_owned(), vec![hidden]),
        ("embeddings.LayerNorm.bias".to_owned(), vec![hidden]),
    ];
    for (name, out, into) in [
        ("attention.self.query", hidden, hidden),
        ("attention.self.key", hidden, hidden),
        ("attention.self.value", hidden, hidden),
        ("attention.output.dense", hidden, hidden),
        ("intermediate.dense", inner, hidden),
        ("output.dense", hidden, inner),
    ] {
        shapes.push((format!("encoder.layer.0.{name}.weight"), vec![out, into]));
        shapes.push((format!("encoder.layer.0.{name}.bias"), vec![out]));
    }
    for name in ["attention.output", "output"] {
        shapes.push((format!("encoder.layer.0.{name}.LayerNorm.weight"), vec![hidden]));
        shapes.push((format!("encoder.layer.0.{name}.LayerNorm.bias"), vec![hidden]));
    }
    let mut random = Random(7);
    let mut header = serde_json::Map::new();
    let mut data: Vec<u8> = Vec::new();
    for (name, shape) in shapes {
        let begin = data.len();
        for _ in 0..shape.iter().product::<u64>() {
            let value = if name.ends_with("LayerNorm.weight") {
                1.0
            } else {
                random.number() * 0.3
            };
            data.extend(value.to_le_bytes());
        }
        let tensor = serde_json::json!({"dtype": "F32", "shape": shape, "data_offsets": [begin, data.len()]});
        header.insert(name, tensor);
    }
    let header = serde_json::Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(data);
    std::fs::write(path.join("model.safetensors"), file).unwrap();
    path
}

pub fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_karez-worker"))
}

pub async fn worker() -> Worker {
    Worker::spawn(program(), &[], SpawnOptions::default())
        .await
        .unwrap()
}

pub async fn loaded(kind: LoadKind, model: &Path) -> Worker {
    let worker = worker().await;
    worker
        .load(
            Load {
                // On a busy machine, several threads would mostly wait for one another.
                threads: Some(1),
                ..Load::new(kind, model)
            },
            None,
        )
        .await
        .unwrap();
    worker
}

pub async fn load_error(load: Load) -> EngineError {
    worker().await.load(load, None).await.unwrap_err()
}

pub fn raw(text: &str, max_tokens: u32) -> Generate {
    Generate::greedy(Prompt::Raw { text: text.into() }, max_tokens)
}

pub fn work(generate: Generate) -> Work {
    Work::Generate(generate)
}
