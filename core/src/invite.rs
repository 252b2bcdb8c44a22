//! An invitation as text that people can paste: `karez1`, then lowercase base32 of the envelope and a checksum.
//!
//! The checksum only tells a damaged paste from a refused one; what proves the invitation is its signature.
use crate::{
    prelude::*,
    records::{Invitation, Record, RecordError, Signed, Verified},
};

/// What every invitation starts with.
pub const PREFIX: &str = "karez1";
/// No invitation is longer than this, in characters.
pub const TEXT_MAX: usize = 8 * 1024;

const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
const CHECKSUM_BYTES: usize = 4;

/// Why a text is no invitation.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InviteError {
    /// Something else was pasted.
    #[error("this is no invitation: one starts with {PREFIX}")]
    Prefix,
    /// Something far too long was pasted.
    #[error("this is no invitation: it has {chars} characters, an invitation has at most {TEXT_MAX}")]
    TooLong {
        /// How many characters there are.
        chars: usize,
    },
    /// A character that no invitation contains.
    #[error("the invitation has {found:?} at character {at}: only a-z and 2-7 belong there, copy it again")]
    Character {
        /// What stands there.
        found: char,
        /// Where, counted from 1.
        at: usize,
    },
    /// Cut off, or a character was changed.
    #[error("the invitation was cut off or mistyped: copy it again, whole")]
    Damaged,
    /// The text is whole, but what it says is not acceptable.
    #[error(transparent)]
    Record(#[from] RecordError),
}

/// The text form of `invitation`.
pub fn encode(invitation: &Verified<Invitation>) -> String {
    let mut bytes = invitation.encode();
    let sum = checksum(&bytes);
    bytes.extend_from_slice(&sum);
    let mut text = PREFIX.to_owned();
    base32(&bytes, &mut text);
    text
}

/// Reads the text form. White space anywhere is ignored, and so is the case of letters: mail programs change both.
pub fn decode(text: &str) -> Result<Verified<Invitation>, InviteError> {
    let chars = text.chars().count();
    if chars > TEXT_MAX {
        return Err(InviteError::TooLong { chars });
    }
    let letters: Vec<(usize, char)> = text
        .chars()
        .enumerate()
        .filter(|(_, c)| !c.is_whitespace())
        .map(|(i, c)| (i + 1, c.to_ascii_lowercase()))
        .collect();
    if !letters
        .iter()
        .map(|(_, c)| *c)
        .take(PREFIX.len())
        .eq(PREFIX.chars())
    {
        return Err(InviteError::Prefix);
    }
    let bytes = unbase32(letters.get(PREFIX.len()..).unwrap_or_default())?;
    let Some((envelope, sum)) = bytes.split_last_chunk::<CHECKSUM_BYTES>() else {
        return Err(InviteError::Damaged);
    };
    if checksum(envelope) != *sum {
        return Err(InviteError::Damaged);
    }
    Ok(Signed::open(envelope)?)
}

fn checksum(envelope: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(Invitation::TYPE.as_bytes());
    hasher.update(envelope);
    let mut sum = [0; CHECKSUM_BYTES];
    hasher.finalize_xof().fill(&mut sum);
    sum
}

/// RFC 4648 base32 without padding, in lowercase.
fn base32(bytes: &[u8], out: &mut String) {
    let (mut held, mut bits) = (0u32, 0u32);
    for byte in bytes {
        held = held << 8 | u32::from(*byte);
        bits += 8;
        while bits >= 5 {
            bits -= 5;
            out.push(char::from(ALPHABET[(held >> bits & 31) as usize]));
        }
        held &= (1 << bits) - 1;
    }
    if bits > 0 {
        out.push(char::from(ALPHABET[(held << (5 - bits) & 31) as usize]));
    }
}

