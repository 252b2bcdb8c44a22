//! Model headers: what is told, and what is refused, whatever the bytes.
#![allow(clippy::unwrap_used, reason = "in a test, the panic is the report")]

mod common;

use common::{Random, bert_directory, gguf, gguf_file};
use karez_engine::inspect::{Format, inspect, inspect_gguf_bytes};
use karez_engine::unit::Bytes;
use karez_engine::{EngineError, FailureKind};

#[test]
fn a_gguf_tells_what_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let file = inspect(&gguf_file(directory.path())).unwrap();
    assert_eq!(
        (file.format, file.name.as_str(), file.architecture.as_str()),
        (Format::Gguf, "Tiny Test", "llama")
    );
    assert_eq!(
        (file.context_tokens, file.dimensions, file.vocabulary),
        (common::CONTEXT, 64, 259)
    );
    assert!(file.chat_template && file.weight_type == "F32");
    assert_eq!(file.weights, Bytes(file.parameters * 4));
    // Two layers of two kept heads, sixteen numbers of two bytes, keys and values.
    let per_token = 2 * 2 * 16 * 2 * 2;
    assert_eq!(
        file.memory_estimate(1000).0 - file.memory_estimate(0).0,
        per_token * 1000
    );
    assert_eq!(
        (
            file.context_for(None),
            file.context_for(Some(9999)),
            file.context_for(Some(100))
        ),
        (1024, 1024, 100)
    );
}

#[test]
fn a_safetensors_directory_tells_what_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let file = inspect(&bert_directory(directory.path())).unwrap();
    assert_eq!(
        (file.format, file.name.as_str(), file.architecture.as_str()),
        (Format::Safetensors, "tiny-bert", "bert")
    );
    assert_eq!(
        (file.context_tokens, file.dimensions, file.vocabulary),
        (16, 32, 12)
    );
}

#[test]
fn every_truncation_is_named() {
    let whole = gguf();
    let mut lengths: Vec<usize> = (0..6000).step_by(7).collect();
    lengths.extend((6000..whole.len()).step_by(4999));
    for length in lengths {
        let error = inspect_gguf_bytes(&whole[..length], "cut.gguf").unwrap_err();
        assert_eq!(error.kind(), FailureKind::BadModel, "{length}: {error}");
        assert!(
            error.to_string().starts_with("cut.gguf is not a usable model: "),
            "{error}"
        );
        if length > 4 {
            assert!(error.to_string().contains("truncated"), "{length}: {error}");
        }
    }
}

#[test]
fn no_flipped_bits_panic() {
    let whole = gguf();
    let header = whole.len().min(9000);
    let mut random = Random(42);
    for round in 0..4000 {
        let mut bytes = whole.clone();
        for _ in 0..1 + round % 4 {
            // Most of what can go wrong sits at the front.
            let at = if random.below(2) == 0 {
                random.below(1024)
            } else {
                random.below(header)
            };
            bytes[at] ^= 1 << random.below(8);
        }
        if round % 5 == 0 {
            bytes.truncate(random.below(bytes.len()));
        }
        if let Ok(file) = inspect_gguf_bytes(&bytes, "flipped.gguf") {
            let _ = file.memory_estimate(u32::MAX);
        }
    }
}

#[test]
fn absurd_claims_cost_nothing() {
    let claim = |tensors: u64, keys: u64, rest: &[u8]| {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(tensors.to_le_bytes());
        bytes.extend(keys.to_le_bytes());
        bytes.extend(rest);
        inspect_gguf_bytes(&bytes, "absurd").unwrap_err().to_string()
    };
    assert!(claim(u64::MAX, 0, &[]).contains("allowed"));
    assert!(claim(0, u64::MAX, &[]).contains("allowed"));
    assert!(claim(0, 1, &u64::MAX.to_le_bytes()).contains("allowed"));
    assert!(claim(0, 1, &(1u64 << 21).to_le_bytes()).contains("truncated"));
    // A list that claims more elements than there are bytes in the world.
    let list = [
        &1u64.to_le_bytes()[..],
        b"k",
        &9u32.to_le_bytes(),
        &4u32.to_le_bytes(),
        &u64::MAX.to_le_bytes(),
    ];
    assert!(claim(0, 1, &list.concat()).contains("claims"));
    // Lists of lists are not read, however deep.
    let nested = [
        &1u64.to_le_bytes()[..],
        b"k",
        &9u32.to_le_bytes(),
        &9u32.to_le_bytes(),
        &1u64.to_le_bytes(),
    ];
    assert!(claim(0, 1, &nested.concat()).contains("unknown type"));
    assert!(claim(0, 0, &[]).contains("general.architecture"));
    assert!(
        inspect_gguf_bytes(b"PK\x03\x04", "zip")
            .unwrap_err()
            .to_string()
            .contains("begin with GGUF")
    );
}

#[test]
fn safetensors_lies_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let path = bert_directory(directory.path());
    let weights = path.join("model.safetensors");
    let whole = std::fs::read(&weights).unwrap();
    let says = |bytes: &[u8]| {
        std::fs::write(&weights, bytes).unwrap();
        match inspect(&path) {
            Err(EngineError::BadModel { file, reason }) => {
                assert!(file.ends_with("model.safetensors"), "{file}");
                reason
            }
            other => panic!("{other:?}"),
        }
    };
    for length in [0, 7, 8, 100, whole.len() - 1] {
        assert!(says(&whole[..length]).contains("truncated"), "{length}");
    }
    assert!(says(&[&whole[..], &[0]].concat()).contains("follow the last tensor"));
    assert!(says(&[&u64::MAX.to_le_bytes()[..], &whole[8..]].concat()).contains("announced"));
    let with = |header: &str, data: usize| {
        [
            &(header.len() as u64).to_le_bytes()[..],
            header.as_bytes(),
            &vec![0; data],
        ]
        .concat()
    };
    for (header, expected) in [
        (
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#,
            "its shape needs 8",
        ),
        (
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#,
            "its shape needs 8",
        ),
        (
            r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#,
            "ends at byte 16",
        ),
        (
            r#"{"a":{"dtype":"F32","shape":[18446744073709551615,4],"data_offsets":[0,8]}}"#,
            "too many elements",
        ),
        (r#"{"a":{"dtype":"Q9","shape":[2],"data_offsets":[0,8]}}"#, "Q9"),
        (
            r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
            "overlap",
        ),
        (r#"{"a":{"dtype":"F32""#, "header"),
    ] {
        let reason = says(&with(header, 8));
        assert!(reason.contains(expected), "{header}: {reason}");
    }
    let mut random = Random(5);
    for _ in 0..300 {
        let mut bytes = whole.clone();
        let at = random.below(3000);
        bytes[at] ^= 1 << random.below(8);
        std::fs::write(&weights, bytes).unwrap();
        let _ = inspect(&path);
    }
}

#[test]
fn what_is_missing_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let path = bert_directory(directory.path());
    std::fs::remove_file(path.join("tokenizer.json")).unwrap();
    let error = inspect(&path).unwrap_err();
    assert!(error.to_string().contains("tokenizer.json"), "{error}");
    assert!(
        inspect(&directory.path().join("nothing"))
            .unwrap_err()
            .to_string()
            .contains("No such file")
    );
    assert!(
        inspect("/dev/null".as_ref())
            .unwrap_err()
            .to_string()
            .contains("neither")
    );
}
