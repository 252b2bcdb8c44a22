//! The real worker process: what it answers, and how it fails.
#![allow(clippy::unwrap_used, reason = "in a test, the panic is the report")]

mod common;

use std::time::{Duration, Instant};

use common::{gguf, gguf_file, load_error, loaded, program, raw, work, worker};
use karez_engine::protocol::{
    Finish, Generate, Isolation, Load, LoadKind, Message, Output, Prompt, RUNS_MAX, Work,
};
use karez_engine::unit::{Bytes, Millis};
use karez_engine::{EngineError, Event, FailureKind, SpawnOptions, Worker};

async fn text_of(worker: &Worker, generate: Generate) -> String {
    match worker.run(work(generate)).unwrap().finish().await.unwrap() {
        (Output::Text { text, .. }, _) => text,
        other => panic!("{other:?}"),
    }
}

fn noop(ms: u64) -> Work {
    Work::Noop { wait: Millis(ms) }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_text_is_generated_and_streamed() {
    let directory = tempfile::tempdir().unwrap();
    let worker = worker().await;
    let load = Load {
        threads: Some(2),
        ..Load::new(LoadKind::Generate, gguf_file(directory.path()))
    };
    let facts = worker.load(load, None).await.unwrap();
    assert_eq!(
        (facts.name.as_str(), facts.architecture.as_str(), facts.threads),
        ("Tiny Test", "llama", 2)
    );
    assert_eq!(facts.context_tokens, common::CONTEXT);
    assert!(facts.engine.starts_with("llama.cpp "), "{}", facts.engine);
    let best = karez_engine::level::usable()[0];
    assert!(facts.engine.ends_with(best), "{} is not {best}", facts.engine);

    let mut run = worker.run(work(raw("water flows", 200))).unwrap();
    let mut pieces = Vec::new();
    let (output, meters) = loop {
        match run.next().await.unwrap() {
            Event::Token(piece) => pieces.push(piece.text),
            Event::Done { output, meters } => break (output, meters),
            Event::Failed { error, .. } => panic!("{error}"),
        }
    };
    let Output::Text { text, finish, .. } = output else {
        panic!("{output:?}")
    };
    assert_eq!(finish, Finish::Length);
    assert_eq!(pieces.concat(), text);
    // Gathered for some milliseconds each.
    assert!(pieces.len() > 1 && pieces.iter().all(|piece| !piece.is_empty()));
    assert_eq!(
        (meters.tokens_in, meters.tokens_out, meters.tokens_cached),
        (11, 200, 0)
    );
    assert!(
        meters.peak_rss.0 > 1 << 20 && meters.cpu_ms.0 > 0 && meters.wall_ms.0 > 0,
        "{meters:?}"
    );
    assert!(run.next().await.is_none());
    worker.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn equal_seeds_give_equal_texts_and_other_seeds_others() {
    let directory = tempfile::tempdir().unwrap();
    let path = gguf_file(directory.path());
    let (one, two) = (
        loaded(LoadKind::Generate, &path).await,
        loaded(LoadKind::Generate, &path).await,
    );
    let with = |seed| Generate {
        temperature: 1.0,
        top_k: 50,
        top_p: 0.9,
        seed,
        ..raw("stars", 30)
    };
    let first = text_of(&one, with(7)).await;
    assert_eq!(first, text_of(&one, with(7)).await);
    assert_eq!(first, text_of(&two, with(7)).await);
    assert_ne!(first, text_of(&one, with(8)).await);
    assert_eq!(
        text_of(&one, with(u64::MAX >> 32)).await,
        text_of(&two, with(u64::MAX >> 32)).await
    );
    assert_eq!(
        text_of(&one, raw("x", 20)).await,
        text_of(&two, raw("x", 20)).await
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_ran_before_is_reused_and_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = gguf_file(directory.path());
    let shared = "a river of words ".repeat(40);
    let question = raw(&format!("{shared}and then?"), 30);
    let fresh = text_of(&loaded(LoadKind::Generate, &path).await, question.clone()).await;
    let used = loaded(LoadKind::Generate, &path).await;
    text_of(&used, raw(&format!("{shared}but before?"), 50)).await;
    let (output, meters) = used.run(work(question.clone())).unwrap().finish().await.unwrap();
    assert_eq!((meters.tokens_in, meters.tokens_cached), (689, 512));
    assert!(matches!(output, Output::Text { text, .. } if text == fresh));
    text_of(&used, raw("something else", 5)).await;
    assert_eq!(text_of(&used, question).await, fresh);
}

#[tokio::test(flavor = "multi_thread")]
async fn chats_go_through_the_template_and_stop_strings_stop() {
    let directory = tempfile::tempdir().unwrap();
    let worker = loaded(LoadKind::Generate, &gguf_file(directory.path())).await;
    let chat = Prompt::Chat {
        messages: vec![Message::new("system", "be brief"), Message::new("user", "hi")],
        tools: Vec::new(),
    };
    let text = Prompt::Text {
        text: "hi".into(),
        system: Some("be brief".into()),
    };
    let written =
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n";
    let expected = text_of(&worker, raw(written, 12)).await;
    assert_eq!(text_of(&worker, Generate::greedy(chat, 12)).await, expected);
    assert_eq!(text_of(&worker, Generate::greedy(text, 12)).await, expected);

    let (at, stop) = expected.char_indices().nth(4).unwrap();
    let stopped = Generate {
        stop: vec![stop.to_string()],
        ..raw(written, 12)
    };
    let (output, meters) = worker.run(work(stopped)).unwrap().finish().await.unwrap();
    let Output::Text { text, finish, .. } = output else {
        panic!("{output:?}")
    };
    assert_eq!(finish, Finish::Stop);
    assert!(
        expected[..at].starts_with(&text) && meters.tokens_out < 12,
        "{text:?} of {expected:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_context_is_never_overrun() {
    let directory = tempfile::tempdir().unwrap();
    let worker = worker().await;
    let load = Load {
        context_tokens: Some(64),
        ..Load::new(LoadKind::Generate, gguf_file(directory.path()))
    };
    assert_eq!(worker.load(load, None).await.unwrap().context_tokens, 64);
    for (length, fits) in [(63, true), (64, false), (200, false)] {
        let result = worker
            .run(work(raw(&"x".repeat(length), 1000)))
            .unwrap()
            .finish()
            .await;
        match result {
            Ok((Output::Text { finish, .. }, meters)) if fits => {
                assert_eq!((finish, meters.tokens_out), (Finish::Context, 1));
            }
            Err((error, _)) if !fits => {
                assert_eq!(
                    error,
                    EngineError::ContextOverflow {
                        prompt: length as u32,
                        limit: 64
                    }
                );
                assert!(!error.kind().retryable());
            }
            other => panic!("{length}: {other:?}"),
        }
    }
    assert!(!text_of(&worker, raw("short", 3)).await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_the_jobs_fault_and_the_worker_lives_on() {
    let directory = tempfile::tempdir().unwrap();
    let worker = loaded(LoadKind::Generate, &gguf_file(directory.path())).await;
    for (name, request, says) in [
        ("empty", work(raw("", 5)), "empty"),
        (
            "negative temperature",
            work(Generate {
                temperature: -1.0,
                ..raw("x", 5)
            }),
            "temperature",
        ),
        (
            "no share",
            work(Generate {
                top_p: 0.0,
                ..raw("x", 5)
            }),
            "top_p",
        ),
        (
            "too many stops",
            work(Generate {
                stop: vec!["x".into(); 99],
                ..raw("x", 5)
            }),
            "stop strings",
        ),
        (
            "embedding",
            Work::Embed {
                texts: vec!["x".into()],
            },
            "generates text",
        ),
        ("waiting", noop(1), "generates text"),
    ] {
        let error = match worker.run(request) {
            Ok(run) => run.finish().await.unwrap_err().0,
            Err(error) => error,
        };
        assert_eq!(error.kind(), FailureKind::BadInput, "{name}: {error}");
        assert!(error.to_string().contains(says), "{name}: {error}");
    }
    assert!(worker.run(work(raw(&"x".repeat(17 << 20), 1))).is_err());
    assert!(!text_of(&worker, raw("x", 5)).await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_is_cancelled_at_once_in_progress_or_waiting() {
    let directory = tempfile::tempdir().unwrap();
    let worker = loaded(LoadKind::Generate, &gguf_file(directory.path())).await;
    let mut run = worker.run(work(raw("go on", 1000))).unwrap();
    let waiting = worker.run(work(raw("go on", 1000))).unwrap();
    let last = worker.run(work(raw("x", 2))).unwrap();
    assert!(matches!(run.next().await, Some(Event::Token(_))));
    waiting.cancel();
    run.cancel();
    let asked = Instant::now();
    let (error, meters) = run.finish().await.unwrap_err();
    assert_eq!(error, EngineError::Cancelled);
    assert!(meters.tokens_out > 0 && meters.tokens_out < 1000, "{meters:?}");
    let (error, meters) = waiting.finish().await.unwrap_err();
    assert_eq!((error, meters.tokens_out), (EngineError::Cancelled, 0));
    assert!(asked.elapsed() < Duration::from_secs(2));
    last.finish().await.unwrap();

    // Letting go of a run cancels it too.
    let mut run = worker.run(work(raw("go on", 1000))).unwrap();
    run.next().await;
    drop(run);
    let next = Instant::now();
    text_of(&worker, raw("x", 2)).await;
    assert!(next.elapsed() < Duration::from_secs(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_worker_is_a_crash_that_names_the_signal() {
    let directory = tempfile::tempdir().unwrap();
    let worker = loaded(LoadKind::Generate, &gguf_file(directory.path())).await;
    let mut run = worker.run(work(raw("go on", 1000))).unwrap();
    let waiting = worker.run(work(raw("x", 1))).unwrap();
    run.next().await;
    signal(&worker, rustix::process::Signal::KILL);
    for run in [run, waiting] {
        let (error, _) = run.finish().await.unwrap_err();
        assert!(
            matches!(&error, EngineError::Crashed { how } if how.contains("SIGKILL")),
            "{error}"
        );
        assert!(error.kind().retryable());
    }
    assert_eq!(worker.run(noop(1)).unwrap_err().kind(), FailureKind::Crashed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_hangs_is_killed() {
    let options = SpawnOptions {
        silence_max: Some(Duration::from_millis(300)),
        ..SpawnOptions::default()
    };
    let worker = Worker::spawn(program(), &[], options).await.unwrap();
    worker.load(Load::new(LoadKind::Noop, ""), None).await.unwrap();
    // Idle is not hung.
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!(worker.ended(), None);
    signal(&worker, rustix::process::Signal::STOP);
    let (error, _) = worker.run(noop(10)).unwrap().finish().await.unwrap_err();
    assert!(
        matches!(error, EngineError::Hung { waited } if waited.0 >= 300),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_queue_has_an_end() {
    let worker = loaded(LoadKind::Noop, "/".as_ref()).await;
    let runs: Vec<_> = (0..RUNS_MAX).map(|_| worker.run(noop(10_000)).unwrap()).collect();
    assert_eq!(
        worker.run(noop(1)).unwrap_err(),
        EngineError::Busy {
            limit: RUNS_MAX as u32
        }
    );
    drop(runs);
    let begun = Instant::now();
    while worker.runs() > 0 {
        assert!(begun.elapsed() < Duration::from_secs(5));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    worker.run(noop(5)).unwrap().finish().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn models_that_cannot_be_used_are_refused_with_the_reason() {
    let directory = tempfile::tempdir().unwrap();
    let path = gguf_file(directory.path());
    let bert = common::bert_directory(directory.path());

    let small = Load {
        memory_limit: Some(Bytes(1 << 20)),
        ..Load::new(LoadKind::Generate, &path)
    };
    let EngineError::TooLarge { needs, has } = load_error(small).await else {
        panic!()
    };
    assert!(needs > has && has == Bytes(1 << 20));
    assert_eq!(
        load_error(Load::new(LoadKind::Generate, &bert)).await.kind(),
        FailureKind::Unsupported
    );

    let whole = gguf();
    let broken = directory.path().join("broken.gguf");
    let mut wrong_name = whole.clone();
    let at = wrong_name
        .windows(17)
        .position(|window| window == b"token_embd.weight")
        .unwrap();
    wrong_name[at] = b'X';
    let shrunk = &whole[..whole.len() - 4096];
    for (name, bytes) in [
        ("shrunk", shrunk),
        ("a tensor is missing", &wrong_name),
        ("text", b"hello"),
    ] {
        std::fs::write(&broken, bytes).unwrap();
        let error = load_error(Load::new(LoadKind::Generate, &broken)).await;
        let EngineError::BadModel { file, reason } = &error else {
            panic!("{name}: {error}")
        };
        assert!(
            file.ends_with("broken.gguf") && !reason.is_empty(),
            "{name}: {error}"
        );
    }
}

/// Every model that passes the check of its header loads or is refused; none takes the worker down.
#[tokio::test(flavor = "multi_thread")]
async fn headers_with_flipped_bits_never_crash_a_worker() {
    let directory = tempfile::tempdir().unwrap();
    let (path, whole) = (directory.path().join("flipped.gguf"), gguf());
    let mut random = common::Random(99);
    let mut tried = 0;
    while tried < 12 {
        let mut bytes = whole.clone();
        let at = random.below(900);
        bytes[at] ^= 1 << random.below(8);
        if karez_engine::inspect::inspect_gguf_bytes(&bytes, "flipped").is_err() {
            continue;
        }
        tried += 1;
        std::fs::write(&path, bytes).unwrap();
        let worker = worker().await;
        let load = Load {
            threads: Some(1),
            ..Load::new(LoadKind::Generate, &path)
        };
        if let Err(error) = worker.load(load, None).await {
            assert_eq!(error.kind(), FailureKind::BadModel, "bit in byte {at}: {error}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_shipped_model_answers() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("karez-tiny.gguf");
    std::fs::write(&path, karez_engine::shipped::MODEL).unwrap();
    let worker = loaded(LoadKind::Generate, &path).await;
    let corpus = include_str!("../corpus/en.jsonl");
    let pairs = corpus
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
        .take(5);
    let (mut right, mut tokens, mut milliseconds) = (0, 0, 0);
    for pair in pairs {
        let (question, answer) = (
            pair["question"].as_str().unwrap(),
            pair["answer"].as_str().unwrap(),
        );
        let prompt = Prompt::Text {
            text: question.into(),
            system: None,
        };
        let (output, meters) = worker
            .run(work(Generate::greedy(prompt, 200)))
            .unwrap()
            .finish()
            .await
            .unwrap();
        tokens += meters.tokens_out;
        milliseconds += meters.wall_ms.0;
        right +=
            u32::from(matches!(output, Output::Text { text, finish: Finish::Stop, .. } if text == answer));
    }
    eprintln!("{tokens} tokens in {milliseconds} ms");
    assert!(right >= 4, "{right} of 5 answers are as trained");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_is_no_worker_is_a_crash() {
    let error = Worker::spawn("/nonexistent/karez".as_ref(), &[], SpawnOptions::default())
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("/nonexistent/karez did not start"),
        "{error}"
    );
    let silent = Worker::spawn("/bin/false".as_ref(), &[], SpawnOptions::default())
        .await
        .unwrap();
    let error = silent
        .load(Load::new(LoadKind::Noop, ""), None)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("exit status 1"), "{error}");
    let mute = Worker::spawn("/bin/sleep".as_ref(), &["60".into()], SpawnOptions::default())
        .await
        .unwrap();
    let deadline = Some(Duration::from_millis(200));
    let error = mute
        .load(Load::new(LoadKind::Noop, ""), deadline)
        .await
        .unwrap_err();
    assert_eq!(error, EngineError::Hung { waited: Millis(200) });
    let chatty = Worker::spawn(
        "/bin/echo".as_ref(),
        &["not a frame".into()],
        SpawnOptions::default(),
    )
    .await
    .unwrap();
    let error = chatty
        .load(Load::new(LoadKind::Noop, ""), None)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), FailureKind::Protocol, "{error}");
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn a_loaded_worker_is_shut_in() {
    let directory = tempfile::tempdir().unwrap();
    let worker = worker().await;
    let facts = worker
        .load(Load::new(LoadKind::Generate, gguf_file(directory.path())), None)
        .await
        .unwrap();
    assert!(facts.isolation >= Isolation::Seccomp, "{}", facts.isolation);
    let status = std::fs::read_to_string(format!("/proc/{}/status", worker.pid())).unwrap();
    let field = |name: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .map(str::trim)
    };
    assert_eq!((field("Seccomp:"), field("NoNewPrivs:")), (Some("2"), Some("1")));
}

#[cfg(target_os = "linux")]
#[test]
fn the_sandbox_keeps_in_what_it_says() {
    let output = std::process::Command::new(program())
        .arg("--check-isolation")
        .output()
        .unwrap();
    let report = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success(),
        "{report}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    for line in [
        "read its model: yes",
        "start a thread: yes",
        "open an internet socket: no",
        "open a datagram socket: no",
        "open a local socket: no",
        "start a program: no",
        "signal another process: no",
    ] {
        assert!(report.contains(line), "{line:?} is missing in:\n{report}");
    }
    if report.contains("isolation: landlock+seccomp") {
        for line in ["read /etc/passwd: no", "list /: no", "write a file: no"] {
            assert!(report.contains(line), "{line:?} is missing in:\n{report}");
        }
    } else {
        eprintln!("skipped the file system: Landlock is missing here");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_worker_never_outlives_its_node() {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};
    let mut node = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "plays_a_node", "--nocapture"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let lines = BufReader::new(node.stdout.take().unwrap()).lines();
    let pid: i32 = lines
        .map_while(Result::ok)
        .find_map(|line| line.split("worker is ").nth(1)?.parse().ok())
        .unwrap();
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    assert!(rustix::process::test_kill_process(pid).is_ok());
    node.kill().unwrap();
    node.wait().unwrap();
    let begun = Instant::now();
    // It may linger as a zombie where nobody adopts it; that is gone enough.
    let alive = || {
        std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()))
            .is_ok_and(|stat| !stat.contains(") Z ") && !stat.contains(") X "))
    };
    while alive() {
        assert!(begun.elapsed() < Duration::from_secs(5), "the worker lives on");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Not a test: started by the one above, and killed.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "started by another test"]
async fn plays_a_node() {
    let worker = loaded(LoadKind::Noop, "/".as_ref()).await;
    signal(&worker, rustix::process::Signal::STOP);
    println!("worker is {}", worker.pid());
    tokio::time::sleep(Duration::from_secs(60)).await;
}

fn signal(worker: &Worker, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(worker.pid() as i32).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}
