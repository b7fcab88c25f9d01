//! Beacon in QEMU: it starts, and each of its checks sees what it is there to see.
//!
//! Needs `qemu-system-x86_64` and `/dev/kvm`; without them the tests are reported as ignored.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{channel, Receiver, RecvTimeoutError};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Trial};
use serde_json::Value;

fn main() -> std::process::ExitCode {
    let possible = Command::new("qemu-system-x86_64").arg("--version").output().is_ok()
        && File::options().read(true).write(true).open("/dev/kvm").is_ok();
    let trial = |name: &str, test: fn()| {
        let run = move || {
            test();
            Ok(())
        };
        Trial::test(name, run).with_ignored_flag(!possible)
    };
    let tests = vec![
        trial("starts_works_and_ends_on_every_machine", starts_works_and_ends_on_every_machine),
        trial("a_damaged_page_is_found_and_named", a_damaged_page_is_found_and_named),
        trial(
            "a_damaged_register_and_a_silent_timer_are_seen",
            a_damaged_register_and_a_silent_timer_are_seen,
        ),
        trial("a_stop_of_the_vm_is_told_from_other_gaps", a_stop_of_the_vm_is_told_from_other_gaps),
        trial("commands_answer", commands_answer),
        trial("ends_in_every_way", ends_in_every_way),
        trial("exits_are_measured", exits_are_measured),
    ];
    libtest_mimic::run(&Arguments::from_args(), tests).exit_code()
}

/// Far beyond what anything here takes; a machine that is busy must not fail a test.
const PATIENCE: Duration = Duration::from_secs(60);

/// One VM at a time: the guests spin, and QEMU of two tests would starve each other.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

struct Guest {
    qemu: Child,
    input: ChildStdin,
    lines: Receiver<String>,
    folder: PathBuf,
}

