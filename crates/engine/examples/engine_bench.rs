//! Measures the engine, in one run each, and prints ratios.
//!
//! ```text
//! engine_bench overhead [MODEL] [N]   tokens/s through MistralEngine against mistral.rs called directly
//! engine_bench quantisations [DIR]    speed and quality of Q4_1, Q8_0 and Q4_0; makes what is missing
//! ```
//!
//! `overhead` interleaves both ways and repeats them N times, so that what else the machine does hits both.
//! With 8 requests at once mistral.rs is measured twice: with prompts of one length, which it decodes
//! as one batch (and, on a CPU, wrongly: see the `mistral` module), and with prompts of different
//! lengths, which it decodes in turns.
#![allow(clippy::unwrap_used, missing_docs, reason = "a benchmark may stop at the first fault")]

use std::{ops::Range, path::PathBuf, sync::Arc, time::Instant};

use chorus_engine::{
    ChatMessage, Engine, GenerateRequest, MistralConfig, MistralEngine, ModelSource, QuantKind, Sampling, requantize,
    testing,
};
use futures::future::join_all;
use mistralrs::{
    Constraint, GgufModelBuilder, Model, NormalRequest, Request, RequestMessage, Response, SamplingParams,
    TextMessageRole, TextMessages, TextModelBuilder,
};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

const REPETITIONS: usize = 5;
const TOKENS: u32 = 48;
const MANY: usize = 8;
const PROMPT: &str = "Write a long story about a lighthouse keeper and the sea.";

#[tokio::main]
async fn main() {
    let mut args = std::env::args().skip(1);
    let command = args.next().unwrap_or_else(|| "overhead".to_owned());
    let path = args.next().map(PathBuf::from);
    match command.as_str() {
        "overhead" => {
            let repetitions = args.next().map_or(REPETITIONS, |text| text.parse().unwrap());
            overhead(path.unwrap_or_else(default_language_model), repetitions).await;
        }
        "quantisations" => quantisations(path.unwrap_or_else(testing::models_dir)).await,
        _ => {
            eprintln!("usage: engine_bench overhead [MODEL] [N] | quantisations [DIR]");
            std::process::exit(2);
        }
    }
}

fn default_language_model() -> PathBuf {
    let fast = testing::default_model("SmolLM2-135M-Instruct.Q8_0.gguf");
    fast.or_else(|_| testing::default_model("SmolLM2-135M-Instruct.Q4_1.gguf")).unwrap()
}

async fn open(path: &std::path::Path) -> MistralEngine {
    let mut config = MistralConfig::new(ModelSource::parse(path.to_str().unwrap()).unwrap());
    config.max_concurrent = MANY;
    MistralEngine::open(config).await.unwrap()
}

async fn open_direct(path: &std::path::Path) -> Model {
    if path.is_dir() {
        let builder = TextModelBuilder::new(path.to_str().unwrap());
        return builder.with_prefix_cache_n(None).build().await.unwrap();
    }
    let (dir, file) = (path.parent().unwrap().to_str().unwrap(), path.file_name().unwrap());
    let builder = GgufModelBuilder::new(dir, vec![file.to_str().unwrap()]);
    builder.with_prefix_cache_n(None).build().await.unwrap()
}

fn prompt(index: usize, same_length: bool) -> String {
    if same_length { format!("{PROMPT} Number {index}.") } else { format!("{PROMPT}{}", " And?".repeat(index)) }
}

/// What a round brought: tokens per second, and the texts.
type Round = (f64, Vec<String>);

fn round(started: Instant, answers: Vec<(u32, String)>) -> Round {
    let tokens: u32 = answers.iter().map(|(tokens, _)| tokens).sum();
    let rate = f64::from(tokens) / started.elapsed().as_secs_f64();
    (rate, answers.into_iter().map(|(_, text)| text).collect())
}

/// These requests at once through the engine.
async fn through_engine(engine: &MistralEngine, requests: Range<usize>, same: bool, sampling: Sampling) -> Round {
    let started = Instant::now();
    let generating = requests.map(|index| async move {
        let messages = vec![ChatMessage::user(prompt(index, same))];
        let request = GenerateRequest { sampling, ..GenerateRequest::new(messages, TOKENS) };
        let (sender, mut receiver) = mpsc::channel(64);
        let generating = engine.generate(request, sender, CancellationToken::new());
        let (generated, ()) = tokio::join!(generating, async { while receiver.recv().await.is_some() {} });
        let generated = generated.unwrap();
        (generated.completion_tokens, generated.text)
    });
    round(started, join_all(generating).await)
}

