//! Result lines as OpenAI's: what was answered and what was refused, each once and in the order of the input.
use super::lines::Endpoint;
use crate::gateway::{completions, error::ApiError, files::scratch, work};
use serde_json::{Map, Value, json};
use std::{
    io::{BufRead, BufReader, BufWriter, Read, Write},
    path::{Path, PathBuf},
};
use tempfile::NamedTempFile;

/// Bytes of one result line at most.
const RESULT_MAX: u64 = 16 << 20;

pub(super) type Written = (NamedTempFile, u64);

/// Result lines as OpenAI's: what was answered, and what was refused, both in the order of the input.
pub(super) fn outputs(
    dir: &Path,
    about: &About,
    lines: u64,
    parts: &[(PathBuf, Value)],
) -> Result<(Written, Written), ApiError> {
    let disk = |e: std::io::Error| ApiError::unavailable(format!("the scheduler's disk: {e}"));
    let (mut good, mut bad) = (BufWriter::new(scratch(dir)?), BufWriter::new(scratch(dir)?));
    let (mut goods, mut bads, mut line) = (0, 0, Vec::new());
    for (path, place) in parts {
        let mut from = BufReader::new(std::fs::File::open(path).map_err(disk)?);
        loop {
            line.clear();
            let got = (&mut from)
                .take(RESULT_MAX)
                .read_until(b'\n', &mut line)
                .map_err(disk)?;
            if got == 0 {
                break;
            }
            let result: Map<String, Value> = serde_json::from_slice(&line)
                .map_err(|e| ApiError::server(format!("result {} is broken: {e}", goods + bads + 1)))?;
            let index = goods + bads;
            if result.get("index").and_then(Value::as_u64) != Some(index) {
                return Err(ApiError::server(format!(
                    "result {} belongs to another line",
                    index + 1
                )));
            }
            let (to, count, answer) = match answer(about, index, &result, Some(place)) {
                (answer, true) => (&mut good, &mut goods, answer),
                (answer, false) => (&mut bad, &mut bads, answer),
            };
            writeln!(to, "{answer}").map_err(disk)?;
            *count += 1;
        }
    }
    if goods + bads != lines {
        let why = format!("{} of {lines} lines were answered", goods + bads);
        return Err(ApiError::server(why));
    }
    let done = |file: BufWriter<NamedTempFile>| file.into_inner().map_err(|e| disk(e.into_error()));
    Ok(((done(good)?, goods), (done(bad)?, bads)))
}

/// What the answers of one batch have in common.
#[derive(Debug, Clone)]
pub(super) struct About {
    pub(super) id: String,
    pub(super) endpoint: Endpoint,
    pub(super) model: String,
    pub(super) created_at: u64,
}

/// One line of an output file; false for an error file.
pub(super) fn answer(
    batch: &About,
    index: u64,
    result: &Map<String, Value>,
    place: Option<&Value>,
) -> (Value, bool) {
    let request = format!("{}-{index}", batch.id);
    let custom_id = result.get("id").cloned().unwrap_or_default();
    let (status, body) = match result.get("error") {
        Some(error) => {
            let of = |name| error.get(name).and_then(Value::as_str).unwrap_or_default();
            (400, ApiError::line(of("kind"), of("message")).json())
        }
        None => (200, body(batch, &request, result)),
    };
    let mut line = json!({
        "id": request, "custom_id": custom_id,
        "response": {"status_code": status, "request_id": request, "body": body},
        "error": null,
    });
    if let Some(place) = place {
        line["karez"] = place.clone();
    }
    (line, status == 200)
}

fn body(batch: &About, request: &str, result: &Map<String, Value>) -> Value {
    let number = |name| result.get(name).and_then(Value::as_u64).unwrap_or(0);
    let (tokens_in, tokens_out) = (number("tokens_in"), number("tokens_out"));
    let usage = json!({
        "prompt_tokens": tokens_in, "completion_tokens": tokens_out, "total_tokens": tokens_in + tokens_out,
    });
    let text = result.get("text").cloned().unwrap_or_default();
    let (model, created, finish) = (&batch.model, batch.created_at, work::finish(result));
    match batch.endpoint {
        Endpoint::Chat => json!({
            "id": format!("chatcmpl-{request}"), "object": "chat.completion", "created": created, "model": model,
            "choices": [{
                "index": 0, "message": {"role": "assistant", "content": text, "refusal": null},
                "logprobs": result.get("logprobs").map(|logs| json!({"content": logs, "refusal": null})),
                "finish_reason": finish,
            }],
            "usage": usage,
        }),
        Endpoint::Completions => json!({
            "id": format!("cmpl-{request}"), "object": "text_completion", "created": created, "model": model,
            "choices": [{
                "index": 0, "text": text, "finish_reason": finish,
                "logprobs": result.get("logprobs").map(completions::logprobs),
            }],
            "usage": usage,
        }),
        Endpoint::Embeddings => json!({
            "object": "list", "model": model,
            "data": [{"object": "embedding", "index": 0, "embedding": result.get("embedding")}],
            // Texts are computed together, and metered so.
            "usage": null,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn about() -> About {
        About {
            id: "batch_1".into(),
            endpoint: Endpoint::Chat,
            model: "m".into(),
            created_at: 1,
        }
    }

    #[test]
    fn results_must_be_each_line_once_and_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let part = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            (path, json!({"node": name}))
        };
        let good = r#"{"index":0,"id":"a","text":"x","tokens_in":1,"tokens_out":2,"finish":"stop"}"#;
        let bad = r#"{"index":1,"id":"b","error":{"kind":"context_overflow","message":"too long"}}"#;
        let parts = [
            part("one", &format!("{good}\n")),
            part("two", &format!("{bad}\n")),
        ];
        let ((good, goods), (bad, bads)) = outputs(dir.path(), &about(), 2, &parts).unwrap();
        assert_eq!((goods, bads), (1, 1));
        let read = |file: &NamedTempFile| -> Value {
            serde_json::from_str(std::fs::read_to_string(file.path()).unwrap().trim()).unwrap()
        };
        let (good, bad) = (read(&good), read(&bad));
        assert_eq!(
            (&good["custom_id"], &bad["custom_id"]),
            (&json!("a"), &json!("b"))
        );
        assert_eq!(good["response"]["body"]["choices"][0]["message"]["content"], "x");
        assert_eq!(
            bad["response"]["body"]["error"]["code"],
            "context_length_exceeded"
        );
        assert_eq!(bad["karez"]["node"], "two");
        // One too few, one twice.
        assert!(outputs(dir.path(), &about(), 3, &parts).is_err());
        let twice = [parts[0].clone(), parts[0].clone()];
        assert!(outputs(dir.path(), &about(), 2, &twice).is_err());
    }
}
