//! The runtime directory: where the VMs of this host and user are found by name.
//!
//! ```text
//! NAME.lock      flock'ed by the VM's process for as long as it lives; holds its process id
//! NAME.sock      control socket (HTTP/JSON, docs/openapi.yaml)
//! NAME.console   console socket, with --console socket
//! NAME.pty       symbolic link to the console's terminal, with --console pty
//! NAME@incoming  in place of NAME: a VM that is being moved here, until it is handed over
//! .lock          held for moments, while a name is claimed, given up or found dead
//! ```
//!
//! The lock decides who owns a name, not the socket: the kernel drops it however the process
//! ends, so that what a killed process left behind is known to be dead without asking anybody.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{flock, FlockOperation};
use rustix::io::Errno;

use crate::config::{parse_name, ConfigError};
use crate::console::ConsolePaths;

/// Environment variable that names the directory, before all else.
pub const RUNTIME_DIR_VARIABLE: &str = "MINIVMM_RUNTIME_DIR";

/// Longest path of a Unix socket, bytes: `sun_path` of unix(7) without its final NUL.
pub const MAX_SOCKET_PATH: usize = 107;

/// Ends the names of files of a VM that is being moved here. Not a character of names.
pub const INCOMING: &str = "@incoming";

/// Of the files of a name that are not its lock.
const SUFFIXES: [&str; 3] = [".sock", ".console", ".pty"];

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
fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RuntimeDirError {
    let path = path.to_owned();
    move |source| RuntimeDirError::Io { what, path, source }
}

/// The runtime directory, known to exist and to be this user's own.
#[derive(Debug, Clone)]
pub struct RuntimeDir {
    path: PathBuf,
}

/// A VM that was found by [`RuntimeDir::list`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Its name.
    pub name: String,
    /// Its process, where the lock file tells.
    pub pid: Option<u32>,
    /// Its control socket.
    pub socket: PathBuf,
}

impl RuntimeDir {
    /// Opens the directory of this user, and creates it where it is missing:
    /// `$MINIVMM_RUNTIME_DIR`, else `$XDG_RUNTIME_DIR/minivmm`, else `/run/minivmm` for root, else
    /// `/tmp/minivmm-UID`.
    ///
    /// # Errors
    /// It cannot be created, or is not safe to use: somebody else's, or writable for others.
    pub fn open() -> Result<Self, RuntimeDirError> {
        let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        let uid = rustix::process::geteuid();
        let path = if let Some(dir) = set(RUNTIME_DIR_VARIABLE) {
            std::path::absolute(&dir)
                .map_err(io_error("tell the absolute path of", Path::new(&dir)))?
        } else if let Some(dir) = set("XDG_RUNTIME_DIR") {
            PathBuf::from(dir).join("minivmm")
        } else if uid.is_root() {
            PathBuf::from("/run/minivmm")
        } else {
            PathBuf::from(format!("/tmp/minivmm-{}", uid.as_raw()))
        };
        Self::at(path)
    }

