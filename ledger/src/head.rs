//! Signed tree heads: C2SP checkpoints of the ledger's Merkle tree, and proofs that stand on them.
//!
//! ```text
//! karez-ledger/SCHEDULER            the origin: the scheduler's key in hex
//! 1042                              entries
//! CsUYapGGPo4dkMgIAUqom/Xajj…       root, in base64
//!
//! — karez-ledger/SCHEDULER Az3grl…  the scheduler's signature
//! — karez-witness/KEY jWbPPw…       cosignatures of witnesses, by other schedulers for example
//! ```
//!
//! Sources: <https://c2sp.org/tlog-checkpoint>, <https://c2sp.org/tlog-proof>.
use crate::{
    book::{ENTRY_BYTES_MAX, Entry, EntryDecodeError},
    note::{NOTE_BYTES_MAX, Note, NoteError},
    tree::{ProofError, TreeHash, entry_leaf, verify_inclusion},
};
use base64::{Engine, prelude::BASE64_STANDARD};
use karez_core::key::{KeyError, PublicKey, SchedulerId, SecretKey};
use std::fmt;

const ORIGIN: &str = "karez-ledger/";
const WITNESS: &str = "karez-witness/";
const PROOF: &str = "c2sp.org/tlog-proof@v1";
/// The most heads read from one file.
pub const HEADS_MAX: usize = 100_000;

/// Which log the ledger of `scheduler` is, for people and other tools.
pub fn origin(scheduler: SchedulerId) -> String {
    format!("{ORIGIN}{scheduler}")
}

/// The name under which `key` cosigns.
pub fn witness_name(key: &PublicKey) -> String {
    format!("{WITNESS}{key}")
}

/// Why a head or a proof is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeadError {
    /// Not a note, or not signed.
    #[error(transparent)]
    Note(#[from] NoteError),
    /// A note, but no tree head.
    #[error("not a tree head: {0}")]
    Form(&'static str),
    /// The origin names a bad key.
    #[error("the origin of the head names no scheduler: {0}")]
    Key(#[from] KeyError),
    /// Not a proof.
    #[error("not a proof: {0}")]
    Proof(&'static str),
    /// The proof holds no entry.
    #[error("the proof's entry: {0}")]
    Entry(#[from] EntryDecodeError),
    /// The entry in the proof has another number.
    #[error("the proof is for entry {index}, it carries entry {found}")]
    Index {
        /// What it says.
        index: u64,
        /// What it carries.
        found: u64,
    },
    /// The hashes do not lead to the root.
    #[error(transparent)]
    Path(#[from] ProofError),
}

/// A tree head whose scheduler's signature was checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// Whose ledger.
    pub scheduler: SchedulerId,
    /// How many entries.
    pub size: u64,
    /// The root over them.
    pub root: TreeHash,
    /// The note itself, with every signature.
    pub note: Note,
}

impl Head {
    /// Signs a head of the ledger of `secret`'s owner.
    pub fn sign(secret: &SecretKey, size: u64, root: TreeHash) -> Self {
        let scheduler = SchedulerId(PublicKey::of(secret));
        let origin = origin(scheduler);
        let note = Note::sign(format!("{origin}\n{size}\n{root}\n"), &origin, secret);
        Self {
            scheduler,
            size,
            root,
            note,
        }
    }

    /// Reads a head and checks the scheduler's signature. Whether the scheduler is one to trust is the caller's to say.
    pub fn parse(text: &str) -> Result<Self, HeadError> {
        Self::of_note(Note::parse(text)?)
    }

    fn of_note(note: Note) -> Result<Self, HeadError> {
        let form = HeadError::Form;
        let mut lines = note.text().split('\n');
        let name = lines.next().unwrap_or_default();
        let key = name.strip_prefix(ORIGIN).ok_or(form("its origin is no ledger"))?;
        let scheduler = SchedulerId(key.parse()?);
        if origin(scheduler) != name {
            return Err(form("its origin is not in lower-case hex"));
        }
        let size = lines.next().unwrap_or_default();
        let number: u64 = size.parse().map_err(|_| form("its size is no number"))?;
        if number.to_string() != size {
            return Err(form("its size is not written plainly"));
        }
        let root = lines.next().unwrap_or_default();
        let root = root.parse().map_err(|()| form("its root is not 32 bytes"))?;
        note.verify(name, &scheduler.0)?;
        Ok(Self {
            scheduler,
            size: number,
            root,
            note,
        })
    }

    /// Who cosigned, with the second it was done; lines that are wrong are left out.
    pub fn witnesses(&self) -> Vec<(PublicKey, u64)> {
        let witness = |line: &crate::note::SignatureLine| {
            let key: PublicKey = line.name.strip_prefix(WITNESS)?.parse().ok()?;
            let at = self.note.verify_cosignature(&line.name, &key).ok()?;
            Some((key, at))
        };
        self.note.signatures.iter().filter_map(witness).collect()
    }
}

impl fmt::Display for Head {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.note.fmt(f)
    }
}

/// Reads many heads, one after the other, with or without blank lines between them. The error says which one is bad,
/// from 1.
pub fn read_heads(text: &str) -> Result<Vec<Head>, (usize, HeadError)> {
    let mut heads = Vec::new();
    let mut note = String::new();
    let mut signed = false;
    let finish = |note: &mut String, heads: &mut Vec<Head>| {
        let number = heads.len() + 1;
        if number > HEADS_MAX {
            return Err((number, HeadError::Form("there are more than 100000 in the file")));
        }
        heads.push(Head::parse(note).map_err(|error| (number, error))?);
        note.clear();
        Ok(())
    };
    for line in text.split_inclusive('\n') {
        let signature = line.starts_with("\u{2014} ");
        if signed && !signature {
            finish(&mut note, &mut heads)?;
        }
        signed = signature;
        if note.is_empty() && line.trim().is_empty() {
            continue;
        }
        note.push_str(line);
    }
    if !note.is_empty() {
        if !note.ends_with('\n') {
            note.push('\n');
        }
        finish(&mut note, &mut heads)?;
    }
    Ok(heads)
}

/// Shows that an entry is in the ledger that a head stands for; checked by [`Proof::verify`] without anything else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proof {
    /// The entry, as it is hashed.
    pub entry: Vec<u8>,
    /// Its number.
    pub index: u64,
    /// From the leaf's sibling to the root's child.
    pub path: Vec<TreeHash>,
    /// The head.
    pub head: Head,
}

impl Proof {
    /// Reads a proof and checks the head's signature, not yet the path.
    pub fn parse(text: &str) -> Result<Self, HeadError> {
        let bad = HeadError::Proof;
        // Base64 makes four bytes of three.
        if text.len() > ENTRY_BYTES_MAX / 3 * 4 + NOTE_BYTES_MAX {
            return Err(bad("it is too long"));
        }
        let (proof, note) = text.split_once("\n\n").ok_or(bad("it has no head"))?;
        let mut lines = proof.split('\n');
        if lines.next() != Some(PROOF) {
            return Err(bad("it does not begin as one"));
        }
        let entry = lines.next().and_then(|line| line.strip_prefix("extra "));
        let entry = entry.ok_or(bad("it does not carry the entry"))?;
        let entry = BASE64_STANDARD
            .decode(entry)
            .map_err(|_| bad("its entry is not base64"))?;
        let index = lines.next().and_then(|line| line.strip_prefix("index "));
        let index = index.and_then(|n| n.parse::<u64>().ok().filter(|number| number.to_string() == n));
        let index = index.ok_or(bad("it names no entry"))?;
        // A tree of 2^64 leaves has paths of 64.
        let path: Vec<TreeHash> = lines
            .take(65)
            .map(|line| line.parse().map_err(|()| bad("a hash is not 32 bytes")))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            entry,
            index,
            path,
            head: Head::parse(note)?,
        })
    }

    /// Checks that the entry is the one of that number in the ledger of the head.
    pub fn verify(&self) -> Result<Entry, HeadError> {
        let entry = Entry::decode(&self.entry)?;
        if entry.seq != self.index {
            return Err(HeadError::Index {
                index: self.index,
                found: entry.seq,
            });
        }
        let leaf = entry_leaf(&entry.hash());
        let Head { size, root, .. } = self.head;
        verify_inclusion(leaf, self.index, size, &self.path, root)?;
        Ok(entry)
    }
}

