//! The controller alone, event by event: what it places, believes, bills and keeps.
use super::*;
use crate::{
    artifact::{ArtifactKind, ArtifactRef},
    exchange::{FinishedLease, Held, LeaseAsk, Phase, Refusal, Report},
    id::{Digest, JobId, LeaseKey},
    market::tests::{node_of, offer_of, secret_of},
    money::{Account, Accounts, PostingKind},
    records::{
        Constraints, Delegation, Flag, Lease, MeterReading, Meters, Outcome, PARTS_MAX, Receipt, Signed,
        Usage, Work,
    },
    store::{Change, Stored},
    unit::{Bytes, DeviceMillis, MonoMillis, Now, Rate, UtcMillis},
};
use alloc::boxed::Box;
use proptest::prelude::*;

const START: u64 = 1_000_000;

fn config() -> ControllerConfig {
    ControllerConfig {
        secret: secret_of("scheduler"),
        name: "scheduler".into(),
        artifact_addrs: Vec::new(),
        admission: Admission::Invited,
        heartbeat: Millis(2_000),
        lease_ttl: Millis(15_000),
        reconnect_grace: Millis(8_000),
        ask_timeout: Millis(4_000),
        jobs_open_max: 100,
        jobs_open_user_max: 50,
        jobs_kept: 2,
        device_time_max: Millis(3_600_000),
        dispute_window: crate::records::DISPUTE_WINDOW,
        policy: placement::Policy::default(),
        shares: crate::fair::Shares::default(),
    }
}

mod keys;
mod life;
mod masks;
mod moves;
mod placing;
mod questions;
mod sequence;
mod trail;

struct Bench {
    c: Controller,
    disk: BTreeMap<(&'static str, Vec<u8>), Vec<u8>>,
    posted: Vec<PostingKind>,
    booked: Accounts,
    now: u64,
    base: u64,
    sequence: u64,
}

impl Bench {
    /// A scheduler with connected nodes, written as in `market_of`, and a user with ten credits.
    fn new(nodes: &str) -> Self {
        let c = Controller::restore(config(), Now::default(), &[], Accounts::default()).unwrap();
        let mut bench = Self {
            c,
            disk: BTreeMap::new(),
            posted: Vec::new(),
            booked: Accounts::default(),
            now: START,
            base: 0,
            sequence: 0,
        };
        bench.tell(Event::Started);
        bench.admit("user", Role::User, Credits(10_000_000));
        for text in nodes.split_whitespace() {
            let name = text.split(':').next().unwrap();
            bench.admit(name, Role::Node, Credits::ZERO);
            bench.tell(Event::NodeConnected(node_of(name)));
            bench.offer(text);
        }
        bench
    }

    fn admit(&mut self, name: &str, role: Role, credits: Credits) {
        self.admit_of("uni-nairobi", name, role, credits);
    }

    fn admit_of(&mut self, school: &str, name: &str, role: Role, credits: Credits) {
        let member = Member {
            role,
            institution: school.parse().unwrap(),
            name: name.into(),
            since: UtcMillis(0),
        };
        self.tell(Event::Admit {
            request: RequestId(0),
            key: PublicKey::of(&secret_of(name)),
            member,
            credits,
        });
    }

    fn offer(&mut self, text: &str) -> String {
        self.sequence += 1;
        let mut offer = offer_of(text, self.sequence).into_inner();
        offer.issued_at = UtcMillis(self.now);
        offer.expires_at = UtcMillis(self.now + 3_600_000);
        let trains = crate::records::Engine {
            work: crate::records::WorkKind::Train,
            ..offer.engines[0].clone()
        };
        offer.engines.push(trains);
        let (from, name) = (offer.node.0, offer.name.clone());
        let offer = Signed::sign(offer, &secret_of(&name));
        let out = self.tell(Event::Offer {
            request: RequestId(0),
            from,
            offer,
        });
        brief(&out)
    }

    fn clock(&self) -> Now {
        Now {
            utc: UtcMillis(self.now),
            mono: MonoMillis(self.now - self.base),
        }
    }

