//! Devices of one machine that are held, whole ones and shares, counted by the judge's own rules.
use karez_core::unit::{Portion, WHOLE};
use std::collections::BTreeMap;

/// What is held of each class.
#[derive(Debug, Clone, Default)]
pub(super) struct Held {
    whole: BTreeMap<String, u32>,
    /// By class and by the device that is shared: thousandths.
    shares: BTreeMap<(String, u32), u32>,
}

impl Held {
    /// Holds more. Gives how many devices of that class are held now, and how much of the shared one.
    pub(super) fn add(&mut self, class: &str, portion: Portion, slot: u32) -> (u32, u32) {
        let mut of_one = WHOLE;
        if portion.is_share() {
            let held = self.shares.entry((class.to_owned(), slot)).or_default();
            *held += portion.milli();
            of_one = *held;
        } else {
            *self.whole.entry(class.to_owned()).or_default() += portion.count();
        }
        (self.of(class), of_one)
    }

    /// Holds less.
    pub(super) fn remove(&mut self, class: &str, portion: Portion, slot: u32) {
        if portion.is_share() {
            let key = (class.to_owned(), slot);
            let left = self
                .shares
                .get(&key)
                .map_or(0, |held| held.saturating_sub(portion.milli()));
            match left {
                0 => drop(self.shares.remove(&key)),
                left => drop(self.shares.insert(key, left)),
            }
        } else if let Some(held) = self.whole.get_mut(class) {
            *held = held.saturating_sub(portion.count());
        }
    }

    /// Nothing is held any more.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Devices of a class.
    fn of(&self, class: &str) -> u32 {
        let shared = self.shares.keys().filter(|(of, _)| of == class).count() as u32;
        self.whole.get(class).copied().unwrap_or(0) + shared
    }

    /// Devices of all classes.
    pub(super) fn all(&self) -> u32 {
        self.whole.values().sum::<u32>() + self.shares.len() as u32
    }
}
