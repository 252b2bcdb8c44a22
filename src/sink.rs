//! Where answers go: a file that appears only once it is whole, or standard output.
use crate::{
    fault::{Kind, fault},
    out::Out,
};
use anyhow::{Context, Result};
use karez_core::id::JobId;
use rustix::fs::{Access, access};
use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

/// Where results go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Sink {
    /// A file, or a device that is written as it stands.
    File(PathBuf),
    /// Standard output.
    Stdout,
}

impl Sink {
    /// The path as the command line has it: `-` is standard output.
    pub(crate) fn at(path: &Path) -> Self {
        if path.as_os_str() == "-" {
            Self::Stdout
        } else {
            Self::File(path.to_owned())
        }
    }

    /// `-o`, else standard output when somebody reads it, else a file named after the job.
    pub(crate) fn choose(out: &Out, given: Option<&Path>, job: &JobId) -> Self {
        match given {
            Some(path) => Self::at(path),
            None if out.terminal || out.json => Self::File(format!("karez-{}.jsonl", job.short()).into()),
            None => Self::Stdout,
        }
    }

    /// Finds out before any work is ordered whether its results could be written.
    pub(crate) fn check(out: &Out, given: Option<&Path>) -> Result<()> {
        match given.map(Self::at) {
            Some(sink) => sink.writable(),
            None if out.terminal || out.json => Self::File("karez.jsonl".into()).writable(),
            None => Ok(()),
        }
    }

    pub(crate) fn path(&self) -> Option<&Path> {
        match self {
            Self::File(path) => Some(path),
            Self::Stdout => None,
        }
    }

    fn writable(&self) -> Result<()> {
        let Self::File(path) = self else { return Ok(()) };
        let refuse = |why: String| {
            let name = path.display();
            Err(fault(
                Kind::Refused,
                format!("{name} cannot be written: {why}: choose another path with -o"),
            ))
        };
        match fs::metadata(path) {
            Ok(meta) if meta.is_dir() => return refuse("it is a directory".into()),
            // A device or a pipe has no folder to write a new file into.
            Ok(meta) if !meta.is_file() => return Ok(()),
            _ => {}
        }
        let dir = folder(path);
        if !dir.is_dir() {
            return refuse(format!("there is no folder {}", dir.display()));
        }
        match access(dir, Access::WRITE_OK | Access::EXEC_OK) {
            Ok(()) => Ok(()),
            Err(error) => {
                let why = io::Error::from(error).kind();
                refuse(format!("{why} in the folder {}", dir.display()))
            }
        }
    }

    /// Opens it for writing.
    pub(crate) fn open(&self, out: &'static Out) -> Result<Opened> {
        let Self::File(path) = self else {
            return Ok(Opened {
                inner: BufWriter::new(Box::new(StdoutSink(out))),
                rename: None,
            });
        };
        let writing = |path: &Path| format!("writing {}", path.display());
        // What a link points to is replaced, not the link; a device is written and never replaced.
        let target = fs::canonicalize(path).unwrap_or_else(|_| path.clone());
        let special = fs::metadata(&target).is_ok_and(|m| !m.is_file());
        let (at, rename) = if special {
            (target, None)
        } else {
            let mut name = target.file_name().unwrap_or_default().to_owned();
            name.push(format!(".{}.part", std::process::id()));
            let part = target.with_file_name(name);
            (part.clone(), Some((part, target)))
        };
        let file = OpenOptions::new()
            .write(true)
            .create(!special)
            .truncate(!special)
            .open(&at)
            .with_context(|| writing(path))?;
        let inner: Box<dyn Write + Send> = Box::new(Disk(file, path.clone()));
        Ok(Opened {
            inner: BufWriter::with_capacity(1 << 16, inner),
            rename,
        })
    }
}

/// The folder of a file.
fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}

/// An open sink. A file that was not [`Opened::done`] goes away with it.
pub(crate) struct Opened {
    inner: BufWriter<Box<dyn Write + Send>>,
    rename: Option<(PathBuf, PathBuf)>,
}

