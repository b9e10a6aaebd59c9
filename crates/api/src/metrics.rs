//! A small registry of typed metrics, rendered as Prometheus text (exposition format 0.0.4).
//!
//! A metric is described once, as a constant, so its name and its help cannot drift apart; a name that Prometheus would refuse
//! does not compile. Updating a metric is one atomic operation and never waits. The number of series of one metric is bounded:
//! what comes after [`MAX_SERIES`] is counted under the label value `other`, so nobody can fill memory with label values.
//!
//! ```
//! use chorus_api::metrics::{Desc, Registry};
//!
//! const ELECTIONS: Desc = Desc::new("chorus_elections_total", "Elections held.").labels(&["outcome"]);
//!
//! let registry = Registry::default();
//! let elections = registry.counters(&ELECTIONS);
//! elections.with(&["won"]).inc();
//! assert!(registry.render().contains("chorus_elections_total{outcome=\"won\"} 1"));
//! ```

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Series that one metric may have; more are counted as `other`.
pub const MAX_SERIES: usize = 256;
/// The content type of what [`Registry::render`] returns.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";
/// Upper bounds in seconds that suit what happens between two processes on one host and a long generation.
pub const SECONDS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0];

/// What a metric is called and what it tells.
#[derive(Clone, Copy, Debug)]
pub struct Desc {
    name: &'static str,
    help: &'static str,
    labels: &'static [&'static str],
}

impl Desc {
    /// Describes a metric. Counters end in `_total`, durations in `_seconds`, sizes in `_bytes`.
    ///
    /// # Panics
    /// When the name is not one of Prometheus's; in a constant that is a compile error.
    #[must_use]
    pub const fn new(name: &'static str, help: &'static str) -> Self {
        assert!(is_name(name), "a metric's name is letters, digits and underscores, and begins with a letter");
        Self { name, help, labels: &[] }
    }

    /// Names the labels that tell its series apart.
    ///
    /// # Panics
    /// When a label's name is not one of Prometheus's; in a constant that is a compile error.
    #[must_use]
    pub const fn labels(mut self, labels: &'static [&'static str]) -> Self {
        let mut at = 0;
        while at < labels.len() {
            assert!(is_name(labels[at]), "a label's name is letters, digits and underscores, and begins with a letter");
            at += 1;
        }
        self.labels = labels;
        self
    }

    /// Returns the metric's name.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        self.name
    }
}

const fn is_name(name: &str) -> bool {
    let bytes = name.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        if !(bytes[at].is_ascii_alphanumeric() || bytes[at] == b'_') {
            return false;
        }
        at += 1;
    }
    !bytes.is_empty() && bytes[0].is_ascii_alphabetic()
}

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds one.
    pub fn inc(&self) {
        self.add(1);
    }

    /// Adds `count`.
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    /// Returns the count so far.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A number that goes up and down.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

impl Gauge {
    /// Sets the value.
    pub fn set(&self, value: f64) {
        self.0.store(value.to_bits(), Ordering::Relaxed);
    }

    /// Adds `delta`, which may be negative.
    pub fn add(&self, delta: f64) {
        add_f64(&self.0, delta);
    }

    /// Returns the value.
    #[must_use]
    pub fn get(&self) -> f64 {
        f64::from_bits(self.0.load(Ordering::Relaxed))
    }
}

/// How often values fell below each of a few bounds.
#[derive(Debug)]
pub struct Histogram {
    bounds: &'static [f64],
    /// One for each bound, not cumulative, and one for what is above all of them.
    buckets: Box<[AtomicU64]>,
    sum: AtomicU64,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Self {
        Self { bounds, buckets: (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect(), sum: AtomicU64::new(0) }
    }

    /// Counts a value.
    pub fn observe(&self, value: f64) {
        let bucket = self.bounds.partition_point(|bound| *bound < value);
        if let Some(bucket) = self.buckets.get(bucket) {
            bucket.fetch_add(1, Ordering::Relaxed);
        }
        add_f64(&self.sum, value);
    }

    /// Counts a duration, in seconds.
    pub fn observe_duration(&self, duration: Duration) {
        self.observe(duration.as_secs_f64());
    }

    /// Returns how many values were counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).sum()
    }
}

