//! Every limit on what a remote may send, in one place. All sizes are in bytes of the encoded form.

/// A gossiped frame. Gossip carries small things; the rest travels by hash or by direct message.
pub const MAX_GOSSIP_BYTES: usize = 64 * 1024;
/// A direct frame between two peers.
pub const MAX_DIRECT_BYTES: usize = 1024 * 1024;
/// One ledger entry, without its envelope.
pub const MAX_ENTRY_BYTES: usize = 16 * 1024;
/// One beacon, without its envelope.
pub const MAX_BEACON_BYTES: usize = 4 * 1024;
/// One bid, one lease or one receipt, without its envelope.
pub const MAX_SMALL_BYTES: usize = 1024;
/// A job's private payload: prompt, context and grammar.
pub const MAX_PAYLOAD_BYTES: usize = 256 * 1024;
/// A job's output.
pub const MAX_OUTPUT_BYTES: usize = 256 * 1024;
/// What a signed envelope adds to the bytes it signs: author, signature and a length.
pub const ENVELOPE_OVERHEAD_BYTES: usize = 32 + 64 + 9;
/// One message of range-based reconciliation (the `negentropy` frame limit lies below it).
pub const MAX_RECONCILE_BYTES: usize = 60 * 1024;
/// Entries asked for, or sent, in one direct frame.
pub const MAX_SYNC_ENTRIES: usize = 512;
/// Bytes of entries packed into one direct frame.
pub const MAX_SYNC_BATCH_BYTES: usize = 512 * 1024;

/// Policies of one author that stand in the ledger.
pub const MAX_AUTHOR_POLICIES: usize = 8;

/// How far in the future a record's wall time may lie before it is refused, in milliseconds.
pub const MAX_CLOCK_SKEW_MS: u64 = 60_000;
/// How long an entry may ask to live, in milliseconds (30 days).
pub const MAX_ENTRY_LIFE_MS: u64 = 30 * 24 * 3_600_000;
/// How long ago a beacon may have been made and still be answered, in milliseconds.
pub const MAX_BEACON_AGE_MS: u64 = 30_000;

/// One frame of rollouts, without its envelope.
pub const MAX_ROLLOUT_FRAME_BYTES: usize = 4 * 1024 * 1024;
/// Rollouts in one frame, and groups in one frame.
pub const MAX_FRAME_ROLLOUTS: usize = 4096;
/// Versions that the rollouts of one frame may come from.
pub const MAX_FRAME_VERSIONS: usize = 16;
/// Environments that the rollouts of one frame may come from.
pub const MAX_FRAME_ENVIRONMENTS: usize = 64;
/// Swaps of weights in mid-rollout, in one frame.
pub const MAX_FRAME_SWITCHES: usize = 16 * 1024;
/// Tokens of one prompt, and tokens of one completion.
pub const MAX_ROLLOUT_TOKENS: usize = 128 * 1024;
/// Frames of one piece of evidence.
pub const MAX_EVIDENCE_FRAMES: usize = 256;
/// One piece of evidence.
pub const MAX_EVIDENCE_BYTES: usize = 64 * 1024 * 1024;
/// A piece of evidence in one message.
pub const MAX_EVIDENCE_PIECE_BYTES: usize = 1024 * 1024;
/// The smallest chunk that a manifest may cut its files into.
pub const MIN_CHUNK_BYTES: usize = 1024;
/// The largest chunk that a manifest may cut its files into.
pub const MAX_CHUNK_BYTES: usize = 4 * 1024 * 1024;
/// Chunks of one version.
pub const MAX_CHUNKS: usize = 64 * 1024;
/// Files of one version.
pub const MAX_POLICY_FILES: usize = 64;
/// One manifest, without its envelope.
pub const MAX_MANIFEST_BYTES: usize = 32 * MAX_CHUNKS + 16 * 1024;
/// One message of the bulk plane: a frame or a chunk and what stands around it.
pub const MAX_BULK_BYTES: usize = 4 * 1024 * 1024 + 1024;
