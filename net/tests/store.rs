//! The artifact store on a real file system.
// Helpers outside `#[test]` functions are test code too.
#![allow(clippy::unwrap_used)]
use karez_core::{
    artifact::{ArtifactKind, ArtifactRef},
    id::Digest,
    unit::Bytes,
};
use karez_net::store::{ArtifactStore, StoreError};
use std::{fs, os::unix::fs::PermissionsExt, path::Path};

fn noise(bytes: usize, seed: u32) -> Vec<u8> {
    let mut x = seed;
    (0..bytes)
        .map(|_| {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (x >> 24) as u8
        })
        .collect()
}

fn open(dir: &Path, limit: u64) -> ArtifactStore {
    ArtifactStore::open(dir, Bytes(limit)).unwrap()
}

fn files_below(dir: &Path) -> usize {
    fs::read_dir(dir)
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                files_below(&entry.path())
            } else {
                1
            }
        })
        .sum()
}

#[test]
fn files_and_directories_come_back_as_they_went_in() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir.path().join("store"), 1 << 30);
    for bytes in [0, 1, 16_384, 16_385, 300_000, 3_000_000] {
        let content = noise(bytes, 1);
        let file = dir.path().join("in");
        fs::write(&file, &content).unwrap();
        let artifact = store.add_file(&file).unwrap();
        assert_eq!(artifact.digest, Digest::of(&content), "{bytes}");
        assert_eq!(store.add_bytes(&content).unwrap(), artifact);
        assert!(store.contains(&artifact));
        assert_eq!(store.read(&artifact, Bytes(1 << 30)).unwrap(), content);
        let mode = fs::metadata(store.path(&artifact).unwrap())
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o444);
        store.verify(&artifact).unwrap();
    }
    let tree = dir.path().join("tree");
    fs::create_dir_all(tree.join("a/b")).unwrap();
    fs::write(tree.join("a/b/x"), b"same").unwrap();
    fs::write(tree.join("a/y"), b"same").unwrap();
    fs::write(tree.join("z"), noise(100_000, 2)).unwrap();
    let artifact = store.add_dir(&tree).unwrap();
    assert_eq!(artifact.kind, ArtifactKind::Tree);
    assert_eq!(artifact.bytes, Bytes(100_008));
    store.verify(&artifact).unwrap();
    for link in [false, true] {
        let out = dir.path().join(format!("out-{link}"));
        if link {
            store.link(&artifact, &out)
        } else {
            store.export(&artifact, &out)
        }
        .unwrap();
        assert_eq!(fs::read(out.join("a/b/x")).unwrap(), b"same");
        assert_eq!(fs::read(out.join("z")).unwrap(), noise(100_000, 2));
        assert_eq!(
            store.add_dir(&out).unwrap(),
            artifact,
            "equal directories have equal names"
        );
        assert!(store.export(&artifact, &out).is_err(), "nothing is overwritten");
    }
    // A reopened store knows the same things.
    let list = store.list();
    drop(store);
    let store = open(&dir.path().join("store"), 1 << 30);
    let again: Vec<_> = store.list().iter().map(|s| s.artifact).collect();
    assert_eq!(again.len(), list.len());
    assert!(store.contains(&artifact));
    assert_eq!(store.manifest(&artifact).unwrap().entries().len(), 3);
}

#[test]
fn links_and_odd_files_are_refused_not_followed() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir.path().join("store"), 1 << 20);
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", tree.join("link")).unwrap();
    assert!(matches!(
        store.add_dir(&tree),
        Err(StoreError::Unsupported { .. })
    ));
    assert!(matches!(
        store.add_file(&tree),
        Err(StoreError::Unsupported { .. })
    ));
    assert_eq!(store.used(), Bytes(0));
}

#[test]
fn the_unused_go_first_and_the_pinned_never() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), 50_000);
    let add = |seed| store.add_bytes(&noise(15_000, seed)).unwrap();
    let (a, b, c) = (add(1), add(2), add(3));
    assert_eq!(
        store.list().iter().map(|s| s.artifact).collect::<Vec<_>>(),
        [c, b, a]
    );
    let pin = store.pin(&a).unwrap();
    let d = add(4);
    assert!(store.contains(&a), "pinned");
    assert!(!store.contains(&b), "the oldest that is not pinned goes");
    assert!(store.contains(&c) && store.contains(&d));
    assert!(matches!(store.remove(&a), Err(StoreError::InUse { .. })));
    let pins = [store.pin(&c).unwrap(), store.pin(&d).unwrap()];
    let full = store.add_bytes(&noise(15_000, 5)).unwrap_err();
    assert!(
        matches!(
            full,
            StoreError::Full {
                pinned: Bytes(45_000),
                ..
            }
        ),
        "{full:?}"
    );
    assert!(full.to_string().contains("raise the limit"), "{full}");
    drop((pin, pins));
    let e = add(6);
    assert!(!store.contains(&a) && store.contains(&e));
    // What can never fit throws nothing out.
    let before = store.list();
    assert!(matches!(
        store.add_bytes(&noise(60_000, 7)),
        Err(StoreError::Full { .. })
    ));
    assert_eq!(store.list(), before);
    assert!(store.used() <= store.limit());
    assert_eq!(files_below(&dir.path().join("temp")), 0);
}

