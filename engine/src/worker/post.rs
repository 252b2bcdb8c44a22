//! The two ways between the engine and its node: requests that wait, and replies on their way out.
use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::end;
use crate::error::EngineError;
use crate::protocol::{self, Meters, Output, RUNS_MAX, Reply, RunId, Work};

/// After a write, tokens are gathered for so long before the next one, longer where many answers are written at once: the eye
/// sees no difference, and neither a fast model nor the network behind it spends its time on writing.
const GATHER: Duration = Duration::from_millis(4);
const GATHER_MOST: Duration = Duration::from_millis(16);
/// Among so many of the latest replies that wait, an earlier piece of the same answer is looked for.
const LOOK_BACK: usize = 64;
/// Replies that wait to be written at most; whoever computes them then waits too.
const WAITING_MAX: usize = 4096;

/// Runs that wait, and those in progress.
#[derive(Default)]
pub(super) struct Inbox {
    tray: Mutex<Tray>,
    filled: Condvar,
}

/// A run, what to do, and whether it was cancelled.
pub(super) type Arrival = (RunId, Work, Arc<AtomicBool>);

#[derive(Default)]
struct Tray {
    waiting: VecDeque<Arrival>,
    running: HashMap<RunId, Arc<AtomicBool>>,
}

impl Inbox {
    fn tray(&self) -> MutexGuard<'_, Tray> {
        self.tray.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next run; waits for one if told to. It is in progress until [`Inbox::over`].
    pub(super) fn take(&self, wait: bool) -> Option<Arrival> {
        let mut tray = self.tray();
        loop {
            if let Some((id, work, cancelled)) = tray.waiting.pop_front() {
                tray.running.insert(id, Arc::clone(&cancelled));
                return Some((id, work, cancelled));
            }
            if !wait {
                return None;
            }
            tray = self.filled.wait(tray).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// A run has ended.
    pub(super) fn over(&self, id: RunId) {
        self.tray().running.remove(&id);
    }

    /// Takes in a run, unless there are too many.
    pub(super) fn add(&self, id: RunId, work: Work) -> Result<(), EngineError> {
        let mut tray = self.tray();
        if tray.waiting.len() + tray.running.len() >= RUNS_MAX {
            return Err(EngineError::Busy {
                limit: RUNS_MAX as u32,
            });
        }
        tray.waiting.push_back((id, work, Arc::default()));
        self.filled.notify_one();
        Ok(())
    }

    /// Stops a run. True when it had not begun: it is then gone, and its end is for the caller to tell.
    pub(super) fn cancel(&self, id: RunId) -> bool {
        let mut tray = self.tray();
        if let Some(cancelled) = tray.running.get(&id) {
            cancelled.store(true, Ordering::Relaxed);
            return false;
        }
        let before = tray.waiting.len();
        tray.waiting.retain(|(waiting, ..)| *waiting != id);
        tray.waiting.len() < before
    }
}

/// How long to gather where so many answers have something to say: a millisecond for each.
fn gather(answers: usize) -> Duration {
    let each = u64::try_from(answers).unwrap_or(u64::MAX);
    Duration::from_millis(each).clamp(GATHER, GATHER_MOST)
}

/// The way to the node. Written by a thread of its own once that is started.
pub(super) struct Outlet {
    file: Mutex<File>,
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    replies: VecDeque<Reply>,
    /// Something in it should not wait.
    urgent: bool,
    /// A thread writes.
    threaded: bool,
    /// It has replies in its hands just now.
    writing: bool,
}

impl Outlet {
    pub(super) fn new(file: File) -> Self {
        Self {
            file: Mutex::new(file),
            queue: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts the thread that writes. Not before the sandbox is closed: a thread that exists already would stay free.
    pub(super) fn start(self: &Arc<Self>) {
        let outlet = Arc::clone(self);
        let started = std::thread::Builder::new()
            .name("replies".into())
            .spawn(move || outlet.write_for_ever());
        self.queue().threaded = started.is_ok();
    }

    /// Says something to the node.
    pub(super) fn say(&self, reply: Reply) {
        let urgent = !matches!(reply, Reply::Token { .. } | Reply::Alive);
        self.put(reply, urgent);
    }

    /// The same for what somebody waits for, such as the first word of an answer.
    pub(super) fn say_now(&self, reply: Reply) {
        self.put(reply, true);
    }

    fn put(&self, reply: Reply, urgent: bool) {
        let mut queue = self.queue();
        if !queue.threaded {
            drop(queue);
            return self.write(&[reply]);
        }
        while queue.replies.len() >= WAITING_MAX {
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        // One sign of life is as good as two, and pieces of one answer are as good together.
        let same = |waiting: &&mut Reply| match (&reply, waiting) {
            (Reply::Alive, Reply::Alive) => true,
            (Reply::Token { id, .. }, Reply::Token { id: before, .. }) => id == before,
            _ => false,
        };
        if let Some(waiting) = queue.replies.iter_mut().rev().take(LOOK_BACK).find(same) {
            if let (Reply::Token { piece, .. }, Reply::Token { piece: before, .. }) = (reply, waiting) {
                before.text.push_str(&piece.text);
                before.tokens.extend(piece.tokens);
                before.logprobs.extend(piece.logprobs);
            }
            return;
        }
        queue.urgent |= urgent;
        let first = queue.replies.is_empty();
        let urgent = queue.urgent;
        queue.replies.push_back(reply);
        drop(queue);
        if first || urgent {
            self.changed.notify_all();
        }
    }

    /// Says how a run ended; a result too long for a frame is an error.
    pub(super) fn done(&self, id: RunId, output: Output, meters: Meters) {
        let reply = Reply::Done { id, output, meters };
        match protocol::encode(&reply) {
            Ok(_) => self.say(reply),
            Err(error) => self.say(Reply::Failed {
                id: Some(id),
                error: EngineError::bad_input(format!(
                    "the result is too long: {error}; send fewer texts at once, or ask for fewer top_logprobs"
                )),
                meters,
            }),
        }
    }

    /// Waits until everything that was said is written.
    pub(super) fn flush(&self) {
        let mut queue = self.queue();
        while queue.threaded && (queue.writing || !queue.replies.is_empty()) {
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn write_for_ever(&self) {
        let mut wrote = Instant::now();
        loop {
            let mut queue = self.queue();
            loop {
                let gathered = wrote.elapsed();
                let window = gather(queue.replies.len());
                queue = if queue.replies.is_empty() {
                    self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner)
                } else if queue.urgent || gathered >= window {
                    break;
                } else {
                    let left = window.saturating_sub(gathered);
                    let waited = self.changed.wait_timeout(queue, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                };
            }
            let replies: Vec<Reply> = queue.replies.drain(..).collect();
            (queue.urgent, queue.writing) = (false, true);
            drop(queue);
            self.changed.notify_all();
            self.write(&replies);
            self.queue().writing = false;
            self.changed.notify_all();
            wrote = Instant::now();
        }
    }

    fn write(&self, replies: &[Reply]) {
        let mut frames = Vec::new();
        for reply in replies {
            match protocol::encode(reply) {
                Ok(frame) => frames.extend(frame),
                Err(error) => eprintln!("a reply was lost: {error}"),
            }
        }
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if file.write_all(&frames).and_then(|()| file.flush()).is_err() {
            // Nobody listens any more.
            end(0);
        }
    }
}
