//! One clock for all processes of a machine, and what the machine says of a process.

use std::fs;

use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds of the monotonic clock, which counts the same in every process.
pub fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// CPU time that a process has used so far, in microseconds.
pub fn cpu_us(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name of the program, in brackets, may hold anything.
    let fields = stat.rsplit_once(") ").map_or("", |(_, fields)| fields);
    let mut fields = fields.split(' ').skip(11);
    let mut ticks = || -> u64 { fields.next().and_then(|f| f.parse().ok()).unwrap_or(0) };
    (ticks() + ticks()) * 1_000_000 / rustix::param::clock_ticks_per_second()
}

/// Memory that a process has resident, in KiB.
pub fn rss_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|value| value.trim().trim_end_matches(" kB").parse().ok())
        .unwrap_or(0)
}
