//! The book: a hash chain of entries and the balances that follow from them. Pure; no file, no clock.
//!
//! # Encoding of an entry
//! All integers are big-endian.
//!
//! ```text
//! entry    = skeleton records
//! skeleton = previous[32] seq:u64 at:u64 kind:u8 legs:u8 leg* gist:u8 byte*
//! records  = 0 evidence | 1 digest[32]
//! evidence = count:u16 envelope*
//! kind     = 0 grant | 1 reserve | 2 settle | 3 release | 4 accept | 5 dispute | 6 ruling | 7 expire | 8 rates
//!          | 9 limit | 10 payment | 11 floors
//! leg      = account amount:i64
//! account  = 0 (federation) | 1 user[32] (user) | 2 job[32] (escrow) | 3 len:u8 name (institution)
//!          | 4 grant[32] (grant) | 5 receipt[32] (disputed)
//! envelope = len:u32 bytes
//! digest   = BLAKE3 in key-derivation mode, context "karez-ledger/2 evidence", over evidence
//! hash     = BLAKE3 in key-derivation mode, context "karez-ledger/2 entry", over skeleton and digest
//! ```
//!
//! So the records of an entry can be dropped when nobody needs their detail any more: their digest takes their place, and
//! hash, legs and gist (what the rules must remember of them, see `evidence::gist`) stay what they were.
//!
//! The `previous` of entry 0 is the same function with context "karez-ledger/1 genesis" over the scheduler's key, so
//! that no entry of one scheduler's ledger fits into another's.
use crate::{
    evidence::{
        Change, EvidenceError, Examined, GIST_MAX, Rule, Trail, examine, examine_dropped, is_droppable,
        recall,
    },
    tree::{Frontier, entry_leaf},
};
use karez_core::{
    id::{Digest, Institution, JobId},
    key::{PublicKey, SchedulerId, UserId},
    money::{Account, Accounts, EVIDENCE_MAX, LEGS_MAX, Posting, PostingError, PostingKind},
    unit::UtcMillis,
};
use std::sync::LazyLock;

/// The largest encoded entry, in bytes: an order, a lease, 508 readings, a usage and a receipt fit.
pub const ENTRY_BYTES_MAX: usize = 5 * 512 * 1024;

/// One line of the ledger.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// From 0, without gaps.
    pub seq: u64,
    /// Hash of the entry before; of the first one: [`genesis`].
    pub previous: Digest,
    /// When it was posted, by the scheduler's clock: decides whether a grant may still pay.
    pub at: UtcMillis,
    /// What moved, and why.
    pub posting: Posting,
    /// What the rules remember of the records; it outlives them.
    pub gist: Vec<u8>,
    /// The digest of the records, once they were dropped: the posting has no evidence then.
    pub dropped: Option<Digest>,
}

/// Bytes that are no entry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not an entry: {why} (at byte {at})")]
pub struct EntryDecodeError {
    /// What is wrong.
    pub why: &'static str,
    /// How far reading came.
    pub at: usize,
}

/// Why a posting or an entry was refused. The book is unchanged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BookError {
    /// The legs break a rule of double entry.
    #[error(transparent)]
    Posting(#[from] PostingError),
    /// The signed records do not justify the legs.
    #[error(transparent)]
    Evidence(#[from] EvidenceError),
    /// The entry would be larger than anyone reads.
    #[error("the entry is {bytes} bytes, the limit is {ENTRY_BYTES_MAX}: use fewer or smaller records")]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
    /// A replayed entry has another number than the next one.
    #[error("expected entry {expected}, found entry {found}")]
    Sequence {
        /// The next number of this book.
        expected: u64,
        /// The number of the entry.
        found: u64,
    },
    /// A replayed entry does not follow the one before.
    #[error("entry {seq} follows {found:?}, but the entry before it has hash {expected:?}")]
    Previous {
        /// The number of the entry.
        seq: u64,
        /// Hash of the last entry of this book.
        expected: Digest,
        /// What the entry names.
        found: Digest,
    },
    /// This book belongs to no scheduler.
    #[error("this store keeps no ledger: open it with the scheduler's key to post")]
    NoLedger,
}

/// The chain's head, the balances, and what the evidence rules must remember.
///
/// Entries themselves are not kept. Memory grows by about 50 bytes per settled part and 20 per job that is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Book {
    scheduler: Option<SchedulerId>,
    accounts: Accounts,
    head: Digest,
    tree: Frontier,
    trail: Trail,
}

