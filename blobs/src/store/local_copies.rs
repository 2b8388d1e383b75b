//! Finds wanted content that other local files already contain at any offset, such as equal tensors of other models, or
//! part files.
//!
//! The content is verified first: a provider sends only the hashes of the tree (the parents), and chunk groups that do
//! not match are fetched.

use std::{
    collections::{HashMap, HashSet},
    fs::{self, File},
    io,
    ops::Range,
    path::Path,
    sync::Arc,
};

use rustix::{
    fs::{SeekFrom, seek},
    io::Errno,
};

use crate::{
    Hash, Manifest, Store, StoreError,
    bitfield::Bitfield,
    files, manifest,
    source::Source,
    tree::{GROUP, Tree},
};

/// The most files kept open as sources.
const MAX_SOURCES: usize = 256;

/// The most written ranges of a part file that are told apart; each costs two system calls. The rest of the file
/// counts as written.
const MAX_RANGES: usize = 4096;

/// The most tensors in an [`Index`]: 16 bytes each, 16 MiB in all. Models beyond that are read for each search.
const MAX_INDEXED: usize = 1 << 20;

/// An index from tensors to the models of a store that contain them. It covers the models read so far; manifests do not
/// change, and each is read once. The next search removes models that the store no longer holds.
#[derive(Debug, Default)]
pub(crate) struct Index {
    models: Vec<Hash>,
    known: HashSet<Hash>,
    /// The first 8 bytes of a tensor's hash, and the position of a model in `models`; sorted.
    tensors: Vec<(u64, u32)>,
}

impl Index {
    /// Adds the tensors of a model, if there is room.
    fn insert(&mut self, model: Hash, manifest: &Manifest) {
        let tensors = manifest.files().iter().flat_map(|file| &file.tensors);
        let tensors: Vec<u64> = tensors.map(|tensor| hash_prefix(&tensor.blake3)).collect();
        if self.known.contains(&model) || self.tensors.len() + tensors.len() > MAX_INDEXED {
            return;
        }
        let Ok(place) = u32::try_from(self.models.len()) else {
            return;
        };
        self.models.push(model);
        self.known.insert(model);
        self.tensors
            .extend(tensors.into_iter().map(|tensor| (tensor, place)));
        self.tensors.sort_unstable();
        self.tensors.dedup();
    }

    /// Removes all models except those in `held`.
    fn keep_only(&mut self, held: &HashSet<Hash>) {
        if self.known.is_subset(held) {
            return;
        }
        let mut models = Vec::new();
        // The new position of each model that stays. The models keep their order, so the tensors stay sorted.
        let places: Vec<Option<u32>> = self
            .models
            .iter()
            .map(|model| {
                let place = u32::try_from(models.len()).ok();
                held.contains(model).then(|| models.push(*model))?;
                place
            })
            .collect();
        self.tensors.retain_mut(|(_, place)| {
            let new = places[*place as usize];
            *place = new.unwrap_or_default();
            new.is_some()
        });
        self.known.retain(|model| held.contains(model));
        self.models = models;
    }

    /// Returns the models that may contain any of these tensors.
    fn models_with(&self, wanted: impl Iterator<Item = Hash>) -> HashSet<Hash> {
        let mut found = HashSet::new();
        for tensor in wanted {
            let prefix = hash_prefix(&tensor);
            let first = self.tensors.partition_point(|(known, _)| *known < prefix);
            let same = self.tensors[first..].iter();
            let same = same.take_while(|(known, _)| *known == prefix);
            found.extend(same.map(|(_, place)| self.models[*place as usize]));
        }
        found
    }
}

/// Returns the first 8 bytes of a hash: enough to skip nearly all models that do not contain the tensor.
fn hash_prefix(hash: &Hash) -> u64 {
    let (first, _) = hash
        .as_bytes()
        .split_first_chunk()
        .expect("a hash has 32 bytes");
    u64::from_be_bytes(*first)
}

/// Content of a wanted blob that other files on this machine hold.
#[derive(Debug)]
pub(crate) struct LocalCopies {
    /// Sorted by offset in the wanted blob; pieces do not overlap.
    pieces: Vec<Piece>,
    groups: Bitfield,
}

#[derive(Debug)]
struct Piece {
    range: Range<u64>,
    source: Arc<Source>,
    at: u64,
}

/// A tensor of a wanted file: the position of the file in the search, and of the tensor in the file.
type Place = (usize, usize);

