//! Checks an export from the file and public keys alone.
//!
//! Every byte of the file counts: each line must be exactly what the exporter would have written for its content, and
//! the signed trailer covers them all. Every rule that a posting passed when it was made is checked again, signatures
//! included. The first fault ends the reading and names its line, its entry and its record.
//!
//! Memory is bounded by a few lines at a time, plus what the rules remember: the balances, about 100 bytes per job and
//! 40 per settled lease. Signatures are checked on all cores.
use crate::{
    book::{Book, BookError, balances_digest},
    evidence::{EvidenceError, Examined, examine},
    export::{FORMAT, Header, LINE_BYTES_MAX, Line, Trailer, to_line},
};
use base64::{Engine, prelude::BASE64_STANDARD};
use karez_core::{
    id::{Digest, Institution},
    key::SchedulerId,
    money::Posting,
    unit::{Credits, DeviceMillis, UtcMillis},
};
use serde::{Serialize, de::DeserializeOwned};
use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufRead, Read},
    num::NonZero,
    thread,
};

/// Lines checked together, and bytes of them.
const BATCH_LINES: usize = 256;
const BATCH_BYTES: usize = 8 << 20;

/// What the verifier takes as given.
#[derive(Debug, Clone, Default)]
pub struct VerifyOptions {
    /// Schedulers whose ledgers are accepted; `None` accepts any and leaves the judgement to the reader of the summary.
    pub keys: Option<BTreeSet<SchedulerId>>,
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
    /// Signed records checked.
    pub records: u64,
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

/// The first thing wrong with an export, and where.
#[derive(Debug, thiserror::Error)]
#[error("line {line}{}: {kind}", entry.map(|e| format!(" (entry {e})")).unwrap_or_default())]
pub struct Fault {
    /// From 1.
    pub line: u64,
    /// The entry that should stand there, from 0; `None` for header and trailer.
    pub entry: Option<u64>,
    /// What is wrong.
    pub kind: Box<FaultKind>,
}

/// What can be wrong with an export.
#[derive(Debug, thiserror::Error)]
pub enum FaultKind {
    /// The file cannot be read.
    #[error("cannot read: {0}")]
    Io(#[from] std::io::Error),
    /// A line without an end.
    #[error("the line is longer than {max} bytes")]
    TooLong {
        /// The limit.
        max: usize,
    },
    /// Not the JSON that belongs here.
    #[error("not {expected}: {why}")]
    Unreadable {
        /// What should stand here.
        expected: &'static str,
        /// What the parser says.
        why: String,
    },
    /// The same content in other bytes.
    #[error(
        "not written the one way an export is written (spaces, order or spelling), so its bytes were changed"
    )]
    NotCanonical,
    /// Another format.
    #[error("the format is {found:?}, this verifier reads {FORMAT:?}")]
    Format {
        /// What the header says.
        found: String,
    },
    /// Nobody the reader trusts.
    #[error("the ledger is of scheduler {scheduler}, which is not among the given keys")]
    Untrusted {
        /// Whose it is.
        scheduler: SchedulerId,
    },
    /// The entry is not the next one of the chain: something was dropped, repeated, reordered or spliced in.
    #[error("{0}: an entry was dropped, repeated, moved or brought from elsewhere")]
    Chain(BookError),
    /// The legs break double entry, or an account goes under its limit.
    #[error(transparent)]
    Book(BookError),
    /// A record does not prove what the entry claims.
    #[error(transparent)]
    Evidence(EvidenceError),
    /// The content is not what was hashed.
    #[error("its hash is {found}, its content hashes to {expected}")]
    Hash {
        /// Of the content.
        expected: Digest,
        /// In the line.
        found: Digest,
    },
    /// The end is missing.
    #[error("the file ends here without its signed trailer: its tail was cut off")]
    Truncated,
    /// The trailer is about another ledger, or about another state of this one.
    #[error("the trailer says {field} is {found}, the entries give {expected}")]
    Trailer {
        /// Which figure.
        field: &'static str,
        /// In the trailer.
        found: String,
        /// From the entries.
        expected: String,
    },
    /// The scheduler did not sign this.
    #[error("the {what} is not signed by scheduler {scheduler}")]
    Signature {
        /// Header or trailer.
        what: &'static str,
        /// Who should have.
        scheduler: SchedulerId,
    },
    /// Something follows the end.
    #[error("bytes follow the trailer")]
    AfterTrailer,
}

impl From<BookError> for FaultKind {
    fn from(error: BookError) -> Self {
        match error {
            BookError::Sequence { .. } | BookError::Previous { .. } => Self::Chain(error),
            BookError::Evidence(error) => Self::Evidence(error),
            error => Self::Book(error),
        }
    }
}

