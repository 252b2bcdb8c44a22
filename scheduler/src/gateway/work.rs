//! One request as one signed order, from its input to its results; and answers that outlive the node that began them.
use super::{
    Caller,
    ask::{Verification, Wishes},
    error::ApiError,
    verify,
};
use crate::{mind::Shared, service::Service, setup::utc_now, streams::Reader};
use karez_core::{
    artifact::ArtifactRef,
    controller::{Event, JobState, JobView},
    id::JobId,
    key::{PublicKey, SchedulerId},
    records::{Constraints, Generate, Order, Signed, Verified, Work},
    translate::UNNAMED_TOKEN,
    unit::{Bytes, Credits, Millis},
};
use karez_net::store::StoreError;
use serde_json::{Map, Value, json, value::RawValue};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::watch;

/// How long a signed order may be accepted.
const ORDER_LIFE: Millis = Millis(10 * 60 * 1000);
/// A request that is not answered within this is called off.
const REQUEST_MAX: Duration = Duration::from_secs(30 * 60);
/// Bytes of the results of one request at most.
const RESULTS_MAX: Bytes = Bytes(64 << 20);
/// Attempts at each part, the scheduler's own.
const ATTEMPTS: u32 = 3;
/// How often one answer may move to another node.
const MOVES_MAX: u32 = 4;

/// An order under way. Called off when dropped before its end.
pub(super) struct Ticket {
    shared: Arc<Shared>,
    caller: PublicKey,
    pub(super) job: JobId,
    over: bool,
    deadline: Instant,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if !self.over {
            // The client went away: nobody reads what would come.
            let (shared, caller, job) = (self.shared.clone(), self.caller, self.job);
            tokio::spawn(async move { cancel(&shared, caller, job).await });
        }
    }
}

async fn cancel(shared: &Shared, caller: PublicKey, job: JobId) {
    let _ = shared
        .ask(move |request| Event::Cancel { request, caller, job })
        .await;
}

/// How a job ended, and why.
pub(super) fn ended_as(view: Option<&JobView>) -> (JobState, String) {
    match view {
        Some(view) => (view.state, view.cause.clone()),
        None => (JobState::Failed, "its job is no longer listed".into()),
    }
}

/// Signs an order with the bearer's key and submits it. `lines` is its input, `items` lines of JSON.
pub(super) async fn submit(
    shared: &Arc<Shared>,
    caller: &Caller,
    work: Work,
    lines: Vec<u8>,
    items: u64,
    wishes: &Wishes,
    label: &'static str,
) -> Result<Ticket, ApiError> {
    let failed = |error: StoreError| ApiError::unavailable(format!("the request cannot be stored: {error}"));
    let lost = || ApiError::server("storing the request failed");
    let store = shared.store.clone();
    let added = tokio::task::spawn_blocking(move || store.add_unsynced(&lines)).await;
    let input = added.map_err(|_| lost())?.map_err(failed)?;
    // The disk may take its time while the work is placed: nothing is said to the client before both are done.
    let store = shared.store.clone();
    let synced = tokio::task::spawn_blocking(move || store.sync(&input));
    let wanted = Wanted {
        work,
        input,
        items,
        items_per_part: 0,
        label,
    };
    let job = order(shared, caller, &wanted, wishes).await?;
    let ticket = Ticket {
        shared: shared.clone(),
        caller: caller.key,
        job,
        over: false,
        deadline: Instant::now() + REQUEST_MAX,
    };
    synced.await.map_err(|_| lost())?.map_err(failed)?;
    Ok(ticket)
}

/// What an order is to say, besides who gives it and where it may run.
pub(super) struct Wanted {
    pub(super) work: Work,
    /// In the scheduler's store.
    pub(super) input: ArtifactRef,
    pub(super) items: u64,
    /// 0 leaves it to the scheduler.
    pub(super) items_per_part: u32,
    pub(super) label: &'static str,
}

/// The order, signed and read back, so that every field is checked as a stranger's would be.
pub(super) fn signed(
    shared: &Shared,
    caller: &Caller,
    wanted: &Wanted,
    constraints: &Constraints,
    credits_max: Credits,
) -> Result<Verified<Order>, ApiError> {
    let nonce =
        getrandom::u64().map_err(|e| ApiError::server(format!("the system has no randomness: {e}")))?;
    let issued_at = utc_now();
    let order = Order {
        user: caller.user(),
        institution: caller.institution.clone(),
        scheduler: SchedulerId(shared.id),
        work: wanted.work.clone(),
        input: wanted.input,
        items: wanted.items,
        items_per_part: wanted.items_per_part,
        constraints: constraints.clone(),
        credits_max,
        attempts_max: ATTEMPTS,
        nonce,
        issued_at,
        expires_at: issued_at.after(ORDER_LIFE),
    };
    let signed = Signed::sign(order, &caller.secret);
    Signed::<Order>::open(&signed.encode()).map_err(|error| ApiError::request(error.to_string()))
}

