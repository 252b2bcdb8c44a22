use std::collections::BTreeMap;
use std::io::Cursor;

use candle_core::quantized::gguf_file;
use candle_core::{DType, Device, Tensor};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

use super::*;

fn small(tied: bool) -> Config {
    let config = serde_json::json!({
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 60, "max_position_embeddings": 32, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
    });
    serde_json::from_value(config).unwrap()
}

fn drill() -> Vec<Example> {
    let mut rng = Rng::new(3);
    let mut draw = |length: usize| Example {
        ids: (0..length).map(|_| rng.below(60) as u32).collect(),
        answer_from: 3,
    };
    vec![draw(9), draw(6), draw(12)]
}

fn batch() -> Batch {
    let drill = drill();
    Batch::new(&drill.iter().collect::<Vec<_>>(), 0, &Device::Cpu)
        .unwrap()
        .unwrap()
}

fn loss_of(model: &Llama) -> f32 {
    model.loss(&batch()).unwrap().to_scalar().unwrap()
}

#[test]
fn every_weight_receives_a_gradient_and_the_loss_falls() {
    for tied in [true, false] {
        let config = small(tied);
        let (vars, tensors) = trainable(&initial(&config, &mut Rng::new(1), &Device::Cpu).unwrap()).unwrap();
        let model = Llama::new(&config, &tensors).unwrap();
        let grads = model.loss(&batch()).unwrap().backward().unwrap();
        for (name, var) in &vars {
            let grad = grads
                .get(var.as_tensor())
                .unwrap_or_else(|| panic!("{name} has no gradient"));
            let size = grad.abs().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(size > 0.0, "the gradient of {name} is zero");
        }
        let before = loss_of(&model);
        let mut optimizer = AdamW::new(vars, AdamWSettings::default());
        for _ in 0..60 {
            optimizer
                .step(&[model.loss(&batch()).unwrap().backward().unwrap()], 1e-2)
                .unwrap();
        }
        assert!(
            loss_of(&model) < before / 10.0,
            "{before} fell only to {}",
            loss_of(&model)
        );
        let example = &drill()[0];
        let greedy = model.greedy(&example.ids[..3], 6, u32::MAX).unwrap();
        assert_eq!(
            greedy,
            example.ids[3..],
            "the model recites what it was drilled in"
        );
    }
}

#[test]
fn gradients_agree_with_finite_differences() {
    let config = small(true);
    let base = initial(&config, &mut Rng::new(5), &Device::Cpu).unwrap();
    let (vars, tensors) = trainable(&base).unwrap();
    let grads = Llama::new(&config, &tensors)
        .unwrap()
        .loss(&batch())
        .unwrap()
        .backward()
        .unwrap();
    for (name, var) in &vars {
        let grad = grads.get(var.as_tensor()).unwrap();
        let length = grad
            .sqr()
            .unwrap()
            .sum_all()
            .unwrap()
            .to_scalar::<f32>()
            .unwrap()
            .sqrt();
        // Along the gradient itself, the slope is its length.
        let step = 2e-2 / length.max(1.0);
        let moved = |sign: f64| {
            let mut weights = base.clone();
            let way = (grad * (sign * f64::from(step / length))).unwrap();
            weights.insert(name.clone(), (&base[name] + way).unwrap());
            loss_of(&Llama::new(&config, &weights).unwrap())
        };
        let slope = (moved(1.0) - moved(-1.0)) / (2.0 * step);
        assert!(
            (slope - length).abs() < 0.05 * length + 2e-3,
            "{name}: gradient {length}, slope {slope}"
        );
    }
}

