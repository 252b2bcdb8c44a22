//! Arithmetic on plain f32 slices, row by row or through one matrix product, forwards and backwards.
//!
//! Every result element is computed by one thread in one order, whatever the number of threads: equal inputs give
//! equal bits on one instruction set.

use rayon::prelude::*;

use crate::train::Rng;

/// Elements below which work is not worth sharing between threads.
const SHARE_MIN: usize = 1 << 14;

/// A matrix in a slice, by the distances between its rows and between its columns.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
}

/// Row after row, `width` apart.
pub(super) fn by_rows(data: &[f32], width: usize) -> View<'_> {
    View {
        data,
        rows: width,
        columns: 1,
    }
}

/// The transpose of a matrix whose rows are `width` apart.
pub(super) fn turned(data: &[f32], width: usize) -> View<'_> {
    View {
        data,
        rows: 1,
        columns: width,
    }
}

/// The sizes of a product: `[m, k] · [k, n]`, and whether threads should share it.
#[derive(Clone, Copy)]
pub(super) struct Product {
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) threads: usize,
}

/// `out = scale · left · right`, added to what `out` holds when `add`; rows of `out` are `stride` apart.
pub(super) fn multiply(
    size: Product,
    out: &mut [f32],
    stride: usize,
    add: bool,
    left: View<'_>,
    right: View<'_>,
    scale: f32,
) {
    let Product { m, n, k, threads } = size;
    if m == 0 || n == 0 {
        return;
    }
    let last = |view: View<'_>, rows: usize, columns: usize| {
        (rows - 1) * view.rows + columns.saturating_sub(1) * view.columns
    };
    assert!(
        k > 0
            && (m - 1) * stride + n <= out.len()
            && n <= stride
            && last(left, m, k) < left.data.len()
            && last(right, k, n) < right.data.len(),
        "a product of {m} x {k} x {n} reaches beyond its slices"
    );
    let sharing = if threads > 1 && m * n * k > 1 << 18 {
        gemm::Parallelism::Rayon(threads)
    } else {
        gemm::Parallelism::None
    };
    #[expect(
        unsafe_code,
        reason = "gemm takes pointers and strides; the bounds are checked above"
    )]
    // SAFETY: the assertion holds every index that these sizes and strides can form inside the three slices; `out` is
    // borrowed alone, and its rows do not overlap.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            stride as isize,
            add,
            left.data.as_ptr(),
            left.columns as isize,
            left.rows as isize,
            right.data.as_ptr(),
            right.columns as isize,
            right.rows as isize,
            1.0,
            scale,
            false,
            false,
            false,
            sharing,
        );
    }
}

/// Calls `work` compiled for 256-bit vectors where the processor has them. Its results are the same to the last bit: lanes are
/// laid out by the code, and products and sums are never fused.
#[inline(always)]
fn vectorised<R>(work: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2")]
        fn wide<R>(work: impl FnOnce() -> R) -> R {
            work()
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            #[expect(
                unsafe_code,
                reason = "a function for processors with AVX2, called on those alone"
            )]
            // SAFETY: the line above asked the processor.
            return unsafe { wide(work) };
        }
    }
    work()
}

/// Calls `work` with every row of `out` and its number, on several threads when it is worth it.
pub(super) fn each_row(out: &mut [f32], width: usize, work: impl Fn(usize, &mut [f32]) + Sync + Send) {
    if out.len() < SHARE_MIN {
        out.chunks_exact_mut(width)
            .enumerate()
            .for_each(|(row, out)| vectorised(|| work(row, out)));
    } else {
        out.par_chunks_exact_mut(width)
            .with_min_len((SHARE_MIN / 4).div_ceil(width))
            .enumerate()
            .for_each(|(row, out)| vectorised(|| work(row, out)));
    }
}

/// Adds `more` to `out`.
pub(super) fn add(out: &mut [f32], more: &[f32], width: usize) {
    each_row(out, width, |row, out| {
        let more = &more[row * width..][..width];
        out.iter_mut().zip(more).for_each(|(out, more)| *out += more);
    });
}

