//! The control API for nodes, users and tools. The caller is the key its TLS connection proved.
//!
//! Handlers check form and limits and turn calls into events or questions; decisions are the controller's.
use crate::{
    catalogue::{NameError, Named},
    config::Mode,
    gateway,
    mind::{Input, Shared, cached_somewhere},
    prompts, session, streams, witness,
};
use karez_core::{
    artifact::ArtifactRef,
    controller::{Denial, Event, Filed, JoinBy, Reply},
    id::{Digest, JobId},
    invite,
    key::{PublicKey, UserId},
    money::Account,
    records::{
        Acceptance, CreditLimit, Delegation, Dispute, Floors, Grant, Order, Payment, RateCard, Record,
        RecordError, Role, Ruling, Signed, Verified, describe,
    },
    translate::{self, TranslateError, clean},
};
use karez_ledger::StoreError;
use karez_net::control::peer_key_of;
use karez_proto::control::{self as wire, control_server::Control};
use std::{collections::BTreeSet, sync::Arc};
use tonic::{Request, Response, Status, Streaming};

/// The disk must have this much left to take an order or a member: the durable writer itself stops at half of it.
const FREE_BYTES_MIN: u64 = 64 << 20;
/// The most jobs one listing names.
const JOBS_LISTED_MAX: usize = 1_000;
/// The most candidates an explanation names.
const CANDIDATES_MAX: usize = 100;
/// The longest label of a job, in bytes.
const LABEL_MAX: usize = 200;
/// The most accounts one answer lists.
const ACCOUNTS_MAX: usize = 10_000;
/// The most offers one answer lists.
const OFFERS_MAX: usize = 2_000;

/// The most grants or disputes one answer lists.
const GRANTS_LISTED_MAX: usize = 10_000;

/// The service; clones share everything.
#[derive(Clone)]
pub(crate) struct Service(pub(crate) Arc<Shared>);

type Answer<T> = Result<Response<T>, Status>;

// A `Status` is large, but it is what every handler returns.
#[allow(clippy::result_large_err)]
impl Service {
    /// Who calls; counted against its rate.
    fn caller<T>(&self, request: &Request<T>) -> Result<PublicKey, Status> {
        let key = peer_key_of(request)?;
        self.0.limits.call(key)?;
        Ok(key)
    }

    /// As [`Service::caller`], for what only members may ask. The scheduler's own key is its operator.
    fn member<T>(&self, request: &Request<T>) -> Result<PublicKey, Status> {
        let key = self.caller(request)?;
        if self.operator(key) || self.0.members.contains(&key) {
            Ok(key)
        } else {
            Err(denied(&Denial::NotAdmitted(key)))
        }
    }

    fn operator(&self, key: PublicKey) -> bool {
        key == self.0.id
    }

    /// The caller's job; the operator's are all.
    async fn find(&self, caller: PublicKey, text: &str) -> Result<JobId, Status> {
        let operator = self.operator(caller);
        let found = self
            .0
            .look(|c| match text.parse::<Digest>().map(JobId) {
                Ok(id) if operator && c.job(&id).is_some() => Ok(id),
                _ => c.find(caller, text),
            })
            .await;
        found.map_err(|denial| denied(&denial))
    }

    async fn view(&self, job: JobId) -> Result<wire::JobView, Status> {
        match self.0.look(|c| c.job(&job)).await {
            Some(view) => Ok(session::view_of(view)),
            None => Err(denied(&Denial::NoJob(job.short()))),
        }
    }

    /// The books must have room before somebody is promised something.
    pub(crate) fn room_on_disk(&self) -> Result<(), Status> {
        let Ok(disk) = rustix::fs::statvfs(&self.0.dir) else {
            return Ok(());
        };
        let free = disk.f_bavail.saturating_mul(disk.f_frsize);
        if free >= FREE_BYTES_MIN {
            return Ok(());
        }
        tracing::error!(free, dir = %self.0.dir.display(), "the disk is nearly full: new work is refused");
        Err(Status::resource_exhausted(format!(
            "the scheduler's disk has {} MiB left, {} are needed: its operator must make room, then try again",
            free >> 20,
            FREE_BYTES_MIN >> 20
        )))
    }

