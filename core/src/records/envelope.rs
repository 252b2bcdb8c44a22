//! The envelope: exact bytes, a signature with domain separation, verification before decoding.
use crate::{
    id::{Digest, RecordId},
    key::{self, KeyError, PublicKey, SecretKey},
    prelude::*,
};
use core::{fmt, marker::PhantomData, ops::Deref};
use karez_proto::records as wire;
use prost::Message;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A kind of record: its type name, its size cap and its wire form.
pub trait Record: Sized + Clone {
    /// Bound into the signature, so that bytes signed as one type never verify as another.
    const TYPE: &'static str;
    /// The largest payload, in bytes; checked before decoding.
    const BYTES_MAX: usize;
    /// The generated message.
    type Wire: Message + Default;

    /// For signing.
    fn to_wire(&self) -> Self::Wire;
    /// Checks every field: lengths, ranges, names.
    fn from_wire(wire: Self::Wire) -> Result<Self, RecordError>;
    /// Whose signature the record must carry.
    fn signer(&self) -> PublicKey;
}

/// Why a record was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Over the cap; nothing was decoded.
    #[error("{record} is {bytes} bytes, the limit is {max}")]
    TooLarge {
        /// The type of record.
        record: &'static str,
        /// Its size.
        bytes: usize,
        /// The cap.
        max: usize,
    },
    /// Not a protobuf message of that shape.
    #[error("{record} cannot be decoded: {why}")]
    Malformed {
        /// The type of record.
        record: &'static str,
        /// What is wrong.
        why: String,
    },
    /// The envelope says it carries another type.
    #[error("expected {expected}, the envelope carries {got:?}")]
    WrongType {
        /// What was asked for.
        expected: &'static str,
        /// What the envelope names.
        got: String,
    },
    /// The signature or the key is bad.
    #[error("{record} signed by {signer}: {error}")]
    Signature {
        /// The type of record.
        record: &'static str,
        /// Who is said to have signed, shortened.
        signer: String,
        /// What is wrong.
        error: KeyError,
    },
    /// Properly signed, but not by the party it speaks for.
    #[error("{record} speaks for {expected} but is signed by {signer}")]
    WrongSigner {
        /// The type of record.
        record: &'static str,
        /// Who should have signed, shortened.
        expected: String,
        /// Who did, shortened.
        signer: String,
    },
    /// A field breaks its rule.
    #[error("{record}: {field} {why}")]
    Field {
        /// The type of record.
        record: &'static str,
        /// Which field.
        field: &'static str,
        /// Which rule.
        why: String,
    },
}

/// The exact bytes somebody signed (or claims to have). Nothing in it may be acted upon before [`Signed::verify`].
#[derive(Clone, PartialEq, Eq)]
pub struct Signed<T> {
    payload: Vec<u8>,
    signer: PublicKey,
    signature: [u8; 64],
    record: PhantomData<T>,
}

/// A record whose signature, signer and fields were all checked. Reads like the record itself.
#[derive(Clone, PartialEq, Eq)]
pub struct Verified<T> {
    signed: Signed<T>,
    value: T,
    id: RecordId,
}

/// Decides whether signatures hold: [`Strict`] looks at each by itself, a verifier of many may have looked at them
/// together before. Whoever says yes without having checked breaks everything that relies on [`Verified`].
pub trait SignatureCheck {
    /// Did `signer` sign `message`? Gives the record's id, the digest of `message`, which may be known already.
    fn check(&self, signer: &PublicKey, message: &[u8], signature: &[u8; 64]) -> Result<RecordId, KeyError>;
}

/// Each signature by itself, by [`PublicKey::verify`].
#[derive(Debug, Clone, Copy)]
pub struct Strict;

impl SignatureCheck for Strict {
    fn check(&self, signer: &PublicKey, message: &[u8], signature: &[u8; 64]) -> Result<RecordId, KeyError> {
        signer.verify(message, signature)?;
        Ok(Digest::of(message))
    }
}

/// What an envelope's signature is about, for those who check many at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToCheck {
    /// Who is said to have signed.
    pub signer: PublicKey,
    /// What was signed: its digest is the record's id.
    pub message: Vec<u8>,
    /// The signature.
    pub signature: [u8; 64],
}

/// Reads an envelope of any type up to what its signature is about; `None` for bytes that are not an envelope written
/// in the one right way.
pub fn to_check(envelope: &[u8]) -> Option<ToCheck> {
    let parts = Parts::read(envelope)?;
    Some(ToCheck {
        signer: PublicKey(*parts.signer),
        signature: *parts.signature,
        message: to_be_signed(parts.kind, parts.payload),
    })
}

