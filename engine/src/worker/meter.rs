//! What a run takes from the machine.
use std::time::Instant;

use super::spin;
use crate::protocol::Meters;
use crate::unit::{Bytes, Millis};

/// Reads the clocks at the beginning and at the end of a run.
pub(super) struct Meter {
    began: Instant,
    cpu_us: u64,
}

impl Meter {
    pub(super) fn start() -> Self {
        Self {
            began: Instant::now(),
            cpu_us: usage().0,
        }
    }

    /// Time since the start; tokens are for others to fill in.
    pub(super) fn stop(&self) -> Meters {
        let (cpu_us, peak_rss) = usage();
        Meters {
            cpu_ms: Millis(cpu_us.saturating_sub(self.cpu_us).div_ceil(1000)),
            wall_ms: Millis(
                u64::try_from(self.began.elapsed().as_micros().div_ceil(1000)).unwrap_or(u64::MAX),
            ),
            peak_rss,
            ..Meters::default()
        }
    }
}

/// Microseconds of processor time of all threads so far, and the largest resident size.
fn usage() -> (u64, Bytes) {
    #[expect(unsafe_code, reason = "no safe wrapper of getrusage is at hand")]
    // SAFETY: the kernel fills the structure it is given; all zeroes is a valid one.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &raw mut usage);
        usage
    };
    let micros = |time: libc::timeval| {
        u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000 + u64::try_from(time.tv_usec).unwrap_or(0)
    };
    // Linux counts in kibibytes, macOS in bytes.
    let unit = if cfg!(target_os = "macos") { 1 } else { 1024 };
    let peak = u64::try_from(usage.ru_maxrss).unwrap_or(0).saturating_mul(unit);
    (micros(usage.ru_utime) + micros(usage.ru_stime), Bytes(peak))
}

/// Reads the clocks around a step that several runs may share.
pub(super) struct Stopwatch(Meter);

impl Stopwatch {
    pub(super) fn start() -> Self {
        spin::before_step();
        Self(Meter::start())
    }

    /// Microseconds on the wall and of the processor since the start.
    pub(super) fn stop(&self) -> (f64, f64) {
        spin::after_step();
        let wall = self.0.began.elapsed().as_secs_f64() * 1e6;
        (wall, usage().0.saturating_sub(self.0.cpu_us) as f64)
    }
}

/// Microseconds of processor time of all threads so far.
pub(super) fn cpu_us() -> u64 {
    usage().0
}

/// The largest resident size of the process so far.
pub(super) fn peak_rss() -> Bytes {
    usage().1
}
