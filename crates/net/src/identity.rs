//! One key, two spellings: our [`NodeId`] is the Ed25519 public key, libp2p's `PeerId` is the same 32 bytes inside a protobuf
//! inside an identity multihash. Going from one to the other needs no table.

use chorus_protocol::{NodeId, SecretKey};
use libp2p::PeerId;
use libp2p::identity::Keypair;

/// Multihash code 0 (identity), 36 bytes; protobuf: key type 1 (Ed25519), 32 bytes of data.
const PREFIX: [u8; 6] = [0x00, 0x24, 0x08, 0x01, 0x12, 0x20];

/// Spells a node id as a peer id.
pub(crate) fn peer_of(node: &NodeId) -> PeerId {
    let mut bytes = [0; 38];
    bytes[..6].copy_from_slice(&PREFIX);
    bytes[6..].copy_from_slice(node.as_bytes());
    PeerId::from_bytes(&bytes).expect("an identity multihash of 36 bytes is a peer id")
}

/// Spells a peer id as a node id; `None` when the peer's key is not Ed25519 (or a weak one).
pub(crate) fn node_of(peer: &PeerId) -> Option<NodeId> {
    let bytes = peer.to_bytes();
    let key: &[u8; 32] = bytes.strip_prefix(&PREFIX)?.try_into().ok()?;
    NodeId::from_bytes(key).ok()
}

/// Hands the node's secret to the transport, which proves the peer id with it.
pub(crate) fn keypair_of(key: &SecretKey) -> Keypair {
    let mut bytes = key.to_bytes();
    Keypair::ed25519_from_bytes(&mut *bytes).expect("32 bytes are an Ed25519 secret")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_two_spellings_agree_with_libp2p() {
        for seed in 0..8 {
            let key = SecretKey::from_bytes(&[seed; 32]);
            let peer = keypair_of(&key).public().to_peer_id();
            assert_eq!(peer_of(&key.node_id()), peer);
            assert_eq!(node_of(&peer), Some(key.node_id()));
        }
        assert_eq!(node_of(&PeerId::random()), None, "a random multihash is no key");
    }
}
