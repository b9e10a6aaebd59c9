//! A batch of rollouts in columns, signed once by its sampler.
//!
//! Everything that rollouts share stands once (policy, versions, environments, prompts); everything else stands in columns of fixed
//! width ([`super::columns`]). A completion's token costs 8 bytes (id and log-probability), or 6 when every id of the frame is below
//! 2^16; a rollout 15 bytes more, a prompt its ids once per group, the frame about 200 and its envelope 105.

use std::collections::BTreeMap;
use std::ops::Range;

use bincode::de::{BorrowDecoder, Decoder};
use bincode::enc::Encoder;
use bincode::error::{DecodeError, EncodeError};
use bincode::{BorrowDecode, Decode, Encode};

use super::columns;
use super::parts::{GroupId, Rollout, Segment};
use crate::bounded::{List, Text};
use crate::job::Finish;
use crate::limits::{
    MAX_FRAME_ENVIRONMENTS, MAX_FRAME_ROLLOUTS, MAX_FRAME_SWITCHES, MAX_FRAME_VERSIONS, MAX_ROLLOUT_FRAME_BYTES,
    MAX_ROLLOUT_TOKENS,
};
use crate::policy::{PolicyId, Version};
use crate::signed::Signable;
use crate::wall::WallTime;

/// What every rollout of the frame shares, and how long the columns are.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
struct Head {
    policy: PolicyId,
    sequence: u64,
    made: WallTime,
    versions: List<Version, MAX_FRAME_VERSIONS>,
    environments: List<Text<96>, MAX_FRAME_ENVIRONMENTS>,
    groups: u16,
    rollouts: u16,
    switches: u16,
    narrow: bool,
}

/// A group's columns.
#[derive(Clone, Debug, Default, PartialEq)]
struct Groups {
    id: Vec<u64>,
    environment: Vec<u8>,
    seed: Vec<u64>,
    prompt_len: Vec<u32>,
}

/// A rollout's columns.
#[derive(Clone, Debug, Default, PartialEq)]
struct Rollouts {
    group: Vec<u16>,
    member: Vec<u16>,
    completion_len: Vec<u32>,
    reward: Vec<f32>,
    finish: Vec<u8>,
    /// The version of the first token.
    version: Vec<u8>,
    /// How many times the version changed after that.
    switches: Vec<u8>,
}

/// Changes of version in mid-rollout, rollout by rollout.
#[derive(Clone, Debug, Default, PartialEq)]
struct Switches {
    version: Vec<u8>,
    at: Vec<u32>,
}

/// A batch of rollouts. A value of this type satisfies every rule of `spec/rollout.md`, whether it was built or decoded.
#[derive(Clone, Debug, PartialEq)]
pub struct RolloutFrame {
    head: Head,
    groups: Groups,
    rollouts: Rollouts,
    switches: Switches,
    prompts: Vec<u32>,
    tokens: Vec<u32>,
    log_probs: Vec<f32>,
}

impl Signable for RolloutFrame {
    const KIND: &'static str = "rollouts";
    const VERSION: u16 = 1;
    const MAX_BYTES: usize = MAX_ROLLOUT_FRAME_BYTES;
}

