//! What a trainer writes into its checkpoint, so that the buffer goes on where the weights do.

use chorus_protocol::NodeId;
use chorus_protocol::rollout::GroupId;

/// The buffer's part of a checkpoint. Frames that are on disk complete it ([`super::Buffer::restore`]).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Updates done.
    pub step: u64,
    /// The last group that was opened.
    pub opened: GroupId,
    /// Groups that are open. All others up to `opened` were used or given up.
    pub open: Vec<GroupId>,
    /// For each sampler, the frame up to which all are settled.
    pub settled: Vec<(NodeId, u64)>,
}

const MAGIC: &[u8; 8] = b"chorusB1";

impl Progress {
    /// Writes it as bytes: eight of a mark, then numbers of eight bytes each, little-endian.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        for number in [self.step, self.opened.0, self.open.len() as u64, self.settled.len() as u64] {
            out.extend(number.to_le_bytes());
        }
        self.open.iter().for_each(|group| out.extend(group.0.to_le_bytes()));
        for (sampler, through) in &self.settled {
            out.extend(sampler.as_bytes());
            out.extend(through.to_le_bytes());
        }
        out
    }

    /// Reads it back; `None` when the bytes are not one.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let mut rest = bytes.strip_prefix(MAGIC)?;
        let [step, opened, groups, samplers] = [(); 4].map(|()| number(&mut rest));
        let (groups, samplers) = (usize::try_from(groups?).ok()?, usize::try_from(samplers?).ok()?);
        if groups.checked_mul(8)?.checked_add(samplers.checked_mul(40)?)? != rest.len() {
            return None;
        }
        let open = (0..groups).map(|_| number(&mut rest).map(GroupId)).collect::<Option<_>>()?;
        let mut settled = Vec::with_capacity(samplers);
        for _ in 0..samplers {
            let (key, after) = rest.split_first_chunk::<32>()?;
            rest = after;
            settled.push((NodeId::from_bytes(key).ok()?, number(&mut rest)?));
        }
        Some(Self { step: step?, opened: GroupId(opened?), open, settled })
    }
}

fn number(rest: &mut &[u8]) -> Option<u64> {
    let (bytes, after) = rest.split_first_chunk::<8>()?;
    *rest = after;
    Some(u64::from_le_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use chorus_protocol::SecretKey;

    use super::*;

    #[test]
    fn progress_survives_its_bytes_and_nothing_else_passes_for_it() {
        let sampler = SecretKey::from_bytes(&[3; 32]).node_id();
        let open = vec![GroupId(5), GroupId(9)];
        let progress = Progress { step: 3, opened: GroupId(9), open, settled: vec![(sampler, 77)] };
        let bytes = progress.to_bytes();
        assert_eq!(Progress::from_bytes(&bytes), Some(progress));
        for cut in 0..bytes.len() {
            assert_eq!(Progress::from_bytes(&bytes[..cut]), None);
        }
        assert_eq!(Progress::from_bytes(&[bytes, vec![0]].concat()), None);
    }
}
