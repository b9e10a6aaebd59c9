//! What planners write, and what becomes of it.
#![allow(clippy::unwrap_used, clippy::panic)]

use proptest::prelude::*;

use super::*;

fn parse(text: &str) -> Result<Plan, PlanError> {
    Plan::parse(text, false, "")
}

fn asks(plan: &Plan) -> Vec<&str> {
    plan.steps().iter().map(|step| step.ask.as_str()).collect()
}

#[test]
fn a_good_plan_is_read_as_it_is() {
    let plan = parse(
        r#"{"steps":[{"ask":"Add 2 and 3","skill":"Arithmetic","needs":[]},{"ask":"Double it","skill":"arithmetic!","needs":[1]}]}"#,
    )
    .unwrap();
    assert_eq!(asks(&plan), ["Add 2 and 3", "Double it"]);
    assert_eq!(plan.steps()[1].needs, [1]);
    assert_eq!(plan.steps()[0].skill, "arithmetic");
    assert_eq!(plan.rounds_left(), [2, 1]);
}

#[test]
fn engines_without_a_grammar_are_understood() {
    for text in [
        "Sure! Here is the plan:\n```json\n{\"steps\": [{\"ask\": \"one thing\"}, {\"ask\": \"two things\"}]}\n```\nGood luck!",
        r#"[{"task":"one thing"},{"task":"two things"}]"#,
        r#"{"original_question":"?","subtasks":["Q1: one thing","Q2: two things"]}"#,
        r#"{"plan":["1. one thing","2) two things"]}"#,
        r#"{"tasks":["Step 1: one thing","step 2. two things"]}"#,
    ] {
        assert_eq!(asks(&parse(text).unwrap()), ["one thing", "two things"], "{text}");
    }
    assert_eq!(asks(&parse(r#"["1.5 times 2"]"#).unwrap()), ["1.5 times 2"], "a decimal is no number of a step");
}

#[test]
fn a_step_that_does_not_say_what_it_needs_builds_on_the_one_before() {
    let plan = parse(r#"{"subtasks":["Q1: one thing","Q2: two things","Q3: three things"]}"#).unwrap();
    let needs: Vec<&[u8]> = plan.steps().iter().map(|step| step.needs.as_slice()).collect();
    assert_eq!(needs, [&[][..], &[1], &[2]]);
}

#[test]
fn a_step_that_says_nothing_is_not_worth_a_repair() {
    let question = "Janet has 3 bags with 4 apples each. How many apples are left?";
    for ask in ["How to do it", "What to do", "Lionel Messi", "<what to do>", "<do what must be done>", "3 bags"] {
        let two =
            format!(r#"{{"steps":[{{"ask":"{ask}","needs":[]}},{{"ask":"Say how many are left","needs":[1]}}]}}"#);
        let error = Plan::parse(&two, false, question).unwrap_err();
        assert_eq!((&error, error.is_repairable()), (&PlanError::Vague { step: 1 }, false), "{ask}");
        let one = format!(r#"{{"steps":[{{"ask":"{ask}","needs":[]}}]}}"#);
        assert!(Plan::parse(&one, false, question).is_err(), "{ask}");
    }
    for ask in ["Multiply 3 by 4", "Count the apples", "Zähle die Äpfel", "\u{6570}\u{4e00}\u{6570}"] {
        let text = format!(
            r#"{{"steps":[{{"ask":"{ask}","needs":[]}},{{"ask":"Double it","needs":[1]}},{{"ask":"End","needs":[2]}}]}}"#
        );
        assert!(Plan::parse(&text, false, question).is_ok(), "{ask}");
    }
    assert!(PlanError::NotJson.is_repairable());
}

#[test]
fn the_last_step_gathers_loose_ends() {
    let plan = parse(r#"{"steps":[{"ask":"a1","needs":[]},{"ask":"b1","needs":[]},{"ask":"c1","needs":[1]},{"ask":"d1","needs":[]}]}"#).unwrap();
    assert_eq!(plan.steps()[3].needs, [2, 3], "step 1 is used by step 3 already");
    assert_eq!(plan.rounds_left(), [3, 2, 2, 1]);
}

#[test]
fn harmless_mistakes_are_tidied() {
    let plan = parse(r#"{"steps":[{"ask":"a1","needs":[1]},{"ask":"b1","needs":["step 1","1",1]}]}"#).unwrap();
    assert_eq!(plan.steps()[0].needs, Vec::<u8>::new());
    assert_eq!(plan.steps()[1].needs, [1]);
    let repeated = r#"{"steps":[{"ask":"a1"},{"ask":"a1"},{"ask":"b1","needs":[2]},{"ask":"c1","needs":[3]}]}"#;
    let plan = parse(repeated).unwrap();
    assert_eq!(asks(&plan), ["a1", "b1", "c1"]);
    assert_eq!((plan.steps()[1].needs.as_slice(), plan.steps()[2].needs.as_slice()), ([1].as_slice(), [2].as_slice()));
    let all_the_same = r#"{"steps":[{"ask":"a1"},{"ask":"a1"},{"ask":"a1"}]}"#;
    assert_eq!(asks(&parse(all_the_same).unwrap()), ["a1"]);
    let last_repeats = r#"{"steps":[{"ask":"a1"},{"ask":"b1","needs":[1]},{"ask":"a1","needs":[2]}]}"#;
    assert!(
        parse(last_repeats).unwrap().steps().iter().all(|step| !step.needs.contains(&3)),
        "nobody waits for the answer"
    );
}

#[test]
fn a_need_may_point_forward_but_not_in_circles() {
    let plan =
        parse(r#"{"steps":[{"ask":"a1","needs":[2]},{"ask":"b1","needs":[]},{"ask":"c1","needs":[]}]}"#).unwrap();
    assert_eq!(plan.rounds_left(), [2, 3, 1]);
    let cycle = r#"{"steps":[{"ask":"a1","needs":[2]},{"ask":"b1","needs":[1]},{"ask":"c1"}]}"#;
    assert_eq!(parse(cycle), Err(PlanError::Cycle { step: 1 }));
    let last = r#"{"steps":[{"ask":"a1","needs":[2]},{"ask":"b1"}]}"#;
    assert_eq!(parse(last).unwrap().rounds_left(), [2, 1], "the last step is the answer; nobody can need it");
    let nowhere = r#"{"steps":[{"ask":"a1","needs":[0, 2, 7]},{"ask":"b1","needs":[9]}]}"#;
    assert_eq!(parse(nowhere).unwrap().rounds_left(), [2, 1]);
}

#[test]
fn errors_say_what_to_change() {
    let nine =
        format!(r#"{{"steps":[{}]}}"#, (0..9).map(|i| format!(r#"{{"ask":"do {i}"}}"#)).collect::<Vec<_>>().join(","));
    for (text, words) in [
        ("I do not know.", "not JSON"),
        ("{\"steps\": [{\"ask\": \"a", "not JSON"),
        ("{}", "no steps"),
        (r#"{"steps":[]}"#, "no steps"),
        (r#"{"steps":"one"}"#, "no steps"),
        (r#"{"steps":[{"skill":"math"}]}"#, "step 1 does not say"),
        (r#"{"steps":[{"ask":"…"}]}"#, "step 1 does not say"),
        (r#"{"steps":[{"ask":"a1","needs":[2]},{"ask":"b1","needs":[1]},{"ask":"c1"}]}"#, "waits for itself"),
        (nine.as_str(), "9 steps"),
    ] {
        let error = parse(text).unwrap_err().to_string();
        assert!(error.contains(words), "{text}: {error}");
    }
}

#[test]
fn a_plan_that_was_cut_off_keeps_its_whole_steps() {
    let text = r#"{"steps": [{"ask":"Add 2 and 3","skill":"math","needs":[]}, {"ask":"Double it","skill":"math","needs":[1,3]}, {"ask":"Say"#;
    let plan = Plan::parse(text, true, "").unwrap();
    assert_eq!(asks(&plan), ["Add 2 and 3", "Double it", ANSWER_THE_QUESTION]);
    assert_eq!(plan.steps()[2].needs, [2]);
    assert_eq!(parse(text), Err(PlanError::NotJson), "unless it was not the limit that cut it");
    assert_eq!(Plan::parse(r#"{"steps": [{"ask":"Add"#, true, ""), Err(PlanError::NotJson));
}

#[test]
fn requirements_are_short_and_plain() {
    let skill = |text: &str| parse(&format!(r#"[{{"ask":"x1","skill":{text:?}}}]"#)).unwrap().steps()[0].skill.clone();
    assert_eq!(skill("Date Reasoning"), "date reasoning");
    assert_eq!(skill(""), DEFAULT_SKILL);
    assert_eq!(skill("?!"), DEFAULT_SKILL);
    assert_eq!(skill("Today is Christmas Eve of 1937"), DEFAULT_SKILL, "a piece of the question is not announced");
    assert_eq!(skill("dates, 1937"), "dates");
    assert_eq!(skill("4711"), DEFAULT_SKILL);
    assert!(skill(&"x".repeat(500)).len() <= MAX_SKILL_BYTES);
}

#[test]
fn the_schema_is_small_and_valid_json() {
    for steps in [0, 1, 4, 8, 200] {
        let free = schema(steps, &[]);
        let value: Value = serde_json::from_str(&free).unwrap();
        let bound = |name: &str| value["properties"]["steps"][name].as_u64().unwrap();
        assert!((1..=8).contains(&bound("maxItems")) && free.len() < 600, "{} bytes", free.len());
        assert_eq!(bound("minItems"), bound("maxItems").min(2));
        let named: Value = serde_json::from_str(&schema(steps, &["logic", "a \"quote\""])).unwrap();
        let skill = &named["properties"]["steps"]["items"]["properties"]["skill"]["enum"];
        assert_eq!(*skill, serde_json::json!(["logic", "a \"quote\""]));
    }
}

/// JSON that is nearly a plan.
fn near_plan() -> impl Strategy<Value = String> {
    let step =
        ("[a-c]{0,3}", prop::collection::vec(-1i64..10, 0..4), any::<bool>()).prop_map(|(ask, needs, object)| {
            if object { format!(r#"{{"ask":"{ask}","skill":"s","needs":{needs:?}}}"#) } else { format!(r#""{ask}""#) }
        });
    (prop::collection::vec(step, 0..11), 0usize..400).prop_map(|(steps, cut)| {
        let text = format!(r#"{{"steps":[{}]}}"#, steps.join(","));
        if cut < text.len() { text[..cut].to_owned() } else { text }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn whatever_is_read_can_be_carried_out(text in prop_oneof![near_plan(), any::<String>()], cut_off in any::<bool>(), question in "[a-c ]{0,9}") {
        let Ok(plan) = Plan::parse(&text, cut_off, &question) else { return Ok(()) };
        let len = plan.steps().len();
        prop_assert!((1..=MAX_STEPS).contains(&len));
        prop_assert!(first_in_cycle(plan.steps()).is_none());
        let needed: BTreeSet<usize> = plan.steps().iter().flat_map(|step| step.needs.iter().map(|&n| usize::from(n))).collect();
        prop_assert!(needed.iter().all(|&n| n >= 1 && n < len));
        prop_assert_eq!(needed.len(), len - 1, "every step but the last is used");
        prop_assert!(plan.rounds_left().iter().all(|&rounds| (1..=8).contains(&rounds)));
    }
}
