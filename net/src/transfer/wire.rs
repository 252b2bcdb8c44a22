//! Requests and answers: one bidirectional stream each.
//!
//! A request is two bytes of length and that many bytes. An answer is one status byte; after anything but
//! [`Status::Ok`] follow two bytes of length and a reason in words.
use super::IDLE_MAX;
use karez_core::{
    artifact::{ArtifactKind, ArtifactRef},
    id::Digest,
    unit::Bytes,
};
use quinn::{RecvStream, SendStream};
use std::{io, ops::Range};
use tokio::time::timeout;

const REQUEST_MAX: usize = 256;
const REASON_MAX: usize = 300;
/// Runs of missing blocks in one answer.
pub(super) const RUNS_MAX: u32 = 65_536;

/// One request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Request {
    /// Is it all there?
    Has(ArtifactRef),
    /// The stream of some blocks of a file of an artifact. The answer starts with the file's size.
    Get {
        artifact: ArtifactRef,
        digest: Digest,
        blocks: Range<u64>,
    },
    /// May I leave this here? [`Status::Already`] when it is there.
    PutBegin(ArtifactRef),
    /// Which blocks of this file are missing? The answer counts and lists them.
    PutFile {
        artifact: ArtifactRef,
        digest: Digest,
        bytes: u64,
    },
    /// The stream of some blocks follows; the answer comes when they are kept.
    PutBlocks {
        artifact: ArtifactRef,
        digest: Digest,
        bytes: u64,
        blocks: Range<u64>,
    },
    /// That was all.
    PutEnd(ArtifactRef),
}

/// How an answer begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    Ok = 0,
    Missing = 1,
    Denied = 2,
    Full = 3,
    Malformed = 4,
    Failed = 5,
    Mismatch = 6,
    /// Connect anew: the path has turned out to need other settings.
    Reconnect = 7,
    Already = 8,
}