impl LocalCopies {
    /// Searches all models of the store for the tensors of `files`, by hash. Returns the sources for each blob of which
    /// whole groups were found. Blocks.
    ///
    /// # Errors
    /// [`StoreError`].
    pub(crate) fn find(
        store: &Store,
        files: &[&manifest::File],
    ) -> Result<HashMap<Hash, Arc<Self>>, StoreError> {
        let mut wanted: HashMap<Hash, Vec<Place>> = HashMap::new();
        for (at, file) in files.iter().enumerate() {
            for (i, tensor) in file.tensors.iter().enumerate() {
                if tensor.start < tensor.end {
                    wanted.entry(tensor.blake3).or_default().push((at, i));
                }
            }
        }
        if wanted.is_empty() {
            return Ok(HashMap::new());
        }
        let coming: HashSet<Hash> = files.iter().map(|file| file.blake3).collect();
        let mut looked_at = HashSet::new();
        let mut sources = 0;
        let mut found: HashMap<Place, (Arc<Source>, u64)> = HashMap::new();
        let models = store.models()?;
        let likely = {
            let mut index = store.tensors();
            index.keep_only(&models.iter().map(|model| model.id).collect());
            index.models_with(wanted.keys().copied())
        };
        for model in models {
            if !likely.contains(&model.id) && store.tensors().known.contains(&model.id) {
                continue;
            }
            let Some(manifest) = store.manifest(&model.id)? else {
                continue;
            };
            store.tensors().insert(model.id, &manifest);
            for file in manifest.files() {
                if coming.contains(&file.blake3) || !looked_at.insert(file.blake3) {
                    continue;
                }
                let mut source = None;
                let mut tried = false;
                for tensor in &file.tensors {
                    let Some(places) = wanted.get(&tensor.blake3) else {
                        continue;
                    };
                    let fits = |(at, i): &&Place| {
                        let wanted = &files[*at].tensors[*i];
                        wanted.end - wanted.start == tensor.end.saturating_sub(tensor.start)
                    };
                    for place in places.iter().filter(fits) {
                        if found.contains_key(place) {
                            continue;
                        }
                        if !std::mem::replace(&mut tried, true) && sources < MAX_SOURCES {
                            source = store.whole(&file.blake3)?.map(Arc::new);
                            sources += usize::from(source.is_some());
                        }
                        if let Some(source) = &source {
                            found.insert(*place, (Arc::clone(source), tensor.start));
                        }
                    }
                    if tried && source.is_none() {
                        // The file is not here, and so none of its other tensors is.
                        break;
                    }
                }
            }
        }
        let mut pieces: HashMap<usize, Vec<Piece>> = HashMap::new();
        for ((at, i), (source, start)) in found {
            let tensor = &files[at].tensors[i];
            pieces.entry(at).or_default().push(Piece {
                range: tensor.start..tensor.end,
                source,
                at: start,
            });
        }
        let of_files = pieces.into_iter().filter_map(|(at, pieces)| {
            let file = files[at];
            let copies = Self::new(Tree::new(file.size), pieces);
            (copies.groups.count() > 0).then(|| (file.blake3, Arc::new(copies)))
        });
        Ok(of_files.collect())
    }

    /// Finds content in a part file that has no row in this store. Such a file is there if another node left it in a
    /// folder that both write to, or if the store's database was lost. Returns `None` if there is nothing. Blocks.
    ///
    /// # Errors
    /// An I/O error of the disk.
    pub(crate) fn left(hash: Hash, tree: Tree, part: &Path) -> io::Result<Option<Self>> {
        match fs::symlink_metadata(part) {
            Ok(metadata) if metadata.is_file() && metadata.len() == tree.size() => {}
            Ok(_) => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        }
        let file = files::open(part)?;
        let written = written(&file, tree.size());
        let content = (part.to_owned(), Bitfield::empty(tree.groups()));
        let source = Arc::new(Source::left(hash, tree, content, file, None));
        let pieces = written.into_iter().map(|range| Piece {
            at: range.start,
            range,
            source: Arc::clone(&source),
        });
        let left = Self::new(tree, pieces.collect());
        Ok((left.groups.count() > 0).then_some(left))
    }

