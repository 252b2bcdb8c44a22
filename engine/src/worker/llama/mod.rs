//! GGUF models by llama.cpp: loading, tokens and text.
//!
//! - [`batch`]: generations, many at a time. [`sample`]: the next token of one. [`grammar`]: JSON schemas.
//! - [`adapters`]: LoRA for single requests. [`embed`]: vectors.
mod adapters;
mod batch;
mod embed;
mod grammar;
mod sample;
mod shelf;

use std::ffi::{CStr, c_char, c_void};
use std::num::NonZeroU32;
use std::ptr::NonNull;

use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::context::params::LlamaContextParams;
use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::model::params::LlamaModelParams;
use llama_cpp_2::token::LlamaToken;

use super::chat::{self, ChatTemplate};
use crate::error::EngineError;
use crate::inspect::{ModelFile, STEP_TOKENS};
use crate::level;
use crate::protocol::{Isolation, Load, ModelFacts, Prompt};
pub(super) use batch::Batcher;
pub(super) use embed::Embedder;

/// The version of the crate that carries the vendored llama.cpp; the workspace pins it.
const VERSION: &str = "0.1.161";

/// A model with what is needed to go from text to tokens and back.
struct Model {
    /// Lives until the process ends. A context is no reference to it in Rust's sense, so that adapters can be added.
    raw: NonNull<LlamaModel>,
    template: Option<Result<ChatTemplate, String>>,
    bos: String,
    facts: ModelFacts,
}

/// Loads a model for generations.
pub(super) fn load(load: &Load, file: &ModelFile, threads: u16) -> Result<Batcher, EngineError> {
    let (backend, model) = open(load, file, threads)?;
    let sequences = load.sequences.unwrap_or(1);
    let context_tokens = model.facts.context_tokens;
    let tokens = load.cache_for(context_tokens);
    // Of the memory for the cache, a third is for what is kept beside it.
    let cells = if sequences > 1 {
        (tokens - tokens / 3).max(context_tokens)
    } else {
        tokens
    };
    let params = LlamaContextParams::default()
        .with_n_ctx(NonZeroU32::new(cells))
        .with_n_batch(STEP_TOKENS)
        .with_n_ubatch(STEP_TOKENS)
        .with_n_seq_max(sequences.into())
        .with_kv_unified(true)
        .with_n_threads(i32::from(threads))
        .with_n_threads_batch(i32::from(threads));
    let context = model.context(backend, params, load)?;
    Ok(Batcher::new(
        model,
        context,
        adapters::Adapters::new(load),
        sequences,
        (tokens - cells) as usize,
    ))
}

fn unusable(load: &Load, error: &dyn std::fmt::Display) -> EngineError {
    EngineError::bad_model(
        &load.model,
        format!("llama.cpp cannot load it: {error}; the worker's log says more"),
    )
}

fn failed(error: &dyn std::fmt::Display) -> EngineError {
    EngineError::Crashed {
        how: format!("llama.cpp: {error}"),
    }
}

/// Loads the weights and what the file says about text.
fn open(load: &Load, file: &ModelFile, threads: u16) -> Result<(&'static LlamaBackend, Model), EngineError> {
    let engine = format!("llama.cpp {VERSION} {}", level::choose()?);
    forward_warnings();
    let backend = LlamaBackend::init().map_err(|error| unusable(load, &error))?;
    let gpu = cfg!(any(feature = "cuda", feature = "vulkan", feature = "metal"));
    let layers = if gpu { load.gpu_layers.unwrap_or(999) } else { 0 };
    let params = LlamaModelParams::default().with_n_gpu_layers(layers);
    let model =
        LlamaModel::load_from_file(&backend, &load.model, &params).map_err(|error| unusable(load, &error))?;
    // A process holds one model until it ends.
    let backend: &'static LlamaBackend = Box::leak(Box::new(backend));
    let made_for = model.n_ctx_train();
    let context_tokens =
        file.context_for(load.context_tokens)
            .min(if made_for == 0 { u32::MAX } else { made_for });
    let vocab = model.vocab();
    let piece = |token: LlamaToken| {
        if token.0 < 0 {
            String::new()
        } else {
            String::from_utf8_lossy(&vocab.token_to_piece(token, true, None)).into_owned()
        }
    };
    let (bos, eos) = (piece(vocab.bos()), piece(vocab.eos()));
    let template = model
        .chat_template(None)
        .ok()
        .and_then(|template| template.to_string().ok());
    let template =
        template.map(|source| ChatTemplate::new(source, bos.clone(), eos).map_err(|error| error.to_string()));
    let facts = ModelFacts {
        name: file.name.clone(),
        architecture: file.architecture.clone(),
        context_tokens,
        parameters: file.parameters,
        dimensions: None,
        memory_estimate: file.memory_estimate(load.cache_for(context_tokens)),
        engine,
        threads,
        isolation: Isolation::None,
    };
    let model = Model {
        raw: NonNull::from(Box::leak(Box::new(model))),
        template,
        bos,
        facts,
    };
    Ok((backend, model))
}

