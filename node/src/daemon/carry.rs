//! Carrying effects out: first to the disk, then to the world.
use super::{Daemon, DaemonError, Guest, INPUTS_MAX, Input, MODELS};
use crate::{
    artifacts::at_host,
    control::Request,
    runner::{self, Ended, Job, Told},
    session::Link,
    stop::stop,
    wait::Backoff,
};
use karez_core::{
    agent::{Effect, Event, Exit, OwnerCommand, WorkerMeters, needs},
    artifact::ArtifactRef,
    exchange::{Fetch, LeaseAsk, Refusal, ToNode, ToScheduler},
    id::LeaseKey,
    key::SchedulerId,
    records::{Order, Verified},
    store::Change,
    unit::{Bytes, Portion, WHOLE},
};
use karez_ledger::{Op, StoreError, Transaction};
use std::{collections::BTreeSet, sync::Arc, time::Duration};
use tokio::sync::watch;

/// A transaction is not made larger than this by putting several events into it.
const TRANSACTION_BYTES: usize = 1 << 20;
/// The scheduler must have said where its artifacts are within this, or a push is tried again later.
const PUSH_ADDR_MAX: Duration = Duration::from_secs(10);

impl Daemon {
    /// Stores what must be stored, then carries out the rest. False when told to leave before it could be stored.
    pub(super) async fn settle(
        &mut self,
        out: &mut Vec<Effect>,
        leave: &mut watch::Receiver<bool>,
    ) -> Result<bool, DaemonError> {
        // First of all: once the rest is stored, nobody here remembers the lease.
        for receipt in out.iter().filter_map(|effect| match effect {
            Effect::Keep(receipt) => Some(receipt),
            _ => None,
        }) {
            if let Err(error) = self.receipts.keep(receipt) {
                tracing::error!(%error, receipt = %receipt.id(), "a receipt could not be kept in the node's folder");
            }
        }
        let mut transactions: Vec<Transaction> = Vec::new();
        let mut rest = Vec::new();
        let mut bytes = usize::MAX;
        for effect in out.drain(..) {
            let Effect::Persist(changes) = effect else {
                rest.push(effect);
                continue;
            };
            // What the agent stores together stays together; what merely arrived together may be cut.
            let more: usize = changes.iter().map(size).sum();
            bytes = bytes.saturating_add(more);
            if bytes > TRANSACTION_BYTES {
                transactions.push(Transaction {
                    ops: std::mem::take(&mut self.own),
                });
                bytes = more;
            }
            if let Some(transaction) = transactions.last_mut() {
                transaction.ops.extend(changes.into_iter().map(op));
            }
        }
        for transaction in transactions {
            if !self.commit(transaction, leave).await? {
                return Ok(false);
            }
        }
        for effect in rest {
            self.carry_out(effect);
        }
        Ok(true)
    }

