//! A journal: one append-only file of checksummed frames, and what a crash or a bad disk can do to it.
//!
//! ```text
//! frame = "KZJ1" len:u32 number:u64 crc:u32 payload[len]      (integers big-endian)
//! crc   = CRC-32 (IEEE) over len, number and payload
//! ```
//!
//! A frame counts once `Journal::append` returned: it was written and `sync_data` came back. Bytes after the last
//! whole frame are a *torn tail*, the remains of an append nobody was told about: opening cuts them off and reports
//! it. A bad frame with good frames behind it is *damage*: reported with its offset, and nothing is cut.
//!
//! Not here: what the frames mean.
use crate::store::StoreError;
use std::{
    fs::{File, OpenOptions},
    io::{self, Read},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

/// The largest payload of a frame, in bytes.
pub const FRAME_BYTES_MAX: usize = 16 << 20;

const MAGIC: [u8; 4] = *b"KZJ1";
const HEADER: usize = 20;

/// One frame as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What the writer numbered it.
    pub number: u64,
    /// Where it starts in the file.
    pub offset: u64,
    /// Its bytes.
    pub payload: Vec<u8>,
}

/// What opening a journal found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scan {
    /// Whole frames before any fault.
    pub frames: u64,
    /// Number of the last of them.
    pub last: Option<u64>,
    /// Bytes that were cut off the end, and where.
    pub torn: Option<Torn>,
    /// A bad frame with good ones behind it.
    pub damage: Option<Damage>,
}

/// The remains of an unfinished append.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Torn {
    /// Where the file now ends.
    pub offset: u64,
    /// How much was cut.
    pub bytes: u64,
}

/// Frames in the middle that cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Damage {
    /// Where the first bad frame starts.
    pub offset: u64,
    /// The highest number among the readable frames behind it.
    pub last_after: u64,
}

/// An open journal. Only its owner may write the file.
#[derive(Debug)]
pub struct Journal {
    file: File,
    path: PathBuf,
    bytes: u64,
    /// An append failed and its remains may still be in the file.
    unclean: bool,
}

/// Writes a frame into `out`.
pub(crate) fn encode_frame(out: &mut Vec<u8>, number: u64, payload: &[u8]) {
    // Callers keep payloads under FRAME_BYTES_MAX.
    let len = (payload.len() as u32).to_be_bytes();
    let number = number.to_be_bytes();
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&len);
    out.extend_from_slice(&number);
    out.extend_from_slice(&checksum(&len, &number, payload).to_be_bytes());
    out.extend_from_slice(payload);
}

fn checksum(len: &[u8], number: &[u8], payload: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(len);
    crc.update(number);
    crc.update(payload);
    crc.finalize()
}

/// Splits a header, or says that it is none.
fn read_header(header: &[u8; HEADER]) -> Option<(usize, u64, u32)> {
    let mut from = header.as_slice();
    let mut magic = [0; 4];
    let mut len = [0; 4];
    let mut number = [0; 8];
    let mut crc = [0; 4];
    from.read_exact(&mut magic).ok()?;
    from.read_exact(&mut len).ok()?;
    from.read_exact(&mut number).ok()?;
    from.read_exact(&mut crc).ok()?;
    let len = u32::from_be_bytes(len) as usize;
    (magic == MAGIC && len <= FRAME_BYTES_MAX).then_some((
        len,
        u64::from_be_bytes(number),
        u32::from_be_bytes(crc),
    ))
}

impl Journal {
    /// Opens or creates `path`, hands every whole frame to `each` in order, and cuts a torn tail.
    pub fn open(
        path: &Path,
        each: &mut dyn FnMut(Frame) -> Result<(), StoreError>,
    ) -> Result<(Self, Scan), StoreError> {
        Self::open_from(path, 0, each)
    }

