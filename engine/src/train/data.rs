//! Examples: read from JSON lines, checked before anything is spent on them, and turned into tokens of which some are to
//! be learnt.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::{BufRead, Read};
use std::path::Path;

use icu_normalizer::ComposingNormalizerBorrowed;
use serde::Deserialize;
use serde_json::Value;
use tokenizers::Tokenizer;

use super::base::read_json;
use super::settings::{ExcessLength, Settings};
use super::{Rng, TrainError};
use crate::protocol::Message;
use crate::worker::chat::ChatTemplate;

/// Bytes of one line at most.
pub const LINE_MAX: usize = 1 << 20;
/// Bytes of one data file at most: it is held in memory as tokens.
pub const DATA_MAX: u64 = 2 << 30;
/// Faults that are named; the rest is counted.
const FAULTS_SHOWN: usize = 20;

/// One example as tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// All of it.
    pub ids: Vec<u32>,
    /// Which of them are to be learnt.
    pub learnt: Vec<bool>,
    /// Bytes of the text to be learnt, marks not counted.
    pub bytes: usize,
    /// Its language's place in [`Data::languages`].
    pub language: usize,
}

impl Example {
    /// Tokens that go through the model: the last one is only ever a target.
    pub fn length(&self) -> usize {
        self.ids.len().saturating_sub(1)
    }
}

/// Sequences one after the other, without padding.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Packed {
    /// All tokens.
    pub ids: Vec<u32>,
    /// Tokens of each sequence. Sequences do not see each other, and each begins at position 0.
    pub lengths: Vec<usize>,
    /// A row of `ids`, and the token that should come next there.
    pub targets: Vec<(u32, u32)>,
}

impl Packed {
    /// Lays out `examples`.
    pub fn new<'a>(examples: impl IntoIterator<Item = &'a Example>) -> Self {
        let mut packed = Self::default();
        for example in examples.into_iter().filter(|example| example.length() > 0) {
            let start = packed.ids.len();
            packed.ids.extend_from_slice(&example.ids[..example.length()]);
            packed.lengths.push(example.length());
            for (position, id) in example.ids.iter().enumerate().skip(1) {
                if example.learnt[position] {
                    packed.targets.push(((start + position - 1) as u32, *id));
                }
            }
        }
        packed
    }
}

/// How a base model reads: its tokenizer, marks and chat template.
pub struct Reader {
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    bos: Option<String>,
    eos: Option<String>,
    add_bos: bool,
}

