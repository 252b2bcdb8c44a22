//! One request to the server: asked in OpenAI's words, its answer read as it comes, its counts not taken on trust.
use super::{
    Server, fault,
    http::{Answer, refusal},
};
use karez_core::agent::Counted;
use karez_engine::{
    EngineError,
    protocol::{Finish, Generate, Message, Piece, Prompt, ResponseFormat, TokenLogprob, TopLogprob},
};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::time::Duration;

/// Bytes of an answer at most.
const TEXT_MAX: usize = 4 << 20;
/// Tokens that a template, tools and special tokens may add to a prompt: for each message, and once.
const MESSAGE_TOKENS: u64 = 64;
const TEMPLATE_TOKENS: u64 = 512;
/// What a count may differ by from ours: tokenizers split the same text differently at the seams of a stream.
const TOLERANCE_PERCENT: u64 = 10;
const TOLERANCE_TOKENS: u64 = 16;
/// No token stands for more text than this, on the average of an answer.
const TOKEN_BYTES_MAX: u64 = 64;

/// What came of a generation.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Answered {
    pub(crate) text: String,
    pub(crate) finish: Finish,
    pub(crate) logprobs: Vec<TokenLogprob>,
    pub(crate) counts: Counts,
}

/// Tokens, and who counted them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) tokens_in: u64,
    pub(crate) tokens_out: u64,
    pub(crate) tokens_cached: u64,
    pub(crate) by: Counted,
}

#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Choice {
    #[serde(default)]
    delta: Delta,
    /// Of a completion.
    text: Option<String>,
    logprobs: Option<Logprobs>,
    finish_reason: Option<String>,
}

#[derive(Deserialize, Default)]
struct Delta {
    content: Option<String>,
    /// What it writes to itself, by two names; some servers send both.
    reasoning_content: Option<String>,
    reasoning: Option<String>,
    #[serde(default)]
    tool_calls: Option<Vec<CallPart>>,
}

#[derive(Deserialize)]
struct CallPart {
    #[serde(default)]
    index: usize,
    #[serde(default)]
    function: FunctionPart,
}

#[derive(Deserialize, Default)]
struct FunctionPart {
    name: Option<String>,
    arguments: Option<String>,
}

#[derive(Deserialize)]
struct Logprobs {
    content: Option<Vec<Logprob>>,
}

#[derive(Deserialize)]
struct Logprob {
    token: String,
    logprob: f32,
    bytes: Option<Vec<u8>>,
    #[serde(default)]
    top_logprobs: Vec<Logprob>,
}

#[derive(Deserialize)]
pub(super) struct Usage {
    #[serde(default)]
    prompt_tokens: u64,
    #[serde(default)]
    completion_tokens: u64,
    prompt_tokens_details: Option<PromptDetails>,
}

#[derive(Deserialize)]
struct PromptDetails {
    cached_tokens: Option<u64>,
}

impl Server {
    /// Asks for one answer and hands on its pieces as they come.
    pub(crate) async fn generate(
        &self,
        model: &str,
        request: &Generate,
        silence: Duration,
        say: &mut (dyn FnMut(Piece) + Send),
    ) -> Result<Answered, EngineError> {
        if !request.resume.is_empty() {
            return Err(fault("it cannot go on with an answer that was begun elsewhere"));
        }
        let (path, body) = ask(model, request);
        let answer = self.http.post(path, &body, silence).await?;
        let mut heard = Heard::default();
        heard.listen(answer, say).await?;
        let asked = texts_of(&request.prompt);
        let tools = match &request.prompt {
            Prompt::Chat { tools, .. } => tools.iter().map(|tool| tool.to_string().len() as u64).sum(),
            _ => 0,
        };
        let written = format!("{}{}", heard.thoughts, heard.text);
        let counts = self.count(asked, tools, &written, heard.usage).await?;
        Ok(Answered {
            text: heard.text,
            finish: heard.finish.unwrap_or(Finish::Stop),
            logprobs: heard.logprobs,
            counts,
        })
    }