impl fmt::Display for Proof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{PROOF}")?;
        writeln!(f, "extra {}", BASE64_STANDARD.encode(&self.entry))?;
        writeln!(f, "index {}", self.index)?;
        self.path.iter().try_for_each(|hash| writeln!(f, "{hash}"))?;
        writeln!(f)?;
        self.head.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::Frontier;
    use karez_core::unit::UtcMillis;

    fn head(size: u64) -> Head {
        let mut frontier = Frontier::default();
        (0..size).for_each(|n| frontier.push(crate::tree::leaf_hash(&n.to_be_bytes())));
        Head::sign(&SecretKey::from_bytes(&[1; 32]), size, frontier.root())
    }

    #[test]
    fn a_head_reads_what_it_writes() {
        let mut one = head(5);
        let witness = SecretKey::from_bytes(&[2; 32]);
        let key = PublicKey::of(&witness);
        let line = one
            .note
            .cosign(&witness_name(&key), &witness, UtcMillis(7_000_123));
        one.note.add(line);
        let read = Head::parse(&one.to_string()).unwrap();
        assert_eq!(read, one);
        assert_eq!(read.witnesses(), [(key, 7_000)]);
        for changed in ["\n5\n", "\n05\n", "\n+5\n"].map(|size| one.to_string().replacen("\n5\n", size, 1)) {
            assert_eq!(Head::parse(&changed).is_ok(), changed == one.to_string());
        }
        let forged = one.to_string().replacen("\n5\n", "\n6\n", 1);
        assert!(matches!(Head::parse(&forged), Err(HeadError::Note(_))));
    }

    #[test]
    fn files_of_heads_are_read_with_and_without_blank_lines() {
        let heads: Vec<Head> = (1..5).map(head).collect();
        let texts: Vec<String> = heads.iter().map(Head::to_string).collect();
        for between in ["", "\n", "\n\n\n"] {
            assert_eq!(read_heads(&texts.join(between)).unwrap(), heads);
        }
        assert_eq!(read_heads("").unwrap(), []);
        let cut = format!("{}{}", texts[0], &texts[1][..texts[1].len() - 9]);
        assert_eq!(read_heads(&cut).unwrap_err().0, 2);
    }
}