/// What undoes the last [`Book::append`].
#[derive(Debug)]
pub(crate) struct Undo {
    head: Digest,
    tree: Frontier,
    legs: Vec<(Account, i64)>,
    change: Change,
}

impl Undo {
    /// Moves the credits of the append in another copy of the accounts.
    pub(crate) fn repeat(&self, accounts: &mut Accounts) {
        let posting = Posting {
            kind: PostingKind::Release,
            legs: self.legs.clone(),
            evidence: Vec::new(),
        };
        let result = accounts.apply(&posting);
        debug_assert_eq!(result, Ok(()));
        set_limit(accounts, &self.change);
    }
}

fn set_limit(accounts: &mut Accounts, change: &Change) {
    if let Change::Limit {
        institution, limit, ..
    } = change
    {
        accounts.set_limit(institution.clone(), *limit);
    }
}

/// The hash that the first entry of `scheduler`'s ledger names.
pub fn genesis(scheduler: SchedulerId) -> Digest {
    Digest(blake3::derive_key("karez-ledger/1 genesis", &scheduler.0.0))
}

impl Book {
    /// An empty ledger of `scheduler`.
    pub fn new(scheduler: SchedulerId) -> Self {
        Self {
            scheduler: Some(scheduler),
            accounts: Accounts::default(),
            tree: Frontier::default(),
            head: genesis(scheduler),
            trail: Trail::default(),
        }
    }

    /// The book of a store that keeps no ledger: every posting is refused.
    pub fn none() -> Self {
        Self {
            scheduler: None,
            accounts: Accounts::default(),
            tree: Frontier::default(),
            head: Digest([0; 32]),
            trail: Trail::default(),
        }
    }

    /// Whose ledger it is.
    pub fn scheduler(&self) -> Option<SchedulerId> {
        self.scheduler
    }
    /// All balances.
    pub fn accounts(&self) -> &Accounts {
        &self.accounts
    }
    /// How many entries there are; also the number of the next one.
    pub fn entries(&self) -> u64 {
        self.tree.size()
    }
    /// Hash of the last entry.
    pub fn head(&self) -> Digest {
        self.head
    }
    /// The Merkle tree over the entries.
    pub fn tree(&self) -> &Frontier {
        &self.tree
    }
    pub(crate) fn trail(&self) -> &Trail {
        &self.trail
    }

    /// A book as it was written down.
    pub(crate) fn restore(
        scheduler: SchedulerId,
        accounts: Accounts,
        head: Digest,
        tree: Frontier,
        trail: Trail,
    ) -> Self {
        Self {
            scheduler: Some(scheduler),
            accounts,
            head,
            tree,
            trail,
        }
    }

    /// Disputes that wait for a ruling.
    pub fn disputes_open(&self) -> usize {
        self.trail.disputes.len()
    }

    /// Checks `posting` wholly (signatures, paper trail, balance) and makes it the next entry, or changes nothing.
    pub fn append(&mut self, at: UtcMillis, posting: Posting) -> Result<Entry, BookError> {
        let scheduler = self.scheduler.ok_or(BookError::NoLedger)?;
        self.append_examined(at, examine(posting, scheduler)?)
    }

    /// As [`Book::append`], when the records were already examined (signatures cost most, and need no book).
    pub fn append_examined(&mut self, at: UtcMillis, examined: Examined) -> Result<Entry, BookError> {
        self.append_undoable(at, examined).map(|(entry, ..)| entry)
    }