    fn tell(&mut self, event: Event) -> Vec<Effect> {
        let mut out = Vec::new();
        self.c.handle(self.clock(), event, &mut out);
        assert!(
            self.c.wake_at() > self.clock().mono,
            "it asks to be woken in the past"
        );
        let mut rest = Vec::new();
        for effect in out {
            match effect {
                Effect::Persist(changes) => {
                    for change in changes {
                        match change {
                            Change::Put { table, key, value } => {
                                self.disk.insert((table, key), value);
                            }
                            Change::Delete { table, key } => {
                                self.disk.remove(&(table, key));
                            }
                            Change::Post { posting, .. } => {
                                self.booked.apply(&posting).unwrap();
                                self.posted.push(posting.kind);
                            }
                        }
                    }
                }
                Effect::Changed(_) | Effect::Log(_) => {}
                other => rest.push(other),
            }
        }
        assert_eq!(*self.c.accounts(), self.booked);
        rest
    }

    fn wait(&mut self, ms: u64) -> Vec<Effect> {
        let until = self.now + ms;
        let mut out = Vec::new();
        loop {
            let wake = self.c.wake_at().0.saturating_add(self.base);
            if wake > until {
                self.now = until;
                return out;
            }
            self.now = wake;
            out.extend(self.tell(Event::Tick));
        }
    }

    fn restart(&mut self) {
        self.now += 1_000;
        self.base = self.now - 5;
        let stored: Vec<Stored> = self
            .disk
            .iter()
            .map(|((table, key), value)| Stored {
                table: (*table).into(),
                key: key.clone(),
                value: value.clone(),
            })
            .collect();
        self.c = Controller::restore(config(), self.clock(), &stored, self.booked.clone()).unwrap();
        self.tell(Event::Started);
    }

    fn submit(&mut self, order: &Verified<Order>) -> Vec<Effect> {
        self.tell(Event::Submit {
            request: RequestId(1),
            caller: order.user.0,
            order: order.clone(),
            label: String::new(),
            wait: true,
        })
    }

    fn hear(&mut self, name: &str, message: ToScheduler) -> Vec<Effect> {
        self.tell(Event::Heard(node_of(name), message))
    }

    fn report(&mut self, name: &str, held: &[(LeaseKey, Phase)]) -> Vec<Effect> {
        let held = held
            .iter()
            .map(|(key, phase)| Held {
                key: *key,
                phase: *phase,
                items_done: 1,
                tokens: 0,
                loss_micro: 0,
            })
            .collect();
        self.hear(name, ToScheduler::Report(Report { sequence: 1, held }))
    }