    /// Input and model must be where nodes can fetch them.
    async fn artifacts_are_held(&self, order: &Order) -> Result<(), Status> {
        let wanted: Vec<ArtifactRef> = [order.input].into_iter().chain(order.work.artifacts()).collect();
        let missing: Vec<&ArtifactRef> = wanted.iter().filter(|a| !self.0.store.contains(a)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let digests: BTreeSet<Digest> = missing.iter().map(|a| a.digest).collect();
        let cached = self.0.look(|c| cached_somewhere(c, &digests)).await;
        match missing.into_iter().find(|a| !cached.contains(&a.digest)) {
            None => Ok(()),
            Some(missing) => {
                let what = if *missing == order.input { "input" } else { "model" };
                Err(Status::not_found(format!(
                    "the {what} {missing} is neither in this scheduler's store nor with any node: bring it with `karez artifact add`"
                )))
            }
        }
    }

    /// Is this receipt in the book? One that was signed and lost with a disk is not.
    async fn settled(&self, receipt: Digest) -> Result<(), Status> {
        let writer = self.0.writer.clone();
        match blocking(move || writer.find(&receipt)).await? {
            Some(_) => Ok(()),
            None => Err(Status::not_found(format!("the ledger has no receipt {receipt}"))),
        }
    }

    pub(crate) async fn submit_order(
        &self,
        caller: PublicKey,
        order: Verified<Order>,
        label: String,
        wait: bool,
    ) -> Result<JobId, Status> {
        let shared = &self.0;
        if order.user.0 != caller {
            return Err(denied(&Denial::Order(format!(
                "is signed by {}, but submitted by {}: submit your own orders",
                order.user.short(),
                caller.short()
            ))));
        }
        let job = JobId(order.id());
        if shared.look(|c| c.job(&job).is_some()).await {
            return Ok(job);
        }
        self.room_on_disk()?;
        self.artifacts_are_held(&order).await?;
        shared
            .pins
            .keep(job, [order.input].into_iter().chain(order.work.artifacts()));
        if order.items == 1 {
            let (store, asked) = (shared.store.clone(), order.clone());
            let prefix = tokio::task::spawn_blocking(move || prompts::prefix(&store, &asked)).await;
            // Without it the question goes where it costs least: nothing is lost but time.
            if let Some(prefix) = prefix.ok().filter(|prefix| !prefix.is_empty()) {
                let _ = shared.inputs.send(Input::Prompt(job, prefix)).await;
            }
        }
        if streams::streams(&order) {
            // Before the first node can write.
            shared.streams.open(job);
        }
        let reply = shared
            .ask(move |request| Event::Submit {
                request,
                caller,
                order,
                label,
                wait,
            })
            .await;
        match reply {
            Some(Reply::Submitted(job)) => Ok(job),
            other => {
                shared.pins.release(&job);
                shared.streams.close(&job);
                Err(unexpected(other))
            }
        }
    }
}

#[tonic::async_trait]
impl Control for Service {
    type SessionStream = session::SessionStream;
    type WatchStream = session::WatchStream;
    type LedgerStream = session::LedgerStream;
    type AnswerStream = session::AnswerStream;

