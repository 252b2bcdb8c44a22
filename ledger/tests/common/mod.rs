//! A small federation with real keys, and the postings of its jobs.
#![allow(dead_code, clippy::unwrap_used, missing_docs, unreachable_pub)]
use karez_core::{
    artifact::{ArtifactKind, ArtifactRef},
    id::{Digest, JobId},
    key::{NodeId, PublicKey, SchedulerId, SecretKey, UserId},
    money::{Account, Posting, PostingKind},
    records::{
        Acceptance, Benchmark, Beneficiary, Constraints, CreditLimit, Delegation, Dispute, Flag, Floors,
        Grant, Invitation, Lease, MeterReading, Meters, Order, Outcome, Payment, RateCard, Receipt, Role,
        Ruling, Signed, Usage, Verified, Work,
    },
    unit::{Bytes, Credits, DeviceMillis, Millis, MonoMillis, Portion, Rate, Speed, UtcMillis},
};

pub const AT: UtcMillis = UtcMillis(1_790_000_000_000);

pub fn secret(seed: u8) -> SecretKey {
    SecretKey::from_bytes(&[seed; 32])
}

pub fn scheduler_secret() -> SecretKey {
    secret(1)
}

pub fn scheduler() -> SchedulerId {
    SchedulerId(PublicKey::of(&scheduler_secret()))
}

pub fn user_secret(n: u8) -> SecretKey {
    secret(10 + n % 8)
}

pub fn user(n: u8) -> UserId {
    UserId(PublicKey::of(&user_secret(n)))
}

pub fn node_secret(n: u8) -> SecretKey {
    secret(30 + n % 8)
}

pub fn grant(n: u8, micro: u64) -> Posting {
    Posting::transfer(
        PostingKind::Grant,
        Account::Federation,
        Account::User(user(n)),
        Credits(micro),
        Vec::new(),
    )
    .unwrap()
}

pub fn invitation(nonce: u64, uses_max: u32, micro: u64) -> Verified<Invitation> {
    let record = Invitation {
        scheduler: scheduler(),
        institution: "uni-nairobi".parse().unwrap(),
        role: Role::User,
        control_addr: "karez.example:7443".into(),
        peer_addrs: Vec::new(),
        credits: Credits(micro),
        nonce,
        uses_max,
        expires_at: UtcMillis(AT.0 + 1_000_000),
    };
    Signed::sign(record, &scheduler_secret())
}

pub fn order(n: u8, nonce: u64, ceiling: u64) -> Verified<Order> {
    order_with(n, nonce, ceiling, |_| {})
}

pub fn order_with(n: u8, nonce: u64, ceiling: u64, change: impl FnOnce(&mut Order)) -> Verified<Order> {
    let mut record = Order {
        user: user(n),
        institution: "uni-nairobi".parse().unwrap(),
        scheduler: scheduler(),
        work: Work::Noop { millis_per_item: 5 },
        input: ArtifactRef {
            digest: Digest::of(b"input"),
            bytes: Bytes(100),
            kind: ArtifactKind::Blob,
        },
        items: 1_000,
        items_per_part: 100,
        constraints: Constraints::default(),
        credits_max: Credits(ceiling),
        attempts_max: 3,
        nonce,
        issued_at: AT,
        expires_at: UtcMillis(AT.0 + 1_000_000),
    };
    change(&mut record);
    Signed::sign(record, &user_secret(n))
}

pub fn reserve(order: &Verified<Order>, micro: u64) -> Posting {
    Posting::transfer(
        PostingKind::Reserve,
        Account::User(order.user),
        Account::Escrow(JobId(order.id())),
        Credits(micro),
        vec![order.encode()],
    )
    .unwrap()
}

pub fn release(order: &Verified<Order>, micro: u64) -> Posting {
    Posting::transfer(
        PostingKind::Release,
        Account::Escrow(JobId(order.id())),
        Account::User(order.user),
        Credits(micro),
        Vec::new(),
    )
    .unwrap()
}

/// One leased part, with a hand on every record before it is signed.
pub struct Part<'a> {
    pub order: &'a Verified<Order>,
    pub node: u8,
    pub part: u32,
    pub fence: u64,
    pub rate: u64,
    pub device_ms: u64,
    pub readings: u32,
    pub outcome: Outcome,
    pub lease: Box<dyn Fn(&mut Lease) + 'a>,
    pub reading: Box<dyn Fn(&mut MeterReading) + 'a>,
    pub usage: Box<dyn Fn(&mut Usage) + 'a>,
    pub receipt: Box<dyn Fn(&mut Receipt) + 'a>,
    pub benchmark: Option<Benchmark>,
    pub node_signs: SecretKey,
    pub scheduler_signs: SecretKey,
}

