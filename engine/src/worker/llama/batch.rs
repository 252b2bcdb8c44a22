//! Continuous batching: many generations share the model, step by step.
//!
//! Each generation has a sequence of the one cache; what has been computed and may be wanted again lies on a shelf beside it. A
//! step computes one token for every generation that is writing and fills what is left of it with a stretch of a prompt, so a
//! long prompt delays the others by little. When the cache runs full, kept prefixes go first; then the youngest generation steps
//! back and is read again later, so the oldest always gets on.
//!
//! With one sequence a prompt is computed in whole steps from its beginning and reused in whole steps only, so each step is
//! always computed in the same company and an answer never depends on what was asked before it. With several, prefixes are
//! shared token by token and between generations, and company may change the rounding of a score.
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use llama_cpp_2::DecodeError;
use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::token::LlamaToken;

use super::adapters::{Adapters, Attached};
use super::sample::Sampler;
use super::shelf::{Shelf, common};
use super::{Model, failed};
use crate::error::EngineError;
use crate::inspect::STEP_TOKENS;
use crate::protocol::{
    Finish, Generate, Meters, ModelFacts, Output, Piece, Reply, RunId, TokenLogprob, Work,
};
use crate::text::TextStream;
use crate::unit::Millis;
use crate::worker::meter::{Stopwatch, peak_rss};
use crate::worker::{Inbox, Outlet};

/// Prompt tokens in one step while others are writing: their next token waits for no more than these, unless more of them
/// wait to be read than write. Then the step is shared out by heads.
const BESIDE: usize = 64;
/// A prompt waits for another one that is being read when they have at least this many tokens more in common than are
/// already computed: it then takes them over.
const WORTH_WAITING: usize = 64;

pub(in crate::worker) struct Batcher {
    model: Model,
    context: LlamaContext<'static>,
    batch: LlamaBatch<'static>,
    slots: Vec<Slot>,
    /// Those that have no sequence yet, oldest first.
    waiting: VecDeque<Job>,
    /// What sequences held that is over; without room, they keep it themselves.
    shelf: Shelf,
    adapters: Adapters,
    arrivals: u64,
    steps: u64,
    /// A single sequence: whole steps only.
    exact: bool,
    /// Whether a sequence can take over a part of another one.
    shares: bool,
    /// Generations at a time at most: less than there are sequences after the cache was full.
    ceiling: usize,
}

/// A sequence of the cache.
struct Slot {
    sequence: i32,
    /// What the cache holds of it and may be reused.
    kept: Vec<LlamaToken>,
    adapter: Attached,
    /// When it was last computed with.
    used: u64,
    job: Option<Job>,
}

/// A generation on its way.
struct Job {
    id: RunId,
    cancelled: Arc<AtomicBool>,
    arrived: u64,
    /// The prompt and what has been generated.
    tokens: Vec<LlamaToken>,
    /// Length of the prompt.
    prompt: usize,
    /// How many of `tokens` are in the cache.
    done: usize,
    /// Generated, those of `resume` counted.
    written: u64,
    most: u64,
    adapter: Attached,
    sampler: Sampler,
    stream: TextStream,
    wants_logprobs: bool,
    /// Tokens whose text is held back.
    held: Piece,
    answer: String,
    logprobs: Vec<TokenLogprob>,
    meters: Meters,
    cpu_us: f64,
    wall_us: f64,
    /// Where its scores are in the step being computed.
    output: Option<i32>,
    /// Tokens of it in the step being computed.
    share: usize,
}

/// Where the beginning of a text is already computed.
#[derive(Clone, Copy)]
enum Source {
    Slot(usize),
    Shelf(usize),
}

impl Job {
    fn writing(&self) -> bool {
        self.done + 1 == self.tokens.len() && self.tokens.len() > self.prompt
    }
}

