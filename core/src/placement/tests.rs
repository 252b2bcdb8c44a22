use super::*;
use crate::market::tests::{NOW, market_of, node_of, offer_of, secret_of};
use crate::records::{DataClass, Tier};

/// What the words of a request set: `gpu<=9,in:KE,not:BR,of:uni-nairobi,mem:8,budget:10,donated,avoid:a`.
struct Wish {
    constraints: Constraints,
    ceiling: Credits,
    avoid: Vec<NodeId>,
}

fn wish_of(text: &str) -> Wish {
    let mut words = text.split(',');
    let device = words.next().unwrap();
    let mut wish = Wish {
        constraints: Constraints::default(),
        ceiling: Credits(u64::MAX),
        avoid: Vec::new(),
    };
    let c = &mut wish.constraints;
    match device.split_once("<=") {
        Some((class, rate)) => {
            c.device = class.into();
            c.rate_max = Some(Rate(rate.parse::<u64>().unwrap() * 1_000_000));
        }
        None => c.device = device.into(),
    }
    for word in words {
        match word.split_once(':') {
            None => c.donated_only = word == "donated",
            Some(("in", code)) => c.countries.push(code.parse().unwrap()),
            Some(("not", code)) => c.countries_excluded.push(code.parse().unwrap()),
            Some(("of", name)) => c.institutions.push(name.parse().unwrap()),
            Some(("mem", gib)) => c.memory = Bytes(gib.parse::<u64>().unwrap() << 30),
            Some(("budget", credits)) => wish.ceiling = credits.parse().unwrap(),
            Some(("avoid", name)) => wish.avoid.push(node_of(name)),
            Some(other) => panic!("{other:?}"),
        }
    }
    wish
}

fn request_of(wish: &Wish) -> Request<'_> {
    Request {
        // An hour on a device of usual speed.
        units: 3_600,
        constraints: &wish.constraints,
        ceiling: wish.ceiling,
        avoid: &wish.avoid,
        ..Request::default()
    }
}

fn describe(got: &Result<Plan, Refusal>) -> String {
    match got {
        Ok(plan) => {
            let others: Vec<&str> = plan.alternatives.iter().map(|c| c.name.as_str()).collect();
            format!(
                "{} of {}, then {}",
                plan.chosen.name,
                plan.feasible,
                others.join(" ")
            )
            .trim_end_matches(", then ")
            .into()
        }
        Err(refusal) => format!("refused: {refusal}"),
    }
}

#[test]
fn cheapest_fit_wins_and_a_refusal_says_what_would_fit() {
    for (name, market, wish, expected) in [
        ("one fits", "a:1gpu@5", "gpu<=9", "a of 1"),
        ("cheaper wins", "a:1gpu@5 b:1gpu@3", "gpu<=9", "b of 2, then a"),
        ("donated wins", "a:1gpu@1 b:1gpu@0", "gpu", "b of 2, then a"),
        (
            "cheap but slow loses",
            "a:1gpu@4 b:1gpu@8,fast",
            "gpu",
            "b of 2, then a",
        ),
        ("busy is left out", "a:1gpu@1,busy b:1gpu@3", "gpu", "b of 1"),
        (
            "too dear",
            "a:1gpu@5 b:1gpu@7",
            "gpu<=4",
            "refused: none of 2 known nodes can run it: 2 excluded by price (the cheapest asks 5.000000 credits/h)",
        ),
        (
            "not donated",
            "a:1gpu@5",
            "gpu,donated",
            "refused: none of 1 known nodes can run it: 1 excluded by price (the cheapest asks 5.000000 credits/h)",
        ),
        (
            "another country",
            "a:1gpu@5,BR b:1gpu@5,VN c:1gpu@9,KE",
            "gpu,in:KE",
            "c of 1",
        ),
        (
            "no such country",
            "a:1gpu@5,BR b:1gpu@5,VN",
            "gpu,in:KE",
            "refused: none of 2 known nodes can run it: 2 excluded by country (nodes are in BR, VN)",
        ),
        (
            "excluded country",
            "a:1gpu@5,BR",
            "gpu,not:BR",
            "refused: none of 1 known nodes can run it: 1 excluded by country (nodes are in BR)",
        ),
        (
            "another institution",
            "a:1gpu@5,usp-brazil",
            "gpu,of:uni-nairobi",
            "refused: none of 1 known nodes can run it: 1 excluded by institution (nodes belong to usp-brazil)",
        ),
        (
            "another device",
            "a:1gpu@5",
            "tpu",
            "refused: none of 1 known nodes can run it: 1 excluded by device (nodes have gpu)",
        ),
        (
            "no engine",
            "a:1gpu@5,dumb",
            "gpu",
            "refused: none of 1 known nodes can run it: 1 excluded by engine",
        ),
        (
            "too little memory",
            "a:1gpu@5,4G b:1gpu@5,6G",
            "gpu,mem:8",
            "refused: none of 2 known nodes can run it: 2 excluded by memory (the nearest lacks 2048 MiB of device memory)",
        ),
        (
            "too small a budget",
            "a:1gpu@5 b:1gpu@6",
            "gpu,budget:4.5",
            "refused: none of 2 known nodes can run it: 2 excluded by budget (the cheapest would cost 5.000000 credits for this part: raise --max-cost)",
        ),
        (
            "each for its own reason",
            "a:1gpu@5,paused b:1gpu@5,gone c:1gpu@5 d:1gpu@5,busy",
            "gpu,avoid:c",
            "refused: none of 4 known nodes can run it: 1 excluded by open; 1 excluded by connected; 1 excluded by untried; 1 excluded by free device",
        ),
        (
            "nobody there",
            "",
            "gpu",
            "refused: no node is known to this scheduler yet: wait for one to join, or invite one",
        ),
    ] {
        let wish = wish_of(wish);
        let got = place(&market_of(market), &request_of(&wish), &Policy::default());
        assert_eq!(describe(&got), expected, "{name}");
    }
}

