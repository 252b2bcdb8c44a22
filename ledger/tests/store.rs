//! The durable writer with both indexes: what was acknowledged is there, whatever happened to process and disk.
#![allow(clippy::unwrap_used)]
mod common;
#[path = "common/redb_store.rs"]
mod redb_store;

use common::*;
use karez_core::{
    id::JobId,
    money::{Account, Posting},
};
use karez_ledger::{
    Book, Op, Options, Recovered, StoreError, Transaction, Writer,
    store::{OpenStore, SledStore},
};
use std::{
    collections::BTreeMap,
    fs::{self, OpenOptions},
    io::{BufRead, BufReader, Write},
    os::unix::fs::FileExt,
    path::Path,
    process::{Command, Stdio},
};

const INDEXES: [(&str, OpenStore); 2] = [("sled", SledStore::open), ("redb", redb_store::open)];

fn options() -> Options {
    Options {
        scheduler: Some(scheduler()),
        free_bytes_min: 0,
        ..Options::default()
    }
}

fn small_journal() -> Options {
    Options {
        journal_bytes_max: 20_000,
        ..options()
    }
}

fn put(key: &str, value: impl Into<Vec<u8>>) -> Op {
    Op::Put {
        table: "jobs",
        key: key.into(),
        value: value.into(),
    }
}

fn delete(key: &str) -> Op {
    Op::Delete {
        table: "jobs",
        key: key.into(),
    }
}

fn post(posting: Posting) -> Op {
    Op::Post(posting, AT)
}

fn tx(ops: impl Into<Vec<Op>>) -> Transaction {
    Transaction { ops: ops.into() }
}

fn rows(recovered: &Recovered) -> BTreeMap<String, Vec<u8>> {
    recovered
        .tables
        .rows("jobs")
        .map(|(k, v)| (String::from_utf8(k.to_vec()).unwrap(), v.to_vec()))
        .collect()
}

fn open(dir: &Path, options: Options, index: OpenStore) -> (Writer, Recovered) {
    Writer::open_with(dir, options, index).unwrap()
}

#[test]
fn rows_and_entries_survive_reopening() {
    for (name, index) in INDEXES {
        let dir = tempfile::tempdir().unwrap();
        let mut book = Book::new(scheduler());
        {
            let (writer, recovered) = open(dir.path(), options(), index);
            assert_eq!(recovered.book.entries(), 0);
            for (i, posting) in postings(4).into_iter().enumerate() {
                let entry = book.append(AT, posting.clone()).unwrap();
                let done = writer
                    .commit_blocking(tx([
                        put(&format!("k{i}"), "v"),
                        post(posting),
                        put("last", i.to_string()),
                    ]))
                    .unwrap();
                assert_eq!((done.number, done.entries[0].seq), (i as u64 + 1, entry.seq));
                assert_eq!(done.entries[0].hash, book.head());
            }
            writer
                .commit_blocking(tx([delete("k0"), delete("never")]))
                .unwrap();
            assert_eq!(writer.head(), (book.entries(), book.head()));
            assert_eq!(writer.accounts(), *book.accounts());
        }
        let (writer, recovered) = open(dir.path(), options(), index);
        assert_eq!(recovered.report, Vec::<String>::new(), "{name}");
        assert_eq!(recovered.book.head(), book.head());
        let rows = rows(&recovered);
        assert_eq!(rows.len() as u64, book.entries());
        assert!(!rows.contains_key("k0"));
        assert_eq!(rows["last"], (book.entries() - 1).to_string().into_bytes());
        let mut copy = Book::new(scheduler());
        for entry in writer.entries(0) {
            copy.replay(&entry.unwrap()).unwrap();
        }
        assert_eq!(copy.head(), book.head());
        let tail: Vec<_> = writer.entries(book.entries() - 2).map(Result::unwrap).collect();
        assert_eq!(tail.len(), 2);
    }
}

