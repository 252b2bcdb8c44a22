//! Artifacts between stores over QUIC on loopback.
// Helpers outside `#[test]` functions are test code too.
#![allow(clippy::unwrap_used)]
use karez_core::{
    artifact::{ArtifactKind, ArtifactRef},
    id::Digest,
    key::{PublicKey, SecretKey},
    unit::Bytes,
};
use karez_net::{
    store::{ArtifactStore, StoreError},
    transfer::{Holder, OnProgress, Op, Progress, TransferError, TransferPolicy, Transfers, unwatched},
};
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};
use tempfile::TempDir;
use tokio::time::{sleep, timeout};

const MIB: u64 = 1 << 20;

fn noise(bytes: usize, seed: u32) -> Vec<u8> {
    let mut x = seed;
    (0..bytes)
        .map(|_| {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (x >> 24) as u8
        })
        .collect()
}

struct Party {
    transfers: Transfers,
    holder: Holder,
    dir: TempDir,
}

impl Party {
    fn new(n: u8) -> Self {
        Self::with(n, 1 << 30, Arc::new(|_, _| true))
    }

    fn with(n: u8, limit: u64, policy: TransferPolicy) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = ArtifactStore::open(dir.path(), Bytes(limit)).unwrap();
        let secret = SecretKey::from_bytes(&[n; 32]);
        let transfers = Transfers::bind("127.0.0.1:0".parse().unwrap(), &secret, store, policy).unwrap();
        let holder = Holder {
            key: PublicKey::of(&secret),
            addrs: vec![transfers.local_addr()],
        };
        Self {
            transfers,
            holder,
            dir,
        }
    }

    fn store(&self) -> &ArtifactStore {
        self.transfers.store()
    }
}

fn watched() -> (OnProgress, Arc<Mutex<Progress>>) {
    let last = Arc::new(Mutex::new(Progress::default()));
    let seen = last.clone();
    let on: OnProgress = Arc::new(move |progress| {
        let mut last = seen.lock().unwrap();
        if progress.done >= last.done {
            *last = progress;
        }
    });
    (on, last)
}

