//! The index beside the journal: rows and entries by key, behind one trait.
//!
//! The journal is the truth: a transaction is committed when its frame is on disk there. The index receives it right
//! after, in one atomic step, and is made durable from time to time. It carries the number of the last transaction it
//! contains, so that opening hands it exactly what it misses; when it lost more than that, or is damaged, it is
//! rebuilt from the journal. The other way round, an intact index replaces a journal that went bad in the middle.
use crate::book::BookError;
pub use crate::change::{Change, Step};
use karez_core::key::SchedulerId;
use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// All tables: name → key → value.
pub type Table = BTreeMap<Vec<u8>, Vec<u8>>;

/// Named tables of keys and values, in memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tables(pub(crate) BTreeMap<String, Table>);

impl Tables {
    /// Every row of `table`, by key. Empty for a table that has none.
    pub fn rows(&self, table: &str) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.0
            .get(table)
            .into_iter()
            .flatten()
            .map(|(key, value)| (key.as_slice(), value.as_slice()))
    }

    /// Sets one row, in memory: for an index that collects its rows.
    pub fn put(&mut self, table: &str, key: Vec<u8>, value: Vec<u8>) {
        // Looked up by reference first: most rows fall into a table that is there.
        match self.0.get_mut(table) {
            Some(rows) => rows.insert(key, value),
            None => self.0.entry(table.to_owned()).or_default().insert(key, value),
        };
    }

    pub(crate) fn apply(&mut self, step: &Step) {
        match step {
            Step::Put { table, key, value } => {
                self.put(table, key.clone(), value.clone());
            }
            Step::Delete { table, key } => {
                if let Some(rows) = self.0.get_mut(table) {
                    rows.remove(key);
                    if rows.is_empty() {
                        self.0.remove(table);
                    }
                }
            }
            Step::Entry { .. } => {}
        }
    }

    /// Every row as a step that sets it.
    pub(crate) fn steps(&self) -> impl Iterator<Item = Step> {
        self.0.iter().flat_map(|(table, rows)| {
            rows.iter().map(move |(key, value)| Step::Put {
                table: table.clone(),
                key: key.clone(),
                value: value.clone(),
            })
        })
    }

    /// How many rows there are in all.
    pub(crate) fn count(&self) -> u64 {
        self.0.values().map(|rows| rows.len() as u64).sum()
    }

    /// One value.
    pub fn get(&self, table: &str, key: &[u8]) -> Option<&[u8]> {
        self.0.get(table)?.get(key).map(Vec::as_slice)
    }
}

/// Why something is not on disk, or could not be read from it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// The posting breaks a rule; nothing of its transaction happened.
    #[error("refused: {0}")]
    Refused(#[from] BookError),
    /// A table name, key or value is too long.
    #[error("table {table:?}: {what} is {bytes} bytes, the limit is {max}")]
    TooLarge {
        /// Which table.
        table: String,
        /// Name, key, value or transaction.
        what: &'static str,
        /// Its size.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// Not a name for a table.
    #[error("{table:?} cannot name a table: use 1 to 64 bytes without a zero")]
    TableName {
        /// What was given.
        table: String,
    },
    /// No room; nothing of the transaction happened.
    #[error("no room on the disk of {}: free at least {needed} bytes there; later commits will then work", path.display())]
    DiskFull {
        /// Where.
        path: PathBuf,
        /// How much is wanted.
        needed: u64,
    },
    /// Another process has the directory.
    #[error("{} is in use by another process: stop it, or choose another directory", path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// The operating system refused something.
    #[error("{}: cannot {doing}: {why}", path.display())]
    Io {
        /// On what.
        path: PathBuf,
        /// While doing what.
        doing: &'static str,
        /// What it said.
        why: String,
    },
    /// Both the journal and the index are damaged.
    #[error("{} is damaged at byte {offset} and the index cannot replace it ({why}): restore the directory from a backup", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// Where in it.
        offset: u64,
        /// Why not.
        why: String,
    },
    /// The index failed; commits go on, reading entries works again after it is rebuilt.
    #[error("the index in {} failed: {why}; it is being rebuilt", path.display())]
    Index {
        /// Where.
        path: PathBuf,
        /// What it said.
        why: String,
    },
    /// The directory keeps another scheduler's ledger.
    #[error("{} keeps the ledger of scheduler {found}: open it with that key, or choose another directory", path.display())]
    OtherLedger {
        /// The directory.
        path: PathBuf,
        /// Whose ledger it is.
        found: SchedulerId,
    },
    /// The writer has stopped.
    #[error("the writer has stopped; restart the daemon")]
    Stopped,
}

