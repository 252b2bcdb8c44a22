//! One line of data: what shapes it may have, and what is wrong with it otherwise.

use serde::Deserialize;
use serde_json::Value;

use crate::protocol::Message;

/// What a line can be.
pub(super) enum Shape {
    Text(String),
    Messages(Vec<Message>),
    Pair {
        prompt: String,
        answer: String,
        raw: String,
    },
}

impl Shape {
    /// The text that is to be learnt, and all of it.
    pub(super) fn answers(&self) -> Vec<&str> {
        match self {
            Self::Text(text) => vec![text],
            Self::Pair { answer, .. } => vec![answer],
            Self::Messages(messages) => {
                let own = messages.iter().filter(|message| message.role == "assistant");
                own.map(|message| message.content.as_str()).collect()
            }
        }
    }

    /// Bytes of what is to be learnt, marks not counted: the answers, or `all` of it.
    pub(super) fn bytes(&self, all: bool, templated: bool) -> usize {
        match self {
            Self::Messages(messages) if all => messages.iter().map(|message| message.content.len()).sum(),
            Self::Pair { prompt, answer, raw } if all => {
                answer.len() + if templated { prompt } else { raw }.len()
            }
            _ => self.answers().iter().map(|answer| answer.len()).sum(),
        }
    }

    pub(super) fn texts(&mut self) -> Vec<&mut String> {
        match self {
            Self::Text(text) => vec![text],
            Self::Pair { prompt, answer, raw } => vec![prompt, answer, raw],
            Self::Messages(messages) => messages.iter_mut().map(|message| &mut message.content).collect(),
        }
    }
}

#[derive(Deserialize)]
struct Fields {
    messages: Option<Vec<Message>>,
    prompt: Option<String>,
    completion: Option<String>,
    text: Option<String>,
    instruction: Option<String>,
    input: Option<String>,
    output: Option<String>,
    #[serde(alias = "language")]
    lang: Option<String>,
}

const SHAPES: &str = "expected an object with \"messages\", \"prompt\" and \"completion\", \"text\", or \
    \"instruction\" and \"output\"";

/// Reads one line, with the language that it names. The error goes on after "line 7".
pub(super) fn parse(line: &[u8]) -> Result<(Shape, Option<String>), String> {
    let text = std::str::from_utf8(line)
        .map_err(|error| format!("is not UTF-8 (byte {} of the line)", error.valid_up_to() + 1))?;
    let value: Value = serde_json::from_str(text).map_err(|error| {
        let why = error.to_string();
        format!("is not JSON: {}", why.split(" at line").next().unwrap_or(&why))
    })?;
    let fields: Fields =
        serde_json::from_value(value).map_err(|error| format!("has the wrong shape ({error}): {SHAPES}"))?;
    let Fields {
        messages,
        prompt,
        completion,
        text,
        instruction,
        input,
        output,
        lang,
    } = fields;
    let shape = match (messages, prompt, completion, text, instruction, output) {
        (Some(messages), None, None, None, None, None) => {
            let known = ["system", "user", "assistant", "tool"];
            if let Some(bad) = messages
                .iter()
                .find(|message| !known.contains(&message.role.as_str()))
            {
                return Err(format!(
                    "has a turn of {:?}; possible are {}",
                    bad.role,
                    known.join(", ")
                ));
            }
            Shape::Messages(messages)
        }
        (None, Some(prompt), Some(answer), None, None, None) => {
            let raw = prompt.clone();
            Shape::Pair { prompt, answer, raw }
        }
        (None, None, None, Some(text), None, None) => Shape::Text(text),
        (None, None, None, None, Some(task), Some(answer)) => {
            let input = input.filter(|input| !input.is_empty());
            let prompt = match &input {
                Some(input) => format!("{task}\n\n{input}"),
                None => task.clone(),
            };
            let raw = match &input {
                Some(input) => format!("### Instruction:\n{task}\n\n### Input:\n{input}\n\n### Response:\n"),
                None => format!("### Instruction:\n{task}\n\n### Response:\n"),
            };
            Shape::Pair { prompt, answer, raw }
        }
        _ => return Err(format!("has the wrong shape: {SHAPES}")),
    };
    let answers = shape.answers();
    if answers.is_empty() || answers.iter().any(|answer| answer.trim().is_empty()) {
        return Err("has an empty answer: there is nothing to learn".into());
    }
    Ok((shape, lang))
}