/// Are these bytes an envelope, written in the one right way? Protobuf allows others: fields in another order or twice,
/// longer numbers, unknown fields.
pub fn is_canonical(envelope: &[u8]) -> bool {
    Parts::read(envelope).is_some()
}

/// The fields of an envelope where they stand: a ledger has millions, and copying them costs more than reading them.
struct Parts<'a> {
    kind: &'a str,
    payload: &'a [u8],
    signer: &'a [u8; 32],
    signature: &'a [u8; 64],
}

impl<'a> Parts<'a> {
    /// `None` for everything that is not just what [`Signed::encode`] writes.
    fn read(envelope: &'a [u8]) -> Option<Self> {
        let mut rest = envelope;
        let kind = take(&mut rest, 1)?;
        let payload = take(&mut rest, 2)?;
        let signer = take(&mut rest, 3)?.try_into().ok()?;
        let signature = take(&mut rest, 4)?.try_into().ok()?;
        rest.is_empty().then_some(Self {
            kind: core::str::from_utf8(kind).ok()?,
            payload,
            signer,
            signature,
        })
    }
}

/// The field `number` of bytes that begin with it; an empty field is not written at all.
fn take<'a>(rest: &mut &'a [u8], number: u8) -> Option<&'a [u8]> {
    const LENGTH_DELIMITED: u8 = 2;
    if rest.first() != Some(&(number << 3 | LENGTH_DELIMITED)) {
        return Some(&[]);
    }
    let mut len = 0_usize;
    // Four bytes of seven bits: more than any record may have.
    for (i, byte) in rest.get(1..)?.iter().take(4).enumerate() {
        len |= usize::from(byte & 0x7f) << (7 * i);
        if byte & 0x80 != 0 {
            continue;
        }
        let padded = *byte == 0;
        let (field, after) = rest.get(2 + i..)?.split_at_checked(len)?;
        *rest = after;
        // That is also a length of zero.
        return (!padded).then_some(field);
    }
    None
}

/// DSSE-style pre-authentication encoding: lengths make the split between type and payload unambiguous.
fn to_be_signed(kind: &str, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(48 + kind.len() + payload.len());
    out.extend_from_slice(b"KarezV1 ");
    decimal(&mut out, kind.len());
    out.extend_from_slice(kind.as_bytes());
    out.push(b' ');
    decimal(&mut out, payload.len());
    out.extend_from_slice(payload);
    out
}

/// A number and a space.
fn decimal(out: &mut Vec<u8>, mut n: usize) {
    let mut digits = [b' '; 21];
    let mut at = 20;
    loop {
        at -= 1;
        digits[at] = b'0' + (n % 10) as u8;
        n /= 10;
        if n == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[at..]);
}

fn record_id(kind: &str, payload: &[u8]) -> RecordId {
    Digest::of(&to_be_signed(kind, payload))
}

impl<T: Record> Signed<T> {
    /// Room for the envelope's own fields around the payload.
    const ENVELOPE_OVERHEAD: usize = 256;

    /// Signs `record` and keeps the bytes. The caller's key must be the record's signer: anything else fails to verify.
    pub fn sign(record: T, secret: &SecretKey) -> Verified<T> {
        let payload = record.to_wire().encode_to_vec();
        let message = to_be_signed(T::TYPE, &payload);
        let signature = key::sign(secret, &message);
        let id = Digest::of(&message);
        Verified {
            signed: Self {
                payload,
                signer: PublicKey::of(secret),
                signature,
                record: PhantomData,
            },
            value: record,
            id,
        }
    }

