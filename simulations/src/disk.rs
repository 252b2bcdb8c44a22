//! A process's disk: tables of bytes that outlive it.
use karez_core::store::{Change, Stored};
use std::collections::BTreeMap;

/// What a process finds again when it starts.
#[derive(Debug, Clone, Default)]
pub struct Disk {
    tables: BTreeMap<&'static str, Rows>,
}

type Rows = BTreeMap<Box<[u8]>, Box<[u8]>>;

impl Disk {
    /// Carries a change out. Postings go to the book, not here.
    pub fn apply(&mut self, change: Change) {
        match change {
            Change::Put { table, key, value } => {
                let rows = self.tables.entry(table).or_default();
                rows.insert(key.into(), value.into());
            }
            Change::Delete { table, key } => {
                if let Some(rows) = self.tables.get_mut(table) {
                    rows.remove(key.as_slice());
                    if rows.is_empty() {
                        self.tables.remove(table);
                    }
                }
            }
            Change::Post { .. } => {}
        }
    }

    /// Loses a table.
    pub fn wipe(&mut self, table: &str) {
        self.tables.remove(table);
    }

    /// Everything, by table and key.
    pub fn read(&self) -> Vec<Stored> {
        self.tables
            .iter()
            .flat_map(|(table, rows)| {
                rows.iter().map(|(key, value)| Stored {
                    table: (*table).to_owned(),
                    key: key.to_vec(),
                    value: value.to_vec(),
                })
            })
            .collect()
    }

    /// One row.
    pub fn get(&self, table: &str, key: &[u8]) -> Option<&[u8]> {
        self.tables.get(table)?.get(key).map(AsRef::as_ref)
    }

    /// The rows of a table.
    pub fn rows(&self, table: &str) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.rows_from(table, &[])
    }

    /// The rows of a table from that key on.
    pub fn rows_from(&self, table: &str, first: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.tables
            .get(table)
            .map(|rows| rows.range::<[u8], _>((std::ops::Bound::Included(first), std::ops::Bound::Unbounded)))
            .into_iter()
            .flatten()
            .map(|(key, value)| (key.as_ref(), value.as_ref()))
    }
}
