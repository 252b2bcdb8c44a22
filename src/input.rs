//! Reading the items of a job: checked line by line before anything is sent, so that a bad line costs nothing.
use crate::fault::{Kind, fault};
use anyhow::{Context, Result};
use karez_core::records::ITEMS_MAX;
use serde_json::{Map, Value, json};
use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read},
    path::Path,
};

/// Bytes of one text at most. Models read far less: this refuses whole books pasted as one line.
pub(crate) const TEXT_BYTES_MAX: usize = 64 * 1024;
/// Bytes of one input line at most, its JSON included.
const LINE_BYTES_MAX: usize = 8 * TEXT_BYTES_MAX;

/// Items ready to be sent.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Items {
    /// The input artifact: one JSON object per line.
    pub(crate) jsonl: Vec<u8>,
    pub(crate) count: u64,
    /// Blank lines of a plain text that were passed over.
    pub(crate) blank: u64,
}

impl Items {
    /// One item per text.
    pub(crate) fn of_texts<'a>(field: &str, texts: impl IntoIterator<Item = &'a str>) -> Result<Self> {
        let mut items = Self {
            jsonl: Vec::new(),
            count: 0,
            blank: 0,
        };
        for (i, text) in texts.into_iter().enumerate() {
            items.push(
                "item",
                i + 1,
                field,
                Map::from_iter([(field.to_owned(), json!(text))]),
            )?;
        }
        Ok(items)
    }

    fn push(&mut self, source: &str, line: usize, field: &str, object: Map<String, Value>) -> Result<()> {
        let bad = |why: String| Err(fault(Kind::Refused, format!("{source}, line {line}: {why}")));
        let conversation = field == "prompt" && !object.contains_key(field);
        match object.get(if conversation { "messages" } else { field }) {
            Some(Value::Array(messages)) if conversation && !messages.is_empty() => {}
            Some(_) if conversation => return bad("\"messages\" is not a list of messages".into()),
            Some(Value::String(text)) if text.trim().is_empty() => {
                return bad(format!("{field:?} is empty: remove the line or give it a text"));
            }
            Some(Value::String(text)) if text.len() > TEXT_BYTES_MAX => {
                return bad(format!(
                    "the text has {} bytes, the limit is {TEXT_BYTES_MAX}: cut it into several lines",
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
        serde_json::to_writer(&mut self.jsonl, &object)?;
        self.jsonl.push(b'\n');
        Ok(())
    }
}

/// Items from a file, or from standard input for `-`: JSON lines with `field`, or plain text, one item per line.
pub(crate) fn read(path: &Path, field: &str) -> Result<Items> {
    if path.as_os_str() == "-" {
        return read_from(&mut BufReader::new(io::stdin()), "standard input", field, false);
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
    read_from(&mut BufReader::new(file), &name, field, json)
}

/// The same from any reader. Text that begins with `{` is taken for JSON lines even without the extension.
pub(crate) fn read_from(from: &mut dyn BufRead, name: &str, field: &str, json: bool) -> Result<Items> {
    let mut items = Items {
        jsonl: Vec::new(),
        count: 0,
        blank: 0,
    };
    let (mut json, mut decided) = (json, json);
    let mut buffer = Vec::new();
    for line in 1.. {
        let bad = |why: String| fault(Kind::Refused, format!("{name}, line {line}: {why}"));
        buffer.clear();
        let read = from
            .take(LINE_BYTES_MAX as u64 + 1)
            .read_until(b'\n', &mut buffer)
            .context(name.to_owned())?;
        if read == 0 {
            break;
        }
        if read > LINE_BYTES_MAX {
            return Err(bad(format!(
                "the line is over {LINE_BYTES_MAX} bytes: cut it into several"
            )));
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
        items.push(name, line, field, object)?;
    }
    if items.count == 0 {
        return Err(fault(
            Kind::Refused,
            format!("{name} has no lines: there is nothing to do"),
        ));
    }
    Ok(items)
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
        read_from(&mut &*text, "in", "text", false)
    }

    #[test]
    fn text_and_json_lines_are_told_apart() {
        let plain = read("\u{feff}one\n\n  two  \n".as_bytes()).expect("plain text");
        assert_eq!((plain.count, plain.blank), (2, 1));
        assert_eq!(plain.jsonl, b"{\"text\":\"one\"}\n{\"text\":\"two\"}\n");
        let json = read(b"{\"id\": 7, \"text\": \"a\"}\n{\"text\":\"b\"}").expect("JSON lines");
        assert_eq!(json.count, 2);
        assert_eq!(json.jsonl, b"{\"id\":7,\"text\":\"a\"}\n{\"text\":\"b\"}\n");
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
                "in, line 1: \"text\" is empty: remove the line or give it a text",
            ),
            (b"{\"text\":4}", "in, line 1: \"text\" is not a string"),
            (
                b"ok\nab\xffc",
                "in, line 2: byte 3 is not UTF-8: save the file as UTF-8",
            ),
            (
                long.as_bytes(),
                "in, line 2: the text has 65537 bytes, the limit is 65536: cut it into several lines",
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
