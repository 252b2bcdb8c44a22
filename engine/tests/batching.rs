//! Many generations on one real worker: what they share, and that nobody notices.
#![allow(clippy::unwrap_used, reason = "in a test, the panic is the report")]

mod common;

use std::time::Duration;

use common::{gguf_file, raw, work, worker};
use karez_engine::protocol::{Finish, Generate, Load, LoadKind, Meters, Output, Piece, TokenLogprob};
use karez_engine::shipped;
use karez_engine::{EngineError, Event, Run, Worker};

async fn with_sequences(model: &std::path::Path, sequences: u16, change: impl FnOnce(&mut Load)) -> Worker {
    let worker = worker().await;
    let mut load = Load {
        threads: Some(1),
        sequences: Some(sequences),
        ..Load::new(LoadKind::Generate, model)
    };
    change(&mut load);
    worker.load(load, None).await.unwrap();
    worker
}

fn start(worker: &Worker, request: &Generate) -> Run {
    worker.run(work(request.clone())).unwrap()
}

async fn text_of(run: Run) -> (String, Meters) {
    match run.finish().await.unwrap() {
        (Output::Text { text, .. }, meters) => (text, meters),
        other => panic!("{other:?}"),
    }
}

/// Prompts of many lengths, some with long beginnings in common.
fn requests(count: usize) -> Vec<Generate> {
    (0..count)
        .map(|n| {
            let beginning = if n % 3 == 0 {
                "stars shine at night ".repeat(8)
            } else {
                String::new()
            };
            raw(
                &format!("{beginning}{n} water flows {}", "on ".repeat(n * 7 % 60)),
                10 + (n as u32 * 5) % 30,
            )
        })
        .collect()
}

async fn alone(model: &std::path::Path, requests: &[Generate]) -> Vec<String> {
    let single = with_sequences(model, 1, |_| {}).await;
    let mut all = Vec::new();
    for request in requests {
        all.push(text_of(start(&single, request)).await.0);
    }
    all
}

async fn logprobs_of(run: Run) -> (Vec<TokenLogprob>, Meters) {
    match run.finish().await.unwrap() {
        (Output::Text { logprobs, .. }, meters) => (logprobs, meters),
        other => panic!("{other:?}"),
    }
}

/// Where two greedy answers part, the two tokens were as good as equally likely: company changes the order in which
/// llama.cpp adds numbers up, and keys and values are kept in 16 bits. A mistake of ours would part them anywhere.
fn equal_but_for_ties(alone: &[TokenLogprob], shared: &[TokenLogprob], what: &str) -> bool {
    let parting = alone.iter().zip(shared).find(|(a, b)| a.bytes != b.bytes);
    let Some((a, b)) = parting else {
        assert_eq!(alone.len(), shared.len(), "{what}");
        for (a, b) in alone.iter().zip(shared) {
            assert!((a.logprob - b.logprob).abs() < 0.05, "{what}: {a:?} {b:?}");
        }
        return true;
    };
    let gap = a.top_logprobs[0].logprob - a.top_logprobs[1].logprob;
    assert!(
        gap < 0.05 && a.top_logprobs[1].bytes == b.bytes,
        "{what}: parted over {gap}: {a:?} {b:?}"
    );
    false
}

