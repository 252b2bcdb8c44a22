//! `/v1/completions`: prompts as they stand, continued.
use super::{
    Answer, Caller, ask,
    ask::Wishes,
    chat::{stream, tokens_max, usage, with_usage},
    error::{ApiError, json_response},
    object,
    work::{self, Delta, Question, Writing, now, whereabouts},
};
use crate::mind::Shared;
use axum::{
    body::Body,
    extract::State,
    http::{HeaderMap, StatusCode},
};
use karez_core::records::{Generate, Work};
use serde_json::{Map, Value, json, value::RawValue};
use std::sync::Arc;

/// Prompts of one request at most.
const PROMPTS_MAX: usize = 256;

pub(super) async fn create(State(shared): State<Arc<Shared>>, headers: HeaderMap, body: Body) -> Answer {
    let caller = Caller::of(&shared, &headers).await?;
    let body = object(body).await?;
    let model = ask::model(&shared, &caller, &body).await?;
    let streaming = ask::flag(&body, "stream")?;
    let with_usage = with_usage(&body)?;
    let (prompts, sampling) = (prompts(&body)?, sampling(&body)?);
    let wishes = match prompts.len() {
        1 => Wishes::of_question(&body)?,
        _ => Wishes::of(&body)?,
    };
    let logprobs = sampling.contains_key("logprobs");
    let work = Generate {
        raw: true,
        stream: true,
        ..model.writes(tokens_max(&body)?)?
    };
    let name = model.name;
    let created = now();
    let line = |prompt: &str| {
        let mut line = sampling.clone();
        line.insert("prompt".into(), prompt.into());
        line
    };
    if let [prompt] = prompts.as_slice() {
        let question = Question {
            caller,
            work,
            line: line(prompt),
            wishes,
            label: "completion",
        };
        let writing = Writing::begin(&shared, question).await?;
        let id = format!("cmpl-{}", writing.job());
        if streaming {
            return Ok(stream(writing, chunks(id, created, name, with_usage, logprobs)));
        }
        let end = writing.whole().await?;
        let choice = choice(
            0,
            &end.text,
            end.finish,
            logprobs.then_some(end.logprobs.as_slice()),
        );
        return Ok(json_response(
            StatusCode::OK,
            &json!({
                "id": id, "object": "text_completion", "created": created, "model": name,
                "choices": [choice], "usage": usage(&end), "karez": end.karez(),
            }),
        ));
    }
    if streaming {
        return Err(ApiError::param(
            "prompt",
            "is a list: streaming takes one prompt at a time",
        ));
    }
    let lines: Vec<u8> = prompts
        .iter()
        .flat_map(|prompt| format!("{}\n", Value::Object(line(prompt))).into_bytes())
        .collect();
    let items = prompts.len() as u64;
    let ticket = work::submit(
        &shared,
        &caller,
        Work::Generate(Generate {
            stream: false,
            ..work
        }),
        lines,
        items,
        &wishes,
        "completion",
    )
    .await?;
    let id = format!("cmpl-{}", ticket.job);
    let (view, lines) = ticket.finish().await?;
    let (mut choices, mut tokens_in, mut tokens_out) = (Vec::new(), 0, 0);
    for (i, line) in lines.iter().enumerate() {
        let text = line.get("text").and_then(Value::as_str).unwrap_or_default();
        let logs: Vec<Box<RawValue>> = match line.get("logprobs") {
            Some(Value::Array(logs)) => logs
                .iter()
                .filter_map(|log| serde_json::value::to_raw_value(log).ok())
                .collect(),
            _ => Vec::new(),
        };
        choices.push(choice(
            i,
            text,
            work::finish(line),
            logprobs.then_some(logs.as_slice()),
        ));
        let number = |name| line.get(name).and_then(Value::as_u64).unwrap_or(0);
        tokens_in += number("tokens_in");
        tokens_out += number("tokens_out");
    }
    Ok(json_response(
        StatusCode::OK,
        &json!({
            "id": id, "object": "text_completion", "created": created, "model": name, "choices": choices,
            "usage": {
                "prompt_tokens": tokens_in, "completion_tokens": tokens_out, "total_tokens": tokens_in + tokens_out,
            },
            "karez": whereabouts(&view),
        }),
    ))
}

