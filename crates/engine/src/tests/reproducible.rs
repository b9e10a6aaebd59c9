//! The same seed gives the same tokens, alone or in company.

use futures::future::join_all;

use super::*;

const ANSWER_TOKENS: u32 = 48;

fn request(text: &str, seed: u64) -> GenerateRequest {
    GenerateRequest { logprobs: true, ..sampled(text, ANSWER_TOKENS, seed) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_seed_gives_one_answer_and_another_gives_another() {
    let tiny = Tiny::open().await;
    let first = tiny.generate(request("hello", 1)).await.unwrap();
    for _ in 0..3 {
        let again = tiny.generate(request("hello", 1)).await.unwrap();
        assert_eq!((again.token_ids, again.logprobs), (first.token_ids.clone(), first.logprobs.clone()));
    }
    let other = tiny.generate(request("hello", 2)).await.unwrap();
    assert_ne!(other.token_ids, first.token_ids);
    // What was asked in between leaves no trace.
    tiny.generate(request("hello, and something else", 9)).await.unwrap();
    assert_eq!(tiny.generate(request("hello", 1)).await.unwrap().token_ids, first.token_ids);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_engines_with_the_same_weights_agree() {
    let (one, other) = tokio::join!(Tiny::open(), Tiny::open());
    let (a, b) = (one.generate(request("hi", 4)).await.unwrap(), other.generate(request("hi", 4)).await.unwrap());
    assert_eq!((a.token_ids, a.model.fingerprint), (b.token_ids, b.model.fingerprint));
}

/// A request that is given up must be out of the engine before the next one of equal length is in.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_request_leaves_no_trace_in_the_next() {
    let tiny = Tiny::open().await;
    let alone = tiny.generate(request("prompt number 1", 1)).await.unwrap();
    for after in 1..12 {
        let (sender, mut receiver) = mpsc::channel(1);
        let cancel = CancellationToken::new();
        let given_up = tiny.engine.generate(request("prompt number 2", 2), sender, cancel.clone());
        let ((), result) = tokio::join!(
            async {
                for _ in 0..after {
                    receiver.recv().await;
                }
                cancel.cancel();
            },
            given_up
        );
        drop(result);
        let next = tiny.generate(request("prompt number 1", 1)).await.unwrap();
        assert_eq!((next.token_ids, next.logprobs), (alone.token_ids.clone(), alone.logprobs.clone()));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn company_changes_nothing() {
    // More than one at a time is asked for; on a CPU it must not be given (see `mistral`).
    let tiny = Tiny::open_with(|config| config.max_concurrent = 8).await;
    assert_eq!(tiny.engine.load().max_running, 1);
    // mistral.rs would decode prompts of one length as one batch, and others in turns.
    let same_length: Vec<String> = (0..8).map(|i| format!("prompt number {i}")).collect();
    let mixed: Vec<String> = (0..8).map(|i| "word ".repeat(1 + i * 3)).collect();
    for prompts in [same_length, mixed] {
        let mut alone = Vec::new();
        for (seed, prompt) in prompts.iter().enumerate() {
            alone.push(tiny.generate(request(prompt, seed as u64)).await.unwrap());
        }
        for round in 0..3 {
            let together = prompts.iter().enumerate();
            let together = together.map(|(seed, prompt)| tiny.generate(request(prompt, seed as u64)));
            for (alone, together) in alone.iter().zip(join_all(together).await) {
                let together = together.unwrap();
                assert_eq!(together.token_ids, alone.token_ids, "round {round}");
                assert_eq!(together.logprobs, alone.logprobs, "to the last bit");
            }
        }
    }
}
