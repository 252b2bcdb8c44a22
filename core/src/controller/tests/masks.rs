//! Masks, deadlines, several devices, and speeds as finished work shows them.
use super::*;
use crate::{
    records::{DataClass, Tier},
    unit::Portion,
};

fn embed(order: &mut Order) {
    order.work = Work::Embed {
        model: ArtifactRef {
            digest: Digest::of(b"model"),
            // As large as the model that speeds are told for.
            bytes: Bytes(91_000_000),
            kind: ArtifactKind::Tree,
        },
        model_name: "tiny".into(),
    };
    order.input.bytes = Bytes(4_000_000);
}

fn asked(out: &[Effect]) -> String {
    let asks = asks(out);
    let name = |node: NodeId| {
        ["a", "b", "c", "d"]
            .into_iter()
            .find(|n| node_of(n) == node)
            .unwrap_or("?")
    };
    asks.iter()
        .map(|(node, _)| name(*node))
        .collect::<Vec<_>>()
        .join(" ")
}

#[test]
fn each_mask_keeps_work_away_and_says_what_would_do() {
    type Change = fn(&mut Order);
    let cases: [(&str, Change, &str, &str); 7] = [
        (
            "a:1gpu@1,iso=seccomp b:1gpu@2,iso=landlock+seccomp",
            |o| o.constraints.isolation = Tier::LandlockSeccomp,
            "b",
            "",
        ),
        (
            "a:1gpu@1,iso=bubble",
            |o| o.constraints.isolation = Tier::Seccomp,
            "",
            "1 excluded by isolation (nodes have none)",
        ),
        (
            "a:1gpu@1 b:1gpu@9,data=sensitive",
            |o| o.constraints.data = DataClass::Personal,
            "b",
            "",
        ),
        (
            "a:1gpu@1",
            |o| o.constraints.data = DataClass::Personal,
            "",
            "1 excluded by data class (nodes take data up to internal)",
        ),
        (
            "a:1gpu@1,never=uni-nairobi b:1gpu@9,only=uni-nairobi",
            |_| {},
            "b",
            "",
        ),
        (
            "a:1gpu@1,usp-brazil,only=usp-brazil",
            |_| {},
            "",
            "1 excluded by owner (usp-brazil does not serve uni-nairobi)",
        ),
        (
            "a:1gpu@1,does=embed",
            |_| {},
            "",
            "1 excluded by owner (uni-nairobi does no noop work)",
        ),
    ];
    for (nodes, change, expected, why) in cases {
        let mut bench = Bench::new("");
        for text in nodes.split_whitespace() {
            let (name, rest) = text.split_once(':').unwrap();
            let school = if rest.contains(",usp-brazil") {
                "usp-brazil"
            } else {
                "uni-nairobi"
            };
            bench.admit_of(school, name, Role::Node, Credits::ZERO);
            bench.tell(Event::NodeConnected(node_of(name)));
            bench.offer(text);
        }
        let order = order(1, change);
        let told = bench.c.explain_order(bench.clock(), &order);
        let out = bench.submit(&order);
        assert_eq!(asked(&out), expected, "{nodes}");
        if why.is_empty() {
            assert_eq!(told.candidates.len(), 1, "{nodes}");
        } else {
            assert!(told.summary.contains(why), "{nodes}: {}", told.summary);
            let part = &bench.c.job(&JobId(order.id())).unwrap().parts[0];
            assert!(part.cause.contains(why), "{nodes}: {}", part.cause);
        }
    }
}

#[test]
fn an_owner_runs_models_under_known_licences_only() {
    let mut bench = Bench::new("a:1gpu@1,lic=Apache-2.0");
    bench.sequence += 1;
    let mut offer = offer_of("a:1gpu@1,lic=Apache-2.0", bench.sequence).into_inner();
    offer.engines[0].work = crate::records::WorkKind::Embed;
    offer.engines[0].speed = crate::unit::Speed(100_000_000);
    offer.issued_at = UtcMillis(bench.now);
    offer.expires_at = UtcMillis(bench.now + 3_600_000);
    let from = offer.node.0;
    let offer = Signed::sign(offer, &secret_of("a"));
    bench.tell(Event::Offer {
        request: RequestId(0),
        from,
        offer,
    });
    for (licence, expected) in [("", ""), ("cc-by-nc-4.0", ""), ("apache-2.0", "a")] {
        let order = order(1, |o| {
            embed(o);
            o.constraints.licence = licence.into();
        });
        let told = bench.c.explain_order(bench.clock(), &order);
        let out = bench.submit(&order);
        assert_eq!(asked(&out), expected, "{licence}");
        assert_eq!(
            told.summary
                .contains("1 excluded by licence (nodes run models under Apache-2.0)"),
            expected.is_empty()
        );
    }
}

