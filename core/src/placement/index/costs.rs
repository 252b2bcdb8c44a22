//! What a request costs on each class, and sums of it with the classes' cheapest keys.
use super::{ClassId, LANES, class::share};
use crate::prelude::*;

/// Where the request may run at all, in runs of classes; a gap of so many vectors is not worth a run of its own.
const GAP: usize = 2 * LANES;

/// What one request costs on each class before the place's own key counts: `base + weight × key` bounds the cost
/// there from below. `f32::INFINITY` where the request may not run.
///
/// Only what lies in runs is kept: who may run on few classes carries few numbers.
#[derive(Debug, Clone)]
pub struct Costs {
    runs: Vec<Run>,
    /// The first of the runs, or an empty one: most costs have no other.
    run: Run,
    /// A base for each class in the runs, then a weight for each.
    list: Vec<f32>,
    /// Where the weights begin; zero when all of them are one.
    weights: u32,
    /// How far a bound may lie above the truth because of rounding, as a share.
    pub(super) slack: f32,
    /// Of equals, the one with the least free wins: what is small must not break up what is whole.
    pub(super) snug: bool,
}

/// Classes that follow each other, in whole vectors, and where their numbers begin.
#[derive(Debug, Clone, Copy, Default)]
struct Run {
    from: u32,
    to: u32,
    at: u32,
}

/// Some classes of one run.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Chunk {
    pub(super) from: u32,
    pub(super) to: u32,
    at: u32,
}

/// All runs, in pieces.
pub(super) struct Chunks<'a> {
    later: &'a [Run],
    run: Run,
    most: u32,
    wide: u32,
}

impl Iterator for Chunks<'_> {
    type Item = Chunk;

    #[inline]
    fn next(&mut self) -> Option<Chunk> {
        while self.run.from >= self.run.to {
            let (next, later) = self.later.split_first()?;
            (self.run, self.later) = (*next, later);
            self.run.to = self.run.to.min(self.wide);
        }
        let Run { from, to, at } = self.run;
        let to = to.min(from + self.most);
        self.run.from = to;
        self.run.at = at + to - from;
        Some(Chunk { from, to, at })
    }
}

impl Costs {
    /// Costs that are exact in `f32` (integers under 2²⁴) and keys that count once. One entry per class.
    pub fn exact(base: Vec<f32>) -> Self {
        Self::new(base, None, 0.0)
    }

    /// Costs with a weight of the key per class, as pairs of base and weight. Weights are positive and finite.
    pub fn weighted(pairs: impl Iterator<Item = (f32, f32)>) -> Self {
        let (base, weight) = pairs.unzip();
        // A few roundings of 2⁻²⁴ each, generously.
        Self::new(base, Some(weight), 1e-5)
    }

    fn new(base: Vec<f32>, weight: Option<Vec<f32>>, slack: f32) -> Self {
        let base = padded(base, f32::INFINITY);
        let runs = runs(&base);
        let mut list = Vec::new();
        keep(&runs, &base, &mut list);
        let mut weights = 0;
        if let Some(weight) = weight {
            weights = list.len() as u32;
            keep(&runs, &padded(weight, 1.0), &mut list);
        }
        Self {
            run: runs.first().copied().unwrap_or_default(),
            runs,
            list,
            weights,
            slack,
            snug: false,
        }
    }

    /// Of equal places, the one with the least free wins.
    #[must_use]
    pub fn snug(mut self, snug: bool) -> Self {
        self.snug = snug;
        self
    }

    /// Reads a little of it, so that it is at hand when it is needed: for callers who know what they will ask next.
    #[inline]
    pub fn touch(&self) {
        let read = self.list.iter().step_by(LANES).take(16);
        core::hint::black_box(read.fold(0, |sum, cost| sum ^ cost.to_bits()));
    }

    /// Whether the request may run on that class at all.
    pub fn allows(&self, class: ClassId) -> bool {
        let run = self.runs.partition_point(|run| run.to <= class.0);
        let run = self.runs.get(run).filter(|run| run.from <= class.0);
        run.is_some_and(|run| self.list[(run.at + class.0 - run.from) as usize] < f32::INFINITY)
    }

