//! Reading the items of a job: checked line by line before anything is sent, so that a bad line costs nothing.
//!
//! Input of any length passes through a fixed amount of memory: beyond [`MEMORY_MAX`] it waits in a file.
use crate::{
    fault::{Kind, fault},
    out,
};
use anyhow::{Context, Result};
use karez_core::{artifact::ArtifactRef, records::ITEMS_MAX};
use karez_net::store::{ArtifactStore, StoreError};
use serde_json::{Map, Value, json};
use std::{
    fs::{self, File},
    io::{self, BufRead, BufReader, BufWriter, Read, Write},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tempfile::NamedTempFile;

/// Bytes of one text at most. Models read far less: this refuses whole books pasted as one line.
pub(crate) const TEXT_BYTES_MAX: usize = 64 * 1024;
/// Bytes of one input line at most, its JSON included.
const LINE_BYTES_MAX: usize = 8 * TEXT_BYTES_MAX;
/// The field of a line with what the model is told first.
pub(crate) const SYSTEM: &str = "system";
/// Bytes of it at most.
const SYSTEM_BYTES_MAX: usize = 32 * 1024;
/// Bytes of the whole input at most.
const INPUT_BYTES_MAX: u64 = 4 << 30;
/// Bytes of input kept in memory.
const MEMORY_MAX: usize = 4 << 20;
/// What waiting files are called.
const SPILL_PREFIX: &str = ".input-";
/// When a waiting file must have been left behind by a command that was killed.
const SPILL_STALE: Duration = Duration::from_secs(24 * 3600);

/// What of an input line is worked on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Field {
    /// A text to embed.
    Text,
    /// A prompt, or `messages`.
    Prompt,
    /// Nothing in particular: any line will do.
    Any,
}

impl Field {
    fn name(self) -> &'static str {
        match self {
            Self::Prompt => "prompt",
            Self::Text | Self::Any => "text",
        }
    }
}

/// Items ready to be sent: one JSON object per line.
#[derive(Debug)]
pub(crate) struct Items {
    pub(crate) count: u64,
    /// Blank lines of a plain text that were passed over.
    pub(crate) blank: u64,
    content: Arc<Content>,
}

/// The bytes of the input artifact.
#[derive(Debug)]
pub(crate) enum Content {
    /// All of it.
    Memory(Vec<u8>),
    /// A file that goes away with this value.
    File(NamedTempFile),
}

impl Content {
    /// Copies it into the store.
    pub(crate) fn store(&self, store: &ArtifactStore) -> Result<ArtifactRef, StoreError> {
        match self {
            Self::Memory(bytes) => store.add_bytes(bytes),
            Self::File(file) => store.add_file(file.path()),
        }
    }
}

impl Content {
    /// The same lines with a system prompt on each that has none of its own; `dir` is where a long input waits.
    pub(crate) fn told(&self, system: &str, dir: &Path) -> Result<Items> {
        let mut from: Box<dyn BufRead + '_> = match self {
            Self::Memory(bytes) => Box::new(bytes.as_slice()),
            Self::File(file) => Box::new(BufReader::new(file.reopen()?)),
        };
        if system.len() > SYSTEM_BYTES_MAX {
            let why = format!(
                "the system prompt has {} bytes, the limit is {SYSTEM_BYTES_MAX}: shorten it",
                system.len()
            );
            return Err(fault(Kind::Refused, why));
        }
        let mut items = Gathered::new(Field::Any, dir);
        let mut line = Vec::new();
        while line_of(&mut from, LINE_BYTES_MAX, &mut line)? {
            let mut object: Map<String, Value> = serde_json::from_slice(&line)?;
            object.entry(SYSTEM).or_insert_with(|| system.into());
            items.push(&|| "the input, with its system prompt".into(), object)?;
        }
        items.done("the input")
    }
}

/// Items as they are gathered.
struct Gathered {
    field: Field,
    count: u64,
    blank: u64,
    bytes: u64,
    memory: Vec<u8>,
    memory_max: usize,
    file: Option<BufWriter<NamedTempFile>>,
    /// Where a file may wait.
    dir: PathBuf,
}

