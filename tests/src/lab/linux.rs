//! A real Linux guest in a `minivmm` process, with the shell of the Linux image on its console.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{channel, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use crate::process::{guest_resident, wait, Collected, Finished, LISTENING};

/// How long anything may take: in the lab, a kernel boots ten times as slowly as elsewhere.
const PATIENCE: Duration = Duration::from_secs(180);
/// Lines of the console shown when a test fails.
const SHOWN: usize = 80;

/// A running `minivmm run`, `restore` or `receive` whose guest is the Linux image. Killed when dropped.
#[derive(Debug)]
pub struct Linux {
    child: Child,
    command: String,
    input: Option<ChildStdin>,
    lines: Receiver<String>,
    seen: VecDeque<String>,
    stderr: Collected,
}

impl Linux {
    /// Starts `command`.
    #[track_caller]
    pub fn start(mut command: Command) -> Self {
        let text = format!("{command:?}");
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {text}: {error}"));
        let lines = lines_of(child.stdout.take().unwrap());
        let stderr = Collected::from(child.stderr.take().unwrap());
        let input = child.stdin.take();
        Self { child, command: text, input, lines, seen: VecDeque::new(), stderr }
    }

    /// Waits until it listens for VMs, and tells where.
    #[track_caller]
    pub fn listens_at(&self) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(address) = self.stderr.after(LISTENING) {
                return address;
            }
            assert!(Instant::now() < deadline, "it does not listen: {}", self.stderr.so_far());
            std::thread::yield_now();
        }
    }

    /// What the process has written to standard error so far, at most the last MiB.
    #[must_use]
    pub fn stderr(&self) -> String {
        self.stderr.so_far()
    }

    /// Guest memory that the host has in use, bytes.
    #[must_use]
    pub fn resident(&self) -> u64 {
        guest_resident(self.child.id()).unwrap()
    }

    /// Waits until the guest's `init` takes commands.
    #[track_caller]
    pub fn ready(mut self) -> Self {
        self.wait_ready();
        self
    }

    /// As [`Linux::ready`], after a reboot.
    #[track_caller]
    pub fn wait_ready(&mut self) {
        self.until("= ready");
    }

    /// Types a line and does not wait for what it does.
    #[track_caller]
    pub fn send(&mut self, line: &str) {
        let input = self.input.as_mut().unwrap();
        input.write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    /// Has the guest's shell run a line; gives its exit status and what it printed.
    #[track_caller]
    pub fn try_sh(&mut self, line: &str) -> (i32, String) {
        self.send(line);
        self.answer(line)
    }

    /// The answer to the line that was typed last: exit status, and what was printed.
    #[track_caller]
    pub fn answer(&mut self, line: &str) -> (i32, String) {
        let mut output = String::new();
        loop {
            let answer = self.line(Instant::now() + PATIENCE, line);
            if let Some(status) = answer.strip_prefix("= ").and_then(|s| s.parse().ok()) {
                return (status, output.trim_end().to_owned());
            }
            output += &answer;
            output.push('\n');
        }
    }

    /// As [`Linux::try_sh`], with the exit status 0.
    #[track_caller]
    pub fn sh(&mut self, line: &str) -> String {
        let (status, output) = self.try_sh(line);
        assert_eq!(status, 0, "{line}: {output}");
        output
    }

    /// A number that a line prints.
    #[track_caller]
    pub fn number(&mut self, line: &str) -> u64 {
        let text = self.sh(line);
        text.parse().unwrap_or_else(|_| panic!("{line}: not a number: {text}"))
    }

    /// Waits for a line of exactly `wanted`.
    #[track_caller]
    fn until(&mut self, wanted: &str) {
        let deadline = Instant::now() + PATIENCE;
        while self.line(deadline, wanted) != wanted {}
    }

    #[track_caller]
    fn line(&mut self, deadline: Instant, wanted: &str) -> String {
        let left = deadline.saturating_duration_since(Instant::now());
        let line = match self.lines.recv_timeout(left) {
            Ok(line) => line,
            Err(error) => {
                let why = match error {
                    RecvTimeoutError::Timeout => format!("no answer within {PATIENCE:?}"),
                    RecvTimeoutError::Disconnected => "the console ended".to_owned(),
                };
                panic!("{why} while waiting for {wanted:?}");
            }
        };
        if self.seen.len() == SHOWN {
            self.seen.pop_front();
        }
        self.seen.push_back(line.clone());
        line
    }

    /// Waits for the end of the process. `stdout` has the last lines of the console.
    ///
    /// # Panics
    /// It does not come within [`PATIENCE`].
    #[track_caller]
    pub fn end(&mut self) -> Finished {
        let Some(status) = wait(&mut self.child, PATIENCE) else {
            panic!("{} did not end:\n{}", self.command, self.stderr.so_far());
        };
        Finished {
            command: self.command.clone(),
            code: status.code(),
            signal: status.signal(),
            stdout: self.log(),
            stderr: self.stderr.all(),
        }
    }

    /// Waits for the end, which is one with exit code 0.
    #[track_caller]
    pub fn ends_well(&mut self) -> Finished {
        let finished = self.end();
        assert_eq!(finished.code, Some(0), "{finished:#?}");
        finished
    }

    fn log(&mut self) -> String {
        self.seen.extend(self.lines.try_iter());
        let skip = self.seen.len().saturating_sub(SHOWN);
        self.seen.iter().skip(skip).map(|line| format!("  {line}\n")).collect()
    }
}

impl Drop for Linux {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let stderr = self.stderr.all();
            let log = self.log();
            eprintln!("{}\n{log}{stderr}", self.command);
        }
    }
}

/// The lines of a console, without their ends, read on a thread of its own. What follows the last
/// newline comes as a line at the end.
fn lines_of(mut output: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, lines) = channel();
    let read = move || {
        let mut line = Vec::new();
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = output.read(&mut buffer) {
            for byte in &buffer[..count] {
                match byte {
                    b'\n' => {
                        let text = String::from_utf8_lossy(&line).into_owned();
                        line.clear();
                        if sender.send(text).is_err() {
                            return;
                        }
                    }
                    b'\r' => {}
                    byte => line.push(*byte),
                }
            }
        }
        if !line.is_empty() {
            let _ = sender.send(String::from_utf8_lossy(&line).into_owned());
        }
    };
    std::thread::Builder::new().name("console".into()).spawn(read).unwrap();
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Linux {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Linux::start(command)
    }

    const ANSWERS: &str = "printf '[ 0.1] booting\\r\\n= ready\\n'
        while read -r line; do eval \"$line\"; echo \"= $?\"; done";

    #[test]
    fn a_line_gives_its_output_and_status() {
        let mut guest = shell(ANSWERS).ready();
        assert_eq!(guest.sh("echo one; echo two"), "one\ntwo");
        assert_eq!(guest.try_sh("echo bad; (exit 3)"), (3, "bad".to_owned()));
        assert_eq!(guest.number("echo 42"), 42);
        guest.send("exit 0");
        guest.ends_well();
    }

    #[test]
    #[should_panic(expected = "the console ended")]
    fn a_guest_that_dies_is_noticed() {
        shell("echo '= ready'; read -r line").ready().sh("true");
    }
}