    /// Opens a given directory; see [`RuntimeDir::open`].
    ///
    /// # Errors
    /// As there.
    pub fn at(path: PathBuf) -> Result<Self, RuntimeDirError> {
        match DirBuilder::new().mode(0o700).create(&path) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                return Err(io_error("create the runtime directory", &path)(e));
            }
            _ => {}
        }
        // In /tmp anybody could have put a link here to a directory that we own.
        let meta = fs::symlink_metadata(&path).map_err(io_error("examine", &path))?;
        if !meta.is_dir() {
            return Err(RuntimeDirError::NotADirectory(path));
        }
        let user = rustix::process::geteuid().as_raw();
        if meta.uid() != user {
            return Err(RuntimeDirError::Foreign { path, owner: meta.uid(), user });
        }
        let mode = meta.mode() & 0o7777;
        if mode & 0o022 != 0 {
            return Err(RuntimeDirError::Writable { path, mode });
        }
        Ok(Self { path })
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn file(&self, name: &str, suffix: &str) -> PathBuf {
        self.path.join(format!("{name}{suffix}"))
    }

    /// Serialises what looks at or changes several files. Held for moments only.
    fn guard(&self) -> Result<File, RuntimeDirError> {
        let path = self.path.join(".lock");
        let file = open_lock(&path)?;
        rustix::io::retry_on_intr(|| flock(&file, FlockOperation::LockExclusive))
            .map_err(|e| io_error("lock", &path)(e.into()))?;
        Ok(file)
    }

    /// Takes `name` for this process, and removes what a dead owner left behind. The name is
    /// free again when the result is dropped or the process ends.
    ///
    /// # Errors
    /// The name is taken, is not one, or would make the control socket's path too long.
    pub fn claim(&self, name: &str) -> Result<ClaimedName, RuntimeDirError> {
        parse_name(name)?;
        self.claim_entry(name, name)
    }

    fn claim_entry(&self, name: &str, entry: &str) -> Result<ClaimedName, RuntimeDirError> {
        check_socket_path(&self.file(entry, ".sock"))?;
        let _guard = self.guard()?;
        let lock = self.lock_entry(entry)?;
        let (name, entry) = (name.to_owned(), entry.to_owned());
        Ok(ClaimedName { dir: self.clone(), name, entry, lock })
    }

    /// Takes the lock of `entry`. Under the guard.
    fn lock_entry(&self, entry: &str) -> Result<File, RuntimeDirError> {
        let path = self.file(entry, ".lock");
        let mut lock = open_lock(&path)?;
        if !try_lock(&lock, &path)? {
            let (name, pid) = (entry.to_owned(), pid_text(read_pid(&mut lock)));
            return Err(RuntimeDirError::NameTaken { name, pid });
        }
        write_pid(&mut lock).map_err(io_error("write", &path))?;
        self.remove_leftovers(entry);
        Ok(lock)
    }

    /// As [`RuntimeDir::claim`], for a VM that is being moved here: until it is handed over, the
    /// name itself may belong to the process that it comes from.
    ///
    /// # Errors
    /// As [`RuntimeDir::claim`].
    pub fn claim_incoming(&self, name: &str) -> Result<ClaimedName, RuntimeDirError> {
        parse_name(name)?;
        self.claim_entry(name, &format!("{name}{INCOMING}"))
    }

    /// The control socket of the VM `name`; of the one that is being moved here where there is no
    /// other, or where `name` ends with `@incoming`.
    ///
    /// # Errors
    /// No process runs such a VM.
    pub fn find(&self, name: &str) -> Result<Found, RuntimeDirError> {
        let plain = name.strip_suffix(INCOMING);
        parse_name(plain.unwrap_or(name))?;
        let _guard = self.guard()?;
        let mut found = self.probe(name)?;
        if found.is_none() && plain.is_none() {
            found = self.probe(&format!("{name}{INCOMING}"))?;
        }
        found.ok_or_else(|| RuntimeDirError::NoSuchVm {
            name: name.to_owned(),
            dir: self.path.clone(),
        })
    }

    /// All VMs, by name. What dead ones left behind is removed on the way.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn list(&self) -> Result<Vec<Found>, RuntimeDirError> {
        let _guard = self.guard()?;
        let mut names: Vec<String> = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(io_error("read", &self.path))? {
            let entry = entry.map_err(io_error("read", &self.path))?;
            let file_name = entry.file_name();
            let name = file_name
                .to_str()
                .and_then(|f| f.strip_suffix(".lock").or_else(|| f.strip_suffix(".sock")));
            let is_name =
                |name: &&str| parse_name(name.strip_suffix(INCOMING).unwrap_or(name)).is_ok();
            if let Some(name) = name.filter(is_name) {
                names.push(name.to_owned());
            }
        }
        names.sort_unstable();
        names.dedup();
        let mut found = Vec::new();
        for name in names {
            found.extend(self.probe(&name)?);
        }
        Ok(found)
    }

    /// Whether somebody owns `name`; removes what is left if nobody does. Under the guard.
    fn probe(&self, name: &str) -> Result<Option<Found>, RuntimeDirError> {
        let path = self.file(name, ".lock");
        match File::options().read(true).write(true).open(&path) {
            Ok(mut lock) => {
                if !try_lock(&lock, &path)? {
                    let pid = read_pid(&mut lock);
                    let socket = self.file(name, ".sock");
                    return Ok(Some(Found { name: name.to_owned(), pid, socket }));
                }
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(io_error("open", &path)(e)),
        }
        self.remove_leftovers(name);
        let _ = fs::remove_file(&path);
        Ok(None)
    }

    /// Removes sockets and links of a name whose lock this process holds. Under the guard.
    fn remove_leftovers(&self, name: &str) {
        for suffix in SUFFIXES {
            let path = self.file(name, suffix);
            match fs::remove_file(&path) {
                Ok(()) => tracing::info!(path = %path.display(), "removed what a VM left behind"),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                // Whoever needs the path reports it.
                Err(e) => tracing::warn!(path = %path.display(), error = %e, "cannot remove"),
            }
        }
    }
}

