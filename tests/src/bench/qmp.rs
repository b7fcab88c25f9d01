//! QEMU's machine protocol (QEMU, docs/interop/qmp-spec.txt), as far as benchmarks need it.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant, UNIX_EPOCH};

use serde_json::{json, Value};

use super::{Result, LIMIT};

/// A connection to QEMU's monitor.
pub struct Qmp {
    input: Box<dyn Write + Send>,
    messages: Receiver<Value>,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Leaves negotiation mode. QEMU answers when it is as far; nothing is waited for here.
    pub fn new(
        input: impl Write + Send + 'static,
        output: impl Read + Send + 'static,
    ) -> Result<Self> {
        let mut input: Box<dyn Write + Send> = Box::new(input);
        let (sender, messages) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(|line| line.ok()) {
                let message = serde_json::from_str(&line).unwrap_or_default();
                if sender.send(message).is_err() {
                    return;
                }
            }
        });
        writeln!(input, "{}", json!({ "execute": "qmp_capabilities", "id": 0 }))?;
        Ok(Self { input, messages, events: VecDeque::new() })
    }

    fn next(&mut self, deadline: Instant) -> Result<Value> {
        let left = deadline.saturating_duration_since(Instant::now());
        let message = self.messages.recv_timeout(left);
        Ok(message.map_err(|error| format!("QEMU's monitor says nothing: {error}"))?)
    }

    /// Carries out a command and waits for its answer.
    pub fn command(&mut self, name: &str, arguments: Value) -> Result<Value> {
        let deadline = Instant::now() + LIMIT;
        let command = json!({ "execute": name, "arguments": arguments, "id": 1 });
        writeln!(self.input, "{command}")?;
        loop {
            let message = self.next(deadline)?;
            if message.get("event").is_some() {
                self.events.push_back(message);
            } else if message["id"] == 1 {
                if message.get("error").is_some() {
                    return Err(format!("QEMU: {name}: {}", message["error"]["desc"]).into());
                }
                return Ok(message["return"].clone());
            }
        }
    }

    /// Waits for an event that `wanted` takes; those before it are dropped.
    pub fn event(&mut self, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        let deadline = Instant::now() + LIMIT;
        loop {
            let message = match self.events.pop_front() {
                Some(event) => event,
                None => self.next(deadline).map_err(|error| format!("no {what}: {error}"))?,
            };
            if message["event"] == "MIGRATION" && message["data"]["status"] == "failed" {
                return Err("QEMU: the migration failed".into());
            }
            if message.get("event").is_some() && wanted(&message) {
                return Ok(message);
            }
        }
    }

    /// Writes the VM to a file with as much bandwidth as there is, and waits until QEMU is done.
    pub fn migrate_to(&mut self, file: &str) -> Result<()> {
        self.command("migrate", json!({ "uri": format!("exec:cat > '{file}'") }))?;
        self.event("end of the migration", |event| event["data"]["status"] == "completed")?;
        Ok(())
    }

    /// Settings for [`Qmp::migrate_to`].
    pub fn prepare_migration(&mut self) -> Result<()> {
        let capability = json!([{ "capability": "events", "state": true }]);
        self.command("migrate-set-capabilities", json!({ "capabilities": capability }))?;
        // Bytes per second; far beyond what can be.
        let unlimited = 100_u64 << 30;
        self.command("migrate-set-parameters", json!({ "max-bandwidth": unlimited }))?;
        Ok(())
    }
}

impl std::fmt::Debug for Qmp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Qmp").field("events", &self.events).finish_non_exhaustive()
    }
}

/// When an event was, since 1970.
pub fn time_of(event: &Value) -> Result<Duration> {
    let part = |name| event["timestamp"][name].as_u64().ok_or("an event without time");
    Ok(Duration::from_secs(part("seconds")?) + Duration::from_micros(part("microseconds")?))
}

/// From `start` to `end`, which is since 1970.
pub fn wall_ms(start: std::time::SystemTime, end: Duration) -> Result<f64> {
    let start = start.duration_since(UNIX_EPOCH)?;
    let passed = end.checked_sub(start).ok_or("an event before its cause: the clock was set")?;
    Ok(passed.as_secs_f64() * 1e3)
}
