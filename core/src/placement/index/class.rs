//! One class: its places in the order of their keys, in blocks, and the first of them at each level.
use super::{LEVELS, NOWHERE, SlotId, bytes, level::Level};
use crate::prelude::*;

/// Places in one block.
pub(super) const BLOCK: usize = 32;
/// Blocks in one group.
const GROUP: usize = 64;

/// Up to 32 places that follow each other in the order of a class. Their levels and whose they are lie in one cache
/// line: most changes need no other.
#[derive(Debug, Clone)]
#[repr(C, align(64))]
pub(super) struct Block {
    /// The level of each place; zero beyond the last.
    pub(super) levels: [u8; BLOCK],
    pub(super) class: u32,
    /// Its number in the class's order.
    pub(super) ordinal: u32,
    pub(super) len: u32,
    pub(super) keys: [f32; BLOCK],
    pub(super) slots: [u32; BLOCK],
}

impl Block {
    pub(super) fn new(class: usize, ordinal: usize) -> Self {
        Self {
            levels: [0; BLOCK],
            class: class as u32,
            ordinal: ordinal as u32,
            len: 0,
            keys: [0.0; BLOCK],
            slots: [0; BLOCK],
        }
    }

    /// The highest level in it.
    pub(super) fn top(&self) -> u8 {
        bytes::max(&self.levels)
    }

    /// Where the places with the same key as that at `at` end.
    #[inline]
    pub(super) fn equals(&self, at: usize) -> usize {
        let (key, len) = (self.keys[at], self.len as usize);
        let mut end = at + 1;
        while end < len && self.keys[end] == key {
            end += 1;
        }
        end
    }

    /// Of the places in `mask`: one of those with the most free, by turn; with the least, where it should be `snug`.
    pub(super) fn fullest(&self, mask: u32, turn: u32, snug: bool) -> usize {
        let (mut left, mut most, mut full) = (mask, 0, 0u32);
        while left != 0 {
            let at = left.trailing_zeros();
            left &= left - 1;
            let level = self.levels[at as usize];
            let worth = if snug { u8::MAX - level } else { level };
            if worth > most {
                (most, full) = (worth, 0);
            }
            if worth == most {
                full |= 1 << at;
            }
        }
        for _ in 0..share(turn, full.count_ones()) {
            full &= full - 1;
        }
        full.trailing_zeros() as usize % BLOCK
    }
}

/// A number under `end`, by the lower half of `turn`: what a remainder would do, without its price.
#[inline]
pub(super) fn share(turn: u32, end: u32) -> u32 {
    (((turn & 0xffff) as u64 * u64::from(end)) >> 16) as u32
}

/// The first place at a level: its slot, and whether places behind it in the block may cost the same.
#[derive(Debug, Clone, Copy)]
pub(super) struct First(u32);

impl First {
    const TIED: u32 = 1 << 31;
    pub(super) const NOBODY: Self = Self(NOWHERE);

    /// The place at `at`.
    #[inline]
    pub(super) fn of(block: &Block, at: usize) -> Self {
        let tied = at + 1 < block.len as usize && block.keys[at + 1] == block.keys[at];
        Self(block.slots[at] | if tied { Self::TIED } else { 0 })
    }

    /// Something has come between.
    pub(super) fn doubt(&mut self) {
        self.0 |= Self::TIED;
    }

    /// Its slot, if no other place can cost the same.
    #[inline]
    pub(super) fn alone(self) -> Option<SlotId> {
        (self.0 & Self::TIED == 0).then_some(SlotId(self.0))
    }
}

/// A class of places. A position in it is `32 × the block's number + the place's number in the block`.
#[derive(Debug, Clone)]
pub(super) struct Class {
    /// By level, from 1 on: the first position with at least that much free, or [`NOWHERE`]. It never falls from one
    /// level to the next: whatever holds more holds less too.
    pub(super) first: [u32; LEVELS],
    /// The place there, so that most searches need not look at its block.
    pub(super) place: [First; LEVELS],
    /// Places in it.
    pub(super) len: u32,
    /// Of those, how many have anything free.
    pub(super) open: u32,
    /// Blocks by key.
    pub(super) order: Vec<u32>,
    /// The highest level in each block, and in each group of them.
    near: Vec<u8>,
    far: Vec<u8>,
}

impl Class {
    pub(super) fn new() -> Self {
        Self {
            first: [NOWHERE; LEVELS],
            place: [First::NOBODY; LEVELS],
            len: 0,
            open: 0,
            order: Vec::new(),
            near: Vec::new(),
            far: Vec::new(),
        }
    }

    pub(super) fn bytes(&self) -> usize {
        size_of::<Self>() + self.order.capacity() * 4 + self.near.capacity() + self.far.capacity()
    }

    /// The first position from `from` on with at least `need` free, and the block there.
    #[inline]
    pub(super) fn next<'a>(&self, blocks: &'a [Block], from: u32, need: u8) -> Option<(u32, &'a Block)> {
        let ordinal = from as usize / BLOCK;
        let block = &blocks[*self.order.get(ordinal)? as usize];
        if let Some(at) = bytes::find(&block.levels, from as usize % BLOCK, need) {
            return Some(((ordinal * BLOCK + at) as u32, block));
        }
        let ordinal = self.next_block(ordinal + 1, need)?;
        let block = &blocks[self.order[ordinal] as usize];
        let at = bytes::find(&block.levels, 0, need)?;
        Some(((ordinal * BLOCK + at) as u32, block))
    }

    fn next_block(&self, from: usize, need: u8) -> Option<usize> {
        let group = from / GROUP;
        if let Some(at) = bytes::find(self.group(group)?, from % GROUP, need) {
            return Some(group * GROUP + at);
        }
        let group = bytes::find(&self.far, group + 1, need)?;
        let at = bytes::find(self.group(group)?, 0, need)?;
        Some(group * GROUP + at)
    }

    /// The highest levels of the blocks of that group.
    fn group(&self, group: usize) -> Option<&[u8]> {
        self.near
            .get(group * GROUP..self.near.len().min((group + 1) * GROUP))
    }

    /// A place of that block has now so much free.
    #[inline]
    pub(super) fn raise(&mut self, ordinal: usize, level: Level) {
        if self.near[ordinal] < level.0 {
            self.near[ordinal] = level.0;
            let far = &mut self.far[ordinal / GROUP];
            *far = level.0.max(*far);
        }
    }

    /// A place of that block had `old` free and has less now.
    #[inline]
    pub(super) fn lower(&mut self, block: &Block, old: Level) {
        let ordinal = block.ordinal as usize;
        if self.near[ordinal] > old.0 {
            return;
        }
        let top = block.top();
        if top == old.0 {
            return;
        }
        self.near[ordinal] = top;
        let group = ordinal / GROUP;
        if self.far[group] == old.0 {
            self.far[group] = self.group(group).map_or(0, bytes::max);
        }
    }

    /// Numbers its blocks anew from `ordinal` on: only when a block comes or goes, which is once in some thirty changes.
    pub(super) fn renumber(&mut self, blocks: &mut [Block], ordinal: usize) {
        for (i, block) in self.order.iter().enumerate().skip(ordinal) {
            blocks[*block as usize].ordinal = i as u32;
        }
        self.near.clear();
        self.near
            .extend(self.order.iter().map(|block| blocks[*block as usize].top()));
        self.near.resize(self.order.len().next_multiple_of(8), 0);
        self.far.clear();
        self.far.extend(self.near.chunks(GROUP).map(bytes::max));
        self.far.resize(self.far.len().next_multiple_of(8), 0);
    }
}
