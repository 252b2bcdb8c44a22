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

mod masks;
mod moves;

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

#[test]
fn a_job_is_placed_run_billed_and_its_rest_given_back() {
    let mut bench = Bench::new("a:1gpu@2 b:1gpu@1");
    let order = order(1, |_| {});
    let out = bench.submit(&order);
    assert_eq!(brief(&out), "Submitted, ask b #1");
    assert_eq!(
        bench.c.budget(order.user),
        Credits(9_000_000),
        "its ceiling is set aside"
    );
    let (_, ask) = the_ask(&out);
    let lease = grant("b", &ask, |_| {});
    bench.hear("b", ToScheduler::Granted(lease.clone()));
    assert_eq!(bench.part(&ask.key).state, JobState::Running);
    bench.now += 3_600;
    let out = bench.hear("b", done(finished("b", lease.clone(), 3_600, |_| {})));
    assert_eq!(brief(&out), "settled b for 1000");
    let job = bench.c.job(&ask.key.job).unwrap();
    assert_eq!(
        (job.state, job.spent, job.items_done),
        (JobState::Done, Credits(1_000), 10)
    );
    assert_eq!(bench.c.budget(order.user), Credits(9_999_000));
    assert_eq!(
        bench.posted,
        [
            PostingKind::Grant,
            PostingKind::Reserve,
            PostingKind::Settle,
            PostingKind::Release
        ]
    );
    // The usage comes again, because its acknowledgement was lost: nothing is billed twice.
    let again = bench.hear("b", done(finished("b", lease, 3_600, |_| {})));
    assert_eq!(brief(&again), "settled b: another attempt counts");
    assert_eq!(bench.posted.len(), 4);
    bench.restart();
    assert_eq!(
        bench.c.job(&ask.key.job).unwrap().items_done,
        10,
        "what is done stays done"
    );
}

#[test]
fn a_refused_order_leaves_no_trace() {
    type Change = fn(&mut Order);
    let cases: [(&str, Change, &str); 12] = [
        (
            "over budget",
            |o| o.credits_max = Credits(10_000_001),
            "the budget holds 10.000000",
        ),
        (
            "another scheduler's",
            |o| o.scheduler = SchedulerId(PublicKey([1; 32])),
            "the order is for another",
        ),
        (
            "another institution's",
            |o| o.institution = "usp-brazil".parse().unwrap(),
            "the order names usp",
        ),
        (
            "expired",
            |o| o.expires_at = UtcMillis(START),
            "the order is dated wrongly",
        ),
        (
            "of the future",
            |o| o.issued_at = UtcMillis(START + 400_000),
            "the order is dated wrongly",
        ),
        (
            "acceptable for years",
            |o| o.expires_at = UtcMillis(START + ORDER_LIFE_MAX.0 * 2),
            "the order may be accepted for too long",
        ),
        (
            "contradictory",
            |o| {
                o.constraints.countries = vec!["KE".parse().unwrap()];
                o.constraints.countries_excluded = vec!["KE".parse().unwrap()];
            },
            "the order contradicts itself",
        ),
        (
            "late before it begins",
            |o| o.constraints.deadline = Some(UtcMillis(START - 60_000)),
            "the order contradicts itself: its deadline lies 60 s in the past",
        ),
        (
            "paid and donated",
            |o| {
                o.constraints.donated_only = true;
                o.constraints.rate_max = Some(Rate(1_000_000));
            },
            "the order contradicts itself: only donated capacity is wanted, and up to 1.000000/h",
        ),
        (
            "licensed nothing",
            |o| o.constraints.licence = "mit".into(),
            "the order contradicts itself: it runs no model, yet names the licence mit",
        ),
        (
            "too late for any node",
            |o| {
                o.work = Work::Noop {
                    millis_per_item: 60_000,
                };
                o.constraints.deadline = Some(UtcMillis(START + 60_000));
            },
            "none of 1 known nodes can run it: 1 excluded by deadline (the nearest would end 550 s late)",
        ),
        (
            "impossible",
            |o| o.constraints.device = "tpu".into(),
            "none of 1 known nodes can run it",
        ),
    ];
    for (name, change, expected) in cases {
        let mut bench = Bench::new("a:1gpu@1");
        let (disk, posted) = (bench.disk.clone(), bench.posted.len());
        let order = order(1, change);
        let out = bench.tell(Event::Submit {
            request: RequestId(1),
            caller: PublicKey::of(&secret_of("user")),
            order,
            label: String::new(),
            wait: false,
        });
        let got = brief(&out);
        assert!(got.starts_with(&format!("refused: {expected}")), "{name}: {got}");
        assert_eq!((bench.disk, bench.posted.len()), (disk, posted), "{name}");
    }
}

#[test]
fn a_cancelled_job_stops_and_pays_nothing() {
    let mut bench = Bench::new("a:1gpu@1");
    let order = order(1, |_| {});
    let (_, ask) = the_ask(&bench.submit(&order));
    let stranger = Event::Cancel {
        request: RequestId(2),
        caller: PublicKey::of(&secret_of("a")),
        job: ask.key.job,
    };
    assert!(brief(&bench.tell(stranger)).starts_with("refused: there is no job"));
    let cancel = Event::Cancel {
        request: RequestId(2),
        caller: order.user.0,
        job: ask.key.job,
    };
    assert_eq!(brief(&bench.tell(cancel.clone())), "stop a, Cancelled");
    assert_eq!(bench.c.budget(order.user), Credits(10_000_000));
    // The node had finished it just before: nothing is paid, and the trail is kept.
    let lease = grant("a", &ask, |_| {});
    bench.now += 1_000;
    let out = bench.hear("a", done(finished("a", lease, 1_000, |_| {})));
    assert_eq!(receipt_in(&out).flags, [Flag::NotDone]);
    assert_eq!(bench.c.job(&ask.key.job).unwrap().state, JobState::Cancelled);
    assert_eq!(brief(&bench.tell(cancel)), "Cancelled", "twice is once");
    assert_eq!(bench.c.offers()[0].leases, 0);
}