/// The same, asked of mistral.rs itself: streaming, greedy or by its own sampler.
async fn directly(model: &Model, requests: Range<usize>, same: bool, sampling: Sampling) -> Round {
    let started = Instant::now();
    let generating = requests.map(|index| async move {
        let (response, mut responses) = mpsc::channel(TOKENS as usize + 2);
        let messages = TextMessages::new().add_message(TextMessageRole::User, prompt(index, same));
        let request = NormalRequest {
            is_streaming: true,
            constraint: Constraint::None,
            ..NormalRequest::new_simple(
                RequestMessage::Chat { messages: messages.into(), enable_thinking: None, reasoning_effort: None },
                SamplingParams {
                    temperature: Some(f64::from(sampling.temperature)),
                    top_p: Some(f64::from(sampling.top_p)),
                    max_len: Some(TOKENS as usize),
                    ..SamplingParams::neutral()
                },
                response,
                0,
                None,
                None,
            )
        };
        let sender = model.inner().get_sender(None).unwrap();
        sender.send(Request::Normal(Box::new(request))).await.unwrap();
        let mut text = String::new();
        while let Some(Response::Chunk(chunk)) = responses.recv().await {
            text.extend(chunk.choices.iter().filter_map(|choice| choice.delta.content.clone()));
            if let Some(usage) = chunk.usage {
                return (u32::try_from(usage.completion_tokens).unwrap(), text);
            }
        }
        (0, text)
    });
    round(started, join_all(generating).await)
}

/// How many of these answers, given side by side, are those that the model gives when it is asked one thing at a time.
async fn like_alone(model: &Model, beside: &[String]) -> usize {
    let mut like = 0;
    for (index, text) in beside.iter().enumerate() {
        let (_, alone) = directly(model, index..index + 1, true, Sampling::greedy()).await;
        like += usize::from(alone[0] == *text);
    }
    like
}

/// Processor time of this process so far, in ticks of the system's clock.
fn processor_ticks() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    // Fields 14 and 15, user and system time; the name is field 2.
    after_name.split_whitespace().skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum()
}

/// Median, least and most.
fn spread(mut values: Vec<f64>) -> (f64, f64, f64) {
    values.sort_by(f64::total_cmp);
    (values[values.len() / 2], values[0], values[values.len() - 1])
}

