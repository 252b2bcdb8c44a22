//! The model that trains on a CPU: frozen weights, low-rank adapters, and gradients worked out by hand.
//!
//! It does what [`super::Llama`] does with adapters on it, three to four times as fast and in a fraction of the memory:
//! weights that stay get no gradients, padding does not exist, what the backward pass needs is kept in buffers that
//! live as long as the model, and the logits of a batch are never all there at once. Tests hold it to the gradients
//! that candle finds for the other model.
//!
//! A batch is one row of tokens after another, cut into sequences that do not see each other: packing needs no mask.

mod kernels;
mod linear;

pub use self::kernels::Dropout;
use self::kernels::{AttentionGrads, Heads, Product, by_rows, multiply, turned};
use self::linear::{Back, Bench};
use super::TrainError;
use super::adapter::{Adapter, Slot};
use super::base::{BaseModel, Matrix};
use super::data::Packed;
use super::llama::{Config, MODULES};

const Q: usize = 0;
const K: usize = 1;
const V: usize = 2;
const O: usize = 3;
const GATE: usize = 4;
const UP: usize = 5;
const DOWN: usize = 6;

/// Rows of logits that are there at once, as elements.
pub(super) const LOGITS_MAX: usize = 4 << 20;
/// As rows, at least and at most.
pub(super) const LOGITS_ROWS: (usize, usize) = (16, 512);

struct Linear {
    weight: Matrix,
    bias: Option<Vec<f32>>,
    adapter: Option<Slot>,
}

struct Layer {
    attention_norm: Vec<f32>,
    mlp_norm: Vec<f32>,
    head_norms: Option<(Vec<f32>, Vec<f32>)>,
    linears: [Linear; MODULES.len()],
}

/// What a layer's forward pass leaves for its backward pass.
#[derive(Default)]
struct Kept {
    /// What came in.
    x: Vec<f32>,
    normed: Vec<f32>,
    /// Before their norms, where there are such.
    raw_query: Vec<f32>,
    raw_key: Vec<f32>,
    query: Vec<f32>,
    key: Vec<f32>,
    value: Vec<f32>,
    mixed: Vec<f32>,
    /// After attention.
    middle: Vec<f32>,
    middle_normed: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    /// `silu(gate) · up`.
    opened: Vec<f32>,
    /// `x · Aᵀ` of each adapter.
    narrow: [Vec<f32>; MODULES.len()],
}

/// Buffers of one pass, kept for the next.
#[derive(Default)]
struct Scratch {
    d_gate: Vec<f32>,
    d_query: Vec<f32>,
    d_key: Vec<f32>,
    d_value: Vec<f32>,
    d_normed: Vec<f32>,
    d_mixed: Vec<f32>,
    d_narrow: Vec<f32>,
    logits: Vec<f32>,
    picked: Vec<f32>,
    d_picked: Vec<f32>,
    x: Vec<f32>,
    last: Vec<f32>,
    dx: Vec<f32>,
    weight: Vec<f32>,
    thinned: Vec<f32>,
    position: Vec<u32>,
}

/// A frozen model with room for an adapter.
pub struct Fused {
    config: Config,
    threads: usize,
    recompute: bool,
    embedding: Matrix,
    head: Option<Matrix>,
    norm: Vec<f32>,
    layers: Vec<Layer>,
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// Positions that `cos` and `sin` hold.
    turned: usize,
    kept: Vec<Kept>,
    scratch: Scratch,
    /// What passes with gradients leave out.
    dropout: Option<Dropout>,
    /// What this pass does.
    dropping: Option<Dropout>,
}

/// A buffer of that length. What it held before is overwritten by whoever asks.
fn room(buffer: &mut Vec<f32>, length: usize) -> &mut [f32] {
    if buffer.len() < length {
        // No more than was planned: growth by doubling would take what nobody reckoned with.
        buffer.reserve_exact(length - buffer.len());
        buffer.resize(length, 0.0);
    }
    &mut buffer[..length]
}

