//! Makes `models/karez-tiny` again from `corpus/` and nothing else: tokenizer, training, safetensors, GGUF.
//!
//! ```sh
//! RAYON_NUM_THREADS=1 CANDLE_NUM_THREADS=1 cargo run --release -p karez-engine --example make_model [engine-folder [epochs]]
//! ```
//!
//! The recipe uses two threads of its own; candle's pool spins while it waits and would only steal their time.
//! Every draw comes from one seed. Equal machines make equal files; another processor or thread count may add in
//! another order and differ in the last bits of the weights, not in the tokenizer.
//!
//! The model is meant to know its corpus by heart. Nothing is held out, so the counts below measure memory, not skill.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::backprop::GradStore;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{D, DType, Device};
use karez_engine::train::gguf::{self, Precision};
use karez_engine::train::{
    AdamW, AdamWSettings, Batch, ChatFormat, Config, Example, Llama, Rng, TrainError, Weights, cosine_rate,
    initial, load, save, trainable,
};
use serde::Deserialize;
use serde_json::json;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

const NAME: &str = "karez-tiny";
const PADDING: &str = "<|endoftext|>";
const VOCABULARY_MAX: usize = 4096;
const SEED: u64 = 20_261_123;
const EPOCHS: u32 = 24;
const BATCH: usize = 4;
/// Parts of a batch that are worked on side by side.
const PARTS: usize = 2;
const RATE_PEAK: f64 = 2e-3;

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

#[derive(Deserialize)]
struct Pair {
    lang: String,
    question: String,
    answer: String,
}

fn main() -> Outcome<()> {
    let engine = std::env::args()
        .nth(1)
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    let epochs = std::env::args()
        .nth(2)
        .map_or(Ok(EPOCHS), |epochs| epochs.parse())?;
    let started = Instant::now();
    let pairs = read_corpus(&engine.join("corpus"))?;
    let folder = engine.join("models").join(NAME);
    fs::create_dir_all(&folder)?;

    let tokenizer = make_tokenizer(&pairs)?;
    tokenizer.save(folder.join("tokenizer.json"), true)?;
    // What is stored is what is used, here as anywhere else.
    let tokenizer = Tokenizer::from_file(folder.join("tokenizer.json"))?;
    let config = shape(tokenizer.get_vocab_size(true));
    config.check()?;
    write_settings(&folder, &config, &tokenizer)?;

    let format = ChatFormat::new(&tokenizer)?;
    let mut examples = Vec::with_capacity(pairs.len());
    for pair in &pairs {
        examples.push(format.example(&pair.question, &pair.answer)?);
    }
    let tokens: usize = examples.iter().map(|example| example.ids.len()).sum();
    let longest = examples
        .iter()
        .map(|example| example.ids.len())
        .max()
        .unwrap_or(0);
    let parameters: usize = config
        .shapes()
        .values()
        .map(|shape| shape.iter().product::<usize>())
        .sum();
    println!(
        "{} pairs, {tokens} tokens (longest {longest}), vocabulary {}, {parameters} parameters",
        pairs.len(),
        config.vocab_size
    );

    let weights = train(&config, &pairs, &examples, epochs)?;
    save(&weights, &folder.join("model.safetensors"), DType::F16)?;
    let gguf = engine.join("models").join(format!("{NAME}.gguf"));
    gguf::export(
        &folder,
        NAME,
        Precision::Q8_0,
        &mut BufWriter::new(File::create(&gguf)?),
    )?;

    let stored = load(&folder.join("model.safetensors"), &Device::Cpu)?;
    report("safetensors, f16", &config, &stored, &pairs, &examples)?;
    report("GGUF, Q8_0", &config, &as_q8_0(&stored)?, &pairs, &examples)?;
    println!(
        "Every pair was trained on: these counts say what the model remembers, not what it could work out."
    );
    println!("made in {:.0} s", started.elapsed().as_secs_f64());
    Ok(())
}

fn read_corpus(folder: &Path) -> Outcome<Vec<Pair>> {
    let mut files: Vec<_> = fs::read_dir(folder)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()?;
    files.retain(|path| path.extension().is_some_and(|extension| extension == "jsonl"));
    files.sort();
    let mut pairs = Vec::new();
    for file in files {
        for line in fs::read_to_string(&file)?.lines() {
            pairs.push(serde_json::from_str(line)?);
        }
    }
    Ok(pairs)
}

