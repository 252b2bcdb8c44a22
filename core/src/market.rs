//! What a scheduler believes about nodes: offers until they expire, and what it has placed on them itself.
//!
//! Not here: choosing ([`crate::placement`]), promising (the agent alone grants).
use crate::{
    id::Digest,
    key::{NodeId, PublicKey},
    placement::{ClassId, Policy, Shelved, Stock},
    prelude::*,
    records::{Offer, Verified, WorkKind},
    unit::{DeviceMillis, Millis, MonoMillis, Now, Portion, Rate, Speed, UtcMillis, WHOLE},
};

/// The most nodes one scheduler believes in; further offers are refused until some expire.
pub const NODES_MAX: usize = 200_000;
/// The longest an offer is believed, whatever it says of itself.
pub const OFFER_TTL_MAX: Millis = Millis(3_600_000);
/// How far ahead of our clock an offer may be dated.
pub const CLOCK_SKEW_MAX: Millis = Millis(300_000);

/// One node as the market sees it.
#[derive(Debug, Clone)]
pub struct Listing {
    /// The latest offer.
    pub offer: Verified<Offer>,
    /// When it came.
    pub heard_at: UtcMillis,
    /// On our own clock: a node's wrong clock cannot keep it listed.
    expires: MonoMillis,
    /// Whether its control session stands; only then can it be asked.
    pub connected: bool,
    /// Devices we hold or have asked for, per entry of `offer.devices`.
    ours: Vec<u32>,
    /// Devices others hold, per entry of `offer.devices`, as far as the offer tells.
    others: Vec<u32>,
    /// What is free of each device that guests share, per entry of `offer.devices`: as the offer told, and as was placed
    /// since. On which of them a share really goes is the node's to say.
    shared: Vec<Vec<u32>>,
    /// Attempts that failed there since the last success.
    pub failures: u32,
    /// What finished leases showed, which weighs the more against what the offer claims the longer it took.
    measured: BTreeMap<WorkKind, Shown>,
    /// Reclaims that were seen there, and in how much device time; old ones weigh less and less.
    reclaims: u32,
    watched: DeviceMillis,
    /// Where it stands in the stock.
    pub(crate) shelved: Vec<Shelved>,
    /// Per entry of `offer.devices`: the group whose shadow price it bears.
    pub(crate) groups: Vec<u32>,
}

/// Work done, and how long one device took for it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Shown {
    /// Work units.
    pub units: u64,
    /// Device time, without what went by until the model was ready.
    pub time: DeviceMillis,
}

impl Shown {
    /// What an offer says of its speed is worth as much as so much device time that was seen.
    const CLAIM: u128 = 60_000;
    /// After so much time, what was seen before counts half: machines change.
    const TIME_MAX: u64 = 3_600_000;

    fn add(&mut self, more: Self) {
        // One lease alone never counts for more than all that is remembered.
        let (mut units, mut time) = (more.units, more.time.0);
        if time > Self::TIME_MAX {
            units = (u128::from(units) * u128::from(Self::TIME_MAX) / u128::from(time)) as u64;
            time = Self::TIME_MAX;
        }
        self.units = self.units.saturating_add(units);
        self.time = self.time.saturating_add(DeviceMillis(time));
        while self.time.0 > Self::TIME_MAX {
            (self.units, self.time.0) = (self.units / 2, self.time.0 / 2);
        }
    }

    /// The offered speed and the shown one, each weighed by its time.
    fn with_claim(self, offered: Speed) -> Speed {
        // A probe that measured nothing claims nothing.
        let claim = if offered.0 == 0 { 0 } else { Self::CLAIM };
        let units = u128::from(offered.0) * claim + u128::from(self.units) * 1_000_000;
        let speed = units / (claim + u128::from(self.time.0)).max(1);
        Speed(u64::try_from(speed).unwrap_or(u64::MAX).max(1))
    }
}

/// A silence counts as so many failures: somebody waits for every question.
const SILENCE_FAILURES: u32 = 16;

/// What is believed of a node that nobody has watched: no reclaim in so much device time.
const WATCHED_BEFORE: DeviceMillis = DeviceMillis(100 * 3_600_000);
/// After so much more device time, what was seen before counts half.
const WATCHED_MAX: DeviceMillis = DeviceMillis(1_000 * 3_600_000);
/// One reclaim every four seconds: no node is worse.
const HAZARD_MAX: u64 = 1_000_000;

