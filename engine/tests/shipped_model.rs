//! The shipped model in llama.cpp itself: its tokenizer, its template and its greedy answers, language by language.
#![allow(clippy::unwrap_used, reason = "in a test, the panic is the report")]

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};

use karez_engine::train::ChatFormat;
use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::context::params::LlamaContextParams;
use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::model::params::LlamaModelParams;
use llama_cpp_2::model::{LlamaChatMessage, LlamaModel};
use llama_cpp_2::sampling::LlamaSampler;
use tokenizers::Tokenizer;

const CONTEXT: u32 = 512;

#[derive(serde::Deserialize)]
struct Pair {
    lang: String,
    question: String,
    answer: String,
}

/// One test, because llama.cpp's back end exists once per process.
#[test]
fn llama_cpp_reads_splits_and_answers_as_trained() {
    let engine = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut backend = LlamaBackend::init().unwrap();
    backend.void_logs();
    let path = engine.join("models/karez-tiny.gguf");
    let model = LlamaModel::load_from_file(&backend, path, &LlamaModelParams::default()).unwrap();
    let tokenizer = Tokenizer::from_file(engine.join("models/karez-tiny/tokenizer.json")).unwrap();
    let pairs = corpus(engine.join("corpus"));

    for pair in &pairs {
        for text in [ChatFormat::prompt_text(&pair.question), pair.answer.clone()] {
            let theirs: Vec<u32> = tokenizer.encode(text.as_str(), false).unwrap().get_ids().to_vec();
            let ours = model.vocab().tokenize(text.as_bytes(), true, true);
            let ours: Vec<u32> = ours.iter().map(|token| token.0 as u32).collect();
            assert_eq!(ours, theirs, "both tokenizers split {text:?} alike");
        }
        assert_eq!(
            prompt(&model, &pair.question),
            ChatFormat::prompt_text(&pair.question)
        );
    }

    let parameters = LlamaContextParams::default()
        .with_n_ctx(NonZeroU32::new(CONTEXT))
        .with_n_threads(1)
        .with_n_threads_batch(1);
    let mut context = model.new_context(&backend, parameters).unwrap();
    let mut by_language: BTreeMap<&str, Vec<&Pair>> = BTreeMap::new();
    for pair in &pairs {
        by_language.entry(&pair.lang).or_default().push(pair);
    }
    let (mut exact, mut first_wrong) = (0, None);
    for (lang, pairs) in by_language {
        let mut known = 0;
        for (index, pair) in pairs.iter().enumerate() {
            let got = answer(&model, &mut context, &pair.question);
            // A sample in every language must be right to the letter; over all, two in a hundred may slip.
            if index % 5 == 0 {
                assert_eq!(got, pair.answer, "{lang}: {}", pair.question);
            }
            if got == pair.answer {
                known += 1;
            } else {
                first_wrong.get_or_insert(got);
            }
        }
        println!("{lang}: {known} of {} exact", pairs.len());
        exact += known;
    }
    assert!(
        exact * 100 >= pairs.len() * 98,
        "{exact} of {} exact; one that is not: {first_wrong:?}",
        pairs.len()
    );
}

fn corpus(folder: PathBuf) -> Vec<Pair> {
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "jsonl"));
    files.sort();
    let texts: Vec<_> = files
        .iter()
        .map(|file| std::fs::read_to_string(file).unwrap())
        .collect();
    texts
        .iter()
        .flat_map(|text| text.lines())
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// The question under the template that the file itself carries.
fn prompt(model: &LlamaModel, question: &str) -> String {
    let message = LlamaChatMessage::new("user".to_owned(), question.to_owned()).unwrap();
    model
        .apply_chat_template(&model.chat_template(None).unwrap(), &[message], true)
        .unwrap()
}

fn answer(model: &LlamaModel, context: &mut LlamaContext<'_>, question: &str) -> String {
    context.clear_kv_cache();
    let tokens = model
        .vocab()
        .tokenize(prompt(model, question).as_bytes(), true, true);
    let mut batch = LlamaBatch::new(CONTEXT as usize, 1);
    batch.add_sequence(&tokens, 0, false).unwrap();
    let mut sampler = LlamaSampler::greedy();
    let mut answer = Vec::new();
    for position in tokens.len() as i32..CONTEXT as i32 {
        context.decode(&mut batch).unwrap();
        let next = sampler.sample(context, batch.n_tokens() - 1);
        if model.vocab().is_eog(next) {
            break;
        }
        // Token by token, as a stream would: `detokenize` on the whole would tidy spaces before punctuation away.
        answer.extend(model.vocab().token_to_piece(next, false, None));
        batch.clear();
        batch.add(next, position, &[0], true).unwrap();
    }
    String::from_utf8(answer).unwrap()
}
