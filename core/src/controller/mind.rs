//! The controller itself: orders in, leases out, nodes watched.
use super::{
    ControllerConfig, Denial, Effect, Event, Member, Reply, RequestId,
    admission::{INVITATIONS, MEMBERS, Redeemed},
    job::{JOBS, Job, JobState, PARTS, Part, part_row},
    user,
};
use crate::{
    exchange::{Holder, LeaseAsk, Phase, Refusal, Report, ToNode, ToScheduler},
    id::{Digest, JobId, LeaseKey, PartIndex},
    key::{NodeId, PublicKey, SchedulerId},
    market::{Market, OfferError},
    money::{Account, Accounts, Posting, PostingKind},
    placement::{self, Plan, Policy, Request},
    prelude::*,
    records::{Lease, Offer, Order, Role, Verified},
    store::{Change, Stored, StoredError, put, read},
    unit::{Bytes, Credits, DeviceMillis, Millis, MonoMillis, Now, Rate, UtcMillis},
};
use alloc::boxed::Box;

const SPENT: &str = "spent";

/// How far ahead of our clock an order may be dated.
const CLOCK_SKEW_MAX: Millis = Millis(300_000);
/// How long an order may be acceptable: its job, once dropped from the list, is remembered that long.
pub const ORDER_LIFE_MAX: Millis = Millis(24 * 3_600_000);
/// The most dropped jobs whose orders have not expired; at the bound new orders wait until some have.
pub const SPENT_MAX: usize = 1_000_000;
/// The longest a node may take to fetch what a part needs, or to call it running without using device time.
const FETCH_MAX: Millis = Millis(24 * 3_600_000);
/// A part that found no other node for so long tries those again that failed at it.
const FORGIVE_AFTER: Millis = Millis(60_000);
/// The most nodes a part avoids; the oldest gets another chance.
const AVOID_MAX: usize = 64;
/// Judgements of nodes per millisecond that placing may spend: with more waiting, the looks come less often.
const JUDGEMENTS_PER_MS: u64 = 2_000;
/// Between two looks at most.
const LOOK_GAP_MAX: u64 = 1_000;
/// How long a node that refused, or a part that failed everywhere, is left alone.
const BACKOFF: Millis = Millis(1_000);

/// A scheduler's mind.
pub struct Controller {
    pub(super) config: ControllerConfig,
    pub(super) id: SchedulerId,
    pub(super) policy: Policy,
    pub(super) market: Market,
    pub(super) members: BTreeMap<PublicKey, Member>,
    pub(super) invitations: BTreeMap<u64, Redeemed>,
    pub(super) accounts: Accounts,
    pub(super) jobs: BTreeMap<JobId, Job>,
    /// Unfinished jobs with parts to place, oldest first.
    queue: BTreeSet<(UtcMillis, JobId)>,
    /// Ended jobs, oldest first: what is dropped when too many are kept.
    ended: BTreeSet<(UtcMillis, JobId)>,
    /// Devices we believe are held for us, whether we still want them or not.
    claims: BTreeMap<LeaseKey, Claim>,
    claims_of: BTreeMap<NodeId, BTreeSet<LeaseKey>>,
    /// Their deadlines, in order.
    deadlines: BTreeSet<(MonoMillis, LeaseKey)>,
    /// Jobs dropped from the list whose orders could still be accepted: not a second time.
    spent: BTreeSet<JobId>,
    spent_until: BTreeSet<(UtcMillis, JobId)>,
    offers_refused: u64,
    /// Something changed that may let a queued part run.
    look_again: bool,
    /// When parts that were held back may be tried.
    retry_at: Option<MonoMillis>,
    /// Not to look before: a long queue before many nodes must not eat the scheduler.
    look_at: MonoMillis,
    /// Judgements the last look took.
    judged: u64,
}

struct Claim {
    node: NodeId,
    class: String,
    devices: u32,
    granted: bool,
    /// Past it, the node is not believed to hold the lease any more.
    deadline: MonoMillis,
}

impl Controller {
    /// The tables it keeps.
    pub const TABLES: &[&str] = &[MEMBERS, INVITATIONS, JOBS, PARTS, SPENT];

