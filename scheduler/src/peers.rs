//! The peer network: nodes' offers, and what the schedulers tell each other.
use crate::mind::{Shared, lock};
use karez_core::{
    controller::{Event, Reply},
    key::PublicKey,
    records::{Offer, RecordError, Role, Signed, Summary, Verified},
    unit::{Millis, Now, UtcMillis},
};
use karez_net::peer::{Answer, Peer, PeerError, PeerEvent, Verdict};
use karez_proto::control as wire;
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::{
    sync::{Semaphore, mpsc},
    time::{Instant, MissedTickBehavior, interval},
};

/// Other schedulers remembered.
const SCHEDULERS_MAX: usize = 256;
/// A summary is believed this long.
const SUMMARY_TTL: Millis = Millis(90_000);
/// How far ahead of our clock a summary may be dated.
const CLOCK_SKEW_MAX: Millis = Millis(300_000);
/// Offers being judged at a time; further ones hear "busy".
const OFFERS_MAX: usize = 256;
/// Changes are gossiped at once, but not more often than this.
const SUMMARY_GAP: Duration = Duration::from_secs(2);

/// What the other schedulers said last.
#[derive(Default)]
pub(crate) struct Book(Mutex<BTreeMap<PublicKey, Heard>>);

struct Heard {
    summary: Verified<Summary>,
    at: Now,
}

impl Book {
    /// Believes a summary, or says what to do with it.
    fn hear(&self, now: Now, summary: Verified<Summary>) -> Verdict {
        let key = summary.scheduler.0;
        if summary.issued_at > now.utc.after(CLOCK_SKEW_MAX) {
            return Verdict::Ignore;
        }
        let mut book = lock(&self.0);
        book.retain(|_, heard| now.mono.since(heard.at.mono) < SUMMARY_TTL);
        match book.get(&key) {
            // Gossip takes several ways, and an honest peer may pass on what we heard sooner over another.
            Some(known) if known.summary.sequence >= summary.sequence => return Verdict::Ignore,
            None if book.len() >= SCHEDULERS_MAX => return Verdict::Ignore,
            _ => {}
        }
        book.insert(key, Heard { summary, at: now });
        Verdict::Accept
    }

    /// Where the schedulers heard of lately can be called.
    pub(crate) fn control_addrs(&self, now: Now) -> Vec<(PublicKey, String)> {
        let book = lock(&self.0);
        book.iter()
            .filter(|(_, heard)| now.mono.since(heard.at.mono) < SUMMARY_TTL)
            .filter_map(|(key, heard)| Some((*key, heard.summary.addrs.first()?.clone())))
            .collect()
    }

    /// The schedulers heard of lately.
    pub(crate) fn views(&self, now: Now) -> Vec<wire::SchedulerView> {
        let book = lock(&self.0);
        let recent = book
            .iter()
            .filter(|(_, heard)| now.mono.since(heard.at.mono) < SUMMARY_TTL);
        recent
            .map(|(key, heard)| wire::SchedulerView {
                scheduler: key.0.to_vec(),
                nodes: heard
                    .summary
                    .classes
                    .iter()
                    .fold(0, |sum, c| sum.saturating_add(c.nodes)),
                free: heard
                    .summary
                    .classes
                    .iter()
                    .fold(0, |sum, c| sum.saturating_add(c.free)),
                heard_at: heard.at.utc.0,
            })
            .collect()
    }
}

/// Judges what the network brings, until the daemon stops.
pub(crate) async fn listen(shared: Arc<Shared>, mut events: mpsc::Receiver<PeerEvent>) {
    let room = Arc::new(Semaphore::new(OFFERS_MAX));
    loop {
        let event = tokio::select! {
            event = events.recv() => event,
            () = shared.stopped() => return,
        };
        match event {
            None => return,
            Some(PeerEvent::Offer { from, bytes, answer }) => {
                // Dropping the answer says "busy".
                let Ok(permit) = room.clone().try_acquire_owned() else {
                    continue;
                };
                let shared = shared.clone();
                tokio::spawn(async move {
                    let _permit = permit;
                    if let Some(judged) = judge(&shared, from, &bytes).await {
                        let _ = answer.send(judged);
                    }
                });
            }
            Some(PeerEvent::Summary { from, bytes, verdict }) => {
                let judged = match Signed::<Summary>::open(&bytes) {
                    Ok(summary) if summary.scheduler.0 == shared.id => Verdict::Ignore,
                    Ok(summary) if summary.scheduler.0 == from => {
                        shared.peers.hear(shared.clock.now(), summary)
                    }
                    Ok(_) => Verdict::Reject,
                    Err(error) => {
                        tracing::debug!(from = %from.short(), %error, "a summary was rejected");
                        Verdict::Reject
                    }
                };
                let _ = verdict.send(judged);
            }
            Some(PeerEvent::SchedulerFound(found)) => {
                tracing::debug!(scheduler = %found.key.short(), addrs = found.addrs.len(), "found a scheduler");
            }
        }
    }
}

