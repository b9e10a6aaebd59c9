//! What a convicted sampler signed, in a file that anybody can check who has the version's weights.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use chorus_protocol::limits::{ENVELOPE_OVERHEAD_BYTES, MAX_ROLLOUT_FRAME_BYTES};
use chorus_protocol::policy::Version;
use chorus_protocol::rollout::{GroupId, RolloutFrame};
use chorus_protocol::{NetworkId, NodeId, Received, Verified, codec};
use chorus_trainer::env::{DEFAULT_LIMIT, Environment, Judge, by_name};
use chorus_trainer::policy::{self, Policy};
use chorus_trainer::trust::{Evidence, Tolerance, Verdict};
use serde::{Deserialize, Serialize};

use super::library::{Library, write_whole};
use crate::error::CommandError;

/// A signed frame.
const MAX_FRAME_BYTES: usize = MAX_ROLLOUT_FRAME_BYTES + ENVELOPE_OVERHEAD_BYTES;

/// The file: JSON, with the signed frames as they crossed the wire, in hexadecimal.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    accused: String,
    group: u64,
    member: u16,
    frames: Vec<String>,
}

/// Writes the frame in which `accused` signed a rollout.
pub(super) fn write(
    path: &Path,
    (accused, group, member): (NodeId, GroupId, u16),
    frame: &Verified<RolloutFrame>,
) -> std::io::Result<()> {
    let frames = vec![hex::encode(codec::encode(&frame.to_wire()))];
    let file = File { accused: accused.to_string(), group: group.0, member, frames };
    write_whole(path, &serde_json::to_vec_pretty(&file)?)
}

/// Computes everything again with the versions that lie on this node's disk. Returns who is convicted, and of what.
pub(crate) fn check(path: &Path, data_dir: &Path, network: &NetworkId) -> Result<(NodeId, Verdict), CommandError> {
    let evidence = read(path)?;
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

fn read(path: &Path) -> Result<Evidence, CommandError> {
    let damaged =
        |why: &dyn std::fmt::Display| CommandError::usage(format!("{} is no evidence: {why}", path.display()));
    let bytes = fs::read(path).map_err(|error| damaged(&error))?;
    let file: File = serde_json::from_slice(&bytes).map_err(|error| damaged(&error))?;
    let decode = |text: &String| {
        let bytes = hex::decode(text).map_err(|error| damaged(&error))?;
        codec::decode::<Received<RolloutFrame>>("rollouts", &bytes, MAX_FRAME_BYTES).map_err(|error| damaged(&error))
    };
    let frames = file.frames.iter().map(decode).collect::<Result<_, _>>()?;
    let accused = file.accused.parse().map_err(|error| damaged(&error))?;
    Ok(Evidence { accused, place: (GroupId(file.group), file.member), frames })
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
                segments: vec![Segment { version: Version::default(), from: 0 }],
            };
            let frame = RolloutFrame::new(policy.clone(), 1, WallTime::from_millis(1), &[rollout]).unwrap();
            let frame = Verified::sign(&key, &network, frame).unwrap();
            let path = dir.path().join("evidence.json");
            write(&path, (key.node_id(), GroupId(3), 1), &frame).unwrap();
            let verdict = check(&path, dir.path(), &network);
            if convicts {
                assert_eq!(verdict.unwrap(), (key.node_id(), Verdict::WrongReward { recomputed: 1.0 }));
                assert!(check(&path, dir.path(), &"another".parse().unwrap()).is_err(), "signed for another network");
            } else {
                assert!(verdict.unwrap_err().to_string().contains("nothing is found"));
            }
        }
    }
}
