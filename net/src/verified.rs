//! Verified streaming: a blob's BLAKE3 tree in groups of 16 KiB, its outboard, and the stream that proves ranges of it.
//!
//! The *outboard* of a blob holds the hash pair of every inner node above the groups, in pre-order, 64 bytes each. The
//! *stream* of a range is, in pre-order, the pair of every inner node that touches the range and the bytes of every
//! group inside it. Both are what `bao-tree` makes with 16 KiB chunk groups and a pre-order outboard; the tests compare.
//! Written here because moving data needs it in large batches: one read, one write and no copy for each
//! [`BLOCK_BYTES`], hashing only where the data is received.
use blake3::hazmat::{HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root};
use karez_core::id::Digest;
use std::{io, ops::Range};

/// The unit of verification.
pub(crate) const GROUP_BYTES: u64 = 16 * 1024;
/// The unit of keeping: what is received is written, and remembered across a cut, in blocks of this size.
pub(crate) const BLOCK_BYTES: u64 = 256 * 1024;
pub(crate) const BLOCK_GROUPS: u64 = BLOCK_BYTES / GROUP_BYTES;
pub(crate) const PAIR_BYTES: u64 = 64;
/// Subtrees up to this size are hashed in memory when an outboard is made.
const SUBTREE_GROUPS: u64 = 1024;

type Hash = [u8; 32];

pub(crate) fn groups_of(bytes: u64) -> u64 {
    bytes.div_ceil(GROUP_BYTES).max(1)
}

pub(crate) fn blocks_of(bytes: u64) -> u64 {
    bytes.div_ceil(BLOCK_BYTES).max(1)
}

pub(crate) fn outboard_bytes(bytes: u64) -> u64 {
    (groups_of(bytes) - 1) * PAIR_BYTES
}

/// The left child of a node over `groups` covers the largest power of two below it.
fn left_of(groups: u64) -> u64 {
    debug_assert!(groups > 1);
    1 << (u64::BITS - 1 - (groups - 1).leading_zeros())
}

fn group_hash(data: &[u8], first_byte: u64, root: bool) -> Hash {
    if root {
        *blake3::hash(data).as_bytes()
    } else {
        blake3::Hasher::new()
            .set_input_offset(first_byte)
            .update(data)
            .finalize_non_root()
    }
}

fn pair_hash(pair: &[u8; 64], root: bool) -> Hash {
    let (left, right) = halves(pair);
    if root {
        *merge_subtrees_root(&left, &right, Mode::Hash).as_bytes()
    } else {
        merge_subtrees_non_root(&left, &right, Mode::Hash)
    }
}

fn halves(pair: &[u8; 64]) -> (Hash, Hash) {
    let (mut left, mut right) = ([0; 32], [0; 32]);
    left.copy_from_slice(&pair[..32]);
    right.copy_from_slice(&pair[32..]);
    (left, right)
}

fn joined(left: Hash, right: Hash) -> [u8; 64] {
    let mut pair = [0; 64];
    pair[..32].copy_from_slice(&left);
    pair[32..].copy_from_slice(&right);
    pair
}

