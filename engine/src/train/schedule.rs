//! Which examples go together in which step, and packing them into rows.

use super::Rng;
use super::data::Example;
use super::settings::Settings;

/// Which examples go through the model in which step. Everything follows from the seed: a step can be found again
/// without going through those before it.
#[derive(Debug)]
pub struct Schedule {
    lengths: Vec<usize>,
    row_max: usize,
    packing: bool,
    seed: u64,
    /// Rows of one step.
    per_step: usize,
    /// Steps before the end of each epoch.
    ends: Vec<usize>,
    total: usize,
    current: Option<(usize, Vec<Vec<usize>>)>,
}

impl Schedule {
    /// The schedule of a run.
    pub fn new(examples: &[Example], settings: &Settings) -> Self {
        let mut schedule = Self {
            lengths: examples.iter().map(Example::length).collect(),
            row_max: settings.sequence_len,
            packing: settings.sample_packing,
            seed: settings.seed,
            per_step: settings.micro_batch_size * settings.gradient_accumulation_steps,
            ends: Vec::new(),
            total: 0,
            current: None,
        };
        let most = if settings.max_steps == 0 {
            usize::MAX
        } else {
            settings.max_steps
        };
        // `max_steps` alone decides where it is more than the epochs have, as elsewhere.
        for epoch in 0.. {
            if schedule.total >= most || (epoch >= settings.num_epochs && settings.max_steps == 0) {
                break;
            }
            schedule.total += schedule.rows_of(epoch).len().div_ceil(schedule.per_step);
            schedule.ends.push(schedule.total);
        }
        schedule.total = schedule.total.min(most);
        schedule
    }

    /// Steps in all.
    pub fn total(&self) -> usize {
        self.total
    }

    /// The epoch of a step, and its first row there: the data's cursor.
    pub fn cursor(&self, step: usize) -> (usize, usize) {
        let epoch = self.ends.partition_point(|end| *end <= step);
        let before = epoch.checked_sub(1).map_or(0, |before| self.ends[before]);
        (epoch, (step - before) * self.per_step)
    }

    /// The rows of a step: examples that go together.
    pub fn rows(&mut self, step: usize) -> &[Vec<usize>] {
        let (epoch, first) = self.cursor(step);
        if self.current.as_ref().is_none_or(|(current, _)| *current != epoch) {
            self.current = Some((epoch, self.rows_of(epoch)));
        }
        let rows = self.current.as_ref().map_or(&[][..], |(_, rows)| rows);
        &rows[first.min(rows.len())..(first + self.per_step).min(rows.len())]
    }

    fn rows_of(&self, epoch: usize) -> Vec<Vec<usize>> {
        /// Rows that are still looked at for room.
        const OPEN_MAX: usize = 32;
        let mut order: Vec<usize> = (0..self.lengths.len()).collect();
        Rng::new(self.seed ^ (epoch as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)).shuffle(&mut order);
        if !self.packing {
            return order.into_iter().map(|example| vec![example]).collect();
        }
        let mut rows: Vec<Vec<usize>> = Vec::new();
        let mut open: Vec<(usize, usize)> = Vec::new();
        for example in order {
            let length = self.lengths[example];
            match open.iter().position(|(_, room)| *room >= length) {
                Some(found) => {
                    rows[open[found].0].push(example);
                    open[found].1 -= length;
                }
                None => {
                    if open.len() >= OPEN_MAX {
                        open.remove(0);
                    }
                    open.push((rows.len(), self.row_max.saturating_sub(length)));
                    rows.push(vec![example]);
                }
            }
        }
        rows
    }
}
