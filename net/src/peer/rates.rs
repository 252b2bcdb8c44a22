//! How often one peer may speak.
use libp2p::PeerId;
use std::collections::HashMap;
use tokio::time::Instant;

/// Offers of one peer: so many at once, then so many per second.
pub(super) const OFFER_RATE: RateRule = RateRule { burst: 20, per_s: 5 };
/// Summaries arriving through one peer.
pub(super) const SUMMARY_RATE: RateRule = RateRule { burst: 60, per_s: 10 };
const RATED_PEERS_MAX: usize = 65_536;

/// `burst` at once, then `per_s` each second.
#[derive(Debug, Clone, Copy)]
pub(super) struct RateRule {
    burst: u32,
    per_s: u32,
}

/// One token bucket per peer, in thousandths of a token; full buckets are forgotten.
pub(super) struct Rates {
    rule: RateRule,
    buckets: HashMap<PeerId, (Instant, u64)>,
}

impl Rates {
    pub(super) fn new(rule: RateRule) -> Self {
        Self {
            rule,
            buckets: HashMap::new(),
        }
    }

    fn level(&self, now: Instant, (at, level): (Instant, u64)) -> u64 {
        let gained = now.saturating_duration_since(at).as_millis() as u64 * u64::from(self.rule.per_s);
        (level + gained).min(u64::from(self.rule.burst) * 1000)
    }

    /// Whether `peer` may send one more now. When the table is full, newcomers may not.
    pub(super) fn take(&mut self, peer: PeerId, now: Instant) -> bool {
        let full = (now, u64::from(self.rule.burst) * 1000);
        let bucket = match self.buckets.get(&peer) {
            Some(bucket) => *bucket,
            None if self.buckets.len() >= RATED_PEERS_MAX => return false,
            None => full,
        };
        let level = self.level(now, bucket);
        let left = level.checked_sub(1000);
        self.buckets.insert(peer, (now, left.unwrap_or(level)));
        left.is_some()
    }

    pub(super) fn forget_idle(&mut self, now: Instant) {
        let full = u64::from(self.rule.burst) * 1000;
        let idle: Vec<_> = self
            .buckets
            .iter()
            .filter(|(_, bucket)| self.level(now, **bucket) >= full)
            .map(|(peer, _)| *peer)
            .collect();
        for peer in idle {
            self.buckets.remove(&peer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn a_peer_has_a_burst_then_a_rate() {
        let mut rates = Rates::new(RateRule { burst: 3, per_s: 1 });
        let (a, b) = (PeerId::random(), PeerId::random());
        let now = Instant::now();
        let at = |ms| now + Duration::from_millis(ms);
        let taken: Vec<_> = [0, 0, 0, 0, 900, 1000, 1000]
            .map(|ms| rates.take(a, at(ms)))
            .into();
        assert_eq!(taken, [true, true, true, false, false, true, false]);
        assert!(rates.take(b, at(1000)));
        rates.forget_idle(at(60_000));
        assert!(rates.buckets.is_empty());
    }
}
