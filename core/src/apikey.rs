//! API keys: bearer tokens that stand for an Ed25519 key of their own.
//!
//! `kz-` and 64 hex digits. The key's secret is derived from the token, so whoever holds the token can sign, and a
//! scheduler that stores only the public key, as it does of every member, cannot. Not here: admitting the key
//! (`controller`), drawing tokens (the command line).
use crate::{
    key::{PublicKey, SecretKey},
    prelude::*,
};

const PREFIX: &str = "kz-";
/// Separates this use of BLAKE3 from all others.
const CONTEXT: &str = "karez 2026 api key v1";

/// A bearer token. Shows itself to nobody.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiToken([u8; 32]);

/// The text is no API key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this is no API key: one begins with kz- and has 64 hex digits, `karez key new` makes one")]
pub struct ApiTokenError;

impl ApiToken {
    /// A token of 32 random bytes.
    pub fn new(random: [u8; 32]) -> Self {
        Self(random)
    }

    /// For whoever it is made for.
    pub fn reveal(&self) -> String {
        format!("{PREFIX}{}", hex::encode(self.0))
    }

    /// The key that signs for its bearer.
    pub fn secret(&self) -> SecretKey {
        SecretKey::from_bytes(&blake3::derive_key(CONTEXT, &self.0))
    }

    /// The public half of it: what schedulers know it by.
    pub fn public(&self) -> PublicKey {
        PublicKey::of(&self.secret())
    }
}

impl core::str::FromStr for ApiToken {
    type Err = ApiTokenError;
    fn from_str(text: &str) -> Result<Self, ApiTokenError> {
        let digits = text.strip_prefix(PREFIX).ok_or(ApiTokenError)?;
        let mut bytes = [0; 32];
        hex::decode_to_slice(digits, &mut bytes).map_err(|_| ApiTokenError)?;
        Ok(Self(bytes))
    }
}

impl core::fmt::Debug for ApiToken {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("ApiToken(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_reads_what_it_writes_and_its_key_is_not_itself() {
        let token = ApiToken::new([7; 32]);
        assert_eq!(token.reveal().parse(), Ok(token.clone()));
        assert_eq!(token.public(), token.public());
        assert_ne!(token.secret().to_bytes(), [7; 32]);
        assert!(!format!("{token:?}").contains("0707"));
        for bad in [
            "",
            "kz-",
            "kz-07",
            "sk-0707070707070707070707070707070707070707070707070707070707070707",
        ] {
            assert_eq!(bad.parse::<ApiToken>(), Err(ApiTokenError), "{bad}");
        }
    }
}
