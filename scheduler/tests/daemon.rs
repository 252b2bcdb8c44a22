//! The daemon on real sockets of this machine: a user, and a node played by hand.
#![allow(clippy::unwrap_used, reason = "in a test, the panic is the report")]
use karez_core::{
    artifact::ArtifactRef,
    exchange::{FinishedLease, Held, LeaseAsk, Phase, Report, ToNode, ToScheduler},
    id::{Digest, LeaseKey},
    key::{NodeId, PublicKey, SecretKey, UserId},
    records::{
        Constraints, Device, Engine, Invitation, Lease, MeterReading, Meters, NodeState, Offer, Order,
        Outcome, Role, Signed, Usage, Verified, Work, WorkKind,
    },
    translate::{FromNode, FromScheduler},
    unit::{Bytes, Credits, DeviceMillis, Millis, MonoMillis, Rate, Speed, UtcMillis},
};
use karez_net::{
    control::connect,
    peer::{Answer, Peer, PeerConfig},
    store::ArtifactStore,
    transfer::{Holder, Transfers, unwatched},
};
use karez_proto::control::{self as wire, control_client::ControlClient};
use karez_scheduler::{Daemon, InitOptions, InviteOptions, RunOptions, init, invite};
use std::{
    net::{TcpListener, UdpSocket},
    path::Path,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming, transport::Channel};

type Client = ControlClient<Channel>;

fn secret(n: u8) -> SecretKey {
    SecretKey::from_bytes(&[n; 32])
}

fn utc() -> UtcMillis {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    UtcMillis(since.as_millis() as u64)
}

fn options() -> InitOptions {
    let tcp = || TcpListener::bind("127.0.0.1:0").unwrap();
    let (a, b, c) = (tcp(), tcp(), tcp());
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = |l: &TcpListener| l.local_addr().unwrap().port();
    InitOptions {
        control_port: port(&a),
        peer_port: port(&b),
        monitor_port: port(&c),
        artifact_port: udp.local_addr().unwrap().port(),
        ..InitOptions::new("uni-nairobi".parse().unwrap(), "127.0.0.1")
    }
}

/// A scheduler in a fresh directory.
async fn scheduler(dir: &Path) -> Daemon {
    init(dir, &options()).unwrap();
    Daemon::start(dir, RunOptions::default()).await.unwrap()
}

async fn client(daemon: &Daemon, secret: &SecretKey) -> Client {
    let addr = daemon.control_addr().to_string();
    ControlClient::new(connect(&addr, secret, daemon.id().0).await.unwrap())
}

fn invitation(dir: &Path, role: Role) -> String {
    let credits = if role == Role::User {
        Credits(5_000_000)
    } else {
        Credits::ZERO
    };
    invite(
        dir,
        &InviteOptions {
            role,
            institution: None,
            credits,
            valid: Duration::from_secs(600),
            uses: 1,
        },
    )
    .unwrap()
}

async fn join(client: &mut Client, dir: &Path, role: Role) -> wire::JoinReply {
    let invitation = invitation(dir, role);
    let request = wire::JoinRequest {
        invitation,
        name: "me".into(),
        ..Default::default()
    };
    client.join(request).await.unwrap().into_inner()
}

fn order(daemon: &Daemon, user: &SecretKey, input: ArtifactRef) -> Verified<Order> {
    let order = Order {
        user: UserId(PublicKey::of(user)),
        institution: "uni-nairobi".parse().unwrap(),
        scheduler: daemon.id(),
        work: Work::Noop { millis_per_item: 1 },
        input,
        items: 2,
        items_per_part: 0,
        constraints: Constraints::default(),
        credits_max: Credits(1_000_000),
        attempts_max: 3,
        nonce: 1,
        issued_at: utc(),
        expires_at: utc().after(Millis(600_000)),
    };
    Signed::sign(order, user)
}

