//! Nodes that lie about what they did. Every lie is properly signed with the liar's own key.
use crate::rng::Rng;
use karez_core::{
    exchange::{FinishedLease, ToScheduler},
    key::SecretKey,
    records::{Lease, MeterReading, Outcome, Signed, Usage, Verified},
    unit::{DeviceMillis, Rate},
};

/// How a node lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lie {
    /// It says it worked ten times as long.
    Longer,
    /// It says its lease was at three times the price.
    Dearer,
    /// It sends old usages again and again.
    Replay,
    /// It sends others' usages, and others' leases under its own name.
    Foreign,
    /// It leaves out part of the trail.
    Broken,
    /// It says it is done, without a result.
    Empty,
    /// It says failed work is done.
    Boast,
}

impl Lie {
    pub(crate) fn draw(rng: &mut Rng) -> Self {
        rng.pick(&[
            Self::Longer,
            Self::Dearer,
            Self::Replay,
            Self::Foreign,
            Self::Broken,
            Self::Empty,
            Self::Boast,
        ])
    }

    /// What leaves the liar in place of `message`.
    pub(crate) fn tell(
        self,
        rng: &mut Rng,
        secret: &SecretKey,
        message: ToScheduler,
        told: &[FinishedLease],
        stolen: Option<FinishedLease>,
    ) -> Vec<ToScheduler> {
        let finished = |f: FinishedLease| ToScheduler::Finished(Box::new(f));
        match (self, message) {
            (Self::Longer, ToScheduler::Finished(f)) => {
                let longer = resign(secret, &f, None, |usage| {
                    usage.meters.device_ms = DeviceMillis(usage.meters.device_ms.0 * 10 + 60_000);
                });
                vec![finished(longer)]
            }
            (Self::Dearer, ToScheduler::Granted(lease)) => {
                vec![ToScheduler::Granted(dearer(secret, &lease))]
            }
            (Self::Dearer, ToScheduler::Finished(f)) => {
                let lease = dearer(secret, &f.lease);
                vec![finished(resign(secret, &f, Some(lease), |_| {}))]
            }
            (Self::Replay, message) => {
                let mut out = vec![message];
                if !told.is_empty() && rng.chance(500) {
                    let at = rng.below(told.len() as u64) as usize;
                    out.push(finished(told[at].clone()));
                }
                out
            }
            (Self::Foreign, message) => {
                let mut out = vec![message];
                if let Some(stolen) = stolen {
                    out.push(finished(stolen.clone()));
                    let mut lease = stolen.lease.clone().into_inner();
                    lease.node = karez_core::key::NodeId(karez_core::key::PublicKey::of(secret));
                    let lease = Signed::sign(lease, secret);
                    out.push(ToScheduler::Granted(lease.clone()));
                    out.push(finished(resign(secret, &stolen, Some(lease), |_| {})));
                }
                out
            }
            (Self::Broken, ToScheduler::Finished(mut f)) => {
                f.readings.remove(0);
                vec![ToScheduler::Finished(f)]
            }
            (Self::Empty, ToScheduler::Finished(f)) => {
                vec![finished(resign(secret, &f, None, |usage| usage.result = None))]
            }
            (Self::Boast, ToScheduler::Finished(f)) => {
                vec![finished(resign(secret, &f, None, |usage| {
                    usage.outcome = Outcome::Done;
                    usage.cause.clear();
                }))]
            }
            (_, message) => vec![message],
        }
    }
}

fn dearer(secret: &SecretKey, lease: &Verified<Lease>) -> Verified<Lease> {
    let mut lease = lease.clone().into_inner();
    lease.rate = Rate(lease.rate.0 * 3 + 1);
    Signed::sign(lease, secret)
}

/// A trail in perfect order that says something else: one reading, and the usage after `change`.
fn resign(
    secret: &SecretKey,
    true_trail: &FinishedLease,
    lease: Option<Verified<Lease>>,
    change: impl FnOnce(&mut Usage),
) -> FinishedLease {
    let lease = lease.unwrap_or_else(|| true_trail.lease.clone());
    let mut usage = true_trail.usage.clone().into_inner();
    change(&mut usage);
    usage.lease = lease.id();
    usage.node = lease.node;
    let reading = MeterReading {
        lease: lease.id(),
        node: lease.node,
        sequence: 0,
        previous: None,
        meters: usage.meters,
        method: "wall+rusage/1".into(),
        taken_at: usage.ended_at,
        mono: karez_core::unit::MonoMillis(1),
        benchmark: None,
    };
    let reading = Signed::sign(reading, secret);
    usage.last_reading = reading.id();
    usage.readings = 1;
    FinishedLease {
        lease,
        readings: vec![reading],
        usage: Signed::sign(usage, secret),
    }
}
