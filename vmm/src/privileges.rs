//! Giving up root's powers for those of an ordinary user, for good.

use std::ffi::CString;
use std::path::{Path, PathBuf};

use nix::unistd::{
    getgrouplist, setgroups, setresgid, setresuid, Gid, Group, Uid, User as Account,
};
use rustix::fs::{access, Access};
use rustix::process::{set_dumpable_behavior, DumpableBehavior};
use rustix::thread::set_no_new_privs;

use crate::runtime_dir::{RuntimeDir, RuntimeDirError, RUNTIME_DIR_VARIABLE};
use crate::state_dir::{self, StateDirError, STATE_DIR_VARIABLE};

/// Why a process does not become another user's.
#[derive(Debug, thiserror::Error)]
pub enum PrivilegeError {
    /// No such user.
    #[error("there is no user {0}: give the name of one, or UID:GID")]
    NoSuchUser(String),
    /// No such group.
    #[error("there is no group {0}: give the name of one, or its number")]
    NoSuchGroup(String),
    /// Nothing says what group.
    #[error("user {0} is not known here, and so its group is not: write {0}:GID")]
    NoGroup(u32),
    /// It would remain root.
    #[error("{0} is root, whose powers are to be given up: name an ordinary user")]
    Root(String),
    /// Somebody else cannot become anybody.
    #[error("only root can become user {wanted}: this is user {uid}, leave out --user")]
    NotRoot {
        /// Who was wanted.
        wanted: String,
        /// Who runs this.
        uid: u32,
    },
    /// The system refuses.
    #[error("cannot become user {wanted} ({what}): {error}")]
    System {
        /// Who was wanted.
        wanted: String,
        /// What was attempted.
        what: &'static str,
        /// What the system said.
        error: std::io::Error,
    },
    /// The powers are still there.
    #[error("user {0} could become root again: the process ends")]
    Regained(String),
    /// That user has no runtime directory.
    #[error(transparent)]
    RuntimeDir(#[from] RuntimeDirError),
    /// That user has no state directory.
    #[error(transparent)]
    StateDir(#[from] StateDirError),
    /// That user cannot work there.
    #[error(
        "user {user} cannot write to {path}: {error}; change its owner, or name another directory in \
         {variable}"
    )]
    Directory {
        /// Who.
        user: String,
        /// Where.
        path: PathBuf,
        /// What names the place.
        variable: &'static str,
        /// What the system said.
        error: std::io::Error,
    },
}

/// Whose powers a process is to have.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Powers {
    uid: Uid,
    gid: Gid,
    /// With `gid`.
    groups: Vec<Gid>,
    home: Option<PathBuf>,
}

/// Makes this process that of `user`, written `NAME`, `UID` or either with `:GROUP`, for good: its
/// user and groups, none of root's capabilities, and no way to get them by executing a program. From then
/// on its directories are those of that user, as [`RuntimeDir::open`] and [`state_dir::open`] find them,
/// unless the environment names others; they are made, and must be writable.
///
/// To be called before there are other threads. What is open stays open.
///
/// # Errors
/// See [`PrivilegeError`]. The process may have changed its user in part, and is to end.
pub fn become_user(user: &str) -> Result<(), PrivilegeError> {
    let powers = look_up(user)?;
    let uid = Uid::effective();
    if !uid.is_root() {
        return Err(PrivilegeError::NotRoot { wanted: user.to_owned(), uid: uid.as_raw() });
    }
    let failed = |what| {
        move |error: std::io::Error| PrivilegeError::System { wanted: user.to_owned(), what, error }
    };
    let Powers { uid, gid, groups, home } = powers;
    setgroups(&groups).map_err(|e| failed("setgroups")(e.into()))?;
    setresgid(gid, gid, gid).map_err(|e| failed("setresgid")(e.into()))?;
    setresuid(uid, uid, uid).map_err(|e| failed("setresuid")(e.into()))?;
    set_no_new_privs(true).map_err(|e| failed("PR_SET_NO_NEW_PRIVS")(e.into()))?;
    let root = Uid::from_raw(0);
    if setresuid(root, root, root).is_ok() || Uid::effective() != uid {
        return Err(PrivilegeError::Regained(user.to_owned()));
    }
    // The kernel has given /proc/self to root, and the page tables are read there.
    set_dumpable_behavior(DumpableBehavior::Dumpable)
        .map_err(|e| failed("PR_SET_DUMPABLE")(e.into()))?;
    set_environment(uid, home.as_deref());
    let writable = |path: &Path, variable| {
        access(path, Access::READ_OK | Access::WRITE_OK | Access::EXEC_OK).map_err(|error| {
            let (user, path) = (user.to_owned(), path.to_owned());
            PrivilegeError::Directory { user, path, variable, error: error.into() }
        })
    };
    writable(RuntimeDir::open()?.path(), RUNTIME_DIR_VARIABLE)?;
    writable(&state_dir::open()?, STATE_DIR_VARIABLE)
}

