//! A batch file as a job's input without HTTP: for `karez submit`.
use super::{
    lines::{Endpoint, Translated, translate},
    outputs::{About, answer},
};
use crate::gateway::{error::ApiError, work::now};
use serde_json::{Map, Value};
use std::path::Path;
use tempfile::NamedTempFile;

/// A batch file in OpenAI's format, as the input of a job: for whoever submits one without HTTP.
#[derive(Debug)]
pub struct BatchFile {
    /// Its lines.
    pub lines: u64,
    /// The model that all of them name.
    pub model: String,
    /// The most that any line wants written.
    pub tokens_max: u32,
    endpoint: Endpoint,
}

impl BatchFile {
    /// Reads and checks the file at `input`; the job's input is put together in `dir` and goes away with its handle. An
    /// error names the line.
    pub fn read(input: &Path, dir: &Path) -> Result<(NamedTempFile, Self), String> {
        let text = |e: ApiError| {
            e.json()["error"]["message"]
                .as_str()
                .unwrap_or_default()
                .to_owned()
        };
        let endpoint = Endpoint::of_file(input).map_err(text)?;
        let Translated {
            file,
            lines,
            model,
            tokens_max,
        } = translate(dir, input, endpoint).map_err(text)?;
        let batch = Self {
            lines,
            model,
            tokens_max,
            endpoint,
        };
        Ok((file, batch))
    }

    /// Texts are to become vectors.
    pub fn embeds(&self) -> bool {
        self.endpoint == Endpoint::Embeddings
    }

    /// Prompts are continued as they stand.
    pub fn is_raw(&self) -> bool {
        self.endpoint == Endpoint::Completions
    }

    /// A result line as OpenAI's batch output has it. `id` names the batch.
    pub fn answer(&self, id: &str, result: &Map<String, Value>) -> Value {
        let about = About {
            id: id.to_owned(),
            endpoint: self.endpoint,
            model: self.model.clone(),
            created_at: now(),
        };
        let index = result.get("index").and_then(Value::as_u64).unwrap_or(0);
        answer(&about, index, result, None).0
    }
}
