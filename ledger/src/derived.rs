//! Two files that follow from the entries and make proofs quick: `tree` and `records`.
//!
//! ```text
//! dir/tree       the hashes of complete subtrees, 32 bytes each, in the order of tree::stored_at
//! dir/records    16 bytes of the id of each entry's last record (zeros for an entry without), by number
//! ```
//!
//! They are written after the journal and never synced: what a crash took is put back from the entries when the
//! directory is opened, and so is everything when a root does not come out as the book's.
use crate::{
    book::Entry,
    evidence::receipt_of,
    recovery::PAGE_ENTRIES,
    store::{Store, StoreError},
    tree::{Frontier, Subtrees, TreeHash, entry_leaf, root, stored_at, stored_count},
};
use karez_core::{
    id::{Digest, RecordId},
    money::{Account, PostingKind},
    records::describe,
};
use std::{
    fs::{File, OpenOptions},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

/// Bytes of an id that are kept: a search for fewer may find several.
pub(crate) const ID: usize = 16;
/// Bytes read at a time in a search.
const WINDOW: usize = 1 << 20;

/// Both files, open.
#[derive(Debug)]
pub(crate) struct Derived {
    tree: File,
    records: File,
    path: PathBuf,
}

/// What one entry adds.
#[derive(Debug, Default)]
pub(crate) struct Added {
    tree: Vec<u8>,
    records: Vec<u8>,
}

impl Added {
    /// Takes the next entry; `frontier` is the tree before it, and afterwards the one with it.
    pub(crate) fn push(&mut self, frontier: &mut Frontier, hash: &Digest, record: [u8; ID]) {
        let tree = &mut self.tree;
        frontier.push_each(entry_leaf(hash), &mut |node| tree.extend_from_slice(&node.0));
        self.records.extend_from_slice(&record);
    }

    pub(crate) fn clear(&mut self) {
        self.tree.clear();
        self.records.clear();
    }
}

/// By which record an entry is found: the beginning of its last one's id, zeros for none.
pub(crate) fn record_id(entry: &Entry) -> [u8; ID] {
    let mut out = [0; ID];
    match (entry.posting.kind, entry.posting.legs.as_slice()) {
        // A receipt's id begins in the gist, and an order's is the job's: both are there when the records are not.
        (PostingKind::Settle, _) => out = receipt_of(&entry.gist).unwrap_or(out),
        (PostingKind::Reserve, [.., (Account::Escrow(job), _)]) => out.copy_from_slice(&job.0.0[..ID]),
        _ => {
            let last = entry.posting.evidence.last().and_then(|bytes| describe(bytes));
            if let Some((_, id, _)) = last {
                out.copy_from_slice(&id.0[..ID]);
            }
        }
    }
    out
}

impl Derived {
    /// Opens both files and makes them fit the tree of the book, reading the entries anew from `index` where they do
    /// not. Says whether something had to be repaired.
    pub(crate) fn open(dir: &Path, book: &Frontier, index: &dyn Store) -> Result<(Self, bool), StoreError> {
        let open = |name: &str| {
            let path = dir.join(name);
            OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)
                .map_err(|e| StoreError::io(&path, "open it", &e))
        };
        let derived = Self {
            tree: open("tree")?,
            records: open("records")?,
            path: dir.to_owned(),
        };
        let whole = derived.length()? >= book.size()
            && root(&derived, book.size()).is_ok_and(|found| found == book.root());
        if whole {
            derived.cut(book.size())?;
            return Ok((derived, false));
        }
        let fresh = derived.length()? == 0;
        derived.cut(0)?;
        let mut frontier = Frontier::default();
        let mut added = Added::default();
        loop {
            let from = frontier.size();
            let page = index.entries(from, PAGE_ENTRIES)?;
            for bytes in &page {
                let entry = Entry::decode(bytes).map_err(|e| StoreError::Index {
                    path: dir.to_owned(),
                    why: format!("entry {}: {e}", frontier.size()),
                })?;
                added.push(&mut frontier, &entry.hash(), record_id(&entry));
            }
            derived.write(from, &added)?;
            added.clear();
            if page.len() < PAGE_ENTRIES {
                break;
            }
        }
        Ok((derived, !fresh))
    }

    fn io(&self, e: &std::io::Error) -> StoreError {
        StoreError::io(&self.path, "use the files of the tree", e)
    }

    /// Entries that both files hold.
    fn length(&self) -> Result<u64, StoreError> {
        let len = |file: &File| file.metadata().map(|m| m.len()).map_err(|e| self.io(&e));
        let (hashes, records) = (len(&self.tree)? / 32, len(&self.records)? / ID as u64);
        // A tree of n leaves has under 2n hashes: start there and go down to what is whole.
        let mut entries = records.min(hashes);
        while entries > 0 && stored_count(entries) > hashes {
            entries -= (stored_count(entries) - hashes).div_ceil(2).max(1);
        }
        Ok(entries)
    }

    fn cut(&self, entries: u64) -> Result<(), StoreError> {
        self.tree
            .set_len(stored_count(entries) * 32)
            .and_then(|()| self.records.set_len(entries * ID as u64))
            .map_err(|e| self.io(&e))
    }

    /// Writes what entries from number `from` on add.
    pub(crate) fn write(&self, from: u64, added: &Added) -> Result<(), StoreError> {
        self.tree
            .write_all_at(&added.tree, stored_count(from) * 32)
            .and_then(|()| self.records.write_all_at(&added.records, from * ID as u64))
            .map_err(|e| self.io(&e))
    }

    /// The entry whose last record has an id that begins like this, among the first `entries`, the newest first.
    /// `None` when there is none; only the first 16 bytes are compared.
    pub(crate) fn find(&self, id: &RecordId, entries: u64) -> Result<Option<u64>, StoreError> {
        let wanted = &id.0[..ID];
        let mut window = vec![0; WINDOW];
        let mut end = entries;
        while end > 0 {
            let start = end.saturating_sub((WINDOW / ID) as u64);
            let bytes = &mut window[..(end - start) as usize * ID];
            self.records
                .read_exact_at(bytes, start * ID as u64)
                .map_err(|e| self.io(&e))?;
            if let Some(at) = bytes.chunks_exact(ID).rposition(|found| found == wanted) {
                return Ok(Some(start + at as u64));
            }
            end = start;
        }
        Ok(None)
    }
}

impl Subtrees for Derived {
    type Error = StoreError;

    fn subtree(&self, level: u32, index: u64) -> Result<TreeHash, StoreError> {
        let mut hash = [0; 32];
        self.tree
            .read_exact_at(&mut hash, stored_at(level, index) * 32)
            .map_err(|e| self.io(&e))?;
        Ok(TreeHash(hash))
    }
}
