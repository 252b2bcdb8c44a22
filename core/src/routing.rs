//! Where a question goes when several nodes could answer it: to one that has read its beginning before, if that is worth it.
//!
//! A prompt is known by its [`Prefix`]: a chain of hashes, one for each block of its text, so that two prompts share as
//! many hashes as they share blocks at their beginning. Nodes tell the prefixes that their workers' caches still hold and
//! the models they keep loaded ([`Heat`]). Prompt work that need not be done again makes a node cheaper, a model that must
//! be loaded first makes it dearer ([`choose`]); a busy node is waited for only while waiting costs less than it saves, and
//! the older a question is the less it waits, so that nobody starves.
//!
//! Not here: what nodes cost otherwise ([`crate::placement`]), who is next ([`crate::fair`]).
use crate::{
    artifact::ArtifactRef,
    id::Digest,
    key::NodeId,
    market::Market,
    placement::{self, Candidate, Plan, Request},
    prelude::*,
    unit::{Credits, Millis, MonoMillis},
};
use alloc::collections::VecDeque;

/// Bytes of one block of a prompt.
pub const BLOCK_BYTES: usize = 256;
/// Blocks of one prompt that are looked at: what lies beyond is as unknown as a new prompt.
pub const BLOCKS_MAX: usize = 64;
/// Hashes one node tells at most.
pub const PREFIXES_MAX: usize = 1024;
/// Models one node tells at most.
pub const MODELS_MAX: usize = 16;
/// What a node has not repeated for so long is not believed any more.
pub const HEAT_TTL: Millis = Millis(30_000);
/// The longest a question waits for a busy node.
const WAIT_MAX: Millis = Millis(2_000);
/// Bytes of text that make a token, in most scripts and tokenisers.
const TOKEN_BYTES: u64 = 4;
/// Bytes of a model that are loaded in a millisecond.
const LOAD_BYTES_PER_MS: u64 = 500_000;
/// Nodes with the model warm that are looked at for one question, besides the cheapest ones.
const WARM_MAX: usize = 64;

/// The beginning of a prompt, block by block: hash `i` stands for all text up to the end of block `i`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Prefix(Vec<u64>);

impl Prefix {
    /// Of a text, for a model with what goes over it: an adapter reads a prompt otherwise. The last block counts only when it
    /// is full.
    pub fn of(model: &Digest, adapter: Option<&Digest>, text: &str) -> Self {
        let mut before = match adapter {
            None => model.0,
            Some(adapter) => *blake3::hash(&[model.0, adapter.0].concat()).as_bytes(),
        };
        let blocks = text.as_bytes().chunks_exact(BLOCK_BYTES).take(BLOCKS_MAX);
        let hashes = blocks.map(|block| {
            let mut hasher = blake3::Hasher::new();
            hasher.update(&before).update(block);
            before = *hasher.finalize().as_bytes();
            let [a, b, c, d, e, f, g, h, ..] = before;
            u64::from_le_bytes([a, b, c, d, e, f, g, h])
        });
        Self(hashes.collect())
    }

    /// The hashes, first block first.
    pub fn hashes(&self) -> &[u64] {
        &self.0
    }

    /// Too short to be told from another.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Who says what stands in a prompt of the tools that a model may call: templates put them first.
pub const TOOLS: &str = "tools";

/// A prompt as one text, the same on schedulers and nodes: the tools as compact JSON, said by [`TOOLS`], where there are
/// any; then who says what, in order. Only its beginning is looked at.
pub fn text_of<'a>(turns: impl Iterator<Item = (&'a str, &'a str)>) -> String {
    let mut text = String::new();
    for (role, said) in turns {
        if text.len() > BLOCK_BYTES * BLOCKS_MAX {
            break;
        }
        text.push_str(role);
        text.push('\u{1}');
        text.push_str(said);
        text.push('\u{2}');
    }
    text
}

/// What a node said it keeps warm.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Warmth {
    /// Models that are loaded, by digest; at most [`MODELS_MAX`].
    pub models: Vec<Digest>,
    /// Hashes of the prompts that its caches hold; at most [`PREFIXES_MAX`].
    pub prefixes: Vec<u64>,
}

/// What a scheduler believes of that.
#[derive(Debug, Clone, Default)]
pub struct Heat {
    told_at: Option<MonoMillis>,
    models: BTreeSet<Digest>,
    prefixes: BTreeSet<u64>,
    /// Sent there since it last told: will be warm by the time the next question comes.
    expected: VecDeque<u64>,
}

