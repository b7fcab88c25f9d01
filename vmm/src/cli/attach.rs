//! `minivmm console`: this terminal on the console of a VM.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::{on_resize, on_termination, CliError, Exit};
use crate::api::{Client, ConsoleSizeRequest};
use crate::config::ConsoleConfig;
use crate::console::{self, AttachEnd, StdinKind, REFUSAL};
use crate::control::VmInfo;

/// `client` reaches the VM that `info` is of.
pub(super) fn console(client: Client, info: &VmInfo) -> Result<Exit, CliError> {
    let name = &info.name;
    let refused = |message: String| Err(CliError::text(Exit::Refused, message));
    let path = match (&info.config.console, &info.console_path) {
        (ConsoleConfig::Stdio, _) => {
            return refused(format!(
                "the console of {name} is standard input and output of its process {}: to attach \
                 to a VM, run it with --console socket or --console pty",
                info.pid
            ));
        }
        (ConsoleConfig::File(path), _) => {
            return refused(format!(
                "the console of {name} goes to the file {}: follow it with `tail -f`; to attach \
                 to a VM, run it with --console socket or --console pty",
                path.display()
            ));
        }
        (_, None) => return refused(format!("the console of {name} is not open yet: try again")),
        (_, Some(path)) => path,
    };
    let opened = match info.config.console {
        ConsoleConfig::Socket => open_socket(path),
        _ => open_pty(path),
    };
    let console = opened.map_err(|e| {
        let message = format!("cannot open the console of {name} at {}: {e}", path.display());
        CliError::text(Exit::Failed, message)
    })?;

    let interactive = console::stdin_kind() == StdinKind::Terminal;
    if interactive {
        eprintln!("minivmm: attached to the console of {name}; Ctrl-A x leaves");
        on_termination(|_| {
            console::restore();
            std::process::exit(Exit::Failed as i32);
        })?;
        console::set_raw()?;
        if info.config.virtio_console {
            on_resize(move |columns, rows| {
                // A console of the wrong size is no reason to leave it.
                let _ = client.command_with("console-size", &ConsoleSizeRequest { columns, rows });
            })?;
        }
    }
    let mut output = Output { to: io::stdout(), held: Some(Vec::new()) };
    let stdin = io::stdin();
    let result = console::attach(console.as_fd(), stdin.as_fd(), &mut output, interactive);
    console::restore();
    let refusal = output.finish()?;
    let end = result?;
    if let (AttachEnd::Closed, Some(refusal)) = (end, refusal) {
        let text = refusal.trim_end().trim_start_matches("minivmm: ");
        return refused(format!("{text}: let that one leave first"));
    }
    if interactive {
        match end {
            AttachEnd::Left => eprintln!("\nminivmm: left the console of {name}, which goes on"),
            AttachEnd::Closed => eprintln!("\nminivmm: the console of {name} was closed"),
        }
    }
    Ok(Exit::Ok)
}

fn open_socket(path: &Path) -> io::Result<OwnedFd> {
    let stream = UnixStream::connect(path)?;
    stream.set_nonblocking(true)?;
    Ok(stream.into())
}

fn open_pty(path: &Path) -> io::Result<OwnedFd> {
    let flags = libc::O_NOCTTY | libc::O_NONBLOCK;
    let file = File::options().read(true).write(true).custom_flags(flags).open(path)?;
    Ok(file.into())
}

/// Holds back output for as long as it may turn out to be a refusal.
struct Output<W> {
    to: W,
    held: Option<Vec<u8>>,
}

/// Longer than any refusal.
const MAX_REFUSAL: usize = REFUSAL.len() + 64;

impl<W: Write> Output<W> {
    /// The refusal, if that was all that came; else what was held back is written.
    fn finish(mut self) -> io::Result<Option<String>> {
        let held = self.held.take().unwrap_or_default();
        if held.starts_with(REFUSAL.as_bytes()) {
            return Ok(Some(String::from_utf8_lossy(&held).into_owned()));
        }
        self.to.write_all(&held)?;
        self.to.flush()?;
        Ok(None)
    }
}

impl<W: Write> Write for Output<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(held) = &mut self.held {
            held.extend_from_slice(bytes);
            let common = held.len().min(REFUSAL.len());
            let may_be = held[..common] == REFUSAL.as_bytes()[..common];
            if !may_be || held.len() > MAX_REFUSAL {
                let held = self.held.take().unwrap_or_default();
                self.to.write_all(&held)?;
            }
            return Ok(bytes.len());
        }
        self.to.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn pass(pieces: &[&str]) -> (String, Option<String>) {
        let mut to = Vec::new();
        let mut output = Output { to: &mut to, held: Some(Vec::new()) };
        for piece in pieces {
            output.write_all(piece.as_bytes()).unwrap();
        }
        let refusal = output.finish().unwrap();
        (String::from_utf8(to).unwrap(), refusal)
    }

    #[test]
    fn a_refusal_is_told_from_output() {
        let refusal = format!("{REFUSAL} by process 7\r\n");
        assert_eq!(pass(&[&refusal]), (String::new(), Some(refusal.clone())));
        assert_eq!(pass(&[&refusal[..5], &refusal[5..]]), (String::new(), Some(refusal.clone())));
        assert_eq!(pass(&["mini", "mal"]), ("minimal".into(), None));
        assert_eq!(pass(&["mini"]), ("mini".into(), None));
        assert_eq!(pass(&[]), (String::new(), None));
        let long = refusal + &"x".repeat(100);
        assert_eq!(pass(&[&long]), (long.clone(), None));
    }
}
