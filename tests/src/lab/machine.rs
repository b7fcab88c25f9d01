//! The outer machine of the lab.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::cpio::Archive;
use super::{image, program};
use crate::process::{tied, wait};

/// The emulator.
pub(super) const QEMU: &str = "qemu-system-x86_64";

/// What `init` of the Linux image runs instead of its own commands, where it is there.
const OVERLAY_INIT: &str = "overlay/init";
/// What its shells read first.
const OVERLAY_PROGRAMS: &str = "overlay/programs";
/// Where programs of this machine are in the lab, ahead of busybox's own.
const PROGRAMS: &str = "usr/bin";

/// A machine to be: what is in it and what it does.
#[derive(Debug)]
pub struct Lab {
    modules: Vec<String>,
    files: Vec<Item>,
    script: String,
    limit: Duration,
    memory_mib: u32,
}

/// A file of the machine.
#[derive(Debug)]
struct Item {
    /// Where, relative to the root.
    to: String,
    from: PathBuf,
    /// It is one of this project's, with debug information that nobody needs there.
    strip: bool,
}

/// What came of it.
#[derive(Debug)]
pub struct LabRun {
    /// The lines that the script wrote to /dev/ttyS1.
    pub results: Vec<Value>,
    /// Whether the machine switched itself off within its time.
    pub finished: bool,
    /// How long it took.
    pub time: Duration,
    /// Where its logs are: `console.log` (kernel and script), `results.jsonl`, `qemu.log`.
    pub logs: PathBuf,
}

impl Lab {
    /// A machine that runs `script` with the image's shell, as root, and then switches off.
    /// Standard output and error of the script go to the console.
    pub fn new(script: impl Into<String>) -> Self {
        Self {
            modules: Vec::new(),
            files: Vec::new(),
            script: script.into(),
            limit: Duration::from_secs(300),
            memory_mib: 3072,
        }
    }

    /// Loads kernel modules, with what they need, before the script. They are among those that
    /// `guest-images/linux/build.sh` lists.
    #[must_use]
    pub fn modules(mut self, names: &[&str]) -> Self {
        self.modules.extend(names.iter().map(|name| (*name).to_owned()));
        self
    }

    /// Puts the file `from` into the machine as `to`, a path from the root. All files are
    /// executable.
    #[must_use]
    pub fn file(self, to: &str, from: impl Into<PathBuf>) -> Self {
        self.item(to, from.into(), false)
    }

    fn item(mut self, to: &str, from: PathBuf, strip: bool) -> Self {
        let to = to.trim_start_matches('/').to_owned();
        if self.files.iter().all(|there| there.to != to) {
            self.files.push(Item { to, from, strip });
        }
        self
    }

    /// Puts an executable of this project into the machine as `to`, with the libraries that it
    /// needs, without its debug information.
    ///
    /// # Errors
    /// They cannot be found out.
    pub fn executable(self, to: &str, from: &Path) -> io::Result<Self> {
        Ok(self.libraries_of(from)?.item(to, from.to_owned(), true))
    }

    fn libraries_of(mut self, executable: &Path) -> io::Result<Self> {
        for library in libraries(executable)? {
            self = self.file(&library.to_string_lossy(), library.clone());
        }
        Ok(self)
    }

    /// Puts a program of this machine into the lab, under the same name.
    ///
    /// # Errors
    /// There is none, or its libraries cannot be found out.
    pub fn program(self, name: &str) -> io::Result<Self> {
        let from = program(name).map_err(io::Error::other)?;
        Ok(self.libraries_of(&from)?.file(&format!("{PROGRAMS}/{name}"), from))
    }

    /// Ends the machine after this time.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Runs the machine to its end. All that it leaves is in the directory `dir`.
    ///
    /// # Errors
    /// The machine cannot be made or started. That it does not finish, or not well, is in the
    /// result.
    pub fn run(&self, dir: &Path) -> io::Result<LabRun> {
        let console = dir.join("console.log");
        let begin = Instant::now();
        let console = format!("file:{}", console.display());
        let (status, results) = self.start(dir, &console, Stdio::null, Some(self.limit))?;
        Ok(LabRun {
            results,
            finished: status.is_some_and(|s| s.success()),
            time: begin.elapsed(),
            logs: dir.to_owned(),
        })
    }

    /// As [`Lab::run`], with the console on this process' terminal and without a limit; gives the
    /// results. Ctrl-A x ends the machine.
    ///
    /// # Errors
    /// As [`Lab::run`].
    pub fn run_on_terminal(&self, dir: &Path) -> io::Result<Vec<Value>> {
        Ok(self.start(dir, "mon:stdio", Stdio::inherit, None)?.1)
    }

    fn start(
        &self,
        dir: &Path,
        console: &str,
        stdio: fn() -> Stdio,
        limit: Option<Duration>,
    ) -> io::Result<(Option<ExitStatus>, Vec<Value>)> {
        // Nothing of an earlier run is taken for this one's.
        let _ = fs::remove_dir_all(dir);
        fs::create_dir_all(dir)?;
        let initramfs = dir.join("outer.cpio");
        self.write_initramfs(&initramfs)?;
        let results = dir.join("results.jsonl");
        let mut command = tied(&self.command(&initramfs, console, &results));
        command.stdin(stdio()).stdout(stdio()).stderr(File::create(dir.join("qemu.log"))?);
        let mut qemu = command.spawn()?;
        let status = match limit {
            Some(limit) => wait(&mut qemu, limit),
            None => Some(qemu.wait()?),
        };
        if status.is_none() {
            qemu.kill()?;
            qemu.wait()?;
        }
        fs::remove_file(&initramfs)?;
        let text = fs::read(&results).unwrap_or_default();
        let lines = String::from_utf8_lossy(&text);
        Ok((status, lines.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()))
    }

