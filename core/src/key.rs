//! Ed25519 keys as identities. Signing is deterministic, so it may live in the pure core; drawing keys may not.
use crate::prelude::*;
use core::fmt;
use ed25519_dalek::{Signature, Signer, VerifyingKey};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A party's secret key. Drawn and kept by the shells.
pub type SecretKey = ed25519_dalek::SigningKey;

/// The public half of a party's one key: its id everywhere. 32 bytes.
///
/// Holding one says nothing about its strength; [`PublicKey::check`] refuses the weak ones, and every door
/// through which foreign keys enter calls it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey(pub [u8; 32]);

/// The y of every point of small order, without the sign of x: 0, 1, two of order 8, and p - 1, p, p + 1.
const SMALL_ORDER_Y: [[u8; 32]; 7] = {
    let mut one = [0; 32];
    one[0] = 1;
    [
        [0; 32],
        one,
        [
            0x26, 0xe8, 0x95, 0x8f, 0xc2, 0xb2, 0x27, 0xb0, 0x45, 0xc3, 0xf4, 0x89, 0xf2, 0xef, 0x98, 0xf0,
            0xd5, 0xdf, 0xac, 0x05, 0xd3, 0xc6, 0x33, 0x39, 0xb1, 0x38, 0x02, 0x88, 0x6d, 0x53, 0xfc, 0x05,
        ],
        [
            0xc7, 0x17, 0x6a, 0x70, 0x3d, 0x4d, 0xd8, 0x4f, 0xba, 0x3c, 0x0b, 0x76, 0x0d, 0x10, 0x67, 0x0f,
            0x2a, 0x20, 0x53, 0xfa, 0x2c, 0x39, 0xcc, 0xc6, 0x4e, 0xc7, 0xfd, 0x77, 0x92, 0xac, 0x03, 0x7a,
        ],
        around_p(0xec),
        around_p(0xed),
        around_p(0xee),
    ]
};

/// p = 2^255 - 19 with another lowest byte.
const fn around_p(low: u8) -> [u8; 32] {
    let mut y = [0xff; 32];
    y[0] = low;
    y[31] = 0x7f;
    y
}

/// Why bytes are not an acceptable key or signature.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Not 32 bytes, or not 64 hex digits.
    #[error("a key is 32 bytes (64 hex digits)")]
    Length,
    /// Not a point on the curve, or one of the few points under which anyone can forge.
    #[error("the key is weak or not a curve point: create a new one with `karez init`")]
    Weak,
    /// The signature does not match.
    #[error("the signature does not match")]
    Signature,
}

impl PublicKey {
    /// The public half of `secret`.
    pub fn of(secret: &SecretKey) -> Self {
        Self(secret.verifying_key().to_bytes())
    }

    /// Reads 32 bytes and refuses weak keys.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, KeyError> {
        let key = Self(bytes.try_into().map_err(|_| KeyError::Length)?);
        key.check()?;
        Ok(key)
    }

    /// Reads 32 bytes that a record or a file merely names, and refuses the few keys under which anyone can forge.
    ///
    /// Whether the rest is a point of the curve shows when a signature is checked: no bytes that are none verify
    /// anything. This is what makes reading a record a hundred times cheaper than checking its signature.
    pub fn named(bytes: &[u8]) -> Result<Self, KeyError> {
        let key = Self(bytes.try_into().map_err(|_| KeyError::Length)?);
        if key.is_of_small_order() {
            Err(KeyError::Weak)
        } else {
            Ok(key)
        }
    }

    /// Is it one of the encodings (some with y not reduced) of the eight points of small order?
    fn is_of_small_order(&self) -> bool {
        let mut y = self.0;
        y[31] &= 0x7f;
        SMALL_ORDER_Y.contains(&y)
    }

    /// Refuses keys under which signatures prove nothing.
    pub fn check(&self) -> Result<VerifyingKey, KeyError> {
        let key = VerifyingKey::from_bytes(&self.0).map_err(|_| KeyError::Weak)?;
        if key.is_weak() {
            Err(KeyError::Weak)
        } else {
            Ok(key)
        }
    }

    /// Strict verification: `verify` alone would accept forgeries under weak keys.
    pub fn verify(&self, message: &[u8], signature: &[u8; 64]) -> Result<(), KeyError> {
        self.check()?
            .verify_strict(message, &Signature::from_bytes(signature))
            .map_err(|_| KeyError::Signature)
    }

    /// The first ten hex digits, for people.
    pub fn short(&self) -> String {
        hex::encode(&self.0[..5])
    }
}

/// Signs `message`; the same key and message always give the same signature.
pub fn sign(secret: &SecretKey, message: &[u8]) -> [u8; 64] {
    secret.sign(message).to_bytes()
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.short())
    }
}

impl core::str::FromStr for PublicKey {
    type Err = KeyError;
    fn from_str(text: &str) -> Result<Self, KeyError> {
        Self::from_bytes(&hex::decode(text).map_err(|_| KeyError::Length)?)
    }
}

impl Serialize for PublicKey {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&self.to_string())
    }
}

impl<'de> Deserialize<'de> for PublicKey {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

macro_rules! role {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub PublicKey);

        impl $name {
            /// The first ten hex digits, for people.
            pub fn short(&self) -> String {
                self.0.short()
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0.short())
            }
        }
        impl core::str::FromStr for $name {
            type Err = KeyError;
            fn from_str(text: &str) -> Result<Self, KeyError> {
                text.parse().map(Self)
            }
        }
    };
}
role!(
    /// The key of a provider's machine.
    NodeId
);
role!(
    /// The key of a scheduler.
    SchedulerId
);
role!(
    /// The key of a researcher.
    UserId
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weak_keys_are_refused_even_with_a_matching_signature() {
        // The neutral element: `verify` (not strict) accepts a zero signature under it for any message.
        let mut neutral = [0u8; 32];
        neutral[0] = 1;
        assert_eq!(PublicKey::from_bytes(&neutral), Err(KeyError::Weak));
        assert_eq!(
            PublicKey(neutral).verify(b"anything", &[0; 64]),
            Err(KeyError::Weak)
        );
        assert_eq!(PublicKey::from_bytes(&[1; 31]), Err(KeyError::Length));
    }

    #[test]
    fn the_list_of_weak_keys_is_the_curves() {
        // Every listed y is a point of small order with either sign, or no point at all.
        let mut points = 0;
        for y in SMALL_ORDER_Y {
            for sign in [0, 0x80] {
                let mut bytes = y;
                bytes[31] |= sign;
                assert_eq!(PublicKey::named(&bytes), Err(KeyError::Weak));
                if let Ok(key) = VerifyingKey::from_bytes(&bytes) {
                    assert!(key.is_weak(), "{bytes:x?}");
                    points += 1;
                }
            }
        }
        // Eight points, and those spellings of them that are not reduced or give zero a sign.
        assert!(points >= 8, "{points}");
        for seed in 0..64 {
            let key = PublicKey::of(&SecretKey::from_bytes(&[seed; 32]));
            assert_eq!(PublicKey::named(&key.0), Ok(key));
        }
    }

    #[test]
    fn a_key_reads_what_it_writes() {
        let key = PublicKey::of(&SecretKey::from_bytes(&[7; 32]));
        assert_eq!(key.to_string().parse(), Ok(key));
    }
}
