//! Text generation from GGUF files by llama.cpp.
//!
//! A prompt is computed in steps of [`STEP_TOKENS`] from its beginning. What a later prompt shares with the one
//! before is reused in whole steps only, so each step is always computed in the same company: an answer never
//! depends on what was asked before it.
use std::ffi::{CStr, c_char, c_void};
use std::num::NonZeroU32;

use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::context::params::LlamaContextParams;
use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::model::params::LlamaModelParams;
use llama_cpp_2::sampling::LlamaSampler;
use llama_cpp_2::token::LlamaToken;

use super::chat::{self, ChatTemplate};
use super::{Desk, Engine};
use crate::error::EngineError;
use crate::inspect::{ModelFile, STEP_TOKENS};
use crate::probe::{self, Isa};
use crate::protocol::{Finish, Generate, Isolation, Load, ModelFacts, Output, Prompt, STOPS_MAX, Work};
use crate::text::TextStream;

/// The version of the crate that carries the vendored llama.cpp; the workspace pins it.
const VERSION: &str = "0.1.161";
/// The one sequence of this loop. Continuous batching would hand out more.
const SEQUENCE: i32 = 0;

pub(super) struct Llama {
    model: &'static LlamaModel,
    context: LlamaContext<'static>,
    batch: LlamaBatch<'static>,
    /// Tokens of the last prompt that are in the cache as whole steps.
    cached: Vec<LlamaToken>,
    template: Option<Result<ChatTemplate, String>>,
    bos: String,
    facts: ModelFacts,
}

impl Llama {
    pub(super) fn load(load: &Load, file: &ModelFile, threads: u16) -> Result<Self, EngineError> {
        let engine = instruction_set()?;
        forward_warnings();
        let unusable = |error: &dyn std::fmt::Display| {
            EngineError::bad_model(
                &load.model,
                format!("llama.cpp cannot load it: {error}; the worker's log says more"),
            )
        };
        let backend = LlamaBackend::init().map_err(|error| unusable(&error))?;
        let gpu = cfg!(any(feature = "cuda", feature = "vulkan", feature = "metal"));
        let layers = if gpu { load.gpu_layers.unwrap_or(999) } else { 0 };
        let params = LlamaModelParams::default().with_n_gpu_layers(layers);
        let model =
            LlamaModel::load_from_file(&backend, &load.model, &params).map_err(|error| unusable(&error))?;
        // A process holds one model until it ends.
        let (backend, model): (&'static _, &'static _) =
            (Box::leak(Box::new(backend)), Box::leak(Box::new(model)));
        let made_for = model.n_ctx_train();
        let context_tokens =
            file.context_for(load.context_tokens)
                .min(if made_for == 0 { u32::MAX } else { made_for });
        let params = LlamaContextParams::default()
            .with_n_ctx(NonZeroU32::new(context_tokens))
            .with_n_batch(STEP_TOKENS)
            .with_n_ubatch(STEP_TOKENS)
            .with_n_threads(i32::from(threads))
            .with_n_threads_batch(i32::from(threads));
        let context = model
            .new_context(backend, params)
            .map_err(|error| unusable(&error))?;
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
        let template = template
            .map(|source| ChatTemplate::new(source, bos.clone(), eos).map_err(|error| error.to_string()));
        let facts = ModelFacts {
            name: file.name.clone(),
            architecture: file.architecture.clone(),
            context_tokens,
            parameters: file.parameters,
            dimensions: None,
            memory_estimate: file.memory_estimate(context_tokens),
            engine,
            threads,
            isolation: Isolation::None,
        };
        let batch = LlamaBatch::new(STEP_TOKENS as usize, 1);
        Ok(Self {
            model,
            context,
            batch,
            cached: Vec::new(),
            template,
            bos,
            facts,
        })
    }

