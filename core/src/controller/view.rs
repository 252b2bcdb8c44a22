//! What questions are answered with.
use super::job::JobState;
use crate::{
    artifact::ArtifactRef,
    id::{Country, Institution, JobId, PartIndex, RecordId},
    key::NodeId,
    placement::{Candidate, Refusal},
    prelude::*,
    records::{Meters, Offer, Order, Verified},
    unit::{Credits, Millis, Rate, UtcMillis},
};

/// A job as its user sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobView {
    /// Which.
    pub id: JobId,
    /// Its order.
    pub order: Verified<Order>,
    /// What the user calls it.
    pub label: String,
    /// Where it stands.
    pub state: JobState,
    /// Why.
    pub cause: String,
    /// When it was accepted.
    pub submitted_at: UtcMillis,
    /// When its state last changed.
    pub changed_at: UtcMillis,
    /// Items finished.
    pub items_done: u64,
    /// Set aside for it.
    pub reserved: Credits,
    /// Billed so far.
    pub spent: Credits,
    /// Totals of all parts that count.
    pub meters: Meters,
    /// Its parts.
    pub parts: Vec<PartView>,
}

/// A part as its user sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartView {
    /// Which.
    pub part: PartIndex,
    /// First item.
    pub first_item: u64,
    /// Items.
    pub items: u64,
    /// Where it stands.
    pub state: JobState,
    /// Why.
    pub cause: String,
    /// Attempts so far.
    pub fence: u64,
    /// Where it runs or ran.
    pub node: Option<NodeId>,
    /// That node's name.
    pub node_name: String,
    /// Its institution.
    pub institution: Option<Institution>,
    /// Its country.
    pub country: Option<Country>,
    /// On which devices.
    pub device_class: String,
    /// At what price.
    pub rate: Rate,
    /// What finished work was expected to cost there.
    pub cost_estimate: Credits,
    /// Why there.
    pub why: String,
    /// What the others would have cost, cheapest first.
    pub alternatives: Vec<Candidate>,
    /// Items finished.
    pub items_done: u64,
    /// Tokens read and written so far.
    pub tokens: u64,
    /// Loss of its latest training step, in millionths of a nat.
    pub loss_micro: u64,
    /// What an attempt left for the next one.
    pub left: Option<ArtifactRef>,
    /// What was metered.
    pub meters: Meters,
    /// What was billed.
    pub credits: Credits,
    /// Where the result lies.
    pub result: Option<ArtifactRef>,
    /// The receipt.
    pub receipt: Option<RecordId>,
    /// When its state last changed.
    pub changed_at: UtcMillis,
}

/// One line of a job's history.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct LogLine {
    /// When.
    pub at: UtcMillis,
    /// Which part; none for the job itself.
    pub part: Option<PartIndex>,
    /// What happened.
    pub text: String,
}

/// Why a part of an order would run where, or why nowhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explanation {
    /// Nodes known.
    pub known: u32,
    /// Those that could run it now, cheapest first.
    pub candidates: Vec<Candidate>,
    /// Why the others could not.
    pub refusal: Refusal,
    /// What the whole job would be billed on the cheapest and on the dearest of them, at most its ceiling.
    pub cost: Option<(Credits, Credits)>,
    /// When the part would start.
    pub starts: Start,
    /// One sentence.
    pub summary: String,
}

/// When work that waits is expected to start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// Something that can run it is free.
    Now,
    /// When what runs there is expected to end, those that are queued before it counted.
    In(Millis),
    /// What can run it is held by others, paused or away: nobody here knows for how long.
    Unknown,
    /// Nothing known could ever run it.
    Never,
}

/// A node as the scheduler knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeStatus {
    /// Its latest offer.
    pub offer: Verified<Offer>,
    /// Whether its session stands.
    pub connected: bool,
    /// When the offer came.
    pub heard_at: UtcMillis,
    /// Leases of ours on it.
    pub leases: u32,
    /// Attempts that failed there lately.
    pub failures: u32,
}

