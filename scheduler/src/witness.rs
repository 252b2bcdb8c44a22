//! Tree heads go round: each scheduler shows its head to the others it hears of, and they cosign what is consistent
//! with what they saw before. A ledger with two histories cannot keep that up: the fork is remembered with both heads.
use crate::mind::{Shared, lock};
use karez_core::{key::PublicKey, unit::UtcMillis};
use karez_ledger::{
    Head, Op, Tables, Transaction, Writer,
    head::witness_name,
    tree::{TreeHash, verify_consistency},
};
use karez_net::control;
use karez_proto::control::{self as wire, control_client::ControlClient};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

/// Largest head seen of each scheduler: its key → the note.
const HEADS: &str = "heads";
/// Heads that contradict each other.
const FORKS: &str = "forks";
/// The most schedulers whose heads are kept.
const LOGS_MAX: usize = 1_024;
/// The most forks that are kept: one is enough to act upon.
const FORKS_MAX: usize = 64;
/// The most schedulers that are asked to cosign.
const WITNESSES_MAX: usize = 16;
/// One exchange with another scheduler must be over by then.
const EXCHANGE_MAX: Duration = Duration::from_secs(10);

/// Two heads of one ledger that cannot both be right.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Fork {
    known: String,
    other: String,
    heard_at: u64,
}

/// What this scheduler has seen of others' ledgers, and others of its own.
#[derive(Default)]
pub(crate) struct Heads(Mutex<State>);

#[derive(Default)]
struct State {
    seen: BTreeMap<PublicKey, Head>,
    forks: Vec<Fork>,
    /// Own head with the most cosignatures lately.
    cosigned: Option<Head>,
    /// What each witness has cosigned last.
    told: BTreeMap<PublicKey, u64>,
}

/// What a witness says to a head.
enum Judged {
    /// New or the same: store it, then cosign.
    Fits(Box<Head>),
    /// The asker must begin at this head, or ask again.
    Known(Box<Head>),
    /// Two histories.
    Fork(Fork),
    /// Not to be judged.
    No(String),
}

impl Heads {
    pub(crate) fn restore(tables: &Tables) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let mut state = State::default();
        for (key, value) in tables.rows(HEADS) {
            match (PublicKey::from_bytes(key), Head::parse(&text(value))) {
                (Ok(key), Ok(head)) => {
                    state.seen.insert(key, head);
                }
                _ => tracing::warn!("a stored head cannot be read and is forgotten"),
            }
        }
        let forks = tables
            .rows(FORKS)
            .filter_map(|(_, value)| serde_json::from_slice(value).ok());
        state.forks = forks.collect();
        Self(Mutex::new(state))
    }

    pub(crate) fn forks(&self) -> Vec<wire::Fork> {
        let one = |fork: &Fork| wire::Fork {
            known: fork.known.clone(),
            other: fork.other.clone(),
            heard_at: fork.heard_at,
        };
        lock(&self.0).forks.iter().map(one).collect()
    }

    pub(crate) fn cosigned(&self) -> Option<Head> {
        lock(&self.0).cosigned.clone()
    }

    fn judge(&self, head: Head, old: u64, path: &[TreeHash], at: UtcMillis) -> Judged {
        let state = lock(&self.0);
        let Some(known) = state.seen.get(&head.scheduler.0) else {
            if state.seen.len() >= LOGS_MAX {
                return Judged::No(format!("this witness follows {LOGS_MAX} ledgers already"));
            }
            return Judged::Fits(Box::new(head));
        };
        let fork = |known: &Head| {
            Judged::Fork(Fork {
                known: known.to_string(),
                other: head.to_string(),
                heard_at: at.0,
            })
        };
        if head.size == known.size && head.root != known.root {
            return fork(known);
        }
        if head.size < known.size || old != known.size {
            return Judged::Known(Box::new(known.clone()));
        }
        // The asker chose to start from just the head that is known here: if the way from it leads elsewhere, it
        // cannot show that one history contains the other.
        match verify_consistency((known.size, known.root), (head.size, head.root), path) {
            Ok(()) => Judged::Fits(Box::new(head)),
            Err(_) => fork(known),
        }
    }

    async fn keep_fork(&self, writer: &Writer, fork: Fork) {
        tracing::error!(
            "a ledger was forked: its scheduler signed two heads that cannot both be right:\n{}\n{}",
            fork.known,
            fork.other
        );
        let value = serde_json::to_vec(&fork).unwrap_or_default();
        let number = {
            let mut state = lock(&self.0);
            let same = |f: &Fork| f.known == fork.known && f.other == fork.other;
            if state.forks.len() >= FORKS_MAX || state.forks.iter().any(same) {
                return;
            }
            state.forks.push(fork);
            state.forks.len() as u64
        };
        let ops = vec![Op::Put {
            table: FORKS,
            key: number.to_be_bytes().to_vec(),
            value,
        }];
        if let Err(error) = writer.commit(Transaction { ops }).await {
            tracing::error!(%error, "the fork could not be written down");
        }
    }
}

