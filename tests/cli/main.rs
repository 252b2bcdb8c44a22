//! The command line as scripts see it: exit codes, one error line, output that can be parsed. No network is started.
// Helpers outside of test functions unwrap too.
#![allow(clippy::unwrap_used)]
use insta::assert_snapshot;
use std::{
    fs,
    io::Write,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Output, Stdio},
};
use tempfile::TempDir;

/// A home of its own, and a folder for files.
struct Cli {
    dir: TempDir,
}

impl Cli {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn file(&self, name: &str, text: &str) {
        fs::create_dir_all(self.path().join(name).parent().unwrap()).unwrap();
        fs::write(self.path().join(name), text).unwrap();
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_karez"));
        command
            .args(args)
            .current_dir(self.path())
            .env("KAREZ_HOME", self.path().join("home"));
        command
            .env_remove("RUST_LOG")
            .env_remove("KAREZ_MINILM")
            .env_remove("KAREZ_TEXTS")
            .stdin(Stdio::null());
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Exit code and standard error of a command that must fail and print nothing else.
    fn fails(&self, args: &[&str]) -> String {
        let out = self.run(args);
        assert!(!out.status.success(), "{args:?} succeeded");
        assert_eq!(
            String::from_utf8_lossy(&out.stdout),
            "",
            "{args:?} printed something on standard output"
        );
        let error = String::from_utf8(out.stderr)
            .unwrap()
            .replace(&*self.path().to_string_lossy(), "DIR");
        if out.status.code() != Some(2) {
            assert_eq!(
                error.trim().lines().count(),
                1,
                "{args:?} should print one line:\n{error}"
            );
        }
        format!("{}: {}", out.status.code().unwrap(), error.trim())
    }

    fn prints(&self, args: &[&str]) -> String {
        let out = self.run(args);
        assert!(
            out.status.success(),
            "{args:?}: {}",
            String::from_utf8_lossy(&out.stderr)
        );
        String::from_utf8(out.stdout).unwrap()
    }