#[tokio::test(flavor = "multi_thread")]
async fn greedy_answers_in_company_equal_those_alone() {
    let directory = tempfile::tempdir().unwrap();
    let model = gguf_file(directory.path());
    let requests: Vec<Generate> = requests(20)
        .into_iter()
        .map(|request| Generate {
            top_logprobs: Some(2),
            ..request
        })
        .collect();
    let single = with_sequences(&model, 1, |_| {}).await;
    let mut expected = Vec::new();
    for request in &requests {
        expected.push(logprobs_of(start(&single, request)).await.0);
    }
    let shared = with_sequences(&model, 6, |load| load.cache_tokens = Some(6 * common::CONTEXT)).await;
    for round in 0..2 {
        let runs: Vec<Run> = requests.iter().map(|request| start(&shared, request)).collect();
        let (mut cached, mut equal) = (0, 0);
        for (n, (run, expected)) in runs.into_iter().zip(&expected).enumerate() {
            let (told, meters) = logprobs_of(run).await;
            equal += u32::from(equal_but_for_ties(
                expected,
                &told,
                &format!("round {round}, request {n}"),
            ));
            cached += meters.tokens_cached;
        }
        assert!(equal >= 16, "round {round}: {equal} of 20");
        // Equal beginnings were computed once for several.
        assert!(cached > 400, "round {round}: {cached}");
    }
    assert_eq!(shared.runs(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_shipped_model_answers_the_same_in_company() {
    let directory = tempfile::tempdir().unwrap();
    let model = directory.path().join("karez-tiny.gguf");
    std::fs::write(&model, shipped::MODEL).unwrap();
    let prompts = [
        "The stars",
        "Water flows",
        "El agua",
        "A river of",
        "Night",
        "In the morning",
    ];
    let requests: Vec<Generate> = prompts.iter().map(|prompt| raw(prompt, 24)).collect();
    let expected = alone(&model, &requests).await;
    let shared = with_sequences(&model, 6, |_| {}).await;
    let runs: Vec<Run> = requests.iter().map(|request| start(&shared, request)).collect();
    for (run, expected) in runs.into_iter().zip(&expected) {
        assert_eq!(text_of(run).await.0, *expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_cache_delays_and_loses_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let model = gguf_file(directory.path());
    // Each needs about half of the cache.
    let requests: Vec<Generate> = (0..6)
        .map(|n| raw(&format!("{n}{}", "water ".repeat(15)), 60 + n))
        .collect();
    let expected = alone(&model, &requests).await;
    let shared = with_sequences(&model, 6, |load| load.context_tokens = Some(256)).await;
    let runs: Vec<Run> = requests.iter().map(|request| start(&shared, request)).collect();
    for (run, expected) in runs.into_iter().zip(&expected) {
        let (text, meters) = text_of(run).await;
        assert_eq!(text, *expected);
        assert_eq!(meters.tokens_in, 91, "read again, but not metered again");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_who_is_slow_or_leaves_holds_up_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let model = gguf_file(directory.path());
    let shared = with_sequences(&model, 2, |load| load.cache_tokens = Some(4096)).await;
    // Never read while the others run, and its answer is whole all the same.
    let slow = start(&shared, &raw("slow", 300));
    let left = start(&shared, &raw("left", 900));
    for n in 0..8 {
        if n == 3 {
            left.cancel();
        }
        let quick = tokio::time::timeout(Duration::from_secs(60), text_of(start(&shared, &raw("x", 5))));
        quick.await.unwrap();
    }
    let (error, meters) = left.finish().await.unwrap_err();
    assert_eq!(error, EngineError::Cancelled);
    assert!(meters.tokens_out < 900, "{meters:?}");
    let mut slow = slow;
    let mut text = String::new();
    loop {
        match slow.next().await.unwrap() {
            Event::Token(piece) => text.push_str(&piece.text),
            Event::Done {
                output: Output::Text { text: whole, .. },
                ..
            } => break assert_eq!(text, whole),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resumed_answer_goes_on_where_it_was() {
    let directory = tempfile::tempdir().unwrap();
    let model = gguf_file(directory.path());
    let (one, two) = (
        with_sequences(&model, 1, |_| {}).await,
        with_sequences(&model, 4, |_| {}).await,
    );
    let sampled = Generate {
        temperature: 1.2,
        top_p: 0.95,
        seed: 99,
        frequency_penalty: 0.5,
        repetition_penalty: 1.1,
        ..raw("a river", 40)
    };
    for request in [raw("a river", 40), sampled] {
        let mut run = start(&one, &request);
        let mut pieces: Vec<Piece> = Vec::new();
        let whole = loop {
            match run.next().await.unwrap() {
                Event::Token(piece) => pieces.push(piece),
                Event::Done {
                    output: Output::Text { text, .. },
                    meters,
                } => {
                    assert_eq!(meters.tokens_out, 40);
                    break text;
                }
                other => panic!("{other:?}"),
            }
        };
        let tokens: Vec<u32> = pieces.iter().flat_map(|piece| piece.tokens.clone()).collect();
        assert_eq!(tokens.len(), 40);
        for upto in [1, 17, 39] {
            let resumed = Generate {
                resume: tokens[..upto].to_vec(),
                ..request.clone()
            };
            let mut run = start(&two, &resumed);
            let mut rest = String::new();
            loop {
                match run.next().await.unwrap() {
                    Event::Token(piece) => rest.push_str(&piece.text),
                    Event::Done {
                        output: Output::Text { text, finish, .. },
                        meters,
                    } => {
                        assert_eq!(
                            (text.as_str(), finish),
                            (whole.as_str(), Finish::Length),
                            "from {upto}"
                        );
                        assert!(text.ends_with(&rest), "{rest:?} is the end of {text:?}");
                        assert_eq!(meters.tokens_out, 40 - upto as u64);
                        break;
                    }
                    other => panic!("{other:?}"),
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_time_of_a_shared_step_is_divided_and_not_multiplied() {
    let directory = tempfile::tempdir().unwrap();
    let model = gguf_file(directory.path());
    let shared = with_sequences(&model, 8, |load| load.cache_tokens = Some(8192)).await;
    let began = std::time::Instant::now();
    let runs: Vec<Run> = (0..8)
        .map(|n| start(&shared, &raw(&format!("{n} go on"), 200)))
        .collect();
    let mut wall = 0;
    for run in runs {
        wall += text_of(run).await.1.wall_ms.0;
    }
    // Each rounds up by less than a millisecond.
    let took = began.elapsed().as_millis() as u64 + 8;
    assert!(wall <= took, "{wall} ms were metered of {took} that passed");
    assert!(wall > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_read_comes_back_after_others_and_the_oldest_makes_room() {
    let directory = tempfile::tempdir().unwrap();
    let model = gguf_file(directory.path());
    // A third of it lies beside the cache: some 1,300 tokens.
    let shared = with_sequences(&model, 2, |load| load.cache_tokens = Some(4 * common::CONTEXT)).await;
    let asked = |n: usize, more: &str| raw(&format!("{n}. {}{more}", "the water flows ".repeat(12)), 8);
    let mut answers = Vec::new();
    for n in 0..3 {
        let (text, meters) = text_of(start(&shared, &asked(n, "?"))).await;
        assert_eq!(meters.tokens_cached, 0, "nobody began like it");
        answers.push((text, meters.tokens_in));
    }
    for (n, (answer, tokens)) in answers.iter().enumerate() {
        let (same, meters) = text_of(start(&shared, &asked(n, "?"))).await;
        assert_eq!((&same, meters.tokens_in), (answer, *tokens));
        assert_eq!(meters.tokens_cached, tokens - 1, "all but its last token");
        // A conversation goes on with what was said.
        let (_, meters) = text_of(start(&shared, &asked(n, &format!("?{answer} And then?")))).await;
        assert!(meters.tokens_cached + 2 >= *tokens, "{meters:?} of {tokens}");
    }
    for n in 3..9 {
        text_of(start(&shared, &asked(n, "?"))).await;
    }
    let (_, meters) = text_of(start(&shared, &asked(0, "?"))).await;
    assert_eq!(meters.tokens_cached, 0, "it made room");
    let (_, meters) = text_of(start(&shared, &asked(8, "?"))).await;
    assert!(meters.tokens_cached > 100, "{meters:?}");
}
