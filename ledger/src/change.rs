//! One committed transaction as bytes: what a frame of the journal holds and what the index applies.
use karez_core::{
    id::Digest,
    key::{PublicKey, SchedulerId},
};

/// One step of a committed transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Sets a row.
    Put {
        /// Its table.
        table: String,
        /// Its key.
        key: Vec<u8>,
        /// Its value.
        value: Vec<u8>,
    },
    /// Removes a row.
    Delete {
        /// Its table.
        table: String,
        /// Its key.
        key: Vec<u8>,
    },
    /// Appends an entry of the ledger.
    Entry {
        /// Its number.
        seq: u64,
        /// The encoded entry.
        bytes: Vec<u8>,
    },
}

impl Step {
    /// What it takes in a frame.
    fn size(&self) -> usize {
        match self {
            Self::Put { table, key, value } => 13 + table.len() + key.len() + value.len(),
            Self::Delete { table, key } => 9 + table.len() + key.len(),
            Self::Entry { bytes, .. } => 13 + bytes.len(),
        }
    }
}

/// A committed transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Counts the transactions of a directory, from 1.
    pub number: u64,
    /// In this order.
    pub steps: Vec<Step>,
}

/// What a generation of the journal starts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Base {
    pub(crate) scheduler: Option<SchedulerId>,
    /// The last transaction it contains.
    pub(crate) number: u64,
    pub(crate) entries: u64,
    pub(crate) head: Digest,
    /// Rows in the snapshot that follows.
    pub(crate) rows: u64,
}

/// The payload of a frame.
pub(crate) enum Payload {
    Base(Base),
    Rows(Vec<Step>),
    Steps(Vec<Step>),
}

const BASE: u8 = 0;
const ROWS: u8 = 1;
const STEPS: u8 = 2;

pub(crate) fn encode_base(base: &Base) -> Vec<u8> {
    let mut out = vec![BASE, u8::from(base.scheduler.is_some())];
    out.extend_from_slice(&base.scheduler.map_or([0; 32], |s| s.0.0));
    out.extend_from_slice(&base.number.to_be_bytes());
    out.extend_from_slice(&base.entries.to_be_bytes());
    out.extend_from_slice(&base.head.0);
    out.extend_from_slice(&base.rows.to_be_bytes());
    out
}

pub(crate) fn encode_rows(steps: &[Step]) -> Vec<u8> {
    encode(ROWS, steps)
}

pub(crate) fn encode_steps(steps: &[Step]) -> Vec<u8> {
    encode(STEPS, steps)
}

fn encode(tag: u8, steps: &[Step]) -> Vec<u8> {
    let size: usize = steps.iter().map(Step::size).sum();
    let mut out = Vec::with_capacity(5 + size);
    out.push(tag);
    // Lengths are capped far below 32 bits before a transaction comes here.
    out.extend_from_slice(&(steps.len() as u32).to_be_bytes());
    let bytes = |out: &mut Vec<u8>, bytes: &[u8]| {
        out.extend_from_slice(&(bytes.len() as u32).to_be_bytes());
        out.extend_from_slice(bytes);
    };
    for step in steps {
        match step {
            Step::Put { table, key, value } => {
                out.push(0);
                bytes(&mut out, table.as_bytes());
                bytes(&mut out, key);
                bytes(&mut out, value);
            }
            Step::Delete { table, key } => {
                out.push(1);
                bytes(&mut out, table.as_bytes());
                bytes(&mut out, key);
            }
            Step::Entry { seq, bytes: entry } => {
                out.push(2);
                out.extend_from_slice(&seq.to_be_bytes());
                bytes(&mut out, entry);
            }
        }
    }
    out
}

/// `None` for bytes that no version of the writer made.
pub(crate) fn decode(payload: &[u8]) -> Option<Payload> {
    let mut from = Reader(payload);
    let decoded = match from.byte()? {
        BASE => {
            let known = from.byte()? == 1;
            let key = PublicKey(from.array()?);
            Payload::Base(Base {
                scheduler: known.then_some(SchedulerId(key)),
                number: from.u64()?,
                entries: from.u64()?,
                head: Digest(from.array()?),
                rows: from.u64()?,
            })
        }
        ROWS => Payload::Rows(from.steps()?),
        STEPS => Payload::Steps(from.steps()?),
        _ => return None,
    };
    from.0.is_empty().then_some(decoded)
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.0.split_first_chunk::<N>()?;
        self.0 = tail;
        Some(*head)
    }
    fn byte(&mut self) -> Option<u8> {
        self.array::<1>().map(|[b]| b)
    }
    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }
    fn bytes(&mut self) -> Option<Vec<u8>> {
        let len = u32::from_be_bytes(self.array()?) as usize;
        let (head, tail) = self.0.split_at_checked(len)?;
        self.0 = tail;
        Some(head.to_vec())
    }
    fn text(&mut self) -> Option<String> {
        String::from_utf8(self.bytes()?).ok()
    }
    fn steps(&mut self) -> Option<Vec<Step>> {
        let count = u32::from_be_bytes(self.array()?) as usize;
        // The count is not believed before that many steps were read.
        let mut steps = Vec::with_capacity(count.min(1024));
        for _ in 0..count {
            steps.push(match self.byte()? {
                0 => Step::Put {
                    table: self.text()?,
                    key: self.bytes()?,
                    value: self.bytes()?,
                },
                1 => Step::Delete {
                    table: self.text()?,
                    key: self.bytes()?,
                },
                2 => Step::Entry {
                    seq: self.u64()?,
                    bytes: self.bytes()?,
                },
                _ => return None,
            });
        }
        Some(steps)
    }
}