#[test]
fn between_equals_the_most_free_wins_then_they_take_turns() {
    let mut market = market_of("a:2gpu@5 b:2gpu@5");
    let wish = wish_of("gpu");
    let place = |m: &Market, turn| {
        let request = Request {
            turn,
            ..request_of(&wish)
        };
        place(m, &request, &Policy::default()).unwrap().chosen.name
    };
    let names: BTreeSet<String> = (0..8).map(|turn| place(&market, turn)).collect();
    assert_eq!(names.len(), 2, "equals are not herded");
    for (busy, free) in [("a", "b"), ("b", "a")] {
        market.take(&node_of(busy), "gpu", Portion::ONE);
        for turn in 0..8 {
            assert_eq!(place(&market, turn), free);
        }
        market.give_back(&node_of(busy), "gpu", Portion::ONE);
    }
}

#[test]
fn failures_raise_the_price_and_success_forgives() {
    let mut market = market_of("a:1gpu@4 b:1gpu@5");
    let wish = wish_of("gpu");
    let place = |m: &Market| {
        place(m, &request_of(&wish), &Policy::default())
            .unwrap()
            .chosen
            .name
    };
    assert_eq!(place(&market), "a");
    market.note_failure(&node_of("a"));
    market.note_failure(&node_of("a"));
    assert_eq!(place(&market), "b");
    market.note_success(&node_of("a"), WorkKind::Noop, None);
    assert_eq!(place(&market), "a");
}