async fn judge(shared: &Shared, from: PublicKey, bytes: &[u8]) -> Option<Answer> {
    match Signed::<Offer>::open(bytes) {
        Ok(offer) => match shared
            .ask(move |request| Event::Offer { request, from, offer })
            .await?
        {
            Reply::OfferTaken => {
                // Where admission is open, the offer may have made it a member.
                shared.members.admit(from, Role::Node);
                Some(Answer::Accepted {
                    control_addr: shared.config.control.advertise.clone(),
                })
            }
            Reply::Refused(denial) => {
                tracing::info!(node = %from.short(), %denial, "an offer was refused");
                Some(Answer::Refused {
                    reason: denial.to_string(),
                })
            }
            _ => None,
        },
        Err(error) => {
            shared.count_refused_offer().await;
            let error: RecordError = error;
            tracing::info!(node = %from.short(), %error, "an offer was refused");
            Some(Answer::Refused {
                reason: error.to_string(),
            })
        }
    }
}

/// Tells the other schedulers what can be placed here: at intervals, and soon after it changed.
pub(crate) async fn announce(shared: Arc<Shared>, peer: Peer) {
    let every = Duration::from_millis(shared.config.timing.summary_every.0);
    let mut tick = interval(SUMMARY_GAP.min(every));
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let addrs = vec![shared.config.control.advertise.clone()];
    let mut last: Option<(Vec<karez_core::records::ClassSummary>, u64, Instant)> = None;
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            () = shared.stopped() => return,
        }
        let now = shared.clock.now();
        let (entries, head) = shared.writer.head();
        // Rises over restarts as well, as long as the clock does.
        let UtcMillis(sequence) = now.utc;
        let summary = shared
            .look(|c| c.summary(now, sequence, entries, head, addrs.clone()))
            .await;
        let news = last.as_ref().is_none_or(|(classes, known, at)| {
            at.elapsed() >= every || *known != entries || *classes != summary.classes
        });
        if !news {
            continue;
        }
        match peer.publish_summary(summary.encode()).await {
            Ok(()) | Err(PeerError::Alone) => {}
            Err(PeerError::Stopped) => return,
            Err(error) => tracing::debug!(%error, "a summary was not sent"),
        }
        last = Some((summary.into_inner().classes, entries, Instant::now()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use karez_core::{
        id::Digest,
        key::{SchedulerId, SecretKey},
        unit::MonoMillis,
    };

    fn summary(secret: &SecretKey, sequence: u64, issued_at: u64) -> Verified<Summary> {
        let summary = Summary {
            scheduler: SchedulerId(PublicKey::of(secret)),
            classes: Vec::new(),
            ledger_entries: 0,
            ledger_head: Digest::of(b""),
            sequence,
            issued_at: UtcMillis(issued_at),
            addrs: Vec::new(),
        };
        Signed::sign(summary, secret)
    }

    fn at(ms: u64) -> Now {
        Now {
            utc: UtcMillis(1_000_000 + ms),
            mono: MonoMillis(ms),
        }
    }

    #[test]
    fn later_summaries_replace_earlier_ones_and_all_of_them_expire() {
        let book = Book::default();
        let secret = SecretKey::from_bytes(&[3; 32]);
        assert_eq!(book.hear(at(0), summary(&secret, 5, 1_000_000)), Verdict::Accept);
        assert_eq!(book.hear(at(1), summary(&secret, 5, 1_000_000)), Verdict::Ignore);
        assert_eq!(book.hear(at(1), summary(&secret, 4, 1_000_000)), Verdict::Ignore);
        assert_eq!(book.hear(at(2), summary(&secret, 6, 1_000_000)), Verdict::Accept);
        assert_eq!(
            book.hear(at(2), summary(&secret, 7, 9_000_000)),
            Verdict::Ignore,
            "from the future"
        );
        assert_eq!(book.views(at(3)).len(), 1);
        assert!(book.views(at(100_000)).is_empty());
    }

    #[test]
    fn strangers_cannot_fill_the_memory() {
        let book = Book::default();
        for n in 0..400u16 {
            let mut seed = [9; 32];
            seed[..2].copy_from_slice(&n.to_be_bytes());
            book.hear(at(0), summary(&SecretKey::from_bytes(&seed), 1, 1_000_000));
        }
        assert_eq!(book.views(at(1)).len(), SCHEDULERS_MAX);
    }
}
