//! Answers as they are written: pieces from nodes, kept for whoever reads along.
//!
//! Bounded and never in the way: a stream holds the answer so far and no more, a slow reader gets larger pieces, and
//! what is lost on the way or does not fit is made good by the result. Only orders of one item stream.
use crate::mind::{Shared, lock};
use karez_core::{
    id::{JobId, LeaseKey},
    key::NodeId,
    records::{Order, Work},
    translate::Piece,
};
use serde_json::value::RawValue;
use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};
use tokio::sync::watch;

/// Streams at a time; the answers of further jobs come whole.
const STREAMS_MAX: usize = 4096;
/// Bytes of all streams together, and of one.
const BYTES_ALL_MAX: usize = 256 << 20;
const BYTES_MAX: usize = 4 << 20;

/// Whether pieces of this order's answer are told.
pub(crate) fn streams(order: &Order) -> bool {
    matches!(&order.work, Work::Generate(g) if g.stream) && order.items == 1
}

#[derive(Default)]
pub(crate) struct Streams {
    open: Mutex<HashMap<JobId, Arc<Stream>>>,
    held: Arc<AtomicUsize>,
}

/// One answer.
pub(crate) struct Stream {
    written: Mutex<Written>,
    changed: watch::Sender<()>,
    held: Arc<AtomicUsize>,
}

#[derive(Default)]
struct Written {
    /// Which attempt writes, and where.
    by: Option<(u64, NodeId)>,
    text: String,
    tokens: Vec<u32>,
    logprobs: Vec<Box<RawValue>>,
    bytes: usize,
    /// A piece is missing: from here on only the result tells.
    broken: bool,
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.held.fetch_sub(lock(&self.written).bytes, Ordering::Relaxed);
    }
}

impl Streams {
    /// Pieces of this job are kept from now on.
    pub(crate) fn open(&self, job: JobId) {
        let mut open = lock(&self.open);
        if open.len() < STREAMS_MAX {
            open.entry(job).or_insert_with(|| {
                Arc::new(Stream {
                    written: Mutex::default(),
                    changed: watch::channel(()).0,
                    held: self.held.clone(),
                })
            });
        }
    }

    pub(crate) fn close(&self, job: &JobId) {
        lock(&self.open).remove(job);
    }

    /// Reads along from the beginning. Nothing for a job that does not stream.
    pub(crate) fn reader(&self, job: &JobId) -> Option<Reader> {
        let stream = lock(&self.open).get(job)?.clone();
        Some(Reader {
            changes: stream.changed.subscribe(),
            stream,
            fence: 0,
            text: 0,
            tokens: 0,
            logprobs: 0,
        })
    }

    /// A node wrote a piece. Of an attempt that does not count it is dropped.
    pub(crate) async fn hear(&self, shared: &Shared, node: NodeId, key: LeaseKey, piece: Piece) {
        if key.part != 0 || piece.item != 0 {
            return;
        }
        let Some(stream) = lock(&self.open).get(&key.job).cloned() else {
            return;
        };
        let by = lock(&stream.written).by;
        if by != Some((key.fence, node)) {
            if by.is_some_and(|(fence, _)| fence >= key.fence) {
                return;
            }
            let runs_there = shared
                .look(|c| c.job(&key.job))
                .await
                .and_then(|view| view.parts.into_iter().next())
                .is_some_and(|part| part.node == Some(node) && part.fence == key.fence);
            if !runs_there {
                return;
            }
            stream.begin(key.fence, node);
        }
        stream.add(piece);
    }

    /// Forgets answers of jobs that have ended, once nobody reads along.
    pub(crate) async fn sweep(&self, shared: &Shared) {
        let idle: Vec<JobId> = lock(&self.open)
            .iter()
            .filter(|(_, stream)| stream.changed.receiver_count() == 0)
            .map(|(job, _)| *job)
            .collect();
        for job in idle {
            let over = shared
                .look(|c| c.job(&job).is_none_or(|view| view.state.ended()))
                .await;
            if over {
                self.close(&job);
            }
        }
    }
}

impl Stream {
    fn begin(&self, fence: u64, node: NodeId) {
        let mut w = lock(&self.written);
        self.held.fetch_sub(w.bytes, Ordering::Relaxed);
        *w = Written {
            by: Some((fence, node)),
            ..Written::default()
        };
    }

