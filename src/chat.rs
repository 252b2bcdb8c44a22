//! `karez chat`: a conversation, each answer written as it comes.
use crate::{
    answer::{self, Question, harmless},
    cli::Context,
    generate::SamplingArgs,
    link,
    options::JobOptions,
    out::credits,
    task,
};
use anyhow::{Context as _, Result};
use clap::Args;
use karez_proto::control as wire;
use serde_json::{Map, Value, json};
use std::io::{self, IsTerminal};

/// Bytes of one question at most.
const QUESTION_MAX: usize = 64 << 10;
/// Bytes of a conversation that are sent with the next question; older turns are left out.
const HISTORY_MAX: usize = 256 << 10;

/// `karez chat`.
#[derive(Debug, Args)]
#[command(after_help = "\
Each line is a question; the model sees what was said before. /new begins again,
/bye or the end of the input leaves. Ctrl-C stops an answer, not the chat.

Examples:
  karez chat
  karez chat --system \"Answer in Swahili.\" --country KE
  echo \"Why should I rotate my crops?\" | karez chat")]
pub(crate) struct ChatArgs {
    /// The model, by its name in `karez models`
    #[arg(short, long, value_name = "NAME", default_value = "karez-tiny")]
    model: String,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    options: JobOptions,
}

/// What was said, oldest first.
#[derive(Default)]
struct History(Vec<(&'static str, String)>);

impl History {
    /// The conversation with the next question, as long as it may be.
    fn with(&self, question: &str) -> Vec<Value> {
        let mut bytes = question.len();
        let turn = |role: &str, text: &str| json!({"role": role, "content": text});
        let mut messages = vec![turn("user", question)];
        // From the latest back, in whole exchanges: an answer without its question helps nobody.
        for pair in self.0.rchunks(2) {
            bytes += pair.iter().map(|(_, text)| text.len()).sum::<usize>();
            if bytes > HISTORY_MAX {
                break;
            }
            messages.extend(pair.iter().rev().map(|(role, text)| turn(role, text)));
        }
        messages.reverse();
        messages
    }

    fn add(&mut self, question: String, answer: String) {
        self.0.push(("user", question));
        self.0.push(("assistant", answer));
    }
}

pub(crate) async fn run(context: &Context, args: ChatArgs) -> Result<()> {
    let out = context.out;
    let sampling = args.sampling.checked()?;
    let link = link::open(&context.home).await?;
    // A misspelt model is found out before the first question.
    task::model(&link, &args.model).await?;
    let asks = io::stdin().is_terminal();
    out.note(format!("{}: ask, or leave with /bye", args.model));
    let mut history = History::default();
    loop {
        if asks && !out.json {
            out.raw(b"> ");
        }
        let line = tokio::select! {
            line = tokio::task::spawn_blocking(line) => line.context("reading the question")??,
            // Nothing is being written: leave.
            _ = tokio::signal::ctrl_c() => None,
        };
        let question = match line.as_deref().map(str::trim) {
            None | Some("/bye" | "/quit" | "/exit") => break,
            Some("") => continue,
            Some("/new") => {
                history = History::default();
                out.note("a new conversation");
                continue;
            }
            Some(long) if long.len() > QUESTION_MAX => {
                out.warn(format!(
                    "the question has {} bytes, the limit is {QUESTION_MAX}",
                    long.len()
                ));
                continue;
            }
            Some(question) => question.to_owned(),
        };
        let asked = Question {
            model: args.model.clone(),
            sampling: sampling.clone(),
            options: args.options.clone(),
            line: Map::from_iter([("messages".to_owned(), Value::Array(history.with(&question)))]),
        };
        let mut said = String::new();
        let mut say = |piece: &str| {
            said.push_str(piece);
            if !out.json {
                let piece = if out.terminal {
                    harmless(piece)
                } else {
                    piece.to_owned()
                };
                out.raw(piece.as_bytes());
            }
        };
        let answer = tokio::select! {
            answer = answer::follow(context, &link, asked, &mut say) => Some(answer),
            _ = tokio::signal::ctrl_c() => None,
        };
        if !out.json && !said.ends_with('\n') {
            out.line("");
        }
        match answer {
            Some(Ok(answer)) => {
                if out.json {
                    out.json(&json!({
                        "role": "assistant", "content": answer.text, "moves": answer.moves,
                        "job": crate::view::short(&answer.view.job), "spent_microcredits": answer.view.credits_spent,
                    }));
                }
                out.note(whereabouts(&answer));
                history.add(question, answer.text);
            }
            // One answer that fails is not the end of a conversation with a person; of a script it is.
            Some(Err(error)) if asks => out.warn(format!("no answer: {}", crate::fault::one_line(&error))),
            Some(Err(error)) => return Err(error),
            None => {
                if let Some(job) = task::take_current() {
                    let request = wire::JobRequest { job: job.to_string() };
                    // It may just have ended.
                    let _ = link::call(link.client.clone().cancel(request)).await;
                }
                out.note("stopped; nothing of it is billed");
                if !said.is_empty() {
                    history.add(question, said);
                }
            }
        }
        task::set_current(None);
        if out.closed() {
            break;
        }
    }
    if asks && !out.json {
        out.line("");
    }
    Ok(())
}

fn whereabouts(answer: &answer::Answer) -> String {
    let part = answer.view.parts.first();
    let place = part.map_or(String::new(), |p| format!("{} in {}, ", p.node_name, p.country));
    let moved = match answer.moves {
        0 => String::new(),
        n => format!(", moved {n} times"),
    };
    format!("  [{place}{} credits{moved}]", credits(answer.view.credits_spent))
}

/// The next line of standard input; nothing at its end.
fn line() -> Result<Option<String>> {
    let mut line = String::new();
    let got = io::stdin().read_line(&mut line).context("standard input")?;
    Ok((got > 0).then_some(line))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_conversation_is_sent_in_order_and_its_oldest_turns_make_room() {
        let mut history = History::default();
        history.add("a".into(), "b".into());
        history.add("c".into(), "d".into());
        let said: Vec<String> = history
            .with("e")
            .iter()
            .map(|m| {
                format!(
                    "{}:{}",
                    m["role"].as_str().unwrap(),
                    m["content"].as_str().unwrap()
                )
            })
            .collect();
        assert_eq!(said, ["user:a", "assistant:b", "user:c", "assistant:d", "user:e"]);
        history.add("x".repeat(HISTORY_MAX), "y".into());
        assert_eq!(history.with("z").len(), 1);
    }
}
