//! The Merkle tree over the entries (RFC 6962, SHA-256): roots, proofs, and their verification. Pure.
//!
//! Leaf `n` is the hash of entry `n` (32 bytes of BLAKE3, see [`crate::book`]), so that an entry whose content was
//! dropped still has its place. A *proof of inclusion* shows that an entry is in a tree, one of *consistency* that one
//! tree is the beginning of another: both are a few dozen hashes, and whoever checks one needs no other entry.
//!
//! Complete subtrees never change once their last leaf is there. [`stored_at`] numbers them in the order in which
//! they become complete, which makes a file of them append-only; [`Frontier`] keeps just the ones that a root is made
//! of.
use base64::{Engine, prelude::BASE64_STANDARD};
use karez_core::id::Digest;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest as _, Sha256};
use std::fmt;

/// A node of the tree: 32 bytes of SHA-256, written in base64 where people and other tools read it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TreeHash(pub [u8; 32]);

impl fmt::Display for TreeHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&BASE64_STANDARD.encode(self.0))
    }
}
impl fmt::Debug for TreeHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
impl std::str::FromStr for TreeHash {
    type Err = ();
    fn from_str(text: &str) -> Result<Self, ()> {
        // 32 bytes are 44 characters: anything longer is not even decoded.
        if text.len() != 44 {
            return Err(());
        }
        let bytes = BASE64_STANDARD.decode(text).map_err(drop)?;
        Ok(Self(bytes.try_into().map_err(drop)?))
    }
}
impl Serialize for TreeHash {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&self.to_string())
    }
}
impl<'de> Deserialize<'de> for TreeHash {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let bad = |()| serde::de::Error::custom("not the base64 of 32 bytes");
        String::deserialize(from)?.parse().map_err(bad)
    }
}

/// The root of the tree without leaves.
pub fn empty_root() -> TreeHash {
    TreeHash(Sha256::digest([]).into())
}

/// The hash of a leaf.
pub fn leaf_hash(leaf: &[u8]) -> TreeHash {
    TreeHash(
        Sha256::new()
            .chain_update([0])
            .chain_update(leaf)
            .finalize()
            .into(),
    )
}

/// The hash of a node over its two children.
pub fn node_hash(left: &TreeHash, right: &TreeHash) -> TreeHash {
    let hasher = Sha256::new().chain_update([1]).chain_update(left.0);
    TreeHash(hasher.chain_update(right.0).finalize().into())
}

/// The leaf of an entry with this hash.
pub fn entry_leaf(entry: &Digest) -> TreeHash {
    leaf_hash(&entry.0)
}

/// The complete subtrees that make up a tree, the largest first: one for each one in the binary of its size.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Frontier {
    size: u64,
    peaks: Vec<TreeHash>,
}

impl Frontier {
    /// Puts a tree together from what [`Frontier::peaks`] gave; `None` when their number does not fit the size.
    pub fn from_parts(size: u64, peaks: Vec<TreeHash>) -> Option<Self> {
        (peaks.len() == size.count_ones() as usize).then_some(Self { size, peaks })
    }

    /// How many leaves there are.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The roots of its complete subtrees, the largest first.
    pub fn peaks(&self) -> &[TreeHash] {
        &self.peaks
    }

    /// Adds a leaf.
    pub fn push(&mut self, leaf: TreeHash) {
        self.push_each(leaf, &mut |_| {});
    }

    /// Adds a leaf, and names every subtree that becomes complete by it, in the order of [`stored_at`].
    pub fn push_each(&mut self, leaf: TreeHash, complete: &mut dyn FnMut(TreeHash)) {
        complete(leaf);
        let mut hash = leaf;
        for _ in 0..self.size.trailing_ones() {
            if let Some(left) = self.peaks.pop() {
                hash = node_hash(&left, &hash);
                complete(hash);
            }
        }
        self.peaks.push(hash);
        self.size += 1;
    }

    /// The root.
    pub fn root(&self) -> TreeHash {
        let mut smaller = self.peaks.iter().rev();
        let Some(last) = smaller.next() else {
            return empty_root();
        };
        smaller.fold(*last, |right, left| node_hash(left, &right))
    }
}

/// The place of a complete subtree among all, in the order in which they become complete. Level 0 are the leaves.
pub fn stored_at(level: u32, index: u64) -> u64 {
    // The subtree is complete with its last leaf; before that leaf, `last` leaves stored 2·last − ones(last) hashes.
    let last = ((index + 1) << level) - 1;
    2 * last - u64::from(last.count_ones()) + u64::from(level)
}

/// How many complete subtrees a tree of `size` leaves has.
pub fn stored_count(size: u64) -> u64 {
    2 * size - u64::from(size.count_ones())
}

/// Reads the hash of a complete subtree: level, and index on that level.
pub trait Subtrees {
    /// What reading may fail with.
    type Error;
    /// The hash.
    fn subtree(&self, level: u32, index: u64) -> Result<TreeHash, Self::Error>;
}