/// Somebody who can bring artifacts to the scheduler.
struct Hands {
    transfers: Transfers,
    to: Holder,
}

impl Hands {
    fn of(secret: &SecretKey, daemon: &Daemon, dir: &Path) -> Self {
        let store = ArtifactStore::open(dir, Bytes(1 << 26)).unwrap();
        let nobody = Arc::new(|_: &PublicKey, _| false);
        let transfers = Transfers::bind("127.0.0.1:0".parse().unwrap(), secret, store, nobody).unwrap();
        Self {
            transfers,
            to: Holder {
                key: daemon.id().0,
                addrs: vec![daemon.artifact_addr()],
            },
        }
    }

    async fn bring(&self, bytes: &[u8]) -> ArtifactRef {
        let artifact = self.transfers.store().add_bytes(bytes).unwrap();
        self.transfers
            .push(artifact, &self.to, unwatched())
            .await
            .unwrap();
        artifact
    }
}

async fn submit(
    client: &mut Client,
    order: &Verified<Order>,
    wait: bool,
) -> Result<wire::SubmitReply, Status> {
    let request = wire::SubmitRequest {
        order: order.encode(),
        label: "first".into(),
        wait,
    };
    client.submit(request).await.map(tonic::Response::into_inner)
}

fn hex(bytes: &[u8]) -> String {
    Digest::try_from(bytes).unwrap().to_string()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn users_join_submit_and_see_only_their_own() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("s");
    let daemon = scheduler(&dir).await;
    let (ann, bob) = (secret(11), secret(12));
    let (mut anns, mut bobs) = (client(&daemon, &ann).await, client(&daemon, &bob).await);

    // Strangers learn who this is, and nothing else.
    assert_eq!(
        anns.status(wire::StatusRequest {})
            .await
            .unwrap()
            .into_inner()
            .nodes,
        0
    );
    let stranger = anns.jobs(wire::JobsRequest::default()).await.unwrap_err();
    assert_eq!(stranger.code(), Code::Unauthenticated);
    assert!(stranger.message().contains("karez join"), "{stranger}");
    let open = anns
        .join(wire::JoinRequest {
            role: "user".into(),
            institution: "x1".into(),
            ..Default::default()
        })
        .await;
    assert_eq!(open.unwrap_err().code(), Code::Unauthenticated);
    let text = invitation(&dir, Role::User);
    let cut = wire::JoinRequest {
        invitation: text[..text.len() - 3].to_owned(),
        ..Default::default()
    };
    let cut = anns.join(cut).await.unwrap_err();
    assert!(
        cut.code() == Code::InvalidArgument && cut.message().contains("cut off"),
        "{cut}"
    );

    let joined = join(&mut anns, &dir, Role::User).await;
    assert_eq!(
        (joined.institution.as_str(), joined.credits),
        ("uni-nairobi", 5_000_000)
    );
    join(&mut bobs, &dir, Role::User).await;

    // The input must be here first.
    let hands = Hands::of(&ann, &daemon, &temp.path().join("a"));
    let missing: ArtifactRef = format!("blob:{}:2", Digest::of(b"x\n")).parse().unwrap();
    let refused = submit(&mut anns, &order(&daemon, &ann, missing), true)
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
    assert!(
        refused.message().contains(&missing.to_string()) && refused.message().contains("karez artifact add"),
        "{refused}"
    );
    let input = hands.bring(b"{\"text\":\"a\"}\n{\"text\":\"b\"}\n").await;
    let ordered = order(&daemon, &ann, input);

    // No node is known: refused with the reason, unless the user wants to wait.
    let refused = submit(&mut anns, &ordered, false).await.unwrap_err();
    assert!(
        refused.code() == Code::FailedPrecondition && refused.message().contains("no node is known"),
        "{refused}"
    );
    let stolen = submit(&mut bobs, &ordered, true).await.unwrap_err();
    assert_eq!(stolen.code(), Code::InvalidArgument);
    let garbage = anns
        .submit(wire::SubmitRequest {
            order: vec![0xff; 100],
            ..Default::default()
        })
        .await;
    assert_eq!(garbage.unwrap_err().code(), Code::InvalidArgument);
    let reply = submit(&mut anns, &ordered, true).await.unwrap();
    assert_eq!(reply.view.unwrap().state, "queued");
    let again = submit(&mut anns, &ordered, true).await.unwrap();
    assert_eq!(again.job, reply.job);

    // Only its user sees the job; the scheduler's own key is its operator.
    let job = hex(&reply.job);
    let request = wire::JobRequest {
        job: job[..12].to_owned(),
    };
    assert_eq!(
        anns.job(request.clone()).await.unwrap().into_inner().label,
        "first"
    );
    assert_eq!(
        bobs.job(request.clone()).await.unwrap_err().code(),
        Code::NotFound
    );
    assert_eq!(
        bobs.watch(request.clone()).await.unwrap_err().code(),
        Code::NotFound
    );
    let everyone = wire::JobsRequest {
        everyone: true,
        ..Default::default()
    };
    assert_eq!(
        bobs.jobs(everyone).await.unwrap_err().code(),
        Code::PermissionDenied
    );
    let own = karez_net::identity::load(&dir.join(karez_scheduler::setup::KEY_FILE), "scheduler").unwrap();
    let mut operator = client(&daemon, &own).await;
    assert_eq!(operator.jobs(everyone).await.unwrap().into_inner().jobs.len(), 1);

    // What the job may cost is set aside.
    let balance = anns
        .balance(wire::BalanceRequest { all: true })
        .await
        .unwrap()
        .into_inner()
        .accounts;
    let of = |start: &str| {
        balance
            .iter()
            .find(|a| a.name.starts_with(start))
            .map(|a| a.balance)
    };
    assert_eq!(
        (of("user:"), of("federation")),
        (Some(4_000_000), Some(-10_000_000))
    );
    let explained = anns
        .explain(wire::ExplainRequest {
            job,
            order: Vec::new(),
        })
        .await
        .unwrap()
        .into_inner();
    assert!(explained.summary.contains("no node is known"), "{explained:?}");

    // Watching shows the present state, then the end.
    let mut watch = anns.watch(request.clone()).await.unwrap().into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().state, "queued");
    anns.cancel(request).await.unwrap();
    assert_eq!(last(&mut watch).await.state, "cancelled");
    let balance = anns
        .balance(wire::BalanceRequest { all: false })
        .await
        .unwrap()
        .into_inner()
        .accounts;
    assert_eq!(balance[0].balance, 5_000_000);

    // Names of models.
    let model = |name: &str| wire::Model {
        name: name.into(),
        artifact: Some(input.into()),
        format: "gguf".into(),
        licence: "MIT".into(),
    };
    let name = |name: &str| wire::NameModelRequest {
        model: Some(model(name)),
    };
    anns.name_model(name("tiny-1.5B")).await.unwrap();
    assert_eq!(
        bobs.name_model(name("tiny-1.5B")).await.unwrap_err().code(),
        Code::PermissionDenied
    );
    assert_eq!(
        anns.name_model(name("../x")).await.unwrap_err().code(),
        Code::InvalidArgument
    );
    assert_eq!(
        bobs.models(wire::ModelsRequest {})
            .await
            .unwrap()
            .into_inner()
            .models,
        vec![model("tiny-1.5B")]
    );

    // The books leave as a file that proves itself.
    let mut stream = bobs
        .ledger(wire::LedgerRequest { from: 0 })
        .await
        .unwrap()
        .into_inner();
    let mut file = Vec::new();
    while let Some(chunk) = stream.message().await.unwrap() {
        file.extend(chunk.bytes);
    }
    let summary =
        karez_ledger::verify(&mut file.as_slice(), &karez_ledger::VerifyOptions::default()).unwrap();
    assert_eq!((summary.scheduler, summary.entries), (daemon.id(), 4));
    daemon.stop().await.unwrap();
}

