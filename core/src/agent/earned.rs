//! A scheduler's receipt, held against what the node itself promised and measured.
use super::mind::{Holding, Stage};
use crate::{
    prelude::*,
    records::{Flag, Outcome, Receipt},
    unit::Credits,
};

/// Is this the receipt of what this lease did, and does it bill what is due? Says what is wrong, otherwise.
pub(super) fn judge(holding: &Holding, receipt: &Receipt) -> Result<(), String> {
    let Stage::Ended(usage) = &holding.stage else {
        return Err("is of work that has not ended".into());
    };
    let lease = &holding.lease;
    let names = receipt.lease == lease.id()
        && receipt.usage == usage.id()
        && receipt.scheduler == lease.scheduler
        && receipt.node == lease.node;
    if !names {
        return Err("is of other work than this lease's".into());
    }
    if receipt.node_institution != lease.institution {
        return Err(format!(
            "pays {} instead of {}",
            receipt.node_institution, lease.institution
        ));
    }
    // What was called off meanwhile is not paid, though it was done.
    if usage.outcome != Outcome::Done || receipt.flags.contains(&Flag::NotDone) {
        return Ok(());
    }
    let due = receipt.due(usage.meters.device_ms, lease.device_ms_max);
    if receipt.billed != due {
        return Err(format!(
            "bills {} device-ms where {} are due",
            receipt.billed.0, due.0
        ));
    }
    let bill = lease.rate.bill(due).unwrap_or(Credits(u64::MAX));
    let cut = receipt.flags.contains(&Flag::CutToCeiling);
    if receipt.credits > bill || (receipt.credits < bill && !cut) {
        return Err(format!("pays {} credits where {bill} are due", receipt.credits));
    }
    Ok(())
}
