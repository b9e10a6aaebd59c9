//! What a convicted sampler signed, in a file that anybody can check who has the version's weights.
//!
//! A file holds the bytes that are hashed (`protocol/spec/rollout.md`), and is called by their hash.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use chorus_protocol::limits::{
    ENVELOPE_OVERHEAD_BYTES, MAX_EVIDENCE_BYTES, MAX_EVIDENCE_FRAMES, MAX_EVIDENCE_PIECE_BYTES,
};
use chorus_protocol::misbehaviour::{self, Charge, Misbehaviour};
use chorus_protocol::policy::Version;
use chorus_protocol::rollout::{GroupId, RolloutFrame};
use chorus_protocol::{Hash, List, NetworkId, NodeId, Verified};
use chorus_trainer::env::{DEFAULT_LIMIT, Environment, Judge, by_name};
use chorus_trainer::policy::{self, Policy};
use chorus_trainer::trust::{Evidence, Tolerance, Verdict};

use super::library::{Library, write_whole};
use crate::error::CommandError;

/// What one message holds.
type PieceBytes = List<u8, MAX_EVIDENCE_PIECE_BYTES>;

/// Returns where evidence of this name lies.
pub(crate) fn path_of(directory: &Path, evidence: &Hash) -> PathBuf {
    directory.join(format!("{evidence}.evidence"))
}

/// Returns the frames that came up to `last`, as they were made: those of its author without a gap, and the newest of the others for
/// which there is room.
pub(super) fn up_to(
    mut frames: Vec<Verified<RolloutFrame>>,
    last: &Verified<RolloutFrame>,
) -> Vec<Verified<RolloutFrame>> {
    let place = |frame: &Verified<RolloutFrame>| (frame.made(), frame.author(), frame.sequence());
    frames.retain(|frame| place(frame) <= place(last));
    frames.sort_by_key(place);
    let (mut next, mut bytes, mut found) = (last.sequence(), 0, Vec::new());
    for frame in frames.into_iter().rev() {
        bytes += frame.encoded_len() + ENVELOPE_OVERHEAD_BYTES;
        if found.len() >= MAX_EVIDENCE_FRAMES || bytes > MAX_EVIDENCE_BYTES - ENVELOPE_OVERHEAD_BYTES {
            break;
        }
        let own = frame.author() == last.author();
        if own && frame.sequence() == next {
            next = next.saturating_sub(1);
            found.push(frame);
        } else if !own {
            found.push(frame);
        }
    }
    found.reverse();
    found
}

/// Keeps the frames in which `accused` signed a rollout, the one that holds it and all that are involved. Returns what it can be
/// accused of with them.
pub(super) fn keep(
    directory: &Path,
    (accused, group, member): (NodeId, GroupId, u16),
    charge: Charge,
    (frame, involved): (&Verified<RolloutFrame>, &[Verified<RolloutFrame>]),
) -> io::Result<Misbehaviour> {
    let frames = List::truncated(involved.iter().map(Verified::to_wire));
    let evidence = misbehaviour::Evidence { accused, group, member, frames };
    let bytes = evidence.to_bytes().map_err(io::Error::other)?;
    let hash = misbehaviour::Evidence::hash(&bytes);
    store(directory, &hash, &bytes)?;
    let mut rollouts = frame.rollouts();
    let rollout = rollouts.find(|rollout| (rollout.group(), rollout.member()) == (group, member));
    let version = rollout.and_then(|rollout| rollout.segments().next().map(|segment| segment.version));
    let (policy, version) = (frame.policy().clone(), version.unwrap_or_default());
    Ok(Misbehaviour { accused, policy, version, charge, evidence: hash, evidence_bytes: bytes.len() as u64 })
}

/// Writes evidence where its hash says.
pub(super) fn store(directory: &Path, evidence: &Hash, bytes: &[u8]) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    write_whole(&path_of(directory, evidence), bytes)
}

/// Reads evidence whose bytes still have its hash.
pub(super) fn load(directory: &Path, evidence: &Hash) -> io::Result<Vec<u8>> {
    let bytes = fs::read(path_of(directory, evidence))?;
    if misbehaviour::Evidence::hash(&bytes) == *evidence { Ok(bytes) } else { Err(io::ErrorKind::InvalidData.into()) }
}

