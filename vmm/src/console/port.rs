//! The far end of a console: descriptors to read, to write, and to accept from.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{fcntl_setfl, OFlags};
use rustix::pty::{grantpt, ioctl_tiocgptpeer, openpt, ptsname, unlockpt, OpenptFlags};
use rustix::termios::{tcgetattr, tcsetattr, OptionalActions};

use super::terminal::{set_raw, stdin_kind, StdinKind};
use super::{ConsoleError, ConsolePaths};
use crate::config::ConsoleConfig;
use crate::runtime_dir::listen;

/// The far end of a console.
#[derive(Default)]
pub(super) struct Port {
    /// Input; `None` if there is none, or no longer.
    pub(super) input: Option<OwnedFd>,
    /// Output; `None` if there is none now.
    pub(super) output: Option<OwnedFd>,
    /// Clients come here, and are input and output then.
    pub(super) listener: Option<UnixListener>,
    /// Whether the escape key is honoured.
    pub(super) interactive: bool,
    /// Kept open so that the pseudo-terminal does not hang up between readers.
    _pty: Option<OwnedFd>,
    /// Where others reach it.
    pub(super) path: Option<PathBuf>,
    /// File to remove at the end.
    pub(super) created: Option<PathBuf>,
}

impl Port {
    pub(super) fn open(config: &ConsoleConfig, paths: &ConsolePaths) -> Result<Self, ConsoleError> {
        match config {
            ConsoleConfig::Stdio => Ok(Self::stdio()?),
            ConsoleConfig::Pty => Self::pty(&paths.pty_link).map_err(ConsoleError::Pty),
            ConsoleConfig::Socket => {
                let listener = listen(&paths.socket)?;
                listener.set_nonblocking(true)?;
                Ok(Self {
                    listener: Some(listener),
                    path: Some(paths.socket.clone()),
                    created: Some(paths.socket.clone()),
                    ..Self::default()
                })
            }
            ConsoleConfig::File(path) => {
                let file = OpenOptions::new()
                    .write(true)
                    .create(true)
                    .truncate(true)
                    // A FIFO without a reader fails instead of waiting for one.
                    .custom_flags(libc::O_NONBLOCK)
                    .open(path)
                    .map_err(|source| ConsoleError::File { path: path.clone(), source })?;
                Ok(Self { output: Some(file.into()), ..Self::default() })
            }
        }
    }

    fn stdio() -> io::Result<Self> {
        let kind = stdin_kind();
        if kind == StdinKind::Terminal {
            set_raw()?;
        }
        let input = match kind {
            StdinKind::Background => None,
            // Closed altogether is fine too.
            _ => io::stdin().as_fd().try_clone_to_owned().ok(),
        };
        let output = io::stdout().as_fd().try_clone_to_owned().ok();
        let interactive = kind == StdinKind::Terminal;
        Ok(Self { input, output, interactive, ..Self::default() })
    }

    fn pty(link: &Path) -> io::Result<Self> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let path = PathBuf::from(std::ffi::OsString::from_vec(ptsname(&master, [])?.into_bytes()));
        let slave = ioctl_tiocgptpeer(&master, flags)?;
        // The guest has its own line editing and echo.
        let mut settings = tcgetattr(&slave)?;
        settings.make_raw();
        tcsetattr(&slave, OptionalActions::Now, &settings)?;
        fcntl_setfl(&master, OFlags::RDWR | OFlags::NONBLOCK)?;
        let created = match std::os::unix::fs::symlink(&path, link) {
            Ok(()) => Some(link.to_owned()),
            Err(error) => {
                // A convenience only: `info` has the path.
                tracing::warn!(link = %link.display(), %error, "no link to the console's terminal");
                None
            }
        };
        Ok(Self {
            input: Some(master.try_clone()?),
            output: Some(master),
            _pty: Some(slave),
            path: Some(path),
            created,
            ..Self::default()
        })
    }
}