/// Why rollouts make no frame.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// More than the named part of a frame can hold.
    #[error("too many {0} for one frame; cut it into two")]
    TooMany(&'static str),
    /// Two rollouts of one group that disagree on its task.
    #[error("rollouts of {0} differ in prompt, environment or seed; a group has one task")]
    TwoTasks(GroupId),
    /// A rule that holds for every frame is broken.
    #[error("no valid frame: {0}")]
    Invalid(&'static str),
}

/// Returns the index of `item` in `list`, adding it when it is new.
fn index_of<T: PartialEq + Clone>(list: &mut Vec<T>, item: &T, what: &'static str) -> Result<u8, FrameError> {
    let index = list.iter().position(|known| known == item).unwrap_or_else(|| {
        list.push(item.clone());
        list.len() - 1
    });
    u8::try_from(index).map_err(|_| FrameError::TooMany(what))
}

fn count(len: usize, what: &'static str) -> Result<u16, FrameError> {
    u16::try_from(len).map_err(|_| FrameError::TooMany(what))
}

impl RolloutFrame {
    /// Puts rollouts into columns. `sequence` is the sampler's number for this frame, counted from 1 for each policy.
    ///
    /// # Errors
    /// [`FrameError`] when they do not fit into one frame or break one of its rules.
    pub fn new(policy: PolicyId, sequence: u64, made: WallTime, items: &[Rollout]) -> Result<Self, FrameError> {
        let mut build = Build::default();
        for item in items {
            build.push(item)?;
        }
        let head = Head {
            policy,
            sequence,
            made,
            versions: List::new(build.versions).map_err(|_| FrameError::TooMany("versions"))?,
            environments: List::new(build.environments).map_err(|_| FrameError::TooMany("environments"))?,
            groups: count(build.groups.id.len(), "groups")?,
            rollouts: count(items.len(), "rollouts")?,
            switches: count(build.switches.at.len(), "changes of version")?,
            narrow: is_narrow(&build.prompts) && is_narrow(&build.tokens),
        };
        let Build { groups, rollouts, switches, prompts, tokens, log_probs, .. } = build;
        let frame = Self { head, groups, rollouts, switches, prompts, tokens, log_probs };
        frame.check().map_err(FrameError::Invalid)?;
        Ok(frame)
    }

    /// Returns the policy that the rollouts are for.
    #[must_use]
    pub fn policy(&self) -> &PolicyId {
        &self.head.policy
    }

    /// Returns the sampler's number for this frame, counted from 1 for each policy.
    #[must_use]
    pub fn sequence(&self) -> u64 {
        self.head.sequence
    }

    /// Returns when the frame was made.
    #[must_use]
    pub fn made(&self) -> WallTime {
        self.head.made
    }

    /// Returns how many rollouts it holds.
    #[must_use]
    pub fn len(&self) -> usize {
        self.rollouts.group.len()
    }

    /// Returns whether it holds none, which no valid frame does.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rollouts.group.is_empty()
    }

    /// Returns how many tokens were sampled.
    #[must_use]
    pub fn completion_tokens(&self) -> usize {
        self.tokens.len()
    }

    /// Returns how many tokens the prompts have, each group's counted once.
    #[must_use]
    pub fn prompt_tokens(&self) -> usize {
        self.prompts.len()
    }

    /// Returns the rollouts, in the frame's order.
    pub fn rollouts(&self) -> impl Iterator<Item = RolloutView<'_>> {
        let starts: Vec<usize> =
            self.groups.prompt_len.iter().scan(0, |at, len| Some(advance(at, *len).start)).collect();
        let (mut token, mut switch) = (0, 0);
        (0..self.len()).map(move |row| {
            let group = usize::from(self.rollouts.group[row]);
            let start = starts[group];
            let tokens = advance(&mut token, self.rollouts.completion_len[row]);
            RolloutView {
                frame: self,
                row,
                group,
                prompt: start..start + wide(self.groups.prompt_len[group]),
                tokens,
                switches: advance(&mut switch, u32::from(self.rollouts.switches[row])),
            }
        })
    }

    /// Checks every rule that the columns alone can tell; `spec/rollout.md` lists them.
    fn check(&self) -> Result<(), &'static str> {
        let (groups, rollouts) = (&self.groups, &self.rollouts);
        if self.head.sequence == 0 {
            return Err("frames count from 1");
        }
        if rollouts.group.is_empty() || rollouts.group.len() > MAX_FRAME_ROLLOUTS {
            return Err("a frame has 1 to 4096 rollouts");
        }
        let known = self.head.environments.len();
        if groups.environment.iter().any(|index| usize::from(*index) >= known) {
            return Err("a group's environment is not listed");
        }
        let lengths = groups.prompt_len.iter().chain(&rollouts.completion_len);
        if lengths.into_iter().any(|len| *len == 0 || wide(*len) > MAX_ROLLOUT_TOKENS) {
            return Err("a prompt or completion has no token, or more than 131072");
        }
        if rollouts.reward.iter().any(|reward| !reward.is_finite()) {
            return Err("a reward is not a finite number");
        }
        if rollouts.finish.iter().any(|finish| *finish > 1) {
            return Err("a rollout ended for no known reason");
        }
        // A single pass without an early exit, so that the compiler can take many at a time.
        if self.log_probs.iter().fold(false, |bad, p| bad | !(*p <= 0.0 && *p >= f32::MIN)) {
            return Err("a log-probability is positive or not a finite number");
        }
        self.check_groups()?;
        self.check_versions()?;
        if self.head.narrow != (is_narrow(&self.prompts) && is_narrow(&self.tokens)) {
            return Err("token ids are not in their narrowest form");
        }
        Ok(())
    }

    /// Checks that groups are listed once, in the order of their first rollout, and no member stands twice.
    fn check_groups(&self) -> Result<(), &'static str> {
        let mut members: Vec<(u16, u16)> =
            self.rollouts.group.iter().copied().zip(self.rollouts.member.iter().copied()).collect();
        let mut next = 0;
        for (group, _) in &members {
            match group.cmp(&next) {
                std::cmp::Ordering::Greater => return Err("groups are not in the order of their first rollout"),
                std::cmp::Ordering::Equal => next += 1,
                std::cmp::Ordering::Less => {}
            }
        }
        if usize::from(next) != self.groups.id.len() {
            return Err("a group has no rollout");
        }
        members.sort_unstable();
        if members.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err("a member stands twice");
        }
        let mut ids = self.groups.id.clone();
        ids.sort_unstable();
        if ids.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err("a group stands twice");
        }
        Ok(())
    }

    /// Checks that every version is listed and used, and that changes of version lie inside their rollout, one after the other.
    fn check_versions(&self) -> Result<(), &'static str> {
        let mut used = [false; MAX_FRAME_VERSIONS];
        for index in self.rollouts.version.iter().chain(&self.switches.version) {
            *used.get_mut(usize::from(*index)).ok_or("a version is not listed")? = true;
        }
        if used.iter().enumerate().any(|(index, used)| *used != (index < self.head.versions.len())) {
            return Err("a version is not listed, or is listed and not used");
        }
        let mut at = 0;
        for (row, many) in self.rollouts.switches.iter().enumerate() {
            let (mut from, mut version) = (0, self.rollouts.version[row]);
            for index in advance(&mut at, u32::from(*many)) {
                let (next, after) = (self.switches.at[index], self.switches.version[index]);
                if next <= from || next >= self.rollouts.completion_len[row] || after == version {
                    return Err("a change of version lies outside its rollout, or changes nothing");
                }
                (from, version) = (next, after);
            }
        }
        Ok(())
    }
}

