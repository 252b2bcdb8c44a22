//! What schedulers signed for: the owner's own copy of every receipt, one record a line in base64.
//!
//! A ledger that leaves work out verifies as well as any other; only who holds a receipt for it can tell. `karez ledger
//! verify LEDGER --receipts FILE` holds these against a scheduler's export. A file that has grown to 64 MiB (some
//! eighty thousand receipts) becomes `receipts.1`, in the place of an older one: two such files are kept.
use base64::{Engine as _, prelude::BASE64_STANDARD};
use karez_core::records::{Receipt, Verified};
use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
};

const BYTES_MAX: u64 = 64 << 20;

/// The file, open at its end.
#[derive(Debug)]
pub(crate) struct Receipts {
    path: PathBuf,
    file: File,
    bytes: u64,
    bytes_max: u64,
}

impl Receipts {
    pub(crate) fn open(path: PathBuf) -> io::Result<Self> {
        Self::with(path, BYTES_MAX)
    }

    fn with(path: PathBuf, bytes_max: u64) -> io::Result<Self> {
        let (file, bytes) = at_end(&path)?;
        Ok(Self {
            path,
            file,
            bytes,
            bytes_max,
        })
    }

    /// Writes one down. It is not synced: what a power cut takes, the scheduler's ledger still has, unless it cheats just
    /// then.
    pub(crate) fn keep(&mut self, receipt: &Verified<Receipt>) -> io::Result<()> {
        if self.bytes >= self.bytes_max {
            fs::rename(&self.path, older(&self.path))?;
            (self.file, self.bytes) = at_end(&self.path)?;
        }
        let mut line = BASE64_STANDARD.encode(receipt.encode());
        line.push('\n');
        self.file.write_all(line.as_bytes())?;
        self.bytes += line.len() as u64;
        Ok(())
    }
}

/// Where the file before this one lies.
pub(crate) fn older(path: &Path) -> PathBuf {
    path.with_extension("1")
}

/// Opens it for more; what a crash left of a last line is ended, so that the next one begins anew.
fn at_end(path: &Path) -> io::Result<(File, u64)> {
    let mut file = OpenOptions::new()
        .create(true)
        .append(true)
        .read(true)
        .open(path)?;
    let mut bytes = file.metadata()?.len();
    let mut last = [b'\n'];
    if bytes > 0 {
        use std::os::unix::fs::FileExt;
        file.read_exact_at(&mut last, bytes - 1)?;
    }
    if last != [b'\n'] {
        file.write_all(b"\n")?;
        bytes += 1;
    }
    Ok((file, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use karez_core::{
        id::{Digest, JobId},
        key::{NodeId, PublicKey, SchedulerId, SecretKey, UserId},
        records::Signed,
        unit::{Credits, DeviceMillis, UtcMillis},
    };

    fn receipt(n: u64) -> Verified<Receipt> {
        let secret = SecretKey::from_bytes(&[1; 32]);
        let key = PublicKey::of(&secret);
        let receipt = Receipt {
            usage: Digest::of(b"usage"),
            lease: Digest::of(&n.to_be_bytes()),
            job: JobId(Digest::of(b"job")),
            scheduler: SchedulerId(key),
            node: NodeId(key),
            node_institution: "uni-a".parse().unwrap(),
            user: UserId(key),
            user_institution: "uni-b".parse().unwrap(),
            observed: DeviceMillis(n),
            billed: DeviceMillis(n),
            credits: Credits(n),
            flags: Vec::new(),
            issued_at: UtcMillis(n),
            disputable_until: UtcMillis(n),
            rate_card: 0,
        };
        Signed::sign(receipt, &secret)
    }

    fn read(path: &Path) -> Vec<Option<u64>> {
        let text = fs::read_to_string(path).unwrap_or_default();
        text.lines()
            .map(|line| {
                let bytes = BASE64_STANDARD.decode(line).ok()?;
                Some(Signed::<Receipt>::open(&bytes).ok()?.credits.0)
            })
            .collect()
    }

    #[test]
    fn receipts_are_kept_in_two_files_and_a_torn_line_spoils_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("receipts");
        for n in 0..2 {
            let mut receipts = Receipts::open(path.clone()).unwrap();
            receipts.keep(&receipt(n)).unwrap();
        }
        assert_eq!(read(&path), [Some(0), Some(1)]);
        let torn = fs::read(&path).unwrap();
        fs::write(&path, &torn[..torn.len() - 9]).unwrap();
        let mut receipts = Receipts::with(path.clone(), 2_000).unwrap();
        for n in 2..9 {
            receipts.keep(&receipt(n)).unwrap();
        }
        let (old, new) = (read(&older(&path)), read(&path));
        assert_eq!(new.last(), Some(&Some(8)));
        assert!(fs::metadata(older(&path)).unwrap().len() < 3_000);
        let all: Vec<_> = old.into_iter().chain(new).collect();
        let from = 9 - all.len() as u64;
        assert!(all.len() >= 3, "{all:?}");
        let expected: Vec<_> = (from..9).map(|n| Some(n).filter(|n| *n != 1)).collect();
        assert_eq!(all, expected);
    }
}