fn tree_in(dir: &Path) -> std::path::PathBuf {
    let tree = dir.join("a tree");
    fs::create_dir_all(tree.join("sub/deep")).unwrap();
    fs::write(tree.join("model.bin"), noise(5_000_000, 1)).unwrap();
    fs::write(tree.join("sub/copy.bin"), noise(5_000_000, 1)).unwrap();
    fs::write(tree.join("sub/deep/config.json"), b"{}").unwrap();
    fs::write(tree.join("empty"), b"").unwrap();
    fs::write(tree.join("sub/middling"), noise(200_000, 2)).unwrap();
    tree
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(50), future)
        .await
        .expect("took too long")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blobs_and_trees_are_fetched_whole_and_verified() {
    let (a, b) = (Party::new(1), Party::new(2));
    let mut artifacts = Vec::new();
    for bytes in [0, 1, 16_384, 262_144, 262_145, 9_000_001] {
        artifacts.push(a.store().add_bytes(&noise(bytes, 3)).unwrap());
    }
    artifacts.push(a.store().add_dir(&tree_in(a.dir.path())).unwrap());
    let (progress, last) = watched();
    let pins = within(
        b.transfers
            .fetch(&artifacts, std::slice::from_ref(&a.holder), progress),
    )
    .await
    .unwrap();
    assert_eq!(pins.iter().map(|p| p.artifact()).collect::<Vec<_>>(), artifacts);
    for artifact in &artifacts {
        b.store().verify(artifact).unwrap();
    }
    let last = *last.lock().unwrap();
    assert_eq!(last.done, last.total);
    // The second copy of the 5 MB file did not cross the network.
    assert_eq!(last.moved.0, last.total.0 - 5_000_000);
    let out = b.dir.path().join("out");
    b.store().export(&artifacts[6], &out).unwrap();
    assert_eq!(fs::read(out.join("sub/copy.bin")).unwrap(), noise(5_000_000, 1));
    assert!(b.store().list().iter().all(|s| s.pinned && s.complete));
    drop(pins);
    assert!(b.store().list().iter().all(|s| !s.pinned));
    // All of it is here: nothing moves, nobody is asked.
    let (progress, last) = watched();
    within(b.transfers.fetch(&artifacts, &[], progress))
        .await
        .unwrap();
    assert_eq!(last.lock().unwrap().moved, Bytes(0));
    a.transfers.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_corrupt_holder_is_left_and_another_used() {
    let (a, b, c) = (Party::new(1), Party::new(2), Party::new(3));
    let content = noise(20_000_000, 4);
    let artifact = a.store().add_bytes(&content).unwrap();
    b.store().add_bytes(&content).unwrap();
    let path = a.store().path(&artifact).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    let mut bytes = content.clone();
    for at in (0..bytes.len()).step_by(1_000_000) {
        bytes[at] ^= 1;
    }
    fs::write(&path, bytes).unwrap();

    let alone = within(
        c.transfers
            .fetch(&[artifact], std::slice::from_ref(&a.holder), unwatched()),
    )
    .await;
    let error = alone.unwrap_err().to_string();
    assert!(
        error.contains("do not match") && error.contains(&a.holder.key.short()),
        "{error}"
    );
    assert!(!c.store().contains(&artifact));

    let holders = [a.holder.clone(), b.holder.clone()];
    within(c.transfers.fetch(&[artifact], &holders, unwatched()))
        .await
        .unwrap();
    c.store().verify(&artifact).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_transfer_goes_on_where_it_was_even_after_a_restart() {
    let a = Party::new(1);
    let size = 64 * MIB;
    let artifact = a.store().add_bytes(&noise(size as usize, 5)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let secret = SecretKey::from_bytes(&[2; 32]);
    let start = || {
        let store = ArtifactStore::open(dir.path(), Bytes(1 << 30)).unwrap();
        Transfers::bind(
            "127.0.0.1:0".parse().unwrap(),
            &secret,
            store,
            Arc::new(|_, _| false),
        )
        .unwrap()
    };
    let b = start();
    let (progress, last) = watched();
    let (task, holders) = (b.clone(), [a.holder.clone()]);
    let cut = tokio::spawn(async move { task.fetch(&[artifact], &holders, progress).await });
    within(async {
        while last.lock().unwrap().moved.0 < 16 * MIB {
            sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    cut.abort();
    let _ = cut.await;
    let before = last.lock().unwrap().done.0;
    b.close().await;
    drop(b);
    sleep(Duration::from_millis(300)).await;

    let b = start();
    let listed = b.store().list();
    assert_eq!((listed.len(), listed[0].complete), (1, false));
    let (progress, last) = watched();
    within(b.fetch(&[artifact], std::slice::from_ref(&a.holder), progress))
        .await
        .unwrap();
    let last = *last.lock().unwrap();
    assert_eq!(last.done.0, size);
    // What was in flight at the cut may come again, what was told as done may not.
    assert!(
        last.moved.0 <= size - before + 8 * MIB / 4,
        "moved {} after {before}",
        last.moved.0
    );
    assert!(last.moved.0 < size, "moved {}", last.moved.0);
    b.store().verify(&artifact).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_holder_that_vanishes_is_replaced_in_mid_transfer() {
    let (a, b, c) = (Party::new(1), Party::new(2), Party::new(3));
    let content = noise(48 << 20, 6);
    let artifact = a.store().add_bytes(&content).unwrap();
    b.store().add_bytes(&content).unwrap();
    let (progress, last) = watched();
    let (task, holders) = (c.transfers.clone(), [a.holder.clone(), b.holder.clone()]);
    let fetching = tokio::spawn(async move { task.fetch(&[artifact], &holders, progress).await });
    within(async {
        while last.lock().unwrap().moved.0 < 4 * MIB {
            sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    a.transfers.close().await;
    within(fetching).await.unwrap().unwrap();
    c.store().verify(&artifact).unwrap();
    assert_eq!(last.lock().unwrap().moved.0, 48 * MIB, "nothing is kept twice");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pushes_need_leave_and_room_and_resume() {
    let a = Party::new(1);
    let friend = a.holder.key;
    let b = Party::with(
        2,
        30_000_000,
        Arc::new(move |key, op| *key == friend && !matches!(op, Op::Get(_))),
    );
    let stranger = Party::new(3);
    let tree = a.store().add_dir(&tree_in(a.dir.path())).unwrap();
    assert!(!a.transfers.has(tree, &b.holder).await.unwrap());
    within(a.transfers.push(tree, &b.holder, unwatched()))
        .await
        .unwrap();
    b.store().verify(&tree).unwrap();
    assert!(a.transfers.has(tree, &b.holder).await.unwrap());
    let (progress, last) = watched();
    within(a.transfers.push(tree, &b.holder, progress)).await.unwrap();
    assert_eq!(last.lock().unwrap().moved, Bytes(0), "it is there already");

    let blob = a.store().add_bytes(&noise(15_000_000, 7)).unwrap();
    within(a.transfers.push(blob, &b.holder, unwatched()))
        .await
        .unwrap();
    b.store().verify(&blob).unwrap();

    let large = a.store().add_bytes(&noise(31_000_000, 8)).unwrap();
    let full = within(a.transfers.push(large, &b.holder, unwatched()))
        .await
        .unwrap_err();
    assert!(matches!(full, TransferError::Declined { .. }), "{full}");

    let own = stranger.store().add_bytes(b"unwanted").unwrap();
    let denied = within(stranger.transfers.push(own, &b.holder, unwatched()))
        .await
        .unwrap_err();
    assert!(denied.to_string().contains("does not allow"), "{denied}");
    let denied = within(
        a.transfers
            .fetch(&[blob_of(b"x")], std::slice::from_ref(&b.holder), unwatched()),
    )
    .await;
    assert!(denied.unwrap_err().to_string().contains("does not allow"));
}

/// Connections outlive a transfer: many at once must not get into each other's way, and one that is gone is not used.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn transfers_follow_each_other_to_a_holder_that_comes_and_goes() {
    let (near, far) = (Party::new(1), Party::new(2));
    let blobs: Vec<ArtifactRef> = (0..40)
        .map(|n| near.store().add_bytes(&noise(5_000, n)).unwrap())
        .collect();
    let pushes = blobs
        .iter()
        .map(|blob| near.transfers.push(*blob, &far.holder, unwatched()));
    for pushed in within(futures::future::join_all(pushes)).await {
        pushed.unwrap();
    }
    let Party {
        transfers,
        holder,
        dir,
    } = far;
    drop(transfers);
    // The same party at the same address, in another process as it were.
    let again = within(async {
        loop {
            let store = ArtifactStore::open(dir.path(), Bytes(1 << 30)).unwrap();
            let secret = SecretKey::from_bytes(&[2; 32]);
            match Transfers::bind(holder.addrs[0], &secret, store, Arc::new(|_, _| true)) {
                Ok(transfers) => break transfers,
                Err(_) => sleep(Duration::from_millis(20)).await,
            }
        }
    })
    .await;
    let new = near.store().add_bytes(&noise(5_000, 99)).unwrap();
    within(near.transfers.push(new, &holder, unwatched()))
        .await
        .unwrap();
    assert!(again.store().contains(&new));
    let other = again.store().add_bytes(&noise(300_000, 98)).unwrap();
    within(near.transfers.fetch(&[other], &[holder], unwatched()))
        .await
        .unwrap();
}

fn blob_of(bytes: &[u8]) -> ArtifactRef {
    ArtifactRef {
        digest: Digest::of(bytes),
        bytes: Bytes(bytes.len() as u64),
        kind: ArtifactKind::Blob,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn references_that_lie_and_manifests_that_lead_outside_are_refused() {
    let (a, b) = (Party::new(1), Party::new(2));
    let good = a.store().add_bytes(&noise(1_000_000, 9)).unwrap();
    let lie = ArtifactRef {
        bytes: Bytes(2_000_000),
        ..good
    };
    let refused = within(
        b.transfers
            .fetch(&[lie], std::slice::from_ref(&a.holder), unwatched()),
    )
    .await;
    assert!(refused.is_err());

    // A hostile tree: its "manifest" is a blob that names a path outside. The holder's own store would never make
    // one, so it is smuggled in as a blob and served under a tree's name by editing the store's roots.
    let text = format!("karez-manifest 1\n{} 1 ../outside\n", Digest::of(b"x"));
    let blob = a.store().add_bytes(text.as_bytes()).unwrap();
    let tree = ArtifactRef {
        kind: ArtifactKind::Tree,
        bytes: Bytes(1),
        ..blob
    };
    fs::write(
        a.dir.path().join("roots").join(format!("tree-{}-1", blob.digest)),
        b"",
    )
    .unwrap();
    let dir = a.dir.path().to_owned();
    a.transfers.close().await;
    let secret = SecretKey::from_bytes(&[1; 32]);
    let store = ArtifactStore::open(&dir, Bytes(1 << 30)).unwrap();
    let evil = Transfers::bind(
        "127.0.0.1:0".parse().unwrap(),
        &secret,
        store,
        Arc::new(|_, _| true),
    )
    .unwrap();
    let holder = Holder {
        key: a.holder.key,
        addrs: vec![evil.local_addr()],
    };
    let refused = within(b.transfers.fetch(&[tree], &[holder], unwatched()))
        .await
        .unwrap_err();
    assert!(
        matches!(refused, TransferError::Store(StoreError::Manifest(_))),
        "{refused:?}"
    );
    assert!(!b.store().contains(&tree));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_keys_noise_and_absence_are_told_plainly() {
    let (a, b) = (Party::new(1), Party::new(2));
    let artifact = a.store().add_bytes(&noise(400_000, 10)).unwrap();
    // Noise on the port.
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    for length in [0, 1, 20, 1200, 9000] {
        for first in [0x00, 0x40, 0xc0, 0xff] {
            let mut packet = noise(length, 11);
            if let Some(byte) = packet.first_mut() {
                *byte = first;
            }
            socket.send_to(&packet, a.holder.addrs[0]).unwrap();
        }
    }
    let imposter = Holder {
        key: b.holder.key,
        addrs: a.holder.addrs.clone(),
    };
    let wrong = within(b.transfers.fetch(&[artifact], &[imposter], unwatched())).await;
    assert!(matches!(wrong, Err(TransferError::NoHolder { .. })), "{wrong:?}");
    let absent = within(b.transfers.fetch(
        &[blob_of(b"absent")],
        std::slice::from_ref(&a.holder),
        unwatched(),
    ))
    .await;
    assert!(absent.unwrap_err().to_string().contains("not in this store"));
    let nobody = within(b.transfers.fetch(&[artifact], &[], unwatched())).await;
    assert!(nobody.unwrap_err().to_string().contains("no holder is known"));
    within(
        b.transfers
            .fetch(&[artifact], std::slice::from_ref(&a.holder), unwatched()),
    )
    .await
    .unwrap();

    // A connection with the right key that speaks nonsense.
    let endpoint = nonsense(&a.holder).await;
    within(b.transfers.has(artifact, &a.holder)).await.unwrap();
    drop(endpoint);
}

async fn nonsense(to: &Holder) -> quinn::Endpoint {
    let secret = SecretKey::from_bytes(&[7; 32]);
    let tls = karez_net::tls::client(
        &secret,
        karez_net::tls::ALPN_ARTIFACT,
        karez_net::tls::only(to.key),
    )
    .unwrap();
    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap();
    let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let connecting = endpoint
        .connect_with(quinn::ClientConfig::new(Arc::new(crypto)), to.addrs[0], "karez")
        .unwrap();
    let connection = connecting.await.unwrap();
    for bytes in [
        &b""[..],
        &[0xff, 0xff],
        &[0, 1, 9],
        &[0, 42, 2, 0, 1, 2],
        &[0xff; 100_000],
    ] {
        let (mut send, mut recv) = connection.open_bi().await.unwrap();
        let _ = send.write_all(bytes).await;
        let _ = send.finish();
        // Whatever comes back is small.
        let _ = timeout(Duration::from_secs(2), recv.read_to_end(1000)).await;
    }
    endpoint
}
