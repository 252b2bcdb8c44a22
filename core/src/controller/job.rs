//! Jobs and their parts, as they are believed and stored.
use super::{deadline::Takes, view::LogLine};
use crate::{
    artifact::ArtifactRef,
    id::{Fence, JobId, LeaseKey, PartIndex, RecordId},
    key::NodeId,
    placement::Plan,
    prelude::*,
    records::{Meters, Order, PARTS_MAX, Verified, Work},
    unit::{Bytes, Credits, Millis, MonoMillis, UtcMillis},
};
use serde::{Deserialize, Serialize};

pub(super) const JOBS: &str = "jobs";
pub(super) const PARTS: &str = "parts";

/// The most lines of history one job keeps; the first and the latest stay.
const LOG_MAX: usize = 200;

/// Where a job or a part stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum JobState {
    /// Waiting for a node.
    Queued,
    /// A node was chosen and asked.
    Placed,
    /// The node fetches what it needs.
    Fetching,
    /// The worker works.
    Running,
    /// Finished, with results.
    Done,
    /// Given up.
    Failed,
    /// Called off.
    Cancelled,
}

impl JobState {
    /// The wire name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Placed => "placed",
            Self::Fetching => "fetching",
            Self::Running => "running",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// Nothing will change it any more.
    pub fn ended(self) -> bool {
        matches!(self, Self::Done | Self::Failed | Self::Cancelled)
    }
}

/// The same seven words serve jobs and parts.
pub type PartState = JobState;

/// One job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// Which: the id of its order.
    pub id: JobId,
    /// Its order.
    pub order: Verified<Order>,
    /// What the user calls it.
    pub label: String,
    /// When it was accepted.
    pub submitted_at: UtcMillis,
    /// When its state last changed.
    pub changed_at: UtcMillis,
    /// Where it stands.
    pub state: JobState,
    /// Why.
    pub cause: String,
    /// Set aside for it at submit.
    pub reserved: Credits,
    /// The grant that pays first, and how much of what was set aside is its.
    #[serde(default)]
    pub grant: Option<(RecordId, Credits)>,
    /// Billed so far.
    pub spent: Credits,
    /// Its history, bounded.
    pub log: Vec<LogLine>,
    /// Stored row by row, beside the job.
    #[serde(skip)]
    pub parts: Vec<Part>,
    /// How long its largest part is expected to take; unknown until somewhere could run it.
    #[serde(skip)]
    pub(super) takes: Option<Takes>,
}

/// Bytes of the model that speeds of training are told for.
const TRAIN_REFERENCE: u128 = 220_000_000;
/// Bytes of the model that speeds of generation are told for: 1.1 billion numbers in Q4_0. Every token reads the whole
/// model from memory.
const GENERATE_REFERENCE: u128 = 620_000_000;
/// Bytes of the model that speeds of embedding are told for: all-MiniLM-L6-v2.
const EMBED_REFERENCE: u128 = 91_000_000;
/// A part should take so long on the machine that is expected to do it: what is lost with a machine stays small, and
/// faster machines find parts left to take.
const PART_MILLIS: u64 = 5 * 60_000;
/// Parts of fewer items cost more than they bring.
const PART_ITEMS_MIN: u64 = 16;

/// One part of a job: the unit that is placed, leased and billed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// First item.
    pub first_item: u64,
    /// Items.
    pub items: u64,
    /// What it may cost at most; the parts' ceilings sum to at most the job's.
    pub ceiling: Credits,
    /// Where it stands.
    pub state: PartState,
    /// Why.
    pub cause: String,
    /// When its state last changed.
    pub changed_at: UtcMillis,
    /// The latest attempt; 0 before the first.
    pub fence: Fence,
    /// The latest attempt that was settled.
    pub settled: Fence,
    /// Attempts that failed or vanished. Refusals and announced reclaims do not count.
    pub failures: u32,
    /// Nodes that failed at it; tried again only when no other is left.
    pub avoid: Vec<NodeId>,
    /// Where the latest attempt was placed, and what else there was.
    pub plan: Option<Plan>,
    /// When the latest ask went out.
    pub asked_at: UtcMillis,
    /// What the attempt that counts used.
    pub meters: Meters,
    /// What was billed.
    pub credits: Credits,
    /// Its result.
    pub result: Option<ArtifactRef>,
    /// Its receipt.
    pub receipt: Option<RecordId>,
    /// What an attempt left behind when its owner took the machine back: the next one goes on from there.
    #[serde(default)]
    pub left: Option<ArtifactRef>,
    /// Items finished so far.
    #[serde(skip)]
    pub items_done: u64,
    /// Tokens read and written so far.
    #[serde(skip)]
    pub tokens: u64,
    /// Loss of its latest training step, in millionths of a nat.
    #[serde(skip)]
    pub loss_micro: u64,
    /// How often it was moved from one place to another.
    #[serde(skip)]
    pub(super) moves: u32,
    /// Not to be placed before.
    #[serde(skip)]
    pub(super) not_before: MonoMillis,
}