#[test]
fn training_goes_on_from_a_stored_state_as_if_uninterrupted() {
    let config = small(true);
    let fresh = initial(&config, &mut Rng::new(2), &Device::Cpu).unwrap();
    let run = |optimizer: &mut AdamW, tensors: &Weights, steps: u32| {
        let model = Llama::new(&config, tensors).unwrap();
        for _ in 0..steps {
            optimizer
                .step(&[model.loss(&batch()).unwrap().backward().unwrap()], 1e-2)
                .unwrap();
        }
        loss_of(&model)
    };
    let (vars, tensors) = trainable(&fresh).unwrap();
    let mut whole = AdamW::new(vars, AdamWSettings::default());
    run(&mut whole, &tensors, 5);
    let folder = tempfile::tempdir().unwrap();
    let (weights, state) = (
        folder.path().join("w.safetensors"),
        folder.path().join("s.safetensors"),
    );
    save(&whole.weights().unwrap(), &weights, DType::F32).unwrap();
    save(&whole.state().unwrap(), &state, DType::F32).unwrap();
    let expected = run(&mut whole, &tensors, 5);

    let (vars, tensors) = trainable(&load(&weights, &Device::Cpu).unwrap()).unwrap();
    let mut resumed = AdamW::new(vars, AdamWSettings::default());
    resumed.restore(&load(&state, &Device::Cpu).unwrap()).unwrap();
    assert_eq!(resumed.steps(), 5);
    let got = run(&mut resumed, &tensors, 5);
    assert!((got - expected).abs() < 1e-5, "{got} instead of {expected}");
}

#[test]
fn a_low_rank_adapter_starts_silent_and_trains_alone() {
    let config = small(true);
    let base = initial(&config, &mut Rng::new(4), &Device::Cpu).unwrap();
    let mut model = Llama::new(&config, &base).unwrap();
    let before = loss_of(&model);
    let mut parts = Weights::new();
    let mut rng = Rng::new(9);
    for layer in 0..2 {
        for module in ["self_attn.q_proj", "mlp.down_proj"] {
            let path = format!("model.layers.{layer}.{module}");
            let (out, input) = base[&format!("{path}.weight")].dims2().unwrap();
            let a: Vec<f32> = (0..4 * input).map(|_| rng.normal() as f32 * 0.1).collect();
            parts.insert(
                format!("{path}/a"),
                Tensor::from_vec(a, (4, input), &Device::Cpu).unwrap(),
            );
            parts.insert(
                format!("{path}/b"),
                Tensor::zeros((out, 4), DType::F32, &Device::Cpu).unwrap(),
            );
        }
    }
    let (vars, tensors) = trainable(&parts).unwrap();
    for path in tensors.keys().filter_map(|name| name.strip_suffix("/a")) {
        let (a, b) = (
            tensors[&format!("{path}/a")].clone(),
            tensors[&format!("{path}/b")].clone(),
        );
        model
            .adapt(
                path,
                LowRank {
                    a,
                    b,
                    scale: 2.0,
                    thin: None,
                },
            )
            .unwrap();
    }
    assert_eq!(loss_of(&model), before, "zeros change nothing");
    let mut optimizer = AdamW::new(vars, AdamWSettings::default());
    for _ in 0..40 {
        optimizer
            .step(&[model.loss(&batch()).unwrap().backward().unwrap()], 2e-2)
            .unwrap();
    }
    assert!(
        loss_of(&model) < before - 0.5,
        "{before} fell only to {}",
        loss_of(&model)
    );
    assert_eq!(
        loss_of(&Llama::new(&config, &base).unwrap()),
        before,
        "the base stays as it was"
    );
}

#[test]
fn an_optimiser_names_the_weight_that_is_cut_off() {
    let config = small(true);
    let weights = initial(&config, &mut Rng::new(1), &Device::Cpu).unwrap();
    let stray = BTreeMap::from([(
        "stray".to_owned(),
        Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap(),
    )]);
    let (vars, _) = trainable(&stray).unwrap();
    let (_, tensors) = trainable(&weights).unwrap();
    let grads = Llama::new(&config, &tensors)
        .unwrap()
        .loss(&batch())
        .unwrap()
        .backward()
        .unwrap();
    let error = AdamW::new(vars, AdamWSettings::default())
        .step(&[grads], 1e-3)
        .unwrap_err();
    assert_eq!(error.to_string(), "trainable weight stray received no gradient");
}

#[test]
fn what_the_model_cannot_do_is_refused() {
    for (key, value, expected) in [
        (
            "model_type",
            serde_json::json!("mistral"),
            "model_type is mistral",
        ),
        ("hidden_act", serde_json::json!("gelu"), "hidden_act is gelu"),
        ("attention_bias", serde_json::json!(true), "biases"),
        (
            "rope_scaling",
            serde_json::json!({"rope_type": "yarn", "factor": 4.0}),
            "scaled by yarn",
        ),
        (
            "rope_scaling",
            serde_json::json!({"rope_type": "llama3", "factor": 8.0}),
            "low_freq_factor",
        ),
        ("num_key_value_heads", serde_json::json!(3), "do not share 3"),
        ("head_dim", serde_json::json!(7), "7 wide"),
    ] {
        let mut config = serde_json::to_value(small(true)).unwrap();
        config[key] = value;
        let config: Config = serde_json::from_value(config).unwrap();
        let error = config.check().unwrap_err().to_string();
        assert!(error.contains(expected), "{key}: {error}");
    }
}

