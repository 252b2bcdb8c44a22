//! The messages between a node and its worker process, and the frames they travel in.
//!
//! Frames are a little-endian `u32` length and that many bytes of JSON, at most [`FRAME_MAX`]. The node writes
//! [`Request`]s to the worker's standard input and reads [`Reply`]s from its standard output; standard error
//! carries log lines. One worker loads one model, once. It answers as many generations at a time as it has sequences
//! ([`Load::sequences`]), and other work in the order of arrival.
//!
//! Not here: the process itself (`client` and `worker`).
mod generate;
mod train;

pub use generate::{
    Adapter, BIASES_MAX, Finish, Generate, JsonSchema, Message, Piece, Prompt, ResponseFormat,
    STOP_BYTES_MAX, STOPS_MAX, TOP_LOGPROBS_MAX, TokenLogprob, TopLogprob,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::io::{self, Read, Write};
use std::path::PathBuf;
pub use train::{Checkpointed, Progress, Train};

use crate::error::EngineError;
use crate::unit::{Bytes, Millis};

/// Bytes of a frame at most, its length not counted. Checked before anything is allocated.
pub const FRAME_MAX: usize = 16 << 20;
/// Runs a worker holds at most, the one in progress counted. One more is answered [`EngineError::Busy`].
pub const RUNS_MAX: usize = 256;
/// Sequences of one worker at most.
pub const SEQUENCES_MAX: u16 = 64;
/// Texts of one [`Work::Embed`] at most.
pub const TEXTS_MAX: usize = 1024;

/// Names a run within one worker; chosen by the node and never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RunId(pub u64);

/// What a model is loaded for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LoadKind {
    /// Text generation from a GGUF file.
    Generate,
    /// Sentence vectors from a safetensors directory or a GGUF file.
    Embed,
    /// Training on a Hugging Face directory.
    Train,
    /// Counting tokens with a `tokenizer.json`.
    Count,
    /// No model: waits for a given time. For tests and for measuring the network itself.
    Noop,
}

/// Which model to load, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Load {
    /// A GGUF file, or a directory with `config.json`, `tokenizer.json` and `model.safetensors`. Ignored for no-ops.
    pub model: PathBuf,
    /// What it is for.
    pub kind: LoadKind,
    /// Tokens of context; the model's own length, 8192 at most, when absent. Never more than the model was made for.
    pub context_tokens: Option<u32>,
    /// Threads to compute with; what this process may use when absent.
    pub threads: Option<u16>,
    /// Memory the model may use. Checked against an estimate before loading, then enforced on private memory.
    pub memory_limit: Option<Bytes>,
    /// Layers to put on a GPU when the build has a GPU back end; all that fit when absent.
    pub gpu_layers: Option<u32>,
    /// Generations computed at a time; 1 when absent, [`SEQUENCES_MAX`] at most. With 1, an answer does not depend
    /// on the worker's other work to the last bit; with more, up to rounding.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sequences: Option<u16>,
    /// Tokens that all sequences together can hold; `context_tokens` when absent, and never less.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_tokens: Option<u32>,
    /// A directory whose files the worker may read too: the adapters that requests name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapters: Option<PathBuf>,
    /// Memory that adapters may take together beside the model: those that no request uses make room. No limit when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter_memory: Option<Bytes>,
    /// A directory that a training worker may read and write: data and checkpoints come and go there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scratch: Option<PathBuf>,
    /// The trainer to train with, when it is not our own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trainer: Option<crate::provided::Provided>,
    /// The model's BLAKE3 digest in hexadecimal. With it, adapters that name another base are refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
}

impl Load {
    /// A load with everything left to the worker.
    pub fn new(kind: LoadKind, model: impl Into<PathBuf>) -> Self {
        Self {
            model: model.into(),
            kind,
            context_tokens: None,
            threads: None,
            memory_limit: None,
            gpu_layers: None,
            sequences: None,
            cache_tokens: None,
            adapters: None,
            adapter_memory: None,
            scratch: None,
            trainer: None,
            digest: None,
        }
    }

    /// Tokens that the cache holds, when one run may hold `context_tokens`.
    pub fn cache_for(&self, context_tokens: u32) -> u32 {
        self.cache_tokens.unwrap_or(0).max(context_tokens)
    }
}

