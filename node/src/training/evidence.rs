//! What a convicted sampler signed, in a file that anybody can check who has the version's weights.
//!
//! A file holds the bytes that are hashed (`protocol/spec/rollout.md`), and is called by their hash.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use chorus_protocol::misbehaviour::{self, Charge, Misbehaviour};
use chorus_protocol::policy::Version;
use chorus_protocol::rollout::{GroupId, RolloutFrame};
use chorus_protocol::{Hash, List, NetworkId, NodeId, Verified};
use chorus_trainer::env::{DEFAULT_LIMIT, Environment, Judge, by_name};
use chorus_trainer::policy::{self, Policy};
use chorus_trainer::trust::{Evidence, Tolerance, Verdict};

use super::library::{Library, write_whole};
use crate::error::CommandError;

/// Returns where evidence of this name lies.
pub(crate) fn path_of(directory: &Path, evidence: &Hash) -> PathBuf {
    directory.join(format!("{evidence}.evidence"))
}

/// Keeps the frame in which `accused` signed a rollout. Returns what it can be accused of with it.
pub(super) fn keep(
    directory: &Path,
    (accused, group, member): (NodeId, GroupId, u16),
    charge: Charge,
    frame: &Verified<RolloutFrame>,
) -> io::Result<Misbehaviour> {
    let frames = List::truncated([frame.to_wire()]);
    let evidence = misbehaviour::Evidence { accused, group, member, frames };
    let bytes = evidence.to_bytes().map_err(io::Error::other)?;
    let hash = misbehaviour::Evidence::hash(&bytes);
    fs::create_dir_all(directory)?;
    write_whole(&path_of(directory, &hash), &bytes)?;
    let mut rollouts = frame.rollouts();
    let rollout = rollouts.find(|rollout| (rollout.group(), rollout.member()) == (group, member));
    let version = rollout.and_then(|rollout| rollout.segments().next().map(|segment| segment.version));
    let (policy, version) = (frame.policy().clone(), version.unwrap_or_default());
    Ok(Misbehaviour { accused, policy, version, charge, evidence: hash, evidence_bytes: bytes.len() as u64 })
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
                if let Some(found) = load(data_dir, network, segment.version) {
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
fn load(data_dir: &Path, network: &NetworkId, version: Version) -> Option<Policy> {
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
            let accused = keep(dir.path(), (key.node_id(), GroupId(3), 1), Charge::WrongReward, &frame).unwrap();
            let path = path_of(dir.path(), &accused.evidence);
            let bytes = fs::read(&path).unwrap();
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
}
