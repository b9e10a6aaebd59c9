//! A batch as columns: little-endian numbers that a program maps as they lie, without parsing.
//!
//! `protocol/spec/rollout.md`, "A trainer outside the node", has the layout in words.

use chorus_trainer::train::{Trajectory, advantages};

/// What a batch begins with.
const MAGIC: [u8; 4] = *b"CHRB";
/// Changes with the layout.
const VERSION: u32 = 1;

/// A batch has more of something than 32 bits count.
#[derive(Debug, thiserror::Error)]
#[error("the batch is too large for columns; lower trainer.batch or trainer.members")]
pub(super) struct TooLarge;

/// Writes a batch. There are as many numbers as groups.
pub(super) fn encode(step: u64, numbers: &[u64], groups: &[Vec<Trajectory>]) -> Result<Vec<u8>, TooLarge> {
    let count = |many: usize| u32::try_from(many).map_err(|_| TooLarge);
    let all = || groups.iter().flatten();
    let prompts = || groups.iter().map(|group| group.first().map_or(&[][..], |rollout| &rollout.prompt));
    let mut out = MAGIC.to_vec();
    out.extend(VERSION.to_le_bytes());
    out.extend(step.to_le_bytes());
    let tokens = |lengths: &mut dyn Iterator<Item = usize>| count(lengths.sum());
    for many in [
        count(groups.len())?,
        count(all().count())?,
        tokens(&mut prompts().map(<[u32]>::len))?,
        tokens(&mut all().map(|rollout| rollout.tokens.len()))?,
    ] {
        out.extend(many.to_le_bytes());
    }
    let numbers = numbers.iter().copied().chain(std::iter::repeat(0)).take(groups.len());
    out.extend(numbers.flat_map(u64::to_le_bytes));
    ends(&mut out, prompts().map(<[u32]>::len))?;
    words(&mut out, prompts().flatten().copied());
    for (index, group) in groups.iter().enumerate() {
        words(&mut out, std::iter::repeat_n(count(index)?, group.len()));
    }
    words(&mut out, all().map(|rollout| u32::try_from(rollout.lag).unwrap_or(u32::MAX)));
    floats(&mut out, all().map(|rollout| rollout.reward));
    for group in groups {
        floats(&mut out, advantages(&group.iter().map(|rollout| rollout.reward).collect::<Vec<_>>()).into_iter());
    }
    ends(&mut out, all().map(|rollout| rollout.tokens.len()))?;
    words(&mut out, all().flat_map(|rollout| rollout.tokens.iter().copied()));
    floats(&mut out, all().flat_map(|rollout| rollout.logprobs.iter().copied()));
    Ok(out)
}

fn words(out: &mut Vec<u8>, words: impl Iterator<Item = u32>) {
    out.extend(words.flat_map(u32::to_le_bytes));
}

fn floats(out: &mut Vec<u8>, floats: impl Iterator<Item = f32>) {
    out.extend(floats.flat_map(f32::to_le_bytes));
}

/// Writes where each of these ends in the column that follows.
fn ends(out: &mut Vec<u8>, lengths: impl Iterator<Item = usize>) -> Result<(), TooLarge> {
    let mut end = 0;
    for length in lengths {
        end += length;
        out.extend(u32::try_from(end).map_err(|_| TooLarge)?.to_le_bytes());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// Reads from the front, as a client does.
    struct Reader<'a>(&'a [u8]);

    impl Reader<'_> {
        fn take<const N: usize>(&mut self) -> [u8; N] {
            let (now, later) = self.0.split_at(N);
            self.0 = later;
            now.try_into().unwrap()
        }

        fn words(&mut self, count: u32) -> Vec<u32> {
            (0..count).map(|_| u32::from_le_bytes(self.take())).collect()
        }

        fn floats(&mut self, count: u32) -> Vec<f32> {
            (0..count).map(|_| f32::from_le_bytes(self.take())).collect()
        }
    }

    fn rollout(prompt: &[u32], tokens: &[u32], reward: f32, lag: u64) -> Trajectory {
        let logprobs = tokens.iter().map(|token| -(*token as f32) / 1000.0).collect();
        Trajectory { prompt: prompt.to_vec(), tokens: tokens.to_vec(), logprobs, reward, lag }
    }

    #[test]
    fn a_batch_is_read_back_column_by_column() {
        let groups = [
            vec![rollout(&[49, 43, 49, 61], &[50, 256], 1.0, 0), rollout(&[49, 43, 49, 61], &[51, 52, 256], 0.0, 2)],
            // All of its rollouts were struck.
            Vec::new(),
            vec![rollout(&[57, 61], &[57, 256], 1.0, 1)],
        ];
        let bytes = encode(41, &[7, 8, 1 << 40], &groups).unwrap();
        let mut reader = Reader(&bytes);
        assert_eq!(reader.take::<4>(), *b"CHRB");
        assert_eq!(reader.words(1), [1]);
        assert_eq!(u64::from_le_bytes(reader.take()), 41);
        assert_eq!(reader.words(4), [3, 3, 6, 7], "groups, rollouts, tokens of prompts and of answers");
        assert_eq!([(); 3].map(|()| u64::from_le_bytes(reader.take())), [7, 8, 1 << 40]);
        assert_eq!(reader.words(3), [4, 4, 6], "ends of prompts");
        assert_eq!(reader.words(6), [49, 43, 49, 61, 57, 61]);
        assert_eq!(reader.words(3), [0, 0, 2], "groups of rollouts");
        assert_eq!(reader.words(3), [0, 2, 1], "lags");
        assert_eq!(reader.floats(3), [1.0, 0.0, 1.0], "rewards");
        let found = reader.floats(3);
        assert!((found[0] - 1.0).abs() < 1e-3 && (found[1] + 1.0).abs() < 1e-3 && found[2] == 0.0, "{found:?}");
        assert_eq!(reader.words(3), [2, 5, 7], "ends of answers");
        assert_eq!(reader.words(7), [50, 256, 51, 52, 256, 57, 256]);
        assert_eq!(reader.floats(7), [-0.05, -0.256, -0.051, -0.052, -0.256, -0.057, -0.256]);
        assert!(reader.0.is_empty());
    }

    #[test]
    fn a_batch_of_nothing_is_a_batch() {
        assert_eq!(encode(0, &[], &[]).unwrap().len(), 32);
    }
}
