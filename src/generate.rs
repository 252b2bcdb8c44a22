//! `karez generate`: prompts in, answers out.
use crate::{
    answer::{self, Question, harmless},
    cli::Context,
    embed::{ready, submit_and_wait},
    fault::{Kind, fault},
    input::{self, Items},
    link::{self, Link},
    options::JobOptions,
    out::{clean, wrap},
    report,
    sink::Lines,
    task::{self, Sampling, Task, What, interruptible},
    view,
};
use anyhow::Result;
use clap::Args;
use serde_json::Value;
use std::path::PathBuf;

/// `karez generate`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  karez generate \"Why should I rotate my crops?\"
  karez generate --stream \"Why should I rotate my crops?\"
  karez generate --file prompts.jsonl -o answers.jsonl --country KE,BR
  karez generate \"Je, mvua inanyesha lini?\" --model ./qwen3-0.6b+./adapter")]
pub(crate) struct GenerateArgs {
    /// Each argument is one prompt
    #[arg(required_unless_present = "file", conflicts_with = "file")]
    prompt: Vec<String>,
    /// Prompts: plain lines, or JSON lines with a "prompt" field; - for standard input
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// The model, by its name in `karez models`; or BASE+ADAPTER, names or paths
    #[arg(short, long, value_name = "NAME", default_value = "karez-tiny")]
    model: String,
    /// Write each answer as it comes, one prompt after the other
    #[arg(long, conflicts_with_all = ["file", "detach", "output"])]
    stream: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    options: JobOptions,
}

/// How to sample. The defaults take the likeliest token every time.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Sampling")]
pub(crate) struct SamplingArgs {
    /// Tokens to write per prompt at most
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=131_072))]
    max_tokens: u32,
    /// 0 always takes the likeliest token; up to 5
    #[arg(long, value_name = "T", default_value_t = 0.0, allow_negative_numbers = true)]
    temperature: f32,
    /// Sample among this many likeliest tokens; 0 for no limit
    #[arg(long, value_name = "N", default_value_t = 0)]
    top_k: u32,
    /// Sample among the likeliest tokens that make up this share, 0 to 1
    #[arg(long, value_name = "P", default_value_t = 1.0, allow_negative_numbers = true)]
    top_p: f32,
    /// Equal seeds give equal answers on one class of machine
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// The prompt as it stands, without the model's chat template
    #[arg(long, conflicts_with = "system")]
    raw: bool,
    /// How the model should behave
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    system: String,
}

impl SamplingArgs {
    pub(crate) fn checked(self) -> Result<Sampling> {
        sampling(
            self.max_tokens,
            self.temperature,
            self.top_k,
            self.top_p,
            self.seed,
            self.raw,
            self.system,
        )
    }
}

/// Checks the ranges and turns shares into thousandths.
#[allow(clippy::too_many_arguments)]
pub(crate) fn sampling(
    max_tokens: u32,
    temperature: f32,
    top_k: u32,
    top_p: f32,
    seed: u64,
    raw: bool,
    system: String,
) -> Result<Sampling> {
    let refuse = |why: String| Err(fault(Kind::Usage, why));
    if !(0.0..=5.0).contains(&temperature) {
        return refuse(format!("the temperature {temperature} is not between 0 and 5"));
    }
    if !(0.0..=1.0).contains(&top_p) {
        return refuse(format!("top-p {top_p} is not between 0 and 1"));
    }
    Ok(Sampling {
        max_tokens,
        temperature_milli: (temperature * 1000.0).round() as u32,
        top_k,
        top_p_milli: (top_p * 1000.0).round() as u32,
        seed,
        raw,
        system,
        stream: false,
        keep_going: false,
    })
}

pub(crate) async fn run(context: &Context, args: GenerateArgs) -> Result<()> {
    if args.stream {
        return stream(context, args).await;
    }
    let what = What::Generate {
        model: args.model,
        sampling: args.sampling.checked()?,
    };
    let to_file = args.options.output.is_some();
    let task = ready(context, what, args.options, to_file, |field, dir| {
        match &args.file {
            Some(path) => input::read(path, field, dir),
            None => Items::of_texts(field, args.prompt.iter().map(String::as_str), dir),
        }
    })?;
    let link = link::open(&context.home).await?;
    if task.options.detach || task.options.output.is_some() {
        submit_and_wait(context, link, task).await
    } else {
        all_at_once(context, link, task).await
    }
}

