//! A scenario of either kind, so that one command line runs both.

use crate::scenario::{self, Scenario, ScenarioError};
use crate::training;

/// A scenario of nodes, or of a training run.
#[derive(Clone, Debug)]
pub enum AnyScenario {
    /// Nodes that do each other's tasks.
    Nodes(Box<Scenario>),
    /// Samplers and a trainer. A file of this kind has the key `samplers`.
    Training(Box<training::Scenario>),
}

/// A run that is over, whichever kind it was.
#[derive(Clone, Debug)]
pub struct Ran {
    /// The report in words.
    pub text: String,
    /// The report as JSON.
    pub figures: serde_json::Value,
    /// Hash over all events.
    pub trace: String,
    /// Whether every invariant and every bound held.
    pub good: bool,
    /// The line that runs it again.
    pub again: String,
    /// Virtual seconds.
    pub virtual_s: f64,
}

impl AnyScenario {
    /// Returns every scenario that comes with the simulator.
    pub fn all() -> impl Iterator<Item = Self> {
        let names = scenario::BUILT_IN.iter().chain(training::scenario::BUILT_IN);
        names.filter_map(|(name, _)| Self::built_in(name))
    }

    /// Returns a scenario that comes with the simulator.
    #[must_use]
    pub fn built_in(name: &str) -> Option<Self> {
        let nodes = Scenario::built_in(name).map(|scenario| Self::Nodes(Box::new(scenario)));
        nodes.or_else(|| training::Scenario::built_in(name).map(|scenario| Self::Training(Box::new(scenario))))
    }

    /// Reads a scenario of either kind. `name` is used in errors only.
    ///
    /// # Errors
    /// [`ScenarioError`] with the line, or with the key that makes no sense.
    pub fn parse(name: &str, text: &str) -> Result<Self, ScenarioError> {
        let trains = toml::from_str::<toml::Table>(text).is_ok_and(|table| table.contains_key("samplers"));
        if trains {
            return training::Scenario::parse(name, text).map(|scenario| Self::Training(Box::new(scenario)));
        }
        Scenario::parse(name, text).map(|scenario| Self::Nodes(Box::new(scenario)))
    }

    /// Returns its name.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Nodes(scenario) => &scenario.name,
            Self::Training(scenario) => &scenario.name,
        }
    }

    /// Returns what it shows.
    #[must_use]
    pub fn about(&self) -> &str {
        match self {
            Self::Nodes(scenario) => &scenario.about,
            Self::Training(scenario) => &scenario.about,
        }
    }

    /// Returns its own seed.
    #[must_use]
    pub fn seed(&self) -> u64 {
        match self {
            Self::Nodes(scenario) => scenario.seed,
            Self::Training(scenario) => scenario.seed,
        }
    }

    /// Runs it with a seed.
    #[must_use]
    pub fn run(&self, seed: u64) -> Ran {
        match self {
            Self::Nodes(scenario) => {
                let outcome = crate::run(scenario, seed);
                let (good, report) = (outcome.is_good(), outcome.report);
                let figures = serde_json::to_value(&report).unwrap_or_default();
                let (text, virtual_s) = (report.to_string(), report.virtual_s);
                Ran { text, figures, trace: report.trace, good, again: report.again, virtual_s }
            }
            Self::Training(scenario) => {
                let outcome = training::run(scenario, seed);
                let (good, report) = (outcome.is_good(), outcome.report);
                let figures = serde_json::to_value(&report).unwrap_or_default();
                let (text, virtual_s) = (report.to_string(), report.virtual_s);
                Ran { text, figures, trace: report.trace, good, again: report.again, virtual_s }
            }
        }
    }

    /// Runs it and returns the events of all tasks in words; a training run has none.
    #[must_use]
    pub fn watch(&self, seed: u64) -> Vec<String> {
        match self {
            Self::Nodes(scenario) => crate::watch(scenario, seed).watched,
            Self::Training(_) => Vec::new(),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_as_what_it_is() {
        let head = "name='x'\nabout='x'\nseed=1\nseconds=5\n";
        assert!(matches!(AnyScenario::parse("x", &format!("{head}nodes=2")).unwrap(), AnyScenario::Nodes(_)));
        assert!(matches!(AnyScenario::parse("x", &format!("{head}samplers=2")).unwrap(), AnyScenario::Training(_)));
        assert!(AnyScenario::parse("x", head).is_err() && AnyScenario::parse("x", "nodes =").is_err());
    }

    #[test]
    fn no_two_scenarios_have_one_name() {
        let mut names: Vec<String> = AnyScenario::all().map(|scenario| scenario.name().to_owned()).collect();
        let many = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), many);
    }
}
