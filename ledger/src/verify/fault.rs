//! What can be wrong with an export.
use crate::{
    book::BookError,
    evidence::EvidenceError,
    export::{FORMAT, FORMAT_BEFORE},
    head::{Head, HeadError},
    tree::TreeHash,
};
use karez_core::{id::Digest, key::SchedulerId};

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
    #[error("the format is {found:?}, this verifier reads {FORMAT:?} and {FORMAT_BEFORE:?}")]
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
    /// What is to stay of the records is not what they give.
    #[error("its gist is not what its records give")]
    Gist,
    /// Its records were dropped, and all were asked for.
    #[error("its records were dropped: nobody can check their signatures any more")]
    Dropped,
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
    /// A published head covers more than the file.
    #[error(
        "the file ends before entry {}, but the scheduler signed a head of {} entries: its tail is missing; the head is\n{published}",
        .entries, .published.size
    )]
    Tail {
        /// Entries in the file: the number of the first missing one.
        entries: u64,
        /// What was published.
        published: Box<Head>,
    },
    /// The scheduler signed another history.
    #[error(
        "a fork: the scheduler signed two histories of its first {} entries (up to {agreed} they agree). Published:\n{published}\nthis file:\n{}\n{}\n{computed}",
        .published.size, crate::head::origin(.published.scheduler), .published.size
    )]
    Fork {
        /// What was published.
        published: Box<Head>,
        /// The root over as many entries of the file.
        computed: TreeHash,
        /// The largest number of entries for which a given head agrees with the file.
        agreed: u64,
    },
    /// The head in the trailer cannot be read.
    #[error("the trailer's head: {0}")]
    Head(#[from] HeadError),
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