#[test]
fn compaction_keeps_everything_and_bounds_the_journal() {
    for (name, index) in INDEXES {
        let dir = tempfile::tempdir().unwrap();
        let mut book = Book::new(scheduler());
        let mut largest = 0;
        for round in 0..3 {
            let (writer, recovered) = open(dir.path(), small_journal(), index);
            assert_eq!(recovered.report, Vec::<String>::new(), "{name}");
            assert_eq!(recovered.book.head(), book.head(), "{name}");
            assert_eq!(rows(&recovered).len(), if round == 0 { 0 } else { 5 });
            for i in 0..40 {
                let posting = grant(i % 3, 10);
                book.append(AT, posting.clone()).unwrap();
                let key = format!("k{}", i % 5);
                writer
                    .commit_blocking(tx([post(posting), put(&key, vec![i; 2_000])]))
                    .unwrap();
                largest = largest.max(journal_bytes(dir.path()));
            }
            assert_eq!(writer.entries(0).count() as u64, book.entries());
        }
        assert!(largest < 100_000, "{name}: {largest}");
        let (_writer, recovered) = open(dir.path(), small_journal(), index);
        assert_eq!(rows(&recovered)["k4"], vec![39; 2_000]);
    }
}

fn journal_bytes(dir: &Path) -> u64 {
    let files = fs::read_dir(dir).unwrap().flatten();
    let journals = files.filter(|f| f.file_name().to_string_lossy().starts_with("journal-"));
    journals.map(|f| f.metadata().map_or(0, |m| m.len())).sum()
}

#[test]
fn a_refused_posting_refuses_its_transaction_only() {
    let dir = tempfile::tempdir().unwrap();
    let order = order(0, 1, 10_000_000);
    {
        let (writer, _) = open(dir.path(), options(), SledStore::open);
        writer.commit_blocking(tx([post(grant(0, 100))])).unwrap();
        let error = writer
            .commit_blocking(tx([put("a", "1"), post(grant(0, 5)), post(reserve(&order, 200))]))
            .unwrap_err();
        assert!(matches!(error, StoreError::Refused(_)), "{error}");
        assert!(error.to_string().contains("has 105 micro-credits"), "{error}");
        assert_eq!(writer.balance(&Account::User(user(0))), 100);
        writer.commit_blocking(tx([post(reserve(&order, 100))])).unwrap();
        for (what, op) in [
            ("long key", put(&"k".repeat(5_000), "v")),
            ("long value", put("k", vec![0; 3 << 20])),
            (
                "no table",
                Op::Delete {
                    table: "",
                    key: vec![],
                },
            ),
            (
                "bad table",
                Op::Delete {
                    table: "a\0b",
                    key: vec![],
                },
            ),
        ] {
            assert!(writer.commit_blocking(tx([put("b", "2"), op])).is_err(), "{what}");
        }
    }
    let (writer, recovered) = open(dir.path(), options(), SledStore::open);
    assert!(rows(&recovered).is_empty());
    assert_eq!(writer.balance(&Account::Escrow(JobId(order.id()))), 100);
    assert_eq!(writer.head().0, 2);
}

#[test]
fn concurrent_commits_are_all_there_and_money_is_conserved() {
    for (name, index) in INDEXES {
        let dir = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .build()
            .unwrap();
        let (refused, head) = runtime.block_on(async {
            let (writer, _) = open(dir.path(), options(), index);
            let mut tasks = Vec::new();
            for n in 0..64u8 {
                let writer = writer.clone();
                tasks.push(tokio::spawn(async move {
                    let mut refused = 0;
                    for i in 0..6u64 {
                        let key = format!("{n}/{i}");
                        // Every third asks for more than anybody can have.
                        let op = if i % 3 == 2 {
                            post(reserve(&order(n, u64::from(n) * 100 + i, 1 << 60), 1 << 60))
                        } else {
                            post(grant(n, 10))
                        };
                        match writer.commit(tx([put(&key, "x"), op])).await {
                            Ok(_) => {}
                            Err(StoreError::Refused(_)) => refused += 1,
                            Err(other) => panic!("{other}"),
                        }
                    }
                    refused
                }));
            }
            let mut refused = 0;
            for task in tasks {
                refused += task.await.unwrap();
            }
            assert_eq!(writer.accounts().sum(), 0);
            (refused, writer.head())
        });
        assert_eq!((refused, head.0), (128, 256), "{name}");
        let (_writer, recovered) = open(dir.path(), options(), index);
        assert_eq!((recovered.book.entries(), recovered.book.head()), head);
        assert_eq!(rows(&recovered).len(), 256);
    }
}

