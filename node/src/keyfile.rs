//! The node's secret key on disk: 32 bytes in hexadecimal, readable by its owner alone.

use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use chorus_protocol::SecretKey;
use zeroize::Zeroizing;

/// The key file's name in the data directory.
pub(crate) const KEY_FILE: &str = "node.key";

/// Why a key file cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KeyFileError {
    /// The file system refuses.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The file holds something else.
    #[error("{} holds no key: 64 hexadecimal digits are expected; restore it from a backup with `chorus key import`", path.display())]
    Malformed {
        /// Which file.
        path: PathBuf,
    },
    /// A key is there already.
    #[error("{} exists; a node that loses its key loses its identity, so move the file away first", path.display())]
    Exists {
        /// Which file.
        path: PathBuf,
    },
}

/// Reads the key of a data directory.
pub(crate) fn load(dir: &Path) -> Result<SecretKey, KeyFileError> {
    let path = dir.join(KEY_FILE);
    let text = Zeroizing::new(fs::read_to_string(&path).map_err(|source| KeyFileError::Io {
        action: "read",
        path: path.clone(),
        source,
    })?);
    parse(&text).ok_or(KeyFileError::Malformed { path })
}

/// Reads the key of a data directory, or makes one if there is none yet.
pub(crate) fn load_or_create(dir: &Path) -> Result<SecretKey, KeyFileError> {
    if dir.join(KEY_FILE).exists() {
        return load(dir);
    }
    let mut secret = Zeroizing::new([0; 32]);
    let entropy = Path::new("/dev/urandom");
    fs::File::open(entropy)
        .and_then(|mut file| file.read_exact(secret.as_mut()))
        .map_err(|source| KeyFileError::Io { action: "read", path: entropy.to_owned(), source })?;
    let key = SecretKey::from_bytes(&secret);
    save(dir, &key)?;
    Ok(key)
}

/// Writes a key into a data directory that has none. The file appears whole or not at all.
pub(crate) fn save(dir: &Path, key: &SecretKey) -> Result<(), KeyFileError> {
    let path = dir.join(KEY_FILE);
    let failed = |action: &'static str, path: &Path| {
        let path = path.to_owned();
        move |source| KeyFileError::Io { action, path, source }
    };
    if path.exists() {
        return Err(KeyFileError::Exists { path });
    }
    fs::create_dir_all(dir).map_err(failed("create", dir))?;
    let partial = dir.join(format!("{KEY_FILE}.new"));
    let text = Zeroizing::new(format!("{}\n", hex::encode(key.to_bytes().as_ref())));
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).truncate(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        options.mode(0o600);
    }
    let mut file = options.open(&partial).map_err(failed("write", &partial))?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(failed("write", &partial))?;
    fs::rename(&partial, &path).map_err(failed("write", &path))
}

/// Reads a key from text as it stands in a key file.
pub(crate) fn parse(text: &str) -> Option<SecretKey> {
    let mut bytes = Zeroizing::new([0; 32]);
    hex::decode_to_slice(text.trim(), bytes.as_mut()).ok()?;
    Some(SecretKey::from_bytes(&bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_survives_and_is_never_overwritten() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let key = load_or_create(dir.path()).expect("a new key");
        assert_eq!(load_or_create(dir.path()).expect("the same key").node_id(), key.node_id());
        assert!(matches!(save(dir.path(), &key), Err(KeyFileError::Exists { .. })));
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let mode = fs::metadata(dir.path().join(KEY_FILE)).expect("the file").permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
        }
    }

    #[test]
    fn a_broken_key_file_is_an_error_and_not_a_new_identity() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        fs::write(dir.path().join(KEY_FILE), "not a key").expect("written");
        assert!(matches!(load_or_create(dir.path()), Err(KeyFileError::Malformed { .. })));
    }
}