    async fn join(&self, request: Request<wire::JoinRequest>) -> Answer<wire::JoinReply> {
        let caller = self.caller(&request)?;
        self.0.limits.join()?;
        self.room_on_disk()?;
        let wire::JoinRequest {
            invitation,
            name,
            role,
            institution,
        } = request.into_inner();
        let by = if invitation.is_empty() {
            if self.0.config.admission.mode == Mode::Invited {
                return Err(denied(&Denial::NotAdmitted(caller)));
            }
            JoinBy::Open {
                role: role.parse().map_err(Status::invalid_argument)?,
                institution: institution
                    .parse()
                    .map_err(|e| Status::invalid_argument(format!("{e}")))?,
            }
        } else {
            let invitation =
                invite::decode(&invitation).map_err(|e| Status::invalid_argument(e.to_string()))?;
            JoinBy::Invitation(invitation)
        };
        let name = clean(&name, translate::NAME_MAX);
        let reply = self
            .0
            .ask(move |request| Event::Join {
                request,
                caller,
                name,
                by,
            })
            .await;
        match reply {
            Some(Reply::Joined(member, credits)) => {
                self.0.members.admit(caller, member.role);
                Ok(Response::new(wire::JoinReply {
                    institution: member.institution.to_string(),
                    role: member.role.as_str().into(),
                    credits: credits.0,
                }))
            }
            other => Err(unexpected(other)),
        }
    }

    async fn session(&self, request: Request<Streaming<wire::NodeMessage>>) -> Answer<Self::SessionStream> {
        let caller = self.caller(&request)?;
        let stream = session::open(self.0.clone(), caller, request.into_inner()).await;
        stream.map(Response::new).map_err(|denial| denied(&denial))
    }

    async fn submit(&self, request: Request<wire::SubmitRequest>) -> Answer<wire::SubmitReply> {
        let caller = self.member(&request)?;
        let wire::SubmitRequest { order, label, wait } = request.into_inner();
        let order = Signed::open(&order).map_err(|e| Status::invalid_argument(e.to_string()))?;
        let job = self
            .submit_order(caller, order, clean(&label, LABEL_MAX), wait)
            .await?;
        let view = self.view(job).await?;
        Ok(Response::new(wire::SubmitReply {
            job: job.0.0.to_vec(),
            view: Some(view),
        }))
    }

    async fn jobs(&self, request: Request<wire::JobsRequest>) -> Answer<wire::JobsReply> {
        let caller = self.member(&request)?;
        let wire::JobsRequest { all, limit, everyone } = request.into_inner();
        if everyone && !self.operator(caller) {
            return Err(Status::permission_denied(
                "only the scheduler's operator sees everyone's jobs: list your own",
            ));
        }
        let user = if everyone { None } else { Some(UserId(caller)) };
        let limit = if limit == 0 {
            100
        } else {
            (limit as usize).min(JOBS_LISTED_MAX)
        };
        let views = self.0.look(|c| c.jobs(user, all, limit)).await;
        // A listing shows jobs; their parts are for `Job` and `Watch`.
        let brief = |mut view: karez_core::controller::JobView| {
            view.parts.clear();
            wire::JobView::from(view)
        };
        Ok(Response::new(wire::JobsReply {
            jobs: views.into_iter().map(brief).collect(),
        }))
    }

    async fn job(&self, request: Request<wire::JobRequest>) -> Answer<wire::JobView> {
        let caller = self.member(&request)?;
        let job = self.find(caller, &request.get_ref().job).await?;
        self.view(job).await.map(Response::new)
    }

    async fn watch(&self, request: Request<wire::JobRequest>) -> Answer<Self::WatchStream> {
        let caller = self.member(&request)?;
        let job = self.find(caller, &request.get_ref().job).await?;
        let slot = self.0.limits.watch(caller)?;
        Ok(Response::new(session::watch(self.0.clone(), job, slot)))
    }

    async fn answer(&self, request: Request<wire::AnswerRequest>) -> Answer<Self::AnswerStream> {
        let caller = self.member(&request)?;
        let job = self.find(caller, &request.get_ref().job).await?;
        let slot = self.0.limits.watch(caller)?;
        let reader =
            self.0.streams.reader(&job).ok_or_else(|| {
                Status::not_found(format!("job {} has no answer to read along", job.short()))
            })?;
        Ok(Response::new(session::answer(self.0.clone(), job, reader, slot)))
    }

