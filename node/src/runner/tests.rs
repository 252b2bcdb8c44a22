use super::*;
use crate::{artifacts::Artifacts, daemon::WorkerProgram, stop::stop};
use karez_core::{
    artifact::ArtifactRef,
    id::JobId,
    key::{PublicKey, SchedulerId, SecretKey, UserId},
    records::{Constraints, Signed},
    unit::{Credits, UtcMillis},
};
use karez_net::store::ArtifactStore;
use std::{path::Path, sync::Mutex};

struct Bench {
    _dir: tempfile::TempDir,
    tools: Tools,
}

fn bench() -> Bench {
    let dir = tempfile::tempdir().unwrap();
    let store = ArtifactStore::open(&dir.path().join("artifacts"), Bytes(64 << 20)).unwrap();
    let scratch = dir.path().join("scratch");
    std::fs::create_dir(&scratch).unwrap();
    let secret = SecretKey::from_bytes(&[9; 32]);
    let artifacts = Artifacts::serve(store, ([127, 0, 0, 1], 0).into(), &secret, Default::default()).unwrap();
    let keep = WarmPolicy {
        stay: Duration::from_secs(60),
        memory: Bytes(2 << 30),
        pinned: Vec::new(),
    };
    let warm = Warm::new(worker_program(), keep);
    Bench {
        _dir: dir,
        tools: Tools {
            server: None,
            artifacts,
            scratch,
            warm,
            threads: 2,
            sequences: 4,
            trainer: None,
            energy: Arc::new(crate::energy::Meters::find()),
        },
    }
}

fn job(bench: &Bench, work: Work, input: &[u8], first_item: u64, items: u64) -> Job {
    let secret = SecretKey::from_bytes(&[5; 32]);
    let order = Order {
        user: UserId(PublicKey::of(&secret)),
        institution: "uni-a".parse().unwrap(),
        scheduler: SchedulerId(PublicKey::of(&secret)),
        work,
        input: bench.tools.artifacts.store().add_bytes(input).unwrap(),
        items: first_item + items,
        items_per_part: 0,
        constraints: Constraints::default(),
        credits_max: Credits::ZERO,
        attempts_max: 1,
        nonce: 1,
        issued_at: UtcMillis(0),
        expires_at: UtcMillis(1),
    };
    let order = Signed::sign(order, &secret);
    Job {
        key: LeaseKey {
            job: JobId(order.id()),
            part: 0,
            fence: 1,
        },
        order,
        first_item,
        items,
        from: None,
        threads: 1,
        memory: Bytes(1 << 30),
        gpus: Vec::new(),
        share_milli: 0,
        context_tokens: None,
    }
}

/// The worker that the workspace's build leaves beside the tests.
fn worker_program() -> Option<WorkerProgram> {
    let here = std::env::current_exe().unwrap();
    let folder = here.parent().and_then(Path::parent).unwrap();
    let path = folder.join("karez-worker");
    let args = Vec::new();
    path.exists().then_some(WorkerProgram { path, args })
}

fn generate_with(bench: &Bench, max_tokens: u32) -> Generate {
    assert!(
        worker_program().is_some(),
        "these tests run real models: build the worker with `cargo build -p karez-engine --bins`, or test with --workspace"
    );
    let model = bench
        .tools
        .artifacts
        .store()
        .add_bytes(karez_engine::shipped::MODEL)
        .unwrap();
    Generate {
        raw: true,
        ..Generate::greedy(model, "karez-tiny", max_tokens)
    }
}