impl Batcher {
    pub(super) fn new(
        model: Model,
        context: LlamaContext<'static>,
        adapters: Adapters,
        sequences: u16,
        shelf: usize,
    ) -> Self {
        let slots = (0..i32::from(sequences)).map(|sequence| Slot {
            sequence,
            kept: Vec::new(),
            adapter: Attached::default(),
            used: 0,
            job: None,
        });
        let shares = sequences > 1 && !model.get().is_recurrent() && !model.get().is_hybrid();
        Self {
            model,
            context,
            batch: LlamaBatch::new(STEP_TOKENS as usize, 1),
            slots: slots.collect(),
            waiting: VecDeque::new(),
            shelf: Shelf::new(if shares { shelf } else { 0 }),
            adapters,
            arrivals: 0,
            steps: 0,
            exact: sequences == 1,
            shares,
            ceiling: sequences.into(),
        }
    }

    /// What is known of the model.
    pub(in crate::worker) fn facts(&self) -> ModelFacts {
        self.model.facts.clone()
    }

    /// Serves until the process ends.
    pub(in crate::worker) fn serve(&mut self, inbox: &Inbox, outlet: &Outlet) -> ! {
        loop {
            self.take_in(inbox, outlet);
            self.drop_cancelled(inbox, outlet);
            self.admit();
            self.step(inbox, outlet);
        }
    }

    fn busy(&self) -> usize {
        self.slots.iter().filter(|slot| slot.job.is_some()).count()
    }

    fn idle(&self) -> bool {
        self.waiting.is_empty() && self.slots.iter().all(|slot| slot.job.is_none())
    }

    /// Takes what has arrived; waits for something when there is nothing to do.
    fn take_in(&mut self, inbox: &Inbox, outlet: &Outlet) {
        // No more than can soon begin: reading texts into tokens keeps those who write waiting.
        while self.waiting.len() <= self.slots.len()
            && let Some((id, work, cancelled)) = inbox.take(self.idle())
        {
            let watch = Stopwatch::start();
            match self.job(id, work, cancelled) {
                Ok(mut job) => {
                    job.spend(watch.stop(), 1.0);
                    self.waiting.push_back(job);
                }
                Err(error) => {
                    inbox.over(id);
                    outlet.say(Reply::Failed {
                        id: Some(id),
                        error,
                        meters: Meters::default(),
                    });
                }
            }
        }
    }

    fn job(&mut self, id: RunId, work: Work, cancelled: Arc<AtomicBool>) -> Result<Job, EngineError> {
        let Work::Generate(request) = work else {
            return Err(EngineError::bad_input(
                "this worker holds a model that generates text",
            ));
        };
        if cancelled.load(Ordering::Relaxed) {
            return Err(EngineError::Cancelled);
        }
        let mut sampler = Sampler::new(&request, self.model.get())?;
        let mut tokens = self.model.tokens(&request.prompt)?;
        let prompt = tokens.len();
        let limit = self.model.facts.context_tokens;
        if prompt == 0 {
            return Err(EngineError::bad_input("the prompt is empty"));
        }
        let total = prompt + request.resume.len();
        if total >= limit as usize {
            let prompt = u32::try_from(total).unwrap_or(u32::MAX);
            return Err(EngineError::ContextOverflow { prompt, limit });
        }
        let (slots, waiting) = (&self.slots, &self.waiting);
        let busy = |number| {
            let jobs = slots.iter().filter_map(|slot| slot.job.as_ref());
            jobs.chain(waiting).any(|job| job.adapter.is(number))
        };
        let wanted = request.adapter.as_ref();
        let adapter = self.adapters.attach(wanted, &mut self.model, busy)?;
        sampler.prompt(&tokens);
        let mut stream = TextStream::new(request.stop.clone());
        let mut answer = String::new();
        for token in &request.resume {
            let token = LlamaToken(i32::try_from(*token).unwrap_or(-1));
            sampler.resume(token)?;
            // Shown before, elsewhere: what it would show now is not said again.
            answer.push_str(&stream.push(&self.model.piece(token)));
            tokens.push(token);
        }
        let Generate {
            max_tokens,
            resume,
            top_logprobs,
            ..
        } = request;
        let over = stream.stopped();
        self.arrivals += 1;
        Ok(Job {
            id,
            cancelled,
            arrived: self.arrivals,
            // A resumed answer is read like a prompt.
            prompt: tokens.len(),
            tokens,
            done: 0,
            written: resume.len() as u64,
            most: if over {
                0
            } else {
                max_tokens.map_or(u64::MAX, u64::from)
            },
            adapter,
            sampler,
            stream,
            wants_logprobs: top_logprobs.is_some(),
            held: Piece::default(),
            answer,
            logprobs: Vec::new(),
            meters: Meters::default(),
            cpu_us: 0.0,
            wall_us: 0.0,
            output: None,
            share: 0,
        })
    }