fn add_f64(cell: &AtomicU64, delta: f64) {
    let add = |bits| Some((f64::from_bits(bits) + delta).to_bits());
    // The closure never gives up, so neither does the update.
    let _ = cell.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
}

/// All series of one metric.
pub struct Series<M> {
    desc: &'static Desc,
    make: Box<dyn Fn() -> M + Send + Sync>,
    series: Mutex<BTreeMap<Vec<String>, Arc<M>>>,
}

impl<M> Series<M> {
    fn new(desc: &'static Desc, make: impl Fn() -> M + Send + Sync + 'static) -> Self {
        Self { desc, make: Box::new(make), series: Mutex::default() }
    }

    /// Returns the series with these label values, in the order in which the labels were described. Missing values are empty,
    /// surplus ones are ignored.
    #[must_use]
    pub fn with(&self, values: &[&str]) -> Arc<M> {
        let mut key: Vec<String> = values.iter().map(|value| (*value).to_owned()).collect();
        key.resize(self.desc.labels.len(), String::new());
        let mut series = lock(&self.series);
        if series.len() >= MAX_SERIES && !series.contains_key(&key) {
            key.fill("other".to_owned());
        }
        Arc::clone(series.entry(key).or_insert_with(|| Arc::new((self.make)())))
    }
}

impl<M> fmt::Debug for Series<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Series").field(&self.desc.name).finish()
    }
}

/// Every metric of one owner.
#[derive(Default)]
pub struct Registry {
    families: Mutex<Vec<Arc<dyn Family>>>,
}

impl Registry {
    /// Registers a counter without labels.
    pub fn counter(&self, desc: &'static Desc) -> Arc<Counter> {
        self.counters(desc).with(&[])
    }

    /// Registers a counter with labels.
    pub fn counters(&self, desc: &'static Desc) -> Arc<Series<Counter>> {
        self.add(Series::new(desc, Counter::default))
    }

    /// Registers a gauge without labels.
    pub fn gauge(&self, desc: &'static Desc) -> Arc<Gauge> {
        self.gauges(desc).with(&[])
    }

    /// Registers a gauge with labels.
    pub fn gauges(&self, desc: &'static Desc) -> Arc<Series<Gauge>> {
        self.add(Series::new(desc, Gauge::default))
    }

    /// Registers a histogram without labels. The bounds are in ascending order, such as [`SECONDS`].
    pub fn histogram(&self, desc: &'static Desc, bounds: &'static [f64]) -> Arc<Histogram> {
        self.histograms(desc, bounds).with(&[])
    }

    /// Registers a histogram with labels. The bounds are in ascending order, such as [`SECONDS`].
    pub fn histograms(&self, desc: &'static Desc, bounds: &'static [f64]) -> Arc<Series<Histogram>> {
        self.add(Series::new(desc, move || Histogram::new(bounds)))
    }

    fn add<M: Metric>(&self, series: Series<M>) -> Arc<Series<M>> {
        let series = Arc::new(series);
        lock(&self.families).push(Arc::clone(&series) as Arc<dyn Family>);
        series
    }

    /// Renders every metric in the text exposition format.
    #[must_use]
    pub fn render(&self) -> String {
        let mut out = String::new();
        for family in lock(&self.families).iter() {
            family.render(&mut out);
        }
        out
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry").field("families", &lock(&self.families).len()).finish()
    }
}

/// A kind of metric.
trait Metric: Send + Sync + 'static {
    const KIND: &'static str;

    fn render(&self, out: &mut String, name: &str, labels: &str);
}

impl Metric for Counter {
    const KIND: &'static str = "counter";

    fn render(&self, out: &mut String, name: &str, labels: &str) {
        sample(out, name, "", labels, &self.get().to_string());
    }
}

impl Metric for Gauge {
    const KIND: &'static str = "gauge";

    fn render(&self, out: &mut String, name: &str, labels: &str) {
        sample(out, name, "", labels, &number(self.get()));
    }
}

impl Metric for Histogram {
    const KIND: &'static str = "histogram";

    fn render(&self, out: &mut String, name: &str, labels: &str) {
        let mut count = 0u64;
        let comma = if labels.is_empty() { "" } else { "," };
        for (at, bucket) in self.buckets.iter().enumerate() {
            count += bucket.load(Ordering::Relaxed);
            let bound = number(self.bounds.get(at).copied().unwrap_or(f64::INFINITY));
            sample(out, name, "_bucket", &format!("{labels}{comma}le=\"{bound}\""), &count.to_string());
        }
        sample(out, name, "_sum", labels, &number(f64::from_bits(self.sum.load(Ordering::Relaxed))));
        sample(out, name, "_count", labels, &count.to_string());
    }
}

