//! A network of real processes for one test, and the command line to use it with.
use serde_json::Value;
use std::{
    fs,
    io::Write,
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};
use tempfile::TempDir;

/// The folder of all-MiniLM-L6-v2, where there is one; says so where a test is skipped for it.
pub(crate) fn encoder() -> Option<String> {
    let dir = std::env::var("KAREZ_TEST_MINILM")
        .ok()
        .filter(|dir| !dir.is_empty());
    if dir.is_none() {
        println!("skipped: KAREZ_TEST_MINILM names no encoder");
    }
    dir
}

/// What `karez` answered.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Answer {
    fn of(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// The output as one JSON document.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("not JSON ({e}): {self:?}"))
    }

    #[track_caller]
    pub(crate) fn ok(self) -> Self {
        assert_eq!(self.code, 0, "{self:?}");
        self
    }

    /// Refused with that exit code, in one line that names all of `words`.
    #[track_caller]
    pub(crate) fn refused(self, code: i32, words: &[&str]) -> Self {
        assert_eq!(self.code, code, "{self:?}");
        for word in words {
            assert!(self.err.contains(word), "{word:?} is missing: {self:?}");
        }
        assert!(!self.err.contains("panicked"), "{self:?}");
        self
    }
}

/// A `karez` command in that home.
pub(crate) fn karez(home: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_karez"));
    command
        .args(args)
        .env("KAREZ_HOME", home)
        .env("NO_COLOR", "1")
        .stdin(Stdio::null());
    // What a command writes by default lands in its own folder, never among the sources.
    if let Some(folder) = home.ancestors().find(|folder| folder.is_dir()) {
        command.current_dir(folder);
    }
    command
}

/// Runs it to its end.
pub(crate) fn run(home: &Path, args: &[&str]) -> Answer {
    Answer::of(karez(home, args).output().unwrap())
}

/// One scheduler, three nodes, one user.
pub(crate) struct Net {
    pub(crate) home: PathBuf,
    _dir: TempDir,
    own: Vec<Child>,
}