impl Model {
    fn get(&self) -> &LlamaModel {
        #[expect(unsafe_code, reason = "a leaked box, see `raw`")]
        // SAFETY: it is never freed, and `with_mut` needs this model mutably.
        unsafe {
            self.raw.as_ref()
        }
    }

    fn with_mut<T>(&mut self, change: impl FnOnce(&mut LlamaModel) -> T) -> T {
        #[expect(unsafe_code, reason = "a leaked box, see `raw`")]
        // SAFETY: it is never freed, references from `get` end before this one begins, and nothing runs beside it.
        change(unsafe { self.raw.as_mut() })
    }

    /// A context over this model, which lives as long as the process.
    fn context(
        &self,
        backend: &LlamaBackend,
        params: LlamaContextParams,
        load: &Load,
    ) -> Result<LlamaContext<'static>, EngineError> {
        #[expect(unsafe_code, reason = "a leaked box, see `raw`")]
        // SAFETY: it is never freed. The context keeps a pointer of its own and no reference.
        let model: &'static LlamaModel = unsafe { &*self.raw.as_ptr() };
        model
            .new_context(backend, params)
            .map_err(|error| unusable(load, &error))
    }

    fn is_end(&self, token: LlamaToken) -> bool {
        self.get().vocab().is_eog(token)
    }

    fn piece(&self, token: LlamaToken) -> Vec<u8> {
        self.get().vocab().token_to_piece(token, false, None)
    }

    fn tokens(&self, prompt: &Prompt) -> Result<Vec<LlamaToken>, EngineError> {
        let vocab = self.get().vocab();
        let Some((messages, tools)) = chat::messages(prompt) else {
            let Prompt::Raw { text } = prompt else {
                return Ok(Vec::new());
            };
            return Ok(vocab.tokenize(text.as_bytes(), true, true));
        };
        let template = match &self.template {
            Some(Ok(template)) => template,
            Some(Err(error)) => {
                return Err(EngineError::Unsupported {
                    reason: format!("the model's chat template cannot be read: {error}; send the prompt raw"),
                });
            }
            None => {
                return Err(EngineError::bad_input(
                    "the model has no chat template; send the prompt raw",
                ));
            }
        };
        let text = template.render(&messages, tools)?;
        // Most templates write the beginning-of-text token themselves; it must not come twice.
        let begun = !self.bos.is_empty() && text.starts_with(&self.bos);
        Ok(vocab.tokenize(text.as_bytes(), !begun, true))
    }
}

/// Sends llama.cpp's warnings and errors to standard error, a line each; it is silent otherwise.
fn forward_warnings() {
    #[expect(unsafe_code, reason = "the binding offers all of the log or none of it")]
    // SAFETY: `log_line` stays valid for the life of the process and ignores its user data.
    unsafe {
        llama_cpp_sys_2::llama_log_set(Some(log_line), std::ptr::null_mut());
    }
}

#[expect(unsafe_code, reason = "called by C with a C string")]
unsafe extern "C" fn log_line(level: llama_cpp_sys_2::ggml_log_level, text: *const c_char, _: *mut c_void) {
    if text.is_null()
        || !(level == llama_cpp_sys_2::GGML_LOG_LEVEL_WARN || level == llama_cpp_sys_2::GGML_LOG_LEVEL_ERROR)
    {
        return;
    }
    // SAFETY: not null, and llama.cpp hands over a terminated string that lives until this returns.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    // Both are by design: the cache is made for several contexts, and is shared until it is full.
    if text.contains("possible training context overflow") || text.contains("failed to find a memory slot") {
        return;
    }
    eprintln!("llama.cpp: {}", text.trim_end());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_told_is_the_version_pinned() {
        let table = include_str!("../../../../Cargo.toml");
        assert!(table.contains(&format!("llama-cpp-sys-2 = {{ version = \"={VERSION}\"")));
    }
}