#[test]
fn what_cannot_be_billed_is_run_elsewhere() {
    type Lie = fn(LeaseAsk) -> FinishedLease;
    let cases: [(&str, Lie); 5] = [
        ("no readings", |ask| {
            let mut f = finished("a", grant("a", &ask, |_| {}), 100, |_| {});
            f.readings.clear();
            f
        }),
        ("dearer", |ask| {
            finished(
                "a",
                grant("a", &ask, |l| l.rate = Rate(l.rate.0 + 1)),
                100,
                |_| {},
            )
        }),
        ("fewer items", |ask| {
            finished("a", grant("a", &ask, |l| l.items = 1), 100, |_| {})
        }),
        ("for another account", |ask| {
            let other = |l: &mut Lease| l.institution = "usp-brazil".parse().unwrap();
            finished("a", grant("a", &ask, other), 100, |_| {})
        }),
        ("no result", |ask| {
            finished("a", grant("a", &ask, |_| {}), 100, |u| u.result = None)
        }),
    ];
    for (name, lie) in cases {
        let mut bench = Bench::new("a:1gpu@1 b:1gpu@2");
        let (node, ask) = the_ask(&bench.submit(&order(1, |_| {})));
        assert_eq!(node, node_of("a"));
        let posted = bench.posted.len();
        let out = bench.hear("a", done(lie(ask)));
        assert_eq!(the_ask(&out).0, node_of("b"), "{name}");
        assert_eq!(bench.posted.len(), posted, "{name}");
    }
}

#[test]
fn nobody_settles_for_another() {
    let mut bench = Bench::new("a:1gpu@1 b:1gpu@2");
    let (_, ask) = the_ask(&bench.submit(&order(1, |_| {})));
    let of_a = finished("a", grant("a", &ask, |_| {}), 100, |_| {});
    assert_eq!(brief(&bench.hear("b", done(of_a.clone()))), "", "another's trail");
    let forged = finished("b", grant("b", &ask, |_| {}), 100, |_| {});
    let out = brief(&bench.hear("b", done(forged)));
    assert_eq!(out, "settled b: the part was placed on another node");
    assert!(
        bench.part(&ask.key).state == JobState::Placed,
        "and the part is still with the first"
    );
    bench.now += 100;
    assert_eq!(brief(&bench.hear("a", done(of_a))), "settled a for 28");
}

#[test]
fn the_bill_is_the_smallest_of_measured_observed_leased_and_reserved() {
    for (name, ran, says, ceiling, expected, flags) in [
        ("as it was", 3_600, 3_600, 1_000_000, 1_000, &[][..]),
        ("a little long", 3_600, 4_000, 1_000_000, 1_000, &[]),
        (
            "far too long",
            3_600,
            90_000,
            1_000_000,
            1_000,
            &[Flag::LongerThanObserved],
        ),
        ("over its lease", 18_000, 18_000, 4_000, 4_000, &[Flag::OverLease]),
    ] {
        let mut bench = Bench::new("a:1gpu@1");
        let (_, ask) = the_ask(&bench.submit(&order(1, |o| o.credits_max = Credits(ceiling))));
        bench.now += ran;
        let out = bench.hear("a", done(finished("a", grant("a", &ask, |_| {}), says, |_| {})));
        let receipt = receipt_in(&out);
        assert_eq!(
            (receipt.credits.0, &receipt.flags[..]),
            (expected, flags),
            "{name}"
        );
        assert!(receipt.billed <= receipt.observed, "{name}");
    }
}

#[test]
fn a_silent_node_loses_the_part_and_may_bring_it_back_until_it_is_placed_anew() {
    let mut bench = Bench::new("a:1gpu@1");
    let (_, ask) = the_ask(&bench.submit(&order(1, |o| o.attempts_max = 9)));
    let lease = grant("a", &ask, |_| {});
    bench.hear("a", ToScheduler::Granted(lease.clone()));
    bench.tell(Event::NodeGone(node_of("a")));
    assert_eq!(brief(&bench.wait(7_900)), "");
    assert_eq!(bench.part(&ask.key).state, JobState::Running);
    bench.wait(200);
    assert_eq!(bench.part(&ask.key).state, JobState::Queued);
    bench.tell(Event::NodeConnected(node_of("a")));
    let out = brief(&bench.report("a", &[(ask.key, Phase::Running)]));
    assert!(out.contains("a goes on with 1, stops 0"), "{out}");
    assert_eq!(bench.part(&ask.key).state, JobState::Running);
    // Gone again, and another takes it: now the first is stopped.
    bench.admit("b", Role::Node, Credits::ZERO);
    bench.tell(Event::NodeConnected(node_of("b")));
    bench.offer("b:1gpu@1");
    bench.tell(Event::NodeGone(node_of("a")));
    assert_eq!(brief(&bench.wait(9_000)), "ask b #2");
    bench.tell(Event::NodeConnected(node_of("a")));
    let out = brief(&bench.report("a", &[(ask.key, Phase::Running)]));
    assert_eq!(out, "a goes on with 0, stops 1");
    let late = bench.hear("a", done(finished("a", lease, 100, |_| {})));
    assert_eq!(brief(&late), "settled a: another attempt counts");
}

