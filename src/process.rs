//! Processes that outlive a command: starting them, knowing them again, stopping exactly them.
//!
//! A process is known by its id *and* the moment it started: ids are used again, pairs are not.
use crate::fault::{Kind, fault};
use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process, set_parent_process_death_signal};
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, OpenOptions},
    io::{Read, Seek, SeekFrom},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// Set for processes that must not outlive the one that started them.
const WITH_PARENT: &str = "KAREZ_WITH_PARENT";

/// A process we started, as it is remembered in a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Known {
    /// What it is for, in messages: `scheduler`, `node uni-nairobi`.
    pub(crate) name: String,
    pub(crate) pid: i32,
    /// When it started, in the system's own measure; means nothing but equality.
    pub(crate) started: String,
    /// Where its output goes.
    pub(crate) log: PathBuf,
}

/// Starts `karez ARGS…` in a process group of its own, its output in `log`.
pub(crate) fn start(
    name: &str,
    args: &[&std::ffi::OsStr],
    log: &Path,
    with_parent: bool,
) -> Result<(Known, Child)> {
    let program = std::env::current_exe().context("finding this program's own file")?;
    let subject = || format!("starting the {name}");
    let out = OpenOptions::new()
        .create(true)
        .append(true)
        .open(log)
        .with_context(|| log.display().to_string())?;
    let mut command = Command::new(program);
    command
        .args(args)
        .stdin(Stdio::null())
        .stdout(out.try_clone().with_context(subject)?)
        .stderr(out)
        .env("NO_COLOR", "1")
        // An interrupt at the terminal is for the command that watches, not for the network.
        .process_group(0);
    if with_parent {
        command.env(WITH_PARENT, std::process::id().to_string());
    } else {
        command.env_remove(WITH_PARENT);
    }
    let child = command.spawn().with_context(subject)?;
    let pid = i32::try_from(child.id()).with_context(subject)?;
    let started = started(pid).unwrap_or_default();
    Ok((
        Known {
            name: name.to_owned(),
            pid,
            started,
            log: log.to_owned(),
        },
        child,
    ))
}

/// Asks the system to end this process when the one that started it ends, if that one asked for it.
pub(crate) fn die_with_parent_if_asked() {
    let Some(parent) = std::env::var(WITH_PARENT)
        .ok()
        .and_then(|p| p.parse::<i32>().ok())
    else {
        return;
    };
    let _ = set_parent_process_death_signal(Some(Signal::TERM));
    // It may have ended before we asked.
    if rustix::process::getppid().map(Pid::as_raw_nonzero).map(i32::from) != Some(parent) {
        std::process::exit(143);
    }
}

impl Known {
    /// Whether that very process still runs.
    pub(crate) fn is_alive(&self) -> bool {
        !self.started.is_empty() && started(self.pid).as_deref() == Some(self.started.as_str())
    }

    fn signal(&self, signal: Signal) {
        // Checked right before, so that a process that took over the id is left alone.
        if self.is_alive()
            && let Some(pid) = Pid::from_raw(self.pid)
        {
            let _ = kill_process(pid, signal);
        }
    }

    /// The end of its log, for messages.
    pub(crate) fn last_words(&self) -> String {
        let read = || -> std::io::Result<String> {
            let mut file = fs::File::open(&self.log)?;
            let length = file.metadata()?.len();
            file.seek(SeekFrom::Start(length.saturating_sub(2000)))?;
            let mut bytes = Vec::new();
            file.take(2000).read_to_end(&mut bytes)?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        let text = read().unwrap_or_default();
        text.lines()
            .map(str::trim)
            .rfind(|l| !l.is_empty())
            .unwrap_or("it said nothing")
            .to_owned()
    }
}

/// Stops all of `processes`: asks, waits up to `patience`, then insists. Returns those that would not go.
pub(crate) async fn stop(processes: &[Known], children: &mut [Child], patience: Duration) -> Vec<Known> {
    for signal in [Signal::TERM, Signal::KILL] {
        processes.iter().for_each(|p| p.signal(signal));
        let began = Instant::now();
        while began.elapsed() < patience {
            // Children that have ended stay listed by the system until they are waited for.
            children.iter_mut().for_each(|c| drop(c.try_wait()));
            if processes.iter().all(|p| !p.is_alive()) {
                return Vec::new();
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    processes.iter().filter(|p| p.is_alive()).cloned().collect()
}

/// Ends at the first signal that asks this process to stop.
pub(crate) async fn told_to_stop() {
    use tokio::signal::unix::{SignalKind, signal};
    let waits = |kind| async move {
        match signal(kind) {
            Ok(mut signals) => drop(signals.recv().await),
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        () = waits(SignalKind::interrupt()) => {}
        () = waits(SignalKind::terminate()) => {}
        () = waits(SignalKind::hangup()) => {}
    }
}

/// When the process started; `None` when it does not run (any more).
#[cfg(target_os = "linux")]
fn started(pid: i32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything, so fields are counted behind the last one.
    let (_, fields) = stat.rsplit_once(") ")?;
    let mut fields = fields.split(' ');
    if matches!(fields.next(), Some("Z" | "X")) {
        return None;
    }
    // Field 22 of proc(5): ticks since boot. Boots are told apart by their id.
    let ticks = fields.nth(18)?;
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    Some(format!("{ticks}@{}", boot.trim()))
}

/// When the process started; `None` when it does not run (any more).
#[cfg(not(target_os = "linux"))]
fn started(pid: i32) -> Option<String> {
    let out = Command::new("ps")
        .args(["-o", "stat=,lstart=", "-p", &pid.to_string()])
        .output()
        .ok()?;
    let text = String::from_utf8(out.stdout).ok()?;
    let text = text.trim();
    if text.is_empty() || text.starts_with('Z') {
        return None;
    }
    Some(text.split_once(' ')?.1.trim().to_owned())
}

/// Fails when one of `processes` has ended, with its last words.
pub(crate) fn all_alive(processes: &[Known]) -> Result<()> {
    match processes.iter().find(|p| !p.is_alive()) {
        None => Ok(()),
        Some(dead) => Err(fault(
            Kind::Other,
            format!(
                "the {} ended: {} (all of it in {})",
                dead.name,
                dead.last_words(),
                dead.log.display()
            ),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_start_too() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let mut me = Known {
            name: "test".into(),
            pid,
            started: started(pid).unwrap(),
            log: PathBuf::new(),
        };
        assert!(me.is_alive());
        me.started = "1@another".into();
        assert!(!me.is_alive(), "another process with the same id");
        me.started = String::new();
        assert!(!me.is_alive(), "one that was never seen running");
    }

    #[test]
    fn an_ended_child_is_not_alive_even_before_it_is_waited_for() {
        let mut child = Command::new("true").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let began = Instant::now();
        while started(pid).is_some() && began.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(started(pid), None);
        child.wait().unwrap();
    }
}
