//! The controller itself: orders in, leases out, nodes watched.
use super::{
    ControllerConfig, Effect, Event, Member, Reply,
    accounting::{ANSWERS, Books, FLOORS, GRANTS, LIMITS, PAYMENTS, RATES},
    admission::{INVITATIONS, MEMBERS, Redeemed},
    forecast::Forecast,
    gang::Kept,
    guide::Guide,
    job::{JOBS, Job, PARTS, Part},
    keys::{DELEGATIONS, REVOKED},
    moving::{Moves, Room},
};
use super::{
    placing::device_limit,
    questions::{QUIET_MAX, SHUN},
};
use crate::{
    exchange::ToNode,
    fair::{FairShare, Work},
    id::{Digest, Institution, JobId, LeaseKey, RecordId},
    key::{NodeId, PublicKey, SchedulerId, UserId},
    market::Market,
    money::Accounts,
    placement::{Plan, Policy},
    prelude::*,
    records::{Delegation, Floors, Verified},
    routing::{Hearth, Prefix},
    store::{Change, Stored, StoredError, put, read},
    unit::{Credits, DeviceMillis, Millis, MonoMillis, Now, Portion, Rate, UtcMillis},
};
pub(super) const SPENT: &str = "spent";
pub(super) const SHARES: &str = "shares";
/// How far ahead of our clock an order may be dated.
pub(super) const CLOCK_SKEW_MAX: Millis = Millis(300_000);
/// Judgements of nodes per millisecond that placing may spend: with more waiting, the looks come less often.
pub(super) const JUDGEMENTS_PER_MS: u64 = 2_000;
/// Between two looks at most.
const LOOK_GAP_MAX: u64 = 1_000;
/// How long a node that refused, or a part that failed everywhere, is left alone.
pub(super) const BACKOFF: Millis = Millis(1_000);

/// A scheduler's mind.
pub struct Controller {
    pub(super) config: ControllerConfig,
    pub(super) id: SchedulerId,
    pub(super) policy: Policy,
    pub(super) market: Market,
    pub(super) members: BTreeMap<PublicKey, Member>,
    pub(super) invitations: BTreeMap<u64, Redeemed>,
    /// By the key they admit.
    pub(super) delegations: BTreeMap<PublicKey, Verified<Delegation>>,
    pub(super) revoked: BTreeMap<RecordId, UtcMillis>,
    pub(super) accounts: Accounts,
    pub(super) books: Books,
    pub(super) jobs: BTreeMap<JobId, Job>,
    /// Unfinished jobs with parts to place, oldest first.
    pub(super) queue: BTreeSet<(UtcMillis, JobId)>,
    /// Unfinished jobs of each user.
    pub(super) open_of: BTreeMap<UserId, BTreeSet<JobId>>,
    /// Ended jobs, oldest first: what is dropped when too many are kept.
    pub(super) ended: BTreeSet<(UtcMillis, JobId)>,
    /// Devices we believe are held for us, whether we still want them or not.
    pub(super) claims: BTreeMap<LeaseKey, Claim>,
    pub(super) claims_of: BTreeMap<NodeId, BTreeSet<LeaseKey>>,
    /// Their deadlines, in order.
    pub(super) deadlines: BTreeSet<(MonoMillis, LeaseKey)>,
    /// Jobs dropped from the list whose orders could still be accepted: not a second time.
    pub(super) spent: BTreeSet<JobId>,
    pub(super) spent_until: BTreeSet<(UtcMillis, JobId)>,
    pub(super) offers_refused: u64,
    /// Something changed that may let a queued part run.
    pub(super) look_again: bool,
    /// When parts that were held back may be tried.
    pub(super) retry_at: Option<MonoMillis>,
    /// Not to look before: a long queue before many nodes must not eat the scheduler.
    pub(super) look_at: MonoMillis,
    /// Judgements the last look took.
    pub(super) judged: u64,
    /// Whose turn it is.
    pub(super) fair: FairShare,
    /// Stored histories were counted with another half-life.
    pub(super) shares_stale: bool,
    /// What is kept for jobs that run all at once.
    pub(super) kept: BTreeMap<JobId, Kept>,
    /// Attempts that were called back, until their nodes' last word.
    pub(super) moving: BTreeSet<LeaseKey>,
    /// How often work of each institution was moved lately.
    pub(super) moves: Moves,
    /// Devices that guests leave for their institution's own people.
    pub(super) rooms: Vec<Room>,
    /// Machines whose owners want that, by institution.
    pub(super) locals: BTreeMap<Institution, BTreeSet<NodeId>>,
    /// When better places are looked for again, and from which attempt on.
    pub(super) improve_at: MonoMillis,
    pub(super) improved: LeaseKey,
    /// What the slow path last advised, if anything is scarce.
    pub(super) guide: Option<Guide>,
    /// When it may be asked again.
    pub(super) guide_at: MonoMillis,
    /// What is likely to come.
    pub(super) forecast: Forecast,
    /// What nodes keep warm.
    pub(super) hearth: Hearth,
    /// How the prompts of questions begin; at most [`PROMPTS_MAX`].
    pub(super) prompts: BTreeMap<JobId, Prefix>,
    /// Nodes that took a question and wrote nothing, and until when they are the last choice.
    pub(super) silent: BTreeMap<NodeId, MonoMillis>,
}

