//! What the filters of system calls let pass, tried for each kind of thread in a process of its own.

#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::fs::File;
use std::net::TcpListener;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use vmm::config::SandboxMode;
use vmm::sandbox::{enter, enter_engine, install, ThreadKind};

const MODE: &str = "SANDBOX_MODE";
const KIND: &str = "SANDBOX_KIND";
const DEED: &str = "SANDBOX_DEED";
const SIGSYS: i32 = 31;
/// What a process prints when its thread has done what it was to do.
const DONE: &str = "it is done";

/// Also the process that the others start.
#[test]
fn a_thread_that_needs_a_call_may_make_it() {
    be_a_thread_if_asked();
    for kind in ThreadKind::ALL {
        survives("on", Some(kind), "live");
        survives("on", Some(kind), "fail");
    }
    for deed in ["live", "open", "listen", "start"] {
        survives("on", None, deed);
    }
}

#[test]
fn no_thread_of_the_process_starts_a_program() {
    dies("on", None, "execute");
    for kind in ThreadKind::ALL {
        dies("on", Some(kind), "execute");
    }
}

#[test]
fn a_vcpu_opens_no_file_makes_no_socket_and_starts_no_thread() {
    for deed in ["open", "listen", "start"] {
        dies("on", Some(ThreadKind::Vcpu), deed);
    }
}

#[test]
fn only_who_finds_out_what_a_connection_is_for_opens_files_beside_the_api() {
    for kind in ThreadKind::ALL {
        match kind {
            ThreadKind::Door | ThreadKind::Stranger => survives("on", Some(kind), "open"),
            _ => dies("on", Some(kind), "open"),
        }
        dies("on", Some(kind), "listen");
    }
}

#[test]
fn what_is_only_logged_passes_and_without_filters_all_does() {
    for mode in ["log", "off"] {
        for deed in ["open", "listen", "start", "execute"] {
            survives(mode, Some(ThreadKind::Vcpu), deed);
        }
    }
}

#[test]
fn threads_of_the_engine_are_known_by_their_names() {
    // As `migration::source` and `migration::destination` list them.
    for (name, deed) in [("mig-send-0", "open"), ("mig-recv-63", "open"), ("mig-alive", "open")] {
        assert_eq!(run("on", name, deed).status.signal(), Some(SIGSYS), "{name}");
    }
    for name in ["mig-main-in", "mig-new", "pc-new", "mig-door", "mig-stranger"] {
        assert_eq!(run("on", name, "execute").status.signal(), Some(SIGSYS), "{name}");
        assert!(done(&run("on", name, "live")), "{name}");
    }
    assert!(done(&run("on", "somebody-else", "listen")));
}

#[track_caller]
fn survives(mode: &str, kind: Option<ThreadKind>, deed: &str) {
    let output = run(mode, &name(kind), deed);
    assert!(done(&output), "{kind:?} does not {deed}: {output:?}");
}

#[track_caller]
fn dies(mode: &str, kind: Option<ThreadKind>, deed: &str) {
    let output = run(mode, &name(kind), deed);
    assert_eq!(output.status.signal(), Some(SIGSYS), "{kind:?} does {deed}: {output:?}");
    assert!(!done(&output), "{output:?}");
}

fn done(output: &Output) -> bool {
    output.status.success() && String::from_utf8_lossy(&output.stdout).contains(DONE)
}

fn name(kind: Option<ThreadKind>) -> String {
    kind.map_or_else(|| "none".to_owned(), |kind| format!("{kind:?}"))
}

fn run(mode: &str, kind: &str, deed: &str) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "a_thread_that_needs_a_call_may_make_it", "--nocapture"])
        .env("RUST_BACKTRACE", "full")
        .env(MODE, mode)
        .env(KIND, kind)
        .env(DEED, deed)
        .stdin(Stdio::null());
    command.output().unwrap()
}

/// In a process that a test started: a thread of the kind that was asked for does what it was asked to.
fn be_a_thread_if_asked() {
    let Ok(deed) = std::env::var(DEED) else { return };
    let kind = std::env::var(KIND).unwrap();
    let mode: SandboxMode = std::env::var(MODE).unwrap().parse().unwrap();
    install(mode).unwrap();
    let found = ThreadKind::ALL.into_iter().find(|known| format!("{known:?}") == kind);
    let thread = std::thread::Builder::new().name("a-thread".into()).spawn(move || {
        found.map_or_else(|| enter_engine(&kind), enter);
        act(&deed);
    });
    let panicked = thread.unwrap().join().is_err();
    assert_eq!(panicked, std::env::var(DEED).unwrap() == "fail");
    println!("{DONE}");
    std::process::exit(0);
}

fn act(deed: &str) {
    match deed {
        "open" => drop(File::open("/dev/null").unwrap()),
        "listen" => drop(TcpListener::bind("127.0.0.1:0").unwrap()),
        "start" => std::thread::spawn(|| {}).join().unwrap(),
        "execute" => drop(Command::new("true").status().unwrap()),
        // What every thread does somewhere: memory of all sizes, hashing, locks, time, output, and the end.
        "live" => {
            // Small enough to be no mappings of their own, together more than the heap keeps.
            let pieces: Vec<_> = (0..64).map(|_| vec![1_u8; 100 << 10]).collect();
            drop(pieces);
            let mut kept = HashMap::new();
            for power in 0..26 {
                kept.insert(power, vec![1_u8; 1 << power]);
            }
            drop(kept);
            let (sender, receiver) = std::sync::mpsc::channel::<()>();
            assert!(receiver.recv_timeout(Duration::from_millis(1)).is_err());
            drop(sender);
            std::thread::yield_now();
            eprintln!("{:?} {}", std::time::SystemTime::now(), vmm::process::current_tid());
        }
        "fail" => panic!("asked to panic"),
        other => unreachable!("{other}"),
    }
}
