//! The long conversations: nodes' sessions, watches of jobs, exports of the ledger.
//!
//! Each ends by itself when the daemon stops, with a word of goodbye: endless streams would hold up the shutdown.
use crate::{
    mind::{Input, Line, OUTBOX_MAX, SessionId, Shared},
    streams::Reader,
};
use karez_core::{
    controller::{Denial, JobState, JobView},
    exchange::ToScheduler,
    id::JobId,
    key::{NodeId, PublicKey},
    records::Role,
    translate::{FromNode, FromScheduler, TranslateError, clean},
};
use karez_ledger::export;
use karez_proto::control as wire;
use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

/// A node must say hello within this.
const HELLO_MAX: Duration = Duration::from_secs(10);
/// Messages of one node per second; faster ones are read later, so the node's own connection slows it down.
const MESSAGES_PER_SECOND: f64 = 200.0;
const MESSAGES_BURST: f64 = 2_000.0;
/// Pieces of answers, which cost less: sixteen answers at a hundred tokens per second each, and some.
const PIECES_PER_SECOND: f64 = 4_000.0;
/// Messages in a row that cannot be read before a session is closed: the two ends do not understand each other.
const NONSENSE_MAX: u32 = 20;
/// Watches of large jobs are told at most this often.
const LARGE_JOB_EVERY: Duration = Duration::from_secs(1);
/// Above so many parts a job is large: its view leaves out what did not get the work.
const LARGE_JOB_PARTS: usize = 500;
/// Bytes of one chunk of an export.
const CHUNK_BYTES: usize = 64 << 10;
/// A reader of an export must take a chunk within this.
const CHUNK_WAIT: Duration = Duration::from_secs(30);

pub(crate) type SessionStream = ReceiverStream<Result<wire::SchedulerMessage, Status>>;
pub(crate) type AnswerStream = ReceiverStream<Result<wire::AnswerPiece, Status>>;
pub(crate) type WatchStream = ReceiverStream<Result<wire::JobView, Status>>;
pub(crate) type LedgerStream = ReceiverStream<Result<wire::LedgerChunk, Status>>;

/// Opens a node's session: what the node says becomes events until either end stops.
pub(crate) async fn open(
    shared: Arc<Shared>,
    key: PublicKey,
    incoming: Streaming<wire::NodeMessage>,
) -> Result<SessionStream, Denial> {
    let role = shared.look(|c| c.member(&key).map(|m| m.role)).await;
    match role {
        None => return Err(Denial::NotAdmitted(key)),
        Some(Role::Node) => {}
        Some(is) => {
            return Err(Denial::WrongRole {
                key,
                is,
                needs: Role::Node,
            });
        }
    }
    let (outbox, outgoing) = mpsc::channel(OUTBOX_MAX);
    tokio::spawn(converse(shared, NodeId(key), incoming, outbox));
    Ok(ReceiverStream::new(outgoing))
}

async fn converse(
    shared: Arc<Shared>,
    node: NodeId,
    mut incoming: Streaming<wire::NodeMessage>,
    outbox: mpsc::Sender<Result<wire::SchedulerMessage, Status>>,
) {
    let hello = match timeout(HELLO_MAX, incoming.message()).await {
        Ok(Ok(Some(message))) => FromNode::try_from(message),
        Ok(Ok(None) | Err(_)) => return,
        Err(_) => {
            let late = format!("no hello within {} s", HELLO_MAX.as_secs());
            let _ = outbox.try_send(Err(Status::deadline_exceeded(late)));
            return;
        }
    };
    let report = match hello {
        Ok(FromNode::Hello {
            version,
            name,
            report,
        }) => {
            tracing::info!(node = %node.short(), %name, %version, leases = report.held.len(), "session");
            report
        }
        Ok(_) => {
            let _ = outbox.try_send(Err(Status::invalid_argument("a session begins with a hello")));
            return;
        }
        Err(error) => {
            let _ = outbox.try_send(Err(Status::invalid_argument(error.to_string())));
            return;
        }
    };
    let welcome = FromScheduler::Welcome {
        scheduler_name: shared.config.name.clone(),
        heartbeat: shared.config.timing.heartbeat,
        artifact_addrs: shared.config.artifacts.advertise.clone(),
    };
    let _ = outbox.try_send(Ok(welcome.into()));
    let session = shared.session_id();
    let (alive, mut cut) = oneshot::channel::<()>();
    let line = Line {
        outbox: outbox.clone(),
        _alive: alive,
    };
    if shared.inputs.send(Input::Up(node, session, line)).await.is_err() {
        return;
    }
    let said = ToScheduler::Report(report);
    if shared
        .inputs
        .send(Input::Heard(node, session, Box::new(said)))
        .await
        .is_ok()
    {
        let ended = tokio::select! {
            ended = listen(&shared, node, session, &mut incoming) => ended,
            // Replaced, or cut for reading too slowly.
            _ = &mut cut => Ended::Cut,
            // The response stream was dropped: the connection is gone.
            () = outbox.closed() => Ended::Gone("the connection is gone".into()),
        };
        match ended {
            Ended::Cut => tracing::debug!(node = %node.short(), "session closed from this side"),
            Ended::Nonsense(error) => {
                tracing::warn!(node = %node.short(), %error, "session closed: messages cannot be read");
                let _ = outbox.try_send(Err(Status::invalid_argument(error.to_string())));
            }
            Ended::Gone(why) => tracing::info!(node = %node.short(), %why, "session ended"),
        }
    }
    let _ = shared.inputs.send(Input::Down(node, session)).await;
}

