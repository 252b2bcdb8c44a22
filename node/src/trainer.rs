//! The owner's own trainer: asked at the start what it has, offered where it serves, handed to the workers that use it.
use crate::{config::TrainerConfig, probe::Found};
use karez_core::records::{Engine, WorkKind};
use karez_engine::provided::{self, Provided};

/// What offers call it.
const NAME: &str = "torch";

/// A trainer that answered.
#[derive(Debug, Clone)]
pub(crate) struct Trainer {
    provided: Provided,
    /// It serves leases on the CPU too.
    cpu: bool,
}

impl Trainer {
    /// Asks the Python of the settings. The error is a sentence for the owner; our own trainer serves then.
    pub(crate) async fn find(config: &TrainerConfig) -> Result<Self, String> {
        let provided = provided::probe(&config.python)
            .await
            .map_err(|why| format!("trainer.python is not used: {why}"))?;
        tracing::info!("trainer: {provided}");
        Ok(Self {
            provided,
            cpu: config.cpu,
        })
    }

    /// Whether it computes on GPUs.
    pub(crate) fn has_gpus(&self) -> bool {
        !self.provided.gpus.is_empty()
    }

    /// The trainer for a lease with those GPUs, where it is not our own.
    pub(crate) fn serving(&self, gpus: &[String]) -> Option<&Provided> {
        let serves = if gpus.is_empty() {
            self.cpu
        } else {
            self.has_gpus()
        };
        serves.then_some(&self.provided)
    }

    /// Offers name the trainer that a lease will really meet.
    pub(crate) fn show(&self, found: &mut Found) {
        let Some(own) = found.engines.iter_mut().find(|e| e.work == WorkKind::Train) else {
            return;
        };
        let version: String = self.provided.torch.chars().take(32).collect();
        if self.cpu {
            (own.name, own.version) = (NAME.into(), version);
        } else if self.has_gpus() {
            // No speed of a GPU is known before work was done there: schedulers learn it then.
            let on_gpus = Engine {
                name: NAME.into(),
                version,
                ..own.clone()
            };
            found.engines.push(on_gpus);
        } else {
            found.notes.push(format!(
                "trainer.python has {}: it is not used, for trainer.cpu is not set",
                self.provided
            ));
        }
    }
}
