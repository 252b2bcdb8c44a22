//! The placement index: the cheapest capacity without looking at every node.
//!
//! Places to put work ([`SlotId`]) are grouped in classes. A class keeps its places sorted by one key, in blocks of
//! up to 64; each block has one word per [`Level`] of free capacity, and each class one bit per block and level, so
//! that the cheapest place with enough free capacity is a few bit operations away. The cheapest keys of all classes
//! lie side by side, level by level: a request adds its own cost of each class ([`Costs`]) and takes the minimum.
//!
//! What the index compares are lower bounds. The caller's `exact` judgement of a place decides, and the walk goes
//! on until no bound lies under the best judgement: the answer is always the exact cheapest.
//!
//! Not here: what a key or a cost means ([`super::stock`], [`super::quote`]).
use crate::prelude::*;

/// Names a place where work can go. Reused after [`Index::remove`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId(pub u32);

/// Names a class. Reused after it is empty, by the caller's bookkeeping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClassId(pub u32);

/// Free capacity, in steps: none, twentieths of one device, whole devices.
///
/// A request's level never exceeds that of a place which can hold it, so that no feasible place is overlooked;
/// what lies between two steps is the caller's exact judgement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Level(u8);

/// Thousandths of a device from which each level begins; the first is level 1.
const STEPS: [u32; 30] = [
    1, 50, 100, 150, 200, 250, 300, 350, 400, 450, 500, 550, 600, 650, 700, 750, 800, 850, 900, 950, 1_000,
    2_000, 3_000, 4_000, 5_000, 6_000, 7_000, 8_000, 16_000, 64_000,
];
const LEVELS: usize = 48;

impl Level {
    /// Nothing is free.
    pub const NONE: Self = Self(0);

    /// The level of `milli` thousandths: of a place, what its largest free share is; of a request, what it needs.
    /// Whole devices count 1000 each; a share of one device counts less than 1000.
    pub fn of_milli(milli: u32) -> Self {
        // At most 30, so the cast keeps it.
        Self(STEPS.partition_point(|step| *step <= milli) as u8)
    }

    /// The level of so many whole devices.
    pub fn of_devices(devices: u32) -> Self {
        Self::of_milli(devices.saturating_mul(1_000))
    }
}

/// Levels of one's own, where the sizes that requests ask for are known: between them nothing needs a closer look.
#[derive(Debug, Clone)]
pub struct Steps(Vec<u32>);

impl Steps {
    /// Of those needs, in thousandths of a device. When they are too many, evenly chosen ones; the least always counts.
    pub fn of(needs: impl IntoIterator<Item = u32>) -> Self {
        let all: BTreeSet<u32> = needs.into_iter().map(|need| need.max(1)).collect();
        let skip = all.len().div_ceil(LEVELS).max(1);
        Self(all.into_iter().step_by(skip).collect())
    }

    /// As [`Level::of_milli`], in these steps. All levels of one index must come from the same.
    pub fn level(&self, milli: u32) -> Level {
        // At most 48, so the cast keeps it.
        Level(self.0.partition_point(|step| *step <= milli) as u8)
    }
}

/// Classes are looked at sixteen at a time: four vectors of four.
const LANES: usize = 16;
/// The minimum of so many classes is kept on the way.
const CHUNK: usize = 128;
/// Places in one block.
const BLOCK: usize = 64;
const NOWHERE: u32 = u32::MAX;

/// What one request costs on each class before the place's own key counts: `base + weight × key` bounds the cost
/// there from below. `f32::INFINITY` where the request may not run.
#[derive(Debug, Clone)]
pub struct Costs {
    base: Vec<f32>,
    weight: Weight,
    /// How far a bound may lie above the truth because of rounding, as a share.
    slack: f32,
}

#[derive(Debug, Clone)]
enum Weight {
    One,
    PerClass(Vec<f32>),
}

impl Costs {
    /// Costs that are exact in `f32` (integers under 2²⁴) and keys that count once. One entry per class.
    pub fn exact(base: Vec<f32>) -> Self {
        Self {
            base: padded(base, f32::INFINITY),
            weight: Weight::One,
            slack: 0.0,
        }
    }

