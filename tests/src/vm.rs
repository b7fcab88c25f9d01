//! A VM in a process of its own, with its console on pipes.

use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Instant;

use serde_json::Value;

use crate::beacon::{goes_on, number, Console};
use crate::process::{tied, wait, Collected, Finished, LISTENING};
use crate::PATIENCE;

/// A running `minivmm run` or `minivmm restore`. Killed when dropped, and when the thread that started it ends.
#[derive(Debug)]
pub struct Vm {
    child: Child,
    command: String,
    input: Option<ChildStdin>,
    /// The guest's events.
    pub console: Console,
    stderr: Collected,
}

impl Vm {
    /// Starts `command`.
    #[track_caller]
    pub fn start(command: Command) -> Self {
        Self::start_within(command, "")
    }

    /// Starts `command`, whose console continues after `head`, the beginning of a line.
    #[track_caller]
    pub fn start_within(command: Command, head: &str) -> Self {
        let text = format!("{command:?}");
        let mut child = tied(&command)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {text}: {error}"));
        let console = Console::new(child.stdout.take().unwrap(), head);
        let stderr = Collected::from(child.stderr.take().unwrap());
        let input = child.stdin.take();
        Self { child, command: text, input, console, stderr }
    }

    /// The process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until the guest has begun its work.
    #[track_caller]
    pub fn ready(mut self) -> Self {
        self.console.event("ready");
        self
    }

    /// Types a command into the guest's console.
    #[track_caller]
    pub fn send(&mut self, line: &str) {
        let input = self.input.as_mut().unwrap();
        input.write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    /// Types `command` and waits for the event `answer`.
    #[track_caller]
    pub fn ask(&mut self, command: &str, answer: &str) -> Value {
        self.send(command);
        self.console.event(answer)
    }

    /// Asks for a report and waits for it. It is the first one that covers all that was typed
    /// and seen before.
    #[track_caller]
    pub fn report(&mut self) -> Value {
        // Reports that the guest makes by itself may be on their way.
        self.ask("echo now", "echo");
        self.ask("report", "report")
    }

    /// Asks for reports until `wanted` says yes to the numbers of one.
    #[track_caller]
    pub fn report_with(
        &mut self,
        what: &str,
        wanted: impl Fn(&dyn Fn(&str) -> u64) -> bool,
    ) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let report = self.report();
            if wanted(&|name| number(&report, name)) {
                return report;
            }
            assert!(Instant::now() < deadline, "no report with {what}: {report}");
        }
    }

    /// Lets the guest read all of its memory: no page is wrong.
    #[track_caller]
    pub fn verify(&mut self) -> Value {
        let verified = self.ask("verify", "verified");
        assert_eq!(verified["errors"], 0, "{verified}");
        assert!(number(&verified, "pages") > 0, "{verified}");
        verified
    }

    /// Waits until the guest has gone on since `before` in everything that it counts.
    #[track_caller]
    pub fn goes_on_after(&mut self, before: &Value) -> Value {
        self.goes_on_after_pauses(number(before, "switches"), before)
    }

    /// Waits until the guest has noticed so many pauses in all, and has gone on since `before`.
    #[track_caller]
    pub fn goes_on_after_pauses(&mut self, pauses: u64, before: &Value) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let report = self.report();
            let seen = number(&report, "switches");
            assert!(seen <= pauses, "{pauses} pauses: {report}");
            if seen == pauses && goes_on(before, &report) {
                return report;
            }
            assert!(Instant::now() < deadline, "{before}, then {report}");
        }
    }

    /// The guest goes on, and all that it ever wrote is right.
    #[track_caller]
    pub fn runs_on(&mut self) {
        let before = self.report();
        self.goes_on_after(&before);
        self.verify();
    }

    /// Where it listens for VMs.
    #[track_caller]
    pub fn listens_at(&self) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(address) = self.stderr.after(LISTENING) {
                return address;
            }
            assert!(Instant::now() < deadline, "it does not listen: {}", self.log());
            std::thread::yield_now();
        }
    }

    /// What it wrote to standard error so far.
    #[must_use]
    pub fn log(&self) -> String {
        self.stderr.so_far()
    }

    /// Closes the guest's console input.
    pub fn close_input(&mut self) {
        self.input = None;
    }

    /// Ends the process with SIGKILL and waits for that.
    #[track_caller]
    pub fn kill_9(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        // What the guest said until then counts.
        self.console.to_end();
    }

    /// Asks the process to end, with SIGTERM.
    #[track_caller]
    pub fn terminate(&self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    }

    /// Whether the process has not ended.
    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits for the end. `stdout` has what came after the last newline.
    ///
    /// # Panics
    /// It does not come within [`PATIENCE`].
    #[track_caller]
    pub fn end(&mut self) -> Finished {
        let stdout = self.console.to_end();
        let Some(status) = wait(&mut self.child, PATIENCE) else {
            panic!("{} did not end:\n{}", self.command, self.log());
        };
        Finished {
            command: self.command.clone(),
            code: status.code(),
            signal: status.signal(),
            stdout,
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
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let stderr = self.stderr.all();
            eprintln!("{}\n{stderr}", self.command);
        }
    }
}
