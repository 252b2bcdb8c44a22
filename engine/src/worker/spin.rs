//! How long computing threads wait awake for one another.
//!
//! llama.cpp's threads meet some hundred times a token. Where each has a processor to itself, sleeping at every meeting costs a
//! 1B model a quarter of its speed and a small model four fifths (two virtual processors); where somebody else takes a
//! processor, a thread that waits awake keeps it from the very thread that is waited for. A worker outlives both
//! situations, so it looks at the machine while it computes.
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::meter;

/// Rounds awake where nobody else wants the processors: about a millisecond, which spans what one thread does alone
/// between two steps.
const ALONE: u64 = 100_000;
/// Rounds awake on a busy machine: some microseconds.
const BUSY: u64 = 300;
/// Time between two looks; ticks are 10 ms long.
const PAUSE: Duration = Duration::from_millis(100);
/// After a rest this long the worker looks anew: what others did meanwhile says nothing of what they do beside it.
const REST: Duration = Duration::from_millis(5);
/// Processors that others may use beyond those that the threads leave free: the network's own processes need some.
const MARGIN: f64 = 0.35;

static WATCH: Mutex<Option<Watch>> = Mutex::new(None);

struct Watch {
    stat: File,
    threads: u16,
    processors: usize,
    /// When the last step ended.
    stepped: Instant,
    /// The last look, and what was seen.
    looked: Instant,
    before: Ticks,
    own_us: u64,
}

/// Clock ticks of all processors since the machine started.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Ticks {
    busy: u64,
    all: u64,
}

/// Begins to watch the machine for a worker of so many threads. To be called before the sandbox closes.
pub(super) fn watch(threads: u16) {
    let begin = || {
        let processors = fs::read_to_string("/proc/stat").ok()?;
        let processors = processors
            .lines()
            .filter(|line| line.starts_with("cpu") && !line.starts_with("cpu "))
            .count();
        let stat = File::open("/proc/stat").ok()?;
        let before = look(&stat)?;
        Some(Watch {
            stat,
            threads,
            processors,
            stepped: Instant::now(),
            looked: Instant::now(),
            before,
            own_us: meter::cpu_us(),
        })
    };
    let watch = begin().filter(|_| threads > 1);
    if watch.is_some() {
        wait_awake(ALONE);
    }
    *WATCH.lock().unwrap_or_else(PoisonError::into_inner) = watch;
}

/// To be called before every step: looks at the machine now and then, and says how long threads wait awake.
pub(super) fn before_step() {
    let mut watch = WATCH.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(watch) = watch.as_mut() else { return };
    let rested = watch.stepped.elapsed() > REST;
    let took = watch.looked.elapsed();
    if !rested && took < PAUSE {
        return;
    }
    let Some(now) = look(&watch.stat) else { return };
    let own_us = meter::cpu_us();
    if !rested {
        let own = Duration::from_micros(own_us.saturating_sub(watch.own_us));
        let others = others(watch.before, now, watch.processors, own.div_duration_f64(took));
        wait_awake(rounds(others, watch.processors, watch.threads));
    }
    (watch.looked, watch.before, watch.own_us) = (Instant::now(), now, own_us);
}

/// To be called after every step.
pub(super) fn after_step() {
    if let Some(watch) = WATCH.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
        watch.stepped = Instant::now();
    }
}

/// Processors that other processes kept busy between two looks, where this one kept `own` busy.
fn others(before: Ticks, now: Ticks, processors: usize, own: f64) -> f64 {
    let busy = now.busy.saturating_sub(before.busy) as f64;
    let all = now.all.saturating_sub(before.all).max(1) as f64;
    (busy / all * processors as f64 - own).max(0.0)
}

fn rounds(others: f64, processors: usize, threads: u16) -> u64 {
    let free = processors as f64 - others;
    if free + MARGIN >= f64::from(threads) {
        ALONE
    } else {
        BUSY
    }
}

fn look(stat: &File) -> Option<Ticks> {
    let mut text = [0; 256];
    let read = stat.read_at(&mut text, 0).ok()?;
    ticks(std::str::from_utf8(text.get(..read)?).ok()?)
}

/// The first line of `/proc/stat`: user, nice, system, idle, waiting for a disk, interrupts, soft interrupts, stolen.
fn ticks(stat: &str) -> Option<Ticks> {
    let line = stat.lines().next()?.strip_prefix("cpu ")?;
    let mut fields = [0; 8];
    for (field, text) in fields.iter_mut().zip(line.split_ascii_whitespace()) {
        *field = text.parse().ok()?;
    }
    let all = fields.iter().sum();
    let [.., idle, waiting, _, _, _] = fields;
    Some(Ticks {
        busy: all - idle - waiting,
        all,
    })
}

/// Whether it could be said.
#[cfg(target_os = "linux")]
#[expect(unsafe_code, reason = "libgomp has no other way")]
fn wait_awake(rounds: u64) -> bool {
    unsafe extern "C" {
        fn karez_wait_awake(rounds: std::ffi::c_ulong) -> std::ffi::c_int;
    }
    // SAFETY: it stores one number, which libgomp's threads read at any time.
    unsafe { karez_wait_awake(rounds as std::ffi::c_ulong) == 1 }
}

#[cfg(not(target_os = "linux"))]
fn wait_awake(_: u64) -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_wait_awake_only_where_each_has_a_processor() {
        for (others, processors, threads, expected) in [
            (0.0, 2, 2, ALONE),
            (0.3, 2, 2, ALONE),
            (0.9, 2, 2, BUSY),
            (2.0, 2, 2, BUSY),
            (2.0, 8, 6, ALONE),
            (3.0, 8, 6, BUSY),
        ] {
            assert_eq!(
                rounds(others, processors, threads),
                expected,
                "{others} of {processors}"
            );
        }
    }

    #[test]
    fn what_others_take_is_what_this_process_does_not() {
        let before = ticks("cpu  100 0 50 1000 7 1 2 0 0 0\ncpu0 1 2 3\n").unwrap();
        assert_eq!(before, Ticks { busy: 153, all: 1160 });
        let now = ticks("cpu  160 10 70 1080 17 1 12 10 0 0").unwrap();
        // 110 of 200 ticks of two processors, and this one took half a processor.
        assert!((others(before, now, 2, 0.5) - 0.6).abs() < 1e-9);
        assert_eq!(others(before, now, 2, 1.5), 0.0);
        assert_eq!(ticks("intr 5"), None);
    }

    /// The variable is where it is expected: an update of the compiler that moves it must be noticed.
    #[cfg(target_os = "linux")]
    #[test]
    fn this_build_can_be_told() {
        assert!(wait_awake(BUSY));
    }
}
