//! `karez ledger forget`: the operator drops the detail of what is long over.
use crate::{
    cli::Context,
    fault::{Kind, fault},
    out::{count, plural},
};
use anyhow::{Context as _, Result};
use clap::Args;
use karez_core::key::{PublicKey, SchedulerId};
use karez_ledger::{StoreError, report::Month};
use serde_json::json;
use std::path::PathBuf;

#[derive(Debug, Args)]
pub(super) struct ForgetArgs {
    /// Drop what was posted before this month, as far as its jobs and windows are over
    #[arg(long, value_name = "YYYY-MM")]
    before: Month,
    /// The scheduler's directory [default: the one of `karez up`, else of this home]
    #[arg(long, value_name = "DIR")]
    scheduler: Option<PathBuf>,
}

pub(super) fn forget(context: &Context, args: &ForgetArgs) -> Result<()> {
    let home = context.home.dir();
    let dir = match &args.scheduler {
        Some(dir) => dir.clone(),
        None if home.join("up/scheduler").is_dir() => home.join("up/scheduler"),
        None => home.join("scheduler"),
    };
    let name = dir.display().to_string();
    let secret = karez_scheduler::setup::load_key(&dir).with_context(|| name.clone())?;
    let scheduler = SchedulerId(PublicKey::of(&secret));
    let books = karez_scheduler::setup::books(&dir);
    let now = super::file::now();
    let done = karez_ledger::forget(&books, scheduler, args.before.start(), now);
    let done = done.map_err(|error| match error {
        StoreError::InUse { .. } => fault(
            Kind::Refused,
            format!("{name}: its scheduler is running: stop it, forget, start it again"),
        ),
        other => fault(Kind::Refused, other.to_string()),
    })?;
    let out = context.out;
    done.report.iter().for_each(|repair| out.warn(repair));
    if out.json {
        out.json(&json!({"entries": done.entries, "bytes": done.bytes, "kept": done.kept}));
        return Ok(());
    }
    out.line(format!(
        "{}: the records of {} are gone ({})",
        books.display(),
        plural(done.entries, "entry"),
        crate::out::size(done.bytes)
    ));
    if done.kept > 0 {
        out.note(format!(
            "{} of before {} keep theirs: their job or their window is still open",
            count(done.kept),
            args.before
        ));
    }
    Ok(())
}