#[test]
fn a_grant_that_comes_late_is_taken_when_nothing_replaced_it() {
    let mut bench = Bench::new("a:1gpu@1");
    let (_, ask) = the_ask(&bench.submit(&order(1, |_| {})));
    assert_eq!(
        brief(&bench.wait(4_001)),
        "",
        "the ask timed out, and no other node is left"
    );
    assert_eq!(bench.part(&ask.key).state, JobState::Queued);
    let lease = grant("a", &ask, |_| {});
    assert_eq!(brief(&bench.hear("a", ToScheduler::Granted(lease.clone()))), "");
    assert_eq!(bench.part(&ask.key).state, JobState::Running);
    let out = bench.hear("a", done(finished("a", lease, 100, |_| {})));
    assert!(brief(&out).starts_with("settled a for"));
}

#[test]
fn one_attempt_counts_as_one_failure() {
    let mut bench = Bench::new("a:1gpu@1");
    let (_, ask) = the_ask(&bench.submit(&order(1, |o| o.attempts_max = 2)));
    bench.wait(4_001);
    // Given up, hence counted; its own word comes later and is only written down.
    let late = finished("a", grant("a", &ask, |_| {}), 0, failed);
    assert!(brief(&bench.hear("a", done(late))).starts_with("settled a for 0"));
    assert_eq!(bench.part(&ask.key).state, JobState::Queued);
    let (_, second) = the_ask(&bench.wait(5_000));
    let lease = grant("a", &second, |_| {});
    bench.hear("a", done(finished("a", lease, 0, failed)));
    let job = bench.c.job(&ask.key.job).unwrap();
    assert_eq!(job.state, JobState::Failed);
    assert!(job.cause.contains("failed 2 times"), "{}", job.cause);
}

#[test]
fn a_scheduler_restart_adopts_what_runs_and_gives_up_who_never_comes() {
    let mut bench = Bench::new("a:1gpu@1 b:1gpu@1");
    let out = bench.submit(&order(1, |o| {
        o.items_per_part = 5;
        o.attempts_max = 5;
    }));
    let all = asks(&out);
    let of = |name: &str| all.iter().find(|(n, _)| *n == node_of(name)).unwrap().1.key;
    let (of_a, of_b) = (of("a"), of("b"));
    bench.restart();
    bench.tell(Event::NodeConnected(node_of("a")));
    bench.offer("a:1gpu@1,busy");
    let out = brief(&bench.report("a", &[(of_a, Phase::Running)]));
    assert_eq!(out, "a goes on with 1, stops 0", "nothing is asked twice");
    let mut out = Vec::new();
    for _ in 0..8 {
        out.extend(bench.wait(2_000));
        out.extend(bench.report("a", &[(of_a, Phase::Running)]));
    }
    assert!(asks(&out).is_empty());
    assert_eq!(
        bench.part(&of_b).state,
        JobState::Queued,
        "b was waited for as long as its lease could last"
    );
    assert_eq!(bench.part(&of_a).state, JobState::Running);
    // The answer names the part that was lost, under its next fence.
    assert_eq!(bench.offer("a:2gpu@1"), "OfferTaken, ask a #2");
    let part = bench.part(&of_b);
    assert_eq!((part.state, part.fence), (JobState::Placed, 2));
}

#[test]
fn the_only_node_left_is_tried_again_after_a_pause() {
    let mut bench = Bench::new("a:1gpu@1");
    let (_, ask) = the_ask(&bench.submit(&order(1, |o| o.attempts_max = 5)));
    let out = bench.hear("a", done(finished("a", grant("a", &ask, |_| {}), 0, failed)));
    assert!(asks(&out).is_empty(), "not at once");
    assert!(
        bench.part(&ask.key).cause.contains("untried"),
        "{}",
        bench.part(&ask.key).cause
    );
    assert_eq!(the_ask(&bench.wait(1_100)).1.key.fence, 2);
    // Others that are always busy do not keep it from being tried again for ever.
    let mut bench = Bench::new("a:1gpu@1 b:1gpu@1,busy");
    let (_, ask) = the_ask(&bench.submit(&order(1, |o| o.attempts_max = 5)));
    bench.hear("a", done(finished("a", grant("a", &ask, |_| {}), 0, failed)));
    assert!(asks(&bench.wait(50_000)).is_empty());
    assert_eq!(the_ask(&bench.wait(20_000)).1.key.fence, 2);
}

#[test]
fn a_refusal_costs_a_moment_and_no_attempt() {
    let mut bench = Bench::new("a:1gpu@1 b:1gpu@2");
    let (_, ask) = the_ask(&bench.submit(&order(1, |o| o.attempts_max = 1)));
    let why = Refusal::Policy {
        why: "not today".into(),
    };
    let out = bench.hear("a", ToScheduler::Refused { key: ask.key, why });
    assert_eq!(brief(&out), "");
    assert_eq!(brief(&bench.wait(200)), "ask b #2");
    // A price that rose is heard of in time, by the next offer.
    let why = Refusal::Price { now: Rate(9) };
    let key = LeaseKey { fence: 2, ..ask.key };
    bench.hear("b", ToScheduler::Refused { key, why });
    bench.wait(200);
    assert_eq!(bench.offer("b:1gpu@3"), "OfferTaken, ask b #3");
}

#[test]
fn every_waiting_part_says_why() {
    let mut bench = Bench::new("a:1gpu@1");
    let out = bench.submit(&order(1, |o| o.items_per_part = 1));
    assert_eq!(asks(&out).len(), 1);
    let job = bench.c.jobs(None, false, 1).remove(0);
    let waiting: Vec<&PartView> = job.parts.iter().filter(|p| p.state == JobState::Queued).collect();
    assert_eq!(waiting.len(), 9);
    for part in waiting {
        assert!(part.cause.contains("1 excluded by free device"), "{}", part.cause);
    }
}

