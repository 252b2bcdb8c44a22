//! The moving itself: blocks from disk onto a stream, and from a stream through verification onto disk.
//!
//! Both directions overlap disk and hashing (on blocking threads) with the network. The sender does not hash.
use super::wire::{self, StreamError, read_full};
use crate::{
    store::{Partial, Served, StoreError},
    verified::{BLOCK_BYTES, Decoder, PAIR_BYTES, Piece, Walk, stream_bytes},
};
use karez_core::id::Digest;
use quinn::{RecvStream, SendStream};
use std::{
    fs::File,
    io::{self, IoSliceMut},
    ops::Range,
    os::unix::fs::FileExt,
    sync::Arc,
};
use tokio::task::{JoinHandle, spawn_blocking};

/// Blocks that the sender reads at once.
const READ_BLOCKS: usize = 4;
/// How much of the outboard is read ahead.
const PAIRS_AHEAD: usize = 64 * 1024;

/// Why receiving stopped.
#[derive(Debug)]
pub(super) enum ReceiveError {
    Stream(StreamError),
    /// The bytes are not those of the digest.
    Mismatch {
        at: u64,
    },
    Store(StoreError),
}

impl From<StreamError> for ReceiveError {
    fn from(error: StreamError) -> Self {
        Self::Stream(error)
    }
}

/// Sends the stream of `blocks`.
pub(super) async fn send_blocks(
    send: &mut SendStream,
    served: Served,
    blocks: Range<u64>,
) -> Result<(), StreamError> {
    let walk = Walk::new(served.bytes, blocks);
    let reader = Reader {
        served,
        walk,
        pairs: Vec::new(),
        pairs_at: 0,
    };
    let mut reading = spawn_blocking(move || reader.next());
    loop {
        let (reader, bytes) = joined(&mut reading).await??;
        if bytes.is_empty() {
            return Ok(());
        }
        reading = spawn_blocking(move || reader.next());
        wire::write_full(send, bytes).await?;
    }
}

async fn joined<T>(handle: &mut JoinHandle<T>) -> Result<T, io::Error> {
    handle.await.map_err(io::Error::other)
}

/// Reads a file and its outboard in the order of the stream.
struct Reader {
    served: Served,
    walk: Walk,
    /// Pairs come in rising order, so a window over the outboard only moves forward.
    pairs: Vec<u8>,
    pairs_at: u64,
}

impl Reader {
    /// The next megabyte or so; empty at the end.
    fn next(mut self) -> io::Result<(Self, bytes::Bytes)> {
        let mut pieces = Vec::new();
        for _ in 0..READ_BLOCKS {
            pieces.extend(self.walk.next_batch());
        }
        let mut out = vec![0; stream_bytes(&pieces) as usize];
        let mut rest = out.as_mut_slice();
        let mut groups = Vec::with_capacity(pieces.len());
        let mut first = None;
        for piece in pieces {
            match piece {
                Piece::Pair { number, .. } => {
                    let (place, tail) = rest.split_at_mut(PAIR_BYTES as usize);
                    place.copy_from_slice(self.pair(number)?);
                    rest = tail;
                }
                Piece::Group { first_byte, bytes } => {
                    let (place, tail) = rest.split_at_mut(bytes as usize);
                    first = first.or(Some(first_byte));
                    groups.push(IoSliceMut::new(place));
                    rest = tail;
                }
            }
        }
        if let Some(first) = first {
            read_scattered(&self.served.data, groups, first)?;
        }
        Ok((self, out.into()))
    }

    fn pair(&mut self, number: u64) -> io::Result<&[u8]> {
        let offset = number * PAIR_BYTES;
        let end = offset + PAIR_BYTES;
        if offset < self.pairs_at || end > self.pairs_at + self.pairs.len() as u64 {
            let tree = self.served.tree.as_ref().ok_or(io::ErrorKind::UnexpectedEof)?;
            self.pairs.resize(PAIRS_AHEAD, 0);
            let mut there = 0;
            while there < PAIRS_AHEAD {
                match tree.read_at(&mut self.pairs[there..], offset + there as u64)? {
                    0 => break,
                    n => there += n,
                }
            }
            self.pairs.truncate(there);
            self.pairs_at = offset;
        }
        let at = (offset - self.pairs_at) as usize;
        self.pairs
            .get(at..at + PAIR_BYTES as usize)
            .ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }
}