#[test]
fn one_process_and_one_ledger_per_directory() {
    let dir = tempfile::tempdir().unwrap();
    let (writer, _) = open(
        dir.path(),
        Options {
            scheduler: None,
            ..options()
        },
        SledStore::open,
    );
    let error = writer.commit_blocking(tx([post(grant(0, 1))])).unwrap_err();
    assert!(error.to_string().contains("keeps no ledger"), "{error}");
    writer.commit_blocking(tx([put("a", "1")])).unwrap();
    let error = Writer::open(dir.path(), options()).unwrap_err().to_string();
    assert!(
        error.contains(&dir.path().display().to_string()) && error.contains("in use"),
        "{error}"
    );
    drop(writer);
    // A node's directory becomes a scheduler's: what was there stays.
    let (writer, recovered) = open(dir.path(), options(), SledStore::open);
    assert_eq!(rows(&recovered).len(), 1);
    writer.commit_blocking(tx([post(grant(0, 1))])).unwrap();
    drop((writer, recovered));
    for other in [None, Some(karez_core::key::SchedulerId(user(0).0))] {
        let error = Writer::open(
            dir.path(),
            Options {
                scheduler: other,
                ..options()
            },
        )
        .unwrap_err();
        assert!(matches!(error, StoreError::OtherLedger { .. }), "{error}");
    }
    assert_eq!(open(dir.path(), options(), SledStore::open).0.head().0, 1);
}

