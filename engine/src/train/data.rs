//! Examples: read from JSON lines, checked before anything is spent on them, and turned into tokens of which some are to
//! be learnt.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::{BufRead, Read};
use std::path::Path;

use icu_normalizer::ComposingNormalizerBorrowed;
use serde_json::Value;
use tokenizers::Tokenizer;

use super::base::read_json;
use super::lines::{Shape, parse};
use super::settings::{ExcessLength, Settings};
use super::{Rng, TrainError};
use crate::protocol::Message;
use crate::worker::chat::ChatTemplate;

/// Bytes of one line at most.
pub const LINE_MAX: usize = 1 << 20;
/// Bytes of one data file at most: it is held in memory as tokens.
pub const DATA_MAX: u64 = 2 << 30;
/// Faults that are named, and lines of one fault; the rest is counted.
const FAULTS_SHOWN: usize = 20;
const LINES_SHOWN: usize = 4;

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
        let template = super::gguf::chat_template(folder, &config)?
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

    /// Bytes of the text of the tokens to be learnt.
    fn bytes_learnt(&self, example: &Example) -> Result<usize, TrainError> {
        let learnt = example.ids.iter().zip(&example.learnt).skip(1);
        let ids: Vec<u32> = learnt.filter(|(_, learnt)| **learnt).map(|(id, _)| *id).collect();
        let text = self.tokenizer.decode(&ids, true);
        Ok(text
            .map_err(|error| TrainError::Tokenizer(error.to_string()))?
            .len())
    }

    /// Pieces of text with whether each is learnt: a model reads prompt and answer apart, so they are tokenised apart. One
    /// sequence for most lines, and one for each turn where later turns change what came before.
    fn pieces(&self, shape: &Shape) -> Result<Vec<Pieces>, String> {
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
        Ok(vec![pieces])
    }
}

/// Pieces of one sequence, in order.
type Pieces = Vec<(String, bool)>;

/// A conversation as its template writes it, each of the assistant's turns to be learnt with what ends it. Some templates
/// leave things out of earlier turns (what was thought, mostly): then each turn is learnt as the model will meet it, in a
/// sequence of its own that ends there.
fn conversation(template: &ChatTemplate, messages: &[Message]) -> Result<Vec<Pieces>, String> {
    let render = |messages: &[Message], open: bool| {
        template
            .render_turns(messages, open)
            .map_err(|error| error.to_string())
    };
    let mut turns = Vec::new();
    for (index, message) in messages.iter().enumerate() {
        if message.role != "assistant" {
            continue;
        }
        let before = render(&messages[..index], true)?;
        let after = render(&messages[..=index], false)?;
        let Some(answer) = after.strip_prefix(&before) else {
            return Err(
                "cannot be taught: the chat template writes an answer otherwise than it asks for one".into(),
            );
        };
        // What follows the end mark (a line break, mostly) is never generated, so it is not learnt either.
        let kept = answer.trim_end_matches(['\n', ' ']).to_owned();
        turns.push((before, kept));
    }
    if turns.is_empty() {
        return Err("has no turn of the assistant: there is nothing to learn".into());
    }
    let (mut whole, mut written) = (Pieces::new(), String::new());
    for (before, answer) in &turns {
        let Some(ahead) = before.strip_prefix(&written) else {
            let alone = |(before, answer)| vec![(before, false), (answer, true)];
            return Ok(turns.into_iter().map(alone).collect());
        };
        whole.push((ahead.to_owned(), false));
        whole.push((answer.clone(), true));
        written = before.clone() + answer;
    }
    Ok(vec![whole])
}

/// Whether a text names a language as BCP 47 does: `sw`, `swa`, `pt-BR`, `zh-Hans`.
pub fn is_language(tag: &str) -> bool {
    let mut parts = tag.split('-');
    let first = parts.next().unwrap_or_default();
    (2..=3).contains(&first.len())
        && first.bytes().all(|b| b.is_ascii_lowercase())
        && parts.all(|part| (2..=8).contains(&part.len()) && part.bytes().all(|b| b.is_ascii_alphanumeric()))
}

/// What is wrong with lines, alike faults together.
#[derive(Default)]
struct Faults {
    kinds: Vec<(String, Vec<usize>, usize)>,
    more: usize,
}

impl Faults {
    fn note(&mut self, line: usize, why: String) {
        let full = self.kinds.len() >= FAULTS_SHOWN;
        match self.kinds.iter_mut().find(|(known, ..)| *known == why) {
            Some((_, lines, _)) if lines.len() < LINES_SHOWN => lines.push(line),
            Some((.., more)) => *more += 1,
            None if full => self.more += 1,
            None => self.kinds.push((why, vec![line], 0)),
        }
    }

