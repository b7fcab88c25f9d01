//! QEMU's migration by its monitor.

use std::time::{Duration, Instant};

use ::tests::bench::{Guest, Qmp, Result, Setup, Tools};
use serde_json::{json, Value};

use crate::qemu_faults::FaultTrace;
use crate::sample;
use crate::subject::{Incoming, Moved, Subject, Told};

/// The pause that it may make, ms. Less than its default of 300 and what it mostly keeps to.
pub const DOWNTIME_LIMIT_MS: u64 = 30;
/// Bytes per second; far beyond what can be.
const UNLIMITED: u64 = 100 << 30;

/// Longest wait for its figures.
const TELLS: Duration = Duration::from_secs(5);

/// Boots beacon, ready to be migrated.
pub fn boot(tools: &Tools, subject: Subject, name: &str, setup: &Setup) -> Result<Guest> {
    let mut guest = tools.qemu_movable(name, setup, false, &[])?;
    prepare(guest.qmp()?, subject)?;
    Ok(guest)
}

/// A QEMU that listens.
pub fn receive(tools: &Tools, subject: Subject, name: &str, setup: &Setup) -> Result<Incoming> {
    let faults = subject.is_postcopy().then(|| FaultTrace::new(&tools.data)).transpose()?;
    let trace = faults.as_ref().map(FaultTrace::arguments).unwrap_or_default();
    let mut guest = tools.qemu_movable(name, setup, true, &trace)?;
    let qmp = guest.qmp()?;
    prepare(qmp, subject)?;
    qmp.command("migrate-incoming", json!({ "uri": "tcp:127.0.0.1:0" }))?;
    let state = qmp.command("query-migrate", json!({}))?;
    let address = &state["socket-address"][0];
    match (address["host"].as_str(), address["port"].as_str()) {
        (Some(host), Some(port)) => {
            Ok(Incoming { address: format!("{host}:{port}"), guest, faults })
        }
        _ => Err(format!("QEMU does not say where it listens: {state}").into()),
    }
}

/// Both sides need the same.
fn prepare(qmp: &mut Qmp, subject: Subject) -> Result<()> {
    let mut capabilities = vec![json!({ "capability": "events", "state": true })];
    let mut parameters = json!({
        "max-bandwidth": UNLIMITED,
        "downtime-limit": DOWNTIME_LIMIT_MS,
    });
    if let Subject::Qemu { multifd: Some(channels) } = subject {
        capabilities.push(json!({ "capability": "multifd", "state": true }));
        parameters["multifd-channels"] = json!(channels);
    }
    if let Subject::QemuPostcopy { preempt } = subject {
        capabilities.push(json!({ "capability": "postcopy-ram", "state": true }));
        capabilities.push(json!({ "capability": "postcopy-preempt", "state": preempt }));
    }
    qmp.command("migrate-set-capabilities", json!({ "capabilities": capabilities }))?;
    qmp.command("migrate-set-parameters", parameters)?;
    Ok(())
}

/// Migrates, until QEMU says that it is done; with post-copy, which begins at once.
pub fn migrate(source: &mut Guest, to: &str, postcopy: bool) -> Result<Moved> {
    let qmp = source.qmp()?;
    let begin = Instant::now();
    qmp.command("migrate", json!({ "uri": format!("tcp:{to}") }))?;
    if postcopy {
        qmp.event("begin of the migration", |event| {
            event["event"] == "MIGRATION" && event["data"]["status"] == "active"
        })?;
        qmp.command("migrate-start-postcopy", json!({}))?;
    }
    ended(qmp)?;
    let outside = begin.elapsed();
    let told = told(qmp, postcopy)?;
    Ok(Moved { outside, told })
}

/// QEMU's own figures. It works them out after the event.
fn told(qmp: &mut Qmp, postcopy: bool) -> Result<Told> {
    let begin = Instant::now();
    loop {
        let all = qmp.command("query-migrate", json!({}))?;
        if all["total-time"].as_u64().is_some_and(|ms| ms > 0) {
            return Ok(understand(all, postcopy));
        }
        if begin.elapsed() > TELLS {
            return Err(format!("QEMU does not say how long it took: {all}").into());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Waits until a destination knows that it has the guest.
pub fn has_arrived(destination: &mut Guest) -> Result<()> {
    ended(destination.qmp()?)
}

/// A failure is an error of [`Qmp::event`].
fn ended(qmp: &mut Qmp) -> Result<()> {
    qmp.event("end of the migration", |event| {
        event["event"] == "MIGRATION" && event["data"]["status"] == "completed"
    })?;
    Ok(())
}

fn understand(all: Value, postcopy: bool) -> Told {
    let ram = &all["ram"];
    let requests = ram["postcopy-requests"].as_f64().filter(|_| postcopy);
    Told {
        total_ms: all["total-time"].as_f64(),
        downtime_ms: all["downtime"].as_f64(),
        bytes: ram["transferred"].as_f64(),
        rounds: ram["dirty-sync-count"].as_f64(),
        first_pass: None,
        figures: requests.map(|number| (sample::FAULTS, number)).into_iter().collect(),
        all,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_answer_is_understood() {
        let ram = json!({ "transferred": 4096, "dirty-sync-count": 3, "postcopy-requests": 7 });
        let told = understand(json!({ "total-time": 120, "downtime": 4, "ram": ram }), true);
        assert_eq!(told.total_ms, Some(120.0));
        assert_eq!(told.downtime_ms, Some(4.0));
        assert_eq!(told.bytes, Some(4096.0));
        assert_eq!(told.rounds, Some(3.0));
        assert_eq!(told.figures.iter().map(|(_, number)| *number).collect::<Vec<_>>(), [7.0]);
    }
}