async fn last(watch: &mut Streaming<wire::JobView>) -> wire::JobView {
    let mut last = None;
    while let Some(view) = watch.message().await.unwrap() {
        last = Some(view);
    }
    last.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_members_and_money_survive_a_restart() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("s");
    let daemon = scheduler(&dir).await;
    let ann = secret(11);
    let mut anns = client(&daemon, &ann).await;
    join(&mut anns, &dir, Role::User).await;
    let hands = Hands::of(&ann, &daemon, &temp.path().join("a"));
    let input = hands.bring(b"a\nb\n").await;
    let reply = submit(&mut anns, &order(&daemon, &ann, input), true)
        .await
        .unwrap();
    let request = wire::JobRequest { job: hex(&reply.job) };
    let mut watch = anns.watch(request.clone()).await.unwrap().into_inner();
    watch.message().await.unwrap().unwrap();

    // A watch does not hold up the end, and is told.
    let began = Instant::now();
    let (stopped, told) = tokio::join!(daemon.stop(), watch.message());
    stopped.unwrap();
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    let told = told.unwrap_err();
    assert!(
        told.code() == Code::Unavailable && told.message().contains("watch again"),
        "{told}"
    );

    let daemon = Daemon::start(&dir, RunOptions::default()).await.unwrap();
    let mut anns = client(&daemon, &ann).await;
    let jobs = anns
        .jobs(wire::JobsRequest::default())
        .await
        .unwrap()
        .into_inner()
        .jobs;
    assert_eq!(
        (jobs.len(), jobs[0].state.as_str(), jobs[0].credits_reserved),
        (1, "queued", 1_000_000)
    );
    assert_eq!(
        anns.balance(wire::BalanceRequest { all: false })
            .await
            .unwrap()
            .into_inner()
            .accounts[0]
            .balance,
        4_000_000
    );
    daemon.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_taken_port_is_named_with_its_setting() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("s");
    let options = options();
    init(&dir, &options).unwrap();
    for (port, setting) in [
        (options.control_port, "control.listen"),
        (options.peer_port, "peer.listen"),
        (options.monitor_port, "monitor.listen"),
    ] {
        let held = TcpListener::bind(("127.0.0.1", port)).unwrap();
        let error = Daemon::start(&dir, RunOptions::default())
            .await
            .map(drop)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(&port.to_string()) && error.contains(setting) && error.contains("scheduler.toml"),
            "{error}"
        );
        drop(held);
    }
    let held = UdpSocket::bind(("127.0.0.1", options.artifact_port)).unwrap();
    let error = Daemon::start(&dir, RunOptions::default())
        .await
        .map(drop)
        .unwrap_err()
        .to_string();
    assert!(error.contains("artifacts.listen"), "{error}");
    drop(held);
    Daemon::start(&dir, RunOptions::default())
        .await
        .unwrap()
        .stop()
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_monitor_answers_and_garbage_harms_nothing() {
    use tokio::io::AsyncWriteExt;
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("s");
    let daemon = scheduler(&dir).await;
    let monitor = daemon.monitor_addr().unwrap();
    for addr in [daemon.control_addr(), monitor] {
        for garbage in [
            &b"GET / HTTP/1.1\r\n\r\n"[..],
            &[0xff; 4096],
            &[0x16, 3, 1, 0xff, 0xff, 1],
            b"",
        ] {
            let mut stream = tokio::net::TcpStream::connect(addr).await.unwrap();
            let _ = stream.write_all(garbage).await;
        }
    }
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    udp.send_to(&[0xff; 1200], daemon.artifact_addr()).unwrap();

    let channel = Channel::from_shared(format!("http://{monitor}"))
        .unwrap()
        .connect()
        .await
        .unwrap();
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel.clone());
    let check = tonic_health::pb::HealthCheckRequest {
        service: "karez.control.v1.Control".into(),
    };
    let answer = health.check(check).await.unwrap().into_inner();
    assert_eq!(
        answer.status(),
        tonic_health::pb::health_check_response::ServingStatus::Serving
    );

    let mut reflection =
        tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient::new(channel);
    let list = tonic_reflection::pb::v1::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(
            tonic_reflection::pb::v1::server_reflection_request::MessageRequest::ListServices(String::new()),
        ),
    };
    let mut answers = reflection
        .server_reflection_info(tokio_stream::once(list))
        .await
        .unwrap()
        .into_inner();
    let listed = format!("{:?}", answers.message().await.unwrap().unwrap());
    assert!(listed.contains("karez.control.v1.Control"), "{listed}");

    // The real API needs a key, and still works.
    let mut anns = client(&daemon, &secret(11)).await;
    join(&mut anns, &dir, Role::User).await;
    daemon.stop().await.unwrap();
}

