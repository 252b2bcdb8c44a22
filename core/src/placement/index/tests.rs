//! The index beside plain looks at every place.
use super::*;
use proptest::prelude::*;

#[test]
fn a_request_is_never_above_a_place_that_holds_it() {
    for need in (0..9_000).step_by(7) {
        for free in (need..9_000).step_by(13) {
            assert!(Level::of_milli(need) <= Level::of_milli(free), "{need} of {free}");
        }
    }
    assert_eq!(Level::of_devices(0), Level::NONE);
    assert!(Level::of_milli(999) < Level::of_devices(1));
}

/// What the index stands for, written down plainly.
#[derive(Debug, Clone)]
struct Plain {
    slot: SlotId,
    class: usize,
    key: u32,
    milli: u32,
}

fn check(index: &Index, plain: &[Plain], costs: &[f32], milli: u32, barred: u32) {
    let view = Costs::exact(costs.to_vec());
    let judge = |p: &Plain| {
        (p.milli >= milli && p.slot.0 % 7 != barred && costs[p.class] < f32::INFINITY)
            .then(|| u64::from(p.key) + costs[p.class] as u64)
    };
    let mut expected: Vec<u64> = plain.iter().filter_map(judge).collect();
    expected.sort_unstable();
    for many in [1, 3] {
        let mut found = Vec::new();
        index.cheapest(
            &view,
            Level::of_milli(milli),
            many,
            milli,
            |slot| plain.iter().find(|p| p.slot == slot).and_then(judge),
            &mut found,
        );
        let got: Vec<u64> = found.iter().map(|f| f.score).collect();
        assert_eq!(got, expected[..expected.len().min(many)], "{many} of {milli}");
        for f in found {
            let place = plain.iter().find(|p| p.slot == f.slot).unwrap();
            assert_eq!(judge(place), Some(f.score));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if std::env::var_os("KAREZ_LONG").is_some() { 5_000 } else { 200 }))]

    /// Whatever comes, goes and changes, the index answers as a look at every place would.
    #[test]
    fn the_cheapest_is_that_of_a_full_scan(
        steps in proptest::collection::vec((0..6u8, any::<u32>(), 0..40u32, 0..9_000u32), 1..400),
        classes in 1..40usize,
    ) {
        let mut index = Index::default();
        for _ in 0..classes {
            index.add_class();
        }
        let mut plain: Vec<Plain> = Vec::new();
        for (step, (what, chance, key, milli)) in steps.into_iter().enumerate() {
            let at = chance as usize % plain.len().max(1);
            match what {
                0..=2 => {
                    let class = chance as usize % classes;
                    let slot = index.insert(ClassId(class as u32), key as f32, Level::of_milli(milli));
                    plain.push(Plain { slot, class, key, milli });
                }
                3 if !plain.is_empty() => index.remove(plain.swap_remove(at).slot),
                4 if !plain.is_empty() => {
                    plain[at].milli = milli;
                    index.set_level(plain[at].slot, Level::of_milli(milli));
                }
                _ => {
                    let costs: Vec<f32> = (0..classes)
                        .map(|c| match (chance as usize + c * 31) % 5 {
                            0 => f32::INFINITY,
                            n => (n * 3) as f32,
                        })
                        .collect();
                    check(&index, &plain, &costs, milli.max(1), step as u32 % 9);
                }
            }
        }
        check(&index, &plain, &vec![0.0; classes], 1, 8);
        let open = plain.iter().filter(|p| p.milli > 0).count();
        let counted: u32 = (0..classes).map(|c| index.count(ClassId(c as u32)).1).sum();
        prop_assert_eq!(open, counted as usize);
    }
}

#[test]
fn a_large_class_keeps_its_order_through_many_changes() {
    let mut index = Index::default();
    let class = index.add_class();
    let mut plain = Vec::new();
    let mut chance = 1u64;
    for i in 0..5_000u32 {
        chance = chance
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let key = (chance >> 33) as u32 % 1_000;
        let milli = i % 3 * 1_000;
        let slot = index.insert(class, key as f32, Level::of_milli(milli));
        plain.push(Plain {
            slot,
            class: 0,
            key,
            milli,
        });
    }
    check(&index, &plain, &[5.0], 2_000, 3);
    while plain.len() > 10 {
        chance = chance
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let at = (chance >> 33) as usize % plain.len();
        index.remove(plain.swap_remove(at).slot);
    }
    check(&index, &plain, &[5.0], 1_000, 3);
    assert!(index.bytes() / 5_000 < 100);
}

#[test]
fn equals_are_not_herded() {
    let mut index = Index::default();
    for _ in 0..4 {
        let class = index.add_class();
        for _ in 0..4 {
            index.insert(class, 7.0, Level::of_devices(1));
        }
    }
    let costs = Costs::exact(vec![0.0; 4]);
    let chosen: BTreeSet<SlotId> = (0..1_000u32)
        .map(|turn| {
            let mut out = Vec::new();
            index.cheapest(
                &costs,
                Level::of_devices(1),
                1,
                turn.wrapping_mul(2_654_435_761),
                |_| Some(7),
                &mut out,
            );
            out[0].slot
        })
        .collect();
    assert_eq!(chosen.len(), 16);
}