/// Signs an order with the bearer's key and submits it, first to the institutions that it prefers.
pub(super) async fn order(
    shared: &Arc<Shared>,
    caller: &Caller,
    wanted: &Wanted,
    wishes: &Wishes,
) -> Result<JobId, ApiError> {
    let credits_max = wishes.ceiling(caller.budget(shared).await)?;
    let service = Service(shared.clone());
    let submit = async |constraints: &Constraints| {
        let order = signed(shared, caller, wanted, constraints, credits_max)?;
        service
            .submit_order(caller.key, order, wanted.label.to_owned(), false)
            .await
            .map_err(ApiError::from)
    };
    if !wishes.prefer.is_empty() {
        let preferred = Constraints {
            institutions: wishes.prefer.clone(),
            ..wishes.constraints.clone()
        };
        match submit(&preferred).await {
            Err(error) if error.is_unplaceable() => {}
            other => return other,
        }
    }
    submit(&wishes.constraints).await
}

impl Ticket {
    /// Waits for the end and gives the job with its result lines.
    pub(super) async fn finish(mut self) -> Result<(JobView, Vec<Map<String, Value>>), ApiError> {
        let mut changes = self.shared.watchers.subscribe(self.job);
        loop {
            if let Some(ended) = self.ended().await? {
                return Ok(ended);
            }
            tokio::select! {
                _ = changes.changed() => {}
                late = self.late() => return Err(late),
            }
        }
    }

    async fn view(&self) -> Result<JobView, ApiError> {
        let view = self.shared.look(|c| c.job(&self.job)).await;
        view.ok_or_else(|| ApiError::server("the job is no longer listed: too many came after it"))
    }

    /// The results, once the job is done.
    async fn ended(&mut self) -> Result<Option<(JobView, Vec<Map<String, Value>>)>, ApiError> {
        let view = self.view().await?;
        self.ended_as(view).await.map(|ended| ended.ok())
    }

    /// The same of a view at hand; gives it back while the job is under way.
    async fn ended_as(
        &mut self,
        view: JobView,
    ) -> Result<Result<(JobView, Vec<Map<String, Value>>), JobView>, ApiError> {
        match view.state {
            JobState::Done => {
                self.over = true;
                let lines = results(&self.shared, &view).await?;
                Ok(Ok((view, lines)))
            }
            JobState::Failed => {
                self.over = true;
                Err(ApiError::failed(&view.cause))
            }
            JobState::Cancelled => {
                self.over = true;
                Err(ApiError::server(format!(
                    "the job was called off: {}",
                    view.cause
                )))
            }
            _ => Ok(Err(view)),
        }
    }

    /// Resolves when waiting any longer makes no sense.
    async fn late(&self) -> ApiError {
        tokio::select! {
            () = self.shared.stopped() => ApiError::unavailable("the scheduler stops: try again when it is back"),
            () = tokio::time::sleep_until(self.deadline.into()) => ApiError::unavailable(format!(
                "no answer within {} minutes: the request was called off",
                REQUEST_MAX.as_secs() / 60
            )),
        }
    }

    async fn call_off(mut self) {
        self.over = true;
        cancel(&self.shared, self.caller, self.job).await;
    }
}

/// The result lines of a finished job, in the order of its items.
async fn results(shared: &Arc<Shared>, view: &JobView) -> Result<Vec<Map<String, Value>>, ApiError> {
    let parts: Vec<ArtifactRef> = view.parts.iter().filter_map(|part| part.result).collect();
    if parts.iter().map(|p| p.bytes.0).sum::<u64>() > RESULTS_MAX.0 {
        return Err(ApiError::server(format!(
            "the results are larger than {} MiB: ask for less at a time, or use a batch",
            RESULTS_MAX.0 >> 20
        )));
    }
    let store = shared.store.clone();
    let read = tokio::task::spawn_blocking(move || {
        let mut lines = Vec::new();
        for part in parts {
            let bytes = store.read(&part, RESULTS_MAX).map_err(|e| e.to_string())?;
            for line in bytes.split(|b| *b == b'\n').filter(|line| !line.is_empty()) {
                let line: Map<String, Value> = serde_json::from_slice(line).map_err(|e| e.to_string())?;
                // In order and each once, whatever the node says.
                if line.get("index").and_then(Value::as_u64) != Some(lines.len() as u64) {
                    return Err("a result belongs to another item".into());
                }
                lines.push(line);
            }
        }
        Ok::<_, String>(lines)
    });
    match read.await {
        Ok(Ok(lines)) if lines.len() as u64 == view.order.items => Ok(lines),
        Ok(Ok(lines)) => Err(ApiError::server(format!(
            "{} of {} results came back",
            lines.len(),
            view.order.items
        ))),
        Ok(Err(why)) => Err(ApiError::server(format!("the results cannot be read: {why}"))),
        Err(_) => Err(ApiError::server("reading the results failed")),
    }
}

