//! Commands that talk to a running VM.

use std::io::{self, StdoutLock, Write};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use ::migration::destination::Draining;
use serde::Serialize;
use serde_json::json;

use super::args::{
    BalloonArgs, Command, EventsArgs, LinkArgs, LinkState, Named, Output, SaveArgs, StopArgs,
};
use super::output::{duration, fields, table, timestamp};
use super::wait::VmProcess;
use super::{attach, migration, network, CliError, Exit};
use crate::api::{
    BalloonRequest, Client, ClientError, LinkRequest, SaveRequest, LOOK_AGAIN, LOOK_UP,
};
use crate::config::{format_size, ConfigError, DiskConfig, NetConfig};
use crate::control::{SaveReport, VmInfo, VmStats, VmStatus};
use crate::events::Event;
use crate::runtime_dir::{Found, RuntimeDir};

/// Longest wait of `list` for each VM.
const LIST_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest wait of `stop` for the guest, unless told otherwise.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest wait for the process of a killed VM to end.
const KILL_TIMEOUT: Duration = Duration::from_secs(30);

pub(super) type Done = Result<Exit, CliError>;

pub(super) fn run(command: Command) -> Done {
    match command {
        Command::List(output) => list(&output),
        Command::Info(args) => show(&args, &client(&args.name)?.info()?, info_text),
        Command::Stats(args) => show(&args, &client(&args.name)?.stats()?, stats_text),
        Command::Pause(args) => command_with_status(&args, "pause"),
        Command::Resume(args) => command_with_status(&args, "resume"),
        Command::Reset(args) => command_with_status(&args, "reset"),
        Command::Kill(Named { name, output }) => {
            stop(&StopArgs { name, force: true, timeout: None, output })
        }
        Command::Stop(args) => stop(&args),
        Command::Save(args) => save(&args),
        Command::Balloon(BalloonArgs { name, size, output }) => {
            let request = BalloonRequest { target_bytes: size };
            let status = client(&name)?.command_with("balloon", &request)?;
            print_status(&name, status, &output)?;
            Ok(Exit::Ok)
        }
        Command::Link(LinkArgs { name, card, link, output }) => {
            let request = LinkRequest { card, up: link == LinkState::Up };
            let status = client(&name)?.command_with("link", &request)?;
            print_status(&name, status, &output)?;
            Ok(Exit::Ok)
        }
        Command::Events(args) => events(&args),
        Command::Console(args) => {
            let client = client(&args.name)?;
            let info = client.info()?;
            attach::console(client, &info)
        }
        Command::Migrate(args) => migration::migrate(&args),
        Command::Migration(args) => migration::migration(&args),
        Command::MigrateSet(args) => migration::set(&args),
        Command::MigrateStartPostcopy(Named { name, output }) => {
            migration::start_postcopy(&name, &output)
        }
        Command::Cancel(Named { name, output }) => migration::cancel(&name, &output),
        Command::Resolve(args) => migration::resolve(&args),
        Command::Network(args) => network::run(args),
        Command::Run(_) | Command::Restore(_) | Command::Receive(_) => {
            Err(CliError::text(Exit::Failed, "this is no command to a running VM"))
        }
    }
}

pub(super) fn client(name: &str) -> Result<Client, CliError> {
    Ok(Client::of(RuntimeDir::open()?, name)?)
}

/// Prints JSON on one line: a script may get several.
pub(super) fn print_json(out: &mut StdoutLock<'_>, value: &impl Serialize) -> Result<(), CliError> {
    serde_json::to_writer(&mut *out, value).map_err(io::Error::from)?;
    writeln!(out)?;
    Ok(out.flush()?)
}

fn show<T: Serialize>(args: &Named, value: &T, text: impl FnOnce(&T) -> String) -> Done {
    let mut out = io::stdout().lock();
    if args.output.json {
        print_json(&mut out, value)?;
    } else {
        out.write_all(text(value).as_bytes())?;
        out.flush()?;
    }
    Ok(Exit::Ok)
}

fn status_text(status: VmStatus) -> &'static str {
    match status {
        VmStatus::Creating => "creating",
        VmStatus::Running => "running",
        VmStatus::Paused => "paused",
        VmStatus::Incoming => "incoming",
        VmStatus::Unresolved => "unresolved",
        VmStatus::Stopped => "stopped",
        VmStatus::Crashed => "crashed",
    }
}

