//! Who takes part: machines with their owners, and researchers; listed by a scenario or drawn at random.
use crate::{
    check::{TrueDevice, TrueNode},
    geo::place,
    liar::Lie,
    node::NodeProcess,
    rng::Rng,
    setup::{Habit, Machine, Member, Sabotage, Setup},
};
use karez_core::{
    agent::{AgentConfig, OwnerPolicy},
    id::{Country, Institution, JobId},
    key::{NodeId, PublicKey, SecretKey},
    records::{DataClass, Device, Engine, Tier, WorkKind},
    unit::{Bytes, Credits, Rate, Speed},
};
use std::collections::BTreeSet;

pub(crate) const COUNTRIES: [&str; 6] = ["KE", "BR", "VN", "NP", "GH", "FR"];
pub(crate) const INSTITUTIONS: [&str; 6] = [
    "uni-nairobi",
    "usp-brazil",
    "hanoi-tech",
    "tu-kathmandu",
    "knust-ghana",
    "lyon-dc",
];
const CLASSES: [(&str, u64); 4] = [
    ("cpu/x86-64-v3", 16 << 30),
    ("cpu/aarch64", 8 << 30),
    ("cuda/NVIDIA T4", 16 << 30),
    ("cuda/NVIDIA H200", 141 << 30),
];

/// A researcher.
pub(crate) struct User {
    pub(crate) secret: SecretKey,
    pub(crate) institution: Institution,
    pub(crate) country: Country,
    pub(crate) budget: Credits,
    /// Minutes ahead of UTC.
    pub(crate) utc_minutes: i32,
    /// Schedulers to turn to, in this order.
    pub(crate) schedulers: Vec<usize>,
    /// Orders handed in whose answer is missing.
    pub(crate) waiting: BTreeSet<JobId>,
    /// Jobs being called off whose answer is missing.
    pub(crate) cancelling: BTreeSet<JobId>,
}

/// What a machine's owner does, and who may ask for it.
#[derive(Debug, Clone)]
pub(crate) struct Owner {
    pub(crate) habit: Option<Habit>,
    /// Minutes ahead of UTC.
    pub(crate) utc_minutes: i32,
    /// This owner's own lateness, in milliseconds.
    pub(crate) late_ms: u64,
    /// Index into the members; none for a machine drawn at random.
    pub(crate) member: Option<usize>,
    pub(crate) schedulers: Vec<usize>,
}

pub(crate) fn parse<T: std::str::FromStr>(text: &str) -> T
where
    T::Err: std::fmt::Debug,
{
    match text.parse() {
        Ok(value) => value,
        Err(error) => panic!("{text:?} is a constant of the simulation: {error:?}"),
    }
}

pub(crate) fn build_users(rng: &mut Rng, setup: &Setup) -> Vec<User> {
    let all: Vec<usize> = (0..setup.schedulers.len()).collect();
    let mut out: Vec<User> = (0..setup.users)
        .map(|_| {
            let at = rng.below(INSTITUTIONS.len() as u64) as usize;
            let mut schedulers = all.clone();
            schedulers.rotate_left(rng.below(all.len() as u64) as usize);
            User {
                secret: SecretKey::from_bytes(&rng.bytes()),
                institution: parse(INSTITUTIONS[at]),
                country: parse(COUNTRIES[at]),
                budget: Credits(rng.between(0, 30) * Credits::ONE.0),
                utc_minutes: 0,
                schedulers,
                waiting: BTreeSet::new(),
                cancelling: BTreeSet::new(),
            }
        })
        .collect();
    for member in &setup.members {
        out.extend((0..member.users).map(|_| User {
            secret: SecretKey::from_bytes(&rng.bytes()),
            institution: member.institution.clone(),
            country: member.country,
            budget: member.budget,
            utc_minutes: offset(&member.country),
            schedulers: member.schedulers.clone(),
            waiting: BTreeSet::new(),
            cancelling: BTreeSet::new(),
        }));
    }
    out
}

