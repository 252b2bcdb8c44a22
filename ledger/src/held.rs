//! Receipts that somebody holds, against a ledger that should have them all.
//!
//! A ledger can be sound in itself and still lack what its scheduler signed for. Whoever was given a receipt can tell:
//! nodes keep theirs in a file, one record a line in base64, and every one of a time before the export must be in it.
use crate::{book::Entry, evidence::receipt_of, verify::Summary};
use base64::{Engine, prelude::BASE64_STANDARD};
use karez_core::{
    id::{Institution, RecordId},
    key::SchedulerId,
    money::PostingKind,
    records::{Receipt, RecordError, Signed, Verified},
    unit::{Credits, UtcMillis},
};
use std::{collections::HashMap, io::BufRead, io::Read as _};

/// The most receipts that are held against a ledger at once; about 150 bytes each.
pub const HELD_MAX: usize = 2_000_000;
/// The longest line.
const LINE_BYTES_MAX: u64 = 8 << 10;
/// A receipt is signed a moment before its entry is on disk: an export of just then may lack it.
const MOMENT_MS: u64 = 5_000;

/// Why a file of receipts cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("line {line}: {why}")]
pub struct HeldError {
    /// Which line, from 1.
    pub line: u64,
    /// What is wrong with it.
    pub why: HeldFault,
}

/// What is wrong with a line.
#[derive(Debug, thiserror::Error)]
pub enum HeldFault {
    /// No base64, or too long.
    #[error("not a receipt in base64 of at most 8 KiB")]
    Form,
    /// Not a receipt, or not signed by its scheduler.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// More than anybody holds.
    #[error("there are more than {HELD_MAX} receipts: check fewer at a time")]
    TooMany,
    /// The file cannot be read.
    #[error("cannot read on: {0}")]
    Io(#[from] std::io::Error),
}

/// One that is held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldReceipt {
    /// Its id.
    pub id: RecordId,
    /// Who signed it.
    pub scheduler: SchedulerId,
    /// Who is paid.
    pub institution: Institution,
    /// How much.
    pub credits: Credits,
    /// When it was signed.
    pub issued_at: UtcMillis,
}

/// What came of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HeldSummary {
    /// Receipts that are in the ledger.
    pub found: u64,
    /// What they pay.
    pub credits: Credits,
    /// Signed after the export, or a moment before it: another export will tell.
    pub later: u64,
    /// Of other schedulers.
    pub others: u64,
    /// Signed by this scheduler, and not in its ledger; the oldest first.
    pub missing: Vec<HeldReceipt>,
}

/// Receipts that are looked for.
#[derive(Debug, Default)]
pub struct Held {
    wanted: HashMap<[u8; 16], HeldReceipt>,
    found: u64,
    credits: Credits,
}

impl Held {
    /// Takes the receipts of a file; each signature is checked. One that stands there twice counts once, and a line that a
    /// crash cut off is empty or an error like any other.
    pub fn read(&mut self, from: &mut dyn BufRead) -> Result<(), HeldError> {
        let mut number = 0;
        let mut line = Vec::new();
        loop {
            number += 1;
            let at = |why: HeldFault| HeldError { line: number, why };
            line.clear();
            let read = (&mut *from).take(LINE_BYTES_MAX + 1).read_until(b'\n', &mut line);
            if read.map_err(|e| at(e.into()))? == 0 {
                return Ok(());
            }
            if line.len() as u64 > LINE_BYTES_MAX {
                return Err(at(HeldFault::Form));
            }
            let text = line.trim_ascii();
            if text.is_empty() {
                continue;
            }
            let bytes = BASE64_STANDARD.decode(text).map_err(|_| at(HeldFault::Form))?;
            let receipt = Signed::<Receipt>::open(&bytes).map_err(|e| at(e.into()))?;
            if self.wanted.len() >= HELD_MAX {
                return Err(at(HeldFault::TooMany));
            }
            self.want(&receipt);
        }
    }

    /// Looks for this one too.
    pub fn want(&mut self, receipt: &Verified<Receipt>) {
        let id = receipt.id();
        let mut mark = [0; 16];
        mark.copy_from_slice(&id.0[..16]);
        let held = HeldReceipt {
            id,
            scheduler: receipt.scheduler,
            institution: receipt.node_institution.clone(),
            credits: receipt.credits,
            issued_at: receipt.issued_at,
        };
        self.wanted.insert(mark, held);
    }

    /// Takes the next entry, which was verified; also one whose records were dropped.
    pub fn see(&mut self, entry: &Entry) {
        if entry.posting.kind != PostingKind::Settle {
            return;
        }
        let known = receipt_of(&entry.gist).and_then(|mark| self.wanted.remove(&mark));
        if let Some(known) = known {
            self.found += 1;
            self.credits = self.credits.saturating_add(known.credits);
        }
    }

    /// What came of it, once the ledger was verified to its end.
    pub fn finish(self, ledger: &Summary) -> HeldSummary {
        let mut summary = HeldSummary {
            found: self.found,
            credits: self.credits,
            ..HeldSummary::default()
        };
        for held in self.wanted.into_values() {
            if held.scheduler != ledger.scheduler {
                summary.others += 1;
            } else if held.issued_at.0.saturating_add(MOMENT_MS) > ledger.created.0 {
                summary.later += 1;
            } else {
                summary.missing.push(held);
            }
        }
        summary.missing.sort_by_key(|held| (held.issued_at, held.id));
        summary
    }
}
