//! Lines of a batch as those of a job's input, one by one: a million take no more memory than ten.
use crate::gateway::{ask, chat, completions, error::ApiError, files::scratch};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::{
    collections::HashSet,
    hash::{BuildHasher, RandomState},
    io::{BufRead, BufReader, BufWriter, Read, Write},
    path::Path,
};
use tempfile::NamedTempFile;

/// Lines of one batch at most.
const LINES_MAX: u64 = 2_000_000;

/// What the lines ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Endpoint {
    #[serde(rename = "/v1/chat/completions")]
    Chat,
    #[serde(rename = "/v1/completions")]
    Completions,
    #[serde(rename = "/v1/embeddings")]
    Embeddings,
}

impl Endpoint {
    pub(super) fn path(self) -> &'static str {
        match self {
            Self::Chat => "/v1/chat/completions",
            Self::Completions => "/v1/completions",
            Self::Embeddings => "/v1/embeddings",
        }
    }

    /// What the first line asks for.
    pub(super) fn of_file(path: &Path) -> Result<Self, ApiError> {
        let disk = |e: std::io::Error| ApiError::request(format!("the file cannot be read: {e}"));
        let mut first = Vec::new();
        BufReader::new(std::fs::File::open(path).map_err(disk)?)
            .take(ask::LINE_MAX as u64)
            .read_until(b'\n', &mut first)
            .map_err(disk)?;
        let line: Map<String, Value> = serde_json::from_slice(&first)
            .map_err(|e| ApiError::request(format!("is no JSON object: {e}")).at_line(1))?;
        match ask::some(&line, "url") {
            None => Ok(Self::Chat),
            Some(url) => serde_json::from_value(url.clone()).map_err(|_| {
                let why = "must be /v1/chat/completions, /v1/completions or /v1/embeddings";
                ApiError::param("url", why).at_line(1)
            }),
        }
    }
}

/// What all lines have in common, found out on the way.
pub(super) struct Translated {
    pub(super) file: NamedTempFile,
    pub(super) lines: u64,
    pub(super) model: String,
    /// The most that any line wants written: what one is reckoned with.
    pub(super) tokens_max: u32,
}

/// The lines of a batch as those of a job's input.
pub(super) fn translate(dir: &Path, input: &Path, endpoint: Endpoint) -> Result<Translated, ApiError> {
    let disk = |e: std::io::Error| ApiError::unavailable(format!("the scheduler's disk: {e}"));
    let mut from = BufReader::with_capacity(256 << 10, std::fs::File::open(input).map_err(disk)?);
    let mut to = BufWriter::with_capacity(256 << 10, scratch(dir)?);
    let hasher = RandomState::new();
    // Eight bytes for each id: of two million, two differ and collide once in ten million batches.
    let mut ids = HashSet::new();
    let (mut lines, mut number, mut model, mut line) = (0, 0u64, None::<String>, Vec::new());
    let mut tokens_max = 0;
    loop {
        line.clear();
        let most = ask::LINE_MAX as u64 + 2;
        let got = (&mut from)
            .take(most)
            .read_until(b'\n', &mut line)
            .map_err(disk)?;
        if got == 0 {
            break;
        }
        number += 1;
        if line.trim_ascii().is_empty() {
            continue;
        }
        let at = |error: ApiError| error.at_line(number);
        if line.len() as u64 >= most {
            return Err(at(ApiError::request(format!(
                "is longer than {} bytes",
                ask::LINE_MAX
            ))));
        }
        let (id, name, out) = one(&line, endpoint).map_err(at)?;
        if !ids.insert(hasher.hash_one(&id)) {
            return Err(at(ApiError::param(
                "custom_id",
                format!("{id:?} stands on an earlier line too"),
            )));
        }
        match &model {
            None => model = Some(name),
            Some(first) if *first != name => {
                let why = format!("is {name:?}, the lines before it say {first:?}: one model for each batch");
                return Err(at(ApiError::param("body.model", why)));
            }
            Some(_) => {}
        }
        lines += 1;
        if lines > LINES_MAX {
            return Err(ApiError::request(format!(
                "the batch has more than {LINES_MAX} lines: cut it"
            )));
        }
        tokens_max = tokens_max.max(chat::tokens_max(&out).map_err(at)?);
        let out = Value::Object(out).to_string();
        if out.len() > ask::LINE_MAX {
            return Err(at(ApiError::request(format!(
                "is longer than {} bytes",
                ask::LINE_MAX
            ))));
        }
        writeln!(to, "{out}").map_err(disk)?;
    }
    let model = model.ok_or_else(|| ApiError::request("the batch has no lines"))?;
    let file = to.into_inner().map_err(|e| disk(e.into_error()))?;
    Ok(Translated {
        file,
        lines,
        model,
        tokens_max,
    })
}

