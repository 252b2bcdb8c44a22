//! Killed, cut off and starved: the job ends, is billed once, and nothing is lost.
use crate::net::{Net, karez, kill_9, settlements, signal};
use rustix::process::Signal;
use serde_json::Value;
use std::{
    collections::BTreeSet,
    io::Write,
    net::{TcpStream, UdpSocket},
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

const NODES: [&str; 3] = ["lake-university", "coast-computing", "hill-institute"];

/// Every part settled as done exactly once; attempts that did not finish cost nothing.
fn billed_once(net: &Net, id: &str, parts: usize) {
    let job = net.job(id);
    assert_eq!(job["state"], "done", "{job}\n{}", net.logs());
    let receipts: BTreeSet<String> = job["parts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| p["receipt"].as_str().unwrap_or("").to_owned())
        .collect();
    assert_eq!(receipts.len(), parts, "{job}");
    assert!(!receipts.contains(""), "{job}");
    let ledger = net.verified_ledger();
    let settled = settlements(&ledger, id);
    assert!(settled.len() >= parts, "{settled:?}");
    let moved: i64 = settled
        .iter()
        .flat_map(|line| line["legs"].as_array().unwrap())
        .filter_map(|leg| leg_of(leg, "institution:"))
        .sum();
    let spent = job["spent_microcredits"]
        .as_i64()
        .unwrap_or_else(|| panic!("{job}"));
    assert_eq!(moved, spent, "what institutions received is what the job spent");
}

fn leg_of(leg: &Value, prefix: &str) -> Option<i64> {
    leg[0].as_str()?.starts_with(prefix).then(|| leg[1].as_i64())?
}

/// A node on which some part runs now.
fn busy_node(net: &Net, id: &str) -> String {
    net.until(Duration::from_secs(20), "a part to run", || {
        let job = net.job(id);
        let parts = job["parts"].as_array()?;
        let part = parts.iter().find(|p| p["state"] == "running")?;
        Some(part["institution"].as_str()?.to_owned())
    })
}

#[test]
fn a_killed_node_costs_time_and_is_billed_once() {
    let net = Net::up();
    let id = net.noops(6, 1500, 1);
    let victim = busy_node(&net, &id);
    kill_9(net.pid(&victim));
    net.ended(&id, Duration::from_secs(90));
    billed_once(&net, &id, 6);
}

#[test]
fn a_killed_scheduler_comes_back_with_every_job_and_receipt() {
    let mut net = Net::up();
    let first = net.noops(3, 0, 1);
    net.ended(&first, Duration::from_secs(30));
    let id = net.noops(6, 1500, 1);
    busy_node(&net, &id);
    kill_9(net.pid("scheduler"));
    thread::sleep(Duration::from_millis(500));
    net.restart("scheduler", "scheduler");
    net.ended(&id, Duration::from_secs(90));
    billed_once(&net, &id, 6);
    billed_once(&net, &first, 3);
}

#[test]
fn a_node_that_was_frozen_past_its_lease_cannot_bill_twice() {
    let net = Net::up();
    let id = net.noops(3, 8000, 1);
    let frozen = busy_node(&net, &id);
    let pid = net.pid(&frozen);
    signal(pid, Signal::STOP);
    // Its lease runs out, its part is placed anew and finishes; then the frozen node wakes up with its own result.
    net.ended(&id, Duration::from_secs(120));
    signal(pid, Signal::CONT);
    thread::sleep(Duration::from_secs(5));
    billed_once(&net, &id, 3);
    // And it serves again.
    let again = net.noops(3, 0, 1);
    net.ended(&again, Duration::from_secs(60));
}

#[test]
fn a_killed_node_that_returns_serves_again() {
    let mut net = Net::up();
    for name in NODES {
        kill_9(net.pid(name));
    }
    let id = net.noops(2, 0, 1);
    thread::sleep(Duration::from_secs(1));
    let job = net.job(&id);
    assert_ne!(job["state"], "done", "{job}");
    net.restart("node", NODES[0]);
    net.ended(&id, Duration::from_secs(60));
    billed_once(&net, &id, 2);
}

#[test]
fn an_owner_gets_the_machine_back_and_the_job_goes_on_elsewhere() {
    let net = Net::up();
    let id = net.noops(3, 4000, 1);
    let name = busy_node(&net, &id);
    let dir = net.dir(&name);
    let began = Instant::now();
    net.run(&["node", "reclaim", "--dir", dir.to_str().unwrap()]).ok();
    net.until(Duration::from_secs(15), "the guest to leave", || {
        let status = net
            .run(&["node", "status", "--dir", dir.to_str().unwrap(), "--json"])
            .ok()
            .json();
        status["leases"].as_array()?.is_empty().then_some(())
    });
    assert!(began.elapsed() < Duration::from_secs(15));
    net.ended(&id, Duration::from_secs(60));
    billed_once(&net, &id, 3);
}

#[test]
fn garbage_and_oversized_messages_harm_nothing() {
    let net = Net::up();
    let status = net.run(&["models", "--json"]).ok();
    drop(status);
    let (mut tcp, mut udp) = (BTreeSet::new(), BTreeSet::new());
    for name in ["scheduler", NODES[0], NODES[1], NODES[2]] {
        let (t, u) = ports_of(net.pid(name));
        tcp.extend(t);
        udp.extend(u);
    }
    assert!(tcp.len() >= 3 && !udp.is_empty(), "tcp {tcp:?}, udp {udp:?}");
    let mut garbage = Vec::new();
    let mut x = 0x2545_f491_4f6c_dd1d_u64;
    while garbage.len() < 1 << 20 {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        garbage.extend_from_slice(&x.to_le_bytes());
    }
    for port in tcp {
        for piece in [
            &b"GET / HTTP/1.1\r\n\r\n"[..],
            &[0xff; 9],
            &garbage[..4096],
            &garbage[..],
        ] {
            if let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) {
                let _ = stream.set_write_timeout(Some(Duration::from_secs(2)));
                let _ = stream.write_all(piece);
            }
        }
    }
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    for port in udp {
        for piece in garbage.chunks(1200).take(200) {
            let _ = socket.send_to(piece, ("127.0.0.1", port));
        }
    }
    let id = net.noops(3, 0, 1);
    net.ended(&id, Duration::from_secs(30));
    billed_once(&net, &id, 3);
}

/// Listening TCP and bound UDP ports of a process, by its open sockets.
fn ports_of(pid: i32) -> (Vec<u16>, Vec<u16>) {
    let inodes: BTreeSet<String> = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .flatten()
        .filter_map(|e| std::fs::read_link(e.path()).ok())
        .filter_map(|l| {
            l.to_str()?
                .strip_prefix("socket:[")?
                .strip_suffix(']')
                .map(str::to_owned)
        })
        .collect();
    let read = |table: &str, state: Option<&str>| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap_or_default();
        text.lines()
            .skip(1)
            .filter_map(|line| {
                let f: Vec<&str> = line.split_whitespace().collect();
                let wanted = inodes.contains(*f.get(9)?) && state.is_none_or(|s| f[3] == s);
                let port = f.get(1)?.rsplit(':').next()?;
                wanted.then(|| u16::from_str_radix(port, 16).ok()).flatten()
            })
            .collect::<Vec<u16>>()
    };
    (read("tcp", Some("0A")), read("udp", None))
}

