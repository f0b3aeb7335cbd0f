//! What this process takes, and times.

use std::fs;
use std::io::Write;
use std::time::Duration;

/// Seconds of CPU that this process has taken.
pub(crate) fn cpu_seconds() -> f64 {
    let stat = fs::read_to_string("/proc/self/stat").expect("Linux");
    // Behind the name in brackets: user and system time are fields 14 and 15, in hundredths.
    let fields = stat.rsplit_once(')').expect("a name").1;
    let ticks: f64 =
        fields.split_whitespace().skip(11).take(2).map(|n| n.parse::<f64>().expect("a number")).sum();
    ticks / 100.0
}

/// Megabytes of memory that it has at present.
pub(crate) fn resident_megabytes() -> f64 {
    let status = fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a line");
    line.trim().trim_end_matches(" kB").parse::<f64>().expect("a number") / 1024.0
}

/// The median and the longest.
pub(crate) fn spread(mut times: Vec<Duration>) -> String {
    times.sort_unstable();
    format!("{:.1?} (median), {:.1?} (longest)", times[times.len() / 2], times[times.len() - 1])
}

/// On the standard error itself: a test that passes may say something too.
pub(crate) fn tell(line: &str) {
    let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
}