fn hashes(bytes: &[Vec<u8>]) -> Option<Vec<TreeHash>> {
    // Paths have at most two hashes a level.
    if bytes.len() > 130 {
        return None;
    }
    bytes
        .iter()
        .map(|hash| Some(TreeHash(hash.as_slice().try_into().ok()?)))
        .collect()
}

/// The latest head of the own ledger.
pub(crate) fn own(shared: &Shared) -> Head {
    let (size, root) = shared.writer.tree();
    match shared.heads.cosigned() {
        Some(head) if head.size == size && head.root == root => head,
        _ => Head::sign(&shared.secret, size, root),
    }
}

/// Another scheduler shows its head: judged, stored, cosigned.
pub(crate) async fn witness(
    shared: &Shared,
    caller: PublicKey,
    asked: wire::WitnessRequest,
) -> wire::WitnessReply {
    let refusal = |why: String| wire::WitnessReply {
        refusal: why,
        ..wire::WitnessReply::default()
    };
    let head = match Head::parse(&asked.head) {
        Ok(head) if head.scheduler.0 == caller => head,
        Ok(_) => return refusal("show your own ledger's head".into()),
        Err(error) => return refusal(error.to_string()),
    };
    let Some(path) = hashes(&asked.consistency) else {
        return refusal("the proof of consistency is malformed".into());
    };
    let now = shared.clock.now().utc;
    match shared.heads.judge(head, asked.old, &path, now) {
        Judged::No(why) => refusal(why),
        Judged::Known(known) => wire::WitnessReply {
            known: known.to_string(),
            ..wire::WitnessReply::default()
        },
        Judged::Fork(fork) => {
            let known = fork.known.clone();
            shared.heads.keep_fork(&shared.writer, fork).await;
            wire::WitnessReply {
                known,
                refusal: "this head and the one known here cannot both be right".into(),
                ..wire::WitnessReply::default()
            }
        }
        Judged::Fits(head) => {
            // Remembered before it is signed, or a restart could make this witness sign a second history.
            let ops = vec![Op::Put {
                table: HEADS,
                key: caller.0.to_vec(),
                value: head.to_string().into_bytes(),
            }];
            if let Err(error) = shared.writer.commit(Transaction { ops }).await {
                return refusal(format!("the witness cannot write it down: {error}"));
            }
            let line = head.note.cosign(&witness_name(&shared.id), &shared.secret, now);
            lock(&shared.heads.0).seen.insert(caller, *head);
            wire::WitnessReply {
                cosignature: line.to_string(),
                ..wire::WitnessReply::default()
            }
        }
    }
}

/// Shows the own head to the schedulers heard of, whenever it has grown; until the daemon stops.
pub(crate) async fn spread(shared: Arc<Shared>) {
    let every = Duration::from_millis(shared.config.timing.summary_every.0);
    loop {
        tokio::select! {
            () = tokio::time::sleep(every) => {}
            () = shared.stopped() => return,
        }
        let head = own(&shared);
        if head.size == 0 {
            continue;
        }
        let others = shared.peers.control_addrs(shared.clock.now());
        for (key, addr) in others.into_iter().take(WITNESSES_MAX) {
            if lock(&shared.heads.0).told.get(&key) == Some(&head.size) {
                continue;
            }
            let exchange = tokio::time::timeout(EXCHANGE_MAX, show(&shared, key, &addr, &head));
            match exchange.await {
                Ok(Ok(())) => {}
                Ok(Err(why)) => tracing::debug!(scheduler = %key.short(), why, "a head was not cosigned"),
                Err(_) => tracing::debug!(scheduler = %key.short(), "a witness took too long"),
            }
        }
    }
}

