//! A provider's own trainer: the Python that its owner names, and what was found in it.
//!
//! The program is ours (`train/torch.py`) and travels in this binary; PyTorch, transformers and peft are the provider's. Asked
//! once when a node starts ([`probe`]); the worker runs it later, inside its sandbox.
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt;
use tokio::process::Command;

/// The trainer's program.
pub const PROGRAM: &str = include_str!("train/torch.py");
/// Importing PyTorch takes seconds, on a cold disk a minute.
const PROBE_MAX: Duration = Duration::from_secs(180);
/// Bytes of its answer at most.
const ANSWER_MAX: u64 = 64 << 10;
/// Folders that it may read, at most.
const READS_MAX: usize = 64;

/// A trainer that is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Provided {
    /// The Python to run.
    pub python: PathBuf,
    /// Where it and its libraries lie.
    pub reads: Vec<PathBuf>,
    /// Version of PyTorch.
    pub torch: String,
    /// Version of transformers.
    pub transformers: String,
    /// Version of peft.
    pub peft: String,
    /// The GPUs that PyTorch sees, by name.
    pub gpus: Vec<String>,
}

impl std::fmt::Display for Provided {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            torch,
            transformers,
            peft,
            ..
        } = self;
        write!(f, "PyTorch {torch}, transformers {transformers}, peft {peft}, ")?;
        match self.gpus.len() {
            0 => f.write_str("no GPU"),
            1 => f.write_str("1 GPU"),
            count => write!(f, "{count} GPUs"),
        }
    }
}

#[derive(Deserialize)]
struct Answer {
    reads: Vec<PathBuf>,
    torch: String,
    transformers: String,
    peft: String,
    gpus: Vec<String>,
}

/// Asks a Python what it has. The error says what is wrong with it, in its own words.
pub async fn probe(python: &Path) -> Result<Provided, String> {
    let mut command = Command::new(python);
    command
        .args(["-I", "-c", PROGRAM, "probe"])
        .env_remove("PYTHONPATH")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let mut child = command
        .spawn()
        .map_err(|error| format!("{} does not start: {error}", python.display()))?;
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) else {
        return Err(format!("{} has no pipes", python.display()));
    };
    let asked = async {
        let (mut stdout, mut stderr) = (stdout.take(ANSWER_MAX), stderr.take(ANSWER_MAX));
        let _ = tokio::join!(stdout.read_to_end(&mut out), stderr.read_to_end(&mut err));
        child.wait().await
    };
    let status = tokio::time::timeout(PROBE_MAX, asked)
        .await
        .map_err(|_| format!("{} said nothing for {PROBE_MAX:?}", python.display()))?
        .map_err(|error| error.to_string())?;
    if !status.success() {
        let words = String::from_utf8_lossy(&err);
        let last = words.lines().rfind(|line| !line.trim().is_empty());
        let last: String = last.unwrap_or("no word").chars().take(200).collect();
        return Err(format!("{} ended with {status}: {last}", python.display()));
    }
    let answer: Answer = serde_json::from_slice(&out)
        .map_err(|error| format!("{} answered nonsense: {error}", python.display()))?;
    let plain = |text: &String| text.len() <= 64 && !text.chars().any(char::is_control);
    if answer.reads.len() > READS_MAX
        || ![&answer.torch, &answer.transformers, &answer.peft]
            .into_iter()
            .chain(&answer.gpus)
            .all(plain)
    {
        return Err(format!("{} answered nonsense", python.display()));
    }
    Ok(Provided {
        python: python.to_owned(),
        reads: answer.reads,
        torch: answer.torch,
        transformers: answer.transformers,
        peft: answer.peft,
        gpus: answer.gpus,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[tokio::test]
    async fn what_is_no_trainer_is_refused_in_its_own_words() {
        let dir = tempfile::tempdir().unwrap();
        for (name, script, says) in [
            (
                "lacks",
                "echo 'ModuleNotFoundError: No module named torch' >&2; exit 1",
                "No module named torch",
            ),
            ("babbles", "echo hello", "answered nonsense"),
            (
                "brags",
                "echo '{\"reads\":[],\"torch\":\"2\\u0007\",\"transformers\":\"5\",\"peft\":\"0\",\"gpus\":[]}'",
                "answered nonsense",
            ),
        ] {
            let path = dir.path().join(name);
            std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
            let why = probe(&path).await.unwrap_err();
            assert!(why.contains(says), "{why} lacks {says}");
        }
        let why = probe(Path::new("/no/such/python")).await.unwrap_err();
        assert!(why.contains("does not start"), "{why}");
    }
}