/// What is asked of a model: one prompt or conversation.
#[derive(Clone)]
pub(super) struct Question {
    pub(super) caller: Caller,
    pub(super) work: Generate,
    /// The input line.
    pub(super) line: Map<String, Value>,
    pub(super) wishes: Wishes,
    pub(super) label: &'static str,
}

/// An answer on its way, moved to another node when its own is lost.
pub(super) struct Writing {
    shared: Arc<Shared>,
    question: Question,
    ticket: Option<Ticket>,
    reader: Option<Reader>,
    changes: watch::Receiver<()>,
    /// Tokens that attempts before this one wrote.
    before: Vec<u32>,
    /// What this attempt has shown so far.
    fence: u64,
    tokens: Vec<u32>,
    logprobs: usize,
    /// What all attempts have shown: the result holds it all, wherever it began.
    text: String,
    moves: u32,
}

/// What is new of an answer.
pub(super) enum Delta {
    /// Some text.
    Text(String, Vec<Box<RawValue>>),
    /// The last of it.
    End(Box<End>),
}

/// How an answer ended.
pub(super) struct End {
    /// What was not shown before.
    pub(super) text: String,
    pub(super) logprobs: Vec<Box<RawValue>>,
    pub(super) finish: &'static str,
    pub(super) tokens_in: u64,
    pub(super) tokens_out: u64,
    pub(super) tokens_cached: u64,
    pub(super) view: JobView,
    /// What asking again elsewhere came to, where that was wished for.
    pub(super) verification: Option<Value>,
}

impl End {
    /// The answer's own `karez` object.
    pub(super) fn karez(&self) -> Value {
        let mut karez = whereabouts(&self.view);
        if let Some(verification) = &self.verification {
            karez["verification"] = verification.clone();
        }
        karez
    }
}

impl Writing {
    /// Submits the question. Errors until here come with a status of their own.
    pub(super) async fn begin(shared: &Arc<Shared>, question: Question) -> Result<Self, ApiError> {
        let ticket = ask(shared, &question, &[]).await?;
        Ok(Self {
            reader: shared.streams.reader(&ticket.job),
            changes: shared.watchers.subscribe(ticket.job),
            shared: shared.clone(),
            question,
            ticket: Some(ticket),
            before: Vec::new(),
            fence: 0,
            tokens: Vec::new(),
            logprobs: 0,
            text: String::new(),
            moves: 0,
        })
    }

