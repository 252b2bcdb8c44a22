//! The placement index: the cheapest capacity without looking at every node.
//!
//! Places to put work ([`SlotId`]) are grouped in classes. A class keeps its places sorted by one key, in blocks of
//! up to 32, with one byte per place, per block and per 64 blocks that says how much is free there at most
//! ([`Level`]), so that the cheapest place with enough free is a few comparisons of eight bytes away. Each class knows
//! its first place for each level, and their keys lie side by side, level by level: a request adds its own cost of
//! each class ([`Costs`]) and takes the minimum. A change of one place rewrites only what it was, or now is, first of.
//!
//! What the index compares are lower bounds. The caller's `exact` judgement of a place decides, and the walk goes
//! on until no bound lies under the best judgement: the answer is always the exact cheapest.
//!
//! Not here: what a key or a cost means (`super::stock`, [`super::quote`]).
mod bytes;
mod class;
mod costs;
mod level;
mod search;
#[cfg(test)]
mod tests;

pub use costs::Costs;
pub use level::{Level, Steps};
pub use search::Found;

use crate::prelude::*;
use class::{BLOCK, Block, Class, First};
use level::LEVELS;

/// Names a place where work can go. Reused after [`Index::remove`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId(pub u32);

/// Names a class. Reused after it is empty, by the caller's bookkeeping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClassId(pub u32);

/// Classes are looked at sixteen at a time: four vectors of four.
const LANES: usize = 16;
const NOWHERE: u32 = u32::MAX;

/// See the module's note.
#[derive(Debug, Clone, Default)]
pub struct Index {
    classes: Vec<Class>,
    /// `LEVELS` rows of the cheapest key of each class; infinite where there is none.
    best: Vec<f32>,
    /// Keys in one row.
    wide: usize,
    blocks: Vec<Block>,
    blocks_spare: Vec<u32>,
    /// By slot: the block, times 32, and the place in it.
    slots: Vec<u32>,
    slots_spare: Vec<u32>,
}

impl Index {
    /// A new, empty class.
    pub fn add_class(&mut self) -> ClassId {
        let id = self.classes.len();
        self.classes.push(Class::new());
        if id == self.wide {
            self.widen();
        }
        ClassId(id as u32)
    }

    /// Makes the rows half as long again. An odd number of cache lines: a column of an even one would fall into few
    /// sets of the cache.
    fn widen(&mut self) {
        let lines = (self.wide / LANES * 3 / 2 + 1) | 1;
        let wide = lines * LANES;
        let mut best = vec![f32::INFINITY; LEVELS * wide];
        if self.wide > 0 {
            for (new, old) in best.chunks_exact_mut(wide).zip(self.best.chunks_exact(self.wide)) {
                new[..self.wide].copy_from_slice(old);
            }
        }
        (self.best, self.wide) = (best, wide);
    }

    /// How many classes there are, empty ones included.
    pub fn classes(&self) -> usize {
        self.classes.len()
    }

    /// Places in a class, and of those how many have anything free.
    pub fn count(&self, class: ClassId) -> (u32, u32) {
        let class = &self.classes[class.0 as usize];
        (class.len, class.open)
    }

    /// The class of a place.
    pub fn class_of(&self, slot: SlotId) -> ClassId {
        ClassId(self.blocks[self.slots[slot.0 as usize] as usize / BLOCK].class)
    }

    /// Bytes that the index itself holds.
    pub fn bytes(&self) -> usize {
        self.classes.iter().map(Class::bytes).sum::<usize>()
            + self.best.capacity() * 4
            + self.blocks.capacity() * size_of::<Block>()
            + (self.slots.capacity() + self.blocks_spare.capacity() + self.slots_spare.capacity()) * 4
    }