/// Reads consecutive bytes of `file` into the scattered places with one call.
fn read_scattered(file: &File, mut places: Vec<IoSliceMut<'_>>, mut offset: u64) -> io::Result<()> {
    let mut rest = places.as_mut_slice();
    // Places of no bytes (an empty file) are done already.
    IoSliceMut::advance_slices(&mut rest, 0);
    while !rest.is_empty() {
        let n = rustix::io::preadv(file, rest, offset)?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        offset += n as u64;
        IoSliceMut::advance_slices(&mut rest, n);
    }
    Ok(())
}

/// What arrives where.
pub(super) struct Expected {
    pub(super) digest: Digest,
    pub(super) bytes: u64,
    pub(super) blocks: Range<u64>,
}

/// Receives blocks onto disk; `on_block` hears the size of each that was verified and written.
pub(super) async fn receive_blocks(
    recv: &mut RecvStream,
    partial: &Arc<Partial>,
    expected: Expected,
    on_block: &(dyn Fn(u64) + Sync),
) -> Result<(), ReceiveError> {
    let Expected {
        digest,
        bytes,
        blocks,
    } = expected;
    let mut walk = Walk::new(bytes, blocks.clone());
    let mut idle = Some((Decoder::new(digest, bytes, blocks), Vec::new()));
    let mut keeping: Option<Keeping> = None;
    let mut result = Ok(());
    let mut buffer = Vec::new();
    loop {
        let length = stream_bytes(&walk.next_batch()) as usize;
        if length == 0 {
            break;
        }
        buffer.resize(length, 0);
        // While this block arrives, the one before is hashed and written.
        result = read_full(recv, &mut buffer).await;
        if let Some(keeping) = keeping.take() {
            idle = Some(kept(keeping, on_block).await?);
        }
        if result.is_err() {
            break;
        }
        let Some((mut decoder, spare)) = idle.take() else {
            break;
        };
        let encoded = std::mem::replace(&mut buffer, spare);
        let partial = partial.clone();
        keeping = Some(spawn_blocking(move || {
            let batch = decoder
                .take(&encoded)
                .map_err(|m| ReceiveError::Mismatch { at: m.at })?;
            let bytes = batch.groups.iter().map(|(_, at)| at.len() as u64).sum();
            partial.write(&batch, &encoded).map_err(ReceiveError::Store)?;
            if partial.wants_save() {
                partial.save().map_err(ReceiveError::Store)?;
            }
            Ok((decoder, encoded, bytes))
        }));
    }
    if let Some(keeping) = keeping.take() {
        kept(keeping, on_block).await?;
    }
    Ok(result?)
}

/// A block being hashed and written: gives back the decoder and the buffer, and says how much was kept.
type Keeping = JoinHandle<Result<(Decoder, Vec<u8>, u64), ReceiveError>>;

async fn kept(keeping: Keeping, on_block: &(dyn Fn(u64) + Sync)) -> Result<(Decoder, Vec<u8>), ReceiveError> {
    let (decoder, buffer, bytes) = keeping
        .await
        .map_err(|e| ReceiveError::Stream(StreamError::Lost(e.to_string())))??;
    on_block(bytes);
    Ok((decoder, buffer))
}

/// Receives a small file whole. `bytes` must have been bounded by the caller.
pub(super) async fn receive_whole(
    recv: &mut RecvStream,
    digest: Digest,
    bytes: u64,
) -> Result<Vec<u8>, ReceiveError> {
    let mut decoder = Decoder::new(digest, bytes, 0..u64::MAX);
    let mut out = Vec::with_capacity(bytes.min(BLOCK_BYTES) as usize);
    let mut buffer = Vec::new();
    while let Some(length) = decoder.next_len() {
        buffer.resize(length, 0);
        read_full(recv, &mut buffer).await?;
        let batch = decoder
            .take(&buffer)
            .map_err(|m| ReceiveError::Mismatch { at: m.at })?;
        for (_, at) in batch.groups {
            out.extend_from_slice(&buffer[at]);
        }
    }
    Ok(out)
}
