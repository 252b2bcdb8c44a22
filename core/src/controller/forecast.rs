//! What is likely to come: how much of each kind of work came lately, so that the slow path keeps scarce capacity for
//! more than what waits already.
//!
//! A sliding window in integers: what came in the present one, and of the one before it as much as the present one has
//! not replaced yet. As much is expected within the next.
use super::guide::shape_of;
use crate::{
    id::Digest,
    prelude::*,
    records::{Order, Work},
    unit::{Credits, Millis, MonoMillis},
};

/// How far the slow path looks ahead: about as long as a part takes, so that what is held now and will be free by then
/// counts as well.
pub(super) const WINDOW: Millis = Millis(300_000);
/// The most kinds of work that are told apart; of others nothing is expected.
const KINDS_MAX: usize = 700;

/// One kind of work, by an order that stands for all.
#[derive(Debug, Clone)]
pub(super) struct Kind {
    pub(super) order: Order,
    /// Of its first part.
    pub(super) items: u64,
    pub(super) ceiling: Credits,
    window: u64,
    before: u64,
    present: u64,
}

impl Kind {
    /// What came in the window before that one, and in that one.
    fn seen_in(&self, window: u64) -> (u64, u64) {
        match window.saturating_sub(self.window) {
            0 => (self.before, self.present),
            1 => (self.present, 0),
            _ => (0, 0),
        }
    }

    /// Parts to expect within a window from now on.
    fn expected(&self, now: MonoMillis) -> u64 {
        let (before, present) = self.seen_in(now.0 / WINDOW.0);
        let left = WINDOW.0 - now.0 % WINDOW.0;
        let before = u128::from(before) * u128::from(left) / u128::from(WINDOW.0);
        present.saturating_add(before as u64)
    }
}

/// See the module's note.
#[derive(Debug, Default)]
pub(super) struct Forecast(BTreeMap<Digest, Kind>);

impl Forecast {
    /// So many parts of an order came, the first with so many items and that ceiling.
    pub(super) fn note(&mut self, now: MonoMillis, order: &Order, parts: u64, items: u64, ceiling: Credits) {
        let window = now.0 / WINDOW.0;
        let shape = shape_of(order, true);
        if !self.0.contains_key(&shape) && self.0.len() >= KINDS_MAX {
            self.0.retain(|_, kind| kind.window + 1 >= window);
            if self.0.len() >= KINDS_MAX {
                return;
            }
        }
        let kind = self.0.entry(shape).or_insert_with(|| Kind {
            order: bare(order),
            items,
            ceiling,
            window,
            before: 0,
            present: 0,
        });
        let (before, present) = kind.seen_in(window);
        (kind.window, kind.before, kind.present) = (window, before, present.saturating_add(parts));
    }

    /// The kinds of which any is expected, and how many parts.
    pub(super) fn expected(&self, now: MonoMillis) -> impl Iterator<Item = (&Kind, u64)> {
        let all = self.0.values().map(move |kind| (kind, kind.expected(now)));
        all.filter(|(_, parts)| *parts > 0)
    }
}

/// The order without its texts: they say nothing of where it may run.
fn bare(order: &Order) -> Order {
    let mut order = order.clone();
    match &mut order.work {
        Work::Generate(g) => {
            g.system.clear();
            g.response_format.clear();
            g.stop.clear();
        }
        Work::Train(t) => t.settings.clear(),
        Work::Noop { .. } | Work::Embed { .. } => {}
    }
    order
}
