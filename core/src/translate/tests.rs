use super::*;
use crate::{
    artifact::{ArtifactKind, ArtifactRef},
    exchange::{
        FinishedLease, HELD_MAX, Held, Holder, LeaseAsk, Phase, READINGS_MAX, Refusal, Report, ToNode,
        ToScheduler,
    },
    id::LeaseKey,
    key::{SchedulerId, SecretKey, UserId},
    records::{
        Constraints, Lease, MeterReading, Meters, Order, Outcome, Receipt, Signed, Usage, Verified, Work,
    },
    unit::{Bytes, Credits, DeviceMillis, Millis, MonoMillis, Portion, Rate, UtcMillis},
};
use alloc::boxed::Box;
use proptest::prelude::*;
use prost::Message as _;

fn secret(n: u8) -> SecretKey {
    SecretKey::from_bytes(&[n; 32])
}
fn public(n: u8) -> PublicKey {
    PublicKey::of(&secret(n))
}
fn lease_key() -> LeaseKey {
    LeaseKey {
        job: JobId(order().id()),
        part: 3,
        fence: 2,
    }
}

fn order() -> Verified<Order> {
    let order = Order {
        user: UserId(public(1)),
        institution: "uni-nairobi".parse().unwrap(),
        scheduler: SchedulerId(public(2)),
        work: Work::Noop { millis_per_item: 5 },
        input: ArtifactRef {
            digest: Digest::of(b"in"),
            bytes: Bytes(2),
            kind: ArtifactKind::Blob,
        },
        items: 100,
        items_per_part: 10,
        constraints: Constraints::default(),
        credits_max: Credits(5),
        attempts_max: 3,
        nonce: 1,
        issued_at: UtcMillis(10),
        expires_at: UtcMillis(20),
    };
    Signed::sign(order, &secret(1))
}

fn lease() -> Verified<Lease> {
    let key = lease_key();
    let lease = Lease {
        job: key.job,
        part: key.part,
        fence: key.fence,
        node: NodeId(public(3)),
        scheduler: SchedulerId(public(2)),
        institution: "lab-7".parse().unwrap(),
        device_class: "cpu/x86-64-v3".into(),
        devices: Portion::share(125).unwrap(),
        rate: Rate(9),
        device_ms_max: DeviceMillis(1_000),
        first_item: 30,
        items: 10,
        granted_at: UtcMillis(11),
        expires_at: UtcMillis(12),
    };
    Signed::sign(lease, &secret(3))
}

fn reading(sequence: u32) -> Verified<MeterReading> {
    let reading = MeterReading {
        lease: lease().id(),
        node: NodeId(public(3)),
        sequence,
        previous: None,
        meters: Meters {
            tokens_in: 7,
            millijoules: Some(4),
            ..Meters::default()
        },
        method: "rusage+wall/1".into(),
        taken_at: UtcMillis(13),
        mono: MonoMillis(1),
        benchmark: None,
    };
    Signed::sign(reading, &secret(3))
}

fn usage() -> Verified<Usage> {
    let usage = Usage {
        lease: lease().id(),
        node: NodeId(public(3)),
        last_reading: reading(0).id(),
        readings: 1,
        meters: Meters::default(),
        outcome: Outcome::Reclaimed,
        cause: "the owner came back".into(),
        retryable: true,
        result: None,
        started_at: UtcMillis(11),
        ended_at: UtcMillis(14),
    };
    Signed::sign(usage, &secret(3))
}

fn receipt() -> Verified<Receipt> {
    let receipt = Receipt {
        usage: usage().id(),
        lease: lease().id(),
        job: lease_key().job,
        scheduler: SchedulerId(public(2)),
        node: NodeId(public(3)),
        node_institution: "lab-7".parse().unwrap(),
        user: UserId(public(1)),
        user_institution: "uni-nairobi".parse().unwrap(),
        observed: DeviceMillis(5),
        billed: DeviceMillis(4),
        credits: Credits(3),
        flags: Vec::new(),
        issued_at: UtcMillis(15),
        disputable_until: UtcMillis(16),
        rate_card: 0,
    };
    Signed::sign(receipt, &secret(2))
}

fn refusals() -> Vec<Refusal> {
    vec![
        Refusal::Busy { class: "cpu".into() },
        Refusal::Policy {
            why: "nights only".into(),
        },
        Refusal::Price { now: Rate(8) },
        Refusal::Fenced { seen: 5 },
        Refusal::Mismatch { why: "rate".into() },
        Refusal::Unable {
            why: "no disk".into(),
        },
    ]
}