    fn drop_cancelled(&mut self, inbox: &Inbox, outlet: &Outlet) {
        let stop = |job: Job| {
            inbox.over(job.id);
            outlet.say(Reply::Failed {
                id: Some(job.id),
                error: EngineError::Cancelled,
                meters: job.meters(),
            });
        };
        for at in (0..self.waiting.len()).rev() {
            if self.waiting[at].cancelled.load(Ordering::Relaxed)
                && let Some(job) = self.waiting.remove(at)
            {
                stop(job);
            }
        }
        for at in 0..self.slots.len() {
            let cancelled = |job: &mut Job| job.cancelled.load(Ordering::Relaxed);
            if let Some(job) = self.slots[at].job.take_if(cancelled) {
                self.keep(at, &job);
                stop(job);
            }
        }
    }

    /// Gives waiting generations a sequence each, oldest first.
    fn admit(&mut self) {
        let mut at = 0;
        while at < self.waiting.len() && self.busy() < self.ceiling {
            let Some((target, source, shared)) = self.best_place(&self.waiting[at]) else {
                // Its beginning is being read by another one: it takes that over when it is there.
                at += 1;
                continue;
            };
            let Some(mut job) = self.waiting.remove(at) else {
                return;
            };
            self.seat(&mut job, target, source, shared);
            self.slots[target].job = Some(job);
        }
    }

    /// The free slot to take, whose beginning to take over, and how many tokens of it.
    /// None when it is better to wait for a prompt that is being read.
    fn best_place(&self, job: &Job) -> Option<(usize, Source, usize)> {
        let common = |tokens: &[LlamaToken]| common(tokens, &job.tokens);
        // The last token is always computed: its scores are what is wanted.
        let most = job.tokens.len() - 1;
        let (mut from, mut shared, mut coming) = (None, 0, 0);
        for (at, slot) in self.slots.iter().enumerate() {
            if slot.adapter != job.adapter {
                continue;
            }
            let here = match &slot.job {
                None => common(&slot.kept),
                Some(_) if !self.shares => 0,
                Some(other) => {
                    coming = coming.max(common(&other.tokens[..other.prompt]).min(most));
                    common(&other.tokens[..other.done])
                }
            };
            let elsewhere = slot.job.is_none() && !self.shares && !self.exact;
            let here = if elsewhere && here < slot.kept.len() {
                0
            } else {
                self.usable(here.min(most))
            };
            if here > shared {
                (from, shared) = (Some(at), here);
            }
        }
        let kept = self.shelf.best(&job.tokens, job.adapter);
        let shelved = kept.filter(|(_, length)| (*length).min(most) > shared);
        if let Some((_, length)) = shelved {
            shared = length.min(most);
        }
        if coming >= shared + WORTH_WAITING {
            return None;
        }
        // Its own slot when that is free; else the one whose contents are of least use.
        let free = |at: &usize| self.slots[*at].job.is_none();
        let oldest = || {
            let empty_first = |at: &usize| (!self.slots[*at].kept.is_empty(), self.slots[*at].used);
            (0..self.slots.len()).filter(free).min_by_key(empty_first)
        };
        let own = from.filter(|at| free(at) && shelved.is_none());
        let target = own.or_else(oldest)?;
        let source = match shelved {
            Some((at, _)) => Source::Shelf(at),
            None => Source::Slot(from.unwrap_or(target)),
        };
        Some((target, source, shared))
    }

    fn usable(&self, shared: usize) -> usize {
        if self.exact {
            shared / STEP_TOKENS as usize * STEP_TOKENS as usize
        } else {
            shared
        }
    }

