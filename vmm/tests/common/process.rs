//! A VM without KVM in a process of its own: a test program that runs itself again.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vmm::api::serve;
use vmm::console::{Console, ConsoleInput, ConsoleWriter};
use vmm::runtime_dir::{RuntimeDir, RUNTIME_DIR_VARIABLE};
use vmm_sys_util::tempdir::TempDir;

use crate::common::{FakeVm, PATIENCE};

const NAME: &str = "FAKE_VM_NAME";
const CONSOLE: &str = "FAKE_VM_CONSOLE";
const MANNER: &str = "FAKE_VM_MANNER";

/// Sends the console's input back.
struct Echo(Mutex<ConsoleWriter>);

impl ConsoleInput for Echo {
    fn feed(&self, bytes: &[u8]) -> usize {
        self.0.lock().unwrap().write_all(bytes).unwrap();
        bytes.len()
    }
}

/// In the process of a VM: is it, until it is ended. Elsewhere: returns.
pub fn be_a_vm_if_asked() {
    let Ok(name) = std::env::var(NAME) else { return };
    let manner = std::env::var(MANNER).unwrap();
    let claim = match RuntimeDir::open().unwrap().claim(&name) {
        Ok(claim) => claim,
        Err(error) => {
            println!("\nrefused: {error}");
            std::process::exit(1);
        }
    };
    let mut vm = FakeVm::new(&name);
    vm.config.console = std::env::var(CONSOLE).unwrap().parse().unwrap();
    vm.heeds_power_button = manner != "stubborn";
    let (console, mut writer) = Console::open(&vm.config.console, &claim.console_paths()).unwrap();
    vm.console_path = console.path().map(Path::to_owned);
    let vm = Arc::new(vm);
    writer.write_all(b"hello from the guest\r\n").unwrap();
    let quit = {
        let vm = vm.clone();
        move || {
            assert_ne!(manner, "panic", "asked to panic");
            vmm::control::Control::kill(&*vm).unwrap();
        }
    };
    console.connect(Arc::new(Echo(Mutex::new(writer))), quit);
    let api = serve(claim.listen().unwrap(), vm.clone()).unwrap();
    println!("\nready");
    while vm.events.wait_after(u64::MAX, Duration::from_secs(60)).is_some() {}
    api.shutdown();
    console.close(PATIENCE);
    drop(claim);
    std::process::exit(0);
}

/// A runtime directory with VMs in it.
pub struct Host {
    pub dir: TempDir,
}

/// A VM in a process; killed when dropped.
pub struct VmProcess {
    pub child: Child,
}

impl Drop for VmProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Host {
    pub fn new() -> Self {
        Self { dir: TempDir::new().unwrap() }
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.as_path().join(name)
    }

    /// The command that starts a VM; `test` is the test that calls [`be_a_vm_if_asked`].
    pub fn vm_command(&self, program: Command, test: &str, console: &str, manner: &str) -> Command {
        let mut command = program;
        command
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture"])
            .env(RUNTIME_DIR_VARIABLE, self.dir.as_path())
            .env(NAME, "web")
            .env(CONSOLE, console)
            .env(MANNER, manner);
        command
    }

    /// Starts a VM named `web`; the last line that it prints first says how that went.
    pub fn start(&self, test: &str, console: &str, manner: &str) -> (VmProcess, String) {
        let mut command = self.vm_command(Command::new("env"), test, console, manner);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let said = |line: &String| line == "ready" || line.starts_with("refused");
        let line = lines.map(Result::unwrap).find(said).expect("the VM's process ended early");
        (VmProcess { child }, line)
    }

    /// The program, on these VMs.
    pub fn minivmm(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_minivmm"));
        command.args(args).env(RUNTIME_DIR_VARIABLE, self.dir.as_path()).stdin(Stdio::null());
        command
    }

    /// Runs it to its end: exit code, output, complaints.
    pub fn run(&self, args: &[&str]) -> (i32, String, String) {
        let Output { status, stdout, stderr } = self.minivmm(args).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (status.code().unwrap(), text(stdout), text(stderr))
    }
}