#[test]
fn a_folder_becomes_a_gguf_file_with_turned_rows() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = tiny_tokenizer();
    tokenizer
        .save(folder.path().join("tokenizer.json"), false)
        .unwrap();
    let mut config = small(false);
    config.vocab_size = tokenizer.get_vocab_size(true);
    let weights = initial(&config, &mut Rng::new(8), &Device::Cpu).unwrap();
    std::fs::write(
        folder.path().join("config.json"),
        serde_json::to_vec(&config).unwrap(),
    )
    .unwrap();
    let settings = serde_json::json!({ "eos_token": ChatFormat::END, "chat_template": ChatFormat::TEMPLATE });
    std::fs::write(folder.path().join("tokenizer_config.json"), settings.to_string()).unwrap();
    save(&weights, &folder.path().join("model.safetensors"), DType::F32).unwrap();

    let mut file = Cursor::new(Vec::new());
    gguf::export(folder.path(), "drill", gguf::Precision::F16, &mut file).unwrap();
    file.set_position(0);
    let content = gguf_file::Content::read(&mut file).unwrap();
    assert_eq!(
        content.metadata["tokenizer.ggml.pre"].to_string().unwrap(),
        "gpt-2"
    );
    assert_eq!(
        content.metadata["tokenizer.ggml.tokens"].to_vec().unwrap().len(),
        config.vocab_size
    );
    assert_eq!(content.tensor_infos.len(), config.shapes().len());

    let read = |file: &mut Cursor<Vec<u8>>, name: &str| {
        let tensor = content.tensor(file, name, &Device::Cpu).unwrap();
        tensor.dequantize(&Device::Cpu).unwrap().to_vec2::<f32>().unwrap()
    };
    // Heads are 8 wide: row 0 stays, row 4 (its partner) comes second, row 1 third.
    let theirs = weights["model.layers.1.self_attn.k_proj.weight"]
        .to_vec2::<f32>()
        .unwrap();
    let ours = read(&mut file, "blk.1.attn_k.weight");
    for (row, from) in [(0, 0), (1, 4), (2, 1), (3, 5), (8, 8), (9, 12)] {
        assert!((ours[row][0] - theirs[from][0]).abs() < 1e-4, "row {row}");
    }
    let theirs = weights["model.layers.1.self_attn.v_proj.weight"]
        .to_vec2::<f32>()
        .unwrap();
    assert!(
        (read(&mut file, "blk.1.attn_v.weight")[1][0] - theirs[1][0]).abs() < 1e-4,
        "values are not turned"
    );
}

#[test]
fn only_the_answer_and_its_end_are_learnt() {
    let tokenizer = tiny_tokenizer();
    let format = ChatFormat::new(&tokenizer).unwrap();
    let example = format.example("Why?", "So.").unwrap();
    assert_eq!(example.ids[..example.answer_from], format.prompt("Why?").unwrap());
    assert_eq!(example.ids.last(), Some(&format.end()));
    assert_eq!(format.text(&example.ids[example.answer_from..]).unwrap(), "So.");
    let batch = Batch::new(&[&example], 0, &Device::Cpu).unwrap().unwrap();
    assert_eq!(
        batch.targets.to_vec1::<u32>().unwrap(),
        example.ids[example.answer_from..]
    );
    assert_eq!(
        batch.picks.to_vec1::<u32>().unwrap()[0] as usize,
        example.answer_from - 1
    );
}

fn tiny_tokenizer() -> Tokenizer {
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
    tokenizer.with_decoder(Some(ByteLevel::new(false, true, true)));
    let marks = [ChatFormat::START, ChatFormat::END].map(|mark| AddedToken::from(mark, true));
    let mut trainer = TrainerWrapper::from(
        BpeTrainer::builder()
            .show_progress(false)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(marks.to_vec())
            .build(),
    );
    tokenizer
        .train(&mut trainer, ["user assistant"].into_iter())
        .unwrap();
    tokenizer
}
