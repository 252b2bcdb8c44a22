//! The lines of an input: read one by one, each checked, none trusted to be short.
use super::wishes::{Wishes, field};
use karez_core::records::Work;
use karez_engine::{json::Json, protocol::Message};
use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read},
    path::{Path, PathBuf},
};
use tokio::sync::mpsc;

/// Bytes of one line at most.
pub(crate) const LINE_MAX: usize = 1 << 20;
/// Lines read ahead of the worker.
const AHEAD: usize = 64;

/// One item of the input.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Item {
    /// Its line, counted from 0.
    pub(super) index: u64,
    /// Copied to the result.
    pub(super) id: Option<Json>,
    pub(super) asked: Asked,
    /// What the model is told first, instead of what the order says.
    pub(super) system: Option<String>,
    pub(super) wishes: Wishes,
    /// Length of its line.
    pub(super) bytes: usize,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Asked {
    Text(String),
    Messages(Vec<Message>),
    /// Why the line cannot be done, where the order wants the others done all the same.
    Unreadable(String),
}

/// Items of one part, read by a thread of their own.
pub(super) struct Lines(mpsc::Receiver<Result<Item, String>>);

impl Lines {
    /// Lines `first` to `first + count` of the file at `path`, as `work` understands them.
    pub(super) fn open(path: PathBuf, work: Work, first: u64, count: u64) -> Self {
        let (tell, items) = mpsc::channel(AHEAD);
        tokio::task::spawn_blocking(move || {
            let sent = read(&path, &work, first, count, |item| {
                tell.blocking_send(Ok(item)).is_ok()
            });
            if let Err(why) = sent {
                // Whoever asked may have gone: nobody then needs to know.
                let _ = tell.blocking_send(Err(why));
            }
        });
        Self(items)
    }

    /// The next item; none at the end. An error says which line is at fault, counted from 1.
    pub(super) async fn next(&mut self) -> Result<Option<Item>, String> {
        self.0.recv().await.transpose()
    }
}

/// Gives each item to `give` until it declines.
fn read(
    path: &Path,
    work: &Work,
    first: u64,
    count: u64,
    mut give: impl FnMut(Item) -> bool,
) -> Result<(), String> {
    let unreadable = |error: io::Error| format!("the input cannot be read: {error}");
    let mut file = BufReader::with_capacity(64 << 10, File::open(path).map_err(unreadable)?);
    let short = |lines: u64| {
        format!(
            "the input has only {lines} lines, items up to {} are asked for",
            first + count
        )
    };
    for skipped in 0..first {
        if file.skip_until(b'\n').map_err(unreadable)? == 0 {
            return Err(short(skipped));
        }
    }
    let mut line = Vec::new();
    for index in first..first.saturating_add(count) {
        line.clear();
        let got = (&mut file)
            .take(LINE_MAX as u64 + 1)
            .read_until(b'\n', &mut line)
            .map_err(unreadable)?;
        if got == 0 {
            return Err(short(index));
        }
        if line.last() == Some(&b'\n') {
            line.pop();
        }
        if line.len() > LINE_MAX {
            return Err(format!(
                "line {} of the input is longer than the {LINE_MAX} bytes allowed",
                index + 1
            ));
        }
        let item = match parse(&line, work, index) {
            Ok(item) => item,
            Err(why) if matches!(work, Work::Generate(g) if g.keep_going) => Item {
                index,
                id: id_of(&line),
                asked: Asked::Unreadable(format!("the line {why}")),
                system: None,
                wishes: Wishes::default(),
                bytes: line.len(),
            },
            Err(why) => return Err(format!("line {} of the input {why}", index + 1)),
        };
        if !give(item) {
            return Ok(());
        }
    }
    Ok(())
}

/// The id of a line that cannot be used otherwise.
fn id_of(line: &[u8]) -> Option<Json> {
    let line: Json = serde_json::from_slice(line).ok()?;
    line.get("id").filter(|id| **id != Json::Null).cloned()
}

