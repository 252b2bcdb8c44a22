//! How much one key may ask: calls per second, watches at a time, exports at a time.
use crate::{config, mind::lock};
use karez_core::key::PublicKey;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Instant,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::Status;

/// Keys remembered; those that have been quiet make room, and when none has, new keys must wait.
const KEYS_MAX: usize = 16_384;
/// Joins of all keys together: a key costs nothing, so no limit per key bounds them.
const JOINS_PER_SECOND: f64 = 20.0;
const JOINS_BURST: f64 = 200.0;
/// Watches of everybody.
const WATCHES_ALL_MAX: usize = 8_192;
/// Exports of the ledger at a time.
const EXPORTS_MAX: usize = 4;

pub(crate) struct Limits {
    per_second: f64,
    watches_max: usize,
    keys: Mutex<HashMap<PublicKey, Bucket>>,
    joins: Mutex<Bucket>,
    watches: Arc<Mutex<HashMap<PublicKey, usize>>>,
    watches_all: Arc<Semaphore>,
    exports: Arc<Semaphore>,
}

struct Bucket {
    tokens: f64,
    at: Instant,
}

impl Bucket {
    fn full(burst: f64) -> Self {
        Self {
            tokens: burst,
            at: Instant::now(),
        }
    }

    fn refill(&mut self, per_second: f64, burst: f64, now: Instant) {
        self.tokens = (self.tokens + now.duration_since(self.at).as_secs_f64() * per_second).min(burst);
        self.at = now;
    }

    fn take(&mut self, per_second: f64, burst: f64) -> bool {
        self.refill(per_second, burst, Instant::now());
        if self.tokens < 1.0 {
            return false;
        }
        self.tokens -= 1.0;
        true
    }
}

/// One watch; counted until dropped.
pub(crate) struct WatchSlot {
    key: PublicKey,
    table: Arc<Mutex<HashMap<PublicKey, usize>>>,
    _all: OwnedSemaphorePermit,
}

impl Drop for WatchSlot {
    fn drop(&mut self) {
        let mut table = lock(&self.table);
        if let Some(count) = table.get_mut(&self.key) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                table.remove(&self.key);
            }
        }
    }
}

// A `Status` is large, but it is what every handler returns.
#[allow(clippy::result_large_err)]
impl Limits {
    pub(crate) fn new(config: &config::Limits) -> Self {
        Self {
            per_second: f64::from(config.calls_per_second),
            watches_max: config.watches_max,
            keys: Mutex::default(),
            joins: Mutex::new(Bucket::full(JOINS_BURST)),
            watches: Arc::default(),
            watches_all: Arc::new(Semaphore::new(WATCHES_ALL_MAX)),
            exports: Arc::new(Semaphore::new(EXPORTS_MAX)),
        }
    }

    /// One call of `key`.
    pub(crate) fn call(&self, key: PublicKey) -> Result<(), Status> {
        let (rate, burst) = (self.per_second, self.per_second * 4.0);
        let mut keys = lock(&self.keys);
        if keys.len() >= KEYS_MAX && !keys.contains_key(&key) {
            let now = Instant::now();
            keys.retain(|_, bucket| {
                bucket.refill(rate, burst, now);
                bucket.tokens < burst
            });
            if keys.len() >= KEYS_MAX {
                return Err(Status::resource_exhausted(
                    "the scheduler is too busy for new callers: try again in a second",
                ));
            }
        }
        if keys
            .entry(key)
            .or_insert_with(|| Bucket::full(burst))
            .take(rate, burst)
        {
            Ok(())
        } else {
            Err(Status::resource_exhausted(format!(
                "key {} makes more than {rate} calls per second: wait a second and go slower",
                key.short()
            )))
        }
    }

    /// One attempt to join, of whoever.
    pub(crate) fn join(&self) -> Result<(), Status> {
        if lock(&self.joins).take(JOINS_PER_SECOND, JOINS_BURST) {
            Ok(())
        } else {
            Err(Status::resource_exhausted(
                "too many keys are joining at once: try again in a few seconds",
            ))
        }
    }

    /// One watch of `key`, until the slot is dropped.
    pub(crate) fn watch(&self, key: PublicKey) -> Result<WatchSlot, Status> {
        let busy = || {
            Status::resource_exhausted(
                "the scheduler has no room for another watch: ask with `karez job show`",
            )
        };
        let all = self.watches_all.clone().try_acquire_owned().map_err(|_| busy())?;
        let mut table = lock(&self.watches);
        let count = table.entry(key).or_default();
        if *count >= self.watches_max {
            return Err(Status::resource_exhausted(format!(
                "key {} has {count} watches open, the limit is {}: close some",
                key.short(),
                self.watches_max
            )));
        }
        *count += 1;
        Ok(WatchSlot {
            key,
            table: self.watches.clone(),
            _all: all,
        })
    }

    /// One export of the ledger, until the permit is dropped.
    pub(crate) fn export(&self) -> Result<OwnedSemaphorePermit, Status> {
        self.exports.clone().try_acquire_owned().map_err(|_| {
            Status::resource_exhausted(format!(
                "{EXPORTS_MAX} exports of the ledger are running: try again in a minute"
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_then_the_rate_holds_and_other_keys_are_untouched() {
        let limits = Limits::new(&config::Limits {
            calls_per_second: 1,
            watches_max: 2,
            ..config::Limits::default()
        });
        let (a, b) = (PublicKey([1; 32]), PublicKey([2; 32]));
        for _ in 0..4 {
            limits.call(a).unwrap();
        }
        let refused = limits.call(a).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::ResourceExhausted);
        assert!(refused.message().contains("1 calls per second"), "{refused}");
        limits.call(b).unwrap();
    }

    #[test]
    fn watches_are_counted_until_dropped() {
        let limits = Limits::new(&config::Limits {
            watches_max: 1,
            ..config::Limits::default()
        });
        let key = PublicKey([1; 32]);
        let slot = limits.watch(key).unwrap();
        assert!(limits.watch(key).is_err());
        drop(slot);
        limits.watch(key).unwrap();
    }
}
