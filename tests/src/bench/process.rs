//! `beacon` in a process of its own: in minivmm or in QEMU.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;

use super::qmp::Qmp;
use super::Result;
use crate::process::guest_resident;

/// Longest wait for anything; far beyond what it takes.
pub const LIMIT: Duration = Duration::from_secs(120);
/// How the text of an error begins that is the guest's own: something it knew was lost or changed.
pub const GUEST_ERROR: &str = "the guest found an error";
const QEMU: &str = "qemu-system-x86_64";

/// What runs the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vmm {
    /// This project.
    Minivmm,
    /// QEMU microvm with the ROM that does only what beacon needs.
    QemuRom,
    /// QEMU microvm with the firmware that it takes by itself.
    QemuFirmware,
    /// As `QemuRom`, with io_uring instead of threads for its disks.
    QemuUring,
}

impl Vmm {
    /// As tables show it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Minivmm => "minivmm",
            Self::QemuRom => "QEMU microvm",
            Self::QemuFirmware => "QEMU microvm, qboot",
            Self::QemuUring => "QEMU microvm, aio=io_uring",
        }
    }
}

/// The machine and what beacon does in it.
#[derive(Debug, Clone, Default)]
pub struct Setup {
    /// Guest memory.
    pub memory_mib: u64,
    /// vCPUs.
    pub cpus: u8,
    /// beacon's command line.
    pub cmdline: String,
    /// The file of its disk.
    pub disk: Option<PathBuf>,
    /// The tap of its network card.
    pub tap: Option<&'static str>,
    /// The card's address; the VMM's own choice where there is none.
    pub mac: Option<&'static str>,
}

/// Where everything is.
#[derive(Debug)]
pub struct Tools {
    minivmm: PathBuf,
    /// QEMU's version, or why it is not there.
    pub qemu: std::result::Result<String, String>,
    /// Sockets and boot images; short, since paths of sockets may not be long.
    runtime: PathBuf,
    /// Saved VMs and their copies.
    pub data: PathBuf,
}

impl Tools {
    /// Looks for the programs; `data` is where files are to be measured.
    pub fn new(data: &Path) -> Result<Self> {
        let minivmm = std::env::current_exe()?.with_file_name("minivmm");
        if !minivmm.exists() {
            let path = minivmm.display();
            return Err(format!("{path} is not there: `make build` builds it").into());
        }
        let own = format!("minivmm-bench-{}", std::process::id());
        let tools = Self {
            minivmm,
            qemu: qemu_version(),
            runtime: std::env::temp_dir().join(&own),
            data: data.join(&own),
        };
        fs::create_dir_all(&tools.runtime)?;
        fs::create_dir_all(&tools.data)?;
        fs::write(tools.runtime.join("beacon.elf"), guest_images::BEACON)?;
        fs::write(tools.runtime.join("rom.bin"), guest_images::qemu_bios())?;
        Ok(tools)
    }

