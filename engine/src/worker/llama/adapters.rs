//! LoRA adapters, attached to single requests.
//!
//! They are files in a directory that the sandbox leaves readable. Each is checked before llama.cpp opens it and loaded once.
//! Where they are too many or take too much memory together, those leave that no request uses, the longest unused first.
use std::path::{Path, PathBuf};
use std::ptr::NonNull;

use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::model::LlamaLoraAdapter;

use super::{Model, failed};
use crate::error::EngineError;
use crate::inspect;
use crate::protocol::{Adapter, Load};

/// Adapters that one worker holds at most.
const LOADED_MAX: usize = 32;

/// The adapter of a generation, or none: its number, never used twice, and the bits of its scale. Only generations with equal
/// ones share steps and prefixes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Attached(Option<(u64, u32)>);

impl Attached {
    /// Whether it is the adapter of that number.
    pub(super) fn is(self, number: u64) -> bool {
        self.0.is_some_and(|(own, _)| own == number)
    }
}

struct Loaded {
    number: u64,
    file: String,
    adapter: LlamaLoraAdapter,
    /// What it takes, about: as much as its file.
    bytes: u64,
    /// When a request last named it.
    used: u64,
}

pub(super) struct Adapters {
    directory: Option<PathBuf>,
    /// The model's digest, where the node told it.
    base: Option<String>,
    /// What all of them may take together.
    memory: u64,
    loaded: Vec<Loaded>,
    clock: u64,
    applied: Attached,
}

impl Adapters {
    pub(super) fn new(load: &Load) -> Self {
        Self {
            directory: load.adapters.clone(),
            base: load.digest.clone(),
            memory: load.adapter_memory.map_or(u64::MAX, |bytes| bytes.0),
            loaded: Vec::new(),
            clock: 0,
            applied: Attached::default(),
        }
    }

    /// Finds or loads the adapter that a request names. Those that are `busy`, by their numbers, stay.
    pub(super) fn attach(
        &mut self,
        wanted: Option<&Adapter>,
        model: &mut Model,
        busy: impl Fn(u64) -> bool,
    ) -> Result<Attached, EngineError> {
        let Some(Adapter { file, scale }) = wanted else {
            return Ok(Attached::default());
        };
        self.clock += 1;
        let attached = |number| Attached(Some((number, scale.to_bits())));
        if let Some(known) = self.loaded.iter_mut().find(|known| known.file == *file) {
            known.used = self.clock;
            return Ok(attached(known.number));
        }
        let directory = self.directory.as_ref().ok_or_else(|| EngineError::Unsupported {
            reason: "this worker was started without a directory of adapters".into(),
        })?;
        if file.is_empty() || file.starts_with('.') || file.contains('/') {
            return Err(EngineError::bad_input(format!(
                "{file:?} is no file name of an adapter"
            )));
        }
        let path = directory.join(file);
        let bytes = self.check(&path, model)?;
        self.make_room(bytes, busy)?;
        let adapter = model
            .with_mut(|model| model.lora_adapter_init(&path))
            .map_err(|error| {
                EngineError::bad_model(
                    &path,
                    format!("llama.cpp cannot put it over this model: {error}; the worker's log says more"),
                )
            })?;
        self.loaded.push(Loaded {
            number: self.clock,
            file: file.clone(),
            adapter,
            bytes,
            used: self.clock,
        });
        Ok(attached(self.clock))
    }

    /// Lets go of adapters that nobody uses until one more of `bytes` fits.
    fn make_room(&mut self, bytes: u64, busy: impl Fn(u64) -> bool) -> Result<(), EngineError> {
        if bytes > self.memory {
            return Err(EngineError::Unsupported {
                reason: format!(
                    "the adapter takes about {} MiB beside its model, and {} MiB are set aside for adapters here",
                    bytes.div_ceil(1 << 20),
                    self.memory >> 20
                ),
            });
        }
        loop {
            let taken: u64 = self.loaded.iter().map(|known| known.bytes).sum();
            if self.loaded.len() < LOADED_MAX && taken.saturating_add(bytes) <= self.memory {
                return Ok(());
            }
            let is_busy = |known: &Loaded| busy(known.number) || self.applied.is(known.number);
            let idle = (0..self.loaded.len()).filter(|at| !is_busy(&self.loaded[*at]));
            let Some(oldest) = idle.min_by_key(|at| self.loaded[*at].used) else {
                return Err(EngineError::Busy {
                    limit: u32::try_from(self.loaded.len()).unwrap_or(u32::MAX),
                });
            };
            free(self.loaded.swap_remove(oldest).adapter);
        }
    }

    /// Refuses what is no adapter of this model, before an engine opens it; says how large it is.
    fn check(&self, path: &Path, model: &Model) -> Result<u64, EngineError> {
        let adapter = inspect::adapter(path)?;
        let architecture = &model.facts.architecture;
        if adapter.architecture != *architecture {
            return Err(EngineError::bad_model(
                path,
                format!(
                    "an adapter for {:?}, the model is {architecture:?}",
                    adapter.architecture
                ),
            ));
        }
        match (&adapter.base, &self.base) {
            (Some(made_for), Some(here)) if made_for != here => Err(EngineError::bad_model(
                path,
                format!("an adapter for the base model {made_for}, this one is {here}"),
            )),
            _ => Ok(adapter.weights.0),
        }
    }

    /// Puts an adapter, or none, over the model for the next steps.
    pub(super) fn apply(
        &mut self,
        context: &mut LlamaContext<'_>,
        wanted: Attached,
    ) -> Result<(), EngineError> {
        if wanted == self.applied {
            return Ok(());
        }
        match (wanted.0, self.applied.0) {
            (Some((number, scale)), _) => {
                if let Some(known) = self.loaded.iter_mut().find(|known| known.number == number) {
                    let scale = f32::from_bits(scale);
                    context
                        .lora_adapter_set(&mut known.adapter, scale)
                        .map_err(|error| failed(&error))?;
                }
            }
            (None, Some((number, _))) => {
                if let Some(known) = self.loaded.iter_mut().find(|known| known.number == number) {
                    context
                        .lora_adapter_remove(&mut known.adapter)
                        .map_err(|error| failed(&error))?;
                }
            }
            (None, None) => {}
        }
        self.applied = wanted;
        Ok(())
    }
}

/// Gives back an adapter's memory. No context may be computing with it.
fn free(adapter: LlamaLoraAdapter) {
    #[expect(unsafe_code, reason = "the binding never frees one before its model")]
    // SAFETY: the binding's type is a transparent wrapper of the pointer that llama.cpp gave, and owns it; it goes in here and
    // is used no more. The model, which lists it, lives as long as the process.
    unsafe {
        let raw: NonNull<llama_cpp_sys_2::llama_adapter_lora> = std::mem::transmute(adapter);
        llama_cpp_sys_2::llama_adapter_lora_free(raw.as_ptr());
    }
}