impl Net {
    pub(crate) fn up() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().join("home");
        Self::start(dir, home)
    }

    /// The same with its home on another file system.
    pub(crate) fn up_in(home: PathBuf) -> Self {
        Self::start(tempfile::tempdir().unwrap(), home)
    }

    fn start(dir: TempDir, home: PathBuf) -> Self {
        run(&home, &["up", "--json"]).ok();
        Self {
            home,
            _dir: dir,
            own: Vec::new(),
        }
    }

    pub(crate) fn run(&self, args: &[&str]) -> Answer {
        run(&self.home, args)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self._dir.path().join(name)
    }

    /// Writes a file beside the home and gives its path as text.
    pub(crate) fn file(&self, name: &str, bytes: impl AsRef<[u8]>) -> String {
        let path = self.path(name);
        fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// The id of the process whose name holds `name`.
    pub(crate) fn pid(&self, name: &str) -> i32 {
        let text = fs::read_to_string(self.home.join("up/network.toml")).unwrap();
        let table: toml::Table = toml::from_str(&text).unwrap();
        let all = table["process"].as_array().unwrap();
        let one = all
            .iter()
            .find(|p| p["name"].as_str().unwrap().contains(name))
            .unwrap();
        i32::try_from(one["pid"].as_integer().unwrap()).unwrap()
    }

    pub(crate) fn dir(&self, name: &str) -> PathBuf {
        self.home.join("up").join(name)
    }

    /// Starts a process of the network again after it was killed, and gives its id.
    pub(crate) fn restart(&mut self, kind: &str, name: &str) -> i32 {
        let dir = self.dir(name);
        let log = fs::OpenOptions::new()
            .append(true)
            .create(true)
            .open(self.path("restarted.log"))
            .unwrap();
        let child = karez(&self.home, &[kind, "run", "--dir", dir.to_str().unwrap()])
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        self.own.push(child);
        pid
    }

    /// Submits `items` no-ops of `millis` each in parts of `part_items` and gives the job's id.
    pub(crate) fn noops(&self, items: usize, millis: u32, part_items: u32) -> String {
        let input = self.file("noops.jsonl", "{\"text\":\"x\"}\n".repeat(items));
        let job = self.file(
            "noops.toml",
            format!(
                "work = \"noop\"\ninput = {input:?}\n[noop]\nmillis_per_item = {millis}\n[limits]\nattempts = 20\n[run]\npart_items = {part_items}\n"
            ),
        );
        let answer = self.run(&["submit", &job, "--detach", "--json"]).ok();
        answer.json()["job"]
            .as_str()
            .unwrap_or_else(|| panic!("{answer:?}"))
            .to_owned()
    }

    pub(crate) fn job(&self, id: &str) -> Value {
        self.run(&["job", "show", id, "--json"]).ok().json()
    }

    /// Waits until the job has ended and gives its last view.
    pub(crate) fn ended(&self, id: &str, patience: Duration) -> Value {
        self.until(patience, &format!("job {id} to end"), || {
            let answer = self.run(&["job", "show", id, "--json"]);
            if answer.code != 0 {
                return None;
            }
            let job = answer.json();
            ["done", "failed", "cancelled"]
                .contains(&job["state"].as_str()?)
                .then_some(job)
        })
    }

    #[track_caller]
    pub(crate) fn until<T>(&self, patience: Duration, what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
        let began = Instant::now();
        loop {
            if let Some(answer) = ask() {
                return answer;
            }
            assert!(
                began.elapsed() < patience,
                "waited {patience:?} for {what}\n{}",
                self.logs()
            );
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// The ends of all logs, for a failed test's last words.
    pub(crate) fn logs(&self) -> String {
        let mut out = String::new();
        let logs = fs::read_dir(self.home.join("up"))
            .into_iter()
            .flatten()
            .flatten()
            .map(|e| e.path());
        for path in logs
            .filter(|p| p.extension().is_some_and(|e| e == "log"))
            .chain([self.path("restarted.log")])
        {
            let text = fs::read_to_string(&path).unwrap_or_default();
            let tail: Vec<&str> = text.lines().rev().take(15).collect();
            out += &format!("== {}\n", path.display());
            tail.iter().rev().for_each(|line| out += &format!("{line}\n"));
        }
        out
    }

    /// Exports the ledger, verifies it offline, and gives its lines.
    pub(crate) fn verified_ledger(&self) -> Vec<Value> {
        let file = self.path("books.ndjson");
        let file = file.to_str().unwrap();
        self.run(&["ledger", "export", "-o", file]).ok();
        self.run(&["ledger", "verify", file]).ok();
        fs::read_to_string(file)
            .unwrap()
            .lines()
            .map(|l| serde_json::from_str(l).unwrap())
            .collect()
    }
}

/// A request to the gateway on its way: what it answers can be read.
pub(crate) fn asked(key: &Value, path: &str, body: &Value) -> TcpStream {
    let base = key["base_url"].as_str().unwrap();
    let address = base.strip_prefix("http://").unwrap().strip_suffix("/v1").unwrap();
    let (token, body) = (key["api_key"].as_str().unwrap(), body.to_string());
    let mut stream = TcpStream::connect(address).unwrap();
    write!(
        stream,
        "POST {path} HTTP/1.1\r\nhost: {address}\r\nauthorization: Bearer {token}\r\nconnection: close\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    stream
}

/// Settlements of that job in an exported ledger that moved credits or not.
pub(crate) fn settlements<'a>(ledger: &'a [Value], job: &str) -> Vec<&'a Value> {
    let escrow = format!("escrow:{job}");
    ledger
        .iter()
        .filter(|line| line["kind"] == "settle" && line["legs"].to_string().contains(&escrow))
        .collect()
}

pub(crate) fn signal(pid: i32, signal: rustix::process::Signal) {
    rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), signal).unwrap();
}

/// Kills a process and waits until its files are closed: until then its directory is taken.
pub(crate) fn kill_9(pid: i32) {
    signal(pid, rustix::process::Signal::KILL);
    let alive = || match fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => !stat.rsplit(')').next().unwrap().starts_with(" Z"),
        Err(_) => false,
    };
    let until = Instant::now() + Duration::from_secs(30);
    while alive() {
        assert!(Instant::now() < until, "{pid} outlives SIGKILL");
        thread::sleep(Duration::from_millis(5));
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for child in &mut self.own {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = run(&self.home, &["down"]);
    }
}
