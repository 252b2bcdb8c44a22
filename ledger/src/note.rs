//! Signed notes in the C2SP form: a text, a blank line, and lines with Ed25519 signatures over the text.
//!
//! ```text
//! — NAME base64(key id[4] ‖ signature)
//! key id = SHA-256(NAME ‖ "\n" ‖ kind ‖ public key)[..4]
//! kind   = 1 signature[64] over the text
//!        | 4 time:u64 signature[64] over "cosignature/v1\ntime TIME\n" and the text
//! ```
//!
//! Sources: <https://c2sp.org/signed-note>, <https://c2sp.org/tlog-cosignature>.
use base64::{Engine, prelude::BASE64_STANDARD};
use karez_core::{
    key::{PublicKey, SecretKey, sign},
    unit::UtcMillis,
};
use sha2::{Digest as _, Sha256};
use std::fmt;

/// The longest note that is read, in bytes.
pub const NOTE_BYTES_MAX: usize = 1 << 20;
/// The most signature lines that are read.
pub const SIGNATURES_MAX: usize = 64;

const PLAIN: u8 = 1;
const COSIGNATURE: u8 = 4;

/// Why bytes are no note, or not one that was signed as expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoteError {
    /// Not the form of a note.
    #[error("not a signed note: {0}")]
    Form(&'static str),
    /// Nobody of that name and key signed.
    #[error("the note is not signed by {name}")]
    Unsigned {
        /// Who should have.
        name: String,
    },
    /// Somebody's line is there, but it is wrong.
    #[error("the signature of {name} under the note is wrong")]
    Signature {
        /// Whose.
        name: String,
    },
}

/// One signature line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignatureLine {
    /// Who, by name.
    pub name: String,
    /// Key id and signature.
    bytes: Vec<u8>,
}

impl SignatureLine {
    fn parse(line: &str) -> Result<Self, NoteError> {
        let bad = NoteError::Form("a line under the text is no signature");
        let rest = line.strip_prefix("\u{2014} ").ok_or_else(|| bad.clone())?;
        let (name, base64) = rest.split_once(' ').ok_or_else(|| bad.clone())?;
        if !is_name(name) || base64.len() > 16 << 10 {
            return Err(bad);
        }
        let bytes = BASE64_STANDARD.decode(base64).map_err(|_| bad.clone())?;
        if bytes.len() < 5 {
            return Err(bad);
        }
        Ok(Self {
            name: name.to_owned(),
            bytes,
        })
    }

    /// Of a cosignature: the time in it, in seconds since 1970.
    pub fn cosigned_at(&self) -> Option<u64> {
        let time = self.bytes.get(4..12).filter(|_| self.bytes.len() == 76)?;
        Some(u64::from_be_bytes(time.try_into().ok()?))
    }
}

impl fmt::Display for SignatureLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "\u{2014} {} {}",
            self.name,
            BASE64_STANDARD.encode(&self.bytes)
        )
    }
}

fn is_name(name: &str) -> bool {
    !name.is_empty() && name.len() <= 255 && !name.contains(|c: char| c.is_whitespace() || c == '+')
}

fn key_id(name: &str, kind: u8, key: &PublicKey) -> [u8; 4] {
    let hasher = Sha256::new().chain_update(name).chain_update([b'\n', kind]);
    let digest: [u8; 32] = hasher.chain_update(key.0).finalize().into();
    [digest[0], digest[1], digest[2], digest[3]]
}

/// A key with its name in the form that verifiers of notes are configured with: `NAME+ID+base64(kind ‖ key)`.
pub fn verifier_key(name: &str, key: &PublicKey, cosigner: bool) -> String {
    let kind = if cosigner { COSIGNATURE } else { PLAIN };
    let mut bytes = vec![kind];
    bytes.extend_from_slice(&key.0);
    let id = hex::encode(key_id(name, kind, key));
    format!("{name}+{id}+{}", BASE64_STANDARD.encode(bytes))
}

/// A text and the signatures under it. Nothing in it may be believed before [`Note::verify`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    text: String,
    /// As they stand.
    pub signatures: Vec<SignatureLine>,
}

impl Note {
    /// Signs `text`, which must end with a newline and hold no other control characters.
    pub fn sign(text: String, name: &str, secret: &SecretKey) -> Self {
        debug_assert!(text.ends_with('\n') && is_name(name));
        let key = PublicKey::of(secret);
        let mut bytes = key_id(name, PLAIN, &key).to_vec();
        bytes.extend_from_slice(&sign(secret, text.as_bytes()));
        let signatures = vec![SignatureLine {
            name: name.to_owned(),
            bytes,
        }];
        Self { text, signatures }
    }

    /// Reads one note.
    pub fn parse(note: &str) -> Result<Self, NoteError> {
        let form = |why| Err(NoteError::Form(why));
        if note.len() > NOTE_BYTES_MAX {
            return form("it is too long");
        }
        if note.chars().any(|c| c < ' ' && c != '\n') {
            return form("it holds control characters");
        }
        let Some(end) = note.rfind("\n\n") else {
            return form("no blank line stands between text and signatures");
        };
        let (text, lines) = (&note[..=end], &note[end + 2..]);
        let Some(lines) = lines.strip_suffix('\n') else {
            return form("it does not end with a newline");
        };
        let signatures = lines
            .split('\n')
            .take(SIGNATURES_MAX + 1)
            .map(SignatureLine::parse)
            .collect::<Result<Vec<_>, _>>()?;
        if signatures.len() > SIGNATURES_MAX {
            return form("it has too many signatures");
        }
        Ok(Self {
            text: text.to_owned(),
            signatures,
        })
    }