    /// Costs with a weight of the key per class, as pairs of base and weight. Weights are positive and finite.
    pub fn weighted(pairs: impl Iterator<Item = (f32, f32)>) -> Self {
        let (base, weight) = pairs.unzip();
        Self {
            base: padded(base, f32::INFINITY),
            weight: Weight::PerClass(padded(weight, 1.0)),
            // A few roundings of 2⁻²⁴ each, generously.
            slack: 1e-5,
        }
    }

    /// Classes it speaks of, rounded up.
    fn len(&self) -> usize {
        self.base.len()
    }

    /// Whether the request may run on that class at all.
    pub fn allows(&self, class: ClassId) -> bool {
        self.base
            .get(class.0 as usize)
            .is_some_and(|b| *b < f32::INFINITY)
    }

    fn bound(&self, class: usize, key: f32) -> f32 {
        let weight = match &self.weight {
            Weight::One => 1.0,
            Weight::PerClass(w) => w[class],
        };
        self.base[class] + weight * key
    }
}

fn padded(mut list: Vec<f32>, with: f32) -> Vec<f32> {
    list.resize(list.len().next_multiple_of(LANES), with);
    list
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    block: u32,
    at: u8,
    level: Level,
}

#[derive(Debug, Clone)]
struct Block {
    class: u32,
    /// Its number in the class's order.
    ordinal: u32,
    len: u8,
    /// Bit `i` of word `l`: the place at `i` has at least level `l + 1`.
    masks: [u64; LEVELS],
    keys: [f32; BLOCK],
    slots: [u32; BLOCK],
}

#[derive(Debug, Clone)]
struct Class {
    /// Blocks by key.
    order: Vec<u32>,
    /// `LEVELS` rows of one bit per block, `words` words each.
    tops: Vec<u64>,
    words: usize,
    /// The first block with a place of that level, or [`NOWHERE`].
    first: [u32; LEVELS],
    /// Places in it.
    len: u32,
    /// Of those, how many have anything free.
    open: u32,
}

/// See the module's note.
#[derive(Debug, Clone)]
pub struct Index {
    classes: Vec<Class>,
    /// The cheapest key of each class, per level; infinite where there is none. Padded with infinity.
    best: [Vec<f32>; LEVELS],
    blocks: Vec<Block>,
    blocks_spare: Vec<u32>,
    slots: Vec<Slot>,
    slots_spare: Vec<u32>,
}

/// A place that [`Index::cheapest`] found, with the exact score it was given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// What `exact` said.
    pub score: u64,
    /// Of which place.
    pub slot: SlotId,
}

impl Default for Index {
    fn default() -> Self {
        Self {
            classes: Vec::new(),
            best: core::array::from_fn(|_| Vec::new()),
            blocks: Vec::new(),
            blocks_spare: Vec::new(),
            slots: Vec::new(),
            slots_spare: Vec::new(),
        }
    }
}

impl Index {
    /// A new, empty class.
    pub fn add_class(&mut self) -> ClassId {
        let id = self.classes.len();
        self.classes.push(Class {
            order: Vec::new(),
            tops: Vec::new(),
            words: 0,
            first: [NOWHERE; LEVELS],
            len: 0,
            open: 0,
        });
        let wide = (id + 1).next_multiple_of(LANES);
        for row in &mut self.best {
            row.resize(wide, f32::INFINITY);
        }
        ClassId(id as u32)
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
        ClassId(self.blocks[self.slots[slot.0 as usize].block as usize].class)
    }

    /// Bytes that the index itself holds.
    pub fn bytes(&self) -> usize {
        let of_class = |c: &Class| size_of::<Class>() + c.order.capacity() * 4 + c.tops.capacity() * 8;
        self.classes.iter().map(of_class).sum::<usize>()
            + self.best.iter().map(|row| row.capacity() * 4).sum::<usize>()
            + self.blocks.capacity() * size_of::<Block>()
            + self.slots.capacity() * size_of::<Slot>()
            + (self.blocks_spare.capacity() + self.slots_spare.capacity()) * 4
    }

