//! Many signatures checked together, as strictly as one by one, for a quarter of the time.
//!
//! One Ed25519 signature (R, s) of a message M under a key A holds when s·B = R + h·A, with h the SHA-512 of R, A
//! and M; "strictly" means that the equation holds exactly (no factor of eight), that R and s are written in their
//! one canonical form and that neither R nor A is of small order. For many signatures the sum of all equations,
//! each times a random 128-bit number, is checked instead: a forgery passes with a chance of 2^-128. Signatures under
//! one key share one multiplication, and the ledger has few keys and many signatures.
//!
//! That sum alone would overlook an R that differs from the right one by a point of small order. So every key must be
//! free of such a part (checked once), and so must 32 sums over random halves of the Rs: such a difference then goes
//! unseen with a chance of 2^-32. It would take the signer's own secret key to make one, and the record's content
//! would still be what was signed.
//!
//! A batch that does not pass is checked signature by signature, so that the culprit has a name.
use curve25519_dalek::{
    EdwardsPoint, Scalar,
    constants::ED25519_BASEPOINT_POINT,
    edwards::CompressedEdwardsY,
    traits::{Identity, IsIdentity, VartimeMultiscalarMul},
};
use karez_core::{
    id::{Digest, RecordId},
    key::{KeyError, PublicKey},
    records::{SignatureCheck, Strict, ToCheck},
};
use sha2::{Digest as _, Sha512};
use std::collections::{HashMap, HashSet};

/// Fewer than this are quicker one by one.
pub(crate) const TOGETHER_MIN: usize = 64;
/// Keys whose points are kept; more than any federation has nodes at work.
const KEYS_MAX: usize = 200_000;
/// Bytes of each random number whose bits choose halves: eight rounds a byte.
const HALVES_BYTES: usize = 4;

/// What was found to hold: asking for a signature again costs a look-up, and any other is checked by itself.
#[derive(Default)]
pub struct Checker {
    keys: HashMap<PublicKey, Option<EdwardsPoint>>,
    holds: HashMap<[u8; 64], Held>,
    /// The batch before: orders come again with each of their parts.
    before: HashMap<[u8; 64], Held>,
    random: Option<blake3::OutputReader>,
}

/// What a signature that holds is for.
struct Held {
    id: RecordId,
    signer: PublicKey,
    message: Vec<u8>,
}

impl Held {
    fn is(&self, signer: &PublicKey, message: &[u8]) -> bool {
        self.signer == *signer && self.message == message
    }
}

impl std::fmt::Debug for Checker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Checker({} hold)", self.holds.len())
    }
}

impl Checker {
    /// Checks `items` together and remembers those that hold, and those of the call before. Tells nothing about the
    /// others: [`SignatureCheck::check`] says what is wrong with each.
    pub fn take(&mut self, items: impl IntoIterator<Item = ToCheck>) {
        self.before = std::mem::take(&mut self.holds);
        let mut known = HashSet::new();
        let mut unknown = Vec::new();
        for item in items {
            if self.known(&item.signer, &item.message, &item.signature).is_some() {
                if let Some(held) = self.before.remove(&item.signature) {
                    self.holds.insert(item.signature, held);
                }
            } else if known.insert(item.signature) {
                unknown.push(item);
            }
        }
        if unknown.len() >= TOGETHER_MIN && self.hold_together(&unknown) == Some(true) {
            self.holds.extend(unknown.into_iter().map(|item| {
                let held = Held {
                    id: Digest::of(&item.message),
                    signer: item.signer,
                    message: item.message,
                };
                (item.signature, held)
            }));
        }
    }

    /// The id of a record whose signature was found to hold.
    fn known(&self, signer: &PublicKey, message: &[u8], signature: &[u8; 64]) -> Option<RecordId> {
        let found = |held: &HashMap<[u8; 64], Held>| {
            let held = held.get(signature).filter(|held| held.is(signer, message));
            held.map(|held| held.id)
        };
        found(&self.holds).or_else(|| found(&self.before))
    }

    /// The point of a key, when signatures under it may be summed up.
    fn point(&mut self, key: &PublicKey) -> Option<EdwardsPoint> {
        if let Some(known) = self.keys.get(key) {
            return *known;
        }
        let point = decompress(&key.0).filter(EdwardsPoint::is_torsion_free);
        if self.keys.len() >= KEYS_MAX {
            self.keys.clear();
        }
        self.keys.insert(*key, point);
        point
    }