/// Over the wire as bytes, not only as messages.
fn to_scheduler_and_back(said: FromNode) -> FromNode {
    let bytes = wire::NodeMessage::from(said).encode_to_vec();
    wire::NodeMessage::decode(bytes.as_slice())
        .unwrap()
        .try_into()
        .unwrap()
}
fn to_node_and_back(said: FromScheduler) -> FromScheduler {
    let bytes = wire::SchedulerMessage::from(said).encode_to_vec();
    wire::SchedulerMessage::decode(bytes.as_slice())
        .unwrap()
        .try_into()
        .unwrap()
}

#[test]
fn everything_a_node_says_arrives_as_said() {
    let key = lease_key();
    let phases = [Phase::Granted, Phase::Fetching, Phase::Running, Phase::Finished];
    let held = phases
        .map(|phase| Held {
            key,
            phase,
            items_done: 4,
            tokens: 9,
            loss_micro: 0,
        })
        .to_vec();
    let report = Report { sequence: 8, held };
    let finished = FinishedLease {
        lease: lease(),
        readings: vec![reading(0), reading(1)],
        usage: usage(),
    };
    let mut said = vec![
        FromNode::Hello {
            version: "0.1.0".into(),
            name: "lab-1".into(),
            report: report.clone(),
        },
        FromNode::Heard(ToScheduler::Report(report)),
        FromNode::Heard(ToScheduler::Granted(lease())),
        FromNode::Heard(ToScheduler::Reading {
            key,
            reading: reading(0),
        }),
        FromNode::Heard(ToScheduler::Finished(Box::new(finished))),
        FromNode::Log {
            key,
            text: "fetching the model".into(),
        },
        FromNode::Goodbye {
            reason: "stopping".into(),
        },
    ];
    said.extend(
        refusals()
            .into_iter()
            .map(|why| FromNode::Heard(ToScheduler::Refused { key, why })),
    );
    for said in said {
        assert_eq!(to_scheduler_and_back(said.clone()), said);
    }
}

#[test]
fn everything_a_scheduler_says_arrives_as_said() {
    let key = lease_key();
    let ask = LeaseAsk {
        key,
        order: order(),
        first_item: 30,
        items: 10,
        device_class: "cuda/NVIDIA H200".into(),
        devices: Portion::devices(2),
        rate: Rate(7),
        device_ms_max: DeviceMillis(99),
        ttl: Millis(15_000),
        holders: vec![Holder {
            key: public(2),
            addrs: vec!["127.0.0.1:7402".into()],
        }],
        from: Some(order().input),
        input: b"{\"prompt\":\"Habari?\"}\n".to_vec(),
        here: false,
    };
    let renewals = vec![(key, UtcMillis(50), Millis(15_000))];
    for said in [
        FromScheduler::Welcome {
            scheduler_name: "Nairobi".into(),
            heartbeat: Millis(2_000),
            artifact_addrs: vec!["127.0.0.1:7402".into()],
        },
        FromScheduler::Said(ToNode::Ask(Box::new(ask))),
        FromScheduler::Said(ToNode::Renewed {
            sequence: 8,
            renewals,
            stops: vec![(key, "cancelled".into())],
        }),
        FromScheduler::Said(ToNode::Stop {
            key,
            cause: "cancelled".into(),
        }),
        FromScheduler::Said(ToNode::Move {
            key,
            cause: "the machine's own people wait for it".into(),
        }),
        FromScheduler::Said(ToNode::Settled {
            key,
            receipt: Some(receipt()),
            why: String::new(),
        }),
        FromScheduler::Said(ToNode::Settled {
            key,
            receipt: None,
            why: "another attempt counts".into(),
        }),
        FromScheduler::Goodbye {
            reason: "stopping".into(),
        },
    ] {
        assert_eq!(to_node_and_back(said.clone()), said);
    }
}