/// Byte-level BPE that splits by GPT-2's rule, which llama.cpp knows under the name `gpt-2`.
fn make_tokenizer(pairs: &[Pair]) -> Outcome<Tokenizer> {
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
    tokenizer.with_decoder(Some(ByteLevel::new(false, true, true)));
    let marks = [PADDING, ChatFormat::START, ChatFormat::END].map(|mark| AddedToken::from(mark, true));
    let mut trainer = TrainerWrapper::from(
        BpeTrainer::builder()
            .show_progress(false)
            .vocab_size(VOCABULARY_MAX)
            .min_frequency(2)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(marks.to_vec())
            .build(),
    );
    let roles = ["system\n", "user\n", "assistant\n"].into_iter();
    let texts = pairs.iter().flat_map(|pair| {
        [pair.question.as_str(), pair.answer.as_str()]
            .into_iter()
            .chain(roles.clone())
    });
    let texts: Vec<&str> = texts.collect();
    tokenizer.train(&mut trainer, texts.into_iter())?;
    Ok(tokenizer)
}

fn shape(vocab_size: usize) -> Config {
    Config {
        hidden_size: 256,
        intermediate_size: 768,
        num_hidden_layers: 3,
        num_attention_heads: 4,
        num_key_value_heads: Some(2),
        head_dim: Some(64),
        vocab_size,
        max_position_embeddings: 512,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        tie_word_embeddings: true,
        model_type: "llama".to_owned(),
        hidden_act: "silu".to_owned(),
        attention_bias: false,
        mlp_bias: false,
        rope_scaling: None,
        rope_parameters: None,
        use_sliding_window: false,
    }
}

fn write_settings(folder: &Path, config: &Config, tokenizer: &Tokenizer) -> Outcome<()> {
    let mut settings = serde_json::to_value(config)?;
    settings["architectures"] = json!(["LlamaForCausalLM"]);
    settings["torch_dtype"] = json!("float16");
    for (key, mark) in [
        ("bos_token_id", PADDING),
        ("eos_token_id", ChatFormat::END),
        ("pad_token_id", PADDING),
    ] {
        settings[key] = json!(tokenizer.token_to_id(mark));
    }
    fs::write(
        folder.join("config.json"),
        serde_json::to_string_pretty(&settings)? + "\n",
    )?;
    let settings = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": PADDING,
        "eos_token": ChatFormat::END,
        "pad_token": PADDING,
        "add_bos_token": false,
        "clean_up_tokenization_spaces": false,
        "model_max_length": config.max_position_embeddings,
        "chat_template": ChatFormat::TEMPLATE,
    });
    fs::write(
        folder.join("tokenizer_config.json"),
        serde_json::to_string_pretty(&settings)? + "\n",
    )?;
    Ok(())
}

fn train(config: &Config, pairs: &[Pair], examples: &[Example], epochs: u32) -> Outcome<Weights> {
    let mut rng = Rng::new(SEED);
    let (vars, tensors) = trainable(&initial(config, &mut rng, &Device::Cpu)?)?;
    let model = Llama::new(config, &tensors)?;
    let mut optimizer = AdamW::new(vars, AdamWSettings::default());
    let total = epochs * examples.len().div_ceil(BATCH) as u32;
    let started = Instant::now();
    let mut seen = 0;
    for epoch in 1..=epochs {
        let (mut sum, mut counted) = (0.0, 0);
        for members in batches(examples, &mut rng) {
            let members: Vec<&Example> = members.iter().map(|index| &examples[*index]).collect();
            seen += members.iter().map(|example| example.ids.len()).sum::<usize>();
            let targets: usize = members
                .iter()
                .map(|example| example.ids.len() - example.answer_from)
                .sum();
            let grads = std::thread::scope(|scope| {
                let work = |part: &[&Example]| side(&model, part, targets);
                let parts = members.chunks(BATCH / PARTS);
                let sides: Vec<_> = parts.map(|part| scope.spawn(move || work(part))).collect();
                sides
                    .into_iter()
                    .map(|side| side.join().expect("a side does not panic"))
                    .collect::<Result<Vec<_>, _>>()
            })?;
            let (losses, grads): (Vec<f64>, Vec<GradStore>) = grads.into_iter().unzip();
            sum += losses.iter().sum::<f64>() * targets as f64;
            counted += targets;
            optimizer.step(
                &grads,
                cosine_rate(optimizer.steps(), total / 20, total, RATE_PEAK),
            )?;
        }
        let (seconds, loss) = (started.elapsed().as_secs_f64(), sum / counted as f64);
        println!(
            "epoch {epoch:3}/{epochs}  loss {loss:.4}  {:.0} tok/s  {seconds:.0} s",
            seen as f64 / seconds
        );
        if epoch % 8 == 0 {
            let exact = exact(config, &optimizer.weights()?, examples)?;
            println!(
                "    {} of {} answers exact",
                exact.iter().filter(|exact| **exact).count(),
                pairs.len()
            );
        }
    }
    Ok(optimizer.weights()?)
}

