//! Where what must outlive a VM's process is kept: the journal of migrations.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// Environment variable that names the directory, before all else.
pub const STATE_DIR_VARIABLE: &str = "MINIVMM_STATE_DIR";

/// Why there is no directory for state.
#[derive(Debug, thiserror::Error)]
pub enum StateDirError {
    /// It cannot be made.
    #[error(
        "cannot create the state directory {path}: {error}; set {STATE_DIR_VARIABLE} to a place \
         that you may write to"
    )]
    Create {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// Nothing says where it is.
    #[error("no place for state: set {STATE_DIR_VARIABLE}, XDG_STATE_HOME or HOME")]
    Nowhere,
}

/// The state directory of this user, made where it is missing: `$MINIVMM_STATE_DIR`, else
/// `$XDG_STATE_HOME/minivmm`, else `/var/lib/minivmm` for root, else `~/.local/state/minivmm`.
///
/// # Errors
/// See [`StateDirError`].
pub fn open() -> Result<PathBuf, StateDirError> {
    let path = choose(
        |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from),
        rustix::process::geteuid().is_root(),
    )
    .ok_or(StateDirError::Nowhere)?;
    create(&path).map_err(|error| StateDirError::Create { path: path.clone(), error })?;
    Ok(path)
}

fn choose(variable: impl Fn(&str) -> Option<PathBuf>, root: bool) -> Option<PathBuf> {
    let absolute = |path: PathBuf| path.is_absolute().then_some(path);
    variable(STATE_DIR_VARIABLE)
        .and_then(|path| std::path::absolute(path).ok())
        // A relative path in an XDG variable is to be ignored (XDG Base Directory Specification).
        .or_else(|| variable("XDG_STATE_HOME").and_then(absolute).map(|at| at.join("minivmm")))
        .or_else(|| root.then(|| PathBuf::from("/var/lib/minivmm")))
        .or_else(|| variable("HOME").and_then(absolute).map(|at| at.join(".local/state/minivmm")))
}

fn create(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_special_place_is_taken() {
        let place = |set: &[(&str, &str)], root| {
            let find = |name: &str| {
                set.iter().find(|(key, _)| *key == name).map(|(_, value)| PathBuf::from(value))
            };
            choose(find, root).map(|path| path.display().to_string())
        };
        let all = [(STATE_DIR_VARIABLE, "/a"), ("XDG_STATE_HOME", "/b"), ("HOME", "/c")];
        assert_eq!(place(&all, false).as_deref(), Some("/a"));
        assert_eq!(place(&all[1..], true).as_deref(), Some("/b/minivmm"));
        assert_eq!(place(&all[2..], true).as_deref(), Some("/var/lib/minivmm"));
        assert_eq!(place(&all[2..], false).as_deref(), Some("/c/.local/state/minivmm"));
        assert_eq!(place(&[("XDG_STATE_HOME", "b"), all[2]], false), place(&all[2..], false));
        assert_eq!(place(&[], false), None);
    }
}