    async fn delegate(&self, request: Request<wire::DelegateRequest>) -> Answer<wire::DelegateReply> {
        let caller = self.member(&request)?;
        let delegation: Verified<Delegation> = Signed::open(&request.get_ref().delegation)
            .map_err(|e| Status::invalid_argument(e.to_string()))?;
        self.room_on_disk()?;
        let key = delegation.key;
        let reply = self
            .0
            .ask(move |request| Event::Delegate {
                request,
                caller,
                delegation,
            })
            .await;
        match reply {
            Some(Reply::Delegated(credits)) => {
                self.0.members.admit(key, Role::User);
                Ok(Response::new(wire::DelegateReply { credits: credits.0 }))
            }
            other => Err(unexpected(other)),
        }
    }

    async fn revoke(&self, request: Request<wire::RevokeRequest>) -> Answer<wire::DelegateReply> {
        let caller = self.member(&request)?;
        let key =
            translate::public_key("revoke", "key", &request.get_ref().key).map_err(|e| malformed(&e))?;
        let reply = self
            .0
            .ask(move |request| Event::Revoke { request, caller, key })
            .await;
        match reply {
            Some(Reply::Delegated(credits)) => {
                self.0.members.remove(&key);
                Ok(Response::new(wire::DelegateReply { credits: credits.0 }))
            }
            other => Err(unexpected(other)),
        }
    }

    async fn keys(&self, request: Request<wire::KeysRequest>) -> Answer<wire::KeysReply> {
        let caller = self.member(&request)?;
        let keys = self
            .0
            .look(|c| {
                c.delegations_of(caller)
                    .map(|delegation| wire::DelegatedKey {
                        left: c.budget(UserId(delegation.key)).0,
                        delegation: Some(delegation.to_wire()),
                    })
                    .collect()
            })
            .await;
        let config = &self.0.config.gateway;
        let gateway = match config.enabled {
            true => gateway::url(config),
            false => String::new(),
        };
        Ok(Response::new(wire::KeysReply { keys, gateway }))
    }

    async fn cancel(&self, request: Request<wire::JobRequest>) -> Answer<wire::JobView> {
        let caller = self.member(&request)?;
        let job = self.find(caller, &request.get_ref().job).await?;
        match self
            .0
            .ask(move |request| Event::Cancel { request, caller, job })
            .await
        {
            Some(Reply::Cancelled(job)) => self.view(job).await.map(Response::new),
            other => Err(unexpected(other)),
        }
    }

    async fn logs(&self, request: Request<wire::JobRequest>) -> Answer<wire::LogsReply> {
        let caller = self.member(&request)?;
        let job = self.find(caller, &request.get_ref().job).await?;
        let lines = self.0.look(|c| c.logs(&job)).await;
        Ok(Response::new(wire::LogsReply {
            entries: lines.into_iter().map(Into::into).collect(),
        }))
    }

    async fn explain(&self, request: Request<wire::ExplainRequest>) -> Answer<wire::ExplainReply> {
        let caller = self.member(&request)?;
        let now = self.0.clock.now();
        let wire::ExplainRequest { job, order } = request.into_inner();
        let (explanation, job) = if job.is_empty() {
            let order: Verified<Order> =
                Signed::open(&order).map_err(|e| Status::invalid_argument(e.to_string()))?;
            if order.user.0 != caller {
                return Err(denied(&Denial::Order("is not yours: explain your own".into())));
            }
            (Some(self.0.look(|c| c.explain_order(now, &order)).await), None)
        } else {
            let id = self.find(caller, &job).await?;
            self.0.look(|c| (c.explain_job(now, &id), c.job(&id))).await
        };
        let mut explanation =
            explanation.ok_or_else(|| denied(&Denial::NoJob("(forgotten by now)".into())))?;
        explanation.candidates.truncate(CANDIDATES_MAX);
        let mut reply = wire::ExplainReply::from(explanation);
        reply.job = job.map(session::view_of);
        Ok(Response::new(reply))
    }

    async fn offers(&self, request: Request<wire::OffersRequest>) -> Answer<wire::OffersReply> {
        self.member(&request)?;
        let mut offers = self.0.look(|c| c.offers()).await;
        offers.truncate(OFFERS_MAX);
        Ok(Response::new(wire::OffersReply {
            offers: offers.into_iter().map(Into::into).collect(),
        }))
    }