#[test]
fn a_shared_file_stays_until_its_last_artifact_goes() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir.path().join("store"), 1 << 20);
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("x"), b"shared").unwrap();
    let blob = store.add_bytes(b"shared").unwrap();
    let artifact = store.add_dir(&tree).unwrap();
    store.remove(&blob).unwrap();
    store.verify(&artifact).unwrap();
    store.remove(&artifact).unwrap();
    assert_eq!(store.used(), Bytes(0));
    assert_eq!(files_below(&dir.path().join("store")), 0);
    assert!(matches!(store.pin(&artifact), Err(StoreError::Missing { .. })));
}

#[test]
fn damage_is_found_and_removed_and_litter_is_swept() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), 1 << 30);
    let artifact = store.add_bytes(&noise(500_000, 1)).unwrap();
    let path = store.path(&artifact).unwrap();
    let mut bytes = fs::read(&path).unwrap();
    bytes[400_000] ^= 1;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    fs::write(&path, &bytes).unwrap();
    assert!(matches!(store.verify(&artifact), Err(StoreError::Corrupt { .. })));
    assert!(!store.contains(&artifact));
    assert_eq!(store.add_bytes(&noise(500_000, 1)).unwrap(), artifact);
    assert!(store.contains(&artifact));
    drop(store);

    fs::write(dir.path().join("temp/7"), b"half").unwrap();
    fs::write(dir.path().join("blobs/zz"), b"")
        .map(|()| fs::remove_file(dir.path().join("blobs/zz")))
        .unwrap()
        .unwrap();
    let orphan = Digest::of(b"orphan").to_string();
    fs::create_dir_all(dir.path().join("blobs").join(&orphan[..2])).unwrap();
    fs::write(
        dir.path().join("blobs").join(&orphan[..2]).join(&orphan),
        b"orphan",
    )
    .unwrap();
    fs::write(dir.path().join("roots/what-is-this"), b"").unwrap();
    let store = open(dir.path(), 1 << 30);
    assert!(store.contains(&artifact));
    assert_eq!(files_below(dir.path()), 3, "data, outboard and root");
    let missing = ArtifactRef {
        digest: Digest::of(b"orphan"),
        bytes: Bytes(6),
        kind: ArtifactKind::Blob,
    };
    assert!(!store.contains(&missing));
}

#[test]
fn a_full_disk_leaves_no_half_file() {
    // /dev/full is not a directory; a tiny tmpfs needs privileges. The quota is our own limit instead, met half-way
    // through a directory: nothing of it stays.
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir.path().join("store"), 30_000);
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    for n in 0..4u32 {
        fs::write(tree.join(n.to_string()), noise(10_000, n)).unwrap();
    }
    assert!(matches!(store.add_dir(&tree), Err(StoreError::Full { .. })));
    assert_eq!(store.used(), Bytes(0));
    assert_eq!(files_below(&dir.path().join("store")), 0);
}

#[test]
fn what_the_disk_was_not_waited_for_is_here_until_the_process_ends() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let (gone, kept, made_sure) = (noise(300, 1), noise(20_000, 2), noise(300, 3));
    let store = open(&path, 1 << 20);
    let artifacts = [&gone, &kept, &made_sure].map(|bytes| store.add_unsynced(bytes).unwrap());
    for (artifact, bytes) in artifacts.iter().zip([&gone, &kept, &made_sure]) {
        assert_eq!(store.read(artifact, Bytes(1 << 20)).unwrap(), *bytes);
        drop(store.pin(artifact).unwrap());
    }
    store.sync(&artifacts[1]).unwrap();
    store.sync(&artifacts[1]).unwrap();
    // Whoever adds the same and waits, has it for good.
    assert_eq!(store.add_bytes(&made_sure).unwrap(), artifacts[2]);
    drop(store);
    let store = open(&path, 1 << 20);
    assert!(!store.contains(&artifacts[0]));
    for (artifact, bytes) in artifacts.iter().zip([&gone, &kept, &made_sure]).skip(1) {
        assert_eq!(store.read(artifact, Bytes(1 << 20)).unwrap(), *bytes);
        store.verify(artifact).unwrap();
    }
    // Two blobs and the tree of the larger one: nothing is left of what went.
    assert_eq!(files_below(&path.join("blobs")), 3);
    assert_eq!(files_below(&path.join("roots")), 2);
    store.remove(&artifacts[1]).unwrap();
    assert_eq!(files_below(&path.join("blobs")), 1);
}
