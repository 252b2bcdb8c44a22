//! What was trained and what llama.cpp serves are one model, for every family that can be trained.
#![allow(clippy::unwrap_used, reason = "in a test, the panic is the report")]

mod common;

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use common::{raw, work, worker};
use karez_engine::protocol::{Adapter as Over, Generate, Load, LoadKind, Output, TokenLogprob};
use karez_engine::train::data::{Packed, Reader};
use karez_engine::train::results::Finished;
use karez_engine::train::{
    Adapter, BaseModel, Checkpoint, Config, Rng, Settings, checkpoint, gguf, initial, save,
};
use karez_engine::train::{base::Hold, fused::Fused};
use serde_json::{Value, json};
use tokenizers::Trainer;
use tokenizers::models::bpe::{BPE, BpeTrainer};

/// Logarithms of probabilities that llama.cpp, which multiplies halves, gives a token may be this far from ours.
const APART: f32 = 0.03;
/// Tokens that are compared.
const LIKELIEST: usize = 20;

/// A small model of a family with the shipped tokenizer. Its numbers are halves, so that both sides compute with the same
/// ones, and its vocabulary is wider than the tokenizer's, as real ones are.
fn model(folder: &Path, family: &str, more: Value) -> Config {
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/karez-tiny");
    fs::copy(shipped.join("tokenizer.json"), folder.join("tokenizer.json")).unwrap();
    // The chat template in a file of its own, where newer models have it.
    let text = fs::read_to_string(shipped.join("tokenizer_config.json")).unwrap();
    let mut tokenizer: Value = serde_json::from_str(&text).unwrap();
    let template = tokenizer
        .as_object_mut()
        .unwrap()
        .remove("chat_template")
        .unwrap();
    fs::write(folder.join("tokenizer_config.json"), tokenizer.to_string()).unwrap();
    fs::write(folder.join("chat_template.jinja"), template.as_str().unwrap()).unwrap();
    let mut config = json!({
        "model_type": family, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 2944,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "tie_word_embeddings": true,
    });
    for (name, value) in more.as_object().unwrap() {
        config[name] = value.clone();
    }
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let config: Config = serde_json::from_value(config).unwrap();
    let mut rng = Rng::new(11);
    let mut weights = initial(&config, &mut rng, &Device::Cpu).unwrap();
    for (name, weight) in &mut weights {
        if name.ends_with("norm.weight") {
            let values: Vec<f32> = (0..weight.elem_count())
                .map(|_| 1.0 + 0.3 * rng.normal() as f32)
                .collect();
            *weight = Tensor::from_vec(values, weight.shape(), &Device::Cpu).unwrap();
        }
    }
    save(&weights, &folder.join("model.safetensors"), DType::F16).unwrap();
    config
}

/// A tokenizer like those of SentencePiece over the shipped corpus, as Hugging Face writes them.
fn pieces(folder: &Path) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    let corpus =
        ["sw", "en"].map(|language| fs::read_to_string(corpus.join(format!("{language}.jsonl"))).unwrap());
    let mut trainer = BpeTrainer::builder().vocab_size(700).show_progress(false).build();
    let words = corpus.concat().replace(' ', "\n\u{2581}");
    let feed = |word: &str| Ok(vec![word.to_owned()]);
    trainer.feed(words.lines(), feed).unwrap();
    let mut bpe = BPE::default();
    trainer.train(&mut bpe).unwrap();
    let bpe = serde_json::to_value(&bpe).unwrap();

    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
    tokens.extend((0..=u8::MAX).map(|byte| format!("<0x{byte:02X}>")));
    let trained: HashMap<String, u32> = serde_json::from_value(bpe["vocab"].clone()).unwrap();
    let mut in_order: Vec<(u32, String)> = trained.iter().map(|(token, id)| (*id, token.clone())).collect();
    in_order.sort();
    tokens.extend(in_order.iter().map(|(_, token)| token.clone()));
    // Every pair that makes up a token, in the order of the tokens.
    let mut merges = Vec::new();
    for (_, token) in &in_order {
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if trained.contains_key(left) && trained.contains_key(right) {
                merges.push(json!([left, right]));
            }
        }
    }
    assert!(merges.len() > 500, "{}", merges.len());
    let vocab: HashMap<&String, usize> = tokens.iter().zip(0..).collect();
    let special = |id: u32| {
        json!({"id": id, "content": tokens[id as usize], "special": true, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false})
    };
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "pre_tokenizer": null, "post_processor": null,
        "added_tokens": [special(0), special(1), special(2)],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u{2581}"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"}]},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocab, "merges": merges},
    });
    fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let path = folder.join("tokenizer_config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["bos_token"] = "<s>".into();
    config["eos_token"] = "</s>".into();
    config["unk_token"] = "<unk>".into();
    config["pad_token"] = Value::Null;
    fs::write(path, config.to_string()).unwrap();
}

/// Logarithms of the probabilities of the likeliest tokens after `text`, and the likeliest one's text.
fn ours(
    model: &mut Fused,
    adapter: &Adapter,
    reader: &Reader,
    vocabulary: usize,
    text: &str,
) -> (Vec<f32>, String) {
    let ids = reader.tokenizer().encode(text, false).unwrap().get_ids().to_vec();
    let batch = Packed {
        lengths: vec![ids.len()],
        ids,
        targets: Vec::new(),
    };
    let logits = model.logits(adapter, &batch).unwrap();
    let last = &logits[logits.len() - vocabulary..];
    let top = last.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let whole = last
        .iter()
        .map(|logit| f64::from(logit - top).exp())
        .sum::<f64>()
        .ln() as f32;
    let mut order: Vec<usize> = (0..vocabulary).collect();
    order.sort_by(|a, b| last[*b].total_cmp(&last[*a]));
    let chances = order[..LIKELIEST].iter().map(|id| last[*id] - top - whole);
    let likeliest = reader.tokenizer().decode(&[order[0] as u32], false).unwrap();
    (chances.collect(), likeliest)
}

