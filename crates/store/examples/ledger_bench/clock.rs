//! What time and memory a piece of work took, and how a handful of measurements is shown.

use std::time::Instant;

/// A moment on both clocks.
pub(crate) struct Start(Instant, f64);

impl Start {
    pub(crate) fn now() -> Self {
        Self(Instant::now(), processor_s())
    }

    /// Returns so many things a second: on the wall, and of processor time.
    #[allow(clippy::cast_precision_loss, reason = "counts far below 2^52")]
    pub(crate) fn rates(&self, count: usize) -> (f64, f64) {
        (count as f64 / self.0.elapsed().as_secs_f64(), count as f64 / (processor_s() - self.1))
    }
}

/// Prints the median and the spread of a measurement.
pub(crate) fn spread(name: &str, unit: &str, mut values: Vec<f64>) {
    values.sort_by(f64::total_cmp);
    let median = values[values.len() / 2];
    println!(
        "{name:<58} {median:>12.3} {unit} (of {}: {:.3} to {:.3})",
        values.len(),
        values[0],
        values[values.len() - 1]
    );
}

/// Processor time that this process has used, in seconds, with the threads that have ended, as Linux gives it (to 10 ms). On a
/// machine that is busy with other things it says more than the clock on the wall.
pub(crate) fn processor_s() -> f64 {
    const TICKS_PER_S: f64 = 100.0;
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // What follows the command's name: the state is field 3, user and system time are fields 14 and 15.
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    fields.skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / TICKS_PER_S
}

/// Resident memory of this process in MiB, as Linux gives it.
pub(crate) fn resident_mib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok()).unwrap_or(f64::NAN) / 1024.0
}
