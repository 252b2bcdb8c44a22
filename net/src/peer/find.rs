//! Finding schedulers: what the address book says, and what is remembered of it.
use super::{
    ADDRS_PER_PEER_MAX, COMMANDS_MAX, FoundScheduler, KNOWN_SCHEDULERS_MAX, PeerError, PeerEvent, Reply,
    Role, SCHEDULERS_KEY, TICK, task::Task,
};
use crate::identity;
use libp2p::{
    Multiaddr, PeerId,
    kad::{self, store::RecordStore},
    multiaddr::Protocol,
};
use std::{
    collections::{BTreeSet, HashSet},
    num::NonZeroUsize,
};
use tokio::time::Instant;

/// A search under way: first who provides the key, then where they are.
#[derive(Default)]
pub(super) struct Find {
    waiting: Vec<Reply<Vec<FoundScheduler>>>,
    queries: HashSet<kad::QueryId>,
    found: BTreeSet<PeerId>,
}

impl Task {
    /// Notes a scheduler, and tells the application when this is news.
    pub(super) fn learn(&mut self, peer: PeerId, addrs: Vec<Multiaddr>) {
        if peer == *self.swarm.local_peer_id()
            || (self.known.len() >= KNOWN_SCHEDULERS_MAX && !self.known.contains_key(&peer))
        {
            return;
        }
        let Some(key) = identity::from_peer_id(&peer) else {
            return;
        };
        let first_time = !self.known.contains_key(&peer);
        let known = self.known.entry(peer).or_default();
        let mut news = first_time;
        for mut addr in addrs {
            if matches!(addr.iter().last(), Some(Protocol::P2p(_))) {
                addr.pop();
            }
            if !known.contains(&addr) {
                if known.len() >= ADDRS_PER_PEER_MAX {
                    known.remove(0);
                }
                known.push(addr.clone());
                news = true;
            }
        }
        if news {
            let addrs = known.clone();
            // When the channel is full the application learns of it by `find_schedulers`.
            let found = PeerEvent::SchedulerFound(FoundScheduler { key, addrs });
            drop(self.events.try_send(found));
        }
    }

    pub(super) fn start_find(&mut self, reply: Option<Reply<Vec<FoundScheduler>>>) {
        let find = self.find.get_or_insert_default();
        if let Some(reply) = reply {
            if find.waiting.len() >= COMMANDS_MAX {
                drop(reply.send(Err(PeerError::Busy)));
                return;
            }
            find.waiting.push(reply);
        }
        if find.queries.is_empty() {
            let key = kad::RecordKey::new(&SCHEDULERS_KEY);
            find.queries
                .insert(self.swarm.behaviour_mut().kad.get_providers(key));
        }
    }

    pub(super) fn on_kad(&mut self, event: kad::Event) {
        match event {
            kad::Event::InboundRequest {
                request: kad::InboundRequest::AddProvider { record: Some(record) },
            } if record.key.as_ref() == SCHEDULERS_KEY => {
                // A full store means the table of schedulers is full: drop it.
                drop(self.swarm.behaviour_mut().kad.store_mut().add_provider(record));
            }
            kad::Event::OutboundQueryProgressed { id, result, step, .. } => {
                self.on_query(id, result, step.last);
            }
            _ => {}
        }
    }

    fn on_query(&mut self, id: kad::QueryId, result: kad::QueryResult, last: bool) {
        let ours = self.find.as_ref().is_some_and(|f| f.queries.contains(&id));
        if !ours {
            return;
        }
        match result {
            kad::QueryResult::GetProviders(Ok(kad::GetProvidersOk::FoundProviders { providers, .. })) => {
                for peer in providers.into_iter().take(KNOWN_SCHEDULERS_MAX) {
                    self.on_provider(peer);
                }
            }
            kad::QueryResult::GetClosestPeers(result) => {
                let peers = match result {
                    Ok(ok) => ok.peers,
                    Err(kad::GetClosestPeersError::Timeout { peers, .. }) => peers,
                };
                for info in peers {
                    let found = self
                        .find
                        .as_ref()
                        .is_some_and(|f| f.found.contains(&info.peer_id));
                    if found && !info.addrs.is_empty() {
                        self.learn(info.peer_id, info.addrs);
                    }
                }
            }
            _ => {}
        }
        if last && let Some(find) = self.find.as_mut() {
            find.queries.remove(&id);
            if find.queries.is_empty() {
                self.end_find();
            }
        }
    }

    fn on_provider(&mut self, peer: PeerId) {
        let news = self.find.as_mut().is_some_and(|f| f.found.insert(peer));
        if !news || peer == *self.swarm.local_peer_id() {
            return;
        }
        let kad = &mut self.swarm.behaviour_mut().kad;
        let addrs: Vec<_> = kad
            .kbucket(peer)
            .into_iter()
            .flat_map(|bucket| {
                bucket
                    .iter()
                    .filter(|entry| *entry.node.key.preimage() == peer)
                    .flat_map(|entry| entry.node.value.iter().cloned().collect::<Vec<_>>())
                    .collect::<Vec<_>>()
            })
            .take(ADDRS_PER_PEER_MAX)
            .collect();
        if addrs.is_empty() && self.known.get(&peer).is_none_or(Vec::is_empty) {
            let one = NonZeroUsize::MIN;
            let query = kad.get_n_closest_peers(peer.to_bytes(), one);
            if let Some(find) = self.find.as_mut() {
                find.queries.insert(query);
            }
        } else {
            self.learn(peer, addrs);
        }
    }

    fn end_find(&mut self) {
        let Some(find) = self.find.take() else { return };
        for peer in find.found {
            self.learn(peer, Vec::new());
        }
        if self.role == Role::Node && self.known.is_empty() {
            // Nothing found: look again at the next tick rather than at the next refresh.
            self.refresh_at = Instant::now() + TICK;
        }
        let answer: Vec<_> = self
            .known
            .iter()
            .filter_map(|(id, addrs)| {
                Some(FoundScheduler {
                    key: identity::from_peer_id(id)?,
                    addrs: addrs.clone(),
                })
            })
            .collect();
        for reply in find.waiting {
            drop(reply.send(Ok(answer.clone())));
        }
    }
}