impl Guest {
    /// Starts beacon.
    fn start(test: &str, machine: &str, cpus: u32, options: &str) -> Self {
        let folder = std::env::temp_dir()
            .join(format!("beacon-{test}-{}-{cpus}-{machine}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
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
    fn next(&mut self) -> Option<Value> {
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

    /// Skips to the next event of a name.
    fn wait_for(&mut self, event: &str) -> Value {
        loop {
            let value = self.next().unwrap_or_else(|| panic!("the guest ended before {event}"));
            if value["event"] == event {
                return value;
            }
        }
    }

    fn say(&mut self, command: &str) {
        writeln!(self.input, "{command}").unwrap();
    }

    fn monitor(&self, command: &str) {
        let mut monitor = UnixStream::connect(self.folder.join("monitor")).unwrap();
        let mut prompt = |then: &str| {
            let mut seen = Vec::new();
            let mut byte = [0];
            while !seen.ends_with(b"(qemu) ") {
                monitor.read_exact(&mut byte).unwrap();
                seen.push(byte[0]);
            }
            monitor.write_all(then.as_bytes()).unwrap();
        };
        prompt(&format!("{command}\n"));
        prompt("");
    }

    /// Waits for QEMU to end by itself.
    fn end(mut self) -> ExitStatus {
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

fn exclusive() -> std::sync::MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn starts_works_and_ends_on_every_machine() {
    let _guard = exclusive();
    for machine in ["microvm", "pc"] {
        for cpus in [1, 2] {
            let options = "dirty=10000 ws=8 pattern=random report=200 runtime=1000";
            let mut guest = Guest::start("starts", machine, cpus, options);
            let boot = guest.next().unwrap();
            assert_eq!((&boot["event"], &boot["version"]), (&"boot".into(), &1.into()));
            assert_eq!((&boot["cpus"], &boot["boot"]), (&cpus.into(), &"pvh".into()));
            assert_eq!(guest.wait_for("ready")["ws_pages"], 2048);
            let mut report = guest.wait_for("report");
            assert_eq!(report["seq"], 1);
            while let Some(event) = guest.next() {
                match event["event"].as_str().unwrap() {
                    "report" => report = event,
                    "runtime-over" => break,
                    other => panic!("unexpected {other}: {event}"),
                }
            }
            for counter in ["errors", "fpu_errors", "timer_stalls", "tsc_back", "clock_back"] {
                assert_eq!(report[counter], 0, "{counter} in {report}");
            }
            for counter in ["beats_min", "writes", "verified", "passes", "fpu_checks", "ticks"] {
                assert_ne!(report[counter], 0, "{counter} in {report}");
            }
            assert!(guest.end().success());
        }
    }
}

fn a_damaged_page_is_found_and_named() {
    let _guard = exclusive();
    let mut guest = Guest::start("damage", "microvm", 2, "ws=4 report=0");
    guest.wait_for("ready");
    guest.say("verify");
    assert_eq!(guest.wait_for("verified")["errors"], 0);
    for page in [3, 1023] {
        guest.say(&format!("poke {page}"));
        let gpa = guest.wait_for("poked")["gpa"].clone();
        let corrupt = guest.wait_for("corrupt");
        assert_eq!((&corrupt["page"], &corrupt["gpa"]), (&page.into(), &gpa));
        assert_eq!((&corrupt["kind"], &corrupt["offset"]), (&"torn".into(), &4088.into()));
    }
    guest.say("report");
    assert_eq!(guest.wait_for("report")["errors"], 2);
    // Each is counted once: the page was stamped anew.
    guest.say("verify");
    assert_eq!(guest.wait_for("verified")["errors"], 0);
    guest.say("poke 1024");
    assert_eq!(guest.wait_for("error")["input"], "poke 1024");
}

fn a_damaged_register_and_a_silent_timer_are_seen() {
    let _guard = exclusive();
    let mut guest = Guest::start("registers", "microvm", 2, "ws=1 report=0");
    let registers = guest.wait_for("boot")["fpu"].clone();
    guest.wait_for("ready");
    guest.say("flip");
    let (register, word) = match registers.as_str().unwrap() {
        "sse" => (15, 1),
        "avx" => (15, 3),
        _ => (31, 7),
    };
    let fpu = guest.wait_for("fpu");
    assert_eq!((&fpu["cpu"], &fpu["class"]), (&0.into(), &"vector".into()));
    assert_eq!((&fpu["register"], &fpu["word"]), (&register.into(), &word.into()));
    guest.say("mute");
    assert_eq!(guest.wait_for("timer-stalled")["cpu"], 0);
    guest.say("report");
    let report = guest.wait_for("report");
    assert_eq!(report["fpu_errors"], 1);
    assert_ne!(report["timer_stalls"], 0);
}

fn a_stop_of_the_vm_is_told_from_other_gaps() {
    let _guard = exclusive();
    let mut guest = Guest::start("stop", "microvm", 2, "ws=4 report=0");
    guest.wait_for("ready");
    for _ in 0..2 {
        guest.monitor("stop");
        guest.monitor("cont");
        let mut cpus = [guest.wait_for("switch"), guest.wait_for("switch")]
            .map(|switch| switch["cpu"].as_u64().unwrap());
        cpus.sort_unstable();
        assert_eq!(cpus, [0, 1], "each vCPU sees each stop once");
    }
    guest.say("report");
    let report = guest.wait_for("report");
    assert_eq!(report["switches"], 2);
    assert!(report["switch_max_us"].as_f64().unwrap() > 0.0, "{report}");
    guest.say("mark");
    guest.wait_for("mark");
    guest.say("report");
    assert_eq!(guest.wait_for("report")["switches"], 0);
}

fn commands_answer() {
    let _guard = exclusive();
    let mut guest = Guest::start("commands", "pc", 1, "ws=1 report=0 dirty=fast");
    assert_eq!(guest.wait_for("error")["option"], "dirty=fast");
    guest.wait_for("ready");
    guest.say("echo a \"quoted\" \\ text");
    assert_eq!(guest.wait_for("echo")["text"], "a \"quoted\" \\ text");
    guest.say("dirty max");
    assert_eq!(guest.wait_for("dirty")["dirty"], "max");
    guest.say("nonsense");
    assert_eq!(guest.wait_for("error")["input"], "nonsense");
    guest.say(&"x".repeat(1000));
    assert!(guest.wait_for("error")["text"].as_str().unwrap().contains("longer"));
    guest.say("poweroff");
    guest.wait_for("poweroff");
    assert!(guest.end().success());
}

fn ends_in_every_way() {
    let _guard = exclusive();
    for (command, machine) in [("triple", "microvm"), ("reboot", "pc"), ("reboot", "microvm")] {
        let mut guest = Guest::start("ends", machine, 2, "ws=1 report=0");
        guest.wait_for("ready");
        guest.say(command);
        guest.wait_for(command);
        assert!(guest.end().success(), "{command}");
    }
    let mut guest = Guest::start("button", "pc", 1, "ws=1 report=0");
    guest.wait_for("ready");
    guest.monitor("system_powerdown");
    guest.wait_for("power-button");
    assert!(guest.end().success());

    let mut guest = Guest::start("exception", "microvm", 2, "ws=1 report=0");
    guest.wait_for("ready");
    guest.say("exception");
    let exception = guest.wait_for("exception");
    assert_eq!((&exception["vector"], &exception["cpu"]), (&13.into(), &0.into()));
}

fn exits_are_measured() {
    let _guard = exclusive();
    let mut guest = Guest::start("exits", "microvm", 1, "mode=exits samples=50 then=poweroff");
    let exits = guest.wait_for("exits");
    assert_eq!(exits["samples"], 50);
    for kind in ["mmio", "pio"] {
        let value = |name: &str| exits[format!("{kind}_{name}_ns")].as_u64().unwrap();
        assert!(0 < value("min") && value("min") <= value("median"), "{exits}");
        assert!(value("median") <= value("p99"), "{exits}");
    }
    assert!(guest.end().success());
}
