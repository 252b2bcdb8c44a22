//! Keys that users delegate: members with a budget of their own, taken from the user's and given back.
use super::{
    Denial, Effect, Member, Reply, RequestId,
    admission::MEMBERS,
    job::JobState,
    mind::{CLOCK_SKEW_MAX, Controller},
};
use crate::{
    key::{PublicKey, UserId},
    money::{Account, Posting, PostingKind},
    prelude::*,
    records::{Delegation, Role, Verified},
    store::{Change, put},
    unit::{Credits, Now},
};

pub(super) const DELEGATIONS: &str = "delegations";
/// Delegations that were taken back and whose date would still admit them.
pub(super) const REVOKED: &str = "revoked";
const REVOKED_MAX: usize = 100_000;
/// The most keys one user has delegated at a time.
pub const KEYS_OF_USER_MAX: usize = 100;

impl Controller {
    pub(super) fn on_delegate(
        &mut self,
        now: Now,
        request: RequestId,
        caller: PublicKey,
        delegation: Verified<Delegation>,
        out: &mut Vec<Effect>,
    ) {
        let reply = match self.delegate(now, caller, delegation, out) {
            Ok(credits) => Reply::Delegated(credits),
            Err(denial) => Reply::Refused(denial),
        };
        out.push(Effect::Reply(request, reply));
    }

    pub(super) fn on_revoke(
        &mut self,
        now: Now,
        request: RequestId,
        caller: PublicKey,
        key: PublicKey,
        out: &mut Vec<Effect>,
    ) {
        let reply = match self.revoke(now, caller, key, out) {
            Ok(credits) => Reply::Delegated(credits),
            Err(denial) => Reply::Refused(denial),
        };
        out.push(Effect::Reply(request, reply));
    }

    fn delegate(
        &mut self,
        now: Now,
        caller: PublicKey,
        delegation: Verified<Delegation>,
        out: &mut Vec<Effect>,
    ) -> Result<Credits, Denial> {
        let no = |why: &str| Err(Denial::Key(why.into()));
        let member = self.need(caller, Role::User)?.clone();
        if delegation.user.0 != caller {
            return no("is delegated by another user than the caller");
        }
        if delegation.scheduler != self.id {
            return no("is delegated at another scheduler");
        }
        if self.delegations.contains_key(&caller) {
            return no("cannot be delegated by a key that is itself delegated: use your own key");
        }
        if self
            .delegations
            .get(&delegation.key)
            .is_some_and(|known| known.id() == delegation.id())
        {
            // Said twice is said once.
            return Ok(self.budget(UserId(delegation.key)));
        }
        if self.members.contains_key(&delegation.key) {
            return no("is a member already: draw a new one");
        }
        // An old record must not admit again a key that was taken back, nor move its credits twice.
        let fresh = now.utc.0.saturating_sub(delegation.issued_at.0) <= CLOCK_SKEW_MAX.0;
        if !fresh || delegation.issued_at > now.utc.after(CLOCK_SKEW_MAX) || delegation.expires_at <= now.utc
        {
            return no("is dated wrongly or has expired: check this machine's clock and try again");
        }
        if self.revoked.contains_key(&delegation.id()) {
            return no("was taken back: draw a new one");
        }
        let mut forgotten = Vec::new();
        self.revoked.retain(|id, issued| {
            // Its date alone refuses it by now.
            let keep = now.utc.0.saturating_sub(issued.0) <= 2 * CLOCK_SKEW_MAX.0;
            if !keep {
                forgotten.push(Change::Delete {
                    table: REVOKED,
                    key: id.0.to_vec(),
                });
            }
            keep
        });
        if !forgotten.is_empty() {
            out.push(Effect::Persist(forgotten));
        }
        if self.revoked.len() >= REVOKED_MAX {
            return no("cannot be taken while so many others are being taken back: try again in ten minutes");
        }
        let mine = self.delegations_of(caller).count();
        if mine >= KEYS_OF_USER_MAX {
            return no(&format!(
                "would be your {}th, the limit is {KEYS_OF_USER_MAX}: take some back with `karez key revoke`",
                mine + 1
            ));
        }
        let has = self.budget(UserId(caller));
        if delegation.credits > has {
            return Err(Denial::Budget {
                has,
                wants: delegation.credits,
            });
        }
        let admitted = Member {
            role: Role::User,
            institution: member.institution,
            name: delegation.name.clone(),
            since: now.utc,
        };
        let mut changes = vec![
            put(MEMBERS, &delegation.key.0, &admitted),
            put(DELEGATIONS, &delegation.key.0, &delegation),
        ];
        changes.extend(self.lend(now, &delegation, delegation.credits, true)?);
        self.members.insert(delegation.key, admitted);
        out.push(Effect::Persist(changes));
        out.push(Effect::Log(format!(
            "user {} delegated the key {} with {} credits",
            caller.short(),
            delegation.key.short(),
            delegation.credits
        )));
        let credits = delegation.credits;
        self.delegations.insert(delegation.key, delegation);
        Ok(credits)
    }

