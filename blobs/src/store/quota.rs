//! The quota: limits the disk space of fetched content, and evicts content when there is not enough.
//!
//! The quota counts content that was fetched below the node's home: whole files, part files, and the store's own
//! copies. It counts neither files that were added in place nor files in other folders that a user chose. Before
//! content is fetched, room is made, in this order:
//!
//! 1. the store's own copies and part files that no model needs;
//! 2. part files of models that are not in use;
//! 3. models that were fetched and are neither tagged, held nor published, least recently used first.
//!
//! If all of that is not enough, nothing is evicted.

use std::{
    collections::{HashMap, HashSet},
    fs,
    path::{Path, PathBuf},
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use redb::{ReadableTable, TableDefinition, WriteTransaction};
use weft_disk::{Database, Outcome};

use super::{
    BLOBS, MODELS, Model, PARTS, Store, StoreError, database,
    discards::{Deletions, allocated},
    disk_checks::FileStates,
    locations::change_blob,
    part_path,
    refs::REFS,
    remove::Forget,
    rows::{BlobRow, ModelRow, PartRow, decode, path_from},
};
use crate::{Hash, Manifest, bitfield::Bitfield, index::Location, tree::Tree};

pub(super) const SETTINGS: TableDefinition<'_, &str, u64> = TableDefinition::new("settings");

/// Name of the setting that holds the quota.
const QUOTA: &str = "quota";

/// Name of the setting that counts how often the store was not closed; see [`begin_epoch`].
const EPOCH: &str = "epoch";

/// The interval at which uses are written to the database. It is precise enough for the order of eviction, and costs
/// few writes.
const NOTE_USE: Duration = Duration::from_secs(60);

/// Bytes used by each kind of content.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Fetched files of models, below the home.
    pub models: u64,
    /// Part files, below the home.
    pub parts: u64,
    /// The store's own copies of blobs.
    pub owned: u64,
    /// Bytes that running transfers will still write below the home.
    pub expected: u64,
    /// Manifests, outboards and the database.
    pub metadata: u64,
    /// Fetched files in folders outside the home.
    pub external: u64,
    /// Files that were added in place.
    pub in_place: u64,
}

impl Usage {
    /// Returns the bytes that count against the quota.
    pub fn counted(&self) -> u64 {
        self.models + self.parts + self.owned + self.expected
    }
}

/// A file for which room is needed.
#[derive(Debug, Clone)]
pub struct Need {
    /// Path of the file.
    pub target: PathBuf,
    /// Hash of the content.
    pub hash: Hash,
    /// Bytes that the file, or its part file, will take.
    pub bytes: u64,
}

impl Need {
    /// Returns the need for `bytes` more than the store's own part file of a blob of `size` bytes takes now. Stats the
    /// part file.
    pub fn more(store: &Store, hash: Hash, size: u64, bytes: u64) -> Self {
        let target = store.own_copy_path(&hash);
        let here = allocated(&part_path(&target, &hash));
        Self {
            target,
            hash,
            bytes: here.saturating_add(bytes).min(size),
        }
    }

    /// Returns the bytes that are still to be written.
    fn rest(&self) -> u64 {
        if fs::symlink_metadata(&self.target).is_ok() {
            return 0;
        }
        let part = part_path(&self.target, &self.hash);
        self.bytes.saturating_sub(allocated(&part))
    }
}

/// Room that is reserved for a transfer, until dropped.
#[derive(Debug)]
#[must_use = "it sets aside nothing once dropped"]
pub struct Room {
    store: Store,
    number: u64,
}

impl Drop for Room {
    fn drop(&mut self) {
        if let Ok(mut rooms) = self.store.inner.rooms.lock() {
            rooms.remove(&self.number);
        }
    }
}

/// Content that may be evicted.
#[derive(Debug)]
enum Candidate {
    /// Everything of a blob that no model needs.
    Blob(Hash),
    /// A part file.
    Part(Hash, PathBuf),
    Model(Box<Model>, Box<Manifest>),
}

/// A model and its manifest.
type Listed = (Model, Manifest);