    /// The mind as it was when the process last lived, with the book's balances. Follow with [`Event::Started`].
    pub fn restore(
        config: ControllerConfig,
        now: Now,
        stored: &[Stored],
        accounts: Accounts,
    ) -> Result<Self, StoredError> {
        let id = config.id();
        let mut c = Self {
            config,
            id,
            policy: Policy::default(),
            market: Market::default(),
            members: BTreeMap::new(),
            invitations: BTreeMap::new(),
            accounts,
            jobs: BTreeMap::new(),
            queue: BTreeSet::new(),
            ended: BTreeSet::new(),
            claims: BTreeMap::new(),
            claims_of: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            spent: BTreeSet::new(),
            spent_until: BTreeSet::new(),
            offers_refused: 0,
            look_again: true,
            retry_at: None,
            look_at: MonoMillis::ZERO,
            judged: 0,
        };
        let bad = |pair: &Stored, why: &str| StoredError {
            table: pair.table.clone(),
            key: hex::encode(&pair.key),
            why: why.to_string(),
        };
        let mut parts: BTreeMap<Vec<u8>, Part> = BTreeMap::new();
        for pair in stored {
            match pair.table.as_str() {
                MEMBERS => {
                    let key = PublicKey::from_bytes(&pair.key).map_err(|e| bad(pair, &e.to_string()))?;
                    c.members.insert(key, read(pair)?);
                }
                INVITATIONS => {
                    let nonce = pair
                        .key
                        .as_slice()
                        .try_into()
                        .map_err(|_| bad(pair, "the key is not 8 bytes"))?;
                    c.invitations.insert(u64::from_be_bytes(nonce), read(pair)?);
                }
                JOBS => {
                    let job: Job = read(pair)?;
                    c.jobs.insert(job.id, job);
                }
                PARTS => {
                    parts.insert(pair.key.clone(), read(pair)?);
                }
                SPENT => {
                    let job = Digest::try_from(pair.key.as_slice())
                        .map(JobId)
                        .map_err(|e| bad(pair, &e.to_string()))?;
                    c.spent.insert(job);
                    c.spent_until.insert((read(pair)?, job));
                }
                _ => {}
            }
        }
        // Keys sort by job, then by part.
        for (key, part) in parts {
            let job = key.get(..32).and_then(|d| Digest::try_from(d).ok()).map(JobId);
            if let Some(job) = job.and_then(|id| c.jobs.get_mut(&id)) {
                job.parts.push(part);
            }
        }
        let ids: Vec<JobId> = c.jobs.keys().copied().collect();
        for id in ids {
            c.index(id);
            let job = &c.jobs[&id];
            let in_flight: Vec<(LeaseKey, Plan)> = (0u32..)
                .zip(&job.parts)
                .filter(|(_, part)| part.in_flight())
                .filter_map(|(i, part)| part.plan.clone().map(|plan| (job.key(i), plan)))
                .collect();
            for (key, plan) in in_flight {
                // Asked, perhaps granted, perhaps never sent: the node's first report will tell.
                c.claim(key, &plan, now.mono.after(c.config.lease_ttl), true);
            }
        }
        Ok(c)
    }

    /// When the next [`Event::Tick`] is due at the latest.
    pub fn wake_at(&self) -> MonoMillis {
        let claims = self.deadlines.first().map(|(at, _)| *at);
        [claims, self.market.next_expiry(), self.retry_at]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or(MonoMillis(u64::MAX))
    }

    /// The one entrance. Never waits; pushes what the shell must do, in order.
    pub fn handle(&mut self, now: Now, event: Event, out: &mut Vec<Effect>) {
        match event {
            Event::Started | Event::Tick => {}
            Event::Join {
                request,
                caller,
                name,
                by,
            } => self.on_join(now, request, caller, name, by, out),
            Event::Admit {
                request,
                key,
                member,
                credits,
            } => self.on_admit(now, request, key, member, credits, out),
            Event::Offer { request, from, offer } => self.on_offer(now, request, from, offer, out),
            Event::NodeConnected(node) => self.on_connected(node),
            Event::NodeGone(node) => self.on_gone(now, node),
            Event::Heard(node, message) => self.on_heard(now, node, message, out),
            Event::Submit {
                request,
                caller,
                order,
                label,
                wait,
            } => {
                let reply = match self.submit(now, caller, order, label, wait, out) {
                    Ok(job) => Reply::Submitted(job),
                    Err(denial) => Reply::Refused(denial),
                };
                out.push(Effect::Reply(request, reply));
            }
            Event::Cancel { request, caller, job } => {
                let reply = match self.cancel(now, caller, job, out) {
                    Ok(()) => Reply::Cancelled(job),
                    Err(denial) => Reply::Refused(denial),
                };
                out.push(Effect::Reply(request, reply));
            }
        }
        self.on_time(now, out);
        if self.look_again {
            if now.mono < self.look_at {
                self.hold_back(self.look_at);
                return;
            }
            self.look_again = false;
            self.judged = 0;
            self.place_all(now, out);
            let gap = (self.judged / JUDGEMENTS_PER_MS).min(LOOK_GAP_MAX);
            self.look_at = now.mono.after(Millis(gap));
        }
    }

    fn on_time(&mut self, now: Now, out: &mut Vec<Effect>) {
        for node in self.market.expire(now.mono) {
            out.push(Effect::Log(format!("the offer of {} expired", node.short())));
        }
        while let Some((at, key)) = self.deadlines.first().copied()
            && at <= now.mono
        {
            let Some(claim) = self.unclaim(&key) else {
                self.deadlines.remove(&(at, key));
                continue;
            };
            let why = if claim.granted {
                format!("no word from {} any more", self.name(&claim.node))
            } else {
                format!("{} did not answer", self.name(&claim.node))
            };
            self.market.note_failure(&claim.node);
            self.lost(now, key, &claim.node, why, out);
        }
        if self.retry_at.is_some_and(|at| at <= now.mono) {
            self.retry_at = None;
            self.look_again = true;
        }
    }

    // Nodes and offers.