fn is_narrow(ids: &[u32]) -> bool {
    ids.iter().fold(0, |all, id| all | id) <= u32::from(u16::MAX)
}

fn wide(len: u32) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}

/// Returns the next `len` positions and moves on.
fn advance(at: &mut usize, len: u32) -> Range<usize> {
    let start = *at;
    *at = start.saturating_add(wide(len));
    start..*at
}

/// Columns under construction.
#[derive(Default)]
struct Build {
    versions: Vec<Version>,
    environments: Vec<Text<96>>,
    /// Row of each group, and where its prompt begins.
    known: BTreeMap<GroupId, (u16, usize)>,
    groups: Groups,
    rollouts: Rollouts,
    switches: Switches,
    prompts: Vec<u32>,
    tokens: Vec<u32>,
    log_probs: Vec<f32>,
}

impl Build {
    fn push(&mut self, item: &Rollout) -> Result<(), FrameError> {
        if item.completion.len() != item.log_probs.len() {
            return Err(FrameError::Invalid("tokens and log-probabilities differ in number"));
        }
        let group = self.group(item)?;
        let [first, rest @ ..] = item.segments.as_slice() else {
            return Err(FrameError::Invalid("a rollout names no version"));
        };
        if first.from != 0 {
            return Err(FrameError::Invalid("a rollout's first segment does not begin at its first token"));
        }
        let rows = &mut self.rollouts;
        rows.group.push(group);
        rows.member.push(item.member);
        let tokens = item.completion.len();
        rows.completion_len.push(u32::try_from(tokens).map_err(|_| FrameError::TooMany("tokens"))?);
        rows.reward.push(item.reward);
        rows.finish.push(match item.finish {
            Finish::Stop => 0,
            Finish::Length => 1,
        });
        rows.version.push(index_of(&mut self.versions, &first.version, "versions")?);
        rows.switches.push(u8::try_from(rest.len()).map_err(|_| FrameError::TooMany("changes of version"))?);
        for segment in rest {
            self.switches.version.push(index_of(&mut self.versions, &segment.version, "versions")?);
            self.switches.at.push(segment.from);
        }
        self.tokens.extend_from_slice(&item.completion);
        self.log_probs.extend_from_slice(&item.log_probs);
        Ok(())
    }

