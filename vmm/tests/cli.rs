//! The program's commands, on VMs in processes of their own.

#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/process.rs"]
mod process;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

use process::{be_a_vm_if_asked, Host, VmProcess};

/// Also the process that the others start.
#[test]
fn a_vm_process_ends_when_killed() {
    be_a_vm_if_asked();
    let host = Host::new();
    let mut vm = start(&host, "socket", "");
    let (code, out, err) = host.run(&["kill", "web"]);
    assert_eq!((code, out.as_str(), err.as_str()), (0, "web: stopped\n", ""));
    assert!(vm.child.wait().unwrap().success());
    let left: Vec<_> = std::fs::read_dir(host.dir.as_path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left, [".lock"]);
}

const VM: &str = "a_vm_process_ends_when_killed";

fn start(host: &Host, console: &str, manner: &str) -> VmProcess {
    let (vm, line) = host.start(VM, console, manner);
    assert_eq!(line, "ready");
    vm
}

fn json(text: &str) -> serde_json::Value {
    assert_eq!(text.lines().count(), 1, "{text}");
    serde_json::from_str(text).unwrap()
}

#[test]
fn a_vm_is_listed_and_described() {
    let host = Host::new();
    assert_eq!(host.run(&["list", "--json"]), (0, "[]\n".into(), String::new()));
    let vm = start(&host, "socket", "");
    let (code, out, _) = host.run(&["list"]);
    let lines: Vec<Vec<&str>> = out.lines().map(|l| l.split_whitespace().collect()).collect();
    assert_eq!(code, 0);
    assert_eq!(lines[0], ["NAME", "PID", "STATUS", "MEMORY", "CPUS", "UPTIME"]);
    let pid = vm.child.id().to_string();
    assert_eq!(lines[1], ["web", &pid, "running", "256", "MiB", "1", "1", "min", "1", "s"]);
    assert_eq!(json(&host.run(&["list", "--json"]).1)[0]["name"], "web");

    let (code, out, _) = host.run(&["info", "web"]);
    assert_eq!(code, 0);
    let socket = host.file("web.console");
    assert!(out.contains(&format!("socket at {}", socket.display())), "{out}");
    assert_eq!(json(&host.run(&["info", "web", "--json"]).1)["status"], "running");

    let (code, out, _) = host.run(&["stats", "web"]);
    assert!(
        code == 0 && out.lines().any(|l| l.starts_with("reboots:") && l.ends_with(" 3")),
        "{out}"
    );
    assert_eq!(json(&host.run(&["stats", "web", "--json"]).1)["reboots"], 3);
}

#[test]
fn commands_reach_the_vm_and_tell_its_state() {
    let host = Host::new();
    let _vm = start(&host, "socket", "");
    assert_eq!(host.run(&["pause", "web"]).1, "web: paused\n");
    assert_eq!(json(&host.run(&["resume", "web", "--json"]).1)["status"], "running");
    assert_eq!(host.run(&["reset", "web"]).0, 0);
    // A relative file is the caller's.
    let save = host.minivmm(&["save", "web", "x.vm", "--json"]).current_dir("/usr").output();
    let report = json(&String::from_utf8(save.unwrap().stdout).unwrap());
    assert_eq!(report["path"], "/usr/x.vm");
    let (code, out, _) = host.run(&["events", "web", "--after", "1"]);
    assert_eq!((code, out.lines().count()), (0, 1), "{out}");
    assert!(out.contains("Z     2  paused\n"), "{out}");
}

