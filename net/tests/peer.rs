//! Small swarms on loopback.
// Helpers outside `#[test]` functions are test code too.
#![allow(clippy::unwrap_used)]
use karez_core::key::{PublicKey, SecretKey};
use karez_net::{
    identity,
    peer::{
        Answer, Multiaddr, OFFER_BYTES_MAX, Peer, PeerConfig, PeerError, PeerEvent, SUMMARY_BYTES_MAX,
        Verdict,
    },
};
use libp2p::multiaddr::Protocol;
use std::time::Duration;
use tokio::{
    io::AsyncWriteExt,
    net::TcpStream,
    sync::mpsc::Receiver,
    time::{sleep, timeout},
};

fn secret(n: u8) -> SecretKey {
    SecretKey::from_bytes(&[n; 32])
}

fn key(n: u8) -> PublicKey {
    PublicKey::of(&secret(n))
}

fn loopback() -> Vec<Multiaddr> {
    vec!["/ip4/127.0.0.1/tcp/0".parse().unwrap()]
}

async fn scheduler(n: u8, bootstrap: Vec<Multiaddr>) -> (Peer, Receiver<PeerEvent>, Multiaddr) {
    let (peer, events) = Peer::start(&secret(n), PeerConfig::scheduler(loopback(), bootstrap)).unwrap();
    let addr = listening(&peer).await;
    (peer, events, addr)
}

async fn listening(peer: &Peer) -> Multiaddr {
    for _ in 0..100 {
        if let Some(addr) = peer.listen_addrs().await.unwrap().pop() {
            return addr;
        }
        sleep(Duration::from_millis(20)).await;
    }
    panic!("the swarm does not listen");
}

fn accepted() -> Answer {
    Answer::Accepted {
        control_addr: "127.0.0.1:7400".into(),
    }
}

/// Answers every offer, and reports it.
fn answer_offers(mut events: Receiver<PeerEvent>, how: Answer) -> Receiver<(PublicKey, Vec<u8>)> {
    let (report, reports) = tokio::sync::mpsc::channel(64);
    tokio::spawn(async move {
        while let Some(event) = events.recv().await {
            if let PeerEvent::Offer { from, bytes, answer } = event {
                let _ = answer.send(how.clone());
                let _ = report.send((from, bytes)).await;
            }
        }
    });
    reports
}

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(20), future)
        .await
        .unwrap_or_else(|_| panic!("{what} took too long"))
}

