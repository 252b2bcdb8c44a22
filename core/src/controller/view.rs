//! What questions are answered with.
use super::job::JobState;
use crate::{
    artifact::ArtifactRef,
    id::{Country, Institution, JobId, PartIndex, RecordId},
    key::NodeId,
    placement::{Candidate, Refusal},
    prelude::*,
    records::{Meters, Offer, Order, Verified},
    unit::{Credits, Rate, UtcMillis},
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
    /// One sentence.
    pub summary: String,
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
    job::{Job, Part},
    mind::Controller,
    placing::request,
};
use crate::{
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
        self.jobs.values().filter(|j| !j.state.ended()).count()
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

    /// Where the first part of such an order would run now, by the very judgement that places.
    pub fn explain_order(&self, _now: Now, order: &Order) -> Explanation {
        let items = if order.items_per_part > 0 {
            order.items.min(order.items_per_part.into())
        } else {
            order.items
        };
        let ceiling = u128::from(order.credits_max.0) * u128::from(items) / u128::from(order.items.max(1));
        self.explain(
            order,
            items,
            Credits(u64::try_from(ceiling).unwrap_or(u64::MAX)),
            &[],
        )
    }

    /// Why the first waiting part of a job waits, or where its next one would run.
    pub fn explain_job(&self, _now: Now, id: &JobId) -> Option<Explanation> {
        let job = self.jobs.get(id)?;
        let part = job
            .parts
            .iter()
            .find(|p| p.state == JobState::Queued)
            .or(job.parts.first())?;
        Some(self.explain(&job.order, part.items, part.ceiling, &part.avoid))
    }

    fn explain(&self, order: &Order, items: u64, ceiling: Credits, avoid: &[NodeId]) -> Explanation {
        let request = request(order, items, ceiling, avoid);
        let (candidates, refusal) = placement::survey(&self.market, &request, &self.policy);
        let summary = match candidates.iter().find(|c| !c.busy) {
            Some(best) => format!(
                "{} of {} nodes can run it; cheapest is {} ({}, {}) at about {} credits",
                candidates.len(),
                refusal.known,
                best.name,
                best.institution,
                best.country,
                best.cost
            ),
            None => refusal.to_string(),
        };
        Explanation {
            known: refusal.known,
            candidates,
            refusal,
            summary,
        }
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
