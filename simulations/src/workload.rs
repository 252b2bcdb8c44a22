//! Researchers and what they want: by a scenario's workloads, or drawn at random, some impossible, some called off.
use crate::{
    node::EPOCH,
    people::{COUNTRIES, INSTITUTIONS, parse},
    rng::Rng,
    setup::{Arrivals, HOUR, Item, Workload},
    traces::azure::Request,
    world::{Due, World, nowhere, stranger},
};
use karez_core::{
    artifact::{ArtifactKind, ArtifactRef},
    id::{Digest, JobId},
    key::{PublicKey, UserId},
    records::{Constraints, DataClass, Generate, Order, Signed, Tier, Verified, Work},
    unit::{Bytes, Credits, Rate, UtcMillis},
};

/// An order on its way to a scheduler.
#[derive(Debug, Clone)]
pub(crate) struct Handed {
    pub(crate) user: usize,
    pub(crate) scheduler: usize,
    pub(crate) order: Verified<Order>,
    pub(crate) caller: PublicKey,
    pub(crate) wait: bool,
    pub(crate) again: bool,
}

/// A workload under way: who takes part, and how far a trace was read.
pub(crate) struct Planned {
    users: Vec<usize>,
    next: usize,
    left: u64,
}

/// How busy researchers are at each hour of their own day, in thousandths of the busiest: little before seven, a dip
/// at lunch, a slow evening. The shape of daily submissions in published traces of academic clusters.
const BUSY: [u64; 24] = [
    180, 130, 100, 80, 80, 110, 180, 320, 560, 820, 960, 1_000, 860, 880, 970, 990, 940, 820, 640, 520, 460,
    400, 330, 250,
];
/// At weekends, in thousandths of a weekday.
const WEEKEND: u64 = 450;

/// How busy they are at that moment, where clocks are so many minutes ahead.
pub(crate) fn busy_per_mille(now: u64, utc_minutes: i32) -> u64 {
    let local = (now + 7 * crate::setup::DAY).saturating_add_signed(i64::from(utc_minutes) * 60_000);
    let hour = (local / HOUR % 24) as usize;
    let next = BUSY[(hour + 1) % 24];
    let within = local % HOUR;
    let now = (BUSY[hour] * (HOUR - within) + next * within) / HOUR;
    if local / crate::setup::DAY % 7 >= 5 {
        now * WEEKEND / 1_000
    } else {
        now
    }
}

impl World {
    pub(crate) fn plan_workloads(&mut self) {
        for w in 0..self.setup.workloads.len() {
            let load = &self.setup.workloads[w];
            let of = &load.institutions;
            let users: Vec<usize> = (0..self.users.len())
                .filter(|u| of.is_empty() || of.contains(&self.users[*u].institution))
                .collect();
            if users.is_empty() {
                continue;
            }
            let (first, left) = match &load.arrivals {
                Arrivals::Flash { at_ms, jobs, .. } => (*at_ms, *jobs),
                Arrivals::Requests { at_ms, .. } => (*at_ms, u64::MAX),
                Arrivals::Steady { .. } | Arrivals::Diurnal { .. } => (self.setup.boot_ms, u64::MAX),
            };
            while self.planned.len() < w {
                self.planned.push(Planned {
                    users: Vec::new(),
                    next: 0,
                    left: 0,
                });
            }
            self.planned.push(Planned { users, next: 0, left });
            self.at(first, Due::Arrive { workload: w as u32 });
        }
    }

    /// A job of a workload may come now; plans the next moment.
    pub(crate) fn arrive(&mut self, w: usize) {
        if self.calm || self.planned[w].left == 0 {
            return;
        }
        self.planned[w].left -= 1;
        let load = self.setup.workloads[w].clone();
        let user = {
            let users = &self.planned[w].users;
            users[self.rng.below(users.len() as u64) as usize]
        };
        let again = Due::Arrive { workload: w as u32 };
        match &load.arrivals {
            Arrivals::Steady { per_hour_milli } => {
                let pause = self.pause(*per_hour_milli);
                self.after(pause, again);
                self.hand_in(&load, user, None);
            }
            Arrivals::Diurnal { per_hour_milli } => {
                let pause = self.pause(*per_hour_milli);
                self.after(pause, again);
                let busy = busy_per_mille(self.now, self.users[user].utc_minutes);
                if self.rng.chance(busy) {
                    self.hand_in(&load, user, None);
                }
            }
            Arrivals::Flash { over_ms, jobs, .. } => {
                let pause = self.pause(*jobs * 1_000 * HOUR / (*over_ms).max(1));
                self.after(pause, again);
                self.hand_in(&load, user, None);
            }
            Arrivals::Requests {
                requests,
                gather_ms,
                times,
                ..
            } => {
                let next = self.planned[w].next;
                let Some(first) = requests.get(next) else {
                    self.planned[w].left = 0;
                    return;
                };
                let until = (first.at_ms / gather_ms + 1) * gather_ms;
                let count = requests[next..].iter().take_while(|r| r.at_ms < until).count();
                self.planned[w].next = next + count;
                if let Some(following) = requests.get(next + count) {
                    self.after(following.at_ms / gather_ms * gather_ms + gather_ms - until, again);
                }
                self.hand_in(&load, user, Some((&requests[next..next + count], *times)));
            }
        }
    }

