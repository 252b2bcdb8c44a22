//! The checks that go from line to line: the chain, the balances, the tree, the trailer.
use super::{
    Earned, Summary, VerifyOptions,
    check::{Checked, check_signature},
    fault::{Fault, FaultKind},
};
use crate::{
    book::{Book, Entry, balances_digest},
    export::{Header, Trailer},
    head::Head,
};
use karez_core::{
    id::{Digest, Institution},
    key::SchedulerId,
    money::PostingKind,
    unit::{Credits, UtcMillis},
};
use std::collections::BTreeMap;

/// The checks that go from line to line.
pub(super) struct Audit<'a> {
    options: &'a VerifyOptions,
    scheduler: SchedulerId,
    created: UtcMillis,
    pub(super) book: Book,
    /// Given heads that agreed, and the size of the largest.
    heads: usize,
    agreed: u64,
    /// The last line that was good.
    pub(super) line: u64,
    records: u64,
    dropped: u64,
    moved: [Credits; PostingKind::ALL.len()],
    institutions: BTreeMap<Institution, Earned>,
}

impl<'a> Audit<'a> {
    pub(super) fn new(header: &Header, options: &'a VerifyOptions) -> Self {
        Self {
            options,
            heads: 0,
            agreed: 0,
            scheduler: header.scheduler,
            created: header.created,
            book: Book::new(header.scheduler),
            line: 1,
            records: 0,
            dropped: 0,
            moved: [Credits::ZERO; PostingKind::ALL.len()],
            institutions: BTreeMap::new(),
        }
    }

    pub(super) fn take(
        &mut self,
        lines: Vec<Result<Checked, FaultKind>>,
        each: &mut dyn FnMut(&Entry) -> std::io::Result<()>,
    ) -> Result<(), Fault> {
        for checked in lines {
            checked
                .and_then(|c| self.take_one(c, each))
                .map_err(|kind| Fault {
                    line: self.line + 1,
                    entry: Some(self.book.entries()),
                    kind: Box::new(kind),
                })?;
            self.line += 1;
            self.check_heads()?;
        }
        Ok(())
    }

    /// Do the published heads of just this size agree?
    pub(super) fn check_heads(&mut self) -> Result<(), Fault> {
        let size = self.book.entries();
        let Some(published) = self.options.heads.get(&size) else {
            return Ok(());
        };
        let computed = self.book.tree().root();
        for head in published.iter().filter(|h| h.scheduler == self.scheduler) {
            if head.root != computed {
                return Err(Fault {
                    line: self.line,
                    entry: size.checked_sub(1),
                    kind: Box::new(FaultKind::Fork {
                        published: Box::new(head.clone()),
                        computed,
                        agreed: self.agreed,
                    }),
                });
            }
            self.heads += 1;
            self.agreed = size;
        }
        Ok(())
    }

    /// Is there a head of more entries than there are?
    pub(super) fn check_tail(&self) -> Result<(), Fault> {
        let entries = self.book.entries();
        let beyond = self
            .options
            .heads
            .range(entries + 1..)
            .flat_map(|(_, heads)| heads);
        let mut beyond = beyond.filter(|h| h.scheduler == self.scheduler);
        let Some(published) = beyond.next_back() else {
            return Ok(());
        };
        Err(Fault {
            line: self.line + 1,
            entry: Some(entries),
            kind: Box::new(FaultKind::Tail {
                entries,
                published: Box::new(published.clone()),
            }),
        })
    }

    fn take_one(
        &mut self,
        checked: Checked,
        each: &mut dyn FnMut(&Entry) -> std::io::Result<()>,
    ) -> Result<(), FaultKind> {
        self.book.follows(checked.seq, checked.previous)?;
        let examined = checked.examined.map_err(FaultKind::Evidence)?;
        if examined.gist() != checked.gist {
            return Err(FaultKind::Gist);
        }
        if checked.dropped && self.options.whole {
            return Err(FaultKind::Dropped);
        }
        let kind = examined.posting().kind;
        let given: u64 = examined
            .posting()
            .legs
            .iter()
            .filter_map(|(_, leg)| u64::try_from(*leg).ok())
            .fold(0, u64::saturating_add);
        let settled = examined.claim().settled().cloned();
        self.book.append_hashed(checked.at, &examined, checked.expected)?;
        if checked.expected != checked.hash {
            return Err(FaultKind::Hash {
                expected: checked.expected,
                found: checked.hash,
            });
        }
        let moved = &mut self.moved[usize::from(crate::book::kind_byte(kind))];
        *moved = moved.saturating_add(Credits(given));
        self.records += checked.records;
        self.dropped += u64::from(checked.dropped);
        if let Some(settled) = settled {
            let earned = self.institutions.entry(settled.institution).or_default();
            earned.receipts += 1;
            earned.billed = earned.billed.saturating_add(settled.billed);
            earned.credits = earned.credits.saturating_add(settled.credits);
        }
        each(&examined.into_entry(checked.seq, checked.previous, checked.at))?;
        Ok(())
    }

    pub(super) fn check_trailer(&self, trailer: &Trailer, lines: Digest) -> Result<Head, FaultKind> {
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
        let head = Head::parse(&trailer.checkpoint)?;
        // The note has one spelling, or two files could differ in their bytes and both be right.
        if head.to_string() != trailer.checkpoint || head.note.signatures.len() != 1 {
            return Err(FaultKind::NotCanonical);
        }
        for (field, found, expected) in [
            (
                "the head's scheduler",
                head.scheduler.to_string(),
                self.scheduler.to_string(),
            ),
            (
                "the head's size",
                head.size.to_string(),
                self.book.entries().to_string(),
            ),
            (
                "the head's root",
                head.root.to_string(),
                self.book.tree().root().to_string(),
            ),
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
        check_signature(self.scheduler, "trailer", &message, &trailer.signature)?;
        Ok(head)
    }

    pub(super) fn summary(self, balances: Digest, tree_head: Head) -> Summary {
        let [granted, reserved, settled, released, ..] = self.moved;
        Summary {
            scheduler: self.scheduler,
            created: self.created,
            entries: self.book.entries(),
            head: self.book.head(),
            balances,
            tree_head,
            heads: self.heads,
            disputes_open: self.book.disputes_open(),
            records: self.records,
            dropped: self.dropped,
            granted,
            reserved,
            settled,
            released,
            institutions: self.institutions,
        }
    }
}