fn offset(country: &Country) -> i32 {
    place(&country.to_string()).map_or(0, |p| p.utc_minutes)
}

/// Machines of several countries, owners and prices, and what is true of them.
pub(crate) fn build_nodes(rng: &mut Rng, setup: &Setup) -> (Vec<NodeProcess>, Vec<TrueNode>) {
    let mut out: (Vec<NodeProcess>, Vec<TrueNode>) =
        (0..setup.nodes).map(|n| draw_node(rng, setup, n)).unzip();
    for (m, member) in setup.members.iter().enumerate() {
        for (machine, count) in &member.machines {
            for _ in 0..*count {
                let n = out.0.len();
                let (process, truth) = listed_node(rng, setup, n, m, member, machine);
                out.0.push(process);
                out.1.push(truth);
            }
        }
    }
    out
}

fn listed_node(
    rng: &mut Rng,
    setup: &Setup,
    n: usize,
    m: usize,
    member: &Member,
    machine: &Machine,
) -> (NodeProcess, TrueNode) {
    let secret = SecretKey::from_bytes(&rng.bytes());
    let spread = member.rate_spread_percent.min(100);
    let percent = 100 + rng.below(2 * spread + 1) - spread;
    let devices = vec![TrueDevice {
        class: machine.class.as_str().into(),
        count: machine.devices,
        memory: machine.memory,
        rate: Rate(member.rate.0 * percent / 100),
        share_min: 0,
    }];
    let mut speeds = vec![(WorkKind::Noop, 1_000_000)];
    for (kind, speed) in [
        (WorkKind::Generate, machine.generate_milli),
        (WorkKind::Embed, machine.embed_milli),
    ] {
        if speed > 0 {
            speeds.push((kind, speed));
        }
    }
    let lie = rng.chance(setup.liars_per_mille).then(|| Lie::draw(rng));
    let truth = TrueNode {
        id: NodeId(PublicKey::of(&secret)),
        institution: member.institution.clone(),
        country: member.country,
        devices,
        speeds,
        refuses: Vec::new(),
        isolation: Tier::LandlockSeccomp,
        data: DataClass::Internal,
        licences: Vec::new(),
        honest: lie.is_none(),
    };
    let owner = Owner {
        habit: member.habit,
        utc_minutes: offset(&member.country),
        late_ms: rng.below(1 + member.habit.map_or(0, |h| h.jitter_minutes) * crate::setup::MINUTE),
        member: Some(m),
        schedulers: member.schedulers.clone(),
    };
    let config = configure(rng, setup, n, secret, &truth);
    let mut process = NodeProcess::new(config, owner, lie);
    let most = setup.skew_ms_max;
    process.skew_ms = rng.below(2 * most + 1) as i64 - most as i64;
    process.last_mile = rng.between(1, 15);
    if rng.chance(setup.slow_per_mille) {
        process.slow = rng.between(2, 6);
    }
    (process, truth)
}

