//! The book as it stood after some entry, in a file beside the journal: opening then needs to understand only the entries since.
//!
//! ```text
//! dir/book = "KZB2" state BLAKE3(state)
//! ```
//!
//! It is derived: a file that is missing, damaged, of another version or of another history is passed over, and the
//! book is made from the entries instead.
use crate::{
    book::{Book, Cursor, encode_leg},
    evidence::{Frozen, Job, Trail},
    store::StoreError,
    tree::{Frontier, TreeHash},
};
use karez_core::{
    id::{Digest, Institution, JobId},
    key::{PublicKey, SchedulerId, UserId},
    money::Accounts,
    records::{Grant, Record},
    unit::{Credits, UtcMillis},
};
use prost::Message;
use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
};

const MAGIC: &[u8] = b"KZB2";

fn path(dir: &Path) -> PathBuf {
    dir.join("book")
}

/// Writes the book. By rename, so that a crash leaves the file before it.
pub(crate) fn write(dir: &Path, book: &Book) -> Result<(), StoreError> {
    let Some(state) = encode(book) else {
        return Ok(());
    };
    let (path, temporary) = (path(dir), dir.join("book.tmp"));
    let digest = blake3::hash(&state);
    File::create(&temporary)
        .and_then(|mut file| {
            file.write_all(MAGIC)?;
            file.write_all(&state)?;
            file.write_all(digest.as_bytes())?;
            file.sync_all()
        })
        .and_then(|()| fs::rename(&temporary, &path))
        .map_err(|e| StoreError::write(&path, "write it", &e, state.len() as u64))
}

/// Reads the book of `scheduler`; `None` for whatever is not a whole one.
pub(crate) fn read(dir: &Path, scheduler: SchedulerId) -> Option<Book> {
    let bytes = fs::read(path(dir)).ok()?;
    let state = bytes.strip_prefix(MAGIC)?;
    let (state, digest) = state.split_at_checked(state.len().checked_sub(32)?)?;
    if blake3::hash(state).as_bytes() != digest {
        return None;
    }
    decode(state).filter(|book| book.scheduler() == Some(scheduler))
}

fn name(out: &mut Vec<u8>, name: &Institution) {
    // Names have at most 63 bytes.
    out.push(name.as_str().len() as u8);
    out.extend_from_slice(name.as_str().as_bytes());
}

fn number(out: &mut Vec<u8>, n: u64) {
    out.extend_from_slice(&n.to_be_bytes());
}

pub(crate) fn encode(book: &Book) -> Option<Vec<u8>> {
    let (accounts, trail, tree) = (book.accounts(), book.trail(), book.tree());
    let mut out = Vec::with_capacity(1024 + trail.leases.len() * 24 + trail.marks.len() * 16);
    out.extend_from_slice(&book.scheduler()?.0.0);
    out.extend_from_slice(&book.head().0);
    number(&mut out, tree.size());
    tree.peaks()
        .iter()
        .for_each(|peak| out.extend_from_slice(&peak.0));
    number(&mut out, accounts.iter().count() as u64);
    accounts
        .iter()
        .for_each(|(account, balance)| encode_leg(&mut out, account, balance));
    number(&mut out, accounts.limits().count() as u64);
    for (institution, limit) in accounts.limits() {
        name(&mut out, institution);
        number(&mut out, limit.0);
    }
    number(&mut out, trail.jobs.len() as u64);
    for (id, job) in &trail.jobs {
        out.extend_from_slice(&id.0.0);
        out.extend_from_slice(&job.user.0.0);
        for n in [job.reserved, job.own, job.settled] {
            number(&mut out, n);
        }
        out.push(u8::from(job.grant.is_some()));
        out.extend_from_slice(&job.grant.map_or([0; 32], |id| id.0));
    }
    number(&mut out, trail.leases.len() as u64);
    for (mark, receipt) in &trail.leases {
        out.extend_from_slice(mark);
        out.extend_from_slice(receipt);
    }
    number(&mut out, trail.marks.len() as u64);
    trail.marks.iter().for_each(|mark| out.extend_from_slice(mark));
    number(&mut out, trail.invitations.len() as u64);
    for (id, uses) in &trail.invitations {
        out.extend_from_slice(&id.0);
        number(&mut out, u64::from(*uses));
    }
    number(&mut out, trail.grants.len() as u64);
    for (id, grant) in &trail.grants {
        let grant = grant.to_wire().encode_to_vec();
        out.extend_from_slice(&id.0);
        number(&mut out, grant.len() as u64);
        out.extend_from_slice(&grant);
    }
    number(&mut out, trail.disputes.len() as u64);
    for (id, frozen) in &trail.disputes {
        out.extend_from_slice(&id.0);
        out.extend_from_slice(&frozen.receipt.0);
        out.extend_from_slice(&frozen.user.0.0);
        name(&mut out, &frozen.institution);
        number(&mut out, frozen.credits.0);
    }
    number(&mut out, trail.limits.len() as u64);
    for (institution, at) in &trail.limits {
        name(&mut out, institution);
        number(&mut out, at.0);
    }
    number(&mut out, u64::from(trail.rate_card));
    number(&mut out, u64::from(trail.floors));
    Some(out)
}