/// What the node asks of its worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Request {
    /// Load a model. The first request, and the only one of its kind.
    Load(Load),
    /// Do one item of work.
    Run {
        /// Its name.
        id: RunId,
        /// What to do.
        work: Work,
    },
    /// Stop a run, in progress or waiting. Unknown ids are ignored: the run may just have ended.
    Cancel {
        /// Its name.
        id: RunId,
    },
    /// End the process now.
    Shutdown,
}

/// One item of work.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Work {
    /// Continue a text or answer a chat.
    Generate(Generate),
    /// Turn texts into vectors.
    Embed {
        /// At most [`TEXTS_MAX`].
        texts: Vec<String>,
    },
    /// Take training steps.
    Train(Train),
    /// Say how many tokens texts have, none added at their ends.
    Count {
        /// At most [`TEXTS_MAX`].
        texts: Vec<String>,
    },
    /// Wait.
    Noop {
        /// For how long.
        wait: Millis,
    },
}

/// What the worker says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Reply {
    /// The model is loaded and the sandbox closed.
    Ready(ModelFacts),
    /// The worker is at work, and has nothing to show for it yet.
    Alive,
    /// A piece of an answer.
    Token {
        /// The run.
        id: RunId,
        /// The piece.
        piece: Piece,
    },
    /// A run is finished.
    Done {
        /// The run.
        id: RunId,
        /// Its result.
        output: Output,
        /// What it took.
        meters: Meters,
    },
    /// A run, or the load when `id` is absent, came to nothing.
    Failed {
        /// The run.
        id: Option<RunId>,
        /// Why.
        error: EngineError,
        /// What it took all the same.
        meters: Meters,
    },
}

/// What a run produced.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Output {
    /// The whole answer, equal to its streamed pieces put together.
    Text {
        /// The answer.
        text: String,
        /// Why it ended.
        finish: Finish,
        /// One for each token, when asked for.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        logprobs: Vec<TokenLogprob>,
    },
    /// One unit-length vector for each text, in the order of the texts.
    Vectors {
        /// The vectors.
        vectors: Vec<Vec<f32>>,
        /// How many texts were longer than the model's positions and were cut.
        truncated: u32,
    },
    /// How many tokens each text has, in the order of the texts.
    Counts {
        /// The numbers.
        tokens: Vec<u64>,
    },
    /// A checkpoint lies where it was asked for. A training run that is cancelled ends with one too.
    Checkpoint(Checkpointed),
    /// Nothing, as asked.
    Nothing,
}

/// What a run took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meters {
    /// Tokens read, those found in the cache counted.
    pub tokens_in: u64,
    /// Tokens generated.
    pub tokens_out: u64,
    /// Tokens of `tokens_in` that needed no computing.
    pub tokens_cached: u64,
    /// Processor time of all the worker's threads for the run. A step that several runs share is divided among them
    /// by their tokens in it, so that all runs together never cost more than the worker took.
    pub cpu_ms: Millis,
    /// Time on the wall for the run, divided in the same way; waiting is not counted.
    pub wall_ms: Millis,
    /// The largest resident size of the process so far.
    pub peak_rss: Bytes,
}

/// What is known of a loaded model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelFacts {
    /// As the file calls it.
    pub name: String,
    /// Its architecture: `llama`, `qwen2`, `bert` …
    pub architecture: String,
    /// Tokens one run can hold.
    pub context_tokens: u32,
    /// Numbers in its weights.
    pub parameters: u64,
    /// Length of its vectors, for embedding models.
    pub dimensions: Option<u32>,
    /// The estimate that was checked against the limit.
    pub memory_estimate: Bytes,
    /// Engine, its version and the instruction set it was built for. Exact comparison of results holds within one
    /// such string and one number of threads.
    pub engine: String,
    /// Threads it computes with.
    pub threads: u16,
    /// The isolation that was really applied.
    pub isolation: Isolation,
}

/// How a worker is cut off from its machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Isolation {
    /// An ordinary process.
    #[serde(rename = "none")]
    None,
    /// No sockets, no new programs, no tracing; files are open to it as to the node.
    #[serde(rename = "seccomp")]
    Seccomp,
    /// And of the file system, only its model can be read and nothing written.
    #[serde(rename = "landlock+seccomp")]
    LandlockSeccomp,
}

impl std::fmt::Display for Isolation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Seccomp => "seccomp",
            Self::LandlockSeccomp => "landlock+seccomp",
        })
    }
}

