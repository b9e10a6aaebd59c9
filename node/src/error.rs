//! What a command ends with: a kind that becomes the exit code, a sentence, and what to do next.

use std::fmt;
use std::process::ExitCode;

/// Whose turn it is to do something about a failure. The numbers are the process's exit codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The swarm answered, and the answer is no: a task failed, an entry is not there.
    Failed = 1,
    /// The command line or the configuration is wrong.
    Usage = 2,
    /// This machine cannot: a port, a disk, a file, a model.
    Machine = 3,
    /// No node answers at the API's address.
    NotRunning = 4,
}

/// A failure that a person reads.
#[derive(Debug)]
pub(crate) struct CommandError {
    kind: Kind,
    message: String,
    hints: Vec<String>,
}

impl CommandError {
    pub(crate) fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), hints: Vec::new() }
    }

    pub(crate) fn usage(message: impl fmt::Display) -> Self {
        Self::new(Kind::Usage, message.to_string())
    }

    pub(crate) fn machine(message: impl fmt::Display) -> Self {
        Self::new(Kind::Machine, message.to_string())
    }

    pub(crate) fn failed(message: impl fmt::Display) -> Self {
        Self::new(Kind::Failed, message.to_string())
    }

    /// Adds a line that says what to do next.
    #[must_use]
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }

    pub(crate) const fn kind(&self) -> Kind {
        self.kind
    }

    pub(crate) fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.kind as u8)
    }
}

impl fmt::Display for CommandError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", self.message)?;
        for hint in &self.hints {
            write!(f, "\n  hint: {hint}")?;
        }
        Ok(())
    }
}

impl std::error::Error for CommandError {}
