//! Which task a group has: a function of the group's number, so that it can be told again after a crash.

use chorus_protocol::rollout::GroupId;
use chorus_protocol::{Hash, Text};

/// The tasks of a training run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Same seed, same tasks.
    pub seed: u64,
    /// Environments, and how often each is chosen relative to the others. At most 64 in a frame, so at most 64 here.
    pub environments: Vec<(Text<96>, u32)>,
}

impl Plan {
    /// Returns the environment of a group and the seed that its task is made from.
    #[must_use]
    pub fn task(&self, group: GroupId) -> (Text<96>, u64) {
        let hash = Hash::derive("chorus rollout task v1", &[&self.seed.to_le_bytes(), &group.0.to_le_bytes()]);
        let word = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&hash.as_bytes()[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        let total: u64 = self.environments.iter().map(|(_, weight)| u64::from(*weight)).sum();
        let mut left = word(8) % total.max(1);
        let chosen = self.environments.iter().find(|(_, weight)| {
            let here = left < u64::from(*weight);
            left = left.saturating_sub(u64::from(*weight));
            here
        });
        (chosen.map(|(name, _)| name.clone()).unwrap_or_default(), word(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_has_one_task_and_weights_are_kept() {
        let name = |text: &str| Text::new(text).unwrap();
        let plan = Plan { seed: 1, environments: vec![(name("a"), 3), (name("b"), 1), (name("never"), 0)] };
        let tasks: Vec<_> = (1..=4000).map(|n| plan.task(GroupId(n))).collect();
        assert_eq!(tasks[7], plan.task(GroupId(8)));
        let many = |text: &str| tasks.iter().filter(|(environment, _)| environment.as_str() == text).count();
        assert!((2800..3200).contains(&many("a")) && many("never") == 0, "{}", many("a"));
        let mut seeds: Vec<_> = tasks.iter().map(|(_, seed)| *seed).collect();
        seeds.sort_unstable();
        seeds.dedup();
        assert_eq!(seeds.len(), 4000);
    }
}