impl<'a> Part<'a> {
    pub fn of(order: &'a Verified<Order>, part: u32, fence: u64) -> Self {
        Self {
            order,
            node: part as u8,
            part,
            fence,
            rate: 3_600_000,
            device_ms: 1_000,
            readings: 3,
            outcome: Outcome::Done,
            lease: Box::new(|_| {}),
            reading: Box::new(|_| {}),
            usage: Box::new(|_| {}),
            receipt: Box::new(|_| {}),
            // The machine of the second part was only estimated, that of the third not even that.
            benchmark: [Some(("bench/1", 250_000)), Some(("probe/1", 40_000)), None][part as usize % 3].map(
                |(version, speed)| Benchmark {
                    version: version.into(),
                    speed: Speed(speed),
                },
            ),
            node_signs: node_secret(part as u8),
            scheduler_signs: scheduler_secret(),
        }
    }

    pub fn evidence(&self) -> (Vec<Vec<u8>>, Receipt, Lease) {
        let node = NodeId(PublicKey::of(&node_secret(self.node)));
        let mut lease = Lease {
            job: JobId(self.order.id()),
            part: self.part,
            fence: self.fence,
            node,
            scheduler: scheduler(),
            institution: format!("uni-{}", self.node % 3).parse().unwrap(),
            device_class: "cpu/x86-64-v3".into(),
            devices: Portion::ONE,
            rate: Rate(self.rate),
            device_ms_max: DeviceMillis(60_000),
            first_item: 0,
            items: 100,
            granted_at: AT,
            expires_at: UtcMillis(AT.0 + 60_000),
        };
        (self.lease)(&mut lease);
        let lease = Signed::sign(lease, &self.node_signs);
        let mut evidence = vec![self.order.encode(), lease.encode()];
        let mut last: Option<Verified<MeterReading>> = None;
        for sequence in 0..self.readings {
            let share = u64::from(sequence + 1);
            let mut reading = MeterReading {
                lease: lease.id(),
                node,
                sequence,
                previous: last.as_ref().map(|r| r.id()),
                meters: Meters {
                    device_ms: DeviceMillis(self.device_ms * share / u64::from(self.readings)),
                    cpu: Millis(share * 10),
                    items: share,
                    ..Meters::default()
                },
                method: "rusage+wall/1".into(),
                taken_at: UtcMillis(AT.0 + share),
                mono: MonoMillis(share),
                benchmark: self.benchmark.clone(),
            };
            (self.reading)(&mut reading);
            let reading = Signed::sign(reading, &self.node_signs);
            evidence.push(reading.encode());
            last = Some(reading);
        }
        let mut usage = Usage {
            lease: lease.id(),
            node,
            last_reading: last.as_ref().map_or(Digest([0; 32]), |r| r.id()),
            readings: self.readings,
            meters: last.as_ref().map(|r| r.meters).unwrap_or_default(),
            outcome: self.outcome,
            cause: String::new(),
            retryable: false,
            result: None,
            started_at: AT,
            ended_at: UtcMillis(AT.0 + 1_000),
        };
        (self.usage)(&mut usage);
        let usage = Signed::sign(usage, &self.node_signs);
        evidence.push(usage.encode());
        let done = self.outcome == Outcome::Done;
        let billed = if done {
            usage.meters.device_ms
        } else {
            DeviceMillis(0)
        };
        let mut receipt = Receipt {
            usage: usage.id(),
            lease: lease.id(),
            job: JobId(self.order.id()),
            scheduler: scheduler(),
            node,
            node_institution: lease.institution.clone(),
            user: self.order.user,
            user_institution: self.order.institution.clone(),
            observed: DeviceMillis(self.device_ms + 5),
            billed,
            credits: lease.rate.bill(billed).unwrap(),
            flags: if done { Vec::new() } else { vec![Flag::NotDone] },
            issued_at: UtcMillis(AT.0 + 2_000),
            disputable_until: UtcMillis(AT.0 + 1_000_000),
            rate_card: 0,
        };
        (self.receipt)(&mut receipt);
        let receipt = Signed::sign(receipt, &self.scheduler_signs);
        evidence.push(receipt.encode());
        (evidence, receipt.into_inner(), lease.into_inner())
    }

    pub fn settle(&self) -> Posting {
        let (evidence, receipt, lease) = self.evidence();
        Posting::transfer(
            PostingKind::Settle,
            Account::Escrow(JobId(self.order.id())),
            Account::Institution(lease.institution),
            receipt.credits,
            evidence,
        )
        .unwrap()
    }
}

