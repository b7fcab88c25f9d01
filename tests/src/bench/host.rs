//! What the machine did while something was measured (proc(5)).

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use super::Result;

/// The first line of a file, or `unknown`.
#[must_use]
pub fn first_line(path: &str) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().next().unwrap_or("unknown").to_owned()
}

/// The three load averages.
#[must_use]
pub fn load_average() -> String {
    first_line("/proc/loadavg").split_whitespace().take(3).collect::<Vec<_>>().join(" ")
}

/// The CPU's name.
#[must_use]
pub fn cpu_model() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    line.map_or("unknown CPU", |(_, name)| name.trim()).to_owned()
}

/// Bytes that this network namespace sent to itself since it was made, headers and
/// acknowledgements included.
pub fn loopback_bytes() -> Result<u64> {
    loopback_received(&fs::read_to_string("/proc/net/dev")?)
}

fn loopback_received(text: &str) -> Result<u64> {
    let line = text.lines().find_map(|line| line.trim_start().strip_prefix("lo:"));
    let bytes = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    Ok(bytes.ok_or("no lo in /proc/net/dev")?)
}

/// CPU time of the machine, this process and some others from some moment on.
#[derive(Debug)]
pub struct CpuMeter {
    begin: Instant,
    machine: MachineTicks,
    own: u64,
    processes: BTreeMap<u32, u64>,
}

/// What a [`CpuMeter`] found.
#[derive(Debug, Clone)]
pub struct CpuUsed {
    /// Time that passed.
    pub wall: Duration,
    /// CPU seconds of each process asked for.
    pub processes: Vec<f64>,
    /// CPU seconds of this process and of the commands that it ran to their end meanwhile.
    pub own: f64,
    /// CPUs that all others kept busy, on average.
    pub others: f64,
    /// CPUs that the machine below this one took away, on average.
    pub stolen: f64,
}

impl CpuMeter {
    /// Begins.
    pub fn begin(pids: &[u32]) -> Result<Self> {
        let processes = pids.iter().map(|pid| Ok((*pid, process_ticks(*pid)?)));
        Ok(Self {
            processes: processes.collect::<Result<_>>()?,
            own: ticks_with_children()?.iter().sum(),
            machine: machine_ticks()?,
            begin: Instant::now(),
        })
    }

    /// What was used since then. A process that has ended still counts until it is waited for; one
    /// that began meanwhile counts from its beginning.
    pub fn used(&self, pids: &[u32]) -> Result<CpuUsed> {
        let wall = self.begin.elapsed();
        let machine = machine_ticks()?;
        let second = rustix::param::clock_ticks_per_second() as f64;
        let since = |now: u64, then: u64| now.saturating_sub(then) as f64 / second;
        let mut processes = Vec::new();
        for pid in pids {
            let before = self.processes.get(pid).copied().unwrap_or_default();
            processes.push(since(process_ticks(*pid)?, before));
        }
        let own = since(ticks_with_children()?.iter().sum(), self.own);
        let busy = since(machine.busy, self.machine.busy);
        let others = busy - own - processes.iter().sum::<f64>();
        Ok(CpuUsed {
            wall,
            processes,
            own,
            // Ticks are coarse: the parts may be more than the whole.
            others: (others / wall.as_secs_f64()).max(0.0),
            stolen: since(machine.stolen, self.machine.stolen) / wall.as_secs_f64(),
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct MachineTicks {
    busy: u64,
    stolen: u64,
}

fn machine_ticks() -> Result<MachineTicks> {
    parse_machine(&first_line("/proc/stat"))
}

/// The line `cpu  user nice system idle iowait irq softirq steal guest guest_nice`; guests' time is
/// in the first two already.
fn parse_machine(line: &str) -> Result<MachineTicks> {
    let ticks: Vec<u64> = line.split_whitespace().skip(1).map_while(|n| n.parse().ok()).collect();
    match ticks[..] {
        [user, nice, system, _, _, irq, softirq, stolen, ..] => {
            Ok(MachineTicks { busy: user + nice + system + irq + softirq, stolen })
        }
        _ => Err(format!("/proc/stat begins with {line:?}").into()),
    }
}

fn process_ticks(pid: u32) -> Result<u64> {
    let [user, system, ..] = parse_process(&first_line(&format!("/proc/{pid}/stat")))?;
    Ok(user + system)
}

fn ticks_with_children() -> Result<[u64; 4]> {
    parse_process(&first_line("/proc/self/stat"))
}

/// `utime`, `stime`, and the same of the children that were waited for.
fn parse_process(line: &str) -> Result<[u64; 4]> {
    // The second field is a name in parentheses, which may contain anything.
    let fields = line.rsplit_once(')').map(|(_, fields)| fields);
    let fields: Vec<u64> = fields
        .unwrap_or_default()
        .split_whitespace()
        .skip(11)
        .map_while(|field| field.parse().ok())
        .take(4)
        .collect();
    Ok(fields.try_into().map_err(|_| format!("not the state of a process: {line:?}"))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_proc_says_is_understood() {
        let machine = parse_machine("cpu  10 20 30 400 500 1 2 70 8 9").unwrap();
        assert_eq!(machine, MachineTicks { busy: 63, stolen: 70 });
        assert!(parse_machine("cpu 1 2").is_err());

        let line = "7 (a ) b) S 1 7 7 0 -1 4194560 1 2 3 4 11 12 13 14 20 0 1 0 100 0 0";
        assert_eq!(parse_process(line).unwrap(), [11, 12, 13, 14]);
        assert!(parse_process("unknown").is_err());

        let text = "Inter-|   Receive\n face |bytes\n    lo: 1234 5 0 0\n  eth0: 9 9\n";
        assert_eq!(loopback_received(text).unwrap(), 1234);
        assert!(loopback_received("").is_err());
    }

    #[test]
    fn an_idle_process_uses_nothing_and_is_there() {
        let own = std::process::id();
        let meter = CpuMeter::begin(&[own]).unwrap();
        let used = meter.used(&[own]).unwrap();
        assert_eq!(used.processes.len(), 1);
        assert!(used.others >= 0.0);
        assert!(CpuMeter::begin(&[u32::MAX]).is_err());
    }
}
