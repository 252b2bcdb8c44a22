//! The agent alone, event by event: what it promises, what it keeps, what it says.
use super::*;
use crate::records::{DataClass, Tier, WorkKind};
use crate::{
    artifact::{ArtifactKind, ArtifactRef},
    exchange::{Held, LeaseAsk, Phase},
    id::{Digest, JobId},
    key::{PublicKey, SchedulerId, UserId},
    records::{Constraints, Flag, Lease, Outcome, Receipt, Signed, Usage, Work},
    store::Stored,
    unit::{Credits, DeviceMillis, MonoMillis, Now, Portion, Rate, Speed, UtcMillis},
};
use alloc::boxed::Box;

fn secret(n: u8) -> SecretKey {
    SecretKey::from_bytes(&[n; 32])
}

fn scheduler(n: u8) -> SchedulerId {
    SchedulerId(PublicKey::of(&secret(n)))
}

const S: u8 = 100;

fn config() -> AgentConfig {
    let engine = |work| Engine {
        name: "engine".into(),
        version: "1".into(),
        work,
        speed: Speed(1_000),
        method: "probe/1".into(),
    };
    AgentConfig {
        secret: secret(1),
        name: "node".into(),
        institution: "uni-nairobi".parse().unwrap(),
        country: "KE".parse().unwrap(),
        devices: vec![Device {
            class: "gpu".into(),
            count: 2,
            free: 0,
            memory: Bytes(16 << 30),
            rate: Rate(1_000_000),
            share_min: 100,
            shared: Vec::new(),
        }],
        engines: vec![engine(WorkKind::Noop), engine(WorkKind::Embed)],
        cores: 8,
        memory: Bytes(32 << 30),
        isa: "x86-64-v3".into(),
        isolation: "landlock".into(),
        policy: OwnerPolicy {
            institutions_excluded: vec!["rude-users".parse().unwrap()],
            ..OwnerPolicy::default()
        },
        offer_ttl: Millis(60_000),
        heartbeat: Millis(2_000),
        reading_interval: Millis(1_000),
        reclaim_grace: Millis(5_000),
    }
}

/// An agent with a disk and a clock.
struct Bench {
    agent: Agent,
    disk: BTreeMap<(&'static str, Vec<u8>), Vec<u8>>,
    now: u64,
    base: u64,
}

impl Bench {
    fn new() -> Self {
        Self::with(config())
    }

    fn with(config: AgentConfig) -> Self {
        let agent = Agent::restore(config, Now::default(), &[]).unwrap();
        let mut bench = Self {
            agent,
            disk: BTreeMap::new(),
            now: 1_000_000,
            base: 0,
        };
        bench.tell(Event::Started);
        bench.tell(Event::Connected(scheduler(S)));
        bench
    }

    fn clock(&self) -> Now {
        Now {
            utc: UtcMillis(self.now),
            mono: MonoMillis(self.now - self.base),
        }
    }

    /// What leaves, in order; changes are on disk.
    fn tell(&mut self, event: Event) -> Vec<Effect> {
        let mut out = Vec::new();
        self.agent.handle(self.clock(), event, &mut out);
        assert!(
            self.agent.wake_at() > self.clock().mono,
            "it asks to be woken in the past"
        );
        let mut rest = Vec::new();
        for effect in out {
            match effect {
                Effect::Persist(changes) => {
                    for change in changes {
                        match change {
                            Change::Put { table, key, value } => self.disk.insert((table, key), value),
                            Change::Delete { table, key } => self.disk.remove(&(table, key)),
                            Change::Post { .. } => panic!("a node keeps no ledger"),
                        };
                    }
                }
                Effect::Advertise(_) | Effect::Log(_) => {}
                other => rest.push(other),
            }
        }
        rest
    }

    fn wait(&mut self, ms: u64) -> Vec<Effect> {
        let until = self.now + ms;
        let mut out = Vec::new();
        loop {
            let wake = self.agent.wake_at().0 + self.base;
            if wake > until {
                self.now = until;
                return out;
            }
            self.now = wake;
            out.extend(self.tell(Event::Tick));
        }
    }

