//! Telling one scheduler the newest offer, over the peer network, until it has heard it.
use crate::wait::Backoff;
use karez_core::key::SchedulerId;
use karez_net::peer::{Answer, Peer};
use std::{sync::Arc, time::Duration};
use tokio::sync::watch;

/// So many failures to deliver an offer are not mentioned.
const QUIET_FAILURES: u32 = 3;

/// The newest offer: a signed envelope. None before the first.
pub(crate) type Newest = watch::Receiver<Option<Arc<Vec<u8>>>>;

/// Runs until the node ends. Only ever the newest offer is sent, once for each change of `newest`; `told` hears what
/// the scheduler says of it.
pub(crate) async fn advertise(
    peer: Peer,
    to: SchedulerId,
    mut newest: Newest,
    told: impl Fn(String) + Send + Sync + 'static,
) {
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(30));
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
            let Some(offer) = newest.borrow_and_update().clone() else {
                break;
            };
            match peer.advertise(to.0, offer.to_vec()).await {
                Ok(Answer::Accepted) => {
                    heard("accepted".into());
                    break;
                }
                // Sent again after a lost answer, or because a session began anew: it had it all along.
                Ok(Answer::Refused { reason }) if reason.contains("known already") => {
                    heard("accepted".into());
                    break;
                }
                // Saying the same thing again would not change its mind, unless it was merely busy.
                Ok(Answer::Refused { reason }) if !reason.contains("busy") => {
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
