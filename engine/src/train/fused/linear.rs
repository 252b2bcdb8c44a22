//! One linear map with its adapter, forwards and backwards, and matrices in either of their forms.

use half::bf16;
use rayon::prelude::*;

use super::kernels::{self, Dropout, Product, by_rows, multiply, turned};
use super::{Fused, Linear, room};
use crate::train::adapter::Adapter;
use crate::train::base::{Matrix, Values};

/// What one linear map saw, and the gradient of what it gave.
pub(super) struct Back<'a> {
    pub(super) rows: usize,
    pub(super) x: &'a [f32],
    pub(super) narrow: &'a [f32],
    pub(super) dy: &'a [f32],
}

/// Room to work in.
pub(super) struct Bench<'a> {
    /// For a matrix in f32.
    pub(super) weight: &'a mut Vec<f32>,
    /// For what enters an adapter with numbers left out.
    pub(super) thinned: &'a mut Vec<f32>,
    /// For a gradient as narrow as the adapter.
    pub(super) d_narrow: &'a mut Vec<f32>,
    /// What is left out in this pass.
    pub(super) dropout: Option<Dropout>,
}

impl Fused {
    /// `y = x Wᵀ + bias + scale · (x Aᵀ) Bᵀ`; `narrow` keeps `x Aᵀ`.
    #[expect(
        clippy::too_many_arguments,
        reason = "the borrows of one pass, each of another part of it"
    )]
    pub(super) fn linear(
        &self,
        linear: &Linear,
        adapter: &Adapter,
        rows: usize,
        x: &[f32],
        narrow: &mut Vec<f32>,
        y: &mut [f32],
        bench: &mut Bench<'_>,
    ) {
        let threads = self.threads;
        let (n, k) = (linear.weight.rows, linear.weight.columns);
        let weight = linear.weight.whole(bench.weight);
        multiply(
            Product {
                m: rows,
                n,
                k,
                threads,
            },
            y,
            n,
            false,
            by_rows(x, k),
            turned(weight, k),
            1.0,
        );
        if let Some(bias) = &linear.bias {
            kernels::add_row(y, bias);
        }
        if let Some(slot) = &linear.adapter {
            let (a, b, rank) = (adapter.a(slot), adapter.b(slot), adapter.rank());
            let narrow = room(narrow, rows * rank);
            let seen = match bench.dropout {
                None => x,
                Some(dropout) => {
                    let thinned = room(bench.thinned, rows * k);
                    dropout.at(slot.a_range(rank).start).thin(thinned, x, k);
                    thinned
                }
            };
            multiply(
                Product {
                    m: rows,
                    n: rank,
                    k,
                    threads,
                },
                narrow,
                rank,
                false,
                by_rows(seen, k),
                turned(a, k),
                1.0,
            );
            let size = Product {
                m: rows,
                n,
                k: rank,
                threads,
            };
            multiply(
                size,
                y,
                n,
                true,
                by_rows(narrow, rank),
                turned(b, rank),
                adapter.scale(),
            );
        }
    }

    /// The way back through [`Fused::linear`]: adds to `grads`, and to `dx` or over it.
    pub(super) fn linear_back(
        &self,
        linear: &Linear,
        adapter: &Adapter,
        pass: Back<'_>,
        dx: Option<(&mut [f32], bool)>,
        grads: &mut [f32],
        bench: &mut Bench<'_>,
    ) {
        let Back { rows, x, narrow, dy } = pass;
        let threads = self.threads;
        let (n, k) = (linear.weight.rows, linear.weight.columns);
        let d_narrow = linear.adapter.as_ref().map(|slot| {
            let (rank, scale) = (adapter.rank(), adapter.scale());
            let d_narrow = room(bench.d_narrow, rows * rank);
            let size = Product {
                m: rows,
                n: rank,
                k: n,
                threads,
            };
            multiply(
                size,
                d_narrow,
                rank,
                false,
                by_rows(dy, n),
                by_rows(adapter.b(slot), rank),
                scale,
            );
            let size = Product {
                m: n,
                n: rank,
                k: rows,
                threads,
            };
            let b = &mut grads[slot.b_range(rank)];
            multiply(size, b, rank, true, turned(dy, n), by_rows(narrow, rank), scale);
            let size = Product {
                m: rank,
                n: k,
                k: rows,
                threads,
            };
            let a = &mut grads[slot.a_range(rank)];
            let dropout = bench.dropout.map(|dropout| dropout.at(slot.a_range(rank).start));
            let seen = match dropout {
                None => x,
                Some(dropout) => {
                    let thinned = room(bench.thinned, rows * k);
                    dropout.thin(thinned, x, k);
                    thinned
                }
            };
            multiply(size, a, k, true, turned(d_narrow, rank), by_rows(seen, k), 1.0);
            (d_narrow, adapter.a(slot), rank, dropout)
        });
        if let Some((dx, add)) = dx {
            let weight = linear.weight.whole(bench.weight);
            multiply(
                Product {
                    m: rows,
                    n: k,
                    k: n,
                    threads,
                },
                dx,
                k,
                add,
                by_rows(dy, n),
                by_rows(weight, k),
                1.0,
            );
            if let Some((d_narrow, a, rank, dropout)) = d_narrow {
                let size = Product {
                    m: rows,
                    n: k,
                    k: rank,
                    threads,
                };
                let (left, right) = (by_rows(d_narrow, rank), by_rows(a, k));
                match dropout {
                    None => multiply(size, dx, k, true, left, right, 1.0),
                    Some(dropout) => {
                        let more = room(bench.thinned, rows * k);
                        multiply(size, more, k, false, left, right, 1.0);
                        dropout.add_back(dx, more, k);
                    }
                }
            }
        }
    }
}

impl Matrix {
    /// One row as f32.
    pub(super) fn row(&self, row: usize, out: &mut [f32]) {
        let at = row * self.columns..(row + 1) * self.columns;
        match &self.values {
            Values::F32(values) => out.copy_from_slice(&values[at]),
            Values::Bf16(values) => widen(out, &values[at]),
        }
    }

    /// All of it as f32: itself, or widened into `scratch`.
    pub(super) fn whole<'a>(&'a self, scratch: &'a mut Vec<f32>) -> &'a [f32] {
        match &self.values {
            Values::F32(values) => values,
            Values::Bf16(values) => {
                let scratch = room(scratch, values.len());
                let parts = scratch.par_chunks_mut(1 << 15).zip(values.par_chunks(1 << 15));
                parts.for_each(|(out, values)| widen(out, values));
                scratch
            }
        }
    }
}

fn widen(out: &mut [f32], values: &[bf16]) {
    for (out, value) in out.iter_mut().zip(values) {
        *out = value.to_f32();
    }
}
