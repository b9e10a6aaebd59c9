//! Whatever comes, in whatever order: every task ends once, in time, within its budget.

use chorus_protocol::job::{Failure, Finish, JobKind, Output, Risk};
use proptest::prelude::*;

use super::super::*;
use super::harness::*;
use crate::spec::{Budget, Strategy as Run, Weighting};

/// What happens next.
#[derive(Clone, Debug)]
enum Act {
    /// Time passes, in milliseconds.
    Pass(u64),
    /// The open job with this number, modulo how many there are, is answered.
    Reply {
        at: usize,
        node: u8,
        score: f64,
        text: String,
        cut_off: bool,
        tokens: u32,
    },
    /// It fails.
    Fail {
        at: usize,
        error: JobError,
    },
    /// It is elected, or makes progress, or is lost.
    Tell {
        at: usize,
        node: u8,
        kind: u8,
    },
    /// The embedder answers a request, maybe for the second time.
    Embedded {
        at: usize,
        there: bool,
    },
    /// A result for a job that is not there.
    Stray,
    Cancel(u8),
    Ask {
        id: u8,
        spec: u8,
    },
}

fn error() -> impl Strategy<Value = JobError> {
    prop_oneof![
        Just(nobody()),
        Just(JobError::Exhausted { leases: 3, last: Failure::Busy }),
        Just(JobError::Deadline { elapsed: Duration::from_secs(1), waiting_for: "bids".into() }),
        Just(JobError::Refused(Failure::NoSuchModel)),
        Just(JobError::Cancelled),
        Just(JobError::Overloaded { limit: 8 }),
    ]
}

fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => Just(PLAN.to_owned()),
        2 => Just(r#"[{"ask":"a1"},{"ask":"b1","needs":[1]},{"ask":"c1"},{"ask":"d1","needs":[2,3]}]"#.to_owned()),
        1 => Just(r#"{"steps":[{"ask":"a1","needs":[2]},{"ask":"b1","needs":[1]},{"ask":"c1"}]}"#.to_owned()),
        2 => (0..PLAN.len()).prop_map(|cut| PLAN[..cut].to_owned()),
        3 => (0u8..4).prop_map(|n| format!("Answer: {n}")),
        1 => Just(String::new()),
        1 => any::<String>(),
    ]
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        2 => (0u64..20_000).prop_map(Act::Pass),
        2 => (0u64..300).prop_map(Act::Pass),
        10 => (any::<usize>(), 0u8..6, -1.0f64..2.0, text(), any::<bool>(), 0u32..400)
            .prop_map(|(at, node, score, text, cut_off, tokens)| Act::Reply { at, node, score, text, cut_off, tokens }),
        3 => (any::<usize>(), error()).prop_map(|(at, error)| Act::Fail { at, error }),
        6 => (any::<usize>(), 0u8..6, 0u8..6).prop_map(|(at, node, kind)| Act::Tell { at, node, kind }),
        2 => (any::<usize>(), any::<bool>()).prop_map(|(at, there)| Act::Embedded { at, there }),
        1 => Just(Act::Stray),
        1 => (1u8..4).prop_map(Act::Cancel),
        3 => (1u8..4, any::<u8>()).prop_map(|(id, spec)| Act::Ask { id, spec }),
    ]
}

/// Makes one of many tasks out of a byte.
fn spec(id: u8, kind: u8) -> TaskSpec {
    let pick = |bit: u8| kind & (1 << bit) != 0;
    TaskSpec {
        strategy: if pick(0) && pick(1) { Run::Direct } else { Run::Chains { planners: 1 + (kind >> 6) } },
        risk: if pick(2) { Risk::High } else { Risk::Low },
        weighting: if pick(3) { Weighting::Calibrated } else { Weighting::MatchScore },
        budget: if pick(4) { Budget { tokens: 900, jobs: 7 } } else { Budget::default() },
        deadline: Duration::from_millis(if pick(5) { 3_000 } else { 60_000 }),
        ..TaskSpec::new(task(id), "How many?")
    }
}

