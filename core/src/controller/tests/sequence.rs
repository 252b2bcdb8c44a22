//! Parts that follow each other.
use super::*;

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

/// Half an hour of training on a cheap machine whose owner often takes it back, beside a dear one that stays.
#[test]
fn training_leaves_a_fickle_machine_while_there_is_time_to() {
    const STEP: u64 = 6_000;
    for (spare, there_at_first) in [(420, "a"), (20, "b")] {
        let mut bench = Bench::new("a:1gpu@1 b:1gpu@9");
        for _ in 0..30 {
            let hour = DeviceMillis(3_600_000);
            bench.c.market.note_watched(&node_of("a"), hour, true);
        }
        let order = order(1, |order| {
            *order = training().into_inner();
            order.items = 360;
            // At a unit a second: the base model counts as the reference.
            let Work::Train(train) = &mut order.work else {
                unreachable!()
            };
            train.model.bytes = Bytes(220_000_000);
            train.tokens_per_step = 6;
            order.items_per_part = 360;
            order.credits_max = Credits(9_000_000);
            order.constraints.deadline = Some(UtcMillis(START + (360 + spare) * STEP));
        });
        let (node, ask) = the_ask(&bench.submit(&order));
        let name = if node == node_of("a") { "a" } else { "b" };
        assert_eq!(name, there_at_first, "{spare} steps to spare");
        bench.hear(name, ToScheduler::Granted(grant(name, &ask, |_| {})));
        // The cheap one grows slow, and so uses the slack up.
        let mut called = None;
        for step in 1..360 + spare / 2 {
            bench.now = START + step * STEP;
            if step == 300 {
                bench.offer("a:1gpu@1");
                bench.offer("b:1gpu@9");
            }
            let held = Held {
                key: ask.key,
                phase: Phase::Running,
                items_done: match name {
                    "a" if step > 100 => 100 + (step - 100) * 3 / 10,
                    _ => step.min(359),
                },
                tokens: 0,
                loss_micro: 0,
            };
            let report = Report {
                sequence: step,
                held: vec![held],
            };
            let out = bench.hear(name, ToScheduler::Report(report));
            let cause = out.iter().find_map(|effect| match effect {
                Effect::Send(_, ToNode::Move { cause, .. }) => Some(cause.clone()),
                _ => None,
            });
            if let Some(cause) = cause {
                called = Some((step, cause));
                break;
            }
        }
        match (there_at_first, called) {
            ("a", Some((step, cause))) => {
                assert!(cause.contains("no time to lose any more"), "{cause}");
                // As late as it could, and go on as slowly.
                assert!((400..430).contains(&step), "{step}");
            }
            ("b", None) => {}
            (_, other) => panic!("{spare}: {other:?}"),
        }
    }
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
