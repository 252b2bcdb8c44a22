//! Data: what is learnt of it, and what is wrong with it.

use serde_json::json;

use super::Settings;
use super::data::{self, Data, Packed, Reader};
use super::run_tests::{shipped, write_data};

#[test]
fn only_the_assistants_words_are_learnt() {
    let reader = Reader::open(&shipped()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = write_data(
        folder.path(),
        &[
            json!({"messages": [
            {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Maji?"},
            {"role": "assistant", "content": "Ndiyo."}, {"role": "user", "content": "Wapi?"},
            {"role": "assistant", "content": "Mtoni."}]}),
            json!({"instruction": "Translate", "input": "water", "output": "maji"}),
            json!({"text": "Maji ni uhai."}),
        ],
    );
    let settings = Settings {
        val_set_size: 0.0,
        ..Settings::default()
    };
    let data = Data::read(&path, &reader, &settings, Some("sw")).unwrap();
    let said = |learnt: bool| -> Vec<String> {
        let text = |example: &data::Example| {
            let ids = example
                .ids
                .iter()
                .zip(&example.learnt)
                .filter(|(_, l)| **l == learnt);
            let ids: Vec<u32> = ids.map(|(id, _)| *id).collect();
            reader.tokenizer().decode(&ids, false).unwrap()
        };
        let mut texts: Vec<String> = data.examples.iter().map(text).collect();
        texts.sort();
        texts
    };
    assert_eq!(
        said(true),
        [
            "Maji ni uhai.<|im_end|>",
            "Ndiyo.<|im_end|>Mtoni.<|im_end|>",
            "maji<|im_end|>"
        ]
    );
    assert_eq!(
        said(false)[1..],
        [
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nMaji?<|im_end|>\n<|im_start|>assistant\n\n<|im_start|>user\nWapi?<|im_end|>\n<|im_start|>assistant\n",
            "<|im_start|>user\nTranslate\n\nwater<|im_end|>\n<|im_start|>assistant\n",
        ]
    );
    let packed = Packed::new(&data.examples);
    for (row, target) in &packed.targets {
        let next = packed.ids.get(*row as usize + 1);
        let ends = packed
            .lengths
            .iter()
            .scan(0, |sum, length| {
                *sum += length;
                Some(*sum)
            })
            .any(|end| end == *row as usize + 1);
        assert!(ends || next == Some(target), "row {row}");
    }
}

#[test]
fn bad_lines_are_named_together() {
    let reader = Reader::open(&shipped()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bad.jsonl");
    let mut text =
        b"{\"text\":\"fine\"}\nnot json\n{\"prompt\":\"p\"}\n{\"prompt\":\"p\",\"completion\":\" \"}\n"
            .to_vec();
    text.extend(b"{\"text\":\"\xff\"}\n{\"text\":\"x\",\"lang\":\"Kiswahili!\"}\n{\"messages\":[{\"role\":\"user\",\"content\":\"u\"}]}\n");
    text.extend(format!("{{\"text\":\"{}\"}}\n", "maji ".repeat(600)).bytes());
    text.extend(b"{\"messages\":[{\"role\":\"bot\",\"content\":\"u\"}]}\n[1]\n");
    std::fs::write(&path, text).unwrap();
    let error = Data::read(&path, &reader, &Settings::default(), None)
        .unwrap_err()
        .to_string();
    for says in [
        "bad.jsonl: line 2 is not JSON",
        "line 3 has the wrong shape",
        "line 4 has an empty answer",
        "line 5 is not UTF-8",
        "line 6 has the language \"Kiswahili!\"",
        "line 4 has an empty answer: there is nothing to learn (and so with 7)",
        "line 8 has ",
        "sequence_len is 512",
        "line 9 has a turn of \"bot\"",
        "line 10 has the wrong shape",
    ] {
        assert!(error.contains(says), "{error} lacks {says}");
    }
    assert!(
        Data::read(
            &folder.path().join("none.jsonl"),
            &reader,
            &Settings::default(),
            None
        )
        .unwrap_err()
        .to_string()
        .contains("none.jsonl: cannot be opened")
    );
    std::fs::write(&path, "\n\n").unwrap();
    assert!(
        Data::read(&path, &reader, &Settings::default(), None)
            .unwrap_err()
            .to_string()
            .contains("holds no examples")
    );
}

#[test]
fn bits_are_counted_over_the_bytes_that_were_learnt() {
    let reader = Reader::open(&shipped()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (question, answer) = ("Maji yako wapi?", "Mtoni, karibu na shamba la mahindi.");
    let path = write_data(
        folder.path(),
        &[
            json!({"prompt": question, "completion": answer}),
            json!({"messages": [
                {"role": "user", "content": question}, {"role": "assistant", "content": answer},
                {"role": "user", "content": "Kweli?"}, {"role": "assistant", "content": "Kweli."}]}),
        ],
    );
    let bytes = |train_on_inputs: bool| {
        let settings = Settings {
            val_set_size: 0.0,
            train_on_inputs,
            ..Settings::default()
        };
        let data = Data::read(&path, &reader, &settings, Some("sw")).unwrap();
        let mut bytes: Vec<usize> = data.examples.iter().map(|example| example.bytes).collect();
        bytes.sort_unstable();
        bytes
    };
    assert_eq!(bytes(false), [answer.len(), answer.len() + 6]);
    let all = question.len() + answer.len();
    assert_eq!(bytes(true), [all, all + 12]);

    // What was cut off is not counted.
    let text = "maji ".repeat(100);
    let path = write_data(folder.path(), &[json!({"text": text})]);
    let settings = Settings {
        val_set_size: 0.0,
        sequence_len: 16,
        excess_length_strategy: super::settings::ExcessLength::Truncate,
        ..Settings::default()
    };
    let data = Data::read(&path, &reader, &settings, Some("sw")).unwrap();
    let example = &data.examples[0];
    let said = reader.tokenizer().decode(&example.ids[1..], true).unwrap();
    assert_eq!(example.bytes, said.len());
    assert!(example.bytes < text.len() / 2);
}

#[test]
fn turns_that_a_template_rewrites_are_taught_one_by_one() {
    // What was thought is shown in the last turn only, as Qwen3 does it.
    let template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}\
        {% if m.role == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}\
        {{ m.content + '<|im_end|>\\n' }}{% endfor %}\
        {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";
    let folder = tempfile::tempdir().unwrap();
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(shipped().join(name), folder.path().join(name)).unwrap();
    }
    std::fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
    let reader = Reader::open(folder.path()).unwrap();
    let turn = |n: usize| {
        json!({"messages": [
            {"role": "user", "content": format!("Maji {n}?")}, {"role": "assistant", "content": "Ndiyo."},
            {"role": "user", "content": "Wapi?"}, {"role": "assistant", "content": "Mtoni."}]})
    };
    let path = write_data(folder.path(), &[turn(1), turn(2), turn(3)]);
    let settings = Settings {
        val_set_size: 1.0,
        ..Settings::default()
    };
    let data = Data::read(&path, &reader, &settings, Some("sw")).unwrap();
    assert_eq!(
        (data.examples.len(), data.held_out.len()),
        (4, 2),
        "a conversation is held out with all its turns"
    );
    assert_eq!(
        data.notices,
        [
            "data.jsonl: 3 lines were taught turn by turn, for the base's chat template rewrites earlier turns, the first is line 1"
        ]
    );
    let said = |example: &data::Example| {
        let ids = example
            .ids
            .iter()
            .zip(&example.learnt)
            .filter(|(_, learnt)| **learnt);
        let ids: Vec<u32> = ids.map(|(id, _)| *id).collect();
        reader.tokenizer().decode(&ids, false).unwrap()
    };
    let texts: Vec<String> = data.held_out.iter().map(said).collect();
    assert_eq!(
        texts,
        [
            "<think></think>Ndiyo.<|im_end|>",
            "<think></think>Mtoni.<|im_end|>"
        ]
    );
}

#[test]
fn doubles_and_decomposed_texts_are_noticed() {
    let reader = Reader::open(&shipped()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let line = |text: &str| json!({"prompt": "p", "completion": text});
    let path = write_data(
        folder.path(),
        &[
            line("ọrọ"),
            line("o\u{323}ro\u{323}"),
            line("ìwé"),
            line("i\u{300}we\u{301}"),
            line("omi"),
        ],
    );
    let settings = Settings {
        val_set_size: 0.0,
        ..Settings::default()
    };
    let data = Data::read(&path, &reader, &settings, Some("yo")).unwrap();
    assert_eq!(data.examples.len(), 3);
    assert_eq!(
        data.notices,
        [
            "data.jsonl: 2 lines were repeated and left out, the first is line 2",
            "data.jsonl: 2 lines were not in Unicode's composed form (NFC) and composed, the first is line 2",
        ]
    );
}