    /// What was signed.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Did `key`, under this name, sign the text?
    pub fn verify(&self, name: &str, key: &PublicKey) -> Result<(), NoteError> {
        self.find(name, PLAIN, key, 64, |bytes| (self.text.clone(), bytes))
            .map(drop)
    }

    /// Did the witness `key`, under this name, cosign the text? Gives the time of it, in seconds since 1970.
    pub fn verify_cosignature(&self, name: &str, key: &PublicKey) -> Result<u64, NoteError> {
        let bytes = self.find(name, COSIGNATURE, key, 72, |bytes| {
            let (time, signature) = bytes.split_at(8);
            let time = u64::from_be_bytes(time.try_into().unwrap_or_default());
            (cosigned_message(time, &self.text), signature)
        })?;
        Ok(u64::from_be_bytes(bytes[..8].try_into().unwrap_or_default()))
    }

    fn find(
        &self,
        name: &str,
        kind: u8,
        key: &PublicKey,
        len: usize,
        split: impl for<'a> Fn(&'a [u8]) -> (String, &'a [u8]),
    ) -> Result<Vec<u8>, NoteError> {
        let id = key_id(name, kind, key);
        let line = self
            .signatures
            .iter()
            .find(|line| line.name == name && line.bytes.starts_with(&id));
        let name = || name.to_owned();
        let Some(line) = line else {
            return Err(NoteError::Unsigned { name: name() });
        };
        let wrong = || NoteError::Signature { name: name() };
        let bytes = &line.bytes[4..];
        if bytes.len() != len {
            return Err(wrong());
        }
        let (message, signature) = split(bytes);
        let signature = signature.try_into().map_err(|_| wrong())?;
        key.verify(message.as_bytes(), &signature).map_err(|_| wrong())?;
        Ok(bytes.to_vec())
    }

    /// A witness's line for this text: "as of `at`, this is the largest consistent tree I have seen of this log".
    /// Whoever signs it must have checked that.
    pub fn cosign(&self, name: &str, secret: &SecretKey, at: UtcMillis) -> SignatureLine {
        let key = PublicKey::of(secret);
        let time = at.0 / 1000;
        let mut bytes = key_id(name, COSIGNATURE, &key).to_vec();
        bytes.extend_from_slice(&time.to_be_bytes());
        let message = cosigned_message(time, &self.text);
        bytes.extend_from_slice(&sign(secret, message.as_bytes()));
        SignatureLine {
            name: name.to_owned(),
            bytes,
        }
    }

    /// Adds a line, once.
    pub fn add(&mut self, line: SignatureLine) {
        if self.signatures.len() < SIGNATURES_MAX && !self.signatures.contains(&line) {
            self.signatures.push(line);
        }
    }
}

fn cosigned_message(time: u64, text: &str) -> String {
    format!("cosignature/v1\ntime {time}\n{text}")
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.text)?;
        self.signatures.iter().try_for_each(|line| writeln!(f, "{line}"))
    }
}

impl std::str::FromStr for SignatureLine {
    type Err = NoteError;
    fn from_str(line: &str) -> Result<Self, NoteError> {
        Self::parse(line.strip_suffix('\n').unwrap_or(line))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of the signed-note specification: signed by a key of theirs, in their words' form.
    #[test]
    fn a_note_reads_what_it_writes_and_notices_every_change() {
        let secret = SecretKey::from_bytes(&[9; 32]);
        let key = PublicKey::of(&secret);
        let mut note = Note::sign("first\n\nlast\n".into(), "karez.example/a", &secret);
        let witness = SecretKey::from_bytes(&[8; 32]);
        let at = UtcMillis(1_679_315_147_000);
        note.add(note.cosign("karez.example/w", &witness, at));
        let text = note.to_string();
        let read = Note::parse(&text).unwrap();
        assert_eq!(read, note);
        assert_eq!(read.text(), "first\n\nlast\n");
        assert_eq!(read.verify("karez.example/a", &key), Ok(()));
        let by = PublicKey::of(&witness);
        assert_eq!(read.verify_cosignature("karez.example/w", &by), Ok(1_679_315_147));
        assert_eq!(read.signatures[1].cosigned_at(), Some(1_679_315_147));
        // A witness's word is no signature of the log, and the other way round.
        assert!(read.verify("karez.example/w", &by).is_err());
        assert!(read.verify_cosignature("karez.example/a", &key).is_err());
        assert!(read.verify("karez.example/b", &key).is_err());
        for at in 0..text.len() {
            let mut bytes = text.clone().into_bytes();
            bytes[at] ^= 1;
            let holds = String::from_utf8(bytes).is_ok_and(|changed| {
                Note::parse(&changed).is_ok_and(|n| {
                    n.verify("karez.example/a", &key).is_ok()
                        && n.verify_cosignature("karez.example/w", &by).is_ok()
                })
            });
            assert!(!holds, "byte {at}");
        }
    }

    #[test]
    fn the_ids_of_keys_are_those_of_the_specification() {
        // From the documentation of Go's note package: name, id and key of its example.
        let vkey = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW";
        let (name, rest) = vkey.split_once('+').unwrap();
        let bytes = BASE64_STANDARD.decode(rest.split_once('+').unwrap().1).unwrap();
        let key = PublicKey(bytes[1..].try_into().unwrap());
        assert_eq!(verifier_key(name, &key, false), vkey);
        let note = "If you think cryptography is the answer to your problem,\n\
                    then you don't know what your problem is.\n\n\
                    \u{2014} PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n";
        assert_eq!(Note::parse(note).unwrap().verify(name, &key), Ok(()));
    }
}
