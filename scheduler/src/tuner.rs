//! The trainer's knowledge, in a process of its own: the scheduler imports no engine, and what it is asked here reads
//! strangers' files.
//!
//! One process answers one question: JSON on its standard input, JSON on its standard output. `karez tuner` is that
//! program; the types of the conversation stand here, so that both ends share them. Start at `Tuner::ask`.
use karez_core::unit::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::{
    collections::BTreeMap, ffi::OsString, io, path::PathBuf, process::Stdio, sync::Arc, time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    process::Command,
    sync::Semaphore,
    time::timeout,
};

/// A question is answered within this, or given up.
const ANSWER_MAX: Duration = Duration::from_secs(10 * 60);
/// Questions under way at once; others wait. Each may hold a base model in memory.
const AT_ONCE: usize = 1;
/// Bytes of an answer at most: the losses of a long run are most of it.
const ANSWER_BYTES_MAX: u64 = 64 << 20;
/// Bytes of what a process complains about that are kept.
const COMPLAINT_BYTES_MAX: u64 = 4 << 10;

/// The program that answers: `karez tuner`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TunerProgram {
    /// The executable.
    pub path: PathBuf,
    /// What to start it with.
    pub args: Vec<OsString>,
}

impl TunerProgram {
    /// `path tuner`: the `karez` binary itself.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            args: vec!["tuner".into()],
        }
    }
}

/// What can be asked. `memory` bounds the private memory of the process that answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Question {
    /// Bytes.
    pub memory: u64,
    /// The question itself.
    pub what: Ask,
}

/// What is asked. Nothing but the named paths is read; only `folder` is written to.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Ask {
    /// Do base, data and settings fit together, and how long is the run?
    Check {
        /// The base model's folder.
        base: PathBuf,
        /// JSON lines.
        data: PathBuf,
        /// Under the trainer's own names.
        settings: Map<String, Value>,
        /// Of lines that name none; empty when unknown.
        language: String,
    },
    /// How far has a run got?
    Read {
        /// A checkpoint's file.
        checkpoint: PathBuf,
    },
    /// Write the base model as [`BASE_FILE`].
    Base {
        /// Its folder.
        base: PathBuf,
        /// Where to write.
        folder: PathBuf,
    },
    /// Write a checkpoint's adapter as [`ADAPTER_FILE`].
    Adapter {
        /// The base model's folder.
        base: PathBuf,
        /// A checkpoint's file.
        checkpoint: PathBuf,
        /// What the adapter calls itself.
        name: String,
        /// Digest of the GGUF file that it goes over.
        over: String,
        /// Where to write.
        folder: PathBuf,
    },
}

/// The base model that [`Ask::Base`] writes.
pub const BASE_FILE: &str = "base.gguf";
/// The adapter that [`Ask::Adapter`] writes.
pub const ADAPTER_FILE: &str = "adapter.gguf";

/// What is answered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Told {
    /// To [`Ask::Check`].
    Checked(Outline),
    /// To [`Ask::Read`].
    Read(Progress),
    /// To [`Ask::Base`] and [`Ask::Adapter`].
    Written,
    /// What was given is at fault.
    Refused {
        /// What of it.
        what: Fault,
        /// Why, in words for whoever asked.
        why: String,
    },
}

/// Which part of a question is at fault.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// The setting of that name.
    Setting(String),
    /// Lines of the data.
    Data,
    /// The base model.
    Base,
    /// A checkpoint.
    Checkpoint,
}

/// What is known of a run before it begins.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outline {
    /// All settings, as an order holds them.
    pub settings: String,
    /// Steps in all.
    pub steps: u64,
    /// Steps between two checkpoints.
    pub steps_per_part: u32,
    /// Tokens of one step, about.
    pub tokens_per_step: u32,
    /// Examples to train on.
    pub examples: u64,
    /// Examples held out.
    pub held_out: u64,
    /// Times the data is gone through.
    pub epochs: u64,
    /// Bytes of memory that the run takes.
    #[serde(default)]
    pub memory: u64,
    /// What a researcher should know of the data.
    pub notices: Vec<String>,
}