/// What went wrong on a stream.
#[derive(Debug)]
pub(super) enum StreamError {
    /// Lost, reset or silent for too long.
    Lost(String),
    /// The other end broke the protocol.
    Malformed(&'static str),
}

impl From<quinn::WriteError> for StreamError {
    fn from(error: quinn::WriteError) -> Self {
        Self::Lost(error.to_string())
    }
}
impl From<quinn::ReadError> for StreamError {
    fn from(error: quinn::ReadError) -> Self {
        Self::Lost(error.to_string())
    }
}
impl From<quinn::ConnectionError> for StreamError {
    fn from(error: quinn::ConnectionError) -> Self {
        Self::Lost(error.to_string())
    }
}
impl From<io::Error> for StreamError {
    fn from(error: io::Error) -> Self {
        Self::Lost(error.to_string())
    }
}

pub(super) fn silent() -> StreamError {
    StreamError::Lost(format!("nothing moved for {} s", IDLE_MAX.as_secs()))
}

/// Fills `buffer`. Each read, not the whole, must make progress within the deadline.
pub(super) async fn read_full(recv: &mut RecvStream, buffer: &mut [u8]) -> Result<(), StreamError> {
    let mut at = 0;
    while at < buffer.len() {
        match timeout(IDLE_MAX, recv.read(&mut buffer[at..])).await {
            Ok(Ok(Some(n))) => at += n,
            Ok(Ok(None)) => return Err(StreamError::Lost("the stream ended early".into())),
            Ok(Err(error)) => return Err(error.into()),
            Err(_) => return Err(silent()),
        }
    }
    Ok(())
}

/// Writes all of `bytes`, under the same deadline.
pub(super) async fn write_full(send: &mut SendStream, mut bytes: bytes::Bytes) -> Result<(), StreamError> {
    while !bytes.is_empty() {
        let mut chunks = [std::mem::take(&mut bytes)];
        match timeout(IDLE_MAX, send.write_chunks(&mut chunks)).await {
            Ok(written) => written?,
            Err(_) => return Err(silent()),
        };
        let [rest] = chunks;
        bytes = rest;
    }
    Ok(())
}

pub(super) async fn write_slice(send: &mut SendStream, bytes: &[u8]) -> Result<(), StreamError> {
    write_full(send, bytes::Bytes::copy_from_slice(bytes)).await
}

pub(super) async fn read_u64(recv: &mut RecvStream) -> Result<u64, StreamError> {
    let mut bytes = [0; 8];
    read_full(recv, &mut bytes).await?;
    Ok(u64::from_be_bytes(bytes))
}

pub(super) async fn write_request(send: &mut SendStream, request: &Request) -> Result<(), StreamError> {
    let body = request.encode();
    let mut frame = (body.len() as u16).to_be_bytes().to_vec();
    frame.extend_from_slice(&body);
    write_slice(send, &frame).await
}

pub(super) async fn read_request(recv: &mut RecvStream) -> Result<Request, StreamError> {
    let mut length = [0; 2];
    read_full(recv, &mut length).await?;
    let length = usize::from(u16::from_be_bytes(length));
    if length > REQUEST_MAX {
        return Err(StreamError::Malformed("a request is too long"));
    }
    let mut body = [0; REQUEST_MAX];
    read_full(recv, &mut body[..length]).await?;
    Request::decode(&body[..length]).ok_or(StreamError::Malformed("no such request"))
}

pub(super) async fn write_status(
    send: &mut SendStream,
    status: Status,
    reason: &str,
) -> Result<(), StreamError> {
    let mut out = vec![status as u8];
    if status != Status::Ok {
        let end = (0..=reason.len().min(REASON_MAX))
            .rev()
            .find(|i| reason.is_char_boundary(*i))
            .unwrap_or(0);
        out.extend_from_slice(&(end as u16).to_be_bytes());
        out.extend_from_slice(&reason.as_bytes()[..end]);
    }
    write_slice(send, &out).await
}

pub(super) async fn read_status(recv: &mut RecvStream) -> Result<(Status, String), StreamError> {
    let mut status = [0];
    read_full(recv, &mut status).await?;
    let status = Status::decode(status[0]).ok_or(StreamError::Malformed("no such status"))?;
    if status == Status::Ok {
        return Ok((status, String::new()));
    }
    let mut length = [0; 2];
    read_full(recv, &mut length).await?;
    let length = usize::from(u16::from_be_bytes(length));
    if length > REASON_MAX {
        return Err(StreamError::Malformed("a reason is too long"));
    }
    let mut reason = [0; REASON_MAX];
    read_full(recv, &mut reason[..length]).await?;
    // Shown to people: no control characters from strangers.
    let reason = String::from_utf8_lossy(&reason[..length])
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    Ok((status, reason))
}

impl Status {
    fn decode(byte: u8) -> Option<Self> {
        Some(match byte {
            0 => Self::Ok,
            1 => Self::Missing,
            2 => Self::Denied,
            3 => Self::Full,
            4 => Self::Malformed,
            5 => Self::Failed,
            6 => Self::Mismatch,
            7 => Self::Reconnect,
            8 => Self::Already,
            _ => return None,
        })
    }
}

impl Request {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(128);
        let (tag, artifact) = match self {
            Self::Has(artifact) => (1, artifact),
            Self::Get { artifact, .. } => (2, artifact),
            Self::PutBegin(artifact) => (3, artifact),
            Self::PutFile { artifact, .. } => (4, artifact),
            Self::PutBlocks { artifact, .. } => (5, artifact),
            Self::PutEnd(artifact) => (6, artifact),
        };
        out.push(tag);
        out.push(match artifact.kind {
            // What is served has no content: nothing ever has that digest.
            ArtifactKind::Blob | ArtifactKind::Served => 0,
            ArtifactKind::Tree => 1,
        });
        out.extend_from_slice(&artifact.digest.0);
        out.extend_from_slice(&artifact.bytes.0.to_be_bytes());
        let mut file = |digest: &Digest, numbers: &[u64]| {
            out.extend_from_slice(&digest.0);
            for number in numbers {
                out.extend_from_slice(&number.to_be_bytes());
            }
        };
        match self {
            Self::Has(_) | Self::PutBegin(_) | Self::PutEnd(_) => {}
            Self::Get { digest, blocks, .. } => file(digest, &[blocks.start, blocks.end]),
            Self::PutFile { digest, bytes, .. } => file(digest, &[*bytes]),
            Self::PutBlocks {
                digest,
                bytes,
                blocks,
                ..
            } => file(digest, &[*bytes, blocks.start, blocks.end]),
        }
        out
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut rest = bytes;
        let [tag, kind] = take(&mut rest)?;
        let artifact = ArtifactRef {
            kind: match kind {
                0 => ArtifactKind::Blob,
                1 => ArtifactKind::Tree,
                _ => return None,
            },
            digest: Digest(take(&mut rest)?),
            bytes: Bytes(number(&mut rest)?),
        };
        let request = match tag {
            1 => Self::Has(artifact),
            2 => Self::Get {
                artifact,
                digest: Digest(take(&mut rest)?),
                blocks: number(&mut rest)?..number(&mut rest)?,
            },
            3 => Self::PutBegin(artifact),
            4 => Self::PutFile {
                artifact,
                digest: Digest(take(&mut rest)?),
                bytes: number(&mut rest)?,
            },
            5 => Self::PutBlocks {
                artifact,
                digest: Digest(take(&mut rest)?),
                bytes: number(&mut rest)?,
                blocks: number(&mut rest)?..number(&mut rest)?,
            },
            6 => Self::PutEnd(artifact),
            _ => return None,
        };
        rest.is_empty().then_some(request)
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (head, tail) = rest.split_first_chunk()?;
    *rest = tail;
    Some(*head)
}

fn number(rest: &mut &[u8]) -> Option<u64> {
    take(rest).map(u64::from_be_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn requests_read_what_they_write(seed in any::<[u8; 32]>(), n in any::<[u64; 4]>(), tree in any::<bool>()) {
            let digest = Digest(seed);
            let kind = if tree { ArtifactKind::Tree } else { ArtifactKind::Blob };
            let artifact = ArtifactRef { digest: Digest::of(&seed), bytes: Bytes(n[0]), kind };
            let (bytes, blocks) = (n[1], n[2]..n[3]);
            for request in [
                Request::Has(artifact),
                Request::Get { artifact, digest, blocks: blocks.clone() },
                Request::PutBegin(artifact),
                Request::PutFile { artifact, digest, bytes },
                Request::PutBlocks { artifact, digest, bytes, blocks },
                Request::PutEnd(artifact),
            ] {
                let encoded = request.encode();
                prop_assert!(encoded.len() <= REQUEST_MAX);
                prop_assert_eq!(Request::decode(&encoded[..encoded.len() - 1]), None);
                prop_assert_eq!(Request::decode(&encoded), Some(request));
            }
        }

        #[test]
        fn noise_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Request::decode(&bytes);
        }
    }
}
