//! `/v1/chat/completions`, and what streaming answers have in common.
use super::{
    Answer, Caller, ask,
    ask::Wishes,
    error::{ApiError, json_response},
    object,
    work::{Delta, End, Question, Writing, now},
};
use crate::mind::Shared;
use axum::{
    body::{Body, Bytes},
    extract::State,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::Response,
};
use karez_core::records::Generate;
use serde_json::{Map, Value, json, value::RawValue};
use std::{convert::Infallible, sync::Arc, time::Duration};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

/// Tokens of an answer at most, unless the request says otherwise.
const TOKENS_MAX: u32 = 2048;
/// A sign of life while nothing is written, so that proxies do not hang up.
const ALIVE_EVERY: Duration = Duration::from_secs(10);
/// A client must take a piece within this, or its answer is called off.
const TAKE_MAX: Duration = Duration::from_secs(300);

pub(super) async fn create(State(shared): State<Arc<Shared>>, headers: HeaderMap, body: Body) -> Answer {
    let caller = Caller::of(&shared, &headers).await?;
    let body = object(body).await?;
    let (streaming, with_usage) = (ask::flag(&body, "stream")?, with_usage(&body)?);
    let model = ask::model(&shared, &caller, &body).await?;
    let question = question(caller, &model, &body)?;
    let name = model.name;
    let logprobs = ask::flag(&body, "logprobs")?;
    let writing = Writing::begin(&shared, question).await?;
    let (id, created) = (format!("chatcmpl-{}", writing.job()), now());
    if !streaming {
        let end = writing.whole().await?;
        let body = completion(&id, created, &name, &end, logprobs);
        return Ok(json_response(StatusCode::OK, &body));
    }
    let mut begun = false;
    Ok(stream(writing, move |delta| {
        let chunk = |choices: Value| {
            let mut chunk = json!({
                "id": id, "object": "chat.completion.chunk", "created": created, "model": name,
                "choices": choices,
            });
            if with_usage {
                chunk["usage"] = Value::Null;
            }
            chunk
        };
        let shown = |logs: &[Box<RawValue>]| match logprobs {
            true => json!({"content": logs, "refusal": null}),
            false => Value::Null,
        };
        let mut chunks = Vec::new();
        if !std::mem::replace(&mut begun, true) {
            chunks.push(chunk(json!([{
                "index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": null, "finish_reason": null,
            }])));
        }
        match delta {
            Delta::Text(text, logs) => chunks.push(chunk(json!([{
                "index": 0, "delta": {"content": text}, "logprobs": shown(&logs), "finish_reason": null,
            }]))),
            Delta::End(end) => {
                if !end.text.is_empty() || !end.logprobs.is_empty() {
                    chunks.push(chunk(json!([{
                        "index": 0, "delta": {"content": end.text}, "logprobs": shown(&end.logprobs),
                        "finish_reason": null,
                    }])));
                }
                let mut last = chunk(json!([{
                    "index": 0, "delta": {}, "logprobs": null, "finish_reason": end.finish,
                }]));
                last["karez"] = end.karez();
                chunks.push(last);
                if with_usage {
                    let mut chunk = chunk(json!([]));
                    chunk["usage"] = usage(&end);
                    chunks.push(chunk);
                }
            }
        }
        chunks
    }))
}

/// The answer in one piece.
pub(super) fn completion(id: &str, created: u64, model: &str, end: &End, logprobs: bool) -> Value {
    let logprobs = match logprobs {
        true => json!({"content": end.logprobs, "refusal": null}),
        false => Value::Null,
    };
    json!({
        "id": id, "object": "chat.completion", "created": created, "model": model,
        "choices": [{
            "index": 0,
            "message": {"role": "assistant", "content": end.text, "refusal": null},
            "logprobs": logprobs,
            "finish_reason": end.finish,
        }],
        "usage": usage(end),
        "karez": end.karez(),
    })
}

/// Whether a stream ends with what it took.
pub(super) fn with_usage(body: &Map<String, Value>) -> Result<bool, ApiError> {
    match ask::some(body, "stream_options") {
        None => Ok(false),
        Some(Value::Object(options)) => ask::flag(options, "include_usage"),
        Some(_) => Err(ApiError::param("stream_options", "must be an object")),
    }
}

pub(super) fn usage(end: &End) -> Value {
    json!({
        "prompt_tokens": end.tokens_in,
        "completion_tokens": end.tokens_out,
        "total_tokens": end.tokens_in + end.tokens_out,
        "prompt_tokens_details": {"cached_tokens": end.tokens_cached},
    })
}

/// A request's fields as work and input line.
fn question(caller: Caller, model: &ask::Model, body: &Map<String, Value>) -> Result<Question, ApiError> {
    let work = model.writes(tokens_max(body)?)?;
    let line = chat_line(body)?;
    Ok(Question {
        caller,
        work: Generate {
            // Whether or not the client wants it in pieces: a node that writes nothing is left, and one that dies replaced.
            stream: true,
            ..work
        },
        line,
        wishes: Wishes::of_question(body)?,
        label: "chat",
    })
}

pub(super) fn tokens_max(body: &Map<String, Value>) -> Result<u32, ApiError> {
    let most = match ask::whole(body, "max_completion_tokens", 1, 131_072)? {
        None => ask::whole(body, "max_tokens", 1, 131_072)?,
        some => some,
    };
    Ok(most.and_then(|n| u32::try_from(n).ok()).unwrap_or(TOKENS_MAX))
}