/// Tells what became of a VM.
pub(super) fn print_status(name: &str, status: VmStatus, output: &Output) -> Result<(), CliError> {
    let mut out = io::stdout().lock();
    if output.json {
        return print_json(&mut out, &json!({ "name": name, "status": status }));
    }
    writeln!(out, "{name}: {}", status_text(status))?;
    Ok(out.flush()?)
}

fn command_with_status(args: &Named, command: &str) -> Done {
    let status = client(&args.name)?.command(command)?;
    print_status(&args.name, status, &args.output)?;
    Ok(Exit::Ok)
}

/// A VM and what it says of itself.
type Asked = (Found, Result<VmInfo, ClientError>);

/// All VMs and what they say of themselves. One whose socket is gone may have taken another name
/// since it was listed: all are listed again then, for a while.
fn listed() -> Result<Vec<Asked>, CliError> {
    let deadline = Instant::now() + LIST_TIMEOUT;
    loop {
        let mut all = Vec::new();
        for found in RuntimeDir::open()?.list()? {
            let asked = Client::new(&found.socket)?.with_quick_timeout(LIST_TIMEOUT).info();
            all.push((found, asked));
        }
        let gone = |(_, asked): &Asked| asked.as_ref().is_err_and(ClientError::is_gone);
        if !all.iter().any(gone) || Instant::now() >= deadline {
            return Ok(all);
        }
        thread::sleep(LOOK_AGAIN);
    }
}

fn list(output: &Output) -> Done {
    let mut rows =
        vec![["NAME", "PID", "STATUS", "MEMORY", "CPUS", "UPTIME"].map(str::to_owned).to_vec()];
    let mut values = Vec::new();
    for (Found { name, pid, .. }, asked) in listed()? {
        match asked {
            Ok(info) => {
                rows.push(vec![
                    name,
                    info.pid.to_string(),
                    status_text(info.status).to_owned(),
                    format_size(info.config.memory.size),
                    info.config.cpus.to_string(),
                    duration(info.uptime_ms),
                ]);
                values.push(json!(info));
            }
            // Alive, since somebody holds its lock.
            Err(error) => {
                let status = match error {
                    ClientError::Connect { .. } => "no-api",
                    _ => "unresponsive",
                };
                let shown_pid = pid.map_or_else(|| "?".to_owned(), |pid| pid.to_string());
                rows.push(vec![name.clone(), shown_pid, status.to_owned()]);
                let error = error.to_string();
                values.push(json!({ "name": name, "pid": pid, "status": status, "error": error }));
            }
        }
    }
    let mut out = io::stdout().lock();
    if output.json {
        print_json(&mut out, &values)?;
    } else {
        out.write_all(table(&rows).as_bytes())?;
        out.flush()?;
    }
    Ok(Exit::Ok)
}

fn info_text(info: &VmInfo) -> String {
    let config = &info.config;
    let path = |path: &Path| path.display().to_string();
    let kernel = config.kernel.as_deref().map_or_else(|| "built-in beacon".to_owned(), path);
    let pages = if config.memory.hugepages { " in huge pages" } else { "" };
    let mut pairs = vec![
        ("name", info.name.clone()),
        ("process", info.pid.to_string()),
        ("version", info.version.clone()),
        ("status", status_text(info.status).to_owned()),
        ("uptime", duration(info.uptime_ms)),
        ("memory", format_size(config.memory.size) + pages),
        ("vCPUs", format!("{} ({})", config.cpus, config.cpu)),
        ("kernel", kernel),
    ];
    pairs.extend(config.initrd.as_deref().map(|initrd| ("initrd", path(initrd))));
    pairs.push(("command line", config.cmdline.clone()));
    let console = match &info.console_path {
        Some(at) => format!("{} at {}", config.console, at.display()),
        None => config.console.to_string(),
    };
    pairs.push(("console", console));
    let on_reboot = serde_json::to_value(config.on_reboot).unwrap_or_default();
    pairs.push(("on reboot", on_reboot.as_str().unwrap_or_default().to_owned()));
    pairs.extend(config.disks.iter().map(|disk| ("disk", disk_text(disk))));
    pairs.extend(config.nets.iter().map(|net| ("network card", net_text(net))));
    let others = [
        (config.rng, "random numbers"),
        (config.balloon.is_some_and(|balloon| !balloon.deflate_on_oom), "balloon"),
        (config.balloon.is_some_and(|b| b.deflate_on_oom), "balloon (deflates on out-of-memory)"),
        (config.virtio_console, "virtio console"),
    ];
    if let Some(drain) = &info.draining {
        pairs.push(("memory missing", missing_text(drain)));
    }
    pairs.extend(
        others.iter().filter(|(there, _)| *there).map(|(_, name)| ("device", (*name).to_owned())),
    );
    fields(&pairs)
}

