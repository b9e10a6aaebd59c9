//! Measures how fast short rollouts are sampled, and what a swap of versions under load costs.
//!
//! ```text
//! swap_bench [POLICY] [SWAPS]   by default the trainer's arithmetic policy, and 100 swaps
//! ```
//!
//! 1. *Throughput*: rollouts of 8 prompt tokens and at most 8 drawn ones, by one caller and by several.
//! 2. *Swaps*: versions with slightly different weights are written to disk and loaded one after the other while callers
//!    go on asking. Every answer must be the one that the version it names gives alone: the others are *mixed*. Requests
//!    that fail are *dropped*.
#![allow(clippy::unwrap_used, missing_docs, reason = "a benchmark may stop at the first fault")]

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use chorus_engine::{Order, SampleRequest, SampledRollout, Sampling, VersionedConfig, VersionedEngine};
use chorus_protocol::{Hash, policy::Version};
use futures::future::join_all;
use tokio_util::sync::CancellationToken;

const POLICY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../trainer/policies/arithmetic-2");
const SWAPS: u64 = 100;
const ROUND: Duration = Duration::from_secs(2);
const ROUNDS: usize = 5;
const CALLERS: u64 = 4;
/// Different requests, by seed.
const REQUESTS: u64 = 16;
const MAX_TOKENS: u32 = 8;
/// Between two swaps.
const PAUSE: Duration = Duration::from_millis(50);

#[tokio::main]
async fn main() {
    let mut args = std::env::args().skip(1);
    let policy = args.next().map_or_else(|| PathBuf::from(POLICY), PathBuf::from);
    let swaps = args.next().map_or(SWAPS, |text| text.parse().unwrap());
    println!("{}", policy.display());
    throughput(&policy).await;
    swapping(&policy, swaps).await;
}

fn engine() -> Arc<VersionedEngine> {
    Arc::new(VersionedEngine::new(VersionedConfig { max_queued: 1_024, ..VersionedConfig::new("bench") }))
}

fn version(number: u64) -> Version {
    Version::from_hash(Hash::derive("swap bench", &[&number.to_le_bytes()]))
}

/// Eight printable bytes, which are their own token ids.
fn request(seed: u64) -> SampleRequest {
    let prompt = format!("{:03}+{:03}=", seed * 7 % 1000, seed * 13 % 1000);
    let sampling = Sampling::seeded(seed, 1.0);
    SampleRequest { prompt: prompt.bytes().map(u32::from).collect(), max_tokens: MAX_TOKENS, sampling, exactly: None }
}

async fn sample(engine: &VersionedEngine, seed: u64) -> Result<SampledRollout, chorus_engine::EngineError> {
    engine.sample(request(seed), CancellationToken::new()).await
}

/// Median, least and most.
fn spread(mut values: Vec<f64>) -> String {
    values.sort_by(f64::total_cmp);
    format!("{:.1} [{:.1} {:.1}]", values[values.len() / 2], values[0], values[values.len() - 1])
}

async fn throughput(policy: &Path) {
    let engine = engine();
    engine.load(version(0), 0, policy, Order::Forward).await.unwrap();
    for callers in [1, CALLERS] {
        let (mut rollouts, mut tokens) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let started = Instant::now();
            let calling = (0..callers).map(|caller| {
                let engine = Arc::clone(&engine);
                tokio::spawn(async move {
                    let mut made = (0u32, 0usize);
                    let mut seed = caller;
                    while started.elapsed() < ROUND {
                        made.0 += 1;
                        made.1 += sample(&engine, seed).await.unwrap().tokens.len();
                        seed += callers;
                    }
                    made
                })
            });
            let made: Vec<(u32, usize)> = join_all(calling).await.into_iter().map(Result::unwrap).collect();
            let seconds = started.elapsed().as_secs_f64();
            rollouts.push(made.iter().map(|made| f64::from(made.0)).sum::<f64>() / seconds);
            tokens.push(made.iter().map(|made| made.1 as f64).sum::<f64>() / seconds);
        }
        println!("{callers} callers: {} rollouts/s, {} sampled tokens/s", spread(rollouts), spread(tokens));
    }
}

/// Writes the policy with its first tensors changed a little, so that its answers are its own.
fn write_version(policy: &Path, to: &Path, number: u64) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(policy).unwrap() {
        let entry = entry.unwrap();
        let mut bytes = std::fs::read(entry.path()).unwrap();
        if entry.file_name() == "model.safetensors" {
            let data = 8 + usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
            for value in bytes[data..].as_chunks_mut().0.iter_mut().take(4_096) {
                *value = (f32::from_le_bytes(*value) * (1.0 + number as f32 * 1e-3)).to_le_bytes();
            }
        }
        std::fs::write(to.join(entry.file_name()), bytes).unwrap();
    }
}