    fn add(&self, piece: Piece) {
        let mut w = lock(&self.written);
        let have = w.tokens.len() as u64;
        let ends = piece.first_token.saturating_add(piece.tokens.len() as u64);
        // A worker that died begins again on its node: what was heard before is not heard twice.
        if w.broken || (ends <= have && !piece.tokens.is_empty()) {
            return;
        }
        let bytes = piece.text.len() + piece.tokens.len() * 4 + piece.logprobs.len();
        let logprobs: Result<Vec<Box<RawValue>>, _> = match piece.logprobs.as_str() {
            "" => Ok(Vec::new()),
            text => serde_json::from_str(text),
        };
        let all = self.held.load(Ordering::Relaxed);
        let Ok(logprobs) = logprobs else {
            w.broken = true;
            return;
        };
        if piece.first_token != have || w.bytes + bytes > BYTES_MAX || all + bytes > BYTES_ALL_MAX {
            w.broken = true;
            return;
        }
        self.held.fetch_add(bytes, Ordering::Relaxed);
        w.bytes += bytes;
        w.text.push_str(&piece.text);
        w.tokens.extend(piece.tokens);
        w.logprobs.extend(logprobs);
        drop(w);
        self.changed.send_replace(());
    }
}

/// Somebody who reads along, at any pace.
pub(crate) struct Reader {
    stream: Arc<Stream>,
    changes: watch::Receiver<()>,
    fence: u64,
    text: usize,
    tokens: usize,
    logprobs: usize,
}

/// What was written since the last look.
#[derive(Debug)]
pub(crate) struct Fresh {
    /// By which attempt. A higher one than before begins anew.
    pub(crate) fence: u64,
    pub(crate) text: String,
    pub(crate) tokens: Vec<u32>,
    pub(crate) logprobs: Vec<Box<RawValue>>,
}

impl Reader {
    /// Resolves when something was written.
    pub(crate) async fn changed(&mut self) {
        // The sender lives as long as `stream` does.
        let _ = self.changes.changed().await;
    }

    /// What is new, if anything.
    pub(crate) fn take(&mut self) -> Option<Fresh> {
        let w = lock(&self.stream.written);
        let (fence, _) = w.by?;
        if fence != self.fence {
            (self.fence, self.text, self.tokens, self.logprobs) = (fence, 0, 0, 0);
        }
        if self.tokens == w.tokens.len() && self.text == w.text.len() {
            return None;
        }
        let fresh = Fresh {
            fence,
            text: w.text[self.text..].to_owned(),
            tokens: w.tokens[self.tokens..].to_vec(),
            logprobs: w.logprobs[self.logprobs..].to_vec(),
        };
        (self.text, self.tokens, self.logprobs) = (w.text.len(), w.tokens.len(), w.logprobs.len());
        Some(fresh)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use karez_core::{id::Digest, key::PublicKey};

    fn piece(first_token: u64, text: &str) -> Piece {
        Piece {
            first_token,
            text: text.into(),
            tokens: (0..text.len() as u32).collect(),
            ..Piece::default()
        }
    }

    fn opened() -> (Streams, Reader, Arc<Stream>) {
        let streams = Streams::default();
        let job = JobId(Digest::of(b"job"));
        streams.open(job);
        let reader = streams.reader(&job).unwrap();
        let stream = reader.stream.clone();
        stream.begin(1, NodeId(PublicKey([1; 32])));
        (streams, reader, stream)
    }

    #[test]
    fn a_slow_reader_gets_larger_pieces_and_nothing_twice() {
        let (_streams, mut reader, stream) = opened();
        for (at, text) in [(0, "ab"), (2, "c"), (0, "ab"), (3, "d")] {
            stream.add(piece(at, text));
        }
        assert_eq!(reader.take().unwrap().text, "abcd");
        assert!(reader.take().is_none());
        stream.add(piece(4, "e"));
        assert_eq!(reader.take().unwrap().tokens, [0]);
    }

    #[test]
    fn after_a_gap_only_the_result_tells() {
        let (_streams, mut reader, stream) = opened();
        for (at, text) in [(0, "ab"), (3, "d"), (2, "c")] {
            stream.add(piece(at, text));
        }
        assert_eq!(reader.take().unwrap().text, "ab");
    }

    #[test]
    fn another_attempt_begins_anew_and_memory_is_given_back() {
        let (streams, mut reader, stream) = opened();
        stream.add(piece(0, "abc"));
        assert_eq!(reader.take().unwrap().fence, 1);
        stream.begin(2, NodeId(PublicKey([2; 32])));
        stream.add(piece(0, "x"));
        let fresh = reader.take().unwrap();
        assert_eq!((fresh.fence, fresh.text.as_str()), (2, "x"));
        assert!(streams.held.load(Ordering::Relaxed) > 0);
        streams.close(&JobId(Digest::of(b"job")));
        drop((reader, stream));
        assert_eq!(streams.held.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_stream_that_grows_past_its_bound_stops_growing() {
        let (_streams, mut reader, stream) = opened();
        let big = "x".repeat(BYTES_MAX / 10);
        for at in 0..30 {
            stream.add(piece(at * big.len() as u64, &big));
        }
        assert!(reader.take().unwrap().text.len() <= BYTES_MAX);
    }
}