/// An hour of work at four credits an hour, and what each term of its cost adds to that, in millionths.
#[test]
fn each_term_of_the_cost_of_finished_work_counts() {
    const HOUR: u64 = 3_600_000;
    let artifact = artifact(1);
    let grid = Grid {
        price: Credits(200_000),
        grams: 500,
    };
    let powered = |carbon_price| {
        let mut policy = Policy::default();
        policy.energy.watts.insert("gpu".into(), 1_000);
        policy.energy.grids.insert("KE".parse().unwrap(), grid);
        policy.energy.carbon_price = Credits(carbon_price);
        policy
    };
    type Change = fn(&mut Market);
    type Ask = for<'a> fn(&mut Request<'a>);
    let nothing: Change = |_| {};
    let plain: Ask = |_| {};
    let fetching = |request: &mut Request<'_>| {
        // An hour at the assumed speed.
        request.artifacts = vec![(artifact, Bytes(12_500_000 * 3_600))];
    };
    let owner: Change = |market| {
        // Ten reclaims in a hundred hours, beside the hundred without any that are assumed: fifty in a thousand.
        for _ in 0..10 {
            let time = crate::unit::DeviceMillis(10 * HOUR);
            market.note_watched(&node_of("a"), time, true);
        }
    };
    let failed: Change = |market| {
        market.note_failure(&node_of("a"));
        market.note_failure(&node_of("a"));
    };
    let wanted: Change = |market| market.set_shadows([(0, Rate(1_500_000))]);
    let price = 4_000_000.0;
    // A hundredth of a credit for each hour of waiting.
    let base = price + 10_000.0;
    let risk = 50.0 / 1_000.0 * (300.0 + 30.0) / 3_600.0;
    for (name, offer, policy, change, ask, expected) in [
        (
            "price and time",
            "a:1gpu@4",
            Policy::default(),
            nothing,
            plain,
            base,
        ),
        (
            "reclaims",
            "a:1gpu@4",
            Policy::default(),
            owner,
            plain,
            base * (1.0 + risk),
        ),
        (
            "failures",
            "a:1gpu@4",
            Policy::default(),
            failed,
            plain,
            base * 1.5,
        ),
        (
            "a better use",
            "a:1gpu@4",
            Policy::default(),
            wanted,
            plain,
            base + 1_500_000.0,
        ),
        (
            "electricity is in the price",
            "a:1gpu@4",
            powered(0),
            nothing,
            plain,
            base,
        ),
        (
            "electricity where there is none",
            "a:1gpu@0",
            powered(0),
            nothing,
            plain,
            210_000.0,
        ),
        (
            "carbon",
            "a:1gpu@4",
            powered(100_000),
            nothing,
            plain,
            base + 50_000.0,
        ),
        (
            "carbon and electricity",
            "a:1gpu@0",
            powered(100_000),
            nothing,
            plain,
            260_000.0,
        ),
        (
            "two devices, twice as fast",
            "a:2gpu@4",
            Policy::default(),
            nothing,
            |request| request.devices = Portion::devices(2),
            base,
        ),
        (
            "a quarter of one, four times as slow",
            "a:1gpu@4,share=100",
            Policy::default(),
            nothing,
            |request| request.devices = Portion::share(250).unwrap(),
            base,
        ),
        (
            "somebody waits",
            "a:1gpu@4",
            Policy::default(),
            nothing,
            |request| request.waited_for = true,
            base + 100_000.0,
        ),
    ] {
        let mut market = Market::new(policy.clone());
        market.hear(NOW, node_of("a").0, offer_of(offer, 1)).unwrap();
        market.set_connected(node_of("a"), true);
        change(&mut market);
        let wish = wish_of("gpu");
        let mut request = request_of(&wish);
        ask(&mut request);
        let score = |request: &Request<'_>| {
            let plan = place(&market, request, &policy).unwrap();
            assert_eq!(
                Ok(plan.chosen.score),
                scan(&market, request, &policy).map(|p| p.chosen.score)
            );
            plan.chosen.score.0 as f64
        };
        let got = score(&request);
        assert!(
            (got - expected).abs() <= 3.0,
            "{name}: {got}, expected {expected}"
        );
        // What is missing costs its time besides, raised by the same dangers.
        fetching(&mut request);
        let patience = if request.waited_for { 110_000.0 } else { 10_000.0 };
        let dangers = match name {
            "reclaims" => 1.0 + risk,
            "failures" => 1.5,
            _ => 1.0,
        };
        let got = score(&request) - got;
        assert!(
            (got - patience * dangers).abs() <= 3.0,
            "{name}: {got} for fetching"
        );
    }
}

#[test]
fn power_that_is_too_dirty_is_a_mask() {
    let mut policy = Policy::default();
    policy.energy.carbon_max = Some(300);
    for (code, grams) in [("KE", 90), ("VN", 600)] {
        let grid = Grid {
            price: Credits::ZERO,
            grams,
        };
        policy.energy.grids.insert(code.parse().unwrap(), grid);
    }
    let mut market = Market::new(policy.clone());
    for offer in ["a:1gpu@1,VN", "b:1gpu@9,KE"] {
        let offer = offer_of(offer, 1);
        let node = offer.node;
        market.hear(NOW, node.0, offer).unwrap();
        market.set_connected(node, true);
    }
    let wish = wish_of("gpu");
    assert_eq!(describe(&place(&market, &request_of(&wish), &policy)), "b of 1");
    let wish = wish_of("gpu,in:VN");
    let got = describe(&place(&market, &request_of(&wish), &policy));
    assert!(got.contains("1 excluded by carbon (nodes are in VN)"), "{got}");
}

