//! The holders of one fetch, and how each has done so far.
use super::{FIRST_RETRY, Failure, LOSSES_MAX, Lent, connect};
use crate::transfer::{Holder, Inner, TransferError};
use karez_core::artifact::ArtifactRef;
use quinn::Connection;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::time::{Instant, sleep_until};

/// The holders of one fetch and how they have done so far.
pub(super) struct Pool {
    inner: Arc<Inner>,
    slots: Vec<Arc<Slot>>,
}

pub(super) struct Slot {
    pub(super) holder: Holder,
    state: Mutex<SlotState>,
    connection: tokio::sync::Mutex<Option<Lent>>,
}

struct SlotState {
    /// Why it is out of the game.
    useless: Option<String>,
    losses: u32,
    retry_at: Instant,
    busy: usize,
    /// The connection whose end was counted last.
    ended: Option<usize>,
}

/// One worker's use of one holder.
pub(super) struct Turn {
    pub(super) slot: Arc<Slot>,
    pub(super) connection: Connection,
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.slot.state().busy -= 1;
    }
}

impl Pool {
    pub(super) fn new(inner: Arc<Inner>, holders: &[Holder]) -> Self {
        let slot = |holder: &Holder| {
            Arc::new(Slot {
                holder: holder.clone(),
                state: Mutex::new(SlotState {
                    useless: None,
                    losses: 0,
                    retry_at: Instant::now(),
                    busy: 0,
                    ended: None,
                }),
                connection: tokio::sync::Mutex::default(),
            })
        };
        Self {
            inner,
            slots: holders.iter().map(slot).collect(),
        }
    }

    /// The least busy holder that may still help, connected. Waits where all of them were just lost.
    pub(super) async fn turn(&self, artifact: ArtifactRef) -> Result<Turn, TransferError> {
        loop {
            let now = Instant::now();
            let useful = self.slots.iter().filter(|slot| slot.state().useless.is_none());
            let Some(slot) = useful.min_by_key(|slot| {
                let state = slot.state();
                (state.retry_at.max(now), state.busy)
            }) else {
                return Err(TransferError::NoHolder {
                    artifact,
                    tried: self.tried(),
                });
            };
            let retry_at = slot.state().retry_at;
            if retry_at > now {
                sleep_until(retry_at).await;
                continue;
            }
            let mut current = slot.connection.lock().await;
            if current
                .as_ref()
                .is_none_or(|lent| lent.connection.close_reason().is_some())
            {
                // Another worker may have failed to connect while this one waited.
                if slot.state().retry_at > Instant::now() || slot.state().useless.is_some() {
                    continue;
                }
                match connect(&self.inner, &slot.holder).await {
                    Ok(lent) => *current = Some(lent),
                    Err(failure) => {
                        *current = None;
                        match failure {
                            Failure::Useless(why) => slot.leave(why),
                            Failure::Lost(why) => slot.lost(why),
                            Failure::Local(error) => return Err(error.into()),
                            Failure::Reconnect => {}
                        }
                        continue;
                    }
                }
            }
            if let Some(connection) = current.as_ref().map(|lent| lent.connection.clone()) {
                slot.state().busy += 1;
                return Ok(Turn {
                    slot: slot.clone(),
                    connection,
                });
            }
        }
    }

    pub(super) fn tried(&self) -> String {
        if self.slots.is_empty() {
            return "no holder is known".into();
        }
        let each = self.slots.iter().map(|slot| {
            let why = slot.state().useless.clone().unwrap_or_default();
            format!("{}: {why}", slot.holder.key.short())
        });
        each.collect::<Vec<_>>().join("; ")
    }
}

impl Slot {
    fn state(&self) -> MutexGuard<'_, SlotState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn progressed(&self) {
        self.state().losses = 0;
    }

    fn lost(&self, why: String) {
        let mut state = self.state();
        state.losses += 1;
        state.retry_at = Instant::now() + FIRST_RETRY * 2u32.saturating_pow(state.losses - 1);
        if state.losses >= LOSSES_MAX {
            state.useless = Some(why);
        }
    }

    fn leave(&self, why: String) {
        tracing::warn!(holder = %self.holder.key.short(), why, "holder left");
        self.state().useless = Some(why);
    }
}

impl Turn {
    /// Notes how it went. `None` means: take another turn.
    pub(super) fn settle<T>(self, result: Result<T, Failure>) -> Result<Option<T>, TransferError> {
        match result {
            Ok(value) => {
                self.slot.progressed();
                return Ok(Some(value));
            }
            Err(Failure::Local(error)) => return Err(error.into()),
            Err(Failure::Useless(why)) => self.slot.leave(why),
            Err(Failure::Reconnect) => self.connection.close(0u32.into(), b"reconnect"),
            Err(Failure::Lost(why)) => {
                self.connection.close(0u32.into(), b"stalled");
                // All streams of a connection are lost at once; that counts once.
                let id = Some(self.connection.stable_id());
                let first = std::mem::replace(&mut self.slot.state().ended, id) != id;
                if first {
                    self.slot.lost(why);
                }
            }
        }
        Ok(None)
    }
}