    fn told(self) -> Vec<String> {
        let told = self.kinds.into_iter().map(|(why, lines, more)| {
            let mut lines = lines.iter().map(usize::to_string);
            let first = lines.next().unwrap_or_default();
            let mut also: Vec<String> = lines.collect();
            if more > 0 {
                also.push(format!("{more} more"));
            }
            match also.is_empty() {
                true => format!("line {first} {why}"),
                false => format!("line {first} {why} (and so with {})", also.join(", ")),
            }
        });
        let rest = (self.more > 0).then(|| format!("and {} more lines", self.more));
        told.chain(rest).collect()
    }
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
        // The sequences of a line stay together: what is held out is held out with all its turns.
        let mut read: Vec<(Vec<Example>, String)> = Vec::new();
        let mut faults = Faults::default();
        let (mut doubles, mut composed, mut dropped, mut cut, mut apart) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let nfc = ComposingNormalizerBorrowed::new_nfc();
        let mut line = Vec::new();
        'lines: for number in 1usize.. {
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
            let mut fault = |why: String| faults.note(number, why);
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
            for (piece, learnt) in pieces.iter().flatten() {
                hash.update(&[u8::from(*learnt)]);
                hash.update(&(piece.len() as u64).to_le_bytes());
                hash.update(piece.as_bytes());
            }
            if seen.insert(*hash.finalize().as_bytes(), number).is_some() {
                doubles.push(number);
                continue;
            }
            if pieces.len() > 1 {
                apart.push(number);
            }
            let mut examples = Vec::with_capacity(pieces.len());
            let alone = pieces.len() == 1;
            for pieces in pieces {
                let mut example = Example {
                    ids: Vec::new(),
                    learnt: Vec::new(),
                    bytes: 0,
                    language: 0,
                };
                for (piece, learnt) in pieces {
                    example.ids.extend(reader.encode(&piece)?);
                    example
                        .learnt
                        .resize(example.ids.len(), learnt || settings.train_on_inputs);
                }
                example.bytes = match alone {
                    true => shape.bytes(settings.train_on_inputs, reader.template.is_some()),
                    false => reader.bytes_learnt(&example)?,
                };
                if example.length() > settings.sequence_len {
                    let (length, most) = (example.length(), settings.sequence_len);
                    match settings.excess_length_strategy {
                        ExcessLength::Raise => {
                            fault(format!(
                                "has {length} tokens, sequence_len is {most}: raise it, or set \
                                 excess_length_strategy to drop or truncate"
                            ));
                            continue 'lines;
                        }
                        ExcessLength::Drop => {
                            if dropped.last() != Some(&number) {
                                dropped.push(number);
                            }
                            continue;
                        }
                        ExcessLength::Truncate => {
                            example.ids.truncate(most + 1);
                            example.learnt.truncate(most + 1);
                            example.bytes = example.bytes.min(reader.bytes_learnt(&example)?);
                            if cut.last() != Some(&number) {
                                cut.push(number);
                            }
                        }
                    }
                }
                if !example.learnt.iter().skip(1).any(|learnt| *learnt) {
                    fault("has nothing to learn within sequence_len".into());
                    continue 'lines;
                }
                examples.push(example);
            }
            if !examples.is_empty() {
                tags.insert(tag.clone());
                read.push((examples, tag));
            }
        }
        let faults = faults.told();
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
            (
                "taught turn by turn, for the base's chat template rewrites earlier turns",
                apart,
            ),
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

    /// Holds out the same share of every language's lines.
    fn split(&mut self, read: Vec<(Vec<Example>, String)>, settings: &Settings) {
        let mut of: BTreeMap<usize, Vec<Vec<Example>>> = BTreeMap::new();
        for (mut line, tag) in read {
            let language = self.languages.iter().position(|known| *known == tag).unwrap_or(0);
            line.iter_mut().for_each(|example| example.language = language);
            of.entry(language).or_default().push(line);
        }
        for (language, mut lines) in of {
            let held = match settings.val_set_size {
                share if share < 1.0 => (share * lines.len() as f64).round() as usize,
                count => count as usize,
            };
            let least = usize::from(settings.val_set_size > 0.0 && lines.len() >= 2);
            let held = held.max(least);
            Rng::new(settings.seed ^ (0x4845_4c44 + language as u64)).shuffle(&mut lines);
            let rest = lines.split_off(held.min(lines.len()));
            if rest.is_empty() {
                self.notices.push(format!(
                    "all lines in {} are held out by val_set_size {}: nothing of it is learnt",
                    self.languages[language], settings.val_set_size
                ));
            }
            self.held_out.extend(lines.into_iter().flatten());
            self.examples.extend(rest.into_iter().flatten());
        }
    }
}
