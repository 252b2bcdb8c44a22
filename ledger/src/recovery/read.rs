//! Reading the journal: its generations, the archive, and what is wrong with them.
use super::{
    Damaged, Read, Truth, archive_path, empty_book, generation_path, index_path, write::write_generation,
};
use crate::{
    book::hash_of,
    change::{self, Base, Change, Payload, Step},
    journal::Journal,
    store::{StoreError, Tables},
};
use karez_core::key::SchedulerId;
use std::{fs, path::Path};

pub(super) fn generations(dir: &Path) -> Result<Vec<u64>, StoreError> {
    let mut found = Vec::new();
    for item in fs::read_dir(dir).map_err(|e| StoreError::io(dir, "list it", &e))? {
        let item = item.map_err(|e| StoreError::io(dir, "list it", &e))?;
        let name = item.file_name();
        let Some(name) = name.to_str() else { continue };
        if name.ends_with(".tmp") || name.ends_with(".fresh") {
            // The remains of a compaction, or of records being dropped, that a crash interrupted.
            fs::remove_file(item.path()).map_err(|e| StoreError::io(&item.path(), "remove it", &e))?;
        } else if let Some(number) = name.strip_prefix("journal-").and_then(|n| n.parse().ok()) {
            found.push(number);
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// `archive`: its length and number of entries, where this process has read or written all of it before.
pub(super) fn read_journal(
    dir: &Path,
    scheduler: Option<SchedulerId>,
    archive: Option<(u64, u64)>,
    report: &mut Vec<String>,
) -> Result<Read, StoreError> {
    let mut found = generations(dir)?;
    let Some(generation) = found.pop() else {
        let lost = archive_path(dir).exists() || index_path(dir).exists();
        if lost {
            return Ok(Read::Damaged(Damaged {
                path: generation_path(dir, 1),
                offset: 0,
                last: 0,
            }));
        }
        let base = Base {
            scheduler,
            number: 0,
            entries: 0,
            head: empty_book(scheduler).head(),
            rows: 0,
        };
        write_generation(dir, 1, &base, &Tables::default())?;
        return read_journal(dir, scheduler, None, report);
    };
    let (known, mut archived) = archive.unwrap_or((0, 0));
    let mut archive_gap = None;
    let (archive, scan) = Journal::open_from(&archive_path(dir), known, &mut |frame| {
        if frame.number != archived && archive_gap.is_none() {
            archive_gap = Some(frame.offset);
        }
        archived += 1;
        Ok(())
    })?;
    let archive_bad = scan.damage.map(|d| d.offset).or(archive_gap);
    report_torn(report, &archive, &scan);

    let path = generation_path(dir, generation);
    let mut reader = GenerationReader::default();
    let (journal, scan) = Journal::open(&path, &mut |frame| {
        reader.frame(frame.number, frame.offset, &frame.payload);
        Ok(())
    })?;
    report_torn(report, &journal, &scan);
    let last = reader.number.max(scan.damage.map_or(0, |d| d.last_after));
    let damaged = |path: &Path, offset| {
        Ok(Read::Damaged(Damaged {
            path: path.to_owned(),
            offset,
            last,
        }))
    };
    if let Some(offset) = reader.bad.or(scan.damage.map(|d| d.offset)) {
        return damaged(&path, offset);
    }
    let Some(base) = reader.base else {
        return damaged(&path, 0);
    };
    // Hashing them all would cost more than reading them; that they follow each other is checked with the index.
    let last_entry = reader
        .changes
        .iter()
        .rev()
        .flat_map(|change| change.steps.iter().rev());
    let last_entry = last_entry.into_iter().find_map(|step| match step {
        Step::Entry { bytes, .. } => Some(bytes),
        _ => None,
    });
    let Some(head) = last_entry.map_or(Some(base.head), |bytes| hash_of(bytes)) else {
        return damaged(&path, journal.bytes());
    };
    if reader.rows < base.rows {
        // The snapshot was whole when it was named; what is missing now was lost later.
        return damaged(&path, journal.bytes());
    }
    if let Some(offset) = archive_bad {
        return damaged(&archive_path(dir), offset);
    }
    if archived < base.entries {
        return damaged(&archive_path(dir), archive.bytes());
    }
    for old in found {
        // Its successor was whole before it was named, and has just been read.
        let path = generation_path(dir, old);
        fs::remove_file(&path).map_err(|e| StoreError::io(&path, "remove it", &e))?;
    }
    Ok(Read::Good(Box::new(Truth {
        generation,
        journal,
        archive,
        archived,
        base,
        base_bytes: reader.base_bytes,
        tables: reader.tables,
        number: reader.number,
        entries: reader.entries,
        head,
        changes: reader.changes,
    })))
}

fn report_torn(report: &mut Vec<String>, journal: &Journal, scan: &crate::journal::Scan) {
    if let Some(torn) = scan.torn {
        report.push(format!(
            "{}: cut {} bytes of an unfinished append at byte {}",
            journal.path().display(),
            torn.bytes,
            torn.offset
        ));
    }
}

/// Puts a generation together from its frames.
#[derive(Default)]
struct GenerationReader {
    base: Option<Base>,
    rows: u64,
    base_bytes: u64,
    tables: Tables,
    changes: Vec<Change>,
    number: u64,
    entries: u64,
    /// Where a frame with a good checksum makes no sense.
    bad: Option<u64>,
}

impl GenerationReader {
    fn frame(&mut self, number: u64, offset: u64, payload: &[u8]) {
        if self.bad.is_some() {
            self.number = self.number.max(number);
        } else if self.take(number, payload).is_none() {
            self.bad = Some(offset);
        } else if self.changes.is_empty() {
            // A header of 20 bytes stands before each payload.
            self.base_bytes = offset + 20 + payload.len() as u64;
        }
    }

    fn take(&mut self, number: u64, payload: &[u8]) -> Option<()> {
        match (self.base, change::decode(payload)?) {
            (None, Payload::Base(base)) => {
                self.number = base.number;
                self.entries = base.entries;
                self.base = Some(base);
            }
            (Some(base), Payload::Rows(steps)) if number == base.number && self.changes.is_empty() => {
                self.rows += steps.len() as u64;
                steps.iter().for_each(|step| self.tables.apply(step));
            }
            (Some(base), Payload::Steps(steps)) if number == self.number + 1 && self.rows == base.rows => {
                for step in &steps {
                    self.tables.apply(step);
                    if let Step::Entry { seq, .. } = step {
                        if *seq != self.entries {
                            return None;
                        }
                        self.entries += 1;
                    }
                }
                self.number = number;
                self.changes.push(Change { number, steps });
            }
            _ => return None,
        }
        Some(())
    }
}

/// Reads what is on disk, for a writer that holds the directory.
pub(crate) fn reread(
    dir: &Path,
    scheduler: Option<SchedulerId>,
    archive: Option<(u64, u64)>,
) -> Result<Truth, StoreError> {
    match read_journal(dir, scheduler, archive, &mut Vec::new())? {
        Read::Good(truth) => Ok(*truth),
        Read::Damaged(damaged) => Err(damaged.error("it went bad while it was in use")),
    }
}