    pub(crate) fn append_undoable(
        &mut self,
        at: UtcMillis,
        examined: Examined,
    ) -> Result<(Entry, Vec<u8>, Undo), BookError> {
        let change = self.check(at, &examined)?;
        let digest = examined.evidence();
        let entry = examined.into_entry(self.entries(), self.head, at);
        let mut bytes = Vec::with_capacity(entry.encoded_len());
        entry.encode_skeleton(&mut bytes);
        let hash = hash_with(&bytes, &digest);
        entry.encode_records(&mut bytes);
        if bytes.len() > ENTRY_BYTES_MAX {
            return Err(BookError::TooLarge { bytes: bytes.len() });
        }
        let undo = self.take(&entry.posting, change, hash)?;
        Ok((entry, bytes, undo))
    }

    /// As [`Book::append_examined`], for an entry whose bytes were hashed elsewhere.
    pub(crate) fn append_hashed(
        &mut self,
        at: UtcMillis,
        examined: &Examined,
        hash: Digest,
    ) -> Result<(), BookError> {
        let change = self.check(at, examined)?;
        self.take(examined.posting(), change, hash).map(drop)
    }

    fn check(&self, at: UtcMillis, examined: &Examined) -> Result<Change, BookError> {
        let scheduler = self.scheduler.ok_or(BookError::NoLedger)?;
        if examined.scheduler() != scheduler {
            return Err(EvidenceError::OtherLedger {
                scheduler: examined.scheduler(),
            }
            .into());
        }
        Ok(self.trail.check(at, examined.claim(), &self.accounts)?)
    }

    fn take(&mut self, posting: &Posting, change: Change, hash: Digest) -> Result<Undo, BookError> {
        self.accounts.apply(posting)?;
        self.trail.apply(&change);
        set_limit(&mut self.accounts, &change);
        let undo = Undo {
            head: self.head,
            tree: self.tree.clone(),
            legs: posting.legs.clone(),
            change,
        };
        self.head = hash;
        self.tree.push(entry_leaf(&hash));
        Ok(undo)
    }

    /// Takes back the last append.
    pub(crate) fn undo(&mut self, undo: Undo) {
        // A limit that was raised falls last, or the balance it allowed could not be undone.
        let back = Posting {
            kind: PostingKind::Release,
            legs: undo.legs.iter().map(|(a, leg)| (a.clone(), -leg)).collect(),
            evidence: Vec::new(),
        };
        // The balances before were within every rule, so going back to them is too.
        let result = self.accounts.apply(&back);
        debug_assert_eq!(result, Ok(()));
        if let Change::Limit {
            institution, before, ..
        } = &undo.change
        {
            self.accounts.set_limit(institution.clone(), *before);
        }
        self.trail.revert(&undo.change);
        self.head = undo.head;
        self.tree = undo.tree;
    }

    /// Takes over an entry from elsewhere after checking everything about it.
    pub fn replay(&mut self, entry: &Entry) -> Result<(), BookError> {
        self.follows(entry.seq, entry.previous)?;
        let scheduler = self.scheduler.ok_or(BookError::NoLedger)?;
        let examined = match entry.dropped {
            None => examine(entry.posting.clone(), scheduler)?,
            Some(digest) => examine_dropped(entry.posting.clone(), scheduler, &entry.gist, digest)?,
        };
        same_gist(&examined, &entry.gist)?;
        self.append_examined(entry.at, examined).map(drop)
    }

    /// As [`Book::replay`] but without the signatures: for entries from one's own disk that were checked when posted.
    pub fn recall(&mut self, entry: &Entry) -> Result<(), BookError> {
        let scheduler = self.scheduler.ok_or(BookError::NoLedger)?;
        self.follows(entry.seq, entry.previous)?;
        let examined = recall(entry, scheduler)?;
        same_gist(&examined, &entry.gist)?;
        self.append_examined(entry.at, examined).map(drop)
    }

