//! Helpers for reading wire messages field by field, with the field's name in every error.
use super::envelope::RecordError;
use crate::{
    artifact::{ArtifactKind, ArtifactRef},
    id::Digest,
    key::PublicKey,
    prelude::*,
    unit::{Bytes, Portion},
};
use karez_proto::records as wire;

/// Reads the fields of one record type.
#[derive(Clone, Copy)]
pub(super) struct Fields(pub(super) &'static str);

impl Fields {
    pub(super) fn bad(self, field: &'static str, why: impl ToString) -> RecordError {
        RecordError::Field {
            record: self.0,
            field,
            why: why.to_string(),
        }
    }

    pub(super) fn key(self, field: &'static str, bytes: &[u8]) -> Result<PublicKey, RecordError> {
        PublicKey::named(bytes).map_err(|e| self.bad(field, format!("is no key: {e}")))
    }

    pub(super) fn digest(self, field: &'static str, bytes: &[u8]) -> Result<Digest, RecordError> {
        Digest::try_from(bytes)
            .map_err(|_| self.bad(field, format!("is {} bytes, a digest is 32", bytes.len())))
    }

    pub(super) fn optional_digest(
        self,
        field: &'static str,
        bytes: &[u8],
    ) -> Result<Option<Digest>, RecordError> {
        if bytes.is_empty() {
            Ok(None)
        } else {
            self.digest(field, bytes).map(Some)
        }
    }

    pub(super) fn text(self, field: &'static str, text: String, max: usize) -> Result<String, RecordError> {
        if text.len() > max {
            return Err(self.bad(field, format!("is {} bytes, the limit is {max}", text.len())));
        }
        if text.chars().any(char::is_control) {
            return Err(self.bad(field, "contains control characters"));
        }
        Ok(text)
    }

    pub(super) fn parse<T: core::str::FromStr>(
        self,
        field: &'static str,
        text: &str,
    ) -> Result<T, RecordError>
    where
        T::Err: core::fmt::Display,
    {
        text.parse().map_err(|e| self.bad(field, e))
    }

    pub(super) fn list<W, T>(
        self,
        field: &'static str,
        items: Vec<W>,
        max: usize,
        read: impl FnMut(W) -> Result<T, RecordError>,
    ) -> Result<Vec<T>, RecordError> {
        if items.len() > max {
            return Err(self.bad(field, format!("has {} entries, the limit is {max}", items.len())));
        }
        items.into_iter().map(read).collect()
    }

    pub(super) fn some<T>(self, field: &'static str, value: Option<T>) -> Result<T, RecordError> {
        value.ok_or_else(|| self.bad(field, "is missing"))
    }

    pub(super) fn within(self, field: &'static str, value: u64, max: u64) -> Result<u64, RecordError> {
        if value > max {
            Err(self.bad(field, format!("is {value}, the limit is {max}")))
        } else {
            Ok(value)
        }
    }

    /// So many devices, or a share of one.
    pub(super) fn portion(self, devices: u32, share_milli: u32) -> Result<Portion, RecordError> {
        self.within("devices", devices.into(), 1_024)?;
        Portion::of(devices, share_milli).ok_or_else(|| {
            self.bad(
                "devices",
                format!("is {devices}, with a share of {share_milli} thousandths: neither whole devices nor a share of one"),
            )
        })
    }

    pub(super) fn artifact(
        self,
        field: &'static str,
        a: wire::ArtifactRef,
    ) -> Result<ArtifactRef, RecordError> {
        let kind = match a.kind.as_str() {
            "blob" => ArtifactKind::Blob,
            "tree" => ArtifactKind::Tree,
            _ => return Err(self.bad(field, "is neither a blob nor a tree")),
        };
        Ok(ArtifactRef {
            digest: self.digest(field, &a.digest)?,
            bytes: Bytes(a.bytes),
            kind,
        })
    }

    /// As [`Fields::artifact`], and models of providers' own servers too.
    pub(super) fn model(self, field: &'static str, a: wire::ArtifactRef) -> Result<ArtifactRef, RecordError> {
        if a.kind != "served" {
            return self.artifact(field, a);
        }
        if a.bytes != 0 {
            return Err(self.bad(field, "is served, and yet has a size"));
        }
        Ok(ArtifactRef {
            digest: self.digest(field, &a.digest)?,
            bytes: Bytes::ZERO,
            kind: ArtifactKind::Served,
        })
    }
}

impl From<ArtifactRef> for wire::ArtifactRef {
    fn from(a: ArtifactRef) -> Self {
        Self {
            digest: a.digest.0.to_vec(),
            bytes: a.bytes.0,
            kind: a.kind.to_string(),
        }
    }
}

/// The largest time a record may name: the year 10000. Later ones only serve to overflow sums.
pub(super) const UTC_MAX: u64 = 253_402_300_800_000;
