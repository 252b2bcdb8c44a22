//! Sentence vectors from the real worker process.
#![allow(clippy::unwrap_used, reason = "in a test, the panic is the report")]

mod common;

use std::path::PathBuf;

use common::{bert_directory, loaded, worker};
use karez_engine::protocol::{Load, LoadKind, Meters, Output, Work};
use karez_engine::{FailureKind, Worker};

async fn embed(worker: &Worker, texts: &[&str]) -> (Vec<Vec<f32>>, u32, Meters) {
    let texts = texts.iter().map(|text| text.to_string()).collect();
    match worker.run(Work::Embed { texts }).unwrap().finish().await.unwrap() {
        (Output::Vectors { vectors, truncated }, meters) => (vectors, truncated, meters),
        other => panic!("{other:?}"),
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn vectors_have_length_one_and_do_not_depend_on_their_batch() {
    let directory = tempfile::tempdir().unwrap();
    let worker = worker().await;
    let load = Load {
        threads: Some(2),
        ..Load::new(LoadKind::Embed, bert_directory(directory.path()))
    };
    let facts = worker.load(load, None).await.unwrap();
    assert_eq!((facts.dimensions, facts.context_tokens), (Some(32), 16));

    let texts = [
        "water flows underground",
        "stars shine at night",
        "night",
        "Water Flows Under Ground at night",
    ];
    let (together, truncated, meters) = embed(&worker, &texts).await;
    assert_eq!((together.len(), truncated), (4, 0));
    // Two marks each, and words it does not know count as one.
    assert_eq!(meters.tokens_in, 3 + 4 + 1 + 6 + 4 * 2);
    for (text, vector) in texts.iter().zip(&together) {
        assert_eq!(vector.len(), 32);
        assert!((dot(vector, vector) - 1.0).abs() < 1e-5);
        let (alone, _, _) = embed(&worker, &[text]).await;
        assert!(dot(&alone[0], vector) > 0.99999, "{text}");
    }
    assert!(dot(&together[0], &together[1]) < 0.999);
}

#[tokio::test(flavor = "multi_thread")]
async fn long_texts_are_cut_and_counted() {
    let directory = tempfile::tempdir().unwrap();
    let worker = loaded(LoadKind::Embed, &bert_directory(directory.path())).await;
    let (long, fits) = ("stars ".repeat(50), "stars ".repeat(14));
    let (vectors, truncated, meters) = embed(&worker, &[&long, "stars", &fits, ""]).await;
    assert_eq!((truncated, meters.tokens_in), (1, 16 + 3 + 16 + 2));
    assert!(dot(&vectors[0], &vectors[2]) > 0.99999);

    let too_many = Work::Embed {
        texts: vec![String::new(); 1025],
    };
    let (error, _) = worker.run(too_many).unwrap().finish().await.unwrap_err();
    assert_eq!(error.kind(), FailureKind::BadInput);
}

/// The real model, where it is at hand: its meaning, and one vector against numbers computed by other software.
#[tokio::test(flavor = "multi_thread")]
async fn similar_sentences_are_near() {
    let Some(path) = std::env::var_os("KAREZ_TEST_MINILM").map(PathBuf::from) else {
        eprintln!("skipped: set KAREZ_TEST_MINILM to the directory of all-MiniLM-L6-v2");
        return;
    };
    let worker = loaded(LoadKind::Embed, &path).await;
    let (vectors, _, _) = embed(
        &worker,
        &[
            "A man is eating food.",
            "A man is eating a piece of bread.",
            "The girl is carrying a baby.",
            "Spare computers are lent across borders.",
            "A cheetah is running behind its prey.",
        ],
    )
    .await;
    // Computed in double precision with numpy, straight from the definition of the architecture.
    let reference = [
        0.0332416, 0.0044061, -0.0062769, 0.0483787, -0.1387022, -0.0336174, 0.1011283, -0.054385,
    ];
    for (number, expected) in vectors[0].iter().zip(reference) {
        assert!((number - expected).abs() < 2e-5, "{number} is not {expected}");
    }
    let near = dot(&vectors[0], &vectors[1]);
    assert!((near - 0.755_337).abs() < 1e-4, "{near}");
    for other in &vectors[2..] {
        assert!(dot(&vectors[0], other) < 0.3);
    }
}