    fn on_offer(
        &mut self,
        now: Now,
        request: RequestId,
        from: PublicKey,
        offer: Verified<Offer>,
        out: &mut Vec<Effect>,
    ) {
        let denial = match self.members.get(&from) {
            None => Some(Denial::NotAdmitted(from)),
            Some(m) if m.role != Role::Node => Some(Denial::WrongRole {
                key: from,
                is: m.role,
                needs: Role::Node,
            }),
            Some(m) if m.institution != offer.institution => Some(Denial::Offer(format!(
                "speaks for {}, but the node was admitted to {}",
                offer.institution, m.institution
            ))),
            Some(_) => self
                .market
                .hear(now, from, offer)
                .err()
                .map(|e: OfferError| Denial::Offer(e.to_string())),
        };
        let reply = match denial {
            Some(denial) => {
                self.offers_refused += 1;
                Reply::Refused(denial)
            }
            None => {
                self.look_again = true;
                Reply::OfferTaken
            }
        };
        out.push(Effect::Reply(request, reply));
    }

    /// Counts an offer that the shell refused before it could become an event: bad signature, over a cap.
    pub fn count_refused_offer(&mut self) {
        self.offers_refused += 1;
    }

    /// Offers refused since the process started.
    pub fn offers_refused(&self) -> u64 {
        self.offers_refused
    }

    fn on_connected(&mut self, node: NodeId) {
        self.market.set_connected(node, true);
        self.look_again = true;
        // What was asked over the old session may never have arrived: the first report of this one decides.
        for key in self.claims_of.get(&node).into_iter().flatten() {
            if let Some(claim) = self.claims.get_mut(key) {
                claim.granted = true;
            }
        }
    }

    fn on_gone(&mut self, now: Now, node: NodeId) {
        self.market.set_connected(node, false);
        let grace = now.mono.after(self.config.reconnect_grace);
        let keys: Vec<LeaseKey> = self.claims_of.get(&node).into_iter().flatten().copied().collect();
        for key in keys {
            let deadline = self.claims.get(&key).map_or(grace, |claim| claim.deadline);
            self.due(&key, deadline.min(grace));
        }
    }

    fn on_heard(&mut self, now: Now, node: NodeId, message: ToScheduler, out: &mut Vec<Effect>) {
        match message {
            ToScheduler::Report(report) => self.on_report(now, node, &report, out),
            ToScheduler::Granted(lease) => self.on_granted(now, node, &lease, out),
            ToScheduler::Refused { key, why } => self.on_refused(now, node, key, &why, out),
            // Readings come again with the usage; on the way they only show that the node is alive.
            ToScheduler::Reading { key, .. } => {
                if self.claims.get(&key).is_some_and(|c| c.node == node) {
                    self.due(&key, now.mono.after(self.config.lease_ttl));
                }
            }
            ToScheduler::Finished(finished) => self.on_finished(now, node, *finished, out),
        }
    }

    /// Compares what the node holds with what we believe, and mends both ways.
    fn on_report(&mut self, now: Now, node: NodeId, report: &Report, out: &mut Vec<Effect>) {
        let until = self.config.lease_ttl;
        let mut renewals = Vec::new();
        let mut stops = Vec::new();
        let mut named = BTreeSet::new();
        for held in &report.held {
            let key = held.key;
            named.insert(key);
            if held.phase != Phase::Finished {
                self.take_back(now, key, node, out);
            }
            let Some(claim) = self.claims.get_mut(&key).filter(|c| c.node == node) else {
                if held.phase != Phase::Finished {
                    stops.push((key, "another attempt counts, or the job is over".to_string()));
                }
                continue;
            };
            claim.granted = true;
            self.due(&key, now.mono.after(until));
            if !self.is_wanted(&key) {
                if held.phase != Phase::Finished {
                    stops.push((key, "the job is over".to_string()));
                }
                continue;
            }
            if self.overdue(now, &key) {
                self.unclaim(&key);
                stops.push((key, "it took longer than any lease may".to_string()));
                let why = format!("{} never came to an end with it", self.name(&node));
                self.market.note_failure(&node);
                self.lost(now, key, &node, why, out);
                continue;
            }
            renewals.push((key, now.utc.after(until), until));
            self.progress(now, &key, held.phase, held.items_done, out);
        }
        let missing: Vec<LeaseKey> = self
            .claims_of
            .get(&node)
            .into_iter()
            .flatten()
            .filter(|key| !named.contains(key) && self.claims.get(key).is_some_and(|c| c.granted))
            .copied()
            .collect();
        for key in missing {
            self.unclaim(&key);
            let why = format!("{} no longer holds it", self.name(&node));
            self.lost(now, key, &node, why, out);
        }
        if !renewals.is_empty() || !stops.is_empty() {
            out.push(Effect::Send(
                node,
                ToNode::Renewed {
                    sequence: report.sequence,
                    renewals,
                    stops,
                },
            ));
        }
    }

    /// An honest node ends every lease by itself, at the latest when its device time is used up. One that only
    /// says so, report after report, must not keep a part for ever.
    fn overdue(&self, now: Now, key: &LeaseKey) -> bool {
        let longest = self.config.device_time_max.saturating_add(FETCH_MAX);
        self.part(key)
            .is_some_and(|part| part.asked_at.after(longest) <= now.utc)
    }

    /// A lease we gave up but did not replace: its part waits in the queue under the same fence.
    fn wants_back(&self, now: Now, key: &LeaseKey, node: NodeId) -> bool {
        self.placed_on(key, node)
            && !self.overdue(now, key)
            && self
                .part(key)
                .is_some_and(|part| part.state == JobState::Queued && part.settled < key.fence)
    }