    /// Reads an envelope. Caps are checked before anything is decoded.
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        let max = T::BYTES_MAX + Self::ENVELOPE_OVERHEAD;
        if bytes.len() > max {
            return Err(RecordError::TooLarge {
                record: T::TYPE,
                bytes: bytes.len(),
                max,
            });
        }
        if let Some(parts) = Parts::read(bytes).filter(|parts| parts.kind == T::TYPE)
            && parts.payload.len() <= T::BYTES_MAX
        {
            return Ok(Self {
                payload: parts.payload.to_vec(),
                signer: PublicKey(*parts.signer),
                signature: *parts.signature,
                record: PhantomData,
            });
        }
        // Anything else is read with patience, to say what is wrong; other spellings of a record are fine outside the
        // ledger.
        let malformed = |why: String| RecordError::Malformed { record: T::TYPE, why };
        let envelope = wire::Envelope::decode(bytes).map_err(|e| malformed(e.to_string()))?;
        if envelope.r#type != T::TYPE {
            return Err(RecordError::WrongType {
                expected: T::TYPE,
                got: envelope.r#type.chars().take(64).collect(),
            });
        }
        if envelope.payload.len() > T::BYTES_MAX {
            return Err(RecordError::TooLarge {
                record: T::TYPE,
                bytes: envelope.payload.len(),
                max: T::BYTES_MAX,
            });
        }
        let signer = envelope
            .signer
            .as_slice()
            .try_into()
            .map_err(|_| malformed("signer is not 32 bytes".into()))?;
        let signature = envelope
            .signature
            .as_slice()
            .try_into()
            .map_err(|_| malformed("signature is not 64 bytes".into()))?;
        Ok(Self {
            payload: envelope.payload,
            signer: PublicKey(signer),
            signature,
            record: PhantomData,
        })
    }

    /// The envelope as bytes: decodes to the same record with the same id.
    pub fn encode(&self) -> Vec<u8> {
        wire::Envelope {
            r#type: T::TYPE.to_owned(),
            payload: self.payload.clone(),
            signer: self.signer.0.to_vec(),
            signature: self.signature.to_vec(),
        }
        .encode_to_vec()
    }

    /// Checks signature, then fields, then that the right party signed.
    pub fn verify(self) -> Result<Verified<T>, RecordError> {
        self.verify_by(&Strict)
    }

    /// As [`Signed::verify`], with another way to check the signature.
    pub fn verify_by(self, by: &dyn SignatureCheck) -> Result<Verified<T>, RecordError> {
        let message = to_be_signed(T::TYPE, &self.payload);
        let checked = by.check(&self.signer, &message, &self.signature);
        let id = checked.map_err(|error| RecordError::Signature {
            record: T::TYPE,
            signer: self.signer.short(),
            error,
        })?;
        let decoded = T::Wire::decode(self.payload.as_slice()).map_err(|e| RecordError::Malformed {
            record: T::TYPE,
            why: e.to_string(),
        })?;
        let value = T::from_wire(decoded)?;
        if value.signer() != self.signer {
            return Err(RecordError::WrongSigner {
                record: T::TYPE,
                expected: value.signer().short(),
                signer: self.signer.short(),
            });
        }
        Ok(Verified {
            id,
            signed: self,
            value,
        })
    }

    /// Decodes and verifies in one step.
    pub fn open(bytes: &[u8]) -> Result<Verified<T>, RecordError> {
        Self::decode(bytes)?.verify()
    }
}

impl<T: Record> Verified<T> {
    /// The id of the record: what later records name it by.
    pub fn id(&self) -> RecordId {
        self.id
    }
    /// The bytes that travel and are kept.
    pub fn encode(&self) -> Vec<u8> {
        self.signed.encode()
    }
    /// The record alone.
    pub fn into_inner(self) -> T {
        self.value
    }
}

/// The type, id and signer an encoded envelope claims, for listings; nothing is verified.
pub fn describe(envelope: &[u8]) -> Option<(String, RecordId, PublicKey)> {
    if let Some(parts) = Parts::read(envelope) {
        let id = record_id(parts.kind, parts.payload);
        return Some((parts.kind.to_owned(), id, PublicKey(*parts.signer)));
    }
    let envelope = wire::Envelope::decode(envelope).ok()?;
    let signer = PublicKey(envelope.signer.as_slice().try_into().ok()?);
    let id = record_id(&envelope.r#type, &envelope.payload);
    Some((envelope.r#type, id, signer))
}

impl<T> Deref for Verified<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T: fmt::Debug> fmt::Debug for Verified<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Verified({:?}, {:?})", self.id, self.value)
    }
}

impl<T: Record> fmt::Debug for Signed<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Signed({}, {} bytes, by {:?})",
            T::TYPE,
            self.payload.len(),
            self.signer
        )
    }
}

/// Stored as the hex of its envelope, and verified again when read: a store is foreign bytes too.
impl<T: Record> Serialize for Verified<T> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&hex::encode(self.encode()))
    }
}

impl<'de, T: Record> Deserialize<'de> for Verified<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        use serde::de::Error;
        let bytes = hex::decode(String::deserialize(from)?).map_err(D::Error::custom)?;
        Signed::open(&bytes).map_err(D::Error::custom)
    }
}
