//! The owner's socket: one line of JSON in, one line of JSON out, in the node's own directory.
//!
//! Whoever may write there is the owner: the file has mode 0600. The daemon serves it; `karez node status`,
//! `open`, `pause`, `drain` and `reclaim` are its clients, through [`status`] and [`command`].
use crate::files::NodeFiles;
use karez_core::agent::OwnerCommand;
use serde::{Deserialize, Serialize};
use std::{
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    sync::{Semaphore, mpsc, oneshot},
    time::timeout,
};

/// A line is at most this long.
const LINE_MAX: u64 = 1 << 20;
/// Connections at once; further ones wait.
const CONNECTIONS_MAX: usize = 16;
/// Who connects must have asked by then.
const ASK_MAX: Duration = Duration::from_secs(5);
/// The daemon must have answered by then.
const ANSWER_MAX: Duration = Duration::from_secs(20);

/// What the owner can ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Command {
    /// How do you do?
    Status,
    /// Take new leases again.
    Open,
    /// Take no new leases.
    Pause,
    /// Take no new leases, and leave when the last one has ended.
    Drain,
    /// Everybody out, within the grace.
    Reclaim,
}

impl Command {
    /// What it means to the agent; nothing for a mere question.
    pub fn owner(self) -> Option<OwnerCommand> {
        match self {
            Self::Status => None,
            Self::Open => Some(OwnerCommand::Open),
            Self::Pause => Some(OwnerCommand::Pause),
            Self::Drain => Some(OwnerCommand::Drain),
            Self::Reclaim => Some(OwnerCommand::Reclaim),
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Ask {
    command: Command,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum Answer {
    Status(Box<NodeStatus>),
    Error { error: String },
}

/// A node as its owner sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Its id: 64 hex digits.
    pub node: String,
    /// Its name for people.
    pub name: String,
    /// Whose machine.
    pub institution: String,
    /// Where it stands.
    pub country: String,
    /// Version of the daemon.
    pub version: String,
    /// Its process id.
    pub pid: u32,
    /// How long it has run.
    pub uptime_ms: u64,
    /// `open`, `paused`, `draining`, `reclaimed`.
    pub state: String,
    /// Sequence of the latest offer.
    pub offer_sequence: u64,
    /// What is lent.
    pub devices: Vec<DeviceView>,
    /// What it can run.
    pub engines: Vec<EngineView>,
    /// What the sandbox enforces.
    pub isolation: String,
    /// Its schedulers.
    pub schedulers: Vec<SchedulerView>,
    /// Leases it holds.
    pub leases: Vec<LeaseView>,
    /// Guests that use the machine right now; 0 means the machine is the owner's.
    pub guests: usize,
    /// Workers kept with a loaded model for the next lease.
    pub workers_warm: usize,
    /// Bytes in the artifact store.
    pub store_bytes: u64,
    /// And its limit.
    pub store_bytes_max: u64,
    /// What the owner should know; in sentences.
    pub notes: Vec<String>,
}

/// One class of device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceView {
    /// Its class.
    pub class: String,
    /// How many.
    pub count: u32,
    /// Memory of one.
    pub memory_bytes: u64,
    /// Micro-credits for one during one hour.
    pub rate: u64,
}

/// One engine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineView {
    /// Its name.
    pub name: String,
    /// What work it does.
    pub work: String,
    /// Thousandths of a work unit per second.
    pub speed_milli: u64,
    /// How that was measured.
    pub method: String,
}

/// One scheduler.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SchedulerView {
    /// Its key.
    pub key: String,
    /// Its name for people, once it was reached.
    pub name: String,
    /// Where it is dialled.
    pub control_addr: String,
    /// Whether a session stands.
    pub connected: bool,
    /// Why not; empty while one stands.
    pub why: String,
    /// What it said to the latest offer.
    pub offer: String,
}

