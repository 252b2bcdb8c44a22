//! Work that runs all at once, work that is moved, and queues that nobody blocks.
use super::*;

fn moves(out: &[Effect]) -> Vec<LeaseKey> {
    let moved = |effect: &Effect| match effect {
        Effect::Send(_, ToNode::Move { key, .. }) => Some(*key),
        _ => None,
    };
    out.iter().filter_map(moved).collect()
}

fn together(nonce: u64, parts: u64) -> Verified<Order> {
    order(nonce, |o| {
        o.items = parts;
        o.items_per_part = 1;
        o.constraints.together = true;
    })
}

/// A scheduler with nodes of two institutions, by the word `usp-brazil`.
fn two_schools(nodes: &str) -> Bench {
    let mut bench = Bench::new("");
    bench.admit_of("usp-brazil", "guest", Role::User, Credits(100_000_000));
    for text in nodes.split_whitespace() {
        let name = text.split(':').next().unwrap();
        let school = if text.contains("usp-brazil") {
            "usp-brazil"
        } else {
            "uni-nairobi"
        };
        bench.admit_of(school, name, Role::Node, Credits::ZERO);
        bench.tell(Event::NodeConnected(node_of(name)));
        bench.offer(text);
    }
    bench
}

fn of(node: NodeId) -> &'static str {
    ["a", "b", "c", "d"]
        .into_iter()
        .find(|n| node_of(n) == node)
        .unwrap()
}

fn left(usage: &mut Usage) {
    usage.outcome = Outcome::Reclaimed;
    usage.cause = "moved".into();
    usage.retryable = true;
}

#[test]
fn parts_that_run_together_use_every_class_of_devices_a_site_has() {
    let mut bench = two_schools("a:1gpu@1,also=2cpu@3 b:1gpu@2 c:3gpu@9,usp-brazil,BR");
    let asked = asks(&bench.submit(&together(1, 4)));
    let mut places: Vec<_> = asked.iter().map(|(node, _)| of(*node)).collect();
    places.sort_unstable();
    assert_eq!(places, ["a", "a", "a", "b"]);
}

#[test]
fn parts_that_run_together_start_at_one_site_or_not_at_all() {
    // Three places here and three there: four fit nowhere now, five never.
    let mut bench = two_schools("a:2gpu@1 b:2gpu@1 c:3gpu@1,usp-brazil,BR");
    let (_, busy) = the_ask(&bench.submit(&order(1, |o| {
        o.constraints.countries = vec!["KE".parse().unwrap()]
    })));
    let job = together(2, 4);
    let out = bench.submit(&job);
    assert_eq!(asks(&out), []);
    let cause = bench.c.job(&JobId(job.id())).unwrap().parts[0].cause.clone();
    assert!(
        cause.contains("uni-nairobi in KE has room for 3 of them now, which is kept for them"),
        "{cause}"
    );
    // What is kept is nobody else's.
    let (node, _) = the_ask(&bench.submit(&order(3, |_| {})));
    assert_eq!(of(node), "c");
    let never = together(4, 5);
    bench.submit(&never);
    let cause = bench.c.job(&JobId(never.id())).unwrap().parts[0].cause.clone();
    assert!(
        cause.contains("the largest site that may run them has room for 4"),
        "{cause}"
    );
    // The fourth comes free: all of them start.
    let name = if busy.key.fence == 1 {
        of(bench.c.claims[&busy.key].node)
    } else {
        unreachable!()
    };
    let lease = grant(name, &busy, |_| {});
    let out = bench.hear(name, done(finished(name, lease, 1, |_| {})));
    let mut started: Vec<_> = asks(&out)
        .into_iter()
        .map(|(node, ask)| (ask.key.part, of(node)))
        .collect();
    started.sort_unstable();
    assert_eq!(
        started.iter().map(|(part, _)| *part).collect::<Vec<_>>(),
        [0, 1, 2, 3]
    );
    assert!(
        started.iter().all(|(_, node)| ["a", "b"].contains(node)),
        "{started:?}"
    );
}

#[test]
fn a_site_is_kept_for_a_while_only() {
    let mut bench = Bench::new("a:2gpu@1");
    let (_, held) = the_ask(&bench.submit(&order(1, |_| {})));
    let lease = grant("a", &held, |_| {});
    bench.hear("a", ToScheduler::Granted(lease));
    bench.submit(&together(2, 2));
    assert_eq!(asks(&bench.submit(&order(3, |_| {}))), [], "kept");
    let mut waited = 0;
    let mut given = Vec::new();
    while given.is_empty() && waited < 200 {
        bench.report("a", &[(held.key, Phase::Running)]);
        given = asks(&bench.wait(1_000));
        waited += 1;
    }
    assert!((55..70).contains(&waited), "{waited}");
    assert_eq!(given[0].1.order.nonce, 3, "then others have it");
}