/// How to sample; log-probabilities are a number here.
pub(super) fn sampling(body: &Map<String, Value>) -> Result<Map<String, Value>, ApiError> {
    ask::whole(body, "logprobs", 0, 20)?;
    if ask::flag(body, "echo")? {
        return Err(ApiError::param(
            "echo",
            "is not offered: put the prompt before the answer yourself",
        ));
    }
    if ask::some(body, "suffix").is_some() {
        return Err(ApiError::param(
            "suffix",
            "is not offered: models here continue texts",
        ));
    }
    if ask::whole(body, "best_of", 1, u64::MAX)?.is_some_and(|n| n != 1) {
        return Err(ApiError::param(
            "best_of",
            "is more than 1: ask as often as you want answers",
        ));
    }
    let mut line = ask::sampling(body)?;
    // OpenAI's own default is 16 tokens here.
    if !line.contains_key("max_tokens") && !line.contains_key("max_completion_tokens") {
        line.insert("max_tokens".into(), 16.into());
    }
    Ok(line)
}

fn prompts(body: &Map<String, Value>) -> Result<Vec<String>, ApiError> {
    match ask::some(body, "prompt") {
        Some(Value::String(text)) => Ok(vec![text.clone()]),
        Some(Value::Array(list)) if (1..=PROMPTS_MAX).contains(&list.len()) => {
            let texts: Option<Vec<String>> = list.iter().map(|p| p.as_str().map(str::to_owned)).collect();
            texts.ok_or_else(|| {
                ApiError::param(
                    "prompt",
                    "holds what is no text: prompts of tokens are not offered",
                )
            })
        }
        _ => Err(ApiError::param(
            "prompt",
            format!("must be a text or 1 to {PROMPTS_MAX} of them"),
        )),
    }
}

fn chunks(
    id: String,
    created: u64,
    name: String,
    with_usage: bool,
    logprobs: bool,
) -> impl FnMut(Delta) -> Vec<Value> + Send + 'static {
    move |delta| {
        let chunk = |choices: Value| {
            let mut chunk = json!({
                "id": id, "object": "text_completion", "created": created, "model": name, "choices": choices,
            });
            if with_usage {
                chunk["usage"] = Value::Null;
            }
            chunk
        };
        let choice = |text: &str, logs: &[Box<RawValue>], finish: Value| {
            let mut choice = choice(0, text, "", logprobs.then_some(logs));
            choice["finish_reason"] = finish;
            json!([choice])
        };
        match delta {
            Delta::Text(text, logs) => vec![chunk(choice(&text, &logs, Value::Null))],
            Delta::End(end) => {
                let mut last = chunk(choice(&end.text, &end.logprobs, end.finish.into()));
                last["karez"] = end.karez();
                let mut chunks = vec![last];
                if with_usage {
                    let mut chunk = chunk(json!([]));
                    chunk["usage"] = usage(&end);
                    chunks.push(chunk);
                }
                chunks
            }
        }
    }
}

fn choice(index: usize, text: &str, finish: &str, logprobs: Option<&[Box<RawValue>]>) -> Value {
    json!({
        "index": index, "text": text, "finish_reason": finish,
        "logprobs": logprobs.map(old_logprobs),
    })
}

/// Log-probabilities in the form that this path has always had: lists side by side.
fn old_logprobs(logs: &[Box<RawValue>]) -> Value {
    let entries = logs
        .iter()
        .filter_map(|log| serde_json::from_str::<Value>(log.get()).ok());
    logprobs(&entries.collect())
}

/// The same of a result line's.
pub(super) fn logprobs(entries: &Value) -> Value {
    let entries = entries.as_array().map_or(&[][..], Vec::as_slice);
    let of = |name: &str| -> Vec<Value> { entries.iter().map(|e| e[name].clone()).collect() };
    let top: Vec<Value> = entries
        .iter()
        .map(|e| {
            let all = e["top_logprobs"].as_array().into_iter().flatten();
            let pair = |t: &Value| Some((t["token"].as_str()?.to_owned(), t["logprob"].clone()));
            Value::Object(all.filter_map(pair).collect())
        })
        .collect();
    let offsets: Vec<usize> = entries
        .iter()
        .scan(0, |at, e| {
            let here = *at;
            *at += e["token"].as_str().map_or(0, |t| t.chars().count());
            Some(here)
        })
        .collect();
    json!({
        "tokens": of("token"), "token_logprobs": of("logprob"), "top_logprobs": top, "text_offset": offsets,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_logprobs_are_lists_side_by_side() {
        let log = |token: &str| {
            let entry = json!({"token": token, "logprob": -0.5, "bytes": [], "top_logprobs": [{"token": "é", "logprob": -0.1, "bytes": []}]});
            serde_json::value::to_raw_value(&entry).unwrap()
        };
        let old = old_logprobs(&[log("é "), log("b")]);
        assert_eq!(old["tokens"], json!(["é ", "b"]));
        assert_eq!(old["text_offset"], json!([0, 2]));
        assert_eq!(old["top_logprobs"][1], json!({"é": -0.1}));
    }
}
