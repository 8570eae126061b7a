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

/// The same as the scheduler counts it: finer, but without threads that have ended.
pub fn busy_us(pid: u32) -> f64 {
    let threads = fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten();
    let ns_of_each = threads.flatten().map(|thread| -> f64 {
        let counts = fs::read_to_string(thread.path().join("schedstat")).unwrap_or_default();
        let ns = counts.split(' ').next();
        ns.and_then(|ns| ns.parse().ok()).unwrap_or(0.0)
    });
    ns_of_each.sum::<f64>() / 1e3
}

/// How often a process, or its first thread, has waited for something so far.
pub fn waits(pid: u32) -> f64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let mut lines = status.lines();
    let count = lines.find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    count
        .and_then(|count| count.trim().parse().ok())
        .unwrap_or(0.0)
}

/// Bytes that a process has written so far, to whatever.
pub fn written_bytes(pid: u32) -> f64 {
    let counts = fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
    let bytes = counts.lines().find_map(|line| line.strip_prefix("wchar: "));
    bytes.and_then(|bytes| bytes.parse().ok()).unwrap_or(0.0)
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