/// The postings of a plausible small ledger: grants, jobs with done, failed and donated parts, releases.
pub fn postings(jobs: u64) -> Vec<Posting> {
    let mut out: Vec<Posting> = (0..3).map(|n| grant(n, 1_000_000_000)).collect();
    for nonce in 0..jobs {
        let order = order((nonce % 3) as u8, nonce, 10_000_000);
        out.push(reserve(&order, 10_000_000));
        let mut left = 10_000_000;
        for part in 0..1 + (nonce % 3) as u32 {
            if part == 1 {
                // The first attempt at this part was reclaimed.
                let mut failed = Part::of(&order, part, 1);
                failed.outcome = Outcome::Reclaimed;
                out.push(failed.settle());
            }
            let mut done = Part::of(&order, part, 2);
            done.rate = if part == 2 { 0 } else { 3_600_000 };
            let posting = done.settle();
            left -= posting.legs[1].1 as u64;
            out.push(posting);
        }
        out.push(release(&order, left));
    }
    out
}

/// Lease and receipt out of a settlement.
pub fn papers(settled: &Posting) -> (Verified<Lease>, Verified<Receipt>) {
    let evidence = &settled.evidence;
    let lease = Signed::open(&evidence[1]).unwrap();
    (lease, Signed::open(evidence.last().unwrap()).unwrap())
}

/// How institutions share from now on.
pub fn floors(version: u32, floor_percent: u32) -> Posting {
    let floors = Floors {
        scheduler: scheduler(),
        version,
        shares: karez_core::fair::Shares {
            floor_percent,
            ..Default::default()
        },
        issued_at: AT,
    };
    Posting {
        kind: PostingKind::Floors,
        legs: vec![(Account::Federation, 0)],
        evidence: vec![Signed::sign(floors, &scheduler_secret()).encode()],
    }
}

/// What stays of a posting's records; nothing for records that prove nothing.
pub fn gist(posting: &Posting) -> Vec<u8> {
    let examined = karez_ledger::examine(posting.clone(), scheduler());
    examined.map_or(Vec::new(), |examined| examined.gist().to_vec())
}

pub fn institution(name: &str) -> Account {
    Account::Institution(name.parse().unwrap())
}

pub fn accept(settled: &Posting, n: u8, change: impl FnOnce(&mut Acceptance)) -> Posting {
    let (lease, receipt) = papers(settled);
    let mut acceptance = Acceptance {
        receipt: receipt.id(),
        user: user(n),
        issued_at: AT,
    };
    change(&mut acceptance);
    let acceptance = Signed::sign(acceptance, &user_secret(n));
    Posting {
        kind: PostingKind::Accept,
        legs: vec![(Account::Institution(receipt.node_institution.clone()), 0)],
        evidence: vec![lease.encode(), receipt.encode(), acceptance.encode()],
    }
}

pub fn dispute(settled: &Posting, n: u8, change: impl FnOnce(&mut Dispute)) -> (Posting, Verified<Dispute>) {
    let (lease, receipt) = papers(settled);
    let mut dispute = Dispute {
        receipt: receipt.id(),
        user: user(n),
        reason: "half of it is missing".into(),
        evidence: vec![Digest::of(b"what came out")],
        issued_at: AT,
    };
    change(&mut dispute);
    let dispute = Signed::sign(dispute, &user_secret(n));
    let posting = Posting::transfer(
        PostingKind::Dispute,
        Account::Institution(receipt.node_institution.clone()),
        Account::Disputed(receipt.id()),
        receipt.credits,
        vec![lease.encode(), receipt.encode(), dispute.encode()],
    );
    (posting.unwrap(), dispute)
}

pub fn ruling(settled: &Posting, dispute: &Verified<Dispute>, refund: u64) -> Posting {
    let (_, receipt) = papers(settled);
    let ruling = Ruling {
        dispute: dispute.id(),
        receipt: receipt.id(),
        scheduler: scheduler(),
        refund: Credits(refund),
        reason: "half was usable".into(),
        issued_at: AT,
    };
    Posting {
        kind: PostingKind::Ruling,
        legs: vec![
            (Account::Disputed(receipt.id()), -(receipt.credits.0 as i64)),
            (Account::User(receipt.user), refund as i64),
            (
                Account::Institution(receipt.node_institution.clone()),
                receipt.credits.0 as i64 - refund as i64,
            ),
        ],
        evidence: vec![Signed::sign(ruling, &scheduler_secret()).encode()],
    }
}

