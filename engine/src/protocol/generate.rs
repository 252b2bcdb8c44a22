//! A generation: what to continue, how to sample, and what comes back. Names are those of OpenAI's API where it has
//! them, so that a gateway passes them on as they are.
use serde::{Deserialize, Deserializer, Serialize, de::Error};

use crate::error::EngineError;
use crate::json::Json;

/// Stop strings of one [`Generate`] at most.
pub const STOPS_MAX: usize = 16;
/// Bytes of one stop string at most.
pub const STOP_BYTES_MAX: usize = 1024;
/// Alternatives told for each token at most.
pub const TOP_LOGPROBS_MAX: u8 = 20;
/// Tokens with a bias at most.
pub const BIASES_MAX: usize = 1024;

/// A prompt and how to sample its continuation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Generate {
    /// What to continue or answer.
    pub prompt: Prompt,
    /// Tokens to generate at most; to the end of the context when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u32>,
    /// 0 always takes the likeliest token; up to 100.
    #[serde(default)]
    pub temperature: f32,
    /// Sample among this many likeliest tokens; 0 for no limit.
    #[serde(default)]
    pub top_k: u32,
    /// Sample among the likeliest tokens that make up this share of probability; 1 for no limit.
    #[serde(default = "one")]
    pub top_p: f32,
    /// Sample among tokens at least this fraction as likely as the likeliest; 0 for no limit.
    #[serde(default)]
    pub min_p: f32,
    /// Divides the score of every token that stands in the prompt or the answer; 1 for none. Up to 10.
    #[serde(default = "one")]
    pub repetition_penalty: f32,
    /// Taken from the score of every token that stands in the answer; -2 to 2.
    #[serde(default)]
    pub presence_penalty: f32,
    /// Taken from the score of a token for each time it stands in the answer; -2 to 2.
    #[serde(default)]
    pub frequency_penalty: f32,
    /// Added to the scores of these tokens, -100 to 100. At most [`BIASES_MAX`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub logit_bias: Vec<(u32, f32)>,
    /// Equal seeds give equal draws, position by position. Equal texts follow on one engine build, thread count and
    /// instruction set, as far as the company in the batch does not change a rounding.
    #[serde(default)]
    pub seed: u64,
    /// Texts that end the answer; they are not part of it. At most [`STOPS_MAX`] of [`STOP_BYTES_MAX`] bytes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stop: Vec<String>,
    /// Tell each token's log-probability, and those of so many likeliest tokens, at most [`TOP_LOGPROBS_MAX`].
    /// They are the model's own: before temperature, penalties, bias and grammar.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_logprobs: Option<u8>,
    /// What the answer must look like.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub response_format: Option<ResponseFormat>,
    /// A LoRA adapter for this request alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<Adapter>,
    /// Tokens of the answer that were generated before, elsewhere: they count against `max_tokens`, are read like a
    /// prompt, metered as `tokens_in`, and not shown again. The answer goes on where they end.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub resume: Vec<u32>,
}

impl Generate {
    /// The likeliest continuation of `prompt`.
    pub fn greedy(prompt: Prompt, max_tokens: u32) -> Self {
        Self {
            prompt,
            max_tokens: Some(max_tokens),
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            stop: Vec::new(),
            top_logprobs: None,
            response_format: None,
            adapter: None,
            resume: Vec::new(),
        }
    }
}

