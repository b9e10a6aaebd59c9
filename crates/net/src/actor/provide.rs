//! Who provides what: records in the DHT by which nodes find others that hold the same thing.
//!
//! A record is a hint: whoever follows it checks what he gets. Records of others are kept here for the DHT, a bounded number of
//! each peer and only until they expire.

use std::collections::{BTreeMap, HashMap};
use std::time::Instant;

use chorus_protocol::{Hash, NodeId};
use libp2p::kad::store::RecordStore;
use libp2p::{PeerId, kad};

use super::Actor;
use crate::behaviour::PROVIDER_TTL;
use crate::event::NetEvent;
use crate::identity::node_of;

/// Searches under way at once; one that is too many finds nobody.
const MAX_SEARCHES: usize = 64;
/// Peers that keys are kept for, and keys that are kept for one.
const MAX_PEERS: usize = 1024;
const MAX_KEYS_PER_PEER: usize = 64;
/// A key is a hash; anything else comes from somebody who speaks another protocol.
const HASH_BYTES: usize = 32;
/// Nodes that one search tells of.
const MAX_FOUND: usize = 64;

/// A search under way, and how many nodes it found so far.
#[derive(Debug)]
struct Search {
    key: Hash,
    found: usize,
}

/// What is searched for, and what is kept for others.
#[derive(Debug, Default)]
pub(crate) struct Providing {
    searches: HashMap<kad::QueryId, Search>,
    /// When each peer said last that it provides a key. The DHT's own store forgets nobody by itself.
    kept: BTreeMap<PeerId, HashMap<kad::RecordKey, Instant>>,
}

impl Providing {
    /// Notes that a peer says it provides a key; returns whether to keep that.
    fn keep(&mut self, peer: PeerId, key: &kad::RecordKey, now: Instant) -> bool {
        if key.as_ref().len() != HASH_BYTES || (self.kept.len() >= MAX_PEERS && !self.kept.contains_key(&peer)) {
            return false;
        }
        let keys = self.kept.entry(peer).or_default();
        let room = keys.len() < MAX_KEYS_PER_PEER || keys.contains_key(key);
        if room {
            keys.insert(key.clone(), now);
        }
        room
    }

    /// Forgets what was not said again in time, and returns it.
    fn expire(&mut self, now: Instant) -> Vec<(PeerId, kad::RecordKey)> {
        let mut gone = Vec::new();
        for (peer, keys) in &mut self.kept {
            let expired = keys.extract_if(|_, said| now.saturating_duration_since(*said) >= PROVIDER_TTL);
            gone.extend(expired.map(|(key, _)| (*peer, key)));
        }
        self.kept.retain(|_, keys| !keys.is_empty());
        gone
    }
}

fn record_key(key: &Hash) -> kad::RecordKey {
    kad::RecordKey::new(key.as_bytes())
}

impl Actor {
    pub(super) fn provide(&mut self, key: Hash) {
        if let Err(error) = self.swarm.behaviour_mut().kad.start_providing(record_key(&key)) {
            tracing::warn!(%error, "the DHT is not told what this node provides: too many keys");
        }
    }

    pub(super) fn unprovide(&mut self, key: Hash) {
        self.swarm.behaviour_mut().kad.stop_providing(&record_key(&key));
    }

    pub(super) fn find_providers(&mut self, key: Hash) {
        if self.providing.searches.len() >= MAX_SEARCHES {
            self.emit(NetEvent::Providers { key, nodes: Vec::new() });
            return;
        }
        let query = self.swarm.behaviour_mut().kad.get_providers(record_key(&key));
        self.providing.searches.insert(query, Search { key, found: 0 });
    }

    pub(super) fn on_providers(&mut self, query: kad::QueryId, result: kad::GetProvidersResult, last: bool) {
        let Some(search) = self.providing.searches.get_mut(&query) else { return };
        let found = match result {
            Ok(kad::GetProvidersOk::FoundProviders { providers, .. }) => providers,
            Ok(kad::GetProvidersOk::FinishedWithNoAdditionalRecord { .. })
            | Err(kad::GetProvidersError::Timeout { .. }) => Default::default(),
        };
        let others = found.iter().filter_map(node_of).filter(|node| *node != self.me);
        let nodes: Vec<NodeId> = others.take(MAX_FOUND - search.found).collect();
        search.found += nodes.len();
        let (key, nobody) = (search.key, search.found == 0);
        if last {
            self.providing.searches.remove(&query);
        }
        if !nodes.is_empty() || (last && nobody) {
            self.emit(NetEvent::Providers { key, nodes });
        }
    }

    /// A peer says that it provides a key. (That it speaks for nobody else was checked below.)
    pub(super) fn on_provided(&mut self, record: kad::ProviderRecord, now: Instant) {
        if self.providing.keep(record.provider, &record.key, now) {
            // A full store keeps what it has.
            let _ = self.swarm.behaviour_mut().kad.store_mut().add_provider(record);
        }
    }

    pub(super) fn forget_providers(&mut self, now: Instant) {
        for (peer, key) in self.providing.expire(now) {
            self.swarm.behaviour_mut().kad.store_mut().remove_provider(&key, &peer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_for_one_peer_is_bounded_and_expires() {
        let (peer, now) = (PeerId::random(), Instant::now());
        let mut providing = Providing::default();
        let keys: Vec<_> = (0..=u8::MAX).map(|key| kad::RecordKey::new(&[key; HASH_BYTES])).collect();
        let kept = keys.iter().filter(|key| providing.keep(peer, key, now)).count();
        assert_eq!(kept, MAX_KEYS_PER_PEER);
        assert!(!providing.keep(PeerId::random(), &kad::RecordKey::new(&[0; 31]), now), "no key of this house");
        assert!(providing.keep(PeerId::random(), &keys[0], now), "others have room of their own");
        let later = now + PROVIDER_TTL / 2;
        assert!(providing.keep(peer, &keys[0], later), "what is said again counts for longer");
        assert_eq!(providing.expire(now + PROVIDER_TTL).len(), MAX_KEYS_PER_PEER, "all but the one said again");
        assert_eq!(providing.expire(later + PROVIDER_TTL), [(peer, keys[0].clone())]);
        assert!(providing.kept.is_empty());
    }
}