impl Part {
    pub(super) fn in_flight(&self) -> bool {
        matches!(
            self.state,
            JobState::Placed | JobState::Fetching | JobState::Running
        )
    }
}

impl Job {
    /// Cuts an order into parts. `slots` is how many parts could run at once now, and `takes` how long the whole work would take
    /// on a middling one of them, where that is known.
    pub(super) fn new(
        order: Verified<Order>,
        label: String,
        at: UtcMillis,
        slots: u64,
        takes: Option<Millis>,
    ) -> Self {
        let items = order.items;
        let per_part = match u64::from(order.items_per_part) {
            // Two parts for each slot let a faster node take more.
            0 => {
                let by_time = takes.map_or(1, |takes| takes.0.div_ceil(PART_MILLIS));
                items
                    .div_ceil((slots * 2).max(by_time).clamp(1, PARTS_MAX))
                    .max(items.min(PART_ITEMS_MIN))
                    .max(items.div_ceil(PARTS_MAX))
            }
            wanted => wanted,
        };
        let count = items.div_ceil(per_part);
        let parts = (0..count)
            .map(|i| {
                let first_item = i * per_part;
                let part_items = per_part.min(items - first_item);
                // Rounded down, so that all of them fit under the job's ceiling.
                let ceiling = u128::from(order.credits_max.0) * u128::from(part_items) / u128::from(items);
                Part {
                    first_item,
                    items: part_items,
                    ceiling: Credits(u64::try_from(ceiling).unwrap_or(u64::MAX)),
                    state: JobState::Queued,
                    cause: match i {
                        1.. if order.work.in_sequence() => "waits for the part before it".into(),
                        _ => String::new(),
                    },
                    changed_at: at,
                    fence: 0,
                    settled: 0,
                    failures: 0,
                    avoid: Vec::new(),
                    plan: None,
                    asked_at: at,
                    meters: Meters::default(),
                    credits: Credits::ZERO,
                    result: None,
                    receipt: None,
                    left: None,
                    items_done: 0,
                    tokens: 0,
                    loss_micro: 0,
                    moves: 0,
                    not_before: MonoMillis::ZERO,
                }
            })
            .collect();
        Self {
            id: JobId(order.id()),
            reserved: order.credits_max,
            order,
            label,
            submitted_at: at,
            changed_at: at,
            state: JobState::Queued,
            cause: String::new(),
            grant: None,
            spent: Credits::ZERO,
            log: Vec::new(),
            parts,
            takes: None,
        }
    }

    /// Whether a part may be placed: of work in sequence, only the one after those that are done.
    pub(super) fn is_next(&self, part: PartIndex) -> bool {
        let before = part
            .checked_sub(1)
            .and_then(|before| self.parts.get(before as usize));
        !self.order.work.in_sequence() || before.is_none_or(|before| before.state == JobState::Done)
    }

    /// The state that a part of work in sequence begins with: what its last attempt left, or the part before it.
    pub(super) fn state_for(&self, part: PartIndex) -> Option<ArtifactRef> {
        if !self.order.work.in_sequence() {
            return None;
        }
        let left = self.parts.get(part as usize).and_then(|part| part.left);
        let before = part
            .checked_sub(1)
            .and_then(|before| self.parts.get(before as usize));
        left.or_else(|| before.and_then(|before| before.result))
    }

    pub(super) fn key(&self, part: PartIndex) -> LeaseKey {
        LeaseKey {
            job: self.id,
            part,
            fence: self.parts.get(part as usize).map_or(0, |p| p.fence),
        }
    }

    /// Adds a line to the history; in the middle, old lines make room.
    pub(super) fn note(&mut self, at: UtcMillis, part: Option<PartIndex>, text: String) {
        if self.log.len() >= LOG_MAX {
            self.log.remove(LOG_MAX / 4);
        }
        self.log.push(LogLine { at, part, text });
    }