/// What callers share.
struct Traffic {
    engine: Arc<VersionedEngine>,
    answers: Mutex<Vec<(u64, Instant, SampledRollout)>>,
    dropped: AtomicU64,
    over: AtomicBool,
}

impl Traffic {
    async fn call(&self, mut seed: u64) {
        while !self.over.load(Ordering::Relaxed) {
            match sample(&self.engine, seed % REQUESTS).await {
                Ok(answer) => self.answers.lock().unwrap().push((seed % REQUESTS, Instant::now(), answer)),
                Err(error) => {
                    eprintln!("dropped: {error}");
                    self.dropped.fetch_add(1, Ordering::Relaxed);
                }
            }
            seed += CALLERS;
        }
    }
}

async fn swapping(policy: &Path, swaps: u64) {
    let directory = std::env::temp_dir().join(format!("chorus-swap-bench-{}", std::process::id()));
    let place = |number: u64| directory.join(number.to_string());
    write_version(policy, &place(0), 0);
    let traffic = Arc::new(Traffic {
        engine: engine(),
        answers: Mutex::default(),
        dropped: AtomicU64::new(0),
        over: AtomicBool::new(false),
    });
    traffic.engine.load(version(0), 0, &place(0), Order::Forward).await.unwrap();
    let calling: Vec<_> = (0..CALLERS)
        .map(|caller| {
            let traffic = Arc::clone(&traffic);
            tokio::spawn(async move { traffic.call(caller).await })
        })
        .collect();
    let memory_before = resident_megabytes();
    let (mut published, mut took) = (BTreeMap::new(), Vec::new());
    for number in 1..=swaps {
        write_version(policy, &place(number), number);
        published.insert(version(number), Instant::now());
        let swap = traffic.engine.load(version(number), number, &place(number), Order::Forward).await.unwrap();
        took.push((swap.loaded_in, swap.probed_in, swap.waited));
        tokio::time::sleep(PAUSE).await;
    }
    traffic.over.store(true, Ordering::Relaxed);
    for caller in calling {
        caller.await.unwrap();
    }
    let milliseconds = |of: &dyn Fn(&(Duration, Duration, Duration)) -> Duration| {
        spread(took.iter().map(|took| of(took).as_secs_f64() * 1e3).collect())
    };
    println!(
        "{swaps} swaps under {CALLERS} callers, in ms: loading {}, first token {}, waiting {}",
        milliseconds(&|took| took.0),
        milliseconds(&|took| took.1),
        milliseconds(&|took| took.2)
    );
    let answers = std::mem::take(&mut *traffic.answers.lock().unwrap());
    let firsts = published.iter().map(|(version, at)| {
        let first = answers.iter().find(|(_, _, answer)| answer.version == *version);
        first.map_or(f64::INFINITY, |(_, answered, _)| (*answered - *at).as_secs_f64() * 1e3)
    });
    println!("files on disk to first answer of the new version, in ms: {}; target 1000", spread(firsts.collect()));
    let mixed = mixed(&answers, swaps, &place).await;
    println!(
        "{} answers, dropped {}, mixed {mixed}; resident memory {memory_before} MB before, {} MB after",
        answers.len(),
        traffic.dropped.load(Ordering::Relaxed),
        resident_megabytes()
    );
    std::fs::remove_dir_all(&directory).unwrap();
}

/// How many answers are not the one that the version they name gives alone.
async fn mixed(answers: &[(u64, Instant, SampledRollout)], swaps: u64, place: &dyn Fn(u64) -> PathBuf) -> usize {
    let mut mixed = 0;
    for number in 0..=swaps {
        let alone = engine();
        alone.load(version(number), number, &place(number), Order::Forward).await.unwrap();
        let mut expected = Vec::new();
        for seed in 0..REQUESTS {
            expected.push(sample(&alone, seed).await.unwrap());
        }
        let of_it = answers.iter().filter(|(_, _, answer)| answer.version == version(number));
        mixed += of_it.filter(|(seed, _, answer)| expected[usize::try_from(*seed).unwrap()] != *answer).count();
    }
    mixed
}

fn resident_megabytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|kilobytes| kilobytes.parse::<u64>().ok()).unwrap_or(0) / 1024
}