#[test]
fn a_lost_part_calls_back_those_that_run_with_it() {
    let mut bench = Bench::new("a:2gpu@1 b:1gpu@1");
    let job = together(1, 3);
    let started = asks(&bench.submit(&job));
    assert_eq!(started.len(), 3);
    for (node, ask) in &started {
        bench.hear(of(*node), ToScheduler::Granted(grant(of(*node), ask, |_| {})));
    }
    bench.now += 5_000;
    let (node, first) = &started[0];
    let lease = grant(of(*node), first, |_| {});
    let out = bench.hear(of(*node), done(finished(of(*node), lease, 10, failed)));
    let called = moves(&out);
    assert_eq!(called.len(), 2, "{}", brief(&out));
    assert_eq!(asks(&out), [], "not before all are back");
    let mut again = Vec::new();
    for (node, ask) in started.iter().skip(1) {
        let lease = grant(of(*node), ask, |_| {});
        again = asks(&bench.hear(of(*node), done(finished(of(*node), lease, 10, left))));
    }
    if again.is_empty() {
        again = asks(&bench.wait(40_000));
    }
    assert_eq!(again.len(), 3, "all of them again");
    let view = bench.c.job(&JobId(job.id())).unwrap();
    assert!(view.parts.iter().all(|p| p.fence == 2));
}

#[test]
fn guests_leave_for_the_owners_own_people_and_not_too_often() {
    let mut bench = two_schools("a:1gpu@1,local");
    let long = |nonce, user: &str, school: &str| {
        order_of(user, school, nonce, |o| {
            o.work = Work::Noop {
                millis_per_item: 60_000,
            }
        })
    };
    let (_, guest) = the_ask(&bench.submit(&long(1, "guest", "usp-brazil")));
    bench.hear("a", ToScheduler::Granted(grant("a", &guest, |_| {})));
    // Another guest does not send it away, nor does its own host at once.
    assert_eq!(moves(&bench.submit(&long(2, "guest", "usp-brazil"))), []);
    assert_eq!(moves(&bench.submit(&long(3, "user", "uni-nairobi"))), []);
    bench.now += 11_000;
    let mut called = moves(&bench.report("a", &[(guest.key, Phase::Running)]));
    called.extend(moves(&bench.wait(5_000)));
    assert_eq!(called, [guest.key]);
    // Once is enough, and the owner did not take anything back.
    assert_eq!(moves(&bench.wait(1_000)), []);
    let hazard = bench.c.market.get(&node_of("a")).unwrap().hazard();
    let out = bench.hear("a", done(finished("a", grant("a", &guest, |_| {}), 10, left)));
    let (_, next) = the_ask(&out);
    assert_eq!(next.order.nonce, 3, "the machine is for whom it was emptied");
    assert_eq!(bench.c.market.get(&node_of("a")).unwrap().hazard(), hazard);
    assert_eq!(bench.part(&guest.key).state, JobState::Queued);
    // Local work is never sent away by local work.
    bench.hear("a", ToScheduler::Granted(grant("a", &next, |_| {})));
    bench.submit(&long(4, "user", "uni-nairobi"));
    bench.now += 30_000;
    assert_eq!(moves(&bench.report("a", &[(next.key, Phase::Running)])), []);
}

#[test]
fn work_that_would_be_late_where_it_runs_is_moved_where_it_is_not() {
    let mut bench = Bench::new("a:1gpu@1");
    let job = order(1, |o| {
        o.work = Work::Noop {
            millis_per_item: 60_000,
        };
        o.constraints.deadline = Some(UtcMillis(START + 3_000_000));
    });
    let (_, ask) = the_ask(&bench.submit(&job));
    bench.hear("a", ToScheduler::Granted(grant("a", &ask, |_| {})));
    bench.admit("b", Role::Node, Credits::ZERO);
    bench.tell(Event::NodeConnected(node_of("b")));
    bench.offer("b:1gpu@1");
    let running = |bench: &mut Bench, done: u64| {
        let held = Held {
            key: ask.key,
            phase: Phase::Running,
            items_done: done,
            tokens: 0,
            loss_micro: 0,
        };
        let out = bench.hear(
            "a",
            ToScheduler::Report(Report {
                sequence: 1,
                held: vec![held],
            }),
        );
        moves(&out)
    };
    // On time, then ten times too slow.
    for minute in 1..=4 {
        bench.now = START + minute * 60_000;
        assert_eq!(running(&mut bench, minute), [], "minute {minute}");
    }
    let mut called = Vec::new();
    let mut minute = 4;
    while called.is_empty() && minute < 48 {
        minute += 1;
        bench.now = START + minute * 60_000;
        called = running(&mut bench, 4);
    }
    assert_eq!(called, [ask.key]);
    // Early enough for the ten minutes it takes elsewhere.
    assert!(minute < 40, "{minute}");
}