#[test]
fn institutions_take_turns_whoever_came_first() {
    let mut bench = Bench::new("a:1gpu@1");
    bench.admit_of("usp-brazil", "first", Role::User, Credits(10_000_000));
    bench.admit_of("hanoi", "second", Role::User, Credits(10_000_000));
    let flood = order_of("first", "usp-brazil", 1, |o| o.items_per_part = 1);
    let (_, mut ask) = the_ask(&bench.submit(&flood));
    let small = order_of("second", "hanoi", 2, |o| o.items_per_part = 5);
    assert!(asks(&bench.submit(&small)).is_empty(), "the only device is taken");
    let mut turns = Vec::new();
    for _ in 0..4 {
        bench.now += 100;
        let lease = grant("a", &ask, |_| {});
        ask = the_ask(&bench.hear("a", done(finished("a", lease, 100, |_| {})))).1;
        turns.push(if ask.key.job.0 == small.id() {
            "second"
        } else {
            "first"
        });
    }
    // Both have used as much after one part each: names decide, and then the second's job is done.
    assert_eq!(turns, ["second", "second", "first", "first"]);
    // What each used is remembered through a restart.
    let before = bench.c.fair.standings(UtcMillis(bench.now));
    assert_eq!(before.len(), 3, "{before:?}");
    bench.restart();
    let after = bench.c.fair.standings(UtcMillis(bench.now));
    assert_eq!(
        before.iter().map(|s| (s.used, s.given)).collect::<Vec<_>>(),
        after.iter().map(|s| (s.used, s.given)).collect::<Vec<_>>()
    );
}

#[test]
fn a_full_queue_before_a_busy_node_holds_up_nobody_else() {
    let mut bench = Bench::new("a:1gpu@1,KE b:1gpu@9,BR");
    let in_kenya = |nonce| {
        order(nonce, |o| {
            o.credits_max = Credits(10_000);
            o.constraints.countries = vec!["KE".parse().unwrap()];
        })
    };
    assert_eq!(the_ask(&bench.submit(&in_kenya(1))).0, node_of("a"));
    for nonce in 2..40 {
        assert!(asks(&bench.submit(&in_kenya(nonce))).is_empty());
    }
    let (node, ask) = the_ask(&bench.submit(&order(99, |_| {})));
    assert_eq!(node, node_of("b"));
    // And again after it, while the queue stands.
    bench.now += 1_000;
    bench.hear("b", done(finished("b", grant("b", &ask, |_| {}), 1_000, |_| {})));
    assert_eq!(the_ask(&bench.submit(&order(100, |_| {}))).0, node_of("b"));
}

#[test]
fn scarce_devices_are_kept_for_what_can_run_nowhere_else() {
    let mut bench = Bench::new("");
    bench.admit("a", Role::Node, Credits::ZERO);
    bench.tell(Event::NodeConnected(node_of("a")));
    let offer = |bench: &mut Bench, free| {
        bench.sequence += 1;
        let mut offer = offer_of("a:1gpu/scarce@1", bench.sequence).into_inner();
        offer.issued_at = UtcMillis(bench.now);
        offer.expires_at = UtcMillis(bench.now + 3_600_000);
        let mut other = offer.devices[0].clone();
        other.class = "gpu/other".into();
        other.rate = Rate(2_000_000);
        offer.devices.push(other);
        for device in &mut offer.devices {
            device.free = free;
        }
        bench.tell(Event::Offer {
            request: RequestId(0),
            from: offer.node.0,
            offer: Signed::sign(offer, &secret_of("a")),
        })
    };
    offer(&mut bench, 0);
    // The one that could run on either is older, and the scarce device is the cheaper.
    let either = order(1, |o| o.constraints.device = "gpu".into());
    bench.submit(&either);
    bench.now += 10;
    let only = order(2, |o| o.constraints.device = "gpu/scarce".into());
    bench.submit(&only);
    bench.now += 1_000;
    let mut placed: Vec<(bool, String)> = asks(&offer(&mut bench, 1))
        .into_iter()
        .map(|(_, ask)| (ask.key.job.0 == only.id(), ask.device_class))
        .collect();
    placed.sort();
    assert_eq!(
        placed,
        [(false, "gpu/other".to_owned()), (true, "gpu/scarce".to_owned())]
    );
}

