//! The daemon with everything real but its scheduler, which is a few lines of gRPC here.
use super::*;
use crate::{
    config::{NodeConfig, SchedulerEntry, Template, template},
    control::{Command, command, status, until_empty},
    files::NodeFiles,
};
use karez_core::{
    exchange::{FinishedLease, LeaseAsk, Phase},
    id::JobId,
    key::{PublicKey, SecretKey, UserId},
    records::{Constraints, Order, Outcome, Signed, Verified, Work},
    translate::{FromNode, FromScheduler},
    unit::{Credits, DeviceMillis, Millis, Portion, Rate},
};
use karez_net::{
    control::{serve_incoming, server_builder},
    identity,
    store::ArtifactStore,
    tls,
    transfer::Transfers,
};
use karez_proto::control::{
    self as wire,
    control_server::{Control, ControlServer},
};
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tonic::{Request as GrpcRequest, Response, Status, Streaming};

type Said = mpsc::Sender<Result<wire::SchedulerMessage, Status>>;

/// What the scheduler hears: each session, then each message.
enum Heard {
    Session(Said),
    Node(Box<FromNode>),
}

struct Fake {
    tell: mpsc::UnboundedSender<Heard>,
    artifact_addr: String,
}

fn no<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("not in this test"))
}
type Nothing<T> = std::pin::Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Control for Fake {
    type SessionStream = ReceiverStream<Result<wire::SchedulerMessage, Status>>;
    type WatchStream = Nothing<wire::JobView>;
    type LedgerStream = Nothing<wire::LedgerChunk>;
    type AnswerStream = Nothing<wire::AnswerPiece>;

    async fn session(
        &self,
        request: GrpcRequest<Streaming<wire::NodeMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let (say, said) = mpsc::channel(64);
        let welcome = FromScheduler::Welcome {
            scheduler_name: "fake".into(),
            heartbeat: Millis(100),
            artifact_addrs: vec![self.artifact_addr.clone()],
        };
        say.send(Ok(welcome.into())).await.unwrap();
        let tell = self.tell.clone();
        let _ = tell.send(Heard::Session(say));
        let mut messages = request.into_inner();
        tokio::spawn(async move {
            while let Some(Ok(message)) = messages.next().await {
                let _ = tell.send(Heard::Node(Box::new(FromNode::try_from(message).unwrap())));
            }
        });
        Ok(Response::new(ReceiverStream::new(said)))
    }
    async fn join(&self, _: GrpcRequest<wire::JoinRequest>) -> Result<Response<wire::JoinReply>, Status> {
        no()
    }
    async fn submit(
        &self,
        _: GrpcRequest<wire::SubmitRequest>,
    ) -> Result<Response<wire::SubmitReply>, Status> {
        no()
    }
    async fn jobs(&self, _: GrpcRequest<wire::JobsRequest>) -> Result<Response<wire::JobsReply>, Status> {
        no()
    }
    async fn job(&self, _: GrpcRequest<wire::JobRequest>) -> Result<Response<wire::JobView>, Status> {
        no()
    }
    async fn watch(&self, _: GrpcRequest<wire::JobRequest>) -> Result<Response<Self::WatchStream>, Status> {
        no()
    }
    async fn cancel(&self, _: GrpcRequest<wire::JobRequest>) -> Result<Response<wire::JobView>, Status> {
        no()
    }
    async fn logs(&self, _: GrpcRequest<wire::JobRequest>) -> Result<Response<wire::LogsReply>, Status> {
        no()
    }
    async fn explain(
        &self,
        _: GrpcRequest<wire::ExplainRequest>,
    ) -> Result<Response<wire::ExplainReply>, Status> {
        no()
    }
    async fn offers(
        &self,
        _: GrpcRequest<wire::OffersRequest>,
    ) -> Result<Response<wire::OffersReply>, Status> {
        no()
    }
    async fn models(
        &self,
        _: GrpcRequest<wire::ModelsRequest>,
    ) -> Result<Response<wire::ModelsReply>, Status> {
        no()
    }
    async fn name_model(
        &self,
        _: GrpcRequest<wire::NameModelRequest>,
    ) -> Result<Response<wire::NameModelReply>, Status> {
        no()
    }
    async fn balance(
        &self,
        _: GrpcRequest<wire::BalanceRequest>,
    ) -> Result<Response<wire::BalanceReply>, Status> {
        no()
    }
    async fn ledger(
        &self,
        _: GrpcRequest<wire::LedgerRequest>,
    ) -> Result<Response<Self::LedgerStream>, Status> {
        no()
    }
    async fn answer(
        &self,
        _: GrpcRequest<wire::AnswerRequest>,
    ) -> Result<Response<Self::AnswerStream>, Status> {
        no()
    }
    async fn delegate(
        &self,
        _: GrpcRequest<wire::DelegateRequest>,
    ) -> Result<Response<wire::DelegateReply>, Status> {
        no()
    }
    async fn revoke(
        &self,
        _: GrpcRequest<wire::RevokeRequest>,
    ) -> Result<Response<wire::DelegateReply>, Status> {
        no()
    }
    async fn keys(&self, _: GrpcRequest<wire::KeysRequest>) -> Result<Response<wire::KeysReply>, Status> {
        no()
    }
    async fn head(&self, _: GrpcRequest<wire::HeadRequest>) -> Result<Response<wire::HeadReply>, Status> {
        no()
    }
    async fn prove(&self, _: GrpcRequest<wire::ProveRequest>) -> Result<Response<wire::ProveReply>, Status> {
        no()
    }
    async fn witness(
        &self,
        _: GrpcRequest<wire::WitnessRequest>,
    ) -> Result<Response<wire::WitnessReply>, Status> {
        no()
    }
    async fn file(&self, _: GrpcRequest<wire::FileRequest>) -> Result<Response<wire::FileReply>, Status> {
        no()
    }
    async fn books(&self, _: GrpcRequest<wire::BooksRequest>) -> Result<Response<wire::BooksReply>, Status> {
        no()
    }
    async fn status(
        &self,
        _: GrpcRequest<wire::StatusRequest>,
    ) -> Result<Response<wire::StatusReply>, Status> {
        no()
    }
}