impl Reader {
    /// From a model directory's `tokenizer.json`, `tokenizer_config.json` and, where it exists, `chat_template.jinja`.
    pub fn open(folder: &Path) -> Result<Self, TrainError> {
        let path = folder.join("tokenizer.json");
        let wrong = |path: &Path, why: String| TrainError::File {
            path: path.to_owned(),
            why,
        };
        let mut tokenizer = Tokenizer::from_file(&path).map_err(|error| wrong(&path, error.to_string()))?;
        // Some files ask for a fixed length.
        tokenizer.with_padding(None);
        tokenizer
            .with_truncation(None)
            .map_err(|error| wrong(&path, error.to_string()))?;
        let path = folder.join("tokenizer_config.json");
        let config: Value = if path.exists() {
            read_json(&path)?
        } else {
            Value::Null
        };
        let mark = |name: &str| {
            let mark = &config[name];
            mark.as_str()
                .or_else(|| mark["content"].as_str())
                .map(str::to_owned)
        };
        let (bos, eos) = (mark("bos_token"), mark("eos_token"));
        let jinja = folder.join("chat_template.jinja");
        let template = match std::fs::read_to_string(&jinja) {
            Ok(text) => Some(text),
            Err(_) => config["chat_template"].as_str().map(str::to_owned),
        };
        let template = template
            .map(|text| {
                let (bos, eos) = (bos.clone().unwrap_or_default(), eos.clone().unwrap_or_default());
                ChatTemplate::new(text, bos, eos)
                    .map_err(|error| wrong(folder, format!("its chat template is broken: {error}")))
            })
            .transpose()?;
        let add_bos = config["add_bos_token"] == Value::Bool(true);
        Ok(Self {
            tokenizer,
            template,
            bos,
            eos,
            add_bos,
        })
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>, TrainError> {
        let encoding = self.tokenizer.encode(text, false);
        let encoding = encoding.map_err(|error| TrainError::Tokenizer(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Pieces of text with whether each is learnt: a model reads prompt and answer apart, so they are tokenised apart.
    fn pieces(&self, shape: &Shape) -> Result<Vec<(String, bool)>, String> {
        let eos = self.eos.clone().unwrap_or_default();
        let chat = |turns: Vec<(&str, &str)>| -> Vec<Message> {
            turns
                .into_iter()
                .map(|(role, content)| Message::new(role, content))
                .collect()
        };
        let mut pieces = match (shape, &self.template) {
            (Shape::Text(text), _) => vec![(text.clone() + &eos, true)],
            (Shape::Messages(messages), Some(template)) => return conversation(template, messages),
            (Shape::Messages(_), None) => {
                return Err("has messages, but the base model has no chat template".into());
            }
            (Shape::Pair { prompt, answer, .. }, Some(template)) => {
                return conversation(template, &chat(vec![("user", prompt), ("assistant", answer)]));
            }
            (Shape::Pair { raw, answer, .. }, None) => {
                vec![(raw.clone(), false), (answer.clone() + &eos, true)]
            }
        };
        if let (true, Some(bos)) = (self.add_bos, &self.bos) {
            pieces.insert(0, (bos.clone(), false));
        }
        Ok(pieces)
    }
}

/// A conversation as its template writes it, each of the assistant's turns to be learnt with what ends it.
fn conversation(template: &ChatTemplate, messages: &[Message]) -> Result<Vec<(String, bool)>, String> {
    let render = |messages: &[Message], open: bool| {
        template
            .render_turns(messages, open)
            .map_err(|error| error.to_string())
    };
    let mut pieces = Vec::new();
    let mut written = String::new();
    for (index, message) in messages.iter().enumerate() {
        if message.role != "assistant" {
            continue;
        }
        let before = render(&messages[..index], true)?;
        let after = render(&messages[..=index], false)?;
        let ahead = before.strip_prefix(&written);
        let (Some(ahead), Some(answer)) = (ahead, after.strip_prefix(&before)) else {
            return Err(
                "cannot be taught: the chat template rewrites earlier turns when later ones come".into(),
            );
        };
        pieces.push((ahead.to_owned(), false));
        // What follows the end mark (a line break, mostly) is never generated, so it is not learnt either.
        let kept = answer.trim_end_matches(['\n', ' ']);
        pieces.push((kept.to_owned(), true));
        written = before.clone() + kept;
    }
    if pieces.is_empty() {
        return Err("has no turn of the assistant: there is nothing to learn".into());
    }
    Ok(pieces)
}

/// What a line can be.
enum Shape {
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
    fn answers(&self) -> Vec<&str> {
        match self {
            Self::Text(text) => vec![text],
            Self::Pair { answer, .. } => vec![answer],
            Self::Messages(messages) => {
                let own = messages.iter().filter(|message| message.role == "assistant");
                own.map(|message| message.content.as_str()).collect()
            }
        }
    }

    fn texts(&mut self) -> Vec<&mut String> {
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

fn parse(line: &[u8]) -> Result<(Shape, Option<String>), String> {
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

/// Whether a text names a language as BCP 47 does: `sw`, `swa`, `pt-BR`, `zh-Hans`.
pub fn is_language(tag: &str) -> bool {
    let mut parts = tag.split('-');
    let first = parts.next().unwrap_or_default();
    (2..=3).contains(&first.len())
        && first.bytes().all(|b| b.is_ascii_lowercase())
        && parts.all(|part| (2..=8).contains(&part.len()) && part.bytes().all(|b| b.is_ascii_alphanumeric()))
}

/// The language of what nobody tagged.
pub const UNDETERMINED: &str = "und";

/// All examples of a run.
#[derive(Debug, Clone, Default)]
pub struct Data {
    /// To train on.
    pub examples: Vec<Example>,
    /// To look at, never to train on.
    pub held_out: Vec<Example>,
    /// Tags, in order.
    pub languages: Vec<String>,
    /// What a researcher should know: duplicates left out, texts normalised, examples cut.
    pub notices: Vec<String>,
}

impl Data {
    /// Reads and checks a file. `language` is that of lines that name none. On an error, all faults are named together,
    /// with file and line.
    pub fn read(
        path: &Path,
        reader: &Reader,
        settings: &Settings,
        language: Option<&str>,
    ) -> Result<Self, TrainError> {
        let wrong = |why: String| TrainError::File {
            path: path.to_owned(),
            why,
        };
        if let Some(tag) = language.filter(|tag| !is_language(tag)) {
            return Err(TrainError::Setting {
                name: "lang".into(),
                why: format!("is {tag:?}; a tag like sw, swa or pt-BR is meant"),
            });
        }
        let file = std::fs::File::open(path).map_err(|error| wrong(format!("cannot be opened: {error}")))?;
        let bytes = file.metadata().map_err(|error| wrong(error.to_string()))?.len();
        if bytes > DATA_MAX {
            return Err(wrong(format!(
                "has {bytes} bytes, over the {DATA_MAX} that one run can hold"
            )));
        }
        let mut file = std::io::BufReader::with_capacity(1 << 18, file);
        let mut seen: HashMap<[u8; 32], usize> = HashMap::new();
        let mut tags: BTreeSet<String> = BTreeSet::new();
        let mut read: Vec<(Example, String)> = Vec::new();
        let (mut faults, mut more) = (Vec::new(), 0usize);
        let (mut doubles, mut composed, mut dropped, mut cut) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let nfc = ComposingNormalizerBorrowed::new_nfc();
        let mut line = Vec::new();
        for number in 1usize.. {
            line.clear();
            let got = (&mut file)
                .take(LINE_MAX as u64 + 2)
                .read_until(b'\n', &mut line)
                .map_err(|error| wrong(format!("cannot be read: {error}")))?;
            if got == 0 {
                break;
            }
            if line.len() > LINE_MAX + 1 {
                return Err(wrong(format!("line {number} is longer than {LINE_MAX} bytes")));
            }
            let trimmed = line.trim_ascii();
            if trimmed.is_empty() {
                continue;
            }
            let mut fault = |why: String| {
                if faults.len() < FAULTS_SHOWN {
                    faults.push(format!("line {number} {why}"));
                } else {
                    more += 1;
                }
            };
            let (mut shape, tag) = match parse(trimmed) {
                Ok(parsed) => parsed,
                Err(why) => {
                    fault(why);
                    continue;
                }
            };
            let tag = tag
                .or_else(|| language.map(str::to_owned))
                .unwrap_or_else(|| UNDETERMINED.into());
            if !is_language(&tag) {
                fault(format!(
                    "has the language {tag:?}; a tag like sw, swa or pt-BR is meant"
                ));
                continue;
            }
            for text in shape.texts() {
                if !nfc.is_normalized(text) {
                    *text = nfc.normalize(text).into_owned();
                    if composed.last() != Some(&number) {
                        composed.push(number);
                    }
                }
            }
            let pieces = match reader.pieces(&shape) {
                Ok(pieces) => pieces,
                Err(why) => {
                    fault(why);
                    continue;
                }
            };
            let mut hash = blake3::Hasher::new();
            for (piece, learnt) in &pieces {
                hash.update(&[u8::from(*learnt)]);
                hash.update(&(piece.len() as u64).to_le_bytes());
                hash.update(piece.as_bytes());
            }
            if seen.insert(*hash.finalize().as_bytes(), number).is_some() {
                doubles.push(number);
                continue;
            }
            let bytes = shape.answers().iter().map(|answer| answer.len()).sum();
            let mut example = Example {
                ids: Vec::new(),
                learnt: Vec::new(),
                bytes,
                language: 0,
            };
            for (piece, learnt) in pieces {
                example.ids.extend(reader.encode(&piece)?);
                example
                    .learnt
                    .resize(example.ids.len(), learnt || settings.train_on_inputs);
            }
            if example.length() > settings.sequence_len {
                let (length, most) = (example.length(), settings.sequence_len);
                match settings.excess_length_strategy {
                    ExcessLength::Raise => {
                        fault(format!(
                            "has {length} tokens, sequence_len is {most}: raise it, or set excess_length_strategy to \
                             drop or truncate"
                        ));
                        continue;
                    }
                    ExcessLength::Drop => {
                        dropped.push(number);
                        continue;
                    }
                    ExcessLength::Truncate => {
                        example.ids.truncate(most + 1);
                        example.learnt.truncate(most + 1);
                        cut.push(number);
                    }
                }
            }
            if !example.learnt.iter().skip(1).any(|learnt| *learnt) {
                fault("has nothing to learn within sequence_len".into());
                continue;
            }
            tags.insert(tag.clone());
            read.push((example, tag));
        }
        if more > 0 {
            faults.push(format!("and {more} more lines"));
        }
        if !faults.is_empty() {
            return Err(TrainError::Data {
                path: path.to_owned(),
                faults,
            });
        }
        if read.is_empty() {
            return Err(wrong("holds no examples".into()));
        }
        let mut data = Self {
            languages: tags.into_iter().collect(),
            ..Self::default()
        };
        for (what, lines) in [
            ("repeated and left out", doubles),
            ("not in Unicode's composed form (NFC) and composed", composed),
            ("longer than sequence_len and left out", dropped),
            ("longer than sequence_len and cut", cut),
        ] {
            if let Some(first) = lines.first() {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                let count = lines.len();
                data.notices.push(match count {
                    1 => format!("{name}: line {first} was {what}"),
                    _ => format!("{name}: {count} lines were {what}, the first is line {first}"),
                });
            }
        }
        if data.languages.iter().any(|tag| tag == UNDETERMINED) {
            data.notices
                .push("some lines name no language: say which with --lang or a \"lang\" field".into());
        }
        data.split(read, settings);
        if data.examples.is_empty() {
            return Err(wrong(format!(
                "leaves nothing to train on after val_set_size {} is held out",
                settings.val_set_size
            )));
        }
        Ok(data)
    }

    /// Holds out the same share of every language.
    fn split(&mut self, read: Vec<(Example, String)>, settings: &Settings) {
        let mut of: BTreeMap<usize, Vec<Example>> = BTreeMap::new();
        for (mut example, tag) in read {
            let language = self.languages.iter().position(|known| *known == tag).unwrap_or(0);
            example.language = language;
            of.entry(language).or_default().push(example);
        }
        for (language, mut examples) in of {
            let held = match settings.val_set_size {
                share if share < 1.0 => (share * examples.len() as f64).round() as usize,
                count => count as usize,
            };
            let least = usize::from(settings.val_set_size > 0.0 && examples.len() >= 2);
            let held = held.max(least);
            Rng::new(settings.seed ^ (0x4845_4c44 + language as u64)).shuffle(&mut examples);
            let rest = examples.split_off(held.min(examples.len()));
            self.held_out.extend(examples);
            self.examples.extend(rest);
        }
    }
}
