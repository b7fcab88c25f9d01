//! Unix sockets for their owner only.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

use rustix::io::Errno;

use super::error::io_error;
use super::RuntimeDirError;

/// Longest path of a Unix socket, bytes: `sun_path` of unix(7) without its final NUL.
pub const MAX_SOCKET_PATH: usize = 107;

/// Checks that a Unix socket can have this path.
///
/// # Errors
/// It is too long: [`MAX_SOCKET_PATH`].
pub fn check_socket_path(path: &Path) -> Result<(), RuntimeDirError> {
    let length = path.as_os_str().len();
    if length > MAX_SOCKET_PATH {
        return Err(RuntimeDirError::PathTooLong { path: path.to_owned(), length });
    }
    Ok(())
}

/// Listens on a Unix socket at `path`, which must not exist, with mode 0600.
///
/// # Errors
/// The path is too long or cannot be bound.
pub fn listen(path: &Path) -> Result<UnixListener, RuntimeDirError> {
    use rustix::net::{bind, listen, socket_with, AddressFamily, SocketAddrUnix};
    use rustix::net::{SocketFlags, SocketType};

    check_socket_path(path)?;
    let wrong = || io_error("listen on", path);
    let create = || {
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // The file takes its mode from the socket: at no moment can others connect.
        rustix::fs::fchmod(&socket, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR)?;
        bind(&socket, &SocketAddrUnix::new(path)?)?;
        listen(&socket, 128)?;
        Ok::<_, Errno>(UnixListener::from(socket))
    };
    let listener = create().map_err(|e| wrong()(e.into()))?;
    let mode = fs::symlink_metadata(path).map_err(wrong())?.permissions().mode();
    if mode & 0o077 != 0 {
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(wrong())?;
    }
    Ok(listener)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use vmm_sys_util::tempdir::TempDir;

    #[test]
    fn the_longest_path_works() {
        let temp = TempDir::new().unwrap();
        let room = MAX_SOCKET_PATH - temp.as_path().as_os_str().len() - 1;
        let path = temp.as_path().join("s".repeat(room));
        assert_eq!(path.as_os_str().len(), MAX_SOCKET_PATH);
        listen(&path).unwrap();
    }
}
