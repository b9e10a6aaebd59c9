//! Protocol names. Each carries the network's name and the version of the wire, so that two networks never take each other's
//! messages for their own, and `identify` can say who is not one of us.

use chorus_protocol::{NetworkId, WIRE_VERSION};
use libp2p::StreamProtocol;
use libp2p::gossipsub::{IdentTopic, TopicHash};

use crate::event::Topic;

/// What a foreign peer says it speaks is cut to this many characters.
const MAX_FOREIGN_CHARS: usize = 96;
/// The protocol that a relay announces.
pub(crate) const RELAY_HOP: &str = "/libp2p/circuit/relay/0.2.0/hop";

/// All names of one network.
#[derive(Clone, Debug)]
pub(crate) struct Names {
    /// `/chorus/<network>/direct/<version>`: request-response, one batch of messages and its acknowledgement.
    pub(crate) direct: StreamProtocol,
    /// `/chorus/<network>/kad/<version>`.
    pub(crate) kad: StreamProtocol,
    /// `/chorus/<network>/bulk/<version>`: one stream for each session of the bulk plane.
    pub(crate) bulk: StreamProtocol,
    /// `chorus/<network>/<version>`: the protocol version that `identify` carries.
    pub(crate) identify: String,
    topics: [(Topic, IdentTopic); 2],
}

impl Names {
    pub(crate) fn new(network: &NetworkId) -> Self {
        let stream = |what| {
            StreamProtocol::try_from_owned(format!("/chorus/{network}/{what}/{WIRE_VERSION}"))
                .expect("it begins with a slash")
        };
        let topic =
            |topic: Topic| (topic, IdentTopic::new(format!("chorus/{network}/{}/{WIRE_VERSION}", topic.name())));
        Self {
            direct: stream("direct"),
            kad: stream("kad"),
            bulk: stream("bulk"),
            identify: format!("chorus/{network}/{WIRE_VERSION}"),
            topics: Topic::ALL.map(topic),
        }
    }

    pub(crate) fn topics(&self) -> impl Iterator<Item = &IdentTopic> {
        self.topics.iter().map(|(_, ident)| ident)
    }

    pub(crate) fn hash(&self, topic: Topic) -> TopicHash {
        let [(_, ledger), (_, beacon)] = &self.topics;
        match topic {
            Topic::Ledger => ledger.hash(),
            Topic::Beacon => beacon.hash(),
        }
    }

    pub(crate) fn topic(&self, hash: &TopicHash) -> Option<Topic> {
        self.topics.iter().find(|(_, ident)| ident.hash() == *hash).map(|(topic, _)| *topic)
    }

    /// Returns what a peer speaks instead of our protocol, as printable text; nothing when it is one of us.
    pub(crate) fn foreign(&self, theirs: &str) -> Option<String> {
        let printable = |c: &char| !c.is_control();
        (theirs != self.identify).then(|| theirs.chars().filter(printable).take(MAX_FOREIGN_CHARS).collect())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn two_networks_share_no_name() {
        let ours = Names::new(&"a".parse().unwrap());
        let theirs = Names::new(&"b".parse().unwrap());
        assert_eq!(ours.direct.as_ref(), format!("/chorus/a/direct/{WIRE_VERSION}"));
        assert_ne!(ours.kad, theirs.kad);
        assert_eq!(ours.foreign(&ours.identify), None);
        assert_eq!(ours.foreign(&theirs.identify), Some(theirs.identify.clone()));
        assert_eq!(ours.foreign("x\u{1b}[2Jy").unwrap(), "x[2Jy");
        for topic in Topic::ALL {
            assert_eq!(ours.topic(&ours.hash(topic)), Some(topic));
            assert_eq!(ours.topic(&theirs.hash(topic)), None);
        }
    }
}
