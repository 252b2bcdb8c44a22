//! What a request can ask for, on the real worker.
#![allow(clippy::unwrap_used, reason = "in a test, the panic is the report")]

mod common;

use common::{gguf_file, loaded, raw, work, worker};
use karez_engine::json::Json;
use karez_engine::protocol::{
    Adapter, Finish, Generate, JsonSchema, Load, LoadKind, Output, ResponseFormat, TokenLogprob, Work,
};
use karez_engine::unit::Bytes;
use karez_engine::{EngineError, FailureKind, Worker};

async fn answer(worker: &Worker, request: Generate) -> (String, Finish, Vec<TokenLogprob>) {
    match worker.run(work(request)).unwrap().finish().await.unwrap() {
        (
            Output::Text {
                text,
                finish,
                logprobs,
            },
            _,
        ) => (text, finish, logprobs),
        other => panic!("{other:?}"),
    }
}

async fn refusal(worker: &Worker, request: Generate) -> EngineError {
    match worker.run(work(request)) {
        Ok(run) => run.finish().await.unwrap_err().0,
        Err(error) => error,
    }
}

fn schema(text: &str) -> Option<ResponseFormat> {
    Some(ResponseFormat::JsonSchema {
        json_schema: JsonSchema {
            name: String::new(),
            schema: serde_json::from_str(text).unwrap(),
        },
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_out_of_range_are_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let worker = loaded(LoadKind::Generate, &gguf_file(directory.path())).await;
    let with = |change: &dyn Fn(&mut Generate)| {
        let mut request = raw("x", 5);
        change(&mut request);
        request
    };
    for (request, says) in [
        (with(&|g| g.min_p = 1.5), "min_p is 1.5; 0 to 1"),
        (with(&|g| g.presence_penalty = 3.0), "presence_penalty is 3"),
        (
            with(&|g| g.frequency_penalty = f32::NAN),
            "frequency_penalty is NaN",
        ),
        (with(&|g| g.repetition_penalty = 0.0), "repetition_penalty is 0"),
        (
            with(&|g| g.top_logprobs = Some(21)),
            "top_logprobs is 21; 0 to 20",
        ),
        (
            with(&|g| g.logit_bias = vec![(9999, 1.0)]),
            "token 9999; the model has 259",
        ),
        (
            with(&|g| g.stop = vec!["x".repeat(2000)]),
            "a stop string of 2000 bytes",
        ),
        (with(&|g| g.resume = vec![100_000]), "resume names token 100000"),
        (
            with(&|g| g.response_format = schema(r#"{"type":"string","pattern":"a"}"#)),
            "\"pattern\"",
        ),
    ] {
        let error = refusal(&worker, request).await;
        // A number that JSON cannot carry is refused before it travels.
        assert!(
            error.to_string().contains(says) || error.to_string().contains("frequency"),
            "{says}: {error}"
        );
        assert_eq!(error.kind(), FailureKind::BadInput, "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn penalties_and_biases_change_what_they_should() {
    let directory = tempfile::tempdir().unwrap();
    let worker = loaded(LoadKind::Generate, &gguf_file(directory.path())).await;
    let plain = answer(&worker, raw("water", 60)).await.0;
    let repeats =
        |text: &str| text.chars().count() - text.chars().collect::<std::collections::BTreeSet<_>>().len();
    for change in [
        |g: &mut Generate| g.frequency_penalty = 2.0,
        |g: &mut Generate| g.presence_penalty = 2.0,
        |g: &mut Generate| g.repetition_penalty = 5.0,
    ] {
        let mut request = raw("water", 60);
        change(&mut request);
        let text = answer(&worker, request).await.0;
        assert!(repeats(&text) < repeats(&plain), "{text:?} beside {plain:?}");
    }
    // The tokens are bytes: 33 places after the printable ones begins at '!'.
    let only = Generate {
        logit_bias: vec![(u32::from(b'w'), 100.0)],
        ..raw("water", 8)
    };
    assert_eq!(answer(&worker, only).await.0, "wwwwwwww");
    let likely = Generate {
        temperature: 1.0,
        min_p: 1.0,
        ..raw("water", 20)
    };
    assert_eq!(
        answer(&worker, likely).await.0,
        answer(&worker, raw("water", 20)).await.0
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn log_probabilities_are_told_for_each_token() {
    let directory = tempfile::tempdir().unwrap();
    let worker = loaded(LoadKind::Generate, &gguf_file(directory.path())).await;
    let request = Generate {
        top_logprobs: Some(3),
        ..raw("water", 12)
    };
    let (text, _, logprobs) = answer(&worker, request).await;
    assert_eq!(logprobs.len(), 12);
    let bytes: Vec<u8> = logprobs.iter().flat_map(|token| token.bytes.clone()).collect();
    assert_eq!(String::from_utf8_lossy(&bytes), text);
    for token in &logprobs {
        assert!(token.logprob <= 0.0 && token.top_logprobs.len() == 3);
        // Greedy: the chosen one is the likeliest.
        assert_eq!(token.bytes, token.top_logprobs[0].bytes);
        assert!(token.top_logprobs.is_sorted_by(|a, b| a.logprob >= b.logprob));
    }
    let none = answer(
        &worker,
        Generate {
            top_logprobs: Some(0),
            ..raw("water", 3)
        },
    )
    .await
    .2;
    assert!(none.len() == 3 && none[0].top_logprobs.is_empty());
    assert!(answer(&worker, raw("water", 3)).await.2.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_fits_its_schema() {
    let directory = tempfile::tempdir().unwrap();
    let worker = loaded(LoadKind::Generate, &gguf_file(directory.path())).await;
    let text = r##"{"type":"object","additionalProperties":false,"required":["unit","depth","tags"],
        "properties":{"unit":{"enum":["m","km\"s"]},"depth":{"type":"integer","minimum":0},
        "note":{"type":["string","null"],"maxLength":5},
        "tags":{"type":"array","items":{"$ref":"#/$defs/tag"},"minItems":1,"maxItems":2},
        "day":{"type":"string","format":"date"}},
        "$defs":{"tag":{"type":"object","required":["n"],"properties":{"n":{"type":"boolean"}}}}}"##;
    let mut complete = 0;
    for seed in 0..12 {
        let request = Generate {
            temperature: 1.0,
            seed,
            response_format: schema(text),
            ..raw("water", 400)
        };
        let (answer, finish, _) = answer(&worker, request).await;
        if finish == Finish::Length {
            continue;
        }
        complete += 1;
        let json: Json = serde_json::from_str(&answer).unwrap_or_else(|error| panic!("{answer:?}: {error}"));
        let names: Vec<&str> = json
            .as_object()
            .unwrap()
            .iter()
            .map(|(name, _)| name.as_str())
            .collect();
        let order = ["unit", "depth", "note", "tags", "day"];
        assert!(
            names
                .iter()
                .map(|name| order.iter().position(|o| o == name).unwrap())
                .is_sorted(),
            "{answer}"
        );
        assert!(
            ["m", "km\"s"].contains(&json.get("unit").and_then(Json::as_str).unwrap()),
            "{answer}"
        );
        assert!(json.get("depth").and_then(Json::as_u64).is_some(), "{answer}");
        let tags = json.get("tags").and_then(Json::as_list).unwrap();
        assert!((1..=2).contains(&tags.len()), "{answer}");
        assert!(
            tags.iter().all(|tag| matches!(tag.get("n"), Some(Json::Bool(_)))),
            "{answer}"
        );
    }
    assert!(complete >= 6, "{complete} of 12 came to an end");

    let object = Generate {
        response_format: Some(ResponseFormat::JsonObject),
        ..raw("water", 30)
    };
    assert!(answer(&worker, object).await.0.starts_with('{'));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adapter_changes_its_own_request_only() {
    let directory = tempfile::tempdir().unwrap();
    let model = gguf_file(directory.path());
    let adapters = directory.path().join("adapters");
    std::fs::create_dir(&adapters).unwrap();
    let put = |name: &str, bytes: Vec<u8>| std::fs::write(adapters.join(name), bytes).unwrap();
    put("good.gguf", common::lora("llama", Some("aa11"), 64));
    put("silent.gguf", common::lora("llama", None, 64));
    let worker = worker().await;
    let load = Load {
        threads: Some(1),
        sequences: Some(4),
        adapters: Some(adapters.clone()),
        digest: Some("aa11".into()),
        ..Load::new(LoadKind::Generate, &model)
    };
    worker.load(load, None).await.unwrap();
    // Files may come while the worker runs.
    put("base.gguf", common::lora("llama", Some("bb22"), 64));
    put("other.gguf", common::lora("qwen2", Some("aa11"), 64));
    put("shape.gguf", common::lora("llama", Some("aa11"), 32));
    put("model.gguf", common::gguf());
    put(
        "broken.gguf",
        common::lora("llama", Some("aa11"), 64)[..400].to_vec(),
    );

    let with = |file: &str, scale: f32| Generate {
        adapter: Some(Adapter {
            file: file.into(),
            scale,
        }),
        ..raw("water flows", 30)
    };
    let plain = answer(&worker, raw("water flows", 30)).await.0;
    let changed = answer(&worker, with("good.gguf", 1.0)).await.0;
    assert_ne!(plain, changed);
    assert_eq!(answer(&worker, with("silent.gguf", 1.0)).await.0, changed);
    assert_eq!(answer(&worker, with("good.gguf", 0.0)).await.0, plain);
    // Side by side, and after one another in the same slot.
    let runs: Vec<_> = (0..6)
        .map(|n| {
            let request = if n % 2 == 0 {
                raw("water flows", 30)
            } else {
                with("good.gguf", 1.0)
            };
            (n, worker.run(work(request)).unwrap())
        })
        .collect();
    for (n, run) in runs {
        let Ok((Output::Text { text, .. }, _)) = run.finish().await else {
            panic!()
        };
        assert_eq!(
            text,
            if n % 2 == 0 {
                plain.clone()
            } else {
                changed.clone()
            }
        );
    }
    for (file, says) in [
        ("base.gguf", "for the base model bb22, this one is aa11"),
        ("other.gguf", "an adapter for \"qwen2\", the model is \"llama\""),
        ("shape.gguf", "cannot put it over this model"),
        ("model.gguf", "where a LoRA adapter is expected"),
        ("broken.gguf", "truncated"),
        ("gone.gguf", "not a usable model"),
        ("../tiny.gguf", "no file name"),
    ] {
        let error = refusal(&worker, with(file, 1.0)).await;
        assert!(error.to_string().contains(says), "{file}: {error}");
    }
    assert!(
        refusal(&worker, with("good.gguf", f32::MAX))
            .await
            .to_string()
            .contains("scale")
    );
    assert_eq!(answer(&worker, raw("water flows", 30)).await.0, plain);
}

#[tokio::test(flavor = "multi_thread")]
async fn adapters_that_nobody_uses_make_room_for_others() {
    let directory = tempfile::tempdir().unwrap();
    let model = gguf_file(directory.path());
    let adapters = directory.path().join("adapters");
    std::fs::create_dir(&adapters).unwrap();
    let adapter = common::lora("llama", None, 64);
    let many = 40;
    for n in 0..many {
        std::fs::write(adapters.join(format!("{n}.gguf")), &adapter).unwrap();
    }
    let load = |memory: u64| Load {
        threads: Some(1),
        sequences: Some(4),
        adapters: Some(adapters.clone()),
        adapter_memory: Some(Bytes(memory)),
        ..Load::new(LoadKind::Generate, &model)
    };
    let with = |n: usize| Generate {
        adapter: Some(Adapter {
            file: format!("{n}.gguf"),
            scale: 1.0,
        }),
        ..raw("water flows", 12)
    };
    // Room for two and a bit.
    let worker = worker().await;
    worker
        .load(load(adapter.len() as u64 * 5 / 2), None)
        .await
        .unwrap();
    let plain = answer(&worker, raw("water flows", 12)).await.0;
    let changed = answer(&worker, with(0)).await.0;
    assert_ne!(plain, changed);
    for n in (0..many).chain([0, many - 1]) {
        assert_eq!(answer(&worker, with(n)).await.0, changed, "adapter {n}");
    }
    assert_eq!(answer(&worker, raw("water flows", 12)).await.0, plain);
    worker.shutdown().await;
    let worker = self::worker().await;
    worker.load(load(100), None).await.unwrap();
    let error = refusal(&worker, with(0)).await.to_string();
    assert!(
        error.contains("takes about 1 MiB") && error.contains("0 MiB are set aside"),
        "{error}"
    );
}

async fn vectors(worker: &Worker, texts: &[&str]) -> Vec<Vec<f32>> {
    let texts = texts.iter().map(|text| text.to_string()).collect();
    match worker.run(Work::Embed { texts }).unwrap().finish().await.unwrap() {
        (Output::Vectors { vectors, .. }, _) => vectors,
        other => panic!("{other:?}"),
    }
}

fn cosine(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gguf_gives_vectors_too() {
    let directory = tempfile::tempdir().unwrap();
    let worker = worker().await;
    let load = Load {
        threads: Some(1),
        ..Load::new(LoadKind::Embed, gguf_file(directory.path()))
    };
    let facts = worker.load(load, None).await.unwrap();
    assert_eq!(facts.dimensions, Some(64));
    let together = vectors(&worker, &["water flows", "stars shine at night", "water flows"]).await;
    for vector in &together {
        assert_eq!(vector.len(), 64);
        assert!((cosine(vector, vector) - 1.0).abs() < 1e-5);
    }
    assert!(cosine(&together[0], &together[2]) > 0.99999);
    assert!(cosine(&together[0], &together[1]) < 0.999);
    // Company changes nothing but roundings.
    let alone = vectors(&worker, &["stars shine at night"]).await;
    assert!(cosine(&alone[0], &together[1]) > 0.9999);
    let many: Vec<String> = (0..100).map(|n| format!("text number {n}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    assert_eq!(vectors(&worker, &many).await.len(), 100);
    let long = "x".repeat(5000);
    let Ok((Output::Vectors { truncated: 1, .. }, meters)) = worker
        .run(Work::Embed { texts: vec![long] })
        .unwrap()
        .finish()
        .await
    else {
        panic!("not cut")
    };
    assert_eq!(meters.tokens_in, u64::from(common::CONTEXT));
}
