//! Keys that users let in.
use super::*;

fn delegation(key: &str, credits: u64, at: u64) -> Verified<Delegation> {
    let user = secret_of("user");
    let record = Delegation {
        user: UserId(PublicKey::of(&user)),
        scheduler: config().id(),
        key: PublicKey::of(&secret_of(key)),
        name: key.into(),
        credits: Credits(credits),
        issued_at: UtcMillis(at),
        expires_at: UtcMillis(at + 1_000_000),
    };
    Signed::sign(record, &user)
}

#[test]
fn a_delegated_key_spends_its_own_budget_and_nothing_after_it_was_taken_back() {
    let mut bench = Bench::new("a:1cpu@0");
    let (user, key) = (
        PublicKey::of(&secret_of("user")),
        PublicKey::of(&secret_of("key")),
    );
    let granted = delegation("key", 3_000_000, START);
    let delegate = |bench: &mut Bench, caller: PublicKey, delegation: &Verified<Delegation>| {
        brief(&bench.tell(Event::Delegate {
            request: RequestId(1),
            caller,
            delegation: delegation.clone(),
        }))
    };
    let mut too_much = |credits| delegate(&mut bench, user, &delegation("key", credits, START));
    assert!(too_much(99_000_000).contains("the budget holds 10.000000"));
    assert!(delegate(&mut bench, key, &granted).contains("not admitted"));
    assert_eq!(delegate(&mut bench, user, &granted), "Delegated");
    assert_eq!(delegate(&mut bench, user, &granted), "Delegated", "twice is once");
    let budgets = |bench: &Bench| (bench.c.budget(UserId(user)).0, bench.c.budget(UserId(key)).0);
    assert_eq!(budgets(&bench), (7_000_000, 3_000_000));

    // Its orders are its own: reserved from its budget, refused beyond it.
    let by_key = |nonce, credits| {
        let order = order(nonce, |o| {
            o.user = UserId(key);
            o.credits_max = Credits(credits);
        });
        Signed::sign(order.into_inner(), &secret_of("key"))
    };
    let beyond = brief(&bench.submit(&by_key(1, 3_000_001)));
    assert!(beyond.contains("the budget holds 3.000000"), "{beyond}");
    assert!(brief(&bench.submit(&by_key(2, 2_000_000))).contains("Submitted"));
    assert_eq!(budgets(&bench), (7_000_000, 1_000_000));
    // Nor can it hand on what it was handed.
    let further = Signed::sign(
        Delegation {
            user: UserId(key),
            key: PublicKey::of(&secret_of("other")),
            ..delegation("other", 1, START).into_inner()
        },
        &secret_of("key"),
    );
    assert!(delegate(&mut bench, key, &further).contains("itself delegated"));

    bench.restart();
    let revoke = |bench: &mut Bench, caller| {
        brief(&bench.tell(Event::Revoke {
            request: RequestId(1),
            caller,
            key,
        }))
    };
    assert!(revoke(&mut bench, key).contains("none of yours"));
    let revoked = revoke(&mut bench, user);
    assert!(revoked.contains("Delegated"), "{revoked}");
    assert_eq!(
        budgets(&bench),
        (10_000_000, 0),
        "what its job had set aside came back too"
    );
    assert!(brief(&bench.submit(&by_key(3, 0))).contains("not admitted"));
    // The old record opens no door again, not even after a restart.
    bench.restart();
    assert!(delegate(&mut bench, user, &granted).contains("taken back"));
    bench.wait(11 * 60_000);
    assert!(delegate(&mut bench, user, &granted).contains("dated wrongly"));
    assert_eq!(bench.c.delegations_of(user).count(), 0);
}

#[test]
fn a_delegated_key_expires() {
    let mut bench = Bench::new("a:1cpu@0");
    let key = PublicKey::of(&secret_of("key"));
    bench.tell(Event::Delegate {
        request: RequestId(1),
        caller: PublicKey::of(&secret_of("user")),
        delegation: delegation("key", 0, START),
    });
    bench.wait(1_000_001);
    let late = order(1, |o| {
        o.user = UserId(key);
        o.credits_max = Credits::ZERO;
        o.expires_at = UtcMillis(START + 2_000_000);
    });
    let late = Signed::sign(late.into_inner(), &secret_of("key"));
    assert!(brief(&bench.submit(&late)).contains("has expired"));
}