/// The content chosen for eviction so far.
struct Choice {
    /// Bytes to be freed.
    bytes: u64,
    freed: u64,
    chosen: Vec<Candidate>,
}

impl Choice {
    /// Chooses a candidate that frees `size` bytes, unless enough is chosen already. Returns true if enough is chosen
    /// now.
    fn take(&mut self, candidate: Candidate, size: u64) -> bool {
        if size > 0 && self.freed < self.bytes {
            self.freed += size;
            self.chosen.push(candidate);
        }
        self.freed >= self.bytes
    }
}

/// The rows by which candidates are chosen, and the states of their files.
struct Known<'a> {
    home: &'a Path,
    states: &'a FileStates,
    blobs: HashMap<Hash, BlobRow>,
    parts: HashMap<Hash, Vec<(PathBuf, u64)>>,
    /// Number of models that need each blob.
    counts: HashMap<Hash, u64>,
}

/// Name of the setting that counts uses. Eviction is ordered by this count and not by clocks, which may jump.
const USES: &str = "uses";

/// Returns the number of the last recorded use. The rows of a store from an earlier version hold times; the count then
/// continues from the greatest.
pub(super) fn last_use(txn: &WriteTransaction) -> Result<u64, StoreError> {
    let mut settings = txn.open_table(SETTINGS).map_err(database)?;
    let known = settings.get(USES).map_err(database)?;
    if let Some(known) = known.map(|uses| uses.value()) {
        return Ok(known);
    }
    let mut last = 0;
    let blobs = txn.open_table(BLOBS).map_err(database)?;
    for row in blobs.iter().map_err(database)? {
        let (_, row) = row.map_err(database)?;
        last = last.max(decode::<BlobRow>("blobs", row.value())?.used_at);
    }
    let models = txn.open_table(MODELS).map_err(database)?;
    for row in models.iter().map_err(database)? {
        let (_, row) = row.map_err(database)?;
        last = last.max(decode::<ModelRow>("models", row.value())?.used_at);
    }
    let last = u64::try_from(last).unwrap_or_default();
    settings.insert(USES, last).map_err(database)?;
    Ok(last)
}

/// Records the number of a use, in the transaction that records what was used.
pub(super) fn note_use(txn: &WriteTransaction, number: u64) -> Result<(), StoreError> {
    let mut settings = txn.open_table(SETTINGS).map_err(database)?;
    let known = settings.get(USES).map_err(database)?;
    let known = known.map_or(0, |uses| uses.value());
    settings.insert(USES, known.max(number)).map_err(database)?;
    Ok(())
}

/// Returns the number of the current epoch. A new epoch begins if the store was not closed, because part files may then
/// hold content that no row lists.
pub(super) fn begin_epoch(metadata: &Database, was_left: bool) -> Result<u64, StoreError> {
    metadata.decide(|txn| {
        let mut table = txn.open_table(SETTINGS).map_err(database)?;
        let known = table.get(EPOCH).map_err(database)?;
        let known = known.map_or(0, |epoch| epoch.value());
        if !was_left {
            return Ok(Outcome::Abort(known));
        }
        table.insert(EPOCH, known + 1).map_err(database)?;
        Ok(Outcome::Commit(known + 1))
    })
}

