//! What this project brings into the lab, and a network of its own outside it.

use std::io;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use super::{image, program, Lab, IMAGE};
use crate::binary;
use crate::process::finish;
use crate::suite::Need;

/// Where the lab has what it brings.
const INSIDE: &str = "/lab";
/// Set in a process that has a network namespace of its own.
const ISOLATED: &str = "MINIVMM_TESTS_ISOLATED";

impl Lab {
    /// A machine that has minivmm (as `minivmm`), this program (as `tests`) and the Linux image
    /// (in `$MINIVMM_LINUX_IMAGE`), with KVM and what networks are made of, and runs `script`.
    ///
    /// # Errors
    /// Something of it is not there.
    pub fn with_minivmm(script: &str) -> io::Result<Self> {
        let script = format!(
            "export MINIVMM_BIN={INSIDE}/minivmm MINIVMM_LINUX_IMAGE={INSIDE}\n\
             export PATH={INSIDE}:$PATH\n{script}"
        );
        let mut lab = Self::new(script).modules(&["kvm-amd", "tun", "bridge"]);
        for name in IMAGE {
            lab = lab.file(&format!("{INSIDE}/{name}"), image(name));
        }
        let me = std::env::current_exe()?;
        for (name, from) in [("minivmm", binary()), ("tests", me)] {
            lab = lab.executable(&format!("{INSIDE}/{name}"), &from)?;
        }
        Ok(lab)
    }
}

/// Runs this program again, with the same arguments, in a network namespace of its own, with loopback: whatever it
/// does to interfaces is gone with it. `None` in the process that is there already.
pub(super) fn isolated() -> Option<ExitCode> {
    if std::env::var_os(ISOLATED).is_some() {
        let mut up = Command::new(program("ip").unwrap());
        up.args(["link", "set", "lo", "up"]);
        finish(up, b"").ok();
        return None;
    }
    let mut command = unshare();
    command.arg(std::env::current_exe().ok()?).args(std::env::args_os().skip(1));
    let status = command.env(ISOLATED, "1").status();
    let code = status.ok().and_then(|s| s.code()).and_then(|code| u8::try_from(code).ok());
    Some(code.map_or(ExitCode::FAILURE, ExitCode::from))
}

/// This user may have a network namespace.
pub(super) fn network_namespace() -> Need {
    if std::env::var_os(ISOLATED).is_some() {
        return Ok(());
    }
    match unshare().arg("true").status() {
        Ok(status) if status.success() => Ok(()),
        _ => Err("needs network namespaces".into()),
    }
}

fn unshare() -> Command {
    let mut command = Command::new("unshare");
    command.arg("--net");
    if !rustix::process::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    command
}

/// All of `names` are programs of this machine.
pub(super) fn programs(names: &[&str]) -> Need {
    names.iter().try_for_each(|name| program(name).map(drop::<PathBuf>))
}
