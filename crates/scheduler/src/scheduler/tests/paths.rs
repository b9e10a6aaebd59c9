//! The ways that a task can go, one by one.

use chorus_beacon::job::JobEventKind;
use chorus_protocol::capability::Skill;
use chorus_protocol::job::{Failure, Finish, JobKind, Output, Risk};
use chorus_protocol::{List, Text};

use super::super::*;
use super::harness::*;
use crate::answer::AnswerFormat;
use crate::error::ChainError;
use crate::spec::{Budget, Strategy, Weighting};

const QUESTION: &str = "What is (2 + 3) times (4 + 5)?";

fn chains() -> TaskSpec {
    TaskSpec { seed: 11, ..TaskSpec::new(task(1), QUESTION) }
}

fn direct() -> TaskSpec {
    TaskSpec { strategy: Strategy::Direct, ..chains() }
}

#[test]
fn direct_is_one_job_that_passes_the_question_on() {
    let mut world = World::ask(direct());
    let spec = world.answers().pop().unwrap();
    assert_eq!((prompt(&spec).as_str(), spec.payload.seed, spec.payload.max_tokens), (QUESTION, 11, 256));
    assert!(spec.requirement.embedding.is_none() && spec.requirement.tags.is_empty() && world.embedded.is_empty());
    world.elect(&spec, node(1));
    world.tell(&spec, JobEventKind::Progress { node: node(1), tokens: 1, text: "The ".into() });
    world.tell(&spec, JobEventKind::Progress { node: node(1), tokens: 2, text: String::new() });
    world.reply(&spec, node(1), 0.7, "The answer is 45.");
    let answer = world.outcome().clone().unwrap();
    assert_eq!((answer.answer.as_str(), answer.text.as_str()), ("45", "The answer is 45."));
    assert_eq!((answer.margin, answer.jobs, answer.strategy, &answer.fallback), (1.0, 1, "direct", &None));
    assert_eq!((answer.prompt_tokens, answer.completion_tokens), (10, 5));
    assert_eq!(answer.chains[0].steps[0].executor, node(1));
    let kinds =
        ["accepted", "announced", "bid", "elected", "started", "text", "subtask_done", "chain_done", "finished"];
    assert_eq!(world.kinds(), kinds);
    assert_eq!((world.scheduler.active(), world.scheduler.deadline()), (0, None));
}

#[test]
fn chains_plan_do_the_steps_and_vote() {
    let mut world = World::ask(chains());
    world.plan_all(3, PLAN);
    assert_eq!(world.answers().len(), 6, "the two independent steps of three chains run at once");
    for spec in world.answers() {
        assert!(!prompt(&spec).contains(QUESTION), "a step in the middle does not see the question");
        assert_eq!(spec.requirement.embedding, Some(meaning("arithmetic")));
        let sum = if prompt(&spec).contains("Add 2 and 3") { "5" } else { "9" };
        world.reply(&spec, node(4), 0.6, sum);
    }
    let last = world.answers();
    assert_eq!(last.len(), 3);
    for (i, spec) in (0u8..).zip(last) {
        let text = prompt(&spec);
        assert!(
            text.contains(QUESTION) && text.contains("Add 2 and 3 => 5") && text.contains("Add 4 and 5 => 9"),
            "{text}"
        );
        world.reply(&spec, node(5), 0.9, if i == 1 { "Answer: 46" } else { "So it is \\boxed{45.0}" });
    }
    let answer = world.outcome().clone().unwrap();
    assert_eq!(
        (answer.answer.as_str(), answer.strategy, answer.tie, answer.low_margin),
        ("45", "chains", false, false)
    );
    assert!((answer.votes[0].weight - 1.4).abs() < 1e-9, "twice the mean of 0.6, 0.6 and 0.9");
    assert!((answer.margin - 1.0 / 3.0).abs() < 1e-9);
    assert_eq!(
        (answer.votes[0].chains.as_slice(), answer.votes[1].chains.as_slice()),
        ([0, 2].as_slice(), [1].as_slice())
    );
    assert_eq!((answer.jobs, answer.chains[2].planner, answer.chains[2].steps.len()), (12, Some(node(3)), 3));
    assert_eq!(world.kinds().iter().filter(|kind| *kind == "planned").count(), 3);
    assert_eq!(world.kinds().last().unwrap(), "finished");
}

