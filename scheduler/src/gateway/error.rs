//! Errors in the shape OpenAI's clients read.
use axum::{
    body::Body,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};
use tonic::{Code, Status};

/// What went wrong, for the client.
#[derive(Debug, Clone)]
pub(crate) struct ApiError {
    status: StatusCode,
    kind: &'static str,
    code: Option<&'static str>,
    param: Option<String>,
    message: String,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: Option<&'static str>, message: String) -> Self {
        Self {
            status,
            kind,
            code,
            param: None,
            message,
        }
    }

    /// A field is wrong.
    pub(crate) fn param(param: impl Into<String>, why: impl std::fmt::Display) -> Self {
        let param = param.into();
        let message = format!("{param} {why}");
        Self {
            param: Some(param),
            ..Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", None, message)
        }
    }

    /// The same, of a field of `outer`.
    pub(crate) fn inside(mut self, outer: &str) -> Self {
        if self.param.is_some() {
            self.message = format!("{outer}.{}", self.message);
            self.param = self.param.map(|param| format!("{outer}.{param}"));
        }
        self
    }

    /// The same, of a line of a file, counted from 1.
    pub(crate) fn at_line(mut self, line: u64) -> Self {
        self.message = format!("line {line}: {}", self.message);
        self
    }

    /// The request as a whole is wrong.
    pub(crate) fn request(why: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", None, why.into())
    }

    /// The key is missing or unknown.
    pub(crate) fn key(why: impl Into<String>) -> Self {
        let code = Some("invalid_api_key");
        Self::new(
            StatusCode::UNAUTHORIZED,
            "invalid_request_error",
            code,
            why.into(),
        )
    }

    pub(crate) fn no_model(name: &str) -> Self {
        let name: String = name.chars().take(80).collect();
        let why = format!("the scheduler knows no model {name:?}: GET /v1/models lists them");
        Self {
            param: Some("model".into()),
            ..Self::new(
                StatusCode::NOT_FOUND,
                "invalid_request_error",
                Some("model_not_found"),
                why,
            )
        }
    }

    pub(crate) fn not_found(why: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", None, why.into())
    }

    pub(crate) fn method() -> Self {
        let why = "this path does not take that method".into();
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", None, why)
    }

    pub(crate) fn too_large(max: usize) -> Self {
        let why = format!("the request is larger than {max} bytes, the limit");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", None, why)
    }

    /// The budget is spent.
    pub(crate) fn budget(why: impl Into<String>) -> Self {
        let code = Some("insufficient_quota");
        Self::new(
            StatusCode::TOO_MANY_REQUESTS,
            "insufficient_quota",
            code,
            why.into(),
        )
    }

    /// It might work later.
    pub(crate) fn unavailable(why: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", None, why.into())
    }

    /// The fault is the network's.
    pub(crate) fn server(why: impl Into<String>) -> Self {
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "server_error",
            None,
            why.into(),
        )
    }

    /// No node may or can do it.
    pub(crate) fn is_unplaceable(&self) -> bool {
        self.code == Some("no_capacity")
    }

    /// What a job failed of. A fault of its one line is the request's.
    pub(crate) fn failed(cause: &str) -> Self {
        match cause
            .split_once(" of the input: ")
            .or_else(|| cause.split_once(" of the input "))
        {
            Some((line, why)) if line.starts_with("line") => {
                let overflow = why.contains("context");
                let code = overflow.then_some("context_length_exceeded");
                Self::new(
                    StatusCode::BAD_REQUEST,
                    "invalid_request_error",
                    code,
                    why.to_owned(),
                )
            }
            _ => Self::server(format!("the job failed: {cause}")),
        }
    }

    /// A line that was answered with its error.
    pub(crate) fn line(kind: &str, message: &str) -> Self {
        let code = (kind == "context_overflow").then_some("context_length_exceeded");
        Self::new(
            StatusCode::BAD_REQUEST,
            "invalid_request_error",
            code,
            message.to_owned(),
        )
    }

    #[cfg(test)]
    pub(crate) fn status(&self) -> StatusCode {
        self.status
    }

    /// As it goes into a body, or into a stream that has begun.
    pub(crate) fn json(&self) -> Value {
        json!({"error": {
            "message": self.message, "type": self.kind, "param": self.param, "code": self.code,
        }})
    }
}

/// Refusals of the scheduler, in HTTP's words.
impl From<Status> for ApiError {
    fn from(status: Status) -> Self {
        let text = status.message().to_owned();
        match status.code() {
            Code::InvalidArgument => Self::request(text),
            Code::Unauthenticated => Self::key(text),
            Code::PermissionDenied => Self::new(StatusCode::FORBIDDEN, "permission_error", None, text),
            Code::NotFound => Self::not_found(text),
            Code::FailedPrecondition => Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "server_error",
                Some("no_capacity"),
                text,
            ),
            Code::ResourceExhausted => Self::new(
                StatusCode::TOO_MANY_REQUESTS,
                "rate_limit_error",
                Some("rate_limit_exceeded"),
                text,
            ),
            Code::Unavailable | Code::DeadlineExceeded => Self::unavailable(text),
            _ => Self::server(text),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        json_response(self.status, &self.json())
    }
}

/// A JSON body.
pub(crate) fn json_response(status: StatusCode, body: &Value) -> Response {
    let mut response = Response::new(Body::from(body.to_string()));
    *response.status_mut() = status;
    let json = HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_of_the_line_is_the_requests_and_all_others_are_not() {
        for (cause, status, code) in [
            (
                "line 1 of the input: the prompt has 900 tokens, the context holds 512",
                StatusCode::BAD_REQUEST,
                json!("context_length_exceeded"),
            ),
            (
                "line 1 of the input has the field \"stop\" wrong",
                StatusCode::BAD_REQUEST,
                Value::Null,
            ),
            (
                "part 0 failed 3 times, the limit",
                StatusCode::INTERNAL_SERVER_ERROR,
                Value::Null,
            ),
        ] {
            let error = ApiError::failed(cause);
            assert_eq!(
                (error.status(), &error.json()["error"]["code"]),
                (status, &code),
                "{cause}"
            );
        }
    }
}