/// Reads and checks a whole export with bounded memory. The first fault ends it.
pub fn verify(reader: &mut dyn BufRead, options: &VerifyOptions) -> Result<Summary, Fault> {
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
    let mut audit = Audit::new(&header);
    loop {
        let batch = lines.batch().map_err(|kind| Fault {
            line: lines.number,
            entry: Some(lines.number.saturating_sub(2)),
            kind: Box::new(kind),
        })?;
        for line in &batch.entries {
            hasher.update(line);
        }
        audit.take(&batch.entries)?;
        let fault = |kind| Fault {
            line: audit.line + 1,
            entry: None,
            kind: Box::new(kind),
        };
        match batch.end {
            End::More => {}
            End::Cut => return Err(fault(FaultKind::Truncated)),
            End::Trailer(line) => {
                let trailer = parse(&line, "a trailer").map_err(fault)?;
                let digest = Digest(*hasher.finalize().as_bytes());
                audit.check_trailer(&trailer, digest).map_err(fault)?;
                if lines.next().map_or(true, |more| more.is_some()) {
                    return Err(fault(FaultKind::AfterTrailer));
                }
                return Ok(audit.summary(trailer.balances));
            }
        }
    }
}

fn check_header(header: &Header, options: &VerifyOptions) -> Result<(), FaultKind> {
    if header.format != FORMAT {
        let found = header.format.chars().take(40).collect();
        return Err(FaultKind::Format { found });
    }
    let scheduler = header.scheduler;
    check_signature(scheduler, "header", &header.message(), &header.signature)?;
    match &options.keys {
        Some(keys) if !keys.contains(&scheduler) => Err(FaultKind::Untrusted { scheduler }),
        _ => Ok(()),
    }
}

fn check_signature(
    scheduler: SchedulerId,
    what: &'static str,
    message: &str,
    signature: &str,
) -> Result<(), FaultKind> {
    let mut bytes = [0; 64];
    let wrong = FaultKind::Signature { what, scheduler };
    if hex::decode_to_slice(signature, &mut bytes).is_err() {
        return Err(wrong);
    }
    // The one spelling of hex is the lower-case one.
    if hex::encode(bytes) != signature {
        return Err(FaultKind::NotCanonical);
    }
    scheduler.0.verify(message.as_bytes(), &bytes).map_err(|_| wrong)
}

/// Reads one line's content and makes sure that it is written the one right way.
fn parse<T: Serialize + DeserializeOwned>(line: &[u8], expected: &'static str) -> Result<T, FaultKind> {
    let unreadable = |e: serde_json::Error| FaultKind::Unreadable {
        expected,
        why: e.to_string(),
    };
    let value: T = serde_json::from_slice(line).map_err(unreadable)?;
    if to_line(&value).map_err(unreadable)? != line {
        return Err(FaultKind::NotCanonical);
    }
    Ok(value)
}

struct Lines<'a> {
    reader: &'a mut dyn BufRead,
    /// The line read last, from 1.
    number: u64,
}

struct Batch {
    entries: Vec<Vec<u8>>,
    end: End,
}

enum End {
    More,
    Cut,
    Trailer(Vec<u8>),
}

impl Lines<'_> {
    /// The next line with its newline; `None` when the file ends, or ends within a line.
    fn next(&mut self) -> Result<Option<Vec<u8>>, FaultKind> {
        let mut line = Vec::new();
        self.number += 1;
        let mut limited = (&mut *self.reader).take(LINE_BYTES_MAX as u64 + 1);
        limited.read_until(b'\n', &mut line)?;
        if line.last() == Some(&b'\n') {
            return Ok(Some(line));
        }
        if line.len() > LINE_BYTES_MAX {
            return Err(FaultKind::TooLong { max: LINE_BYTES_MAX });
        }
        if line.is_empty() {
            Ok(None)
        } else {
            Err(FaultKind::Truncated)
        }
    }

    fn batch(&mut self) -> Result<Batch, FaultKind> {
        let mut entries = Vec::new();
        let mut bytes = 0;
        while entries.len() < BATCH_LINES && bytes < BATCH_BYTES {
            match self.next() {
                Ok(Some(line)) if line.starts_with(b"{\"entries\":") => {
                    let end = End::Trailer(line);
                    return Ok(Batch { entries, end });
                }
                Ok(Some(line)) => {
                    bytes += line.len();
                    entries.push(line);
                }
                // Entries before the end are looked at first: the first fault counts.
                Ok(None) | Err(FaultKind::Truncated) => {
                    return Ok(Batch {
                        entries,
                        end: End::Cut,
                    });
                }
                Err(other) => return Err(other),
            }
        }
        Ok(Batch {
            entries,
            end: End::More,
        })
    }
}

/// What one line holds once its own content was checked.
struct Checked {
    seq: u64,
    previous: Digest,
    hash: Digest,
    at: UtcMillis,
    records: u64,
    examined: Result<Examined, EvidenceError>,
}