    /// Takes back a lease that was given up too early, if nothing has replaced it.
    fn take_back(&mut self, now: Now, key: LeaseKey, node: NodeId, out: &mut Vec<Effect>) {
        if self.claims.contains_key(&key) || !self.wants_back(now, &key, node) {
            return;
        }
        let Some(plan) = self.part(&key).and_then(|part| part.plan.clone()) else {
            return;
        };
        self.claim(key, &plan, now.mono.after(self.config.lease_ttl), true);
        let cause = format!("{} has it after all", self.name(&node));
        self.set_part(now, &key, JobState::Placed, cause, out);
    }

    fn progress(&mut self, now: Now, key: &LeaseKey, phase: Phase, items_done: u64, out: &mut Vec<Effect>) {
        let state = match phase {
            Phase::Granted => JobState::Placed,
            Phase::Fetching => JobState::Fetching,
            Phase::Running | Phase::Finished => JobState::Running,
        };
        let Some(part) = self.part_mut(key) else { return };
        let changed = part.items_done != items_done;
        part.items_done = items_done.min(part.items);
        if part.state != state {
            let cause = part.cause.clone();
            self.set_part(now, key, state, cause, out);
        } else if changed {
            out.push(Effect::Changed(key.job));
        }
    }

    fn on_granted(&mut self, now: Now, node: NodeId, lease: &Verified<Lease>, out: &mut Vec<Effect>) {
        let key = lease.key();
        let until = now.mono.after(self.config.lease_ttl);
        if lease.node == node {
            self.take_back(now, key, node, out);
        }
        let known = self
            .claims
            .get_mut(&key)
            .filter(|c| c.node == node && lease.node == node);
        match known {
            Some(claim) => {
                claim.granted = true;
                self.due(&key, until);
            }
            None => {
                let cause = "the ask was given up before the answer came".to_string();
                out.push(Effect::Send(node, ToNode::Stop { key, cause }));
                return;
            }
        }
        if !self.is_wanted(&key) {
            out.push(Effect::Send(
                node,
                ToNode::Stop {
                    key,
                    cause: "the job is over".into(),
                },
            ));
            return;
        }
        let phase = match self
            .jobs
            .get(&key.job)
            .map(|job| job.order.work.model().is_some())
        {
            Some(true) => Phase::Fetching,
            _ => Phase::Running,
        };
        self.progress(now, &key, phase, 0, out);
    }

    fn on_refused(&mut self, now: Now, node: NodeId, key: LeaseKey, why: &Refusal, out: &mut Vec<Effect>) {
        if self.claims.get(&key).is_none_or(|c| c.node != node) {
            return;
        }
        let Some(claim) = self.unclaim(&key) else { return };
        // A refusal is an owner's right, not a failure: it costs a moment, never reputation.
        self.market.mark_full(&node, &claim.class);
        if !self.is_wanted(&key) {
            return;
        }
        let name = self.name(&node);
        let lasting = !matches!(
            why,
            Refusal::Busy { .. } | Refusal::Price { .. } | Refusal::Fenced { .. }
        );
        if let Some(part) = self.part_mut(&key) {
            part.not_before = now.mono.after(Millis(BACKOFF.0 / 10));
            if lasting {
                avoid(part, node);
            }
        }
        self.hold_back(now.mono.after(Millis(BACKOFF.0 / 10)));
        self.set_part(now, &key, JobState::Queued, format!("{name} refused: {why}"), out);
    }

    /// An attempt came to nothing without the node's word. The part goes back to the queue, or the job fails.
    fn lost(&mut self, now: Now, key: LeaseKey, node: &NodeId, why: String, out: &mut Vec<Effect>) {
        self.look_again = true;
        if self.is_wanted(&key) {
            self.retry(now, key, node, why, true, out);
        }
    }

    /// Puts a part back into the queue after an attempt, or fails the job when there were too many.
    pub(super) fn retry(
        &mut self,
        now: Now,
        key: LeaseKey,
        node: &NodeId,
        why: String,
        counts: bool,
        out: &mut Vec<Effect>,
    ) {
        let Some(job) = self.jobs.get_mut(&key.job) else {
            return;
        };
        let attempts_max = job.order.attempts_max;
        let Some(part) = job.parts.get_mut(key.part as usize) else {
            return;
        };
        part.items_done = 0;
        if counts {
            part.failures += 1;
            avoid(part, *node);
        }
        if part.failures >= attempts_max {
            let cause = format!(
                "part {} failed {} times, the limit; last: {why}",
                key.part, part.failures
            );
            self.fail_job(now, key, cause, out);
            return;
        }
        self.set_part(now, &key, JobState::Queued, why, out);
    }

    // Jobs.