    fn tokens(&self, prompt: &Prompt) -> Result<Vec<LlamaToken>, EngineError> {
        let vocab = self.model.vocab();
        let Some(messages) = chat::messages(prompt) else {
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
        let text = template.render(&messages)?;
        // Most templates write the beginning-of-text token themselves; it must not come twice.
        let begun = !self.bos.is_empty() && text.starts_with(&self.bos);
        Ok(vocab.tokenize(text.as_bytes(), !begun, true))
    }

    fn generate(&mut self, request: &Generate, desk: &mut Desk<'_>) -> Result<Output, EngineError> {
        not_yet(request)?;
        let mut sampler = sampler(request)?;
        if request.stop.len() > STOPS_MAX {
            return Err(EngineError::bad_input(format!(
                "{} stop strings, {STOPS_MAX} are allowed",
                request.stop.len()
            )));
        }
        let prompt = self.tokens(&request.prompt)?;
        let limit = self.facts.context_tokens;
        if prompt.is_empty() {
            return Err(EngineError::bad_input("the prompt is empty"));
        }
        if prompt.len() >= limit as usize {
            let prompt = u32::try_from(prompt.len()).unwrap_or(u32::MAX);
            return Err(EngineError::ContextOverflow { prompt, limit });
        }
        self.read(&prompt, desk)?;

        let vocab = self.model.vocab();
        let mut stream = TextStream::new(request.stop.clone());
        let mut answer = String::new();
        let mut position = prompt.len() as u32;
        let most = u64::from(request.max_tokens.unwrap_or(u32::MAX));
        let finish = loop {
            if desk.tokens_out >= most {
                break Finish::Length;
            }
            desk.check()?;
            let token = sampler.sample(&self.context, -1);
            if vocab.is_eog(token) {
                break Finish::Stop;
            }
            desk.tokens_out += 1;
            let piece = stream.push(&vocab.token_to_piece(token, false, None));
            desk.token(&piece);
            answer.push_str(&piece);
            if stream.stopped() {
                break Finish::Stop;
            }
            if position + 1 >= limit {
                break Finish::Context;
            }
            self.batch.clear();
            self.step(&[token], position, true)?;
            position += 1;
        };
        let rest = stream.finish();
        desk.token(&rest);
        answer.push_str(&rest);
        Ok(Output::Text {
            text: answer,
            finish,
            logprobs: Vec::new(),
        })
    }

    /// Brings the whole prompt into the cache, and the logits of its last token out.
    fn read(&mut self, prompt: &[LlamaToken], desk: &mut Desk<'_>) -> Result<(), EngineError> {
        let step = STEP_TOKENS as usize;
        let shared = self
            .cached
            .iter()
            .zip(prompt)
            .take_while(|(old, new)| old == new)
            .count();
        // The last token is always computed: its logits are what is wanted.
        let mut kept = shared.min(prompt.len() - 1) / step * step;
        self.cached.truncate(kept);
        if kept == 0
            || self
                .context
                .kv_cache_seq_rm(SEQUENCE, Some(kept as u32), None)
                .is_err()
        {
            // Some architectures cannot forget a part.
            self.context.clear_kv_cache();
            self.cached.clear();
            kept = 0;
        }
        desk.tokens_in = kept as u64;
        desk.tokens_cached = kept as u64;
        for chunk in prompt[kept..].chunks(step) {
            desk.check()?;
            let last = kept + chunk.len() == prompt.len();
            self.step(chunk, kept as u32, last)?;
            kept += chunk.len();
            desk.tokens_in = kept as u64;
            if chunk.len() == step {
                self.cached.extend_from_slice(chunk);
            }
            if !last {
                desk.alive();
            }
        }
        Ok(())
    }

    /// Computes a few tokens at `position`, with logits for the last of them if it is `asked`.
    fn step(&mut self, tokens: &[LlamaToken], position: u32, asked: bool) -> Result<(), EngineError> {
        let failed = |error: &dyn std::fmt::Display| EngineError::Crashed {
            how: format!("llama.cpp: {error}"),
        };
        self.batch.clear();
        for (index, token) in tokens.iter().enumerate() {
            let position = i32::try_from(position as usize + index).map_err(|error| failed(&error))?;
            let logits = asked && index + 1 == tokens.len();
            self.batch
                .add(*token, position, &[SEQUENCE], logits)
                .map_err(|error| failed(&error))?;
        }
        self.context
            .decode(&mut self.batch)
            .map_err(|error| failed(&error))
    }
}

impl Engine for Llama {
    fn facts(&self) -> ModelFacts {
        self.facts.clone()
    }