pub fn grant_record(credits: u64, change: impl FnOnce(&mut Grant)) -> Verified<Grant> {
    let mut grant = Grant {
        scheduler: scheduler(),
        payer: None,
        beneficiary: Beneficiary::Institution("uni-nairobi".parse().unwrap()),
        work: Vec::new(),
        credits: Credits(credits),
        purpose: "thesis".into(),
        nonce: 1,
        issued_at: AT,
        expires_at: UtcMillis(AT.0 + 1_000),
    };
    change(&mut grant);
    Signed::sign(grant, &scheduler_secret())
}

pub fn fund(grant: &Verified<Grant>) -> Posting {
    let to = Account::Grant(grant.id());
    let evidence = vec![grant.encode()];
    Posting::transfer(PostingKind::Grant, grant.from(), to, grant.credits, evidence).unwrap()
}

pub fn rates(version: u32) -> Posting {
    let card = RateCard {
        scheduler: scheduler(),
        version,
        rates: vec![("cpu".into(), Rate(50_000)), ("cuda".into(), Rate(1_000_000))],
        effective_from: AT,
        issued_at: AT,
    };
    Posting {
        kind: PostingKind::Rates,
        legs: vec![(Account::Federation, 0)],
        evidence: vec![Signed::sign(card, &scheduler_secret()).encode()],
    }
}

pub fn limit(name: &str, credits: u64, at: u64) -> Posting {
    let limit = CreditLimit {
        scheduler: scheduler(),
        institution: name.parse().unwrap(),
        credits: Credits(credits),
        issued_at: UtcMillis(at),
    };
    Posting {
        kind: PostingKind::Limit,
        legs: vec![(institution(name), 0)],
        evidence: vec![Signed::sign(limit, &scheduler_secret()).encode()],
    }
}

pub fn payment(from: &str, to: &str, credits: u64, nonce: u64) -> Posting {
    let payment = Payment {
        scheduler: scheduler(),
        payer: from.parse().unwrap(),
        payee: to.parse().unwrap(),
        credits: Credits(credits),
        reference: "transfer 4711".into(),
        nonce,
        issued_at: AT,
    };
    let evidence = vec![Signed::sign(payment, &scheduler_secret()).encode()];
    Posting::transfer(
        PostingKind::Payment,
        institution(to),
        institution(from),
        Credits(credits),
        evidence,
    )
    .unwrap()
}

/// A ledger with an entry of every kind: the one that exports, statements and mutations are tried on.
pub fn all_kinds(jobs: u64) -> Vec<Posting> {
    let mut out = postings(jobs);
    let funded = grant_record(5_000_000, |_| {});
    out.push(rates(1));
    out.push(floors(1, 40));
    out.push(fund(&funded));
    let order = order(1, 9_001, 4_000_000);
    let id = JobId(order.id());
    out.push(Posting {
        kind: PostingKind::Reserve,
        legs: vec![
            (Account::Grant(funded.id()), -3_000_000),
            (Account::User(order.user), -1_000_000),
            (Account::Escrow(id), 4_000_000),
        ],
        evidence: vec![order.encode()],
    });
    let (first, second) = (Part::of(&order, 0, 1).settle(), Part::of(&order, 1, 1).settle());
    out.extend([first.clone(), second.clone()]);
    out.push(Posting {
        kind: PostingKind::Release,
        legs: vec![
            (Account::Escrow(id), -3_998_000),
            (Account::User(order.user), 1_000_000),
            (Account::Grant(funded.id()), 2_998_000),
        ],
        evidence: Vec::new(),
    });
    out.push(accept(&first, 1, |_| {}));
    let (posting, paper) = dispute(&second, 1, |_| {});
    out.push(posting);
    out.push(ruling(&second, &paper, 400));
    out.push(limit("uni-lagos", 500, AT.0));
    out.push(payment("uni-lagos", "uni-0", 700, 1));
    out
}

/// User `n` lets the key of user `to` sign, with that budget.
pub fn delegation(n: u8, to: u8, micro: u64) -> Verified<Delegation> {
    delegation_with(n, to, micro, |_| {})
}

pub fn delegation_with(
    n: u8,
    to: u8,
    micro: u64,
    change: impl FnOnce(&mut Delegation),
) -> Verified<Delegation> {
    let mut record = Delegation {
        user: user(n),
        scheduler: scheduler(),
        key: user(to).0,
        name: "notebook".into(),
        credits: Credits(micro),
        issued_at: AT,
        expires_at: UtcMillis(AT.0 + 1_000_000),
    };
    change(&mut record);
    Signed::sign(record, &user_secret(n))
}
