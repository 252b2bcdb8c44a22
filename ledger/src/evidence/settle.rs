//! What a settlement must prove: the whole trail of one lease, from the order to the receipt.
use super::{
    Origin, Settled,
    error::{EvidenceError, Rule},
    paper::Paper,
    shape, trail, two_legs,
};
use karez_core::{
    id::JobId,
    key::SchedulerId,
    money::{Account, Posting, PostingKind},
    records::{Flag, Lease, MeterReading, Order, Outcome, Receipt, SignatureCheck, Usage},
    unit::Credits,
};

pub(super) fn examine(
    posting: &Posting,
    scheduler: SchedulerId,
    by: &dyn SignatureCheck,
) -> Result<Settled, EvidenceError> {
    let Some((from @ Account::Escrow(_), to @ Account::Institution(_), moved)) = two_legs(posting) else {
        return Err(shape(PostingKind::Settle));
    };
    let [order, lease, readings @ .., usage, receipt] = posting.evidence.as_slice() else {
        return Err(shape(PostingKind::Settle));
    };
    if readings.is_empty() {
        return Err(shape(PostingKind::Settle));
    }
    let order: Paper<Order> = Paper::open(by, 0, order)?;
    order.same("scheduler", order.scheduler, "the ledger", scheduler)?;

    let lease: Paper<Lease> = Paper::open(by, 1, lease)?;
    lease.same("job", lease.job.0, "the order", order.id())?;
    lease.same("scheduler", lease.scheduler, "the order", order.scheduler)?;
    check_lease_limits(&order, &lease)?;

    let last = check_readings(by, &lease, readings)?;

    let usage: Paper<Usage> = Paper::open(by, 2 + readings.len(), usage)?;
    usage.same("lease", usage.lease, "the lease", lease.id())?;
    usage.same("node", usage.node, "the lease", lease.node)?;
    usage.same("last_reading", usage.last_reading, "the last reading", last.id())?;
    usage.same(
        "readings",
        u64::from(usage.readings),
        "the evidence",
        readings.len() as u64,
    )?;
    if usage.meters != last.meters {
        return usage.breaks(Rule::MetersDiffer);
    }

    let receipt: Paper<Receipt> = Paper::open(by, 3 + readings.len(), receipt)?;
    receipt.same("usage", receipt.usage, "the usage", usage.id())?;
    receipt.same("lease", receipt.lease, "the lease", lease.id())?;
    receipt.same("order", receipt.job.0, "the order", order.id())?;
    receipt.same("scheduler", receipt.scheduler, "the order", order.scheduler)?;
    receipt.same("node", receipt.node, "the lease", lease.node)?;
    receipt.same(
        "node_institution",
        &receipt.node_institution,
        "the lease",
        &lease.institution,
    )?;
    receipt.same("user", receipt.user, "the order", order.user)?;
    receipt.same(
        "user_institution",
        &receipt.user_institution,
        "the order",
        &order.institution,
    )?;
    check_bill(&lease, &usage, &receipt)?;
    receipt.account(from, Account::Escrow(JobId(order.id())))?;
    receipt.account(to, Account::Institution(lease.institution.clone()))?;
    if moved != receipt.credits {
        let says = receipt.credits;
        return receipt.breaks(Rule::Amount { moved, says });
    }
    let key = lease.key();
    Ok(Settled {
        job: key.job,
        lease: trail::lease_mark(&key),
        receipt: trail::beginning(&receipt.id()),
        part: (usage.outcome == Outcome::Done).then(|| trail::part_mark(&key)),
        origin: Some(Origin {
            key,
            receipt: receipt.id(),
            receipt_at: receipt.index,
        }),
        credits: receipt.credits,
        billed: receipt.billed,
        institution: lease.institution.clone(),
        user_institution: receipt.user_institution.clone(),
        device_class: lease.device_class.clone(),
        benchmark: last.benchmark.clone(),
    })
}

fn check_lease_limits(order: &Paper<Order>, lease: &Paper<Lease>) -> Result<(), EvidenceError> {
    let end = lease.first_item.saturating_add(lease.items);
    if end > order.items {
        return lease.breaks(Rule::Items {
            first: lease.first_item,
            end,
            items: order.items,
        });
    }
    let limits = &order.constraints;
    let allowed = if limits.donated_only {
        0
    } else {
        limits.rate_max.map_or(u64::MAX, |rate| rate.0)
    };
    if lease.rate.0 > allowed {
        let rate = lease.rate.0;
        return lease.breaks(Rule::Rate { rate, allowed });
    }
    Ok(())
}

fn check_readings(
    by: &dyn SignatureCheck,
    lease: &Paper<Lease>,
    readings: &[Vec<u8>],
) -> Result<Paper<MeterReading>, EvidenceError> {
    let mut last: Option<Paper<MeterReading>> = None;
    for (i, bytes) in readings.iter().enumerate() {
        let reading: Paper<MeterReading> = Paper::open(by, 2 + i, bytes)?;
        reading.same("lease", reading.lease, "the lease", lease.id())?;
        reading.same("node", reading.node, "the lease", lease.node)?;
        let expected = i as u32;
        if reading.sequence != expected {
            let found = reading.sequence;
            return reading.breaks(Rule::Sequence { found, expected });
        }
        if reading.previous != last.as_ref().map(|before| before.id()) {
            return reading.breaks(Rule::Chain);
        }
        if last
            .as_ref()
            .is_some_and(|before| !reading.meters.grew_from(&before.meters))
        {
            return reading.breaks(Rule::MetersFell);
        }
        last = Some(reading);
    }
    last.ok_or_else(|| shape(PostingKind::Settle))
}

fn check_bill(
    lease: &Paper<Lease>,
    usage: &Paper<Usage>,
    receipt: &Paper<Receipt>,
) -> Result<(), EvidenceError> {
    let billed = receipt.billed.0;
    if billed > lease.device_ms_max.0 {
        let allowed = lease.device_ms_max.0;
        return receipt.breaks(Rule::OverLease { billed, allowed });
    }
    for (of, measured) in [
        ("the usage", usage.meters.device_ms.0),
        ("the observation", receipt.observed.0),
    ] {
        if billed > measured {
            return receipt.breaks(Rule::OverMeter { billed, of, measured });
        }
    }
    for (flag, due) in receipt.remarks(usage.meters.device_ms, lease.device_ms_max) {
        if receipt.flags.contains(&flag) != due {
            let flag = flag.as_str();
            return receipt.breaks(Rule::Remark { flag, due });
        }
    }
    let asked = receipt.credits;
    let failed = usage.outcome != Outcome::Done;
    if failed || receipt.flags.contains(&Flag::NotDone) {
        if asked > Credits::ZERO || billed > 0 {
            return receipt.breaks(Rule::NotDone { asked, billed });
        }
        if !receipt.flags.contains(&Flag::NotDone) {
            let flag = Flag::NotDone.as_str();
            return receipt.breaks(Rule::Remark { flag, due: true });
        }
        return Ok(());
    }
    // Nobody's books may be kept low either: the smaller of two figures, and nothing under it.
    let due = receipt.due(usage.meters.device_ms, lease.device_ms_max).0;
    if billed < due {
        return receipt.breaks(Rule::UnderMeter { billed, due });
    }
    let bill = lease.rate.bill(receipt.billed).unwrap_or(Credits(u64::MAX));
    let cut = receipt.flags.contains(&Flag::CutToCeiling);
    if asked > bill || (asked < bill && !cut) {
        return receipt.breaks(Rule::Bill { asked, bill });
    }
    Ok(())
}
