//! A disk in memory that fails on demand, for tests: it can fill up, become unreadable, stop, and lose power.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use redb::StorageBackend;

/// Bytes that a disk writes completely or not at all, if it works as specified.
const SECTOR: usize = 512;

/// A disk that outlives the databases on it. Clones are handles to the same disk.
#[derive(Debug, Clone, Default)]
pub struct Disk(Arc<Mutex<Platter>>);

#[derive(Debug, Default)]
struct Platter {
    now: Vec<u8>,
    /// The content at the last sync.
    synced: Vec<u8>,
    /// Changes since the last sync, in order.
    unsynced: Vec<Change>,
    /// Remaining writes and syncs before the disk stops.
    left: Option<u64>,
    full: bool,
    unreadable: bool,
    operations: u64,
}

#[derive(Debug)]
enum Change {
    Bytes(usize, Vec<u8>),
    Length(usize),
}

impl Change {
    fn apply(&self, content: &mut Vec<u8>) {
        match self {
            Self::Length(length) => content.resize(*length, 0),
            Self::Bytes(offset, bytes) => put(content, *offset, bytes),
        }
    }
}

fn put(content: &mut Vec<u8>, offset: usize, bytes: &[u8]) {
    let end = offset + bytes.len();
    content.resize(content.len().max(end), 0);
    content[offset..end].copy_from_slice(bytes);
}

impl Platter {
    fn operate(&mut self) -> io::Result<()> {
        self.operations += 1;
        match &mut self.left {
            Some(0) => return Err(io::Error::other("the disk has stopped")),
            Some(left) => *left -= 1,
            None => {}
        }
        match self.full {
            true => Err(io::ErrorKind::StorageFull.into()),
            false => Ok(()),
        }
    }

    fn change(&mut self, change: Change) -> io::Result<()> {
        self.operate()?;
        change.apply(&mut self.now);
        self.unsynced.push(change);
        Ok(())
    }
}

impl Disk {
    /// Returns a disk with the current content of this one, and no faults.
    #[must_use]
    pub fn copy(&self) -> Self {
        Self::of(self.lock().now.clone())
    }

    /// Makes the disk full, or gives it room again.
    pub fn fill(&self, full: bool) {
        self.lock().full = full;
    }

    /// Makes the disk unreadable, or readable again.
    pub fn fail_reads(&self, fails: bool) {
        self.lock().unreadable = fails;
    }

    /// Stops the disk after this many writes and syncs. With `None`, it works.
    pub fn fail_in(&self, operations: Option<u64>) {
        self.lock().left = operations;
    }

    /// Returns the number of writes and syncs so far, including failed ones.
    pub fn operations(&self) -> u64 {
        self.lock().operations
    }

    /// Returns the disk as a power loss leaves it. Of each write since the last sync, it has everything, nothing, the
    /// beginning, or any of the sectors. `random` returns a number below its argument.
    #[must_use]
    pub fn lose_power(&self, random: &mut dyn FnMut(usize) -> usize) -> Self {
        let platter = self.lock();
        let mut content = platter.synced.clone();
        for change in &platter.unsynced {
            match change {
                Change::Length(_) if random(2) == 0 => {}
                Change::Length(_) => change.apply(&mut content),
                Change::Bytes(offset, bytes) => match random(4) {
                    0 => {}
                    1 => change.apply(&mut content),
                    2 => put(&mut content, *offset, &bytes[..random(bytes.len() + 1)]),
                    _ => put_some_sectors(&mut content, *offset, bytes, random),
                },
            }
        }
        Self::of(content)
    }

    fn of(content: Vec<u8>) -> Self {
        Self(Arc::new(Mutex::new(Platter {
            now: content.clone(),
            synced: content,
            ..Platter::default()
        })))
    }

    fn lock(&self) -> MutexGuard<'_, Platter> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes some of the sectors. Sectors are aligned on the disk, not within the bytes of a write.
fn put_some_sectors(
    content: &mut Vec<u8>,
    offset: usize,
    bytes: &[u8],
    random: &mut dyn FnMut(usize) -> usize,
) {
    let mut at = 0;
    while at < bytes.len() {
        let end = (at + SECTOR - (offset + at) % SECTOR).min(bytes.len());
        if random(2) == 0 {
            put(content, offset + at, &bytes[at..end]);
        }
        at = end;
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.lock().now.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let platter = self.lock();
        if platter.unreadable {
            return Err(io::Error::other("an uncorrectable error of the medium"));
        }
        let offset = offset as usize;
        let content = platter.now.get(offset..offset + out.len());
        out.copy_from_slice(content.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.lock().change(Change::Length(length as usize))
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut platter = self.lock();
        platter.operate()?;
        platter.synced = platter.now.clone();
        platter.unsynced.clear();
        Ok(())
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let bytes = bytes.to_vec();
        self.lock().change(Change::Bytes(offset as usize, bytes))
    }
}