impl World {
    fn act(&mut self, act: Act) {
        let open =
            |world: &Self, at: usize| (!world.open.is_empty()).then(|| world.open[at % world.open.len()].clone());
        match act {
            Act::Pass(millis) => self.pass(millis),
            Act::Reply { at, node: i, score, text, cut_off, tokens } => {
                if let Some(spec) = open(self, at) {
                    let finish = if cut_off { Finish::Length } else { Finish::Stop };
                    let completion_tokens = tokens.min(spec.payload.max_tokens);
                    self.reply_with(&spec, node(i), score, Output { finish, completion_tokens, ..output(&text) });
                }
            }
            Act::Fail { at, error } => {
                if let Some(spec) = open(self, at) {
                    self.fail(&spec, error);
                }
            }
            Act::Tell { at, node: i, kind } => {
                if let Some(spec) = open(self, at) {
                    self.tell_one(&spec, i, kind);
                }
            }
            Act::Embedded { at, there } => {
                if !self.embedded.is_empty() {
                    let (request, text) = self.embedded[at % self.embedded.len()].clone();
                    self.give(SchedulerInput::Embedded { request, embedding: there.then(|| meaning(&text)) });
                }
            }
            Act::Stray => {
                self.give(SchedulerInput::JobDone { job: JobId::from_bytes([9; 16]), result: Err(JobError::Cancelled) })
            }
            Act::Cancel(id) => self.give(SchedulerInput::Cancel(task(id))),
            // An id is asked for once: the harness counts ends by id.
            Act::Ask { id, spec: kind } => {
                if !self.done.contains_key(&task(id)) {
                    self.give(SchedulerInput::Ask(Box::new(spec(id, kind))));
                }
            }
        }
    }

    fn tell_one(&mut self, spec: &JobSpec, i: u8, kind: u8) {
        use chorus_beacon::job::JobEventKind as Kind;
        let (node, bids, hedge) = (node(i), 1, false);
        self.tell(
            spec,
            match kind {
                0 => Kind::Announced { beacon: chorus_protocol::BeaconId::default(), candidates: usize::from(i) },
                1 => Kind::Elected { node, score: 0.5, fence: 1, bids, hedge },
                2 => Kind::Started { node },
                3 => Kind::Progress { node, tokens: 3, text: "x".into() },
                4 => Kind::Lost { node, reason: "gone".into() },
                _ => Kind::Finished { node, tokens: 3, elapsed: Duration::ZERO },
            },
        );
    }

    /// Says whether what was submitted for a task fits what was asked for.
    fn check_budgets(&self) -> Result<(), TestCaseError> {
        for (id, result) in &self.done {
            let jobs: Vec<&JobSpec> = self.submitted.iter().filter(|spec| spec.task == *id).collect();
            prop_assert!(jobs.len() <= 96);
            for spec in &jobs {
                let most = if spec.kind == JobKind::Plan { 200 } else { 256 };
                prop_assert!(spec.payload.max_tokens <= most);
            }
            if let Ok(answer) = result {
                prop_assert_eq!(answer.jobs as usize, jobs.len());
                prop_assert!((0.0..=1.0).contains(&answer.margin));
                prop_assert!(!answer.votes.is_empty() && answer.votes.iter().all(|vote| vote.weight > 0.0));
                prop_assert!(answer.chains.len() <= 8 && !answer.text.is_empty());
            }
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn every_task_ends_exactly_once(first in any::<u8>(), embeds in any::<bool>(), acts in prop::collection::vec(act(), 0..80)) {
        let mut world = World::new(SchedulerConfig { max_tasks: 3, ..SchedulerConfig::default() });
        world.embeds = embeds;
        let mut asked = std::collections::BTreeSet::from([task(1)]);
        world.give(SchedulerInput::Ask(Box::new(spec(1, first))));
        for act in acts {
            if let Act::Ask { id, .. } = &act {
                asked.insert(task(*id));
            }
            world.act(act);
        }
        // Whatever is still under way ends by its deadline, which is at most a minute away.
        world.pass(60_000);
        prop_assert_eq!(world.done.keys().copied().collect::<std::collections::BTreeSet<_>>(), asked);
        prop_assert_eq!(world.scheduler.active(), 0);
        prop_assert_eq!(world.scheduler.deadline(), None);
        prop_assert!(world.open.is_empty());
        prop_assert!(world.scheduler.routes.jobs.is_empty() && world.scheduler.routes.embeds.is_empty());
        world.check_budgets()?;
    }

    #[test]
    fn a_token_budget_is_never_exceeded(kind in any::<u8>(), acts in prop::collection::vec(act(), 0..60)) {
        let budget = Budget { tokens: 900, jobs: 7 };
        let mut world = World::new(SchedulerConfig::default());
        world.give(SchedulerInput::Ask(Box::new(TaskSpec { budget, ..spec(1, kind) })));
        let mut written = 0u64;
        for act in acts {
            match &act {
                Act::Ask { .. } => continue,
                Act::Reply { at, tokens, .. } if !world.open.is_empty() => {
                    let max = world.open[*at % world.open.len()].payload.max_tokens;
                    written += u64::from((*tokens).min(max));
                }
                _ => {}
            }
            world.act(act);
            let promised: u64 = world.open.iter().map(|spec| u64::from(spec.payload.max_tokens)).sum();
            prop_assert!(written + promised <= 900, "{} written and {} promised", written, promised);
            prop_assert!(world.submitted.len() <= 7);
        }
    }
}