fn unbase32(letters: &[(usize, char)]) -> Result<Vec<u8>, InviteError> {
    let mut out = Vec::with_capacity(letters.len() * 5 / 8);
    let (mut held, mut bits) = (0u32, 0u32);
    for (at, found) in letters {
        let value = ALPHABET
            .iter()
            .position(|c| char::from(*c) == *found)
            .and_then(|v| u32::try_from(v).ok())
            .ok_or(InviteError::Character {
                found: *found,
                at: *at,
            })?;
        held = held << 5 | value;
        bits += 5;
        if bits >= 8 {
            bits -= 8;
            out.push((held >> bits) as u8);
            held &= (1 << bits) - 1;
        }
    }
    // What is left over is padding: under one letter of it, and zero. One text for one invitation.
    if bits >= 5 || held != 0 {
        Err(InviteError::Damaged)
    } else {
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        key::{PublicKey, SchedulerId, SecretKey},
        records::Role,
        unit::{Credits, UtcMillis},
    };
    use proptest::prelude::*;

    fn invitation() -> Verified<Invitation> {
        let secret = SecretKey::from_bytes(&[7; 32]);
        let invitation = Invitation {
            scheduler: SchedulerId(PublicKey::of(&secret)),
            institution: "uni-nairobi".parse().unwrap(),
            role: Role::User,
            control_addr: "karez.example:7400".into(),
            peer_addrs: vec!["/ip4/127.0.0.1/tcp/7401".into()],
            credits: Credits(5_000_000),
            nonce: 9,
            uses_max: 1,
            expires_at: UtcMillis(2_000_000_000_000),
        };
        Signed::sign(invitation, &secret)
    }

    #[test]
    fn reads_what_it_writes_even_after_a_mail_program() {
        let written = encode(&invitation());
        assert!(written.starts_with("karez1") && written.len() < 600, "{written}");
        assert_eq!(decode(&written), Ok(invitation()));
        let wrapped: String = written
            .to_uppercase()
            .as_bytes()
            .chunks(64)
            .map(|line| format!("{}\r\n  ", core::str::from_utf8(line).unwrap()))
            .collect();
        assert_eq!(decode(&wrapped), Ok(invitation()));
    }

    #[test]
    fn damage_is_named() {
        let text = encode(&invitation());
        assert_eq!(decode(""), Err(InviteError::Prefix));
        assert_eq!(decode("hello"), Err(InviteError::Prefix));
        assert_eq!(decode("karez1"), Err(InviteError::Damaged));
        assert_eq!(
            decode(&"karez1".repeat(2_000)),
            Err(InviteError::TooLong { chars: 12_000 })
        );
        assert_eq!(
            decode(&text.replacen("karez1", "karez1!", 1)),
            Err(InviteError::Character { found: '!', at: 7 })
        );
        for cut in PREFIX.len()..text.len() {
            assert_eq!(decode(&text[..cut]), Err(InviteError::Damaged), "cut at {cut}");
        }
        assert_eq!(decode(&format!("{text}a")), Err(InviteError::Damaged));
    }

    #[test]
    fn base32_is_the_one_of_rfc_4648() {
        for (bytes, expected) in [
            ("", ""),
            ("f", "my"),
            ("fo", "mzxq"),
            ("foo", "mzxw6"),
            ("foob", "mzxw6yq"),
            ("fooba", "mzxw6ytb"),
            ("foobar", "mzxw6ytboi"),
        ] {
            let mut text = String::new();
            base32(bytes.as_bytes(), &mut text);
            assert_eq!(text, expected);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_survive_base32(bytes: Vec<u8>) {
            let mut text = String::new();
            base32(&bytes, &mut text);
            let letters: Vec<(usize, char)> = text.chars().enumerate().collect();
            prop_assert_eq!(unbase32(&letters), Ok(bytes));
        }

        #[test]
        fn one_changed_letter_never_passes(at in 6usize..400, by in 1usize..32) {
            let mut text = encode(&invitation()).into_bytes();
            prop_assume!(at < text.len());
            let old = ALPHABET.iter().position(|c| *c == text[at]).unwrap();
            text[at] = ALPHABET[(old + by) % 32];
            let decoded = decode(core::str::from_utf8(&text).unwrap());
            prop_assert_eq!(decoded, Err(InviteError::Damaged));
        }

        #[test]
        fn no_text_panics(text: String) {
            let _ = decode(&text);
            let _ = decode(&format!("karez1{text}"));
        }
    }
}
