//! The node's home folder, which holds its identity. One process at a time uses it.

pub(crate) mod lines;
pub(crate) mod reserve;

use std::{
    env, fs, io,
    io::Write,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use weft_blobs::lock::{Lock, LockError};
use weft_net::identity::Keypair;

use crate::home::reserve::{Reserve, is_full};

/// The error of opening a home folder.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HomeError {
    /// Another node runs on this home.
    #[error("a node is running on this home already: {0}")]
    InUse(#[source] LockError),
    /// The home's file system has no locks, without which two nodes could use the home at once.
    #[error("{0}: choose another home with --home DIR, or set WEFT_HOME")]
    NoLocks(#[source] LockError),
    /// A file or folder of the home cannot be created, read or written.
    #[error("{action} {}: {source}{}", .path.display(), advice(.source))]
    Io {
        /// The action that failed, such as "cannot read".
        action: &'static str,
        /// Path of the file or folder.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The key file does not contain an Ed25519 key.
    #[error(
        "{} does not contain an Ed25519 key; restore the file from a backup, or remove it to become a new node",
        .0.display()
    )]
    BadKey(PathBuf),
    /// Other users can read the key file.
    #[error(
        "others can read {} (mode {mode:o}), and anybody who has this key can pass for this node. Run: chmod 600 '{}'",
        .path.display(), .path.display()
    )]
    OpenKey {
        /// Path of the key file.
        path: PathBuf,
        /// Its file mode.
        mode: u32,
    },
    /// A line in the list of trusted publishers is not a PeerId.
    #[error(
        "{} has a line that is not a PeerId: {line:?}; correct it, or remove the file to trust no publisher",
        .path.display()
    )]
    BadTrust {
        /// Path of the list.
        path: PathBuf,
        /// The line.
        line: String,
    },
    /// The list of trusted publishers would be too long. Holds the limit.
    #[error("at most {0} publishers can be trusted; stop trusting one with `weft trust rm PEER`")]
    TooManyTrusted(usize),
    /// A line in the list of followed registries is malformed.
    #[error(
        "{} has a line that is not a registry id and a prefix: {line:?}; correct it, or remove the file to follow no \
         registry",
        .path.display()
    )]
    BadRegistry {
        /// Path of the list.
        path: PathBuf,
        /// The line.
        line: String,
    },
    /// The list of followed registries would be too long. Holds the limit.
    #[error(
        "at most {0} registries can be followed; unfollow one with `weft registry unfollow ID`"
    )]
    TooManyRegistries(usize),
    /// No home was given, and the environment names no default.
    #[error("cannot choose a home: neither WEFT_HOME nor HOME is set; choose it with --home DIR")]
    Unknown,
}

/// Returns advice on an I/O error of the home, to append to its text.
fn advice(error: &io::Error) -> &'static str {
    use io::ErrorKind::{NotADirectory, PermissionDenied, ReadOnlyFilesystem};
    match error.kind() {
        PermissionDenied => {
            "; give the user who runs the node access with chown and chmod, or choose another home with --home DIR"
        }
        ReadOnlyFilesystem | NotADirectory => "; choose another home with --home DIR",
        _ if is_full(error) => "; make room on that disk, or choose another home with --home DIR",
        _ => "",
    }
}

/// Returns the default home of a node: `$WEFT_HOME`, or the platform's folder for application data.
///
/// # Errors
/// [`HomeError::Unknown`] if the environment names neither.
pub fn default_home() -> Result<PathBuf, HomeError> {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty());
    if let Some(home) = set("WEFT_HOME") {
        return Ok(home.into());
    }
    if let Some(data) = set("XDG_DATA_HOME") {
        return Ok(PathBuf::from(data).join("weft"));
    }
    let home = env::home_dir().ok_or(HomeError::Unknown)?;
    Ok(if cfg!(target_os = "macos") {
        home.join("Library/Application Support/weft")
    } else {
        home.join(".local/share/weft")
    })
}

/// An open home, locked by this process.
#[derive(Debug)]
pub(crate) struct Home {
    path: PathBuf,
    key: Keypair,
    reserve: Reserve,
    _lock: Lock,
}

impl Home {
    /// Opens the home at `path`. Creates the home and a key if there is none.
    pub(crate) fn open(path: &Path) -> Result<Self, HomeError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(io_error("cannot make", path))?;
        let path = path.canonicalize().map_err(io_error("cannot read", path))?;
        let reserve = Reserve::of(&path);
        let lock = take_lock(&path, &reserve, Lock::take).map_err(|error| match error {
            LockError::Io { path, source } => HomeError::Io {
                action: "cannot lock",
                path,
                source,
            },
            error @ LockError::Unsupported { .. } => HomeError::NoLocks(error),
            held => HomeError::InUse(held),
        })?;
        // This needs the lock, because the reserve belongs to the running node, and comes before all other writes.
        reserve.delete_left_behind();
        reserve.make_room();
        let key = load_or_make_key(&path.join("key"))?;
        if !reserve.is_full() {
            reserve.keep();
        }
        Ok(Self {
            path,
            key,
            reserve,
            _lock: lock,
        })
    }

    pub(crate) fn reserve(&self) -> &Reserve {
        &self.reserve
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn key(&self) -> &Keypair {
        &self.key
    }

    pub(crate) fn store(&self) -> PathBuf {
        self.path.join("store")
    }

    /// The database of the DHT's records.
    pub(crate) fn records(&self) -> PathBuf {
        self.path.join("records.redb")
    }

    pub(crate) fn documents(&self) -> PathBuf {
        self.path.join("documents.redb")
    }

    /// The nodes that were known in the last run.
    pub(crate) fn peers(&self) -> PathBuf {
        self.path.join("peers")
    }

    /// The list of trusted publishers.
    pub(crate) fn trust(&self) -> PathBuf {
        self.path.join("trust")
    }

    /// The list of followed registries.
    pub(crate) fn registries(&self) -> PathBuf {
        self.path.join("registries")
    }

    /// Default parent folder of fetched models.
    pub(crate) fn models(&self) -> PathBuf {
        self.path.join("models")
    }
}