    async fn models(&self, request: Request<wire::ModelsRequest>) -> Answer<wire::ModelsReply> {
        self.member(&request)?;
        let model = |(name, named): (String, Named)| wire::Model {
            name,
            artifact: Some(named.artifact.into()),
            format: named.format,
            licence: named.licence,
        };
        let models = self.0.models().await.into_iter().map(model).collect();
        Ok(Response::new(wire::ModelsReply { models }))
    }

    async fn name_model(&self, request: Request<wire::NameModelRequest>) -> Answer<wire::NameModelReply> {
        let caller = self.member(&request)?;
        let model = request.into_inner().model.unwrap_or_default();
        let artifact = translate::artifact("model", model.artifact).map_err(|e| malformed(&e))?;
        let cached = async || {
            !self
                .0
                .look(|c| cached_somewhere(c, &BTreeSet::from([artifact.digest])))
                .await
                .is_empty()
        };
        if !self.0.store.contains(&artifact) && !cached().await {
            return Err(Status::not_found(format!(
                "the model {artifact} is neither in this scheduler's store nor with any node: bring it with `karez artifact add`"
            )));
        }
        self.room_on_disk()?;
        let named = Named {
            artifact,
            format: model.format,
            licence: model.licence,
            by: caller,
        };
        let operator = self.operator(caller);
        match self
            .0
            .catalogue
            .name(&self.0.writer, model.name, named, operator)
            .await
        {
            Ok(()) => Ok(Response::new(wire::NameModelReply {})),
            Err(error) => Err(match &error {
                NameError::Name(_) | NameError::Format(_) | NameError::Licence(_) => {
                    Status::invalid_argument(error.to_string())
                }
                NameError::Taken { .. } => Status::permission_denied(error.to_string()),
                NameError::Full { .. } => Status::resource_exhausted(error.to_string()),
                NameError::Store(_) => Status::unavailable(error.to_string()),
            }),
        }
    }

    async fn balance(&self, request: Request<wire::BalanceRequest>) -> Answer<wire::BalanceReply> {
        let caller = self.member(&request)?;
        let all = request.get_ref().all;
        let operator = self.operator(caller);
        let accounts = self
            .0
            .look(|c| {
                let mut accounts = Vec::new();
                match c.member(&caller) {
                    Some(m) if m.role == Role::Node => {
                        accounts.push(Account::Institution(m.institution.clone()))
                    }
                    Some(_) => accounts.push(Account::User(UserId(caller))),
                    None => {}
                }
                if all {
                    let public = |a: &Account| matches!(a, Account::Federation | Account::Institution(_));
                    let others = c.accounts().iter().map(|(account, _)| account);
                    accounts.extend(
                        others
                            .filter(|a| operator || public(a))
                            .take(ACCOUNTS_MAX)
                            .cloned(),
                    );
                    accounts.sort();
                    accounts.dedup();
                }
                let balance = |a: &Account| translate::account(a, c.accounts().balance(a));
                accounts.iter().map(balance).collect()
            })
            .await;
        Ok(Response::new(wire::BalanceReply { accounts }))
    }

    async fn ledger(&self, request: Request<wire::LedgerRequest>) -> Answer<Self::LedgerStream> {
        self.member(&request)?;
        if request.get_ref().from != 0 {
            return Err(Status::invalid_argument(
                "an export begins at entry 0: a part of a ledger proves nothing",
            ));
        }
        let permit = self.0.limits.export()?;
        Ok(Response::new(session::ledger(self.0.clone(), permit)))
    }

