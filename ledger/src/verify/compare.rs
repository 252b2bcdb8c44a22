//! Two copies of one ledger side by side: which is longer, and where they part.
use super::{fault::FaultKind, lines::Lines};
use crate::{
    head::Head,
    tree::{Frontier, TreeHash, entry_leaf},
};
use karez_core::id::Digest;
use serde::Deserialize;
use std::io::BufRead;

/// How one copy of a ledger stands to another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Relation {
    /// The same entries.
    Same,
    /// The first copy goes on where the second ends.
    Longer {
        /// By so many entries.
        by: u64,
    },
    /// The first copy lacks what the second has: its tail was cut off, or it is older.
    Shorter {
        /// The first entry it lacks.
        entry: u64,
        /// That entry's hash.
        hash: Digest,
        /// How many it lacks.
        missing: u64,
    },
    /// Two histories.
    Fork {
        /// The first entry in which they differ.
        entry: u64,
        /// Its hash in the first copy.
        ours: Digest,
        /// Its hash in the second.
        theirs: Digest,
        /// The root over everything before, which both have.
        common: TreeHash,
        /// The signed head at the end of the first copy, if it has one.
        our_head: Option<Box<Head>>,
        /// The signed head at the end of the second.
        their_head: Option<Box<Head>>,
    },
}

#[derive(Deserialize)]
struct Place {
    seq: u64,
    hash: Digest,
}

#[derive(Deserialize)]
struct End {
    checkpoint: String,
}

struct Copy<'a> {
    lines: Lines<'a>,
    head: Option<Box<Head>>,
}

impl Copy<'_> {
    fn next(&mut self) -> Result<Option<Place>, FaultKind> {
        loop {
            let line = match self.lines.next() {
                Ok(Some(line)) => line,
                Ok(None) | Err(FaultKind::Truncated) => return Ok(None),
                Err(other) => return Err(other),
            };
            if line.starts_with(b"{\"format\":") {
                continue;
            }
            let unreadable = |e: serde_json::Error| FaultKind::Unreadable {
                expected: "an entry",
                why: e.to_string(),
            };
            if line.starts_with(b"{\"entries\":") {
                let end: End = serde_json::from_slice(&line).map_err(unreadable)?;
                self.head = Head::parse(&end.checkpoint).ok().map(Box::new);
                return Ok(None);
            }
            return serde_json::from_slice(&line).map(Some).map_err(unreadable);
        }
    }
}

/// Compares two exports by the hashes their lines claim. It checks nothing else: verify both before believing it.
pub fn compare(ours: &mut dyn BufRead, theirs: &mut dyn BufRead) -> Result<Relation, FaultKind> {
    let copy = |reader| Copy {
        lines: Lines { reader, number: 0 },
        head: None,
    };
    let (mut ours, mut theirs) = (copy(ours), copy(theirs));
    let mut tree = Frontier::default();
    loop {
        match (ours.next()?, theirs.next()?) {
            (None, None) => return Ok(Relation::Same),
            (Some(a), Some(b)) if a.hash == b.hash && a.seq == b.seq => tree.push(entry_leaf(&a.hash)),
            (Some(a), Some(b)) => {
                while ours.next()?.is_some() {}
                while theirs.next()?.is_some() {}
                return Ok(Relation::Fork {
                    entry: tree.size(),
                    ours: a.hash,
                    theirs: b.hash,
                    common: tree.root(),
                    our_head: ours.head,
                    their_head: theirs.head,
                });
            }
            (Some(_), None) => {
                let mut by = 1;
                while ours.next()?.is_some() {
                    by += 1;
                }
                return Ok(Relation::Longer { by });
            }
            (None, Some(first)) => {
                let mut missing = 1;
                while theirs.next()?.is_some() {
                    missing += 1;
                }
                return Ok(Relation::Shorter {
                    entry: first.seq,
                    hash: first.hash,
                    missing,
                });
            }
        }
    }
}