    /// The state that follows from the parts: the most advanced of those still open, or how they ended.
    pub(super) fn state_of_parts(&self) -> JobState {
        let open = self.parts.iter().map(|p| p.state).filter(|s| !s.ended()).max();
        match open {
            Some(state) => state,
            None if self.parts.iter().any(|p| p.state == JobState::Failed) => JobState::Failed,
            None if self.parts.iter().any(|p| p.state == JobState::Cancelled) => JobState::Cancelled,
            None => JobState::Done,
        }
    }

    /// Work units and fixed time of `items` of this order, and the memory its worker needs: estimates for placement.
    pub(super) fn work_of(order: &Order, items: u64) -> (u64, Millis, Bytes) {
        // Four bytes of text make about a token in most scripts and tokenisers.
        let share = u128::from(order.input.bytes.0) * u128::from(items) / u128::from(order.items.max(1));
        let tokens = u64::try_from(share / 4).unwrap_or(u64::MAX).max(items);
        let memory = |model: &ArtifactRef| match model.is_content() {
            // It is in the provider's server already.
            false => Bytes::ZERO,
            true => Bytes(
                model
                    .bytes
                    .0
                    .saturating_add(model.bytes.0 / 4)
                    .saturating_add(64 << 20),
            ),
        };
        match &order.work {
            Work::Noop { millis_per_item } => (
                items,
                Millis(items.saturating_mul(u64::from(*millis_per_item))),
                Bytes::ZERO,
            ),
            Work::Embed { model, .. } => (work_units(&order.work, tokens), Millis::ZERO, memory(model)),
            Work::Train(t) => {
                let tokens = items.saturating_mul(t.tokens_per_step.into());
                let units = work_units(&order.work, tokens).max(items);
                // Matrices held as f32 take twice a 16-bit file; activations come on top.
                let memory = t.model.bytes.0.saturating_mul(2).saturating_add(256 << 20);
                (units, Millis::ZERO, Bytes(memory))
            }
            Work::Generate(g) => {
                let tokens = tokens.saturating_add(items.saturating_mul(g.max_tokens.into()));
                (work_units(&order.work, tokens), Millis::ZERO, memory(&g.model))
            }
        }
    }
}

/// How many tokens of the reference model so many of the order's own are worth, at least one: a larger model counts as
/// many more as it has bytes. What a server of the provider's computes is told in its own tokens.
pub fn work_units(work: &Work, tokens: u64) -> u64 {
    let reference = match work {
        Work::Noop { .. } => return tokens,
        Work::Embed { .. } => EMBED_REFERENCE,
        Work::Generate(_) => GENERATE_REFERENCE,
        Work::Train(_) => TRAIN_REFERENCE,
    };
    match work.model() {
        Some(model) if model.is_content() => {
            let units = u128::from(tokens) * u128::from(model.bytes.0) / reference;
            u64::try_from(units).unwrap_or(u64::MAX).max(1)
        }
        _ => tokens,
    }
}

pub(super) fn part_row(job: JobId, part: PartIndex) -> Vec<u8> {
    let mut out = job.0.0.to_vec();
    out.extend_from_slice(&part.to_be_bytes());
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        artifact::ArtifactKind,
        id::Digest,
        records::{Generate, WorkKind},
    };

    #[test]
    fn a_token_counts_as_its_model_is_large() {
        let model = |bytes| ArtifactRef {
            digest: Digest::of(b"model"),
            bytes: Bytes(bytes),
            kind: ArtifactKind::Blob,
        };
        let write = |bytes| Work::Generate(Generate::greedy(model(bytes), "m", 10));
        assert_eq!(work_units(&write(620_000_000), 1_000), 1_000);
        assert_eq!(work_units(&write(6_200_000_000), 1_000), 10_000);
        assert_eq!(work_units(&write(3_100_000), 1_000), 5);
        assert_eq!(work_units(&write(3_100_000), 10), 1);
        let embed = Work::Embed {
            model: model(182_000_000),
            model_name: "m".into(),
        };
        assert_eq!((embed.kind(), work_units(&embed, 10)), (WorkKind::Embed, 20));
        assert_eq!(work_units(&Work::Noop { millis_per_item: 1 }, 7), 7);
    }
}