    fn submit(
        &mut self,
        now: Now,
        caller: PublicKey,
        order: Verified<Order>,
        label: String,
        wait: bool,
        out: &mut Vec<Effect>,
    ) -> Result<JobId, Denial> {
        let member = self.need(caller, Role::User)?;
        let id = JobId(order.id());
        let no = |why: &str| Err(Denial::Order(why.into()));
        if order.user.0 != caller {
            return no("is signed by another key than the caller's");
        }
        if self.jobs.contains_key(&id) {
            return Ok(id);
        }
        if order.scheduler != self.id {
            return no("is for another scheduler: run `karez join` with an invitation of the one you mean");
        }
        if order.institution != member.institution {
            return no(&format!(
                "names {}, but its user belongs to {}",
                order.institution, member.institution
            ));
        }
        if order.expires_at <= now.utc || order.issued_at > now.utc.after(CLOCK_SKEW_MAX) {
            return no("is dated wrongly or has expired: check this machine's clock and submit again");
        }
        if order.expires_at > now.utc.after(ORDER_LIFE_MAX).after(CLOCK_SKEW_MAX) {
            return no("may be accepted for too long: sign one that expires within a day");
        }
        if self.spent.contains(&id) {
            return no("was carried out before and is no longer listed: submit a new one");
        }
        contradictions(&order)?;
        self.forget_spent(now, out);
        if self.spent.len() >= SPENT_MAX {
            return Err(Denial::Queue {
                open: self.spent.len(),
                max: SPENT_MAX,
            });
        }
        let open = self.jobs.len() - self.ended.len();
        if open >= self.config.jobs_open_max {
            return Err(Denial::Queue {
                open,
                max: self.config.jobs_open_max,
            });
        }
        let mine = self
            .jobs
            .values()
            .filter(|j| j.order.user == order.user && !j.state.ended())
            .count();
        if mine >= self.config.jobs_open_user_max {
            return Err(Denial::Queue {
                open: mine,
                max: self.config.jobs_open_user_max,
            });
        }
        let has = self.budget(user(caller));
        if order.credits_max > has {
            return Err(Denial::Budget {
                has,
                wants: order.credits_max,
            });
        }
        let slots = self.slots(&order);
        let mut job = Job::new(
            order,
            label.chars().filter(|c| !c.is_control()).take(120).collect(),
            now.utc,
            slots,
        );
        if !wait && let Some(first) = job.parts.first() {
            let request = request(&job.order, first.items, first.ceiling, &[]);
            if let Err(refusal) = placement::place(&self.market, &request, &self.policy)
                && !refusal.passes_with_time()
            {
                return Err(Denial::Unplaceable(refusal));
            }
        }
        let mut changes = Vec::new();
        if job.reserved > Credits::ZERO {
            let evidence = vec![job.order.encode()];
            let (from, to) = (Account::User(job.order.user), Account::Escrow(id));
            let posting = Posting::transfer(PostingKind::Reserve, from, to, job.reserved, evidence).ok_or(
                Denial::Budget {
                    has,
                    wants: job.reserved,
                },
            )?;
            self.accounts.apply(&posting).map_err(Denial::Ledger)?;
            changes.push(Change::Post { posting, at: now.utc });
        }
        job.note(
            now.utc,
            None,
            format!("accepted: {} items in {} parts", job.order.items, job.parts.len()),
        );
        changes.push(put(JOBS, &id.0.0, &job));
        for (i, part) in (0u32..).zip(&job.parts) {
            changes.push(put(PARTS, &part_row(id, i), part));
        }
        self.jobs.insert(id, job);
        self.index(id);
        self.look_again = true;
        out.push(Effect::Persist(changes));
        out.push(Effect::Changed(id));
        Ok(id)
    }

    /// How many parts of this order could run at once on the nodes known now.
    fn slots(&self, order: &Order) -> u64 {
        let request = request(order, 1, Credits(u64::MAX), &[]);
        let (able, _) = placement::survey(&self.market, &request, &self.policy);
        let free = |c: &placement::Candidate| {
            let listing = self.market.get(&c.node)?;
            let device = listing.offer.devices.iter().find(|d| d.class == c.device_class)?;
            Some(u64::from(device.count))
        };
        able.iter().filter_map(free).sum::<u64>().max(1)
    }

    fn cancel(
        &mut self,
        now: Now,
        caller: PublicKey,
        id: JobId,
        out: &mut Vec<Effect>,
    ) -> Result<(), Denial> {
        let job = self.jobs.get(&id).filter(|j| j.order.user.0 == caller);
        let job = job.ok_or_else(|| Denial::NoJob(id.short()))?;
        if !job.state.ended() {
            self.end_job(now, id, JobState::Cancelled, "cancelled by its user".into(), out);
        }
        Ok(())
    }

    pub(super) fn fail_job(&mut self, now: Now, key: LeaseKey, cause: String, out: &mut Vec<Effect>) {
        self.set_part(now, &key, JobState::Failed, cause.clone(), out);
        self.end_job(now, key.job, JobState::Failed, cause, out);
    }

    /// Ends a job before its time: stops what runs, and gives back what is left in escrow.
    fn end_job(&mut self, now: Now, id: JobId, state: JobState, cause: String, out: &mut Vec<Effect>) {
        let Some(job) = self.jobs.get(&id) else { return };
        let open: Vec<PartIndex> = (0u32..)
            .zip(&job.parts)
            .filter(|(_, p)| !p.state.ended())
            .map(|(i, _)| i)
            .collect();
        for part in open {
            let key = self.jobs[&id].key(part);
            if let Some(claim) = self.claims.get(&key) {
                out.push(Effect::Send(
                    claim.node,
                    ToNode::Stop {
                        key,
                        cause: cause.clone(),
                    },
                ));
            }
            self.set_part(now, &key, JobState::Cancelled, cause.clone(), out);
        }
        if let Some(job) = self.jobs.get_mut(&id) {
            job.state = state;
            job.cause = cause;
        }
        self.close(now, id, out);
    }