/// A scheduler and a node's directory that names it.
struct World {
    dir: tempfile::TempDir,
    secret: SecretKey,
    store: ArtifactStore,
    _transfers: Transfers,
    heard: mpsc::UnboundedReceiver<Heard>,
    say: Option<Said>,
}

impl World {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let secret = SecretKey::from_bytes(&[21; 32]);
        let store = ArtifactStore::open(&dir.path().join("scheduler"), Bytes(64 << 20)).unwrap();
        let transfers = Transfers::bind(
            ([127, 0, 0, 1], 0).into(),
            &secret,
            store.clone(),
            Arc::new(|_, _| true),
        )
        .unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let control_addr = listener.local_addr().unwrap().to_string();
        let incoming = serve_incoming(listener, &secret, tls::anyone()).unwrap();
        let (tell, heard) = mpsc::unbounded_channel();
        let fake = Fake {
            tell,
            artifact_addr: transfers.local_addr().to_string(),
        };
        tokio::spawn(
            server_builder()
                .add_service(ControlServer::new(fake))
                .serve_with_incoming(incoming),
        );
        let files = NodeFiles::new(dir.path().join("node"));
        identity::create(&files.key()).unwrap();
        let text = template(&Template {
            name: "n1".into(),
            institution: "uni-a".parse().unwrap(),
            country: "KE".parse().unwrap(),
            cpu_rate: Rate(3_600_000),
            cpu_slots: 1,
            schedulers: vec![SchedulerEntry {
                key: SchedulerId(PublicKey::of(&secret)),
                control_addr,
                peer_addrs: vec![],
            }],
        });
        let text = text.replace("# heartbeat = \"2 s\"", "heartbeat = \"200 ms\"");
        std::fs::write(
            files.config(),
            text.replace("reclaim_grace = \"10 s\"", "reclaim_grace = \"1 s\""),
        )
        .unwrap();
        assert_eq!(
            NodeConfig::load(&files.config()).unwrap().timing.heartbeat,
            Millis(200)
        );
        Self {
            dir,
            secret,
            store,
            _transfers: transfers,
            heard,
            say: None,
        }
    }

    fn node(&self) -> PathBuf {
        self.dir.path().join("node")
    }

    /// Starts the node; say stop by sending, then wait.
    fn run(
        &self,
    ) -> (
        tokio::sync::oneshot::Sender<()>,
        tokio::task::JoinHandle<Result<(), DaemonError>>,
    ) {
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let dir = self.node();
        let node = tokio::spawn(async move {
            let options = RunOptions {
                worker: None,
                gpu: false,
            };
            run(&dir, options, async { drop(stopped.await) }).await
        });
        (stop, node)
    }

    async fn hear(&mut self) -> FromNode {
        loop {
            let heard = tokio::time::timeout(Duration::from_secs(20), self.heard.recv()).await;
            match heard.expect("the node is silent").unwrap() {
                Heard::Session(say) => self.say = Some(say),
                Heard::Node(said) => return *said,
            }
        }
    }

    async fn say(&mut self, said: ToNode) {
        let say = self.say.as_ref().expect("no session yet");
        let _ = say.send(Ok(FromScheduler::Said(said).into())).await;
    }

    /// The first thing the node says that `wanted` takes.
    async fn until<T>(&mut self, wanted: impl Fn(FromNode) -> Option<T>) -> T {
        loop {
            if let Some(found) = wanted(self.hear().await) {
                return found;
            }
        }
    }

    async fn hello(&mut self) {
        self.until(|said| matches!(said, FromNode::Hello { .. }).then_some(()))
            .await;
    }

    async fn ask(&mut self, class: &str, millis_per_item: u32, items: u64, nonce: u64) -> LeaseKey {
        let user = SecretKey::from_bytes(&[33; 32]);
        let order = Order {
            user: UserId(PublicKey::of(&user)),
            institution: "uni-b".parse().unwrap(),
            scheduler: SchedulerId(PublicKey::of(&self.secret)),
            work: Work::Noop { millis_per_item },
            input: self.store.add_bytes(b"{}\n").unwrap(),
            items,
            items_per_part: 0,
            constraints: Constraints::default(),
            credits_max: Credits(1_000_000),
            attempts_max: 3,
            nonce,
            issued_at: UtcMillis(0),
            expires_at: UtcMillis(u64::from(u32::MAX) * 1000),
        };
        let order = Signed::sign(order, &user);
        let key = LeaseKey {
            job: JobId(order.id()),
            part: 0,
            fence: 1,
        };
        let ask = LeaseAsk {
            key,
            order,
            first_item: 0,
            items,
            device_class: class.into(),
            devices: Portion::ONE,
            rate: Rate(3_600_000),
            device_ms_max: DeviceMillis(3_600_000),
            ttl: Millis(60_000),
            holders: vec![],
            from: None,
            input: Vec::new(),
            here: false,
        };
        self.say(ToNode::Ask(Box::new(ask))).await;
        key
    }

    async fn finished(&mut self) -> FinishedLease {
        self.until(|said| match said {
            FromNode::Heard(ToScheduler::Finished(finished)) => Some(*finished),
            _ => None,
        })
        .await
    }
}