#[test]
fn a_part_takes_as_many_devices_as_it_asked_for() {
    let mut bench = Bench::new("a:3gpu@1 b:4gpu@3");
    let two = |nonce| order(nonce, |o| o.constraints.devices = 2);
    let (node, ask) = the_ask(&bench.submit(&two(1)));
    assert_eq!((node, ask.devices), (node_of("a"), Portion::devices(2)));
    // One device is left there, and not enough.
    let (node, _) = the_ask(&bench.submit(&two(2)));
    assert_eq!(node, node_of("b"));
    // Billed for both, at most what the job may cost.
    assert_eq!(ask.rate.bill(ask.device_ms_max), Some(Credits(1_000_000)));
    let lease = grant("a", &ask, |l| l.devices = Portion::devices(2));
    bench.hear("a", ToScheduler::Granted(lease.clone()));
    bench.now += 60_000;
    let out = bench.hear("a", done(finished("a", lease, 100_000, |_| {})));
    assert_eq!(receipt_in(&out).billed, DeviceMillis(100_000));
    assert_eq!(receipt_in(&out).observed, DeviceMillis(120_000));
    // A lease over fewer devices is another lease.
    let (node, ask) = the_ask(&bench.submit(&two(3)));
    let name = if node == node_of("a") { "a" } else { "b" };
    let lease = grant(name, &ask, |l| l.devices = Portion::ONE);
    let out = bench.hear(name, done(finished(name, lease, 1_000, |_| {})));
    assert!(
        brief(&out).contains("the lease is not the one that was asked for"),
        "{}",
        brief(&out)
    );
}

#[test]
fn a_part_takes_the_share_it_asked_for_and_pays_for_no_more() {
    let mut bench = Bench::new("a:1gpu@1 b:2gpu@3,share=200");
    let share = |nonce, milli| order(nonce, move |o| o.constraints.share_milli = milli);
    // Only `b` lends shares, the smallest is a fifth.
    let told = bench.c.explain_order(bench.clock(), &share(9, 100));
    assert!(
        told.summary
            .contains("2 excluded by share of a device (the smallest share lent is 0.2 of a device)"),
        "{}",
        told.summary
    );
    let mut asks_made = Vec::new();
    for nonce in 1..=4 {
        let (node, ask) = the_ask(&bench.submit(&share(nonce, 400)));
        assert_eq!((node, ask.devices), (node_of("b"), Portion::share(400).unwrap()));
        asks_made.push(ask);
    }
    // Two and two of them fill both devices but for a fifth each.
    assert!(asks(&bench.submit(&share(5, 400))).is_empty());
    let (node, _) = the_ask(&bench.submit(&share(6, 200)));
    assert_eq!(node, node_of("b"));
    // Four tenths of the price, and the device time of four tenths.
    let ask = &asks_made[0];
    assert_eq!(ask.rate.bill(ask.device_ms_max), Some(Credits(1_000_000)));
    let lease = grant("b", ask, |_| {});
    bench.hear("b", ToScheduler::Granted(lease.clone()));
    bench.now += 60_000;
    let out = bench.hear("b", done(finished("b", lease, 24_000, |_| {})));
    let receipt = receipt_in(&out);
    assert_eq!(
        (receipt.billed, receipt.observed),
        (DeviceMillis(24_000), DeviceMillis(24_000))
    );
    assert_eq!(receipt.credits, ask.rate.bill(DeviceMillis(24_000)).unwrap());
    // What became free is somebody's at once.
    assert_eq!(asks(&out).len(), 1, "{}", brief(&out));
    let told = brief(&bench.submit(&order(7, |o| {
        (o.constraints.share_milli, o.constraints.devices) = (500, 2);
    })));
    assert!(
        told.contains("contradicts itself: each part should take 2 devices, and a share of one"),
        "{told}"
    );
}