enum Ended {
    Cut,
    Nonsense(TranslateError),
    Gone(String),
}

async fn listen(
    shared: &Arc<Shared>,
    node: NodeId,
    session: SessionId,
    incoming: &mut Streaming<wire::NodeMessage>,
) -> Ended {
    let mut nonsense = 0;
    let (mut pace, mut pieces) = (Pace::new(MESSAGES_PER_SECOND), Pace::new(PIECES_PER_SECOND));
    loop {
        let message = match incoming.message().await {
            Ok(Some(message)) => message,
            Ok(None) => return Ended::Gone("the node closed it".into()),
            Err(status) => return Ended::Gone(clean(status.message(), 200)),
        };
        match &message.message {
            Some(
                wire::node_message::Message::Piece(_)
                | wire::node_message::Message::Alive(_)
                | wire::node_message::Message::Warm(_),
            ) => pieces.keep().await,
            _ => pace.keep().await,
        }
        // A usage carries up to 256 readings, 40 µs each: not on a thread that serves sockets.
        let heavy = matches!(&message.message, Some(wire::node_message::Message::Usage(_)));
        let understood = if heavy {
            match tokio::task::spawn_blocking(move || FromNode::try_from(message)).await {
                Ok(understood) => understood,
                Err(_) => return Ended::Gone("reading a usage failed".into()),
            }
        } else {
            FromNode::try_from(message)
        };
        let said = match understood {
            Ok(FromNode::Heard(said)) => said,
            Ok(FromNode::Hello { report, .. }) => ToScheduler::Report(report),
            Ok(FromNode::Log { key, text }) => {
                tracing::info!(node = %node.short(), lease = %key, "{text}");
                continue;
            }
            Ok(FromNode::Piece { key, piece }) => {
                shared.streams.hear(shared, node, key, piece).await;
                continue;
            }
            Ok(FromNode::Goodbye { reason }) => return Ended::Gone(reason),
            Err(error) => {
                nonsense += 1;
                if nonsense >= NONSENSE_MAX {
                    return Ended::Nonsense(error);
                }
                tracing::warn!(node = %node.short(), %error, "a message was dropped");
                continue;
            }
        };
        nonsense = 0;
        if !result_is_here(shared, node, &said) {
            continue;
        }
        if shared
            .inputs
            .send(Input::Heard(node, session, Box::new(said)))
            .await
            .is_err()
        {
            return Ended::Cut;
        }
    }
}

/// A usage is taken once its result lies in this scheduler's store: billing what nobody can fetch helps nobody. The
/// node repeats it. The result is pinned, so that it is still here when its user comes.
fn result_is_here(shared: &Shared, node: NodeId, said: &ToScheduler) -> bool {
    let ToScheduler::Finished(finished) = said else {
        return true;
    };
    let Some(result) = finished.usage.result else {
        return true;
    };
    let lease = finished.lease.key();
    if !shared.store.contains(&result) {
        tracing::info!(node = %node.short(), %lease, %result, "the result has not arrived yet: the usage waits");
        return false;
    }
    shared.pins.keep_more(lease.job, result);
    true
}

/// Spreads what arrives too fast.
struct Pace {
    per_second: f64,
    tokens: f64,
    at: Instant,
}

impl Pace {
    fn new(per_second: f64) -> Self {
        Self {
            per_second,
            tokens: MESSAGES_BURST,
            at: Instant::now(),
        }
    }

    async fn keep(&mut self) {
        let now = Instant::now();
        let earned = now.duration_since(self.at).as_secs_f64() * self.per_second;
        self.tokens = (self.tokens + earned).min(MESSAGES_BURST) - 1.0;
        self.at = now;
        if self.tokens < 0.0 {
            tokio::time::sleep(Duration::from_secs_f64(-self.tokens / self.per_second)).await;
        }
    }
}

