//! A small federation with real keys, and the postings of its jobs.
#![allow(dead_code, clippy::unwrap_used, missing_docs, unreachable_pub)]
use karez_core::{
    artifact::{ArtifactKind, ArtifactRef},
    id::{Digest, JobId},
    key::{NodeId, PublicKey, SchedulerId, SecretKey, UserId},
    money::{Account, Posting, PostingKind},
    records::{
        Constraints, Flag, Invitation, Lease, MeterReading, Meters, Order, Outcome, Receipt, Role, Signed,
        Usage, Verified, Work,
    },
    unit::{Bytes, Credits, DeviceMillis, Millis, MonoMillis, Rate, UtcMillis},
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
            devices: 1,
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