/// One lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseView {
    /// The job: 64 hex digits.
    pub job: String,
    /// Which part.
    pub part: u32,
    /// Which attempt.
    pub fence: u64,
    /// Whose scheduler.
    pub scheduler: String,
    /// `granted`, `fetching`, `running`, `finished`.
    pub phase: String,
    /// Items finished.
    pub items_done: u64,
    /// Tokens read and written.
    pub tokens: u64,
}

/// Why a command did not get through.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Nobody listens.
    #[error("no node runs in {}: start it with `karez node run`", dir.display())]
    NotRunning {
        /// Where.
        dir: PathBuf,
    },
    /// The path is longer than sockets allow.
    #[error("{} is too long a path for a socket: choose a directory with a shorter one", path.display())]
    PathTooLong {
        /// Which path.
        path: PathBuf,
    },
    /// The node answered that it cannot.
    #[error("the node refuses: {0}")]
    Refused(String),
    /// The socket failed.
    #[error("{}: {why}", path.display())]
    Io {
        /// Which socket.
        path: PathBuf,
        /// What happened.
        why: String,
    },
}

/// What a client asked, and where the answer goes.
pub(crate) struct Request {
    pub(crate) command: Command,
    pub(crate) answer: oneshot::Sender<NodeStatus>,
}

/// Listens in the node's directory; serves until the returned guard is dropped.
pub(crate) fn listen(files: &NodeFiles) -> Result<(Listener, mpsc::Receiver<Request>), ControlError> {
    let path = files.socket();
    let io = |error: io::Error| socket_error(&path, &error);
    // Only one process gets here: the durable writer has locked the directory. A file left by a crash may go.
    if let Err(error) = std::fs::remove_file(&path)
        && error.kind() != io::ErrorKind::NotFound
    {
        return Err(io(error));
    }
    let listener = UnixListener::bind(&path).map_err(io)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).map_err(io)?;
    let (tell, hear) = mpsc::channel(CONNECTIONS_MAX);
    let task = tokio::spawn(accept(listener, tell));
    Ok((Listener { path, task }, hear))
}

/// Serves until dropped; the file goes with it.
pub(crate) struct Listener {
    path: PathBuf,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.task.abort();
        let _ = std::fs::remove_file(&self.path);
    }
}

async fn accept(listener: UnixListener, tell: mpsc::Sender<Request>) {
    let room = std::sync::Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(place) = room.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let tell = tell.clone();
                tokio::spawn(async move {
                    if let Err(error) = serve(stream, tell).await {
                        tracing::debug!(%error, "a client of the control socket went away");
                    }
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "accepting on the control socket failed");
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
    }
}

async fn serve(stream: UnixStream, tell: mpsc::Sender<Request>) -> io::Result<()> {
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    {
        let mut limited = (&mut stream).take(4096);
        let read = limited.read_line(&mut line);
        timeout(ASK_MAX, read)
            .await
            .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    }
    let answer = match serde_json::from_str::<Ask>(&line) {
        Err(error) => Answer::Error {
            error: format!("not a command: {error}"),
        },
        Ok(ask) => {
            let (answer, told) = oneshot::channel();
            let gone = || Answer::Error {
                error: "the node is stopping".into(),
            };
            match tell
                .send(Request {
                    command: ask.command,
                    answer,
                })
                .await
            {
                Err(_) => gone(),
                Ok(()) => told
                    .await
                    .map_or_else(|_| gone(), |status| Answer::Status(Box::new(status))),
            }
        }
    };
    let mut bytes = serde_json::to_vec(&answer).map_err(io::Error::other)?;
    bytes.push(b'\n');
    stream.get_mut().write_all(&bytes).await?;
    stream.get_mut().shutdown().await
}