/// A node played by hand: it grants what it is asked and says what the test wants.
struct Node {
    secret: SecretKey,
    id: NodeId,
    client: Client,
    peer: Peer,
    daemon_id: karez_core::key::SchedulerId,
    offers: u64,
}

impl Node {
    async fn join(daemon: &Daemon, dir: &Path, n: u8) -> Self {
        let secret = secret(n);
        let mut client = client(daemon, &secret).await;
        join(&mut client, dir, Role::Node).await;
        let (peer, _) = Peer::start(&secret, PeerConfig::node(Vec::new())).unwrap();
        for addr in daemon.peer_addrs().await {
            peer.introduce(daemon.id().0, addr).await.unwrap();
        }
        let id = NodeId(PublicKey::of(&secret));
        Self {
            secret,
            id,
            client,
            peer,
            daemon_id: daemon.id(),
            offers: 0,
        }
    }

    fn offer(&mut self) -> Verified<Offer> {
        self.offers += 1;
        let offer = Offer {
            node: self.id,
            name: "lab-1".into(),
            institution: "uni-nairobi".parse().unwrap(),
            country: "KE".parse().unwrap(),
            devices: vec![Device {
                class: "cpu/x86-64-v3".into(),
                count: 2,
                free: 2,
                memory: Bytes(1 << 32),
                rate: Rate(3_600_000),
                share_min: 0,
                shared: Vec::new(),
            }],
            engines: vec![Engine {
                name: "noop".into(),
                version: "1".into(),
                work: WorkKind::Noop,
                speed: Speed(1_000_000),
                method: "probe/1".into(),
            }],
            cores: 2,
            memory: Bytes(1 << 33),
            isa: "x86-64-v3".into(),
            isolation: "none".into(),
            cached: Vec::new(),
            artifact_addrs: Vec::new(),
            sequence: self.offers,
            issued_at: utc(),
            expires_at: utc().after(Millis(60_000)),
            state: NodeState::Open,
            terms: Default::default(),
        };
        Signed::sign(offer, &self.secret)
    }

