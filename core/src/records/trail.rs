//! The paper trail of one lease: each record names the one before, and totals never fall.
use super::{Lease, MeterReading, Order, Usage, Verified};
use crate::id::RecordId;

/// Which rule of the trail a record breaks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("record {record}: {rule}")]
pub struct TrailError {
    /// The record that breaks it.
    pub record: RecordId,
    /// The rule.
    pub rule: &'static str,
}

/// Checks that lease, readings and usage belong together and follow from the order.
///
/// Signatures and fields were checked when each record became [`Verified`]; this checks what lies between them.
pub fn check_trail(
    order: &Verified<Order>,
    lease: &Verified<Lease>,
    readings: &[Verified<MeterReading>],
    usage: &Verified<Usage>,
) -> Result<(), TrailError> {
    let fail = |record: RecordId, rule| Err(TrailError { record, rule });
    if lease.job.0 != order.id() {
        return fail(lease.id(), "the lease names another order");
    }
    if lease.scheduler != order.scheduler {
        return fail(lease.id(), "the lease is for another scheduler than the order");
    }
    if lease
        .first_item
        .checked_add(lease.items)
        .is_none_or(|end| end > order.items)
    {
        return fail(lease.id(), "the lease covers items the order does not have");
    }
    let mut previous: Option<&Verified<MeterReading>> = None;
    for (i, reading) in readings.iter().enumerate() {
        if reading.lease != lease.id() || reading.node != lease.node {
            return fail(reading.id(), "the reading is of another lease or node");
        }
        if u32::try_from(i) != Ok(reading.sequence) {
            return fail(reading.id(), "the reading is out of sequence");
        }
        if reading.previous != previous.map(Verified::id) {
            return fail(reading.id(), "the reading does not name the one before");
        }
        if previous.is_some_and(|before| !reading.meters.grew_from(&before.meters)) {
            return fail(reading.id(), "a meter ran backwards");
        }
        previous = Some(reading);
    }
    if usage.lease != lease.id() || usage.node != lease.node {
        return fail(usage.id(), "the usage is of another lease or node");
    }
    let Some(last) = previous else {
        return fail(usage.id(), "the usage has no reading");
    };
    if usage.last_reading != last.id() || u32::try_from(readings.len()) != Ok(usage.readings) {
        return fail(usage.id(), "the usage does not name the last reading");
    }
    if usage.meters != last.meters {
        return fail(usage.id(), "the usage's meters are not the last reading's");
    }
    Ok(())
}