impl Heat {
    /// The node told what it keeps warm.
    pub fn tell(&mut self, now: MonoMillis, warmth: &Warmth) {
        self.told_at = Some(now);
        self.models = warmth.models.iter().take(MODELS_MAX).copied().collect();
        self.prefixes = warmth.prefixes.iter().take(PREFIXES_MAX).copied().collect();
        // Younger than what was told: it may not be in there yet. Old ones make room.
        let spare = self.expected.len().saturating_sub(PREFIXES_MAX / 4);
        self.expected.drain(..spare);
    }

    /// A question was sent there.
    pub fn expect(&mut self, model: Digest, prefix: &Prefix) {
        if self.models.len() < MODELS_MAX {
            self.models.insert(model);
        }
        for hash in &prefix.0 {
            if !self.expected.contains(hash) {
                self.expected.push_back(*hash);
            }
        }
        let spare = self.expected.len().saturating_sub(PREFIXES_MAX);
        self.expected.drain(..spare);
    }

    /// It told lately: what follows is knowledge, and else a guess.
    pub fn is_fresh(&self, now: MonoMillis) -> bool {
        self.told_at.is_some_and(|at| now.since(at) <= HEAT_TTL)
    }

    /// The model is loaded there.
    pub fn has_model(&self, model: &Digest) -> bool {
        self.models.contains(model)
    }

    /// Blocks of the prompt that need not be read again there.
    pub fn shared(&self, prefix: &Prefix) -> usize {
        let known = |hash: &&u64| self.prefixes.contains(*hash) || self.expected.contains(*hash);
        prefix.0.iter().take_while(known).count()
    }
}

/// What is believed of all nodes.
#[derive(Debug, Clone, Default)]
pub struct Hearth {
    heats: BTreeMap<NodeId, Heat>,
    by_model: BTreeMap<Digest, BTreeSet<NodeId>>,
}

impl Hearth {
    /// A node told what it keeps warm.
    pub fn tell(&mut self, node: NodeId, now: MonoMillis, warmth: &Warmth) {
        self.change(node, |heat| heat.tell(now, warmth));
    }

    /// A question was sent to a node.
    pub fn expect(&mut self, node: NodeId, model: Digest, prefix: &Prefix) {
        self.change(node, |heat| heat.expect(model, prefix));
    }

    /// A node is gone.
    pub fn forget(&mut self, node: &NodeId) {
        self.change(*node, |heat| *heat = Heat::default());
        self.heats.remove(node);
    }

    /// What is believed of one node.
    pub fn of(&self, node: &NodeId) -> Option<&Heat> {
        self.heats.get(node)
    }

    /// Nodes that keep a model loaded.
    pub fn holding(&self, model: &Digest) -> impl Iterator<Item = NodeId> + '_ {
        self.by_model.get(model).into_iter().flatten().copied()
    }

    fn change(&mut self, node: NodeId, change: impl FnOnce(&mut Heat)) {
        let heat = self.heats.entry(node).or_default();
        let before = heat.models.clone();
        change(heat);
        for gone in before.difference(&heat.models) {
            if let Some(nodes) = self.by_model.get_mut(gone) {
                nodes.remove(&node);
                if nodes.is_empty() {
                    self.by_model.remove(gone);
                }
            }
        }
        for new in heat.models.difference(&before) {
            self.by_model.entry(*new).or_default().insert(node);
        }
    }
}

/// A node that could answer, as placement judged it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seat {
    /// Expected cost there, by placement's own reckoning, with nothing warm.
    pub score: Credits,
    /// Expected time there, with nothing warm and the model loaded.
    pub duration: Millis,
    /// Work units of the whole question: tokens to read and to write.
    pub units: u64,
    /// Blocks of the prompt that its cache holds.
    pub shared: usize,
    /// Bytes of the model that must be loaded first; 0 when it is loaded.
    pub to_load: u64,
    /// All its devices are held now.
    pub busy: bool,
}

impl Seat {
    /// How long it would really take.
    fn takes(&self) -> Millis {
        let known = (self.shared * BLOCK_BYTES) as u64 / TOKEN_BYTES;
        let saved =
            u128::from(self.duration.0) * u128::from(known.min(self.units)) / u128::from(self.units.max(1));
        let saved = u64::try_from(saved).unwrap_or(u64::MAX);
        let load = self.to_load / LOAD_BYTES_PER_MS;
        Millis(self.duration.0.saturating_sub(saved).saturating_add(load).max(1))
    }