/// A frame of `message`, length included, ready to be written.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, EngineError> {
    let mut frame = vec![0; 4];
    serde_json::to_writer(&mut frame, message).map_err(EngineError::protocol)?;
    let length = frame.len() - 4;
    if length > FRAME_MAX {
        return Err(EngineError::protocol(format!(
            "a message of {length} bytes exceeds the {FRAME_MAX} of a frame"
        )));
    }
    frame[..4].copy_from_slice(&(length as u32).to_le_bytes());
    Ok(frame)
}

/// The length in a frame's first four bytes, if it may be that long.
pub fn frame_length(header: [u8; 4]) -> Result<usize, EngineError> {
    let length = u32::from_le_bytes(header) as usize;
    if length > FRAME_MAX {
        return Err(EngineError::protocol(format!(
            "a frame of {length} bytes was announced, {FRAME_MAX} are allowed"
        )));
    }
    Ok(length)
}

/// The message in a frame's bytes, length not included.
pub fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, EngineError> {
    serde_json::from_slice(body)
        .map_err(|error| EngineError::protocol(format!("unreadable message: {error}")))
}

/// Writes one message and flushes.
pub fn write<T: Serialize>(to: &mut impl Write, message: &T) -> Result<(), EngineError> {
    let frame = encode(message)?;
    to.write_all(&frame)
        .and_then(|()| to.flush())
        .map_err(EngineError::protocol)
}

/// Reads one message; `None` at the end of the stream.
pub fn read<T: DeserializeOwned>(from: &mut impl Read) -> Result<Option<T>, EngineError> {
    let mut header = [0; 4];
    let mut got = 0;
    while got < 4 {
        match from.read(&mut header[got..]) {
            Ok(0) if got == 0 => return Ok(None),
            Ok(0) => return Err(EngineError::protocol("the stream ended inside a frame")),
            Ok(n) => got += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(EngineError::protocol(error)),
        }
    }
    let mut body = vec![0; frame_length(header)?];
    from.read_exact(&mut body)
        .map_err(|error| EngineError::protocol(format!("the stream ended inside a frame: {error}")))?;
    decode(&body).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_their_frame() {
        let request = Request::Run {
            id: RunId(7),
            work: Work::Generate(Generate {
                temperature: 0.1,
                seed: u64::MAX,
                ..Generate::greedy(
                    Prompt::Text {
                        text: "水 \0\"".into(),
                        system: None,
                    },
                    3,
                )
            }),
        };
        let mut bytes = Vec::new();
        write(&mut bytes, &request).unwrap();
        write(&mut bytes, &Request::Shutdown).unwrap();
        let mut stream = &bytes[..];
        assert_eq!(read::<Request>(&mut stream).unwrap(), Some(request));
        assert_eq!(read::<Request>(&mut stream).unwrap(), Some(Request::Shutdown));
        assert_eq!(read::<Request>(&mut stream).unwrap(), None);
    }

    #[test]
    fn vectors_are_exact() {
        let vector: Vec<f32> = (1..200).map(|i| (i as f32).sqrt().recip()).collect();
        let reply = Reply::Done {
            id: RunId(1),
            output: Output::Vectors {
                vectors: vec![vector],
                truncated: 0,
            },
            meters: Meters::default(),
        };
        let mut bytes = Vec::new();
        write(&mut bytes, &reply).unwrap();
        assert_eq!(read::<Reply>(&mut &bytes[..]).unwrap(), Some(reply));
    }

    #[test]
    fn garbage_is_refused_before_memory_is_taken() {
        for (name, bytes, says) in [
            ("huge", &b"\xff\xff\xff\xff{}"[..], "allowed"),
            ("one over", &[1, 0, 0, 1, b'{'], "allowed"),
            ("short header", &[1, 0], "inside a frame"),
            ("short body", &[9, 0, 0, 0, b'{'], "inside a frame"),
            ("not json", &[2, 0, 0, 0, b'{', b'x'], "unreadable"),
            ("not utf-8", &[2, 0, 0, 0, 0xff, 0xfe], "unreadable"),
            ("empty", &[0, 0, 0, 0], "unreadable"),
            ("unknown", b"\x0f\0\0\0{\"type\":\"gone\"}", "unreadable"),
        ] {
            let error = read::<Request>(&mut &bytes[..]).unwrap_err();
            assert!(error.to_string().contains(says), "{name}: {error}");
        }
        assert!(encode(&"x".repeat(FRAME_MAX)).is_err());
    }
}
