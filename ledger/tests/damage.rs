//! The durable writer on bad disks: damage is reported and repaired, a full disk refuses and loses nothing.
#![allow(clippy::unwrap_used)]
mod common;
#[path = "common/durable.rs"]
mod durable;

use common::*;
use durable::*;
use karez_ledger::{Options, StoreError, Writer, store::SledStore};
use std::{
    collections::BTreeMap,
    fs::{self, OpenOptions},
    io::Write,
    os::unix::fs::FileExt,
    path::Path,
    process::{Command, Stdio},
};

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