#[test]
fn a_full_disk_refuses_new_work_and_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = Disk::small(dir.path(), 192) else {
        return;
    };
    let net = Net::up_in(disk.0.join("home"));
    let before = net.noops(3, 0, 1);
    net.ended(&before, Duration::from_secs(30));
    let filler = disk.0.join("filler");
    fill(&filler);
    let input = net.file("more.jsonl", "{\"text\":\"x\"}\n");
    let job = net.file(
        "more.toml",
        format!("work = \"noop\"\ninput = {input:?}\n[noop]\nmillis_per_item = 0\n"),
    );
    let refused = net.run(&["submit", &job, "--detach"]);
    assert_ne!(refused.code, 0, "{refused:?}");
    let text = refused.err.to_lowercase();
    assert!(text.contains("disk") || text.contains("space"), "{refused:?}");
    std::fs::remove_file(&filler).unwrap();
    // Room again: everything goes on, and what was settled before still is.
    let after = net.until(Duration::from_secs(60), "work to be accepted again", || {
        let answer = net.run(&["submit", &job, "--detach", "--json"]);
        (answer.code == 0).then(|| answer.json()["job"].as_str().unwrap().to_owned())
    });
    net.ended(&after, Duration::from_secs(60));
    // What the full disk broke beside the journal is rebuilt meanwhile.
    let books = net.path("books.ndjson");
    net.until(Duration::from_secs(30), "the books to be readable again", || {
        (net.run(&["ledger", "export", "-o", books.to_str().unwrap()]).code == 0).then_some(())
    });
    billed_once(&net, &before, 3);
    billed_once(&net, &after, 1);
    drop(net);
}

/// A mounted file system that goes away with the test.
pub(crate) struct Disk(pub(crate) PathBuf);

impl Disk {
    /// A small one in a new folder of `parent`; says so where none can be had.
    pub(crate) fn small(parent: &Path, megabytes: u32) -> Option<Self> {
        let disk = Self(parent.join("disk"));
        std::fs::create_dir(&disk.0).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={megabytes}m"), "tmpfs"])
            .arg(&disk.0)
            .output()
            .is_ok_and(|o| o.status.success());
        if !mounted {
            println!("skipped: a small file system cannot be mounted without privileges");
        }
        mounted.then_some(disk)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}

/// Writes until nothing more fits.
pub(crate) fn fill(path: &Path) {
    let mut file = std::fs::File::create(path).unwrap();
    let block = vec![7; 1 << 16];
    while file.write_all(&block).is_ok() {}
    while file.write_all(&block[..512]).is_ok() {}
}

#[test]
fn ctrl_c_on_the_demo_stops_everything() {
    let dir = tempfile::tempdir().unwrap();
    let home = dir.path().join("home");
    let mut child = karez(&home, &["demo"])
        .env("TMPDIR", dir.path())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let pid = i32::try_from(child.id()).unwrap();
    let began = Instant::now();
    while descendants(dir.path().to_str().unwrap()).len() < 4 {
        assert!(
            began.elapsed() < Duration::from_secs(30),
            "the demo did not start its network"
        );
        thread::sleep(Duration::from_millis(100));
    }
    signal(pid, Signal::INT);
    let asked = Instant::now();
    let status = child.wait().unwrap();
    assert!(
        asked.elapsed() < Duration::from_secs(10),
        "took {:?}",
        asked.elapsed()
    );
    assert_eq!(status.code(), Some(130));
    thread::sleep(Duration::from_millis(500));
    assert_eq!(descendants(dir.path().to_str().unwrap()), Vec::<i32>::new());
}

/// Processes whose command line names that folder.
fn descendants(folder: &str) -> Vec<i32> {
    std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).contains(folder)
        })
        .collect()
}