impl Listing {
    /// Free devices of entry `device`, as far as we know: what is not ours nor, at the last offer, others'.
    pub fn free(&self, device: usize) -> u32 {
        let count = self.offer.devices.get(device).map_or(0, |d| d.count);
        let held =
            self.ours.get(device).copied().unwrap_or(0) + self.others.get(device).copied().unwrap_or(0);
        let shared = self.shared.get(device).map_or(0, |shared| shared.len() as u32);
        count.saturating_sub(held.saturating_add(shared))
    }

    /// The most that one lease could have of entry `device` now, in thousandths: whole devices, or the largest share.
    pub fn room(&self, device: usize) -> u32 {
        match self.free(device) {
            0 => self.shares(device).iter().copied().max().unwrap_or(0),
            free => free.saturating_mul(WHOLE),
        }
    }

    /// Whether so much of entry `device` is free.
    pub fn has(&self, device: usize, portion: Portion) -> bool {
        self.room(device) >= portion.milli()
    }

    /// How many leases over so much could have a place on entry `device` now.
    pub fn seats(&self, device: usize, portion: Portion) -> u32 {
        if !portion.is_share() {
            return self.free(device) / portion.count().max(1);
        }
        let milli = portion.milli();
        let of_shared = self.shares(device).iter().map(|free| free / milli);
        of_shared.fold(
            self.free(device).saturating_mul(WHOLE / milli),
            u32::saturating_add,
        )
    }

    /// As [`Self::seats`], were nothing held.
    pub fn seats_at_most(&self, device: usize, portion: Portion) -> u32 {
        let count = self.offer.devices.get(device).map_or(0, |d| d.count);
        match portion.is_share() {
            true => count.saturating_mul(WHOLE / portion.milli()),
            false => count / portion.count().max(1),
        }
    }

    fn shares(&self, device: usize) -> &[u32] {
        self.shared.get(device).map_or(&[], Vec::as_slice)
    }

    /// Takes a share: of the fullest device that still has it, as its node will.
    fn take_share(&mut self, device: usize, milli: u32) {
        let whole = self.free(device);
        let Some(shared) = self.shared.get_mut(device) else {
            return;
        };
        let fits = shared.iter_mut().filter(|free| **free >= milli);
        match fits.min() {
            Some(free) => *free -= milli,
            None if whole > 0 => shared.push(WHOLE - milli),
            None => {}
        }
    }

    /// Gives a share back: nobody here knows to which device, the fullest it can have come from is assumed. The next
    /// offer tells.
    fn give_share(&mut self, device: usize, milli: u32) {
        let Some(shared) = self.shared.get_mut(device) else {
            return;
        };
        let from = (0..shared.len()).filter(|i| shared[*i] + milli <= WHOLE);
        if let Some(i) = from.max_by_key(|i| shared[*i]) {
            shared[i] += milli;
            if shared[i] == WHOLE {
                shared.swap_remove(i);
            }
        }
    }

    /// Speed at that kind of work: as offered, moved towards what finished leases showed by as much device time as
    /// they took. `None` when it has no such engine.
    pub fn speed(&self, kind: WorkKind) -> Option<Speed> {
        let offered = self
            .offer
            .engines
            .iter()
            .filter(|e| e.work == kind)
            .map(|e| e.speed)
            .max()?;
        match self.measured.get(&kind) {
            Some(shown) => Some(shown.with_claim(offered)),
            None => Some(offered),
        }
    }

    /// Reclaims to expect in a thousand hours of one device there.
    pub fn hazard(&self) -> u32 {
        let hours = self.watched.saturating_add(WATCHED_BEFORE);
        let hazard = u64::from(self.reclaims) * 1_000 * 3_600_000 / hours.0;
        hazard.min(HAZARD_MAX) as u32
    }

    /// Devices of ours there, in all.
    pub fn ours(&self) -> u32 {
        self.ours.iter().sum()
    }
}

/// Why an offer was not believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OfferError {
    /// It came over another node's connection.
    #[error("describes node {node}, but came from {from}")]
    Foreign {
        /// Whom it describes, shortened.
        node: String,
        /// Who sent it, shortened.
        from: String,
    },
    /// A later one is known.
    #[error("has sequence {got}, but {known} is known already")]
    Stale {
        /// Its sequence.
        got: u64,
        /// The known one.
        known: u64,
    },
    /// Its time has passed, or its clock is far ahead.
    #[error("is dated wrongly: {why}; check the node's clock")]
    Dated {
        /// What is wrong.
        why: String,
    },
    /// The market is full.
    #[error("cannot be kept: {NODES_MAX} nodes are listed already")]
    Full,
}