    /// What it would really cost: as much more or less as it takes longer or shorter.
    fn costs(&self) -> u128 {
        u128::from(self.score.0.max(1)) * u128::from(self.takes().0) * 1_000
            / u128::from(self.duration.0.max(1))
    }
}

/// What to do with a question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// Send it to that seat.
    Go(usize),
    /// A busy seat is worth waiting for, this long at most.
    Wait(Millis),
}

/// Chooses among seats, the cheapest by placement first; `age` is how long the question has waited already. `None` when
/// none is free and none is worth waiting for.
///
/// Equal costs go to the earlier seat. Waiting ends when the question is as old as half of what the busy seat would save,
/// or two seconds: from then on the best free seat will do.
pub fn choose(seats: &[Seat], age: Millis) -> Option<Choice> {
    let best = |busy: bool| {
        let able = seats
            .iter()
            .enumerate()
            .filter(move |(_, seat)| seat.busy == busy);
        able.min_by_key(|(i, seat)| (seat.costs(), *i))
    };
    let (free, at) = match best(false) {
        Some((i, seat)) => (seat, i),
        None => return None,
    };
    if let Some((_, busy)) = best(true)
        && busy.costs() < free.costs()
        && busy.shared > free.shared
    {
        let gain = free.takes().0.saturating_sub(busy.takes().0);
        let until = Millis((gain / 2).min(WAIT_MAX.0));
        if age < until {
            return Some(Choice::Wait(Millis(until.0 - age.0)));
        }
    }
    Some(Choice::Go(at))
}

/// A question on its way to a node.
#[derive(Debug, Clone, Copy)]
pub struct Question<'a> {
    /// What it needs.
    pub request: &'a Request<'a>,
    /// Which model answers.
    pub model: &'a ArtifactRef,
    /// How its prompt begins.
    pub prefix: &'a Prefix,
    /// How long it has waited.
    pub age: Millis,
}

/// Where a question goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Route {
    /// There.
    Go(Plan),
    /// Nowhere for so long: a node that is busy knows its prompt.
    Wait(Millis),
}

