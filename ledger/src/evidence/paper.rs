//! A record of the evidence: verified, and with its place in every error.
use super::error::{EvidenceError, RecordName, Rule};
use karez_core::{
    money::Account,
    records::{Record, SignatureCheck, Signed, Verified, describe, is_canonical},
};

/// A verified record and its place in the evidence.
pub(super) struct Paper<T> {
    pub(super) index: usize,
    record: Verified<T>,
}

impl<T> std::ops::Deref for Paper<T> {
    type Target = Verified<T>;
    fn deref(&self) -> &Verified<T> {
        &self.record
    }
}

impl<T: Record> Paper<T> {
    pub(super) fn open(by: &dyn SignatureCheck, index: usize, bytes: &[u8]) -> Result<Self, EvidenceError> {
        let record = Signed::<T>::decode(bytes).and_then(|signed| signed.verify_by(by));
        let record = record.map_err(|error| EvidenceError::Record {
            index,
            id: RecordName(describe(bytes).map(|(_, id, _)| id)),
            error: Box::new(error),
        })?;
        let paper = Self { index, record };
        if !is_canonical(bytes) {
            return paper.breaks(Rule::Canonical);
        }
        Ok(paper)
    }

    pub(super) fn breaks<X>(&self, rule: Rule) -> Result<X, EvidenceError> {
        Err(EvidenceError::Rule {
            index: self.index,
            record: T::TYPE,
            id: self.record.id(),
            rule: Box::new(rule),
        })
    }

    pub(super) fn same<V: PartialEq + std::fmt::Display>(
        &self,
        field: &'static str,
        found: V,
        of: &'static str,
        expected: V,
    ) -> Result<(), EvidenceError> {
        if found == expected {
            return Ok(());
        }
        self.breaks(Rule::Field {
            field,
            found: found.to_string(),
            of,
            expected: expected.to_string(),
        })
    }

    pub(super) fn account(&self, found: &Account, expected: Account) -> Result<(), EvidenceError> {
        if *found == expected {
            return Ok(());
        }
        let found = found.clone();
        self.breaks(Rule::Account { found, expected })
    }
}
