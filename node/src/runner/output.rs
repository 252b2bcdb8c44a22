//! The result of a lease on its way into the store: in memory while it is small, in a scratch file after that.
use karez_net::store::{ArtifactStore, Pin, StoreError};
use serde::Serialize;
use std::{
    fs::File,
    io::{self, Write},
    path::PathBuf,
};

/// Results up to this size never touch the scratch directory.
const MEMORY_MAX: usize = 256 << 10;

/// JSON lines in the making. The scratch file goes when this does.
#[derive(Debug)]
pub(super) struct Results {
    buffer: Vec<u8>,
    path: PathBuf,
    file: Option<File>,
    bytes: u64,
}

impl Results {
    /// `path` is where the lines go when they become many.
    pub(super) fn new(path: PathBuf) -> Self {
        Self {
            buffer: Vec::new(),
            path,
            file: None,
            bytes: 0,
        }
    }

    /// Adds one line. Writes to the page cache a quarter of a megabyte at a time, which does not wait for the disk.
    pub(super) fn line<T: Serialize>(&mut self, line: &T) -> io::Result<()> {
        let before = self.buffer.len();
        serde_json::to_writer(&mut self.buffer, line)?;
        self.buffer.push(b'\n');
        self.bytes += (self.buffer.len() - before) as u64;
        if self.buffer.len() >= MEMORY_MAX {
            self.spill()?;
        }
        Ok(())
    }

    /// Bytes of all lines.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// All of it, leaving nothing.
    pub(super) fn take(&mut self) -> Self {
        let empty = Self::new(self.path.clone());
        std::mem::replace(self, empty)
    }

    fn spill(&mut self) -> io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(File::create(&self.path)?),
        };
        file.write_all(&self.buffer)?;
        self.buffer.clear();
        Ok(())
    }

    /// Brings it into the store and pins it. Blocks on the disk.
    pub(super) fn keep(mut self, store: &ArtifactStore) -> Result<Pin, StoreError> {
        let artifact = if self.file.is_some() {
            self.spill().map_err(|error| StoreError::Io {
                path: self.path.clone(),
                error,
            })?;
            store.add_file(&self.path)?
        } else {
            store.add_bytes(&self.buffer)?
        };
        store.pin(&artifact)
    }
}

impl Drop for Results {
    fn drop(&mut self) {
        if self.file.is_some() {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
