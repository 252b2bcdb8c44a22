//! A process's disk: tables of bytes that outlive it.
use karez_core::store::{Change, Stored};
use std::collections::BTreeMap;

/// What a process finds again when it starts.
#[derive(Debug, Clone, Default)]
pub struct Disk {
    tables: BTreeMap<&'static str, BTreeMap<Vec<u8>, Vec<u8>>>,
}

impl Disk {
    /// Carries a change out. Postings go to the book, not here.
    pub fn apply(&mut self, change: &Change) {
        match change {
            Change::Put { table, key, value } => {
                self.tables
                    .entry(table)
                    .or_default()
                    .insert(key.clone(), value.clone());
            }
            Change::Delete { table, key } => {
                if let Some(rows) = self.tables.get_mut(table) {
                    rows.remove(key);
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
                    key: key.clone(),
                    value: value.clone(),
                })
            })
            .collect()
    }

    /// One row.
    pub fn get(&self, table: &str, key: &[u8]) -> Option<&[u8]> {
        self.tables.get(table)?.get(key).map(Vec::as_slice)
    }

    /// The rows of a table.
    pub fn rows(&self, table: &str) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.tables
            .get(table)
            .into_iter()
            .flatten()
            .map(|(key, value)| (key.as_slice(), value.as_slice()))
    }
}