    /// Commits, however long the disk stays full. False when told to leave first: nothing of the batch has then left
    /// the process, so forgetting it harms nobody.
    async fn commit(
        &mut self,
        transaction: Transaction,
        leave: &mut watch::Receiver<bool>,
    ) -> Result<bool, DaemonError> {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(10));
        loop {
            let error = match self.writer.commit(transaction.clone()).await {
                Ok(_) => {
                    if self.stalled.take().is_some() {
                        tracing::info!("the state can be stored again: taking leases");
                    }
                    return Ok(true);
                }
                Err(
                    error @ (StoreError::DiskFull { .. } | StoreError::Io { .. } | StoreError::Index { .. }),
                ) => error,
                Err(error) => return Err(error.into()),
            };
            if self.stalled.is_none() {
                tracing::error!(%error, "the state cannot be stored: no leases are taken until it can");
            }
            self.stalled = Some(error.to_string());
            let again = tokio::time::sleep(backoff.next());
            tokio::pin!(again);
            loop {
                tokio::select! {
                    biased;
                    _ = leave.wait_for(|leave| *leave) => return Ok(false),
                    () = &mut again => break,
                    Some(request) = self.requests.recv() => self.obey_stalled(request),
                    Some(input) = self.inputs.recv(), if self.waiting.len() < INPUTS_MAX => self.put_off(input),
                }
            }
        }
    }

    /// The owner comes first even when nothing can be stored: guests leave now, the books follow.
    fn obey_stalled(&mut self, request: Request) {
        if let Some(word) = request.command.owner() {
            if word == OwnerCommand::Reclaim {
                self.tools.warm.close();
                for guest in self.guests.values() {
                    guest
                        .stopper
                        .stop(Duration::from_millis(self.config.timing.reclaim_grace.0));
                }
            }
            // Before everything else that waits, but in the order in which it was said.
            let said = self
                .waiting
                .iter()
                .take_while(|input| matches!(input, Input::Owner(_)))
                .count();
            self.waiting.insert(said, Input::Owner(word));
        }
        let _ = request.answer.send(self.status());
    }

    /// Keeps an input for later, except for asks: a refusal promises nothing and may leave at once.
    fn put_off(&mut self, input: Input) {
        match input {
            Input::Heard(scheduler, said) if matches!(*said, ToNode::Ask(_)) => {
                if let ToNode::Ask(ask) = *said {
                    let why = Refusal::Unable {
                        why: "the node's disk is full".into(),
                    };
                    self.say(scheduler, ToScheduler::Refused { key: ask.key, why });
                }
            }
            other => self.waiting.push_back(other),
        }
    }

    pub(super) fn say(&mut self, to: SchedulerId, message: ToScheduler) {
        if let Some(link) = self.links.get_mut(&to)
            && !link.say(message)
        {
            // The session's task notices that its link is gone, and says why.
            self.links.remove(&to);
        }
    }

    fn carry_out(&mut self, effect: Effect) {
        match effect {
            Effect::Persist(_) | Effect::Keep(_) => {}
            Effect::Send(to, message) => {
                if let ToScheduler::Refused { key, .. } = &message {
                    self.pins.remove(key);
                }
                self.say(to, message);
            }
            Effect::Fetch { key, fetch } => self.fetch(key, fetch),
            Effect::Start {
                key,
                order,
                first_item,
                items,
                device_class,
                devices,
                slot,
                from,
            } => {
                let held = (devices, slot);
                self.start_lease(key, order, first_item, items, &device_class, held, from);
            }
            Effect::Stop { key, grace } => {
                if let Some(guest) = self.guests.get(&key) {
                    // Killing takes a moment too, and the owner's deadline is the owner's.
                    let margin = (grace.0 / 4).min(250);
                    guest.stopper.stop(Duration::from_millis(grace.0 - margin));
                }
            }
            Effect::Push { key, to, artifact } => self.push(key, to, artifact),
            Effect::Forget { key } => {
                self.pins.remove(&key);
                if let Some(fetch) = self.fetches.remove(&key) {
                    fetch.abort();
                }
            }
            Effect::Advertise(offer) => {
                self.offers.send_replace(Some(Arc::new(offer.encode())));
            }
            Effect::Log(text) => tracing::info!("{text}"),
        }
    }

    /// Stores the input that came with an ask, and keeps what its part needs if all of that is here.
    pub(super) fn take_along(&mut self, ask: &mut LeaseAsk) {
        let store = self.tools.artifacts.store();
        let input = &ask.order.input;
        if !ask.input.is_empty() {
            // It dies with the lease, so the disk is not waited for. What cannot be stored is fetched, or says why not.
            let kept = store.add_unsynced(&ask.input);
            if kept.is_ok_and(|kept| kept != *input) {
                tracing::warn!(lease = %ask.key, "the input that came with the ask is another than the order's");
                ask.input.clear();
            }
        }
        let needs = needs(&ask.order, ask.from);
        let pins: Vec<_> = needs
            .iter()
            .map_while(|artifact| store.pin(artifact).ok())
            .collect();
        ask.here = !needs.is_empty() && pins.len() == needs.len();
        if ask.here && !self.pins.contains_key(&ask.key) {
            self.pins.insert(ask.key, pins);
        }
    }

    fn fetch(&mut self, key: LeaseKey, mut fetch: Fetch) {
        // A scheduler among the holders is reached where its welcome said, whatever the ask says.
        for holder in &mut fetch.holders {
            if let Some(known) = self.known.get(&SchedulerId(holder.key)) {
                let addrs = at_host(&holder.addrs, &known.control_addr);
                let more = known.artifact_addrs.borrow().clone();
                holder.addrs = addrs.into_iter().chain(more).collect();
                let mut seen = BTreeSet::new();
                holder.addrs.retain(|addr| seen.insert(addr.clone()));
            }
        }
        let (artifacts, back) = (self.tools.artifacts.clone(), self.back.clone());
        let task = tokio::spawn(async move {
            let input = match artifacts.fetch(&fetch.artifacts, &fetch.holders).await {
                Ok((pins, bytes_in)) => Input::Fetched { key, pins, bytes_in },
                // Another node may have room, a better link, or the artifact itself.
                Err(error) => Input::from(Event::FetchFailed {
                    key,
                    why: error.to_string(),
                    retryable: true,
                }),
            };
            let _ = back.send(input).await;
        });
        if let Some(before) = self.fetches.insert(key, task.abort_handle()) {
            before.abort();
        }
    }

    #[expect(clippy::too_many_arguments, reason = "the fields of one effect")]
    fn start_lease(
        &mut self,
        key: LeaseKey,
        order: Verified<Order>,
        first_item: u64,
        items: u64,
        device_class: &str,
        (devices, slot): (Portion, u32),
        from: Option<ArtifactRef>,
    ) {
        if let Some(model) = order.work.model()
            && self.tools.artifacts.is_model(model)
        {
            self.own.push(Op::Put {
                table: MODELS,
                key: model.digest.0.to_vec(),
                value: Vec::new(),
            });
            self.refresh_serving();
        }
        let device = self.found.devices.iter().find(|d| d.class == device_class);
        let (count, memory) = device.map_or((1, Bytes::ZERO), |d| (d.count.max(1), d.memory));
        let slot = devices.is_share().then(|| (device_class.to_owned(), slot));
        // Who shares a device goes where the others of it are. The agent promises no more devices than there are, so
        // the free ones suffice for the rest.
        let beside = self
            .guests
            .values()
            .find(|guest| slot.is_some() && guest.slot == slot);
        let taken: BTreeSet<&String> = self.guests.values().flat_map(|guest| &guest.gpus).collect();
        let free = device
            .into_iter()
            .flat_map(|d| &d.gpus)
            .filter(|gpu| !taken.contains(gpu));
        let gpus: Vec<String> = match beside {
            Some(guest) => guest.gpus.clone(),
            None => free.take(devices.touched() as usize).cloned().collect(),
        };
        let of_one = (u32::from(self.found.threads) / count).max(1);
        let threads = u64::from(of_one) * u64::from(devices.milli()) / u64::from(WHOLE);
        let job = Job {
            key,
            order,
            first_item,
            items,
            from,
            threads: u16::try_from(threads.max(1))
                .unwrap_or(u16::MAX)
                .min(self.found.threads),
            memory: Bytes(
                devices
                    .memory_of_one(memory)
                    .0
                    .saturating_mul(devices.touched().into()),
            ),
            share_milli: devices.share_milli(),
            gpus: gpus.clone(),
            context_tokens: self.config.limits.context_tokens,
        };
        let (stopper, stopped) = stop();
        self.guests.insert(key, Guest { stopper, gpus, slot });
        if let Some(link) = self.links.get(&job.order.scheduler) {
            let with = match job.order.work.is_served() {
                true => "its provider's own server".to_owned(),
                false => format!("{} threads", job.threads),
            };
            link.log(key, format!("started on {} with {with}", self.config.name));
        }
        let (tools, back) = (self.tools.clone(), self.back.clone());
        let progress = back.clone();
        let pieces = self.links.get(&job.order.scheduler).map(Link::pieces);
        let tell = Arc::new(move |told| match told {
            // The next one says more.
            Told::Meters(meters) => drop(progress.try_send(Input::from(Event::Progress { key, meters }))),
            // Straight to the wire: it must not wait for the disk.
            Told::Piece(piece) => pieces.iter().for_each(|pieces| pieces.say(key, piece.clone())),
            Told::Alive => pieces.iter().for_each(|pieces| pieces.alive(key)),
        });
        tokio::spawn(async move {
            let lease = tokio::spawn(async move { runner::run(job, &tools, stopped, tell).await });
            // Even a bug in the runner ends the lease, and only the lease.
            let ended = lease.await.unwrap_or_else(|error| Ended {
                exit: Exit::Failed {
                    why: format!("the node failed: {error}"),
                    retryable: true,
                },
                meters: WorkerMeters::default(),
                pin: None,
            });
            let _ = back
                .send(Input::Ended {
                    key,
                    ended: Box::new(ended),
                })
                .await;
        });
    }

    fn push(&mut self, key: LeaseKey, to: SchedulerId, artifact: ArtifactRef) {
        let Some(known) = self.known.get(&to) else {
            let why = "this scheduler is no longer in node.toml".into();
            let _ = self.back.try_send(Input::from(Event::PushFailed { key, why }));
            return;
        };
        let mut addrs = known.artifact_addrs.clone();
        let (artifacts, back) = (self.tools.artifacts.clone(), self.back.clone());
        tokio::spawn(async move {
            let pushed = async {
                // After a restart the pin of the result is gone with the old process.
                let _pin = artifacts.pin(&artifact).await?;
                let known = async {
                    addrs
                        .wait_for(|addrs| !addrs.is_empty())
                        .await
                        .ok()
                        .map(|addrs| addrs.clone())
                };
                let Ok(Some(to_addrs)) = tokio::time::timeout(PUSH_ADDR_MAX, known).await else {
                    return Err("the scheduler has not said where it takes results".into());
                };
                artifacts
                    .push(artifact, to.0, &to_addrs)
                    .await
                    .map_err(|error| error.to_string())
            };
            let event = match pushed.await {
                Ok(()) => Event::Pushed { key },
                Err(why) => Event::PushFailed { key, why },
            };
            let _ = back.send(Input::from(event)).await;
        });
    }

    /// Tells the agent which models are here and where they are served.
    pub(super) fn refresh_serving(&self) {
        let (artifacts, back) = (self.tools.artifacts.clone(), self.back.clone());
        let set = self.config.listen.artifact_addrs.clone();
        let towards: Vec<String> = self
            .known
            .values()
            .map(|known| known.control_addr.clone())
            .collect();
        tokio::spawn(async move {
            let cached = artifacts.cached().await;
            let addrs = artifacts.addrs(&set, &towards).await;
            let _ = back.send(Input::from(Event::Serving { cached, addrs })).await;
        });
    }
}

fn size(change: &Change) -> usize {
    match change {
        Change::Put { key, value, .. } => key.len() + value.len(),
        Change::Delete { key, .. } => key.len(),
        Change::Post { .. } => 1024,
    }
}

fn op(change: Change) -> Op {
    match change {
        Change::Put { table, key, value } => Op::Put { table, key, value },
        Change::Delete { table, key } => Op::Delete { table, key },
        // A node keeps no ledger: its agent never posts, and the writer would refuse.
        Change::Post { posting, at } => Op::Post(posting, at),
    }
}