    /// Puts a new place into a class. `key` must be finite and not negative; others count as the dearest.
    pub fn insert(&mut self, class: ClassId, key: f32, level: Level) -> SlotId {
        let key = if key.is_finite() && key >= 0.0 {
            key
        } else {
            f32::MAX
        };
        let c = class.0 as usize;
        let id = self.block_for(c, key) as usize;
        let block = &mut self.blocks[id];
        let len = block.len as usize;
        let at = block.keys[..len].partition_point(|k| *k <= key);
        block.levels.copy_within(at..len, at + 1);
        block.keys.copy_within(at..len, at + 1);
        block.slots.copy_within(at..len, at + 1);
        block.levels[at] = 0;
        block.keys[at] = key;
        block.len += 1;
        let position = (block.ordinal as usize * BLOCK + at) as u32;
        let slot = self.slots_spare.pop().unwrap_or_else(|| {
            self.slots.push(0);
            (self.slots.len() - 1) as u32
        });
        self.blocks[id].slots[at] = slot;
        self.tell(id, at);
        let class = &mut self.classes[c];
        class.len += 1;
        for (first, place) in class.first.iter_mut().zip(&mut class.place) {
            if *first as usize / BLOCK == position as usize / BLOCK {
                *first += u32::from(*first >= position);
                place.doubt();
            }
        }
        self.set_level(SlotId(slot), level);
        SlotId(slot)
    }

    /// Takes a place out. Its name may be given to another.
    pub fn remove(&mut self, slot: SlotId) {
        self.set_level(slot, Level::NONE);
        let spot = self.slots[slot.0 as usize] as usize;
        let (id, at) = (spot / BLOCK, spot % BLOCK);
        let block = &mut self.blocks[id];
        let len = block.len as usize;
        block.levels.copy_within(at + 1..len, at);
        block.keys.copy_within(at + 1..len, at);
        block.slots.copy_within(at + 1..len, at);
        block.levels[len - 1] = 0;
        block.len -= 1;
        let (c, empty) = (block.class as usize, block.len == 0);
        let position = (block.ordinal as usize * BLOCK + at) as u32;
        self.tell(id, at);
        self.slots_spare.push(slot.0);
        let class = &mut self.classes[c];
        class.len -= 1;
        if empty {
            let ordinal = position as usize / BLOCK;
            class.order.remove(ordinal);
            self.blocks_spare.push(id as u32);
            self.restart(c, ordinal);
            return;
        }
        for first in &mut class.first {
            if *first > position && *first as usize / BLOCK == position as usize / BLOCK {
                *first -= 1;
            }
        }
    }

    /// Sets how much of a place is free.
    pub fn set_level(&mut self, slot: SlotId, level: Level) {
        let spot = self.slots[slot.0 as usize] as usize;
        let at = spot % BLOCK;
        let block = &mut self.blocks[spot / BLOCK];
        let old = Level(core::mem::replace(&mut block.levels[at], level.0));
        if old == level {
            return;
        }
        let (c, key) = (block.class as usize, block.keys[at]);
        let position = block.ordinal * BLOCK as u32 + at as u32;
        let class = &mut self.classes[c];
        match (old == Level::NONE, level == Level::NONE) {
            (true, _) => class.open += 1,
            (_, true) => class.open -= 1,
            _ => {}
        }
        if level > old {
            class.raise(position as usize / BLOCK, level);
            // It comes before what was the first so far at some of its levels: the higher, the surer.
            let (low, high) = (old.0 as usize, level.0 as usize);
            if class.first[high - 1] > position {
                let place = First::of(block, at);
                let mut l = high;
                while l > low && class.first[l - 1] > position {
                    l -= 1;
                    class.first[l] = position;
                    class.place[l] = place;
                    self.best[l * self.wide + c] = key;
                }
            }
            return;
        }
        class.lower(block, old);
        // Where it was the first, another is now: the levels that it lost, from the highest down.
        let (low, high) = (level.0 as usize, old.0 as usize);
        let mut from = high;
        while from > low && class.first[from - 1] == position {
            from -= 1;
        }
        if from < high {
            self.advance(c, position + 1, from, high);
        }
    }

    /// The same for many places. What they need of memory is fetched side by side first, not one after the other: with
    /// many nodes that is most of the time.
    pub fn set_levels(&mut self, changes: &[(SlotId, Level)]) {
        let mut seen = 0;
        for (slot, _) in changes {
            seen ^= self.slots[slot.0 as usize];
        }
        core::hint::black_box(seen);
        for (slot, _) in changes {
            seen ^= self.blocks[self.slots[slot.0 as usize] as usize / BLOCK].class;
        }
        core::hint::black_box(seen);
        for (slot, level) in changes {
            self.set_level(*slot, *level);
        }
    }