use super::{
    Denial,
    admission::Member,
    deadline,
    job::{Job, Part},
    jobs::contradictions,
    mind::Controller,
    placing::{InTime, request},
};
use crate::{
    artifact::SERVER_CLASS,
    id::Digest,
    key::{PublicKey, UserId},
    money::Accounts,
    placement,
    records::{ClassSummary, Signed, Summary},
    unit::Now,
};

impl Controller {
    /// An admitted key.
    pub fn member(&self, key: &PublicKey) -> Option<&Member> {
        self.members.get(key)
    }

    /// Every balance.
    pub fn accounts(&self) -> &Accounts {
        &self.accounts
    }

    /// Jobs, newest first: of one user or of all; ended ones only when asked for.
    pub fn jobs(&self, user: Option<UserId>, all: bool, limit: usize) -> Vec<JobView> {
        let mut jobs: Vec<&Job> = self
            .jobs
            .values()
            .filter(|j| user.is_none_or(|u| j.order.user == u) && (all || !j.state.ended()))
            .collect();
        jobs.sort_by_key(|j| core::cmp::Reverse((j.submitted_at, j.id)));
        jobs.into_iter().take(limit).map(|j| self.view(j)).collect()
    }

    /// Unfinished jobs.
    pub fn jobs_open(&self) -> usize {
        self.jobs.len() - self.ended.len()
    }

    /// One job.
    pub fn job(&self, id: &JobId) -> Option<JobView> {
        self.jobs.get(id).map(|job| self.view(job))
    }

    /// The caller's job whose id starts with `prefix` (hex), when only one does.
    pub fn find(&self, caller: PublicKey, prefix: &str) -> Result<JobId, Denial> {
        let none = || Denial::NoJob(prefix.chars().take(64).collect());
        let prefix = prefix.to_ascii_lowercase();
        if prefix.is_empty() {
            return Err(none());
        }
        let mut found = self
            .jobs
            .values()
            .filter(|j| j.order.user.0 == caller && j.id.to_string().starts_with(&prefix))
            .map(|j| j.id);
        match (found.next(), found.next()) {
            (Some(id), None) => Ok(id),
            (Some(_), Some(_)) => Err(Denial::NoJob(format!("{prefix} (more than one starts so)"))),
            _ => Err(none()),
        }
    }

    /// A job's history.
    pub fn logs(&self, id: &JobId) -> Vec<LogLine> {
        self.jobs.get(id).map(|job| job.log.clone()).unwrap_or_default()
    }

    /// Where the first part of such an order would run now, by the very judgement that places, cut as it would be cut.
    pub fn explain_order(&self, now: Now, order: &Verified<Order>) -> Explanation {
        if let Err(why) = contradictions(now.utc, order) {
            return Explanation {
                known: u32::try_from(self.market.len()).unwrap_or(u32::MAX),
                candidates: Vec::new(),
                refusal: Refusal::default(),
                cost: None,
                starts: Start::Never,
                summary: why.to_string(),
            };
        }
        let (slots, takes) = self.slots(order);
        let mut job = Job::new(order.clone(), String::new(), now.utc, slots, takes);
        job.takes = self.takes(&job);
        let Some(part) = job.parts.first() else {
            return Explanation {
                known: 0,
                candidates: Vec::new(),
                refusal: Refusal::default(),
                cost: None,
                starts: Start::Never,
                summary: "it has no items".into(),
            };
        };
        // What could not end in time would not be accepted.
        let request = placement::Request {
            within: deadline::left(&job, now.utc),
            ..request(order, part.items, part.ceiling, &[])
        };
        self.explain(now, &job, &request, part.items, None)
    }

    /// Why the first waiting part of a job waits, or where its next one would run.
    pub fn explain_job(&self, now: Now, id: &JobId) -> Option<Explanation> {
        let job = self.jobs.get(id)?;
        let part = job
            .parts
            .iter()
            .find(|p| p.state == JobState::Queued)
            .or(job.parts.first())?;
        let place = (job.submitted_at, job.id);
        let request = request(&job.order, part.items, part.ceiling, &part.avoid);
        Some(self.explain(now, job, &request, part.items, Some(place)))
    }

