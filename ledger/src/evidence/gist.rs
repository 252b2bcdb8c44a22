//! What stays of a posting when its records are dropped: enough for every rule that looks back and for every sum, and
//! nothing of what was asked, where, when in detail, or with which result.
//!
//! The gist is part of what an entry's hash covers, from the day the entry is posted. While the records are there, it must
//! be just what they give; afterwards it stands for them. All integers are big-endian.
//!
//! ```text
//! settle  = lease[16] receipt[16] done:u8 part[16] billed:u64 len:u8 user_institution len:u8 device_class benchmark?
//! benchmark = speed:u64 len:u8 version       of the last reading, where that names one
//! reserve = user[32]
//! accept  = answered[16]
//! ```
//!
//! `lease`, `part` and `answered` are the marks by which a second settlement or answer is known (zeros for a part that was not
//! done); `receipt` is the beginning of the receipt's id. Other kinds have none: their records always stay.
use super::{
    Claim, Reserved, Settled, fund,
    trail::{MARK, Mark},
};
use karez_core::{
    id::Institution,
    key::{PublicKey, UserId},
    money::{Account, Posting, PostingKind},
    records::Benchmark,
    unit::{DeviceMillis, Speed},
};

/// The longest gist, in bytes.
pub(crate) const GIST_MAX: usize = u8::MAX as usize;

/// May records of this kind be dropped at all?
pub(crate) fn is_droppable(kind: PostingKind) -> bool {
    matches!(
        kind,
        PostingKind::Settle | PostingKind::Reserve | PostingKind::Accept
    )
}

/// The gist of what was examined.
pub(super) fn of(claim: &Claim) -> Vec<u8> {
    let mut out = Vec::new();
    match claim {
        Claim::Settle(settled) => {
            out.extend_from_slice(&settled.lease);
            out.extend_from_slice(&settled.receipt);
            out.push(u8::from(settled.part.is_some()));
            out.extend_from_slice(&settled.part.unwrap_or([0; MARK]));
            out.extend_from_slice(&settled.billed.0.to_be_bytes());
            text(&mut out, settled.user_institution.as_str());
            text(&mut out, &settled.device_class);
            if let Some(benchmark) = &settled.benchmark {
                out.extend_from_slice(&benchmark.speed.0.to_be_bytes());
                text(&mut out, &benchmark.version);
            }
        }
        Claim::Reserve(reserved) => out.extend_from_slice(&reserved.user.0.0),
        Claim::Answer(answer) if answer.frozen.is_none() => {
            out.extend_from_slice(&super::trail::answered_mark(&answer.receipt));
        }
        _ => {}
    }
    out
}

/// Names and classes are capped at 64 bytes when their records are read.
fn text(out: &mut Vec<u8>, text: &str) {
    let text = &text.as_bytes()[..text.len().min(64)];
    out.push(text.len() as u8);
    out.extend_from_slice(text);
}

/// Reads a gist back into what the records said; `None` when legs and gist do not go together.
pub(super) fn read(posting: &Posting, gist: &[u8]) -> Option<Claim> {
    let mut rest = gist;
    let claim = match posting.kind {
        PostingKind::Settle => {
            let (from, to, credits) = super::two_legs(posting)?;
            let (Account::Escrow(job), Account::Institution(institution)) = (from, to) else {
                return None;
            };
            let (lease, receipt) = (array(&mut rest)?, array(&mut rest)?);
            let done = array::<1>(&mut rest)?;
            let part: Mark = array(&mut rest)?;
            let billed = DeviceMillis(u64::from_be_bytes(array(&mut rest)?));
            let part = match (done, part) {
                ([1], part) => Some(part),
                ([0], part) if part == [0; MARK] => None,
                _ => return None,
            };
            Claim::Settle(Settled {
                job: *job,
                lease,
                receipt,
                part,
                origin: None,
                credits,
                billed,
                institution: institution.clone(),
                user_institution: word(&mut rest)?.parse::<Institution>().ok()?,
                device_class: word(&mut rest)?.to_owned(),
                benchmark: match rest.is_empty() {
                    true => None,
                    false => Some(benchmark(&mut rest)?),
                },
            })
        }
        PostingKind::Reserve => {
            let legs = fund::reserve_legs(posting)?;
            let named = UserId(PublicKey(array(&mut rest)?));
            if legs.user.is_some_and(|user| user != named) {
                return None;
            }
            Claim::Reserve(Reserved {
                job: legs.job,
                user: named,
                scope: None,
                from_user: legs.from_user,
                from_grant: legs.from_grant,
            })
        }
        PostingKind::Accept => match posting.legs.as_slice() {
            [(Account::Institution(_), 0)] => Claim::Answered(array(&mut rest)?),
            _ => return None,
        },
        _ => return None,
    };
    rest.is_empty().then_some(claim)
}

fn benchmark(rest: &mut &[u8]) -> Option<Benchmark> {
    let speed = Speed(u64::from_be_bytes(array(rest)?));
    let version = word(rest).filter(|version| !version.is_empty())?.to_owned();
    Some(Benchmark { version, speed })
}

fn array<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (head, tail) = rest.split_first_chunk::<N>()?;
    *rest = tail;
    Some(*head)
}

fn word<'a>(rest: &mut &'a [u8]) -> Option<&'a str> {
    let [len] = array::<1>(rest)?;
    let (head, tail) = rest.split_at_checked(usize::from(len))?;
    *rest = tail;
    std::str::from_utf8(head).ok()
}

/// The beginning of the receipt's id, out of a settlement's gist.
pub(crate) fn receipt_of(gist: &[u8]) -> Option<Mark> {
    gist.get(MARK..2 * MARK)?.try_into().ok()
}

/// What sums need of a settlement whose records were dropped.
pub(crate) struct Remains {
    pub(crate) user_institution: Institution,
    pub(crate) institution: Institution,
    pub(crate) device_class: String,
    pub(crate) billed: DeviceMillis,
    pub(crate) credits: karez_core::unit::Credits,
    pub(crate) benchmark: Option<Benchmark>,
}

/// Of a settlement, from its gist.
pub(crate) fn remains(posting: &Posting, gist: &[u8]) -> Option<Remains> {
    match read(posting, gist)? {
        Claim::Settle(settled) => Some(Remains {
            user_institution: settled.user_institution,
            institution: settled.institution,
            device_class: settled.device_class,
            billed: settled.billed,
            credits: settled.credits,
            benchmark: settled.benchmark,
        }),
        _ => None,
    }
}