    /// Until the next of so many thousandths of a job per hour: exponential.
    fn pause(&mut self, per_hour_milli: u64) -> u64 {
        let mean = 1_000.0 * HOUR as f64 / per_hour_milli.max(1) as f64;
        // 53 random bits, never zero.
        let uniform = ((self.rng.bits() >> 11) + 1) as f64 / (1u64 << 53) as f64;
        (-uniform.ln() * mean).min(30.0 * 24.0 * HOUR as f64) as u64
    }

    fn hand_in(&mut self, load: &Workload, user: usize, requests: Option<(&[Request], u64)>) {
        let country = self.users[user].country;
        let order_to = |world: &Self, s: &usize| {
            world.schedulers[*s].controller.is_some() && world.light_between(country, *s)
        };
        let reachable = self.users[user]
            .schedulers
            .iter()
            .find(|s| order_to(self, s))
            .or(self.users[user].schedulers.first())
            .copied();
        let Some(s) = reachable else { return };
        let mut items = self.rng.between(load.items.0, load.items.1).max(1);
        let mut item = load.item;
        let mut bytes = None;
        if let Some((requests, times)) = requests {
            items = requests.len() as u64 * times.max(1);
            let context: u64 = requests.iter().map(|r| u64::from(r.context_tokens)).sum();
            let answers: u64 = requests.iter().map(|r| u64::from(r.generated_tokens)).sum();
            let each = requests.len().max(1) as u64;
            item = Item::Generate((answers / each).max(1) as u32);
            // Four bytes of text make about a token.
            bytes = Some(context * 4 * times.max(1));
        }
        self.nonce += 1;
        let nonce = self.nonce;
        let model = |name: &str, kind, bytes| ArtifactRef {
            digest: Digest::of(name.as_bytes()),
            bytes: Bytes(bytes),
            kind,
        };
        let (work, input) = match item {
            Item::Fixed(least, most) => {
                let span = self.rng.between(least.into(), most.max(least).into());
                let work = Work::Noop {
                    millis_per_item: span as u32,
                };
                (work, items * 100)
            }
            Item::Generate(max_tokens) => {
                let work = Work::Generate(Generate {
                    raw: true,
                    ..Generate::greedy(model("llm", ArtifactKind::Blob, 4 << 30), "llm", max_tokens)
                });
                (work, items * 800)
            }
            Item::Embed(bytes) => {
                let work = Work::Embed {
                    model: model("encoder", ArtifactKind::Tree, 100 << 20),
                    model_name: "encoder".into(),
                };
                (work, items * u64::from(bytes))
            }
        };
        let mut constraints = Constraints {
            countries: load.countries.clone(),
            device: load.device.clone(),
            ..Constraints::default()
        };
        if self.rng.chance(load.at_home_per_mille) {
            constraints.countries = vec![country];
        }
        constraints.donated_only = self.rng.chance(load.donated_per_mille);
        let owner = &self.users[user];
        let at = EPOCH + self.now;
        let order = Order {
            user: UserId(PublicKey::of(&owner.secret)),
            institution: owner.institution.clone(),
            scheduler: self.schedulers[s].id,
            work,
            input: ArtifactRef {
                digest: Digest::of(&nonce.to_le_bytes()),
                bytes: Bytes(bytes.unwrap_or(input)),
                kind: ArtifactKind::Blob,
            },
            items,
            items_per_part: load.items_per_part,
            constraints,
            credits_max: if load.credits_max > owner.budget {
                owner.budget
            } else {
                load.credits_max
            },
            attempts_max: load.attempts_max,
            nonce,
            issued_at: UtcMillis(at),
            expires_at: UtcMillis(at + 12 * HOUR),
        };
        let caller = PublicKey::of(&owner.secret);
        let order = Signed::sign(order, &owner.secret);
        let job = JobId(order.id());
        self.checker.signed(&order);
        self.recorder.handed_in(job, self.now);
        if self.rng.chance(load.cancelled_per_mille) {
            let later = self.rng.between(1_000, 2 * HOUR);
            let user = user as u32;
            self.after(later, Due::Cancel { user, job });
        }
        self.submit(Handed {
            user,
            scheduler: s,
            order,
            caller,
            wait: true,
            again: false,
        });
    }