/// Adds one row to every row of `out`.
pub(super) fn add_row(out: &mut [f32], row: &[f32]) {
    each_row(out, row.len(), |_, out| {
        out.iter_mut().zip(row).for_each(|(out, more)| *out += more);
    });
}

/// Which numbers of a matrix are left out: it follows from a seed and their place alone, so it can be worked out again on
/// the way back and on any number of threads.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// Of 65,536 numbers, so many are left out.
    share: u32,
    /// What the others are multiplied by, so that their sum stays what it was.
    scale: f32,
    seed: u64,
}

impl Dropout {
    /// None where nothing is left out.
    pub fn new(share: f32, seed: u64) -> Option<Self> {
        let whole = (share.clamp(0.0, 0.99) * 65_536.0).round() as u32;
        (whole > 0).then(|| Self {
            share: whole,
            scale: 65_536.0 / (65_536 - whole) as f32,
            seed,
        })
    }

    /// Another one for another place of the model.
    pub(crate) fn at(self, place: usize) -> Self {
        let seed = Rng::new(self.seed ^ (place as u64).rotate_left(32)).bits();
        Self { seed, ..self }
    }

    /// Calls `with` for every number of `out` and of `x` with what it is multiplied by: `scale`, or nothing.
    fn each(self, out: &mut [f32], x: &[f32], width: usize, with: impl Fn(&mut f32, f32) + Sync + Send) {
        each_row(out, width, |row, out| {
            let x = &x[row * width..][..width];
            let mut rng = Rng::new(
                self.seed
                    ^ (row as u64 + 1)
                        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                        .rotate_left(17),
            );
            for (out, x) in out.chunks_mut(4).zip(x.chunks(4)) {
                let mut bits = rng.bits();
                for (out, x) in out.iter_mut().zip(x) {
                    let kept = if (bits & 0xffff) as u32 >= self.share {
                        self.scale
                    } else {
                        0.0
                    };
                    with(out, x * kept);
                    bits >>= 16;
                }
            }
        });
    }

    /// `out = x` with numbers left out; rows are `width` wide.
    pub(crate) fn thin(self, out: &mut [f32], x: &[f32], width: usize) {
        self.each(out, x, width, |out, x| *out = x);
    }

    /// `out += x` where numbers were not left out: the gradient of [`Dropout::thin`].
    pub(super) fn add_back(self, out: &mut [f32], x: &[f32], width: usize) {
        self.each(out, x, width, |out, x| *out += x);
    }
}

/// Sum of products in eight lanes, so that the compiler may use vectors without changing the order of additions.
#[inline(always)]
fn dot(left: &[f32], right: &[f32]) -> f32 {
    let mut lanes = [0f32; 8];
    let (left, right) = (left.chunks_exact(8), right.chunks_exact(8));
    let rest: f32 = left
        .remainder()
        .iter()
        .zip(right.remainder())
        .map(|(a, b)| a * b)
        .sum();
    for (left, right) in left.zip(right) {
        for lane in 0..8 {
            lanes[lane] += left[lane] * right[lane];
        }
    }
    lanes.iter().sum::<f32>() + rest
}

/// `out = x / rms(x) · weight`, for each row as wide as `weight`.
pub(super) fn rms_norm(out: &mut [f32], x: &[f32], weight: &[f32], eps: f32) {
    let width = weight.len();
    each_row(out, width, |row, out| {
        let x = &x[row * width..][..width];
        let scale = 1.0 / (dot(x, x) / width as f32 + eps).sqrt();
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * scale * weight;
        }
    });
}

/// The gradient of [`rms_norm`] by `x`: `out` holds the gradient of its result and takes the one of its input.
pub(super) fn rms_norm_back(out: &mut [f32], x: &[f32], weight: &[f32], eps: f32) {
    let width = weight.len();
    each_row(out, width, |row, out| {
        let x = &x[row * width..][..width];
        let scale = 1.0 / (dot(x, x) / width as f32 + eps).sqrt();
        out.iter_mut()
            .zip(weight)
            .for_each(|(out, weight)| *out *= weight);
        let lean = dot(out, x) * scale * scale / width as f32;
        for (out, x) in out.iter_mut().zip(x) {
            *out = scale * (*out - lean * x);
        }
    });
}

