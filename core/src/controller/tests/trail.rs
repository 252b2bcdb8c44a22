//! Disputes, rulings, silence and grants.
use super::*;

/// One job of one part, done on node b for 1000 micro-credits: its lease and its receipt.
fn settled(bench: &mut Bench, nonce: u64) -> (Verified<Lease>, Verified<Receipt>) {
    let out = bench.submit(&order(nonce, |_| {}));
    let (_, ask) = the_ask(&out);
    let lease = grant("b", &ask, |_| {});
    bench.hear("b", ToScheduler::Granted(lease.clone()));
    bench.now += 3_600;
    let out = bench.hear("b", done(finished("b", lease.clone(), 3_600, |_| {})));
    (lease, receipt_in(&out))
}

fn file(bench: &mut Bench, who: &str, filed: Filed) -> String {
    let caller = PublicKey::of(&secret_of(who));
    brief(&bench.tell(Event::File {
        request: RequestId(0),
        caller,
        filed,
    }))
}

fn disputed(lease: &Verified<Lease>, receipt: &Verified<Receipt>, who: &str) -> (Filed, Digest) {
    let dispute = crate::records::Dispute {
        receipt: receipt.id(),
        user: user(PublicKey::of(&secret_of(who))),
        reason: "half of it is missing".into(),
        evidence: Vec::new(),
        issued_at: receipt.issued_at,
    };
    let dispute = Signed::sign(dispute, &secret_of(who));
    let id = dispute.id();
    (
        Filed::Dispute(Box::new((lease.clone(), receipt.clone(), dispute))),
        id,
    )
}

fn ruled(receipt: &Verified<Receipt>, dispute: Digest, refund: u64, who: &str) -> Filed {
    let ruling = crate::records::Ruling {
        dispute,
        receipt: receipt.id(),
        scheduler: SchedulerId(PublicKey::of(&secret_of(who))),
        refund: Credits(refund),
        reason: "half was usable".into(),
        issued_at: receipt.issued_at,
    };
    Filed::Ruling(Signed::sign(ruling, &secret_of(who)))
}

#[test]
fn a_dispute_freezes_until_the_operator_rules_even_over_a_restart() {
    let mut bench = Bench::new("b:1gpu@1");
    let (lease, receipt) = settled(&mut bench, 1);
    let institution = Account::Institution("uni-nairobi".parse().unwrap());
    let (dispute, id) = disputed(&lease, &receipt, "user");
    let (strangers, _) = disputed(&lease, &receipt, "b");
    let refused = file(&mut bench, "b", strangers);
    assert!(refused.contains("answer your own receipts"), "{refused}");
    assert_eq!(file(&mut bench, "user", dispute.clone()), "Filed");
    assert_eq!(bench.booked.balance(&institution), 0);
    assert_eq!(bench.booked.balance(&Account::Disputed(receipt.id())), 1_000);
    let again = file(&mut bench, "user", dispute);
    assert!(again.contains("whose dispute is open"), "{again}");
    bench.restart();
    assert_eq!(bench.c.disputes().count(), 1);
    let by_user = file(&mut bench, "user", ruled(&receipt, id, 1_000, "user"));
    assert!(by_user.contains("only the scheduler's operator"), "{by_user}");
    let too_much = file(&mut bench, "scheduler", ruled(&receipt, id, 1_001, "scheduler"));
    assert!(too_much.contains("the receipt paid"), "{too_much}");
    let before = bench.c.budget(user(PublicKey::of(&secret_of("user"))));
    assert_eq!(
        file(&mut bench, "scheduler", ruled(&receipt, id, 400, "scheduler")),
        "Filed"
    );
    assert_eq!(bench.booked.balance(&institution), 600);
    let after = bench.c.budget(user(PublicKey::of(&secret_of("user"))));
    assert_eq!(after.0 - before.0, 400);
    let twice = file(&mut bench, "scheduler", ruled(&receipt, id, 400, "scheduler"));
    assert!(twice.contains("no open dispute"), "{twice}");
}