    /// Would an entry with this number and predecessor be the next one?
    pub(crate) fn follows(&self, seq: u64, previous: Digest) -> Result<(), BookError> {
        if seq != self.entries() {
            return Err(BookError::Sequence {
                expected: self.entries(),
                found: seq,
            });
        }
        if previous != self.head {
            return Err(BookError::Previous {
                seq,
                expected: self.head,
                found: previous,
            });
        }
        Ok(())
    }
}

/// One digest over all balances: BLAKE3 (context "karez-ledger/1 balances") over each account that is not at zero,
/// in order, as in an entry's legs.
pub fn balances_digest(accounts: &Accounts) -> Digest {
    let mut hasher = blake3::Hasher::new_derive_key("karez-ledger/1 balances");
    let mut leg = Vec::with_capacity(80);
    for (account, balance) in accounts.iter() {
        leg.clear();
        encode_leg(&mut leg, account, balance);
        hasher.update(&leg);
    }
    Digest(*hasher.finalize().as_bytes())
}

/// The hash of an encoded entry; `None` for bytes that are not one as far as that can be seen without reading them.
pub(crate) fn hash_of(encoded: &[u8]) -> Option<Digest> {
    let mut from = Cursor::new(encoded);
    from.skip_skeleton().ok()?;
    let (skeleton, records) = encoded.split_at_checked(from.at)?;
    let digest = match records.split_first()? {
        (0, evidence) => Digest(*derive(&EVIDENCE).update(evidence).finalize().as_bytes()),
        (1, digest) => Digest(digest.try_into().ok()?),
        _ => return None,
    };
    Some(hash_with(skeleton, &digest))
}

static ENTRY: LazyLock<blake3::Hasher> =
    LazyLock::new(|| blake3::Hasher::new_derive_key("karez-ledger/2 entry"));
static EVIDENCE: LazyLock<blake3::Hasher> =
    LazyLock::new(|| blake3::Hasher::new_derive_key("karez-ledger/2 evidence"));

/// A hasher whose context was hashed before.
fn derive(context: &LazyLock<blake3::Hasher>) -> blake3::Hasher {
    blake3::Hasher::clone(context)
}

fn hash_with(skeleton: &[u8], evidence: &Digest) -> Digest {
    Digest(
        *derive(&ENTRY)
            .update(skeleton)
            .update(&evidence.0)
            .finalize()
            .as_bytes(),
    )
}

/// The digest that takes the records' place.
pub(crate) fn evidence_digest(evidence: &[Vec<u8>]) -> Digest {
    static NONE: LazyLock<Digest> = LazyLock::new(|| digest_of(&[]));
    if evidence.is_empty() {
        *NONE
    } else {
        digest_of(evidence)
    }
}

fn digest_of(evidence: &[Vec<u8>]) -> Digest {
    let mut section = Vec::with_capacity(2 + evidence.iter().map(|e| e.len() + 4).sum::<usize>());
    encode_evidence(&mut section, evidence);
    Digest(*derive(&EVIDENCE).update(&section).finalize().as_bytes())
}

fn encode_evidence(out: &mut Vec<u8>, evidence: &[Vec<u8>]) {
    // Checked postings have at most 512 records; anything else cannot be decoded again.
    let count = u16::try_from(evidence.len()).unwrap_or(u16::MAX);
    out.extend_from_slice(&count.to_be_bytes());
    for envelope in evidence {
        let len = u32::try_from(envelope.len()).unwrap_or(u32::MAX);
        out.extend_from_slice(&len.to_be_bytes());
        out.extend_from_slice(envelope);
    }
}

fn same_gist(examined: &Examined, gist: &[u8]) -> Result<(), EvidenceError> {
    if examined.gist() == gist {
        return Ok(());
    }
    Err(EvidenceError::Gist {
        rule: Box::new(Rule::GistUnreadable),
    })
}

