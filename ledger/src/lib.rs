//! Signed usage accounting: chain, double entry, exports anyone can check, and the durable store.
//!
//! Pure rules first: [`book`] (the chain of entries and the balances) and [`evidence`] (what a posting must prove).
//! Then files: [`journal`] (CRC-framed, the truth on disk), [`store`] (the index beside it) and [`writer`] (the one
//! durable writer of a daemon, for ledger and state alike). Last, what leaves the house: [`mod@export`] and [`mod@verify`].
//!
//! Not here: the records themselves and the arithmetic of money (`karez-core`), and any socket.
//!
//! Start at [`writer::Writer`] to keep a ledger, at [`verify::verify`] to check one.

mod batch;
pub mod book;
mod change;
mod derived;
pub mod evidence;
pub mod export;
pub mod head;
pub mod held;
#[doc(hidden)]
pub mod inside;
pub mod journal;
pub mod note;
mod recovery;
pub mod report;
mod retention;
mod snapshot;
pub mod store;
pub mod tree;
pub mod verify;
pub mod writer;

pub use batch::Checker;
pub use book::{Book, BookError, Entry};
pub use evidence::{EvidenceError, Examined, examine, examine_by};
pub use export::{ExportError, Exporter, export};
pub use head::{Head, Proof};
pub use held::{Held, HeldError};
pub use retention::{Forgotten, forget};
pub use store::{StoreError, Tables};
pub use verify::{Fault, FaultKind, Relation, Summary, VerifyOptions, compare, verify, verify_each};
pub use writer::{Committed, EntryRef, Op, Options, Recovered, Transaction, Writer};