    // Drawn at random.

    /// Draws all orders of the users drawn at random, and when they are handed in.
    pub(crate) fn plan_orders(&mut self) {
        let mut rng = self.rng.fork();
        for nonce in 0..self.setup.orders as u64 {
            let user = rng.below(self.setup.users as u64) as usize;
            let at = rng.between(1_000, self.setup.storm_ms * 9 / 10);
            let s = self.users[user].schedulers[0];
            let mut order = self.draw_order(&mut rng, user, s, nonce, at);
            let mut caller = PublicKey::of(&self.users[user].secret);
            let mut door = s;
            match rng.below(100) {
                0 => order.scheduler = stranger(),
                1 => order.expires_at = UtcMillis(EPOCH + at / 2),
                2 => {
                    let other = rng.below(self.setup.users as u64) as usize;
                    caller = PublicKey::of(&self.users[other].secret);
                }
                3 => order.issued_at = UtcMillis(EPOCH + at + HOUR),
                // The wrong door: another scheduler of this world than the order names.
                4..=6 => door = (s + 1) % self.schedulers.len(),
                _ => {}
            }
            let wait = rng.chance(600);
            let order = Signed::sign(order, &self.users[user].secret);
            let job = JobId(order.id());
            self.checker.signed(&order);
            if rng.chance(150) {
                let later = at + rng.between(10, 40_000);
                let user = user as u32;
                self.at(later, Due::Cancel { user, job });
            }
            let handed = Handed {
                user,
                scheduler: door,
                order,
                caller,
                wait,
                again: false,
            };
            if rng.chance(200) {
                // The same order again: the same job, even when it has long ended.
                let later = at + rng.between(10, 200_000);
                self.at(later, Due::Submit(Box::new(handed.clone())));
            }
            self.at(at, Due::Submit(Box::new(handed)));
        }
        self.nonce = self.setup.orders as u64;
    }

    fn draw_order(&self, rng: &mut Rng, user: usize, s: usize, nonce: u64, at: u64) -> Order {
        let items = rng.between(1, 60);
        let model = |rng: &mut Rng, kind| ArtifactRef {
            digest: Digest::of(&[rng.below(3) as u8]),
            bytes: Bytes(rng.between(50, 700) << 20),
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
        let mut constraints = draw_constraints(rng);
        if !matches!(work, Work::Noop { .. }) {
            constraints.licence = rng.pick(&["", "mit", "apache-2.0", "cc-by-nc-4.0"]).into();
        }
        if rng.chance(250) {
            constraints.deadline = Some(UtcMillis(EPOCH + at + rng.between(2_000, 120_000)));
        }
        Order {
            user: UserId(PublicKey::of(&owner.secret)),
            institution: owner.institution.clone(),
            scheduler: self.schedulers[s].id,
            work,
            input: ArtifactRef {
                digest: Digest::of(&nonce.to_le_bytes()),
                bytes: Bytes(items * rng.between(20, 1_000)),
                kind: ArtifactKind::Blob,
            },
            items,
            items_per_part: if constraints.together {
                items.div_ceil(rng.between(2, 4)) as u32
            } else if rng.chance(500) {
                rng.between(1, 30) as u32
            } else {
                0
            },
            constraints,
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
    if rng.chance(100) {
        c.isolation = rng.pick(&[Tier::Seccomp, Tier::LandlockSeccomp, Tier::Container]);
    }
    if rng.chance(80) {
        c.data = rng.pick(&[DataClass::Internal, DataClass::Personal]);
    }
    if rng.chance(100) {
        c.devices = rng.between(1, 2) as u32;
    } else if rng.chance(250) {
        c.share_milli = rng.pick(&[100, 250, 330, 500, 750]);
    }
    c.together = rng.chance(100);
    c
}