/// The same by llama.cpp.
async fn theirs(file: &Path, adapter: Option<&Path>, texts: &[&str]) -> Vec<TokenLogprob> {
    let worker = worker().await;
    let load = Load {
        threads: Some(1),
        adapters: adapter.and_then(Path::parent).map(Path::to_owned),
        ..Load::new(LoadKind::Generate, file)
    };
    worker.load(load, None).await.unwrap();
    let mut said = Vec::new();
    for text in texts {
        let request = Generate {
            top_logprobs: Some(LIKELIEST as u8),
            adapter: adapter.map(|path| Over {
                file: path.file_name().unwrap().to_str().unwrap().into(),
                scale: 1.0,
            }),
            ..raw(text, 1)
        };
        let run = worker.run(work(request)).unwrap();
        let (Output::Text { logprobs, .. }, _) = run.finish().await.unwrap() else {
            panic!("no text");
        };
        said.push(logprobs[0].clone());
    }
    said
}

fn apart(ours: &(Vec<f32>, String), theirs: &TokenLogprob) -> f32 {
    let pairs = ours.0.iter().zip(&theirs.top_logprobs);
    pairs
        .map(|(ours, theirs)| (ours - theirs.logprob).abs())
        .fold(0.0, f32::max)
}

#[tokio::test(flavor = "multi_thread")]
async fn llama_cpp_says_what_was_learnt_in_every_family() {
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64});
    for (name, family, more) in [
        ("llama", "llama", json!({"tie_word_embeddings": false})),
        (
            "llama 3",
            "llama",
            json!({"rope_scaling": llama3, "rope_theta": 500.0}),
        ),
        (
            "llama, linear",
            "llama",
            json!({"rope_scaling": {"type": "linear", "factor": 4.0}}),
        ),
        ("llama, SentencePiece", "llama", json!({})),
        ("qwen2", "qwen2", json!({"num_key_value_heads": 1})),
        ("qwen3", "qwen3", json!({"head_dim": 32})),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let config = model(folder.path(), family, more);
        if name.ends_with("SentencePiece") {
            pieces(folder.path());
        }
        let settings = Settings {
            lora_r: 3,
            lora_alpha: 6.0,
            ..Settings::default()
        };
        let mut adapter = Adapter::new(&config, &settings.modules(), 3, 6.0, 1).unwrap();
        let silent = adapter.clone();
        let mut rng = Rng::new(2);
        let woken = adapter.values.iter_mut();
        woken.for_each(|value| *value += 0.1 * rng.normal() as f32);
        let zeros = vec![0.0; adapter.values.len()];
        let stored = Checkpoint {
            state: checkpoint::State {
                settings: settings.canonical(),
                ..checkpoint::State::default()
            },
            values: adapter.values.clone(),
            mean: zeros.clone(),
            square: zeros,
            losses: Vec::new(),
        };
        let finished = Finished::read(folder.path(), &stored.encode(&adapter).unwrap()).unwrap();
        let out = tempfile::tempdir().unwrap();
        let remarks = finished
            .write_all(out.path(), folder.path(), "base", "drill")
            .unwrap();
        assert_eq!(remarks, Vec::<String>::new(), "{name}");
        let base = out.path().join("base.gguf");
        let mut file = BufWriter::new(File::create(&base).unwrap());
        gguf::export_base(folder.path(), &mut file).unwrap();
        file.flush().unwrap();

        // The last is long enough for positions that are stretched.
        let long = "maji ni uhai na mvua ".repeat(18);
        let texts = ["Je, mvua", "water flows under the", "Čaj  ☔ na\nmaji", &long];
        let reader = Reader::open(folder.path()).unwrap();
        let mut model = Fused::new(
            BaseModel::read(folder.path(), Hold::F32).unwrap(),
            &adapter,
            1,
            false,
        )
        .unwrap();
        let merged = theirs(&out.path().join("model.gguf"), None, &texts).await;
        let over = theirs(&base, Some(&out.path().join("adapter.gguf")), &texts).await;
        let plain = theirs(&base, None, &texts).await;
        for (at, text) in texts.iter().enumerate() {
            let vocabulary = config.vocab_size;
            let learnt = ours(&mut model, &adapter, &reader, vocabulary, text);
            let before = ours(&mut model, &silent, &reader, vocabulary, text);
            for (what, ours, theirs) in [
                ("merged", &learnt, &merged[at]),
                ("adapter", &learnt, &over[at]),
                ("base", &before, &plain[at]),
            ] {
                let apart = apart(ours, theirs);
                assert!(apart < APART, "{name}, {what}, text {at}: {apart} apart");
                // Which is first may change where two are as likely.
                if ours.0[0] - ours.0[1] > 2.0 * APART {
                    assert_eq!(ours.1, theirs.token, "{name}, {what}, text {at}");
                }
            }
            let moved = apart(&learnt, &plain[at]);
            assert!(
                moved > 3.0 * APART,
                "{name}, text {at}: the adapter changes only {moved}"
            );
        }
    }
}