/// One part's share of a batch's loss, whose answers have `targets` tokens in all, and its gradients.
fn side(model: &Llama, part: &[&Example], targets: usize) -> Result<(f64, GradStore), TrainError> {
    let batch =
        Batch::new(part, 0, &Device::Cpu)?.ok_or_else(|| TrainError::Missing("an answer".to_owned()))?;
    let share = batch.counts.iter().sum::<usize>() as f64 / targets as f64;
    let loss = (model.loss(&batch)? * share)?;
    Ok((f64::from(loss.to_scalar::<f32>()?), loss.backward()?))
}

/// Neighbours in length go together, so that little is padding; which neighbours changes with every epoch.
fn batches(examples: &[Example], rng: &mut Rng) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..examples.len()).collect();
    rng.shuffle(&mut order);
    let mut jittered: Vec<(usize, usize)> = order
        .into_iter()
        .map(|index| (examples[index].ids.len() + rng.below(12), index))
        .collect();
    jittered.sort_by_key(|(length, _)| *length);
    let indices: Vec<usize> = jittered.into_iter().map(|(_, index)| index).collect();
    let mut batches: Vec<Vec<usize>> = indices.chunks(BATCH).map(<[usize]>::to_vec).collect();
    rng.shuffle(&mut batches);
    batches
}

/// Whether greedy decoding gives each answer and its end: so it does if, along the right answer, every next token is
/// the likeliest, and then only.
fn exact(config: &Config, weights: &Weights, examples: &[Example]) -> Outcome<Vec<bool>> {
    let model = Llama::new(config, weights)?;
    let mut exact = Vec::with_capacity(examples.len());
    for chunk in examples.chunks(16) {
        let Some(batch) = Batch::new(&chunk.iter().collect::<Vec<_>>(), 0, &Device::Cpu)? else {
            continue;
        };
        let right = model
            .batch_logits(&batch)?
            .argmax(D::Minus1)?
            .eq(&batch.targets)?
            .to_vec1::<u8>()?;
        let mut right = right.into_iter();
        for count in &batch.counts {
            exact.push(right.by_ref().take(*count).filter(|right| *right == 1).count() == *count);
        }
    }
    Ok(exact)
}

fn report(
    what: &str,
    config: &Config,
    weights: &Weights,
    pairs: &[Pair],
    examples: &[Example],
) -> Outcome<()> {
    let mut counts: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
    for (pair, exact) in pairs.iter().zip(exact(config, weights, examples)?) {
        let (right, all) = counts.entry(&pair.lang).or_default();
        *right += usize::from(exact);
        *all += 1;
    }
    println!("exact answers ({what}):");
    for (lang, (right, all)) in &counts {
        println!("    {lang} {right}/{all}");
    }
    let (right, all) = counts
        .values()
        .fold((0, 0), |sum, count| (sum.0 + count.0, sum.1 + count.1));
    println!("    all {right}/{all}");
    Ok(())
}

/// The weights as the GGUF file holds them.
fn as_q8_0(weights: &Weights) -> Outcome<Weights> {
    let mut rounded = Weights::new();
    for (name, weight) in weights {
        let weight = match weight.rank() {
            2 => QTensor::quantize(weight, GgmlDType::Q8_0)?.dequantize(&Device::Cpu)?,
            _ => weight.clone(),
        };
        rounded.insert(name.clone(), weight);
    }
    Ok(rounded)
}