pub(crate) fn encode_leg(out: &mut Vec<u8>, account: &Account, amount: i64) {
    match account {
        Account::Federation => out.push(0),
        Account::User(user) => {
            out.push(1);
            out.extend_from_slice(&user.0.0);
        }
        Account::Escrow(job) => {
            out.push(2);
            out.extend_from_slice(&job.0.0);
        }
        Account::Grant(id) => {
            out.push(4);
            out.extend_from_slice(&id.0);
        }
        Account::Disputed(receipt) => {
            out.push(5);
            out.extend_from_slice(&receipt.0);
        }
        Account::Institution(name) => {
            let name = name.as_str().as_bytes();
            out.push(3);
            // Names have at most 63 bytes.
            out.push(name.len() as u8);
            out.extend_from_slice(name);
        }
    }
    out.extend_from_slice(&amount.to_be_bytes());
}

/// The byte of a kind in an encoded entry.
pub(crate) fn kind_byte(kind: PostingKind) -> u8 {
    let at = PostingKind::ALL.iter().position(|k| *k == kind);
    // The list names every kind.
    at.map_or(u8::MAX, |at| at as u8)
}

impl Entry {
    /// The hash that the next entry names.
    pub fn hash(&self) -> Digest {
        self.hash_by(&self.evidence_digest())
    }

    /// The digest of the records, or what took their place.
    pub(crate) fn evidence_digest(&self) -> Digest {
        self.dropped
            .unwrap_or_else(|| evidence_digest(&self.posting.evidence))
    }

    /// The same, when the digest of the records is known.
    pub(crate) fn hash_by(&self, evidence: &Digest) -> Digest {
        let mut skeleton = Vec::with_capacity(512);
        self.encode_skeleton(&mut skeleton);
        hash_with(&skeleton, evidence)
    }

    /// Has it records that may be dropped once its job is over?
    pub(crate) fn can_forget(&self) -> bool {
        self.dropped.is_none() && is_droppable(self.posting.kind)
    }

    /// Without its records: hash, legs and gist stay. `None` for a kind whose records must stay, and for one that has
    /// none left.
    pub fn without_records(&self) -> Option<Self> {
        if !self.can_forget() {
            return None;
        }
        Some(Self {
            dropped: Some(evidence_digest(&self.posting.evidence)),
            posting: Posting {
                kind: self.posting.kind,
                legs: self.posting.legs.clone(),
                evidence: Vec::new(),
            },
            gist: self.gist.clone(),
            ..*self
        })
    }

    /// Bytes of [`Entry::encode`], or some more.
    pub(crate) fn encoded_len(&self) -> usize {
        let evidence: usize = self.posting.evidence.iter().map(|e| e.len() + 4).sum();
        96 + self.posting.legs.len() * 80 + self.gist.len() + evidence
    }

