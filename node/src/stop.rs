//! A word that travels from whoever wants something stopped to whatever runs.
use std::time::Duration;
use tokio::{sync::watch, time::Instant};

/// The side that says stop. Saying it again only ever shortens the grace.
#[derive(Debug)]
pub(crate) struct Stopper(watch::Sender<Option<Instant>>);

/// The side that listens. Clones hear the same word.
#[derive(Debug, Clone)]
pub(crate) struct Stopped(watch::Receiver<Option<Instant>>);

/// Both sides.
pub(crate) fn stop() -> (Stopper, Stopped) {
    let (tell, hear) = watch::channel(None);
    (Stopper(tell), Stopped(hear))
}

impl Stopper {
    /// Stop, and be gone within `grace`.
    pub(crate) fn stop(&self, grace: Duration) {
        let at = Instant::now() + grace;
        self.0.send_if_modified(|deadline| {
            let sooner = deadline.is_none_or(|d| at < d);
            if sooner {
                *deadline = Some(at);
            }
            sooner
        });
    }
}

impl Stopped {
    /// Whether the word was said.
    pub(crate) fn is_said(&self) -> bool {
        self.0.borrow().is_some()
    }

    /// Waits for the word; forever when it is never said.
    pub(crate) async fn said(&mut self) {
        if self.0.wait_for(Option::is_some).await.is_err() {
            std::future::pending().await
        }
    }

    /// Waits until the grace has passed, however often it is shortened; forever when the word is never said.
    pub(crate) async fn overdue(&mut self) {
        loop {
            let deadline = *self.0.borrow_and_update();
            let passed = async {
                match deadline {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = passed => return,
                changed = self.0.changed() => if changed.is_err() && deadline.is_none() {
                    std::future::pending().await
                } else if changed.is_err() {
                    // Nobody can shorten it any more.
                    if let Some(at) = deadline {
                        tokio::time::sleep_until(at).await;
                    }
                    return;
                },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_grace_can_only_shrink() {
        let (tell, mut hear) = stop();
        assert!(!hear.is_said());
        tell.stop(Duration::from_millis(50));
        tell.stop(Duration::from_secs(3600));
        hear.said().await;
        let began = Instant::now();
        hear.overdue().await;
        assert!(began.elapsed() < Duration::from_secs(5));
    }
}