/// Fills a directory and gives what must be in it.
fn filled(dir: &Path, options: Options, index: OpenStore) -> (BTreeMap<String, Vec<u8>>, Book) {
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

fn copy_dir(from: &Path, to: &Path) {
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

fn check(
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
struct Lcg(u64);
impl Lcg {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n.max(1)
    }
}

fn damage(path: &Path, random: &mut Lcg, bytes: u64) -> u64 {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let len = file.metadata().unwrap().len();
    let at = random.below(len);
    for i in at..(at + bytes).min(len) {
        let mut byte = [0];
        file.read_exact_at(&mut byte, i).unwrap();
        file.write_all_at(&[byte[0] ^ (1 << random.below(8))], i).unwrap();
    }
    at
}

#[test]
fn a_damaged_index_is_rebuilt_from_the_journal() {
    for (name, index) in INDEXES {
        let whole = tempfile::tempdir().unwrap();
        let expected = filled(whole.path(), small_journal(), index);
        let file = if name == "sled" { "index/db" } else { "index/redb" };
        let mut repaired = 0;
        for seed in 0..16 {
            let dir = tempfile::tempdir().unwrap();
            copy_dir(whole.path(), dir.path());
            let mut random = Lcg(seed);
            let what = match seed % 4 {
                0 => format!(
                    "{name}: 1 byte at {}",
                    damage(&dir.path().join(file), &mut random, 1)
                ),
                1 => format!(
                    "{name}: 64 bytes at {}",
                    damage(&dir.path().join(file), &mut random, 64)
                ),
                2 => {
                    let f = OpenOptions::new()
                        .write(true)
                        .open(dir.path().join(file))
                        .unwrap();
                    let len = random.below(f.metadata().unwrap().len());
                    f.set_len(len).unwrap();
                    format!("{name}: cut to {len}")
                }
                _ => format!(
                    "{name}: 20000 bytes at {}",
                    damage(&dir.path().join(file), &mut random, 20_000)
                ),
            };
            repaired += usize::from(!check(dir.path(), index, &expected, &what).is_empty());
            assert_eq!(
                check(dir.path(), index, &expected, &what),
                Vec::<String>::new(),
                "{what}, again"
            );
        }
        println!("{name}: {repaired} of 16 needed a rebuild");
        assert!(repaired > 0, "{name}");
        let dir = tempfile::tempdir().unwrap();
        copy_dir(whole.path(), dir.path());
        fs::remove_dir_all(dir.path().join("index")).unwrap();
        check(dir.path(), index, &expected, "no index at all");
    }
}

#[test]
fn a_damaged_journal_is_replaced_from_the_index() {
    let whole = tempfile::tempdir().unwrap();
    let expected = filled(whole.path(), small_journal(), SledStore::open);
    let journal = fs::read_dir(whole.path())
        .unwrap()
        .flatten()
        .find(|f| f.file_name().to_string_lossy().starts_with("journal-"))
        .unwrap()
        .file_name();
    for seed in 0..24 {
        let dir = tempfile::tempdir().unwrap();
        copy_dir(whole.path(), dir.path());
        let mut random = Lcg(seed);
        let file = if seed % 2 == 0 {
            journal.clone()
        } else {
            "entries".into()
        };
        let at = damage(&dir.path().join(&file), &mut random, 1);
        let what = format!("{} at {at}", file.to_string_lossy());
        let report = check(dir.path(), SledStore::open, &expected, &what).join("\n");
        assert!(report.contains("at byte"), "{what}: {report}");
        assert_eq!(
            check(dir.path(), SledStore::open, &expected, &what),
            Vec::<String>::new(),
            "{what}"
        );
    }
    // With both gone nothing is invented.
    let dir = tempfile::tempdir().unwrap();
    copy_dir(whole.path(), dir.path());
    damage(&dir.path().join("entries"), &mut Lcg(5), 1);
    fs::remove_dir_all(dir.path().join("index")).unwrap();
    let error = Writer::open(dir.path(), options()).unwrap_err();
    assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
    assert!(error.to_string().contains("backup"), "{error}");
}

#[test]
fn a_torn_tail_is_cut_and_reported() {
    let dir = tempfile::tempdir().unwrap();
    let expected = filled(dir.path(), options(), SledStore::open);
    let journal = dir.path().join("journal-000001");
    let len = fs::metadata(&journal).unwrap().len();
    for tail in [
        &b"KZJ1"[..],
        &[0; 100],
        b"KZJ1\0\0\x10\0half a header and then some",
    ] {
        let mut file = OpenOptions::new().append(true).open(&journal).unwrap();
        file.write_all(tail).unwrap();
        let report = check(dir.path(), SledStore::open, &expected, "torn");
        assert!(
            report.join("\n").contains(&format!("cut {} bytes", tail.len())),
            "{report:?}"
        );
        assert_eq!(fs::metadata(&journal).unwrap().len(), len);
    }
}

const CHILD_DIR: &str = "KAREZ_LEDGER_TEST_DIR";

/// The body of the child that gets killed. Says each commit once it is acknowledged.
#[test]
fn writer_child() {
    let Ok(dir) = std::env::var(CHILD_DIR) else { return };
    let (writer, recovered) = open(Path::new(&dir), small_journal(), SledStore::open);
    let start = recovered.book.entries();
    let threads: Vec<_> = (0..4u64)
        .map(|thread| {
            let writer = writer.clone();
            std::thread::spawn(move || {
                for i in 0.. {
                    let key = format!("{start}/{thread}/{i}");
                    let ops = [put(&key, vec![1; 300]), post(grant(thread as u8, 1))];
                    let done = writer.commit_blocking(tx(ops)).unwrap();
                    println!("\nacked {key} {} {}", done.entries[0].seq, done.entries[0].hash);
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

#[test]
fn what_was_acknowledged_survives_kill_9() {
    let dir = tempfile::tempdir().unwrap();
    let mut acknowledged = BTreeMap::new();
    let mut random = Lcg(1);
    let rounds = if std::env::var_os("KAREZ_LONG").is_some() {
        300
    } else {
        6
    };
    for round in 0..rounds {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "writer_child", "--nocapture", "--test-threads=1"])
            .env(CHILD_DIR, dir.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let wanted = 1 + random.below(120);
        let mut seen = 0;
        for line in BufReader::new(child.stdout.take().unwrap()).lines() {
            let line = line.unwrap();
            let Some(rest) = line.strip_prefix("acked ") else {
                continue;
            };
            let fields: Vec<_> = rest.split(' ').collect();
            // The kill may cut the very last line.
            if let [key, seq, hash] = fields[..]
                && hash.len() == 64
            {
                acknowledged.insert(key.to_owned(), (seq.parse::<u64>().unwrap(), hash.to_owned()));
            }
            seen += 1;
            if seen == wanted {
                child.kill().unwrap();
            }
        }
        child.wait().unwrap();
        let (writer, recovered) = open(dir.path(), small_journal(), SledStore::open);
        let rows = rows(&recovered);
        // One row and one entry per transaction: nothing half, nothing doubled.
        assert_eq!(rows.len() as u64, recovered.book.entries(), "round {round}");
        let hashes: Vec<_> = writer.entries(0).map(|e| e.unwrap().hash().to_string()).collect();
        for (key, (seq, hash)) in &acknowledged {
            assert!(
                rows.contains_key(key),
                "round {round}: {key} was acknowledged and is gone"
            );
            assert_eq!(&hashes[*seq as usize], hash, "round {round}");
        }
        let total: i64 = (0..4).map(|n| writer.balance(&Account::User(user(n)))).sum();
        assert_eq!(total as u64, recovered.book.entries());
    }
    assert!(acknowledged.len() >= 6, "{}", acknowledged.len());
}

#[test]
fn a_full_disk_refuses_and_recovers() {
    let mount = tempfile::tempdir().unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=24m", "tmpfs"])
        .arg(mount.path())
        .stderr(Stdio::null())
        .status();
    if !mounted.is_ok_and(|s| s.success()) {
        println!("skipped: mounting a small tmpfs needs root");
        return;
    }
    struct Unmount<'a>(&'a Path);
    impl Drop for Unmount<'_> {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg("-l").arg(self.0).status();
        }
    }
    let _unmount = Unmount(mount.path());
    // With the margin the writer refuses early; without it the disk itself does.
    for (round, free_bytes_min) in [(0, 4 << 20), (1, 0)] {
        let dir = mount.path().join(format!("ledger-{round}"));
        let given = Options {
            free_bytes_min,
            ..options()
        };
        let (writer, _) = open(&dir, given.clone(), SledStore::open);
        let mut sure = BTreeMap::new();
        for i in 0..20 {
            let key = format!("a{i}");
            writer
                .commit_blocking(tx([put(&key, "v"), post(grant(0, 1))]))
                .unwrap();
            sure.insert(key, b"v".to_vec());
        }
        let ballast = mount.path().join("ballast");
        let mut file = fs::File::create(&ballast).unwrap();
        while file.write_all(&[1; 1 << 16]).is_ok() {}
        while file.write_all(&[1; 1]).is_ok() {}
        let mut refused = 0;
        for i in 0..10 {
            let key = format!("b{i}");
            match writer.commit_blocking(tx([put(&key, vec![2; 100_000]), post(grant(0, 1))])) {
                Ok(_) => {
                    sure.insert(key, vec![2; 100_000]);
                }
                Err(error) => {
                    refused += 1;
                    assert!(matches!(error, StoreError::DiskFull { .. }), "{error}");
                    assert!(error.to_string().contains(&dir.display().to_string()), "{error}");
                }
            }
        }
        assert!(refused > 0);
        // Open files keep their room.
        drop(file);
        fs::remove_file(&ballast).unwrap();
        let mut done = 0;
        for i in 0..10 {
            let key = format!("c{i}");
            writer
                .commit_blocking(tx([put(&key, "w"), post(grant(0, 1))]))
                .unwrap();
            sure.insert(key, b"w".to_vec());
            done += 1;
        }
        assert_eq!(done, 10);
        let head = writer.head();
        assert_eq!(head.0 as usize, sure.len());
        drop(writer);
        let (writer, recovered) = open(&dir, given, SledStore::open);
        assert_eq!(rows(&recovered), sure);
        assert_eq!(writer.head(), head);
        drop(writer);
        fs::remove_dir_all(&dir).unwrap();
    }
}

/// Says each commit once it is acknowledged, and keeps a file beside the ledger that nobody syncs.
#[test]
fn power_cut_child() {
    let Ok(dir) = std::env::var(POWER_DIR) else { return };
    let dir = Path::new(&dir);
    let (writer, recovered) = open(&dir.join("ledger"), small_journal(), SledStore::open);
    let start = recovered.book.entries();
    let mut unsynced = fs::File::create(dir.join("unsynced")).unwrap();
    for i in 0.. {
        unsynced.write_all(&[b'x'; 512]).unwrap();
        let key = format!("{start}/{i}");
        let ops = [put(&key, vec![1; 300]), post(grant(0, 1))];
        let done = writer.commit_blocking(tx(ops)).unwrap();
        println!("\nacked {key} {}", done.entries[0].seq);
    }
}

const POWER_DIR: &str = "KAREZ_LEDGER_POWER_DIR";

/// The power goes while a ledger on a file system of its own is written: what the disk holds at that moment is all there
/// is. The disk is a file; stopping the process and copying the file is the cut, since whatever was only in the file
/// system's memory is not in the copy.
#[test]
fn what_was_acknowledged_survives_a_power_cut() {
    let dir = tempfile::tempdir().unwrap();
    let (image, cut) = (dir.path().join("disk"), dir.path().join("cut"));
    let (at, after) = (dir.path().join("at"), dir.path().join("after"));
    for place in [&at, &after] {
        fs::create_dir(place).unwrap();
    }
    let run = |program: &str, args: &[&std::ffi::OsStr]| {
        let done = Command::new(program)
            .args(args)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        done.is_ok_and(|status| status.success())
    };
    struct Mounted<'a>(&'a Path);
    impl Drop for Mounted<'_> {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg(self.0).status();
        }
    }
    fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
    let options = std::ffi::OsStr::new("loop,commit=600");
    let mount = |image: &Path, at: &Path| {
        run(
            "mount",
            &["-o".as_ref(), options, image.as_os_str(), at.as_os_str()],
        )
    };
    if !run("mkfs.ext4", &["-q".as_ref(), image.as_os_str()]) || !mount(&image, &at) {
        println!("skipped: a file system in a file needs root, mkfs.ext4 and loop devices");
        return;
    }
    let rounds = if std::env::var_os("KAREZ_LONG").is_some() {
        60
    } else {
        4
    };
    let _mounted = Mounted(&at);
    let (mut random, mut lost) = (Lcg(5), 0);
    for round in 0..rounds {
        let work = at.join(format!("round-{round}"));
        fs::create_dir(&work).unwrap();
        // The folder itself is there before the power goes.
        assert!(run("sync", &["-f".as_ref(), at.as_os_str()]));
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "power_cut_child", "--nocapture", "--test-threads=1"])
            .env(POWER_DIR, &work)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let wanted = 1 + random.below(150);
        let mut acknowledged = Vec::new();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        while (acknowledged.len() as u64) < wanted {
            let line = lines.next().unwrap().unwrap();
            let Some((key, seq)) = line.strip_prefix("acked ").and_then(|rest| rest.split_once(' ')) else {
                continue;
            };
            acknowledged.push((key.to_owned(), seq.parse::<u64>().unwrap()));
        }
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
        // All of its threads, also one that is just syncing.
        let stopped = |task: &fs::DirEntry| {
            let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T'))
        };
        let tasks = format!("/proc/{}/task", child.id());
        while !fs::read_dir(&tasks).unwrap().flatten().all(|task| stopped(&task)) {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        fs::copy(&image, &cut).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(mount(&cut, &after), "round {round}");
        let mounted = Mounted(&after);
        let found = after.join(format!("round-{round}"));
        let unsynced = fs::metadata(found.join("unsynced")).map_or(0, |m| m.len());
        lost += u64::from(unsynced < acknowledged.len() as u64 * 512);
        let (writer, recovered) = open(&found.join("ledger"), small_journal(), SledStore::open);
        let rows = rows(&recovered);
        assert_eq!(rows.len() as u64, recovered.book.entries(), "round {round}");
        for (key, seq) in &acknowledged {
            assert!(
                rows.contains_key(key),
                "round {round}: {key} was acknowledged and is gone"
            );
            assert!(*seq < recovered.book.entries());
        }
        assert_eq!(
            writer.entries(0).map(Result::unwrap).count() as u64,
            recovered.book.entries()
        );
        drop(writer);
        drop(mounted);
        fs::remove_dir_all(&work).unwrap();
    }
    // Or the cut would not have been one.
    assert!(lost > 0, "what nobody synced was there every time");
}