/// Turns each pair of each head by its position's angle (Su and others, 2021; halves as Hugging Face has them).
/// `cos` and `sin` hold half a head for each position; `way` is 1, or -1 to turn back.
pub(super) fn rotate(x: &mut [f32], heads: usize, positions: &[u32], cos: &[f32], sin: &[f32], way: f32) {
    let width = x.len() / positions.len().max(1);
    let half = width / heads / 2;
    each_row(x, width, |row, x| {
        let at = positions[row] as usize * half;
        let (cos, sin) = (&cos[at..at + half], &sin[at..at + half]);
        for head in x.chunks_exact_mut(2 * half) {
            let (first, second) = head.split_at_mut(half);
            for (((first, second), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                let sin = sin * way;
                (*first, *second) = (*first * cos - *second * sin, *second * cos + *first * sin);
            }
        }
    });
}

/// `e^x` to within two units in the last place (Cephes' polynomial), in operations that become vectors.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    let x = x.clamp(-87.0, 88.0);
    // The addition rounds to a whole number and leaves it in the lowest bits: no conversion, which would not become vectors.
    let rounded = x * std::f32::consts::LOG2_E + 12_582_912.0;
    let whole = rounded - 12_582_912.0;
    let rest = x - whole * 0.693_359_4 + whole * 2.121_944_4e-4;
    let mut sum = 1.987_569_1e-4;
    for term in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_6e-1, 0.5] {
        sum = sum * rest + term;
    }
    let power = f32::from_bits(rounded.to_bits().wrapping_add(127) << 23);
    (sum * rest * rest + rest + 1.0) * power
}

/// The largest number, in eight lanes. A number that is none is passed over, or comes out.
#[inline(always)]
fn largest(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 8];
    let chunks = values.chunks_exact(8);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = if *value > *lane { *value } else { *lane };
        }
    }
    lanes
        .iter()
        .chain(rest)
        .copied()
        .fold(f32::NEG_INFINITY, f32::max)
}

/// Turns every value into `e^(value - top)` and returns their sum, added up in eight lanes.
#[inline(always)]
fn exponentials(values: &mut [f32], top: f32) -> f32 {
    let mut lanes = [0f32; 8];
    let mut chunks = values.chunks_exact_mut(8);
    for chunk in &mut chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *value = exp(*value - top);
            *lane += *value;
        }
    }
    let mut rest = 0.0;
    for value in chunks.into_remainder() {
        *value = exp(*value - top);
        rest += *value;
    }
    lanes.iter().sum::<f32>() + rest
}

/// `out = silu(gate) · up`.
pub(super) fn swiglu(out: &mut [f32], gate: &[f32], up: &[f32], width: usize) {
    each_row(out, width, |row, out| {
        let at = row * width..(row + 1) * width;
        for ((out, gate), up) in out.iter_mut().zip(&gate[at.clone()]).zip(&up[at]) {
            *out = gate / (1.0 + exp(-gate)) * up;
        }
    });
}

/// The gradients of [`swiglu`]: `gate` and `up` take theirs in place of what they held.
pub(super) fn swiglu_back(gate: &mut [f32], up: &mut [f32], grad: &[f32], width: usize) {
    let row = |((gate, up), grad): ((&mut [f32], &mut [f32]), &[f32])| {
        vectorised(|| {
            for ((gate, up), grad) in gate.iter_mut().zip(up).zip(grad) {
                let open = 1.0 / (1.0 + exp(-*gate));
                let silu = *gate * open;
                let slope = open * (1.0 + *gate * (1.0 - open));
                (*gate, *up) = (grad * *up * slope, grad * silu);
            }
        });
    };
    if grad.len() < SHARE_MIN {
        row(((gate, up), grad));
    } else {
        let parts = gate.par_chunks_mut(width).zip(up.par_chunks_mut(width));
        parts.zip(grad.par_chunks(width)).for_each(row);
    }
}