/// A name that this process owns.
#[derive(Debug)]
pub struct ClaimedName {
    dir: RuntimeDir,
    name: String,
    /// What its files are called: the name, with [`INCOMING`] until the VM is handed over.
    entry: String,
    /// Closing it gives up the name.
    lock: File,
}

impl ClaimedName {
    /// The name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Path of the control socket.
    #[must_use]
    pub fn socket_path(&self) -> PathBuf {
        self.dir.file(&self.entry, ".sock")
    }

    /// Takes the name itself, after a hand-over: the control socket and the console are found
    /// under it from now on. Without effect where this process has it.
    ///
    /// # Errors
    /// [`RuntimeDirError::NameTaken`] while the process that the VM comes from, or another, has the
    /// name; nothing has changed then.
    pub fn take_over(&mut self) -> Result<(), RuntimeDirError> {
        if self.entry == self.name {
            return Ok(());
        }
        let _guard = self.dir.guard()?;
        let lock = self.dir.lock_entry(&self.name)?;
        for suffix in SUFFIXES {
            let (from, to) =
                (self.dir.file(&self.entry, suffix), self.dir.file(&self.name, suffix));
            match fs::rename(&from, &to) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(io_error("rename", &from)(e));
                }
                _ => {}
            }
        }
        let _ = fs::remove_file(self.dir.file(&self.entry, ".lock"));
        self.entry.clone_from(&self.name);
        self.lock = lock;
        Ok(())
    }

    /// Where the console may put its socket or link.
    #[must_use]
    pub fn console_paths(&self) -> ConsolePaths {
        ConsolePaths {
            socket: self.dir.file(&self.entry, ".console"),
            pty_link: self.dir.file(&self.entry, ".pty"),
        }
    }

    /// Opens the control socket, for this user only.
    ///
    /// # Errors
    /// As [`listen`].
    pub fn listen(&self) -> Result<UnixListener, RuntimeDirError> {
        listen(&self.socket_path())
    }
}

impl Drop for ClaimedName {
    fn drop(&mut self) {
        // With the guard nobody can claim the name between the removal and the unlocking.
        match self.dir.guard() {
            Ok(_guard) => {
                self.dir.remove_leftovers(&self.entry);
                let _ = fs::remove_file(self.dir.file(&self.entry, ".lock"));
            }
            Err(e) => tracing::warn!(error = %e, "leaving the name's files behind"),
        }
    }
}

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

/// A file that holds the process id of this process, and is locked as long as it runs.
#[derive(Debug)]
pub struct Pidfile {
    path: PathBuf,
    _file: File,
}

