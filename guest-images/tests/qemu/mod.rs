//! A VM of QEMU's with beacon in it, and its console.
#![allow(dead_code, clippy::unwrap_used)]

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{channel, Receiver, RecvTimeoutError};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use libtest_mimic::Trial;
use serde_json::Value;

/// A test, ignored where there is no QEMU or no KVM.
pub fn trial(name: &str, test: fn()) -> Trial {
    let possible = Command::new("qemu-system-x86_64").arg("--version").output().is_ok()
        && File::options().read(true).write(true).open("/dev/kvm").is_ok();
    let run = move || {
        test();
        Ok(())
    };
    Trial::test(name, run).with_ignored_flag(!possible)
}

/// A new folder for a VM.
pub fn folder(name: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("beacon-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

/// Far beyond what anything here takes; a machine that is busy must not fail a test.
const PATIENCE: Duration = Duration::from_secs(60);

/// One VM at a time: the guests spin, and QEMU of two tests would starve each other.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A VM with beacon in it.
pub struct Guest {
    qemu: Child,
    input: ChildStdin,
    lines: Receiver<String>,
    /// Where its files are; goes away with it.
    pub folder: PathBuf,
}

impl Guest {
    /// Starts beacon.
    pub fn start(test: &str, machine: &str, cpus: u32, options: &str) -> Self {
        let folder = folder(&format!("{test}-{cpus}-{machine}"));
        Self::start_in(folder, machine, cpus, options, &[])
    }

    /// Starts beacon with more arguments of QEMU's, in a folder that may have files for it.
    pub fn start_in(
        folder: PathBuf,
        machine: &str,
        cpus: u32,
        options: &str,
        arguments: &[String],
    ) -> Self {
        std::fs::write(folder.join("beacon.elf"), guest_images::BEACON).unwrap();
        std::fs::write(folder.join("bios.bin"), guest_images::qemu_bios()).unwrap();
        let mut qemu = Command::new("qemu-system-x86_64")
            .current_dir(&folder)
            // The KVM of some machines announces arch-capabilities and does not have it.
            .args([
                "-enable-kvm",
                "-cpu",
                "host,-arch-capabilities",
                "-machine",
                machine,
                "-m",
                "128",
            ])
            .args(["-smp", &cpus.to_string(), "-bios", "bios.bin"])
            .args(["-kernel", "beacon.elf", "-append", options])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"])
            .args(["-monitor", "unix:monitor,server,nowait", "-action", "reboot=shutdown"])
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(qemu.stdout.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let input = qemu.stdin.take().unwrap();
        Self { qemu, input, lines, folder }
    }

    /// The next event; every line must be one JSON object.
    pub fn next(&mut self) -> Option<Value> {
        match self.lines.recv_timeout(PATIENCE) {
            Ok(line) => {
                let value: Value = serde_json::from_str(&line)
                    .unwrap_or_else(|error| panic!("not JSON ({error}): {line}"));
                assert!(value["event"].is_string(), "no event: {line}");
                Some(value)
            }
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => panic!("no line for {PATIENCE:?}"),
        }
    }

    /// Skips a line, whatever it is.
    pub fn skip_line(&mut self) {
        self.lines.recv_timeout(PATIENCE).unwrap();
    }

    /// Skips to the next event of a name.
    pub fn wait_for(&mut self, event: &str) -> Value {
        loop {
            let value = self.next().unwrap_or_else(|| panic!("the guest ended before {event}"));
            if value["event"] == event {
                return value;
            }
        }
    }

    /// Types a console command.
    pub fn say(&mut self, command: &str) {
        writeln!(self.input, "{command}").unwrap();
    }

    /// Has QEMU's monitor execute a command, and gives what it says.
    pub fn monitor(&self, command: &str) -> String {
        let mut monitor = UnixStream::connect(self.folder.join("monitor")).unwrap();
        let mut prompt = |then: &str| {
            let mut seen = Vec::new();
            let mut byte = [0];
            while !seen.ends_with(b"(qemu) ") {
                monitor.read_exact(&mut byte).unwrap();
                seen.push(byte[0]);
            }
            monitor.write_all(then.as_bytes()).unwrap();
            String::from_utf8_lossy(&seen).into_owned()
        };
        prompt(&format!("{command}\n"));
        prompt("")
    }

    /// Waits for QEMU to end by itself.
    pub fn end(mut self) -> ExitStatus {
        while self.next().is_some() {}
        let start = Instant::now();
        loop {
            if let Some(status) = self.qemu.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < PATIENCE, "QEMU does not end");
            std::thread::yield_now();
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Both fail only when it is gone already.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// Waits until no other test has a VM.
pub fn exclusive() -> std::sync::MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
