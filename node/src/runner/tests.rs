use super::*;
use crate::{artifacts::Artifacts, stop::stop};
use karez_core::{
    artifact::ArtifactRef,
    id::JobId,
    key::{PublicKey, SchedulerId, SecretKey, UserId},
    records::{Constraints, Signed},
    unit::{Credits, UtcMillis},
};
use karez_net::store::ArtifactStore;
use std::sync::Mutex;

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
    let artifacts = Artifacts::serve(
        store,
        ([127, 0, 0, 1], 0).into(),
        &secret,
        Vec::new(),
        Default::default(),
    )
    .unwrap();
    let warm = Warm::new(None, Duration::from_secs(1), Bytes(1 << 30));
    Bench {
        _dir: dir,
        tools: Tools {
            artifacts,
            scratch,
            warm,
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
        threads: 1,
        memory: Bytes(1 << 30),
        gpus: Vec::new(),
        context_tokens: None,
    }
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
    let ended = run(job, &bench.tools, stopped, Box::new(|_| {})).await;
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
    let ended = run(job, &bench.tools, stopped, Box::new(|_| {})).await;
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
    let tell = Box::new(move |m: WorkerMeters| heard.lock().unwrap().push(m.items));
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
    let ended = run(job, &bench.tools, stopped, Box::new(|_| {})).await;
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
    let ended = run(job, &bench.tools, stopped, Box::new(|_| {})).await;
    assert!(
        matches!(ended.exit, Exit::Failed { retryable: true, .. }),
        "{:?}",
        ended.exit
    );
}
