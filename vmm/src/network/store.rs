//! Declared networks on the disk: one file each, written before anything is made.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{flock, FlockOperation};
use serde::{Deserialize, Serialize};

use super::options::NetworkOptions;
use super::plan::Step;
use super::NetworkError;
use crate::state_dir;

/// The form of the files.
const VERSION: u32 = 1;
const EXTENSION: &str = "json";

/// How far a network is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It is being made, or its maker was killed.
    Creating,
    /// All of it was made.
    Ready,
    /// It is being taken away.
    Deleting,
}

/// A declared network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Form of this record.
    version: u32,
    /// Its name.
    pub name: String,
    /// How far it is.
    pub state: State,
    /// As it was declared.
    pub options: NetworkOptions,
    /// Its MTU, which guests are told, bytes.
    pub mtu: u16,
    /// The bridge that cards are attached to.
    pub bridge: String,
    /// What is made for it, in this order.
    pub steps: Vec<Step>,
    /// The host did not route IPv4 before.
    pub forwarding_was_off: bool,
}

impl Record {
    /// Of a network of which nothing is made yet.
    #[must_use]
    pub fn new(
        name: &str,
        options: NetworkOptions,
        mtu: u16,
        bridge: String,
        steps: Vec<Step>,
    ) -> Self {
        let state = State::Creating;
        Self {
            version: VERSION,
            name: name.to_owned(),
            state,
            options,
            mtu,
            bridge,
            steps,
            forwarding_was_off: false,
        }
    }
}

/// The networks of this host.
#[derive(Debug)]
pub struct Store {
    directory: PathBuf,
}

/// Nobody else changes networks while it is held.
#[derive(Debug)]
pub struct StoreLock {
    // The lock goes with it.
    _file: File,
}

fn failed<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> NetworkError + 'a {
    move |error| NetworkError::File { what, path: path.to_owned(), error }
}

impl Store {
    /// `networks` in the state directory.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn open() -> Result<Self, NetworkError> {
        let directory = state_dir::open()?.join("networks");
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&directory);
        made.map_err(failed("create", &directory))?;
        Ok(Self { directory })
    }

    /// Waits until nobody else changes networks. Whoever does so waits for nothing without a limit.
    ///
    /// # Errors
    /// The system refuses.
    pub fn lock(&self) -> Result<StoreLock, NetworkError> {
        let path = self.directory.join("lock");
        let open = File::options().write(true).create(true).truncate(false).mode(0o600).open(&path);
        let file = open.map_err(failed("open", &path))?;
        flock(&file, FlockOperation::LockExclusive).map_err(|e| failed("lock", &path)(e.into()))?;
        Ok(StoreLock { _file: file })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name).with_extension(EXTENSION)
    }

    /// A network, if it was declared.
    ///
    /// # Errors
    /// Its file cannot be read, or is none.
    pub fn get(&self, name: &str) -> Result<Option<Record>, NetworkError> {
        let path = self.path(name);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed("read", &path)(error)),
        };
        let damaged = |why: String| NetworkError::Damaged { path: path.clone(), why };
        let record: Record = serde_json::from_str(&text).map_err(|e| damaged(e.to_string()))?;
        if record.version != VERSION {
            return Err(damaged(format!("its version is {}, not {VERSION}", record.version)));
        }
        if record.name != name {
            return Err(damaged(format!("it is of network {}", record.name)));
        }
        Ok(Some(record))
    }

    /// All networks, by name.
    ///
    /// # Errors
    /// As [`Store::get`].
    pub fn all(&self) -> Result<Vec<Record>, NetworkError> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.directory).map_err(failed("read", &self.directory))? {
            let path = entry.map_err(failed("read", &self.directory))?.path();
            let name = path.file_stem().and_then(|stem| stem.to_str());
            if path.extension().is_some_and(|extension| extension == EXTENSION) {
                names.extend(name.map(ToOwned::to_owned));
            }
        }
        names.sort();
        // One may be deleted meanwhile.
        names.iter().filter_map(|name| self.get(name).transpose()).collect()
    }

    /// Writes a network's file; it is on the disk when this returns.
    ///
    /// # Errors
    /// The disk is full, for example; the file is as it was then.
    pub fn put(&self, record: &Record) -> Result<(), NetworkError> {
        let path = self.path(&record.name);
        let temporary = path.with_extension("tmp");
        let text = serde_json::to_string_pretty(record)
            .map_err(|error| failed("write", &path)(error.into()))?;
        let write = || {
            let mut file = File::options()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&temporary)?;
            file.write_all(text.as_bytes())?;
            file.write_all(b"\n")?;
            file.sync_all()?;
            fs::rename(&temporary, &path)
        };
        write().map_err(failed("write", &path))?;
        self.sync()
    }

    /// Removes a network's file.
    ///
    /// # Errors
    /// The system refuses.
    pub fn remove(&self, name: &str) -> Result<(), NetworkError> {
        let path = self.path(name);
        fs::remove_file(&path).map_err(failed("remove", &path))?;
        self.sync()
    }

    fn sync(&self) -> Result<(), NetworkError> {
        File::open(&self.directory)
            .and_then(|directory| directory.sync_all())
            .map_err(failed("bring to the disk", &self.directory))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::network::NetworkKind;

    fn store() -> (vmm_sys_util::tempdir::TempDir, Store) {
        let temp = vmm_sys_util::tempdir::TempDir::new().unwrap();
        let directory = temp.as_path().to_owned();
        (temp, Store { directory })
    }

    fn record(name: &str) -> Record {
        let kind = NetworkKind::Bridge { uplink: None };
        let options = NetworkOptions { address: None, mtu: None, kind };
        Record::new(name, options, 1500, format!("mv-{name}"), Vec::new())
    }

    #[test]
    fn what_was_put_is_there_until_it_is_removed() {
        let (_temp, store) = store();
        assert_eq!(store.get("a").unwrap(), None);
        for name in ["b", "a"] {
            store.put(&record(name)).unwrap();
        }
        let ready = Record { state: State::Ready, ..record("a") };
        store.put(&ready).unwrap();
        assert_eq!(store.all().unwrap(), [ready, record("b")]);
        store.remove("a").unwrap();
        assert_eq!(store.all().unwrap(), [record("b")]);
        assert!(store.remove("a").is_err());
    }

    #[test]
    fn a_file_that_is_something_else_is_refused() {
        let (_temp, store) = store();
        let refused = |text: &str| {
            fs::write(store.path("a"), text).unwrap();
            store.get("a").unwrap_err().to_string()
        };
        assert!(refused("{").contains("no network of this version"));
        let text = serde_json::to_string(&Record { version: 2, ..record("a") }).unwrap();
        assert!(refused(&text).contains("its version is 2"));
        assert!(refused(&serde_json::to_string(&record("b")).unwrap()).contains("of network b"));
    }
}