    /// Calls off what the key ordered, takes its budget back and forgets it.
    fn revoke(
        &mut self,
        now: Now,
        caller: PublicKey,
        key: PublicKey,
        out: &mut Vec<Effect>,
    ) -> Result<Credits, Denial> {
        let Some(delegation) = self.delegations.get(&key).filter(|d| d.user.0 == caller).cloned() else {
            return Err(Denial::Key(
                "is none of yours: `karez key list` names them".into(),
            ));
        };
        let open: Vec<_> = self
            .jobs
            .values()
            .filter(|job| job.order.user.0 == key && !job.state.ended())
            .map(|job| job.id)
            .collect();
        for job in open {
            self.end_job(
                now,
                job,
                JobState::Cancelled,
                "its key was taken back".into(),
                out,
            );
        }
        let left = self.budget(UserId(key));
        let mut changes = vec![
            Change::Delete {
                table: MEMBERS,
                key: key.0.to_vec(),
            },
            Change::Delete {
                table: DELEGATIONS,
                key: key.0.to_vec(),
            },
        ];
        changes.extend(self.lend(now, &delegation, left, false)?);
        self.members.remove(&key);
        self.delegations.remove(&key);
        changes.push(put(REVOKED, &delegation.id().0, &delegation.issued_at));
        self.revoked.insert(delegation.id(), delegation.issued_at);
        out.push(Effect::Persist(changes));
        Ok(left)
    }

    /// Moves credits from the user to the key, or back.
    fn lend(
        &mut self,
        now: Now,
        delegation: &Verified<Delegation>,
        credits: Credits,
        there: bool,
    ) -> Result<Option<Change>, Denial> {
        if credits == Credits::ZERO {
            return Ok(None);
        }
        let (user, key) = (
            Account::User(delegation.user),
            Account::User(UserId(delegation.key)),
        );
        let (from, to) = if there { (user, key) } else { (key, user) };
        let evidence = vec![delegation.encode()];
        let posting = Posting::transfer(PostingKind::Grant, from, to, credits, evidence)
            .ok_or_else(|| Denial::Key("has more credits than an account can hold".into()))?;
        self.accounts.apply(&posting).map_err(Denial::Ledger)?;
        Ok(Some(Change::Post { posting, at: now.utc }))
    }

    /// May the key still sign orders?
    pub(super) fn still_delegated(&self, now: Now, key: PublicKey) -> Result<(), Denial> {
        match self.delegations.get(&key) {
            Some(d) if d.expires_at <= now.utc => Err(Denial::Key(
                "has expired: make another with `karez key new`".into(),
            )),
            _ => Ok(()),
        }
    }

    /// The keys that `user` has delegated.
    pub fn delegations_of(&self, user: PublicKey) -> impl Iterator<Item = &Verified<Delegation>> {
        self.delegations.values().filter(move |d| d.user.0 == user)
    }

    /// By which delegation a key signs; nothing for a key of its own right.
    pub fn delegation(&self, key: &PublicKey) -> Option<&Verified<Delegation>> {
        self.delegations.get(key)
    }
}