    fn seat(&mut self, job: &mut Job, target: usize, source: Source, mut shared: usize) {
        let to = self.slots[target].sequence;
        match source {
            Source::Shelf(at) => {
                self.forget(target);
                if !self.shelf.fetch(&mut self.context, at, to, shared) {
                    // There was no room for it; what came of it is of no use.
                    self.forget(target);
                    shared = 0;
                }
            }
            Source::Slot(source) if source != target => {
                let from = self.slots[source].sequence;
                self.forget(target);
                let end = u32::try_from(shared).ok();
                if shared > 0 && self.context.copy_kv_cache_seq(from, to, None, end).is_err() {
                    shared = 0;
                }
            }
            Source::Slot(_) if shared == 0 => self.forget(target),
            Source::Slot(_) => {
                let end = u32::try_from(shared).ok();
                if self.context.kv_cache_seq_rm(to, end, None).is_err() {
                    // Some architectures cannot forget a part.
                    self.forget(target);
                    shared = 0;
                }
            }
        }
        let slot = &mut self.slots[target];
        slot.kept.clear();
        slot.adapter = job.adapter;
        job.done = shared;
        if job.meters.tokens_in == 0 {
            job.meters.tokens_in = shared as u64;
            job.meters.tokens_cached = shared as u64;
        }
    }

    /// Remembers what a slot's sequence holds of a generation that is over, as far as it may be reused.
    fn keep(&mut self, at: usize, job: &Job) {
        let slot = &mut self.slots[at];
        slot.keep(job, self.exact);
        if self.shelf.is_used() {
            let tokens = std::mem::take(&mut slot.kept);
            self.shelf.put(&self.context, slot.sequence, tokens, job.adapter);
            self.forget(at);
        }
    }

    /// Empties a sequence.
    fn forget(&mut self, slot: usize) {
        let sequence = self.slots[slot].sequence;
        self.slots[slot].kept.clear();
        // A whole sequence can always be removed.
        let _ = self.context.kv_cache_seq_rm(sequence, None, None);
    }

    /// One step for those who share an adapter.
    fn step(&mut self, inbox: &Inbox, outlet: &Outlet) {
        self.finish_the_done(inbox, outlet);
        let Some(adapter) = self.whose_turn() else { return };
        if let Err(error) = self.adapters.apply(&mut self.context, adapter) {
            return self.fail_all(&error, inbox, outlet);
        }
        let watch = Stopwatch::start();
        let tokens = match self.fill(adapter) {
            Ok(0) => return,
            Ok(tokens) => tokens,
            Err(error) => return self.fail_all(&error, inbox, outlet),
        };
        match self.context.decode(&mut self.batch) {
            Ok(()) => {}
            Err(DecodeError::NoKvCacheSlot) => return self.make_room(inbox, outlet),
            Err(error) => return self.fail_all(&failed(&error), inbox, outlet),
        }
        self.context.synchronize();
        let spent = watch.stop();
        self.steps += 1;
        let mut silent = true;
        for at in 0..self.slots.len() {
            let slot = &mut self.slots[at];
            if slot.adapter == adapter && slot.job.is_some() {
                // Also for those whose prompt found no room in it: else their adapter would come first again and again.
                slot.used = self.steps;
            }
            let Some(job) = slot.job.as_mut().filter(|job| job.share > 0) else {
                continue;
            };
            job.spend(spent, job.share as f64 / tokens as f64);
            let read = job.done < job.prompt;
            job.done += job.share;
            if read {
                // What was read again after stepping back is not metered twice.
                job.meters.tokens_in = job.meters.tokens_in.max(job.done.min(job.prompt) as u64);
            }
            job.share = 0;
            let Some(output) = job.output.take() else { continue };
            let watch = Stopwatch::start();
            let sampled = self.sample(at, output);
            if let Some(job) = &mut self.slots[at].job {
                job.spend(watch.stop(), 1.0);
            }
            match sampled {
                Ok(None) => silent = false,
                Ok(Some(finish)) => {
                    silent = false;
                    self.end(at, Ok(finish), inbox, outlet);
                }
                Err(error) => self.end(at, Err(error), inbox, outlet),
            }
            if let Some(job) = &mut self.slots[at].job {
                job.show(outlet);
            }
        }
        if silent {
            outlet.say(Reply::Alive);
        }
    }