/// All nodes a scheduler has heard of lately.
#[derive(Debug, Clone, Default)]
pub struct Market {
    /// By handle; a handle is given to another node when its own is forgotten.
    listings: Vec<Option<(NodeId, Listing)>>,
    spare: Vec<u32>,
    nodes: BTreeMap<NodeId, u32>,
    stock: Stock,
    policy: Policy,
    /// Which nodes say they hold an artifact.
    holders: BTreeMap<Digest, BTreeSet<u32>>,
    /// Sessions of nodes whose offer has not arrived yet.
    waiting: BTreeSet<NodeId>,
    /// When each listing expires, in order.
    expiries: BTreeSet<(MonoMillis, NodeId)>,
}

impl Market {
    /// An empty market whose index is sorted by the costs of that policy.
    pub fn new(policy: Policy) -> Self {
        Self {
            policy,
            ..Self::default()
        }
    }

    /// The policy its index is sorted by: the one to place with.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Places by class, and the index of them.
    pub fn stock(&self) -> &Stock {
        &self.stock
    }

    /// What better use an hour of that device is kept from.
    pub fn shadow(&self, listing: &Listing, device: usize) -> Rate {
        listing
            .groups
            .get(device)
            .map_or(Rate::FREE, |group| self.stock.shadow(*group))
    }

    /// Sets what the slow path found; groups that are not named have no shadow price.
    pub fn set_shadows(&mut self, prices: impl IntoIterator<Item = (u32, Rate)>) {
        self.stock.set_shadows(prices);
    }

