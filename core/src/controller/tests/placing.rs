//! Who waits, for what, and how that is told.
use super::*;

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

/// Nothing that needs the scarce device waits now, but such work comes all the time.
#[test]
fn scarce_devices_are_kept_for_what_is_likely_to_come() {
    for (came, expected) in [(3, "other"), (0, "scarce")] {
        let mut bench = Bench::new("");
        bench.admit("a", Role::Node, Credits::ZERO);
        bench.tell(Event::NodeConnected(node_of("a")));
        bench.offer("a:1gpu/scarce@1,also=1gpu/other@2");
        for nonce in 1..=came {
            let only = order(nonce, |o| o.constraints.device = "gpu/scarce".into());
            let (_, ask) = the_ask(&bench.submit(&only));
            let lease = grant("a", &ask, |_| {});
            bench.now += 1_000;
            bench.hear("a", done(finished("a", lease, 100, |_| {})));
        }
        bench.now += 1_000;
        let either = order(9, |o| o.constraints.device = "gpu".into());
        let (_, ask) = the_ask(&bench.submit(&either));
        assert_eq!(ask.device_class, format!("gpu/{expected}"), "after {came}");
        let why = bench.part(&ask.key).why;
        assert_eq!(why.contains("scarcer capacity is kept"), came > 0, "{why}");
        // When it has not come for long, nothing is kept for it.
        bench.now += 700_000;
        bench.hear("a", done(finished("a", grant("a", &ask, |_| {}), 100, |_| {})));
        let later = order(10, |o| {
            o.constraints.device = "gpu".into();
            o.issued_at = UtcMillis(START + 700_000);
            o.expires_at = UtcMillis(START + 1_300_000);
        });
        let (_, ask) = the_ask(&bench.submit(&later));
        assert_eq!(ask.device_class, "gpu/scarce", "after {came}");
    }
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
    let (mut placed, mut waiting, mut refused, mut contradictory, mut advised) = (0, 0, 0, 0, 0);
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
            // Where the slow path has advice for its kind, that goes before the cheapest; it may change with this very order.
            assert!(
                chosen.score == best.score || bench.c.guide.is_some(),
                "case {case}: {told:?}"
            );
            advised += u64::from(chosen.score != best.score);
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
    assert!(advised * 20 <= placed, "{advised} of {placed} went elsewhere");
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
        takes in prop_oneof![Just(None), any::<u64>().prop_map(|ms| Some(Millis(ms)))],
    ) {
        let order = order(1, |o| {
            o.items = items;
            o.items_per_part = per_part;
            o.credits_max = Credits(credits);
        });
        let job = Job::new(order, String::new(), UtcMillis(0), slots, takes);
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
        // Unless somebody said how large parts are, or there would be too many, none takes much more than five minutes.
        if let (0, Some(takes)) = (per_part, takes) {
            let longest = u128::from(takes.0) * u128::from(job.parts[0].items) / u128::from(items);
            let few = job.parts[0].items <= 16 || job.parts.len() as u64 > PARTS_MAX / 2;
            prop_assert!(few || longest <= 330_000, "{longest} ms");
        }
    }
}
