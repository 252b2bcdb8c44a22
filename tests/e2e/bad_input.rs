//! Bad input gives one clear error that names the thing and the next step, and loses nothing.
use crate::net::{Net, karez, run};
use std::{fs, net::TcpListener, os::unix::fs::PermissionsExt};

#[test]
fn bad_input_is_named_and_changes_nothing() {
    let net = Net::up();
    let before = net.run(&["balance", "--json"]).ok().out;

    net.run(&["generate", "--model", "karez-tyni", "hello"])
        .refused(4, &["karez-tyni", "karez artifact add"]);
    let lines = net.file(
        "bad.jsonl",
        "{\"prompt\":\"fine\"}\n{\"prompt\":\n{\"prompt\":\"fine\"}\n",
    );
    net.run(&["generate", "--file", &lines]).refused(3, &["line 2"]);
    net.run(&["generate", "--country", "AQ", "hello"])
        .refused(5, &["country", "BR, IN, KE"]);
    net.run(&["generate", "--max-rate", "0.1", "--country", "KE,BR", "hello"])
        .refused(5, &["price", "0.25"]);
    net.run(&["generate", "--country", "KE", "--exclude-country", "KE", "hello"])
        .refused(3, &["KE"]);
    net.run(&["generate", "--data-class", "personal", "hello"])
        .refused(5, &["data class", "internal"]);
    net.run(&["generate", "--isolation", "machine", "hello"])
        .refused(5, &["isolation"]);
    net.run(&["generate", "--isolation", "bubble", "hello"])
        .refused(2, &["bubble", "landlock+seccomp"]);
    net.run(&["generate", "--devices", "64", "hello"])
        .refused(5, &["number of devices"]);
    net.run(&["generate", "--deadline", "1ms", "hello"])
        .refused(3, &["deadline"]);
    net.run(&["generate", "--max-cost", "1000000", "hello"])
        .refused(5, &["budget", "--max-cost"]);
    net.run(&["generate", "--country", "Kenya", "hello"])
        .refused(2, &["Kenya"]);
    net.run(&["job", "show", "feedbeef"]).refused(4, &["feedbeef"]);
    let job = net.file("job.toml", "work = \"embed\"\ninput = \"x\"\ncountrry = 3\n");
    net.run(&["submit", &job]).refused(3, &["countrry", "3"]);

    // Whatever was refused took nothing.
    assert_eq!(net.run(&["balance", "--json"]).ok().out, before);

    // A prompt longer than the context fails the job with both lengths; nothing is billed.
    let long = "water ".repeat(5000);
    let prompt = net.file(
        "long.jsonl",
        format!("{}\n", serde_json::json!({ "prompt": long })),
    );
    net.run(&["generate", "--file", &prompt])
        .refused(8, &["context", "512"]);
    assert_eq!(net.run(&["balance", "--json"]).ok().out, before);
}

#[test]
fn broken_model_files_are_refused_before_anything_is_sent() {
    let net = Net::up();
    let mut gguf = karez_engine::shipped::MODEL.to_vec();
    gguf.truncate(gguf.len() / 2);
    let cut = net.file("cut.gguf", &gguf);
    net.run(&["artifact", "add", &cut, "--model", "cut"])
        .refused(3, &["cut.gguf"]);
    gguf[0] = b'X';
    let magic = net.file("magic.gguf", &gguf);
    net.run(&["artifact", "add", &magic, "--model", "magic"])
        .refused(3, &["magic.gguf"]);
    // One that claims a matrix of a million million columns is refused before anybody makes room for it.
    let mut gguf = karez_engine::shipped::MODEL.to_vec();
    let name = b"token_embd.weight";
    let at = gguf.windows(name.len()).position(|bytes| bytes == name).unwrap() + name.len() + 4;
    gguf[at..at + 8].copy_from_slice(&(1u64 << 40).to_le_bytes());
    let lies = net.file("lies.gguf", &gguf);
    net.run(&["artifact", "add", &lies, "--model", "lies"])
        .refused(3, &["lies.gguf", "token_embd.weight"]);
    let dir = net.path("encoder");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("config.json"), "{}").unwrap();
    fs::write(dir.join("tokenizer.json"), "{}").unwrap();
    fs::write(dir.join("model.safetensors"), [255; 64]).unwrap();
    net.run(&["artifact", "add", dir.to_str().unwrap(), "--model", "enc"])
        .refused(3, &["model.safetensors"]);
    let models = net.run(&["models", "--json"]).ok().out;
    assert!(
        !models.contains("cut") && !models.contains("magic") && !models.contains("lies"),
        "{models}"
    );
}

#[test]
fn keys_and_ports_and_absent_schedulers() {
    let dir = tempfile::tempdir().unwrap();
    let home = dir.path().join("home");
    // No key, no settings.
    let answer = run(&home, &["jobs"]);
    assert_ne!(answer.code, 0);
    assert!(answer.err.contains("karez"), "{answer:?}");
    let net = Net::up();
    // A key that others can read.
    let key = net.home.join("user.pem");
    let mode = |bits| fs::set_permissions(&key, fs::Permissions::from_mode(bits)).unwrap();
    mode(0o644);
    net.run(&["jobs"]).refused(7, &["user.pem", "chmod"]);
    mode(0o600);
    // A key the scheduler does not know.
    let other = dir.path().join("other");
    fs::create_dir_all(&other).unwrap();
    run(&other, &["init"]).ok();
    fs::copy(net.home.join("client.toml"), other.join("client.toml")).unwrap();
    run(&other, &["jobs"]).refused(7, &["not admitted"]);
    // A truncated invitation.
    run(&other, &["join", "karez1abcdef"]).refused(3, &["invitation"]);
    // A port in use.
    let dir2 = dir.path().join("scheduler");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    run(
        &home,
        &[
            "scheduler",
            "init",
            "--dir",
            dir2.to_str().unwrap(),
            "--institution",
            "some-lab",
            "--host",
            "127.0.0.1",
            "--port",
            &port.to_string(),
        ],
    )
    .ok();
    let answer = run(&home, &["scheduler", "run", "--dir", dir2.to_str().unwrap()]);
    assert_ne!(answer.code, 0);
    assert!(answer.err.contains(&port.to_string()), "{answer:?}");
    // A scheduler that is away.
    net.run(&["down"]).ok();
    net.run(&["jobs"]).refused(6, &["127.0.0.1"]);
}

#[test]
fn two_daemons_cannot_share_a_directory() {
    let net = Net::up();
    let dir = net.dir("lake-university");
    let output = karez(&net.home, &["node", "run", "--dir", dir.to_str().unwrap()])
        .output()
        .unwrap();
    assert!(!output.status.success());
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(err.contains("lake-university"), "{err}");
}