impl Store {
    /// Returns the quota: the most bytes of fetched content below the home. `None` means no limit.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn quota(&self) -> Result<Option<u64>, StoreError> {
        self.read(|txn| {
            let table = txn.open_table(SETTINGS).map_err(database)?;
            let quota = table.get(QUOTA).map_err(database)?;
            Ok(quota.map(|quota| quota.value()))
        })
    }

    /// Changes the quota. Nothing is evicted until room is needed. Durable on return.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn set_quota(&self, quota: Option<u64>) -> Result<(), StoreError> {
        self.write(|txn| {
            let mut table = txn.open_table(SETTINGS).map_err(database)?;
            match quota {
                Some(quota) => drop(table.insert(QUOTA, quota).map_err(database)?),
                None => drop(table.remove(QUOTA).map_err(database)?),
            }
            Ok(())
        })
    }

    /// Returns the bytes that each kind of content takes. Checks each file; for a disk that does not respond, uses the
    /// rows of its files. `home` is the folder below which the quota counts.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn usage(&self, home: &Path) -> Result<Usage, StoreError> {
        self.usage_by(home, &self.check_all(false)?)
    }

    fn usage_by(&self, home: &Path, states: &FileStates) -> Result<Usage, StoreError> {
        let mut usage = Usage {
            expected: self.expected(),
            ..Usage::default()
        };
        let folder = &self.inner.folder;
        let owned = folder.join("blobs");
        for (_, row) in self.blob_rows()? {
            for row in &row.locations {
                let location = Location::from(row);
                let bytes = states.size(&location.path).unwrap_or(location.size);
                match () {
                    () if location.path.starts_with(&owned) => usage.owned += bytes,
                    () if location.path.starts_with(folder) => {}
                    () if !row.written => usage.in_place += bytes,
                    () if location.path.starts_with(home) => usage.models += bytes,
                    () => usage.external += bytes,
                }
            }
        }
        for location in self.models()?.iter().flat_map(|model| &model.results) {
            let bytes = states.size(&location.path).unwrap_or(location.size);
            match location.path.starts_with(home) {
                true => usage.models += bytes,
                false => usage.external += bytes,
            }
        }
        let open = self.open_parts().clone().into_iter();
        let mut parts: HashMap<PathBuf, u64> = open.map(|part| (part, 0)).collect();
        parts.extend(self.all_parts()?.into_values().flatten());
        for (part, had) in parts {
            let bytes = states.allocated(&part).unwrap_or(had);
            match part.starts_with(home) {
                true => usage.parts += bytes,
                false => usage.external += bytes,
            }
        }
        for kind in ["outboards", "manifests"] {
            let path = folder.join(kind);
            for entry in fs::read_dir(&path).map_err(StoreError::io("cannot read", &path))? {
                let entry = entry.map_err(StoreError::io("cannot read", &path))?;
                usage.metadata += entry.metadata().map_or(0, |file| file.len());
            }
        }
        usage.metadata += allocated(&folder.join("meta.redb"));
        Ok(usage)
    }

    /// Returns the free bytes on the disk that holds the store.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn free(&self) -> Result<u64, StoreError> {
        let folder = &self.inner.folder;
        let stat = rustix::fs::statvfs(folder)
            .map_err(std::io::Error::from)
            .map_err(StoreError::io("cannot read", folder))?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    /// Reserves room for the files that a transfer will write below `home`, and evicts content if needed. Models in
    /// `published` are never evicted. Returns the evicted models; the caller withdraws their records.
    ///
    /// # Errors
    /// [`StoreError::QuotaExceeded`] if eviction cannot free enough; nothing is evicted then.
    pub fn make_room(
        &self,
        mut needs: Vec<Need>,
        home: &Path,
        published: &HashSet<Hash>,
    ) -> Result<(Room, Vec<Model>), StoreError> {
        needs.retain(|need| need.target.starts_with(home));
        let needed: u64 = needs.iter().map(Need::rest).sum();
        let quota = match needed {
            0 => None,
            _ => self.quota()?,
        };
        let states = quota.map(|_| self.check_all(true)).transpose()?;
        let _alone = self.lock_deletion();
        let mut gone = Vec::new();
        if let (Some(quota), Some(states)) = (quota, &states) {
            self.note_used(true)?;
            let used = self.usage_by(home, states)?.counted();
            let too_much = used.saturating_add(needed).saturating_sub(quota);
            if too_much > 0 {
                let exceeded = StoreError::QuotaExceeded {
                    needed,
                    quota,
                    used,
                };
                let candidates = self.candidates(too_much, (home, states), published)?;
                gone = self.evict(candidates.ok_or(exceeded)?, states)?;
            }
        }
        let number = self.inner.next_room.fetch_add(1, Ordering::Relaxed);
        self.rooms().insert(number, needs);
        let room = Room {
            store: self.clone(),
            number,
        };
        Ok((room, gone))
    }

    /// Returns the content to evict, in order, to free `bytes` bytes; `None` if evicting all candidates is not enough.
    fn candidates(
        &self,
        bytes: u64,
        (home, states): (&Path, &FileStates),
        published: &HashSet<Hash>,
    ) -> Result<Option<Vec<Candidate>>, StoreError> {
        let known = Known {
            home,
            states,
            blobs: self.blob_rows()?,
            parts: self.all_parts()?,
            counts: self.ref_counts()?,
        };
        let mut choice = Choice {
            bytes,
            freed: 0,
            chosen: Vec::new(),
        };
        if self.choose_orphans(&known, &mut choice)? {
            return Ok(Some(choice.chosen));
        }
        let (models, guarded) = self.by_use(&known)?;
        let enough = self.choose_parts(&known, &models, &guarded, &mut choice)
            || self.choose_models(&known, models, published, &mut choice);
        Ok(enough.then_some(choice.chosen))
    }

    /// Chooses blobs that no model needs and nobody holds. Returns true if that is enough.
    fn choose_orphans(&self, known: &Known<'_>, choice: &mut Choice) -> Result<bool, StoreError> {
        let held = self.held()?;
        let of_parts = |hash: &Hash| -> u64 {
            let parts = known.parts.get(hash).into_iter().flatten();
            let below = parts.filter(|(part, _)| part.starts_with(known.home));
            below
                .filter_map(|(part, _)| known.states.allocated(part))
                .sum()
        };
        let blobs = known.blobs.keys().chain(known.parts.keys());
        let orphans: HashSet<Hash> = blobs
            .filter(|hash| !known.counts.contains_key(hash) && !held.contains(hash))
            .copied()
            .collect();
        Ok(orphans.iter().any(|hash| {
            let size = self.owned_size(hash) + of_parts(hash);
            choice.take(Candidate::Blob(*hash), size)
        }))
    }

    /// Returns the models that may be evicted, least recently used first, and the files of all other models. Part files
    /// of models that are in use or tagged stay.
    fn by_use(&self, known: &Known<'_>) -> Result<(Vec<Listed>, HashSet<Hash>), StoreError> {
        let tagged: HashSet<Hash> = self.tags()?.into_iter().map(|tag| tag.model).collect();
        let mut models = Vec::new();
        let mut guarded = HashSet::new();
        for model in self.models()? {
            let Some(manifest) = self.manifest(&model.id)? else {
                continue;
            };
            let files = || manifest.files().iter().map(|file| file.blake3);
            let is_used = self.is_held(&model.id) || files().any(|hash| self.is_held(&hash));
            if is_used || tagged.contains(&model.id) {
                guarded.extend(files());
                continue;
            }
            let used = files().filter_map(|hash| Some(known.blobs.get(&hash)?.used_at));
            let used = used.max().unwrap_or(0).max(model.used_at);
            models.push((used, model, manifest));
        }
        models.sort_by_key(|(used, model, _)| (*used, model.id));
        let models = models.into_iter();
        let models = models.map(|(_, model, manifest)| (model, manifest));
        Ok((models.collect(), guarded))
    }

    /// Chooses part files of models that may be evicted. Returns true if that is enough.
    fn choose_parts(
        &self,
        known: &Known<'_>,
        models: &[Listed],
        guarded: &HashSet<Hash>,
        choice: &mut Choice,
    ) -> bool {
        let mut gone = HashSet::new();
        for file in models.iter().flat_map(|(_, manifest)| manifest.files()) {
            let hash = file.blake3;
            for (part, _) in known.parts.get(&hash).into_iter().flatten() {
                let stays = guarded.contains(&hash)
                    || self.is_arriving(part)
                    || !part.starts_with(known.home)
                    || gone.contains(part);
                if stays {
                    continue;
                }
                gone.insert(part.clone());
                let bytes = known.states.allocated(part).unwrap_or(0);
                if choice.take(Candidate::Part(hash, part.clone()), bytes) {
                    return true;
                }
            }
        }
        false
    }

    /// Chooses models that were fetched and are not published. Returns true if that is enough.
    fn choose_models(
        &self,
        known: &Known<'_>,
        models: Vec<Listed>,
        published: &HashSet<Hash>,
        choice: &mut Choice,
    ) -> bool {
        for (model, manifest) in models {
            let is_published = model.names.iter().any(|name| name.published);
            if !model.fetched || is_published || published.contains(&model.id) {
                continue;
            }
            let mut size = 0;
            for file in manifest.files() {
                let path = model.root.join(&file.path);
                let rows = known.blobs.get(&file.blake3).into_iter();
                let rows = rows.flat_map(|row| &row.locations);
                let here = rows.filter(|row| row.written && path_from(&row.path) == path);
                let mut here = here.filter(|row| known.states.is_here(row) == Some(true));
                if let (true, Some(row)) = (path.starts_with(known.home), here.next()) {
                    size += row.size;
                }
                let count = known.counts.get(&file.blake3);
                if count.is_none_or(|count| *count <= 1) {
                    size += self.owned_size(&file.blake3);
                }
            }
            let candidate = Candidate::Model(Box::new(model), Box::new(manifest));
            if choice.take(candidate, size) {
                return true;
            }
        }
        false
    }

    /// Returns the size of the store's own copy of a blob, in bytes; 0 if there is none.
    fn owned_size(&self, hash: &Hash) -> u64 {
        let owned = self.own_copy_path(hash);
        fs::symlink_metadata(owned).map_or(0, |file| file.len())
    }

    /// Removes the rows of all candidates in one transaction, and then their files. Returns the evicted models.
    fn evict(
        &self,
        candidates: Vec<Candidate>,
        states: &FileStates,
    ) -> Result<Vec<Model>, StoreError> {
        let held = self.held()?;
        let mut deletions = Deletions::default();
        let mut gone = Vec::new();
        self.write(|txn| {
            let forget = Forget {
                store: self,
                txn,
                held: &held,
                states,
                files: true,
                copies: false,
            };
            for candidate in candidates {
                match candidate {
                    Candidate::Blob(hash) => {
                        tracing::info!(%hash, "evicted a blob that no model needs");
                        forget.blob(&hash, &mut deletions)?;
                    }
                    Candidate::Part(hash, part) => {
                        tracing::info!(part = %part.display(), "evicted a part file");
                        forget.drop_part(&hash, &part)?;
                        deletions.part(self, &hash, part, states);
                    }
                    Candidate::Model(model, manifest) => {
                        tracing::info!(model = %model.id, "evicted the least recently used model");
                        forget.model(&model, Some(&manifest), &mut deletions)?;
                        gone.push(*model);
                    }
                }
            }
            deletions.note(txn)
        })?;
        self.delete(deletions, states)?;
        Ok(gone)
    }

    /// Records that a blob was read, for the order of eviction. Written to the database once a minute.
    pub fn used(&self, hash: &Hash) {
        let number = self.next_use();
        self.uses().blobs.insert(*hash, number as i64);
        // An error is not reported: only the order of eviction depends on it.
        if let Err(error) = self.note_used(false) {
            tracing::debug!(%error, "cannot record what was used");
        }
    }

    /// Returns the number of a new use, greater than that of any earlier use.
    pub(super) fn next_use(&self) -> u64 {
        self.inner.last_use.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Writes the uses to the database: if the interval has passed, or always with `anyway`.
    fn note_used(&self, anyway: bool) -> Result<(), StoreError> {
        let blobs = {
            let mut used = self.uses();
            if used.blobs.is_empty() || (!anyway && used.noted.elapsed() < NOTE_USE) {
                return Ok(());
            }
            used.noted = Instant::now();
            std::mem::take(&mut used.blobs)
        };
        self.write(|txn| {
            let last = blobs.values().max().copied().unwrap_or_default();
            note_use(txn, u64::try_from(last).unwrap_or_default())?;
            blobs.into_iter().try_for_each(|(hash, at)| {
                change_blob(txn, &hash, |row| row.used_at = at).map(drop)
            })
        })
    }

    /// Returns the bytes that running transfers will still write.
    fn expected(&self) -> u64 {
        let needs: Vec<Need> = self.rooms().values().flatten().cloned().collect();
        needs.iter().map(Need::rest).sum()
    }

    pub(super) fn blob_rows(&self) -> Result<HashMap<Hash, BlobRow>, StoreError> {
        self.read(|txn| {
            let table = txn.open_table(BLOBS).map_err(database)?;
            let mut rows = HashMap::new();
            for row in table.iter().map_err(database)? {
                let (hash, row) = row.map_err(database)?;
                rows.insert((*hash.value()).into(), decode("blobs", row.value())?);
            }
            Ok(rows)
        })
    }

    /// Returns the files that transfers wrote, with the hashes of the content that each is known to hold. Includes
    /// files found in the folder of a fetched model, where another node may have written them. Excludes files in the
    /// folder of a model that was added in place.
    pub(crate) fn fetched_files(&self) -> Result<HashMap<PathBuf, Vec<Hash>>, StoreError> {
        let (fetched, added): (Vec<_>, Vec<_>) =
            self.models()?.into_iter().partition(|model| model.fetched);
        let is_in = |models: &[Model], path: &Path| {
            models.iter().any(|model| path.starts_with(&model.root))
        };
        let mut files: HashMap<PathBuf, Vec<Hash>> = HashMap::new();
        for (hash, row) in self.blob_rows()? {
            for row in &row.locations {
                let path = path_from(&row.path);
                if (row.written || is_in(&fetched, &path)) && !is_in(&added, &path) {
                    files.entry(path).or_default().push(hash);
                }
            }
        }
        Ok(files)
    }

    /// Returns the part files that have a row, each with the number of bytes it holds.
    pub(super) fn all_parts(&self) -> Result<HashMap<Hash, Vec<(PathBuf, u64)>>, StoreError> {
        self.read(|txn| {
            let table = txn.open_table(PARTS).map_err(database)?;
            let mut parts: HashMap<Hash, Vec<(PathBuf, u64)>> = HashMap::new();
            for row in table.iter().map_err(database)? {
                let (key, row) = row.map_err(database)?;
                if let Some((hash, path)) = key.value().split_first_chunk::<32>() {
                    let row: PartRow = decode("parts", row.value())?;
                    let tree = Tree::new(row.size);
                    let had = Bitfield::from_bytes(&row.bits, tree.groups());
                    let had = had.map_or(0, |had| had.bytes(&tree));
                    let of_blob = parts.entry((*hash).into()).or_default();
                    of_blob.push((path_from(path), had));
                }
            }
            Ok(parts)
        })
    }

    fn ref_counts(&self) -> Result<HashMap<Hash, u64>, StoreError> {
        self.read(|txn| {
            let table = txn.open_table(REFS).map_err(database)?;
            let mut counts = HashMap::new();
            for row in table.iter().map_err(database)? {
                let (hash, count) = row.map_err(database)?;
                counts.insert((*hash.value()).into(), count.value());
            }
            Ok(counts)
        })
    }

    fn rooms(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Vec<Need>>> {
        self.inner
            .rooms
            .lock()
            .expect("nothing panics while holding the lock")
    }

    fn uses(&self) -> std::sync::MutexGuard<'_, Uses> {
        self.inner
            .uses
            .lock()
            .expect("nothing panics while holding the lock")
    }
}