    /// A command of minivmm that prints JSON, a value for each line.
    pub fn minivmm_json(&self, args: &[&str]) -> Result<Vec<Value>> {
        let output = self.minivmm_command().args(args).arg("--json").output()?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr);
            return Err(format!("minivmm {args:?}: {text}").into());
        }
        Ok(serde_json::Deserializer::from_slice(&output.stdout)
            .into_iter()
            .collect::<serde_json::Result<_>>()?)
    }

    /// minivmm, with this benchmark's VMs.
    #[must_use]
    pub fn minivmm_command(&self) -> Command {
        let mut command = Command::new(&self.minivmm);
        command.env("MINIVMM_RUNTIME_DIR", &self.runtime);
        command.env("MINIVMM_STATE_DIR", self.runtime.join("state"));
        command
    }

    /// Boots beacon.
    pub fn boot(&self, vmm: Vmm, name: &str, setup: &Setup) -> Result<Guest> {
        match vmm {
            Vmm::Minivmm => {
                let mut command = self.minivmm_command();
                command
                    .args(["run", "--name", name, "--memory", &format!("{}M", setup.memory_mib)])
                    .args(["--cpus", &setup.cpus.to_string(), "--cmdline", &setup.cmdline]);
                if let Some(disk) = &setup.disk {
                    let disk = format!("id=disk,path={},cache=writeback", disk.display());
                    command.args(["--disk", &disk]);
                }
                if let Some(tap) = setup.tap {
                    let mac = setup.mac.map(|mac| format!(",mac={mac}")).unwrap_or_default();
                    command.args(["--net", &format!("id=net,tap={tap}{mac}")]);
                }
                Guest::start(command, Wiring::Console)
            }
            Vmm::QemuRom | Vmm::QemuFirmware | Vmm::QemuUring => {
                let mut command = self.qemu_command(vmm, setup);
                command.args(["-serial", "stdio"]);
                Guest::start(command, Wiring::Console)
            }
        }
    }

    /// Makes a VM from a file that minivmm wrote.
    pub fn minivmm_restore(&self, file: &Path, name: &str) -> Result<Guest> {
        let mut command = self.minivmm_command();
        command.arg("restore").arg(file).args(["--name", name]);
        Guest::start(command, Wiring::Console)
    }

    /// Boots beacon in QEMU with a monitor, or has QEMU wait for `incoming`.
    pub fn qemu_with_monitor(&self, setup: &Setup, incoming: Option<&str>) -> Result<Guest> {
        let mut command = self.qemu_command(Vmm::QemuRom, setup);
        command.args(["-qmp", "stdio", "-serial", "file:/dev/stderr"]);
        if let Some(from) = incoming {
            command.args(["-incoming", from]);
        }
        Guest::start(command, Wiring::Monitor)
    }

    /// Boots beacon in QEMU with the console on pipes and a monitor beside it, or has QEMU wait to
    /// be told where an incoming VM comes from. `name` tells QEMUs of one time apart; `more` are further arguments.
    pub fn qemu_movable(
        &self,
        name: &str,
        setup: &Setup,
        incoming: bool,
        more: &[OsString],
    ) -> Result<Guest> {
        let socket = self.runtime.join(format!("{name}.qmp"));
        if socket.exists() {
            fs::remove_file(&socket)?;
        }
        let mut command = self.qemu_command(Vmm::QemuRom, setup);
        command.args(["-serial", "stdio", "-qmp"]);
        command.arg(format!("unix:{},server=on,wait=off", socket.display()));
        if incoming {
            command.args(["-incoming", "defer"]);
        }
        command.args(more);
        let mut guest = Guest::start(command, Wiring::Console)?;
        let deadline = Instant::now() + LIMIT;
        let stream = loop {
            match UnixStream::connect(&socket) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > deadline || guest.ended()? => {
                    return Err(format!("QEMU's monitor does not answer: {error}").into());
                }
                // It makes the socket early, before the machine.
                Err(_) => std::thread::sleep(Duration::from_millis(1)),
            }
        };
        guest.monitor = Some(Qmp::new(stream.try_clone()?, stream)?);
        Ok(guest)
    }

    fn qemu_command(&self, vmm: Vmm, setup: &Setup) -> Command {
        let file = |name| self.runtime.join(name);
        let mut command = Command::new(QEMU);
        // As in beacon's README.
        command
            .args(["-enable-kvm", "-cpu", "host,-arch-capabilities"])
            .args(["-machine", "microvm,memory-backend=ram"])
            .args(["-m", &setup.memory_mib.to_string(), "-smp", &setup.cpus.to_string()])
            .arg("-object")
            .arg(format!("memory-backend-ram,id=ram,size={}M", setup.memory_mib))
            .arg("-kernel")
            .arg(file("beacon.elf"))
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        let mut cmdline = setup.cmdline.clone();
        if setup.disk.is_some() || setup.tap.is_some() {
            // Where microvm puts the first two devices.
            cmdline += " virtio_mmio.device=512@0xfeb02e00:47 virtio_mmio.device=512@0xfeb02c00:46";
            command.args(["-global", "virtio-mmio.force-legacy=false"]);
        }
        command.args(["-append", &cmdline]);
        if let Some(disk) = &setup.disk {
            let aio = if vmm == Vmm::QemuUring { "io_uring" } else { "threads" };
            let disk = disk.display();
            command
                .arg("-drive")
                .arg(format!("if=none,id=disk,file={disk},format=raw,cache=writeback,aio={aio}"))
                .args(["-device", "virtio-blk-device,drive=disk"]);
        }
        if let Some(tap) = setup.tap {
            let mac = setup.mac.map(|mac| format!(",mac={mac}")).unwrap_or_default();
            command
                .arg("-netdev")
                .arg(format!("tap,id=net,ifname={tap},script=no,downscript=no,vhost=off"))
                .arg("-device")
                .arg(format!("virtio-net-device,netdev=net{mac}"));
        }
        if vmm != Vmm::QemuFirmware {
            command.arg("-bios").arg(file("rom.bin"));
        }
        command
    }
}

