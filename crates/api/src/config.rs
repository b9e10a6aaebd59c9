//! Where the API listens, whom it lets in, and what it takes at most.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

/// Characters of a token that others may try to guess, at least.
pub const MIN_TOKEN_CHARS: usize = 16;

/// Everything the API is told once, at its start.
#[derive(Clone, Debug)]
pub struct ApiConfig {
    /// Where it listens. Beyond loopback a token is required.
    pub listen: SocketAddr,
    /// What a client must send as `Authorization: Bearer …`.
    pub token: Option<String>,
    /// Host names, besides `localhost` and the loopback addresses, by which a client may call a node that listens on loopback.
    pub allowed_hosts: Vec<String>,
    /// The largest body of a request, in bytes.
    pub max_body_bytes: usize,
    /// The largest body that brings a policy's weights, in bytes. It goes to disk as it comes.
    pub max_weights_bytes: usize,
    /// Connections at a time; more wait to be accepted.
    pub max_connections: usize,
    /// Chat completions and embeddings at a time; more are refused with 429.
    pub max_generations: usize,
    /// Event streams at a time; more are refused with 429.
    pub max_streams: usize,
    /// How long a connection may stay without a whole request.
    pub idle_timeout: Duration,
    /// How long a client may take to send a body.
    pub body_timeout: Duration,
    /// How long a client may take to send a policy's weights, and the node to examine them.
    pub weights_timeout: Duration,
    /// How long a client may take to read what is there for it, before its connection is closed.
    pub write_timeout: Duration,
    /// How long everything may take that does not generate.
    pub request_timeout: Duration,
    /// How long a generation by this node's own engine may take.
    pub generate_timeout: Duration,
    /// How long a task may take when its request does not say.
    pub task_deadline: Duration,
    /// How often a silent event stream sends a comment, so that nobody between takes it for dead.
    pub keep_alive: Duration,
}

impl ApiConfig {
    /// Returns the defaults for an address.
    #[must_use]
    pub fn new(listen: SocketAddr) -> Self {
        Self {
            listen,
            token: None,
            allowed_hosts: Vec::new(),
            max_body_bytes: 2 << 20,
            max_weights_bytes: 1 << 30,
            max_connections: 512,
            max_generations: 64,
            max_streams: 256,
            idle_timeout: Duration::from_secs(60),
            body_timeout: Duration::from_secs(30),
            weights_timeout: Duration::from_secs(600),
            write_timeout: Duration::from_secs(60),
            request_timeout: Duration::from_secs(10),
            generate_timeout: Duration::from_secs(600),
            task_deadline: Duration::from_secs(120),
            keep_alive: Duration::from_secs(5),
        }
    }

    /// Says whether the configuration is safe to run.
    ///
    /// # Errors
    /// [`ApiError::TokenRequired`], [`ApiError::TokenTooShort`] or [`ApiError::Limit`].
    pub fn validate(&self) -> Result<(), ApiError> {
        let beyond_loopback = !self.listen.ip().is_loopback();
        match &self.token {
            None if beyond_loopback => return Err(ApiError::TokenRequired { listen: self.listen }),
            Some(token) if token.is_empty() || (beyond_loopback && token.chars().count() < MIN_TOKEN_CHARS) => {
                return Err(ApiError::TokenTooShort { listen: self.listen });
            }
            _ => {}
        }
        let limits = [
            ("max_body_bytes", self.max_body_bytes),
            ("max_weights_bytes", self.max_weights_bytes),
            ("max_connections", self.max_connections),
            ("max_generations", self.max_generations),
            ("max_streams", self.max_streams),
        ];
        let times = [
            ("idle_timeout", self.idle_timeout),
            ("body_timeout", self.body_timeout),
            ("weights_timeout", self.weights_timeout),
            ("write_timeout", self.write_timeout),
            ("request_timeout", self.request_timeout),
            ("generate_timeout", self.generate_timeout),
            ("task_deadline", self.task_deadline),
            ("keep_alive", self.keep_alive),
        ];
        let zero_limit = limits.iter().find(|(_, limit)| *limit == 0).map(|(name, _)| *name);
        let zero_time = times.iter().find(|(_, time)| time.is_zero()).map(|(name, _)| *name);
        zero_limit.or(zero_time).map_or(Ok(()), |name| Err(ApiError::Limit { name }))
    }
}

/// Why the API does not run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ApiError {
    /// Others could reach it, and nothing would stop them.
    #[error(
        "the API on {listen} can be reached by others and has no token; set api.token in the configuration file \
         ({MIN_TOKEN_CHARS} characters or more), or listen on loopback with --api 127.0.0.1:{}",
        listen.port()
    )]
    TokenRequired {
        /// Where it would listen.
        listen: SocketAddr,
    },
    /// The token could be guessed.
    #[error(
        "the token of the API on {listen} is too short; set api.token in the configuration file to \
         {MIN_TOKEN_CHARS} characters or more, for example by `openssl rand -hex 16`"
    )]
    TokenTooShort {
        /// Where it would listen.
        listen: SocketAddr,
    },
    /// A limit would let nothing through.
    #[error("the API's {name} is zero, which lets nothing through; give it a value above zero")]
    Limit {
        /// Which.
        name: &'static str,
    },
    /// Somebody else listens there.
    #[error(
        "{listen} is in use by another process; choose another address with --api IP:PORT, or shift every port with --instance N"
    )]
    PortInUse {
        /// Where it would listen.
        listen: SocketAddr,
    },
    /// The system refuses the address.
    #[error("the API cannot listen on {listen}: {source}; choose another address with --api IP:PORT")]
    Listen {
        /// Where it would listen.
        listen: SocketAddr,
        /// The system's reason.
        source: io::Error,
    },
}

impl ApiError {
    /// Sorts out why an address could not be listened on.
    pub(crate) fn from_bind(listen: SocketAddr, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::AddrInUse => Self::PortInUse { listen },
            _ => Self::Listen { listen, source },
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn config(listen: &str, token: Option<&str>) -> ApiConfig {
        ApiConfig { token: token.map(str::to_owned), ..ApiConfig::new(listen.parse().unwrap()) }
    }

    #[test]
    fn beyond_loopback_a_token_is_required() {
        for open in ["0.0.0.0:7700", "[::]:7700", "192.168.1.4:7700"] {
            let error = config(open, None).validate().unwrap_err();
            assert!(matches!(error, ApiError::TokenRequired { .. }), "{open}: {error}");
            assert!(error.to_string().contains("--api 127.0.0.1:7700") && error.to_string().contains("api.token"));
            assert!(matches!(config(open, Some("short")).validate(), Err(ApiError::TokenTooShort { .. })), "{open}");
            config(open, Some("0123456789abcdef")).validate().unwrap();
        }
        for closed in ["127.0.0.1:7700", "[::1]:7700", "127.0.0.2:0"] {
            config(closed, None).validate().unwrap();
            config(closed, Some("short")).validate().unwrap();
            assert!(matches!(config(closed, Some("")).validate(), Err(ApiError::TokenTooShort { .. })), "{closed}");
        }
    }

    #[test]
    fn a_limit_of_zero_is_named() {
        let config = ApiConfig { write_timeout: Duration::ZERO, ..config("127.0.0.1:0", None) };
        assert!(config.validate().unwrap_err().to_string().contains("write_timeout"));
    }
}
