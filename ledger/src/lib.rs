//! Signed usage accounting: chain, double entry, exports anyone can check, and the durable store.
//!
//! Pure rules first: [`book`] (the chain of entries and the balances) and [`evidence`] (what a posting must prove).
//! Then files: [`journal`] (CRC-framed, the truth on disk), [`store`] (the index beside it) and [`writer`] (the one
//! durable writer of a daemon, for ledger and state alike). Last, what leaves the house: [`export`] and [`verify`].
//!
//! Not here: the records themselves and the arithmetic of money (`karez-core`), and any socket.
//!
//! Start at [`writer::Writer`] to keep a ledger, at [`verify::verify`] to check one.

pub mod book;
mod change;
pub mod evidence;
pub mod export;
pub mod journal;
mod recovery;
pub mod store;
pub mod verify;
pub mod writer;

pub use book::{Book, BookError, Entry};
pub use evidence::{EvidenceError, Examined, examine};
pub use export::{ExportError, export};
pub use store::{StoreError, Tables};
pub use verify::{Fault, Summary, VerifyOptions, verify};
pub use writer::{Committed, EntryRef, Op, Options, Recovered, Transaction, Writer};
