//! Versions against real engines: tiny models of random weights, and the trainer's arithmetic policy.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::sync::atomic::AtomicBool;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::llama::{Cache, Llama, LlamaConfig};
use chorus_protocol::Hash;
use futures::future::join_all;
use tempfile::TempDir;

use super::*;
use crate::{ChatMessage, run::nobody, testing};

/// One byte, one token; 256 ends an answer.
const ARITHMETIC: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../trainer/policies/arithmetic-2");
const ARITHMETIC_END: u32 = 256;

fn version(number: u64) -> Version {
    Version::from_hash(Hash::derive("versions test", &[&number.to_le_bytes()]))
}

fn config() -> VersionedConfig {
    VersionedConfig { restart_wait: Duration::from_secs(5), ..VersionedConfig::new("policy") }
}

/// Models of different weights, by seed.
struct Models(TempDir);

impl Models {
    fn write(seeds: std::ops::Range<u64>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for seed in seeds {
            testing::write_tiny_model(&dir.path().join(seed.to_string()), seed).unwrap();
        }
        Self(dir)
    }

    fn at(&self, seed: u64) -> PathBuf {
        self.0.path().join(seed.to_string())
    }

    /// An engine that serves the model with this seed as the version and the step of the same number.
    async fn serving(&self, seed: u64) -> VersionedEngine {
        let engine = VersionedEngine::new(config());
        self.load(&engine, seed).await.unwrap();
        engine
    }

    async fn load(&self, engine: &VersionedEngine, seed: u64) -> Result<Swap, EngineError> {
        engine.load(version(seed), seed, &self.at(seed), Order::Forward).await
    }
}

fn request(seed: u64, max_tokens: u32) -> SampleRequest {
    SampleRequest {
        prompt: vec![104, 105, 106 + u32::try_from(seed % 20).unwrap()],
        max_tokens,
        sampling: Sampling::seeded(seed, 1.0),
        exactly: None,
    }
}

async fn sample(engine: &VersionedEngine, request: SampleRequest) -> Result<SampledRollout, EngineError> {
    engine.sample(request, CancellationToken::new()).await
}

async fn chat(engine: &VersionedEngine, max_tokens: u32) -> Result<Generated, EngineError> {
    let request = GenerateRequest {
        sampling: Sampling::seeded(3, 1.0),
        ..GenerateRequest::new(vec![ChatMessage::user("hello")], max_tokens)
    };
    engine.generate(request, nobody(), CancellationToken::new()).await
}