/// What is still on the host that the VM came from.
fn missing_text(drain: &Draining) -> String {
    let mut text = format!("{} pages, at the host that it came from", drain.missing_pages);
    if let Some(missing) = &drain.missing {
        text += &format!("; no connection; {} runs: {missing}", missing.runs);
    }
    if drain.frozen {
        text += "; the guest needs one of them and stands until it comes";
    }
    text
}

fn disk_text(disk: &DiskConfig) -> String {
    let DiskConfig { id, path, readonly, cache } = disk;
    let readonly = if *readonly { ", read-only" } else { "" };
    let cache = serde_json::to_value(cache).unwrap_or_default();
    format!("{id}: {}{readonly}, {}", path.display(), cache.as_str().unwrap_or_default())
}

fn net_text(net: &NetConfig) -> String {
    let NetConfig { id, attachment, mac, mtu } = net;
    let mtu = mtu.map_or_else(String::new, |mtu| format!(", MTU {mtu}"));
    format!("{id}: {attachment}, {mac}{mtu}")
}

fn stats_text(stats: &VmStats) -> String {
    let megabytes = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
    let unmapped = &stats.unmapped;
    let mut text = fields(&[
        ("memory", format_size(stats.memory_bytes)),
        ("memory populated", megabytes(stats.memory_populated_bytes)),
        ("overhead", megabytes(stats.overhead_bytes)),
        ("CPU time", duration(stats.cpu_ms)),
        ("console output", format!("{} bytes", stats.console_bytes)),
        ("console dropped", format!("{} bytes", stats.console_dropped_bytes)),
        ("unmapped port reads", unmapped.pio_reads.to_string()),
        ("unmapped port writes", unmapped.pio_writes.to_string()),
        ("unmapped memory reads", unmapped.mmio_reads.to_string()),
        ("unmapped memory writes", unmapped.mmio_writes.to_string()),
        ("reboots", stats.reboots.to_string()),
        ("pauses", stats.pauses.to_string()),
    ]);
    let mut rows = vec![["VCPU", "EXITS", "PIO", "MMIO", "CPU TIME"].map(str::to_owned).to_vec()];
    for (i, vcpu) in stats.vcpus.iter().enumerate() {
        let numbers = [i as u64, vcpu.exits, vcpu.pio, vcpu.mmio];
        let mut row: Vec<String> = numbers.iter().map(u64::to_string).collect();
        row.push(duration(vcpu.cpu_ms));
        rows.push(row);
    }
    text.push('\n');
    text += &table(&rows);
    if stats.devices.is_empty() {
        return text;
    }
    let heading = ["DEVICE", "KIND", "INTERRUPTS", "RESETS", "NEEDS-RESET", "COUNTERS"];
    let mut rows = vec![heading.map(str::to_owned).to_vec()];
    for device in &stats.devices {
        let counters: Vec<String> =
            device.counters.iter().map(|(name, value)| format!("{name}={value}")).collect();
        rows.push(vec![
            device.id.clone(),
            device.kind.clone(),
            device.interrupts.to_string(),
            device.resets.to_string(),
            device.needs_resets.to_string(),
            counters.join(" "),
        ]);
    }
    text.push('\n');
    text + &table(&rows)
}