    /// What is new, as soon as there is something; after [`Delta::End`] nothing.
    pub(super) async fn next(&mut self) -> Result<Delta, ApiError> {
        loop {
            if let Some(fresh) = self.reader.as_mut().and_then(Reader::take) {
                if fresh.fence != self.fence && !self.tokens.is_empty() {
                    self.go_elsewhere().await?;
                    continue;
                }
                self.fence = fresh.fence;
                self.tokens.extend(fresh.tokens);
                self.text.push_str(&fresh.text);
                self.logprobs += fresh.logprobs.len();
                return Ok(Delta::Text(fresh.text, fresh.logprobs));
            }
            let Some(ticket) = &mut self.ticket else {
                return Err(ApiError::server("the answer is over"));
            };
            let view = ticket.view().await?;
            match ticket.ended_as(view).await? {
                Ok((view, lines)) => {
                    let mut end = self.end(view, lines)?;
                    if self.question.wishes.verification == Verification::Repeat {
                        let text = format!("{}{}", self.text, end.text);
                        let again = verify::again(&self.shared, &self.question, &text, &end.view).await;
                        end.verification = Some(again);
                    }
                    return Ok(Delta::End(Box::new(end)));
                }
                Err(view) => {
                    let part = view.parts.first();
                    let lost = part.is_none_or(|p| p.fence != self.fence || p.state == JobState::Queued);
                    if lost && !self.tokens.is_empty() {
                        self.go_elsewhere().await?;
                        continue;
                    }
                }
            }
            let ticket = &*ticket;
            let read = async {
                match &mut self.reader {
                    Some(reader) => reader.changed().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = read => {}
                _ = self.changes.changed() => {}
                late = ticket.late() => return Err(late),
            }
        }
    }

    /// The node is gone with half an answer: another goes on where the reader is.
    async fn go_elsewhere(&mut self) -> Result<(), ApiError> {
        self.moves += 1;
        if self.moves > MOVES_MAX {
            let why = format!("the answer lost its node {MOVES_MAX} times: ask again");
            return Err(ApiError::unavailable(why));
        }
        if let Some(ticket) = self.ticket.take() {
            tracing::info!(job = %ticket.job.short(), tokens = self.tokens.len(), "an answer moves to another node");
            // An attempt that is called off is not billed, so the answer is billed once, where it is finished.
            ticket.call_off().await;
        }
        if self.tokens.contains(&UNNAMED_TOKEN) {
            let why = "the provider's server was lost in the middle of its answer, and no other can go on with it: ask again";
            return Err(ApiError::unavailable(why));
        }
        self.before.append(&mut self.tokens);
        (self.fence, self.logprobs) = (0, 0);
        let ticket = ask(&self.shared, &self.question, &self.before).await?;
        self.reader = self.shared.streams.reader(&ticket.job);
        self.changes = self.shared.watchers.subscribe(ticket.job);
        self.ticket = Some(ticket);
        Ok(())
    }

    fn end(&mut self, view: JobView, mut lines: Vec<Map<String, Value>>) -> Result<End, ApiError> {
        let mut line = lines.pop().unwrap_or_default();
        if let Some(error) = line.get("error") {
            let of = |name| error.get(name).and_then(Value::as_str).unwrap_or_default();
            return Err(ApiError::line(of("kind"), of("message")));
        }
        let text = line.get("text").and_then(Value::as_str).unwrap_or_default();
        let Some(rest) = text.strip_prefix(self.text.as_str()) else {
            return Err(ApiError::server(
                "the node's result is not what it wrote before: ask again",
            ));
        };
        let rest = rest.to_owned();
        let number = |name| line.get(name).and_then(Value::as_u64).unwrap_or(0);
        let before = self.before.len() as u64;
        let (tokens_in, tokens_out) = (
            number("tokens_in").saturating_sub(before),
            number("tokens_out") + before,
        );
        let tokens_cached = number("tokens_cached").min(tokens_in);
        let finish = finish(&line);
        let logprobs = match line.remove("logprobs") {
            Some(Value::Array(all)) => all
                .iter()
                .skip(self.logprobs)
                .filter_map(|entry| serde_json::value::to_raw_value(entry).ok())
                .collect(),
            _ => Vec::new(),
        };
        Ok(End {
            text: rest,
            logprobs,
            finish,
            tokens_in,
            tokens_out,
            tokens_cached,
            view,
            verification: None,
        })
    }

    /// The whole answer at once.
    pub(super) async fn whole(mut self) -> Result<End, ApiError> {
        let (mut text, mut logprobs) = (String::new(), Vec::new());
        loop {
            match self.next().await? {
                Delta::Text(more, entries) => {
                    text.push_str(&more);
                    logprobs.extend(entries);
                }
                Delta::End(mut end) => {
                    text.push_str(&end.text);
                    logprobs.append(&mut end.logprobs);
                    (end.text, end.logprobs) = (text, logprobs);
                    return Ok(*end);
                }
            }
        }
    }

    /// The job that answers now.
    pub(super) fn job(&self) -> String {
        self.ticket
            .as_ref()
            .map(|ticket| ticket.job.to_string())
            .unwrap_or_default()
    }
}

async fn ask(shared: &Arc<Shared>, question: &Question, resume: &[u32]) -> Result<Ticket, ApiError> {
    let mut line = question.line.clone();
    if !resume.is_empty() {
        line.insert("resume".into(), json!(resume));
    }
    let bytes = Value::Object(line).to_string().into_bytes();
    if bytes.len() > super::ask::LINE_MAX {
        let why = format!(
            "the prompt has {} bytes, the limit is {}",
            bytes.len(),
            super::ask::LINE_MAX
        );
        return Err(ApiError::request(why));
    }
    let work = Work::Generate(question.work.clone());
    submit(
        shared,
        &question.caller,
        work,
        bytes,
        1,
        &question.wishes,
        question.label,
    )
    .await
}

/// OpenAI's word for why a text ended.
pub(super) fn finish(line: &Map<String, Value>) -> &'static str {
    match line.get("finish").and_then(Value::as_str) {
        Some("stop") => "stop",
        _ => "length",
    }
}

/// Where it ran and what it cost, beside what OpenAI's answers hold.
pub(super) fn whereabouts(view: &JobView) -> Value {
    let part = view.parts.first();
    json!({
        "job": view.id.to_string(),
        "node": part.map(|p| p.node_name.as_str()),
        "institution": part.and_then(|p| p.institution.as_ref()).map(ToString::to_string),
        "country": part.and_then(|p| p.country.as_ref()).map(ToString::to_string),
        "cost_microcredits": view.spent.0,
        "receipt": part.and_then(|p| p.receipt).map(|id| id.to_string()),
    })
}

/// Seconds since 1970, for `created`.
pub(super) fn now() -> u64 {
    utc_now().0 / 1000
}