    async fn advertise(&mut self) -> Answer {
        let offer = self.offer().encode();
        self.peer.advertise(self.daemon_id.0, offer).await.unwrap()
    }

    async fn session(&mut self) -> Session {
        let (say, outgoing) = mpsc::channel(64);
        let hello = FromNode::Hello {
            version: "test".into(),
            name: "lab-1".into(),
            report: Report::default(),
        };
        say.send(hello.into()).await.unwrap();
        let hear = self
            .client
            .session(ReceiverStream::new(outgoing))
            .await
            .unwrap()
            .into_inner();
        let mut session = Session { say, hear };
        assert!(matches!(
            session.next().await,
            Some(FromScheduler::Welcome { .. })
        ));
        session
    }

    fn lease(&self, ask: &LeaseAsk) -> Verified<Lease> {
        let lease = Lease {
            job: ask.key.job,
            part: ask.key.part,
            fence: ask.key.fence,
            node: self.id,
            scheduler: self.daemon_id,
            institution: "uni-nairobi".parse().unwrap(),
            device_class: ask.device_class.clone(),
            devices: ask.devices,
            rate: ask.rate,
            device_ms_max: ask.device_ms_max,
            first_item: ask.first_item,
            items: ask.items,
            granted_at: utc(),
            expires_at: utc().after(ask.ttl),
        };
        Signed::sign(lease, &self.secret)
    }

