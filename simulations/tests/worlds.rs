//! Hundreds of seeded worlds, one that can be replayed, and broken promises that the checkers must notice.
use karez_simulations::{Sabotage, Setup, run};
use std::time::{Duration, Instant};

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// `KAREZ_SEED=N cargo test -p karez-simulations one_seed -- --nocapture` tells the story of one world.
#[test]
fn one_seed() {
    let Some(seed) = number("KAREZ_SEED") else { return };
    let setup = Setup {
        trace: true,
        ..Setup::of_seed(seed)
    };
    match run(seed, &setup) {
        Ok(summary) => println!("seed {seed}: {summary:#?}"),
        Err(failure) => {
            for line in &failure.trace {
                println!("{line}");
            }
            panic!("{failure}");
        }
    }
}

/// `KAREZ_SEEDS=N` runs so many; without it, as many as fit a minute, and at most 300.
#[test]
fn many_seeds() {
    let wanted = number("KAREZ_SEEDS");
    let (count, limit) = match wanted {
        Some(count) => (count, Duration::from_secs(24 * 3_600)),
        None => (300, Duration::from_secs(60)),
    };
    let first = number("KAREZ_FIRST_SEED").unwrap_or(0);
    let began = Instant::now();
    let mut total = karez_simulations::Summary::default();
    let mut ran = 0;
    let mut failures = Vec::new();
    for seed in first..first + count {
        if began.elapsed() > limit {
            break;
        }
        ran += 1;
        match run(seed, &Setup::of_seed(seed)) {
            Ok(summary) => total.add(&summary),
            Err(failure) => {
                println!("{failure}");
                failures.push(failure);
            }
        }
        if failures.len() >= 20 {
            break;
        }
    }
    println!("{ran} worlds in {:?}: {total:?}", began.elapsed());
    assert!(
        failures.is_empty(),
        "{} of {ran} worlds broke a rule",
        failures.len()
    );
    // A storm that never touches anything proves nothing.
    assert!(ran < 20 || (total.done > ran && total.crashes > ran && total.settled > ran));
}

#[test]
fn equal_seeds_give_equal_worlds() {
    for seed in [3, 11] {
        let setup = Setup::of_seed(seed);
        assert_eq!(run(seed, &setup), run(seed, &setup), "seed {seed}");
    }
}

/// Each promise is broken in a shell around the unchanged minds; a checker that sleeps through one is broken too.
#[test]
fn every_broken_promise_is_noticed() {
    use Sabotage::*;
    for (sabotage, words) in [
        (ForgetFences, &["lives again", "after fence"][..]),
        (Overbook, &["promised", "and runs"]),
        (Crowd, &["thousandths of one"]),
        (AskTwice, &["another node was asked", "granted by node"]),
        (GrantUnstored, &["granted before it was stored"]),
        (AcceptUnstored, &["acknowledged but is not on disk"]),
        (BillTwice, &["settled before", "after fence"]),
        (Overcharge, &["the posting moves", "the receipt asks", "says"]),
        (Mint, &["makes or loses money"]),
        (IgnoreOwner, &["its owner waits since"]),
        (DeafToOwner, &["its owner waits since", "though its owner wants"]),
        (FalseCountry, &["none of its countries", "is excluded"]),
        (Dearer, &["it costs"]),
        (DropSettled, &["still holds"]),
        (DropFinished, &["for minutes", "still open"]),
        (LoseResults, &["never reached the scheduler"]),
        (SplitGang, &["open parts were asked for"]),
        (MoveAll, &["were moved within an hour"]),
    ] {
        let mut rules = Vec::new();
        let noticed = (0..150).any(|seed| {
            let setup = Setup {
                sabotage: Some(sabotage),
                liars_per_mille: 0,
                ..Setup::small()
            };
            let Err(failure) = run(seed, &setup) else {
                return false;
            };
            rules.push(failure.rule);
            rules
                .iter()
                .any(|rule| words.iter().any(|word| rule.contains(word)))
        });
        assert!(noticed, "{sabotage:?} went unnoticed: {rules:?}");
    }
}

/// Old asks that come again, and asks that seem to come from another scheduler.
#[test]
fn what_strays_does_no_harm() {
    for sabotage in [Sabotage::ReplayAsks, Sabotage::CrossTalk] {
        for seed in 0..6 {
            let setup = Setup {
                sabotage: Some(sabotage),
                ..Setup::of_seed(seed * 25 + 7)
            };
            if let Err(failure) = run(seed, &setup) {
                panic!("{sabotage:?}: {failure}");
            }
        }
    }
}