fn check_line(line: &[u8], scheduler: SchedulerId) -> Result<Checked, FaultKind> {
    let line: Line = parse(line, "an entry")?;
    let mut evidence = Vec::with_capacity(line.evidence.len());
    for (i, text) in line.evidence.iter().enumerate() {
        evidence.push(BASE64_STANDARD.decode(text).map_err(|e| FaultKind::Unreadable {
            expected: "base64",
            why: format!("evidence {i}: {e}"),
        })?);
    }
    let posting = Posting {
        kind: line.kind,
        legs: line.legs,
        evidence,
    };
    Ok(Checked {
        seq: line.seq,
        previous: line.previous,
        hash: line.hash,
        at: line.at,
        records: posting.evidence.len() as u64,
        examined: examine(posting, scheduler),
    })
}

/// Checks lines by themselves, on all cores.
fn check_lines(lines: &[Vec<u8>], scheduler: SchedulerId) -> Vec<Result<Checked, FaultKind>> {
    let cores = thread::available_parallelism().map_or(1, NonZero::get);
    let share = lines.len().div_ceil(cores).max(8);
    thread::scope(|scope| {
        let parts: Vec<_> = lines
            .chunks(share)
            .map(|part| {
                let work = move || {
                    part.iter()
                        .map(|line| check_line(line, scheduler))
                        .collect::<Vec<_>>()
                };
                (part, scope.spawn(work))
            })
            .collect();
        parts
            .into_iter()
            .flat_map(|(part, thread)| {
                // Nothing here panics; if it does, it does so again where it is seen.
                thread
                    .join()
                    .unwrap_or_else(|_| part.iter().map(|line| check_line(line, scheduler)).collect())
            })
            .collect()
    })
}

/// The checks that go from line to line.
struct Audit {
    scheduler: SchedulerId,
    created: UtcMillis,
    book: Book,
    /// The last line that was good.
    line: u64,
    records: u64,
    moved: [Credits; 4],
    institutions: BTreeMap<Institution, Earned>,
}

impl Audit {
    fn new(header: &Header) -> Self {
        Self {
            scheduler: header.scheduler,
            created: header.created,
            book: Book::new(header.scheduler),
            line: 1,
            records: 0,
            moved: [Credits::ZERO; 4],
            institutions: BTreeMap::new(),
        }
    }

    fn take(&mut self, lines: &[Vec<u8>]) -> Result<(), Fault> {
        for checked in check_lines(lines, self.scheduler) {
            checked.and_then(|c| self.take_one(c)).map_err(|kind| Fault {
                line: self.line + 1,
                entry: Some(self.book.entries()),
                kind: Box::new(kind),
            })?;
            self.line += 1;
        }
        Ok(())
    }

    fn take_one(&mut self, checked: Checked) -> Result<(), FaultKind> {
        self.book.follows(checked.seq, checked.previous)?;
        let examined = checked.examined.map_err(FaultKind::Evidence)?;
        let kind = examined.posting().kind;
        let given: u64 = examined
            .posting()
            .legs
            .iter()
            .filter_map(|(_, leg)| u64::try_from(*leg).ok())
            .fold(0, u64::saturating_add);
        let settled = examined.claim().settled().cloned();
        self.book.append_examined(checked.at, examined)?;
        if self.book.head() != checked.hash {
            return Err(FaultKind::Hash {
                expected: self.book.head(),
                found: checked.hash,
            });
        }
        let moved = &mut self.moved[usize::from(crate::book::kind_byte(kind))];
        *moved = moved.saturating_add(Credits(given));
        self.records += checked.records;
        if let Some(settled) = settled {
            let earned = self.institutions.entry(settled.institution).or_default();
            earned.receipts += 1;
            earned.billed = earned.billed.saturating_add(settled.billed);
            earned.credits = earned.credits.saturating_add(settled.credits);
        }
        Ok(())
    }

    fn check_trailer(&self, trailer: &Trailer, lines: Digest) -> Result<(), FaultKind> {
        let balances = balances_digest(self.book.accounts());
        for (field, found, expected) in [
            (
                "entries",
                trailer.entries.to_string(),
                self.book.entries().to_string(),
            ),
            ("head", trailer.head.to_string(), self.book.head().to_string()),
            ("balances", trailer.balances.to_string(), balances.to_string()),
            ("lines", trailer.lines.to_string(), lines.to_string()),
        ] {
            if found != expected {
                return Err(FaultKind::Trailer {
                    field,
                    found,
                    expected,
                });
            }
        }
        let message = trailer.message(self.scheduler, self.created);
        check_signature(self.scheduler, "trailer", &message, &trailer.signature)
    }

    fn summary(self, balances: Digest) -> Summary {
        let [granted, reserved, settled, released] = self.moved;
        Summary {
            scheduler: self.scheduler,
            created: self.created,
            entries: self.book.entries(),
            head: self.book.head(),
            balances,
            records: self.records,
            granted,
            reserved,
            settled,
            released,
            institutions: self.institutions,
        }
    }
}