async fn overhead(path: PathBuf, repetitions: usize) {
    let (engine, model) = (open(&path).await, open_direct(&path).await);
    println!(
        "{} ({repetitions} repetitions, {TOKENS} tokens; 1 request: {} repetitions)",
        path.display(),
        3 * repetitions
    );
    let sampled = Sampling { seed: 1, temperature: 0.8, top_p: 0.95, top_k: 0 };
    let cases = [
        ("1 request, greedy", 1, true, Sampling::greedy(), 0.97),
        ("1 request, sampled", 1, true, sampled, 0.97),
        ("8 requests of one length, greedy", MANY, true, Sampling::greedy(), 0.95),
        ("8 requests of other lengths, greedy", MANY, false, Sampling::greedy(), 0.95),
    ];
    for (name, requests, same, sampling, target) in cases {
        through_engine(&engine, 0..1, true, sampling).await;
        directly(&model, 0..1, true, sampling).await;
        let (mut ours, mut theirs, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        let (mut our_ticks, mut their_ticks) = (0.0, 0.0);
        let (mut our_texts, mut their_texts) = (Vec::new(), Vec::new());
        let repetitions = match (requests, same) {
            (1, _) => 3 * repetitions,
            (_, true) => repetitions,
            // Directly it takes minutes: mistral.rs copies the caches whenever it changes turns.
            (_, false) => repetitions.min(2),
        };
        for repetition in 0..repetitions {
            let (mut one, mut other) = (0.0, 0.0);
            for ours_now in [repetition % 2 == 0, repetition % 2 != 0] {
                let before = processor_ticks();
                if ours_now {
                    (one, our_texts) = through_engine(&engine, 0..requests, same, sampling).await;
                    our_ticks += processor_ticks() - before;
                } else {
                    (other, their_texts) = directly(&model, 0..requests, same, sampling).await;
                    their_ticks += processor_ticks() - before;
                }
            }
            ours.push(one);
            theirs.push(other);
            ratios.push(one / other);
        }
        let (ours, theirs, ratio) = (spread(ours), spread(theirs), spread(ratios));
        println!(
            "{name:<37} engine {:6.1} [{:.1} {:.1}]  direct {:6.1} [{:.1} {:.1}] tokens/s  \
             ratio {:.3} [{:.3} {:.3}]  target {target}  processor time {:.3}",
            ours.0,
            ours.1,
            ours.2,
            theirs.0,
            theirs.1,
            theirs.2,
            ratio.0,
            ratio.1,
            ratio.2,
            our_ticks / their_ticks
        );
        if requests > 1 && same {
            let (ours, theirs) = (like_alone(&model, &our_texts).await, like_alone(&model, &their_texts).await);
            println!("    answers as when asked alone: engine {ours} of {requests}, direct {theirs} of {requests}");
        }
    }
}

/// Questions with one short right answer, and a word of it.
const QUESTIONS: [(&str, &str); 20] = [
    ("What is the capital of France? Answer in one word.", "paris"),
    ("What is the capital of Japan? Answer in one word.", "tokyo"),
    ("What is the capital of Italy? Answer in one word.", "rome"),
    ("What is the capital of Egypt? Answer in one word.", "cairo"),
    ("What is the largest planet in the solar system?", "jupiter"),
    ("Which planet is known as the Red Planet?", "mars"),
    ("Who wrote Romeo and Juliet?", "shakespeare"),
    ("What gas do plants absorb from the air?", "carbon dioxide"),
    ("What is the chemical symbol for water?", "h2o"),
    ("What is the chemical symbol for gold?", "au"),
    ("How many days are there in a week?", "seven|7"),
    ("How many legs does a spider have?", "eight|8"),
    ("What is 2 + 3?", "5|five"),
    ("What is 7 + 6?", "13|thirteen"),
    ("What is 10 - 4?", "6|six"),
    ("What is the opposite of hot?", "cold"),
    ("What language is spoken in Brazil?", "portuguese"),
    ("What is the freezing point of water in Celsius?", "0|zero"),
    ("Which ocean is the largest?", "pacific"),
    ("What is the first month of the year?", "january"),
];

/// A text that the model is likely to know how to continue; scored token by token.
const FIXED_TEXT: &str = "The water cycle describes how water moves through the environment. Heat from \
    the sun causes water in oceans, lakes and rivers to evaporate and rise into the air as vapor. As \
    the vapor cools, it condenses into tiny droplets that form clouds. When the droplets become heavy \
    enough, they fall back to the ground as rain or snow. Some of the water flows over the land into \
    rivers and streams, while some of it soaks into the soil and becomes groundwater. Plants take up \
    water through their roots and release it through their leaves. Eventually most of the water returns \
    to the ocean, and the cycle begins again.";

async fn quantisations(dir: PathBuf) {
    let shipped = dir.join("SmolLM2-135M-Instruct.Q4_1.gguf");
    let mut files = vec![("Q4_1", shipped.clone())];
    for (name, kind) in [("Q8_0", QuantKind::Q8_0), ("Q4_0", QuantKind::Q4_0)] {
        let file = dir.join(format!("SmolLM2-135M-Instruct.{name}.gguf"));
        if !file.is_file() {
            let started = Instant::now();
            let done = requantize(&shipped, &file, kind).unwrap();
            println!("made {name}: {done:?} in {:.1} s", started.elapsed().as_secs_f64());
        }
        files.push((name, file));
    }
    let mut engines = Vec::new();
    for (name, file) in files {
        let started = Instant::now();
        let engine = Arc::new(open(&file).await);
        println!(
            "{name}: {:.0} MB, loaded in {:.2} s",
            engine.info()[0].bytes as f64 / 1e6,
            started.elapsed().as_secs_f64()
        );
        engines.push((name, engine, Vec::new(), Vec::new()));
    }
    // Interleaved, so that what else the machine does hits all of them.
    for _ in 0..REPETITIONS {
        for (_, engine, decode, prefill) in &mut engines {
            let speed = engine.calibrate().await.unwrap();
            decode.push(f64::from(speed.decode_tokens_per_s));
            prefill.push(f64::from(speed.prefill_tokens_per_s));
        }
    }
    for (name, engine, decode, prefill) in engines {
        let (mean_logprob, scored) = fixed_text(&engine).await;
        let started = Instant::now();
        let right = questions(&engine).await;
        let (decode, prefill) = (spread(decode), spread(prefill));
        println!(
            "{name}: decode {:.1} [{:.1} {:.1}] tokens/s, prompt {:.1} [{:.1} {:.1}] tokens/s, \
             {:.4} nats a token over {scored}, {right}/{} right in {:.1} s",
            decode.0,
            decode.1,
            decode.2,
            prefill.0,
            prefill.1,
            prefill.2,
            -mean_logprob,
            QUESTIONS.len(),
            started.elapsed().as_secs_f64()
        );
    }
}

async fn fixed_text(engine: &MistralEngine) -> (f64, usize) {
    let tokens = engine.tokenize(FIXED_TEXT).await.unwrap();
    let messages = [ChatMessage::user("Explain the water cycle.")];
    let scores = engine.score(&messages, &tokens, CancellationToken::new()).await.unwrap();
    (scores.iter().map(|&score| f64::from(score)).sum::<f64>() / scores.len() as f64, scores.len())
}

async fn questions(engine: &MistralEngine) -> usize {
    let mut right = 0;
    for (question, answers) in QUESTIONS {
        let request = GenerateRequest::new(vec![ChatMessage::user(question)], 48);
        let (nobody, _) = mpsc::channel(1);
        let generated = engine.generate(request, nobody, CancellationToken::new()).await.unwrap();
        let text = generated.text.to_lowercase();
        let words: Vec<&str> = text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).collect();
        let spaced = format!(" {} ", words.join(" "));
        right += usize::from(answers.split('|').any(|answer| spaced.contains(&format!(" {answer} "))));
    }
    right
}