    /// As [`Journal::open`], passing over the first `known` bytes, which were read before. All of the file is read
    /// when it is shorter.
    pub fn open_from(
        path: &Path,
        known: u64,
        each: &mut dyn FnMut(Frame) -> Result<(), StoreError>,
    ) -> Result<(Self, Scan), StoreError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(|e| StoreError::io(path, "open it", &e))?;
        let end = file
            .metadata()
            .map_err(|e| StoreError::io(path, "read its size", &e))?
            .len();
        let mut journal = Self {
            file,
            path: path.to_owned(),
            bytes: end,
            unclean: false,
        };
        let mut scan = Scan::default();
        let mut at = if known <= end { known } else { 0 };
        while at < end {
            let Some(frame) = journal.frame_at(at, end)? else {
                break;
            };
            at += (HEADER + frame.payload.len()) as u64;
            scan.frames += 1;
            scan.last = Some(frame.number);
            each(frame)?;
        }
        if at < end {
            match journal.last_after(at, end)? {
                Some(last_after) => {
                    scan.damage = Some(Damage {
                        offset: at,
                        last_after,
                    })
                }
                None => {
                    scan.torn = Some(Torn {
                        offset: at,
                        bytes: end - at,
                    });
                    journal.bytes = at;
                    journal.rewind()?;
                }
            }
        }
        Ok((journal, scan))
    }

    /// How long the file is.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Which file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends frames (made by the writer's encoder) and returns once they are on disk. On an error the file is as
    /// before.
    pub(crate) fn append(&mut self, frames: &[u8]) -> Result<(), StoreError> {
        if self.unclean {
            self.rewind()?;
        }
        let result = self
            .file
            .write_all_at(frames, self.bytes)
            .and_then(|()| self.file.sync_data());
        match result {
            Ok(()) => {
                self.bytes += frames.len() as u64;
                Ok(())
            }
            Err(error) => {
                self.unclean = true;
                // When even this fails, the next append tries again before it writes anything.
                let _ = self.rewind();
                Err(StoreError::write(
                    &self.path,
                    "append to it",
                    &error,
                    frames.len() as u64,
                ))
            }
        }
    }

    fn rewind(&mut self) -> Result<(), StoreError> {
        self.file
            .set_len(self.bytes)
            .and_then(|()| self.file.sync_data())
            .map_err(|e| StoreError::io(&self.path, "cut off its tail", &e))?;
        self.unclean = false;
        Ok(())
    }

    /// The frame that starts at `at`, if a whole one does.
    fn frame_at(&self, at: u64, end: u64) -> Result<Option<Frame>, StoreError> {
        let io = |e: io::Error| StoreError::io(&self.path, "read it", &e);
        let room = end.saturating_sub(at);
        if room < HEADER as u64 {
            return Ok(None);
        }
        let mut header = [0; HEADER];
        self.file.read_exact_at(&mut header, at).map_err(io)?;
        let Some((len, number, crc)) = read_header(&header) else {
            return Ok(None);
        };
        if room - (HEADER as u64) < len as u64 {
            return Ok(None);
        }
        let mut payload = vec![0; len];
        self.file
            .read_exact_at(&mut payload, at + HEADER as u64)
            .map_err(io)?;
        if checksum(&header[4..8], &header[8..16], &payload) != crc {
            return Ok(None);
        }
        Ok(Some(Frame {
            number,
            offset: at,
            payload,
        }))
    }

    /// The highest number of any whole frame behind a bad one.
    fn last_after(&self, bad: u64, end: u64) -> Result<Option<u64>, StoreError> {
        let mut last = None;
        let mut at = bad + 1;
        let mut window = vec![0; 1 << 20];
        while at + HEADER as u64 <= end {
            let len = window.len().min((end - at) as usize);
            self.file
                .read_exact_at(&mut window[..len], at)
                .map_err(|e| StoreError::io(&self.path, "read it", &e))?;
            let Some(found) = window[..len].windows(4).position(|four| four == MAGIC) else {
                // The last three bytes may begin a magic number.
                at += (len - 3) as u64;
                continue;
            };
            at += found as u64;
            at += match self.frame_at(at, end)? {
                Some(frame) => {
                    last = last.max(Some(frame.number));
                    (HEADER + frame.payload.len()) as u64
                }
                None => 1,
            };
        }
        Ok(last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(path: &Path) -> (Vec<(u64, Vec<u8>)>, Scan, u64) {
        let mut frames = Vec::new();
        let (journal, scan) = Journal::open(path, &mut |f| {
            frames.push((f.number, f.payload));
            Ok(())
        })
        .unwrap();
        (frames, scan, journal.bytes())
    }

    #[test]
    fn every_flipped_byte_and_every_cut_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let (mut journal, scan) = Journal::open(&path, &mut |_| Ok(())).unwrap();
        assert_eq!(scan, Scan::default());
        let payloads = [b"first".to_vec(), Vec::new(), vec![9; 300]];
        let mut starts = Vec::new();
        for (i, payload) in payloads.iter().enumerate() {
            starts.push(journal.bytes());
            let mut frame = Vec::new();
            encode_frame(&mut frame, i as u64 + 7, payload);
            journal.append(&frame).unwrap();
        }
        let end = journal.bytes();
        drop(journal);
        let whole = std::fs::read(&path).unwrap();
        let (frames, scan, _) = read(&path);
        assert_eq!(frames.len(), 3);
        assert_eq!(
            (scan.frames, scan.last, scan.torn, scan.damage),
            (3, Some(9), None, None)
        );

        for at in 0..whole.len() {
            let mut bad = whole.clone();
            bad[at] ^= 0x10;
            std::fs::write(&path, &bad).unwrap();
            let hit = starts.iter().filter(|s| **s <= at as u64).count() - 1;
            let (frames, scan, bytes) = read(&path);
            assert_eq!(frames.len(), hit, "byte {at}");
            if hit < 2 {
                let damage = Damage {
                    offset: starts[hit],
                    last_after: 9,
                };
                assert_eq!(
                    (scan.damage, scan.torn, bytes),
                    (Some(damage), None, end),
                    "byte {at}"
                );
            } else {
                // Nothing follows the last frame: it cannot be told from a torn one.
                assert_eq!((scan.damage, bytes), (None, starts[2]), "byte {at}");
                assert_eq!(scan.torn.map(|t| t.offset), Some(starts[2]));
            }
        }
        for cut in 0..whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let kept = starts.iter().filter(|s| **s <= cut as u64).count() - 1;
            let (frames, scan, bytes) = read(&path);
            assert_eq!((frames.len(), scan.damage), (kept, None), "cut at {cut}");
            assert_eq!(bytes, starts[kept]);
            assert_eq!(scan.torn.is_some(), bytes != cut as u64);
            assert_eq!(std::fs::metadata(&path).unwrap().len(), bytes);
        }
    }
}
