//! What tests of several modules share.

/// A sequence of numbers that look random, the same in every run (SplitMix64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// A number from 0 to `n - 1`.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % n as u64) as usize
    }

    /// At most `longest` characters of an alphabet.
    pub(crate) fn text(&mut self, alphabet: &[char], longest: usize) -> String {
        (0..self.below(longest + 1))
            .map(|_| alphabet[self.below(alphabet.len())])
            .collect()
    }
}

/// Files when power is lost: content and names that were not synced are there, or not, or in part.
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

    /// Bytes that a disk writes whole or not at all.
    const SECTOR: usize = 512;

    static WATCHED: Mutex<Vec<Disk>> = Mutex::new(Vec::new());

    /// What is certain of the files below a folder.
    struct Disk {
        root: PathBuf,
        /// By inode.
        contents: HashMap<u64, Vec<u8>>,
        names: HashMap<PathBuf, u64>,
    }

    /// A file as it is now.
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
        /// All that is there now is certain.
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
                    // Made, or removed, and that may not have come to the disk.
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

    /// Of each sector what was synced, or what was written since.
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

    /// From now on it is noted what below `root` is synced.
    pub(crate) fn watch(root: &Path) {
        let mut watched = WATCHED.lock().unwrap();
        watched.retain(|disk| disk.root != root);
        watched.push(Disk::new(root));
    }

    pub(crate) fn forget(root: &Path) {
        WATCHED.lock().unwrap().retain(|disk| disk.root != root);
    }

    /// A file was synced.
    pub(crate) fn synced(path: &Path) {
        of(path, |disk| {
            disk.contents.insert(inode(path), fs::read(path).unwrap());
        });
    }

    /// A folder was synced.
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

    /// The power was lost and is back.
    pub(crate) fn cut(root: &Path, random: &mut Random) {
        of(root, |disk| disk.cut(random));
        watch(root);
    }
}
