//! Writers on directories, with either index, and what must be in them.
#![allow(dead_code, clippy::unwrap_used, missing_docs, unreachable_pub)]
#[path = "redb_store.rs"]
mod redb_store;

use super::common::*;
use karez_core::money::Posting;
use karez_ledger::{
    Book, Op, Options, Recovered, Transaction, Writer,
    store::{OpenStore, SledStore},
};
use std::{collections::BTreeMap, fs, path::Path};

pub const INDEXES: [(&str, OpenStore); 2] = [("sled", SledStore::open), ("redb", redb_store::open)];

pub fn options() -> Options {
    Options {
        scheduler: Some(scheduler()),
        free_bytes_min: 0,
        ..Options::default()
    }
}

pub fn small_journal() -> Options {
    Options {
        journal_bytes_max: 20_000,
        ..options()
    }
}

pub fn put(key: &str, value: impl Into<Vec<u8>>) -> Op {
    Op::Put {
        table: "jobs",
        key: key.into(),
        value: value.into(),
    }
}

pub fn delete(key: &str) -> Op {
    Op::Delete {
        table: "jobs",
        key: key.into(),
    }
}

pub fn post(posting: Posting) -> Op {
    Op::Post(posting, AT)
}

pub fn tx(ops: impl Into<Vec<Op>>) -> Transaction {
    Transaction { ops: ops.into() }
}

pub fn rows(recovered: &Recovered) -> BTreeMap<String, Vec<u8>> {
    recovered
        .tables
        .rows("jobs")
        .map(|(k, v)| (String::from_utf8(k.to_vec()).unwrap(), v.to_vec()))
        .collect()
}

pub fn open(dir: &Path, options: Options, index: OpenStore) -> (Writer, Recovered) {
    Writer::open_with(dir, options, index).unwrap()
}

/// Fills a directory and gives what must be in it.
pub fn filled(dir: &Path, options: Options, index: OpenStore) -> (BTreeMap<String, Vec<u8>>, Book) {
    let mut book = Book::new(scheduler());
    let mut expected = BTreeMap::new();
    let (writer, _) = open(dir, options, index);
    for (i, posting) in postings(12).into_iter().enumerate() {
        book.append(AT, posting.clone()).unwrap();
        let key = format!("k{}", i % 20);
        let value = vec![i as u8; 100 + i];
        writer
            .commit_blocking(tx([post(posting), put(&key, value.clone())]))
            .unwrap();
        expected.insert(key, value);
    }
    (expected, book)
}

pub fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for item in fs::read_dir(from).unwrap().flatten() {
        let target = to.join(item.file_name());
        if item.file_type().unwrap().is_dir() {
            copy_dir(&item.path(), &target);
        } else {
            fs::copy(item.path(), target).unwrap();
        }
    }
}

pub fn check(
    dir: &Path,
    index: OpenStore,
    expected: &(BTreeMap<String, Vec<u8>>, Book),
    what: &str,
) -> Vec<String> {
    let (writer, recovered) =
        Writer::open_with(dir, options(), index).unwrap_or_else(|e| panic!("{what}: {e}"));
    assert_eq!(rows(&recovered), expected.0, "{what}");
    assert_eq!(recovered.book.head(), expected.1.head(), "{what}");
    assert_eq!(recovered.book.accounts(), expected.1.accounts(), "{what}");
    assert_eq!(
        writer.entries(0).map(Result::unwrap).count() as u64,
        expected.1.entries(),
        "{what}"
    );
    recovered.report
}

/// A small generator, so that every run damages the same places.
pub struct Lcg(pub u64);

impl Lcg {
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n.max(1)
    }
}
