//! Plain HTTP to the owner's own server: one request, one connection, nothing waited for without end.
use super::fault;
use http_body_util::{BodyExt as _, Full};
use hyper::{
    Method, Request, Response,
    body::{Bytes, Incoming},
    header,
};
use hyper_util::rt::TokioIo;
use karez_engine::EngineError;
use serde_json::Value;
use std::{
    net::{IpAddr, Ipv6Addr},
    time::Duration,
};
use tokio::{
    net::{TcpStream, lookup_host},
    task::AbortHandle,
    time::timeout,
};

/// A connection must stand within this.
const CONNECT_MAX: Duration = Duration::from_secs(3);
/// Bytes of an answer in one piece, and of one event of a stream, at most.
const WHOLE_MAX: usize = 64 << 20;
const EVENT_MAX: usize = 1 << 20;
/// Bytes of a refusal that are read.
const REFUSAL_MAX: usize = 64 << 10;

/// Where the server is.
#[derive(Debug, Clone)]
pub(super) struct Http {
    /// `host:port`.
    host: String,
    /// The bearer token it asks for.
    key: Option<String>,
}

/// An answer that has begun. Its connection ends when it is dropped.
pub(super) struct Answer {
    response: Response<Incoming>,
    _connection: Connection,
    silence: Duration,
    pending: Vec<u8>,
}

struct Connection(AbortHandle);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Http {
    /// `url` is `http://host:port`, as the configuration checked it.
    pub(super) fn new(url: &str, key: Option<String>) -> Self {
        Self {
            host: url.trim_start_matches("http://").to_owned(),
            key,
        }
    }

    pub(super) async fn get(&self, path: &str, silence: Duration) -> Result<Value, EngineError> {
        self.send(Method::GET, path, Vec::new(), silence)
            .await?
            .whole()
            .await
    }

    pub(super) async fn post(
        &self,
        path: &str,
        body: &Value,
        silence: Duration,
    ) -> Result<Answer, EngineError> {
        self.send(Method::POST, path, body.to_string().into_bytes(), silence)
            .await
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
        silence: Duration,
    ) -> Result<Answer, EngineError> {
        let host = &self.host;
        let stream = match timeout(CONNECT_MAX, self.connect()).await {
            Ok(stream) => stream?,
            Err(_) => return Err(fault(format!("{host} does not take connections"))),
        };
        // Pieces of answers are small and wanted at once.
        let _ = stream.set_nodelay(true);
        let broken = |error: hyper::Error| fault(format!("{host} does not speak HTTP: {error}"));
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(broken)?;
        let connection = Connection(tokio::spawn(connection).abort_handle());
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, host)
            .header(header::CONTENT_TYPE, "application/json");
        if let Some(key) = &self.key {
            request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
        }
        let request = request
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| fault(format!("the request to {host} cannot be written: {error}")))?;
        let response = match timeout(silence, sender.send_request(request)).await {
            Ok(response) => response.map_err(broken)?,
            Err(_) => return Err(silent(host, silence)),
        };
        let mut answer = Answer {
            response,
            _connection: connection,
            silence,
            pending: Vec::new(),
        };
        if answer.response.status().is_success() {
            return Ok(answer);
        }
        Err(answer.refusal(host).await)
    }

    /// What is asked and answered crosses the wire as it is: only this machine and its own network will do.
    async fn connect(&self) -> Result<TcpStream, EngineError> {
        let host = &self.host;
        let found = lookup_host(host)
            .await
            .map_err(|error| fault(format!("{host} is not found: {error}")))?;
        let mut why = fault(format!(
            "{host} is neither on this machine nor in a private network, and plain HTTP would show everybody what is asked: reach it through a tunnel"
        ));
        for addr in found.filter(|addr| is_near(addr.ip())) {
            match TcpStream::connect(addr).await {
                Ok(stream) => return Ok(stream),
                Err(error) => why = fault(format!("{host} does not take connections: {error}")),
            }
        }
        Err(why)
    }
}

fn is_near(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_loopback() || ip.is_private() || ip.is_link_local(),
        IpAddr::V6(ip) => match ip.to_ipv4_mapped() {
            Some(ip) => is_near(ip.into()),
            None => ip == Ipv6Addr::LOCALHOST || ip.is_unique_local() || ip.is_unicast_link_local(),
        },
    }
}

fn silent(host: &str, silence: Duration) -> EngineError {
    fault(format!("{host} wrote nothing for {} ms", silence.as_millis()))
}

impl Answer {
    /// The next bytes; none at the end.
    async fn bytes(&mut self) -> Result<Option<Bytes>, EngineError> {
        loop {
            let frame = match timeout(self.silence, self.response.body_mut().frame()).await {
                Err(_) => return Err(silent("it", self.silence)),
                Ok(None) => return Ok(None),
                Ok(Some(Err(error))) => return Err(fault(format!("its answer broke off: {error}"))),
                Ok(Some(Ok(frame))) => frame,
            };
            if let Ok(bytes) = frame.into_data() {
                return Ok(Some(bytes));
            }
        }
    }

