//! minivmm's command line and report; all that depends on them is here.

use std::time::{Duration, Instant};

use ::tests::bench::{Guest, Result, Tools, Wiring, LIMIT};
use serde_json::Value;

use crate::sample::{self, Quantity};
use crate::subject::{Incoming, Moved, Told};

/// The pause that it may make.
const DOWNTIME: &str = "20ms";

/// Why this minivmm cannot migrate, if it cannot.
pub fn lacks(tools: &Tools) -> Option<String> {
    for command in ["receive", "migrate"] {
        let known = tools.minivmm_command().args([command, "--help"]).output();
        if !known.is_ok_and(|output| output.status.success()) {
            return Some(format!("this minivmm has no command {command}"));
        }
    }
    None
}

/// `minivmm receive`, listening.
pub fn receive(tools: &Tools) -> Result<Incoming> {
    const LISTENS: &str = "listening on ";
    let mut command = tools.minivmm_command();
    command.args(["receive", "--listen", "127.0.0.1:0", "--once", "--console", "stdio"]);
    let mut guest = Guest::start(command, Wiring::Heard)?;
    let line = guest.hear(LISTENS)?;
    let address = line.split_once(LISTENS).and_then(|(_, rest)| rest.split_whitespace().next());
    let address = address.ok_or_else(|| format!("no address in {line:?}"))?;
    let address = address.trim_end_matches([',', '.']).to_owned();
    Ok(Incoming { address, guest, faults: None })
}

/// `minivmm migrate`, to its end: `mode` and its flags.
pub fn migrate(tools: &Tools, name: &str, to: &str, mode: &[&str]) -> Result<Moved> {
    let command = ["migrate", name, "--to", to, "--downtime", DOWNTIME, "--mode"];
    let begin = Instant::now();
    let values = tools.minivmm_json(&[&command[..], mode].concat())?;
    let outside = begin.elapsed();
    // Progress may come before it.
    let report = values.into_iter().rfind(|value| value["total_us"].is_number());
    Ok(Moved { outside, told: told(report.ok_or("minivmm migrate reports nothing")?) })
}

/// Waits until the guest's process has its name from the source, which is on this host and is over:
/// so that the guest can be migrated again.
pub fn has_name(tools: &Tools, name: &str, guest: &Guest) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let info = tools.minivmm_json(&["info", name]);
        let info = info.map(|values| values.into_iter().next().unwrap_or_default());
        match info {
            Ok(info) if info["pid"] == guest.pid() && info["status"] == "running" => return Ok(()),
            _ if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(10)),
            info => return Err(format!("{name} did not come to be here: {info:?}").into()),
        }
    }
}

fn told(report: Value) -> Told {
    let ms = |value: &Value| value.as_f64().map(|micros| micros / 1e3);
    let sum = |values: &Vec<Value>| values.iter().filter_map(Value::as_f64).sum();
    let first = &report["rounds"][0];
    let rate = |bytes: f64, micros: f64| bytes / micros * 1e6;
    let pause = sample::PAUSE.iter().filter_map(|part| {
        let name = part.key.strip_prefix("pause_")?.replace("_ms", "_us");
        Some((*part, ms(&report["pause"][name])?))
    });
    Told {
        total_ms: ms(&report["total_us"]),
        downtime_ms: ms(&report["pause"]["total_us"]),
        bytes: report["connection_bytes"].as_array().map(sum),
        rounds: report["rounds"].as_array().map(|rounds| rounds.len() as f64 + 1.0),
        first_pass: Option::zip(first["bytes"].as_f64(), first["duration_us"].as_f64())
            .filter(|(_, micros)| *micros > 0.0)
            .map(|(bytes, micros)| rate(bytes, micros)),
        figures: pause.chain(waits(&report["postcopy"]["destination"])).collect(),
        all: report,
    }
}

/// What the guest waited for, from the destination's part of the report.
fn waits(there: &Value) -> impl Iterator<Item = (Quantity, f64)> {
    let us = |name: &str| there["latency"][name].as_f64().map(|nanos| nanos / 1e3);
    let requests = there["requests"].as_f64();
    // Of vCPUs, and of the kernel in their place (asynchronous page faults), not of whoever loads state.
    let vcpus = there["blocked_us"].as_array().map(|threads| {
        let of_guest =
            |thread: &&Value| thread[0].as_str().is_some_and(|name| !name.starts_with("mig-"));
        threads.iter().filter(of_guest).filter_map(|thread| thread[1].as_f64()).sum::<f64>()
    });
    let mean = Option::zip(vcpus, requests).filter(|(_, requests)| *requests > 0.0);
    let figures = [
        (sample::FAULTS, requests),
        (sample::FAULT_MEAN, mean.map(|(waited, requests)| waited / requests)),
        (sample::FAULT_P50, us("p50_ns")),
        (sample::FAULT_P99, us("p99_ns")),
    ];
    figures.into_iter().filter_map(|(quantity, figure)| Some((quantity, figure?)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn its_report_is_understood() {
        let told = told(json!({
            "total_us": 250_000,
            "pause": { "total_us": 2500, "stop_us": 100, "destination_own_us": 1 },
            "connection_bytes": [1000, 500],
            "rounds": [{ "bytes": 1400, "duration_us": 200_000 }, {}],
            "postcopy": { "destination": {
                "requests": 4, "blocked_us": [["vcpu0", 300], ["mig-load", 50], ["kernel", 100]],
                "latency": { "p50_ns": 90_000, "p99_ns": 200_000 },
            }},
        }));
        assert_eq!(told.total_ms, Some(250.0));
        assert_eq!(told.downtime_ms, Some(2.5));
        assert_eq!(told.bytes, Some(1500.0));
        assert_eq!(told.rounds, Some(3.0));
        assert_eq!(told.first_pass, Some(7000.0));
        let figures: Vec<_> = told.figures.iter().map(|(part, ms)| (part.key, *ms)).collect();
        let wanted = [
            ("pause_stop_ms", 0.1),
            ("pause_destination_own_ms", 0.001),
            ("network_faults", 4.0),
            ("fault_mean_us", 100.0),
            ("fault_p50_us", 90.0),
            ("fault_p99_us", 200.0),
        ];
        assert_eq!(figures, wanted);
    }

    #[test]
    fn what_it_does_not_say_is_missing() {
        let told = told(json!({ "total_us": 1000, "pause": null }));
        assert_eq!(told.total_ms, Some(1.0));
        assert!(told.downtime_ms.is_none() && told.bytes.is_none() && told.first_pass.is_none());
    }
}