    /// Puts a new place into a class. `key` must be finite and not negative; others count as the dearest.
    pub fn insert(&mut self, class: ClassId, key: f32, level: Level) -> SlotId {
        let key = if key.is_finite() && key >= 0.0 {
            key
        } else {
            f32::MAX
        };
        let c = class.0 as usize;
        let block = self.block_for(c, key);
        let b = &mut self.blocks[block as usize];
        let len = usize::from(b.len);
        let at = b.keys[..len].partition_point(|k| *k <= key);
        b.keys.copy_within(at..len, at + 1);
        b.slots.copy_within(at..len, at + 1);
        b.keys[at] = key;
        b.len += 1;
        let below = (1u64 << at) - 1;
        for mask in &mut b.masks {
            *mask = (*mask & below) | ((*mask & !below) << 1);
        }
        let slot = Slot {
            block,
            at: at as u8,
            level: Level::NONE,
        };
        let id = match self.slots_spare.pop() {
            Some(id) => {
                self.slots[id as usize] = slot;
                id
            }
            None => {
                self.slots.push(slot);
                (self.slots.len() - 1) as u32
            }
        };
        self.blocks[block as usize].slots[at] = id;
        self.renumber(block, at + 1);
        self.classes[c].len += 1;
        self.set_level(SlotId(id), level);
        // The first place of its block may have moved without any level changing.
        self.refresh_all(c);
        SlotId(id)
    }

    /// Takes a place out. Its name may be given to another.
    pub fn remove(&mut self, slot: SlotId) {
        self.set_level(slot, Level::NONE);
        let Slot { block, at, .. } = self.slots[slot.0 as usize];
        let at = usize::from(at);
        let b = &mut self.blocks[block as usize];
        let len = usize::from(b.len);
        b.keys.copy_within(at + 1..len, at);
        b.slots.copy_within(at + 1..len, at);
        b.len -= 1;
        let below = (1u64 << at) - 1;
        for mask in &mut b.masks {
            *mask = (*mask & below) | ((*mask >> 1) & !below);
        }
        let (class, empty) = (b.class as usize, b.len == 0);
        self.renumber(block, at);
        self.slots_spare.push(slot.0);
        self.classes[class].len -= 1;
        if empty {
            self.drop_block(class, block);
        }
    }

    /// Sets how much of a place is free.
    pub fn set_level(&mut self, slot: SlotId, level: Level) {
        let Slot {
            block,
            at,
            level: old,
        } = self.slots[slot.0 as usize];
        if old == level {
            return;
        }
        self.slots[slot.0 as usize].level = level;
        let b = &mut self.blocks[block as usize];
        let c = b.class as usize;
        let class = &mut self.classes[c];
        match (old == Level::NONE, level == Level::NONE) {
            (true, _) => class.open += 1,
            (_, true) => class.open -= 1,
            _ => {}
        }
        let bit = 1u64 << at;
        let (word, top) = (b.ordinal as usize / 64, 1u64 << (b.ordinal % 64));
        let (low, high) = (old.min(level).0 as usize, old.max(level).0 as usize);
        for l in low..high {
            let mask = &mut b.masks[l];
            if level > old {
                let was = *mask;
                *mask |= bit;
                if was == 0 {
                    class.tops[l * class.words + word] |= top;
                    class.first[l] = class.first[l].min(b.ordinal);
                }
                if class.first[l] == b.ordinal {
                    self.best[l][c] = b.keys[mask.trailing_zeros() as usize];
                }
            } else {
                *mask &= !bit;
                if class.first[l] != b.ordinal {
                    if *mask == 0 {
                        class.tops[l * class.words + word] &= !top;
                    }
                } else if *mask != 0 {
                    self.best[l][c] = b.keys[mask.trailing_zeros() as usize];
                } else {
                    class.tops[l * class.words + word] &= !top;
                    let next = class.next(l, b.ordinal as usize + 1);
                    class.first[l] = next;
                    // Found below: `b` is still borrowed here.
                    self.best[l][c] = f32::NAN;
                }
            }
        }
        if level < old {
            for l in low..high {
                if self.best[l][c].is_nan() {
                    self.refresh(c, l);
                }
            }
        }
    }