/// Random markets and orders: what is explained beforehand is what placement then does.
#[test]
fn explanations_agree_with_placement() {
    let cases: u64 = if std::env::var_os("KAREZ_LONG").is_some() {
        50_000
    } else {
        2_000
    };
    let mut state = 7u64;
    let mut draw = |end: u64| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % end
    };
    let (mut placed, mut waiting, mut refused, mut contradictory) = (0, 0, 0, 0);
    let mut bench = Bench::new("");
    for case in 0..cases {
        if case % 20 == 0 {
            bench = Bench::new("");
            bench.admit("user", Role::User, Credits(1_000_000_000));
            for name in ["a", "b", "c", "d"] {
                bench.admit(name, Role::Node, Credits::ZERO);
            }
        }
        let name = ["a", "b", "c", "d"][draw(4) as usize];
        let country = ["KE", "BR"][draw(2) as usize];
        let state = [
            "",
            ",paused",
            ",busy",
            ",fast",
            ",4G",
            ",iso=seccomp",
            ",data=personal",
            ",never=uni-nairobi",
        ][draw(8) as usize];
        bench.offer(&format!("{name}:{}gpu@{},{country}{state}", 1 + draw(3), draw(4)));
        bench.tell(if draw(5) == 0 {
            Event::NodeGone(node_of(name))
        } else {
            Event::NodeConnected(node_of(name))
        });
        bench.now += 600;
        // What was held back goes first.
        bench.tell(Event::Tick);
        let order = order(case, |o| {
            o.issued_at = UtcMillis(bench.now);
            o.expires_at = UtcMillis(bench.now + 600_000);
            o.items_per_part = draw(3) as u32 * 5;
            o.credits_max = Credits([0, 50, 300, 1_000_000][draw(4) as usize]);
            let c = &mut o.constraints;
            if draw(3) == 0 {
                c.countries = vec!["KE".parse().unwrap()];
            }
            if draw(6) == 0 {
                c.countries_excluded = vec!["KE".parse().unwrap()];
            }
            c.donated_only = draw(6) == 0;
            c.rate_max = (draw(5) == 0).then(|| Rate(draw(3) * 1_000_000));
            c.memory = Bytes([0, 8 << 30, 64 << 30][draw(3) as usize]);
            c.devices = [0, 0, 0, 2][draw(4) as usize];
            if draw(5) == 0 {
                c.isolation = crate::records::Tier::Seccomp;
            }
            if draw(6) == 0 {
                c.data = crate::records::DataClass::Personal;
            }
            c.deadline = (draw(4) == 0).then(|| UtcMillis(bench.now + 500 + draw(60_000)));
        });
        let told = bench.c.explain_order(bench.clock(), &order);
        let out = bench.tell(Event::Submit {
            request: RequestId(1),
            caller: order.user.0,
            order: order.clone(),
            label: String::new(),
            wait: false,
        });
        let text = brief(&out);
        let asked: Vec<LeaseAsk> = asks(&out)
            .into_iter()
            .map(|(_, ask)| ask)
            .filter(|ask| ask.key.job.0 == order.id())
            .collect();
        if text.starts_with("refused: the order contradicts itself")
            || text.contains("refused: the order contradicts")
        {
            contradictory += 1;
            assert!(
                told.summary.contains("contradicts itself"),
                "case {case}: {told:?}"
            );
        } else if text.contains("refused") {
            refused += 1;
            assert_eq!(told.starts, Start::Never, "case {case}: {text}: {told:?}");
            assert!(
                text.contains(&format!("refused: {}", told.refusal)),
                "case {case}: {text}"
            );
        } else if asked.is_empty() {
            waiting += 1;
            assert!(
                matches!(told.starts, Start::In(_) | Start::Unknown),
                "case {case}: {told:?}"
            );
            let cause = bench.c.job(&JobId(order.id())).unwrap().parts[0].cause.clone();
            // A deadline keeps work from being accepted, not from being placed once it is.
            if order.constraints.deadline.is_none() {
                assert_eq!(cause, told.refusal.to_string(), "case {case}");
            }
        } else {
            placed += 1;
            assert_eq!(told.starts, Start::Now, "case {case}: {told:?}");
            let first = bench.part(&asked[0].key);
            let best = told.candidates.iter().find(|c| !c.busy).unwrap();
            assert_eq!(asked[0].key.part, 0, "case {case}");
            let chosen = told
                .candidates
                .iter()
                .find(|c| Some(c.node) == first.node)
                .unwrap();
            // Where the slow path has advice for its kind, that goes before the cheapest.
            assert!(
                chosen.score == best.score || bench.c.guide.is_some(),
                "case {case}: {told:?}"
            );
            assert_eq!(chosen.cost, first.cost_estimate, "case {case}");
            let (low, high) = told.cost.unwrap();
            assert!(low <= high && high <= order.credits_max, "case {case}: {told:?}");
        }
        // Some of what was asked is refused again, so that not everything fills up.
        for ask in asked {
            if draw(2) == 0 {
                let node = told
                    .candidates
                    .iter()
                    .find(|c| Some(c.node) == bench.part(&ask.key).node);
                let caller = order.user.0;
                let job = ask.key.job;
                bench.tell(Event::Cancel {
                    request: RequestId(2),
                    caller,
                    job,
                });
                if let Some(name) = node.map(|n| n.name.clone()) {
                    bench.hear(
                        &name,
                        done(finished(&name, grant(&name, &ask, |_| {}), 1, failed)),
                    );
                }
            }
        }
    }
    let counts = [placed, waiting, refused, contradictory];
    assert!(counts.iter().all(|n| *n > cases / 100), "{counts:?}");
}

#[test]
fn a_node_that_only_says_it_works_does_not_keep_the_part_for_ever() {
    let mut bench = Bench::new("a:1gpu@1");
    let (_, ask) = the_ask(&bench.submit(&order(1, |o| o.attempts_max = 1)));
    let mut said = String::new();
    for _ in 0..30 {
        bench.now += 3_600_000;
        said = brief(&bench.report("a", &[(ask.key, Phase::Running)]));
        if bench.c.jobs_open() == 0 {
            break;
        }
        bench.c.handle(bench.clock(), Event::Tick, &mut Vec::new());
    }
    assert_eq!(bench.c.jobs_open(), 0, "{said}");
}

#[test]
fn an_old_order_is_not_carried_out_twice() {
    let mut bench = Bench::new("a:9gpu@1");
    let first = order(1, |_| {});
    for nonce in 1..=5 {
        let order = order(nonce, |_| {});
        let (_, ask) = the_ask(&bench.submit(&order));
        bench.now += 10;
        bench.hear("a", done(finished("a", grant("a", &ask, |_| {}), 10, |_| {})));
    }
    assert_eq!(bench.c.jobs(None, true, 100).len(), 2, "older ones made room");
    bench.restart();
    let posted = bench.posted.len();
    assert!(brief(&bench.submit(&first)).contains("was carried out before"));
    assert_eq!(bench.posted.len(), posted);
    // Once it has expired its date refuses it, and nothing more need be remembered.
    bench.now += 600_000;
    assert!(brief(&bench.submit(&first)).contains("has expired"));
    bench.submit(&order(9, |o| o.expires_at = UtcMillis(START + 1_200_000)));
    assert_eq!(bench.disk.keys().filter(|(t, _)| *t == "spent").count(), 0);
}