impl Items {
    /// One item per text; `dir` is where a long input waits.
    pub(crate) fn of_texts<'a>(
        field: Field,
        texts: impl IntoIterator<Item = &'a str>,
        dir: &Path,
    ) -> Result<Self> {
        let mut items = Gathered::new(field, dir);
        for (i, text) in texts.into_iter().enumerate() {
            let place = || format!("{} {}", field.name(), i + 1);
            items.push(&place, Map::from_iter([(field.name().to_owned(), json!(text))]))?;
        }
        items.done("the input")
    }

    /// A file that was checked before, with so many lines.
    pub(crate) fn of_file(file: NamedTempFile, count: u64) -> Self {
        Self {
            count,
            blank: 0,
            content: Arc::new(Content::File(file)),
        }
    }

    /// One item: a line with a prompt or a conversation.
    pub(crate) fn of_line(line: Map<String, Value>, dir: &Path) -> Result<Self> {
        let mut items = Gathered::new(Field::Prompt, dir);
        items.push(&|| "the question".into(), line)?;
        items.done("the question")
    }

    /// What is to be sent.
    pub(crate) fn content(&self) -> Arc<Content> {
        self.content.clone()
    }
}

impl Gathered {
    fn new(field: Field, dir: &Path) -> Self {
        Self {
            field,
            count: 0,
            blank: 0,
            bytes: 0,
            memory: Vec::new(),
            memory_max: MEMORY_MAX,
            file: None,
            dir: dir.to_owned(),
        }
    }

    /// Checks an item and keeps it. `place` says where it stands, for messages.
    fn push(&mut self, place: &dyn Fn() -> String, object: Map<String, Value>) -> Result<()> {
        let bad = |why: String| Err(fault(Kind::Refused, format!("{}: {why}", place())));
        let field = self.field.name();
        let conversation = self.field == Field::Prompt && !object.contains_key(field);
        match object.get(if conversation { "messages" } else { field }) {
            _ if self.field == Field::Any => {}
            Some(Value::Array(messages)) if conversation && !messages.is_empty() => {}
            Some(_) if conversation => return bad("\"messages\" is not a list of messages".into()),
            Some(Value::String(text)) if text.trim().is_empty() => {
                return bad(format!("{field:?} is empty: leave it out or give it a text"));
            }
            Some(Value::String(text)) if text.len() > TEXT_BYTES_MAX => {
                return bad(format!(
                    "the text has {} bytes, the limit is {TEXT_BYTES_MAX}: cut it into several",
                    text.len()
                ));
            }
            Some(Value::String(_)) => {}
            Some(_) => return bad(format!("{field:?} is not a string")),
            None => {
                return bad(format!(
                    "there is no {field:?}: every line needs {{\"{field}\": \"...\"}}"
                ));
            }
        }
        self.count += 1;
        if self.count > ITEMS_MAX {
            return bad(format!("a job has at most {ITEMS_MAX} items: split the input"));
        }
        let before = self.memory.len();
        serde_json::to_writer(&mut self.memory, &object)?;
        self.memory.push(b'\n');
        self.bytes += (self.memory.len() - before) as u64;
        if self.bytes > INPUT_BYTES_MAX {
            return bad(format!(
                "the input of a job has at most {}: split it into several jobs",
                out::size(INPUT_BYTES_MAX)
            ));
        }
        if self.memory.len() > self.memory_max {
            self.spill()?;
        }
        Ok(())
    }

    /// Moves what is in memory to the waiting file.
    fn spill(&mut self) -> Result<()> {
        let subject = || format!("the input, on its way through {}", self.dir.display());
        let file = match &mut self.file {
            Some(file) => file,
            None => {
                fs::create_dir_all(&self.dir).with_context(subject)?;
                sweep(&self.dir);
                let made = tempfile::Builder::new()
                    .prefix(SPILL_PREFIX)
                    .tempfile_in(&self.dir)
                    .with_context(subject)?;
                self.file.insert(BufWriter::new(made))
            }
        };
        file.write_all(&self.memory).with_context(subject)?;
        self.memory.clear();
        Ok(())
    }

    fn done(mut self, name: &str) -> Result<Items> {
        if self.count == 0 {
            return Err(fault(
                Kind::Refused,
                format!("{name} has no lines: there is nothing to do"),
            ));
        }
        if self.file.is_some() {
            self.spill()?;
        }
        let content = match self.file {
            Some(file) => Content::File(file.into_inner().map_err(io::IntoInnerError::into_error)?),
            None => Content::Memory(self.memory),
        };
        Ok(Items {
            count: self.count,
            blank: self.blank,
            content: Arc::new(content),
        })
    }
}