fn a_long_part_on_a_dear_machine() -> (Bench, LeaseAsk) {
    let mut bench = Bench::new("a:1gpu@10");
    let job = order(1, |o| {
        o.work = Work::Noop {
            millis_per_item: 180_000,
        };
        o.credits_max = Credits(10_000_000);
    });
    let (_, ask) = the_ask(&bench.submit(&job));
    bench.hear("a", ToScheduler::Granted(grant("a", &ask, |_| {})));
    (bench, ask)
}

#[test]
fn much_cheaper_is_worth_a_move_and_a_little_cheaper_is_not() {
    for (price, moved) in [(9, false), (8, false), (2, true)] {
        let (mut bench, ask) = a_long_part_on_a_dear_machine();
        bench.admit("b", Role::Node, Credits::ZERO);
        bench.tell(Event::NodeConnected(node_of("b")));
        bench.offer(&format!("b:1gpu@{price}"));
        let mut called = Vec::new();
        for _ in 0..10 {
            bench.now += 10_000;
            called.extend(moves(&bench.report("a", &[(ask.key, Phase::Running)])));
        }
        called.dedup();
        assert_eq!(!called.is_empty(), moved, "{price}");
    }
}

/// What was done is paid by nobody once it is called back: the longer a part has run, the cheaper it must be elsewhere.
#[test]
fn work_that_is_well_under_way_is_not_thrown_away_for_a_price() {
    for (after, moved) in [(30_000, true), (900_000, false)] {
        let (mut bench, ask) = a_long_part_on_a_dear_machine();
        let begun = bench.now;
        let running = |bench: &mut Bench| {
            bench.now += 10_000;
            let held = Held {
                key: ask.key,
                phase: Phase::Running,
                items_done: (bench.now - begun) / 180_000,
                tokens: 0,
                loss_micro: 0,
            };
            let held = vec![held];
            moves(&bench.hear("a", ToScheduler::Report(Report { sequence: 1, held })))
        };
        while bench.now < begun + after {
            assert_eq!(running(&mut bench), []);
        }
        bench.admit("b", Role::Node, Credits::ZERO);
        bench.tell(Event::NodeConnected(node_of("b")));
        bench.offer("b:1gpu@2");
        let mut called = Vec::new();
        for _ in 0..10 {
            called.extend(running(&mut bench));
        }
        assert_eq!(!called.is_empty(), moved, "after {after} ms");
    }
}

/// A queue behind a busy node: what could run elsewhere does, whoever came first.
#[test]
fn nothing_waits_behind_work_that_cannot_run() {
    let mut bench = Bench::new("a:1gpu@1 b:1cpu@1");
    let on = |nonce, class: &str| {
        order(nonce, |o| {
            o.constraints.device = class.into();
            o.credits_max = Credits(10_000);
        })
    };
    let (node, first) = the_ask(&bench.submit(&on(0, "gpu")));
    assert_eq!(of(node), "a");
    // Forty wait for the busy device, with parts of every size; nothing of them can run.
    for nonce in 1..=40 {
        assert_eq!(asks(&bench.submit(&on(nonce, "gpu"))), []);
    }
    // What comes behind them and needs another device starts at once, one after the other.
    for nonce in 41..=45 {
        let (node, ask) = the_ask(&bench.submit(&on(nonce, "cpu")));
        assert_eq!((of(node), ask.order.nonce), ("b", nonce));
        let lease = grant("b", &ask, |_| {});
        bench.hear("b", done(finished("b", lease, 1, |_| {})));
    }
    // A job whose first parts are held back does not hold its institution back either.
    bench.hear(
        "a",
        ToScheduler::Refused {
            key: first.key,
            why: crate::exchange::Refusal::Busy { class: "gpu".into() },
        },
    );
    let (node, _) = the_ask(&bench.submit(&on(46, "cpu")));
    assert_eq!(of(node), "b");
}