#[test]
fn an_idle_scheduler_sleeps() {
    let mut bench = Bench::new("a:1gpu@1");
    assert_eq!(
        bench.c.wake_at().0,
        START + 3_600_000,
        "until the next offer expires"
    );
    bench.now += 3_600_000;
    bench.tell(Event::Tick);
    assert_eq!(bench.c.wake_at().0, u64::MAX);
}

#[test]
fn an_operator_lists_a_key_once() {
    let mut bench = Bench::new("");
    let member = |role| Member {
        role,
        institution: "usp-brazil".parse().unwrap(),
        name: "again".into(),
        since: UtcMillis(9),
    };
    let mut admit = |role| {
        let out = bench.tell(Event::Admit {
            request: RequestId(0),
            key: PublicKey::of(&secret_of("user")),
            member: member(role),
            credits: Credits(5),
        });
        format!("{:?}", out[0])
    };
    assert!(admit(Role::User).contains("uni-nairobi"), "what stands is told");
    assert!(admit(Role::Node).contains("WrongRole"));
    let user = UserId(PublicKey::of(&secret_of("user")));
    assert_eq!(
        bench.booked.balance(&Account::User(user)),
        10_000_000,
        "and nothing is granted twice"
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn a_job_is_cut_without_gap_overlap_or_overspending(
        items in 1u64..10_000_000,
        per_part in prop_oneof![Just(0u32), 1_000u32..100_000],
        credits in 0u64..=i64::MAX as u64,
        slots in 1u64..100_000,
    ) {
        let order = order(1, |o| {
            o.items = items;
            o.items_per_part = per_part;
            o.credits_max = Credits(credits);
        });
        let job = Job::new(order, String::new(), UtcMillis(0), slots);
        let mut next = 0;
        let mut sum = 0u128;
        for part in &job.parts {
            prop_assert_eq!(part.first_item, next);
            prop_assert!(part.items > 0);
            next += part.items;
            sum += u128::from(part.ceiling.0);
        }
        prop_assert_eq!(next, items);
        prop_assert!(sum <= u128::from(credits));
        prop_assert!(job.parts.len() as u64 <= PARTS_MAX);
    }
}

/// Thirty training steps in parts of ten.
fn training() -> Verified<Order> {
    order(1, |order| {
        order.work = Work::Train(crate::records::Train {
            model: order.input,
            model_name: "base".into(),
            settings: "{}".into(),
            language: "sw".into(),
            tokens_per_step: 10,
        });
        order.items = 30;
        order.credits_max = Credits(300_000);
    })
}

fn state(name: &str) -> Option<ArtifactRef> {
    Some(ArtifactRef {
        digest: Digest::of(name.as_bytes()),
        bytes: Bytes(3),
        kind: ArtifactKind::Blob,
    })
}

#[test]
fn parts_in_sequence_follow_each_other_from_state_to_state() {
    let mut bench = Bench::new("a:2gpu@3 b:2gpu@3");
    let out = bench.submit(&training());
    let (node, ask) = the_ask(&out);
    assert_eq!((ask.key.part, ask.from), (0, None));
    let name = if node == node_of("a") { "a" } else { "b" };
    let mut ask = ask;
    for part in 0..3u32 {
        assert_eq!((ask.key.part, ask.first_item), (part, u64::from(part) * 10));
        let spent = bench.c.job(&ask.key.job).unwrap().spent;
        let ceiling = Credits(300_000).saturating_sub(spent);
        let most = DeviceMillis(ceiling.0 * 3_600_000 / ask.rate.0).min(DeviceMillis(3_600_000));
        assert_eq!(ask.device_ms_max, most, "each may cost what those before it left");
        let lease = grant(name, &ask, |_| {});
        bench.hear(name, ToScheduler::Granted(lease.clone()));
        bench.now += 10_000;
        let result = format!("step {}", (part + 1) * 10);
        let done = finished(name, lease, 9_000, |usage| usage.result = state(&result));
        let out = bench.hear(name, ToScheduler::Finished(Box::new(done)));
        if part < 2 {
            let (node, next) = the_ask(&out);
            assert_eq!(node, node_of(name), "it stays where its state is");
            assert_eq!(next.from, state(&result));
            ask = next;
        } else {
            assert!(asks(&out).is_empty());
        }
        if part == 0 {
            bench.restart();
            bench.tell(Event::NodeConnected(node_of(name)));
            bench.offer(&format!("{name}:2gpu@3"));
        }
    }
    assert_eq!(bench.c.job(&ask.key.job).unwrap().state, JobState::Done);
}

#[test]
fn what_a_reclaimed_attempt_left_goes_along() {
    let mut bench = Bench::new("a:1gpu@3 b:1gpu@4");
    let (_, ask) = the_ask(&bench.submit(&training()));
    let lease = grant("a", &ask, |_| {});
    bench.hear("a", ToScheduler::Granted(lease.clone()));
    bench.now += 5_000;
    let left = finished("a", lease, 4_000, |usage| {
        usage.outcome = Outcome::Reclaimed;
        usage.retryable = true;
        usage.result = state("step 4");
    });
    let mut out = bench.hear("a", ToScheduler::Finished(Box::new(left)));
    out.extend(bench.wait(1_000));
    let (_, again) = the_ask(&out);
    assert_eq!((again.key.part, again.from), (0, state("step 4")));
    let part = bench.part(&again.key);
    assert_eq!(
        (part.credits, part.left),
        (Credits::ZERO, state("step 4")),
        "and it cost nothing"
    );
    // A crash leaves nothing: what was left before still counts.
    let lease = grant("a", &again, |_| {});
    bench.hear("a", ToScheduler::Granted(lease.clone()));
    bench.now += 5_000;
    let crashed = finished("a", lease, 4_000, |usage| {
        usage.outcome = Outcome::Failed;
        usage.retryable = true;
        usage.result = None;
        usage.cause = "the worker crashed".into();
    });
    let mut out = bench.hear("a", ToScheduler::Finished(Box::new(crashed)));
    out.extend(bench.wait(1_000));
    let (node, third) = the_ask(&out);
    assert_eq!((node, third.from), (node_of("b"), state("step 4")));
}

/// One job of one part, done on node b for 1000 micro-credits: its lease and its receipt.
fn settled(bench: &mut Bench, nonce: u64) -> (Verified<Lease>, Verified<Receipt>) {
    let out = bench.submit(&order(nonce, |_| {}));
    let (_, ask) = the_ask(&out);
    let lease = grant("b", &ask, |_| {});
    bench.hear("b", ToScheduler::Granted(lease.clone()));
    bench.now += 3_600;
    let out = bench.hear("b", done(finished("b", lease.clone(), 3_600, |_| {})));
    (lease, receipt_in(&out))
}

fn file(bench: &mut Bench, who: &str, filed: Filed) -> String {
    let caller = PublicKey::of(&secret_of(who));
    brief(&bench.tell(Event::File {
        request: RequestId(0),
        caller,
        filed,
    }))
}

fn disputed(lease: &Verified<Lease>, receipt: &Verified<Receipt>, who: &str) -> (Filed, Digest) {
    let dispute = crate::records::Dispute {
        receipt: receipt.id(),
        user: user(PublicKey::of(&secret_of(who))),
        reason: "half of it is missing".into(),
        evidence: Vec::new(),
        issued_at: receipt.issued_at,
    };
    let dispute = Signed::sign(dispute, &secret_of(who));
    let id = dispute.id();
    (
        Filed::Dispute(Box::new((lease.clone(), receipt.clone(), dispute))),
        id,
    )
}

fn ruled(receipt: &Verified<Receipt>, dispute: Digest, refund: u64, who: &str) -> Filed {
    let ruling = crate::records::Ruling {
        dispute,
        receipt: receipt.id(),
        scheduler: SchedulerId(PublicKey::of(&secret_of(who))),
        refund: Credits(refund),
        reason: "half was usable".into(),
        issued_at: receipt.issued_at,
    };
    Filed::Ruling(Signed::sign(ruling, &secret_of(who)))
}

#[test]
fn a_dispute_freezes_until_the_operator_rules_even_over_a_restart() {
    let mut bench = Bench::new("b:1gpu@1");
    let (lease, receipt) = settled(&mut bench, 1);
    let institution = Account::Institution("uni-nairobi".parse().unwrap());
    let (dispute, id) = disputed(&lease, &receipt, "user");
    let (strangers, _) = disputed(&lease, &receipt, "b");
    let refused = file(&mut bench, "b", strangers);
    assert!(refused.contains("answer your own receipts"), "{refused}");
    assert_eq!(file(&mut bench, "user", dispute.clone()), "Filed");
    assert_eq!(bench.booked.balance(&institution), 0);
    assert_eq!(bench.booked.balance(&Account::Disputed(receipt.id())), 1_000);
    let again = file(&mut bench, "user", dispute);
    assert!(again.contains("whose dispute is open"), "{again}");
    bench.restart();
    assert_eq!(bench.c.disputes().count(), 1);
    let by_user = file(&mut bench, "user", ruled(&receipt, id, 1_000, "user"));
    assert!(by_user.contains("only the scheduler's operator"), "{by_user}");
    let too_much = file(&mut bench, "scheduler", ruled(&receipt, id, 1_001, "scheduler"));
    assert!(too_much.contains("the receipt paid"), "{too_much}");
    let before = bench.c.budget(user(PublicKey::of(&secret_of("user"))));
    assert_eq!(
        file(&mut bench, "scheduler", ruled(&receipt, id, 400, "scheduler")),
        "Filed"
    );
    assert_eq!(bench.booked.balance(&institution), 600);
    let after = bench.c.budget(user(PublicKey::of(&secret_of("user"))));
    assert_eq!(after.0 - before.0, 400);
    let twice = file(&mut bench, "scheduler", ruled(&receipt, id, 400, "scheduler"));
    assert!(twice.contains("no open dispute"), "{twice}");
}

#[test]
fn silence_accepts() {
    let mut bench = Bench::new("b:1gpu@1");
    let (lease, receipt) = settled(&mut bench, 1);
    bench.now = receipt.disputable_until.0 + 1;
    let (dispute, _) = disputed(&lease, &receipt, "user");
    let late = file(&mut bench, "user", dispute);
    assert!(late.contains("silence accepted it"), "{late}");
}

#[test]
fn a_grant_pays_first_and_gets_its_rest_back() {
    let mut bench = Bench::new("b:1gpu@1");
    let record = crate::records::Grant {
        scheduler: config().id(),
        payer: None,
        beneficiary: crate::records::Beneficiary::Institution("uni-nairobi".parse().unwrap()),
        work: Vec::new(),
        credits: Credits(400_000),
        purpose: String::new(),
        nonce: 1,
        issued_at: UtcMillis(START),
        expires_at: UtcMillis(START + 600_000),
    };
    let record = Signed::sign(record, &secret_of("scheduler"));
    let account = Account::Grant(record.id());
    assert_eq!(
        file(&mut bench, "scheduler", Filed::Grant(record.clone())),
        "Filed"
    );
    let again = file(&mut bench, "scheduler", Filed::Grant(record));
    assert!(again.contains("posted before"), "{again}");
    let own = user(PublicKey::of(&secret_of("user")));
    let out = bench.submit(&order(1, |_| {}));
    // A ceiling of one credit: the grant's 0.4 first, then the user's own.
    assert_eq!(bench.booked.balance(&account), 0);
    assert_eq!(bench.c.budget(own), Credits(9_400_000));
    bench.restart();
    let (_, ask) = the_ask(&out);
    let lease = grant("b", &ask, |_| {});
    bench.tell(Event::NodeConnected(node_of("b")));
    bench.hear("b", ToScheduler::Granted(lease.clone()));
    bench.now += 3_600;
    bench.hear("b", done(finished("b", lease, 3_600, |_| {})));
    // The bill of 1000 came out of the grant; the user has everything back.
    assert_eq!(bench.c.budget(own), Credits(10_000_000));
    assert_eq!(bench.booked.balance(&account), 399_000);
    // Past its date the rest goes back to who gave it.
    bench.now = START + 700_000;
    bench.tell(Event::Tick);
    assert_eq!(bench.booked.balance(&account), 0);
    assert_eq!(bench.c.grants().count(), 0);
    assert_eq!(bench.booked.balance(&Account::Federation), -10_001_000);
}

fn delegation(key: &str, credits: u64, at: u64) -> Verified<Delegation> {
    let user = secret_of("user");
    let record = Delegation {
        user: UserId(PublicKey::of(&user)),
        scheduler: config().id(),
        key: PublicKey::of(&secret_of(key)),
        name: key.into(),
        credits: Credits(credits),
        issued_at: UtcMillis(at),
        expires_at: UtcMillis(at + 1_000_000),
    };
    Signed::sign(record, &user)
}

#[test]
fn a_delegated_key_spends_its_own_budget_and_nothing_after_it_was_taken_back() {
    let mut bench = Bench::new("a:1cpu@0");
    let (user, key) = (
        PublicKey::of(&secret_of("user")),
        PublicKey::of(&secret_of("key")),
    );
    let granted = delegation("key", 3_000_000, START);
    let delegate = |bench: &mut Bench, caller: PublicKey, delegation: &Verified<Delegation>| {
        brief(&bench.tell(Event::Delegate {
            request: RequestId(1),
            caller,
            delegation: delegation.clone(),
        }))
    };
    let mut too_much = |credits| delegate(&mut bench, user, &delegation("key", credits, START));
    assert!(too_much(99_000_000).contains("the budget holds 10.000000"));
    assert!(delegate(&mut bench, key, &granted).contains("not admitted"));
    assert_eq!(delegate(&mut bench, user, &granted), "Delegated");
    assert_eq!(delegate(&mut bench, user, &granted), "Delegated", "twice is once");
    let budgets = |bench: &Bench| (bench.c.budget(UserId(user)).0, bench.c.budget(UserId(key)).0);
    assert_eq!(budgets(&bench), (7_000_000, 3_000_000));

    // Its orders are its own: reserved from its budget, refused beyond it.
    let by_key = |nonce, credits| {
        let order = order(nonce, |o| {
            o.user = UserId(key);
            o.credits_max = Credits(credits);
        });
        Signed::sign(order.into_inner(), &secret_of("key"))
    };
    let beyond = brief(&bench.submit(&by_key(1, 3_000_001)));
    assert!(beyond.contains("the budget holds 3.000000"), "{beyond}");
    assert!(brief(&bench.submit(&by_key(2, 2_000_000))).contains("Submitted"));
    assert_eq!(budgets(&bench), (7_000_000, 1_000_000));
    // Nor can it hand on what it was handed.
    let further = Signed::sign(
        Delegation {
            user: UserId(key),
            key: PublicKey::of(&secret_of("other")),
            ..delegation("other", 1, START).into_inner()
        },
        &secret_of("key"),
    );
    assert!(delegate(&mut bench, key, &further).contains("itself delegated"));

    bench.restart();
    let revoke = |bench: &mut Bench, caller| {
        brief(&bench.tell(Event::Revoke {
            request: RequestId(1),
            caller,
            key,
        }))
    };
    assert!(revoke(&mut bench, key).contains("none of yours"));
    let revoked = revoke(&mut bench, user);
    assert!(revoked.contains("Delegated"), "{revoked}");
    assert_eq!(
        budgets(&bench),
        (10_000_000, 0),
        "what its job had set aside came back too"
    );
    assert!(brief(&bench.submit(&by_key(3, 0))).contains("not admitted"));
    // The old record opens no door again, not even after a restart.
    bench.restart();
    assert!(delegate(&mut bench, user, &granted).contains("taken back"));
    bench.wait(11 * 60_000);
    assert!(delegate(&mut bench, user, &granted).contains("dated wrongly"));
    assert_eq!(bench.c.delegations_of(user).count(), 0);
}

#[test]
fn a_delegated_key_expires() {
    let mut bench = Bench::new("a:1cpu@0");
    let key = PublicKey::of(&secret_of("key"));
    bench.tell(Event::Delegate {
        request: RequestId(1),
        caller: PublicKey::of(&secret_of("user")),
        delegation: delegation("key", 0, START),
    });
    bench.wait(1_000_001);
    let late = order(1, |o| {
        o.user = UserId(key);
        o.credits_max = Credits::ZERO;
        o.expires_at = UtcMillis(START + 2_000_000);
    });
    let late = Signed::sign(late.into_inner(), &secret_of("key"));
    assert!(brief(&bench.submit(&late)).contains("has expired"));
}

#[path = "question_tests.rs"]
mod questions;
