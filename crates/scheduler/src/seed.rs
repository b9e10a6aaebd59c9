//! Where every job's sampling seed comes from.

/// The stage of planning, for [`derive()`].
pub const STAGE_PLAN: u64 = 1;
/// The stage of a plan's steps.
pub const STAGE_STEP: u64 = 2;
/// The stage of answering the question without a plan.
pub const STAGE_DIRECT: u64 = 3;

/// Derives a job's seed from its task's seed and its place: the chain, the stage, and the step or attempt within it.
///
/// A task run again with the same seed therefore asks for the same samples, in whatever order its jobs are done, and no two jobs
/// of a task share a seed. The mix is splitmix64's finaliser (Steele, Lea and Flood 2014), applied once per coordinate.
#[must_use]
pub fn derive(task_seed: u64, chain: u8, stage: u64, part: u64) -> u64 {
    [u64::from(chain), stage, part]
        .into_iter()
        .fold(mix(task_seed), |seed, coordinate| mix(seed ^ coordinate.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
}

const fn mix(seed: u64) -> u64 {
    let z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_place_of_a_task_has_a_seed_of_its_own() {
        let mut seen = BTreeSet::new();
        for task_seed in [0, 1, 42, u64::MAX] {
            for chain in 0..8 {
                for stage in [STAGE_PLAN, STAGE_STEP, STAGE_DIRECT] {
                    for part in 0..10 {
                        assert!(seen.insert(derive(task_seed, chain, stage, part)));
                    }
                }
            }
        }
    }

    #[test]
    fn splitmix64_is_the_published_one() {
        // The first output of splitmix64 seeded with 0, from the reference implementation.
        assert_eq!(mix(0), 0xe220_a839_7b1d_cdaf);
    }
}