    /// Asks for the vectors of some texts.
    pub(crate) async fn embed(
        &self,
        model: &str,
        texts: Vec<String>,
        silence: Duration,
    ) -> Result<(Vec<Vec<f32>>, Counts), EngineError> {
        #[derive(Deserialize)]
        struct Reply {
            data: Vec<Entry>,
            usage: Option<Usage>,
        }
        #[derive(Deserialize)]
        struct Entry {
            index: usize,
            embedding: Vec<f32>,
        }
        let body = json!({"model": model, "input": texts, "encoding_format": "float"});
        let reply = self
            .http
            .post("/v1/embeddings", &body, silence)
            .await?
            .whole()
            .await?;
        let reply: Reply = serde_json::from_value(reply)
            .map_err(|error| fault(format!("its vectors have another shape than OpenAI's: {error}")))?;
        let mut vectors = vec![Vec::new(); texts.len()];
        for entry in reply.data {
            let Some(place) = vectors.get_mut(entry.index).filter(|place| place.is_empty()) else {
                return Err(fault("its vectors belong to other texts than were asked for"));
            };
            *place = entry.embedding;
        }
        let length = vectors.first().map_or(0, Vec::len);
        if vectors
            .iter()
            .any(|v| v.is_empty() || v.len() != length || v.iter().any(|n| !n.is_finite()))
        {
            return Err(fault(
                "its vectors are missing, differ in length, or are no numbers",
            ));
        }
        let counts = self.count(texts, 0, "", reply.usage).await?;
        Ok((vectors, counts))
    }

    /// What was read and written. The server's word counts where it can be true; beyond that it is no server to work with.
    async fn count(
        &self,
        asked: Vec<String>,
        tools: u64,
        written: &str,
        usage: Option<Usage>,
    ) -> Result<Counts, EngineError> {
        let messages = asked.len() as u64;
        let bytes_in: u64 = asked.iter().map(|text| text.len() as u64).sum();
        let bytes_out = written.len() as u64;
        let own = match self.tokens(asked, written).await? {
            Some((read, wrote)) => Own {
                read,
                wrote,
                exact: true,
            },
            None => Own {
                read: bytes_in.div_ceil(4),
                wrote: bytes_out.div_ceil(4),
                exact: false,
            },
        };
        let Some(usage) = usage else {
            return Ok(Counts {
                tokens_in: own.read,
                tokens_out: own.wrote,
                tokens_cached: 0,
                by: if own.exact {
                    Counted::Tokenizer
                } else {
                    Counted::Bytes
                },
            });
        };
        let added = messages * MESSAGE_TOKENS + TEMPLATE_TOKENS + tools;
        let (read, wrote) = match own.exact {
            true => (around(own.read), around(own.wrote)),
            false => (possible(bytes_in), possible(bytes_out)),
        };
        let claim = |what: &str, said: u64, (least, most): (u64, u64), bytes: u64| {
            if (least..=most).contains(&said) {
                return Ok(());
            }
            let count = if own.exact {
                "our own count allows"
            } else {
                "so much text can be"
            };
            Err(fault(format!(
                "it says it {what} {said} tokens, {bytes} bytes of text: {count} {least} to {most}"
            )))
        };
        claim("read", usage.prompt_tokens, (read.0, read.1 + added), bytes_in)?;
        claim("wrote", usage.completion_tokens, wrote, bytes_out)?;
        let cached = usage
            .prompt_tokens_details
            .and_then(|d| d.cached_tokens)
            .unwrap_or(0);
        Ok(Counts {
            tokens_in: usage.prompt_tokens,
            tokens_out: usage.completion_tokens,
            tokens_cached: cached.min(usage.prompt_tokens),
            by: if own.exact {
                Counted::ServerChecked
            } else {
                Counted::Server
            },
        })
    }
}

/// Our own count.
struct Own {
    read: u64,
    wrote: u64,
    exact: bool,
}

/// From what to what a count may differ from ours.
fn around(own: u64) -> (u64, u64) {
    let slack = (own * TOLERANCE_PERCENT / 100).max(TOLERANCE_TOKENS);
    (own.saturating_sub(slack), own + slack)
}

/// How many tokens so many bytes can be: at most one each, and a few that show no text.
fn possible(bytes: u64) -> (u64, u64) {
    (bytes / TOKEN_BYTES_MAX, bytes + TOLERANCE_TOKENS)
}

fn texts_of(prompt: &Prompt) -> Vec<String> {
    match prompt {
        Prompt::Raw { text } => vec![text.clone()],
        Prompt::Text { text, system } => system.iter().chain([text]).cloned().collect(),
        Prompt::Chat { messages, .. } => messages
            .iter()
            .map(|m| {
                let calls: String = m.tool_calls.iter().map(ToString::to_string).collect();
                format!("{}{calls}", m.content)
            })
            .collect(),
    }
}