    async fn head(&self, request: Request<wire::HeadRequest>) -> Answer<wire::HeadReply> {
        self.caller(&request)?;
        let shared = &self.0;
        let head = witness::own(shared);
        let mut consistency = Vec::new();
        if let Some(old) = request.get_ref().old {
            let (writer, new) = (shared.writer.clone(), head.size);
            let path = blocking(move || writer.prove_consistency(old, new)).await?;
            let path =
                path.ok_or_else(|| Status::out_of_range(format!("the ledger has {new} entries, not {old}")))?;
            consistency = path.iter().map(|hash| hash.0.to_vec()).collect();
        }
        let cosigned = shared.heads.cosigned().filter(|cosigned| *cosigned != head);
        Ok(Response::new(wire::HeadReply {
            head: head.to_string(),
            cosigned: cosigned.map(|head| head.to_string()).unwrap_or_default(),
            consistency,
            forks: shared.heads.forks(),
        }))
    }

    async fn prove(&self, request: Request<wire::ProveRequest>) -> Answer<wire::ProveReply> {
        self.member(&request)?;
        let id = request.into_inner().id;
        let shared = self.0.clone();
        let proof = blocking(move || {
            let index = match (id.parse::<Digest>(), id.parse::<u64>()) {
                (Ok(record), _) => shared.writer.find(&record)?,
                (_, Ok(index)) => Some(index),
                _ => return Ok(Err(id)),
            };
            // The latest head comes after the search: it covers what was found.
            let proof = match index {
                Some(index) => shared.writer.prove(index, witness::own(&shared))?,
                None => None,
            };
            Ok(proof.ok_or(id))
        })
        .await?;
        let proof = proof.map_err(|id| {
            Status::not_found(format!(
                "the ledger has no entry {id}: give an entry's number, or the whole id of an order, a receipt or \
                 another last record of an entry"
            ))
        })?;
        Ok(Response::new(wire::ProveReply {
            proof: proof.to_string(),
        }))
    }

    async fn witness(&self, request: Request<wire::WitnessRequest>) -> Answer<wire::WitnessReply> {
        let caller = self.caller(&request)?;
        self.room_on_disk()?;
        let reply = witness::witness(&self.0, caller, request.into_inner()).await;
        Ok(Response::new(reply))
    }

    async fn file(&self, request: Request<wire::FileRequest>) -> Answer<wire::FileReply> {
        let caller = self.member(&request)?;
        self.room_on_disk()?;
        let filed = filed(&request.into_inner().records)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        if let Filed::Acceptance(papers) = &filed {
            self.settled(papers.1.id()).await?;
        }
        if let Filed::Dispute(papers) = &filed {
            self.settled(papers.1.id()).await?;
        }
        let reply = self
            .0
            .ask(move |request| Event::File {
                request,
                caller,
                filed,
            })
            .await;
        let Some(Reply::Filed(record)) = reply else {
            return Err(unexpected(reply));
        };
        let writer = self.0.writer.clone();
        let entry = blocking(move || writer.find(&record)).await?;
        Ok(Response::new(wire::FileReply {
            entry: entry.unwrap_or_default(),
            record: record.0.to_vec(),
        }))
    }

    async fn books(&self, request: Request<wire::BooksRequest>) -> Answer<wire::BooksReply> {
        let caller = self.member(&request)?;
        let operator = self.operator(caller);
        let reply = self.0.look(|c| {
            let grants = c
                .grants()
                .take(GRANTS_LISTED_MAX)
                .map(|(id, grant, left)| wire::GrantView {
                    id: id.0.to_vec(),
                    grant: Some(grant.to_wire()),
                    left: left.0,
                });
            // Whose dispute it is concerns the two sides and the operator.
            let mine = |user: UserId| operator || user.0 == caller;
            let disputes = c
                .disputes()
                .filter(|(_, _, user, ..)| mine(*user))
                .take(GRANTS_LISTED_MAX);
            wire::BooksReply {
                grants: grants.collect(),
                disputes: disputes
                    .map(
                        |(receipt, dispute, user, institution, credits)| wire::DisputeView {
                            receipt: receipt.0.to_vec(),
                            dispute: dispute.0.to_vec(),
                            user: user.0.0.to_vec(),
                            institution: institution.to_string(),
                            credits: credits.0,
                        },
                    )
                    .collect(),
                rates: c.rate_card().map(Record::to_wire),
                floors: Some(c.floors().to_wire()),
            }
        });
        Ok(Response::new(reply.await))
    }