impl Drop for Tools {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.runtime);
        let _ = fs::remove_dir_all(&self.data);
    }
}

fn qemu_version() -> std::result::Result<String, String> {
    let output = Command::new(QEMU).arg("--version").output();
    let output = output.map_err(|error| {
        format!("{QEMU} does not start ({error}); on Debian it is in the package qemu-system-x86")
    })?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or("QEMU of unknown version").to_owned())
}

/// What the process' standard streams are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wiring {
    /// Standard input and output are the serial port.
    Console,
    /// Standard input and output are QEMU's monitor, standard error is the serial port.
    Monitor,
    /// As `Console`, and what is said on standard error can be waited for.
    Heard,
}

/// A line of the console.
#[derive(Debug)]
pub struct Line {
    /// When its first byte was read.
    pub began: Instant,
    /// When its last byte was read.
    pub ended: Instant,
    /// The event; null when the line is none.
    pub event: Value,
}

/// A guest and the process that runs it, which ends with this value.
#[derive(Debug)]
pub struct Guest {
    process: Child,
    /// QEMU's monitor.
    pub monitor: Option<Qmp>,
    console: Receiver<(Line, String)>,
    /// The console's, unless the monitor has it. minivmm's console would end without.
    input: Option<ChildStdin>,
    said: Option<Receiver<String>>,
    /// Right before the process was made.
    pub begun: Instant,
    /// The same, by the wall clock.
    pub begun_wall: SystemTime,
    /// The same, by the TSC of the host.
    pub begun_tsc: u64,
}