    /// Ends those who need no step any more.
    fn finish_the_done(&mut self, inbox: &Inbox, outlet: &Outlet) {
        for at in 0..self.slots.len() {
            let over = self.slots[at]
                .job
                .as_ref()
                .is_some_and(|job| job.written >= job.most);
            if over {
                self.end(at, Ok(Finish::Length), inbox, outlet);
            }
        }
    }

    /// The adapter whose generations have waited longest.
    fn whose_turn(&self) -> Option<Attached> {
        let active = self.slots.iter().filter(|slot| slot.job.is_some());
        active.min_by_key(|slot| slot.used).map(|slot| slot.adapter)
    }

    /// Puts the next step together; gives how many tokens it has.
    fn fill(&mut self, adapter: Attached) -> Result<usize, EngineError> {
        let step = STEP_TOKENS as usize;
        self.batch.clear();
        let mut count = 0;
        let mut add = |batch: &mut LlamaBatch<'_>, token, position: usize, sequence, output| {
            let place = i32::try_from(position).map_err(|error| failed(&error))?;
            batch
                .add(token, place, &[sequence], output)
                .map_err(|error| failed(&error))?;
            count += 1;
            Ok::<i32, EngineError>(count - 1)
        };
        let mut room = step;
        let mine = |slot: &&mut Slot| slot.adapter == adapter;
        for slot in self.slots.iter_mut().filter(mine) {
            if let Some(job) = slot.job.as_mut().filter(|job| job.writing()) {
                let token = job.tokens[job.done];
                job.output = Some(add(&mut self.batch, token, job.done, slot.sequence, true)?);
                job.share = 1;
                room -= 1;
            }
        }
        let mut readers: Vec<&mut Slot> = self
            .slots
            .iter_mut()
            .filter(mine)
            .filter(|slot| slot.job.as_ref().is_some_and(|job| !job.writing()))
            .collect();
        readers.sort_by_key(|slot| slot.job.as_ref().map(|job| job.arrived));
        let writers = step - room;
        if writers > 0 {
            let fair = step * readers.len() / (readers.len() + writers);
            room = room.min(fair.max(BESIDE));
        }
        for slot in readers {
            let Some(job) = &mut slot.job else { continue };
            let left = job.tokens.len() - job.done;
            let take = left.min(room);
            for at in 0..take {
                let last = at + 1 == left;
                let position = job.done + at;
                let index = add(
                    &mut self.batch,
                    job.tokens[position],
                    position,
                    slot.sequence,
                    last,
                )?;
                if last {
                    job.output = Some(index);
                }
            }
            job.share = take;
            room -= take;
            if room == 0 {
                break;
            }
        }
        Ok(usize::try_from(count).unwrap_or(0))
    }

    /// Takes the next token of the generation in a slot; says how it ended if it did.
    fn sample(&mut self, at: usize, output: i32) -> Result<Option<Finish>, EngineError> {
        let scores = self.context.get_logits_ith(output);
        let model = &self.model;
        let Some(job) = &mut self.slots[at].job else {
            return Ok(None);
        };
        let (token, logprob) = job.sampler.next(scores, &|token| model.piece(token))?;
        if model.is_end(token) {
            return Ok(Some(Finish::Stop));
        }
        job.meters.tokens_out += 1;
        job.written += 1;
        job.held.tokens.push(u32::try_from(token.0).unwrap_or(0));
        job.held.logprobs.extend(logprob);
        job.held.text.push_str(&job.stream.push(&model.piece(token)));
        job.tokens.push(token);
        Ok(if job.stream.stopped() {
            Some(Finish::Stop)
        } else if job.written >= job.most {
            Some(Finish::Length)
        } else if job.tokens.len() >= model.facts.context_tokens as usize {
            Some(Finish::Context)
        } else {
            None
        })
    }

    /// Ends the generation in a slot and keeps what it computed.
    fn end(&mut self, at: usize, result: Result<Finish, EngineError>, inbox: &Inbox, outlet: &Outlet) {
        let Some(mut job) = self.slots[at].job.take() else {
            return;
        };
        inbox.over(job.id);
        self.ceiling = self.slots.len().min(self.ceiling + 1);
        let id = job.id;
        match result {
            Ok(finish) => {
                // A stop string's own tokens are no part of the answer.
                let cut = job.stream.stopped();
                job.held.text.push_str(&job.stream.finish());
                if !cut || !job.held.text.is_empty() {
                    job.show_all(outlet);
                }
                let output = Output::Text {
                    text: std::mem::take(&mut job.answer),
                    finish,
                    logprobs: std::mem::take(&mut job.logprobs),
                };
                outlet.done(id, output, job.meters());
                self.keep(at, &job);
            }
            Err(error) => {
                let meters = job.meters();
                self.forget(at);
                outlet.say(Reply::Failed {
                    id: Some(id),
                    error,
                    meters,
                });
            }
        }
    }

    /// After a failed step, what is in the cache is anyone's guess.
    fn fail_all(&mut self, error: &EngineError, inbox: &Inbox, outlet: &Outlet) {
        for at in 0..self.slots.len() {
            self.end(at, Err(error.clone()), inbox, outlet);
            self.slots[at].kept.clear();
        }
        self.context.clear_kv_cache();
    }

    /// The cache is full: lets go of a kept prefix, else of the youngest generation's cells.
    fn make_room(&mut self, inbox: &Inbox, outlet: &Outlet) {
        for slot in &mut self.slots {
            if let Some(job) = &mut slot.job {
                (job.share, job.output) = (0, None);
            }
        }
        let idle = (0..self.slots.len())
            .filter(|at| self.slots[*at].job.is_none() && !self.slots[*at].kept.is_empty());
        if let Some(at) = idle.min_by_key(|at| self.slots[*at].used) {
            return self.forget(at);
        }
        let busy: Vec<usize> = (0..self.slots.len())
            .filter(|at| self.slots[*at].job.is_some())
            .collect();
        let youngest = busy
            .iter()
            .max_by_key(|at| self.slots[**at].job.as_ref().map(|job| job.arrived));
        match youngest {
            Some(at) if busy.len() > 1 => {
                if let Some(mut job) = self.slots[*at].job.take() {
                    job.done = 0;
                    self.waiting.push_front(job);
                }
                // Or it would come back at once and the cache be full again.
                self.ceiling = busy.len() - 1;
                self.forget(*at);
            }
            // Alone it must fit: the cache is never smaller than one context.
            _ => {
                let error = EngineError::Crashed {
                    how: "llama.cpp: the cache has no room for a single generation".into(),
                };
                self.fail_all(&error, inbox, outlet);
            }
        }
    }
}