    fn explain(
        &self,
        now: Now,
        job: &Job,
        request: &placement::Request<'_>,
        items: u64,
        place: Option<(UtcMillis, JobId)>,
    ) -> Explanation {
        let order = &job.order;
        let survey = |wish: &placement::Request<'_>| placement::survey(&self.market, wish, &self.policy);
        let find = |wish: &placement::Request<'_>| {
            let found = survey(wish);
            found.0.iter().any(|c| !c.busy).then_some(found)
        };
        let (mut candidates, refusal) = match self.in_time(now, job, request, find) {
            InTime::Found(found) => found,
            InTime::Soon(able, why) => (able, why),
            InTime::Nowhere => survey(request),
        };
        // What the slow path advises for such work is tried before what is cheapest.
        if candidates.iter().any(|c| !c.busy && self.is_advised(order, c)) {
            candidates.sort_by_key(|c| c.busy || !self.is_advised(order, c));
        }
        let whole = |part: Credits| {
            let all = u128::from(part.0) * u128::from(order.items) / u128::from(items.max(1));
            Credits(u64::try_from(all).unwrap_or(u64::MAX)).min(order.credits_max)
        };
        let costs = || candidates.iter().map(|c| c.cost);
        let cost = costs()
            .min()
            .zip(costs().max())
            .map(|(low, high)| (whole(low), whole(high)));
        let starts = if candidates.iter().any(|c| !c.busy) {
            Start::Now
        } else {
            match self.next_end(now, &candidates, place) {
                Some(wait) => Start::In(wait),
                None if !candidates.is_empty() || refusal.passes_with_time() => Start::Unknown,
                None => Start::Never,
            }
        };
        let when = match starts {
            Start::In(wait) => format!("; expected to start in about {} s", wait.0.div_ceil(1_000)),
            Start::Now | Start::Unknown | Start::Never => String::new(),
        };
        let summary = match candidates.iter().find(|c| !c.busy) {
            Some(best) => format!(
                "{} of {} nodes can run it; cheapest is {} ({}, {}) at about {} credits; the whole job about {} to {}",
                candidates.len(),
                refusal.known,
                best.name,
                best.institution,
                best.country,
                best.cost,
                cost.unwrap_or_default().0,
                cost.unwrap_or_default().1,
            ),
            None => format!("{refusal}{when}"),
        };
        Explanation {
            known: refusal.known,
            candidates,
            refusal,
            cost,
            starts,
            summary,
        }
    }

    /// How long until a device of the candidates is expected to be free for work at that place in the queue.
    fn next_end(
        &self,
        now: Now,
        candidates: &[placement::Candidate],
        place: Option<(UtcMillis, JobId)>,
    ) -> Option<Millis> {
        let mut ends: Vec<Millis> = Vec::new();
        for candidate in candidates {
            for key in self.claims_of.get(&candidate.node).into_iter().flatten() {
                let Some(part) = self.part(key) else { continue };
                let Some(plan) = part
                    .plan
                    .as_ref()
                    .filter(|p| p.chosen.device_class == candidate.device_class)
                else {
                    continue;
                };
                let end = part
                    .asked_at
                    .after(plan.chosen.transfer)
                    .after(plan.chosen.duration);
                ends.push(Millis(end.0.saturating_sub(now.utc.0)));
            }
        }
        ends.sort_unstable();
        let before = self
            .queue
            .iter()
            .take_while(|p| place.is_none_or(|place| **p < place));
        let waiting = |(_, id): &(UtcMillis, JobId)| {
            let job = self.jobs.get(id)?;
            Some(job.parts.iter().filter(|p| p.state == JobState::Queued).count())
        };
        let ahead: usize = before.filter_map(waiting).sum();
        // Rounds of all those devices, each as long as the last of them takes now.
        let (rounds, rest) = (ahead / ends.len().max(1), ahead % ends.len().max(1));
        let round = ends.last()?.0.saturating_mul(rounds as u64);
        Some(Millis(ends.get(rest)?.0.saturating_add(round)))
    }

    /// Every node heard of lately.
    pub fn offers(&self) -> Vec<NodeStatus> {
        self.market
            .iter()
            .map(|(_, listing)| NodeStatus {
                offer: listing.offer.clone(),
                connected: listing.connected,
                heard_at: listing.heard_at,
                leases: listing.ours(),
                failures: listing.failures,
            })
            .collect()
    }

    /// Names of the models that providers' own servers answer for, as far as their offers are believed.
    pub fn served(&self) -> BTreeSet<String> {
        let classes = self.market.stock().classes();
        let names = classes.filter_map(|(_, s)| s.device.strip_prefix(SERVER_CLASS));
        names.map(String::from).collect()
    }

    /// What the other schedulers are told.
    pub fn summary(
        &self,
        now: Now,
        sequence: u64,
        ledger_entries: u64,
        ledger_head: Digest,
        addrs: Vec<String>,
    ) -> Verified<Summary> {
        let mut classes: BTreeMap<(String, Country), ClassSummary> = BTreeMap::new();
        for (_, listing) in self.market.iter() {
            for (i, device) in listing.offer.devices.iter().enumerate() {
                let country = listing.offer.country;
                let entry = classes
                    .entry((device.class.clone(), country))
                    .or_insert_with(|| ClassSummary {
                        device_class: device.class.clone(),
                        country,
                        nodes: 0,
                        free: 0,
                        rate_min: device.rate,
                    });
                entry.nodes += 1;
                entry.free += listing.free(i);
                entry.rate_min = entry.rate_min.min(device.rate);
            }
        }
        let summary = Summary {
            scheduler: self.id,
            classes: classes.into_values().take(256).collect(),
            ledger_entries,
            ledger_head,
            sequence,
            issued_at: now.utc,
            addrs: addrs.into_iter().take(8).collect(),
        };
        Signed::sign(summary, &self.config.secret)
    }

    fn view(&self, job: &Job) -> JobView {
        let parts: Vec<PartView> = (0u32..).zip(&job.parts).map(|(i, p)| part_view(i, p)).collect();
        let mut meters = Meters::default();
        for part in job.parts.iter().filter(|p| p.state == JobState::Done) {
            meters.add(&part.meters);
        }
        JobView {
            id: job.id,
            order: job.order.clone(),
            label: job.label.clone(),
            state: job.state,
            cause: job.cause.clone(),
            submitted_at: job.submitted_at,
            changed_at: job.changed_at,
            items_done: job.parts.iter().map(items_done).sum(),
            reserved: job.reserved,
            spent: job.spent,
            meters,
            parts,
        }
    }
}