#[test]
fn stop_presses_the_button_and_waits_for_the_end() {
    let host = Host::new();
    let mut vm = start(&host, "socket", "");
    let mut follower = host
        .minivmm(&["events", "web", "--follow", "--json"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // It has begun when it has said something.
    let mut byte = [0];
    follower.stdout.as_mut().unwrap().read_exact(&mut byte).unwrap();
    assert_eq!(host.run(&["stop", "web"]), (0, "web: stopped\n".into(), String::new()));
    assert!(vm.child.wait().unwrap().success());
    let followed = follower.wait_with_output().unwrap();
    assert!(followed.status.success());
    let text = String::from_utf8(followed.stdout).unwrap();
    assert!(text.lines().last().unwrap().contains("power-off"), "{text}");
}

#[test]
fn a_stubborn_guest_is_named_then_forced() {
    let host = Host::new();
    let mut vm = start(&host, "socket", "stubborn");
    let (code, _, err) = host.run(&["stop", "web", "--timeout", "0"]);
    assert_eq!(code, 6);
    assert!(err.contains("minivmm stop web --force"), "{err}");
    assert!(vm.child.try_wait().unwrap().is_none());
    assert_eq!(host.run(&["stop", "web", "--timeout", "0", "--force"]).0, 0);
    assert!(vm.child.wait().unwrap().success());
}

#[test]
fn two_vms_of_one_name_are_refused() {
    let host = Host::new();
    let vm = start(&host, "socket", "");
    let (_other, line) = host.start(VM, "socket", "");
    assert!(line.contains(&format!("process {}", vm.child.id())), "{line}");
    assert!(line.contains("--name"), "{line}");
}

#[test]
fn what_kill_9_leaves_behind_is_recognised() {
    let host = Host::new();
    let mut vm = start(&host, "socket", "");
    vm.child.kill().unwrap();
    assert_eq!(vm.child.wait().unwrap().signal(), Some(9));
    assert!(host.file("web.sock").exists() && host.file("web.console").exists());
    assert_eq!(host.run(&["info", "web"]).0, 4);
    assert!(!host.file("web.sock").exists() && !host.file("web.console").exists());

    let mut vm = start(&host, "socket", "");
    vm.child.kill().unwrap();
    vm.child.wait().unwrap();
    // The next VM takes the place at once.
    let _vm = start(&host, "socket", "");
    assert_eq!(host.run(&["info", "web"]).0, 0);
}

#[test]
fn a_missing_vm_and_bad_usage_have_their_codes() {
    let host = Host::new();
    let (code, out, err) = host.run(&["info", "ghost"]);
    assert_eq!((code, out.as_str()), (4, ""));
    assert!(err.starts_with("minivmm: no VM named ghost runs here"), "{err}");
    assert_eq!(err.lines().count(), 1, "{err}");
    for args in [
        &["info"][..],
        &["info", "a/b"],
        &["frobnicate"],
        &["run", "--cpus", "65"],
        &["run", "--memory", "1"],
        &["run", "--memory", "99999G"],
        &["run", "--initrd", "x"],
        &["run", "--console", "tty"],
        &["run", "--config", "/no/such.toml"],
        &["run", "--log", "loud"],
        &["run", "--hugepages", "--memory", "17M"],
    ] {
        let (code, out, err) = host.run(args);
        assert_eq!((code, out.as_str()), (2, ""), "{args:?}: {err}");
        assert!(err.starts_with("minivmm: "), "{args:?}: {err}");
    }
    assert_eq!(host.run(&["--help"]).0, 0);
    assert_eq!(host.run(&["--version"]).0, 0);
}

#[test]
fn a_config_file_is_blamed_with_its_line() {
    let host = Host::new();
    let path = host.file("vm.toml");
    std::fs::write(&path, "cpus = 2\nmemroy = \"1G\"\n").unwrap();
    let (code, _, err) = host.run(&["run", "--config", path.to_str().unwrap()]);
    assert_eq!(code, 2);
    assert!(err.contains("vm.toml:2:1: memroy: unknown field"), "{err}");
}

#[test]
fn a_reader_that_has_seen_enough_is_no_failure() {
    let host = Host::new();
    let _vm = start(&host, "socket", "");
    for args in [&["info", "web"][..], &["list"], &["events", "web", "--follow"], &["--help"]] {
        let (reader, writer) = UnixStream::pair().unwrap();
        drop(reader);
        let writer = OwnedFd::from(writer);
        let output = host.minivmm(args).stdout(writer).stderr(Stdio::piped()).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{args:?}");
        assert_eq!(String::from_utf8(output.stderr).unwrap(), "", "{args:?}");
    }
}

#[test]
fn a_console_is_attached_through_pipes() {
    let host = Host::new();
    for console in ["socket", "pty"] {
        let mut vm = start(&host, console, "");
        let mut user = host
            .minivmm(&["console", "web"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        user.stdin.as_mut().unwrap().write_all(b"typed\x01x").unwrap();
        let expected = b"hello from the guest\r\ntyped\x01x";
        let mut seen = vec![0; expected.len()];
        user.stdout.as_mut().unwrap().read_exact(&mut seen).unwrap();
        assert_eq!(seen, expected, "{console}");
        if console == "socket" {
            let (code, _, err) = host.run(&["console", "web"]);
            assert_eq!(code, 5);
            assert!(err.contains(&format!("in use by process {}", user.id())), "{err}");
        }
        host.run(&["kill", "web"]);
        vm.child.wait().unwrap();
        assert_eq!(user.wait().unwrap().code(), Some(0), "{console}");
    }
}

#[test]
fn consoles_that_cannot_be_attached_say_why() {
    let host = Host::new();
    let _vm = start(&host, "file:/dev/null", "");
    let (code, _, err) = host.run(&["console", "web"]);
    assert_eq!(code, 5);
    assert!(err.contains("/dev/null") && err.contains("--console socket"), "{err}");
    drop(_vm);
    let _vm = start(&host, "stdio", "");
    let (code, _, err) = host.run(&["console", "web"]);
    assert_eq!(code, 5);
    assert!(err.contains("standard input") && err.contains("--console socket"), "{err}");
}

/// A terminal: our end, and the path of the other.
fn terminal() -> (File, File) {
    use rustix::pty::{grantpt, ioctl_tiocgptpeer, openpt, unlockpt, OpenptFlags};
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let ours = openpt(flags).unwrap();
    grantpt(&ours).unwrap();
    unlockpt(&ours).unwrap();
    let theirs = ioctl_tiocgptpeer(&ours, flags).unwrap();
    (ours.into(), theirs.into())
}

fn settings(terminal: &File) -> String {
    let settings = rustix::termios::tcgetattr(terminal).unwrap();
    format!("{:?} {:?} {:?}", settings.local_modes, settings.input_modes, settings.output_modes)
}

fn read_until(from: &mut File, text: &str) -> String {
    let (mut seen, mut byte) = (Vec::new(), [0]);
    while !seen.ends_with(text.as_bytes()) {
        from.read_exact(&mut byte).unwrap();
        seen.push(byte[0]);
    }
    String::from_utf8_lossy(&seen).into_owned()
}

/// With the terminal as controlling terminal and standard streams.
fn on(terminal: &File, mut command: Command) -> VmProcess {
    let stream = || terminal.try_clone().unwrap();
    let child = command.stdin(stream()).stdout(stream()).stderr(stream()).spawn().unwrap();
    VmProcess { child }
}

fn setsid() -> Command {
    let mut command = Command::new("setsid");
    command.args(["--ctty", "--wait"]);
    command
}

#[test]
fn an_attached_terminal_is_raw_and_given_back() {
    let host = Host::new();
    let _vm = start(&host, "socket", "");
    let (mut ours, theirs) = terminal();
    let before = settings(&theirs);
    let mut command = setsid();
    command.arg(env!("CARGO_BIN_EXE_minivmm")).args(["console", "web"]);
    command.env(vmm::runtime_dir::RUNTIME_DIR_VARIABLE, host.dir.as_path());
    let mut user = on(&theirs, command);
    read_until(&mut ours, "hello from the guest");
    assert_ne!(settings(&theirs), before);
    // Ctrl-C is the guest's.
    ours.write_all(b"\x03abc").unwrap();
    read_until(&mut ours, "\x03abc");
    ours.write_all(b"\x01x").unwrap();
    read_until(&mut ours, "which goes on");
    assert!(user.child.wait().unwrap().success());
    assert_eq!(settings(&theirs), before);
    assert_eq!(host.run(&["info", "web"]).0, 0);
}

#[test]
fn the_terminal_of_a_vm_is_given_back_however_it_ends() {
    for manner in ["", "panic"] {
        let host = Host::new();
        let (mut ours, theirs) = terminal();
        let before = settings(&theirs);
        let mut vm = on(&theirs, host.vm_command(setsid(), VM, "stdio", manner));
        read_until(&mut ours, "ready");
        assert_ne!(settings(&theirs), before);
        ours.write_all(b"key").unwrap();
        read_until(&mut ours, "key");
        ours.write_all(b"\x01x").unwrap();
        if manner == "panic" {
            read_until(&mut ours, "asked to panic");
        } else {
            assert!(vm.child.wait().unwrap().success());
        }
        assert_eq!(settings(&theirs), before, "{manner}");
        // `setsid` waits for its child: end that, where it lives on without its console.
        host.run(&["kill", "web"]);
        vm.child.wait().unwrap();
    }
}