impl Generate {
    /// Whether its settings are within what is allowed; an error names the setting, its value and the limits. The rest is
    /// for the model to say.
    pub fn check(&self) -> Result<(), EngineError> {
        let refuse = |why: String| Err(EngineError::bad_input(why));
        let within = |name: &str, value: f32, low: f32, high: f32| {
            if (low..=high).contains(&value) {
                Ok(())
            } else {
                refuse(format!("{name} is {value}; {low} to {high} are allowed"))
            }
        };
        within("temperature", self.temperature, 0.0, 100.0)?;
        within("min_p", self.min_p, 0.0, 1.0)?;
        within("presence_penalty", self.presence_penalty, -2.0, 2.0)?;
        within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)?;
        let (top_p, repetition) = (self.top_p, self.repetition_penalty);
        if !(top_p > 0.0 && top_p <= 1.0) {
            return refuse(format!("top_p is {top_p}; more than 0, up to 1, is allowed"));
        }
        if !(repetition > 0.0 && repetition <= 10.0) {
            return refuse(format!(
                "repetition_penalty is {repetition}; more than 0, up to 10, is allowed"
            ));
        }
        if self.stop.len() > STOPS_MAX {
            return refuse(format!(
                "{} stop strings, {STOPS_MAX} are allowed",
                self.stop.len()
            ));
        }
        if let Some(long) = self
            .stop
            .iter()
            .map(String::len)
            .find(|bytes| *bytes > STOP_BYTES_MAX)
        {
            return refuse(format!(
                "a stop string of {long} bytes, {STOP_BYTES_MAX} are allowed"
            ));
        }
        if let Some(top) = self.top_logprobs.filter(|top| *top > TOP_LOGPROBS_MAX) {
            return refuse(format!(
                "top_logprobs is {top}; 0 to {TOP_LOGPROBS_MAX} are allowed"
            ));
        }
        if self.logit_bias.len() > BIASES_MAX {
            return refuse(format!(
                "logit_bias names {} tokens, {BIASES_MAX} are allowed",
                self.logit_bias.len()
            ));
        }
        for (_, bias) in &self.logit_bias {
            within("a logit_bias", *bias, -100.0, 100.0)?;
        }
        match &self.adapter {
            Some(Adapter { scale, .. }) if !scale.is_finite() || scale.abs() > 16.0 => {
                refuse(format!("the adapter's scale is {scale}; -16 to 16 are allowed"))
            }
            _ => Ok(()),
        }
    }
}

fn one() -> f32 {
    1.0
}

/// What an answer must look like.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ResponseFormat {
    /// Anything.
    Text,
    /// A JSON object.
    JsonObject,
    /// JSON that fits a schema.
    JsonSchema {
        /// The schema.
        json_schema: JsonSchema,
    },
}

/// A JSON schema with its name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JsonSchema {
    /// For the reader; it changes nothing.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// The schema. A part that cannot be enforced is refused, never passed over.
    pub schema: Json,
}

/// A LoRA adapter: a GGUF file in the directory named by [`Load::adapters`](super::Load::adapters).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Adapter {
    /// Its file name there.
    pub file: String,
    /// How strongly it is applied.
    #[serde(default = "one")]
    pub scale: f32,
}

/// What a generation starts from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Prompt {
    /// Given to the model exactly as it is; special tokens in it count as such.
    Raw {
        /// The text.
        text: String,
    },
    /// One question, put through the model's chat template.
    Text {
        /// The question.
        text: String,
        /// How the model should behave.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        system: Option<String>,
    },
    /// A conversation, put through the model's chat template.
    Chat {
        /// Oldest first.
        messages: Vec<Message>,
        /// What the model may call, as the template shows it.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        tools: Vec<Json>,
    },
}

/// One turn of a conversation.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`; the model's template may know more.
    pub role: String,
    /// What was said. Read from a string, from null, or from a list of parts of the type `text`.
    #[serde(deserialize_with = "content")]
    pub content: String,
    /// Who said it, for templates that tell several users apart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What the assistant called, for the template.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<Json>,
    /// Which call this turn answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<String>,
}

impl Message {
    /// A plain turn.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self {
            role: role.into(),
            content: content.into(),
            ..Self::default()
        }
    }
}

fn content<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    #[derive(Deserialize)]
    struct Part {
        r#type: String,
        #[serde(default)]
        text: String,
    }
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Content {
        Text(String),
        Parts(Vec<Part>),
        None(()),
    }
    match Content::deserialize(from)? {
        Content::Text(text) => Ok(text),
        Content::None(()) => Ok(String::new()),
        Content::Parts(parts) => match parts.iter().find(|part| part.r#type != "text") {
            Some(other) => Err(D::Error::custom(format!(
                "a part of the content is of the type {:?}; only \"text\" is understood",
                other.r#type
            ))),
            None => Ok(parts.into_iter().map(|part| part.text).collect()),
        },
    }
}

/// A piece of an answer.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Piece {
    /// Whole code points. Empty only in the last piece, when tokens without a text of their own close the answer.
    pub text: String,
    /// The tokens that it came from. All pieces' tokens together are what [`Generate::resume`] takes.
    #[serde(default)]
    pub tokens: Vec<u32>,
    /// One for each token, when asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub logprobs: Vec<TokenLogprob>,
}

/// How likely a generated token was.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprob {
    /// Its text; bytes that are no text are replaced.
    pub token: String,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// The likeliest tokens at this place, likeliest first.
    pub top_logprobs: Vec<TopLogprob>,
}

/// How likely a token would have been.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TopLogprob {
    /// Its text; bytes that are no text are replaced.
    pub token: String,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// Why a text ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// The model ended it, or a stop string did.
    Stop,
    /// `max_tokens` were generated.
    Length,
    /// The context is full.
    Context,
}
