//! A file on its way: what of it has arrived, kept over cuts and restarts.
use super::error::{StoreError, io_error};
use crate::verified::{BLOCK_BYTES, Batch, blocks_of, outboard_bytes};
use karez_core::id::Digest;
use std::{
    fs::{self, File, OpenOptions},
    io::{self, IoSlice},
    ops::Range,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// An unfinished file: sparse data, its outboard, and which blocks are there. Survives a restart.
#[derive(Debug)]
pub(crate) struct Partial {
    pub(super) digest: Digest,
    pub(super) bytes: u64,
    dir: PathBuf,
    data: File,
    tree: File,
    pub(super) map: Arc<SharedMap>,
}

/// Which blocks are here: one for each unfinished file, shared by all that write to it.
pub(super) type SharedMap = Mutex<BlockMap>;

#[derive(Debug)]
pub(super) struct BlockMap {
    bits: Vec<u8>,
    missing: u64,
    pub(super) unsaved: u64,
    saved_at: Instant,
}

const MAP_HEADER: &[u8; 8] = b"karezmap";
/// What was received is made durable, and the map saved, after so many bytes.
const SAVE_EVERY_BYTES: u64 = 1 << 30;
/// ... or after so long.
const SAVE_EVERY: Duration = Duration::from_secs(5);

impl BlockMap {
    /// The map in `dir`; of nothing where there is none, or where the files (`whole`) are not what it speaks of.
    fn read(dir: &Path, blocks: u64, whole: bool) -> Self {
        let bits = fs::read(dir.join("map"))
            .ok()
            .filter(|_| whole)
            .and_then(|map| map.strip_prefix(MAP_HEADER).map(<[u8]>::to_vec))
            .filter(|bits| bits.len() as u64 == blocks.div_ceil(8))
            .unwrap_or_else(|| vec![0; blocks.div_ceil(8) as usize]);
        let there = (0..blocks).filter(|b| bit(&bits, *b)).count() as u64;
        Self {
            bits,
            missing: blocks - there,
            unsaved: 0,
            saved_at: Instant::now(),
        }
    }
}

impl Partial {
    /// Opens the files. Without a `map`, the one on disk tells what is there.
    pub(super) fn open(
        dir: &Path,
        digest: Digest,
        bytes: u64,
        map: Option<Arc<SharedMap>>,
    ) -> Result<Self, StoreError> {
        fs::create_dir_all(dir).map_err(io_error(dir))?;
        let open = |name: &str, length: u64| {
            let path = dir.join(name);
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&path)
                .map_err(io_error(&path))?;
            let before = file.metadata().map_err(io_error(&path))?.len();
            file.set_len(length).map_err(io_error(&path))?;
            Ok::<_, StoreError>((file, before == length))
        };
        let (data, data_whole) = open("data", bytes)?;
        let (tree, tree_whole) = open("tree", outboard_bytes(bytes))?;
        let whole = data_whole && tree_whole;
        let map = map.unwrap_or_else(|| Arc::new(Mutex::new(BlockMap::read(dir, blocks_of(bytes), whole))));
        Ok(Self {
            digest,
            bytes,
            dir: dir.to_owned(),
            data,
            tree,
            map,
        })
    }

    /// Counts its blocks in `map` from now on.
    pub(super) fn share(&mut self, map: Arc<SharedMap>) {
        self.map = map;
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, BlockMap> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn digest(&self) -> Digest {
        self.digest
    }

    /// Runs of blocks `within` a range that are not here yet, in order, none longer than `blocks_max`.
    pub(crate) fn missing(&self, within: Range<u64>, blocks_max: u64) -> Vec<Range<u64>> {
        let map = self.lock();
        let mut runs: Vec<Range<u64>> = Vec::new();
        for block in within.start..within.end.min(blocks_of(self.bytes)) {
            if bit(&map.bits, block) {
                continue;
            }
            match runs.last_mut() {
                Some(run) if run.end == block && run.end - run.start < blocks_max => run.end += 1,
                _ => runs.push(block..block + 1),
            }
        }
        runs
    }

    /// Bytes that are here.
    pub(crate) fn present(&self) -> u64 {
        let map = self.lock();
        let blocks = blocks_of(self.bytes);
        let last = self.bytes - (blocks - 1) * BLOCK_BYTES;
        let whole = (blocks - map.missing) * BLOCK_BYTES;
        if bit(&map.bits, blocks - 1) {
            whole - BLOCK_BYTES + last
        } else {
            whole
        }
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.lock().missing == 0
    }

    /// Writes a verified batch, which is one block.
    pub(crate) fn write(&self, batch: &Batch, encoded: &[u8]) -> Result<(), StoreError> {
        let data_path = || self.dir.join("data");
        let Some((first, _)) = batch.groups.first() else {
            return Ok(());
        };
        let slices: Vec<_> = batch
            .groups
            .iter()
            .map(|(_, at)| IoSlice::new(&encoded[at.clone()]))
            .collect();
        write_all_vectored_at(&self.data, slices, *first).map_err(|e| io_error(&data_path())(e))?;
        // Pairs follow each other in the outboard except where a subtree was skipped.
        let mut run: (u64, Vec<u8>) = (0, Vec::new());
        for (offset, at) in &batch.pairs {
            if run.0 + run.1.len() as u64 != *offset {
                self.tree
                    .write_all_at(&run.1, run.0)
                    .map_err(|e| io_error(&self.dir)(e))?;
                run = (*offset, Vec::with_capacity(1024));
            }
            run.1.extend_from_slice(&encoded[at.clone()]);
        }
        self.tree
            .write_all_at(&run.1, run.0)
            .map_err(|e| io_error(&self.dir)(e))?;
        let block = first / BLOCK_BYTES;
        let mut map = self.lock();
        if !bit(&map.bits, block) {
            map.bits[(block / 8) as usize] |= 1 << (block % 8);
            map.missing -= 1;
            map.unsaved += BLOCK_BYTES;
        }
        Ok(())
    }

    /// Whether enough has arrived, or enough time passed, since the last [`Partial::save`].
    pub(crate) fn wants_save(&self) -> bool {
        let map = self.lock();
        map.unsaved >= SAVE_EVERY_BYTES || (map.unsaved > 0 && map.saved_at.elapsed() >= SAVE_EVERY)
    }

    pub(super) fn sync(&self) -> Result<(), StoreError> {
        self.data
            .sync_data()
            .and_then(|()| self.tree.sync_data())
            .map_err(io_error(&self.dir))
    }

    /// Makes what has arrived durable, then says so in the map: never the other way round.
    pub(crate) fn save(&self) -> Result<(), StoreError> {
        let bits = {
            let mut map = self.lock();
            if map.unsaved == 0 {
                return Ok(());
            }
            map.unsaved = 0;
            map.saved_at = Instant::now();
            map.bits.clone()
        };
        if !self.dir.exists() {
            // Evicted, or finished by another transfer.
            return Ok(());
        }
        self.sync()?;
        let (part, path) = (self.dir.join("map.part"), self.dir.join("map"));
        fs::write(&part, [MAP_HEADER.as_slice(), &bits].concat())
            .and_then(|()| File::open(&part)?.sync_all())
            .and_then(|()| fs::rename(&part, &path))
            .map_err(io_error(&path))
    }
}

impl Drop for Partial {
    /// A transfer that is dropped in the middle keeps what it has.
    fn drop(&mut self) {
        if let Err(error) = self.save() {
            tracing::warn!(%error, "what arrived last will be fetched again");
        }
    }
}

fn bit(bits: &[u8], at: u64) -> bool {
    bits[(at / 8) as usize] & (1 << (at % 8)) != 0
}

fn write_all_vectored_at(file: &File, mut slices: Vec<IoSlice<'_>>, mut offset: u64) -> io::Result<()> {
    let mut rest = slices.as_mut_slice();
    while !rest.is_empty() {
        let written = rustix::io::pwritev(file, rest, offset)?;
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        offset += written as u64;
        IoSlice::advance_slices(&mut rest, written);
    }
    Ok(())
}