/// The input line of a conversation.
pub(super) fn chat_line(body: &Map<String, Value>) -> Result<Map<String, Value>, ApiError> {
    let mut line = ask::sampling(body)?;
    line.insert("messages".into(), Value::Array(messages(body)?));
    ask::flag(body, "logprobs")?;
    if let Some(tools) = ask::some(body, "tools") {
        let Value::Array(list) = tools else {
            return Err(ApiError::param("tools", "must be a list"));
        };
        let none = ask::some(body, "tool_choice").is_some_and(|choice| choice == "none");
        if !list.is_empty() && !none {
            line.insert("tools".into(), tools.clone());
        }
    }
    Ok(line)
}

/// The conversation, as templates read it.
fn messages(body: &Map<String, Value>) -> Result<Vec<Value>, ApiError> {
    let Some(Value::Array(given)) = ask::some(body, "messages") else {
        return Err(ApiError::param("messages", "must be a list of messages"));
    };
    if given.is_empty() {
        return Err(ApiError::param("messages", "is empty: ask something"));
    }
    let mut messages = Vec::with_capacity(given.len());
    for (i, message) in given.iter().enumerate() {
        let at = |field: &str| format!("messages[{i}]{field}");
        let Value::Object(message) = message else {
            return Err(ApiError::param(at(""), "must be an object with role and content"));
        };
        let role = match message.get("role").and_then(Value::as_str) {
            // What newer models call it.
            Some("developer") => "system",
            Some(role @ ("system" | "user" | "assistant" | "tool" | "function")) => role,
            _ => {
                let why = "must be system, developer, user, assistant or tool";
                return Err(ApiError::param(at(".role"), why));
            }
        };
        let content = match message.get("content") {
            Some(content @ (Value::String(_) | Value::Null)) => content.clone(),
            None => Value::Null,
            Some(Value::Array(parts)) => {
                let mut all = String::new();
                for (j, part) in parts.iter().enumerate() {
                    let kind = part.get("type").and_then(Value::as_str);
                    match (kind, part.get("text").and_then(Value::as_str)) {
                        (Some("text"), Some(text)) => all.push_str(text),
                        _ => {
                            let why = "is no text: only text is understood";
                            return Err(ApiError::param(at(&format!(".content[{j}]")), why));
                        }
                    }
                }
                Value::String(all)
            }
            Some(_) => {
                return Err(ApiError::param(
                    at(".content"),
                    "must be a string or a list of texts",
                ));
            }
        };
        let mut out = Map::new();
        out.insert("role".into(), role.into());
        out.insert("content".into(), content);
        for name in ["name", "tool_calls", "tool_call_id"] {
            if let Some(value) = ask::some(message, name) {
                out.insert(name.into(), value.clone());
            }
        }
        messages.push(Value::Object(out));
    }
    Ok(messages)
}

/// An answer as server-sent events. A slow client holds up nothing but itself; one that goes away ends its job.
pub(super) fn stream(
    mut writing: Writing,
    mut show: impl FnMut(Delta) -> Vec<Value> + Send + 'static,
) -> Response {
    let (events, body) = mpsc::channel::<Result<Bytes, Infallible>>(1);
    tokio::spawn(async move {
        loop {
            let next = {
                let next = writing.next();
                tokio::pin!(next);
                loop {
                    tokio::select! {
                        next = &mut next => break next,
                        () = events.closed() => return,
                        () = tokio::time::sleep(ALIVE_EVERY) => {
                            let _ = events.try_send(Ok(Bytes::from_static(b": waiting\n\n")));
                        }
                    }
                }
            };
            let (said, over) = match next {
                Ok(delta) => {
                    let over = matches!(delta, Delta::End(_));
                    let said: String = show(delta)
                        .iter()
                        .map(|chunk| format!("data: {chunk}\n\n"))
                        .collect();
                    (said, over)
                }
                // The status has left long ago.
                Err(error) => (format!("data: {}\n\n", error.json()), true),
            };
            let said = if over { said + "data: [DONE]\n\n" } else { said };
            if events.send_timeout(Ok(said.into()), TAKE_MAX).await.is_err() || over {
                return;
            }
        }
    });
    let mut response = Response::new(Body::from_stream(ReceiverStream::new(body)));
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/event-stream"),
    );
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(value: Value) -> Map<String, Value> {
        match value {
            Value::Object(map) => map,
            _ => panic!("an object"),
        }
    }

    #[test]
    fn conversations_are_read_as_clients_write_them() {
        let line = chat_line(&fields(json!({
            "messages": [
                {"role": "developer", "content": "be brief"},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
                {"role": "tool", "tool_call_id": "1", "content": "7"},
            ],
            "tools": [{"type": "function", "function": {"name": "f"}}],
        })))
        .unwrap();
        assert_eq!(line["messages"][0]["role"], "system");
        assert_eq!(line["messages"][1]["content"], "ab");
        assert_eq!(line["messages"][2]["content"], Value::Null);
        assert_eq!(line["messages"][3]["tool_call_id"], "1");
        assert_eq!(line["tools"][0]["function"]["name"], "f");
        let none =
            json!({"messages": [{"role": "user", "content": "x"}], "tools": [{}], "tool_choice": "none"});
        assert!(!chat_line(&fields(none)).unwrap().contains_key("tools"));
    }

    #[test]
    fn what_is_wrong_in_a_conversation_is_named() {
        for (messages, param) in [
            (json!(null), "messages"),
            (json!([]), "messages"),
            (json!(["hi"]), "messages[0]"),
            (json!([{"role": "king", "content": "x"}]), "messages[0].role"),
            (json!([{"role": "user", "content": 7}]), "messages[0].content"),
            (
                json!([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
                "messages[0].content[0]",
            ),
        ] {
            let error = chat_line(&fields(json!({ "messages": messages }))).unwrap_err();
            assert_eq!(error.json()["error"]["param"], param);
        }
    }
}