    async fn status(&self, request: Request<wire::StatusRequest>) -> Answer<wire::StatusReply> {
        self.caller(&request)?;
        let shared = &self.0;
        let (nodes, jobs_open, offers_refused) = shared
            .look(|c| (c.offers().len(), c.jobs_open(), c.offers_refused()))
            .await;
        let (ledger_entries, ledger_head) = shared.writer.head();
        Ok(Response::new(wire::StatusReply {
            scheduler: shared.id.0.to_vec(),
            name: shared.config.name.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            artifact_addrs: shared.config.artifacts.advertise.clone(),
            peer_addrs: crate::setup::peer_addrs(&shared.config, karez_core::key::SchedulerId(shared.id)),
            nodes: u32::try_from(nodes).unwrap_or(u32::MAX),
            jobs_open: u32::try_from(jobs_open).unwrap_or(u32::MAX),
            ledger_entries,
            ledger_head: ledger_head.0.to_vec(),
            offers_refused,
            schedulers: shared.peers.views(shared.clock.now()),
        }))
    }
}

/// Reads the books on a thread that may wait for the disk.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, Status> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|e| Status::internal(e.to_string()))?
        .map_err(|e| Status::unavailable(e.to_string()))
}

/// Reads the records of a filing by the type of the last one.
fn filed(records: &[Vec<u8>]) -> Result<Filed, RecordError> {
    let kind = records
        .last()
        .and_then(|last| describe(last))
        .map(|(kind, ..)| kind);
    Ok(match (kind.as_deref(), records) {
        (Some(Acceptance::TYPE), [lease, receipt, last]) => Filed::Acceptance(Box::new((
            Signed::open(lease)?,
            Signed::open(receipt)?,
            Signed::open(last)?,
        ))),
        (Some(Dispute::TYPE), [lease, receipt, last]) => Filed::Dispute(Box::new((
            Signed::open(lease)?,
            Signed::open(receipt)?,
            Signed::open(last)?,
        ))),
        (Some(Ruling::TYPE), [last]) => Filed::Ruling(Signed::open(last)?),
        (Some(Grant::TYPE), [last]) => Filed::Grant(Signed::open(last)?),
        (Some(RateCard::TYPE), [last]) => Filed::Rates(Signed::open(last)?),
        (Some(Floors::TYPE), [last]) => Filed::Floors(Signed::open(last)?),
        (Some(CreditLimit::TYPE), [last]) => Filed::Limit(Signed::open(last)?),
        (Some(Payment::TYPE), [last]) => Filed::Payment(Signed::open(last)?),
        (kind, _) => {
            return Err(RecordError::WrongType {
                expected: "an answer with lease and receipt, or one record of the operator",
                got: kind.unwrap_or("nothing").chars().take(64).collect(),
            });
        }
    })
}

/// The gRPC code of a refusal; its message is the whole sentence.
fn denied(denial: &Denial) -> Status {
    let text = denial.to_string();
    match denial {
        Denial::NotAdmitted(_) => Status::unauthenticated(text),
        Denial::WrongRole { .. } | Denial::NotOperator => Status::permission_denied(text),
        Denial::Invitation(_) | Denial::Offer(_) | Denial::Order(_) | Denial::Record(_) | Denial::Key(_) => {
            Status::invalid_argument(text)
        }
        Denial::Budget { .. } | Denial::Unplaceable(_) | Denial::Ledger(_) => {
            Status::failed_precondition(text)
        }
        Denial::Queue { .. } => Status::resource_exhausted(text),
        Denial::NoJob(_) => Status::not_found(text),
    }
}

fn unexpected(reply: Option<Reply>) -> Status {
    match reply {
        Some(Reply::Refused(denial)) => denied(&denial),
        Some(_) => Status::internal("the scheduler's answer does not match the question"),
        None => Status::unavailable("the scheduler stops: try again when it is back"),
    }
}

fn malformed(error: &TranslateError) -> Status {
    Status::invalid_argument(error.to_string())
}
