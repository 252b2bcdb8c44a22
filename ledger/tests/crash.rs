//! The durable writer killed, and without power: what was acknowledged is there, and nothing is doubled.
#![allow(clippy::unwrap_used)]
mod common;
#[path = "common/durable.rs"]
mod durable;

use common::*;
use durable::*;
use karez_core::money::Account;
use karez_ledger::store::SledStore;
use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Command, Stdio},
};

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
