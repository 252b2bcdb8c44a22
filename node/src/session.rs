//! The one long conversation with a scheduler: dialled, kept, dialled again.
//!
//! The first report of a session travels inside the hello. Not here: what to say (the agent).
use crate::{config::SchedulerEntry, daemon::Input, wait::Backoff};
use karez_core::{
    exchange::ToScheduler,
    key::SecretKey,
    translate::{FromNode, FromScheduler, MESSAGE_BYTES_MAX, Piece},
};
use karez_net::control::connect;
use karez_proto::control::{NodeMessage, control_client::ControlClient};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::wrappers::ReceiverStream;

/// Messages that may wait for the wire. A scheduler that reads slower than that is dropped and dialled again.
const OUTBOX_MAX: usize = 512;
/// A scheduler must welcome a node within this.
const WELCOME_MAX: Duration = Duration::from_secs(15);
/// After a goodbye, the last words get this long to leave.
const PARTING_MAX: Duration = Duration::from_millis(700);
/// A session that stood this long did not fail at once.
const STOOD: Duration = Duration::from_secs(5);

/// Where a scheduler serves its artifacts, once it said so; kept while it is away.
pub(crate) type ArtifactAddrs = watch::Receiver<Vec<String>>;

/// The daemon's end of a session. Dropping it ends the session at once.
#[derive(Debug)]
pub(crate) struct Link {
    outbox: mpsc::Sender<NodeMessage>,
    greeting: Option<Greeting>,
    cut: oneshot::Sender<()>,
}

#[derive(Debug)]
struct Greeting {
    name: String,
}

impl Link {
    /// Puts a message on its way. False when the session is beyond use.
    pub(crate) fn say(&mut self, message: ToScheduler) -> bool {
        let message = match (message, self.greeting.take()) {
            (ToScheduler::Report(report), Some(greeting)) => {
                let version = env!("CARGO_PKG_VERSION").into();
                FromNode::Hello {
                    version,
                    name: greeting.name,
                    report,
                }
                .into()
            }
            (message, Some(greeting)) => {
                // Nothing may be said before the hello; the agent reports first, so this is not reached.
                self.greeting = Some(greeting);
                tracing::debug!(?message, "said before the hello: dropped");
                return true;
            }
            (message, None) => message.into(),
        };
        self.outbox.try_send(message).is_ok()
    }

    /// A line for the log of a job.
    pub(crate) fn log(&self, key: karez_core::id::LeaseKey, text: String) {
        if self.greeting.is_none() {
            // A log line is the first thing to do without.
            let _ = self.outbox.try_send(FromNode::Log { key, text }.into());
        }
    }

    /// A way for pieces of answers past everything else that this session does.
    pub(crate) fn pieces(&self) -> Pieces {
        Pieces(self.outbox.downgrade())
    }

    /// Says goodbye; the session ends once that has left.
    pub(crate) fn part(self, reason: &str) {
        let _ = self.outbox.try_send(
            FromNode::Goodbye {
                reason: reason.into(),
            }
            .into(),
        );
        let _ = self.cut.send(());
    }
}

/// Where pieces of answers leave. What does not fit is lost: the result has it all.
pub(crate) struct Pieces(mpsc::WeakSender<NodeMessage>);

impl Pieces {
    pub(crate) fn say(&self, key: karez_core::id::LeaseKey, piece: Piece) {
        // Some places stay free for what must not be lost.
        if let Some(outbox) = self.0.upgrade()
            && outbox.capacity() > OUTBOX_MAX / 4
        {
            let _ = outbox.try_send(FromNode::Piece { key, piece }.into());
        }
    }
}

impl Pieces {
    /// That a lease is being worked on.
    pub(crate) fn alive(&self, key: karez_core::id::LeaseKey) {
        if let Some(outbox) = self.0.upgrade()
            && outbox.capacity() > OUTBOX_MAX / 4
        {
            let _ = outbox.try_send(ToScheduler::Alive { key }.into());
        }
    }
}

/// What a session is made with.
pub(crate) struct Dial {
    pub(crate) scheduler: SchedulerEntry,
    pub(crate) secret: SecretKey,
    pub(crate) name: String,
    pub(crate) inputs: mpsc::Sender<Input>,
    pub(crate) artifact_addrs: watch::Sender<Vec<String>>,
}

