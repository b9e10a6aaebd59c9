//! What the network says, as lines for people: what a user can act on at `info` and above, the rest at `debug`. Loneliness and
//! bans are written where they are found, in the network itself.

use chorus_net::NetEvent;

/// Writes the line of an event that the node itself has no part in.
pub(crate) fn write(event: &NetEvent) {
    match event {
        NetEvent::Listening(addr) => tracing::info!(%addr, "listening"),
        NetEvent::ListenLost { addr, reason } => tracing::warn!(%addr, reason, "no longer listening"),
        NetEvent::ExternalAddr(addr) => tracing::info!(%addr, "others reach this node at an address"),
        NetEvent::Reachability(reachability) => tracing::info!(?reachability, "whether others can reach this node"),
        NetEvent::Incompatible { node, theirs } => {
            tracing::warn!(peer = %node.fmt_short(), theirs, "a peer of another network or version was refused");
        }
        NetEvent::DialFailed { addr, reason } => tracing::warn!(%addr, reason, "a dial failed"),
        NetEvent::DuplicateKey { node, addr } => {
            tracing::error!(
                node = %node.fmt_short(),
                addr = addr.as_ref().map(tracing::field::display),
                "two processes use this node's key: give one of them a key of its own"
            );
        }
        NetEvent::Shed { messages } => tracing::warn!(messages, "messages were refused: this node does not keep up"),
        // Alone, nobody listens; whoever comes learns all of it by reconciliation.
        NetEvent::PublishFailed { topic, error } => tracing::debug!(?topic, %error, "not published"),
        event => tracing::debug!(?event, "network"),
    }
}