    fn finish(&self, lease: &Verified<Lease>, result: ArtifactRef) -> ToScheduler {
        let meters = Meters {
            device_ms: DeviceMillis(1),
            items: lease.items,
            ..Meters::default()
        };
        let reading = MeterReading {
            lease: lease.id(),
            node: self.id,
            sequence: 0,
            previous: None,
            meters,
            method: "rusage+wall/1".into(),
            taken_at: utc(),
            mono: MonoMillis(1),
            benchmark: None,
        };
        let reading = Signed::sign(reading, &self.secret);
        let usage = Usage {
            lease: lease.id(),
            node: self.id,
            last_reading: reading.id(),
            readings: 1,
            meters,
            outcome: Outcome::Done,
            cause: String::new(),
            retryable: false,
            result: Some(result),
            started_at: lease.granted_at,
            ended_at: utc(),
        };
        let usage = Signed::sign(usage, &self.secret);
        ToScheduler::Finished(Box::new(FinishedLease {
            lease: lease.clone(),
            readings: vec![reading],
            usage,
        }))
    }
}

struct Session {
    say: mpsc::Sender<wire::NodeMessage>,
    hear: Streaming<wire::SchedulerMessage>,
}

impl Session {
    async fn next(&mut self) -> Option<FromScheduler> {
        let heard = tokio::time::timeout(Duration::from_secs(20), self.hear.message()).await;
        heard.unwrap().unwrap().map(|m| m.try_into().unwrap())
    }

    async fn ask(&mut self) -> LeaseAsk {
        loop {
            if let Some(FromScheduler::Said(ToNode::Ask(ask))) = self.next().await {
                return *ask;
            }
        }
    }

    async fn say(&self, said: ToScheduler) {
        self.say.send(said.into()).await.unwrap();
    }

