//! A part of the soak in a process of its own.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{channel, RecvTimeoutError};
use std::time::Duration;

use crate::event::Event;

/// How long a part may say nothing. Whatever it waits for has a limit of its own, which is shorter.
const SILENCE: Duration = Duration::from_secs(600);

/// What is to be run.
#[derive(Debug)]
pub struct Part {
    /// Name of its log.
    pub name: String,
    /// Arguments of this program.
    pub args: Vec<String>,
}

/// A part that failed.
#[derive(Debug)]
pub struct Failure {
    /// Name of the part.
    pub name: String,
    /// Why, in a line or two.
    pub why: String,
    /// All that it said.
    pub log: PathBuf,
}

impl Part {
    /// Runs it to its end, and gives its events to `hear` as they come. Its log is kept in the
    /// folder `logs` if it fails.
    pub fn run(&self, logs: &Path, hear: impl FnMut(Event)) -> Result<(), Failure> {
        let log = logs.join(format!("{}.log", self.name));
        self.watch(&log, hear).map_err(|why| Failure { name: self.name.clone(), why, log })
    }

    fn watch(&self, log: &Path, mut hear: impl FnMut(Event)) -> Result<(), String> {
        let text = |what: &str, error: std::io::Error| format!("{what}: {error}");
        let file = File::create(log).map_err(|error| text("no log", error))?;
        let me = std::env::current_exe().map_err(|error| text("no program", error))?;
        let mut command = Command::new(me);
        command.args(&self.args);
        let mut child = ::tests::tied(&command)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(file)
            .spawn()
            .map_err(|error| text("not started", error))?;
        let output = BufReader::new(child.stdout.take().expect("it is piped"));
        let (sender, lines) = channel();
        std::thread::spawn(move || output.lines().try_for_each(|line| sender.send(line)));
        loop {
            match lines.recv_timeout(SILENCE) {
                Ok(Ok(line)) => match serde_json::from_str(&line) {
                    Ok(event) => hear(event),
                    Err(error) => eprintln!("{}: {line:?} is no event: {error}", self.name),
                },
                Ok(Err(error)) => eprintln!("{}: its output cannot be read: {error}", self.name),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    let _ = child.kill();
                    let _ = child.wait();
                    return Err(format!("killed: silent for {} s", SILENCE.as_secs()));
                }
            }
        }
        let Some(status) = ::tests::wait(&mut child, SILENCE) else {
            let _ = child.kill();
            let _ = child.wait();
            return Err("killed: it had nothing more to say and did not end".to_owned());
        };
        if status.success() {
            let _ = fs::remove_file(log);
            return Ok(());
        }
        let said = fs::read_to_string(log).unwrap_or_default();
        Err(format!("{status}: {}", first_panic(&said)))
    }
}

/// The first panic of a log, and what it says.
fn first_panic(log: &str) -> String {
    let mut lines = log.lines().skip_while(|line| !line.contains("panicked at"));
    match (lines.next(), lines.next()) {
        (Some(place), Some(what)) => {
            let place = place.split_once("panicked at ").map_or(place, |(_, place)| place);
            let what: String = what.chars().take(300).collect();
            format!("{place} {what}")
        }
        _ => "no panic".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_panic_is_found() {
        let log = "step 1\nthread 'x' panicked at a.rs:1:2:\nit broke\nthread 'y' panicked at b";
        assert_eq!(first_panic(log), "a.rs:1:2: it broke");
        assert_eq!(first_panic("step 1\n"), "no panic");
    }
}
