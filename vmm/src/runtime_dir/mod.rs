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

mod claimed;
mod error;
mod lock;
mod socket;

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{flock, FlockOperation};

use crate::config::parse_name;
use error::io_error;
use lock::{open_lock, pid_text, read_pid, try_lock, write_pid};

pub use claimed::ClaimedName;
pub use error::RuntimeDirError;
pub use lock::Pidfile;
pub use socket::{check_socket_path, listen, MAX_SOCKET_PATH};

/// Environment variable that names the directory, before all else.
pub const RUNTIME_DIR_VARIABLE: &str = "MINIVMM_RUNTIME_DIR";

/// Ends the names of files of a VM that is being moved here. Not a character of names.
pub const INCOMING: &str = "@incoming";

/// Of the files of a name that are not its lock.
const SUFFIXES: [&str; 3] = [".sock", ".console", ".pty"];

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
        Ok(ClaimedName::new(self.clone(), name.to_owned(), entry.to_owned(), lock))
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::os::unix::fs::PermissionsExt;
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
}
