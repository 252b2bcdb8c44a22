//! What can go wrong at the command line, and the exit code each kind has.
//!
//! Library errors become one line on standard error; [`code`] finds the kind anywhere in an error's chain.
use karez_net::{control::ConnectError, identity::IdentityError, transfer::TransferError};
use std::fmt;

/// Kinds of failure that scripts may tell apart. The number is the exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Other = 1,
    Usage = 2,
    Refused = 3,
    NotFound = 4,
    NotPlaceable = 5,
    Unreachable = 6,
    NotAdmitted = 7,
    JobFailed = 8,
    NotVerified = 9,
    Interrupted = 130,
}

/// The table that `karez help exit-codes` prints.
pub(crate) const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    something else failed; the message says what
  2    the command line is wrong
  3    the input was refused: a bad line, a bad file, a bad order
  4    not found: a job, a model, an artifact, a file
  5    not placeable: no node may run it at this price, there, in this budget
  6    the scheduler cannot be reached
  7    not admitted, or the key is missing or unsafe
  8    the job failed or was cancelled
  9    verification failed
  130  interrupted";

/// An error with an exit code. The message names its subject, the limit it met and the next step.
#[derive(Debug)]
pub(crate) struct Fault {
    kind: Kind,
    message: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}
impl std::error::Error for Fault {}

/// An error of that kind, ready for `?`.
pub(crate) fn fault(kind: Kind, message: impl Into<String>) -> anyhow::Error {
    anyhow::Error::new(Fault {
        kind,
        message: message.into(),
    })
}

/// The exit code of `error`: the first cause in its chain that has one.
pub(crate) fn code(error: &anyhow::Error) -> u8 {
    error.chain().find_map(kind_of).unwrap_or(Kind::Other) as u8
}

fn kind_of(cause: &(dyn std::error::Error + 'static)) -> Option<Kind> {
    if let Some(fault) = cause.downcast_ref::<Fault>() {
        return Some(fault.kind);
    }
    if let Some(error) = cause.downcast_ref::<ConnectError>() {
        return Some(match error {
            ConnectError::WrongKey { .. } => Kind::NotAdmitted,
            _ => Kind::Unreachable,
        });
    }
    if let Some(error) = cause.downcast_ref::<TransferError>() {
        return Some(match error {
            TransferError::Declined { .. } => Kind::NotAdmitted,
            TransferError::NoHolder { .. } => Kind::NotFound,
            _ => Kind::Other,
        });
    }
    if let Some(error) = cause.downcast_ref::<IdentityError>() {
        return Some(match error {
            IdentityError::Io { .. } => Kind::Other,
            _ => Kind::NotAdmitted,
        });
    }
    if let Some(status) = cause.downcast_ref::<tonic::Status>() {
        return Some(kind_of_status(status));
    }
    None
}

fn kind_of_status(status: &tonic::Status) -> Kind {
    use tonic::Code;
    match status.code() {
        Code::InvalidArgument | Code::OutOfRange | Code::AlreadyExists => Kind::Refused,
        Code::NotFound => Kind::NotFound,
        Code::FailedPrecondition | Code::ResourceExhausted => Kind::NotPlaceable,
        Code::Unavailable | Code::DeadlineExceeded => Kind::Unreachable,
        Code::PermissionDenied | Code::Unauthenticated => Kind::NotAdmitted,
        Code::DataLoss => Kind::NotVerified,
        _ => Kind::Other,
    }
}

/// What the scheduler said, without the transport's wrapping.
pub(crate) fn refused(status: tonic::Status) -> anyhow::Error {
    let kind = kind_of_status(&status);
    let message = match kind {
        Kind::Unreachable => format!(
            "the scheduler did not answer ({}): check that it runs, then try again",
            status.message()
        ),
        _ if status.message().is_empty() => format!("the scheduler answered {}", status.code()),
        _ => status.message().to_owned(),
    };
    fault(kind, message)
}

/// The whole chain in one line: causes that repeat what was already said are left out, and so is what the next
/// cause says again at its beginning.
pub(crate) fn one_line(error: &anyhow::Error) -> String {
    let mut said: Vec<String> = Vec::new();
    for cause in error.chain() {
        let text = cause.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        if said.iter().any(|s| s.contains(&text)) {
            continue;
        }
        let again = |last: &String| {
            let rest = text.strip_prefix(last.as_str());
            rest.is_some_and(|rest| rest.starts_with([':', ' ', ',']))
        };
        if said.last().is_some_and(again) {
            said.pop();
        }
        said.push(text);
    }
    advised(said.join(": "))
}

/// The system's own error numbers say little to most people: what to do says more.
fn advised(text: String) -> String {
    const BEGIN: &str = " (os error ";
    let Some(at) = text.find(BEGIN) else { return text };
    let Some(length) = text[at..].find(')') else {
        return text;
    };
    let number = text[at + BEGIN.len()..at + length].parse();
    let advice = number
        .ok()
        .and_then(|n| advice(&std::io::Error::from_raw_os_error(n)));
    match advice {
        None => text,
        Some(advice) => format!("{}{}: {advice}", &text[..at], &text[at + length + 1..]),
    }
}

fn advice(error: &std::io::Error) -> Option<&'static str> {
    use std::io::ErrorKind as E;
    Some(match error.kind() {
        E::PermissionDenied => "see whose it is and who may use it, or choose another place",
        E::NotFound => "see whether the path is right and its folder exists",
        E::NotADirectory => "a part of this path is no folder, choose another place",
        E::IsADirectory => "give a file",
        E::StorageFull | E::QuotaExceeded => "make room there and try again, nothing was lost",
        E::ReadOnlyFilesystem => "nothing can be written there, choose another place",
        E::InvalidFilename => "choose a shorter or simpler name",
        _ => return None,
    })
}

/// The table of exit codes for programs.
pub(crate) fn exit_codes_json() -> serde_json::Value {
    let lines = EXIT_CODES.lines().filter_map(|line| {
        let (code, meaning) = line.trim().split_once(' ')?;
        Some(serde_json::json!({"code": code.parse::<u8>().ok()?, "meaning": meaning.trim()}))
    });
    serde_json::Value::Array(lines.collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn the_code_is_found_under_context() {
        let deep = Err::<(), _>(fault(Kind::NotFound, "no model \"x\"")).context("embedding");
        let error = deep.expect_err("an error");
        assert_eq!(code(&error), 4);
        assert_eq!(one_line(&error), "embedding: no model \"x\"");
        assert_eq!(code(&anyhow::anyhow!("anything")), 1);
        let io = |number| anyhow::Error::new(std::io::Error::from_raw_os_error(number));
        assert_eq!(
            one_line(&io(28).context("writing out.jsonl")),
            "writing out.jsonl: No space left on device: make room there and try again, nothing was lost"
        );
        let again = anyhow::anyhow!("/dev/null cannot be stored").context("/dev/null");
        assert_eq!(one_line(&again), "/dev/null cannot be stored");
        assert_eq!(exit_codes_json()[10]["code"], 130);
        assert_eq!(code(&anyhow::Error::new(tonic::Status::unavailable("gone"))), 6);
    }
}
