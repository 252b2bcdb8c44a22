//! What people make of a ledger: usage in the forms that other systems read, statements, and netting.
//!
//! All of it is computed from verified entries ([`crate::verify::verify_each`]), by whoever has the file: nobody's
//! figures need to be believed. Users appear as pseudonyms, a new one for each institution and month ([`Pseudonyms`]).
//! Every field is described in `docs/accounting.md`.
mod forms;
mod netting;
pub mod reference;
mod settlement;
mod standing;
mod statement;
mod time;

pub use forms::{Form, Writer as FormWriter};
pub use netting::{Age, Netting, Transfer};
pub use settlement::{Pseudonyms, Settlement};
pub use standing::{Standing, StandingBuilder};
pub use statement::{Flow, Statement, StatementBuilder};
pub use time::{Month, MonthError};

use crate::{book::Entry, evidence::remains};
use karez_core::{
    fair::Work,
    id::Institution,
    money::{Posting, PostingKind},
    records::{CreditLimit, Floors, Signed, Verified},
    unit::Credits,
};

/// Of a verified entry that settles: what counts for sharing, whether its records are still there or not.
pub fn work(entry: &Entry) -> Option<Work> {
    if entry.posting.kind != PostingKind::Settle {
        return None;
    }
    let settled = remains(&entry.posting, &entry.gist)?;
    Some(Work {
        user: settled.user_institution,
        provider: settled.institution,
        credits: settled.credits,
        billed: settled.billed,
        at: entry.at,
    })
}

/// Of a verified posting that promises how institutions share: the constants.
pub fn floors(posting: &Posting) -> Option<Floors> {
    let bytes = posting
        .evidence
        .first()
        .filter(|_| posting.kind == PostingKind::Floors)?;
    Signed::<Floors>::open(bytes).ok().map(Verified::into_inner)
}

/// Of a verified posting that sets a credit limit: whose, and how much.
pub fn limit(posting: &Posting) -> Option<(Institution, Credits)> {
    let bytes = posting
        .evidence
        .first()
        .filter(|_| posting.kind == PostingKind::Limit)?;
    let limit = Signed::<CreditLimit>::open(bytes).ok()?;
    Some((limit.institution.clone(), limit.credits))
}
