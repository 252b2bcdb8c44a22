//! Where all institutions stand at the end of a month: what they owe each other, their accounts and their limits.
use super::{limit, netting::Netting, statement::StatementBuilder, time::Month};
use crate::{book::Entry, verify::Summary};
use karez_core::{
    id::Institution,
    money::{Accounts, PostingError},
    unit::UtcMillis,
};

/// Everything as of the same moment.
#[derive(Debug, Clone)]
pub struct Standing {
    /// The last moment of the month, or that of the export if it came before.
    pub at: UtcMillis,
    /// Flows among institutions up to then.
    pub netting: Netting,
    /// Balances and credit limits then.
    pub accounts: Accounts,
}

/// Collects entries, one by one, in order.
#[derive(Debug)]
pub struct StandingBuilder {
    end: UtcMillis,
    flows: StatementBuilder,
    accounts: Accounts,
}

impl StandingBuilder {
    /// For the end of `month`. The flows are those of all; `any` only has to be somebody.
    pub fn new(month: Month, any: Institution) -> Self {
        Self {
            end: month.end(),
            flows: StatementBuilder::new(any, month),
            accounts: Accounts::default(),
        }
    }

    /// Takes the next entry, which was verified.
    pub fn take(&mut self, entry: &Entry) -> Result<(), PostingError> {
        if entry.at >= self.end {
            return Ok(());
        }
        self.flows.take(entry);
        // As in the book: the balance it allows comes after it.
        self.accounts.apply(&entry.posting)?;
        if let Some((institution, credits)) = limit(&entry.posting) {
            self.accounts.set_limit(institution, credits);
        }
        Ok(())
    }

    /// The standing, from the ledger that was summed up so.
    pub fn finish(self, summary: &Summary) -> Standing {
        let (_, netting) = self.flows.finish(&summary.tree_head);
        Standing {
            at: UtcMillis(self.end.0.saturating_sub(1).min(summary.created.0)),
            netting,
            accounts: self.accounts,
        }
    }
}