/// Keeps a session until the daemon no longer listens or parts on purpose.
pub(crate) async fn keep(dial: Dial) {
    let id = dial.scheduler.key;
    let mut backoff = Backoff::dialling();
    let mut last = String::new();
    loop {
        let began = Instant::now();
        let over = once(&dial).await;
        let why = match over {
            Over::Parted => return,
            Over::Ended(why) => why,
        };
        if dial
            .inputs
            .send(Input::SessionDown {
                scheduler: id,
                why: why.clone(),
            })
            .await
            .is_err()
        {
            return;
        }
        if began.elapsed() >= STOOD {
            backoff.reset();
            last.clear();
        }
        let wait = backoff.next();
        // The same trouble again is not news.
        if why == last {
            tracing::debug!(scheduler = %id.short(), %why, ?wait, "still no session");
        } else {
            tracing::warn!(scheduler = %id.short(), %why, "no session with the scheduler: dialling again");
        }
        last = why;
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = dial.inputs.closed() => return,
        }
    }
}

enum Over {
    /// On purpose: do not come back.
    Parted,
    Ended(String),
}

async fn once(dial: &Dial) -> Over {
    let SchedulerEntry {
        key, control_addr, ..
    } = &dial.scheduler;
    let channel = match connect(control_addr, &dial.secret, key.0).await {
        Ok(channel) => channel,
        Err(error) => return Over::Ended(error.to_string()),
    };
    let mut client = ControlClient::new(channel)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let (outbox, outgoing) = mpsc::channel(OUTBOX_MAX);
    let (cut, mut parting) = oneshot::channel();
    let link = Link {
        outbox,
        greeting: Some(Greeting {
            name: dial.name.clone(),
        }),
        cut,
    };
    // The agent answers with its report, which becomes the hello.
    if dial
        .inputs
        .send(Input::SessionUp {
            scheduler: *key,
            link,
        })
        .await
        .is_err()
    {
        return Over::Parted;
    }
    let opened = tokio::select! {
        opened = tokio::time::timeout(WELCOME_MAX, client.session(ReceiverStream::new(outgoing))) => opened,
        parted = &mut parting => return if parted.is_ok() { Over::Parted } else { Over::Ended(OVERFLOW.into()) },
    };
    let mut heard = match opened {
        Err(_) => {
            return Over::Ended(format!(
                "{control_addr} gave no answer in {} s",
                WELCOME_MAX.as_secs()
            ));
        }
        Ok(Err(status)) => return Over::Ended(format!("{control_addr} refused: {}", status.message())),
        Ok(Ok(response)) => response.into_inner(),
    };
    loop {
        let message = tokio::select! {
            message = heard.message() => message,
            parted = &mut parting => return match parted {
                Err(_) => Over::Ended(OVERFLOW.into()),
                Ok(()) => {
                    // The scheduler closes its side when it has read the goodbye.
                    let rest = async { while let Ok(Some(_)) = heard.message().await {} };
                    let _ = tokio::time::timeout(PARTING_MAX, rest).await;
                    Over::Parted
                }
            },
        };
        match message {
            Err(status) => return Over::Ended(format!("{control_addr}: {}", status.message())),
            Ok(None) => return Over::Ended(format!("{control_addr} ended the session")),
            Ok(Some(message)) => match FromScheduler::try_from(message) {
                // One message that cannot be read is no reason to drop all others.
                Err(error) => tracing::warn!(scheduler = %key.short(), %error, "message not understood"),
                Ok(FromScheduler::Goodbye { reason }) => {
                    return Over::Ended(format!("it said goodbye: {reason}"));
                }
                Ok(FromScheduler::Welcome {
                    scheduler_name,
                    artifact_addrs,
                    ..
                }) => {
                    let addrs = crate::artifacts::at_host(&artifact_addrs, control_addr);
                    dial.artifact_addrs.send_replace(addrs);
                    let welcome = Input::Welcome {
                        scheduler: *key,
                        name: scheduler_name,
                    };
                    if dial.inputs.send(welcome).await.is_err() {
                        return Over::Parted;
                    }
                }
                Ok(FromScheduler::Said(said)) => {
                    let heard = Input::Heard(*key, Box::new(said));
                    if dial.inputs.send(heard).await.is_err() {
                        return Over::Parted;
                    }
                }
            },
        }
    }
}

const OVERFLOW: &str = "the scheduler did not read what was sent";
