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
    if cause.is::<IdentityError>() {
        return Some(Kind::NotAdmitted);
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

/// The whole chain in one line: causes that repeat what was already said are left out.
pub(crate) fn one_line(error: &anyhow::Error) -> String {
    let mut out = String::new();
    for cause in error.chain() {
        let text = cause.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        if out.contains(&text) {
            continue;
        }
        if !out.is_empty() {
            out.push_str(": ");
        }
        out.push_str(&text);
    }
    out
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
        assert_eq!(code(&anyhow::Error::new(tonic::Status::unavailable("gone"))), 6);
    }
}
