//! What the kernel says about this process and its threads.

use std::fs;

/// Thread id of the caller.
#[must_use]
pub fn current_tid() -> u32 {
    rustix::thread::gettid().as_raw_pid().unsigned_abs()
}

/// CPU time of a thread of this process, milliseconds (proc(5), schedstat); 0 where unknown.
#[must_use]
pub fn thread_cpu_ms(tid: u32) -> u64 {
    schedstat_ms(&format!("/proc/self/task/{tid}/schedstat"))
}

/// CPU time of all threads that this process has, milliseconds.
#[must_use]
pub fn cpu_ms() -> u64 {
    let Ok(tasks) = fs::read_dir("/proc/self/task") else { return 0 };
    tasks.flatten().filter_map(|t| t.file_name().to_str()?.parse().ok()).map(thread_cpu_ms).sum()
}

fn schedstat_ms(path: &str) -> u64 {
    fs::read_to_string(path)
        .ok()
        .and_then(|s| s.split_whitespace().next()?.parse::<u64>().ok())
        .map_or(0, |ns| ns / 1_000_000)
}

/// Resident memory that is not guest memory, bytes: anonymous and file pages (proc(5), status) less
/// what is populated of guest memory, which is anonymous too.
#[must_use]
pub fn overhead_bytes(guest: u64) -> u64 {
    let Ok(status) = fs::read_to_string("/proc/self/status") else { return 0 };
    let field = |name: &str| {
        status
            .lines()
            .find_map(|l| {
                l.strip_prefix(name)?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
            })
            .unwrap_or(0)
    };
    ((field("RssAnon:") + field("RssFile:")) * 1024).saturating_sub(guest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overhead_is_of_the_size_of_a_program() {
        let bytes = overhead_bytes(0);
        assert!(bytes > 100 << 10 && bytes < 1 << 30, "{bytes}");
    }
}