pub(super) struct Claim {
    pub(super) node: NodeId,
    pub(super) class: String,
    pub(super) devices: Portion,
    pub(super) granted: bool,
    /// Past it, the node is not believed to hold the lease any more.
    pub(super) deadline: MonoMillis,
    /// For whom, and at what worth, it counts as running.
    pub(super) counted: Option<(Institution, Credits)>,
}

impl Controller {
    /// The tables it keeps.
    pub const TABLES: &[&str] = &[
        MEMBERS,
        INVITATIONS,
        JOBS,
        PARTS,
        SPENT,
        ANSWERS,
        GRANTS,
        RATES,
        FLOORS,
        LIMITS,
        PAYMENTS,
        SHARES,
        DELEGATIONS,
        REVOKED,
    ];

    /// The mind as it was when the process last lived, with the book's balances. Follow with [`Event::Started`].
    pub fn restore(
        config: ControllerConfig,
        now: Now,
        stored: &[Stored],
        accounts: Accounts,
    ) -> Result<Self, StoredError> {
        let id = config.id();
        // What was promised counts, not what the settings say: histories are read by it.
        let signed = stored.iter().find(|pair| pair.table == FLOORS);
        let floors: Option<Floors> = signed.map(read).transpose()?;
        let shares = floors.as_ref().map_or(&config.shares, |f| &f.shares).clone();
        let mut c = Self {
            policy: config.policy.clone(),
            market: Market::new(config.policy.clone()),
            fair: FairShare::new(shares),
            config,
            id,
            members: BTreeMap::new(),
            invitations: BTreeMap::new(),
            delegations: BTreeMap::new(),
            revoked: BTreeMap::new(),
            accounts,
            books: Books {
                floors,
                ..Books::default()
            },
            jobs: BTreeMap::new(),
            queue: BTreeSet::new(),
            open_of: BTreeMap::new(),
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
            shares_stale: false,
            kept: BTreeMap::new(),
            moving: BTreeSet::new(),
            moves: Moves::default(),
            rooms: Vec::new(),
            locals: BTreeMap::new(),
            improve_at: MonoMillis::ZERO,
            improved: LeaseKey {
                job: JobId(Digest([0; 32])),
                part: 0,
                fence: 0,
            },
            guide: None,
            guide_at: MonoMillis::ZERO,
            forecast: Forecast::default(),
            hearth: Hearth::default(),
            prompts: BTreeMap::new(),
            silent: BTreeMap::new(),
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
                DELEGATIONS => {
                    let delegation: Verified<Delegation> = read(pair)?;
                    c.delegations.insert(delegation.key, delegation);
                }
                REVOKED => {
                    let id = Digest::try_from(pair.key.as_slice()).map_err(|e| bad(pair, &e.to_string()))?;
                    c.revoked.insert(id, read(pair)?);
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
                ANSWERS | GRANTS | PAYMENTS => {
                    let id = Digest::try_from(pair.key.as_slice()).map_err(|e| bad(pair, &e.to_string()))?;
                    match pair.table.as_str() {
                        ANSWERS => drop(c.books.answers.insert(id, read(pair)?)),
                        GRANTS => drop(c.books.grants.insert(id, read(pair)?)),
                        _ => drop(c.books.payments.insert(id)),
                    }
                }
                RATES => c.books.rates = Some(read(pair)?),
                LIMITS => {
                    let name = core::str::from_utf8(&pair.key)
                        .ok()
                        .and_then(|name| name.parse().ok());
                    let name = name.ok_or_else(|| bad(pair, "the key names no institution"))?;
                    c.books.limits.insert(name, read(pair)?);
                }
                SHARES => {
                    let name = core::str::from_utf8(&pair.key).ok().and_then(|n| n.parse().ok());
                    let name = name.ok_or_else(|| bad(pair, "the key is no institution"))?;
                    if !c.fair.restore(name, read(pair)?) {
                        c.shares_stale = true;
                    }
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

    /// The stored histories of use and contribution were counted with another half-life: count them anew with
    /// [`Self::recount`] before the first event.
    pub fn shares_stale(&self) -> bool {
        self.shares_stale
    }

    /// Counts the histories of use and contribution from what the book has settled, in any order, and gives what to
    /// store.
    pub fn recount(&mut self, works: impl Iterator<Item = Work>) -> Vec<Change> {
        let mut fair = FairShare::new(self.fair.shares().clone());
        for work in works {
            fair.note_work(&work);
        }
        fair.take_running(&mut self.fair);
        self.fair = fair;
        self.shares_stale = false;
        let accounts = self.fair.accounts();
        accounts
            .map(|(name, account)| put(SHARES, name.as_str().as_bytes(), account))
            .collect()
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
            Event::Started | Event::Tick => self.expire_grants(now, out),
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
            Event::Prompt { job, prefix } => self.on_prompt(job, prefix),
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
            Event::File {
                request,
                caller,
                filed,
            } => self.on_file(now, request, caller, filed, out),
            Event::Delegate {
                request,
                caller,
                delegation,
            } => self.on_delegate(now, request, caller, delegation, out),
            Event::Revoke { request, caller, key } => self.on_revoke(now, request, caller, key, out),
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
            self.make_room(now, out);
            let gap = (self.judged / JUDGEMENTS_PER_MS).min(LOOK_GAP_MAX);
            self.look_at = now.mono.after(Millis(gap));
        }
    }

    fn on_time(&mut self, now: Now, out: &mut Vec<Effect>) {
        for node in self.market.expire(now.mono) {
            out.push(Effect::Log(format!("the offer of {} expired", node.short())));
            self.hearth.forget(&node);
        }
        while let Some((at, key)) = self.deadlines.first().copied()
            && at <= now.mono
        {
            let Some(claim) = self.unclaim(&key) else {
                self.deadlines.remove(&(at, key));
                continue;
            };
            let name = self.name(&claim.node);
            let connected = self
                .market
                .get(&claim.node)
                .is_some_and(|listing| listing.connected);
            let why = if claim.granted && connected && self.must_speak(&key) {
                self.market.note_silence(&claim.node);
                self.silent.retain(|_, until| *until > now.mono);
                self.silent.insert(claim.node, now.mono.after(SHUN));
                let cause = "nothing was written".to_string();
                out.push(Effect::Send(claim.node, ToNode::Stop { key, cause }));
                format!("{name} took it and then wrote nothing for {} ms", QUIET_MAX.0)
            } else if claim.granted {
                format!("no word from {name} any more")
            } else {
                format!("{name} did not answer")
            };
            self.market.note_failure(&claim.node);
            self.lost(now, key, &claim.node, why, out);
        }
        self.improve(now, out);
        if self.retry_at.is_some_and(|at| at <= now.mono) {
            self.retry_at = None;
            self.look_again = true;
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
    pub(super) fn limit_of(&self, rate: Rate, part: &Part, devices: Portion) -> DeviceMillis {
        device_limit(rate, part.ceiling, devices.time(self.config.device_time_max))
    }
}