/// Sends a question where it costs least, what is warm counted in: to one of the places of `plan`, the cheapest by
/// placement, or to one that has read its beginning or keeps its model.
pub fn route(
    now: MonoMillis,
    market: &Market,
    hearth: &Hearth,
    question: &Question<'_>,
    mut plan: Plan,
) -> Route {
    let Question {
        request,
        model,
        prefix,
        age,
    } = *question;
    let mut places: Vec<Candidate> = Vec::with_capacity(1 + plan.alternatives.len());
    places.push(plan.chosen.clone());
    places.append(&mut plan.alternatives);
    let loaded = |node: &NodeId| hearth.of(node).is_some_and(|heat| heat.has_model(&model.digest));
    let shared = |node: &NodeId| hearth.of(node).map_or(0, |heat| heat.shared(prefix));
    // What is warm elsewhere matters only where it is warmer than the cheapest places.
    let known: Vec<NodeId> = places.iter().map(|place| place.node).collect();
    let all_loaded = known.iter().all(loaded);
    if !(all_loaded && prefix.is_empty()) {
        let warm = hearth
            .holding(&model.digest)
            .filter(|node| !known.contains(node))
            .take(WARM_MAX);
        let warm = warm.filter(|node| !all_loaded || shared(node) > 0);
        places
            .extend(warm.filter_map(|node| placement::candidate_at(market, &node, request, market.policy())));
    }
    let seats: Vec<Seat> = places
        .iter()
        .map(|place| Seat {
            score: place.score,
            duration: place.duration,
            units: request.units,
            shared: shared(&place.node),
            to_load: if loaded(&place.node) { 0 } else { model.bytes.0 },
            busy: place.busy,
        })
        .collect();
    let chosen = match choose(&seats, age) {
        Some(Choice::Go(chosen)) => chosen,
        Some(Choice::Wait(more)) => return Route::Wait(more),
        None => 0,
    };
    let tokens = seats.get(chosen).map_or(0, |seat| seat.shared) * BLOCK_BYTES / TOKEN_BYTES as usize;
    let fresh = |place: &Candidate| hearth.of(&place.node).is_some_and(|heat| heat.is_fresh(now));
    plan.warm = match (tokens, places.get(chosen).is_some_and(fresh)) {
        (0, _) if places.len() > 1 && prefix.is_empty() && !places.iter().any(fresh) => {
            "a guess: no node has told lately what it keeps warm".into()
        }
        (0, _) => String::new(),
        (tokens, true) => format!("about {tokens} tokens of its prompt are known there"),
        (tokens, false) => {
            format!(
                "a guess: about {tokens} tokens of its prompt were sent there, but it has not told lately"
            )
        }
    };
    plan.chosen = places.remove(chosen);
    places.retain(|place| !place.busy);
    places.truncate(market.policy().alternatives);
    plan.alternatives = places;
    Route::Go(plan)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> Digest {
        Digest::of(b"model")
    }

    /// `COST[=shared blocks][!bytes to load][#]`: `#` is busy. A hundred seconds, for a thousand tokens.
    fn seat(text: &str) -> Seat {
        let number = |mark: char| -> Option<u64> {
            let rest = &text[text.find(mark)? + 1..];
            let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
            digits.parse().ok()
        };
        let cost: String = text.chars().take_while(char::is_ascii_digit).collect();
        Seat {
            score: Credits(cost.parse().unwrap()),
            duration: Millis(100_000),
            units: 1_000,
            shared: number('=').unwrap_or(0) as usize,
            to_load: number('!').unwrap_or(0),
            busy: text.ends_with('#'),
        }
    }

    #[test]
    fn saved_work_is_weighed_against_price_and_loading() {
        for (name, seats, age, want) in [
            ("cheapest first", "100 101", 0, "go 0"),
            ("a known prompt", "100 100=4", 0, "go 1"),
            ("worth its price", "100 130=8", 0, "go 1"),
            ("not worth its price", "100 300=8", 0, "go 0"),
            ("loading costs", "100!50000000000 101", 0, "go 1"),
            ("loading costs less than reading", "100!500000 100=8", 0, "go 1"),
            ("a little is not worth a dear node", "100=1 200=2", 0, "go 0"),
            ("worth waiting for", "100 100=8#", 0, "wait 2000"),
            ("has waited", "100 100=8#", 1_500, "wait 500"),
            ("has waited enough", "100 100=8#", 2_000, "go 0"),
            ("a free one that knows it too", "100=8 100=8#", 0, "go 0"),
            ("nothing free", "100=8#", 0, "none"),
            ("nobody", "", 0, "none"),
        ] {
            let seats: Vec<Seat> = seats.split_whitespace().map(seat).collect();
            let got = match choose(&seats, Millis(age)) {
                Some(Choice::Go(i)) => alloc::format!("go {i}"),
                Some(Choice::Wait(more)) => alloc::format!("wait {}", more.0),
                None => "none".into(),
            };
            assert_eq!(got, want, "{name}");
        }
    }

    #[test]
    fn prompts_share_what_they_begin_with() {
        let system = "You answer in Swahili. ".repeat(100);
        let (a, b) = (alloc::format!("{system}one"), alloc::format!("{system}two"));
        let (a, b) = (Prefix::of(&model(), None, &a), Prefix::of(&model(), None, &b));
        assert_eq!(a.hashes().len(), system.len() / BLOCK_BYTES);
        assert_eq!(a, b, "the last block is not full");
        let other = Prefix::of(&Digest::of(b"other"), None, &system);
        assert_ne!(a.hashes()[0], other.hashes()[0]);
        let adapted = Prefix::of(&model(), Some(&Digest::of(b"adapter")), &system);
        assert_ne!(a.hashes()[0], adapted.hashes()[0]);
        assert_eq!(
            Prefix::of(&model(), None, &"x".repeat(1 << 20)).hashes().len(),
            BLOCKS_MAX
        );
        assert!(Prefix::of(&model(), None, "short").is_empty());
        let mut heat = Heat::default();
        let now = MonoMillis(5);
        assert!(!heat.is_fresh(now));
        heat.tell(
            now,
            &Warmth {
                models: vec![model()],
                prefixes: a.hashes()[..3].to_vec(),
            },
        );
        assert!(heat.is_fresh(now) && heat.has_model(&model()));
        assert_eq!((heat.shared(&b), heat.shared(&other)), (3, 0));
        // What was sent there is expected to be there before it says so.
        heat.expect(model(), &a);
        assert_eq!(heat.shared(&b), a.hashes().len());
        assert!(!heat.is_fresh(MonoMillis(HEAT_TTL.0 + 6)));
    }

    #[test]
    fn heat_is_bounded() {
        let mut heat = Heat::default();
        for i in 0..100u32 {
            let text = alloc::format!("{i:08}").repeat(4_096);
            heat.expect(model(), &Prefix::of(&model(), None, &text));
        }
        assert!(heat.expected.len() <= PREFIXES_MAX);
        heat.tell(MonoMillis(0), &Warmth::default());
        assert!(heat.expected.len() <= PREFIXES_MAX / 4);
    }
}