/// Reads `bytes` bytes in order through `fill` and hands the outboard's pieces to `save` with their offsets.
pub(crate) fn make_outboard(
    bytes: u64,
    fill: &mut dyn FnMut(&mut [u8]) -> io::Result<()>,
    save: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<Digest> {
    let top = Node {
        first: 0,
        groups: groups_of(bytes),
        pair: 0,
    };
    subtree(bytes, top, true, fill, save).map(Digest)
}

fn subtree(
    bytes: u64,
    node: Node,
    root: bool,
    fill: &mut dyn FnMut(&mut [u8]) -> io::Result<()>,
    save: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<Hash> {
    if node.groups > SUBTREE_GROUPS {
        let (left, right) = node.children();
        let left = subtree(bytes, left, false, fill, save)?;
        let right = subtree(bytes, right, false, fill, save)?;
        let pair = joined(left, right);
        save(node.pair * PAIR_BYTES, &pair)?;
        return Ok(pair_hash(&pair, root));
    }
    let first_byte = node.first * GROUP_BYTES;
    let mut data = vec![0; (node.groups * GROUP_BYTES).min(bytes - first_byte) as usize];
    fill(&mut data)?;
    let mut pairs = vec![0; ((node.groups - 1) * PAIR_BYTES) as usize];
    let hash = hash_in_memory(&data, first_byte, node.groups, root, &mut pairs);
    if !pairs.is_empty() {
        save(node.pair * PAIR_BYTES, &pairs)?;
    }
    Ok(hash)
}

fn hash_in_memory(data: &[u8], first_byte: u64, groups: u64, root: bool, pairs: &mut [u8]) -> Hash {
    if groups == 1 {
        return group_hash(data, first_byte, root);
    }
    let left_groups = left_of(groups);
    let split = left_groups * GROUP_BYTES;
    let (own, below) = pairs.split_at_mut(PAIR_BYTES as usize);
    let (left_pairs, right_pairs) = below.split_at_mut(((left_groups - 1) * PAIR_BYTES) as usize);
    let (left_data, right_data) = data.split_at(split as usize);
    let left = hash_in_memory(left_data, first_byte, left_groups, false, left_pairs);
    let right = hash_in_memory(
        right_data,
        first_byte + split,
        groups - left_groups,
        false,
        right_pairs,
    );
    let pair = joined(left, right);
    own.copy_from_slice(&pair);
    pair_hash(&pair, root)
}

/// A node of the tree: the groups it covers and where its pair stands in the outboard.
#[derive(Debug, Clone, Copy)]
struct Node {
    first: u64,
    groups: u64,
    pair: u64,
}

impl Node {
    fn children(self) -> (Self, Self) {
        let left = left_of(self.groups);
        (
            Self {
                first: self.first,
                groups: left,
                pair: self.pair + 1,
            },
            Self {
                first: self.first + left,
                groups: self.groups - left,
                pair: self.pair + left,
            },
        )
    }

    fn touches(self, range: &Range<u64>) -> bool {
        self.first < range.end && range.start < self.first + self.groups
    }
}

/// One piece of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Piece {
    /// A hash pair, by its number in the outboard, and which children follow.
    Pair { number: u64, left: bool, right: bool },
    /// The bytes of one group.
    Group { first_byte: u64, bytes: u64 },
}

/// The pieces of the stream of a range, in order. Equal arguments give equal pieces at both ends.
#[derive(Debug, Clone)]
pub(crate) struct Walk {
    bytes: u64,
    range: Range<u64>,
    stack: Vec<Node>,
}

impl Walk {
    /// `blocks` of a blob of `bytes`; a range beyond the end is cut.
    pub(crate) fn new(bytes: u64, blocks: Range<u64>) -> Self {
        let groups = groups_of(bytes);
        let end = blocks.end.saturating_mul(BLOCK_GROUPS).min(groups);
        let range = blocks.start.saturating_mul(BLOCK_GROUPS).min(end)..end;
        let top = Node {
            first: 0,
            groups,
            pair: 0,
        };
        let stack = if range.is_empty() { vec![] } else { vec![top] };
        Self { bytes, range, stack }
    }

    /// The pieces up to and including the next group that ends a block or the range.
    pub(crate) fn next_batch(&mut self) -> Vec<Piece> {
        let mut batch = Vec::with_capacity(2 * BLOCK_GROUPS as usize);
        for piece in self.by_ref() {
            batch.push(piece);
            if let Piece::Group { first_byte, bytes } = piece
                && (first_byte + bytes).is_multiple_of(BLOCK_BYTES)
            {
                break;
            }
        }
        batch
    }
}

impl Iterator for Walk {
    type Item = Piece;

    fn next(&mut self) -> Option<Piece> {
        let node = self.stack.pop()?;
        if node.groups == 1 {
            let first_byte = node.first * GROUP_BYTES;
            let bytes = GROUP_BYTES.min(self.bytes - first_byte);
            return Some(Piece::Group { first_byte, bytes });
        }
        let (left, right) = node.children();
        let (goes_left, goes_right) = (left.touches(&self.range), right.touches(&self.range));
        if goes_right {
            self.stack.push(right);
        }
        if goes_left {
            self.stack.push(left);
        }
        Some(Piece::Pair {
            number: node.pair,
            left: goes_left,
            right: goes_right,
        })
    }
}

pub(crate) fn stream_bytes(batch: &[Piece]) -> u64 {
    batch
        .iter()
        .map(|piece| match piece {
            Piece::Pair { .. } => PAIR_BYTES,
            Piece::Group { bytes, .. } => *bytes,
        })
        .sum()
}

/// The bytes do not belong to the blob they were sent for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mismatch {
    /// Near which byte of the blob.
    pub(crate) at: u64,
}

