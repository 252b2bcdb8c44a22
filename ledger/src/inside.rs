//! The decoders of the ledger's own files, for fuzz targets alone: nothing else may rely on them.
use crate::{
    Book,
    change::{self, Payload},
    journal, snapshot,
};

/// Writes a frame of a journal to the end of `out`.
pub fn frame(out: &mut Vec<u8>, number: u64, payload: &[u8]) {
    journal::encode_frame(out, number, payload);
}

/// Reads what a frame holds, and writes it again.
pub fn change(payload: &[u8]) -> Option<Vec<u8>> {
    Some(match change::decode(payload)? {
        Payload::Base(base) => change::encode_base(&base),
        Payload::Rows(rows) => change::encode_rows(&rows),
        Payload::Steps(steps) => change::encode_steps(&steps),
    })
}

/// Reads the state that stands in the file `book`.
pub fn book(state: &[u8]) -> Option<Book> {
    snapshot::decode(state)
}

/// Writes it; `None` for a book of no scheduler.
pub fn book_bytes(book: &Book) -> Option<Vec<u8>> {
    snapshot::encode(book)
}
