//! Writing the journal anew: compaction, and everything that appears by rename once it is whole.
use super::{PIECE_BYTES, Truth, empty_book, generation_path, read::reread};
use crate::{
    change::{self, Base, Step},
    journal::encode_frame,
    store::{StoreError, Tables},
};
use karez_core::key::SchedulerId;
use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::Path,
};

/// Writes a generation's snapshot beside the others and names it once it is on disk.
pub(super) fn write_generation(
    dir: &Path,
    generation: u64,
    base: &Base,
    tables: &Tables,
) -> Result<(), StoreError> {
    let path = generation_path(dir, generation);
    let base = Base {
        rows: tables.count(),
        ..*base
    };
    write_by_rename(dir, &path, |out| {
        let mut frame = Vec::new();
        encode_frame(&mut frame, base.number, &change::encode_base(&base));
        let mut piece = Vec::new();
        let mut bytes = 0;
        let mut flush = |piece: &mut Vec<Step>, frame: &mut Vec<u8>| {
            if !piece.is_empty() {
                encode_frame(frame, base.number, &change::encode_rows(piece));
                piece.clear();
            }
            let written = out.write_all(frame);
            frame.clear();
            written
        };
        for step in tables.steps() {
            if let Step::Put { key, value, .. } = &step {
                bytes += key.len() + value.len();
            }
            piece.push(step);
            if bytes >= PIECE_BYTES {
                flush(&mut piece, &mut frame)?;
                bytes = 0;
            }
        }
        flush(&mut piece, &mut frame)
    })
}

pub(crate) fn write_by_rename(
    dir: &Path,
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> std::io::Result<()>,
) -> Result<(), StoreError> {
    let temporary = path.with_extension("tmp");
    let result = File::create(&temporary)
        .and_then(|file| {
            let mut out = BufWriter::with_capacity(PIECE_BYTES, file);
            write(&mut out)?;
            out.into_inner()
                .map_err(std::io::IntoInnerError::into_error)?
                .sync_all()
        })
        .and_then(|()| fs::rename(&temporary, path));
    if let Err(e) = result {
        // On a full disk the room it took is needed; what cannot be removed now goes at the next open.
        let _ = fs::remove_file(&temporary);
        return Err(StoreError::write(path, "write it", &e, PIECE_BYTES as u64));
    }
    sync_dir(dir)
}

pub(crate) fn sync_dir(dir: &Path) -> Result<(), StoreError> {
    File::open(dir)
        .and_then(|d| d.sync_all())
        .map_err(|e| StoreError::io(dir, "sync it", &e))
}

/// Compacts: the generation's entries go to the archive, its tables to the snapshot of the next generation.
///
/// `truth` must be fresh from the disk. The caller has synced the index before, so that the transactions left behind
/// are in it.
pub(crate) fn checkpoint(
    dir: &Path,
    scheduler: Option<SchedulerId>,
    truth: &mut Truth,
) -> Result<(), StoreError> {
    let mut frames = Vec::new();
    for change in &truth.changes {
        for step in &change.steps {
            let Step::Entry { seq, bytes } = step else {
                continue;
            };
            if *seq < truth.archived {
                continue;
            }
            encode_frame(&mut frames, *seq, bytes);
            truth.archived += 1;
            if frames.len() >= PIECE_BYTES {
                truth.archive.append(&frames)?;
                frames.clear();
            }
        }
    }
    if !frames.is_empty() {
        truth.archive.append(&frames)?;
    }
    let base = Base {
        scheduler,
        number: truth.number,
        entries: truth.entries,
        head: if truth.entries == 0 {
            empty_book(scheduler).head()
        } else {
            truth.head
        },
        rows: 0,
    };
    write_generation(dir, truth.generation + 1, &base, &truth.tables)?;
    // Also removes the old file, which its successor has made superfluous.
    *truth = reread(dir, scheduler, Some(truth.known_archive()))?;
    Ok(())
}

/// Has a later generation been named? Then nothing may be appended to `generation` any more.
pub(crate) fn superseded(dir: &Path, generation: u64) -> bool {
    generation_path(dir, generation + 1).exists()
}

/// Reads the truth anew and compacts it. For a writer that holds the directory.
pub(crate) fn compact(
    dir: &Path,
    scheduler: Option<SchedulerId>,
    archive: Option<(u64, u64)>,
) -> Result<Truth, StoreError> {
    let mut truth = reread(dir, scheduler, archive)?;
    checkpoint(dir, scheduler, &mut truth)?;
    Ok(truth)
}
