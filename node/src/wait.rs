//! Waiting between attempts: doubling, capped, and never in step with everybody else.
use std::time::Duration;

/// Doubles from `first` to `most`; each wait is drawn between half and all of it.
#[derive(Debug, Clone)]
pub(crate) struct Backoff {
    first: Duration,
    most: Duration,
    next: Duration,
}

impl Backoff {
    pub(crate) fn new(first: Duration, most: Duration) -> Self {
        Self {
            first,
            most,
            next: first,
        }
    }

    /// As often as schedulers are dialled.
    pub(crate) fn dialling() -> Self {
        Self::new(Duration::from_millis(200), Duration::from_secs(10))
    }

    /// It worked: the next failure waits briefly again.
    pub(crate) fn reset(&mut self) {
        self.next = self.first;
    }

    /// How long to wait now.
    pub(crate) fn next(&mut self) -> Duration {
        let full = self.next;
        self.next = (full * 2).min(self.most);
        // Without randomness there is only less spread.
        let draw = getrandom::u32().unwrap_or(u32::MAX);
        full / 2 + (full / 2).mul_f64(f64::from(draw) / f64::from(u32::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_to_the_cap_and_start_over() {
        let mut backoff = Backoff::dialling();
        let mut longest = Duration::ZERO;
        for _ in 0..20 {
            let wait = backoff.next();
            assert!(wait >= Duration::from_millis(100) && wait <= Duration::from_secs(10));
            longest = longest.max(wait);
        }
        assert!(longest >= Duration::from_secs(5));
        backoff.reset();
        assert!(backoff.next() <= Duration::from_millis(200));
    }
}