impl Fused {
    /// Takes a base model apart. `recompute` keeps only what enters each layer and works the rest out again on the way
    /// back: a third more work, a small part of the memory.
    pub fn new(
        base: BaseModel,
        adapter: &Adapter,
        threads: usize,
        recompute: bool,
    ) -> Result<Self, TrainError> {
        let BaseModel {
            config,
            mut matrices,
            mut vectors,
        } = base;
        let mut matrix = |name: String| matrices.remove(&name).ok_or(TrainError::Missing(name));
        let mut vector = |name: String| vectors.remove(&name).ok_or(TrainError::Missing(name));
        let mut layers = Vec::with_capacity(config.num_hidden_layers);
        for index in 0..config.num_hidden_layers {
            let at = |name: &str| format!("model.layers.{index}.{name}");
            let mut linears = Vec::with_capacity(MODULES.len());
            for (module, name) in MODULES.iter().enumerate() {
                let biased = config.has_biases() && module <= V;
                linears.push(Linear {
                    weight: matrix(at(&format!("{name}.weight")))?,
                    bias: biased.then(|| vector(at(&format!("{name}.bias")))).transpose()?,
                    adapter: adapter.slot(index, module).copied(),
                });
            }
            let linears = linears
                .try_into()
                .map_err(|_| TrainError::Missing(at("self_attn")))?;
            let mut head_norms = None;
            if config.has_head_norms() {
                head_norms = Some((
                    vector(at("self_attn.q_norm.weight"))?,
                    vector(at("self_attn.k_norm.weight"))?,
                ));
            }
            layers.push(Layer {
                attention_norm: vector(at("input_layernorm.weight"))?,
                mlp_norm: vector(at("post_attention_layernorm.weight"))?,
                head_norms,
                linears,
            });
        }
        let embedding = matrix("model.embed_tokens.weight".into())?;
        let head = (!config.tie_word_embeddings)
            .then(|| matrix("lm_head.weight".into()))
            .transpose()?;
        Ok(Self {
            norm: vector("model.norm.weight".into())?,
            threads: threads.max(1),
            recompute,
            embedding,
            head,
            layers,
            cos: Vec::new(),
            sin: Vec::new(),
            turned: 0,
            kept: Vec::new(),
            scratch: Scratch::default(),
            dropout: None,
            dropping: None,
            config,
        })
    }

    /// From now on, passes with gradients leave out a `share` of the numbers that enter each adapter, drawn from `seed`.
    pub fn drop_out(&mut self, share: f32, seed: u64) {
        self.dropout = Dropout::new(share, seed);
    }

    /// Sum of cross-entropies over the batch's targets, in nats.
    pub fn loss(&mut self, adapter: &Adapter, batch: &Packed) -> Result<f64, TrainError> {
        self.pass(adapter, batch, None)
    }

    /// The same, with its gradient times `scale` added to `grads`, which lies as the adapter's values do.
    pub fn gradients(
        &mut self,
        adapter: &Adapter,
        batch: &Packed,
        scale: f32,
        grads: &mut [f32],
    ) -> Result<f64, TrainError> {
        self.pass(adapter, batch, Some((scale, grads)))
    }