    /// The bytes that are hashed and kept. The layout is documented at the top of this module.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.encoded_len());
        self.encode_skeleton(&mut out);
        self.encode_records(&mut out);
        out
    }

    fn encode_skeleton(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.previous.0);
        out.extend_from_slice(&self.seq.to_be_bytes());
        out.extend_from_slice(&self.at.0.to_be_bytes());
        out.push(kind_byte(self.posting.kind));
        // Checked postings have at most 16 legs; anything else cannot be decoded again.
        out.push(u8::try_from(self.posting.legs.len()).unwrap_or(u8::MAX));
        for (account, amount) in &self.posting.legs {
            encode_leg(out, account, *amount);
        }
        let gist = &self.gist[..self.gist.len().min(GIST_MAX)];
        out.push(gist.len() as u8);
        out.extend_from_slice(gist);
    }

    fn encode_records(&self, out: &mut Vec<u8>) {
        match &self.dropped {
            None => {
                out.push(0);
                encode_evidence(out, &self.posting.evidence);
            }
            Some(digest) => {
                out.push(1);
                out.extend_from_slice(&digest.0);
            }
        }
    }

    /// Reads what [`Entry::encode`] wrote, and nothing else.
    pub fn decode(bytes: &[u8]) -> Result<Self, EntryDecodeError> {
        if bytes.len() > ENTRY_BYTES_MAX {
            return Err(EntryDecodeError {
                why: "it is too large",
                at: 0,
            });
        }
        let mut from = Cursor::new(bytes);
        let previous = Digest(from.array()?);
        let seq = u64::from_be_bytes(from.array()?);
        let at = UtcMillis(u64::from_be_bytes(from.array()?));
        let Some(kind) = PostingKind::ALL.get(usize::from(from.byte()?)).copied() else {
            return from.bad("unknown kind of posting");
        };
        let count = usize::from(from.byte()?);
        if count > LEGS_MAX {
            return from.bad("too many legs");
        }
        let mut legs = Vec::with_capacity(count);
        for _ in 0..count {
            let account = from.account()?;
            legs.push((account, i64::from_be_bytes(from.array()?)));
        }
        let len = usize::from(from.byte()?);
        let gist = from.take(len)?.to_vec();
        let (mut evidence, mut dropped) = (Vec::new(), None);
        match from.byte()? {
            0 => {
                let count = usize::from(u16::from_be_bytes(from.array()?));
                if count > EVIDENCE_MAX {
                    return from.bad("too much evidence");
                }
                evidence.reserve(count);
                for _ in 0..count {
                    let len = u32::from_be_bytes(from.array()?) as usize;
                    evidence.push(from.take(len)?.to_vec());
                }
            }
            1 if is_droppable(kind) => dropped = Some(Digest(from.array()?)),
            _ => return from.bad("neither records nor their digest"),
        }
        if from.at != bytes.len() {
            return from.bad("bytes follow its end");
        }
        Ok(Self {
            seq,
            previous,
            at,
            posting: Posting { kind, legs, evidence },
            gist,
            dropped,
        })
    }
}

/// Reads fields one after the other.
pub(crate) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }
    pub(crate) fn is_done(&self) -> bool {
        self.at == self.bytes.len()
    }
    /// An account, as in a leg.
    pub(crate) fn account(&mut self) -> Result<Account, EntryDecodeError> {
        Ok(match self.byte()? {
            0 => Account::Federation,
            1 => Account::User(UserId(PublicKey(self.array()?))),
            2 => Account::Escrow(JobId(Digest(self.array()?))),
            3 => {
                let len = usize::from(self.byte()?);
                let name = std::str::from_utf8(self.take(len)?)
                    .ok()
                    .and_then(|name| name.parse::<Institution>().ok());
                match name {
                    Some(name) => Account::Institution(name),
                    None => return self.bad("bad name of an institution"),
                }
            }
            4 => Account::Grant(Digest(self.array()?)),
            5 => Account::Disputed(Digest(self.array()?)),
            _ => return self.bad("unknown kind of account"),
        })
    }
    /// Passes over what stands before an entry's records.
    fn skip_skeleton(&mut self) -> Result<(), EntryDecodeError> {
        self.take(32 + 8 + 8 + 1)?;
        for _ in 0..self.byte()? {
            match self.byte()? {
                0 => {}
                3 => {
                    let len = self.byte()?;
                    self.take(len.into())?;
                }
                _ => drop(self.take(32)?),
            }
            self.take(8)?;
        }
        let gist = self.byte()?;
        self.take(gist.into()).map(drop)
    }
    fn bad<T>(&self, why: &'static str) -> Result<T, EntryDecodeError> {
        Err(EntryDecodeError { why, at: self.at })
    }
    pub(crate) fn take(&mut self, len: usize) -> Result<&'a [u8], EntryDecodeError> {
        let Some(taken) = self
            .at
            .checked_add(len)
            .and_then(|end| self.bytes.get(self.at..end))
        else {
            return self.bad("it ends early");
        };
        self.at += len;
        Ok(taken)
    }
    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], EntryDecodeError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }
    pub(crate) fn byte(&mut self) -> Result<u8, EntryDecodeError> {
        self.array::<1>().map(|[b]| b)
    }
}