async fn show(shared: &Shared, key: PublicKey, addr: &str, head: &Head) -> Result<(), String> {
    let channel = control::connect(addr, &shared.secret, key)
        .await
        .map_err(|e| e.to_string())?;
    let mut client = ControlClient::new(channel);
    let mut old = lock(&shared.heads.0).told.get(&key).copied().unwrap_or(0);
    // The second round begins at what the witness knows.
    for _ in 0..2 {
        let path = prove(shared, old, head.size).await?;
        let asked = wire::WitnessRequest {
            head: head.to_string(),
            old,
            consistency: path.iter().map(|hash| hash.0.to_vec()).collect(),
        };
        let reply = client
            .witness(asked)
            .await
            .map_err(|e| e.message().to_owned())?
            .into_inner();
        if !reply.cosignature.is_empty() {
            return take(shared, key, head, &reply.cosignature);
        }
        if reply.known.is_empty() {
            return Err(reply.refusal);
        }
        let known = Head::parse(&reply.known).map_err(|e| e.to_string())?;
        if known.scheduler.0 != shared.id {
            return Err("the witness answered with another ledger's head".into());
        }
        let ours = root_at(shared, known.size).await?;
        if ours.is_some_and(|root| root != known.root) || ours.is_none() {
            // Signed by this very key, and not in this book: it was restored from an old copy, or the key is used twice.
            let fork = Fork {
                known: reply.known,
                other: head.to_string(),
                heard_at: shared.clock.now().utc.0,
            };
            shared.heads.keep_fork(&shared.writer, fork).await;
            return Err("the witness knows another history of this ledger".into());
        }
        old = known.size;
    }
    Err("the witness did not agree on where to begin".into())
}

async fn prove(shared: &Shared, old: u64, new: u64) -> Result<Vec<TreeHash>, String> {
    let writer = shared.writer.clone();
    let proof = tokio::task::spawn_blocking(move || writer.prove_consistency(old, new));
    let proof = proof
        .await
        .map_err(|e| e.to_string())?
        .map_err(|e| e.to_string())?;
    proof.ok_or_else(|| "the witness knows more entries than there are".into())
}

async fn root_at(shared: &Shared, size: u64) -> Result<Option<TreeHash>, String> {
    let writer = shared.writer.clone();
    let root = tokio::task::spawn_blocking(move || writer.root_at(size));
    root.await.map_err(|e| e.to_string())?.map_err(|e| e.to_string())
}

/// Keeps a cosignature of the own head, once checked.
fn take(shared: &Shared, key: PublicKey, head: &Head, line: &str) -> Result<(), String> {
    let line = line
        .parse()
        .map_err(|e: karez_ledger::note::NoteError| e.to_string())?;
    let mut state = lock(&shared.heads.0);
    let mut signed = match state.cosigned.take() {
        Some(known) if known.size == head.size && known.root == head.root => known,
        other => {
            state.cosigned = other;
            head.clone()
        }
    };
    signed.note.add(line);
    let name = witness_name(&key);
    let checked = signed.note.verify_cosignature(&name, &key);
    if let Err(error) = checked {
        return Err(error.to_string());
    }
    state.cosigned = Some(signed);
    state.told.insert(key, head.size);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use karez_core::key::SecretKey;
    use karez_ledger::tree::{Frontier, leaf_hash};

    fn head(secret: &SecretKey, leaves: &[&str]) -> Head {
        let mut tree = Frontier::default();
        leaves
            .iter()
            .for_each(|leaf| tree.push(leaf_hash(leaf.as_bytes())));
        Head::sign(secret, tree.size(), tree.root())
    }

    #[test]
    fn a_witness_takes_what_grows_and_keeps_what_forks() {
        let secret = SecretKey::from_bytes(&[4; 32]);
        let key = PublicKey::of(&secret);
        let heads = Heads::default();
        let at = UtcMillis(5);
        let (two, three) = (head(&secret, &["a", "b"]), head(&secret, &["a", "b", "c"]));
        assert!(matches!(heads.judge(two.clone(), 0, &[], at), Judged::Fits(_)));
        lock(&heads.0).seen.insert(key, two.clone());
        // From the wrong beginning: told where to start.
        assert!(matches!(heads.judge(three.clone(), 0, &[], at), Judged::Known(_)));
        let path = [leaf_hash(b"c")];
        assert!(matches!(
            heads.judge(three.clone(), 2, &path, at),
            Judged::Fits(_)
        ));
        assert!(
            matches!(heads.judge(two.clone(), 2, &[], at), Judged::Fits(_)),
            "the same again"
        );
        for (other, path) in [
            (head(&secret, &["a", "x"]), vec![]),
            (head(&secret, &["a", "x", "c"]), vec![leaf_hash(b"c")]),
            (three, vec![]),
        ] {
            let judged = heads.judge(other.clone(), 2, &path, at);
            let Judged::Fork(fork) = judged else {
                panic!("{other} passed");
            };
            assert_eq!((fork.known, fork.other), (two.to_string(), other.to_string()));
        }
    }
}
