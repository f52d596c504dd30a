//! The one error type. Its variants decide the exit code (see [`Error::exit_code`]).

use std::path::{Path, PathBuf};

/// What can go wrong, sorted by who can mend it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Bad usage, configuration or input. The text says what, where, and what to do. Exit code 2.
    #[error("{0}")]
    Input(String),
    /// The operating system refused a file operation.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder concerned.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A tensor operation failed: shapes or types that do not fit (an internal error).
    #[error("tensor operation: {0}")]
    Tensor(#[from] candle_core::Error),
    /// A message did not come, came wrong, or its peer is gone.
    #[error("{0}")]
    Transport(String),
    /// The computation went wrong while running (for instance a loss that is not a number).
    #[error("{0}")]
    Run(String),
    /// A loss, a cotangent or a gradient is not a finite number.
    #[error("{0}")]
    NonFinite(String),
    /// Stopped before the end with a checkpoint written; the same command resumes. Exit code 75.
    #[error("{0}")]
    Stopped(String),
}

/// The crate's result type.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An [`Error::Input`] from anything printable.
    pub fn input(text: impl Into<String>) -> Self {
        Error::Input(text.into())
    }

    /// An [`Error::Io`] at `path`.
    pub fn io(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Error::Io { path: path.as_ref().to_path_buf(), source }
    }

    /// The same with `place` in front of its text; a file says for itself where it is.
    pub fn within(self, place: &str) -> Self {
        match self {
            Error::Input(text) => Error::Input(format!("{place}: {text}")),
            Error::Transport(text) => Error::Transport(format!("{place}: {text}")),
            Error::NonFinite(text) => Error::NonFinite(format!("{place}: {text}")),
            e @ (Error::Io { .. } | Error::Stopped(_)) => e,
            e @ (Error::Run(_) | Error::Tensor(_)) => Error::Run(format!("{place}: {e}")),
        }
    }

    /// The process's exit code: 2 input, 75 stopped with a checkpoint, 1 anything else.
    pub fn exit_code(&self) -> i32 {
        match self {
            Error::Input(_) => 2,
            Error::Stopped(_) => 75,
            _ => 1,
        }
    }
}
