//! The kernel that every protocol of Chorus is built on.
//!
//! A protocol is a [`Machine`]: a plain value that is told what happened ([`Machine::Input`]) and says what it wants done
//! ([`Machine::Effect`]). It owns no socket, no clock, no thread and no source of randomness. Time and randomness come in
//! through [`Ctx`], effects go out through [`Outbox`], and the next moment at which something is due is asked for with
//! [`Machine::deadline`]. The shell that drives it is free to be a real process or a simulator in virtual time: both run the
//! very same code.
//!
//! ```text
//!            Input, Ctx { now, rng }                    Effect
//!  shell ───────────────────────────▶  Machine  ─────────────────▶  shell
//!        ◀───────────────────────────           deadline()
//!          "wake me at this Time"
//! ```
//!
//! The shape is quinn-proto's and iroh-gossip's; one `deadline()` instead of many timers is the cheapest interface to drive.

mod rng;
mod time;

pub use chorus_protocol::WallTime;
pub use rng::Rng;
pub use time::Time;

/// What a machine may know of the world while it handles one input.
#[derive(Debug)]
pub struct Ctx<'a> {
    /// The shell's monotonic time.
    pub now: Time,
    /// Wall-clock time, for records that carry an expiry across machines.
    pub wall: WallTime,
    /// The machine's only source of randomness.
    pub rng: &'a mut Rng,
}

/// A protocol as a value: inputs in, effects out, nothing else.
pub trait Machine {
    /// What can happen to the machine.
    type Input;
    /// What the machine can want done.
    type Effect;

    /// Takes one input and appends what has to be done to `out`.
    fn handle(&mut self, cx: &mut Ctx<'_>, input: Self::Input, out: &mut Outbox<Self::Effect>);

    /// Returns the next moment at which [`Machine::expire`] has something to do, if any.
    fn deadline(&self) -> Option<Time>;

    /// Does what is due at `cx.now`. Calling it early is harmless.
    fn expire(&mut self, cx: &mut Ctx<'_>, out: &mut Outbox<Self::Effect>);
}

/// The ordered list of effects that one call of a machine produced.
#[derive(Debug)]
pub struct Outbox<E> {
    effects: Vec<E>,
}

impl<E> Default for Outbox<E> {
    fn default() -> Self {
        Self { effects: Vec::new() }
    }
}

impl<E> Outbox<E> {
    /// Returns an empty outbox.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends one effect.
    pub fn push(&mut self, effect: E) {
        self.effects.push(effect);
    }

    /// Takes all effects out, oldest first, and keeps the allocation.
    pub fn drain(&mut self) -> std::vec::Drain<'_, E> {
        self.effects.drain(..)
    }

    /// Returns how many effects wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.effects.len()
    }

    /// Returns whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.effects.is_empty()
    }
}

/// Returns the earlier of two optional deadlines.
#[must_use]
pub fn earliest(a: Option<Time>, b: Option<Time>) -> Option<Time> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}
