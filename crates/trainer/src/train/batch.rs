//! Prompts with answers as one tensor, and the logarithms of the answers' probabilities under a policy.
//!
//! Answers to one prompt, as a group has them, stand behind it in one row, so that the prompt is read once:
//!
//! ```text
//!  row      2 + 2 =   4   5 1   4          three answers
//!  position 0 1 2 3   4   4 5   4          as if each stood alone behind the prompt
//!  sees               the prompt, and of answers only its own
//! ```

use candle_core::{Device, Result, Tensor};

use crate::policy::{END, MASKED, Policy, logprobs_of};

/// Places of a row at most, unless one answer alone has more: attention costs their square.
const MAX_PLACES: usize = 128;
/// Whose a place is that stands behind all answers.
const NOBODY: usize = usize::MAX;

/// Rows of prompts and answers. Everything that is said of answers is in one line, `[tokens]`: token by token, answer by answer.
#[derive(Debug)]
pub struct Batch {
    /// What is read, `[rows, places]`.
    tokens: Tensor,
    /// Where each of it stands in its text, `[rows, places]`.
    positions: Tensor,
    /// Who sees whom, `[rows, 1, places, places]`.
    mask: Tensor,
    /// The places that each answer's token follows, counted through all rows.
    follows: Tensor,
    /// The answers' tokens.
    targets: Tensor,
}

/// One row: a prompt and its answers.
struct Row<'a> {
    prompt: &'a [u32],
    answers: Vec<&'a [u32]>,
    /// Places that are read. An answer's last token is not.
    places: usize,
}

/// Puts answers that follow each other and have one prompt into one row, as long as there is room.
fn pack<'a>(texts: &[(&'a [u32], &'a [u32])]) -> Vec<Row<'a>> {
    let mut rows: Vec<Row<'a>> = Vec::new();
    for (prompt, answer) in texts {
        let more = answer.len().saturating_sub(1);
        match rows.last_mut() {
            Some(row) if row.prompt == *prompt && row.places + more <= MAX_PLACES => {
                row.answers.push(answer);
                row.places += more;
            }
            _ => rows.push(Row { prompt, answers: vec![answer], places: prompt.len() + more }),
        }
    }
    rows
}

impl Batch {
    /// Puts texts of (prompt, answer) together. A prompt has at least one token.
    ///
    /// # Errors
    /// candle's.
    #[allow(clippy::cast_possible_truncation, reason = "rows and places are a few thousand")]
    pub fn new(texts: &[(&[u32], &[u32])]) -> Result<Self> {
        let rows = pack(texts);
        let width = rows.iter().map(|row| row.places).max().unwrap_or(0).max(1);
        let (mut tokens, mut positions, mut mask) = (Vec::new(), Vec::new(), Vec::new());
        let (mut follows, mut targets): (Vec<u32>, Vec<u32>) = (Vec::new(), Vec::new());
        for (number, row) in rows.iter().enumerate() {
            let begin = number * width;
            tokens.extend_from_slice(row.prompt);
            positions.extend(0..row.prompt.len() as u32);
            let mut owners = vec![0; row.prompt.len()];
            for (answer, owner) in row.answers.iter().zip(1..) {
                targets.extend_from_slice(answer);
                let Some((_, read)) = answer.split_last() else { continue };
                follows.push((begin + row.prompt.len().saturating_sub(1)) as u32);
                follows.extend((0..read.len()).map(|at| (begin + owners.len() + at) as u32));
                tokens.extend_from_slice(read);
                positions.extend((row.prompt.len()..row.prompt.len() + read.len()).map(|at| at as u32));
                owners.resize(owners.len() + read.len(), owner);
            }
            owners.resize(width, NOBODY);
            tokens.resize(begin + width, END);
            positions.resize(begin + width, 0);
            let sees = |at: usize, key: usize| key <= at && (owners[key] == 0 || owners[key] == owners[at]);
            mask.extend((0..width * width).map(|n| if sees(n / width, n % width) { 0.0 } else { MASKED }));
        }
        let (rows, count) = (rows.len(), targets.len());
        Ok(Self {
            tokens: Tensor::from_vec(tokens, (rows, width), &Device::Cpu)?,
            positions: Tensor::from_vec(positions, (rows, width), &Device::Cpu)?,
            mask: Tensor::from_vec(mask, (rows, 1, width, width), &Device::Cpu)?,
            follows: Tensor::from_vec(follows, count, &Device::Cpu)?,
            targets: Tensor::from_vec(targets, count, &Device::Cpu)?,
        })
    }

    /// Returns the natural logarithm of the probability of each answer's token, `[tokens]`.
    ///
    /// # Errors
    /// candle's, also when a text is longer than the policy's longest sequence.
    pub fn logprobs(&self, policy: &Policy) -> Result<Tensor> {
        let read = policy.read(&self.tokens, &self.positions, &self.mask, None)?.index_select(&self.follows, 0)?;
        logprobs_of(&policy.logits(&read)?, &self.targets)
    }
}
