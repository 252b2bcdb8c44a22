//! The life of a job: placed, run, billed, lost, taken up again.
use super::*;

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
