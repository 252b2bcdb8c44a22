//! A journal that went bad is replaced from the index, if that has everything.
use super::{
    Damaged, PAGE_ENTRIES, archive_path, generation_path,
    index::{in_thread, load},
    index_path,
    read::generations,
    write::{write_by_rename, write_generation},
};
use crate::{
    change::Base,
    journal::encode_frame,
    store::{OpenStore, StoreError},
};
use karez_core::key::SchedulerId;
use std::{fs, io::Write, path::Path};

/// Writes the journal anew from an index that has everything the journal is known to have held.
pub(super) fn replace_journal(
    dir: &Path,
    scheduler: Option<SchedulerId>,
    open_store: OpenStore,
    damaged: &Damaged,
    report: &mut Vec<String>,
) -> Result<(), StoreError> {
    let fail = |why: String| StoreError::Damaged {
        path: damaged.path.clone(),
        offset: damaged.offset,
        why,
    };
    let path = index_path(dir);
    if !path.exists() {
        return Err(fail("there is no index".into()));
    }
    let (applied, index) = in_thread(&path, || {
        let store = open_store(&path)?;
        let applied = store.applied()?;
        Ok((applied, load(dir, store, scheduler)?))
    })
    .map_err(|e| fail(e.to_string()))?;
    if applied < damaged.last || applied == 0 {
        return Err(fail(format!(
            "it ends at transaction {applied}, the journal reached {}",
            damaged.last
        )));
    }
    // The archive first: a generation may only be named when its entries are there.
    let archive = archive_path(dir);
    if archive.exists() {
        let aside = archive.with_extension("damaged");
        fs::rename(&archive, &aside).map_err(|e| StoreError::io(&archive, "set it aside", &e))?;
    }
    let mut failed = None;
    write_by_rename(dir, &archive, |out| {
        let mut seq = 0;
        let mut frame = Vec::new();
        while seq < index.book.entries() {
            let page = match index.store.entries(seq, PAGE_ENTRIES) {
                Ok(page) => page,
                Err(e) => {
                    failed = Some(e);
                    return Err(std::io::Error::other("the index cannot be read"));
                }
            };
            for bytes in page {
                frame.clear();
                encode_frame(&mut frame, seq, &bytes);
                out.write_all(&frame)?;
                seq += 1;
            }
        }
        Ok(())
    })
    .map_err(|e| failed.unwrap_or(e))?;
    let found = generations(dir)?;
    let next = found.last().map_or(1, |last| last + 1);
    let base = Base {
        scheduler: index.book.scheduler(),
        number: applied,
        entries: index.book.entries(),
        head: index.book.head(),
        rows: 0,
    };
    if let Some(last) = found.last() {
        let bad = generation_path(dir, *last);
        let aside = bad.with_extension("damaged");
        fs::copy(&bad, &aside).map_err(|e| StoreError::io(&bad, "set a copy of it aside", &e))?;
    }
    write_generation(dir, next, &base, &index.tables)?;
    report.push(format!(
        "{} was damaged at byte {}: replaced the journal from the index; the bad file is kept as *.damaged",
        damaged.path.display(),
        damaged.offset
    ));
    Ok(())
}
