//! A second index: if redb passes the same tests, the trait says enough.
use karez_ledger::{
    StoreError, Tables,
    store::{Change, Step, Store},
};
use redb::{Database, Durability, ReadableDatabase, ReadableTable, TableDefinition};
use std::path::{Path, PathBuf};

const ROWS: TableDefinition<(&str, &[u8]), &[u8]> = TableDefinition::new("rows");
const ENTRIES: TableDefinition<u64, &[u8]> = TableDefinition::new("entries");
const META: TableDefinition<&str, u64> = TableDefinition::new("meta");

struct RedbStore {
    db: Database,
    path: PathBuf,
}

pub(crate) fn open(dir: &Path) -> Result<Box<dyn Store>, StoreError> {
    std::fs::create_dir_all(dir).unwrap();
    let path = dir.join("redb");
    let fault = |why: String| StoreError::Index {
        path: dir.to_owned(),
        why,
    };
    let db = Database::create(&path).map_err(|e| fault(e.to_string()))?;
    let store = RedbStore { db, path };
    store.with(|db| {
        let tx = db.begin_write()?;
        tx.open_table(ROWS)?;
        tx.open_table(ENTRIES)?;
        tx.open_table(META)?;
        Ok(tx.commit()?)
    })?;
    Ok(Box::new(store))
}

impl RedbStore {
    fn with<T>(&self, work: impl FnOnce(&Database) -> Result<T, redb::Error>) -> Result<T, StoreError> {
        work(&self.db).map_err(|e| StoreError::Index {
            path: self.path.clone(),
            why: e.to_string(),
        })
    }
}

impl Store for RedbStore {
    fn apply(&self, changes: &[Change]) -> Result<(), StoreError> {
        self.with(|db| {
            let mut tx = db.begin_write()?;
            tx.set_durability(Durability::None)?;
            {
                let mut rows = tx.open_table(ROWS)?;
                let mut entries = tx.open_table(ENTRIES)?;
                let mut meta = tx.open_table(META)?;
                for change in changes {
                    for step in &change.steps {
                        match step {
                            Step::Put { table, key, value } => {
                                rows.insert((table.as_str(), key.as_slice()), value.as_slice())?;
                            }
                            Step::Delete { table, key } => {
                                rows.remove((table.as_str(), key.as_slice()))?;
                            }
                            Step::Entry { seq, bytes } => {
                                entries.insert(seq, bytes.as_slice())?;
                            }
                        }
                    }
                    meta.insert("applied", change.number)?;
                }
            }
            Ok(tx.commit()?)
        })
    }

    fn sync(&self) -> Result<(), StoreError> {
        self.with(|db| {
            let mut tx = db.begin_write()?;
            tx.set_durability(Durability::Immediate)?;
            Ok(tx.commit()?)
        })
    }

    fn applied(&self) -> Result<u64, StoreError> {
        self.with(|db| {
            let meta = db.begin_read()?.open_table(META)?;
            Ok(meta.get("applied")?.map_or(0, |v| v.value()))
        })
    }

    fn tables(&self) -> Result<Tables, StoreError> {
        self.with(|db| {
            let rows = db.begin_read()?.open_table(ROWS)?;
            let mut out = Tables::default();
            for row in rows.iter()? {
                let (key, value) = row?;
                let (table, key) = key.value();
                out.put(table, key.to_vec(), value.value().to_vec());
            }
            Ok(out)
        })
    }

    fn entries(&self, from: u64, count: usize) -> Result<Vec<Vec<u8>>, StoreError> {
        self.with(|db| {
            let entries = db.begin_read()?.open_table(ENTRIES)?;
            let page = entries.range(from..)?.take(count);
            page.map(|row| Ok(row?.1.value().to_vec())).collect()
        })
    }
}