impl Slot {
    /// Remembers what the cache now holds, as far as it may be reused.
    fn keep(&mut self, job: &Job, exact: bool) {
        let step = STEP_TOKENS as usize;
        let whole = job.prompt.min(job.done) / step * step;
        let upto = if exact { whole } else { job.done };
        self.kept = job.tokens[..upto].to_vec();
    }
}

impl Job {
    fn spend(&mut self, (wall_us, cpu_us): (f64, f64), share: f64) {
        self.wall_us += wall_us * share;
        self.cpu_us += cpu_us * share;
    }

    fn meters(&self) -> Meters {
        Meters {
            cpu_ms: Millis((self.cpu_us / 1000.0).ceil() as u64),
            wall_ms: Millis((self.wall_us / 1000.0).ceil() as u64),
            peak_rss: peak_rss(),
            ..self.meters
        }
    }

    /// Shows what may be shown, with the tokens behind it.
    fn show(&mut self, outlet: &Outlet) {
        if !self.held.text.is_empty() {
            self.show_all(outlet);
        }
    }

    fn show_all(&mut self, outlet: &Outlet) {
        let piece = std::mem::take(&mut self.held);
        if piece == Piece::default() {
            return;
        }
        self.answer.push_str(&piece.text);
        if self.wants_logprobs {
            self.logprobs.extend(piece.logprobs.iter().cloned());
        }
        let first = self.answer.len() == piece.text.len();
        let reply = Reply::Token { id: self.id, piece };
        if first {
            outlet.say_now(reply);
        } else {
            outlet.say(reply);
        }
    }
}