/// A ledger with an entry of every kind, and with a job, a grant and a dispute still open.
fn with_open_ends() -> (Vec<Posting>, Book) {
    let mut postings = all_kinds(3);
    postings.push(fund(&grant_record(77, |g| g.nonce = 9)));
    let open = order(2, 555, 5_000);
    postings.push(reserve(&open, 5_000));
    let settled = Part::of(&open, 0, 1).settle();
    postings.push(settled.clone());
    postings.push(dispute(&settled, 2, |_| {}).0);
    let mut book = Book::new(scheduler());
    for posting in &postings {
        book.append(AT, posting.clone()).unwrap();
    }
    (postings, book)
}

#[test]
fn the_book_is_the_same_from_its_snapshot_and_without_it() {
    for (name, index) in INDEXES {
        let dir = tempfile::tempdir().unwrap();
        let (postings, book) = with_open_ends();
        {
            let (writer, _) = open(dir.path(), options(), index);
            for posting in postings {
                writer.commit_blocking(tx([post(posting)])).unwrap();
            }
        }
        let snapshot = dir.path().join("book");
        let whole = fs::read(&snapshot).unwrap();
        let again = || {
            let (writer, recovered) = open(dir.path(), options(), index);
            assert_eq!(recovered.report, Vec::<String>::new(), "{name}");
            assert_eq!(recovered.book, book, "{name}");
            assert_eq!(writer.tree(), (book.entries(), book.tree().root()));
        };
        again();
        // Damaged, cut, gone: made from the entries again.
        for at in (0..whole.len()).step_by(whole.len() / 7) {
            let mut bad = whole.clone();
            bad[at] ^= 1;
            fs::write(&snapshot, &bad).unwrap();
            again();
        }
        fs::write(&snapshot, &whole[..whole.len() / 2]).unwrap();
        again();
        fs::remove_file(&snapshot).unwrap();
        again();
        // Of another history: as a whole file from elsewhere would be.
        let other = tempfile::tempdir().unwrap();
        {
            let (writer, _) = open(other.path(), options(), index);
            writer.commit_blocking(tx([post(grant(5, 3))])).unwrap();
        }
        fs::copy(other.path().join("book"), &snapshot).unwrap();
        again();
    }
}