/// Reads fields one after the other; what it reads was hashed, so that lengths are those that were written.
struct Reader<'a>(Cursor<'a>);

impl Reader<'_> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.0.array().ok()
    }
    fn number(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }
    fn digest(&mut self) -> Option<Digest> {
        self.array().map(Digest)
    }
    fn name(&mut self) -> Option<Institution> {
        let len = usize::from(self.0.byte().ok()?);
        std::str::from_utf8(self.0.take(len).ok()?).ok()?.parse().ok()
    }
}

pub(crate) fn decode(state: &[u8]) -> Option<Book> {
    let mut from = Reader(Cursor::new(state));
    let scheduler = SchedulerId(PublicKey(from.array()?));
    let head = from.digest()?;
    let size = from.number()?;
    let peaks = (0..size.count_ones()).map(|_| from.array().map(TreeHash));
    let tree = Frontier::from_parts(size, peaks.collect::<Option<_>>()?)?;
    let mut accounts = Accounts::default();
    for _ in 0..from.number()? {
        let account = from.0.account().ok()?;
        accounts.restore(account, i64::from_be_bytes(from.array()?));
    }
    for _ in 0..from.number()? {
        let institution = from.name()?;
        accounts.set_limit(institution, Credits(from.number()?));
    }
    let mut trail = Trail::default();
    for _ in 0..from.number()? {
        let id = JobId(from.digest()?);
        let user = UserId(PublicKey(from.array()?));
        let (reserved, own, settled) = (from.number()?, from.number()?, from.number()?);
        let granted = from.0.byte().ok()? == 1;
        let job = Job {
            user,
            reserved,
            own,
            settled,
            grant: Some(from.digest()?).filter(|_| granted),
        };
        trail.jobs.insert(id, job);
    }
    let leases = from.number()?;
    // Not believed beyond what the file can hold.
    trail.leases.reserve((leases as usize).min(state.len() / 24));
    for _ in 0..leases {
        trail.leases.insert(from.array()?, from.array()?);
    }
    let marks = from.number()?;
    trail.marks.reserve((marks as usize).min(state.len() / 16));
    for _ in 0..marks {
        trail.marks.insert(from.array()?);
    }
    for _ in 0..from.number()? {
        let id = from.digest()?;
        trail.invitations.insert(id, u32::try_from(from.number()?).ok()?);
    }
    for _ in 0..from.number()? {
        let id = from.digest()?;
        let len = usize::try_from(from.number()?).ok()?;
        let wire = karez_proto::records::Grant::decode(from.0.take(len).ok()?).ok()?;
        trail.grants.insert(id, Grant::from_wire(wire).ok()?);
    }
    for _ in 0..from.number()? {
        let id = from.digest()?;
        let frozen = Frozen {
            receipt: from.digest()?,
            user: UserId(PublicKey(from.array()?)),
            institution: from.name()?,
            credits: Credits(from.number()?),
        };
        trail.disputes.insert(id, frozen);
    }
    for _ in 0..from.number()? {
        let institution = from.name()?;
        trail.limits.insert(institution, UtcMillis(from.number()?));
    }
    trail.rate_card = u32::try_from(from.number()?).ok()?;
    trail.floors = u32::try_from(from.number()?).ok()?;
    from.0
        .is_done()
        .then(|| Book::restore(scheduler, accounts, head, tree, trail))
}