fn granted(said: FromNode) -> Option<Verified<karez_core::records::Lease>> {
    match said {
        FromNode::Heard(ToScheduler::Granted(lease)) => Some(lease),
        FromNode::Heard(ToScheduler::Refused { why, .. }) => panic!("refused: {why}"),
        _ => None,
    }
}

fn class() -> String {
    format!("cpu/{}", karez_engine::probe::isa())
}

#[tokio::test]
async fn a_lease_is_granted_run_delivered_and_forgotten() {
    let mut world = World::new().await;
    let (stop, node) = world.run();
    world.hello().await;
    let key = world.ask(&class(), 0, 5, 1).await;
    assert_eq!(world.until(granted).await.key(), key);
    let finished = world.finished().await;
    assert_eq!(finished.usage.outcome, Outcome::Done);
    let result = finished.usage.result.unwrap();
    // The result was delivered before it was reported.
    let text = world.store.read(&result, Bytes(1 << 20)).unwrap();
    assert_eq!(text.iter().filter(|b| **b == b'\n').count(), 5);
    assert_eq!(
        status(&world.node()).await.unwrap().leases[0].phase,
        Phase::Finished.as_str()
    );
    world
        .say(ToNode::Settled {
            key,
            receipt: None,
            why: "a test".into(),
        })
        .await;
    let empty = world.until(|said| match said {
        FromNode::Heard(ToScheduler::Report(report)) => report.held.is_empty().then_some(()),
        _ => None,
    });
    empty.await;
    let now = status(&world.node()).await.unwrap();
    assert!(
        now.leases.is_empty() && now.schedulers[0].connected && now.schedulers[0].name == "fake",
        "{now:?}"
    );
    let began = Instant::now();
    stop.send(()).unwrap();
    world
        .until(|said| matches!(said, FromNode::Goodbye { .. }).then_some(()))
        .await;
    node.await.unwrap().unwrap();
    assert!(began.elapsed() < Duration::from_secs(3));
    assert!(matches!(
        status(&world.node()).await,
        Err(ControlError::NotRunning { .. })
    ));
}