    /// The whole answer as JSON.
    pub(super) async fn whole(mut self) -> Result<Value, EngineError> {
        let mut all = Vec::new();
        while let Some(bytes) = self.bytes().await? {
            if all.len() + bytes.len() > WHOLE_MAX {
                return Err(fault(format!("its answer is longer than {WHOLE_MAX} bytes")));
            }
            all.extend_from_slice(&bytes);
        }
        serde_json::from_slice(&all).map_err(|error| fault(format!("its answer is not JSON: {error}")))
    }

    /// The data of the next server-sent event; none at the end.
    pub(super) async fn event(&mut self) -> Result<Option<String>, EngineError> {
        loop {
            while let Some(end) = self.pending.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=end).collect();
                let line = std::str::from_utf8(&line).map_err(|_| fault("its answer is not UTF-8"))?;
                // Comments, names of events and empty lines tell nothing here.
                if let Some(data) = line.trim_end().strip_prefix("data:") {
                    return Ok(Some(data.trim_start().to_owned()));
                }
            }
            if self.pending.len() > EVENT_MAX {
                return Err(fault(format!(
                    "one event of its answer is longer than {EVENT_MAX} bytes"
                )));
            }
            match self.bytes().await? {
                Some(bytes) => self.pending.extend_from_slice(&bytes),
                None if self.pending.iter().all(u8::is_ascii_whitespace) => return Ok(None),
                None => return Err(fault("its answer broke off in the middle of an event")),
            }
        }
    }

    /// What an answer of another status than success means.
    async fn refusal(&mut self, host: &str) -> EngineError {
        let status = self.response.status();
        let mut body = Vec::new();
        while let Ok(Some(bytes)) = self.bytes().await {
            body.extend_from_slice(&bytes);
            if body.len() > REFUSAL_MAX {
                break;
            }
        }
        let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
        refusal(host, status.as_u16(), &body)
    }
}

/// A refusal is the request's fault where the server says so, and then the same on every server.
pub(super) fn refusal(host: &str, status: u16, body: &Value) -> EngineError {
    let error = body.get("error").unwrap_or(body);
    let said = match error {
        Value::String(text) => text.as_str(),
        _ => error
            .get("message")
            .and_then(Value::as_str)
            .unwrap_or("no reason"),
    };
    let said: String = said.chars().filter(|c| !c.is_control()).take(300).collect();
    if matches!(status, 401 | 403 | 404 | 405 | 408 | 429) || !(400..500).contains(&status) {
        return fault(format!("{host} answers with status {status}: {said}"));
    }
    if let Some((prompt, limit)) = lengths(error, &said) {
        return EngineError::ContextOverflow { prompt, limit };
    }
    EngineError::BadInput {
        reason: format!("the provider's server refuses it: {said}"),
    }
}

/// Both lengths of a context that is too short, in the words of llama-server, of vLLM and of Karez itself.
fn lengths(error: &Value, said: &str) -> Option<(u32, u32)> {
    let field = |name| u32::try_from(error.get(name)?.as_u64()?).ok();
    if let (Some(prompt), Some(limit)) = (field("n_prompt_tokens"), field("n_ctx")) {
        return Some((prompt, limit));
    }
    let after = |words: &str| {
        let rest = &said[said.find(words)? + words.len()..];
        let digits: String = rest
            .trim_start()
            .chars()
            .take_while(char::is_ascii_digit)
            .collect();
        digits.parse().ok()
    };
    let limit = after("maximum context length is").or_else(|| after("the context holds"))?;
    let prompt = after("you requested")
        .or_else(|| after("resulted in"))
        .or_else(|| after("the prompt is"))?;
    Some((prompt, limit))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn only_this_machine_and_its_own_network_are_near() {
        for (ip, near) in [
            ("127.0.0.1", true),
            ("10.1.2.3", true),
            ("192.168.0.9", true),
            ("169.254.1.1", true),
            ("::1", true),
            ("fd00::7", true),
            ("::ffff:10.0.0.1", true),
            ("8.8.8.8", false),
            ("2001:4860::1", false),
            ("::ffff:8.8.8.8", false),
        ] {
            assert_eq!(is_near(ip.parse().unwrap()), near, "{ip}");
        }
    }

    #[test]
    fn refusals_are_told_apart() {
        let overflow = |prompt, limit| EngineError::ContextOverflow { prompt, limit };
        for (status, body, want) in [
            (
                400,
                json!({"error": {"message": "the request exceeds the context", "n_prompt_tokens": 900, "n_ctx": 512}}),
                overflow(900, 512),
            ),
            (
                400,
                json!({"message": "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens (4900 in the messages)."}),
                overflow(5000, 4096),
            ),
            (
                400,
                json!({"error": {"message": "the prompt is 700 tokens long and the context holds 512; shorten it"}}),
                overflow(700, 512),
            ),
        ] {
            assert_eq!(refusal("x:1", status, &body), want, "{body}");
        }
        for (status, retryable) in [
            (400, false),
            (422, false),
            (401, true),
            (404, true),
            (429, true),
            (500, true),
        ] {
            let error = refusal("x:1", status, &json!({"error": {"message": "no\nway"}}));
            assert_eq!(error.kind().retryable(), retryable, "{status}: {error}");
            assert!(error.to_string().contains("noway"), "{error}");
        }
    }
}