    /// The `many` cheapest places with at least `level` free, cheapest first, into `out`. What `out` holds already,
    /// sorted, counts among them.
    ///
    /// `exact` judges a place: its score, or `None` when it will not do after all. `bound ≤ score` must hold for
    /// every place. Between equals, classes take turns by `turn`, and in a class the most free of them wins.
    pub fn cheapest(
        &self,
        costs: &Costs,
        level: Level,
        many: usize,
        turn: u32,
        mut exact: impl FnMut(SlotId) -> Option<u64>,
        out: &mut Vec<Found>,
    ) {
        if level == Level::NONE || many == 0 {
            return;
        }
        let level = level.0 as usize - 1;
        let row = &self.best[level];
        let wide = row.len().min(costs.len());
        // A class that the request has no cost for is one that it was not asked about.
        let mut minima = [f32::INFINITY; 64];
        let mut from = 0;
        while from < wide {
            // So many classes at a time, for ever as many as there are: the array above is on the stack.
            let to = wide.min(from + CHUNK * minima.len());
            self.span(costs, level, many, turn, from, to, &mut minima, &mut exact, out);
            from = to;
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn span(
        &self,
        costs: &Costs,
        level: usize,
        many: usize,
        turn: u32,
        from: usize,
        to: usize,
        minima: &mut [f32; 64],
        exact: &mut impl FnMut(SlotId) -> Option<u64>,
        out: &mut Vec<Found>,
    ) {
        let keys = &self.best[level][from..to];
        let base = &costs.base[from..to];
        let chunks = keys.len().div_ceil(CHUNK);
        let mut least = f32::INFINITY;
        match &costs.weight {
            Weight::One => {
                for ((k, b), min) in keys.chunks(CHUNK).zip(base.chunks(CHUNK)).zip(minima.iter_mut()) {
                    *min = least_sum(k, b);
                    least = least.min(*min);
                }
            }
            Weight::PerClass(weight) => {
                let weights = weight[from..to].chunks(CHUNK);
                for (((k, b), w), min) in keys
                    .chunks(CHUNK)
                    .zip(base.chunks(CHUNK))
                    .zip(weights)
                    .zip(minima.iter_mut())
                {
                    *min = least_weighted(k, b, w);
                    least = least.min(*min);
                }
            }
        }
        if least >= f32::INFINITY {
            return;
        }
        let careful = 1.0 - costs.slack;
        // First the class with the least bound: it makes the threshold that spares the others. Which of equal classes,
        // the upper half of `turn` says; which place in it, the lower half.
        let turn = turn as usize;
        let start = (turn >> 16) % chunks;
        let chunk = (start..chunks)
            .chain(0..start)
            .find(|i| minima[*i] == least)
            .unwrap_or(0);
        let low = from + chunk * CHUNK;
        let high = (low + CHUNK).min(to).min(self.classes.len());
        let middle = low + (turn >> 16) % (high - low);
        let row = &self.best[level];
        let visited = (middle..high)
            .chain(low..middle)
            .find(|c| costs.bound(*c, row[*c]) == least)
            .unwrap_or(low);
        self.walk(costs, visited, level, many, turn, exact, out);
        for (i, min) in minima[..chunks].iter().enumerate() {
            if min * careful >= threshold(out, many) {
                continue;
            }
            let low = from + i * CHUNK;
            for (c, key) in row[..to].iter().enumerate().skip(low).take(CHUNK) {
                if c != visited && costs.bound(c, *key) * careful < threshold(out, many) {
                    self.walk(costs, c, level, many, turn, exact, out);
                }
            }
        }
    }

    /// Judges the places of one class in the order of their keys, as long as they may beat what was found.
    #[allow(clippy::too_many_arguments)]
    fn walk(
        &self,
        costs: &Costs,
        c: usize,
        level: usize,
        many: usize,
        turn: usize,
        exact: &mut impl FnMut(SlotId) -> Option<u64>,
        out: &mut Vec<Found>,
    ) {
        let class = &self.classes[c];
        let careful = 1.0 - costs.slack;
        let mut ordinal = class.first[level];
        while ordinal != NOWHERE {
            let block = &self.blocks[class.order[ordinal as usize] as usize];
            let mut mask = block.masks[level];
            while mask != 0 {
                let at = mask.trailing_zeros() as usize;
                let key = block.keys[at];
                if costs.bound(c, key) * careful >= threshold(out, many) {
                    return;
                }
                let at = if many == 1 {
                    block.pick(at, level, mask, turn)
                } else {
                    at
                };
                let slot = SlotId(block.slots[at]);
                mask &= !(1 << at);
                if let Some(score) = exact(slot) {
                    let place = out.partition_point(|f| f.score <= score);
                    if place < many {
                        out.insert(place, Found { score, slot });
                        out.truncate(many);
                    }
                }
            }
            ordinal = class.next(level, ordinal as usize + 1);
        }
    }

    /// Every place with at least `level` free in a class, cheapest key first.
    pub fn places(&self, class: ClassId, level: Level) -> impl Iterator<Item = SlotId> + '_ {
        let class = &self.classes[class.0 as usize];
        let level = usize::from(level.0.max(1)) - 1;
        class.order.iter().flat_map(move |block| {
            let block = &self.blocks[*block as usize];
            let mut mask = block.masks[level];
            core::iter::from_fn(move || {
                if mask == 0 {
                    return None;
                }
                let at = mask.trailing_zeros() as usize;
                mask &= mask - 1;
                Some(SlotId(block.slots[at]))
            })
        })
    }

    // Blocks.

    /// The block where `key` belongs, with room for one more.
    fn block_for(&mut self, c: usize, key: f32) -> u32 {
        if self.classes[c].order.is_empty() {
            return self.new_block(c, 0);
        }
        let class = &self.classes[c];
        let after = class
            .order
            .partition_point(|b| self.blocks[*b as usize].keys[0] <= key);
        let ordinal = after.saturating_sub(1);
        let block = class.order[ordinal];
        if usize::from(self.blocks[block as usize].len) < BLOCK {
            return block;
        }
        self.split(c, ordinal);
        let class = &self.classes[c];
        let second = class.order[ordinal + 1];
        if self.blocks[second as usize].keys[0] <= key {
            second
        } else {
            block
        }
    }

    fn new_block(&mut self, c: usize, ordinal: usize) -> u32 {
        let block = Block {
            class: c as u32,
            ordinal: ordinal as u32,
            len: 0,
            masks: [0; LEVELS],
            keys: [0.0; BLOCK],
            slots: [0; BLOCK],
        };
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
        self.rebuild_tops(c, ordinal);
        id
    }

    /// Moves the upper half of a full block into a new one behind it.
    fn split(&mut self, c: usize, ordinal: usize) {
        let first = self.classes[c].order[ordinal];
        let second = self.new_block(c, ordinal + 1);
        let half = BLOCK / 2;
        let old = self.blocks[first as usize].clone();
        let new = &mut self.blocks[second as usize];
        new.keys[..half].copy_from_slice(&old.keys[half..]);
        new.slots[..half].copy_from_slice(&old.slots[half..]);
        for (new, old) in new.masks.iter_mut().zip(&old.masks) {
            *new = old >> half;
        }
        new.len = half as u8;
        let old = &mut self.blocks[first as usize];
        old.len = half as u8;
        for mask in &mut old.masks {
            *mask &= (1 << half) - 1;
        }
        self.renumber(second, 0);
        self.rebuild_tops(c, ordinal);
    }

    fn drop_block(&mut self, c: usize, block: u32) {
        let ordinal = self.blocks[block as usize].ordinal as usize;
        self.classes[c].order.remove(ordinal);
        self.blocks_spare.push(block);
        self.rebuild_tops(c, ordinal);
    }

    /// Tells the places of a block from `at` on where they are.
    fn renumber(&mut self, block: u32, at: usize) {
        let b = &self.blocks[block as usize];
        for i in at..usize::from(b.len) {
            let slot = &mut self.slots[b.slots[i] as usize];
            slot.block = block;
            slot.at = i as u8;
        }
    }

    /// Numbers the blocks of a class anew from `ordinal` on, and writes its bits from nothing: only when a block
    /// comes or goes, which is once in some thirty changes.
    fn rebuild_tops(&mut self, c: usize, ordinal: usize) {
        let class = &mut self.classes[c];
        let blocks = &mut self.blocks;
        for (i, block) in class.order.iter().enumerate().skip(ordinal) {
            blocks[*block as usize].ordinal = i as u32;
        }
        class.words = class.order.len().div_ceil(64);
        class.tops.clear();
        class.tops.resize(LEVELS * class.words, 0);
        for (i, block) in class.order.iter().enumerate() {
            for (l, mask) in blocks[*block as usize].masks.iter().enumerate() {
                if *mask != 0 {
                    class.tops[l * class.words + i / 64] |= 1 << (i % 64);
                }
            }
        }
        for l in 0..LEVELS {
            class.first[l] = class.next(l, 0);
        }
        self.refresh_all(c);
    }

    fn refresh_all(&mut self, c: usize) {
        for l in 0..LEVELS {
            self.refresh(c, l);
        }
    }

    fn refresh(&mut self, c: usize, l: usize) {
        let class = &self.classes[c];
        self.best[l][c] = match class.first[l] {
            NOWHERE => f32::INFINITY,
            ordinal => {
                let block = &self.blocks[class.order[ordinal as usize] as usize];
                block.keys[block.masks[l].trailing_zeros() as usize % BLOCK]
            }
        };
    }
}

impl Class {
    /// The first block from `from` on with a place of level `l + 1`.
    fn next(&self, l: usize, from: usize) -> u32 {
        let row = &self.tops[l * self.words..(l + 1) * self.words];
        let mut word = from / 64;
        let mut keep = u64::MAX << (from % 64);
        while let Some(bits) = row.get(word) {
            let bits = bits & keep;
            if bits != 0 {
                return (word * 64) as u32 + bits.trailing_zeros();
            }
            keep = u64::MAX;
            word += 1;
        }
        NOWHERE
    }
}

impl Block {
    /// Of the places in `mask` with the same key as the first one, `at`: one of those with the most free, by turn.
    fn pick(&self, at: usize, level: usize, mask: u64, turn: usize) -> usize {
        let rest = mask & (mask - 1);
        if rest == 0 || self.keys[rest.trailing_zeros() as usize] != self.keys[at] {
            return at;
        }
        let end = at + self.keys[at..usize::from(self.len)].partition_point(|k| *k == self.keys[at]);
        let below = if end == BLOCK { u64::MAX } else { (1 << end) - 1 };
        let equals = mask & below;
        let fullest = self.masks[level..]
            .iter()
            .rev()
            .map(|m| m & equals)
            .find(|m| *m != 0)
            .unwrap_or(equals);
        let mut wanted = turn % fullest.count_ones() as usize;
        let mut left = fullest;
        while wanted > 0 {
            left &= left - 1;
            wanted -= 1;
        }
        left.trailing_zeros() as usize
    }
}

/// What a bound must lie under to be worth a look.
fn threshold(out: &[Found], many: usize) -> f32 {
    if out.len() < many {
        return f32::INFINITY;
    }
    out.last().map_or(f32::INFINITY, |f| f.score as f32)
}

/// The least `key + base`. Written so that the compiler makes vectors of it: no branch, four lanes by four.
fn least_sum(keys: &[f32], base: &[f32]) -> f32 {
    let mut least = [f32::INFINITY; LANES];
    for (k, b) in keys.chunks_exact(LANES).zip(base.chunks_exact(LANES)) {
        for i in 0..LANES {
            let sum = k[i] + b[i];
            least[i] = if sum < least[i] { sum } else { least[i] };
        }
    }
    least.iter().copied().fold(f32::INFINITY, f32::min)
}

/// The least `weight × key + base`.
fn least_weighted(keys: &[f32], base: &[f32], weight: &[f32]) -> f32 {
    let mut least = [f32::INFINITY; LANES];
    let keys = keys.chunks_exact(LANES);
    for ((k, b), w) in keys.zip(base.chunks_exact(LANES)).zip(weight.chunks_exact(LANES)) {
        for i in 0..LANES {
            let sum = k[i] * w[i] + b[i];
            least[i] = if sum < least[i] { sum } else { least[i] };
        }
    }
    least.iter().copied().fold(f32::INFINITY, f32::min)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_request_is_never_above_a_place_that_holds_it() {
        for need in (0..9_000).step_by(7) {
            for free in (need..9_000).step_by(13) {
                assert!(Level::of_milli(need) <= Level::of_milli(free), "{need} of {free}");
            }
        }
        assert_eq!(Level::of_devices(0), Level::NONE);
        assert!(Level::of_milli(999) < Level::of_devices(1));
    }

    /// What the index stands for, written down plainly.
    #[derive(Debug, Clone)]
    struct Plain {
        slot: SlotId,
        class: usize,
        key: u32,
        milli: u32,
    }

    fn check(index: &Index, plain: &[Plain], costs: &[f32], milli: u32, barred: u32) {
        let view = Costs::exact(costs.to_vec());
        let judge = |p: &Plain| {
            (p.milli >= milli && p.slot.0 % 7 != barred && costs[p.class] < f32::INFINITY)
                .then(|| u64::from(p.key) + costs[p.class] as u64)
        };
        let mut expected: Vec<u64> = plain.iter().filter_map(judge).collect();
        expected.sort_unstable();
        for many in [1, 3] {
            let mut found = Vec::new();
            index.cheapest(
                &view,
                Level::of_milli(milli),
                many,
                milli,
                |slot| plain.iter().find(|p| p.slot == slot).and_then(judge),
                &mut found,
            );
            let got: Vec<u64> = found.iter().map(|f| f.score).collect();
            assert_eq!(got, expected[..expected.len().min(many)], "{many} of {milli}");
            for f in found {
                let place = plain.iter().find(|p| p.slot == f.slot).unwrap();
                assert_eq!(judge(place), Some(f.score));
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if std::env::var_os("KAREZ_LONG").is_some() { 5_000 } else { 200 }))]

        /// Whatever comes, goes and changes, the index answers as a look at every place would.
        #[test]
        fn the_cheapest_is_that_of_a_full_scan(
            steps in proptest::collection::vec((0..6u8, any::<u32>(), 0..40u32, 0..9_000u32), 1..400),
            classes in 1..40usize,
        ) {
            let mut index = Index::default();
            for _ in 0..classes {
                index.add_class();
            }
            let mut plain: Vec<Plain> = Vec::new();
            for (step, (what, chance, key, milli)) in steps.into_iter().enumerate() {
                let at = chance as usize % plain.len().max(1);
                match what {
                    0..=2 => {
                        let class = chance as usize % classes;
                        let slot = index.insert(ClassId(class as u32), key as f32, Level::of_milli(milli));
                        plain.push(Plain { slot, class, key, milli });
                    }
                    3 if !plain.is_empty() => index.remove(plain.swap_remove(at).slot),
                    4 if !plain.is_empty() => {
                        plain[at].milli = milli;
                        index.set_level(plain[at].slot, Level::of_milli(milli));
                    }
                    _ => {
                        let costs: Vec<f32> = (0..classes)
                            .map(|c| match (chance as usize + c * 31) % 5 {
                                0 => f32::INFINITY,
                                n => (n * 3) as f32,
                            })
                            .collect();
                        check(&index, &plain, &costs, milli.max(1), step as u32 % 9);
                    }
                }
            }
            check(&index, &plain, &vec![0.0; classes], 1, 8);
            let open = plain.iter().filter(|p| p.milli > 0).count();
            let counted: u32 = (0..classes).map(|c| index.count(ClassId(c as u32)).1).sum();
            prop_assert_eq!(open, counted as usize);
        }
    }