/// The first job on a cold node spends most of its time on loading its model.
#[test]
fn a_cold_first_job_does_not_make_its_node_slow() {
    for (loading, expected) in [(9_900, "a"), (0, "b")] {
        let mut bench = Bench::new("");
        for name in ["a", "b"] {
            bench.admit(name, Role::Node, Credits::ZERO);
            bench.tell(Event::NodeConnected(node_of(name)));
            let price = if name == "a" { 10 } else { 13 };
            bench.sequence += 1;
            let mut offer = offer_of(&format!("{name}:1gpu@{price}"), bench.sequence).into_inner();
            offer.engines[0].work = crate::records::WorkKind::Embed;
            // A million tokens are ten seconds of work.
            offer.engines[0].speed = crate::unit::Speed(100_000_000);
            offer.issued_at = UtcMillis(bench.now);
            offer.expires_at = UtcMillis(bench.now + 3_600_000);
            let from = offer.node.0;
            let offer = Signed::sign(offer, &secret_of(name));
            bench.tell(Event::Offer {
                request: RequestId(0),
                from,
                offer,
            });
        }
        for nonce in 0..4 {
            let order = order(nonce, embed);
            let (node, ask) = the_ask(&bench.submit(&order));
            let name = if node == node_of("a") { "a" } else { "b" };
            if nonce == 3 {
                assert_eq!(name, expected, "loading {loading}");
                break;
            }
            assert_eq!(name, "a", "two short jobs decide nothing");
            let lease = grant(name, &ask, |_| {});
            bench.hear(name, ToScheduler::Granted(lease.clone()));
            bench.now += 20_000;
            // 50,000 tokens a second where it is warm.
            let meters = Meters {
                device_ms: DeviceMillis(10_000 + loading),
                loading: DeviceMillis(loading),
                tokens_in: 1_000_000,
                items: ask.items,
                ..Meters::default()
            };
            let slow = if loading == 0 { 2 } else { 1 };
            let meters = Meters {
                device_ms: DeviceMillis(meters.device_ms.0 * slow),
                ..meters
            };
            let mut trail = finished(name, lease, 1, |_| {});
            let mut reading = trail.readings[0].clone().into_inner();
            reading.meters = meters;
            let reading = Signed::sign(reading, &secret_of(name));
            let mut usage = trail.usage.clone().into_inner();
            (usage.last_reading, usage.meters) = (reading.id(), meters);
            trail.readings = vec![reading];
            trail.usage = Signed::sign(usage, &secret_of(name));
            bench.hear(name, done(trail));
        }
    }
}

#[test]
fn a_deadline_prefers_reliable_places_only_when_there_is_nothing_to_lose() {
    // Ten minutes of work; `a` is cheap, and its owner often wants it back.
    for (deadline, expected) in [(3_600_000, "a"), (1_000_000, "b"), (700_000, "b"), (599_000, "a")] {
        let mut bench = Bench::new("a:1gpu@1 b:1gpu@9");
        for _ in 0..20 {
            bench
                .c
                .market
                .note_watched(&node_of("a"), DeviceMillis(3_600_000), true);
        }
        let order = order(1, |o| {
            o.work = Work::Noop {
                millis_per_item: 60_000,
            };
            o.credits_max = Credits(9_000_000);
            o.constraints.deadline = Some(UtcMillis(START + deadline));
        });
        let told = bench.c.explain_order(bench.clock(), &order);
        let out = bench.submit(&order);
        assert_eq!(asked(&out), expected, "{deadline}");
        match told.candidates.first() {
            Some(best) => assert_eq!(best.name, expected, "{deadline}"),
            None => assert_eq!(deadline, 599_000, "{}", told.summary),
        }
    }
}

#[test]
fn what_would_be_late_comes_before_the_rest_of_its_institution() {
    let mut bench = Bench::new("a:1gpu@1");
    let long = |nonce, deadline: Option<u64>| {
        order(nonce, move |o| {
            o.work = Work::Noop {
                millis_per_item: 60_000,
            };
            o.constraints.deadline = deadline.map(|ms| UtcMillis(START + ms));
        })
    };
    let (_, first) = the_ask(&bench.submit(&long(1, None)));
    for order in [
        long(2, None),
        long(3, Some(9_000_000)),
        long(4, Some(1_500_000)),
        long(5, Some(1_300_000)),
    ] {
        bench.submit(&order);
        bench.now += 10;
    }
    let mut ask = first;
    let mut order_of_turns = Vec::new();
    for _ in 0..4 {
        let lease = grant("a", &ask, |_| {});
        bench.hear("a", ToScheduler::Granted(lease.clone()));
        bench.now += 100_000;
        let out = bench.hear("a", done(finished("a", lease, 1_000, |_| {})));
        let next = asks(&out);
        let (_, next) = next
            .into_iter()
            .next()
            .unwrap_or_else(|| the_ask(&bench.wait(2_000)));
        order_of_turns.push(next.order.nonce);
        ask = next;
    }
    // The two that are short of time first, the earlier deadline before the later; then by age.
    assert_eq!(order_of_turns, [5, 4, 2, 3]);
}