    /// Belongs to a scheduler that is not there.
    fn joined(self) -> Self {
        self.prints(&["init"]);
        let user: serde_json::Value = serde_json::from_str(&self.prints(&["init", "--json"])).unwrap();
        let key = user["user"].as_str().unwrap();
        self.file(
            "home/client.toml",
            &format!(
                "scheduler = \"{key}\"\ncontrol_addr = \"127.0.0.1:1\"\ninstitution = \"uni-nairobi\"\n"
            ),
        );
        self
    }
}

#[test]
fn a_home_without_a_network_says_how_to_get_one() {
    assert_snapshot!(
        Cli::new().fails(&["jobs"]),
        @"7: error: DIR/home belongs to no network yet: run `karez up` for one of your own, or `karez join INVITATION`"
    );
}

#[test]
fn an_unreachable_scheduler_is_named() {
    let cli = Cli::new().joined();
    assert_snapshot!(
        cli.fails(&["offers"]),
        @"6: error: the scheduler: 127.0.0.1:1 refused the connection: check that the scheduler runs and that the port is right"
    );
    // Detected before anything is read from the network: the input is at fault, not the scheduler.
    cli.file("in.jsonl", "{\"text\": \"one\"}\n{\"text\": }\n");
    assert_snapshot!(
        cli.fails(&["embed", "in.jsonl"]),
        @r#"3: error: in.jsonl, line 2: malformed JSON at column 10: expected value"#
    );
}

#[test]
fn missing_things_are_not_found() {
    let cli = Cli::new();
    assert_snapshot!(cli.fails(&["embed", "nowhere.txt"]), @"4: error: nowhere.txt does not exist: give a file, or - for standard input");
    assert_snapshot!(cli.fails(&["submit", "job.toml"]), @"4: error: job.toml does not exist: `karez schema job` shows what a job file holds");
    assert_snapshot!(cli.fails(&["ledger", "verify", "l.jsonl"]), @"4: error: l.jsonl does not exist");
    assert_snapshot!(cli.fails(&["artifact", "add", "model.gguf"]), @"4: error: model.gguf does not exist: give a file or a directory");
    assert!(
        cli.fails(&["scheduler", "invite", "--role", "node"])
            .starts_with("4: ")
    );
}

#[test]
fn bad_input_is_refused_with_its_place() {
    let cli = Cli::new().joined();
    cli.file("empty.txt", "\n\n");
    assert_snapshot!(cli.fails(&["embed", "empty.txt"]), @"3: error: empty.txt has no lines: there is nothing to do");
    cli.file(
        "job.toml",
        "work = \"embed\"\nmodel = \"m\"\ninput = \"in.txt\"\n[where]\ncountry = [\"Kenya\"]\n",
    );
    assert_snapshot!(
        cli.fails(&["submit", "job.toml"]),
        @r#"3: error: job.toml:5: country: country "Kenya" is not valid: expected two letters of ISO 3166-1, like KE"#
    );
    assert_snapshot!(cli.fails(&["join", "hello"]), @"3: error: this is no invitation: one starts with karez1");
    cli.file("bad.gguf", "GGUFnonsense");
    assert!(
        cli.fails(&["artifact", "add", "bad.gguf", "--model", "m"])
            .starts_with("3: error: ")
    );
}

#[test]
fn a_command_line_that_makes_no_sense_exits_with_two() {
    let cli = Cli::new();
    for args in [
        &["embed"][..],
        &["nonsense"],
        &["embed", "in.txt", "--country", "Kenya"],
        &["embed", "in.txt", "--max-cost", "-1"],
        &["embed", "in.txt", "--donated", "--max-rate", "1"],
        &["generate", "x", "--temperature", "9"],
        &["job", "show"],
    ] {
        assert!(cli.fails(args).starts_with("2: error: "), "{args:?}");
    }
}

#[test]
fn a_forged_ledger_is_caught() {
    let cli = Cli::new();
    cli.file("l.jsonl", "{\"format\":\"karez-ledger/1\"}\n");
    let error = cli.fails(&["ledger", "verify", "l.jsonl"]);
    assert!(error.starts_with("9: error: l.jsonl: line 1"), "{error}");
}

#[test]
fn keys_are_private() {
    let cli = Cli::new().joined();
    let key = cli.path().join("home/user.pem");
    assert_eq!(fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    assert_snapshot!(
        cli.fails(&["balance"]),
        @"7: error: DIR/home/user.pem can be read by others (mode 644): run `chmod 600 DIR/home/user.pem`"
    );
}

#[test]
fn init_keeps_the_key_there_is() {
    let cli = Cli::new();
    let key = |text: String| text.lines().next().unwrap().to_owned();
    assert_eq!(key(cli.prints(&["init"])), key(cli.prints(&["init"])));
}

#[test]
fn a_network_that_is_not_up_can_be_taken_down() {
    assert_snapshot!(Cli::new().prints(&["down"]), @"the network is not up");
}

#[test]
fn invitations_go_from_a_scheduler_to_a_user() {
    let cli = Cli::new();
    cli.prints(&[
        "scheduler",
        "init",
        "--institution",
        "uni-nairobi",
        "--host",
        "127.0.0.1",
        "--port",
        "1",
    ]);
    let invite = |role: &str| {
        cli.prints(&["scheduler", "invite", "--role", role])
            .trim()
            .to_owned()
    };
    assert!(
        cli.fails(&["join", &invite("node")])
            .starts_with("3: error: this invitation is for a node")
    );
    assert!(
        cli.fails(&["join", &invite("user")])
            .starts_with("6: error: the scheduler: 127.0.0.1:1 refused")
    );
    assert!(
        cli.fails(&["node", "status"])
            .starts_with("6: error: no node runs in")
    );
}

#[test]
fn the_schema_and_the_exit_codes_can_be_printed() {
    let cli = Cli::new();
    let schema: serde_json::Value = serde_json::from_str(&cli.prints(&["schema", "job"])).unwrap();
    assert_eq!(schema["required"], serde_json::json!(["work", "input"]));
    assert!(schema["properties"]["where"]["properties"]["country"].is_object());
    let codes = cli.prints(&["exit-codes"]);
    assert_eq!(
        codes,
        cli.prints(&["help", "exit-codes"])
            .split("\n\n")
            .next()
            .unwrap()
            .to_owned()
            + "\n"
    );
    assert_snapshot!(codes, @r"
    Exit codes:
      0    done
      1    something else failed; the message says what
      2    the command line is wrong
      3    the input was refused: a bad line, a bad file, a bad order
      4    not found: a job, a model, an artifact, a file
      5    not placeable: no node may run it at this price, there, in this budget
      6    the scheduler cannot be reached
      7    not admitted, or the key is missing or unsafe
      8    the job failed or was cancelled
      9    verification failed
      130  interrupted
    ");
    for shell in ["bash", "zsh", "fish"] {
        assert!(cli.prints(&["completions", shell]).contains("karez"), "{shell}");
    }
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let cli = Cli::new();
    let mut child = cli
        .command(&["completions", "zsh"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let out = child.wait_with_output().unwrap();
    assert!(out.status.success(), "{:?}", out.status);
    assert_eq!(String::from_utf8_lossy(&out.stderr), "");
}

#[test]
fn standard_input_is_read_and_checked() {
    let cli = Cli::new().joined();
    let mut child = cli
        .command(&["embed", "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"good\n\xff\n").unwrap();
    let out = child.wait_with_output().unwrap();
    assert_eq!(out.status.code(), Some(3));
    assert_snapshot!(
        String::from_utf8(out.stderr).unwrap(),
        @"error: standard input, line 2: byte 1 is not UTF-8: save the file as UTF-8"
    );
}

#[test]
fn karez_alone_shows_its_help() {
    let cli = Cli::new();
    for (args, word) in [
        (&[][..], "generate"),
        (&["job"], "explain"),
        (&["ledger"], "verify"),
    ] {
        let out = cli.run(args);
        assert_eq!(out.status.code(), Some(2), "{args:?}");
        let help = String::from_utf8(out.stderr).unwrap();
        assert!(help.contains("Usage:") && help.contains(word), "{args:?}: {help}");
        assert!(
            !help.contains("worker"),
            "a command for machines is shown: {help}"
        );
    }
}

#[test]
fn errors_are_documents_for_programs() {
    let cli = Cli::new();
    let out = cli.run(&["jobs", "--json"]);
    assert_eq!(out.status.code(), Some(7));
    assert!(out.stdout.is_empty());
    let error: serde_json::Value = serde_json::from_slice(&out.stderr).unwrap();
    assert_eq!(error["exit_code"], 7);
    assert!(error["error"].as_str().unwrap().contains("karez join"), "{error}");
    let codes: serde_json::Value = serde_json::from_str(&cli.prints(&["exit-codes", "--json"])).unwrap();
    assert_eq!(
        codes[6],
        serde_json::json!({"code": 6, "meaning": "the scheduler cannot be reached"})
    );
}

#[test]
fn results_that_could_not_be_written_are_refused_before_any_work() {
    let cli = Cli::new().joined();
    cli.file("in.txt", "one\n");
    cli.file("full/x", "");
    assert_snapshot!(
        cli.fails(&["embed", "in.txt", "-o", "nowhere/out.jsonl"]),
        @"3: error: nowhere/out.jsonl cannot be written: there is no folder nowhere: choose another path with -o"
    );
    for args in [
        &["generate", "x", "-o", "full"][..],
        &["job", "fetch", "feedbeef", "-o", "full"],
        &["ledger", "export", "-o", "full"],
    ] {
        let error = cli.fails(args);
        assert!(
            error.starts_with("3: error: full cannot be written: it is a directory"),
            "{error}"
        );
    }
    // What the command line itself forbids comes first of all.
    assert!(cli.fails(&["job", "show", "zz"]).starts_with("2: "));
    assert!(
        cli.fails(&["generate", "x", "--label", &"l".repeat(121)])
            .starts_with("2: ")
    );
    assert!(
        cli.fails(&["generate", "x", "--temperature", "-1"])
            .contains("between 0 and 5")
    );
}

#[test]
fn folders_in_the_wrong_place_are_named() {
    let cli = Cli::new().joined();
    cli.file("folder/x", "");
    for args in [
        &["submit", "folder"][..],
        &["ledger", "verify", "folder"],
        &["embed", "folder"],
        &["artifact", "add", "/dev/null"],
        &["artifact", "add", "folder", "--model", "m"],
    ] {
        let error = cli.fails(args);
        assert!(error.starts_with("3: error: "), "{args:?}: {error}");
        assert!(
            error.contains("folder") || error.contains("/dev/null"),
            "{args:?}: {error}"
        );
        assert!(!error.contains("os error"), "{args:?}: {error}");
    }
    let home = ["--home", "folder/x/home"];
    assert_snapshot!(
        cli.fails(&[&home[..], &["init"]].concat()),
        @"1: error: DIR/folder/x/home/user.pem: Not a directory: a part of this path is no folder, choose another place"
    );
}

#[test]
fn work_that_reads_nothing_needs_no_text() {
    let cli = Cli::new().joined();
    cli.file(
        "job.toml",
        "work = \"noop\"\ninput = \"in.jsonl\"\n[noop]\nmillis_per_item = 1\n",
    );
    cli.file("in.jsonl", "{\"id\":1}\n{}\n");
    // The input is good, so only the scheduler is missing.
    assert!(cli.fails(&["submit", "job.toml"]).starts_with("6: "));
    cli.file("in.jsonl", "{\"id\":}\n");
    assert!(
        cli.fails(&["submit", "job.toml"])
            .starts_with("3: error: in.jsonl, line 1: malformed")
    );
}

#[test]
fn a_long_input_is_not_held_in_memory_and_leaves_nothing_behind() {
    let cli = Cli::new().joined();
    cli.file(
        "in.txt",
        &"a sentence of some length, again and again\n".repeat(300_000),
    );
    assert!(cli.fails(&["embed", "in.txt"]).starts_with("6: "));
    let left = fs::read_dir(cli.path().join("home")).unwrap();
    let left: Vec<_> = left.map(|e| e.unwrap().file_name()).collect();
    assert!(
        !left.iter().any(|name| name.to_string_lossy().contains("input")),
        "{left:?}"
    );
}

#[test]
fn completions_load_in_bash() {
    let cli = Cli::new();
    cli.file("karez.bash", &cli.prints(&["completions", "bash"]));
    let script = "source karez.bash && COMP_WORDS=(karez job '') COMP_CWORD=2 && _karez karez '' job && echo \"${COMPREPLY[@]}\" \
                  && COMP_WORDS=(karez '') COMP_CWORD=1 && _karez karez '' karez && echo \"${COMPREPLY[@]}\"";
    let out = Command::new("bash")
        .args(["--norc", "-c", script])
        .current_dir(cli.path())
        .output()
        .unwrap();
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    for word in ["explain", "cancel", "generate", "ledger"] {
        assert!(text.contains(word), "{word}: {text}");
    }
    assert!(!text.contains("worker"), "{text}");
}