trait Family: Send + Sync {
    fn render(&self, out: &mut String);
}

impl<M: Metric> Family for Series<M> {
    fn render(&self, out: &mut String) {
        let Desc { name, help, labels } = self.desc;
        let help = help.replace('\\', "\\\\").replace('\n', "\\n");
        // Writing to a string cannot fail.
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {}", M::KIND);
        for (values, metric) in lock(&self.series).iter() {
            let pairs: Vec<String> =
                labels.iter().zip(values).map(|(label, value)| format!("{label}=\"{}\"", escaped(value))).collect();
            metric.render(out, name, &pairs.join(","));
        }
    }
}

fn sample(out: &mut String, name: &str, suffix: &str, labels: &str, value: &str) {
    let (open, close) = if labels.is_empty() { ("", "") } else { ("{", "}") };
    let _ = writeln!(out, "{name}{suffix}{open}{labels}{close} {value}");
}

fn number(value: f64) -> String {
    if value.is_nan() {
        "NaN".to_owned()
    } else if value.is_infinite() {
        if value > 0.0 { "+Inf".to_owned() } else { "-Inf".to_owned() }
    } else {
        value.to_string()
    }
}

fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const ASKED: Desc = Desc::new("asked_total", "Questions\nasked.").labels(&["by", "how"]);
    const PEERS: Desc = Desc::new("peers", "Peers.");
    const TOOK: Desc = Desc::new("took_seconds", "Time.").labels(&["route"]);

    #[test]
    fn text_is_what_prometheus_reads() {
        let registry = Registry::default();
        let asked = registry.counters(&ASKED);
        asked.with(&["a\"b\\c\n", "x"]).add(3);
        registry.gauge(&PEERS).set(2.5);
        let took = registry.histograms(&TOOK, &[0.1, 1.0]);
        for value in [0.05, 0.1, 0.5, 7.0] {
            took.with(&["/"]).observe(value);
        }
        let expected = "# HELP asked_total Questions\\nasked.\n\
                        # TYPE asked_total counter\n\
                        asked_total{by=\"a\\\"b\\\\c\\n\",how=\"x\"} 3\n\
                        # HELP peers Peers.\n\
                        # TYPE peers gauge\n\
                        peers 2.5\n\
                        # HELP took_seconds Time.\n\
                        # TYPE took_seconds histogram\n\
                        took_seconds_bucket{route=\"/\",le=\"0.1\"} 2\n\
                        took_seconds_bucket{route=\"/\",le=\"1\"} 3\n\
                        took_seconds_bucket{route=\"/\",le=\"+Inf\"} 4\n\
                        took_seconds_sum{route=\"/\"} 7.65\n\
                        took_seconds_count{route=\"/\"} 4\n";
        assert_eq!(registry.render(), expected);
    }

    #[test]
    fn series_are_bounded() {
        let registry = Registry::default();
        let asked = registry.counters(&ASKED);
        for by in 0..2 * MAX_SERIES {
            asked.with(&[&by.to_string(), "x"]).inc();
        }
        let text = registry.render();
        assert_eq!(text.lines().filter(|line| line.starts_with("asked_total{")).count(), MAX_SERIES + 1);
        let other = format!("asked_total{{by=\"other\",how=\"other\"}} {MAX_SERIES}");
        assert!(text.lines().any(|line| line == other), "{text}");
    }

    #[test]
    fn concurrent_updates_are_all_counted() {
        let registry = Registry::default();
        let (counter, gauge) = (registry.counter(&ASKED), registry.gauge(&PEERS));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..10_000 {
                        counter.inc();
                        gauge.add(1.0);
                    }
                });
            }
        });
        assert_eq!((counter.get(), gauge.get()), (40_000, 40_000.0));
    }

    #[test]
    fn names_are_checked() {
        assert!(is_name("chorus_http_requests_total"));
        for bad in ["", "1st", "_hidden", "a-b", "a b", "ä"] {
            assert!(!is_name(bad), "{bad}");
        }
    }
}
