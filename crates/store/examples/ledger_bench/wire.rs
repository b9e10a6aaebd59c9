//! What a reconciliation costs on the wire: two ledgers and a wire between them.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use chorus_ledger::{Ledger, LedgerConfig, LedgerEffect, LedgerInput};
use chorus_machine::{Ctx, Machine, Outbox, Rng, Time};
use chorus_protocol::entry::Entry;
use chorus_protocol::limits::ENVELOPE_OVERHEAD_BYTES;
use chorus_protocol::message::{Direct, Frame};
use chorus_protocol::{NodeId, Verified, WallTime};

use crate::records::{WALL, key, network};

/// Two ledgers and a wire between them.
struct Pair {
    ledgers: [Ledger; 2],
    ids: [NodeId; 2],
    rngs: [Rng; 2],
    queue: VecDeque<(usize, Direct)>,
    now: Time,
    messages: usize,
    bytes: usize,
}

impl Pair {
    fn new(left: Vec<Verified<Entry>>, right: Vec<Verified<Entry>>) -> Self {
        let ledger = |n: u64, entries| {
            let mut ledger = Ledger::new(LedgerConfig::default(), network(), key(n));
            ledger.restore(WallTime::from_millis(WALL), entries, Vec::new(), Vec::new());
            ledger
        };
        Self {
            ledgers: [ledger(200, left), ledger(201, right)],
            ids: [200, 201].map(|n: u64| key(n).node_id()),
            rngs: [Rng::from_u64(1), Rng::from_u64(2)],
            queue: VecDeque::new(),
            now: Time::from_millis(1),
            messages: 0,
            bytes: 0,
        }
    }

    fn call(&mut self, n: usize, input: Option<LedgerInput>) {
        let mut out = Outbox::new();
        let mut cx = Ctx { now: self.now, wall: WallTime::from_millis(WALL), rng: &mut self.rngs[n] };
        match input {
            Some(input) => self.ledgers[n].handle(&mut cx, input, &mut out),
            None => self.ledgers[n].expire(&mut cx, &mut out),
        }
        for effect in out.drain() {
            if let LedgerEffect::Send { message, .. } = effect {
                self.queue.push_back((n, Direct::Sync(message)));
            }
        }
    }

    fn deliver(&mut self) {
        loop {
            if let Some((from, message)) = self.queue.pop_front() {
                let bytes = message.to_bytes().unwrap();
                self.messages += 1;
                self.bytes += bytes.len();
                let Direct::Sync(message) = Direct::from_bytes(&bytes).unwrap() else { continue };
                let id = self.ids[from];
                self.call(1 - from, Some(LedgerInput::Sync { from: id, message }));
            } else if let Some(due) = (0..2).find(|n| self.ledgers[*n].deadline().is_some_and(|at| at <= self.now)) {
                self.call(due, None);
            } else {
                break;
            }
        }
    }

    /// Lets one of the two notice the other, and runs until nothing is under way.
    fn meet(&mut self, n: usize) {
        let other = self.ids[1 - n];
        self.call(n, Some(LedgerInput::PeerUp(other)));
        self.now = self.now + Duration::from_millis(400);
        self.deliver();
        self.call(n, Some(LedgerInput::PeerDown(other)));
    }
}

#[allow(clippy::cast_precision_loss, reason = "counts far below 2^52")]
/// Lets two ledgers meet that hold the same but for `differences` entries, half of them missing on either side.
pub(crate) fn reconcile(all: &[Verified<Entry>], differences: usize, recent: bool) {
    let step = all.len() / differences;
    let differs = |n: usize| if recent { n + differences >= all.len() } else { n % step == step / 2 };
    let without = |side: usize| {
        let kept = all.iter().enumerate().filter(|(n, _)| !differs(*n) || n / step.max(1) % 2 == side);
        kept.map(|(_, entry)| entry.clone()).collect::<Vec<_>>()
    };
    let missing = all.iter().enumerate().filter(|(n, _)| differs(*n)).map(|(_, entry)| entry);
    let difference: usize = missing.map(|entry| entry.encoded_len() + ENVELOPE_OVERHEAD_BYTES).sum();
    let mut pair = Pair::new(without(0), without(1));
    let start = Instant::now();
    pair.meet(0);
    let elapsed = start.elapsed();
    assert_eq!(pair.ledgers[0].digest(), pair.ledgers[1].digest());
    let place = if recent { "the newest" } else { "scattered over all" };
    println!(
        "reconcile {} entries, {differences} differ, {place}: {} bytes in {} messages = {:.2} x the difference ({difference} bytes), {:.1} ms of processor",
        all.len(),
        pair.bytes,
        pair.messages,
        pair.bytes as f64 / difference as f64,
        elapsed.as_secs_f64() * 1e3
    );
    let (bytes, messages, start) = (pair.bytes, pair.messages, Instant::now());
    for _ in 0..100 {
        pair.meet(0);
    }
    println!(
        "reconcile {} equal entries: {} bytes in {} messages, {:.1} us of processor",
        all.len(),
        (pair.bytes - bytes) / 100,
        (pair.messages - messages) / 100,
        start.elapsed().as_secs_f64() * 1e6 / 100.0
    );
}
