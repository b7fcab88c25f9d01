//! Why a runtime directory, or a name in it, cannot be used.

use std::io;
use std::path::{Path, PathBuf};

use super::{MAX_SOCKET_PATH, RUNTIME_DIR_VARIABLE};
use crate::config::ConfigError;

/// Why the runtime directory, or a name in it, cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeDirError {
    /// Something in the file system went wrong.
    #[error("cannot {what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The path exists and is something else.
    #[error("{0} is not a directory: remove it, or set {RUNTIME_DIR_VARIABLE} to another place")]
    NotADirectory(PathBuf),
    /// Somebody else owns the directory.
    #[error(
        "{path} belongs to user {owner}, not to you ({user}): set {RUNTIME_DIR_VARIABLE} to a \
         directory of your own"
    )]
    Foreign {
        /// The directory.
        path: PathBuf,
        /// Its owner's user id.
        owner: u32,
        /// The user id of this process.
        user: u32,
    },
    /// Others may write to the directory.
    #[error("others may write to {path} (mode {mode:o}): chmod 700 it")]
    Writable {
        /// The directory.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The name is not one.
    #[error(transparent)]
    Name(#[from] ConfigError),
    /// Another process runs a VM of this name.
    #[error(
        "a VM named {name} runs already (process {pid}): choose another --name, or end it with \
         `minivmm stop {name}`"
    )]
    NameTaken {
        /// The name.
        name: String,
        /// Process that holds it, or `unknown`.
        pid: String,
    },
    /// No process runs a VM of this name.
    #[error("no VM named {name} runs here (looked in {dir}): `minivmm list` shows those that do")]
    NoSuchVm {
        /// The name.
        name: String,
        /// The directory.
        dir: PathBuf,
    },
    /// A socket's path does not fit.
    #[error(
        "the socket path {path} is {length} bytes long, and a Unix socket's may have \
         {MAX_SOCKET_PATH}: use a shorter --name, or set {RUNTIME_DIR_VARIABLE} to a shorter \
         directory"
    )]
    PathTooLong {
        /// The path.
        path: PathBuf,
        /// Its length, bytes.
        length: usize,
    },
    /// Another process holds the pidfile.
    #[error(
        "the pidfile {path} belongs to process {pid}, which still runs: use another --pidfile"
    )]
    PidfileTaken {
        /// The file.
        path: PathBuf,
        /// The process, or `unknown`.
        pid: String,
    },
}

/// Names the step that failed, for [`Result::map_err`].
pub(super) fn io_error(
    what: &'static str,
    path: &Path,
) -> impl FnOnce(io::Error) -> RuntimeDirError {
    let path = path.to_owned();
    move |source| RuntimeDirError::Io { what, path, source }
}