/// Reads evidence from a byte on, as much as one message holds. Returns the size of the whole too.
pub(super) fn read_piece(directory: &Path, evidence: &Hash, from: u64) -> io::Result<(u64, PieceBytes)> {
    let mut file = fs::File::open(path_of(directory, evidence))?;
    let total = file.metadata()?.len();
    if from >= total {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    file.seek(SeekFrom::Start(from))?;
    let mut bytes = Vec::new();
    file.take(MAX_EVIDENCE_PIECE_BYTES as u64).read_to_end(&mut bytes)?;
    Ok((total, List::new(bytes).map_err(io::Error::other)?))
}

/// Returns what is kept, the newest first.
pub(super) fn held(directory: &Path) -> Vec<Hash> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let named = |entry: fs::DirEntry| {
        let path = entry.path();
        let name = path.file_name()?.to_str()?.strip_suffix(".evidence")?;
        Some((entry.metadata().ok()?.modified().ok()?, name.parse().ok()?))
    };
    let mut found: Vec<(SystemTime, Hash)> = entries.filter_map(|entry| named(entry.ok()?)).collect();
    found.sort();
    found.into_iter().rev().map(|(_, evidence)| evidence).collect()
}

/// Checks what is in a file, see [`check`].
pub(crate) fn check_file(path: &Path, data_dir: &Path, network: &NetworkId) -> Result<(NodeId, Verdict), CommandError> {
    let bytes =
        fs::read(path).map_err(|error| CommandError::usage(format!("{} cannot be read: {error}", path.display())))?;
    check(&bytes, data_dir, network)
}

/// Computes everything again with the versions that lie on this node's disk. Returns who is convicted, and of what.
pub(crate) fn check(bytes: &[u8], data_dir: &Path, network: &NetworkId) -> Result<(NodeId, Verdict), CommandError> {
    let damaged = |error| CommandError::usage(format!("this is no evidence: {error}"));
    let misbehaviour::Evidence { accused, group, member, frames } =
        misbehaviour::Evidence::from_bytes(bytes).map_err(damaged)?;
    let evidence = Evidence { accused, place: (group, member), frames: frames.into_vec() };
    let mut environments: BTreeMap<String, Arc<dyn Environment>> = BTreeMap::new();
    let mut weights: BTreeMap<Version, Policy> = BTreeMap::new();
    for frame in &evidence.frames {
        // Whether the signature holds is checked below, before anything is made of what is claimed here.
        let claimed = frame.unverified().map_err(CommandError::failed)?;
        for rollout in claimed.rollouts() {
            let name = rollout.environment().as_str();
            if let Some(environment) = by_name(name) {
                environments.insert(name.to_owned(), Arc::from(environment));
            }
            for segment in rollout.segments() {
                if let Some(found) = weights_of(data_dir, network, segment.version) {
                    weights.insert(segment.version, found);
                }
            }
        }
    }
    let mut judge = Judge::new(environments.into_values(), DEFAULT_LIMIT);
    let verdict = evidence.check(network, &mut judge, |version| weights.get(version), Tolerance::default());
    let verdict = verdict.map_err(|error| {
        CommandError::failed(error).hint(
            "log-probabilities are computed under the version that wrote them, which must be on this disk: chorus policy ls",
        )
    })?;
    Ok((evidence.accused, verdict))
}

