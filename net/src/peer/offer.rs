//! How an offer and its answer travel.
use super::{Answer, OFFER_BYTES_MAX};
use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use libp2p::{StreamProtocol, request_response as rr};
use std::io;

const ANSWER_BYTES_MAX: usize = 1024;
const ADDR_BYTES_MAX: usize = 255;

pub(super) fn busy() -> Answer {
    refused("the scheduler is busy: try again in a minute")
}

pub(super) fn refused(reason: &str) -> Answer {
    Answer::Refused {
        reason: reason.to_owned(),
    }
}

/// Four bytes of length, big-endian, then the content. The cap is checked before anything is reserved.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct OfferCodec;

async fn read_capped<R: AsyncRead + Unpin + Send>(io: &mut R, max: usize) -> io::Result<Vec<u8>> {
    let mut length = [0; 4];
    io.read_exact(&mut length).await?;
    let length = u32::from_be_bytes(length) as usize;
    if length > max {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a message of {length} bytes, the limit is {max}"),
        ));
    }
    let mut bytes = vec![0; length];
    io.read_exact(&mut bytes).await?;
    Ok(bytes)
}

async fn write_framed<W: AsyncWrite + Unpin + Send>(io: &mut W, bytes: &[u8]) -> io::Result<()> {
    let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
    io.write_all(&length.to_be_bytes()).await?;
    io.write_all(bytes).await?;
    io.flush().await
}

impl Answer {
    fn encode(&self) -> Vec<u8> {
        match self {
            Self::Accepted { control_addr } => {
                let mut out = vec![0];
                // Half an address would lead elsewhere.
                if control_addr.len() <= ADDR_BYTES_MAX {
                    out.extend_from_slice(control_addr.as_bytes());
                }
                out
            }
            Self::Refused { reason } => {
                let end = (0..=reason.len().min(500))
                    .rev()
                    .find(|i| reason.is_char_boundary(*i))
                    .unwrap_or(0);
                let mut out = vec![1];
                out.extend_from_slice(&reason.as_bytes()[..end]);
                out
            }
        }
    }

    fn decode(bytes: &[u8]) -> io::Result<Self> {
        match bytes.split_first() {
            Some((0, addr)) => match std::str::from_utf8(addr) {
                Ok(addr) if addr.len() <= ADDR_BYTES_MAX && !addr.contains(char::is_control) => {
                    Ok(Self::Accepted {
                        control_addr: addr.to_owned(),
                    })
                }
                _ => Err(io::Error::new(io::ErrorKind::InvalidData, "not an address")),
            },
            Some((1, reason)) => Ok(Self::Refused {
                // Shown to people: no control characters from strangers.
                reason: String::from_utf8_lossy(reason)
                    .chars()
                    .map(|c| if c.is_control() { ' ' } else { c })
                    .collect(),
            }),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "not an answer")),
        }
    }
}

impl rr::Codec for OfferCodec {
    type Protocol = StreamProtocol;
    type Request = Vec<u8>;
    type Response = Answer;

    async fn read_request<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<Vec<u8>>
    where
        T: AsyncRead + Unpin + Send,
    {
        read_capped(io, OFFER_BYTES_MAX).await
    }

    async fn read_response<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<Answer>
    where
        T: AsyncRead + Unpin + Send,
    {
        Answer::decode(&read_capped(io, ANSWER_BYTES_MAX).await?)
    }

    async fn write_request<T>(&mut self, _: &StreamProtocol, io: &mut T, offer: Vec<u8>) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        write_framed(io, &offer).await
    }

    async fn write_response<T>(&mut self, _: &StreamProtocol, io: &mut T, answer: Answer) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        write_framed(io, &answer.encode()).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lengths_are_checked_before_memory_is_reserved() {
        let mut liar: &[u8] = &[0xff, 0xff, 0xff, 0xff, 1, 2, 3];
        assert!(read_capped(&mut liar, OFFER_BYTES_MAX).await.is_err());
        let mut short: &[u8] = &[0, 0, 0, 9, 1];
        assert!(read_capped(&mut short, OFFER_BYTES_MAX).await.is_err());
        let mut right: &[u8] = &[0, 0, 0, 2, 7, 8];
        assert_eq!(read_capped(&mut right, 2).await.unwrap(), vec![7, 8]);
    }

    #[test]
    fn answers_read_what_they_write() {
        let accepted = |addr: &str| Answer::Accepted {
            control_addr: addr.into(),
        };
        for answer in [
            accepted(""),
            accepted("karez.example.org:7400"),
            refused("no such institution"),
            refused(""),
        ] {
            assert_eq!(Answer::decode(&answer.encode()).unwrap(), answer);
        }
        let long = refused(&"é".repeat(1000));
        assert!(long.encode().len() <= 501);
        assert!(Answer::decode(&long.encode()).is_ok());
        for bad in [&[][..], &[2], &[0, 1], &[0, 0xff], &[0; 300]] {
            assert!(Answer::decode(bad).is_err());
        }
    }
}
