//! How much memory a run of our own trainer takes, known before anybody is asked to run it.
//!
//! Everything large is counted as [`super::fused`] lays it out: the base model's weights, what each layer keeps for the way
//! back, room for logits, and the numbers of the adapter with their copies when a checkpoint is made.

use super::data::Data;
use super::fused::{LOGITS_MAX, LOGITS_ROWS};
use super::llama::{Config, MODULES};
use super::settings::Settings;
use super::trainer::LOOK_TOKENS;

/// The process, its code, and what matrix products lay out anew for each thread.
pub(super) const PROCESS: u64 = 96 << 20;
/// Copies of the adapter's numbers when most of them are there: weights, both moments, gradients, how they began, and three
/// of the three rows while a checkpoint is written.
const COPIES: u64 = 14;

/// Bytes of private memory at most.
pub(super) fn needed(config: &Config, settings: &Settings, data: &Data, numbers: usize) -> u64 {
    let of = |count: usize| count as u64;
    let (hidden, inner) = (of(config.hidden_size), of(config.intermediate_size));
    let query = of(config.num_attention_heads) * of(config.head_width());
    let key = of(config.kv_heads()) * of(config.head_width());
    let (mut weights, mut largest) = (0u64, 0u64);
    for shape in config.shapes().values() {
        let count = shape.iter().map(|side| of(*side)).product::<u64>();
        let matrix = shape.len() == 2;
        weights += count * if matrix && settings.bf16 { 2 } else { 4 };
        if matrix {
            largest = largest.max(count);
        }
    }
    // Halves are widened a matrix at a time.
    let widened = if settings.bf16 { largest } else { 0 };

    let lengths = || data.examples.iter().map(|example| of(example.length()));
    let all: u64 = lengths().sum();
    let rows = if settings.sample_packing {
        (of(settings.micro_batch_size) * of(settings.sequence_len)).min(all)
    } else {
        let mut longest: Vec<u64> = lengths().collect();
        longest.sort_unstable_by(|a, b| b.cmp(a));
        longest.into_iter().take(settings.micro_batch_size).sum()
    };
    let held_out = data.held_out.iter().map(|example| of(example.length()));
    let looked_at = of(LOOK_TOKENS).max(held_out.clone().max().unwrap_or(0));
    let looked_at = looked_at.min(held_out.sum());

    let narrow = of(settings.lora_r) * of(MODULES.len());
    let mut kept = 4 * hidden + 2 * query + 2 * key + 3 * inner + narrow;
    if config.has_head_norms() {
        kept += query + key;
    }
    let layers = of(config.num_hidden_layers);
    // What a layer keeps; looks need one set, and so do layers that are worked out again.
    let activations = if settings.gradient_checkpointing {
        kept * rows.max(looked_at) + layers * hidden * rows
    } else {
        layers * kept * rows + kept * looked_at
    };
    let passing = inner + 3 * query + 4 * key + 8 * hidden;
    let thinned = if settings.lora_dropout > 0.0 {
        hidden.max(inner).max(query)
    } else {
        0
    };
    let scratch = (passing + thinned) * rows.max(looked_at);
    let vocabulary = of(config.vocab_size);
    let logits =
        vocabulary * (of(LOGITS_MAX) / vocabulary.max(1)).clamp(of(LOGITS_ROWS.0), of(LOGITS_ROWS.1));
    let turned = of(settings.sequence_len) * of(config.head_width());

    let floats = widened + activations + scratch + logits + turned + COPIES * of(numbers);
    let tokens = all
        + data
            .held_out
            .iter()
            .map(|example| of(example.length()))
            .sum::<u64>();
    let examples = of(data.examples.len() + data.held_out.len());
    // Each token with whether it is learnt, each example with its digest while doubles are looked for.
    let text = tokens * 5 + examples * 200;
    weights + floats * 4 + text + PROCESS
}