/// Says `command` to the node that runs in `dir`; gives its state once the command has taken effect.
///
/// A reclaim has then been ordered; [`until_empty`] waits until the guests are gone.
pub async fn command(dir: &Path, command: Command) -> Result<NodeStatus, ControlError> {
    let path = NodeFiles::new(dir).socket();
    let io = |error: io::Error| socket_error(&path, &error);
    let mut stream = UnixStream::connect(&path)
        .await
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                ControlError::NotRunning { dir: dir.to_owned() }
            }
            _ => io(error),
        })?;
    let mut ask = serde_json::to_vec(&Ask { command }).map_err(|e| io(e.into()))?;
    ask.push(b'\n');
    let exchange = async {
        stream.write_all(&ask).await?;
        let mut answer = String::new();
        stream.take(LINE_MAX).read_to_string(&mut answer).await?;
        Ok::<_, io::Error>(answer)
    };
    let answer = timeout(ANSWER_MAX, exchange)
        .await
        .map_err(|_| io(io::Error::from(io::ErrorKind::TimedOut)))?
        .map_err(io)?;
    match serde_json::from_str(&answer).map_err(|e| io(e.into()))? {
        Answer::Status(status) => Ok(*status),
        Answer::Error { error } => Err(ControlError::Refused(error)),
    }
}

/// The state of the node that runs in `dir`.
pub async fn status(dir: &Path) -> Result<NodeStatus, ControlError> {
    command(dir, Command::Status).await
}

/// Waits until no guest uses the machine, `patience` at most; gives the last state seen.
pub async fn until_empty(dir: &Path, patience: Duration) -> Result<NodeStatus, ControlError> {
    let until = tokio::time::Instant::now() + patience;
    loop {
        let now = status(dir).await?;
        if now.guests == 0 || tokio::time::Instant::now() >= until {
            return Ok(now);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn socket_error(path: &Path, error: &io::Error) -> ControlError {
    // `sun_path` has 108 bytes, one of them the end.
    if error.kind() == io::ErrorKind::InvalidInput && path.as_os_str().len() > 107 {
        ControlError::PathTooLong {
            path: path.to_owned(),
        }
    } else {
        ControlError::Io {
            path: path.to_owned(),
            why: error.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(state: &str) -> NodeStatus {
        NodeStatus {
            node: "00".into(),
            name: "n".into(),
            institution: "uni-a".into(),
            country: "KE".into(),
            version: "0".into(),
            pid: 1,
            uptime_ms: 2,
            state: state.into(),
            offer_sequence: 3,
            devices: vec![],
            engines: vec![],
            isolation: "none".into(),
            schedulers: vec![],
            leases: vec![],
            guests: 0,
            workers_warm: 0,
            store_bytes: 0,
            store_bytes_max: 0,
            notes: vec![],
        }
    }

    #[tokio::test]
    async fn the_owner_is_heard_and_answered() {
        let dir = tempfile::tempdir().unwrap();
        let files = NodeFiles::new(dir.path());
        assert!(matches!(
            status(dir.path()).await,
            Err(ControlError::NotRunning { .. })
        ));
        let (listener, mut heard) = listen(&files).unwrap();
        assert_eq!(
            std::fs::metadata(files.socket()).unwrap().permissions().mode() & 0o777,
            0o600
        );
        let node = tokio::spawn(async move {
            while let Some(request) = heard.recv().await {
                let _ = request
                    .answer
                    .send(example(if request.command == Command::Reclaim {
                        "reclaimed"
                    } else {
                        "open"
                    }));
            }
        });
        assert_eq!(status(dir.path()).await.unwrap().state, "open");
        assert_eq!(
            command(dir.path(), Command::Reclaim).await.unwrap().state,
            "reclaimed"
        );
        assert_eq!(
            until_empty(dir.path(), Duration::from_secs(1))
                .await
                .unwrap()
                .guests,
            0
        );
        let mut stream = UnixStream::connect(files.socket()).await.unwrap();
        stream.write_all(b"{\"command\":\"mine\"}\n").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.contains("not a command"), "{answer}");
        drop(listener);
        node.abort();
        assert!(matches!(
            status(dir.path()).await,
            Err(ControlError::NotRunning { .. })
        ));
    }
}
