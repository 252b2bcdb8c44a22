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