/// A probe that could not measure an engine says 0.
#[test]
fn an_unknown_speed_breaks_no_deadline_and_is_learnt_from_the_first_job() {
    use crate::{market::Shown, records::WorkKind, unit::Speed};
    let mut bench = Bench::new("");
    bench.admit("a", Role::Node, Credits::ZERO);
    bench.tell(Event::NodeConnected(node_of("a")));
    let mut offer = offer_of("a:1gpu@0", 1).into_inner();
    offer.engines[0].work = WorkKind::Embed;
    offer.engines[0].speed = Speed(0);
    offer.issued_at = UtcMillis(bench.now);
    offer.expires_at = UtcMillis(bench.now + 3_600_000);
    let from = offer.node.0;
    let offer = Signed::sign(offer, &secret_of("a"));
    bench.tell(Event::Offer {
        request: RequestId(0),
        from,
        offer,
    });
    let order = order(1, |o| {
        embed(o);
        o.input.bytes = Bytes(400);
        o.constraints.deadline = Some(UtcMillis(START + 10_000));
    });
    let told = bench.c.explain_order(bench.clock(), &order);
    assert_eq!(told.starts, crate::controller::Start::Now, "{}", told.summary);
    let node = node_of("a");
    let shown = Shown {
        units: 500,
        time: DeviceMillis(1_000),
    };
    bench.c.market.note_success(&node, WorkKind::Embed, Some(shown));
    let speed = bench.c.market.get(&node).unwrap().speed(WorkKind::Embed);
    assert_eq!(speed, Some(Speed(500_000)));
}

/// Whether a node may run an order at all, by rules written apart from placement's.
fn may_run(offer: &Offer, order: &Order) -> bool {
    let (c, terms) = (&order.constraints, &offer.terms);
    let listed = |yes: &[crate::id::Institution], no: &[crate::id::Institution], name| {
        (yes.is_empty() || yes.contains(name)) && !no.contains(name)
    };
    (c.countries.is_empty() || c.countries.contains(&offer.country))
        && !c.countries_excluded.contains(&offer.country)
        && listed(&c.institutions, &c.institutions_excluded, &offer.institution)
        && listed(
            &terms.institutions,
            &terms.institutions_excluded,
            &order.institution,
        )
        && (terms.work.is_empty() || terms.work.contains(&order.work.kind()))
        && c.data <= terms.data
        && c.isolation <= Tier::of_offer(&offer.isolation)
}

#[test]
fn advice_sends_no_work_to_a_group_that_may_not_run_it() {
    let worlds = if std::env::var_os("KAREZ_LONG").is_some() {
        500
    } else {
        40
    };
    let mut advised = 0;
    for seed in 0..worlds {
        let mut state = 0x9e37_79b9_7f4a_7c15u64.wrapping_mul(seed + 1);
        let mut draw = |end: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % end
        };
        let schools = ["uni-nairobi", "usp-brazil", "hanoi"];
        let mut bench = Bench::new("");
        for user in schools {
            bench.admit_of(user, user, Role::User, Credits(1_000_000_000));
        }
        let names: Vec<String> = (0..12).map(|i| format!("n{i}")).collect();
        for name in &names {
            let mut text = format!("{name}:{}gpu@{}", 1 + draw(3), 1 + draw(5));
            for words in [
                [",KE", ",BR", ",FR"],
                ["", ",iso=seccomp", ",iso=landlock+seccomp"],
                ["", ",data=personal", ",data=public"],
                ["", ",only=hanoi", ",never=usp-brazil"],
            ] {
                text.push_str(words[draw(3) as usize]);
            }
            bench.admit_of("uni-nairobi", name, Role::Node, Credits::ZERO);
            bench.tell(Event::NodeConnected(node_of(name)));
            bench.offer(&text);
        }
        for nonce in 0..30 {
            let school = schools[draw(3) as usize];
            let order = order_of(school, school, nonce, |o| {
                o.items_per_part = 5;
                let c = &mut o.constraints;
                match draw(4) {
                    0 => c.isolation = [Tier::Seccomp, Tier::LandlockSeccomp][draw(2) as usize],
                    1 => c.data = [DataClass::Internal, DataClass::Personal][draw(2) as usize],
                    2 => c.countries = vec!["KE".parse().unwrap()],
                    _ => {}
                }
            });
            bench.submit(&order);
        }
        // All that is held comes free at once, and the slow path is asked about what waits.
        for name in &names {
            bench
                .c
                .market
                .give_back(&node_of(name), "gpu", Portion::devices(3));
        }
        bench.now += 10_000;
        bench.c.consult(bench.clock());
        let Some(guide) = bench.c.guide.clone() else {
            continue;
        };
        for (_, id) in &bench.c.queue {
            let order = &bench.c.jobs[id].order;
            let shape = crate::controller::guide::shape_of(order, guide.by_user);
            for group in guide.quotas.get(&shape).into_iter().flat_map(BTreeMap::keys) {
                advised += 1;
                let there = |listing: &crate::market::Listing| listing.groups.contains(group);
                for (_, listing) in bench.c.market.iter().filter(|(_, listing)| there(listing)) {
                    assert!(
                        may_run(&listing.offer, order),
                        "seed {seed}: {} for {:?} of {}",
                        listing.offer.name,
                        order.constraints,
                        order.institution
                    );
                }
            }
        }
    }
    assert!(advised > worlds, "{advised} pieces of advice in {worlds} worlds");
}