    /// The image's archive and, behind it, one with our files.
    fn write_initramfs(&self, path: &Path) -> io::Result<()> {
        let mut to = BufWriter::new(File::create(path)?);
        io::copy(&mut File::open(image("initramfs.cpio"))?, &mut to)?;
        let mut archive = Archive::new(to);
        let stripped = path.with_extension("stripped");
        for Item { to, from, strip } in &self.files {
            let failed = |e| io::Error::other(format!("{}: {e}", from.display()));
            // Where there is no `strip` they go in as they are, which takes longer.
            let strip = *strip && strip_debug(from, &stripped);
            archive.add_file(to, if strip { &stripped } else { from }).map_err(failed)?;
        }
        let _ = fs::remove_file(&stripped);
        let init = format!(
            "#!/bin/sh\nexport PATH=/{PROGRAMS}:/bin ENV=/{OVERLAY_PROGRAMS}\n. $ENV\n\
             (\n{}\n)\necho \"lab: status $?\"\npoweroff -f\n",
            self.script
        );
        archive.add(OVERLAY_INIT, init.as_bytes())?;
        archive.add(OVERLAY_PROGRAMS, self.programs().as_bytes())?;
        archive.finish()?.into_inner()?.flush()
    }

    /// Functions by which the shell finds our programs: it prefers what is in busybox to what is in
    /// its path. Names that no function can have are none of busybox' either.
    fn programs(&self) -> String {
        let prefix = format!("{PROGRAMS}/");
        let names = self.files.iter().filter_map(|item| item.to.strip_prefix(&prefix));
        let plain = names.filter(|name| name.chars().all(|c| c.is_ascii_alphanumeric()));
        plain.map(|name| format!("{name}() {{ /{PROGRAMS}/{name} \"$@\"; }}\n")).collect()
    }

    /// Emulation of SVM is complete but for XSETBV, hence no XSAVE; threads are needed, one outer
    /// CPU is fastest.
    fn command(&self, initramfs: &Path, console: &str, results: &Path) -> Command {
        let mut command = Command::new(QEMU);
        let modules = self.modules.join(",");
        // Once an idle machine slept until input came, as if a one-shot timer's interrupt had been
        // lost (seen once, cause not proved). With a periodic timer it was not seen again.
        //
        // The emulated TSC is this machine's. Its kernel would measure it, and wrongly where this
        // machine is busy: its clock then runs several times too fast, and so do all limits.
        let append = format!(
            "console=ttyS0 loglevel=4 panic=-1 mitigations=off tsc=reliable tsc_early_khz={} \
             highres=off nohz=off modules={modules}",
            tsc_khz()
        );
        command.args(["-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "EPYC,-xsave"]);
        command.args(["-smp", "1", "-m", &format!("{}M", self.memory_mib), "-no-reboot"]);
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-vga", "none"]);
        command.arg("-kernel").arg(image("vmlinux")).arg("-initrd").arg(initramfs);
        command.args(["-append", &append, "-serial", console]);
        command.arg("-serial").arg(format!("file:{}", results.display()));
        command
    }
}

/// Frequency of this machine's TSC, measured, kHz.
fn tsc_khz() -> u64 {
    /// The clock's two readings may be microseconds off.
    const MEASURE: Duration = Duration::from_millis(100);
    let (begin, from) = (Instant::now(), vmm::kvm::host_tsc());
    std::thread::sleep(MEASURE);
    let ticks = vmm::kvm::host_tsc().wrapping_sub(from);
    (ticks as f64 / begin.elapsed().as_secs_f64() / 1e3).round() as u64
}

/// Writes `from` without debug information to `to`.
fn strip_debug(from: &Path, to: &Path) -> bool {
    let strip = Command::new("strip").args(["--strip-debug", "-o"]).args([to, from]).output();
    strip.is_ok_and(|output| output.status.success())
}

/// Libraries of an executable, the dynamic linker included, at the paths where it looks for them.
fn libraries(executable: &Path) -> io::Result<Vec<PathBuf>> {
    let failed = |why: &str| io::Error::other(format!("ldd {}: {why}", executable.display()));
    let output =
        Command::new("ldd").arg(executable).output().map_err(|e| failed(&e.to_string()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    if text.contains("not found") {
        return Err(failed(&text));
    }
    // `name => /path (address)`, `/path (address)`, and `linux-vdso.so.1 (address)`; of a static
    // one it says so, and fails.
    let path = |line: &str| line.split_whitespace().find(|w| w.starts_with('/')).map(PathBuf::from);
    Ok(text.lines().filter(|line| line.contains("(0x")).filter_map(path).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_executable_brings_its_libraries_once() {
        let me = std::env::current_exe().unwrap();
        let lab = Lab::new("").executable("/lab/one", &me).unwrap();
        let has = |what: &str| lab.files.iter().filter(|item| item.to.contains(what)).count();
        assert_eq!((has("libc.so"), has("ld-linux"), has("lab/one")), (1, 1, 1));
        assert!(lab.files.iter().all(|item| !item.to.starts_with('/') && item.from.is_file()));
        let count = lab.files.len();
        assert_eq!(lab.executable("/lab/two", &me).unwrap().files.len(), count + 1);
    }

    #[test]
    fn what_is_no_program_of_this_machine_is_told() {
        let error = Lab::new("").program("no-such-program").unwrap_err();
        assert!(error.to_string().contains("no-such-program"), "{error}");
    }
}
