//! Who runs and moves the guest.

use std::sync::Arc;
use std::time::Instant;

use ::tests::bench::{Guest, Qmp, Result, Setup, Tools, Wiring};
use ::tests::network::{ip, GUEST_ADDRESS};
use ::tests::topology::{Site, MAC};
use serde_json::{json, Value};

use crate::stood::{stood, Moment};

/// Memory of the guest, MiB.
const MEMORY_MIB: u64 = 256;
/// The pauses that they may make; of QEMU's, what it mostly keeps to is less.
const DOWNTIME: &str = "20ms";
const QEMU_DOWNTIME_MS: u64 = 30;
/// Bytes per second; far beyond what can be.
const UNLIMITED: u64 = 100 << 30;
/// QEMU's tap.
const TAP: &str = "qtap0";

/// A VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    /// This project.
    Minivmm,
    /// QEMU microvm.
    Qemu,
}

/// How memory follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Before the switch.
    Precopy,
    /// After it.
    Postcopy,
}

/// How a guest moves.
#[derive(Debug, Clone, Copy)]
pub struct How {
    /// How its memory follows.
    pub mode: Mode,
    /// At most so many MiB of it per second.
    pub bandwidth: Option<u64>,
    /// Memory goes over a wire of its own.
    pub own_wire: bool,
}

impl How {
    /// Where a host is reached by memory.
    fn address(self, to: &Site) -> String {
        if self.own_wire {
            to.wire_address()
        } else {
            to.address()
        }
    }
}

/// A guest that runs, and what it runs in.
pub struct Running {
    tools: Arc<Tools>,
    subject: Subject,
    how: How,
    options: String,
    /// The guest.
    pub guest: Guest,
}

/// A migration that is over.
pub struct Moved {
    /// When the order was given.
    pub order: Instant,
    /// From when until when the guest stood, if that can be told by this host's clock.
    pub stood: Option<(Instant, Instant)>,
    /// How long the guest stood, by its own clock, ms.
    pub gap_ms: f64,
    /// What the VMM reports of it.
    pub report: Value,
}

/// Does `work` in the network of `site`.
fn at<R: Send + 'static>(
    site: &Site,
    work: impl FnOnce() -> Result<R> + Send + 'static,
) -> Result<R> {
    // Errors as text, since they come from another thread.
    Ok(site.place.on(move || work().map_err(|error| error.to_string()))?)
}

impl Subject {
    /// Boots the guest at `site`, on the network `blue` there.
    pub fn boot(self, tools: &Arc<Tools>, site: &Site, how: How, options: &str) -> Result<Running> {
        let options = format!("virtio=irq ip={GUEST_ADDRESS} report=0 fpu=sse {options}");
        let mut guest = match self {
            Self::Minivmm => {
                let (memory, card) =
                    (format!("{MEMORY_MIB}M"), format!("id=net,network=blue,mac={MAC}"));
                let args = [
                    "run",
                    "--name",
                    "vm",
                    "--memory",
                    &memory,
                    "--cmdline",
                    &options,
                    "--net",
                    &card,
                ];
                let command = site.host.command(&args);
                at(site, move || Guest::start(command, Wiring::Console))?
            }
            Self::Qemu => qemu(tools, site, how, &options, false)?,
        };
        guest.event("ready")?;
        Ok(Running { tools: Arc::clone(tools), subject: self, how, options, guest })
    }
}

/// Boots beacon in QEMU at `site`, or has QEMU wait for it.
fn qemu(tools: &Arc<Tools>, site: &Site, how: How, options: &str, incoming: bool) -> Result<Guest> {
    let setup = Setup {
        memory_mib: MEMORY_MIB,
        cpus: 1,
        cmdline: options.to_owned(),
        tap: Some(TAP),
        // C knows the guest by it.
        mac: Some(MAC),
        ..Setup::default()
    };
    let (tools, name) = (Arc::clone(tools), format!("{}{incoming}", site.number()));
    at(site, move || {
        // Left by the one before, if it is there.
        let _ = ip(&["link", "delete", TAP]);
        ip(&["tuntap", "add", "dev", TAP, "mode", "tap", "vnet_hdr"])?;
        ip(&["link", "set", TAP, "master", "mv-blue", "up"])?;
        let mut guest = tools.qemu_movable(&name, &setup, incoming, &[])?;
        let qmp = guest.qmp()?;
        let mut capabilities = vec![json!({ "capability": "events", "state": true })];
        if how.mode == Mode::Postcopy {
            capabilities.push(json!({ "capability": "postcopy-ram", "state": true }));
        }
        qmp.command("migrate-set-capabilities", json!({ "capabilities": capabilities }))?;
        let bandwidth = how.bandwidth.map_or(UNLIMITED, |mib| mib << 20);
        let limits = json!({ "max-bandwidth": bandwidth, "downtime-limit": QEMU_DOWNTIME_MS });
        qmp.command("migrate-set-parameters", limits)?;
        Ok(guest)
    })
}

