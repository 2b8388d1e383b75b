//! Helpers that the tests of several modules share.

/// A pseudorandom sequence of numbers, the same in every run (SplitMix64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// Returns a number from 0 to `n - 1`.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % n as u64) as usize
    }

    /// Returns a text of at most `longest` characters of `alphabet`.
    pub(crate) fn text(&mut self, alphabet: &[char], longest: usize) -> String {
        (0..self.below(longest + 1))
            .map(|_| alphabet[self.below(alphabet.len())])
            .collect()
    }
}

/// Simulates a loss of power: content and names that were not synced are kept, lost, or kept in part.
pub(crate) mod power {
    use std::{
        collections::{HashMap, HashSet},
        fs,
        os::unix::fs::MetadataExt,
        path::{Path, PathBuf},
        sync::Mutex,
        time::SystemTime,
    };

    use super::Random;

    /// Bytes that a disk writes as a unit: all of them or none.
    const SECTOR: usize = 512;

    static WATCHED: Mutex<Vec<Disk>> = Mutex::new(Vec::new());

    /// The synced state of the files in a folder: all that a loss of power is certain to leave.
    struct Disk {
        root: PathBuf,
        /// The synced content of each file, by inode.
        contents: HashMap<u64, Vec<u8>>,
        names: HashMap<PathBuf, u64>,
    }

    /// A file as it is now, synced or not.
    struct Now {
        path: PathBuf,
        content: Vec<u8>,
        modified: SystemTime,
    }

    fn walk(folder: &Path, files: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => walk(&path, files),
                false => files.push(path),
            }
        }
    }

    fn inode(path: &Path) -> u64 {
        fs::metadata(path).unwrap().ino()
    }

    impl Disk {
        /// Starts from the present state of the folder, as if all of it were synced.
        fn new(root: &Path) -> Self {
            let mut files = Vec::new();
            walk(root, &mut files);
            let contents = files
                .iter()
                .map(|path| (inode(path), fs::read(path).unwrap()));
            let names = files.iter().map(|path| (path.clone(), inode(path)));
            Self {
                root: root.to_owned(),
                contents: contents.collect(),
                names: names.collect(),
            }
        }

        fn cut(&self, random: &mut Random) {
            let mut files = Vec::new();
            walk(&self.root, &mut files);
            let mut now: HashMap<u64, Now> = HashMap::new();
            for path in files {
                let metadata = fs::metadata(&path).unwrap();
                let content = fs::read(&path).unwrap();
                let modified = metadata.modified().unwrap();
                fs::remove_file(&path).unwrap();
                let file = Now {
                    path,
                    content,
                    modified,
                };
                now.insert(metadata.ino(), file);
            }
            let certain: HashMap<u64, &PathBuf> = self
                .names
                .iter()
                .map(|(path, inode)| (*inode, path))
                .collect();
            let all: HashSet<u64> = now.keys().chain(certain.keys()).copied().collect();
            let mut all: Vec<_> = all.into_iter().collect();
            all.sort_unstable();
            for inode in all {
                let synced = self.contents.get(&inode).cloned().unwrap_or_default();
                let (file, name) = (now.get(&inode), certain.get(&inode).copied());
                let path = match (file.map(|file| &file.path), name) {
                    (Some(now), Some(name)) if random.below(2) == 0 => Some(now.max(name)),
                    (Some(now), Some(name)) => Some(now.min(name)),
                    // The file was created or removed, and the folder was not synced since.
                    (now, name) if random.below(2) == 0 => now.or(name),
                    _ => None,
                };
                let Some(path) = path else { continue };
                let content = match file {
                    Some(file) => torn(synced, &file.content, random),
                    None => synced,
                };
                fs::write(path, content).unwrap();
                if let Some(file) = file {
                    let handle = fs::File::options().write(true).open(path).unwrap();
                    handle.set_modified(file.modified).unwrap();
                }
            }
        }
    }

    /// Chooses, for each sector at random, the synced bytes or those written since.
    fn torn(mut synced: Vec<u8>, now: &[u8], random: &mut Random) -> Vec<u8> {
        let length = match random.below(2) {
            0 => synced.len(),
            _ => now.len(),
        };
        synced.resize(length, 0);
        for (old, new) in synced.chunks_mut(SECTOR).zip(now.chunks(SECTOR)) {
            if random.below(2) == 0 {
                let shorter = old.len().min(new.len());
                old[..shorter].copy_from_slice(&new[..shorter]);
            }
        }
        synced
    }

    fn of(path: &Path, change: impl FnOnce(&mut Disk)) {
        let mut watched = WATCHED.lock().unwrap();
        if let Some(disk) = watched.iter_mut().find(|disk| path.starts_with(&disk.root)) {
            change(disk);
        }
    }

    /// Starts recording what is synced below `root`.
    pub(crate) fn watch(root: &Path) {
        let mut watched = WATCHED.lock().unwrap();
        watched.retain(|disk| disk.root != root);
        watched.push(Disk::new(root));
    }

    pub(crate) fn forget(root: &Path) {
        WATCHED.lock().unwrap().retain(|disk| disk.root != root);
    }

    /// Records that a file was synced.
    pub(crate) fn synced(path: &Path) {
        of(path, |disk| {
            disk.contents.insert(inode(path), fs::read(path).unwrap());
        });
    }

    /// Records that a folder was synced.
    pub(crate) fn names_synced(folder: &Path) {
        of(folder, |disk| {
            disk.names.retain(|path, _| path.parent() != Some(folder));
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_file() {
                    let inode = inode(&path);
                    disk.names.insert(path, inode);
                }
            }
        });
    }

    /// Simulates a loss of power below `root`, and a restart.
    pub(crate) fn cut(root: &Path, random: &mut Random) {
        of(root, |disk| disk.cut(random));
        watch(root);
    }
}