/// The hash over leaves `from` to `to`, where `from` is a multiple of the largest power of two under the length.
fn range<S: Subtrees + ?Sized>(tree: &S, from: u64, to: u64) -> Result<TreeHash, S::Error> {
    let len = to - from;
    if len.is_power_of_two() {
        let level = len.trailing_zeros();
        return tree.subtree(level, from >> level);
    }
    let middle = from + split(len);
    Ok(node_hash(&range(tree, from, middle)?, &range(tree, middle, to)?))
}

/// The largest power of two below `len`, which is at least 2.
fn split(len: u64) -> u64 {
    1 << (63 - (len - 1).leading_zeros())
}

/// The root over the first `size` leaves.
pub fn root<S: Subtrees + ?Sized>(tree: &S, size: u64) -> Result<TreeHash, S::Error> {
    if size == 0 {
        return Ok(empty_root());
    }
    range(tree, 0, size)
}

/// Shows that leaf `index` is in the tree of `size` leaves; `index` must be under `size`.
pub fn prove_inclusion<S: Subtrees + ?Sized>(
    tree: &S,
    index: u64,
    size: u64,
) -> Result<Vec<TreeHash>, S::Error> {
    let (mut from, mut to) = (0, size);
    let mut path = Vec::new();
    while to - from > 1 {
        let middle = from + split(to - from);
        if index < middle {
            path.push(range(tree, middle, to)?);
            to = middle;
        } else {
            path.push(range(tree, from, middle)?);
            from = middle;
        }
    }
    path.reverse();
    Ok(path)
}

/// Shows that the tree of `old` leaves is the beginning of the one of `new`; `old` must not be over `new`.
pub fn prove_consistency<S: Subtrees + ?Sized>(
    tree: &S,
    old: u64,
    new: u64,
) -> Result<Vec<TreeHash>, S::Error> {
    if old == 0 || old == new {
        return Ok(Vec::new());
    }
    let (mut from, mut to) = (0, new);
    let mut path = Vec::new();
    // Down to the subtree that ends where the old tree ended.
    while to != old {
        let middle = from + split(to - from);
        if old <= middle {
            path.push(range(tree, middle, to)?);
            to = middle;
        } else {
            path.push(range(tree, from, middle)?);
            from = middle;
        }
    }
    if from > 0 {
        path.push(range(tree, from, to)?);
    }
    path.reverse();
    Ok(path)
}

/// Why a proof shows nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProofError {
    /// The numbers make no sense.
    #[error("leaf {index} cannot be in a tree of {size}")]
    Index {
        /// The leaf.
        index: u64,
        /// The tree.
        size: u64,
    },
    /// The old tree is larger than the new one.
    #[error("a tree of {old} cannot be the beginning of one of {new}")]
    Sizes {
        /// The older tree.
        old: u64,
        /// The newer tree.
        new: u64,
    },
    /// Too many or too few hashes.
    #[error("the proof has the wrong number of hashes")]
    Length,
    /// The hashes lead elsewhere.
    #[error("the proof leads to the root {found}, expected {expected}")]
    Root {
        /// Where it leads.
        found: TreeHash,
        /// Where it should.
        expected: TreeHash,
    },
}

fn same(found: TreeHash, expected: TreeHash) -> Result<(), ProofError> {
    if found == expected {
        Ok(())
    } else {
        Err(ProofError::Root { found, expected })
    }
}

/// Checks a proof of inclusion.
pub fn verify_inclusion(
    leaf: TreeHash,
    index: u64,
    size: u64,
    path: &[TreeHash],
    root: TreeHash,
) -> Result<(), ProofError> {
    if index >= size {
        return Err(ProofError::Index { index, size });
    }
    // `index` and `last` as one walks up; where they meet, the node has no right neighbour on this level.
    let (mut index, mut last) = (index, size - 1);
    let mut hash = leaf;
    for sibling in path {
        if last == 0 {
            return Err(ProofError::Length);
        }
        if index % 2 == 1 || index == last {
            hash = node_hash(sibling, &hash);
            while index % 2 == 0 && index != 0 {
                index >>= 1;
                last >>= 1;
            }
        } else {
            hash = node_hash(&hash, sibling);
        }
        index >>= 1;
        last >>= 1;
    }
    if last != 0 {
        return Err(ProofError::Length);
    }
    same(hash, root)
}

