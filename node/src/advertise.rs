//! Telling schedulers the newest offer, over the peer network: those of the settings until they have heard it, and
//! those that are found, if the owner wants that, until they admit this node.
use crate::{config::is_host_port, daemon::Input, wait::Backoff};
use karez_core::key::SchedulerId;
use karez_net::peer::{Answer, Peer, PeerEvent};
use std::{collections::BTreeSet, sync::Arc, time::Duration};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::Instant,
};

/// The most schedulers beyond the settings that are ever asked for admission by one process.
const FOUND_MAX: usize = 32;

/// So many failures to deliver an offer are not mentioned.
const QUIET_FAILURES: u32 = 3;

/// Offers to one scheduler: so many at once, then one in so long. A little less than schedulers take from a peer.
const BURST: u32 = 16;
const EVERY: Duration = Duration::from_millis(250);

/// The newest offer: a signed envelope. None before the first.
pub(crate) type Newest = watch::Receiver<Option<Arc<Vec<u8>>>>;

/// Keeps to [`BURST`] and [`EVERY`]: a node with many short leases changes more often than its offer may be told.
struct Pace {
    /// When all that was sent would have been sent one in [`EVERY`].
    due: Instant,
}

impl Pace {
    /// How long to wait before one more may be sent.
    fn wait(&self, now: Instant) -> Duration {
        self.due.saturating_duration_since(now + EVERY * (BURST - 1))
    }

    fn sent(&mut self, now: Instant) {
        self.due = self.due.max(now) + EVERY;
    }
}

/// Runs until the node ends. Only ever the newest offer is sent, once for each change of `newest`; `told` hears what
/// the scheduler says of it.
pub(crate) async fn advertise(
    peer: Peer,
    to: SchedulerId,
    mut newest: Newest,
    told: impl Fn(String) + Send + Sync + 'static,
) {
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(30));
    let mut pace = Pace { due: Instant::now() };
    let mut said = String::new();
    let mut heard = move |text: String| {
        // The same trouble again is not news.
        if text != said {
            said.clone_from(&text);
            told(text);
        }
    };
    while newest.changed().await.is_ok() {
        backoff.reset();
        let mut failures = 0;
        loop {
            tokio::time::sleep(pace.wait(Instant::now())).await;
            let Some(offer) = newest.borrow_and_update().clone() else {
                break;
            };
            pace.sent(Instant::now());
            match peer.advertise(to.0, offer.to_vec()).await {
                Ok(Answer::Accepted { .. }) => {
                    heard("accepted".into());
                    break;
                }
                // Sent again after a lost answer, or because a session began anew: it had it all along.
                Ok(Answer::Refused { reason }) if reason.contains("known already") => {
                    heard("accepted".into());
                    break;
                }
                // Saying the same thing again would not change its mind, unless it was merely busy or hears too much.
                Ok(Answer::Refused { reason })
                    if !reason.contains("busy") && !reason.contains("slow down") =>
                {
                    heard(format!("refused: {reason}"));
                    break;
                }
                Ok(Answer::Refused { reason }) => heard(format!("not yet: {reason}")),
                // The first attempts may come before the connection: that is nobody's trouble yet.
                Err(_) if failures < QUIET_FAILURES => failures += 1,
                Err(error) => heard(format!("not delivered: {error}")),
            }
            tokio::select! {
                () = tokio::time::sleep(backoff.next()) => {}
                changed = newest.changed() => if changed.is_err() { return },
            }
        }
    }
}

/// Asks every scheduler that is found on the peer network, but those in `settings`, to admit this node; tells the
/// daemon of each that does. Runs until the peer network ends.
pub(crate) async fn find(
    peer: Peer,
    mut events: mpsc::Receiver<PeerEvent>,
    settings: BTreeSet<SchedulerId>,
    wanted: bool,
    newest: Newest,
    inputs: mpsc::Sender<Input>,
) {
    let mut asked = BTreeSet::new();
    let mut asking = JoinSet::new();
    while let Some(event) = events.recv().await {
        let PeerEvent::SchedulerFound(found) = event else {
            continue;
        };
        let to = SchedulerId(found.key);
        tracing::debug!(scheduler = %to.short(), wanted, "found on the peer network");
        let news = wanted && !settings.contains(&to) && asked.len() < FOUND_MAX && asked.insert(to);
        if news {
            asking.spawn(ask(peer.clone(), to, newest.clone(), inputs.clone()));
        }
        while asking.try_join_next().is_some() {}
    }
}

/// Sends the offer until the scheduler takes it and says where its control API is.
async fn ask(peer: Peer, to: SchedulerId, mut newest: Newest, inputs: mpsc::Sender<Input>) {
    let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(600));
    loop {
        let Ok(offer) = newest.wait_for(Option::is_some).await.map(|offer| offer.clone()) else {
            return;
        };
        let Some(offer) = offer else { continue };
        match peer.advertise(to.0, offer.to_vec()).await {
            Ok(Answer::Accepted { control_addr }) if is_host_port(&control_addr) => {
                let admitted = Input::Admitted {
                    scheduler: to,
                    control_addr,
                };
                // A daemon that ended needs no more schedulers.
                let _ = inputs.send(admitted).await;
                return;
            }
            Ok(answer) => {
                tracing::debug!(scheduler = %to.short(), ?answer, "a found scheduler does not admit this node")
            }
            Err(error) => {
                tracing::debug!(scheduler = %to.short(), %error, "a found scheduler does not answer")
            }
        }
        tokio::time::sleep(backoff.next()).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offers_are_told_at_a_pace_that_schedulers_take() {
        let start = Instant::now();
        let mut pace = Pace { due: start };
        for _ in 0..BURST {
            assert_eq!(pace.wait(start), Duration::ZERO);
            pace.sent(start);
        }
        // Then one at a time.
        assert_eq!(pace.wait(start), EVERY);
        let later = start + EVERY;
        assert_eq!(pace.wait(later), Duration::ZERO);
        pace.sent(later);
        assert_eq!(pace.wait(later), EVERY);
        // A rest gives back as many as at first and no more.
        let rested = start + EVERY * 1000;
        let sent = (0..100).take_while(|_| {
            let may = pace.wait(rested).is_zero();
            pace.sent(rested);
            may
        });
        assert_eq!(sent.count(), BURST as usize);
    }
}
