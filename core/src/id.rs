//! Names of things: digests, jobs, leases, institutions, countries.
use crate::prelude::*;
use core::fmt;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// 32 bytes of BLAKE3.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }
    /// The first twelve hex digits, for people.
    pub fn short(&self) -> String {
        hex::encode(&self.0[..6])
    }

    /// All 64 hex digits, without a string of their own.
    fn with_hex<T>(&self, then: impl FnOnce(&str) -> T) -> T {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let mut hex = [0; 64];
        for (two, byte) in hex.chunks_exact_mut(2).zip(self.0) {
            two.copy_from_slice(&[DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]]);
        }
        // Digits are ASCII.
        then(core::str::from_utf8(&hex).unwrap_or_default())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.with_hex(|hex| f.write_str(hex))
    }
}
impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.short())
    }
}
impl core::str::FromStr for Digest {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        let mut out = [0; 32];
        hex::decode_to_slice(text, &mut out).map_err(|_| NameError::new("digest", text, "64 hex digits"))?;
        Ok(Self(out))
    }
}
impl TryFrom<&[u8]> for Digest {
    type Error = NameError;
    fn try_from(bytes: &[u8]) -> Result<Self, NameError> {
        bytes
            .try_into()
            .map(Self)
            .map_err(|_| NameError::new("digest", &hex::encode(bytes), "32 bytes"))
    }
}
impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        self.with_hex(|hex| to.serialize_str(hex))
    }
}
impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        /// A ledger's file has millions: they are read where they stand.
        struct Hex;
        impl serde::de::Visitor<'_> for Hex {
            type Value = Digest;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("64 hex digits")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Digest, E> {
                text.parse().map_err(E::custom)
            }
        }
        from.deserialize_str(Hex)
    }
}

/// The id of a signed record: the digest of its type and payload, whoever signed it.
pub type RecordId = Digest;

/// A job is named by the order that asked for it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct JobId(pub RecordId);

impl JobId {
    /// The first twelve hex digits, for people.
    pub fn short(&self) -> String {
        self.0.short()
    }
}
impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
impl fmt::Debug for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "job {}", self.0.short())
    }
}

/// The number of a part within its job, from 0.
pub type PartIndex = u32;

/// Counts the attempts at one part. A later fence makes every earlier lease of that part void.
pub type Fence = u64;

/// Names one attempt at one part of one job, hence one lease.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LeaseKey {
    /// The job.
    pub job: JobId,
    /// Which part of it.
    pub part: PartIndex,
    /// Which attempt at that part, from 1.
    pub fence: Fence,
}

impl fmt::Display for LeaseKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}#{}", self.job.short(), self.part, self.fence)
    }
}
impl fmt::Debug for LeaseKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A name in text that breaks its rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} {text:?} is not valid: expected {expected}")]
pub struct NameError {
    what: &'static str,
    text: String,
    expected: &'static str,
}

impl NameError {
    fn new(what: &'static str, text: &str, expected: &'static str) -> Self {
        Self {
            what,
            text: text.chars().take(80).collect(),
            expected,
        }
    }
}

/// The short name of an institution: `uni-nairobi`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Institution(String);

impl Institution {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}
impl fmt::Display for Institution {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
impl core::str::FromStr for Institution {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        let ok = (2..=63).contains(&text.len())
            && text
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.')
            && !text.starts_with(['-', '.'])
            && !text.ends_with(['-', '.']);
        if ok {
            Ok(Self(text.to_owned()))
        } else {
            Err(NameError::new(
                "institution",
                text,
                "2 to 63 of a-z, 0-9, dash and dot, like uni-nairobi",
            ))
        }
    }
}
impl TryFrom<String> for Institution {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}
impl From<Institution> for String {
    fn from(name: Institution) -> String {
        name.0
    }
}

/// Two capital letters of ISO 3166-1: `KE`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Country([u8; 2]);

impl Country {
    /// The two letters.
    pub fn as_str(&self) -> &str {
        core::str::from_utf8(&self.0).unwrap_or("??")
    }
}
impl fmt::Display for Country {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
impl fmt::Debug for Country {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
impl core::str::FromStr for Country {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        match text.as_bytes() {
            [a, b] if a.is_ascii_alphabetic() && b.is_ascii_alphabetic() => {
                Ok(Self([a.to_ascii_uppercase(), b.to_ascii_uppercase()]))
            }
            _ => Err(NameError::new(
                "country",
                text,
                "two letters of ISO 3166-1, like KE",
            )),
        }
    }
}
impl TryFrom<String> for Country {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}
impl From<Country> for String {
    fn from(country: Country) -> String {
        country.as_str().to_owned()
    }
}
