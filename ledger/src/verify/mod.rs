//! Checks an export from the file and public keys alone.
//!
//! Every byte of the file counts: each line must be exactly what the exporter would have written for its content, and
//! the signed trailer covers them all. Every rule that a posting passed when it was made is checked again, signatures
//! included. Published heads, where given, must fit: a tail that was cut off shows, and a second history does. The
//! first fault ends the reading and names its line, its entry and its record.
//!
//! Memory is bounded by a few batches of lines at a time, plus what the rules remember: the balances, about 25 bytes
//! per settled lease, 17 per finished part and per job that is over. Signatures are checked on all cores.
mod audit;
mod check;
mod compare;
mod fault;
mod lines;

pub use compare::{Relation, compare};
pub use fault::{Fault, FaultKind};

use crate::{batch::Checker, book::Entry, export::Header, head::Head};
use audit::Audit;
use check::{check_header, check_lines};
use karez_core::{
    id::{Digest, Institution},
    key::SchedulerId,
    unit::{Credits, DeviceMillis, UtcMillis},
};
use lines::{Batch, End, Lines, Text, parse};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    io::BufRead,
    num::NonZero,
    sync::{Mutex, PoisonError},
    thread::{self, ScopedJoinHandle},
};

/// What the verifier takes as given.
#[derive(Debug, Clone, Default)]
pub struct VerifyOptions {
    /// Schedulers whose ledgers are accepted; `None` accepts any and leaves the judgement to the reader of the summary.
    pub keys: Option<BTreeSet<SchedulerId>>,
    /// Heads that were published, by size. Those of other schedulers are passed over.
    pub heads: BTreeMap<u64, Vec<Head>>,
    /// All records must be there: an entry whose records were dropped is a fault.
    pub whole: bool,
}

impl VerifyOptions {
    /// With these heads.
    #[must_use]
    pub fn with_heads(mut self, heads: impl IntoIterator<Item = Head>) -> Self {
        for head in heads {
            self.heads.entry(head.size).or_default().push(head);
        }
        self
    }
}

/// What one institution earned.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Earned {
    /// Receipts settled.
    pub receipts: u64,
    /// Device time billed.
    pub billed: DeviceMillis,
    /// Credits received.
    pub credits: Credits,
}

/// A ledger that passed every check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// Whose ledger.
    pub scheduler: SchedulerId,
    /// When it was exported.
    pub created: UtcMillis,
    /// Entries.
    pub entries: u64,
    /// Hash of the last one.
    pub head: Digest,
    /// Digest of all balances.
    pub balances: Digest,
    /// The signed tree head at the end of the file.
    pub tree_head: Head,
    /// How many of the given heads were found to agree.
    pub heads: usize,
    /// Disputes that wait for a ruling.
    pub disputes_open: usize,
    /// Signed records checked.
    pub records: u64,
    /// Entries whose records were dropped: chain, tree, balances and what the rules remember of them were checked, the
    /// records' signatures could not be.
    pub dropped: u64,
    /// Credits granted by the federation.
    pub granted: Credits,
    /// Credits set aside for jobs.
    pub reserved: Credits,
    /// Credits paid to institutions.
    pub settled: Credits,
    /// Credits returned to users.
    pub released: Credits,
    /// Who earned what.
    pub institutions: BTreeMap<Institution, Earned>,
}

/// Reads and checks a whole export with bounded memory. The first fault ends it.
pub fn verify(reader: &mut dyn BufRead, options: &VerifyOptions) -> Result<Summary, Fault> {
    verify_each(reader, options, &mut |_| Ok(()))
}

/// As [`verify`], and hands over each entry once everything about it and all before it was checked. What `each` fails
/// with becomes the fault. Entries handed over before a fault are in order by themselves, but nobody signed for them
/// all: use what they add up to only when the summary comes back.
pub fn verify_each(
    reader: &mut dyn BufRead,
    options: &VerifyOptions,
    each: &mut dyn FnMut(&Entry) -> std::io::Result<()>,
) -> Result<Summary, Fault> {
    let mut lines = Lines { reader, number: 0 };
    let at_header = |kind| Fault {
        line: 1,
        entry: None,
        kind: Box::new(kind),
    };
    let first = lines
        .next()
        .map_err(at_header)?
        .ok_or_else(|| at_header(FaultKind::Truncated))?;
    let header: Header = parse(&first, "a header").map_err(at_header)?;
    check_header(&header, options).map_err(at_header)?;

    let mut hasher = blake3::Hasher::new();
    hasher.update(&first);
    let mut audit = Audit::new(&header, options);
    audit.check_heads()?;
    // One more batch under way than there are cores: one is being read or audited here meanwhile.
    let cores = thread::available_parallelism().map_or(1, NonZero::get);
    let checkers = Mutex::new(Vec::new());
    let scheduler = header.scheduler;
    let check = |batch: Text| {
        let lock = || checkers.lock().unwrap_or_else(PoisonError::into_inner);
        let mut checker: Checker = lock().pop().unwrap_or_default();
        let checked = check_lines(&batch, scheduler, &mut checker);
        lock().push(checker);
        checked
    };
    let trailer = thread::scope(|scope| {
        let mut under_way: VecDeque<ScopedJoinHandle<'_, _>> = VecDeque::new();
        loop {
            let Batch { entries, end } = lines.batch();
            hasher.update(&entries.bytes);
            let check = &check;
            under_way.push_back(scope.spawn(move || check(entries)));
            let more = matches!(end, End::More);
            while under_way.len() > if more { cores } else { 0 } {
                let Some(thread) = under_way.pop_front() else {
                    break;
                };
                // A panic there is one here.
                let checked = thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                audit.take(checked, each)?;
            }
            let fault = |kind| Fault {
                line: audit.line + 1,
                entry: None,
                kind: Box::new(kind),
            };
            match end {
                End::More => {}
                End::Trailer(line) => return Ok(line),
                End::Cut => {
                    audit.check_tail()?;
                    return Err(fault(FaultKind::Truncated));
                }
                End::Bad(kind) => {
                    return Err(Fault {
                        entry: Some(audit.book.entries()),
                        ..fault(kind)
                    });
                }
            }
        }
    })?;
    let fault = |kind| Fault {
        line: audit.line + 1,
        entry: None,
        kind: Box::new(kind),
    };
    let trailer = parse(&trailer, "a trailer").map_err(fault)?;
    let digest = Digest(*hasher.finalize().as_bytes());
    let head = audit.check_trailer(&trailer, digest).map_err(fault)?;
    if lines.next().map_or(true, |more| more.is_some()) {
        return Err(fault(FaultKind::AfterTrailer));
    }
    audit.check_tail()?;
    Ok(audit.summary(trailer.balances, head))
}