    /// Another process, another monotonic clock, the same disk.
    fn restart(&mut self) -> Vec<Effect> {
        self.now += 10_000;
        self.base = 17;
        let stored: Vec<Stored> = self
            .disk
            .iter()
            .map(|((table, key), value)| Stored {
                table: (*table).into(),
                key: key.clone(),
                value: value.clone(),
            })
            .collect();
        self.agent = Agent::restore(config(), self.clock(), &stored).unwrap();
        self.tell(Event::Started)
    }

    fn ask(&mut self, from: u8, ask: LeaseAsk) -> String {
        brief(&self.tell(Event::Heard(scheduler(from), ToNode::Ask(Box::new(ask)))))
    }

    fn rows(&self, table: &str) -> usize {
        self.disk.keys().filter(|(t, _)| *t == table).count()
    }
}

/// Effects in a line.
fn brief(effects: &[Effect]) -> String {
    let one = |effect: &Effect| match effect {
        Effect::Send(_, ToScheduler::Granted(_)) => "granted".into(),
        Effect::Send(_, ToScheduler::Refused { why, .. }) => format!("refused: {why}"),
        Effect::Send(_, ToScheduler::Report(r)) => format!("report {}", r.held.len()),
        Effect::Send(_, ToScheduler::Reading { reading, .. }) => format!("reading {}", reading.sequence),
        Effect::Send(_, ToScheduler::Finished(f)) => format!("finished {}", f.usage.outcome.as_str()),
        Effect::Fetch { .. } => "fetch".into(),
        Effect::Start { .. } => "start".into(),
        Effect::Stop { grace, .. } => format!("stop in {}", grace.0),
        Effect::Push { .. } => "push".into(),
        Effect::Forget { .. } => "forget".into(),
        Effect::Keep(receipt) => format!("keep {}", receipt.credits.0),
        other => format!("{other:?}"),
    };
    effects.iter().map(one).collect::<Vec<_>>().join(", ")
}

fn blob(text: &str) -> ArtifactRef {
    ArtifactRef {
        digest: Digest::of(text.as_bytes()),
        bytes: Bytes(10),
        kind: ArtifactKind::Blob,
    }
}

fn order(nonce: u64, change: impl FnOnce(&mut Order)) -> Verified<Order> {
    let user = secret(200);
    let mut order = Order {
        user: UserId(PublicKey::of(&user)),
        institution: "usp-brazil".parse().unwrap(),
        scheduler: scheduler(S),
        work: Work::Noop { millis_per_item: 100 },
        input: blob("input"),
        items: 10,
        items_per_part: 0,
        constraints: Constraints::default(),
        credits_max: Credits::ONE,
        attempts_max: 3,
        nonce,
        issued_at: UtcMillis(1),
        expires_at: UtcMillis(2_000_000),
    };
    change(&mut order);
    Signed::sign(order, &user)
}

fn embed(order: &mut Order) {
    order.work = Work::Embed {
        model: blob("model"),
        model_name: "tiny".into(),
    };
}

fn ask_for(order: Verified<Order>, fence: u64) -> LeaseAsk {
    LeaseAsk {
        key: LeaseKey {
            job: JobId(order.id()),
            part: 0,
            fence,
        },
        first_item: 0,
        items: order.items,
        order,
        device_class: "gpu".into(),
        devices: Portion::ONE,
        rate: Rate(1_000_000),
        device_ms_max: DeviceMillis(60_000),
        ttl: Millis(15_000),
        holders: Vec::new(),
        from: None,
        input: Vec::new(),
        here: false,
    }
}

#[test]
fn what_is_all_here_is_started_with_the_promise() {
    let mut bench = Bench::new();
    let mut ask = ask_for(order(1, embed), 1);
    ask.input = b"text".to_vec();
    assert_eq!(bench.ask(S, ask), "granted, fetch");
    let mut bench = Bench::new();
    let mut ask = ask_for(order(1, embed), 1);
    (ask.input, ask.here) = (b"text".to_vec(), true);
    let key = ask.key;
    assert_eq!(bench.ask(S, ask), "granted, start");
    // As with everything that ran: what became of it is told after a restart, it does not begin again.
    assert_eq!(brief(&bench.restart()), "");
    let told = brief(&bench.tell(Event::Connected(scheduler(S))));
    assert!(
        told.contains("finished failed") && !told.contains("start"),
        "{told} {key}"
    );
}

fn exited(key: LeaseKey, exit: Exit) -> Event {
    Event::Exited {
        key,
        exit,
        meters: WorkerMeters::default(),
    }
}

fn usage_in(effects: &[Effect]) -> Verified<Usage> {
    effects
        .iter()
        .find_map(|e| match e {
            Effect::Send(_, ToScheduler::Finished(f)) => {
                crate::records::check_trail(&order_of(f.lease.job), &f.lease, &f.readings, &f.usage).unwrap();
                Some(f.usage.clone())
            }
            _ => None,
        })
        .unwrap()
}

/// The orders of these tests differ by nonce and kind alone.
fn order_of(job: JobId) -> Verified<Order> {
    (0..10)
        .flat_map(|n| [order(n, |_| {}), order(n, embed)])
        .find(|o| o.id() == job.0)
        .unwrap()
}

fn lease_in(effects: &[Effect]) -> Verified<Lease> {
    effects
        .iter()
        .find_map(|e| match e {
            Effect::Send(_, ToScheduler::Granted(lease)) => Some(lease.clone()),
            _ => None,
        })
        .unwrap()
}

#[test]
fn a_lease_is_granted_by_the_owners_policy_and_the_users_word() {
    type Change = fn(&mut LeaseAsk);
    let with = |change: fn(&mut Order)| order(1, change);
    let cases: Vec<(&str, Verified<Order>, Change, &str)> = vec![
        ("plain", with(|_| {}), |_| {}, "granted, start"),
        (
            "at its own price",
            with(|_| {}),
            |a| a.rate = Rate(9_000_000),
            "granted, start",
        ),
        (
            "too cheap",
            with(|_| {}),
            |a| a.rate = Rate(1),
            "refused: the price is now",
        ),
        (
            "another scheduler's",
            with(|o| o.scheduler = scheduler(S + 1)),
            |_| {},
            "refused: the ask does not match its order: the order was given to another",
        ),
        (
            "another job",
            with(|_| {}),
            |a| a.key.job = JobId(Digest::of(b"x")),
            "refused: the ask does not match its order: the job is not",
        ),
        (
            "too many items",
            with(|_| {}),
            |a| a.first_item = 1,
            "refused: the ask does not match its order: the part lies outside",
        ),
        (
            "two devices for one",
            with(|o| o.constraints.devices = 2),
            |_| {},
            "refused: the ask does not match its order: other devices are asked for",
        ),
        (
            "two devices",
            with(|o| o.constraints.devices = 2),
            |a| a.devices = Portion::devices(2),
            "granted, start",
        ),
        (
            "a share",
            with(|o| o.constraints.share_milli = 250),
            |a| a.devices = Portion::share(250).unwrap(),
            "granted, start",
        ),
        (
            "a share for a whole device",
            with(|_| {}),
            |a| a.devices = Portion::share(250).unwrap(),
            "refused: the ask does not match its order: other devices are asked for",
        ),
        (
            "a share that is too small",
            with(|o| o.constraints.share_milli = 99),
            |a| a.devices = Portion::share(99).unwrap(),
            "refused: the owner's policy: no share under 0.1 of a device is lent",
        ),
        (
            "a share with too little memory",
            with(|o| {
                o.constraints.share_milli = 250;
                o.constraints.memory = Bytes((4 << 30) + 1);
            }),
            |a| a.devices = Portion::share(250).unwrap(),
            "refused: the ask does not match its order: the order excludes this device",
        ),
        (
            "people's data",
            with(|o| o.constraints.data = DataClass::Personal),
            |_| {},
            "refused: the owner's policy: personal data is not taken here",
        ),
        (
            "better isolation",
            with(|o| o.constraints.isolation = Tier::Seccomp),
            |_| {},
            "refused: the ask does not match its order: the order wants stronger isolation",
        ),
        (
            "another device",
            with(|o| o.constraints.device = "cpu".into()),
            |_| {},
            "refused: the ask does not match its order: the order excludes this device",
        ),
        (
            "overflowing items",
            with(|_| {}),
            |a| a.first_item = u64::MAX,
            "refused: the ask does not match its order: the part lies outside",
        ),
        (
            "no items",
            with(|_| {}),
            |a| a.items = 0,
            "refused: the ask does not match",
        ),
        (
            "no device",
            with(|_| {}),
            |a| a.devices = Portion::devices(2),
            "refused: the ask does not match",
        ),
        (
            "an unwelcome user",
            with(|o| o.institution = "rude-users".parse().unwrap()),
            |_| {},
            "refused: the owner's policy: users of rude-users",
        ),
        (
            "no engine",
            with(|o| {
                o.work = Work::Generate(crate::records::Generate::greedy(blob("model"), "", 1));
            }),
            |_| {},
            "refused: not possible here: no engine for generate",
        ),
        (
            "not in this country",
            with(|o| o.constraints.countries = vec!["BR".parse().unwrap()]),
            |_| {},
            "refused: the ask does not match its order: the order excludes this country",
        ),
        (
            "not of this institution",
            with(|o| o.constraints.institutions_excluded = vec!["uni-nairobi".parse().unwrap()]),
            |_| {},
            "refused: the ask does not match its order: the order excludes this institution",
        ),
        (
            "donated only",
            with(|o| o.constraints.donated_only = true),
            |_| {},
            "refused: the ask does not match its order: the order's price limit",
        ),
        (
            "unknown device",
            with(|_| {}),
            |a| a.device_class = "tpu".into(),
            "refused: not possible here: there is no device of class tpu",
        ),
        (
            "too many devices",
            with(|o| o.constraints.devices = 3),
            |a| a.devices = Portion::devices(3),
            "refused: no free gpu device",
        ),
    ];
    for (name, order, change, expected) in cases {
        let mut bench = Bench::new();
        let mut ask = ask_for(order, 1);
        change(&mut ask);
        let got = bench.ask(S, ask);
        assert!(got.starts_with(expected), "{name}: {got}");
        let kept = usize::from(expected.starts_with("granted"));
        assert_eq!(
            (bench.rows("leases"), bench.rows("fences")),
            (kept, kept),
            "{name}"
        );
    }
}

#[test]
fn no_device_is_promised_twice_whoever_asks() {
    let mut bench = Bench::new();
    bench.tell(Event::Connected(scheduler(S + 1)));
    let other = order(2, |o| o.scheduler = scheduler(S + 1));
    assert_eq!(bench.ask(S, ask_for(order(1, |_| {}), 1)), "granted, start");
    assert_eq!(bench.ask(S + 1, ask_for(other, 1)), "granted, start");
    let third = ask_for(order(3, |_| {}), 1);
    assert_eq!(bench.ask(S, third.clone()), "refused: no free gpu device");
    let first = ask_for(order(1, |_| {}), 1).key;
    let finished = bench.tell(exited(first, Exit::Done(blob("r"))));
    assert_eq!(brief(&finished), "push");
    assert_eq!(
        bench.ask(S, third),
        "granted, start",
        "a lease that ended holds no device"
    );
}

#[test]
fn shares_lie_on_as_few_devices_as_can_be() {
    let mut bench = Bench::new();
    let share = |nonce, milli: u32| {
        let order = order(nonce, move |o| o.constraints.share_milli = milli);
        let mut ask = ask_for(order, 1);
        ask.devices = Portion::share(milli).unwrap();
        ask
    };
    let mut keys = Vec::new();
    for (nonce, milli, expected) in [
        (1, 600, "granted, start"),
        (2, 300, "granted, start"),
        (3, 700, "granted, start"),
        (4, 400, "refused: no free gpu device"),
        (5, 300, "granted, start"),
        (6, 100, "granted, start"),
        (7, 100, "refused: no free gpu device"),
    ] {
        let ask = share(nonce, milli);
        keys.push(ask.key);
        assert_eq!(bench.ask(S, ask), expected, "{nonce}");
    }
    assert_eq!(bench.agent.free("gpu"), (0, vec![0, 0]));
    assert_eq!(
        bench.ask(S, ask_for(order(8, |_| {}), 1)),
        "refused: no free gpu device"
    );
    // Both guests of one device leave, and it is whole again.
    for key in [keys[2], keys[4]] {
        bench.tell(exited(key, Exit::Done(blob("r"))));
    }
    assert_eq!(bench.agent.free("gpu"), (1, vec![0]));
    assert_eq!(bench.ask(S, ask_for(order(9, |_| {}), 1)), "granted, start");
}

#[test]
fn a_share_stays_on_its_device_over_a_restart() {
    let mut bench = Bench::new();
    for (nonce, milli) in [(1, 600), (2, 700), (3, 200)] {
        let order = order(nonce, |o| {
            embed(o);
            o.constraints.share_milli = milli;
        });
        let mut ask = ask_for(order, 1);
        ask.devices = Portion::share(milli).unwrap();
        assert_eq!(bench.ask(S, ask), "granted, fetch");
    }
    assert_eq!(bench.agent.free("gpu"), (0, vec![400, 100]));
    bench.restart();
    assert_eq!(bench.agent.free("gpu"), (0, vec![400, 100]));
}

#[test]
fn a_share_of_a_device_for_an_hour_is_a_share_of_a_device_hour() {
    let mut bench = Bench::new();
    let order = order(1, |o| o.constraints.share_milli = 250);
    let mut ask = ask_for(order, 1);
    ask.devices = Portion::share(250).unwrap();
    ask.device_ms_max = DeviceMillis(1_000);
    let key = ask.key;
    bench.ask(S, ask);
    bench.now += 2_000;
    let gone = Exit::Failed {
        why: "it fell".into(),
        retryable: true,
    };
    let told = bench.tell(exited(key, gone));
    let used = told.iter().find_map(|effect| match effect {
        Effect::Send(_, ToScheduler::Finished(f)) => Some(f.usage.meters.device_ms),
        _ => None,
    });
    assert_eq!(used, Some(DeviceMillis(500)));
}

#[test]
fn a_fence_is_never_granted_after_a_later_one() {
    let mut bench = Bench::new();
    let at = |fence| ask_for(order(1, |_| {}), fence);
    let first = bench.tell(Event::Heard(scheduler(S), ToNode::Ask(Box::new(at(3)))));
    let again = bench.tell(Event::Heard(scheduler(S), ToNode::Ask(Box::new(at(3)))));
    assert_eq!(
        brief(&again),
        "granted",
        "the same ask has the same answer, and nothing starts twice"
    );
    assert_eq!(lease_in(&first), lease_in(&again));
    assert_eq!(
        bench.ask(S, at(2)),
        "refused: fence 3 was already seen for this part"
    );
    // A later attempt makes this one void.
    assert_eq!(bench.ask(S, at(5)), "stop in 2000, granted, start");
    assert_eq!(
        bench.ask(S, at(4)),
        "refused: fence 5 was already seen for this part"
    );
    bench.restart();
    bench.tell(Event::Connected(scheduler(S)));
    for fence in [3, 5] {
        let settled = ToNode::Settled {
            key: at(fence).key,
            receipt: None,
            why: String::new(),
        };
        assert_eq!(brief(&bench.tell(Event::Heard(scheduler(S), settled))), "forget");
    }
    assert_eq!(bench.rows("leases") + bench.rows("readings"), 0);
    assert_eq!(
        bench.ask(S, at(5)),
        "refused: fence 5 was already seen for this part",
        "even so"
    );
}

#[test]
fn a_part_with_a_model_is_fetched_run_pushed_and_settled() {
    let mut bench = Bench::new();
    let ask = ask_for(order(1, embed), 1);
    let key = ask.key;
    assert_eq!(bench.ask(S, ask), "granted, fetch");
    let fetched = Event::Fetched {
        key,
        bytes_in: Bytes(7),
    };
    assert_eq!(brief(&bench.tell(fetched)), "start");
    assert_eq!(brief(&bench.wait(2_500)), "reading 0, reading 1, report 1");
    assert_eq!(brief(&bench.tell(exited(key, Exit::Done(blob("r"))))), "push");
    let failed = Event::PushFailed {
        key,
        why: "broke".into(),
    };
    assert_eq!(brief(&bench.tell(failed)), "");
    let retried = brief(&bench.wait(6_000));
    assert!(retried.contains("push"), "{retried}");
    let told = bench.tell(Event::Pushed { key });
    let usage = usage_in(&told);
    assert_eq!(
        (usage.outcome, usage.readings, usage.meters.device_ms.0),
        (Outcome::Done, 3, 2_500)
    );
    assert_eq!(usage.meters.bytes_in, Bytes(7));
    let again = brief(&bench.wait(5_500));
    assert!(
        again.contains("finished done"),
        "told until it is acknowledged: {again}"
    );
    let settled = ToNode::Settled {
        key,
        receipt: None,
        why: String::new(),
    };
    // Only its own scheduler can acknowledge it.
    assert_eq!(
        brief(&bench.tell(Event::Heard(scheduler(9), settled.clone()))),
        ""
    );
    assert_eq!(brief(&bench.tell(Event::Heard(scheduler(S), settled))), "forget");
    assert_eq!(bench.rows("leases") + bench.rows("readings"), 0);
    assert!(bench.agent.status().held.is_empty());
}

/// What a scheduler signs for a lease that took so long.
fn receipt_for(
    lease: &Verified<Lease>,
    usage: &Verified<Usage>,
    change: impl FnOnce(&mut Receipt),
) -> Verified<Receipt> {
    let billed = usage.meters.device_ms;
    let mut receipt = Receipt {
        usage: usage.id(),
        lease: lease.id(),
        job: lease.job,
        scheduler: lease.scheduler,
        node: lease.node,
        node_institution: lease.institution.clone(),
        user: UserId(PublicKey::of(&secret(50))),
        user_institution: "lab-recife".parse().unwrap(),
        observed: billed,
        billed,
        credits: lease.rate.bill(billed).unwrap(),
        flags: Vec::new(),
        issued_at: UtcMillis(1),
        disputable_until: UtcMillis(2),
        rate_card: 0,
    };
    change(&mut receipt);
    Signed::sign(receipt, &secret(S))
}

#[test]
fn receipts_are_kept_and_what_is_wrong_with_them_is_said() {
    type Change = fn(&mut Receipt);
    let cases: [(&str, Change, &str); 6] = [
        ("as it should be", |_| {}, "settled: "),
        (
            "of other work",
            |r| r.usage = Digest::of(b"other"),
            "of other work",
        ),
        (
            "for somebody else",
            |r| r.node_institution = "uni-lagos".parse().unwrap(),
            "pays uni-lagos",
        ),
        (
            "too little time",
            |r| r.billed.0 -= 1,
            "bills 2499 device-ms where 2500 are due",
        ),
        ("too little money", |r| r.credits.0 -= 1, "credits where"),
        (
            "cut, and it says so",
            |r| {
                r.credits.0 -= 1;
                r.flags = vec![Flag::CutToCeiling];
            },
            "settled: ",
        ),
    ];
    for (name, change, expected) in cases {
        let mut bench = Bench::new();
        let ask = ask_for(order(1, |_| {}), 1);
        let key = ask.key;
        let lease = lease_in(&bench.tell(Event::Heard(scheduler(S), ToNode::Ask(Box::new(ask)))));
        bench.wait(2_500);
        bench.tell(exited(key, Exit::Done(blob("r"))));
        let usage = usage_in(&bench.tell(Event::Pushed { key }));
        let receipt = receipt_for(&lease, &usage, change);
        let settled = ToNode::Settled {
            key,
            receipt: Some(receipt.clone()),
            why: String::new(),
        };
        let mut out = Vec::new();
        bench
            .agent
            .handle(bench.clock(), Event::Heard(scheduler(S), settled), &mut out);
        let kept = out
            .iter()
            .any(|e| matches!(e, Effect::Keep(kept) if kept.id() == receipt.id()));
        assert!(kept, "{name}");
        let said = out
            .iter()
            .any(|e| matches!(e, Effect::Log(line) if line.contains(expected)));
        assert!(said, "{name}: {out:?}");
    }
}

#[test]
fn a_restart_in_each_stage_begins_resumes_or_tells() {
    // Promised: the fetch begins again.
    let mut bench = Bench::new();
    bench.ask(S, ask_for(order(1, embed), 1));
    assert_eq!(brief(&bench.restart()), "fetch");

    // Running: nobody knows how far it got; it is told as failed, with no time that was not measured.
    let mut bench = Bench::new();
    bench.ask(S, ask_for(order(1, |_| {}), 1));
    bench.wait(2_500);
    assert_eq!(brief(&bench.restart()), "");
    let usage = usage_in(&bench.tell(Event::Connected(scheduler(S))));
    assert_eq!(
        (usage.outcome, usage.retryable, usage.readings),
        (Outcome::Failed, true, 3)
    );
    assert_eq!(
        usage.meters.device_ms,
        DeviceMillis(2_000),
        "what was signed before the restart"
    );
    let mut bench = Bench::new();
    bench.ask(S, ask_for(order(1, |_| {}), 1));
    bench.restart();
    let usage = usage_in(&bench.tell(Event::Connected(scheduler(S))));
    assert_eq!(
        usage.meters.device_ms,
        DeviceMillis::ZERO,
        "the new clock measures nothing of the old"
    );

    // Ended: the result is brought again, then the usage.
    let mut bench = Bench::new();
    let key = ask_for(order(1, |_| {}), 1).key;
    bench.ask(S, ask_for(order(1, |_| {}), 1));
    bench.tell(exited(key, Exit::Done(blob("r"))));
    assert_eq!(brief(&bench.restart()), "");
    assert_eq!(
        brief(&bench.tell(Event::Connected(scheduler(S)))),
        "report 1, push"
    );
}

#[test]
fn the_owner_gets_the_machine_back() {
    let mut bench = Bench::new();
    let running = ask_for(order(1, |_| {}), 1).key;
    bench.ask(S, ask_for(order(1, |_| {}), 1));
    bench.ask(S, ask_for(order(2, embed), 1));
    let out = bench.tell(Event::Owner(OwnerCommand::Reclaim));
    let mut said: Vec<String> = out.iter().map(|e| brief(core::slice::from_ref(e))).collect();
    said.sort();
    assert_eq!(said, ["finished reclaimed", "stop in 5000"]);
    assert!(
        bench
            .ask(S, ask_for(order(3, |_| {}), 1))
            .starts_with("refused: the owner's policy")
    );
    let usage = usage_in(&bench.tell(exited(running, Exit::Stopped)));
    assert_eq!((usage.outcome, usage.retryable), (Outcome::Reclaimed, true));
    bench.restart();
    assert_eq!(
        bench.agent.status().state,
        crate::records::NodeState::Reclaimed,
        "it is remembered"
    );
    bench.tell(Event::Owner(OwnerCommand::Open));
    assert_eq!(bench.ask(S, ask_for(order(3, |_| {}), 1)), "granted, start");
}

#[test]
fn a_lease_ends_when_nobody_renews_it_or_its_time_is_used_up() {
    let mut bench = Bench::new();
    let key = ask_for(order(1, |_| {}), 1).key;
    bench.ask(S, ask_for(order(1, |_| {}), 1));
    assert!(!brief(&bench.wait(14_000)).contains("stop"));
    let renewed = ToNode::Renewed {
        sequence: 1,
        renewals: vec![(key, UtcMillis(0), Millis(15_000))],
        stops: Vec::new(),
    };
    bench.tell(Event::Heard(scheduler(S), renewed));
    assert!(!brief(&bench.wait(14_900)).contains("stop"));
    assert!(brief(&bench.wait(200)).contains("stop in 2000"));
    let usage = usage_in(&bench.tell(exited(key, Exit::Stopped)));
    assert!(
        usage.retryable && usage.cause.contains("did not renew"),
        "{}",
        usage.cause
    );

    let mut bench = Bench::new();
    let mut ask = ask_for(order(1, |_| {}), 1);
    ask.device_ms_max = DeviceMillis(3_000);
    bench.ask(S, ask);
    assert!(!brief(&bench.wait(2_900)).contains("stop"));
    assert!(brief(&bench.wait(200)).contains("stop in 2000"));
    let usage = usage_in(&bench.tell(exited(key, Exit::Stopped)));
    assert!(
        !usage.retryable && usage.cause.contains("--max-cost"),
        "{}",
        usage.cause
    );
}

#[test]
fn readings_of_a_long_lease_stay_bounded_and_in_order() {
    let mut bench = Bench::new();
    let key = ask_for(order(1, |_| {}), 1).key;
    let mut ask = ask_for(order(1, |_| {}), 1);
    ask.device_ms_max = DeviceMillis(u64::MAX);
    bench.ask(S, ask);
    for _ in 0..4_000 {
        bench.wait(3_000);
        let renewed = ToNode::Renewed {
            sequence: 1,
            renewals: vec![(key, UtcMillis(0), Millis(15_000))],
            stops: Vec::new(),
        };
        bench.tell(Event::Heard(scheduler(S), renewed));
    }
    let usage = usage_in(&{
        bench.tell(exited(
            key,
            Exit::Failed {
                why: "enough\nof it".into(),
                retryable: true,
            },
        ))
    });
    assert!(usage.readings as usize <= crate::exchange::READINGS_MAX && usage.readings > 100);
    assert_eq!(usage.cause, "enough of it", "a cause is one line");
}

#[test]
fn an_idle_node_sleeps_until_its_next_word() {
    let mut bench = Bench::new();
    bench.wait(1_000);
    let mut ticks = 0;
    let until = bench.now + 60_000;
    while bench.now < until {
        bench.now = bench.agent.wake_at().0 + bench.base;
        bench.tell(Event::Tick);
        ticks += 1;
    }
    // A report every two seconds and an offer every twenty.
    assert!((30..=36).contains(&ticks), "{ticks}");
    bench.tell(Event::Disconnected(scheduler(S)));
    assert!(
        bench.agent.wake_at().0 > bench.clock().mono.0 + 2_000,
        "without a session only offers are due"
    );
}

#[test]
fn a_report_names_what_that_scheduler_holds_and_nothing_else() {
    let mut bench = Bench::new();
    bench.ask(S, ask_for(order(1, embed), 1));
    bench.tell(Event::Connected(scheduler(S + 1)));
    let reports = bench.wait(2_100);
    let held = |to: SchedulerId| {
        reports.iter().find_map(|e| match e {
            Effect::Send(s, ToScheduler::Report(r)) if *s == to => Some(r.held.clone()),
            _ => None,
        })
    };
    let expected = Held {
        key: ask_for(order(1, embed), 1).key,
        phase: Phase::Fetching,
        items_done: 0,
        tokens: 0,
        loss_micro: 0,
    };
    assert_eq!(held(scheduler(S)), Some(vec![expected]));
    assert_eq!(held(scheduler(S + 1)), Some(Vec::new()));
}

/// Readings name what offers say of a CPU slot; of a GPU nothing is known.
#[test]
fn a_reading_names_the_benchmark_of_its_device() {
    let mut config = config();
    let of = |config: &AgentConfig, class: &str| upkeep::benchmark(config, class);
    assert_eq!(of(&config, "cpu/x86-64-v3"), None, "it runs no model");
    config.engines.push(Engine {
        name: "llama.cpp".into(),
        version: "1".into(),
        work: WorkKind::Generate,
        speed: Speed(110_000),
        method: "bench/1".into(),
    });
    let measured = of(&config, "cpu/x86-64-v3").unwrap();
    assert_eq!(
        (measured.version.as_str(), measured.speed),
        ("bench/1", Speed(110_000))
    );
    assert_eq!(
        (of(&config, "cuda/NVIDIA H200"), of(&config, "server/llama")),
        (None, None)
    );

    config.devices[0].class = "cpu/x86-64-v3".into();
    let mut bench = Bench::with(config);
    let mut ask = ask_for(order(1, |_| {}), 1);
    ask.device_class = "cpu/x86-64-v3".into();
    let key = ask.key;
    assert_eq!(bench.ask(S, ask), "granted, start");
    bench.wait(1_500);
    bench.tell(exited(key, Exit::Done(blob("r"))));
    let out = bench.tell(Event::Pushed { key });
    let readings = out.iter().find_map(|effect| match effect {
        Effect::Send(_, ToScheduler::Finished(finished)) => Some(&finished.readings),
        _ => None,
    });
    let readings = readings.unwrap();
    assert!(readings.len() > 1 && readings.iter().all(|r| r.benchmark.as_ref() == Some(&measured)));
}
