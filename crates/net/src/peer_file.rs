//! The peers of yesterday: a small file by which a node that was once in a swarm finds it again, even when the peers that its
//! configuration names are gone.
//!
//! One line an address: the hour in which its peer was last connected (since 1970), and the address, which ends in the peer's id.
//! Nobody has to trust the file: whoever answers at an address proves the id first. A line that makes no sense is passed over
//! with a warning, and a file that cannot be read or written never stops a node.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use chorus_protocol::NodeId;

use crate::addr::{Addr, MAX_ADDR_CHARS};
use crate::behaviour::book::MAX_ADDRS_PER_PEER;

/// Peers in the file: those connected last.
pub(crate) const MAX_MET: usize = 64;
/// A peer that was not connected for so many hours (30 days) is left out.
const MAX_AGE_HOURS: u64 = 30 * 24;
/// What is read of a file: room for every address that may be in it.
const MAX_BYTES: usize = MAX_MET * MAX_ADDRS_PER_PEER * (MAX_ADDR_CHARS + 16);

/// A peer that was once connected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Met {
    pub(crate) node: NodeId,
    /// The hour in which it was last seen, since 1970.
    pub(crate) hour: u64,
    /// Where it listens, without its id.
    pub(crate) addrs: Vec<Addr>,
}

/// The hour of a wall clock, since 1970.
pub(crate) fn hour_of(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() / 3600)
}

/// The file.
#[derive(Debug)]
pub(crate) struct PeerFile {
    path: PathBuf,
    /// What is in it, so that it is only written when that changes.
    text: String,
}

impl PeerFile {
    /// Reads the file; one that is missing, unreadable or damaged gives what it can.
    pub(crate) fn open(path: PathBuf, now: SystemTime) -> (Self, Vec<Met>) {
        let text = read(&path).unwrap_or_else(|error| {
            if error.kind() != io::ErrorKind::NotFound {
                tracing::warn!(path = %path.display(), %error, "the peers of the last run are not known");
            }
            String::new()
        });
        let (met, damaged) = parse(&text, hour_of(now));
        if damaged > 0 {
            tracing::warn!(path = %path.display(), lines = damaged, "damaged lines in the list of known peers are passed over");
        }
        (Self { path, text }, met)
    }

    /// Returns the job of writing the file, if that is worth it. It may block.
    pub(crate) fn update(&mut self, met: Vec<Met>, now: SystemTime) -> Option<impl FnOnce() + Send + use<>> {
        let text = print(met, hour_of(now));
        if text == self.text {
            return None;
        }
        self.text.clone_from(&text);
        let path = self.path.clone();
        Some(move || {
            if let Err(error) = replace(&path, &text) {
                tracing::warn!(path = %path.display(), %error, "the list of known peers cannot be written");
            }
        })
    }
}

fn read(path: &Path) -> io::Result<String> {
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(MAX_BYTES as u64).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// A crash leaves the old file or the new one, never half of one.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let partial = path.with_extension("new");
    fs::write(&partial, text)?;
    fs::rename(&partial, path)
}

fn print(mut met: Vec<Met>, now: u64) -> String {
    met.retain(|met| met.hour + MAX_AGE_HOURS >= now);
    met.sort_unstable_by_key(|met| (std::cmp::Reverse(met.hour), met.node));
    let mut text = String::new();
    for Met { node, hour, addrs } in met.iter().take(MAX_MET) {
        for addr in addrs {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{hour} {}", addr.with_node(*node));
        }
    }
    text
}

/// Returns the peers, and how many lines made no sense.
fn parse(text: &str, now: u64) -> (Vec<Met>, usize) {
    let mut met: BTreeMap<NodeId, Met> = BTreeMap::new();
    let mut damaged = 0;
    for line in text.lines().filter(|line| !line.is_empty()) {
        let Some((node, hour, addr)) = parse_line(line) else {
            damaged += 1;
            continue;
        };
        if hour + MAX_AGE_HOURS < now || (met.len() >= MAX_MET && !met.contains_key(&node)) {
            continue;
        }
        // A clock that was wrong must not make a peer fresh for ever.
        let hour = hour.min(now);
        let known = met.entry(node).or_insert_with(|| Met { node, hour, addrs: Vec::new() });
        if known.addrs.len() < MAX_ADDRS_PER_PEER {
            known.addrs.push(addr);
        }
    }
    (met.into_values().collect(), damaged)
}

fn parse_line(line: &str) -> Option<(NodeId, u64, Addr)> {
    let (hour, addr) = line.split_once(' ')?;
    let hour = hour.parse().ok().filter(|hour| *hour < u64::from(u32::MAX))?;
    let addr: Addr = addr.parse().ok().filter(Addr::is_dialable)?;
    Some((addr.node()?, hour, addr.without_node()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use chorus_protocol::SecretKey;

    use super::*;

    fn met(seed: u8, hour: u64) -> Met {
        let node = SecretKey::from_bytes(&[seed; 32]).node_id();
        let addrs = [format!("/ip4/192.0.2.{seed}/tcp/7600"), format!("/ip6/2001:db8::{seed}/udp/7600/quic-v1")];
        Met { node, hour, addrs: addrs.map(|addr| addr.parse().unwrap()).to_vec() }
    }

    #[test]
    fn what_is_written_is_read_back_and_the_old_is_left_out() {
        let now = 500_000;
        let text = print(vec![met(1, now - 5), met(2, now), met(3, now - MAX_AGE_HOURS - 1)], now);
        assert_eq!(text.lines().count(), 4, "{text}");
        let (mut back, damaged) = parse(&text, now);
        back.sort_by_key(|met| met.hour);
        assert_eq!((back, damaged), (vec![met(1, now - 5), met(2, now)], 0));
        assert_eq!(parse(&text, now + MAX_AGE_HOURS + 1).0, []);
        assert_eq!(parse(&print(vec![met(1, now + 900)], now), now).0[0].hour, now, "a clock that was wrong");
    }

    #[test]
    fn damage_costs_the_damaged_lines_only() {
        let now = 500_000;
        let good = print(vec![met(1, now)], now);
        let named = good.lines().next().unwrap().split_once(' ').unwrap().1;
        for bad in
            ["", "\u{0}\u{fffd}", "500000", "x /ip4/192.0.2.1/tcp/1", "500000 /ip4/192.0.2.1/tcp/1", &named[..30]]
        {
            let (back, damaged) = parse(&format!("{bad}\n{good}"), now);
            assert_eq!(back, [met(1, now)], "{bad:?}");
            assert_eq!(damaged, usize::from(!bad.is_empty()), "{bad:?}");
        }
        assert_eq!(parse(&format!("{} {named}", u64::MAX), now), (Vec::new(), 1), "an hour beyond all hours");
    }

    #[test]
    fn the_list_is_bounded_and_keeps_those_seen_last() {
        let now = 500_000;
        let text = print((0..=255).map(|seed| met(seed, now - 255 + u64::from(seed))).collect(), now);
        let (back, _) = parse(&text, now);
        assert_eq!(back.len(), MAX_MET);
        assert!(back.iter().all(|met| met.hour > now - MAX_MET as u64));
        assert!(text.len() < MAX_BYTES);
    }
}
