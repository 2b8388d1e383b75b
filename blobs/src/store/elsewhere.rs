//! Content that this machine has in other blobs: tensors of other models and revisions, in whatever file and at whatever place they lie there.
//!
//! It is only a guess until it is checked: a provider sends the parents of the groups, without their content, and what does not fit them is fetched.

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

/// Files held open for what is taken from them.
const MAX_SOURCES: usize = 256;

/// Written ranges of a part file that are told apart: each costs two system calls. What follows counts as written.
const MAX_RANGES: usize = 4096;

/// Tensors that [`Index`] holds at most: 16 bytes each, 16 MiB in all. Models beyond are looked at each time.
const MAX_INDEXED: usize = 1 << 20;

/// An index from tensors to the models of a store that have them, for the models looked at so far. Manifests do not
/// change, and are read once. Models that the store holds no longer are forgotten with the next search.
#[derive(Debug, Default)]
pub(crate) struct Index {
    models: Vec<Hash>,
    known: HashSet<Hash>,
    /// The beginning of a tensor's hash, and the place of a model among `models`; sorted.
    tensors: Vec<(u64, u32)>,
}

impl Index {
    /// Takes in the tensors of a model, if there is room.
    fn insert(&mut self, model: Hash, manifest: &Manifest) {
        let tensors = manifest.files().iter().flat_map(|file| &file.tensors);
        let tensors: Vec<u64> = tensors.map(|tensor| beginning(&tensor.blake3)).collect();
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

    /// Forgets all models but those of `held`.
    fn keep_only(&mut self, held: &HashSet<Hash>) {
        if self.known.is_subset(held) {
            return;
        }
        let mut models = Vec::new();
        // The new place of each model that stays: their order is the same, and so the tensors stay sorted.
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

    /// Returns the models that may have any of these tensors.
    fn may_have(&self, wanted: impl Iterator<Item = Hash>) -> HashSet<Hash> {
        let mut found = HashSet::new();
        for tensor in wanted {
            let beginning = beginning(&tensor);
            let first = self
                .tensors
                .partition_point(|(known, _)| *known < beginning);
            let same = self.tensors[first..].iter();
            let same = same.take_while(|(known, _)| *known == beginning);
            found.extend(same.map(|(_, place)| self.models[*place as usize]));
        }
        found
    }
}

/// Enough of a hash to pass over nearly all models that do not have it.
fn beginning(hash: &Hash) -> u64 {
    let (first, _) = hash
        .as_bytes()
        .split_first_chunk()
        .expect("a hash has 32 bytes");
    u64::from_be_bytes(*first)
}

/// Where the content of a blob that is to come lies in other blobs.
#[derive(Debug)]
pub(crate) struct Elsewhere {
    /// By place in the blob; none overlaps another.
    pieces: Vec<Piece>,
    groups: Bitfield,
}

#[derive(Debug)]
struct Piece {
    range: Range<u64>,
    source: Arc<Source>,
    at: u64,
}

/// A tensor of a file that is to come, by the file's place among those asked about.
type Place = (usize, usize);

impl Elsewhere {
    /// Looks for the tensors of `files` in all models of the store, by their hashes; for each blob of which whole groups were found, where they are.
    /// Blocks.
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
            index.may_have(wanted.keys().copied())
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
                        // It is not here: no other tensor of it is either.
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
            let elsewhere = Self::new(Tree::new(file.size), pieces);
            (elsewhere.groups.count() > 0).then(|| (file.blake3, Arc::new(elsewhere)))
        });
        Ok(of_files.collect())
    }

    /// Takes what lies in a part file that no row of this store speaks of: another node left it in a folder that both
    /// fill, or the store's database is lost. `None` if there is nothing. Blocks.
    ///
    /// # Errors
    /// The error of the disk.
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

    /// The groups of which all bytes were found.
    pub(crate) fn groups(&self) -> &Bitfield {
        &self.groups
    }

    /// Reads what was found of the blob from `offset` on; it is not checked. Blocks.
    ///
    /// # Errors
    /// What the disk says; `UnexpectedEof` where nothing was found.
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

/// The ranges of a file that something was written to, as far as the file system tells; else all of it. Room that was
/// set aside and not written to is none.
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
            // There is none after that.
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

    /// A safetensors file of one tensor of four bytes.
    fn file(content: [u8; 4]) -> Vec<u8> {
        let header = r#"{"x":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#;
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        file.extend(content);
        file
    }

    #[test]
    fn of_models_that_were_read_once_only_those_with_a_wanted_tensor_are_read_again() {
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
            let found = index.may_have([tensor].into_iter());
            assert_eq!(found, HashSet::from([origin.id()]));
        }
        assert!(index.may_have([Hash::of(b"other")].into_iter()).is_empty());
    }

    #[test]
    fn models_that_the_store_holds_no_longer_take_no_room_in_the_index() {
        let origins = [[1; 4], [2; 4], [3; 4]]
            .map(|content| Origin::new(&[("m.safetensors", &file(content))]));
        let home = tempfile::tempdir().unwrap();
        let store = crate::store::testing::store(&home);
        for (at, origin) in origins.iter().enumerate() {
            origin.fetch(&store, &home.path().join(at.to_string()));
        }
        let wanted = origins[2].manifest();
        let find = || {
            Elsewhere::find(&store, &[&wanted.files()[0]]).unwrap();
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
                index.may_have([tensor].into_iter()),
                HashSet::from([origin.id()])
            );
        }
    }
}