    /// `None` when one of them has a form that only the single check judges.
    fn hold_together(&mut self, items: &[ToCheck]) -> Option<bool> {
        let mut randoms = vec![[0u8; 16]; items.len()];
        {
            let random = self.random()?;
            randoms.iter_mut().for_each(|bytes| random.fill(bytes));
        }
        let mut keys: HashMap<PublicKey, (EdwardsPoint, Scalar)> = HashMap::new();
        let mut base = Scalar::ZERO;
        let mut scalars = Vec::with_capacity(items.len() + 64);
        let mut points = Vec::with_capacity(items.len() + 64);
        for (item, random) in items.iter().zip(&randoms) {
            let (r, s) = item.signature.split_first_chunk::<32>()?;
            let s: Option<Scalar> = Scalar::from_canonical_bytes(s.try_into().ok()?).into();
            let s = s?;
            let commitment = decompress(r)?;
            let h = Scalar::from_bytes_mod_order_wide(
                &Sha512::new()
                    .chain_update(r)
                    .chain_update(item.signer.0)
                    .chain_update(&item.message)
                    .finalize()
                    .into(),
            );
            let z = Scalar::from(u128::from_le_bytes(*random));
            base += z * s;
            match keys.get_mut(&item.signer) {
                Some((_, sum)) => *sum += z * h,
                None => {
                    let point = self.point(&item.signer)?;
                    keys.insert(item.signer, (point, z * h));
                }
            }
            scalars.push(z);
            points.push(commitment);
        }
        if !free_of_torsion(&points, &randoms) {
            return Some(false);
        }
        for (point, sum) in keys.into_values() {
            scalars.push(sum);
            points.push(point);
        }
        scalars.push(-base);
        points.push(ED25519_BASEPOINT_POINT);
        let sum = EdwardsPoint::vartime_multiscalar_mul(&scalars, &points);
        Some(sum.is_identity())
    }

    /// `None` where the operating system gives no randomness.
    fn random(&mut self) -> Option<&mut blake3::OutputReader> {
        if self.random.is_none() {
            let mut seed = [0; 32];
            getrandom::fill(&mut seed).ok()?;
            let hasher = blake3::Hasher::new_keyed(&seed);
            self.random = Some(hasher.finalize_xof());
        }
        self.random.as_mut()
    }
}

impl SignatureCheck for Checker {
    fn check(&self, signer: &PublicKey, message: &[u8], signature: &[u8; 64]) -> Result<RecordId, KeyError> {
        match self.known(signer, message, signature) {
            Some(id) => Ok(id),
            None => Strict.check(signer, message, signature),
        }
    }
}

/// The point of a canonical encoding that is not of small order.
fn decompress(bytes: &[u8; 32]) -> Option<EdwardsPoint> {
    // y of p or more: only 19 such, all with these bytes.
    let middle = bytes[1..31].iter().all(|b| *b == 0xff);
    let reduced = !(middle && bytes[31] & 0x7f == 0x7f && bytes[0] >= 0xed);
    if !reduced || PublicKey::named(bytes).is_err() {
        return None;
    }
    CompressedEdwardsY(*bytes).decompress()
}

