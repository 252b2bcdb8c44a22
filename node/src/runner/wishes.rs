//! How one line wants to be sampled, where it differs from its order. Fields are named as in OpenAI's API.
use karez_core::records::Generate as Ordered;
use karez_engine::{
    json::Json,
    protocol::{Generate, Prompt, ResponseFormat, TOP_LOGPROBS_MAX},
};
use serde::de::DeserializeOwned;

/// What a line asks for itself. Absent fields leave it to the order.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Wishes {
    max_tokens: Option<u32>,
    temperature: Option<f32>,
    top_k: Option<u32>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    logit_bias: Vec<(u32, f32)>,
    seed: Option<u64>,
    stop: Option<Vec<String>>,
    top_logprobs: Option<Option<u8>>,
    response_format: Option<ResponseFormat>,
    tools: Vec<Json>,
    resume: Vec<u32>,
}

impl Wishes {
    /// Reads the fields of a line; an error names the field.
    pub(super) fn read(line: &Json) -> Result<Self, String> {
        let seed = field::<i64>(line, "seed")?.map(|seed| seed as u64);
        let biases = line
            .get("logit_bias")
            .and_then(Json::as_object)
            .unwrap_or_default();
        let logit_bias = biases.iter().map(|(token, bias)| {
            let bias = typed::<f32>("logit_bias", bias)?;
            let token = token
                .parse()
                .map_err(|_| format!("has {token:?} in \"logit_bias\", which is no token"))?;
            Ok::<_, String>((token, bias))
        });
        Ok(Self {
            max_tokens: field(line, "max_completion_tokens")?.or(field(line, "max_tokens")?),
            temperature: field(line, "temperature")?,
            top_k: field(line, "top_k")?,
            top_p: field(line, "top_p")?,
            min_p: field(line, "min_p")?,
            repetition_penalty: field(line, "repetition_penalty")?,
            presence_penalty: field(line, "presence_penalty")?,
            frequency_penalty: field(line, "frequency_penalty")?,
            logit_bias: logit_bias.collect::<Result<_, _>>()?,
            seed,
            stop: match line.get("stop") {
                Some(Json::Text(one)) => Some(vec![one.clone()]),
                _ => field(line, "stop")?,
            },
            top_logprobs: logprobs(line)?,
            response_format: field(line, "response_format")?,
            tools: field(line, "tools")?.unwrap_or_default(),
            resume: field(line, "resume")?.unwrap_or_default(),
        })
    }

    /// The request for a prompt: as ordered, but for what the line wants otherwise.
    pub(super) fn request(
        &self,
        ordered: &Ordered,
        mut prompt: Prompt,
        index: u64,
    ) -> Result<Generate, String> {
        let milli = |n: u32| n as f32 / 1000.0;
        let unless_zero = |n: u32| if n == 0 { 1.0 } else { milli(n) };
        if let Prompt::Chat { tools, .. } = &mut prompt {
            tools.clone_from(&self.tools);
        }
        let format = match (&self.response_format, ordered.response_format.as_str()) {
            (Some(own), _) => Some(own.clone()),
            (None, "") => None,
            (None, text) => Some(
                serde_json::from_str(text)
                    .map_err(|error| format!("the order's response_format is not understood: {error}"))?,
            ),
        };
        let ordered_logprobs = ordered.top_logprobs.map(|n| n.min(TOP_LOGPROBS_MAX.into()) as u8);
        Ok(Generate {
            prompt,
            max_tokens: self.max_tokens.or(Some(ordered.max_tokens)).filter(|n| *n > 0),
            temperature: self.temperature.unwrap_or(milli(ordered.temperature_milli)),
            top_k: self.top_k.unwrap_or(ordered.top_k),
            top_p: self.top_p.unwrap_or(unless_zero(ordered.top_p_milli)),
            min_p: self.min_p.unwrap_or(milli(ordered.min_p_milli)),
            repetition_penalty: self
                .repetition_penalty
                .unwrap_or(unless_zero(ordered.repetition_penalty_milli)),
            presence_penalty: self
                .presence_penalty
                .unwrap_or(ordered.presence_penalty_milli as f32 / 1000.0),
            frequency_penalty: self
                .frequency_penalty
                .unwrap_or(ordered.frequency_penalty_milli as f32 / 1000.0),
            logit_bias: self.logit_bias.clone(),
            // The same however the job is cut, and not the same draw for every line.
            seed: self.seed.unwrap_or(ordered.seed.wrapping_add(index)),
            stop: self.stop.clone().unwrap_or_else(|| ordered.stop.clone()),
            top_logprobs: self.top_logprobs.unwrap_or(ordered_logprobs),
            response_format: format,
            adapter: None,
            resume: self.resume.clone(),
        })
    }
}