    /// Bytes of what passes keep and work in.
    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        let kept = self.kept.iter().flat_map(|kept| {
            let fields = [
                &kept.x,
                &kept.normed,
                &kept.raw_query,
                &kept.raw_key,
                &kept.query,
                &kept.key,
                &kept.value,
                &kept.mixed,
                &kept.middle,
                &kept.middle_normed,
                &kept.gate,
                &kept.up,
                &kept.opened,
            ];
            fields.into_iter().chain(&kept.narrow)
        });
        let s = &self.scratch;
        let scratch = [
            &s.d_gate,
            &s.d_query,
            &s.d_key,
            &s.d_value,
            &s.d_normed,
            &s.d_mixed,
            &s.d_narrow,
            &s.logits,
            &s.picked,
            &s.d_picked,
            &s.x,
            &s.last,
            &s.dx,
            &s.weight,
            &s.thinned,
        ];
        4 * kept.chain(scratch).map(Vec::capacity).sum::<usize>()
    }

    /// Logits of every position, `[n, vocab_size]`: for comparing, a few tokens at a time.
    pub fn logits(&mut self, adapter: &Adapter, batch: &Packed) -> Result<Vec<f32>, TrainError> {
        self.forward(adapter, batch, false)?;
        let (rows, hidden) = (batch.ids.len(), self.config.hidden_size);
        let mut normed = vec![0.0; rows * hidden];
        let eps = self.config.rms_norm_eps as f32;
        kernels::rms_norm(&mut normed, &self.scratch.x[..rows * hidden], &self.norm, eps);
        let vocabulary = self.config.vocab_size;
        let mut logits = vec![0.0; rows * vocabulary];
        let size = Product {
            m: rows,
            n: vocabulary,
            k: hidden,
            threads: self.threads,
        };
        let head = self
            .head
            .as_ref()
            .unwrap_or(&self.embedding)
            .whole(&mut self.scratch.weight);
        multiply(
            size,
            &mut logits,
            vocabulary,
            false,
            by_rows(&normed, hidden),
            turned(head, hidden),
            1.0,
        );
        Ok(logits)
    }

    fn pass(
        &mut self,
        adapter: &Adapter,
        batch: &Packed,
        wanted: Option<(f32, &mut [f32])>,
    ) -> Result<f64, TrainError> {
        if batch.targets.is_empty() {
            return Ok(0.0);
        }
        self.forward(adapter, batch, wanted.is_some())?;
        let loss = self.leave(batch, wanted.as_ref().map(|(scale, _)| *scale));
        if let Some((_, grads)) = wanted {
            let sequences = sequences(batch);
            // Moved out while in use: the layers are borrowed beside them.
            let (mut kept, mut scratch) = (std::mem::take(&mut self.kept), std::mem::take(&mut self.scratch));
            for index in (0..self.layers.len()).rev() {
                if self.recompute {
                    // All layers share one set of buffers; only what came in was kept of each.
                    let (own, shared) = kept.split_at_mut(self.layers.len());
                    let shared = &mut shared[0];
                    std::mem::swap(&mut own[index].x, &mut shared.x);
                    let mut result = std::mem::take(&mut scratch.x);
                    self.layer_forward(index, adapter, &sequences, shared, &mut result, &mut scratch);
                    scratch.x = result;
                    self.layer_back(index, adapter, &sequences, shared, &mut scratch, grads);
                    std::mem::swap(&mut own[index].x, &mut shared.x);
                } else {
                    self.layer_back(index, adapter, &sequences, &mut kept[index], &mut scratch, grads);
                }
            }
            (self.kept, self.scratch) = (kept, scratch);
        }
        Ok(loss)
    }

    /// Runs all layers; the last one's result is left in `scratch.x`.
    fn forward(&mut self, adapter: &Adapter, batch: &Packed, keep: bool) -> Result<(), TrainError> {
        let longest = batch.lengths.iter().copied().max().unwrap_or(0);
        let limit = self.config.max_position_embeddings;
        if longest > limit {
            return Err(TrainError::Unsupported(format!(
                "{longest} tokens in a row; its context holds {limit}"
            )));
        }
        if let Some(id) = batch
            .ids
            .iter()
            .find(|id| **id as usize >= self.config.vocab_size)
        {
            let size = self.config.vocab_size;
            return Err(TrainError::Tokenizer(format!(
                "token {id} lies outside the model's {size}"
            )));
        }
        self.turn_up_to(longest)?;
        self.dropping = self.dropout.filter(|_| keep);
        let (rows, hidden) = (batch.ids.len(), self.config.hidden_size);
        self.kept.resize_with(self.layers.len() + 1, Kept::default);
        let (mut kept, mut scratch) = (std::mem::take(&mut self.kept), std::mem::take(&mut self.scratch));
        scratch.position.clear();
        for length in &batch.lengths {
            scratch.position.extend(0..*length as u32);
        }
        let mut x = std::mem::take(&mut scratch.x);
        let embedding = &self.embedding;
        kernels::each_row(room(&mut x, rows * hidden), hidden, |row, out| {
            embedding.row(batch.ids[row] as usize, out);
        });
        let sequences = sequences(batch);
        let shared = self.layers.len();
        for index in 0..self.layers.len() {
            let own = if keep && !self.recompute { index } else { shared };
            room(&mut kept[own].x, rows * hidden).copy_from_slice(&x[..rows * hidden]);
            if keep && self.recompute {
                let (all, shared) = kept.split_at_mut(shared);
                room(&mut all[index].x, rows * hidden).copy_from_slice(&shared[0].x[..rows * hidden]);
            }
            self.layer_forward(index, adapter, &sequences, &mut kept[own], &mut x, &mut scratch);
        }
        scratch.x = x;
        (self.kept, self.scratch) = (kept, scratch);
        Ok(())
    }

    /// Angles for more positions, when a longer sequence comes.
    fn turn_up_to(&mut self, positions: usize) -> Result<(), TrainError> {
        if self.turned >= positions {
            return Ok(());
        }
        let frequencies = self.config.frequencies()?;
        for position in self.turned..positions {
            for frequency in &frequencies {
                let angle = (position as f64 * frequency) as f32;
                self.cos.push(angle.cos());
                self.sin.push(angle.sin());
            }
        }
        self.turned = positions;
        Ok(())
    }

    /// From the last layer to the loss, and back again when gradients are wanted: they are left in `scratch.dx`.
    fn leave(&mut self, batch: &Packed, scale: Option<f32>) -> f64 {
        let (rows, hidden, vocabulary) = (batch.ids.len(), self.config.hidden_size, self.config.vocab_size);
        let (targets, eps) = (batch.targets.len(), self.config.rms_norm_eps as f32);
        let s = &mut self.scratch;
        let x = &s.x[..rows * hidden];
        let picked = room(&mut s.picked, targets * hidden);
        kernels::each_row(picked, hidden, |row, out| {
            let at = batch.targets[row].0 as usize * hidden;
            out.copy_from_slice(&x[at..at + hidden]);
        });
        let last = room(&mut s.last, targets * hidden);
        kernels::rms_norm(last, picked, &self.norm, eps);
        let head = self.head.as_ref().unwrap_or(&self.embedding).whole(&mut s.weight);
        let d_picked = room(&mut s.d_picked, targets * hidden);
        let most = (LOGITS_MAX / vocabulary).clamp(LOGITS_ROWS.0, LOGITS_ROWS.1);
        let mut loss = 0.0;
        for from in (0..targets).step_by(most) {
            let to = (from + most).min(targets);
            let logits = room(&mut s.logits, (to - from) * vocabulary);
            let threads = self.threads;
            let size = Product {
                m: to - from,
                n: vocabulary,
                k: hidden,
                threads,
            };
            let states = by_rows(&last[from * hidden..to * hidden], hidden);
            multiply(size, logits, vocabulary, false, states, turned(head, hidden), 1.0);
            let right: Vec<u32> = batch.targets[from..to]
                .iter()
                .map(|(_, target)| *target)
                .collect();
            loss += kernels::cross_entropy(logits, vocabulary, &right, scale.unwrap_or(1.0));
            if scale.is_some() {
                let size = Product {
                    m: to - from,
                    n: hidden,
                    k: vocabulary,
                    threads,
                };
                let d_picked = &mut d_picked[from * hidden..to * hidden];
                multiply(
                    size,
                    d_picked,
                    hidden,
                    false,
                    by_rows(logits, vocabulary),
                    by_rows(head, hidden),
                    1.0,
                );
            }
        }
        if scale.is_some() {
            kernels::rms_norm_back(d_picked, picked, &self.norm, eps);
            let dx = room(&mut s.dx, rows * hidden);
            dx.fill(0.0);
            for ((position, _), grad) in batch.targets.iter().zip(d_picked.chunks_exact(hidden)) {
                let at = *position as usize * hidden;
                dx[at..at + hidden]
                    .iter_mut()
                    .zip(grad)
                    .for_each(|(dx, grad)| *dx += grad);
            }
        }
        loss
    }

    fn heads<'a>(&self, sequences: &'a [(usize, usize)]) -> Heads<'a> {
        Heads {
            query: self.config.num_attention_heads,
            key: self.config.kv_heads(),
            width: self.config.head_width(),
            sequences,
        }
    }

    /// One layer over `kept.x`; its result goes to `out`.
    fn layer_forward(
        &self,
        index: usize,
        adapter: &Adapter,
        sequences: &[(usize, usize)],
        kept: &mut Kept,
        out: &mut Vec<f32>,
        s: &mut Scratch,
    ) {
        let layer = &self.layers[index];
        let (hidden, inner, eps) = (
            self.config.hidden_size,
            self.config.intermediate_size,
            self.config.rms_norm_eps as f32,
        );
        let heads = self.heads(sequences);
        let (query_row, key_row) = (heads.query * heads.width, heads.key * heads.width);
        let rows = s.position.len();
        let mut bench = Bench {
            weight: &mut s.weight,
            thinned: &mut s.thinned,
            d_narrow: &mut s.d_narrow,
            dropout: self.dropping,
        };
        let mut linear = |module: usize, x: &[f32], narrow: &mut Vec<f32>, y: &mut [f32]| {
            self.linear(&layer.linears[module], adapter, rows, x, narrow, y, &mut bench);
        };
        let x = &kept.x[..rows * hidden];
        let normed = room(&mut kept.normed, rows * hidden);
        kernels::rms_norm(normed, x, &layer.attention_norm, eps);
        let query = room(&mut kept.query, rows * query_row);
        let key = room(&mut kept.key, rows * key_row);
        let value = room(&mut kept.value, rows * key_row);
        linear(Q, normed, &mut kept.narrow[Q], query);
        linear(K, normed, &mut kept.narrow[K], key);
        linear(V, normed, &mut kept.narrow[V], value);
        if let Some((query_norm, key_norm)) = &layer.head_norms {
            let raw_query = room(&mut kept.raw_query, rows * query_row);
            raw_query.copy_from_slice(query);
            kernels::rms_norm(query, raw_query, query_norm, eps);
            let raw_key = room(&mut kept.raw_key, rows * key_row);
            raw_key.copy_from_slice(key);
            kernels::rms_norm(key, raw_key, key_norm, eps);
        }
        kernels::rotate(query, heads.query, &s.position, &self.cos, &self.sin, 1.0);
        kernels::rotate(key, heads.key, &s.position, &self.cos, &self.sin, 1.0);
        let mixed = room(&mut kept.mixed, rows * query_row);
        kernels::attention(mixed, query, key, value, heads);
        let middle = room(&mut kept.middle, rows * hidden);
        linear(O, mixed, &mut kept.narrow[O], middle);
        kernels::add(middle, x, hidden);
        let normed = room(&mut kept.middle_normed, rows * hidden);
        kernels::rms_norm(normed, middle, &layer.mlp_norm, eps);
        let gate = room(&mut kept.gate, rows * inner);
        let up = room(&mut kept.up, rows * inner);
        linear(GATE, normed, &mut kept.narrow[GATE], gate);
        linear(UP, normed, &mut kept.narrow[UP], up);
        let opened = room(&mut kept.opened, rows * inner);
        kernels::swiglu(opened, gate, up, inner);
        let out = room(out, rows * hidden);
        linear(DOWN, opened, &mut kept.narrow[DOWN], out);
        kernels::add(out, middle, hidden);
    }

    /// The way back through one layer: `s.dx` holds the gradient of its result and takes the one of what came in.
    fn layer_back(
        &self,
        index: usize,
        adapter: &Adapter,
        sequences: &[(usize, usize)],
        kept: &mut Kept,
        s: &mut Scratch,
        grads: &mut [f32],
    ) {
        let layer = &self.layers[index];
        let (hidden, inner, eps) = (
            self.config.hidden_size,
            self.config.intermediate_size,
            self.config.rms_norm_eps as f32,
        );
        let heads = self.heads(sequences);
        let (query_row, key_row) = (heads.query * heads.width, heads.key * heads.width);
        let rows = s.position.len();
        // Nothing below the first layer learns.
        let first = index == 0;
        let mut bench = Bench {
            weight: &mut s.weight,
            thinned: &mut s.thinned,
            d_narrow: &mut s.d_narrow,
            dropout: self.dropping,
        };
        let mut back =
            |module: usize, x: &[f32], narrow: &[f32], dy: &[f32], dx: Option<(&mut [f32], bool)>| {
                let pass = Back { rows, x, narrow, dy };
                self.linear_back(&layer.linears[module], adapter, pass, dx, grads, &mut bench);
            };
        // Feed-forward part.
        let opened = &kept.opened[..rows * inner];
        let (gate, up) = (
            room(&mut kept.gate, rows * inner),
            room(&mut kept.up, rows * inner),
        );
        let d_opened = room(&mut s.d_gate, rows * inner);
        let dx = room(&mut s.dx, rows * hidden);
        back(DOWN, opened, &kept.narrow[DOWN], dx, Some((d_opened, false)));
        kernels::swiglu_back(gate, up, d_opened, inner);
        let normed = &kept.middle_normed[..rows * hidden];
        let d_normed = room(&mut s.d_normed, rows * hidden);
        back(GATE, normed, &kept.narrow[GATE], gate, Some((d_normed, false)));
        back(UP, normed, &kept.narrow[UP], up, Some((d_normed, true)));
        kernels::rms_norm_back(d_normed, &kept.middle[..rows * hidden], &layer.mlp_norm, eps);
        kernels::add(dx, d_normed, hidden);
        // Attention.
        let d_mixed = room(&mut s.d_mixed, rows * query_row);
        back(
            O,
            &kept.mixed[..rows * query_row],
            &kept.narrow[O],
            dx,
            Some((d_mixed, false)),
        );
        let d_query = room(&mut s.d_query, rows * query_row);
        let d_key = room(&mut s.d_key, rows * key_row);
        let d_value = room(&mut s.d_value, rows * key_row);
        let (query, key, value) = (
            &kept.query[..rows * query_row],
            &kept.key[..rows * key_row],
            &kept.value[..rows * key_row],
        );
        let out = AttentionGrads {
            query: d_query,
            key: d_key,
            value: d_value,
        };
        kernels::attention_back(out, d_mixed, query, key, value, heads);
        kernels::rotate(d_query, heads.query, &s.position, &self.cos, &self.sin, -1.0);
        kernels::rotate(d_key, heads.key, &s.position, &self.cos, &self.sin, -1.0);
        if let Some((query_norm, key_norm)) = &layer.head_norms {
            kernels::rms_norm_back(d_query, &kept.raw_query[..rows * query_row], query_norm, eps);
            kernels::rms_norm_back(d_key, &kept.raw_key[..rows * key_row], key_norm, eps);
        }
        let normed = &kept.normed[..rows * hidden];
        for (module, dy) in [(Q, &*d_query), (K, &*d_key), (V, &*d_value)] {
            let into = (!first).then_some((&mut *d_normed, module != Q));
            back(module, normed, &kept.narrow[module], dy, into);
        }
        if !first {
            kernels::rms_norm_back(d_normed, &kept.x[..rows * hidden], &layer.attention_norm, eps);
            kernels::add(dx, d_normed, hidden);
        }
    }
}

/// First row and length of each sequence of a batch.
fn sequences(batch: &Packed) -> Vec<(usize, usize)> {
    let mut start = 0;
    let place = |length: &usize| {
        start += length;
        (start - length, *length)
    };
    batch.lengths.iter().map(place).collect()
}
