//! `/v1/embeddings`: texts as vectors, as numbers or in base64.
use super::{
    Answer, Caller, ask,
    ask::Wishes,
    error::{ApiError, json_response},
    object, work,
};
use crate::mind::Shared;
use axum::{
    body::Body,
    extract::State,
    http::{HeaderMap, StatusCode},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use karez_core::records::Work;
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// Texts of one request at most, as OpenAI has it.
const TEXTS_MAX: usize = 2048;

pub(super) async fn create(State(shared): State<Arc<Shared>>, headers: HeaderMap, body: Body) -> Answer {
    let caller = Caller::of(&shared, &headers).await?;
    let body = object(body).await?;
    let model = ask::model(&shared, &caller, &body).await?;
    let texts = texts(&body)?;
    let packed = match ask::text(&body, "encoding_format")? {
        None | Some("float") => false,
        Some("base64") => true,
        Some(_) => return Err(ApiError::param("encoding_format", "must be float or base64")),
    };
    let dimensions = ask::whole(&body, "dimensions", 1, 1 << 20)?;
    let wishes = Wishes::of(&body)?;
    let lines: Vec<u8> = texts
        .iter()
        .flat_map(|t| format!("{}\n", json!({"text": t})).into_bytes())
        .collect();
    let work = Work::Embed {
        model: model.alone()?,
        model_name: model.name.clone(),
    };
    let name = model.name;
    let items = texts.len() as u64;
    let ticket = work::submit(&shared, &caller, work, lines, items, &wishes, "embeddings").await?;
    let (view, lines) = ticket.finish().await?;
    let mut data = Vec::with_capacity(lines.len());
    for (i, mut line) in lines.into_iter().enumerate() {
        let vector = line.remove("embedding").unwrap_or_default();
        let length = vector.as_array().map_or(0, Vec::len);
        if length == 0 {
            return Err(ApiError::server("a result holds no vector"));
        }
        if let Some(wanted) = dimensions
            && wanted != length as u64
        {
            let why = format!("is {wanted}, this model's vectors have {length}");
            return Err(ApiError::param("dimensions", why));
        }
        let embedding = if packed { pack(&vector).into() } else { vector };
        data.push(json!({"object": "embedding", "index": i, "embedding": embedding}));
    }
    let tokens = view.meters.tokens_in;
    Ok(json_response(
        StatusCode::OK,
        &json!({
            "object": "list", "model": name, "data": data,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            "karez": work::whereabouts(&view),
        }),
    ))
}

/// Little-endian 32-bit floats in base64.
fn pack(vector: &Value) -> String {
    let numbers = vector.as_array().into_iter().flatten().filter_map(Value::as_f64);
    let bytes: Vec<u8> = numbers.flat_map(|n| (n as f32).to_le_bytes()).collect();
    STANDARD.encode(bytes)
}

fn texts(body: &Map<String, Value>) -> Result<Vec<String>, ApiError> {
    let read = |text: &str| {
        let long = text.len() + 64 > ask::LINE_MAX / 2;
        match text {
            "" => Err(ApiError::param("input", "holds an empty text")),
            _ if long => Err(ApiError::param(
                "input",
                format!("holds a text of {} bytes", text.len()),
            )),
            _ => Ok(text.to_owned()),
        }
    };
    match ask::some(body, "input") {
        Some(Value::String(text)) => Ok(vec![read(text)?]),
        Some(Value::Array(list)) if (1..=TEXTS_MAX).contains(&list.len()) => list
            .iter()
            .map(|item| match item.as_str() {
                Some(text) => read(text),
                None => Err(ApiError::param(
                    "input",
                    "holds what is no text: inputs of tokens are not offered",
                )),
            })
            .collect(),
        _ => Err(ApiError::param(
            "input",
            format!("must be a text or 1 to {TEXTS_MAX} of them"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_vectors_are_little_endian_floats() {
        let bytes = STANDARD.decode(pack(&json!([1.0, -0.5]))).unwrap();
        assert_eq!(bytes, [1f32.to_le_bytes(), (-0.5f32).to_le_bytes()].concat());
    }
}