    /// Returns the row of the rollout's group, adding it when it is new.
    fn group(&mut self, item: &Rollout) -> Result<u16, FrameError> {
        let environment = index_of(&mut self.environments, &item.environment, "environments")?;
        if let Some((row, start)) = self.known.get(&item.group) {
            let index = usize::from(*row);
            let prompt = &self.prompts[*start..*start + wide(self.groups.prompt_len[index])];
            let same = self.groups.environment[index] == environment && self.groups.seed[index] == item.seed;
            return if same && prompt == &*item.prompt { Ok(*row) } else { Err(FrameError::TwoTasks(item.group)) };
        }
        let row = count(self.groups.id.len(), "groups")?;
        self.known.insert(item.group, (row, self.prompts.len()));
        self.groups.id.push(item.group.0);
        self.groups.environment.push(environment);
        self.groups.seed.push(item.seed);
        let len = u32::try_from(item.prompt.len()).map_err(|_| FrameError::TooMany("tokens"))?;
        self.groups.prompt_len.push(len);
        self.prompts.extend_from_slice(&item.prompt);
        Ok(row)
    }
}

/// One rollout of a frame, seen where it lies.
#[derive(Clone, Debug)]
pub struct RolloutView<'a> {
    frame: &'a RolloutFrame,
    row: usize,
    group: usize,
    prompt: Range<usize>,
    tokens: Range<usize>,
    switches: Range<usize>,
}

impl<'a> RolloutView<'a> {
    /// Returns the group it belongs to.
    #[must_use]
    pub fn group(&self) -> GroupId {
        GroupId(self.frame.groups.id[self.group])
    }

    /// Returns its number in the group.
    #[must_use]
    pub fn member(&self) -> u16 {
        self.frame.rollouts.member[self.row]
    }

    /// Returns the environment that made the prompt.
    #[must_use]
    pub fn environment(&self) -> &'a Text<96> {
        &self.frame.head.environments[usize::from(self.frame.groups.environment[self.group])]
    }

    /// Returns the seed of the task.
    #[must_use]
    pub fn seed(&self) -> u64 {
        self.frame.groups.seed[self.group]
    }

    /// Returns the prompt's tokens.
    #[must_use]
    pub fn prompt(&self) -> &'a [u32] {
        &self.frame.prompts[self.prompt.clone()]
    }

    /// Returns the sampled tokens.
    #[must_use]
    pub fn completion(&self) -> &'a [u32] {
        &self.frame.tokens[self.tokens.clone()]
    }

    /// Returns the sampled tokens' natural-log probabilities.
    #[must_use]
    pub fn log_probs(&self) -> &'a [f32] {
        &self.frame.log_probs[self.tokens.clone()]
    }

    /// Returns the reward that the sampler computed.
    #[must_use]
    pub fn reward(&self) -> f32 {
        self.frame.rollouts.reward[self.row]
    }

    /// Returns why it ended.
    #[must_use]
    pub fn finish(&self) -> Finish {
        if self.frame.rollouts.finish[self.row] == 0 { Finish::Stop } else { Finish::Length }
    }

    /// Returns which version wrote what.
    pub fn segments(&self) -> impl Iterator<Item = Segment> + use<'a> {
        let frame = self.frame;
        let version = move |index: u8| frame.head.versions[usize::from(index)];
        let first = Segment { version: version(frame.rollouts.version[self.row]), from: 0 };
        let rest = self.switches.clone();
        std::iter::once(first).chain(
            rest.map(move |i| Segment { version: version(frame.switches.version[i]), from: frame.switches.at[i] }),
        )
    }

    /// Copies it out of its frame.
    #[must_use]
    pub fn to_rollout(&self) -> Rollout {
        Rollout {
            group: self.group(),
            member: self.member(),
            environment: self.environment().clone(),
            seed: self.seed(),
            prompt: self.prompt().into(),
            completion: self.completion().to_vec(),
            log_probs: self.log_probs().to_vec(),
            reward: self.reward(),
            finish: self.finish(),
            segments: self.segments().collect(),
        }
    }
}