    fn run(&mut self, work: Work, desk: &mut Desk<'_>) -> Result<Output, EngineError> {
        let Work::Generate(request) = work else {
            return Err(EngineError::bad_input(
                "this worker holds a model that generates text",
            ));
        };
        let result = self.generate(&request, desk);
        if matches!(result, Err(EngineError::Crashed { .. })) {
            // What is in the cache after a failed step is anyone's guess.
            self.context.clear_kv_cache();
            self.cached.clear();
        }
        result
    }
}

/// Refuses what this engine does not do, rather than pass it over.
fn not_yet(request: &Generate) -> Result<(), EngineError> {
    let known = Generate {
        prompt: request.prompt.clone(),
        max_tokens: request.max_tokens,
        temperature: request.temperature,
        top_k: request.top_k,
        top_p: request.top_p,
        seed: request.seed,
        stop: request.stop.clone(),
        ..Generate::greedy(request.prompt.clone(), 0)
    };
    if known == *request {
        return Ok(());
    }
    Err(EngineError::Unsupported {
        reason: "this engine samples by temperature, top_k, top_p, seed and stop only".into(),
    })
}

fn sampler(request: &Generate) -> Result<LlamaSampler, EngineError> {
    let Generate {
        temperature,
        top_k,
        top_p,
        seed,
        ..
    } = *request;
    if !(0.0..=100.0).contains(&temperature) {
        return Err(EngineError::bad_input(format!(
            "temperature is {temperature}; 0 to 100 are allowed"
        )));
    }
    if !(top_p > 0.0 && top_p <= 1.0) {
        return Err(EngineError::bad_input(format!(
            "top_p is {top_p}; more than 0, up to 1, is allowed"
        )));
    }
    if temperature == 0.0 {
        return Ok(LlamaSampler::greedy());
    }
    let mut chain = Vec::new();
    if top_k > 0 {
        chain.push(LlamaSampler::top_k(i32::try_from(top_k).unwrap_or(i32::MAX)));
    }
    if top_p < 1.0 {
        chain.push(LlamaSampler::top_p(top_p, 1));
    }
    chain.push(LlamaSampler::temp(temperature));
    // The largest seed means "draw one" to llama.cpp.
    let seed = ((seed ^ (seed >> 32)) as u32).min(u32::MAX - 1);
    chain.push(LlamaSampler::dist(seed));
    Ok(LlamaSampler::chain_simple(chain))
}

/// The engine's name with the instruction set it was built for; an error when this processor lacks it.
fn instruction_set() -> Result<String, EngineError> {
    let isa = probe::isa();
    let level = if cfg!(target_arch = "x86_64") {
        if isa < Isa::X86V3 {
            return Err(EngineError::Unsupported {
                reason: format!(
                    "this processor is {isa}; text generation needs x86-64-v3 (AVX2, FMA, F16C, BMI2; 2013 and later)"
                ),
            });
        }
        if system_info().contains("AVX2 = 1") {
            "x86-64-v3"
        } else {
            eprintln!(
                "llama.cpp was built without vector instructions and is about twenty times slower for it: build from \
                 the workspace, whose .cargo/config.toml sets them"
            );
            "x86-64"
        }
    } else {
        std::env::consts::ARCH
    };
    Ok(format!("llama.cpp {VERSION} {level}"))
}

fn system_info() -> String {
    #[expect(unsafe_code, reason = "the binding has no safe wrapper")]
    // SAFETY: the function has no preconditions and returns a pointer to a static, terminated string.
    let text = unsafe { CStr::from_ptr(llama_cpp_sys_2::llama_print_system_info()) };
    text.to_string_lossy().into_owned()
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
