//! Questions: who gets them, who keeps them, and whom they leave.
use super::*;
use crate::{
    records::{Engine, Generate, WorkKind},
    routing::{Prefix, Warmth},
    unit::Speed,
};

/// The same nodes, which also write texts: ten tokens a second.
fn bench(nodes: &str) -> Bench {
    let mut bench = Bench::new(nodes);
    for (i, text) in nodes.split_whitespace().enumerate() {
        let mut offer = offer_of(text, 100 + i as u64).into_inner();
        offer.issued_at = UtcMillis(bench.now);
        offer.expires_at = UtcMillis(bench.now + 3_600_000);
        offer.engines.push(Engine {
            work: WorkKind::Generate,
            speed: Speed(10_000),
            ..offer.engines[0].clone()
        });
        let (from, name) = (offer.node.0, offer.name.clone());
        let offer = Signed::sign(offer, &secret_of(&name));
        let request = RequestId(0);
        bench.tell(Event::Offer { request, from, offer });
    }
    bench
}

fn question(nonce: u64, model: ArtifactRef) -> Verified<Order> {
    order(nonce, |order| {
        order.items = 1;
        order.items_per_part = 0;
        order.input.bytes = Bytes(8_000);
        order.work = Work::Generate(Generate {
            stream: true,
            ..Generate::greedy(model, "m", 100)
        });
    })
}

fn content() -> ArtifactRef {
    ArtifactRef {
        digest: Digest::of(b"model"),
        bytes: Bytes(1 << 20),
        kind: ArtifactKind::Blob,
    }
}

fn prompt(bench: &mut Bench, order: &Verified<Order>, text: &str) {
    bench.tell(Event::Prompt {
        job: JobId(order.id()),
        prefix: Prefix::of(&content().digest, None, text),
    });
}

#[test]
fn a_node_that_writes_nothing_is_left_and_avoided() {
    let mut bench = bench("a:1gpu@0 b:1gpu@3");
    let (node, ask) = the_ask(&bench.submit(&question(1, content())));
    assert_eq!(node, node_of("a"), "the cheaper one");
    bench.hear("a", ToScheduler::Granted(grant("a", &ask, |_| {})));
    // It is at work, and says so.
    for _ in 0..10 {
        assert_eq!(brief(&bench.wait(1_000)), "");
        bench.hear("a", ToScheduler::Alive { key: ask.key });
    }
    // A heartbeat is not enough: only who works says that it does.
    bench.wait(3_000);
    bench.report("a", &[(ask.key, Phase::Running)]);
    let began = bench.now;
    let out = bench.wait(2_000);
    assert_eq!(brief(&out), "stop a, ask b #2");
    assert!(bench.now - began <= 2_000, "within five seconds of its last word");
    let logs = bench.c.logs(&ask.key.job);
    assert!(
        logs.iter().any(|line| line.text.contains("wrote nothing")),
        "{logs:?}"
    );
    // The next question goes elsewhere at once, though it costs more there.
    let (_, ask) = the_ask(&out);
    let lease = grant("b", &ask, |_| {});
    bench.hear("b", ToScheduler::Granted(lease.clone()));
    bench.hear("b", done(finished("b", lease, 1_000, |_| {})));
    let (node, _) = the_ask(&bench.submit(&question(2, content())));
    assert_eq!(node, node_of("b"));
    // When there is no other, it gets its chance all the same.
    bench.submit(&question(3, content()));
    let asked = asks(&bench.wait(70_000));
    assert!(asked.iter().any(|(node, _)| *node == node_of("a")));
}

#[test]
fn a_question_goes_where_its_prompt_is_known() {
    let mut bench = bench("a:1gpu@1 b:1gpu@1 c:1gpu@1");
    let text = "You answer farmers in Swahili. ".repeat(200);
    let prefix = Prefix::of(&content().digest, None, &text);
    let order = question(1, content());
    prompt(&mut bench, &order, &text);
    for (name, prefixes) in [
        ("a", Vec::new()),
        ("b", Vec::new()),
        ("c", prefix.hashes().to_vec()),
    ] {
        let models = vec![content().digest];
        bench.hear(name, ToScheduler::Warm(Warmth { models, prefixes }));
    }
    let (node, ask) = the_ask(&bench.submit(&order));
    assert_eq!(node, node_of("c"));
    let why = bench.part(&ask.key).why;
    assert!(why.contains("tokens of its prompt are known there"), "{why}");
    // It is busy now: the next one waits for it a moment, and then nobody makes it wait any longer.
    let order = question(2, content());
    prompt(&mut bench, &order, &text);
    assert_eq!(brief(&bench.submit(&order)), "Submitted");
    let (node, ask) = the_ask(&bench.wait(2_000));
    assert_ne!(node, node_of("c"));
    assert!(!bench.part(&ask.key).why.contains("known there"));
}

#[test]
fn nobody_who_told_is_a_guess() {
    let mut bench = bench("a:1gpu@1 b:1gpu@1");
    let (_, ask) = the_ask(&bench.submit(&question(1, content())));
    let why = bench.part(&ask.key).why;
    assert!(why.contains("a guess"), "{why}");
}

#[test]
fn served_models_and_other_work_keep_to_their_own_devices() {
    let mut bench = bench("a:1gpu@5 b:1server/m@1");
    assert_eq!(bench.c.served().into_iter().collect::<Vec<_>>(), ["m"]);
    let (node, ask) = the_ask(&bench.submit(&question(1, ArtifactRef::served("m"))));
    assert_eq!((node, ask.device_class.as_str()), (node_of("b"), "server/m"));
    for order in [question(2, content()), order(3, |_| {})] {
        let (node, _) = the_ask(&bench.submit(&order));
        assert_eq!(node, node_of("a"), "a server does nothing else");
        bench.tell(Event::Cancel {
            request: RequestId(9),
            caller: order.user.0,
            job: JobId(order.id()),
        });
        bench.wait(10_000);
    }
    assert_eq!(
        brief(&bench.submit(&question(4, ArtifactRef::served("other")))),
        "Submitted"
    );
}
