//! Vectors from GGUF files: encoders such as BERT, and decoders that were made for it.
//!
//! Texts are pooled as the file says; where it says nothing, over the mean of their tokens. Vectors have length 1.
use std::num::NonZeroU32;

use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::context::params::{LlamaContextParams, LlamaPoolingType};
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::token::LlamaToken;

use super::{Model, failed, open};
use crate::error::EngineError;
use crate::inspect::ModelFile;
use crate::protocol::{Load, ModelFacts, Output, SEQUENCES_MAX, TEXTS_MAX, Work};
use crate::worker::{Desk, Engine};

/// Tokens of one text, and of one batch, at most.
const BATCH_TOKENS: u32 = 2048;

pub(in crate::worker) struct Embedder {
    model: Model,
    context: LlamaContext<'static>,
    batch: LlamaBatch<'static>,
    longest: usize,
}

impl Embedder {
    pub(in crate::worker) fn load(load: &Load, file: &ModelFile, threads: u16) -> Result<Self, EngineError> {
        let longest = load.context_tokens.unwrap_or(BATCH_TOKENS).min(BATCH_TOKENS);
        let load = &Load {
            context_tokens: Some(longest),
            ..load.clone()
        };
        let (backend, mut model) = open(load, file, threads)?;
        let longest = model.facts.context_tokens;
        let key = format!("{}.pooling_type", model.facts.architecture);
        let stated = model.get().meta_val_str(&key).is_ok_and(|value| value != "0");
        let pooling = if stated {
            LlamaPoolingType::Unspecified
        } else {
            LlamaPoolingType::Mean
        };
        // A text that is read both ways must fit one step whole.
        let params = LlamaContextParams::default()
            .with_n_ctx(NonZeroU32::new(longest))
            .with_n_batch(longest)
            .with_n_ubatch(longest)
            .with_n_seq_max(SEQUENCES_MAX.into())
            .with_kv_unified(true)
            .with_embeddings(true)
            .with_pooling_type(pooling)
            .with_n_threads(threads.into())
            .with_n_threads_batch(threads.into());
        let context = model.context(backend, params, load)?;
        model.facts.dimensions = u32::try_from(model.get().n_embd_out()).ok();
        Ok(Self {
            model,
            context,
            batch: LlamaBatch::new(longest as usize, 1),
            longest: longest as usize,
        })
    }

    fn embed(&mut self, texts: &[String], desk: &mut Desk<'_>) -> Result<Output, EngineError> {
        if texts.is_empty() || texts.len() > TEXTS_MAX {
            return Err(EngineError::bad_input(format!(
                "{} texts; 1 to {TEXTS_MAX} are allowed",
                texts.len()
            )));
        }
        let mut truncated = 0;
        let mut all = Vec::with_capacity(texts.len());
        for text in texts {
            desk.check()?;
            let mut tokens = self.model.get().vocab().tokenize(text.as_bytes(), true, false);
            if tokens.is_empty() {
                return Err(EngineError::bad_input("a text is empty"));
            }
            if tokens.len() > self.longest {
                truncated += 1;
                // The last token closes the text for models that want that.
                let last = tokens[tokens.len() - 1];
                tokens.truncate(self.longest - 1);
                tokens.push(last);
            }
            desk.tokens_in += tokens.len() as u64;
            all.push(tokens);
        }
        let mut vectors = Vec::with_capacity(all.len());
        let mut rest = &all[..];
        while !rest.is_empty() {
            desk.check()?;
            let (mut count, mut tokens) = (0, 0);
            while count < rest.len().min(SEQUENCES_MAX.into()) && tokens + rest[count].len() <= self.longest {
                tokens += rest[count].len();
                count += 1;
            }
            let (batch, after) = rest.split_at(count.max(1));
            self.forward(batch, &mut vectors)?;
            rest = after;
            desk.alive();
        }
        Ok(Output::Vectors { vectors, truncated })
    }

    fn forward(&mut self, texts: &[Vec<LlamaToken>], out: &mut Vec<Vec<f32>>) -> Result<(), EngineError> {
        self.batch.clear();
        self.context.clear_kv_cache();
        for (sequence, tokens) in (0..).zip(texts) {
            for (position, token) in (0..).zip(tokens) {
                self.batch
                    .add(*token, position, &[sequence], true)
                    .map_err(|error| failed(&error))?;
            }
        }
        self.context
            .decode(&mut self.batch)
            .map_err(|error| failed(&error))?;
        for (sequence, _) in (0..).zip(texts) {
            let vector = self
                .context
                .embeddings_seq_ith(sequence)
                .map_err(|error| failed(&error))?;
            let length = vector.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
            if !length.is_finite() || length == 0.0 {
                return Err(failed(&"the model computed a vector without a direction"));
            }
            out.push(vector.iter().map(|x| (f64::from(*x) / length) as f32).collect());
        }
        Ok(())
    }
}

impl Engine for Embedder {
    fn facts(&self) -> ModelFacts {
        self.model.facts.clone()
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