#[tokio::test]
async fn the_owner_takes_the_machine_back_and_gives_it_again() {
    let mut world = World::new().await;
    let (stop, node) = world.run();
    world.hello().await;
    world.ask(&class(), 1000, 1000, 1).await;
    world.until(granted).await;
    let dir = world.node();
    let began = Instant::now();
    assert_eq!(command(&dir, Command::Reclaim).await.unwrap().state, "reclaimed");
    assert_eq!(until_empty(&dir, Duration::from_secs(5)).await.unwrap().guests, 0);
    assert!(began.elapsed() < Duration::from_secs(1));
    let finished = world.finished().await;
    assert_eq!(
        (finished.usage.outcome, finished.usage.retryable),
        (Outcome::Reclaimed, true)
    );
    world.ask(&class(), 0, 1, 2).await;
    let why = world.until(|said| match said {
        FromNode::Heard(ToScheduler::Refused { why, .. }) => Some(why),
        _ => None,
    });
    assert!(matches!(why.await, Refusal::Policy { .. }));
    assert_eq!(command(&dir, Command::Open).await.unwrap().state, "open");
    world.ask(&class(), 0, 1, 3).await;
    world.until(granted).await;
    stop.send(()).unwrap();
    node.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_stopping_node_says_what_became_of_its_lease_and_remembers_it() {
    let mut world = World::new().await;
    let (stop, node) = world.run();
    world.hello().await;
    let key = world.ask(&class(), 1000, 1000, 1).await;
    world.until(granted).await;
    let began = Instant::now();
    stop.send(()).unwrap();
    let finished = world.finished().await;
    assert_eq!(
        (finished.usage.outcome, finished.usage.retryable),
        (Outcome::Failed, true)
    );
    node.await.unwrap().unwrap();
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    // The next process tells it again until it is settled.
    let (stop, node) = world.run();
    assert_eq!(world.finished().await.lease.key(), key);
    stop.send(()).unwrap();
    node.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_broken_session_is_dialled_again_and_a_drained_node_leaves() {
    let mut world = World::new().await;
    let (_stop, node) = world.run();
    world.hello().await;
    world.say = None;
    let dir = world.node();
    world.hello().await;
    assert_eq!(command(&dir, Command::Drain).await.unwrap().state, "draining");
    tokio::time::timeout(Duration::from_secs(5), node)
        .await
        .expect("it stays")
        .unwrap()
        .unwrap();
}

#[tokio::test]
async fn two_processes_never_share_a_directory() {
    let mut world = World::new().await;
    let (stop, node) = world.run();
    world.hello().await;
    let (_stop2, second) = world.run();
    assert!(matches!(second.await.unwrap(), Err(DaemonError::State(_))));
    assert_eq!(status(&world.node()).await.unwrap().state, "open");
    stop.send(()).unwrap();
    node.await.unwrap().unwrap();
}