impl Guest {
    /// Starts a command that becomes a VM.
    pub fn start(mut command: Command, wiring: Wiring) -> Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        if wiring != Wiring::Console {
            command.stderr(Stdio::piped());
        }
        let (begun, begun_wall) = (Instant::now(), SystemTime::now());
        let begun_tsc = vmm::kvm::host_tsc();
        let mut process = command.spawn()?;
        let input = process.stdin.take().ok_or("no standard input")?;
        let output = process.stdout.take().ok_or("no standard output")?;
        let (mut monitor, mut console_input, mut said) = (None, None, None);
        let console = match (wiring, process.stderr.take()) {
            (Wiring::Monitor, Some(stderr)) => {
                monitor = Some(Qmp::new(input, output)?);
                read_console(stderr)
            }
            (_, stderr) => {
                said = stderr.map(read_lines);
                console_input = Some(input);
                read_console(output)
            }
        };
        let input = console_input;
        Ok(Self { process, monitor, console, input, said, begun, begun_wall, begun_tsc })
    }

    /// The process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Whether the process is over. Its CPU time is gone then, too.
    pub fn ended(&mut self) -> Result<bool> {
        Ok(self.process.try_wait()?.is_some())
    }

    /// Waits for a line on standard error that contains `what`.
    pub fn hear(&mut self, what: &str) -> Result<String> {
        let lines = self.said.as_ref().ok_or("nobody listens to standard error")?;
        let deadline = Instant::now() + LIMIT;
        let mut heard = String::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match lines.recv_timeout(left) {
                Ok(line) if line.contains(what) => return Ok(line),
                Ok(line) => heard = heard + &line + "\n",
                Err(_) => return Err(format!("not said: {what:?}; instead:\n{heard}").into()),
            }
        }
    }

    /// Types a command and waits for the event that answers it.
    pub fn ask(&mut self, command: &str, answer: &str) -> Result<Value> {
        self.say(command)?;
        Ok(self.event(answer)?.event)
    }

    /// The next event of this kind.
    pub fn event(&mut self, kind: &str) -> Result<Line> {
        let deadline = Instant::now() + LIMIT;
        let mut last = String::from("no output");
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok((line, text)) = self.console.recv_timeout(left) else {
                return Err(format!("no {kind} event from beacon; last line: {last}").into());
            };
            match line.event["event"].as_str() {
                Some(found) if found == kind => return Ok(line),
                // Not `fpu`: QEMU loses vector registers on some hosts, which costs no time.
                Some("corrupt" | "tsc-back" | "clock-back" | "exception" | "panic") => {
                    return Err(format!("{GUEST_ERROR}: {text}").into());
                }
                _ => last = text,
            }
        }
    }

    /// Types a command into the guest's console.
    pub fn say(&mut self, line: &str) -> Result<()> {
        let input = self.input.as_mut().ok_or("no console")?;
        Ok(writeln!(input, "{line}")?)
    }

    /// QEMU's monitor.
    pub fn qmp(&mut self) -> Result<&mut Qmp> {
        self.monitor.as_mut().ok_or_else(|| "no monitor".into())
    }

    /// A number in /proc/PID/status; memory is in KiB.
    pub fn status(&self, field: &str) -> Result<f64> {
        let path = format!("/proc/{}/status", self.process.id());
        let status = fs::read_to_string(&path)?;
        let line = status.lines().find_map(|l| l.strip_prefix(field)?.strip_prefix(':'));
        let number = line.and_then(|l| l.split_whitespace().next()?.parse().ok());
        number.ok_or_else(|| format!("{path} has no {field}").into())
    }

    /// Resident memory of the process that is not the guest's, MiB.
    pub fn overhead_mib(&self) -> Result<f64> {
        let own = self.status("RssAnon")? + self.status("RssFile")?;
        Ok((own * 1024.0 - guest_resident(self.process.id())? as f64) / f64::from(1 << 20))
    }

    /// Waits until the process has ended by itself.
    pub fn wait_for_end(mut self) -> Result<()> {
        let deadline = Instant::now() + LIMIT;
        while Instant::now() < deadline {
            if self.ended()? {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Err("a process does not end that has nothing left to do".into())
    }

    /// Ends the process and waits until it, and so its memory, is gone.
    pub fn end(mut self) -> Result<()> {
        self.process.kill()?;
        self.process.wait()?;
        Ok(())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Reads lines on a thread of its own, so that their times are those of their arrival. The thread
/// ends with the process.
fn read_console(output: impl Read + Send + 'static) -> Receiver<(Line, String)> {
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        let mut output = BufReader::new(output);
        loop {
            // Before the line is complete: buffering waits for the first byte only.
            match output.fill_buf() {
                Ok(bytes) if !bytes.is_empty() => {}
                _ => return,
            }
            let began = Instant::now();
            let mut text = Vec::new();
            if output.read_until(b'\n', &mut text).is_err() {
                return;
            }
            let ended = Instant::now();
            let text = String::from_utf8_lossy(&text).trim_end().to_owned();
            let event = serde_json::from_str(&text).unwrap_or_default();
            if sender.send((Line { began, ended, event }, text)).is_err() {
                return;
            }
        }
    });
    lines
}

/// Reads a process' own words on a thread of its own.
fn read_lines(output: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        // To the end, also when nobody wants them any more: a full pipe would block the process.
        for line in BufReader::new(output).lines().map_while(std::result::Result::ok) {
            let _ = sender.send(line);
        }
    });
    lines
}

/// Brings a file to the disk.
pub fn sync(path: &Path) -> Result<()> {
    Ok(File::open(path)?.sync_all()?)
}