/// The shape of an attention: how heads lie in a row, and where sequences begin in the batch.
#[derive(Clone, Copy)]
pub(super) struct Heads<'a> {
    pub(super) query: usize,
    pub(super) key: usize,
    pub(super) width: usize,
    /// First row and length of each sequence. A token sees those of its own sequence up to itself.
    pub(super) sequences: &'a [(usize, usize)],
}

/// Rows of scores that are worked on at once: everything to the right of such a block is skipped.
const BLOCK: usize = 64;

impl Heads<'_> {
    fn tasks(&self, heads: usize) -> Vec<(usize, usize, usize)> {
        let sequences = self.sequences.iter();
        sequences
            .flat_map(|(start, length)| (0..heads).map(move |head| (*start, *length, head)))
            .collect()
    }

    /// The shares that rows `from..to` of a sequence give to what came before, `[to - from, to]`.
    fn shares(&self, shares: &mut Vec<f32>, query: &[f32], key: &[f32], from: usize, to: usize) {
        let rows = to - from;
        shares.resize(rows * to, 0.0);
        let (query_row, key_row) = (self.query * self.width, self.key * self.width);
        let size = Product {
            m: rows,
            n: to,
            k: self.width,
            threads: 1,
        };
        let query = by_rows(&query[from * query_row..], query_row);
        multiply(size, shares, to, false, query, turned(key, key_row), self.scale());
        for (row, scores) in shares.chunks_exact_mut(to).enumerate() {
            let (seen, ahead) = scores.split_at_mut(from + row + 1);
            vectorised(|| {
                let top = largest(seen);
                let whole = 1.0 / exponentials(seen, top);
                seen.iter_mut().for_each(|score| *score *= whole);
            });
            ahead.fill(0.0);
        }
    }

    fn scale(&self) -> f32 {
        1.0 / (self.width as f32).sqrt()
    }
}

/// Causal attention within each sequence: `out`, `query` `[n, query · width]`, `key`, `value` `[n, key · width]`.
pub(super) fn attention(out: &mut [f32], query: &[f32], key: &[f32], value: &[f32], heads: Heads<'_>) {
    let Heads { width, .. } = heads;
    let (query_row, key_row) = (heads.query * width, heads.key * width);
    let group = heads.query / heads.key;
    let mixed: Vec<Vec<f32>> = heads
        .tasks(heads.query)
        .into_par_iter()
        .map(|(start, length, head)| {
            let query = &query[start * query_row + head * width..];
            let at = start * key_row + head / group * width;
            let (key, value) = (&key[at..], &value[at..]);
            let (mut mixed, mut shares) = (vec![0.0; length * width], Vec::new());
            for from in (0..length).step_by(BLOCK) {
                let to = (from + BLOCK).min(length);
                heads.shares(&mut shares, query, key, from, to);
                let size = Product {
                    m: to - from,
                    n: width,
                    k: to,
                    threads: 1,
                };
                let mixed = &mut mixed[from * width..to * width];
                multiply(
                    size,
                    mixed,
                    width,
                    false,
                    by_rows(&shares, to),
                    by_rows(value, key_row),
                    1.0,
                );
            }
            mixed
        })
        .collect();
    for ((start, _, head), mixed) in heads.tasks(heads.query).into_iter().zip(mixed) {
        scatter(out, query_row, start, head * width, &mixed, width);
    }
}

/// Lays the rows of `from` into `out`, at a column.
fn scatter(out: &mut [f32], out_row: usize, start: usize, column: usize, from: &[f32], width: usize) {
    for (row, from) in from.chunks_exact(width).enumerate() {
        out[(start + row) * out_row + column..][..width].copy_from_slice(from);
    }
}

/// Where the gradients of an attention's inputs go; all three are overwritten.
pub(super) struct AttentionGrads<'a> {
    pub(super) query: &'a mut [f32],
    pub(super) key: &'a mut [f32],
    pub(super) value: &'a mut [f32],
}

