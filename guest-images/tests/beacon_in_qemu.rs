//! Beacon in QEMU: it starts, and each of its checks sees what it is there to see.
//!
//! Needs `qemu-system-x86_64` and `/dev/kvm`; without them the tests are reported as ignored.
#![allow(clippy::unwrap_used)]

mod qemu;

use libtest_mimic::Arguments;

use self::qemu::{exclusive, trial, Guest};

fn main() -> std::process::ExitCode {
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
    // The first window begins a moment after `ready` was seen.
    guest.say("mark");
    guest.wait_for("mark");
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
    guest.say("mark 300");
    guest.say("window");
    let (now, later) = (guest.wait_for("window"), guest.wait_for("window"));
    assert_eq!((&now["asked_ms"], &later["asked_ms"]), (&0.into(), &300.into()));
    assert!(later["window_ms"].as_u64().unwrap() >= 300, "{later}");
    assert!(later["writes"].as_u64() > now["writes"].as_u64(), "{now}, {later}");
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