/// What classes tell of a market's room for some work is what its nodes tell one by one.
#[test]
fn capacity_by_class_is_that_of_all_nodes() {
    for seed in 0..40 {
        let mut chance = Chance(seed);
        let mut market = Market::default();
        for n in 0..30 {
            let offer = random_offer(&mut chance, n, 1);
            let node = offer.node;
            market.hear(NOW, node.0, offer).unwrap();
            market.set_connected(node, true);
        }
        for n in 0..10 {
            let offer = random_offer(&mut chance, n, 2);
            market.hear(NOW, offer.node.0, offer).unwrap();
        }
        let request = Request {
            units: 1_000_000,
            devices: portion(&mut chance),
            ..Request::default()
        };
        let policy = market.policy().clone();
        let (able, _) = survey_classes(&market, &request, &policy);
        let open = |c: &&Candidate| {
            let listing = market.get(&c.node).unwrap();
            let at = listing
                .offer
                .devices
                .iter()
                .position(|d| d.class == c.device_class);
            u64::from(listing.seats_at_most(at.unwrap(), request.devices))
        };
        let least: u64 = able.iter().map(|c| open(&c)).sum();
        let told = market.stock().capacity(&request, &policy);
        let seats: u64 = told.iter().map(|(_, _, seats)| seats).sum();
        let places: u32 = told.iter().map(|(_, places, _)| places).sum();
        // Paused nodes are counted too: this is what there is, not what is free. Of devices that are too few on each
        // node, classes do not know.
        assert!(
            seats >= least && places as usize >= able.len(),
            "seed {seed}: {seats} {least}"
        );
        for c in &able {
            let near = |takes: u64| takes.abs_diff(c.duration.0) <= takes / 4 + 1;
            assert!(told.iter().any(|(takes, ..)| near(takes.0)), "seed {seed}");
        }
    }
}

#[test]
fn what_only_time_changes_is_told_apart() {
    for (market, wish, expected) in [
        ("a:1gpu@5,busy", "gpu", true),
        ("a:1gpu@5,paused", "gpu", true),
        ("a:1gpu@5,gone", "gpu", true),
        ("a:1gpu@5", "gpu,avoid:a", true),
        ("a:1gpu@5", "tpu", false),
        ("a:1gpu@5", "gpu<=4", false),
        ("", "gpu", false),
    ] {
        let wish = wish_of(wish);
        let refusal = place(&market_of(market), &request_of(&wish), &Policy::default()).unwrap_err();
        assert_eq!(refusal.passes_with_time(), expected, "{market}");
    }
}

#[test]
fn work_that_takes_no_time_is_not_free_on_a_priced_device() {
    let wish = wish_of("gpu,budget:0");
    let request = Request {
        units: 0,
        ..request_of(&wish)
    };
    let got = place(&market_of("a:1gpu@5"), &request, &Policy::default());
    assert!(got.unwrap_err().excluded_by(Requirement::Budget));
    assert!(place(&market_of("a:1gpu@0"), &request, &Policy::default()).is_ok());
}

/// SplitMix64.
struct Chance(u64);

impl Chance {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end.max(1)
    }
    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}

const COUNTRIES: [&str; 4] = ["KE", "BR", "VN", "DE"];
const SCHOOLS: [&str; 3] = ["uni-nairobi", "usp-brazil", "hanoi"];
const DEVICES: [&str; 3] = ["cpu/x86-64-v3", "cuda/a", "cuda/b"];

fn artifact(n: u64) -> crate::id::Digest {
    crate::id::Digest::of(&n.to_le_bytes())
}