/// Checks a proof of consistency.
pub fn verify_consistency(
    (old, old_root): (u64, TreeHash),
    (new, new_root): (u64, TreeHash),
    path: &[TreeHash],
) -> Result<(), ProofError> {
    if old > new {
        return Err(ProofError::Sizes { old, new });
    }
    if old == 0 {
        return match path {
            [] => same(old_root, empty_root()),
            _ => Err(ProofError::Length),
        };
    }
    if old == new {
        return match path {
            [] => same(new_root, old_root),
            _ => Err(ProofError::Length),
        };
    }
    // An old tree that is one complete subtree is its own first hash.
    let (first, rest) = if old.is_power_of_two() {
        (old_root, path)
    } else {
        let (first, rest) = path.split_first().ok_or(ProofError::Length)?;
        (*first, rest)
    };
    let shift = (old - 1).trailing_ones();
    let (mut index, mut last) = ((old - 1) >> shift, (new - 1) >> shift);
    let (mut to_old, mut to_new) = (first, first);
    for sibling in rest {
        if last == 0 {
            return Err(ProofError::Length);
        }
        if index % 2 == 1 || index == last {
            to_old = node_hash(sibling, &to_old);
            to_new = node_hash(sibling, &to_new);
            while index % 2 == 0 && index != 0 {
                index >>= 1;
                last >>= 1;
            }
        } else {
            to_new = node_hash(&to_new, sibling);
        }
        index >>= 1;
        last >>= 1;
    }
    if last != 0 {
        return Err(ProofError::Length);
    }
    same(to_old, old_root)?;
    same(to_new, new_root)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    /// The definition of RFC 6962, word for word: the tests' own oracle.
    fn by_definition(leaves: &[Vec<u8>]) -> TreeHash {
        match leaves {
            [] => empty_root(),
            [leaf] => leaf_hash(leaf),
            many => {
                let k = many.len().next_power_of_two() / 2;
                node_hash(&by_definition(&many[..k]), &by_definition(&many[k..]))
            }
        }
    }

    struct Stored(Vec<TreeHash>);
    impl Subtrees for Stored {
        type Error = Infallible;
        fn subtree(&self, level: u32, index: u64) -> Result<TreeHash, Infallible> {
            Ok(self.0[stored_at(level, index) as usize])
        }
    }

    fn leaves(count: usize) -> Vec<Vec<u8>> {
        (0..count).map(|n| format!("leaf {n}").into_bytes()).collect()
    }

    fn tree(leaves: &[Vec<u8>]) -> (Stored, Frontier) {
        let mut stored = Vec::new();
        let mut frontier = Frontier::default();
        for leaf in leaves {
            frontier.push_each(leaf_hash(leaf), &mut |hash| stored.push(hash));
        }
        assert_eq!(stored.len() as u64, stored_count(leaves.len() as u64));
        (Stored(stored), frontier)
    }

    #[test]
    fn the_roots_are_those_of_certificate_transparency() {
        let inputs = [
            "",
            "00",
            "10",
            "2021",
            "3031",
            "40414243",
            "5051525354555657",
            "606162636465666768696a6b6c6d6e6f",
        ];
        let roots = [
            "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
            "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
            "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
            "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
            "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
            "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
            "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
            "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
        ];
        let mut frontier = Frontier::default();
        for (input, expected) in inputs.iter().zip(roots) {
            frontier.push(leaf_hash(&hex::decode(input).unwrap()));
            assert_eq!(hex::encode(frontier.root().0), expected);
        }
    }

    #[test]
    fn every_proof_of_every_small_tree_holds_and_none_holds_elsewhere() {
        const MAX: u64 = 40;
        let all = leaves(MAX as usize);
        let (stored, _) = tree(&all);
        let roots: Vec<_> = (0..=MAX as usize).map(|n| by_definition(&all[..n])).collect();
        for size in 0..=MAX {
            let now = roots[size as usize];
            assert_eq!(root(&stored, size), Ok(now));
            assert_eq!(tree(&all[..size as usize]).1.root(), now);
            for index in 0..size {
                let path = prove_inclusion(&stored, index, size).unwrap();
                let leaf = leaf_hash(&all[index as usize]);
                assert_eq!(verify_inclusion(leaf, index, size, &path, now), Ok(()));
                for other in (0..=size).filter(|i| *i != index) {
                    assert!(verify_inclusion(leaf, other, size, &path, now).is_err());
                }
                let longer = [path.as_slice(), &[now]].concat();
                assert!(verify_inclusion(leaf, index, size, &longer, now).is_err());
                if let Some((_, shorter)) = path.split_last() {
                    assert!(verify_inclusion(leaf, index, size, shorter, now).is_err());
                }
            }
            for old in 0..=size {
                let before = roots[old as usize];
                let path = prove_consistency(&stored, old, size).unwrap();
                assert_eq!(
                    verify_consistency((old, before), (size, now), &path),
                    Ok(()),
                    "{old} to {size}"
                );
                for i in 0..path.len() {
                    let mut bad = path.clone();
                    bad[i].0[5] ^= 1;
                    assert!(verify_consistency((old, before), (size, now), &bad).is_err());
                }
                if old > 0 {
                    let wrong = roots[old as usize - 1];
                    assert!(verify_consistency((old, wrong), (size, now), &path).is_err());
                }
                let longer = [path.as_slice(), &[now]].concat();
                assert!(verify_consistency((old, before), (size, now), &longer).is_err());
            }
        }
    }

    #[test]
    fn a_frontier_survives_its_parts() {
        let (_, frontier) = tree(&leaves(27));
        let again = Frontier::from_parts(27, frontier.peaks().to_vec()).unwrap();
        assert_eq!(again.root(), frontier.root());
        assert_eq!(Frontier::from_parts(28, frontier.peaks().to_vec()), None);
    }
}
