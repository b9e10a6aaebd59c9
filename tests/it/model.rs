//! The real default model, from question to answer.

use chorus_tests::{NodeOptions, Swarm};
use serde_json::json;

#[test]
fn the_default_model_answers_a_real_question() {
    let mut swarm = Swarm::new("it-model");
    let asker = swarm.start(&NodeOptions::asker());
    let options = NodeOptions::real();
    swarm.start(&options);
    swarm.start(&options);
    swarm.wait_agreement(3);
    let body = json!({"question": "What is the capital of France?", "strategy": "direct", "max_tokens": 48, "temperature": 0.0});
    let task = swarm.nodes[asker].submit(&body);
    let events = swarm.nodes[asker].events(&task);
    let result = &events.last().unwrap()["result"];
    assert!(result["text"].as_str().unwrap_or_default().contains("Paris"), "{events:?}");

    let question = "Question: is the number 7 prime? Options: (A) yes (B) no. Answer with the letter.";
    let task = swarm.nodes[asker]
        .submit(&json!({"question": question, "strategy": "chains", "planners": 2, "max_tokens": 96}));
    let events = swarm.nodes[asker].events(&task);
    let result = &events.last().unwrap()["result"];
    assert_eq!(events.last().unwrap()["event"], "finished", "{events:?}");
    let answer = result["answer"].as_str().unwrap_or_default();
    let is_option = |answer: &str| answer.starts_with("(A)") || answer.starts_with("(B)");
    let votes = result["votes"].as_array().expect("a vote");
    let options = votes.iter().filter(|vote| is_option(vote["answer"].as_str().unwrap_or_default())).count();
    // What so small a model says is not what is tested; what is made of it is.
    assert!(!votes.is_empty() && (is_option(answer) || options == 0), "an option wins over all else: {result}");
}