fn random_offer(
    chance: &mut Chance,
    n: u64,
    sequence: u64,
) -> crate::records::Verified<crate::records::Offer> {
    use crate::records::{Device, Engine, Signed};
    let name = n.to_string();
    let mut offer = offer_of(&format!("{name}:1gpu@1"), sequence).into_inner();
    offer.country = chance.pick(&COUNTRIES).parse().unwrap();
    offer.institution = chance.pick(&SCHOOLS).parse().unwrap();
    offer.devices = (0..=chance.below(2))
        .map(|i| {
            let count = chance.pick(&[0, 1, 1, 2, 4, 8]);
            let share_min = chance.pick(&[0, 1, 1, 250, 500]);
            let mut shared: Vec<u32> = Vec::new();
            for _ in 0..count {
                if share_min > 0 && chance.below(3) == 0 {
                    shared.push(chance.below(1_000) as u32);
                }
            }
            let left = count - shared.len() as u32;
            Device {
                class: DEVICES[(i + chance.below(1 + i)) as usize].into(),
                count,
                share_min,
                shared,
                free: left - chance.below(u64::from(left) + 1) as u32,
                memory: Bytes(chance.pick(&[8, 16, 80]) << 30),
                rate: Rate(chance.pick(&[0, 0, 1_000_000, 1_500_000, 2_000_000]) * (1 + chance.below(2))),
            }
        })
        .collect();
    offer.engines = Vec::new();
    for work in [WorkKind::Noop, WorkKind::Embed, WorkKind::Generate] {
        if chance.below(5) > 0 {
            offer.engines.push(Engine {
                name: "any".into(),
                version: "1".into(),
                work,
                speed: crate::unit::Speed(chance.pick(&[0, 1, 900, 1_000, 1_100, 50_000, 1_000_000_000_000])),
                method: "probe/1".into(),
            });
        }
    }
    offer.isolation = chance
        .pick(&["none", "seccomp", "landlock+seccomp", "container", "?"])
        .into();
    offer.terms.data = chance.pick(&[DataClass::Internal, DataClass::Public, DataClass::Sensitive]);
    offer.terms.local_first = chance.below(3) == 0;
    if chance.below(5) == 0 {
        offer.terms.licences = vec!["MIT".into()];
    }
    if chance.below(8) == 0 {
        offer.terms.institutions_excluded = vec![SCHOOLS[0].parse().unwrap()];
    }
    if chance.below(8) == 0 {
        offer.terms.work = vec![WorkKind::Noop, WorkKind::Embed];
    }
    offer.cached = (0..4).filter(|_| chance.below(6) == 0).map(artifact).collect();
    offer.state = chance.pick(&[
        NodeState::Open,
        NodeState::Open,
        NodeState::Open,
        NodeState::Paused,
    ]);
    Signed::sign(offer, &secret_of(&name))
}

fn portion(chance: &mut Chance) -> Portion {
    match chance.below(5) {
        0 => Portion::share(chance.pick(&[50, 125, 250, 333, 500, 900])).unwrap(),
        _ => Portion::devices(chance.pick(&[1, 1, 1, 1, 2, 3])),
    }
}