/// The request in OpenAI's words. What is as usual is left out: not every server knows every field.
fn ask(model: &str, g: &Generate) -> (&'static str, Value) {
    let mut body = Map::new();
    let mut set = |name: &str, value: Value| drop(body.insert(name.into(), value));
    set("model", model.into());
    set("stream", true.into());
    set("stream_options", json!({"include_usage": true}));
    set("temperature", json!(g.temperature));
    if let Some(most) = g.max_tokens {
        set("max_tokens", most.into());
    }
    for (name, value, usual) in [
        ("top_p", g.top_p, 1.0),
        ("min_p", g.min_p, 0.0),
        ("repetition_penalty", g.repetition_penalty, 1.0),
        ("presence_penalty", g.presence_penalty, 0.0),
        ("frequency_penalty", g.frequency_penalty, 0.0),
    ] {
        if value != usual {
            set(name, json!(value));
        }
    }
    if g.top_k > 0 {
        set("top_k", g.top_k.into());
    }
    if g.temperature > 0.0 {
        // What every server takes: 31 bits.
        set("seed", (g.seed & 0x7fff_ffff).into());
    }
    if !g.stop.is_empty() {
        set("stop", json!(g.stop));
    }
    if !g.logit_bias.is_empty() {
        let biases: Map<String, Value> = g
            .logit_bias
            .iter()
            .map(|(token, bias)| (token.to_string(), json!(bias)))
            .collect();
        set("logit_bias", biases.into());
    }
    if let Some(format) = g.response_format.as_ref().filter(|f| **f != ResponseFormat::Text) {
        set(
            "response_format",
            serde_json::to_value(format).unwrap_or_default(),
        );
    }
    let message = |m: &Message| serde_json::to_value(m).unwrap_or_default();
    let messages: Vec<Value> = match &g.prompt {
        Prompt::Raw { text } => {
            set("prompt", text.as_str().into());
            if let Some(top) = g.top_logprobs {
                set("logprobs", top.into());
            }
            return ("/v1/completions", body.into());
        }
        Prompt::Text { text, system } => {
            let system = system.iter().map(|text| message(&Message::new("system", text)));
            system.chain([message(&Message::new("user", text))]).collect()
        }
        Prompt::Chat { messages, tools } => {
            if !tools.is_empty() {
                let tools: Vec<Value> = tools
                    .iter()
                    .map(|t| serde_json::to_value(t).unwrap_or_default())
                    .collect();
                set("tools", tools.into());
            }
            messages.iter().map(message).collect()
        }
    };
    set("messages", messages.into());
    if let Some(top) = g.top_logprobs {
        set("logprobs", true.into());
        set("top_logprobs", top.into());
    }
    ("/v1/chat/completions", body.into())
}

/// An answer as far as it was heard.
#[derive(Default)]
struct Heard {
    text: String,
    /// What it wrote to itself: counted, not handed on.
    thoughts: String,
    calls: Vec<(String, String)>,
    logprobs: Vec<TokenLogprob>,
    finish: Option<Finish>,
    usage: Option<Usage>,
}

impl Heard {
    async fn listen(
        &mut self,
        mut answer: Answer,
        say: &mut (dyn FnMut(Piece) + Send),
    ) -> Result<(), EngineError> {
        while let Some(data) = answer.event().await? {
            if data == "[DONE]" {
                break;
            }
            let chunk: Chunk = serde_json::from_str(&data)
                .map_err(|error| fault(format!("a piece of its answer is not as OpenAI's: {error}")))?;
            self.take(chunk, say)?;
        }
        if self.finish.is_none() {
            return Err(fault("its answer broke off before its end"));
        }
        // Where a server takes calls out of the text, they are put back in the way most templates write them.
        for (name, arguments) in std::mem::take(&mut self.calls) {
            let arguments: Value = serde_json::from_str(&arguments).unwrap_or(Value::String(arguments));
            let call = json!({"name": name, "arguments": arguments});
            self.add(format!("<tool_call>\n{call}\n</tool_call>"), Vec::new(), say)?;
        }
        Ok(())
    }