#[tokio::test]
async fn a_node_finds_a_scheduler_through_another_and_its_offer_is_answered() {
    let (_a, _a_events, a_addr) = scheduler(1, vec![]).await;
    // The second scheduler knows the first; the node knows the first only.
    let (b, b_events, _) = scheduler(2, vec![a_addr.clone()]).await;
    let mut offers = answer_offers(b_events, accepted());
    within("the schedulers' meeting", async {
        while b.connected().await.unwrap() != [key(1)] {
            sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    let (node, mut events) = Peer::start(&secret(3), PeerConfig::node(vec![a_addr])).unwrap();
    within("finding both schedulers", async {
        loop {
            let found = node.find_schedulers().await.unwrap();
            let both = [key(1), key(2)]
                .iter()
                .all(|k| found.iter().any(|f| f.key == *k && !f.addrs.is_empty()));
            if both {
                break;
            }
            sleep(Duration::from_millis(100)).await;
        }
    })
    .await;
    assert!(matches!(
        within("the news of a scheduler", events.recv()).await,
        Some(PeerEvent::SchedulerFound(_))
    ));
    let answer = within("the answer", node.advertise(key(2), b"an offer".to_vec())).await;
    assert_eq!(answer, Ok(accepted()));
    assert_eq!(
        within("the offer", offers.recv()).await,
        Some((key(3), b"an offer".to_vec()))
    );
    assert_eq!(b.counts().offers, 1);
}

#[tokio::test]
async fn refusals_limits_and_rates_are_told_to_the_sender() {
    let (a, events, addr) = scheduler(1, vec![]).await;
    let refusal = Answer::Refused {
        reason: "no such institution".into(),
    };
    let _offers = answer_offers(events, refusal.clone());
    let (node, _events) = Peer::start(&secret(3), PeerConfig::node(vec![])).unwrap();
    let lost = node.advertise(key(1), vec![1]).await;
    assert!(matches!(lost, Err(PeerError::Unreachable { .. })), "{lost:?}");
    node.introduce(key(1), addr.clone()).await.unwrap();
    assert_eq!(
        within("the answer", node.advertise(key(1), vec![1])).await,
        Ok(refusal)
    );
    let large = vec![7; OFFER_BYTES_MAX];
    assert!(
        within("a large offer", node.advertise(key(1), large))
            .await
            .is_ok()
    );
    let too_large = node.advertise(key(1), vec![7; OFFER_BYTES_MAX + 1]).await;
    assert!(matches!(too_large, Err(PeerError::TooLarge { .. })));
    let mut over_rate = 0;
    for _ in 0..30 {
        match within("an answer", node.advertise(key(1), vec![2])).await {
            Ok(Answer::Refused { reason }) if reason.contains("too many") => over_rate += 1,
            Ok(_) => {}
            other => panic!("{other:?}"),
        }
    }
    assert!(over_rate >= 5, "only {over_rate} were refused");
    assert_eq!(a.counts().offers_over_rate, over_rate);
    // Nodes take no offers.
    let (other, _events) = Peer::start(
        &secret(4),
        PeerConfig {
            listen: loopback(),
            ..PeerConfig::node(vec![])
        },
    )
    .unwrap();
    node.introduce(key(4), listening(&other).await).await.unwrap();
    let wrong = within("a node's answer", node.advertise(key(4), vec![1])).await;
    assert!(matches!(wrong, Err(PeerError::NotScheduler { .. })), "{wrong:?}");
    node.stop().await;
    assert_eq!(node.connected().await, Err(PeerError::Stopped));
}

#[tokio::test]
async fn summaries_reach_schedulers_that_are_not_neighbours() {
    let (a, mut a_events, a_addr) = scheduler(1, vec![]).await;
    let (b, mut b_events, b_addr) = scheduler(2, vec![a_addr]).await;
    let (_c, mut c_events, _) = scheduler(3, vec![b_addr]).await;
    assert!(a.publish_summary(vec![0; SUMMARY_BYTES_MAX + 1]).await.is_err());
    // Subscriptions travel after the connection; publish until someone is there to hear.
    within("a neighbour", async {
        while b.publish_summary(b"b's".to_vec()).await.is_err() {
            sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    let hear = async |events: &mut Receiver<PeerEvent>| loop {
        match events.recv().await {
            Some(PeerEvent::Summary { from, bytes, verdict }) => {
                let _ = verdict.send(Verdict::Accept);
                return (from, bytes);
            }
            Some(_) => {}
            None => panic!("the swarm ended"),
        }
    };
    let heard = within("the summary", async {
        tokio::select! {
            heard = hear(&mut a_events) => heard,
            heard = hear(&mut c_events) => heard,
        }
    })
    .await;
    assert_eq!(heard, (key(2), b"b's".to_vec()));
    let (node, _) = Peer::start(&secret(9), PeerConfig::node(vec![])).unwrap();
    assert_eq!(node.publish_summary(vec![1]).await, Err(PeerError::Alone));
    drop(b_events.try_recv());
}

#[tokio::test]
async fn noise_on_the_port_harms_nothing_and_a_lost_bootstrap_is_found_again() {
    let (a, events, addr) = scheduler(1, vec![]).await;
    let _offers = answer_offers(events, accepted());
    let port = addr
        .iter()
        .find_map(|p| match p {
            Protocol::Tcp(port) => Some(port),
            _ => None,
        })
        .unwrap();
    for noise in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[0xff; 100_000],
        b"\x13/multistream/1.0.0\n\x07/noise\n\xff\xff",
        b"",
    ] {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        let _ = stream.write_all(noise).await;
    }
    let (node, _events) = Peer::start(&secret(2), PeerConfig::node(vec![addr.clone()])).unwrap();
    let connected = async |node: &Peer| {
        while node.connected().await.unwrap() != [key(1)] {
            sleep(Duration::from_millis(50)).await;
        }
    };
    within("the first connection", connected(&node)).await;
    assert_eq!(
        within("the answer", node.advertise(key(1), vec![1])).await,
        Ok(accepted())
    );
    a.stop().await;
    drop(a);
    within("noticing the loss", async {
        while !node.connected().await.unwrap().is_empty() {
            sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    let listen = vec![addr];
    let mut again = None;
    for _ in 0..20 {
        if let Ok(started) = Peer::start(&secret(1), PeerConfig::scheduler(listen.clone(), vec![])) {
            again = Some(started);
            break;
        }
        sleep(Duration::from_millis(200)).await;
    }
    assert!(again.is_some());
    within("the reconnection", connected(&node)).await;
}

#[tokio::test]
async fn dialling_says_who_answered() {
    let (_a, _events, addr) = scheduler(1, vec![]).await;
    let (node, _events2) = Peer::start(&secret(2), PeerConfig::node(vec![])).unwrap();
    assert_eq!(within("dialling", node.dial(addr)).await, Ok(key(1)));
    let nobody = node.dial("/ip4/127.0.0.1/tcp/1".parse().unwrap()).await;
    assert!(matches!(nobody, Err(PeerError::Unreachable { .. })), "{nobody:?}");
    assert_eq!(identity::to_peer_id(key(2)).unwrap(), node.id());
}