/// Removes waiting files that nobody waits for any more.
fn sweep(dir: &Path) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let ours = entry.file_name().to_string_lossy().starts_with(SPILL_PREFIX);
        let age = entry.metadata().and_then(|m| m.modified()).ok();
        let age = age.and_then(|at| at.elapsed().ok()).unwrap_or_default();
        if ours && age > SPILL_STALE {
            drop(fs::remove_file(entry.path()));
        }
    }
}

/// Items from a file, or from standard input for `-`: JSON lines, or plain text with one item per line. A long input
/// waits in `dir`.
pub(crate) fn read(path: &Path, field: Field, dir: &Path) -> Result<Items> {
    let gathered = Gathered::new(field, dir);
    if path.as_os_str() == "-" {
        return read_from(
            &mut BufReader::new(io::stdin()),
            "standard input",
            gathered,
            false,
        );
    }
    let name = path.display().to_string();
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(fault(
                Kind::NotFound,
                format!("{name} does not exist: give a file, or - for standard input"),
            ));
        }
        Err(error) => return Err(error).context(name),
    };
    if file.metadata().is_ok_and(|m| m.is_dir()) {
        return Err(fault(
            Kind::Refused,
            format!("{name} is a directory: give a file of lines"),
        ));
    }
    let json = path
        .extension()
        .is_some_and(|e| e == "jsonl" || e == "ndjson" || e == "json");
    read_from(&mut BufReader::new(file), &name, gathered, json)
}

/// The next line without its end, at most `max` bytes of it in `line`; false when there is none.
pub(crate) fn line_of(from: &mut dyn BufRead, max: usize, line: &mut Vec<u8>) -> io::Result<bool> {
    line.clear();
    let read = from.take(max as u64 + 1).read_until(b'\n', line)?;
    if line.pop_if(|b| *b == b'\n').is_none() && line.len() > max {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a line is over {max} bytes"),
        ));
    }
    Ok(read > 0)
}

/// The same from any reader. Text that begins with `{` is taken for JSON lines even without the extension.
fn read_from(from: &mut dyn BufRead, name: &str, mut items: Gathered, json: bool) -> Result<Items> {
    let (mut json, mut decided) = (json, json);
    let field = items.field.name();
    let mut buffer = Vec::new();
    for line in 1.. {
        let place = || format!("{name}, line {line}");
        let bad = |why: String| fault(Kind::Refused, format!("{}: {why}", place()));
        match line_of(from, LINE_BYTES_MAX, &mut buffer) {
            Ok(true) => {}
            Ok(false) => break,
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                return Err(bad(format!(
                    "the line is over {LINE_BYTES_MAX} bytes: cut it into several"
                )));
            }
            Err(error) => return Err(error).context(name.to_owned()),
        }
        let bytes = if line == 1 {
            buffer.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&buffer)
        } else {
            &buffer
        };
        let text = std::str::from_utf8(bytes)
            .map_err(|e| {
                bad(format!(
                    "byte {} is not UTF-8: save the file as UTF-8",
                    e.valid_up_to() + 1
                ))
            })?
            .trim();
        if text.is_empty() {
            if json {
                return Err(bad("the line is empty: remove it".into()));
            }
            items.blank += 1;
            continue;
        }
        if !decided {
            json = text.starts_with('{');
            decided = true;
        }
        let object = if json {
            match serde_json::from_str(text) {
                Ok(Value::Object(object)) => object,
                Ok(_) => {
                    return Err(bad(format!(
                        "not a JSON object: expected {{\"{field}\": \"...\"}}"
                    )));
                }
                Err(error) => {
                    return Err(bad(format!(
                        "malformed JSON at column {}: {}",
                        error.column(),
                        reason(&error)
                    )));
                }
            }
        } else {
            Map::from_iter([(field.to_owned(), json!(text))])
        };
        items.push(&place, object)?;
    }
    items.done(name)
}

