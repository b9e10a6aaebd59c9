//! Ids and hashes. Each is a type of its own, so that one cannot be passed for another.

use std::fmt;
use std::str::FromStr;

use bincode::{Decode, Encode};
use serde::{Serialize, Serializer};

use crate::bounded::Text;

/// Text that does not name what it should.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is not a {what}: {expected}")]
pub struct ParseIdError {
    /// What was asked for.
    pub what: &'static str,
    /// What was given.
    pub text: String,
    /// What it should look like.
    pub expected: &'static str,
}

macro_rules! bytes_id {
    ($(#[$doc:meta])* $name:ident, $len:literal, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
        pub struct $name([u8; $len]);

        impl $name {
            /// Makes the id from its bytes.
            #[must_use]
            pub const fn from_bytes(bytes: [u8; $len]) -> Self {
                Self(bytes)
            }

            /// Returns the id's bytes.
            #[must_use]
            pub const fn as_bytes(&self) -> &[u8; $len] {
                &self.0
            }

            /// Returns the first eight hexadecimal digits, for logs and tables.
            #[must_use]
            pub fn fmt_short(&self) -> String {
                hex::encode(&self.0[..4])
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&hex::encode(self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.fmt_short())
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                let mut bytes = [0; $len];
                hex::decode_to_slice(text, &mut bytes).map_err(|_| ParseIdError {
                    what: $what,
                    text: text.to_owned(),
                    expected: concat!(stringify!($len), " bytes in hexadecimal"),
                })?;
                Ok(Self(bytes))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
    };
}

bytes_id!(
    /// A BLAKE3 hash.
    Hash, 32, "hash"
);
bytes_id!(
    /// One announcement of one job.
    BeaconId, 16, "beacon id"
);
bytes_id!(
    /// One job, through all its leases.
    JobId, 16, "job id"
);
bytes_id!(
    /// One task: what a user asked.
    TaskId, 16, "task id"
);

impl Hash {
    /// The hash that stands before an author's first entry.
    pub const ZERO: Self = Self([0; 32]);

    /// Hashes `parts` under a context that no other use shares.
    #[must_use]
    pub fn derive(context: &str, parts: &[&[u8]]) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key(context);
        for part in parts {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        Self(*hasher.finalize().as_bytes())
    }
}

/// The name of one swarm: one to 32 characters of `a-z`, `0-9` and `-`. It is part of every signing context and protocol id, so
/// two networks cannot take each other's messages for their own.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct NetworkId(Text<32>);

impl NetworkId {
    /// Returns the name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }
}

impl FromStr for NetworkId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        let error = || ParseIdError {
            what: "network name",
            text: text.to_owned(),
            expected: "1 to 32 characters of a-z, 0-9 and -",
        };
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if text.is_empty() || !text.chars().all(plain) {
            return Err(error());
        }
        Text::new(text).map(Self).map_err(|_| error())
    }
}

impl fmt::Display for NetworkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