    fn part(&self, key: &LeaseKey) -> PartView {
        self.c.job(&key.job).unwrap().parts[key.part as usize].clone()
    }
}

/// An order of another user.
fn order_of(user: &str, school: &str, nonce: u64, change: impl FnOnce(&mut Order)) -> Verified<Order> {
    let key = secret_of(user);
    let mut order = order(nonce, change).into_inner();
    order.user = UserId(PublicKey::of(&key));
    order.institution = school.parse().unwrap();
    Signed::sign(order, &key)
}

fn order(nonce: u64, change: impl FnOnce(&mut Order)) -> Verified<Order> {
    let user = secret_of("user");
    let mut order = Order {
        user: UserId(PublicKey::of(&user)),
        institution: "uni-nairobi".parse().unwrap(),
        scheduler: config().id(),
        work: Work::Noop { millis_per_item: 100 },
        input: ArtifactRef {
            digest: Digest::of(b"input"),
            bytes: Bytes(100),
            kind: ArtifactKind::Blob,
        },
        items: 10,
        items_per_part: 10,
        constraints: Constraints::default(),
        credits_max: Credits(1_000_000),
        attempts_max: 3,
        nonce,
        issued_at: UtcMillis(START),
        expires_at: UtcMillis(START + 600_000),
    };
    change(&mut order);
    Signed::sign(order, &user)
}

fn asks(effects: &[Effect]) -> Vec<(NodeId, LeaseAsk)> {
    effects
        .iter()
        .filter_map(|e| match e {
            Effect::Send(node, ToNode::Ask(ask)) => Some((*node, (**ask).clone())),
            _ => None,
        })
        .collect()
}

fn the_ask(effects: &[Effect]) -> (NodeId, LeaseAsk) {
    let mut all = asks(effects);
    assert_eq!(all.len(), 1, "{}", brief(effects));
    all.remove(0)
}

fn brief(effects: &[Effect]) -> String {
    let name = |node: &NodeId| {
        ["a", "b", "c", "d"]
            .into_iter()
            .find(|n| node_of(n) == *node)
            .unwrap_or("?")
    };
    let one = |effect: &Effect| match effect {
        Effect::Send(node, ToNode::Ask(ask)) => format!("ask {} #{}", name(node), ask.key.fence),
        Effect::Send(node, ToNode::Stop { .. }) => format!("stop {}", name(node)),
        Effect::Send(node, ToNode::Settled { receipt, why, .. }) => match receipt {
            Some(r) => format!("settled {} for {}", name(node), r.credits.0),
            None => format!("settled {}: {why}", name(node)),
        },
        Effect::Send(node, ToNode::Renewed { renewals, stops, .. }) => {
            format!(
                "{} goes on with {}, stops {}",
                name(node),
                renewals.len(),
                stops.len()
            )
        }
        Effect::Reply(_, Reply::Refused(denial)) => format!("refused: {denial}"),
        Effect::Reply(_, reply) => format!("{reply:?}")
            .chars()
            .take_while(|c| c.is_alphabetic())
            .collect(),
        other => format!("{other:?}"),
    };
    effects.iter().map(one).collect::<Vec<_>>().join(", ")
}

fn grant(node: &str, ask: &LeaseAsk, change: impl FnOnce(&mut Lease)) -> Verified<Lease> {
    let mut lease = Lease {
        job: ask.key.job,
        part: ask.key.part,
        fence: ask.key.fence,
        node: node_of(node),
        scheduler: config().id(),
        institution: "uni-nairobi".parse().unwrap(),
        device_class: ask.device_class.clone(),
        devices: ask.devices,
        rate: ask.rate,
        device_ms_max: ask.device_ms_max,
        first_item: ask.first_item,
        items: ask.items,
        granted_at: UtcMillis(START),
        expires_at: UtcMillis(START + 15_000),
    };
    change(&mut lease);
    Signed::sign(lease, &secret_of(node))
}

/// The trail of a lease that ended after `ms`.
fn finished(node: &str, lease: Verified<Lease>, ms: u64, change: impl FnOnce(&mut Usage)) -> FinishedLease {
    let meters = Meters {
        device_ms: DeviceMillis(ms),
        items: lease.items,
        ..Meters::default()
    };
    let reading = Signed::sign(
        MeterReading {
            lease: lease.id(),
            node: lease.node,
            sequence: 0,
            previous: None,
            meters,
            method: "test/1".into(),
            taken_at: UtcMillis(START),
            mono: MonoMillis(1),
            benchmark: None,
        },
        &secret_of(node),
    );
    let mut usage = Usage {
        lease: lease.id(),
        node: lease.node,
        last_reading: reading.id(),
        readings: 1,
        meters,
        outcome: Outcome::Done,
        cause: String::new(),
        retryable: false,
        result: Some(ArtifactRef {
            digest: Digest::of(b"result"),
            bytes: Bytes(3),
            kind: ArtifactKind::Blob,
        }),
        started_at: UtcMillis(START),
        ended_at: UtcMillis(START),
    };
    change(&mut usage);
    FinishedLease {
        lease,
        readings: vec![reading],
        usage: Signed::sign(usage, &secret_of(node)),
    }
}

fn done(finished: FinishedLease) -> ToScheduler {
    ToScheduler::Finished(Box::new(finished))
}

fn failed(usage: &mut Usage) {
    usage.outcome = Outcome::Failed;
    usage.cause = "the device fell off the bus".into();
    usage.retryable = true;
    usage.result = None;
}

fn receipt_in(effects: &[Effect]) -> Verified<Receipt> {
    effects
        .iter()
        .find_map(|e| match e {
            Effect::Send(_, ToNode::Settled { receipt, .. }) => receipt.clone(),
            _ => None,
        })
        .unwrap()
}