/// The gradients of [`attention`], given the one of its result.
pub(super) fn attention_back(
    out: AttentionGrads<'_>,
    grad: &[f32],
    query: &[f32],
    key: &[f32],
    value: &[f32],
    heads: Heads<'_>,
) {
    let Heads { width, .. } = heads;
    let (query_row, key_row) = (heads.query * width, heads.key * width);
    let group = heads.query / heads.key;
    // One task for each key head: the queries that share it add up to its gradient.
    let parts: Vec<[Vec<f32>; 3]> = heads
        .tasks(heads.key)
        .into_par_iter()
        .map(|(start, length, head)| {
            let at = start * key_row + head * width;
            let (key, value) = (&key[at..], &value[at..]);
            let wide = group * width;
            let (mut d_query, mut d_key, mut d_value) = (
                vec![0.0; length * wide],
                vec![0.0; length * width],
                vec![0.0; length * width],
            );
            let (mut shares, mut slopes) = (Vec::new(), Vec::new());
            for member in 0..group {
                let at = start * query_row + (head * group + member) * width;
                let (query, grad) = (&query[at..], &grad[at..]);
                for from in (0..length).step_by(BLOCK) {
                    let to = (from + BLOCK).min(length);
                    let rows = to - from;
                    let size = |m: usize, n: usize, k: usize| Product { m, n, k, threads: 1 };
                    heads.shares(&mut shares, query, key, from, to);
                    let grad = &grad[from * query_row..];
                    let query = &query[from * query_row..];
                    multiply(
                        size(to, width, rows),
                        &mut d_value,
                        width,
                        true,
                        turned(&shares, to),
                        by_rows(grad, query_row),
                        1.0,
                    );
                    slopes.resize(rows * to, 0.0);
                    let (left, right) = (by_rows(grad, query_row), turned(value, key_row));
                    multiply(size(rows, to, width), &mut slopes, to, false, left, right, 1.0);
                    for (slopes, shares) in slopes.chunks_exact_mut(to).zip(shares.chunks_exact(to)) {
                        let mean = dot(slopes, shares);
                        for (slope, share) in slopes.iter_mut().zip(shares) {
                            *slope = share * (*slope - mean);
                        }
                    }
                    multiply(
                        size(rows, width, to),
                        &mut d_query[from * wide + member * width..],
                        wide,
                        false,
                        by_rows(&slopes, to),
                        by_rows(key, key_row),
                        heads.scale(),
                    );
                    let (left, right) = (turned(&slopes, to), by_rows(query, query_row));
                    multiply(
                        size(to, width, rows),
                        &mut d_key,
                        width,
                        true,
                        left,
                        right,
                        heads.scale(),
                    );
                }
            }
            [d_query, d_key, d_value]
        })
        .collect();
    for ((start, _, head), [d_query, d_key, d_value]) in heads.tasks(heads.key).into_iter().zip(parts) {
        scatter(
            out.query,
            query_row,
            start,
            head * group * width,
            &d_query,
            group * width,
        );
        scatter(out.key, key_row, start, head * width, &d_key, width);
        scatter(out.value, key_row, start, head * width, &d_value, width);
    }
}

/// Turns rows of logits into the gradients of their cross-entropy times `scale`, and returns the sum of the
/// cross-entropies in nats.
pub(super) fn cross_entropy(logits: &mut [f32], vocabulary: usize, targets: &[u32], scale: f32) -> f64 {
    let losses: Vec<f64> = logits
        .par_chunks_exact_mut(vocabulary)
        .zip(targets)
        .map(|(logits, target)| {
            let top = vectorised(|| largest(logits));
            let right = logits[*target as usize] - top;
            let sum = vectorised(|| {
                let sum = exponentials(logits, top);
                let share = scale / sum;
                logits.iter_mut().for_each(|logit| *logit *= share);
                sum
            });
            logits[*target as usize] -= scale;
            // A logit that is not a number must show in the loss: `max` and the clamp of `exp` pass over it.
            if top.is_finite() && sum.is_finite() {
                f64::from(sum.ln()) - f64::from(right)
            } else {
                f64::NAN
            }
        })
        .collect();
    losses.iter().sum()
}