/// Takes the lock of a home with `take`. If the disk is full, gives up the reserve and tries again. If another node
/// holds the home, its reserve stays, because that node needs it.
fn take_lock<L>(
    path: &Path,
    reserve: &Reserve,
    take: impl Fn(&Path) -> Result<L, LockError>,
) -> Result<L, LockError> {
    match take(path) {
        Err(LockError::Io { source, .. }) if is_full(&source) => {
            reserve.give_up();
            take(path)
        }
        taken => taken,
    }
}

/// Returns a function for `map_err` that adds the failed action and the path.
pub(crate) fn io_error(
    action: &'static str,
    path: &Path,
) -> impl FnOnce(io::Error) -> HomeError + use<> {
    let path = path.to_owned();
    move |source| HomeError::Io {
        action,
        path,
        source,
    }
}

fn load_or_make_key(path: &Path) -> Result<Keypair, HomeError> {
    match fs::read(path) {
        Ok(bytes) => {
            let metadata = fs::metadata(path).map_err(io_error("cannot read", path))?;
            let mode = metadata.permissions().mode() & 0o777;
            if mode & 0o077 != 0 {
                return Err(HomeError::OpenKey {
                    path: path.to_owned(),
                    mode,
                });
            }
            Keypair::from_protobuf_encoding(&bytes).map_err(|_| HomeError::BadKey(path.to_owned()))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let key = Keypair::generate_ed25519();
            let bytes = key
                .to_protobuf_encoding()
                .map_err(|_| HomeError::BadKey(path.to_owned()))?;
            write_key(path, &bytes).map_err(io_error("cannot write", path))?;
            Ok(key)
        }
        Err(error) => Err(io_error("cannot read", path)(error)),
    }
}

/// Writes the key file. Other users can never read it, and it is never half written.
fn write_key(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("new");
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    match path.parent() {
        Some(folder) => fs::File::open(folder)?.sync_all(),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_is_created_once_and_kept_private() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("home");
        let first = Home::open(&path).unwrap();
        let id = first.key().public().to_peer_id();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&path.join("key")), 0o600);
        assert_eq!(mode(&path), 0o700);
        match Home::open(&path) {
            Err(HomeError::InUse(error)) => {
                let pid = std::process::id().to_string();
                assert!(error.to_string().contains(&pid), "{error}");
            }
            other => panic!("{other:?}"),
        }
        drop(first);
        assert_eq!(Home::open(&path).unwrap().key().public().to_peer_id(), id);
    }

    #[test]
    fn only_a_lock_that_fails_on_a_full_disk_gives_up_the_reserve() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        let reserve = Reserve::of(path);
        let file = path.join("reserve");
        reserve.keep();
        let fails = |kind: io::ErrorKind| LockError::Io {
            path: path.join("lock"),
            source: kind.into(),
        };
        let held = |_: &Path| -> Result<(), _> {
            Err(LockError::Held {
                path: path.to_owned(),
                pid: None,
            })
        };
        let denied = |_: &Path| -> Result<(), _> { Err(fails(io::ErrorKind::PermissionDenied)) };
        assert!(take_lock(path, &reserve, held).is_err());
        assert!(take_lock(path, &reserve, denied).is_err());
        assert!(file.exists() && !reserve.is_full());
        for kind in [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded] {
            reserve.keep();
            let full = |_: &Path| match file.exists() {
                true => Err(fails(kind)),
                false => Ok(()),
            };
            take_lock(path, &reserve, full).unwrap();
            assert!(!file.exists() && reserve.is_full());
        }
    }

    #[test]
    fn a_start_deletes_leftover_files_only_on_a_home_that_is_not_in_use() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        let first = Home::open(path).unwrap();
        for name in ["reserve.new", "room.new"] {
            fs::write(path.join(name), "unfinished").unwrap();
        }
        assert!(matches!(Home::open(path), Err(HomeError::InUse(_))));
        for name in ["reserve", "reserve.new", "room.new"] {
            assert!(path.join(name).exists(), "{name}");
        }
        drop(first);
        let _second = Home::open(path).unwrap();
        assert!(path.join("reserve").exists());
        for name in ["reserve.new", "room.new"] {
            assert!(!path.join(name).exists(), "{name}");
        }
    }

    #[test]
    fn an_error_of_the_home_says_what_to_do() {
        for (kind, says) in [
            (io::ErrorKind::PermissionDenied, "chown"),
            (io::ErrorKind::StorageFull, "make room"),
            (io::ErrorKind::ReadOnlyFilesystem, "--home DIR"),
        ] {
            let error = io_error("cannot make", Path::new("/x"))(kind.into());
            assert!(error.to_string().contains(says), "{error}");
        }
    }

    #[test]
    fn a_malformed_or_readable_key_is_refused_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        let key = folder.path().join("key");
        drop(Home::open(folder.path()).unwrap());
        fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(
            Home::open(folder.path()),
            Err(HomeError::OpenKey { mode: 0o644, .. })
        ));
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&key, b"garbage").unwrap();
        assert!(matches!(
            Home::open(folder.path()),
            Err(HomeError::BadKey(_))
        ));
        assert_eq!(fs::read(&key).unwrap(), b"garbage");
    }
}