fn completed(qmp: &mut Qmp) -> Result<()> {
    qmp.event("end of the migration", |event| {
        event["event"] == "MIGRATION" && event["data"]["status"] == "completed"
    })?;
    Ok(())
}

impl Running {
    /// Moves the guest from one host to the other, until its source has let go of it.
    pub fn migrate(&mut self, from: &Site, to: &Site) -> Result<Moved> {
        let begin = Moment::now();
        let (order, report) = match self.subject {
            Subject::Minivmm => self.migrate_minivmm(from, to)?,
            Subject::Qemu => self.migrate_qemu(to)?,
        };
        let switch = self.guest.event("switch")?.event;
        let stood = stood(&switch, begin, Moment::now());
        let gap = switch["gap_us"].as_f64().ok_or("the guest does not say how long it stood")?;
        Ok(Moved { order, stood, gap_ms: gap / 1e3, report })
    }

    fn migrate_minivmm(&mut self, from: &Site, to: &Site) -> Result<(Instant, Value)> {
        const LISTENS: &str = "listening on ";
        let listen = format!("{}:0", self.how.address(to));
        let command =
            to.host.command(&["receive", "--listen", &listen, "--once", "--console", "stdio"]);
        let (next, line) = at(to, move || {
            let mut guest = Guest::start(command, Wiring::Heard)?;
            let line = guest.hear(LISTENS)?;
            Ok((guest, line))
        })?;
        let address = line.split_once(LISTENS).map_or("", |(_, address)| address.trim());
        let mode = if self.how.mode == Mode::Precopy { "precopy" } else { "postcopy" };
        let args =
            ["migrate", "vm", "--to", address, "--mode", mode, "--downtime", DOWNTIME, "--json"];
        let mut command = from.host.command(&args);
        if let Some(mib) = self.how.bandwidth {
            command.args(["--bandwidth", &format!("{mib}M")]);
        }
        let (order, output) = at(from, move || Ok((Instant::now(), command.output()?)))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            return Err(format!("minivmm migrate: {said}").into());
        }
        let report = serde_json::from_slice(&output.stdout)?;
        std::mem::replace(&mut self.guest, next).wait_for_end()?;
        Ok((order, report))
    }

    fn migrate_qemu(&mut self, to: &Site) -> Result<(Instant, Value)> {
        let mut next = qemu(&self.tools, to, self.how, &self.options, true)?;
        let qmp = next.qmp()?;
        qmp.command(
            "migrate-incoming",
            json!({ "uri": format!("tcp:{}:0", self.how.address(to)) }),
        )?;
        let state = qmp.command("query-migrate", json!({}))?;
        let listens = &state["socket-address"][0];
        let port = listens["port"].as_str().ok_or("QEMU does not say where it listens")?;
        let uri = format!("tcp:{}:{port}", self.how.address(to));
        let qmp = self.guest.qmp()?;
        let order = Instant::now();
        qmp.command("migrate", json!({ "uri": uri }))?;
        if self.how.mode == Mode::Postcopy {
            qmp.event("begin of the migration", |event| {
                event["event"] == "MIGRATION" && event["data"]["status"] == "active"
            })?;
            qmp.command("migrate-start-postcopy", json!({}))?;
        }
        completed(qmp)?;
        completed(next.qmp()?)?;
        let report = qmp_report(&mut self.guest)?;
        std::mem::replace(&mut self.guest, next).end()?;
        Ok((order, report))
    }
}

fn qmp_report(guest: &mut Guest) -> Result<Value> {
    guest.qmp()?.command("query-migrate", json!({}))
}