#[tokio::test]
async fn before_the_first_version_a_request_may_be_tried_again() {
    let engine = VersionedEngine::new(config());
    assert_eq!((engine.serving(), engine.info()), (None, Vec::new()));
    for error in [sample(&engine, request(1, 3)).await.unwrap_err(), chat(&engine, 3).await.unwrap_err()] {
        assert_eq!(error, EngineError::NothingServes { model: "policy".to_owned() });
        assert!(error.is_retryable() && error.is_retryable_elsewhere());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_runs_finishes_on_its_version_and_the_next_is_on_the_new_one() {
    let models = Models::write(0..2);
    let (old, new) = (models.serving(0).await, models.serving(1).await);
    let (on_old, on_new) = (chat(&old, 600).await.unwrap(), chat(&new, 600).await.unwrap());
    assert_ne!(on_old.text, on_new.text);

    let engine = models.serving(0).await;
    let swapping = async {
        while Engine::load(&engine).running == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let swap = models.load(&engine, 1).await.unwrap();
        assert_eq!(swap.replaced, Some((version(0), 0)));
        assert_eq!(engine.serving(), Some((version(1), 1)));
        assert_eq!(Engine::load(&engine).running, 1, "the answer ended before the swap: it must be longer");
        // It waits for the slot, and is begun after the swap.
        chat(&engine, 600).await.unwrap()
    };
    let (in_flight, later) = tokio::join!(chat(&engine, 600), swapping);
    let in_flight = in_flight.unwrap();
    assert_eq!(
        (in_flight.token_ids, in_flight.model.fingerprint),
        (on_old.token_ids, *version(0).as_hash().as_bytes())
    );
    assert_eq!((later.token_ids, later.model.fingerprint), (on_new.token_ids, *version(1).as_hash().as_bytes()));
    assert_eq!(engine.info()[0].name, "policy");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_waits_while_versions_change_is_answered_by_the_newest() {
    let models = Models::write(0..2);
    let engine = models.serving(0).await;
    let long = chat(&engine, 600);
    let waiting = async {
        while Engine::load(&engine).running == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let swap = async {
            while Engine::load(&engine).queued == 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            models.load(&engine, 1).await.unwrap();
        };
        let (answer, ()) = tokio::join!(sample(&engine, request(1, 4)), swap);
        answer.unwrap()
    };
    let (long, waited) = tokio::join!(long, waiting);
    assert_eq!(long.unwrap().model.fingerprint, *version(0).as_hash().as_bytes());
    assert_eq!((waited.version, waited.step), (version(1), 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_swaps_under_load_drop_nothing_and_mix_nothing() {
    const SWAPS: u64 = 100;
    const WEIGHTS: u64 = 4;
    const REQUESTS: u64 = 6;
    let models = Models::write(0..WEIGHTS);
    let mut alone = Vec::new();
    for seed in 0..WEIGHTS {
        let engine = models.serving(seed).await;
        let answers = join_all((0..REQUESTS).map(|index| sample(&engine, request(index, 6)))).await;
        alone.push(answers.into_iter().map(|answer| answer.unwrap()).collect::<Vec<_>>());
    }
    let engine = models.serving(0).await;
    let over = AtomicBool::new(false);
    let calling = (0..3).map(|caller| {
        let (engine, over, alone) = (&engine, &over, &alone);
        async move {
            let (mut answered, mut last_step) = (0, 0);
            while !over.load(Ordering::Relaxed) {
                let index = (caller + answered) % REQUESTS;
                let answer = sample(engine, request(index, 6)).await.unwrap();
                let expected = &alone[usize::try_from(answer.step % WEIGHTS).unwrap()][usize::try_from(index).unwrap()];
                assert_eq!((&answer.tokens, &answer.logprobs), (&expected.tokens, &expected.logprobs));
                assert_eq!(answer.version, version(answer.step));
                assert!(answer.step >= last_step, "it went back");
                last_step = answer.step;
                answered += 1;
            }
            answered
        }
    });
    let swapping = async {
        for step in 1..=SWAPS {
            engine.load(version(step), step, &models.at(step % WEIGHTS), Order::Forward).await.unwrap();
        }
        over.store(true, Ordering::Relaxed);
    };
    let (answered, ()) = tokio::join!(join_all(calling), swapping);
    assert!(answered.iter().all(|&answered| answered > SWAPS / 4), "{answered:?}");
    assert_eq!(engine.serving(), Some((version(SWAPS), SWAPS)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_that_is_damaged_never_serves() {
    let models = Models::write(0..1);
    let engine = models.serving(0).await;
    let before = sample(&engine, request(1, 6)).await.unwrap();
    let damages: [(&str, fn(&Path)); 7] = [
        ("weights cut short", |dir| {
            let weights = std::fs::read(dir.join("model.safetensors")).unwrap();
            std::fs::write(dir.join("model.safetensors"), &weights[..weights.len() / 2]).unwrap();
        }),
        ("weights of zeros", |dir| std::fs::write(dir.join("model.safetensors"), [0; 4096]).unwrap()),
        ("a weight that is no number", |dir| {
            let mut weights = std::fs::read(dir.join("model.safetensors")).unwrap();
            let end = weights.len();
            weights[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
            std::fs::write(dir.join("model.safetensors"), weights).unwrap();
        }),
        ("no weights", |dir| std::fs::remove_file(dir.join("model.safetensors")).unwrap()),
        ("no configuration", |dir| std::fs::remove_file(dir.join("config.json")).unwrap()),
        ("layers that are not there", |dir| replace(&dir.join("config.json"), "_layers\":4", "_layers\":5")),
        ("a token beyond the vocabulary", |dir| replace(&dir.join("tokenizer.json"), "\"id\":3", "\"id\":900")),
    ];
    for (number, (what, damage)) in (1..).zip(damages) {
        let dir = tempfile::tempdir().unwrap();
        testing::write_tiny_model(dir.path(), 1).unwrap();
        damage(dir.path());
        let error = engine.load(version(number), number, dir.path(), Order::Forward).await.unwrap_err();
        assert!(
            matches!(error, EngineError::ModelCorrupt { .. } | EngineError::ModelNotFound { .. }),
            "{what}: {error}"
        );
        assert_eq!(engine.serving(), Some((version(0), 0)), "{what}");
        assert_eq!(sample(&engine, request(1, 6)).await.unwrap(), before, "{what}");
    }
}

fn replace(path: &Path, from: &str, to: &str) {
    let text = std::fs::read_to_string(path).unwrap();
    assert!(text.contains(from), "{from}");
    std::fs::write(path, text.replacen(from, to, 1)).unwrap();
}

/// Finite weights whose products are not: only running the model shows it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_whose_logits_are_no_numbers_never_serves() {
    let models = Models::write(0..2);
    let engine = models.serving(0).await;
    let file = models.at(1).join("model.safetensors");
    let mut weights = std::fs::read(&file).unwrap();
    let head = crate::source::safetensors_header(&file).unwrap();
    let head = head.iter().find(|tensor| tensor.name == "lm_head.weight").unwrap();
    let bytes = usize::try_from(head.bytes.start).unwrap()..usize::try_from(head.bytes.end).unwrap();
    for value in weights[bytes].as_chunks_mut().0 {
        *value = (f32::from_le_bytes(*value).signum() * f32::MAX).to_le_bytes();
    }
    std::fs::write(&file, weights).unwrap();
    let error = models.load(&engine, 1).await.unwrap_err();
    assert!(matches!(&error, EngineError::ModelCorrupt { reason, .. } if reason.contains("not numbers")), "{error}");
    assert_eq!(engine.serving(), Some((version(0), 0)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_older_step_serves_only_when_it_is_asked_for_exactly() {
    let models = Models::write(0..3);
    let engine = models.serving(2).await;
    let error = models.load(&engine, 1).await.unwrap_err();
    assert_eq!(error, EngineError::OlderVersion { step: 1, serving: 2 });
    assert!(!error.is_retryable());
    assert_eq!(engine.serving(), Some((version(2), 2)));
    let swap = engine.load(version(1), 1, &models.at(1), Order::Exactly).await.unwrap();
    assert_eq!((swap.replaced, engine.serving()), (Some((version(2), 2)), Some((version(1), 1))));
    // The one that serves already is not loaded again, not even from a place that is gone.
    let again = engine.load(version(1), 1, Path::new("/nowhere"), Order::Forward).await.unwrap();
    assert_eq!((again.replaced, again.loaded_in), (None, Duration::ZERO));

    // Whatever the order in which loads are asked for, the newest step stays.
    let engine = models.serving(0).await;
    let (newer, older) = tokio::join!(models.load(&engine, 2), models.load(&engine, 1));
    assert!(newer.is_ok());
    assert_eq!(older.unwrap_err(), EngineError::OlderVersion { step: 1, serving: 2 });
    let engine = models.serving(0).await;
    let (older, newer) = tokio::join!(models.load(&engine, 1), models.load(&engine, 2));
    assert_eq!((older.unwrap().step, newer.unwrap().replaced), (1, Some((version(1), 1))));
    assert_eq!(engine.serving(), Some((version(2), 2)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_may_name_the_version_that_must_answer() {
    let models = Models::write(0..2);
    let engine = models.serving(0).await;
    let exactly = |number| SampleRequest { exactly: Some(version(number)), ..request(1, 4) };
    assert_eq!(sample(&engine, exactly(0)).await.unwrap().version, version(0));
    let refused = sample(&engine, exactly(1)).await.unwrap_err();
    assert_eq!(refused, EngineError::OtherVersion { wanted: version(1), serving: version(0) });
    models.load(&engine, 1).await.unwrap();
    assert_eq!(sample(&engine, exactly(1)).await.unwrap().version, version(1));
    assert!(sample(&engine, exactly(0)).await.is_err());
    // The engine's thread gives a slot back a moment after the answer.
    let free = async {
        while Engine::load(&engine).running > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), free).await.expect("a refused request leaves no slot taken");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_third_retired_version_waits_for_the_oldest() {
    let models = Models::write(0..4);
    let engine = VersionedEngine::new(VersionedConfig { retire_wait: Duration::from_millis(300), ..config() });
    models.load(&engine, 0).await.unwrap();
    // What a request holds while it runs.
    let first = engine.current();
    models.load(&engine, 1).await.unwrap();
    let second = engine.current();
    models.load(&engine, 2).await.unwrap();
    let error = models.load(&engine, 3).await.unwrap_err();
    assert!(matches!(error, EngineError::Timeout { .. }) && error.is_retryable(), "{error}");
    assert_eq!(engine.serving(), Some((version(2), 2)));
    let letting_go = async {
        // Long enough for the version to be loaded before.
        tokio::time::sleep(Duration::from_millis(250)).await;
        drop(first);
    };
    let (swap, ()) = tokio::join!(models.load(&engine, 3), letting_go);
    let swap = swap.unwrap();
    assert!(swap.total() >= Duration::from_millis(250), "{swap:?}");
    assert_eq!(engine.serving(), Some((version(3), 3)));
    drop(second);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_version_that_crashes_is_restarted_like_any() {
    let models = Models::write(0..2);
    let engine = models.serving(0).await;
    models.load(&engine, 1).await.unwrap();
    let before = sample(&engine, request(1, 8)).await.unwrap();
    testing::panic_after(&engine.current().unwrap().engine, 3);
    let error = sample(&engine, request(1, 8)).await.unwrap_err();
    assert!(matches!(error, EngineError::Crashed { .. }), "{error}");
    assert_eq!(sample(&engine, request(1, 8)).await.unwrap(), before);
    assert_eq!(Engine::load(&engine).restarts, 1);
    engine.load(version(0), 0, &models.at(0), Order::Exactly).await.unwrap();
    assert_eq!(Engine::load(&engine).restarts, 1, "a swap forgets no restart");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rollouts_are_whole_and_their_probabilities_are_those_that_scoring_gives() {
    let engine = VersionedEngine::new(config());
    engine.load(version(0), 7, Path::new(ARITHMETIC), Order::Forward).await.unwrap();
    let (mut stopped, mut cut, mut ended_at_once) = (0, 0, 0);
    for seed in 0..60 {
        // The policy's own answer to half of them is nothing but the end.
        let prompt = if seed % 2 == 0 { "7+8=" } else { "7+8=15" };
        let prompt: Vec<u32> = prompt.bytes().map(u32::from).collect();
        let temperature = [0.0, 0.7, 1.0, 1.5][usize::try_from(seed % 4).unwrap()];
        let sampling = Sampling::seeded(seed, temperature);
        let wanted = SampleRequest {
            prompt: prompt.clone(),
            max_tokens: 1 + u32::try_from(seed % 5).unwrap(),
            sampling,
            exactly: None,
        };
        let rollout = sample(&engine, wanted.clone()).await.unwrap();
        assert_eq!((rollout.version, rollout.step), (version(0), 7));
        assert_eq!(rollout.tokens.len(), rollout.logprobs.len());
        let ends = rollout.tokens.iter().filter(|&&token| token == ARITHMETIC_END).count();
        match rollout.finish {
            Finish::Stop => {
                assert_eq!((ends, rollout.tokens.last()), (1, Some(&ARITHMETIC_END)), "{rollout:?}");
                stopped += 1;
                ended_at_once += u32::from(rollout.tokens.len() == 1);
            }
            Finish::Length => {
                assert_eq!((ends, rollout.tokens.len()), (0, wanted.max_tokens as usize), "{rollout:?}");
                cut += 1;
            }
            Finish::Cancelled => panic!("{rollout:?}"),
        }
        let never = CancellationToken::new();
        let (scored, by) = engine.score(prompt, &rollout.tokens, Some(version(0)), never).await.unwrap();
        assert_eq!((scored, by), (rollout.logprobs, version(0)), "temperature {temperature}");
    }
    assert!(stopped > 5 && cut > 5 && ended_at_once > 5, "{stopped} stopped, {cut} cut, {ended_at_once} at once");
}

/// The policy in plain candle, without a cache: in single precision, what its trainer computes.
fn reference(prompt: &[u32], tokens: &[u32], dtype: DType) -> Vec<f32> {
    let device = Device::Cpu;
    let directory = Path::new(ARITHMETIC);
    let config: LlamaConfig = serde_json::from_slice(&std::fs::read(directory.join("config.json")).unwrap()).unwrap();
    let config = config.into_config(false);
    let weights = std::fs::read(directory.join("model.safetensors")).unwrap();
    let model = Llama::load(VarBuilder::from_buffered_safetensors(weights, dtype, &device).unwrap(), &config).unwrap();
    let mut cache = Cache::new(false, dtype, &config, &device).unwrap();
    let logprob = |(done, &token): (usize, &u32)| {
        let context = [prompt, &tokens[..done]].concat();
        let context = Tensor::new(context, &device).unwrap().unsqueeze(0).unwrap();
        let logits = model.forward(&context, 0, &mut cache).unwrap();
        let logits = logits.to_dtype(DType::F32).unwrap();
        let logprobs = candle_nn::ops::log_softmax(&logits, candle_core::D::Minus1).unwrap();
        logprobs.to_vec2::<f32>().unwrap()[0][token as usize]
    };
    tokens.iter().enumerate().map(logprob).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn probabilities_are_those_of_the_weights_as_they_are_stored() {
    let engine = VersionedEngine::new(config());
    engine.load(version(0), 0, Path::new(ARITHMETIC), Order::Forward).await.unwrap();
    let farthest = |ours: &[f32], theirs: &[f32]| {
        ours.iter().zip(theirs).map(|(ours, theirs)| (ours - theirs).abs()).fold(0.0_f32, f32::max)
    };
    let (mut single, mut half) = (0.0_f32, 0.0_f32);
    for seed in 0..20 {
        let prompt: Vec<u32> = format!("{}+{}=", 3 * seed, 5 * seed).bytes().map(u32::from).collect();
        let sampling = Sampling::seeded(seed, 1.3);
        let wanted = SampleRequest { prompt: prompt.clone(), max_tokens: 6, sampling, exactly: None };
        let rollout = sample(&engine, wanted).await.unwrap();
        single = single.max(farthest(&rollout.logprobs, &reference(&prompt, &rollout.tokens, DType::F32)));
        half = half.max(farthest(&rollout.logprobs, &reference(&prompt, &rollout.tokens, DType::F16)));
    }
    println!("farthest from single precision {single:.1e}, from half precision {half:.1e}");
    assert!(single < 1e-4 && half > 10.0 * single, "{single} {half}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_make_no_sense_are_refused() {
    let engine = VersionedEngine::new(config());
    engine.load(version(0), 0, Path::new(ARITHMETIC), Order::Forward).await.unwrap();
    let changes: [fn(&mut SampleRequest); 4] = [
        |request| request.prompt.clear(),
        |request| request.prompt.push(264),
        |request| request.max_tokens = 0,
        |request| request.sampling.temperature = f32::NAN,
    ];
    for change in changes {
        let mut bad = request(1, 4);
        change(&mut bad);
        let error = sample(&engine, bad.clone()).await.unwrap_err();
        assert!(matches!(error, EngineError::InvalidRequest { .. }), "{bad:?}: {error}");
    }
    let long = SampleRequest { prompt: vec![50; 256], ..request(1, 4) };
    assert!(matches!(sample(&engine, long).await.unwrap_err(), EngineError::ContextExceeded { .. }));
    let score = |tokens: Vec<u32>| {
        let engine = &engine;
        async move { engine.score(vec![50], &tokens, None, CancellationToken::new()).await }
    };
    for tokens in [vec![], vec![300], vec![ARITHMETIC_END, 50]] {
        let error = score(tokens.clone()).await.unwrap_err();
        assert!(matches!(error, EngineError::InvalidRequest { .. }), "{tokens:?}: {error}");
    }
    let cancelled = CancellationToken::new();
    cancelled.cancel();
    assert_eq!(engine.sample(request(1, 4), cancelled).await.unwrap_err(), EngineError::Cancelled);
    assert_eq!(sample(&engine, request(1, 4)).await.unwrap().step, 0, "it still works");
}