    fn take(&mut self, chunk: Chunk, say: &mut (dyn FnMut(Piece) + Send)) -> Result<(), EngineError> {
        if let Some(error) = chunk.error {
            // What would have been its status, had the answer not begun already.
            let status = match (error.get("code").and_then(Value::as_u64), error.get("type")) {
                (Some(code), _) => u16::try_from(code).unwrap_or(500),
                (None, Some(kind)) if kind == "invalid_request_error" => 400,
                _ => 500,
            };
            return Err(refusal("it", status, &error));
        }
        if chunk.usage.is_some() {
            self.usage = chunk.usage;
        }
        let Some(choice) = chunk.choices.into_iter().next() else {
            return Ok(());
        };
        let logprobs = choice.logprobs.and_then(|l| l.content).unwrap_or_default();
        let logprobs = logprobs.into_iter().map(token).collect();
        let thought = choice.delta.reasoning_content.or(choice.delta.reasoning);
        self.thoughts.push_str(&thought.unwrap_or_default());
        if self.thoughts.len() > TEXT_MAX {
            return Err(fault(format!("it writes more than {TEXT_MAX} bytes to itself")));
        }
        for part in choice.delta.tool_calls.unwrap_or_default() {
            if part.index >= 64 {
                return Err(fault("it calls more than 64 tools at once"));
            }
            if self.calls.len() <= part.index {
                self.calls.resize_with(part.index + 1, Default::default);
            }
            let (name, arguments) = &mut self.calls[part.index];
            name.push_str(&part.function.name.unwrap_or_default());
            arguments.push_str(&part.function.arguments.unwrap_or_default());
            if name.len() + arguments.len() > TEXT_MAX {
                return Err(fault(format!("it calls a tool with more than {TEXT_MAX} bytes")));
            }
        }
        let text = choice.delta.content.or(choice.text).unwrap_or_default();
        self.add(text, logprobs, say)?;
        match choice.finish_reason.as_deref() {
            None | Some("") => {}
            Some("length") => self.finish = Some(Finish::Length),
            Some(_) => self.finish = Some(Finish::Stop),
        }
        Ok(())
    }

    fn add(
        &mut self,
        text: String,
        logprobs: Vec<TokenLogprob>,
        say: &mut (dyn FnMut(Piece) + Send),
    ) -> Result<(), EngineError> {
        if text.is_empty() && logprobs.is_empty() {
            return Ok(());
        }
        self.text.push_str(&text);
        self.logprobs.extend(logprobs.iter().cloned());
        if self.text.len() > TEXT_MAX {
            return Err(fault(format!("its answer is longer than {TEXT_MAX} bytes")));
        }
        say(Piece {
            text,
            tokens: vec![karez_core::translate::UNNAMED_TOKEN],
            logprobs,
        });
        Ok(())
    }
}

fn token(l: Logprob) -> TokenLogprob {
    let top = |l: Logprob| TopLogprob {
        bytes: l.bytes.unwrap_or_else(|| l.token.clone().into_bytes()),
        token: l.token,
        logprob: l.logprob,
    };
    TokenLogprob {
        bytes: l.bytes.unwrap_or_else(|| l.token.clone().into_bytes()),
        token: l.token,
        logprob: l.logprob,
        top_logprobs: l.top_logprobs.into_iter().map(top).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_as_usual_is_left_out() {
        let plain = Generate::greedy(
            Prompt::Text {
                text: "hi".into(),
                system: Some("be brief".into()),
            },
            9,
        );
        let (path, body) = ask("m", &plain);
        assert_eq!(path, "/v1/chat/completions");
        assert_eq!(
            body,
            json!({
                "model": "m", "stream": true, "stream_options": {"include_usage": true}, "temperature": 0.0,
                "max_tokens": 9,
                "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
            })
        );
        let raw = Generate {
            temperature: 0.5,
            seed: u64::MAX,
            stop: vec!["END".into()],
            logit_bias: vec![(7, -1.0)],
            top_k: 3,
            ..Generate::greedy(Prompt::Raw { text: "x".into() }, 1)
        };
        let (path, body) = ask("m", &raw);
        assert_eq!((path, &body["prompt"]), ("/v1/completions", &json!("x")));
        assert_eq!((&body["seed"], &body["top_k"]), (&json!(0x7fff_ffff), &json!(3)));
        assert_eq!(body["logit_bias"], json!({"7": -1.0}));
    }

    #[test]
    fn a_count_has_its_bounds() {
        assert_eq!(around(1000), (900, 1100));
        assert_eq!(around(5), (0, 21));
        assert_eq!(possible(640), (10, 656));
    }

    #[test]
    fn calls_come_back_into_the_text() {
        let mut heard = Heard::default();
        for chunk in [
            json!({"choices": [{"delta": {"tool_calls": [{"index": 0, "function": {"name": "rain", "arguments": ""}}]}}]}),
            json!({"choices": [{"delta": {"tool_calls": [{"index": 0, "function": {"arguments": "{\"mm\":"}}]}}]}),
            json!({"choices": [{"delta": {"tool_calls": [{"index": 0, "function": {"arguments": "3}"}}]}, "finish_reason": "tool_calls"}]}),
        ] {
            heard
                .take(serde_json::from_value(chunk).unwrap(), &mut |_| {})
                .unwrap();
        }
        assert_eq!(heard.calls, [("rain".to_owned(), "{\"mm\":3}".to_owned())]);
        assert_eq!(heard.finish, Some(Finish::Stop));
    }
}
