//! Arithmetic on plain f32 slices, row by row or through one matrix product, forwards and backwards.
//!
//! Every result element is computed by one thread in one order, whatever the number of threads: equal inputs give
//! equal bits on one instruction set.

use rayon::prelude::*;

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

/// Calls `work` with every row of `out` and its number, on several threads when it is worth it.
pub(super) fn each_row(out: &mut [f32], width: usize, work: impl Fn(usize, &mut [f32]) + Sync + Send) {
    if out.len() < SHARE_MIN {
        out.chunks_exact_mut(width)
            .enumerate()
            .for_each(|(row, out)| work(row, out));
    } else {
        out.par_chunks_exact_mut(width)
            .with_min_len((SHARE_MIN / 4).div_ceil(width))
            .enumerate()
            .for_each(|(row, out)| work(row, out));
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

/// Sum of products in eight lanes, so that the compiler may use vectors without changing the order of additions.
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
pub(super) fn exp(x: f32) -> f32 {
    let x = x.clamp(-87.0, 88.0);
    let whole = (x * std::f32::consts::LOG2_E + 12_582_912.0) - 12_582_912.0;
    let rest = x - whole * 0.693_359_4 + whole * 2.121_944_4e-4;
    let mut sum = 1.987_569_1e-4;
    for term in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_6e-1, 0.5] {
        sum = sum * rest + term;
    }
    let power = f32::from_bits(((whole as i32 + 127) as u32) << 23);
    (sum * rest * rest + rest + 1.0) * power
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
        for ((gate, up), grad) in gate.iter_mut().zip(up).zip(grad) {
            let open = 1.0 / (1.0 + exp(-*gate));
            let silu = *gate * open;
            let slope = open * (1.0 + *gate * (1.0 - open));
            (*gate, *up) = (grad * *up * slope, grad * silu);
        }
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
            let top = seen.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            seen.iter_mut().for_each(|score| *score = exp(*score - top));
            let whole = 1.0 / seen.iter().sum::<f32>();
            seen.iter_mut().for_each(|score| *score *= whole);
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
            let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let right = logits[*target as usize] - top;
            let mut sums = [0f32; 8];
            for logits in logits.chunks_mut(8) {
                for (logit, sum) in logits.iter_mut().zip(&mut sums) {
                    *logit = exp(*logit - top);
                    *sum += *logit;
                }
            }
            let sum = sums.iter().sum::<f32>();
            let share = scale / sum;
            logits.iter_mut().for_each(|logit| *logit *= share);
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