fn draw_node(rng: &mut Rng, setup: &Setup, n: usize) -> (NodeProcess, TrueNode) {
    let secret = SecretKey::from_bytes(&rng.bytes());
    let at = rng.below(COUNTRIES.len() as u64) as usize;
    let country = parse::<Country>(COUNTRIES[at]);
    // Institutions mostly stay at home.
    let home = if rng.chance(200) {
        rng.pick(&INSTITUTIONS)
    } else {
        INSTITUTIONS[at]
    };
    let institution = parse::<Institution>(home);
    let mut devices = Vec::new();
    for (class, memory) in CLASSES {
        if rng.chance(450) || (devices.is_empty() && class == CLASSES[3].0) {
            devices.push(TrueDevice {
                class: class.into(),
                count: rng.between(1, 3) as u32,
                memory: Bytes(memory),
                rate: draw_price(rng),
                share_min: rng.pick(&[0, 0, 100, 250, 500]),
            });
        }
    }
    let mut speeds = vec![(WorkKind::Noop, 1_000_000)];
    if rng.chance(700) {
        speeds.push((WorkKind::Embed, rng.between(1_000_000, 20_000_000)));
    }
    if rng.chance(700) {
        speeds.push((WorkKind::Generate, rng.between(100_000, 3_000_000)));
    }
    let refuses: Vec<Institution> = if rng.chance(150) {
        vec![parse(rng.pick(&INSTITUTIONS))]
    } else {
        Vec::new()
    };
    let lie = rng.chance(setup.liars_per_mille).then(|| Lie::draw(rng));
    let truth = TrueNode {
        id: NodeId(PublicKey::of(&secret)),
        institution,
        country,
        devices,
        speeds,
        refuses,
        isolation: rng.pick(&[Tier::None, Tier::Seccomp, Tier::LandlockSeccomp, Tier::Container]),
        data: rng.pick(&[
            DataClass::Public,
            DataClass::Internal,
            DataClass::Internal,
            DataClass::Sensitive,
        ]),
        licences: if rng.chance(150) {
            vec!["apache-2.0".into(), "mit".into()]
        } else {
            Vec::new()
        },
        honest: lie.is_none(),
    };
    let owner = Owner {
        habit: None,
        utc_minutes: 0,
        late_ms: 0,
        member: None,
        schedulers: (0..setup.schedulers.len()).collect(),
    };
    let config = configure(rng, setup, n, secret, &truth);
    let mut process = NodeProcess::new(config, owner, lie);
    let most = setup.skew_ms_max;
    process.skew_ms = rng.below(2 * most + 1) as i64 - most as i64;
    process.last_mile = rng.between(1, 60);
    (process, truth)
}

/// What the owner set and the probe measured: the truth, but for the probe's errors and what is broken on purpose.
fn configure(rng: &mut Rng, setup: &Setup, n: usize, secret: SecretKey, truth: &TrueNode) -> AgentConfig {
    let engines = truth
        .speeds
        .iter()
        .map(|(work, speed)| Engine {
            name: work.as_str().into(),
            version: "1".into(),
            work: *work,
            // The probe is never quite right.
            speed: Speed(speed * rng.between(70, 130) / 100),
            method: "probe/1".into(),
        })
        .collect();
    let devices = truth
        .devices
        .iter()
        .map(|d| Device {
            class: d.class.to_string(),
            count: match setup.sabotage {
                Some(Sabotage::Overbook) => d.count + 2,
                _ => d.count,
            },
            free: 0,
            memory: d.memory,
            share_min: d.share_min,
            shared: Vec::new(),
            rate: match setup.sabotage {
                Some(Sabotage::Dearer) => Rate(d.rate.0 + 1),
                _ => d.rate,
            },
        })
        .collect();
    AgentConfig {
        secret,
        name: format!("node-{n}"),
        institution: truth.institution.clone(),
        country: match setup.sabotage {
            Some(Sabotage::FalseCountry) => parse("CH"),
            _ => truth.country,
        },
        devices,
        engines,
        cores: 16,
        memory: Bytes(64 << 30),
        isa: "x86-64-v3".into(),
        isolation: truth.isolation.to_string(),
        policy: OwnerPolicy {
            institutions_excluded: truth.refuses.clone(),
            licences: truth.licences.clone(),
            data: truth.data,
            local_first: setup.members.is_empty() && rng.chance(400),
            ..OwnerPolicy::default()
        },
        offer_ttl: setup.timing.offer_ttl,
        heartbeat: setup.timing.heartbeat,
        reading_interval: setup.timing.reading_interval,
        reclaim_grace: setup.timing.reclaim_grace,
    }
}

pub(crate) fn draw_price(rng: &mut Rng) -> Rate {
    if rng.chance(250) {
        Rate::FREE
    } else {
        Rate(rng.between(1, 40) * 100_000)
    }
}