/// serde_json's message without its own position, which counts within the line alone.
fn reason(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.split(" at line ").next().unwrap_or(&text).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault;

    fn read(text: &[u8]) -> Result<Items> {
        read_field(text, Field::Text)
    }

    fn read_field(text: &[u8], field: Field) -> Result<Items> {
        let gathered = Gathered::new(field, Path::new("/nonexistent"));
        read_from(&mut &*text, "in", gathered, false)
    }

    fn bytes(items: &Items) -> Vec<u8> {
        match &*items.content {
            Content::Memory(bytes) => bytes.clone(),
            Content::File(file) => fs::read(file.path()).unwrap(),
        }
    }

    #[test]
    fn a_system_prompt_goes_with_every_line_that_has_none_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let lines = b"{\"prompt\":\"a\"}\n{\"prompt\":\"b\",\"system\":\"own\"}\n";
        let items = read_field(lines, Field::Prompt).unwrap();
        let told = items.content().told("be brief", dir.path()).unwrap();
        assert_eq!(told.count, 2);
        let told = String::from_utf8(bytes(&told)).unwrap();
        let system = |line: &str| serde_json::from_str::<Value>(line).unwrap()["system"].clone();
        assert_eq!(told.lines().map(system).collect::<Vec<_>>(), ["be brief", "own"]);
        let long = "x".repeat(SYSTEM_BYTES_MAX + 1);
        let error = items.content().told(&long, dir.path()).unwrap_err();
        assert!(error.to_string().contains("32769 bytes"), "{error}");
    }

    #[test]
    fn a_long_input_waits_in_a_file_that_goes_away() {
        let dir = tempfile::tempdir().unwrap();
        let mut gathered = Gathered::new(Field::Text, dir.path());
        gathered.memory_max = 100;
        let text: String = (0..1000).map(|i| format!("line {i}\n")).collect();
        let items = read_from(&mut text.as_bytes(), "in", gathered, false).unwrap();
        assert!(matches!(&*items.content, Content::File(_)));
        let expected: String = (0..1000)
            .map(|i| format!("{{\"text\":\"line {i}\"}}\n"))
            .collect();
        assert_eq!(bytes(&items), expected.as_bytes());
        let kept = || fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(kept(), 1);
        drop(items);
        assert_eq!(kept(), 0);
    }

    #[test]
    fn work_that_reads_nothing_takes_any_line() {
        let items = read_field(b"{\"id\":1}\n{}\n{\"text\":7}\n", Field::Any).unwrap();
        assert_eq!(items.count, 3);
        assert_eq!(bytes(&items), b"{\"id\":1}\n{}\n{\"text\":7}\n");
        assert_eq!(read_field(b"one\ntwo\n", Field::Any).unwrap().count, 2);
        assert!(read_field(b"{\"id\":}\n", Field::Any).is_err());
    }

    #[test]
    fn text_and_json_lines_are_told_apart() {
        let plain = read("\u{feff}one\n\n  two  \n".as_bytes()).expect("plain text");
        assert_eq!((plain.count, plain.blank), (2, 1));
        assert_eq!(bytes(&plain), b"{\"text\":\"one\"}\n{\"text\":\"two\"}\n");
        let json = read(b"{\"id\": 7, \"text\": \"a\"}\n{\"text\":\"b\"}").expect("JSON lines");
        assert_eq!(json.count, 2);
        assert_eq!(bytes(&json), b"{\"id\":7,\"text\":\"a\"}\n{\"text\":\"b\"}\n");
    }

    #[test]
    fn every_bad_line_is_named() {
        let long = format!("ok\n{}\n", "x".repeat(TEXT_BYTES_MAX + 1));
        let endless = "x".repeat(LINE_BYTES_MAX + 5);
        for (input, expected) in [
            (&b""[..], "in has no lines: there is nothing to do"),
            (b"\n\n", "in has no lines: there is nothing to do"),
            (
                b"{\"text\":\"a\"}\n{\"text\"",
                "in, line 2: malformed JSON at column 7: EOF while parsing an object",
            ),
            (
                b"{\"text\":\"a\"}\n\n",
                "in, line 2: the line is empty: remove it",
            ),
            (
                b"{\"text\":\"a\"}\n7\n",
                "in, line 2: not a JSON object: expected {\"text\": \"...\"}",
            ),
            (
                b"{\"txt\":\"a\"}",
                "in, line 1: there is no \"text\": every line needs {\"text\": \"...\"}",
            ),
            (
                b"{\"text\":\" \"}",
                "in, line 1: \"text\" is empty: leave it out or give it a text",
            ),
            (b"{\"text\":4}", "in, line 1: \"text\" is not a string"),
            (
                b"ok\nab\xffc",
                "in, line 2: byte 3 is not UTF-8: save the file as UTF-8",
            ),
            (
                long.as_bytes(),
                "in, line 2: the text has 65537 bytes, the limit is 65536: cut it into several",
            ),
            (
                endless.as_bytes(),
                "in, line 1: the line is over 524288 bytes: cut it into several",
            ),
        ] {
            let error = read(input).expect_err(expected);
            assert_eq!((error.to_string().as_str(), fault::code(&error)), (expected, 3));
        }
    }
}