/// Random markets through their changes: the index answers every request as a look at every node does.
#[test]
fn placing_through_the_index_is_placing_by_a_full_scan() {
    let worlds = if std::env::var_os("KAREZ_LONG").is_some() {
        5_000
    } else {
        60
    };
    let (mut placed, mut refused) = (0, 0);
    for seed in 0..worlds {
        let mut chance = Chance(seed);
        let mut policy = Policy::default();
        if seed % 3 == 0 {
            policy.energy.watts.insert("cuda".into(), 400);
            policy.energy.carbon_price = Credits(50_000);
            policy.energy.carbon_max = (seed % 2 == 0).then_some(600);
            for country in COUNTRIES {
                let grid = Grid {
                    price: Credits(chance.below(300_000)),
                    grams: chance.below(900) as u32,
                };
                policy.energy.grids.insert(country.parse().unwrap(), grid);
            }
        }
        let mut market = Market::new(policy.clone());
        let mut sequence = 0;
        for _ in 0..200 {
            let n = chance.below(25);
            let node = node_of(&n.to_string());
            let class = chance.pick(&DEVICES);
            match chance.below(16) {
                0..=2 => {
                    sequence += 1;
                    let offer = random_offer(&mut chance, n, sequence);
                    market.hear(NOW, node.0, offer).unwrap();
                    market.set_connected(node, true);
                }
                3 => market.set_connected(node, chance.below(3) > 0),
                4 => market.take(&node, class, portion(&mut chance)),
                5 => market.give_back(&node, class, portion(&mut chance)),
                6 => market.mark_full(&node, class, portion(&mut chance)),
                7 => market.note_failure(&node),
                8 => {
                    let shown = crate::market::Shown {
                        units: chance.below(1 << 20),
                        time: crate::unit::DeviceMillis(chance.below(1 << 24)),
                    };
                    market.note_success(&node, WorkKind::Embed, Some(shown));
                }
                9 => {
                    let time = crate::unit::DeviceMillis(chance.below(1 << 30));
                    market.note_watched(&node, time, chance.below(3) == 0);
                }
                10 => {
                    let prices: Vec<(u32, Rate)> = (0..9)
                        .map(|g| (g, Rate(chance.below(3) * chance.below(2_000_000))))
                        .collect();
                    market.set_shadows(prices);
                }
                _ => {
                    let mut constraints = Constraints::default();
                    if chance.below(3) == 0 {
                        constraints.countries = vec![chance.pick(&COUNTRIES).parse().unwrap()];
                    }
                    if chance.below(4) == 0 {
                        constraints.institutions_excluded = vec![chance.pick(&SCHOOLS).parse().unwrap()];
                    }
                    constraints.device = chance.pick(&["", "", "cuda", "cuda/a", "tpu"]).into();
                    constraints.memory = Bytes(chance.pick(&[0, 0, 16, 40]) << 30);
                    constraints.donated_only = chance.below(6) == 0;
                    constraints.isolation =
                        chance.pick(&[Tier::None, Tier::None, Tier::None, Tier::Seccomp, Tier::Container]);
                    constraints.data =
                        chance.pick(&[DataClass::Public, DataClass::Public, DataClass::Personal]);
                    constraints.licence = chance.pick(&["", "mit", "other"]).into();
                    let user = SCHOOLS[0].parse().unwrap();
                    constraints.rate_max = (chance.below(4) == 0).then(|| Rate(chance.below(4) * 1_000_000));
                    let request = Request {
                        kind: chance.pick(&[WorkKind::Noop, WorkKind::Embed, WorkKind::Generate]),
                        units: chance.pick(&[0, 1, 1_000, 1_000_000, u64::MAX]),
                        fixed: Millis(chance.pick(&[0, 0, 1_000, 3_600_000])),
                        model: chance
                            .pick(&[None, None, None, None, None, None, Some("m"), Some("other")])
                            .map(crate::artifact::ArtifactRef::served),
                        artifacts: (0..chance.below(3))
                            .map(|n| (artifact(n), Bytes(n << 32)))
                            .collect(),
                        constraints: &constraints,
                        memory: Bytes(chance.pick(&[0, 10]) << 30),
                        ceiling: Credits(chance.pick(&[u64::MAX, u64::MAX, 1_000_000, 0])),
                        avoid: &[node],
                        devices: portion(&mut chance),
                        turn: chance.below(1 << 32) as u32,
                        user: (chance.below(2) == 0).then_some(&user),
                        within: (chance.below(3) == 0).then(|| Millis(chance.below(1 << 24))),
                        reliable: chance.below(4) == 0,
                        waited_for: chance.below(3) == 0,
                    };
                    let (fast, slow) = (
                        place(&market, &request, &policy),
                        scan(&market, &request, &policy),
                    );
                    match (&fast, &slow) {
                        (Ok(fast), Ok(slow)) => {
                            placed += 1;
                            assert_eq!(
                                fast.chosen.score, slow.chosen.score,
                                "seed {seed}: {fast:?} {slow:?}"
                            );
                            let listing = market.get(&fast.chosen.node).unwrap();
                            let i = listing
                                .offer
                                .devices
                                .iter()
                                .position(|d| d.class == fast.chosen.device_class);
                            assert!(listing.has(i.unwrap(), request.devices), "seed {seed}");
                            assert!(fast.feasible >= slow.feasible, "seed {seed}");
                        }
                        (Err(fast), Err(slow)) => {
                            refused += 1;
                            assert_eq!(fast, slow, "seed {seed}");
                        }
                        _ => panic!("seed {seed}: {fast:?} but {slow:?}"),
                    }
                }
            }
        }
    }
    assert!(
        placed > worlds * 4 && refused > worlds,
        "{placed} placed, {refused} refused"
    );
}