/// Loads a version that is on this disk, whole, and named by a manifest of its owner.
fn weights_of(data_dir: &Path, network: &NetworkId, version: Version) -> Option<Policy> {
    Library::all(data_dir, network).into_iter().find_map(|library| {
        let manifest = library.manifests().into_iter().find(|manifest| manifest.version == version)?;
        let sound = manifest.author() == manifest.policy.owner && library.missing(&manifest).is_empty();
        sound.then(|| policy::load(&library.directory(version)).ok())?
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use chorus_protocol::job::Finish;
    use chorus_protocol::policy::PolicyId;
    use chorus_protocol::rollout::{Rollout, Segment};
    use chorus_protocol::{SecretKey, Text, WallTime};
    use chorus_trainer::env::training_task_of;
    use chorus_trainer::policy::Tokenizer;

    use super::*;

    #[test]
    fn a_reward_that_was_made_up_convicts_from_the_file_alone_and_an_honest_one_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let (key, network) = (SecretKey::from_bytes(&[5; 32]), "evidence".parse::<NetworkId>().unwrap());
        let policy = PolicyId { owner: key.node_id(), name: Text::new("p").unwrap() };
        let environment = by_name("arithmetic-2").unwrap();
        let task = training_task_of(&*environment, 7);
        for (reward, convicts) in [(0.0, true), (1.0, false)] {
            let completion = Tokenizer.encode(&task.solution);
            let rollout = Rollout {
                group: GroupId(3),
                member: 1,
                environment: Text::new(environment.name()).unwrap(),
                seed: 7,
                prompt: Tokenizer.encode(&task.prompt).into(),
                log_probs: vec![-0.5; completion.len()],
                completion,
                reward,
                finish: Finish::Stop,
                segments: vec![Segment { version: Version::from_hash(Hash::from_bytes([4; 32])), from: 0 }],
            };
            let frame = RolloutFrame::new(policy.clone(), 1, WallTime::from_millis(1), &[rollout]).unwrap();
            let frame = Verified::sign(&key, &network, frame).unwrap();
            let accused =
                keep(dir.path(), (key.node_id(), GroupId(3), 1), Charge::WrongReward, (&frame, &[frame.clone()]))
                    .unwrap();
            let path = path_of(dir.path(), &accused.evidence);
            let bytes = load(dir.path(), &accused.evidence).unwrap();
            let (total, piece) = read_piece(dir.path(), &accused.evidence, 10).unwrap();
            assert_eq!((total, &piece[..]), (bytes.len() as u64, &bytes[10..]));
            assert!(read_piece(dir.path(), &accused.evidence, total).is_err(), "nothing is left");
            assert!(held(dir.path()).contains(&accused.evidence));
            assert_eq!(misbehaviour::Evidence::hash(&bytes), accused.evidence);
            assert_eq!((bytes.len() as u64, accused.accused), (accused.evidence_bytes, key.node_id()));
            assert_eq!(
                (accused.policy, accused.version),
                (policy.clone(), Version::from_hash(Hash::from_bytes([4; 32])))
            );
            let verdict = check_file(&path, dir.path(), &network);
            if convicts {
                assert_eq!(verdict.unwrap(), (key.node_id(), Verdict::WrongReward { recomputed: 1.0 }));
                assert!(check(&bytes, dir.path(), &"another".parse().unwrap()).is_err(), "signed for another network");
            } else {
                assert!(verdict.unwrap_err().to_string().contains("nothing is found"));
            }
        }
    }

    #[test]
    fn of_copies_the_frames_of_the_accused_come_without_a_gap() {
        let network = "evidence".parse::<NetworkId>().unwrap();
        let frame = |signer: u8, sequence, made| {
            let key = SecretKey::from_bytes(&[signer; 32]);
            let rollout = Rollout {
                group: GroupId(3),
                member: 1,
                environment: Text::new("arithmetic-2").unwrap(),
                seed: 7,
                prompt: [1].into(),
                log_probs: vec![-0.5],
                completion: vec![1],
                reward: 1.0,
                finish: Finish::Stop,
                segments: vec![Segment { version: Version::default(), from: 0 }],
            };
            let policy = PolicyId { owner: key.node_id(), name: Text::new("p").unwrap() };
            let frame = RolloutFrame::new(policy, sequence, WallTime::from_millis(made), &[rollout]).unwrap();
            Verified::sign(&key, &network, frame).unwrap()
        };
        // Its second frame is not there any more; its fifth and the last of another came later.
        let all = [(1, 4, 9), (2, 1, 2), (1, 1, 1), (1, 3, 5), (2, 2, 7), (1, 5, 11), (2, 3, 12)];
        let frames: Vec<_> = all.iter().map(|(signer, sequence, made)| frame(*signer, *sequence, *made)).collect();
        let kept = up_to(frames.clone(), &frames[0]);
        let shown: Vec<_> = kept.iter().map(|frame| (frame.sequence(), frame.made().as_millis())).collect();
        assert_eq!(shown, [(1, 2), (3, 5), (2, 7), (4, 9)]);
    }
}