fn part_view(index: PartIndex, part: &Part) -> PartView {
    let chosen = part.plan.as_ref().map(|p| &p.chosen);
    PartView {
        part: index,
        first_item: part.first_item,
        items: part.items,
        state: part.state,
        cause: part.cause.clone(),
        fence: part.fence,
        node: chosen.map(|c| c.node),
        node_name: chosen.map(|c| c.name.clone()).unwrap_or_default(),
        institution: chosen.map(|c| c.institution.clone()),
        country: chosen.map(|c| c.country),
        device_class: chosen.map(|c| c.device_class.clone()).unwrap_or_default(),
        rate: Controller::rate_of(part),
        cost_estimate: chosen.map_or(Credits::ZERO, |c| c.cost),
        why: part.plan.as_ref().map(placement::Plan::why).unwrap_or_default(),
        alternatives: part
            .plan
            .as_ref()
            .map(|p| p.alternatives.clone())
            .unwrap_or_default(),
        items_done: items_done(part),
        tokens: part.tokens,
        loss_micro: part.loss_micro,
        left: part.left,
        meters: part.meters,
        credits: part.credits,
        result: part.result,
        receipt: part.receipt,
        changed_at: part.changed_at,
    }
}

/// Progress is not stored: a part that is done says so after a restart too.
fn items_done(part: &Part) -> u64 {
    if part.state == JobState::Done {
        part.items
    } else {
        part.items_done.min(part.items)
    }
}