    async fn settled(&mut self) -> (LeaseKey, bool) {
        loop {
            if let Some(FromScheduler::Said(ToNode::Settled { key, receipt, .. })) = self.next().await {
                return (key, receipt.is_some());
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_runs_is_billed_and_its_result_can_be_fetched() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("s");
    let daemon = scheduler(&dir).await;
    let ann = secret(11);
    let mut anns = client(&daemon, &ann).await;
    join(&mut anns, &dir, Role::User).await;
    let hands = Hands::of(&ann, &daemon, &temp.path().join("a"));
    let input = hands.bring(b"a\nb\n").await;

    let mut node = Node::join(&daemon, &dir, 21).await;
    let answer = node.advertise().await;
    assert!(matches!(answer, Answer::Accepted { .. }), "{answer:?}");
    // The same offer again, and one that a stranger signed, are answered with the reason.
    node.offers -= 1;
    assert!(matches!(node.advertise().await, Answer::Refused { .. }));
    let forged = {
        let mut bytes = node.offer().encode();
        let n = bytes.len();
        bytes[n - 1] ^= 1;
        bytes
    };
    let answer = node.peer.advertise(daemon.id().0, forged).await.unwrap();
    assert!(
        matches!(&answer, Answer::Refused { reason } if reason.contains("signature")),
        "{answer:?}"
    );
    assert_eq!(
        anns.status(wire::StatusRequest {})
            .await
            .unwrap()
            .into_inner()
            .offers_refused,
        2
    );

    // A user's key opens no session.
    let (_say, outgoing) = mpsc::channel::<wire::NodeMessage>(1);
    let refused = anns.session(ReceiverStream::new(outgoing)).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);

    let mut first = node.session().await;
    let mut session = node.session().await;
    assert!(
        matches!(first.next().await, Some(FromScheduler::Goodbye { .. })),
        "a second session replaces the first"
    );
    assert!(first.next().await.is_none());

    let began = Instant::now();
    let reply = submit(&mut anns, &order(&daemon, &ann, input), false)
        .await
        .unwrap();
    let submitted = began.elapsed();
    let mut watch = anns
        .watch(wire::JobRequest { job: hex(&reply.job) })
        .await
        .unwrap()
        .into_inner();
    let ask = session.ask().await;
    assert_eq!(ask.order.id(), Digest::try_from(reply.job.as_slice()).unwrap());
    let lease = node.lease(&ask);
    session.say(ToScheduler::Granted(lease.clone())).await;
    let held = Held {
        key: ask.key,
        phase: Phase::Running,
        items_done: 1,
        tokens: 0,
        loss_micro: 0,
    };
    session
        .say(ToScheduler::Report(Report {
            sequence: 1,
            held: vec![held],
        }))
        .await;

    // A usage counts once its result is here.
    let node_hands = Hands::of(&node.secret, &daemon, &temp.path().join("n"));
    let early = ArtifactRef {
        digest: Digest::of(b"1\n2\n"),
        bytes: Bytes(4),
        kind: karez_core::artifact::ArtifactKind::Blob,
    };
    session.say(node.finish(&lease, early)).await;
    let result = node_hands.bring(b"1\n2\n").await;
    assert_eq!(result, early);
    session.say(node.finish(&lease, result)).await;
    assert_eq!(session.settled().await, (ask.key, true));
    let done = last(&mut watch).await;
    println!(
        "submit answered in {submitted:?}, submit to done in {:?}",
        began.elapsed()
    );
    assert_eq!(
        (done.state.as_str(), done.items_done, done.credits_spent),
        ("done", 2, 1)
    );
    assert_eq!(done.parts[0].result, Some(result.into()));
    assert!(done.parts[0].why.contains("credits/h"), "{:?}", done.parts[0]);

    // Unread nonsense does not end a session, and the node's institution was paid.
    let nonsense = wire::NodeMessage { message: None };
    session.say.send(nonsense).await.unwrap();
    session
        .say(ToScheduler::Report(Report {
            sequence: 2,
            held: Vec::new(),
        }))
        .await;
    let paid = node
        .client
        .balance(wire::BalanceRequest { all: false })
        .await
        .unwrap()
        .into_inner()
        .accounts;
    assert_eq!(
        (paid[0].name.as_str(), paid[0].balance),
        ("institution:uni-nairobi", 1)
    );

    // The user fetches the result from the scheduler.
    hands
        .transfers
        .fetch(&[result], std::slice::from_ref(&hands.to), unwatched())
        .await
        .unwrap();
    assert_eq!(
        hands.transfers.store().read(&result, Bytes(100)).unwrap(),
        b"1\n2\n"
    );

    // Goodbye comes before the end.
    let began = Instant::now();
    let (stopped, word) = tokio::join!(daemon.stop(), session.next());
    stopped.unwrap();
    assert!(matches!(word, Some(FromScheduler::Goodbye { .. })), "{word:?}");
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
}

#[test]
fn invitations_are_the_schedulers_own() {
    let temp = tempfile::tempdir().unwrap();
    init(temp.path(), &options()).unwrap();
    let text = invitation(temp.path(), Role::Node);
    let read: Verified<Invitation> = karez_core::invite::decode(&text).unwrap();
    assert_eq!(read.role, Role::Node);
    assert!(read.peer_addrs[0].starts_with("/ip4/127.0.0.1/tcp/"));
}