/// Prints the answers as they are written, one after the other.
async fn stream(context: &Context, args: GenerateArgs) -> Result<()> {
    let out = context.out;
    let sampling = args.sampling.checked()?;
    let link = link::open(&context.home).await?;
    let several = args.prompt.len() > 1;
    for (i, prompt) in args.prompt.iter().enumerate() {
        if several && !out.json {
            if i > 0 {
                out.line("");
            }
            out.line(out.bold(&format!("> {}", clean(prompt))));
        }
        let question = Question {
            model: args.model.clone(),
            sampling: sampling.clone(),
            options: args.options.clone(),
            line: serde_json::Map::from_iter([("prompt".to_owned(), prompt.clone().into())]),
        };
        let mut ended = true;
        let mut say = |piece: &str| {
            ended = piece.ends_with('\n');
            if out.json {
                out.json(&serde_json::json!({"prompt": i, "piece": piece}));
            } else if out.terminal {
                out.raw(harmless(piece).as_bytes());
            } else {
                out.raw(piece.as_bytes());
            }
        };
        let answer = interruptible(answer::follow(context, &link, question, &mut say)).await?;
        if out.json {
            out.json(&serde_json::json!({
                "prompt": i, "text": answer.text, "moves": answer.moves, "report": view::job(&answer.view),
            }));
        } else {
            if !ended {
                out.line("");
            }
            report::print(out, &answer.view, None);
        }
    }
    Ok(())
}

/// Waits for the answers and prints them.
async fn all_at_once(context: &Context, link: Link, task: Task) -> Result<()> {
    let out = context.out;
    interruptible(async {
        let mut running = task::submit(out, &context.home, link, &task).await?;
        task::set_current(Some(running.job));
        running.finish(out).await?;
        if out.json {
            out.raw(b"{\"answers\":[");
        }
        let mut first = true;
        let several = task.items.count > 1;
        running
            .results(
                out,
                &mut Lines::new(|line: &[u8]| {
                    let begins = std::mem::take(&mut first);
                    if out.json {
                        out.raw(if begins { b"" } else { b"," });
                        out.raw(line);
                    } else {
                        print_answer(context, &serde_json::from_slice(line)?, several, begins);
                    }
                    Ok(())
                }),
            )
            .await?;
        if out.json {
            out.line(format!("],\"report\":{}}}", view::job(&running.view)));
        } else {
            out.note("");
            report::print(out, &running.view, None);
        }
        running.close().await;
        Ok(())
    })
    .await
}

/// The answer of a result line; with its question where there are several.
fn print_answer(context: &Context, result: &Value, several: bool, first: bool) {
    let out = context.out;
    if several {
        if !first {
            out.line("");
        }
        let prompt = result.get("prompt").and_then(Value::as_str);
        // A conversation ends with what was asked.
        let said = || {
            result
                .get("messages")?
                .as_array()?
                .last()?
                .get("content")?
                .as_str()
        };
        let asked = prompt.or_else(said).unwrap_or_default();
        out.line(out.bold(&format!("> {}", clean(asked))));
    }
    for paragraph in text_of(result, "text").trim().lines() {
        if out.terminal {
            for line in wrap(&clean(paragraph), out.width(), "") {
                out.line(line);
            }
        } else {
            out.line(paragraph);
        }
    }
}

/// Result lines as values.
pub(crate) fn parse(lines: &[u8]) -> Result<Vec<Value>> {
    let each = lines.split(|b| *b == b'\n').filter(|l| !l.is_empty());
    Ok(each.map(serde_json::from_slice).collect::<Result<_, _>>()?)
}

/// A text field of a result line.
pub(crate) fn text_of<'a>(line: &'a Value, field: &str) -> &'a str {
    line.get(field).and_then(Value::as_str).unwrap_or_default()
}
