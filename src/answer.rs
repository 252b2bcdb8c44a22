//! One answer as it is written, that outlives the node that began it.
//!
//! Pieces come over the control API. When their node is lost, the order is called off and another is signed whose line
//! holds the tokens so far: the next node goes on where the reader is. What is called off is not billed, so an answer is
//! billed once, by who finished it. The last word has the result: it must begin with what was shown.
use crate::{
    cli::Context,
    fault::{Kind, fault},
    follow::has_ended,
    input::Items,
    link::{Link, call},
    options::JobOptions,
    out::{Out, clean},
    sink::Lines,
    task::{self, Sampling, Task, What},
};
use anyhow::Result;
use karez_core::translate::UNNAMED_TOKEN;
use karez_proto::control as wire;
use serde_json::{Map, Value, json};
use tonic::Code;

/// How often one answer may move to another node.
const MOVES_MAX: u32 = 4;

/// What is asked.
#[derive(Debug, Clone)]
pub(crate) struct Question {
    pub(crate) model: String,
    pub(crate) sampling: Sampling,
    pub(crate) options: JobOptions,
    /// The input line: `prompt` or `messages`.
    pub(crate) line: Map<String, Value>,
}

/// The whole answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) text: String,
    pub(crate) view: wire::JobView,
    /// How often it changed its node on the way.
    pub(crate) moves: u32,
}

/// Asks, and hands each piece to `say` as it comes.
pub(crate) async fn follow(
    context: &Context,
    link: &Link,
    mut question: Question,
    say: &mut dyn FnMut(&str),
) -> Result<Answer> {
    // Of submitting and fetching there is nothing to remark while an answer is being written.
    let quiet = Out::new(false, true, false);
    question.sampling.stream = true;
    // What it would draw must not depend on where it is drawn.
    question
        .line
        .insert("seed".into(), (question.sampling.seed as i64).into());
    let (mut shown, mut before) = (String::new(), Vec::<u32>::new());
    for moves in 0..=MOVES_MAX {
        if !before.is_empty() {
            question.line.insert("resume".into(), json!(before));
        }
        let task = Task {
            what: What::Generate {
                model: question.model.clone(),
                sampling: question.sampling.clone(),
            },
            items: Items::of_line(question.line.clone(), context.home.dir())?,
            options: question.options.clone(),
        };
        let mut running = task::submit(&quiet, &context.home, link.clone(), &task).await?;
        let job = running.job.to_string();
        task::set_current(Some(running.job));
        let mut tokens = Vec::new();
        let request = wire::AnswerRequest { job: job.clone() };
        match link.client.clone().answer(request).await {
            Ok(stream) => {
                let mut stream = stream.into_inner();
                while let Some(piece) = stream.message().await.map_err(crate::fault::refused)? {
                    say(&piece.text);
                    shown.push_str(&piece.text);
                    tokens.extend(piece.tokens);
                }
            }
            // It was over before we could listen, or the scheduler streams too much already: it comes whole.
            Err(status) if status.code() == Code::NotFound => {}
            Err(status) => return Err(crate::fault::refused(status)),
        }
        let now = link.job(&job).await?;
        if !has_ended(&now.state) && !tokens.is_empty() {
            // Its node is gone with half an answer.
            let request = wire::JobRequest { job };
            call(link.client.clone().cancel(request)).await?;
            running.close().await;
            if tokens.contains(&UNNAMED_TOKEN) {
                return Err(fault(
                    Kind::JobFailed,
                    "the provider's server was lost in the middle of its answer, and no other can go on with it: ask again",
                ));
            }
            before.extend(tokens);
            continue;
        }
        running.finish(&quiet).await?;
        let mut result = Value::Null;
        let mut lines = Lines::new(|line: &[u8]| {
            result = serde_json::from_slice(line)?;
            Ok(())
        });
        running.results(&quiet, &mut lines).await?;
        let view = running.view.clone();
        running.close().await;
        let text = result.get("text").and_then(Value::as_str).unwrap_or_default();
        let Some(rest) = text.strip_prefix(shown.as_str()) else {
            return Err(fault(
                Kind::NotVerified,
                "the node's result is not what it wrote before: ask again",
            ));
        };
        if !rest.is_empty() {
            say(rest);
        }
        return Ok(Answer {
            text: text.to_owned(),
            view,
            moves,
        });
    }
    Err(fault(
        Kind::JobFailed,
        format!("the answer lost its node {MOVES_MAX} times: ask again"),
    ))
}

/// A piece for a terminal: line breaks and tabs stay, all else that could move the cursor goes.
pub(crate) fn harmless(piece: &str) -> String {
    let mut out = String::with_capacity(piece.len());
    for (i, line) in piece.split('\n').enumerate() {
        if i > 0 {
            out.push('\n');
        }
        let cells: Vec<String> = line.split('\t').map(clean).collect();
        out.push_str(&cells.join("\t"));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_keep_their_lines_and_lose_their_tricks() {
        assert_eq!(harmless("a\n\tb\u{1b}[2Jc\r"), "a\n\tb [2Jc ");
        assert_eq!(harmless("\n"), "\n");
    }
}