#[test]
fn what_breaks_a_rule_is_named() {
    use wire::node_message::Message;
    let key = || Some(lease_key().into());
    let read = |message| {
        let error = FromNode::try_from(wire::NodeMessage { message }).expect_err("an error");
        error.to_string()
    };
    let held = wire::Held {
        key: key(),
        phase: "running".into(),
        items_done: 0,
        tokens: 0,
        loss_micro: 0,
    };
    let other = LeaseKey {
        fence: 9,
        ..lease_key()
    };
    let usage_with = |readings| {
        Some(Message::Usage(wire::UsageReport {
            key: key(),
            envelope: usage().encode(),
            lease: lease().encode(),
            readings,
        }))
    };
    let reply = |key, lease| {
        Some(Message::LeaseReply(wire::LeaseReply {
            key,
            lease,
            refusal: None,
        }))
    };
    for (got, expected) in [
        (read(None), "node message: message is missing"),
        (
            read(Some(Message::Report(wire::Report {
                sequence: 1,
                held: vec![held; HELD_MAX + 1],
            }))),
            "report: held has 1025 entries, the limit is 1024",
        ),
        (
            read(usage_with(vec![reading(0).encode(); READINGS_MAX + 1])),
            "usage: readings has 257 entries",
        ),
        (read(usage_with(Vec::new())), "usage: readings is missing"),
        (read(reply(key(), Vec::new())), "lease reply: lease is missing"),
        (read(reply(None, lease().encode())), "lease reply: key is missing"),
        (
            read(reply(Some(other.into()), lease().encode())),
            "lease reply: lease is for",
        ),
        (read(reply(key(), order().encode())), "expected karez.lease.v1"),
        (
            read(Some(Message::Log(wire::LogLine {
                key: Some(wire::LeaseKey {
                    job: vec![1],
                    part: 0,
                    fence: 0,
                }),
                text: String::new(),
            }))),
            "lease key: job is 1 bytes, a digest is 32",
        ),
    ] {
        assert!(got.contains(expected), "{got:?} lacks {expected:?}");
    }
    let mut forged = lease().encode();
    let last = forged.len() - 1;
    forged[last] ^= 1;
    assert!(read(reply(key(), forged)).contains("signature does not match"));
}

#[test]
fn an_ask_is_for_the_job_of_its_order() {
    let mut ask = wire::LeaseAsk {
        key: Some(lease_key().into()),
        order: order().encode(),
        devices: 1,
        ..Default::default()
    };
    assert!(LeaseAsk::try_from(ask.clone()).is_ok());
    let neither = wire::LeaseAsk {
        devices: 2,
        share_milli: 500,
        ..ask.clone()
    };
    let told = LeaseAsk::try_from(neither).unwrap_err().to_string();
    assert!(
        told.contains("neither whole devices nor a share of one"),
        "{told}"
    );
    ask.key = Some(
        LeaseKey {
            job: JobId(Digest::of(b"other")),
            ..lease_key()
        }
        .into(),
    );
    assert!(LeaseAsk::try_from(ask.clone()).is_err_and(|e| e.to_string().contains("order is job")));
    ask.holders = vec![wire::Holder::default(); HOLDERS_MAX + 1];
    assert!(LeaseAsk::try_from(ask).is_err_and(|e| e.to_string().contains("holders has 65")));
}

proptest! {
    #[test]
    fn cleaned_text_fits_and_cannot_command_a_terminal(text: String, max in 0usize..100) {
        let cleaned = clean(&text, max);
        prop_assert!(cleaned.len() <= max && !cleaned.chars().any(char::is_control));
        prop_assert_eq!(clean(&cleaned, max), cleaned);
    }

    #[test]
    fn no_bytes_panic(bytes: Vec<u8>) {
        if let Ok(w) = wire::NodeMessage::decode(bytes.as_slice()) {
            let _ = FromNode::try_from(w);
        }
        if let Ok(w) = wire::SchedulerMessage::decode(bytes.as_slice()) {
            let _ = FromScheduler::try_from(w);
        }
    }

    #[test]
    fn reports_survive(sequence: u64, held in proptest::collection::vec((any::<u32>(), any::<u64>(), any::<u64>(), any::<u64>()), 0..20)) {
        let held = held
            .into_iter()
            .map(|(part, fence, items_done, tokens)| Held {
                key: LeaseKey { job: JobId(Digest::of(b"j")), part, fence },
                phase: Phase::Running,
                items_done,
                tokens,
                loss_micro: fence ^ tokens,
            })
            .collect();
        let report = Report { sequence, held };
        prop_assert_eq!(Report::try_from(wire::Report::from(report.clone())), Ok(report));
    }
}