    /// The job has ended: its row says so, escrow is emptied, and the oldest ended jobs make room.
    pub(super) fn close(&mut self, now: Now, id: JobId, out: &mut Vec<Effect>) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        job.changed_at = now.utc;
        let text = if job.cause.is_empty() {
            job.state.as_str().into()
        } else {
            format!("{}: {}", job.state.as_str(), job.cause)
        };
        job.note(now.utc, None, text);
        let mut changes = vec![put(JOBS, &id.0.0, job)];
        let left = self.accounts.balance(&Account::Escrow(id));
        let owner = Account::User(job.order.user);
        if let Ok(left @ 1..) = u64::try_from(left)
            && let Some(posting) = Posting::transfer(
                PostingKind::Release,
                Account::Escrow(id),
                owner,
                Credits(left),
                Vec::new(),
            )
            && self.accounts.apply(&posting).is_ok()
        {
            changes.push(Change::Post { posting, at: now.utc });
        }
        self.index(id);
        while self.ended.len() > self.config.jobs_kept {
            let Some((_, oldest)) = self.ended.pop_first() else {
                break;
            };
            if let Some(job) = self.jobs.remove(&oldest) {
                // Its order may come again while it could be accepted, and must not run or reserve twice.
                let until = job.order.expires_at;
                if until > now.utc {
                    self.spent.insert(oldest);
                    self.spent_until.insert((until, oldest));
                    changes.push(put(SPENT, &oldest.0.0, &until));
                }
                changes.push(Change::Delete {
                    table: JOBS,
                    key: oldest.0.0.to_vec(),
                });
                changes.extend((0u32..).zip(&job.parts).map(|(i, _)| Change::Delete {
                    table: PARTS,
                    key: part_row(oldest, i),
                }));
            }
        }
        out.push(Effect::Persist(changes));
        out.push(Effect::Changed(id));
    }

    /// Orders that have expired are refused by their date.
    fn forget_spent(&mut self, now: Now, out: &mut Vec<Effect>) {
        let mut changes = Vec::new();
        while let Some((until, job)) = self.spent_until.first().copied()
            && until <= now.utc
        {
            self.spent_until.remove(&(until, job));
            self.spent.remove(&job);
            changes.push(Change::Delete {
                table: SPENT,
                key: job.0.0.to_vec(),
            });
        }
        if !changes.is_empty() {
            out.push(Effect::Persist(changes));
        }
    }

    /// Keeps the queue and the list of ended jobs in step with a job's state.
    fn index(&mut self, id: JobId) {
        let Some(job) = self.jobs.get(&id) else { return };
        let place = (job.submitted_at, id);
        if !job.state.ended() && job.parts.iter().any(|p| p.state == JobState::Queued) {
            self.queue.insert(place);
        } else {
            self.queue.remove(&place);
        }
        if job.state.ended() {
            self.ended.insert(place);
        }
    }

    /// Moves a part, notes it, stores it, and lets the job's state follow.
    pub(super) fn set_part(
        &mut self,
        now: Now,
        key: &LeaseKey,
        state: JobState,
        cause: String,
        out: &mut Vec<Effect>,
    ) {
        let Some(job) = self.jobs.get_mut(&key.job) else {
            return;
        };
        let Some(part) = job.parts.get_mut(key.part as usize) else {
            return;
        };
        part.state = state;
        part.changed_at = now.utc;
        part.cause.clone_from(&cause);
        let mut changes = vec![put(PARTS, &part_row(key.job, key.part), part)];
        let place = match &part.plan {
            Some(plan) if part.in_flight() => format!(" on {}", plan.chosen.name),
            _ => String::new(),
        };
        let text = if cause.is_empty() {
            format!("{}{place}", state.as_str())
        } else {
            format!("{}{place}: {cause}", state.as_str())
        };
        job.note(now.utc, Some(key.part), text);
        let of_parts = job.state_of_parts();
        if !job.state.ended() && !of_parts.ended() && of_parts != job.state {
            job.state = of_parts;
            job.changed_at = now.utc;
            changes.push(put(JOBS, &key.job.0.0, job));
        }
        out.push(Effect::Persist(changes));
        out.push(Effect::Changed(key.job));
        self.index(key.job);
    }

    // Placing.

    /// Places what can be placed, oldest job first. A part that fits nowhere never holds up the ones behind it.
    fn place_all(&mut self, now: Now, out: &mut Vec<Effect>) {
        let order: Vec<JobId> = self.queue.iter().map(|(_, id)| *id).collect();
        let mut free = self.market.any_free();
        for id in order {
            // Nothing is free anywhere: only parts without a reason still need one.
            let told = |job: &Job| {
                job.parts
                    .iter()
                    .all(|p| p.state != JobState::Queued || !p.cause.is_empty())
            };
            if !free && self.jobs.get(&id).is_some_and(told) {
                continue;
            }
            if self.place_job(now, id, out) {
                free = self.market.any_free();
            }
        }
    }

    /// Says whether something was asked for.
    fn place_job(&mut self, now: Now, id: JobId, out: &mut Vec<Effect>) -> bool {
        let Some(job) = self.jobs.get(&id) else {
            return false;
        };
        let waiting: Vec<PartIndex> = (0u32..)
            .zip(&job.parts)
            .filter(|(_, p)| p.state == JobState::Queued)
            .map(|(i, _)| i)
            .collect();
        // Parts that differ in nothing that matters are refused alike: one refusal speaks for the rest.
        let mut refused: Option<(u64, Vec<NodeId>, placement::Refusal)> = None;
        let (mut asked, mut changed) = (false, false);
        for index in waiting {
            let Some(job) = self.jobs.get(&id) else { break };
            let part = &job.parts[index as usize];
            if part.not_before > now.mono {
                let at = part.not_before;
                self.hold_back(at);
                continue;
            }
            let alike = refused
                .as_ref()
                .is_some_and(|(items, avoid, _)| part.items >= *items && part.avoid == *avoid);
            if !alike {
                let request = request(&job.order, part.items, part.ceiling, &part.avoid);
                self.judged += self.market.len() as u64;
                match placement::place(&self.market, &request, &self.policy) {
                    Ok(plan) => {
                        self.ask(now, id, index, plan, out);
                        asked = true;
                        continue;
                    }
                    Err(refusal) => refused = Some((part.items, part.avoid.clone(), refusal)),
                }
            }
            if let Some((_, _, refusal)) = &refused {
                changed |= self.wait(now, id, index, refusal);
            }
        }
        if changed {
            out.push(Effect::Changed(id));
        }
        asked
    }

    /// Notes why a part waits. The reason is shown, not stored: it is found again after a restart.
    fn wait(&mut self, now: Now, id: JobId, index: PartIndex, refusal: &placement::Refusal) -> bool {
        use placement::Requirement::{Free, Untried};
        let Some(part) = self
            .jobs
            .get_mut(&id)
            .and_then(|j| j.parts.get_mut(index as usize))
        else {
            return false;
        };
        let why = refusal.to_string();
        let changed = part.cause != why;
        part.cause = why;
        if !part.avoid.is_empty() && refusal.excluded_by(Untried) {
            // When only those are left that failed at it, they may try again after a pause; when others are
            // merely busy, after a longer one: a node that is always busy must not hold the part for ever.
            let forgiven = part.changed_at.after(FORGIVE_AFTER);
            let pause = if !refusal.excluded_by(Free) {
                part.avoid.clear();
                Millis(BACKOFF.0 * u64::from(part.failures.clamp(1, 30)))
            } else if forgiven <= now.utc {
                part.avoid.clear();
                BACKOFF
            } else {
                return self.hold_until(now, forgiven, changed);
            };
            part.not_before = now.mono.after(pause);
            let at = part.not_before;
            self.hold_back(at);
        }
        changed
    }

    fn hold_until(&mut self, now: Now, until: UtcMillis, changed: bool) -> bool {
        self.hold_back(now.mono.after(Millis(until.0.saturating_sub(now.utc.0).max(1))));
        changed
    }

    fn hold_back(&mut self, until: MonoMillis) {
        self.retry_at = Some(self.retry_at.map_or(until, |at| at.min(until)));
    }

    /// Asks the chosen node. The new fence is on disk before the ask leaves.
    fn ask(&mut self, now: Now, id: JobId, index: PartIndex, plan: Plan, out: &mut Vec<Effect>) {
        let chosen = plan.chosen.clone();
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let Some(part) = job.parts.get_mut(index as usize) else {
            return;
        };
        part.fence += 1;
        part.asked_at = now.utc;
        part.items_done = 0;
        let why = plan.why();
        part.plan = Some(plan.clone());
        let Some(job) = self.jobs.get(&id) else { return };
        let part = &job.parts[index as usize];
        let ask = LeaseAsk {
            key: job.key(index),
            order: job.order.clone(),
            first_item: part.first_item,
            items: part.items,
            device_class: chosen.device_class.clone(),
            devices: 1,
            rate: chosen.rate,
            device_ms_max: self.limit_of(chosen.rate, part),
            ttl: self.config.lease_ttl,
            holders: self.holders(&job.order),
        };
        let key = ask.key;
        self.claim(key, &plan, now.mono.after(self.config.ask_timeout), false);
        self.set_part(now, &key, JobState::Placed, why, out);
        out.push(Effect::Send(chosen.node, ToNode::Ask(Box::new(ask))));
    }

    /// This scheduler's own store first, then nodes that say they hold the model.
    fn holders(&self, order: &Order) -> Vec<Holder> {
        let mut out = vec![Holder {
            key: self.id.0,
            addrs: self.config.artifact_addrs.clone(),
        }];
        let Some(model) = order.work.model() else {
            return out;
        };
        for (node, listing) in self.market.iter() {
            if out.len() > 4 {
                break;
            }
            if listing.connected
                && listing.offer.cached.contains(&model.digest)
                && !listing.offer.artifact_addrs.is_empty()
            {
                out.push(Holder {
                    key: node.0,
                    addrs: listing.offer.artifact_addrs.clone(),
                });
            }
        }
        out
    }

    // Claims.

    fn claim(&mut self, key: LeaseKey, plan: &Plan, deadline: MonoMillis, granted: bool) {
        let node = plan.chosen.node;
        let class = plan.chosen.device_class.clone();
        self.market.take(&node, &class, 1);
        self.claims_of.entry(node).or_default().insert(key);
        self.deadlines.insert((deadline, key));
        self.claims.insert(
            key,
            Claim {
                node,
                class,
                devices: 1,
                granted,
                deadline,
            },
        );
    }

    /// Moves a claim's deadline.
    fn due(&mut self, key: &LeaseKey, deadline: MonoMillis) {
        if let Some(claim) = self.claims.get_mut(key) {
            self.deadlines.remove(&(claim.deadline, *key));
            claim.deadline = deadline;
            self.deadlines.insert((deadline, *key));
        }
    }

    fn unclaim(&mut self, key: &LeaseKey) -> Option<Claim> {
        let claim = self.claims.remove(key)?;
        self.deadlines.remove(&(claim.deadline, *key));
        if let Some(keys) = self.claims_of.get_mut(&claim.node) {
            keys.remove(key);
            if keys.is_empty() {
                self.claims_of.remove(&claim.node);
            }
        }
        self.market.give_back(&claim.node, &claim.class, claim.devices);
        self.look_again = true;
        Some(claim)
    }

    /// Drops the claim of a node that itself said the lease is over.
    pub(super) fn release_claim(&mut self, key: &LeaseKey, node: NodeId) {
        if self.claims.get(key).is_some_and(|c| c.node == node) {
            self.unclaim(key);
        }
    }

    /// The part still needs this very attempt.
    pub(super) fn is_wanted(&self, key: &LeaseKey) -> bool {
        self.part(key)
            .is_some_and(|part| part.fence == key.fence && part.in_flight())
    }

    /// This attempt was placed on that node.
    pub(super) fn placed_on(&self, key: &LeaseKey, node: NodeId) -> bool {
        self.part(key).is_some_and(|part| {
            part.fence == key.fence && part.plan.as_ref().is_some_and(|plan| plan.chosen.node == node)
        })
    }

    pub(super) fn part(&self, key: &LeaseKey) -> Option<&Part> {
        self.jobs.get(&key.job)?.parts.get(key.part as usize)
    }

    pub(super) fn part_mut(&mut self, key: &LeaseKey) -> Option<&mut Part> {
        self.jobs.get_mut(&key.job)?.parts.get_mut(key.part as usize)
    }

    pub(super) fn name(&self, node: &NodeId) -> String {
        match self.market.get(node) {
            Some(listing) => listing.offer.name.clone(),
            None => self
                .members
                .get(&node.0)
                .map_or_else(|| node.short(), |m| m.name.clone()),
        }
    }

    /// Device time one lease of that part may bill.
    pub(super) fn limit_of(&self, rate: Rate, part: &Part) -> DeviceMillis {
        device_limit(rate, part.ceiling, self.config.device_time_max)
    }
}