/// One line: its id, its model, and what the job's input says instead.
fn one(line: &[u8], endpoint: Endpoint) -> Result<(String, String, Map<String, Value>), ApiError> {
    let line: Map<String, Value> =
        serde_json::from_slice(line).map_err(|e| ApiError::request(format!("is no JSON object: {e}")))?;
    let id = match ask::text(&line, "custom_id")? {
        Some(id) if (1..=512).contains(&id.len()) => id.to_owned(),
        _ => return Err(ApiError::param("custom_id", "must be a text of 1 to 512 bytes")),
    };
    if ask::text(&line, "method")?.is_some_and(|method| method != "POST") {
        return Err(ApiError::param("method", "must be POST"));
    }
    if ask::text(&line, "url")?.is_some_and(|url| url != endpoint.path()) {
        return Err(ApiError::param(
            "url",
            format!("must be {}, as the batch says", endpoint.path()),
        ));
    }
    let Some(Value::Object(body)) = line.get("body") else {
        return Err(ApiError::param("body", "must be an object"));
    };
    let inside = |error: ApiError| error.inside("body");
    let model = ask::text(body, "model").map_err(inside)?;
    let model = model
        .ok_or_else(|| inside(ApiError::param("model", "is missing")))?
        .to_owned();
    let mut out = match endpoint {
        Endpoint::Chat => chat::chat_line(body).map_err(inside)?,
        Endpoint::Completions => {
            let mut out = completions::sampling(body).map_err(inside)?;
            let prompt = ask::text(body, "prompt").map_err(inside)?;
            let prompt = prompt.ok_or_else(|| inside(ApiError::param("prompt", "must be a text")))?;
            out.insert("prompt".into(), prompt.into());
            out
        }
        Endpoint::Embeddings => {
            let text = ask::text(body, "input").map_err(inside)?;
            let text = text.ok_or_else(|| inside(ApiError::param("input", "must be a text")))?;
            if ask::text(body, "encoding_format")
                .map_err(inside)?
                .is_some_and(|form| form != "float")
            {
                return Err(inside(ApiError::param(
                    "encoding_format",
                    "must be float in a batch",
                )));
            }
            Map::from_iter([("text".to_owned(), text.into())])
        }
    };
    out.insert("id".into(), id.clone().into());
    Ok((id, model, out))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn chat(id: &str, model: &str) -> String {
        json!({"custom_id": id, "method": "POST", "url": "/v1/chat/completions",
               "body": {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}})
        .to_string()
    }

    fn translated(text: &str) -> Result<(u64, String), String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("in");
        std::fs::write(&path, text).unwrap();
        translate(dir.path(), &path, Endpoint::Chat)
            .map(|t| {
                // One line at least says 3, and none says more.
                assert_eq!(t.tokens_max, 3);
                (t.lines, std::fs::read_to_string(t.file.path()).unwrap())
            })
            .map_err(|e| e.json()["error"]["message"].as_str().unwrap().to_owned())
    }

    #[test]
    fn lines_keep_their_ids_and_their_wishes() {
        let (lines, text) = translated(&format!("{}\n\n{}\n", chat("a", "m"), chat("b", "m"))).unwrap();
        assert_eq!(lines, 2);
        let first: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        assert_eq!((&first["id"], &first["max_tokens"]), (&json!("a"), &json!(3)));
        assert_eq!(first["messages"][0]["content"], "hi");
    }

    #[test]
    fn a_bad_line_is_named_with_its_field() {
        let good = chat("a", "m");
        for (line, says) in [
            ("{".to_owned(), &["line 2", "JSON"][..]),
            (chat("a", "m"), &["line 2", "custom_id", "earlier"]),
            (chat("b", "other"), &["line 2", "body.model", "one model"]),
            (json!({"body": {}}).to_string(), &["line 2", "custom_id"]),
            (json!({"custom_id": "b"}).to_string(), &["line 2", "body"]),
            (
                json!({"custom_id": "b", "url": "/v1/embeddings", "body": {}}).to_string(),
                &["line 2", "url"],
            ),
            (
                json!({"custom_id": "b", "body": {"model": "m", "messages": [], "temperature": 1}}).to_string(),
                &["line 2", "body.messages"],
            ),
            (
                json!({"custom_id": "b", "body": {"model": "m", "messages": [{"role": "user"}], "temperature": 99}})
                    .to_string(),
                &["line 2", "body.temperature"],
            ),
        ] {
            let error = translated(&format!("{good}\n{line}\n")).unwrap_err();
            for word in says {
                assert!(error.contains(word), "{word} is not in {error}");
            }
        }
        assert!(translated("\n").unwrap_err().contains("no lines"));
    }
}