impl StoreError {
    pub(crate) fn io(path: &Path, doing: &'static str, error: &io::Error) -> Self {
        Self::write(path, doing, error, 1)
    }

    /// As an error of writing `bytes` bytes, which may be for want of room.
    pub(crate) fn write(path: &Path, doing: &'static str, error: &io::Error, bytes: u64) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::DiskFull {
                path: path.to_owned(),
                needed: bytes,
            },
            _ => Self::Io {
                path: path.to_owned(),
                doing,
                why: error.to_string(),
            },
        }
    }
}

/// What the writer needs of an index. All methods may block on the disk.
pub trait Store: Send + Sync {
    /// Applies all of `changes`, or nothing of them, and remembers the number of the last.
    fn apply(&self, changes: &[Change]) -> Result<(), StoreError>;
    /// Makes everything applied so far durable.
    fn sync(&self) -> Result<(), StoreError>;
    /// The number of the last change it contains; 0 when it is empty.
    fn applied(&self) -> Result<u64, StoreError>;
    /// All rows.
    fn tables(&self) -> Result<Tables, StoreError>;
    /// Encoded entries from number `from` on: at most `count`, fewer only at the end.
    fn entries(&self, from: u64, count: usize) -> Result<Vec<Vec<u8>>, StoreError>;
}

/// Opens or creates an index in a directory.
pub type OpenStore = fn(&Path) -> Result<Box<dyn Store>, StoreError>;

/// The index in sled: one tree, its keys prefixed by what they are.
#[derive(Debug)]
pub struct SledStore {
    db: sled::Db,
    path: PathBuf,
}

/// How long opening waits for sled's own threads to let go of a store that was just closed.
const LOCK_WAIT: Duration = Duration::from_secs(10);

const APPLIED: &[u8] = b"m/applied";

/// Entries of one batch lie together in values of about this size: a value of its own for each would cost sled five
/// times as much.
const PIECE_BYTES: usize = 8 << 10;

/// `e` and the number of the first entry of a piece: entries lie in order.
fn entry_key(seq: u64) -> [u8; 9] {
    let mut key = [b'e'; 9];
    key[1..].copy_from_slice(&seq.to_be_bytes());
    key
}

/// `t`, the table, a zero, the key. Names of tables hold no zero.
fn row_key(table: &str, key: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(2 + table.len() + key.len());
    out.push(b't');
    out.extend_from_slice(table.as_bytes());
    out.push(0);
    out.extend_from_slice(key);
    out
}

impl SledStore {
    /// As an [`OpenStore`]. May panic on a damaged directory: call it in a thread of its own.
    pub fn open(dir: &Path) -> Result<Box<dyn Store>, StoreError> {
        let config = sled::Config::new()
            .path(dir)
            .cache_capacity(64 << 20)
            // The writer says when.
            .flush_every_ms(None);
        // sled's own threads may hold the file for a moment after the last handle is gone. Whether another process has
        // the directory was settled before, by the writer's lock.
        let until = Instant::now() + LOCK_WAIT;
        let db = loop {
            match config.open() {
                Err(sled::Error::Io(e))
                    if e.to_string().contains("acquire lock") && Instant::now() < until =>
                {
                    std::thread::sleep(Duration::from_millis(10));
                }
                opened => break opened.map_err(|e| Self::fault(dir, &e))?,
            }
        };
        Ok(Box::new(Self {
            db,
            path: dir.to_owned(),
        }))
    }

    fn fault(path: &Path, error: &sled::Error) -> StoreError {
        StoreError::Index {
            path: path.to_owned(),
            why: error.to_string(),
        }
    }

    fn bad(&self, why: &str) -> StoreError {
        StoreError::Index {
            path: self.path.clone(),
            why: why.to_owned(),
        }
    }
}