#[test]
fn silence_accepts() {
    let mut bench = Bench::new("b:1gpu@1");
    let (lease, receipt) = settled(&mut bench, 1);
    bench.now = receipt.disputable_until.0 + 1;
    let (dispute, _) = disputed(&lease, &receipt, "user");
    let late = file(&mut bench, "user", dispute);
    assert!(late.contains("silence accepted it"), "{late}");
}

#[test]
fn a_grant_pays_first_and_gets_its_rest_back() {
    let mut bench = Bench::new("b:1gpu@1");
    let record = crate::records::Grant {
        scheduler: config().id(),
        payer: None,
        beneficiary: crate::records::Beneficiary::Institution("uni-nairobi".parse().unwrap()),
        work: Vec::new(),
        credits: Credits(400_000),
        purpose: String::new(),
        nonce: 1,
        issued_at: UtcMillis(START),
        expires_at: UtcMillis(START + 600_000),
    };
    let record = Signed::sign(record, &secret_of("scheduler"));
    let account = Account::Grant(record.id());
    assert_eq!(
        file(&mut bench, "scheduler", Filed::Grant(record.clone())),
        "Filed"
    );
    let again = file(&mut bench, "scheduler", Filed::Grant(record));
    assert!(again.contains("posted before"), "{again}");
    let own = user(PublicKey::of(&secret_of("user")));
    let out = bench.submit(&order(1, |_| {}));
    // A ceiling of one credit: the grant's 0.4 first, then the user's own.
    assert_eq!(bench.booked.balance(&account), 0);
    assert_eq!(bench.c.budget(own), Credits(9_400_000));
    bench.restart();
    let (_, ask) = the_ask(&out);
    let lease = grant("b", &ask, |_| {});
    bench.tell(Event::NodeConnected(node_of("b")));
    bench.hear("b", ToScheduler::Granted(lease.clone()));
    bench.now += 3_600;
    bench.hear("b", done(finished("b", lease, 3_600, |_| {})));
    // The bill of 1000 came out of the grant; the user has everything back.
    assert_eq!(bench.c.budget(own), Credits(10_000_000));
    assert_eq!(bench.booked.balance(&account), 399_000);
    // Past its date the rest goes back to who gave it.
    bench.now = START + 700_000;
    bench.tell(Event::Tick);
    assert_eq!(bench.booked.balance(&account), 0);
    assert_eq!(bench.c.grants().count(), 0);
    assert_eq!(bench.booked.balance(&Account::Federation), -10_001_000);
}

fn promised(version: u32, half_life: u64, who: &str) -> Filed {
    let floors = crate::records::Floors {
        scheduler: SchedulerId(PublicKey::of(&secret_of(who))),
        version,
        shares: crate::fair::Shares {
            floor_percent: 30,
            half_life: Millis(half_life),
            ..crate::fair::Shares::default()
        },
        issued_at: UtcMillis(START),
    };
    Filed::Floors(Signed::sign(floors, &secret_of(who)))
}

#[test]
fn signed_floors_count_instead_of_the_settings_even_over_a_restart() {
    let mut bench = Bench::new("b:1gpu@1");
    settled(&mut bench, 1);
    assert_eq!(
        (bench.c.floors().version, bench.c.floors().shares.floor_percent),
        (0, 50)
    );
    let week = config().shares.half_life.0;
    let refused = file(&mut bench, "user", promised(1, week, "user"));
    assert!(refused.contains("operator"), "{refused}");
    let refused = file(&mut bench, "scheduler", promised(2, week, "scheduler"));
    assert!(refused.contains("the next one is 1"), "{refused}");
    assert_eq!(
        file(&mut bench, "scheduler", promised(1, week, "scheduler")),
        "Filed"
    );
    assert_eq!(bench.c.fair.shares().floor_percent, 30);
    bench.restart();
    assert_eq!(
        (bench.c.floors().version, bench.c.fair.shares().floor_percent),
        (1, 30)
    );
    // Histories were counted with another half-life: it waits for a start, where they are counted anew.
    file(&mut bench, "scheduler", promised(2, week / 2, "scheduler"));
    assert_eq!(bench.c.fair.shares().half_life.0, week);
    bench.restart();
    assert_eq!(bench.c.fair.shares().half_life.0, week / 2);
}
