//! `minivmm run` to Linux' first process, beside QEMU microvm with the same kernel and the same
//! archive: on the processor's own virtualization, else in the lab.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{json, Value};
use tests::lab::{image, lab_dir, linux_image, program, virtualization, Lab};
use tests::{binary, Host};

use ::tests::bench::{Better, Figure, Result, Row};

use crate::Bench;

/// The argument with which this program measures and prints samples: the number of runs follows.
pub const SAMPLES: &str = "--linux-samples";

const QEMU: &str = "qemu-system-x86_64";
/// What QEMU needs in its data folder for a microvm.
const FIRMWARE: [&str; 5] =
    ["qboot.rom", "bios-microvm.bin", "pvh.bin", "linuxboot_dma.bin", "kvmvapic.bin"];
/// Where packages have it.
const FIRMWARE_FOLDERS: [&str; 2] = ["/usr/share/qemu", "/usr/share/seabios"];
/// For all runs in the lab, each of which takes some seconds.
const LAB_LIMIT: Duration = Duration::from_secs(30 * 60);

/// What boots the guest: name and, for QEMU, the machine. QEMU's own choice of devices, and only
/// those that a Linux guest on KVM needs: no legacy timer, interrupt controllers and clock, no option
/// ROMs (docs/system/i386/microvm.rst). Without ACPI as well, this guest does not find its interrupts.
const SUBJECTS: [(&str, Option<&str>); 3] = [
    ("minivmm", None),
    ("QEMU microvm", Some("microvm")),
    (
        "QEMU microvm, least devices",
        Some("microvm,x-option-roms=off,pit=off,pic=off,rtc=off,isa-serial=on"),
    ),
];

/// The kernels, and what they are.
const KERNELS: [(&str, &str); 2] = [("vmlinux", "vmlinux by PVH"), ("vmlinuz", "bzImage")];

/// Time to init, and the ratio.
pub fn boot(bench: &Bench) -> Result<Vec<Row>> {
    let runs = bench.runs();
    let direct = virtualization().is_ok();
    let missing = linux_image().err().or_else(|| bench.tools.qemu.clone().err());
    let (lines, place) = match missing {
        Some(why) => (Err(why), ""),
        None if direct => (Ok(measure(runs)), ""),
        None => (in_lab(runs), ", in the lab"),
    };
    Ok(KERNELS.iter().map(|(kernel, what)| row(kernel, what, place, &lines)).collect())
}

fn row(
    kernel: &str,
    what: &str,
    place: &str,
    lines: &std::result::Result<Vec<Value>, String>,
) -> Row {
    let figure = |who: &str| {
        let mut figure = Figure::new();
        let lines = match lines {
            Ok(lines) => lines,
            Err(why) => return Figure::Missing(why.clone()),
        };
        for line in lines.iter().filter(|l| l["who"] == who && l["kernel"] == kernel) {
            let why = || line["why"].as_str().unwrap_or("no figure").to_owned();
            figure.add(line["ms"].as_f64().ok_or_else(why));
        }
        figure
    };
    let peers = SUBJECTS[1..].iter().map(|(who, _)| ((*who).to_owned(), figure(who))).collect();
    Row {
        bench: "linux",
        what: format!("exec to Linux' init, {what}, 256 MiB{place}"),
        unit: "ms",
        better: Better::Lower,
        digits: 0,
        minivmm: figure("minivmm"),
        target: None,
        peers,
    }
}

/// All samples, taken in the lab.
fn in_lab(runs: usize) -> std::result::Result<Vec<Value>, String> {
    let text = |error: std::io::Error| error.to_string();
    let script = format!("tests {SAMPLES} {runs} >/dev/ttyS1");
    let mut lab = Lab::with_minivmm(&script).map_err(text)?.limit(LAB_LIMIT);
    lab = lab.program(QEMU).map_err(text)?;
    for name in FIRMWARE {
        if let Some(file) = firmware(name) {
            lab = lab.file(&format!("{}/{name}", FIRMWARE_FOLDERS[0]), file);
        }
    }
    let run = lab.run(&lab_dir("bench-linux")).map_err(text)?;
    if run.finished && run.results.iter().any(|line| line["done"] == true) {
        return Ok(run.results);
    }
    let seconds = run.time.as_secs();
    Err(format!("the lab did not finish in {seconds} s: see {}", run.logs.display()))
}

fn firmware(name: &str) -> Option<std::path::PathBuf> {
    let places = FIRMWARE_FOLDERS.iter().map(|folder| Path::new(folder).join(name));
    places.into_iter().find(|path| path.is_file())
}

/// Takes the samples here and prints them, one JSON object a line.
pub fn print_samples(runs: usize) {
    for line in measure(runs) {
        println!("{line}");
    }
    println!("{}", json!({ "done": true }));
}

/// Subjects in turn; the first round, which fills the page cache, does not count.
fn measure(runs: usize) -> Vec<Value> {
    let mut lines = Vec::new();
    for run in 0..=runs {
        for (kernel, _) in KERNELS {
            for (who, machine) in SUBJECTS {
                eprintln!("linux: run {run} of {runs}: {kernel}, {who}");
                let line = match time_to_init(kernel, machine) {
                    Ok(ms) => json!({ "who": who, "kernel": kernel, "ms": ms }),
                    Err(why) => json!({ "who": who, "kernel": kernel, "why": why.to_string() }),
                };
                if run > 0 {
                    lines.push(line);
                }
            }
        }
    }
    lines
}

/// From right before exec until `init` has said that it is ready, ms.
fn time_to_init(kernel: &str, machine: Option<&str>) -> Result<f64> {
    /// Longest wait, far beyond what it takes even in the lab.
    const LIMIT: Duration = Duration::from_secs(180);
    const CMDLINE: &str = "console=ttyS0 quiet panic=-1";

    let host = Host::new();
    let (kernel, initrd) = (image(kernel), image("initramfs.cpio"));
    let mut command = match machine {
        None => {
            let mut command = Command::new(binary());
            host.environment(&mut command);
            command.args(["run", "--memory", "256M", "--console", "stdio"]);
            command.arg("--kernel").arg(kernel).arg("--initrd").arg(initrd);
            command.args(["--cmdline", CMDLINE]);
            command
        }
        Some(machine) => {
            let mut command = Command::new(program(QEMU)?);
            command.args(["-enable-kvm", "-cpu", "host", "-machine", machine]);
            command.args(["-m", "256", "-smp", "1"]);
            command.arg("-kernel").arg(kernel).arg("-initrd").arg(initrd);
            command.args(["-append", CMDLINE, "-serial", "stdio", "-no-reboot"]);
            command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
            command
        }
    };
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let begin = Instant::now();
    let mut child = command.spawn()?;
    let output = child.stdout.take().ok_or("no standard output")?;
    let (sender, receiver) = std::sync::mpsc::channel();
    let reader = std::thread::spawn(move || {
        let mut last = String::new();
        for line in BufReader::new(output).split(b'\n').map_while(std::result::Result::ok) {
            last = String::from_utf8_lossy(&line).trim_end().to_owned();
            if last == "= ready" {
                let _ = sender.send(begin.elapsed());
                break;
            }
        }
        last
    });
    let took = receiver.recv_timeout(LIMIT);
    child.kill()?;
    let output = child.wait_with_output()?;
    let last = reader.join().unwrap_or_default();
    let errors = String::from_utf8_lossy(&output.stderr);
    took.map(|took| took.as_secs_f64() * 1e3)
        .map_err(|_| format!("Linux did not come to init: {last} {}", errors.trim()).into())
}
