//! Commands that move VMs, and tell how that goes.

use std::io::{self, IsTerminal, Write};
use std::sync::mpsc::{channel, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use migration::handover::Owner;
use serde_json::{json, Value};

use super::migrate_args::{
    micros, MigrateArgs, MigrateSetArgs, MigrationArgs, OwnerChoice, ResolveArgs, Switch,
};
use super::output::{table, timestamp};
use super::vm_commands::{client, print_json, print_status, Done};
use super::{CliError, Exit};
use crate::api::ClientError;
use crate::config::format_size;
use crate::control::{MigrateSettings, MigrationInfo};
use crate::migrate::{self, Records};

/// How often progress is shown: on a terminal, and elsewhere.
const BAR: Duration = Duration::from_millis(200);
const LINES: Duration = Duration::from_secs(1);

pub(super) fn migrate(args: &MigrateArgs) -> Done {
    if args.recover {
        let status =
            client(&args.name)?.command_with("migrate-recover", &args.recover_request())?;
        print_status(&args.name, status, &args.output)?;
        return Ok(Exit::Ok);
    }
    let asking = client(&args.name)?;
    let watching = client(&args.name)?;
    let request = args.request();
    let records = Records::open()?;
    let older = sent_before(&records, &args.name);
    let (sender, answer) = channel();
    thread::spawn(move || sender.send(asking.migrate(&request)));
    let terminal = io::stderr().is_terminal() && !args.output.json;
    let mut shown = String::new();
    let answer = loop {
        match answer.recv_timeout(if terminal { BAR } else { LINES }) {
            Ok(answer) => break answer,
            Err(RecvTimeoutError::Disconnected) => {
                return Err(CliError::text(Exit::Failed, "no answer to the request"));
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
        // The VM may be gone between two looks.
        let Ok(info) = watching.migration() else { continue };
        if let Some(text) = progress_text(&info) {
            if terminal {
                eprint!("\r\x1b[K{text}");
            } else if !args.output.json && text != shown {
                eprintln!("{text}");
            }
            shown = text;
        }
    };
    if terminal && !shown.is_empty() {
        eprintln!();
    }
    let report = match answer {
        Ok(report) => report,
        // The process of a VM that was handed over may end before its answer is out.
        Err(error @ ClientError::Protocol(_)) => {
            let reports = records.of(&args.name).unwrap_or_default();
            let ours = |report: &Value| {
                report["direction"] == "outgoing" && !older.contains(&report["id"])
            };
            reports.into_iter().rev().find(ours).ok_or(error)?
        }
        Err(error) => return Err(error.into()),
    };
    let mut out = io::stdout().lock();
    if args.output.json {
        print_json(&mut out, &report)?;
    } else if report["verdict"].is_null() {
        writeln!(out, "{}: migration {} is under way", args.name, text(&report["id"]))?;
    } else {
        out.write_all(report_text(&args.name, &report).as_bytes())?;
    }
    out.flush()?;
    Ok(match report["verdict"].as_str() {
        Some("handed-over") if !report["postcopy"]["incomplete"].is_null() => Exit::Incomplete,
        Some("handed-over") | None => Exit::Ok,
        Some("unresolved") => Exit::Unresolved,
        Some(_) => Exit::Failed,
    })
}

/// Ids of migrations from this host that are over.
fn sent_before(records: &Records, name: &str) -> Vec<Value> {
    let reports = records.of(name).unwrap_or_default();
    reports.into_iter().map(|mut report| report["id"].take()).collect()
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or(0.0)
}

/// Microseconds as milliseconds.
fn ms(value: &Value) -> String {
    format!("{:.1} ms", number(value) / 1e3)
}

fn bytes(value: &Value) -> String {
    let mib = number(value) / f64::from(1 << 20);
    if mib < 1024.0 {
        format!("{mib:.1} MiB")
    } else {
        format!("{:.2} GiB", mib / 1024.0)
    }
}

/// Bar, round, pages left, rates and forecasts on one line.
fn progress_text(info: &MigrationInfo) -> Option<String> {
    const WIDTH: usize = 20;
    let progress = info.current.get("progress").filter(|progress| !progress.is_null())?;
    let phase = text(&progress["phase"]);
    let (all, left) = (number(&progress["round_pages"]), number(&progress["pages_left"]));
    let share = if all > 0.0 { 1.0 - left / all } else { 0.0 };
    // A share of WIDTH.
    let done = (share.clamp(0.0, 1.0) * WIDTH as f64) as usize;
    let bar = "#".repeat(done) + &"-".repeat(WIDTH - done);
    let rate = number(&progress["bytes_per_second"]);
    let seconds_left = if rate > 0.0 { left * 4096.0 / rate } else { 0.0 };
    let pause = match &progress["predicted_pause_us"] {
        Value::Null => String::new(),
        pause => format!(", pause about {}", ms(pause)),
    };
    let round = match &progress["round"] {
        Value::Null => String::new(),
        round => format!(" round {round}"),
    };
    let note = progress["note"].as_str().map_or_else(String::new, |note| format!("; {note}"));
    if let Some(missing) = progress["missing_pages"].as_u64() {
        return Some(format!(
            "the guest runs there; {missing} pages are still here, {}/s{note}",
            bytes(&json!(rate))
        ));
    }
    Some(format!(
        "{phase}{round} [{bar}] {left} pages left, {}/s, dirty {:.0} pages/s{pause}, {seconds_left:.1} s left of the round{note}",
        bytes(&json!(rate)),
        number(&progress["dirty_pages_per_second"]),
    ))
}

fn verdict_text(report: &Value) -> String {
    let reasons: Vec<String> =
        report["reasons"].as_array().into_iter().flatten().map(text).collect();
    let reasons = if reasons.is_empty() { text(&report["cause"]) } else { reasons.join("; ") };
    match report["verdict"].as_str() {
        Some("handed-over") => format!("handed over to {}", text(&report["peer"])),
        Some("running-here")
            if report["direction"] == "incoming" || report.get("load_us").is_some() =>
        {
            format!("came from {}", text(&report["peer"]))
        }
        Some("running-here") => format!("not migrated, runs here as before: {reasons}"),
        Some("owned-here") => format!("came, and was given up before it could run: {reasons}"),
        Some("not-here") => format!("did not come: {reasons}"),
        _ => format!("unresolved, frozen: {reasons}"),
    }
}

fn report_text(name: &str, report: &Value) -> String {
    let mut lines = format!("{name}: {}\n", verdict_text(report));
    let total = number(&report["total_us"]);
    if total > 0.0 {
        let sent: f64 =
            report["connection_bytes"].as_array().into_iter().flatten().map(number).sum();
        lines += &format!(
            "  total {:.3} s; {} sent: {} pages, {} zero, {} never touched\n",
            total / 1e6,
            bytes(&json!(sent)),
            report["data_pages"],
            report["zero_pages"],
            report["skipped_pages"],
        );
    }
    let mut rows = vec![["ROUND", "PAGES", "ZERO", "SENT", "TIME", "DIRTIED", "PAUSE WOULD BE"]
        .map(str::to_owned)
        .to_vec()];
    for round in report["rounds"].as_array().into_iter().flatten() {
        rows.push(vec![
            text(&round["number"]),
            text(&round["data_pages"]),
            text(&round["zero_pages"]),
            bytes(&round["bytes"]),
            ms(&round["duration_us"]),
            text(&round["dirty_pages"]),
            ms(&round["predicted_pause_us"]),
        ]);
    }
    if rows.len() > 1 {
        lines += &table(&rows);
    }
    let pause = &report["pause"];
    if !pause.is_null() {
        lines += &format!(
            "  pause {}: stop {}, save {}, harvest {}, send {} ({} pages), load {}, commit {}, resume {}\n",
            ms(&pause["total_us"]),
            ms(&pause["stop_us"]),
            ms(&pause["save_us"]),
            ms(&pause["harvest_us"]),
            ms(&pause["send_us"]),
            pause["pages"],
            ms(&pause["load_us"]),
            ms(&pause["commit_us"]),
            ms(&pause["resume_us"]),
        );
        lines += &format!(
            "  CPU {:.2} s here, {:.2} s there\n",
            number(&report["cpu_source_us"]) / 1e6,
            number(&report["cpu_destination_us"]) / 1e6,
        );
    }
    lines + &postcopy_text(&report["postcopy"]) + &late_text(&report["late_frames"])
}

/// What was sent after the guest; nothing if nothing was.
fn late_text(late: &Value) -> String {
    if late["frames"].as_u64().unwrap_or(0) == 0 {
        return String::new();
    }
    let end = match (late["interrupted"].as_bool(), late["at_limit"].as_bool()) {
        (Some(true), _) => "; then the connection was lost",
        (_, Some(true)) => "; then the time was up, and more came",
        _ => "",
    };
    format!(
        "  {} packets had come to the old host and were sent after it, the last {} later{end}\n",
        late["frames"],
        ms(&late["last_us"]),
    )
}

/// How memory followed its guest; nothing if it did not.
fn postcopy_text(postcopy: &Value) -> String {
    if postcopy.is_null() {
        return String::new();
    }
    let (there, faults) = (&postcopy["destination"], &postcopy["faults"]);
    let latency = &there["latency"];
    let us = |value: &Value| format!("{:.0} us", number(value) / 1e3);
    let mut lines = format!(
        "  then {} pages followed in {}: {} asked for, {} with those, {} pushed; {} made there\n\
         \x20 page faults over the network: {}, half of them within {}, 99 % within {}; connections lost: {}\n\
         \x20 asked for: {:.1} % of these pages; faults avoided: at most {} by push, {} by pre-paging\n",
        postcopy["missing_pages"],
        ms(&there["drain_us"]),
        there["demand_pages"],
        there["prepaged_pages"],
        there["pushed_pages"],
        there["local_pages"],
        there["requests"],
        us(&latency["p50_ns"]),
        us(&latency["p99_ns"]),
        postcopy["interruptions"],
        number(&faults["network_share"]) * 100.0,
        faults["push_avoided_at_most"],
        faults["prepaging_avoided_at_most"],
    );
    if let Some(why) = postcopy["incomplete"].as_str() {
        lines = format!("  a part of its memory did not follow: {why}\n");
    }
    lines
}

pub(super) fn migration(args: &MigrationArgs) -> Done {
    let Some(name) = &args.name else { return journal(args) };
    let history = Records::open()?.of(name).unwrap_or_default();
    let current = match client(name) {
        Ok(client) => client.migration()?.current,
        // Its history is here all the same.
        Err(error) if error.exit() == Exit::NoSuchVm && !history.is_empty() => Value::Null,
        Err(error) => return Err(error),
    };
    let mut out = io::stdout().lock();
    if args.output.json {
        print_json(&mut out, &json!({ "current": current, "history": history }))?;
        return Ok(Exit::Ok);
    }
    if !current.is_null() {
        let info = MigrationInfo { current, last: Value::Null };
        let missing = info.current["missing_pages"].as_u64();
        let phase = match missing {
            None => text(&info.current["phase"]),
            Some(pages) => {
                let note = info.current["note"]
                    .as_str()
                    .map_or_else(String::new, |n| format!("; postcopy-paused: {n}"));
                let stands = match info.current["frozen"].as_bool() {
                    Some(true) => "; it needs one of them, and stands until it comes",
                    _ => "",
                };
                format!("the guest runs here; {pages} pages are still there{note}{stands}")
            }
        };
        let progress = progress_text(&info).unwrap_or(phase);
        let (direction, peer) = (text(&info.current["direction"]), text(&info.current["peer"]));
        writeln!(out, "{direction}, {peer}: {progress}")?;
    }
    for report in &history {
        let ended = report["ended_unix_ms"].as_u64().unwrap_or(0);
        write!(out, "{}  {}", timestamp(ended), report_text(name, report))?;
    }
    if history.is_empty() {
        writeln!(out, "{name}: no migration yet")?;
    }
    out.flush()?;
    Ok(Exit::Ok)
}

/// All migrations that this host knows.
fn journal(args: &MigrationArgs) -> Done {
    let entries = migrate::journal()?.list().map_err(migrate::LogbookError::from)?;
    let mut out = io::stdout().lock();
    if args.output.json {
        print_json(&mut out, &entries_json(&entries)?)?;
        return Ok(Exit::Ok);
    }
    let heading = ["ID", "VM", "DIRECTION", "PEER", "VERDICT", "SINCE"];
    let mut rows = vec![heading.map(str::to_owned).to_vec()];
    for entry in entries_json(&entries)? {
        let since = entry["updated_unix_s"].as_u64().unwrap_or(0) * 1000;
        let mut row: Vec<String> = ["id", "vm", "direction", "peer", "verdict"]
            .iter()
            .map(|key| text(&entry[key]))
            .collect();
        if let Some(pages) = entry["missing_pages"].as_u64() {
            row[4] += &format!(", without {pages} pages");
        }
        row.push(timestamp(since));
        rows.push(row);
    }
    out.write_all(table(&rows).as_bytes())?;
    out.flush()?;
    Ok(Exit::Ok)
}

fn entries_json(entries: &[migration::journal::Entry]) -> Result<Vec<Value>, CliError> {
    let journal = migrate::journal()?;
    let mut all = Vec::new();
    for entry in entries {
        let verdict = match entry.id.parse() {
            Ok(id) => journal.verdict(id, entry.side, None).map_err(migrate::LogbookError::from)?,
            Err(_) => continue,
        };
        all.push(json!({
            "id": entry.id,
            "vm": entry.vm,
            "direction": migrate::side_text(entry.side),
            "peer": entry.peer,
            "verdict": verdict,
            "pid": entry.pid,
            "updated_unix_s": entry.updated,
            "missing_pages": entry.missing_pages,
        }));
    }
    Ok(all)
}

pub(super) fn set(args: &MigrateSetArgs) -> Done {
    let settings = MigrateSettings {
        bandwidth: args.bandwidth,
        downtime_us: args.downtime.map(micros),
        push: args.push.map(|push| push == Switch::On),
    };
    let status = client(&args.name)?.command_with("migrate-set", &settings)?;
    if args.output.json {
        print_status(&args.name, status, &args.output)?;
        return Ok(Exit::Ok);
    }
    let mut out = io::stdout().lock();
    let bandwidth = settings.bandwidth.map(|rate| match rate {
        0 => "no limit of bandwidth".to_owned(),
        rate => format!("{}/s", format_size(rate)),
    });
    let downtime = args.downtime.map(|time| format!("downtime {time:?}"));
    let push = settings.push.map(|push| format!("push {}", if push { "on" } else { "off" }));
    let what: Vec<String> = bandwidth.into_iter().chain(downtime).chain(push).collect();
    writeln!(out, "{}: {}", args.name, what.join(", "))?;
    Ok(Exit::Ok)
}

pub(super) fn start_postcopy(name: &str, output: &super::args::Output) -> Done {
    let status = client(name)?.command("migrate-start-postcopy")?;
    print_status(name, status, output)?;
    Ok(Exit::Ok)
}

pub(super) fn cancel(name: &str, output: &super::args::Output) -> Done {
    let status = client(name)?.command("migrate-cancel")?;
    print_status(name, status, output)?;
    Ok(Exit::Ok)
}

pub(super) fn resolve(args: &ResolveArgs) -> Done {
    let owner = match args.owner {
        OwnerChoice::Here => Owner::Here,
        OwnerChoice::There => Owner::There,
    };
    let resolved = migrate::resolve(&args.id, owner)?;
    let mut out = io::stdout().lock();
    let owner = match resolved.owner {
        Owner::Here => "here",
        Owner::There => "there",
    };
    let entry = resolved.entry;
    if args.output.json {
        print_json(&mut out, &json!({ "id": entry.id, "vm": entry.vm, "owner": owner }))?;
    } else {
        writeln!(out, "migration {} of {}: the VM is owned {owner}", entry.id, entry.vm)?;
        out.flush()?;
    }
    Ok(Exit::Ok)
}