/// Blobs that were read since the last write to the database, with the numbers of their last uses.
#[derive(Debug)]
pub(super) struct Uses {
    blobs: HashMap<Hash, i64>,
    /// Time of the last write to the database.
    noted: Instant,
}

impl Default for Uses {
    fn default() -> Self {
        Self {
            blobs: HashMap::new(),
            noted: Instant::now(),
        }
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;
    use crate::{
        store::testing::{Origin, add, content, store},
        tree::GROUP,
    };

    /// Returns a model with one file of `groups` groups.
    fn origin(seed: u8, groups: u64) -> Origin {
        Origin::new(&[("a", &content(seed, groups))])
    }

    fn set_used_at(store: &Store, id: &Hash, at: i64) {
        store
            .write(|txn| {
                let mut table = txn.open_table(MODELS).map_err(database)?;
                let row = table.get(id.as_bytes()).map_err(database)?;
                let row: ModelRow = decode("models", row.unwrap().value())?;
                let row = ModelRow { used_at: at, ..row };
                table
                    .insert(id.as_bytes(), row.encode_to_vec().as_slice())
                    .map_err(database)?;
                Ok(())
            })
            .unwrap();
    }

    struct Setup {
        home: tempfile::TempDir,
        store: Store,
    }

    impl Setup {
        fn new() -> Self {
            let home = tempfile::tempdir().unwrap();
            let store = store(&home);
            Self { home, store }
        }

        fn root(&self, name: &str) -> PathBuf {
            self.home.path().join("models").join(name)
        }

        /// Makes room for `groups` groups.
        fn room(&self, groups: u64) -> Result<(Room, Vec<Model>), StoreError> {
            let need = Need {
                target: self.root("new").join("file"),
                hash: Hash::of(b"new"),
                bytes: groups * GROUP,
            };
            self.store
                .make_room(vec![need], self.home.path(), &HashSet::new())
        }

        fn counted(&self) -> u64 {
            self.store.usage(self.home.path()).unwrap().counted() / GROUP
        }
    }

    #[test]
    fn content_is_evicted_in_the_documented_order() {
        let setup = Setup::new();
        let store = &setup.store;
        let [old, recent, tagged, published] = [1, 2, 3, 4].map(|seed| origin(seed, 10));
        for (origin, name, at) in [
            (&old, "old", 100),
            (&recent, "recent", 200),
            (&tagged, "tagged", 10),
            (&published, "published", 20),
        ] {
            origin.fetch(store, &setup.root(name));
            set_used_at(store, &origin.id(), at);
        }
        store.tag("keep", &tagged.id()).unwrap();
        store
            .write(|txn| super::super::set_name(txn, published.id(), "a/b@main", Some(None)))
            .unwrap();
        let partial = origin(5, 10);
        partial.expect(store, &setup.root("partial"));
        let part_of = partial.hash("a");
        partial.bring(store, &part_of, &setup.root("partial").join("a"), 4);
        set_used_at(store, &partial.id(), 300);
        let owned = origin(6, 10).hash("a");
        origin(6, 10).bring(store, &owned, &store.own_copy_path(&owned), 10);
        // Added in place, so it does not count.
        add(store, &setup.home.path().join("mine"), &content(7, 10));
        let before = setup.counted();
        assert_eq!(before, 60, "part files take their full size");
        store.set_quota(Some(60 * GROUP)).unwrap();

        let (room, gone) = setup.room(1).unwrap();
        assert!(gone.is_empty() && !store.own_copy_path(&owned).exists());
        assert!(!store.sources(&part_of).unwrap().is_empty());
        drop(room);
        let (room, gone) = setup.room(11).unwrap();
        assert!(gone.is_empty());
        assert!(store.sources(&part_of).unwrap().is_empty());
        drop(room);
        let (room, gone) = setup.room(21).unwrap();
        assert_eq!(gone.len(), 1);
        assert_eq!(gone[0].id, old.id());
        assert!(!setup.root("old").exists());
        assert!(setup.root("recent").join("a").exists());
        // Room reserved for one transfer is not available to another, and nothing is evicted for a transfer that cannot
        // fit.
        let error = setup.room(21).unwrap_err();
        assert!(
            matches!(error, StoreError::QuotaExceeded { used, .. } if used == 51 * GROUP),
            "{error}"
        );
        assert!(setup.root("recent").join("a").exists());
        let hold = store.hold(recent.id());
        setup.room(19).unwrap_err();
        drop(hold);
        let hold = store.hold(recent.hash("a"));
        setup.room(19).unwrap_err();
        drop(hold);
        let (_room, gone) = setup.room(19).unwrap();
        assert_eq!(gone[0].id, recent.id());
        drop(room);
        assert_eq!(setup.counted(), 39);
        assert!(setup.home.path().join("mine/a.bin").exists());
        assert!(store.whole(&tagged.hash("a")).unwrap().is_some());
        assert!(store.whole(&published.hash("a")).unwrap().is_some());
    }

    #[test]
    fn the_most_recently_read_model_is_evicted_last() {
        let setup = Setup::new();
        let store = &setup.store;
        let [one, two] = [1, 2].map(|seed| origin(seed, 10));
        // All within one second.
        one.fetch(store, &setup.root("1"));
        two.fetch(store, &setup.root("2"));
        store.used(&one.hash("a"));
        store.set_quota(Some(20 * GROUP)).unwrap();
        let (_room, gone) = setup.room(1).unwrap();
        assert_eq!(gone[0].id, two.id());
    }

    #[test]
    fn a_clock_that_was_once_ahead_does_not_affect_eviction() {
        let setup = Setup::new();
        let [one, two] = [1, 2].map(|seed| origin(seed, 10));
        one.fetch(&setup.store, &setup.root("1"));
        two.fetch(&setup.store, &setup.root("2"));
        // As an earlier version wrote it, with a clock set to the year 2100.
        set_used_at(&setup.store, &two.id(), 4_102_444_800);
        let Setup { home, store } = setup;
        store
            .write(|txn| {
                let mut settings = txn.open_table(SETTINGS).map_err(database)?;
                settings.remove(USES).map_err(database)?;
                Ok(())
            })
            .unwrap();
        drop(store);
        let store = self::store(&home);
        let setup = Setup { home, store };
        setup.store.used(&one.hash("a"));
        setup.store.set_quota(Some(20 * GROUP)).unwrap();
        let (_room, gone) = setup.room(1).unwrap();
        assert_eq!(gone[0].id, two.id());
    }

    #[test]
    fn folders_outside_the_home_have_no_quota_and_without_a_quota_everything_is_let_in() {
        let setup = Setup::new();
        let store = &setup.store;
        let model = origin(1, 10);
        model.fetch(store, &setup.root("1"));
        let external = tempfile::tempdir().unwrap();
        setup.room(1 << 30).map(drop).unwrap();
        store.set_quota(Some(1)).unwrap();
        let need = Need {
            target: external.path().join("file"),
            hash: Hash::of(b"new"),
            bytes: 1 << 40,
        };
        let (_room, gone) = store
            .make_room(vec![need], setup.home.path(), &HashSet::new())
            .unwrap();
        assert!(gone.is_empty());
        origin(2, 3).fetch(store, &external.path().join("2"));
        let usage = store.usage(setup.home.path()).unwrap();
        assert_eq!((usage.models, usage.external), (10 * GROUP, 3 * GROUP));
        assert!(usage.metadata > 0);
        store.set_quota(None).unwrap();
        assert_eq!(store.quota().unwrap(), None);
        setup.room(1 << 30).map(drop).unwrap();
    }

    #[test]
    fn the_quota_survives_reopening_and_reserved_room_shrinks_as_content_arrives() {
        let setup = Setup::new();
        setup.store.set_quota(Some(40 * GROUP)).unwrap();
        let model = origin(1, 10);
        let target = setup.root("1").join("a");
        let need = Need {
            target: target.clone(),
            hash: model.hash("a"),
            bytes: 10 * GROUP,
        };
        let (_room, _) = setup
            .store
            .make_room(vec![need], setup.home.path(), &HashSet::new())
            .unwrap();
        assert_eq!(setup.counted(), 10);
        model.expect(&setup.store, &setup.root("1"));
        model.bring(&setup.store, &model.hash("a"), &target, 3);
        assert_eq!(setup.counted(), 10);
        model.bring(&setup.store, &model.hash("a"), &target, 10);
        assert_eq!(setup.counted(), 10);
        let Setup { home, store } = setup;
        drop(_room);
        drop(store);
        let quota = self::store(&home).quota().unwrap();
        assert_eq!(quota, Some(40 * GROUP));
    }
}