    /// Finds the first places of a class for the levels above `low` up to `high` among positions from `from` on.
    fn advance(&mut self, c: usize, from: u32, low: usize, high: usize) {
        let class = &mut self.classes[c];
        let (mut from, mut l) = (from, low);
        while l < high {
            // What holds this much may hold more: it is the first of all these levels then.
            let (first, place, key, end) = match class.next(&self.blocks, from, l as u8 + 1) {
                Some((position, block)) => {
                    let at = position as usize % BLOCK;
                    let end = (block.levels[at] as usize).min(high);
                    (position, First::of(block, at), block.keys[at], end)
                }
                None => (NOWHERE, First::NOBODY, f32::INFINITY, high),
            };
            for l in l..end {
                class.first[l] = first;
                class.place[l] = place;
                self.best[l * self.wide + c] = key;
            }
            (from, l) = (first.wrapping_add(1), end);
        }
    }

    /// Every place with at least `level` free in a class, cheapest key first.
    pub fn places(&self, class: ClassId, level: Level) -> impl Iterator<Item = SlotId> + '_ {
        let class = &self.classes[class.0 as usize];
        let need = level.0.max(1);
        let mut from = class.first[usize::from(need) - 1];
        core::iter::from_fn(move || {
            let (position, block) = class.next(&self.blocks, from, need)?;
            from = position + 1;
            Some(SlotId(block.slots[position as usize % BLOCK]))
        })
    }

    /// The block where `key` belongs, with room for one more.
    fn block_for(&mut self, c: usize, key: f32) -> u32 {
        if self.classes[c].order.is_empty() {
            let id = self.new_block(c, 0);
            self.restart(c, 0);
            return id;
        }
        let class = &self.classes[c];
        let after = class
            .order
            .partition_point(|b| self.blocks[*b as usize].keys[0] <= key);
        let ordinal = after.saturating_sub(1);
        let id = class.order[ordinal];
        if (self.blocks[id as usize].len as usize) < BLOCK {
            return id;
        }
        let second = self.split(c, ordinal);
        if self.blocks[second as usize].keys[0] <= key {
            second
        } else {
            id
        }
    }

    fn new_block(&mut self, c: usize, ordinal: usize) -> u32 {
        let block = Block::new(c, ordinal);
        let id = match self.blocks_spare.pop() {
            Some(id) => {
                self.blocks[id as usize] = block;
                id
            }
            None => {
                self.blocks.push(block);
                (self.blocks.len() - 1) as u32
            }
        };
        self.classes[c].order.insert(ordinal, id);
        id
    }

    /// Moves the upper half of a full block into a new one behind it.
    fn split(&mut self, c: usize, ordinal: usize) -> u32 {
        const HALF: usize = BLOCK / 2;
        let first = self.classes[c].order[ordinal];
        let second = self.new_block(c, ordinal + 1);
        let old = self.blocks[first as usize].clone();
        let new = &mut self.blocks[second as usize];
        new.levels[..HALF].copy_from_slice(&old.levels[HALF..]);
        new.keys[..HALF].copy_from_slice(&old.keys[HALF..]);
        new.slots[..HALF].copy_from_slice(&old.slots[HALF..]);
        new.len = HALF as u32;
        let old = &mut self.blocks[first as usize];
        old.levels[HALF..].fill(0);
        old.len = HALF as u32;
        self.tell(second as usize, 0);
        self.restart(c, ordinal);
        second
    }

    /// Tells the places of a block from `at` on where they are.
    fn tell(&mut self, id: usize, at: usize) {
        let block = &self.blocks[id];
        for i in at..block.len as usize {
            self.slots[block.slots[i] as usize] = (id * BLOCK + i) as u32;
        }
    }

    /// Blocks have come or gone from `ordinal` on: everything that counts them is written anew.
    fn restart(&mut self, c: usize, ordinal: usize) {
        self.classes[c].renumber(&mut self.blocks, ordinal);
        self.advance(c, 0, 0, LEVELS);
    }
}
