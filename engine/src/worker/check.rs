//! Trying the sandbox out on this machine.
use std::fmt;
use std::path::Path;

use super::sandbox;
use crate::protocol::Isolation;

/// What a sandboxed process could and could not do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IsolationCheck {
    /// The tier that was reached.
    pub isolation: Isolation,
    /// What was tried, and whether it worked.
    pub attempts: Vec<(&'static str, bool)>,
}

impl fmt::Display for IsolationCheck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "isolation: {}", self.isolation)?;
        self.attempts
            .iter()
            .try_for_each(|(what, worked)| writeln!(f, "{what}: {}", if *worked { "yes" } else { "no" }))
    }
}

/// Closes the sandbox around **this process, for good**, then tries what a worker must and must not be able to do,
/// with `model` in the place of the model. To be called before any other thread exists.
pub fn check_isolation(model: &Path) -> IsolationCheck {
    let scratch = std::env::temp_dir().join(format!("karez-isolation-{}", std::process::id()));
    let isolation = sandbox::close(Some(model), None, None, None);
    let parent = rustix::process::getppid();
    let attempts = vec![
        ("read its model", std::fs::File::open(model).is_ok()),
        (
            "start a thread",
            std::thread::Builder::new()
                .spawn(|| ())
                .is_ok_and(|thread| thread.join().is_ok()),
        ),
        ("read /etc/passwd", std::fs::read("/etc/passwd").is_ok()),
        ("list /", std::fs::read_dir("/").is_ok()),
        ("write a file", std::fs::write(&scratch, b"").is_ok()),
        (
            "open an internet socket",
            std::net::TcpListener::bind("127.0.0.1:0").is_ok(),
        ),
        (
            "open a datagram socket",
            std::net::UdpSocket::bind("127.0.0.1:0").is_ok(),
        ),
        (
            "open a local socket",
            std::os::unix::net::UnixDatagram::unbound().is_ok(),
        ),
        (
            "start a program",
            std::process::Command::new("/bin/true").status().is_ok(),
        ),
        (
            "signal another process",
            parent.is_some_and(|parent| rustix::process::test_kill_process(parent).is_ok()),
        ),
    ];
    // Where the file system stays open, nothing is to be left behind in it.
    let _ = std::fs::remove_file(&scratch);
    IsolationCheck { isolation, attempts }
}
