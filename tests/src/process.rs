//! Processes: run to their end within a limit, with what they print.

use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::process::{pidfd_open, Pid, PidfdFlags};

use crate::PATIENCE;

/// Most bytes of a process' output that are kept; what comes first and goes beyond is dropped.
const KEPT: usize = 1 << 20;

/// What `minivmm receive` writes to standard error before its address.
pub const LISTENING: &str = "listening on ";

/// A process that has ended.
pub struct Finished {
    /// Its command line.
    pub command: String,
    /// Exit code, unless a signal ended it.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// How it ended comes first, then what it said: of a failed test, often the first lines only are seen.
impl std::fmt::Debug for Finished {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { command, code, signal, stdout, stderr } = self;
        writeln!(f, "exit code {code:?}, signal {signal:?}: {command}")?;
        write!(f, "{}\n{}", stderr.trim_end(), stdout.trim_end())
    }
}

impl Finished {
    /// Fails unless the process ended with `code` and complained with all of `words` (any case).
    #[track_caller]
    pub fn refused(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code, Some(code), "{self:?}");
        let said = self.stderr.to_lowercase();
        assert!(said.starts_with("minivmm: "), "{self:?}");
        assert!(!said.contains("panicked"), "{self:?}");
        for word in words {
            assert!(said.contains(&word.to_lowercase()), "nothing about {word:?}: {self:?}");
        }
    }

    /// Fails unless the process ended with 0; gives its standard output.
    #[track_caller]
    pub fn ok(&self) -> &str {
        assert_eq!(self.code, Some(0), "{self:?}");
        &self.stdout
    }
}

/// What a thread collects from a pipe, until its end.
#[derive(Debug)]
pub struct Collected {
    bytes: Arc<Mutex<Vec<u8>>>,
    thread: Option<JoinHandle<()>>,
}

impl Collected {
    /// Collects from `pipe` on a thread of its own.
    pub fn from(mut pipe: impl Read + Send + 'static) -> Self {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let shared = Arc::clone(&bytes);
        let read = move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = pipe.read(&mut buffer) {
                let mut kept = shared.lock().unwrap_or_else(PoisonError::into_inner);
                kept.extend_from_slice(&buffer[..count]);
                let surplus = kept.len().saturating_sub(KEPT);
                kept.drain(..surplus);
            }
        };
        let thread = std::thread::Builder::new().name("collect".into()).spawn(read).unwrap();
        Self { bytes, thread: Some(thread) }
    }

    /// What came so far.
    pub fn so_far(&self) -> String {
        let bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The rest of the first complete line that has `mark` in it, after the mark.
    pub fn after(&self, mark: &str) -> Option<String> {
        let log = self.so_far();
        let lines = log.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
        let mut found = lines.filter_map(|line| Some(line.split_once(mark)?.1.to_owned()));
        found.next()
    }

    /// All of it. The process that writes has ended.
    pub fn all(&mut self) -> String {
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
        self.so_far()
    }
}

/// The last lines of a text.
fn last(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(10)..].join("\n")
}

/// Waits for the end of a process; `None` when it has not ended in time.
pub fn wait(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + limit;
    // Somebody may have looked before.
    if let Some(status) = child.try_wait().unwrap() {
        return Some(status);
    }
    let pid = Pid::from_child(child);
    // Not reaped yet, so that the id is still this process' own.
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).unwrap();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
        match poll(&mut fds, Some(&Timespec::try_from(left).unwrap())) {
            Ok(0) if left.is_zero() => return None,
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return Some(child.wait().unwrap()),
            Err(error) => panic!("waiting for process {}: {error}", child.id()),
        }
    }
}

/// `command` as one that is killed when the thread that starts it ends, however that comes about:
/// also when this process is killed. The standard streams are to be set on what this gives back.
#[must_use]
pub fn tied(command: &Command) -> Command {
    let mut tied = Command::new("setpriv");
    tied.args(["--pdeathsig", "KILL", "--"]).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => tied.env(name, value),
            None => tied.env_remove(name),
        };
    }
    tied
}

/// Runs a command to its end with `input` on its standard input.
///
/// # Panics
/// It does not end within [`PATIENCE`].
#[track_caller]
pub fn finish(mut command: Command, input: &[u8]) -> Finished {
    let text = format!("{command:?}");
    let mut child = command
        .stdin(if input.is_empty() { Stdio::null() } else { Stdio::piped() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("cannot start {text}: {error}"));
    let mut stdout = Collected::from(child.stdout.take().unwrap());
    let mut stderr = Collected::from(child.stderr.take().unwrap());
    if let Some(mut stdin) = child.stdin.take() {
        // A command that does not want its input is no error; what it does then is looked at.
        let _ = stdin.write_all(input);
    }
    let Some(status) = wait(&mut child, PATIENCE) else {
        let _ = child.kill();
        let _ = child.wait();
        panic!(
            "{text} did not end within {PATIENCE:?}; it printed:\n{}\n{}",
            last(&stdout.so_far()),
            last(&stderr.so_far())
        );
    };
    Finished {
        command: text,
        code: status.code(),
        signal: status.signal(),
        stdout: stdout.all(),
        stderr: stderr.all(),
    }
}

/// Resident memory of a VMM that is its guest's, bytes. Both minivmm and QEMU advise huge pages for it
/// (`hg` in VmFlags of proc(5), smaps), and for nothing else.
pub fn guest_resident(pid: u32) -> std::io::Result<u64> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let (mut resident, mut total) = (0, 0);
    for line in maps.lines() {
        if let Some(size) = line.strip_prefix("Rss:") {
            resident = size.trim().trim_end_matches(" kB").parse().unwrap_or(0);
        } else if line.starts_with("VmFlags:") && line.split_whitespace().any(|flag| flag == "hg") {
            total += resident;
        }
    }
    Ok(total << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tied_process_does_not_outlive_the_thread_that_started_it() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo $READY; exec sleep 600"]).env("READY", "ready");
        let start = move || {
            let mut child = tied(&command).stdout(Stdio::piped()).spawn().unwrap();
            let mut line = [0; 6];
            child.stdout.as_mut().unwrap().read_exact(&mut line).unwrap();
            assert_eq!(&line, b"ready\n");
            child
        };
        let mut child = std::thread::spawn(start).join().unwrap();
        let status = wait(&mut child, PATIENCE).expect("it is gone");
        assert_eq!(status.signal(), Some(9));
    }
}
