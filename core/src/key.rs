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
    fn a_key_reads_what_it_writes() {
        let key = PublicKey::of(&SecretKey::from_bytes(&[7; 32]));
        assert_eq!(key.to_string().parse(), Ok(key));
    }
}