/// How far a run has got.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Mean cross-entropy of every step's targets, in nats.
    pub losses: Vec<f32>,
    /// The same of what was held out, by the steps after which it was looked at.
    pub held_out: BTreeMap<u64, f64>,
    /// Tokens that went through the model.
    pub tokens: u64,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum TunerError {
    /// No trainer here.
    #[error("this scheduler was built without a trainer")]
    None,
    /// The process cannot be run.
    #[error("the trainer's process: {0}")]
    Process(#[from] io::Error),
    /// It took too long.
    #[error("the trainer's process took longer than {} minutes", ANSWER_MAX.as_secs() / 60)]
    Late,
    /// It ended without an answer.
    #[error("the trainer's process ended with {status}: {said}")]
    Ended {
        /// How.
        status: String,
        /// The end of what it complained about.
        said: String,
    },
}

/// Asks, one question at a time.
#[derive(Debug, Clone)]
pub(crate) struct Tuner {
    program: Option<TunerProgram>,
    places: Arc<Semaphore>,
}

impl Tuner {
    pub(crate) fn new(program: Option<TunerProgram>) -> Self {
        Self {
            program,
            places: Arc::new(Semaphore::new(AT_ONCE)),
        }
    }

    /// Puts one question to a process of its own, which may hold `memory`. The process ends with the future.
    pub(crate) async fn ask(&self, what: Ask, memory: Bytes) -> Result<Told, TunerError> {
        let program = self.program.as_ref().ok_or(TunerError::None)?;
        // Never closed.
        let _place = self.places.acquire().await;
        let question = Question {
            memory: memory.0,
            what,
        };
        let text = serde_json::to_vec(&question).map_err(io::Error::other)?;
        let mut child = Command::new(&program.path)
            .args(&program.args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let (Some(mut input), Some(output), Some(complaints)) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            return Err(io::Error::other("its pipes are missing").into());
        };
        let talk = async {
            let asked = async move {
                // A process that dies early says why itself.
                let _ = input.write_all(&text).await;
            };
            let (mut answer, mut said) = (Vec::new(), Vec::new());
            let (mut output, mut head) = (
                output.take(ANSWER_BYTES_MAX),
                complaints.take(COMPLAINT_BYTES_MAX),
            );
            let heard = output.read_to_end(&mut answer);
            let complained = async {
                let read = head.read_to_end(&mut said).await;
                // What is beyond is thrown away, so that the process never waits for a reader.
                let mut rest = head.into_inner();
                tokio::io::copy(&mut rest, &mut tokio::io::sink()).await?;
                read
            };
            let ((), heard, complained) = tokio::join!(asked, heard, complained);
            heard?;
            complained?;
            let status = child.wait().await?;
            Ok::<_, io::Error>((status, answer, said))
        };
        let (status, answer, said) = timeout(ANSWER_MAX, talk).await.map_err(|_| TunerError::Late)??;
        match serde_json::from_slice(&answer) {
            Ok(told) if status.success() => Ok(told),
            _ => Err(TunerError::Ended {
                status: status.to_string(),
                said: String::from_utf8_lossy(&said).trim().replace('\n', "; "),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Tuner {
        Tuner::new(Some(TunerProgram {
            path: "/bin/sh".into(),
            args: vec!["-c".into(), script.into()],
        }))
    }

    fn read() -> Ask {
        Ask::Read {
            checkpoint: "/nowhere".into(),
        }
    }

    #[tokio::test]
    async fn a_process_that_dies_says_what_it_complained_about() {
        let tuner = shell("cat > /dev/null; echo out of memory >&2; exit 3");
        let error = tuner.ask(read(), Bytes(1)).await.unwrap_err().to_string();
        assert!(error.contains("out of memory") && error.contains('3'), "{error}");
        let tuner = shell("cat > /dev/null; echo rubbish");
        assert!(matches!(
            tuner.ask(read(), Bytes(1)).await,
            Err(TunerError::Ended { .. })
        ));
        let error = Tuner::new(None).ask(read(), Bytes(1)).await.unwrap_err();
        assert!(error.to_string().contains("without a trainer"));
    }

    #[tokio::test]
    async fn the_question_arrives_and_the_answer_comes_back() {
        // Answers only when it was asked for that file, however much it complains meanwhile.
        let tuner = shell(
            "head -c 100000 /dev/zero >&2; grep -q '\"do\":\"read\".*nowhere' && echo '{\"read\":{\"losses\":[2.5],\"held_out\":{\"0\":3.5},\"tokens\":7}}'",
        );
        let told = tuner.ask(read(), Bytes(1)).await.unwrap();
        let Told::Read(progress) = told else {
            panic!("{told:?}")
        };
        assert_eq!((progress.losses, progress.tokens), (vec![2.5], 7));
        assert_eq!(progress.held_out[&0], 3.5);
    }
}
