//! The cheapest places for one request.
use super::{
    BLOCK, Costs, Index, LANES, Level, NOWHERE, SlotId, bytes,
    class::{Block, share},
    costs::{Chunk, Chunks},
};
use crate::prelude::*;

/// The minimum of so many classes is kept on the way.
const CHUNK: u32 = 8 * LANES as u32;
/// So many minima: they lie on the stack.
const CHUNKS: usize = 16;

/// A place that [`Index::cheapest`] found, with the exact score it was given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// What `exact` said.
    pub score: u64,
    /// Of which place.
    pub slot: SlotId,
}

/// One search.
struct Search<'a, E> {
    index: &'a Index,
    costs: &'a Costs,
    /// The cheapest key of each class at the wanted level.
    row: &'a [f32],
    need: u8,
    many: usize,
    turn: u32,
    exact: E,
    out: &'a mut Vec<Found>,
    /// What a bound must lie under to be worth a look.
    threshold: f32,
}

impl Index {
    /// The `many` cheapest places with at least `level` free, cheapest first, into `out`. What `out` holds already,
    /// sorted, counts among them.
    ///
    /// `exact` judges a place: its score, or `None` when it will not do after all. `bound ≤ score` must hold for
    /// every place. Between equals, classes take turns by `turn`, and in a class the most free of them wins, or the least
    /// free, as `costs` say.
    pub fn cheapest(
        &self,
        costs: &Costs,
        level: Level,
        many: usize,
        turn: u32,
        exact: impl FnMut(SlotId) -> Option<u64>,
        out: &mut Vec<Found>,
    ) {
        if level == Level::NONE || many == 0 {
            return;
        }
        let row = usize::from(level.0) - 1;
        let mut search = Search {
            index: self,
            costs,
            row: &self.best[row * self.wide..(row + 1) * self.wide],
            need: level.0,
            many,
            // Callers may just count: the bits that matter below must differ all the same.
            turn: turn.wrapping_mul(0x9e37_79b9),
            exact,
            out,
            threshold: f32::INFINITY,
        };
        search.settle();
        // A class that the request has no cost for is one that it was not asked about.
        let mut chunks = costs.chunks(CHUNK, self.wide as u32);
        while search.span(&mut chunks) {}
    }
}

impl<E: FnMut(SlotId) -> Option<u64>> Search<'_, E> {
    /// The next so many chunks of classes; `false` when there was none.
    #[inline]
    fn span(&mut self, chunks: &mut Chunks<'_>) -> bool {
        let mut seen = [(Chunk::default(), f32::INFINITY); CHUNKS];
        let (mut count, mut least) = (0, f32::INFINITY);
        // In this order, so that no chunk is drawn that has no room.
        for (seen, chunk) in seen.iter_mut().zip(chunks) {
            let min = self.costs.least(self.row, chunk);
            *seen = (chunk, min);
            least = if min < least { min } else { least };
            count += 1;
        }
        let careful = 1.0 - self.costs.slack;
        if least >= f32::INFINITY || least * careful >= self.threshold {
            return count == CHUNKS;
        }
        let seen = &seen[..count];
        // First the class with the least bound: it makes the threshold that spares the others. Which of equal classes,
        // the upper half of `turn` says; which place in it, the lower half.
        let turn = self.turn >> 16;
        let (before, after) = seen.split_at(share(turn, count as u32) as usize);
        let Some((chunk, _)) = after.iter().chain(before).find(|(_, min)| *min == least) else {
            return count == CHUNKS;
        };
        let first = self.costs.find(self.row, *chunk, least, turn);
        self.walk(*chunk, first);
        for (chunk, min) in seen {
            if min * careful >= self.threshold {
                continue;
            }
            for c in chunk.from as usize..chunk.to as usize {
                if c != first && self.costs.bound(*chunk, c, self.row[c]) * careful < self.threshold {
                    self.walk(*chunk, c);
                }
            }
        }
        count == CHUNKS
    }

    /// Judges the places of one class in the order of their keys, as long as they may beat what was found.
    #[inline]
    fn walk(&mut self, chunk: Chunk, c: usize) {
        let (class, blocks) = (&self.index.classes[c], &self.index.blocks);
        let level = usize::from(self.need) - 1;
        let position = class.first[level];
        if position == NOWHERE {
            return;
        }
        let mut next = match class.place[level].alone() {
            Some(slot) => {
                self.judge(slot);
                // Most often that was it, and the block stays where it is.
                if self.costs.bound(chunk, c, self.row[c]) * (1.0 - self.costs.slack) >= self.threshold {
                    return;
                }
                class.next(blocks, position + 1, self.need)
            }
            None => {
                let block = class.order[position as usize / BLOCK];
                Some((position, &blocks[block as usize]))
            }
        };
        while let Some((position, block)) = next {
            let Some(from) = self.place(chunk, c, block, position) else {
                return;
            };
            next = class.next(blocks, from, self.need);
        }
    }

    /// Judges the place at one position and those beside it that cost the same. Where to go on, unless nothing behind
    /// them can beat what was found.
    #[inline]
    fn place(&mut self, chunk: Chunk, c: usize, block: &Block, position: u32) -> Option<u32> {
        let at = position as usize % BLOCK;
        let bound = self.costs.bound(chunk, c, block.keys[at]) * (1.0 - self.costs.slack);
        if bound >= self.threshold {
            return None;
        }
        let end = if self.many == 1 { block.equals(at) } else { at + 1 };
        if end == at + 1 {
            self.judge(SlotId(block.slots[at]));
        } else {
            // The fullest first, by turns.
            let run = (u32::MAX >> (BLOCK - end)) & (u32::MAX << at);
            let mut equals = bytes::mask(&block.levels, self.need) & run;
            while equals != 0 && bound < self.threshold {
                let at = block.fullest(equals, self.turn, self.costs.snug);
                equals &= !(1 << at);
                self.judge(SlotId(block.slots[at]));
            }
        }
        (bound < self.threshold).then_some(position - at as u32 + end as u32)
    }

    #[inline]
    fn judge(&mut self, slot: SlotId) {
        if let Some(score) = (self.exact)(slot) {
            let place = self.out.partition_point(|f| f.score <= score);
            if place < self.many {
                self.out.truncate(self.many - 1);
                self.out.insert(place, Found { score, slot });
                self.settle();
            }
        }
    }

    fn settle(&mut self) {
        self.threshold = match self.out.last() {
            Some(last) if self.out.len() >= self.many => last.score as f32,
            _ => f32::INFINITY,
        };
    }
}