impl Store for SledStore {
    fn apply(&self, changes: &[Change]) -> Result<(), StoreError> {
        let mut batch = sled::Batch::default();
        // Only the last word on a row counts.
        let mut rows: HashMap<(&str, &[u8]), Option<&[u8]>> = HashMap::new();
        let mut piece = Piece::default();
        for step in changes.iter().flat_map(|change| &change.steps) {
            match step {
                Step::Put { table, key, value } => {
                    rows.insert((table, key), Some(value));
                }
                Step::Delete { table, key } => {
                    rows.insert((table, key), None);
                }
                Step::Entry { seq, bytes } => piece.add(&mut batch, *seq, bytes),
            }
        }
        piece.end(&mut batch);
        for ((table, key), value) in rows {
            match value {
                Some(value) => batch.insert(row_key(table, key), value),
                None => batch.remove(row_key(table, key)),
            }
        }
        if let Some(last) = changes.last() {
            batch.insert(APPLIED, &last.number.to_be_bytes());
        }
        self.db
            .apply_batch(batch)
            .map_err(|e| Self::fault(&self.path, &e))
    }

    fn sync(&self) -> Result<(), StoreError> {
        self.db.flush().map_err(|e| Self::fault(&self.path, &e))?;
        // On Linux sled's own flush stops at the page cache's door: a power cut would lose what it reported done.
        let file = self.path.join("db");
        File::open(&file)
            .and_then(|f| f.sync_data())
            .map_err(|e| StoreError::io(&file, "sync it", &e))
    }

    fn applied(&self) -> Result<u64, StoreError> {
        match self.db.get(APPLIED).map_err(|e| Self::fault(&self.path, &e))? {
            None => Ok(0),
            Some(value) => value
                .as_ref()
                .try_into()
                .map(u64::from_be_bytes)
                .map_err(|_| self.bad("its counter is not a number")),
        }
    }

    fn tables(&self) -> Result<Tables, StoreError> {
        let mut tables = Tables::default();
        for row in self.db.scan_prefix(b"t") {
            let (name, value) = row.map_err(|e| Self::fault(&self.path, &e))?;
            let split = name.iter().position(|b| *b == 0);
            let (table, key) = split
                .and_then(|at| Some((std::str::from_utf8(name.get(1..at)?).ok()?, name.get(at + 1..)?)))
                .ok_or_else(|| self.bad("a row has no table"))?;
            tables.put(table, key.to_vec(), value.to_vec());
        }
        Ok(tables)
    }

    fn entries(&self, from: u64, count: usize) -> Result<Vec<Vec<u8>>, StoreError> {
        let fault = |e| Self::fault(&self.path, &e);
        // The piece that holds it begins at or before it.
        let before = self
            .db
            .range(entry_key(0)..=entry_key(from))
            .next_back()
            .transpose()
            .map_err(fault)?;
        let Some((start, _)) = before else {
            return Ok(Vec::new());
        };
        let mut out = Vec::new();
        for row in self.db.range(start..=sled::IVec::from(&entry_key(u64::MAX))) {
            let (key, piece) = row.map_err(fault)?;
            let bad = || self.bad("a piece of entries is not one");
            let mut seq = key
                .get(1..)
                .and_then(|n| n.try_into().ok())
                .map(u64::from_be_bytes)
                .ok_or_else(bad)?;
            let mut rest = piece.as_ref();
            while let Some((len, after)) = rest.split_first_chunk::<4>() {
                let len = u32::from_be_bytes(*len) as usize;
                let (entry, after) = after.split_at_checked(len).ok_or_else(bad)?;
                if seq >= from {
                    if out.len() == count {
                        return Ok(out);
                    }
                    // Numbers run on from piece to piece, or the index is not what it was.
                    if seq != from + out.len() as u64 {
                        return Err(self.bad("a piece of entries is missing"));
                    }
                    out.push(entry.to_vec());
                }
                rest = after;
                seq += 1;
            }
            if !rest.is_empty() {
                return Err(bad());
            }
        }
        Ok(out)
    }
}

/// Entries on their way into one value: each with its length before it.
#[derive(Default)]
struct Piece {
    first: u64,
    next: u64,
    bytes: Vec<u8>,
}

impl Piece {
    fn add(&mut self, batch: &mut sled::Batch, seq: u64, entry: &[u8]) {
        if self.bytes.len() >= PIECE_BYTES || seq != self.next {
            self.end(batch);
        }
        if self.bytes.is_empty() {
            self.first = seq;
        }
        // Entries are capped far below 32 bits.
        self.bytes.extend_from_slice(&(entry.len() as u32).to_be_bytes());
        self.bytes.extend_from_slice(entry);
        self.next = seq + 1;
    }

    fn end(&mut self, batch: &mut sled::Batch) {
        if !self.bytes.is_empty() {
            batch.insert(&entry_key(self.first), self.bytes.as_slice());
            self.bytes.clear();
        }
    }
}
