//! Following a job: bars on a terminal, one line per change elsewhere, one JSON object per change under `--json`.
use crate::{
    fault::{Kind, fault, refused},
    link::Link,
    out::{Out, bar_letters, credits, cut, plural, span},
    view,
};
use anyhow::Result;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use karez_proto::control as wire;
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};
use tonic::{Code, Request};

/// How long a broken connection is retried before giving up on watching. The job itself goes on.
const RETRY_MAX: Duration = Duration::from_secs(120);
/// Lines about training come at most this often where there are no bars.
const TRAINING_EVERY: Duration = Duration::from_secs(2);
/// Bars for parts at one time; more would push each other off the screen.
const BARS_MAX: usize = 8;

/// Whether no more changes will come.
pub(crate) fn has_ended(state: &str) -> bool {
    matches!(state, "done" | "failed" | "cancelled")
}

/// Watches `job` until it ends, showing what happens. A lost connection is taken up again.
pub(crate) async fn to_the_end(out: &Out, link: &Link, job: &str) -> Result<wire::JobView> {
    each_change(out, link, job, |_| {}).await
}

/// The same, handing every change to `on_change`.
pub(crate) async fn each_change(
    out: &Out,
    link: &Link,
    job: &str,
    mut on_change: impl FnMut(&wire::JobView),
) -> Result<wire::JobView> {
    let mut shown = Shown::new(out);
    let mut lost: Option<Instant> = None;
    loop {
        let mut client = link.client.clone();
        let request = Request::new(wire::JobRequest { job: job.to_owned() });
        let broken = match client.watch(request).await {
            Ok(stream) => {
                let mut stream = stream.into_inner();
                loop {
                    match stream.message().await {
                        Ok(Some(view)) => {
                            if lost.take().is_some() {
                                shown.warn("connected again");
                            }
                            on_change(&view);
                            shown.update(&view);
                            if has_ended(&view.state) {
                                return Ok(view);
                            }
                        }
                        Ok(None) => break "the scheduler ended the conversation".to_owned(),
                        Err(status) if will_pass(&status) => break status.message().to_owned(),
                        Err(status) => return Err(refused(status)),
                    }
                }
            }
            Err(status) if will_pass(&status) => status.message().to_owned(),
            Err(status) => return Err(refused(status)),
        };
        let since = *lost.get_or_insert_with(|| {
            shown.warn("the connection to the scheduler is lost, the job goes on: trying again");
            Instant::now()
        });
        if since.elapsed() > RETRY_MAX {
            let short = cut(job, 13);
            return Err(fault(
                Kind::Unreachable,
                format!(
                    "no connection to the scheduler for {} s ({broken}): `karez job watch {short}` takes up again",
                    RETRY_MAX.as_secs()
                ),
            ));
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

fn will_pass(status: &tonic::Status) -> bool {
    matches!(
        status.code(),
        Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Aborted | Code::Internal
    )
}

/// What is on the screen.
struct Shown<'a> {
    out: &'a Out,
    bars: Option<Bars>,
    job: String,
    parts: BTreeMap<u32, String>,
    /// When training was first seen, and how far it was then.
    since: Option<(Instant, u64, u64)>,
    /// What was last said of training, and when.
    said: Option<(Instant, u64)>,
}

struct Bars {
    all: MultiProgress,
    items: ProgressBar,
    /// How training does stands on a line of its own: behind the bar there is no room for it.
    training: bool,
    parts: BTreeMap<u32, ProgressBar>,
}

impl<'a> Shown<'a> {
    fn new(out: &'a Out) -> Self {
        let bars = out.bars.then(|| {
            let all = MultiProgress::with_draw_target(ProgressDrawTarget::stderr());
            let items = all.add(ProgressBar::new(0));
            let style = ProgressStyle::with_template("{bar:30} {pos}/{len} items  {elapsed}  {wide_msg}");
            items.set_style(
                style
                    .unwrap_or_else(|_| ProgressStyle::default_bar())
                    .progress_chars(bar_letters()),
            );
            items.enable_steady_tick(Duration::from_millis(200));
            Bars {
                all,
                items,
                training: false,
                parts: BTreeMap::new(),
            }
        });
        Self {
            out,
            bars,
            job: String::new(),
            parts: BTreeMap::new(),
            since: None,
            said: None,
        }
    }

    /// How a training job does: its loss, how quick it is, how long it will take, what it cost so far.
    fn training(&mut self, job: &wire::JobView) -> Option<String> {
        let loss = job.parts.iter().rfind(|part| part.loss_micro > 0)?.loss_micro;
        let seen = |part: &wire::PartView| match part.state.as_str() {
            "done" => part.meters.map_or(0, |meters| meters.tokens_in),
            _ => part.tokens,
        };
        let tokens: u64 = job.parts.iter().map(seen).sum();
        let (began, steps, before) = *self.since.get_or_insert((Instant::now(), job.items_done, tokens));
        let seconds = began.elapsed().as_secs_f64();
        let mut line = format!("loss {:.3}", loss as f64 / 1e6);
        let gone = job.items_done.saturating_sub(steps);
        if gone > 0 && seconds > 0.5 {
            let speed = tokens.saturating_sub(before) as f64 / seconds;
            let left = job.items.saturating_sub(job.items_done) as f64 * seconds / gone as f64;
            line += &format!(", {speed:.0} tokens/s, {} left", span((left * 1000.0) as u64));
        }
        line += &format!(", {} credits so far", credits(job.credits_spent));
        Some(line)
    }

    fn say(&self, text: &str) {
        match &self.bars {
            Some(bars) => drop(bars.all.println(text)),
            None => self.out.note(text),
        }
    }

    /// What matters in a log too: nothing waits silently.
    fn warn(&self, text: &str) {
        match &self.bars {
            Some(bars) => drop(bars.all.println(text)),
            None => self.out.warn(text),
        }
    }

    fn update(&mut self, job: &wire::JobView) {
        let reason = if job.cause.is_empty() {
            String::new()
        } else {
            format!(": {}", job.cause)
        };
        let state = format!("{}{reason}", job.state);
        let training = self.training(job);
        if let (Some(line), None) = (&training, &self.bars)
            && self
                .said
                .is_none_or(|(at, step)| step != job.items_done && at.elapsed() >= TRAINING_EVERY)
        {
            self.said = Some((Instant::now(), job.items_done));
            self.say(&format!("  step {} of {}, {line}", job.items_done, job.items));
        }
        for part in &job.parts {
            let line = part_line(part, &job.work);
            let news = self.parts.insert(part.part, line.clone()).as_ref() != Some(&line);
            if news && self.bars.is_none() {
                let line = format!("  part {}: {line}", part.part);
                match part.state.as_str() {
                    "queued" if !part.cause.is_empty() => self.warn(&line),
                    _ => self.say(&line),
                }
            }
        }
        if let Some(bars) = &mut self.bars {
            if training.is_some() && !bars.training {
                bars.training = true;
                let style =
                    ProgressStyle::with_template("{bar:30} step {pos} of {len}  {elapsed}\n  {wide_msg}");
                let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
                bars.items.set_style(style.progress_chars(bar_letters()));
            }
            bars.items.set_length(job.items);
            bars.items.set_position(job.items_done);
            bars.items.set_message(training.unwrap_or_else(|| state.clone()));
            for part in &job.parts {
                let ended = has_ended(&part.state);
                if !bars.parts.contains_key(&part.part) && (ended || bars.parts.len() >= BARS_MAX) {
                    continue;
                }
                let bar = bars.parts.entry(part.part).or_insert_with(|| {
                    let bar = bars.all.add(ProgressBar::new(part.items));
                    let style = ProgressStyle::with_template("  part {prefix} {wide_msg}");
                    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
                    bar.set_prefix(part.part.to_string());
                    bar
                });
                let so_far = if ended {
                    String::new()
                } else {
                    format!(", {}/{}", part.items_done, part.items)
                };
                bar.set_message(format!("{}{so_far}", part_line(part, &job.work)));
                if ended {
                    // A finished part leaves its line behind and makes room for the next.
                    bar.finish_and_clear();
                    drop(
                        bars.all
                            .println(format!("  part {}: {}", part.part, part_line(part, &job.work))),
                    );
                    bars.parts.remove(&part.part);
                }
            }
        } else if self.job != state {
            self.say(&format!("job {} {state}", view::short(&job.job)));
        }
        self.job = state;
    }
}

impl Drop for Shown<'_> {
    fn drop(&mut self) {
        if let Some(bars) = &self.bars {
            for bar in bars.parts.values() {
                bar.finish_and_clear();
            }
            bars.items.finish_and_clear();
        }
    }
}

fn part_line(part: &wire::PartView, work: &str) -> String {
    let item = if work == "train" { "step" } else { "item" };
    let place = if part.node_name.is_empty() {
        String::new()
    } else {
        format!(" on {} ({}, {})", part.node_name, part.institution, part.country)
    };
    let end = match part.state.as_str() {
        "done" => format!(
            ", {}, {} credits",
            plural(part.items, item),
            credits(part.credits)
        ),
        // Why there was told when it was placed.
        "fetching" | "running" => String::new(),
        _ if part.cause.is_empty() => String::new(),
        _ => format!(": {}", part.cause),
    };
    format!("{}{place}{end}", part.state)
}
