//! Researchers and what they want: small jobs of all kinds, some impossible, some called off.
use crate::{
    node::{COUNTRIES, EPOCH, INSTITUTIONS, parse},
    rng::Rng,
    scheduler::{nowhere, other_scheduler},
    setup::Setup,
    world::{Due, World},
};
use karez_core::{
    artifact::{ArtifactKind, ArtifactRef},
    id::{Digest, Institution, JobId},
    key::{PublicKey, SecretKey, UserId},
    records::{Constraints, Generate, Order, Signed, Work},
    unit::{Bytes, Credits, Rate, UtcMillis},
};
use std::collections::BTreeSet;

/// A researcher.
pub(crate) struct User {
    pub(crate) secret: SecretKey,
    pub(crate) institution: Institution,
    pub(crate) budget: Credits,
    /// Orders handed in whose answer is missing.
    pub(crate) waiting: BTreeSet<JobId>,
    /// Jobs being called off whose answer is missing.
    pub(crate) cancelling: BTreeSet<JobId>,
    /// Jobs to give up in the calm.
    pub(crate) hopeless: BTreeSet<JobId>,
}

pub(crate) fn build_users(rng: &mut Rng, setup: &Setup) -> Vec<User> {
    (0..setup.users)
        .map(|_| User {
            secret: SecretKey::from_bytes(&rng.bytes()),
            institution: parse(rng.pick(&INSTITUTIONS)),
            budget: Credits(rng.between(0, 30) * Credits::ONE.0),
            waiting: BTreeSet::new(),
            cancelling: BTreeSet::new(),
            hopeless: BTreeSet::new(),
        })
        .collect()
}

impl World {
    /// Draws all orders and when they are handed in.
    pub(crate) fn plan_orders(&mut self) {
        let mut rng = self.rng.fork();
        for nonce in 0..self.setup.orders as u64 {
            let user = rng.below(self.users.len() as u64) as usize;
            let at = rng.between(1_000, self.setup.storm_ms * 9 / 10);
            let mut order = self.draw_order(&mut rng, user, nonce, at);
            let mut caller = PublicKey::of(&self.users[user].secret);
            match rng.below(100) {
                0 => order.scheduler = other_scheduler(),
                1 => order.expires_at = UtcMillis(EPOCH + at / 2),
                2 => {
                    let other = rng.below(self.users.len() as u64) as usize;
                    caller = PublicKey::of(&self.users[other].secret);
                }
                3 => order.issued_at = UtcMillis(EPOCH + at + 3_600_000),
                _ => {}
            }
            let wait = rng.chance(600);
            let order = Signed::sign(order, &self.users[user].secret);
            let job = JobId(order.id());
            self.checker.signed(&order);
            let hopeful = (0..self.nodes.len())
                .filter(|n| self.checker.node(*n).could_run(&order))
                .count();
            // Prices and probes change: only what several machines may run at any price is sure to end by itself.
            let priced = order.constraints.donated_only || order.constraints.rate_max.is_some();
            let tight = order.credits_max < Credits(5 * Credits::ONE.0);
            if hopeful == 0 || priced || tight {
                self.users[user].hopeless.insert(job);
            }
            if rng.chance(150) {
                let later = at + rng.between(10, 40_000);
                self.at(later, Due::Cancel { user, job });
            }
            if rng.chance(200) {
                // The same order again: the same job, even when it has long ended.
                let due = Due::Submit {
                    user,
                    order: Box::new(order.clone()),
                    caller,
                    wait,
                    again: false,
                };
                let later = at + rng.between(10, 200_000);
                self.at(later, due);
            }
            let due = Due::Submit {
                user,
                order: Box::new(order),
                caller,
                wait,
                again: false,
            };
            self.at(at, due);
        }
    }

    fn draw_order(&self, rng: &mut Rng, user: usize, nonce: u64, at: u64) -> Order {
        let items = rng.between(1, 60);
        let model = |rng: &mut Rng, kind| ArtifactRef {
            digest: Digest::of(&[rng.below(3) as u8]),
            bytes: Bytes(rng.between(1, 100) << 20),
            kind,
        };
        let work = match rng.below(10) {
            0..=5 => Work::Noop {
                millis_per_item: rng.between(0, 600) as u32,
            },
            6 | 7 => Work::Embed {
                model: model(rng, ArtifactKind::Tree),
                model_name: "tiny-embed".into(),
            },
            _ => Work::Generate(Generate {
                seed: 1,
                raw: true,
                ..Generate::greedy(model(rng, ArtifactKind::Blob), "tiny", rng.between(8, 64) as u32)
            }),
        };
        let credits_max = match rng.below(10) {
            0 => Credits::ZERO,
            1 => Credits(rng.between(1, 100_000)),
            _ => Credits(rng.between(5, 12) * Credits::ONE.0),
        };
        let owner = &self.users[user];
        Order {
            user: UserId(PublicKey::of(&owner.secret)),
            institution: owner.institution.clone(),
            scheduler: self.scheduler.id,
            work,
            input: ArtifactRef {
                digest: Digest::of(&nonce.to_le_bytes()),
                bytes: Bytes(items * rng.between(20, 1_000)),
                kind: ArtifactKind::Blob,
            },
            items,
            items_per_part: if rng.chance(500) {
                rng.between(1, 30) as u32
            } else {
                0
            },
            constraints: draw_constraints(rng),
            credits_max,
            attempts_max: rng.between(1, 6) as u32,
            nonce,
            issued_at: UtcMillis(EPOCH + at),
            expires_at: UtcMillis(EPOCH + at + 600_000),
        }
    }
}

fn draw_constraints(rng: &mut Rng) -> Constraints {
    let mut c = Constraints::default();
    if rng.chance(150) {
        c.countries = vec![parse(rng.pick(&COUNTRIES)), parse(rng.pick(&COUNTRIES))];
    }
    if rng.chance(100) {
        c.countries_excluded = vec![parse(rng.pick(&COUNTRIES))];
    }
    if rng.chance(80) {
        c.institutions = vec![parse(rng.pick(&INSTITUTIONS)), parse(rng.pick(&INSTITUTIONS))];
    }
    if rng.chance(80) {
        c.institutions_excluded = vec![parse(rng.pick(&INSTITUTIONS))];
    }
    if rng.chance(150) {
        c.device = rng.pick(&["cpu", "cuda", "cuda/NVIDIA H200", "rocm"]).into();
    }
    if rng.chance(60) {
        c.memory = Bytes(rng.between(1, 200) << 30);
    }
    if rng.chance(100) {
        c.donated_only = true;
    }
    if rng.chance(120) {
        c.rate_max = Some(Rate(rng.between(1, 30) * 100_000));
    }
    if rng.chance(20) {
        c.countries = vec![nowhere()];
    }
    c
}