/// A chat asks with `logprobs: true` and perhaps `top_logprobs`, a completion with `logprobs: n`.
fn logprobs(line: &Json) -> Result<Option<Option<u8>>, String> {
    let top = field::<u8>(line, "top_logprobs")?;
    Ok(match line.get("logprobs") {
        None | Some(Json::Null) => top.map(Some),
        Some(Json::Bool(true)) => Some(Some(top.unwrap_or(0))),
        Some(Json::Bool(false)) => Some(None),
        Some(number) => Some(Some(typed("logprobs", number)?)),
    })
}

/// The value of a field; nothing when it is absent or null.
pub(super) fn field<T: DeserializeOwned>(line: &Json, name: &str) -> Result<Option<T>, String> {
    match line.get(name) {
        None | Some(Json::Null) => Ok(None),
        Some(value) => typed(name, value).map(Some),
    }
}

fn typed<T: DeserializeOwned>(name: &str, value: &Json) -> Result<T, String> {
    serde_json::from_str(&value.to_string()).map_err(|error| {
        let why = error.to_string();
        // Its line number would be that of the field, not of the input.
        let why = why.split(" at line").next().unwrap_or(&why);
        format!("has the field {name:?} wrong: {why}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use karez_core::{
        artifact::{ArtifactKind, ArtifactRef},
        id::Digest,
        unit::Bytes,
    };

    fn ordered() -> Ordered {
        let model = ArtifactRef {
            digest: Digest::of(b""),
            bytes: Bytes(0),
            kind: ArtifactKind::Blob,
        };
        Ordered {
            temperature_milli: 500,
            stop: vec!["END".into()],
            seed: 7,
            response_format: r#"{"type":"json_object"}"#.into(),
            ..Ordered::greedy(model, "m", 9)
        }
    }

    fn read(line: &str) -> Result<Wishes, String> {
        Wishes::read(&serde_json::from_str(line).unwrap())
    }

    fn request(line: &str) -> Generate {
        let prompt = Prompt::Raw { text: "x".into() };
        read(line).unwrap().request(&ordered(), prompt, 3).unwrap()
    }

    #[test]
    fn a_line_overrides_its_order_field_by_field() {
        let plain = request("{}");
        assert_eq!(
            (plain.max_tokens, plain.temperature, plain.seed),
            (Some(9), 0.5, 10)
        );
        assert_eq!((plain.stop, plain.top_logprobs), (vec!["END".to_owned()], None));
        assert_eq!(plain.response_format, Some(ResponseFormat::JsonObject));
        let own = request(
            r#"{"max_tokens":5,"max_completion_tokens":4,"temperature":1,"top_p":0.5,"seed":-1,"stop":"\n","logprobs":true,
                "top_logprobs":2,"presence_penalty":null,"response_format":{"type":"text"},"logit_bias":{"12":-100},
                "resume":[1,2],"unheard_of":{}}"#,
        );
        assert_eq!(
            (own.max_tokens, own.temperature, own.top_p, own.seed),
            (Some(4), 1.0, 0.5, u64::MAX)
        );
        assert_eq!((own.stop, own.top_logprobs), (vec!["\n".to_owned()], Some(2)));
        assert_eq!(own.response_format, Some(ResponseFormat::Text));
        assert_eq!((own.logit_bias, own.resume), (vec![(12, -100.0)], vec![1, 2]));
        assert_eq!(request(r#"{"logprobs":3}"#).top_logprobs, Some(3));
    }

    #[test]
    fn a_wrong_field_is_named() {
        for (line, says) in [
            (r#"{"temperature":"hot"}"#, "\"temperature\" wrong"),
            (r#"{"stop":7}"#, "\"stop\" wrong"),
            (r#"{"max_tokens":-1}"#, "\"max_tokens\" wrong"),
            (
                r#"{"response_format":{"type":"poem"}}"#,
                "\"response_format\" wrong",
            ),
            (r#"{"logit_bias":{"x":1}}"#, "\"logit_bias\", which is no token"),
        ] {
            let error = read(line).unwrap_err();
            assert!(error.contains(says), "{line}: {error}");
        }
    }
}