impl Pidfile {
    /// Writes the process id to `path`. The file is removed when the result is dropped.
    ///
    /// # Errors
    /// The file cannot be written, or belongs to a process that still runs.
    pub fn create(path: &Path) -> Result<Self, RuntimeDirError> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o644)
            .open(path)
            .map_err(io_error("create the pidfile", path))?;
        if !try_lock(&file, path)? {
            let pid = pid_text(read_pid(&mut file));
            return Err(RuntimeDirError::PidfileTaken { path: path.to_owned(), pid });
        }
        write_pid(&mut file).map_err(io_error("write the pidfile", path))?;
        Ok(Self { path: path.to_owned(), _file: file })
    }
}

impl Drop for Pidfile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

fn open_lock(path: &Path) -> Result<File, RuntimeDirError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(io_error("open", path))
}

/// True if this process has the lock now, false if another has it.
fn try_lock(file: &File, path: &Path) -> Result<bool, RuntimeDirError> {
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(e) => Err(io_error("lock", path)(e.into())),
    }
}

fn write_pid(file: &mut File) -> io::Result<()> {
    file.set_len(0)?;
    file.rewind()?;
    writeln!(file, "{}", std::process::id())
}

fn read_pid(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    file.take(16).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

fn pid_text(pid: Option<u32>) -> String {
    pid.map_or_else(|| "unknown".to_owned(), |pid| pid.to_string())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use vmm_sys_util::tempdir::TempDir;

    fn dir() -> (TempDir, RuntimeDir) {
        let temp = TempDir::new().unwrap();
        let dir = RuntimeDir::at(temp.as_path().join("rt")).unwrap();
        (temp, dir)
    }

    #[test]
    fn a_name_has_one_owner_and_is_free_afterwards() {
        let (_temp, dir) = dir();
        let owner = dir.claim("a").unwrap();
        let refusal = dir.claim("a").unwrap_err().to_string();
        assert!(refusal.contains(&format!("process {}", std::process::id())), "{refusal}");
        assert!(refusal.contains("--name"), "{refusal}");
        let _other = dir.claim("b").unwrap();
        drop(owner);
        dir.claim("a").unwrap();
    }

    #[test]
    fn an_incoming_vm_takes_the_name_over_when_it_is_free() {
        let (_temp, dir) = dir();
        let source = dir.claim("a").unwrap();
        let mut incoming = dir.claim_incoming("a").unwrap();
        let _listener = incoming.listen().unwrap();
        assert!(dir.claim_incoming("a").is_err());
        let names = || dir.list().unwrap().into_iter().map(|f| f.name).collect::<Vec<_>>();
        assert_eq!(names(), ["a", "a@incoming"]);
        assert!(matches!(incoming.take_over(), Err(RuntimeDirError::NameTaken { .. })));
        drop(source);
        // Found by its own name and, as long as nobody else has it, by the plain one.
        let socket = dir.find("a@incoming").unwrap().socket;
        assert_eq!(dir.find("a").unwrap().socket, socket);
        incoming.take_over().unwrap();
        assert_eq!(names(), ["a"]);
        let socket = dir.find("a").unwrap().socket;
        assert_eq!(socket, incoming.socket_path());
        std::os::unix::net::UnixStream::connect(&socket).unwrap();
        assert!(dir.claim("a").is_err());
        incoming.take_over().unwrap();
        drop(incoming);
        assert!(names().is_empty());
        dir.claim("a").unwrap();
    }

    #[test]
    fn the_socket_is_for_this_user_only() {
        let (_temp, dir) = dir();
        assert_eq!(fs::metadata(dir.path()).unwrap().mode() & 0o777, 0o700);
        let owner = dir.claim("a").unwrap();
        let _listener = owner.listen().unwrap();
        assert_eq!(fs::metadata(owner.socket_path()).unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn the_dead_are_found_and_removed() {
        let (_temp, dir) = dir();
        let alive = dir.claim("alive").unwrap();
        let _listener = alive.listen().unwrap();
        // As kill -9 leaves it: files, and nobody who holds the lock.
        fs::write(dir.file("dead", ".lock"), "1\n").unwrap();
        for suffix in [".sock", ".console"] {
            drop(listen(&dir.file("dead", suffix)).unwrap());
        }
        std::os::unix::fs::symlink("/nowhere", dir.file("dead", ".pty")).unwrap();
        drop(listen(&dir.file("older", ".sock")).unwrap());

        let found = dir.list().unwrap();
        let pid = Some(std::process::id());
        let socket = alive.socket_path();
        assert_eq!(found, [Found { name: "alive".into(), pid, socket }]);
        let mut left: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        assert_eq!(left, [".lock", "alive.lock", "alive.sock"]);
    }

    #[test]
    fn a_stale_socket_is_replaced() {
        let (_temp, dir) = dir();
        drop(listen(&dir.file("a", ".sock")).unwrap());
        let owner = dir.claim("a").unwrap();
        owner.listen().unwrap();
    }

    #[test]
    fn finding_says_where_it_looked() {
        let (_temp, dir) = dir();
        let refusal = dir.find("ghost").unwrap_err();
        assert!(matches!(refusal, RuntimeDirError::NoSuchVm { .. }));
        assert!(refusal.to_string().contains("minivmm list"), "{refusal}");
        assert!(matches!(dir.find("../x"), Err(RuntimeDirError::Name(_))));
        let owner = dir.claim("a").unwrap();
        assert_eq!(dir.find("a").unwrap().socket, owner.socket_path());
    }

    #[test]
    fn a_long_path_is_refused_with_length_and_remedy() {
        let temp = TempDir::new().unwrap();
        let long = temp.as_path().join("d".repeat(100));
        let dir = RuntimeDir::at(long).unwrap();
        let path = dir.file("a", ".sock");
        let refusal = dir.claim("a").unwrap_err().to_string();
        for part in [path.to_str().unwrap(), &path.as_os_str().len().to_string(), "shorter"] {
            assert!(refusal.contains(part), "{refusal}");
        }
        assert!(matches!(listen(&path), Err(RuntimeDirError::PathTooLong { .. })));
    }

    #[test]
    fn the_longest_path_works() {
        let temp = TempDir::new().unwrap();
        let room = MAX_SOCKET_PATH - temp.as_path().as_os_str().len() - 1;
        let path = temp.as_path().join("s".repeat(room));
        assert_eq!(path.as_os_str().len(), MAX_SOCKET_PATH);
        listen(&path).unwrap();
    }

    #[test]
    fn an_unsafe_directory_is_refused() {
        let temp = TempDir::new().unwrap();
        let path = temp.as_path().join("rt");
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
        let refusal = RuntimeDir::at(path.clone()).unwrap_err();
        assert!(matches!(refusal, RuntimeDirError::Writable { mode: 0o777, .. }));

        let link = temp.as_path().join("link");
        std::os::unix::fs::symlink(temp.as_path(), &link).unwrap();
        assert!(matches!(RuntimeDir::at(link), Err(RuntimeDirError::NotADirectory(_))));

        if rustix::process::geteuid().is_root() {
            fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
            std::os::unix::fs::chown(&path, Some(12345), None).unwrap();
            let refusal = RuntimeDir::at(path).unwrap_err();
            assert!(matches!(refusal, RuntimeDirError::Foreign { owner: 12345, .. }));
        }
    }

    #[test]
    fn a_pidfile_names_its_process_and_goes_with_it() {
        let temp = TempDir::new().unwrap();
        let path = temp.as_path().join("pid");
        fs::write(&path, "999999 of a dead process, longer than what replaces it\n").unwrap();
        let pidfile = Pidfile::create(&path).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{}\n", std::process::id()));
        assert!(matches!(Pidfile::create(&path), Err(RuntimeDirError::PidfileTaken { .. })));
        drop(pidfile);
        assert!(!path.exists());
    }
}