#[test]
fn proofs_hold_and_their_files_are_put_back() {
    let dir = tempfile::tempdir().unwrap();
    let (postings, book) = with_open_ends();
    let receipt = postings
        .iter()
        .position(|p| p.kind == karez_core::money::PostingKind::Settle)
        .unwrap();
    let id = papers(&postings[receipt]).1.id();
    {
        let (writer, _) = open(dir.path(), options(), SledStore::open);
        for posting in postings {
            writer.commit_blocking(tx([post(posting)])).unwrap();
        }
    }
    let check = |repaired: bool| {
        let (writer, recovered) = open(dir.path(), options(), SledStore::open);
        assert_eq!(
            recovered.report.len(),
            usize::from(repaired),
            "{:?}",
            recovered.report
        );
        let (size, root) = writer.tree();
        assert_eq!((size, root), (book.entries(), book.tree().root()));
        assert_eq!(writer.find(&id).unwrap(), Some(receipt as u64));
        assert_eq!(writer.find(&karez_core::id::Digest([9; 32])).unwrap(), None);
        for index in 0..size {
            let head = karez_ledger::Head::sign(&scheduler_secret(), size, root);
            let proof = writer.prove(index, head).unwrap().unwrap();
            assert_eq!(proof.verify().unwrap().seq, index);
        }
        for old in 0..=size {
            let before = writer.root_at(old).unwrap().unwrap();
            let path = writer.prove_consistency(old, size).unwrap().unwrap();
            karez_ledger::tree::verify_consistency((old, before), (size, root), &path).unwrap();
        }
        assert_eq!(writer.prove_consistency(1, size + 1).unwrap(), None);
    };
    check(false);
    for name in ["tree", "records"] {
        let path = dir.path().join(name);
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..whole.len() / 2]).unwrap();
        check(true);
        assert_eq!(fs::read(&path).unwrap(), whole);
        fs::remove_file(&path).unwrap();
        // Gone without a trace, as in a directory from before there were such files: nothing to report.
        check(false);
        assert_eq!(fs::read(&path).unwrap(), whole);
    }
}

#[test]
fn a_hundred_at_once_on_a_balance_for_ten_are_exactly_ten() {
    let dir = tempfile::tempdir().unwrap();
    let (writer, _) = open(dir.path(), options(), SledStore::open);
    writer.commit_blocking(tx([post(grant(0, 1_000))])).unwrap();
    let taken = std::thread::scope(|scope| {
        let tries: Vec<_> = (0..100)
            .map(|nonce| {
                let writer = writer.clone();
                scope.spawn(move || {
                    let posting = reserve(&order(0, nonce, 100), 100);
                    match writer.commit_blocking(tx([post(posting)])) {
                        Ok(_) => true,
                        Err(StoreError::Refused(why)) => {
                            assert!(why.to_string().contains("the posting takes 100"), "{why}");
                            false
                        }
                        Err(other) => panic!("{other}"),
                    }
                })
            })
            .collect();
        tries
            .into_iter()
            .map(|t| t.join().unwrap())
            .filter(|taken| *taken)
            .count()
    });
    assert_eq!(taken, 10);
    assert_eq!(writer.balance(&Account::User(user(0))), 0);
    assert_eq!(writer.accounts().sum(), 0);
}
