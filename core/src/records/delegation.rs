//! A delegation: a user lets another key sign orders, within a budget of its own.
use super::{
    envelope::{Record, RecordError},
    wire::{Fields, UTC_MAX},
};
use crate::{
    key::{PublicKey, SchedulerId, UserId},
    prelude::*,
    unit::{Credits, UtcMillis},
};
use karez_proto::records as wire;
use serde::{Deserialize, Serialize};

/// What a user grants to a key: to be a user of the same institution, with credits taken from the user's own. Both
/// ways of the credits, there and back, stand on this record in the ledger.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delegation {
    /// Who grants, and signs.
    pub user: UserId,
    /// At which scheduler.
    pub scheduler: SchedulerId,
    /// To which key. Never the user's own.
    pub key: PublicKey,
    /// What the user calls it.
    pub name: String,
    /// Its budget.
    pub credits: Credits,
    /// When it was signed.
    pub issued_at: UtcMillis,
    /// From when on the key's orders are refused.
    pub expires_at: UtcMillis,
}

impl Record for Delegation {
    const TYPE: &'static str = "karez.delegation.v1";
    const BYTES_MAX: usize = 1024;
    type Wire = wire::Delegation;

    fn signer(&self) -> PublicKey {
        self.user.0
    }

    fn to_wire(&self) -> wire::Delegation {
        wire::Delegation {
            user: self.user.0.0.to_vec(),
            scheduler: self.scheduler.0.0.to_vec(),
            key: self.key.0.to_vec(),
            name: self.name.clone(),
            credits: self.credits.0,
            issued_at: self.issued_at.0,
            expires_at: self.expires_at.0,
        }
    }

    fn from_wire(w: wire::Delegation) -> Result<Self, RecordError> {
        let f = Fields(Self::TYPE);
        let user = UserId(f.key("user", &w.user)?);
        let key = f.key("key", &w.key)?;
        if key == user.0 {
            return Err(f.bad("key", "is the user's own: draw a new one"));
        }
        Ok(Self {
            user,
            scheduler: SchedulerId(f.key("scheduler", &w.scheduler)?),
            key,
            name: f.text("name", w.name, 64)?,
            credits: Credits(f.within("credits", w.credits, i64::MAX as u64)?),
            issued_at: UtcMillis(f.within("issued_at", w.issued_at, UTC_MAX)?),
            expires_at: UtcMillis(f.within("expires_at", w.expires_at, UTC_MAX)?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{key::SecretKey, records::Signed};

    fn delegation(key: PublicKey) -> Delegation {
        Delegation {
            user: UserId(PublicKey::of(&SecretKey::from_bytes(&[1; 32]))),
            scheduler: SchedulerId(PublicKey::of(&SecretKey::from_bytes(&[2; 32]))),
            key,
            name: "laptop".into(),
            credits: Credits(7),
            issued_at: UtcMillis(1),
            expires_at: UtcMillis(2),
        }
    }

    #[test]
    fn only_the_user_can_grant_and_only_to_another_key() {
        let (user, other) = (SecretKey::from_bytes(&[1; 32]), SecretKey::from_bytes(&[3; 32]));
        let record = delegation(PublicKey::of(&other));
        let signed = Signed::sign(record.clone(), &user);
        let read = Signed::<Delegation>::open(&signed.encode()).unwrap();
        assert_eq!(read.into_inner(), record);
        let forged = Signed::sign(record, &other);
        assert!(Signed::<Delegation>::open(&forged.encode()).is_err());
        let own = Signed::sign(delegation(PublicKey::of(&user)), &user);
        let error = Signed::<Delegation>::open(&own.encode()).unwrap_err();
        assert!(format!("{error}").contains("the user's own"), "{error}");
    }
}