impl Encode for RolloutFrame {
    fn encode<E: Encoder>(&self, encoder: &mut E) -> Result<(), EncodeError> {
        self.head.encode(encoder)?;
        let Self { groups, rollouts, switches, .. } = self;
        columns::write(encoder, &groups.id)?;
        columns::write(encoder, &groups.seed)?;
        columns::write(encoder, &groups.prompt_len)?;
        columns::write(encoder, &groups.environment)?;
        columns::write(encoder, &rollouts.completion_len)?;
        columns::write(encoder, &rollouts.reward)?;
        columns::write(encoder, &rollouts.group)?;
        columns::write(encoder, &rollouts.member)?;
        columns::write(encoder, &rollouts.finish)?;
        columns::write(encoder, &rollouts.version)?;
        columns::write(encoder, &rollouts.switches)?;
        columns::write(encoder, &switches.at)?;
        columns::write(encoder, &switches.version)?;
        for ids in [&self.prompts, &self.tokens] {
            if self.head.narrow {
                #[allow(clippy::cast_possible_truncation, reason = "narrow says that every id fits")]
                columns::write_as(encoder, ids, |id| id as u16)?;
            } else {
                columns::write(encoder, ids)?;
            }
        }
        columns::write(encoder, &self.log_probs)
    }
}

/// Returns the sum of lengths, if a frame can hold as many tokens.
fn sum(lengths: &[u32]) -> Result<usize, DecodeError> {
    let total = lengths.iter().fold(0, |sum: u64, len| sum + u64::from(*len));
    let total = usize::try_from(total).map_err(|_| DecodeError::LimitExceeded)?;
    if total > MAX_ROLLOUT_FRAME_BYTES { Err(DecodeError::LimitExceeded) } else { Ok(total) }
}

impl<C> Decode<C> for RolloutFrame {
    fn decode<D: Decoder<Context = C>>(decoder: &mut D) -> Result<Self, DecodeError> {
        let head = Head::decode(decoder)?;
        let (g, r, s) = (usize::from(head.groups), usize::from(head.rollouts), usize::from(head.switches));
        if g > r || r > MAX_FRAME_ROLLOUTS || s > MAX_FRAME_SWITCHES {
            return Err(DecodeError::Other("a frame's columns are over their limit"));
        }
        let groups = {
            let id = columns::read(decoder, g)?;
            let seed = columns::read(decoder, g)?;
            let prompt_len = columns::read(decoder, g)?;
            Groups { id, seed, prompt_len, environment: columns::read(decoder, g)? }
        };
        let completion_len = columns::read(decoder, r)?;
        let reward = columns::read(decoder, r)?;
        let group = columns::read(decoder, r)?;
        let member = columns::read(decoder, r)?;
        let finish = columns::read(decoder, r)?;
        let version = columns::read(decoder, r)?;
        let switches = columns::read(decoder, r)?;
        let rollouts = Rollouts { group, member, completion_len, reward, finish, version, switches };
        if rollouts.switches.iter().map(|many| usize::from(*many)).sum::<usize>() != s {
            return Err(DecodeError::Other("changes of version do not add up"));
        }
        let at = columns::read(decoder, s)?;
        let switches = Switches { at, version: columns::read(decoder, s)? };
        let (prompt_count, token_count) = (sum(&groups.prompt_len)?, sum(&rollouts.completion_len)?);
        let mut ids = |count| {
            if head.narrow {
                columns::read_as(decoder, count, |id: u16| u32::from(id))
            } else {
                columns::read(decoder, count)
            }
        };
        let (prompts, tokens) = (ids(prompt_count)?, ids(token_count)?);
        let log_probs = columns::read(decoder, token_count)?;
        let frame = Self { head, groups, rollouts, switches, prompts, tokens, log_probs };
        frame.check().map_err(DecodeError::Other)?;
        Ok(frame)
    }
}

impl<'de, C> BorrowDecode<'de, C> for RolloutFrame {
    fn borrow_decode<D: BorrowDecoder<'de, Context = C>>(decoder: &mut D) -> Result<Self, DecodeError> {
        <Self as Decode<C>>::decode(decoder)
    }
}
