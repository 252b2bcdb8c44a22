//! Who belongs: members by key, invitations by their uses.
use super::{Admission, Denial, Effect, JoinBy, Reply, RequestId, mind::Controller};
use crate::{
    id::Institution,
    key::{PublicKey, UserId},
    money::{Account, Posting, PostingKind},
    prelude::*,
    records::{Invitation, Role, Verified},
    store::{Change, put},
    unit::{Credits, Now, UtcMillis},
};
use serde::{Deserialize, Serialize};

pub(super) const MEMBERS: &str = "members";
pub(super) const INVITATIONS: &str = "invitations";

/// The most invitations whose uses are remembered; expired ones make room.
pub const REDEMPTIONS_MAX: usize = 100_000;
/// The most members.
const MEMBERS_MAX: usize = 1_000_000;

/// An admitted key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// As what.
    pub role: Role,
    /// Of which institution.
    pub institution: Institution,
    /// A name for people.
    pub name: String,
    /// Since when.
    pub since: UtcMillis,
}

/// How often an invitation was used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Redeemed {
    pub(super) uses: u32,
    pub(super) expires_at: UtcMillis,
}

impl Controller {
    pub(super) fn on_join(
        &mut self,
        now: Now,
        request: RequestId,
        caller: PublicKey,
        name: String,
        by: JoinBy,
        out: &mut Vec<Effect>,
    ) {
        let reply = match self.join(now, caller, name, by, out) {
            Ok(reply) => reply,
            Err(denial) => Reply::Refused(denial),
        };
        out.push(Effect::Reply(request, reply));
    }

    pub(super) fn join(
        &mut self,
        now: Now,
        caller: PublicKey,
        name: String,
        by: JoinBy,
        out: &mut Vec<Effect>,
    ) -> Result<Reply, Denial> {
        let name: String = name.chars().filter(|c| !c.is_control()).take(64).collect();
        let member = |role, institution| Member {
            role,
            institution,
            name,
            since: now.utc,
        };
        let (member, credits, evidence, redeemed) = match by {
            JoinBy::Invitation(invitation) => {
                if let Some(known) = self.already(&caller, invitation.role, &invitation.institution) {
                    return Ok(known);
                }
                let redeemed = self.redeem(now, &invitation, out)?;
                let member = member(invitation.role, invitation.institution.clone());
                (
                    member,
                    invitation.credits,
                    vec![invitation.encode()],
                    Some((invitation.nonce, redeemed)),
                )
            }
            JoinBy::Open { role, institution } => {
                if let Some(known) = self.already(&caller, role, &institution) {
                    return Ok(known);
                }
                let Admission::Open { credits } = self.config.admission else {
                    return Err(Denial::NotAdmitted(caller));
                };
                (member(role, institution), credits, Vec::new(), None)
            }
        };
        if let Some(known) = self.members.get(&caller) {
            return Err(Denial::WrongRole {
                key: caller,
                is: known.role,
                needs: member.role,
            });
        }
        let mut changes = self.admit(now, caller, &member, credits, evidence)?;
        if let Some((nonce, redeemed)) = redeemed {
            self.invitations.insert(nonce, redeemed);
            changes.push(put(INVITATIONS, &nonce.to_be_bytes(), &redeemed));
        }
        out.push(Effect::Persist(changes));
        out.push(Effect::Log(format!(
            "{} {} of {} joined",
            member.role.as_str(),
            caller.short(),
            member.institution
        )));
        let credits = self.budget(UserId(caller));
        Ok(Reply::Joined(member, credits))
    }

    /// Joining twice is joining once.
    fn already(&self, caller: &PublicKey, role: Role, institution: &Institution) -> Option<Reply> {
        let known = self.members.get(caller)?;
        (known.role == role && known.institution == *institution)
            .then(|| Reply::Joined(known.clone(), self.budget(UserId(*caller))))
    }