/// The part is not placed there again soon.
fn avoid(part: &mut Part, node: NodeId) {
    if part.avoid.contains(&node) {
        return;
    }
    if part.avoid.len() >= AVOID_MAX {
        part.avoid.remove(0);
    }
    part.avoid.push(node);
}

/// What one part needs, for placement.
pub(super) fn request<'a>(
    order: &'a Order,
    items: u64,
    ceiling: Credits,
    avoid: &'a [NodeId],
) -> Request<'a> {
    let (units, fixed, memory) = Job::work_of(order, items);
    let mut artifacts: Vec<(Digest, Bytes)> = Vec::new();
    if let Some(model) = order.work.model() {
        artifacts.push((model.digest, model.bytes));
        artifacts.push((order.input.digest, order.input.bytes));
    }
    Request {
        kind: order.work.kind(),
        units,
        fixed,
        artifacts,
        constraints: &order.constraints,
        memory,
        ceiling,
        avoid,
    }
}

/// The most device time whose bill stays within `ceiling`.
fn device_limit(rate: Rate, ceiling: Credits, longest: Millis) -> DeviceMillis {
    let affordable = (u128::from(ceiling.0) * 3_600_000).checked_div(u128::from(rate.0));
    let affordable = affordable.map_or(u64::MAX, |ms| u64::try_from(ms).unwrap_or(u64::MAX));
    DeviceMillis(affordable.min(longest.0))
}

/// Wishes that no market could ever meet.
fn contradictions(order: &Order) -> Result<(), Denial> {
    let c = &order.constraints;
    let no = |why: String| Err(Denial::Order(why));
    if !c.countries.is_empty() && c.countries.iter().all(|code| c.countries_excluded.contains(code)) {
        return no(format!(
            "contradicts itself: every country it allows is also excluded ({})",
            c.countries[0]
        ));
    }
    if !c.institutions.is_empty()
        && c.institutions
            .iter()
            .all(|name| c.institutions_excluded.contains(name))
    {
        return no(format!(
            "contradicts itself: every institution it allows is also excluded ({})",
            c.institutions[0]
        ));
    }
    Ok(())
}