    #[test]
    fn a_large_class_keeps_its_order_through_many_changes() {
        let mut index = Index::default();
        let class = index.add_class();
        let mut plain = Vec::new();
        let mut chance = 1u64;
        for i in 0..5_000u32 {
            chance = chance
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let key = (chance >> 33) as u32 % 1_000;
            let milli = i % 3 * 1_000;
            let slot = index.insert(class, key as f32, Level::of_milli(milli));
            plain.push(Plain {
                slot,
                class: 0,
                key,
                milli,
            });
        }
        check(&index, &plain, &[5.0], 2_000, 3);
        while plain.len() > 10 {
            chance = chance
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let at = (chance >> 33) as usize % plain.len();
            index.remove(plain.swap_remove(at).slot);
        }
        check(&index, &plain, &[5.0], 1_000, 3);
        assert!(index.bytes() / 5_000 < 100);
    }

    #[test]
    fn equals_are_not_herded() {
        let mut index = Index::default();
        for _ in 0..4 {
            let class = index.add_class();
            for _ in 0..4 {
                index.insert(class, 7.0, Level::of_devices(1));
            }
        }
        let costs = Costs::exact(vec![0.0; 4]);
        let chosen: BTreeSet<SlotId> = (0..1_000u32)
            .map(|turn| {
                let mut out = Vec::new();
                index.cheapest(
                    &costs,
                    Level::of_devices(1),
                    1,
                    turn.wrapping_mul(2_654_435_761),
                    |_| Some(7),
                    &mut out,
                );
                out[0].slot
            })
            .collect();
        assert_eq!(chosen.len(), 16);
    }
}