    /// All runs, in pieces of up to `most` classes (a multiple of [`LANES`]), as far as there are `wide` classes.
    #[inline]
    pub(super) fn chunks(&self, most: u32, wide: u32) -> Chunks<'_> {
        let mut run = self.run;
        run.to = run.to.min(wide);
        Chunks {
            later: self.runs.get(1..).unwrap_or_default(),
            run,
            most,
            wide,
        }
    }

    /// The bound of a class of that chunk.
    #[inline]
    pub(super) fn bound(&self, chunk: Chunk, class: usize, key: f32) -> f32 {
        let at = chunk.at as usize + class - chunk.from as usize;
        match self.weights as usize {
            0 => self.list[at] + key,
            weights => self.list[at] + self.list[weights + at] * key,
        }
    }

    /// The least bound in a chunk, with the cheapest keys of all classes.
    #[inline]
    pub(super) fn least(&self, keys: &[f32], chunk: Chunk) -> f32 {
        let keys = &keys[chunk.from as usize..chunk.to as usize];
        let (base, weight) = self.columns(chunk.at as usize, keys.len());
        match weight {
            None => least_sum(keys, base),
            Some(weight) => least_weighted(keys, base, weight),
        }
    }

    /// Bases and weights of so many classes.
    #[inline]
    fn columns(&self, at: usize, count: usize) -> (&[f32], Option<&[f32]>) {
        let weights = self.weights as usize;
        let weight = (weights > 0).then(|| &self.list[weights + at..weights + at + count]);
        (&self.list[at..at + count], weight)
    }

    /// A class of a chunk whose bound is `least`: the first from one on that the lower half of `turn` says.
    #[inline]
    pub(super) fn find(&self, keys: &[f32], chunk: Chunk, least: f32, turn: u32) -> usize {
        let keys = &keys[chunk.from as usize..chunk.to as usize];
        let vectors = keys.len() / LANES;
        let (start, first) = (share(turn, vectors as u32) as usize, turn % LANES as u32);
        for vector in (start..vectors).chain(0..start) {
            let low = vector * LANES;
            let (base, weight) = self.columns(chunk.at as usize + low, LANES);
            let keys = &keys[low..low + LANES];
            let mut sums = [0.0; LANES];
            match weight {
                None => {
                    for i in 0..LANES {
                        sums[i] = keys[i] + base[i];
                    }
                }
                Some(weight) => {
                    for i in 0..LANES {
                        sums[i] = keys[i] * weight[i] + base[i];
                    }
                }
            }
            if sums.iter().fold(false, |any, sum| any | (*sum == least)) {
                let mut hits = 0u32;
                for (i, sum) in sums.iter().enumerate() {
                    hits |= u32::from(*sum == least) << i;
                }
                // Lanes before the first count as behind the last.
                let later = hits & (u32::MAX << first);
                let lane = if later == 0 { hits } else { later }.trailing_zeros();
                return chunk.from as usize + low + lane as usize;
            }
        }
        chunk.from as usize
    }
}

fn padded(mut list: Vec<f32>, with: f32) -> Vec<f32> {
    list.resize(list.len().next_multiple_of(LANES), with);
    list
}

fn runs(base: &[f32]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (i, lanes) in base.chunks_exact(LANES).enumerate() {
        if lanes.iter().all(|b| *b == f32::INFINITY) {
            continue;
        }
        let (from, to) = ((i * LANES) as u32, ((i + 1) * LANES) as u32);
        match runs.last_mut() {
            Some(last) if from - last.to <= GAP as u32 => last.to = to,
            _ => runs.push(Run { from, to, at: 0 }),
        }
    }
    let mut at = 0;
    for run in &mut runs {
        run.at = at;
        at += run.to - run.from;
    }
    runs
}

/// What lies in the runs.
fn keep(runs: &[Run], all: &[f32], into: &mut Vec<f32>) {
    for run in runs {
        into.extend_from_slice(&all[run.from as usize..run.to as usize]);
    }
}

/// The least `key + base`. Written so that the compiler makes vectors of it: no branch, four lanes by four.
#[inline]
fn least_sum(keys: &[f32], base: &[f32]) -> f32 {
    let mut least = [f32::INFINITY; LANES];
    for (k, b) in keys.chunks_exact(LANES).zip(base.chunks_exact(LANES)) {
        for i in 0..LANES {
            let sum = k[i] + b[i];
            least[i] = if sum < least[i] { sum } else { least[i] };
        }
    }
    lowest(least)
}

/// The least `weight × key + base`.
#[inline]
fn least_weighted(keys: &[f32], base: &[f32], weight: &[f32]) -> f32 {
    let mut least = [f32::INFINITY; LANES];
    let keys = keys.chunks_exact(LANES);
    for ((k, b), w) in keys.zip(base.chunks_exact(LANES)).zip(weight.chunks_exact(LANES)) {
        for i in 0..LANES {
            let sum = k[i] * w[i] + b[i];
            least[i] = if sum < least[i] { sum } else { least[i] };
        }
    }
    lowest(least)
}

/// Halves against each other, so that four at a time are compared to the end.
#[inline]
fn lowest(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] = if lanes[i + half] < lanes[i] {
                lanes[i + half]
            } else {
                lanes[i]
            };
        }
        half /= 2;
    }
    lanes[0]
}