fn save(args: &SaveArgs) -> Done {
    let path = std::path::absolute(&args.file)
        .map_err(|e| ConfigError::Absolute { path: args.file.clone(), why: e.to_string() })?;
    let request = SaveRequest { path, then_stop: args.stop, incomplete: args.incomplete };
    let report = client(&args.name)?.save(&request)?;
    let mut out = io::stdout().lock();
    if args.output.json {
        print_json(&mut out, &report)?;
        return Ok(Exit::Ok);
    }
    let SaveReport { path, file_bytes, pages, zero_pages, absent_pages, paused_ms, total_ms } =
        report;
    if args.incomplete {
        writeln!(
            out,
            "{}: memory as it was when the VM moved, which is no VM, written to {}: {file_bytes} bytes, {pages} pages",
            args.name,
            path.display(),
        )?;
        out.flush()?;
        return Ok(Exit::Ok);
    }
    writeln!(
        out,
        "{}: saved to {}: {file_bytes} bytes, {pages} pages ({zero_pages} zero and {absent_pages} \
         untouched left out); stood still for {paused_ms:.1} ms, took {total_ms:.1} ms",
        args.name,
        path.display(),
    )?;
    out.flush()?;
    Ok(Exit::Ok)
}

fn events(args: &EventsArgs) -> Done {
    let client = client(&args.name)?;
    let mut out = io::stdout().lock();
    let mut print = |event: &Event| -> Result<(), CliError> {
        if args.output.json {
            return print_json(&mut out, event);
        }
        let detail = match &event.detail {
            serde_json::Value::Null => String::new(),
            serde_json::Value::Object(fields) if fields.is_empty() => String::new(),
            detail => format!("  {detail}"),
        };
        writeln!(out, "{}  {:>4}  {}{detail}", timestamp(event.unix_ms), event.seq, event.kind)?;
        Ok(out.flush()?)
    };
    if args.follow {
        let mut stream = client.follow(args.after)?;
        while let Some(event) = stream.next(None)? {
            print(&event)?;
        }
    } else {
        client.events(args.after)?.iter().try_for_each(print)?;
    }
    Ok(Exit::Ok)
}

/// The VM `name` and its process, which is known to be that of the VM.
fn process_of(name: &str) -> Result<(Found, Client, VmProcess), CliError> {
    let deadline = Instant::now() + LOOK_UP;
    loop {
        let found = RuntimeDir::open()?.find(name)?;
        let client = Client::new(&found.socket)?;
        let connect = |source| ClientError::Connect { socket: found.socket.clone(), source };
        let asked = VmProcess::behind(&found.socket)
            .map_err(connect)
            .and_then(|process| client.info().map(|_| process));
        match asked {
            Ok(process) => return Ok((found, client, process)),
            Err(error) if error.is_gone() && Instant::now() < deadline => thread::sleep(LOOK_AGAIN),
            Err(error) => return Err(error.into()),
        }
    }
}

fn stop(args: &StopArgs) -> Done {
    let (found, client, process) = process_of(&args.name)?;
    let mut stream = match client.follow(0) {
        // Its socket has got another name.
        Err(error) if error.is_gone() => return stop(args),
        followed => followed?,
    };
    let ask_first = !args.force || args.timeout.is_some();
    let mut ended = false;
    if ask_first {
        client.command("power-button")?;
        let timeout = args.timeout.map_or(STOP_TIMEOUT, |s| Duration::from_secs(s.into()));
        ended = process.wait(Instant::now() + timeout)?;
        if !ended && !args.force {
            let message = format!(
                "{} still runs {} after its power button was pressed: its guest may not know \
                 the button; `minivmm stop {} --force` ends it",
                args.name,
                duration(timeout.as_millis().try_into().unwrap_or(u64::MAX)),
                args.name,
            );
            return Err(CliError::text(Exit::TimedOut, message));
        }
    }
    if !ended {
        match client.command("kill") {
            // It may end before its answer is out, or have ended by itself.
            Ok(_) | Err(ClientError::Protocol(_) | ClientError::Connect { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        if !process.wait(Instant::now() + KILL_TIMEOUT)? {
            let message = format!(
                "{} was told to end and has not; its process is {}: `kill -9` ends it, without \
                 removing its files",
                args.name,
                found.pid.map_or_else(|| "unknown".to_owned(), |pid| pid.to_string()),
            );
            return Err(CliError::text(Exit::TimedOut, message));
        }
    }
    // What it said before it went.
    let mut crashed = false;
    while let Ok(Some(event)) = stream.next(Some(LIST_TIMEOUT)) {
        crashed |= event.kind == "crashed";
    }
    let status = if crashed { VmStatus::Crashed } else { VmStatus::Stopped };
    print_status(&args.name, status, &args.output)?;
    Ok(if crashed { Exit::GuestCrashed } else { Exit::Ok })
}