/// A verified part of a batch: what it is, and where in the batch it lies.
pub(crate) struct Batch {
    /// Offset in the outboard, place in the batch.
    pub(crate) pairs: Vec<(u64, Range<usize>)>,
    /// Offset in the blob, place in the batch.
    pub(crate) groups: Vec<(u64, Range<usize>)>,
}

/// Checks a stream batch by batch: nothing leaves it unverified.
#[derive(Debug)]
pub(crate) struct Decoder {
    walk: Walk,
    /// What the nodes on the walk's stack must hash to.
    expected: Vec<Hash>,
    at_root: bool,
    upcoming: Vec<Piece>,
}

impl Decoder {
    pub(crate) fn new(digest: Digest, bytes: u64, blocks: Range<u64>) -> Self {
        let mut walk = Walk::new(bytes, blocks);
        let upcoming = walk.next_batch();
        Self {
            walk,
            expected: vec![digest.0],
            at_root: true,
            upcoming,
        }
    }

    /// How long the next batch is; `None` at the end.
    pub(crate) fn next_len(&self) -> Option<usize> {
        if self.upcoming.is_empty() {
            None
        } else {
            Some(stream_bytes(&self.upcoming) as usize)
        }
    }

    /// Verifies a batch of exactly [`Decoder::next_len`] bytes. After an error the decoder must be dropped.
    pub(crate) fn take(&mut self, encoded: &[u8]) -> Result<Batch, Mismatch> {
        let pieces = std::mem::take(&mut self.upcoming);
        let mut batch = Batch {
            pairs: Vec::with_capacity(pieces.len() / 2 + 8),
            groups: Vec::with_capacity(BLOCK_GROUPS as usize),
        };
        let mut place = 0;
        let mut near = 0;
        for piece in pieces {
            let root = std::mem::take(&mut self.at_root);
            let mismatch = Mismatch { at: near };
            let expected = self.expected.pop().ok_or(mismatch)?;
            match piece {
                Piece::Pair { number, left, right } => {
                    let at = place..place + PAIR_BYTES as usize;
                    let pair: &[u8; 64] = encoded
                        .get(at.clone())
                        .and_then(|p| p.try_into().ok())
                        .ok_or(mismatch)?;
                    if pair_hash(pair, root) != expected {
                        return Err(mismatch);
                    }
                    let (left_hash, right_hash) = halves(pair);
                    if right {
                        self.expected.push(right_hash);
                    }
                    if left {
                        self.expected.push(left_hash);
                    }
                    place = at.end;
                    batch.pairs.push((number * PAIR_BYTES, at));
                }
                Piece::Group { first_byte, bytes } => {
                    near = first_byte;
                    let at = place..place + bytes as usize;
                    let mismatch = Mismatch { at: near };
                    let data = encoded.get(at.clone()).ok_or(mismatch)?;
                    if group_hash(data, first_byte, root) != expected {
                        return Err(mismatch);
                    }
                    place = at.end;
                    batch.groups.push((first_byte, at));
                }
            }
        }
        self.upcoming = self.walk.next_batch();
        Ok(batch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bao_tree::{
        BaoTree, BlockSize, ByteRanges,
        io::{outboard::PreOrderMemOutboard, round_up_to_chunks, sync::encode_ranges},
    };
    use proptest::prelude::*;

    const BAO: BlockSize = BlockSize::from_chunk_log(4);

    fn blob(bytes: usize) -> Vec<u8> {
        let mut x = 7u32;
        (0..bytes)
            .map(|_| {
                x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (x >> 24) as u8
            })
            .collect()
    }

    fn outboard(data: &[u8]) -> (Digest, Vec<u8>) {
        let mut out = vec![0; outboard_bytes(data.len() as u64) as usize];
        let mut rest = data;
        let digest = make_outboard(
            data.len() as u64,
            &mut |buffer| io::Read::read_exact(&mut rest, buffer),
            &mut |at, pairs| {
                out[at as usize..at as usize + pairs.len()].copy_from_slice(pairs);
                Ok(())
            },
        )
        .unwrap();
        (digest, out)
    }

    fn stream(data: &[u8], outboard: &[u8], blocks: Range<u64>) -> Vec<u8> {
        let mut out = Vec::new();
        for piece in Walk::new(data.len() as u64, blocks) {
            let (from, at, bytes) = match piece {
                Piece::Pair { number, .. } => (outboard, number * PAIR_BYTES, PAIR_BYTES),
                Piece::Group { first_byte, bytes } => (data, first_byte, bytes),
            };
            out.extend_from_slice(&from[at as usize..(at + bytes) as usize]);
        }
        out
    }

    fn decode(
        digest: Digest,
        bytes: u64,
        blocks: Range<u64>,
        mut encoded: &[u8],
    ) -> Result<Vec<u8>, Mismatch> {
        let mut decoder = Decoder::new(digest, bytes, blocks);
        let mut out = Vec::new();
        while let Some(length) = decoder.next_len() {
            if length > encoded.len() {
                return Err(Mismatch { at: 0 });
            }
            let (head, tail) = encoded.split_at(length);
            for (_, at) in decoder.take(head)?.groups {
                out.extend_from_slice(&head[at]);
            }
            encoded = tail;
        }
        Ok(out)
    }

    #[test]
    fn outboards_and_streams_are_those_of_bao_tree() {
        for bytes in [
            0,
            1,
            1024,
            16_384,
            16_385,
            32_768,
            49_000,
            262_144,
            262_145,
            1_000_000,
            17 << 20,
            (33 << 20) + 5,
        ] {
            let data = blob(bytes);
            let (digest, pairs) = outboard(&data);
            let reference = PreOrderMemOutboard::create(&data, BAO);
            assert_eq!(digest.0, *blake3::hash(&data).as_bytes(), "{bytes}");
            assert_eq!(digest.0, *reference.root.as_bytes(), "{bytes}");
            assert_eq!(pairs, reference.data, "{bytes}");
            let blocks = blocks_of(bytes as u64);
            for range in [0..blocks, 0..1, blocks - 1..blocks, blocks / 2..blocks / 2 + 1] {
                let ours = stream(&data, &pairs, range.clone());
                let wanted = ByteRanges::from(
                    range.start * BLOCK_BYTES..(range.end * BLOCK_BYTES).min(bytes.max(1) as u64),
                );
                let mut theirs = Vec::new();
                let chunks = round_up_to_chunks(&wanted);
                encode_ranges(data.as_slice(), &reference, &chunks, &mut theirs).unwrap();
                assert_eq!(BaoTree::new(bytes as u64, BAO).size(), bytes as u64);
                assert!(ours == theirs, "{bytes} bytes, blocks {range:?}");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn any_range_decodes_and_any_flipped_bit_is_found(
            bytes in 1usize..3_000_000, a in 0u64..12, b in 1u64..12, at in any::<prop::sample::Index>(), bit in 0u8..8,
        ) {
            let data = blob(bytes);
            let (digest, pairs) = outboard(&data);
            let all = blocks_of(bytes as u64);
            let range = (a % all)..((a % all) + b).min(all);
            let mut encoded = stream(&data, &pairs, range.clone());
            let wanted = &data[(range.start * BLOCK_BYTES) as usize..((range.end * BLOCK_BYTES) as usize).min(bytes)];
            let got = decode(digest, bytes as u64, range.clone(), &encoded);
            prop_assert_eq!(got.as_deref(), Ok(wanted));
            let at = at.index(encoded.len());
            encoded[at] ^= 1 << bit;
            prop_assert!(decode(digest, bytes as u64, range, &encoded).is_err());
        }
    }
}
