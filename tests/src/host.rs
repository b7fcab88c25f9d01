//! A runtime directory with VMs in it, and a place for files.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use serde_json::Value;
use tempfile::TempDir;

use crate::process::{finish, Finished};
use crate::vm::Vm;
use crate::PATIENCE;

/// Kept in step with `vmm::runtime_dir` by the tests that find their VMs through it.
const RUNTIME_DIR: &str = "MINIVMM_RUNTIME_DIR";

/// As above, with `vmm::state_dir`.
const STATE_DIR: &str = "MINIVMM_STATE_DIR";

/// The program under test: `$MINIVMM_BIN`, or `minivmm` in the directory of the profile that this
/// test was built with.
///
/// # Panics
/// It is not there.
#[must_use]
pub fn binary() -> PathBuf {
    let path = std::env::var_os("MINIVMM_BIN").map_or_else(
        || {
            // target/PROFILE/deps/TEST-HASH, or target/PROFILE/PROGRAM
            let me = std::env::current_exe().unwrap();
            let dir = me.parent().unwrap();
            let dir = if dir.ends_with("deps") { dir.parent().unwrap() } else { dir };
            dir.join("minivmm")
        },
        PathBuf::from,
    );
    assert!(
        path.is_file(),
        "{} is not there: build it (cargo build -p vmm) or name one in MINIVMM_BIN",
        path.display()
    );
    path
}

/// A world of its own for a test; removed at its end.
#[derive(Debug)]
pub struct Host {
    dir: TempDir,
}

impl Default for Host {
    fn default() -> Self {
        Self::new()
    }
}

impl Host {
    /// With no VMs.
    #[must_use]
    pub fn new() -> Self {
        // The sockets' paths in it must stay short.
        let dir = TempDir::with_prefix("minivmm-").unwrap();
        DirBuilder::new().mode(0o700).create(dir.path().join("run")).unwrap();
        fs::create_dir(dir.path().join("files")).unwrap();
        Self { dir }
    }

    /// The directory of all that belongs to this host.
    #[must_use]
    pub fn root(&self) -> &Path {
        self.dir.path()
    }

    /// The runtime directory.
    #[must_use]
    pub fn runtime_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    /// A path for a file.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("files").join(name)
    }

    /// [`Host::path`] as an argument.
    #[must_use]
    pub fn file(&self, name: &str) -> String {
        self.path(name).into_os_string().into_string().unwrap()
    }

    /// Writes a file; gives its path as an argument.
    pub fn write(&self, name: &str, contents: impl AsRef<[u8]>) -> String {
        fs::write(self.path(name), contents).unwrap();
        self.file(name)
    }

    /// The names of the files in [`Host::path`]'s directory, sorted.
    #[must_use]
    pub fn files(&self) -> Vec<String> {
        let names = fs::read_dir(self.dir.path().join("files")).unwrap();
        let mut names: Vec<String> =
            names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// The program on this host's VMs.
    #[must_use]
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(binary());
        command.args(args);
        self.environment(&mut command);
        command
    }

    /// Lets a command see this host's VMs and nothing of the tester's environment.
    pub fn environment(&self, command: &mut Command) {
        command
            .env(RUNTIME_DIR, self.runtime_dir())
            .env(STATE_DIR, self.dir.path().join("state"))
            .env("OVS_RUNDIR", self.switch_directory())
            .env_remove("RUST_LOG");
    }

    /// Where this host has its Open vSwitch, if any.
    #[must_use]
    pub fn switch_directory(&self) -> std::path::PathBuf {
        self.dir.path().join("ovs")
    }

    /// Runs the program to its end.
    #[track_caller]
    pub fn cli(&self, args: &[&str]) -> Finished {
        finish(self.command(args), b"")
    }

    /// Runs the program, which succeeds; gives what it printed.
    #[track_caller]
    pub fn ok(&self, args: &[&str]) -> String {
        self.cli(args).ok().to_owned()
    }

    /// Has the migration of the VM `vm` try again now, which it does by itself too.
    ///
    /// # Panics
    /// There is none.
    #[track_caller]
    pub fn recovers(&self) {
        let asked = self.cli(&["migrate", "vm", "--recover"]);
        // 5: it is not interrupted any more.
        assert!(matches!(asked.code, Some(0 | 5)), "{asked:#?}");
    }

    /// Runs a command that has `--json`, which succeeds; gives what it printed.
    #[track_caller]
    pub fn json(&self, args: &[&str]) -> Value {
        let text = self.ok(&[args, &["--json"]].concat());
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{args:?}: {error}: {text:?}"))
    }

    /// Starts a VM named `vm` with 64 MiB, whose guest `beacon` reads `cmdline`.
    #[track_caller]
    pub fn run(&self, cmdline: &str, args: &[&str]) -> Vm {
        let mut all = vec!["run", "--cmdline", cmdline];
        for default in [["--name", "vm"], ["--memory", "64M"]] {
            // A flag may be given once.
            if !args.contains(&default[0]) {
                all.extend(default);
            }
        }
        all.extend(args);
        self.launch(&all)
    }

    /// Goes on with a saved VM, under the name `vm`. What its console has of a line that had
    /// begun before is left out.
    #[track_caller]
    pub fn restore(&self, file: &str, args: &[&str]) -> Vm {
        let mut vm = self.restore_within("", file, args);
        vm.console.may_begin_within_a_line();
        vm
    }

    /// As [`Host::restore`], with the first line whole: `head` is what the console of the
    /// saved VM ended with.
    #[track_caller]
    pub fn restore_within(&self, head: &str, file: &str, args: &[&str]) -> Vm {
        let mut all = vec!["restore", file, "--console", "stdio"];
        if !args.contains(&"--name") {
            all.extend(["--name", "vm"]);
        }
        all.extend(args);
        Vm::start_within(self.command(&all), head)
    }

    /// Waits until the VM `name` answers, which may be before its guest runs.
    #[track_caller]
    pub fn wait_for_api(&self, name: &str, vm: &Vm) {
        let deadline = Instant::now() + PATIENCE;
        while self.cli(&["info", name]).code != Some(0) {
            assert!(Instant::now() < deadline, "{name} does not answer: {}", vm.log());
            std::thread::yield_now();
        }
    }

    /// Waits for a VM that is migrated here, once; gives the address too.
    #[track_caller]
    pub fn receive(&self, args: &[&str]) -> (Vm, String) {
        let mut vm =
            self.launch(&[&["receive", "--listen", "127.0.0.1:0", "--once"], args].concat());
        vm.console.may_begin_within_a_line();
        let address = vm.listens_at();
        (vm, address)
    }

    /// As [`Host::receive`], and for another VM when none came.
    #[track_caller]
    pub fn receive_more(&self) -> (Vm, String) {
        let mut vm = self.launch(&["receive", "--listen", "127.0.0.1:0"]);
        vm.console.may_begin_within_a_line();
        let address = vm.listens_at();
        (vm, address)
    }

    /// Starts a command that becomes a VM, with the console on pipes.
    #[track_caller]
    pub fn launch(&self, args: &[&str]) -> Vm {
        Vm::start(self.command(&[args, &["--console", "stdio"]].concat()))
    }
}