    /// Nodes that say they hold an artifact, by handle.
    pub fn holders(&self, artifact: &Digest) -> impl ExactSizeIterator<Item = u32> + '_ {
        static NONE: BTreeSet<u32> = BTreeSet::new();
        self.holders.get(artifact).unwrap_or(&NONE).iter().copied()
    }

    /// Every listed node, by id.
    pub fn iter(&self) -> impl Iterator<Item = (&NodeId, &Listing)> {
        self.nodes.values().filter_map(|handle| self.at(*handle))
    }

    /// How many nodes are listed.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// No node is listed.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// One node.
    pub fn get(&self, node: &NodeId) -> Option<&Listing> {
        Some(self.at(*self.nodes.get(node)?)?.1)
    }

    /// The node with that handle.
    pub fn at(&self, handle: u32) -> Option<(&NodeId, &Listing)> {
        let (node, listing) = self.listings.get(handle as usize)?.as_ref()?;
        Some((node, listing))
    }

    /// Changes a listing, and brings the stock in step: its places anew, or only how much is free.
    fn change(&mut self, node: &NodeId, anew: bool, change: impl FnOnce(&mut Listing)) {
        let Some(handle) = self.nodes.get(node).copied() else {
            return;
        };
        let Some((_, listing)) = self.listings.get_mut(handle as usize).and_then(Option::as_mut) else {
            return;
        };
        change(listing);
        if anew {
            self.stock.shelve(handle, listing, &self.policy);
        } else {
            self.stock.set_free(listing);
        }
    }

    /// Takes a listing out of every index.
    fn forget(&mut self, node: &NodeId) -> Option<Listing> {
        let handle = self.nodes.remove(node)?;
        let (_, mut listing) = self.listings.get_mut(handle as usize)?.take()?;
        self.spare.push(handle);
        self.stock.clear(&mut listing);
        for artifact in &listing.offer.cached {
            if let Some(holders) = self.holders.get_mut(artifact) {
                holders.remove(&handle);
                if holders.is_empty() {
                    self.holders.remove(artifact);
                }
            }
        }
        Some(listing)
    }

    fn list(&mut self, node: NodeId, mut listing: Listing) {
        let handle = self.spare.pop().unwrap_or_else(|| {
            self.listings.push(None);
            (self.listings.len() - 1) as u32
        });
        for artifact in &listing.offer.cached {
            self.holders.entry(*artifact).or_default().insert(handle);
        }
        self.stock.shelve(handle, &mut listing, &self.policy);
        self.listings[handle as usize] = Some((node, listing));
        self.nodes.insert(node, handle);
    }

    /// Believes an offer until it expires, or says why not.
    pub fn hear(&mut self, now: Now, from: PublicKey, offer: Verified<Offer>) -> Result<(), OfferError> {
        let node = offer.node;
        if node.0 != from {
            return Err(OfferError::Foreign {
                node: node.short(),
                from: from.short(),
            });
        }
        if offer.issued_at > now.utc.after(CLOCK_SKEW_MAX) {
            return Err(OfferError::Dated {
                why: "it was issued in the future".into(),
            });
        }
        if offer.expires_at <= now.utc {
            return Err(OfferError::Dated {
                why: "it has expired".into(),
            });
        }
        let left = Millis(offer.expires_at.0 - now.utc.0).min(OFFER_TTL_MAX);
        match self.get(&node) {
            Some(known) if known.offer.sequence >= offer.sequence => {
                return Err(OfferError::Stale {
                    got: offer.sequence,
                    known: known.offer.sequence,
                });
            }
            None if self.nodes.len() >= NODES_MAX => return Err(OfferError::Full),
            _ => {}
        }
        let before = self.forget(&node);
        let ours_of = |class: &str| {
            let Some(known) = &before else { return 0 };
            let at = known.offer.devices.iter().position(|d| d.class == class);
            at.and_then(|i| known.ours.get(i)).copied().unwrap_or(0)
        };
        let ours: Vec<u32> = offer.devices.iter().map(|d| ours_of(&d.class)).collect();
        let others = offer
            .devices
            .iter()
            .zip(&ours)
            .map(|(d, ours)| {
                (d.count - d.free)
                    .saturating_sub(d.shared.len() as u32)
                    .saturating_sub(*ours)
            })
            .collect();
        let shared = offer.devices.iter().map(|d| d.shared.clone()).collect();
        let connected = before
            .as_ref()
            .map_or_else(|| self.waiting.remove(&node), |known| known.connected);
        let gone = before.as_ref().map(|known| known.expires);
        let (failures, measured, reclaims, watched) = before
            .map(|known| (known.failures, known.measured, known.reclaims, known.watched))
            .unwrap_or_default();
        let listing = Listing {
            offer,
            heard_at: now.utc,
            expires: now.mono.after(left),
            connected,
            ours,
            others,
            shared,
            failures,
            measured,
            reclaims,
            watched,
            shelved: Vec::new(),
            groups: Vec::new(),
        };
        if let Some(known) = gone {
            self.expiries.remove(&(known, node));
        }
        self.expiries.insert((listing.expires, node));
        self.list(node, listing);
        Ok(())
    }

    /// Notes whether a node's control session stands.
    pub fn set_connected(&mut self, node: NodeId, connected: bool) {
        match self.nodes.contains_key(&node) {
            true => self.change(&node, false, |listing| listing.connected = connected),
            false if connected && self.waiting.len() < NODES_MAX => {
                self.waiting.insert(node);
            }
            false => {
                self.waiting.remove(&node);
            }
        }
    }

    /// Forgets offers whose time has passed; gives back who they were.
    pub fn expire(&mut self, now: MonoMillis) -> Vec<NodeId> {
        let mut gone = Vec::new();
        while let Some((at, node)) = self.expiries.first().copied()
            && at <= now
        {
            self.expiries.remove(&(at, node));
            if self.forget(&node).is_some_and(|listing| listing.connected) {
                self.waiting.insert(node);
            }
            gone.push(node);
        }
        gone
    }

    /// When the next offer expires.
    pub fn next_expiry(&self) -> Option<MonoMillis> {
        self.expiries.first().map(|(at, _)| *at)
    }

    /// Some connected node has a free device.
    pub fn any_free(&self) -> bool {
        let index = self.stock.index();
        (0..index.classes()).any(|class| index.count(ClassId(class as u32)).1 > 0)
    }

    /// Counts so much of `class` as ours.
    pub fn take(&mut self, node: &NodeId, class: &str, portion: Portion) {
        self.on_class(node, class, |listing, i| match portion.is_share() {
            true => listing.take_share(i, portion.milli()),
            false => listing.ours[i] = listing.ours[i].saturating_add(portion.count()),
        });
    }

    /// Gives it back.
    pub fn give_back(&mut self, node: &NodeId, class: &str, portion: Portion) {
        self.on_class(node, class, |listing, i| match portion.is_share() {
            true => listing.give_share(i, portion.milli()),
            false => listing.ours[i] = listing.ours[i].saturating_sub(portion.count()),
        });
    }

    /// The node says it has not so much free, whatever we believed: so it is until its next offer.
    pub fn mark_full(&mut self, node: &NodeId, class: &str, portion: Portion) {
        self.on_class(node, class, |listing, i| {
            let shared = listing.shared[i].len() as u32;
            let held = listing.ours[i].saturating_add(shared);
            listing.others[i] = listing.offer.devices[i].count.saturating_sub(held);
            if portion.is_share() {
                listing.shared[i].fill(0);
            }
        });
    }

    fn on_class(&mut self, node: &NodeId, class: &str, change: impl FnOnce(&mut Listing, usize)) {
        self.change(node, false, |listing| {
            if let Some(i) = listing.offer.devices.iter().position(|d| d.class == class) {
                change(listing, i);
            }
        });
    }

    /// Notes that an attempt failed there.
    pub fn note_failure(&mut self, node: &NodeId) {
        self.change(node, true, |listing| {
            listing.failures = listing.failures.saturating_add(1);
        });
    }

    /// Notes that it took a question and then wrote nothing: the next ones rather go elsewhere.
    pub fn note_silence(&mut self, node: &NodeId) {
        self.change(node, true, |listing| {
            listing.failures = listing.failures.saturating_add(SILENCE_FAILURES);
        });
    }

    /// Notes that a lease finished there, and what it showed of the node's speed.
    pub fn note_success(&mut self, node: &NodeId, kind: WorkKind, shown: Option<Shown>) {
        self.change(node, true, |listing| {
            listing.failures = 0;
            if let Some(shown) = shown {
                listing.measured.entry(kind).or_default().add(shown);
            }
        });
    }

    /// Notes device time that was watched there, and whether the owner took the device back at its end.
    /// Reclaims raise what interrupted work is expected to cost there; they are no failures.
    pub fn note_watched(&mut self, node: &NodeId, time: DeviceMillis, reclaimed: bool) {
        self.change(node, true, |listing| {
            if listing.watched > WATCHED_MAX {
                listing.watched = DeviceMillis(listing.watched.0 / 2);
                listing.reclaims /= 2;
            }
            listing.watched = listing.watched.saturating_add(time);
            listing.reclaims = listing.reclaims.saturating_add(reclaimed.into());
        });
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{
        key::SecretKey,
        records::{Device, Engine, NodeState, Signed},
        unit::{Bytes, Rate},
    };

    pub(crate) const NOW: Now = Now {
        utc: UtcMillis(1_000_000),
        mono: MonoMillis(50_000),
    };

    pub(crate) fn secret_of(name: &str) -> SecretKey {
        SecretKey::from_bytes(&crate::id::Digest::of(name.as_bytes()).0)
    }

    pub(crate) fn node_of(name: &str) -> NodeId {
        NodeId(PublicKey::of(&secret_of(name)))
    }

    /// `a:2gpu@5,KE,8G,paused,busy,fast` as an offer; prices are whole credits per hour.
    pub(crate) fn offer_of(text: &str, sequence: u64) -> Verified<Offer> {
        let (name, rest) = text.split_once(':').unwrap();
        let mut words = rest.split(',');
        let (device, rate) = words.next().unwrap().split_once('@').unwrap();
        let digits = device.find(|c: char| !c.is_ascii_digit()).unwrap();
        let mut offer = Offer {
            node: node_of(name),
            name: name.into(),
            institution: "uni-nairobi".parse().unwrap(),
            country: "KE".parse().unwrap(),
            devices: vec![Device {
                class: device[digits..].into(),
                count: device[..digits].parse().unwrap(),
                free: device[..digits].parse().unwrap(),
                memory: Bytes(16 << 30),
                rate: Rate(rate.parse::<u64>().unwrap() * 1_000_000),
                share_min: 0,
                shared: Vec::new(),
            }],
            engines: vec![Engine {
                name: "noop".into(),
                version: "1".into(),
                work: WorkKind::Noop,
                speed: Speed(1_000),
                method: "probe/1".into(),
            }],
            cores: 8,
            memory: Bytes(32 << 30),
            isa: "x86-64-v3".into(),
            isolation: "landlock".into(),
            cached: Vec::new(),
            artifact_addrs: Vec::new(),
            sequence,
            issued_at: NOW.utc,
            expires_at: NOW.utc.after(Millis(60_000)),
            state: NodeState::Open,
            terms: crate::records::OwnerPolicy::default(),
        };
        for word in words {
            match word {
                "paused" => offer.state = NodeState::Paused,
                "busy" => offer.devices[0].free = 0,
                "fast" => offer.engines[0].speed = Speed(10_000),
                "dumb" => offer.engines.clear(),
                "gone" => {}
                "local" => offer.terms.local_first = true,
                w if w.contains('=') => {
                    let (key, value) = w.split_once('=').unwrap();
                    match key {
                        "also" => {
                            let more = offer_of(&format!("{name}:{value}"), sequence).into_inner();
                            offer.devices.extend(more.devices);
                        }
                        "share" => offer.devices[0].share_min = value.parse().unwrap(),
                        "iso" => offer.isolation = value.into(),
                        "data" => offer.terms.data = value.parse().unwrap(),
                        "lic" => offer.terms.licences.push(value.into()),
                        "only" => offer.terms.institutions.push(value.parse().unwrap()),
                        "never" => offer.terms.institutions_excluded.push(value.parse().unwrap()),
                        "does" => offer.terms.work.push(value.parse().unwrap()),
                        other => panic!("{other}"),
                    }
                }
                w if w.ends_with('G') => {
                    offer.devices[0].memory = Bytes(w[..w.len() - 1].parse::<u64>().unwrap() << 30)
                }
                w if w.len() == 2 => offer.country = w.parse().unwrap(),
                w => offer.institution = w.parse().unwrap(),
            }
        }
        Signed::sign(offer, &secret_of(name))
    }

    /// A market of such offers, all connected but those that are `gone`.
    pub(crate) fn market_of(text: &str) -> Market {
        let mut market = Market::default();
        for word in text.split_whitespace() {
            let offer = offer_of(word, 1);
            let node = offer.node;
            market.hear(NOW, node.0, offer).unwrap();
            market.set_connected(node, !word.contains(",gone"));
        }
        market
    }

    fn at(ms: u64) -> Now {
        Now {
            utc: NOW.utc.after(Millis(ms)),
            mono: NOW.mono.after(Millis(ms)),
        }
    }

    #[test]
    fn an_offer_is_believed_from_its_node_in_sequence_and_until_it_expires() {
        let a = node_of("a").0;
        for (name, heard_at, from, sequence, expected) in [
            ("fresh", 0, a, 6, "taken"),
            ("same again", 0, a, 5, "has sequence 5, but 5 is known already"),
            ("older", 0, a, 4, "has sequence 4, but 5 is known already"),
            (
                "late",
                60_000,
                a,
                6,
                "is dated wrongly: it has expired; check the node's clock",
            ),
            ("by another", 0, node_of("b").0, 6, "describes node"),
        ] {
            let mut market = Market::default();
            market.hear(NOW, a, offer_of("a:1gpu@5", 5)).unwrap();
            let got = market.hear(at(heard_at), from, offer_of("a:1gpu@4", sequence));
            let got = got.map_or_else(|e| e.to_string(), |()| "taken".into());
            assert!(got.starts_with(expected), "{name}: {got}");
            let rate = market.get(&node_of("a")).unwrap().offer.devices[0].rate;
            assert_eq!(rate.0 == 4_000_000, expected == "taken", "{name}");
        }
        let early = Now {
            utc: UtcMillis(NOW.utc.0 - CLOCK_SKEW_MAX.0 - 1),
            ..NOW
        };
        let error = Market::default().hear(early, a, offer_of("a:1gpu@5", 1));
        assert!(matches!(error, Err(OfferError::Dated { .. })));
    }

    #[test]
    fn an_expired_offer_is_forgotten_once_and_its_session_remembered() {
        let mut market = market_of("a:1gpu@5");
        let a = node_of("a");
        assert_eq!(market.next_expiry(), Some(at(60_000).mono));
        assert_eq!(market.expire(at(59_999).mono), []);
        // A later offer moves the expiry.
        let later = {
            let mut offer = offer_of("a:1gpu@5", 2).into_inner();
            offer.expires_at = at(90_000).utc;
            Signed::sign(offer, &secret_of("a"))
        };
        market.hear(at(1), a.0, later).unwrap();
        assert_eq!(market.expire(at(89_000).mono), []);
        assert_eq!(market.expire(at(90_001).mono), [a]);
        assert_eq!(market.expire(at(90_001).mono), []);
        assert_eq!(market.next_expiry(), None);
        // It comes back while its session still stands.
        let mut offer = offer_of("a:1gpu@5", 3).into_inner();
        offer.expires_at = at(200_000).utc;
        market
            .hear(at(95_000), a.0, Signed::sign(offer, &secret_of("a")))
            .unwrap();
        assert!(market.get(&a).unwrap().connected);
    }

    #[test]
    fn a_wrong_clock_cannot_keep_a_node_listed() {
        let mut market = Market::default();
        let a = node_of("a");
        let mut offer = offer_of("a:1gpu@5", 1).into_inner();
        offer.expires_at = UtcMillis(u64::MAX / 2);
        market
            .hear(NOW, a.0, Signed::sign(offer, &secret_of("a")))
            .unwrap();
        assert_eq!(market.next_expiry(), Some(NOW.mono.after(OFFER_TTL_MAX)));
    }

    #[test]
    fn devices_are_counted_once_whoever_holds_them() {
        let a = node_of("a");
        let mut market = market_of("a:3gpu@5");
        let free = |m: &Market| m.get(&a).unwrap().free(0);
        let offer = |free: u32, sequence| {
            let mut offer = offer_of("a:3gpu@5", sequence).into_inner();
            offer.devices[0].free = free;
            Signed::sign(offer, &secret_of("a"))
        };
        market.take(&a, "gpu", Portion::ONE);
        assert_eq!(free(&market), 2, "ours");
        market.hear(NOW, a.0, offer(2, 2)).unwrap();
        assert_eq!(free(&market), 2, "the node counts ours too");
        market.hear(NOW, a.0, offer(1, 3)).unwrap();
        assert_eq!(free(&market), 1, "somebody else has one");
        market.mark_full(&a, "gpu", Portion::ONE);
        assert_eq!(free(&market), 0, "it said it is full");
        assert!(!market.any_free());
        market.give_back(&a, "gpu", Portion::ONE);
        assert_eq!(free(&market), 1, "ours came back");
        market.give_back(&a, "gpu", Portion::devices(7));
        market.take(&a, "tpu", Portion::ONE);
        assert_eq!(free(&market), 1, "neither too much nor another class");
    }

    #[test]
    fn shares_lie_together_and_make_devices_whole_again() {
        let a = node_of("a");
        let mut market = market_of("a:2gpu@5,share=100");
        let share = |milli| Portion::share(milli).unwrap();
        let state = |m: &Market| {
            let listing = m.get(&a).unwrap();
            let mut shared = listing.shared[0].clone();
            shared.sort_unstable();
            (listing.free(0), shared, listing.seats(0, share(250)))
        };
        assert_eq!(state(&market), (2, vec![], 8));
        market.take(&a, "gpu", share(600));
        market.take(&a, "gpu", share(300));
        assert_eq!(
            state(&market),
            (1, vec![100], 4),
            "on the device that is shared already"
        );
        market.take(&a, "gpu", share(300));
        assert_eq!(state(&market), (0, vec![100, 700], 2));
        let listing = market.get(&a).unwrap();
        assert_eq!((listing.room(0), listing.has(0, share(700))), (700, true));
        assert!(!listing.has(0, share(701)) && !listing.has(0, Portion::ONE));
        market.give_back(&a, "gpu", share(300));
        assert_eq!(
            state(&market),
            (1, vec![100], 4),
            "the fullest it can have come from"
        );
        market.mark_full(&a, "gpu", share(50));
        assert_eq!(state(&market), (0, vec![0], 0));
        // The node knows better.
        let mut offer = offer_of("a:2gpu@5,share=100", 2).into_inner();
        (offer.devices[0].free, offer.devices[0].shared) = (1, vec![900]);
        market
            .hear(NOW, a.0, Signed::sign(offer, &secret_of("a")))
            .unwrap();
        assert_eq!(state(&market), (1, vec![900], 7));
        market.give_back(&a, "gpu", share(100));
        assert_eq!(state(&market), (2, vec![], 8));
    }
}