/// Sums over random halves of `points`: if one point has a part of small order, each sum shows it with a chance of a
/// half or more. Eight halves at a time: each point is added to the bucket of its random byte, and the buckets make
/// up all eight sums.
fn free_of_torsion(points: &[EdwardsPoint], randoms: &[[u8; 16]]) -> bool {
    for byte in 0..HALVES_BYTES {
        let mut buckets = vec![EdwardsPoint::identity(); 256];
        for (point, random) in points.iter().zip(randoms) {
            let bucket = &mut buckets[usize::from(random[byte])];
            *bucket += point;
        }
        while buckets.len() > 1 {
            let upper = buckets.split_off(buckets.len() / 2);
            let sum: EdwardsPoint = upper.iter().sum();
            if !sum.is_torsion_free() {
                return false;
            }
            for (low, high) in buckets.iter_mut().zip(&upper) {
                *low += high;
            }
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use curve25519_dalek::constants::EIGHT_TORSION;
    use karez_core::key::{SecretKey, sign};

    fn items(count: u32) -> Vec<ToCheck> {
        (0..count)
            .map(|n| {
                let secret = SecretKey::from_bytes(&[(n % 7) as u8 + 1; 32]);
                let message = format!("record {n}").into_bytes();
                ToCheck {
                    signer: PublicKey::of(&secret),
                    signature: sign(&secret, &message),
                    message,
                }
            })
            .collect()
    }

    fn together(items: &[ToCheck]) -> Option<bool> {
        Checker::default().hold_together(items)
    }

    #[test]
    fn good_signatures_hold_and_any_flipped_bit_does_not() {
        let good = items(100);
        assert_eq!(together(&good), Some(true));
        for at in 0..512 {
            let mut bad = good.clone();
            bad[at % 100].signature[at / 8] ^= 1 << (at % 8);
            assert_ne!(together(&bad), Some(true), "bit {at}");
        }
        let mut bad = good.clone();
        bad[3].message.push(0);
        assert_eq!(together(&bad), Some(false));
        let mut bad = good.clone();
        bad[3].signer = bad[4].signer;
        assert_eq!(together(&bad), Some(false));
        // Two wrongs that would cancel out without the random factors.
        let mut bad = good;
        let delta = Scalar::from(5u8);
        for (i, sign) in [(0, delta), (7, -delta)] {
            let s = Scalar::from_bytes_mod_order(bad[i].signature[32..].try_into().unwrap());
            bad[i].signature[32..].copy_from_slice((s + sign).as_bytes());
        }
        assert_eq!(together(&bad), Some(false));
    }

    /// A signer may shift R by a point of small order and sign accordingly; only the strict equation notices.
    #[test]
    fn what_the_strict_check_refuses_does_not_hold_together() {
        let scalar = Scalar::from(1234567u64);
        let key = EdwardsPoint::mul_base(&scalar);
        for torsion in &EIGHT_TORSION[1..] {
            let mut all = items(100);
            let nonce = Scalar::from(987u64);
            let shifted = (EdwardsPoint::mul_base(&nonce) + torsion).compress().to_bytes();
            let signer = PublicKey(key.compress().to_bytes());
            let message = b"shifted".to_vec();
            let h = Scalar::from_bytes_mod_order_wide(
                &Sha512::new()
                    .chain_update(shifted)
                    .chain_update(signer.0)
                    .chain_update(&message)
                    .finalize()
                    .into(),
            );
            let mut signature = [0; 64];
            signature[..32].copy_from_slice(&shifted);
            signature[32..].copy_from_slice((nonce + h * scalar).as_bytes());
            let item = ToCheck {
                signer,
                message,
                signature,
            };
            assert_eq!(signer.verify(&item.message, &signature), Err(KeyError::Signature));
            all.push(item.clone());
            assert_eq!(together(&all), Some(false));
            let mut checker = Checker::default();
            checker.take(all);
            let answer = checker.check(&item.signer, &item.message, &item.signature);
            assert_eq!(answer, Err(KeyError::Signature));
        }
    }

    #[test]
    fn a_checker_knows_only_what_it_saw() {
        let all = items(100);
        let mut checker = Checker::default();
        checker.take(all.clone());
        assert_eq!(checker.holds.len(), 100);
        let (first, other) = (&all[0], &all[1]);
        let check = |signer, message: &[u8], signature| checker.check(&signer, message, &signature);
        let id = Digest::of(&first.message);
        assert_eq!(check(first.signer, &first.message, first.signature), Ok(id));
        let wrong = Err(KeyError::Signature);
        assert_eq!(check(first.signer, &first.message, other.signature), wrong);
        assert_eq!(check(first.signer, &other.message, first.signature), wrong);
        assert_eq!(check(other.signer, &first.message, first.signature), wrong);
    }

    #[test]
    fn it_remembers_the_batch_before_and_no_more() {
        let all = items(300);
        let mut checker = Checker::default();
        checker.take(all[..100].to_vec());
        // The first ten come again, twice.
        checker.take([&all[100..200], &all[..10], &all[..10]].concat());
        assert_eq!((checker.holds.len(), checker.before.len()), (110, 90));
        checker.take(all[200..].to_vec());
        assert_eq!((checker.holds.len(), checker.before.len()), (100, 110));
        for item in &all {
            let id = Digest::of(&item.message);
            assert_eq!(
                checker.check(&item.signer, &item.message, &item.signature),
                Ok(id)
            );
        }
    }
}
