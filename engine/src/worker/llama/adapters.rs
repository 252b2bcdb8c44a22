//! LoRA adapters, attached to single requests.
//!
//! They are files in a directory that the sandbox leaves readable. Each is checked before llama.cpp opens it, loaded once, and
//! stays while the worker lives.
use std::path::{Path, PathBuf};

use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::model::LlamaLoraAdapter;

use super::{Model, failed};
use crate::error::EngineError;
use crate::inspect;
use crate::protocol::{Adapter, Load};

/// Adapters that one worker holds at most.
const LOADED_MAX: usize = 32;

/// The adapter of a generation, or none: its place among the loaded, and the bits of its scale. Only generations with equal
/// ones share steps and prefixes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Attached(Option<(usize, u32)>);

pub(super) struct Adapters {
    directory: Option<PathBuf>,
    /// The model's digest, where the node told it.
    base: Option<String>,
    loaded: Vec<(String, LlamaLoraAdapter)>,
    applied: Attached,
}

impl Adapters {
    pub(super) fn new(load: &Load) -> Self {
        Self {
            directory: load.adapters.clone(),
            base: load.digest.clone(),
            loaded: Vec::new(),
            applied: Attached::default(),
        }
    }

    /// Finds or loads the adapter that a request names.
    pub(super) fn attach(
        &mut self,
        wanted: Option<&Adapter>,
        model: &mut Model,
    ) -> Result<Attached, EngineError> {
        let Some(Adapter { file, scale }) = wanted else {
            return Ok(Attached::default());
        };
        let attached = |at| Attached(Some((at, scale.to_bits())));
        if let Some(at) = self.loaded.iter().position(|(name, _)| name == file) {
            return Ok(attached(at));
        }
        if self.loaded.len() >= LOADED_MAX {
            return Err(EngineError::Unsupported {
                reason: format!("this worker already holds {LOADED_MAX} adapters"),
            });
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
        self.check(&path, model)?;
        let adapter = model
            .with_mut(|model| model.lora_adapter_init(&path))
            .map_err(|error| {
                EngineError::bad_model(
                    &path,
                    format!("llama.cpp cannot put it over this model: {error}; the worker's log says more"),
                )
            })?;
        self.loaded.push((file.clone(), adapter));
        Ok(attached(self.loaded.len() - 1))
    }

    /// Refuses what is no adapter of this model, before an engine opens it.
    fn check(&self, path: &Path, model: &Model) -> Result<(), EngineError> {
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
            _ => Ok(()),
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
            (Some((at, scale)), _) => {
                if let Some((_, adapter)) = self.loaded.get_mut(at) {
                    let scale = f32::from_bits(scale);
                    context
                        .lora_adapter_set(adapter, scale)
                        .map_err(|error| failed(&error))?;
                }
            }
            (None, Some((at, _))) => {
                if let Some((_, adapter)) = self.loaded.get_mut(at) {
                    context
                        .lora_adapter_remove(adapter)
                        .map_err(|error| failed(&error))?;
                }
            }
            (None, None) => {}
        }
        self.applied = wanted;
        Ok(())
    }
}