/// The job as it is, then again at each change, until it ends.
pub(crate) fn watch(shared: Arc<Shared>, job: JobId, slot: crate::limits::WatchSlot) -> WatchStream {
    let (outbox, outgoing) = mpsc::channel(2);
    tokio::spawn(async move {
        let _slot = slot;
        // Subscribed before the first look, so that no change falls between them.
        let mut changes = shared.watchers.subscribe(job);
        loop {
            let Some(view) = shared.look(|c| c.job(&job)).await else {
                let gone = Status::not_found(Denial::NoJob(job.short()).to_string());
                let _ = outbox.send(Err(gone)).await;
                return;
            };
            let (ended, large) = (view.state.ended(), view.parts.len() > LARGE_JOB_PARTS);
            if outbox.send(Ok(view_of(view))).await.is_err() || ended {
                return;
            }
            if large {
                tokio::time::sleep(LARGE_JOB_EVERY).await;
            }
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return },
                () = outbox.closed() => return,
                () = shared.stopped() => {
                    let word = "the scheduler stops; the job goes on when it is back: watch again";
                    let _ = outbox.try_send(Err(Status::unavailable(word)));
                    return;
                }
            }
        }
    });
    ReceiverStream::new(outgoing)
}

/// An answer as it is written, until its attempt or its job ends.
pub(crate) fn answer(
    shared: Arc<Shared>,
    job: JobId,
    mut reader: Reader,
    slot: crate::limits::WatchSlot,
) -> AnswerStream {
    let (outbox, outgoing) = mpsc::channel(2);
    tokio::spawn(async move {
        let _slot = slot;
        let mut changes = shared.watchers.subscribe(job);
        let mut written = 0;
        loop {
            while let Some(fresh) = reader.take() {
                if written != 0 && fresh.fence != written {
                    return;
                }
                written = fresh.fence;
                let piece = wire::AnswerPiece {
                    fence: fresh.fence,
                    text: fresh.text,
                    tokens: fresh.tokens,
                };
                // A slow reader holds up this task alone, and gets more at a time.
                if outbox.send(Ok(piece)).await.is_err() {
                    return;
                }
            }
            let lives = shared.look(|c| c.job(&job)).await.is_some_and(|view| {
                let part = view.parts.first();
                let lost = part.is_none_or(|p| p.fence != written || p.state == JobState::Queued);
                !(view.state.ended() || (written != 0 && lost))
            });
            if !lives {
                return;
            }
            tokio::select! {
                () = reader.changed() => {}
                changed = changes.changed() => if changed.is_err() { return },
                () = outbox.closed() => return,
                () = shared.stopped() => return,
            }
        }
    });
    ReceiverStream::new(outgoing)
}

/// A job for the wire. The views of very large jobs leave out the nodes that were not chosen, to fit one message.
pub(crate) fn view_of(mut view: JobView) -> wire::JobView {
    if view.parts.len() > LARGE_JOB_PARTS {
        for part in &mut view.parts {
            part.alternatives.clear();
        }
    }
    view.into()
}

/// The whole ledger as a file, in chunks.
pub(crate) fn ledger(shared: Arc<Shared>, permit: tokio::sync::OwnedSemaphorePermit) -> LedgerStream {
    let (outbox, outgoing) = mpsc::channel(4);
    tokio::task::spawn_blocking(move || {
        let _permit = permit;
        let mut chunks = io::BufWriter::with_capacity(
            CHUNK_BYTES,
            Chunks {
                shared: shared.clone(),
                outbox,
            },
        );
        let created = shared.clock.now().utc;
        let done = export(&mut chunks, &shared.secret, created, shared.writer.entries(0))
            .map_err(|e| e.to_string())
            .and_then(|_| io::Write::flush(&mut chunks).map_err(|e| e.to_string()));
        if let Err(error) = done {
            tracing::warn!(%error, "an export of the ledger broke off");
            let word = Status::aborted(format!("the export broke off ({error}): ask for it again"));
            let _ = chunks.get_ref().outbox.try_send(Err(word));
        }
    });
    ReceiverStream::new(outgoing)
}

struct Chunks {
    shared: Arc<Shared>,
    outbox: mpsc::Sender<Result<wire::LedgerChunk, Status>>,
}

impl io::Write for Chunks {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // One long line may come in one piece: cut it, so that no message meets the cap.
        let bytes = &bytes[..bytes.len().min(CHUNK_BYTES)];
        let mut chunk = Ok(wire::LedgerChunk {
            bytes: bytes.to_vec(),
        });
        let since = Instant::now();
        loop {
            match self.outbox.try_send(chunk) {
                Ok(()) => return Ok(bytes.len()),
                Err(mpsc::error::TrySendError::Closed(_)) => return Err(io::Error::other("the reader left")),
                Err(mpsc::error::TrySendError::Full(back)) => chunk = back,
            }
            if since.elapsed() > CHUNK_WAIT || *self.shared.stopping.borrow() {
                return Err(io::Error::other("the reader is too slow, or the scheduler stops"));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