fn lines_of(bench: &Bench, ended: &Ended) -> Vec<serde_json::Value> {
    let Exit::Done(result) = &ended.exit else {
        panic!("{:?}", ended.exit)
    };
    let text = bench
        .tools
        .artifacts
        .store()
        .read(result, Bytes(64 << 20))
        .unwrap();
    let text = String::from_utf8(text).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn embed_with(bench: &Bench) -> Work {
    let model: ArtifactRef = bench.tools.artifacts.store().add_bytes(b"not a model").unwrap();
    Work::Embed {
        model,
        model_name: "m".into(),
    }
}

#[tokio::test]
async fn a_noop_needs_nothing_and_numbers_its_items() {
    let bench = bench();
    let job = job(
        &bench,
        Work::Noop { millis_per_item: 0 },
        b"anything\nat all",
        7,
        3,
    );
    let (_stopper, stopped) = stop();
    let ended = run(job, &bench.tools, stopped, Arc::new(|_| {})).await;
    let Exit::Done(result) = ended.exit else {
        panic!("{:?}", ended.exit)
    };
    let text = bench
        .tools
        .artifacts
        .store()
        .read(&result, Bytes(1 << 20))
        .unwrap();
    assert_eq!(
        String::from_utf8(text).unwrap(),
        "{\"index\":7}\n{\"index\":8}\n{\"index\":9}\n"
    );
    assert_eq!((ended.meters.items, ended.meters.bytes_out), (3, Bytes(36)));
    assert_eq!(ended.pin.unwrap().artifact(), result);
}

#[tokio::test]
async fn a_large_result_goes_through_the_scratch_directory_and_leaves_nothing_there() {
    let bench = bench();
    let items = 60_000;
    let job = job(&bench, Work::Noop { millis_per_item: 0 }, b"", 0, items);
    let (_stopper, stopped) = stop();
    let ended = run(job, &bench.tools, stopped, Arc::new(|_| {})).await;
    let Exit::Done(result) = ended.exit else {
        panic!("{:?}", ended.exit)
    };
    assert!(result.bytes.0 > 512 << 10 && result.bytes == ended.meters.bytes_out);
    let text = bench
        .tools
        .artifacts
        .store()
        .read(&result, Bytes(8 << 20))
        .unwrap();
    assert_eq!(text.iter().filter(|b| **b == b'\n').count() as u64, items);
    assert_eq!(std::fs::read_dir(&bench.tools.scratch).unwrap().count(), 0);
}

#[tokio::test]
async fn progress_is_told_now_and_then_and_a_stop_is_heard() {
    let bench = bench();
    let job = job(&bench, Work::Noop { millis_per_item: 20 }, b"", 0, 100_000);
    let (stopper, stopped) = stop();
    let told = Arc::new(Mutex::new(Vec::new()));
    let heard = told.clone();
    let began = Instant::now();
    let stopping = async {
        tokio::time::sleep(Duration::from_millis(700)).await;
        stopper.stop(Duration::from_secs(5));
    };
    let tell = Arc::new(move |told: Told| {
        if let Told::Meters(m) = told {
            heard.lock().unwrap().push(m.items)
        }
    });
    let (ended, ()) = tokio::join!(run(job, &bench.tools, stopped, tell), stopping);
    assert_eq!(ended.exit, Exit::Stopped);
    assert!(began.elapsed() < Duration::from_millis(1500));
    let told = told.lock().unwrap();
    assert!((1..=5).contains(&told.len()) && told.is_sorted(), "{told:?}");
    assert!(ended.meters.items >= 5);
}

#[tokio::test]
async fn a_file_that_is_no_model_fails_the_job_and_not_the_node() {
    let bench = bench();
    let work = embed_with(&bench);
    let job = job(&bench, work, b"\"a\"\n", 0, 1);
    let (_stopper, stopped) = stop();
    let ended = run(job, &bench.tools, stopped, Arc::new(|_| {})).await;
    let Exit::Failed {
        why,
        retryable: false,
    } = ended.exit
    else {
        panic!("{:?}", ended.exit)
    };
    assert!(why.contains("not a usable model"), "{why}");
}

#[tokio::test]
async fn an_input_that_is_not_here_fails_this_node_only() {
    let bench = bench();
    let work = embed_with(&bench);
    let job = job(&bench, work, b"\"gone\"\n", 0, 1);
    bench.tools.artifacts.store().remove(&job.order.input).unwrap();
    let (_stopper, stopped) = stop();
    let ended = run(job, &bench.tools, stopped, Arc::new(|_| {})).await;
    assert!(
        matches!(ended.exit, Exit::Failed { retryable: true, .. }),
        "{:?}",
        ended.exit
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn leases_on_one_model_share_its_worker() {
    let bench = bench();
    let work = Work::Generate(generate_with(&bench, 12));
    let input: String = (0..30).map(|n| format!("\"water {n}\"\n")).collect();
    let jobs = [0, 10, 20].map(|first| job(&bench, work.clone(), input.as_bytes(), first, 10));
    let mut stoppers = Vec::new();
    let mut runs = Vec::new();
    for job in jobs {
        let (stopper, stopped) = stop();
        stoppers.push(stopper);
        runs.push(run(job, &bench.tools, stopped, Arc::new(|_| {})));
    }
    let runs = runs.into_iter();
    let (mut all, mut pins) = (Vec::new(), Vec::new());
    let ended = futures_join(runs.collect()).await;
    // One process served all three.
    assert_eq!(bench.tools.warm.idle(), 1);
    for ended in ended {
        assert!(ended.meters.tokens_out > 0, "{:?}", ended.exit);
        assert!(ended.meters.memory_byte_seconds > Some(0), "{:?}", ended.meters);
        all.extend(lines_of(&bench, &ended));
        pins.push(ended.pin);
    }
    let indexes: Vec<u64> = all.iter().map(|line| line["index"].as_u64().unwrap()).collect();
    assert_eq!(indexes, (0..30).collect::<Vec<_>>());
    assert!(all.iter().all(|line| line["text"].is_string()));
    bench.tools.warm.close();
    assert_eq!(bench.tools.warm.idle(), 0);
}

/// Runs them side by side, in this task.
async fn futures_join<T>(futures: Vec<impl Future<Output = T>>) -> Vec<T> {
    let mut waiting: Vec<_> = futures.into_iter().map(|one| Some(Box::pin(one))).collect();
    let mut done: Vec<Option<T>> = waiting.iter().map(|_| None).collect();
    std::future::poll_fn(|context| {
        for (slot, result) in waiting.iter_mut().zip(&mut done) {
            if let Some(one) = slot
                && let std::task::Poll::Ready(value) = one.as_mut().poll(context)
            {
                *result = Some(value);
                *slot = None;
            }
        }
        if waiting.iter().all(Option::is_none) {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
    done.into_iter().flatten().collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_dies_is_replaced_and_every_line_is_answered_once() {
    let bench = bench();
    let work = Work::Generate(generate_with(&bench, 40));
    let count = 1500;
    let input: String = (0..count).map(|n| format!("\"{n} water flows\"\n")).collect();
    let job = job(&bench, work, input.as_bytes(), 0, count);
    let (_stopper, stopped) = stop();
    let done = Arc::new(Mutex::new(0));
    let told = done.clone();
    let tell = Arc::new(move |said: Told| {
        if let Told::Meters(m) = said {
            *told.lock().unwrap() = m.items;
        }
    });
    let killing = async {
        // Once it is at work.
        let before = loop {
            tokio::time::sleep(Duration::from_millis(10)).await;
            if *done.lock().unwrap() > 0
                && let [pid] = bench.tools.warm.pids().as_slice()
            {
                break *pid;
            }
        };
        let pid = rustix::process::Pid::from_raw(i32::try_from(before).unwrap()).unwrap();
        // Rust's handler takes the first for a stack overflow that was none, steps aside, and lets a real fault come again.
        for _ in 0..2 {
            rustix::process::kill_process(pid, rustix::process::Signal::SEGV).unwrap();
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let died = Instant::now();
        let at = *done.lock().unwrap();
        while !bench.tools.warm.pids().iter().any(|pid| *pid != before)
            && died.elapsed() < Duration::from_secs(30)
        {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        (at, died.elapsed())
    };
    let (ended, (at, back)) = tokio::join!(run(job, &bench.tools, stopped, tell), killing);
    assert!(at < count, "it was killed too late to matter");
    assert!(back < Duration::from_secs(10), "{back:?}");
    let lines = lines_of(&bench, &ended);
    let indexes: Vec<u64> = lines.iter().map(|line| line["index"].as_u64().unwrap()).collect();
    assert_eq!(indexes, (0..count).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_line_at_fault_is_answered_with_its_error_when_the_order_says_so() {
    let bench = bench();
    let strict = generate_with(&bench, 4);
    let long = "water ".repeat(3000);
    let input = format!(
        "{{\"prompt\":\"water\",\"id\":\"a\",\"logprobs\":1}}\nno json\n{{\"prompt\":\"{long}\",\"id\":\"c\"}}\n\
         {{\"prompt\":\"x\",\"id\":\"d\",\"temperature\":-3}}\n{{\"prompt\":\"x\",\"id\":\"e\",\"max_tokens\":2}}\n"
    );
    let lenient = Generate {
        keep_going: true,
        ..strict.clone()
    };
    let (_stopper, stopped) = stop();
    let of = |work| job(&bench, Work::Generate(work), input.as_bytes(), 0, 5);
    let ended = run(of(lenient), &bench.tools, stopped.clone(), Arc::new(|_| {})).await;
    let lines = lines_of(&bench, &ended);
    let ids: Vec<&str> = lines
        .iter()
        .map(|line| line["id"].as_str().unwrap_or(""))
        .collect();
    assert_eq!(ids, ["a", "", "c", "d", "e"]);
    assert_eq!(
        lines[0]["logprobs"].as_array().unwrap().len() as u64,
        lines[0]["tokens_out"].as_u64().unwrap()
    );
    for (line, kind, says) in [
        (1, "bad_input", "not JSON"),
        (2, "context_overflow", "the context holds"),
        (3, "bad_input", "temperature is -3"),
    ] {
        let error = &lines[line]["error"];
        assert_eq!(error["kind"], kind, "{error}");
        assert!(error["message"].as_str().unwrap().contains(says), "{error}");
    }
    assert!(lines[4]["tokens_out"].as_u64().unwrap() <= 2);
    let ended = run(of(strict), &bench.tools, stopped, Arc::new(|_| {})).await;
    let Exit::Failed {
        why,
        retryable: false,
    } = ended.exit
    else {
        panic!("{:?}", ended.exit)
    };
    assert!(why.contains("line 2 of the input is not JSON"), "{why}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_does_not_fit_is_refused_with_the_figures() {
    let bench = bench();
    let work = Work::Generate(generate_with(&bench, 4));
    let mut small = job(&bench, work, b"\"a\"\n", 0, 1);
    small.memory = Bytes(20 << 20);
    let (_stopper, stopped) = stop();
    let ended = run(small, &bench.tools, stopped, Arc::new(|_| {})).await;
    let Exit::Failed { why, retryable: true } = ended.exit else {
        panic!("{:?}", ended.exit)
    };
    assert!(why.contains("MiB of memory and may use 20 MiB"), "{why}");
    assert!(
        bench.tools.warm.pids().is_empty(),
        "no process was started for it"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn pieces_are_told_where_the_order_asks_and_make_up_the_result() {
    let bench = bench();
    for stream in [true, false] {
        let work = Work::Generate(Generate {
            stream,
            ..generate_with(&bench, 300)
        });
        let job = job(&bench, work, b"\"water\"\n", 0, 1);
        let (_stopper, stopped) = stop();
        let pieces = Arc::new(Mutex::new(Vec::new()));
        let heard = pieces.clone();
        let tell = Arc::new(move |said: Told| {
            if let Told::Piece(piece) = said {
                heard.lock().unwrap().push(piece);
            }
        });
        let ended = run(job, &bench.tools, stopped, tell).await;
        let lines = lines_of(&bench, &ended);
        let pieces = pieces.lock().unwrap();
        if !stream {
            assert!(pieces.is_empty());
            continue;
        }
        assert!(pieces.len() > 1, "{pieces:?}");
        let mut tokens = 0;
        for piece in pieces.iter() {
            assert_eq!(
                (piece.item, piece.first_token),
                (0, tokens),
                "no gap and nothing twice"
            );
            tokens += piece.tokens.len() as u64;
        }
        let text: String = pieces.iter().map(|piece| piece.text.as_str()).collect();
        assert_eq!(lines[0]["text"], text.as_str());
        assert_eq!(lines[0]["tokens_out"], tokens);
    }
    bench.tools.warm.close();
}
