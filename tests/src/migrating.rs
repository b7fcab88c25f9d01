//! A `minivmm migrate` that is under way.

use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Stdio};
use std::time::Instant;

use crate::host::Host;
use crate::process::{wait, Finished};
use crate::PATIENCE;

/// Asks for a migration of the VM `vm`, and waits for its end elsewhere. Ended when dropped.
#[derive(Debug)]
pub struct Migrating(Child);

impl Migrating {
    /// Begins to migrate the VM of `host` to `to`.
    #[track_caller]
    pub fn start(host: &Host, to: &str, args: &[&str]) -> Self {
        let mut command = host.command(&[&["migrate", "vm", "--to", to], args].concat());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Self(command.spawn().unwrap())
    }

    /// As [`Migrating::start`], so slow that it is under way until something is done about it: pages are on their way.
    #[track_caller]
    pub fn slowly(host: &Host, to: &str, args: &[&str]) -> Self {
        let slow = Self::start(host, to, &[&["--bandwidth", "64K"], args].concat());
        let deadline = Instant::now() + PATIENCE;
        loop {
            let current = &host.json(&["migration", "vm"])["current"];
            if current["phase"] == "copying" && current["progress"]["bytes"].as_u64() > Some(0) {
                return slow;
            }
            assert!(Instant::now() < deadline, "{current}");
            std::thread::yield_now();
        }
    }

    /// Whether it has ended.
    pub fn is_over(&mut self) -> bool {
        self.0.try_wait().unwrap().is_some()
    }

    /// What `minivmm migrate` said in the end.
    ///
    /// # Panics
    /// It does not end within [`PATIENCE`].
    #[track_caller]
    pub fn end(mut self) -> Finished {
        let status = wait(&mut self.0, PATIENCE).expect("minivmm migrate does not end");
        let text = |pipe: &mut dyn Read| {
            let mut text = String::new();
            pipe.read_to_string(&mut text).unwrap();
            text
        };
        Finished {
            command: "migrate".into(),
            stdout: text(self.0.stdout.as_mut().unwrap()),
            stderr: text(self.0.stderr.as_mut().unwrap()),
            code: status.code(),
            signal: status.signal(),
        }
    }
}

impl Drop for Migrating {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
