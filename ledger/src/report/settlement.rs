//! One settled lease with all its papers, read out of a verified entry.
use super::time::Month;
use karez_core::{
    id::{Digest, Institution, RecordId},
    key::{KeyError, PublicKey, UserId},
    money::{Posting, PostingKind},
    records::{Lease, MeterReading, Order, Receipt, Record, SignatureCheck, Signed, Usage, Verified},
};

/// The signatures were checked when the entry was.
struct Before;

impl SignatureCheck for Before {
    fn check(&self, _: &PublicKey, message: &[u8], _: &[u8; 64]) -> Result<RecordId, KeyError> {
        Ok(Digest::of(message))
    }
}

fn open<T: Record>(bytes: &[u8]) -> Option<Verified<T>> {
    Signed::<T>::decode(bytes).ok()?.verify_by(&Before).ok()
}

/// What was asked, promised, measured and billed.
#[derive(Debug, Clone)]
pub struct Settlement {
    /// The order.
    pub order: Verified<Order>,
    /// The lease.
    pub lease: Verified<Lease>,
    /// The last reading: its meters are the usage's, and it says how they were measured.
    pub reading: Verified<MeterReading>,
    /// The usage.
    pub usage: Verified<Usage>,
    /// The receipt.
    pub receipt: Verified<Receipt>,
}

impl Settlement {
    /// Reads a posting that was verified before; `None` for any but a settlement.
    pub fn read(posting: &Posting) -> Option<Self> {
        if posting.kind != PostingKind::Settle {
            return None;
        }
        let [order, lease, .., reading, usage, receipt] = posting.evidence.as_slice() else {
            return None;
        };
        Some(Self {
            order: open(order)?,
            lease: open(lease)?,
            reading: open(reading)?,
            usage: open(usage)?,
            receipt: open(receipt)?,
        })
    }

    /// Is it a GPU's work?
    pub fn gpu(&self) -> bool {
        !self.lease.device_class.starts_with("cpu")
    }

    /// Device class without its kind: `NVIDIA H200` of `cuda/NVIDIA H200`.
    pub fn device_model(&self) -> &str {
        let class = &self.lease.device_class;
        class.split_once('/').map_or(class, |(_, model)| model)
    }
}

/// Names for users in what leaves the house: one for each user, institution and month, made with a secret.
///
/// Whoever has the secret can tell which user it was; nobody else can, and nobody can join the months together. The
/// secret is an institution's own, or the scheduler's; without any, a fresh one makes the names useless afterwards.
#[derive(Clone)]
pub struct Pseudonyms {
    key: [u8; 32],
}

impl std::fmt::Debug for Pseudonyms {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pseudonyms(secret)")
    }
}

impl Pseudonyms {
    /// Names made with `secret`.
    pub fn new(secret: &[u8]) -> Self {
        Self {
            key: blake3::derive_key("karez-ledger/1 pseudonyms", secret),
        }
    }

    /// The name of `user` of `institution` in `month`: `u-` and 20 hex digits.
    pub fn name(&self, user: UserId, institution: &Institution, month: Month) -> String {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        hasher.update(institution.as_str().as_bytes());
        hasher.update(&[0]);
        hasher.update(month.to_string().as_bytes());
        hasher.update(&user.0.0);
        format!("u-{}", hex::encode(&hasher.finalize().as_bytes()[..10]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pseudonym_is_one_in_its_place_and_month_and_another_elsewhere() {
        let names = Pseudonyms::new(b"secret");
        let user = UserId(PublicKey([3; 32]));
        let (here, there): (Institution, Institution) = ("uni-a".parse().unwrap(), "uni-b".parse().unwrap());
        let (now, then): (Month, Month) = ("2026-11".parse().unwrap(), "2026-12".parse().unwrap());
        let name = names.name(user, &here, now);
        assert_eq!(name, names.name(user, &here, now));
        assert_eq!(name.len(), 22);
        for other in [
            names.name(user, &there, now),
            names.name(user, &here, then),
            names.name(UserId(PublicKey([4; 32])), &here, now),
            Pseudonyms::new(b"other").name(user, &here, now),
        ] {
            assert_ne!(other, name);
        }
    }
}