    fn redeem(
        &mut self,
        now: Now,
        invitation: &Verified<Invitation>,
        out: &mut Vec<Effect>,
    ) -> Result<Redeemed, Denial> {
        let no = |why: &str| Err(Denial::Invitation(why.into()));
        if invitation.scheduler != self.id {
            return no("is another scheduler's");
        }
        if invitation.expires_at <= now.utc {
            return no("has expired");
        }
        let uses = self.invitations.get(&invitation.nonce).map_or(0, |r| r.uses);
        if uses >= invitation.uses_max {
            return no("was used up");
        }
        if self.invitations.len() >= REDEMPTIONS_MAX {
            let expired: Vec<u64> = self
                .invitations
                .iter()
                .filter(|(_, r)| r.expires_at <= now.utc)
                .map(|(nonce, _)| *nonce)
                .collect();
            let mut changes = Vec::new();
            for nonce in expired {
                self.invitations.remove(&nonce);
                changes.push(Change::Delete {
                    table: INVITATIONS,
                    key: nonce.to_be_bytes().to_vec(),
                });
            }
            out.push(Effect::Persist(changes));
            if self.invitations.len() >= REDEMPTIONS_MAX {
                return no("cannot be redeemed while so many others are open");
            }
        }
        Ok(Redeemed {
            uses: uses + 1,
            expires_at: invitation.expires_at,
        })
    }

    pub(super) fn on_admit(
        &mut self,
        now: Now,
        request: RequestId,
        key: PublicKey,
        member: Member,
        credits: Credits,
        out: &mut Vec<Effect>,
    ) {
        if let Some(known) = self.members.get(&key) {
            // Listed before: what stands is told, not what was asked for.
            let reply = if known.role == member.role {
                Reply::Joined(known.clone(), self.budget(UserId(key)))
            } else {
                Reply::Refused(Denial::WrongRole {
                    key,
                    is: known.role,
                    needs: member.role,
                })
            };
            out.push(Effect::Reply(request, reply));
            return;
        }
        let reply = match self.admit(now, key, &member, credits, Vec::new()) {
            Ok(changes) => {
                out.push(Effect::Persist(changes));
                Reply::Joined(member, self.budget(UserId(key)))
            }
            Err(denial) => Reply::Refused(denial),
        };
        out.push(Effect::Reply(request, reply));
    }

    fn admit(
        &mut self,
        now: Now,
        key: PublicKey,
        member: &Member,
        credits: Credits,
        evidence: Vec<Vec<u8>>,
    ) -> Result<Vec<Change>, Denial> {
        if self.members.len() >= MEMBERS_MAX {
            return Err(Denial::Queue {
                open: self.members.len(),
                max: MEMBERS_MAX,
            });
        }
        let mut changes = vec![put(MEMBERS, &key.0, member)];
        if member.role == Role::User && credits > Credits::ZERO {
            let to = Account::User(UserId(key));
            let posting = Posting::transfer(PostingKind::Grant, Account::Federation, to, credits, evidence)
                .ok_or_else(|| {
                Denial::Invitation("gives more credits than an account can hold".into())
            })?;
            self.accounts.apply(&posting).map_err(Denial::Ledger)?;
            changes.push(Change::Post { posting, at: now.utc });
        }
        self.members.insert(key, member.clone());
        Ok(changes)
    }

    /// The caller as a member in that role.
    pub(super) fn need(&self, key: PublicKey, needs: Role) -> Result<&Member, Denial> {
        let member = self.members.get(&key).ok_or(Denial::NotAdmitted(key))?;
        if member.role == needs {
            Ok(member)
        } else {
            Err(Denial::WrongRole {
                key,
                is: member.role,
                needs,
            })
        }
    }

    /// What a user can still spend.
    pub fn budget(&self, user: UserId) -> Credits {
        Credits(u64::try_from(self.accounts.balance(&Account::User(user))).unwrap_or(0))
    }
}
