//! What is due, in order of time; what was planned first comes first at equal times.
use super::Due;
use std::{
    cmp::{Ordering, Reverse},
    collections::BinaryHeap,
};

/// Due events. A heap: both ends of it stay in few cache lines however many million wait.
#[derive(Default)]
pub(super) struct Queue {
    heap: BinaryHeap<Reverse<Planned>>,
    serial: u64,
}

struct Planned {
    at: u64,
    serial: u64,
    due: Due,
}

impl PartialEq for Planned {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.serial) == (other.at, other.serial)
    }
}
impl Eq for Planned {}
impl PartialOrd for Planned {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Planned {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.at, self.serial).cmp(&(other.at, other.serial))
    }
}

impl Queue {
    pub(super) fn push(&mut self, at: u64, due: Due) {
        self.serial += 1;
        let serial = self.serial;
        self.heap.push(Reverse(Planned { at, serial, due }));
    }

    pub(super) fn pop(&mut self) -> Option<(u64, Due)> {
        self.heap.pop().map(|Reverse(planned)| (planned.at, planned.due))
    }

    /// The next, unless it is due after `until`.
    pub(super) fn pop_until(&mut self, until: u64) -> Option<(u64, Due)> {
        let due = self.heap.peek().is_some_and(|Reverse(next)| next.at <= until);
        if due { self.pop() } else { None }
    }

    pub(super) fn len(&self) -> usize {
        self.heap.len()
    }
}