impl Opened {
    pub(crate) fn writer(&mut self) -> &mut (dyn Write + Send) {
        &mut self.inner
    }

    /// All of it is written: the file takes its name.
    pub(crate) fn done(mut self) -> Result<()> {
        self.inner.flush()?;
        if let Some((part, path)) = &self.rename {
            fs::rename(part, path).with_context(|| format!("writing {}", path.display()))?;
        }
        self.rename = None;
        Ok(())
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        if let Some((part, _)) = &self.rename {
            drop(fs::remove_file(part));
        }
    }
}

/// A file whose errors name it.
struct Disk(File, PathBuf);

impl Write for Disk {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let named = |e: io::Error| io::Error::new(e.kind(), format!("writing {}: {e}", self.1.display()));
        self.0.write(bytes).map_err(named)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

struct StdoutSink(&'static Out);

impl Write for StdoutSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.raw(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Hands on each whole line that is written to it.
pub(crate) struct Lines<F> {
    each: F,
    line: Vec<u8>,
}

impl<F: FnMut(&[u8]) -> io::Result<()>> Lines<F> {
    pub(crate) fn new(each: F) -> Self {
        Self {
            each,
            line: Vec::new(),
        }
    }
}

impl<F: FnMut(&[u8]) -> io::Result<()>> Write for Lines<F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for piece in bytes.split_inclusive(|b| *b == b'\n') {
            self.line.extend_from_slice(piece);
            if self.line.pop_if(|b| *b == b'\n').is_some() {
                (self.each)(&self.line)?;
                self.line.clear();
            }
        }
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn out() -> &'static Out {
        Box::leak(Box::new(Out::new(false, false, false)))
    }

    #[test]
    fn a_file_appears_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.jsonl");
        fs::write(&path, "before").unwrap();
        let listed = || fs::read_dir(dir.path()).unwrap().count();
        let sink = Sink::at(&path);
        let mut dropped = sink.open(out()).unwrap();
        dropped.writer().write_all(b"half").unwrap();
        assert_eq!(listed(), 2);
        drop(dropped);
        assert_eq!(listed(), 1, "what was not finished is gone");
        assert_eq!(fs::read_to_string(&path).unwrap(), "before");
        let mut whole = sink.open(out()).unwrap();
        whole.writer().write_all(b"after").unwrap();
        whole.done().unwrap();
        assert_eq!(
            (listed(), fs::read_to_string(&path).unwrap()),
            (1, "after".into())
        );
    }

    #[test]
    fn links_stay_links_and_pipes_stay_pipes() {
        use std::os::unix::fs::FileTypeExt;
        let dir = tempfile::tempdir().unwrap();
        let (file, link, pipe) = (
            dir.path().join("file"),
            dir.path().join("link"),
            dir.path().join("pipe"),
        );
        fs::write(&file, "").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        let mut opened = Sink::at(&link).open(out()).unwrap();
        opened.writer().write_all(b"x").unwrap();
        opened.done().unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read_to_string(&file).unwrap(), "x");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &pipe,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
            0,
        )
        .unwrap();
        let reader = {
            let pipe = pipe.clone();
            std::thread::spawn(move || fs::read_to_string(pipe).unwrap())
        };
        let mut opened = Sink::at(&pipe).open(out()).unwrap();
        opened.writer().write_all(b"through").unwrap();
        opened.done().unwrap();
        assert_eq!(reader.join().unwrap(), "through");
        assert!(fs::metadata(&pipe).unwrap().file_type().is_fifo());
    }

    #[test]
    fn lines_arrive_one_by_one() {
        let mut seen = Vec::new();
        let mut lines = Lines::new(|line: &[u8]| {
            seen.push(String::from_utf8_lossy(line).into_owned());
            Ok(())
        });
        for piece in ["a", "b\nc\n", "\nd"] {
            lines.write_all(piece.as_bytes()).unwrap();
        }
        assert_eq!(seen, ["ab", "c", ""]);
    }
}