#[test]
fn planners_are_elected_one_after_the_other_and_pass_over_one_another() {
    let mut world = World::ask(chains());
    assert_eq!(world.plans().len(), 1, "the second waits for the first election");
    let first = world.plans()[0].clone();
    assert_eq!(first.requirement.embedding, Some(meaning(crate::prompt::PLANNER_SKILL)));
    world.elect(&first, node(1));
    let second = world.plans()[1].clone();
    assert_eq!(second.avoid, [node(1)]);
    world.pass(300);
    assert_eq!(world.plans().len(), 3, "an election that takes long is not waited for");
    assert!(world.plans().iter().all(|spec| spec.payload.json_schema.is_some() && spec.payload.max_tokens <= 200));
    let seeds: std::collections::BTreeSet<u64> = world.plans().iter().map(|spec| spec.payload.seed).collect();
    assert_eq!(seeds.len(), 3);
}

#[test]
fn a_bad_plan_is_repaired_once_and_then_the_chain_answers_directly() {
    let mut world = World::ask(TaskSpec { strategy: Strategy::Chains { planners: 1 }, ..chains() });
    let first = world.plans()[0].clone();
    world.reply(&first, node(1), 0.9, "I would add the numbers.");
    let repair = world.plans()[0].clone();
    assert_eq!(repair.payload.turns.len(), 5);
    assert!(prompt(&repair).contains("not JSON"));
    assert_ne!(repair.payload.seed, first.payload.seed);
    world.reply(&repair, node(1), 0.9, r#"{"steps":[]}"#);
    let answer = world.answers()[0].clone();
    assert!(prompt(&answer).contains(QUESTION));
    world.reply(&answer, node(2), 0.4, "45");
    let result = world.outcome().clone().unwrap();
    assert_eq!((result.answer.as_str(), result.strategy, result.jobs), ("45", "direct", 3));
    assert!(result.fallback.unwrap().contains("no steps"));
    assert_eq!(world.kinds().iter().filter(|kind| *kind == "plan_rejected").count(), 2);
}

#[test]
fn a_plan_that_says_nothing_is_not_repaired() {
    let mut world = World::ask(TaskSpec { strategy: Strategy::Chains { planners: 1 }, ..chains() });
    world.plan_all(1, r#"{"steps":[{"ask":"How to do it","skill":"work","needs":[]}]}"#);
    assert!(world.plans().is_empty());
    assert!(prompt(&world.answers()[0]).contains(QUESTION));
}

#[test]
fn an_answer_that_is_no_option_is_outvoted_by_one_that_is() {
    let question = "Which is 5 times 9?\nOptions:\n(A) 45\n(B) 46";
    let mut world = World::ask(TaskSpec { question: question.into(), ..chains() });
    one_step_chains(&mut world, &["I like sums.", "The answer is (A).", "I like sums."]);
    let result = world.outcome().clone().unwrap();
    assert_eq!((result.answer.as_str(), result.low_margin), ("(A) 45", false));
    assert!(result.votes[1].weight < 0.03);
}

#[test]
fn a_plan_cut_off_by_its_limit_is_used_without_a_repair() {
    let mut world = World::ask(TaskSpec { strategy: Strategy::Chains { planners: 1 }, ..chains() });
    let cut = r#"{"steps":[{"ask":"Add 2 and 3","skill":"sums","needs":[]},{"ask":"Add 4 an"#;
    let spec = world.plans()[0].clone();
    world.reply_with(&spec, node(1), 0.9, Output { finish: Finish::Length, ..output(cut) });
    let step = world.answers()[0].clone();
    assert!(prompt(&step).starts_with("Add 2 and 3"));
    world.reply(&step, node(2), 0.5, "5");
    assert!(prompt(&world.answers()[0]).contains(QUESTION));
}

#[test]
fn a_step_that_fails_turns_its_chain_direct_and_abandoned_steps_do_not_vote() {
    let mut world = World::ask(TaskSpec { strategy: Strategy::Chains { planners: 1 }, ..chains() });
    world.plan_all(1, PLAN);
    let steps = world.answers();
    world.reply(&steps[0], node(2), 0.1, "5");
    world.fail(&steps[1], JobError::Exhausted { leases: 4, last: Failure::Leaving });
    let answer = world.answers()[0].clone();
    assert!(prompt(&answer).contains(QUESTION));
    world.reply(&answer, node(3), 0.8, "45");
    let result = world.outcome().clone().unwrap();
    assert!((result.votes[0].weight - 0.8).abs() < 1e-9);
    assert_eq!(result.chains[0].steps.len(), 2, "who did what is reported all the same");
    assert!(result.fallback.unwrap().contains("step 2 failed"));
}

#[test]
fn a_chain_that_fails_does_not_fail_the_task() {
    let mut world = World::ask(TaskSpec { strategy: Strategy::Chains { planners: 2 }, ..chains() });
    world.plan_all(2, "no plan");
    for spec in world.plans() {
        world.reply(&spec, node(1), 0.5, "still none");
    }
    let answers = world.answers();
    assert_eq!(answers.len(), 2);
    world.fail(&answers[0], JobError::Refused(Failure::InvalidPayload(Text::truncated("x"))));
    world.reply(&answers[1], node(2), 0.5, "Answer: 45");
    let result = world.outcome().clone().unwrap();
    assert_eq!((result.answer.as_str(), result.votes.len()), ("45", 1));
    assert!(result.chains[0].error.as_ref().unwrap().contains("not usable"));
}

#[test]
fn when_all_chains_fail_the_error_says_what_to_do() {
    let mut world = World::ask(chains());
    while let Some(spec) = world.open.first().cloned() {
        world.fail(&spec, nobody());
    }
    let error = world.outcome().clone().unwrap_err();
    assert!(matches!(&error, TaskError::AllChainsFailed { causes } if causes.len() == 3));
    assert!(error.is_retryable());
    assert!(error.to_string().contains("chorus ledger ls"), "{error}");
    let json = serde_json::to_value(&error).unwrap();
    assert_eq!((json["kind"].as_str(), json["retryable"].as_bool()), (Some("all_chains_failed"), Some(true)));
    assert_eq!(world.now, Time::ZERO, "nobody is waited for who does not exist");
    assert_eq!(world.kinds().last().unwrap(), "failed");
}

#[test]
fn direct_reports_the_one_error() {
    let mut world = World::ask(direct());
    let spec = world.answers()[0].clone();
    world.fail(&spec, nobody());
    assert_eq!(world.outcome().clone().unwrap_err(), TaskError::Failed(ChainError::Job(nobody())));
}

#[test]
fn an_empty_answer_is_no_answer() {
    let mut world = World::ask(direct());
    let spec = world.answers()[0].clone();
    world.reply(&spec, node(1), 0.5, " \n ");
    assert_eq!(world.outcome().clone().unwrap_err(), TaskError::Failed(ChainError::Empty));
}

#[test]
fn busy_nodes_are_waited_for_when_the_ledger_knows_them() {
    let mut world = World::ask(direct());
    let spec = world.answers()[0].clone();
    world.tell(&spec, JobEventKind::Announced { beacon: chorus_protocol::BeaconId::default(), candidates: 2 });
    world.fail(&spec, nobody());
    assert!(world.open.is_empty() && world.done.is_empty());
    world.pass(300);
    let again = world.answers()[0].clone();
    assert_eq!(again.payload.seed, spec.payload.seed);
    assert_ne!(again.job, spec.job);
    world.reply(&again, node(1), 0.5, "45");
    assert_eq!(world.outcome().as_ref().unwrap().jobs, 2);
    assert!(world.kinds().contains(&"waiting".to_owned()));
}

#[test]
fn leases_that_all_found_the_executor_busy_are_tried_again() {
    let mut world = World::ask(direct());
    let spec = world.answers()[0].clone();
    world.fail(&spec, JobError::Exhausted { leases: 4, last: Failure::Busy });
    world.pass(300);
    let again = world.answers()[0].clone();
    world.fail(&again, JobError::Exhausted { leases: 4, last: Failure::Leaving });
    assert!(world.outcome().as_ref().unwrap_err().to_string().contains("leaving"));
}

#[test]
fn a_node_that_becomes_free_is_not_waited_for_any_longer() {
    let mut world = World::ask(TaskSpec { strategy: Strategy::Chains { planners: 2 }, ..chains() });
    let first = world.plans()[0].clone();
    world.elect(&first, node(1));
    let second = world.plans()[1].clone();
    world.fail(&second, nobody());
    assert_eq!(world.plans().len(), 1);
    world.reply(&first, node(1), 0.9, PLAN);
    assert_eq!(world.plans().len(), 1, "the second planner is looked for at once");
}

#[test]
fn always_busy_ends_in_the_error() {
    let mut world = World::ask(direct());
    let mut tries = 0;
    while world.done.is_empty() {
        if let Some(spec) = world.open.first().cloned() {
            world.fail(&spec, JobError::Overloaded { limit: 4 });
            tries += 1;
        }
        world.pass(4_000);
    }
    assert_eq!(tries, 9);
    assert!(world.outcome().as_ref().unwrap_err().is_retryable());
}

#[test]
fn the_deadline_ends_the_task_with_what_there_is() {
    let mut world = World::ask(TaskSpec { risk: Risk::Medium, ..chains() });
    world.plan_all(3, r#"[{"ask":"Calculate 5 times 9"}]"#);
    let answers = world.answers();
    world.reply(&answers[0], node(1), 0.5, "45");
    world.pass(119_999);
    assert!(world.done.is_empty());
    world.pass(2);
    let result = world.outcome().clone().unwrap();
    assert_eq!((result.answer.as_str(), result.votes.len(), world.cancelled.len()), ("45", 1, 2));
    assert!(result.chains[1].error.as_ref().unwrap().contains("not waited for"));
}

#[test]
fn a_deadline_without_an_answer_names_what_was_waited_for() {
    let mut world = World::ask(direct());
    let spec = world.answers()[0].clone();
    world.elect(&spec, node(1));
    world.tell(&spec, JobEventKind::Progress { node: node(1), tokens: 17, text: String::new() });
    let status = world.scheduler.status(world.now).next().unwrap();
    assert!(status.waiting_for.contains("17 tokens so far"), "{status:?}");
    world.pass(120_000);
    let error = world.outcome().clone().unwrap_err();
    assert!(error.to_string().contains(&node(1).fmt_short()), "{error}");
    assert!(!error.is_retryable());
    assert!(world.cancelled.contains(&spec.job));
}

#[test]
fn a_cancelled_task_cancels_its_jobs() {
    let mut world = World::ask(chains());
    world.plan_all(3, PLAN);
    assert_eq!(world.open.len(), 6);
    let open = world.open.clone();
    world.give(SchedulerInput::Cancel(task(1)));
    assert_eq!((world.outcome().clone().unwrap_err(), world.cancelled.len()), (TaskError::Cancelled, 6));
    world.give(SchedulerInput::JobDone { job: open[0].job, result: Err(JobError::Cancelled) });
    world.give(SchedulerInput::Cancel(task(1)));
    assert_eq!(world.done.len(), 1);
}

/// Runs all open answers of a task whose chains have one step each.
fn one_step_chains(world: &mut World, texts: &[&str]) {
    world.plan_all(texts.len() as u8, r#"[{"ask":"Calculate 5 times 9"}]"#);
    for (spec, text) in world.answers().iter().zip(texts) {
        world.reply(spec, node(9), 0.5, text);
    }
}

#[test]
fn a_low_margin_at_high_risk_adds_chains_once() {
    let mut world = World::ask(TaskSpec { risk: Risk::High, ..chains() });
    one_step_chains(&mut world, &["45", "46", "45"]);
    assert!(world.done.is_empty());
    assert!(world.kinds().contains(&"widened".to_owned()));
    world.plan_all(2, r#"[{"ask":"Calculate 5 times 9"}]"#);
    for spec in world.answers() {
        world.reply(&spec, node(8), 0.5, "46");
    }
    let result = world.outcome().clone().unwrap();
    assert_eq!((result.answer.as_str(), result.chains.len(), result.low_margin), ("46", 5, true));
    assert!((result.margin - 0.2).abs() < 1e-9);
}

#[test]
fn a_tie_is_reported() {
    let mut world = World::ask(TaskSpec { strategy: Strategy::Chains { planners: 2 }, ..chains() });
    one_step_chains(&mut world, &["45", "46"]);
    let result = world.outcome().clone().unwrap();
    assert_eq!((result.answer.as_str(), result.tie, result.low_margin, result.margin), ("45", true, true, 0.0));
}

#[test]
fn at_low_risk_a_decided_vote_is_not_waited_for() {
    let finish_two = |risk| {
        let mut world = World::ask(TaskSpec { risk, ..chains() });
        world.plan_all(3, r#"[{"ask":"Calculate 5 times 9"}]"#);
        for spec in &world.answers()[..2] {
            world.reply(spec, node(9), 0.8, "45");
        }
        world
    };
    let world = finish_two(Risk::Low);
    assert_eq!((world.outcome().as_ref().unwrap().answer.as_str(), world.cancelled.len()), ("45", 1));
    assert!(finish_two(Risk::Medium).done.is_empty());
}

#[test]
fn the_calibrated_weight_is_the_track_record() {
    let mut world = World::ask(TaskSpec {
        weighting: Weighting::Calibrated,
        strategy: Strategy::Chains { planners: 1 },
        ..chains()
    });
    one_step_chains(&mut world, &["45"]);
    assert!((world.outcome().as_ref().unwrap().votes[0].weight - 9f64.ln()).abs() < 1e-9);
}

#[test]
fn a_silent_embedder_is_waited_for_two_seconds() {
    let mut world = World::new(SchedulerConfig::default());
    world.embeds = false;
    world.give(SchedulerInput::Ask(Box::new(chains())));
    assert!(world.open.is_empty());
    world.pass(1_999);
    assert!(world.open.is_empty());
    world.pass(1);
    let spec = world.plans()[0].clone();
    assert!(spec.requirement.embedding.is_none());
    assert_eq!(spec.requirement.tags.iter().map(Text::as_str).collect::<Vec<_>>(), ["planning"]);
    let (request, text) = world.embedded[0].clone();
    world.give(SchedulerInput::Embedded { request, embedding: Some(meaning(&text)) });
    assert_eq!(world.plans().len(), 1, "a late embedding changes nothing");
}

#[test]
fn an_embedding_is_asked_for_once() {
    let mut world = World::ask(chains());
    world.plan_all(3, PLAN);
    let texts: Vec<&str> = world.embedded.iter().map(|(_, text)| text.as_str()).collect();
    assert_eq!(texts.iter().filter(|text| **text == crate::prompt::PLANNER_SKILL).count(), 1);
    let before = world.embedded.len();
    world.give(SchedulerInput::Ask(Box::new(TaskSpec::new(task(2), QUESTION))));
    world.plan_all(1, PLAN);
    assert_eq!(world.embedded.len(), before, "the second task finds them in the cache");
}

#[test]
fn a_question_is_routed_by_the_nearest_public_skill() {
    let skill = |text: &str| Skill {
        text: Text::truncated(text),
        tags: List::truncated([Text::truncated(text)]),
        embedding: Some(meaning(text)),
    };
    let skills = vec![skill("law"), skill(&"x".repeat(QUESTION.len()))];
    let world = World::ask(TaskSpec { skills: skills.clone(), ..direct() });
    let spec = &world.answers()[0];
    assert_eq!(spec.requirement.embedding, skills[1].embedding);
    assert_eq!(spec.requirement.tags, skills[1].tags);
    let named = World::ask(TaskSpec { skills, skill: Some("law and tax".into()), ..direct() });
    assert_eq!(named.answers()[0].requirement.embedding, Some(meaning("law and tax")));
    assert_eq!(named.answers()[0].requirement.tags.iter().map(Text::as_str).collect::<Vec<_>>(), ["law"]);
}

#[test]
fn a_small_budget_or_a_close_deadline_falls_back_and_says_so() {
    for (spec, words, jobs) in [
        (TaskSpec { budget: Budget { tokens: 300, jobs: 96 }, ..chains() }, "cannot pay", 0),
        (TaskSpec { deadline: Duration::from_millis(900), ..chains() }, "too close", 0),
        (TaskSpec { budget: Budget { tokens: 1_000, jobs: 96 }, ..chains() }, "2 of 3 chains", 1),
    ] {
        let world = World::ask(spec);
        let accepted = serde_json::to_value(&world.events[0]).unwrap();
        assert!(accepted["fallback"].as_str().unwrap().contains(words), "{accepted}");
        assert_eq!(world.plans().len(), jobs);
    }
}

#[test]
fn a_budget_that_runs_out_is_a_typed_error() {
    let mut world = World::ask(TaskSpec {
        budget: Budget { tokens: 4_000, jobs: 2 },
        strategy: Strategy::Chains { planners: 1 },
        ..chains()
    });
    world.plan_all(1, PLAN);
    let steps = world.answers();
    assert_eq!(steps.len(), 0, "one job is left, and two steps want it: the chain answers directly, or not at all");
    assert!(matches!(world.outcome().as_ref().unwrap_err(), TaskError::Failed(ChainError::Budget { what: "jobs" })));
}

#[test]
fn impossible_tasks_are_refused_at_once() {
    for (spec, kind) in [
        (TaskSpec::new(task(1), "  "), "invalid"),
        (TaskSpec::new(task(1), "x".repeat(97 * 1024)), "too_long"),
        (TaskSpec { deadline: Duration::ZERO, ..chains() }, "invalid"),
        (TaskSpec { max_tokens: 0, ..chains() }, "invalid"),
        (TaskSpec { stop: vec![String::new()], ..chains() }, "invalid"),
        (TaskSpec { stop: vec!["x".into(); 9], ..chains() }, "invalid"),
        (TaskSpec { json_schema: Some("[]".into()), ..chains() }, "invalid"),
        (TaskSpec { json_schema: Some(format!("{{\"a\":\"{}\"}}", "x".repeat(9_000))), ..chains() }, "invalid"),
        (TaskSpec { strategy: Strategy::Chains { planners: 9 }, ..chains() }, "invalid"),
        (TaskSpec { strategy: Strategy::Chains { planners: 0 }, ..chains() }, "invalid"),
    ] {
        let world = World::ask(spec);
        assert_eq!(world.outcome().as_ref().unwrap_err().kind(), kind);
        assert_eq!(world.kinds(), ["failed"]);
    }
}

#[test]
fn too_many_tasks_are_refused_and_asking_twice_changes_nothing() {
    let mut world = World::new(SchedulerConfig { max_tasks: 1, ..SchedulerConfig::default() });
    world.give(SchedulerInput::Ask(Box::new(direct())));
    world.give(SchedulerInput::Ask(Box::new(direct())));
    assert_eq!((world.submitted.len(), world.done.len()), (1, 0));
    world.give(SchedulerInput::Ask(Box::new(TaskSpec::new(task(2), QUESTION))));
    assert_eq!(world.done[&task(2)].clone().unwrap_err(), TaskError::Overloaded { limit: 1 });
}

#[test]
fn options_are_read_from_the_question_and_shown_in_full() {
    let question = "Which city?\nOptions:\n(A) London\n(B) Paris";
    let mut world = World::ask(TaskSpec { question: question.into(), ..direct() });
    let spec = world.answers()[0].clone();
    assert!(prompt(&spec).starts_with(question) && prompt(&spec).contains("letter of the right option"));
    world.reply(&spec, node(1), 0.5, "It is Paris.");
    assert_eq!(world.outcome().as_ref().unwrap().answer, "(B) Paris");
}

#[test]
fn prose_is_left_alone() {
    let mut world =
        World::ask(TaskSpec { format: AnswerFormat::Prose, question: "(A) or (B)?\n(B) or (A)?".into(), ..direct() });
    let spec = world.answers()[0].clone();
    assert_eq!(prompt(&spec), "(A) or (B)?\n(B) or (A)?");
    world.reply(&spec, node(1), 0.5, "Neither.\nThe answer is 5.\n");
    assert_eq!(world.outcome().as_ref().unwrap().answer, "Neither.\nThe answer is 5.");
}

#[test]
fn one_task_seed_gives_one_set_of_payloads() {
    let run = |rng: u64, reverse: bool| {
        let mut world = World::new(SchedulerConfig::default());
        world.rng = chorus_machine::Rng::from_u64(rng);
        world.give(SchedulerInput::Ask(Box::new(TaskSpec { risk: Risk::Medium, ..chains() })));
        world.plan_all(3, PLAN);
        while !world.open.is_empty() {
            let at = if reverse { world.open.len() - 1 } else { 0 };
            let spec = world.open[at].clone();
            world.reply(&spec, node(4), 0.6, if prompt(&spec).contains("Known") { "5" } else { "Answer: 45" });
        }
        let key =
            |spec: &JobSpec| (spec.payload.seed, prompt(spec), spec.kind == JobKind::Plan, spec.payload.max_tokens);
        let mut payloads: Vec<_> = world.submitted.iter().map(key).collect();
        payloads.sort();
        let salts: Vec<[u8; 16]> = world.submitted.iter().map(|spec| spec.payload.salt).collect();
        (payloads, salts)
    };
    let (first, second) = (run(1, false), run(2, true));
    assert_eq!(first.0, second.0);
    assert_ne!(first.1, second.1, "salts are not derived from the seed");
}

#[test]
fn time_is_split_over_plan_and_steps() {
    let mut world = World::ask(TaskSpec { strategy: Strategy::Chains { planners: 1 }, ..chains() });
    assert_eq!(world.plans()[0].deadline, Time::from_millis(42_000));
    world.pass(10_000);
    world.plan_all(1, PLAN);
    assert!(world.answers().iter().all(|spec| spec.deadline == Time::from_millis(65_000)), "half of what is left");
    for spec in world.answers() {
        world.reply(&spec, node(2), 0.5, "5");
    }
    assert_eq!(world.answers()[0].deadline, Time::from_millis(120_000));
}

#[test]
fn stops_and_a_schema_bind_the_answer_and_nothing_before_it() {
    let schema = r#"{"type":"object"}"#;
    let bound = |spec| TaskSpec { stop: vec!["END".into()], json_schema: Some(schema.into()), ..spec };
    let binds = |spec: &JobSpec| {
        let payload = &spec.payload;
        (
            payload.json_schema.as_ref().map(Text::as_str) == Some(schema),
            payload.stop.iter().any(|stop| &**stop == "END"),
        )
    };
    let mut world = World::ask(bound(direct()));
    let spec = world.answers().pop().unwrap();
    assert_eq!((binds(&spec), prompt(&spec).as_str()), ((true, true), QUESTION));
    world.reply(&spec, node(1), 0.5, r#" {"b": 1, "a": 2} "#);
    assert_eq!(world.outcome().as_ref().unwrap().answer, r#"{"b": 1, "a": 2}"#);

    let mut world = World::ask(bound(TaskSpec { risk: Risk::Medium, ..chains() }));
    assert!(world.plans().iter().all(|plan| plan.payload.stop.is_empty() && !binds(plan).0));
    world.plan_all(3, PLAN);
    for spec in world.answers() {
        assert_eq!(binds(&spec), (false, false));
        world.reply(&spec, node(4), 0.6, "5");
    }
    let written = [r#"{"a":2,"b":1}"#, r#"{ "b": 1, "a": 2 }"#, r#"{"a": 3"#];
    for (spec, text) in world.answers().iter().zip(written) {
        assert_eq!(binds(spec), (true, true));
        world.reply(spec, node(4), 0.6, text);
    }
    let answer = world.outcome().clone().unwrap();
    assert_eq!(answer.votes[0].chains, [0, 1], "the same JSON, however it is written: {:?}", answer.votes);
    assert!(answer.margin > 0.9, "what is no JSON hardly counts: {}", answer.margin);
}

#[test]
fn an_answer_says_why_it_ended() {
    for (written, said) in [(Finish::Stop, "stop"), (Finish::Length, "length")] {
        let mut world = World::ask(direct());
        let spec = world.answers().pop().unwrap();
        world.reply_with(&spec, node(1), 0.7, Output { finish: written, ..output("It is 45 and") });
        let answer = world.outcome().clone().unwrap();
        assert_eq!((answer.finish, serde_json::to_value(&answer).unwrap()["finish"].as_str()), (written, Some(said)));
    }
}

#[test]
fn a_task_that_outlived_its_node_says_so_and_numbers_its_events_behind_the_old_ones() {
    use crate::spec::EVENTS_A_RUN;
    let mut world = World::ask(TaskSpec { restarts: 2, ..direct() });
    assert_eq!(world.kinds()[..2], ["resumed", "accepted"]);
    let spec = world.answers().pop().unwrap();
    assert_eq!(spec.payload.seed, 11, "the same seeds as before");
    world.reply(&spec, node(1), 0.7, "45");
    let numbers: Vec<u64> = world.events.iter().map(|event| event.index).collect();
    assert_eq!(numbers, (0..numbers.len() as u64).map(|at| 2 * EVENTS_A_RUN + at).collect::<Vec<_>>());
}