    fn new(tree: Tree, mut pieces: Vec<Piece>) -> Self {
        pieces.sort_by_key(|piece| (piece.range.start, piece.range.end));
        let mut end = 0;
        // Tensors of a hostile manifest may overlap.
        pieces.retain(|piece| {
            let fits = piece.range.start >= end && piece.range.end <= tree.size();
            end = if fits { piece.range.end } else { end };
            fits
        });
        let mut groups = Bitfield::empty(tree.groups());
        let mut run = 0..0;
        for piece in &pieces {
            if piece.range.start != run.end {
                run.start = piece.range.start;
            }
            run.end = piece.range.end;
            let first = run.start.div_ceil(GROUP);
            let last = match run.end == tree.size() {
                true => tree.groups(),
                false => run.end / GROUP,
            };
            if first < last {
                groups.insert_range(first..last);
            }
        }
        Self { pieces, groups }
    }

    /// Returns the groups of which all bytes were found.
    pub(crate) fn groups(&self) -> &Bitfield {
        &self.groups
    }

    /// Reads found content of the blob, starting at `offset`, without checking it. Blocks.
    ///
    /// # Errors
    /// An I/O error of the disk; `UnexpectedEof` if the content at an offset was not found.
    pub(crate) fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let mut done = 0;
        while done < buffer.len() {
            let at = offset + done as u64;
            let place = self.pieces.partition_point(|piece| piece.range.end <= at);
            let piece = self
                .pieces
                .get(place)
                .filter(|piece| piece.range.start <= at);
            let Some(piece) = piece else {
                return Err(io::ErrorKind::UnexpectedEof.into());
            };
            let n = (piece.range.end - at).min((buffer.len() - done) as u64) as usize;
            let from = piece.at + (at - piece.range.start);
            piece
                .source
                .read_unchecked(&mut buffer[done..done + n], from)?;
            done += n;
        }
        Ok(())
    }
}

/// Returns the ranges of a file that were written to, if the file system reports them; otherwise the whole file.
/// Allocated space that was never written to is not included.
fn written(file: &File, size: u64) -> Vec<Range<u64>> {
    let mut ranges = Vec::new();
    let mut at = 0;
    while at < size {
        if ranges.len() >= MAX_RANGES {
            ranges.push(at..size);
            break;
        }
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            // No data follows.
            Err(Errno::NXIO) => break,
            Err(_) => at,
        };
        let end = seek(file, SeekFrom::Hole(start)).unwrap_or(size).min(size);
        if start >= end {
            break;
        }
        ranges.push(start..end);
        at = end;
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::testing::Origin;

    /// Returns a safetensors file with one tensor of four bytes.
    fn file(content: [u8; 4]) -> Vec<u8> {
        let header = r#"{"x":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#;
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        file.extend(content);
        file
    }

    #[test]
    fn only_models_with_a_wanted_tensor_are_read_again() {
        let origins =
            [[1; 4], [2; 4]].map(|content| Origin::new(&[("m.safetensors", &file(content))]));
        let mut index = Index::default();
        for origin in &origins {
            index.insert(origin.id(), &origin.manifest());
            index.insert(origin.id(), &origin.manifest());
        }
        assert_eq!(index.tensors.len(), 2);
        for origin in &origins {
            let tensor = origin.manifest().files()[0].tensors[0].blake3;
            let found = index.models_with([tensor].into_iter());
            assert_eq!(found, HashSet::from([origin.id()]));
        }
        assert!(
            index
                .models_with([Hash::of(b"other")].into_iter())
                .is_empty()
        );
    }

    #[test]
    fn models_that_the_store_no_longer_holds_are_removed_from_the_index() {
        let origins = [[1; 4], [2; 4], [3; 4]]
            .map(|content| Origin::new(&[("m.safetensors", &file(content))]));
        let home = tempfile::tempdir().unwrap();
        let store = crate::store::testing::store(&home);
        for (at, origin) in origins.iter().enumerate() {
            origin.fetch(&store, &home.path().join(at.to_string()));
        }
        let wanted = origins[2].manifest();
        let find = || {
            LocalCopies::find(&store, &[&wanted.files()[0]]).unwrap();
        };
        find();
        assert_eq!(store.tensors().tensors.len(), 3);
        store.remove(&origins[0].id(), true).unwrap();
        find();
        let index = store.tensors();
        assert_eq!((index.tensors.len(), index.models.len()), (2, 2));
        assert_eq!(index.known.len(), 2);
        for origin in &origins[1..] {
            let tensor = origin.manifest().files()[0].tensors[0].blake3;
            assert_eq!(
                index.models_with([tensor].into_iter()),
                HashSet::from([origin.id()])
            );
        }
    }
}