/// What root's session says of its own directories is not true of the user's.
fn set_environment(uid: Uid, home: Option<&Path>) {
    std::env::remove_var("XDG_STATE_HOME");
    match home {
        Some(home) => std::env::set_var("HOME", home),
        None => std::env::remove_var("HOME"),
    }
    let runtime = PathBuf::from(format!("/run/user/{uid}"));
    match access(&runtime, Access::WRITE_OK) {
        Ok(()) => std::env::set_var("XDG_RUNTIME_DIR", runtime),
        Err(_) => std::env::remove_var("XDG_RUNTIME_DIR"),
    }
}

fn look_up(user: &str) -> Result<Powers, PrivilegeError> {
    let (name, group) = match user.split_once(':') {
        Some((name, group)) => (name, Some(group)),
        None => (user, None),
    };
    let failed = |error: nix::Error| PrivilegeError::System {
        wanted: user.to_owned(),
        what: "looking it up",
        error: error.into(),
    };
    let number: Option<u32> = name.parse().ok();
    let account = match number {
        Some(uid) => Account::from_uid(Uid::from_raw(uid)),
        None => Account::from_name(name),
    };
    let account = account.map_err(failed)?;
    let uid = match (&account, number) {
        (Some(account), _) => account.uid,
        (None, Some(uid)) => Uid::from_raw(uid),
        (None, None) => return Err(PrivilegeError::NoSuchUser(name.to_owned())),
    };
    if uid.is_root() {
        return Err(PrivilegeError::Root(name.to_owned()));
    }
    let no_group = || PrivilegeError::NoGroup(uid.as_raw());
    let gid = match group {
        None => account.as_ref().map(|account| account.gid).ok_or_else(no_group)?,
        Some(group) => match group.parse() {
            Ok(gid) => Gid::from_raw(gid),
            Err(_) => Group::from_name(group)
                .map_err(failed)?
                .map(|group| group.gid)
                .ok_or_else(|| PrivilegeError::NoSuchGroup(group.to_owned()))?,
        },
    };
    let groups = match &account {
        // A name out of the user database has no NUL in it.
        Some(account) => {
            let name = CString::new(account.name.as_bytes()).unwrap_or_default();
            getgrouplist(&name, gid).map_err(failed)?
        }
        None => vec![gid],
    };
    Ok(Powers { uid, gid, groups, home: account.map(|account| account.dir) })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn users_are_found_by_name_and_number_and_the_rest_is_refused() {
        let nobody = look_up("nobody").unwrap();
        assert_eq!(look_up(&nobody.uid.to_string()).unwrap(), nobody);
        let other = look_up(&format!("nobody:{}", 4242)).unwrap();
        assert_eq!((other.uid, other.gid), (nobody.uid, Gid::from_raw(4242)));
        let unknown = look_up("3123456789:7").unwrap();
        assert_eq!((unknown.groups, unknown.home), (vec![Gid::from_raw(7)], None));
        let refused = |user| look_up(user).unwrap_err().to_string();
        assert!(refused("no-such-user").contains("there is no user no-such-user"));
        assert!(refused("nobody:no-such-group").contains("there is no group no-such-group"));
        assert!(refused("3123456789").contains("write 3123456789:GID"));
        for root in ["root", "0", "0:7"] {
            assert!(refused(root).contains("is root"), "{}", refused(root));
        }
    }
}
