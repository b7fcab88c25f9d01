//! The outer machine of the lab.

use std::fs::File;
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::cpio::Archive;
use super::image;
use crate::process::wait;

/// The emulator.
pub(super) const QEMU: &str = "qemu-system-x86_64";

/// What `init` of the Linux image runs instead of its own commands, where it is there.
const OVERLAY_INIT: &str = "overlay/init";

/// A machine to be: what is in it and what it does.
#[derive(Debug)]
pub struct Lab {
    modules: Vec<String>,
    files: Vec<(String, PathBuf)>,
    script: String,
    limit: Duration,
    memory_mib: u32,
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
    pub fn file(mut self, to: &str, from: impl Into<PathBuf>) -> Self {
        self.files.push((to.trim_start_matches('/').to_owned(), from.into()));
        self
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
        std::fs::create_dir_all(dir)?;
        let initramfs = dir.join("outer.cpio");
        self.write_initramfs(&initramfs)?;
        let results = dir.join("results.jsonl");
        let console = dir.join("console.log");
        let begin = Instant::now();
        let mut qemu = self
            .command(&initramfs, &console, &results)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(dir.join("qemu.log"))?)
            .spawn()?;
        let status = wait(&mut qemu, self.limit);
        if status.is_none() {
            qemu.kill()?;
            qemu.wait()?;
        }
        std::fs::remove_file(&initramfs)?;
        let text = std::fs::read(&results).unwrap_or_default();
        let lines = String::from_utf8_lossy(&text);
        Ok(LabRun {
            results: lines.lines().filter_map(|line| serde_json::from_str(line).ok()).collect(),
            finished: status.is_some_and(|s| s.success()),
            time: begin.elapsed(),
            logs: dir.to_owned(),
        })
    }

    /// The image's archive and, behind it, one with our files.
    fn write_initramfs(&self, path: &Path) -> io::Result<()> {
        let mut to = BufWriter::new(File::create(path)?);
        io::copy(&mut File::open(image("initramfs.cpio"))?, &mut to)?;
        let mut archive = Archive::new(to);
        for (to, from) in &self.files {
            let failed = |e| io::Error::other(format!("{}: {e}", from.display()));
            archive.add_file(to, from).map_err(failed)?;
        }
        let init =
            format!("#!/bin/sh\n(\n{}\n)\necho \"lab: status $?\"\npoweroff -f\n", self.script);
        archive.add(OVERLAY_INIT, init.as_bytes())?;
        archive.finish()?.into_inner()?.sync_data()
    }

    /// Emulation of SVM is complete but for XSETBV, hence no XSAVE; threads are needed, one outer
    /// CPU is fastest.
    fn command(&self, initramfs: &Path, console: &Path, results: &Path) -> Command {
        let mut command = Command::new(QEMU);
        let modules = self.modules.join(",");
        // Once an idle machine slept until input came, as if a one-shot timer's interrupt had been
        // lost (seen once, cause not proved). With a periodic timer it was not seen again.
        let append = format!(
            "console=ttyS0 loglevel=4 panic=-1 mitigations=off tsc=reliable \
             highres=off nohz=off modules={modules}"
        );
        command.args(["-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "EPYC,-xsave"]);
        command.args(["-smp", "1", "-m", &format!("{}M", self.memory_mib), "-no-reboot"]);
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-vga", "none"]);
        command.arg("-kernel").arg(image("vmlinux")).arg("-initrd").arg(initramfs);
        command.args(["-append", &append]);
        for file in [console, results] {
            command.arg("-serial").arg(format!("file:{}", file.display()));
        }
        command
    }
}