fn parse(line: &[u8], work: &Work, index: u64) -> Result<Item, String> {
    let text = std::str::from_utf8(line).map_err(|_| "is not UTF-8".to_owned())?;
    let (wanted, generate, raw_prompt) = match work {
        Work::Generate(g) => (
            "a string, or an object with \"prompt\" or \"messages\"",
            true,
            g.raw,
        ),
        _ => ("a string, or an object with \"text\"", false, false),
    };
    if text.trim().is_empty() {
        return Err(format!("is empty: expected {wanted}"));
    }
    // Told apart from the wrong shape: the two are mended differently.
    let line_json: Json = serde_json::from_str(text).map_err(|error| {
        // One line: serde's own line number would mislead.
        let why = error.to_string();
        format!("is not JSON: {}", why.split(" at line").next().unwrap_or(&why))
    })?;
    let misshapen = || format!("has the wrong shape: expected {wanted}");
    let (id, asked, system, wishes) = match &line_json {
        Json::Text(text) => (None, Asked::Text(text.clone()), None, Wishes::default()),
        Json::Object(_) => {
            let of = |name| field::<String>(&line_json, name);
            let asked = if !generate {
                Asked::Text(of("text")?.ok_or_else(misshapen)?)
            } else {
                match (of("prompt")?, field::<Vec<Message>>(&line_json, "messages")?) {
                    (Some(prompt), None) => Asked::Text(prompt),
                    (None, Some(_)) if raw_prompt => {
                        return Err("has messages, but the order asks for prompts as they stand".into());
                    }
                    (None, Some(messages)) if !messages.is_empty() => Asked::Messages(messages),
                    _ => return Err(misshapen()),
                }
            };
            let wishes = if generate {
                Wishes::read(&line_json)?
            } else {
                Wishes::default()
            };
            let system = if generate { of("system")? } else { None };
            let id = line_json.get("id").filter(|id| **id != Json::Null);
            (id.cloned(), asked, system, wishes)
        }
        _ => return Err(misshapen()),
    };
    Ok(Item {
        index,
        id,
        asked,
        system,
        wishes,
        bytes: line.len(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use karez_core::{
        artifact::{ArtifactKind, ArtifactRef},
        id::Digest,
        records::Generate,
        unit::Bytes,
    };

    fn artifact() -> ArtifactRef {
        ArtifactRef {
            digest: Digest::of(b""),
            bytes: Bytes(0),
            kind: ArtifactKind::Blob,
        }
    }
    fn embed() -> Work {
        Work::Embed {
            model: artifact(),
            model_name: String::new(),
        }
    }
    fn generate(raw: bool) -> Work {
        Work::Generate(Generate {
            raw,
            ..Generate::greedy(artifact(), "", 1)
        })
    }

    fn items(text: &[u8], work: &Work, first: u64, count: u64) -> Result<Vec<Item>, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        let mut out = Vec::new();
        read(file.path(), work, first, count, |item| {
            out.push(item);
            true
        })?;
        Ok(out)
    }

    #[test]
    fn a_part_is_its_lines_and_no_others() {
        let text = b"\"a\"\n{\"text\":\"b\",\"id\":7,\"more\":[]}\r\n\"c\"\n\"d\"";
        let got = items(text, &embed(), 1, 3).unwrap();
        let said: Vec<_> = got
            .iter()
            .map(|i| (i.index, i.id.clone(), i.asked.clone()))
            .collect();
        assert_eq!(
            said,
            [
                (1, Some(Json::Number(7.into())), Asked::Text("b".into())),
                (2, None, Asked::Text("c".into())),
                (3, None, Asked::Text("d".into())),
            ]
        );
    }

    #[test]
    fn a_bad_line_is_named_from_one() {
        let long = format!("\"a\"\n\"{}\"\n", "x".repeat(LINE_MAX));
        for (text, work, says) in [
            (
                &b"\"a\"\n{\"text\":\n"[..],
                embed(),
                "line 2 of the input is not JSON",
            ),
            (b"\"a\"\n\n", embed(), "line 2 of the input is empty"),
            (
                b"\"a\"\n{\"prompt\":\"x\"}\n",
                embed(),
                "line 2 of the input has the wrong shape: expected a string, or an object with \"text\"",
            ),
            (
                b"\"a\"\n{\"text\":\"x\"}\n",
                generate(false),
                "line 2 of the input has the wrong shape",
            ),
            (b"\"a\"\n{\"messages\":[]}\n", generate(false), "line 2"),
            (
                b"\"a\"\n{\"messages\":[{\"role\":\"user\"}]}\n",
                generate(false),
                "line 2",
            ),
            (
                b"\"a\"\n{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]}\n",
                generate(true),
                "as they stand",
            ),
            (b"\"a\"\n\xff\n", embed(), "line 2 of the input is not UTF-8"),
            (b"\"a\"\n12\n", embed(), "line 2"),
            (b"\"a\"\n", embed(), "has only 1 lines"),
            (long.as_bytes(), embed(), "line 2 of the input is longer"),
        ] {
            let error = items(text, &work, 0, 2).unwrap_err();
            assert!(
                error.contains(says),
                "{} gave {error}",
                String::from_utf8_lossy(&text[..text.len().min(60)])
            );
        }
        assert!(
            items(b"\"a\"\n", &embed(), 5, 1)
                .unwrap_err()
                .contains("only 1 lines")
        );
    }

    #[test]
    fn a_bad_line_does_not_stop_the_others_when_told_to_go_on() {
        let text = b"\"a\"\n{\"id\":7,\"prompt\":1}\n\xff\n\"d\"";
        let Work::Generate(g) = generate(false) else {
            panic!()
        };
        let work = Work::Generate(Generate {
            keep_going: true,
            ..g
        });
        let got = items(text, &work, 0, 4).unwrap();
        assert_eq!(got[1].id, Some(Json::Number(7.into())));
        assert!(matches!(&got[1].asked, Asked::Unreadable(why) if why.contains("\"prompt\" wrong")));
        assert!(matches!(&got[2].asked, Asked::Unreadable(why) if why.contains("not UTF-8")));
        assert_eq!((got[3].index, &got[3].asked), (3, &Asked::Text("d".into())));
    }

    #[test]
    fn prompts_and_conversations_are_both_read() {
        let text = b"{\"prompt\":\"p\",\"id\":\"x\"}\n{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]}\n\"bare\"\n";
        let got = items(text, &generate(false), 0, 3).unwrap();
        assert_eq!(got[0].asked, Asked::Text("p".into()));
        assert!(matches!(&got[1].asked, Asked::Messages(m) if m[0].content == "hi"));
        assert_eq!(got[2].asked, Asked::Text("bare".into()));
    }
}
